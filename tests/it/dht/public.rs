//! A public network: nodes with global addresses that trust nobody's word for being reachable.

use super::{announce, contacts, find, in_namespace, key};
use crate::harness::LIMIT;
use poolfs_net::dht::{AnnounceKey, Network};
use poolfs_net::node::{Dht, NodeOptions, listen_tcp};
use std::net::{IpAddr, SocketAddr};
use tokio::task::JoinSet;

const ADDRESSES: [&str; 6] = ["11.1.0.1", "12.2.0.1", "13.3.0.1", "14.4.0.1", "15.5.0.1", "16.6.0.1"];

/// A node that others cannot reach asks and finds, and announces nothing that would cost them a dead connection; those that were
/// dialled back announce. Everybody's id fits the address that others see.
#[test]
fn only_who_is_reachable_announces() {
    let addresses = ADDRESSES.map(|address| format!("ip addr add {address}/32 dev lo\n")).concat();
    // The last one is behind a NAT: what it did not ask for does not arrive.
    let nat = "nft -f - <<'END'
table inet nat {
    chain in {
        type filter hook input priority 0
        ip daddr 16.6.0.1 ct state new drop
    }
}
END";
    in_namespace("public::public_in_namespace", &format!("{addresses}{nat}"));
}

/// Opens a node's TCP port, as the one that serves files does.
fn open(doors: &mut JoinSet<()>, node: &Dht) {
    let door = listen_tcp(super::v4(node)).unwrap();
    doors.spawn(async move { while door.accept().await.is_ok() {} });
}

async fn reachable(node: &Dht) {
    let mut events = node.events();
    let proved = async {
        while !node.status().await.unwrap().reachable {
            events.recv().await.unwrap();
        }
    };
    assert!(tokio::time::timeout(LIMIT, proved).await.is_ok(), "{} is never reached: {:?}", super::v4(node), node.status().await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "run by only_who_is_reachable_announces in its namespace"]
async fn public_in_namespace() {
    let mut doors = JoinSet::new();
    let mut nodes = Vec::new();
    for address in ADDRESSES {
        let address: IpAddr = address.parse().unwrap();
        nodes.push(Dht::start(NodeOptions::new(vec![SocketAddr::new(address, 0)], Network::Public), None).await.unwrap());
    }
    let (hidden, open_nodes) = nodes.split_last().unwrap();
    let first = super::v4(&nodes[0]);
    for node in open_nodes {
        open(&mut doors, node);
    }
    for node in &nodes[1..] {
        node.bootstrap(vec![first]).await.unwrap();
    }
    for node in open_nodes {
        reachable(node).await;
    }
    announce(&open_nodes[2], &[key(1)]).await;
    let found = contacts(&open_nodes[4], key(1)).await;
    assert_eq!(found.iter().map(|contact| contact.addr).collect::<Vec<_>>(), [super::v4(&open_nodes[2])]);

    tokio::time::timeout(LIMIT, hidden.knows(3)).await.expect("it joins all the same").unwrap();
    hidden.set_announces(vec![AnnounceKey { key: key(2), pv: None }]).await.unwrap();
    // More than one lookup, where it fell into the moment at which the others took the ids of their public addresses.
    assert_eq!(find(hidden, key(1), found[0].addr).await, found[0], "it finds what others announce");
    assert!(!hidden.status().await.unwrap().reachable);
    assert_eq!(contacts(&open_nodes[1], key(2)).await, [], "nobody is sent to it");
    for node in open_nodes {
        let table = node.status().await.unwrap();
        assert!(table.v4.unwrap().nodes < ADDRESSES.len() - 1, "a read-only node is in nobody's table");
    }
}
