//! Datagrams of the DHT and what rides in them.

use crate::driver::{Target, behaviour, some};
use poolfs_net::krpc::scan::{raw_entry, scan};
use poolfs_net::krpc::{
    Announce, Body, DATAGRAM_BYTES_IN_MAX, DATAGRAM_BYTES_OUT_MAX, Id, Message, NodeInfo, PV_BYTES_MAX, Pv, Reply, Statement, TOKENS_MAX,
    Transaction, VERSION, Verb, Want, statement,
};
use std::net::{Ipv4Addr, SocketAddr};

/// Every target of this file.
pub(super) const ALL: &[Target] = &[
    Target {
        name: "bencode",
        about: "the scan that every datagram passes first",
        start: |_| Box::new(bencode),
        seeds: messages,
        tokens: TOKENS,
        input_bytes_max: 1_700,
        memory: (64 * 1024, 64),
    },
    Target {
        name: "krpc",
        about: "the decoder of the DHT's datagrams",
        start: |_| Box::new(krpc),
        seeds: messages,
        tokens: TOKENS,
        input_bytes_max: 1_700,
        memory: (256 * 1024, 64),
    },
    Target {
        name: "pv",
        about: "what a poolfs node says about a contact",
        start: |_| Box::new(pv),
        seeds: pvs,
        tokens: TOKENS,
        input_bytes_max: 1_000,
        memory: (64 * 1024, 64),
    },
    Target {
        name: "statement",
        about: "what a node says against another",
        start: |_| Box::new(|input: &[u8]| said(input)),
        seeds: statements,
        tokens: &[],
        input_bytes_max: 300,
        memory: (64 * 1024, 16),
    },
];

const TOKENS: &[&str] = &[
    "d",
    "l",
    "i",
    "e",
    "0:",
    "1:",
    "20:",
    "32:",
    "i0e",
    "i-1e",
    "i-0e",
    "i01e",
    "le",
    "de",
    "1:a",
    "1:q",
    "1:r",
    "1:t4:",
    "1:y1:q",
    "1:y1:r",
    "1:y1:e",
    "1:v4:",
    "2:id20:",
    "2:ip",
    "2:ro",
    "4:ping",
    "9:find_node",
    "9:get_peers",
    "13:announce_peer",
    "3:get",
    "3:put",
    "7:pf_dial",
    "5:token8:",
    "5:nodes",
    "6:nodes6",
    "6:values",
    "2:pv",
    "3:pvs",
    "4:more",
    "2:st",
    "3:sts",
    "4:want",
    "2:n4",
    "2:n6",
    "6:target20:",
    "9:info_hash20:",
    "4:port",
    "12:implied_port",
    "1:f",
    "1:k32:",
    "4294967296:",
    "9223372036854775808:",
    "2147483648:",
];

/// A moment within the time of the statements here, seconds since 1970.
pub(super) const NOW_S: u64 = 1_800_000_000;

fn bencode(input: &[u8]) -> u64 {
    let scanned = scan(input);
    if let Ok(scanned) = &scanned {
        assert!(input.len() <= DATAGRAM_BYTES_IN_MAX && scanned.tokens <= TOKENS_MAX);
        // What passed is what the parser behind it takes, but for numbers: the scan bounds their digits, not their values.
        let value = match bt_bencode::from_slice::<bt_bencode::Value>(input) {
            Ok(value) => value,
            Err(err) => {
                assert!(err.to_string().contains("integer"), "scanned but not parsed: {err}");
                return 1;
            }
        };
        let again = bt_bencode::to_vec(&value).expect("a value can be written");
        assert!(!scanned.canonical || again == input, "canonical, but written otherwise");
        if let Some(dict) = value.as_dict() {
            for key in dict.keys() {
                let raw = raw_entry(input, key.as_slice()).expect("a key that was parsed is there");
                assert!(scan(raw).is_ok(), "an entry that is no value");
            }
        }
    }
    behaviour(scanned.map(|scanned| (some(scanned.tokens), scanned.canonical, input.first().copied())).map_err(|err| format!("{err:?}")))
}

fn krpc(input: &[u8]) -> u64 {
    match Message::decode(input) {
        Ok(message) => {
            if let Ok(bytes) = message.encode() {
                assert!(bytes.len() <= DATAGRAM_BYTES_OUT_MAX, "longer than any datagram");
                let read = Message::decode(&bytes).unwrap_or_else(|err| panic!("written but not read: {err}"));
                assert_eq!(read.encode().as_ref(), Ok(&bytes), "does not settle");
            }
            shape(&message)
        }
        Err(err) => behaviour(format!("{err:?}").split("query").next()),
    }
}

fn pv(input: &[u8]) -> u64 {
    let parsed = Pv::parse(input);
    if let Ok(pv) = &parsed {
        let bytes = pv.encode();
        assert!(input.len() <= PV_BYTES_MAX && bytes.len() <= PV_BYTES_MAX, "longer than it may be");
        assert_eq!(Pv::parse(&bytes).as_ref(), Ok(pv), "written but not read");
    }
    behaviour(
        parsed.map(|pv| (pv.deltas.len(), pv.flags.min(4), pv.deltas.iter().any(|d| d.target.is_some()))).map_err(|err| format!("{err:?}")),
    )
}

fn said(input: &[u8]) -> u64 {
    let checked = Statement::check(input, NOW_S);
    if let Ok(statement) = &checked {
        assert_eq!(input.len(), statement::STATEMENT_BYTES);
        assert_ne!(statement.speaker, statement.subject, "speaks about itself");
        let Id(place) = Id::of_key(&statement.subject, None, 77).not();
        assert!(statement.belongs_at(&Id(place)));
    }
    behaviour(checked.map(|statement| format!("{:?}", statement.kind)).map_err(|err| format!("{err:?}")))
}

/// What a message is, without its values.
pub(super) fn shape(message: &Message) -> u64 {
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
    behaviour((kind, message.version.is_some(), message.read_only, message.ip.is_some()))
}

/// Nodes that a node may know.
pub(super) fn known() -> Vec<NodeInfo> {
    (0..60_u8)
        .map(|n| NodeInfo { id: Id([n.wrapping_mul(37); 20]), addr: SocketAddr::new(Ipv4Addr::new(8, n, 9, 1).into(), 7_000) })
        .collect()
}

fn pvs() -> Vec<Vec<u8>> {
    let delta = |n: u8, target| poolfs_net::krpc::Delta { old: [n; 32], bytes: 1_234_567, delta: [n + 1; 32], target };
    let pv = |flags, deltas| Pv { key: [3; 32], flags, deltas }.encode();
    vec![pv(3, Vec::new()), pv(2, vec![delta(1, Some(Id([5; 20]))), delta(2, None), delta(3, None), delta(4, None)])]
}

fn statements() -> Vec<Vec<u8>> {
    let key = ed25519_dalek::SigningKey::from_bytes(&[3; 32]);
    [statement::Kind::FalseList, statement::Kind::FalseDelta, statement::Kind::FalseBytes]
        .map(|kind| {
            let said = Statement {
                kind,
                piece: 7,
                size: 1 << 20,
                proof_at: "192.0.2.7:9977".parse().unwrap(),
                subject: [8; 32],
                speaker: [0; 32],
                digest: [1; 32],
                proof: [2; 32],
                time_s: NOW_S - 60,
            };
            said.sign(&key).to_vec()
        })
        .to_vec()
}

/// A real message of each kind.
pub(super) fn messages() -> Vec<Vec<u8>> {
    let (key, token) = (Id([5; 20]), b"12345678".to_vec());
    let pv = pvs().remove(0);
    let announce = |pv, more, statement| {
        Verb::Announce(Box::new(Announce { key, port: 9_977, implied_port: true, token: token.clone(), pv, more, statement }))
    };
    let queries = [
        Verb::Ping,
        Verb::FindNode { target: key, want: Want { v4: true, v6: true } },
        Verb::GetPeers { key, want: Want::default(), pv: true, statements: true, token: Some(token.clone()) },
        announce(Some(pv.clone()), vec![key; 2], None),
        announce(None, Vec::new(), statements().pop()),
        Verb::Get { target: key, want: Want::default() },
        Verb::Put { value: b"d1:ali1ei-2eee".to_vec(), token: token.clone(), mutable: false },
        Verb::Dial { port: 9_977, token: token.clone() },
    ];
    let envelope = |body| Message { transaction: Transaction::own(*b"aaaa"), version: Some(VERSION), read_only: false, ip: None, body };
    let mut all: Vec<Message> = queries.into_iter().map(|verb| envelope(Body::Query { id: key, verb })).collect();
    let values = vec!["192.0.2.1:9977".parse().ok(), "[2001:db8::1]:9977".parse().ok()].into_iter().flatten().collect();
    let reply =
        Reply { id: key, nodes: known()[..8].to_vec(), token: Some(token), values, pvs: vec![pv.clone(), Vec::new()], ..Reply::default() };
    let item = Reply { id: key, item: Some(b"5:hello".to_vec()), statements: statements(), dialled: Some(true), ..Reply::default() };
    all.extend([reply, item].map(|reply| Message { ip: "192.0.2.9:1".parse().ok(), ..envelope(Body::Reply(Box::new(reply))) }));
    all.push(envelope(Body::Error { code: 203, text: "bad token".into() }));
    all.iter().map(|message| message.encode().expect("a real message")).chain([pv]).collect()
}
