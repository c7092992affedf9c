//! Tells the network process which files it is to announce: it asks the store, and hands over plain keys.
//!
//! One task. It looks whether the store has changed, asks it for what is shared, chooses by the configuration, and replaces the node's set
//! when that is another one than before, or the process is. The node itself announces what is new, refreshes the rest and withdraws what
//! fell away.

use crate::apt_names::AptNames;
use crate::config::Announce;
use crate::deltas::offers::Offered;
use crate::net_process::NetProcess;
use crate::wire::{Announced, Checked, ToNet};
use anyhow::Result;
use poolfs_core::Digest;
use poolfs_core::store::{Shared, Sharing, Store};
use poolfs_fs::names::Names;
use poolfs_net::dht::{ANNOUNCE_KEYS_MAX, AnnounceMode, Offer, select};
use poolfs_net::krpc::Id;
use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;

/// How often the store is asked whether it has changed; files that arrive together are announced together.
const LOOK_INTERVAL: Duration = Duration::from_secs(2);

/// The least time between two looks.
const LOOK_PAUSE: Duration = Duration::from_millis(100);

/// Files that are arriving and are announced as parts; more are not told of.
const ARRIVING_MAX: usize = 64;

/// What is told to strangers.
const FOR_STRANGERS: [Sharing; 2] = [Sharing::Announced, Sharing::Available];

/// See the module.
#[derive(Debug)]
pub struct Announcer {
    store: Arc<Store>,
    process: NetProcess,
    /// Judges what is arriving: it has no record yet.
    names: Arc<AptNames>,
    mode: AnnounceMode,
    /// [`Store::changes`] at the last look.
    seen: Option<u64>,
    arriving: watch::Receiver<Vec<Digest>>,
    checked: watch::Receiver<Vec<Checked>>,
    /// The deltas that are offered: their files are worth announcing.
    offered: watch::Receiver<Vec<Offered>>,
    /// Which process was told.
    number: u64,
    /// What it was told.
    told: Option<Vec<Announced>>,
}

impl Announcer {
    /// Announces by `process` what `announce` says of `store`, and what is arriving there.
    pub fn new(store: Arc<Store>, process: NetProcess, names: Arc<AptNames>, announce: Announce) -> Self {
        let (arriving, checked, offered) = (process.arriving(), process.checked(), process.offered());
        Self { store, process, names, mode: mode(announce), seen: None, arriving, checked, offered, number: 0, told: None }
    }

    /// Goes on for ever.
    pub async fn run(mut self) {
        loop {
            if let Err(err) = self.look().await {
                // The next change tries again: a full disk, or the end of the process.
                tracing::warn!("announce what is here: {err:#}");
            }
            // However often it is told of something else that arrives.
            tokio::time::sleep(LOOK_PAUSE).await;
            let process = self.process.clone();
            tokio::select! {
                () = tokio::time::sleep(LOOK_INTERVAL) => {}
                Ok(()) = self.arriving.changed() => self.seen = None,
                Ok(()) = self.offered.changed() => self.seen = None,
                _ = process.next_link(self.number) => {}
            }
        }
    }

    /// Replaces the node's set if what is shared has changed.
    async fn look(&mut self) -> Result<()> {
        let Some(link) = self.process.link() else { return Ok(()) };
        if self.number != link.number {
            (self.number, self.seen, self.told) = (link.number, None, None);
        }
        // Pieces wait for the next look: one is not worth an announce of its own, and only one mode tells of them.
        if self.mode == AnnounceMode::Pieces && self.checked.has_changed().unwrap_or(false) {
            self.seen = None;
        }
        let changes = self.store.changes();
        if self.seen.replace(changes) == Some(changes) || self.mode == AnnounceMode::None {
            return Ok(());
        }
        let (store, mode, with_delta) = (Arc::clone(&self.store), self.mode, with_delta(&self.offered.borrow_and_update()));
        let names = Arc::clone(&self.names);
        let arriving: Vec<Digest> = self.arriving.borrow_and_update().iter().take(ARRIVING_MAX).copied().collect();
        let checked = self.checked.borrow_and_update().clone();
        let (whole, arriving) = tokio::task::spawn_blocking(move || {
            // What strangers may not have when it is here is not told of before.
            let may = |digest: &Digest| Ok::<_, anyhow::Error>(FOR_STRANGERS.contains(&names.judge(digest, 0, true)?));
            let mut arriving_public = Vec::new();
            for digest in arriving {
                if may(&digest)? {
                    arriving_public.push(digest);
                }
            }
            Ok::<_, anyhow::Error>((wanted(&store, mode, &with_delta)?, arriving_public))
        })
        .await??;
        let keys = keys(&whole, &arriving, &checked, mode);
        // One that is gone has a successor, which is told everything.
        if self.told.as_ref() != Some(&keys) && link.tell(&ToNet::Announce(keys.clone())).await.is_ok() {
            self.told = Some(keys);
        }
        Ok(())
    }
}

/// Everything to announce: parts first, whole files, and pieces of parts where these leave a place.
fn keys(whole: &[Id], arriving: &[Digest], checked: &[Checked], mode: AnnounceMode) -> Vec<Announced> {
    let is_part = |digest: &&Digest| !whole.contains(&Id(digest.file_key()));
    let parts: Vec<&Digest> = arriving.iter().filter(is_part).collect();
    let mut keys: Vec<Announced> = parts.iter().map(|digest| Announced { key: digest.file_key(), part: true }).collect();
    keys.extend(whole.iter().map(|key| Announced { key: key.0, part: false }));
    if mode == AnnounceMode::Pieces {
        let pieces = checked.iter().filter(|checked| parts.contains(&&checked.file)).flat_map(|checked| &checked.pieces);
        keys.extend(pieces.map(|piece| Announced { key: piece.piece_key(), part: true }));
    }
    keys.truncate(ANNOUNCE_KEYS_MAX);
    keys
}

fn mode(announce: Announce) -> AnnounceMode {
    match announce {
        Announce::Large => AnnounceMode::Large,
        Announce::All => AnnounceMode::All,
        Announce::Pieces => AnnounceMode::Pieces,
        Announce::None => AnnounceMode::None,
    }
}

/// The files of which strangers may hear that there is a delta.
fn with_delta(offered: &[Offered]) -> HashSet<Digest> {
    offered.iter().filter(|delta| delta.to_strangers).map(|delta| delta.new).collect()
}

/// The keys to announce, the most worthy first.
fn wanted(store: &Store, mode: AnnounceMode, with_delta: &HashSet<Digest>) -> Result<Vec<Id>> {
    let mut shared = match mode {
        AnnounceMode::None => Vec::new(),
        AnnounceMode::All => store.shared_as(&FOR_STRANGERS)?,
        AnnounceMode::Large | AnnounceMode::Pieces => store.shared_as(&[Sharing::Announced])?,
    };
    if matches!(mode, AnnounceMode::Large | AnnounceMode::Pieces) && !with_delta.is_empty() {
        let available = store.shared_as(&[Sharing::Available])?;
        shared.extend(available.into_iter().filter(|shared| with_delta.contains(&shared.digest)));
    }
    let offers: Vec<Offer> = shared.iter().map(|shared| offer(shared, with_delta.contains(&shared.digest))).collect();
    Ok(select(&offers, mode, ANNOUNCE_KEYS_MAX))
}

fn offer(shared: &Shared, has_delta: bool) -> Offer {
    Offer {
        key: Id(shared.digest.file_key()),
        bytes: shared.size,
        arrived_s: u64::try_from(shared.since).unwrap_or(0),
        has_delta,
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
        let none = HashSet::new();
        assert_eq!(wanted(&store, AnnounceMode::Large, &none).unwrap(), [larger, large]);
        assert_eq!(wanted(&store, AnnounceMode::All, &none).unwrap(), [larger, large, small]);
        assert_eq!(wanted(&store, AnnounceMode::None, &none).unwrap(), []);
        // A small file with a delta is worth a key; what is kept back is none with one either.
        let deltas = [b's', b'w'].map(|byte| Sums::of(&vec![byte; if byte == b's' { 100 } else { 600 << 10 }]).digest).into();
        assert_eq!(wanted(&store, AnnounceMode::Large, &deltas).unwrap(), [larger, large, small]);
        assert_eq!(wanted(&store, AnnounceMode::None, &deltas).unwrap(), []);
        store.removed(Role::Archives, b"Larger").unwrap();
        assert_eq!(wanted(&store, AnnounceMode::Large, &none).unwrap(), [large]);
    }

    /// Pieces are told of in their own mode only, of files that are told of as parts, and never instead of a file.
    #[test]
    fn pieces_come_last() {
        let (part, whole) = (Digest::of(b"part"), Digest::of(b"whole"));
        let piece = |n: u32| Digest::of(&n.to_be_bytes());
        let of = |file: Digest, pieces: std::ops::Range<u32>| Checked { file, pieces: pieces.map(piece).collect() };
        // The second has just become whole, the third is not for strangers.
        let checked = [of(part, 0..2), of(whole, 2..4), of(Digest::of(b"private"), 4..6)];
        let told = |mode, whole: &[Id]| -> Vec<([u8; 20], bool)> {
            keys(whole, &[part, Digest::of(b"whole")], &checked, mode).iter().map(|told| (told.key, told.part)).collect()
        };
        let whole = [Id(whole.file_key())];
        let files = vec![(part.file_key(), true), (whole[0].0, false)];
        assert_eq!(told(AnnounceMode::Large, &whole), files);
        let pieces = [0, 1].map(|n| (piece(n).piece_key(), true));
        assert_eq!(told(AnnounceMode::Pieces, &whole), [&files[..], &pieces].concat());
        let many: Vec<Id> = (0u32..).take(ANNOUNCE_KEYS_MAX).map(|n| Id(piece(n).file_key())).collect();
        assert!(told(AnnounceMode::Pieces, &many).iter().all(|(key, _)| !pieces.iter().any(|(piece, _)| piece == key)));
    }
}
