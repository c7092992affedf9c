//! Deaths at every step and at any moment: what was acknowledged is there afterwards, no reader gets wrong bytes, and apt works.
//!
//! [`World`] does what programs do below the mount and keeps a manifest: of each path what a program was told is there, and
//! of the one operation in flight what it may have left. `kills` takes the processes away, `power` the machine, `disk` lets
//! the disk fail.

mod disk;
mod kills;
mod power;

use crate::harness::disk::Dice;
use crate::harness::{Covered, Options, Package, Stage, assert_holds, run};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;

/// Names that the operations use for files of their own.
const NAMES: &[&str] = &["alpha", "beta", "gamma.bin", "delta.deb", "epsilon", "zeta"];

/// The longest of these files, in bytes: several pieces.
const BYTES_MAX: u64 = 600_000;

/// A quota that holds two of the packages, so that what apt removes evicts what it removed before.
const QUOTA: &str = "900 KiB";

/// What may be found under a path.
#[derive(Clone, Debug)]
enum Expect {
    /// Exactly this: somebody was told so. `None`: nothing.
    Is(Option<Arc<Vec<u8>>>),
    /// One of these: an operation on names was under way.
    OneOf(Vec<Option<Arc<Vec<u8>>>>),
    /// It was being written: whatever is on the disk, if anything is.
    OnDisk,
}

/// A repository, a machine, and what its programs believe.
struct World {
    stage: Stage,
    covered: Covered,
    dice: Dice,
    own: BTreeMap<&'static str, Expect>,
    /// Packages that were removed: their names may be hidden until apt runs, or the daemon is another one.
    hidden: BTreeSet<usize>,
    /// Every operation waits for the disk: what it says then outlives a power loss.
    syncs: bool,
    /// The daemon looks here for the point where it is to die.
    crash_file: PathBuf,
    written: u64,
}

/// What an operation did, for messages.
type Told = String;

impl World {
    /// With everything mounted and updated. `prepare` sees the machine before anything of poolfs is there.
    fn new(seed: u64, syncs: bool, prepare: impl FnOnce(&Stage)) -> Self {
        let packages = [("ant", 3_000), ("bee", 262_145), ("cat", 700_000), ("dog", 400_000)];
        let packages = packages.iter().map(|(name, bytes)| Package::new(name, "1", *bytes)).collect();
        let stage = Stage::new(packages, &Options { quota: QUOTA, ..Options::default() });
        prepare(&stage);
        let covered = Covered::open(&stage.machine.archives());
        let crash_file = stage.machine.scratch().join("crash");
        let own = NAMES.iter().map(|name| (*name, Expect::Is(None))).collect();
        let world = Self { stage, covered, dice: Dice::new(seed), own, hidden: BTreeSet::new(), syncs, crash_file, written: 0 };
        world.up();
        world.stage.machine.update();
        world
    }

    fn up(&self) {
        run(self.stage.machine.poolfs_command(&["up"]).env("POOLFS_CRASH_FILE", &self.crash_file)).ok();
        self.stage.machine.assert_mounted();
    }

    /// As [`World::up`] after a death that came while it started: what is armed is taken by the first attempt.
    fn up_again(&self) {
        let first = run(self.stage.machine.poolfs_command(&["up"]).env("POOLFS_CRASH_FILE", &self.crash_file));
        if !first.status.success() {
            self.up();
        }
        self.stage.machine.assert_mounted();
    }

    fn path(&self, name: &str) -> PathBuf {
        self.stage.machine.archives().join(name)
    }

    fn name(&mut self) -> &'static str {
        NAMES[usize::try_from(self.dice.below(NAMES.len() as u64)).unwrap()]
    }

    /// Bytes that no other file has, of a length that none had: overwriting behind the mount in place and at the same size is
    /// what rot looks like.
    fn content(&mut self) -> Arc<Vec<u8>> {
        self.written += 1;
        let len = self.dice.below(BYTES_MAX) / 64 * 64 + self.written % 64 + 1;
        let mut noise = Dice::new(self.written);
        let bytes: Vec<u8> = (0..len.div_ceil(4)).flat_map(|_| u32::try_from(noise.below(1 << 31)).unwrap().to_le_bytes()).collect();
        Arc::new(bytes[..usize::try_from(len).unwrap()].to_vec())
    }

    fn expected(&self, name: &str) -> Option<Arc<Vec<u8>>> {
        match &self.own[name] {
            Expect::Is(content) => content.clone(),
            other => panic!("{name} was not looked at since {other:?}"),
        }
    }

    fn sync_directory(&self) -> io::Result<()> {
        if self.syncs { File::open(self.stage.machine.archives())?.sync_all() } else { Ok(()) }
    }

    /// One thing that a program does. The manifest says what may be there before it begins, and what is there when it ends.
    fn operate(&mut self) -> io::Result<Told> {
        match self.dice.below(11) {
            0..=2 => self.write(),
            3 => self.exchange_or_move(),
            4 => self.remove(),
            5 => self.append(),
            6..=8 => self.read_package(),
            _ => self.remove_package(),
        }
    }

    fn write(&mut self) -> io::Result<Told> {
        let (name, content) = (self.name(), self.content());
        self.own.insert(name, Expect::OnDisk);
        let mut file = File::create(self.path(name))?;
        for part in content.chunks(70_000) {
            file.write_all(part)?;
        }
        if self.syncs {
            file.sync_all()?;
        }
        drop(file);
        self.sync_directory()?;
        self.own.insert(name, Expect::Is(Some(Arc::clone(&content))));
        Ok(format!("write {name} {}", content.len()))
    }

    fn append(&mut self) -> io::Result<Told> {
        let name = self.name();
        let Some(before) = self.expected(name) else { return Ok(format!("nothing to append to in {name}")) };
        self.own.insert(name, Expect::OnDisk);
        let mut file = OpenOptions::new().append(true).open(self.path(name))?;
        file.write_all(b"and more")?;
        if self.syncs {
            file.sync_all()?;
        }
        drop(file);
        self.own.insert(name, Expect::Is(Some(Arc::new([before.as_slice(), b"and more"].concat()))));
        Ok(format!("append to {name}"))
    }

    fn exchange_or_move(&mut self) -> io::Result<Told> {
        let (from, to) = (self.name(), self.name());
        let (Some(moved), there) = (self.expected(from), self.expected(to)) else { return Ok(format!("nothing to move in {from}")) };
        if from == to {
            return Ok(format!("{from} stays"));
        }
        let exchange = there.is_some() && self.dice.below(2) == 0;
        let (left, flags) =
            if exchange { (there.clone(), rustix::fs::RenameFlags::EXCHANGE) } else { (None, rustix::fs::RenameFlags::empty()) };
        self.own.insert(from, Expect::OneOf(vec![Some(Arc::clone(&moved)), left.clone()]));
        self.own.insert(to, Expect::OneOf(vec![there, Some(Arc::clone(&moved))]));
        rustix::fs::renameat_with(rustix::fs::CWD, self.path(from), rustix::fs::CWD, self.path(to), flags)?;
        self.sync_directory()?;
        self.own.insert(from, Expect::Is(left));
        self.own.insert(to, Expect::Is(Some(moved)));
        Ok(format!("{} {from} {to}", if exchange { "exchange" } else { "move" }))
    }

    fn remove(&mut self) -> io::Result<Told> {
        let name = self.name();
        let Some(before) = self.expected(name) else { return Ok(format!("nothing to remove in {name}")) };
        self.own.insert(name, Expect::OneOf(vec![Some(before), None]));
        fs::remove_file(self.path(name))?;
        self.sync_directory()?;
        self.own.insert(name, Expect::Is(None));
        Ok(format!("remove {name}"))
    }

    /// Whoever reads a package that is not here makes it arrive; what he has read stays.
    fn read_package(&mut self) -> io::Result<Told> {
        let chosen = usize::try_from(self.dice.below(self.stage.packages.len() as u64)).unwrap();
        let package = &self.stage.packages[chosen];
        // In a process of its own, since a thread of this one may be stuck in a request of a mount that died.
        let finished = run(Command::new("cat").arg(self.stage.archive(package)).env("LC_ALL", "C"));
        if !finished.status.success() {
            if self.hidden.contains(&chosen) && finished.err.contains("No such file or directory") {
                return Ok(format!("{} is hidden", package.archive_name()));
            }
            return Err(io::Error::other(format!("cat {}: {}", package.archive_name(), finished.err.trim())));
        }
        Ok(format!("read {}", package.archive_name()))
    }

    fn remove_package(&mut self) -> io::Result<Told> {
        let chosen = usize::try_from(self.dice.below(self.stage.packages.len() as u64)).unwrap();
        let package = &self.stage.packages[chosen];
        match fs::remove_file(self.stage.archive(package)) {
            Err(err) if err.kind() == io::ErrorKind::NotFound => {}
            other => other?,
        }
        self.hidden.insert(chosen);
        Ok(format!("remove {}", package.archive_name()))
    }

    /// After a death: everything as the manifest has it, and from here on as it was found.
    #[track_caller]
    fn check(&mut self, what: &str) {
        self.hidden.clear();
        for name in NAMES {
            let found = match fs::read(self.path(name)) {
                Ok(bytes) => Some(Arc::new(bytes)),
                Err(err) if err.kind() == io::ErrorKind::NotFound => None,
                Err(err) => panic!("{what}: {name} was {:?} and cannot be read: {err}", self.own[name].shown()),
            };
            let on_disk = fs::read(self.covered.path(name)).ok().map(Arc::new);
            assert!(found == on_disk, "{what}: {name} is read as {} and is {} on the disk", shown(&found), shown(&on_disk));
            let expected = &self.own[name];
            assert!(expected.allows(&found), "{what}: {name} is {} and should be {}", shown(&found), expected.shown());
            self.own.insert(name, Expect::Is(found));
        }
        for package in &self.stage.packages {
            // Not through the mount first: whether it is here is asked, not whether it can be had.
            if let Ok(bytes) = fs::read(self.covered.path(&package.archive_name())) {
                assert!(bytes == package.bytes, "{what}: {} has wrong bytes on the disk", package.archive_name());
                assert_holds(&self.stage.archive(package), &package.bytes);
            }
        }
    }

    /// A real apt fetches a package, by whatever way.
    #[track_caller]
    fn apt_works(&self) {
        self.stage.machine.apt_get(&["install", "-y", "-d", "--reinstall", "ant"]).ok();
        assert_holds(&self.stage.archive(&self.stage.packages[0]), &self.stage.packages[0].bytes);
    }
}

impl Expect {
    fn allows(&self, found: &Option<Arc<Vec<u8>>>) -> bool {
        match self {
            Self::Is(content) => content == found,
            Self::OneOf(contents) => contents.contains(found),
            Self::OnDisk => true,
        }
    }

    fn shown(&self) -> String {
        match self {
            Self::Is(content) => shown(content),
            Self::OneOf(contents) => contents.iter().map(shown).collect::<Vec<_>>().join(" or "),
            Self::OnDisk => "anything".to_owned(),
        }
    }
}

fn shown(content: &Option<Arc<Vec<u8>>>) -> String {
    content.as_ref().map_or_else(|| "nothing".to_owned(), |bytes| format!("{} bytes", bytes.len()))
}
