//! A disk that loses what was not synced, and fails when it is told to.
//!
//! [`Disk`] is a file system in memory, mounted where a test wants it. It keeps what was brought to the disk (`fsync`) apart
//! from what was only written; [`Disk::lose_power`] throws the machine away and gives a new disk with what a real one might
//! have had: the synced things surely, the others by the throw of a dice. It fails calls by their number, fills up, runs out
//! of inodes, and turns read-only. The model is LazyFS's, with names too.

mod serve;

use fuser::{Errno, FileType};
use parking_lot::{Condvar, Mutex, MutexGuard};
use rustix::mount::{MountFlags, UnmountFlags};
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

const ROOT: u64 = 1;

/// How much of a file is kept or lost as one, in bytes.
const PAGE_BYTES: usize = 4096;

/// States of the names that a crash may go back to, at most.
const JOURNAL_MAX: usize = 256;

/// What survives of names that nobody synced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Journal {
    /// As ext4 and its like: changes of names survive in their order, and a sync of anything commits all that came before.
    Ordered,
    /// Only what was synced itself: of a directory its names, of a file its bytes and attributes. All that POSIX promises.
    Strict,
}

/// xorshift64*: the same for the same seed on every machine.
#[derive(Debug)]
pub(crate) struct Dice(u64);

impl Dice {
    pub(crate) fn new(seed: u64) -> Self {
        // 0 would stay 0; and small seeds that differ in one bit begin alike otherwise.
        Self(seed.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % bound
    }

    fn coin(&mut self) -> bool {
        self.below(2) == 0
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Dirent {
    ino: u64,
    /// Where a listing goes on after it; never used again.
    cookie: u64,
}

/// Everything of an inode but its bytes.
#[derive(Clone, Debug)]
struct Meta {
    kind: FileType,
    mode: u16,
    uid: u32,
    gid: u32,
    rdev: u32,
    atime: SystemTime,
    mtime: SystemTime,
    ctime: SystemTime,
    entries: BTreeMap<OsString, Dirent>,
    target: Vec<u8>,
}

type Names = BTreeMap<u64, Arc<Meta>>;

/// What goes wrong.
#[derive(Clone, Debug, Default)]
pub(crate) struct Faults {
    /// The call, counted from when it was set, that fails, and with what.
    pub(crate) fails_at: Option<(u64, i32)>,
    /// Nothing can be changed: EROFS.
    pub(crate) read_only: bool,
    /// Bytes that fit: ENOSPC.
    pub(crate) bytes_max: Option<u64>,
    /// Inodes that fit: ENOSPC.
    pub(crate) inodes_max: Option<usize>,
}

#[derive(Debug)]
struct State {
    names: Names,
    bytes: BTreeMap<u64, Vec<u8>>,
    synced_bytes: BTreeMap<u64, Vec<u8>>,
    /// As [`Journal::Ordered`] would have the names at least.
    committed: Names,
    /// And after each change since.
    journal: Vec<Names>,
    /// As [`Journal::Strict`] has them.
    strict: Names,
    open: BTreeMap<u64, u64>,
    next_ino: u64,
    next_cookie: u64,
    faults: Faults,
    calls: u64,
    failed: u64,
}

/// The mounted disk. Dropping it unmounts it.
#[derive(Debug)]
pub(crate) struct Disk {
    shared: Arc<Shared>,
    at: PathBuf,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    ended: Mutex<bool>,
    end: Condvar,
}

impl State {
    fn new() -> Self {
        let mut state = Self {
            names: Names::new(),
            bytes: BTreeMap::new(),
            synced_bytes: BTreeMap::new(),
            committed: Names::new(),
            journal: Vec::new(),
            strict: Names::new(),
            open: BTreeMap::new(),
            next_ino: ROOT + 1,
            next_cookie: 16,
            faults: Faults::default(),
            calls: 0,
            failed: 0,
        };
        state.names.insert(ROOT, Arc::new(Meta::new(FileType::Directory, 0o755, 0, 0)));
        state.commit();
        state
    }

    /// One more call: whether it is the one that fails, or cannot be done on such a disk.
    fn call(&mut self, changes: bool) -> Result<(), Errno> {
        self.calls += 1;
        if let Some((at, errno)) = self.faults.fails_at
            && self.calls == at
        {
            self.failed += 1;
            return Err(Errno::from_i32(errno));
        }
        if changes && self.faults.read_only { Err(Errno::EROFS) } else { Ok(()) }
    }

    fn meta(&self, ino: u64) -> Result<&Arc<Meta>, Errno> {
        self.names.get(&ino).ok_or(Errno::ENOENT)
    }

    /// Changes attributes or entries.
    fn change(&mut self, ino: u64, change: impl FnOnce(&mut Meta)) -> Result<(), Errno> {
        let meta = Arc::make_mut(self.names.get_mut(&ino).ok_or(Errno::ENOENT)?);
        change(meta);
        meta.ctime = SystemTime::now();
        Ok(())
    }

    /// Another state of the names that a crash may go back to.
    fn note(&mut self) {
        if self.journal.len() == JOURNAL_MAX {
            // The newest matter most, and the oldest of all is `committed`.
            self.journal.remove(0);
        }
        self.journal.push(self.names.clone());
    }

    fn entry(&self, parent: u64, name: &OsStr) -> Result<Dirent, Errno> {
        let dir = self.meta(parent)?;
        if dir.kind != FileType::Directory {
            return Err(Errno::ENOTDIR);
        }
        dir.entries.get(name).copied().ok_or(Errno::ENOENT)
    }

    fn link(&mut self, parent: u64, name: &OsStr, ino: u64) -> Result<(), Errno> {
        let cookie = self.next_cookie;
        self.next_cookie += 1;
        self.change(parent, |dir| {
            dir.entries.insert(name.to_os_string(), Dirent { ino, cookie });
            dir.mtime = SystemTime::now();
        })
    }

    fn unlink(&mut self, parent: u64, name: &OsStr) -> Result<(), Errno> {
        let ino = self.entry(parent, name)?.ino;
        self.change(parent, |dir| {
            dir.entries.remove(name);
            dir.mtime = SystemTime::now();
        })?;
        self.collect(ino);
        Ok(())
    }

    fn links(&self, ino: u64) -> u32 {
        let named = |meta: &Arc<Meta>| meta.entries.values().filter(|entry| entry.ino == ino).count();
        u32::try_from(self.names.values().map(named).sum::<usize>()).unwrap()
    }

    /// Lets go of an inode that has no name and that nobody has open. What was synced of it stays: a power loss may bring back a
    /// directory that still names it.
    fn collect(&mut self, ino: u64) {
        if ino != ROOT && self.links(ino) == 0 && self.open.get(&ino).is_none_or(|count| *count == 0) {
            self.names.remove(&ino);
            self.bytes.remove(&ino);
        }
    }

    fn used_bytes(&self) -> u64 {
        self.bytes.values().map(|bytes| bytes.len() as u64).sum()
    }

    /// Whether a file may grow to so many bytes.
    fn fits(&self, ino: u64, size: u64) -> Result<(), Errno> {
        let now = self.bytes.get(&ino).map_or(0, Vec::len) as u64;
        let grows = size.saturating_sub(now);
        let full = self.faults.bytes_max.is_some_and(|max| grows > 0 && self.used_bytes() + grows > max);
        if full { Err(Errno::ENOSPC) } else { Ok(()) }
    }

    fn make(&mut self, parent: u64, name: &OsStr, meta: Meta) -> Result<u64, Errno> {
        match self.entry(parent, name) {
            Ok(_) => return Err(Errno::EEXIST),
            Err(err) if err.code() == Errno::ENOENT.code() => {}
            Err(err) => return Err(err),
        }
        if self.faults.inodes_max.is_some_and(|max| self.names.len() >= max) {
            return Err(Errno::ENOSPC);
        }
        let ino = self.next_ino;
        self.next_ino += 1;
        if meta.kind == FileType::RegularFile {
            self.bytes.insert(ino, Vec::new());
        }
        self.names.insert(ino, Arc::new(meta));
        self.link(parent, name, ino)?;
        self.note();
        Ok(ino)
    }

    fn rename(&mut self, from: (u64, &OsStr), to: (u64, &OsStr), flags: u32) -> Result<(), Errno> {
        let moved = self.entry(from.0, from.1)?.ino;
        let there = self.entry(to.0, to.1).ok().map(|entry| entry.ino);
        if flags & libc::RENAME_EXCHANGE != 0 {
            let there = there.ok_or(Errno::ENOENT)?;
            self.link(from.0, from.1, there)?;
            self.link(to.0, to.1, moved)?;
            self.note();
            return Ok(());
        }
        match there {
            Some(_) if flags & libc::RENAME_NOREPLACE != 0 => return Err(Errno::EEXIST),
            Some(there) if there == moved => return Ok(()),
            Some(there) => {
                let (old, new) = (self.meta(there)?.clone(), self.meta(moved)?.kind);
                match (old.kind == FileType::Directory, new == FileType::Directory) {
                    (true, true) if !old.entries.is_empty() => return Err(Errno::ENOTEMPTY),
                    (true, false) => return Err(Errno::EISDIR),
                    (false, true) => return Err(Errno::ENOTDIR),
                    _ => {}
                }
            }
            None => {}
        }
        self.change(from.0, |dir| {
            dir.entries.remove(from.1);
            dir.mtime = SystemTime::now();
        })?;
        self.link(to.0, to.1, moved)?;
        self.change(moved, |_| ())?;
        if let Some(there) = there {
            self.collect(there);
        }
        self.note();
        Ok(())
    }

    /// `fsync` of a file or directory.
    fn sync(&mut self, ino: u64) {
        if let Some(meta) = self.names.get(&ino).cloned() {
            for entry in meta.entries.values() {
                // A name that is on the disk leads to an inode.
                if let Some(named) = self.names.get(&entry.ino) {
                    self.strict.entry(entry.ino).or_insert_with(|| Arc::clone(named));
                }
            }
            self.strict.insert(ino, meta);
        }
        if let Some(bytes) = self.bytes.get(&ino) {
            self.synced_bytes.insert(ino, bytes.clone());
        }
        self.committed = self.names.clone();
        self.journal.clear();
    }

    /// `sync(1)`.
    fn commit(&mut self) {
        self.strict = self.names.clone();
        self.committed = self.names.clone();
        self.journal.clear();
        self.synced_bytes = self.bytes.clone();
    }

    /// What is left after a power loss.
    fn survive(&self, journal: Journal, dice: &mut Dice) -> Self {
        let mut names = match journal {
            Journal::Strict => self.strict.clone(),
            Journal::Ordered => {
                let at = usize::try_from(dice.below(self.journal.len() as u64 + 1)).unwrap();
                at.checked_sub(1).map_or(&self.committed, |at| &self.journal[at]).clone()
            }
        };
        let mut reached = BTreeSet::from([ROOT]);
        let mut next = vec![ROOT];
        while let Some(ino) = next.pop() {
            let Some(meta) = names.get(&ino) else { continue };
            let below: Vec<u64> = meta.entries.values().map(|entry| entry.ino).collect();
            next.extend(below.into_iter().filter(|ino| reached.insert(*ino)));
        }
        names.retain(|ino, _| reached.contains(ino));
        let known: BTreeSet<u64> = names.keys().copied().collect();
        for meta in names.values_mut() {
            if meta.entries.values().any(|entry| !known.contains(&entry.ino)) {
                Arc::make_mut(meta).entries.retain(|_, entry| known.contains(&entry.ino));
            }
        }
        let mut state = Self::new();
        for (ino, meta) in &names {
            if meta.kind == FileType::RegularFile {
                let synced = self.synced_bytes.get(ino).map_or(&[][..], Vec::as_slice);
                let written = self.bytes.get(ino).map_or(synced, Vec::as_slice);
                state.bytes.insert(*ino, torn(synced, written, dice));
            }
        }
        state.names = names;
        (state.next_ino, state.next_cookie) = (self.next_ino, self.next_cookie);
        state.commit();
        state
    }
}

/// Pages of one or the other, and the length of one of them.
fn torn(synced: &[u8], written: &[u8], dice: &mut Dice) -> Vec<u8> {
    match dice.below(4) {
        _ if synced == written => synced.to_vec(),
        0 => synced.to_vec(),
        1 => written.to_vec(),
        _ => {
            let len = if dice.coin() { synced.len() } else { written.len() };
            let mut bytes = vec![0; len];
            for (index, page) in bytes.chunks_mut(PAGE_BYTES).enumerate() {
                let from = if dice.coin() { synced } else { written };
                let from = from.get(index * PAGE_BYTES..).unwrap_or_default();
                let len = page.len().min(from.len());
                page[..len].copy_from_slice(&from[..len]);
            }
            bytes
        }
    }
}

impl Meta {
    fn new(kind: FileType, mode: u16, uid: u32, gid: u32) -> Self {
        let now = SystemTime::now();
        let (entries, target) = (BTreeMap::new(), Vec::new());
        Self { kind, mode, uid, gid, rdev: 0, atime: now, mtime: now, ctime: now, entries, target }
    }
}

impl Shared {
    /// Begins a call.
    fn call(&self, changes: bool) -> Result<MutexGuard<'_, State>, Errno> {
        let mut state = self.state.lock();
        state.call(changes)?;
        Ok(state)
    }
}

impl Disk {
    /// An empty disk at this directory, seen by the calling thread's mount namespace.
    pub(crate) fn mount(at: &Path) -> Self {
        Self::serve(State::new(), at)
    }

    fn serve(state: State, at: &Path) -> Self {
        let flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::CLOEXEC;
        let device: OwnedFd = rustix::fs::open("/dev/fuse", flags, rustix::fs::Mode::empty()).unwrap();
        let data = format!("fd={},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions", device.as_raw_fd());
        let data = std::ffi::CString::new(data).unwrap();
        rustix::mount::mount("disk", at, "fuse.disk-of-a-test", MountFlags::empty(), Some(data.as_c_str())).unwrap();
        let shared = Arc::new(Shared { state: Mutex::new(state), ended: Mutex::new(false), end: Condvar::new() });
        serve::start(&shared, device);
        Self { shared, at: at.to_owned() }
    }

    /// From here on this goes wrong. Calls are counted anew.
    pub(crate) fn faults(&self, faults: Faults) {
        let mut state = self.shared.state.lock();
        (state.faults, state.calls, state.failed) = (faults, 0, 0);
    }

    /// Calls since the faults were set, and how many of them failed by their number.
    pub(crate) fn calls(&self) -> (u64, u64) {
        let state = self.shared.state.lock();
        (state.calls, state.failed)
    }

    /// Bytes of all files.
    pub(crate) fn used_bytes(&self) -> u64 {
        self.shared.state.lock().used_bytes()
    }

    /// All inodes.
    pub(crate) fn inodes(&self) -> usize {
        self.shared.state.lock().names.len()
    }

    /// Brings everything to the disk.
    pub(crate) fn sync(&self) {
        self.shared.state.lock().commit();
    }

    /// Takes the power away: whoever uses the disk must have been killed before. What comes back is mounted at the same place.
    pub(crate) fn lose_power(self, journal: Journal, dice: &mut Dice) -> Self {
        let at = self.at.clone();
        let state = self.shared.state.lock().survive(journal, dice);
        drop(self);
        Self::serve(state, &at)
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        if let Err(error) = rustix::mount::unmount(&self.at, UnmountFlags::DETACH) {
            eprintln!("unmount the disk at {}: {error}", self.at.display());
            return;
        }
        if std::thread::panicking() {
            return;
        }
        // Its last user may just be going.
        let mut ended = self.shared.ended.lock();
        if !*ended && self.shared.end.wait_for(&mut ended, super::LIMIT).timed_out() {
            eprintln!("somebody still uses the disk at {}", self.at.display());
        }
    }
}
