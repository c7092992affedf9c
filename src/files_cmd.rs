//! `poolfs ls`, `poolfs fetch` and `poolfs gc`.

use crate::config::Config;
use crate::control::{Call, Collected, FileRow, Reply, Request};
use crate::show;
use anyhow::{Context, Result, bail};
use indicatif::HumanBytes;
use poolfs_core::Role;
use serde_json::json;
use std::fs::File;
use std::io::{IsTerminal as _, Read as _};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

/// No file fits, or a package could not be had.
const EXIT_NOTHING: u8 = 2;

/// Packages opened at the same time, as apt does.
const OPEN_MAX: usize = 10;

/// How often the bars move.
const BARS_INTERVAL: Duration = Duration::from_millis(250);

/// Lists the files that are here.
pub fn list(config: &Config, patterns: &[String], json: bool) -> Result<ExitCode> {
    let mut call = Call::start(&config.control.socket, &Request::List)?;
    let mut any = false;
    while let Some(reply) = call.next()? {
        let Reply::Files(rows) = reply else { bail!("the daemon answered a listing with {reply:?}") };
        for row in
            rows.iter().filter(|row| patterns.is_empty() || patterns.iter().any(|pattern| fits(pattern.as_bytes(), row.name.as_bytes())))
        {
            any = true;
            if json {
                show::json(row)?;
            } else {
                show::line(&line_of(row));
            }
        }
    }
    Ok(if any || patterns.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(EXIT_NOTHING) })
}

fn line_of(row: &FileRow) -> String {
    let FileRow { place, name, bytes, state, sharing, source, .. } = row;
    let source = source.as_deref().unwrap_or("kept");
    format!("{place:<8}  {:>10}  {state:<7}  {sharing:<10}  {source:<12}  {name}", HumanBytes(*bytes).to_string())
}

/// Whether `name` fits a pattern in which `*` stands for any bytes and `?` for one.
fn fits(pattern: &[u8], name: &[u8]) -> bool {
    let (mut at, mut of) = (0, 0);
    // Where the last star was, and how much of the name it took.
    let mut star: Option<(usize, usize)> = None;
    while of < name.len() {
        match pattern.get(at) {
            Some(b'*') => {
                star = Some((at, of));
                at += 1;
            }
            Some(byte) if *byte == b'?' || *byte == name[of] => {
                at += 1;
                of += 1;
            }
            _ => match &mut star {
                Some((begin, taken)) => {
                    *taken += 1;
                    (at, of) = (*begin + 1, *taken);
                }
                None => return false,
            },
        }
    }
    pattern[at..].iter().all(|byte| *byte == b'*')
}

/// Frees space.
pub fn collect(config: &Config, all: bool, json: bool) -> Result<ExitCode> {
    let Some(Reply::Collected(collected)) = Call::start(&config.control.socket, &Request::Collect { all })?.next()? else {
        bail!("the daemon gave another answer than what it freed: is it of another version?")
    };
    if json {
        show::json(&collected)?;
    } else {
        let Collected { objects, objects_bytes, downloads, kept_bytes } = collected;
        show::line(&format!(
            "freed {} of {objects} kept packages and indexes, gave up {downloads} interrupted downloads; {} are kept",
            HumanBytes(objects_bytes),
            HumanBytes(kept_bytes)
        ));
    }
    Ok(ExitCode::SUCCESS)
}

/// Opens the packages in the mounted archives directory, which brings them there.
pub fn fetch(config: &Config, names: &[String], json: bool) -> Result<ExitCode> {
    let status = Call::status(&config.control.socket)?;
    let Some(archives) = status.mounts.iter().find(|mount| mount.role == Role::Archives) else {
        bail!("no archives directory is mounted: run `poolfs mount archives /var/cache/apt/archives`")
    };
    let (files, packages): (Vec<_>, Vec<_>) = names.iter().cloned().partition(|name| name.ends_with(".deb"));
    let mut wanted = files;
    if !packages.is_empty() {
        wanted.extend(candidates(config, &packages)?);
    }
    for name in &wanted {
        if name.contains('/') || name.starts_with('.') {
            bail!("`{name}` is no name of an archive: write it without a directory");
        }
    }
    let fetched = open_all(config, &archives.path, &wanted);
    let mut code = ExitCode::SUCCESS;
    for (name, outcome) in wanted.iter().zip(fetched) {
        let path = archives.path.join(name);
        if json {
            let (bytes, error) = (outcome.as_ref().ok(), outcome.as_ref().err());
            show::json(&json!({ "name": name, "path": path, "bytes": bytes, "error": error }))?;
        } else {
            match &outcome {
                Ok(bytes) => show::line(&format!("{}  {}", path.display(), HumanBytes(*bytes))),
                Err(why) => show::error(&anyhow::anyhow!("{name}: {why}")),
            }
        }
        if outcome.is_err() {
            code = ExitCode::from(EXIT_NOTHING);
        }
    }
    Ok(code)
}

/// The archives that apt would take for these packages: it knows its pins, releases and architectures best.
fn candidates(config: &Config, packages: &[String]) -> Result<Vec<String>> {
    let mut apt = Command::new("apt-get");
    // With another archives directory, it names what is there already too.
    apt.args(["-qq", "--print-uris", "-o", "Dir::Cache::archives=/nonexistent/", "download", "--"]).args(packages).env("LC_ALL", "C");
    if let Some(file) = &config.apt.config {
        apt.env("APT_CONFIG", file);
    }
    let told = apt.output().context("run apt-get: is apt installed?")?;
    if !told.status.success() {
        let why = String::from_utf8_lossy(&told.stderr);
        let why: Vec<_> = why.lines().filter_map(|line| line.strip_prefix("E: ")).collect();
        bail!("apt finds no such package: {}; run `apt-get update` if it is new", why.join("; "));
    }
    // 'URL' NAME SIZE HASH
    let names = String::from_utf8_lossy(&told.stdout).lines().filter_map(|line| Some(line.split(' ').nth(1)?.to_owned())).collect();
    Ok(names)
}

fn open_all(config: &Config, archives: &Path, names: &[String]) -> Vec<Result<u64, String>> {
    let mut outcomes: Vec<_> = names.iter().map(|_| Err("not tried".to_owned())).collect();
    let next = &AtomicUsize::new(0);
    let (tell, told) = mpsc::channel();
    std::thread::scope(|scope| {
        for _ in 0..OPEN_MAX.min(names.len()) {
            let tell = tell.clone();
            scope.spawn(move || {
                while let Some((index, name)) = {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    names.get(index).map(|name| (index, name))
                } && tell.send((index, open(&archives.join(name)))).is_ok()
                {}
            });
        }
        drop(tell);
        let shows = std::io::stderr().is_terminal();
        let (mut bars, mut drawn) = (show::Bars::default(), Instant::now());
        loop {
            match told.recv_timeout(BARS_INTERVAL) {
                Ok((index, outcome)) => outcomes[index] = outcome,
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
            if shows && drawn.elapsed() >= BARS_INTERVAL {
                drawn = Instant::now();
                if let Ok(status) = Call::status(&config.control.socket) {
                    bars.update(&status.downloads);
                }
            }
        }
        bars.update(&[]);
    });
    outcomes
}

/// Its length once it is here.
fn open(path: &PathBuf) -> Result<u64, String> {
    let read = || {
        let mut file = File::open(path)?;
        file.read_exact(&mut [0])?;
        Ok(file.metadata()?.len())
    };
    read().map_err(|err: std::io::Error| match err.kind() {
        std::io::ErrorKind::NotFound => {
            "no list names such an archive: check the name, run `apt-get update`, and see that fs.lazy_archives is on".to_owned()
        }
        _ => format!("nobody could deliver it now ({err}): the log says why; `apt-get download` asks the mirror without poolfs"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A pattern that fits too much lists what nobody asked for.
    #[test]
    fn patterns() {
        let check = |pattern: &str, name: &str, want: bool| assert_eq!(fits(pattern.as_bytes(), name.as_bytes()), want, "{pattern} {name}");
        check("a", "a", true);
        check("a", "ab", false);
        check("*", "", true);
        check("", "a", false);
        check("a*c", "abc", true);
        check("a*c", "ac", true);
        check("a*c", "abcd", false);
        check("*ab*", "aab", true);
        check("*_all.deb", "x_1_all.deb_all.deb", true);
        check("?.deb", "x.deb", true);
        check("?.deb", ".deb", false);
        check("***", "x", true);
    }
}
