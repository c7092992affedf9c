//! Power losses: what was not synced is gone, or half there.

use super::{Expect, NAMES, World, shown};
use crate::harness::disk::{Dice, Disk, Journal};
use crate::harness::machine::await_end;
use crate::harness::process::with_argument;
use crate::harness::{Covered, Stage, assert_holds, mounts, report};
use rustix::process::{Signal, kill_process};
use std::fs;
use std::io;
use std::sync::Arc;

/// The two disks of a machine: the one below apt's archives and poolfs's cache, and the one with the database.
pub(super) struct Disks {
    pub(super) cache: Disk,
    pub(super) state: Disk,
}

impl Disks {
    pub(super) fn of(stage: &Stage) -> Self {
        let cache_at = stage.machine.root().join("var/cache");
        let state_at = stage.machine.state_dir();
        fs::create_dir_all(&state_at).unwrap();
        let (cache, state) = (Disk::mount(&cache_at), Disk::mount(&state_at));
        fs::create_dir_all(stage.machine.archives().join("partial")).unwrap();
        fs::create_dir_all(stage.machine.cache_dir()).unwrap();
        cache.sync();
        state.sync();
        Self { cache, state }
    }
}

impl World {
    /// A world on disks that lose what was not synced.
    pub(super) fn on_disks(seed: u64, syncs: bool) -> (Self, Disks) {
        let mut disks = None;
        let world = Self::new(seed, syncs, |stage| disks = Some(Disks::of(stage)));
        (world, disks.expect("prepared"))
    }

    /// Everything of poolfs dies at once, and its mounts with it.
    pub(super) fn die(&self) {
        // The network process names only its own directory.
        let directory = self.stage.machine.config().parent().unwrap().to_string_lossy().into_owned();
        let processes = with_argument(&directory);
        // First stopped, so that the parent does not tidy up what a power loss would not.
        for signal in [Signal::STOP, Signal::KILL] {
            for pid in &processes {
                let _ = kill_process(*pid, signal);
            }
        }
        for pid in processes {
            await_end(pid.as_raw_nonzero().get().unsigned_abs());
        }
        for directory in [self.stage.machine.archives(), self.stage.machine.lists()] {
            for _ in mounts::at(&directory) {
                rustix::mount::unmount(&directory, rustix::mount::UnmountFlags::DETACH).unwrap();
            }
        }
    }

    /// Ends everything that uses the disks, then these.
    pub(super) fn end(mut self, disks: Disks) {
        self.die();
        self.covered = Covered::open(self.stage.machine.root());
        drop(disks);
    }

    /// Takes the power away from machine and disks, and starts again.
    fn power_cycle(&mut self, disks: Disks, journal: Journal) -> Disks {
        self.die();
        // A descriptor would keep the old disk.
        self.covered = Covered::open(self.stage.machine.root());
        let mut dice = Dice::new(self.dice.below(1 << 30));
        let Disks { cache, state } = disks;
        let disks = Disks { cache: cache.lose_power(journal, &mut dice), state: state.lose_power(journal, &mut dice) };
        // What Debian's tmpfiles and packages would make again.
        for directory in [self.stage.machine.archives().join("partial"), self.stage.machine.cache_dir()] {
            fs::create_dir_all(directory).unwrap();
        }
        self.covered = Covered::open(&self.stage.machine.archives());
        self.up();
        disks
    }

    /// As `check`, of what was synced. What was not is whatever the disk has; a reader of it gets that, or EIO where poolfs knows
    /// that it is not what was written.
    fn check_synced(&mut self, what: &str) {
        self.hidden.clear();
        for name in NAMES {
            let on_disk = fs::read(self.covered.path(name)).ok().map(Arc::new);
            let found = match fs::read(self.path(name)) {
                Ok(bytes) => Some(Arc::new(bytes)),
                Err(err) if err.kind() == io::ErrorKind::NotFound => None,
                Err(err) if err.raw_os_error() == Some(libc::EIO) && !matches!(self.own[name], Expect::Is(_)) => {
                    // Whoever wrote it has to write it again.
                    fs::remove_file(self.path(name)).unwrap();
                    self.own.insert(name, Expect::Is(None));
                    continue;
                }
                Err(err) => panic!("{what}: {name} was {} and cannot be read: {err}", self.own[name].shown()),
            };
            assert!(found == on_disk, "{what}: {name} is read as {} and is {} on the disk", shown(&found), shown(&on_disk));
            assert!(self.own[name].allows(&found), "{what}: {name} is {} and should be {}", shown(&found), self.own[name].shown());
            self.own.insert(name, Expect::Is(found));
        }
        for package in &self.stage.packages {
            // Through the mount it is the package, or nothing; on the disk it may be half written only under another name.
            assert_holds(&self.stage.archive(package), &package.bytes);
        }
    }
}

fn power(seed: u64, times: u32, journal: Journal) {
    let (mut world, mut disks) = World::on_disks(seed, true);
    for time in 0..times {
        let mut told = Vec::new();
        let mut here = Vec::new();
        for _ in 0..2 + world.dice.below(8) {
            told.push(world.operate().unwrap());
        }
        for package in &world.stage.packages {
            // What a program was given is on the disk, and what it was not may be.
            if fs::exists(world.covered.path(&package.archive_name())).unwrap()
                && told.iter().any(|told| told == &format!("read {}", package.archive_name()))
            {
                here.push(package.archive_name());
            }
        }
        let last = world.unsynced();
        told.push(last);
        let what = format!("seed {seed}, {journal:?}, power loss {time}, {}", told.join("; "));
        disks = world.power_cycle(disks, journal);
        for name in here {
            assert!(fs::exists(world.covered.path(&name)).unwrap(), "{what}: {name} was read and is gone");
        }
        world.check_synced(&what);
        world.apt_works();
    }
    world.end(disks);
}

impl World {
    /// A write or a change of names that nobody syncs: the machine stops in the middle of something.
    fn unsynced(&mut self) -> String {
        self.syncs = false;
        let done = if self.dice.below(2) == 0 { self.write() } else { self.remove() };
        let told = done.unwrap();
        for touched in NAMES {
            if told.contains(touched) {
                self.own.insert(touched, Expect::OnDisk);
            }
        }
        self.syncs = true;
        format!("{told} (not synced)")
    }
}

/// One loss of each kind.
#[test]
fn power_short() {
    power(3, 2, Journal::Ordered);
    report("crashes::power_short", "2 power losses: nothing synced is lost, apt works after each");
}

/// The same for long; run by `scripts/soak power`.
#[test]
#[ignore = "takes long: scripts/soak power"]
fn power_long() {
    for seed in 0..10 {
        power(seed, 15, Journal::Ordered);
        power(seed, 15, Journal::Strict);
        eprintln!("seed {seed}: 30 power losses, 0 synced files lost, 0 wrong bytes read, apt worked right after each");
    }
    report("crashes::power_long", "300 power losses: 0 synced files lost, 0 wrong bytes read, apt worked right after each");
    eprintln!("300 power losses: 0 synced files lost, 0 wrong bytes read, apt worked right after each");
}
