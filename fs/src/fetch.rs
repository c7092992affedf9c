//! Downloads: missing files are asked of a [`Source`], collected in `incoming/`, and become a [`Fetched`] once their whole
//! digest matched.
//!
//! **Invariants.** Nothing leaves here that did not have its digest. Jobs for one digest join; a reader that goes away does
//! not cancel what others wait for. What is in `incoming/` survives a restart and is not asked for again. Every wait ends:
//! see [`FetchLimits`]. What could not be had is not tried again for a while.
//!
//! Each download is one task on the runtime, which owns the [`Partial`](poolfs_core::store::Partial) alone. Everything that
//! touches the disk or hashes runs on the runtime's blocking threads, one step of a download at a time, so pieces wait in the
//! channel and memory stays bounded: [`DELIVERIES_WAITING_MAX`](crate::source::DELIVERIES_WAITING_MAX) pieces and one being
//! written per download.
//!
//! The one lock, around the table of downloads, is held for lookups only, never over the disk, the network or an await.

mod disk;
mod failures;
#[cfg(test)]
pub(crate) mod fake;
mod fetched;
mod meter;
#[cfg(test)]
mod tests;

pub(crate) use disk::read_sealed;
pub use fetched::Fetched;

use crate::rebuild::{Rebuild, Wish};
use crate::source::{Audience, Delivery, Giver, MirrorUrl, Purpose, Source, SourceError, Verdict, Want};
use disk::Disk;
use failures::Failures;
use meter::Meter;
use poolfs_core::Digest;
use poolfs_core::store::{Incoming, Provenance, StoreError};
use poolfs_core::sync::Mutex;
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::collections::hash_map::Entry as Slot;
use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::time::{Duration, Instant, SystemTime};
use tokio::runtime::Handle;
use tokio::sync::{Notify, Semaphore, mpsc, watch};
use tokio::time::{Instant as TimerInstant, sleep, sleep_until};

/// Downloads of one file with wrong bytes, after which it is given up.
const ATTEMPTS_MAX: u32 = 2;

/// How long it is said that the disk refused a download, unless it takes another one before.
pub const REFUSED_SHOWN: Duration = Duration::from_secs(600);

/// Times that a download goes on after the network side went away: with the one that was started in its place.
const LOST_MAX: u32 = 2;

/// How often a digest is tried that somebody else holds.
const BEGIN_TRIES_MAX: u32 = 100;

/// Between two of these tries.
const BEGIN_PAUSE: Duration = Duration::from_millis(10);

/// Bounds of all downloads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FetchLimits {
    /// Downloads at once; the others wait in the order in which they were started.
    pub fetches_max: usize,
    /// Downloads that may wait; more are refused ([`FetchError::Busy`]).
    pub queued_max: usize,
    /// Without a piece for this long a download is given up. Sources have shorter limits of their own for what hangs.
    pub no_progress: Duration,
    /// The span over which the rate is judged.
    pub rate_window: Duration,
    /// Below this many bytes a second over [`Self::rate_window`] a download is given up.
    pub rate_bytes_s_min: u64,
    /// How long a file that could not be had is not tried again.
    pub undeliverable: Duration,
    /// Files remembered as such; the oldest are forgotten first.
    pub undeliverable_max: usize,
}

impl Default for FetchLimits {
    fn default() -> Self {
        Self {
            fetches_max: 8,
            // A distribution upgrade is some 3,000 packages.
            queued_max: 16_384,
            no_progress: Duration::from_secs(90),
            rate_window: Duration::from_secs(300),
            rate_bytes_s_min: 4096,
            undeliverable: Duration::from_secs(10 * 60),
            undeliverable_max: 4096,
        }
    }
}

/// A file to download.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Job {
    /// What a signed index says of it.
    pub digest: Digest,
    /// Its length in bytes, from the same index.
    pub size: u64,
    /// The mirror's URLs, best first; may be empty.
    pub urls: Vec<MirrorUrl>,
    /// Who waits. [`Purpose::Prefetch`] goes on with nobody waiting.
    pub purpose: Purpose,
    /// Who may have it while it arrives.
    pub audience: Audience,
}

/// Why there is no file, by what the caller does next.
#[derive(Clone, Debug, thiserror::Error)]
pub enum FetchError {
    /// No source has it. Not tried again for [`FetchLimits::undeliverable`].
    #[error("no source has {digest}: {why}")]
    Nowhere {
        /// The file.
        digest: Digest,
        /// The sources' answers.
        why: String,
    },
    /// Sources exist, and were out of reach or too slow. Not tried again for [`FetchLimits::undeliverable`].
    #[error("no source delivers {digest} now: {why}")]
    NotNow {
        /// The file.
        digest: Digest,
        /// What was wrong.
        why: String,
    },
    /// What was delivered has another digest, twice. Not tried again for [`FetchLimits::undeliverable`].
    #[error("{digest}: what was delivered has another digest, twice; the mirror's copy is damaged or older than its index")]
    Wrong {
        /// The file.
        digest: Digest,
    },
    /// The disk has no room for it.
    #[error("no space, or no inode, for the {size} bytes of {digest}; free some, or lower [store] quota")]
    NoSpace {
        /// The file.
        digest: Digest,
        /// Its length in bytes.
        size: u64,
    },
    /// The disk or the database failed.
    #[error("download {digest}: {cause}")]
    Disk {
        /// The file.
        digest: Digest,
        /// What failed.
        cause: Arc<StoreError>,
    },
    /// Too many downloads wait already.
    #[error("{digest} is not downloaded: {max} downloads wait already")]
    Busy {
        /// The file.
        digest: Digest,
        /// [`FetchLimits::queued_max`].
        max: usize,
    },
    /// The daemon or its network side is ending.
    #[error("the download of {digest} was stopped")]
    Stopped {
        /// The file.
        digest: Digest,
    },
}

impl FetchError {
    /// Whether the file is left alone for [`FetchLimits::undeliverable`] after this.
    pub fn is_remembered(&self) -> bool {
        match self {
            Self::Nowhere { .. } | Self::NotNow { .. } | Self::Wrong { .. } => true,
            Self::NoSpace { .. } | Self::Disk { .. } | Self::Busy { .. } | Self::Stopped { .. } => false,
        }
    }

    /// Whether the same may work later with nothing changed here.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::NotNow { .. } | Self::Busy { .. } | Self::Stopped { .. } => true,
            Self::Nowhere { .. } | Self::Wrong { .. } | Self::NoSpace { .. } | Self::Disk { .. } => false,
        }
    }

    fn of(digest: Digest, size: u64, cause: StoreError) -> Self {
        if cause.is_full() { Self::NoSpace { digest, size } } else { Self::Disk { digest, cause: Arc::new(cause) } }
    }
}

/// A download as `status` and `watch` show it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// The file.
    pub digest: Digest,
    /// The last part of its first URL, or the digest.
    pub name: String,
    /// Its length in bytes.
    pub size: u64,
    /// Bytes of it that are here.
    pub done_bytes: u64,
    /// Bytes a second over the last seconds.
    pub rate_bytes_s: u64,
    /// Who gave bytes of it, and how many; most first.
    pub givers: Vec<(Giver, u64)>,
    /// Whether it waits for its turn.
    pub queued: bool,
    /// When it was started.
    pub since: SystemTime,
}

/// Bytes that sources delivered, right or wrong.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceBytes {
    /// By mirrors.
    pub mirror: u64,
    /// By peers.
    pub peer: u64,
    /// Rebuilt from deltas.
    pub delta: u64,
}

/// Tells the time; a virtual one in tests.
pub type Clock = Arc<dyn Fn() -> Instant + Send + Sync>;

type Outcome = Result<Arc<Fetched>, FetchError>;

/// Downloads files; one per process, shared by all readers.
#[derive(Debug)]
pub struct Fetcher {
    inner: Arc<Inner>,
}

struct Inner {
    incoming: Arc<Incoming>,
    source: Arc<dyn Source>,
    runtime: Handle,
    limits: FetchLimits,
    clock: Clock,
    turns: Semaphore,
    table: Mutex<Table>,
    bytes: Counted,
    /// What the disk refused last and when, until a download is kept again.
    refused: Mutex<Option<(Instant, String)>>,
    rebuild: OnceLock<Arc<dyn Rebuild>>,
}

impl fmt::Debug for Inner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Fetcher")
            .field("limits", &self.limits)
            .field("downloads", &self.table.lock().downloads.len())
            .finish_non_exhaustive()
    }
}

#[derive(Debug, Default)]
struct Counted {
    mirror: AtomicU64,
    peer: AtomicU64,
    delta: AtomicU64,
}

#[derive(Debug)]
struct Table {
    downloads: HashMap<Digest, Known>,
    failures: Failures,
}

/// A digest's place in the table.
#[derive(Debug)]
enum Known {
    Running(Arc<Download>),
    /// Had its digest; here as long as somebody holds it, so that who comes late does not begin again.
    Done(Weak<Fetched>),
}

/// A download that has not ended.
#[derive(Debug)]
struct Download {
    job: Job,
    since: SystemTime,
    /// [`Fetching`]s that live. Changed and decided upon with the table locked.
    waiting: AtomicUsize,
    /// Goes on with nobody waiting. Set with the table locked.
    unattended: AtomicBool,
    queued: AtomicBool,
    /// Told when nobody waits any more.
    left_alone: Notify,
    meter: Mutex<Meter>,
    outcome: watch::Receiver<Option<Outcome>>,
}

impl Fetcher {
    /// A fetcher that collects what `source` delivers in `incoming`, with tasks on `runtime`.
    pub fn new(incoming: Arc<Incoming>, source: Arc<dyn Source>, runtime: Handle, limits: FetchLimits) -> Arc<Self> {
        Self::with_clock(incoming, source, runtime, limits, Arc::new(Instant::now))
    }

    /// As [`Self::new`] with another clock than the system's, for tests.
    pub fn with_clock(incoming: Arc<Incoming>, source: Arc<dyn Source>, runtime: Handle, limits: FetchLimits, clock: Clock) -> Arc<Self> {
        let table = Table { downloads: HashMap::new(), failures: Failures::new(limits.undeliverable, limits.undeliverable_max) };
        let turns = Semaphore::new(limits.fetches_max);
        let bytes = Counted::default();
        let (table, rebuild) = (Mutex::new(table), OnceLock::new());
        Arc::new(Self {
            inner: Arc::new(Inner { incoming, source, runtime, limits, clock, turns, table, bytes, refused: Mutex::default(), rebuild }),
        })
    }

    /// From now on `rebuild` is asked before a source is. The first call counts.
    pub fn rebuild_with(&self, rebuild: Arc<dyn Rebuild>) {
        // Whoever came first is asked.
        let _ = self.inner.rebuild.set(rebuild);
    }

    /// Starts a download, or joins the one of this digest. Returns at once; any thread may call it.
    pub fn start(&self, job: Job) -> Fetching {
        let inner = &self.inner;
        let digest = job.digest;
        let now = (inner.clock)();
        let mut table = inner.table.lock();
        match table.downloads.get(&digest) {
            Some(Known::Running(download)) if download.outcome.has_changed().is_ok() => {
                download.waiting.fetch_add(1, Ordering::Relaxed);
                if job.purpose == Purpose::Prefetch {
                    download.unattended.store(true, Ordering::Relaxed);
                }
                return Fetching { wait: Wait::For(Arc::clone(download), Arc::clone(inner)) };
            }
            Some(Known::Done(fetched)) => {
                if let Some(fetched) = fetched.upgrade() {
                    return Fetching { wait: Wait::Over(Ok(fetched)) };
                }
            }
            _ => {}
        }
        if let Some(failure) = table.failures.get(&digest, now) {
            return Fetching { wait: Wait::Over(Err(failure.clone())) };
        }
        table.downloads.retain(|_, known| known.lives());
        if table.downloads.len() >= inner.limits.queued_max {
            return Fetching { wait: Wait::Over(Err(FetchError::Busy { digest, max: inner.limits.queued_max })) };
        }
        let (told, outcome) = watch::channel(None);
        let download = Arc::new(Download {
            since: SystemTime::now(),
            waiting: AtomicUsize::new(1),
            unattended: AtomicBool::new(job.purpose == Purpose::Prefetch),
            queued: AtomicBool::new(true),
            left_alone: Notify::new(),
            meter: Mutex::new(Meter::new(now)),
            outcome,
            job,
        });
        table.downloads.insert(digest, Known::Running(Arc::clone(&download)));
        drop(table);
        inner.runtime.spawn(Arc::clone(inner).run(Arc::clone(&download), told));
        Fetching { wait: Wait::For(download, Arc::clone(inner)) }
    }

    /// The downloads that have not ended, in the order in which they were started.
    pub fn progress(&self) -> Vec<Progress> {
        let now = (self.inner.clock)();
        let running: Vec<Arc<Download>> = {
            let table = self.inner.table.lock();
            table.downloads.values().filter_map(Known::running).cloned().collect()
        };
        let mut all: Vec<Progress> = running.iter().map(|download| download.progress(now)).collect();
        all.sort_by(|a, b| a.since.cmp(&b.since).then_with(|| a.digest.cmp(&b.digest)));
        all
    }

    /// Whether the file could not be had a short while ago, so that it is better not promised.
    pub fn undeliverable(&self, digest: &Digest) -> bool {
        self.inner.table.lock().failures.get(digest, (self.inner.clock)()).is_some()
    }

    /// Forgets that a file could not be had: somebody asks for it by name.
    pub fn forgive(&self, digest: &Digest) {
        self.inner.table.lock().failures.remove(digest);
    }

    /// Removes what interrupted downloads left, for a disk that is full; returns how many. Blocks for the disk.
    pub fn give_up_idle(&self) -> Result<usize, StoreError> {
        self.inner.incoming.discard_older(i64::MAX)
    }

    /// Why a download of the last [`REFUSED_SHOWN`] could not be kept on the disk, on one line; `None` if a later one was.
    pub fn refused(&self) -> Option<String> {
        let now = (self.inner.clock)();
        let recent = self.inner.refused.lock().clone().filter(|(at, _)| now.saturating_duration_since(*at) < REFUSED_SHOWN);
        recent.map(|(_, why)| why)
    }

    /// Bytes delivered since the start, by kind of source.
    pub fn counters(&self) -> SourceBytes {
        let bytes = &self.inner.bytes;
        SourceBytes {
            mirror: bytes.mirror.load(Ordering::Relaxed),
            peer: bytes.peer.load(Ordering::Relaxed),
            delta: bytes.delta.load(Ordering::Relaxed),
        }
    }
}

/// A share in a download. When the last one is dropped the download ends, unless somebody started it as
/// [`Purpose::Prefetch`]; what has arrived stays in `incoming/`.
#[derive(Debug)]
pub struct Fetching {
    wait: Wait,
}

#[derive(Debug)]
enum Wait {
    Over(Outcome),
    For(Arc<Download>, Arc<Inner>),
}

impl Fetching {
    /// Waits for the end.
    pub async fn done(&self) -> Result<Arc<Fetched>, FetchError> {
        match &self.wait {
            Wait::Over(outcome) => outcome.clone(),
            Wait::For(download, _) => {
                let mut outcome = download.outcome.clone();
                let ended = outcome.wait_for(Option::is_some).await.map(|outcome| outcome.clone());
                ended.ok().flatten().unwrap_or(Err(FetchError::Stopped { digest: download.job.digest }))
            }
        }
    }

    /// The result, if the download has ended.
    pub fn try_done(&self) -> Option<Result<Arc<Fetched>, FetchError>> {
        match &self.wait {
            Wait::Over(outcome) => Some(outcome.clone()),
            Wait::For(download, _) => {
                // In this order: who tells the outcome goes away right after.
                let stopped = download.outcome.has_changed().is_err();
                let told = download.outcome.borrow().clone();
                told.or_else(|| stopped.then(|| Err(FetchError::Stopped { digest: download.job.digest })))
            }
        }
    }
}

impl Drop for Fetching {
    fn drop(&mut self) {
        if let Wait::For(download, inner) = &self.wait {
            let table = inner.table.lock();
            let before = download.waiting.fetch_sub(1, Ordering::Relaxed);
            drop(table);
            if before == 1 {
                download.left_alone.notify_one();
            }
        }
    }
}

impl Known {
    fn running(&self) -> Option<&Arc<Download>> {
        match self {
            Self::Running(download) => Some(download),
            Self::Done(_) => None,
        }
    }

    /// Whether the entry still says something.
    fn lives(&self) -> bool {
        match self {
            Self::Running(download) => download.outcome.has_changed().is_ok(),
            Self::Done(fetched) => fetched.strong_count() > 0,
        }
    }
}

impl Download {
    /// To be asked with the table locked, where it decides something.
    fn is_unwanted(&self) -> bool {
        self.waiting.load(Ordering::Relaxed) == 0 && !self.unattended.load(Ordering::Relaxed)
    }

    fn name(&self) -> String {
        let url = self.job.urls.first().map(|url| url.url.as_str()).unwrap_or_default();
        match url.rsplit('/').next() {
            Some(name) if !name.is_empty() => name.to_owned(),
            _ => self.job.digest.to_string(),
        }
    }

    fn progress(&self, now: Instant) -> Progress {
        let meter = self.meter.lock();
        Progress {
            digest: self.job.digest,
            name: self.name(),
            size: self.job.size,
            done_bytes: meter.done_bytes(),
            rate_bytes_s: meter.rate_bytes_s(now),
            givers: meter.givers(),
            queued: self.queued.load(Ordering::Relaxed),
            since: self.since,
        }
    }
}

/// Why a download stopped without a file.
enum Stop {
    Error(FetchError),
    /// Nobody waits for it any more.
    Unwanted,
    /// The bytes have another digest.
    Wrong,
    /// The network side went away.
    Lost,
}

impl Inner {
    async fn run(self: Arc<Self>, download: Arc<Download>, told: watch::Sender<Option<Outcome>>) {
        let digest = download.job.digest;
        let outcome = loop {
            let stopped = match self.fetch(&download).await {
                Ok(fetched) => break Ok(Arc::new(fetched)),
                Err(Stop::Error(error)) => break Err(error),
                Err(Stop::Wrong) => break Err(FetchError::Wrong { digest }),
                Err(Stop::Lost) => break Err(FetchError::Stopped { digest }),
                Err(Stop::Unwanted) => self.table.lock().remove_unwanted(&download),
            };
            if stopped {
                tracing::debug!(%digest, "nobody waits for it any more");
                return;
            }
            // Somebody came in the meantime: go on where it was.
        };
        match &outcome {
            Ok(_) => {
                tracing::debug!(%digest, size = download.job.size, "fetched");
                *self.refused.lock() = None;
            }
            Err(error) => {
                tracing::warn!(name = download.name(), "{error}");
                if matches!(error, FetchError::NoSpace { .. } | FetchError::Disk { .. }) {
                    *self.refused.lock() = Some(((self.clock)(), format!("{}: {error}", download.name())));
                }
            }
        }
        {
            let mut table = self.table.lock();
            match &outcome {
                Ok(fetched) => {
                    table.downloads.insert(digest, Known::Done(Arc::downgrade(fetched)));
                }
                Err(error) => {
                    table.downloads.remove(&digest);
                    if error.is_remembered() {
                        table.failures.insert(digest, error.clone(), (self.clock)());
                    }
                }
            }
        }
        // Nobody may be left to take it; then the bytes stay in `incoming/`.
        let _ = told.send(Some(outcome));
    }

    /// Waits for a turn and downloads, again if the bytes were wrong or the network side went away.
    async fn fetch(&self, download: &Arc<Download>) -> Result<Fetched, Stop> {
        let _turn = tokio::select! {
            biased;
            () = self.unwanted(download) => return Err(Stop::Unwanted),
            turn = self.turns.acquire() => turn.map_err(|_| Stop::Error(FetchError::Stopped { digest: download.job.digest }))?,
        };
        download.queued.store(false, Ordering::Relaxed);
        let (mut attempt, mut lost) = (1, 0);
        loop {
            match self.attempt(download, attempt == 1).await {
                Err(Stop::Wrong) if attempt < ATTEMPTS_MAX => attempt += 1,
                // What has arrived is here.
                Err(Stop::Lost) if lost < LOST_MAX => lost += 1,
                result => return result,
            }
        }
    }

    /// One download, from what is in `incoming/` to the verdict. `is_first`: nothing of it was found wrong before.
    async fn attempt(&self, download: &Arc<Download>, is_first: bool) -> Result<Fetched, Stop> {
        let Job { digest, size, .. } = download.job;
        let mut disk = self.begin(download).await?;
        download.meter.lock().resume(disk.done_bytes());
        if is_first && !disk.is_complete() {
            disk = self.rebuilt(download, disk).await?;
        }
        let (began, before) = (TimerInstant::now(), disk.done_bytes());
        if !disk.is_complete() {
            let Job { urls, purpose, audience, .. } = download.job.clone();
            let (incoming, disk_again) = self.blocking(download, move || Ok((disk.read_only()?, disk))).await?;
            disk = disk_again;
            let mut deliveries = self.source.want(Want { digest, size, urls, missing: disk.missing(), purpose, audience }, Some(incoming));
            // While the source gets going, what is here already is hashed.
            disk = self.blocking(download, move || disk.catch_up()).await?;
            let mut held = Some(disk);
            let collected = self.collect(download, &mut held, &mut deliveries).await;
            drop(deliveries);
            match (collected, held) {
                (Ok(()), Some(complete)) => {
                    disk = complete;
                    if let Some(rebuild) = self.rebuild.get() {
                        rebuild.downloaded(size.saturating_sub(before), began.elapsed());
                    }
                }
                (Err(stop), held) => {
                    // Closing it may write to the database.
                    self.blocking(download, move || {
                        drop(held);
                        Ok(())
                    })
                    .await?;
                    return Err(stop);
                }
                (Ok(()), None) => return Err(Stop::Error(FetchError::Stopped { digest })),
            }
        }
        let verified = self.blocking(download, move || disk.finish()).await?;
        let verdict = if verified.is_some() { Verdict::Right } else { Verdict::Wrong };
        self.source.verdict(digest, verdict);
        match verified {
            Some((partial, sums)) => Ok(Fetched::new(partial, sums, download.meter.lock().provenance())),
            None => {
                tracing::warn!(name = download.name(), "what was delivered for {digest} has another digest");
                Err(Stop::Wrong)
            }
        }
    }

    /// The download with what of it could be made here from an older version: all of it or nothing.
    async fn rebuilt(&self, download: &Arc<Download>, disk: Disk) -> Result<Disk, Stop> {
        let Some(rebuild) = self.rebuild.get() else { return Ok(disk) };
        let Job { digest, size, audience, ref urls, .. } = download.job;
        let missing_bytes = size.saturating_sub(disk.done_bytes());
        let wish = Wish { digest, size, missing_bytes, audience, private: urls.iter().any(|url| url.private) };
        let made = tokio::select! {
            biased;
            () = self.unwanted(download) => None,
            made = rebuild.rebuild(wish) => Some(made),
        };
        let made: Option<OwnedFd> = match made {
            Some(made) => made,
            None => {
                self.blocking(download, move || {
                    drop(disk);
                    Ok(())
                })
                .await?;
                return Err(Stop::Unwanted);
            }
        };
        let Some(made) = made else { return Ok(disk) };
        let (bytes, disk) = self.blocking(download, move || disk.fill(&made)).await?;
        self.count(&Giver::Delta, bytes);
        download.meter.lock().took((self.clock)(), Giver::Delta, bytes, false);
        Ok(disk)
    }

    /// Takes over what is in `incoming/`. Who held a [`Fetched`] of this digest may just be letting go of it.
    async fn begin(&self, download: &Download) -> Result<Disk, Stop> {
        let Job { digest, size, .. } = download.job;
        for _ in 0..BEGIN_TRIES_MAX {
            let incoming = Arc::clone(&self.incoming);
            let begun = self.blocking(download, move || match Disk::begin(&incoming, digest, size) {
                Err(StoreError::InProgress(_)) => Ok(None),
                begun => begun.map(Some),
            });
            if let Some(disk) = begun.await? {
                return Ok(disk);
            }
            sleep(BEGIN_PAUSE).await;
        }
        Err(Stop::Error(FetchError::of(digest, size, StoreError::InProgress(digest))))
    }

    /// Takes deliveries until the source says that the file in `held` is complete; `held` is empty after an error of the disk.
    async fn collect(&self, download: &Download, held: &mut Option<Disk>, deliveries: &mut mpsc::Receiver<Delivery>) -> Result<(), Stop> {
        let digest = download.job.digest;
        let failed = |why: String| Stop::Error(FetchError::NotNow { digest, why });
        let mut alarm = TimerInstant::now() + self.limits.no_progress;
        let mut window = (TimerInstant::now() + self.limits.rate_window, 0_u64);
        loop {
            let delivery = tokio::select! {
                biased;
                () = self.unwanted(download) => return Err(Stop::Unwanted),
                delivery = deliveries.recv() => delivery,
                () = sleep_until(alarm) => return Err(failed(format!("nothing came for {} s", self.limits.no_progress.as_secs()))),
                () = sleep_until(window.0) => {
                    if window.1 < self.limits.rate_bytes_s_min.saturating_mul(self.limits.rate_window.as_secs()) {
                        return Err(failed(format!("slower than {} bytes a second", self.limits.rate_bytes_s_min)));
                    }
                    window = (TimerInstant::now() + self.limits.rate_window, 0);
                    continue;
                }
            };
            match delivery {
                Some(Delivery::Piece { index, bytes, giver }) => {
                    let disk = held.take().expect("held while it is incomplete");
                    let (taken, disk) = self.blocking(download, move || disk.take(index, &bytes)).await?;
                    *held = Some(disk);
                    self.count(&giver, taken.bytes);
                    download.meter.lock().took((self.clock)(), giver, taken.bytes, taken.replaced);
                    if taken.bytes > 0 {
                        alarm = TimerInstant::now() + self.limits.no_progress;
                        window.1 += taken.bytes;
                    }
                }
                Some(Delivery::Checking { bytes }) => {
                    alarm = TimerInstant::now() + self.limits.no_progress;
                    window.1 += bytes;
                }
                Some(Delivery::Done) if held.as_ref().is_some_and(Disk::is_complete) => return Ok(()),
                Some(Delivery::Done) => {
                    return Err(failed("pieces were promised and did not come".to_owned()));
                }
                Some(Delivery::Failed(SourceError::Nowhere { why, .. })) => return Err(Stop::Error(FetchError::Nowhere { digest, why })),
                Some(Delivery::Failed(SourceError::NotNow { why, .. })) => return Err(failed(why)),
                // With all of it here the digest decides, not who went away.
                Some(Delivery::Failed(SourceError::Gone)) | None if held.as_ref().is_some_and(Disk::is_complete) => return Ok(()),
                Some(Delivery::Failed(SourceError::Gone)) => return Err(Stop::Lost),
                None => return Err(Stop::Error(FetchError::Stopped { digest })),
            }
        }
    }

    /// Runs a step that touches the disk. The steps of a download never overlap, and each is waited for, so that its
    /// [`Partial`](poolfs_core::store::Partial) is gone when the download has ended.
    async fn blocking<T: Send + 'static>(
        &self,
        download: &Download,
        step: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, Stop> {
        let Job { digest, size, .. } = download.job;
        match self.runtime.spawn_blocking(step).await {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(cause)) => Err(Stop::Error(FetchError::of(digest, size, cause))),
            Err(_) => Err(Stop::Error(FetchError::Stopped { digest })),
        }
    }

    async fn unwanted(&self, download: &Download) {
        loop {
            let left_alone = download.left_alone.notified();
            if download.is_unwanted() {
                return;
            }
            left_alone.await;
        }
    }

    fn count(&self, giver: &Giver, taken: u64) {
        let count = match giver {
            Giver::Mirror(_) => &self.bytes.mirror,
            Giver::Peer(_) => &self.bytes.peer,
            Giver::Delta => &self.bytes.delta,
        };
        count.fetch_add(taken, Ordering::Relaxed);
    }
}

impl Table {
    /// Removes the download unless somebody waits again; false if it goes on.
    fn remove_unwanted(&mut self, download: &Arc<Download>) -> bool {
        if !download.is_unwanted() {
            return false;
        }
        if let Slot::Occupied(slot) = self.downloads.entry(download.job.digest)
            && slot.get().running().is_some_and(|running| Arc::ptr_eq(running, download))
        {
            slot.remove();
        }
        true
    }
}

/// What gave the most bytes decides what a file's source is called.
fn provenance_of(giver: &Giver) -> Provenance {
    match giver {
        Giver::Mirror(_) => Provenance::Mirror,
        Giver::Peer(_) => Provenance::Peer,
        Giver::Delta => Provenance::Delta,
    }
}
