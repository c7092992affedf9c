//! Everybody at once: readers, writers, renames, removals and evictions on one mount, while the quota shrinks and grows.
//!
//! What holds at any moment is checked at any moment: a package reads as its repository's bytes, a name that is only ever
//! replaced by rename is always there and whole, a listing names everything once.

use crate::harness::disk::Dice;
use crate::harness::{Options, Package, Stage, listed, report, run};
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Names that are replaced by rename and never removed.
const SLOTS: u64 = 4;

/// Bytes that tell by themselves whether they are whole: the version, and what follows from it.
fn content(version: u64) -> Vec<u8> {
    let mut noise = Dice::new(version);
    let len = usize::try_from(8 + noise.below(300_000)).unwrap();
    let mut bytes = version.to_le_bytes().to_vec();
    while bytes.len() < len {
        bytes.extend(u32::try_from(noise.below(1 << 31)).unwrap().to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

#[track_caller]
fn assert_whole(path: &Path, bytes: &[u8]) {
    let version = u64::from_le_bytes(bytes[..8].try_into().expect("at least a version"));
    assert!(bytes == content(version), "{}: {} bytes that are not version {version}", path.display(), bytes.len());
}

struct Site<'a> {
    stage: &'a Stage,
    archives: PathBuf,
    operations: AtomicU64,
    over: AtomicBool,
    seed: u64,
}

impl Site<'_> {
    fn dice(&self, who: u64) -> Dice {
        Dice::new(self.seed * 100 + who)
    }

    fn slot(&self, dice: &mut Dice) -> PathBuf {
        self.archives.join(format!("slot{}", dice.below(SLOTS)))
    }

    fn package(&self, dice: &mut Dice) -> (PathBuf, &[u8]) {
        let chosen = usize::try_from(dice.below(self.stage.packages.len() as u64)).unwrap();
        let package = &self.stage.packages[chosen];
        (self.stage.archive(package), &package.bytes)
    }

    fn done(&self) {
        self.operations.fetch_add(1, Ordering::Relaxed);
    }

    fn read(&self, who: u64, times: u32) {
        let mut dice = self.dice(who);
        for _ in 0..times {
            if dice.below(2) == 0 {
                let path = self.slot(&mut dice);
                assert_whole(&path, &fs::read(&path).unwrap_or_else(|err| panic!("{}: {err}", path.display())));
            } else {
                let (path, want) = self.package(&mut dice);
                match fs::read(&path) {
                    Ok(bytes) => assert!(bytes == want, "{} has wrong bytes", path.display()),
                    // It may be removed between its lookup and its opening; and of what is removed before it has come, the bytes
                    // cannot be had any more.
                    Err(err) => assert!(matches!(err.raw_os_error(), Some(libc::ENOENT | libc::EIO)), "{}: {err}", path.display()),
                }
            }
            self.done();
        }
    }

    fn write(&self, who: u64, times: u32) {
        let mut dice = self.dice(who);
        let temp = self.archives.join(format!("partial/writer{who}"));
        for time in 0..times {
            fs::write(&temp, content(u64::from(time) * 100 + who)).unwrap();
            let slot = self.slot(&mut dice);
            fs::rename(&temp, &slot).unwrap();
            self.done();
        }
    }

    fn remove(&self, who: u64, times: u32) {
        let mut dice = self.dice(who);
        for _ in 0..times {
            let (path, _) = self.package(&mut dice);
            if let Err(err) = fs::remove_file(&path) {
                assert_eq!(err.kind(), std::io::ErrorKind::NotFound, "{}: {err}", path.display());
            }
            self.done();
        }
    }

    fn list(&self) {
        while !self.over.load(Ordering::Relaxed) {
            let names = listed(&self.archives);
            let distinct: BTreeSet<&String> = names.iter().collect();
            assert_eq!(distinct.len(), names.len(), "{names:?}");
            for slot in 0..SLOTS {
                assert!(distinct.contains(&format!("slot{slot}")), "slot{slot} is missing in {names:?}");
            }
            let long = run(Command::new("ls").arg("-l").arg(self.archives.join("partial")));
            // A file may be gone before `ls` looks at it.
            assert!([0, 1].contains(&long.code()), "{long}");
            self.done();
        }
    }

    fn reload(&self) {
        run(Command::new(env!("CARGO_BIN_EXE_poolfs")).args(["config", "reload", "--config"]).arg(self.stage.machine.config())).ok();
    }

    /// The quota goes up and down, to nothing at times.
    fn squeeze(&self) {
        let config = self.stage.machine.config();
        let text = fs::read_to_string(&config).unwrap();
        for quota in ["300 KiB", "0 B", "2 MiB", "1 B", "1 GiB"].into_iter().cycle() {
            if self.over.load(Ordering::Relaxed) {
                break;
            }
            fs::write(&config, text.replace("1 GiB", quota)).unwrap();
            self.reload();
            self.done();
        }
        fs::write(&config, &text).unwrap();
        self.reload();
    }
}

/// Descriptors that the daemon has open.
fn descriptors(pid: u32) -> usize {
    fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count()
}

fn stress(seed: u64, times: u32) {
    let packages = [("ant", 3_000), ("bee", 262_145), ("cat", 700_000), ("dog", 70_000), ("eel", 1)];
    let packages = packages.iter().map(|(name, bytes)| Package::new(name, "1", *bytes)).collect();
    let stage = Stage::mounted(packages, &Options::default());
    let archives = stage.machine.archives();
    for slot in 0..SLOTS {
        fs::write(archives.join(format!("slot{slot}")), content(slot)).unwrap();
    }
    let pid = stage.machine.status().pid;
    let site = Site { stage: &stage, archives, operations: AtomicU64::new(0), over: AtomicBool::new(false), seed };
    std::thread::scope(|scope| {
        let site = &site;
        let mut busy = Vec::new();
        for who in 0..3 {
            busy.push(scope.spawn(move || site.read(who, times)));
        }
        for who in 3..5 {
            busy.push(scope.spawn(move || site.write(who, times)));
        }
        busy.push(scope.spawn(move || site.remove(5, times)));
        scope.spawn(move || site.list());
        scope.spawn(move || site.squeeze());
        let failed = busy.into_iter().map(std::thread::ScopedJoinHandle::join).filter(Result::is_err).count();
        site.over.store(true, Ordering::Relaxed);
        assert_eq!(failed, 0, "threads that met something wrong");
    });
    assert_eq!(stage.machine.pid(), Some(pid), "the daemon did not live through it");
    for slot in 0..SLOTS {
        let path = site.archives.join(format!("slot{slot}"));
        assert_whole(&path, &fs::read(&path).unwrap());
    }
    stage.download_all().ok();
    stage.assert_all_here();
    stage.machine.poolfs(&["verify"]).ok();
    let open = descriptors(pid);
    assert!(open < 200, "{open} descriptors are open when nobody uses anything");
    let said = format!(
        "seed {seed}: {} operations of 8 threads, nothing wrong was read, {open} descriptors at the end",
        site.operations.load(Ordering::Relaxed)
    );
    report("stress", &said);
    eprintln!("{said}");
}

/// Some seconds of it.
#[test]
fn stress_short() {
    stress(1, 60);
}

/// The same for long; run by `scripts/soak stress`.
#[test]
#[ignore = "takes long: scripts/soak stress"]
fn stress_long() {
    for seed in 1..=10 {
        stress(seed, 4_000);
    }
}
