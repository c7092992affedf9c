//! Removals against arrivals, two holders of apt's lock, and readers who join a download, in every order that a scheduler comes
//! upon.
#![allow(clippy::unwrap_used, reason = "tests")]

use super::*;
use crate::fetch::fake::{Act, Fake};
use crate::fetch::{FetchLimits, Fetched, Job};
use crate::names::Names;
use crate::source::{Audience, MirrorUrl, Purpose, Source};
use crate::supply::{Mended, Wound};
use poolfs_core::Digest;
use poolfs_core::catalog;
use poolfs_core::store::Incoming;
use poolfs_core::sync::model;
use std::fs::File;

/// Orders tried; each is some milliseconds of SQLite and of the disk.
const ORDERS: usize = 100;

const NAME: &str = "x_1_all.deb";

/// Whoever asks is no process, so he counts as one that uses libapt: ghosts are shown to him in `partial/`.
const CALLER: Caller = Caller { uid: 0, gid: 0, pid: 0 };

fn bytes() -> Vec<u8> {
    (0..100_000_u32).map(|at| u8::try_from(at % 253).unwrap()).collect()
}

/// A catalog of one package.
struct One(catalog::Entry);

impl Names for One {
    fn packages(&self) -> Result<Vec<String>, FsError> {
        Ok(vec![self.0.name.clone()])
    }

    fn archive(&self, name: &[u8]) -> Result<Option<catalog::Entry>, FsError> {
        Ok(Some(self.0.clone()).filter(|entry| entry.name.as_bytes() == name))
    }

    fn by_digest(&self, digest: &Digest) -> Result<Option<catalog::Entry>, FsError> {
        Ok(Some(self.0.clone()).filter(|entry| entry.digest == *digest))
    }
}

struct NoMend;

impl Mend for NoMend {
    fn mend(&self, _wound: Wound) -> Pin<Box<dyn Future<Output = Mended> + Send>> {
        Box::pin(async { Err("nothing rots here".to_owned()) })
    }
}

/// One tree, whose runtime goes on beside the model.
struct Site {
    tree: Arc<Tree>,
    source: Arc<Fake>,
    dir: tempfile::TempDir,
    runtime: tokio::runtime::Runtime,
}

impl Site {
    fn new() -> Arc<Self> {
        let dir = tempfile::tempdir().unwrap();
        for name in ["incoming", "objects", "archives", "archives/partial"] {
            std::fs::create_dir(dir.path().join(name)).unwrap();
        }
        let fd = |name: &str| OwnedFd::from(File::open(dir.path().join(name)).unwrap());
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let store = Arc::new(Store::open(&dir.path().join("state")).unwrap());
        let objects = Arc::new(Objects::open(Arc::clone(&store), fd("objects"), 1 << 30).unwrap());
        let incoming = Arc::new(Incoming::open(Arc::clone(&store), fd("incoming")).unwrap());
        let source = Fake::new(&bytes(), &[Act::GiveAll]);
        let given: Arc<dyn Source> = Arc::clone(&source) as Arc<dyn Source>;
        let parts = TreeParts {
            store,
            objects,
            names: Arc::new(One(entry())),
            fetcher: Fetcher::new(incoming, given, runtime.handle().clone(), FetchLimits::default()),
            mend: Arc::new(NoMend),
            lists_elsewhere: None,
            runtime: runtime.handle().clone(),
        };
        let tree = Tree::new(Role::Archives, fd("archives"), TreeOptions::default(), parts, None).unwrap();
        Arc::new(Self { tree, source, dir, runtime })
    }

    fn on_disk(&self) -> Option<Vec<u8>> {
        std::fs::read(self.dir.path().join("archives/partial").join(NAME)).ok()
    }

    /// The number of `partial/`, looked up once more.
    fn partial(&self) -> u64 {
        match self.tree.lookup(inode_root(), OsStr::new("partial"), &CALLER) {
            Answer::Ready(found) => found.unwrap().attr.ino,
            Answer::Wait(_) => panic!("a directory is here at once"),
        }
    }

    /// The ghost, looked up once more; `None` if none is shown.
    fn ghost(&self, partial: u64) -> Option<u64> {
        match self.tree.lookup(partial, OsStr::new(NAME), &CALLER) {
            Answer::Ready(Ok(entry)) => Some(entry.attr.ino),
            Answer::Ready(Err(err)) => {
                assert_eq!(err.errno(), Errno::NOENT);
                None
            }
            Answer::Wait(_) => panic!("a ghost is shown at once"),
        }
    }

    /// The verified bytes, as a download that has ended has them.
    fn fetched(&self) -> Arc<Fetched> {
        let fetching = self.tree.parts.fetcher.start(job());
        let mut fetched = None;
        model::until(|| {
            fetched = fetching.try_done();
            fetched.is_some()
        });
        fetched.unwrap().unwrap()
    }

    /// apt's lock, opened for writing as apt does.
    fn lock(&self) -> Result<u64, FsError> {
        let name = OsStr::new(crate::lock::LOCK_NAME);
        let flags = libc::O_WRONLY | libc::O_CREAT;
        let created = match self.tree.create(inode_root(), name, 0o640, flags | libc::O_EXCL, &CALLER) {
            Answer::Ready(created) => created,
            Answer::Wait(_) => panic!("an exclusive creation is answered at once"),
        };
        match created {
            Ok((_, opened)) => Ok(opened.fh),
            Err(FsError::Backing(Errno::EXIST)) => {
                let Answer::Ready(found) = self.tree.lookup(inode_root(), name, &CALLER) else { panic!("it is on the disk") };
                match self.tree.open(found.unwrap().attr.ino, libc::O_WRONLY) {
                    Answer::Ready(opened) => Ok(opened?.fh),
                    Answer::Wait(_) => panic!("whoever only writes waits for no hashing"),
                }
            }
            Err(err) => Err(err),
        }
    }
}

fn inode_root() -> u64 {
    crate::inode::ROOT
}

fn entry() -> catalog::Entry {
    catalog::Entry {
        name: NAME.into(),
        digest: Digest::of(&bytes()),
        size: bytes().len() as u64,
        date: 0,
        urls: vec![MirrorUrl { url: format!("http://m/{NAME}"), proxy: None, immutable: true, private: false }],
        package: "x".into(),
        version: "1".into(),
        private: false,
    }
}

fn job() -> Job {
    let catalog::Entry { digest, size, urls, .. } = entry();
    Job { digest, size, urls, purpose: Purpose::Read, audience: Audience::Everybody }
}

/// A name that apt has removed must not come back because its bytes arrive: apt would take them for what it was about to put there.
#[test]
fn removal_against_arrival() {
    let site = Site::new();
    model::check(ORDERS, move || {
        let partial = site.partial();
        let ino = site.ghost(partial).expect("the catalog names it");
        let fetched = site.fetched();
        let arriving = model::spawn({
            let site = Arc::clone(&site);
            move || {
                let node = site.tree.table.get(ino)?;
                site.tree.materialise(&node, &fetched)
            }
        });
        let removing = model::spawn({
            let site = Arc::clone(&site);
            move || {
                site.tree.unlink(partial, OsStr::new(NAME)).unwrap();
                assert_eq!(site.on_disk(), None, "removed, and there");
            }
        });
        let looking = model::spawn({
            let site = Arc::clone(&site);
            move || {
                let shown = site.ghost(partial);
                if let Some(shown) = shown {
                    // What is shown has the size of the package, here or not.
                    assert_eq!(site.tree.getattr(shown).unwrap().0.size, bytes().len() as u64);
                    site.tree.forget(shown, 1);
                }
            }
        });
        let arrived = arriving.join().unwrap();
        removing.join().unwrap();
        looking.join().unwrap();
        assert_eq!(site.on_disk(), None, "it came back; arrived: {arrived:?}");
        assert_eq!(site.ghost(partial), None, "it is shown again");
        site.tree.forget(ino, 1);
        site.tree.forget(partial, 1);
        // The next run of apt starts afresh.
        let lock = site.lock().unwrap();
        site.tree.release(lock).unwrap();
        site.tree.parts.objects.make_room(u64::MAX).unwrap();
    });
}

/// Two holders: while one of them has it open the lock is held on the disk, and afterwards it is not.
#[test]
fn two_handles_on_the_lock() {
    let site = Site::new();
    let plain = site.dir.path().join("archives").join(crate::lock::LOCK_NAME);
    model::check(ORDERS, move || {
        let partial = site.partial();
        let free = || crate::lock::hold(File::options().read(true).write(true).open(&plain).unwrap()).unwrap().is_some();
        let holders: Vec<_> = (0..2)
            .map(|_| {
                let (site, plain) = (Arc::clone(&site), plain.clone());
                model::spawn(move || {
                    let lock = site.lock().unwrap();
                    assert!(site.tree.run.lock().is_locked());
                    let outside = crate::lock::hold(File::options().read(true).write(true).open(&plain).unwrap()).unwrap();
                    assert!(outside.is_none(), "it can be had outside");
                    // What is looked up now belongs to the run that has the lock.
                    if let Some(ghost) = site.ghost(partial) {
                        assert!(site.tree.run.lock().is_planned(partial, OsStr::new(NAME)));
                        site.tree.forget(ghost, 1);
                    }
                    site.tree.release(lock).unwrap();
                })
            })
            .collect();
        for holder in holders {
            holder.join().unwrap();
        }
        assert!(!site.tree.run.lock().is_locked());
        assert!(free(), "it is held by nobody");
        assert_eq!(site.tree.run.lock().plan_bytes(), 0);
        site.tree.forget(partial, 1);
        let (tree, runtime) = (&site.tree, &site.runtime);
        runtime.block_on(tree.settled());
    });
}

/// Requests for one digest join: never two downloads of it at a time, whoever comes and goes; and none that nobody wants.
#[test]
fn requests_join() {
    let site = Site::new();
    model::check(ORDERS, move || {
        let asked_before = site.source.asked().len();
        let readers: Vec<_> = (0..3)
            .map(|reader| {
                let site = Arc::clone(&site);
                model::spawn(move || {
                    let fetching = site.tree.parts.fetcher.start(job());
                    if reader == 0 {
                        // Goes away at once, which must not take it from the others.
                        return None;
                    }
                    let mut outcome = None;
                    model::until(|| {
                        outcome = fetching.try_done();
                        outcome.is_some()
                    });
                    Some(outcome.unwrap().unwrap())
                })
            })
            .collect();
        let mut got = readers.into_iter().map(|reader| reader.join().unwrap());
        assert!(got.next().unwrap().is_none());
        let (one, other) = (got.next().unwrap().unwrap(), got.next().unwrap().unwrap());
        assert!(Arc::ptr_eq(&one, &other), "each had a download of his own");
        assert_eq!(one.sums().digest, Digest::of(&bytes()));
        // That of the one who went away may have ended with him.
        let asked = site.source.asked().len() - asked_before;
        assert!((1..=2).contains(&asked), "the source was asked {asked} times");
        // Its bytes leave `incoming/`, so that the next order begins with nothing.
        let archives = File::open(site.dir.path().join("archives")).unwrap();
        one.place(std::os::fd::AsFd::as_fd(&archives), OsStr::new("joined")).unwrap();
        std::fs::remove_file(site.dir.path().join("archives/joined")).unwrap();
        drop((one, other));
        model::until(|| site.tree.parts.fetcher.progress().is_empty());
    });
}
