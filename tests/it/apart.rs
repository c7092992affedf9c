//! The network process: what it may do, and what becomes of the mounts when it is killed, stopped, or follows no rule.

use crate::harness::machine::{Status, await_end};
use crate::harness::{Client, Fault, Gate, LIMIT, Machine, Options, Package, Running, Stage, report, run};
use rustix::process::{Pid, Signal, kill_process};
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

fn packages() -> Vec<Package> {
    vec![Package::new("small", "1.0", 3_000), Package::new("large", "3.0", 1_700_001).depends("small")]
}

/// The process of the machine that talks to the network.
fn network_process(machine: &Machine) -> Option<u32> {
    let dir = machine.state_dir().join("net");
    crate::harness::process::with_argument(&dir.to_string_lossy()).first().map(|pid| pid.as_raw_pid().cast_unsigned())
}

#[track_caller]
fn running(machine: &Machine) -> u32 {
    network_process(machine).expect("the network process runs")
}

fn signal(pid: u32, signal: Signal) {
    kill_process(Pid::from_raw(pid.cast_signed()).unwrap(), signal).unwrap();
}

/// Asks for the status until it is as `wanted`.
#[track_caller]
fn await_status(machine: &Machine, what: &str, wanted: impl Fn(&Status) -> bool) -> Status {
    let deadline = Instant::now() + LIMIT;
    loop {
        let status = machine.status();
        if wanted(&status) {
            return status;
        }
        assert!(Instant::now() < deadline, "{what}: {status:#?}");
        // The daemon has no event for the state of another process.
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn fault(status: &Status) -> Option<&str> {
    status.problems.iter().map(String::as_str).find(|problem| problem.contains("network process"))
}

/// The lines of `/proc/PID/status` by name.
fn fields(pid: u32) -> BTreeMap<String, String> {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let fields = text.lines().filter_map(|line| line.split_once(':'));
    fields.map(|(name, value)| (name.to_owned(), value.split_whitespace().collect::<Vec<_>>().join(" "))).collect()
}

/// What the descriptors of a process lead to, and whether each may write.
fn descriptors(pid: u32) -> Vec<(PathBuf, bool)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten() {
        let Ok(path) = fs::read_link(entry.path()) else { continue };
        let Ok(info) = fs::read_to_string(format!("/proc/{pid}/fdinfo/{}", entry.file_name().to_string_lossy())) else { continue };
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:")).unwrap().trim();
        let writes = u32::from_str_radix(flags, 8).unwrap() & 0b11 != 0;
        found.push((path, writes));
    }
    found
}

/// The mounts answer, with names and with bytes that are here.
#[track_caller]
fn assert_mounts_answer(stage: &Stage, here: &[&str]) {
    for directory in [stage.machine.archives(), stage.machine.lists()] {
        run(Command::new("ls").arg("-la").arg(directory)).ok();
    }
    for published in stage.packages.iter().filter(|published| here.contains(&published.package.name.as_str())) {
        crate::harness::forget_pages(&stage.archive(published));
        crate::harness::assert_holds(&stage.archive(published), &published.bytes);
    }
}

/// Whatever a stranger makes of the network process, it must not be root's, and must not reach apt's files.
#[test]
fn it_has_no_privileges() {
    let stage = Stage::mounted(packages(), &Options::default());
    let gate = Gate::new();
    stage.mirror.fault("large_3.0_all.deb", Client::Poolfs, Fault::StallBody(gate.clone()));
    let reader = Running::start(Command::new("cat").arg(stage.archive(&stage.packages[1])));
    stage.mirror.await_request(Client::Poolfs, "large_3.0_all.deb");
    let (daemon, network) = (stage.machine.status().pid, running(&stage.machine));
    let seen = fields(network);
    let user = fs::read_to_string("/etc/passwd")
        .unwrap()
        .lines()
        .find_map(|line| line.strip_prefix("poolfs:")?.split(':').nth(1).map(str::to_owned));
    let user = user.unwrap_or_else(|| "65529".to_owned());
    assert_eq!(seen["Uid"], [user.as_str(); 4].join(" "));
    assert_ne!(seen["Gid"].split(' ').next(), Some("0"), "{seen:?}");
    assert_eq!(seen["Groups"], "");
    for capabilities in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(seen[capabilities], "0000000000000000", "{capabilities}");
    }
    assert_eq!((seen["NoNewPrivs"].as_str(), seen["Seccomp"].as_str()), ("1", "2"));
    assert_eq!(fields(daemon)["Seccomp"], "2", "the process of the mounts has no network");
    let (root, own) = (stage.machine.root(), stage.machine.state_dir().join("net"));
    let open = descriptors(network);
    assert!(open.iter().any(|(path, _)| path.starts_with(&own)), "its database: {open:?}");
    for (path, writes) in &open {
        let foreign = path.starts_with(root) || path.starts_with(stage.machine.state_dir()) && !path.starts_with(&own);
        assert!(!(foreign && *writes), "it could write to {}: {open:?}", path.display());
        assert!(!path.ends_with("poolfs.db") && !path.ends_with("fuse"), "{open:?}");
    }
    let arriving = open.iter().filter(|(path, _)| path.starts_with(stage.machine.cache_dir())).count();
    assert!(arriving > 0, "it reads what is here of the download: {open:?}");
    let of_daemon = descriptors(daemon);
    assert!(!of_daemon.iter().any(|(path, _)| path.starts_with(&own)), "{of_daemon:?}");
    gate.open();
    reader.wait().ok();
    report(
        "apart::privileges",
        &format!("uid {user}, no capabilities, no_new_privs, seccomp; {} descriptors, none writable outside of its directory", open.len()),
    );
}

/// A descriptor for each piece that is left open would end a daemon after a few packages.
#[test]
fn no_descriptor_is_left() {
    let count = 24;
    let packages = (0..count).map(|at| Package::new(&format!("p{at}"), "1.0", 300_000 + at * 20_000)).collect();
    let stage = Stage::mounted(packages, &Options::default());
    stage.download_all().ok();
    stage.assert_all_here();
    let (daemon, network) = (stage.machine.status().pid, running(&stage.machine));
    let left = |pid: u32| {
        let of_files =
            |path: &Path| path.to_string_lossy().contains("memfd:") || path.starts_with(stage.machine.cache_dir().join("incoming"));
        descriptors(pid).into_iter().map(|(path, _)| path).filter(|path| of_files(path)).collect::<Vec<_>>()
    };
    // The end of a download is told before the last descriptors are closed.
    let deadline = Instant::now() + LIMIT;
    while !(left(daemon).is_empty() && left(network).is_empty()) {
        // The directory itself stays open.
        if left(network).is_empty() && left(daemon).iter().all(|path| path.ends_with("incoming")) {
            break;
        }
        assert!(Instant::now() < deadline, "daemon: {:?}, network: {:?}", left(daemon), left(network));
        // No event tells of another process's descriptors.
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// The download under way goes on with the next process, from what is here; nothing else happens.
#[test]
fn killed() {
    let stage = Stage::mounted(packages(), &Options::default());
    stage.machine.apt_get(&["install", "-y", "-d", "small"]).ok();
    stage.mirror.forget_log();
    let gate = Gate::new();
    stage.mirror.fault("large_3.0_all.deb", Client::Poolfs, Fault::Stall(gate.clone()));
    let during = Running::start(&mut stage.machine.command("apt-get", &["install", "-y", "-d", "large"]));
    stage.mirror.await_request(Client::Poolfs, "large_3.0_all.deb");
    let (daemon, network) = (stage.machine.status().pid, running(&stage.machine));
    stage.mirror.heal();
    signal(network, Signal::KILL);
    await_end(network);
    assert_mounts_answer(&stage, &["small"]);
    let during = during.wait().ok();
    gate.open();
    stage.assert_all_here();
    assert_eq!(during.deb_gets(), Vec::<&str>::new(), "the next process has fetched it: {during}");
    let status = await_status(&stage.machine, "another process runs", |status| status.node.is_some());
    assert_eq!(status.pid, daemon, "the process of the mounts is the same");
    let said = fault(&status).expect("the status names the fault");
    assert!(
        said.starts_with("the network process was lost (it ended: signal: 9 (SIGKILL))") && said.contains("it runs again for"),
        "{said}"
    );
    assert_eq!(stage.machine.log().matches("ERROR").count(), 1, "one line in the log: {}", stage.machine.log());
    assert!(stage.machine.log().contains("the network process was lost (it ended: signal: 9 (SIGKILL))"));
    report("apart::killed", "kill -9 in a download: the next process fetched the rest, apt exit 0 with 0 GETs of its own");
}

/// It dies again and again: downloads fail at once then, and apt fetches by itself.
#[test]
fn killed_again_and_again() {
    let stage = Stage::mounted(packages(), &Options::default());
    let daemon = stage.machine.status().pid;
    for _ in 0..3 {
        // Between two processes there is a pause.
        let deadline = Instant::now() + LIMIT;
        let network = loop {
            if let Some(network) = network_process(&stage.machine) {
                break network;
            }
            assert!(Instant::now() < deadline, "it was not started again");
            // No event tells that another process has a child.
            std::thread::sleep(Duration::from_millis(20));
        };
        signal(network, Signal::KILL);
        await_end(network);
        assert_mounts_answer(&stage, &[]);
    }
    stage.download_all().ok();
    stage.assert_all_here();
    let status = await_status(&stage.machine, "it runs at last", |status| status.node.is_some());
    assert_eq!(status.pid, daemon);
    assert!(fault(&status).is_some_and(|said| said.contains("times in a row")), "{status:#?}");
}

/// A process that hangs must hang nobody else: it is ended, and its successor does the work, or apt does.
#[test]
fn stopped() {
    let stage = Stage::mounted(packages(), &Options::default());
    stage.machine.apt_get(&["install", "-y", "-d", "small"]).ok();
    let network = running(&stage.machine);
    signal(network, Signal::STOP);
    assert_mounts_answer(&stage, &["small"]);
    let status = stage.machine.status();
    assert!(fault(&status).is_some(), "the status names the fault: {status:#?}");
    stage.download_all().ok();
    stage.assert_all_here();
    await_end(network);
    let said =
        await_status(&stage.machine, "it was ended", |status| fault(status).is_some_and(|said| said.contains("it said nothing for 12 s")));
    report("apart::stopped", &format!("SIGSTOP: mounts answered, apt exit 0; status: {}", fault(&said).unwrap()));
}

/// A network process that was taken over can send what it likes.
#[test]
fn replaced_by_one_that_sends_garbage() {
    for (name, script, says) in [
        ("no protocol", "printf 'GET / HTTP/1.1\\r\\n\\r\\n' >&0; exec sleep 1000", "it sent garbage: a packet of no known kind"),
        ("no message", "printf '\\000{\"started\":7}' >&0; exec sleep 1000", "it sent garbage: no message"),
        (
            "too long",
            "exec 3>&0; head -c 100000 /dev/zero | dd bs=100000 iflag=fullblock status=none >&3; exec sleep 1000",
            "it sent garbage: a packet that is too long",
        ),
        ("out of turn", "printf '\\000{\"pong\":1}' >&0; exec sleep 1000", "it sent garbage: it does not say first that it has started"),
        (
            "for nothing",
            "printf '\\000\"started\"' >&0; printf '\\000{\"delivery\":{\"id\":99,\"what\":\"done\"}}' >&0; exec sleep 1000",
            "it sent garbage: a delivery for nothing",
        ),
        ("gone at once", "exit 3", "it ended: exit status: 3"),
    ] {
        let stage = Stage::new(packages(), &Options::default());
        let program = stage.machine.scratch().join("program");
        fs::write(&program, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        run(stage.machine.poolfs_command(&["up"]).env("POOLFS_TEST_NET_PROGRAM", &program)).ok();
        let daemon = stage.machine.status().pid;
        stage.machine.update();
        assert_mounts_answer(&stage, &[]);
        let apt = stage.download_all().ok();
        stage.assert_all_here();
        assert!(apt.deb_gets().len() == 2, "{name}: apt fetches by itself: {apt}");
        let status = stage.machine.status();
        assert_eq!(status.pid, daemon, "{name}");
        let said = fault(&status).unwrap_or_default();
        assert!(said.contains(says), "{name}: {status:#?}");
        assert!(stage.machine.log().contains(says), "{name}: {}", stage.machine.log());
        stage.machine.down();
        report("apart::garbage", &format!("{name}: apt exit 0; status: {said}"));
    }
}
