//! The daemon's own node: it joins, tells the network what is here, and never stands in the way of the mounts.

use super::{contacts, find, loopback, options, start, v4};
use crate::harness::{LIMIT, Machine, Options, Package, Stage, report, run};
use poolfs_core::Digest;
use poolfs_net::krpc::Id;
use serde_json::Value;
use std::net::{SocketAddr, UdpSocket};
use std::process::Command;
use std::time::Instant;

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

/// The node as `poolfs status --json` tells of it; null where it does not run.
fn node(machine: &Machine) -> Value {
    serde_json::from_str::<Value>(&machine.poolfs(&["status", "--json"]).ok().out).unwrap()["node"].take()
}

fn key_of(published: &crate::harness::repo::Published) -> Id {
    Id(published.digest.parse::<Digest>().unwrap().file_key())
}

/// A large package that apt fetched is found in the DHT, with the daemon's key; a small one is not; one that is gone is
/// withdrawn. Without it no machine would ever get a byte from another.
#[test]
fn what_is_here_is_announced_and_what_is_gone_is_withdrawn() {
    let runtime = runtime();
    let (neighbour, asker) = runtime.block_on(async { (start(options()).await, start(options()).await) });
    let bootstrap = v4(&neighbour);
    runtime.block_on(asker.bootstrap(vec![bootstrap])).unwrap();
    // No room for objects: what apt removes is gone.
    let options = Options { poolfs_toml: format!("bootstrap = [\"{bootstrap}\"]\n"), quota: "1 KiB", ..Options::default() };
    let packages = vec![Package::new("big", "1.0", 700_000), Package::new("small", "1.0", 3_000)];
    let stage = Stage::mounted(packages, &options);
    stage.download_all().ok();
    let daemon: SocketAddr = node(&stage.machine)["v4"]["listen"].as_str().unwrap().parse().unwrap();
    let [big, small] = [key_of(&stage.packages[0]), key_of(&stage.packages[1])];
    let found = runtime.block_on(find(&asker, big, daemon));
    assert_ne!(found.addr, bootstrap);
    // A later lookup asks a poolfs node for what the holder says of itself.
    let detailed = async { while !contacts(&asker, big).await.iter().any(|contact| contact.addr == daemon && contact.pv.is_some()) {} };
    runtime.block_on(async { tokio::time::timeout(LIMIT, detailed).await }).expect("nobody tells the daemon's key");
    assert_eq!(runtime.block_on(contacts(&asker, small)), [], "a small package is available, not announced");
    assert_eq!(node(&stage.machine)["announced_keys"], 1);

    let mut command = Command::new(env!("CARGO_BIN_EXE_poolfs"));
    let shown = run(command.args(["dht", "status", "--config"]).arg(stage.machine.config())).ok();
    assert!(shown.out.contains(&format!("IPv4: {daemon}, node ")), "{shown}");
    assert!(stage.machine.poolfs(&["status"]).ok().out.contains("1 files announced"));

    stage.machine.apt_get(&["clean"]).ok();
    let withdrawn = async { while !contacts(&asker, big).await.is_empty() {} };
    runtime.block_on(async { tokio::time::timeout(LIMIT, withdrawn).await }).expect("a removed package is still announced");

    // It ends cleanly, and begins again with the same key and the nodes that it knew.
    stage.machine.down();
    assert!(!stage.machine.socket().with_file_name("dht.sock").exists(), "the socket goes with the daemon");
    let toml = std::fs::read_to_string(stage.machine.config()).unwrap();
    std::fs::write(stage.machine.config(), toml.replace(&format!("bootstrap = [\"{bootstrap}\"]"), "bootstrap = []")).unwrap();
    stage.machine.up();
    let begun = Instant::now();
    while node(&stage.machine)["v4"]["nodes"] == 0 {
        assert!(begun.elapsed() < LIMIT, "the saved routing table was not used");
    }
    let restarted = stage.machine.status();
    assert_eq!(restarted.problems, Vec::<String>::new());
    report("dht::daemon", "the daemon announces a large package, withdraws a removed one and rejoins by its saved table");
}

/// A port in use and a damaged database of the network are lines in the status: apt gets its packages all the same.
#[test]
fn the_mounts_do_without_a_network() {
    let stage = Stage::new(vec![Package::new("one", "1.0", 700_000)], &Options::default());
    let taken = UdpSocket::bind(SocketAddr::new(loopback(), 0)).unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let good = std::fs::read_to_string(stage.machine.config()).unwrap();
    std::fs::write(stage.machine.config(), good.replace("listen = \"127.0.0.1:0\"", &format!("listen = \"{address}\""))).unwrap();
    let check = |wanted: &[&str]| {
        stage.machine.up();
        let status = stage.machine.status();
        assert_eq!(node(&stage.machine), Value::Null);
        assert!(
            status.problems.iter().any(|line| wanted.iter().all(|text| line.contains(text))),
            "{wanted:?} is not among {:#?}",
            status.problems
        );
    };
    check(&[&format!("listen on UDP {address}"), "another node runs on this port", "all files come from mirrors", "poolfs up"]);
    stage.machine.update();
    let finished = stage.download_all().ok();
    stage.assert_no_gets(&finished);
    stage.assert_all_here();
    stage.machine.down();

    std::fs::write(stage.machine.config(), &good).unwrap();
    let database = stage.machine.state_dir().join("net/net.db");
    std::fs::write(&database, vec![b'x'; 8192]).unwrap();
    check(&["net.db is corrupt", "move it away", "takes a new key"]);
    stage.assert_all_here();
    stage.machine.down();
    std::fs::remove_file(&database).unwrap();
    stage.machine.up();
    assert_ne!(node(&stage.machine), Value::Null, "the remedy works");
    assert_eq!(stage.machine.status().problems, Vec::<String>::new());
}
