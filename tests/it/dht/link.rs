//! Nodes that find each other on their link.

use super::{all_know, in_namespace};
use poolfs_net::dht::Network;
use poolfs_net::discovery::{DiscoveryConfig, Links};
use poolfs_net::krpc::Id;
use poolfs_net::node::{Dht, NodeOptions, expand_listen};

/// Machines that are only plugged into the same switch, with nothing configured, are one network, over both families.
#[test]
fn neighbours_join_with_nothing_configured() {
    let script = "ip link add d0 type veth peer name d1
        ip link set d1 up
        ip addr add 192.0.2.1/24 dev d0
        ip addr add 2001:db8::1/64 dev d0 nodad
        ip link set d0 up";
    in_namespace("link::neighbours_in_namespace", script);
}

async fn plugged_in(read_only: bool) -> Dht {
    let discovery = DiscoveryConfig { links: Some(Links::default()), ..DiscoveryConfig::default() };
    let listen = expand_listen("[::]:0".parse().unwrap());
    Dht::start(NodeOptions { discovery, read_only, ..NodeOptions::new(listen, Network::Private) }, None).await.unwrap()
}

#[tokio::test]
#[ignore = "run by neighbours_join_with_nothing_configured in its namespace"]
async fn neighbours_in_namespace() {
    let nodes = [plugged_in(false).await, plugged_in(false).await, plugged_in(false).await];
    // Two others, in two families.
    all_know(&nodes, 4).await;
    // One that only asks hears of them too, and is kept by nobody.
    let asking = plugged_in(true).await;
    asking.knows(2).await.unwrap();
    asking.find_node(Id([1; 20])).await.unwrap().outcome().await.unwrap();
    for node in &nodes {
        assert_eq!(node.status().await.unwrap().v4.unwrap().nodes, 2);
    }
}
