//! Other programs that download with libapt: each finds what is not here in its own way.

use crate::harness::{Apt, Client, Fault, Machine, Options, Package, Stage, assert_holds, report, run};

fn two() -> Vec<Package> {
    vec![Package::new("small", "1.0", 3_000), Package::new("large", "3.0", 900_000).depends("small")]
}

fn python(machine: &Machine, program: &str) -> crate::harness::process::Finished {
    run(&mut machine.command("/usr/bin/python3", &["-c", program]))
}

/// aptitude plans with its own resolver and opens the archives itself.
#[test]
fn aptitude() {
    for apt in [Apt::Own, Apt::Trixie] {
        let stage = Stage::new(two(), &Options { apt, ..Options::default() });
        stage.machine.update();
        let preview = |stage: &Stage| run(&mut stage.machine.command("aptitude", &["-s", "-y", "install", "large"])).ok().out;
        let before = preview(&stage);
        stage.machine.up();
        assert_eq!(before, preview(&stage), "the preview counts packages as present that are not here");
        stage.mirror.forget_log();
        let finished = run(&mut stage.machine.command("aptitude", &["-y", "-d", "install", "large"])).ok();
        stage.assert_no_gets(&finished);
        stage.assert_all_here();
        report(&format!("frontends::aptitude {apt:?}"), "the preview is unchanged, 0 GETs of packages by aptitude");
    }
}

/// python3-apt reckons and fetches without the lock, as unattended-upgrades does.
#[test]
fn python_apt() {
    const RECKON: &str = "import apt; c = apt.Cache(); c['large'].mark_install(); print(c.required_download)";
    const FETCH: &str = "
import apt, apt_pkg
cache = apt.Cache()
cache['large'].mark_install()
fetcher = apt_pkg.Acquire()
sources = apt_pkg.SourceList()
sources.read_main_list()
manager = apt_pkg.PackageManager(cache._depcache)
manager.get_archives(fetcher, sources, apt_pkg.PackageRecords(cache._cache))
print([(item.complete, item.status) for item in fetcher.items])
assert fetcher.run() == apt_pkg.Acquire.RESULT_CONTINUE
assert all(item.status == item.STAT_DONE for item in fetcher.items)
print(len(fetcher.items))
";
    for apt in [Apt::Own, Apt::Trixie] {
        let stage = Stage::new(two(), &Options { apt, ..Options::default() });
        stage.machine.update();
        let before = python(&stage.machine, RECKON).ok().out;
        stage.machine.up();
        assert_eq!(before, python(&stage.machine, RECKON).ok().out, "packages count as downloaded that are not here");
        stage.mirror.forget_log();
        let finished = python(&stage.machine, FETCH).ok();
        assert!(finished.out.contains("(False, "), "an item was complete before anything was fetched: {finished}");
        assert!(finished.out.trim_end().ends_with("\n2"), "{finished}");
        stage.assert_no_gets(&finished);
        stage.assert_all_here();
        report(&format!("frontends::python_apt {apt:?}"), "the reckoned download is unchanged, 0 GETs of packages without the lock");
    }
}

/// unattended-upgrades downloads before it takes the lock, and a read error ends it with a traceback.
#[test]
fn unattended_upgrades() {
    let options = Options {
        apt: Apt::Trixie,
        apt_conf: "Unattended-Upgrade::Origins-Pattern { \"origin=test\"; };\nUnattended-Upgrade::Allowed-Origins { };\n".into(),
        ..Options::default()
    };
    let mut stage = Stage::mounted(two(), &options);
    run(&mut stage.machine.command("apt", &["install", "-y", "large"])).ok();
    stage.repo.withdraw("small");
    stage.repo.withdraw("large");
    stage.repo.add(Package::new("small", "1.1", 3_000));
    let large = stage.repo.add(Package::new("large", "3.1", 900_001).depends("small"));
    stage.repo.publish();
    stage.machine.update();
    stage.mirror.forget_log();
    let dry = run(&mut stage.machine.command("unattended-upgrade", &["--dry-run", "-d"])).ok().says("large").says("small");
    assert_eq!(stage.mirror.debs_asked_by(Client::Apt), 0, "{dry}{:#?}", stage.mirror.log());
    // Now for real; one of the two is newer than what the dry run downloaded and cannot be delivered, so apt fetches it itself.
    stage.repo.withdraw("small");
    let small = stage.repo.add(Package::new("small", "1.2", 3_000));
    stage.repo.publish();
    stage.machine.update();
    stage.mirror.fault(&small.filename, Client::Poolfs, Fault::Status(404));
    let real = run(&mut stage.machine.command("unattended-upgrade", &["-d"])).ok();
    assert!(!real.err.contains("Traceback"), "{real}");
    let asked: Vec<_> =
        stage.mirror.log().into_iter().filter(|request| request.client == Client::Apt && request.path.ends_with(".deb")).collect();
    assert_eq!(asked.iter().map(|request| request.path.trim_start_matches('/')).collect::<Vec<_>>(), [&small.filename], "{real}");
    let versions = run(&mut stage.machine.command("dpkg-query", &["-W", "-f", "${Package}=${Version} ", "small", "large"])).ok().out;
    assert_eq!(versions, "large=3.1 small=1.2 ", "{real}");
    for (name, published) in [("small", &small), ("large", &large)] {
        let want = crate::harness::repo::noise(&format!("{name} {}", published.package.version), published.package.payload_bytes);
        assert_holds(&stage.machine.root().join(format!("usr/share/{name}/payload")), &want);
    }
    report(
        "frontends::unattended_upgrades",
        &format!("dry run: 0 GETs of packages; upgrade of 2 with one undeliverable: exit 0, {} GETs by apt", asked.len()),
    );
}
