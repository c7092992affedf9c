//! `mount.poolfs` and `mount.fuse.poolfs`: what mount(8) runs for a line of fstab, and `poolfs mount`.
//!
//! The helper mounts nothing itself. It asks the daemon to, and starts one first if none runs. So the daemon opens the
//! covered directory in the very clone of the file system in which its objects and downloads lie (a rename between two clones
//! fails with EXDEV), no descriptor of `/dev/fuse` has to be handed over, and what mounts at a death of the daemon
//! is what mounted the first time. A helper whose directory is another one than the daemon's of the same name, in another
//! mount namespace or root, is refused.
//!
//! Exit status as mount(8) has it: 0 mounted, 1 the call or the permissions, 2 the system, 32 the mount.

use crate::cli::Common;
use crate::config::{self, Config};
use crate::control::{Call, Gone, Reply, Request, Seen};
use crate::mount_words::{self, Words};
use crate::supervise::Served;
use crate::{commands, pid_file, show};
use anyhow::{Context as _, Result, bail};
use clap::Parser;
use poolfs_core::Role;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// The names that mount(8) calls this program by.
pub const NAMES: [&str; 2] = ["mount.poolfs", "mount.fuse.poolfs"];

/// How long another helper may take that is starting the daemon: it may wait for an apt in both directories.
const TURN_WAIT: Duration = Duration::from_secs(90);

/// How long a daemon that ends, or one that died and is started again, is waited for.
const DAEMON_WAIT: Duration = Duration::from_secs(30);

/// Between two tries to reach it.
const TRY_EVERY: Duration = Duration::from_millis(50);

/// For people who ask the helper itself; its man page has it too.
const HELP: &str = "\
Options:
  ro, rw                           read-only, or not; a remount may change it
  browse                           list every package that exists; needs ro, and a directory of its own
  nosuid, nodev, noexec, noatime   as for every file system
  config=FILE                      the daemon's configuration [default: /etc/poolfs/poolfs.toml]
  those of mount(8) and systemd    defaults, noauto, nofail, x-systemd.* and so on are accepted

Example of /etc/fstab:
  archives  /var/cache/apt/archives  poolfs  nofail,x-systemd.before=apt-daily.service  0 0

Exit codes: 0 mounted, 1 wrong call, option or configuration, or not root, 2 no daemon could be started or reached in time, 32 it could not be mounted";

/// Mounts one of apt's directories, called by mount(8)
#[derive(Debug, Parser)]
#[command(name = "mount.poolfs", version, after_help = HELP)]
pub struct Args {
    /// What the directory is to apt: archives or lists
    what: PathBuf,
    /// The directory to mount over
    dir: PathBuf,
    /// Mount options, separated by commas
    #[arg(short = 'o', value_name = "OPTIONS")]
    options: Vec<String>,
    /// The type that was asked for
    #[arg(short = 't', value_name = "TYPE")]
    kind: Option<String>,
    /// Ignore unknown options
    #[arg(short = 's')]
    sloppy: bool,
    /// Do everything but mount
    #[arg(short = 'f')]
    fake: bool,
    /// Write no mtab; there is none
    #[arg(short = 'n')]
    no_mtab: bool,
    /// Say what was done
    #[arg(short = 'v', action = clap::ArgAction::Count)]
    verbose: u8,
    /// A mount namespace
    #[arg(short = 'N', value_name = "NAMESPACE")]
    namespace: Option<String>,
}

/// Which part of mount(8)'s exit status an error is.
#[derive(Clone, Copy, Debug)]
enum Blame {
    Call = 1,
    System = 2,
    Mount = 32,
}

/// Whether the program was called by one of [`NAMES`].
pub fn is_called_so(program: Option<&OsString>) -> Option<&'static str> {
    let name = Path::new(program?).file_name()?;
    NAMES.into_iter().find(|known| name == *known)
}

/// The helper. `arguments` begin with the program's name.
pub fn main(name: &str, arguments: impl Iterator<Item = OsString>) -> ExitCode {
    let args = match Args::try_parse_from(arguments) {
        Ok(args) => args,
        Err(told) => {
            let code = if told.use_stderr() { Blame::Call as u8 } else { 0 };
            // A closed output has nobody to be told of it.
            let _ = told.print();
            return ExitCode::from(code);
        }
    };
    match run(&args) {
        Ok(said) => {
            if args.verbose > 0 {
                show::line(&format!("{name}: {said}"));
            }
            ExitCode::SUCCESS
        }
        Err((blame, err)) => {
            show::error_of(name, &err);
            ExitCode::from(blame as u8)
        }
    }
}

fn run(args: &Args) -> Result<String, (Blame, anyhow::Error)> {
    let call = |err| (Blame::Call, err);
    let Args { what, dir, .. } = args;
    let role = role(what).map_err(call)?;
    if args.kind.as_ref().is_some_and(|kind| !["poolfs", "fuse.poolfs"].contains(&kind.as_str())) {
        return Err(call(anyhow::anyhow!("type {}: this mounts poolfs", args.kind.as_deref().unwrap_or_default())));
    }
    if let Some(namespace) = &args.namespace {
        return Err(call(anyhow::anyhow!("-N {namespace}: run mount inside of that namespace, by `nsenter --mount`")));
    }
    let words = Words::read(args.options.iter().flat_map(|list| list.split(','))).map_err(call)?;
    let words = if args.sloppy { words } else { words.known().map_err(call)? };
    let common = Common { config: words.config.clone() };
    let config = Config::load(words.config.as_deref()).map_err(call)?;
    if !words.remount {
        mount_words::check(&words.options).map_err(call)?;
    }
    if !rustix::process::geteuid().is_root() {
        return Err(call(anyhow::anyhow!("mounting needs root: run this with sudo")));
    }
    if !dir.is_absolute() {
        return Err(call(anyhow::anyhow!("{} is not absolute: mount(8) passes it so", dir.display())));
    }
    if args.fake {
        return Ok(format!("{role} could be mounted on {}", dir.display()));
    }
    let wish = config::Mount { role, path: dir.clone(), options: mount_words::words_of(&words.options) };
    let done = mount(&common, &config, &wish, words.remount)?;
    Ok(format!("{role} {} on {}", done.word(), dir.display()))
}

/// The role in fstab's first field. libmount makes an absolute path of it where the working directory has such an entry.
fn role(what: &Path) -> Result<Role> {
    let word = if what.is_absolute() { what.file_name() } else { Some(what.as_os_str()) };
    let role = word.and_then(|word| Role::from_word(word.to_str()?));
    role.with_context(|| format!("`{}` is not a role: write archives or lists", what.display()))
}

/// What became of a wish.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Done {
    /// By a daemon that was started for it.
    Started,
    /// By the daemon that runs.
    Joined,
    /// That daemon has it mounted there already.
    Already,
    /// It has other options now.
    Remounted,
}

impl Done {
    fn word(self) -> &'static str {
        match self {
            Self::Started => "is mounted, by a new daemon,",
            Self::Joined => "is mounted",
            Self::Already => "was mounted already",
            Self::Remounted => "was remounted",
        }
    }
}

/// Mounts by the daemon of the configuration, starting one if there is none. For `poolfs mount`.
pub fn mount_or_join(common: &Common, config: &Config, wish: &config::Mount) -> Result<Done> {
    mount(common, config, wish, false).map_err(|(_, err)| err)
}

fn mount(common: &Common, config: &Config, wish: &config::Mount, remount: bool) -> Result<Done, (Blame, anyhow::Error)> {
    let socket = &config.control.socket;
    let _turn = pid_file::turn(socket, TURN_WAIT).map_err(|err| (Blame::System, err))?;
    let deadline = Instant::now() + DAEMON_WAIT;
    loop {
        if let Some(done) = join(socket, wish, remount).map_err(|err| (Blame::Mount, err))? {
            return Ok(done);
        }
        match pid_file::holder(socket) {
            // A daemon that is about to end, or one that died and is about to be started again.
            Some(pid) if Instant::now() >= deadline => {
                let err =
                    anyhow::anyhow!("process {pid} watches over a daemon that does not answer: see its log, end it with `poolfs down`");
                return Err((Blame::System, err));
            }
            // Nothing tells of the moment: the socket of who starts it does not exist yet, and who ends only lets its lock go.
            Some(_) => std::thread::sleep(TRY_EVERY),
            None if remount => {
                let err = anyhow::anyhow!("no daemon serves {}: mount it first", wish.path.display());
                return Err((Blame::Mount, err));
            }
            None => {
                let served = Served { common: common.clone(), only: vec![wish.clone()] };
                commands::start_behind(&served, config).map_err(|err| (Blame::Mount, err))?;
                return Ok(Done::Started);
            }
        }
    }
}

/// Asks the daemon; `None` if none answers, or one that is ending.
fn join(socket: &Path, wish: &config::Mount, remount: bool) -> Result<Option<Done>> {
    let config::Mount { role, path, options } = wish.clone();
    let request = Request::Mount { role, seen: Seen::at(&path), path, options, remount };
    let Some(mut call) = Call::try_start(socket, &request)? else { return Ok(None) };
    match call.next() {
        Ok(Some(Reply::Mounted { already: true })) => Ok(Some(Done::Already)),
        Ok(Some(Reply::Mounted { already: false })) => Ok(Some(if remount { Done::Remounted } else { Done::Joined })),
        Ok(Some(Reply::Ending)) => Ok(None),
        Ok(other) => bail!("the daemon answered a mount with {other:?}"),
        Err(err) if err.is::<Gone>() => Ok(None),
        Err(err) => Err(err),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    /// libmount resolves the first field of fstab in the working directory.
    #[test]
    fn the_role_is_found() {
        for what in ["archives", "/var/cache/apt/archives"] {
            assert_eq!(role(Path::new(what)).unwrap(), Role::Archives);
        }
        for what in ["archive", "var/archives", "/", "", "poolfs"] {
            let said = role(Path::new(what)).unwrap_err().to_string();
            assert_eq!(said, format!("`{what}` is not a role: write archives or lists"));
        }
    }
}
