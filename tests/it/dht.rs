//! The DHT against other implementations and over real sockets.
//!
//! libtorrent's nodes live in child processes ([`libtorrent`]), `mainline`'s and poolfs's in the test. Every IPv4 node
//! has a loopback address of its own, since libtorrent counts and blocks by address, and poolfs limits by it.

mod command;
mod daemon;
mod fifty;
mod interop;
mod libtorrent;
mod link;
mod public;

use futures_util::future::join_all;
use poolfs_net::dht::{AnnounceKey, Event, Family, FoundContact, Network};
use poolfs_net::krpc::{Id, Pv};
use poolfs_net::node::{Dht, Finding, NodeOptions};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use tokio::sync::broadcast;

/// A loopback address that no other node of this run has.
fn loopback() -> IpAddr {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let n = NEXT.fetch_add(1, Ordering::Relaxed) + (std::process::id() << 8);
    let [_, b, c, d] = n.to_be_bytes();
    // 127.0/16 is the machine's own; .0 and .255 look like networks.
    Ipv4Addr::new(127, b.max(1), c, d.clamp(1, 254)).into()
}

fn options() -> NodeOptions {
    NodeOptions::new(vec![SocketAddr::new(loopback(), 0)], Network::Private)
}

async fn start(options: NodeOptions) -> Dht {
    Dht::start(options, None).await.unwrap()
}

fn v4(dht: &Dht) -> SocketAddr {
    dht.local(Family::V4).unwrap()
}

fn v6(dht: &Dht) -> SocketAddr {
    dht.local(Family::V6).unwrap()
}

/// A key that nothing else of this run is announced under.
fn key(n: u8) -> Id {
    // SHA-1-like: close to no node in particular.
    Id(std::array::from_fn(|at| n.wrapping_mul(57).wrapping_add(u8::try_from(at).unwrap().wrapping_mul(31))))
}

fn pv(dht: &Dht) -> Pv {
    Pv { key: dht.signing_key().verifying_key().to_bytes(), flags: 1, deltas: Vec::new() }
}

/// Announces `keys` and waits until each has been taken by a node.
async fn announce(dht: &Dht, keys: &[Id]) {
    let mut events = dht.events();
    let announces = keys.iter().map(|key| AnnounceKey { key: *key, pv: Some(pv(dht)) }).collect();
    dht.set_announces(announces).await.unwrap();
    let mut missing = keys.to_vec();
    while !missing.is_empty() {
        match events.recv().await {
            Ok(Event::Announced { key, nodes }) if nodes > 0 => missing.retain(|other| *other != key),
            Ok(_) | Err(broadcast::error::RecvError::Lagged(_)) => {}
            Err(broadcast::error::RecvError::Closed) => panic!("the node ended"),
        }
    }
}

/// Everything one lookup finds, each contact once, with its `pv` where somebody gave one.
async fn contacts(dht: &Dht, key: Id) -> Vec<FoundContact> {
    let (findings, _) = dht.get_peers(key).await.unwrap().collect().await.unwrap();
    let mut found: Vec<FoundContact> = Vec::new();
    for finding in findings {
        let Finding::Contacts(contacts) = finding else { panic!("{finding:?}") };
        for contact in contacts {
            match found.iter_mut().find(|known| known.addr == contact.addr) {
                Some(known) => known.pv = contact.pv.or(known.pv.take()),
                None => found.push(contact),
            }
        }
    }
    found
}

/// Looks up until `want` is found: an announce of another implementation ends at no event that a test could await.
async fn find(dht: &Dht, key: Id, want: SocketAddr) -> FoundContact {
    let finding = async {
        loop {
            if let Some(found) = contacts(dht, key).await.into_iter().find(|contact| contact.addr == want) {
                return found;
            }
        }
    };
    let found = tokio::time::timeout(crate::harness::LIMIT, finding).await;
    found.unwrap_or_else(|_| panic!("nobody tells of {want} under {key}"))
}

/// Waits until each node knows `count` others.
async fn all_know(nodes: &[Dht], count: usize) {
    let joining = join_all(nodes.iter().map(|node| node.knows(count)));
    let joined = tokio::time::timeout(crate::harness::LIMIT, joining).await;
    match joined {
        Ok(all) => all.into_iter().for_each(|known| known.unwrap()),
        Err(_) => {
            let mut known = Vec::new();
            for node in nodes {
                known.push(node.status().await.unwrap().v4.unwrap().nodes);
            }
            panic!("not all know {count} nodes: {known:?}");
        }
    }
}

/// Runs one ignored test of this module in a network namespace of its own, which goes with it whatever happens. `script` is
/// run there before, as its root.
fn in_namespace(test: &str, script: &str) {
    let script = format!("ip link set lo up\n{script}\nexec \"$0\" --exact dht::{test} --ignored --nocapture");
    let output = Command::new("unshare")
        .args(["--map-root-user", "--net", "--", "sh", "-ec", &script])
        .arg(std::env::current_exe().unwrap())
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
    eprint!("{text}");
}
