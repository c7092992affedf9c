//! Records of files by role and path, and the sums of their contents by digest.

use super::{Counts, FileRecord, Provenance, Sharing, Stamp, State, Store, StoreError};
use crate::crash_point::crash_point;
use crate::digest::{BlockSum, Digest, Sums};
use crate::role::Role;
use rusqlite::{Connection, OptionalExtension as _, Row, Transaction, named_params, params};
use std::collections::HashMap;
use std::sync::Arc;

/// Last uses kept in memory before they are written in one transaction.
const USES_MAX: usize = 1024;

/// Records read at once by [`Store::each_file`].
const PAGE_ROWS: usize = 256;

/// Last uses that are not in the database yet; losing them costs nothing but the order of eviction.
#[derive(Debug, Default)]
pub(super) struct Uses {
    files: HashMap<(Role, Vec<u8>), i64>,
    objects: HashMap<Digest, i64>,
}

impl Uses {
    fn is_full(&self) -> bool {
        self.files.len() + self.objects.len() >= USES_MAX
    }
}

const RECORD: &str = "state, digest, size, mtime_ns, inode, sharing, source, verified_at, used_at";

impl Store {
    /// The record of one file. `path` is what lies below the mount, without a leading slash.
    pub fn file(&self, role: Role, path: &[u8]) -> Result<Option<FileRecord>, StoreError> {
        self.read(|db| {
            db.prepare_cached(&format!("SELECT {RECORD} FROM files WHERE role = ? AND path = ?"))?
                .query_row(params![role.as_str(), path], |row| record(row, 0))
                .optional()
        })
    }

    /// Says that the file with this inode is about to be written: call it before the first byte reaches the backing file.
    ///
    /// From here to [`Store::record`] the file counts as unverified. The answer is whether a whole file is overwritten in place:
    /// then [`Store::flush_to_disk`] comes before the first byte, too.
    pub fn begin_writing(&self, role: Role, path: &[u8], inode: u64) -> Result<bool, StoreError> {
        let now = self.now();
        let was_whole = self.file(role, path)?.is_some_and(|record| record.state != State::Writing);
        let body = |db: &Transaction<'_>| {
            db.prepare_cached(
                "INSERT INTO files (role, path, state, digest, size, mtime_ns, inode, sharing, source, verified_at, used_at)
                 VALUES (:role, :path, :state, NULL, 0, 0, :inode, :sharing, :source, 0, :now)
                 ON CONFLICT (role, path) DO UPDATE SET state = excluded.state, digest = NULL, size = 0, mtime_ns = 0,
                     inode = excluded.inode, sharing = excluded.sharing, source = excluded.source, verified_at = 0, used_at = excluded.used_at",
            )?
            .execute(named_params! {
                ":role": role.as_str(), ":path": path, ":state": State::Writing, ":inode": inode.cast_signed(),
                ":sharing": Sharing::LocalOnly, ":source": Provenance::WrittenHere, ":now": now,
            })?;
            crash_point("begin_writing.uncommitted");
            Ok(())
        };
        self.write(body).map(|()| was_whole)
    }

    /// Waits until all that was said so far would outlive a power loss: milliseconds to tens of them.
    pub fn flush_to_disk(&self) -> Result<(), StoreError> {
        // What a durable transaction waits for is the whole log before it; it has to change something itself.
        let rewritten = self.db.durable_transaction(|db| {
            let version: u32 = db.query_row("PRAGMA user_version", [], |row| row.get(0))?;
            db.pragma_update(None, "user_version", version)
        });
        rewritten.map_err(|err| self.db.explain(err).into())
    }

    /// Records a file whose bytes have just been hashed as `clean`.
    ///
    /// `stamp` is the backing file's from *before* the hashing began, so that a change in between shows as another stamp.
    pub fn record(
        &self,
        role: Role,
        path: &[u8],
        stamp: Stamp,
        sums: &Sums,
        sharing: Sharing,
        provenance: Provenance,
    ) -> Result<(), StoreError> {
        let now = self.now();
        self.write(|db| {
            put_sums(db, sums)?;
            crash_point("record.sums");
            db.prepare_cached(
                "INSERT INTO files (role, path, state, digest, size, mtime_ns, inode, sharing, source, verified_at, used_at)
                 VALUES (:role, :path, :state, :digest, :size, :mtime_ns, :inode, :sharing, :source, :now, :now)
                 ON CONFLICT (role, path) DO UPDATE SET state = excluded.state, digest = excluded.digest, size = excluded.size,
                     mtime_ns = excluded.mtime_ns, inode = excluded.inode, sharing = excluded.sharing, source = excluded.source,
                     verified_at = excluded.verified_at",
            )?
            .execute(named_params! {
                ":role": role.as_str(), ":path": path, ":state": State::Clean, ":digest": sums.digest,
                ":size": stamp.size.cast_signed(), ":mtime_ns": stamp.mtime_ns, ":inode": stamp.inode.cast_signed(),
                ":sharing": sharing, ":source": provenance, ":now": now,
            })?;
            crash_point("record.uncommitted");
            Ok(())
        })
    }

    /// Sets the state of a recorded file; `false` if there is no such record. `Writing` is what [`Store::begin_writing`] sets.
    pub fn set_state(&self, role: Role, path: &[u8], state: State) -> Result<bool, StoreError> {
        match state {
            State::Writing => match self.file(role, path)? {
                Some(record) => self.begin_writing(role, path, record.stamp.inode).map(|_| true),
                None => Ok(false),
            },
            State::Clean | State::Damaged => self.write(|db| {
                // A file without a digest has nothing that it could be clean or damaged against.
                db.prepare_cached("UPDATE files SET state = ? WHERE role = ? AND path = ? AND digest IS NOT NULL")?
                    .execute(params![state, role.as_str(), path])
                    .map(|rows| rows > 0)
            }),
        }
    }

    /// Renews the stamp of a recorded file whose bytes were found unchanged, or whose times were set; `false` if there is
    /// no such record or it is being written.
    pub fn set_stamp(&self, role: Role, path: &[u8], stamp: Stamp) -> Result<bool, StoreError> {
        self.write(|db| {
            db.prepare_cached("UPDATE files SET size = ?, mtime_ns = ?, inode = ? WHERE role = ? AND path = ? AND state <> ?")?
                .execute(params![stamp.size.cast_signed(), stamp.mtime_ns, stamp.inode.cast_signed(), role.as_str(), path, State::Writing])
                .map(|rows| rows > 0)
        })
    }

    /// Sets who may have a recorded file; `false` if there is no such record.
    pub fn set_sharing(&self, role: Role, path: &[u8], sharing: Sharing) -> Result<bool, StoreError> {
        self.write(|db| {
            db.prepare_cached("UPDATE files SET sharing = ? WHERE role = ? AND path = ?")?
                .execute(params![sharing, role.as_str(), path])
                .map(|rows| rows > 0)
        })
    }

    /// Notes that a file was used now. Kept in memory and written with others; [`Store::flush`] writes them at once.
    pub fn used(&self, role: Role, path: &[u8]) -> Result<(), StoreError> {
        let now = self.now();
        let full = {
            let mut uses = self.uses.lock();
            uses.files.insert((role, path.to_vec()), now);
            uses.is_full()
        };
        if full { self.flush() } else { Ok(()) }
    }

    /// As [`Store::used`] for an object.
    pub(super) fn used_object(&self, digest: &Digest) -> Result<(), StoreError> {
        let now = self.now();
        let full = {
            let mut uses = self.uses.lock();
            uses.objects.insert(*digest, now);
            uses.is_full()
        };
        if full { self.flush() } else { Ok(()) }
    }

    /// Writes the last uses that are still in memory. If that fails they are forgotten.
    pub fn flush(&self) -> Result<(), StoreError> {
        let uses = std::mem::take(&mut *self.uses.lock());
        if uses.files.is_empty() && uses.objects.is_empty() {
            return Ok(());
        }
        self.write(|db| {
            let mut files = db.prepare_cached("UPDATE files SET used_at = ? WHERE role = ? AND path = ?")?;
            for ((role, path), at) in &uses.files {
                files.execute(params![at, role.as_str(), path])?;
            }
            let mut objects = db.prepare_cached("UPDATE objects SET used_at = ? WHERE digest = ?")?;
            for (digest, at) in &uses.objects {
                objects.execute(params![at, digest])?;
            }
            Ok(())
        })
    }

    /// Follows the rename of a file or a whole tree; what was at `to` is gone, as in the backing directory.
    ///
    /// Call it when the backing file has been renamed. Neither path may lie below the other (the kernel refuses that).
    pub fn renamed(&self, role: Role, from: &[u8], to: &[u8]) -> Result<(), StoreError> {
        if from == to {
            return Ok(());
        }
        self.flush()?;
        self.write(|db| {
            delete_tree(db, role, to)?;
            crash_point("renamed.half");
            move_tree(db, role, from, to)
        })
    }

    /// Follows the exchange of two files or trees (`RENAME_EXCHANGE`). Neither path may lie below the other.
    pub fn exchanged(&self, role: Role, a: &[u8], b: &[u8]) -> Result<(), StoreError> {
        /// No path starts with a slash, so nothing is ever there.
        const ASIDE: &[u8] = b"/exchanged";
        if a == b {
            return Ok(());
        }
        self.flush()?;
        self.write(|db| {
            move_tree(db, role, a, ASIDE)?;
            move_tree(db, role, b, a)?;
            crash_point("exchanged.half");
            move_tree(db, role, ASIDE, b)
        })
    }

    /// Forgets a file or a whole tree; an empty path is the whole role.
    pub fn removed(&self, role: Role, path: &[u8]) -> Result<(), StoreError> {
        self.write(|db| {
            if path.is_empty() {
                db.execute("DELETE FROM files WHERE role = ?", [role.as_str()])?;
                return Ok(());
            }
            delete_tree(db, role, path)
        })
    }

    /// Calls `visit` for each file in the order of paths.
    ///
    /// No lock or snapshot is held meanwhile: `visit` may take its time and change the store, and sees some of the
    /// changes made since the call began.
    pub fn each_file(&self, role: Role, mut visit: impl FnMut(&[u8], &FileRecord)) -> Result<(), StoreError> {
        let mut after: Option<Vec<u8>> = None;
        loop {
            let page: Vec<(Vec<u8>, FileRecord)> = self.read(|db| {
                db.prepare_cached(&format!("SELECT path, {RECORD} FROM files WHERE role = ? AND path > ? ORDER BY path LIMIT {PAGE_ROWS}"))?
                    .query_map(params![role.as_str(), after.as_deref().unwrap_or_default()], |row| Ok((row.get(0)?, record(row, 1)?)))?
                    .collect()
            })?;
            for (path, record) in &page {
                visit(path, record);
            }
            if page.len() < PAGE_ROWS {
                return Ok(());
            }
            after = page.into_iter().next_back().map(|(path, _)| path);
        }
    }

    /// Where clean files with this digest lie.
    pub fn places(&self, digest: &Digest) -> Result<Vec<(Role, Vec<u8>)>, StoreError> {
        let rows: Vec<(String, Vec<u8>)> = self.read(|db| {
            db.prepare_cached("SELECT role, path FROM files WHERE digest = ? AND state = ? ORDER BY role, path")?
                .query_map(params![digest, State::Clean], |row| Ok((row.get(0)?, row.get(1)?)))?
                .collect()
        })?;
        Ok(rows.into_iter().filter_map(|(role, path)| Some((Role::from_word(&role)?, path))).collect())
    }

    /// The files of one directory, counted.
    pub fn counts(&self, role: Role) -> Result<Counts, StoreError> {
        let mut counts = Counts::default();
        self.read(|db| {
            let mut statement =
                db.prepare_cached("SELECT state, sharing, count(*), sum(size) FROM files WHERE role = ? GROUP BY state, sharing")?;
            let mut rows = statement.query([role.as_str()])?;
            while let Some(row) = rows.next()? {
                let (state, sharing): (State, Sharing) = (row.get(0)?, row.get(1)?);
                let (files, bytes) = (row.get::<_, i64>(2)?.cast_unsigned(), row.get::<_, i64>(3)?.cast_unsigned());
                counts.files += files;
                // A row's size may be anything where a disk has made it so.
                counts.bytes = counts.bytes.saturating_add(bytes);
                match (state, sharing) {
                    (State::Writing, _) => {}
                    (State::Damaged, _) => counts.damaged += files,
                    (State::Clean, Sharing::Announced) => counts.announced += files,
                    (State::Clean, Sharing::Available) => counts.available += files,
                    (State::Clean, Sharing::LocalOnly) => counts.local_only += files,
                    (State::Clean, Sharing::Withheld) => counts.withheld += files,
                }
            }
            Ok(())
        })?;
        Ok(counts)
    }

    /// The sums of a file that is recorded or kept here. Read anew each time: about 640 bytes per MiB of file.
    ///
    /// `None` also where the row is broken: then hash the file again, its record is worth nothing.
    pub fn sums(&self, digest: &Digest) -> Result<Option<Arc<Sums>>, StoreError> {
        self.read(|db| get_sums(db, digest)).map(|sums| sums.map(Arc::new))
    }
}

fn record(row: &Row<'_>, first: usize) -> rusqlite::Result<FileRecord> {
    Ok(FileRecord {
        state: row.get(first)?,
        digest: row.get(first + 1)?,
        stamp: Stamp {
            size: row.get::<_, i64>(first + 2)?.cast_unsigned(),
            mtime_ns: row.get(first + 3)?,
            inode: row.get::<_, i64>(first + 4)?.cast_unsigned(),
        },
        sharing: row.get(first + 5)?,
        provenance: row.get(first + 6)?,
        verified_at: row.get(first + 7)?,
        used_at: row.get(first + 8)?,
    })
}

/// The bounds of what lies below the directory `path`: from `path/`, before `path0` (`0` follows `/` in ASCII).
fn below(path: &[u8]) -> (Vec<u8>, Vec<u8>) {
    ([path, b"/"].concat(), [path, b"0"].concat())
}

fn delete_tree(db: &Connection, role: Role, path: &[u8]) -> rusqlite::Result<()> {
    let (first, end) = below(path);
    db.prepare_cached("DELETE FROM files WHERE role = ?1 AND (path = ?2 OR (path >= ?3 AND path < ?4))")?.execute(params![
        role.as_str(),
        path,
        first,
        end
    ])?;
    Ok(())
}

/// Moves `from` and what lies below it; nothing may be at `to`.
fn move_tree(db: &Connection, role: Role, from: &[u8], to: &[u8]) -> rusqlite::Result<()> {
    let (first, end) = below(from);
    // `||` makes text, byte for byte; the cast makes it bytes again.
    db.prepare_cached(
        "UPDATE files SET path = CAST(?5 || substr(path, ?6) AS BLOB)
         WHERE role = ?1 AND (path = ?2 OR (path >= ?3 AND path < ?4))",
    )?
    .execute(params![role.as_str(), from, first, end, to, i64::try_from(from.len() + 1).unwrap_or(i64::MAX)])?;
    Ok(())
}

/// Stores the sums of a content that is about to be referred to; mends a broken row.
pub(super) fn put_sums(db: &Connection, sums: &Sums) -> rusqlite::Result<()> {
    let pieces: Vec<u8> = sums.pieces.iter().flat_map(|piece| piece.0).collect();
    let blocks: Vec<u8> = sums.blocks.iter().flat_map(|block| block.0).collect();
    db.prepare_cached(
        "INSERT INTO contents (digest, size, pieces, blocks, seal) VALUES (?1, ?2, ?3, ?4, ?5)
         ON CONFLICT (digest) DO UPDATE SET size = ?2, pieces = ?3, blocks = ?4, seal = ?5
         WHERE size IS NOT ?2 OR pieces IS NOT ?3 OR blocks IS NOT ?4 OR seal IS NOT ?5",
    )?
    .execute(params![
        sums.digest,
        sums.size.cast_signed(),
        pieces,
        blocks,
        seal(&sums.digest, sums.size, &pieces, &blocks).as_slice()
    ])?;
    Ok(())
}

pub(super) fn get_sums(db: &Connection, digest: &Digest) -> rusqlite::Result<Option<Sums>> {
    db.prepare_cached("SELECT size, pieces, blocks, seal FROM contents WHERE digest = ?")?
        .query_row([digest], |row| {
            let size = row.get::<_, i64>(0)?.cast_unsigned();
            let (pieces, blocks) = (row.get_ref(1)?.as_blob()?, row.get_ref(2)?.as_blob()?);
            if row.get_ref(3)?.as_blob()? != seal(digest, size, pieces, blocks) {
                tracing::warn!("the sums of {digest} in the database are broken; the file is hashed again");
                return Ok(None);
            }
            let sum = |chunk: &[u8]| <[u8; 32]>::try_from(chunk).expect("chunks of 32 bytes");
            Ok(Some(Sums {
                digest: *digest,
                size,
                pieces: pieces.chunks_exact(32).map(|chunk| Digest(sum(chunk))).collect(),
                blocks: blocks.chunks_exact(32).map(|chunk| BlockSum(sum(chunk))).collect(),
            }))
        })
        .optional()
        .map(Option::flatten)
}

fn seal(digest: &Digest, size: u64, pieces: &[u8], blocks: &[u8]) -> [u8; 32] {
    *blake3::Hasher::new().update(&digest.0).update(&size.to_le_bytes()).update(pieces).update(blocks).finalize().as_bytes()
}
