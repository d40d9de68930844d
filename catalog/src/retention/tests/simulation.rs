//! Endless random overwriting in simulated time, through the real writer, policy and collector, on a local store.
//!
//! The short version has the proportions of the long one: `make sim-retention` runs 10,000 epochs on a volume of 1 GiB.

use std::collections::BTreeMap;
use std::fs::{File, FileTimes};
use std::path::Path;
use std::time::SystemTime;

use common::seal::{Compression, Sealer};

use super::together::Dice;
use super::*;
use crate::retention::policy::Policy;
use crate::retention::policy_object;
use crate::retention::store_time::StoreTime;
use crate::volume::paths;

const HOUR_MS: i64 = 3_600_000;
/// What storage may take, of what live data and retained changes do.
const BOUND: f64 = 2.5;

struct Scale {
    disk_bytes: u64,
    epochs: u64,
    pages_per_epoch: u64,
    epochs_per_collection: u64,
}

/// Sealed records of `pages` random pages, one record for each block that has some; all of the disk where `None`.
fn records(volume: &FixtureVolume, dice: &mut Dice, pages: Option<u64>) -> Vec<Record> {
    let blocks = volume.header.current().disk_bytes / BLOCK_BYTES as u64;
    let mut masks: BTreeMap<u64, PageMask> = BTreeMap::new();
    match pages {
        None => masks.extend((0..blocks).map(|block| (block, PageMask::FULL))),
        Some(pages) => {
            for _ in 0..pages {
                let page = dice.roll(blocks * 64);
                let mask = masks.entry(page / 64).or_insert(PageMask::EMPTY);
                *mask = mask.with((page % 64) as u32);
            }
        }
    }
    let key = volume.epoch_key();
    let mut sealer = Sealer::new(1).expect("level 1");
    let mut content = vec![0; BLOCK_BYTES];
    let seal = |(counter, (block, mask)): (u64, (u64, PageMask))| {
        let pages = &mut content[..mask.count() as usize * PAGE_BYTES];
        dice.fill(pages);
        let sealed =
            sealer.seal_block(&key, BlockIndex(block), mask, PageMask::EMPTY, counter, pages, Compression::Skip);
        sealed.expect("pages fit the mask")
    };
    (1..).zip(masks).map(seal).collect()
}

/// Says that these files were stored at `time`.
fn date(root: &Path, path: &str, time: UnixMillis) {
    let time = SystemTime::UNIX_EPOCH + Duration::from_millis(u64::try_from(time.0).expect("after 1970"));
    let file = File::options().write(true).open(root.join(path)).expect("an object is a file");
    file.set_times(FileTimes::new().set_modified(time)).expect("a time");
}

async fn size(store: &Store, volume: &FixtureVolume) -> u64 {
    let listed = store.list(&paths::volume(volume.header.volume)).await.expect("a listing");
    listed.iter().map(|meta| meta.size).sum()
}

async fn simulate(scale: &Scale) {
    let (dir, store) = store().await;
    let root = dir.path().join("store");
    let mut volume = FixtureVolume::create(&store, "web", "root", scale.disk_bytes).await;
    let policy: Policy = "all for 24h, hourly for 7d, daily for 30d".parse().expect("a policy");
    policy_object::write(&store, volume.header.volume, &policy).await.expect("a policy is set");
    let mut dice = Dice::new(7);
    let start = UnixMillis(1_800_000_000_000);
    let (mut written, mut copied, mut worst, mut dated) = (0, 0, 0_f64, 1);
    for epoch in 0..scale.epochs {
        let now = UnixMillis(start.0 + i64::try_from(epoch).expect("small") * HOUR_MS);
        volume.clock = Clock::manual(now);
        let pages = (epoch > 0).then_some(scale.pages_per_epoch);
        let sealed = records(&volume, &mut dice, pages);
        written += sealed.iter().map(|record| record.bytes().len() as u64).sum::<u64>();
        volume.commit(sealed, Some(Consistency::Crash)).await;
        // One epoch an hour, by the store's clock.
        for seq in dated..=volume.log.position().seq.0 {
            date(&root, &paths::log_entry(volume.header.volume, common::ids::LogSeq(seq)), now);
        }
        dated = volume.log.position().seq.0 + 1;
        if epoch % scale.epochs_per_collection != scale.epochs_per_collection - 1 {
            continue;
        }
        for meta in store.list(&paths::segment_folder(volume.header.volume)).await.expect("a listing") {
            if meta.modified < start || meta.modified > now {
                date(&root, &meta.path, now);
            }
        }
        let request = CollectRequest {
            grace: Duration::from_secs(7 * 24 * 3600),
            time: StoreTime::Fixed(now),
            collector: ReceiverId([9; 16]),
            memory_bytes: COLLECT_MEMORY_BYTES,
            dry_run: false,
        };
        let (plan, done) = collect(&store, &volume.header, &request, &volume.clock).await.expect("collected");
        copied += done.expect("it was done").written_bytes;
        let history = History::read(&store, &volume.header).await.expect("a log");
        for seq in dated..=history.position.seq.0 {
            date(&root, &paths::log_entry(volume.header.volume, common::ids::LogSeq(seq)), now);
        }
        dated = history.position.seq.0 + 1;
        // What the points that stay need, each page of each of them once.
        let ideal = plan.needed_pages * PAGE_BYTES as u64;
        let stored = size(&store, &volume).await;
        let ratio = stored as f64 / ideal as f64;
        worst = worst.max(ratio);
        println!(
            "epoch {epoch:5}: {} points, stored {:5} MiB, live data and retained changes {:5} MiB, ratio {ratio:.2}",
            plan.kept,
            stored >> 20,
            ideal >> 20
        );
        assert!(ratio < BOUND, "storage grew to {ratio:.2} times what is needed");
    }
    println!(
        "worst ratio {worst:.2}; write amplification {:.2} ({} MiB written by the sender, {} MiB by collections)",
        (written + copied) as f64 / written as f64,
        written >> 20,
        copied >> 20
    );
    // What the newest point says can be read after all that.
    let history = History::read(&store, &volume.header).await.expect("a log");
    let newest = history.epochs.len() - 1;
    assert!(history.points().len() < scale.epochs as usize / 2, "the policy let points go");
    read_point(&store, &history, &volume.data_key, newest).await.expect("the newest point reads");
    let oldest = history.points()[0].id;
    let oldest = history.find(oldest).expect("an epoch");
    read_point(&store, &history, &volume.data_key, oldest).await.expect("the oldest point reads");
}

#[tokio::test]
async fn endless_overwriting_stays_within_the_bound() {
    // As many pages an hour, of all, as in the long version: one in a thousand.
    let long = std::env::var_os("BLOCKFERRY_LONG").is_some();
    let scale = if long {
        Scale { disk_bytes: 1 << 30, epochs: 10_000, pages_per_epoch: 256, epochs_per_collection: 500 }
    } else {
        Scale { disk_bytes: 64 << 20, epochs: 2_000, pages_per_epoch: 16, epochs_per_collection: 200 }
    };
    simulate(&scale).await;
}
