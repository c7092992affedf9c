//! Uses deltas: a file that is wanted, an older version of which is here, is made from that and what somebody offers.
//!
//! On any failure the download goes on as if there were no delta. What failed for good is remembered by the delta's digest, so
//! that the next download does not fall into it again, and `poolfs why` says what was done. A claim is called false only when the
//! old file was found whole on disk, and where every machine would find the same.

use super::offers::{DeltaOffer, FalseClaim, ITEM_DELTA_BYTES_MAX, TOLD_BYTES_MAX};
use super::work::{self, Files, Task, Work};
use super::{Shared, digest_of, sharing_of_delta, temp};
use crate::config::Deltas;
use anyhow::{Context, Result, bail};
use parking_lot::Mutex;
use poolfs_core::delta::DELTA_BYTES_MAX;
use poolfs_core::store::{DeltaHere, DeltaNote, Kind, Provenance, Sharing};
use poolfs_core::{Digest, Sums};
use poolfs_fs::fetch::{Fetched, Fetcher, Job, SourceBytes};
use poolfs_fs::names::Names;
use poolfs_fs::rebuild::{Rebuild, Wish};
use poolfs_fs::source::{Audience, Purpose};
use rustix::fs::MemfdFlags;
use std::collections::BTreeMap;
use std::fs::File;
use std::future::Future;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::sync::Semaphore;
use tokio::time::{Instant, timeout, timeout_at};

/// How long offers are waited for: with [`Deltas::Always`] as long as a lookup may take, otherwise no longer than the file
/// itself would, and no longer than this.
const OFFERS_WAIT_ALWAYS: Duration = Duration::from_secs(15);
const OFFERS_WAIT_AUTO: Duration = Duration::from_secs(2);

/// With [`Deltas::Auto`] they are waited for a part of the time that the file itself would take: usually there are none.
const OFFERS_WAIT_PART: f64 = 0.25;

/// Once there is an offer of use, others may still come for so long.
const BETTER_WAIT: Duration = Duration::from_millis(300);

/// Deltas tried for one file.
const TRIES_MAX: usize = 3;

/// How long the delta itself may take, and rebuilding: what was expected some times over, within these bounds.
const DELTA_WAIT: [Duration; 2] = [Duration::from_secs(5), Duration::from_secs(60)];

const REBUILD_WAIT: [Duration; 2] = [Duration::from_secs(20), Duration::from_secs(180)];
const PATIENCE: f64 = 4.0;

/// The same with [`Deltas::Always`]: bytes count more than time, and many that want the same of one machine wait for each other.
const WAIT_ALWAYS: [Duration; 2] = [Duration::from_secs(60), Duration::from_secs(180)];

/// How long all of it may take for one file.
const ALL_WAIT: Duration = Duration::from_secs(300);

/// A file this small comes sooner than a delta to it is found.
const AUTO_BYTES_MIN: u64 = 64 * 1024;

/// Bytes a second that a download is thought to bring before one was seen: 20 Mbit/s.
const RATE_BYTES_S: f64 = 2.5e6;

/// Seconds of rebuilding for each byte of a package, before one was rebuilt: one megabyte a second.
const REBUILD_S_EACH_BYTE: f64 = 1e-6;

/// How much of an estimate the newest measurement is.
const NEWEST: f64 = 0.3;

/// What was seen of downloads and rebuilding.
#[derive(Clone, Copy, Debug)]
struct Seen {
    rate_bytes_s: f64,
    rebuild_s_each_byte: f64,
}

/// See the module.
pub struct Rebuilder {
    shared: Shared,
    names: Arc<dyn Names>,
    /// Brings the deltas: not the one that asks here, whose turns the askers hold.
    fetcher: Arc<Fetcher>,
    mode: Deltas,
    /// For files that are being made.
    dir: PathBuf,
    seen: Mutex<Seen>,
    /// One for each processor: more at once would all be late, and each takes memory.
    turns: Semaphore,
    saved_bytes: AtomicU64,
}

impl std::fmt::Debug for Rebuilder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Rebuilder").field("mode", &self.mode).field("seen", &self.seen).finish_non_exhaustive()
    }
}

/// What an attempt came to.
struct Rebuilt {
    file: File,
    offer: DeltaOffer,
}

impl Rebuilder {
    /// Uses deltas as `mode` says; `fetcher` must not ask this one. Files are made in `dir`.
    pub fn new(shared: Shared, names: Arc<dyn Names>, fetcher: Arc<Fetcher>, mode: Deltas, dir: PathBuf) -> Arc<Self> {
        let seen = Mutex::new(Seen { rate_bytes_s: RATE_BYTES_S, rebuild_s_each_byte: REBUILD_S_EACH_BYTE });
        let turns = Semaphore::new(std::thread::available_parallelism().map_or(1, usize::from));
        Arc::new(Self { shared, names, fetcher, mode, dir, seen, turns, saved_bytes: AtomicU64::new(0) })
    }

    /// Bytes that did not have to come since the start.
    pub fn saved_bytes(&self) -> u64 {
        self.saved_bytes.load(Ordering::Relaxed)
    }

    /// Bytes of deltas that arrived since the start, by source; those out of the DHT are not counted.
    pub fn counters(&self) -> SourceBytes {
        self.fetcher.counters()
    }

    /// Runs what blocks for the database or the disk.
    async fn blocking<T: Send + 'static>(self: &Arc<Self>, step: impl FnOnce(&Self) -> Result<T> + Send + 'static) -> Result<T> {
        let this = Arc::clone(self);
        tokio::task::spawn_blocking(move || step(&this)).await.context("a step of a delta")?
    }

    async fn find(self: &Arc<Self>, wish: Wish) -> Result<Option<File>> {
        let new = wish.digest;
        let olds = self.blocking(move |this| this.olds_here(&new)).await?;
        if olds.is_empty() {
            return Ok(None);
        }
        if self.mode == Deltas::Auto && wish.missing_bytes < AUTO_BYTES_MIN {
            return self.say(new, "none: the package itself comes sooner", 0).await;
        }
        let offers = self.offers(&wish, &olds).await?;
        if offers.is_empty() {
            return self.say(new, "none: nobody offers one to a version that is here", 0).await;
        }
        let mut why = String::new();
        for offer in offers.into_iter().take(TRIES_MAX) {
            if self.mode == Deltas::Auto && !self.is_sooner(&offer, &wish) {
                why = format!("none: the package itself comes sooner than a delta of {} bytes", offer.bytes);
                break;
            }
            match self.attempt(&wish, &offer).await {
                Ok(Rebuilt { file, offer }) => {
                    let saved = wish.missing_bytes.saturating_sub(offer.bytes);
                    self.saved_bytes.fetch_add(saved, Ordering::Relaxed);
                    let how = format!("{} of {} bytes, from {}", offer.delta, offer.bytes, offer.old);
                    self.say(new, &how, saved).await?;
                    return Ok(Some(file));
                }
                Err(err) => {
                    tracing::info!(%new, delta = %offer.delta, "no use: {err:#}; the package is fetched as it is");
                    why = format!("{} was of no use: {err:#}", offer.delta);
                }
            }
        }
        self.say(new, &why, 0).await
    }

    /// Notes for `poolfs why` what became of it.
    async fn say(self: &Arc<Self>, new: Digest, note: &str, saved: u64) -> Result<Option<File>> {
        let note = DeltaNote { note: note.to_owned(), saved };
        self.blocking(move |this| Ok(this.shared.store.note_delta(&new, &note)?)).await?;
        Ok(None)
    }

    fn olds_here(&self, new: &Digest) -> Result<Vec<Digest>> {
        match self.shared.version(new)? {
            Some(version) => self.shared.olds(&version, new),
            None => Ok(Vec::new()),
        }
    }

    /// The offers of use, the smallest first.
    async fn offers(self: &Arc<Self>, wish: &Wish, olds: &[Digest]) -> Result<Vec<DeltaOffer>> {
        let wait = match self.mode {
            Deltas::Always => OFFERS_WAIT_ALWAYS,
            Deltas::Auto | Deltas::Off => OFFERS_WAIT_AUTO.min(Duration::from_secs_f64(self.full_s(wish.missing_bytes) * OFFERS_WAIT_PART)),
        };
        let mut until = Instant::now() + wait;
        let mut searching = self.shared.network.offers(wish.digest, wish.audience == Audience::Fleet);
        // By the delta; one that somebody vouches for before one that nobody does.
        let mut found: BTreeMap<Digest, DeltaOffer> = BTreeMap::new();
        while let Ok(Some(offer)) = timeout_at(until, searching.recv()).await {
            let small = offer.bytes > 0 && offer.bytes <= DELTA_BYTES_MAX && offer.bytes < wish.missing_bytes;
            if !small || !olds.contains(&offer.old) {
                continue;
            }
            let (delta, new) = (offer.delta, wish.digest);
            if self.blocking(move |this| Ok(this.shared.store.delta_failure(&delta, &new)?)).await?.is_some() {
                continue;
            }
            until = until.min(Instant::now() + BETTER_WAIT);
            let known = found.entry(offer.delta).or_insert_with(|| offer.clone());
            if known.claim.is_none() {
                *known = offer;
            }
        }
        let mut offers: Vec<DeltaOffer> = found.into_values().collect();
        offers.sort_by_key(|offer| (offer.bytes, offer.delta));
        Ok(offers)
    }

    fn full_s(&self, bytes: u64) -> f64 {
        seconds(bytes, self.seen.lock().rate_bytes_s)
    }

    fn rebuild_s(&self, bytes: u64) -> f64 {
        #[allow(clippy::cast_precision_loss, reason = "an estimate")]
        let bytes = bytes as f64;
        bytes * self.seen.lock().rebuild_s_each_byte
    }

    /// Some times what was expected, within bounds.
    fn patience(&self, expected_s: f64, usual: [Duration; 2]) -> Duration {
        let [least, most] = if self.mode == Deltas::Always { WAIT_ALWAYS } else { usual };
        Duration::from_secs_f64(expected_s * PATIENCE).clamp(least, most)
    }

    /// Whether a file is expected sooner by a delta.
    fn is_sooner(&self, offer: &DeltaOffer, wish: &Wish) -> bool {
        self.full_s(offer.bytes) + self.rebuild_s(wish.size) < self.full_s(wish.missing_bytes)
    }

    /// Fetches one delta and makes the file with it.
    async fn attempt(self: &Arc<Self>, wish: &Wish, offer: &DeltaOffer) -> Result<Rebuilt> {
        let got = self.fetch(wish, offer).await?;
        let old = offer.old;
        let opened = self.blocking(move |this| Ok(this.shared.shelf.open_here(&old)?)).await?;
        let Some((old_file, _lease)) = opened else { bail!("the older version is gone") };
        let out = self.blocking(|this| temp(&this.dir)).await?;
        let files = Files {
            old: old_file.try_clone().context("duplicate a descriptor")?.into(),
            second: got.open()?,
            out: out.try_clone().context("duplicate a descriptor")?.into(),
        };
        let work = Work { task: Task::Apply, old, new: wish.digest, new_bytes: wish.size, idle: false };
        let wait = self.patience(self.rebuild_s(wish.size), REBUILD_WAIT);
        let turn = timeout(wait, self.turns.acquire()).await.context("too many others are rebuilt")??;
        let began = Instant::now();
        // Dropping the future ends the process.
        let done = timeout(wait, work::run(work, files)).await;
        drop(turn);
        let result = match done.context("rebuilding takes too long")? {
            // Too much memory or time: no proof, since other machines have more, and no use here.
            Err(err) if err.downcast_ref::<work::Ended>().is_some_and(|ended| ended.lasting) => {
                Err(work::Failed { why: format!("{err:#}"), proof: false, lasting: true })
            }
            done => done?.result,
        };
        match result {
            Ok(_) => {
                self.rebuilt(wish.size, began.elapsed());
                let (new, kept) = (wish.digest, offer.clone());
                if let Err(err) = self.blocking(move |this| this.keep(&new, &kept, got)).await {
                    tracing::warn!("keep a delta that was of use: {err:#}");
                }
                Ok(Rebuilt { file: out, offer: offer.clone() })
            }
            Err(failed) => {
                let (wish, offer, why) = (*wish, offer.clone(), failed.why.clone());
                self.blocking(move |this| this.failed(&wish, &offer, &got, &old_file, &failed)).await?;
                bail!(why)
            }
        }
    }

    async fn fetch(self: &Arc<Self>, wish: &Wish, offer: &DeltaOffer) -> Result<Got> {
        // Who asks the DHT for it tells strangers what is wanted.
        let may_ask = wish.audience == Audience::Everybody && offer.bytes <= ITEM_DELTA_BYTES_MAX;
        if let Some(target) = offer.target.filter(|_| may_ask)
            && let Ok(Some(bytes)) = timeout(DELTA_WAIT[0], self.shared.network.item(target)).await
            && Digest::of(&bytes) == offer.delta
        {
            return Ok(Got::Item(bytes));
        }
        if offer.claim.is_none() {
            bail!("it is not in the DHT, and nobody who has it vouches for it");
        }
        let job = Job { digest: offer.delta, size: offer.bytes, urls: Vec::new(), purpose: Purpose::Read, audience: wish.audience };
        // Its failure is not the file's.
        self.fetcher.forgive(&offer.delta);
        let fetching = self.fetcher.start(job);
        let wait = self.patience(self.full_s(wish.missing_bytes), DELTA_WAIT);
        match timeout(wait, fetching.done()).await {
            Ok(fetched) => Ok(Got::Fetched(fetched?)),
            Err(_) => bail!("it did not come within {} s", wait.as_secs()),
        }
    }

    /// Keeps a delta that made its file: others may want it too.
    fn keep(&self, new: &Digest, offer: &DeltaOffer, got: Got) -> Result<()> {
        let sharing = sharing_of_delta(self.names.judge(new, offer.bytes, false)?);
        if sharing == Sharing::LocalOnly {
            return Ok(());
        }
        let objects = &self.shared.objects;
        match got {
            Got::Item(bytes) => objects.add(&bytes, &Sums::of(&bytes), Kind::Delta, sharing, Provenance::Peer)?,
            Got::Fetched(fetched) => {
                let sums = Arc::clone(fetched.sums());
                objects.keep(&sums, Kind::Delta, sharing, Provenance::Peer, |dir, name| fetched.place(dir, name).map(drop))?
            }
        };
        self.shared.store.add_delta(&DeltaHere { new: *new, old: offer.old, delta: offer.delta, bytes: offer.bytes })?;
        Ok(())
    }

    /// Remembers a delta that did not do, and tells of a false claim.
    fn failed(&self, wish: &Wish, offer: &DeltaOffer, got: &Got, old: &File, failed: &work::Failed) -> Result<()> {
        if failed.lasting {
            self.shared.store.delta_failed(&offer.delta, &wish.digest, &failed.why)?;
        }
        // A disk that lies here is nobody's guilt there.
        if failed.proof
            && let Some(claim) = &offer.claim
            && digest_of(old)? == offer.old
        {
            let is_new_public = sharing_of_delta(self.names.judge(&wish.digest, wish.size, true)?) == Sharing::Available;
            // An older version that is offered deltas from is known to be here.
            let of_old = self.shared.store.sharings(&[offer.old])?.get(&offer.old).copied();
            let is_public = is_new_public && of_old.is_some_and(|sharing| sharing != Sharing::LocalOnly);
            let delta = if offer.bytes <= TOLD_BYTES_MAX { Some(got.read(offer.bytes)?) } else { None };
            let false_claim = FalseClaim { new: wish.digest, size: wish.size, claim: claim.clone(), is_public };
            self.shared.network.false_claim(false_claim, delta.as_deref());
        }
        Ok(())
    }

    fn rebuilt(&self, bytes: u64, took: Duration) {
        let mut seen = self.seen.lock();
        #[allow(clippy::cast_precision_loss, reason = "an estimate")]
        let each = took.as_secs_f64() / bytes.max(1) as f64;
        seen.rebuild_s_each_byte += (each - seen.rebuild_s_each_byte) * NEWEST;
    }
}

/// A delta that was brought.
enum Got {
    Item(Vec<u8>),
    Fetched(Arc<Fetched>),
}

impl Got {
    fn open(&self) -> Result<OwnedFd> {
        match self {
            Self::Item(bytes) => {
                let memory = File::from(rustix::fs::memfd_create("poolfs-delta", MemfdFlags::CLOEXEC).context("memory for a delta")?);
                memory.write_all_at(bytes, 0).context("memory for a delta")?;
                Ok(memory.into())
            }
            Self::Fetched(fetched) => Ok(fetched.open()?),
        }
    }

    /// Its bytes, so many.
    fn read(&self, bytes: u64) -> Result<Vec<u8>> {
        let mut delta = vec![0; usize::try_from(bytes)?];
        File::from(self.open()?).read_exact_at(&mut delta, 0).context("read a delta")?;
        Ok(delta)
    }
}

fn seconds(bytes: u64, rate_bytes_s: f64) -> f64 {
    #[allow(clippy::cast_precision_loss, reason = "an estimate")]
    let bytes = bytes as f64;
    (bytes / rate_bytes_s.max(1.0)).min(3600.0)
}

/// The handle that the downloads ask.
#[derive(Clone, Debug)]
pub struct RebuildHandle(pub Arc<Rebuilder>);

impl Rebuild for RebuildHandle {
    fn rebuild(&self, wish: Wish) -> Pin<Box<dyn Future<Output = Option<OwnedFd>> + Send>> {
        let this = Arc::clone(&self.0);
        Box::pin(async move {
            if this.mode == Deltas::Off || wish.private {
                return None;
            }
            let found = timeout(ALL_WAIT, this.find(wish)).await.context("deltas take too long");
            match found.flatten() {
                Ok(file) => file.and_then(|file| file.as_fd().try_clone_to_owned().ok()),
                Err(err) => {
                    tracing::warn!(digest = %wish.digest, "look for a delta: {err:#}");
                    None
                }
            }
        })
    }

    fn downloaded(&self, bytes: u64, took: Duration) {
        const BYTES_MIN: u64 = 64 * 1024;
        if bytes < BYTES_MIN {
            return;
        }
        let mut seen = self.0.seen.lock();
        #[allow(clippy::cast_precision_loss, reason = "an estimate")]
        let rate = bytes as f64 / took.as_secs_f64().max(0.001);
        seen.rate_bytes_s += (rate - seen.rate_bytes_s) * NEWEST;
    }
}

#[cfg(test)]
mod tests;
