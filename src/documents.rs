//! Man pages and shell completions, made from the arguments themselves so that they cannot say anything else.

use crate::cli::Cli;
use crate::config::keys;
use crate::mount_helper;
use anyhow::{Context, Result};
use clap::{Command, CommandFactory as _};
use clap_complete::Shell;
use clap_mangen::Man;
use clap_mangen::roff::{Roff, bold, roman};
use std::fs;
use std::path::Path;
use std::process::ExitCode;

/// The shells that completions are made for.
const SHELLS: [Shell; 3] = [Shell::Bash, Shell::Fish, Shell::Zsh];

/// Writes `man/*.{1,5,8}` and `completions/*`.
pub fn write(dir: &Path) -> Result<ExitCode> {
    let (man, completions) = (dir.join("man"), dir.join("completions"));
    for path in [&man, &completions] {
        fs::create_dir_all(path).with_context(|| format!("create {}", path.display()))?;
    }
    let mut command = Cli::command();
    command.build();
    pages(&command, "poolfs", &man)?;
    let helper = mount_helper::Args::command();
    save(&man.join("mount.poolfs.8"), |out| Man::new(helper).section("8").render(out))?;
    save(&man.join("poolfs.toml.5"), configuration)?;
    for shell in SHELLS {
        let mut text = Vec::new();
        clap_complete::generate(shell, &mut Cli::command(), "poolfs", &mut text);
        let name = match shell {
            Shell::Bash => "poolfs".to_owned(),
            Shell::Zsh => "_poolfs".to_owned(),
            other => format!("poolfs.{other}"),
        };
        let path = completions.join(name);
        fs::write(&path, text).with_context(|| format!("write {}", path.display()))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// A page for a command and one for each of those below it.
fn pages(command: &Command, name: &str, dir: &Path) -> Result<()> {
    // clap wants names for as long as the process lives, which ends with this command.
    let title: &'static str = name.to_owned().leak();
    let page = command.clone().name(title).bin_name(name.replacen('-', " ", 1)).disable_help_subcommand(true);
    save(&dir.join(format!("{name}.1")), |out| Man::new(page.clone()).render(out))?;
    for below in command.get_subcommands().filter(|below| !below.is_hide_set() && below.get_name() != "help") {
        pages(below, &format!("{name}-{}", below.get_name()), dir)?;
    }
    Ok(())
}

/// The configuration's page.
fn configuration(out: &mut dyn std::io::Write) -> std::io::Result<()> {
    let mut page = Roff::new();
    page.control("TH", ["poolfs.toml", "5", "", concat!("poolfs ", env!("CARGO_PKG_VERSION"))]);
    page.control("SH", ["NAME"]);
    page.text([roman("poolfs.toml - configuration of poolfs")]);
    page.control("SH", ["DESCRIPTION"]);
    page.text([roman(
        "One TOML file, /etc/poolfs/poolfs.toml. It need not exist, and every key has a default. An unknown key is an error. \
         poolfs config check looks for mistakes, poolfs config reload and SIGHUP take over the keys marked (reload).",
    )]);
    for section in keys::SECTIONS {
        page.control("SH", [section.name]);
        page.text([roman(section.about)]);
        for key in section.keys {
            page.control("TP", []);
            page.text([bold(key.name), roman(" = "), roman(key.value)]);
            let unset = if key.is_default { "" } else { " Not set by default." };
            let reload = if keys::RELOADED.contains(&format!("{}.{}", section.name, key.name).as_str()) { " (reload)" } else { "" };
            page.text([roman(format!("{}{unset}{reload}", key.about))]);
        }
    }
    page.control("SH", ["SEE ALSO"]);
    page.text([roman("poolfs(1), mount.poolfs(8)")]);
    out.write_all(page.render().as_bytes())
}

fn save(path: &Path, render: impl FnOnce(&mut dyn std::io::Write) -> std::io::Result<()>) -> Result<()> {
    let mut text = Vec::new();
    render(&mut text).and_then(|()| fs::write(path, text)).with_context(|| format!("write {}", path.display()))
}
