//! Members that die, part from each other, lie, or are none.

use super::*;

/// How many datagrams a machine sends in answer to one.
fn answers(core: &mut Core, from: SocketAddr, bytes: &[u8], now: Instant) -> usize {
    core.datagram(from, bytes, now);
    std::iter::from_fn(|| core.poll()).filter(|todo| matches!(todo, CoreDo::Send { to, .. } if *to == from)).count()
}

fn want_of(shape: &FileShape) -> Ask {
    let key = GroupKey { digest: shape.digest, group: 0 };
    Ask::Want(Want {
        key,
        size: shape.size,
        have: 0,
        bad: Vec::new(),
        silent: Vec::new(),
        mirror_bad: false,
        mirror_pace: None,
        room: crate::swarm::fleet::ROOM_MAX,
        newcomer: false,
    })
}

/// A file of one piece whose coordinator `fits`.
fn coordinated(net: &Net, fits: impl Fn(usize) -> bool) -> FileShape {
    (0..).map(|nth| file(nth, 1)).find(|shape| fits(net.coordinator_of(shape))).unwrap()
}

/// Without the right tag there is no answer of any kind.
#[test]
fn silence() {
    let mut net = Net::joined(2);
    // A newcomer would wait to be told who has what.
    net.run(Duration::from_secs(4));
    let (now, from) = (net.now, contact(1));
    let unix_s = UNIX_START_S + net.age().as_secs();
    // Of this one a good want is answered at once.
    let shape = coordinated(&net, |at| at == 0);
    let core = &mut net.machines[0].core;
    let asked = |key: &FleetKey, nonce: u8, unix_s| wire::query(key, id(1), *b"abcd", Nonce([nonce; 8]), unix_s, &want_of(&shape));
    let good = asked(&key(), 1, unix_s);
    let tag_at = good.windows(4).position(|window| window == b"2:ha").unwrap();
    let without = [&good[..tag_at], b"1:q7:pf_want1:t4:abcd1:v4:PF\0\x011:y1:qe"].concat();
    for (name, bytes) in [
        ("no tag", without),
        ("another key", asked(&FleetKey::new([6; 32]), 2, unix_s)),
        ("no key", asked(&FleetKey::open(), 3, unix_s)),
        ("an old time", asked(&key(), 4, unix_s - 300)),
        ("a time to come", asked(&key(), 5, unix_s + 300)),
    ] {
        assert_eq!(answers(core, from, &bytes, now), 0, "{name}");
    }
    assert_eq!(answers(core, from, &good, now), 1);
    assert_eq!(answers(core, from, &good, now), 0, "replayed");
    assert!(core.counters().refused >= 5, "{:?}", core.counters());
    // Nor is an answer taken that fits no question of ours.
    let before = core.view().len();
    let SocketAddr::V4(v4) = contact(9) else { unreachable!("all are v4") };
    let sender = wire::Record { id: id(9), incarnation: UNIX_START_S, v4: Some(v4), v6: None, zone: Arc::from("") };
    let pong = Answer::Pong { ping: wire::Ping { sender, changes: Vec::new() }, digest: 0, count: 1 };
    let bytes = wire::answer(&key(), id(9), &Transaction::own(*b"abcd"), Nonce([1; 8]), contact(0), &pong);
    assert_eq!(answers(core, contact(9), &bytes, now), 0);
    assert_eq!(core.view().len(), before);
}

/// One address gets a hundred answers a second, and strangers together two hundred looks, however many they ask.
#[test]
fn rates() {
    let mut net = Net::joined(2);
    net.run(Duration::from_secs(4));
    let now = net.now;
    let unix_s = UNIX_START_S + net.age().as_secs();
    let shape = coordinated(&net, |at| at == 0);
    let core = &mut net.machines[0].core;
    let asked = |key: &FleetKey, n: u64| wire::query(key, id(1), *b"abcd", Nonce(n.to_be_bytes()), unix_s, &want_of(&shape));
    let mut answered = 0;
    for n in 0..2_000u64 {
        answered += answers(core, contact(1), &asked(&key(), n), now + Duration::from_micros(n * 500));
    }
    assert!((200..=301).contains(&answered), "{answered} answers in a second");
    let limited = core.counters().limited;
    assert!(limited >= 1_600, "{limited}");
    for n in 0..2_000u64 {
        let from = SocketAddr::from(([192, 0, 2, n.to_le_bytes()[0]], 2_000));
        core.datagram(from, &asked(&FleetKey::new([1; 32]), n), now);
    }
    assert!(core.counters().limited - limited >= 1_700, "{:?}", core.counters());
}

/// The coordinator dies after its first lease: the next one is as wise after a round.
#[test]
fn the_coordinator_dies() {
    let mut net = Net::joined(12);
    let shape = file(3, 1);
    net.mirror_takes = Duration::from_secs(1);
    net.want(shape);
    net.run_until(Duration::from_secs(2), |net| !net.mirror.is_empty());
    let (coordinator, died) = (net.coordinator_of(&shape), net.age());
    net.kill(coordinator);
    net.run_until(Duration::from_secs(10), Net::is_done);
    assert!(net.mirror_most() <= 2, "{:?}", net.mirror);
    assert!(net.slowest() <= died + Duration::from_secs(7), "{:?}", net.slowest() - died);
}

/// Who holds the lease dies without a word in the middle of the piece.
#[test]
fn the_lease_holder_dies() {
    let mut net = Net::joined(12);
    let shape = file(3, 1);
    let coordinator = net.coordinator_of(&shape);
    let holder = (0..12).find(|at| *at != coordinator).unwrap();
    net.mirror_takes = Duration::from_secs(1);
    net.want_at(holder, shape);
    net.run_until(Duration::from_secs(2), |net| !net.mirror.is_empty());
    (0..12).filter(|at| *at != holder).for_each(|at| net.want_at(at, shape));
    net.run(Duration::from_millis(300));
    let died = net.age();
    net.kill(holder);
    net.run_until(Duration::from_secs(10), Net::is_done);
    assert!(net.mirror_most() <= 2, "{:?}", net.mirror);
    assert!(net.slowest() <= died + Duration::from_secs(7), "{:?}", net.slowest() - died);
}

/// Half of the machines do not see the other half for ten seconds while all want a file.
#[test]
fn the_fleet_parts_for_ten_seconds() {
    let mut net = Net::joined(16);
    let from = net.age();
    let odd = |contact: SocketAddr| contact.ip().to_string().as_bytes().last().unwrap() % 2;
    net.reach = Box::new(move |a, b, age| age > from + Duration::from_secs(10) || odd(a) == odd(b));
    net.want(file(5, 12));
    net.run_until(Duration::from_secs(40), Net::is_done);
    assert!(net.mirror_most() <= 3, "{:?}", net.mirror);
}

/// A coordinator that says `wait` for ever, names the dead, strangers, a mail server and this machine's own ports: nobody else
/// than members is ever connected to, and it costs nine seconds and a piece.
#[test]
fn a_lying_coordinator() {
    let strangers = ["192.0.2.1:25", "127.0.0.1:80", "192.0.2.7:9977"].map(|text| (text.parse().unwrap(), 1u16));
    let lies: [(&str, Reply); 3] = [
        ("waits", Reply { wait: Some(Duration::from_secs(60)), ..Reply::default() }),
        ("strangers", Reply { from: strangers.to_vec(), ..Reply::default() }),
        ("the dead", Reply { from: vec![(contact(11), 1)], ..Reply::default() }),
    ];
    for (name, lie) in lies {
        let mut net = Net::joined(12);
        let shape = coordinated(&net, |at| at != 11);
        let (liar, began) = (net.coordinator_of(&shape), net.age());
        net.kill(11);
        net.liar = Some((liar, Box::new(move |_| lie.clone())));
        (0..11).filter(|at| *at != liar).for_each(|at| net.want_at(at, shape));
        net.run_until(Duration::from_secs(30), Net::is_done);
        let took = net.slowest() - began;
        assert!(took <= Duration::from_secs(15), "{name}: {took:?}");
        assert!(net.connected.iter().all(|at| net.machine_at(*at).is_some()), "{name}: {:?}", net.connected);
        assert!(net.mirror_most() <= 3, "{name}: {:?}", net.mirror);
    }
}

/// A datagram in three is lost: second coordinators are asked, which costs copies, and never more than three.
#[test]
fn a_third_of_the_datagrams_is_lost() {
    let mut net = Net::joined(10);
    net.lossy = Some(StdRng::seed_from_u64(1));
    net.want(file(6, 20));
    net.run_until(Duration::from_secs(60), Net::is_done);
    let copies = net.mirror.values().sum::<u32>();
    assert!(copies <= 60 && net.mirror_most() <= 3, "{copies} pieces for 20: {:?}", net.mirror);
}
