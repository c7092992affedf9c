//! A damaged piece of a verified file again, from the sources, checked against the file's sums and written in place.
//!
//! **Invariants.** Only bytes whose SHA-256 is the one in the sums are written, so a repair can make nothing worse. The
//! file keeps its size, inode and modification time: its record stays true, apt sees no change. One piece is asked for once
//! at a time, however many readers and files wait for it. Every wait ends ([`RepairLimits`]).

use crate::errno::FsError;
use crate::fetch::read_sealed;
use crate::names::Names;
use crate::source::{Audience, Delivery, Purpose, Source, SourceError, Verdict, Want};
use crate::supply::{Mend, Mended, Wound};
use poolfs_core::piece::{self, PIECE_BYTES};
use poolfs_core::sync::Mutex;
use poolfs_core::{Digest, Sums};
use rustix::fs::{Timespec, Timestamps, UTIME_OMIT, fstat, futimens};
use std::collections::HashMap;
use std::fmt;
use std::fs::File;
use std::future::Future;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::sync::{Semaphore, watch};
use tokio::time::{Instant, timeout_at};

/// Times a piece is asked for, if what comes is wrong.
const ATTEMPTS_MAX: u32 = 2;

/// Bounds of repairs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RepairLimits {
    /// Pieces asked for at once; the others wait.
    pub pieces_max: usize,
    /// How long one attempt at a piece may take.
    pub wait: Duration,
}

impl Default for RepairLimits {
    fn default() -> Self {
        Self { pieces_max: 4, wait: Duration::from_secs(60) }
    }
}

/// Why a piece stays damaged.
#[derive(Clone, Debug, thiserror::Error)]
pub enum RepairError {
    /// Nothing says where its bytes could come from: apt's lists no longer name it, or it was written here.
    #[error("no list names {digest} any more, so there is nobody to ask for its bytes")]
    Unlisted {
        /// The file.
        digest: Digest,
    },
    /// Nobody delivered the piece.
    #[error("nobody delivers piece {index} of {digest}: {why}")]
    Unavailable {
        /// The file.
        digest: Digest,
        /// The piece.
        index: u32,
        /// The sources' answers.
        why: String,
    },
    /// What was delivered was wrong each time.
    #[error("piece {index} of {digest} was delivered wrong each time")]
    Wrong {
        /// The file.
        digest: Digest,
        /// The piece.
        index: u32,
    },
    /// The file has no such piece.
    #[error("{digest} has no piece {index}")]
    NoSuchPiece {
        /// The file.
        digest: Digest,
        /// The piece.
        index: u32,
    },
    /// The right bytes are here and could not be written.
    #[error("write piece {index} of {digest}: {cause}")]
    Write {
        /// The file.
        digest: Digest,
        /// The piece.
        index: u32,
        /// The kernel's word for it.
        cause: Arc<io::Error>,
    },
    /// The catalog could not be read.
    #[error("look up {digest} in the catalog: {why}")]
    Catalog {
        /// The file.
        digest: Digest,
        /// What failed.
        why: String,
    },
    /// The daemon is ending.
    #[error("the repair of {digest} was stopped")]
    Stopped {
        /// The file.
        digest: Digest,
    },
}

type Found = Result<Arc<Vec<u8>>, RepairError>;

/// Tells when a piece was found or not.
type Asking = watch::Receiver<Option<Found>>;

/// Repairs pieces; one per process.
#[derive(Clone, Debug)]
pub struct Repairer {
    inner: Arc<Inner>,
}

struct Inner {
    names: Arc<dyn Names>,
    source: Arc<dyn Source>,
    runtime: Handle,
    limits: RepairLimits,
    turns: Semaphore,
    /// Pieces that are being asked for. Held for lookups only.
    asked: Mutex<HashMap<(Digest, u32), Asking>>,
}

impl fmt::Debug for Inner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Repairer").field("limits", &self.limits).field("asked", &self.asked.lock().len()).finish_non_exhaustive()
    }
}

impl Repairer {
    /// A repairer that asks `source` for files where `names` says they are.
    pub fn new(names: Arc<dyn Names>, source: Arc<dyn Source>, runtime: Handle, limits: RepairLimits) -> Self {
        let turns = Semaphore::new(limits.pieces_max);
        Self { inner: Arc::new(Inner { names, source, runtime, limits, turns, asked: Mutex::default() }) }
    }

    /// Gets piece `index` of the file with these sums again and writes it into `file`, which is open for writing and which
    /// nobody else writes to.
    ///
    /// When it returns, the bytes are on the disk and the modification time is the old one.
    pub async fn repair(&self, file: File, sums: &Sums, index: u32) -> Result<(), RepairError> {
        let digest = sums.digest;
        let bytes = self.piece(sums, index).await?;
        let offset = piece::span(index.into(), sums.size, PIECE_BYTES).start;
        let written = self.inner.runtime.spawn_blocking(move || write_in_place(&file, &bytes, offset)).await;
        match written {
            Ok(Ok(())) => Ok(()),
            Ok(Err(cause)) => Err(RepairError::Write { digest, index, cause: Arc::new(cause) }),
            Err(_) => Err(RepairError::Stopped { digest }),
        }
    }

    /// The right bytes of a piece; joins who asks for it already.
    async fn piece(&self, sums: &Sums, index: u32) -> Found {
        let digest = sums.digest;
        let Some(expected) = usize::try_from(index).ok().and_then(|index| sums.pieces.get(index)).copied() else {
            return Err(RepairError::NoSuchPiece { digest, index });
        };
        let mut found = {
            let mut asked = self.inner.asked.lock();
            let asking = asked.get(&(digest, index)).filter(|asking| asking.has_changed().is_ok()).cloned();
            asking.unwrap_or_else(|| {
                let (told, asking) = watch::channel(None);
                asked.insert((digest, index), asking.clone());
                let (inner, size) = (Arc::clone(&self.inner), sums.size);
                self.inner.runtime.spawn(async move {
                    let found = inner.ask(digest, size, index, expected).await;
                    inner.asked.lock().remove(&(digest, index));
                    let _ = told.send(Some(found)); // Nobody may wait any more.
                });
                asking
            })
        };
        let result = found.wait_for(Option::is_some).await.map(|found| found.clone());
        result.ok().flatten().unwrap_or(Err(RepairError::Stopped { digest }))
    }
}

impl Mend for Repairer {
    fn mend(&self, wound: Wound) -> Pin<Box<dyn Future<Output = Mended> + Send>> {
        let this = self.clone();
        Box::pin(async move { this.piece(&wound.sums, wound.piece).await.map_err(|err| err.to_string()) })
    }
}

impl Inner {
    async fn ask(self: &Arc<Self>, digest: Digest, size: u64, index: u32, expected: Digest) -> Found {
        let _turn = self.turns.acquire().await.map_err(|_| RepairError::Stopped { digest })?;
        let names = Arc::clone(&self.names);
        let looked_up =
            self.runtime.spawn_blocking(move || Ok((names.by_digest(&digest)?, Audience::of(names.judge(&digest, size, true)?))));
        let looked_up: Result<_, FsError> = looked_up.await.map_err(|_| RepairError::Stopped { digest })?;
        let (entry, audience) = looked_up.map_err(|err| RepairError::Catalog { digest, why: err.to_string() })?;
        // Without an entry nobody says whether the file is private, and then peers must not be asked.
        let Some(entry) = entry.filter(|entry| entry.size == size && !(entry.private && entry.urls.is_empty())) else {
            return Err(RepairError::Unlisted { digest });
        };
        let want = Want { digest, size, urls: entry.urls, missing: vec![index], purpose: Purpose::Repair, audience };
        for attempt in 1..=ATTEMPTS_MAX {
            let bytes = match self.attempt(want.clone(), index).await {
                // The network side went away; it is started again.
                Err(RepairError::Stopped { .. }) if attempt < ATTEMPTS_MAX => continue,
                bytes => bytes?,
            };
            let right = Digest::of(&bytes) == expected;
            self.source.verdict(digest, if right { Verdict::Right } else { Verdict::Wrong });
            if right {
                return Ok(Arc::new(bytes));
            }
        }
        Err(RepairError::Wrong { digest, index })
    }

    /// The piece as a source gives it.
    async fn attempt(&self, want: Want, index: u32) -> Result<Vec<u8>, RepairError> {
        let digest = want.digest;
        let span = piece::span(index.into(), want.size, PIECE_BYTES);
        let unavailable = |why: String| RepairError::Unavailable { digest, index, why };
        let deadline = Instant::now() + self.limits.wait;
        let mut deliveries = self.source.want(want, None);
        loop {
            let delivery = timeout_at(deadline, deliveries.recv()).await;
            match delivery.map_err(|_| unavailable(format!("it did not come in {} s", self.limits.wait.as_secs())))? {
                Some(Delivery::Piece { index: given, bytes, .. }) if given == index => {
                    if let Some(bytes) = read_sealed(&bytes, span.end - span.start) {
                        return Ok(bytes);
                    }
                }
                Some(Delivery::Piece { .. } | Delivery::Checking { .. }) => {}
                Some(Delivery::Done) => return Err(unavailable("it was promised and did not come".to_owned())),
                Some(Delivery::Failed(SourceError::Nowhere { why, .. } | SourceError::NotNow { why, .. })) => return Err(unavailable(why)),
                Some(Delivery::Failed(SourceError::Gone)) | None => return Err(RepairError::Stopped { digest }),
            }
        }
    }
}

/// Writes and flushes, and puts the modification time back: the bytes are the ones that it belongs to.
pub(crate) fn write_in_place(file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
    let before = fstat(file)?;
    file.write_all_at(bytes, offset)?;
    let last_modification = Timespec { tv_sec: before.st_mtime, tv_nsec: i64::try_from(before.st_mtime_nsec).unwrap_or(0) };
    futimens(file, &Timestamps { last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT }, last_modification })?;
    file.sync_all()
}

#[cfg(test)]
mod tests;
