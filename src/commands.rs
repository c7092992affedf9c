//! What each command does on the client's side.

use crate::cli::{Cli, Command, Common};
use crate::config::Config;
use crate::control::{Call, Reply, Request, Verified};
use crate::mount_words::{self, Words};
use crate::pid_file;
use crate::show;
use crate::supervise::{self, Report, Served};
use anyhow::{Context, Result, bail};
use poolfs_core::Role;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{ExitCode, Stdio};
use std::time::Duration;

/// `verify` found damage that is still there.
const EXIT_DAMAGED: u8 = 2;

/// A log larger than this is put aside as `poolfs.log.1` when the daemon starts, in bytes.
const LOG_BYTES_MAX: u64 = 16 << 20;

/// How often `watch` asks.
const WATCH_INTERVAL: Duration = Duration::from_millis(250);

/// Runs one command.
pub fn run(cli: Cli) -> Result<ExitCode> {
    match cli.command {
        Command::Up { common, foreground } => up(&Served { common, only: Vec::new() }, foreground),
        Command::Mount { role, dir, options, common, foreground } => {
            let words = Words::read(options.iter().map(String::as_str))?.known()?;
            mount_words::check(&words.options)?;
            let wish = crate::config::Mount { role, path: real(&dir)?, options: mount_words::words_of(&words.options) };
            if foreground {
                return up(&Served { common, only: vec![wish] }, true);
            }
            let config = load(&common)?;
            need_root()?;
            let done = crate::mount_helper::mount_or_join(&common, &config, &wish)?;
            if done == crate::mount_helper::Done::Already {
                bail!("{} is mounted on {} already", wish.role, wish.path.display());
            }
            show::status(&Call::status(&config.control.socket)?);
            Ok(ExitCode::SUCCESS)
        }
        Command::Down { common } => down(&load(&common)?),
        Command::Status { common, json } => {
            let status = Call::status(&load(&common)?.control.socket)?;
            if json {
                show::json(&status)?
            } else {
                show::status(&status)
            }
            Ok(ExitCode::SUCCESS)
        }
        Command::Watch { common, json } => watch(&load(&common)?, json),
        Command::Verify { common, repair, json } => verify(&load(&common)?, repair, json),
        Command::Peers { statements: true, common, json } => crate::peers_cmd::statements(&load(&common)?, json),
        Command::Peers { common, json, .. } => crate::peers_cmd::peers(&load(&common)?, json),
        Command::Why { file, common, json } => crate::peers_cmd::why(&load(&common)?, &file, json),
        Command::Ls { patterns, common, json } => crate::files_cmd::list(&load(&common)?, &patterns, json),
        Command::Fetch { names, common, json } => crate::files_cmd::fetch(&load(&common)?, &names, json),
        Command::Gc { all, common, json } => crate::files_cmd::collect(&load(&common)?, all, json),
        Command::Doctor { common, json } => crate::doctor::run(&common, json),
        Command::Delta(args) => crate::delta_cmd::run(args),
        Command::DeltaWork => crate::deltas::work::child().map(|()| ExitCode::SUCCESS),
        Command::Documents { dir } => crate::documents::write(&dir),
        Command::Config(args) => crate::config_cmd::run(args),
        Command::LogLevel { level, common } => crate::config_cmd::log_level(&load(&common)?, level),
        Command::Dht(args) => crate::dht_cmd::run(args),
        Command::Serve { common, only } => serve(&common, only),
        Command::ServeNet { dir: _ } => crate::net_main::main().map(|()| ExitCode::SUCCESS),
    }
}

fn load(common: &Common) -> Result<Config> {
    Config::load(common.config.as_deref())
}

fn serve(common: &Common, only: Vec<String>) -> Result<ExitCode> {
    let mut config = load(common)?;
    crate::logging::start(&config.log.level)?;
    if !only.is_empty() {
        config.mounts = only.chunks_exact(3).map(only_mount).collect::<Result<_>>()?;
    }
    match crate::daemon::serve(config) {
        Ok(()) => Ok(ExitCode::SUCCESS),
        Err(err) => {
            Report::Refused { message: format!("{err:#}") }.send();
            Ok(ExitCode::FAILURE)
        }
    }
}

fn only_mount(words: &[String]) -> Result<crate::config::Mount> {
    let [role, dir, options] = words else { bail!("--only takes three words") };
    let role = Role::from_word(role).with_context(|| format!("`{role}` is not a role"))?;
    let options = options.split(',').filter(|option| !option.is_empty()).map(str::to_owned).collect();
    Ok(crate::config::Mount { role, path: PathBuf::from(dir), options })
}

/// The directory without symbolic links. One with a dead mount on it cannot be looked at, and is taken as it was written.
fn real(dir: &Path) -> Result<PathBuf> {
    match dir.canonicalize() {
        Err(err) if err.raw_os_error() == Some(rustix::io::Errno::NOTCONN.raw_os_error()) => Ok(std::path::absolute(dir)?),
        found => found.with_context(|| format!("mount over {}", dir.display())),
    }
}

fn need_root() -> Result<()> {
    if !rustix::process::geteuid().is_root() {
        bail!("mounting needs root: run this with sudo");
    }
    Ok(())
}

/// Starts the daemon, in the foreground or behind, and shows its status when everything is mounted.
fn up(served: &Served, foreground: bool) -> Result<ExitCode> {
    let config = load(&served.common)?;
    need_root()?;
    if let Ok(status) = Call::status(&config.control.socket) {
        bail!(
            "a daemon (pid {}) already serves {}: end it with `poolfs down`, or give this one another control.socket",
            status.pid,
            config.control.socket.display()
        );
    }
    if foreground {
        crate::logging::start(&config.log.level)?;
        // Only a parent of ours reads reports; a person has the log.
        return supervise::run(served, &config.control.socket, std::env::var_os(TELL).is_some());
    }
    start_behind(served, &config)?;
    show::status(&Call::status(&config.control.socket)?);
    Ok(ExitCode::SUCCESS)
}

/// Starts the daemon in a session of its own; everything is mounted when this returns.
pub fn start_behind(served: &Served, config: &Config) -> Result<()> {
    let log_path = config.store.state_dir.join("poolfs.log");
    let log = open_log(&log_path)?;
    let mut command = std::process::Command::new(crate::sys::program()?);
    match served.only.as_slice() {
        [] => {
            command.arg("up");
        }
        [one] => {
            command.arg("mount").arg(one.role.as_str()).arg(&one.path);
            if !one.options.is_empty() {
                command.arg("-o").arg(one.options.join(","));
            }
        }
        _ => bail!("a daemon is started with one mount, or with those of its configuration"),
    }
    if let Some(path) = &served.common.config {
        command.arg("--config").arg(path.canonicalize().with_context(|| format!("find configuration {}", path.display()))?);
    }
    command.arg("--foreground").env(TELL, "1").current_dir("/").stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log);
    crate::sys::new_session(&mut command);
    let mut child = command.spawn().context("start the daemon")?;
    let reports = BufReader::new(child.stdout.take().context("the daemon has no output")?);
    for line in reports.lines() {
        match serde_json::from_str(&line.context("read the daemon's report")?).context("understand the daemon's report")? {
            Report::Ready => return Ok(()),
            Report::Refused { message } => {
                // It still has its log open: whoever reads the message may unmount the directory next.
                child.wait().context("wait for the daemon to end")?;
                bail!(message)
            }
            Report::Mounted { .. } | Report::Unmounted { .. } | Report::Beat => {}
        }
    }
    bail!("the daemon ended before it was ready: see {}", log_path.display())
}

/// Set for a supervisor whose parent reads its reports.
const TELL: &str = "POOLFS_TELL_PARENT";

fn open_log(path: &Path) -> Result<File> {
    let failed = || format!("open log {}: check that the directory is writable and has space", path.display());
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir).with_context(failed)?;
    }
    if path.metadata().is_ok_and(|found| found.len() > LOG_BYTES_MAX) {
        std::fs::rename(path, path.with_extension("log.1")).with_context(failed)?;
    }
    OpenOptions::new().create(true).append(true).open(path).with_context(failed)
}

/// How long `down` waits for the end of a process that has unmounted everything already.
const END_WAIT: Timespec = Timespec { tv_sec: 30, tv_nsec: 0 };

fn down(config: &Config) -> Result<ExitCode> {
    let status = match Call::status(&config.control.socket) {
        Ok(status) => status,
        Err(err) => return stop_supervisor(&config.control.socket, err),
    };
    let pid = i32::try_from(status.pid).context("the daemon says no process id")?;
    // Opened before it ends: from then on the number may be another's.
    let process = open_process(pid)?;
    let supervisor = pid_file::holder(&config.control.socket).and_then(|pid| open_process(pid).ok());
    let mut call = Call::start(&config.control.socket, &Request::Down)?;
    while call.next()?.is_some() {}
    // The next `up` finds neither its socket nor its database in use.
    if !ends(&process)? {
        bail!("everything is unmounted, but process {} does not end: see its log", status.pid);
    }
    // Its parent has the log open a moment longer, which keeps the state directory's file system busy.
    if let Some(supervisor) = supervisor
        && !ends(&supervisor)?
    {
        bail!("everything is unmounted, but the process that watched over {} does not end: see its log", status.pid);
    }
    Ok(ExitCode::SUCCESS)
}

/// No daemon answers (`unanswered`): one that died may be about to be started again.
fn stop_supervisor(socket: &Path, unanswered: anyhow::Error) -> Result<ExitCode> {
    let Some(pid) = pid_file::holder(socket) else { return Err(unanswered) };
    let process = open_process(pid)?;
    // Still the same process: the lock ends with it.
    if pid_file::holder(socket) != Some(pid) {
        return Err(unanswered);
    }
    rustix::process::pidfd_send_signal(&process, rustix::process::Signal::TERM).context("end the daemon's supervisor")?;
    if !ends(&process)? {
        bail!("process {pid}, which would start the daemon again, does not end: see its log");
    }
    Ok(ExitCode::SUCCESS)
}

fn open_process(pid: i32) -> Result<OwnedFd> {
    let pid = rustix::process::Pid::from_raw(pid).context("the daemon says no process id")?;
    rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).context("find the daemon's process")
}

/// Waits for the end of a process; `false` if it does not come.
fn ends(process: &OwnedFd) -> Result<bool> {
    let mut ends = [PollFd::new(process, PollFlags::IN)];
    Ok(poll(&mut ends, Some(&END_WAIT)).context("wait for the daemon's end")? != 0)
}

fn watch(config: &Config, json: bool) -> Result<ExitCode> {
    let mut bars = show::Bars::default();
    loop {
        let status = Call::status(&config.control.socket)?;
        if json {
            show::json(&status.downloads)?;
        } else {
            bars.update(&status.downloads);
        }
        std::thread::sleep(WATCH_INTERVAL);
    }
}

fn verify(config: &Config, repair: bool, json: bool) -> Result<ExitCode> {
    let mut call = Call::start(&config.control.socket, &Request::Verify { repair })?;
    let bar = show::byte_bar();
    let mut found = Verified::default();
    while let Some(reply) = call.next()? {
        match reply {
            Reply::Progress { done_bytes, total_bytes, file } => {
                bar.set_length(total_bytes);
                bar.set_position(done_bytes);
                bar.set_message(file);
            }
            Reply::Verified(result) => found = result,
            other => bail!("the daemon answered a check with {other:?}"),
        }
    }
    bar.finish_and_clear();
    if json {
        show::json(&found)?
    } else {
        show::verified(&found)
    }
    Ok(if found.damaged.is_empty() && found.problems.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(EXIT_DAMAGED) })
}
