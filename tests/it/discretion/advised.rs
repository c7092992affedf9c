//! Advisories: by URL, and while they are still being read.

use super::{answers, await_given, restart_ahead, status, why};
use crate::harness::{LIMIT, Options, Package, Stage, report, run};
use poolfs_core::Digest;
use std::fs;
use std::io::Write as _;
use std::process::Command;
use std::time::Instant;

const NAMES_BAD: &str = "VERSION 1\nCVE-2026-0001,,a hole\n\nbad,0,S  F,1.0-1,\ngood,0,S  F,1.0,\n\n";

fn stage() -> Stage {
    Stage::new(vec![Package::new("bad", "1.0", 3_000), Package::new("good", "1.0", 3_000)], &Options::default())
}

fn advise(stage: &Stage, source: &str) {
    let config = fs::read_to_string(stage.machine.config()).unwrap();
    fs::write(stage.machine.config(), config.replace("[apt]\n", &format!("[apt]\nadvisories = [{source:?}]\n"))).unwrap();
}

/// Waits until `status` says this of the first source.
fn await_said(stage: &Stage, what: &str) {
    let begun = Instant::now();
    loop {
        let said = status(&stage.machine)["advisories"][0].clone();
        if said.as_str().is_some_and(|said| said.contains(what)) {
            return;
        }
        assert!(begun.elapsed() < LIMIT, "{what}: {said}");
    }
}

/// What a URL has is fetched, withholds, and is kept for starts without a network; what is no advisory is said to be none and does not
/// take the place of what was had.
#[test]
fn by_url() {
    let stage = stage();
    fs::write(stage.repo.root().join("advisories"), NAMES_BAD).unwrap();
    advise(&stage, &format!("{}/advisories", stage.mirror.url()));
    stage.machine.up();
    stage.machine.update();
    stage.download_all().ok();
    let [bad, good] = &stage.packages[..] else { panic!("two packages") };
    await_given(&stage.machine, &good.digest, true);
    await_given(&stage.machine, &bad.digest, false);
    assert!(why(&stage.machine, &stage.archive(bad)).contains("rule      advisory: CVE-2026-0001 names this version"));
    await_said(&stage, "advisories: 2 issues, 0 h old");

    // The next fetch is due a day later; the copy's time tells. It is an error page then.
    fs::write(stage.repo.root().join("advisories"), "<html>not here</html>").unwrap();
    stage.machine.down();
    let kept: Vec<_> = fs::read_dir(stage.machine.state_dir().join("advisories")).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert_eq!(kept.len(), 1, "{kept:?}");
    run(Command::new("touch").args(["-d", "2 days ago"]).arg(&kept[0])).ok();
    stage.machine.up();
    await_said(&stage, "2 issues, 2 d old; ");
    await_given(&stage.machine, &good.digest, true);
    await_given(&stage.machine, &bad.digest, false);

    stage.mirror.stop();
    restart_ahead(&stage.machine, 0);
    await_given(&stage.machine, &good.digest, true);
    await_given(&stage.machine, &bad.digest, false);
    report("discretion::advisories", "advisories by URL withhold, also when the URL has become an error page, and without a network");
}

/// Advisories that take long to read do not keep the mounts waiting, and nothing is given that they may name: then what they do not.
#[test]
fn large_ones_keep_nobody_waiting() {
    let stage = stage();
    // It is read as slowly as this test writes.
    let pipe = stage.machine.scratch().join("advisories");
    run(Command::new("mkfifo").arg(&pipe)).ok();
    advise(&stage, pipe.to_str().unwrap());
    stage.machine.up();
    stage.machine.update();
    stage.download_all().ok();
    let [bad, good] = &stage.packages[..] else { panic!("two packages") };
    let said = why(&stage.machine, &stage.archive(good));
    assert!(said.contains("sharing   withheld") && said.contains("advisory: perhaps an advisory that is still being read"), "{said}");
    let unknown = answers(&stage.machine, &Digest::of(b"unknown").to_string());
    for published in [bad, good] {
        assert_eq!(answers(&stage.machine, &published.digest), unknown, "{}", published.package.name);
    }
    let mut writer = fs::OpenOptions::new().write(true).open(&pipe).unwrap();
    writer.write_all(NAMES_BAD.as_bytes()).unwrap();
    drop(writer);
    await_given(&stage.machine, &good.digest, true);
    await_given(&stage.machine, &bad.digest, false);
}
