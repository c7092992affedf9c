//! What is known of deltas: which package each content is, which deltas are here, and what became of those that were tried.

use super::place::TEMP_PREFIX;
use super::{Kind, Objects, Provenance, Sharing, Store, StoreError};
use crate::digest::{Digest, Sums};
use rusqlite::{OptionalExtension as _, params};
use rustix::fs::{AtFlags, Mode, OFlags};
use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::Write as _;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::sync::atomic::{AtomicU64, Ordering};

/// Tries and notes that are kept; the oldest go first.
const ROWS_KEPT: u32 = 20_000;

/// A version of a package.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct PackageVersion {
    /// Package name.
    pub package: String,
    /// As in the archive's name.
    pub architecture: String,
    /// As dpkg compares it.
    pub version: String,
}

/// A delta that is here, as an object.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct DeltaHere {
    /// What it makes.
    pub new: Digest,
    /// What it starts from.
    pub old: Digest,
    /// Its own digest.
    pub delta: Digest,
    /// Its length in bytes.
    pub bytes: u64,
}

/// What the last download of a file says of deltas.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DeltaNote {
    /// For people.
    pub note: String,
    /// Bytes that did not have to come, because of a delta.
    pub saved: u64,
}

impl Store {
    /// Notes which package a content is.
    pub fn name_version(&self, digest: &Digest, version: &PackageVersion) -> Result<(), StoreError> {
        self.write(|db| {
            db.prepare_cached("INSERT OR REPLACE INTO versions (digest, package, architecture, version) VALUES (?1, ?2, ?3, ?4)")?
                .execute(params![digest, version.package, version.architecture, version.version])
                .map(drop)
        })
    }

    /// Which package a content is, if that was noted.
    pub fn version_of(&self, digest: &Digest) -> Result<Option<PackageVersion>, StoreError> {
        self.read(|db| {
            db.prepare_cached("SELECT package, architecture, version FROM versions WHERE digest = ?1")?
                .query_row([digest], |row| Ok(PackageVersion { package: row.get(0)?, architecture: row.get(1)?, version: row.get(2)? }))
                .optional()
        })
    }

    /// The contents that are here, as clean files or as objects, of one package and architecture: version and digest.
    pub fn versions_here(&self, package: &str, architecture: &str) -> Result<Vec<(String, Digest)>, StoreError> {
        self.read(|db| {
            db.prepare_cached(
                "SELECT version, digest FROM versions WHERE package = ?1 AND architecture = ?2
                 AND (EXISTS (SELECT 1 FROM files WHERE files.digest = versions.digest AND state = 'clean')
                      OR EXISTS (SELECT 1 FROM objects WHERE objects.digest = versions.digest))",
            )?
            .query_map([package, architecture], |row| Ok((row.get(0)?, row.get(1)?)))?
            .collect()
        })
    }

    /// The contents that are here of every package of which there are several: with each its package and digest.
    pub fn packages_in_versions(&self) -> Result<Vec<(PackageVersion, Digest)>, StoreError> {
        self.read(|db| {
            db.prepare_cached(
                "WITH here AS (SELECT package, architecture, version, digest FROM versions
                     WHERE EXISTS (SELECT 1 FROM files WHERE files.digest = versions.digest AND state = 'clean')
                        OR EXISTS (SELECT 1 FROM objects WHERE objects.digest = versions.digest)),
                 several AS (SELECT package, architecture FROM here GROUP BY package, architecture HAVING count(*) > 1)
                 SELECT package, architecture, version, digest FROM here JOIN several USING (package, architecture)",
            )?
            .query_map([], |row| {
                Ok((PackageVersion { package: row.get(0)?, architecture: row.get(1)?, version: row.get(2)? }, row.get(3)?))
            })?
            .collect()
        })
    }

    /// Notes a delta that is here.
    pub fn add_delta(&self, delta: &DeltaHere) -> Result<(), StoreError> {
        self.write(|db| {
            db.prepare_cached("INSERT OR REPLACE INTO deltas (new, old, delta, bytes) VALUES (?1, ?2, ?3, ?4)")?
                .execute(params![delta.new, delta.old, delta.delta, delta.bytes.cast_signed()])
                .map(drop)
        })
    }

    /// Every delta that is here, with who may have it; the smallest to each file first.
    pub fn deltas_here(&self) -> Result<Vec<(DeltaHere, Sharing)>, StoreError> {
        self.read(|db| {
            db.prepare_cached(
                "SELECT new, old, delta, bytes, sharing FROM deltas JOIN objects ON objects.digest = deltas.delta ORDER BY new, bytes",
            )?
            .query_map([], |row| {
                let bytes = row.get::<_, i64>(3)?.cast_unsigned();
                Ok((DeltaHere { new: row.get(0)?, old: row.get(1)?, delta: row.get(2)?, bytes }, row.get(4)?))
            })?
            .collect()
        })
    }

    /// Between which files a delta that was noted here is: (old, new).
    pub fn delta_between(&self, delta: &Digest) -> Result<Option<(Digest, Digest)>, StoreError> {
        self.read(|db| {
            db.prepare_cached("SELECT old, new FROM deltas WHERE delta = ?1")?
                .query_row([delta], |row| Ok((row.get(0)?, row.get(1)?)))
                .optional()
        })
    }

    /// Whether a delta between the two is here, or was tried in vain.
    pub fn delta_is_settled(&self, old: &Digest, new: &Digest) -> Result<bool, StoreError> {
        self.read(|db| {
            db.prepare_cached(
                "SELECT EXISTS (SELECT 1 FROM delta_tries WHERE new = ?1 AND old = ?2)
                 OR EXISTS (SELECT 1 FROM deltas JOIN objects ON objects.digest = deltas.delta WHERE new = ?1 AND old = ?2)",
            )?
            .query_row([new, old], |row| row.get(0))
        })
    }

    /// Notes that a delta between the two is of no use, and why: it is not tried again.
    pub fn delta_failed(&self, old: &Digest, new: &Digest, why: &str) -> Result<(), StoreError> {
        let now = self.now();
        self.write(|db| {
            db.prepare_cached("INSERT OR REPLACE INTO delta_tries (new, old, what, at) VALUES (?1, ?2, ?3, ?4)")?
                .execute(params![new, old, why, now])?;
            db.prepare_cached("DELETE FROM delta_tries WHERE at < (SELECT at FROM delta_tries ORDER BY at DESC LIMIT 1 OFFSET ?1)")?
                .execute([ROWS_KEPT])
                .map(drop)
        })
    }

    /// Why a delta between the two was of no use, if one was tried.
    pub fn delta_failure(&self, old: &Digest, new: &Digest) -> Result<Option<String>, StoreError> {
        self.read(|db| {
            db.prepare_cached("SELECT what FROM delta_tries WHERE new = ?1 AND old = ?2")?
                .query_row([new, old], |row| row.get(0))
                .optional()
        })
    }

    /// Notes what the download of a file says of deltas.
    pub fn note_delta(&self, new: &Digest, note: &DeltaNote) -> Result<(), StoreError> {
        let now = self.now();
        self.write(|db| {
            db.prepare_cached("INSERT OR REPLACE INTO delta_notes (new, note, saved, at) VALUES (?1, ?2, ?3, ?4)")?.execute(params![
                new,
                note.note,
                note.saved.cast_signed(),
                now
            ])?;
            db.prepare_cached("DELETE FROM delta_notes WHERE at < (SELECT at FROM delta_notes ORDER BY at DESC LIMIT 1 OFFSET ?1)")?
                .execute([ROWS_KEPT])
                .map(drop)
        })
    }

    /// What the last download of a file says of deltas.
    pub fn delta_note(&self, new: &Digest) -> Result<Option<DeltaNote>, StoreError> {
        self.read(|db| {
            db.prepare_cached("SELECT note, saved FROM delta_notes WHERE new = ?1")?
                .query_row([new], |row| Ok(DeltaNote { note: row.get(0)?, saved: row.get::<_, i64>(1)?.cast_unsigned() }))
                .optional()
        })
    }

    /// Remembers how a package is packed.
    pub fn remember_recipes(&self, version: &PackageVersion, recipes: &[u8]) -> Result<(), StoreError> {
        self.write(|db| {
            db.prepare_cached("INSERT OR REPLACE INTO delta_recipes (package, architecture, recipes) VALUES (?1, ?2, ?3)")?
                .execute(params![version.package, version.architecture, recipes])
                .map(drop)
        })
    }

    /// How a package was packed before; empty where that is not known.
    pub fn recipes(&self, version: &PackageVersion) -> Result<Vec<u8>, StoreError> {
        self.read(|db| {
            let mut statement = db.prepare_cached("SELECT recipes FROM delta_recipes WHERE package = ?1 AND architecture = ?2")?;
            let row = statement.query_row([&version.package, &version.architecture], |row| row.get(0)).optional()?;
            Ok(row.unwrap_or_default())
        })
    }

    /// Forgets deltas whose objects went, and names of contents that are not here any more; blocks for the database.
    pub fn sweep_deltas(&self) -> Result<(), StoreError> {
        self.write(|db| {
            db.execute("DELETE FROM deltas WHERE NOT EXISTS (SELECT 1 FROM objects WHERE objects.digest = deltas.delta)", [])?;
            db.execute("DELETE FROM versions WHERE NOT EXISTS (SELECT 1 FROM contents WHERE contents.digest = versions.digest)", [])
                .map(drop)
        })
    }

    /// Who may have each content, of files and objects: the most that any copy allows.
    pub fn sharings(&self, digests: &[Digest]) -> Result<BTreeMap<Digest, Sharing>, StoreError> {
        /// From what may be had by most to what by nobody.
        fn rank(sharing: Sharing) -> u8 {
            match sharing {
                Sharing::Announced => 0,
                Sharing::Available => 1,
                Sharing::Withheld => 2,
                Sharing::LocalOnly => 3,
            }
        }
        self.read(|db| {
            let mut statement = db.prepare_cached(
                "SELECT sharing FROM files WHERE digest = ?1 AND state = 'clean' UNION ALL SELECT sharing FROM objects WHERE digest = ?1",
            )?;
            let mut all = BTreeMap::new();
            for digest in digests {
                let found = statement.query_map([digest], |row| row.get(0))?.collect::<rusqlite::Result<Vec<Sharing>>>()?;
                if let Some(most) = found.into_iter().min_by_key(|sharing| rank(*sharing)) {
                    all.insert(*digest, most);
                }
            }
            Ok(all)
        })
    }
}

/// Temporary names of this process.
static TEMP: AtomicU64 = AtomicU64::new(0);

impl Objects {
    /// Keeps bytes that were made here as an object; `false` where it is one already, or larger than the quota.
    pub fn add(&self, bytes: &[u8], sums: &Sums, kind: Kind, sharing: Sharing, provenance: Provenance) -> Result<bool, StoreError> {
        self.keep(sums, kind, sharing, provenance, |dir, name| {
            let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            File::from(rustix::fs::openat(dir, name, flags, Mode::from_raw_mode(0o644))?).write_all(bytes)
        })
    }

    /// Keeps as an object what `place` puts under a name in the directory; `false` as for [`Self::add`].
    pub fn keep(
        &self,
        sums: &Sums,
        kind: Kind,
        sharing: Sharing,
        provenance: Provenance,
        place: impl FnOnce(BorrowedFd<'_>, &OsStr) -> std::io::Result<()>,
    ) -> Result<bool, StoreError> {
        let name = OsString::from(format!("{TEMP_PREFIX}made-{}", TEMP.fetch_add(1, Ordering::Relaxed)));
        let placed = place(self.dir.as_fd(), &name).map_err(StoreError::io("write an object", sums.digest));
        let kept = placed.and_then(|()| self.put(&sums.digest, sums, kind, sharing, provenance, self.dir.as_fd(), &name));
        if !matches!(kept, Ok(true)) {
            // It is still under its temporary name; what stays is swept at the next start.
            let _ = rustix::fs::unlinkat(&self.dir, &name, AtFlags::empty());
        }
        kept
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;
    use crate::role::Role;
    use crate::store::Stamp;
    use std::sync::Arc;

    fn version(version: &str) -> PackageVersion {
        PackageVersion { package: "p".into(), architecture: "amd64".into(), version: version.into() }
    }

    /// A delta offered whose object is gone would be asked for in vain by everybody, and one tried for ever costs hours.
    #[test]
    fn deltas_come_and_go_with_their_objects() {
        let dir = tempfile::tempdir().unwrap();
        let store = Arc::new(Store::open(dir.path()).unwrap());
        std::fs::create_dir(dir.path().join("objects")).unwrap();
        let objects = Objects::open(Arc::clone(&store), File::open(dir.path().join("objects")).unwrap().into(), 1 << 20).unwrap();
        let (old, new, sums) = (Digest::of(b"old"), Digest::of(b"new"), Sums::of(b"delta"));
        let delta = DeltaHere { new, old, delta: sums.digest, bytes: 5 };
        assert!(objects.add(b"delta", &sums, Kind::Delta, Sharing::Available, Provenance::WrittenHere).unwrap());
        assert!(!objects.add(b"delta", &sums, Kind::Delta, Sharing::Available, Provenance::WrittenHere).unwrap(), "it is there");
        assert_eq!(std::fs::read_dir(dir.path().join("objects")).unwrap().count(), 1, "no temporary file is left");
        assert!(!store.delta_is_settled(&old, &new).unwrap());
        store.add_delta(&delta).unwrap();
        assert_eq!(store.deltas_here().unwrap(), [(delta, Sharing::Available)]);
        assert_eq!(store.delta_between(&sums.digest).unwrap(), Some((old, new)));
        assert!(store.delta_is_settled(&old, &new).unwrap());
        objects.discard(&sums.digest).unwrap();
        assert_eq!(store.deltas_here().unwrap(), []);
        assert!(!store.delta_is_settled(&old, &new).unwrap(), "it is made again");
        store.delta_failed(&old, &new, "no").unwrap();
        assert!(store.delta_is_settled(&old, &new).unwrap());
        assert_eq!(store.delta_failure(&old, &new).unwrap().as_deref(), Some("no"));
        store.sweep_deltas().unwrap();
        assert_eq!(store.delta_between(&sums.digest).unwrap(), None);
    }

    /// Only what is here can be the base of a delta: not what was here once, not another architecture's.
    #[test]
    fn versions_are_of_what_is_here() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let sums = Sums::of(b"one");
        let stamp = Stamp { size: 3, mtime_ns: 0, inode: 1 };
        store.record(Role::Archives, b"p_1_amd64.deb", stamp, &sums, Sharing::Available, Provenance::Mirror).unwrap();
        store.name_version(&sums.digest, &version("1")).unwrap();
        store.name_version(&Digest::of(b"two"), &version("2")).unwrap();
        let other = PackageVersion { architecture: "i386".into(), ..version("1") };
        store.name_version(&Digest::of(b"three"), &other).unwrap();
        assert_eq!(store.versions_here("p", "amd64").unwrap(), [("1".to_owned(), sums.digest)]);
        assert_eq!(store.packages_in_versions().unwrap(), []);
        let next = Sums::of(b"four");
        store.record(Role::Archives, b"p_4_amd64.deb", stamp, &next, Sharing::Available, Provenance::Mirror).unwrap();
        store.name_version(&next.digest, &version("4")).unwrap();
        let mut several = store.packages_in_versions().unwrap();
        several.sort();
        assert_eq!(several, [(version("1"), sums.digest), (version("4"), next.digest)]);
        store.removed(Role::Archives, b"p_4_amd64.deb").unwrap();
        assert_eq!(store.version_of(&sums.digest).unwrap(), Some(version("1")));
        assert_eq!(store.sharings(&[sums.digest]).unwrap(), [(sums.digest, Sharing::Available)].into());
        store.removed(Role::Archives, b"p_1_amd64.deb").unwrap();
        assert_eq!(store.versions_here("p", "amd64").unwrap(), []);
        store.remember_recipes(&version("1"), b"recipes").unwrap();
        assert_eq!(store.recipes(&version("2")).unwrap(), b"recipes");
        let note = DeltaNote { note: "used".into(), saved: 7 };
        store.note_delta(&sums.digest, &note).unwrap();
        assert_eq!(store.delta_note(&sums.digest).unwrap(), Some(note));
    }
}
