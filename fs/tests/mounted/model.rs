//! The filesystem without the kernel, against a model of a few lines.
//!
//! The model is a `BTreeMap` from path to bytes, a set of names that were taken away, and the catalog. Random operations
//! go to both: files written, cut, renamed and removed, ghosts read by apt and by others, blocks that rot, objects evicted,
//! restarts, and crashes (the directories as they are on disk at that moment, taken over by a new process's tree). After
//! each operation the listings agree; at the end every file is read, in an order of its own.

use crate::lab::{FakeNames, FakeSource, Mood, bytes};
use poolfs_core::catalog::{Entry, MirrorUrl};
use poolfs_core::store::{Incoming, Objects, Store};
use poolfs_core::{Digest, Role};
use poolfs_fs::errno::FsError;
use poolfs_fs::fetch::{FetchLimits, Fetcher};
use poolfs_fs::names::Names;
use poolfs_fs::repair::{RepairLimits, Repairer};
use poolfs_fs::source::Source;
use poolfs_fs::tree::{Caller, Tree, TreeOptions, TreeParts};
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::Arc;
use tempfile::TempDir;

const ROOT: u64 = 1;
const CASES: u32 = 64;
const OPERATIONS_MAX: usize = 40;

/// Names in play: the first ones are in the catalog, with these lengths.
const NAMES: [&str; 5] = ["small_1_all.deb", "piece_1_all.deb", "large_1_all.deb", "own", "other"];
const OFFERED_BYTES: [usize; 3] = [5_000, 262_144, 600_001];

#[derive(Clone, Debug)]
enum Op {
    /// Makes or replaces a file with as many bytes of a pattern.
    Write {
        at: At,
        len: usize,
        seed: u64,
    },
    /// Overwrites a part of a file that is there.
    Patch {
        at: At,
        offset: usize,
        len: usize,
    },
    /// Sets a file's length.
    Cut {
        at: At,
        len: usize,
    },
    /// Reads a whole file, or a ghost, in requests of so many bytes.
    Read {
        at: At,
        apt: bool,
        request: u32,
    },
    /// Reads a ghost while nobody has it.
    ReadInVain {
        at: At,
    },
    Rename {
        from: At,
        to: At,
    },
    Unlink {
        at: At,
    },
    /// A byte of the covered file changes under the mount.
    Rot {
        at: At,
        offset: usize,
    },
    /// apt takes and gives back its lock.
    Lock,
    Evict,
    /// A clean end and a new start.
    Restart,
    /// The process is gone at this moment, with a file half written.
    Crash {
        at: At,
        len: usize,
    },
}

/// A name in one of the two directories.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct At {
    partial: bool,
    name: usize,
}

impl At {
    fn name(self) -> &'static str {
        NAMES[self.name]
    }

    fn path(self) -> String {
        if self.partial { format!("partial/{}", self.name()) } else { self.name().to_owned() }
    }

    fn offered(self) -> Option<Vec<u8>> {
        OFFERED_BYTES.get(self.name).map(|len| bytes(*len, self.name as u64 + 100))
    }
}

fn at() -> impl Strategy<Value = At> {
    (any::<bool>(), 0..NAMES.len()).prop_map(|(partial, name)| At { partial, name })
}

fn length() -> impl Strategy<Value = usize> {
    prop_oneof![Just(0), Just(1), Just(65_535), Just(65_536), Just(65_537), Just(262_145), 0..300_000_usize]
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        4 => (at(), length(), any::<u64>()).prop_map(|(at, len, seed)| Op::Write { at, len, seed }),
        2 => (at(), length(), 1..70_000_usize).prop_map(|(at, offset, len)| Op::Patch { at, offset, len }),
        2 => (at(), length()).prop_map(|(at, len)| Op::Cut { at, len }),
        6 => (at(), any::<bool>(), prop_oneof![Just(4096), Just(131_072), Just(1_048_576), 1..200_000_u32])
            .prop_map(|(at, apt, request)| Op::Read { at, apt, request }),
        1 => at().prop_map(|at| Op::ReadInVain { at }),
        3 => (at(), at()).prop_map(|(from, to)| Op::Rename { from, to }),
        3 => at().prop_map(|at| Op::Unlink { at }),
        2 => (at(), length()).prop_map(|(at, offset)| Op::Rot { at, offset }),
        2 => Just(Op::Lock),
        1 => Just(Op::Evict),
        2 => Just(Op::Restart),
        1 => (at(), length()).prop_map(|(at, len)| Op::Crash { at, len }),
    ]
}

/// What a tree works on; a restart makes a new one over the same directories.
struct Running {
    tree: Arc<Tree>,
    objects: Arc<Objects>,
    fetcher: Arc<Fetcher>,
    store: Arc<Store>,
}

struct World {
    runtime: tokio::runtime::Runtime,
    names: Arc<FakeNames>,
    source: Arc<FakeSource>,
    temp: TempDir,
    running: Option<Running>,
    /// What is on disk, by path below the mount.
    files: BTreeMap<String, Vec<u8>>,
    /// Files with rot that nobody can mend: every read that meets it fails.
    rotten: BTreeSet<String>,
    /// Files with rot that is mended when somebody reads it. Overwriting another part of such a file, or of a rotten one,
    /// has no right answer: who writes into a file makes what is on disk then the file.
    unread: BTreeSet<String>,
    /// Names whose ghosts do not come back until the lock is released.
    hidden: BTreeSet<String>,
    /// Packages that `objects/` may hold: then a name in archives/ is put in place for everybody.
    objects: BTreeSet<usize>,
}

fn caller(apt: bool) -> Caller {
    // A process that is not there counts as one that uses libapt.
    Caller { uid: 0, gid: 0, pid: if apt { 0 } else { std::process::id() } }
}

impl World {
    fn new() -> Self {
        let temp = tempfile::tempdir().unwrap();
        for dir in ["covered/partial", "cache/objects", "cache/incoming", "state"] {
            fs::create_dir_all(temp.path().join(dir)).unwrap();
        }
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let source = Arc::new(FakeSource::new(runtime.handle().clone()));
        let names = Arc::new(FakeNames::default());
        for (index, _) in OFFERED_BYTES.iter().enumerate() {
            let at = At { partial: false, name: index };
            let content = at.offered().unwrap();
            let urls = vec![MirrorUrl { url: format!("http://mirror/{}", at.name()), proxy: None, immutable: true, private: false }];
            names.list(Entry {
                name: at.name().to_owned(),
                digest: Digest::of(&content),
                size: content.len() as u64,
                date: 0,
                urls,
                package: "package".to_owned(),
                version: "1".to_owned(),
                private: false,
            });
            source.give(&content);
        }
        let mut world = Self {
            runtime,
            names,
            source,
            temp,
            running: None,
            files: BTreeMap::new(),
            rotten: BTreeSet::new(),
            unread: BTreeSet::new(),
            hidden: BTreeSet::new(),
            objects: BTreeSet::new(),
        };
        world.start();
        world
    }

    fn start(&mut self) {
        let open = |name: &str| File::open(self.temp.path().join(name)).unwrap().into();
        let store = Arc::new(Store::open(&self.temp.path().join("state")).unwrap());
        let objects = Arc::new(Objects::open(Arc::clone(&store), open("cache/objects"), 1 << 30).unwrap());
        let incoming = Arc::new(Incoming::open(Arc::clone(&store), open("cache/incoming")).unwrap());
        let runtime = self.runtime.handle().clone();
        let (names, source) = (Arc::clone(&self.names) as Arc<dyn Names>, Arc::clone(&self.source) as Arc<dyn Source>);
        let fetcher = Fetcher::new(incoming, Arc::clone(&source), runtime.clone(), FetchLimits::default());
        let mend = Arc::new(Repairer::new(Arc::clone(&names), source, runtime.clone(), RepairLimits::default()));
        let parts = TreeParts {
            store: Arc::clone(&store),
            objects: Arc::clone(&objects),
            names,
            fetcher: Arc::clone(&fetcher),
            mend,
            lists_elsewhere: None,
            runtime,
        };
        let tree = Tree::new(Role::Archives, open("covered"), TreeOptions::default(), parts, None).unwrap();
        self.runtime.block_on(tree.scan()).unwrap();
        self.running = Some(Running { tree, objects, fetcher, store });
        self.hidden.clear();
    }

    /// Ends the process cleanly.
    fn stop(&mut self) {
        let Running { tree, objects, fetcher, store } = self.running.take().unwrap();
        self.runtime.block_on(tree.settled());
        let gone = Arc::downgrade(&store);
        drop((tree, objects, fetcher, store));
        // Tasks of the fetcher hold parts of the store for a moment longer.
        while gone.strong_count() > 0 {
            std::thread::yield_now();
        }
    }

    fn tree(&self) -> &Arc<Tree> {
        &self.running.as_ref().unwrap().tree
    }

    fn covered(&self, path: &str) -> std::path::PathBuf {
        self.temp.path().join("covered").join(path)
    }

    fn dir(&self, partial: bool) -> u64 {
        if !partial {
            return ROOT;
        }
        let entry = self.runtime.block_on(self.tree().lookup(ROOT, OsStr::new("partial"), &caller(true)).get()).unwrap();
        entry.attr.ino
    }

    fn lookup(&self, at: At, apt: bool) -> Result<u64, FsError> {
        let dir = self.dir(at.partial);
        self.runtime.block_on(self.tree().lookup(dir, OsStr::new(at.name()), &caller(apt)).get()).map(|entry| entry.attr.ino)
    }

    fn open(&self, ino: u64, flags: i32) -> Result<u64, FsError> {
        self.runtime.block_on(self.tree().open(ino, flags).get()).map(|opened| opened.fh)
    }

    fn read_whole(&self, fh: u64, request: u32) -> Result<Vec<u8>, FsError> {
        let mut all = Vec::new();
        loop {
            let part = self.runtime.block_on(self.tree().read(fh, all.len() as u64, request).get())?;
            if part.is_empty() {
                return Ok(all);
            }
            all.extend_from_slice(&part);
        }
    }

    fn close(&self, fh: u64) {
        self.tree().flush(fh).unwrap();
        self.tree().release(fh).unwrap();
        self.runtime.block_on(self.tree().settled());
    }

    /// Opens a file for writing as open(2) with `O_CREAT` does: found or made.
    fn open_for_writing(&self, at: At) -> u64 {
        if self.files.contains_key(&at.path()) {
            return self.open(self.lookup(at, true).unwrap(), libc::O_RDWR).unwrap();
        }
        let dir = self.dir(at.partial);
        let made = self.tree().create(dir, OsStr::new(at.name()), 0o644, libc::O_RDWR, &caller(true));
        self.runtime.block_on(made.get()).unwrap().1.fh
    }

    /// Whether a name that is not on disk is shown, and becomes a file when it is read.
    fn is_shown(&self, at: At, apt: bool) -> bool {
        !self.files.contains_key(&at.path())
            && !self.hidden.contains(&at.path())
            && at.offered().is_some()
            && (at.partial || !apt || self.objects.contains(&at.name))
    }

    fn has_rot(&self, at: At) -> bool {
        self.rotten.contains(&at.path()) || self.unread.contains(&at.path())
    }

    /// Whether rot in a file can be mended: its bytes are those of a package of the catalog.
    fn is_mendable(&self, path: &str) -> bool {
        self.files
            .get(path)
            .is_some_and(|content| (0..OFFERED_BYTES.len()).any(|name| At { partial: false, name }.offered().as_ref() == Some(content)))
    }

    fn apply(&mut self, op: &Op) {
        match op {
            Op::Write { at, len, seed } => {
                let content = if seed % 3 == 0 { at.offered().unwrap_or_default() } else { bytes(*len, *seed) };
                self.write(*at, &content);
            }
            Op::Patch { at, offset, len } => self.patch(*at, *offset, *len),
            Op::Cut { at, len } => self.cut(*at, *len),
            Op::Read { at, apt, request } => self.read(*at, *apt, *request),
            Op::ReadInVain { at } => self.read_in_vain(*at),
            Op::Rename { from, to } => self.rename(*from, *to),
            Op::Unlink { at } => self.unlink(*at),
            Op::Rot { at, offset } => self.rot(*at, *offset),
            Op::Lock => self.lock(),
            Op::Evict => {
                self.running.as_ref().unwrap().objects.make_room(1 << 40).unwrap();
                self.objects.clear();
            }
            Op::Restart => {
                self.stop();
                self.start();
            }
            Op::Crash { at, len } => self.crash(*at, *len),
        }
        self.compare_listings();
    }

    fn write(&mut self, at: At, content: &[u8]) {
        let fh = self.open_for_writing(at);
        let ino = self.lookup(at, true).unwrap();
        let cut = poolfs_fs::attr::SetAttr { size: Some(0), ..Default::default() };
        self.runtime.block_on(self.tree().setattr(ino, Some(fh), cut, &caller(true)).get()).unwrap();
        for (index, part) in content.chunks(100_000).enumerate() {
            assert_eq!(self.tree().write(fh, index as u64 * 100_000, part).unwrap(), part.len());
        }
        self.close(fh);
        self.rotten.remove(&at.path());
        self.unread.remove(&at.path());
        self.files.insert(at.path(), content.to_vec());
    }

    fn patch(&mut self, at: At, offset: usize, len: usize) {
        if self.has_rot(at) || !self.files.contains_key(&at.path()) {
            return;
        }
        let fh = self.open_for_writing(at);
        let part = bytes(len, offset as u64);
        assert_eq!(self.tree().write(fh, offset as u64, &part).unwrap(), len);
        self.close(fh);
        let content = self.files.get_mut(&at.path()).unwrap();
        content.resize(content.len().max(offset + len), 0);
        content[offset..offset + len].copy_from_slice(&part);
    }

    fn cut(&mut self, at: At, len: usize) {
        if self.has_rot(at) || !self.files.contains_key(&at.path()) {
            return;
        }
        let ino = self.lookup(at, true).unwrap();
        let set = poolfs_fs::attr::SetAttr { size: Some(len as u64), ..Default::default() };
        self.runtime.block_on(self.tree().setattr(ino, None, set, &caller(true)).get()).unwrap();
        self.runtime.block_on(self.tree().settled());
        self.files.get_mut(&at.path()).unwrap().resize(len, 0);
    }

    fn read(&mut self, at: At, apt: bool, request: u32) {
        let path = at.path();
        let expected = match self.files.get(&path) {
            Some(content) => content.clone(),
            None if self.is_shown(at, apt) => at.offered().unwrap(),
            None => {
                assert!(self.lookup(at, apt).is_err(), "{path} is not there");
                return;
            }
        };
        let ino = self.lookup(at, apt).unwrap();
        let got = self.open(ino, libc::O_RDONLY).and_then(|fh| {
            let got = self.read_whole(fh, request);
            self.close(fh);
            got
        });
        if self.rotten.contains(&path) {
            assert!(got.is_err(), "{path}: rotten bytes were given out");
            return;
        }
        let got = got.unwrap_or_else(|err| panic!("{path}: {err}"));
        let differs = got.iter().zip(&expected).position(|(got, expected)| got != expected);
        assert!(
            got == expected,
            "{path}: {} bytes instead of {}, different from {differs:?}; the package's: {}",
            got.len(),
            expected.len(),
            at.offered().as_ref() == Some(&got)
        );
        self.unread.remove(&path);
        if self.files.insert(path, expected).is_none() {
            // The object, if there was one, is the file now.
            self.objects.remove(&at.name);
        }
    }

    fn read_in_vain(&mut self, at: At) {
        // What is in `objects/` needs no source.
        if !at.partial || !self.is_shown(at, true) || self.objects.contains(&at.name) {
            return;
        }
        self.source.mood(Mood::HasNothing);
        let fh = self.open(self.lookup(at, true).unwrap(), libc::O_RDONLY).unwrap();
        assert_eq!(self.read_whole(fh, 65_536).unwrap(), b"", "apt must see a file that is too short");
        self.close(fh);
        self.source.mood(Mood::Gives);
        // Nothing is offered again before the failure is old; here that time has passed.
        assert!(self.lookup(at, true).is_err());
        self.running.as_ref().unwrap().fetcher.forgive(&Digest::of(&at.offered().unwrap()));
    }

    fn rename(&mut self, from: At, to: At) {
        if !self.files.contains_key(&from.path()) || from == to {
            return;
        }
        let (from_dir, to_dir) = (self.dir(from.partial), self.dir(to.partial));
        let renamed = self.tree().rename((from_dir, OsStr::new(from.name())), (to_dir, OsStr::new(to.name())), 0);
        self.runtime.block_on(renamed.get()).unwrap();
        let content = self.files.remove(&from.path()).unwrap();
        self.files.insert(to.path(), content);
        for kind in [&mut self.rotten, &mut self.unread] {
            kind.remove(&to.path());
            if kind.remove(&from.path()) {
                kind.insert(to.path());
            }
        }
        self.hidden.insert(from.path());
    }

    fn unlink(&mut self, at: At) {
        let dir = self.dir(at.partial);
        let removed = self.tree().unlink(dir, OsStr::new(at.name()));
        self.runtime.block_on(self.tree().settled());
        match self.files.remove(&at.path()) {
            Some(content) => {
                removed.unwrap();
                self.rotten.remove(&at.path());
                self.hidden.insert(at.path());
                // What nobody has looked at since it changed is not kept.
                if self.unread.remove(&at.path()) {
                    return;
                }
                for name in 0..OFFERED_BYTES.len() {
                    if (At { partial: false, name }).offered().as_ref() == Some(&content) {
                        self.objects.insert(name);
                    }
                }
            }
            // The kernel looks a name up before it removes it; here a ghost may or may not have been shown.
            None => {
                if removed.is_ok() {
                    self.hidden.insert(at.path());
                }
            }
        }
    }

    fn rot(&mut self, at: At, offset: usize) {
        let path = at.path();
        let Some(content) = self.files.get(&path).filter(|content| !content.is_empty()) else { return };
        if self.has_rot(at) {
            return;
        }
        let offset = offset % content.len();
        let file = fs::OpenOptions::new().write(true).open(self.covered(&path)).unwrap();
        file.write_all_at(&[content[offset] ^ 0x20], offset as u64).unwrap();
        if self.is_mendable(&path) {
            self.unread.insert(path);
        } else {
            self.rotten.insert(path);
        }
    }

    fn lock(&mut self) {
        let made = self.runtime.block_on(self.tree().lookup(ROOT, OsStr::new("lock"), &caller(true)).get());
        let fh = match made {
            Ok(entry) => self.open(entry.attr.ino, libc::O_RDWR).unwrap(),
            Err(_) => {
                let made = self.tree().create(ROOT, OsStr::new("lock"), 0o640, libc::O_RDWR, &caller(true));
                self.runtime.block_on(made.get()).unwrap().1.fh
            }
        };
        self.close(fh);
        self.hidden.clear();
    }

    fn crash(&mut self, at: At, len: usize) {
        if self.has_rot(at) {
            return;
        }
        // The half-written file is what was written; the others are as they were.
        let fh = self.open_for_writing(at);
        let part = bytes(len, 3);
        assert_eq!(self.tree().write(fh, 0, &part).unwrap(), len);
        let content = self.files.entry(at.path()).or_default();
        content.resize(content.len().max(len), 0);
        content[..len].copy_from_slice(&part);
        // apt takes a file of a package's name and size without hashing it: a half-written one is replaced by the package.
        if let Some(package) = at.offered().filter(|package| len > 0 && !at.partial && package.len() == content.len()) {
            *content = package;
        }
        let taken_over = tempfile::tempdir().unwrap();
        copy(self.temp.path(), taken_over.path());
        let Running { tree, objects, fetcher, store } = self.running.take().unwrap();
        drop((tree, objects, fetcher, store));
        self.temp = taken_over;
        self.start();
    }

    fn compare_listings(&self) {
        for partial in [false, true] {
            let mut got = BTreeSet::<OsString>::new();
            let fh = self.tree().opendir(self.dir(partial)).unwrap();
            self.tree()
                .readdir(fh, 0, |entry| {
                    got.insert(entry.name.clone());
                    false
                })
                .unwrap();
            self.tree().releasedir(fh).unwrap();
            [".", "..", "lock", "partial"].iter().for_each(|name| {
                got.remove(OsStr::new(name));
            });
            let prefix = if partial { "partial/" } else { "" };
            let want: BTreeSet<OsString> =
                self.files.keys().filter(|path| path.starts_with("partial/") == partial).map(|path| path[prefix.len()..].into()).collect();
            assert_eq!(got, want, "partial: {partial}");
        }
    }
}

/// A copy that keeps the inodes of files whose inode is part of their record, as a new process would find them.
fn copy(from: &Path, to: &Path) {
    for entry in fs::read_dir(from).unwrap().map(Result::unwrap) {
        let (source, target) = (entry.path(), to.join(entry.file_name()));
        if entry.file_type().unwrap().is_dir() {
            fs::create_dir_all(&target).unwrap();
            copy(&source, &target);
        } else if from.ends_with("state") {
            fs::copy(&source, &target).unwrap();
        } else {
            fs::hard_link(&source, &target).unwrap();
        }
    }
}

fn check(ops: &[Op]) {
    let mut world = World::new();
    ops.iter().for_each(|op| world.apply(op));
    for name in 0..NAMES.len() {
        for partial in [true, false] {
            let at = At { partial, name };
            if world.files.contains_key(&at.path()) {
                world.read(at, false, 131_072);
            }
        }
    }
}

/// `PROPTEST_CASES` or as many as fit a short run.
fn cases() -> u32 {
    std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(CASES)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(), failure_persistence: None, ..ProptestConfig::default() })]

    /// Any difference from the model is a reader with wrong bytes, or a file that is lost.
    #[test]
    fn the_tree_does_what_the_model_does(ops in prop::collection::vec(op(), 1..OPERATIONS_MAX)) {
        check(&ops);
    }
}

/// A package that rots in `partial/` after somebody else asked for it too.
#[test]
fn rot_beside_a_second_copy() {
    let (there, here) = (At { partial: true, name: 0 }, At { partial: false, name: 0 });
    check(&[
        Op::Read { at: there, apt: false, request: 4096 },
        Op::Rot { at: there, offset: 0 },
        Op::Read { at: here, apt: false, request: 4096 },
    ]);
}

/// The process dies while the first byte of an empty file is written, and of a package that is here already.
#[test]
fn a_crash_in_the_first_write() {
    let at = At { partial: false, name: 1 };
    check(&[Op::Write { at, len: 0, seed: 1 }, Op::Crash { at, len: 1 }]);
    check(&[Op::Write { at, len: 0, seed: 3 }, Op::Crash { at, len: 1 }]);
}

/// A package that was removed is kept in `objects/`, and is there when nobody else has it.
#[test]
fn what_is_kept_needs_no_source() {
    let at = At { partial: true, name: 2 };
    check(&[
        Op::Read { at, apt: false, request: 4096 },
        Op::Unlink { at },
        Op::Lock,
        Op::ReadInVain { at },
        Op::Read { at, apt: true, request: 4096 },
    ]);
}

/// A file that was changed and closed before is not half written, though it was open when the process died.
#[test]
fn a_crash_before_the_first_write() {
    let at = At { partial: false, name: 2 };
    check(&[Op::Read { at, apt: false, request: 4096 }, Op::Patch { at, offset: 0, len: 1 }, Op::Crash { at, len: 0 }]);
}

/// A package that was removed under one name and read under the other is no longer an object of its own.
#[test]
fn an_object_is_used_once() {
    let (there, here) = (At { partial: true, name: 0 }, At { partial: false, name: 0 });
    check(&[
        Op::Read { at: here, apt: false, request: 4096 },
        Op::Unlink { at: here },
        Op::Read { at: there, apt: false, request: 4096 },
        Op::Lock,
        Op::Read { at: here, apt: true, request: 4096 },
    ]);
}

/// A file that is moved over a name nobody could deliver is a file like any other, and can be moved away again.
#[test]
fn a_file_takes_the_place_of_a_ghost() {
    let (ghost, own) = (At { partial: true, name: 2 }, At { partial: false, name: 3 });
    check(&[
        Op::ReadInVain { at: ghost },
        Op::Write { at: own, len: 0, seed: 1 },
        Op::Rename { from: own, to: ghost },
        Op::Rename { from: ghost, to: At { partial: false, name: 0 } },
    ]);
}
