//! The runs that the figures come from: lookups under dead entries, loss and churn; a cycle of announces; memory.

use super::{Link, Sim, Tally};
use crate::dht::table::K;
use crate::dht::{AnnounceKey, Event, LookupId, Outcome, Schedule};
use crate::krpc::{Id, Pv};
use rand::RngExt as _;
use std::collections::BTreeMap;
use std::time::Duration;

/// IPv4 and UDP headers of one datagram.
pub const HEADER_BYTES: u64 = 28;

/// One line of the table of lookups.
#[derive(Debug, Clone, Copy)]
pub struct LookupRun {
    /// Hosts that are there.
    pub nodes: u32,
    /// Share of the entries of every table whose host is gone.
    pub dead: f64,
    /// Share of datagrams that are lost.
    pub loss: f64,
    /// When queries are repeated.
    pub schedule: Schedule,
    /// Lookups, each by another host for another key.
    pub lookups: u32,
    /// Queries under way in one lookup.
    pub concurrency: usize,
    /// Median session of the hosts; `None`: nobody comes or goes.
    pub session_median: Option<Duration>,
    /// Seed of everything.
    pub seed: u64,
}

/// What a [`LookupRun`] gave.
#[derive(Debug, Clone, Default)]
pub struct LookupResult {
    /// Lookups that found a contact of their key.
    pub found: u32,
    /// Lookups that came to their end: all, but for those of hosts that left meanwhile.
    pub lookups: u32,
    /// Lookups begun.
    pub begun: u32,
    /// Mean steps from the own table to the farthest of the closest nodes.
    pub hops: f64,
    /// Mean queries of a lookup to its end, repetitions not counted.
    pub queries: f64,
    /// Mean datagrams of a lookup: its queries, their repetitions and the answers.
    pub datagrams: f64,
    /// Time to the first contact, sorted; lookups that found none count with their whole duration.
    pub first: Vec<Duration>,
    /// Time to the end (the closest nodes known, their details had), sorted.
    pub whole: Vec<Duration>,
    /// Share of the eight closest live hosts that the lookup's result has.
    pub closest: f64,
}

/// The value at a percentile of a sorted list; zero of an empty one.
pub fn percentile(sorted: &[Duration], percent: usize) -> Duration {
    sorted.get((sorted.len() * percent / 100).min(sorted.len().saturating_sub(1))).copied().unwrap_or_default()
}

#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a number of hosts")]
fn with_dead(nodes: u32, dead: f64) -> u32 {
    (f64::from(nodes) / (1.0 - dead)).round() as u32
}

/// A network with ideal tables of which a share of the entries is dead, and nobody has noticed yet.
pub fn network(run: &LookupRun) -> Sim {
    let mut sim = Sim::new(run.seed, Link { loss: run.loss, ..Link::default() }, run.schedule);
    sim.set_concurrency(run.concurrency);
    let all = with_dead(run.nodes, run.dead);
    for _ in 0..all {
        sim.add_host();
    }
    sim.seed_ideal_tables();
    let mut gone = all - run.nodes;
    while gone > 0 {
        let host = sim.random_host();
        sim.kill(host);
        gone -= 1;
    }
    sim
}

/// Every key is announced by one host and then looked up by another.
pub fn lookups(run: &LookupRun) -> LookupResult {
    let mut sim = network(run);
    let mut churn = Churn::new(&mut sim, run.session_median);
    // Announced first, over ten seconds, by hosts that take no other part.
    let announcers: Vec<(u32, Id)> = (0..run.lookups)
        .map(|_| {
            let id = Id(sim.rng().random());
            (sim.random_host(), id)
        })
        .collect();
    let keys: BTreeMap<u32, Vec<Id>> = announcers.iter().fold(BTreeMap::new(), |mut map, (host, key)| {
        map.entry(*host).or_insert_with(Vec::new).push(*key);
        map
    });
    for (host, keys) in &keys {
        if sim.is_alive(*host) {
            let pv = Pv { key: [7; 32], flags: 0, deltas: Vec::new() };
            let set = keys.iter().map(|key| AnnounceKey { key: *key, pv: Some(pv.clone()) }).collect();
            sim.with(*host, |node, now| node.set_announces(set, now));
        }
        let until = sim.elapsed() + Duration::from_millis(10);
        churn.run(&mut sim, until);
    }
    let settle = run.session_median.map_or(Duration::from_secs(60), |_| Duration::from_secs(1_800));
    let until = sim.elapsed() + settle;
    churn.run(&mut sim, until);
    sim.take_events();
    let before = sim.traffic();
    let mut result = LookupResult::default();
    let mut running: BTreeMap<(u32, LookupId), Id> = BTreeMap::new();
    let mut outcomes: Vec<Ended> = Vec::new();
    for (announcer, key) in &announcers {
        let mut asker = sim.random_host();
        while asker == *announcer || sim.closest_alive(key, K).contains(&asker) {
            asker = sim.random_host();
        }
        if let Ok(lookup) = sim.with(asker, |node, now| node.get_peers(*key, now)) {
            running.insert((asker, lookup), *key);
        }
        let until = sim.elapsed() + Duration::from_millis(20);
        churn.run(&mut sim, until);
        collect(&mut sim, &mut running, &mut outcomes);
    }
    let until = sim.elapsed() + Duration::from_secs(30);
    churn.run(&mut sim, until);
    collect(&mut sim, &mut running, &mut outcomes);
    // Who left in the middle of a lookup is not there to find anything.
    result.lookups = u32::try_from(outcomes.len()).unwrap_or(u32::MAX);
    result.begun = run.lookups;
    // Upkeep asks find_node and ping, so these are the lookups' own.
    result.datagrams = (sim.traffic().get_peers - before.get_peers) as f64 / f64::from(run.lookups.max(1));
    summarise(&mut result, &outcomes);
    result
}

/// A lookup that came to its end.
struct Ended {
    outcome: Outcome,
    /// Share of the eight closest live hosts of that moment that its result has.
    closest: f64,
}

fn collect(sim: &mut Sim, running: &mut BTreeMap<(u32, LookupId), Id>, outcomes: &mut Vec<Ended>) {
    for (host, event) in sim.take_events() {
        if let Event::Done { lookup, outcome } = event
            && let Some(key) = running.remove(&(host, lookup))
        {
            let want: Vec<_> = sim.closest_alive(&key, K + 1).into_iter().filter(|h| *h != host).take(K).map(|h| sim.info(h)).collect();
            let hit = want.iter().filter(|w| outcome.closest.contains(w)).count();
            outcomes.push(Ended { outcome, closest: hit as f64 / want.len().max(1) as f64 });
        }
    }
}

fn summarise(result: &mut LookupResult, outcomes: &[Ended]) {
    let count = outcomes.len().max(1) as f64;
    for Ended { outcome, closest } in outcomes {
        result.found += u32::from(outcome.first_after.is_some());
        result.hops += f64::from(outcome.hops) / count;
        result.queries += f64::from(outcome.queries) / count;
        result.first.push(outcome.first_after.unwrap_or(outcome.took));
        result.whole.push(outcome.took);
        result.closest += closest / count;
    }
    result.first.sort_unstable();
    result.whole.sort_unstable();
}

/// Hosts that leave and others that come in their place, with sessions of one median.
struct Churn {
    per_second: f64,
    next: Duration,
}

impl Churn {
    fn new(sim: &mut Sim, session_median: Option<Duration>) -> Self {
        // Exponential sessions: the rate at which one ends is ln 2 / median.
        let per_second = session_median.map_or(0.0, |median| std::f64::consts::LN_2 / median.as_secs_f64() * f64::from(sim.len()));
        Self { per_second, next: sim.elapsed() }
    }

    /// Runs until `until` after the start, while hosts come and go.
    fn run(&mut self, sim: &mut Sim, until: Duration) {
        if self.per_second > 0.0 {
            while self.next < until {
                let at = self.next;
                sim.run(at, |_| false);
                let leaves = sim.random_host();
                sim.kill(leaves);
                let count = sim.len();
                let comes = sim.rng().random_range(0..count);
                let comes = if sim.is_alive(comes) { leaves } else { comes };
                sim.revive(comes);
                let by = [(); 3].map(|()| sim.random_host()).map(Sim::address);
                sim.with(comes, |node, now| node.bootstrap(&by, now));
                let uniform: f64 = sim.rng().random_range(f64::MIN_POSITIVE..1.0);
                self.next += Duration::from_secs_f64(-uniform.ln() / self.per_second);
            }
        }
        sim.run(until, |_| false);
    }
}

/// What one cycle of announces cost the node that announces.
#[derive(Debug, Clone, Default)]
pub struct AnnounceResult {
    /// Keys that the nodes confirmed.
    pub announced: u32,
    /// Datagrams out and in.
    pub datagrams: u64,
    /// Their bytes with headers.
    pub bytes: u64,
    /// From the first query to the last confirmation.
    pub took: Duration,
    /// Walk and token queries and announces for a key.
    pub queries_per_key: f64,
    /// Mean number of the eight closest live hosts that have the contact, of a sample of keys.
    pub held_by_closest: f64,
    /// Where the datagrams went, out and in; those of the same time without announces not taken off.
    pub tally: Tally,
}

/// One node announces `keys` keys, each with a `pv` of 46 bytes, in a network with ideal tables. What the same node sends and
/// receives in the same time without announcing, found by a second run, is taken off.
pub fn announce_cycle(run: &LookupRun, keys: u32) -> AnnounceResult {
    let with = announce_run(run, keys, None);
    let without = announce_run(run, 0, Some(with.lasted));
    let result = with.result;
    AnnounceResult {
        datagrams: result.datagrams.saturating_sub(without.result.datagrams),
        bytes: result.bytes.saturating_sub(without.result.bytes),
        ..result
    }
}

struct AnnounceRun {
    result: AnnounceResult,
    lasted: Duration,
}

fn announce_run(run: &LookupRun, keys: u32, lasts: Option<Duration>) -> AnnounceRun {
    let mut sim = Sim::new(run.seed, Link { loss: run.loss, ..Link::default() }, run.schedule);
    sim.set_announce_keys_max(keys as usize);
    let all = with_dead(run.nodes, run.dead);
    for _ in 0..all {
        sim.add_host();
    }
    sim.seed_ideal_tables();
    for _ in 0..all - run.nodes {
        let host = sim.random_host();
        sim.kill(host);
    }
    let host = sim.random_host();
    let pv = Pv { key: [7; 32], flags: crate::krpc::FLAG_REACHABLE, deltas: Vec::new() };
    let set: Vec<AnnounceKey> = (0..keys).map(|_| AnnounceKey { key: Id(sim.rng().random()), pv: Some(pv.clone()) }).collect();
    let some: Vec<Id> = set.iter().step_by((keys as usize / 200).max(1)).map(|k| k.key).collect();
    let queries = |sim: &Sim| sim.node(host).map_or(0, |n| n.counters().queries_out);
    let (before, begun) = (queries(&sim), sim.elapsed());
    sim.watch(host);
    sim.with(host, |node, now| node.set_announces(set, now));
    let mut announced = std::collections::BTreeSet::new();
    let mut last = begun;
    // Over when no key was confirmed for a minute.
    let goes_on = |sim: &Sim, last: Duration| match lasts {
        Some(lasts) => sim.elapsed() - begun < lasts,
        None => sim.elapsed() - last < Duration::from_secs(60) && sim.elapsed() - begun < Duration::from_secs(3_600),
    };
    while goes_on(&sim, last) {
        sim.run_for(Duration::from_secs(1));
        for (at, event) in sim.take_events() {
            if let Event::Announced { key, .. } = event
                && at == host
            {
                announced.insert(key);
                last = sim.elapsed();
            }
        }
    }
    let mut held = 0;
    for key in &some {
        let closest: Vec<u32> = sim.closest_alive(key, K + 1).into_iter().filter(|h| *h != host).take(K).collect();
        held += closest.iter().filter(|h| sim.node(**h).is_some_and(|n| n.holds(key))).count();
    }
    let tally = sim.tally();
    let (datagrams, bytes) = tally.values().fold((0, 0), |(datagrams, bytes), (d, b)| (datagrams + d, bytes + b));
    let result = AnnounceResult {
        announced: u32::try_from(announced.len()).unwrap_or(u32::MAX),
        datagrams,
        bytes: bytes + HEADER_BYTES * datagrams,
        took: last - begun,
        queries_per_key: (queries(&sim) - before) as f64 / f64::from(keys.max(1)),
        held_by_closest: held as f64 / some.len().max(1) as f64,
        tally,
    };
    AnnounceRun { result, lasted: sim.elapsed() - begun }
}

/// What finding the holders of a file's parts cost, by one way of telling of them.
#[derive(Debug, Clone, Default)]
pub struct PartsResult {
    /// Datagrams out and in of one holder for telling what it has, mean.
    pub told_datagrams: f64,
    /// Their bytes with headers.
    pub told_bytes: f64,
    /// Datagrams out and in of the one who looks.
    pub sought_datagrams: u64,
    /// Their bytes with headers.
    pub sought_bytes: u64,
    /// Until the first holder was found, from the beginning of its lookup.
    pub first: Option<Duration>,
    /// Until the last lookup was over.
    pub took: Duration,
    /// Holders that were found.
    pub found: usize,
}

/// `holders` machines that each have a random half of a file's told pieces tell of them, and another one looks for them: by the file's
/// key alone (`pieces` 0), or by up to `pieces` keys of pieces, of which `sought` are looked up one after another. What the same hosts
/// send and receive in the same time without any of it is taken off.
pub fn parts(run: &LookupRun, holders: u32, pieces: u32, sought: u32) -> PartsResult {
    let with = parts_run(run, holders, pieces, sought, true);
    let without = parts_run(run, holders, pieces, sought, false);
    PartsResult {
        told_datagrams: (with.told_datagrams - without.told_datagrams).max(0.0),
        told_bytes: (with.told_bytes - without.told_bytes).max(0.0),
        sought_datagrams: with.sought_datagrams.saturating_sub(without.sought_datagrams),
        sought_bytes: with.sought_bytes.saturating_sub(without.sought_bytes),
        ..with
    }
}

/// How long holders have to announce, and a lookup to end.
const PARTS_SETTLE: Duration = Duration::from_secs(120);
const PARTS_LOOK_UP: Duration = Duration::from_secs(30);

fn parts_run(run: &LookupRun, holders: u32, pieces: u32, sought: u32, is_told: bool) -> PartsResult {
    let mut sim = network(run);
    let keys: Vec<Id> = (0..pieces.max(1)).map(|_| Id(sim.rng().random())).collect();
    let mut hosts: Vec<u32> = Vec::new();
    while hosts.len() <= holders as usize {
        let host = sim.random_host();
        if !hosts.contains(&host) {
            hosts.push(host);
        }
    }
    let asker = hosts.remove(0);
    let pv = Pv { key: [7; 32], flags: crate::krpc::FLAG_PARTIAL, deltas: Vec::new() };
    let mut result = PartsResult::default();
    let total = |tally: &Tally| tally.values().fold((0, 0), |(datagrams, bytes), (d, b)| (datagrams + d, bytes + b + d * HEADER_BYTES));
    // One is watched at a time: the first holder stands for the others.
    sim.watch(hosts[0]);
    for host in &hosts {
        let own: Vec<Id> = keys.iter().filter(|_| pieces == 0 || sim.rng().random_bool(0.5)).copied().collect();
        let set = own.into_iter().map(|key| AnnounceKey { key, pv: Some(pv.clone()) }).collect();
        if is_told {
            sim.with(*host, |node, now| node.set_announces(set, now));
        }
    }
    sim.run_for(PARTS_SETTLE);
    let (datagrams, bytes) = total(&sim.tally());
    (result.told_datagrams, result.told_bytes) = (datagrams as f64, bytes as f64);
    sim.take_events();
    sim.watch(asker);
    let mut found = std::collections::BTreeSet::new();
    let known: std::collections::BTreeSet<_> = hosts.iter().map(|host| Sim::address(*host)).collect();
    for key in keys.iter().take(sought.max(1) as usize) {
        let begun = sim.elapsed();
        let lookup = is_told.then(|| sim.with(asker, |node, now| node.get_peers(*key, now)).ok()).flatten();
        let mut ended = None;
        sim.run(begun + PARTS_LOOK_UP, |_| false);
        for (host, event) in sim.take_events() {
            match event {
                Event::Found { lookup: of, contacts } if host == asker && Some(of) == lookup => {
                    found.extend(contacts.iter().map(|contact| contact.addr).filter(|addr| known.contains(addr)));
                }
                Event::Done { lookup: of, outcome } if host == asker && Some(of) == lookup => ended = Some(outcome),
                _ => {}
            }
        }
        if let Some(outcome) = ended {
            result.first = result.first.or(outcome.first_after);
            result.took += outcome.took;
        }
    }
    (result.sought_datagrams, result.sought_bytes) = total(&sim.tally());
    result.found = found.len();
    result
}
