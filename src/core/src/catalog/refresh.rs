//! Bringing the catalog up to date with the lists directory.

use super::apt_config::ListTarget;
use super::forms::Form;
use super::packages::{self, ListError, Listed, Tally};
use super::release::Release;
use super::sources::SourceKind;
use super::{Catalog, CatalogError, Configured};
use crate::{Db, discretion};
use rusqlite::{OptionalExtension as _, Transaction, params};
use rustix::fs::{FileType, Mode, OFlags, Stat};
use rustix::io::Errno;
use std::cmp::Ordering;
use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::os::fd::BorrowedFd;

/// Rows written or removed in one transaction: some ten milliseconds that another writer may have to wait.
const ROWS_PER_TRANSACTION: usize = 4096;

/// Problems that are told one by one; the last line says how many more there are.
const PROBLEMS_MAX: usize = 100;

/// What becomes of the entries of a list that is not there any more.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Vanished {
    /// They stay: apt unlinks lists within an update and may still use what they named.
    Keep,
    /// They go.
    Drop,
}

/// What a refresh did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Refreshed {
    /// Lists read, because they are new or changed.
    pub parsed: u64,
    /// Lists left as they were.
    pub kept: u64,
    /// Lists whose entries were removed.
    pub dropped: u64,
    /// What is wrong with single lists, each with the file and the remedy. The other lists are up to date all the same.
    pub problems: Vec<String>,
    /// Suites of the sources that have no Release in the directory: their update never worked or was never run.
    pub missing: Vec<String>,
}

impl Refreshed {
    fn problem(&mut self, text: String) {
        match self.problems.len() {
            ..PROBLEMS_MAX => self.problems.push(text),
            PROBLEMS_MAX => self.problems.push("more lists have problems; run `apt-get update`".to_owned()),
            _ => {}
        }
    }
}

/// What tells whether a file is still the one that was read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Stamp {
    size: i64,
    mtime_ns: i64,
    inode: i64,
}

impl Stamp {
    fn of(stat: &Stat) -> Self {
        #[allow(clippy::useless_conversion, reason = "the types of stat's fields differ by architecture")]
        let (seconds, nanoseconds) = (i64::from(stat.st_mtime), i64::try_from(stat.st_mtime_nsec).unwrap_or(0));
        Self {
            size: stat.st_size,
            mtime_ns: seconds.saturating_mul(1_000_000_000).saturating_add(nanoseconds),
            inode: stat.st_ino.cast_signed(),
        }
    }
}

/// A list as the database has it.
struct Known {
    stamp: Stamp,
    release: String,
    private: bool,
    rows: Rows,
}

/// `first <= id < end`
#[derive(Clone, Copy)]
struct Rows {
    first: i64,
    end: i64,
}

impl Catalog {
    /// Reads again what changed in the lists directory. One refresh at a time; others wait.
    ///
    /// Errors are those of the database; whatever is wrong in the directory is a problem in the answer.
    pub fn refresh(&self, lists: BorrowedFd<'_>, vanished: Vanished) -> Result<Refreshed, CatalogError> {
        let _one_at_a_time = self.refreshing.lock();
        let configured = self.configured();
        let mut done = Refreshed::default();
        self.arrivals.refresh(lists);
        let releases = refresh_releases(&self.db, lists, &configured, vanished, &mut done)?;
        let mut known = known_lists(&self.db)?;
        for target in &configured.targets {
            let release = [&target.inrelease_name, &target.release_name].into_iter().find(|name| releases.contains(*name));
            let release = release.cloned().unwrap_or_default();
            let before = known.remove(&target.name);
            let (file, form, stamp) = match open_list(lists, target, &configured) {
                Ok(Some(opened)) => opened,
                Ok(None) => {
                    if let Some(before) = before {
                        self.vanished(&target.name, before.rows, vanished, &mut done)?;
                    }
                    continue;
                }
                Err(problem) => {
                    // What cannot be read is not gone: its entries stay.
                    done.kept += u64::from(before.is_some());
                    done.problem(problem);
                    continue;
                }
            };
            match before {
                Some(before) if before.stamp == stamp => {
                    done.kept += 1;
                    if before.release != release || before.private != target.private {
                        let sql = "UPDATE lists SET release = ?2, private = ?3 WHERE name = ?1";
                        self.db.writer().prepare_cached(sql)?.execute(params![target.name, release, target.private])?;
                    }
                }
                before => {
                    let parsed = self.read_list(target, file, form, &mut done)?;
                    done.kept += u64::from(parsed.is_none() && before.is_some());
                    if let Some(rows) = parsed {
                        done.parsed += 1;
                        commit_list(&self.db, target, stamp, &release, rows)?;
                        if let Some(before) = before {
                            remove_rows(&self.db, before.rows)?;
                        }
                    }
                }
            }
        }
        for (name, gone) in known {
            self.vanished(&name, gone.rows, vanished, &mut done)?;
        }
        self.count()?;
        Ok(done)
    }

    fn vanished(&self, name: &str, rows: Rows, vanished: Vanished, done: &mut Refreshed) -> Result<(), CatalogError> {
        match vanished {
            Vanished::Keep => done.kept += 1,
            Vanished::Drop => {
                self.db.writer().execute("DELETE FROM lists WHERE name = ?1", [name])?;
                remove_rows(&self.db, rows)?;
                done.dropped += 1;
            }
        }
        Ok(())
    }

    /// Writes a list's rows, which stay invisible; `None` if the list is bad.
    fn read_list(&self, target: &ListTarget, file: File, form: Form, done: &mut Refreshed) -> Result<Option<Rows>, CatalogError> {
        let shown = format!("{}{}", target.name, form.suffix());
        let first = next_id(&self.db)?;
        let batch = Vec::with_capacity(ROWS_PER_TRANSACTION);
        let mut writer = Writer { db: &self.db, first, next: first, batch, newest: HashMap::new() };
        let read = form.reader(file).map_err(ListError::Read).and_then(|reader| match target.kind {
            SourceKind::Binary => packages::read_packages(reader, |listed| writer.add(listed)),
            SourceKind::Source => packages::read_sources(reader, |listed| writer.add(listed)),
        });
        let read = match read {
            Ok(tally) => writer.flush().and_then(|()| writer.write_newest()).map(|()| Ok(tally)),
            Err(ListError::Taker(source)) => Err(source),
            Err(why) => Ok(Err(why.to_string())),
        };
        let rows = writer.rows();
        match read {
            Ok(Ok(tally)) => {
                tell_refused(&shown, &tally, done);
                Ok(Some(rows))
            }
            Ok(Err(why)) => {
                remove_rows(&self.db, rows)?;
                done.problem(format!("lists/{shown}: {why}; run `apt-get update`"));
                Ok(None)
            }
            Err(source) => {
                // A full disk most of all: what was written is removed at the next start if it cannot be removed now.
                remove_rows(&self.db, rows)?;
                Err(source.into())
            }
        }
    }
}

fn tell_refused(shown: &str, tally: &Tally, done: &mut Refreshed) {
    if tally.refused > 0 {
        let examples = tally.examples.join("; ");
        done.problem(format!(
            "lists/{shown}: {} packages left out ({examples}); run `apt-get update`, or tell the repository",
            tally.refused
        ));
    }
}

/// Opens the form of a list that apt would read: the plain one, else by the order of compression types.
fn open_list(lists: BorrowedFd<'_>, target: &ListTarget, configured: &Configured) -> Result<Option<(File, Form, Stamp)>, String> {
    for form in std::iter::once(Form::Plain).chain(configured.apt.forms().iter().copied()) {
        let name = format!("{}{}", target.name, form.suffix());
        let opened = open_file(lists, &name).map_err(|source| format!("lists/{name}: {source}; run `apt-get update`"))?;
        if let Some((file, stamp)) = opened {
            return Ok(Some((file, form, stamp)));
        }
    }
    Ok(None)
}

/// Opens a regular file of the directory, `None` if there is none by this name.
pub(super) fn open_file(lists: BorrowedFd<'_>, name: &str) -> std::io::Result<Option<(File, Stamp)>> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let file = match rustix::fs::openat(lists, name, flags, Mode::empty()) {
        // Too long for a file system: apt has no such list either.
        Err(Errno::NOENT | Errno::NAMETOOLONG) => return Ok(None),
        Err(Errno::LOOP) => return Err(std::io::Error::other("is a symbolic link")),
        opened => opened?,
    };
    let stat = rustix::fs::fstat(&file)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(std::io::Error::other("is no regular file"));
    }
    Ok(Some((file.into(), Stamp::of(&stat))))
}

/// Reads changed Release files. Returns the names of all that are known afterwards.
fn refresh_releases(
    db: &Db,
    lists: BorrowedFd<'_>,
    configured: &Configured,
    vanished: Vanished,
    done: &mut Refreshed,
) -> Result<HashSet<String>, CatalogError> {
    let mut known = HashMap::new();
    {
        let reader = db.reader()?;
        let mut statement = reader.prepare_cached("SELECT name, size, mtime_ns, inode FROM releases")?;
        let mut rows = statement.query([])?;
        while let Some(row) = rows.next()? {
            known.insert(row.get::<_, String>(0)?, Stamp { size: row.get(1)?, mtime_ns: row.get(2)?, inode: row.get(3)? });
        }
    }
    let mut all = HashSet::new();
    let mut suites = HashSet::new();
    for target in &configured.targets {
        if !suites.insert(&target.inrelease_name) {
            continue;
        }
        let mut there = false;
        for name in [&target.inrelease_name, &target.release_name] {
            let opened = match open_file(lists, name) {
                Ok(Some(opened)) => opened,
                Ok(None) => continue,
                Err(source) => {
                    done.problem(format!("lists/{name}: {source}; run `apt-get update`"));
                    continue;
                }
            };
            there = true;
            let (file, stamp) = opened;
            let before = known.remove(name);
            if before == Some(stamp) {
                all.insert(name.clone());
                break;
            }
            match Release::read(file) {
                Ok(release) => {
                    store_release(db, name, stamp, &release)?;
                    all.insert(name.clone());
                }
                Err(why) => {
                    done.problem(format!("lists/{name}: {why}; run `apt-get update`"));
                    if before.is_some() {
                        all.insert(name.clone());
                    }
                }
            }
            break;
        }
        if !there {
            done.missing.push(format!("{} {}", target.repository, target.suite));
        }
    }
    match vanished {
        Vanished::Keep => all.extend(known.into_keys()),
        Vanished::Drop => {
            for name in known.into_keys() {
                db.writer().execute("DELETE FROM releases WHERE name = ?1", [name])?;
            }
        }
    }
    Ok(all)
}

fn store_release(db: &Db, name: &str, stamp: Stamp, release: &Release) -> Result<(), CatalogError> {
    let Release { date, valid_until, origin, label, suite, codename, by_hash, .. } = release;
    let sql = "INSERT OR REPLACE INTO releases VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11)";
    let row = params![name, stamp.size, stamp.mtime_ns, stamp.inode, date, valid_until, origin, label, suite, codename, by_hash];
    db.writer().prepare_cached(sql)?.execute(row)?;
    Ok(())
}

fn known_lists(db: &Db) -> Result<HashMap<String, Known>, CatalogError> {
    let reader = db.reader()?;
    let mut statement = reader.prepare_cached("SELECT name, size, mtime_ns, inode, release, private, first_id, end_id FROM lists")?;
    let known = statement.query_map([], |row| {
        Ok((
            row.get(0)?,
            Known {
                stamp: Stamp { size: row.get(1)?, mtime_ns: row.get(2)?, inode: row.get(3)? },
                release: row.get(4)?,
                private: row.get(5)?,
                rows: Rows { first: row.get(6)?, end: row.get(7)? },
            },
        ))
    })?;
    Ok(known.collect::<rusqlite::Result<_>>()?)
}

/// Makes a list's rows visible in place of those it had.
fn commit_list(db: &Db, target: &ListTarget, stamp: Stamp, release: &str, rows: Rows) -> Result<(), CatalogError> {
    let Stamp { size, mtime_ns, inode } = stamp;
    let sql = "INSERT OR REPLACE INTO lists VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)";
    let row = params![target.name, size, mtime_ns, inode, release, target.private, rows.first, rows.end];
    db.writer().prepare_cached(sql)?.execute(row)?;
    Ok(())
}

/// The first id above every row and every list. An empty list still takes one, so that no two lists start at the same.
fn next_id(db: &Db) -> Result<i64, CatalogError> {
    let sql = "SELECT max(coalesce((SELECT max(id) FROM packages), 0), coalesce((SELECT max(end_id) FROM lists), 0)) + 1";
    Ok(db.writer().prepare_cached(sql)?.query_row([], |row| row.get(0))?)
}

fn remove_rows(db: &Db, rows: Rows) -> Result<(), CatalogError> {
    let step = i64::try_from(ROWS_PER_TRANSACTION).expect("a small constant");
    let mut from = rows.first;
    while from < rows.end {
        let to = from.saturating_add(step).min(rows.end);
        db.writer().prepare_cached("DELETE FROM packages WHERE id >= ?1 AND id < ?2")?.execute([from, to])?;
        from = to;
    }
    remove_newest(db, rows.first)
}

fn remove_newest(db: &Db, list: i64) -> Result<(), CatalogError> {
    let sql = "DELETE FROM newest WHERE list = ?1 AND source IN (SELECT source FROM newest WHERE list = ?1 LIMIT ?2)";
    while db.writer().prepare_cached(sql)?.execute(params![list, i64::try_from(ROWS_PER_TRANSACTION).expect("a small constant")])? > 0 {}
    Ok(())
}

/// Removes rows that belong to no list: an interrupted refresh wrote them.
pub(super) fn remove_orphans(db: &Db) -> Result<(), CatalogError> {
    let mut ranges: Vec<Rows> = known_lists(db)?.into_values().map(|known| known.rows).collect();
    let orphans: Vec<i64> = {
        let reader = db.reader()?;
        let mut statement = reader.prepare("SELECT DISTINCT list FROM newest WHERE list NOT IN (SELECT first_id FROM lists)")?;
        statement.query_map([], |row| row.get(0))?.collect::<rusqlite::Result<_>>()?
    };
    orphans.into_iter().try_for_each(|list| remove_newest(db, list))?;
    ranges.sort_unstable_by_key(|rows| rows.first);
    let last: Option<i64> = db.writer().query_row("SELECT max(id) FROM packages", [], |row| row.get(0)).optional()?.flatten();
    let mut from = 0;
    for rows in ranges {
        remove_between(db, from, rows.first)?;
        from = rows.end;
    }
    remove_between(db, from, last.unwrap_or(0) + 1)
}

fn remove_between(db: &Db, first: i64, end: i64) -> Result<(), CatalogError> {
    let sql = "SELECT min(id), max(id) + 1 FROM packages WHERE id >= ?1 AND id < ?2";
    let found: (Option<i64>, Option<i64>) = db.writer().query_row(sql, [first, end], |row| Ok((row.get(0)?, row.get(1)?)))?;
    match found {
        (Some(first), Some(end)) => remove_rows(db, Rows { first, end }),
        _ => Ok(()),
    }
}

/// Writes rows in batches.
struct Writer<'db> {
    db: &'db Db,
    first: i64,
    next: i64,
    batch: Vec<OwnedRow>,
    /// By source package.
    newest: HashMap<String, String>,
}

struct OwnedRow {
    name: Option<String>,
    digest: [u8; 32],
    size: i64,
    path: String,
    package: String,
    version: String,
    source: String,
}

impl Writer<'_> {
    fn add(&mut self, listed: Listed<'_>) -> rusqlite::Result<()> {
        let (source, version) = packages::source_of(listed.package, listed.version, listed.source);
        match self.newest.get_mut(source) {
            // What cannot be compared is none that could be the newest.
            Some(newest) => {
                if discretion::compare(version, newest) == Some(Ordering::Greater) {
                    version.clone_into(newest);
                }
            }
            None => drop(self.newest.insert(source.to_owned(), version.to_owned())),
        }
        self.batch.push(OwnedRow {
            name: (!listed.name.is_empty()).then(|| listed.name.to_owned()),
            digest: listed.digest.0,
            size: i64::try_from(listed.size).expect("the parser bounds sizes"),
            path: listed.path.to_owned(),
            package: listed.package.to_owned(),
            version: listed.version.to_owned(),
            source: listed.source.to_owned(),
        });
        if self.batch.len() == ROWS_PER_TRANSACTION { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> rusqlite::Result<()> {
        let from = self.next;
        self.next = self.db.transaction(|transaction| insert(transaction, from, &self.batch))?;
        self.batch.clear();
        Ok(())
    }

    fn write_newest(&mut self) -> rusqlite::Result<()> {
        let mut newest: Vec<_> = std::mem::take(&mut self.newest).into_iter().collect();
        newest.sort_unstable();
        newest.chunks(ROWS_PER_TRANSACTION).try_for_each(|rows| {
            self.db.transaction(|transaction| {
                let mut statement = transaction.prepare_cached("INSERT INTO newest VALUES (?1, ?2, ?3)")?;
                rows.iter().try_for_each(|(source, version)| statement.execute(params![self.first, source, version]).map(drop))
            })
        })
    }

    fn rows(&self) -> Rows {
        // One more than there are rows where there are none, see `next_id`.
        Rows { first: self.first, end: self.next.max(self.first) }
    }
}

/// Inserts rows with ascending ids from `next` on; returns the id after the last.
fn insert(transaction: &Transaction<'_>, mut next: i64, rows: &[OwnedRow]) -> rusqlite::Result<i64> {
    let mut statement = transaction.prepare_cached("INSERT INTO packages VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)")?;
    for row in rows {
        let OwnedRow { name, digest, size, path, package, version, source } = row;
        statement.execute(params![next, name, &digest[..], size, path, package, version, source])?;
        next += 1;
    }
    Ok(next)
}
