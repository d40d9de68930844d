//! The programs and maps of one device in the kernel: loading, pinning, and what is read from them.
//!
//! A *generation* is a directory of pins with everything that one load of the programs made. Once it is complete, its programs
//! run with or without a sender, until its pins are removed.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};

use common::ids::Geometry;

use super::buffer::{Buffer, Layout};
use super::device::{DeviceId, DeviceKind};
use super::error::TrackerError;
use super::libbpf::{self, Map, Object};

/// Keeps the object at an address that an ELF reader may take words from.
#[repr(C, align(8))]
struct Aligned<T: ?Sized>(T);

static OBJECT: &Aligned<[u8]> = &Aligned(*include_bytes!(concat!(env!("OUT_DIR"), "/tracker.bpf.o")));

/// Copies of each program; see `bpf/tracker.bpf.c`.
const COPIES: usize = 3;
const REQUEST_PROGRAMS: [&CStr; 6] =
    [c"rq_issue_0", c"rq_issue_1", c"rq_issue_2", c"rq_complete_0", c"rq_complete_1", c"rq_complete_2"];
const BIO_PROGRAMS: [&CStr; 9] = [
    c"bio_queue_0",
    c"bio_queue_1",
    c"bio_queue_2",
    c"bio_split_0",
    c"bio_split_1",
    c"bio_split_2",
    c"bio_complete_0",
    c"bio_complete_1",
    c"bio_complete_2",
];
/// Pins of maps.
const FIRST: &str = "first";
const SECOND: &str = "second";
const ACTIVE: &str = "active";
const COUNTS: &str = "counts";
const IDENTITY: &str = "identity";
/// Longest identity text.
const IDENTITY_BYTES: u32 = 1024;
/// Not used by request-based devices.
const BIOS_MIN: u32 = 1;

/// Names these programs: another release's have another digest.
pub(super) fn digest() -> String {
    blake3::hash(&OBJECT.0).to_hex()[..16].to_owned()
}

/// Names of the tracepoints that a kind of device needs.
pub(super) fn tracepoints(kind: DeviceKind) -> &'static [&'static str] {
    match kind {
        DeviceKind::Requests => &["block_rq_issue", "block_rq_complete"],
        DeviceKind::Bios => &["block_bio_queue", "block_split", "block_bio_complete"],
    }
}

fn programs(kind: DeviceKind) -> &'static [&'static CStr] {
    match kind {
        DeviceKind::Requests => &REQUEST_PROGRAMS,
        DeviceKind::Bios => &BIO_PROGRAMS,
    }
}

/// `struct config` of `bpf/tracker.bpf.c`.
struct Config {
    start_sector: u64,
    end_sector: u64,
    layout: Layout,
    disk_number: (u32, u32),
}

impl Config {
    fn bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(32);
        bytes.extend_from_slice(&self.start_sector.to_ne_bytes());
        bytes.extend_from_slice(&self.end_sector.to_ne_bytes());
        for value in [self.layout.blocks, self.layout.words, self.disk_number.0, self.disk_number.1] {
            bytes.extend_from_slice(&value.to_ne_bytes());
        }
        bytes
    }
}

/// Sums over all processors of what the programs counted since they were attached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counts {
    /// Events that were marked: one or more for each write that was issued, and for each that completed.
    pub marks: u64,
    /// Of them, events whose pages could not be known: the whole disk was marked. Commands passed through to the disk that
    /// carry data, resets of zones.
    pub unknown: u64,
    /// Changes whenever an event is marked, by whichever copy of the programs.
    pub(super) sum: u64,
}

/// `struct counts`, as words: `marks[copy]`, `unknown[copy]`.
const COUNT_WORDS: usize = 2 * COPIES;

/// One load of the programs, through its pins.
#[derive(Debug)]
pub(super) struct Generation {
    folder: PathBuf,
    active: Map,
    counts: Map,
    /// Their numbers in the kernel, by which the active one is known.
    ids: [u32; 2],
    maps: [Map; 2],
    buffers: [Buffer; 2],
}

impl Generation {
    /// Loads the programs for `device`, attaches them and pins everything in `folder`, which is made. When this returns, each
    /// write that completes is marked.
    pub(super) fn create(
        device: &DeviceId,
        geometry: Geometry,
        folder: &Path,
        identity: &str,
    ) -> Result<Self, TrackerError> {
        let layout = layout(device, geometry)?;
        std::fs::create_dir(folder).map_err(TrackerError::pin("make the directory of pins", folder))?;
        let Loaded { object, buffers } = load(device, layout)?;
        let text = Map::array(c"bf_identity", IDENTITY_BYTES, 1, 0).map_err(TrackerError::kernel("make a map"))?;
        let mut value = identity.as_bytes().to_vec();
        value.resize(IDENTITY_BYTES as usize, 0);
        text.set(&value).map_err(TrackerError::kernel("write a map"))?;
        let map = |name| object.loaded_map(name).map_err(TrackerError::kernel("find a map"));
        let [first, second] = &buffers;
        let pins = [
            (FIRST, first),
            (SECOND, second),
            (ACTIVE, &map(c"buffers")?),
            (COUNTS, &map(c"counts")?),
            (IDENTITY, &text),
        ];
        for (name, map) in pins {
            map.pin(&folder.join(name)).map_err(TrackerError::kernel("pin a map"))?;
        }
        // In the order of the copies: a later one never runs for an event that an earlier one was not attached for.
        for name in programs(device.kind) {
            let path = pin_of(folder, name);
            object.attach_and_pin(name, &path).map_err(TrackerError::kernel("attach and pin a program"))?;
        }
        Self::open(device, geometry, folder)
    }

    /// Opens the pins in `folder`.
    ///
    /// # Errors
    /// [`TrackerError`] where one is missing or is of another shape: the generation was never complete, or is not ours.
    pub(super) fn open(device: &DeviceId, geometry: Geometry, folder: &Path) -> Result<Self, TrackerError> {
        let layout = layout(device, geometry)?;
        let map = |name: &str| Map::open(&folder.join(name)).map_err(TrackerError::kernel("open a pinned map"));
        let maps = [map(FIRST)?, map(SECOND)?];
        let mut ids = [0; 2];
        for (id, map) in ids.iter_mut().zip(&maps) {
            let info = map.info().map_err(TrackerError::kernel("ask about a map"))?;
            if info.max_entries != layout.words || info.value_size != 8 {
                return Err(missing("find a buffer of the disk's size"));
            }
            *id = info.id;
        }
        let buffer = |map: &Map| {
            Buffer::map(map.as_fd(), layout).map_err(TrackerError::pin("map the marks into memory", folder))
        };
        let buffers = [buffer(&maps[0])?, buffer(&maps[1])?];
        // A link that is there says that its program is attached.
        for name in programs(device.kind) {
            libbpf::open_pin(&pin_of(folder, name)).map_err(TrackerError::kernel("open a pinned program"))?;
        }
        Ok(Self { folder: folder.to_owned(), active: map(ACTIVE)?, counts: map(COUNTS)?, ids, maps, buffers })
    }

    /// What was written beside the maps in `folder` when they were made.
    pub(super) fn identity_of(folder: &Path) -> Result<String, TrackerError> {
        let text = Map::open(&folder.join(IDENTITY)).and_then(|map| map.get());
        let text = text.map_err(TrackerError::kernel("read a pinned map"))?;
        Ok(String::from_utf8_lossy(&text).trim_end_matches('\0').to_owned())
    }

    /// The directory of its pins.
    pub(super) fn folder(&self) -> &Path {
        &self.folder
    }

    /// The buffer that the programs mark in, and the other one.
    pub(super) fn buffers(&self) -> Result<(&Buffer, &Buffer), TrackerError> {
        let active = self.active_index()?;
        Ok((&self.buffers[active], &self.buffers[1 - active]))
    }

    fn active_index(&self) -> Result<usize, TrackerError> {
        let value = self.active.get().map_err(TrackerError::kernel("read a map"))?;
        let id = value.try_into().map(u32::from_ne_bytes).ok();
        self.ids.iter().position(|known| Some(*known) == id).ok_or_else(|| missing("find the active buffer"))
    }

    /// Lets the programs mark in the other buffer. When this returns, no program runs any more that could mark in the first:
    /// an update of a map in a map waits for an RCU grace period (`maybe_wait_bpf_programs` in the kernel), and programs on
    /// tracepoints run inside of `rcu_read_lock` from before they look the buffer up until after they marked.
    pub(super) fn switch(&self) -> Result<(), TrackerError> {
        let next = &self.maps[1 - self.active_index()?];
        // The kernel takes the file descriptor as the value, and gives the map's id when asked.
        let value = next.as_fd().as_raw_fd().to_ne_bytes();
        self.active.set(&value).map_err(TrackerError::kernel("switch the buffers"))
    }

    fn words(&self) -> Result<Vec<[u64; COUNT_WORDS]>, TrackerError> {
        let values = self.counts.get_each().map_err(TrackerError::kernel("read a map"))?;
        let words = |value: &Vec<u8>| {
            let mut words = [0; COUNT_WORDS];
            for (word, bytes) in words.iter_mut().zip(value.as_chunks::<8>().0) {
                *word = u64::from_ne_bytes(*bytes);
            }
            words
        };
        Ok(values.iter().map(words).collect())
    }

    /// What was counted.
    pub(super) fn counts(&self) -> Result<Counts, TrackerError> {
        let mut sums = [0; COUNT_WORDS];
        for words in self.words()? {
            sums.iter_mut().zip(words).for_each(|(sum, word)| *sum += word);
        }
        let (marks, unknown) = sums.split_at(COPIES);
        // Each copy has seen nearly all events; the one that saw most is nearest to the truth.
        let most = |counts: &[u64]| counts.iter().copied().max().unwrap_or(0);
        Ok(Counts { marks: most(marks), unknown: most(unknown), sum: marks.iter().sum() })
    }

    /// Removes all pins in `folder`, and it. With them go the programs.
    pub(super) fn remove(folder: &Path) -> Result<(), TrackerError> {
        let entries = match std::fs::read_dir(folder) {
            Ok(entries) => entries,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(TrackerError::pin("list pins", folder)(error)),
        };
        for entry in entries {
            let path = entry.map_err(TrackerError::pin("list pins", folder))?.path();
            std::fs::remove_file(&path).map_err(TrackerError::pin("remove the pin", &path))?;
        }
        std::fs::remove_dir(folder).map_err(TrackerError::pin("remove the directory of pins", folder))
    }
}

fn layout(device: &DeviceId, geometry: Geometry) -> Result<Layout, TrackerError> {
    Layout::of(geometry).ok_or_else(|| TrackerError::Unsupported {
        path: device.path.clone(),
        reason: format!("its {} bytes are too many", geometry.disk_bytes()),
    })
}

fn missing(what: &'static str) -> TrackerError {
    TrackerError::Kernel { action: what, source: io::ErrorKind::NotFound.into() }
}

struct Loaded {
    object: Object,
    buffers: [Map; 2],
}

/// Loads programs and maps, attaches nothing. All of it goes when the value is dropped.
fn load(device: &DeviceId, layout: Layout) -> Result<Loaded, TrackerError> {
    let buffer = |name| {
        Map::array(name, 8, layout.words, libbpf::MMAPABLE)
            .map_err(TrackerError::kernel("make a map for the marks (2 bits of kernel memory for each 4 KiB of disk)"))
    };
    let buffers = [buffer(c"bf_first")?, buffer(c"bf_second")?];
    let config = Config {
        start_sector: device.start_sector,
        end_sector: device.start_sector + device.bytes / 512,
        layout,
        disk_number: device.disk_number,
    };
    let mut object = Object::open(&OBJECT.0).map_err(TrackerError::kernel("open the programs' object"))?;
    object
        .set_inner_map(c"buffers", &buffers[0])
        .and_then(|()| object.set_initial_value(c".rodata", &config.bytes()))
        .and_then(|()| match device.kind {
            DeviceKind::Requests => object.set_max_entries(c"bios", BIOS_MIN),
            DeviceKind::Bios => Ok(()),
        })
        .and_then(|()| object.keep_programs(programs(device.kind)))
        .map_err(TrackerError::kernel("set up the programs"))?;
    object.load().map_err(TrackerError::kernel("load the programs"))?;
    let active = object.loaded_map(c"buffers").map_err(TrackerError::kernel("find a map"))?;
    // The kernel takes the file descriptor as the value.
    let value = buffers[0].as_fd().as_raw_fd().to_ne_bytes();
    active.set(&value).map_err(TrackerError::kernel("set the first buffer"))?;
    Ok(Loaded { object, buffers })
}

fn pin_of(folder: &Path, program: &CStr) -> PathBuf {
    folder.join(program.to_string_lossy().as_ref())
}

/// Loads the programs for a small disk that is not there, and lets go of them: says whether this kernel takes them.
pub(super) fn probe(kind: DeviceKind) -> Result<(), TrackerError> {
    let device = DeviceId {
        path: PathBuf::new(),
        number: (0, 0),
        disk_number: (0, 0),
        disk_name: String::new(),
        partition: None,
        start_sector: 0,
        bytes: 1 << 20,
        serial: String::new(),
        disk_sequence: None,
        kind,
    };
    load(&device, layout(&device, device.geometry()?)?).map(drop)
}
