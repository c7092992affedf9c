//! The control socket: how the commands talk to the daemon.
//!
//! A Unix stream socket of mode 0600. The client sends one [`Request`] as a line of JSON; the daemon answers with lines of
//! JSON, each a [`Reply`], the last of which is `Done` or `Failed`, and closes.

pub mod server;

use anyhow::{Context, Result, bail};
use poolfs_core::Role;
use poolfs_core::discretion::Rule;
use poolfs_fs::install::Install;
use poolfs_fs::update::Update;
use poolfs_net::node::Snapshot;
use poolfs_net::reputation::StatementRow;
use poolfs_net::swarm::driver::{History, PeerRow};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

/// A request longer than this is not one, in bytes.
pub const REQUEST_BYTES_MAX: u64 = 64 * 1024;

/// What a command asks of the daemon.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// One [`Status`].
    Status,
    /// One [`Reply::Peers`].
    Peers,
    /// One [`Reply::Statements`].
    Statements,
    /// One [`Why`].
    Why {
        /// A file below a mount, as an absolute path, or a digest.
        file: PathBuf,
    },
    /// Mount one more directory, or change how one is mounted; one [`Reply::Mounted`].
    Mount {
        /// What it is to apt.
        role: Role,
        /// Where, as an absolute path.
        path: PathBuf,
        /// As after `-o`, without what concerns mount(8) alone.
        options: Vec<String>,
        /// Change the options of what is mounted there.
        remount: bool,
        /// What the client means by `path`.
        seen: Seen,
    },
    /// Ask another node whether it can reach this one's port; one [`Reply::Port`].
    Port,
    /// Every file that is here, as [`Reply::Files`] until none is left.
    List,
    /// Free space; one [`Reply::Collected`].
    Collect {
        /// Everything that can be fetched again.
        all: bool,
    },
    /// Read the configuration again; one [`Reply::Reloaded`].
    Reload,
    /// Log otherwise until the next start.
    LogLevel {
        /// As `log.level`.
        level: String,
    },
    /// Unmount everything and end.
    Down,
    /// Check every block of every file; progress, then a [`Verified`].
    Verify {
        /// Also mend what is damaged.
        repair: bool,
    },
}

/// What the daemon answers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    /// To [`Request::Status`].
    Status(Box<Status>),
    /// To [`Request::Peers`]: every peer that is remembered, most bytes first.
    Peers(Vec<PeerRow>),
    /// To [`Request::Statements`]: what was said of peers, here and by others, the newest first.
    Statements(Vec<StatementRow>),
    /// To [`Request::Why`].
    Why(Box<Why>),
    /// To [`Request::Port`]: who tried to reach this node, and whether it could; `None`: nobody could be asked.
    Port(Option<(SocketAddr, bool)>),
    /// To [`Request::List`]: some of the files.
    Files(Vec<FileRow>),
    /// To [`Request::Collect`].
    Collected(Collected),
    /// To [`Request::Reload`].
    Reloaded(Reloaded),
    /// To [`Request::Mount`].
    Mounted {
        /// It was there already.
        already: bool,
    },
    /// To [`Request::Mount`]: the daemon is about to end; a new one may be started when it has.
    Ending,
    /// How far a long request is.
    Progress {
        /// Bytes done.
        done_bytes: u64,
        /// Bytes in all.
        total_bytes: u64,
        /// The file at hand.
        file: String,
    },
    /// To [`Request::Verify`], at its end.
    Verified(Verified),
    /// The end of a request that succeeded.
    Done,
    /// The end of one that did not.
    Failed {
        /// For people, with the remedy.
        message: String,
    },
}

/// What `poolfs status` shows.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// The daemon's version.
    pub version: String,
    /// The serving process.
    pub pid: u32,
    /// Seconds since it started.
    pub uptime_s: u64,
    /// Where the status page is; `None` where it is off.
    #[serde(default)]
    pub page: Option<SocketAddr>,
    /// What is mounted.
    pub mounts: Vec<MountStatus>,
    /// Bytes that arrived, by source, since the start.
    pub bytes: SourceBytes,
    /// Bytes that did not have to arrive, because of deltas.
    #[serde(default)]
    pub delta_saved_bytes: u64,
    /// Deltas that are offered to others.
    #[serde(default)]
    pub deltas_offered: usize,
    /// Deltas that this machine is to make when it is idle.
    #[serde(default)]
    pub deltas_to_make: usize,
    /// The update of apt's lists that runs, or the last one since the start.
    #[serde(default)]
    pub last_update: Option<UpdateStatus>,
    /// The install that runs, or the last one since the start.
    #[serde(default)]
    pub last_install: Option<InstallStatus>,
    /// What is arriving.
    pub downloads: Vec<Download>,
    /// Files that apt's lists name.
    pub catalog_entries: u64,
    /// Files hashed as a whole since the start: 0 after a restart if nothing changed meanwhile.
    pub hashed: u64,
    /// Bytes that `objects/` holds.
    pub objects_bytes: u64,
    /// Bytes that it may hold.
    pub objects_quota_bytes: u64,
    /// Bytes that are missing to the tenth of the disk, or 8 GiB, that `objects/` leaves free for apt and dpkg; while any are,
    /// nothing more is kept there, whatever the quota.
    #[serde(default)]
    pub objects_short_bytes: u64,
    /// The DHT's node; `None` where it does not run.
    #[serde(default)]
    pub node: Option<Snapshot>,
    /// Live members of the fleet, this machine among them; 0 where it is of none.
    #[serde(default)]
    pub fleet_members: usize,
    /// Files that are here, of which the fleet's members that coordinate them were told; 0 while others are becoming their
    /// coordinators.
    #[serde(default)]
    pub fleet_told: usize,
    /// What was given to peers since the start.
    #[serde(default)]
    pub uploaded: Uploaded,
    /// Why nothing is given outside at the moment.
    #[serde(default)]
    pub upload_paused: Option<String>,
    /// Files of advisories, a line each: issues, age, and what is wrong.
    #[serde(default)]
    pub advisories: Vec<String>,
    /// What is wrong with apt's lists or configuration, the network or the database, a line each with its remedy.
    pub problems: Vec<String>,
}

/// Where a file came from.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Why {
    /// What was asked for.
    pub file: PathBuf,
    /// Its SHA-256, where it is known.
    pub digest: Option<String>,
    /// `clean`, `writing` or `damaged`; `None`: no such file is here.
    pub state: Option<String>,
    /// `announced`, `available`, `local-only` or `withheld`.
    pub sharing: Option<String>,
    /// The rule that decides who may have it now, and what it is decided by.
    #[serde(default)]
    pub rule: Option<String>,
    /// `mirror`, `peer`, `delta` or `written here`.
    pub source: Option<String>,
    /// Which delta it was made with, or why none was used, at its last download where an older version was here.
    #[serde(default)]
    pub delta: Option<String>,
    /// When its whole digest was last compared, Unix seconds; 0: never.
    pub verified_at: i64,
    /// Who gave which piece, for what was downloaded since the start and is remembered.
    pub history: Option<History>,
}

/// One mount.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MountStatus {
    /// What it is to apt.
    pub role: Role,
    /// Where it is.
    pub path: PathBuf,
    /// Files on disk.
    pub files: u64,
    /// Their bytes.
    pub bytes: u64,
    /// In the DHT and served.
    pub announced: u64,
    /// Served to who asks for the digest.
    pub available: u64,
    /// Never leaving the machine.
    pub local_only: u64,
    /// Kept from strangers: vulnerable, superseded, or named by lists that are too old.
    pub withheld: u64,
    /// These, by the rule that keeps them.
    #[serde(default)]
    pub withheld_by: BTreeMap<Rule, u64>,
    /// Failed a checksum and could not be mended.
    pub damaged: u64,
    /// Files that arrived because somebody opened them.
    pub ghosts_opened: u64,
    /// Blocks that matched their checksum at a read.
    #[serde(default)]
    pub blocks_checked: u64,
    /// Blocks that failed their checksum at a read.
    pub blocks_bad: u64,
    /// Blocks that were mended.
    pub blocks_mended: u64,
}

/// A file that is here.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileRow {
    /// `archives`, `lists`, or `objects` for what is kept after apt removed it.
    pub place: String,
    /// Its name below the directory; an object's is the name that apt's lists give it, else its digest.
    pub name: String,
    /// Its SHA-256, where it is known.
    pub digest: Option<String>,
    /// Its length in bytes.
    pub bytes: u64,
    /// `clean`, `writing` or `damaged`.
    pub state: String,
    /// `announced`, `available`, `local-only` or `withheld`.
    pub sharing: String,
    /// `mirror`, `peer`, `delta` or `written here`; `None` for an object.
    pub source: Option<String>,
}

/// What [`Request::Collect`] freed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Collected {
    /// Kept packages and indexes that went.
    pub objects: u64,
    /// Their bytes.
    pub objects_bytes: u64,
    /// Interrupted downloads that were given up.
    pub downloads: usize,
    /// What is still kept, in bytes.
    pub kept_bytes: u64,
}

/// What [`Request::Reload`] did.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reloaded {
    /// Keys that have new values now.
    pub taken: Vec<String>,
    /// Keys whose new values wait for the next start.
    pub waiting: Vec<String>,
}

/// Bytes by source.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceBytes {
    /// From mirrors.
    pub mirror: u64,
    /// From peers.
    pub peer: u64,
    /// Rebuilt here from deltas.
    pub delta: u64,
}

/// What the peer server gave.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Uploaded {
    /// Where it listens; empty where it does not run.
    pub listening: Vec<SocketAddr>,
    /// Bytes of files.
    pub bytes: u64,
    /// Of these, to addresses outside of this machine's own networks.
    pub bytes_outside: u64,
    /// Requests answered.
    pub answered: u64,
    /// Requests for what is not here or not for the asker.
    pub not_found: u64,
    /// Requests and connections turned away since too many were under way.
    pub refused: u64,
    /// Answers ended since the bytes on disk were not what they should be.
    pub damaged: u64,
    /// Connections open now.
    pub connections: u64,
}

/// One run of `apt-get update`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct UpdateStatus {
    /// When apt took its lock, seconds since 1970.
    pub started: u64,
    /// From there until apt gave it back, or until now.
    pub took_ms: u64,
    /// Whether apt still has its lock.
    pub running: bool,
    /// Bytes of indexes and patches that poolfs fetched, by source.
    pub bytes: SourceBytes,
    /// Bytes that were here from before.
    pub kept_bytes: u64,
    /// Bytes that apt fetched itself: the signed Release files, and what poolfs did not have for it.
    pub apt_bytes: u64,
    /// Indexes that poolfs had for apt.
    pub indexes: u64,
    /// Patches of lists that poolfs had for apt.
    pub patches: u64,
}

/// One run of apt that fetched packages.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct InstallStatus {
    /// When apt took its lock, seconds since 1970.
    pub started: u64,
    /// From there until apt gave it back, with dpkg's work in between, or until now.
    pub took_ms: u64,
    /// Whether apt still has its lock.
    pub running: bool,
    /// Packages that poolfs had for apt.
    pub packages: u64,
    /// Their bytes that poolfs fetched, by source.
    pub bytes: SourceBytes,
    /// Bytes that were here from before.
    pub kept_bytes: u64,
    /// Bytes that apt fetched itself.
    pub apt_bytes: u64,
}

fn seconds(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs()
}

fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

impl From<Install> for InstallStatus {
    fn from(install: Install) -> Self {
        Self {
            started: seconds(install.started),
            took_ms: milliseconds(install.took),
            running: install.running,
            packages: install.packages,
            bytes: SourceBytes { mirror: install.mirror_bytes, peer: install.peer_bytes, delta: install.delta_bytes },
            kept_bytes: install.kept_bytes,
            apt_bytes: install.apt_bytes,
        }
    }
}

impl From<Update> for UpdateStatus {
    fn from(update: Update) -> Self {
        Self {
            started: seconds(update.started),
            took_ms: milliseconds(update.took),
            running: update.running,
            bytes: SourceBytes { mirror: update.mirror_bytes, peer: update.peer_bytes, delta: update.delta_bytes },
            kept_bytes: update.kept_bytes,
            apt_bytes: update.apt_bytes,
            indexes: update.indexes,
            patches: update.patches,
        }
    }
}

/// One download in progress.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Download {
    /// The file's name, or its digest where it has none.
    pub name: String,
    /// Its digest.
    pub digest: String,
    /// Its length in bytes.
    pub size: u64,
    /// What is here of it.
    pub done_bytes: u64,
    /// Over the last seconds.
    pub rate_bytes_s: u64,
    /// Who gives.
    pub givers: Vec<String>,
}

/// What a check of everything found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verified {
    /// Files read.
    pub files: u64,
    /// Bytes read.
    pub bytes: u64,
    /// Files with a bad block that is still bad.
    pub damaged: Vec<String>,
    /// Files that were mended.
    pub mended: Vec<String>,
    /// Objects that could not be mended and are no longer kept.
    #[serde(default)]
    pub dropped: Vec<String>,
    /// Files that could not be read at all, with the reason.
    pub problems: Vec<String>,
}

impl Verified {
    /// Adds what the check of one directory found.
    pub fn add(&mut self, found: poolfs_fs::verify::Verified) {
        self.files += found.files;
        self.bytes += found.bytes;
        self.damaged.extend(found.damaged);
        self.mended.extend(found.repaired);
        self.dropped.extend(found.dropped);
        self.problems.extend(found.problems);
    }
}

/// What a process means by a path: by it client and daemon know that they speak of the same directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seen {
    /// Device and inode of the mount namespace; `None` without `/proc`.
    namespace: Option<(u64, u64)>,
    /// Device and inode of what is at the path; `None` if it cannot be looked at, as a mount whose server is dead.
    found: Option<(u64, u64)>,
}

impl Seen {
    /// As this process sees it, without mounting or following anything at the end of `path`.
    pub fn at(path: &Path) -> Self {
        use rustix::fs::AtFlags;
        let namespace = identity(Path::new("/proc/self/ns/mnt"), AtFlags::empty());
        Self { namespace, found: identity(path, AtFlags::NO_AUTOMOUNT | AtFlags::SYMLINK_NOFOLLOW) }
    }
}

fn identity(path: &Path, flags: rustix::fs::AtFlags) -> Option<(u64, u64)> {
    let found = rustix::fs::statx(rustix::fs::CWD, path, flags, rustix::fs::StatxFlags::BASIC_STATS).ok()?;
    Some((rustix::fs::makedev(found.stx_dev_major, found.stx_dev_minor), found.stx_ino))
}

/// The daemon ended in the middle of a request.
#[derive(Debug)]
pub struct Gone;

impl std::fmt::Display for Gone {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("the daemon ended before it answered: see its log")
    }
}

impl std::error::Error for Gone {}

/// The client's end of a request.
#[derive(Debug)]
pub struct Call {
    replies: std::io::Lines<BufReader<UnixStream>>,
}

impl Call {
    /// Sends `request` to the daemon at `socket`.
    pub fn start(socket: &Path, request: &Request) -> Result<Self> {
        let call = Self::try_start(socket, request)?;
        call.with_context(|| format!("no poolfs daemon answers at {}: start one with `poolfs up`", socket.display()))
    }

    /// As [`Self::start`]; `None` if no daemon answers.
    pub fn try_start(socket: &Path, request: &Request) -> Result<Option<Self>> {
        use std::io::ErrorKind;
        let mut stream = match UnixStream::connect(socket) {
            Ok(stream) => stream,
            Err(err) if matches!(err.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused) => return Ok(None),
            Err(err) if err.kind() == ErrorKind::PermissionDenied => {
                bail!("{} may be used by root only: run this as root", socket.display())
            }
            Err(err) => return Err(err).with_context(|| format!("connect to {}", socket.display())),
        };
        let mut line = serde_json::to_string(request).context("encode the request")?;
        line.push('\n');
        match stream.write_all(line.as_bytes()) {
            // It ended between the two calls; `next` tells.
            Err(err) if err.kind() == ErrorKind::BrokenPipe => {}
            written => written.context("send the request to the daemon")?,
        }
        Ok(Some(Self { replies: BufReader::new(stream).lines() }))
    }

    /// The next reply; `None` at the end of a request that succeeded.
    pub fn next(&mut self) -> Result<Option<Reply>> {
        let line = match self.replies.next() {
            Some(Err(err)) if err.kind() != std::io::ErrorKind::ConnectionReset => return Err(err).context("read the daemon's answer"),
            None | Some(Err(_)) => bail!(Gone),
            Some(Ok(line)) => line,
        };
        match serde_json::from_str(&line).context("understand the daemon's answer")? {
            Reply::Done => Ok(None),
            Reply::Failed { message } => bail!(message),
            reply => Ok(Some(reply)),
        }
    }

    /// Asks for one status.
    pub fn status(socket: &Path) -> Result<Status> {
        match Self::start(socket, &Request::Status)?.next()? {
            Some(Reply::Status(status)) => Ok(*status),
            other => bail!("the daemon answered a status request with {other:?}"),
        }
    }
}
