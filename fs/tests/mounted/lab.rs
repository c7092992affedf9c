//! Directories, a catalog, a source and a mount, all private to one test.

use parking_lot::Mutex;
use poolfs_core::catalog::{Entry, MirrorUrl};
use poolfs_core::piece::PIECE_BYTES;
use poolfs_core::store::{Incoming, Objects, Store};
use poolfs_core::{Digest, Role};
use poolfs_fs::fetch::{FetchLimits, Fetcher};
use poolfs_fs::mount::{MountOptions, MountSpec, Mounts, prepare};
use poolfs_fs::names::Names;
use poolfs_fs::repair::{RepairLimits, Repairer};
use poolfs_fs::source::{Delivery, Giver, Source, SourceError, Verdict, Want};
use poolfs_fs::tree::Tree;
use poolfs_fs::{FsError, TreeParts};
use rustix::fs::{MemfdFlags, SealFlags};
use std::collections::HashMap;
use std::fs::File;
use std::io::Write as _;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tempfile::TempDir;
use tokio::sync::{mpsc, watch};

/// When the Release of the fake catalog was made.
pub(crate) const DATE: i64 = 1_700_000_000;

/// A handful of names; one of them panics.
#[derive(Default)]
pub(crate) struct FakeNames {
    entries: Mutex<HashMap<String, Entry>>,
}

pub(crate) const PANICS: &str = "panics_1_all.deb";

impl Names for FakeNames {
    fn archive(&self, name: &[u8]) -> Result<Option<Entry>, FsError> {
        assert_ne!(name, PANICS.as_bytes(), "a bug that this test wants");
        Ok(std::str::from_utf8(name).ok().and_then(|name| self.entries.lock().get(name).cloned()))
    }

    fn packages(&self) -> Result<Vec<String>, FsError> {
        Ok(self.entries.lock().keys().cloned().collect())
    }

    fn by_digest(&self, digest: &Digest) -> Result<Option<Entry>, FsError> {
        Ok(self.entries.lock().values().find(|entry| entry.digest == *digest).cloned())
    }
}

/// What the source does when it is asked for a file that it has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mood {
    Gives,
    GivesWrong,
    HasNothing,
    /// Says nothing until the mood changes.
    Stalls,
}

pub(crate) struct FakeSource {
    files: Mutex<HashMap<Digest, Vec<u8>>>,
    mood: watch::Sender<Mood>,
    pub(crate) wants: Mutex<Vec<Want>>,
    runtime: tokio::runtime::Handle,
}

impl FakeSource {
    /// One that has nothing yet and would give it.
    pub(crate) fn new(runtime: tokio::runtime::Handle) -> Self {
        Self { files: Mutex::default(), mood: watch::Sender::new(Mood::Gives), wants: Mutex::default(), runtime }
    }

    /// Lets it have a file.
    pub(crate) fn give(&self, bytes: &[u8]) {
        self.files.lock().insert(Digest::of(bytes), bytes.to_vec());
    }

    pub(crate) fn mood(&self, mood: Mood) {
        self.mood.send_replace(mood);
    }
}

impl FakeNames {
    pub(crate) fn list(&self, entry: Entry) {
        self.entries.lock().insert(entry.name.clone(), entry);
    }
}

impl Source for FakeSource {
    fn want(&self, want: Want, _incoming: Option<OwnedFd>) -> mpsc::Receiver<Delivery> {
        let (out, receiver) = mpsc::channel(4);
        self.wants.lock().push(want.clone());
        let file = self.files.lock().get(&want.digest).cloned().unwrap_or_default();
        let mut mood = self.mood.subscribe();
        self.runtime.spawn(async move {
            let mood = *mood.wait_for(|mood| *mood != Mood::Stalls).await.unwrap();
            if mood == Mood::HasNothing || file.is_empty() {
                let failed = SourceError::Nowhere { digest: want.digest, why: "the test says so".into() };
                let _ = out.send(Delivery::Failed(failed)).await;
                return;
            }
            for index in want.missing {
                let start = index as usize * PIECE_BYTES as usize;
                let mut bytes = file[start..(start + PIECE_BYTES as usize).min(file.len())].to_vec();
                if mood == Mood::GivesWrong {
                    bytes[0] ^= 1;
                }
                let piece = Delivery::Piece { index, bytes: sealed(&bytes), giver: Giver::Mirror("fake".into()) };
                if out.send(piece).await.is_err() {
                    return;
                }
            }
            let _ = out.send(Delivery::Done).await;
        });
        receiver
    }

    fn verdict(&self, _digest: Digest, _verdict: Verdict) {}
}

fn sealed(bytes: &[u8]) -> OwnedFd {
    let memory = rustix::fs::memfd_create("piece", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    let mut memory = File::from(memory);
    memory.write_all(bytes).unwrap();
    rustix::fs::fcntl_add_seals(&memory, SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL).unwrap();
    memory.into()
}

pub(crate) struct Lab {
    mounts: Option<Mounts>,
    runtime: tokio::runtime::Runtime,
    pub(crate) names: Arc<FakeNames>,
    pub(crate) source: Arc<FakeSource>,
    store: Option<Arc<Store>>,
    role: Role,
    pub(crate) options: MountOptions,
    covered: OwnedFd,
    /// Last, so that it is removed when nothing is mounted any more.
    temp: TempDir,
}

impl Lab {
    /// `None` where nothing can be mounted.
    pub(crate) fn new(role: Role) -> Option<Self> {
        if !Path::new("/dev/fuse").exists() || !rustix::process::geteuid().is_root() {
            eprintln!("SKIPPED: mounting needs root and /dev/fuse");
            return None;
        }
        let temp = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(temp.path().join("dir/partial")).unwrap();
        let covered = File::open(temp.path().join("dir")).unwrap().into();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let source = Arc::new(FakeSource::new(runtime.handle().clone()));
        let options = MountOptions::default();
        let mut lab = Self { mounts: None, runtime, names: Arc::default(), source, store: None, role, options, covered, temp };
        lab.mount();
        Some(lab)
    }

    pub(crate) fn mount(&mut self) {
        let spec = MountSpec { role: self.role, path: self.dir(), options: self.options };
        let prepared = prepare(&[spec], &self.temp.path().join("cache")).unwrap();
        let store = Arc::new(Store::open(&self.temp.path().join("state")).unwrap());
        let objects = Arc::new(Objects::open(Arc::clone(&store), prepared.objects, 1 << 30).unwrap());
        let incoming = Arc::new(Incoming::open(Arc::clone(&store), prepared.incoming).unwrap());
        let handle = self.runtime.handle().clone();
        let names = Arc::clone(&self.names) as Arc<dyn Names>;
        let source = Arc::clone(&self.source) as Arc<dyn Source>;
        let fetcher = Fetcher::new(incoming, Arc::clone(&source), handle.clone(), FetchLimits::default());
        let mend = Arc::new(Repairer::new(Arc::clone(&names), source, handle.clone(), RepairLimits::default()));
        let parts = TreeParts { store: Arc::clone(&store), objects, names, fetcher, mend, lists_elsewhere: None, runtime: handle };
        self.mounts = Some(Mounts::mount(prepared.mounts, &parts, true, 2).unwrap());
        self.store = Some(store);
    }

    /// Unmounts and ends everything, as a stopped daemon.
    pub(crate) fn unmount(&mut self) {
        self.settle();
        let mut mounts = self.mounts.take().unwrap();
        mounts.unmount().unwrap();
        drop(mounts);
        // The fetcher's tasks hold parts of the store for a moment longer.
        let store = Arc::downgrade(&self.store.take().unwrap());
        while store.strong_count() > 0 {
            std::thread::yield_now();
        }
    }

    pub(crate) fn tree(&self) -> Arc<Tree> {
        Arc::clone(self.mounts.as_ref().unwrap().trees().next().unwrap())
    }

    /// Waits until all that was closed is released (RELEASE comes after close(2)) and recorded.
    pub(crate) fn settle(&self) {
        while self.tree().open_files() > 0 {
            std::thread::yield_now();
        }
        self.runtime.block_on(self.tree().settled());
    }

    pub(crate) fn run<T>(&self, work: impl Future<Output = T>) -> T {
        self.runtime.block_on(work)
    }

    pub(crate) fn store(&self) -> &Store {
        self.store.as_ref().unwrap()
    }

    pub(crate) fn mood(&self, mood: Mood) {
        self.source.mood(mood);
    }

    /// The mounted directory.
    pub(crate) fn dir(&self) -> PathBuf {
        self.temp.path().join("dir")
    }

    pub(crate) fn path(&self, below: &str) -> PathBuf {
        self.dir().join(below)
    }

    /// The covered file of that name, past the mount.
    pub(crate) fn covered(&self, below: &str) -> PathBuf {
        use std::os::fd::AsRawFd as _;
        PathBuf::from(format!("/proc/self/fd/{}/{below}", self.covered.as_fd().as_raw_fd()))
    }

    /// Puts a file into the catalog and at the source.
    pub(crate) fn offer(&self, name: &str, bytes: &[u8]) -> Digest {
        let digest = Digest::of(bytes);
        let entry = Entry {
            name: name.to_owned(),
            digest,
            size: bytes.len() as u64,
            date: DATE,
            urls: vec![MirrorUrl { url: format!("http://mirror/{name}"), proxy: None, immutable: true, private: false }],
            package: name.split('_').next().unwrap().to_owned(),
            version: "1".to_owned(),
            private: false,
        };
        self.list(entry);
        self.source.give(bytes);
        digest
    }

    pub(crate) fn list(&self, entry: Entry) {
        self.names.list(entry);
    }

    pub(crate) fn xattr(&self, below: &str, name: &str) -> String {
        let mut value = [0; 128];
        let len = rustix::fs::getxattr(self.path(below), format!("user.poolfs.{name}"), &mut value).unwrap();
        String::from_utf8(value[..len].to_vec()).unwrap()
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        // A stalled reader would keep its test's threads.
        self.source.mood.send_replace(Mood::HasNothing);
        if let Some(mut mounts) = self.mounts.take() {
            mounts.detach();
        }
    }
}

/// Bytes that compress and repeat nowhere near a block's border.
pub(crate) fn bytes(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as u8
        })
        .collect()
}
