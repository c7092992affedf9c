//! Tells the node which files it is to announce: it asks the store, and hands over plain keys.
//!
//! One task. It looks whether the store has changed, asks it for what is shared, chooses by the configuration, and replaces the node's set
//! when that is another one than before. The node itself announces what is new, refreshes the rest and withdraws what fell away.

use crate::apt_names::AptNames;
use crate::config::{Announce, Network};
use anyhow::Result;
use parking_lot::Mutex;
use poolfs_core::Digest;
use poolfs_core::store::{Shared, Sharing, Store};
use poolfs_fs::names::Names;
use poolfs_net::dht::{ANNOUNCE_KEYS_MAX, AnnounceKey, AnnounceMode, Offer, select};
use poolfs_net::krpc::{FLAG_PARTIAL, FLAG_REACHABLE, Id, Pv};
use poolfs_net::node::Dht;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Notify;

/// How often the store is asked whether it has changed; files that arrive together are announced together.
const LOOK_INTERVAL: Duration = Duration::from_secs(2);

/// Files that are arriving and are announced with the partial flag; more are not told of.
const ARRIVING_MAX: usize = 64;

/// What is told to strangers.
const FOR_STRANGERS: [Sharing; 2] = [Sharing::Announced, Sharing::Available];

/// The files that are arriving from peers.
#[derive(Debug, Default)]
pub struct Arriving {
    digests: Mutex<BTreeSet<Digest>>,
    changed: Notify,
}

impl poolfs_net::swarm::driver::Announcer for Arriving {
    fn begun(&self, digest: Digest, _size: u64) {
        let mut digests = self.digests.lock();
        if digests.len() < ARRIVING_MAX {
            digests.insert(digest);
            self.changed.notify_one();
        }
    }

    fn ended(&self, digest: Digest) {
        if self.digests.lock().remove(&digest) {
            self.changed.notify_one();
        }
    }
}

/// See the module.
#[derive(Debug)]
pub struct Announcer {
    store: Arc<Store>,
    arriving: Arc<Arriving>,
    dht: Dht,
    /// Judges what is arriving: it has no record yet.
    names: Arc<AptNames>,
    mode: AnnounceMode,
    /// A node on a public network announces only after somebody dialled it.
    flags: u64,
    /// [`Store::changes`] at the last look.
    seen: Option<u64>,
    /// Key, and whether of a part only.
    told: Vec<(Id, bool)>,
}

impl Announcer {
    /// Announces what `announce` says of `store`, and what is `arriving`, at `dht`, on such a network.
    pub fn new(store: Arc<Store>, arriving: Arc<Arriving>, names: Arc<AptNames>, dht: Dht, announce: Announce, network: Network) -> Self {
        let flags = match network {
            Network::Private => 0,
            Network::Public => FLAG_REACHABLE,
        };
        Self { store, arriving, dht, names, mode: mode(announce), flags, seen: None, told: Vec::new() }
    }

    /// Goes on until the node ends.
    pub async fn run(mut self) {
        loop {
            if let Err(err) = self.look().await {
                // The next change tries again: a full disk, or the node's end.
                tracing::warn!("announce what is here: {err:#}");
            }
            let arriving = Arc::clone(&self.arriving);
            tokio::select! {
                () = tokio::time::sleep(LOOK_INTERVAL) => {}
                () = arriving.changed.notified() => self.seen = None,
            }
        }
    }

    /// Replaces the node's set if what is shared has changed.
    async fn look(&mut self) -> Result<()> {
        let changes = self.store.changes();
        if self.seen.replace(changes) == Some(changes) || self.mode == AnnounceMode::None {
            return Ok(());
        }
        let (store, mode) = (Arc::clone(&self.store), self.mode);
        let (names, arriving) = (Arc::clone(&self.names), self.arriving.digests.lock().clone());
        let (whole, arriving) = tokio::task::spawn_blocking(move || {
            // What strangers may not have when it is here is not told of before.
            let may = |digest: &Digest| Ok(FOR_STRANGERS.contains(&names.judge(digest, 0, true)?));
            let arriving = arriving.into_iter().filter_map(|digest| may(&digest).map(|may| may.then(|| Id(digest.file_key()))).transpose());
            Ok::<_, anyhow::Error>((wanted(&store, mode)?, arriving.collect::<Result<Vec<Id>>>()?))
        })
        .await??;
        let mut keys: Vec<(Id, bool)> = arriving.into_iter().filter(|key| !whole.contains(key)).map(|key| (key, true)).collect();
        keys.extend(whole.into_iter().map(|key| (key, false)));
        keys.truncate(ANNOUNCE_KEYS_MAX);
        if keys != self.told {
            let pv = Pv { key: self.dht.signing_key().verifying_key().to_bytes(), flags: self.flags, deltas: Vec::new() };
            let part = Pv { flags: self.flags | FLAG_PARTIAL, ..pv.clone() };
            let pv = |is_part: bool| Some(if is_part { part.clone() } else { pv.clone() });
            let announces = keys.iter().map(|(key, is_part)| AnnounceKey { key: *key, pv: pv(*is_part) }).collect();
            self.dht.set_announces(announces).await?;
            tracing::debug!(keys = keys.len(), "announcing");
            self.told = keys;
        }
        Ok(())
    }
}

fn mode(announce: Announce) -> AnnounceMode {
    match announce {
        Announce::Large => AnnounceMode::Large,
        Announce::All => AnnounceMode::All,
        Announce::Pieces => AnnounceMode::Pieces,
        Announce::None => AnnounceMode::None,
    }
}

/// The keys to announce, the most worthy first.
fn wanted(store: &Store, mode: AnnounceMode) -> Result<Vec<Id>> {
    let shared = match mode {
        AnnounceMode::None => Vec::new(),
        AnnounceMode::All => store.shared_as(&FOR_STRANGERS)?,
        AnnounceMode::Large | AnnounceMode::Pieces => store.shared_as(&[Sharing::Announced])?,
    };
    let offers: Vec<Offer> = shared.iter().map(offer).collect();
    Ok(select(&offers, mode, ANNOUNCE_KEYS_MAX))
}

fn offer(shared: &Shared) -> Offer {
    Offer {
        key: Id(shared.digest.file_key()),
        bytes: shared.size,
        arrived_s: u64::try_from(shared.since).unwrap_or(0),
        has_delta: false,
        pieces: Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;
    use poolfs_core::Role;
    use poolfs_core::digest::Sums;
    use poolfs_core::store::{Provenance, Stamp};

    /// A private file in the DHT, or a small one for each of which others are asked in vain, is what the classes are for.
    #[test]
    fn what_is_shared_is_what_is_announced() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let record = |name: &str, len: usize, sharing: Sharing| {
            let sums = Sums::of(&vec![name.as_bytes()[0]; len]);
            let stamp = Stamp { size: sums.size, mtime_ns: 0, inode: 1 };
            store.record(Role::Archives, name.as_bytes(), stamp, &sums, sharing, Provenance::Mirror).unwrap();
            Id(sums.digest.file_key())
        };
        let large = record("large", 600 << 10, Sharing::Announced);
        let larger = record("Larger", 700 << 10, Sharing::Announced);
        let small = record("small", 100, Sharing::Available);
        record("private", 600 << 10, Sharing::LocalOnly);
        record("withheld", 600 << 10, Sharing::Withheld);
        assert_eq!(wanted(&store, AnnounceMode::Large).unwrap(), [larger, large]);
        assert_eq!(wanted(&store, AnnounceMode::All).unwrap(), [larger, large, small]);
        assert_eq!(wanted(&store, AnnounceMode::None).unwrap(), []);
        store.removed(Role::Archives, b"Larger").unwrap();
        assert_eq!(wanted(&store, AnnounceMode::Large).unwrap(), [large]);
    }
}
