//! Several machines with poolfs on one wire, behind one mirror.

use super::machine::{Apt, Machine, Options, Sources, workspace};
use super::process::{Finished, Running};
use super::repo::{Package, Published, Repo};
use super::stage::assert_holds;
use super::{Host, LIMIT, Lan, Mirror};
use serde::Deserialize;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;
use tempfile::TempDir;

/// What the machines have in common.
#[derive(Clone, Debug, Default)]
pub(crate) struct Terms {
    /// They share a fleet key.
    pub(crate) fleet: bool,
    /// Each machine's link and the mirror's, in Mbit/s.
    pub(crate) mbit: Option<u32>,
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
    names: Vec<String>,
    repo: Option<Repo>,
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
        let key = home.path().join("fleet.key");
        fs::write(&key, "5a".repeat(32)).unwrap();
        let hosts: Vec<Host> = (0..count).map(|_| lan.host()).collect();
        let mut toml = terms.poolfs_toml.clone();
        if terms.fleet {
            toml += &format!("\n[fleet]\nkey_file = {key:?}\n");
        }
        let machine = |host: &Host| {
            let apt = if repo.is_some() { Apt::Own } else { Apt::Trixie };
            let apt_conf = terms.apt_conf.clone();
            let options = Options { apt, apt_conf, host: Some(host.clone()), poolfs_toml: toml.clone(), ..Options::default() };
            let sources = repo.as_ref().map_or(Sources::DebianBehind(&mirror), |repo| Sources::Local(repo, &mirror));
            Machine::new(&sources, &options)
        };
        let machines = hosts.iter().map(machine).collect();
        if let Some(mbit) = terms.mbit {
            lan.shape_hub(mbit);
            hosts.iter().for_each(|host| host.shape(mbit));
        }
        if let Some(mbit) = terms.mirror_mbit {
            lan.shape_hub(mbit);
        }
        Self { machines, hosts, mirror, packages, names, repo, home, lan }
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
        let names = self.names.iter().map(String::as_str);
        let arguments: Vec<&str> = ["install", "-y", "-d"].into_iter().chain(names).collect();
        Running::start(&mut self.machines[machine].command("apt-get", &arguments))
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

    /// Limits what the mirror sends to all machines together, in Mbit/s.
    pub(crate) fn shape_mirror(&self, mbit: u32) {
        self.lan.shape_hub(mbit);
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

fn nodes(status: &super::machine::Status) -> u64 {
    status.node.as_ref().and_then(|node| node.v4.as_ref()).map_or(0, |family| family.nodes)
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
