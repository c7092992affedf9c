//! Deltas: made when this machine is idle, offered to peers, and used where an older version of what is wanted is here.
//!
//! - [`work`] is the process in which a delta is made or applied.
//! - [`offers`] is what is asked of the network: what others offer, and what this machine does.
//! - [`making`] makes them, [`using`] uses them, [`proving`] tries those that others call false; all are on the side that has the store.

pub mod making;
pub mod offers;
pub mod proving;
pub mod using;
pub mod work;

use anyhow::{Context as _, Result};
use poolfs_core::catalog::{Catalog, Entry};
use poolfs_core::store::{Objects, PackageVersion, Sharing, Store};
use poolfs_core::{Digest, Summer, discretion};
use rustix::fs::{Mode, OFlags};
use std::cmp::Ordering;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::Arc;

/// Older versions of one package that are looked at, the newest first.
const OLDS_MAX: usize = 4;

/// What both sides of a delta need.
#[derive(Clone)]
pub struct Shared {
    /// Records of files, objects and deltas.
    pub store: Arc<Store>,
    /// Where deltas are kept.
    pub objects: Arc<Objects>,
    /// Which package a digest is.
    pub catalog: Arc<Catalog>,
    /// Opens older versions.
    pub shelf: Arc<crate::shelf::StoreShelf>,
    /// The network.
    pub network: Arc<dyn offers::Offers>,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("store", &self.store).finish_non_exhaustive()
    }
}

impl Shared {
    /// Which package a content is, as the lists say or once said; blocks for the database.
    fn version(&self, digest: &Digest) -> Result<Option<PackageVersion>> {
        if let Some(known) = self.store.version_of(digest)? {
            return Ok(Some(known));
        }
        let Some(version) = self.catalog.by_digest(digest)?.as_ref().and_then(version_of) else { return Ok(None) };
        self.store.name_version(digest, &version)?;
        Ok(Some(version))
    }

    /// The older versions of a package that are here, the newest first; blocks for the database.
    fn olds(&self, version: &PackageVersion, new: &Digest) -> Result<Vec<Digest>> {
        let mut olds = self.store.versions_here(&version.package, &version.architecture)?;
        olds.retain(|(old, digest)| digest != new && discretion::compare(old, &version.version) == Some(Ordering::Less));
        olds.sort_by(|(a, _), (b, _)| discretion::compare(b, a).unwrap_or(Ordering::Equal));
        Ok(olds.into_iter().map(|(_, digest)| digest).take(OLDS_MAX).collect())
    }
}

/// Which package an entry of the lists is; `None` for what is no binary package.
fn version_of(entry: &Entry) -> Option<PackageVersion> {
    let architecture = entry.name.strip_suffix(".deb")?.rsplit_once('_')?.1;
    let version = PackageVersion { package: entry.package.clone(), architecture: architecture.to_owned(), version: entry.version.clone() };
    (!version.package.is_empty() && !version.version.is_empty()).then_some(version)
}

/// Who may have the delta to a file that is shared so: nobody else, and its own key is not announced.
pub fn sharing_of_delta(new: Sharing) -> Sharing {
    match new {
        Sharing::Announced | Sharing::Available => Sharing::Available,
        Sharing::Withheld => Sharing::Withheld,
        Sharing::LocalOnly => Sharing::LocalOnly,
    }
}

/// A file without a name, in `dir`.
fn temp(dir: &Path) -> Result<File> {
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    let made = rustix::fs::open(dir, flags, Mode::from_raw_mode(0o600));
    Ok(made.with_context(|| format!("make a file in {}", dir.display()))?.into())
}

fn digest_of(file: &File) -> Result<Digest> {
    let mut sums = Summer::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read_at(&mut buffer, sums.size()).context("read the older version")? {
            0 => return Ok(sums.finish().digest),
            got => sums.update(&buffer[..got]),
        }
    }
}
