//! What an administrator, a mirror or a disk can do to poolfs: one clear line with the remedy, nothing lost, and plain apt works.

use crate::harness::{
    Apt, Fault, Machine, Mirror, Options, Package, Repo, Sources, Stage, assert_holds, listed, mounts, report, run, workspace,
};
use rustix::mount::{MountFlags, UnmountFlags, mount, mount_bind, mount_move, mount_remount, unmount};
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixListener;
use std::process::Command;

fn two() -> Vec<Package> {
    vec![Package::new("one", "1.0", 3_000), Package::new("two", "1.0", 600_000)]
}

/// Fails unless `poolfs up` exits 1 with one line that contains all of `texts`, and leaves nothing mounted.
#[track_caller]
fn refused(machine: &Machine, texts: &[&str]) {
    let finished = machine.poolfs(&["up"]);
    assert_eq!(finished.code(), 1, "{finished}");
    let said = finished.err.trim_end();
    assert!(!said.is_empty() && !said.contains('\n'), "not one line: {finished}");
    for text in texts {
        assert!(said.contains(text), "{text:?} is not said: {finished}");
    }
    for path in [machine.archives(), machine.lists()] {
        assert_eq!(mounts::at(&path).len(), 0, "{} is left mounted", path.display());
    }
    report("bad_input", said.trim_start_matches("error: ").trim_start_matches("poolfs: "));
}

/// Plain apt must work on what is there, without poolfs.
#[track_caller]
fn plain_apt_works(stage: &Stage) {
    stage.machine.update();
    stage.download_all().ok();
    stage.assert_all_here();
}

fn edit_config(machine: &Machine, edit: impl FnOnce(String) -> String) {
    let text = fs::read_to_string(machine.config()).unwrap();
    fs::write(machine.config(), edit(text)).unwrap();
}

/// Typing errors in the configuration: the file, the line, the nearest known key.
#[test]
fn config_errors() {
    let stage = Stage::new(two(), &Options::default());
    let good = fs::read_to_string(stage.machine.config()).unwrap();
    let line_of = |text: &str, needle: &str| text.lines().position(|line| line.contains(needle)).unwrap() + 1;
    let config = stage.machine.config().display().to_string();
    let check = |from: &str, to: &str, texts: &[&str]| {
        let text = good.replacen(from, to, 1);
        assert_ne!(text, good);
        fs::write(stage.machine.config(), &text).unwrap();
        let place = format!("{config}:{}", line_of(&text, to.lines().next().unwrap()));
        refused(&stage.machine, &[&[place.as_str()], texts].concat());
    };
    check("quota =", "qouta =", &["unknown key `qouta`", "did you mean `quota`?"]);
    check("[store]", "[stroe]", &["`stroe`", "did you mean [store]?"]);
    check("quota = \"1 GiB\"", "quota = \"1 Gig\"", &["`1 Gig`"]);
    check("quota = \"1 GiB\"", "quota = -5", &[]);
    check("discovery = false", "discovery = \"no\"", &[]);
    check("listen = \"127.0.0.1:0\"", "listen = \"127.0.0.1\"", &[]);
    check("role = \"archives\"", "role = \"archive\"", &["archives", "lists"]);
    check("[control]", "[control", &[]);
    fs::remove_file(stage.machine.config()).unwrap();
    refused(&stage.machine, &[&config]);
    fs::write(stage.machine.config(), &good).unwrap();
    // A missing directory, and a file where a directory belongs.
    let lists = format!("{:?}", stage.machine.lists());
    edit_config(&stage.machine, |text| text.replace(&lists, "\"/nonexistent/lists\""));
    refused(&stage.machine, &["/nonexistent/lists"]);
    edit_config(&stage.machine, |text| text.replace("/nonexistent/lists", "/etc/passwd"));
    refused(&stage.machine, &["/etc/passwd"]);
    plain_apt_works(&stage);
}

/// Without privileges there is no mount: the message must not be a stranger's errno.
#[test]
fn not_root() {
    let stage = Stage::new(two(), &Options::default());
    // The program is copied to where the user may execute it.
    let program = stage.machine.scratch().join("poolfs");
    fs::copy(env!("CARGO_BIN_EXE_poolfs"), &program).unwrap();
    let mut command = Command::new("setpriv");
    command
        .args(["--reuid=nobody", "--regid=nogroup", "--clear-groups"])
        .arg(&program)
        .arg("up")
        .arg("--config")
        .arg(stage.machine.config());
    let finished = run(&mut command).failed().says("root");
    assert_eq!(finished.err.trim_end().lines().count(), 1, "{finished}");
    plain_apt_works(&stage);
}

/// A container without the device: the message must name it.
#[test]
fn no_fuse_device() {
    let stage = Stage::new(two(), &Options::default());
    let devices = stage.machine.scratch().join("dev");
    fs::create_dir(&devices).unwrap();
    mount("tmpfs", &devices, "tmpfs", MountFlags::empty(), None).unwrap();
    for name in ["null", "zero", "full", "random", "urandom", "tty"] {
        fs::write(devices.join(name), "").unwrap();
        mount_bind(format!("/dev/{name}"), devices.join(name)).unwrap();
    }
    mount_move(&devices, "/dev").unwrap();
    refused(&stage.machine, &["/dev/fuse"]);
    plain_apt_works(&stage);
    unmount("/dev", UnmountFlags::DETACH).unwrap();
}

/// A second daemon over the first would read its own mount and hash everything through it.
#[test]
fn already_mounted() {
    let stage = Stage::mounted(two(), &Options::default());
    let finished = stage.machine.poolfs(&["up"]);
    assert_eq!(finished.code(), 1, "{finished}");
    drop(finished.says("poolfs down"));
    // The same directories with a daemon of another configuration.
    let other = stage.machine.scratch().join("other.toml");
    let text = fs::read_to_string(stage.machine.config()).unwrap();
    let text = text
        .replace("control.sock", "other.sock")
        .replace("poolfs/state", "poolfs/other-state")
        .replace("var/cache/poolfs", "var/cache/poolfs-other");
    fs::write(&other, text).unwrap();
    let finished = run(Command::new(env!("CARGO_BIN_EXE_poolfs")).arg("up").arg("--config").arg(&other));
    assert_eq!(finished.code(), 1, "{finished}");
    let archives = stage.machine.archives();
    drop(finished.says("poolfs down").says(&archives.display().to_string()));
    stage.machine.assert_mounted();
    stage.download_all().ok();
    stage.assert_all_here();
    stage.machine.down();
    // And commands without a daemon say how to get one.
    for command in ["status", "down", "verify", "watch"] {
        stage.machine.poolfs(&[command]).failed().says("poolfs up");
    }
}

/// A database that cannot be used: refused untouched, with the way out.
#[test]
fn databases() {
    let stage = Stage::mounted(two(), &Options::default());
    stage.download_all().ok();
    stage.machine.down();
    let path = stage.machine.state_dir().join("poolfs.db");
    let good = fs::read(&path).unwrap();
    let shown = path.display().to_string();

    rusqlite::Connection::open(&path).unwrap().pragma_update(None, "user_version", 9_999).unwrap();
    let future = fs::read(&path).unwrap();
    refused(&stage.machine, &[&shown, "9999", "newer"]);
    assert!(future == fs::read(&path).unwrap(), "a database from the future was touched");

    let clear = || {
        for name in ["poolfs.db-wal", "poolfs.db-shm"] {
            let _ = fs::remove_file(stage.machine.state_dir().join(name));
        }
    };
    clear();
    fs::write(&path, crate::harness::repo::noise("no database", 20_000)).unwrap();
    refused(&stage.machine, &[&shown, "corrupt", "move it away"]);

    clear();
    let mut rotten = good.clone();
    let half = rotten.len() / 2;
    rotten[half..].fill(0xa5);
    fs::write(&path, &rotten).unwrap();
    refused(&stage.machine, &[&shown, "corrupt", "move it away"]);

    clear();
    fs::write(&path, &good[..good.len() / 3]).unwrap();
    refused(&stage.machine, &[&shown, "corrupt"]);

    // The remedy that the message names works, and nothing is lost.
    clear();
    fs::remove_file(&path).unwrap();
    stage.assert_all_here();
    stage.machine.up();
    stage.assert_all_here();
    let finished = stage.download_all().ok();
    assert_eq!(finished.deb_gets(), Vec::<&str>::new());
    stage.machine.down();
    plain_apt_works(&stage);
}

/// A state directory on a file system that is read-only or full.
#[test]
fn state_directory_without_room() {
    let stage = Stage::new(two(), &Options::default());
    fs::create_dir_all(stage.machine.state_dir()).unwrap();
    let state = stage.machine.state_dir();
    let shown = state.display().to_string();

    mount("tmpfs", &state, "tmpfs", MountFlags::empty(), Some(c"size=1m")).unwrap();
    mount_remount(&state, MountFlags::RDONLY, c"").unwrap();
    refused(&stage.machine, &[&shown]);
    unmount(&state, UnmountFlags::empty()).unwrap();

    mount("tmpfs", &state, "tmpfs", MountFlags::empty(), Some(c"size=64k")).unwrap();
    fs::write(state.join("ballast"), vec![0; 64 << 10]).unwrap();
    refused(&stage.machine, &[&shown]);
    unmount(&state, UnmountFlags::empty()).unwrap();

    stage.machine.up();
    stage.machine.down();
    plain_apt_works(&stage);
}

/// A database whose disk fills up while it serves: apt must not notice.
#[test]
fn state_directory_fills_up() {
    let stage = Stage::new(two(), &Options::default());
    fs::create_dir_all(stage.machine.state_dir()).unwrap();
    let state = stage.machine.state_dir();
    mount("tmpfs", &state, "tmpfs", MountFlags::empty(), Some(c"size=2m")).unwrap();
    stage.machine.up();
    stage.machine.update();
    let ballast = stage.machine.state_dir().join("ballast");
    // Until nothing fits any more.
    let wrote = run(Command::new("dd").args(["if=/dev/zero", "bs=4096"]).arg(format!("of={}", ballast.display())));
    assert!(!wrote.status.success(), "the file system should be full: {wrote}");
    let finished = stage.download_all();
    assert_eq!(finished.code(), 0, "{finished}");
    stage.assert_all_here();
    fs::remove_file(ballast).unwrap();
    stage.machine.down();
    stage.assert_all_here();
    unmount(&state, UnmountFlags::empty()).unwrap();
    plain_apt_works(&stage);
}

/// A covered directory with everything that can lie in one.
#[test]
fn odd_things_in_the_covered_directory() {
    let stage = Stage::new(two(), &Options::default());
    let archives = stage.machine.archives();
    let _socket = UnixListener::bind(archives.join("socket")).unwrap();
    run(Command::new("mkfifo").arg(archives.join("fifo"))).ok();
    std::os::unix::fs::symlink("nowhere", archives.join("dangling")).unwrap();
    std::os::unix::fs::symlink("/etc/hostname", archives.join("outside")).unwrap();
    std::os::unix::fs::symlink(".", archives.join("loop")).unwrap();
    fs::create_dir(archives.join("directory")).unwrap();
    fs::write(archives.join("directory/inside"), b"inside").unwrap();
    fs::write(archives.join("secret"), b"secret").unwrap();
    fs::set_permissions(archives.join("secret"), fs::Permissions::from_mode(0o000)).unwrap();
    fs::write(archives.join("empty.deb"), b"").unwrap();
    fs::write(archives.join("no package.deb"), b"text").unwrap();
    let odd = std::ffi::OsStr::new("caf\u{e9} \n\t\\").to_owned();
    fs::write(archives.join(&odd), b"odd").unwrap();
    let bytes: &std::ffi::OsStr = std::os::unix::ffi::OsStrExt::from_bytes(b"\xff\xfe.deb");
    fs::write(archives.join(bytes), b"not utf-8").unwrap();
    fs::hard_link(archives.join("secret"), archives.join("second-name")).unwrap();
    let before = run(Command::new("ls").args(["-lan", "--time-style=full-iso"]).arg(&archives)).ok().out;
    stage.machine.up();
    let after = run(Command::new("ls").args(["-lan", "--time-style=full-iso"]).arg(&archives)).ok().out;
    // The directory's own line has the mount's size and links; mounting takes apt's lock, which makes the file if apt never did.
    let entries = |text: &str| {
        text.lines()
            .filter(|line| ![" .", " ..", " lock"].iter().any(|end| line.ends_with(end)) && !line.starts_with("total"))
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    assert_eq!(entries(&before), entries(&after));
    assert_holds(&archives.join("directory/inside"), b"inside");
    assert_holds(&archives.join("secret"), b"secret");
    assert_holds(&archives.join(&odd), b"odd");
    assert_holds(&archives.join(bytes), b"not utf-8");
    stage.machine.poolfs(&["verify"]).ok();
    stage.machine.update();
    stage.download_all().ok();
    stage.assert_all_here();
    stage.machine.down();
    assert_holds(&archives.join("secret"), b"secret");
    assert!(archives.join("socket").symlink_metadata().is_ok() && archives.join("dangling").symlink_metadata().is_ok());
    plain_apt_works(&stage);
}

/// The index of a repository that apt accepts, with entries that no catalog may believe.
#[test]
fn entries_that_name_other_places() {
    let stanza = |package: &str, version: &str, size: &str, digest: &str, filename: &str| {
        format!(
            "Package: {package}\nVersion: {version}\nArchitecture: all\nMaintainer: x\nFilename: {filename}\nSize: {size}\nSHA256: {digest}\nDescription: x\n\n"
        )
    };
    let home = workspace();
    let mut repo = Repo::new(home.path());
    let good = repo.add(Package::new("good", "1.0", 3_000));
    repo.publish();
    let fine = fs::read_to_string(repo.root().join("dists/stable/main/binary-amd64/Packages")).unwrap();
    let zero = "0".repeat(64);
    let bad = [
        stanza("../../etc/cron.d/evil", "1", "10", &zero, "pool/evil.deb"),
        stanza("evil", "../../1", "10", &zero, "pool/evil.deb"),
        stanza("slash", "1/2", "10", &zero, "pool/evil.deb"),
        stanza("no-digest", "1", "10", "xyz", "pool/evil.deb"),
        stanza("no-size", "1", "ten", &zero, "pool/evil.deb"),
        stanza("huge-size", "1", "99999999999999999999999", &zero, "pool/evil.deb"),
        stanza("up", "1", "10", &zero, "../../../../etc/shadow"),
        format!(
            "Package: wide\nVersion: 1\nArchitecture: all\nFilename: pool/w.deb\nSize: 10\nSHA256: {zero}\nDescription: {}\n\n",
            "x".repeat(3 << 20)
        ),
    ];
    let mut index = bad.concat().into_bytes();
    index.extend_from_slice(
        b"Package: bytes\nVersion: 1\nArchitecture: all\nMaintainer: \xff\xfe\x00\x80\nFilename: pool/b.deb\nSize: 10\nDescription: x\n\n",
    );
    index.extend_from_slice(fine.as_bytes());
    repo.publish_index(&index);
    let mirror = Mirror::new(repo.root());
    let machine = Machine::new(&Sources::Local(&repo, &mirror), &Options::default());
    machine.up();
    // Whether apt itself accepts this index is not the question.
    let _ = machine.apt_get(&["update"]);
    let archives = machine.archives();
    for name in ["evil", "..%2f..%2fetc%2fcron.d%2fevil_1_all.deb", "slash_1/2_all.deb", "up_1_all.deb"] {
        let metadata = fs::symlink_metadata(archives.join(name));
        let offered = metadata.is_ok() && name != "up_1_all.deb";
        assert!(!offered, "{name} is offered");
    }
    let listing = listed(&archives);
    assert!(listing.iter().all(|name| name == "lock" || name == "partial"), "{listing:?}");
    // The good entry behind them is found all the same.
    assert_holds(&archives.join(good.archive_name()), &good.bytes);
    assert!(machine.pid().is_some(), "the daemon died of an index");
    report(
        "bad_input::entries",
        &format!("{} entries, {} problems told: {:?}", bad.len() + 1, machine.status().problems.len(), machine.status().problems),
    );
}

/// Lists that were damaged before poolfs came, or that a mirror made so.
#[test]
fn mangled_lists() {
    let stage = Stage::new(two(), &Options::default());
    stage.machine.update();
    let lists = stage.machine.lists();
    let index = listed(&lists).into_iter().find(|name| name.ends_with("amd64_Packages")).unwrap();
    let release = listed(&lists).into_iter().find(|name| name.ends_with("InRelease")).unwrap();
    let (good_index, good_release) = (fs::read(lists.join(&index)).unwrap(), fs::read(lists.join(&release)).unwrap());
    let noise = crate::harness::repo::noise("mangled", 50_000);
    let cases: Vec<(&str, Vec<u8>, &str)> = vec![
        ("noise", noise.clone(), &index),
        ("cut in the middle of a stanza", good_index[..good_index.len() * 2 / 3].to_vec(), &index),
        ("empty", Vec::new(), &index),
        ("zeros", vec![0; 100_000], &index),
        ("one line without an end", vec![b'x'; 5 << 20], &index),
        ("noise for a Release", noise, &release),
        ("half a Release", good_release[..good_release.len() / 2].to_vec(), &release),
        ("empty Release", Vec::new(), &release),
    ];
    for (what, bytes, name) in &cases {
        fs::write(lists.join(&index), &good_index).unwrap();
        fs::write(lists.join(&release), &good_release).unwrap();
        fs::write(lists.join(name), bytes).unwrap();
        stage.machine.up();
        assert_holds(&lists.join(name), bytes);
        stage.machine.await_catalog();
        let status = stage.machine.status();
        report("bad_input::mangled_lists", &format!("{what}: {} entries, problems {:?}", status.catalog_entries, status.problems));
        assert!(status.catalog_entries <= 2, "{what}: {status:#?}");
        if status.catalog_entries < 2 && !bytes.is_empty() {
            assert!(
                !status.problems.is_empty() && status.problems.iter().any(|problem| problem.contains(*name)),
                "{what}: nobody is told: {status:#?}"
            );
        }
        stage.machine.down();
    }
    // Compressed forms that are not what they are called.
    fs::remove_file(lists.join(&index)).unwrap();
    for form in ["gz", "xz", "bz2", "lz4", "zst"] {
        let name = format!("{index}.{form}");
        fs::write(lists.join(&name), b"no compressed file at all").unwrap();
        stage.machine.up();
        stage.machine.await_catalog();
        let status = stage.machine.status();
        // What the last good list said may still be known.
        assert!(status.catalog_entries <= 2, "{form}: {status:#?}");
        assert!(status.problems.iter().any(|problem| problem.contains(&name)), "{form}: nobody is told: {status:#?}");
        stage.machine.down();
        fs::remove_file(lists.join(&name)).unwrap();
    }
    for name in listed(&lists) {
        if name != "partial" && name != "lock" {
            let path = lists.join(name);
            let _ = fs::remove_file(&path).or_else(|_| fs::remove_dir_all(&path));
        }
    }
    plain_apt_works(&stage);
}

/// What the mirror does to apt's own requests passes through the mount as through a plain directory.
#[test]
fn mirror_faults_at_an_update() {
    let stage = Stage::mounted(two(), &Options::default());
    let before = listed(&stage.machine.lists());
    for fault in [Fault::Status(404), Fault::Html, Fault::Wrong(200), Fault::Short(50)] {
        stage.mirror.fault("InRelease", None, fault.clone());
        let _ = stage.machine.apt_get(&["update"]);
        stage.mirror.heal();
        assert_eq!(listed(&stage.machine.lists()), before, "{fault:?}");
        stage.machine.update();
        assert_eq!(stage.machine.status().catalog_entries, 2, "{fault:?}");
    }
    let finished = stage.download_all().ok();
    stage.assert_no_gets(&finished);
}

/// A mirror that is down makes apt fail with and without poolfs; then everything goes on.
#[test]
fn no_mirror_at_all() {
    let stage = Stage::mounted(two(), &Options::default());
    stage.mirror.stop();
    stage.download_all().failed().says("Could not connect");
    run(Command::new("cat").arg(stage.archive(&stage.packages[0]))).failed();
    stage.mirror.start_again();
    // What just could not be had is left to apt for a while.
    stage.download_all().ok();
    stage.assert_all_here();
}

/// Somebody's file in the way of a name that poolfs wants to use.
#[test]
fn poolfs_directories_in_the_way() {
    let stage = Stage::new(two(), &Options { apt: Apt::Own, ..Options::default() });
    let cache = stage.machine.cache_dir();
    fs::remove_dir_all(&cache).unwrap();
    fs::write(&cache, b"a file").unwrap();
    refused(&stage.machine, &[&cache.display().to_string()]);
    fs::remove_file(&cache).unwrap();
    let runtime = stage.machine.socket().parent().unwrap().to_owned();
    fs::create_dir_all(&runtime).unwrap();
    fs::remove_dir_all(&runtime).unwrap();
    fs::write(&runtime, b"a file").unwrap();
    refused(&stage.machine, &[&stage.machine.socket().display().to_string()]);
    fs::remove_file(&runtime).unwrap();
    // A stale socket of a daemon that is gone is no obstacle.
    fs::create_dir_all(&runtime).unwrap();
    drop(UnixListener::bind(stage.machine.socket()).unwrap());
    stage.machine.up();
    stage.machine.down();
    plain_apt_works(&stage);
}
