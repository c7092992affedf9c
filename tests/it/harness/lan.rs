//! Several machines on one wire: network namespaces on a bridge in a namespace of its own.
//!
//! The namespaces hang on files in a temporary directory, in the test's own mount namespace: they go with its last process.

use super::mounts;
use super::process::run;
use super::relay::Relay;
use super::sys;
use super::{listed, workspace};
use rustix::mount::{UnmountFlags, unmount};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use std::ffi::OsStr;
use std::fs::File;
use std::net::{Ipv4Addr, TcpListener};
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;
use tempfile::TempDir;

/// Where the mirror is, seen from each host.
pub(crate) const HUB: Ipv4Addr = Ipv4Addr::new(10, 99, 0, 254);

/// Where it is listened to. apt-cacher-ng 3.7.4 connects to another port than it was told where that is over 32,767.
const HUB_PORT: u16 = 8080;

/// Beyond the hub, which is a router then: an address on no link of any host.
pub(crate) const STRANGER: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 7);

/// The wire. Dropped last, after its machines.
#[derive(Debug)]
pub(crate) struct Lan {
    home: TempDir,
    hosts: AtomicU16,
    far_hosts: AtomicU16,
}

/// Addresses that hosts have in one block of 256: [`HUB`] is in none of them.
const BLOCK: u16 = 250;

/// Where a far host is that has this number, from 1 on.
pub(crate) fn far_address(number: u16) -> Ipv4Addr {
    address_in(98, number)
}

fn address_in(network: u8, number: u16) -> Ipv4Addr {
    let (block, within_block) = ((number - 1) / BLOCK, (number - 1) % BLOCK + 1);
    Ipv4Addr::new(10, network, u8::try_from(block).expect("a small wire"), u8::try_from(within_block).expect("below 251"))
}

impl Drop for Lan {
    /// A file on which a namespace is mounted cannot be removed.
    fn drop(&mut self) {
        for name in listed(self.home.path()).into_iter().filter(|name| name.ends_with(".net")) {
            let at = self.home.path().join(name);
            if let Err(err) = unmount(&at, UnmountFlags::DETACH) {
                eprintln!("{} is left mounted: {err}", at.display());
            }
        }
    }
}

impl Lan {
    /// A bridge with nobody on it but [`HUB`].
    pub(crate) fn new() -> Self {
        mounts::enter_namespace();
        let lan = Self { home: workspace(), hosts: AtomicU16::new(0), far_hosts: AtomicU16::new(0) };
        namespace(&lan.hub());
        lan.in_hub(&format!(
            "ip link set lo up; ip link add br0 type bridge; ip addr add {HUB}/16 dev br0; ip link set br0 up; echo 1 >/proc/sys/net/ipv4/ip_forward"
        ));
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
        self.host_after(Duration::ZERO)
    }

    /// The same, for whom every frame takes that much longer, in each direction.
    pub(crate) fn host_after(&self, delay: Duration) -> Host {
        let number = self.hosts.fetch_add(1, Ordering::Relaxed) + 1;
        let host = self.plug_in(format!("v{number}"), address_in(99, number), false, delay);
        let port = &host.port;
        self.in_hub(&format!("ip link set {port} master br0; ip link set {port} up"));
        let address = host.address;
        host.run(&format!("ip link set lo up; ip addr add {address}/16 dev eth0; ip link set eth0 up; ip route add default via {HUB}"));
        host
    }

    /// A place that is not on the bridge but behind the hub as its router, at [`far_address`] of 1, 2, ...: hundreds of them would fill
    /// the kernel's one table of neighbours if each knew the others.
    pub(crate) fn far_host(&self, delay: Duration) -> Host {
        let number = self.far_hosts.fetch_add(1, Ordering::Relaxed) + 1;
        let host = self.plug_in(format!("f{number}"), far_address(number), true, delay);
        let (port, address) = (&host.port, host.address);
        self.in_hub(&format!("ip addr add {HUB}/32 dev {port}; ip link set {port} up; ip route add {address}/32 dev {port}"));
        host.run(&format!(
            "ip link set lo up; ip addr add {address}/32 dev eth0; ip link set eth0 up; ip route add {HUB}/32 dev eth0; ip route add default via {HUB}"
        ));
        host
    }

    fn plug_in(&self, port: String, address: Ipv4Addr, far: bool, delay: Duration) -> Host {
        let netns = self.home.path().join(format!("{port}.net"));
        namespace(&netns);
        let relay = if delay.is_zero() {
            self.in_hub(&format!("ip link add {port} type veth peer name eth0 netns {}", netns.display()));
            None
        } else {
            let (near, far) = (tap_within(&netns, "eth0"), tap_within(&self.hub(), &port));
            Some(Arc::new(Relay::new(near, far, delay)))
        };
        Host { netns, address, hub: self.hub(), port, far, _relay: relay }
    }

    /// Cuts the wire between these hosts and all others, the hub not among them; none: mends it.
    pub(crate) fn cut_off(&self, hosts: &[&Host]) {
        // The first time there is none to delete.
        self.in_hub("nft delete table bridge cut 2>/dev/null || true");
        if hosts.is_empty() {
            return;
        }
        let ports = hosts.iter().map(|host| format!("\"{}\"", host.port)).collect::<Vec<_>>().join(", ");
        self.in_hub(&format!(
            "nft 'table bridge cut {{ chain forward {{ type filter hook forward priority 0; \
             iifname {{ {ports} }} oifname != {{ {ports} }} drop; iifname != {{ {ports} }} oifname {{ {ports} }} drop; }}; }}'"
        ));
    }

    /// A socket that hosts reach at [`HUB`]; whoever serves it stays in the test's own namespace.
    pub(crate) fn listen(&self) -> TcpListener {
        listen_within(&self.hub(), (HUB, HUB_PORT))
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
    /// The hub's end of its link.
    port: String,
    /// See [`Lan::far_host`].
    far: bool,
    /// What makes it slow to answer; it ends with the last clone.
    _relay: Option<Arc<Relay>>,
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
        listen_within(&self.netns, (self.address, 0))
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
        self.shape_each(mbit, mbit);
    }

    /// Limits what comes from this host and what comes to it, in Mbit/s.
    pub(crate) fn shape_each(&self, up_mbit: u32, down_mbit: u32) {
        let limit = |device: &str, mbit: u32| {
            format!("tc qdisc replace dev {device} root tbf rate {mbit}mbit burst {} latency 200ms", burst_bytes(mbit))
        };
        self.run(&limit("eth0", up_mbit));
        self.in_hub(&limit(&self.port, down_mbit));
    }

    /// Loses this share of the IP packets that come from this host, and of those that come to it. On the bridge: a sender is not told.
    pub(crate) fn lose(&self, percent: u32) {
        let (port, family) = (&self.port, if self.far { "inet" } else { "bridge" });
        let rule = |direction: &str| format!("{direction} \"{port}\" meta protocol ip numgen random mod 100 < {percent} drop");
        self.in_hub(&format!(
            "nft 'table {family} loss_{port} {{ chain from {{ type filter hook prerouting priority 0; {}; }}; \
             chain to {{ type filter hook postrouting priority 0; {}; }}; }}'",
            rule("iifname"),
            rule("oifname"),
        ));
    }

    /// Pulls the plug, or puts it back.
    pub(crate) fn plug(&self, in_place: bool) {
        let state = if in_place { "up" } else { "down" };
        run(within(&self.hub, "ip").args(["link", "set", &self.port, state])).ok();
    }

    fn in_hub(&self, script: &str) {
        run(within(&self.hub, "sh").args(["-euc", script])).ok();
    }
}

/// Some milliseconds of the rate: less would stay below it, more would hide it.
fn burst_bytes(mbit: u32) -> u64 {
    (u64::from(mbit) * 125_000 / 100).max(16_384)
}

fn within(netns: &Path, program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new("nsenter");
    command.arg(format!("--net={}", netns.display())).arg("--").arg(program);
    command
}

fn listen_within(netns: &Path, address: (Ipv4Addr, u16)) -> TcpListener {
    inside(netns, move || TcpListener::bind(address).unwrap())
}

/// A network device of that name whose frames come to the test.
fn tap_within(netns: &Path, name: &str) -> File {
    let name = name.to_owned();
    inside(netns, move || sys::tap(&name).expect("a TAP device (/dev/net/tun)"))
}

fn inside<T: Send + 'static>(netns: &Path, f: impl FnOnce() -> T + Send + 'static) -> T {
    let netns = File::open(netns).unwrap();
    let enter = move || {
        move_into_link_name_space(netns.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
        f()
    };
    std::thread::spawn(enter).join().unwrap()
}

fn namespace(at: &Path) {
    File::create(at).unwrap();
    run(Command::new("unshare").arg(format!("--net={}", at.display())).arg("true")).ok();
}
