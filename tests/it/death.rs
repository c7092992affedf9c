//! Ends of all kinds: afterwards plain apt works, and everything that was here is here.

use crate::harness::{Apt, Client, Fault, Gate, Options, Package, Running, Stage, assert_holds, listed, mounts, report, run};
use rustix::process::{Pid, Signal, kill_process};
use std::fs;
use std::process::Command;

fn packages() -> Vec<Package> {
    vec![Package::new("small", "1.0", 3_000), Package::new("large", "3.0", 1_700_001).depends("small")]
}

fn kill(pid: u32) {
    kill_process(Pid::from_raw(i32::try_from(pid).unwrap()).unwrap(), Signal::KILL).unwrap();
}

/// The parent of a process, from `/proc/PID/stat` (the name in it may hold anything but ends with the last bracket).
fn parent_of(pid: u32) -> u32 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    stat.rsplit_once(") ").unwrap().1.split(' ').nth(1).unwrap().parse().unwrap()
}

fn daemon_killed(apt: Apt) {
    let stage = Stage::mounted(packages(), &Options { apt, ..Options::default() });
    let gate = Gate::new();
    stage.mirror.fault("large_3.0_all.deb", Client::Poolfs, Fault::Stall(gate.clone()));
    let during = Running::start(&mut stage.machine.command("apt-get", &["install", "-y", "-d", "large"]));
    stage.mirror.await_request(Client::Poolfs, "large_3.0_all.deb");
    let old = stage.machine.status().pid;
    kill(old);
    // The item in flight may fail, and with it this run; it must end.
    let during = during.wait();
    stage.machine.await_mounted_again(old);
    gate.open();
    stage.mirror.heal();
    for directory in [stage.machine.archives(), stage.machine.lists()] {
        run(Command::new("ls").arg("-la").arg(directory)).ok();
    }
    let after = stage.machine.apt_get(&["install", "-y", "-d", "large"]).ok();
    stage.assert_all_here();
    assert_eq!(after.deb_gets(), Vec::<&str>::new(), "{after}");
    stage.machine.update();
    report(
        &format!("death::daemon_killed {apt:?}"),
        &format!("apt in flight: exit {}; mounted again by another process; the next apt: exit 0, 0 GETs of packages", during.code()),
    );
}

/// A dead mount answers every program with an error until somebody detaches it.
#[test]
fn daemon_killed_during_a_download_own() {
    daemon_killed(Apt::Own);
}

/// As `daemon_killed_during_a_download_own`, for apt 3.0.
#[test]
fn daemon_killed_during_a_download_trixie() {
    daemon_killed(Apt::Trixie);
}

/// It must come back each time, not only the first.
#[test]
fn daemon_killed_again_and_again() {
    let stage = Stage::mounted(packages(), &Options::default());
    stage.download_all().ok();
    for _ in 0..3 {
        let old = stage.machine.status().pid;
        kill(old);
        stage.machine.await_mounted_again(old);
        stage.assert_all_here();
    }
    assert_eq!(stage.machine.status().hashed, 0, "a death is no reason to hash what did not change");
}

/// In the pause before the next start nobody answers; `poolfs down` must end what would start it again all the same.
#[test]
fn down_between_a_death_and_the_next_start() {
    let stage = Stage::mounted(packages(), &Options::default());
    stage.download_all().ok();
    let first = stage.machine.status().pid;
    let parent = parent_of(first);
    kill(first);
    stage.machine.await_mounted_again(first);
    // From the second death on there is a pause.
    let second = stage.machine.status().pid;
    kill(second);
    crate::harness::machine::await_end(second);
    stage.machine.poolfs(&["down"]).ok();
    crate::harness::machine::await_end(parent);
    assert_eq!(crate::harness::process::with_argument(&stage.machine.config().to_string_lossy()), [], "a process is left");
    assert!(!mounts::mounts().iter().any(|mount| mount.is_fuse() && mount.at.starts_with(stage.machine.root())), "a mount is left");
    stage.assert_all_here();
    stage.machine.poolfs(&["down"]).failed();
}

/// With the parent gone too, nothing comes back: then plain apt must work on plain directories.
#[test]
fn parent_killed() {
    let stage = Stage::mounted(packages(), &Options::default());
    stage.download_all().ok();
    let daemon = stage.machine.status().pid;
    kill(parent_of(daemon));
    crate::harness::machine::await_end(daemon);
    mounts::await_mounts("unmounted", |all| !all.iter().any(|mount| mount.is_fuse() && mount.at.starts_with(stage.machine.root())));
    stage.assert_all_here();
    stage.machine.update();
    stage.machine.apt_get(&["install", "-y", "large"]).ok();
    // And it can be started again.
    stage.machine.up();
    stage.machine.down();
}

/// Both at once, as when the machine runs out of memory: the mounts are dead then, and the next start must cope with them.
#[test]
fn both_killed_and_started_again() {
    let stage = Stage::mounted(packages(), &Options::default());
    stage.download_all().ok();
    let daemon = stage.machine.status().pid;
    let parent = parent_of(daemon);
    for pid in [parent, daemon] {
        kill_process(Pid::from_raw(i32::try_from(pid).unwrap()).unwrap(), Signal::STOP).unwrap();
    }
    for pid in [parent, daemon] {
        kill(pid);
    }
    for pid in [parent, daemon] {
        crate::harness::machine::await_end(pid);
    }
    assert!(fs::read_dir(stage.machine.archives()).is_err(), "the mount should be dead here, or this test tests nothing");
    stage.machine.up();
    stage.assert_all_here();
    stage.machine.update();
    let status = stage.machine.status();
    assert_eq!(status.archives().files, 2 + u64::from(stage.machine.archives().join("lock").exists()), "{status:#?}");
}

/// What is left after an unmount, by whatever command, is a plain directory with the repository's bytes.
#[test]
fn unmounted_everything_is_plain() {
    for way in ["poolfs down", "umount", "umount -l"] {
        let stage = Stage::mounted(packages(), &Options::default());
        stage.download_all().ok();
        let mounted = [stage.machine.archives(), stage.machine.lists()].map(|directory| listed(&directory));
        let daemon = stage.machine.status().pid;
        if way == "poolfs down" {
            stage.machine.down();
        } else {
            for directory in [stage.machine.archives(), stage.machine.lists()] {
                let mut words = way.split(' ');
                run(Command::new(words.next().unwrap()).args(words).arg(directory)).ok();
            }
        }
        crate::harness::machine::await_end(daemon);
        let plain = [stage.machine.archives(), stage.machine.lists()].map(|directory| listed(&directory));
        assert_eq!(mounted, plain, "{way}");
        assert!(!stage.machine.archives().join("nothing").exists());
        stage.assert_all_here();
        let finished = stage.machine.apt_get(&["install", "-y", "large"]).ok();
        assert_eq!(finished.gets(), Vec::<&str>::new(), "{way}: {finished}");
        assert_eq!(crate::harness::process::with_argument(&stage.machine.config().to_string_lossy()), [], "{way}: a process is left");
        report("death::unmounted", &format!("{way}: the same names, the repository's bytes, 0 GETs by plain apt"));
    }
}

/// Hashing a big cache again at each boot would cost minutes of disk, and a wrong "unchanged" would serve rotten bytes.
#[test]
fn remount_hashes_only_what_changed() {
    let stage = Stage::mounted(packages(), &Options::default());
    stage.download_all().ok();
    stage.machine.down();
    stage.machine.up();
    stage.assert_all_here();
    stage.machine.apt_get(&["check"]).ok();
    assert_eq!(stage.machine.status().hashed, 0);
    stage.machine.down();
    // Another time, the same bytes; and a new file that nobody told it of.
    let large = stage.archive(&stage.packages[1]);
    fs::File::options().write(true).open(&large).unwrap().set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
    fs::write(stage.machine.archives().join("new.deb"), b"new").unwrap();
    stage.machine.up();
    stage.assert_all_here();
    assert_holds(&stage.machine.archives().join("new.deb"), b"new");
    assert_eq!(stage.machine.status().hashed, 2);
    report("death::remount", "0 files hashed at a remount without changes, 2 with 2 changes");
}

/// A download that a death interrupted goes on where it was.
#[test]
fn interrupted_download_is_resumed() {
    let stage = Stage::mounted(vec![Package::new("huge", "1.0", 8 << 20)], &Options::default());
    let gate = Gate::new();
    let name = stage.packages[0].archive_name();
    // The newest rule counts: the first request gets three MiB, the next ones nothing.
    stage.mirror.fault(&name, Client::Poolfs, Fault::Stall(gate.clone()));
    stage.mirror.fault_times(&name, Client::Poolfs, Fault::Short(3 << 20), 1);
    let reader = Running::start(Command::new("cat").arg(stage.archive(&stage.packages[0])));
    stage.mirror.await_log("a second request", |log| log.iter().filter(|request| request.path.ends_with(".deb")).count() >= 2);
    let old = stage.machine.status().pid;
    kill(old);
    drop(reader.wait());
    stage.machine.await_mounted_again(old);
    stage.mirror.heal();
    gate.open();
    stage.mirror.forget_log();
    stage.download_all().ok();
    stage.assert_all_here();
    let sent: u64 = stage.mirror.log().iter().map(|request| request.body_bytes).sum();
    let whole = stage.packages[0].bytes.len() as u64;
    assert!(sent < whole, "{sent} of {whole} bytes came again though the first were here: {:#?}", stage.mirror.log());
    report("death::resume", &format!("after a kill -9 at 3 MiB of {whole} bytes, {sent} bytes were fetched"));
}

/// The machine's clock is set a year ahead, two years back and right again under a running daemon: apt notices nothing, nothing is
/// lost and nothing is called wrong. Only the daemon's clock jumps, by libfaketime.
#[test]
fn the_clock_jumps() {
    let names = ["ant", "bee", "cat", "dog"];
    let packages = names.iter().map(|name| Package::new(name, "1.0", 300_000)).collect();
    let stage = Stage::new(packages, &Options::default());
    let clock = stage.machine.scratch().join("clock");
    let libraries = run(Command::new("dpkg").args(["-L", "libfaketime"])).ok().out;
    let library = libraries.lines().find(|path| path.ends_with("/libfaketimeMT.so.1")).expect("scripts/test-deps installs it");
    let set = |text: &str| {
        // As one: the daemon reads it at any moment.
        let next = clock.with_extension("next");
        fs::write(&next, text).unwrap();
        fs::rename(next, &clock).unwrap();
    };
    set("+0");
    let mut up = stage.machine.poolfs_command(&["up"]);
    up.env("LD_PRELOAD", library)
        .env("FAKETIME_TIMESTAMP_FILE", &clock)
        .env("FAKETIME_NO_CACHE", "1")
        .env("FAKETIME_DONT_FAKE_MONOTONIC", "1");
    run(&mut up).ok();
    stage.machine.assert_mounted();
    let pid = stage.machine.status().pid;
    stage.machine.update();
    for (name, at) in names.iter().zip(["+0", "+365d", "-730d", "+0"]) {
        set(at);
        stage.machine.update();
        let finished = stage.machine.apt_get(&["install", "-y", "-d", name]).ok();
        assert_eq!(finished.deb_gets(), Vec::<&str>::new(), "{at}: {finished}");
        fs::write(stage.machine.archives().join(format!("{name}.txt")), at).unwrap();
    }
    stage.assert_all_here();
    for (name, at) in names.iter().zip(["+0", "+365d", "-730d", "+0"]) {
        assert_holds(&stage.machine.archives().join(format!("{name}.txt")), at.as_bytes());
    }
    let verified = stage.machine.poolfs(&["verify"]).ok();
    let status = stage.machine.status();
    assert_eq!((status.pid, status.archives().damaged, status.problems.clone()), (pid, 0, Vec::new()), "{verified}");
    // It was the daemon's clock.
    let (log, year) = (stage.machine.log(), this_year());
    let lines = |this: bool| log.lines().filter(|line| line.contains(" INFO ") && line.starts_with(&year) == this).count();
    assert!(lines(true) > 0 && lines(false) > 0, "{log}");
}

/// As the log's lines begin.
fn this_year() -> String {
    run(Command::new("date").args(["-u", "+%Y-"])).ok().out.trim().to_owned()
}
