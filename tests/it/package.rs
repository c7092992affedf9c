//! The Debian package, as a new user meets it: installed by apt into a Debian 13 root, used, upgraded and purged.

use crate::harness::process::Finished;
use crate::harness::{Apt, Machine, Options, Sources, listed, mounts, report, run, workspace};
use rustix::process::{Pid, Signal, kill_process};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The package with this build's program; lintian has nothing to warn of, or this fails.
fn make(out: &Path) -> PathBuf {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/package");
    let finished = run(Command::new(script).args(["--quick", "--binary", env!("CARGO_BIN_EXE_poolfs"), "--out"]).arg(out)).ok();
    assert!(!finished.err.contains("SKIPPED"), "{finished}");
    PathBuf::from(finished.out.trim())
}

/// The same package with a higher version.
fn newer(package: &Path, out: &Path) -> PathBuf {
    let tree = out.join("tree");
    run(Command::new("dpkg-deb").arg("-R").arg(package).arg(&tree)).ok();
    let control = fs::read_to_string(tree.join("DEBIAN/control")).unwrap();
    let version = control.lines().find_map(|line| line.strip_prefix("Version: ")).unwrap();
    fs::write(tree.join("DEBIAN/control"), control.replace(&format!("Version: {version}"), &format!("Version: {version}+newer"))).unwrap();
    let path = out.join("poolfs-newer.deb");
    run(Command::new("dpkg-deb").args(["--root-owner-group", "-Zgzip", "-z1", "--build"]).arg(&tree).arg(&path)).ok();
    path
}

fn inside(machine: &Machine, program: &str, arguments: &[&str]) -> Finished {
    run(&mut machine.command(program, arguments))
}

fn is_mounted(machine: &Machine) -> bool {
    [machine.archives(), machine.lists()].iter().all(|path| mounts::at(path).last().is_some_and(mounts::Mount::is_fuse))
}

fn pid(machine: &Machine) -> Option<u32> {
    let finished = inside(machine, "poolfs", &["status", "--json"]);
    let status: serde_json::Value = serde_json::from_str(finished.out.trim()).ok()?;
    u32::try_from(status["pid"].as_u64()?).ok()
}

/// Each step must leave apt working: while it installs the package, with its mounts, during an upgrade, and after the purge, which
/// is run by an apt that has its lock below the mount.
#[test]
fn installed_used_upgraded_and_purged_real_mirror() {
    let home = workspace();
    let package = make(home.path());
    let newer = newer(&package, home.path());
    let machine = Machine::new(&Sources::Debian, &Options { apt: Apt::Trixie, ..Options::default() });
    let apt = |arguments: &[&str]| inside(&machine, "apt-get", arguments);
    for (from, to) in [(&package, "tmp/poolfs.deb"), (&newer, "tmp/poolfs-newer.deb")] {
        fs::copy(from, machine.root().join(to)).unwrap();
    }
    apt(&["update"]).ok();
    apt(&["install", "-y", "/tmp/poolfs.deb"]).ok();
    assert!(!is_mounted(&machine), "nothing is mounted by an installation without a service manager");
    // A port of its own: other tests run beside this one.
    let config = machine.root().join("etc/poolfs/poolfs.toml");
    let text = fs::read_to_string(&config).unwrap();
    let edited = text
        .replace("#[net]", "[net]")
        .replace("#listen = \"[::]:9977\"", "listen = \"127.0.0.1:0\"")
        .replace("# discovery = true", "discovery = false")
        .replace("#[status]", "[status]")
        .replace("#listen = \"127.0.0.1:9978\"", "listen = \"127.0.0.1:0\"");
    assert_ne!(text, edited);
    fs::write(&config, edited).unwrap();
    inside(&machine, "poolfs", &["config", "check"]).ok().says("is right");
    // The lines of the README.
    let readme = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md")).unwrap();
    let lines: Vec<_> = readme.lines().filter(|line| line.split_whitespace().nth(2) == Some("poolfs") && line.ends_with("0 0")).collect();
    fs::write(machine.root().join("etc/fstab"), lines.join("\n") + "\n").unwrap();
    inside(&machine, "mount", &["-a"]).ok();
    assert!(is_mounted(&machine), "{:#?}", mounts::mounts());
    inside(&machine, "mount", &["-a"]).ok();
    inside(&machine, "poolfs", &["doctor"]).ok().says("nothing is wrong");
    apt(&["update"]).ok();
    let installed = apt(&["install", "-y", "hello"]).ok();
    assert_eq!(installed.deb_gets(), Vec::<&str>::new(), "{installed}");
    inside(&machine, "hello", &[]).ok().says("Hello, world!");
    let name = listed(&machine.archives()).into_iter().find(|name| name.starts_with("hello_")).unwrap();
    inside(&machine, "poolfs", &["why", &format!("/var/cache/apt/archives/{name}")]).ok().says("mirror");
    // An upgrade: the daemon serves the very apt that replaces its program.
    let daemon = pid(&machine).unwrap();
    apt(&["install", "-y", "/tmp/poolfs-newer.deb"]).ok();
    assert_eq!(pid(&machine), Some(daemon));
    assert!(is_mounted(&machine));
    assert!(fs::read_to_string(&config).unwrap().contains("127.0.0.1:0"), "the configuration was overwritten");
    // A death after it: the program that comes back is the new one.
    kill_process(Pid::from_raw(i32::try_from(daemon).unwrap()).unwrap(), Signal::KILL).unwrap();
    crate::harness::machine::await_end(daemon);
    let runtime = machine.root().join("run/poolfs");
    mounts::await_change("mounted again", &[&runtime], || is_mounted(&machine) && pid(&machine).is_some_and(|pid| pid != daemon));
    apt(&["install", "-y", "--reinstall", "hello"]).ok();
    // Gone, by an apt that uses the mounts.
    let daemon = pid(&machine).unwrap();
    apt(&["purge", "-y", "poolfs"]).ok();
    crate::harness::machine::await_end(daemon);
    for path in [machine.archives(), machine.lists()] {
        assert_eq!(mounts::at(&path).len(), 0, "{} is left mounted", path.display());
    }
    for left in ["var/lib/poolfs", "var/cache/poolfs", "run/poolfs", "etc/poolfs", "usr/bin/poolfs", "usr/sbin/mount.poolfs"] {
        assert!(!machine.root().join(left).exists(), "{left} is left");
    }
    assert!(listed(&machine.archives()).contains(&name), "the package is gone with the mount");
    fs::write(machine.root().join("etc/fstab"), "").unwrap();
    apt(&["purge", "-y", "hello"]).ok();
    apt(&["update"]).ok();
    let again = apt(&["install", "-y", "hello"]).ok();
    assert_eq!(again.deb_gets(), Vec::<&str>::new(), "what was downloaded is here as a plain file: {again}");
    report("package", "installed, mounted by fstab, used, upgraded under its own mounts, killed, purged: apt exited 0 throughout");
}

/// A directive that the service manager does not know is ignored by it in silence.
#[test]
fn the_unit_is_understood() {
    let home = workspace();
    let units = home.path().join("usr/lib/systemd/system");
    fs::create_dir_all(&units).unwrap();
    fs::create_dir_all(home.path().join("usr/bin")).unwrap();
    let unit = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/packaging/poolfs.service");
    fs::copy(&unit, units.join("poolfs.service")).unwrap();
    fs::copy(env!("CARGO_BIN_EXE_poolfs"), home.path().join("usr/bin/poolfs")).unwrap();
    let mut verify = Command::new("systemd-analyze");
    let verified = run(verify
        .args(["verify", "--man=no", "--recursive-errors=no"])
        .arg(format!("--root={}", home.path().display()))
        .arg("poolfs.service"));
    assert_eq!((verified.code(), verified.err.as_str()), (0, ""), "{verified}");
    let text = fs::read_to_string(unit).unwrap();
    for private in
        ["PrivateMounts", "PrivateTmp", "ProtectSystem", "ReadWritePaths", "ProtectHome", "ProtectKernel", "ProtectControlGroups"]
    {
        assert!(!text.contains(private), "{private} would give it a mount namespace of its own, and apt would not see the mounts");
    }
}
