//! `poolfs doctor`: each staged fault is found, and its remedy, run as it is printed, mends it.

use crate::harness::crowd::{Crowd, Terms};
use crate::harness::process::Finished;
use crate::harness::{Covered, Fault, Machine, Options, Package, Running, Stage, mounts, report, run};
use rustix::mount::{MountFlags, UnmountFlags, mount, mount_bind, mount_move, unmount};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;

fn doctor(machine: &Machine) -> Vec<Value> {
    let finished = machine.poolfs(&["doctor", "--json"]);
    let found: Vec<Value> = serde_json::from_str(finished.out.trim()).unwrap_or_else(|error| panic!("{error}: {finished}"));
    assert_eq!(finished.code(), if found.is_empty() { 0 } else { 2 }, "{finished}");
    found
}

/// A remedy, by `sh` with this build's `poolfs` in its path.
fn remedy(finding: &Value) -> Finished {
    let home = Path::new(env!("CARGO_BIN_EXE_poolfs")).parent().unwrap();
    let path = format!("{}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", home.display());
    run(Command::new("sh").arg("-c").arg(finding["remedy"].as_str().unwrap()).env("PATH", path).current_dir("/"))
}

/// Fails unless exactly one thing is wrong, which is about `about` and says `text`; then its remedy must leave nothing wrong.
#[track_caller]
fn mends(machine: &Machine, about: &str, text: &str) {
    let found = doctor(machine);
    assert!(found.len() == 1 && found[0]["about"] == about, "wanted one about {about}: {found:#?}");
    assert!(found[0]["problem"].as_str().unwrap().contains(text), "{text:?}: {found:#?}");
    remedy(&found[0]).ok();
    let left = doctor(machine);
    assert!(left.is_empty(), "{:?} left {left:#?}", found[0]["remedy"]);
    report("doctor", &format!("{about}: {}: {}", found[0]["problem"], found[0]["remedy"]));
}

fn packages() -> Vec<Package> {
    vec![Package::new("one", "1.0", 3_000), Package::new("two", "1.0", 9 << 20)]
}

fn edit(path: &Path, edit: impl FnOnce(String) -> String) {
    let text = fs::read_to_string(path).unwrap();
    let edited = edit(text.clone());
    assert_ne!(text, edited, "the edit found nothing to change");
    fs::write(path, edited).unwrap();
}

/// An `/etc` and an `/sbin` of this test's own, in its mount namespace.
fn own_etc_and_sbin(machine: &Machine) {
    for (at, name) in [("/etc", "etc"), ("/usr/sbin", "sbin")] {
        let (upper, work) = (machine.scratch().join(name), machine.scratch().join(format!("{name}-work")));
        fs::create_dir_all(&upper).unwrap();
        fs::create_dir_all(&work).unwrap();
        let data = format!("lowerdir={at},upperdir={},workdir={}", upper.display(), work.display());
        let data = std::ffi::CString::new(data).unwrap();
        mount("overlay", at, "overlay", MountFlags::empty(), Some(data.as_c_str())).unwrap();
    }
}

/// Faults of the files around it, with a daemon that serves all the while.
#[test]
fn faults_of_files() {
    let stage = Stage::mounted(packages(), &Options::default());
    let machine = &stage.machine;
    own_etc_and_sbin(machine);
    fs::write("/etc/fstab", "").unwrap();
    assert_eq!(doctor(machine), Vec::<Value>::new(), "nothing is wrong yet");
    machine.poolfs(&["doctor"]).ok().says("nothing is wrong");
    // 1, 2: the configuration.
    edit(&machine.config(), |text| text.replacen("[apt]", "[fs]\nthread = 3\n[apt]", 1));
    mends(machine, "config", "did you mean `threads`?");
    edit(&machine.config(), |text| text + "\n[log]\nlevel = \"a=b=c\"\n");
    mends(machine, "config", "write error, warn, info, debug or trace");
    // 3: apt's own configuration. apt of the whole machine is none of this test's.
    edit(&machine.config(), |text| text.replacen("apt.conf\"", "gone.conf\"", 1));
    let found = doctor(machine);
    assert_eq!((found.len(), found[0]["about"].as_str().unwrap()), (1, "apt"), "{found:#?}");
    remedy(&found[0]).ok();
    let text = fs::read_to_string(machine.config()).unwrap();
    assert!(text.contains("#config = "), "{text}");
    edit(&machine.config(), |text| text.replacen("#config = ", "config = ", 1).replacen("gone.conf", "apt.conf", 1));
    // 4: another directory than apt's. The daemon goes on with the right one.
    let (right, wrong) = (machine.archives(), machine.root().join("elsewhere"));
    fs::create_dir_all(wrong.join("partial")).unwrap();
    edit(&machine.config(), |text| text.replacen(&format!("{right:?}"), &format!("{wrong:?}"), 1));
    mends(machine, "apt", "but apt uses");
    // 5, 6: the fleet's key, which the daemon reads at its start only.
    let key = machine.scratch().join("fleet key");
    edit(&machine.config(), |text| text + &format!("\n[fleet]\nkey_file = {key:?}\n"));
    mends(machine, "fleet", "this machine is of no fleet");
    assert_eq!(fs::read(&key).unwrap().len(), 32);
    fs::set_permissions(&key, fs::Permissions::from_mode(0o644)).unwrap();
    mends(machine, "fleet", "others than root can read");
    // 7: poolfs's own directories.
    fs::set_permissions(machine.state_dir(), fs::Permissions::from_mode(0o777)).unwrap();
    mends(machine, "directories", "can be written by others than root");
    // 8: what apt needs and somebody removed.
    fs::remove_dir(machine.archives().join("partial")).unwrap();
    mends(machine, "directories", "partial is not there");
    // 9 to 14: fstab.
    let order = "x-systemd.before=apt-daily.service,x-systemd.before=apt-daily-upgrade.service";
    let line = |role: &str, options: &str| format!("# a comment\n{role} /var/lib/apt/lists poolfs {options} 0 0\n");
    let fstab = |text: String| fs::write("/etc/fstab", text).unwrap();
    fstab(line("lists", &format!("nofail,{order}")));
    mends(machine, "fstab", "/sbin/mount.poolfs is missing");
    fstab(line("list", &format!("nofail,{order}")));
    mends(machine, "fstab", "/etc/fstab:2: `list` is not a role");
    fstab(line("lists", &format!("nofail,sl*th&.|,{order}")));
    mends(machine, "fstab", "unknown mount option `sl*th&.|`");
    fstab(line("lists", &format!("_netdev,nofail,{order}")));
    mends(machine, "fstab", "_netdev");
    fstab(line("lists", order));
    mends(machine, "fstab", "without `nofail`");
    fstab(line("lists", "nofail"));
    mends(machine, "fstab", "apt's own timers");
    assert_eq!(fs::read_to_string("/etc/fstab").unwrap(), line("lists", &format!("nofail,{order}")));
    // 15: an apt that was stopped with the lock in its hand.
    let hold = "import fcntl, os, signal, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print('held', flush=True); os.kill(os.getpid(), signal.SIGSTOP)";
    let holder = Running::start(Command::new("/usr/bin/python3").args(["-c", hold]).arg(machine.archives().join("lock")));
    let pid = Pid::from_raw(i32::try_from(holder.id()).unwrap()).unwrap();
    rustix::process::waitpid(Some(pid), rustix::process::WaitOptions::UNTRACED).unwrap();
    mends_stopped(machine, holder);
    // The clock can be set by nobody but the machine's owner: found, and not mended here.
    let mut lists = fs::read_dir(machine.lists()).unwrap().flatten().map(|entry| entry.path());
    let release = lists.find(|path| path.to_string_lossy().ends_with("InRelease")).unwrap();
    drop(lists);
    run(Command::new("touch").args(["-d", "+2 days"]).arg(release)).ok();
    let found = doctor(machine);
    assert_eq!(found.len(), 1, "{found:#?}");
    assert_eq!((&found[0]["about"], &found[0]["remedy"]), (&Value::from("clock"), &Value::from("timedatectl set-ntp true")));
    edit(&machine.config(), |text| text.replace("[fleet]", "#").replace("key_file", "#"));
    machine.down();
}

fn mends_stopped(machine: &Machine, holder: Running) {
    let found = doctor(machine);
    assert!(found.len() == 1 && found[0]["about"] == "locks", "{found:#?}");
    remedy(&found[0]).ok();
    holder.wait().ok();
    assert_eq!(doctor(machine), Vec::<Value>::new());
    report("doctor", &format!("locks: {}: {}", found[0]["problem"], found[0]["remedy"]));
}

/// Faults that keep a daemon from running, or that it has.
#[test]
fn faults_of_the_daemon() {
    let stage = Stage::new(packages(), &Options::default());
    let machine = &stage.machine;
    own_etc_and_sbin(machine);
    fs::write("/etc/fstab", "").unwrap();
    machine.update();
    // 16: nothing runs.
    mends(machine, "daemon", "no daemon runs");
    machine.assert_mounted();
    // 17: one directory was unmounted.
    run(Command::new("umount").arg(machine.lists())).ok();
    mounts::await_mounts("lists are unmounted", |_| mounts::at(&machine.lists()).is_empty());
    machine.poolfs(&["status"]).ok();
    mends(machine, "mounts", "is not mounted, though the daemon runs");
    machine.assert_mounted();
    // 18: rot that nobody could mend then.
    machine.down();
    let covered = Covered::open(&machine.archives());
    machine.up();
    stage.download_all().ok();
    covered.flip(&stage.packages[1].archive_name(), 5_000_000);
    stage.mirror.fault(".deb", None, Fault::Status(404));
    machine.poolfs(&["verify", "--repair"]).failed();
    stage.mirror.heal();
    mends(machine, "mounts", "1 files below");
    stage.assert_all_here();
    // 19: a full disk, with what could go.
    machine.down();
    mount("tmpfs", machine.cache_dir(), "tmpfs", MountFlags::empty(), Some(c"size=68m,mode=755")).unwrap();
    machine.up();
    stage.download_all().ok();
    machine.apt_get(&["clean"]).ok();
    mends(machine, "disk", "MiB are free on the file system of");
    machine.down();
    unmount(machine.cache_dir(), UnmountFlags::DETACH).unwrap();
    // 20: the port is another program's.
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let _udp = std::net::UdpSocket::bind(taken.local_addr().unwrap()).unwrap();
    edit(&machine.config(), |text| text.replacen("\"127.0.0.1:0\"", &format!("\"{}\"", taken.local_addr().unwrap()), 1));
    machine.up();
    mends(machine, "network", "nothing listens at");
    // 21: a mount whose daemon is dead, and nobody who starts it again. Two things are wrong, one after the other.
    let daemon = machine.status().pid;
    let supervisor: u32 = fs::read_to_string(machine.socket().with_extension("pid")).unwrap().trim().parse().unwrap();
    let pids = [supervisor, daemon].map(|pid| Pid::from_raw(i32::try_from(pid).unwrap()).unwrap());
    for signal in [Signal::STOP, Signal::KILL] {
        pids.iter().for_each(|pid| kill_process(*pid, signal).unwrap());
    }
    crate::harness::machine::await_end(supervisor);
    crate::harness::machine::await_end(daemon);
    let found = doctor(machine);
    let dead: Vec<_> = found.iter().filter(|finding| finding["problem"].as_str().unwrap().contains("whose daemon is dead")).collect();
    assert_eq!(dead.len(), 2, "{found:#?}");
    for finding in dead {
        remedy(finding).ok();
    }
    mends(machine, "daemon", "no daemon runs");
    machine.down();
    // 22: no lists.
    fs::remove_dir_all(machine.lists()).unwrap();
    fs::create_dir_all(machine.lists().join("partial")).unwrap();
    machine.up();
    mends(machine, "apt", "no lists are in");
    machine.down();
    // 23: files in the way, 24: no directory, each beside the daemon that cannot run.
    fs::rename(machine.cache_dir(), machine.scratch().join("cache")).unwrap();
    fs::write(machine.cache_dir(), "").unwrap();
    mends_first(machine, "directories", "is in the way");
    fs::remove_dir_all(machine.archives()).unwrap();
    mends_first(machine, "directories", "is not there, and apt needs it");
    // 25: a container without the device.
    let devices = machine.scratch().join("dev");
    fs::create_dir(&devices).unwrap();
    mount("tmpfs", &devices, "tmpfs", MountFlags::empty(), None).unwrap();
    for name in ["null", "zero", "full", "random", "urandom", "tty"] {
        fs::write(devices.join(name), "").unwrap();
        mount_bind(format!("/dev/{name}"), devices.join(name)).unwrap();
    }
    mount_move(&devices, "/dev").unwrap();
    mends_first(machine, "fuse", "/dev/fuse cannot be opened");
    mends(machine, "daemon", "no daemon runs");
    machine.down();
    unmount("/dev", UnmountFlags::DETACH).unwrap();
}

/// As `mends`, with no daemon running before and after.
#[track_caller]
fn mends_first(machine: &Machine, about: &str, text: &str) {
    let found = doctor(machine);
    let is_daemon = |finding: &&Value| finding["about"] == "daemon";
    let wanted: Vec<_> = found.iter().filter(|finding| !is_daemon(finding)).collect();
    assert!(wanted.len() == 1 && wanted[0]["about"] == about, "{found:#?}");
    assert!(wanted[0]["problem"].as_str().unwrap().contains(text), "{text:?}: {found:#?}");
    remedy(wanted[0]).ok();
    let left = doctor(machine);
    assert!(left.iter().all(|finding| is_daemon(&finding)), "{:?} left {left:#?}", wanted[0]["remedy"]);
    report("doctor", &format!("{about}: {}: {}", wanted[0]["problem"], wanted[0]["remedy"]));
}

/// A firewall on this machine keeps peers out while its own datagrams get answers: only somebody else can tell.
#[test]
fn a_closed_port_is_seen_by_another_node() {
    let crowd = Crowd::new(2, packages(), &Terms::default());
    crowd.up(false);
    let (machine, host) = (&crowd.machines[0], &crowd.hosts[0]);
    let network = || doctor(machine).into_iter().filter(|finding| finding["about"] == "network").collect::<Vec<_>>();
    host.run("nft 'table inet wall { chain in { type filter hook input priority 0; tcp dport 9977 drop; }; }'");
    let found = network();
    assert_eq!(found.len(), 1, "{found:#?}");
    let problem = found[0]["problem"].as_str().unwrap();
    assert!(problem.starts_with("10.99.0.2:9977, another node, cannot open a connection to TCP port 9977"), "{problem}");
    let ask = || run(crowd.hosts[1].command("curl").args(["-s", "-m", "5", "-o", "/dev/null", "http://10.99.0.1:9977/v1/have/x"])).code();
    assert_ne!(ask(), 0, "the wall is none");
    run(host.command("sh").args(["-c", found[0]["remedy"].as_str().unwrap()])).ok();
    assert_eq!(ask(), 0, "{:?} does not mend it", found[0]["remedy"]);
    assert_eq!(network(), Vec::<Value>::new());
    report("doctor", &format!("network: {problem}: {}", found[0]["remedy"]));
    crowd.machines.iter().for_each(Machine::down);
}
