//! The Release files at hand, and what they name: of lists that apt has committed, and of lists that it is fetching.
//!
//! A Release in `lists/partial/` counts from the moment when it is complete until apt commits it, or takes it away because
//! its signature is bad: only in memory, and only for what apt itself checks again. While it is there, it decides what the
//! names of its suite stand for. A file elsewhere is never judged by it: whoever forges a Release could otherwise have any
//! file shared whose digest he knows.

use super::indexes::{Indexes, Suite, suites};
use super::pdiff::{PdiffError, PdiffIndex};
use super::refresh::{Stamp, open_file};
use super::release::{Release, ReleaseError};
use super::{Catalog, Configured, Entry};
use crate::Digest;
use crate::sync::RwLock;
use rustix::fs::{AtFlags, Mode, OFlags};
use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::Read as _;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::Arc;

/// apt's working directory below `lists/`.
const PARTIAL: &str = "partial";

/// Why a file that arrived in `lists/partial/` names nothing.
#[derive(Debug, thiserror::Error)]
pub enum ArrivalError {
    /// It cannot be opened or read.
    #[error("lists/partial/{name}: {source}")]
    Read {
        /// The file.
        name: String,
        /// What the kernel says.
        source: std::io::Error,
    },
    /// What is in `lists/` cannot be seen.
    #[error("lists/: {source}")]
    Lists {
        /// What the kernel says.
        source: std::io::Error,
    },
    /// It is no Release file.
    #[error("lists/partial/{name} {source}")]
    Release {
        /// The file.
        name: String,
        /// What is wrong with it.
        source: ReleaseError,
    },
    /// It is no pdiff Index.
    #[error("lists/partial/{name} {source}")]
    Pdiff {
        /// The file.
        name: String,
        /// What is wrong with it.
        source: PdiffError,
    },
    /// It is not the pdiff Index that the Release names.
    #[error("lists/partial/{name} is not the Index that its Release names")]
    Other {
        /// The file.
        name: String,
    },
}

/// A Release that apt committed.
#[derive(Debug)]
struct Committed {
    /// Of the file when it was read; `None` for one that has just come from `partial/`.
    stamp: Option<Stamp>,
    indexes: Indexes,
    /// The pdiff Indexes of it that were here, by name: apt 3.0 takes the files away once it has used them, and what they name is
    /// as good as before.
    pdiffs: Vec<(String, PdiffIndex)>,
}

/// A Release that apt has fetched and not yet committed.
#[derive(Debug)]
struct Pending {
    /// In `lists/partial/`.
    name: String,
    /// Kept, since a source may have been added that is read only now.
    release: Release,
    indexes: Indexes,
    /// The pdiff Indexes of it that are here, by name.
    pdiffs: Vec<(String, PdiffIndex)>,
}

/// What the Release files at hand name. Shared between threads; no lock is held over the disk.
#[derive(Debug, Default)]
pub(super) struct Arrivals {
    table: RwLock<Table>,
}

#[derive(Debug, Default)]
struct Table {
    /// By the name of the suite's InRelease, as in `committed` and `pending`.
    suites: Vec<Arc<Suite>>,
    committed: HashMap<String, Committed>,
    pending: HashMap<String, Pending>,
}

impl Table {
    /// The suite whose InRelease or Release has that name.
    fn suite(&self, name: &str) -> Option<Arc<Suite>> {
        self.suites.iter().find(|suite| suite.inrelease_name == name || suite.release_name == name).cloned()
    }

    /// For each suite, what the names in `partial/` stand for.
    fn current(&self) -> impl Iterator<Item = &Indexes> {
        self.suites.iter().filter_map(|suite| {
            let pending = self.pending.get(&suite.inrelease_name).map(|pending| &pending.indexes);
            pending.or_else(|| self.committed.get(&suite.inrelease_name).map(|committed| &committed.indexes))
        })
    }
}

impl Arrivals {
    pub(super) fn configure(&self, configured: &Configured) {
        let suites = suites(&configured.apt);
        let mut table = self.table.write();
        let known = |name: &String| suites.iter().find(|suite| suite.inrelease_name == *name);
        table.committed.retain(|name, _| known(name).is_some());
        table.pending.retain(|name, pending| {
            let Some(suite) = known(name) else { return false };
            if !pending.indexes.is_of(suite) {
                pending.indexes = Indexes::new(suite, &pending.release);
                for (name, index) in &pending.pdiffs {
                    pending.indexes.add_patches(name, index);
                }
            }
            true
        });
        table.suites = suites;
    }

    /// Reads the committed Release files that changed, or whose suite did. Those that cannot be read are left to the
    /// refresh of the catalog to tell of.
    pub(super) fn refresh(&self, lists: BorrowedFd<'_>) {
        let suites = self.table.read().suites.clone();
        for suite in suites {
            let opened = [&suite.inrelease_name, &suite.release_name].into_iter().find_map(|name| open_file(lists, name).ok().flatten());
            let key = &suite.inrelease_name;
            let Some((file, stamp)) = opened else {
                self.table.write().committed.remove(key);
                continue;
            };
            let is_known = |known: &Committed| known.stamp == Some(stamp) && known.indexes.is_of(&suite);
            if self.table.read().committed.get(key).is_some_and(is_known) {
                continue;
            }
            let Ok(release) = Release::read(file) else { continue };
            let mut indexes = Indexes::new(&suite, &release);
            let names: Vec<String> = indexes.diff_index_names().map(str::to_owned).collect();
            let mut pdiffs = Vec::new();
            for name in names {
                if let Ok(Some(index)) = read_pdiff(lists, &name, indexes.diff_index_digest(&name)) {
                    indexes.add_patches(&name, &index);
                    pdiffs.push((name, index));
                }
            }
            let mut table = self.table.write();
            if let Some(before) = table.committed.remove(key) {
                for (name, index) in before.pdiffs {
                    let named = indexes.diff_index_digest(&name);
                    let same = named.is_some() && before.indexes.diff_index_digest(&name) == named;
                    if same && !pdiffs.iter().any(|(known, _)| *known == name) {
                        indexes.add_patches(&name, &index);
                        pdiffs.push((name, index));
                    }
                }
            }
            table.committed.insert(key.clone(), Committed { stamp: Some(stamp), indexes, pdiffs });
        }
    }
}

impl Catalog {
    /// What should be under this name in `lists/partial/`: an index in the form that apt asks for first, a pdiff Index, or a
    /// patch of one whose bytes are known.
    pub fn index(&self, name: &[u8]) -> Option<Entry> {
        self.arrivals.table.read().current().find_map(|indexes| indexes.entry(name))
    }

    /// The index or patch with this digest, in whatever packed form, with the places of all committed Releases that name it.
    pub fn index_by_digest(&self, digest: &Digest) -> Option<Entry> {
        let table = self.arrivals.table.read();
        one(table.committed.values().filter_map(|committed| committed.indexes.of_digest(digest)))
    }

    /// For each committed Release that names the index or patch with this digest: the names that it may have in `lists/`, and
    /// whether the index is private.
    pub(super) fn index_namings(&self, digest: &Digest) -> Vec<([String; 2], bool)> {
        let table = self.arrivals.table.read();
        let named = |suite: &Arc<Suite>| {
            let entry = table.committed.get(&suite.inrelease_name)?.indexes.of_digest(digest)?;
            Some(([suite.inrelease_name.clone(), suite.release_name.clone()], entry.private))
        };
        table.suites.iter().filter_map(named).collect()
    }

    /// The same of Releases that apt has not committed: only for what has come from their mirrors too, since nobody has
    /// checked who wrote them.
    pub fn arriving_by_digest(&self, digest: &Digest) -> Option<Entry> {
        let table = self.arrivals.table.read();
        one(table.pending.values().filter_map(|pending| pending.indexes.of_digest(digest)))
    }

    /// A Release is complete in `lists/partial/`, or has got its name there. Returns what apt will ask for first, as far as
    /// the lists of its suite are in `lists/` in another version. Nothing for files that are no Release of a source.
    pub fn release_arrived(&self, lists: BorrowedFd<'_>, name: &str) -> Result<Vec<Entry>, ArrivalError> {
        let Some(suite) = self.arrivals.table.read().suite(name) else { return Ok(Vec::new()) };
        let Some((file, _)) = open_partial(lists, name)? else { return Ok(Vec::new()) };
        let release = Release::read(file).map_err(|source| ArrivalError::Release { name: name.to_owned(), source })?;
        let indexes = Indexes::new(&suite, &release);
        let mut pending = Pending { name: name.to_owned(), release, indexes, pdiffs: Vec::new() };
        // One of an earlier run may still be there: apt does not write it again.
        let names: Vec<String> = pending.indexes.diff_index_names().map(str::to_owned).collect();
        if let Ok(partial) = open_partial_directory(lists) {
            for name in names {
                if let Ok(Some(index)) = read_pdiff(partial.as_fd(), &name, pending.indexes.diff_index_digest(&name)) {
                    pending.indexes.add_patches(&name, &index);
                    pending.pdiffs.push((name, index));
                }
            }
        }
        // Read before the lock is taken: lookups wait for it.
        let here = Here::read(lists).map_err(|source| ArrivalError::Lists { source })?;
        let mut table = self.arrivals.table.write();
        let before = table.committed.get(&suite.inrelease_name).map(|committed| &committed.indexes);
        let expected = pending.indexes.expected(before, |name| here.has(name));
        table.pending.insert(suite.inrelease_name.clone(), pending);
        Ok(expected)
    }

    /// A Release has left `lists/partial/`: `committed` to `lists/`, or removed, which takes back what it named.
    pub fn release_left(&self, name: &str, committed: bool) {
        let mut table = self.arrivals.table.write();
        let Some(suite) = table.suite(name) else { return };
        let key = &suite.inrelease_name;
        if table.pending.get(key).is_some_and(|pending| pending.name == name)
            && let Some(pending) = table.pending.remove(key)
            && committed
        {
            table.committed.insert(key.clone(), Committed { stamp: None, indexes: pending.indexes, pdiffs: pending.pdiffs });
        }
    }

    /// The holder of apt's lock is done: what he has not committed counts no more.
    pub fn forget_pending(&self) {
        self.arrivals.table.write().pending.clear();
    }

    /// A pdiff Index is complete in `lists/partial/`: its patches can be asked for. Returns those that apt will ask for, as
    /// far as that can be told. Nothing for files that are no pdiff Index of a source.
    pub fn pdiff_arrived(&self, lists: BorrowedFd<'_>, name: &str) -> Result<Vec<Entry>, ArrivalError> {
        let wanted = self.arrivals.table.read().current().find_map(|indexes| indexes.diff_index_digest(name));
        let Some(wanted) = wanted else { return Ok(Vec::new()) };
        let partial = open_partial_directory(lists).map_err(|source| ArrivalError::Read { name: name.to_owned(), source })?;
        let Some(index) = read_pdiff(partial.as_fd(), name, Some(wanted))? else { return Ok(Vec::new()) };
        let mut table = self.arrivals.table.write();
        let Table { committed, pending, .. } = &mut *table;
        for (key, pending) in pending {
            if pending.indexes.diff_index_digest(name) == Some(wanted) {
                pending.indexes.add_patches(name, &index);
                let before = committed.get(key).map(|committed| &committed.indexes);
                let path = before.map_or(Vec::new(), |before| pending.indexes.path_from(before, name, &index));
                pending.pdiffs.retain(|(known, _)| known != name);
                pending.pdiffs.push((name.to_owned(), index));
                return Ok(path);
            }
        }
        for committed in committed.values_mut() {
            if committed.indexes.diff_index_digest(name) == Some(wanted) {
                committed.indexes.add_patches(name, &index);
                committed.pdiffs.retain(|(known, _)| known != name);
                committed.pdiffs.push((name.to_owned(), index.clone()));
            }
        }
        Ok(Vec::new())
    }

    /// Somebody with apt's lock found nothing under `name` in `lists/`. Returns what he will ask for if no form of that list
    /// is there.
    pub fn index_missed(&self, lists: BorrowedFd<'_>, name: &[u8]) -> Option<Entry> {
        let candidates: Vec<(String, Entry)> = self.arrivals.table.read().current().filter_map(|indexes| indexes.missing(name)).collect();
        candidates.into_iter().find(|(list, _)| !has_list(lists, list)).map(|(_, entry)| entry)
    }
}

/// One entry with the places of all.
fn one(mut entries: impl Iterator<Item = Entry>) -> Option<Entry> {
    let mut first = entries.next()?;
    for other in entries {
        first.private |= other.private;
        let new = other.urls.into_iter().filter(|url| !first.urls.contains(url)).collect::<Vec<_>>();
        first.urls.extend(new);
    }
    Some(first)
}

/// The names in `lists/`, as they were at one moment.
struct Here(HashSet<Vec<u8>>);

impl Here {
    fn read(lists: BorrowedFd<'_>) -> std::io::Result<Self> {
        let names = rustix::fs::Dir::read_from(lists)?.map(|entry| Ok(entry?.file_name().to_bytes().to_vec()));
        names.collect::<std::io::Result<_>>().map(Self)
    }

    /// Whether an index was there in any form.
    fn has(&self, name: &str) -> bool {
        super::forms::Form::ALL.into_iter().any(|form| self.0.contains(format!("{name}{}", form.suffix()).as_bytes()))
    }
}

/// Whether an index is in `lists/` in any form.
fn has_list(lists: BorrowedFd<'_>, name: &str) -> bool {
    let mut forms = super::forms::Form::ALL.into_iter();
    forms.any(|form| rustix::fs::statat(lists, format!("{name}{}", form.suffix()), AtFlags::SYMLINK_NOFOLLOW).is_ok())
}

fn open_partial_directory(lists: BorrowedFd<'_>) -> std::io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(lists, PARTIAL, flags, Mode::empty())?)
}

fn open_partial(lists: BorrowedFd<'_>, name: &str) -> Result<Option<(File, Stamp)>, ArrivalError> {
    let opened = open_partial_directory(lists).and_then(|partial| open_file(partial.as_fd(), name));
    opened.map_err(|source| ArrivalError::Read { name: name.to_owned(), source })
}

/// The pdiff Index `name` in a directory, if it is there and has the digest that is wanted.
fn read_pdiff(directory: BorrowedFd<'_>, name: &str, wanted: Option<Digest>) -> Result<Option<PdiffIndex>, ArrivalError> {
    let failed = |source| ArrivalError::Read { name: name.to_owned(), source };
    let Some((file, _)) = open_file(directory, name).map_err(failed)? else { return Ok(None) };
    let mut bytes = Vec::new();
    file.take(super::pdiff::PDIFF_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(failed)?;
    if Some(Digest::of(&bytes)) != wanted {
        return Err(ArrivalError::Other { name: name.to_owned() });
    }
    PdiffIndex::parse(&bytes).map(Some).map_err(|source| ArrivalError::Pdiff { name: name.to_owned(), source })
}
