//! Which point to take instead, where one can't be had: the newest whose pages are all still there.
//!
//! Promises: a point that is offered has a complete plan from proven metadata, needs none of the objects that are known to be bad, and
//! each segment that it needs is there with its whole size. Never: reads the segments themselves, that is what `verify` does.

use std::collections::{HashMap, HashSet};

use common::format::checkpoint::PointSummary;
use common::format::close::Consistency;
use common::ids::CloseId;

use crate::error::OperatorError;
use crate::point::PointSource;
use crate::restore::plan::WINDOW_BLOCKS;
use crate::verify::tell_intact;

/// Points looked at, newest first: each costs its plan.
const POINTS_MAX: usize = 16;

/// Says which point to take instead of `except`, where the objects `bad` are missing or damaged.
pub async fn offer(source: &PointSource, except: Option<CloseId>, bad: &[String]) -> String {
    let bad: HashSet<&str> = bad.iter().map(String::as_str).collect();
    match newest(source, except, &bad).await {
        Some(point) => format!("{}: restore it with --point {}", tell_intact(Some(&point)), point.id),
        None => format!("{}: `blockferry verify` looks at all", tell_intact(None)),
    }
}

async fn newest(source: &PointSource, except: Option<CloseId>, bad: &HashSet<&str>) -> Option<PointSummary> {
    let points = source.history.points();
    let candidates =
        points.iter().rev().filter(|point| Some(point.id) != except && point.consistency != Consistency::Fuzzy);
    let mut sizes = HashMap::new();
    for point in candidates.take(POINTS_MAX) {
        let Some(candidate) = source.at(*point) else { continue };
        if let Ok(true) = is_there(&candidate, bad, &mut sizes).await {
            return Some(*point);
        }
    }
    None
}

/// True where all that the point needs is there. `sizes` remembers which segments are.
async fn is_there(
    source: &PointSource,
    bad: &HashSet<&str>,
    sizes: &mut HashMap<u32, bool>,
) -> Result<bool, OperatorError> {
    for window in 0..source.geometry.blocks().div_ceil(WINDOW_BLOCKS) {
        let plan = source.plan(window * WINDOW_BLOCKS..(window + 1) * WINDOW_BLOCKS).await?;
        for item in &plan.items {
            let segment = &source.history.segments[item.segment as usize];
            let there = match sizes.get(&item.segment) {
                Some(there) => *there,
                None => {
                    let size = source.store.size(&segment.path).await;
                    let there = size.is_ok_and(|size| size == segment.size) && !bad.contains(segment.path.as_str());
                    sizes.insert(item.segment, there);
                    there
                }
            };
            if !there {
                return Ok(false);
            }
        }
    }
    Ok(true)
}
