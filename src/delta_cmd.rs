//! `poolfs delta make|apply`: deltas between two files at hand, for people who want to see what they save.

use crate::deltas::work::{Files, Made, Task, Work, run_blocking};
use crate::show;
use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};
use indicatif::HumanBytes;
use poolfs_core::delta::{self, DELTA_BYTES_MAX};
use poolfs_core::{Digest, Summer};
use serde::Serialize;
use std::fs::File;
use std::io::{Read, Write as _};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// `poolfs delta`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  poolfs delta make hello_1_amd64.deb hello_2_amd64.deb hello.delta\n\nExit codes: 0 made, 1 error")]
pub struct DeltaArgs {
    #[command(subcommand)]
    command: DeltaCommand,
}

#[derive(Debug, Subcommand)]
enum DeltaCommand {
    /// Make the delta from an older to a newer package, and check that it makes the newer one
    #[command(after_help = "Examples:\n  poolfs delta make hello_1_amd64.deb hello_2_amd64.deb hello.delta\n\nExit codes: 0 made, 1 error")]
    Make {
        /// The older package
        old: PathBuf,
        /// The newer package
        new: PathBuf,
        /// Where the delta goes; an existing file is replaced
        delta: PathBuf,
        /// Only while nobody else wants the processor and the disk
        #[arg(long)]
        idle: bool,
        /// As JSON: lengths, time, memory, recipes
        #[arg(long)]
        json: bool,
    },
    /// Make the newer package from the older one and the delta
    #[command(
        after_help = "Examples:\n  poolfs delta apply hello_1_amd64.deb hello.delta hello_2_amd64.deb\n\nExit codes: 0 made, 1 error"
    )]
    Apply {
        /// The older package
        old: PathBuf,
        /// The delta
        delta: PathBuf,
        /// Where the newer package goes; an existing file is replaced
        new: PathBuf,
        /// As JSON: length, digest, time, memory
        #[arg(long)]
        json: bool,
    },
}

/// What was done, for `--json`.
#[derive(Debug, Serialize)]
struct Report {
    /// Bytes of the newer package.
    new_bytes: u64,
    /// Bytes of the delta.
    delta_bytes: u64,
    /// SHA-256 of what was made.
    digest: Digest,
    /// How each part is packed again.
    recipes: Vec<String>,
    /// Processor milliseconds of making; 0 where none was made.
    make_ms: u64,
    /// The most memory of making.
    make_peak_kib: u64,
    /// Processor milliseconds of rebuilding.
    rebuild_ms: u64,
    /// The most memory of rebuilding.
    rebuild_peak_kib: u64,
}

/// Runs it.
pub fn run(args: DeltaArgs) -> Result<ExitCode> {
    match args.command {
        DeltaCommand::Make { old, new, delta, idle, json } => make(&old, &new, &delta, idle, json)?,
        DeltaCommand::Apply { old, delta, new, json } => apply(&old, &delta, &new, json)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn make(old: &Path, new: &Path, to: &Path, idle: bool, json: bool) -> Result<()> {
    let ((old_file, old_sum, _), (new_file, new_sum, new_bytes)) = (open(old)?, open(new)?);
    let mut search = false;
    loop {
        let task = Task::Make { known: Vec::new(), search, bytes_max: DELTA_BYTES_MAX };
        let work = Work { task, old: old_sum, new: new_sum, new_bytes, idle };
        let temp = temp_beside(to)?;
        let (made, make_ms, make_peak_kib) = done(&work, &old_file, &new_file, &temp)?;
        let check = Work { task: Task::Apply, ..work };
        let null = File::options().write(true).open("/dev/null").context("open /dev/null")?;
        match done(&check, &old_file, &temp, &null) {
            Ok((_, rebuild_ms, rebuild_peak_kib)) => {
                put(&temp, to)?;
                let recipes = delta::read_recipes(&made.recipes).iter().map(ToString::to_string).collect();
                let report = Report {
                    new_bytes,
                    delta_bytes: made.bytes,
                    digest: made.digest,
                    recipes,
                    make_ms,
                    make_peak_kib,
                    rebuild_ms,
                    rebuild_peak_kib,
                };
                return show_report(&report, json, to);
            }
            // The likeliest recipe was not the right one.
            Err(_) if !search => search = true,
            Err(err) => return Err(err),
        }
    }
}

fn apply(old: &Path, delta: &Path, to: &Path, json: bool) -> Result<()> {
    let ((old_file, old_sum, _), (delta_file, _, delta_bytes)) = (open(old)?, open(delta)?);
    if delta_bytes > DELTA_BYTES_MAX {
        bail!("{} has {delta_bytes} bytes: a delta has at most {DELTA_BYTES_MAX}", delta.display());
    }
    let mut bytes = Vec::new();
    (&delta_file).read_to_end(&mut bytes).with_context(|| format!("read {}", delta.display()))?;
    let (new, new_bytes) = delta::target_of(&bytes).with_context(|| delta.display().to_string())?;
    let recipes = delta::recipes_of(&bytes)?.iter().map(ToString::to_string).collect();
    let temp = temp_beside(to)?;
    let work = Work { task: Task::Apply, old: old_sum, new, new_bytes, idle: false };
    let (_, rebuild_ms, rebuild_peak_kib) = done(&work, &old_file, &delta_file, &temp)?;
    put(&temp, to)?;
    let report = Report { new_bytes, delta_bytes, digest: new, recipes, make_ms: 0, make_peak_kib: 0, rebuild_ms, rebuild_peak_kib };
    show_report(&report, json, to)
}

fn done(work: &Work, old: &File, second: &File, out: &File) -> Result<(Made, u64, u64)> {
    let fd = |file: &File| file.try_clone().map(OwnedFd::from).context("duplicate a descriptor");
    let done = run_blocking(work, &Files { old: fd(old)?, second: fd(second)?, out: fd(out)? })?;
    let made = done.result.map_err(|failed| anyhow::anyhow!(failed.why))?;
    Ok((made, done.processor_ms, done.peak_kib))
}

/// A file with its digest and length.
fn open(path: &Path) -> Result<(File, Digest, u64)> {
    let named = || path.display().to_string();
    let mut file = File::open(path).with_context(named)?;
    let mut sums = Summer::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer).with_context(named)? {
            0 => break,
            got => sums.update(&buffer[..got]),
        }
    }
    std::io::Seek::rewind(&mut file).with_context(named)?;
    let sums = sums.finish();
    Ok((file, sums.digest, sums.size))
}

/// An unnamed file on the same file system.
fn temp_beside(path: &Path) -> Result<File> {
    use rustix::fs::{Mode, OFlags};
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    let made = rustix::fs::open(dir, flags, Mode::from_raw_mode(0o644));
    Ok(File::from(made.with_context(|| format!("make a file in {}", dir.display()))?))
}

/// Gives what was made its name.
fn put(temp: &File, to: &Path) -> Result<()> {
    let named = || format!("write {}", to.display());
    let mut from = temp.try_clone().with_context(named)?;
    std::io::Seek::rewind(&mut from).with_context(named)?;
    let mut file = File::create(to).with_context(named)?;
    std::io::copy(&mut from, &mut file).with_context(named)?;
    file.flush().with_context(named)
}

fn show_report(report: &Report, json: bool, to: &Path) -> Result<()> {
    if json {
        return show::json(report);
    }
    let Report { new_bytes, delta_bytes, recipes, make_ms, make_peak_kib, rebuild_ms, rebuild_peak_kib, .. } = report;
    #[allow(clippy::cast_precision_loss, reason = "shown to people")]
    let share = *delta_bytes as f64 / (*new_bytes).max(1) as f64 * 100.0;
    show::line(&format!("{}: {} for {}, {share:.1} %", to.display(), HumanBytes(*delta_bytes), HumanBytes(*new_bytes)));
    show::line(&format!("  packed as {}", recipes.iter().filter(|recipe| *recipe != "stored").cloned().collect::<Vec<_>>().join(", ")));
    if *make_ms > 0 {
        show::line(&format!("  made in {make_ms} ms of processor time with {}", HumanBytes(make_peak_kib << 10)));
    }
    show::line(&format!("  rebuilt in {rebuild_ms} ms of processor time with {}", HumanBytes(rebuild_peak_kib << 10)));
    Ok(())
}
