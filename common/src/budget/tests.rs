use super::*;
use proptest::prelude::*;
use std::time::Duration;

fn budget(bytes: u64) -> Budget {
    Budget::new(MemoryTable::new(bytes)).expect("not empty")
}

fn tree(files: &[(&str, &str)]) -> tempfile::TempDir {
    let root = tempfile::tempdir().expect("a folder");
    for (path, text) in files {
        let path = root.path().join(path);
        std::fs::create_dir_all(path.parent().expect("a parent")).expect("folders");
        std::fs::write(path, text).expect("a file");
    }
    root
}

fn effective(files: &[(&str, &str)]) -> EffectiveMemory {
    let root = tree(files);
    let mut memory = effective_memory_under(root.path()).expect("readable");
    memory.limited_by =
        memory.limited_by.map(|path| path.strip_prefix(root.path()).expect("below the root").to_owned());
    memory
}

const GIB4: (&str, &str) = ("proc/meminfo", "MemTotal:        4194304 kB\nMemFree:          100000 kB\n");

#[test]
fn without_cgroups_the_host_is_what_there_is() {
    let memory = effective(&[GIB4]);
    assert_eq!(memory, EffectiveMemory { bytes: ByteCount(4 << 30), host: ByteCount(4 << 30), limited_by: None });
}

#[test]
fn the_tightest_ancestor_of_cgroup_v2_limits() {
    let memory = effective(&[
        GIB4,
        ("proc/self/cgroup", "0::/system.slice/blockferry.service\n"),
        ("sys/fs/cgroup/system.slice/memory.max", "536870912\n"),
        ("sys/fs/cgroup/system.slice/blockferry.service/memory.max", "max\n"),
    ]);
    assert_eq!(memory.bytes, ByteCount::mib(512));
    assert_eq!(memory.limited_by.as_deref(), Some(Path::new("sys/fs/cgroup/system.slice/memory.max")));
}

#[test]
fn cgroup_v1_limits_and_its_unlimited_number_does_not() {
    let files = |limit| {
        [
            GIB4,
            ("proc/self/cgroup", "5:cpu,cpuacct:/a\n4:memory:/a/b\n0::/\n"),
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n"),
            ("sys/fs/cgroup/memory/a/b/memory.limit_in_bytes", limit),
        ]
    };
    assert_eq!(effective(&files("1073741824\n")).bytes, ByteCount(1 << 30));
    assert_eq!(effective(&files("9223372036854771712\n")).bytes, ByteCount(4 << 30));
}

#[test]
fn in_a_container_the_mounted_part_of_the_tree_counts() {
    // The path is the host's, the mount shows only the container's own group.
    let memory = effective(&[
        GIB4,
        ("proc/self/cgroup", "4:memory:/docker/abc\n"),
        (
            "proc/self/mountinfo",
            "36 30 0:31 /docker/abc /sys/fs/cgroup/memory ro,nosuid - cgroup cgroup rw,memory\n\
             37 30 0:32 / /sys/fs/cgroup/cpu ro,nosuid - cgroup cgroup rw,cpu\n",
        ),
        ("sys/fs/cgroup/memory/memory.limit_in_bytes", "268435456\n"),
    ]);
    assert_eq!(memory.bytes, ByteCount::mib(256));
}

#[test]
fn a_group_outside_the_namespace_and_missing_files_are_no_error() {
    let memory = effective(&[GIB4, ("proc/self/cgroup", "0::/../../other\nrubbish\n4:memory:/gone\n")]);
    assert_eq!(memory.bytes, ByteCount(4 << 30));
}

#[test]
fn this_machine_has_memory() {
    let memory = effective_memory().expect("Linux");
    assert!(memory.bytes.0 > 0 && memory.bytes <= memory.host);
}

#[test]
fn meminfo_without_a_total_is_an_error_that_names_the_file() {
    let root = tree(&[("proc/meminfo", "MemFree: 1 kB\n")]);
    let error = effective_memory_under(root.path()).expect_err("no total").to_string();
    assert!(error.contains("proc/meminfo"), "{error}");
}

#[test]
fn a_budget_below_the_minimum_is_refused_with_minimum_and_flag() {
    let memory = |mib| EffectiveMemory { bytes: ByteCount::mib(mib), host: ByteCount::mib(mib), limited_by: None };
    assert_eq!(resolve(BudgetSpec::Percent(8), &memory(1000)).expect("80 MiB"), ByteCount::mib(80));
    assert_eq!(resolve("64MiB".parse().expect("a size"), &memory(100)).expect("the minimum"), ByteCount::mib(64));
    for (spec, mib) in [(BudgetSpec::Percent(8), 512), (BudgetSpec::Bytes(ByteCount::mib(63)), 4096)] {
        let error = resolve(spec, &memory(mib)).expect_err("too small").to_string();
        assert!(error.contains("64 MiB") && error.contains("--memory-budget 64MiB"), "{error}");
    }
    let error =
        resolve(BudgetSpec::Bytes(ByteCount::mib(200)), &memory(100)).expect_err("more than there is").to_string();
    assert!(error.contains("100 MiB") && error.contains("--memory-budget"), "{error}");
}

#[test]
fn fixed_parts_leave_the_rest_for_payload() {
    let table = MemoryTable::new(100 << 20).with("quic windows", 30 << 20).with("stage", 20 << 20);
    let text = table.to_string();
    assert!(text.contains("quic windows") && text.contains("50 MiB") && text.contains("100 MiB"), "{text}");
    let budget = Budget::new(table).expect("something is left");
    assert_eq!((budget.total(), budget.payload()), (100 << 20, 50 << 20));
    assert!(matches!(Budget::new(MemoryTable::new(10).with("all", 11)), Err(BudgetError::NoPayload { .. })));
}

#[tokio::test]
async fn a_request_over_the_total_is_an_error_and_not_a_hang() {
    let budget = budget(100);
    assert!(matches!(budget.acquire(101).await, Err(BudgetError::LargerThanTotal { .. })));
    assert!(matches!(budget.acquire_blocking(101), Err(BudgetError::LargerThanTotal { .. })));
    assert!(budget.try_acquire(101).is_none());
    assert_eq!(budget.used(), 0);
}

#[tokio::test]
async fn requests_are_served_in_their_order_and_a_small_one_does_not_overtake() {
    let budget = budget(100);
    let held = budget.acquire(60).await.expect("free");
    let mut large = Box::pin(budget.acquire(80));
    assert!(futures::poll!(&mut large).is_pending());
    let mut small = Box::pin(budget.acquire(10));
    assert!(futures::poll!(&mut small).is_pending(), "it would fit, but the large one is first");
    assert!(budget.try_acquire(1).is_none());
    assert_eq!(budget.pressure_permille(), 1000);
    drop(held);
    let large = large.await.expect("served first");
    let small = small.await.expect("fits beside it");
    assert_eq!((large.bytes(), small.bytes(), budget.used()), (80, 10, 90));
}

#[tokio::test]
async fn a_cancelled_request_lets_those_behind_it_through() {
    let budget = budget(100);
    let held = budget.acquire(60).await.expect("free");
    let mut large = Box::pin(budget.acquire(80));
    assert!(futures::poll!(&mut large).is_pending());
    let mut small = Box::pin(budget.acquire(10));
    assert!(futures::poll!(&mut small).is_pending());
    drop(large);
    assert_eq!(small.await.expect("moved up").bytes(), 10);
    drop(held);
    assert_eq!(budget.used(), 0);
}

#[tokio::test]
async fn a_request_cancelled_after_it_was_served_gives_its_bytes_back() {
    let budget = budget(100);
    let held = budget.acquire(100).await.expect("free");
    let mut waiting = Box::pin(budget.acquire(50));
    assert!(futures::poll!(&mut waiting).is_pending());
    drop(held);
    assert_eq!(budget.used(), 50, "served, not yet collected");
    drop(waiting);
    assert_eq!(budget.used(), 0);
}

#[test]
fn a_thread_waits_until_another_gives_back() {
    let budget = budget(100);
    let held = budget.acquire_blocking(100).expect("free");
    let waiter = std::thread::spawn({
        let budget = budget.clone();
        move || budget.acquire_blocking(40).expect("in the end").bytes()
    });
    let deadline = std::time::Instant::now() + Duration::from_secs(30);
    while budget.pressure_permille() < 1000 || budget.shared.lock().waiters.is_empty() {
        assert!(std::time::Instant::now() < deadline, "the thread never came to wait");
        std::thread::yield_now();
    }
    drop(held);
    assert_eq!(waiter.join().expect("no panic"), 40);
    assert_eq!(budget.used(), 0);
}

#[tokio::test]
async fn pressure_is_signalled_from_three_quarters_on() {
    let budget = budget(1000);
    let mut pressed = budget.pressed();
    let low = budget.acquire(749).await.expect("free");
    assert!(!*pressed.borrow_and_update());
    assert_eq!(budget.pressure_permille(), 0);
    let high = budget.acquire(126).await.expect("free");
    assert!(pressed.has_changed().expect("open") && *pressed.borrow_and_update());
    assert_eq!(budget.pressure_permille(), 500);
    drop(high);
    assert!(!*pressed.borrow_and_update());
    drop(low);
}

#[tokio::test]
async fn permits_of_two_budgets_do_not_mix() {
    let (one, other) = (budget(10), budget(10));
    let mut permit = one.acquire(4).await.expect("free");
    let stranger = other.acquire(5).await.expect("free");
    let stranger = permit.merge(stranger).expect_err("of another budget");
    assert_eq!((permit.bytes(), stranger.bytes(), one.used(), other.used()), (4, 5, 4, 5));
}

#[derive(Debug, Clone)]
enum Step {
    Ask(u64),
    Try(u64),
    Drop(usize),
    Cancel(usize),
    Split(usize, u64),
    Merge(usize, usize),
    Shrink(usize, u64),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (0_u64..=120).prop_map(Step::Ask),
        (0_u64..=120).prop_map(Step::Try),
        any::<usize>().prop_map(Step::Drop),
        any::<usize>().prop_map(Step::Cancel),
        (any::<usize>(), 0_u64..=120).prop_map(|(i, n)| Step::Split(i, n)),
        (any::<usize>(), any::<usize>()).prop_map(|(i, j)| Step::Merge(i, j)),
        (any::<usize>(), 0_u64..=120).prop_map(|(i, n)| Step::Shrink(i, n)),
    ]
}

proptest! {
    #[test]
    fn permits_never_exceed_the_total_and_all_is_returned(steps in proptest::collection::vec(step(), 0..200)) {
        const TOTAL: u64 = 100;
        let budget = budget(TOTAL);
        let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
        runtime.block_on(async {
            let mut held: Vec<Permit> = Vec::new();
            let mut waiting = Vec::new();
            for step in steps {
                match step {
                    Step::Ask(bytes) => {
                        let budget = budget.clone();
                        waiting.push(Box::pin(async move { budget.acquire(bytes).await }));
                    }
                    Step::Try(bytes) => held.extend(budget.try_acquire(bytes)),
                    Step::Drop(i) if !held.is_empty() => drop(held.swap_remove(i % held.len())),
                    Step::Cancel(i) if !waiting.is_empty() => drop(waiting.swap_remove(i % waiting.len())),
                    Step::Split(i, bytes) if !held.is_empty() => {
                        let at = i % held.len();
                        let part = held[at].split(bytes);
                        held.push(part);
                    }
                    Step::Merge(i, j) if held.len() > 1 => {
                        let other = held.swap_remove(i % held.len());
                        let at = j % held.len();
                        held[at].merge(other).expect("the same budget");
                    }
                    Step::Shrink(i, bytes) if !held.is_empty() => {
                        let at = i % held.len();
                        held[at].shrink(bytes);
                    }
                    _ => {}
                }
                let mut still = Vec::new();
                for mut request in waiting {
                    match futures::poll!(&mut request) {
                        std::task::Poll::Ready(Ok(permit)) => held.push(permit),
                        std::task::Poll::Ready(Err(error)) => assert!(matches!(error, BudgetError::LargerThanTotal { .. })),
                        std::task::Poll::Pending => still.push(request),
                    }
                }
                waiting = still;
                let sum: u64 = held.iter().map(Permit::bytes).sum();
                // A request served by a later poll in the same round is in `used` and not yet in `held`.
                prop_assert!(sum <= budget.used() && budget.used() <= TOTAL && budget.peak() <= TOTAL);
            }
            // Whoever waits is served once everybody gives back.
            held.clear();
            // All are awaited at once: a permit may already lie with one that nobody polls, while those behind it wait.
            let served = waiting.into_iter().map(async |request| drop(request.await.expect("not larger than the total")));
            futures::future::join_all(served).await;
            prop_assert_eq!(budget.used(), 0);
            Ok(())
        })?;
    }
}
