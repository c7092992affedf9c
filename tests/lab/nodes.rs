//! The light mode: daemons that mount nothing, hundreds of them, as nodes of the DHT or members of a fleet.

use super::outcome::{Figure, Outcome};
use super::raw::cpu_seconds;
use super::scenario::{Nodes, Scenario};
use super::{crowd, limit, up};
use crate::harness::crowd::{Crowd, await_status};
use crate::harness::lan::far_address;
use crate::harness::machine::Machine;
use crate::harness::{Host, LIMIT, Running};
use rustix::process::Signal;
use serde::Deserialize;
use std::fs;
use std::io::Read as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Instant;
use tempfile::TempDir;

const PORT: u16 = 9977;

/// Others that a node knows when it has joined: the length of a bucket.
const KNOWN: u64 = 8;

/// Nodes that run; they end with this value.
#[derive(Debug, Default)]
pub(crate) struct Light {
    nodes: Vec<Node>,
    home: Option<TempDir>,
}

#[derive(Debug)]
struct Node {
    host: Host,
    socket: PathBuf,
    running: Running,
}

/// What a node says of itself.
#[derive(Debug, Deserialize)]
struct Status {
    v4: Option<Family>,
    fleet_members: u64,
    bytes_out: u64,
}

#[derive(Debug, Deserialize)]
struct Family {
    nodes: u64,
}

/// What `poolfs dht lookup --json` says.
#[derive(Debug, Deserialize)]
struct Lookup {
    contacts: Vec<serde_json::Value>,
    queries: u64,
    first_after_us: Option<u64>,
    took_us: u64,
}

/// The line of poolfs's configuration by which machines join the nodes.
pub(crate) fn bootstrap() -> String {
    format!("bootstrap = [\"{}:{PORT}\"]\n", far_address(1))
}

impl Light {
    pub(crate) fn len(&self) -> usize {
        self.nodes.len()
    }

    fn start(crowd: &Crowd, scenario: &Scenario, count: usize, fleet: bool) -> Self {
        let home = crate::harness::workspace();
        let hosts = crowd.far_hosts(count, scenario.machines.link);
        let nodes = hosts.into_iter().map(|host| Node::start(crowd, host, home.path(), fleet)).collect();
        Self { nodes, home: Some(home) }
    }
}

impl Node {
    fn start(crowd: &Crowd, host: Host, home: &Path, fleet: bool) -> Self {
        let home = home.join(host.address.to_string());
        fs::create_dir(&home).unwrap();
        let (socket, config) = (home.join("dht.sock"), home.join("poolfs.toml"));
        let mut toml = format!(
            "[store]\nstate_dir = {home:?}\n[control]\nsocket = {:?}\n[net]\nlisten = \"{}:{PORT}\"\ndiscovery = false\n{}",
            home.join("control.sock"),
            host.address,
            bootstrap(),
        );
        if fleet {
            toml += &format!("[fleet]\nkey_file = {:?}\nseeds = [\"{}\"]\n", crowd.fleet_key(), far_address(1));
        }
        fs::write(&config, toml).unwrap();
        let mut command = host.command(env!("CARGO_BIN_EXE_poolfs"));
        command.args(["dht", "node", "--json", "--config"]).arg(config).arg("--socket").arg(&socket);
        let running = Running::start(&mut command);
        Self { host, socket, running }
    }

    /// `None` until it listens.
    fn status(&self) -> Option<Status> {
        let mut text = String::new();
        UnixStream::connect(&self.socket).ok()?.read_to_string(&mut text).ok()?;
        serde_json::from_str(&text).ok()
    }

    fn await_status(&self, what: &str, wanted: impl Fn(&Status) -> bool) {
        let deadline = Instant::now() + LIMIT;
        loop {
            let status = self.status();
            if status.as_ref().is_some_and(&wanted) {
                return;
            }
            assert!(Instant::now() < deadline, "{what}: not within {LIMIT:?}: {status:?}, {:?}", self.running.said());
            // Each node answers at once, and there is nothing to wait on.
            std::thread::yield_now();
        }
    }
}

/// The scenario's nodes beside its machines, joined to each other; none where it wants none.
pub(crate) fn start_beside(crowd: &Crowd, scenario: &Scenario) -> Light {
    let count = scenario.machines.nodes;
    let nodes = if count == 0 { Light::default() } else { Light::start(crowd, scenario, count, false) };
    for node in &nodes.nodes {
        node.await_status("knows other nodes", |status| known(status) >= KNOWN.min(count as u64 - 1));
    }
    nodes
}

fn known(status: &Status) -> u64 {
    status.v4.as_ref().map_or(0, |family| family.nodes)
}

/// The machine has joined them.
pub(crate) fn await_joined(machine: &Machine, nodes: usize) {
    let wanted = KNOWN.min(nodes as u64);
    await_status(machine, "knows nodes", |status| {
        status.node.as_ref().and_then(|node| node.v4.as_ref()).map_or(0, |family| family.nodes) >= wanted
    });
}

#[allow(clippy::cast_precision_loss, reason = "figures to print")]
pub(crate) fn play(scenario: &Scenario, work: &Nodes) -> Outcome {
    let crowd = crowd(scenario);
    limit(&crowd, scenario);
    let began = Instant::now();
    let mut nodes = Light::start(&crowd, scenario, work.count, work.fleet);
    let mut figures = vec![Figure::new("daemons started after", began.elapsed().as_secs_f64(), "s")];
    for node in &nodes.nodes {
        node.await_status("knows other nodes", |status| known(status) >= KNOWN.min(work.count as u64 - 1));
    }
    figures.push(Figure::new("each knows eight others after", began.elapsed().as_secs_f64(), "s"));
    if work.fleet {
        for node in &nodes.nodes {
            node.await_status("knows the whole fleet", |status| status.fleet_members == work.count as u64);
        }
        figures.push(Figure::new("each knows the whole fleet after", began.elapsed().as_secs_f64(), "s"));
    }
    let sent: u64 = nodes.nodes.iter().map(|node| node.status().map_or(0, |status| status.bytes_out)).sum();
    let pids: Vec<u32> = nodes.nodes.iter().map(|node| node.running.id()).collect();
    figures.push(Figure::new("sent by one node until then", sent as f64 / nodes.len() as f64 / 1000.0, "KB"));
    figures.push(Figure::new("processor time of one node until then", cpu_seconds(&pids) / nodes.len() as f64, "s"));
    figures.push(Figure::new("memory of one node (PSS)", super::cost::pss_bytes(&pids) as f64 / nodes.len() as f64 / 1e6, "MB"));
    for index in 0..work.count * work.dead_percent / 100 {
        // Spread over the addresses; the first stays, since all join by it.
        let at = 1 + index * 100 / work.dead_percent % (work.count - 1);
        nodes.nodes[at].running.signal(Signal::KILL);
    }
    if work.lookups > 0 {
        figures.extend(lookups(&crowd, scenario, work, &mut nodes));
    }
    Outcome { figures, ..Outcome::default() }
}

/// One machine announces its package, others look for it.
#[allow(clippy::cast_precision_loss, reason = "figures to print")]
fn lookups(crowd: &Crowd, scenario: &Scenario, work: &Nodes, nodes: &mut Light) -> Vec<Figure> {
    up(&crowd.machines, scenario.machines.fleet, crowd.machines.len());
    await_joined(&crowd.machines[0], work.count);
    crowd.download(0);
    await_status(&crowd.machines[0], "announces", |status| status.node.as_ref().is_some_and(|node| node.announced_keys > 0));
    let alive: Vec<&Node> = nodes.nodes.iter().filter(|node| node.status().is_some()).collect();
    let entry = format!("{}:{PORT}", far_address(1));
    let one = |index: usize| {
        let digest = crowd.packages[0].digest.as_str();
        let mut command = alive[index * 7 % alive.len()].host.command(env!("CARGO_BIN_EXE_poolfs"));
        command.args(["dht", "lookup", digest, "--json", "--no-discovery", "--bootstrap", &entry, "--config", "/dev/null"]);
        let said = Running::start(&mut command).wait();
        serde_json::from_str::<Lookup>(&said.out).unwrap_or_else(|error| panic!("{error}: {said}"))
    };
    let all: Vec<Lookup> = (0..work.lookups).map(one).collect();
    let found = all.iter().filter(|lookup| !lookup.contacts.is_empty()).count();
    let mut first: Vec<u64> = all.iter().map(|lookup| lookup.first_after_us.unwrap_or(lookup.took_us)).collect();
    first.sort_unstable();
    let at = |percent: usize| first[(first.len() * percent / 100).min(first.len() - 1)] as f64 / 1000.0;
    let queries: u64 = all.iter().map(|lookup| lookup.queries).sum();
    vec![
        Figure::new("lookups that found the holder", found as f64 * 100.0 / all.len() as f64, "%"),
        Figure::new("first contact, p50", at(50), "ms"),
        Figure::new("first contact, p95", at(95), "ms"),
        Figure::new("queries of a lookup by who knows one node", queries as f64 / all.len() as f64, ""),
    ]
}
