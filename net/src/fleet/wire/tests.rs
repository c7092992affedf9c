//! Golden bytes, sizes, and bytes from outside.
#![allow(clippy::unwrap_used, reason = "tests")]

use super::*;
use crate::fleet::auth::Gate;
use proptest::prelude::*;

const NOW: u64 = 1_800_000_000;

fn key() -> FleetKey {
    FleetKey::new([7; 32])
}

fn me() -> MemberId {
    MemberId(*b"abcdefghij0123456789")
}

fn transaction() -> Transaction {
    Transaction::own(*b"aaaa")
}

fn record(n: u8) -> Record {
    Record {
        id: MemberId([n; 20]),
        incarnation: 0x0102_0304,
        v4: Some("10.0.0.9:9977".parse().unwrap()),
        v6: Some("[2001:db8::9]:9977".parse().unwrap()),
        zone: Arc::from("rack"),
    }
}

fn shape() -> FileShape {
    FileShape::of(Digest([5; 32]), 200 << 20)
}

fn want_of(bad: Vec<SocketAddr>) -> Want {
    Want {
        key: GroupKey { digest: shape().digest, group: 12 },
        size: shape().size,
        have: 0b11,
        bad,
        silent: Vec::new(),
        mirror_bad: false,
        mirror_pace: None,
        room: crate::swarm::fleet::ROOM_MAX,
        newcomer: false,
    }
}

fn asked(ask: &Ask) -> Vec<u8> {
    query(&key(), me(), *b"aaaa", Nonce([1; 8]), NOW, ask)
}

fn answered(with: &Answer) -> Vec<u8> {
    answer(&key(), me(), &transaction(), Nonce([1; 8]), "10.0.0.1:9977".parse().unwrap(), with)
}

/// The text with the tag blotted out: the HMAC is checked by its own test.
fn shown(bytes: &[u8]) -> String {
    let envelope = Envelope::read(bytes).unwrap();
    envelope.tagged.escape_ascii().to_string().replacen(&"\\x00".repeat(envelope.tag.len()), "#", 1)
}

/// Two versions of the program could not understand each other.
#[test]
fn golden_bytes() {
    let ask = |ask: Ask, want: &str| {
        let bytes = asked(&ask);
        assert_eq!(shown(&bytes), want);
        let envelope = Envelope::read(&bytes).unwrap();
        assert!(envelope.is_query && envelope.transaction == transaction());
        assert_eq!(envelope.query(), Some((me(), ask)));
        assert_eq!(Gate::new(key()).check(envelope.tag, NOW, &[&envelope.tagged]), Ok(Nonce([1; 8])));
        assert!(is_fleet(&bytes));
    };
    let tail = |verb: &str| format!("2:ha32:#1:q{}:{verb}1:t4:aaaa1:v4:PF\\x00\\x011:y1:qe", verb.len());
    let bad = vec!["10.0.0.9:9977".parse().unwrap()];
    let mut want = want_of(bad);
    want.mirror_bad = true;
    want.mirror_pace = Some(Duration::from_millis(1_500));
    (want.newcomer, want.room) = (true, 3);
    let fives = "\\x05".repeat(32);
    ask(
        Ask::Want(want),
        &format!(
            "d1:ad1:b6:\\n\\x00\\x00\\t&\\xf91:f32:{fives}1:gi12e1:h2:\\xc0\\x002:id20:abcdefghij01234567891:ji1e1:ki3e1:mi1e1:ni209715200e1:pi1500ee{}",
            tail("pf_want")
        ),
    );
    ask(Ask::Have(vec![Digest([5; 32])]), &format!("d1:ad1:d32:{fives}2:id20:abcdefghij0123456789e{}", tail("pf_have")));
    ask(Ask::Who(Digest([5; 32])), &format!("d1:ad1:f32:{fives}2:id20:abcdefghij0123456789e{}", tail("pf_who")));
    ask(
        Ask::List { after: MemberId([b'x'; 20]) },
        &format!("d1:ad1:a20:xxxxxxxxxxxxxxxxxxxx2:id20:abcdefghij0123456789e{}", tail("pf_list")),
    );
    let sender = Record { id: me(), v6: None, ..record(0) };
    let zeros = "\\x00".repeat(18);
    let rack = format!("\\x00\\x00\\x00\\x00\\x01\\x02\\x03\\x04\\n\\x00\\x00\\t&\\xf9{zeros}\\x04rack");
    ask(
        Ask::Ping(Ping { sender: sender.clone(), changes: Vec::new() }),
        &format!("d1:ad2:id20:abcdefghij01234567891:s58:\\x00abcdefghij0123456789{rack}e{}", tail("pf_ping")),
    );
    let reply = |with: Answer, kind: Kind, want: &str| {
        let bytes = answered(&with);
        assert_eq!(shown(&bytes), format!("d2:ha16:#{want}1:t4:aaaa1:v4:PF\\x00\\x011:y1:re"));
        let envelope = Envelope::read(&bytes).unwrap();
        let (from, got, ip) = envelope.answer(kind).unwrap();
        assert_eq!((from, &got), (me(), &with));
        assert_eq!(ip.is_some(), kind == Kind::Ping);
        assert!(!envelope.is_query && key().check_reply(Nonce([1; 8]), envelope.tag, &[&envelope.tagged]));
    };
    let full = Reply {
        take: Some((0x8001, Duration::from_secs(5))),
        from: vec![("10.0.0.9:9977".parse().unwrap(), 1), (ANSWERER, 2)],
        wait: Some(Duration::from_millis(250)),
        see: Some("10.0.0.9:9977".parse().unwrap()),
        free: true,
    };
    reply(
        Answer::Reply(full),
        Kind::Want,
        "1:rd1:f16:\\n\\x00\\x00\\t&\\xf9\\x80\\x00\\x00\\x00\\x00\\x00\\x00\\x00@\\x002:id20:abcdefghij01234567891:s6:\\n\\x00\\x00\\t&\\xf91:t4:\\x80\\x01\\x13\\x881:wi250e1:xi1ee",
    );
    reply(Answer::Reply(Reply::default()), Kind::Want, "1:rd2:id20:abcdefghij0123456789e");
    reply(Answer::Had, Kind::Have, "1:rd2:id20:abcdefghij0123456789e");
    reply(
        Answer::Who(vec!["10.0.0.9:9977".parse().unwrap(), ANSWERER]),
        Kind::Who,
        "1:rd1:f12:\\n\\x00\\x00\\t&\\xf9\\x00\\x00\\x00\\x00\\x00\\x002:id20:abcdefghij0123456789e",
    );
    reply(Answer::Who(Vec::new()), Kind::Who, "1:rd2:id20:abcdefghij0123456789e");
    reply(
        Answer::Pong { ping: Ping { sender: sender.clone(), changes: Vec::new() }, digest: 0x6162_6364_6566_6768, count: 3 },
        Kind::Ping,
        &format!("2:ip6:\\n\\x00\\x00\\x01&\\xf91:rd1:d8:abcdefgh2:id20:abcdefghij01234567891:ni3e1:s58:\\x00abcdefghij0123456789{rack}e"),
    );
    let members = vec![Change { state: State::Suspect, record: sender }];
    reply(
        Answer::List { members, end: true },
        Kind::List,
        &format!("1:rd1:ei1e2:id20:abcdefghij01234567891:m58:\\x01abcdefghij0123456789{rack}e"),
    );
}

/// A want must not be worth forging: its answer is hardly longer, whatever is in it; and no datagram is ever fragmented.
#[test]
fn sizes() {
    let plain = asked(&Ask::Want(want_of(Vec::new()))).len();
    assert_eq!(plain, 175);
    let v6 = |n: u16| SocketAddr::from(([0x2001, 0xdb8, 0, 0, 0, 0, 0, n], 9977));
    let most = Reply {
        take: Some((1, Duration::from_secs(5))),
        from: (0..4).map(|n| (v6(n), 1)).collect(),
        wait: Some(Duration::from_secs(1)),
        see: Some(v6(9)),
        free: true,
    };
    let most = answered(&Answer::Reply(most)).len();
    assert!(most <= plain + 64, "{most} bytes for {plain}");
    let (who, named) = (asked(&Ask::Who(Digest([1; 32]))).len(), answered(&Answer::Who((0..4).map(v6).collect())).len());
    assert!(named <= who + 64, "{named} bytes for {who}");
    let have = |digests| asked(&Ask::Have(vec![Digest([1; 32]); digests])).len();
    assert_eq!((have(1), have(HAVE_DIGESTS_MAX)), (147, 1_141));
    let zone: Arc<str> = Arc::from("z".repeat(ZONE_BYTES_MAX));
    let changes = vec![Change { state: State::Alive, record: Record { zone: Arc::clone(&zone), ..record(1) } }; CHANGES_MAX];
    let ping = Ping { sender: Record { id: me(), zone, ..record(1) }, changes };
    let members = changes_to_vec(&ping.changes).len();
    for bytes in [
        asked(&Ask::Ping(ping.clone())),
        asked(&Ask::Want(want_of((0..8).map(v6).collect()))),
        answered(&Answer::Pong { ping, digest: 0, count: 4_096 }),
    ] {
        assert!(bytes.len() <= DATAGRAM_BYTES_OUT_MAX, "{}", bytes.len());
        assert!(Envelope::read(&bytes).is_some());
    }
    assert!(LIST_BYTES_MAX + 200 <= DATAGRAM_BYTES_OUT_MAX && members <= LIST_BYTES_MAX);
}

/// What does not fit exactly is nothing: a lenient reader of a fleet's datagrams has nobody to be lenient to.
#[test]
fn malformed() {
    let good = asked(&Ask::Want(want_of(Vec::new())));
    assert!(Envelope::read(&good).is_some());
    for cut in 0..good.len() {
        assert!(Envelope::read(&good[..cut]).is_none(), "cut at {cut}");
    }
    let replaced = |from: &[u8], to: &[u8]| {
        let at = good.windows(from.len()).position(|window| window == from).unwrap();
        [&good[..at], to, &good[at + from.len()..]].concat()
    };
    let refused = |from: &[u8], to: &[u8]| Envelope::read(&replaced(from, to)).and_then(|envelope| envelope.query()).is_none();
    for (from, to) in [
        (&b"1:gi12e"[..], &b"1:gi50e"[..]),
        (b"1:gi12e", b"1:gi-1e"),
        (b"1:gi12e", b"1:g2:12"),
        (b"1:ni209715200e", b"1:ni0e"),
        (b"1:ni209715200e", b"1:ni9223372036854775807e"),
        (b"1:h2:\xc0\0", b"1:h1:\xc0"),
        (b"1:h2:\xc0\0", b"1:h3:\xc0\0\0"),
        (b"2:id20:abcdefghij0123456789", b"2:id19:abcdefghij012345678"),
        (b"1:q7:pf_want", b"1:q7:pf_wont"),
        (b"1:q7:pf_want", b"1:q4:ping"),
        (b"1:t4:aaaa", b"1:t0:"),
        (b"1:y1:q", b"1:y1:e"),
        (b"2:ha32:", b"2:hb32:"),
        (b"d1:ad1:f", b"d1:ad1:b6:\n\0\0\t&\xf91:b0:1:f"),
        (b"d1:ad1:f", b"d1:ad1:b5:\n\0\0\t&1:f"),
    ] {
        assert!(refused(from, to), "{} -> {}", from.escape_ascii(), to.escape_ascii());
    }
    let nine = [b"d1:ad1:b54:".to_vec(), b"\n\0\0\t&\xf9".repeat(9), b"1:f".to_vec()].concat();
    assert!(refused(b"d1:ad1:f", &nine), "nine bad contacts");
    let unsorted = b"d2:ha16:0123456789abcdef1:ad2:id20:abcdefghij0123456789ee";
    assert!(Envelope::read(unsorted).is_none());
    let five = Reply { from: vec![("10.0.0.9:9977".parse().unwrap(), 1); 4], ..Reply::default() };
    let bytes = answered(&Answer::Reply(five));
    let at = bytes.windows(5).position(|window| window == b"f32:\n").unwrap();
    let five = [&bytes[..at], b"f40:\n\0\0\x09&\xf9\x80\0", &bytes[at + 4..]].concat();
    assert!(Envelope::read(&five).unwrap().answer(Kind::Want).is_none(), "five holders");
}

/// A change that is cut, of an unknown state, with a long or broken zone or a contact nobody should be asked at.
#[test]
fn changes_from_outside() {
    let good = change_to_vec(State::Alive, &record(1));
    assert_eq!(changes(&good, 1).unwrap(), [Change { state: State::Alive, record: record(1) }]);
    assert_eq!(changes(&[good.clone(), good.clone()].concat(), 1), None);
    for cut in 1..good.len() {
        assert_eq!(changes(&good[..cut], 9), None, "cut at {cut}");
    }
    let with = |at: usize, byte: u8| {
        let mut bytes = good.clone();
        bytes[at] = byte;
        changes(&bytes, 9)
    };
    assert_eq!(with(0, 3), None);
    assert_eq!(with(CHANGE_BYTES_MIN - 1, 33), None);
    assert_eq!(with(CHANGE_BYTES_MIN, 0xff), None);
    assert_eq!(with(33, 0).unwrap()[0].record.v4, None, "a port below 1024");
    assert_eq!(with(29, 224).unwrap()[0].record.v4, None, "multicast");
    let long = Record { zone: Arc::from("ü".repeat(40)), ..record(1) };
    assert_eq!(&*changes(&change_to_vec(State::Out, &long), 1).unwrap()[0].record.zone, "ü".repeat(16));
}

proptest! {
    /// Nothing that a stranger sends may end the daemon.
    #[test]
    fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300), at in 0..400usize, byte: u8) {
        let look = |bytes: &[u8]| {
            if let Some(envelope) = Envelope::read(bytes) {
                drop(envelope.query());
                for kind in [Kind::Ping, Kind::Want, Kind::Have, Kind::List] {
                    drop(envelope.answer(kind));
                }
            }
            is_fleet(bytes)
        };
        look(&bytes);
        drop(changes(&bytes, 9));
        let ping = Ping { sender: Record { id: me(), ..record(0) }, changes: vec![Change { state: State::Suspect, record: record(2) }] };
        for mut damaged in [asked(&Ask::Want(want_of(vec![ANSWERER]))), asked(&Ask::Ping(ping))] {
            let at = at % damaged.len();
            damaged[at] = byte;
            look(&damaged);
        }
    }
}
