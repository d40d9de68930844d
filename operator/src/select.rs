//! Which recovery point is meant. PURE.

use std::str::FromStr;

use common::clock::UnixMillis;
use common::format::checkpoint::PointSummary;
use common::format::close::Consistency;
use common::ids::{CloseId, GroupId};

/// Fewest digits of an id that name a point.
const ID_DIGITS_MIN: usize = 8;

/// What `--point` says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PointWanted {
    /// The newest that is not fuzzy.
    Latest,
    /// The newest of any consistency.
    LatestAny,
    /// The newest that is not fuzzy and was cut at this time or before.
    At(UnixMillis),
    /// The one whose id starts so.
    Id(String),
    /// The one of the instant at which several volumes were cut together.
    Group(GroupId),
}

/// Why no point was chosen.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum SelectError {
    /// The text is none of the forms.
    #[error(
        "--point \"{text}\": {why}; expected latest, latest-any, a time such as 2026-01-31T12:00:00Z, an id (at least 8 of its digits), or a group point's id"
    )]
    BadText {
        /// What was given.
        text: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The volume has none.
    #[error("volume {volume} has no recovery point yet: let its sender finish a first replication")]
    None {
        /// `MACHINE/NAME`.
        volume: String,
    },
    /// All that fit are fuzzy.
    #[error(
        "volume {volume} has only fuzzy recovery points{when}, read from a disk that was changing: pass --point latest-any or the id of one to take it all the same"
    )]
    OnlyFuzzy {
        /// `MACHINE/NAME`.
        volume: String,
        /// A clause about time, or nothing.
        when: String,
    },
    /// None is that old.
    #[error("volume {volume} has no recovery point at {time} or before: the oldest is of {oldest}")]
    NoneBefore {
        /// `MACHINE/NAME`.
        volume: String,
        /// Time asked for.
        time: UnixMillis,
        /// Time of the oldest point.
        oldest: UnixMillis,
    },
    /// None has this id.
    #[error("volume {volume} has no recovery point {id}: run `blockferry points` to list them")]
    NoSuchId {
        /// `MACHINE/NAME`.
        volume: String,
        /// Id asked for.
        id: String,
    },
    /// Several start so.
    #[error("volume {volume} has {count} recovery points whose id starts with {id}: give more digits")]
    AmbiguousId {
        /// `MACHINE/NAME`.
        volume: String,
        /// Digits given.
        id: String,
        /// How many.
        count: usize,
    },
}

impl FromStr for PointWanted {
    type Err = SelectError;

    fn from_str(text: &str) -> Result<Self, SelectError> {
        let bad = |why| Err(SelectError::BadText { text: text.to_owned(), why });
        match text {
            "latest" => return Ok(Self::Latest),
            "latest-any" => return Ok(Self::LatestAny),
            _ => {}
        }
        if text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return match text.len() {
                ID_DIGITS_MIN..=64 => Ok(Self::Id(text.to_ascii_lowercase())),
                _ => bad("an id has 8 to 64 hexadecimal digits"),
            };
        }
        if let Ok(group) = text.parse::<GroupId>() {
            return Ok(Self::Group(group));
        }
        match text.parse::<jiff::Timestamp>() {
            Ok(time) => Ok(Self::At(UnixMillis(time.as_millisecond()))),
            Err(_) if text.parse::<jiff::civil::DateTime>().is_ok() => {
                bad("a time needs an offset: end it with Z or +02:00")
            }
            Err(_) => bad("it is neither a time nor an id"),
        }
    }
}

impl PointWanted {
    /// The point meant, out of all of `volume`'s, oldest first.
    ///
    /// # Errors
    /// Why there is none.
    pub fn choose(&self, volume: &str, points: &[PointSummary]) -> Result<PointSummary, SelectError> {
        let volume = || volume.to_owned();
        let Some(oldest) = points.first() else { return Err(SelectError::None { volume: volume() }) };
        let sure = |point: &&PointSummary| point.consistency != Consistency::Fuzzy;
        match self {
            Self::LatestAny => Ok(*points.last().unwrap_or(oldest)),
            Self::Latest => points
                .iter()
                .rfind(sure)
                .copied()
                .ok_or_else(|| SelectError::OnlyFuzzy { volume: volume(), when: String::new() }),
            Self::At(time) => {
                let in_time = || points.iter().filter(|point| point.cut_time <= *time);
                match in_time().filter(sure).max_by_key(|point| (point.cut_time, point.epoch)) {
                    Some(point) => Ok(*point),
                    None if in_time().next().is_some() => {
                        Err(SelectError::OnlyFuzzy { volume: volume(), when: format!(" at {time} or before") })
                    }
                    None => Err(SelectError::NoneBefore { volume: volume(), time: *time, oldest: oldest.cut_time }),
                }
            }
            Self::Group(id) => points
                .iter()
                .rfind(|point| point.group_point == *id)
                .copied()
                .ok_or_else(|| SelectError::NoSuchId { volume: volume(), id: id.to_string() }),
            Self::Id(id) => {
                let found: Vec<_> =
                    points.iter().filter(|point| point.id.to_string().starts_with(id.as_str())).collect();
                match found.as_slice() {
                    [] => Err(SelectError::NoSuchId { volume: volume(), id: id.clone() }),
                    [point] => Ok(**point),
                    several => Err(SelectError::AmbiguousId { volume: volume(), id: id.clone(), count: several.len() }),
                }
            }
        }
    }
}

/// Parses a whole close id for `--expect-head`.
///
/// # Errors
/// Text for clap.
pub fn parse_close(text: &str) -> Result<CloseId, String> {
    text.parse().map_err(|error: common::ids::ParseIdError| {
        format!("{error}: give all 64 digits that restore and points print")
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use common::ids::{Epoch, GroupId, Incarnation};

    fn point(id: u8, time: i64, consistency: Consistency) -> PointSummary {
        PointSummary {
            id: CloseId([id; 32]),
            incarnation: Incarnation(1),
            epoch: Epoch(id.into()),
            cut_time: UnixMillis(time),
            consistency,
            disk_bytes: 4096,
            new_bytes: 1,
            committed: UnixMillis(time),
            group_point: GroupId::NIL,
        }
    }

    fn choose(text: &str, points: &[PointSummary]) -> Result<u8, SelectError> {
        text.parse::<PointWanted>()?.choose("web/root", points).map(|point| point.id.0[0])
    }

    #[test]
    fn latest_is_the_newest_that_is_not_fuzzy() {
        let points = [
            point(1, 10, Consistency::Crash),
            point(2, 20, Consistency::Application),
            point(3, 30, Consistency::Fuzzy),
        ];
        assert_eq!(choose("latest", &points), Ok(2));
        assert_eq!(choose("latest-any", &points), Ok(3));
        assert_eq!(choose("0303030303", &points), Ok(3));
        assert!(matches!(choose("latest", &points[2..]), Err(SelectError::OnlyFuzzy { .. })));
        assert!(matches!(choose("latest", &[]), Err(SelectError::None { .. })));
    }

    #[test]
    fn a_time_means_the_newest_point_not_after_it() {
        let points = [
            point(1, 1_000, Consistency::Crash),
            point(2, 2_000, Consistency::Crash),
            point(3, 3_000, Consistency::Fuzzy),
        ];
        assert_eq!(choose("1970-01-01T00:00:01Z", &points), Ok(1));
        assert_eq!(choose("1970-01-01T01:00:02.999+01:00", &points), Ok(2));
        assert_eq!(choose("2026-01-01T00:00:00Z", &points), Ok(2));
        assert!(matches!(choose("1970-01-01T00:00:00Z", &points), Err(SelectError::NoneBefore { .. })));
        assert!(matches!(choose("2026-01-01T00:00:00Z", &points[2..]), Err(SelectError::OnlyFuzzy { .. })));
    }

    #[test]
    fn a_bare_time_and_a_short_id_are_refused() {
        for text in ["2026-01-01T00:00:00", "abc", "yesterday", ""] {
            assert!(matches!(text.parse::<PointWanted>(), Err(SelectError::BadText { .. })), "{text}");
        }
    }

    #[test]
    fn an_id_must_name_one_point() {
        let mut twin = point(0xab, 2, Consistency::Crash);
        twin.id.0[31] = 0;
        let points = [point(0xab, 1, Consistency::Crash), twin];
        assert!(matches!(choose("abababab", &points), Err(SelectError::AmbiguousId { count: 2, .. })));
        assert_eq!(choose(&points[0].id.to_string(), &points), Ok(0xab));
        assert!(matches!(choose("cdcdcdcd", &points), Err(SelectError::NoSuchId { .. })));
    }
}
