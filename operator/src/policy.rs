//! `blockferry policy get | set`: which points a volume keeps.
//!
//! Promises: `set` shows what the policy would expire now, by the same plan that a collection applies; nothing expires here. Where
//! that can't be shown (a damaged log, clocks that disagree) the policy is set all the same, and the reason is printed.
//! Never: deletes anything.

use std::io::Write;

use catalog::retention::points::{EntryTimes, policy_points};
use catalog::retention::policy::{Decision, Policy, Verdict};
use catalog::retention::policy_object::{self, PolicyObjectError};
use catalog::retention::store_time::StoreTime;
use catalog::store::Store;
use catalog::volume::header;
use catalog::volume::history::History;
use clap::{Args, Subcommand};
use common::clock::Clock;
use common::format::volume_header::VolumeHeader;

use crate::cli::StoreArgs;
use crate::error::OperatorError;
use crate::volumes::Table;

/// Digits of an id shown in the table.
const ID_DIGITS: usize = 16;

/// What to do with a policy.
#[derive(Debug, Subcommand)]
pub enum PolicyCommand {
    /// Print a volume's policy
    #[command(after_help = "Examples:\n  blockferry policy get --store file:///srv/store --volume web-1/root")]
    Get(GetArgs),
    /// Set a volume's policy and show what it would expire
    #[command(
        after_help = "Examples:\n  blockferry policy set --store file:///srv/store --volume web-1/root \"all for 24h, hourly for 7d, daily for 30d, weekly for 1y, monthly for 5y\"\n  blockferry policy set --store file:///srv/store --volume web-1/root --dry-run \"daily for 30d, latest 10\"\n  blockferry policy set --store file:///srv/store --volume web-1/root \"keep all\"\n\nOf each hour, day, week or month the newest point of the strongest consistency is kept. Times are UTC and the store's. The newest point never expires."
    )]
    Set(SetArgs),
}

impl PolicyCommand {
    /// Where the store is.
    pub(crate) fn store(&self) -> &StoreArgs {
        match self {
            Self::Get(args) => &args.store,
            Self::Set(args) => &args.store,
        }
    }

    /// Does it.
    ///
    /// # Errors
    /// [`OperatorError`]; that the effect can't be shown is one only for a dry run.
    pub async fn run(&self, store: &Store, out: &mut (dyn Write + Send)) -> Result<(), OperatorError> {
        self.run_by(store, &StoreTime::Asked(Clock::System), out).await
    }

    async fn run_by(&self, store: &Store, time: &StoreTime, out: &mut (dyn Write + Send)) -> Result<(), OperatorError> {
        match self {
            Self::Get(args) => get(store, args, out).await,
            Self::Set(args) => set(store, args, time, out).await,
        }
    }
}

/// An error of a policy's object, as this tool has it.
impl From<PolicyObjectError> for OperatorError {
    fn from(error: PolicyObjectError) -> Self {
        Self::Policy(Box::new(error))
    }
}

/// Arguments of `policy get`.
#[derive(Debug, Args)]
pub struct GetArgs {
    #[command(flatten)]
    store: StoreArgs,
    /// NAME, MACHINE/NAME or UUID
    #[arg(long, value_name = "VOLUME")]
    volume: String,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Arguments of `policy set`.
#[derive(Debug, Args)]
pub struct SetArgs {
    #[command(flatten)]
    store: StoreArgs,
    /// NAME, MACHINE/NAME or UUID
    #[arg(long, value_name = "VOLUME")]
    volume: String,
    /// "keep all", or a list of: all for T, hourly for T, daily for T, weekly for T, monthly for T, latest N; T like 36h, 7d or 1y
    #[arg(value_name = "POLICY")]
    policy: Policy,
    /// Show what it would expire; set nothing
    #[arg(long)]
    dry_run: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// What `policy get --json` prints.
#[derive(Debug, serde::Serialize)]
struct Shown {
    /// The volume's id.
    id: String,
    /// Machine's name.
    machine: String,
    /// Volume's name.
    volume: String,
    /// The policy in force.
    policy: String,
    /// False where none was ever set, which keeps all.
    set: bool,
}

/// What `policy set --json` prints.
#[derive(Debug, serde::Serialize)]
struct Planned {
    /// The volume's id.
    id: String,
    /// Machine's name.
    machine: String,
    /// Volume's name.
    volume: String,
    /// The new policy.
    policy: String,
    /// The one before; null for none.
    previous: Option<String>,
    /// False for a dry run.
    set: bool,
    /// How many points it keeps now; null where that can't be told.
    keeps: Option<usize>,
    /// What it would expire now, oldest first; null where that can't be told.
    expires: Option<Vec<ExpiredRow>>,
}

/// One point that a policy would expire.
#[derive(Debug, serde::Serialize)]
struct ExpiredRow {
    /// Its id.
    id: String,
    /// Epoch.
    epoch: u64,
    /// When the store wrote its log entry, RFC 3339 in UTC.
    committed: String,
    /// `fuzzy`, `crash`, `filesystem` or `application`.
    consistency: &'static str,
    /// Why it goes.
    reason: String,
}

/// Prints the policy of a volume.
///
/// # Errors
/// [`OperatorError`].
async fn get(store: &Store, args: &GetArgs, out: &mut (dyn Write + Send)) -> Result<(), OperatorError> {
    let header = header::find(store, &args.volume).await?.header;
    let stored = policy_object::read(store, header.volume).await?;
    let set = stored.is_some();
    let policy = stored.map(|stored| stored.policy).unwrap_or_default().to_string();
    let shown = Shown { id: header.volume.to_string(), machine: header.machine_name, volume: header.name, policy, set };
    if args.json {
        return json(&shown, out);
    }
    let note = if set { "" } else { " (none set: all points are kept)" };
    writeln!(out, "{}{note}", shown.policy).map_err(OperatorError::Output)
}

/// Sets the policy of a volume and prints what it would expire, by the store's time as `time` has it.
///
/// # Errors
/// [`OperatorError`]; that the effect can't be shown is one only for a dry run.
async fn set(
    store: &Store,
    args: &SetArgs,
    time: &StoreTime,
    out: &mut (dyn Write + Send),
) -> Result<(), OperatorError> {
    let header = header::find(store, &args.volume).await?.header;
    // A policy that can't be read is no reason not to write a good one: the error says to do just that.
    let previous = policy_object::read(store, header.volume).await.ok().flatten();
    let planned = plan(store, &header, &args.policy, time).await;
    let planned = if args.dry_run { Ok(planned?) } else { planned };
    if !args.dry_run {
        policy_object::write(store, header.volume, &args.policy).await?;
    }
    let (decisions, unknown) = match planned {
        Ok(decisions) => (Some(decisions), None),
        Err(error) => (None, Some(error)),
    };
    if let Some(error) = &unknown {
        tracing::warn!(%error, "the policy is set; what it would expire can't be shown");
    }
    let planned = Planned {
        id: header.volume.to_string(),
        machine: header.machine_name,
        volume: header.name,
        policy: args.policy.to_string(),
        previous: previous.map(|stored| stored.policy.to_string()),
        set: !args.dry_run,
        keeps: decisions.as_ref().map(|all| all.iter().filter(|decision| decision.keeps()).count()),
        expires: decisions.map(|all| all.iter().filter_map(expired).collect()),
    };
    if args.json { json(&planned, out) } else { print(&planned, out).map_err(OperatorError::Output) }
}

/// What becomes of each point that the volume offers.
async fn plan(
    store: &Store,
    header: &VolumeHeader,
    policy: &Policy,
    time: &StoreTime,
) -> Result<Vec<Decision>, OperatorError> {
    let history = History::read(store, header).await?;
    // Listed after the log was read, so that every entry read is there.
    let times = EntryTimes::list(store, header.volume).await?;
    let points = policy_points(header.volume, &history, &times)?;
    let now = time.now(store, times.newest()).await?;
    Ok(policy.plan(now, &points))
}

fn expired(decision: &Decision) -> Option<ExpiredRow> {
    let Verdict::Expire(reason) = &decision.verdict else { return None };
    Some(ExpiredRow {
        id: decision.point.id.to_string(),
        epoch: decision.point.epoch.0,
        committed: decision.point.committed.to_string(),
        consistency: decision.point.consistency.as_str(),
        reason: reason.to_string(),
    })
}

fn json(value: &impl serde::Serialize, out: &mut (dyn Write + Send)) -> Result<(), OperatorError> {
    serde_json::to_writer_pretty(&mut *out, value).map_err(|error| OperatorError::Output(error.into()))?;
    writeln!(out).map_err(OperatorError::Output)
}

fn print(planned: &Planned, out: &mut (dyn Write + Send)) -> std::io::Result<()> {
    let verb = if planned.set { "policy of" } else { "dry run: policy of" };
    writeln!(out, "{verb} {}/{}: {}", planned.machine, planned.volume, planned.policy)?;
    let (Some(keeps), Some(expires)) = (planned.keeps, &planned.expires) else {
        return writeln!(out, "what it would expire can't be told now");
    };
    writeln!(out, "points kept: {keeps}; to expire at the next collection: {}", expires.len())?;
    if expires.is_empty() {
        return Ok(());
    }
    let mut table = Table::new(&["EPOCH", "COMMITTED", "CONSISTENCY", "ID", "REASON"]);
    for row in expires {
        table.row(vec![
            row.epoch.to_string(),
            row.committed.clone(),
            row.consistency.to_owned(),
            row.id[..ID_DIGITS].to_owned(),
            row.reason.clone(),
        ]);
    }
    table.print(out)
}

#[cfg(test)]
mod tests {
    use catalog::volume::fixture::{FixtureVolume, image};
    use clap::Parser as _;
    use common::clock::UnixMillis;
    use common::format::close::Consistency;

    use super::*;
    use crate::testing::World;

    #[derive(Debug, clap::Parser)]
    struct Line {
        #[command(subcommand)]
        command: PolicyCommand,
    }

    async fn run(store: &Store, time: &StoreTime, words: &[&str]) -> Result<String, OperatorError> {
        let mut line = vec!["policy", words[0], "--store", "file:///nowhere"];
        line.extend(&words[1..]);
        let mut out = Vec::new();
        Line::try_parse_from(line).expect("a command").command.run_by(store, time, &mut out).await?;
        Ok(String::from_utf8(out).expect("text"))
    }

    #[tokio::test]
    async fn a_policy_is_shown_before_it_is_set_and_set_with_what_it_would_expire() {
        let world = World::new().await;
        let mut volume = FixtureVolume::create(&world.store, "web-1", "root", 1 << 20).await;
        for seed in 0..3 {
            volume.capture(&image(1 << 20, seed), Some(Consistency::Crash)).await;
        }
        let asked = StoreTime::Asked(Clock::System);
        let run = async |words: &[&str]| run(&world.store, &asked, words).await.expect("done");
        assert_eq!(run(&["get", "--volume", "root"]).await, "keep all (none set: all points are kept)\n");

        let shown = run(&["set", "--volume", "root", "--dry-run", "latest 1"]).await;
        assert!(shown.starts_with("dry run: policy of web-1/root: latest 1\npoints kept: 1; to expire"), "{shown}");
        assert!(shown.contains("to expire at the next collection: 2\nEPOCH"), "{shown}");
        assert!(shown.contains("older than every rule reaches"), "{shown}");
        assert_eq!(
            run(&["get", "--volume", "root"]).await,
            "keep all (none set: all points are kept)\n",
            "a dry run sets nothing"
        );

        let set = run(&["set", "--volume", "root", "keep 2 latest", "--json"]).await;
        let set: serde_json::Value = serde_json::from_str(&set).expect("JSON");
        assert_eq!((&set["policy"], &set["previous"], &set["set"]), (&"latest 2".into(), &().into(), &true.into()));
        assert_eq!((&set["keeps"], &set["expires"][0]["epoch"]), (&2.into(), &1.into()));
        assert_eq!(run(&["get", "--volume", "web-1/root"]).await, "latest 2\n");
        let history = History::read(&world.store, &volume.header).await.expect("a history");
        assert_eq!(history.points().len(), 3, "nothing expires here");
    }

    #[tokio::test]
    async fn what_cannot_be_shown_is_an_error_of_a_dry_run_and_a_notice_of_setting() {
        let world = World::new().await;
        let mut volume = FixtureVolume::create(&world.store, "web-1", "root", 1 << 20).await;
        volume.capture(&image(1 << 20, 1), Some(Consistency::Crash)).await;
        let wrong = StoreTime::Asked(Clock::manual(UnixMillis(0)));
        let error = run(&world.store, &wrong, &["set", "--volume", "root", "--dry-run", "latest 2"]).await;
        assert!(error.expect_err("clocks disagree").to_string().starts_with("clocks disagree"));
        let set = run(&world.store, &wrong, &["set", "--volume", "root", "latest 2"]).await.expect("set");
        assert!(set.contains("can't be told now"), "{set}");
        assert_eq!(run(&world.store, &wrong, &["get", "--volume", "root"]).await.expect("got"), "latest 2\n");
    }

    #[test]
    fn a_text_that_is_no_policy_is_refused_with_what_was_expected() {
        let line = ["policy", "set", "--store", "file:///nowhere", "--volume", "root", "yearly for 5y"];
        let error = Line::try_parse_from(line).expect_err("no such rule").to_string();
        assert!(error.contains("\"yearly\"") && error.contains("hourly for 7d"), "{error}");
    }
}
