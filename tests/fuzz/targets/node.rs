//! A whole node of the DHT, fed datagrams: an input is a series of them, and what breaks is kept with all that led there.

use super::bencode::{known, messages, shape};
use crate::driver::{Subject, Target, behaviour};
use poolfs_net::dht::{Action, AnnounceKey, Config, Event, Network, Node, UNPROVED_FACTOR_MAX};
use poolfs_net::krpc::{Body, DATAGRAM_BYTES_OUT_MAX, Id, Message};
use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

/// Every target of this file.
pub(super) const ALL: &[Target] = &[Target {
    name: "node",
    about: "a node of the DHT: datagrams, each after a byte for its sender and one for the time, with `~~PF~~` between them",
    start: |_| Box::new(Nodes),
    seeds: series,
    tokens: &[
        SEPARATOR,
        "\u{1}",
        "\u{2}",
        "d",
        "e",
        "1:q4:ping",
        "9:get_peers",
        "13:announce_peer",
        "5:token8:",
        "2:pvi1e",
        "2:sti1e",
        "7:pf_dial",
        "2:ro",
        "i1e",
        "4:more",
        "3:get",
        "3:put",
        "6:values",
        "5:nodes",
        "6:nodes6",
        "4:port",
        "12:implied_porti1e",
        "2:ip",
    ],
    input_bytes_max: 24 * 1024,
    memory: (8 << 20, 256),
}];

const SEPARATOR: &str = "~~PF~~";

/// Datagrams of one input that are looked at.
const DATAGRAMS_MAX: usize = 64;

/// Contacts that the node may keep.
const CONTACTS_MAX: usize = 2_000;

/// What was said in tests before: a node for each input, so that an input is all that it depends on.
struct Nodes;

impl Subject for Nodes {
    fn run(&mut self, input: &[u8]) -> u64 {
        let network = if input.len().is_multiple_of(2) { Network::Private } else { Network::Public };
        let mut fed = Fed::new(network);
        let mut seen = 0;
        for datagram in split(input).take(DATAGRAMS_MAX) {
            seen = behaviour((seen, fed.datagram(datagram)));
        }
        fed.check();
        seen
    }
}

/// The parts between separators.
pub(super) fn split(input: &[u8]) -> impl Iterator<Item = &[u8]> {
    let mut rest = Some(input);
    std::iter::from_fn(move || {
        let all = rest.take()?;
        match all.windows(SEPARATOR.len()).position(|window| window == SEPARATOR.as_bytes()) {
            Some(at) => {
                rest = Some(&all[at + SEPARATOR.len()..]);
                Some(&all[..at])
            }
            None => Some(all),
        }
    })
}

/// What [`split`] takes apart.
pub(super) fn join(parts: &[Vec<u8>]) -> Vec<u8> {
    parts.join(SEPARATOR.as_bytes())
}

/// A node and what it asked.
struct Fed {
    node: Node,
    now: Instant,
    asked: Vec<(SocketAddr, Vec<u8>)>,
}

impl Fed {
    fn new(network: Network) -> Self {
        let now = Instant::now();
        let mut config = Config::new([7; 32], [9; 32], network, 9977);
        config.limits.contacts_max = CONTACTS_MAX;
        let mut node = Node::new(config, now, 1_800_000_000);
        node.assume_answered(&known(), true, Duration::from_millis(50), now);
        let key = Id([5; 20]);
        let _busy = node.get_peers(key, now);
        let _busy = node.get_statements(key, now);
        let _busy = node.put_item(b"5:hello".to_vec(), now);
        node.set_announces(vec![AnnounceKey { key, pv: None }], now);
        let mut fed = Self { node, now, asked: Vec::new() };
        fed.look(SocketAddr::from(([8, 8, 8, 8], 8_888)), &[]);
        fed
    }

    /// One datagram: the first byte says from whom, the second after how long.
    fn datagram(&mut self, input: &[u8]) -> u64 {
        let [who, wait, bytes @ ..] = input else { return 0 };
        self.now += Duration::from_millis(u64::from(*wait).pow(2) / 8);
        let mut bytes = bytes.to_vec();
        let mut from = SocketAddr::new(Ipv4Addr::new(8, who / 4 % 4, who % 4, 1).into(), 1_000 + u16::from(*who % 100));
        // Half of them are answers: with the transaction id that is waited for, from the address that was asked.
        if who.is_multiple_of(2)
            && let Some((to, query)) = self.asked.get(usize::from(*who / 2) % self.asked.len().max(1))
        {
            from = *to;
            let transaction = |bytes: &[u8]| bytes.windows(5).position(|w| w == b"1:t4:").map(|at| at + 5);
            if let (Some(theirs), Some(ours)) = (transaction(query), transaction(&bytes))
                && bytes.len() >= ours + 4
            {
                bytes[ours..ours + 4].copy_from_slice(&query[theirs..theirs + 4]);
            }
        }
        self.node.datagram(from, &bytes, self.now);
        self.node.tick(self.now);
        self.look(from, &bytes)
    }

    /// What the node does next, and whether it may.
    fn look(&mut self, from: SocketAddr, input: &[u8]) -> u64 {
        let mut seen = 0;
        while let Some(action) = self.node.poll() {
            seen ^= match action {
                Action::Send { to, bytes } => {
                    assert!(bytes.len() <= DATAGRAM_BYTES_OUT_MAX, "sends {} bytes", bytes.len());
                    let message = Message::decode(&bytes).unwrap_or_else(|err| panic!("sends what it cannot read: {err}"));
                    let what = shape(&message);
                    if let Body::Query { .. } = message.body {
                        assert!(to.port() >= 1_024, "asks a service's port");
                        self.asked.insert(0, (to, bytes));
                        self.asked.truncate(64);
                    } else {
                        assert_eq!(to, from, "answers somebody else");
                        let proved = input.windows(6).any(|w| w == b"5:toke") || input.windows(6).any(|w| w == b"3:get1");
                        assert!(proved || bytes.len() <= UNPROVED_FACTOR_MAX * input.len(), "amplifies");
                    }
                    what
                }
                Action::Dial { to, .. } => {
                    assert!(to.ip() == from.ip() && to.port() >= 1_024, "dials a stranger");
                    1
                }
                Action::Event(Event::Found { contacts, .. }) => {
                    assert!(contacts.iter().all(|contact| contact.addr.port() >= 1_024), "hands on a service's port");
                    2
                }
                Action::Event(event) => behaviour(format!("{event:?}").split(['{', '(']).next()),
            };
        }
        seen
    }

    fn check(&self) {
        let status = self.node.status();
        assert!(status.stored_contacts <= CONTACTS_MAX && status.nodes.iter().all(|nodes| *nodes <= 1_280), "{status:?}");
    }
}

/// Each real message alone, and all of them in a row.
fn series() -> Vec<Vec<u8>> {
    let with_head = |who: u8| move |bytes: Vec<u8>| [vec![who, 20], bytes].concat();
    let asking: Vec<_> = messages().into_iter().map(with_head(1)).collect();
    let answering: Vec<_> = messages().into_iter().map(with_head(2)).collect();
    let all = [asking.clone(), answering.clone()].concat();
    [vec![join(&all)], asking, answering].concat()
}
