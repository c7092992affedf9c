//! What each process gives up.
//!
//! The network process: root (it becomes the system user `poolfs`, or a number that nobody has), every capability, new
//! privileges by any program, all system calls but those of a server, and with Landlock every file but its own directory and
//! what name resolution and TLS read. So what is world-readable on the machine is out of its reach too, apt's directories
//! among it. The process of the mounts: new sockets of any family but Unix ones; the
//! listener of the status page on loopback was opened before.
//!
//! Where the kernel has no Landlock the rest holds; without user, seccomp or `no_new_privs` the network process does not run.

mod calls;

use crate::sys;
use anyhow::{Context as _, Result, bail};
use landlock::{
    ABI, Access as _, AccessFs, Compatible as _, Ruleset, RulesetAttr as _, RulesetCreatedAttr as _, RulesetStatus, Scope,
    path_beneath_rules,
};
use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, Uid};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use std::ffi::OsStr;
use std::fs::{self, DirBuilder};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

/// The system user that the network process runs as, where there is one.
pub const USER: &str = "poolfs";

/// Who it runs as elsewhere: of the numbers that Debian reserves and that neither it nor systemd gives to anybody.
pub const USER_ID: u32 = 65_529;

/// Descriptors that it may have open: its server's connections, and those that are under way to the other process.
const DESCRIPTORS_MAX: u64 = 16_384;

/// Who is short of memory ends it before the process of the mounts; -1000 to 1000.
const OOM_SCORE: &str = "500";

/// What it may read besides its own directory: names and addresses, certificates, libraries that glibc loads for these.
const READABLE: [&str; 12] = [
    "/etc",
    "/usr",
    "/lib",
    "/lib64",
    "/run/systemd/resolve",
    "/run/resolvconf",
    "/run/NetworkManager",
    "/run/nscd",
    "/var/lib/ca-certificates",
    "/proc/self",
    "/sys/devices/system/cpu",
    "/dev/urandom",
];

/// The newest Landlock that this is written for; an older kernel enforces what it knows.
const LANDLOCK: ABI = ABI::V6;

/// What was given up, for the log.
#[derive(Debug)]
pub struct Confined {
    /// As whom it runs.
    pub user: u32,
    /// What of the file system is enforced.
    pub landlock: &'static str,
}

/// Confines the network process, whose directory is `dir`. To be called before it has another thread, and before it has
/// read anything of a stranger.
pub fn network(dir: &Path) -> Result<Confined> {
    let (user, group) = user();
    let is_root = rustix::process::geteuid().is_root();
    if is_root {
        prepare(dir, user, group).with_context(|| format!("prepare {} for user {user}", dir.display()))?;
        // Without it the machine may end another process first, no more.
        let _ = fs::write("/proc/self/oom_score_adj", OOM_SCORE);
    }
    limit(Resource::Nofile, DESCRIPTORS_MAX)?;
    limit(Resource::Core, 0)?;
    if is_root {
        sys::become_user(user, group).with_context(|| {
            format!("become user {user}: in a container, give it the user ids up to {USER_ID}, or a system user {USER} within its own")
        })?;
        sys::end_with_parent_now().context("end with the daemon")?;
    }
    if let Some(closed) = closed(dir) {
        bail!("user {user} may not enter {}: chmod o+x {}", closed.display(), closed.display());
    }
    let landlock = landlock(dir)?;
    calls::network()?;
    Ok(Confined { user: rustix::process::geteuid().as_raw(), landlock })
}

/// Takes every network from the calling thread and from the threads and programs that it starts.
pub fn mounts() -> Result<()> {
    calls::mounts()
}

/// The user and group of the network process.
fn user() -> (u32, u32) {
    let users = fs::read("/etc/passwd").unwrap_or_default();
    user_in(&users).unwrap_or((USER_ID, USER_ID))
}

/// [`USER`] in a file as /etc/passwd: asked of nothing else, since a system user is there, and others may be on a network.
fn user_in(passwd: &[u8]) -> Option<(u32, u32)> {
    passwd.split(|byte| *byte == b'\n').find_map(|line| {
        let mut fields = line.split(|byte| *byte == b':');
        (fields.next()? == USER.as_bytes()).then_some(())?;
        let mut number = || str::from_utf8(fields.next()?).ok()?.parse::<u32>().ok();
        let (_password, user, group) = (number(), number()?, number()?);
        (user != 0 && group != 0).then_some((user, group))
    })
}

/// Makes the directory and what is in it the user's own.
///
/// Who was there before may have put anything there: only plain files of one name are touched, and no link is followed.
fn prepare(dir: &Path, user: u32, group: u32) -> Result<()> {
    let parent = dir.parent().context("it has no parent")?;
    DirBuilder::new().recursive(true).mode(0o700).create(parent)?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    open_way(&rustix::fs::open(parent, flags, Mode::empty())?, group)?;
    match DirBuilder::new().mode(0o700).create(dir) {
        Err(err) if err.kind() != std::io::ErrorKind::AlreadyExists => return Err(err.into()),
        _ => {}
    }
    let opened = rustix::fs::open(dir, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
    give(&opened, user, group)?;
    for entry in rustix::fs::Dir::read_from(&opened)? {
        let entry = entry?;
        let name = entry.file_name();
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        let found = rustix::fs::statat(&opened, name, AtFlags::SYMLINK_NOFOLLOW)?;
        if FileType::from_raw_mode(found.st_mode) != FileType::RegularFile || found.st_nlink != 1 {
            tracing::debug!(name = %OsStr::from_bytes(name.to_bytes()).display(), "left as it is: no plain file");
            continue;
        }
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        give(&rustix::fs::openat(&opened, name, flags, Mode::empty())?, user, group)?;
    }
    Ok(())
}

/// Lets the group enter a directory that others may not enter; it sees no names there.
fn open_way(parent: &impl AsFd, group: u32) -> Result<()> {
    let found = rustix::fs::fstat(parent)?;
    if found.st_mode & 0o001 == 0 && (found.st_gid, found.st_mode & 0o070) != (group, 0o010) {
        rustix::fs::fchown(parent, None, Some(Gid::from_raw(group)))?;
        rustix::fs::fchmod(parent, Mode::from_raw_mode(found.st_mode & 0o7707 | 0o010))?;
    }
    Ok(())
}

fn give(file: &impl AsFd, user: u32, group: u32) -> Result<()> {
    let found = rustix::fs::fstat(file)?;
    let is_dir = FileType::from_raw_mode(found.st_mode) == FileType::Directory;
    // Looked at again: it may have been exchanged since.
    if found.st_uid != user && (is_dir || found.st_nlink == 1) {
        rustix::fs::fchown(file, Some(Uid::from_raw(user)), Some(Gid::from_raw(group)))?;
    }
    Ok(())
}

/// The first directory on the way to `dir` that this process may not enter.
fn closed(dir: &Path) -> Option<PathBuf> {
    let mut way: Vec<&Path> = dir.ancestors().collect();
    way.reverse();
    let inside = way.windows(2).find(|pair| fs::metadata(pair[1]).is_err_and(|err| err.kind() == std::io::ErrorKind::PermissionDenied));
    inside.map(|pair| pair[0].to_owned())
}

fn limit(resource: Resource, max: u64) -> Result<()> {
    let now = getrlimit(resource);
    let max = now.maximum.map_or(max, |now| now.min(max));
    setrlimit(resource, Rlimit { current: Some(max), maximum: Some(max) }).with_context(|| format!("limit {resource:?} to {max}"))
}

fn landlock(dir: &Path) -> Result<&'static str> {
    let certificates = ["SSL_CERT_FILE", "SSL_CERT_DIR"].into_iter().filter_map(std::env::var_os).map(PathBuf::from);
    let readable: Vec<PathBuf> = READABLE.into_iter().map(PathBuf::from).chain(certificates).collect();
    let all = AccessFs::from_all(LANDLOCK);
    let status = Ruleset::default()
        .set_compatibility(landlock::CompatLevel::BestEffort)
        .handle_access(all)?
        .scope(Scope::from_all(LANDLOCK))?
        .create()?
        .add_rules(path_beneath_rules(readable, AccessFs::from_read(LANDLOCK)))?
        .add_rules(path_beneath_rules([dir], all & !AccessFs::Execute))?
        .restrict_self()?;
    Ok(match status.ruleset {
        RulesetStatus::FullyEnforced => "fully",
        RulesetStatus::PartiallyEnforced => "as far as this kernel knows it",
        RulesetStatus::NotEnforced => "not: this kernel has none",
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::print_stderr, reason = "tests, which say what they skip")]
    use super::*;
    use std::os::unix::fs::MetadataExt as _;

    /// A wrong field would make it root, or somebody else.
    #[test]
    fn the_user_is_the_one_of_its_name() {
        let line = |line: &str| user_in(format!("root:x:0:0:root:/root:/bin/sh\n{line}\nsync:x:4:65534::/bin:/bin/sync\n").as_bytes());
        assert_eq!(line("poolfs:x:991:990:poolfs:/nonexistent:/usr/sbin/nologin"), Some((991, 990)));
        for none in
            ["", "poolfs2:x:1:1::", "xpoolfs:x:1:1::", "poolfs:x:0:1::", "poolfs:x:1:0::", "poolfs:x:a:1::", "poolfs:x", "#poolfs:x:1:1::"]
        {
            assert_eq!(line(none), None, "{none}");
        }
    }

    /// Runs it in a thread, with which what it gives up goes.
    fn apart<T: Send + 'static>(run: impl FnOnce() -> T + Send + 'static) -> T {
        std::thread::spawn(run).join().unwrap()
    }

    /// What a stranger would do first with the network process: look around, write somewhere, start a shell, trace another.
    #[test]
    fn the_network_process_can_do_little() {
        use std::os::unix::process::CommandExt as _;
        let (own, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        fs::write(other.path().join("secret"), b"secret").unwrap();
        let (dir, secret) = (own.path().to_owned(), other.path().join("secret"));
        apart(move || {
            let enforced = landlock(&dir).unwrap();
            calls::network().unwrap();
            fs::write(dir.join("net.db"), b"own").unwrap();
            assert_eq!(fs::read(dir.join("net.db")).unwrap(), b"own");
            assert!(fs::read("/etc/passwd").is_ok(), "names are looked up with it");
            assert!(std::net::TcpListener::bind("127.0.0.1:0").is_ok() && std::net::UdpSocket::bind("127.0.0.1:0").is_ok());
            std::thread::spawn(|| ()).join().unwrap();
            if enforced.starts_with("not") {
                eprintln!("SKIPPED in part: Landlock is enforced {enforced}");
            } else {
                assert_eq!(fs::read(&secret).unwrap_err().kind(), std::io::ErrorKind::PermissionDenied);
                assert!(fs::write("/etc/poolfs-test", b"").is_err() && fs::read_dir("/").is_err());
            }
            let unknown = std::process::Command::new("/bin/true").exec();
            assert_eq!(unknown.raw_os_error(), Some(libc::ENOSYS), "{unknown}");
            let packets = rustix::net::socket(rustix::net::AddressFamily::PACKET, rustix::net::SocketType::RAW, None);
            assert_eq!(packets.unwrap_err(), rustix::io::Errno::NOSYS);
            assert!(rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::CONT).is_err());
        });
    }

    /// The process of the mounts needs no network, and what it starts has none either.
    #[test]
    fn the_process_of_the_mounts_has_no_network() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        apart(move || {
            mounts().unwrap();
            assert_eq!(std::net::TcpStream::connect(address).unwrap_err().raw_os_error(), Some(libc::EACCES));
            assert!(std::net::UdpSocket::bind("[::1]:0").is_err());
            assert!(std::os::unix::net::UnixStream::pair().is_ok());
            let shell = std::process::Command::new("bash")
                .args(["-c", &format!("exec 3<>/dev/tcp/127.0.0.1/{}", address.port())])
                .output()
                .unwrap();
            assert!(!shell.status.success() && String::from_utf8_lossy(&shell.stderr).contains("Permission denied"), "{shell:?}");
        });
        assert!(std::net::TcpStream::connect(address).is_ok(), "other threads have it still");
    }

    /// What the user put in its directory must not become a way to own something else.
    #[test]
    fn only_plain_files_change_hands() {
        if !rustix::process::geteuid().is_root() {
            return eprintln!("SKIPPED: needs root");
        }
        let place = tempfile::tempdir().unwrap();
        let dir = place.path().join("state/net");
        prepare(&dir, 12_345, 12_346).unwrap();
        let outside = place.path().join("outside");
        fs::write(&outside, b"").unwrap();
        fs::write(dir.join("net.db"), b"").unwrap();
        fs::create_dir(dir.join("directory")).unwrap();
        std::os::unix::fs::symlink(&outside, dir.join("symbolic")).unwrap();
        fs::hard_link(&outside, dir.join("hard")).unwrap();
        prepare(&dir, 12_345, 12_346).unwrap();
        let owner = |path: &Path| (fs::symlink_metadata(path).unwrap().uid(), fs::symlink_metadata(path).unwrap().gid());
        assert_eq!(owner(&dir), (12_345, 12_346));
        assert_eq!(owner(&dir.join("net.db")), (12_345, 12_346));
        for left in [outside, dir.join("directory"), dir.join("symbolic"), dir.join("hard")] {
            assert_eq!(owner(&left), (0, 0), "{}", left.display());
        }
        let state = place.path().join("state");
        let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o7777;
        assert_eq!((owner(&state), mode(&state)), ((0, 12_346), 0o710), "the group may pass, and others may not");
        fs::set_permissions(&state, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        prepare(&dir, 12_345, 12_346).unwrap();
        assert_eq!(mode(&state), 0o755, "where everybody may pass nothing changes");
        assert_eq!(mode(&dir), 0o700);
    }
}
