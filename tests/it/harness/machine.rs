//! A private apt world with a poolfs of its own.

use super::mounts;
use super::process::{Finished, await_exit, run, with_argument};
use super::{Host, LIMIT, Mirror, Repo, trixie};
use rustix::mount::{MountFlags, mount, mount_bind};
use rustix::process::{Pid, Signal};
use serde::Deserialize;
use std::ffi::OsStr;
use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use tempfile::TempDir;

/// Which apt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Apt {
    /// The machine's own, in private directories.
    Own,
    /// apt 3.0 in a root of its own.
    Trixie,
}

/// Where packages come from.
#[derive(Debug)]
pub(crate) enum Sources<'a> {
    /// A repository of the test behind a mirror of the test.
    Local(&'a Repo, &'a Mirror),
    /// The Debian mirror that the machine's own apt uses; trixie's in a trixie root.
    Debian,
    /// Debian from a mirror of the test, see [`Mirror::debian`].
    DebianBehind(&'a Mirror),
}

/// How a machine is made.
#[derive(Debug)]
pub(crate) struct Options {
    pub(crate) apt: Apt,
    /// Lines for apt's configuration.
    pub(crate) apt_conf: String,
    /// Lines for poolfs's configuration, after the sections that the harness writes.
    pub(crate) poolfs_toml: String,
    /// Quota of `objects/`.
    pub(crate) quota: &'static str,
    /// Packages of the machine's own dpkg status that count as installed; empty: none. Only for [`Apt::Own`].
    pub(crate) copy_status_without: Option<&'static [&'static str]>,
    /// Its place on a wire; `None`: the network of the test itself.
    pub(crate) host: Option<Host>,
}

impl Default for Options {
    fn default() -> Self {
        Self { apt: Apt::Own, apt_conf: String::new(), poolfs_toml: String::new(), quota: "1 GiB", copy_status_without: None, host: None }
    }
}

/// One mount as `poolfs status --json` tells it.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct MountStatus {
    pub(crate) role: String,
    pub(crate) path: PathBuf,
    pub(crate) files: u64,
    pub(crate) bytes: u64,
    pub(crate) announced: u64,
    pub(crate) available: u64,
    pub(crate) local_only: u64,
    pub(crate) withheld: u64,
    pub(crate) damaged: u64,
    pub(crate) ghosts_opened: u64,
    #[serde(default)]
    pub(crate) blocks_bad: u64,
    #[serde(default)]
    pub(crate) blocks_mended: u64,
}

/// Bytes by source.
#[derive(Clone, Copy, Debug, Deserialize)]
pub(crate) struct SourceBytes {
    pub(crate) mirror: u64,
    pub(crate) peer: u64,
    pub(crate) delta: u64,
}

/// What was given to peers.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
pub(crate) struct Uploaded {
    pub(crate) bytes: u64,
}

/// The DHT's node in `poolfs status --json`.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Node {
    pub(crate) v4: Option<NodeFamily>,
    pub(crate) announced_keys: u64,
    /// Contacts kept for others.
    #[serde(default)]
    pub(crate) stored_contacts: u64,
    /// Small items kept for others.
    #[serde(default)]
    pub(crate) stored_items: u64,
}

/// One address family of it.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct NodeFamily {
    pub(crate) nodes: u64,
}

/// The last update of the lists.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Update {
    pub(crate) started: u64,
    pub(crate) took_ms: u64,
    pub(crate) running: bool,
    pub(crate) bytes: SourceBytes,
    pub(crate) kept_bytes: u64,
    pub(crate) apt_bytes: u64,
    pub(crate) indexes: u64,
    pub(crate) patches: u64,
}

/// `poolfs status --json`.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Status {
    pub(crate) pid: u32,
    pub(crate) uptime_s: u64,
    pub(crate) mounts: Vec<MountStatus>,
    pub(crate) bytes: SourceBytes,
    #[serde(default)]
    pub(crate) delta_saved_bytes: u64,
    #[serde(default)]
    pub(crate) deltas_offered: u64,
    #[serde(default)]
    pub(crate) deltas_to_make: u64,
    pub(crate) downloads: Vec<serde_json::Value>,
    #[serde(default)]
    pub(crate) last_update: Option<Update>,
    pub(crate) catalog_entries: u64,
    pub(crate) hashed: u64,
    /// Bytes of kept packages.
    pub(crate) objects_bytes: u64,
    /// Bytes that would have to be free before more are kept.
    pub(crate) objects_short_bytes: u64,
    /// Live members of the fleet, this machine among them.
    #[serde(default)]
    pub(crate) fleet_members: u64,
    /// Files that are here, of which the members that coordinate them were told.
    #[serde(default)]
    pub(crate) fleet_told: u64,
    #[serde(default)]
    pub(crate) uploaded: Uploaded,
    /// The DHT's node.
    #[serde(default)]
    pub(crate) node: Option<Node>,
    #[serde(default)]
    pub(crate) problems: Vec<String>,
}

impl Status {
    #[track_caller]
    pub(crate) fn of(&self, role: &str) -> &MountStatus {
        self.mounts.iter().find(|mount| mount.role == role).unwrap_or_else(|| panic!("no mount {role} in {self:#?}"))
    }

    pub(crate) fn archives(&self) -> &MountStatus {
        self.of("archives")
    }

    pub(crate) fn lists(&self) -> &MountStatus {
        self.of("lists")
    }
}

/// A machine: apt's directories below `root`, poolfs's configuration and own directories, all in one temporary directory
/// and one mount namespace. Dropping it, also by a panic, ends its processes and removes everything.
#[derive(Debug)]
pub(crate) struct Machine {
    directory: TempDir,
    root: PathBuf,
    apt: Apt,
    host: Option<Host>,
}

impl Machine {
    /// Puts the calling thread into a mount namespace of its own and lays the directories out. Nothing is mounted by poolfs yet.
    pub(crate) fn new(sources: &Sources<'_>, options: &Options) -> Self {
        mounts::enter_namespace();
        let directory = workspace();
        let root = directory.path().join("root");
        fs::create_dir(&root).unwrap();
        let machine = Self { directory, root, apt: options.apt, host: options.host.clone() };
        match options.apt {
            Apt::Own => machine.lay_out_own(options),
            Apt::Trixie => machine.lay_out_trixie(),
        }
        machine.write_sources(sources);
        let conf = machine.apt_conf(options);
        fs::write(machine.apt_conf_path(), conf).unwrap();
        if options.apt == Apt::Trixie {
            // The same settings for apt inside, without the directories, which are its own there.
            let inside: String = fs::read_to_string(machine.apt_conf_path())
                .unwrap()
                .lines()
                .filter(|line| !line.starts_with("Dir"))
                .fold(String::new(), |text, line| text + line + "\n");
            fs::write(machine.root.join("etc/apt/apt.conf.d/99test"), inside).unwrap();
        }
        fs::create_dir_all(machine.cache_dir()).unwrap();
        machine.write_config(options);
        machine
    }

    fn lay_out_own(&self, options: &Options) {
        let directories = [
            "etc/apt/apt.conf.d",
            "etc/apt/preferences.d",
            "etc/apt/sources.list.d",
            "etc/apt/trusted.gpg.d",
            "var/lib/apt/lists/partial",
            "var/cache/apt/archives/partial",
            "var/log/apt",
            "var/lib/dpkg/info",
            "var/lib/dpkg/updates",
            "var/lib/dpkg/triggers",
        ];
        for name in directories {
            fs::create_dir_all(self.root.join(name)).unwrap();
        }
        let status = match options.copy_status_without {
            None => String::new(),
            Some(without) => {
                let all = fs::read("/var/lib/dpkg/status").unwrap();
                let all = String::from_utf8_lossy(&all);
                let stays = |stanza: &&str| !without.iter().any(|name| stanza.starts_with(&format!("Package: {name}\n")));
                all.split("\n\n").filter(stays).fold(String::new(), |text, stanza| text + stanza + "\n\n")
            }
        };
        fs::write(self.root.join("var/lib/dpkg/status"), status).unwrap();
        fs::write(self.root.join("var/lib/dpkg/available"), "").unwrap();
    }

    fn lay_out_trixie(&self) {
        let lower = trixie::root();
        let (upper, work) = (self.directory.path().join("upper"), self.directory.path().join("work"));
        fs::create_dir(&upper).unwrap();
        fs::create_dir(&work).unwrap();
        let data = format!("lowerdir={},upperdir={},workdir={}", lower.display(), upper.display(), work.display());
        let data = std::ffi::CString::new(data).unwrap();
        mount("overlay", &self.root, "overlay", MountFlags::empty(), Some(data.as_c_str())).unwrap();
        mount("proc", self.root.join("proc"), "proc", MountFlags::empty(), None).unwrap();
        mount_bind("/dev", self.root.join("dev")).unwrap();
        for name in ["etc/resolv.conf", "etc/hosts"] {
            fs::copy(Path::new("/").join(name), self.root.join(name)).unwrap();
        }
        for name in ["var/lib/apt/lists/partial", "var/cache/apt/archives/partial"] {
            fs::create_dir_all(self.root.join(name)).unwrap();
        }
    }

    fn write_sources(&self, sources: &Sources<'_>) {
        let parts = self.root.join("etc/apt/sources.list.d");
        let _ = fs::remove_file(self.root.join("etc/apt/sources.list"));
        for old in fs::read_dir(&parts).unwrap() {
            fs::remove_file(old.unwrap().path()).unwrap();
        }
        match sources {
            Sources::Local(repo, mirror) => {
                let key = self.root.join("etc/apt/test-key.gpg");
                fs::copy(repo.key(), &key).unwrap();
                let seen_by_apt = if self.apt == Apt::Trixie { PathBuf::from("/etc/apt/test-key.gpg") } else { key };
                let stanza = format!(
                    "Types: deb\nURIs: {}\nSuites: {}\nComponents: main\nSigned-By: {}\n",
                    mirror.url(),
                    super::repo::SUITE,
                    seen_by_apt.display()
                );
                fs::write(parts.join("test.sources"), stanza).unwrap();
            }
            Sources::DebianBehind(mirror) => {
                let suite = if self.apt == Apt::Trixie { "trixie" } else { "bookworm" };
                let url = mirror.url();
                let signed = "Components: main\nSigned-By: /usr/share/keyrings/debian-archive-keyring.gpg\n";
                let stanza = format!(
                    "Types: deb\nURIs: {url}/debian\nSuites: {suite}\nTargets-Add: Contents-deb\n{signed}\n\
                     Types: deb\nURIs: {url}/debian\nSuites: {suite}-updates\n{signed}\n\
                     Types: deb\nURIs: {url}/debian-security\nSuites: {suite}-security\n{signed}"
                );
                fs::write(parts.join("debian.sources"), stanza).unwrap();
            }
            Sources::Debian if self.apt == Apt::Own => {
                let (name, text) = trixie::debian_sources();
                // A classic list is only read from the place of its name.
                let name = if name == "sources.list" { "debian.list" } else { name };
                fs::write(parts.join(name), text).unwrap();
            }
            Sources::Debian => {
                let stanza = format!(
                    "Types: deb\nURIs: {}\nSuites: trixie\nComponents: main\nSigned-By: /usr/share/keyrings/debian-archive-keyring.gpg\n",
                    trixie::debian_mirror()
                );
                fs::write(parts.join("debian.sources"), stanza).unwrap();
            }
        }
    }

    fn apt_conf(&self, options: &Options) -> String {
        let root = self.root.display();
        let mut conf = format!("Dir \"{root}/\";\nDir::State::status \"{root}/var/lib/dpkg/status\";\n");
        // The machine's way to its mirror, nothing else of its configuration.
        let dump = run(Command::new("apt-config").arg("dump").env("LC_ALL", "C")).ok().out;
        let kept = ["Acquire::http::", "Acquire::https::", "Acquire::Check-", "Acquire::ForceIPv"];
        for line in dump.lines().filter(|line| kept.iter().any(|prefix| line.starts_with(prefix))) {
            writeln!(conf, "{line}").unwrap();
        }
        conf.push_str("Acquire::http::Proxy::127.0.0.1 \"DIRECT\";\nAcquire::http::Proxy::10.99.0.254 \"DIRECT\";\nAcquire::Languages \"none\";\nDebug::Acquire::http \"true\";\n");
        if self.apt == Apt::Own {
            writeln!(conf, "DPkg::Options {{ \"--root={root}\"; \"--log=/dev/null\"; }};").unwrap();
        }
        conf.push_str(&options.apt_conf);
        conf
    }

    fn write_config(&self, options: &Options) {
        let toml = format!(
            "[[mount]]\nrole = \"archives\"\npath = {archives:?}\n\n[[mount]]\nrole = \"lists\"\npath = {lists:?}\n\n\
             [store]\nstate_dir = {state:?}\ncache_dir = {cache:?}\nquota = {quota:?}\n\n[control]\nsocket = {socket:?}\n\n\
             [apt]\nsources = [{sources:?}]\nconfig = {conf:?}\n\n[status]\nlisten = '127.0.0.1:0'\n\n[net]\n{net}{more}",
            archives = self.archives(),
            lists = self.lists(),
            state = self.state_dir(),
            cache = self.cache_dir(),
            quota = options.quota,
            socket = self.socket(),
            sources = self.root.join("etc/apt/sources.list.d"),
            conf = self.apt_conf_path(),
            net = match &self.host {
                None => "listen = \"127.0.0.1:0\"\ndiscovery = false\n".to_owned(),
                Some(host) => format!("listen = \"{}:9977\"\n", host.address),
            },
            more = options.poolfs_toml,
        );
        fs::write(self.config(), toml).unwrap();
    }

    // --- places

    /// What apt sees as `/` of its directories.
    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// A directory of this machine that no part of it uses.
    pub(crate) fn scratch(&self) -> PathBuf {
        let path = self.directory.path().join("scratch");
        fs::create_dir_all(&path).unwrap();
        path
    }

    pub(crate) fn archives(&self) -> PathBuf {
        self.root.join("var/cache/apt/archives")
    }

    pub(crate) fn lists(&self) -> PathBuf {
        self.root.join("var/lib/apt/lists")
    }

    pub(crate) fn config(&self) -> PathBuf {
        self.directory.path().join("poolfs.toml")
    }

    pub(crate) fn state_dir(&self) -> PathBuf {
        self.directory.path().join("poolfs/state")
    }

    /// On the file system of the covered directories.
    pub(crate) fn cache_dir(&self) -> PathBuf {
        self.root.join("var/cache/poolfs")
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.directory.path().join("poolfs/run/control.sock")
    }

    pub(crate) fn apt_conf_path(&self) -> PathBuf {
        self.directory.path().join("apt.conf")
    }

    /// Keys whose signature apt believes.
    pub(crate) fn keyring(&self) -> PathBuf {
        let own = self.root.join("etc/apt/test-key.gpg");
        if own.exists() { own } else { PathBuf::from("/usr/share/keyrings/debian-archive-keyring.gpg") }
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.state_dir().join("poolfs.log")).unwrap_or_default()
    }

    /// A program in this machine's network.
    fn program(&self, program: &str) -> Command {
        self.host.as_ref().map_or_else(|| Command::new(program), |host| host.command(program))
    }

    // --- poolfs

    /// `poolfs COMMAND --config FILE ARGUMENTS`, not started.
    pub(crate) fn poolfs_command(&self, arguments: &[&str]) -> Command {
        let mut command = self.program(env!("CARGO_BIN_EXE_poolfs"));
        // `dht` has commands of its own.
        let words = if arguments.first() == Some(&"dht") { 2 } else { 1 };
        let (first, rest) = arguments.split_at(words);
        command.args(first).arg("--config").arg(self.config()).args(rest);
        command
    }

    pub(crate) fn poolfs(&self, arguments: &[&str]) -> Finished {
        run(&mut self.poolfs_command(arguments))
    }

    /// Mounts both directories; they are mounted when it returns.
    #[track_caller]
    pub(crate) fn up(&self) {
        self.poolfs(&["up"]).ok();
        self.assert_mounted();
    }

    #[track_caller]
    pub(crate) fn down(&self) {
        self.poolfs(&["down"]).ok();
        for path in [self.archives(), self.lists()] {
            assert_eq!(mounts::at(&path).len(), 0, "{} is still mounted after `poolfs down`", path.display());
        }
    }

    #[track_caller]
    pub(crate) fn assert_mounted(&self) {
        for path in [self.archives(), self.lists()] {
            let found = mounts::at(&path);
            assert!(found.len() == 1 && found[0].is_fuse(), "{} should have one FUSE mount: {found:?}", path.display());
        }
    }

    /// Waits until both directories are mounted by a process other than `old`, which has ended.
    #[track_caller]
    pub(crate) fn await_mounted_again(&self, old: u32) {
        // A dead mount looks like a live one in the table: first its end, then the next beginning.
        await_end(old);
        let runtime = self.socket().parent().unwrap().to_owned();
        mounts::await_change("mounted again", &[&runtime], || {
            [self.archives(), self.lists()].iter().all(|path| mounts::at(path).last().is_some_and(mounts::Mount::is_fuse))
                && self.pid().is_some_and(|pid| pid != old)
        });
        self.assert_mounted();
    }

    /// The daemon's process, if one answers.
    pub(crate) fn pid(&self) -> Option<u32> {
        let finished = self.poolfs(&["status", "--json"]);
        finished.status.success().then(|| serde_json::from_str::<Status>(&finished.out).unwrap().pid)
    }

    /// All processes of poolfs on this machine.
    pub(crate) fn pids(&self) -> Vec<u32> {
        let name = Path::new(env!("CARGO_BIN_EXE_poolfs"));
        let ours =
            with_argument(&self.directory.path().to_string_lossy()).into_iter().map(|pid| pid.as_raw_nonzero().get().cast_unsigned());
        ours.filter(|pid| fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|exe| exe == name)).collect()
    }

    #[track_caller]
    pub(crate) fn status(&self) -> Status {
        let finished = self.poolfs(&["status", "--json"]).ok();
        serde_json::from_str(&finished.out).unwrap_or_else(|error| panic!("{error}: {finished}"))
    }

    /// Changes the sources of apt, whose file is the only one.
    pub(crate) fn edit_sources(&self, edit: impl FnOnce(String) -> String) {
        let path = self.root.join("etc/apt/sources.list.d/test.sources");
        let text = fs::read_to_string(&path).unwrap();
        let edited = edit(text.clone());
        assert_ne!(text, edited, "the edit found nothing to change");
        fs::write(&path, edited).unwrap();
    }

    // --- apt

    /// A program as it runs on this machine: with the private apt configuration, in the root of its own if it has one.
    pub(crate) fn command<S: AsRef<OsStr>>(&self, program: &str, arguments: &[S]) -> Command {
        let mut command = match self.apt {
            Apt::Own => self.program(program),
            Apt::Trixie => self.program("chroot"),
        };
        match self.apt {
            Apt::Own => command.env("APT_CONFIG", self.apt_conf_path()),
            Apt::Trixie => command.arg(&self.root).arg(program).env_remove("APT_CONFIG"),
        };
        command.args(arguments).env("LC_ALL", "C").env("DEBIAN_FRONTEND", "noninteractive").env("HOME", "/root");
        command.env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
        command.current_dir("/");
        command
    }

    pub(crate) fn apt_get(&self, arguments: &[&str]) -> Finished {
        run(&mut self.command("apt-get", arguments))
    }

    /// `apt-get update`, which must work.
    #[track_caller]
    pub(crate) fn update(&self) -> Finished {
        let finished = self.update_plainly();
        self.await_catalog();
        finished
    }

    /// The same where nothing is mounted.
    #[track_caller]
    pub(crate) fn update_plainly(&self) -> Finished {
        let finished = self.apt_get(&["update"]).ok();
        let warns = |line: &str| line.starts_with("W: ") || line.starts_with("E: ");
        assert!(!finished.err.lines().any(warns), "warnings: {finished}");
        finished
    }

    /// Waits until the catalog has taken in what lies in the lists: a lookup of a package does.
    pub(crate) fn await_catalog(&self) {
        assert!(!self.archives().join("no-such-package_0_all.deb").exists());
    }

    /// A path as programs of this machine see it.
    pub(crate) fn inside(&self, path: &Path) -> PathBuf {
        match self.apt {
            Apt::Own => path.to_owned(),
            Apt::Trixie => Path::new("/").join(path.strip_prefix(&self.root).unwrap()),
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = self.log();
            let tail = log.len().saturating_sub(16 * 1024);
            eprintln!("--- log of poolfs\n{}", log.get(tail..).unwrap_or(&log));
        }
        // Everything that this machine started names its directory on its command line: the daemon, its parent, apt's methods do not,
        // but end with apt.
        let ours = self.directory.path().to_string_lossy().into_owned();
        let remaining = with_argument(&ours);
        for pid in &remaining {
            let _ = rustix::process::kill_process(*pid, Signal::KILL);
        }
        // A process inside a request of a mount ends when the mount's end is gone, so the mounts go before the wait.
        mounts::detach_below(self.directory.path());
        for pid in remaining {
            if !await_exit(pid, LIMIT) {
                eprintln!("process {pid:?} does not end");
            }
        }
    }
}

/// Waits for the end of a process that is not a child.
#[track_caller]
pub(crate) fn await_end(pid: u32) {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).unwrap();
    assert!(await_exit(pid, LIMIT), "process {pid:?} has not ended");
}

/// A temporary directory on the disk, which apt's unprivileged user can enter.
pub(crate) fn workspace() -> TempDir {
    let directory = tempfile::Builder::new().prefix("poolfs-it-").tempdir_in("/var/tmp").unwrap();
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
    directory
}
