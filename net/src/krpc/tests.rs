//! Golden bytes, sizes, and bytes from outside.
#![allow(clippy::unwrap_used, reason = "tests")]

use super::*;
use proptest::prelude::*;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

fn query(verb: Verb) -> Message {
    let body = Body::Query { id: Id(*b"abcdefghij0123456789"), verb };
    Message { transaction: Transaction::own(*b"aaaa"), version: Some(VERSION), read_only: false, ip: None, body }
}

fn answer(reply: Reply, to: &str) -> Message {
    let body = Body::Reply(Box::new(Reply { id: Id(*b"0123456789abcdefghij"), ..reply }));
    Message { transaction: Transaction::own(*b"aaaa"), version: Some(VERSION), read_only: false, ip: Some(to.parse().unwrap()), body }
}

fn get_peers(pv: bool, token: bool) -> Verb {
    Verb::GetPeers {
        key: Id(*b"mnopqrstuvwxyz123456"),
        want: Want::default(),
        pv,
        statements: false,
        token: token.then(|| b"aoeusnth".to_vec()),
    }
}

fn announce(pv: Option<usize>, more: usize, statement: bool) -> Verb {
    Verb::Announce(Box::new(Announce {
        key: Id(*b"mnopqrstuvwxyz123456"),
        port: 9977,
        implied_port: true,
        token: b"aoeusnth".to_vec(),
        pv: pv.map(|n| vec![b'd'; n]),
        more: vec![Id([b'm'; 20]); more],
        statement: statement.then(|| vec![b's'; STATEMENT_BYTES]),
    }))
}

fn v4(n: u8) -> SocketAddr {
    SocketAddr::new(Ipv4Addr::new(192, 0, 2, n).into(), 9977)
}

fn v6(n: u8) -> SocketAddr {
    SocketAddr::new(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, n.into()).into(), 9977)
}

fn nodes(at: fn(u8) -> SocketAddr) -> Vec<NodeInfo> {
    (0..8).map(|n| NodeInfo { id: Id([n; 20]), addr: at(n) }).collect()
}

/// The examples of BEP 5 byte for byte, with this node's `v` and transaction ids put in their place.
#[test]
fn golden_bytes() {
    let check = |message: Message, want: &str| {
        let bytes = message.encode().unwrap();
        assert_eq!(String::from_utf8_lossy(&bytes), want);
        assert_eq!(Message::decode(&bytes), Ok(message));
    };
    let v = "1:v4:PF\0\u{1}";
    check(query(Verb::Ping), &format!("d1:ad2:id20:abcdefghij0123456789e1:q4:ping1:t4:aaaa{v}1:y1:qe"));
    check(
        query(Verb::FindNode { target: Id(*b"mnopqrstuvwxyz123456"), want: Want { v4: true, v6: true } }),
        &format!("d1:ad2:id20:abcdefghij01234567896:target20:mnopqrstuvwxyz1234564:wantl2:n42:n6ee1:q9:find_node1:t4:aaaa{v}1:y1:qe"),
    );
    check(
        query(get_peers(true, true)),
        &format!(
            "d1:ad2:id20:abcdefghij01234567899:info_hash20:mnopqrstuvwxyz1234562:pvi1e5:token8:aoeusnthe1:q9:get_peers1:t4:aaaa{v}1:y1:qe"
        ),
    );
    check(
        query(announce(Some(3), 1, false)),
        &format!(
            "d1:ad2:id20:abcdefghij012345678912:implied_porti1e9:info_hash20:mnopqrstuvwxyz1234564:more20:mmmmmmmmmmmmmmmmmmmm4:porti9977e2:pv3:ddd5:token8:aoeusnthe1:q13:announce_peer1:t4:aaaa{v}1:y1:qe"
        ),
    );
    let value = b"12:Hello World!".to_vec();
    let put = query(Verb::Put { value, token: b"aoeusnth".to_vec(), mutable: false });
    let bytes = put.encode().unwrap();
    assert!(bytes.windows(15).any(|w| w == b"12:Hello World!"));
    assert_eq!(Message::decode(&bytes), Ok(put));
    check(
        query(Verb::Dial { port: 9977, token: b"aoeusnth".to_vec() }),
        &format!("d1:ad2:id20:abcdefghij01234567894:porti9977e5:token8:aoeusnthe1:q7:pf_dial1:t4:aaaa{v}1:y1:qe"),
    );
    let error = Message { body: Body::Error { code: 201, text: "A Generic Error Ocurred".into() }, ..query(Verb::Ping) };
    check(error, &format!("d1:eli201e23:A Generic Error Ocurrede1:t4:aaaa{v}1:y1:ee"));
    let contact: SocketAddr = "97.120.106.101:11893".parse().unwrap();
    let reply =
        Reply { token: Some(b"aoeusnth".to_vec()), values: vec![contact], pvs: vec![Vec::new()], dialled: Some(true), ..Reply::default() };
    check(
        answer(reply, "97.120.106.101:11893"),
        &format!("d2:ip6:axje.u1:rd2:id20:0123456789abcdefghij2:oki1e3:pvsl0:e5:token8:aoeusnth6:valuesl6:axje.uee1:t4:aaaa{v}1:y1:re"),
    );
    let read_only = Message { read_only: true, ..query(Verb::Ping) };
    check(read_only, &format!("d1:ad2:id20:abcdefghij0123456789e1:q4:ping2:roi1e1:t4:aaaa{v}1:y1:qe"));
}

/// What other nodes send: BEP 5's own examples, other lengths of `t`, no `v`, keys out of order.
#[test]
fn foreign_bytes() {
    let decode = |text: &[u8]| Message::decode(text).unwrap();
    let ping = decode(b"d1:ad2:id20:abcdefghij0123456789e1:q4:ping1:t2:aa1:y1:qe");
    assert_eq!((ping.transaction.as_slice(), ping.version, ping.is_poolfs()), (&b"aa"[..], None, false));
    let reply = decode(b"d1:rd2:id20:abcdefghij01234567895:token8:aoeusnth6:valuesl6:axje.u6:idhtnmee1:t2:aa1:y1:re");
    let Body::Reply(reply) = reply.body else { panic!("a reply") };
    assert_eq!(reply.values, ["97.120.106.101:11893".parse().unwrap(), "105.100.104.116:28269".parse().unwrap()]);
    let unsorted = decode(b"d1:y1:q1:t2:aa1:q4:ping1:ad2:id20:abcdefghij0123456789ee");
    assert!(matches!(unsorted.body, Body::Query { verb: Verb::Ping, .. }));
    let vote = decode(b"d1:ad2:id20:abcdefghij01234567896:target20:mnopqrstuvwxyz1234564:votei1ee1:q4:vote1:t2:aa1:y1:qe");
    assert!(matches!(vote.body, Body::Query { verb: Verb::FindNode { .. }, .. }), "an unknown verb with a target is a find_node");
    let other = decode(b"d1:ad2:id20:abcdefghij0123456789e1:q8:whatever1:t2:aa1:y1:qe");
    assert!(matches!(other.body, Body::Query { verb: Verb::Other { .. }, .. }));
    let error = decode(b"d1:eli201e23:A Generic Error Ocurrede1:t2:aa1:y1:ee");
    assert_eq!(error.body, Body::Error { code: 201, text: "A Generic Error Ocurred".into() });
    let t = |n: usize| {
        [b"d1:ad2:id20:abcdefghij0123456789e1:q4:ping1:t".to_vec(), format!("{n}:").into_bytes(), vec![b't'; n], b"1:y1:qe".to_vec()]
            .concat()
    };
    for length in [1, 2, 4, 20, 32] {
        assert_eq!(decode(&t(length)).transaction.as_slice().len(), length);
    }
    for length in [0, 33] {
        assert_eq!(Message::decode(&t(length)).map_err(|m| m.what), Err(message::MalformedKind::Envelope));
    }
}

/// Wrong queries that can be told so are told so; everything else gets silence.
#[test]
fn malformed() {
    use message::MalformedKind as Kind;
    let check = |text: &[u8], what: Kind, told: bool| {
        let err = Message::decode(text).unwrap_err();
        assert_eq!((err.what, err.query.is_some()), (what, told), "{}", text.escape_ascii());
    };
    let id = "2:id20:abcdefghij0123456789";
    let query = |q: &str, args: &str| format!("d1:ad{args}e1:q{}:{q}1:t2:aa1:y1:qe", q.len()).into_bytes();
    check(&query("ping", "2:id3:abc"), Kind::Entry("id"), true);
    check(&query("find_node", id), Kind::Entry("target"), true);
    check(&query("get_peers", id), Kind::Entry("info_hash"), true);
    let key = "9:info_hash20:mnopqrstuvwxyz123456";
    check(&query("announce_peer", &format!("{id}{key}5:token1:x")), Kind::Entry("port"), true);
    check(&query("announce_peer", &format!("{id}{key}4:porti65536e5:token1:x")), Kind::Entry("port"), true);
    check(&query("announce_peer", &format!("{id}{key}4:porti-1e5:token1:x")), Kind::Entry("port"), true);
    check(&query("announce_peer", &format!("{id}{key}4:porti9977e")), Kind::Entry("token"), true);
    check(&query("announce_peer", &format!("{id}{key}4:more19:mmmmmmmmmmmmmmmmmmm4:porti9977e5:token1:x")), Kind::Entry("more"), true);
    let more = 20 * (MORE_KEYS_MAX + 1);
    check(&query("announce_peer", &format!("{id}{key}4:more{more}:{}4:porti9977e5:token1:x", "m".repeat(more))), Kind::Entry("more"), true);
    check(&query("put", &format!("{id}5:token1:x")), Kind::Entry("v"), true);
    check(&query("pf_dial", &format!("{id}4:porti0e5:token1:x")), Kind::Entry("port"), true);
    check(b"d1:q4:ping1:t2:aa1:y1:qe", Kind::Entry("a"), true);
    check(b"d1:rd2:id1:xe1:t2:aa1:y1:re", Kind::Entry("id"), false);
    check(b"d1:eli201ee1:t2:aa1:y1:xe", Kind::Envelope, false);
    check(b"d1:ti1e1:y1:qe", Kind::Envelope, false);
    check(b"le", Kind::Envelope, false);
    check(&[b'l'; 1501], Kind::Scan(scan::ScanError::TooLong), false);
    check(b"d1:v2147483648:", Kind::Scan(scan::ScanError::Truncated), false);
    assert!(Message::decode(b"d1:eli201ee1:t2:aa1:y1:ee").is_ok(), "an error without a text is an error");
}

/// The budget that lookups, answers and announces are planned with; the table in the module's doc says the same.
#[test]
fn sizes() {
    let len = |message: Message| message.encode().unwrap().len();
    assert_eq!(
        [len(query(get_peers(false, false))), len(query(get_peers(true, false))), len(query(get_peers(true, true)))],
        [106, 113, 130]
    );
    let token = Some(b"aoeusnth".to_vec());
    let of4 = Reply { nodes: nodes(v4), token: token.clone(), ..Reply::default() };
    let of6 = Reply { nodes6: nodes(v6), token: token.clone(), ..Reply::default() };
    assert_eq!([len(answer(of4.clone(), "192.0.2.1:1")), len(answer(of6.clone(), "[2001:db8::1]:1"))], [306, 416]);
    let fits = |reply: &Reply, at: fn(u8) -> SocketAddr, pv: Option<usize>, max: usize| {
        let to = if at(0).is_ipv4() { "192.0.2.1:1" } else { "[2001:db8::1]:1" };
        let with = |n: usize| {
            let pvs = pv.map_or(Vec::new(), |bytes| vec![vec![0; bytes]; n]);
            answer(Reply { values: vec![at(1); n], pvs, ..reply.clone() }, to).encode().is_ok_and(|b| b.len() <= max)
        };
        (1..200).take_while(|n| with(*n)).count()
    };
    assert_eq!([fits(&of4, v4, None, 600), fits(&of6, v6, None, 600)], [35, 8]);
    let bare = Reply { token, ..Reply::default() };
    let row = |at| [46, 132, 512].map(|pv| fits(&bare, at, Some(pv), DATAGRAM_BYTES_OUT_MAX));
    assert_eq!([row(v4), row(v6)], [[19, 7, 2], [15, 7, 2]]);
    let announced = [announce(None, 0, false), announce(Some(46), 0, false), announce(Some(132), 0, false), announce(Some(512), 0, false)];
    assert_eq!(announced.map(|a| len(query(a))), [158, 211, 298, 678]);
    assert_eq!([announce(None, 24, false), announce(None, 48, false), announce(None, 0, true)].map(|a| len(query(a))), [648, 1_128, 402]);
    let value = [b"980:".to_vec(), vec![0; 980]].concat();
    assert_eq!(len(query(Verb::Put { value: value.clone(), token: b"aoeusnth".to_vec(), mutable: false })), 1_101);
    let got = |nodes: Vec<NodeInfo>| {
        len(answer(Reply { item: Some(value.clone()), nodes, token: Some(b"aoeusnth".to_vec()), ..Reply::default() }, "192.0.2.1:1"))
    };
    assert_eq!([got(Vec::new()), got(nodes(v4)[..5].to_vec())], [1_074, 1_215]);
    assert_eq!(query(announce(Some(46), 48, true)).encode(), Err(TooLong(1_128 + 53 + 244)));
}

/// The example of BEP 44 for an immutable item.
#[test]
fn bep44_target() {
    assert_eq!(item_target(b"12:Hello World!").to_string(), "e5f96f6f38320f0f33959cb4d3d656452117aadb");
}

proptest! {
    /// Bytes from outside never panic, whatever they are, nor what differs from a real message in a few places.
    #[test]
    fn any_bytes(bytes in proptest::collection::vec(any::<u8>(), 0..1600)) {
        let _ = Message::decode(&bytes);
        let _ = Pv::parse(&bytes);
        let _ = Statement::check(&bytes, 0);
    }

    /// See `any_bytes`.
    #[test]
    fn damaged_messages(which in 0_usize..5, damage in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6), cut in any::<prop::sample::Index>()) {
        let message = match which {
            0 => query(get_peers(true, true)),
            1 => query(announce(Some(46), 3, true)),
            2 => answer(Reply { nodes: nodes(v4), nodes6: nodes(v6), values: vec![v4(1), v6(2)], pvs: vec![vec![1], vec![]], ..Reply::default() }, "192.0.2.1:1"),
            3 => query(Verb::Put { value: b"d1:ali1ei2eee".to_vec(), token: b"x".to_vec(), mutable: false }),
            _ => answer(Reply { item: Some(b"li1ee".to_vec()), statements: vec![vec![0; STATEMENT_BYTES]], ..Reply::default() }, "[2001:db8::1]:1"),
        };
        let mut bytes = message.encode().unwrap();
        prop_assert_eq!(Message::decode(&bytes), Ok(message));
        for (at, byte) in damage {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        if let Ok(message) = Message::decode(&bytes) {
            // What was read can be written again, or is too long by what was added.
            let _ = message.encode();
        }
        let _ = Message::decode(&bytes[..cut.index(bytes.len())]);
    }
}
