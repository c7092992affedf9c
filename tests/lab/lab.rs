//! The laboratory without its command line, which the end-to-end tests use too.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "it tells people what it does")]

pub(crate) mod cost;
pub(crate) mod flood;
pub(crate) mod here;
pub(crate) mod install;
pub(crate) mod nodes;
pub(crate) mod outcome;
pub(crate) mod raw;
pub(crate) mod read;
pub(crate) mod rivals;
pub(crate) mod scenario;
pub(crate) mod steps;
pub(crate) mod update;
pub(crate) mod upgrade;

use crate::harness::crowd::{Crowd, Link, Terms, await_status};
use crate::harness::machine::Machine;
use crate::harness::process::Finished;
use outcome::{Contender, Line, Outcome};
use scenario::{Scenario, Work};
use std::path::Path;
use std::time::Duration;

/// Plays a scenario: makes its machines, lets real apt run on them, checks every file, counts.
///
/// A wrong byte, or an apt that fails where it should not, ends it with a panic.
pub(crate) fn play(scenario: &Scenario) -> Outcome {
    eprintln!("{}: {}", scenario.name, scenario.about);
    let mut outcome = match &scenario.work {
        Work::Install(work) => install::play(scenario, work),
        Work::Read(work) => read::play(scenario, work),
        Work::ManyAndOne {} => read::many_and_one(scenario),
        Work::Here { runs } => here::play(scenario, *runs),
        Work::Nobody { runs } => here::nobody(scenario, *runs),
        Work::Upgrade {} => upgrade::play(scenario),
        Work::Update(update) => update::play(*update),
        Work::Steps { step } => steps::play(scenario, step),
        Work::Nodes(work) => nodes::play(scenario, work),
        Work::Cost { idle_s } => cost::play(scenario, *idle_s),
        Work::Flood(flood) => flood::play(scenario, *flood),
    };
    outcome.scenario.clone_from(&scenario.name);
    outcome.judge(&scenario.goals);
    outcome
}

/// Plays the scenario of that name.
pub(crate) fn play_named(name: &str) -> Outcome {
    play(&scenario::load(name, &[]).unwrap_or_else(|error| panic!("{error}")))
}

/// What the machines have in common, with links that are not limited yet: neighbours get warm before.
fn terms(scenario: &Scenario) -> Terms {
    let machines = &scenario.machines;
    Terms {
        fleet: machines.fleet,
        link: Link { delay_ms: machines.link.delay_ms, ..Link::default() },
        poolfs_toml: machines.poolfs_toml.clone(),
        ..Terms::default()
    }
}

/// A crowd for the scenario: warm machines first, then the cold ones, then the idle ones; nothing runs yet.
fn crowd(scenario: &Scenario) -> Crowd {
    let machines = &scenario.machines;
    Crowd::new(machines.warm + machines.count + machines.idle, scenario.packages.build(), &terms(scenario))
}

/// Gives the links their limits.
fn limit(crowd: &Crowd, scenario: &Scenario) {
    crowd.limit_links(Link { delay_ms: 0, ..scenario.machines.link });
    if let Some(mbit) = scenario.machines.mirror_mbit {
        crowd.shape_mirror(mbit);
    }
}

/// Mounts on these machines, `members` of the fleet in all, and updates their lists.
fn up(machines: &[Machine], fleet: bool, members: usize) {
    machines.iter().for_each(Machine::up);
    if fleet {
        for machine in machines {
            await_status(machine, "knows the others", |status| status.fleet_members == members as u64);
        }
    }
    for machine in machines {
        machine.update();
    }
}

/// Warm neighbours have everything.
fn warm_up(crowd: &Crowd, scenario: &Scenario) {
    let warm = scenario.machines.warm;
    up(&crowd.machines[..warm], scenario.machines.fleet, warm);
    for machine in &crowd.machines[..warm] {
        crowd.start_download_on(machine).wait().ok();
        crowd.assert_as_signed(machine);
    }
}

/// Frees the disk: what was on the machine has been verified.
fn empty(machine: &Machine) {
    for directory in [machine.archives(), machine.cache_dir()] {
        std::fs::remove_dir_all(&directory).unwrap();
        std::fs::create_dir_all(&directory).unwrap();
    }
    std::fs::create_dir_all(machine.archives().join("partial")).unwrap();
}

/// A line for a machine with poolfs.
fn line_of(crowd: &Crowd, at: usize, ended: &(Finished, Duration), counts: impl Fn(&str) -> bool) -> Line {
    let status = crowd.machines[at].status();
    Line {
        from_mirror: status.bytes.mirror,
        from_peers: status.bytes.peer,
        from_deltas: status.bytes.delta,
        given: status.uploaded.bytes,
        ..plain_line(crowd, at, ended, counts)
    }
}

/// A line for a machine without.
fn plain_line(crowd: &Crowd, at: usize, (finished, took): &(Finished, Duration), counts: impl Fn(&str) -> bool) -> Line {
    Line {
        machine: at,
        what: String::new(),
        exit: finished.code(),
        seconds: took.as_secs_f64(),
        mirror_bytes: crowd.mirror_bytes_of(at, counts),
        from_mirror: 0,
        from_peers: 0,
        from_deltas: 0,
        given: 0,
    }
}

/// Lines with what the mirror sent to all machines, those without a line among them.
fn contender(crowd: &Crowd, name: &str, wanted_bytes: u64, lines: Vec<Line>, counts: impl Fn(&str) -> bool) -> Contender {
    let mirror_bytes = (0..crowd.hosts.len()).map(|at| crowd.mirror_bytes_of(at, &counts)).sum();
    Contender { name: name.to_owned(), mirror_bytes, copies: ratio(mirror_bytes, wanted_bytes), lines }
}

fn ratio(of: u64, to: u64) -> f64 {
    #[allow(clippy::cast_precision_loss, reason = "a ratio to print")]
    let ratio = of as f64 / to.max(1) as f64;
    ratio
}

fn is_package(path: &str) -> bool {
    path.ends_with(".deb")
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// A file of the laboratory, in the checkout.
fn own_file(name: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/lab").join(name)
}

/// Something that was installed below `target/tools`.
fn tool(path: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("target/tools").join(path)
}
