//! Rules over the sources that neither compiler nor clippy keep: where the line between pure and impure runs, who may import
//! whom, how long a file may get, and that the list of metrics is true.
//!
//! A file is pure if [`PURE`] lists it or a folder above it, or if the first line of its module documentation says so. The
//! check is textual, over names in code without comments and strings; tests of pure modules may do as they like.

use std::path::{Path, PathBuf};

/// Pure files and folders. In `common` a build without the feature `rim` holds the same line.
const PURE: [&str; 17] = [
    "common/src/error.rs",
    "common/src/format",
    "common/src/ids.rs",
    "common/src/limits.rs",
    "common/src/nbd",
    "common/src/seal",
    "common/src/session",
    "common/src/units.rs",
    "catalog/src/retention/policy.rs",
    "catalog/src/store/path.rs",
    "catalog/src/volume/paths.rs",
    "catalog/src/volume/checkpoint/merge.rs",
    "operator/src/restore/plan.rs",
    "receiver/src/forward/bundle.rs",
    "receiver/src/forward/order.rs",
    "receiver/src/verify.rs",
    "sender/src/epoch",
];

/// What pure code does not name: the runtime, the wire, files, sockets, processes, clocks, chance.
const IMPURE: [&str; 24] = [
    "tokio",
    "quinn",
    "tonic",
    "rustls",
    "rustix",
    "axum",
    "rocksdb",
    "object_store",
    "getrandom",
    "std::fs",
    "std::net::TcpListener",
    "std::net::TcpStream",
    "std::net::ToSocketAddrs",
    "std::net::UdpSocket",
    "std::os",
    "std::env",
    "std::process",
    "std::thread",
    "std::time::Instant",
    "std::time::SystemTime",
    "SystemTime::now",
    "Instant::now",
    "rng::random",
    "Clock::System",
];

/// A stage and the siblings it may import.
type Stage = (&'static str, &'static [&'static str]);

const SENDER_STAGES: [Stage; 5] =
    [("capture", &[]), ("epoch", &[]), ("state", &[]), ("send", &[]), ("seal_pool", &["capture", "epoch", "state"])];
const RECEIVER_STAGES: [Stage; 4] =
    [("accept", &["volumes"]), ("stage", &[]), ("verify", &[]), ("forward", &["stage", "volumes"])];

/// Most lines of code in a file, comments and blank lines not counted. A file that is longer wants a seam.
const CODE_LINES_MAX: usize = 600;
/// The same for files of tests.
const TEST_LINES_MAX: usize = 800;

fn root() -> PathBuf {
    Path::new(&std::env::var("CARGO_MANIFEST_DIR").expect("cargo says where the crate lies"))
        .parent()
        .expect("the crate lies in the workspace")
        .to_owned()
}

/// All Rust files below `folder` (or the file itself), with their paths from the workspace's root.
fn sources(folder: &str) -> Vec<(String, String)> {
    fn visit(root: &Path, path: &Path, found: &mut Vec<(String, String)>) {
        if path.is_dir() {
            let mut entries: Vec<_> =
                std::fs::read_dir(path).expect("readable").map(|e| e.expect("an entry").path()).collect();
            entries.sort();
            entries.iter().filter(|path| !path.ends_with("target")).for_each(|path| visit(root, path, found));
        } else if path.extension().is_some_and(|end| end == "rs") {
            let name = path.strip_prefix(root).expect("below the root").to_string_lossy().into_owned();
            found.push((name, std::fs::read_to_string(path).expect("UTF-8")));
        }
    }
    let mut found = Vec::new();
    visit(&root(), &root().join(folder), &mut found);
    assert!(!found.is_empty(), "there is no source at {folder}: correct the lists in tidy.rs");
    found
}

fn all_sources() -> Vec<(String, String)> {
    ["common", "catalog", "sender", "receiver", "operator", "tests", "benches"].into_iter().flat_map(sources).collect()
}

fn is_test(path: &str) -> bool {
    path.starts_with("tests/")
        || path.contains("/tests/")
        || path.ends_with("/tests.rs")
        || path.ends_with("/testing.rs")
}

/// The code without comments and without what strings and characters hold.
fn code(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let chars: Vec<char> = text.chars().collect();
    let mut at = 0;
    while at < chars.len() {
        let rest = &chars[at..];
        match rest {
            ['/', '/', ..] => at += rest.iter().position(|c| *c == '\n').unwrap_or(rest.len()),
            ['/', '*', ..] => {
                at += rest.windows(2).skip(2).position(|c| c == ['*', '/']).map_or(rest.len(), |end| end + 4)
            }
            ['r', '#', '"', ..] => {
                at += rest.windows(2).skip(3).position(|c| c == ['"', '#']).map_or(rest.len(), |end| end + 5);
                out.push_str("\"\"");
            }
            ['"', ..] => {
                at += 1;
                while at < chars.len() && chars[at] != '"' {
                    at += if chars[at] == '\\' { 2 } else { 1 };
                }
                at += 1;
                out.push_str("\"\"");
            }
            ['\'', '\\', ..] => at += rest.iter().skip(3).position(|c| *c == '\'').map_or(rest.len(), |end| end + 4),
            ['\'', _, '\'', ..] => at += 3,
            [c, ..] => {
                out.push(*c);
                at += 1;
            }
            [] => break,
        }
    }
    out
}

/// The code above the module's tests.
fn without_tests(code: &str) -> &str {
    code.split("#[cfg(test)]").next().unwrap_or(code)
}

/// Every path that `use` items name, with braces multiplied out and renames left out.
fn used_paths(code: &str) -> Vec<String> {
    fn expand(prefix: &str, tree: &str, paths: &mut Vec<String>) {
        let tree = tree.trim();
        let Some(open) = tree.find('{') else {
            let name = tree.split(" as ").next().unwrap_or(tree).trim();
            if !name.is_empty() {
                paths.push(format!("{prefix}{name}"));
            }
            return;
        };
        let prefix = format!("{prefix}{}", tree[..open].trim());
        let inner = tree[open + 1..].strip_suffix('}').unwrap_or(&tree[open + 1..]);
        let (mut depth, mut start) = (0_i32, 0);
        for (at, c) in inner.char_indices() {
            match c {
                '{' => depth += 1,
                '}' => depth -= 1,
                ',' if depth == 0 => {
                    expand(&prefix, &inner[start..at], paths);
                    start = at + 1;
                }
                _ => {}
            }
        }
        expand(&prefix, &inner[start..], paths);
    }
    let mut paths = Vec::new();
    for item in code.split(';') {
        let start = item
            .rfind("use ")
            .filter(|at| *at == 0 || !item[..*at].ends_with(|c: char| c.is_alphanumeric() || c == '_'));
        if let Some(start) = start {
            expand("", &item[start + 4..].replace('\n', " "), &mut paths);
        }
    }
    paths
}

/// True where `text` holds `name` as a whole path from its root: `tokio` is in `tokio::spawn`, not in `my_tokio` or
/// `common::tokio`, unless the name itself has parts (`Instant::now` is in `time::Instant::now`).
fn names(text: &str, name: &str) -> bool {
    let word = |c: char| c.is_alphanumeric() || c == '_';
    let parts = name.contains("::");
    text.match_indices(name).any(|(at, _)| {
        let (before, after) = (&text[..at], &text[at + name.len()..]);
        let rooted = !before.ends_with(word) && (parts || !before.ends_with("::") && !before.ends_with('.'));
        // A crate's name matters where a path starts with it; a field or a variable may be called the same.
        rooted && !after.starts_with(word) && (parts || after.starts_with("::"))
    })
}

fn impurities(source: &str) -> Vec<&'static str> {
    let code = code(source);
    let code = without_tests(&code);
    let used = used_paths(code);
    IMPURE
        .into_iter()
        .filter(|name| {
            names(code, name) || used.iter().any(|path| path == name || path.starts_with(&format!("{name}::")))
        })
        .collect()
}

fn claims_to_be_pure(source: &str) -> bool {
    let first = source.lines().next().unwrap_or_default();
    first.starts_with("//!") && (first.contains("PURE") || first.contains(" Pure."))
}

/// Roots of what a file imports or names from its own crate: `crate::stage::Stage` gives `stage`.
fn own_modules(code: &str) -> Vec<String> {
    let written = code.match_indices("crate::").map(|(at, found)| code[at + found.len()..].to_owned());
    let used = used_paths(code).into_iter().filter_map(|path| path.strip_prefix("crate::").map(str::to_owned));
    let head =
        |path: String| path.split(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap_or_default().to_owned();
    let mut modules: Vec<String> = written.chain(used).map(head).filter(|name| !name.is_empty()).collect();
    modules.sort();
    modules.dedup();
    modules
}

fn stage_violations(stages: &[Stage], stage: &str, allowed: &[&str], source: &str) -> Vec<String> {
    let code = code(source);
    own_modules(without_tests(&code))
        .into_iter()
        .filter(|module| {
            module != stage && !allowed.contains(&module.as_str()) && stages.iter().any(|(name, _)| name == module)
        })
        .collect()
}

#[test]
fn pure_modules_name_nothing_impure() {
    let marked = all_sources().into_iter().filter(|(_, source)| claims_to_be_pure(source));
    let mut found = Vec::new();
    for (path, source) in PURE.into_iter().flat_map(sources).chain(marked).filter(|(path, _)| !is_test(path)) {
        found.extend(impurities(&source).into_iter().map(|name| format!("{path} names {name}")));
    }
    found.dedup();
    assert!(found.is_empty(), "pure modules take time, chance and bytes as values:\n{}", found.join("\n"));
}

#[test]
fn sender_and_receiver_never_import_each_other_and_the_tool_neither() {
    let mut found = Vec::new();
    for (krate, others) in [
        ("sender", &["receiver", "operator"][..]),
        ("receiver", &["sender", "operator"]),
        ("operator", &["sender", "receiver"]),
        ("catalog", &["sender", "receiver", "operator"]),
        ("common", &["sender", "receiver", "operator", "catalog"]),
    ] {
        let manifest = std::fs::read_to_string(root().join(krate).join("Cargo.toml")).expect("a manifest");
        let manifest = toml_dependencies(&manifest);
        found.extend(
            others.iter().filter(|other| manifest.contains(other)).map(|other| format!("{krate}/Cargo.toml: {other}")),
        );
    }
    assert!(found.is_empty(), "crates that must not know each other:\n{}", found.join("\n"));
}

/// Names before the equals sign of a manifest's lines.
fn toml_dependencies(manifest: &str) -> Vec<&str> {
    manifest.lines().filter_map(|line| line.split(['=', '.']).next()).map(str::trim).collect()
}

#[test]
fn stages_do_not_reach_round_their_neighbours() {
    let mut found = Vec::new();
    for (krate, stages) in [("sender", &SENDER_STAGES[..]), ("receiver", &RECEIVER_STAGES[..])] {
        for (stage, allowed) in stages {
            let folder = format!("{krate}/src/{stage}");
            let file = format!("{folder}.rs");
            let places = [folder, file].into_iter().filter(|place| root().join(place).exists());
            for (path, source) in places.flat_map(|place| sources(&place)).filter(|(path, _)| !is_test(path)) {
                let violations = stage_violations(stages, stage, allowed, &source);
                found.extend(violations.into_iter().map(|module| format!("{path} imports {module}")));
            }
        }
    }
    assert!(found.is_empty(), "stages hand on owned values instead of importing each other:\n{}", found.join("\n"));
}

#[test]
fn files_stay_short_enough_to_know() {
    let mut found = Vec::new();
    for (path, source) in all_sources() {
        let lines = code(&source).lines().filter(|line| !line.trim().is_empty()).count();
        let most = if is_test(&path) { TEST_LINES_MAX } else { CODE_LINES_MAX };
        if lines > most {
            found.push(format!("{path}: {lines} lines of code, at most {most}"));
        }
    }
    assert!(found.is_empty(), "files that want a seam:\n{}", found.join("\n"));
}

/// What is left to do in a source: a test that is ignored, with a reason or without, is never run by anybody.
fn unfinished(source: &str) -> Vec<&'static str> {
    let code = code(source);
    ["todo!(", "unimplemented!(", "#[ignore"].into_iter().filter(|what| code.contains(what)).collect()
}

#[test]
fn no_test_is_ignored_and_nothing_is_left_to_do() {
    let mut found = Vec::new();
    for (path, source) in all_sources() {
        found.extend(unfinished(&source).into_iter().map(|what| format!("{path}: {what}")));
    }
    assert!(found.is_empty(), "{}", found.join("\n"));
}

/// Words that start with `blockferry_` and look like a metric of a process or stage.
fn metric_names(text: &str) -> Vec<String> {
    let word = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
    let mut names: Vec<String> = text
        .match_indices("blockferry_")
        .map(|(at, _)| text[at..].chars().take_while(|c| word(*c)).collect::<String>())
        .filter(|name| {
            ["sender", "receiver", "store", "process"]
                .iter()
                .any(|stage| name.starts_with(&format!("blockferry_{stage}_")))
        })
        .collect();
    names.sort();
    names.dedup();
    names
}

#[test]
fn each_metric_is_emitted_and_documented_and_alerts_ask_for_no_other() {
    let read = |path: &str| std::fs::read_to_string(root().join(path)).expect("it is part of the repository");
    let documented = metric_names(&read("docs/metrics.md"));
    let crates = ["common", "catalog", "sender", "receiver", "operator"]
        .into_iter()
        .flat_map(|krate| sources(&format!("{krate}/src")));
    let emitted: String = crates
        .filter(|(path, _)| !is_test(path))
        .flat_map(|(_, source)| {
            source.split('"').skip(1).step_by(2).map(|text| format!("{text}\n")).collect::<Vec<_>>()
        })
        .collect();
    let emitted = metric_names(&emitted);
    assert!(emitted.len() > 20, "found only {emitted:?}");
    let missing: Vec<_> = emitted.iter().filter(|name| !documented.contains(name)).collect();
    assert!(missing.is_empty(), "not in docs/metrics.md: {missing:?}");
    let stale: Vec<_> = documented.iter().filter(|name| !emitted.contains(name)).collect();
    assert!(stale.is_empty(), "in docs/metrics.md and nowhere emitted: {stale:?}");
    let asked = metric_names(&read("deploy/prometheus/blockferry-rules.yml"));
    let unknown: Vec<_> = asked.iter().filter(|name| !documented.contains(name)).collect();
    assert!(unknown.is_empty(), "alert rules ask for metrics that nobody emits: {unknown:?}");
}

// The checks themselves.

#[test]
fn the_purity_check_sees_through_use_trees_and_full_paths() {
    assert_eq!(impurities("use std::{collections::BTreeMap, fs::{self, File}};"), ["std::fs"]);
    assert_eq!(impurities("pub(crate) use tokio::sync::mpsc;"), ["tokio"]);
    assert_eq!(impurities("fn f() { let t = std::time::Instant::now(); }"), ["std::time::Instant", "Instant::now"]);
    assert_eq!(impurities("use std::time as t; fn f() -> t::Duration { let s = quinn::VarInt::MAX; }"), ["quinn"]);
    assert_eq!(impurities("use getrandom;"), ["getrandom"]);
    assert_eq!(impurities("fn f() { common::rng::random::<16>() }"), ["rng::random"]);
}

#[test]
fn the_purity_check_lets_comments_strings_tests_and_other_names_pass() {
    assert!(
        impurities("// tokio::spawn\n/* std::fs */ const A: &str = \"std::fs::read\"; const Q: char = '\"';")
            .is_empty()
    );
    assert!(
        impurities("use std::time::Duration; use std::io; use std::net::IpAddr; struct S { tokio: u8 } fn f(s: &S) { s.tokio; }").is_empty()
    );
    assert!(impurities("fn pure() {}\n#[cfg(test)]\nmod tests { use std::fs; }").is_empty());
    assert!(impurities("const R: &str = r#\"tokio::\"#; use crate::my_tokio::x;").is_empty());
}

#[test]
fn the_check_for_unfinished_work_takes_no_reason_and_reads_no_comments() {
    assert_eq!(unfinished("#[ignore = \"slow\"]\nfn f() { todo!() }"), ["todo!(", "#[ignore"]);
    assert_eq!(unfinished("#[ignore]\nfn f() { unimplemented!(\"later\") }"), ["unimplemented!(", "#[ignore"]);
    assert!(unfinished("// todo!()\nconst A: &str = \"#[ignore]\";").is_empty());
}

#[test]
fn the_stage_check_finds_a_reach_to_a_sibling() {
    let bad = "use crate::{cli, stage::{Stage}};\nfn f() { crate::forward::go() }";
    assert_eq!(stage_violations(&RECEIVER_STAGES, "accept", &["volumes"], bad), ["forward", "stage"]);
    assert!(
        stage_violations(&RECEIVER_STAGES, "accept", &["volumes"], "use crate::volumes::V; use crate::accept::A;")
            .is_empty()
    );
}
