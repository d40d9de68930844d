mod golden;
mod properties;
mod samples;

pub(crate) use golden::golden;
pub(crate) use samples::*;
