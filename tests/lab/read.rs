//! A cold machine whose neighbours have everything: one large file read through the mount, and many packages beside one.

use super::outcome::{Figure, Outcome};
use super::raw::{Raw, Took, median, timed};
use super::scenario::{Read, Scenario};
use super::{crowd, empty, is_package, warm_up};
use crate::harness::assert_holds;
use crate::harness::crowd::{Crowd, FAST_MBIT, await_status};
use crate::harness::machine::Machine;

/// A cold machine comes up beside the warm ones; the daemons whose processor time counts.
fn join(crowd: &Crowd, scenario: &Scenario, cold: usize) -> Vec<u32> {
    let (machine, warm) = (&crowd.machines[cold], scenario.machines.warm);
    machine.up();
    if scenario.machines.fleet {
        await_status(machine, "knows the others", |status| status.fleet_members == warm as u64 + 1);
    }
    machine.update();
    crowd.machines[..warm].iter().chain([machine]).flat_map(Machine::pids).collect()
}

/// It is a neighbour no longer, and what it got is right.
fn leave(crowd: &Crowd, machine: &Machine) -> usize {
    machine.down();
    let mut verified = 0;
    for published in &crowd.packages {
        let there = machine.archives().join(published.archive_name());
        if there.exists() {
            assert_holds(&there, &published.bytes);
            verified += 1;
        }
    }
    empty(machine);
    verified
}

fn read_through(crowd: &Crowd, cold: usize, beside: &[u32]) -> Took {
    let machine = &crowd.machines[cold];
    let file = machine.inside(&machine.archives().join(crowd.packages[0].archive_name()));
    timed(&mut machine.command("sh", &[""; 0]), &format!("cat {} >/dev/null", file.display()), beside)
}

#[allow(clippy::cast_precision_loss, reason = "figures to print")]
fn asked_of_mirror(crowd: &Crowd) -> Figure {
    let count = crowd.mirror.log().iter().filter(|request| is_package(&request.path)).count();
    Figure::new("requests for packages that the mirror saw", count as f64, "")
}

/// `runs` cold machines, one after the other, each followed by the rivals.
pub(crate) fn play(scenario: &Scenario, work: &Read) -> Outcome {
    let crowd = crowd(scenario);
    let warm = scenario.machines.warm;
    warm_up(&crowd, scenario);
    super::limit(&crowd, scenario);
    crowd.mirror.forget_log();
    let (published, client) = (&crowd.packages[0], crowd.hosts.last().unwrap());
    let file = crowd.mirror_root().join(&published.filename);
    let raw = work.rivals.then(|| Raw::start(&crowd, warm, client, &file, &published.digest));
    let mut outcome = Outcome { wanted_bytes: crowd.plan_bytes(), ..Outcome::default() };
    let mut took: [Vec<Took>; 6] = Default::default();
    for cold in warm..warm + scenario.machines.count {
        let machine = &crowd.machines[cold];
        let pids = join(&crowd, scenario, cold);
        took[0].push(read_through(&crowd, cold, &pids));
        outcome.verified += leave(&crowd, machine);
        if let Some(raw) = &raw {
            took[1].push(raw.curl());
            took[2].push(raw.aria2());
            took[3].push(raw.libtorrent());
            took[4].push(raw.btfs());
        }
        if let Some(mbit) = work.slow_mbit {
            // As cold as before: nothing is known of the neighbours either.
            std::fs::remove_dir_all(machine.state_dir()).unwrap();
            crowd.hosts[warm - 1].shape_each(mbit, FAST_MBIT);
            let pids = join(&crowd, scenario, cold);
            took[5].push(read_through(&crowd, cold, &pids));
            crowd.hosts[warm - 1].shape_each(FAST_MBIT, FAST_MBIT);
            outcome.verified += leave(&crowd, machine);
        }
    }
    outcome.figures = figures(&took.map(|all| (!all.is_empty()).then(|| median(&all))), outcome.wanted_bytes);
    outcome.figures.push(asked_of_mirror(&crowd));
    outcome
}

fn figures(took: &[Option<Took>; 6], bytes: u64) -> Vec<Figure> {
    #[allow(clippy::cast_precision_loss, reason = "figures to print")]
    let mb = bytes as f64 / 1e6;
    let rate = |name: &str, took: &Took| Figure::new(name, mb / took.seconds, "MB/s");
    let cpu = |name: &str, took: &Took| Figure::new(name, took.cpu_seconds * 1000.0 / mb, "CPU s/GB");
    let names = [
        "through the mount",
        "nginx, curl, sha256sum",
        "nginx, aria2, sha256sum",
        "libtorrent, sha256sum",
        "btfs",
        "with one slow neighbour",
    ];
    let mut figures: Vec<Figure> = names.iter().zip(took).filter_map(|(name, took)| Some(rate(name, took.as_ref()?))).collect();
    let ours = took[0].as_ref().expect("always measured");
    for (name, rival) in names.iter().zip(took).skip(1) {
        let Some(rival) = rival else { continue };
        if *name == "with one slow neighbour" {
            figures.push(Figure::new("with one slow neighbour beside none", rival.seconds / ours.seconds, "x"));
        } else {
            figures.push(Figure::new(format!("ours beside {name}"), rival.seconds / ours.seconds, "x"));
        }
    }
    figures.extend(names.iter().zip(took).filter_map(|(name, took)| Some(cpu(&format!("{name}, all processes"), took.as_ref()?))));
    figures
}

/// The packages but the first, then the first, which is as large as all of them.
pub(crate) fn many_and_one(scenario: &Scenario) -> Outcome {
    let mut scenario = scenario.clone();
    let sizes = super::scenario::bookworm_sizes(scenario.packages.bookworm);
    scenario.packages.bytes = vec![sizes.iter().sum()];
    let crowd = crowd(&scenario);
    let names: Vec<&str> = crowd.names.iter().map(String::as_str).collect();
    let (one, many) = names.split_last().expect("some packages");
    let warm = scenario.machines.warm;
    warm_up(&crowd, &scenario);
    super::limit(&crowd, &scenario);
    crowd.mirror.forget_log();
    let mut outcome = Outcome { wanted_bytes: crowd.plan_bytes() / 2, ..Outcome::default() };
    let (mut took_many, mut took_one) = (vec![], vec![]);
    for cold in warm..warm + scenario.machines.count {
        let pids = join(&crowd, &scenario, cold);
        let machine = &crowd.machines[cold];
        let install =
            |names: &str| timed(&mut machine.command("sh", &[""; 0]), &format!("apt-get install -y -d {names} >/dev/null"), &pids);
        took_many.push(install(&many.join(" ")));
        took_one.push(install(one));
        outcome.verified += leave(&crowd, machine);
    }
    let (took_many, took_one) = (median(&took_many), median(&took_one));
    outcome.figures = vec![
        Figure::new(format!("{} packages by apt-get install -d", many.len()), took_many.seconds, "s"),
        Figure::new("one package of the same bytes", took_one.seconds, "s"),
        Figure::new("many packages beside one", took_many.seconds / took_one.seconds, "x"),
        asked_of_mirror(&crowd),
    ];
    outcome
}
