//! Names that are not here yet: what a program gets that opens one.

use crate::harness::{Apt, Client, Fault, Gate, Options, Package, Running, Stage, assert_holds, attribute, listed, report, run};
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::process::Command;

fn one(payload_bytes: usize) -> Vec<Package> {
    vec![Package::new("one", "1.0", payload_bytes)]
}

/// Lengths where blocks (64 KiB), pieces (256 KiB) and the one-piece limit (512 KiB) begin and end. A package is a little
/// longer than its payload, so the exact edges are met by the pure tests; these are the neighbourhoods.
const PAYLOADS: &[usize] = &[0, 1, 63 << 10, 64 << 10, 255 << 10, 256 << 10, 510 << 10, 512 << 10, (1 << 20) + 1, (3 << 20) + 12_345];

/// A program that knows nothing of poolfs must be able to use a package that is not here as if it were.
#[test]
fn cp_and_dpkg_open_what_is_not_here() {
    let packages = PAYLOADS.iter().map(|bytes| Package::new(&format!("p{bytes}"), "1.0", *bytes)).collect();
    let stage = Stage::mounted(packages, &Options::default());
    let scratch = stage.machine.scratch();
    assert_eq!(stage.debs(), Vec::<String>::new(), "what is not here is not listed");
    for published in &stage.packages {
        let path = stage.archive(published);
        let metadata = fs::metadata(&path).unwrap();
        assert_eq!(metadata.len(), published.bytes.len() as u64);
        // tar -S takes a file without blocks for a hole and stores zeros.
        assert_eq!(metadata.blocks(), metadata.len().div_ceil(512));
        let copy = scratch.join(published.archive_name());
        run(Command::new("cp").arg(&path).arg(&copy)).ok();
        assert_holds(&copy, &published.bytes);
        let info = run(Command::new("dpkg-deb").arg("-I").arg(&path)).ok();
        assert!(info.out.contains(&format!("Package: {}\n", published.package.name)), "{info}");
    }
    assert_eq!(stage.debs().len(), PAYLOADS.len(), "what was opened is here");
    let opened = stage.machine.status().archives().ghosts_opened;
    assert_eq!(opened, PAYLOADS.len() as u64);
    report("ghosts::cp_and_dpkg", &format!("{opened} lengths opened by cp and dpkg-deb, each right"));
}

/// dpkg reads a package several times, through dpkg-split and dpkg-deb, while it holds its own locks.
#[test]
fn dpkg_installs_what_is_not_here() {
    let stage = Stage::mounted(one(700_000), &Options { apt: Apt::Trixie, ..Options::default() });
    let path = stage.machine.inside(&stage.archive(&stage.packages[0]));
    run(&mut stage.machine.command("dpkg", &[std::ffi::OsStr::new("-i"), path.as_os_str()])).ok();
    let want = crate::harness::repo::noise("one 1.0", 700_000);
    assert_holds(&stage.machine.root().join("usr/share/one/payload"), &want);
    assert_eq!(stage.machine.status().archives().ghosts_opened, 1);
    report("ghosts::dpkg_installs", "dpkg -i of a package that is not here, in a chroot: 1 ghost opened");
}

/// `tar -S` looks at the blocks, `cp --reflink=auto` tries to clone, `cat` splices, mmap maps: all must see the bytes.
#[test]
fn every_way_to_read() {
    let ways: &[(&str, &str)] = &[
        ("tar", "tar -cSf - -C \"$(dirname \"$1\")\" \"$(basename \"$1\")\" | tar -xOf -"),
        ("cat", "cat \"$1\""),
        ("dd", "dd if=\"$1\" bs=4097 status=none"),
        ("tail", "tail -c +1 \"$1\""),
        (
            "mmap",
            "/usr/bin/python3 -c 'import mmap, sys; f = open(sys.argv[1], \"rb\"); sys.stdout.buffer.write(mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ)[:])' \"$1\"",
        ),
    ];
    let packages = ways.iter().map(|(name, _)| Package::new(name, "1.0", 600_000)).collect();
    let stage = Stage::mounted(packages, &Options::default());
    for ((name, script), published) in ways.iter().zip(&stage.packages) {
        let copy = stage.machine.scratch().join(name);
        let script = format!("set -e; ({script}) > \"$2\"");
        run(Command::new("sh").args(["-c", &script, "sh"]).arg(stage.archive(published)).arg(&copy)).ok();
        assert_holds(&copy, &published.bytes);
    }
}

/// What poolfs shows of a file to whoever asks: without it nobody could tell where bytes came from.
#[test]
fn extended_attributes_tell_the_origin() {
    let stage = Stage::mounted(one(3_000), &Options::default());
    stage.download_all().ok();
    let path = stage.archive(&stage.packages[0]);
    let value = |name: &str| attribute(&path, &format!("user.poolfs.{name}")).unwrap();
    assert!(value("digest").contains(&stage.packages[0].digest), "{}", value("digest"));
    assert_eq!(value("source"), "mirror");
    assert!(!value("state").is_empty() && !value("announced").is_empty());
    let all = run(Command::new("getfattr").args(["-d", "-m", "user.poolfs"]).arg(&path)).ok();
    assert_eq!(all.out.matches("user.poolfs.").count(), 4, "{all}");
    run(Command::new("setfattr").args(["-n", "user.poolfs.digest", "-v", "x"]).arg(&path)).failed();
}

/// One fault of the mirror towards poolfs, by name.
fn faults() -> Vec<(&'static str, Fault)> {
    let (closed, nearly_closed) = (Gate::new(), Gate::new());
    nearly_closed.let_through(100);
    vec![
        ("gone", Fault::Status(404)),
        ("broken", Fault::Status(500)),
        ("forbidden", Fault::Status(403)),
        ("html", Fault::Html),
        ("short", Fault::Short(1_000)),
        ("reset", Fault::Reset(70_000)),
        ("truncated", Fault::Truncated(1)),
        ("long", Fault::Long(1)),
        ("wrong", Fault::Wrong(300_000)),
        ("wrong-at-start", Fault::Wrong(0)),
        ("redirected", Fault::RedirectLoop),
        ("whole", Fault::IgnoreRange),
        ("stalled", Fault::StallBody(closed.clone())),
        ("dripping", Fault::Drip(nearly_closed)),
    ]
}

/// Seconds matter to none of these: shorter patience only ends the stalls sooner.
const IMPATIENT: &str = "\n[mirror]\nconnect_timeout_s = 2\nfirst_byte_timeout_s = 2\nstall_timeout_s = 2\n";

fn undeliverable(apt: Apt) {
    let faults = faults();
    let mut packages: Vec<Package> = faults.iter().map(|(name, _)| Package::new(name, "1.0", 600_000)).collect();
    packages.push(Package::new("good", "1.0", 600_000));
    let stage = Stage::mounted(packages, &Options { apt, poolfs_toml: IMPATIENT.into(), ..Options::default() });
    for ((_, fault), published) in faults.iter().zip(&stage.packages) {
        stage.mirror.fault(&published.filename, Client::Poolfs, fault.clone());
    }
    let finished = stage.download_all().ok();
    stage.assert_all_here();
    let mut fetched_by_apt = finished.deb_gets();
    fetched_by_apt.sort_unstable();
    fetched_by_apt.dedup();
    // A mirror that sends the whole file where a piece was asked for may still be used; a good package must not suffer.
    assert!(!fetched_by_apt.iter().any(|path| path.contains("/good_")), "{finished}");
    assert!(fetched_by_apt.len() >= faults.len() - 1, "wrong bytes were taken: {fetched_by_apt:?}");
    report(
        &format!("ghosts::undeliverable {apt:?}"),
        &format!("exit 0 with {} faults of the mirror, {} packages fetched by apt itself", faults.len(), fetched_by_apt.len()),
    );
}

/// Whatever the mirror gives poolfs, apt must come to its package, as it would have without poolfs.
#[test]
fn undeliverable_leaves_apt_at_exit_0_own() {
    undeliverable(Apt::Own);
}

/// As `undeliverable_leaves_apt_at_exit_0_own`, for apt 3.0.
#[test]
fn undeliverable_leaves_apt_at_exit_0_trixie() {
    undeliverable(Apt::Trixie);
}

/// A program that is not apt gets an error, never wrong bytes and never an empty file that looks whole.
#[test]
fn undeliverable_is_an_error_elsewhere() {
    let stage = Stage::mounted(one(600_000), &Options::default());
    stage.mirror.fault(".deb", Client::Poolfs, Fault::Wrong(5));
    let path = stage.archive(&stage.packages[0]);
    run(Command::new("cat").arg(&path)).failed().says("Input/output error");
    let log = stage.machine.log();
    let lines: Vec<_> = log.lines().filter(|line| line.contains("one_1.0_all.deb")).collect();
    assert!(!lines.is_empty(), "the log does not say why: {log}");
    assert_eq!(stage.debs(), Vec::<String>::new());
}

/// An index that names a size or a digest that the mirror's file does not have: apt alone fails, and so it stays.
#[test]
fn a_mirror_that_contradicts_its_index_is_apts_to_report() {
    let stage = Stage::mounted(one(600_000), &Options::default());
    stage.mirror.fault(".deb", None, Fault::Wrong(5));
    stage.download_all().failed().says("Hash Sum mismatch");
    assert_eq!(stage.debs(), Vec::<String>::new());
    // No ghost for that digest for a while, but apt's own way is open as soon as the mirror is right.
    stage.mirror.heal();
    stage.download_all().ok();
    stage.assert_all_here();
}

/// A directory that hangs while one file waits would hang every program that looks at it.
#[test]
fn ls_answers_during_a_stalled_read() {
    let stage = Stage::mounted(vec![Package::new("one", "1.0", 600_000), Package::new("two", "1.0", 3_000)], &Options::default());
    let gate = Gate::new();
    stage.mirror.fault("one_1.0_all.deb", Client::Poolfs, Fault::Stall(gate.clone()));
    let reader = Running::start(Command::new("cat").arg(stage.archive(&stage.packages[0])));
    stage.mirror.await_request(Client::Poolfs, "one_1.0_all.deb");
    for directory in [stage.machine.archives(), stage.machine.lists()] {
        run(Command::new("ls").arg("-la").arg(directory)).ok();
    }
    run(Command::new("ls").arg("-la").arg(stage.archive(&stage.packages[0]))).ok();
    run(Command::new("cat").arg(stage.archive(&stage.packages[1]))).ok();
    run(Command::new("sh").args(["-c", "echo x > \"$1\" && rm \"$1\"", "sh"]).arg(stage.machine.archives().join("new"))).ok();
    let downloads = stage.machine.status().downloads;
    assert!(downloads.iter().any(|download| download["name"] == "one_1.0_all.deb"), "{downloads:?}");
    gate.open();
    let read = reader.wait().ok();
    assert_eq!(read.out.len(), String::from_utf8_lossy(&stage.packages[0].bytes).len());
    report("ghosts::ls_during_a_stalled_read", "ls, stat, another ghost, a write and status answer while a read waits");
}

/// 64 waiting reads must take neither the FUSE threads nor the kernel's queue from those who ask for something that is here.
#[test]
fn sixty_four_stalled_reads() {
    let packages = (0..64).map(|number| Package::new(&format!("p{number:02}"), "1.0", 2_000)).collect();
    let stage = Stage::mounted(packages, &Options::default());
    let gate = Gate::new();
    stage.mirror.fault(".deb", Client::Poolfs, Fault::Stall(gate.clone()));
    let readers: Vec<_> =
        stage.packages.iter().map(|published| Running::start(Command::new("cat").arg(stage.archive(published)))).collect();
    // Each reader's request is one that arrives at the daemon and waits there.
    let all = || stage.machine.status().downloads.len() == 64;
    let deadline = std::time::Instant::now() + crate::harness::LIMIT;
    while !all() {
        assert!(std::time::Instant::now() < deadline, "64 readers do not make 64 downloads: {:#?}", stage.machine.status());
    }
    run(Command::new("ls").arg("-la").arg(stage.machine.archives())).ok();
    run(Command::new("ls").arg("-la").arg(stage.machine.lists())).ok();
    stage.machine.update();
    run(Command::new("sh").args(["-c", "echo x > \"$1\" && cat \"$1\" && rm \"$1\"", "sh"]).arg(stage.machine.archives().join("new"))).ok();
    gate.open();
    for reader in readers {
        reader.wait().ok();
    }
    stage.assert_all_here();
    report("ghosts::sixty_four_stalled_reads", "ls, update and a write answer while 64 reads wait");
}

/// A mount of its own for people to look through: everything the catalog knows, nothing that can be changed.
#[test]
fn browse_lists_everything() {
    let stage = Stage::new(vec![Package::new("one", "1.0", 3_000), Package::new("two", "1.0", 3_000)], &Options::default());
    stage.machine.update();
    let directory = stage.machine.root().join("browse");
    fs::create_dir(&directory).unwrap();
    run(stage.machine.poolfs_command(&["mount", "archives"]).arg(&directory).args(["-o", "ro,browse"])).ok();
    let mounted = crate::harness::mounts::at(&directory);
    assert!(mounted.len() == 1 && mounted[0].options.split(',').any(|option| option == "ro"), "{mounted:?}");
    // The lists are read in the background; a lookup of a package waits for that.
    assert!(!directory.join("no-such-package_0_all.deb").exists());
    let names = listed(&directory);
    assert!(names.contains(&"one_1.0_all.deb".to_owned()) && names.contains(&"two_1.0_all.deb".to_owned()), "{names:?}");
    assert_holds(&directory.join("one_1.0_all.deb"), &stage.packages[0].bytes);
    run(Command::new("touch").arg(directory.join("new"))).failed().says("Read-only file system");
    stage.machine.poolfs(&["down"]).ok();
    assert_eq!(crate::harness::mounts::at(&directory).len(), 0);
}

/// apt stands at 0 %: `watch` is where the progress is.
#[test]
fn watch_shows_what_arrives() {
    use std::io::{BufRead as _, BufReader};
    let stage = Stage::mounted(one(600_000), &Options::default());
    let gate = Gate::new();
    stage.mirror.fault(".deb", Client::Poolfs, Fault::StallBody(gate.clone()));
    let reader = Running::start(Command::new("cat").arg(stage.archive(&stage.packages[0])));
    stage.mirror.await_request(Client::Poolfs, "one_1.0_all.deb");
    let mut watch = stage.machine.poolfs_command(&["watch", "--json"]).stdout(std::process::Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(watch.stdout.take().unwrap()).lines();
    let shown = lines.by_ref().map(|line| line.unwrap()).find(|line| line.contains("one_1.0_all.deb"));
    watch.kill().unwrap();
    watch.wait().unwrap();
    assert!(shown.is_some(), "watch ended without a word");
    gate.open();
    reader.wait().ok();
}
