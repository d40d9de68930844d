//! Every way in which a command ends badly, and its exit code.

use catalog::retention::CollectError;
use catalog::retention::policy_object::PolicyObjectError;
use catalog::retention::store_time::StoreTimeError;
use catalog::store::StoreError;
use catalog::volume::LogError;
use catalog::volume::header::HeaderError;
use common::budget::BudgetError;
use common::error::{Dispose, Disposition};
use common::net::operator::OperatorCallError;
use common::ops::exit::ExitCode;
use common::ops::logging::LoggingError;

use crate::drill::DrillError;
use crate::epochs::EpochError;
use crate::keys::KeyError;
use crate::lifecycle::ChangeError;
use crate::restore::RestoreError;
use crate::restore::fetch::FetchError;
use crate::restore::target::TargetError;
use crate::select::SelectError;
use crate::serve::ServeError;
use crate::verify::VerifyError;

/// Why a command failed. The text is the last line on standard error: it names the thing and the next step.
#[derive(Debug, thiserror::Error)]
pub enum OperatorError {
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The fleet's objects.
    #[error(transparent)]
    Fleet(#[from] catalog::fleet::FleetError),
    /// A header or name.
    #[error(transparent)]
    Header(#[from] HeaderError),
    /// The log.
    #[error(transparent)]
    Log(#[from] LogError),
    /// An epoch's metadata.
    #[error(transparent)]
    Epoch(#[from] EpochError),
    /// No such point.
    #[error(transparent)]
    Select(#[from] SelectError),
    /// The key file.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// Restoring.
    #[error(transparent)]
    Restore(#[from] RestoreError),
    /// Verifying found something.
    #[error(transparent)]
    Verify(#[from] VerifyError),
    /// A volume's lifecycle.
    #[error(transparent)]
    Change(#[from] ChangeError),
    /// A volume's policy.
    #[error(transparent)]
    Policy(Box<PolicyObjectError>),
    /// The store's time.
    #[error(transparent)]
    StoreTime(#[from] StoreTimeError),
    /// A drill failed, or is worth less than asked for.
    #[error(transparent)]
    Drill(#[from] DrillError),
    /// Serving.
    #[error(transparent)]
    Serve(#[from] ServeError),
    /// Collecting.
    #[error(transparent)]
    Collect(#[from] CollectError),
    /// Asking a receiver.
    #[error(transparent)]
    Call(Box<OperatorCallError>),
    /// The memory budget.
    #[error(transparent)]
    Budget(#[from] BudgetError),
    /// Logs.
    #[error(transparent)]
    Logging(#[from] LoggingError),
    /// A file named on the command line.
    #[error("{path}: {source}: check the path and its permissions")]
    File {
        /// Which.
        path: String,
        /// Why.
        source: std::io::Error,
    },
    /// Standard output is gone.
    #[error("cannot write to standard output: {0}")]
    Output(std::io::Error),
    /// No async runtime.
    #[error("cannot start threads: {0}: raise the limit of tasks")]
    Runtime(std::io::Error),
}

impl OperatorError {
    /// Paths of the objects that the store lacks, or has in another state than they were written in; none where that is not what is
    /// wrong.
    #[must_use]
    pub fn bad_objects(&self) -> Vec<String> {
        let one = |path: Option<&str>| path.map(str::to_owned).into_iter().collect();
        match self {
            Self::Log(error) => one(error.bad_object()),
            Self::Epoch(EpochError::Segment(error)) => one(error.bad_object()),
            Self::Epoch(EpochError::NotProven { suspects, .. }) => suspects.split(", ").map(str::to_owned).collect(),
            Self::Restore(RestoreError::Fetch(FetchError::Store(
                StoreError::NotFound { path } | StoreError::Truncated { path, .. },
            ))) => vec![path.clone()],
            Self::Restore(RestoreError::Fetch(FetchError::Open(error))) => one(error.bad_object()),
            _ => Vec::new(),
        }
    }

    /// The exit code that scripts see.
    #[must_use]
    pub fn exit(&self) -> ExitCode {
        match self {
            Self::Header(HeaderError::Ambiguous { .. }) | Self::Logging(_) => ExitCode::Usage,
            Self::Store(StoreError::Url { .. }) => ExitCode::Usage,
            Self::Budget(BudgetError::BelowMinimum { .. } | BudgetError::AboveEffective { .. }) => ExitCode::Usage,
            Self::Select(SelectError::BadText { .. })
            | Self::Restore(RestoreError::Target(TargetError::NotAFile { .. })) => ExitCode::Usage,
            Self::Serve(error) => error.exit(),
            Self::Change(error) if crate::lifecycle::is_usage(error) => ExitCode::Usage,
            Self::Drill(error) => error.exit(),
            _ => ExitCode::Failed,
        }
    }
}

impl Dispose for OperatorError {
    fn disposition(&self) -> Disposition {
        match self {
            Self::Store(error) => error.disposition(),
            Self::Fleet(error) => error.disposition(),
            Self::Header(error) => error.disposition(),
            Self::Log(error) => error.disposition(),
            Self::Epoch(error) => error.disposition(),
            Self::Verify(_) => Disposition::Corrupt,
            Self::Restore(error) => error.disposition(),
            Self::Drill(error) => error.disposition(),
            Self::Serve(error) => error.disposition(),
            Self::Change(ChangeError::Lifecycle(error)) => error.disposition(),
            Self::Change(_) => Disposition::BadInput,
            Self::Policy(error) => error.disposition(),
            Self::StoreTime(error) => error.disposition(),
            Self::Collect(error) => error.disposition(),
            Self::Call(error) => error.disposition(),
            Self::Select(_) | Self::Key(_) | Self::Budget(_) | Self::Logging(_) | Self::File { .. } => {
                Disposition::BadInput
            }
            Self::Output(_) | Self::Runtime(_) => Disposition::Retry,
        }
    }
}
