//! What a mirror can do wrong: apt must end as it would have without poolfs.

use super::scene::{Scene, Settings};
use crate::harness::repo::SUITE;
use crate::harness::{Apt, Client, Fault, report};
use std::fs;

/// Seconds matter to none of these: shorter patience only ends the stalls sooner.
const IMPATIENT: &str = "\n[mirror]\nconnect_timeout_s = 2\nfirst_byte_timeout_s = 2\nstall_timeout_s = 2\n";

/// The fault of the mirror towards poolfs alone: apt then fetches what it needs, and nothing is to be seen of it.
fn towards_poolfs(apt: Apt) {
    let faults = [
        ("gone", Fault::Status(404)),
        ("broken", Fault::Status(500)),
        ("html", Fault::Html),
        ("wrong", Fault::Wrong(17)),
        ("short", Fault::Short(40)),
        ("truncated", Fault::Truncated(1)),
        ("long", Fault::Long(1)),
    ];
    let mut scene = Scene::new(&Settings { apt, poolfs_toml: IMPATIENT.into(), ..Settings::default() });
    scene.publish(1);
    scene.up();
    scene.update_both(&[]);
    let mut fetched_by_apt = 0;
    for (generation, (what, fault)) in (2..).zip(&faults) {
        scene.publish(generation);
        scene.mirror.fault("", Client::Poolfs, fault.clone());
        let finished = scene.update_both(&[]);
        scene.mirror.heal();
        let gets = finished.gets().len();
        assert!(gets > 1, "{what}: wrong bytes were taken: {finished}");
        fetched_by_apt += gets - 1;
        let update = scene.machine.status().last_update.unwrap();
        assert_eq!(update.indexes, 6 - u64::try_from(gets).unwrap(), "{what}: {update:?}");
    }
    report(
        &format!("lists::towards_poolfs {apt:?}"),
        &format!("exit 0 and equal lists with {} faults, {fetched_by_apt} indexes fetched by apt itself", faults.len()),
    );
}

/// An update that fails because of poolfs, where the mirror was good to apt.
#[test]
fn a_mirror_that_fails_poolfs_only_own() {
    towards_poolfs(Apt::Own);
}

/// As `a_mirror_that_fails_poolfs_only_own`, for apt 3.0.
#[test]
fn a_mirror_that_fails_poolfs_only_trixie() {
    towards_poolfs(Apt::Trixie);
}

/// A mirror that contradicts its own Release: what plain apt makes of it, exit code and lists, and no more.
#[test]
fn a_mirror_that_contradicts_its_release() {
    for fault in [Fault::Wrong(17), Fault::Status(404), Fault::Truncated(3)] {
        let mut scene = Scene::new(&Settings { poolfs_toml: IMPATIENT.into(), ..Settings::default() });
        scene.publish(1);
        scene.up();
        scene.update_both(&[]);
        scene.publish(2);
        let broken = super::scene::digest(&scene.suite_file("main/i18n/Translation-en.xz"));
        for path in [&broken, "Translation-en.xz", "Translation-en.gz", "Translation-en"] {
            scene.mirror.fault(path, None, fault.clone());
        }
        scene.run_both(&[]);
        // As soon as the mirror is right again, so is everything else.
        scene.mirror.heal();
        scene.update_both(&[]);
    }
}

/// What a Release has named that apt then refuses must not be offered, nor keep its downloads running.
fn refused_release(apt: Apt) {
    let mut scene = Scene::new(&Settings { apt, ..Settings::default() });
    scene.publish(1);
    scene.up();
    scene.update_both(&[]);
    let name = scene.machine.lists().join("partial").join(scene.list_name("main/Contents-amd64.xz"));
    let good = scene.suite_file("main/Contents-amd64.xz").len() as u64;
    assert_eq!(fs::metadata(&name).unwrap().len(), good);
    scene.publish(12_345);
    let bad = scene.suite_file("main/Contents-amd64.xz").len() as u64;
    assert_ne!(good, bad, "the test could not tell the two apart");
    let path = scene.repo.root().join("dists").join(SUITE).join("InRelease");
    let signed = fs::read_to_string(&path).unwrap();
    fs::write(&path, signed.replace("Origin: test", "Origin: liar")).unwrap();
    let finished = scene.run_both(&[]);
    assert!(finished.err.contains("BADSIG") || finished.err.contains("manipulated"), "{finished}");
    assert_eq!(fs::metadata(&name).unwrap().len(), good, "a refused Release decides what a name stands for");
    let downloads = scene.machine.status().downloads;
    assert_eq!(downloads.len(), 0, "{downloads:?}");
    // And the good one counts at once.
    fs::write(&path, signed).unwrap();
    let finished = scene.update_both(&[]);
    scene.assert_only_releases(&finished);
    assert_eq!(fs::metadata(&name).unwrap().len(), bad);
}

/// See [`refused_release`].
#[test]
fn a_release_with_a_bad_signature_own() {
    refused_release(Apt::Own);
}

/// See [`refused_release`].
#[test]
fn a_release_with_a_bad_signature_trixie() {
    refused_release(Apt::Trixie);
}
