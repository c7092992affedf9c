//! The small parent that watches over the serving process.
//!
//! It holds no descriptor of a mount and no lock, only the list of what was mounted. The moment the serving process dies it
//! detaches those mounts, so that apt works on the plain directories again; then it starts the process anew, which mounts
//! again. A process that cannot start is not started again: its error is shown and the parent ends with it; so it is with
//! one that dies again and again before it ever served.
//!
//! A serving process that is there and does not serve is as bad as a dead one: apt would wait for ever. So it tells every few
//! seconds that its mounts have answered, and one that has stopped telling is killed, with all that follows from a death. What
//! systemd's watchdog hears is the same beat; while nothing is mounted nobody waits for it, and the parent answers by itself.

use crate::cli::Common;
use crate::config::Mount;
use crate::pid_file;
use anyhow::{Context, Result, bail};
use poolfs_core::Role;
use rustix::mount::{UnmountFlags, unmount};
use rustix::process::Signal;
use serde::{Deserialize, Serialize};
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{ExitCode, Stdio};
use std::time::{Duration, Instant};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};
use tokio::signal::unix::{SignalKind, signal};

/// Pauses before the serving process is started again: none after the first death, then doubling up to the last.
const RESTART_PAUSES: [Duration; 6] = [
    Duration::ZERO,
    Duration::from_secs(1),
    Duration::from_secs(2),
    Duration::from_secs(4),
    Duration::from_secs(8),
    Duration::from_secs(16),
];

/// A process that served this long did not die of what the one before died of: the pauses start anew.
const SERVED_LONG: Duration = Duration::from_secs(60);

/// A serving process whose mounts have not answered for this long is killed.
const BEAT_PATIENCE: Duration = Duration::from_secs(5 * 60);

/// How often the mounts are asked whether they answer.
const BEAT_INTERVAL: Duration = Duration::from_secs(10);

/// Looks at the beat within one patience. Looks are counted, not time: a machine that stood still heard no beats either.
const LOOKS_MAX: u32 = 8;

/// The longest silence that the service manager bears, where it watches (sd_watchdog_enabled(3)).
fn watchdog() -> Option<Duration> {
    let microseconds = std::env::var("WATCHDOG_USEC").ok()?.parse().ok()?;
    Some(Duration::from_micros(microseconds)).filter(|time| !time.is_zero())
}

/// How often the serving process tells that its mounts answer.
pub fn beat_interval() -> Duration {
    watchdog().map_or(BEAT_INTERVAL, |watchdog| (watchdog / 8).clamp(Duration::from_millis(50), BEAT_INTERVAL))
}

/// How long it may not tell so: less than the service manager's own patience, which would end this process with it.
fn beat_patience() -> Duration {
    watchdog().map_or(BEAT_PATIENCE, |watchdog| (watchdog * 3 / 4).min(BEAT_PATIENCE))
}

/// What the serving process tells its parent, one JSON document a line on its standard output.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Report {
    /// A directory is mounted; `device` is the mount's `major:minor` as in mountinfo.
    Mounted {
        /// The mount point.
        path: PathBuf,
        /// Its device, so that only this very mount is ever detached.
        device: String,
        /// How it is mounted, so that it comes back the same way.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        role: Option<Role>,
        /// Its options, as in fstab.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        options: Vec<String>,
    },
    /// Somebody unmounted it.
    Unmounted {
        /// The mount point.
        path: PathBuf,
    },
    /// Everything is mounted and answers.
    Ready,
    /// The mounts answer still.
    Beat,
    /// It cannot serve; the message names the remedy.
    Refused {
        /// For people.
        message: String,
    },
}

impl Report {
    /// Writes the line that the parent reads. A parent that is gone is no error: its death signal is on the way.
    pub fn send(&self) {
        let line = serde_json::to_string(self).expect("a report is plain text");
        let mut out = std::io::stdout().lock();
        if writeln!(out, "{line}").and_then(|()| out.flush()).is_err() {
            tracing::debug!("the supervising process does not read any more");
        }
    }
}

/// What to serve: the configured mounts, or one of its own.
#[derive(Clone, Debug)]
pub struct Served {
    /// Which configuration.
    pub common: Common,
    /// Instead of the configured mounts, if there are any.
    pub only: Vec<Mount>,
}

impl Served {
    fn command(&self) -> Result<Command> {
        let program = crate::sys::program()?;
        let mut command = std::process::Command::new(program);
        command.arg("serve");
        if let Some(config) = &self.common.config {
            command.arg("--config").arg(config);
        }
        for Mount { role, path, options } in &self.only {
            command.arg("--only").arg(role.as_str()).arg(path).arg(options.join(","));
        }
        // What it starts has nothing to tell the service manager, and some programs would.
        command.env_remove("NOTIFY_SOCKET").stdin(Stdio::null()).stdout(Stdio::piped());
        // Cleanly, when its parent ends: nobody else would detach its mounts if it died later.
        crate::sys::end_with_parent(&mut command);
        Ok(Command::from(command))
    }
}

/// How the serving process ended.
enum End {
    /// By itself: everything is unmounted.
    Clean,
    /// It could not start.
    Refused(String),
    /// It died while it served.
    Died(String),
}

/// Runs until the serving process ends cleanly or cannot start. With `tell`, reports are passed on to standard output.
/// `socket` is the serving process's control socket.
pub fn run(served: &Served, socket: &Path, tell: bool) -> Result<ExitCode> {
    let _held = match pid_file::hold(socket, pid_file::END_PATIENCE) {
        Ok(held) => held,
        Err(err) if tell => {
            Report::Refused { message: format!("{err:#}") }.send();
            return Ok(ExitCode::FAILURE);
        }
        Err(err) => return Err(err),
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("start the supervising runtime")?;
    runtime.block_on(async {
        let mut stop = [signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?, signal(SignalKind::hangup())?];
        let mut deaths = 0;
        let mut ready_once = false;
        // What comes back after a death: mounts may have come and gone since the start.
        let mut served = served.clone();
        loop {
            let started = Instant::now();
            let mut mounted = Vec::new();
            let child = served.command()?.spawn().context("start the serving process")?;
            let end = watch(child, &mut mounted, &mut served.only, &mut stop, &mut ready_once, tell).await?;
            // Whatever the end was, a mount that is left would hang every program that looks at it.
            detach_all(&mounted);
            // Who waits for the first start is told at last.
            let hopeless = !ready_once && (matches!(end, End::Refused(_)) || deaths == RESTART_PAUSES.len());
            match end {
                End::Clean => return Ok(ExitCode::SUCCESS),
                End::Refused(message) | End::Died(message) if hopeless => {
                    if tell {
                        Report::Refused { message }.send();
                        return Ok(ExitCode::FAILURE);
                    }
                    bail!(message);
                }
                End::Refused(why) | End::Died(why) => {
                    deaths = if started.elapsed() > SERVED_LONG { 0 } else { deaths };
                    let pause = RESTART_PAUSES[deaths.min(RESTART_PAUSES.len() - 1)];
                    deaths += 1;
                    tracing::error!(
                        "{why}; its mounts are detached and apt uses the plain directories; starting it again in {} s",
                        pause.as_secs()
                    );
                    if interrupted(&mut stop, pause).await {
                        return Ok(ExitCode::SUCCESS);
                    }
                }
            }
        }
    })
}

/// Waits for `pause` or for a signal to stop; tells whether the latter came.
async fn interrupted(stop: &mut [tokio::signal::unix::Signal; 3], pause: Duration) -> bool {
    let [term, int, hup] = stop;
    tokio::select! {
        () = tokio::time::sleep(pause) => false,
        _ = term.recv() => true,
        _ = int.recv() => true,
        _ = hup.recv() => true,
        () = keep_told() => false,
    }
}

/// Answers the service manager while nothing is mounted, for ever.
async fn keep_told() {
    let mut looks = tokio::time::interval(beat_patience() / LOOKS_MAX);
    loop {
        looks.tick().await;
        tell_service_manager("WATCHDOG=1");
    }
}

async fn watch(
    mut child: Child,
    mounted: &mut Vec<(PathBuf, String)>,
    served: &mut Vec<Mount>,
    stop: &mut [tokio::signal::unix::Signal; 3],
    ready_once: &mut bool,
    tell: bool,
) -> Result<End> {
    let mut lines = BufReader::new(child.stdout.take().context("the serving process has no output")?).lines();
    let mut refused = None;
    let mut reading = true;
    let on_terminal = std::io::IsTerminal::is_terminal(&std::io::stdin());
    let [term, int, hup] = stop;
    let pid = child.id().and_then(|pid| i32::try_from(pid).ok()).and_then(rustix::process::Pid::from_raw);
    let mut looks = tokio::time::interval(beat_patience() / LOOKS_MAX);
    looks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut unheard = 0;
    let mut hung = false;
    let status = loop {
        tokio::select! {
            biased;
            line = lines.next_line(), if reading => match line? {
                Some(line) => match serde_json::from_str::<Report>(&line) {
                    Ok(report) => {
                        match &report {
                            Report::Mounted { path, device, role, options } => {
                                mounted.retain(|(known, _)| known != path);
                                mounted.push((path.clone(), device.clone()));
                                served.retain(|known| known.path != *path);
                                served.extend(role.map(|role| Mount { role, path: path.clone(), options: options.clone() }));
                            }
                            Report::Unmounted { path } => {
                                mounted.retain(|(known, _)| known != path);
                                served.retain(|known| known.path != *path);
                            }
                            Report::Ready => {
                                *ready_once = true;
                                tell_service_manager("READY=1");
                            }
                            Report::Beat => {
                                unheard = 0;
                                tell_service_manager("WATCHDOG=1");
                            }
                            Report::Refused { message } => refused = Some(message.clone()),
                        }
                        if tell && !matches!(report, Report::Refused { .. } | Report::Beat) {
                            report.send();
                        }
                    }
                    Err(err) => tracing::error!("the serving process sent a line that is no report: {err}"),
                },
                None => reading = false,
            },
            status = child.wait() => break status.context("wait for the serving process")?,
            _ = looks.tick() => {
                if mounted.is_empty() {
                    unheard = 0;
                    tell_service_manager("WATCHDOG=1");
                } else if unheard < LOOKS_MAX {
                    unheard += 1;
                } else if !hung {
                    hung = true;
                    tracing::error!("the mounts have not answered for {} s: ending process {:?}", beat_patience().as_secs(), child.id());
                    // What waits in a mount goes with it.
                    detach_all(mounted);
                    forward(pid, Signal::KILL);
                }
            }
            _ = term.recv() => forward(pid, Signal::TERM),
            _ = int.recv() => forward(pid, Signal::TERM),
            // From a terminal that goes, else a wish to read the configuration again.
            _ = hup.recv() => forward(pid, if on_terminal { Signal::TERM } else { Signal::HUP }),
        }
    };
    Ok(match (refused, status.success()) {
        (Some(message), _) => End::Refused(message),
        (None, true) => End::Clean,
        (None, false) if hung => End::Died("the serving process did not serve any more and was killed".to_owned()),
        (None, false) => End::Died(format!("the serving process ended: {status}")),
    })
}

fn forward(pid: Option<rustix::process::Pid>, signal: Signal) {
    if let Some(pid) = pid
        && let Err(err) = rustix::process::kill_process(pid, signal)
    {
        tracing::debug!("pass the signal on: {err}");
    }
}

/// Tells a service manager, if one started us, by the socket that it named (sd_notify(3)).
fn tell_service_manager(state: &str) {
    use std::os::linux::net::SocketAddrExt as _;
    use std::os::unix::net::{SocketAddr, UnixDatagram};
    let Some(name) = std::env::var_os("NOTIFY_SOCKET") else { return };
    let address = match name.as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name),
        None => SocketAddr::from_pathname(&name),
    };
    let told = address.and_then(|address| {
        let socket = UnixDatagram::unbound()?;
        // Who watches over the mounts waits for nobody; another beat follows.
        socket.set_nonblocking(state.starts_with("WATCHDOG"))?;
        socket.send_to_addr(state.as_bytes(), &address)
    });
    if let Err(err) = told {
        tracing::warn!("tell the service manager {state}: {err}");
    }
}

fn detach_all(mounted: &[(PathBuf, String)]) {
    for (path, device) in mounted {
        match is_on_top(path, device) {
            Ok(false) => {}
            Ok(true) => match unmount(path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
                Ok(()) => tracing::warn!("detached the dead mount {}", path.display()),
                Err(err) => tracing::error!("detach the dead mount {}: {err}; run: umount -l {}", path.display(), path.display()),
            },
            Err(err) => tracing::error!("read /proc/self/mountinfo: {err}; if {} hangs, run: umount -l {}", path.display(), path.display()),
        }
    }
}

/// Whether the topmost mount at `path` is ours with that device.
fn is_on_top(path: &Path, device: &str) -> std::io::Result<bool> {
    let table = std::fs::read("/proc/self/mountinfo")?;
    Ok(top_mount(&table, path).is_some_and(|(found, kind)| found == device.as_bytes() && kind == b"fuse.poolfs"))
}

/// The device and the file system type of the last mount at `path` in a mountinfo table (proc_pid_mountinfo(5)).
fn top_mount<'table>(table: &'table [u8], path: &Path) -> Option<(&'table [u8], &'table [u8])> {
    table.split(|&byte| byte == b'\n').rev().find_map(|line| {
        let mut fields = line.split(|&byte| byte == b' ');
        let device = fields.nth(2)?;
        let point = fields.nth(1)?;
        (unescape(point) == path.as_os_str().as_bytes()).then_some(())?;
        let kind = fields.skip_while(|field| *field != b"-").nth(1)?;
        Some((device, kind))
    })
}

/// Undoes the kernel's octal quoting of space, tab, newline and backslash.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, tail)) = rest.split_first() {
        let octal = tail
            .get(..3)
            .filter(|_| first == b'\\')
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match octal {
            Some(byte) => {
                out.push(byte);
                rest = &tail[3..];
            }
            None => {
                out.push(first);
                rest = tail;
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Detaching the wrong mount would take away a file system that is none of ours.
    #[test]
    fn the_topmost_mount_is_found() {
        let table = b"21 1 254:0 / / rw - ext4 /dev/vda rw\n\
            30 21 0:44 / /a\\040b rw,nosuid shared:1 master:2 - fuse.poolfs poolfs rw\n\
            31 30 0:45 / /a\\040b rw - tmpfs none rw\n\
            32 21 0:46 / /c rw - fuse.poolfs poolfs rw\n";
        assert_eq!(top_mount(table, Path::new("/a b")), Some((&b"0:45"[..], &b"tmpfs"[..])));
        assert_eq!(top_mount(table, Path::new("/c")), Some((&b"0:46"[..], &b"fuse.poolfs"[..])));
        assert_eq!(top_mount(table, Path::new("/d")), None);
        assert_eq!(unescape(b"\\134040\\9\\04"), b"\\040\\9\\04");
    }

    /// The two processes may be of different builds during an upgrade: the wire form is fixed.
    #[test]
    fn reports_are_golden() {
        let check = |report: Report, want: &str| {
            assert_eq!(serde_json::to_string(&report).expect("plain"), want);
            assert_eq!(serde_json::from_str::<Report>(want).expect("own form"), report);
        };
        let mounted = |role, options| Report::Mounted { path: "/x".into(), device: "0:44".into(), role, options };
        check(mounted(None, Vec::new()), r#"{"mounted":{"path":"/x","device":"0:44"}}"#);
        check(
            mounted(Some(Role::Lists), vec!["ro".into()]),
            r#"{"mounted":{"path":"/x","device":"0:44","role":"lists","options":["ro"]}}"#,
        );
        check(Report::Ready, r#""ready""#);
        check(Report::Beat, r#""beat""#);
        check(Report::Refused { message: "no".into() }, r#"{"refused":{"message":"no"}}"#);
    }
}
