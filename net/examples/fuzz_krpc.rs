//! Feeds the KRPC decoder and a whole node with damaged and arbitrary datagrams for a time.
//!
//! `fuzz_krpc decode|node [SECONDS] [SEED]`. Starts from real messages of each kind, changes bytes, lengths and order, splices two
//! of them, and keeps what reached something new (another kind of result, another verb, another event). A panic, an answer
//! past its budget or a table past its limit ends it with the seed and the input in hexadecimal.
#![allow(clippy::print_stdout, reason = "its output is its purpose")]

use poolfs_net::dht::{Action, Config, Event, Network, Node, UNPROVED_FACTOR_MAX};
use poolfs_net::krpc::{
    Announce, Body, DATAGRAM_BYTES_OUT_MAX, Id, Message, NodeInfo, Pv, Reply, Statement, Transaction, VERSION, Verb, Want,
};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom as _;
use rand::{Rng as _, RngExt as _, SeedableRng as _};
use std::collections::BTreeSet;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

/// Inputs kept because they reached something new.
const CORPUS_MAX: usize = 4_096;

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let seconds = args.get(1).and_then(|s| s.parse().ok()).unwrap_or(600);
    let seed = args.get(2).and_then(|s| s.parse().ok()).unwrap_or(1);
    let node = match args.first().map(String::as_str) {
        Some("decode") => false,
        Some("node") => true,
        _ => {
            println!("usage: fuzz_krpc decode|node [SECONDS] [SEED]");
            return;
        }
    };
    let mut fuzz = Fuzz { rng: StdRng::seed_from_u64(seed), corpus: messages(), seen: BTreeSet::new() };
    let until = Instant::now() + Duration::from_secs(seconds);
    let executions = if node { fuzz.run_node(until, seed) } else { fuzz.run_decode(until) };
    println!(
        "{executions} executions in {seconds} s, seed {seed}, corpus {}, behaviours {}: nothing found",
        fuzz.corpus.len(),
        fuzz.seen.len()
    );
}

struct Fuzz {
    rng: StdRng,
    corpus: Vec<Vec<u8>>,
    seen: BTreeSet<u64>,
}

impl Fuzz {
    /// One of the corpus, changed.
    fn input(&mut self) -> Vec<u8> {
        let mut bytes = self.corpus.choose(&mut self.rng).cloned().unwrap_or_default();
        for _ in 0..self.rng.random_range(0..5) {
            let length = bytes.len().max(1);
            let (at, to) = (self.rng.random_range(0..length), self.rng.random_range(0..length));
            match self.rng.random_range(0..8) {
                0 if !bytes.is_empty() => bytes[at] = self.rng.random(),
                1 if !bytes.is_empty() => bytes[at] ^= 1 << self.rng.random_range(0..8),
                2 => bytes.truncate(at),
                3 => bytes.insert(at.min(bytes.len()), *b"0123456789ilde:-".choose(&mut self.rng).unwrap_or(&b'd')),
                4 if !bytes.is_empty() => drop(bytes.drain(at.min(to)..at.max(to))),
                5 => {
                    let part = bytes[at.min(to).min(bytes.len())..at.max(to).min(bytes.len())].to_vec();
                    let place = self.rng.random_range(0..=bytes.len());
                    bytes.splice(place..place, part);
                }
                6 => {
                    let other = self.corpus.choose(&mut self.rng).cloned().unwrap_or_default();
                    bytes.truncate(at);
                    bytes.extend_from_slice(&other[to.min(other.len())..]);
                }
                _ => {
                    let bits = self.rng.random_range(1..63);
                    let digits = self.rng.random_range(0_u64..1 << bits).to_string();
                    let place = at.min(bytes.len());
                    bytes.splice(place..place, digits.into_bytes());
                }
            }
            bytes.truncate(1_700);
        }
        if self.rng.random_range(0..100) == 0 {
            bytes = vec![0; self.rng.random_range(0..1_600)];
            self.rng.fill_bytes(&mut bytes);
        }
        bytes
    }

    /// Keeps an input whose behaviour was not seen yet.
    fn learn(&mut self, behaviour: u64, bytes: Vec<u8>) {
        if self.seen.insert(behaviour) && self.corpus.len() < CORPUS_MAX {
            self.corpus.push(bytes);
        }
    }

    fn run_decode(&mut self, until: Instant) -> u64 {
        let mut executions = 0_u64;
        while !executions.is_multiple_of(1_024) || Instant::now() < until {
            let bytes = self.input();
            executions += 1;
            let (decoded, pv, said) = (Message::decode(&bytes), Pv::parse(&bytes), Statement::check(&bytes, 1_800_000_000));
            if let Ok(message) = &decoded
                && let Ok(again) = message.encode()
            {
                // What is written can be read, and says the same.
                let read = Message::decode(&again).unwrap_or_else(|err| panic!("{err}: {}", hex(&bytes)));
                assert!(read.encode().as_ref() == Ok(&again), "does not settle: {}", hex(&bytes));
            }
            if let Ok(pv) = &pv {
                assert!(pv.encode().len() <= 512 && Pv::parse(&pv.encode()).as_ref() == Ok(pv), "pv: {}", hex(&bytes));
            }
            let shape = match &decoded {
                Ok(message) => shape(message),
                Err(err) => 1_000_000 + hash(&format!("{err:?}").split("query").next()),
            };
            self.learn(shape ^ hash(&format!("{:?}{:?}", pv.err(), said.err())), bytes);
        }
        executions
    }

    fn run_node(&mut self, until: Instant, seed: u64) -> u64 {
        let mut executions = 0;
        // One seed for each node: the networks of strangers and the private ones take turns.
        for node in 0.. {
            if Instant::now() >= until {
                break;
            }
            executions += self.one_node(seed.wrapping_add(node));
        }
        executions
    }

    /// A node in a network, twenty thousand datagrams, some of them answers to what it asked.
    fn one_node(&mut self, seed: u64) -> u64 {
        let start = Instant::now();
        let network = if seed.is_multiple_of(2) { Network::Private } else { Network::Public };
        let mut config = Config::new([7; 32], [u8::try_from(seed % 251).unwrap_or(0); 32], network, 9977);
        config.limits.contacts_max = 2_000;
        let mut node = Node::new(config, start, 1_800_000_000);
        let mut now = start;
        node.assume_answered(&known(), true, Duration::from_millis(50), now);
        let mut asked: Vec<(SocketAddr, Vec<u8>)> = Vec::new();
        for step in 0..20_000_u32 {
            now += Duration::from_micros(self.rng.random_range(0..40_000));
            if step % 500 == 0 {
                let key = Id(self.rng.random());
                let _busy = node.get_peers(key, now);
                let _busy = node.get_statements(key, now);
                let _busy = node.put_item(b"5:hello".to_vec(), now);
                node.set_announces(vec![poolfs_net::dht::AnnounceKey { key, pv: None }], now);
            }
            let mut bytes = self.input();
            let mut from = SocketAddr::new(
                Ipv4Addr::new(8, self.rng.random_range(0..4), self.rng.random_range(0..4), 1).into(),
                self.rng.random_range(1_000..1_100),
            );
            // Half of them as answers: with the transaction id that it is waiting for, from the address that it asked.
            if step % 2 == 0
                && let Some((to, query)) = asked.choose(&mut self.rng)
            {
                from = *to;
                let t = |bytes: &[u8]| bytes.windows(5).position(|w| w == b"1:t4:");
                if let (Some(theirs), Some(ours)) = (t(query), t(&bytes))
                    && bytes.len() >= ours + 9
                {
                    bytes[ours + 5..ours + 9].copy_from_slice(&query[theirs + 5..theirs + 9]);
                }
            }
            node.datagram(from, &bytes, now);
            node.tick(now);
            let mut behaviour = 0;
            while let Some(action) = node.poll() {
                behaviour ^= hash(&self.look(&action, from, &bytes, &mut asked));
            }
            self.learn(behaviour, bytes);
            asked.truncate(256);
        }
        let status = node.status();
        assert!(status.stored_contacts <= 2_000 && status.nodes.iter().all(|n| *n <= 1_280), "{status:?}");
        20_000
    }

    fn look(&self, action: &Action, from: SocketAddr, input: &[u8], asked: &mut Vec<(SocketAddr, Vec<u8>)>) -> u64 {
        match action {
            Action::Send { to, bytes } => {
                assert!(bytes.len() <= DATAGRAM_BYTES_OUT_MAX, "too long: {}", hex(input));
                let message = Message::decode(bytes).unwrap_or_else(|err| panic!("sends what it cannot read, {err}: {}", hex(input)));
                if let Body::Query { .. } = message.body {
                    asked.insert(0, (*to, bytes.clone()));
                } else {
                    assert_eq!(*to, from, "answers somebody else: {}", hex(input));
                    let proved = input.windows(6).any(|w| w == b"5:toke") || input.windows(6).any(|w| w == b"3:get1");
                    assert!(proved || bytes.len() <= UNPROVED_FACTOR_MAX * input.len(), "amplifies: {}", hex(input));
                }
                shape(&message)
            }
            Action::Dial { to, .. } => {
                assert!(to.ip() == from.ip() && to.port() >= 1_024, "dials a stranger: {}", hex(input));
                1
            }
            Action::Event(Event::Found { contacts, .. }) => {
                assert!(contacts.iter().all(|c| c.addr.port() >= 1_024), "hands on a service's port: {}", hex(input));
                2
            }
            Action::Event(event) => hash(&format!("{event:?}").split(['{', '(']).next()),
        }
    }
}

fn hash(of: &impl std::hash::Hash) -> u64 {
    use std::hash::Hasher as _;
    let mut hasher = std::collections::hash_map::DefaultHasher::new();
    of.hash(&mut hasher);
    hasher.finish()
}

/// What a message is, without its values.
fn shape(message: &Message) -> u64 {
    let kind = match &message.body {
        Body::Query { verb, .. } => match verb {
            Verb::GetPeers { pv, statements, token, want, .. } => format!("get_peers {pv} {statements} {} {want:?}", token.is_some()),
            Verb::Announce(a) => {
                format!("announce {} {} {} {}", a.implied_port, a.pv.is_some(), a.more.len().min(3), a.statement.is_some())
            }
            other => format!("{:?}", std::mem::discriminant(other)),
        },
        Body::Reply(r) => format!(
            "reply {} {} {} {} {} {} {} {:?}",
            r.nodes.len().min(3),
            r.nodes6.len().min(3),
            r.token.is_some(),
            r.values.len().min(3),
            r.pvs.len().min(3),
            r.item.is_some(),
            r.statements.len().min(2),
            r.dialled
        ),
        Body::Error { code, .. } => format!("error {}", code.clamp(&199, &208)),
    };
    hash(&(kind, message.version.is_some(), message.read_only, message.ip.is_some()))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn known() -> Vec<NodeInfo> {
    (0..60_u8)
        .map(|n| NodeInfo { id: Id([n.wrapping_mul(37); 20]), addr: SocketAddr::new(Ipv4Addr::new(8, n, 9, 1).into(), 7_000) })
        .collect()
}

/// A real message of each kind.
fn messages() -> Vec<Vec<u8>> {
    let (key, token) = (Id([5; 20]), b"12345678".to_vec());
    let pv = Pv { key: [3; 32], flags: 3, deltas: Vec::new() }.encode();
    let announce = |pv, more, statement| {
        Verb::Announce(Box::new(Announce { key, port: 9_977, implied_port: true, token: token.clone(), pv, more, statement }))
    };
    let queries = [
        Verb::Ping,
        Verb::FindNode { target: key, want: Want { v4: true, v6: true } },
        Verb::GetPeers { key, want: Want::default(), pv: true, statements: true, token: Some(token.clone()) },
        announce(Some(pv.clone()), vec![key; 2], None),
        announce(None, Vec::new(), Some(vec![1; 236])),
        Verb::Get { target: key, want: Want::default() },
        Verb::Put { value: b"d1:ali1ei-2eee".to_vec(), token: token.clone(), mutable: false },
        Verb::Dial { port: 9_977, token: token.clone() },
    ];
    let envelope = |body| Message { transaction: Transaction::own(*b"aaaa"), version: Some(VERSION), read_only: false, ip: None, body };
    let mut all: Vec<Message> = queries.into_iter().map(|verb| envelope(Body::Query { id: key, verb })).collect();
    let values = vec!["192.0.2.1:9977".parse().ok(), "[2001:db8::1]:9977".parse().ok()].into_iter().flatten().collect();
    let reply =
        Reply { id: key, nodes: known()[..8].to_vec(), token: Some(token), values, pvs: vec![pv.clone(), Vec::new()], ..Reply::default() };
    let item = Reply { id: key, item: Some(b"5:hello".to_vec()), statements: vec![vec![1; 236]], dialled: Some(true), ..Reply::default() };
    all.extend([reply, item].map(|reply| Message { ip: "192.0.2.9:1".parse().ok(), ..envelope(Body::Reply(Box::new(reply))) }));
    all.push(envelope(Body::Error { code: 203, text: "bad token".into() }));
    let mut bytes: Vec<Vec<u8>> = all.iter().filter_map(|message| message.encode().ok()).collect();
    bytes.push(pv);
    bytes
}
