//! `blockferry points`: the recovery points of one volume or of all.

use std::collections::HashMap;
use std::io::Write;

use catalog::store::Store;
use catalog::volume::header;
use catalog::volume::history::History;
use catalog::volume::lifecycle;
use catalog::volume::proofs::{self, Proof, Proofs};
use common::format::checkpoint::PointSummary;
use common::format::lifecycle::Phase;
use common::format::volume_header::VolumeHeader;
use common::ids::GroupId;
use common::units::ByteCount;

use crate::error::OperatorError;
use crate::lifecycle::ChangeError;
use crate::volumes::Table;

/// Digits of an id shown in the table; `--point` takes them.
const ID_DIGITS: usize = 16;

/// One point, as `--json` prints it.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct PointRow {
    /// Its id: the close that asserts it.
    pub id: String,
    /// Machine's name.
    pub machine: String,
    /// Volume's name.
    pub volume: String,
    /// Epoch.
    pub epoch: u64,
    /// When it was cut, RFC 3339 in UTC.
    pub time: String,
    /// `fuzzy`, `crash`, `filesystem` or `application`.
    pub consistency: &'static str,
    /// Bytes of records since the point before.
    pub bytes_new: u64,
    /// When it was committed, RFC 3339 in UTC.
    pub committed: String,
    /// The set of volumes that it was cut with; null for none.
    pub group: Option<String>,
    /// The instant at which they were cut together, which `restore --machine` takes; null for none.
    pub group_point: Option<String>,
    /// The strongest proof that was given of it: `committed` (its close, and every close before it, carries the signature of the
    /// volume's key and names its parent; points that lack this are never listed), `verified`, `opened`, `checked`, `booted`.
    pub proof: &'static str,
    /// When that proof was given, RFC 3339 in UTC; null for `committed`.
    pub proof_time: Option<String>,
}

impl PointRow {
    fn new(header: &VolumeHeader, group: GroupId, proofs: &Proofs, point: &PointSummary) -> Self {
        let proven = proofs.of(point.id);
        let named = |id: GroupId| (!id.is_nil()).then(|| id.to_string());
        Self {
            id: point.id.to_string(),
            machine: header.machine_name.clone(),
            volume: header.name.clone(),
            epoch: point.epoch.0,
            time: point.cut_time.to_string(),
            consistency: point.consistency.as_str(),
            bytes_new: point.new_bytes,
            committed: point.committed.to_string(),
            group: named(group),
            group_point: named(point.group_point),
            proof: proven.map_or(Proof::Committed, |(proof, _)| proof).as_str(),
            proof_time: proven.map(|(_, at)| at.to_string()),
        }
    }
}

/// Lists the points of `volume`, or of all volumes, oldest first. Of a log that is damaged, the points before the damage.
///
/// # Errors
/// [`OperatorError`], also where any log is damaged, after the others were listed.
pub async fn run(
    store: &Store,
    volume: Option<&str>,
    json: bool,
    out: &mut (dyn Write + Send),
) -> Result<(), OperatorError> {
    let headers = match volume {
        Some(text) => vec![header::find(store, text).await?.header],
        None => {
            let (known, mut errors) = lifecycle::list(store).await.map_err(ChangeError::from)?;
            if !errors.is_empty() {
                return Err(ChangeError::from(errors.swap_remove(0)).into());
            }
            known.into_iter().filter(|known| known.phase != Phase::Deleted).map(|known| known.header).collect()
        }
    };
    let (mut points, mut damaged) = (Vec::new(), None);
    for header in &headers {
        let (history, bad) = History::read_whole_part(store, header).await?;
        damaged = damaged.or(bad);
        let proofs = match proofs::read(store, header.volume).await {
            Ok(proofs) => proofs,
            Err(error) => {
                tracing::warn!(%error, "what was proven of these points is not known");
                Proofs::none(header.volume)
            }
        };
        // By id, since looking each one up in the history would take the square of their number.
        let groups: HashMap<_, _> =
            history.epochs.iter().map(|epoch| (epoch.close.id(), epoch.close.statement().group)).collect();
        let row = |point: &PointSummary| {
            let group = groups.get(&point.id).copied().unwrap_or(GroupId::NIL);
            (point.cut_time, point.epoch, PointRow::new(header, group, &proofs, point))
        };
        points.extend(history.points().iter().map(row));
    }
    // A volume's own order is that of its epochs; several are interleaved by time.
    if headers.len() > 1 {
        points.sort_by_key(|(time, epoch, _)| (*time, *epoch));
    }
    let rows: Vec<PointRow> = points.into_iter().map(|(_, _, row)| row).collect();
    print(&rows, json, out).map_err(OperatorError::Output)?;
    damaged.map_or(Ok(()), |error| Err(error.into()))
}

fn print(rows: &[PointRow], json: bool, out: &mut (dyn Write + Send)) -> std::io::Result<()> {
    if json {
        serde_json::to_writer_pretty(&mut *out, rows)?;
        return writeln!(out);
    }
    let mut table = Table::new(&["VOLUME", "EPOCH", "TIME", "CONSISTENCY", "NEW", "COMMITTED", "PROOF", "ID"]);
    for row in rows {
        table.row(vec![
            format!("{}/{}", row.machine, row.volume),
            row.epoch.to_string(),
            row.time.clone(),
            row.consistency.to_owned(),
            ByteCount(row.bytes_new).to_string(),
            row.committed.clone(),
            row.proof.to_owned(),
            row.id[..ID_DIGITS].to_owned(),
        ]);
    }
    table.print(out)
}
