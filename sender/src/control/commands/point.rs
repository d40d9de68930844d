//! `point`: a recovery point now, of one volume or of all at one instant; back when it is committed.

use std::path::Path;

use common::clock::UnixMillis;
use common::format::close::Consistency;
use common::ops::exit::ExitCode;

use super::super::client::ControlClient;
use super::super::protocol::{Answered, AskCommand, PointReply};
use super::{CommandError, Out};

/// Asks for the point, waits until it is committed, and prints it. [`ExitCode::Weaker`] where any is weaker than asked for.
///
/// # Errors
/// [`CommandError`]; also where one of several volumes has no point.
pub async fn run(
    state_dir: &Path,
    volume: Option<String>,
    consistency: Option<Consistency>,
    json: bool,
    out: Out<'_>,
) -> Result<ExitCode, CommandError> {
    let mut client = ControlClient::connect(state_dir).await?;
    let word = consistency.map(|consistency| consistency.as_str().to_owned());
    let Answered::Points(points) = client.ask(AskCommand::Point { volume, consistency: word }).await? else {
        return Err(CommandError::Failed("the sender answered something else; see its log".into()));
    };
    if json {
        serde_json::to_writer(&mut *out, &points).map_err(std::io::Error::from)?;
        writeln!(out)?;
    } else {
        for reply in &points {
            print(reply, out)?;
        }
    }
    verdict(&points, consistency)
}

fn print(reply: &PointReply, out: Out<'_>) -> std::io::Result<()> {
    let Some(point) = &reply.point else {
        return writeln!(out, "{}: no point: {}", reply.volume, reply.error);
    };
    let (time, consistency) = (UnixMillis(point.time_ms), &point.consistency);
    write!(out, "{}: {} (epoch {}, {time}, {consistency} consistent)", reply.volume, point.id, point.epoch)?;
    if !point.group_point.is_empty() {
        write!(out, ", group point {}", point.group_point)?;
    }
    if !reply.weaker.is_empty() {
        write!(out, "; weaker than asked for: {}", reply.weaker)?;
    }
    writeln!(out)
}

/// What the answers come to. PURE.
fn verdict(points: &[PointReply], asked: Option<Consistency>) -> Result<ExitCode, CommandError> {
    if points.is_empty() {
        return Err(CommandError::Failed("the sender protects no volume; give it one, and ask again".into()));
    }
    let failed: Vec<String> = points
        .iter()
        .filter(|reply| reply.point.is_none())
        .map(|reply| format!("volume {}: {}", reply.volume, reply.error))
        .collect();
    if !failed.is_empty() {
        return Err(CommandError::Failed(failed.join("; ")));
    }
    let least = asked.unwrap_or(Consistency::Crash);
    let weaker = |reply: &PointReply| {
        let found = reply.point.as_ref().and_then(|point| level(&point.consistency));
        !reply.weaker.is_empty() || found.is_none_or(|found| found < least)
    };
    Ok(if points.iter().any(weaker) { ExitCode::Weaker } else { ExitCode::Ok })
}

fn level(word: &str) -> Option<Consistency> {
    [Consistency::Fuzzy, Consistency::Crash, Consistency::Filesystem, Consistency::Application]
        .into_iter()
        .find(|consistency| consistency.as_str() == word)
}

#[cfg(test)]
mod tests {
    use super::super::super::status::PointStatus;
    use super::*;

    fn made(consistency: &str, weaker: &str) -> PointReply {
        let point = PointStatus { consistency: consistency.into(), ..PointStatus::default() };
        PointReply { volume: "root".into(), point: Some(point), weaker: weaker.into(), error: String::new() }
    }

    #[test]
    fn a_point_weaker_than_asked_for_exits_with_three_and_none_is_an_error() {
        let code = |points: &[PointReply], asked| verdict(points, asked).map(ExitCode::code).ok();
        assert_eq!(code(&[made("crash", "")], None), Some(0));
        assert_eq!(code(&[made("application", "")], Some(Consistency::Filesystem)), Some(0));
        assert_eq!(code(&[made("fuzzy", "")], None), Some(3));
        assert_eq!(code(&[made("crash", "")], Some(Consistency::Filesystem)), Some(3));
        assert_eq!(code(&[made("crash", ""), made("crash", "the group broke")], None), Some(3));
        let none = PointReply { volume: "data".into(), error: "it stopped".into(), ..PointReply::default() };
        let error = verdict(&[made("crash", ""), none], None).expect_err("one has no point").to_string();
        assert!(error.contains("data") && error.contains("it stopped"), "{error}");
        assert_eq!(code(&[], None), None);
    }
}
