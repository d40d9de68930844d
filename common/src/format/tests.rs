mod golden;
mod properties;
mod samples;

pub(crate) use samples::*;
