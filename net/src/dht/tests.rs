//! The node under a clock of the test's own: times of datagrams, who is answered what, what is refused.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "tests: small numbers made into bytes of addresses and ids")]

use super::peers::{DATAGRAMS_PER_WINDOW_MAX, TOKEN_USE};
use super::table::{K, QUESTIONABLE_AFTER};
use super::*;
use crate::krpc::message::code;
use crate::krpc::statement::Kind as Said;
use crate::krpc::{Announce, Body, Message, Reply, STATEMENT_BYTES, Statement, VERSION, Verb, Want, item_target};
use ed25519_dalek::SigningKey;

mod own;

const UNIX: u64 = 1_800_000_000;

fn addr(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

/// A node, and the time that it is told.
struct Bench {
    node: Node,
    start: Instant,
    at: Duration,
}

/// One datagram that the node sent.
#[derive(Debug, Clone)]
struct Sent {
    at_ms: u128,
    to: SocketAddr,
    bytes: Vec<u8>,
}

impl Sent {
    fn message(&self) -> Message {
        Message::decode(&self.bytes).unwrap()
    }
}

impl Bench {
    fn new(network: Network, schedule: Schedule) -> Self {
        Self::with(network, |config| config.schedule = schedule)
    }

    fn with(network: Network, change: impl FnOnce(&mut Config)) -> Self {
        let start = Instant::now();
        let mut config = Config::new([1; 32], [2; 32], network, 9977);
        change(&mut config);
        Self { node: Node::new(config, start, UNIX), start, at: Duration::ZERO }
    }

    fn now(&self) -> Instant {
        self.start + self.at
    }

    fn drain(&mut self) -> (Vec<Sent>, Vec<Event>) {
        let (mut sent, mut events) = (Vec::new(), Vec::new());
        while let Some(action) = self.node.poll() {
            match action {
                Action::Send { to, bytes } => sent.push(Sent { at_ms: self.at.as_millis(), to, bytes }),
                Action::Event(event) => events.push(event),
                Action::Dial { .. } => {}
            }
        }
        (sent, events)
    }

    /// Lets time pass, waking the node exactly when it wants to be.
    fn run(&mut self, until: Duration) -> (Vec<Sent>, Vec<Event>) {
        let (mut sent, mut events) = self.drain();
        loop {
            let due = self.node.next_timeout().saturating_duration_since(self.start).max(self.at);
            if due > until {
                break;
            }
            self.at = due;
            let now = self.now();
            self.node.tick(now);
            let (more, told) = self.drain();
            sent.extend(more);
            events.extend(told);
        }
        self.at = until;
        (sent, events)
    }

    fn receive(&mut self, from: SocketAddr, message: &Message) -> (Vec<Sent>, Vec<Event>) {
        self.receive_bytes(from, &message.encode().unwrap())
    }

    fn receive_bytes(&mut self, from: SocketAddr, bytes: &[u8]) -> (Vec<Sent>, Vec<Event>) {
        let now = self.now();
        self.node.datagram(from, bytes, now);
        self.drain()
    }

    /// Asks as another node would, with `ro` so that it is not asked back, and returns the answer.
    fn ask(&mut self, from: SocketAddr, verb: Verb) -> Option<Message> {
        let (sent, _) = self.receive(from, &query(verb));
        sent.iter().map(Sent::message).find(|m| !matches!(m.body, Body::Query { .. }))
    }

    fn ask_reply(&mut self, from: SocketAddr, verb: Verb) -> Reply {
        match self.ask(from, verb).map(|m| m.body) {
            Some(Body::Reply(reply)) => *reply,
            other => panic!("a reply, not {other:?}"),
        }
    }

    fn ask_error(&mut self, from: SocketAddr, verb: Verb) -> i64 {
        match self.ask(from, verb).map(|m| m.body) {
            Some(Body::Error { code, .. }) => code,
            other => panic!("an error, not {other:?}"),
        }
    }

    fn token(&mut self, from: SocketAddr) -> Vec<u8> {
        self.ask_reply(from, get_peers(Id([9; 20]), false, None)).token.unwrap()
    }
}

fn query(verb: Verb) -> Message {
    let body = Body::Query { id: Id([0xaa; 20]), verb };
    Message { transaction: Transaction::own(*b"test"), version: Some(VERSION), read_only: true, ip: None, body }
}

fn get_peers(key: Id, pv: bool, token: Option<Vec<u8>>) -> Verb {
    Verb::GetPeers { key, want: Want::default(), pv, statements: false, token }
}

fn announce(key: Id, port: u16, token: Vec<u8>, pv: Option<Vec<u8>>) -> Verb {
    Verb::Announce(Box::new(Announce { key, port, implied_port: false, token, pv, more: Vec::new(), statement: None }))
}

/// The answer of a node with this id to something that was sent.
fn answer(to: &Sent, id: Id, reply: Reply) -> Message {
    let body = Body::Reply(Box::new(Reply { id, ..reply }));
    Message { transaction: to.message().transaction, version: Some(VERSION), read_only: false, ip: None, body }
}

const X: &str = "192.168.7.7:7777";

fn id(n: u8) -> Id {
    Id([n; 20])
}

// --- retransmission (a query lost once, twice, for good; late, doubled and foreign answers)

/// The times and the transaction ids of a query that nobody answers, on each schedule.
#[test]
fn repeats_at_2_and_6_and_gives_up_at_14() {
    let check = |schedule, want: &[u128]| {
        let mut bench = Bench::new(Network::Private, schedule);
        let now = bench.now();
        let ping = bench.node.ping(addr(X), now);
        let (sent, events) = bench.run(Duration::from_millis(13_999));
        assert_eq!(sent.iter().map(|s| s.at_ms).collect::<Vec<_>>(), want);
        assert!(sent.iter().all(|s| s.bytes == sent[0].bytes && s.to == addr(X)), "the same bytes, so the same id");
        assert!(events.is_empty());
        let (sent, events) = bench.run(Duration::from_secs(14));
        assert_eq!((sent.len(), events), (0, vec![Event::Unreachable { ping, to: addr(X) }]));
        assert_eq!(bench.node.pending.len(), 0);
    };
    check(Schedule::Standard, &[0, 2_000, 6_000]);
    check(Schedule::Adapted, &[0, 2_000, 6_000]);
    check(Schedule::Single, &[0]);
}

/// Whichever packets are lost, the first that gets through is answered and ends it; only a query sent once gives a sample.
#[test]
fn any_one_of_three_is_enough() {
    for lost in 0..3_usize {
        let mut bench = Bench::new(Network::Private, Schedule::Standard);
        let now = bench.now();
        let ping = bench.node.ping(addr(X), now);
        let (sent, _) = bench.run(Duration::from_millis([30, 2_030, 6_030][lost]));
        assert_eq!(sent.len(), lost + 1);
        let (_, events) = bench.receive(addr(X), &answer(&sent[lost], id(5), Reply::default()));
        let took = bench.at;
        assert_eq!(events[0], Event::Pong { ping, node: NodeInfo { id: id(5), addr: addr(X) }, took, poolfs: true });
        assert_eq!(bench.node.family_rtt[0].smoothed().is_some(), lost == 0, "no sample from a query that was repeated");
        let (sent, events) = bench.run(Duration::from_secs(14));
        assert!(!sent.iter().any(|s| s.bytes == answer(&sent[0], id(5), Reply::default()).encode().unwrap()));
        assert!(!events.iter().any(|e| matches!(e, Event::Unreachable { .. } | Event::Pong { .. })));
    }
}

/// 13.9 s late it still counts; from another port or a second time it does not.
#[test]
fn late_foreign_and_second_answers() {
    let mut bench = Bench::new(Network::Private, Schedule::Adapted);
    let now = bench.now();
    let ping = bench.node.ping(addr(X), now);
    let (sent, _) = bench.run(Duration::from_millis(13_900));
    let reply = answer(&sent[0], id(5), Reply::default());
    assert!(bench.receive(addr("192.168.7.7:7778"), &reply).1.is_empty(), "another port");
    assert!(bench.receive(addr("192.168.7.8:7777"), &reply).1.is_empty(), "another address");
    assert_eq!(bench.node.counters.foreign, 2);
    let (_, events) = bench.receive(addr(X), &reply);
    assert!(matches!(events[0], Event::Pong { ping: p, .. } if p == ping));
    assert!(bench.receive(addr(X), &reply).1.is_empty(), "a second answer");
    assert_eq!(bench.node.counters.foreign, 3);
    let (_, events) = bench.run(Duration::from_secs(20));
    assert!(!events.iter().any(|e| matches!(e, Event::Unreachable { .. })));
}

/// From the eighth answer of a family on, d is what its round trips say; a node's own come first.
#[test]
fn adapts_to_round_trips() {
    let mut bench = Bench::new(Network::Private, Schedule::Adapted);
    for n in 0..8 {
        let now = bench.now();
        bench.node.ping(addr(&format!("192.168.7.{}:7777", 10 + n)), now);
        let (sent, _) = bench.drain();
        bench.at += Duration::from_millis(50);
        bench.receive(sent[0].to, &answer(&sent[0], id(n), Reply::default()));
        bench.drain();
    }
    let begun = bench.at;
    let now = bench.now();
    bench.node.ping(addr(X), now);
    let (sent, events) = bench.run(begun + Duration::from_secs(14));
    let times: Vec<_> = sent.iter().filter(|s| s.to == addr(X)).map(|s| s.at_ms - begun.as_millis()).collect();
    assert_eq!(times, [0, 250, 750]);
    assert!(events.iter().any(|e| matches!(e, Event::Unreachable { .. })), "and yet 14 s until it counts as failed");
}

/// A lookup goes on after d without waiting for a silent node, and takes its late answer.
#[test]
fn a_lookup_moves_on_after_d() {
    let mut bench = Bench::new(Network::Private, Schedule::Standard);
    let nodes: Vec<NodeInfo> = (1..=20).map(|n| NodeInfo { id: id(n), addr: addr(&format!("192.168.1.{n}:7777")) }).collect();
    let now = bench.now();
    bench.node.assume_answered(&nodes, true, Duration::from_millis(50), now);
    let lookup = bench.node.get_peers(id(0), now).unwrap();
    let (first, _) = bench.drain();
    assert_eq!(first.len(), CONCURRENCY);
    let (later, _) = bench.run(Duration::from_millis(1_999));
    assert!(later.iter().all(|s| !matches!(s.message().body, Body::Query { verb: Verb::GetPeers { .. }, .. })), "no slot is free before d");
    let (next, _) = bench.run(Duration::from_secs(2));
    let fresh: Vec<_> = next.iter().filter(|s| !first.iter().any(|f| f.to == s.to)).collect();
    assert_eq!(fresh.len(), CONCURRENCY + walk::EXTRA_MAX);
    let value = addr("10.9.9.9:9999");
    let (_, events) = bench.receive(first[0].to, &answer(&first[0], id(1), Reply { values: vec![value], ..Reply::default() }));
    let found = Event::Found { lookup, contacts: vec![FoundContact { addr: value, pv: None }] };
    assert!(events.contains(&found), "the late answer counts: {events:?}");
}

// --- what a query gets

/// Transaction ids of any length come back, ours are of 4 bytes, an unknown verb is a find_node, families are not mixed.
#[test]
fn at_home_among_others() {
    let mut bench = Bench::new(Network::Private, Schedule::Adapted);
    let now = bench.now();
    let v6: Vec<NodeInfo> = (1..=8).map(|n| NodeInfo { id: id(n), addr: addr(&format!("[fd00::{n}]:7777")) }).collect();
    let v4: Vec<NodeInfo> = (1..=8).map(|n| NodeInfo { id: id(n), addr: addr(&format!("192.168.1.{n}:7777")) }).collect();
    bench.node.assume_answered(&v6, false, Duration::from_millis(50), now);
    bench.node.assume_answered(&v4, false, Duration::from_millis(50), now);
    for length in [1, 2, 4, 20, 32] {
        let t = Transaction::new(&vec![7; length]).unwrap();
        let (sent, _) = bench.receive(addr(X), &Message { transaction: t, version: None, ..query(Verb::Ping) });
        assert_eq!((sent[0].message().transaction, sent[0].message().ip), (t, Some(addr(X))));
    }
    let text = b"d1:ad2:id20:abcdefghij01234567896:target20:mnopqrstuvwxyz123456e1:q4:vote2:roi1e1:t2:aa1:y1:qe";
    let (sent, _) = bench.receive_bytes(addr(X), text);
    let Body::Reply(reply) = sent[0].message().body else { panic!("a reply") };
    assert_eq!((reply.nodes.len(), reply.nodes6.len()), (8, 0));
    let both = Verb::FindNode { target: id(3), want: Want { v4: true, v6: true } };
    let reply = bench.ask_reply(addr(X), both);
    assert_eq!((reply.nodes.len(), reply.nodes6.len()), (8, 7), "as many as fit 600 bytes");
    let key = Verb::GetPeers { key: id(3), want: Want { v4: true, v6: true }, pv: false, statements: false, token: None };
    let reply = bench.ask_reply(addr(X), key);
    assert_eq!((reply.nodes.len(), reply.nodes6.len()), (4, 4));
    let reply = bench.ask_reply(addr("[fd00::99]:7777"), Verb::FindNode { target: id(3), want: Want::default() });
    assert_eq!((reply.nodes.len(), reply.nodes6.len()), (0, 8));
    let token = bench.token(addr(X));
    bench.ask_reply(addr(X), announce(id(77), 9999, token, None));
    let reply = bench.ask_reply(addr("[fd00::99]:7777"), get_peers(id(77), false, None));
    assert!(reply.values.is_empty(), "no v4 contact in a v6 answer");
    let other = Verb::Other { name: b"whatever".to_vec(), args: bt_bencode::Value::Dict(Default::default()) };
    assert_eq!(bench.ask_error(addr(X), other), code::METHOD);
    let (sent, _) = bench.receive_bytes(addr(X), b"d1:ad2:id3:abce1:q4:ping1:t2:aa1:y1:qe");
    assert!(matches!(&sent[0].message().body, Body::Error { code: code::PROTOCOL, .. }));
}

/// Forged queries: no more than six times their bytes comes back, never `pv`, and a token of elsewhere or of long ago stores
/// nothing.
#[test]
fn spoofed_queries_gain_nothing() {
    let mut bench = Bench::new(Network::Private, Schedule::Adapted);
    let pv = crate::krpc::Pv { key: [3; 32], flags: 1, deltas: Vec::new() }.encode();
    for n in 1..=150_u8 {
        let from = addr(&format!("192.168.{n}.1:7777"));
        let token = bench.token(from);
        bench.ask_reply(from, announce(id(7), 9999, token, Some(pv.clone())));
        bench.at += Duration::from_millis(50);
    }
    assert_eq!(bench.node.status().stored_contacts, 150);
    let (mut bytes_in, mut bytes_out, mut answers) = (0, 0, 0);
    let victim = addr("192.168.200.1:7777");
    let stale = bench.token(addr("192.168.201.1:7777"));
    for n in 0..10_000_usize {
        let token = if n % 2 == 0 { None } else { Some(stale.clone()) };
        let bytes = query(get_peers(id(7), true, token)).encode().unwrap();
        bytes_in += bytes.len();
        let (sent, _) = bench.receive_bytes(victim, &bytes);
        for sent in sent {
            answers += 1;
            bytes_out += sent.bytes.len();
            assert!(sent.bytes.len() <= UNPROVED_REPLY_BYTES_MAX);
            let Body::Reply(reply) = sent.message().body else { continue };
            assert!(reply.pvs.is_empty() && !reply.values.is_empty());
        }
        bench.at += Duration::from_millis(20);
    }
    assert!(answers > 3_000 && bytes_out <= 6 * bytes_in, "{answers} answers, {bytes_out} bytes for {bytes_in}");
    bench.at += Duration::from_secs(10);
    let good = bench.token(victim);
    let reply = bench.ask_reply(victim, get_peers(id(7), true, Some(good.clone())));
    assert!(reply.pvs.len() == reply.values.len() && reply.pvs.iter().all(|p| *p == pv) && reply.nodes.is_empty());
    assert_eq!(bench.ask_error(addr("192.168.202.1:7777"), announce(id(8), 9999, good.clone(), None)), code::PROTOCOL);
    bench.at += token::SECRET_LIFE * 2;
    assert_eq!(bench.ask_error(victim, announce(id(8), 9999, good, None)), code::PROTOCOL);
    assert!(!bench.node.holds(&id(8)));
}

/// A `pv` that breaks a rule costs the announcer the `pv`, not the contact; and no such datagram panics.
#[test]
fn bad_pv_is_left_out() {
    let mut bench = Bench::new(Network::Private, Schedule::Adapted);
    let k = [b"1:k32:".to_vec(), vec![b'k'; 32]].concat();
    let dict = |inner: &[u8]| [b"d", inner, b"e"].concat();
    let bad: Vec<Vec<u8>> = vec![
        dict(&[k.clone(), b"1:x466:".to_vec(), vec![0; 466]].concat()),
        dict(&[k.clone(), b"1:fi3e".to_vec()].concat()),
        [b"l".to_vec(), b"0:".repeat(200), b"e".to_vec()].concat(),
        [vec![b'l'; 50], vec![b'e'; 50]].concat(),
        b"d1:k2147483648:x".to_vec(),
        Vec::new(),
    ];
    assert_eq!(bad[0].len(), 513);
    for (n, pv) in bad.into_iter().enumerate() {
        let from = addr(&format!("192.168.1.{}:7777", n + 1));
        let token = bench.token(from);
        bench.ask_reply(from, announce(id(9), 9999, token.clone(), Some(pv)));
        let reply = bench.ask_reply(from, get_peers(id(9), true, Some(token)));
        assert!(reply.values.contains(&addr(&format!("192.168.1.{}:9999", n + 1))) && reply.pvs.iter().all(Vec::is_empty));
        bench.at += Duration::from_secs(1);
    }
    assert_eq!((bench.node.status().stored_contacts, bench.node.store.pv_bytes()), (6, 0));
    // 600 tokens, depth 50, a string of 2 GiB as whole datagrams.
    for bytes in [[b"d1:y".to_vec(), b"0:".repeat(600)].concat(), vec![b'd'; 50], b"d1:t2147483648:".to_vec()] {
        assert!(bench.receive_bytes(addr(X), &bytes).0.is_empty());
    }
    assert_eq!(bench.node.counters.malformed, 3);
}

/// One address that announces without end is held by the rates and the quotas; ports of services are refused; `more` counts.
#[test]
fn store_flood() {
    let mut bench = Bench::with(Network::Private, |config| config.limits.contacts_per_address_max = 500);
    let from = addr(X);
    let token = bench.token(from);
    assert_eq!(bench.ask_error(from, announce(id(1), 80, token.clone(), None)), code::PROTOCOL);
    let key = |n: u32| Id([&n.wrapping_mul(0x9e37_79b9).to_be_bytes()[..], &[0; 16]].concat().try_into().unwrap());
    let mut refused = 0;
    for n in 0..2_000_u32 {
        let more = (0..48).map(|m| key(n * 49 + m + 1)).collect();
        let verb = Announce { key: key(n * 49), port: 9999, implied_port: false, token: token.clone(), pv: None, more, statement: None };
        let body = bench.ask(from, Verb::Announce(Box::new(verb))).map(|m| m.body);
        refused += usize::from(matches!(body, Some(Body::Error { code: code::SERVER, .. })));
        bench.at += Duration::from_millis(100);
    }
    assert_eq!(bench.node.status().stored_contacts, 500);
    assert!(refused > 1_000, "{refused}");
    let limited = bench.node.counters.limited;
    (0..1_000).for_each(|_| drop(bench.ask(from, Verb::Ping)));
    assert!(bench.node.counters.limited >= limited + 850, "a hundred at once and no more");
    assert!(bench.ask(addr("192.168.7.9:7777"), Verb::Ping).is_some(), "others are still answered");
}

/// Where 32 closer nodes are known the key is somebody else's.
#[test]
fn refuses_far_keys() {
    let mut bench = Bench::new(Network::Private, Schedule::Adapted);
    let own = bench.node.id(Family::V4);
    let now = bench.now();
    let mut rng = StdRng::seed_from_u64(3);
    for n in 0..200_u32 {
        let near = own.not();
        let info = NodeInfo {
            id: near.random_beside(1 + (n as usize % 60), rng.random()),
            addr: SocketAddr::new([10, 9, (n / 200) as u8, (n % 200) as u8 + 1].into(), 7777),
        };
        let other = NodeInfo {
            id: own.random_beside(n as usize % 40, rng.random()),
            addr: SocketAddr::new([10, 8, 0, (n % 200) as u8 + 1].into(), 7777),
        };
        bench.node.assume_answered(&[info, other], true, Duration::from_millis(50), now);
    }
    let token = bench.token(addr(X));
    let far = bench.node.tables[0].closer_than_own(&own.not(), 1_000);
    assert!(far >= CLOSER_NODES_MAX, "{far}");
    assert_eq!(bench.ask_error(addr(X), announce(own.not(), 9999, token.clone(), None)), code::GENERIC);
    bench.ask_reply(addr(X), announce(own, 9999, token, None));
    assert_eq!(bench.node.status().stored_contacts, 1);
}

/// BEP 44: kept by its hash, given back byte for byte, at most ten in a second; other writings and mutable items are refused.
#[test]
fn items() {
    let mut bench = Bench::new(Network::Private, Schedule::Adapted);
    let token = bench.token(addr(X));
    let put = |value: &[u8], mutable| Verb::Put { value: value.to_vec(), token: token.clone(), mutable };
    let value = [b"980:".to_vec(), vec![7; 980]].concat();
    bench.ask_reply(addr(X), put(&value, false));
    let get = || Verb::Get { target: item_target(&value), want: Want::default() };
    let bytes_in = query(get()).encode().unwrap().len();
    let (sent, _) = bench.receive(addr(X), &query(get()));
    assert!(sent[0].bytes.len() <= 13 * bytes_in);
    assert_eq!(bench.ask_reply(addr(X), get()).item, Some(value.clone()));
    let given = (0..50).filter(|_| bench.ask_reply(addr(X), get()).item.is_some()).count();
    assert_eq!(given, 8, "of ten a second two are gone");
    assert_eq!(bench.ask_error(addr(X), put(&[b"998:".to_vec(), vec![7; 998]].concat(), false)), code::TOO_BIG);
    bench.at += Duration::from_secs(10);
    let raw = |value: &str| {
        format!("d1:ad2:id20:abcdefghij01234567895:token8:{}1:v{value}e1:q3:put2:roi1e1:t2:aa1:y1:qe", "T".repeat(8)).into_bytes()
    };
    let with_token = |value: &str, extra: &str| {
        let mut bytes = raw(&format!("{value}{extra}"));
        let at = bytes.windows(8).position(|w| w == b"TTTTTTTT").unwrap();
        bytes[at..at + 8].copy_from_slice(&token);
        bytes
    };
    let (sent, _) = bench.receive_bytes(addr(X), &with_token("i01e", ""));
    assert!(matches!(sent[0].message().body, Body::Error { code: code::PROTOCOL, .. }));
    let mutable = String::from_utf8_lossy(&raw("1:x")).replace("1:ad", "1:ad3:seqi1e").into_bytes();
    let (sent, _) = bench.receive_bytes(addr(X), &mutable);
    assert!(matches!(sent[0].message().body, Body::Error { .. }));
    assert_eq!(bench.node.status().stored_items, 1);
}

fn statement(subject: [u8; 32], time_s: u64, speaker: u8) -> Vec<u8> {
    let statement = Statement {
        kind: Said::FalseList,
        piece: 1,
        size: 9,
        proof_at: addr("192.168.1.1:9977"),
        subject,
        speaker: [0; 32],
        digest: [1; 32],
        proof: [2; 32],
        time_s,
    };
    statement.sign(&SigningKey::from_bytes(&[speaker; 32])).to_vec()
}

/// Nothing about the node itself, nothing void, false, or out of its place is kept.
#[test]
fn statements() {
    let mut bench = Bench::new(Network::Private, Schedule::Adapted);
    let token = bench.token(addr(X));
    let say = |place: Id, bytes: Vec<u8>| {
        Verb::Announce(Box::new(Announce {
            key: place,
            port: 9977,
            implied_port: false,
            token: token.clone(),
            pv: None,
            more: Vec::new(),
            statement: Some(bytes),
        }))
    };
    let (own, other) = (bench.node.id(Family::V4), Id::of_key(&[8; 32], None, 5));
    assert_eq!(bench.ask_error(addr(X), say(own.not(), statement([1; 32], UNIX, 4))), code::GENERIC);
    bench.ask_reply(addr(X), say(other.not(), statement([8; 32], UNIX, 4)));
    let month = 31 * 24 * 3600;
    for bad in [
        statement([8; 32], UNIX - month, 5),
        statement([8; 32], UNIX + 3_600, 5),
        statement([7; 32], UNIX, 5),
        vec![0; STATEMENT_BYTES],
        vec![1; 9],
    ] {
        assert_eq!(bench.ask_error(addr(X), say(other.not(), bad)), code::PROTOCOL);
    }
    let mut good = statement([8; 32], UNIX, 5);
    good[1] = 9; // No kind that says something good exists.
    assert_eq!(bench.ask_error(addr(X), say(other.not(), good)), code::PROTOCOL);
    assert_eq!(bench.node.status().stored_statements, 1);
    let ask = |token| Verb::GetPeers { key: other.not(), want: Want::default(), pv: false, statements: true, token };
    assert!(bench.ask_reply(addr(X), ask(None)).statements.is_empty());
    assert_eq!(bench.ask_reply(addr(X), ask(Some(token.clone()))).statements, [statement([8; 32], UNIX, 4)]);
    let now = bench.now();
    bench.node.set_unix_time(now, UNIX + month);
    assert!(bench.ask_reply(addr(X), ask(Some(token.clone()))).statements.is_empty());
}

// --- public networks

/// Until somebody got through, a node on a public network answers and announces nothing; then it does.
#[test]
fn read_only_until_dialled_back() {
    let mut bench = Bench::with(Network::Public, |config| config.schedule = Schedule::Standard);
    let now = bench.now();
    let friend = NodeInfo { id: id(0x40), addr: addr("8.8.4.4:7777") };
    bench.node.assume_answered(&[friend], true, Duration::from_millis(50), now);
    bench.node.set_announces(vec![AnnounceKey { key: id(1), pv: None }], now);
    let (sent, _) = bench.run(Duration::from_secs(11));
    let asked = sent.iter().find(|s| matches!(s.message().body, Body::Query { verb: Verb::GetPeers { .. }, .. })).unwrap();
    assert!(sent.iter().all(|s| s.message().read_only), "it says that it answers nobody");
    assert!(bench.ask(friend.addr, Verb::Ping).is_none(), "a query from where it asked proves nothing");
    let (sent, _) = bench.receive(friend.addr, &answer(asked, friend.id, Reply { token: Some(b"12345678".to_vec()), ..Reply::default() }));
    let dial = sent.iter().find(|s| matches!(s.message().body, Body::Query { verb: Verb::Dial { port: 9977, .. }, .. })).unwrap();
    let (_, events) = bench.receive(friend.addr, &answer(dial, friend.id, Reply { dialled: Some(true), ..Reply::default() }));
    assert!(events.contains(&Event::Reachable(true)));
    assert!(bench.ask(addr("9.9.9.9:7777"), Verb::Ping).is_some());
    let (sent, _) = bench.run(Duration::from_secs(30));
    assert!(
        sent.iter().any(|s| matches!(&s.message().body, Body::Query { verb: Verb::GetPeers { key, .. }, .. } if *key == id(1))),
        "now it walks to announce"
    );
    // A query from an address that was never asked does as well.
    let mut bench = Bench::new(Network::Public, Schedule::Standard);
    let (_, events) = bench.receive(addr("9.9.9.9:7777"), &query(Verb::Ping));
    assert!(events.contains(&Event::Reachable(true)));
    assert!(bench.receive(addr("192.168.1.1:7777"), &query(Verb::Ping)).0.is_empty(), "private addresses are not of this network");
}

/// A stranger cannot make this machine connect to a third address or a service, nor often.
#[test]
fn dials_only_the_asker() {
    let mut bench = Bench::new(Network::Private, Schedule::Adapted);
    let token = bench.token(addr(X));
    let mut dial = |from: &str, port: u16, token: Vec<u8>| {
        let now = bench.now();
        bench.node.datagram(addr(from), &query(Verb::Dial { port, token }).encode().unwrap(), now);
        let actions: Vec<Action> = std::iter::from_fn(|| bench.node.poll()).collect();
        actions.into_iter().find_map(|a| match a {
            Action::Dial { to, ticket } => Some((to, ticket)),
            _ => None,
        })
    };
    assert_eq!(dial(X, 22, token.clone()), None);
    assert_eq!(dial("192.168.7.8:7777", 9977, token.clone()), None, "a token of another address");
    let (to, ticket) = dial(X, 9977, token.clone()).unwrap();
    assert_eq!(to, addr("192.168.7.7:9977"));
    assert_eq!(dial(X, 9977, token.clone()), None, "a repetition");
    assert_eq!(dial("192.168.7.7:7000", 9978, token), None, "once a minute");
    let now = bench.now();
    bench.node.dial_result(ticket, true, now);
    let (sent, _) = bench.drain();
    assert!(matches!(&sent[0].message().body, Body::Reply(r) if r.dialled == Some(true)));
    // More askers than are served at once.
    let mut served = 0;
    for n in 1..=50_u8 {
        let from = addr(&format!("192.168.100.{n}:7777"));
        let token = bench.token(from);
        let now = bench.now();
        bench.node.datagram(from, &query(Verb::Dial { port: 9977, token }).encode().unwrap(), now);
        served += std::iter::from_fn(|| bench.node.poll()).filter(|a| matches!(a, Action::Dial { .. })).count();
        bench.at += Duration::from_millis(1_100);
    }
    assert_eq!(served, DIALS_MAX);
    // However quickly the connections end: the addresses of the last minute are not forgotten.
    let mut bench = Bench::new(Network::Private, Schedule::Adapted);
    let mut served = 0;
    for n in 1..=118_u8 {
        let from = addr(&format!("192.168.101.{n}:7777"));
        let token = bench.token(from);
        let now = bench.now();
        bench.node.datagram(from, &query(Verb::Dial { port: 9977, token }).encode().unwrap(), now);
        let tickets = std::iter::from_fn(|| bench.node.poll()).filter_map(|a| match a {
            Action::Dial { ticket, .. } => Some(ticket),
            _ => None,
        });
        for ticket in tickets.collect::<Vec<_>>() {
            served += 1;
            bench.node.dial_result(ticket, true, now);
        }
        bench.drain();
        bench.at += Duration::from_millis(500);
    }
    assert_eq!(served, server::DIALLED_MAX, "in 59 s");
}

/// The id follows the address that three networks agree on, and keeps the key's bytes.
#[test]
fn votes_on_its_address() {
    let mut bench = Bench::new(Network::Public, Schedule::Standard);
    let before = bench.node.id(Family::V4);
    let mut told = Vec::new();
    for (n, voter) in ["8.8.1.1:7777", "8.8.2.2:7777", "9.9.1.1:7777", "11.1.1.1:7777"].iter().enumerate() {
        let now = bench.now();
        bench.node.ping(addr(voter), now);
        let (sent, _) = bench.drain();
        let message = Message { ip: Some(addr("124.31.75.21:9977")), ..answer(&sent[0], id(n as u8), Reply::default()) };
        told = bench.receive(addr(voter), &message).1;
        assert_eq!(bench.node.id(Family::V4) != before, n == 3, "the two of one /16 are one vote");
    }
    let after = bench.node.id(Family::V4);
    assert!(after.fits_address("124.31.75.21".parse().unwrap()) && after.same_key(&before));
    assert!(told.contains(&Event::IdChanged(Family::V4, after)) && told.contains(&Event::OwnAddress("124.31.75.21".parse().unwrap())));
    assert_eq!(bench.node.status().nodes[0], 4, "the table goes along");
}

/// A copy of this machine shows itself within one round trip; this machine's own voice does not count.
#[test]
fn tells_of_clones() {
    let mut bench = Bench::new(Network::Private, Schedule::Standard);
    let clone = Id::of_key(&[1; 32], None, 0x77);
    let mut ping = query(Verb::Ping);
    ping.body = Body::Query { id: clone, verb: Verb::Ping };
    let (sent, _) = bench.receive(addr(X), &ping);
    let back = sent.iter().find(|s| matches!(s.message().body, Body::Query { .. })).unwrap().clone();
    let (_, events) = bench.receive(addr(X), &answer(&back, clone, Reply::default()));
    assert!(events.contains(&Event::ClonedKey(addr(X))));
    // Its own datagram, come back over another address.
    let mut bench = Bench::new(Network::Private, Schedule::Standard);
    let now = bench.now();
    bench.node.ping(addr("192.168.7.1:9977"), now);
    let (sent, _) = bench.drain();
    let (sent, events) = bench.receive_bytes(addr("192.168.7.1:9977"), &sent[0].bytes);
    assert_eq!((sent.len(), events.len()), (0, 0));
}

/// A node that forgot its secret refuses the token: it gets a second announce with a new one, and no third.
#[test]
fn announces_again_with_a_new_token() {
    let mut bench = Bench::new(Network::Private, Schedule::Standard);
    let (now, friend) = (bench.now(), NodeInfo { id: id(0x40), addr: addr("10.3.0.1:7777") });
    bench.node.assume_answered(&[friend], true, Duration::from_millis(50), now);
    bench.node.set_announces(vec![AnnounceKey { key: id(1), pv: None }], now);
    let (mut told, mut tokens) = (Vec::new(), 0_u8);
    for _ in 0..100 {
        let until = bench.at + Duration::from_millis(100);
        let (sent, _) = bench.run(until);
        for sent in sent {
            match sent.message().body {
                Body::Query { verb: Verb::GetPeers { .. } | Verb::FindNode { .. }, .. } => {
                    tokens += 1;
                    bench.receive(friend.addr, &answer(&sent, friend.id, Reply { token: Some(vec![tokens; 8]), ..Reply::default() }));
                }
                Body::Query { verb: Verb::Announce(announce), .. } => {
                    told.push(announce.token.clone());
                    let error = Message {
                        body: Body::Error { code: code::PROTOCOL, text: "bad token".into() },
                        ..answer(&sent, friend.id, Reply::default())
                    };
                    bench.receive(friend.addr, &error);
                }
                _ => {}
            }
        }
    }
    assert_eq!(told.len(), 2, "{told:?}");
    assert_ne!(told[0], told[1]);
}

// --- bounds

/// Each list that a command or a stranger can make longer ends at its constant.
#[test]
fn every_list_is_bounded() {
    let mut bench = Bench::new(Network::Private, Schedule::Standard);
    let now = bench.now();
    let many: Vec<SocketAddr> = (0..500_u16).map(|n| SocketAddr::new([10, 1, (n >> 8) as u8, n as u8].into(), 7777)).collect();
    bench.node.bootstrap(&many, now);
    bench.drain();
    let nodes: Vec<NodeInfo> = (0..5_000_u16)
        .map(|n| NodeInfo {
            id: Id([&n.to_be_bytes()[..], &[n as u8; 18]].concat().try_into().unwrap()),
            addr: SocketAddr::new([10, 2, (n >> 8) as u8, n as u8].into(), 7777),
        })
        .collect();
    bench.node.restore(&nodes, now);
    let (sent, _) = bench.run(Duration::from_secs(120));
    let pinged: std::collections::BTreeSet<_> = sent.iter().map(|s| s.to).filter(|to| to.ip().to_string().starts_with("10.2.")).collect();
    assert!((RESTORE_MAX - 64..=RESTORE_MAX + 64).contains(&pinged.len()), "{}", pinged.len());
    let per_second = sent.iter().filter(|s| (60_000..70_000).contains(&s.at_ms)).count();
    assert!(per_second <= 10 * 60 * 3, "upkeep keeps to its rate: {per_second} in 10 s");

    let mut bench = Bench::new(Network::Private, Schedule::Standard);
    let now = bench.now();
    bench.node.assume_answered(&nodes[..100], true, Duration::from_millis(50), now);
    let begun = (0..400).filter(|n| bench.node.find_node(id(*n as u8), now).is_ok()).count();
    assert_eq!(begun, LOOKUPS_MAX);
    bench.drain();

    // One address gets 25 queries in ten seconds.
    let mut bench = Bench::new(Network::Private, Schedule::Standard);
    let now = bench.now();
    for _ in 0..60 {
        bench.node.ping(addr(X), now);
    }
    let (sent, events) = bench.drain();
    assert_eq!((sent.len(), events.len()), (usize::from(DATAGRAMS_PER_WINDOW_MAX), 35));

    // Queries under way.
    let mut bench = Bench::new(Network::Private, Schedule::Standard);
    let mut most = 0;
    for n in 0..20_000_u32 {
        let now = bench.now();
        bench.node.ping(SocketAddr::new(std::net::Ipv4Addr::from(0x0a00_0000 + n).into(), 7777), now);
        bench.drain();
        most = most.max(bench.node.pending.len());
        bench.at += Duration::from_millis(2);
    }
    assert_eq!(most, PENDING_MAX);
}

/// What one lookup takes from liars: contacts, queries, and no private matter of a port below 1024.
#[test]
fn a_lookup_is_bounded() {
    let mut bench = Bench::new(Network::Private, Schedule::Standard);
    let now = bench.now();
    bench.node.assume_answered(&[NodeInfo { id: id(0xf0), addr: addr("10.3.0.1:7777") }], true, Duration::from_millis(50), now);
    let lookup = bench.node.get_peers(id(0), now).unwrap();
    let (mut contacts, mut queries, mut done) = (0, 0, None);
    let (mut open, _) = bench.drain();
    let mut next = 0_u32;
    while done.is_none() && next < 100_000 {
        let Some(sent) = open.pop() else {
            let until = bench.at + Duration::from_millis(500);
            let (more, events) = bench.run(until);
            open.extend(more);
            done = events.iter().any(|e| matches!(e, Event::Done { .. })).then_some(());
            next += 1;
            continue;
        };
        let Body::Query { verb: Verb::GetPeers { .. }, .. } = sent.message().body else { continue };
        queries += 1;
        // Always eight closer ones, which do not end, and contacts without end, one of them at a mail server.
        let told: Vec<NodeInfo> = (0..8)
            .map(|_| {
                next += 1;
                let mut near = [0; 20];
                near[12..16].copy_from_slice(&(u32::MAX - next).to_be_bytes());
                NodeInfo { id: Id(near), addr: SocketAddr::new(std::net::Ipv4Addr::from(0x0b00_0000 + next).into(), 7777) }
            })
            .collect();
        let mut values: Vec<SocketAddr> =
            (0..30).map(|n| SocketAddr::new(std::net::Ipv4Addr::from(0x0c00_0000 + next * 40 + n).into(), 9999)).collect();
        values.push(addr("10.9.9.9:25"));
        let who = bench.node.pending.values().find(|p| p.to == sent.to).and_then(|p| p.id).unwrap_or(id(0xf0));
        let (more, events) =
            bench.receive(sent.to, &answer(&sent, who, Reply { nodes: told, values, token: Some(vec![1; 8]), ..Reply::default() }));
        open.extend(more);
        for event in events {
            match event {
                Event::Found { contacts: found, .. } => {
                    assert!(found.iter().all(|c| c.addr.port() != 25));
                    contacts += found.len();
                }
                Event::Done { lookup: l, .. } if l == lookup => done = Some(()),
                _ => {}
            }
        }
    }
    assert!(done.is_some());
    assert_eq!(contacts, FOUND_MAX);
    assert!(queries <= QUERIES_MAX as usize + DETAILS_MAX && queries > 50, "{queries}");
}

/// Tokens of poolfs nodes are used again for five minutes less a margin; tables ask the silent; constants hang together.
#[test]
fn times_hang_together() {
    assert!(TOKEN_USE < token::SECRET_LIFE);
    assert!(REFRESH_POOLFS < storage::CONTACT_LIFE_POOLFS && REFRESH_OTHER < storage::CONTACT_LIFE_OTHER);
    assert!(QUESTIONABLE_AFTER >= Duration::from_secs(900) && K == 8);
}
