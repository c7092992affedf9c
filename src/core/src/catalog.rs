//! The catalog: what apt's lists say exists, by archive name and by digest.
//!
//! It is read from the lists that apt committed to `lists/`, so apt has checked every signature. It lives in SQLite: a
//! restart parses nothing again, and a lookup costs a few reads of pages, so nothing big is held in memory.
//! [`Catalog::refresh`] reads again what changed. A list's rows are written in short transactions, so that
//! other writers never wait long, and become visible all at once when its row in `lists` names them; what a crash leaves behind
//! belongs to no list, is invisible, and is removed at the next start.
//!
//! Where a file lies is not stored but made from the sources as they are configured now, so that no password of a
//! source gets into the database.
//!
//! **Never a guess:** an archive name that lists give different digests for is found by [`Catalog::candidates`] only. apt
//! takes the bytes of the version that its pins and the order of sources prefer, which is not decided here.

pub mod apt_config;
mod arrivals;
mod facts;
pub mod forms;
mod indexes;
pub mod names;
pub mod packages;
pub mod pdiff;
pub mod private;
mod refresh;
pub mod release;
pub mod sources;
#[cfg(test)]
mod tests;

pub use apt_config::AptConfig;
pub use arrivals::ArrivalError;
pub use facts::{Before, Judging, Standing};
pub use refresh::{Refreshed, Vanished};

use crate::advisories::Advisories;
use crate::sync::{Mutex, RwLock};
use crate::{Db, DbError, Digest};
use apt_config::ListTarget;
use arrivals::Arrivals;
use private::Place;
use rusqlite::{OptionalExtension as _, Row, params};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::fmt;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Rows of one name, digest or package that are looked at: the same package in so many lists. With more than that, a name
/// counts as one that lists disagree about.
const ROWS_MAX: usize = 256;

/// What can stop the catalog as a whole. A bad list never does: it is a problem in [`Refreshed`].
#[derive(Debug, thiserror::Error)]
pub enum CatalogError {
    /// The database.
    #[error(transparent)]
    Db(#[from] DbError),
    /// apt's configuration cannot be read.
    #[error("read apt's configuration: {why}; `apt-config dump` must work")]
    AptConfig {
        /// What went wrong.
        why: String,
    },
}

impl From<rusqlite::Error> for CatalogError {
    fn from(source: rusqlite::Error) -> Self {
        Self::Db(DbError::Sql(source))
    }
}

/// One URL of a file on a mirror.
///
/// The URL may hold a password: log its `Debug`, which leaves it out, never the field.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MirrorUrl {
    /// `http:` or `https:`.
    pub url: String,
    /// The proxy that apt would use for it, `None` for a direct connection.
    pub proxy: Option<String>,
    /// Whether the bytes behind this URL can never change (`pool/`, by-hash), so that ranges of it may be joined without a validator.
    pub immutable: bool,
    /// Whether the repository needs credentials or is configured as private: it is asked of its mirror alone, never of peers.
    pub private: bool,
}

impl fmt::Debug for MirrorUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let url = names::Uri::parse(&self.url);
        let proxy = self.proxy.as_deref().map(names::Uri::parse);
        let Self { immutable, private, .. } = self;
        write!(f, "{url} (proxy {proxy:?}, immutable {immutable}, private {private})")
    }
}

/// A file that the lists name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its name in `archives/`; for a file of a source package the last part of its path.
    pub name: String,
    /// SHA-256 of its bytes.
    pub digest: Digest,
    /// Its length in bytes.
    pub size: u64,
    /// Date of the Release that names it, seconds since 1970; 0 if there is no Release.
    pub date: i64,
    /// Where it lies, in the order of the sources. Empty if no configured source has it any more.
    pub urls: Vec<MirrorUrl>,
    /// Package name.
    pub package: String,
    /// Package version.
    pub version: String,
    /// Whether any of the repositories that have it is private: then it never leaves this machine.
    pub private: bool,
}

/// The catalog. Shared by reference between threads; lookups never wait for a refresh.
#[derive(Debug)]
pub struct Catalog {
    db: Arc<Db>,
    configured: RwLock<Arc<Configured>>,
    /// Held for a whole refresh; taken before the database's writer.
    refreshing: Mutex<()>,
    entries: AtomicU64,
    arrivals: Arrivals,
    advisories: RwLock<Arc<Advised>>,
}

/// Advisories that versions are held against.
#[derive(Debug, Default)]
pub struct Advised {
    /// What each file says.
    pub files: Vec<Advisories>,
    /// Whether issues count that nothing fixes yet.
    pub unfixed: bool,
    /// They are still being read: until then each may name any version.
    pub is_pending: bool,
}

/// The configuration and what follows from it.
#[derive(Debug)]
struct Configured {
    apt: AptConfig,
    targets: Vec<ListTarget>,
    /// Index into `targets` and the proxy, by the list's name.
    by_list: HashMap<String, (usize, Option<String>)>,
}

impl Configured {
    fn new(apt: AptConfig) -> Self {
        let targets = apt.targets();
        let by_list =
            targets.iter().enumerate().map(|(index, target)| (target.name.clone(), (index, apt.proxy(&target.repository)))).collect();
        Self { apt, targets, by_list }
    }

    /// Whether a package of a list stays on this machine. `words`: origin, label, suite and codename of the list's Release.
    fn is_private(&self, list: &str, words: &[String; 4], package: &str, source: &str) -> bool {
        let target = self.by_list.get(list).map(|(index, _)| &self.targets[*index]);
        let (source, _) = packages::source_of(package, "", source);
        let [origin, label, suite, codename] = words;
        let place = Place {
            repository: target.map(|target| &target.repository),
            suites: [target.map_or("", |target| target.suite.as_str()), suite, codename],
            origins: [origin, label],
            component: target.map_or("", |target| target.component.as_str()),
            packages: [package, source],
        };
        target.is_some_and(|target| target.private) || self.apt.is_named_private(&place)
    }
}

impl Catalog {
    /// The catalog in `db`, with the sources of `apt`. Removes what an interrupted refresh left behind.
    pub fn open(db: Arc<Db>, apt: AptConfig) -> Result<Self, CatalogError> {
        let configured = Arc::new(Configured::new(apt));
        let arrivals = Arrivals::default();
        arrivals.configure(&configured);
        let catalog = Self {
            db,
            configured: RwLock::new(configured),
            refreshing: Mutex::new(()),
            entries: AtomicU64::new(0),
            arrivals,
            advisories: RwLock::default(),
        };
        refresh::remove_orphans(&catalog.db)?;
        catalog.count()?;
        Ok(catalog)
    }

    /// Takes a configuration that was loaded again. [`Self::refresh`] then reads the lists of new sources, and
    /// [`Self::refresh_indexes`] what their Release files name.
    pub fn configure(&self, apt: AptConfig) {
        let configured = Arc::new(Configured::new(apt));
        self.arrivals.configure(&configured);
        *self.configured.write() = configured;
    }

    /// Reads committed Release files again that changed, or whose source did: a short part of [`Self::refresh`].
    pub fn refresh_indexes(&self, lists: BorrowedFd<'_>) {
        self.arrivals.refresh(lists);
    }

    /// The proxy that apt would use for `uri`, `None` for a direct connection.
    pub fn proxy(&self, uri: &names::Uri) -> Option<String> {
        self.configured().apt.proxy(uri)
    }

    /// Holds versions against these advisories from now on.
    pub fn advise(&self, advised: Advised) {
        *self.advisories.write() = Arc::new(advised);
    }

    /// Files and directories in which credentials of sources may lie, at most `files_max`, also those that are not there.
    pub fn credential_files(&self, files_max: usize) -> Vec<std::path::PathBuf> {
        self.configured().apt.credential_files(files_max)
    }

    /// The configuration's lists, in the order of the sources.
    pub fn targets(&self) -> Vec<ListTarget> {
        self.configured().targets.clone()
    }

    fn configured(&self) -> Arc<Configured> {
        Arc::clone(&self.configured.read())
    }

    /// How many files the lists name. A file in several lists counts several times.
    pub fn len(&self) -> u64 {
        self.entries.load(Ordering::Relaxed)
    }

    /// Whether no list was read yet.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn count(&self) -> Result<(), CatalogError> {
        let entries: i64 = self.db.reader()?.query_row("SELECT coalesce(sum(end_id - first_id), 0) FROM lists", [], |row| row.get(0))?;
        self.entries.store(u64::try_from(entries).unwrap_or(0), Ordering::Relaxed);
        Ok(())
    }

    /// The file that apt calls `name` in `archives/`. `None` if no list names it, or if lists name several digests for it.
    pub fn archive(&self, name: &[u8]) -> Result<Option<Entry>, CatalogError> {
        // apt's names are ASCII: what is not was never made by it.
        let Ok(name) = std::str::from_utf8(name) else {
            return Ok(None);
        };
        let mut rows = self.rows("p.name = ?1", name)?;
        if rows.len() > ROWS_MAX || rows.iter().any(|row| row.entry.digest != rows[0].entry.digest) {
            return Ok(None);
        }
        rows.sort_by_key(|row| row.order);
        Ok(merged(rows).pop())
    }

    /// The names of all binary packages, sorted, each once: for a listing that shows what could be here.
    pub fn package_names(&self) -> Result<Vec<String>, CatalogError> {
        let reader = self.db.reader()?;
        let mut statement = reader.prepare_cached(
            "SELECT DISTINCT p.name FROM packages p
             JOIN lists l ON l.first_id = (SELECT max(first_id) FROM lists WHERE first_id <= p.id) AND p.id < l.end_id
             WHERE p.name GLOB '*.deb' OR p.name GLOB '*.udeb' ORDER BY p.name",
        )?;
        Ok(statement.query_map([], |row| row.get(0))?.collect::<rusqlite::Result<_>>()?)
    }

    /// Every file that any list calls `name`, one for each digest, in the order of the sources.
    pub fn candidates(&self, name: &[u8]) -> Result<Vec<Entry>, CatalogError> {
        std::str::from_utf8(name).map_or(Ok(Vec::new()), |name| self.entries("p.name = ?1", name))
    }

    /// The file with this digest: a package, a file of a source package, or else an index or a patch of one.
    pub fn by_digest(&self, digest: &Digest) -> Result<Option<Entry>, CatalogError> {
        let mut entries = self.entries("substr(p.digest, 1, 8) = substr(?1, 1, 8) AND p.digest = ?1", &digest.0[..])?.into_iter();
        let Some(mut first) = entries.next() else {
            return Ok(self.index_by_digest(digest));
        };
        // The same bytes under another name: another place to fetch them from, and another repository that may be private.
        for other in entries {
            first.private |= other.private;
            first.urls.extend(other.urls);
        }
        Ok(Some(first))
    }

    /// Every version of a binary package that any list names, in no particular order.
    pub fn versions(&self, package: &str) -> Result<Vec<Entry>, CatalogError> {
        // Archive names start with the quoted package name and `_`, which is quoted within it; '`' comes after '_'.
        let start = names::quote(package.as_bytes(), b"_:");
        self.entries("p.name >= ?1 || '_' AND p.name < ?1 || '`'", start)
    }

    /// Whether a package that a list named once stays on this machine.
    fn is_private(&self, configured: &Configured, list: &str, release: &str, package: &str, source: &str) -> Result<bool, CatalogError> {
        let reader = self.db.reader()?;
        let mut words = reader.prepare_cached("SELECT origin, label, suite, codename FROM releases WHERE name = ?1")?;
        let words = words.query_row([release], |row| Ok([row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?])).optional()?;
        let mut recorded = reader.prepare_cached("SELECT private FROM lists WHERE name = ?1")?;
        let recorded = recorded.query_row([list], |row| row.get::<_, bool>(0)).optional()?.unwrap_or(false);
        Ok(recorded || configured.is_private(list, &words.unwrap_or_default(), package, source))
    }

    fn entries(&self, condition: &'static str, key: impl rusqlite::ToSql) -> Result<Vec<Entry>, CatalogError> {
        let mut rows = self.rows(condition, key)?;
        rows.sort_by_key(|row| row.order);
        Ok(merged(rows))
    }

    /// The rows of lists that count, up to one more than [`ROWS_MAX`].
    fn rows(&self, condition: &'static str, key: impl rusqlite::ToSql) -> Result<Vec<Found>, CatalogError> {
        let configured = self.configured();
        let reader = self.db.reader()?;
        let mut statement = reader.prepare_cached(&format!(
            "SELECT l.name, l.private, coalesce(r.date, 0), p.name, p.digest, p.size, p.path, p.package, p.version, p.source, l.release,
                    coalesce(r.origin, ''), coalesce(r.label, ''), coalesce(r.suite, ''), coalesce(r.codename, '')
             FROM packages p
             JOIN lists l ON l.first_id = (SELECT max(first_id) FROM lists WHERE first_id <= p.id) AND p.id < l.end_id
             LEFT JOIN releases r ON r.name = l.release
             WHERE {condition} LIMIT {ROWS_MAX} + 1"
        ))?;
        let mut found = Vec::new();
        let mut rows = statement.query(params![key])?;
        while let Some(row) = rows.next()? {
            found.push(Found::of(row, &configured)?);
        }
        Ok(found)
    }
}

/// One entry for each digest, in the order of its first row, with the URLs of all its rows.
fn merged(rows: Vec<Found>) -> Vec<Entry> {
    let mut entries: Vec<Entry> = Vec::new();
    for Found { entry: new, .. } in rows {
        match entries.iter_mut().find(|entry| entry.digest == new.digest && entry.name == new.name) {
            None => entries.push(new),
            Some(entry) => {
                entry.private |= new.private;
                for url in new.urls {
                    if !entry.urls.contains(&url) {
                        entry.urls.push(url);
                    }
                }
            }
        }
    }
    entries
}

/// One row, with the place of its list in the order of the sources.
struct Found {
    order: usize,
    list: String,
    /// Name of the list's Release, empty if there is none.
    release: String,
    /// As in the list.
    source: String,
    entry: Entry,
}

impl Found {
    fn of(row: &Row<'_>, configured: &Configured) -> rusqlite::Result<Self> {
        let list: String = row.get(0)?;
        let name: Option<String> = row.get(3)?;
        let path: String = row.get(6)?;
        let (package, source): (String, String) = (row.get(7)?, row.get(9)?);
        let place = configured.by_list.get(&list);
        let words = [row.get(11)?, row.get(12)?, row.get(13)?, row.get(14)?];
        let private = row.get(1)? || configured.is_private(&list, &words, &package, &source);
        let urls = place.map(|(index, proxy)| {
            let target = &configured.targets[*index];
            MirrorUrl {
                url: configured.apt.file_url(&target.repository, &path),
                proxy: proxy.clone(),
                immutable: path.starts_with("pool/") || path.contains("/pool/"),
                private,
            }
        });
        let name = name.unwrap_or_else(|| path.rsplit('/').next().unwrap_or_default().to_owned());
        Ok(Self {
            order: place.map_or(usize::MAX, |(index, _)| *index),
            list,
            release: row.get(10)?,
            source,
            entry: Entry {
                name,
                digest: Digest(row.get(4)?),
                size: u64::try_from(row.get::<_, i64>(5)?).unwrap_or(0),
                date: row.get(2)?,
                urls: urls.into_iter().collect(),
                package,
                version: row.get(8)?,
                private,
            },
        })
    }
}
