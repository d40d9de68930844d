use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;

/// 2024-02-28T00:00:00Z, a Wednesday before a leap day.
const FEB_28: i64 = 1_709_078_400_000;

fn point(epoch: u64, committed: i64, consistency: Consistency) -> PolicyPoint {
    let mut id = CloseId::ZERO;
    id.0[..8].copy_from_slice(&epoch.to_be_bytes());
    PolicyPoint { id, committed: UnixMillis(committed), consistency, epoch: Epoch(epoch) }
}

fn policy(text: &str) -> Policy {
    text.parse().unwrap_or_else(|error| panic!("{text}: {error}"))
}

fn kept(policy: &Policy, now: i64, points: &[PolicyPoint]) -> Vec<u64> {
    let plan = policy.plan(UnixMillis(now), points);
    plan.iter().filter(|decision| decision.keeps()).map(|decision| decision.point.epoch.0).collect()
}

#[test]
fn policies_are_read_in_any_order_of_words_and_printed_in_one() {
    for (text, printed) in [
        ("keep all", "keep all"),
        ("all", "keep all"),
        ("all for 24h", "all for 24h"),
        ("keep all for 24h, hourly for 7d, daily for 30d", "all for 24h, hourly for 7d, daily for 30d"),
        ("latest 10,monthly for 5y , weekly for 1y", "weekly for 1y, monthly for 5y, latest 10"),
        ("keep latest 3", "latest 3"),
        ("for 90m all keep,  10 latest", "all for 90m, latest 10"),
        ("daily for 4w", "daily for 4w"),
        ("monthly for 1000y, latest 4294967295", "monthly for 1000y, latest 4294967295"),
    ] {
        assert_eq!(policy(text).to_string(), printed, "{text}");
        assert_eq!(policy(printed), policy(text), "{text}");
    }
}

#[test]
fn each_text_that_is_no_policy_is_refused_in_its_own_words() {
    for (text, words) in [
        ("", "empty rule"),
        ("all for 24h,", "empty rule"),
        ("all for 24h,,daily for 2d", "empty rule"),
        ("yearly for 5y", "\"yearly\" in policy rule \"yearly for 5y\""),
        ("hourly daily for 5d", "\"daily\" in policy rule"),
        ("for 5d", "says not what to keep"),
        ("keep", "says not what to keep"),
        ("hourly", "says not for how long"),
        ("hourly for", "says not for how long"),
        ("hourly for 5", "\"5\" in policy rule \"hourly for 5\" is not a span"),
        ("hourly for 0d", "\"0d\""),
        ("hourly for 5s", "\"5s\""),
        ("hourly for -5d", "\"-5d\""),
        ("hourly for 1001y", "at most 1000y"),
        ("hourly for 99999999999999999999d", "not a span"),
        ("hourly for d", "\"d\""),
        ("hourly for 5\u{e9}", "not a span"),
        ("hourly 5 for 7d", "\"5\" in policy rule"),
        ("latest", "says not how many"),
        ("latest 0", "says not how many"),
        ("latest 4294967296", "says not how many"),
        ("latest 5 for 3d", "\"for 3d\" in policy rule"),
        ("daily for 5d, daily for 7d", "two rules \"daily\""),
        ("latest 5, latest 6", "two rules \"latest\""),
        ("keep all, latest 5", "\"keep all\" alone"),
        ("all, all", "\"keep all\" alone"),
        ("All for 24h", "\"All\""),
    ] {
        let error = text.parse::<Policy>().expect_err(text).to_string();
        assert!(error.contains(words), "{text}: {error}");
    }
    let long = "x".repeat(POLICY_TEXT_BYTES_MAX + 1);
    assert_eq!(long.parse::<Policy>(), Err(PolicyError::TooLong { found: 513 }));
}

#[test]
fn buckets_begin_and_end_where_the_calendar_says() {
    use jiff::{ToSpan as _, Unit, civil::Weekday, tz::TimeZone};
    for step in 0..40_000_i64 {
        // Odd steps through 1700 to 2360, so that all hours, week days and months occur.
        let time = -8_520_336_000_000 + step * 521_003_777;
        let zoned = jiff::Timestamp::from_millisecond(time).expect("in range").to_zoned(TimeZone::UTC);
        let day = zoned.start_of_day().expect("in range");
        let monday = day.checked_sub(i64::from(zoned.weekday().to_monday_zero_offset()).days()).expect("in range");
        assert_eq!(monday.weekday(), Weekday::Monday);
        let month = day.first_of_month().expect("in range");
        for (bucket, start, end) in [
            (Bucket::Day, day.clone(), day.checked_add(1.day())),
            (Bucket::Week, monday.clone(), monday.checked_add(7.days())),
            (Bucket::Month, month.clone(), month.checked_add(1.month())),
        ] {
            let (start, end) =
                (start.timestamp().as_millisecond(), end.expect("in range").timestamp().as_millisecond());
            let number = bucket.of(UnixMillis(time));
            assert_eq!(bucket.end(number), end, "{bucket:?} of {zoned}");
            assert_eq!(bucket.of(UnixMillis(start)), number, "{bucket:?} of {zoned}");
            assert_eq!(bucket.of(UnixMillis(start - 1)), number - 1, "{bucket:?} of {zoned}");
            assert_eq!(bucket.of(UnixMillis(end - 1)), number, "{bucket:?} of {zoned}");
        }
        let hour = zoned.round(jiff::ZonedRound::new().smallest(Unit::Hour).mode(jiff::RoundMode::Floor));
        let hour = hour.expect("in range").timestamp().as_millisecond();
        assert_eq!(Bucket::Hour.end(Bucket::Hour.of(UnixMillis(time))), hour + HOUR_MS);
    }
    for bucket in [Bucket::Hour, Bucket::Day, Bucket::Week, Bucket::Month] {
        for time in [i64::MIN, i64::MAX] {
            let _ = bucket.end(bucket.of(UnixMillis(time)));
        }
    }
}

#[test]
fn rules_keep_what_they_say() {
    use Consistency::{Application, Crash, Fuzzy};
    let at = |hours: i64| FEB_28 + hours * HOUR_MS;
    // One each six hours from midnight on, for ten days; the last lies at 234 h.
    let quarters: Vec<PolicyPoint> = (0..40).map(|n| point(n + 1, at(n as i64 * 6), Crash)).collect();
    let hour_of = |minutes: &[(i64, Consistency)]| -> Vec<PolicyPoint> {
        let make =
            |(n, (minute, kind)): (usize, &(i64, Consistency))| point(n as u64 + 1, at(0) + minute * MINUTE_MS, *kind);
        minutes.iter().enumerate().map(make).collect()
    };
    let cases: Vec<(&str, i64, Vec<PolicyPoint>, Vec<u64>)> = vec![
        ("keep all", at(100_000), quarters.clone(), (1..=40).collect()),
        ("all for 24h", at(234), quarters.clone(), vec![36, 37, 38, 39, 40]),
        // The newest point stays however old it is.
        ("all for 24h", at(10_000), quarters.clone(), vec![40]),
        ("latest 3", at(100_000), quarters.clone(), vec![38, 39, 40]),
        ("latest 100", at(100_000), quarters.clone(), (1..=40).collect()),
        // Days whose end lies within the last 3 d: the 5th of March (168 h to 192 h) to the 8th.
        ("daily for 3d", at(263), quarters.clone(), vec![32, 36, 40]),
        ("daily for 3d", at(264), quarters.clone(), vec![36, 40]),
        // Mondays: the 4th of March at 120 h.
        ("weekly for 52w", at(240), quarters.clone(), vec![20, 40]),
        // The 1st of March, after a leap day, at 48 h.
        ("monthly for 1y", at(240), quarters.clone(), vec![8, 40]),
        ("all for 6h, daily for 2d, monthly for 1y", at(234), quarters.clone(), vec![8, 32, 36, 39, 40]),
        // The strongest of a bucket before the newest.
        ("hourly for 1d", at(5), hour_of(&[(0, Application), (20, Crash), (40, Fuzzy), (70, Crash)]), vec![1, 4]),
        ("hourly for 1d", at(5), hour_of(&[(0, Crash), (20, Crash), (40, Fuzzy), (70, Crash)]), vec![2, 4]),
        // A fuzzy one only where its bucket has no other, the newest of these.
        ("hourly for 1d", at(5), hour_of(&[(0, Crash), (70, Fuzzy), (80, Fuzzy), (130, Crash)]), vec![1, 3, 4]),
        // The newest of all and the newest that is not fuzzy never go by time alone.
        ("hourly for 1h", at(500), hour_of(&[(0, Crash), (70, Crash), (80, Fuzzy), (130, Fuzzy)]), vec![2, 4]),
        // A future that only a wrong clock makes is left alone.
        ("latest 1", at(2), hour_of(&[(0, Crash), (60, Crash), (500, Crash), (130, Crash)]), vec![3, 4]),
        ("latest 1", at(5), vec![], vec![]),
    ];
    for (text, now, points, expected) in cases {
        assert_eq!(kept(&policy(text), now, &points), expected, "{text} at {}", UnixMillis(now));
        let backwards: Vec<PolicyPoint> = points.iter().rev().copied().collect();
        let mut found = kept(&policy(text), now, &backwards);
        found.reverse();
        assert_eq!(found, expected, "{text}: the order of the points must not matter");
    }
}

#[test]
fn every_decision_says_why() {
    let points = [
        point(1, FEB_28 - 40 * DAY_MS, Consistency::Crash),
        point(2, FEB_28, Consistency::Crash),
        point(3, FEB_28 + 1, Consistency::Crash),
        point(4, FEB_28 + 25 * HOUR_MS, Consistency::Fuzzy),
        point(5, FEB_28 + 99 * HOUR_MS, Consistency::Fuzzy),
    ];
    let plan = policy("daily for 7d").plan(UnixMillis(FEB_28 + 30 * HOUR_MS), &points);
    let words: Vec<String> = plan.iter().map(|decision| decision.verdict.to_string()).collect();
    assert_eq!(
        words,
        [
            "expire: older than every rule reaches",
            "expire: daily for 7d keeps epoch 3 instead",
            "keep: daily for 7d",
            "keep: daily for 7d",
            "keep: daily for 7d",
        ]
    );
    let plan = policy("all for 1m").plan(UnixMillis(FEB_28 + 30 * HOUR_MS), &points[..4]);
    assert_eq!(plan[2].verdict.to_string(), "keep: the newest point that is not fuzzy");
    assert_eq!(plan[3].verdict.to_string(), "keep: the newest point");
    assert_eq!(Policy::default().plan(UnixMillis(0), &points)[0].verdict.to_string(), "keep: the policy keeps all");
    let plan = policy("latest 1").plan(UnixMillis(FEB_28), &points);
    assert_eq!(plan[3].verdict, Verdict::Keep(KeepReason::Future));
}

fn consistencies() -> impl Strategy<Value = Consistency> {
    prop_oneof![
        3 => Just(Consistency::Fuzzy),
        3 => Just(Consistency::Crash),
        1 => Just(Consistency::Filesystem),
        1 => Just(Consistency::Application),
    ]
}

/// Points as a volume makes them: ever newer, by steps of seconds to weeks.
fn histories() -> impl Strategy<Value = Vec<PolicyPoint>> {
    let step = prop_oneof![1_000..600_000_i64, 600_000..6 * HOUR_MS, 6 * HOUR_MS..3 * DAY_MS, 3 * DAY_MS..40 * DAY_MS];
    prop::collection::vec((step, consistencies()), 0..60).prop_map(|steps| {
        let (mut time, mut points) = (FEB_28, Vec::new());
        for (number, (step, consistency)) in steps.into_iter().enumerate() {
            time += step;
            points.push(point(number as u64 + 1, time, consistency));
        }
        points
    })
}

fn spans() -> impl Strategy<Value = Span> {
    let unit = prop_oneof![
        Just(SpanUnit::Minute),
        Just(SpanUnit::Hour),
        Just(SpanUnit::Day),
        Just(SpanUnit::Week),
        Just(SpanUnit::Year)
    ];
    (1..40_u32, unit).prop_map(|(number, unit)| Span { number, unit })
}

fn policies() -> impl Strategy<Value = Policy> {
    let rule = |bucket: Bucket| prop::option::of(spans().prop_map(move |span| Rule::One(bucket, span)));
    (
        prop::option::of(spans().prop_map(Rule::All)),
        rule(Bucket::Hour),
        rule(Bucket::Day),
        rule(Bucket::Week),
        rule(Bucket::Month),
        prop::option::of((1..8_u32).prop_map(Rule::Latest)),
    )
        .prop_map(|(a, b, c, d, e, f)| Policy { rules: [a, b, c, d, e, f].into_iter().flatten().collect() })
}

/// Each rule's buckets that reach into its span at `now`, among `points`, with the best of each.
fn buckets(rule: Rule, now: i64, points: &[PolicyPoint]) -> BTreeMap<i64, (Consistency, Epoch)> {
    let Rule::One(bucket, span) = rule else { return BTreeMap::new() };
    let mut found = BTreeMap::new();
    for point in points {
        let number = bucket.of(point.committed);
        if bucket.end(number) > now - span.millis() {
            let rank = (point.consistency, point.epoch);
            found.entry(number).and_modify(|best| *best = rank.max(*best)).or_insert(rank);
        }
    }
    found
}

proptest! {
    #[test]
    fn what_is_printed_parses_to_the_same(policy in policies()) {
        prop_assert_eq!(policy.to_string().parse::<Policy>().expect("printed"), policy);
    }

    #[test]
    fn no_text_makes_it_panic(text in "[ a-z0-9,é]{0,60}") {
        let _ = text.parse::<Policy>();
    }

    /// A collector that runs at any times, seeing only what its earlier runs left and what came since, keeps of every bucket
    /// what one would keep that sees all points there ever were; and what expires once expires ever after.
    #[test]
    fn planning_again_on_what_was_left_never_empties_a_bucket(
        policy in policies(),
        points in histories(),
        gaps in prop::collection::vec(1..20 * DAY_MS, 1..30),
    ) {
        let (mut now, mut left, mut expired) = (FEB_28, points.clone(), BTreeSet::new());
        for gap in gaps {
            now += gap;
            let ever: Vec<PolicyPoint> = points.iter().filter(|point| point.committed.0 <= now).copied().collect();
            let seen: Vec<PolicyPoint> = left.iter().filter(|point| point.committed.0 <= now).copied().collect();
            let plan = policy.plan(UnixMillis(now), &seen);
            for gone in plan.iter().filter(|decision| !decision.keeps()) {
                expired.insert(gone.point.epoch);
            }
            left.retain(|point| !expired.contains(&point.epoch));
            for rule in &policy.rules {
                for (number, (_, best)) in buckets(*rule, now, &ever) {
                    prop_assert!(!expired.contains(&best), "{rule}: bucket {number} lost epoch {}", best.0);
                }
            }
            for decision in policy.plan(UnixMillis(now), &ever) {
                prop_assert_eq!(decision.keeps(), !expired.contains(&decision.point.epoch), "{:?}", decision);
            }
            let newest = ever.iter().max_by_key(|point| point.epoch);
            let sound = ever.iter().filter(|p| p.consistency != Consistency::Fuzzy).max_by_key(|point| point.epoch);
            for kept in newest.into_iter().chain(sound) {
                prop_assert!(!expired.contains(&kept.epoch), "epoch {} may never go by time", kept.epoch.0);
            }
        }
    }

    /// Of two policies of which one says more, the longer one keeps at least as much.
    #[test]
    fn another_rule_never_makes_a_point_go(policy in policies(), points in histories(), age in 0..900 * DAY_MS) {
        for leave_out in 0..policy.rules.len() {
            let mut fewer = policy.clone();
            fewer.rules.remove(leave_out);
            if fewer.keeps_all() {
                continue;
            }
            let more: BTreeSet<u64> = kept(&policy, FEB_28 + age, &points).into_iter().collect();
            let less: BTreeSet<u64> = kept(&fewer, FEB_28 + age, &points).into_iter().collect();
            prop_assert!(less.is_subset(&more));
        }
    }
}
