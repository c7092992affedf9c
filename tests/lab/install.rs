//! Machines that all install the same: at once or one after another, with what may happen meanwhile, beside plain apt and apt-cacher-ng.

use super::outcome::{Contender, Figure, Line, Outcome};
use super::rivals::Proxy;
use super::scenario::{Event, Happening, Install, Rival, Scenario};
use super::{contender, crowd, empty, is_package, limit, line_of, nodes, plain_line, up, warm_up};
use crate::harness::crowd::{Crowd, covered};
use crate::harness::machine::Machine;
use crate::harness::process::Finished;
use crate::harness::{Client, Fault, Running};
use std::ops::Range;
use std::time::{Duration, Instant};

/// As long as the slowest way of all takes: plain apt on 16 machines behind one link.
const PATIENCE: Duration = Duration::from_secs(1_800);

/// The machines of one way to do it, made before anything is mounted.
struct Set {
    rival: Rival,
    machines: Vec<Machine>,
}

pub(crate) fn play(scenario: &Scenario, work: &Install) -> Outcome {
    let crowd = crowd(scenario);
    let (warm, count) = (scenario.machines.warm, scenario.machines.count);
    let cold = warm..warm + count;
    let places = &crowd.hosts[cold.clone()];
    let alone = if work.alone { crowd.more_machines(&places[..1], "", "") } else { Vec::new() };
    let set = |rival: &Rival| {
        let conf = match rival {
            Rival::Plain => String::new(),
            Rival::AptCacherNg => Proxy::apt_conf(places[0].address),
        };
        Set { rival: *rival, machines: crowd.more_machines(places, &conf, "") }
    };
    let sets: Vec<Set> = work.rivals.iter().map(set).collect();
    warm_up(&crowd, scenario);
    limit(&crowd, scenario);
    let mut outcome = Outcome { wanted_bytes: crowd.plan_bytes(), ..Outcome::default() };
    let mut seconds_alone = None;
    for machine in &alone {
        machine.update_plainly();
        let began = Instant::now();
        crowd.start_download_on(machine).wait_within(PATIENCE).ok();
        seconds_alone = Some(began.elapsed().as_secs_f64());
        crowd.assert_as_signed(machine);
        empty(machine);
    }
    let nodes = nodes::start_beside(&crowd, scenario);
    poolfs(&crowd, scenario, work, cold.clone(), &mut outcome);
    drop(nodes);
    for machine in &crowd.machines {
        machine.down();
        empty(machine);
    }
    for set in &sets {
        rival(&crowd, set, cold.clone(), work, &mut outcome);
    }
    figures(&mut outcome, seconds_alone);
    outcome
}

fn poolfs(crowd: &Crowd, scenario: &Scenario, work: &Install, cold: Range<usize>, outcome: &mut Outcome) {
    let machines = &scenario.machines;
    up(&crowd.machines[cold.start..], machines.fleet, crowd.machines.len());
    crowd.mirror.forget_log();
    let ends = run(crowd, &crowd.machines[cold.clone()], cold.start, work);
    let mut lines = Vec::new();
    for (at, ended) in cold.clone().zip(&ends) {
        let Some(ended) = ended else { continue };
        assert_eq!(ended.0.deb_gets(), Vec::<&str>::new(), "apt fetched by itself: {}", ended.0);
        crowd.assert_as_signed(&crowd.machines[at]);
        outcome.verified += crowd.names.len();
        lines.push(line_of(crowd, at, ended, is_package));
    }
    crowd.mirror.heal();
    outcome.contenders.push(contender(crowd, "poolfs", outcome.wanted_bytes, lines, is_package));
}

fn rival(crowd: &Crowd, set: &Set, cold: Range<usize>, work: &Install, outcome: &mut Outcome) {
    let (name, proxy) = match set.rival {
        Rival::Plain => ("plain apt", None),
        Rival::AptCacherNg => ("apt-cacher-ng", Some(Proxy::start(&crowd.hosts[cold.start]))),
    };
    for machine in &set.machines {
        machine.update_plainly();
    }
    crowd.mirror.forget_log();
    let alike = Install { event: Vec::new(), ..work.clone() };
    let ends = run(crowd, &set.machines, cold.start, &alike);
    let mut lines = Vec::new();
    for ((at, ended), machine) in cold.zip(&ends).zip(&set.machines) {
        crowd.assert_as_signed(machine);
        outcome.verified += crowd.names.len();
        lines.push(plain_line(crowd, at, ended.as_ref().expect("nobody leaves"), is_package));
        empty(machine);
    }
    drop(proxy);
    outcome.contenders.push(contender(crowd, name, outcome.wanted_bytes, lines, is_package));
}

/// Each machine's apt with its own time; none of a machine that left.
fn run(crowd: &Crowd, machines: &[Machine], first: usize, work: &Install) -> Vec<Option<(Finished, Duration)>> {
    let leaves = work.event.iter().any(|event| event.what == Happening::MachineLeaves);
    let mut running: Vec<Running> = Vec::new();
    let mut began = Vec::new();
    for machine in machines {
        if work.stagger_s > 0 && !running.is_empty() {
            // The pause is what the scenario is about.
            std::thread::sleep(Duration::from_secs(work.stagger_s));
        }
        began.push(Instant::now());
        running.push(crowd.start_download_on(machine));
    }
    let leaving = if leaves { running.pop() } else { None };
    let mut ends: Vec<_> = std::thread::scope(|scope| {
        let happen = scope.spawn(move || happen(crowd, first..first + machines.len(), &work.event, leaving));
        let wait = |(one, began): (Running, Instant)| scope.spawn(move || (one.wait_within(PATIENCE).ok(), began.elapsed()));
        let waiting: Vec<_> = running.into_iter().zip(began).map(wait).collect();
        let ends = waiting.into_iter().map(|thread| Some(thread.join().expect("it said why"))).collect();
        happen.join().expect("it said why");
        ends
    });
    ends.resize_with(machines.len(), || None);
    ends
}

/// Waits for each event's moment, in order, and makes it happen.
fn happen(crowd: &Crowd, machines: Range<usize>, events: &[Event], mut leaving: Option<Running>) {
    for Event { at_percent, what } in events {
        let enough = crowd.plan_bytes() * at_percent / 100;
        crowd.mirror.await_log(&format!("{at_percent} % of a copy given"), |log| covered(log) >= enough);
        match what {
            Happening::MachineLeaves => {
                crowd.hosts[machines.end - 1].plug(false);
                leaving.take();
            }
            Happening::MirrorFails => crowd.mirror.fault(".deb", None::<Client>, Fault::Status(503)),
            Happening::FleetParts => crowd.cut_off(&(machines.start + machines.len() / 2..machines.end).collect::<Vec<_>>()),
            Happening::FleetMeets => crowd.cut_off(&[]),
        }
    }
}

/// Every machine's apt at the same moment, each with its own time.
pub(crate) fn at_once(crowd: &Crowd, machines: &[Machine]) -> Vec<(Finished, Duration)> {
    run(crowd, machines, 0, &Install::default()).into_iter().flatten().collect()
}

fn last(lines: &[Line]) -> f64 {
    lines.iter().map(|line| line.seconds).fold(0.0, f64::max)
}

fn figures(outcome: &mut Outcome, alone: Option<f64>) {
    let mut figures = Vec::new();
    if let Some(alone) = alone {
        figures.push(Figure::new("one machine alone, plain apt", alone, "s"));
    }
    for Contender { name, copies, lines, .. } in &outcome.contenders {
        figures.push(Figure::new(format!("mirror bytes, {name}"), *copies, "copies"));
        figures.push(Figure::new(format!("last machine, {name}"), last(lines), "s"));
        if let Some(alone) = alone {
            figures.push(Figure::new(format!("last machine beside one alone, {name}"), last(lines) / alone, "x"));
        }
    }
    let given: u64 = outcome.contenders[0].lines.iter().map(|line| line.given).max().unwrap_or(0);
    figures.push(Figure::new("most given by one machine", super::ratio(given, outcome.wanted_bytes), "copies"));
    outcome.figures = figures;
}
