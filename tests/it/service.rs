//! Under a service manager: what it is told, what it watches, and how the journal is written.

use crate::harness::{Options, Package, Running, Stage, assert_holds, mounts, report};
use rustix::process::{Pid, Signal, kill_process};
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::net::UnixDatagram;
use std::process::Stdio;

fn packages() -> Vec<Package> {
    vec![Package::new("small", "1.0", 3_000), Package::new("large", "3.0", 900_000)]
}

fn signal(pid: u32, signal: Signal) {
    kill_process(Pid::from_raw(i32::try_from(pid).unwrap()).unwrap(), signal).unwrap();
}

/// The word of the service manager's watchdog comes from the mounts: it comes while they answer, and a daemon whose mounts hang is killed before
/// the service manager would end everything, its mounts are detached, and come back.
#[test]
fn a_daemon_that_hangs_is_replaced() {
    let stage = Stage::new(packages(), &Options::default());
    let machine = &stage.machine;
    let path = machine.scratch().join("notify");
    let manager = UnixDatagram::bind(&path).unwrap();
    // It is read all the while, as systemd does.
    let (words, heard) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let mut word = [0; 64];
        while let Ok(len) = manager.recv(&mut word) {
            if words.send(String::from_utf8_lossy(&word[..len]).into_owned()).is_err() {
                return;
            }
        }
    });
    let told = || heard.recv_timeout(crate::harness::LIMIT).expect("the service manager is told something");
    let mut command = machine.poolfs_command(&["up", "--foreground"]);
    let service = Running::start(command.env("NOTIFY_SOCKET", &path).env("WATCHDOG_USEC", "6000000"));
    // While nothing is mounted, the parent answers by itself.
    while told() != "READY=1" {}
    machine.assert_mounted();
    assert_eq!([told(), told(), told()], ["WATCHDOG=1"; 3]);
    machine.update();
    stage.download_all().ok();
    let old = machine.status().pid;
    signal(old, Signal::STOP);
    machine.await_mounted_again(old);
    assert_holds(&stage.archive(&stage.packages[1]), &stage.packages[1].bytes);
    machine.apt_get(&["install", "-y", "-d", "--reinstall", "small"]).ok();
    while told() != "READY=1" {}
    assert_eq!(told(), "WATCHDOG=1");
    let (_, said) = service.said();
    assert!(said.contains("the mounts have not answered for 4 s"), "{said}");
    machine.poolfs(&["down"]).ok();
    service.wait().ok();
    report("service", "the watchdog hears that the mounts answer; a daemon that was stopped is killed, both mounts come back");
}

/// The journal has the time and wants the level before the line; colours and times in it are noise.
#[test]
fn the_journal_is_written_as_it_wants_it() {
    let stage = Stage::new(packages(), &Options::default());
    let machine = &stage.machine;
    let log = machine.scratch().join("journal");
    let file = fs::File::create(&log).unwrap();
    let found = file.metadata().unwrap();
    let mut command = machine.poolfs_command(&["up", "--foreground"]);
    command.env("JOURNAL_STREAM", format!("{}:{}", found.dev(), found.ino())).stdin(Stdio::null()).stdout(Stdio::null()).stderr(file);
    let mut service = command.spawn().unwrap();
    mounts::await_mounts("both are mounted", |table| {
        table.iter().filter(|mount| mount.is_fuse() && mount.at.starts_with(machine.root())).count() == 2
    });
    while machine.pid().is_none() {}
    machine.update();
    // One line for each request of the kernel, with what it was, from the change of the level on.
    machine.poolfs(&["log-level", "poolfs_fs::adapter=debug,info"]).ok();
    stage.download_all().ok();
    stage.assert_all_here();
    machine.poolfs(&["log-level", "info"]).ok();
    machine.poolfs(&["down"]).ok();
    assert!(service.wait().unwrap().success());
    let text = fs::read_to_string(&log).unwrap();
    let lines: Vec<&str> = text.lines().filter(|line| !line.is_empty()).collect();
    assert!(lines.len() > 10, "{text}");
    for line in &lines {
        assert!(["<3>", "<4>", "<6>", "<7>"].iter().any(|level| line.starts_with(level)), "{line}");
        assert!(!line.contains('\u{1b}') && !line.contains("T0") && !line.contains("Z "), "{line}");
    }
    let read = lines.iter().find(|line| line.starts_with("<7>read{")).unwrap_or_else(|| panic!("no request is told of: {text}"));
    for field in ["id=", "ino=", "pid=", "fh=", "offset=", "size=", "time.busy="] {
        assert!(read.contains(field), "{field}: {read}");
    }
    let requests = lines.iter().filter(|line| line.starts_with("<7>")).count();
    let after = text.rsplit("logging info").next().unwrap();
    assert!(!after.contains("<7>"), "requests are told of after the level was set back: {after}");
    report("service::journal", &format!("{} lines with their level, {requests} requests of one apt run while asked for", lines.len()));
}
