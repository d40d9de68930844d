//! Sizes, durations, rates and memory budgets as a person writes them: in flags, environment and TOML files.
//!
//! Pure. Parsing is checked: what doesn't fit is an error that names what was expected, never a wrapped number. Ambiguous
//! units (`MB`, a bare duration) are refused with the form to write instead.

use crate::error::{Dispose, Disposition};
use crate::limits;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// A text was not the quantity that was asked for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("expected {expected}, found {found:?}: {reason}")]
pub struct ParseUnitError {
    /// What the text should have been.
    pub expected: &'static str,
    /// The text, shortened to 80 characters.
    pub found: String,
    /// What is wrong with it.
    pub reason: &'static str,
}

impl Dispose for ParseUnitError {
    fn disposition(&self) -> Disposition {
        Disposition::BadInput
    }
}

fn wrong(expected: &'static str, found: &str, reason: &'static str) -> ParseUnitError {
    ParseUnitError { expected, found: found.chars().take(80).collect(), reason }
}

/// Most digits after a decimal point; more would not change a byte of a TiB by much and could overflow.
const FRACTION_DIGITS_MAX: usize = 9;

/// Splits `12.5MiB` into whole part, fraction digits and unit; `None` where it doesn't start with a number.
fn split_number(text: &str) -> Option<(&str, &str, &str)> {
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let dotted = number.len() > whole.len();
    if whole.is_empty() || fraction.contains('.') || (dotted && fraction.is_empty()) {
        return None;
    }
    Some((whole, fraction, unit.trim_start()))
}

/// `whole.fraction` × `scale`, rounded down; `None` on overflow or too many digits.
fn scale_decimal(whole: &str, fraction: &str, scale: u64) -> Option<u64> {
    if fraction.len() > FRACTION_DIGITS_MAX {
        return None;
    }
    let whole = u128::from(whole.parse::<u64>().ok()?) * u128::from(scale);
    let part = if fraction.is_empty() {
        0
    } else {
        let divisor = 10_u128.checked_pow(u32::try_from(fraction.len()).ok()?)?;
        u128::from(fraction.parse::<u64>().ok()?) * u128::from(scale) / divisor
    };
    u64::try_from(whole + part).ok()
}

macro_rules! text_serde {
    ($name:ident, $expecting:expr) => {
        impl Serialize for $name {
            /// As text that parses to the same value.
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(&self.exact())
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                struct Text;

                impl serde::de::Visitor<'_> for Text {
                    type Value = $name;

                    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                        f.write_str($expecting)
                    }

                    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<$name, E> {
                        text.parse().map_err(E::custom)
                    }

                    fn visit_i64<E: serde::de::Error>(self, number: i64) -> Result<$name, E> {
                        number.to_string().parse().map_err(E::custom)
                    }

                    fn visit_u64<E: serde::de::Error>(self, number: u64) -> Result<$name, E> {
                        number.to_string().parse().map_err(E::custom)
                    }
                }
                deserializer.deserialize_any(Text)
            }
        }
    };
}

/// A number of bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct ByteCount(pub u64);

const BYTE_UNITS: [(&str, u64); 4] = [("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)];
const BYTES_EXPECTED: &str = "a size such as 64MiB, 1.5GiB or plain bytes";

impl ByteCount {
    /// `mib` MiB, saturating.
    #[must_use]
    pub const fn mib(mib: u64) -> Self {
        Self(mib.saturating_mul(1 << 20))
    }

    /// The bytes.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        self.0
    }

    /// Text that parses to exactly this number: `64MiB`, `4097`.
    #[must_use]
    pub fn exact(self) -> String {
        BYTE_UNITS
            .iter()
            .find(|(_, scale)| self.0 != 0 && self.0.is_multiple_of(*scale))
            .map_or_else(|| self.0.to_string(), |(unit, scale)| format!("{}{unit}", self.0 / scale))
    }
}

impl fmt::Display for ByteCount {
    /// For people: `64 MiB`, `1.53 GiB`, `712 B`; at most two decimals.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some((unit, scale)) = BYTE_UNITS.iter().find(|(_, scale)| self.0 >= *scale) else {
            return f.pad(&format!("{} B", self.0));
        };
        let hundredths = u128::from(self.0) * 100 / u128::from(*scale);
        let (whole, rest) = (hundredths / 100, hundredths % 100);
        let text = match rest {
            0 => format!("{whole} {unit}"),
            rest if rest % 10 == 0 => format!("{whole}.{} {unit}", rest / 10),
            rest => format!("{whole}.{rest:02} {unit}"),
        };
        f.pad(&text)
    }
}

impl FromStr for ByteCount {
    type Err = ParseUnitError;

    fn from_str(text: &str) -> Result<Self, ParseUnitError> {
        let wrong = |reason| wrong(BYTES_EXPECTED, text, reason);
        let (whole, fraction, unit) =
            split_number(text.trim()).ok_or_else(|| wrong("it does not start with a number"))?;
        let scale = match unit {
            "" | "B" => 1,
            _ => match BYTE_UNITS.iter().find(|(name, _)| *name == unit) {
                Some((_, scale)) => *scale,
                None => return Err(wrong("units are B, KiB, MiB, GiB and TiB")),
            },
        };
        if scale == 1 && !fraction.is_empty() {
            return Err(wrong("there are no fractions of a byte"));
        }
        scale_decimal(whole, fraction, scale)
            .map(Self)
            .ok_or_else(|| wrong("it is larger than 16 EiB or has too many digits"))
    }
}

text_serde!(ByteCount, BYTES_EXPECTED);

/// A number of bytes per second, written `50MiB/s`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct ByteRate(pub u64);

const RATE_EXPECTED: &str = "a rate such as 50MiB/s";

impl ByteRate {
    /// Text that parses to exactly this rate.
    #[must_use]
    pub fn exact(self) -> String {
        format!("{}/s", ByteCount(self.0).exact())
    }
}

impl fmt::Display for ByteRate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&format!("{}/s", ByteCount(self.0)))
    }
}

impl FromStr for ByteRate {
    type Err = ParseUnitError;

    fn from_str(text: &str) -> Result<Self, ParseUnitError> {
        let size = text.trim().strip_suffix("/s").ok_or_else(|| wrong(RATE_EXPECTED, text, "it does not end in /s"))?;
        let ByteCount(bytes) = size.parse()?;
        if bytes == 0 {
            return Err(wrong(RATE_EXPECTED, text, "a rate of nothing never ends; leave the limit out for none"));
        }
        Ok(Self(bytes))
    }
}

text_serde!(ByteRate, RATE_EXPECTED);

/// A span of time, written `100ms`, `1s`, `5m`, `24h`, `7d` or several together, `1h30m`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct DurationText(pub Duration);

/// Name and nanoseconds, longest first.
const TIME_UNITS: [(&str, u64); 5] = [
    ("d", 86_400_000_000_000),
    ("h", 3_600_000_000_000),
    ("m", 60_000_000_000),
    ("s", 1_000_000_000),
    ("ms", 1_000_000),
];
const TIME_EXPECTED: &str = "a duration such as 100ms, 1s, 5m, 24h or 7d";

impl DurationText {
    /// The duration.
    #[must_use]
    pub const fn get(self) -> Duration {
        self.0
    }

    /// Text that parses to this duration, to the nanosecond.
    #[must_use]
    pub fn exact(self) -> String {
        let mut nanos = self.0.as_nanos();
        if nanos == 0 {
            return "0s".to_owned();
        }
        let mut text = String::new();
        for (unit, scale) in TIME_UNITS {
            let count = nanos / u128::from(scale);
            nanos %= u128::from(scale);
            let last_with_rest = unit == "ms" && nanos > 0;
            if count > 0 || last_with_rest {
                text.push_str(&count.to_string());
                if last_with_rest {
                    text.push('.');
                    text.push_str(format!("{nanos:06}").trim_end_matches('0'));
                }
                text.push_str(unit);
            }
        }
        text
    }
}

impl fmt::Display for DurationText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.exact())
    }
}

impl FromStr for DurationText {
    type Err = ParseUnitError;

    fn from_str(text: &str) -> Result<Self, ParseUnitError> {
        let wrong = |reason| wrong(TIME_EXPECTED, text, reason);
        let mut rest = text.trim();
        let mut total = 0_u64;
        let mut scale_before = u64::MAX;
        loop {
            let (whole, fraction, tail) = split_number(rest).ok_or_else(|| wrong("it does not start with a number"))?;
            let end = tail.find(|c: char| !c.is_ascii_alphabetic()).unwrap_or(tail.len());
            let (unit, next) = tail.split_at(end);
            if unit.is_empty() {
                return Err(wrong("it lacks a unit: ms, s, m, h or d"));
            }
            let scale = TIME_UNITS.iter().find(|(name, _)| *name == unit).map(|(_, scale)| *scale);
            let scale = scale.ok_or_else(|| wrong("units are ms, s, m, h and d"))?;
            if scale >= scale_before {
                return Err(wrong("larger units come first, each once"));
            }
            scale_before = scale;
            total = scale_decimal(whole, fraction, scale)
                .and_then(|nanos| total.checked_add(nanos))
                .ok_or_else(|| wrong("it is longer than 584 years or has too many digits"))?;
            rest = next.trim_start();
            if rest.is_empty() {
                return Ok(Self(Duration::from_nanos(total)));
            }
        }
    }
}

text_serde!(DurationText, TIME_EXPECTED);

/// How much memory a process may use: a share of effective memory, or a size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BudgetSpec {
    /// Percent of effective memory, within [`BudgetSpec::PERCENT`]. The product's range is 6 to 10.
    Percent(u64),
    /// An absolute size.
    Bytes(ByteCount),
}

const BUDGET_EXPECTED: &str = "a memory budget such as 8% or 512MiB";

impl BudgetSpec {
    /// The percentages that are accepted.
    pub const PERCENT: std::ops::RangeInclusive<u64> = 1..=50;

    /// Text that parses to this budget.
    #[must_use]
    pub fn exact(self) -> String {
        match self {
            Self::Percent(percent) => format!("{percent}%"),
            Self::Bytes(bytes) => bytes.exact(),
        }
    }
}

impl Default for BudgetSpec {
    fn default() -> Self {
        Self::Percent(limits::MEMORY_BUDGET_PERCENT_DEFAULT)
    }
}

impl fmt::Display for BudgetSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.exact())
    }
}

impl FromStr for BudgetSpec {
    type Err = ParseUnitError;

    fn from_str(text: &str) -> Result<Self, ParseUnitError> {
        let Some(percent) = text.trim().strip_suffix('%') else {
            return text
                .parse()
                .map(Self::Bytes)
                .map_err(|e: ParseUnitError| ParseUnitError { expected: BUDGET_EXPECTED, ..e });
        };
        match percent.trim_end().parse::<u64>() {
            Ok(percent) if Self::PERCENT.contains(&percent) => Ok(Self::Percent(percent)),
            _ => Err(wrong(BUDGET_EXPECTED, text, "a share is a whole number from 1% to 50%")),
        }
    }
}

text_serde!(BudgetSpec, BUDGET_EXPECTED);

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn bytes(text: &str) -> Option<u64> {
        text.parse::<ByteCount>().ok().map(ByteCount::bytes)
    }

    fn millis(text: &str) -> Option<u128> {
        text.parse::<DurationText>().ok().map(|d| d.get().as_millis())
    }

    #[test]
    fn sizes_take_plain_bytes_binary_units_and_fractions() {
        assert_eq!(bytes("4096"), Some(4096));
        assert_eq!(bytes("64MiB"), Some(64 << 20));
        assert_eq!(bytes(" 64 MiB "), Some(64 << 20));
        assert_eq!(bytes("1.5GiB"), Some(3 << 29));
        assert_eq!(bytes("0.001KiB"), Some(1));
        assert_eq!(bytes("2TiB"), Some(2 << 40));
        assert_eq!(bytes("0"), Some(0));
    }

    #[test]
    fn sizes_refuse_decimal_units_overflow_and_rubbish() {
        for text in [
            "",
            "MiB",
            "64MB",
            "64mib",
            "1.5",
            "1.GiB",
            ".5GiB",
            "1.2.3GiB",
            "-1",
            "+1",
            "1e3",
            "17179869184TiB",
            "18446744073709551616",
            "0.1234567891GiB",
        ] {
            assert_eq!(bytes(text), None, "{text:?}");
        }
        let error = "64MB".parse::<ByteCount>().expect_err("MB is ambiguous").to_string();
        assert!(error.contains("64MB") && error.contains("MiB"), "{error}");
    }

    #[test]
    fn sizes_are_shown_for_people_with_two_decimals_at_most() {
        assert_eq!(ByteCount(712).to_string(), "712 B");
        assert_eq!(ByteCount(64 << 20).to_string(), "64 MiB");
        assert_eq!(ByteCount(3 << 29).to_string(), "1.5 GiB");
        assert_eq!(ByteCount(1025 << 10).to_string(), "1 MiB");
        assert_eq!(ByteCount((1 << 20) + (63 << 10)).to_string(), "1.06 MiB");
        assert_eq!(ByteCount(u64::MAX).to_string(), "16777215.99 TiB");
    }

    #[test]
    fn durations_take_each_unit_and_several_together() {
        assert_eq!(millis("100ms"), Some(100));
        assert_eq!(millis("1s"), Some(1000));
        assert_eq!(millis("0.5s"), Some(500));
        assert_eq!(millis("5m"), Some(300_000));
        assert_eq!(millis("24h"), Some(86_400_000));
        assert_eq!(millis("7d"), Some(604_800_000));
        assert_eq!(millis("1h30m"), Some(5_400_000));
        assert_eq!(millis("1h 30m"), Some(5_400_000));
        assert_eq!(millis("0s"), Some(0));
    }

    #[test]
    fn durations_refuse_a_bare_number_unknown_units_and_overflow() {
        for text in ["", "5", "s", "5 weeks", "30m1h", "1s1s", "1h30", "-5s", "999999999999d"] {
            assert_eq!(millis(text), None, "{text:?}");
        }
        let error = "5".parse::<DurationText>().expect_err("no unit").to_string();
        assert!(error.contains("unit"), "{error}");
    }

    #[test]
    fn a_budget_is_a_share_within_its_range_or_a_size() {
        assert_eq!("8%".parse(), Ok(BudgetSpec::Percent(8)));
        assert_eq!("512MiB".parse(), Ok(BudgetSpec::Bytes(ByteCount::mib(512))));
        for text in ["0%", "51%", "7.5%", "%", "-8%", "much"] {
            assert!(text.parse::<BudgetSpec>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn a_rate_needs_its_per_second() {
        assert_eq!("50MiB/s".parse(), Ok(ByteRate(50 << 20)));
        assert!("50MiB".parse::<ByteRate>().is_err());
        assert!("0/s".parse::<ByteRate>().is_err());
    }

    #[test]
    fn configuration_takes_text_or_a_number_and_gives_text_that_reads_back() {
        use serde::de::IntoDeserializer;
        use serde::de::value::Error;
        let text =
            |text: &'static str| -> Result<ByteCount, Error> { ByteCount::deserialize(text.into_deserializer()) };
        let number = |number: i64| -> Result<ByteCount, Error> { ByteCount::deserialize(number.into_deserializer()) };
        assert_eq!(text("32MiB").expect("a size"), ByteCount::mib(32));
        assert_eq!(number(4096).expect("a size"), ByteCount(4096));
        assert!(number(-1).is_err());
        assert!(text("32MB").expect_err("ambiguous").to_string().contains("32MB"));
    }

    proptest! {
        #[test]
        fn exact_text_parses_to_the_same_value(value: u64, percent in BudgetSpec::PERCENT) {
            prop_assert_eq!(ByteCount(value).exact().parse(), Ok(ByteCount(value)));
            let time = DurationText(Duration::from_nanos(value));
            prop_assert_eq!(time.exact().parse(), Ok(time));
            prop_assert_eq!(BudgetSpec::Percent(percent).exact().parse(), Ok(BudgetSpec::Percent(percent)));
            prop_assume!(value > 0);
            prop_assert_eq!(ByteRate(value).exact().parse(), Ok(ByteRate(value)));
        }

        #[test]
        fn parsing_never_panics(text in ".{0,40}") {
            let _ = text.parse::<ByteCount>();
            let _ = text.parse::<DurationText>();
            let _ = text.parse::<BudgetSpec>();
            let _ = text.parse::<ByteRate>();
        }
    }
}
