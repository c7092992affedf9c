//! Named commands on named machines, one after the other: what the first program of this kind was tested with, in shape.

use super::outcome::{Contender, Figure, Line, Outcome};
use super::scenario::{Scenario, Step};
use super::{crowd, is_package, limit, line_of, ratio};
use crate::harness::crowd::{Crowd, await_status};
use crate::harness::machine::{Machine, SourceBytes};
use crate::harness::{Running, listed};
use std::time::Instant;

pub(crate) fn play(scenario: &Scenario, steps: &[Step]) -> Outcome {
    let crowd = crowd(scenario);
    limit(&crowd, scenario);
    crowd.machines.iter().for_each(Machine::up);
    if crowd.machines.len() > 1 {
        crowd.await_acquainted(scenario.machines.fleet);
    }
    let mut lines = Vec::new();
    let mut wanted = 0;
    for step in steps {
        for at in &step.machines {
            for arguments in commands(&crowd, step) {
                let before = crowd.machines[*at].status().bytes;
                let line = command(&crowd, *at, &arguments, step, before);
                if arguments[0] != "update" && !step.fails {
                    let named = |published: &&crate::harness::Published| arguments.contains(&published.package.name);
                    wanted += crowd.packages.iter().filter(named).map(|published| published.bytes.len() as u64).sum::<u64>();
                }
                lines.push(line);
            }
        }
    }
    let mut outcome = Outcome { wanted_bytes: wanted, ..Outcome::default() };
    for machine in &crowd.machines {
        outcome.verified += crate::harness::verify::assert_as_signed(machine);
    }
    let sum = |of: fn(&Line) -> u64| lines.iter().filter(|line| !line.what.contains("update")).map(of).sum::<u64>();
    let (mirror, peers) = (sum(|line| line.mirror_bytes), sum(|line| line.from_peers));
    outcome.figures = vec![
        Figure::new("packages from the mirror", ratio(mirror, wanted), "of what was installed"),
        Figure::new("packages from peers", ratio(peers, wanted), "of what was installed"),
    ];
    outcome.contenders = vec![Contender { name: "poolfs".into(), mirror_bytes: mirror, copies: ratio(mirror, wanted), lines }];
    outcome
}

fn commands(crowd: &Crowd, step: &Step) -> Vec<Vec<String>> {
    let names: Vec<String> = if step.install == ["*"] { crowd.names.clone() } else { step.install.clone() };
    let words = |words: &[&str], names: &[String]| words.iter().map(ToString::to_string).chain(names.iter().cloned()).collect::<Vec<_>>();
    let mut commands = Vec::new();
    if step.update {
        commands.push(words(&["update"], &[]));
    }
    let install = ["install", "-y", "-d"];
    if step.one_by_one {
        commands.extend(names.iter().map(|name| words(&install, std::slice::from_ref(name))));
    } else if !names.is_empty() {
        commands.push(words(&install, &names));
    }
    commands
}

/// Runs it; what the machine got is what it got by this command.
fn command(crowd: &Crowd, at: usize, arguments: &[String], step: &Step, before: SourceBytes) -> Line {
    let machine = &crowd.machines[at];
    if step.clean {
        machine.apt_get(&["clean"]).ok();
    }
    crowd.mirror.forget_log();
    let began = Instant::now();
    let finished = Running::start(&mut machine.command("apt-get", arguments)).wait();
    let ended = (if step.fails { finished.failed() } else { finished.ok() }, began.elapsed());
    let update = arguments[0] == "update";
    if update {
        machine.await_catalog();
    } else if !step.fails {
        assert_eq!(ended.0.deb_gets(), Vec::<&str>::new(), "apt fetched by itself: {}", ended.0);
        await_announced(crowd, at);
    }
    let counts = |path: &str| if update { !path.ends_with("/InRelease") } else { is_package(path) };
    let line = line_of(crowd, at, &ended, counts);
    Line {
        what: format!("apt-get {}", arguments.join(" ")),
        from_mirror: line.from_mirror - before.mirror,
        from_peers: line.from_peers - before.peer,
        from_deltas: line.from_deltas - before.delta,
        ..line
    }
}

/// The next machine may ask for what this one has: its large packages are announced.
fn await_announced(crowd: &Crowd, at: usize) {
    if crowd.machines.len() < 2 {
        return;
    }
    await_status(&crowd.machines[at], "announces what is large", |status| {
        let large = crowd.packages.iter().filter(|published| published.bytes.len() > 512 * 1024);
        let here = listed(&crowd.machines[at].archives());
        let here = large.filter(|published| here.contains(&published.archive_name())).count() as u64;
        status.node.as_ref().is_some_and(|node| node.announced_keys >= here)
    });
}
