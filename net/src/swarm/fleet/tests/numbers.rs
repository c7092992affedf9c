//! What a fleet costs the mirror, and each machine. Run with `--no-capture` to see the figures.

use super::*;

#[allow(clippy::print_stdout, reason = "the figures of the table")]
fn show(name: &str, sim: &Sim) {
    println!("{name}: {:?}", sim.figures());
}

fn upload_max(sim: &Sim) -> f64 {
    sim.machines.iter().map(|machine| machine.up_bytes).max().unwrap() as f64 / sim.plan_bytes() as f64
}

/// Sixteen machines that upgrade together cost the mirror one copy, and take little longer than the link does.
#[test]
fn sixteen_machines_one_copy() {
    let mut sim = Sim::new(16, plan(1));
    sim.run(Duration::from_secs(60));
    show("16 machines, 1 Gbit/s", &sim);
    assert!(sim.copies() <= 1.05, "{}", sim.copies());
    assert!(upload_max(&sim) <= 3.0, "{}", upload_max(&sim));
    assert!(*sim.times().last().unwrap() <= 6.0, "{:?}", sim.times());
}

/// A thousand machines with a whole plan, whose links and mirror have 1 Gbit/s.
#[test]
fn a_thousand_machines_one_copy() {
    let mut sim = Sim::new(1_000, plan(1));
    sim.run(Duration::from_secs(60));
    show("1,000 machines, 1 Gbit/s", &sim);
    assert!(sim.copies() <= 1.05, "{}", sim.copies());
    assert!(upload_max(&sim) <= 3.0, "{}", upload_max(&sim));
    assert!(*sim.times().last().unwrap() <= 10.0);
}

/// Twelve small packages by a thousand machines in the same second: one copy, and nobody carries the fleet.
#[test]
fn a_thousand_machines_small_packages() {
    let mut sim = Sim::new(1_000, small_packages());
    sim.run(Duration::from_secs(60));
    show("1,000 machines, 12 small packages", &sim);
    assert!(sim.copies() <= 1.05, "{}", sim.copies());
    assert!(upload_max(&sim) <= 16.0, "{}", upload_max(&sim));
    assert!(*sim.times().last().unwrap() <= 3.0);
}

/// The same with a mirror that takes three seconds to answer: nobody loses patience.
#[test]
fn a_thousand_machines_small_packages_slow_mirror() {
    let mut sim = Sim::new(1_000, small_packages());
    sim.mirror_latency = Duration::from_secs(3);
    sim.run(Duration::from_secs(60));
    show("1,000 machines, 12 small packages, mirror answers after 3 s", &sim);
    assert!(sim.copies() <= 1.05, "{}", sim.copies());
    assert!(upload_max(&sim) <= 16.0, "{}", upload_max(&sim));
}

/// Every view lacks one member in a hundred, each another: the mirror hardly notices.
#[test]
fn differing_views_cost_little() {
    let mut sim = Sim::new(200, small_packages());
    for at in 0..200usize {
        sim.machines[at].view = view_of((0..200).filter(|other| *other == at || (other * 31 + at * 17) % 100 != 0));
    }
    sim.run(Duration::from_secs(60));
    show("200 machines whose views differ", &sim);
    assert!(sim.copies() <= 1.05, "{}", sim.copies());
    assert!(sim.mirror_fetches.iter().all(|fetches| *fetches <= 3), "{:?}", sim.mirror_fetches);
}

/// Machines behind a link of 100 Mbit/s to the mirror, of which five in a hundred die with
/// half of the plan: what they had fetched and not handed on is fetched again, and hardly more.
#[test]
#[allow(clippy::print_stdout, reason = "the figures of the table")]
fn a_fleet_that_loses_some() {
    let scenario = Scenario {
        machines: 200,
        small: false,
        mirror_bytes_s: 12.5e6,
        link_bytes_s: GBIT,
        mirror_latency: Duration::from_millis(30),
        start_within: Duration::from_secs(1),
        dying_percent: 5,
        roads: Roads::default(),
    };
    let figures = run(&scenario);
    println!("200 machines, 100 Mbit/s to the mirror, 5 % die: {figures:?}");
    assert!(figures.copies <= 1.05 && figures.fetches_max <= 3, "{figures:?}");
    assert!(figures.max_s <= 20.0, "{figures:?}");
}

/// Links of 50 Mbit/s with queues, each machine with a few files at once as its mount wants them: answers that are held and wait
/// in queues besides are not taken for silence, which would make second coordinators lease what the first has leased.
#[test]
#[allow(clippy::print_stdout, reason = "the figures of the table")]
fn full_links_with_queues() {
    // Every uplink has to carry nearly all of the plan, so that the more machines there are the fuller all links are.
    for (machines, slowest) in [(4, 1.5), (16, 1.75)] {
        let scenario = Scenario {
            machines,
            small: false,
            mirror_bytes_s: GBIT / 20.0,
            link_bytes_s: GBIT / 20.0,
            mirror_latency: Duration::from_millis(30),
            start_within: Duration::from_secs(1),
            dying_percent: 0,
            roads: Roads { queue: Duration::from_millis(200), tcp: true, files_at_once: 8 },
        };
        let figures = run(&scenario);
        let alone_s = figures.plan_bytes as f64 / scenario.mirror_bytes_s;
        println!("{machines} machines, 50 Mbit/s with queues, one alone {alone_s:.1} s: {figures:?}");
        assert!(figures.copies <= 1.1, "{figures:?}");
        assert!(figures.max_s <= slowest * alone_s, "{figures:?}, alone {alone_s}");
    }
}
