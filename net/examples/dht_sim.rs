//! Figures of the DHT under a virtual clock: lookups with dead entries, loss and churn; cycles of announces; memory.
//!
//! `dht_sim [--quick | --full] [--goal | --churn | --announce | --huge | --matrix N | --upkeep | --parts] [--seed N] [--concurrency N]
//! [--json]`: --goal the two lines that the design sets a goal for, --churn those with hosts that come and go, --announce the announces
//! with where their datagrams went, --huge the line of 100,000 nodes alone, --matrix every combination of dead entries, loss and schedule
//! among N nodes, --upkeep what one node with 600 keys sends and receives in four hours, --parts how holders of parts of a file are found
//! by the file's key and by those of pieces. --json: an object for each line instead of a table, but for --parts.
//! Built with `--release`; one line for each run, nothing else on standard output.
#![allow(clippy::print_stdout, reason = "its output is its purpose")]

use poolfs_net::dht::{AnnounceKey, Schedule};
use poolfs_net::krpc::{FLAG_REACHABLE, Id, Pv};
use poolfs_net::sim::runs::{AnnounceResult, HEADER_BYTES, LookupRun, announce_cycle, lookups, parts, percentile};
use poolfs_net::sim::{Link, Sim};
use rand::RngExt as _;
use std::time::{Duration, Instant};

/// Datagrams and bytes of one cycle of 3,000 keys that the design counted, by nodes.
const EXPECTED: [(u32, u64, u64); 3] = [(1_000, 4_500, 1_300_000), (10_000, 45_400, 9_000_000), (100_000, 114_500, 22_000_000)];

/// Half of the hosts of a run with churn are gone after this.
const SESSION_MEDIAN: Duration = Duration::from_secs(3_600);

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let has = |name: &str| args.iter().any(|arg| arg == name);
    let seed = args.iter().position(|a| a == "--seed").and_then(|at| args.get(at + 1)?.parse().ok()).unwrap_or(1);
    let json = has("--json");
    if has("--upkeep") {
        return [1_000, 10_000].into_iter().filter(|nodes| *nodes == 1_000 || !has("--quick")).for_each(|nodes| upkeep(nodes, seed, json));
    }
    if has("--parts") {
        println!("seed {seed}");
        return parts_lines(seed);
    }
    if !json {
        println!("seed {seed}");
        head();
    }
    let base = base(&args, seed);
    let line = |run: &LookupRun| if json { object(run) } else { line(run) };
    if let Some(nodes) = args.iter().position(|a| a == "--matrix").and_then(|at| args.get(at + 1)?.parse().ok()) {
        return matrix(&base, nodes).iter().for_each(line);
    }
    let huge = LookupRun { nodes: 100_000, dead: 0.3, loss: 0.05, lookups: 200, ..base };
    if has("--huge") {
        line(&huge);
        if !json {
            tell_memory();
        }
        return;
    }
    let wanted = |run: &LookupRun| !has("--announce") && (!has("--churn") || run.session_median.is_some());
    for run in lookup_runs(&base, has("--quick"), has("--full"), has("--goal")).into_iter().filter(wanted) {
        line(&run);
    }
    if has("--goal") || has("--churn") || json {
        return;
    }
    announces(&base, has("--quick"), has("--full"), has("--announce"));
    if has("--full") {
        println!();
        line(&huge);
    }
    tell_memory();
}

fn head() {
    println!(
        "{:>7} {:>5} {:>5} {:>9} {:>6} | {:>6} {:>5} {:>6} {:>6} | {:>6} {:>6} {:>6} | {:>6} {:>6} {:>6} | {:>7} {:>7}",
        "nodes",
        "dead",
        "loss",
        "schedule",
        "churn",
        "found%",
        "hops",
        "msgs",
        "dgrams",
        "p50",
        "p95",
        "p99",
        "end50",
        "end95",
        "end99",
        "close%",
        "run s"
    );
}

fn base(args: &[String], seed: u64) -> LookupRun {
    let concurrency = args.iter().position(|a| a == "--concurrency").and_then(|at| args.get(at + 1)?.parse().ok());
    LookupRun {
        nodes: 0,
        dead: 0.0,
        loss: 0.0,
        schedule: Schedule::Adapted,
        lookups: 1_000,
        concurrency: concurrency.unwrap_or(poolfs_net::dht::CONCURRENCY),
        session_median: None,
        seed,
    }
}

/// Every combination, and churn; fewer lookups where a network takes long to make.
fn matrix(base: &LookupRun, nodes: u32) -> Vec<LookupRun> {
    let lookups = if nodes >= 100_000 { 200 } else { 300 };
    let mut runs = Vec::new();
    for (dead, loss) in [0.0, 0.3, 0.5].into_iter().flat_map(|dead| [0.0, 0.05, 0.1].map(|loss| (dead, loss))) {
        // The largest networks take minutes each: there the two others are only seen where the goal is.
        let all = nodes < 100_000 || (dead == 0.3 && loss == 0.05);
        let schedules = [Schedule::Adapted, Schedule::Standard, Schedule::Single].into_iter().take(if all { 3 } else { 1 });
        runs.extend(schedules.map(|schedule| LookupRun { nodes, dead, loss, schedule, lookups, ..*base }));
    }
    if nodes < 100_000 {
        let churn = [Schedule::Adapted, Schedule::Standard, Schedule::Single];
        runs.extend(churn.map(|schedule| LookupRun {
            nodes,
            loss: 0.05,
            schedule,
            lookups,
            session_median: Some(SESSION_MEDIAN),
            ..*base
        }));
    }
    runs
}

fn announces(base: &LookupRun, quick: bool, full: bool, tallies: bool) {
    println!();
    println!(
        "{:>7} {:>5} {:>5} {:>5} | {:>9} {:>9} {:>9} {:>7} {:>8} {:>5} | {:>14}",
        "nodes", "keys", "dead", "loss", "announced", "dgrams", "MB", "s", "q/key", "held", "of the count"
    );
    for (nodes, keys, dead, loss) in announce_runs(quick, full) {
        let result = announce_cycle(&LookupRun { nodes, dead, loss, ..*base }, keys);
        announce_line(nodes, keys, dead, loss, &result);
        if tallies {
            let parts = result.tally.iter().map(|(kind, (datagrams, bytes))| format!("{kind} {datagrams} ({bytes} B)"));
            println!("        {}", parts.collect::<Vec<_>>().join(", "));
        }
    }
}

/// Keys that a daemon announces at most.
const KEYS: u32 = 600;

/// Two cycles of announces and what is asked beside them.
const UPKEEP: Duration = Duration::from_secs(4 * 3_600);

/// Everything that one node of a calm network sends and receives, its answers to others too.
#[allow(clippy::cast_precision_loss, reason = "for people")]
fn upkeep(nodes: u32, seed: u64, json: bool) {
    let mut sim = Sim::new(seed, Link::default(), Schedule::Adapted);
    sim.set_announce_keys_max(KEYS as usize);
    for _ in 0..nodes {
        sim.add_host();
    }
    sim.seed_ideal_tables();
    let host = sim.random_host();
    let pv = Pv { key: [7; 32], flags: FLAG_REACHABLE, deltas: Vec::new() };
    let set = (0..KEYS).map(|_| AnnounceKey { key: Id(sim.rng().random()), pv: Some(pv.clone()) }).collect();
    sim.watch(host);
    sim.with(host, |node, now| node.set_announces(set, now));
    sim.run_for(UPKEEP);
    let (datagrams, bytes) = sim.tally().values().fold((0, 0), |(datagrams, bytes), (d, b)| (datagrams + d, bytes + b));
    let rate = (bytes + HEADER_BYTES * datagrams) as f64 / UPKEEP.as_secs_f64();
    if json {
        println!("{{\"nodes\":{nodes},\"keys\":{KEYS},\"bytes_s\":{rate:.1}}}");
    } else {
        println!("{nodes} nodes, {KEYS} keys announced, {} h: {rate:.0} B/s in and out", UPKEEP.as_secs() / 3_600);
    }
}

fn object(run: &LookupRun) {
    let result = lookups(run);
    let ms = |of: &[Duration]| [50, 95, 99].map(|percent| percentile(of, percent).as_millis());
    println!(
        "{{\"nodes\":{},\"dead\":{},\"loss\":{},\"schedule\":\"{}\",\"session_median_s\":{},\"found_percent\":{:.2},\"hops\":{:.2},\
         \"queries\":{:.2},\"datagrams\":{:.2},\"first_ms\":{:?},\"whole_ms\":{:?}}}",
        run.nodes,
        run.dead,
        run.loss,
        format!("{:?}", run.schedule).to_lowercase(),
        run.session_median.map_or(0, |median| median.as_secs()),
        f64::from(result.found) * 100.0 / f64::from(result.lookups),
        result.hops,
        result.queries,
        result.datagrams,
        ms(&result.first),
        ms(&result.whole),
    );
}

fn tell_memory() {
    println!("peak memory {} MiB, node {} bytes", peak_mib(), std::mem::size_of::<poolfs_net::dht::Node>());
}

fn lookup_runs(base: &LookupRun, quick: bool, full: bool, goal: bool) -> Vec<LookupRun> {
    let goals = vec![LookupRun { nodes: 10_000, ..*base }, LookupRun { nodes: 10_000, dead: 0.3, loss: 0.05, ..*base }];
    if goal {
        return goals;
    }
    let schedules = [Schedule::Single, Schedule::Standard, Schedule::Adapted];
    if quick {
        let mut runs: Vec<LookupRun> =
            schedules.map(|schedule| LookupRun { nodes: 1_000, dead: 0.3, loss: 0.05, lookups: 300, schedule, ..*base }).to_vec();
        runs.extend(goals.into_iter().map(|run| LookupRun { lookups: 300, ..run }));
        runs.push(LookupRun { nodes: 100, loss: 0.05, lookups: 300, session_median: Some(SESSION_MEDIAN), ..*base });
        return runs;
    }
    let mut runs = Vec::new();
    for nodes in [100, 1_000, 10_000] {
        for dead in [0.0, 0.3, 0.5] {
            for loss in [0.0, 0.05, 0.1] {
                runs.extend(schedules.map(|schedule| LookupRun {
                    nodes,
                    dead,
                    loss,
                    schedule,
                    lookups: if nodes == 100 { 300 } else { 1_000 },
                    ..*base
                }));
            }
        }
        if nodes < 10_000 || full {
            runs.extend(schedules.map(|schedule| LookupRun {
                nodes,
                loss: 0.05,
                schedule,
                lookups: 300,
                session_median: Some(SESSION_MEDIAN),
                ..*base
            }));
        }
    }
    runs
}

fn announce_runs(quick: bool, full: bool) -> Vec<(u32, u32, f64, f64)> {
    let mut runs = vec![(1_000, 3_000, 0.0, 0.0), (1_000, 3_000, 0.3, 0.05), (1_000, 600, 0.0, 0.0)];
    if !quick {
        runs.extend([(10_000, 3_000, 0.0, 0.0), (10_000, 3_000, 0.3, 0.05), (10_000, 600, 0.0, 0.0)]);
    }
    if full {
        runs.extend([(100_000, 3_000, 0.0, 0.0), (100_000, 600, 0.0, 0.0)]);
    }
    runs
}

fn line(run: &LookupRun) {
    let begun = Instant::now();
    let result = lookups(run);
    let ms = |of: &[Duration], percent| percentile(of, percent).as_millis();
    println!(
        "{:>7} {:>4.0}% {:>4.0}% {:>9} {:>6} | {:>6.1} {:>5.1} {:>6.1} {:>6.1} | {:>6} {:>6} {:>6} | {:>6} {:>6} {:>6} | {:>7.1} {:>7.1}",
        run.nodes,
        run.dead * 100.0,
        run.loss * 100.0,
        format!("{:?}", run.schedule).to_lowercase(),
        run.session_median.map_or("-".to_owned(), |m| format!("{}m", m.as_secs() / 60)),
        f64::from(result.found) * 100.0 / f64::from(result.lookups),
        result.hops,
        result.queries,
        result.datagrams,
        ms(&result.first, 50),
        ms(&result.first, 95),
        ms(&result.first, 99),
        ms(&result.whole, 50),
        ms(&result.whole, 95),
        ms(&result.whole, 99),
        result.closest * 100.0,
        begun.elapsed().as_secs_f64(),
    );
}

#[allow(clippy::cast_precision_loss, reason = "for people")]
fn announce_line(nodes: u32, keys: u32, dead: f64, loss: f64, result: &AnnounceResult) {
    let expected = EXPECTED.iter().find(|(n, _, _)| *n == nodes && keys == 3_000);
    let ratio = expected.map_or(String::new(), |(_, datagrams, bytes)| {
        format!("{:.2}x {:.2}x", result.datagrams as f64 / *datagrams as f64, result.bytes as f64 / *bytes as f64)
    });
    println!(
        "{nodes:>7} {keys:>5} {:>4.0}% {:>4.0}% | {:>9} {:>9} {:>9.2} {:>7.0} {:>8.2} {:>5.2} | {ratio:>14}",
        dead * 100.0,
        loss * 100.0,
        result.announced,
        result.datagrams,
        result.bytes as f64 / 1e6,
        result.took.as_secs_f64(),
        result.queries_per_key,
        result.held_by_closest,
    );
}

/// Sixteen machines that have parts of one file, told of by the file's key with the partial flag or by 64 keys of pieces.
fn parts_lines(seed: u64) {
    println!(
        "{:>7} {:>16} | {:>12} {:>9} | {:>12} {:>9} {:>9} {:>8} | {:>5}",
        "nodes", "told by", "holder dgrams", "kB", "seeker dgrams", "kB", "first ms", "all ms", "found"
    );
    for nodes in [100, 1_000, 10_000] {
        let schedule = Schedule::Adapted;
        let concurrency = poolfs_net::dht::CONCURRENCY;
        let run = LookupRun { nodes, dead: 0.3, loss: 0.05, schedule, lookups: 1, concurrency, session_median: None, seed };
        for (told, pieces, sought) in [("file", 0, 1), ("pieces, 1 sought", 64, 1), ("pieces, 8 sought", 64, 8)] {
            let result = parts(&run, 16, pieces, sought);
            println!(
                "{nodes:>7} {told:>16} | {:>12.0} {:>9.1} | {:>12} {:>9.1} {:>9} {:>8} | {:>5}",
                result.told_datagrams,
                result.told_bytes / 1e3,
                result.sought_datagrams,
                kilobytes(result.sought_bytes),
                result.first.map_or("-".to_owned(), |first| first.as_millis().to_string()),
                result.took.as_millis(),
                result.found,
            );
        }
    }
}

#[allow(clippy::cast_precision_loss, reason = "for people")]
fn kilobytes(bytes: u64) -> f64 {
    bytes as f64 / 1e3
}

/// The most memory that this process ever had, from the kernel; 0 where it does not say.
fn peak_mib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.and_then(|rest| rest.trim().trim_end_matches(" kB").trim().parse::<u64>().ok()).unwrap_or(0) / 1024
}
