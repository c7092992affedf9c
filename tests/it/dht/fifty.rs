//! Fifty real nodes on a network that loses one datagram in ten.

use super::{all_know, announce, contacts, in_namespace, key, options, v4};
use futures_util::future::join_all;
use poolfs_core::Digest;
use poolfs_net::dht::{self, Action, Config, Node};
use poolfs_net::krpc::Id;
use poolfs_net::netdb::NetDb;
use poolfs_net::node::Dht;
use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

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

/// What fifty idle nodes send, with real sockets and a real clock: `scripts/soak dht-idle`. [`upkeep_is_cheap`] is the same over
/// hours of a virtual clock.
#[test]
#[ignore = "17 minutes; run by scripts/soak"]
fn idle_upkeep() {
    in_namespace("fifty::idle_in_namespace", "");
}

/// Bytes a second that an idle node may send, with IP and UDP headers.
const IDLE_BYTES_PER_SECOND_MAX: f64 = 300.0;

/// IP and UDP headers of one datagram (IPv4).
const HEADER_BYTES: u64 = 28;

/// Longer than the longest interval of upkeep, a quarter of an hour: a shorter window would see nothing.
const IDLE_WINDOW: Duration = Duration::from_secs(16 * 60);

fn rates(after: &[u64], before: &[u64], window: Duration) -> (f64, f64) {
    #[allow(clippy::cast_precision_loss, reason = "a rate")]
    let mut rates: Vec<f64> = after.iter().zip(before).map(|(after, before)| (after - before) as f64 / window.as_secs_f64()).collect();
    rates.sort_by(f64::total_cmp);
    (rates[rates.len() / 2], rates[rates.len() - 1])
}

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
    let sent = async || {
        let all = join_all(nodes.iter().map(|node| async { node.status().await.unwrap() })).await;
        all.iter().map(|status| status.bytes_out + HEADER_BYTES * status.datagrams_out).collect::<Vec<u64>>()
    };
    // Joining is over when the tables have been filled; what follows is upkeep.
    tokio::time::sleep(Duration::from_secs(60)).await;
    let before = sent().await;
    tokio::time::sleep(IDLE_WINDOW).await;
    let (median, most) = rates(&sent().await, &before, IDLE_WINDOW);
    eprintln!(
        "idle upkeep of {NODES} nodes over {} min: median {median:.1} B/s sent, most {most:.1} B/s, with headers",
        IDLE_WINDOW.as_secs() / 60
    );
    assert!(median > 0.0, "nothing was measured");
    assert!(most <= IDLE_BYTES_PER_SECOND_MAX, "{most}");
}

/// Two hours of fifty idle nodes whose tables are full, over a virtual clock: each sends at most 300 bytes a second.
#[test]
fn upkeep_is_cheap() {
    let mut network = Network::new(NODES);
    network.run(Duration::from_secs(3600));
    let before = network.sent();
    let window = Duration::from_secs(2 * 3600);
    network.run(window);
    let (median, most) = rates(&network.sent(), &before, window);
    eprintln!("idle upkeep of {NODES} nodes over 2 virtual hours: median {median:.1} B/s sent, most {most:.1} B/s, with headers");
    assert!(median > 0.0, "nothing was measured");
    assert!(most <= IDLE_BYTES_PER_SECOND_MAX, "{most}");
    assert!(network.nodes.iter().all(|node| node.status().good[0] >= 8), "and they still know each other");
}

/// Nodes on a network that takes 5 ms and loses nothing, without sockets or a clock.
struct Network {
    nodes: Vec<Node>,
    now: Instant,
    under_way: BTreeMap<(Instant, u64), (SocketAddr, SocketAddr, Vec<u8>)>,
    count: u64,
}

impl Network {
    fn new(nodes: u8) -> Self {
        let now = Instant::now();
        let node = |n: u8| Node::new(Config::new([n; 32], [n; 32], dht::Network::Private, 9977), now, 1_800_000_000);
        let mut this = Self { nodes: (0..nodes).map(node).collect(), now, under_way: BTreeMap::new(), count: 0 };
        for node in &mut this.nodes[1..] {
            node.bootstrap(&[address(0)], now);
        }
        this
    }

    fn sent(&self) -> Vec<u64> {
        self.nodes.iter().map(|node| node.counters().bytes_out + HEADER_BYTES * node.counters().datagrams_out).collect()
    }

    fn run(&mut self, time: Duration) {
        let end = self.now + time;
        loop {
            for (n, node) in self.nodes.iter_mut().enumerate() {
                while let Some(action) = node.poll() {
                    if let Action::Send { to, bytes } = action {
                        self.count += 1;
                        self.under_way.insert((self.now + Duration::from_millis(5), self.count), (address(n), to, bytes));
                    }
                }
            }
            let timer = self.nodes.iter().map(Node::next_timeout).min().expect("there are nodes");
            let arrival = self.under_way.keys().next().map(|(at, _)| *at);
            self.now = arrival.into_iter().fold(timer, Instant::min).max(self.now);
            if self.now > end {
                self.now = end;
                return;
            }
            while let Some(entry) = self.under_way.first_entry().filter(|entry| entry.key().0 <= self.now) {
                let (from, to, bytes) = entry.remove();
                if let Some(node) = (0..self.nodes.len()).find(|n| address(*n) == to) {
                    self.nodes[node].datagram(from, &bytes, self.now);
                }
            }
            for node in self.nodes.iter_mut().filter(|node| node.next_timeout() <= self.now) {
                node.tick(self.now);
            }
        }
    }
}

fn address(n: usize) -> SocketAddr {
    (Ipv4Addr::new(10, 0, 0, u8::try_from(n).unwrap() + 1), 9977).into()
}
