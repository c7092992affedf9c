//! The catalog as the mounts see it: with apt's configuration read anew whenever apt's lists change.

use crate::config;
use parking_lot::Mutex;
use poolfs_core::Digest;
use poolfs_core::catalog::{AptConfig, Catalog, Entry, Vanished};
use poolfs_fs::FsError;
use poolfs_fs::names::Names;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

/// The catalog, and what is wrong with what it was read from.
#[derive(Debug)]
pub struct AptNames {
    catalog: Arc<Catalog>,
    apt: config::Apt,
    problems: Mutex<Vec<String>>,
}

impl AptNames {
    /// For a catalog that was configured with `apt`; `problems` are those of its configuration.
    pub fn new(catalog: Arc<Catalog>, apt: config::Apt, problems: Vec<String>) -> Self {
        Self { catalog, apt, problems: Mutex::new(problems) }
    }

    /// What was wrong at the last refresh, each with its remedy.
    pub fn problems(&self) -> Vec<String> {
        self.problems.lock().clone()
    }
}

impl Names for AptNames {
    fn archive(&self, name: &[u8]) -> Result<Option<Entry>, FsError> {
        Ok(self.catalog.archive(name)?)
    }

    fn by_digest(&self, digest: &Digest) -> Result<Option<Entry>, FsError> {
        Ok(self.catalog.by_digest(digest)?)
    }

    fn packages(&self) -> Result<Vec<String>, FsError> {
        Ok(self.catalog.package_names()?)
    }

    fn refresh(&self, lists: BorrowedFd<'_>, vanished: Vanished) -> Result<(), FsError> {
        let mut problems = Vec::new();
        // A source may have been added since the last time. With a configuration that cannot be read the old one stays.
        match AptConfig::load(&self.apt.sources, self.apt.config.as_deref()) {
            Ok(apt) => {
                problems.extend(apt.sources().problems.iter().cloned());
                self.catalog.configure(apt);
            }
            Err(err) => problems.push(err.to_string()),
        }
        let refreshed = self.catalog.refresh(lists, vanished)?;
        problems.extend(refreshed.problems);
        for problem in &problems {
            tracing::warn!("{problem}");
        }
        tracing::info!(parsed = refreshed.parsed, kept = refreshed.kept, dropped = refreshed.dropped, "the catalog is up to date");
        *self.problems.lock() = problems;
        Ok(())
    }
}
