//! Lines of fstab and mount(8) itself, with the helper under both names that it has.

use crate::harness::{Machine, Options, Package, Running, Stage, listed, mounts, report, run};
use rustix::mount::{MountFlags, mount};
use rustix::process::{Pid, Signal, kill_process};
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

/// More than that is no passer-by.
const UNMOUNT_TRIES: usize = 50;

/// A machine whose `/sbin` has the helper, in this test's mount namespace.
struct Scene {
    stage: Stage,
}

impl Scene {
    fn new() -> Self {
        let stage = Stage::new(vec![Package::new("small", "1.0", 3_000), Package::new("large", "3.0", 900_000)], &Options::default());
        let (upper, work) = (stage.machine.scratch().join("sbin"), stage.machine.scratch().join("work"));
        fs::create_dir_all(&upper).unwrap();
        fs::create_dir_all(&work).unwrap();
        for name in ["mount.poolfs", "mount.fuse.poolfs"] {
            symlink(env!("CARGO_BIN_EXE_poolfs"), upper.join(name)).unwrap();
        }
        let data = format!("lowerdir=/usr/sbin,upperdir={},workdir={}", upper.display(), work.display());
        let data = std::ffi::CString::new(data).unwrap();
        mount("overlay", "/usr/sbin", "overlay", MountFlags::empty(), Some(data.as_c_str())).unwrap();
        Self { stage }
    }

    fn machine(&self) -> &Machine {
        &self.stage.machine
    }

    /// A line for one directory; `options` come after the configuration.
    fn line(&self, role: &str, options: &str) -> String {
        let directory = if role == "archives" { self.machine().archives() } else { self.machine().lists() };
        format!("{role}  {}  poolfs  config={},{options}  0 0\n", directory.display(), self.machine().config().display())
    }

    fn fstab(&self, text: &str) -> PathBuf {
        let path = self.machine().scratch().join("fstab");
        fs::write(&path, text).unwrap();
        path
    }

    /// An fstab with the lines that the README recommends.
    fn recommended(&self) -> PathBuf {
        let options = options_of_the_readme();
        self.fstab(&(self.line("archives", &options) + &self.line("lists", &options)))
    }

    fn is_mounted(&self, role: &str) -> bool {
        let path = if role == "archives" { self.machine().archives() } else { self.machine().lists() };
        mounts::at(&path).last().is_some_and(mounts::Mount::is_fuse)
    }

    fn processes(&self) -> usize {
        crate::harness::process::with_argument(&self.machine().config().to_string_lossy()).len()
    }
}

fn kill(pid: u32) {
    kill_process(Pid::from_raw(i32::try_from(pid).unwrap()).unwrap(), Signal::KILL).unwrap();
}

/// The options of both lines in the README, which must be the same.
fn options_of_the_readme() -> String {
    let lines = lines_of_the_readme();
    let options: Vec<_> = lines.iter().map(|line| line.split_whitespace().nth(3).unwrap().to_owned()).collect();
    assert!(options.len() == 2 && options[0] == options[1], "{options:?}");
    options[0].clone()
}

fn lines_of_the_readme() -> Vec<String> {
    let readme = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md")).unwrap();
    readme.lines().filter(|line| line.split_whitespace().nth(2) == Some("poolfs") && line.ends_with("0 0")).map(str::to_owned).collect()
}

/// umount(8), again while it says that the mount is busy: on a machine that others use, somebody may look at it just then.
#[track_caller]
fn unmount(path: &Path) {
    let mut finished = run(Command::new("umount").arg(path));
    for _ in 0..UNMOUNT_TRIES {
        if !finished.err.contains("busy") {
            break;
        }
        finished = run(Command::new("umount").arg(path));
    }
    assert_eq!(finished.code(), 0, "{finished}");
}

fn mount_all(fstab: &Path) -> crate::harness::process::Finished {
    run(Command::new("mount").args(["-a", "-v", "-T"]).arg(fstab).current_dir("/"))
}

/// What people put into fstab, from boot to shutdown: two lines are one daemon, a second `mount -a` changes nothing, and each
/// directory can go and come back by itself.
#[test]
fn mount_all_twice_is_one_daemon() {
    let scene = Scene::new();
    let (stage, machine) = (&scene.stage, scene.machine());
    let fstab = scene.recommended();
    let first = mount_all(&fstab);
    assert_eq!(first.code(), 0, "{first}");
    machine.assert_mounted();
    let status = machine.status();
    assert_eq!(status.mounts.len(), 2, "{status:#?}");
    assert_eq!(scene.processes(), 2, "one supervisor, one daemon");
    machine.update();
    stage.download_all().ok();
    stage.assert_all_here();
    let second = mount_all(&fstab).says("already mounted");
    assert_eq!(second.code(), 0, "{second}");
    machine.assert_mounted();
    assert_eq!(machine.status().pid, status.pid);
    // From a directory that has an entry `archives`, libmount makes a path of the first field and asks the helper again.
    let third = run(Command::new("mount").args(["-a", "-T"]).arg(&fstab).current_dir(machine.archives().parent().unwrap()));
    assert_eq!(third.code(), 0, "{third}");
    machine.assert_mounted();
    // The lists alone, then both again.
    unmount(&machine.archives());
    mounts::await_mounts("archives are unmounted", |_| !scene.is_mounted("archives"));
    stage.assert_all_here();
    unmount(&machine.lists());
    crate::harness::machine::await_end(status.pid);
    let again = mount_all(&fstab);
    assert_eq!(again.code(), 0, "{again}");
    unmount(&machine.lists());
    // The catalog of a daemon whose lists went is still read when apt takes its lock in the archives.
    stage.download_all().ok();
    assert_eq!(mount_all(&fstab).code(), 0);
    machine.assert_mounted();
    machine.update();
    assert_eq!(machine.status().hashed, 0, "{:#?}", machine.status());
    machine.down();
    stage.assert_all_here();
    report("fstab::mount_all", "two lines: 1 daemon; `mount -a` again: exit 0, the same mounts; each directory goes and comes back");
}

/// A mount straight after an unmount, before the daemon has seen the latter, must mount, not say that it is there.
#[test]
fn mounted_again_at_once() {
    let scene = Scene::new();
    let fstab = scene.recommended();
    mount_all(&fstab).ok();
    for _ in 0..20 {
        unmount(&scene.machine().lists());
        mount_all(&fstab).ok();
        assert!(scene.is_mounted("lists"), "mount(8) said that it is mounted");
    }
    scene.machine().update();
    scene.machine().down();
    report("fstab::mounted_again_at_once", "20 times unmounted and mounted again at once");
}

/// systemd starts both lines at once.
#[test]
fn both_lines_at_the_same_time() {
    let scene = Scene::new();
    let fstab = scene.recommended();
    let start = |path: PathBuf| Running::start(Command::new("mount").arg("-T").arg(&fstab).arg(path));
    let both = [scene.machine().archives(), scene.machine().lists()].map(start);
    for one in both {
        let finished = one.wait();
        assert_eq!(finished.code(), 0, "{finished}");
    }
    scene.machine().assert_mounted();
    assert_eq!(scene.processes(), 2, "one supervisor, one daemon");
    assert_eq!(scene.machine().status().mounts.len(), 2);
    scene.machine().update();
    scene.stage.download_all().ok();
    scene.machine().down();
}

/// A mount that joined a running daemon must be detached with it and come back, not only the one that it was started with.
#[test]
fn both_come_back_after_a_death() {
    let scene = Scene::new();
    let (stage, machine) = (&scene.stage, scene.machine());
    let fstab = scene.fstab(&(scene.line("lists", "nosuid") + &scene.line("archives", "nodev,noexec")));
    mount_all(&fstab).ok();
    machine.update();
    stage.download_all().ok();
    for _ in 0..2 {
        let old = machine.status().pid;
        kill(old);
        machine.await_mounted_again(old);
        let options = |path: &Path| mounts::at(path).last().unwrap().options.clone();
        assert!(options(&machine.lists()).contains("nosuid"), "{}", options(&machine.lists()));
        assert!(options(&machine.archives()).contains("nodev,noexec"), "{}", options(&machine.archives()));
        stage.assert_all_here();
    }
    // What was unmounted stays away.
    unmount(&machine.lists());
    let old = machine.status().pid;
    mounts::await_mounts("lists are unmounted", |_| !scene.is_mounted("lists"));
    machine.poolfs(&["status"]).ok();
    kill(old);
    crate::harness::machine::await_end(old);
    let runtime = machine.socket().parent().unwrap().to_owned();
    mounts::await_change("archives are back", &[&runtime], || scene.is_mounted("archives") && machine.pid().is_some_and(|pid| pid != old));
    assert!(!scene.is_mounted("lists"), "lists came back though they were unmounted");
    machine.poolfs(&["down"]).ok();
}

/// `mount -t TYPE archives DIR -o OPTIONS`, both types, and what the helper is for in scripts.
#[test]
fn both_types_by_hand() {
    let scene = Scene::new();
    let machine = scene.machine();
    let config = format!("config={}", machine.config().display());
    let by_hand = |kind: &str, role: &str, path: &Path, options: &str, more: &[&str]| {
        let options = format!("{config},{options}");
        run(Command::new("mount").args(more).args(["-t", kind, role]).arg(path).args(["-o", &options]).current_dir("/"))
    };
    let fake = by_hand("poolfs", "archives", &machine.archives(), "ro", &["-f", "-v"]).says("archives could be mounted on");
    assert_eq!(fake.code(), 0, "{fake}");
    assert!(!scene.is_mounted("archives"));
    let archives = by_hand("poolfs", "archives", &machine.archives(), "defaults,noatime", &["-v"])
        .says("mount.poolfs: archives is mounted, by a new daemon");
    assert_eq!(archives.code(), 0, "{archives}");
    let lists = by_hand("fuse.poolfs", "lists", &machine.lists(), "rw", &["-v"]).says("mount.fuse.poolfs: lists is mounted on");
    assert_eq!(lists.code(), 0, "{lists}");
    machine.assert_mounted();
    let sources = run(Command::new("findmnt").args(["-n", "-o", "SOURCE,FSTYPE", "-t", "fuse.poolfs"])).ok().out;
    assert!(sources.contains("archives fuse.poolfs") && sources.contains("lists    fuse.poolfs"), "{sources}");
    // A second place for what is mounted already.
    let elsewhere = machine.root().join("elsewhere");
    fs::create_dir(&elsewhere).unwrap();
    let second = by_hand("poolfs", "lists", &elsewhere, "rw", &[]).says("lists is mounted on").says("config=FILE");
    assert_eq!(second.code(), 32, "{second}");
    // Another mount namespace would not see what the daemon mounts.
    unmount(&machine.lists());
    let line = format!("mount -t poolfs lists {} -o {config}", machine.lists().display());
    let other = run(Command::new("unshare").args(["--mount", "sh", "-c", &line])).says("sees another directory");
    assert_eq!(other.code(), 32, "{other}");
    machine.poolfs(&["down"]).ok();
}

/// Each refusal leaves nothing mounted and no daemon, says what is wrong in one line, and has the exit code that mount(8) documents.
#[test]
fn what_is_wrong_is_named() {
    let scene = Scene::new();
    let machine = scene.machine();
    let good = format!("config={}", machine.config().display());
    let refused = |code: i32, role: &str, path: &Path, options: &str, texts: &[&str]| {
        let finished = run(Command::new("mount").args(["-t", "poolfs", role]).arg(path).args(["-o", options]).current_dir("/"));
        assert_eq!(finished.code(), code, "{finished}");
        let said = finished.err.trim_end();
        assert!(said.starts_with("mount.poolfs: ") && !said.contains('\n'), "{finished}");
        for text in texts {
            assert!(said.contains(text), "{text:?} is not said: {finished}");
        }
        assert!(!scene.is_mounted("archives") && !scene.is_mounted("lists"));
        assert_eq!(scene.processes(), 0, "a process is left");
        report("fstab::what_is_wrong_is_named", &format!("exit {code}: {said}"));
    };
    let archives = machine.archives();
    refused(1, "archives", &archives, &format!("{good},sloth"), &["unknown mount option `sloth`", "poolfs knows ro, rw, browse"]);
    refused(1, "archives", &archives, &format!("{good},browse=1"), &["unknown mount option `browse=1`"]);
    refused(1, "archives", &archives, &format!("{good},browse"), &["`browse` needs `ro`"]);
    refused(1, "archive", &archives, &good, &["`archive` is not a role: write archives or lists"]);
    refused(1, "archives", &archives, "config=/nonexistent/poolfs.toml", &["/nonexistent/poolfs.toml"]);
    refused(1, "archives", &archives, "config=poolfs.toml", &["config=poolfs.toml is not absolute"]);
    let file = machine.scratch().join("file");
    fs::write(&file, "").unwrap();
    refused(32, "archives", &file, &good, &["is not a directory"]);
    refused(32, "archives", &archives, &format!("{good},remount,ro"), &["mount it first"]);
    // -s: sloppy, what is unknown is let pass.
    let line = |role: &str, options: &str| scene.line(role, options);
    let sloppy = run(Command::new("mount").args(["-s", "-t", "poolfs", "archives"]).arg(&archives).args(["-o", &format!("{good},sloth")]));
    assert_eq!(sloppy.code(), 0, "{sloppy}");
    // One good line of two: mount(8) says 64, and the good one is mounted.
    let fstab = scene.fstab(&(line("archives", "rw") + &line("lists", "rw,sloth")));
    machine.down();
    let some = run(Command::new("mount").args(["-a", "-T"]).arg(&fstab).current_dir("/")).says("unknown mount option `sloth`");
    assert_eq!(some.code(), 64, "{some}");
    assert!(scene.is_mounted("archives") && !scene.is_mounted("lists"));
    machine.poolfs(&["down"]).ok();
}

/// Read-only for a while, as before a snapshot: at once, for what comes back after a death too, and not for ever.
#[test]
fn remount() {
    let scene = Scene::new();
    let (stage, machine) = (&scene.stage, scene.machine());
    let fstab = scene.recommended();
    mount_all(&fstab).ok();
    machine.update();
    let remount = |options: &str| run(Command::new("mount").arg("-T").arg(&fstab).args(["-o", options]).arg(machine.archives()));
    let read_only = || mounts::at(&machine.archives()).last().unwrap().options.split(',').any(|option| option == "ro");
    let finished = remount("remount,ro");
    assert_eq!(finished.code(), 0, "{finished}");
    assert!(read_only());
    assert_eq!(fs::write(machine.archives().join("x"), "").unwrap_err().kind(), std::io::ErrorKind::ReadOnlyFilesystem);
    let old = machine.status().pid;
    kill(old);
    machine.await_mounted_again(old);
    assert!(read_only(), "it came back writable");
    let refused = remount("remount,ro,browse").says("`browse`").says("cannot be changed by a remount");
    assert_eq!(refused.code(), 32, "{refused}");
    let finished = remount("remount,rw");
    assert_eq!(finished.code(), 0, "{finished}");
    assert!(!read_only());
    stage.download_all().ok();
    stage.assert_all_here();
    let refused = remount("remount,sloth").says("unknown mount option `sloth`");
    assert_eq!(refused.code(), 1, "{refused}");
    machine.down();
    // Its mounts are plain to mount(8) too.
    assert_eq!(listed(&machine.archives()).iter().filter(|name| name.ends_with(".deb")).count(), 2);
}

/// systemd makes units of the recommended lines; the order against apt's timers must be in them, and no wait at boot.
#[test]
fn systemd_understands_the_recommended_lines() {
    let scene = Scene::new();
    let lines = lines_of_the_readme();
    let fstab = scene.fstab(&(lines.join("\n") + "\n"));
    let out = scene.machine().scratch().join("units");
    fs::create_dir(&out).unwrap();
    let mut generator = Command::new("/usr/lib/systemd/system-generators/systemd-fstab-generator");
    let finished = run(generator.arg(&out).arg(&out).arg(&out).env("SYSTEMD_FSTAB", &fstab).env("SYSTEMD_LOG_TARGET", "console")).ok();
    assert_eq!(finished.err, "", "{finished}");
    for (name, role) in [("var-cache-apt-archives.mount", "archives"), ("var-lib-apt-lists.mount", "lists")] {
        let unit = fs::read_to_string(out.join(name)).unwrap_or_else(|error| panic!("{name}: {error}; {:?}", listed(&out)));
        for text in [format!("What={role}"), "Type=poolfs".into()] {
            assert!(unit.lines().any(|line| line == text), "{text}: {unit}");
        }
        let before: Vec<_> = unit.lines().filter_map(|line| line.strip_prefix("Before=")).flat_map(|line| line.split(' ')).collect();
        for service in ["apt-daily.service", "apt-daily-upgrade.service"] {
            assert!(before.contains(&service), "{name} is not before {service}: {unit}");
        }
        assert!(!unit.contains("network") && !unit.contains("automount"), "{unit}");
        assert!(out.join("local-fs.target.wants").join(name).exists(), "a failure would stop the boot: {:?}", listed(&out));
        let verified = run(Command::new("systemd-analyze").args(["verify", "--man=no"]).arg(out.join(name)));
        assert!(!verified.err.contains(name), "{verified}");
    }
}
