//! `poolfs doctor`: what is wrong with this machine, each finding with the command that mends it.
//!
//! It asks the kernel, the files and the daemon, and changes nothing. A remedy is a line for `sh`, run as root.

mod fstab;
mod machine;

use crate::cli::Common;
use crate::config::{Config, DEFAULT_PATH};
use crate::{config_cmd, show};
use anyhow::{Result, bail};
use serde::Serialize;
use std::path::Path;
use std::process::ExitCode;

/// Something is wrong.
const EXIT_FOUND: u8 = 2;

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What was looked at: `config`, `fuse`, `directories`, `apt`, `locks`, `clock`, `disk`, `fleet`, `fstab`, `daemon`, `mounts`, `network`.
    pub about: &'static str,
    /// What is wrong with it.
    pub problem: String,
    /// The command that mends it.
    pub remedy: String,
}

/// Collects findings.
#[derive(Debug)]
struct Doctor<'a> {
    common: &'a Common,
    found: Vec<Finding>,
}

impl Doctor<'_> {
    fn find(&mut self, about: &'static str, problem: String, remedy: String) {
        self.found.push(Finding { about, problem, remedy });
    }

    /// A command of poolfs with the configuration at hand.
    fn poolfs(&self, words: &str) -> String {
        match &self.common.config {
            Some(file) => format!("poolfs {words} --config {}", quoted(file)),
            None => format!("poolfs {words}"),
        }
    }

    /// The end of the daemon and its next start.
    fn restart(&self) -> String {
        format!("{} && {}", self.poolfs("down"), self.poolfs("up"))
    }
}

/// A path as one word of the shell.
fn quoted(path: &Path) -> String {
    let text = path.display().to_string();
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+:@%".contains(c);
    if !text.is_empty() && text.chars().all(plain) { text } else { format!("'{}'", text.replace('\'', "'\\''")) }
}

/// Looks at everything.
pub fn run(common: &Common, json: bool) -> Result<ExitCode> {
    if !rustix::process::geteuid().is_root() {
        bail!("only root sees what is wrong: run this with sudo");
    }
    let mut doctor = Doctor { common, found: Vec::new() };
    machine::fuse(&mut doctor);
    fstab::look(&mut doctor);
    match config_cmd::mistake(common.config.as_deref()) {
        // Without it nobody knows where the rest is.
        Some(mistake) => config(&mut doctor, mistake),
        None => {
            let config = Config::load(common.config.as_deref())?;
            machine::directories(&mut doctor, &config);
            machine::apt(&mut doctor, &config);
            machine::locks(&mut doctor, &config);
            machine::fleet(&mut doctor, &config);
            machine::daemon(&mut doctor, &config);
        }
    }
    let found = doctor.found;
    if json {
        show::json(&found)?;
    } else if found.is_empty() {
        show::line("nothing is wrong");
    } else {
        for Finding { about, problem, remedy } in &found {
            show::line(&format!("{about}: {problem}\n  {remedy}"));
        }
    }
    Ok(if found.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(EXIT_FOUND) })
}

/// A mistake in the configuration: its line is put aside.
fn config(doctor: &mut Doctor<'_>, mistake: String) {
    let file = doctor.common.config.as_deref().unwrap_or(Path::new(DEFAULT_PATH));
    let text = std::fs::read_to_string(file).ok();
    // FILE:LINE: what; a mistake in the level has no line of its own.
    let told = mistake.strip_prefix(&format!("{}:", file.display())).and_then(|rest| rest.split(':').next()?.parse::<usize>().ok());
    let of_level = || text.as_ref()?.lines().position(|line| line.trim_start().starts_with("level")).map(|line| line + 1);
    let line = if mistake.starts_with("log.level") { of_level() } else { told };
    let remedy = match line {
        Some(line) => format!("sed -i '{line}s/^/#/' {}", quoted(file)),
        None => format!("poolfs config default > {}", quoted(file)),
    };
    doctor.find("config", mistake, remedy);
}
