//! The kernel, the directories, apt, and the daemon.

use super::{Doctor, quoted};
use crate::config::Config;
use crate::control::{Call, Reply, Request, Status};
use crate::pid_file;
use poolfs_core::Role;
use rustix::fs::{AtFlags, Mode, OFlags, StatxFlags};
use rustix::io::Errno;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

/// Less than this free is too little for an upgrade, in bytes.
const FREE_BYTES_MIN: u64 = 64 << 20;

/// A Release may be dated this much after now before the clock is in doubt.
const CLOCK_SLACK: Duration = Duration::from_secs(60 * 60);

pub(super) fn fuse(doctor: &mut Doctor<'_>) {
    let Err(err) = rustix::fs::open("/dev/fuse", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()) else { return };
    let known = fs::read_to_string("/proc/filesystems").is_ok_and(|text| text.lines().any(|line| line.ends_with("\tfuse")));
    // A container may have the module and no device.
    let remedy = if err == Errno::NOENT && known { "mknod -m 666 /dev/fuse c 10 229" } else { "modprobe fuse" };
    doctor.find("fuse", format!("/dev/fuse cannot be opened: {err}"), remedy.to_owned());
}

pub(super) fn directories(doctor: &mut Doctor<'_>, config: &Config) {
    let runtime = config.control.socket.parent().unwrap_or(Path::new("/")).to_owned();
    for dir in [&config.store.state_dir, &config.store.cache_dir, &runtime] {
        let Ok(found) = fs::metadata(dir) else { continue };
        if !found.is_dir() {
            let problem = format!("{} is in the way: poolfs wants a directory there", dir.display());
            doctor.find("directories", problem, format!("mv {} {}", quoted(dir), quoted(&with_end(dir, ".old"))));
        } else if found.mode() & 0o022 != 0 {
            let problem = format!("{} can be written by others than root, who could change what apt installs", dir.display());
            doctor.find("directories", problem, format!("chmod go-w {}", quoted(dir)));
        }
    }
    for mount in &config.mounts {
        apt_directory(doctor, &mount.path);
    }
    let cache = config.store.cache_dir.ancestors().find(|dir| dir.is_dir()).unwrap_or(Path::new("/"));
    if let Ok(stat) = rustix::fs::statvfs(cache) {
        let free = stat.f_bavail.saturating_mul(stat.f_frsize);
        if free < FREE_BYTES_MIN {
            let problem = format!("only {} MiB are free on the file system of {}", free >> 20, config.store.cache_dir.display());
            doctor.find("disk", problem, doctor.poolfs("gc --all"));
        }
    }
}

/// One of apt's two directories.
fn apt_directory(doctor: &mut Doctor<'_>, path: &Path) {
    // What the kernel remembers of a dead mount says nothing.
    let flags = AtFlags::NO_AUTOMOUNT | AtFlags::STATX_FORCE_SYNC;
    let looked = rustix::fs::statx(rustix::fs::CWD, path, flags, StatxFlags::BASIC_STATS);
    let partial = path.join("partial");
    let owner = if fs::read_to_string("/etc/passwd").is_ok_and(|text| text.lines().any(|line| line.starts_with("_apt:"))) {
        "-o _apt "
    } else {
        ""
    };
    match looked {
        Err(Errno::NOTCONN | Errno::CONNABORTED) => {
            let problem = format!("{} has a mount whose daemon is dead: every program that looks at it fails", path.display());
            doctor.find("mounts", problem, format!("umount -l {}", quoted(path)));
        }
        Err(_) => {
            let remedy = format!("install -d {} && install -d -m 700 {owner}{}", quoted(path), quoted(&partial));
            doctor.find("directories", format!("{} is not there, and apt needs it", path.display()), remedy);
        }
        Ok(_) if !partial.is_dir() => {
            let remedy = format!("install -d -m 700 {owner}{}", quoted(&partial));
            doctor.find("directories", format!("{} is not there, and apt needs it", partial.display()), remedy);
        }
        Ok(_) => {}
    }
}

fn with_end(path: &Path, end: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(end);
    PathBuf::from(name)
}

pub(super) fn apt(doctor: &mut Doctor<'_>, config: &Config) {
    let file = config.origin.file.as_deref().unwrap_or(Path::new(crate::config::DEFAULT_PATH));
    if let Some(apt_conf) = config.apt.config.as_deref().filter(|path| !path.exists()) {
        let problem = format!("apt.config = {} is not there", apt_conf.display());
        doctor.find("apt", problem, format!("sed -i '/^config *=/s/^/#/' {}", quoted(file)));
        return;
    }
    let environment = config.apt.config.as_deref().map_or_else(String::new, |file| format!("APT_CONFIG={} ", quoted(file)));
    let apt = match config.apt.load() {
        Ok(apt) => apt,
        Err(err) => return doctor.find("apt", err.to_string(), format!("{environment}apt-config dump")),
    };
    for (role, of_apt) in [(Role::Archives, apt.archives_directory()), (Role::Lists, apt.lists_directory())] {
        let configured = config.mounts.iter().find(|mount| mount.role == role);
        // apt's own has a slash at its end.
        if let (Some(mount), Some(of_apt)) = (configured, of_apt)
            && mount.path.components().ne(of_apt.components())
            && mount.path.canonicalize().ok() != of_apt.canonicalize().ok()
        {
            let of_apt: PathBuf = of_apt.components().collect();
            let problem = format!("{} is mounted for {role}, but apt uses {}", mount.path.display(), of_apt.display());
            let remedy = format!("sed -i 's|\"{}\"|\"{}\"|' {}", mount.path.display(), of_apt.display(), quoted(file));
            doctor.find("apt", problem, remedy);
        }
    }
    let Some(lists) = config.mounts.iter().find(|mount| mount.role == Role::Lists).map(|mount| &mount.path) else { return };
    let Ok(entries) = fs::read_dir(lists) else { return };
    let names = entries.flatten().filter(|entry| entry.file_name().to_string_lossy().ends_with("Release"));
    let releases: Vec<_> = names.filter_map(|entry| entry.metadata().ok()?.modified().ok()).collect();
    if releases.is_empty() {
        let problem = format!("no lists are in {}: nothing is known that could be fetched", lists.display());
        doctor.find("apt", problem, format!("{environment}apt-get update"));
    }
    // apt gives each file the Release's date.
    if releases.iter().any(|date| *date > SystemTime::now() + CLOCK_SLACK) {
        let problem = "the clock is behind: a Release is dated after now, and apt will refuse it".to_owned();
        doctor.find("clock", problem, "timedatectl set-ntp true".to_owned());
    }
}

/// A stopped apt holds the lock for ever; the next one waits, and so do mounting and unmounting.
pub(super) fn locks(doctor: &mut Doctor<'_>, config: &Config) {
    let Ok(table) = fs::read_to_string("/proc/locks") else { return };
    for path in config.mounts.iter().map(|mount| mount.path.join("lock")) {
        let Ok(lock) = fs::metadata(&path) else { continue };
        for line in table.lines() {
            // 1: POSIX  ADVISORY  WRITE 123 fe:01:4567 0 EOF
            let fields: Vec<&str> = line.split_whitespace().collect();
            let [_, "POSIX", _, _, pid, file, ..] = fields.as_slice() else { continue };
            let ours = file.rsplit(':').next().is_some_and(|inode| inode.parse() == Ok(lock.ino()));
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            let stopped = stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('T'));
            if ours && stopped {
                let problem = format!("process {pid} holds {} and is stopped", path.display());
                doctor.find("locks", problem, format!("kill -CONT {pid}"));
            }
        }
    }
}

pub(super) fn fleet(doctor: &mut Doctor<'_>, config: &Config) {
    let Some(file) = &config.fleet.key_file else { return };
    match fs::metadata(file) {
        Err(_) => {
            let problem = format!("fleet.key_file = {} is not there: this machine is of no fleet", file.display());
            doctor.find("fleet", problem, format!("(umask 077; head -c 32 /dev/urandom > {})", quoted(file)));
        }
        Ok(found) if found.mode() & 0o077 != 0 => {
            let problem = format!("others than root can read the fleet's key {}", file.display());
            doctor.find("fleet", problem, format!("chmod 600 {}", quoted(file)));
        }
        Ok(_) => {}
    }
}

pub(super) fn daemon(doctor: &mut Doctor<'_>, config: &Config) {
    let status = match Call::status(&config.control.socket) {
        Ok(status) => status,
        Err(_) if pid_file::holder(&config.control.socket).is_some() => {
            let problem = "the daemon does not answer, though a process watches over it: its log says why".to_owned();
            return doctor.find("daemon", problem, doctor.restart());
        }
        Err(_) => {
            return doctor.find("daemon", "no daemon runs: apt uses the plain directories".to_owned(), doctor.poolfs("up"));
        }
    };
    if status.version != env!("CARGO_PKG_VERSION") {
        let problem = format!("the daemon is of version {}, this program of {}", status.version, env!("CARGO_PKG_VERSION"));
        doctor.find("daemon", problem, doctor.restart());
    }
    for mount in &config.mounts {
        if !status.mounts.iter().any(|mounted| mounted.role == mount.role) {
            let remedy = doctor.poolfs(&format!("mount {} {}", mount.role, quoted(&mount.path)));
            doctor.find("mounts", format!("{} is not mounted, though the daemon runs", mount.path.display()), remedy);
        }
    }
    for mount in status.mounts.iter().filter(|mount| mount.damaged > 0) {
        let problem = format!("{} files below {} are damaged", mount.damaged, mount.path.display());
        doctor.find("mounts", problem, doctor.poolfs("verify --repair"));
    }
    network(doctor, config, &status);
}

fn network(doctor: &mut Doctor<'_>, config: &Config, status: &Status) {
    if !status.uploaded.listening.is_empty() && status.node.is_some() {
        return port(doctor, config, status);
    }
    if let Some(fault) = status.problems.iter().find(|problem| problem.starts_with("the network process")) {
        return doctor.find("network", fault.clone(), doctor.restart());
    }
    let listen = config.net.listen;
    let file = config.origin.file.as_deref().unwrap_or(Path::new(crate::config::DEFAULT_PATH));
    let free = std::net::SocketAddr::new(listen.ip(), 0);
    let edit = format!("sed -i '/^\\[net\\]/,/^\\[/s|^listen *=.*|listen = \"{free}\"|' {}", quoted(file));
    let add = format!("printf '\\n[net]\\nlisten = \"{free}\"\\n' >> {}", quoted(file));
    let has_key = config.origin.table.get("net").and_then(|net| net.get("listen")).is_some();
    let change = if has_key { edit } else { add };
    let problem = format!("no peer is served: nothing listens at {listen} (TCP and UDP); `ss -lntup` shows whose the port is");
    doctor.find("network", problem, format!("{change} && {}", doctor.restart()));
}

/// Whether another node can reach this one's port; it is asked to try.
fn port(doctor: &mut Doctor<'_>, config: &Config, status: &Status) {
    let Some(port) = status.uploaded.listening.first().map(std::net::SocketAddr::port) else { return };
    let answer = Call::start(&config.control.socket, &Request::Port).and_then(|mut call| call.next());
    // Nobody to ask, or a daemon of another version, is nothing that is wrong.
    let Ok(Some(Reply::Port(Some((by, false))))) = answer else { return };
    let problem = format!("{by}, another node, cannot open a connection to TCP port {port} of this machine: a firewall is in between");
    let remedy = open_port(port)
        .unwrap_or_else(|| format!("nft list ruleset; # not on this machine: let TCP and UDP port {port} through on the way"));
    doctor.find("network", problem, remedy);
}

/// What lets the port through this machine's own firewall, by the tool that looks after it.
fn open_port(port: u16) -> Option<String> {
    let output = |program: &str, arguments: &[&str]| {
        let done = std::process::Command::new(program).args(arguments).output().ok()?;
        done.status.success().then(|| String::from_utf8_lossy(&done.stdout).into_owned())
    };
    if output("ufw", &["status"]).is_some_and(|text| text.starts_with("Status: active")) {
        return Some(format!("ufw allow {port}"));
    }
    if output("firewall-cmd", &["--state"]).is_some() {
        let add = |kind: &str| format!("firewall-cmd --permanent --add-port={port}/{kind}");
        return Some(format!("{} && {} && firewall-cmd --reload", add("tcp"), add("udp")));
    }
    let rules: serde_json::Value = serde_json::from_str(&output("nft", &["-j", "list", "chains"])?).ok()?;
    let chains = rules["nftables"].as_array()?.iter().filter_map(|one| {
        let chain = &one["chain"];
        let is_input = chain["hook"] == "input" && chain["type"] == "filter";
        let name = |key: &str| chain[key].as_str();
        is_input.then(|| Some(format!("{} {} {}", name("family")?, name("table")?, name("name")?)))?
    });
    let insert = |chain: String| format!("nft insert rule {chain} meta l4proto '{{ tcp, udp }}' th dport {port} accept");
    let all: Vec<String> =
        chains.filter(|chain| ["inet ", "ip ", "ip6 "].iter().any(|family| chain.starts_with(family))).map(insert).collect();
    (!all.is_empty()).then(|| all.join(" && "))
}
