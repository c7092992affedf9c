//! This node's own files and address in what it answers and finds; nodes that change who they are; the bounds
//! of what one lookup and the status remember.

use super::*;

/// Three neighbours tell the node where it is: 10.0.0.99.
fn told_its_address(bench: &mut Bench) {
    for n in 1..=3_u8 {
        let now = bench.now();
        bench.node.ping(addr(&format!("10.0.0.{n}:7777")), now);
        let (sent, _) = bench.drain();
        let message = Message { ip: Some(addr("10.0.0.99:9977")), ..answer(&sent[0], id(n), Reply::default()) };
        bench.receive(sent[0].to, &message);
    }
}

/// The holder of a file, asked for it, must not say that it knows nobody; but it knows where it is only from others.
#[test]
fn tells_of_its_own_files() {
    let mut bench = Bench::new(Network::Private, Schedule::Standard);
    let (now, key, other) = (bench.now(), id(5), id(6));
    let pv = Pv { key: [7; 32], flags: 0, deltas: Vec::new() };
    bench.node.set_announces(vec![AnnounceKey { key, pv: Some(pv.clone()) }], now);
    bench.drain();
    assert_eq!(bench.ask_reply(addr(X), get_peers(key, false, None)).values, [], "nobody has told where it is");
    told_its_address(&mut bench);
    let own = addr("10.0.0.99:9977");
    let reply = bench.ask_reply(addr(X), get_peers(key, false, None));
    assert_eq!(reply.values, [own]);
    assert_eq!(bench.ask_reply(addr(X), get_peers(other, false, None)).values, []);
    let token = bench.token(addr(X));
    let reply = bench.ask_reply(addr(X), get_peers(key, true, Some(token.clone())));
    assert_eq!((reply.values, reply.pvs), (vec![own], vec![pv.encode()]));
    // Beside what others announced, and once even if it was also announced here.
    bench.ask(addr(X), announce(key, 7777, token, None)).unwrap();
    let at_home = addr("10.0.0.99:5555");
    let token = bench.token(at_home);
    bench.ask(at_home, announce(key, 9977, token, None)).unwrap();
    let mut values = bench.ask_reply(addr(X), get_peers(key, false, None)).values;
    values.sort_unstable();
    assert_eq!(values, [own, addr(X)]);
    bench.node.set_announces(Vec::new(), now);
    bench.drain();
    assert!(bench.ask_reply(addr(X), get_peers(key, false, None)).values.contains(&addr(X)));
    // IPv6 askers get none of it: nobody told this node its IPv6 address.
    bench.node.set_announces(vec![AnnounceKey { key: other, pv: None }], now);
    bench.drain();
    assert_eq!(bench.ask_reply(addr("[fd00::7]:7777"), get_peers(other, false, None)).values, []);
}

/// What a lookup finds is asked for pieces: this machine need not be asked.
#[test]
fn finds_others_only() {
    let mut bench = Bench::new(Network::Private, Schedule::Standard);
    told_its_address(&mut bench);
    let now = bench.now();
    bench.node.get_peers(id(9), now).unwrap();
    let (sent, _) = bench.drain();
    let values = vec![addr("10.0.0.99:9977"), addr("10.0.0.99:9978"), addr(X)];
    let who = sent[0].to.ip().to_string().rsplit('.').next().unwrap().parse().unwrap();
    let (_, events) = bench.receive(sent[0].to, &answer(&sent[0], id(who), Reply { values, ..Reply::default() }));
    let found: Vec<SocketAddr> = events
        .iter()
        .flat_map(|e| if let Event::Found { contacts, .. } = e { contacts.clone() } else { Vec::new() })
        .map(|c| c.addr)
        .collect();
    assert_eq!(found, [addr("10.0.0.99:9978"), addr(X)]);
}

/// A node that learned its address has another id than in everybody's tables: what it says counts all the same. On a public
/// network only under an id that its address allows.
#[test]
fn a_node_with_a_new_id_is_heard() {
    let check = |network: Network, at: SocketAddr, new: Id, want: bool| {
        let mut bench = Bench::new(network, Schedule::Standard);
        let (now, old) = (bench.now(), Id::of_key(&[3; 32], None, 5));
        bench.node.assume_answered(&[NodeInfo { id: old, addr: at }], false, Duration::from_millis(50), now);
        let lookup = bench.node.get_peers(id(9), now).unwrap();
        let (sent, _) = bench.drain();
        let contact = addr("8.8.4.4:9977");
        let reply = Reply { values: vec![contact], ..Reply::default() };
        let (_, events) = bench.receive(at, &answer(&sent[0], new, reply));
        let found = events.iter().any(|e| matches!(e, Event::Found { contacts, .. } if contacts[0].addr == contact));
        let closest = events.iter().find_map(|e| match e {
            Event::Done { lookup: l, outcome } if *l == lookup => Some(outcome.closest.clone()),
            _ => None,
        });
        let want_closest = if want { vec![NodeInfo { id: new, addr: at }] } else { Vec::new() };
        assert_eq!((found, closest), (want, Some(want_closest)), "{network:?} {new}");
    };
    let public = addr("8.8.8.8:7777");
    check(Network::Public, public, Id::of_key(&[3; 32], Some(public.ip()), 9), true);
    check(Network::Public, public, id(9), false);
    check(Network::Private, addr(X), id(8), true);
    // This node's own id, from another address: a liar or a copy, and no step of a walk.
    check(Network::Private, addr(X), Bench::new(Network::Private, Schedule::Standard).node.id(Family::V4), false);
}

/// Whoever asks in another protocol cannot make this node send more of it than upkeep may.
#[test]
fn other_protocols_keep_to_a_rate() {
    let mut bench = Bench::new(Network::Private, Schedule::Standard);
    let now = bench.now();
    let sent = (0..1_000).filter(|_| bench.node.send_raw(addr(X), vec![0; 100], now)).count();
    assert_eq!((sent as f32, bench.drain().0.len()), (OUT_UPKEEP_BURST, sent));
}

/// A node full of statements, and thousands of lookups: what is told and what the status is made from is bounded.
#[test]
fn what_lookups_remember_is_bounded() {
    let mut bench = Bench::new(Network::Private, Schedule::Standard);
    let subject_key = [9; 32];
    let subject = Id::of_key(&subject_key, None, 0);
    let friend = NodeInfo { id: id(0x40), addr: addr("10.3.0.1:7777") };
    let now = bench.now();
    bench.node.assume_answered(&[friend], true, Duration::from_millis(50), now);
    let lookup = bench.node.get_statements(subject, now).unwrap();
    for speaker in 0..100 {
        let statements = vec![super::statement(subject_key, UNIX, speaker)];
        bench.node.take_results(lookup, &Reply { statements, ..Reply::default() });
    }
    let (_, events) = bench.drain();
    let heard: usize = events.iter().map(|e| if let Event::Statements { statements, .. } = e { statements.len() } else { 0 }).sum();
    assert_eq!(heard, STATEMENTS_MAX);

    let mut bench = Bench::new(Network::Private, Schedule::Standard);
    for n in 0..1_000_u16 {
        let now = bench.now();
        // Nobody is known: each is over at once.
        bench.node.find_node(id(n as u8), now).unwrap();
        bench.drain();
    }
    assert_eq!(bench.node.recent.len(), lookup::RECENT_MAX);
}

/// Nobody else can be asked, so the lookup is over at once: what the node keeps itself is told before that.
#[test]
fn a_lone_node_tells_what_it_keeps_itself() {
    let mut bench = Bench::new(Network::Private, Schedule::Standard);
    let (key, subject_key, now) = (id(9), [9; 32], bench.now());
    let holder = addr("10.3.0.1:7777");
    let life = Duration::from_secs(60);
    bench.node.store.announce(key, holder, None, life, now, &mut bench.node.rng);
    let bytes = super::statement(subject_key, UNIX, 1);
    let subject = Id::of_key(&subject_key, None, 0);
    bench.node.store.speak(subject.not(), &bytes, Statement::check(&bytes, UNIX).unwrap(), holder.ip());
    bench.node.get_peers(key, now).unwrap();
    bench.node.get_statements(subject, now).unwrap();
    let (_, events) = bench.drain();
    let place = |told: fn(&Event) -> bool| events.iter().position(told);
    let ended: Vec<usize> = (0..events.len()).filter(|at| matches!(events[*at], Event::Done { .. })).collect();
    let found = place(|event| matches!(event, Event::Found { contacts, .. } if contacts.len() == 1)).unwrap();
    let heard = place(|event| matches!(event, Event::Statements { statements, .. } if statements.len() == 1)).unwrap();
    assert!(found < ended[0] && heard < ended[1], "{events:?}");
}
