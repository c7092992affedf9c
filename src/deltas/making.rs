//! Makes deltas when this machine is idle, and tells the network what there is.
//!
//! One task, one delta at a time. It looks whether the store has changed; for each package that strangers may have and of which an
//! older version is here, it has the delta made and applied in a process of its own ([`super::work`]) at the lowest
//! priority, and keeps it only if what it makes is the package. What cannot be is remembered, so that it is not tried
//! again. A download that begins does not wait: the process has idle priority, unless the configuration gives it another, and no
//! other is started meanwhile.

use super::offers::{ITEM_DELTA_BYTES_MAX, ITEMS_MAX, OFFERED_MAX, Offered};
use super::work::{self, Done, Files, Made, Task, Work};
use super::{Shared, sharing_of_delta};
use crate::config::{Announce, Config, DeltaPriority, Deltas};
use anyhow::{Context, Result, bail};
use poolfs_core::delta::DELTA_BYTES_MAX;
use poolfs_core::store::{DeltaHere, Kind, PackageVersion, Provenance, Sharing};
use poolfs_core::{Digest, Role, Sums};
use poolfs_fs::fetch::Fetcher;
use rustix::fs::MemfdFlags;
use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::Read as _;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

/// How often it is looked whether something has changed, or whether the machine has become idle.
const LOOK_INTERVAL: Duration = Duration::from_secs(2);

/// The smallest package worth a delta: a lookup costs more.
const PACKAGE_BYTES_MIN: u64 = 8 * 1024;

/// See the module.
#[derive(Debug)]
pub struct Maker {
    shared: Shared,
    /// Says whether the machine is at work.
    fetcher: Arc<Fetcher>,
    percent_max: u64,
    bytes_max: u64,
    /// The store's state at the last look.
    seen: Option<u64>,
    /// Contents whose package was noted.
    named: HashSet<Digest>,
    /// What is to be made, the next one last.
    waiting: Vec<Pair>,
    /// How many are to be made, with the one that is being made or not offered yet.
    left: Arc<AtomicUsize>,
    priority: DeltaPriority,
    /// Whether small deltas are put into the DHT.
    has_items: bool,
}

/// A delta that may be made.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Pair {
    version: PackageVersion,
    old: Digest,
    old_bytes: u64,
    new: Digest,
    new_bytes: u64,
}

impl Maker {
    /// Makes as the configuration says; `None` where it says that none are made.
    pub fn new(shared: Shared, fetcher: Arc<Fetcher>, config: &Config) -> Option<Self> {
        let (net, fleet) = (&config.net, &config.fleet);
        if net.deltas == Deltas::Off {
            return None;
        }
        Some(Self {
            shared,
            fetcher,
            percent_max: net.delta_percent_max,
            bytes_max: net.delta_bytes_max.min(DELTA_BYTES_MAX),
            seen: None,
            named: HashSet::new(),
            waiting: Vec::new(),
            left: Arc::default(),
            priority: net.delta_priority,
            has_items: net.announce != Announce::None && fleet.announces_outside(),
        })
    }

    /// How many deltas are to be made and offered, as long as this lives.
    pub fn left(&self) -> Arc<AtomicUsize> {
        Arc::clone(&self.left)
    }

    /// Goes on for ever. To be begun once everything was judged.
    pub async fn run(mut self) {
        loop {
            if let Err(err) = self.step().await {
                // The next change tries again.
                tracing::warn!("deltas: {err:#}");
            }
            tokio::time::sleep(LOOK_INTERVAL).await;
        }
    }

    async fn step(&mut self) -> Result<()> {
        let changes = self.shared.store.changes();
        if self.seen.replace(changes) != Some(changes) {
            let (shared, named, has_items) = (self.shared.clone(), std::mem::take(&mut self.named), self.has_items);
            let (offered, waiting, named) = tokio::task::spawn_blocking(move || {
                let named = name_versions(&shared, named)?;
                anyhow::Ok((offered(&shared, has_items)?, pairs(&shared)?, named))
            })
            .await??;
            self.named = named;
            self.shared.network.offer(offered);
            self.waiting = waiting;
            self.left.store(self.waiting.len(), Ordering::Relaxed);
        }
        // Other packages may be arriving.
        while self.fetcher.progress().is_empty()
            && let Some(pair) = self.waiting.pop()
        {
            match self.shared.network.is_maker([(pair.old, pair.old_bytes), (pair.new, pair.new_bytes)]).await {
                Some(true) => {}
                Some(false) => {
                    self.left.store(self.waiting.len(), Ordering::Relaxed);
                    continue;
                }
                None => {
                    self.waiting.push(pair);
                    return Ok(());
                }
            }
            if self.make(&pair).await? {
                return Ok(());
            }
            self.left.store(self.waiting.len(), Ordering::Relaxed);
        }
        Ok(())
    }

    /// Makes one; `true` if it is here now.
    async fn make(&self, pair: &Pair) -> Result<bool> {
        let (shared, wanted) = (self.shared.clone(), pair.clone());
        let prepared = tokio::task::spawn_blocking(move || {
            let opened = (shared.shelf.open_here(&wanted.old)?, shared.shelf.open_here(&wanted.new)?);
            anyhow::Ok((opened, shared.store.recipes(&wanted.version)?))
        });
        let ((Some((old, _old)), Some((new, _new))), known) = prepared.await?? else { return Ok(false) };
        // Less than so many hundredths of the package.
        let bytes_max = (pair.new_bytes.saturating_mul(self.percent_max).div_ceil(100)).saturating_sub(1).min(self.bytes_max);
        let outcome = made(pair, &old, &new, known, bytes_max, self.priority).await?;
        let (shared, pair) = (self.shared.clone(), pair.clone());
        tokio::task::spawn_blocking(move || match outcome {
            Outcome::Delta(bytes, recipes) => keep(&shared, &pair, &bytes, &recipes),
            Outcome::No(why) => {
                tracing::debug!(package = pair.version.package, version = pair.version.version, "no delta: {why}");
                shared.store.delta_failed(&pair.old, &pair.new, &why)?;
                Ok(false)
            }
        })
        .await?
    }
}

/// What the making of one came to.
enum Outcome {
    Delta(Vec<u8>, Vec<u8>),
    /// Never again, and why.
    No(String),
}

/// Makes, applies and compares; with the likeliest recipe first, since the other way packs the package many times.
async fn made(pair: &Pair, old: &File, new: &File, known: Vec<u8>, bytes_max: u64, priority: DeltaPriority) -> Result<Outcome> {
    let mut why = String::new();
    for search in [false, true] {
        let out = File::from(rustix::fs::memfd_create("poolfs-delta", MemfdFlags::CLOEXEC).context("memory for a delta")?);
        let task = Task::Make { known: known.clone(), search, bytes_max };
        let Made { bytes, recipes, .. } = match run(pair, task, priority, [old, new, &out]).await?.result {
            Ok(made) => made,
            Err(failed) if failed.lasting => return Ok(Outcome::No(failed.why)),
            Err(failed) => bail!(failed.why),
        };
        let null = File::options().write(true).open("/dev/null").context("open /dev/null")?;
        match run(pair, Task::Apply, priority, [old, &out, &null]).await?.result {
            Ok(_) => {
                let mut delta = Vec::new();
                std::io::Seek::rewind(&mut &out)?;
                (&out).take(bytes).read_to_end(&mut delta).context("read the delta")?;
                return Ok(Outcome::Delta(delta, recipes));
            }
            Err(failed) => why = failed.why,
        }
    }
    Ok(Outcome::No(why))
}

/// One step in a process of its own. One that was ended by its limits would be so again: that is a lasting failure.
async fn run(pair: &Pair, task: Task, priority: DeltaPriority, [old, second, out]: [&File; 3]) -> Result<Done> {
    let fd = |file: &File| file.try_clone().map(OwnedFd::from).context("duplicate a descriptor");
    let files = Files { old: fd(old)?, second: fd(second)?, out: fd(out)? };
    let idle = priority == DeltaPriority::Idle;
    let work = Work { task, old: pair.old, new: pair.new, new_bytes: pair.new_bytes, idle };
    match work::run(work, files).await {
        Err(err) if err.downcast_ref::<work::Ended>().is_some_and(|ended| ended.lasting) => {
            let failed = work::Failed { why: format!("{err:#}"), proof: false, lasting: true };
            Ok(Done { result: Err(failed), processor_ms: 0, peak_kib: 0 })
        }
        done => done,
    }
}

/// Keeps a delta; `true` if it is here now.
fn keep(shared: &Shared, pair: &Pair, bytes: &[u8], recipes: &[u8]) -> Result<bool> {
    // Meanwhile the package may have fallen silent.
    let sharing = shared.store.sharings(&[pair.new])?.get(&pair.new).copied().unwrap_or(Sharing::LocalOnly);
    if sharing == Sharing::LocalOnly {
        return Ok(false);
    }
    let sums = Sums::of(bytes);
    let kept = shared.objects.add(bytes, &sums, Kind::Delta, sharing_of_delta(sharing), Provenance::WrittenHere)?;
    if !kept && !shared.objects.contains(&sums.digest)? {
        shared.store.delta_failed(&pair.old, &pair.new, "there is no room for it: [store] quota")?;
        return Ok(false);
    }
    shared.store.add_delta(&DeltaHere { new: pair.new, old: pair.old, delta: sums.digest, bytes: sums.size })?;
    shared.store.remember_recipes(&pair.version, recipes)?;
    tracing::info!(
        package = pair.version.package,
        version = pair.version.version,
        "a delta of {} bytes for a package of {}",
        sums.size,
        pair.new_bytes
    );
    Ok(true)
}

/// Notes which packages the contents here are, as long as the lists still say it; returns all of which that is noted.
fn name_versions(shared: &Shared, mut named: HashSet<Digest>) -> Result<HashSet<Digest>> {
    let mut here = HashSet::new();
    shared.store.each_file(Role::Archives, |_, record| here.extend(record.digest))?;
    shared.objects.each(|digest, _, _| here.extend([*digest]))?;
    named.retain(|digest| here.contains(digest));
    for digest in here {
        if !named.contains(&digest) && shared.version(&digest)?.is_some() {
            named.insert(digest);
        }
    }
    Ok(named)
}

/// What is to be made, the next one last: the newest packages first.
fn pairs(shared: &Shared) -> Result<Vec<Pair>> {
    let store = &shared.store;
    let mut pairs = Vec::new();
    let shown = store.shared_as(&[Sharing::Announced, Sharing::Available])?;
    let shown: HashMap<Digest, _> = shown.into_iter().map(|content| (content.digest, content)).collect();
    for (version, digest) in store.packages_in_versions()? {
        let Some(content) = shown.get(&digest).filter(|content| content.size >= PACKAGE_BYTES_MIN) else { continue };
        let olds = shared.olds(&version, &content.digest)?;
        let sharings = store.sharings(&olds)?;
        for old in olds {
            // What is private here stays so: nobody is to learn that it was here.
            let private = sharings.get(&old).is_none_or(|sharing| *sharing == Sharing::LocalOnly);
            if !private
                && !store.delta_is_settled(&old, &content.digest)?
                && let Some(sums) = store.sums(&old)?
            {
                let (new, new_bytes) = (content.digest, content.size);
                pairs.push((content.since, Pair { version: version.clone(), old, old_bytes: sums.size, new, new_bytes }));
            }
        }
    }
    pairs.sort_by_key(|(since, _)| *since);
    Ok(pairs.into_iter().map(|(_, pair)| pair).collect())
}

/// What is offered now; with the bytes of those that are to be in the DHT.
fn offered(shared: &Shared, has_items: bool) -> Result<Vec<Offered>> {
    let here = shared.store.deltas_here()?;
    let news: Vec<Digest> = here.iter().map(|(delta, _)| delta.new).collect();
    let sharings = shared.store.sharings(&news)?;
    let (mut offered, mut items) = (Vec::new(), 0);
    for (DeltaHere { new, old, delta, bytes }, sharing) in here {
        // Whoever may have one may have the other, and both are here.
        let of_new = sharings.get(&new).copied().unwrap_or(Sharing::LocalOnly);
        if sharing == Sharing::LocalOnly || of_new == Sharing::LocalOnly {
            continue;
        }
        let to_strangers = [sharing, of_new].iter().all(|sharing| matches!(sharing, Sharing::Announced | Sharing::Available));
        let item = match has_items && to_strangers && bytes <= ITEM_DELTA_BYTES_MAX && items < ITEMS_MAX {
            true => read_object(shared, &delta)?,
            false => None,
        };
        items += usize::from(item.is_some());
        if offered.len() == OFFERED_MAX {
            break;
        }
        offered.push(Offered { new, old, delta, bytes, to_strangers, item });
    }
    Ok(offered)
}

fn read_object(shared: &Shared, digest: &Digest) -> Result<Option<Vec<u8>>> {
    let Some(object) = shared.objects.open_object(digest)? else { return Ok(None) };
    let mut bytes = Vec::new();
    (&object.file).take(ITEM_DELTA_BYTES_MAX + 1).read_to_end(&mut bytes).context("read a delta")?;
    Ok((Digest::of(&bytes) == *digest).then_some(bytes))
}
