//! One network of libtorrent 2.1 and 2.0, `mainline` 8 and poolfs.

use super::libtorrent::{Libtorrent, Version, hex};
use super::{all_know, announce, contacts, find, key, loopback, options, pv, start, v4, v6};
use futures_util::StreamExt as _;
use mainline::async_dht::AsyncDht;
use poolfs_net::krpc::{Id, item_target};
use poolfs_net::node::{Dht, Finding, NodeOptions};
use serde_json::json;
use std::net::{IpAddr, SocketAddr, SocketAddrV4};

struct Mixed {
    new: Libtorrent,
    old: Libtorrent,
    mainline: Vec<AsyncDht>,
    poolfs: Vec<Dht>,
}

/// Four poolfs nodes, three of `mainline`, two of each libtorrent, all joined by the first poolfs node.
async fn mixed() -> Mixed {
    let mut poolfs = Vec::new();
    for _ in 0..4 {
        let listen = vec![SocketAddr::new(loopback(), 0), "[::1]:0".parse().unwrap()];
        poolfs.push(start(NodeOptions { listen, ..options() }).await);
    }
    let first = [v4(&poolfs[0]), v6(&poolfs[0])];
    for node in &poolfs[1..] {
        node.bootstrap(first.to_vec()).await.unwrap();
    }
    let mut new = Libtorrent::start(Version::V2_1, 2, true).await;
    let mut old = Libtorrent::start(Version::V2_0, 2, true).await;
    for libtorrent in [&mut new, &mut old] {
        for node in 0..2 {
            // All IPv6 nodes share one address here, which it would take for one that asks too much.
            libtorrent.send(&json!({ "op": "block", "node": node, "limit": 1000 })).await;
            for address in first {
                libtorrent.add(node, address).await;
            }
        }
    }
    let mainline: Vec<AsyncDht> = (0..3).map(|_| mainline_node(&[first[0]])).collect();
    for node in &mainline {
        assert!(node.bootstrapped().await, "mainline joins by a poolfs node");
    }
    // Each poolfs node knows the other ten of IPv4 and seven of IPv6 before anything is announced: then "the closest" means
    // the same to all.
    all_know(&poolfs, 14).await;
    Mixed { new, old, mainline, poolfs }
}

fn mainline_node(bootstrap: &[SocketAddr]) -> AsyncDht {
    let IpAddr::V4(address) = loopback() else { unreachable!("an IPv4 address") };
    let bootstrap: Vec<String> = bootstrap.iter().map(ToString::to_string).collect();
    mainline::Dht::builder().server_mode().bind_address(address).bootstrap(&bootstrap).build().unwrap().as_async()
}

/// Looks up until `want` is found.
async fn mainline_finds(node: &AsyncDht, key: Id, want: SocketAddr) {
    let SocketAddr::V4(want) = want else { unreachable!("mainline has no IPv6") };
    let finding = async {
        loop {
            let found: Vec<Vec<SocketAddrV4>> = node.get_peers(key.0.into()).collect().await;
            if found.iter().flatten().any(|contact| *contact == want) {
                return;
            }
        }
    };
    assert!(tokio::time::timeout(crate::harness::LIMIT, finding).await.is_ok(), "mainline does not find {want} under {key}");
}

/// What each implementation announces the others find, over IPv4 and, where they can, IPv6; `pv` comes through to poolfs.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everybody_finds_what_everybody_announced() {
    let Mixed { mut new, mut old, mainline, poolfs } = mixed().await;
    let (by_new, by_old, by_mainline, by_poolfs) = (key(1), key(2), key(3), key(4));
    new.announce(1, &by_new.0).await;
    old.announce(1, &by_old.0).await;
    mainline[2].announce_peer(by_mainline.0.into(), Some(4444)).await.unwrap();
    announce(&poolfs[3], &[by_poolfs]).await;

    let mainline_contact = SocketAddr::new(IpAddr::V4(*mainline[2].info().await.local_addr().ip()), 4444);
    let poolfs_contacts =
        [SocketAddr::new(v4(&poolfs[3]).ip(), v4(&poolfs[3]).port()), SocketAddr::new(v6(&poolfs[3]).ip(), v4(&poolfs[3]).port())];
    let wanted = [
        (by_new, new.addresses[1].clone()),
        (by_old, old.addresses[1].clone()),
        (by_mainline, vec![mainline_contact]),
        (by_poolfs, poolfs_contacts.to_vec()),
    ];
    for (key, contacts) in &wanted {
        for contact in contacts {
            for node in &poolfs[1..3] {
                let found = find(node, *key, *contact).await;
                let said = (*key == by_poolfs).then(|| pv(&poolfs[3]));
                assert_eq!(found.pv, said, "{contact} as {} tells of it", v4(node));
            }
            new.find_peer(0, &key.0, *contact).await;
            old.find_peer(0, &key.0, *contact).await;
            if contact.is_ipv4() {
                mainline_finds(&mainline[0], *key, *contact).await;
            }
        }
    }
    assert_eq!(contacts(&poolfs[1], key(5)).await, [], "nobody has what nobody announced");
}

/// An item put by any of them is got by all others, byte for byte.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn items_travel_between_all() {
    let Mixed { mut new, mut old, mainline, poolfs } = mixed().await;
    let mut items: Vec<(Id, &str)> = Vec::new();
    let of = |text: &str| item_target(format!("{}:{text}", text.len()).as_bytes());
    let stored = poolfs[1].put_item(b"13:put by poolfs".to_vec()).await.unwrap().outcome().await.unwrap();
    assert!(stored.stored >= 4, "{stored:?}");
    items.push((of("put by poolfs"), "put by poolfs"));
    assert_eq!(new.put(1, "put by 2.1").await, hex(&of("put by 2.1").0));
    items.push((of("put by 2.1"), "put by 2.1"));
    assert_eq!(old.put(1, "put by 2.0").await, hex(&of("put by 2.0").0));
    items.push((of("put by 2.0"), "put by 2.0"));
    let target = mainline[1].put_immutable(b"put by mainline").await.unwrap();
    assert_eq!(target.as_bytes(), &of("put by mainline").0);
    items.push((of("put by mainline"), "put by mainline"));
    for (target, text) in items {
        let (findings, _) = poolfs[2].get_item(target).await.unwrap().collect().await.unwrap();
        assert_eq!(findings, [Finding::Item(format!("{}:{text}", text.len()).into_bytes())]);
        assert_eq!(new.get(0, &hex(&target.0)).await, text.as_bytes());
        assert_eq!(old.get(0, &hex(&target.0)).await, text.as_bytes());
        // mainline asks only nodes whose answers it understands, which libtorrent's are not always: poolfs's hold it too.
        assert_eq!(mainline[0].get_immutable(target.0.into()).await.as_deref(), Some(text.as_bytes()));
    }
}

/// Looking up and announcing as fast as poolfs does, no libtorrent begins to ignore it; somebody without limits is ignored.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn libtorrent_does_not_take_poolfs_for_an_attacker() {
    let mut libtorrent = Libtorrent::start(Version::V2_1, 3, false).await;
    let poolfs = start(options()).await;
    let addresses: Vec<SocketAddr> = libtorrent.addresses.iter().map(|addresses| addresses[0]).collect();
    poolfs.bootstrap(addresses.clone()).await.unwrap();
    poolfs.knows(3).await.unwrap();
    let keys: Vec<Id> = (0..40).map(key).collect();
    announce(&poolfs, &keys).await;
    for key in &keys {
        contacts(&poolfs, *key).await;
    }
    let asked = poolfs.status().await.unwrap();
    assert!(asked.queries_out > 100, "too few queries to have been ignored for: {asked:?}");
    // The control: an attacker, from an address of his own, is ignored. What was said of poolfs would be said before it.
    let attacker = tokio::net::UdpSocket::bind(SocketAddr::new(loopback(), 0)).await.unwrap();
    for n in 0..200_u32 {
        let ping = [&b"d1:ad2:id20:aaaaaaaaaaaaaaaaaaaae1:q4:ping1:t4:"[..], &n.to_be_bytes(), b"1:y1:qe"].concat();
        attacker.send_to(&ping, addresses[0]).await.unwrap();
        if n % 20 == 0 {
            // So that no socket buffer overflows: the answer shows that it was read.
            let mut buffer = [0; 500];
            if n < 40 {
                attacker.recv_from(&mut buffer).await.unwrap();
            }
        }
    }
    let attacker = attacker.local_addr().unwrap().ip().to_string();
    libtorrent.event(|event| event["event"] == "blocked" && event["address"].as_str().unwrap().contains(&attacker)).await;
    let poolfs = v4(&poolfs).ip().to_string();
    assert_eq!(
        libtorrent.seen().iter().find(|event| event["event"] == "blocked" && event["address"].as_str().unwrap().contains(&poolfs)),
        None
    );
}

/// Answers echo whatever a program uses as its transaction id; a verb of tomorrow is answered as find_node; no IPv6 contact
/// comes in an IPv4 answer. Bytes as other programs send them, over a real socket.
#[tokio::test]
async fn foreign_datagrams_are_answered() {
    let poolfs = start(NodeOptions { listen: vec![SocketAddr::new(loopback(), 0), "[::1]:0".parse().unwrap()], ..options() }).await;
    let other = start(NodeOptions { listen: vec![SocketAddr::new(loopback(), 0), "[::1]:0".parse().unwrap()], ..options() }).await;
    other.bootstrap(vec![v4(&poolfs), v6(&poolfs)]).await.unwrap();
    other.knows(2).await.unwrap();
    let held = key(9);
    announce(&other, &[held]).await;
    find(&other, held, SocketAddr::new("::1".parse().unwrap(), v4(&other).port())).await;
    let socket = tokio::net::UdpSocket::bind(SocketAddr::new(loopback(), 0)).await.unwrap();
    let ask = async |query: &[u8], transaction: &[u8]| {
        let transaction = [transaction.len().to_string().as_bytes(), b":", transaction].concat();
        let datagram = [b"d1:ad2:id20:aaaaaaaaaaaaaaaaaaaa", query, b"1:t", &transaction, b"1:y1:qe"].concat();
        socket.send_to(&datagram, v4(&poolfs)).await.unwrap();
        let mut buffer = [0; 1500];
        loop {
            let len = socket.recv(&mut buffer).await.unwrap();
            // It may also ask back whether this node lives.
            if !has(&buffer[..len], b"1:q4:ping") {
                return (buffer[..len].to_vec(), [b"1:t", transaction.as_slice()].concat());
            }
        }
    };
    for transaction in [&b"x"[..], b"xy", b"abcd", b"12345678901234567890"] {
        let (answer, echo) = ask(b"e1:q4:ping", transaction).await;
        assert!(has(&answer, &echo), "{}", answer.escape_ascii());
    }
    let (answer, _) = ask(b"6:target20:bbbbbbbbbbbbbbbbbbbbe1:q8:tomorrow", b"abcd").await;
    assert!(has(&answer, b"5:nodes26:") && has(&answer, b"1:y1:r"), "{}", answer.escape_ascii());
    let (answer, _) = ask(&[&b"9:info_hash20:"[..], &held.0, b"e1:q9:get_peers"].concat(), b"abcd").await;
    assert!(has(&answer, b"6:valuesl6:") && !has(&answer, b"18:"), "{}", answer.escape_ascii());
}

fn has(bytes: &[u8], part: &[u8]) -> bool {
    bytes.windows(part.len()).any(|window| window == part)
}
