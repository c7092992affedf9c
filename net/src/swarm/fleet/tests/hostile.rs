//! Members that die, part from each other, or lie.

use super::*;

/// One small package by twenty machines; machine 0 and its neighbours start first.
fn twenty() -> Sim {
    let mut sim = Sim::new(20, vec![file(0, 200_000)]);
    sim.machines.iter_mut().enumerate().for_each(|(at, machine)| machine.starts = Duration::from_millis(at as u64 * 5));
    // A mirror that takes a while, so that there is a time at which somebody fetches from it.
    sim.mirror_rate = 200_000.0;
    sim
}

fn lease_holder(sim: &Sim) -> Option<usize> {
    sim.transfers.iter().find(|transfer| transfer.from == MIRROR).map(|transfer| transfer.to)
}

/// The coordinator dies after its first lease: the next one starts empty and is soon as wise; at most one fetch more.
#[test]
fn the_coordinator_dies() {
    let mut sim = twenty();
    sim.run_until(|sim| lease_holder(sim).is_some());
    let coordinator = sim.coordinator_of(0);
    let holder = lease_holder(&sim).unwrap();
    sim.kill(coordinator);
    if holder == coordinator {
        sim.run_until(|sim| lease_holder(sim).is_some() || sim.is_done());
    }
    let died = sim.age();
    sim.run(died + Duration::from_secs(7));
    assert!(sim.mirror_fetches[0] <= 2, "{:?}", sim.mirror_fetches);
}

/// Who holds the lease dies without a word: five seconds later somebody else has it.
#[test]
fn the_lease_holder_dies_silently() {
    let mut sim = twenty();
    let coordinator = sim.coordinator_of(0);
    sim.machines[coordinator].starts = Duration::from_secs(2);
    sim.run_until(|sim| lease_holder(sim).is_some());
    let holder = lease_holder(&sim).unwrap();
    assert_ne!(holder, coordinator);
    sim.run_until(|sim| sim.age() > Duration::from_millis(500));
    sim.kill(holder);
    let died = sim.age();
    sim.run(died + Duration::from_secs(7));
    assert!(sim.mirror_fetches[0] <= 2, "{:?}", sim.mirror_fetches);
}

/// Half of the members do not see the other half for ten seconds, though all views hold all: each half goes on by itself,
/// and nobody is sent in a circle.
#[test]
fn the_fleet_parts_for_ten_seconds() {
    let mut sim = Sim::new(40, small_packages());
    sim.machines.iter_mut().enumerate().for_each(|(at, machine)| machine.starts = Duration::from_millis(at as u64 * 300));
    sim.reach = Box::new(|a, b, age| age >= Duration::from_secs(10) || a == MIRROR || b == MIRROR || a % 2 == b % 2);
    sim.run(Duration::from_secs(40));
    // Each half has a coordinator for each piece, and each of them gives three leases at most; mostly one.
    assert!(sim.mirror_fetches.iter().all(|fetches| *fetches <= 6), "{:?}", sim.mirror_fetches);
    let all: u32 = sim.mirror_fetches.iter().sum();
    assert!(all <= 30, "two copies are 24 pieces: {:?}", sim.mirror_fetches);
}

/// A coordinator that says `wait` for ever costs nine seconds, and is then passed over.
#[test]
fn a_coordinator_that_says_wait_for_ever() {
    let mut sim = twenty();
    sim.mirror_rate = GBIT;
    let liar = sim.coordinator_of(0);
    sim.lies.insert(liar, Box::new(|_| Some(Reply { wait: Some(Duration::from_secs(3600)), ..Reply::default() })));
    sim.run(Duration::from_secs(30));
    let slowest = sim.times().pop().unwrap();
    assert!((9.0..=14.0).contains(&slowest), "{slowest} s");
    let somebody = (0..20).find(|at| *at != liar).unwrap();
    assert!(sim.machines[somebody].asker.passed_over_until(member_id(liar)).is_some());
    assert!(sim.mirror_fetches[0] <= 3, "{:?}", sim.mirror_fetches);
}

/// A coordinator that names strangers, the loopback address and a mail server: nobody connects to any of them.
#[test]
fn a_coordinator_that_names_strangers() {
    let mut sim = twenty();
    sim.mirror_rate = GBIT;
    let liar = sim.coordinator_of(0);
    let strangers = ["192.0.2.1:25", "127.0.0.1:80", "10.1.255.255:9977"].map(|contact| (contact.parse().unwrap(), 1u16));
    sim.lies.insert(liar, Box::new(move |_| Some(Reply { from: strangers.to_vec(), see: None, ..Reply::default() })));
    sim.run(Duration::from_secs(30));
    assert!(sim.connected.iter().all(|(_, to)| *to == MIRROR || *to < 20), "{:?}", sim.connected);
    assert!(sim.times().pop().unwrap() <= 14.0, "{:?}", sim.times());
}

/// A coordinator that names a member that has nothing, again and again: as soon passed over.
#[test]
fn a_coordinator_that_names_false_holders() {
    let mut sim = twenty();
    sim.mirror_rate = GBIT;
    let liar = sim.coordinator_of(0);
    let dead = (0..20).find(|at| *at != liar).unwrap();
    sim.kill(dead);
    sim.lies.insert(liar, Box::new(move |_| Some(Reply { from: vec![(contact(dead), 1)], ..Reply::default() })));
    sim.run(Duration::from_secs(40));
    assert!(sim.times().pop().unwrap() <= 15.0, "{:?}", sim.times());
}

/// Two coordinators that name each other: `see` is followed upwards only, so the machine ends with the greater one.
#[test]
fn see_is_followed_upwards_only() {
    let view = view_of(0..5);
    let key = GroupKey { digest: file(0, 1_000).digest, group: 0 };
    let ranked: Vec<MemberId> = view.ranked(&key).to_vec();
    let me = *ranked.last().unwrap();
    let now = Instant::now();
    let mut asker = Asker::new(me, 1);
    asker.want(file(0, 1_000), |_| false);
    asker.tick(&view, now);
    let to = |asker: &mut Asker| match asker.poll() {
        Some(AskDo::Want { to, want }) => Some((to, want.silent)),
        _ => None,
    };
    assert_eq!(to(&mut asker).unwrap().0, ranked[0]);
    let lower = view.member(ranked[1]).unwrap().contact;
    asker.reply(&view, ranked[0], key, &Reply { see: Some(lower), ..Reply::default() }, now);
    assert_eq!(to(&mut asker), Some((ranked[0], vec![lower])), "asked again, and told that this leads nowhere");
    for _ in 0..10 {
        asker.reply(&view, ranked[0], key, &Reply { see: Some(lower), ..Reply::default() }, now);
    }
    let more = std::iter::from_fn(|| to(&mut asker)).count();
    assert!(more <= 3, "{more} datagrams for a coordinator that sends us in circles");
}

/// A coordinator that is slow to answer is passed over as one for a while, and nothing more: pieces are still taken from it, or a busy
/// machine that has everything would send its whole fleet to the mirror.
#[test]
fn a_silent_coordinator_may_give() {
    let view = view_of(0..5);
    let key = GroupKey { digest: file(0, 1_000).digest, group: 0 };
    let ranked: Vec<MemberId> = view.ranked(&key).to_vec();
    let now = Instant::now();
    let mut asker = Asker::new(*ranked.last().unwrap(), 1);
    asker.want(file(0, 1_000), |_| false);
    asker.tick(&view, now);
    asker.tick(&view, now + Duration::from_secs(1));
    let wants: Vec<_> = std::iter::from_fn(|| asker.poll()).collect();
    let silent = view.member(ranked[0]).unwrap().contact;
    let Some(AskDo::Want { to, want }) = wants.last() else { panic!("{wants:?}") };
    assert_eq!((*to, &want.silent, &want.bad), (ranked[1], &vec![silent], &vec![]));
    asker.reply(&view, ranked[1], key, &Reply { from: vec![(silent, 1)], ..Reply::default() }, now + Duration::from_secs(1));
    let next = asker.poll();
    assert!(matches!(next, Some(AskDo::Fetch { piece: 0, from: Origin::Member(member), .. }) if member == ranked[0]), "{next:?}");
    assert!(asker.is_down(ranked[0], now + Duration::from_secs(2)), "as a coordinator nobody is sent there");
}

/// All coordinators silent: after five seconds and a delay of its own each machine goes to the mirror.
#[test]
fn a_fleet_of_the_deaf_falls_back() {
    let mut sim = twenty();
    sim.mirror_rate = GBIT;
    sim.reach = Box::new(|a, b, _| a == MIRROR || b == MIRROR || a == b);
    sim.run(Duration::from_secs(20));
    assert!(sim.times().iter().all(|took| *took >= 0.0 && *took <= 8.0), "{:?}", sim.times());
    assert!(sim.mirror_fetches[0] >= 19);
}

/// A mirror that fails one member: it says so, and another gets the lease.
#[test]
fn the_mirror_fails_one_member() {
    let view = view_of(0..3);
    let shape = file(0, 1_000);
    let key = GroupKey { digest: shape.digest, group: 0 };
    let ranked = view.ranked(&key);
    let at = |nth: usize| view.member(ranked[nth]).unwrap();
    let mut coordinator = Coordinator::new(ranked[0]);
    let now = Instant::now();
    let want = |mirror_bad| Want {
        key,
        size: shape.size,
        have: 0,
        bad: Vec::new(),
        silent: Vec::new(),
        mirror_bad,
        mirror_pace: None,
        room: ROOM_MAX,
        newcomer: false,
    };
    let take = Answer::Now(Reply { take: Some((1, Duration::from_secs(5))), ..Reply::default() });
    assert_eq!(coordinator.want(&view, at(1), &want(false), &local(0), now), take);
    assert_eq!(coordinator.want(&view, at(2), &want(false), &local(0), now), Answer::Held);
    assert_eq!(coordinator.want(&view, at(1), &want(true), &local(0), now), Answer::Held);
    let replies = coordinator.poll(now);
    assert_eq!(replies.len(), 1);
    assert_eq!((replies[0].0, replies[0].2.take.map(|(bits, _)| bits)), (ranked[2], Some(1)));
}
