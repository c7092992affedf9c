//! Several machines on one wire: network namespaces on a bridge in a namespace of its own.
//!
//! The namespaces hang on files in a temporary directory, in the test's own mount namespace: they go with its last process.

use super::mounts;
use super::process::run;
use super::workspace;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use std::ffi::OsStr;
use std::fs::File;
use std::net::{Ipv4Addr, TcpListener};
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread::JoinHandle;
use tempfile::TempDir;

/// Where the mirror is, seen from each host.
pub(crate) const HUB: Ipv4Addr = Ipv4Addr::new(10, 99, 0, 254);

/// Beyond the hub, which is a router then: an address on no link of any host.
pub(crate) const STRANGER: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 7);

/// The wire. Dropped last, after its machines.
#[derive(Debug)]
pub(crate) struct Lan {
    home: TempDir,
    hosts: AtomicU8,
}

impl Lan {
    /// A bridge with nobody on it but [`HUB`].
    pub(crate) fn new() -> Self {
        mounts::enter_namespace();
        let lan = Self { home: workspace(), hosts: AtomicU8::new(0) };
        namespace(&lan.hub());
        lan.in_hub(&format!("ip link set lo up; ip link add br0 type bridge; ip addr add {HUB}/24 dev br0; ip link set br0 up"));
        lan
    }

    fn hub(&self) -> PathBuf {
        self.home.path().join("hub.net")
    }

    fn in_hub(&self, script: &str) {
        run(within(&self.hub(), "sh").args(["-euc", script])).ok();
    }

    /// One more machine's place on the wire: 10.99.0.1, .2, ...
    pub(crate) fn host(&self) -> Host {
        let number = self.hosts.fetch_add(1, Ordering::Relaxed) + 1;
        let netns = self.home.path().join(format!("{number}.net"));
        namespace(&netns);
        let address = Ipv4Addr::new(10, 99, 0, number);
        self.in_hub(&format!(
            "ip link add v{number} type veth peer name eth0 netns {}; ip link set v{number} master br0; ip link set v{number} up",
            netns.display()
        ));
        let host = Host { netns, address, hub: self.hub() };
        host.run(&format!("ip link set lo up; ip addr add {address}/24 dev eth0; ip link set eth0 up; ip route add default via {HUB}"));
        host
    }

    /// A socket that hosts reach at [`HUB`]; whoever serves it stays in the test's own namespace.
    pub(crate) fn listen(&self) -> TcpListener {
        listen_within(&self.hub(), HUB)
    }

    /// Puts somebody at [`STRANGER`], and counts what hosts send to him.
    pub(crate) fn let_stranger_in(&self) {
        self.in_hub(&format!(
            "ip addr add {STRANGER}/32 dev lo
             nft 'table ip watch {{ counter datagrams {{ }}; counter connections {{ }}; chain in {{ type filter hook input priority 0;
                 iif br0 ip daddr {STRANGER} meta l4proto udp counter name datagrams;
                 iif br0 ip daddr {STRANGER} tcp flags & (syn|ack) == syn counter name connections; }}; }}'"
        ));
    }

    /// Datagrams, and connections begun, from hosts to [`STRANGER`] so far.
    pub(crate) fn sent_to_stranger(&self) -> [u64; 2] {
        let said = run(within(&self.hub(), "nft").args(["-j", "list", "counters"])).ok().out;
        let said: serde_json::Value = serde_json::from_str(&said).unwrap();
        let count = |name: &str| {
            let counters = said["nftables"].as_array().unwrap().iter().map(|one| &one["counter"]);
            counters.clone().find(|counter| counter["name"] == name).and_then(|counter| counter["packets"].as_u64()).unwrap()
        };
        [count("datagrams"), count("connections")]
    }

    /// A program in the stranger's place. What it sends has another address unless it names [`STRANGER`] as its own.
    pub(crate) fn stranger(&self, program: impl AsRef<OsStr>) -> Command {
        within(&self.hub(), program)
    }

    /// Limits what comes from the hub, the mirror that is, in Mbit/s for all hosts together.
    pub(crate) fn shape_hub(&self, mbit: u32) {
        self.in_hub(&format!("tc qdisc replace dev br0 root tbf rate {mbit}mbit burst {} latency 200ms", burst_bytes(mbit)));
    }
}

/// One machine's place on the wire.
#[derive(Clone, Debug)]
pub(crate) struct Host {
    netns: PathBuf,
    pub(crate) address: Ipv4Addr,
    hub: PathBuf,
}

impl Host {
    /// `program` on this host, not started.
    pub(crate) fn command(&self, program: impl AsRef<OsStr>) -> Command {
        within(&self.netns, program)
    }

    /// Runs a script here, which must work.
    pub(crate) fn run(&self, script: &str) {
        run(self.command("sh").args(["-euc", script])).ok();
    }

    /// A socket at this host's address, see [`Lan::listen`].
    pub(crate) fn listen(&self) -> TcpListener {
        listen_within(&self.netns, self.address)
    }

    /// Runs `f` on a thread of its own whose sockets, and those of threads that it starts, are this host's.
    pub(crate) fn spawn<T: Send + 'static>(&self, f: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
        let netns = File::open(&self.netns).unwrap();
        std::thread::spawn(move || {
            move_into_link_name_space(netns.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
            f()
        })
    }

    /// Limits the link in both directions, in Mbit/s.
    pub(crate) fn shape(&self, mbit: u32) {
        let limit =
            |device: &str| format!("tc qdisc replace dev {device} root tbf rate {mbit}mbit burst {} latency 200ms", burst_bytes(mbit));
        self.run(&limit("eth0"));
        run(within(&self.hub, "sh").args(["-euc", &limit(&self.port())])).ok();
    }

    /// Pulls the plug, or puts it back.
    pub(crate) fn plug(&self, in_place: bool) {
        let state = if in_place { "up" } else { "down" };
        run(within(&self.hub, "ip").args(["link", "set", &self.port(), state])).ok();
    }

    /// The bridge's end of the link.
    fn port(&self) -> String {
        format!("v{}", self.address.octets()[3])
    }
}

/// Some milliseconds of the rate: less would stay below it, more would hide it.
fn burst_bytes(mbit: u32) -> u32 {
    (mbit * 125_000 / 100).max(16_384)
}

fn within(netns: &Path, program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new("nsenter");
    command.arg(format!("--net={}", netns.display())).arg("--").arg(program);
    command
}

fn listen_within(netns: &Path, address: Ipv4Addr) -> TcpListener {
    let netns = File::open(netns).unwrap();
    let bind = move || {
        move_into_link_name_space(netns.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
        TcpListener::bind((address, 0)).unwrap()
    };
    std::thread::spawn(bind).join().unwrap()
}

fn namespace(at: &Path) {
    File::create(at).unwrap();
    run(Command::new("unshare").arg(format!("--net={}", at.display())).arg("true")).ok();
}
