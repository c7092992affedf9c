//! `poolfs.db`: one SQLite database for files, objects, incoming files and the catalog.
//!
//! WAL mode, one writing connection behind a lock and a few reading ones. `synchronous = NORMAL`: after a power loss the
//! last transactions may be missing, never half there; [`crate::store`] says why that loses nothing. The schema has a
//! version (`user_version`) and migrations that each run in one transaction; a database from a newer poolfs is refused
//! untouched.

use parking_lot::{Mutex, MutexGuard};
use rusqlite::{Connection, OpenFlags, TransactionBehavior};
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Reading connections kept open; more readers than that open one of their own for a moment.
const IDLE_READERS_MAX: usize = 4;

/// How long a statement waits for another process that holds the database (a second `poolfs`, `sqlite3` by hand).
const BUSY_WAIT: Duration = Duration::from_secs(5);

/// Each migration brings the schema from version `index` to `index + 1`. Never edit one that was released: add another.
const MIGRATIONS: &[&str] = &[include_str!("db/0001.sql")];

/// What can be wrong with the database as a whole.
#[derive(Debug, thiserror::Error)]
pub enum DbError {
    /// It cannot be opened or created.
    #[error("open database {path}: {source}; check that the directory exists, is writable and has space")]
    Open {
        /// The database file.
        path: PathBuf,
        /// SQLite's word for it.
        #[source]
        source: rusqlite::Error,
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
    /// It fails SQLite's integrity check or is no database.
    #[error("database {path} is corrupt: {what}; move it away to start afresh (packages are kept, every file is hashed again)")]
    Corrupt {
        /// The database file.
        path: PathBuf,
        /// The check's first line.
        what: String,
    },
    /// A statement failed: a full or read-only disk, an I/O error.
    #[error("database: {0}")]
    Sql(#[from] rusqlite::Error),
}

/// The open database. Shared by reference between threads.
#[derive(Debug)]
pub struct Db {
    path: PathBuf,
    writer: Mutex<Connection>,
    readers: Mutex<Vec<Connection>>,
}

impl Db {
    /// Opens or creates `poolfs.db` at `path`, checks its integrity and brings its schema up to date.
    pub fn open(path: &Path) -> Result<Self, DbError> {
        Self::open_with(path, MIGRATIONS)
    }

    /// Opens or creates a database with a schema of its own: the network side keeps its own file this way.
    ///
    /// Entry `index` of `migrations` brings the schema from version `index` to `index + 1`.
    pub fn open_with(path: &Path, migrations: &[&str]) -> Result<Self, DbError> {
        let failed = |source: rusqlite::Error| match source.sqlite_error_code() {
            Some(rusqlite::ErrorCode::NotADatabase | rusqlite::ErrorCode::DatabaseCorrupt) => {
                DbError::Corrupt { path: path.to_owned(), what: source.to_string() }
            }
            _ => DbError::Open { path: path.to_owned(), source },
        };
        let mut writer = connect(path, OpenFlags::default()).map_err(failed)?;
        // The mode lives in the file; a read-only disk fails here, before anything is believed to be stored.
        writer.pragma_update(None, "journal_mode", "wal").map_err(failed)?;
        let verdict: String = writer.query_row("PRAGMA quick_check(1)", [], |row| row.get(0)).map_err(failed)?;
        if verdict != "ok" {
            return Err(DbError::Corrupt { path: path.to_owned(), what: verdict });
        }
        migrate(&mut writer, path, migrations)?;
        Ok(Self { path: path.to_owned(), writer: Mutex::new(writer), readers: Mutex::new(Vec::new()) })
    }

    /// The writing connection. Hold it for one transaction; never across network or another lock of this crate.
    pub fn writer(&self) -> MutexGuard<'_, Connection> {
        self.writer.lock()
    }

    /// Runs `body` in one immediate transaction, rolled back if it returns an error.
    pub fn transaction<T, E: From<rusqlite::Error>>(&self, body: impl FnOnce(&rusqlite::Transaction<'_>) -> Result<T, E>) -> Result<T, E> {
        let mut writer = self.writer();
        let transaction = writer.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let value = body(&transaction)?;
        transaction.commit()?;
        Ok(value)
    }

    /// A reading connection, which sees the last committed state and never waits for the writer.
    pub fn reader(&self) -> Result<Reader<'_>, DbError> {
        let idle = self.readers.lock().pop();
        let connection = match idle {
            Some(connection) => connection,
            None => connect(&self.path, OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX)?,
        };
        Ok(Reader { db: self, connection: Some(connection) })
    }
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
    // 2 MiB of pages a connection at most: the idle daemon has to stay small.
    connection.pragma_update(None, "cache_size", -2048)?;
    connection.set_prepared_statement_cache_capacity(64);
    Ok(connection)
}

fn migrate(writer: &mut Connection, path: &Path, migrations: &[&str]) -> Result<(), DbError> {
    let found: u32 = writer.query_row("PRAGMA user_version", [], |row| row.get(0))?;
    let found = found as usize;
    if found > migrations.len() {
        return Err(DbError::FromTheFuture { path: path.to_owned(), found, known: migrations.len() });
    }
    for (index, sql) in migrations.iter().enumerate().skip(found) {
        let transaction = writer.transaction_with_behavior(TransactionBehavior::Immediate)?;
        transaction.execute_batch(sql)?;
        transaction.pragma_update(None, "user_version", u32::try_from(index + 1).expect("few migrations"))?;
        transaction.commit()?;
    }
    Ok(())
}
