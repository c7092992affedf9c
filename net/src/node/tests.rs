#![allow(clippy::unwrap_used, reason = "tests")]

use super::*;
use crate::krpc::{Body, Message, Pv, Verb};
use crate::testnet::{Packet, Router, Verdict};
use ed25519_dalek::SigningKey;
use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::atomic::AtomicU8;

/// A loopback address of its own: the limits of a node are per address.
fn address() -> SocketAddr {
    static NEXT: AtomicU8 = AtomicU8::new(1);
    (Ipv4Addr::new(127, 9, 0, NEXT.fetch_add(1, Ordering::Relaxed)), 0).into()
}

pub(super) fn options() -> NodeOptions {
    NodeOptions::new(vec![address()], Network::Private)
}

async fn start(options: NodeOptions) -> Dht {
    Dht::start(options, None).await.unwrap()
}

fn local(dht: &Dht) -> SocketAddr {
    dht.local(Family::V4).unwrap()
}

fn announce(dht: &Dht, key: Id) -> AnnounceKey {
    let key_bytes = dht.signing_key().verifying_key().to_bytes();
    AnnounceKey { key, pv: Some(Pv { key: key_bytes, flags: 1, deltas: Vec::new() }) }
}

/// Waits until `key` has been announced to at least one node.
async fn announced(events: &mut broadcast::Receiver<dht::Event>, wanted: Id) {
    loop {
        if let dht::Event::Announced { key, nodes } = events.recv().await.unwrap()
            && key == wanted
            && nodes > 0
        {
            return;
        }
    }
}

async fn contacts(dht: &Dht, key: Id) -> Vec<FoundContact> {
    let (findings, _) = dht.get_peers(key).await.unwrap().collect().await.unwrap();
    let mut found: Vec<FoundContact> = Vec::new();
    for finding in findings {
        let Finding::Contacts(contacts) = finding else { panic!("{finding:?}") };
        for contact in contacts {
            found.retain(|known| known.addr != contact.addr);
            found.push(contact);
        }
    }
    found
}

/// The whole way: what one node announces another finds, with what it says of itself, over both families.
#[tokio::test]
async fn announced_and_found_over_both_families() {
    let with_v6 = || NodeOptions { listen: vec![address(), "[::1]:0".parse().unwrap()], ..options() };
    let (a, b, c) = (start(with_v6()).await, start(with_v6()).await, start(with_v6()).await);
    for node in [&b, &c] {
        node.bootstrap(vec![local(&a), a.local(Family::V6).unwrap()]).await.unwrap();
    }
    for node in [&a, &b, &c] {
        node.knows(4).await.unwrap();
    }
    let key = Id([7; 20]);
    let mut events = b.events();
    b.set_announces(vec![announce(&b, key)]).await.unwrap();
    announced(&mut events, key).await;
    let pv = announce(&b, key).pv;
    let port = local(&b).port();
    let mut want: Vec<FoundContact> =
        [local(&b).ip(), "::1".parse().unwrap()].map(|ip: IpAddr| FoundContact { addr: SocketAddr::new(ip, port), pv: pv.clone() }).into();
    // The two families are announced one after the other; the second one is not told of separately.
    let mut found = contacts(&c, key).await;
    while found.len() < 2 {
        found = contacts(&c, key).await;
    }
    found.sort_by_key(|contact| contact.addr);
    want.sort_by_key(|contact| contact.addr);
    assert_eq!(found, want);
    assert_eq!(contacts(&c, Id([8; 20])).await, []);
    let status = c.status().await.unwrap();
    assert!(status.lookup_p50_us.is_some() && status.datagrams_in > 0 && status.reachable, "{status:?}");
}

/// An item that fits into a datagram comes back as it was put.
#[tokio::test]
async fn items_are_put_and_got() {
    let (a, b) = (start(options()).await, start(options()).await);
    b.bootstrap(vec![local(&a)]).await.unwrap();
    b.knows(1).await.unwrap();
    let value = b"11:hello world".to_vec();
    let stored = b.put_item(value.clone()).await.unwrap().outcome().await.unwrap().stored;
    assert_eq!(stored, 1);
    let (findings, _) = b.get_item(crate::krpc::item_target(&value)).await.unwrap().collect().await.unwrap();
    assert_eq!(findings, [Finding::Item(value)]);
    let refused = b.put_item(b"no bencode".to_vec()).await.unwrap().outcome().await;
    assert!(matches!(refused, Err(NodeError::Command(CommandError::NotAnItem))), "{refused:?}");
}

/// A restarted node joins by what it saved, with nothing configured, and under its old id.
#[tokio::test]
async fn a_restart_joins_by_the_saved_table() {
    let dir = tempfile::tempdir().unwrap();
    let netdb = || Some(Arc::new(NetDb::open(dir.path()).unwrap()));
    let (a, b) = (start(options()).await, Dht::start(options(), netdb()).await.unwrap());
    b.bootstrap(vec![local(&a)]).await.unwrap();
    b.knows(1).await.unwrap();
    let key = b.signing_key().to_bytes();
    b.shutdown().await;
    assert!(matches!(b.status().await, Err(NodeError::Stopped)));
    let b = Dht::start(options(), netdb()).await.unwrap();
    assert_eq!(b.signing_key().to_bytes(), key);
    b.knows(1).await.unwrap();
}

/// A new machine with one seed that does not exist, one that does not answer and one alive joins by the last; with none alive it
/// goes on, alone, and its owner is not disturbed.
#[tokio::test]
async fn a_dead_seed_does_not_keep_a_node_out() {
    use crate::discovery::tests::{A, SRV, name_server, srv};
    let alive = start(options()).await;
    let IpAddr::V4(ip) = local(&alive).ip() else { unreachable!() };
    let records = vec![
        ("_poolfs._udp.alive.test", SRV, srv(0, local(&alive).port(), "host.alive.test")),
        ("host.alive.test", A, ip.octets().to_vec()),
        // Somewhere nobody listens.
        ("_poolfs._udp.silent.test", SRV, srv(0, 9, "host.alive.test")),
    ];
    let server = name_server(records).await;
    let seeded = |seeds: &[&str]| {
        let seeds = seeds.iter().map(ToString::to_string).collect();
        NodeOptions { discovery: DiscoveryConfig { seeds, name_servers: vec![server], ..DiscoveryConfig::default() }, ..options() }
    };
    let joined = start(seeded(&["missing.test", "silent.test", "alive.test"])).await;
    joined.knows(1).await.unwrap();
    let alone = start(seeded(&["missing.test", "silent.test"])).await;
    assert_eq!(contacts(&alone, Id([1; 20])).await, []);
    assert_eq!(alone.status().await.unwrap().v4.unwrap().nodes, 0);
}

/// A machine copied with its key must become another node as soon as it hears of the first, and say so in its database.
#[tokio::test]
async fn a_clone_takes_a_key_of_its_own() {
    let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let key = NetDb::open(dirs[0].path()).unwrap().identity(None).unwrap().0;
    std::fs::copy(dirs[0].path().join(netdb_name()), dirs[1].path().join(netdb_name())).unwrap();
    let mut nodes = Vec::new();
    for dir in &dirs {
        nodes.push(Dht::start(options(), Some(Arc::new(NetDb::open(dir.path()).unwrap()))).await.unwrap());
    }
    assert_eq!(nodes[0].signing_key().to_bytes(), nodes[1].signing_key().to_bytes(), "the test's own premise");
    let mut events = nodes.iter().map(Dht::events).collect::<Vec<_>>();
    nodes[1].bootstrap(vec![local(&nodes[0])]).await.unwrap();
    let [first, second] = &mut events[..] else { unreachable!() };
    let is_clone = |event: dht::Event| matches!(event, dht::Event::ClonedKey(_));
    loop {
        tokio::select! {
            event = first.recv() => if is_clone(event.unwrap()) { break },
            event = second.recv() => if is_clone(event.unwrap()) { break },
        }
    }
    let keys = nodes.iter().map(|node| node.signing_key().to_bytes()).collect::<Vec<_>>();
    assert_ne!(keys[0], keys[1]);
    for node in &nodes {
        node.shutdown().await;
    }
    let stored =
        [&dirs[0], &dirs[1]].map(|dir| NetDb::open(dir.path()).unwrap().identity(crate::netdb::machine_hash()).unwrap().0.to_bytes());
    assert_eq!(stored.to_vec(), keys);
    assert!(stored.iter().any(|stored| *stored != key.to_bytes()));
}

fn netdb_name() -> &'static str {
    crate::netdb::FILE_NAME
}

/// Who gives up a lookup must not keep its place taken.
#[tokio::test]
async fn dropped_lookups_are_cancelled() {
    let a = start(options()).await;
    let b = start(options()).await;
    b.bootstrap(vec![local(&a)]).await.unwrap();
    b.knows(1).await.unwrap();
    a.shutdown().await;
    let lookup = b.get_peers(Id([1; 20])).await.unwrap();
    assert_eq!(b.status().await.unwrap().lookups, 1);
    drop(lookup);
    assert_eq!(b.status().await.unwrap().lookups, 0);
}

/// People meet these texts first.
#[tokio::test]
async fn what_cannot_be_bound_is_said() {
    let a = start(options()).await;
    let taken = Dht::start(NodeOptions::new(vec![local(&a)], Network::Private), None).await.unwrap_err();
    let text = taken.to_string();
    assert!(
        text.starts_with(&format!("listen on UDP {}: ", local(&a)))
            && text.ends_with("; another node runs on this port: end it or choose another port"),
        "{text}"
    );
    let twice = Dht::start(NodeOptions::new(vec![address(), address()], Network::Private), None).await.unwrap_err();
    assert_eq!(twice.to_string(), "2 addresses to listen on: give one of IPv4, one of IPv6, or one of each");
    assert_eq!(expand_listen("[::]:9977".parse().unwrap()), ["[::]:9977".parse().unwrap(), "0.0.0.0:9977".parse().unwrap()]);
    assert_eq!(expand_listen("192.0.2.1:1".parse().unwrap()), ["192.0.2.1:1".parse().unwrap()]);
    let both = start(NodeOptions::new(expand_listen("[::]:0".parse().unwrap()), Network::Private)).await;
    assert_eq!(both.local(Family::V4).unwrap().port(), both.local(Family::V6).unwrap().port());
}

/// The transaction ids of the pings in a trace from `from`, in order.
fn pings(trace: &[crate::testnet::Traced], from: SocketAddr) -> Vec<Vec<u8>> {
    let sent = trace.iter().filter(|traced| traced.packet.from == from);
    sent.filter_map(|traced| ping_id(&traced.packet)).collect()
}

fn ping_id(packet: &Packet) -> Option<Vec<u8>> {
    let message = Message::decode(&packet.bytes).unwrap();
    matches!(message.body, Body::Query { verb: Verb::Ping, .. }).then(|| message.transaction.as_slice().to_vec())
}

/// One, two and three lost queries: answered after the first and second, unreachable after the third, always with one id.
#[tokio::test]
async fn lost_queries_are_repeated_with_the_same_id() {
    let check = async |lost: usize| {
        let router = Router::new(|_| Verdict::Pass);
        let (a, b) = (start(options()).await, start(options()).await);
        let public_a = router.attach(local(&a)).await.unwrap();
        let public_b = router.attach(local(&b)).await.unwrap();
        let mut seen = 0;
        router.set_rule(move |packet| {
            if packet.from == public_a && ping_id(packet).is_some() {
                seen += 1;
                if seen <= lost {
                    return Verdict::Drop;
                }
            }
            Verdict::Pass
        });
        let pong = a.ping(public_b).await.unwrap();
        assert_eq!(pong.map(|pong| (pong.node.addr, pong.poolfs)), (lost < 3).then_some((public_b, true)), "{lost} lost");
        let sent = pings(&router.trace(), public_a);
        let same: Vec<_> = sent.iter().take_while(|id| *id == &sent[0]).collect();
        assert_eq!(same.len(), (lost + 1).min(3), "{lost} lost: {sent:?}");
        assert_eq!(sent[0].len(), 4);
    };
    tokio::join!(check(0), check(1), check(2), check(3));
}

/// A reply that comes twice or after another is taken once, and a lookup ends the same.
#[tokio::test]
async fn repeated_and_reordered_datagrams_change_nothing() {
    let router = Router::new(|packet| if packet.index % 3 == 0 { Verdict::Repeat(3) } else { Verdict::AfterNext });
    let (a, b) = (start(options()).await, start(options()).await);
    router.attach(local(&a)).await.unwrap();
    let public_b = router.attach(local(&b)).await.unwrap();
    a.bootstrap(vec![public_b]).await.unwrap();
    a.knows(1).await.unwrap();
    let key = Id([9; 20]);
    let mut events = a.events();
    a.set_announces(vec![announce(&a, key)]).await.unwrap();
    announced(&mut events, key).await;
    assert_eq!(contacts(&b, key).await.len(), 1);
}

/// With three datagrams in ten lost between all of twelve nodes, all join, and each finds what the others announced.
#[tokio::test]
async fn a_third_of_all_datagrams_lost() {
    const NODES: usize = 12;
    // A counter per way instead of chance: exactly 30 % of each, in a pattern that three tries do not all hit.
    let router = Router::new(|packet| if matches!(packet.index % 10, 1 | 4 | 8) { Verdict::Drop } else { Verdict::Pass });
    let mut nodes = Vec::new();
    let mut public = Vec::new();
    for _ in 0..NODES {
        let node = start(options()).await;
        public.push(router.attach(local(&node)).await.unwrap());
        nodes.push(node);
    }
    for node in &nodes[1..] {
        node.bootstrap(vec![public[0]]).await.unwrap();
    }
    for node in &nodes {
        node.knows(NODES / 2).await.unwrap();
    }
    let mut waits = Vec::new();
    for (n, node) in nodes.iter().enumerate() {
        let key = Id([u8::try_from(n).unwrap(); 20]);
        let mut events = node.events();
        node.set_announces(vec![announce(node, key)]).await.unwrap();
        waits.push(async move { announced(&mut events, key).await });
    }
    futures_util::future::join_all(waits).await;
    let finding = nodes.iter().enumerate().map(|(n, node)| async move {
        let of = (n + 1) % NODES;
        (of, contacts(node, Id([u8::try_from(of).unwrap(); 20])).await)
    });
    for (of, found) in futures_util::future::join_all(finding).await {
        // A contact is the announcer's address and the TCP port that it named, which the router does not translate.
        assert_eq!(found.iter().map(|contact| contact.addr).collect::<Vec<_>>(), [local(&nodes[of])], "{of}");
    }
    let trace = router.trace();
    let lost = trace.iter().filter(|traced| traced.verdict == Verdict::Drop).count();
    assert!(lost * 5 > trace.len(), "{lost} of {} lost", trace.len());
    let mut by_id: HashMap<(SocketAddr, Vec<u8>), usize> = HashMap::new();
    for traced in &trace {
        let message = Message::decode(&traced.packet.bytes).unwrap();
        if let Body::Query { .. } = message.body {
            *by_id.entry((traced.packet.from, message.transaction.as_slice().to_vec())).or_default() += 1;
        }
    }
    assert!(by_id.values().all(|sent| *sent <= 3), "nothing is sent a fourth time");
    assert!(by_id.values().any(|sent| *sent == 3), "the loss was felt");
}

/// A key of another process must be usable: the handle gives the very pair of the database.
#[tokio::test]
async fn the_handle_has_the_databases_key() {
    let dir = tempfile::tempdir().unwrap();
    let netdb = Arc::new(NetDb::open(dir.path()).unwrap());
    let key: SigningKey = netdb.identity(crate::netdb::machine_hash()).unwrap().0;
    let dht = Dht::start(options(), Some(netdb)).await.unwrap();
    assert_eq!(dht.signing_key().to_bytes(), key.to_bytes());
}
