//! The serving process: wires the parts together and owns the runtime.

use crate::config::Config;
use anyhow::{Result, bail};

/// Serves until everything is unmounted or it is told to end.
pub fn serve(config: Config) -> Result<()> {
    bail!("{} mounts to serve", config.mounts.len())
}
