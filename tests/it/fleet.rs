//! A fleet: machines that give each other what the mirror would have to give to each of them.

use crate::harness::crowd::{Crowd, Terms, await_fleet_told, await_status, kill_daemon};
use crate::harness::{Package, assert_holds, listed, report};
use crate::lab;

/// One small, and two of several pieces.
fn packages() -> Vec<Package> {
    vec![
        Package::new("small", "1.0", 30_000),
        Package::new("middle", "1:2.0-1", 1_500_000).depends("small"),
        Package::new("large", "3.0", 6_000_001).depends("middle"),
    ]
}

const A: usize = 0;
const B: usize = 1;
const C: usize = 2;

/// A and C have everything, B has nothing.
fn two_have_it() -> Crowd {
    let crowd = Crowd::new(3, packages(), &Terms { fleet: true, ..Terms::default() });
    crowd.up(true);
    crowd.download(A);
    crowd.download(C);
    [A, C].iter().for_each(|holder| await_fleet_told(&crowd.machines[*holder], 3));
    crowd.mirror.forget_log();
    crowd
}

/// A neighbour that has everything must save the mirror everything.
#[test]
fn a_fleet_needs_no_mirror() {
    let crowd = two_have_it();
    let before = crowd.machines[B].status().bytes.peer;
    let finished = crowd.download(B);
    assert_eq!(finished.deb_gets(), Vec::<&str>::new(), "{finished}");
    let from_peers = crowd.given_to(B);
    assert_eq!(crowd.mirror_bytes(B), 0, "{:#?}", crowd.mirror.log());
    assert_eq!(crowd.machines[B].status().bytes.peer - before, crowd.plan_bytes(), "{from_peers:?}");
    assert!(from_peers[A] > 0 && from_peers[C] > 0, "both give of files of many pieces: {from_peers:?}");
    crowd.machines[B].apt_get(&["install", "-y", "large"]).ok();
    report("fleet::a_fleet_needs_no_mirror", &format!("0 bytes of packages from the mirror, {from_peers:?} from A, B, C; apt: exit 0"));
}

/// A holder that dies in the middle costs nothing but its share.
#[test]
fn a_holder_dies_in_the_middle() {
    let crowd = two_have_it();
    crowd.hosts[A].shape(20);
    crowd.hosts[C].shape(20);
    let download = crowd.start_download(B);
    await_status(&crowd.machines[B], "has bytes from peers", |status| status.bytes.peer > 500_000);
    kill_daemon(&crowd.machines[A]);
    crowd.hosts[A].plug(false);
    let finished = download.wait().ok();
    crowd.assert_all_here(B);
    assert_eq!(finished.deb_gets(), Vec::<&str>::new(), "{finished}");
    report("fleet::a_holder_dies", &format!("apt: exit 0, {:?} bytes from A, B, C", crowd.given_to(B)));
}

/// With all holders gone the mirror is what it always was.
#[test]
fn all_holders_gone() {
    let crowd = two_have_it();
    crowd.hosts[A].plug(false);
    crowd.hosts[C].plug(false);
    let before = crowd.machines[B].status().bytes.peer;
    let finished = crowd.download(B);
    assert_eq!(crowd.machines[B].status().bytes.peer, before);
    report("fleet::all_holders_gone", &format!("apt: exit {}, {} bytes from the mirror", finished.code(), crowd.mirror_bytes(B)));
}

/// Plays a scenario of the lab: everybody's apt must work, and the mirror give at most so many copies. Every file was verified already.
fn small(name: &str, machines: usize, copies_max: f64) -> lab::outcome::Outcome {
    let outcome = lab::play_named(name);
    let poolfs = outcome.contender("poolfs");
    report(&format!("lab::{name}"), &format!("{:.2} copies from the mirror for {} machines", poolfs.copies, poolfs.lines.len()));
    assert_eq!(poolfs.lines.iter().map(|line| line.exit).collect::<Vec<_>>(), vec![0; machines], "{outcome:?}");
    assert!(poolfs.copies <= copies_max, "{outcome:?}");
    outcome
}

/// Warm neighbours save the mirror everything, also when two cold machines ask at once.
#[test]
fn cold_machines_take_all_from_warm_ones() {
    let outcome = small("small-cold", 2, 0.5);
    for line in &outcome.contender("poolfs").lines {
        assert!(line.from_peers >= outcome.wanted_bytes, "{outcome:?}");
    }
}

/// A crowd costs one copy where plain apt costs one for each machine.
#[test]
fn a_flash_crowd_costs_one_copy() {
    let outcome = small("small-crowd", 4, 1.1);
    let plain = outcome.contender("plain apt");
    assert!((plain.copies - 4.0).abs() < 1e-9, "{outcome:?}");
    assert!(plain.lines.iter().all(|line| line.exit == 0), "{outcome:?}");
}

/// The others get everything when one dies in the middle; what only it had is fetched once more.
#[test]
fn the_others_go_on_when_a_machine_leaves() {
    small("small-leaves", 3, 2.0);
}

/// What the machines have between them is enough when the mirror fails.
#[test]
fn a_mirror_that_fails_with_a_copy_out_is_not_needed() {
    small("small-mirror-fails", 4, 2.5);
}

/// Lost packets cost time and nothing else.
#[test]
fn lossy_links_lose_no_package() {
    small("small-lossy", 4, 2.0);
}

/// Eight cold machines at the same moment cost the mirror about one copy.
#[test]
fn a_fleet_of_eight_costs_one_copy() {
    let outcome = lab::play_named("fleet-small");
    let poolfs = outcome.contender("poolfs");
    assert!(poolfs.lines.iter().all(|line| line.exit == 0), "{outcome:?}");
    report("fleet::a_fleet_of_eight", &format!("{:.2} copies from the mirror for {} machines", poolfs.copies, poolfs.lines.len()));
    assert!(poolfs.copies <= 1.1, "{outcome:?}");
}

/// A neighbour's indexes are as good as the mirror's: what names them comes from the mirror, signed.
#[test]
fn an_update_takes_its_indexes_from_a_neighbour() {
    let outcome = lab::play_named("update-from-neighbour");
    let second = &outcome.contender("poolfs").lines[0];
    assert_eq!((second.exit, second.mirror_bytes), (0, 0), "{outcome:?}");
    report(
        "fleet::update_from_neighbour",
        &format!("{} bytes of indexes from the neighbour, only InRelease from the mirror", second.from_peers),
    );
}

/// Real packages of Debian, with maintainer scripts and dependencies, installed from neighbours alone.
#[test]
fn a_fleet_installs_real_mirror_packages() {
    let names = ["hello", "figlet", "fortune-mod", "fortunes", "manpages-dev"];
    let crowd = Crowd::debian(3, &names, &Terms { fleet: true, ..Terms::default() });
    crowd.up(true);
    for holder in [A, C] {
        crowd.start_download(holder).wait().ok();
    }
    [A, C].iter().for_each(|holder| await_fleet_told(&crowd.machines[*holder], 3));
    crowd.mirror.forget_log();
    let arguments: Vec<&str> = ["install", "-y", "-o", "APT::Keep-Downloaded-Packages=1"].into_iter().chain(names).collect();
    let finished = crowd.machines[B].apt_get(&arguments).ok();
    assert_eq!(finished.deb_gets(), Vec::<&str>::new(), "{finished}");
    assert_eq!(crowd.mirror_bytes(B), 0, "{:#?}", crowd.mirror.log());
    let from_peers = crowd.given_to(B);
    assert!(from_peers[A] > 0 && from_peers[C] > 0, "{from_peers:?}");
    let debs: Vec<String> = listed(&crowd.machines[A].archives()).into_iter().filter(|name| name.ends_with(".deb")).collect();
    assert!(debs.len() >= names.len(), "{debs:?}");
    for deb in &debs {
        assert_holds(&crowd.machines[B].archives().join(deb), &std::fs::read(crowd.machines[A].archives().join(deb)).unwrap());
    }
    assert!(crowd.machines[B].root().join("usr/bin/hello").exists() || crowd.machines[B].root().join("bin/hello").exists());
    report(
        "fleet::real_packages",
        &format!("{} real packages installed, {from_peers:?} bytes from A, B, C, none from the mirror", debs.len()),
    );
}
