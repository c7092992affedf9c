//! Fifty real nodes on a network that loses one datagram in ten.

use super::{all_know, announce, contacts, in_namespace, key, options, v4};
use futures_util::future::join_all;
use poolfs_core::Digest;
use poolfs_net::krpc::Id;
use poolfs_net::netdb::NetDb;
use poolfs_net::node::Dht;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

const NODES: u8 = 50;

/// 10 % of all UDP datagrams are lost on arrival.
const LOSS: &str = "nft -f - <<'END'
table inet loss {
    chain in {
        type filter hook input priority 0
        meta l4proto udp numgen random mod 10 == 0 drop
    }
}
END";

/// Bootstrap, announce, find, expire and restart from the saved table, with loss.
#[test]
fn fifty_nodes_with_loss() {
    in_namespace("fifty::fifty_in_namespace", LOSS);
}

async fn start(dir: &Path, n: u8, contact_life: Duration) -> Dht {
    let mut options = options();
    options.limits.contact_life_poolfs = contact_life;
    let netdb = NetDb::open(&dir.join(n.to_string())).unwrap();
    Dht::start(options, Some(Arc::new(netdb))).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "run by fifty_nodes_with_loss in its namespace"]
async fn fifty_in_namespace() {
    let dir = tempfile::tempdir().unwrap();
    // Longer than a walk with lost datagrams takes, shorter than anybody wants to wait.
    let life = Duration::from_secs(40);
    let mut nodes = Vec::new();
    for n in 0..NODES {
        nodes.push(start(dir.path(), n, life).await);
    }
    let first = v4(&nodes[0]);
    for node in &nodes[1..] {
        node.bootstrap(vec![first]).await.unwrap();
    }
    all_know(&nodes, 8).await;

    join_all(nodes.iter().zip(0..).map(|(node, n)| async move { announce(node, &[key(n)]).await })).await;
    let found = join_all(nodes.iter().zip(0..).map(|(node, n)| async move {
        let of = (n + 17) % NODES;
        (of, contacts(node, key(of)).await)
    }));
    for (of, found) in found.await {
        assert_eq!(found.iter().map(|contact| contact.addr).collect::<Vec<_>>(), [v4(&nodes[usize::from(of)])], "key {of}");
    }

    // Its nodes forget who does not announce again; the others of this test are refreshed no sooner, so all go.
    let (last, rest) = nodes.split_last().unwrap();
    last.shutdown().await;
    while !contacts(&rest[3], key(NODES - 1)).await.is_empty() {}

    // A restart has nothing configured, and a new address.
    let restarted = start(dir.path(), NODES - 1, life).await;
    restarted.knows(8).await.unwrap();
    assert_eq!(restarted.signing_key().to_bytes(), last.signing_key().to_bytes());
    announce(&restarted, &[key(200)]).await;
    let found = contacts(&rest[7], key(200)).await;
    assert_eq!(found.iter().map(|contact| contact.addr).collect::<Vec<SocketAddr>>(), [v4(&restarted)]);
    let repeated: u64 = join_all(rest.iter().map(|node| async { node.status().await.unwrap().repeated })).await.iter().sum();
    assert!(repeated > 50, "the loss was felt: {repeated} repetitions");
}

/// Ten rounds in which five nodes at a time are stopped, start again from what they saved, and every living node's files are
/// found, with loss: `scripts/soak dht-50`.
#[test]
#[ignore = "some minutes; run by scripts/soak"]
fn fifty_long() {
    in_namespace("fifty::long_in_namespace", LOSS);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "run by fifty_long in its namespace"]
async fn long_in_namespace() {
    const ROUNDS: u8 = 10;
    const STOPPED: u8 = 5;
    let dir = tempfile::tempdir().unwrap();
    let life = Duration::from_secs(9000);
    let mut nodes = Vec::new();
    for n in 0..NODES {
        nodes.push(start(dir.path(), n, life).await);
    }
    let first = v4(&nodes[0]);
    for node in &nodes[1..] {
        node.bootstrap(vec![first]).await.unwrap();
    }
    all_know(&nodes, 8).await;
    for round in 0..ROUNDS {
        for n in (0..STOPPED).map(|n| (round * STOPPED + n) % NODES) {
            let n_at = usize::from(n);
            // What it saved is from the moment it stopped; its address is a new one, as after a DHCP lease.
            nodes[n_at].shutdown().await;
            nodes[n_at] = start(dir.path(), n, life).await;
        }
        all_know(&nodes, 8).await;
        // A key of this round, so that it is announced in it.
        let fresh = |n: u8| Id(Digest::of(&[round, n]).file_key());
        join_all(nodes.iter().zip(0..).map(|(node, n)| async move { announce(node, &[fresh(n)]).await })).await;
        let found = join_all(nodes.iter().zip(0..).map(|(node, n)| async move {
            let of = (n + 13 + round) % NODES;
            (of, contacts(node, fresh(of)).await)
        }));
        let found = found.await;
        let missing = found.iter().filter(|(of, found)| !found.iter().any(|contact| contact.addr == v4(&nodes[usize::from(*of)]))).count();
        let status = nodes[25].status().await.unwrap();
        eprintln!(
            "round {round}: {missing} of {NODES} lookups without the holder; lookups p50 {:?} us, p95 {:?} us",
            status.lookup_p50_us, status.lookup_p95_us
        );
        assert_eq!(missing, 0);
    }
}

/// What fifty idle nodes say to each other, measured over ten minutes: `scripts/soak dht-idle`.
#[test]
#[ignore = "ten minutes; run by scripts/soak"]
fn idle_upkeep() {
    in_namespace("fifty::idle_in_namespace", "");
}

/// Bytes a second that an idle node may send, with IP and UDP headers.
const IDLE_BYTES_PER_SECOND_MAX: f64 = 300.0;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "run by idle_upkeep in its namespace"]
async fn idle_in_namespace() {
    let dir = tempfile::tempdir().unwrap();
    let mut nodes = Vec::new();
    for n in 0..NODES {
        nodes.push(start(dir.path(), n, Duration::from_secs(9000)).await);
    }
    let first = v4(&nodes[0]);
    for node in &nodes[1..] {
        node.bootstrap(vec![first]).await.unwrap();
    }
    all_know(&nodes, 8).await;
    let minutes = 10;
    let sent = async || {
        let all = join_all(nodes.iter().map(|node| async { node.status().await.unwrap() })).await;
        #[allow(clippy::cast_precision_loss, reason = "a rate")]
        let bytes: Vec<f64> = all.iter().map(|status| (status.bytes_out + 28 * status.datagrams_out) as f64).collect();
        bytes
    };
    // Joining is over when the tables have been filled; what follows is upkeep.
    tokio::time::sleep(Duration::from_secs(60)).await;
    let before = sent().await;
    tokio::time::sleep(Duration::from_secs(60 * minutes)).await;
    let after = sent().await;
    let mut rates: Vec<f64> = after.iter().zip(&before).map(|(after, before)| (after - before) / (60 * minutes) as f64).collect();
    rates.sort_by(f64::total_cmp);
    let (median, most) = (rates[rates.len() / 2], rates[rates.len() - 1]);
    eprintln!("idle upkeep of {NODES} nodes over {minutes} min: median {median:.0} B/s sent, most {most:.0} B/s, with headers");
    assert!(most <= IDLE_BYTES_PER_SECOND_MAX, "{rates:?}");
}
