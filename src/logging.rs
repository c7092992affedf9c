//! What is logged, to standard error: chosen at the start, changed while it runs.

use anyhow::{Context, Result};
use std::io::IsTerminal as _;
use std::sync::OnceLock;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Registry, fmt, reload};

static FILTER: OnceLock<reload::Handle<EnvFilter, Registry>> = OnceLock::new();

/// Starts it with the directives of `POOLFS_LOG`, else with these.
pub fn start(level: &str) -> Result<()> {
    let directives = std::env::var("POOLFS_LOG").unwrap_or_else(|_| level.to_owned());
    let (filter, handle) = reload::Layer::new(parse(&directives)?);
    let lines = fmt::layer().with_writer(std::io::stderr).with_ansi(std::io::stderr().is_terminal());
    tracing_subscriber::registry().with(filter).with(lines).init();
    FILTER.set(handle).ok().context("logging is started once")
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
