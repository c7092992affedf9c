//! What this machine holds: every file of both directories, the objects kept beside them and the downloads in progress.
//!
//! ```text
//! /var/lib/poolfs/poolfs.db        records of files and objects, sums by digest, bitmaps of downloads (crate::db)
//! the covered directories          the backing files: plain files with apt's names
//! /var/cache/poolfs/objects/HEX    verified files kept by digest, so that they go on being shared
//! /var/cache/poolfs/incoming/HEX   downloads in progress: full length, nothing in them is verified
//! ```
//!
//! The three kinds of directory are reached through descriptors only, never by path: a mount on top does not matter, and
//! a rename between them stays on one mount. File names are bytes.
//!
//! # What a crash may leave
//!
//! The database and the files cannot change in one step, so each operation has an order in which every intermediate
//! state is harmless. Two rules carry all of it:
//!
//! * **A record is a claim that is checked, never trusted.** A reader gets bytes of a `clean` file only block by block,
//!   each compared with its checksum; and only while size, mtime and inode of the backing file are those of the record.
//!   A file without a record, in state `writing`, or with another stamp is hashed again at open. So a file that is newer
//!   or older than its record is found out, whichever of the two a crash kept. The checksums carry a seal of their own
//!   ([`Store::sums`] gives none where it is broken), so that rot in the database is not taken for rot in the file.
//! * **The database may forget, but never half.** Each change is one transaction in WAL mode. After `kill -9` all
//!   committed transactions are there (they are in the page cache). After power loss the last ones may be missing
//!   (`synchronous = NORMAL`), which is a state that the order below has already made harmless.
//!
//! | operation | order | left by a crash in between |
//! |---|---|---|
//! | write | [`Store::begin_writing`] before the first byte; write; hash; [`Store::record`] | state `writing`: hashed again. Where a whole file is overwritten in place, `begin_writing` is forced to the disk ([`Store::flush_to_disk`]), since a lost one would let the old sums "repair" the new bytes away |
//! | place a download | pieces written; `fsync`; whole digest checked; rename to its name; `fsync` of the directory; only then is apt told; [`Store::record`]; the row of `incoming` goes | before the rename: a download to resume. After it: a whole file without a record, hashed at open; the row without a file is dropped by [`Incoming::open`] |
//! | place across file systems | copy to a temporary name in the target directory; `fsync`; rename; `fsync` of the directory; unlink of the source | a file named [`TEMP_PREFIX`]...: [`sweep`] removes it; or source and target both, each whole |
//! | a piece arrives | bytes written, then its bit | a piece too few. After power loss the bit may have outlived the bytes: the whole digest finds it, and the file is not renamed |
//! | a piece again | its bit cleared, bytes written, its bit | a piece too few |
//! | keep as object | rename into `objects/`; row | a file without a row: [`Objects::unrecorded`], hashed by [`Objects::adopt`] or evicted first |
//! | object to a name | `fsync`; rename out; row deleted; `fsync` of the directory; only then is apt told | a row without a file: dropped by [`Objects::open`]; the placed file has no record and is hashed; or, with the rename not on the disk, a file without a row as above |
//! | evict | unlink; row deleted | a row without a file |
//! | rename, exchange, unlink | the backing directory first, then the record | a record without a file (removed by the start's comparison), a file without a record (hashed), or a record whose inode differs (hashed) |
//!
//! A file that apt was told of is therefore on the disk before the answer, and losing its record costs one hashing.
//!
//! # Who uses it
//!
//! One process: the database is locked against a second one. All methods take `&self` and may be called from any thread;
//! they block for the disk, never for the network. Locks are taken in this order: [`Objects`]' or [`Partial`]'s own, the
//! batch of last uses, the database's writer.

mod deltas;
mod evict;
mod files;
mod incoming;
mod judged;
mod objects;
mod place;
mod shared;

pub use deltas::{DeltaHere, DeltaNote, PackageVersion};
pub use evict::Evicted;
pub use incoming::{Incoming, Partial, Progress, SIZE_BYTES_MAX, Staged};
pub use judged::{Changed, Decision, KeptBack, Origin};
pub use objects::{Kind, Lease, Objects, OpenObject, Taken};
pub use place::{Replace, TEMP_PREFIX, copy, flush_directory, place, rename, sweep};
pub use shared::{Shared, SharedTo};

use crate::db::{Db, DbError};
use crate::digest::Digest;
use crate::sync::Mutex;
use files::Uses;
use rustix::fs::Stat;
use serde::{Deserialize, Serialize};
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::SystemTime;

/// The database's name below the state directory.
pub const DB_NAME: &str = "poolfs.db";

/// Why the store could not do something.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The database failed: see [`DbError`] for which way.
    #[error(transparent)]
    Db(#[from] DbError),
    /// A file or directory of the store failed.
    #[error("{doing} {name}: {cause}")]
    Io {
        /// What was being done, an imperative.
        doing: &'static str,
        /// The file, as it is called below its directory.
        name: String,
        /// The kernel's word for it.
        cause: io::Error,
    },
    /// This digest is being downloaded already.
    #[error("{0} is being downloaded already; join that download")]
    InProgress(Digest),
    /// A size that no file can have.
    #[error("{digest} would have {size} bytes; more than {max} are not taken, so the index that says so is wrong")]
    TooLarge {
        /// The file.
        digest: Digest,
        /// Its alleged size in bytes.
        size: u64,
        /// The limit in bytes.
        max: u64,
    },
    /// A piece past the end, or one of the wrong length.
    #[error("piece {index} of {digest} has {want} bytes, not {got}")]
    NotAPiece {
        /// The file.
        digest: Digest,
        /// The piece's number.
        index: u32,
        /// The length it has; 0 past the end.
        want: u64,
        /// The length of what was given.
        got: usize,
    },
}

impl StoreError {
    /// Whether a full disk or quota is the reason: what a caller answers with ENOSPC and by making room.
    pub fn is_full(&self) -> bool {
        match self {
            Self::Db(err) => matches!(err, DbError::Full { .. }),
            Self::Io { cause, .. } => matches!(cause.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded),
            Self::InProgress(_) | Self::TooLarge { .. } | Self::NotAPiece { .. } => false,
        }
    }

    fn io(doing: &'static str, name: impl ToString) -> impl FnOnce(io::Error) -> Self {
        move |cause| Self::Io { doing, name: name.to_string(), cause }
    }
}

/// Declares an enum whose variants are words in the database.
macro_rules! words {
    ($(#[$doc:meta])* $name:ident { $($(#[$variant_doc:meta])* $variant:ident = $word:literal,)+ }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
        pub enum $name { $($(#[$variant_doc])* #[serde(rename = $word)] $variant,)+ }

        impl $name {
            /// Every variant, in the order of declaration.
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];

            /// The word used in the database, in JSON and on the command line.
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $word,)+ }
            }

            /// The variant of that word, if there is one.
            pub fn from_word(word: &str) -> Option<Self> {
                match word { $($word => Some(Self::$variant),)+ _ => None }
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(self.as_str())
            }
        }

        impl rusqlite::ToSql for $name {
            fn to_sql(&self) -> rusqlite::Result<rusqlite::types::ToSqlOutput<'_>> {
                Ok(self.as_str().into())
            }
        }

        impl rusqlite::types::FromSql for $name {
            fn column_result(value: rusqlite::types::ValueRef<'_>) -> rusqlite::types::FromSqlResult<Self> {
                Self::from_word(value.as_str()?).ok_or(rusqlite::types::FromSqlError::InvalidType)
            }
        }
    };
}
pub(crate) use words;

words! {
    /// How far a file's bytes can be believed.
    State {
        /// Being written, or its record was lost: hashed before anybody reads it.
        Writing = "writing",
        /// Its sums are known; each block is checked when it is read.
        Clean = "clean",
        /// A block failed its checksum and could not be repaired.
        Damaged = "damaged",
    }
}

words! {
    /// Who may have a file.
    Sharing {
        /// In the DHT and served.
        Announced = "announced",
        /// Served to who asks for its digest, not in the DHT.
        Available = "available",
        /// Never leaves the machine.
        LocalOnly = "local-only",
        /// Would be shared, but would tell strangers that this machine is vulnerable.
        Withheld = "withheld",
    }
}

words! {
    /// Where a file's bytes came from.
    Provenance {
        /// Downloaded by poolfs from a mirror.
        Mirror = "mirror",
        /// Downloaded by poolfs from peers, wholly or partly.
        Peer = "peer",
        /// Made from an older version and a delta.
        Delta = "delta",
        /// Written through the mount, or found in the directory.
        WrittenHere = "written here",
    }
}

/// What tells a changed backing file from an unchanged one.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Stamp {
    /// Length in bytes.
    pub size: u64,
    /// Time of the last change of the bytes, nanoseconds since 1970.
    pub mtime_ns: i64,
    /// Inode number.
    pub inode: u64,
}

impl Stamp {
    /// The stamp in what `stat` said.
    pub fn of(stat: &Stat) -> Self {
        Self {
            size: u64::try_from(stat.st_size).unwrap_or(0),
            // An index's mtime may be anything; past the year 2262 all times are one.
            mtime_ns: stat.st_mtime.saturating_mul(1_000_000_000).saturating_add(i64::try_from(stat.st_mtime_nsec).unwrap_or(0)),
            inode: stat.st_ino,
        }
    }
}

/// What the database says of one file.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FileRecord {
    /// How far its bytes can be believed.
    pub state: State,
    /// Its SHA-256; `None` while writing.
    pub digest: Option<Digest>,
    /// The backing file when it was recorded; while writing only the inode counts.
    pub stamp: Stamp,
    /// Who may have it; local-only while writing.
    pub sharing: Sharing,
    /// Where its bytes came from.
    pub provenance: Provenance,
    /// When it was last hashed as a whole, seconds since 1970; 0 while writing.
    pub verified_at: i64,
    /// When it was last used, seconds since 1970.
    pub used_at: i64,
}

/// Files of one directory, counted.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Counts {
    /// All files.
    pub files: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Clean files that are announced.
    pub announced: u64,
    /// Clean files that are available.
    pub available: u64,
    /// Clean files that are local-only.
    pub local_only: u64,
    /// Clean files that are withheld.
    pub withheld: u64,
    /// Damaged files, however they are shared.
    pub damaged: u64,
}

/// Seconds since 1970, from whoever keeps the time.
pub type Clock = fn() -> i64;

/// The records of all files. See the module's text for the order of its operations.
#[derive(Debug)]
pub struct Store {
    db: Arc<Db>,
    clock: Clock,
    uses: Mutex<Uses>,
    changes: AtomicU64,
    watcher: Watcher,
}

/// Who is called after each change of a record.
#[derive(Default)]
struct Watcher(OnceLock<Box<dyn Fn() + Send + Sync>>);

impl std::fmt::Debug for Watcher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Watcher").field(&self.0.get().is_some()).finish()
    }
}

impl Store {
    /// Opens or creates `poolfs.db` in `state_dir`, which is created too (mode 0700).
    ///
    /// Checks the database's integrity. Refuses one that another process has open.
    pub fn open(state_dir: &Path) -> Result<Self, StoreError> {
        Self::open_with_clock(state_dir, system_clock)
    }

    /// As [`Self::open`] with another clock than the system's, for tests.
    pub fn open_with_clock(state_dir: &Path, clock: Clock) -> Result<Self, StoreError> {
        use std::os::unix::fs::DirBuilderExt as _;
        let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(state_dir);
        made.map_err(StoreError::io("create the state directory", state_dir.display()))?;
        let db = Arc::new(Db::open(&state_dir.join(DB_NAME))?);
        Ok(Self { db, clock, uses: Mutex::default(), changes: AtomicU64::new(0), watcher: Watcher::default() })
    }

    /// The database, which the catalog shares.
    pub fn db(&self) -> &Arc<Db> {
        &self.db
    }

    fn now(&self) -> i64 {
        (self.clock)()
    }

    /// One immediate transaction; its error says which database failed and how to mend it.
    fn write<T>(&self, body: impl FnOnce(&rusqlite::Transaction<'_>) -> rusqlite::Result<T>) -> Result<T, StoreError> {
        let done = self.db.transaction(body).map_err(|err| self.db.explain(err).into());
        self.changed();
        done
    }

    fn changed(&self) {
        self.changes.fetch_add(1, Ordering::Release);
        if let Some(call) = self.watcher.0.get() {
            call();
        }
    }

    /// One read of the last committed state.
    fn read<T>(&self, body: impl FnOnce(&rusqlite::Connection) -> rusqlite::Result<T>) -> Result<T, StoreError> {
        let reader = self.db.reader()?;
        body(&reader).map_err(|err| self.db.explain(err).into())
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        if let Err(err) = self.flush() {
            tracing::warn!("the last uses of files are lost: {err}");
        }
    }
}

fn system_clock() -> i64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
}

impl rusqlite::ToSql for Digest {
    fn to_sql(&self) -> rusqlite::Result<rusqlite::types::ToSqlOutput<'_>> {
        Ok(self.0.as_slice().into())
    }
}

impl rusqlite::types::FromSql for Digest {
    fn column_result(value: rusqlite::types::ValueRef<'_>) -> rusqlite::types::FromSqlResult<Self> {
        <[u8; 32]>::column_result(value).map(Self)
    }
}

#[cfg(test)]
mod crash;
#[cfg(test)]
mod interleave;
#[cfg(test)]
mod model;

#[cfg(test)]
mod tests;
