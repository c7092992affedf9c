//! What the lab plays through: each scenario makes its machines, lets real apt run on them, checks every file, and counts.

use crate::harness::crowd::{Crowd, Terms, await_status};
use crate::harness::machine::Machine;
use crate::harness::process::Finished;
use crate::harness::{Package, Running, assert_holds, listed};
use serde::Serialize;
use std::time::{Duration, Instant};

/// One scenario.
pub(crate) struct Scenario {
    /// What it is called on the command line.
    pub(crate) name: &'static str,
    /// One line for people.
    pub(crate) about: &'static str,
    /// Plays it. A wrong byte or a failed apt ends it with a panic; what it counted is for the caller to judge.
    pub(crate) play: fn() -> Outcome,
}

/// All scenarios.
pub(crate) const ALL: &[Scenario] = &[
    Scenario {
        name: "fleet-small",
        about: "8 cold machines of a fleet install the same 40 packages at the same moment",
        play: || fleet(8, fleet_packages()),
    },
    Scenario {
        name: "fleet-4",
        about: "4 cold machines of a fleet, 125 MB each, links and mirror at 50 Mbit/s, beside one alone without poolfs",
        play: || shaped_fleet(4),
    },
    Scenario { name: "fleet-8", about: "the same with 8", play: || shaped_fleet(8) },
    Scenario { name: "fleet-16", about: "the same with 16", play: || shaped_fleet(16) },
    Scenario {
        name: "fleet-16-small",
        about: "12 small packages by 16 cold machines of a fleet at the same moment",
        play: || fleet(16, (0..12).map(|n| Package::new(&format!("small{n:02}"), "1.0", 20_000 + n * 16_000)).collect()),
    },
    Scenario {
        name: "update-from-neighbour",
        about: "the second machine's apt-get update, with the first one's indexes on the same wire",
        play: update_from_neighbour,
    },
    Scenario {
        name: "update-debian",
        about: "apt-get update of trixie with Contents, -updates and -security behind 20 Mbit/s: machine 1 plain, machine 2 with machine 0 beside it",
        play: update_debian,
    },
];

/// What one machine did.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Line {
    pub(crate) machine: usize,
    /// apt's exit code.
    pub(crate) exit: i32,
    /// apt's time, in seconds.
    pub(crate) seconds: f64,
    /// What the mirror sent to it: bodies, without what apt asks for itself in each case (`InRelease`).
    pub(crate) mirror_bytes: u64,
    /// What poolfs there got from the mirror, in bytes.
    pub(crate) from_mirror: u64,
    /// From peers.
    pub(crate) from_peers: u64,
    /// What it gave to others.
    pub(crate) given: u64,
}

/// One figure beside its goal.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Figure {
    pub(crate) name: String,
    pub(crate) value: f64,
    pub(crate) unit: &'static str,
    /// What was wanted, in words; empty where the figure is there to compare with.
    pub(crate) goal: &'static str,
}

impl Figure {
    pub(crate) fn new(name: impl Into<String>, value: f64, unit: &'static str, goal: &'static str) -> Self {
        Self { name: name.into(), value, unit, goal }
    }
}

/// What a scenario counted.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct Outcome {
    /// Bytes that each machine wanted.
    pub(crate) wanted_bytes: u64,
    /// What all machines together got from the mirror, in copies of what one wanted.
    pub(crate) copies: f64,
    pub(crate) lines: Vec<Line>,
    pub(crate) figures: Vec<Figure>,
}

/// Bookworm's mix of sizes in small: most packages of one piece, most bytes in the others.
fn fleet_packages() -> Vec<Package> {
    let small = (0..36).map(|n| Package::new(&format!("small{n:02}"), "1.0", 4_000 + n * 9_000));
    let large = (0..4).map(|n| Package::new(&format!("large{n}"), "1.0", 2_000_000 + n * 1_300_000));
    small.chain(large).collect()
}

/// 89 packages of 125 MB, 66 of them of one piece.
fn plan_125_mb() -> Vec<Package> {
    let small = (0..66).map(|n| Package::new(&format!("small{n:02}"), "1.0", 2_000 + n * 1_700));
    let large = (0..23).map(|n| Package::new(&format!("large{n:02}"), "1.0", 700_000 + n * 430_000));
    small.chain(large).collect()
}

/// Everybody installs everything at the same moment; nobody has anything.
fn fleet(machines: usize, packages: Vec<Package>) -> Outcome {
    let crowd = Crowd::new(machines, packages, &Terms { fleet: true, ..Terms::default() });
    crowd.up(true);
    everybody_installs(&crowd, machines)
}

/// The same behind shaped links, after one machine without poolfs did it alone.
fn shaped_fleet(machines: usize) -> Outcome {
    let crowd = Crowd::new(machines + 1, plan_125_mb(), &Terms { fleet: true, mbit: Some(50), ..Terms::default() });
    let plain = &crowd.machines[machines];
    plain.apt_get(&["update"]).ok();
    let began = Instant::now();
    crowd.download(machines);
    let alone = began.elapsed().as_secs_f64();
    let fleet = &crowd.machines[..machines];
    fleet.iter().for_each(Machine::up);
    for machine in fleet {
        await_status(machine, "knows the others", |status| status.fleet_members == machines as u64);
    }
    for machine in fleet {
        machine.update();
    }
    crowd.mirror.forget_log();
    let mut outcome = everybody_installs(&crowd, machines);
    let last = outcome.lines.iter().map(|line| line.seconds).fold(0.0, f64::max);
    outcome.figures = vec![
        Figure::new("mirror bytes", outcome.copies, "copies", "at most 1.1"),
        Figure::new("one machine alone, plain apt", alone, "s", ""),
        Figure::new("last machine of the fleet", last, "s", ""),
        Figure::new("last machine beside one alone", last / alone, "x", "at most 1.5"),
    ];
    outcome
}

fn everybody_installs(crowd: &Crowd, machines: usize) -> Outcome {
    let ends = at_once(machines, |machine| crowd.start_download(machine));
    for (machine, (finished, _)) in ends.iter().enumerate() {
        assert_eq!(finished.deb_gets(), Vec::<&str>::new(), "apt fetched by itself: {finished}");
        crowd.assert_all_here(machine);
    }
    outcome(crowd, crowd.plan_bytes(), ends, |path| path.ends_with(".deb"))
}

/// The first machine updates from the mirror, then the second one.
fn update_from_neighbour() -> Outcome {
    let crowd = Crowd::new(2, fleet_packages(), &Terms { fleet: true, ..Terms::default() });
    crowd.start(true);
    crowd.machines[0].update();
    let wanted = crowd.machines[0].status().bytes.mirror;
    crowd.mirror.forget_log();
    let began = Instant::now();
    let finished = crowd.machines[1].update();
    let ends = vec![(finished, began.elapsed())];
    let mut outcome = outcome(&crowd, wanted, ends, |path| !path.ends_with("/InRelease"));
    outcome.lines[0].machine = 1;
    outcome.lines[0].mirror_bytes = crowd.mirror_bytes_of(1, |path| !path.ends_with("/InRelease"));
    outcome
}

/// What apt-file adds to apt's configuration; not asked of `-updates`, whose Contents real mirrors often have not.
const CONTENTS: &str = r#"
Acquire::IndexTargets::deb::Contents-deb {
    MetaKey "$(COMPONENT)/Contents-$(ARCHITECTURE)";
    ShortDescription "Contents-$(ARCHITECTURE)";
    Description "$(RELEASE)/$(COMPONENT) $(ARCHITECTURE) Contents (deb)";
    flatMetaKey "Contents-$(ARCHITECTURE)";
    flatDescription "$(RELEASE) Contents (deb)";
    PDiffs "true";
    KeepCompressed "true";
    DefaultEnabled "false";
};
"#;

/// The real archive's indexes: machine 0 has them, machine 1 is without poolfs, machine 2 has machine 0 beside it.
fn update_debian() -> Outcome {
    let terms = Terms { fleet: true, mirror_mbit: Some(20), apt_conf: CONTENTS.to_owned(), ..Terms::default() };
    let crowd = Crowd::debian(3, &[], &terms);
    for machine in [0, 2] {
        crowd.machines[machine].up();
    }
    for machine in [0, 2] {
        await_status(&crowd.machines[machine], "knows the other", |status| status.fleet_members == 2);
    }
    crowd.machines[0].apt_get(&["update"]).ok();
    crowd.mirror.forget_log();
    let line = |machine: usize| {
        let began = Instant::now();
        let finished = crowd.machines[machine].apt_get(&["update"]).ok();
        let seconds = began.elapsed().as_secs_f64();
        let status = (machine != 1).then(|| crowd.machines[machine].status());
        Line {
            machine,
            exit: finished.code(),
            seconds,
            mirror_bytes: crowd.mirror_bytes_of(machine, |_| true),
            from_mirror: status.as_ref().map_or(0, |status| status.bytes.mirror),
            from_peers: status.as_ref().map_or(0, |status| status.bytes.peer),
            given: status.as_ref().map_or(0, |status| status.uploaded.bytes),
        }
    };
    let lines = vec![line(1), line(2)];
    let wanted_bytes = lines[0].mirror_bytes;
    #[allow(clippy::cast_precision_loss, reason = "a ratio to print")]
    let copies = lines[1].mirror_bytes as f64 / wanted_bytes.max(1) as f64;
    let listed = |machine: usize| {
        let mut files: Vec<_> = listed(&crowd.machines[machine].lists()).into_iter().filter(|name| name.contains("_dists_")).collect();
        files.sort();
        files
    };
    assert_eq!(listed(1), listed(2), "the lists are those of plain apt");
    for name in listed(1) {
        assert_holds(&crowd.machines[2].lists().join(&name), &std::fs::read(crowd.machines[1].lists().join(&name)).unwrap());
    }
    Outcome { wanted_bytes, copies, lines, figures: Vec::new() }
}

/// Starts one program for each machine and waits for all, each with its own time.
fn at_once(machines: usize, start: impl Fn(usize) -> Running) -> Vec<(Finished, Duration)> {
    let began = Instant::now();
    let running: Vec<Running> = (0..machines).map(start).collect();
    std::thread::scope(|scope| {
        let waiting: Vec<_> = running.into_iter().map(|one| scope.spawn(move || (one.wait().ok(), began.elapsed()))).collect();
        waiting.into_iter().map(|thread| thread.join().expect("it said why")).collect()
    })
}

fn outcome(crowd: &Crowd, wanted_bytes: u64, ends: Vec<(Finished, Duration)>, counts: impl Fn(&str) -> bool) -> Outcome {
    let line = |(machine, (finished, took)): (usize, (Finished, Duration))| {
        let status = crowd.machines[machine].status();
        Line {
            machine,
            exit: finished.code(),
            seconds: took.as_secs_f64(),
            mirror_bytes: crowd.mirror_bytes_of(machine, &counts),
            from_mirror: status.bytes.mirror,
            from_peers: status.bytes.peer,
            given: status.uploaded.bytes,
        }
    };
    let lines: Vec<Line> = ends.into_iter().enumerate().map(line).collect();
    let mirror: u64 = (0..crowd.machines.len()).map(|machine| crowd.mirror_bytes_of(machine, &counts)).sum();
    #[allow(clippy::cast_precision_loss, reason = "a ratio to print")]
    let copies = mirror as f64 / wanted_bytes.max(1) as f64;
    Outcome { wanted_bytes, copies, lines, figures: Vec::new() }
}
