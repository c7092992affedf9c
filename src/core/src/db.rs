//! `poolfs.db`: one SQLite database for files, objects, incoming files and the catalog.
//!
//! WAL mode, one writing connection behind a lock and a few reading ones. `synchronous = NORMAL`: after a power loss the
//! last transactions may be missing, never half there; [`crate::store`] says why that loses nothing. The schema has a
//! version (`user_version`) and migrations that each run in one transaction; a database from a newer poolfs is refused
//! untouched. The structure of the tables is checked at each start, of all of them after a crash.

use crate::crash_point::crash_point;
use crate::sync::{Mutex, MutexGuard};
use rusqlite::config::DbConfig;
use rusqlite::{Connection, ErrorCode, OpenFlags, Transaction, TransactionBehavior};
use rustix::fs::FlockOperation;
use rustix::io::Errno;
use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::ops::Deref;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Reading connections kept open; more readers than that open one of their own for a moment.
const IDLE_READERS_MAX: usize = 4;

/// How long a statement waits for another process that holds the database (a second `poolfs`, `sqlite3` by hand).
const BUSY_WAIT: Duration = Duration::from_secs(5);

/// Each migration brings the schema from version `index` to `index + 1`. Never edit one that was released: add another.
const MIGRATIONS: &[&str] =
    &[include_str!("db/0001.sql"), include_str!("db/0002.sql"), include_str!("db/0003.sql"), include_str!("db/0004.sql")];

/// How often the lock of another process is tried again, [`LOCK_PAUSE`] apart: a daemon that was just killed may still be going.
const LOCK_TRIES: u32 = 10;
const LOCK_PAUSE: Duration = Duration::from_millis(50);

/// Tables that are made again from apt's lists, and most of the database's bytes: after an orderly end a start does not
/// wait for them to be checked. A file's bytes never depend on them.
const DERIVED: &[&str] = &["packages", "newest"];

/// The smallest page that SQLite has, and so the smallest database with anything in it.
const SQLITE_BYTES_MIN: u64 = 512;

/// Marks a database as poolfs's own (`application_id`): "pool".
const APPLICATION_ID: u32 = 0x706f_6f6c;

/// What can be wrong with the database as a whole.
#[derive(Debug, thiserror::Error)]
pub enum DbError {
    /// It cannot be opened or created.
    #[error("open database {path}: {cause}; check that its directory exists and is writable")]
    Open {
        /// The database file.
        path: PathBuf,
        /// The system's or SQLite's word for it.
        cause: String,
    },
    /// Another process has it.
    #[error("database {path} is in use by process {holder}; stop that one (`poolfs down`), or give this one another state_dir")]
    InUse {
        /// The database file.
        path: PathBuf,
        /// What the other process says of itself: its number, or `unknown`.
        holder: String,
    },
    /// Its schema is newer than this program.
    #[error(
        "database {path} has schema version {found}, this poolfs knows up to {known}; install the newer poolfs, or move the file away to start afresh (packages are kept)"
    )]
    FromTheFuture {
        /// The database file.
        path: PathBuf,
        /// The version found.
        found: usize,
        /// The newest version known.
        known: usize,
    },
    /// It fails SQLite's integrity check, is no database or not poolfs's.
    #[error("database {path} is corrupt: {what}; move it away to start afresh (packages are kept, every file is hashed again)")]
    Corrupt {
        /// The database file.
        path: PathBuf,
        /// The check's first verdict, on one line.
        what: String,
    },
    /// The disk or a quota is full. The change was not made; what was there before is intact.
    #[error("no space for database {path}; free some space on its file system, nothing is lost")]
    Full {
        /// The database file.
        path: PathBuf,
    },
    /// The file or its file system cannot be written.
    #[error(
        "database {path} is read-only; make the file and its directory writable (a file system that had errors is remounted read-only)"
    )]
    ReadOnly {
        /// The database file.
        path: PathBuf,
    },
    /// The disk below failed.
    #[error("database {path}: {cause}; see what the kernel says of the disk (`dmesg`), nothing more was changed")]
    Io {
        /// The database file.
        path: PathBuf,
        /// SQLite's word for it.
        cause: String,
    },
    /// A statement failed in another way.
    #[error("database: {0}")]
    Sql(rusqlite::Error),
}

impl From<rusqlite::Error> for DbError {
    fn from(err: rusqlite::Error) -> Self {
        Self::Sql(err)
    }
}

/// The open database. Shared by reference between threads.
#[derive(Debug)]
pub struct Db {
    path: PathBuf,
    /// Closed before the writer, which then folds the WAL into the file.
    readers: Mutex<Vec<Connection>>,
    writer: Mutex<Connection>,
    /// What the disk refused last, until it takes a transaction again.
    refused: Mutex<Option<String>>,
    /// Keeps other processes out until dropped, which is after the connections are closed.
    _lock: File,
}

impl Db {
    /// Opens or creates the database at `path`, checks its integrity and brings its schema up to date.
    ///
    /// One process at a time: the lock is `path` with `-lock` appended. A database from the future is not changed.
    pub fn open(path: &Path) -> Result<Self, DbError> {
        Self::open_with(path, MIGRATIONS)
    }

    /// Opens or creates a database with a schema of its own: the network side keeps its own file this way.
    ///
    /// Entry `index` of `migrations` brings the schema from version `index` to `index + 1`.
    pub fn open_with(path: &Path, migrations: &[&str]) -> Result<Self, DbError> {
        let lock = lock(path)?;
        let explained = |err| explain(path, err);
        look_first(path, migrations.len())?;
        let orderly = !wal_is_filled(path);
        let mut writer = connect(path, OpenFlags::default()).map_err(explained)?;
        // The mode lives in the file; a read-only disk fails here, before anything is believed to be stored.
        writer.pragma_update(None, "journal_mode", "wal").map_err(explained)?;
        check(&writer, path, if orderly { DERIVED } else { &[] })?;
        migrate(&mut writer, path, migrations)?;
        Ok(Self {
            path: path.to_owned(),
            readers: Mutex::new(Vec::new()),
            writer: Mutex::new(writer),
            refused: Mutex::default(),
            _lock: lock,
        })
    }

    /// Checks all tables, also those that a start after an orderly end leaves out. Reads the whole file: something for the
    /// background.
    pub fn check(&self) -> Result<(), DbError> {
        check(&*self.reader()?, &self.path, &[])
    }

    /// The database file, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What an error of a statement means for this database: with its path and, where there is one, the remedy.
    pub fn explain(&self, err: rusqlite::Error) -> DbError {
        let explained = explain(&self.path, err);
        if matches!(explained, DbError::Full { .. } | DbError::ReadOnly { .. } | DbError::Io { .. }) {
            *self.refused.lock() = Some(explained.to_string());
        }
        explained
    }

    /// Why nothing can be recorded at present, on one line with the remedy; `None` if the last transaction was taken.
    pub fn refused(&self) -> Option<String> {
        self.refused.lock().clone()
    }

    /// The writing connection. Hold it for one transaction; never across network or another lock of this crate.
    pub fn writer(&self) -> MutexGuard<'_, Connection> {
        self.writer.lock()
    }

    /// Whether somebody is writing at this moment: for who can write later as well.
    pub fn is_writing(&self) -> bool {
        self.writer.is_locked()
    }

    /// Runs `body` in one immediate transaction, rolled back if it returns an error.
    pub fn transaction<T, E: From<rusqlite::Error>>(&self, body: impl FnOnce(&Transaction<'_>) -> Result<T, E>) -> Result<T, E> {
        let done = transact(&mut self.writer(), body);
        self.taken(done)
    }

    fn taken<T, E>(&self, done: Result<T, E>) -> Result<T, E> {
        if done.is_ok() {
            *self.refused.lock() = None;
        }
        done
    }

    /// As [`Self::transaction`], and waits until the disk has it: it outlives a power loss. Milliseconds to tens of them.
    pub fn durable_transaction<T, E: From<rusqlite::Error>>(&self, body: impl FnOnce(&Transaction<'_>) -> Result<T, E>) -> Result<T, E> {
        let mut writer = self.writer();
        writer.pragma_update(None, "synchronous", "full")?;
        let done = transact(&mut writer, body);
        writer.pragma_update(None, "synchronous", "normal")?;
        self.taken(done)
    }

    /// A reading connection, which sees the last committed state and never waits for the writer.
    pub fn reader(&self) -> Result<Reader<'_>, DbError> {
        let idle = self.readers.lock().pop();
        let connection = match idle {
            Some(connection) => connection,
            None => {
                let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
                connect(&self.path, flags).map_err(|err| self.explain(err))?
            }
        };
        Ok(Reader { db: self, connection: Some(connection) })
    }
}

fn transact<T, E: From<rusqlite::Error>>(writer: &mut Connection, body: impl FnOnce(&Transaction<'_>) -> Result<T, E>) -> Result<T, E> {
    let transaction = writer.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let value = body(&transaction)?;
    transaction.commit()?;
    Ok(value)
}

/// A reading connection on loan; it goes back to the pool on drop.
#[derive(Debug)]
pub struct Reader<'db> {
    db: &'db Db,
    connection: Option<Connection>,
}

impl Deref for Reader<'_> {
    type Target = Connection;

    fn deref(&self) -> &Connection {
        self.connection.as_ref().expect("a reader holds its connection until it is dropped")
    }
}

impl Drop for Reader<'_> {
    fn drop(&mut self) {
        let mut idle = self.db.readers.lock();
        if idle.len() < IDLE_READERS_MAX {
            idle.extend(self.connection.take());
        }
    }
}

fn connect(path: &Path, flags: OpenFlags) -> rusqlite::Result<Connection> {
    let connection = Connection::open_with_flags(path, flags)?;
    connection.busy_timeout(BUSY_WAIT)?;
    connection.pragma_update(None, "synchronous", "normal")?;
    connection.pragma_update(None, "foreign_keys", true)?;
    // After a large list entered the catalog the WAL shrinks to this again.
    connection.pragma_update(None, "journal_size_limit", 4 * 1024 * 1024)?;
    // 2 MiB of pages a connection at most: the idle daemon has to stay small.
    connection.pragma_update(None, "cache_size", -2048)?;
    // Otherwise a cached statement with a join is planned again each time a value is bound: 20 us instead of 1 us a lookup.
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_QPSG, true)?;
    connection.set_prepared_statement_cache_capacity(64);
    Ok(connection)
}

/// Takes the lock that keeps a second process out. Not on the database itself: closing a second descriptor of it would
/// drop SQLite's own locks.
fn lock(path: &Path) -> Result<File, DbError> {
    let mut name = path.as_os_str().to_owned();
    name.push("-lock");
    let failed = |err: io::Error| match err.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => DbError::Full { path: path.to_owned() },
        io::ErrorKind::ReadOnlyFilesystem | io::ErrorKind::PermissionDenied => DbError::ReadOnly { path: path.to_owned() },
        _ => DbError::Open { path: path.to_owned(), cause: err.to_string() },
    };
    let mut file = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(&name).map_err(failed)?;
    for attempt in 1.. {
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => break,
            Err(Errno::WOULDBLOCK) if attempt < LOCK_TRIES => std::thread::sleep(LOCK_PAUSE),
            Err(Errno::WOULDBLOCK) => {
                let mut holder = String::new();
                let read = (&file).take(16).read_to_string(&mut holder);
                let holder = if read.is_ok() && !holder.trim().is_empty() { holder.trim().to_owned() } else { "unknown".to_owned() };
                return Err(DbError::InUse { path: path.to_owned(), holder });
            }
            Err(err) => return Err(failed(err.into())),
        }
    }
    // Only for the message above: on a full disk the lock holds without it.
    let noted = file.set_len(0).and_then(|()| writeln!(file, "{}", std::process::id()));
    if let Err(err) = noted {
        tracing::debug!("cannot note who holds {}: {err}", path.display());
    }
    Ok(file)
}

/// Whether there is a WAL with something in it: the last process that had the database did not end in order.
fn wal_is_filled(path: &Path) -> bool {
    let mut name = path.as_os_str().to_owned();
    name.push("-wal");
    std::fs::metadata(name).is_ok_and(|wal| wal.len() > 0)
}

/// Checks the structure of every table but `left_out`, with their indexes.
fn check(db: &Connection, path: &Path, left_out: &[&str]) -> Result<(), DbError> {
    let verdicts = || -> rusqlite::Result<Option<String>> {
        if left_out.is_empty() {
            let verdict = db.query_row("PRAGMA quick_check(1)", [], |row| row.get(0))?;
            return Ok(Some(verdict).filter(|verdict| verdict != "ok"));
        }
        let tables = db
            .prepare("SELECT name FROM sqlite_schema WHERE type = 'table'")?
            .query_map([], |row| row.get(0))?
            .collect::<rusqlite::Result<Vec<String>>>()?;
        for table in tables.iter().filter(|table| !left_out.contains(&table.as_str())) {
            let verdict: String = db.query_row(&format!("PRAGMA quick_check('{}')", table.replace('\'', "''")), [], |row| row.get(0))?;
            if verdict != "ok" {
                return Ok(Some(verdict));
            }
        }
        Ok(None)
    };
    match verdicts() {
        Ok(None) => Ok(()),
        // SQLite puts a heading of its own line before some verdicts.
        Ok(Some(what)) => Err(DbError::Corrupt { path: path.to_owned(), what: what.replace('\n', " ") }),
        Err(err) => Err(explain(path, err)),
    }
}

/// Looks at an existing database without changing a byte of it: is it ours, and not newer than we are?
fn look_first(path: &Path, known: usize) -> Result<(), DbError> {
    match std::fs::metadata(path) {
        Ok(found) if !found.is_file() => return Err(DbError::Open { path: path.to_owned(), cause: "not a regular file".to_owned() }),
        Ok(found) if found.len() == 0 => return Ok(()),
        // SQLite would write over so short a file.
        Ok(found) if found.len() < SQLITE_BYTES_MIN => {
            return Err(DbError::Corrupt { path: path.to_owned(), what: "file is not a database".to_owned() });
        }
        Ok(_) => {}
        Err(err) if err.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(err) => return Err(DbError::Open { path: path.to_owned(), cause: err.to_string() }),
    }
    let explained = |err| explain(path, err);
    let reader = Connection::open_with_flags(path, OpenFlags::SQLITE_OPEN_READ_ONLY).map_err(explained)?;
    // Else closing would move the WAL of a newer program into the file.
    reader.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true).map_err(explained)?;
    let number = |name| reader.query_row(&format!("PRAGMA {name}"), [], |row| row.get::<_, u32>(0)).map_err(explained);
    let (found, application) = (number("user_version")? as usize, number("application_id")?);
    let tables: u32 = reader.query_row("SELECT count(*) FROM sqlite_schema", [], |row| row.get(0)).map_err(explained)?;
    if application != APPLICATION_ID && (tables > 0 || found > 0) {
        return Err(DbError::Corrupt { path: path.to_owned(), what: "it belongs to another program".to_owned() });
    }
    if found > known {
        return Err(DbError::FromTheFuture { path: path.to_owned(), found, known });
    }
    Ok(())
}

fn explain(path: &Path, err: rusqlite::Error) -> DbError {
    let path = path.to_owned();
    match err.sqlite_error_code() {
        Some(ErrorCode::NotADatabase | ErrorCode::DatabaseCorrupt) => DbError::Corrupt { path, what: err.to_string() },
        Some(ErrorCode::DiskFull) => DbError::Full { path },
        Some(ErrorCode::SystemIoFailure) => DbError::Io { path, cause: err.to_string() },
        Some(ErrorCode::ReadOnly) => DbError::ReadOnly { path },
        Some(ErrorCode::CannotOpen | ErrorCode::PermissionDenied) => DbError::Open { path, cause: err.to_string() },
        Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => DbError::InUse { path, holder: "unknown".to_owned() },
        _ => DbError::Sql(err),
    }
}

fn migrate(writer: &mut Connection, path: &Path, migrations: &[&str]) -> Result<(), DbError> {
    let explained = |err| explain(path, err);
    let found: u32 = writer.query_row("PRAGMA user_version", [], |row| row.get(0)).map_err(explained)?;
    for (index, sql) in migrations.iter().enumerate().skip(found as usize) {
        let version = u32::try_from(index + 1).expect("few migrations");
        transact(writer, |db| {
            db.execute_batch(sql)?;
            crash_point("migrate.uncommitted");
            db.pragma_update(None, "application_id", APPLICATION_ID)?;
            db.pragma_update(None, "user_version", version)
        })
        .map_err(explained)?;
        crash_point("migrate.committed");
    }
    Ok(())
}

#[cfg(test)]
mod tests;
