//! What this machine has to offer to others, for who announces it.

use super::{Objects, Sharing, Stamp, State, Store, StoreError};
use crate::digest::Digest;
use crate::role::Role;
use rusqlite::params;

/// A content that is here whole and verified, as a file or as an object.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Shared {
    /// Its SHA-256.
    pub digest: Digest,
    /// Its length in bytes.
    pub size: u64,
    /// When it came here, or was last used as an object, seconds since 1970; of several copies the latest.
    pub since: i64,
}

/// Who is to get something.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SharedTo {
    /// Anybody: what is announced or available.
    Strangers,
    /// This machine's fleet: also what is withheld.
    Fleet,
}

impl Store {
    /// A number that is another one after each change of a record: who saw the same number twice need not look again.
    pub fn changes(&self) -> u64 {
        self.changes.load(std::sync::atomic::Ordering::Acquire)
    }

    /// Has `call` called after each change of a record, by whoever made it: it must be quick and must not use the store. The first
    /// to say so is the only one.
    pub fn on_change(&self, call: impl Fn() + Send + Sync + 'static) {
        // Another one may look at `changes` now and then.
        drop(self.watcher.0.set(Box::new(call)));
    }

    /// All contents that are shared as one of `sharing`, each once, in the order of digests; damaged ones are left out.
    pub fn shared_as(&self, sharing: &[Sharing]) -> Result<Vec<Shared>, StoreError> {
        let mut found: Vec<Shared> = Vec::new();
        self.read(|db| {
            let mut statement = db.prepare_cached(
                "SELECT digest, size, verified_at FROM files WHERE sharing = ?1 AND state = ?2
                 UNION ALL SELECT digest, size, used_at FROM objects WHERE sharing = ?1",
            )?;
            for sharing in sharing {
                let rows = statement.query_map(params![sharing, State::Clean], |row| {
                    Ok(Shared { digest: row.get(0)?, size: row.get::<_, i64>(1)?.cast_unsigned(), since: row.get(2)? })
                })?;
                for row in rows {
                    found.push(row?);
                }
            }
            Ok(())
        })?;
        found.sort_by_key(|shared| (shared.digest, std::cmp::Reverse(shared.since)));
        found.dedup_by_key(|shared| shared.digest);
        Ok(found)
    }

    /// Where clean files with this digest lie that `to` may have, each with the stamp that it must still have to be what was
    /// recorded.
    pub fn shared_places(&self, digest: &Digest, to: SharedTo) -> Result<Vec<(Role, Vec<u8>, Stamp)>, StoreError> {
        let sql = match to {
            // By an index that what is kept back is not in: the time tells nothing of it. Without the index there is an error.
            SharedTo::Strangers => {
                "SELECT role, path, size, mtime_ns, inode FROM files INDEXED BY files_for_strangers
                 WHERE digest = ? AND state = 'clean' AND sharing IN ('announced', 'available') ORDER BY role, path"
            }
            SharedTo::Fleet => {
                "SELECT role, path, size, mtime_ns, inode FROM files
                 WHERE digest = ? AND state = 'clean' AND sharing IN ('announced', 'available', 'withheld') ORDER BY role, path"
            }
        };
        let rows: Vec<(String, Vec<u8>, Stamp)> = self.read(|db| {
            db.prepare_cached(sql)?
                .query_map([digest], |row| {
                    let stamp = Stamp {
                        size: row.get::<_, i64>(2)?.cast_unsigned(),
                        mtime_ns: row.get(3)?,
                        inode: row.get::<_, i64>(4)?.cast_unsigned(),
                    };
                    Ok((row.get(0)?, row.get(1)?, stamp))
                })?
                .collect()
        })?;
        Ok(rows.into_iter().filter_map(|(role, path, stamp)| Some((Role::from_word(&role)?, path, stamp))).collect())
    }
}

impl Objects {
    /// Whether there is such an object that `to` may have; as [`Store::shared_places`].
    pub fn is_shared(&self, digest: &Digest, to: SharedTo) -> Result<bool, StoreError> {
        let sql = match to {
            SharedTo::Strangers => {
                "SELECT 1 FROM objects INDEXED BY objects_for_strangers WHERE digest = ? AND sharing IN ('announced', 'available')"
            }
            SharedTo::Fleet => "SELECT 1 FROM objects WHERE digest = ? AND sharing IN ('announced', 'available', 'withheld')",
        };
        self.store.read(|db| db.prepare_cached(sql)?.exists([digest]))
    }
}
