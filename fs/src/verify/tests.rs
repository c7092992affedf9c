//! Verification of files and objects that rot, with a source that delivers or not.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "tests")]

use super::*;
use crate::fetch::fake::{Act, Fake};
use crate::fetch::{FetchLimits, Fetcher};
use crate::names::Names;
use crate::repair::RepairLimits;
use crate::source::{MirrorUrl, Source, SourceError};
use crate::tree::{TreeOptions, TreeParts};
use parking_lot::Mutex;
use poolfs_core::Role;
use poolfs_core::catalog::Entry;
use poolfs_core::store::{Incoming, Kind, Provenance, Sharing, Store};
use std::ffi::OsStr;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::PathBuf;
use std::time::Duration;
use tokio::runtime::Handle;

const PIECE: usize = PIECE_BYTES as usize;
const BLOCK: usize = BLOCK_BYTES as usize;

/// A catalog of one file.
struct One(Entry);

impl Names for One {
    fn packages(&self) -> Result<Vec<String>, FsError> {
        Ok(Vec::new())
    }

    fn archive(&self, _name: &[u8]) -> Result<Option<Entry>, FsError> {
        Ok(None)
    }

    fn by_digest(&self, digest: &Digest) -> Result<Option<Entry>, FsError> {
        Ok(Some(self.0.clone()).filter(|entry| entry.digest == *digest))
    }
}

/// Two pieces and a tail that ends within a block.
fn bytes() -> Vec<u8> {
    (0..2 * PIECE + BLOCK + 99).map(|at| (at / 3) as u8).collect()
}

struct Bench {
    dir: tempfile::TempDir,
    store: Arc<Store>,
    objects: Arc<Objects>,
    tree: Arc<Tree>,
    repairer: Repairer,
}

impl Bench {
    fn new(acts: &[Act]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        for name in ["incoming", "objects", "archives", "archives/partial"] {
            std::fs::create_dir(dir.path().join(name)).unwrap();
        }
        let fd = |name: &str| OwnedFd::from(File::open(dir.path().join(name)).unwrap());
        let store = Arc::new(Store::open(&dir.path().join("state")).unwrap());
        let objects = Arc::new(Objects::open(Arc::clone(&store), fd("objects"), 1 << 30).unwrap());
        let incoming = Arc::new(Incoming::open(Arc::clone(&store), fd("incoming")).unwrap());
        let names: Arc<dyn Names> = Arc::new(One(Entry {
            name: "x_1_all.deb".into(),
            digest: Digest::of(&bytes()),
            size: bytes().len() as u64,
            date: 0,
            urls: vec![MirrorUrl { url: "http://m/x_1_all.deb".into(), proxy: None, immutable: true, private: false }],
            package: "x".into(),
            version: "1".into(),
            private: false,
        }));
        let source: Arc<dyn Source> = Fake::new(&bytes(), acts);
        let runtime = Handle::current();
        let repairer = Repairer::new(Arc::clone(&names), Arc::clone(&source), runtime.clone(), RepairLimits::default());
        let parts = TreeParts {
            store: Arc::clone(&store),
            objects: Arc::clone(&objects),
            names,
            fetcher: Fetcher::new(incoming, source, runtime.clone(), FetchLimits::default()),
            mend: Arc::new(repairer.clone()),
            lists_elsewhere: None,
            runtime,
        };
        std::fs::write(dir.path().join("archives/x_1_all.deb"), bytes()).unwrap();
        std::fs::write(dir.path().join("archives/partial/mine"), b"mine").unwrap();
        let tree = Tree::new(Role::Archives, fd("archives"), TreeOptions::default(), parts, None).unwrap();
        Self { dir, store, objects, tree, repairer }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Changes a byte as a bad disk would: the times stay.
    fn rot(&self, name: &str, at: usize) {
        let file = File::options().read(true).write(true).open(self.path(name)).unwrap();
        let modified = file.metadata().unwrap().modified().unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, at as u64).unwrap();
        file.write_all_at(&[byte[0] ^ 0x40], at as u64).unwrap();
        file.set_modified(modified).unwrap();
    }

    /// Keeps the file as an object too.
    fn keep(&self) -> String {
        std::fs::write(self.path("archives/kept"), bytes()).unwrap();
        let archives = File::open(self.path("archives")).unwrap();
        let sums = Sums::of(&bytes());
        let (sharing, provenance) = (Sharing::Available, Provenance::Mirror);
        let from = (archives.as_fd(), OsStr::new("kept"));
        assert!(self.objects.put(&sums.digest, &sums, Kind::Package, sharing, provenance, from.0, from.1).unwrap());
        format!("objects/{}", sums.digest)
    }

    async fn files(&self, repair: bool) -> Verified {
        files(&self.tree, repair, |_, _| {}).await.unwrap()
    }

    async fn objects(&self, repair: bool) -> Verified {
        objects(&self.objects, repair.then_some(&self.repairer), |_, _| {}).await.unwrap()
    }

    fn damaged(&self) -> u64 {
        self.store.counts(Role::Archives).unwrap().damaged
    }
}

/// A machine in order: everything is read, counted and told, and nothing is found.
#[tokio::test(start_paused = true)]
async fn nothing_is_wrong() {
    let bench = Bench::new(&[Act::Vanish(0)]);
    let kept = bench.keep();
    let told = Mutex::new(Vec::new());
    let step = |name: &str, bytes: u64| told.lock().push((name.to_owned(), bytes));
    let found = files(&bench.tree, true, step).await.unwrap();
    let size = bytes().len() as u64;
    assert_eq!(found, Verified { files: 2, bytes: size + 4, ..Verified::default() });
    let found = objects(&bench.objects, Some(&bench.repairer), step).await.unwrap();
    assert_eq!(found, Verified { files: 1, bytes: size, ..Verified::default() });
    let (piece, tail) = (u64::from(PIECE_BYTES), size - 2 * u64::from(PIECE_BYTES));
    let pieces = |name: &str| [piece, piece, tail].map(|bytes| (name.to_owned(), bytes));
    let mut told = told.into_inner();
    told.sort_by(|a, b| a.0.cmp(&b.0));
    let mut want = pieces(&kept).to_vec();
    want.push(("partial/mine".into(), 4));
    want.extend(pieces("x_1_all.deb"));
    want.sort_by(|a, b| a.0.cmp(&b.0));
    assert_eq!(told, want);
}

/// A flipped byte at each border is found, recorded, and mended only when that is asked for; apt sees no other time.
#[tokio::test(start_paused = true)]
async fn rot_in_a_file() {
    for at in [0, BLOCK - 1, BLOCK, PIECE - 1, PIECE, 2 * PIECE + BLOCK, bytes().len() - 1] {
        let bench = Bench::new(&[Act::GiveAll]);
        assert_eq!(bench.files(false).await.files, 2, "recorded");
        let modified = std::fs::metadata(bench.path("archives/x_1_all.deb")).unwrap().modified().unwrap();
        bench.rot("archives/x_1_all.deb", at);
        assert_eq!(bench.files(false).await.damaged, ["x_1_all.deb"], "{at}");
        assert_eq!(bench.damaged(), 1, "{at}");
        assert_ne!(std::fs::read(bench.path("archives/x_1_all.deb")).unwrap(), bytes(), "{at}: not asked to mend");
        let found = bench.files(true).await;
        assert_eq!((found.repaired, found.damaged), (vec!["x_1_all.deb".to_owned()], vec![]), "{at}");
        assert_eq!(std::fs::read(bench.path("archives/x_1_all.deb")).unwrap(), bytes(), "{at}");
        assert_eq!(std::fs::metadata(bench.path("archives/x_1_all.deb")).unwrap().modified().unwrap(), modified);
        assert_eq!(bench.damaged(), 0, "{at}");
        assert_eq!(bench.files(true).await.repaired.len(), 0, "{at}: once is enough");
    }
}

/// What was changed behind the mount with its time is found too, and what nobody has stays damaged and is told.
#[tokio::test(start_paused = true)]
async fn changed_behind_the_mount() {
    let nowhere = SourceError::Nowhere { digest: Digest::of(&bytes()), why: "404".into() };
    let bench = Bench::new(&[Act::Fail(0, nowhere)]);
    bench.files(false).await;
    let mut changed = bytes();
    changed[PIECE + 1] ^= 1;
    let file = File::options().write(true).open(bench.path("archives/x_1_all.deb")).unwrap();
    file.write_all_at(&changed, 0).unwrap();
    file.set_modified(std::time::SystemTime::UNIX_EPOCH + Duration::from_secs(5)).unwrap();
    let found = bench.files(true).await;
    assert_eq!((found.repaired, found.damaged, found.problems), (vec![], vec!["x_1_all.deb".to_owned()], vec![]));
    assert_eq!(bench.damaged(), 1);
}

/// A bad object is told, mended when asked, and dropped where nobody has its bytes.
#[tokio::test(start_paused = true)]
async fn rot_in_an_object() {
    let nowhere = SourceError::Nowhere { digest: Digest::of(&bytes()), why: "404".into() };
    for (act, mended) in [(Act::GiveAll, true), (Act::Fail(0, nowhere), false)] {
        let bench = Bench::new(std::slice::from_ref(&act));
        let kept = bench.keep();
        for at in [7, PIECE + 7] {
            bench.rot(&kept, at);
        }
        let found = bench.objects(false).await;
        assert_eq!((found.damaged, found.dropped), (vec![kept.clone()], vec![]));
        assert!(bench.path(&kept).exists(), "only looked at");
        let found = bench.objects(true).await;
        assert_eq!(found.damaged, Vec::<String>::new());
        if mended {
            assert_eq!((found.repaired, found.dropped), (vec![kept.clone()], vec![]));
            assert_eq!(std::fs::read(bench.path(&kept)).unwrap(), bytes());
            assert_eq!(bench.objects(false).await, Verified { files: 1, bytes: bytes().len() as u64, ..Verified::default() });
        } else {
            assert_eq!((found.repaired, found.dropped), (vec![], vec![kept.clone()]));
            assert!(!bench.path(&kept).exists());
            assert_eq!(bench.objects.bytes(), 0);
        }
    }
}

/// A client that goes away in the middle leaves no open file behind.
#[tokio::test(start_paused = true)]
async fn dropped_half_way() {
    let bench = Bench::new(&[Act::Hang(0)]);
    bench.files(false).await;
    bench.rot("archives/x_1_all.deb", 5);
    let hanging = tokio::time::timeout(Duration::from_secs(10), files(&bench.tree, true, |_, _| {}));
    assert!(hanging.await.is_err(), "it waits for its repair");
    for number in crate::inode::ROOT + 1..50 {
        assert!(bench.tree.table.get(number).is_err(), "node {number}");
    }
    for fh in 0..50 {
        assert!(bench.tree.handles.get(fh).is_err(), "handle {fh}");
    }
}
