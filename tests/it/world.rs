//! The harness itself: without poolfs, its machines must behave as plain apt does, or the other tests prove nothing.

use crate::harness::crowd::{Crowd, Terms};
use crate::harness::{Apt, Client, Fault, Machine, Mirror, Options, Package, Repo, Sources, report, workspace};

fn plain(apt: Apt) {
    let home = workspace();
    let mut repo = Repo::new(home.path());
    let small = repo.add(Package::new("small", "1:1.0-1", 3_000));
    let big = repo.add(Package::new("big", "2.0", 700_000).depends("small"));
    repo.publish();
    let mirror = Mirror::new(repo.root());
    let machine = Machine::new(&Sources::Local(&repo, &mirror), &Options { apt, ..Options::default() });
    machine.update();
    let finished = machine.apt_get(&["install", "-y", "-d", "big"]).ok();
    assert_eq!(finished.deb_gets().len(), 2, "{finished}");
    assert_eq!(mirror.debs_asked_by(Client::Apt), 2);
    for published in [&small, &big] {
        assert_eq!(std::fs::read(machine.archives().join(published.archive_name())).unwrap(), published.bytes);
    }
    machine.apt_get(&["install", "-y", "big"]).ok();
    assert!(machine.root().join("usr/share/big/payload").exists());
    report(&format!("world::plain {apt:?}"), &format!("{} GETs of packages by apt without poolfs", finished.deb_gets().len()));
}

/// If apt of the machine did not fetch, verify and install from the repository of a test by itself, nothing that is seen
/// with poolfs would mean anything.
#[test]
fn own_apt_works_without_poolfs() {
    plain(Apt::Own);
}

/// The same for apt 3.0.
#[test]
fn trixie_apt_works_without_poolfs() {
    plain(Apt::Trixie);
}

/// A fault for one client must not touch the other, or a test of undeliverable ghosts would test apt's own failure.
#[test]
fn faults_hit_the_client_they_are_meant_for() {
    let home = workspace();
    let mut repo = Repo::new(home.path());
    let one = repo.add(Package::new("one", "1", 1_000));
    repo.publish();
    let mirror = Mirror::new(repo.root());
    let machine = Machine::new(&Sources::Local(&repo, &mirror), &Options::default());
    machine.update();
    mirror.fault(".deb", Client::Poolfs, Fault::Status(404));
    machine.apt_get(&["install", "-y", "-d", "one"]).ok();
    mirror.fault_times(".deb", Client::Apt, Fault::Status(404), 1);
    machine.apt_get(&["clean"]).ok();
    machine.apt_get(&["install", "-y", "-d", "one"]).failed().says("404");
    mirror.fault(".deb", None, Fault::Wrong(700));
    machine.apt_get(&["install", "-y", "-d", "one"]).failed().says("Hash Sum mismatch");
    mirror.heal();
    machine.apt_get(&["install", "-y", "-d", "one"]).ok();
    assert_eq!(std::fs::read(machine.archives().join(one.archive_name())).unwrap(), one.bytes);
}

/// Bytes could not be told by machine if the mirror saw them all as one, and nothing would be shared if they did not see
/// each other.
#[test]
fn hosts_of_a_wire_are_machines_of_their_own() {
    let crowd = Crowd::new(2, vec![Package::new("one", "1", 100_000)], &Terms::default());
    for machine in &crowd.machines {
        machine.update();
    }
    crowd.download(1);
    assert_eq!(crowd.mirror_bytes(0), 0);
    assert_eq!(crowd.mirror_bytes(1), crowd.plan_bytes());
    let neighbour = Mirror::at(crowd.hosts[1].listen(), crowd.mirror_root());
    let ask = format!("curl --fail --silent --max-time 5 --output /dev/null {}/dists/stable/InRelease", neighbour.url());
    crowd.hosts[0].run(&ask);
    assert_eq!(neighbour.bytes_to(crowd.hosts[0].address), neighbour.log()[0].body_bytes);
    crowd.hosts[1].plug(false);
    crowd.hosts[0].run(&format!("! {ask}"));
}
