//! What is logged, to standard error: chosen at the start, changed while it runs.
//!
//! For a terminal with colours; for the journal without a time, which it has, and with the level before the line as it wants it
//! (sd-daemon(3)); for a file with the time.

use anyhow::{Context, Result};
use std::io::{self, IsTerminal as _, Stderr, Write};
use std::os::fd::AsFd;
use std::sync::OnceLock;
use tracing::{Level, Metadata};
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::fmt::format::{FmtSpan, Writer};
use tracing_subscriber::fmt::time::FormatTime;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Layer as _, Registry, fmt, reload};

static FILTER: OnceLock<reload::Handle<EnvFilter, Registry>> = OnceLock::new();

/// Set in the environment of a process whose lines are passed on to the journal by the one that started it.
pub const PASSED_ON: &str = "POOLFS_LOG_TO_JOURNAL";

/// Starts it with the directives of `POOLFS_LOG`, else with these.
pub fn start(level: &str) -> Result<()> {
    let directives = std::env::var("POOLFS_LOG").unwrap_or_else(|_| level.to_owned());
    let (filter, handle) = reload::Layer::new(parse(&directives)?);
    // The end of each request, with what it took; requests are spans of the level debug.
    let lines = fmt::layer().with_span_events(FmtSpan::CLOSE);
    let lines = match is_for_journal() {
        true => lines.with_writer(Journal).with_ansi(false).with_timer(NoTime).with_level(false).boxed(),
        false => lines.with_writer(io::stderr).with_ansi(io::stderr().is_terminal()).boxed(),
    };
    tracing_subscriber::registry().with(filter).with(lines).init();
    FILTER.set(handle).ok().context("logging is started once")
}

/// Whether what is logged ends in the journal: directly, or by a process that passes it on there.
pub fn is_for_journal() -> bool {
    std::env::var_os(PASSED_ON).is_some() || is_journal(std::env::var("JOURNAL_STREAM").ok().as_deref(), io::stderr().as_fd())
}

/// Whether `stream` is the one that `JOURNAL_STREAM` names as `device:inode` (systemd.exec(5)).
fn is_journal(variable: Option<&str>, stream: impl AsFd) -> bool {
    let Some(named) = variable else { return false };
    rustix::fs::fstat(stream).is_ok_and(|stat| format!("{}:{}", stat.st_dev, stat.st_ino) == named)
}

/// In place of the time; without any the layer would not say what a request took either.
struct NoTime;

impl FormatTime for NoTime {
    fn format_time(&self, _out: &mut Writer<'_>) -> std::fmt::Result {
        Ok(())
    }
}

/// Standard error, each line after its level.
struct Journal;

/// One line's writer.
struct Line {
    level: Option<u8>,
    out: Stderr,
}

impl<'a> MakeWriter<'a> for Journal {
    type Writer = Line;

    fn make_writer(&'a self) -> Line {
        Line { level: None, out: io::stderr() }
    }

    fn make_writer_for(&'a self, event: &Metadata<'_>) -> Line {
        Line { level: Some(priority(*event.level())), out: io::stderr() }
    }
}

/// As syslog(3) counts.
fn priority(level: Level) -> u8 {
    match level {
        Level::ERROR => 3,
        Level::WARN => 4,
        Level::INFO => 6,
        Level::DEBUG | Level::TRACE => 7,
    }
}

impl Write for Line {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // One call for the whole line, so that lines of threads do not mix.
        if let Some(level) = self.level.take() {
            let mut line = format!("<{level}>").into_bytes();
            // The blank is what followed the time.
            line.extend_from_slice(bytes.trim_ascii_start());
            self.out.write_all(&line)?;
            return Ok(bytes.len());
        }
        self.out.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

/// Logs by these directives from now on.
pub fn set(level: &str) -> Result<()> {
    let filter = parse(level)?;
    let Some(handle) = FILTER.get() else { return Ok(()) };
    handle.reload(filter).context("change what is logged")?;
    tracing::info!("logging {level}");
    Ok(())
}

/// The filter of these directives.
pub fn parse(directives: &str) -> Result<EnvFilter> {
    EnvFilter::builder().parse(directives).with_context(|| format!("log.level = \"{directives}\": write error, warn, info, debug or trace"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    /// A variable that was inherited from a service's shell would take the time from a log file's lines.
    #[test]
    fn only_the_journal_is_the_journal() {
        let file = tempfile::tempfile().unwrap();
        let stat = rustix::fs::fstat(&file).unwrap();
        assert!(is_journal(Some(&format!("{}:{}", stat.st_dev, stat.st_ino)), &file));
        assert!(!is_journal(Some(&format!("{}:{}", stat.st_dev, stat.st_ino + 1)), &file));
        assert!(!is_journal(Some(""), &file) && !is_journal(None, &file));
        assert_eq!([Level::ERROR, Level::WARN, Level::INFO, Level::TRACE].map(priority), [3, 4, 6, 7]);
    }
}
