//! `poolfs config` and `poolfs log-level`.

use crate::cli::Common;
use crate::config::{self, Config, keys};
use crate::control::{Call, Reply, Request};
use crate::{logging, show};
use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};
use serde_json::json;
use std::path::Path;
use std::process::ExitCode;

/// The configuration has a mistake.
const EXIT_WRONG: u8 = 2;

/// The commands under `poolfs config`.
#[derive(Debug, Args)]
pub struct ConfigArgs {
    #[command(subcommand)]
    command: ConfigCommand,
}

#[derive(Debug, Subcommand)]
enum ConfigCommand {
    /// Print what holds: the file's values, and the defaults of all other keys
    #[command(after_help = "Examples:\n  poolfs config show\n  poolfs config show --json\n\nExit codes: 0 printed, 1 error")]
    Show {
        /// Which configuration
        #[command(flatten)]
        common: Common,
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Print a file that explains every key, with its default and unit
    #[command(after_help = "Examples:\n  poolfs config default > /etc/poolfs/poolfs.toml\n\nExit codes: 0 printed, 1 error")]
    Default {
        /// As JSON: sections with their keys, defaults and meaning
        #[arg(long)]
        json: bool,
    },
    /// Look for mistakes in the configuration
    #[command(
        after_help = "Examples:\n  poolfs config check --config ./poolfs.toml\n\nExit codes: 0 it is right, 1 error, 2 it has a mistake"
    )]
    Check {
        /// Which configuration
        #[command(flatten)]
        common: Common,
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Let the daemon read its configuration again, and say what waits for the next start
    #[command(
        after_help = "Examples:\n  poolfs config reload\n\nSIGHUP does the same.\n\nExit codes: 0 taken over, 1 error: all stays as it was"
    )]
    Reload {
        /// Which configuration
        #[command(flatten)]
        common: Common,
        /// As JSON
        #[arg(long)]
        json: bool,
    },
}

/// Runs one of them.
pub fn run(args: ConfigArgs) -> Result<ExitCode> {
    match args.command {
        ConfigCommand::Show { common, json } => show_effective(&Config::load(common.config.as_deref())?, json),
        ConfigCommand::Default { json: false } => {
            show::line(keys::annotated().trim_end());
            Ok(ExitCode::SUCCESS)
        }
        ConfigCommand::Default { json: true } => {
            let key = |section: &str, key: &keys::Key| {
                let reloaded = keys::RELOADED.contains(&format!("{section}.{}", key.name).as_str());
                json!({ "name": key.name, "value": key.value, "is_default": key.is_default, "about": key.about, "reloaded": reloaded })
            };
            let section = |section: &keys::Section| {
                let keys: Vec<_> = section.keys.iter().map(|one| key(section.name, one)).collect();
                json!({ "name": section.name, "about": section.about, "keys": keys })
            };
            show::json(&keys::SECTIONS.iter().map(section).collect::<Vec<_>>())?;
            Ok(ExitCode::SUCCESS)
        }
        ConfigCommand::Check { common, json } => check(&common, json),
        ConfigCommand::Reload { common, json } => reload(&Config::load(common.config.as_deref())?, json),
    }
}

fn show_effective(config: &Config, json: bool) -> Result<ExitCode> {
    let effective = config.origin.effective();
    if json {
        show::json(&effective)?;
    } else {
        let file = config.origin.file.as_deref();
        show::line(&file.map_or_else(|| "# no file: the defaults".to_owned(), |file| format!("# {} and defaults", file.display())));
        show::line(toml::to_string(&effective).context("print the configuration")?.trim_end());
    }
    Ok(ExitCode::SUCCESS)
}

/// What is wrong with the configuration, as far as it can be said without a daemon.
pub fn mistake(path: Option<&Path>) -> Option<String> {
    let checked = Config::load(path).and_then(|config| logging::parse(&config.log.level).map(drop));
    checked.err().map(|err| format!("{err:#}"))
}

fn check(common: &Common, json: bool) -> Result<ExitCode> {
    let file = common.config.as_deref().unwrap_or(Path::new(config::DEFAULT_PATH));
    let mistake = mistake(common.config.as_deref());
    if json {
        show::json(&json!({ "file": file, "right": mistake.is_none(), "mistake": mistake }))?;
    } else if let Some(mistake) = &mistake {
        show::line(mistake);
    } else if file.exists() {
        show::line(&format!("{} is right", file.display()));
    } else {
        show::line(&format!("{} is not there: the defaults hold", file.display()));
    }
    Ok(if mistake.is_none() { ExitCode::SUCCESS } else { ExitCode::from(EXIT_WRONG) })
}

fn reload(config: &Config, json: bool) -> Result<ExitCode> {
    let Some(Reply::Reloaded(reloaded)) = Call::start(&config.control.socket, &Request::Reload)?.next()? else {
        bail!("the daemon gave another answer than what it took over: is it of another version?")
    };
    if json {
        show::json(&reloaded)?;
    } else {
        reloaded.taken.iter().for_each(|key| show::line(&format!("{key}: taken over")));
        reloaded.waiting.iter().for_each(|key| show::line(&format!("{key}: waits for the next start (`poolfs down`, `poolfs up`)")));
        if reloaded.taken.is_empty() && reloaded.waiting.is_empty() {
            show::line("nothing has changed");
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Changes what the daemon logs.
pub fn log_level(config: &Config, level: String) -> Result<ExitCode> {
    let mut call = Call::start(&config.control.socket, &Request::LogLevel { level })?;
    while call.next()?.is_some() {}
    Ok(ExitCode::SUCCESS)
}
