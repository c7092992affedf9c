//! Datagrams of a fleet's members, with a right tag: what a stolen key or a broken member can do.

use super::node::{join, split};
use crate::driver::{Subject, Target, behaviour, some};
use poolfs_core::Digest;
use poolfs_net::discovery::{Discovery, DiscoveryConfig, Hello};
use poolfs_net::fleet::auth::{FleetKey, Nonce};
use poolfs_net::fleet::core::{Core, CoreDo};
use poolfs_net::fleet::members::Me;
use poolfs_net::fleet::wire::{Answer, Ask, Change, Envelope, Kind, Ping, Record, State, answer, is_fleet, query};
use poolfs_net::krpc::{DATAGRAM_BYTES_OUT_MAX, Transaction};
use poolfs_net::swarm::FileShape;
use poolfs_net::swarm::fleet::{GroupKey, MemberId, Reply, Want};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Every target of this file.
pub(super) const ALL: &[Target] = &[
    Target {
        name: "fleet",
        about: "the decoder of a fleet's datagrams",
        start: |_| Box::new(|input: &[u8]| wire(input)),
        seeds: datagrams,
        tokens: TOKENS,
        input_bytes_max: 1_700,
        memory: (256 * 1024, 64),
    },
    Target {
        name: "member",
        about: "a machine of a fleet: tagged datagrams, each after a byte for its sender and one for the time, with `~~PF~~` between",
        start: |_| Box::new(Members),
        seeds: series,
        tokens: TOKENS,
        input_bytes_max: 24 * 1024,
        memory: (8 << 20, 256),
    },
    Target {
        name: "hello",
        about: "what nodes of a link say of themselves by multicast",
        start: |_| {
            let config = DiscoveryConfig::default();
            Box::new(move |input: &[u8]| hello(&config, input))
        },
        seeds: || {
            vec![Hello { joining: true, port: 9977, id: [3; 20] }.to_bytes(), Hello { joining: false, port: 1, id: [4; 20] }.to_bytes()]
        },
        tokens: &["poolfs-1 hello", "~~PF~~"],
        input_bytes_max: 700,
        memory: (128 * 1024, 64),
    },
];

const TOKENS: &[&str] = &[
    "~~PF~~",
    "d",
    "l",
    "e",
    "i0e",
    "i1e",
    "i-1e",
    "i65536e",
    "1:ad",
    "1:rd",
    "2:id20:",
    "2:ha32:",
    "2:ha16:",
    "1:q7:pf_ping",
    "1:q7:pf_want",
    "1:q7:pf_have",
    "1:q6:pf_who",
    "1:q7:pf_list",
    "1:y1:q",
    "1:y1:r",
    "1:t4:",
    "1:f",
    "1:g",
    "1:h2:",
    "1:n",
    "1:b6:",
    "1:c18:",
    "1:d",
    "1:m",
    "1:p",
    "1:s",
    "1:t4:",
    "1:w",
    "1:x",
    "1:a20:",
    "4:rack",
];

const UNIX_S: u64 = 1_800_000_000;

fn key() -> FleetKey {
    FleetKey::new([5; 32])
}

fn id(at: u8) -> MemberId {
    MemberId(*Digest::of(&[at]).0.first_chunk().expect("20 of 32 bytes"))
}

fn contact(at: u8) -> SocketAddr {
    SocketAddr::from(([10, 1, 0, at], 9977))
}

fn wire(input: &[u8]) -> u64 {
    let read = Envelope::read(input);
    assert!(!is_fleet(input) || read.is_some());
    let Some(envelope) = read else { return 0 };
    if envelope.is_query {
        let Some((who, ask)) = envelope.query() else { return 1 };
        // What was understood and is written anew is understood the same.
        let again = query(&key(), who, *b"aaaa", Nonce([1; 8]), UNIX_S, &ask);
        assert!(again.len() <= DATAGRAM_BYTES_OUT_MAX);
        let read = Envelope::read(&again).expect("what is written can be read");
        assert_eq!(read.query(), Some((who, ask.clone())), "written otherwise than read");
        return behaviour(match ask {
            Ask::Ping(ping) => (1, some(ping.changes.len()), ping.sender.v4.is_some(), ping.sender.v6.is_some()),
            Ask::Want(want) => (2, some(want.bad.len()), want.mirror_bad, want.mirror_pace.is_some()),
            Ask::Have(digests) => (3, some(digests.len()), false, false),
            Ask::List { .. } => (4, 0, false, false),
            Ask::Who(_) => (5, 0, false, false),
        });
    }
    let mut seen = 0;
    for kind in [Kind::Ping, Kind::Want, Kind::Have, Kind::List, Kind::Who] {
        let Some((who, said, ip)) = envelope.answer(kind) else { continue };
        let again = answer(&key(), who, &Transaction::own(*b"aaaa"), Nonce([1; 8]), contact(1), &said);
        let read = Envelope::read(&again).expect("what is written can be read");
        let (_, back, _) = read.answer(kind).expect("what was understood is understood again");
        assert_eq!(back, said, "written otherwise than read");
        seen = behaviour((
            seen,
            match said {
                Answer::Pong { ping, .. } => (1, some(ping.changes.len()), ip.is_some()),
                Answer::Reply(reply) => (2, some(reply.from.len()) + 8 * u32::from(reply.take.is_some()), reply.see.is_some()),
                Answer::Had => (3, 0, false),
                Answer::List { members, end } => (4, some(members.len()), end),
                Answer::Who(holders) => (5, some(holders.len()), false),
            },
        ));
    }
    seen
}

/// A machine for each input.
struct Members;

impl Subject for Members {
    fn run(&mut self, input: &[u8]) -> u64 {
        let start = Instant::now();
        let me = Me { id: id(0), port: 9977, started_s: UNIX_S, zone: String::new(), zone_local: false, near: None };
        let mut fed = Fed { core: Core::new(me, Some(key()), [1; 32], start, UNIX_S), now: start, asked: Vec::new(), nonce: 0 };
        for at in 1..4 {
            fed.core.hint(contact(at), start);
        }
        fed.look(contact(1), 0);
        let file = FileShape::of(Digest([5; 32]), 20 << 20);
        let mut seen = 0;
        for (turn, datagram) in split(input).take(64).enumerate() {
            seen = behaviour((seen, fed.datagram(datagram)));
            if turn % 8 == 3 {
                fed.core.want(file, |_| false, fed.now);
                fed.core.who(file.digest, fed.now);
            }
        }
        seen
    }
}

struct Fed {
    core: Core,
    now: Instant,
    asked: Vec<(SocketAddr, Vec<u8>)>,
    nonce: u64,
}

impl Fed {
    fn datagram(&mut self, input: &[u8]) -> u64 {
        let [who, wait, bytes @ ..] = input else { return 0 };
        self.now += Duration::from_millis(u64::from(*wait).pow(2) / 8);
        let mut from = contact(1 + who % 7);
        let mut bytes = bytes.to_vec();
        let Some(envelope) = Envelope::read(&bytes) else { return 1 };
        let at = envelope.tag.as_ptr() as usize - bytes.as_ptr() as usize;
        if envelope.is_query {
            self.nonce += 1;
            let tag = key().sign(Nonce(self.nonce.to_be_bytes()), UNIX_S, &[&envelope.tagged]);
            bytes[at..at + tag.len()].copy_from_slice(&tag);
        } else if !self.asked.is_empty() {
            // An answer to one of its questions, with its transaction and the tag over its nonce.
            let (to, query) = self.asked[usize::from(*who) % self.asked.len()].clone();
            from = to;
            let asked = Envelope::read(&query).expect("what it sends can be read");
            let nonce = Nonce(asked.tag[8..16].try_into().expect("8 bytes"));
            if let Some(ours) = bytes.windows(5).rposition(|w| w == b"1:t4:")
                && bytes.len() >= ours + 9
            {
                bytes[ours + 5..ours + 9].copy_from_slice(asked.transaction.as_slice());
            }
            let Some(envelope) = Envelope::read(&bytes) else { return 2 };
            let tag = key().sign_reply(nonce, &[&envelope.tagged]);
            bytes[at..at + tag.len()].copy_from_slice(&tag);
        }
        self.core.datagram(from, &bytes, self.now);
        if self.core.next_timeout() <= self.now {
            self.core.tick(self.now);
        }
        self.look(from, bytes.len())
    }

    fn look(&mut self, from: SocketAddr, length: usize) -> u64 {
        let mut seen = 0;
        let mut answers = 0;
        while let Some(todo) = self.core.poll() {
            seen ^= match todo {
                CoreDo::Send { to, bytes } => {
                    assert!(bytes.len() <= DATAGRAM_BYTES_OUT_MAX, "sends {} bytes", bytes.len());
                    let envelope = Envelope::read(&bytes).expect("sends what it cannot read");
                    assert!(to.port() >= 1_024 && !to.ip().is_loopback(), "sends to {to}");
                    if envelope.is_query {
                        let ask = envelope.query().expect("asks what it does not understand").1.kind();
                        self.asked.insert(0, (to, bytes));
                        self.asked.truncate(32);
                        behaviour(format!("{ask:?}"))
                    } else {
                        answers += 1;
                        assert!(to == from || length == 0 || answers < 64, "answers many at once");
                        3
                    }
                }
                CoreDo::Fetch { piece, from, .. } => behaviour((4, piece % 16 == 0, format!("{from:?}").len())),
                CoreDo::Done(_) => 5,
                CoreDo::Holders { holders, .. } => behaviour((6, some(holders.len()))),
            };
        }
        behaviour((seen, some(self.core.members().len())))
    }
}

fn hello(config: &DiscoveryConfig, input: &[u8]) -> u64 {
    let now = Instant::now();
    let mut discovery = Discovery::new(config, [9; 20], now, 1);
    let mut seen = 0;
    for part in split(input).take(100) {
        if let Some(hello) = Hello::parse(part) {
            assert_ne!(hello.port, 0, "a port that nobody has");
            assert_eq!(Hello::parse(&hello.to_bytes()), Some(hello), "written otherwise than read");
            seen += if hello.joining { 2 } else { 1 };
        }
        let from = SocketAddr::from(([192, 168, 0, u8::try_from(part.len() % 250).expect("below 250")], 5));
        if let Some(to) = discovery.heard(now, from, part) {
            assert!(to.ip() == from.ip() && to.port() != 0, "pings somebody else");
            seen += 1 << 16;
        }
    }
    seen
}

/// Real datagrams of each kind.
fn datagrams() -> Vec<Vec<u8>> {
    let record = |n: u8| Record {
        id: id(n),
        incarnation: UNIX_S,
        v4: match contact(n) {
            SocketAddr::V4(v4) => Some(v4),
            SocketAddr::V6(_) => None,
        },
        v6: "[2001:db8::9]:9977".parse().ok(),
        zone: Arc::from("rack"),
    };
    let change = |n| Change { state: State::Alive, record: record(n) };
    let ping = Ping { sender: record(1), changes: vec![change(2), Change { state: State::Suspect, record: record(3) }] };
    let want = Want {
        key: GroupKey { digest: Digest([5; 32]), group: 1 },
        size: 20 << 20,
        have: 0b11,
        bad: vec![contact(3)],
        silent: vec![contact(2)],
        mirror_bad: true,
        mirror_pace: Some(Duration::from_millis(1_500)),
        room: 3,
        newcomer: true,
    };
    let reply = Reply {
        take: Some((0x8001, Duration::from_secs(5))),
        from: vec![(contact(2), 1), (contact(3), 2)],
        wait: Some(Duration::from_millis(250)),
        see: Some(contact(3)),
        free: true,
    };
    let asks = [
        Ask::Ping(ping.clone()),
        Ask::Want(want),
        Ask::Have(vec![Digest([5; 32]); 2]),
        Ask::Who(Digest([5; 32])),
        Ask::List { after: id(1) },
    ];
    let answers = [
        Answer::Pong { ping, digest: 7, count: 3 },
        Answer::Reply(reply),
        Answer::Had,
        Answer::Who(vec![contact(2), contact(3)]),
        Answer::List { members: vec![change(2), change(3), change(4)], end: true },
    ];
    let queries = asks.iter().map(|ask| query(&key(), id(1), *b"aaaa", Nonce([1; 8]), UNIX_S, ask));
    let said = answers.iter().map(|said| answer(&key(), id(1), &Transaction::own(*b"aaaa"), Nonce([1; 8]), contact(1), said));
    queries.chain(said).collect()
}

fn series() -> Vec<Vec<u8>> {
    let all: Vec<Vec<u8>> =
        datagrams().into_iter().enumerate().map(|(at, bytes)| [vec![u8::try_from(at).unwrap(), 30], bytes].concat()).collect();
    // Pongs first, so that there are members to speak with.
    let pongs = [all[4].clone(), all[4].clone(), all[7].clone()];
    vec![join(&all), join(&[&pongs[..], &all].concat()), join(&[&all[..], &all].concat())]
}
