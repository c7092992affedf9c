//! Several machines with poolfs on one wire, behind one mirror.

use super::machine::{Apt, Machine, Options, Sources, workspace};
use super::process::{Finished, Running};
use super::repo::{Package, Published, Repo};
use super::stage::assert_holds;
use super::{Host, LIMIT, Lan, Mirror, verify};
use serde::Deserialize;
use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// One machine's link; what is not said is not limited.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Link {
    /// What comes from the machine, in Mbit/s.
    pub(crate) up_mbit: Option<u32>,
    /// What comes to it, in Mbit/s.
    pub(crate) down_mbit: Option<u32>,
    /// How much longer each packet takes, in each direction.
    pub(crate) delay_ms: u64,
    /// Packets lost in each direction.
    pub(crate) loss_percent: u32,
}

/// What a link has that is not shaped, in Mbit/s.
pub(crate) const FAST_MBIT: u32 = 40_000;

/// What the machines have in common.
#[derive(Clone, Debug, Default)]
pub(crate) struct Terms {
    /// They share a fleet key.
    pub(crate) fleet: bool,
    /// Each machine's link.
    pub(crate) link: Link,
    /// The mirror's link alone, in Mbit/s.
    pub(crate) mirror_mbit: Option<u32>,
    /// More lines for `[net]` and the sections after it.
    pub(crate) poolfs_toml: String,
    /// More lines for apt's configuration.
    pub(crate) apt_conf: String,
}

/// One row of `poolfs peers --json`.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Peer {
    pub(crate) address: String,
    /// Bytes that it gave since the start.
    pub(crate) bytes: u64,
    /// Bad pieces held against it.
    #[serde(default)]
    pub(crate) bad: u32,
    /// False lists that it handed over.
    #[serde(default)]
    pub(crate) false_lists: u32,
    /// Nothing is asked of it until then.
    #[serde(default)]
    pub(crate) out_until: u64,
}

/// Dropped in this order: machines before the mirror before the wire.
#[derive(Debug)]
pub(crate) struct Crowd {
    pub(crate) machines: Vec<Machine>,
    pub(crate) hosts: Vec<Host>,
    pub(crate) mirror: Mirror,
    /// What the test's own repository holds; none of the real archive.
    pub(crate) packages: Vec<Published>,
    /// What everybody installs.
    pub(crate) names: Vec<String>,
    repo: Option<Repo>,
    terms: Terms,
    home: TempDir,
    lan: Lan,
}

impl Crowd {
    /// `count` machines that install everything of a repository of these packages; nothing is mounted yet.
    pub(crate) fn new(count: usize, packages: Vec<Package>, terms: &Terms) -> Self {
        let lan = Lan::new();
        let home = workspace();
        let mut repo = Repo::new(home.path());
        let packages: Vec<Published> = packages.into_iter().map(|package| repo.add(package)).collect();
        repo.publish();
        let mirror = Mirror::at(lan.listen(), repo.root());
        let names = packages.iter().map(|published| published.package.name.clone()).collect();
        Self::of(count, lan, home, mirror, Some(repo), packages, names, terms)
    }

    /// `count` machines with apt 3.0 that install these packages of the real archive.
    pub(crate) fn debian(count: usize, names: &[&str], terms: &Terms) -> Self {
        let lan = Lan::new();
        let mirror = Mirror::debian(lan.listen());
        let names = names.iter().map(|name| (*name).to_owned()).collect();
        Self::of(count, lan, workspace(), mirror, None, Vec::new(), names, terms)
    }

    #[allow(clippy::too_many_arguments, reason = "the parts of one value")]
    fn of(
        count: usize,
        lan: Lan,
        home: TempDir,
        mirror: Mirror,
        repo: Option<Repo>,
        packages: Vec<Published>,
        names: Vec<String>,
        terms: &Terms,
    ) -> Self {
        fs::write(home.path().join("fleet.key"), "5a".repeat(32)).unwrap();
        let delay = Duration::from_millis(terms.link.delay_ms);
        let hosts = (0..count).map(|_| lan.host_after(delay)).collect();
        let mut crowd = Self { machines: Vec::new(), hosts, mirror, packages, names, repo, terms: terms.clone(), home, lan };
        crowd.machines = crowd.more_machines(&crowd.hosts, "", "");
        crowd.hosts.iter().for_each(|host| limit(host, terms.link));
        if let Some(mbit) = terms.mirror_mbit {
            crowd.lan.shape_hub(mbit);
        }
        crowd
    }

    /// Places behind the hub, see [`Lan::far_host`].
    pub(crate) fn far_hosts(&self, count: usize, link: Link) -> Vec<Host> {
        let host = |_| {
            let host = self.lan.far_host(Duration::from_millis(link.delay_ms));
            limit(&host, link);
            host
        };
        (0..count).map(host).collect()
    }

    /// Limits the machines' links from now on; delays are made with the links.
    pub(crate) fn limit_links(&self, link: Link) {
        self.hosts.iter().for_each(|host| limit(host, link));
    }

    /// Machines that have nothing, at these places, with more lines for apt's configuration and poolfs's `[net]`. All machines are made
    /// before anything is mounted on one of them: each gets the mounts that its maker sees.
    pub(crate) fn more_machines(&self, hosts: &[Host], apt_conf: &str, poolfs_toml: &str) -> Vec<Machine> {
        let mut toml = format!("{poolfs_toml}{}", self.terms.poolfs_toml);
        if self.terms.fleet {
            toml += &format!("\n[fleet]\nkey_file = {:?}\n", self.fleet_key());
        }
        let machine = |host: &Host| {
            let apt = if self.repo.is_some() { Apt::Own } else { Apt::Trixie };
            let apt_conf = format!("{}{apt_conf}", self.terms.apt_conf);
            let options = Options { apt, apt_conf, host: Some(host.clone()), poolfs_toml: toml.clone(), ..Options::default() };
            let sources = self.repo.as_ref().map_or(Sources::DebianBehind(&self.mirror), |repo| Sources::Local(repo, &self.mirror));
            Machine::new(&sources, &options)
        };
        hosts.iter().map(machine).collect()
    }

    /// Cuts these machines off from the others, not from the mirror; none: mends it.
    pub(crate) fn cut_off(&self, machines: &[usize]) {
        self.lan.cut_off(&machines.iter().map(|at| &self.hosts[*at]).collect::<Vec<_>>());
    }

    /// Mounts on all machines, waits until they know each other, and updates apt's lists through the mounts.
    #[track_caller]
    pub(crate) fn up(&self, fleet: bool) {
        self.start(fleet);
        for machine in &self.machines {
            machine.update();
        }
        self.mirror.forget_log();
    }

    /// Mounts on all machines, and waits until they know each other.
    #[track_caller]
    pub(crate) fn start(&self, fleet: bool) {
        self.machines.iter().for_each(Machine::up);
        self.await_acquainted(fleet);
    }

    /// Waits until each machine knows all others.
    #[track_caller]
    pub(crate) fn await_acquainted(&self, fleet: bool) {
        let others = self.machines.len() as u64 - 1;
        for machine in &self.machines {
            await_status(machine, "knows the others", |status| if fleet { status.fleet_members > others } else { nodes(status) >= others });
        }
    }

    /// `apt-get install -y -d` of everything in the repository, started on that machine.
    pub(crate) fn start_download(&self, machine: usize) -> Running {
        self.start_download_on(&self.machines[machine])
    }

    /// The same on any machine of [`Self::more_machines`].
    pub(crate) fn start_download_on(&self, machine: &Machine) -> Running {
        let names = self.names.iter().map(String::as_str);
        let arguments: Vec<&str> = ["install", "-y", "-d"].into_iter().chain(names).collect();
        Running::start(&mut machine.command("apt-get", &arguments))
    }

    #[track_caller]
    pub(crate) fn download(&self, machine: usize) -> Finished {
        let finished = self.start_download(machine).wait();
        self.assert_all_here(machine);
        finished.ok()
    }

    /// Fails unless every package is on that machine with the bytes of the repository.
    #[track_caller]
    pub(crate) fn assert_all_here(&self, machine: usize) {
        for published in &self.packages {
            assert_holds(&self.machines[machine].archives().join(published.archive_name()), &published.bytes);
        }
    }

    /// Fails unless everything is on that machine as the signed index there says.
    #[track_caller]
    pub(crate) fn assert_as_signed(&self, machine: &Machine) {
        let verified = verify::assert_as_signed(machine);
        assert!(verified >= self.names.len(), "{verified} packages of {}", self.names.len());
    }

    /// Limits what the mirror sends to all machines together, in Mbit/s.
    pub(crate) fn shape_mirror(&self, mbit: u32) {
        self.lan.shape_hub(mbit);
    }

    /// Publishes these packages beside the others, as a security suite does, and has everybody install them from now on.
    pub(crate) fn publish_packages(&mut self, debs: &[PathBuf]) {
        let repo = self.repo();
        let new: Vec<Published> = debs.iter().map(|deb| repo.add_file(deb)).collect();
        repo.publish();
        self.names = new.iter().map(|published| published.package.name.clone()).collect();
        self.packages = new;
    }

    /// The test's own repository.
    pub(crate) fn repo(&mut self) -> &mut Repo {
        self.repo.as_mut().expect("a repository of its own")
    }

    /// What the mirror serves.
    pub(crate) fn mirror_root(&self) -> &Path {
        self.repo.as_ref().expect("a repository of its own").root()
    }

    /// Bytes of all packages.
    pub(crate) fn plan_bytes(&self) -> u64 {
        self.packages.iter().map(|published| published.bytes.len() as u64).sum()
    }

    /// Body bytes of packages that the mirror sent to that machine.
    pub(crate) fn mirror_bytes(&self, machine: usize) -> u64 {
        self.mirror_bytes_of(machine, |path| path.ends_with(".deb"))
    }

    /// Body bytes that the mirror sent to that machine for paths that count.
    pub(crate) fn mirror_bytes_of(&self, machine: usize, counts: impl Fn(&str) -> bool) -> u64 {
        let from = std::net::IpAddr::from(self.hosts[machine].address);
        let log = self.mirror.log();
        log.iter().filter(|request| request.from == from && counts(&request.path)).map(|request| request.body_bytes).sum()
    }

    /// What that machine remembers of the others.
    #[track_caller]
    pub(crate) fn peers(&self, machine: usize) -> Vec<Peer> {
        let said = self.machines[machine].poolfs(&["peers", "--json"]).ok();
        serde_json::from_str(&said.out).unwrap_or_else(|error| panic!("{error}: {said}"))
    }

    /// The machines that this one has convicted of wrong bytes, or of a false list of them.
    #[track_caller]
    pub(crate) fn convicted_by(&self, machine: usize) -> Vec<usize> {
        let peers = self.peers(machine);
        let guilty = |host: &Host| {
            let start = format!("{}:", host.address);
            peers.iter().any(|peer| peer.address.starts_with(&start) && (peer.bad > 0 || peer.false_lists > 0 || peer.out_until > 0))
        };
        (0..self.hosts.len()).filter(|at| guilty(&self.hosts[*at])).collect()
    }

    /// The fleet's key, as the machines were given it.
    pub(crate) fn fleet_key(&self) -> PathBuf {
        self.home.path().join("fleet.key")
    }

    /// Bytes that each machine gave to that one, by its own words.
    #[track_caller]
    pub(crate) fn given_to(&self, machine: usize) -> Vec<u64> {
        let peers = self.peers(machine);
        let of = |host: &Host| {
            let start = format!("{}:", host.address);
            peers.iter().filter(|peer| peer.address.starts_with(&start)).map(|peer| peer.bytes).sum()
        };
        self.hosts.iter().map(of).collect()
    }
}

fn limit(host: &Host, link: Link) {
    if link.up_mbit.or(link.down_mbit).is_some() {
        host.shape_each(link.up_mbit.unwrap_or(FAST_MBIT), link.down_mbit.unwrap_or(FAST_MBIT));
    }
    if link.loss_percent > 0 {
        host.lose(link.loss_percent);
    }
}

/// Bytes of packages that a mirror with this log has given, each counted once however often it was sent: what all machines together
/// have of it.
pub(crate) fn covered(log: &[super::mirror::Request]) -> u64 {
    let mut parts: HashMap<&str, Vec<(u64, u64)>> = HashMap::new();
    for request in log.iter().filter(|request| request.path.ends_with(".deb") && matches!(request.status, 200 | 206)) {
        let first = request.range.as_deref().and_then(|range| range.strip_prefix("bytes=")?.split('-').next()?.parse().ok()).unwrap_or(0);
        parts.entry(&request.path).or_default().push((first, first + request.body_bytes));
    }
    let of_one = |mut parts: Vec<(u64, u64)>| {
        parts.sort_unstable();
        parts.into_iter().fold((0, 0), |(sum, until), (first, end)| (sum + end.saturating_sub(first.max(until)), until.max(end))).0
    };
    parts.into_values().map(of_one).sum()
}

fn nodes(status: &super::machine::Status) -> u64 {
    status.node.as_ref().and_then(|node| node.v4.as_ref()).map_or(0, |family| family.nodes)
}

/// Waits until a machine knows a fleet of so many, and its members have been told of everything that it may give them.
#[track_caller]
pub(crate) fn await_fleet_told(machine: &Machine, members: usize) {
    await_status(machine, "has told its fleet", |status| {
        let shared: u64 = status.mounts.iter().map(|mount| mount.announced + mount.available + mount.withheld).sum();
        status.fleet_members == members as u64 && status.fleet_told >= shared
    });
}

/// Waits until the machine's status satisfies `wanted`.
#[track_caller]
pub(crate) fn await_status(machine: &Machine, what: &str, wanted: impl Fn(&super::machine::Status) -> bool) {
    let deadline = Instant::now() + LIMIT;
    loop {
        // A program's start is pause enough between two looks.
        let status = machine.status();
        if wanted(&status) {
            return;
        }
        assert!(Instant::now() < deadline, "{what}: not within {LIMIT:?}: {status:#?}");
    }
}

/// Kills the process that serves that machine's mounts, and with it the one that speaks to others.
pub(crate) fn kill_daemon(machine: &Machine) {
    let pid = i32::try_from(machine.status().pid).unwrap();
    rustix::process::kill_process(rustix::process::Pid::from_raw(pid).unwrap(), rustix::process::Signal::KILL).unwrap();
}
