//! How machines find each other, and notice that one went.

use super::*;

/// Each knows one; in the end all know all, and have the same digest of it.
#[test]
fn all_learn_of_all() {
    let mut net = Net::new(60, None);
    (1..60).for_each(|at| net.hint(at, contact(at / 2)));
    net.run_until(Duration::from_secs(90), |net| net.all_know(60));
    let digest = net.machines[0].core.members().digest();
    assert!(net.machines.iter().all(|machine| machine.core.members().digest() == digest));
    let before = net.datagrams;
    net.run(Duration::from_secs(600));
    let per_second = (net.datagrams - before) as f64 / 600.0 / 60.0;
    assert!(per_second < 0.6, "{per_second} datagrams a second and machine where nothing happens");
}

/// A member dies without a word: within its turn to be pinged, 14 s and 30 s it is out everywhere; when it comes back it is a
/// member again, though the others remember its death.
#[test]
fn the_dead_are_out_and_may_come_back() {
    let mut net = Net::joined(8);
    net.run(Duration::from_secs(60));
    net.kill(3);
    net.run_until(Duration::from_secs(120), |net| net.all_know(7));
    net.run(Duration::from_secs(60));
    assert!(net.all_know(7), "an old list does not bring it back");
    net.machines[3].alive = true;
    net.run_until(Duration::from_secs(120), |net| net.all_know(8));
}

/// A member whose network was away for a while contradicts the rumour of its death.
#[test]
fn a_rumour_is_contradicted() {
    let mut net = Net::joined(8);
    let from = net.age();
    net.reach = Box::new(move |a, b, age| age > from + Duration::from_secs(40) || (a != contact(3) && b != contact(3)));
    net.run(Duration::from_secs(45));
    net.run_until(Duration::from_secs(120), |net| net.all_know(8));
    net.run(Duration::from_secs(120));
    assert!(net.all_know(8));
}

/// The network parts for five minutes: each half is a fleet, and afterwards they are one again.
#[test]
fn halves_come_together_again() {
    let mut net = Net::joined(8);
    let from = net.age();
    let odd = |contact: SocketAddr| contact.ip().to_string().as_bytes().last().unwrap() % 2;
    net.reach = Box::new(move |a, b, age| age > from + Duration::from_secs(300) || odd(a) == odd(b));
    net.run(Duration::from_secs(290));
    assert!(net.all_know(4));
    net.run_until(Duration::from_secs(240), |net| net.all_know(8));
}

/// A new machine without multicast, one of whose seeds is dead: joined within 15 s. With all of them dead it is alone, and
/// not a moment is lost on the fleet.
#[test]
fn one_seed_is_dead_and_one_alive() {
    let mut net = Net::new(5, None);
    (1..4).for_each(|at| net.hint(at, contact(0)));
    net.run_until(Duration::from_secs(10), |net| net.machines[..4].iter().all(|machine| machine.core.view().len() == 4));
    let start = net.start;
    assert!(!net.machines[4].core.want(file(1, 1), |_| false, start), "alone: the mirror at once");
    for dead in 200..210 {
        net.hint(4, contact(dead));
    }
    net.run(Duration::from_secs(10));
    assert_eq!(net.machines[4].core.view().len(), 1);
    net.hint(4, contact(2));
    net.run_until(Duration::from_secs(5), |net| net.machines[4].core.view().len() == 5);
    net.run_until(Duration::from_secs(30), |net| net.all_know(5));
}

fn record(at: usize, started_s: u64) -> wire::Record {
    let SocketAddr::V4(v4) = contact(at) else { unreachable!("all are v4") };
    wire::Record { id: id(at), incarnation: started_s, v4: Some(v4), v6: None, zone: Arc::from("") }
}

fn ping(key: &FleetKey, from: usize, changes: Vec<wire::Change>, unix_s: u64) -> Vec<u8> {
    let ping = Ask::Ping(wire::Ping { sender: record(from, UNIX_START_S), changes });
    wire::query(key, id(from), *b"abcd", Nonce([1; 8]), unix_s, &ping)
}

/// Without a key nobody is believed about others, and who is not on the own links is not even asked.
#[test]
fn without_a_key_only_the_own_links() {
    let link = ("10.1.0.0".parse::<std::net::Ipv4Addr>().unwrap().to_ipv6_mapped(), 96 + 29);
    let mut net = Net::new(6, Some(vec![link]));
    (1..6).for_each(|at| net.hint(at, contact(0)));
    net.run_until(Duration::from_secs(60), |net| net.all_know(6));
    let before = net.datagrams;
    net.hint(1, contact(9));
    net.hint(1, "192.0.2.1:9977".parse().unwrap());
    assert_eq!(net.datagrams, before, "10.1.0.9 is not in 10.1.0.0/29");
    // A stranger on the link tells of a member far away, and that all others are dead.
    let rumour = |at, state| wire::Change { state, record: record(at, UNIX_START_S) };
    let changes = vec![rumour(99, State::Alive), rumour(2, State::Out), rumour(3, State::Out)];
    let bytes = ping(&FleetKey::open(), 7, changes, UNIX_START_S + net.age().as_secs());
    net.machines[1].core.datagram(contact(7), &bytes, net.now);
    net.drain(1);
    net.run(Duration::from_secs(5));
    assert!(net.all_know(6));
}

/// A machine that started again elsewhere is asked at its new address.
#[test]
fn a_machine_moves() {
    let mut net = Net::joined(5);
    let moved = wire::Record { id: id(3), ..record(77, UNIX_START_S + 100) };
    let bytes = ping(&key(), 4, vec![wire::Change { state: State::Alive, record: moved }], UNIX_START_S + net.age().as_secs());
    net.machines[0].core.datagram(contact(4), &bytes, net.now);
    net.drain(0);
    net.run(Duration::from_millis(200));
    assert_eq!(net.machines[0].core.view().member(id(3)).unwrap().contact, contact(77));
}
