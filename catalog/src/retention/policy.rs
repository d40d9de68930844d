//! PURE: which recovery points a volume keeps. Parsed from text, printed as text, applied to a list of points.
//!
//! ```text
//! keep all
//! all for 24h, hourly for 7d, daily for 30d, weekly for 1y, monthly for 5y, latest 10
//! ```
//!
//! A point is kept where any rule keeps it. `all for T` keeps the points committed within the last T. `hourly for T` and its
//! like divide time into hours, days, weeks (from Monday) or months of UTC, and keep one point of each of these *buckets* of
//! which any instant lies within the last T: the newest of the strongest consistency there, so a fuzzy one only where its
//! bucket has no other. `latest N` keeps the N newest. Whatever the rules say, the newest point and the newest that is not
//! fuzzy are kept, and so is every point from the future.
//!
//! Promises: times are those at which the store wrote the log entries, newest is by epoch. Planning again later, on what
//! was left, keeps the same point of a bucket as if nothing had been expired before, and a point that is expired once would
//! be expired ever after: a rule measures its span at the bucket's end, so that no bucket is ever judged by a part of its points.
//! Never: reads a clock; decides by the sender's times.

use std::collections::HashMap;
use std::fmt;
use std::str::FromStr;

use common::clock::UnixMillis;
use common::error::{Dispose, Disposition};
use common::format::close::Consistency;
use common::ids::{CloseId, Epoch};

/// Longest text of a policy in bytes.
pub const POLICY_TEXT_BYTES_MAX: usize = 512;
/// Longest span in years: far beyond any law, far below what overflows.
const SPAN_YEARS_MAX: i64 = 1_000;
const MINUTE_MS: i64 = 60_000;
const HOUR_MS: i64 = 60 * MINUTE_MS;
const DAY_MS: i64 = 24 * HOUR_MS;
const WEEK_MS: i64 = 7 * DAY_MS;
/// 365 days: a span is a length, not a date.
const YEAR_MS: i64 = 365 * DAY_MS;

const EXPECTED: &str = "\"keep all\", or a list like \"all for 24h, hourly for 7d, daily for 30d, weekly for 1y, monthly \
                        for 5y, latest 10\"";

/// Why a text is no policy.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PolicyError {
    /// No rule in it.
    #[error("the policy has an empty rule: expected {EXPECTED}")]
    Empty,
    /// More than anybody writes.
    #[error("the policy has {found} bytes, expected at most {POLICY_TEXT_BYTES_MAX}")]
    TooLong {
        /// Its bytes.
        found: usize,
    },
    /// A word that means nothing here, or once too often.
    #[error("\"{word}\" in policy rule \"{rule}\" is not understood: expected {EXPECTED}")]
    Word {
        /// The word.
        word: String,
        /// The rule.
        rule: String,
    },
    /// A rule that does not say what it keeps.
    #[error(
        "policy rule \"{rule}\" says not what to keep: expected all, hourly, daily, weekly, monthly or latest in it"
    )]
    NoKind {
        /// The rule.
        rule: String,
    },
    /// A rule without its span.
    #[error("policy rule \"{rule}\" says not for how long: expected \"for\" and a span like 36h, 7d, 4w or 1y in it")]
    NoSpan {
        /// The rule.
        rule: String,
    },
    /// Not a span of time.
    #[error(
        "\"{found}\" in policy rule \"{rule}\" is not a span: expected a whole number from 1 on and m, h, d, w or y, like 36h \
         or 7d, at most {SPAN_YEARS_MAX}y"
    )]
    Span {
        /// What stands there.
        found: String,
        /// The rule.
        rule: String,
    },
    /// `latest` without its number.
    #[error(
        "policy rule \"{rule}\" says not how many: expected a whole number from 1 to {}, as in \"latest 10\"",
        u32::MAX
    )]
    Count {
        /// The rule.
        rule: String,
    },
    /// Two rules of a kind.
    #[error("the policy has two rules \"{kind}\": expected each once; the longer one keeps what both do")]
    Twice {
        /// Which.
        kind: &'static str,
    },
    /// `keep all` beside others.
    #[error("the policy keeps all and has other rules: expected \"keep all\" alone, or a span, as in \"all for 24h\"")]
    AllAndMore,
}

impl Dispose for PolicyError {
    fn disposition(&self) -> Disposition {
        Disposition::BadInput
    }
}

/// Which points to keep.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Policy {
    /// None for `keep all`; else each kind at most once, in the order of [`Rule::rank`].
    rules: Vec<Rule>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Rule {
    All(Span),
    One(Bucket, Span),
    Latest(u32),
}

/// What one point is kept of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Bucket {
    Hour,
    Day,
    Week,
    Month,
}

/// A length of time as it was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Span {
    number: u32,
    unit: SpanUnit,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum SpanUnit {
    Minute,
    Hour,
    Day,
    Week,
    Year,
}

/// What a policy is asked about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PolicyPoint {
    /// Its name.
    pub id: CloseId,
    /// When the store wrote its log entry, by the store's time.
    pub committed: UnixMillis,
    /// What it asserts.
    pub consistency: Consistency,
    /// Its epoch: what is newer.
    pub epoch: Epoch,
}

/// What becomes of a point.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decision {
    /// The point.
    pub point: PolicyPoint,
    /// Kept or expired.
    pub verdict: Verdict,
}

impl Decision {
    /// True where the point is kept.
    #[must_use]
    pub fn keeps(&self) -> bool {
        matches!(self.verdict, Verdict::Keep(_))
    }
}

/// Kept or expired, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// The point stays.
    Keep(KeepReason),
    /// The point is to be offered no more.
    Expire(ExpireReason),
}

/// Why a point stays.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KeepReason {
    /// The policy keeps all.
    KeepAll,
    /// The rule of this text keeps it.
    Rule(String),
    /// No point is newer.
    Newest,
    /// No point that is not fuzzy is newer.
    NewestNonFuzzy,
    /// It was committed later than now.
    Future,
}

/// Why a point goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExpireReason {
    /// It is older than every rule's span.
    Age,
    /// Another point stands for its bucket.
    Bucket {
        /// The text of the rule with the widest buckets that could have kept it.
        rule: String,
        /// The epoch that is kept instead.
        instead: Epoch,
    },
}

impl fmt::Display for Verdict {
    /// `keep: hourly for 7d`, `expire: …`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Keep(reason) => write!(f, "keep: {reason}"),
            Self::Expire(reason) => write!(f, "expire: {reason}"),
        }
    }
}

impl fmt::Display for KeepReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::KeepAll => f.write_str("the policy keeps all"),
            Self::Rule(rule) => f.write_str(rule),
            Self::Newest => f.write_str("the newest point"),
            Self::NewestNonFuzzy => f.write_str("the newest point that is not fuzzy"),
            Self::Future => f.write_str("its time lies in the future"),
        }
    }
}

impl fmt::Display for ExpireReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Age => f.write_str("older than every rule reaches"),
            Self::Bucket { rule, instead } => write!(f, "{rule} keeps epoch {} instead", instead.0),
        }
    }
}

impl Policy {
    /// True where nothing ever expires.
    #[must_use]
    pub fn keeps_all(&self) -> bool {
        self.rules.is_empty()
    }

    /// What becomes of each of `points` at `now`, both by the store's time; in the order given. Takes memory and time for a
    /// few words a point and rule.
    #[must_use]
    pub fn plan(&self, now: UnixMillis, points: &[PolicyPoint]) -> Vec<Decision> {
        let newest = points.iter().map(|point| point.epoch).max();
        let newest_sound =
            points.iter().filter(|point| point.consistency != Consistency::Fuzzy).map(|point| point.epoch).max();
        let rules: Vec<PlannedRule> = self.rules.iter().map(|rule| PlannedRule::new(*rule, now, points)).collect();
        let verdict = |point: &PolicyPoint| {
            let keep = |reason| Verdict::Keep(reason);
            if self.keeps_all() {
                keep(KeepReason::KeepAll)
            } else if let Some(rule) = rules.iter().find(|rule| rule.keeps(point)) {
                keep(KeepReason::Rule(rule.rule.to_string()))
            } else if Some(point.epoch) == newest {
                keep(KeepReason::Newest)
            } else if Some(point.epoch) == newest_sound {
                keep(KeepReason::NewestNonFuzzy)
            } else if point.committed > now {
                keep(KeepReason::Future)
            } else {
                let lost_to = |rule: &PlannedRule| {
                    Some(ExpireReason::Bucket { rule: rule.rule.to_string(), instead: rule.winner(point)? })
                };
                Verdict::Expire(rules.iter().rev().find_map(lost_to).unwrap_or(ExpireReason::Age))
            }
        };
        points.iter().map(|point| Decision { point: *point, verdict: verdict(point) }).collect()
    }
}

/// A rule and what it keeps of a list of points.
struct PlannedRule {
    rule: Rule,
    /// The oldest instant within the span.
    since: i64,
    /// For each bucket within the span the point that stands for it.
    winners: HashMap<i64, (Consistency, Epoch)>,
    /// The oldest of the newest points, for `latest`.
    latest_from: Epoch,
}

impl PlannedRule {
    fn new(rule: Rule, now: UnixMillis, points: &[PolicyPoint]) -> Self {
        let since = match rule {
            Rule::All(span) | Rule::One(_, span) => now.0.saturating_sub(span.millis()),
            Rule::Latest(_) => i64::MAX,
        };
        let mut planned = Self { rule, since, winners: HashMap::new(), latest_from: Epoch(u64::MAX) };
        match rule {
            Rule::All(_) => {}
            Rule::One(bucket, _) => {
                for point in points {
                    let rank = (point.consistency, point.epoch);
                    if bucket.end(bucket.of(point.committed)) > since {
                        let best = planned.winners.entry(bucket.of(point.committed)).or_insert(rank);
                        *best = rank.max(*best);
                    }
                }
            }
            Rule::Latest(count) => {
                let mut epochs: Vec<Epoch> = points.iter().map(|point| point.epoch).collect();
                epochs.sort_unstable_by(|a, b| b.cmp(a));
                let last = epochs.len().min(count as usize);
                planned.latest_from = epochs[..last].last().copied().unwrap_or(Epoch(u64::MAX));
            }
        }
        planned
    }

    fn keeps(&self, point: &PolicyPoint) -> bool {
        match self.rule {
            Rule::All(_) => point.committed.0 >= self.since,
            Rule::One(..) => self.winner(point) == Some(point.epoch),
            Rule::Latest(_) => point.epoch >= self.latest_from,
        }
    }

    /// The epoch that stands for the point's bucket, where that lies within the span.
    fn winner(&self, point: &PolicyPoint) -> Option<Epoch> {
        let Rule::One(bucket, _) = self.rule else { return None };
        self.winners.get(&bucket.of(point.committed)).map(|(_, epoch)| *epoch)
    }
}

impl Bucket {
    /// The number of the bucket in which `time` lies; growing with time.
    fn of(self, time: UnixMillis) -> i64 {
        match self {
            Self::Hour => time.0.div_euclid(HOUR_MS),
            Self::Day => time.0.div_euclid(DAY_MS),
            // The first of January 1970 was a Thursday: three days after a Monday.
            Self::Week => (time.0.div_euclid(DAY_MS) + 3).div_euclid(7),
            Self::Month => month_of_day(time.0.div_euclid(DAY_MS)),
        }
    }

    /// The first instant after the bucket of this number.
    fn end(self, number: i64) -> i64 {
        let next = number + 1;
        match self {
            Self::Hour => next.saturating_mul(HOUR_MS),
            Self::Day => next.saturating_mul(DAY_MS),
            Self::Week => (next * 7 - 3).saturating_mul(DAY_MS),
            Self::Month => first_day_of_month(next).saturating_mul(DAY_MS),
        }
    }

    fn word(self) -> &'static str {
        match self {
            Self::Hour => "hourly",
            Self::Day => "daily",
            Self::Week => "weekly",
            Self::Month => "monthly",
        }
    }
}

/// Days from 0000-03-01 to 1970-01-01 in the Gregorian calendar, whose years are best counted from March on: the leap day is
/// then a year's last.
const DAYS_TO_1970: i64 = 719_468;
const DAYS_OF_400_YEARS: i64 = 146_097;

/// Months since January of year 0, for a day since 1970 (proleptic Gregorian calendar, UTC).
fn month_of_day(day: i64) -> i64 {
    let day = day + DAYS_TO_1970;
    let (era, of_era) = (day.div_euclid(DAYS_OF_400_YEARS), day.rem_euclid(DAYS_OF_400_YEARS));
    let year = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    // 153 days in five months from March on: 31, 30, 31, 30, 31.
    let month_from_march = (5 * of_year + 2) / 153;
    (era * 400 + year) * 12 + month_from_march + 2
}

/// The inverse: the first day, since 1970, of a month since January of year 0.
fn first_day_of_month(month: i64) -> i64 {
    let from_march = month - 2;
    let (year, month) = (from_march.div_euclid(12), from_march.rem_euclid(12));
    let (era, year) = (year.div_euclid(400), year.rem_euclid(400));
    let of_year = (153 * month + 2) / 5;
    era * DAYS_OF_400_YEARS + year * 365 + year / 4 - year / 100 + of_year - DAYS_TO_1970
}

impl Rule {
    /// The word that a policy has once at most.
    fn word(self) -> &'static str {
        match self {
            Self::All(_) => "all",
            Self::One(bucket, _) => bucket.word(),
            Self::Latest(_) => "latest",
        }
    }

    /// Order in print: from what reaches back least to what reaches back most.
    fn rank(self) -> u8 {
        match self {
            Self::All(_) => 0,
            Self::One(bucket, _) => 1 + bucket as u8,
            Self::Latest(_) => 5,
        }
    }

    fn parse(text: &str) -> Result<Self, PolicyError> {
        let rule = || text.trim().to_owned();
        let bad = |word: &str| PolicyError::Word { word: word.to_owned(), rule: rule() };
        let (mut kind, mut span, mut count) = (None, None, None);
        let mut words = text.split_whitespace().peekable();
        if words.peek().is_none() {
            return Err(PolicyError::Empty);
        }
        let mut keep_said = false;
        while let Some(word) = words.next() {
            match word {
                "keep" if !keep_said => keep_said = true,
                "all" | "hourly" | "daily" | "weekly" | "monthly" | "latest" if kind.is_none() => kind = Some(word),
                "for" if span.is_none() => {
                    let found = words.next().ok_or_else(|| PolicyError::NoSpan { rule: rule() })?;
                    let parsed = Span::parse(found);
                    span = Some(parsed.ok_or_else(|| PolicyError::Span { found: found.to_owned(), rule: rule() })?);
                }
                number if count.is_none() && number.bytes().all(|byte| byte.is_ascii_digit()) => {
                    let parsed = number.parse().ok().filter(|count| *count > 0);
                    count = Some(parsed.ok_or_else(|| PolicyError::Count { rule: rule() })?);
                }
                other => return Err(bad(other)),
            }
        }
        let spanned = || span.ok_or_else(|| PolicyError::NoSpan { rule: rule() });
        let parsed = match kind.ok_or_else(|| PolicyError::NoKind { rule: rule() })? {
            "latest" => Self::Latest(count.ok_or_else(|| PolicyError::Count { rule: rule() })?),
            "all" => Self::All(spanned()?),
            "hourly" => Self::One(Bucket::Hour, spanned()?),
            "daily" => Self::One(Bucket::Day, spanned()?),
            "weekly" => Self::One(Bucket::Week, spanned()?),
            _ => Self::One(Bucket::Month, spanned()?),
        };
        match (parsed, span, count) {
            (Self::Latest(_), Some(span), _) => Err(bad(&format!("for {span}"))),
            (Self::All(_) | Self::One(..), _, Some(count)) => Err(bad(&count.to_string())),
            _ => Ok(parsed),
        }
    }
}

impl Span {
    fn parse(text: &str) -> Option<Self> {
        let unit = match text.bytes().last()? {
            b'm' => SpanUnit::Minute,
            b'h' => SpanUnit::Hour,
            b'd' => SpanUnit::Day,
            b'w' => SpanUnit::Week,
            b'y' => SpanUnit::Year,
            _ => return None,
        };
        let digits = &text[..text.len() - 1];
        let number = digits.bytes().all(|byte| byte.is_ascii_digit()).then(|| digits.parse().ok()).flatten()?;
        let span = Self { number, unit };
        (number > 0 && span.millis() <= SPAN_YEARS_MAX * YEAR_MS).then_some(span)
    }

    fn millis(self) -> i64 {
        i64::from(self.number)
            * match self.unit {
                SpanUnit::Minute => MINUTE_MS,
                SpanUnit::Hour => HOUR_MS,
                SpanUnit::Day => DAY_MS,
                SpanUnit::Week => WEEK_MS,
                SpanUnit::Year => YEAR_MS,
            }
    }
}

impl FromStr for Policy {
    type Err = PolicyError;

    /// Words may stand in any order, `keep` may stand before each rule.
    fn from_str(text: &str) -> Result<Self, PolicyError> {
        if text.len() > POLICY_TEXT_BYTES_MAX {
            return Err(PolicyError::TooLong { found: text.len() });
        }
        let keeps_all = |rule: &str| {
            let words: Vec<&str> = rule.split_whitespace().filter(|word| *word != "keep").collect();
            words == ["all"]
        };
        let texts: Vec<&str> = text.split(',').collect();
        if texts.iter().any(|rule| keeps_all(rule)) {
            return if texts.len() == 1 { Ok(Self::default()) } else { Err(PolicyError::AllAndMore) };
        }
        let mut rules = texts.into_iter().map(Rule::parse).collect::<Result<Vec<_>, _>>()?;
        rules.sort_by_key(|rule| rule.rank());
        if let Some(pair) = rules.windows(2).find(|pair| pair[0].rank() == pair[1].rank()) {
            return Err(PolicyError::Twice { kind: pair[0].word() });
        }
        Ok(Self { rules })
    }
}

impl fmt::Display for Policy {
    /// The text that parses to this policy.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.keeps_all() {
            return f.write_str("keep all");
        }
        for (number, rule) in self.rules.iter().enumerate() {
            write!(f, "{}{rule}", if number == 0 { "" } else { ", " })?;
        }
        Ok(())
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::All(span) | Self::One(_, span) => write!(f, "{} for {span}", self.word()),
            Self::Latest(count) => write!(f, "latest {count}"),
        }
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let unit = match self.unit {
            SpanUnit::Minute => 'm',
            SpanUnit::Hour => 'h',
            SpanUnit::Day => 'd',
            SpanUnit::Week => 'w',
            SpanUnit::Year => 'y',
        };
        write!(f, "{}{unit}", self.number)
    }
}

#[cfg(test)]
mod tests;
