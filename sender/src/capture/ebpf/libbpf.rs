//! The few functions of libbpf that the tracker needs, as safe values. The C library is linked statically (`build.rs`).
//!
//! Promises: what is dropped is closed; errors carry the system's number.
//! Never: prints. What libbpf says is logged, and its first complaint is in the error.

#![expect(unsafe_code, reason = "libbpf is a C library")]

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::ptr::NonNull;
use std::sync::{Mutex, Once, PoisonError};

use tracing::debug;

/// Map types of linux/bpf.h.
const MAP_TYPE_ARRAY: u32 = 2;
/// The map may be mapped into memory.
pub(super) const MMAPABLE: u32 = 1 << 10;
const BTF_KIND_TYPEDEF: u32 = 8;
/// Longest text of libbpf's that is kept.
const TEXT_BYTES: usize = 512;

macro_rules! opaque {
    ($($name:ident)*) => { $(#[repr(C)] struct $name { _opaque: [u8; 0] })* };
}
opaque!(RawObject RawMap RawProgram RawLink RawBtf);

#[repr(C)]
struct MapCreateOptions {
    size: usize,
    btf_fd: u32,
    btf_key_type_id: u32,
    btf_value_type_id: u32,
    btf_vmlinux_value_type_id: u32,
    inner_map_fd: u32,
    map_flags: u32,
    map_extra: u64,
    numa_node: u32,
    map_ifindex: u32,
}

/// The front of `struct bpf_map_info`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct MapInfo {
    kind: u32,
    pub(super) id: u32,
    key_size: u32,
    pub(super) value_size: u32,
    pub(super) max_entries: u32,
    map_flags: u32,
}

type PrintFunction = unsafe extern "C" fn(c_int, *const c_char, *mut c_void) -> c_int;

unsafe extern "C" {
    fn libbpf_set_print(function: Option<PrintFunction>) -> Option<PrintFunction>;
    fn libbpf_num_possible_cpus() -> c_int;
    fn bpf_object__open_mem(bytes: *const c_void, size: usize, options: *const c_void) -> *mut RawObject;
    fn bpf_object__load(object: *mut RawObject) -> c_int;
    fn bpf_object__close(object: *mut RawObject);
    fn bpf_object__find_map_by_name(object: *const RawObject, name: *const c_char) -> *mut RawMap;
    fn bpf_object__find_program_by_name(object: *const RawObject, name: *const c_char) -> *mut RawProgram;
    fn bpf_object__next_program(object: *const RawObject, previous: *mut RawProgram) -> *mut RawProgram;
    fn bpf_map__set_inner_map_fd(map: *mut RawMap, fd: c_int) -> c_int;
    fn bpf_map__set_max_entries(map: *mut RawMap, entries: u32) -> c_int;
    fn bpf_map__initial_value(map: *mut RawMap, size: *mut usize) -> *mut c_void;
    fn bpf_map__fd(map: *const RawMap) -> c_int;
    fn bpf_program__name(program: *const RawProgram) -> *const c_char;
    fn bpf_program__set_autoload(program: *mut RawProgram, load: bool) -> c_int;
    fn bpf_program__attach(program: *const RawProgram) -> *mut RawLink;
    fn bpf_link__pin(link: *mut RawLink, path: *const c_char) -> c_int;
    fn bpf_link__destroy(link: *mut RawLink) -> c_int;
    fn bpf_map_create(
        kind: u32,
        name: *const c_char,
        key_size: u32,
        value_size: u32,
        max_entries: u32,
        options: *const MapCreateOptions,
    ) -> c_int;
    fn bpf_obj_pin(fd: c_int, path: *const c_char) -> c_int;
    fn bpf_obj_get(path: *const c_char) -> c_int;
    fn bpf_map_update_elem(fd: c_int, key: *const c_void, value: *const c_void, flags: u64) -> c_int;
    fn bpf_map_lookup_elem(fd: c_int, key: *const c_void, value: *mut c_void) -> c_int;
    fn bpf_obj_get_info_by_fd(fd: c_int, info: *mut c_void, length: *mut u32) -> c_int;
    fn btf__parse(path: *const c_char, ext: *mut c_void) -> *mut RawBtf;
    fn btf__find_by_name_kind(btf: *const RawBtf, name: *const c_char, kind: u32) -> c_int;
    fn btf__free(btf: *mut RawBtf);
    fn vsnprintf(buffer: *mut c_char, size: usize, format: *const c_char, arguments: *mut c_void) -> c_int;
}

/// The first thing that libbpf complained of since the last error: what follows is a consequence of it.
static COMPLAINT: Mutex<String> = Mutex::new(String::new());

/// Takes what libbpf says. `arguments` is a C `va_list`, which both supported architectures pass by address.
unsafe extern "C" fn print(level: c_int, format: *const c_char, arguments: *mut c_void) -> c_int {
    let mut text = [0_u8; TEXT_BYTES];
    // SAFETY: libbpf gives a format and its arguments; the buffer is as long as said.
    unsafe { vsnprintf(text.as_mut_ptr().cast(), text.len(), format, arguments) };
    let text = CStr::from_bytes_until_nul(&text).unwrap_or_default().to_string_lossy();
    debug!(target: "libbpf", "{}", text.trim_end());
    let mut complaint = COMPLAINT.lock().unwrap_or_else(PoisonError::into_inner);
    if level == 0 && complaint.is_empty() {
        text.trim_end().clone_into(&mut complaint);
    }
    0
}

fn quiet() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: the function lives as long as the program.
        unsafe { libbpf_set_print(Some(print)) };
    });
}

/// The error of a call that failed just now, with libbpf's own words where it said something.
fn last_error() -> io::Error {
    let error = io::Error::last_os_error();
    let complaint = std::mem::take(&mut *COMPLAINT.lock().unwrap_or_else(PoisonError::into_inner));
    if complaint.is_empty() { error } else { io::Error::new(error.kind(), format!("{error} ({complaint})")) }
}

fn check(result: c_int) -> io::Result<c_int> {
    if result < 0 { Err(last_error()) } else { Ok(result) }
}

fn c_path(path: &Path) -> io::Result<CString> {
    Ok(CString::new(path.as_os_str().as_bytes())?)
}

/// An object file that was read, and once loaded the maps and programs of it. Dropping it closes what was not pinned.
#[derive(Debug)]
pub(super) struct Object(NonNull<RawObject>);

impl Object {
    /// Reads an object from memory.
    pub(super) fn open(bytes: &[u8]) -> io::Result<Self> {
        quiet();
        // SAFETY: the bytes are as long as said; libbpf copies what it keeps. Null options are allowed.
        let object = unsafe { bpf_object__open_mem(bytes.as_ptr().cast(), bytes.len(), std::ptr::null()) };
        NonNull::new(object).map(Self).ok_or_else(last_error)
    }

    fn map(&self, name: &CStr) -> io::Result<NonNull<RawMap>> {
        // SAFETY: object and name are valid.
        NonNull::new(unsafe { bpf_object__find_map_by_name(self.0.as_ptr(), name.as_ptr()) }).ok_or_else(last_error)
    }

    /// Before loading: the map whose like a map in a map holds.
    pub(super) fn set_inner_map(&mut self, name: &CStr, inner: &Map) -> io::Result<()> {
        // SAFETY: the map belongs to the object; libbpf duplicates what it needs of the descriptor's map.
        check(unsafe { bpf_map__set_inner_map_fd(self.map(name)?.as_ptr(), inner.0.as_raw_fd()) }).map(drop)
    }

    /// Before loading: how many entries a map has.
    pub(super) fn set_max_entries(&mut self, name: &CStr, entries: u32) -> io::Result<()> {
        // SAFETY: the map belongs to the object.
        check(unsafe { bpf_map__set_max_entries(self.map(name)?.as_ptr(), entries) }).map(drop)
    }

    /// Before loading: the front of a section's bytes (`.rodata`).
    pub(super) fn set_initial_value(&mut self, name: &CStr, value: &[u8]) -> io::Result<()> {
        let map = self.map(name)?;
        let mut size = 0;
        // SAFETY: the map belongs to the object; the address is of `size` bytes that live until it is loaded.
        let bytes = unsafe { bpf_map__initial_value(map.as_ptr(), &raw mut size) };
        if bytes.is_null() || size < value.len() {
            return Err(io::ErrorKind::InvalidData.into());
        }
        // SAFETY: as above, and the value is not longer.
        unsafe { std::ptr::copy_nonoverlapping(value.as_ptr(), bytes.cast(), value.len()) };
        Ok(())
    }

    /// Before loading: only these programs.
    pub(super) fn keep_programs(&mut self, names: &[&CStr]) -> io::Result<()> {
        let mut program = std::ptr::null_mut();
        loop {
            // SAFETY: the object is valid; a null program asks for the first.
            program = unsafe { bpf_object__next_program(self.0.as_ptr(), program) };
            if program.is_null() {
                return Ok(());
            }
            // SAFETY: the program belongs to the object, and so does its name.
            let name = unsafe { CStr::from_ptr(bpf_program__name(program)) };
            // SAFETY: as above.
            check(unsafe { bpf_program__set_autoload(program, names.contains(&name)) })?;
        }
    }

    /// Gives maps and programs to the kernel.
    pub(super) fn load(&mut self) -> io::Result<()> {
        // SAFETY: the object is valid.
        check(unsafe { bpf_object__load(self.0.as_ptr()) }).map(drop)
    }

    /// After loading: another handle of a map.
    pub(super) fn loaded_map(&self, name: &CStr) -> io::Result<Map> {
        // SAFETY: the map belongs to the object.
        let fd = check(unsafe { bpf_map__fd(self.map(name)?.as_ptr()) })?;
        // SAFETY: the descriptor is the object's, and open as long as that is.
        let fd = unsafe { BorrowedFd::borrow_raw(fd) };
        Ok(Map(fd.try_clone_to_owned()?))
    }

    /// After loading: attaches a program where its section says, and pins the link. It stays attached while the pin is there.
    pub(super) fn attach_and_pin(&self, name: &CStr, path: &Path) -> io::Result<()> {
        let path = c_path(path)?;
        // SAFETY: object and name are valid.
        let program = unsafe { bpf_object__find_program_by_name(self.0.as_ptr(), name.as_ptr()) };
        let program = NonNull::new(program).ok_or_else(last_error)?;
        // SAFETY: the program belongs to the object and is loaded.
        let link = NonNull::new(unsafe { bpf_program__attach(program.as_ptr()) }).ok_or_else(last_error)?;
        // SAFETY: link and path are valid.
        let pinned = check(unsafe { bpf_link__pin(link.as_ptr(), path.as_ptr()) });
        // SAFETY: the link is ours and not used again. This closes it; the pin holds it.
        unsafe { bpf_link__destroy(link.as_ptr()) };
        pinned.map(drop)
    }
}

impl Drop for Object {
    fn drop(&mut self) {
        // SAFETY: it is ours and not used again.
        unsafe { bpf_object__close(self.0.as_ptr()) };
    }
}

/// A map in the kernel.
#[derive(Debug)]
pub(super) struct Map(OwnedFd);

impl Map {
    /// Makes an array.
    pub(super) fn array(name: &CStr, value_bytes: u32, entries: u32, flags: u32) -> io::Result<Self> {
        quiet();
        let options = MapCreateOptions {
            size: size_of::<MapCreateOptions>(),
            btf_fd: 0,
            btf_key_type_id: 0,
            btf_value_type_id: 0,
            btf_vmlinux_value_type_id: 0,
            inner_map_fd: 0,
            map_flags: flags,
            map_extra: 0,
            numa_node: 0,
            map_ifindex: 0,
        };
        // SAFETY: name and options are valid for the call.
        let fd = check(unsafe {
            bpf_map_create(MAP_TYPE_ARRAY, name.as_ptr(), 4, value_bytes, entries, &raw const options)
        })?;
        // SAFETY: a new descriptor that nobody else knows.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Opens a map by its pin.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        open_pin(path).map(Self)
    }

    /// Pins it.
    pub(super) fn pin(&self, path: &Path) -> io::Result<()> {
        let path = c_path(path)?;
        // SAFETY: descriptor and path are valid.
        check(unsafe { bpf_obj_pin(self.0.as_raw_fd(), path.as_ptr()) }).map(drop)
    }

    /// What the kernel says of it.
    pub(super) fn info(&self) -> io::Result<MapInfo> {
        let mut info = MapInfo::default();
        let mut length = u32::try_from(size_of::<MapInfo>()).unwrap_or(0);
        // SAFETY: the kernel writes at most `length` bytes of integers.
        check(unsafe { bpf_obj_get_info_by_fd(self.0.as_raw_fd(), (&raw mut info).cast(), &raw mut length) })?;
        Ok(info)
    }

    /// Writes entry 0 of an array. In an array of maps, `value` is a descriptor.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidInput`] where the value has another size than the map's.
    pub(super) fn set(&self, value: &[u8]) -> io::Result<()> {
        if self.info()?.value_size as usize != value.len() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let key = 0_u32;
        // SAFETY: key and value are as long as the map's.
        check(unsafe { bpf_map_update_elem(self.0.as_raw_fd(), (&raw const key).cast(), value.as_ptr().cast(), 0) })
            .map(drop)
    }

    /// Reads entry 0 of an array.
    pub(super) fn get(&self) -> io::Result<Vec<u8>> {
        self.lookup(self.info()?.value_size as usize)
    }

    /// Reads entry 0 of an array that has a value for each processor.
    pub(super) fn get_each(&self) -> io::Result<Vec<Vec<u8>>> {
        // SAFETY: takes nothing.
        let processors = usize::try_from(check(unsafe { libbpf_num_possible_cpus() })?).unwrap_or(0);
        let bytes = (self.info()?.value_size as usize).next_multiple_of(8);
        let values = self.lookup(processors * bytes)?;
        Ok(values.chunks(bytes).map(<[u8]>::to_vec).collect())
    }

    fn lookup(&self, bytes: usize) -> io::Result<Vec<u8>> {
        let mut value = vec![0; bytes];
        let key = 0_u32;
        // SAFETY: the key is 4 bytes; the kernel writes the map's value size, for each processor where it has several: that is
        // what the callers ask for.
        check(unsafe { bpf_map_lookup_elem(self.0.as_raw_fd(), (&raw const key).cast(), value.as_mut_ptr().cast()) })?;
        Ok(value)
    }
}

impl AsFd for Map {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Opens whatever is pinned at `path`.
pub(super) fn open_pin(path: &Path) -> io::Result<OwnedFd> {
    quiet();
    let path = c_path(path)?;
    // SAFETY: the path is valid.
    let fd = check(unsafe { bpf_obj_get(path.as_ptr()) })?;
    // SAFETY: a new descriptor that nobody else knows.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Which of `typedefs` a BTF file does not define.
pub(super) fn missing_typedefs(btf: &Path, typedefs: &[CString]) -> io::Result<Vec<CString>> {
    quiet();
    let path = c_path(btf)?;
    // SAFETY: the path is valid; no extension is asked for.
    let btf = NonNull::new(unsafe { btf__parse(path.as_ptr(), std::ptr::null_mut()) }).ok_or_else(last_error)?;
    // SAFETY: BTF and names are valid.
    let absent = |name: &&CString| unsafe { btf__find_by_name_kind(btf.as_ptr(), name.as_ptr(), BTF_KIND_TYPEDEF) } < 0;
    let missing = typedefs.iter().filter(absent).cloned().collect();
    // SAFETY: it is ours and not used again.
    unsafe { btf__free(btf.as_ptr()) };
    Ok(missing)
}

/// Mounts the BPF file system.
pub(super) fn mount_bpffs(target: &CStr) -> io::Result<()> {
    let flags = libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC;
    // SAFETY: all strings are valid for the call.
    let result =
        unsafe { libc::mount(c"bpf".as_ptr(), target.as_ptr(), c"bpf".as_ptr(), flags, c"mode=700".as_ptr().cast()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// True where the kernel still has the map with this number.
#[cfg(test)]
pub(super) fn map_exists(id: u32) -> bool {
    unsafe extern "C" {
        fn bpf_map_get_fd_by_id(id: u32) -> c_int;
    }
    // SAFETY: takes a number.
    let fd = unsafe { bpf_map_get_fd_by_id(id) };
    // SAFETY: where it is one, it is a new descriptor that nobody else knows.
    (fd >= 0).then(|| unsafe { OwnedFd::from_raw_fd(fd) }).is_some()
}
