//! What apt's lists say exists, as the trees see it.

use crate::errno::FsError;
use crate::source::Audience;
use poolfs_core::Digest;
use poolfs_core::catalog::{ArrivalError, Catalog, Entry, Vanished};
use poolfs_core::discretion::Rule;
use poolfs_core::piece::SMALL_FILE_BYTES_MAX;
use poolfs_core::store::{Decision, Sharing};
use std::collections::BTreeMap;
use std::os::fd::BorrowedFd;

/// The catalog. A trait, so that a tree can be tested over a handful of names.
pub trait Names: Send + Sync + 'static {
    /// What should be under this name in `archives/`.
    fn archive(&self, name: &[u8]) -> Result<Option<Entry>, FsError>;

    /// What the file with this digest is.
    fn by_digest(&self, digest: &Digest) -> Result<Option<Entry>, FsError>;

    /// Who may have the file with this digest. `arriving`: it is one of those that apt is fetching for its lists.
    fn judge(&self, digest: &Digest, size: u64, arriving: bool) -> Result<Sharing, FsError> {
        let arriving = || self.arriving_by_digest(digest).filter(|_| arriving);
        let private = self.by_digest(digest)?.or_else(arriving).map(|entry| entry.private);
        Ok(match private {
            None | Some(true) => Sharing::LocalOnly,
            Some(false) if size > SMALL_FILE_BYTES_MAX => Sharing::Announced,
            Some(false) => Sharing::Available,
        })
    }

    /// Who may know that the file with this digest is wanted, and may have what is here of it while it arrives: nobody who may not have it
    /// afterwards.
    fn audience(&self, digest: &Digest, size: u64, arriving: bool) -> Result<Audience, FsError> {
        Ok(Audience::of(self.judge(digest, size, arriving)?))
    }

    /// Decides again of every content, each with its size in bytes and how it is shared now. What is missing in the answer stays
    /// as it is.
    fn judge_again(&self, contents: &BTreeMap<Digest, (u64, Sharing)>) -> Result<Vec<Decision>, FsError> {
        let decision = |(digest, (size, _)): (&Digest, &(u64, Sharing))| {
            let sharing = self.judge(digest, *size, false)?;
            let rule = if sharing == Sharing::LocalOnly { Rule::Unlisted } else { Rule::Current };
            Ok(Decision { digest: *digest, sharing, rule, origin: None })
        };
        contents.iter().map(decision).collect()
    }

    /// An update that holds apt's lock has looked up the Release of this name and kept or replaced it.
    fn looked_up(&self, name: &[u8]) {
        let _ = name;
    }

    /// The names of all packages, for a browsing mount.
    fn packages(&self) -> Result<Vec<String>, FsError>;

    /// Reads again what changed in the lists directory. Blocks for the disk. Names that never change need none.
    fn refresh(&self, lists: BorrowedFd<'_>, vanished: Vanished) -> Result<(), FsError> {
        let _ = (lists, vanished);
        Ok(())
    }

    /// What should be under this name in `lists/partial/`.
    fn index(&self, name: &[u8]) -> Option<Entry> {
        let _ = name;
        None
    }

    /// What the file in `lists/partial/` with this digest is, if a Release that is still there names it.
    fn arriving_by_digest(&self, digest: &Digest) -> Option<Entry> {
        let _ = digest;
        None
    }

    /// Somebody with apt's lock found nothing under this name in `lists/`: what he will ask for.
    fn index_missed(&self, lists: BorrowedFd<'_>, name: &[u8]) -> Option<Entry> {
        let _ = (lists, name);
        None
    }

    /// apt begins an update: sources may have been added. Blocks for a program of apt.
    fn reconfigure(&self, lists: BorrowedFd<'_>) -> Result<(), FsError> {
        let _ = lists;
        Ok(())
    }

    /// A file is complete in `lists/partial/`, or has got this name there. Returns what apt will ask for next because of it.
    fn arrived(&self, lists: BorrowedFd<'_>, name: &[u8]) -> Vec<Entry> {
        let _ = (lists, name);
        Vec::new()
    }

    /// A file has left `lists/partial/`, `committed` to `lists/` or removed.
    fn left(&self, name: &[u8], committed: bool) {
        let _ = (name, committed);
    }

    /// The holder of apt's lock is done: what he has not committed counts no more.
    fn forget_pending(&self) {}
}

/// Whether a name is that of a Release file.
pub fn is_release(name: &[u8]) -> bool {
    name.ends_with(b"_InRelease") || name.ends_with(b"_Release")
}

/// Whether a name is that of a pdiff Index.
pub fn is_pdiff_index(name: &[u8]) -> bool {
    name.ends_with(b".diff_Index")
}

/// [`Names::arrived`] for a catalog.
pub fn arrived(catalog: &Catalog, lists: BorrowedFd<'_>, name: &[u8]) -> Vec<Entry> {
    // apt's names are ASCII.
    let Ok(text) = std::str::from_utf8(name) else { return Vec::new() };
    let expected = match (is_release(name), is_pdiff_index(name)) {
        (true, _) => catalog.release_arrived(lists, text),
        (_, true) => catalog.pdiff_arrived(lists, text),
        (false, false) => return Vec::new(),
    };
    expected.unwrap_or_else(|err| {
        match &err {
            // Half of it, or a page that asks for a login: apt judges it next.
            ArrivalError::Release { .. } | ArrivalError::Other { .. } => tracing::debug!("{err}"),
            ArrivalError::Read { .. } | ArrivalError::Lists { .. } | ArrivalError::Pdiff { .. } => {
                tracing::warn!("{err}; apt fetches what it names")
            }
        }
        Vec::new()
    })
}

/// [`Names::left`] for a catalog.
pub fn left(catalog: &Catalog, name: &[u8], committed: bool) {
    if is_release(name)
        && let Ok(name) = std::str::from_utf8(name)
    {
        catalog.release_left(name, committed);
    }
}

impl Names for Catalog {
    fn archive(&self, name: &[u8]) -> Result<Option<Entry>, FsError> {
        Ok(Self::archive(self, name)?)
    }

    fn by_digest(&self, digest: &Digest) -> Result<Option<Entry>, FsError> {
        Ok(Self::by_digest(self, digest)?)
    }

    fn packages(&self) -> Result<Vec<String>, FsError> {
        Ok(self.package_names()?)
    }

    fn refresh(&self, lists: BorrowedFd<'_>, vanished: Vanished) -> Result<(), FsError> {
        let refreshed = Self::refresh(self, lists, vanished)?;
        for problem in &refreshed.problems {
            tracing::warn!("the catalog: {problem}");
        }
        tracing::info!(parsed = refreshed.parsed, kept = refreshed.kept, dropped = refreshed.dropped, "the catalog is up to date");
        Ok(())
    }

    fn index(&self, name: &[u8]) -> Option<Entry> {
        Self::index(self, name)
    }

    fn arriving_by_digest(&self, digest: &Digest) -> Option<Entry> {
        Self::arriving_by_digest(self, digest)
    }

    fn index_missed(&self, lists: BorrowedFd<'_>, name: &[u8]) -> Option<Entry> {
        Self::index_missed(self, lists, name)
    }

    fn arrived(&self, lists: BorrowedFd<'_>, name: &[u8]) -> Vec<Entry> {
        self::arrived(self, lists, name)
    }

    fn left(&self, name: &[u8], committed: bool) {
        self::left(self, name, committed);
    }

    fn forget_pending(&self) {
        Self::forget_pending(self);
    }
}
