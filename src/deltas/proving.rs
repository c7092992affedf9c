//! Tries a delta that somebody is said to have vouched for falsely, with the files that are here, to tell whether he did.

use super::work::{self, Files, Task, Work};
use super::{digest_of, temp};
use crate::shelf::StoreShelf;
use anyhow::{Context as _, Result};
use poolfs_core::Digest;
use poolfs_core::store::Lease;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::timeout;

/// How long one may take.
const PROVE_WAIT: Duration = Duration::from_secs(120);

/// See the module.
#[derive(Debug)]
pub struct Prover {
    /// Nothing else of [`super::Shared`]: that has the network, which has this, and the database would never be closed.
    shelf: Arc<StoreShelf>,
    dir: PathBuf,
}

/// What is here of both files.
struct Here {
    old: File,
    new_bytes: u64,
    /// They keep objects from being evicted.
    _leases: [Option<Lease>; 2],
}

impl Prover {
    /// Tries with what is on `shelf`; files are made in `dir`.
    pub fn new(shelf: Arc<StoreShelf>, dir: PathBuf) -> Self {
        Self { shelf, dir }
    }

    /// Whether `delta` makes `new` of `old`; `None` where that cannot be told: one of them is not here, or rotten, or it takes more
    /// memory or time than this machine gives, which is nobody's guilt.
    pub async fn makes(self: Arc<Self>, old: Digest, new: Digest, delta: OwnedFd) -> Option<bool> {
        self.tried(old, new, delta).await.unwrap_or_else(|err| {
            tracing::debug!(%old, %new, "a delta could not be tried: {err:#}");
            None
        })
    }

    async fn tried(self: Arc<Self>, old: Digest, new: Digest, delta: OwnedFd) -> Result<Option<bool>> {
        let this = Arc::clone(&self);
        let here = tokio::task::spawn_blocking(move || this.here(&old, &new)).await??;
        let Some(Here { old: old_file, new_bytes, _leases }) = here else { return Ok(None) };
        let dir = self.dir.clone();
        let out = tokio::task::spawn_blocking(move || temp(&dir)).await??;
        let work = Work { task: Task::Apply, old, new, new_bytes, idle: true };
        let files = Files { old: old_file.into(), second: delta, out: out.into() };
        match timeout(PROVE_WAIT, work::run(work, files)).await.context("it takes too long")??.result {
            Ok(_) => Ok(Some(true)),
            Err(failed) => Ok(failed.proof.then_some(false)),
        }
    }

    /// The older file and the newer one's length, where both are here as they should be; with what keeps them.
    fn here(&self, old: &Digest, new: &Digest) -> Result<Option<Here>> {
        let Some((old_file, old_lease)) = self.shelf.open_here(old)? else { return Ok(None) };
        let Some((new_file, new_lease)) = self.shelf.open_here(new)? else { return Ok(None) };
        let is_right = digest_of(&old_file)? == *old && digest_of(&new_file)? == *new;
        let new_bytes = new_file.metadata().context("the newer file's length")?.len();
        Ok(is_right.then_some(Here { old: old_file, new_bytes, _leases: [old_lease, new_lease] }))
    }
}
