//! Keeping, reading, taking and evicting one object by several threads, in every order that a scheduler comes upon.
#![allow(clippy::unwrap_used, reason = "tests")]

use super::*;
use crate::digest::Sums;
use crate::role::Role::Archives;
use crate::sync::model;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Read as _;
use std::os::fd::{AsFd as _, OwnedFd};

/// Orders tried; each is some milliseconds of SQLite.
const ORDERS: usize = 120;

struct Site {
    dir: tempfile::TempDir,
    store: Arc<Store>,
    objects: Objects,
}

impl Site {
    fn new() -> Arc<Self> {
        let dir = tempfile::tempdir().unwrap();
        for name in ["objects", "archives"] {
            fs::create_dir(dir.path().join(name)).unwrap();
        }
        let store = Arc::new(Store::open(&dir.path().join("state")).unwrap());
        let objects = File::open(dir.path().join("objects")).unwrap().into();
        let objects = Objects::open(Arc::clone(&store), objects, 1 << 20).unwrap();
        Arc::new(Self { dir, store, objects })
    }

    fn archives(&self) -> OwnedFd {
        File::open(self.dir.path().join("archives")).unwrap().into()
    }

    /// Writes a file and moves it into the store; `false` if it was not taken, and is still there.
    fn keep(&self, name: &str, bytes: &[u8]) -> bool {
        fs::write(self.dir.path().join("archives").join(name), bytes).unwrap();
        let (sums, archives) = (Sums::of(bytes), self.archives());
        let put =
            self.objects.put(&sums.digest, &sums, Kind::Package, Sharing::Available, Provenance::Peer, archives.as_fd(), OsStr::new(name));
        put.unwrap()
    }

    /// What database, directory and count say must be one thing.
    #[track_caller]
    fn agrees(&self, digest: &Digest, bytes: &[u8]) {
        let path = self.dir.path().join("objects").join(digest.to_string());
        let on_disk = fs::read(&path).ok();
        assert_eq!(self.objects.contains(digest).unwrap(), on_disk.is_some(), "a row without its file, or a file without its row");
        assert_eq!(self.objects.bytes(), on_disk.as_ref().map_or(0, Vec::len) as u64);
        assert!(on_disk.is_none_or(|on_disk| on_disk == bytes));
        assert!(self.objects.unrecorded().is_empty());
    }

    fn empty(&self) {
        self.objects.make_room(u64::MAX).unwrap();
        for entry in fs::read_dir(self.dir.path().join("archives")).unwrap() {
            fs::remove_file(entry.unwrap().path()).unwrap();
        }
    }
}

fn content(fill: u8) -> Vec<u8> {
    (0..70_000_u32).map(|at| u8::try_from(at % 251).unwrap() ^ fill).collect()
}

/// An object that is evicted under its reader would be read from a file that is none any more, or from another one.
#[test]
fn eviction_against_reading() {
    let site = Site::new();
    model::check(ORDERS, move || {
        let bytes = content(1);
        let digest = Digest::of(&bytes);
        assert!(site.keep("x", &bytes));
        let reading = model::spawn({
            let (site, bytes) = (Arc::clone(&site), bytes.clone());
            move || {
                let Some(mut object) = site.objects.open_object(&digest).unwrap() else { return };
                model::switch();
                assert!(site.objects.contains(&digest).unwrap(), "it was evicted while it was read");
                let mut read = Vec::new();
                object.file.read_to_end(&mut read).unwrap();
                assert!(read == bytes);
                drop(object.lease);
            }
        });
        let evicting = model::spawn({
            let site = Arc::clone(&site);
            move || {
                site.objects.set_quota(0);
                site.objects.evict().unwrap();
                site.objects.set_quota(1 << 20);
            }
        });
        let keeping = model::spawn({
            let (site, bytes) = (Arc::clone(&site), bytes.clone());
            move || site.keep("y", &bytes)
        });
        reading.join().unwrap();
        evicting.join().unwrap();
        let kept = keeping.join().unwrap();
        assert_ne!(kept, site.dir.path().join("archives/y").exists(), "what is not kept stays under its name");
        site.agrees(&digest, &bytes);
        site.empty();
    });
}

/// Two who take the same object, and one who evicts it: the file is under one name, under none, or still an object.
#[test]
fn eviction_against_taking() {
    let site = Site::new();
    model::check(ORDERS, move || {
        let bytes = content(2);
        let digest = Digest::of(&bytes);
        assert!(site.keep("x", &bytes));
        let take = |name: &'static str| {
            let site = Arc::clone(&site);
            move || {
                let archives = site.archives();
                let Some(taken) = site.objects.take(&digest, archives.as_fd(), OsStr::new(name)).unwrap() else { return false };
                site.store.record(Archives, name.as_bytes(), taken.stamp, &taken.sums, taken.sharing, taken.provenance).unwrap();
                true
            }
        };
        let (one, other) = (model::spawn(take("one")), model::spawn(take("other")));
        let evicting = model::spawn({
            let site = Arc::clone(&site);
            move || site.objects.make_room(u64::MAX).unwrap().files
        });
        let (one, other) = (one.join().unwrap(), other.join().unwrap());
        let evicted = evicting.join().unwrap();
        assert_eq!(u64::from(one) + u64::from(other) + evicted, 1, "one of them had it");
        for (name, taken) in [("one", one), ("other", other)] {
            assert_eq!(fs::read(site.dir.path().join("archives").join(name)).ok(), taken.then(|| bytes.clone()));
            assert_eq!(site.store.file(Archives, name.as_bytes()).unwrap().is_some(), taken);
            site.store.removed(Archives, name.as_bytes()).unwrap();
        }
        site.agrees(&digest, &bytes);
        site.empty();
    });
}
