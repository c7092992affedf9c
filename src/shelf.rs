//! What this machine gives to peers: the network side's [`Shelf`] over the store, the objects and the covered directories.
//!
//! A file is opened beneath the mounts, by the directories' own descriptors, and handed out only if size, mtime and inode
//! are those of its record. The bytes are checked by who sends them; here it is only told that a block was wrong, looked at once
//! more, and the record marked, so that the next reader has it mended.

use parking_lot::{Mutex, RwLock};
use poolfs_core::piece::{self, BLOCK_BYTES};
use poolfs_core::store::{Lease, Objects, SharedTo, Stamp, State, Store, StoreError};
use poolfs_core::{BlockSum, Digest, Role, Sums};
use poolfs_net::peer::{Audience, Shelf, Shelved};
use rustix::fs::{FileType, Mode, OFlags, ResolveFlags};
use std::collections::VecDeque;
use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;
use tokio::sync::watch;

/// Sums kept in memory: a file is asked for piece by piece, and the sums of a large one take longer to read than a piece.
const SUMS_KEPT_MAX: usize = 16;

/// Times that an unlucky rename may make a file look absent.
const OPEN_TRIES: usize = 2;

/// See the module.
#[derive(Debug)]
pub struct StoreShelf {
    store: Arc<Store>,
    objects: Arc<Objects>,
    /// The covered directories.
    dirs: RwLock<Vec<(Role, OwnedFd)>>,
    /// Latest used last. Sums belong to a content, so they never grow old.
    sums: Mutex<VecDeque<Arc<Sums>>>,
    /// Whether everything was judged; nothing is given before.
    judged: Option<watch::Receiver<bool>>,
}

impl StoreShelf {
    /// Gives what `store` and `objects` hold; files of a role without a directory are not given.
    pub fn new(store: Arc<Store>, objects: Arc<Objects>, dirs: Vec<(Role, OwnedFd)>) -> Self {
        Self { store, objects, dirs: RwLock::new(dirs), sums: Mutex::default(), judged: None }
    }

    /// Gives nothing before `judged`: what the database says is how it was judged when the daemon last ran.
    #[must_use]
    pub fn after(self, judged: watch::Receiver<bool>) -> Self {
        Self { judged: Some(judged), ..self }
    }

    /// From now on files of that role are given from `dir`.
    pub fn set_dir(&self, role: Role, dir: OwnedFd) {
        let mut dirs = self.dirs.write();
        dirs.retain(|(of, _)| *of != role);
        dirs.push((role, dir));
    }

    fn look(&self, digest: &Digest, to: Audience) -> Result<Option<Shelved>, StoreError> {
        let to = match to {
            Audience::Stranger => SharedTo::Strangers,
            Audience::Fleet => SharedTo::Fleet,
        };
        // Both are asked, whatever the first says: a file that is kept back takes as long as one that is not here.
        let places = self.store.shared_places(digest, to)?;
        let is_object = self.objects.is_shared(digest, to)?;
        if self.judged.as_ref().is_some_and(|judged| !*judged.borrow()) {
            return Ok(None);
        }
        for (role, path, stamp) in places {
            if let Some(file) = self.open(role, &path, stamp)
                && let Some(sums) = self.sums(digest)?
            {
                return Ok(Some(Shelved { file: file.into(), sums }));
            }
        }
        if !is_object {
            return Ok(None);
        }
        let object = self.objects.open_object(digest)?;
        Ok(object.map(|object| Shelved { file: object.file.into(), sums: object.sums }))
    }

    /// A file of this content for use on this machine itself, whoever may have it; with what keeps it from being evicted.
    pub fn open_here(&self, digest: &Digest) -> Result<Option<(File, Option<Lease>)>, StoreError> {
        for (role, path) in self.store.places(digest)? {
            if let Some(record) = self.store.file(role, &path)?
                && let Some(file) = self.open(role, &path, record.stamp)
            {
                return Ok(Some((file, None)));
            }
        }
        Ok(self.objects.open_object(digest)?.map(|object| (object.file, Some(object.lease))))
    }

    /// The file at `path`, if it is still the one that was recorded.
    fn open(&self, role: Role, path: &[u8], stamp: Stamp) -> Option<File> {
        let dirs = self.dirs.read();
        let (_, dir) = dirs.iter().find(|(of, _)| *of == role)?;
        // NONBLOCK: a fifo under this name must not hang us.
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_SYMLINKS;
        let mut tries = OPEN_TRIES;
        let fd = loop {
            tries -= 1;
            match rustix::fs::openat2(dir, OsStr::from_bytes(path), flags, Mode::empty(), resolve) {
                Ok(fd) => break fd,
                Err(rustix::io::Errno::AGAIN) if tries > 0 => {}
                Err(_) => return None,
            }
        };
        let stat = rustix::fs::fstat(&fd).ok()?;
        let same = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile && Stamp::of(&stat) == stamp;
        same.then(|| fd.into())
    }

    fn sums(&self, digest: &Digest) -> Result<Option<Arc<Sums>>, StoreError> {
        let mut kept = self.sums.lock();
        if let Some(at) = kept.iter().position(|sums| sums.digest == *digest) {
            let sums = kept.remove(at).expect("just found");
            kept.push_back(Arc::clone(&sums));
            return Ok(Some(sums));
        }
        drop(kept);
        let sums = self.store.sums(digest)?;
        if let Some(sums) = &sums {
            let mut kept = self.sums.lock();
            kept.push_back(Arc::clone(sums));
            while kept.len() > SUMS_KEPT_MAX {
                kept.pop_front();
            }
        }
        Ok(sums)
    }

    /// Marks what is damaged: whatever holds the block and has other bytes there.
    fn mark(&self, digest: &Digest, block: u64) -> Result<(), StoreError> {
        let Some(sums) = self.store.sums(digest)? else { return Ok(()) };
        for (role, path, stamp) in self.store.shared_places(digest, SharedTo::Fleet)? {
            // A file that changed meanwhile is hashed when it is opened next; this is for bytes that changed in silence.
            if self.open(role, &path, stamp).is_some_and(|file| !holds(&file, &sums, block)) {
                tracing::warn!(%role, path = %String::from_utf8_lossy(&path), block, "damaged on disk, found when a peer asked for it");
                self.store.set_state(role, &path, State::Damaged)?;
            }
        }
        if let Some(object) = self.objects.open_object(digest)?
            && !holds(&object.file, &sums, block)
        {
            tracing::warn!(%digest, block, "an object is damaged on disk and dropped");
            drop(object.lease);
            self.objects.discard(digest)?;
        }
        Ok(())
    }
}

/// Whether block `block` of the file is what its sum says.
fn holds(file: &File, sums: &Sums, block: u64) -> bool {
    let span = piece::span(block, sums.size, BLOCK_BYTES);
    let mut bytes = vec![0; usize::try_from(span.end - span.start).expect("a block's length")];
    let sum = usize::try_from(block).ok().and_then(|index| sums.blocks.get(index));
    sum.is_some_and(|sum| file.read_exact_at(&mut bytes, span.start).is_ok() && BlockSum::of(&bytes) == *sum)
}

impl Shelf for StoreShelf {
    fn find(&self, digest: &Digest, to: Audience) -> Option<Shelved> {
        self.look(digest, to).unwrap_or_else(|err| {
            tracing::warn!(%digest, "not given to a peer: {err}");
            None
        })
    }

    fn damaged(&self, digest: &Digest, block: u64) {
        if let Err(err) = self.mark(digest, block) {
            tracing::error!(%digest, block, "damaged, and not marked so: {err}");
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;
    use poolfs_core::store::{Kind, Provenance, Sharing};
    use std::os::fd::AsFd as _;
    use std::path::Path;

    struct Rig {
        dir: tempfile::TempDir,
        store: Arc<Store>,
        objects: Arc<Objects>,
        shelf: StoreShelf,
    }

    fn open_dir(path: &Path) -> OwnedFd {
        std::fs::create_dir_all(path).unwrap();
        File::open(path).unwrap().into()
    }

    fn rig() -> Rig {
        let dir = tempfile::tempdir().unwrap();
        let store = Arc::new(Store::open(&dir.path().join("state")).unwrap());
        let objects = Arc::new(Objects::open(Arc::clone(&store), open_dir(&dir.path().join("objects")), 1 << 30).unwrap());
        let dirs = vec![(Role::Archives, open_dir(&dir.path().join("archives")))];
        let shelf = StoreShelf::new(Arc::clone(&store), Arc::clone(&objects), dirs);
        Rig { dir, store, objects, shelf }
    }

    impl Rig {
        fn file(&self, name: &str, bytes: &[u8], sharing: Sharing) -> Digest {
            let path = self.dir.path().join("archives").join(name);
            std::fs::write(&path, bytes).unwrap();
            let stamp = Stamp::of(&rustix::fs::stat(&path).unwrap());
            let sums = Sums::of(bytes);
            self.store.record(Role::Archives, name.as_bytes(), stamp, &sums, sharing, Provenance::Mirror).unwrap();
            sums.digest
        }

        fn object(&self, bytes: &[u8], sharing: Sharing) -> Digest {
            let from = self.dir.path().join("from");
            let dir = open_dir(&from);
            std::fs::write(from.join("x"), bytes).unwrap();
            let sums = Sums::of(bytes);
            let put =
                self.objects.put(&sums.digest, &sums, Kind::Package, sharing, Provenance::Mirror, dir.as_fd(), OsStr::new("x")).unwrap();
            assert!(put);
            sums.digest
        }

        fn gives(&self, digest: &Digest, to: Audience) -> Option<Vec<u8>> {
            let found = self.shelf.find(digest, to)?;
            let mut bytes = vec![0; usize::try_from(found.sums.size).unwrap()];
            assert_eq!(found.sums.digest, *digest);
            File::from(found.file).read_exact_at(&mut bytes, 0).unwrap();
            Some(bytes)
        }
    }

    /// One wrong cell of this table gives a private package away.
    #[test]
    fn who_may_have_what() {
        let rig = rig();
        for (sharing, stranger, fleet) in [
            (Sharing::Announced, true, true),
            (Sharing::Available, true, true),
            (Sharing::Withheld, false, true),
            (Sharing::LocalOnly, false, false),
        ] {
            let file = format!("file {sharing}").into_bytes();
            let digest = rig.file(sharing.as_str(), &file, sharing);
            assert_eq!(rig.gives(&digest, Audience::Stranger), stranger.then(|| file.clone()), "{sharing}");
            assert_eq!(rig.gives(&digest, Audience::Fleet), fleet.then_some(file), "{sharing}");
            let object = format!("object {sharing}").into_bytes();
            let digest = rig.object(&object, sharing);
            assert_eq!(rig.gives(&digest, Audience::Stranger), stranger.then(|| object.clone()), "{sharing}");
            assert_eq!(rig.gives(&digest, Audience::Fleet), fleet.then_some(object), "{sharing}");
        }
        assert_eq!(rig.gives(&Digest::of(b"unknown"), Audience::Fleet), None);
    }

    /// What was announced when the daemon last ran may be private or old by now: it is given only after it was judged.
    #[test]
    fn nothing_before_it_was_judged() {
        let mut rig = rig();
        let (tell, judged) = watch::channel(false);
        rig.shelf = rig.shelf.after(judged);
        let file = rig.file("a", b"a", Sharing::Announced);
        let object = rig.object(b"object", Sharing::Available);
        for to in [Audience::Stranger, Audience::Fleet] {
            assert!(rig.gives(&file, to).is_none() && rig.gives(&object, to).is_none());
        }
        tell.send_replace(true);
        assert!(rig.gives(&file, Audience::Stranger).is_some() && rig.gives(&object, Audience::Stranger).is_some());
    }

    /// A copy that is kept back must not stop one that may be given, nor be given in its place.
    #[test]
    fn of_several_copies_the_shared_one_counts() {
        let rig = rig();
        let digest = rig.file("private", b"same", Sharing::LocalOnly);
        assert_eq!(rig.gives(&digest, Audience::Stranger), None);
        rig.file("public", b"same", Sharing::Available);
        assert_eq!(rig.gives(&digest, Audience::Stranger), Some(b"same".to_vec()));
        rig.store.removed(Role::Archives, b"public").unwrap();
        assert_eq!(rig.gives(&digest, Audience::Stranger), None);
    }

    /// A file that changed since it was recorded is another file; a link could lead anywhere on the machine.
    #[test]
    fn only_the_recorded_file() {
        let rig = rig();
        let archives = rig.dir.path().join("archives");
        let digest = rig.file("a", b"recorded", Sharing::Announced);
        assert!(rig.gives(&digest, Audience::Stranger).is_some());
        std::fs::write(archives.join("a"), b"other bytes").unwrap();
        assert_eq!(rig.gives(&digest, Audience::Stranger), None, "another size");
        let digest = rig.file("b", b"recorded too", Sharing::Announced);
        std::fs::rename(archives.join("b"), archives.join("elsewhere")).unwrap();
        std::os::unix::fs::symlink("elsewhere", archives.join("b")).unwrap();
        assert_eq!(rig.gives(&digest, Audience::Stranger), None, "a link");
        std::fs::remove_file(archives.join("b")).unwrap();
        assert_eq!(rig.gives(&digest, Audience::Stranger), None, "gone");
        let digest = rig.file("c", b"being written", Sharing::Announced);
        rig.store.begin_writing(Role::Archives, b"c", 1).unwrap();
        assert_eq!(rig.gives(&digest, Audience::Stranger), None, "being written");
    }

    /// Damage that is not marked is met again by every peer, and mended by nobody; marking a healthy file takes it away from all.
    #[test]
    fn damage_is_looked_at_and_marked() {
        let rig = rig();
        let bytes = vec![7; 3 * BLOCK_BYTES as usize];
        let digest = rig.file("a", &bytes, Sharing::Announced);
        let object = rig.object(b"an object", Sharing::Available);
        rig.shelf.damaged(&digest, 1);
        rig.shelf.damaged(&object, 0);
        rig.shelf.damaged(&Digest::of(b"unknown"), 0);
        assert!(rig.gives(&digest, Audience::Stranger).is_some() && rig.gives(&object, Audience::Stranger).is_some(), "nothing is wrong");
        let flip = |path: &Path, at: u64| {
            let stat = rustix::fs::stat(path).unwrap();
            let file = File::options().write(true).open(path).unwrap();
            file.write_all_at(b"!", at).unwrap();
            // In silence, as a disk does it.
            file.set_modified(
                std::time::UNIX_EPOCH + std::time::Duration::new(stat.st_mtime.cast_unsigned(), u32::try_from(stat.st_mtime_nsec).unwrap()),
            )
            .unwrap();
        };
        flip(&rig.dir.path().join("archives/a"), u64::from(BLOCK_BYTES) + 5);
        flip(&rig.dir.path().join("objects").join(object.to_string()), 0);
        rig.shelf.damaged(&digest, 0);
        assert!(rig.gives(&digest, Audience::Stranger).is_some(), "another block");
        rig.shelf.damaged(&digest, 1);
        assert_eq!(rig.store.file(Role::Archives, b"a").unwrap().unwrap().state, State::Damaged);
        assert_eq!(rig.gives(&digest, Audience::Stranger), None);
        rig.shelf.damaged(&object, 0);
        assert!(!rig.objects.contains(&object).unwrap());
    }
}
