//! Machines that get their packages from each other, found through the DHT.

use crate::harness::crowd::{Crowd, Terms, await_status};
use crate::harness::{Client, Fault, Package, report};

/// The third machine gets packages over 512 KiB from the two that have them while the mirror gives it nothing, and can say who
/// gave what. A mirror that is overloaded must not keep a machine from its updates.
#[test]
fn large_packages_come_from_other_machines() {
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
    crowd.mirror.fault(".deb", Client::Poolfs, Fault::Status(503));
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
