//! Eviction of objects: unrecorded files first, then indexes, then the rest, each the least recently used first.

use super::StoreError;
use super::incoming::remove;
use super::objects::{Objects, Shelf, delete_rows};
use crate::crash_point::crash_point;
use crate::digest::Digest;
use std::ffi::OsString;
use std::os::fd::AsFd as _;

/// Objects evicted in one transaction.
const BATCH_ROWS: u32 = 64;

/// What an eviction removed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Evicted {
    /// Files.
    pub files: u64,
    /// Their bytes.
    pub bytes: u64,
}

impl Objects {
    /// Evicts down to the quota. An object that is being read stays, even if the quota then stays exceeded.
    pub fn evict(&self) -> Result<Evicted, StoreError> {
        self.evict_locked(&mut self.shelf.lock(), self.quota())
    }

    /// Evicts until `bytes` are freed or nothing can be: for a plan that does not fit on the disk.
    pub fn make_room(&self, bytes: u64) -> Result<Evicted, StoreError> {
        let mut shelf = self.shelf.lock();
        let target = shelf.bytes.saturating_sub(bytes);
        self.evict_locked(&mut shelf, target)
    }

    pub(super) fn evict_locked(&self, shelf: &mut Shelf, bytes_max: u64) -> Result<Evicted, StoreError> {
        let mut evicted = Evicted::default();
        if shelf.bytes <= bytes_max {
            return Ok(evicted);
        }
        while shelf.bytes > bytes_max
            && let Some((digest, size)) = shelf.unrecorded.pop_first()
        {
            self.unlink(&digest, size, shelf, &mut evicted)?;
        }
        self.store.flush()?;
        let mut after: Option<(bool, i64, Digest)> = None;
        while shelf.bytes > bytes_max {
            let page = self.oldest(after)?;
            let mut gone = Vec::new();
            for (_, _, digest, size) in &page {
                if shelf.bytes <= bytes_max {
                    break;
                }
                if !self.is_read(digest) {
                    self.unlink(digest, *size, shelf, &mut evicted)?;
                    gone.push(*digest);
                }
            }
            crash_point("evict.unlinked");
            delete_rows(&self.store, &gone)?;
            let Some((kept, used_at, digest, _)) = page.last() else { break };
            after = Some((*kept, *used_at, *digest));
        }
        Ok(evicted)
    }

    /// The next objects in the order of eviction, after the given one: (no index, last use, digest, size).
    fn oldest(&self, after: Option<(bool, i64, Digest)>) -> Result<Vec<(bool, i64, Digest, u64)>, StoreError> {
        let (kept, used_at, digest) = after.map_or((false, i64::MIN, Vec::new()), |(kept, at, digest)| (kept, at, digest.0.to_vec()));
        self.store.read(|db| {
            db.prepare_cached(
                "SELECT kind <> 'index', used_at, digest, size FROM objects
                 WHERE (kind <> 'index', used_at, digest) > (?, ?, ?)
                 ORDER BY kind <> 'index', used_at, digest LIMIT ?",
            )?
            .query_map(rusqlite::params![kept, used_at, digest, BATCH_ROWS], |row| {
                Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get::<_, i64>(3)?.cast_unsigned()))
            })?
            .collect()
        })
    }

    fn unlink(&self, digest: &Digest, size: u64, shelf: &mut Shelf, evicted: &mut Evicted) -> Result<(), StoreError> {
        remove(self.dir.as_fd(), &OsString::from(digest.to_string()))?;
        shelf.bytes = shelf.bytes.saturating_sub(size);
        evicted.files += 1;
        evicted.bytes += size;
        Ok(())
    }
}
