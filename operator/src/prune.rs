//! `blockferry prune`: expires recovery points by each volume's policy and collects what no retained point needs.
//!
//! Safe beside receivers, restores and other prunes; killed anywhere, run it again. See `catalog::retention`.

use std::collections::HashSet;
use std::io::Write;

use catalog::retention::{
    COLLECT_MEMORY_BYTES, CollectError, CollectPlan, CollectRequest, Collected, collect, store_time::StoreTime,
};
use catalog::store::Store;
use catalog::volume::header;
use catalog::volume::lifecycle::{self, Purged};
use clap::Args;
use common::clock::Clock;
use common::format::volume_header::VolumeHeader;
use common::ids::{ReceiverId, VolumeId};
use common::rng;
use common::units::{ByteCount, DurationText};

use crate::cli::StoreArgs;
use crate::error::OperatorError;
use crate::lifecycle::ChangeError;
use crate::volumes::Table;

/// How long what was given up stays, unless asked otherwise.
pub const GRACE_DEFAULT: &str = "7d";

/// Flags of `prune`.
#[derive(Debug, Args)]
pub struct PruneArgs {
    #[command(flatten)]
    pub(crate) store: StoreArgs,
    /// NAME, MACHINE/NAME or UUID [default: all volumes]
    #[arg(long, value_name = "VOLUME")]
    pub(crate) volume: Option<String>,
    /// Show what would go; write nothing
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// How long objects that were given up stay for restores and receivers that still know them
    #[arg(long, value_name = "DURATION", default_value = GRACE_DEFAULT)]
    pub(crate) grace: DurationText,
    /// Print a JSON array
    #[arg(long)]
    pub(crate) json: bool,
}

/// What became of one volume, as `--json` prints it.
#[derive(Debug, Clone, serde::Serialize)]
struct Row {
    id: String,
    machine: String,
    volume: String,
    dry_run: bool,
    points_kept: usize,
    points_expired: usize,
    segments_rewritten: usize,
    bytes_written: u64,
    orphans_condemned: usize,
    objects_deleted: usize,
    bytes_deleted: u64,
    bytes_needed: u64,
    bytes_stored: u64,
    blocks_worth_refreshing: usize,
}

impl Row {
    fn new(header: &VolumeHeader, plan: &CollectPlan, done: Option<&Collected>) -> Self {
        // What was planned, where nothing was done; a collector that others overtook does less than it planned.
        let planned = Collected {
            expired: plan.expired.len(),
            replaced: plan.rewrites.iter().map(Vec::len).sum(),
            written: plan.rewrites.len(),
            written_bytes: plan.copied_bytes,
            condemned: plan.condemned.len(),
            deleted: plan.deleted.len(),
            deleted_bytes: plan.deleted.iter().map(|(_, bytes)| bytes).sum(),
        };
        let did = done.unwrap_or(&planned);
        Self {
            id: header.volume.to_string(),
            machine: header.machine_name.clone(),
            volume: header.name.clone(),
            dry_run: done.is_none(),
            points_kept: plan.kept,
            points_expired: did.expired,
            segments_rewritten: did.replaced,
            bytes_written: did.written_bytes,
            orphans_condemned: did.condemned,
            objects_deleted: did.deleted,
            bytes_deleted: did.deleted_bytes,
            bytes_needed: plan.needed_bytes,
            bytes_stored: plan.stored_bytes,
            blocks_worth_refreshing: plan.refresh.len(),
        }
    }
}

/// Collects one volume, or all, and removes what is left of volumes deleted longer ago than the grace. One that fails does not keep the others from it; the first error is returned in the end.
///
/// # Errors
/// [`OperatorError`].
pub async fn run(store: &Store, args: &PruneArgs, out: &mut (dyn Write + Send)) -> Result<(), OperatorError> {
    let (headers, mut failed): (Vec<VolumeHeader>, Option<OperatorError>) = match &args.volume {
        Some(volume) => (vec![header::find(store, volume).await?.header], None),
        None => {
            let (headers, errors) = header::list(store).await?;
            (headers, errors.into_iter().next().map(OperatorError::from))
        }
    };
    let request = CollectRequest {
        grace: args.grace.get(),
        time: StoreTime::Asked(Clock::System),
        collector: ReceiverId::from_random(rng::random().map_err(CollectError::from)?),
        memory_bytes: COLLECT_MEMORY_BYTES,
        dry_run: args.dry_run,
    };
    let deleted: HashSet<VolumeId> = lifecycle::deleted(store).await.map_err(ChangeError::from)?.into_iter().collect();
    let mut rows = Vec::new();
    for header in headers.iter().filter(|header| !deleted.contains(&header.volume)) {
        match collect(store, header, &request, &Clock::System).await {
            Ok((plan, done)) => rows.push(Row::new(header, &plan, done.as_ref())),
            Err(error) => {
                tracing::error!(volume = header::full_name(header), %error, "not collected");
                failed.get_or_insert(error.into());
            }
        }
    }
    print(&rows, args.json, out).map_err(OperatorError::Output)?;
    let wanted = |volume: &VolumeId| args.volume.is_none() || headers.iter().any(|header| header.volume == *volume);
    let grace_ms = i64::try_from(args.grace.get().as_millis()).unwrap_or(i64::MAX);
    for volume in deleted.into_iter().filter(wanted) {
        let now = request.time.now(store, None).await.map_err(CollectError::from)?;
        match lifecycle::purge(store, volume, grace_ms, now, args.dry_run).await.map_err(ChangeError::from)? {
            Purged::Gone { objects, bytes } if !args.json => {
                let what = if args.dry_run { "would remove" } else { "removed" };
                writeln!(out, "{what} deleted volume {volume}: {objects} objects, {}", ByteCount(bytes))
                    .map_err(OperatorError::Output)?;
            }
            Purged::Waiting { until } if !args.json => {
                writeln!(out, "deleted volume {volume} is removed from {until} on").map_err(OperatorError::Output)?;
            }
            Purged::Gone { .. } | Purged::Waiting { .. } | Purged::Kept => {}
        }
    }
    failed.map_or(Ok(()), Err)
}

fn print(rows: &[Row], json: bool, out: &mut (dyn Write + Send)) -> std::io::Result<()> {
    if json {
        serde_json::to_writer_pretty(&mut *out, rows)?;
        return writeln!(out);
    }
    let mut table =
        Table::new(&["MACHINE", "VOLUME", "KEPT", "EXPIRED", "REWRITTEN", "DELETED", "FREED", "STORED", "NEEDED"]);
    for row in rows {
        table.row(vec![
            row.machine.clone(),
            row.volume.clone(),
            row.points_kept.to_string(),
            row.points_expired.to_string(),
            format!("{} segments", row.segments_rewritten),
            format!("{} objects", row.objects_deleted),
            ByteCount(row.bytes_deleted).to_string(),
            ByteCount(row.bytes_stored).to_string(),
            ByteCount(row.bytes_needed).to_string(),
        ]);
    }
    table.print(out)?;
    if rows.iter().any(|row| row.dry_run) {
        writeln!(out, "nothing was changed: a dry run")?;
    }
    Ok(())
}
