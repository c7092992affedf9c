//! Objects: verified files kept by digest in `objects/HEX`, so that they go on being shared when apt has deleted them.

use super::files::{get_sums, put_sums};
use super::incoming::{digest_of, names, remove, sums_of};
use super::place::{self, Replace, TEMP_PREFIX};
use super::{Provenance, Sharing, Stamp, Store, StoreError, words};
use crate::crash_point::crash_point;
use crate::digest::{Digest, Sums};
use crate::sync::Mutex;
use rusqlite::{OptionalExtension as _, params};
use rustix::fs::AtFlags;
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

words! {
    /// What an object is, which decides when it is evicted.
    Kind {
        /// A `.deb`.
        Package = "package",
        /// An index of apt's lists: the first to be evicted, since tomorrow nobody asks for it.
        Index = "index",
        /// A delta between two packages.
        Delta = "delta",
    }
}

/// The `objects/` directory.
#[derive(Debug)]
pub struct Objects {
    pub(super) store: Arc<Store>,
    pub(super) dir: OwnedFd,
    pub(super) quota_bytes: AtomicU64,
    /// Held over each operation, so that none finds a file half kept; taken before the database's writer.
    pub(super) shelf: Mutex<Shelf>,
    readers: Arc<Mutex<HashMap<Digest, usize>>>,
}

#[derive(Debug)]
pub(super) struct Shelf {
    /// Bytes of all files, recorded or not.
    pub(super) bytes: u64,
    /// Files without a row, left by a crash or by a database that was moved away: digest as named, not verified, and size.
    pub(super) unrecorded: BTreeMap<Digest, u64>,
}

/// An object taken out of the store: what [`Store::record`] wants to know of it.
#[derive(Clone, Debug)]
pub struct Taken {
    /// The file under its new name.
    pub stamp: Stamp,
    /// Its sums, known from before.
    pub sums: Arc<Sums>,
    /// How it was shared.
    pub sharing: Sharing,
    /// Where its bytes came from.
    pub provenance: Provenance,
}

/// An object open for reading. While its lease lives it is not evicted.
#[derive(Debug)]
pub struct OpenObject {
    /// The file, read-only. Check each block against `sums` before its bytes go anywhere.
    pub file: File,
    /// The sums to check with.
    pub sums: Arc<Sums>,
    /// Keeps the object from eviction until dropped.
    pub lease: Lease,
}

/// Keeps an object from being evicted.
#[derive(Debug)]
pub struct Lease {
    digest: Digest,
    readers: Arc<Mutex<HashMap<Digest, usize>>>,
}

impl Drop for Lease {
    fn drop(&mut self) {
        let mut readers = self.readers.lock();
        if let Some(count) = readers.get_mut(&self.digest) {
            *count -= 1;
            if *count == 0 {
                readers.remove(&self.digest);
            }
        }
    }
}

struct ObjectRow {
    stamp: Stamp,
    sharing: Sharing,
    provenance: Provenance,
}

impl Objects {
    /// Takes over the directory: drops rows without a file, notes files without a row ([`Objects::unrecorded`]).
    ///
    /// `quota_bytes` bounds what is kept here; what is over it already is evicted by the next [`Objects::evict`].
    pub fn open(store: Arc<Store>, dir: OwnedFd, quota_bytes: u64) -> Result<Self, StoreError> {
        let mut present = HashSet::new();
        for name in names(dir.as_fd())? {
            if let Some(digest) = digest_of(&name) {
                present.insert(digest);
            } else if name.as_encoded_bytes().starts_with(TEMP_PREFIX.as_bytes()) {
                remove(dir.as_fd(), &name)?;
            } else {
                tracing::warn!("{} in the objects directory is not an object; it is left alone", place::shown(&name));
            }
        }
        let mut bytes: u64 = 0;
        let mut gone = Vec::new();
        store.read(|db| {
            let mut statement = db.prepare("SELECT digest, size FROM objects")?;
            let mut rows = statement.query([])?;
            while let Some(row) = rows.next()? {
                let digest: Digest = row.get(0)?;
                if present.remove(&digest) {
                    bytes = bytes.saturating_add(row.get::<_, i64>(1)?.cast_unsigned());
                } else {
                    gone.push(digest);
                }
            }
            Ok(())
        })?;
        delete_rows(&store, &gone)?;
        let mut unrecorded = BTreeMap::new();
        for digest in present {
            match rustix::fs::statat(&dir, digest.to_string(), AtFlags::SYMLINK_NOFOLLOW) {
                Ok(stat) => {
                    let size = Stamp::of(&stat).size;
                    bytes = bytes.saturating_add(size);
                    unrecorded.insert(digest, size);
                }
                Err(Errno::NOENT) => {}
                Err(err) => return Err(StoreError::io("stat the object", digest)(err.into())),
            }
        }
        Ok(Self {
            store,
            dir,
            quota_bytes: AtomicU64::new(quota_bytes),
            shelf: Mutex::new(Shelf { bytes, unrecorded }),
            readers: Arc::default(),
        })
    }

    /// Bytes that may be kept.
    pub fn quota(&self) -> u64 {
        self.quota_bytes.load(Ordering::Relaxed)
    }

    /// Bounds what is kept from now on; what is over it already is evicted by the next [`Objects::evict`].
    pub fn set_quota(&self, bytes: u64) {
        self.quota_bytes.store(bytes, Ordering::Relaxed);
    }

    /// Keeps a verified file: renames it in, and evicts others if the quota is exceeded.
    ///
    /// `false` if it was not taken, and is still under its name: an object with this digest is here already (then it
    /// counts as used now), or the file alone is larger than the quota. The caller vouches that the file had `sums` when
    /// it was recorded; whoever reads the object checks each block.
    #[allow(clippy::too_many_arguments, reason = "what is known of a file that moves, and where it is")]
    pub fn put(
        &self,
        digest: &Digest,
        sums: &Sums,
        kind: Kind,
        sharing: Sharing,
        provenance: Provenance,
        from_dir: BorrowedFd<'_>,
        from_name: &OsStr,
    ) -> Result<bool, StoreError> {
        let mut shelf = self.shelf.lock();
        if self.row(digest)?.is_some() {
            self.store.used_object(digest)?;
            return Ok(false);
        }
        let failed = |err: Errno| StoreError::io("keep as an object", place::shown(from_name))(err.into());
        let before = Stamp::of(&rustix::fs::statat(from_dir, from_name, AtFlags::SYMLINK_NOFOLLOW).map_err(failed)?);
        if before.size > self.quota() || before.size != sums.size || *digest != sums.digest {
            return Ok(false);
        }
        if let Some(size) = shelf.unrecorded.remove(digest) {
            // Whatever it holds, the file that comes now is better known.
            shelf.bytes = shelf.bytes.saturating_sub(size);
        }
        let name = OsString::from(digest.to_string());
        match place::rename(from_dir, from_name, self.dir.as_fd(), &name, Replace::Yes) {
            // Nothing is promised of an object, so nothing is flushed; across file systems there is no choice.
            Err(Errno::XDEV) => place::place(from_dir, from_name, self.dir.as_fd(), &name, Replace::Yes)
                .map_err(StoreError::io("keep as an object", place::shown(from_name)))?,
            other => other.map_err(failed)?,
        }
        crash_point("put.renamed");
        let stamp = Stamp::of(&rustix::fs::statat(&self.dir, &name, AtFlags::SYMLINK_NOFOLLOW).map_err(failed)?);
        shelf.bytes = shelf.bytes.saturating_add(stamp.size);
        if let Err(err) = self.insert(sums, kind, sharing, provenance, stamp) {
            shelf.unrecorded.insert(*digest, stamp.size);
            return Err(err);
        }
        crash_point("put.recorded");
        self.evict_locked(&mut shelf, self.quota())?;
        Ok(true)
    }

    fn insert(&self, sums: &Sums, kind: Kind, sharing: Sharing, provenance: Provenance, stamp: Stamp) -> Result<(), StoreError> {
        let now = self.store.now();
        self.store.write(|db| {
            put_sums(db, sums)?;
            db.prepare_cached(
                "INSERT INTO objects (digest, kind, sharing, source, size, mtime_ns, inode, used_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            )?
            .execute(params![
                sums.digest,
                kind,
                sharing,
                provenance,
                stamp.size.cast_signed(),
                stamp.mtime_ns,
                stamp.inode.cast_signed(),
                now
            ])
            .map(drop)
        })
    }

    /// Brings an object's bytes to the disk, so that a [`Objects::take`] that follows has little to wait for. `false` if there is
    /// none.
    pub fn flush(&self, digest: &Digest) -> Result<bool, StoreError> {
        let Some(object) = self.open_object(digest)? else { return Ok(false) };
        object.file.sync_all().map_err(StoreError::io("flush the object", digest))?;
        Ok(true)
    }

    /// Moves an object to a name in a covered directory; it is an object no longer. The caller records it, and waits for
    /// [`flush_directory`](super::flush_directory) before he tells anybody that it is there.
    ///
    /// `None` if there is none, or if the file is not the one that was put here (then it is dropped). An existing
    /// `to_name` is an error and changes nothing.
    pub fn take(&self, digest: &Digest, to_dir: BorrowedFd<'_>, to_name: &OsStr) -> Result<Option<Taken>, StoreError> {
        let mut shelf = self.shelf.lock();
        let Some((row, sums)) = self.checked(&mut shelf, digest)? else { return Ok(None) };
        let name = OsString::from(digest.to_string());
        let failed = |err| StoreError::io("place an object as", place::shown(to_name))(err);
        let file = place::open_regular(self.dir.as_fd(), &name).map_err(failed)?;
        file.sync_all().map_err(failed)?;
        crash_point("take.synced");
        match place::rename(self.dir.as_fd(), &name, to_dir, to_name, Replace::Never) {
            Err(Errno::XDEV) => place::place(self.dir.as_fd(), &name, to_dir, to_name, Replace::Never).map_err(failed)?,
            other => other.map_err(|err| failed(err.into()))?,
        }
        crash_point("take.placed");
        shelf.bytes = shelf.bytes.saturating_sub(row.stamp.size);
        let stat = rustix::fs::statat(to_dir, to_name, AtFlags::SYMLINK_NOFOLLOW).map_err(|err| failed(err.into()))?;
        delete_rows(&self.store, &[*digest])?;
        Ok(Some(Taken { stamp: Stamp::of(&stat), sums, sharing: row.sharing, provenance: row.provenance }))
    }

    /// Opens an object for reading; `None` if there is none, or if the file is not the one that was put here.
    pub fn open_object(&self, digest: &Digest) -> Result<Option<OpenObject>, StoreError> {
        let mut shelf = self.shelf.lock();
        let Some((_, sums)) = self.checked(&mut shelf, digest)? else { return Ok(None) };
        let file = place::open_regular(self.dir.as_fd(), OsStr::new(&digest.to_string()));
        let file = file.map_err(StoreError::io("open the object", digest))?;
        *self.readers.lock().entry(*digest).or_default() += 1;
        let lease = Lease { digest: *digest, readers: Arc::clone(&self.readers) };
        self.store.used_object(digest)?;
        Ok(Some(OpenObject { file, sums, lease }))
    }

    /// Whether there is such an object. No promise: it may be evicted a moment later.
    pub fn contains(&self, digest: &Digest) -> Result<bool, StoreError> {
        Ok(self.row(digest)?.is_some())
    }

    /// The device that the directory lies on (`st_dev`).
    #[allow(clippy::unnecessary_cast, reason = "the field's type differs by architecture")]
    pub fn device(&self) -> Result<u64, StoreError> {
        let stat = rustix::fs::fstat(&self.dir).map_err(|err| StoreError::io("stat", "the objects directory")(err.into()))?;
        Ok(stat.st_dev as u64)
    }

    /// Bytes of all files in the directory.
    pub fn bytes(&self) -> u64 {
        self.shelf.lock().bytes
    }

    /// Sets who may have an object; `false` if there is none.
    pub fn set_sharing(&self, digest: &Digest, sharing: Sharing) -> Result<bool, StoreError> {
        self.store.write(|db| {
            db.prepare_cached("UPDATE objects SET sharing = ? WHERE digest = ?")?.execute(params![sharing, digest]).map(|rows| rows > 0)
        })
    }

    /// Who may have an object; `None` if there is none.
    pub fn sharing(&self, digest: &Digest) -> Result<Option<Sharing>, StoreError> {
        Ok(self.row(digest)?.map(|row| row.sharing))
    }

    /// Calls `visit` with digest, size in bytes and sharing of each object, in the order of digests.
    pub fn each(&self, mut visit: impl FnMut(&Digest, u64, Sharing)) -> Result<(), StoreError> {
        const PAGE_ROWS: u32 = 256;
        let mut after: Vec<u8> = Vec::new();
        loop {
            let page: Vec<(Digest, i64, Sharing)> = self.store.read(|db| {
                db.prepare_cached("SELECT digest, size, sharing FROM objects WHERE digest > ? ORDER BY digest LIMIT ?")?
                    .query_map(params![after, PAGE_ROWS], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))?
                    .collect()
            })?;
            for (digest, size, sharing) in &page {
                visit(digest, size.cast_unsigned(), *sharing);
            }
            match page.last() {
                Some((digest, ..)) if page.len() == PAGE_ROWS as usize => after = digest.0.to_vec(),
                _ => return Ok(()),
            }
        }
    }

    /// Files in the directory that no row tells of, with their sizes in bytes: left by a crash, or by a database that was
    /// moved away. They are not offered to anybody before [`Objects::adopt`], and are the first to be evicted.
    pub fn unrecorded(&self) -> Vec<(Digest, u64)> {
        self.shelf.lock().unrecorded.iter().map(|(digest, size)| (*digest, *size)).collect()
    }

    /// Hashes an unrecorded file and makes it an object if it is what its name says, else removes it. Reads all of it:
    /// something for an idle moment. `false` if there is no such file or it was removed.
    pub fn adopt(&self, digest: &Digest, kind: Kind, sharing: Sharing) -> Result<bool, StoreError> {
        if !self.shelf.lock().unrecorded.contains_key(digest) {
            return Ok(false);
        }
        let name = OsString::from(digest.to_string());
        let hashed = place::open_regular(self.dir.as_fd(), &name).and_then(|file| {
            let stamp = Stamp::of(&rustix::fs::fstat(&file)?);
            Ok((stamp, sums_of(&file)?))
        });
        let mut shelf = self.shelf.lock();
        let Some(size) = shelf.unrecorded.remove(digest) else { return Ok(false) };
        match hashed {
            Ok((stamp, sums)) if sums.digest == *digest => {
                shelf.bytes = shelf.bytes.saturating_sub(size).saturating_add(stamp.size);
                self.insert(&sums, kind, sharing, Provenance::WrittenHere, stamp)?;
                Ok(true)
            }
            _ => {
                shelf.bytes = shelf.bytes.saturating_sub(size);
                remove(self.dir.as_fd(), &name)?;
                Ok(false)
            }
        }
    }

    /// Removes an object whose bytes were found wrong; `false` if there is none. Who reads it keeps its open file.
    pub fn discard(&self, digest: &Digest) -> Result<bool, StoreError> {
        let mut shelf = self.shelf.lock();
        let Some(row) = self.row(digest)? else { return Ok(false) };
        remove(self.dir.as_fd(), OsStr::new(&digest.to_string()))?;
        shelf.bytes = shelf.bytes.saturating_sub(row.stamp.size);
        delete_rows(&self.store, &[*digest])?;
        Ok(true)
    }

    pub(super) fn is_read(&self, digest: &Digest) -> bool {
        self.readers.lock().contains_key(digest)
    }

    fn row(&self, digest: &Digest) -> Result<Option<ObjectRow>, StoreError> {
        self.store.read(|db| {
            db.prepare_cached("SELECT size, mtime_ns, inode, sharing, source FROM objects WHERE digest = ?")?
                .query_row([digest], |row| {
                    Ok(ObjectRow {
                        stamp: Stamp {
                            size: row.get::<_, i64>(0)?.cast_unsigned(),
                            mtime_ns: row.get(1)?,
                            inode: row.get::<_, i64>(2)?.cast_unsigned(),
                        },
                        sharing: row.get(3)?,
                        provenance: row.get(4)?,
                    })
                })
                .optional()
        })
    }

    /// The row and the sums of an object whose file is still the one that was put here; drops any other.
    fn checked(&self, shelf: &mut Shelf, digest: &Digest) -> Result<Option<(ObjectRow, Arc<Sums>)>, StoreError> {
        let Some(row) = self.row(digest)? else { return Ok(None) };
        let name = OsString::from(digest.to_string());
        let found = match rustix::fs::statat(&self.dir, &name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => Some(Stamp::of(&stat)),
            Err(Errno::NOENT) => None,
            Err(err) => return Err(StoreError::io("stat the object", digest)(err.into())),
        };
        let sums = self.store.read(|db| get_sums(db, digest))?;
        if found == Some(row.stamp)
            && let Some(sums) = sums
        {
            return Ok(Some((row, Arc::new(sums))));
        }
        tracing::warn!("the object {digest} is not what was put there; it is dropped");
        remove(self.dir.as_fd(), &name)?;
        shelf.bytes = shelf.bytes.saturating_sub(row.stamp.size);
        delete_rows(&self.store, &[*digest])?;
        Ok(None)
    }
}

pub(super) fn delete_rows(store: &Store, digests: &[Digest]) -> Result<(), StoreError> {
    if digests.is_empty() {
        return Ok(());
    }
    store.write(|db| {
        let mut delete = db.prepare_cached("DELETE FROM objects WHERE digest = ?")?;
        digests.iter().try_for_each(|digest| delete.execute([digest]).map(drop))
    })
}
