//! Networks of nodes under the virtual clock.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "tests; the seed of a failure is printed")]

use super::runs::{LookupRun, announce_cycle, lookups, percentile};
use super::*;
use crate::dht::{AnnounceKey, CONCURRENCY, REFRESH_POOLFS};
use crate::krpc::statement::Kind;
use crate::krpc::{Delta, Pv, Statement, item_target};
use ed25519_dalek::SigningKey;
use std::collections::BTreeSet;

fn pv() -> Pv {
    Pv { key: [7; 32], flags: 3, deltas: vec![Delta { old: [1; 32], bytes: 77, delta: [2; 32], target: None }] }
}

/// A network whose nodes met by asking the first one.
fn grown(seed: u64, nodes: u32, link: Link, schedule: Schedule) -> Sim {
    println!("seed {seed}");
    let mut sim = Sim::new(seed, link, schedule);
    for host in 0..nodes {
        sim.add_host();
        let first = [Sim::address(0)];
        if host > 0 {
            sim.with(host, |node, now| node.bootstrap(&first, now));
        }
        sim.run_for(Duration::from_millis(300));
    }
    sim.run_for(Duration::from_secs(60));
    sim
}

fn found(sim: &mut Sim, host: u32, key: Id, within: Duration) -> Vec<(SocketAddr, Option<Pv>)> {
    sim.take_events();
    let lookup = sim.with(host, |node, now| node.get_peers(key, now)).unwrap();
    let until = sim.elapsed() + within;
    let mut all = Vec::new();
    let mut done = false;
    sim.run(until, |sim| {
        for (_, event) in sim.take_events() {
            match event {
                Event::Found { lookup: l, contacts } if l == lookup => all.extend(contacts.into_iter().map(|c| (c.addr, c.pv))),
                Event::Done { lookup: l, .. } if l == lookup => done = true,
                _ => {}
            }
        }
        done
    });
    assert!(done, "the lookup ends");
    all
}

/// Bootstrap from one address, announce with `pv`, find, withdraw: the whole life of a contact, with nothing prepared.
#[test]
fn announce_find_withdraw() {
    let mut sim = grown(1, 30, Link::default(), Schedule::Adapted);
    let known: Vec<usize> = (0..30).map(|h| sim.node(h).unwrap().status().nodes[0]).collect();
    assert!(known.iter().all(|n| *n >= 8), "{known:?}");
    let key = Id([0x77; 20]);
    sim.with(3, |node, now| node.set_announces(vec![AnnounceKey { key, pv: Some(pv()) }], now));
    sim.run_for(Duration::from_secs(5));
    let events = sim.take_events();
    assert!(events.iter().any(|(h, e)| *h == 3 && matches!(e, Event::Announced { nodes: 8, .. })), "{events:?}");
    let holders = sim.closest_alive(&key, 9).into_iter().filter(|h| *h != 3 && sim.node(*h).unwrap().holds(&key)).count();
    assert!(holders >= 7, "{holders} of the closest hold it");
    for asker in [0, 11, 29] {
        let all = found(&mut sim, asker, key, Duration::from_secs(5));
        assert!(all.contains(&(Sim::address(3), Some(pv()))), "{all:?}");
    }
    sim.with(3, |node, now| node.set_announces(Vec::new(), now));
    sim.run_for(Duration::from_secs(5));
    assert_eq!(found(&mut sim, 20, key, Duration::from_secs(5)), []);
}

/// Among nodes of another kind each key costs its own token, and is announced again before they forget after 45 minutes.
#[test]
fn announces_to_ordinary_nodes() {
    println!("seed 11");
    let mut sim = Sim::new(11, Link::default(), Schedule::Adapted);
    for host in 0..20 {
        sim.add_host();
        if host != 5 && host != 6 {
            sim.make_foreign(host);
        }
        if host > 0 {
            sim.with(host, |node, now| node.bootstrap(&[Sim::address(0)], now));
        }
        sim.run_for(Duration::from_millis(300));
    }
    sim.run_for(Duration::from_secs(60));
    let keys: Vec<Id> = (0..10).map(|n| Id([n * 25; 20])).collect();
    let set = keys.iter().map(|key| AnnounceKey { key: *key, pv: Some(pv()) }).collect();
    sim.with(5, |node, now| node.set_announces(set, now));
    sim.run_for(Duration::from_secs(30));
    let announced = sim.take_events().iter().filter(|(h, e)| *h == 5 && matches!(e, Event::Announced { nodes: 8, .. })).count();
    assert_eq!(announced, 10);
    // Twice as long as they remember.
    sim.run_for(Duration::from_secs(90 * 60));
    for key in keys {
        let all = found(&mut sim, 6, key, Duration::from_secs(10));
        assert!(all.iter().any(|(addr, _)| *addr == Sim::address(5)), "{all:?}");
    }
}

/// What is refreshed stays, what is not is forgotten after two and a half hours.
#[test]
fn refresh_and_expiry() {
    let mut sim = grown(2, 20, Link::default(), Schedule::Adapted);
    let key = Id([0x11; 20]);
    for host in [4, 5] {
        sim.with(host, |node, now| node.set_announces(vec![AnnounceKey { key, pv: None }], now));
    }
    sim.run_for(Duration::from_secs(10));
    sim.kill(4);
    sim.run_for(REFRESH_POOLFS + Duration::from_secs(31 * 60));
    let all = found(&mut sim, 9, key, Duration::from_secs(30));
    assert_eq!(all, [(Sim::address(5), None)]);
}

/// Thirty of a hundred datagrams lost, some doubled, some overtaken: all is found all the same.
#[test]
fn loss_and_duplicates() {
    let link = Link { loss: 0.3, duplicates: 0.1, jitter: 0.9, ..Link::default() };
    let mut sim = grown(3, 40, link, Schedule::Adapted);
    let keys: Vec<Id> = (0..20).map(|n| Id([n * 11; 20])).collect();
    for (host, key) in (0..).zip(&keys) {
        let key = *key;
        sim.with(host, |node, now| node.set_announces(vec![AnnounceKey { key, pv: None }], now));
    }
    sim.run_for(Duration::from_secs(60));
    for (host, key) in (0..).zip(&keys) {
        let all = found(&mut sim, 39 - host, *key, Duration::from_secs(60));
        assert!(all.iter().any(|(a, _)| *a == Sim::address(host)), "key of {host}: {all:?}");
    }
}

/// A BEP 44 item and a statement about a node travel, and the subject of the statement keeps nothing of it.
#[test]
fn items_and_statements() {
    let mut sim = grown(4, 5, Link::default(), Schedule::Adapted);
    let value = b"5:delta".to_vec();
    let target = item_target(&value);
    sim.with(1, |node, now| node.put_item(value.clone(), now)).unwrap();
    sim.run_for(Duration::from_secs(10));
    let events = sim.take_events();
    let stored = events.iter().find_map(|(h, e)| match e {
        Event::Done { outcome, .. } if *h == 1 => Some(outcome.stored),
        _ => None,
    });
    assert_eq!(stored, Some(4), "all the others");
    sim.with(2, |node, now| node.get_item(target, now)).unwrap();
    sim.run_for(Duration::from_secs(10));
    assert!(sim.take_events().iter().any(|(h, e)| *h == 2 && matches!(e, Event::Item { value: v, .. } if *v == value)));

    let subject = sim.info(3).id;
    let subject_key = sim.node(3).unwrap().config().key;
    let say = |speaker: u8| {
        let statement = Statement {
            kind: Kind::FalseList,
            piece: 0,
            size: 1,
            proof_at: Sim::address(0),
            subject: subject_key,
            speaker: [0; 32],
            digest: [5; 32],
            proof: [6; 32],
            time_s: UNIX_START_S,
        };
        statement.sign(&SigningKey::from_bytes(&[speaker; 32])).to_vec()
    };
    sim.with(0, |node, now| node.speak(subject, say(1), now)).unwrap();
    sim.run_for(Duration::from_secs(10));
    let kept: Vec<usize> = (0..5).map(|h| sim.node(h).unwrap().status().stored_statements).collect();
    assert_eq!(kept, [0, 1, 1, 0, 1], "all but the speaker itself and the one it is about");
    sim.take_events();
    sim.with(4, |node, now| node.get_statements(subject, now)).unwrap();
    sim.run_for(Duration::from_secs(10));
    let heard: Vec<Vec<u8>> = sim
        .take_events()
        .into_iter()
        .filter_map(|(_, e)| if let Event::Statements { statements, .. } = e { Some(statements) } else { None })
        .flatten()
        .collect();
    assert_eq!(heard, [say(1)]);
    assert!(sim.with(0, |node, now| node.speak(subject.not(), say(1), now)).is_err());
}

/// Statements about a node are found in networks of every size by who looks for them, the nodes that keep them included, and the one that
/// they are about keeps none; with a flood of 500 others beside.
#[test]
fn statements_in_networks_of_all_sizes() {
    for size in [3, 5, 9, 50] {
        let mut sim = grown(7, size, Link::default(), Schedule::Adapted);
        let subject_key = sim.node(1).unwrap().config().key;
        let place = crate::reputation::place(&subject_key);
        let statement = |speaker: [u8; 32]| {
            let statement = Statement {
                kind: Kind::FalseList,
                piece: 0,
                size: 1,
                proof_at: "[::]:0".parse().unwrap(),
                subject: subject_key,
                speaker: [0; 32],
                digest: [5; 32],
                proof: [6; 32],
                time_s: UNIX_START_S,
            };
            statement.sign(&SigningKey::from_bytes(&speaker)).to_vec()
        };
        let true_word = statement([1; 32]);
        sim.with(0, |node, now| node.speak(place, true_word.clone(), now)).unwrap();
        sim.run_for(Duration::from_secs(10));
        for n in 0..500u32 {
            let speaker = [&n.to_be_bytes()[..], &[2; 28]].concat().try_into().unwrap();
            let _busy = sim.with(2, |node, now| node.speak(place, statement(speaker), now));
            sim.run_for(Duration::from_millis(500));
        }
        sim.take_events();
        // A place holds 32, so the first word is among them at most of the eight that keep them; each answers with some.
        let kept: Vec<usize> = (0..size).map(|host| sim.node(host).unwrap().status().stored_statements).collect();
        assert_eq!(kept[1], 0, "{size}: the subject keeps nothing");
        assert!(kept.iter().all(|kept| *kept <= 32), "{size}: {kept:?}");
        for reader in (2..size).step_by(1 + size as usize / 8) {
            let mut heard: Vec<Vec<u8>> = Vec::new();
            for _ in 0..40 {
                sim.with(reader, |node, now| node.get_statements(place, now)).unwrap();
                sim.run_for(Duration::from_secs(10));
                heard.extend(
                    sim.take_events()
                        .into_iter()
                        .filter(|(host, _)| *host == reader)
                        .filter_map(|(_, event)| match event {
                            Event::Statements { statements, .. } => Some(statements),
                            _ => None,
                        })
                        .flatten(),
                );
                if heard.contains(&true_word) {
                    break;
                }
            }
            assert!(heard.contains(&true_word), "{size}: host {reader} hears of it");
        }
    }
}

/// Holders of parts of a file are found by either way of telling of them, and the keys of pieces cost the more.
#[test]
fn parts_are_found_both_ways() {
    use super::runs::{LookupRun, parts};
    let concurrency = crate::dht::CONCURRENCY;
    let run =
        LookupRun { nodes: 60, dead: 0.0, loss: 0.0, schedule: Schedule::Adapted, lookups: 1, concurrency, session_median: None, seed: 3 };
    let file = parts(&run, 8, 0, 1);
    assert_eq!(file.found, 8, "{file:?}");
    let pieces = parts(&run, 8, 16, 8);
    assert_eq!(pieces.found, 8, "{pieces:?}");
    assert!(
        pieces.told_datagrams > 2.0 * file.told_datagrams && pieces.sought_datagrams > 2 * file.sought_datagrams,
        "{file:?} {pieces:?}"
    );
}

/// 500 of an attacker's statements about one node: a bounded number is kept, and the contacts are not touched.
#[test]
fn a_flood_of_statements_is_bounded() {
    let mut sim = grown(5, 5, Link::default(), Schedule::Adapted);
    let (subject, subject_key) = (sim.info(3).id, sim.node(3).unwrap().config().key);
    let speaking: Vec<Vec<u8>> = (0..500_u16)
        .map(|n| {
            let key = SigningKey::from_bytes(&[&n.to_be_bytes()[..], &[9; 30]].concat().try_into().unwrap());
            let statement = Statement {
                kind: Kind::FalseBytes,
                piece: 0,
                size: 1,
                proof_at: Sim::address(0),
                subject: subject_key,
                speaker: [0; 32],
                digest: [5; 32],
                proof: [6; 32],
                time_s: UNIX_START_S,
            };
            statement.sign(&key).to_vec()
        })
        .collect();
    for statement in speaking {
        let _busy = sim.with(0, |node, now| node.speak(subject, statement, now));
        sim.run_for(Duration::from_secs(1));
    }
    let kept: Vec<usize> = (0..5).map(|h| sim.node(h).unwrap().status().stored_statements).collect();
    assert!(kept[3] == 0 && kept.iter().all(|n| *n <= 32) && kept.iter().sum::<usize>() > 0, "{kept:?}");
}

/// The sweep announces every key, in fewer datagrams than a walk for each would take.
#[test]
fn announces_share_walks() {
    let run = LookupRun {
        nodes: 200,
        dead: 0.0,
        loss: 0.0,
        schedule: Schedule::Adapted,
        lookups: 0,
        concurrency: CONCURRENCY,
        session_median: None,
        seed: 6,
    };
    let result = announce_cycle(&run, 600);
    assert_eq!(result.announced, 600);
    assert!(result.queries_per_key < 1.5 && result.held_by_closest > 5.0, "{result:?}");
}

/// The figures that a lookup is judged by, at a size that tests can pay: dead entries and loss cost no second.
#[test]
fn lookups_lose_no_time_to_the_dead() {
    let run = LookupRun {
        nodes: 500,
        dead: 0.3,
        loss: 0.05,
        schedule: Schedule::Adapted,
        lookups: 100,
        concurrency: CONCURRENCY,
        session_median: None,
        seed: 7,
    };
    let result = lookups(&run);
    assert_eq!(result.found, 100);
    assert!(percentile(&result.first, 50) < Duration::from_millis(250), "{:?}", percentile(&result.first, 50));
    assert!(percentile(&result.first, 99) < Duration::from_millis(1_500), "{:?}", percentile(&result.first, 99));
    let single = lookups(&LookupRun { schedule: Schedule::Single, ..run });
    assert!(percentile(&single.first, 99) > 2 * percentile(&result.first, 99), "what the schedule is for");
}

/// Half of the machines of an hour ago are gone, others have come: what was announced before is found, by whoever stayed.
#[test]
fn lookups_outlive_the_coming_and_going() {
    let run = LookupRun {
        nodes: 80,
        dead: 0.0,
        loss: 0.05,
        schedule: Schedule::Adapted,
        lookups: 150,
        concurrency: CONCURRENCY,
        session_median: Some(Duration::from_secs(3_600)),
        seed: 12,
    };
    let result = lookups(&run);
    assert!(result.begun == 150 && result.lookups >= 147 && result.lookups <= 150, "{result:?}");
    assert_eq!(result.found, result.lookups);
    assert!(result.closest > 0.8 && percentile(&result.first, 50) < Duration::from_millis(250), "{result:?}");
}

/// Same seed, same run: a failure found by a seed can be looked at again.
#[test]
fn runs_repeat() {
    let trace = |seed| {
        let mut sim = grown(seed, 12, Link { loss: 0.2, ..Link::default() }, Schedule::Adapted);
        sim.run_for(Duration::from_secs(600));
        sim.traffic()
    };
    assert_eq!(trace(8), trace(8));
    assert_ne!(trace(8), trace(9));
}

/// Quiet nodes cost little: what a node sends in an hour to stay in touch.
#[test]
fn upkeep_is_cheap() {
    let mut sim = grown(10, 50, Link { loss: 0.1, ..Link::default() }, Schedule::Adapted);
    let before = sim.traffic();
    sim.run_for(Duration::from_secs(3_600));
    let after = sim.traffic();
    let bytes = after.bytes - before.bytes + super::runs::HEADER_BYTES * (after.datagrams - before.datagrams);
    let per_node_s = bytes / 50 / 3_600;
    // Sent; as much again is received.
    assert!(per_node_s <= 150, "{per_node_s} B/s");
    let alone: BTreeSet<u32> = (0..50).filter(|h| sim.node(*h).unwrap().status().nodes[0] < 8).collect();
    assert!(alone.is_empty(), "{alone:?}");
}
