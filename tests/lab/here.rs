//! One machine, with poolfs and without: everything is here already, or nobody else has it.

use super::outcome::{Contender, Figure, Outcome};
use super::scenario::Scenario;
use super::{contender, crowd, is_package, limit, line_of, median, nodes, plain_line, up};
use crate::harness::Running;
use crate::harness::crowd::Crowd;
use crate::harness::machine::Machine;
use std::time::Instant;

/// How long apt takes for that, in seconds.
fn apt(machine: &Machine, arguments: &[&str]) -> f64 {
    let began = Instant::now();
    Running::start(&mut machine.command("apt-get", arguments)).wait().ok();
    began.elapsed().as_secs_f64()
}

/// `runs` times over, in turn: an update that finds nothing new, and an installation of what is here.
pub(crate) fn play(scenario: &Scenario, runs: usize) -> Outcome {
    let crowd = crowd(scenario);
    let plain = &crowd.more_machines(&crowd.hosts[..1], "", "")[0];
    crowd.mirror.tell_dates();
    limit(&crowd, scenario);
    let ours = &crowd.machines[0];
    up(&crowd.machines[..1], scenario.machines.fleet, 1);
    plain.update_plainly();
    let mut outcome = Outcome { wanted_bytes: crowd.plan_bytes(), ..Outcome::default() };
    for machine in [ours, plain] {
        crowd.start_download_on(machine).wait().ok();
        crowd.assert_as_signed(machine);
        outcome.verified += crowd.names.len();
    }
    crowd.mirror.forget_log();
    let install: Vec<&str> = ["install", "-y", "-d"].into_iter().chain(crowd.names.iter().map(String::as_str)).collect();
    for (what, arguments) in [("update", vec!["update"]), ("install -d", install)] {
        let (mut with, mut without) = (Vec::new(), Vec::new());
        for _ in 0..runs {
            with.push(apt(ours, &arguments));
            without.push(apt(plain, &arguments));
        }
        let (with, without) = (median(with), median(without));
        outcome.figures.push(Figure::new(format!("apt-get {what}, everything here"), with, "s"));
        outcome.figures.push(Figure::new(format!("apt-get {what}, plain apt"), without, "s"));
        outcome.figures.push(Figure::new(format!("apt-get {what}, ours beside plain"), with / without, "x"));
    }
    let asked = crowd.mirror.log().iter().filter(|request| is_package(&request.path)).count();
    assert_eq!(asked, 0, "what is here is asked of nobody");
    outcome
}

/// Every run other packages: the scenario's are dealt out to the runs in turn, so that each has the same mix.
pub(crate) fn nobody(scenario: &Scenario, runs: usize) -> Outcome {
    let crowd = crowd(scenario);
    let plain = &crowd.more_machines(&crowd.hosts[..1], "", "")[0];
    limit(&crowd, scenario);
    let nodes = nodes::start_beside(&crowd, scenario);
    let ours = &crowd.machines[0];
    up(&crowd.machines, scenario.machines.fleet, crowd.machines.len());
    plain.update_plainly();
    nodes::await_joined(ours, nodes.len());
    let mut outcome = Outcome { wanted_bytes: crowd.plan_bytes(), ..Outcome::default() };
    let (mut with, mut without) = (Vec::new(), Vec::new());
    let mut lines: [Vec<super::outcome::Line>; 2] = Default::default();
    for run in 0..runs {
        let names: Vec<&str> = crowd.names.iter().skip(run).step_by(runs).map(String::as_str).collect();
        let arguments: Vec<&str> = ["install", "-y", "-d"].into_iter().chain(names.iter().copied()).collect();
        for (at, machine, seconds) in [(0, ours, &mut with), (1, plain, &mut without)] {
            crowd.mirror.forget_log();
            let began = Instant::now();
            let ended = (Running::start(&mut machine.command("apt-get", &arguments)).wait().ok(), began.elapsed());
            seconds.push(ended.1.as_secs_f64());
            let mut line = if at == 0 { line_of(&crowd, 0, &ended, is_package) } else { plain_line(&crowd, 0, &ended, is_package) };
            line.what = format!("{} packages, run {run}", names.len());
            lines[at].push(line);
        }
    }
    for machine in [ours, plain] {
        crowd.assert_as_signed(machine);
        outcome.verified += crowd.names.len();
    }
    let [ours_lines, plain_lines] = lines;
    outcome.contenders = vec![summed(&crowd, "poolfs", ours_lines), summed(&crowd, "plain apt", plain_lines)];
    let (with, without) = (median(with), median(without));
    outcome.figures = vec![
        Figure::new("a transaction that nobody has, poolfs", with, "s"),
        Figure::new("the same, plain apt", without, "s"),
        Figure::new("ours beside plain apt", with / without, "x"),
        Figure::new("more than plain apt, for each transaction", with - without, "s"),
    ];
    outcome
}

fn summed(crowd: &Crowd, name: &str, lines: Vec<super::outcome::Line>) -> Contender {
    let mirror_bytes = lines.iter().map(|line| line.mirror_bytes).sum();
    let contender = contender(crowd, name, crowd.plan_bytes(), lines, is_package);
    Contender { mirror_bytes, copies: super::ratio(mirror_bytes, crowd.plan_bytes()), ..contender }
}
