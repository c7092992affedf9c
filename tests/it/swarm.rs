//! Machines that get their packages from each other, found through the DHT.

use crate::harness::crowd::{Crowd, Terms, await_fleet_told, await_status, kill_daemon};
use crate::harness::{Client, Fault, Package, report};

/// Two of three machines, strangers to each other, have two packages over 512 KiB and announce them.
fn two_have_it() -> Crowd {
    let packages = vec![Package::new("large", "1.0", 3_000_000), Package::new("larger", "1.0", 5_000_000)];
    let crowd = Crowd::new(3, packages, &Terms::default());
    crowd.up(false);
    for machine in [0, 1] {
        crowd.download(machine);
        await_status(&crowd.machines[machine], "announces both", |status| {
            status.node.as_ref().is_some_and(|node| node.announced_keys == 2)
        });
    }
    crowd.mirror.forget_log();
    crowd
}

/// The third machine gets packages over 512 KiB from the two that have them while the mirror gives it nothing, and can say who
/// gave what. A mirror that is overloaded must not keep a machine from its updates.
#[test]
fn large_packages_come_from_other_machines() {
    let crowd = two_have_it();
    crowd.mirror.fault(".deb", Client::Poolfs, Fault::Status(503));
    // Slow enough that whoever is found second still has something to give.
    crowd.hosts[0].shape(40);
    crowd.hosts[1].shape(40);
    let finished = crowd.download(2);
    assert_eq!(finished.deb_gets().len(), 0, "apt asked the mirror itself: {finished}");
    let given = crowd.given_to(2);
    assert!(given[0] > 0 && given[1] > 0, "both gave: {given:?}");
    assert!(given.iter().sum::<u64>() >= crowd.plan_bytes(), "{given:?}");
    assert_eq!(crowd.mirror.log().iter().filter(|request| request.path.ends_with(".deb") && request.body_bytes > 1000).count(), 0);
    assert!(crowd.machines[2].status().bytes.peer >= crowd.plan_bytes());

    let archive = crowd.machines[2].archives().join(crowd.packages[1].archive_name());
    let why = crowd.machines[2].poolfs(&["why", archive.to_str().unwrap()]).ok();
    assert!(why.out.contains(&crowd.packages[1].digest) && why.out.contains("source    peer"), "{why}");
    for host in [0, 1] {
        assert!(why.out.contains(&format!("{}:", crowd.hosts[host].address)), "{why}");
    }
    report("swarm", &format!("the third machine got {} bytes from the others: {given:?}", crowd.plan_bytes()));
}

/// A stranger that is killed while it gives costs nothing but its share, also when the mirror gives nothing meanwhile.
#[test]
fn a_stranger_dies_in_the_middle() {
    let crowd = two_have_it();
    crowd.mirror.fault(".deb", Client::Poolfs, Fault::Status(503));
    crowd.hosts[0].shape(20);
    crowd.hosts[1].shape(20);
    let download = crowd.start_download(2);
    await_status(&crowd.machines[2], "has bytes from peers", |status| status.bytes.peer > 500_000);
    kill_daemon(&crowd.machines[0]);
    crowd.hosts[0].plug(false);
    let finished = download.wait().ok();
    crowd.assert_all_here(2);
    assert_eq!(finished.deb_gets(), Vec::<&str>::new(), "apt asked the mirror itself: {finished}");
    assert_eq!(crowd.convicted_by(2), Vec::<usize>::new(), "who dies has not lied");
    report("swarm", &format!("a stranger was killed in the middle: apt: exit 0, {:?} bytes from each", crowd.given_to(2)));
}

/// With both strangers gone, whom the DHT still names, the mirror is what it always was.
#[test]
fn both_strangers_gone() {
    let crowd = two_have_it();
    for gone in [0, 1] {
        kill_daemon(&crowd.machines[gone]);
        crowd.hosts[gone].plug(false);
    }
    crowd.download(2);
    assert_eq!(crowd.machines[2].status().bytes.peer, 0);
    assert!(crowd.mirror_bytes(2) >= crowd.plan_bytes(), "{:#?}", crowd.mirror.log());
    report("swarm", &format!("both strangers gone: apt: exit 0, {} bytes from the mirror", crowd.mirror_bytes(2)));
}

/// In a fleet the second and the third machine get every byte from machines that have it: the mirror gives one copy in all, of
/// small packages too.
#[test]
fn a_fleet_costs_the_mirror_one_copy() {
    let packages =
        vec![Package::new("small", "1.0", 3_000), Package::new("large", "1.0", 3_000_000), Package::new("larger", "1.0", 5_000_000)];
    let crowd = Crowd::new(3, packages, &Terms { fleet: true, ..Terms::default() });
    crowd.up(true);
    crowd.download(0);
    assert_eq!(crowd.given_to(0).iter().sum::<u64>(), 0, "nobody else had anything");
    for machine in [1, 2] {
        let finished = crowd.download(machine);
        assert_eq!(finished.deb_gets().len(), 0, "apt asked the mirror itself: {finished}");
        assert_eq!(crowd.mirror_bytes(machine), 0, "machine {machine} asked the mirror for what others have");
        assert!(crowd.given_to(machine).iter().sum::<u64>() >= crowd.plan_bytes());
    }
    let given = crowd.given_to(2);
    assert!(given[0] > 0 && given[1] > 0, "the third got from both: {given:?}");
    report("swarm", &format!("a fleet of three: the third machine got {given:?} bytes from the others, 0 from the mirror"));
}

/// Twelve small packages and a large one by four machines at the same time: hardly more than one copy from the mirror, and every
/// byte right on each of them.
#[test]
fn four_machines_one_copy() {
    let small = (0..12).map(|nth| Package::new(&format!("small{nth}"), "1.0", 20_000 + nth * 9_000));
    let packages = small.chain([Package::new("large", "1.0", 6_000_000)]).collect();
    let crowd = Crowd::new(4, packages, &Terms { fleet: true, ..Terms::default() });
    crowd.up(true);
    let running: Vec<_> = (0..4).map(|machine| crowd.start_download(machine)).collect();
    for (machine, running) in running.into_iter().enumerate() {
        running.wait().ok();
        crowd.assert_all_here(machine);
    }
    let from_mirror: Vec<u64> = (0..4).map(|machine| crowd.mirror_bytes(machine)).collect();
    #[allow(clippy::cast_precision_loss, reason = "a ratio for people")]
    let copies = from_mirror.iter().sum::<u64>() as f64 / crowd.plan_bytes() as f64;
    report("fleet", &format!("four machines, {} bytes: {copies:.3} copies from the mirror {from_mirror:?}", crowd.plan_bytes()));
    assert!(copies <= 1.1, "{copies} copies: {from_mirror:?} of {}", crowd.plan_bytes());
}

/// What two machines have the third gets from them alone, small packages too; then one of the two is gone, and it is the same.
#[test]
fn what_members_have_costs_the_mirror_nothing() {
    let packages = vec![Package::new("small", "1.0", 60_000), Package::new("large", "1.0", 4_000_000)];
    let crowd = Crowd::new(4, packages, &Terms { fleet: true, ..Terms::default() });
    crowd.up(true);
    for machine in [0, 1] {
        crowd.download(machine);
    }
    crowd.mirror.forget_log();
    [0, 1].iter().for_each(|machine| await_fleet_told(&crowd.machines[*machine], 4));
    crowd.download(2);
    assert_eq!(crowd.mirror_bytes(2), 0);
    let given = crowd.given_to(2);
    assert!(given.iter().sum::<u64>() >= crowd.plan_bytes(), "{given:?}");
    crowd.machines[0].poolfs(&["down"]).ok();
    [1, 2].iter().for_each(|machine| await_fleet_told(&crowd.machines[*machine], 3));
    await_status(&crowd.machines[3], "knows that one has left", |status| status.fleet_members == 3);
    crowd.download(3);
    assert_eq!(crowd.mirror_bytes(3), 0);
    await_status(&crowd.machines[3], "took it from members", |status| status.bytes.peer >= crowd.plan_bytes());
}
