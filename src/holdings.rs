//! Tells the fleet which files are here: all that its members may have, and what came and went since.
//!
//! One task. When the store has changed it asks it for what members may have, and hands the difference over to the network
//! process; to another process everything.

use crate::net_process::NetProcess;
use crate::wire::{Arrived, DIGESTS_MAX, ToNet};
use anyhow::Result;
use poolfs_core::Digest;
use poolfs_core::store::{Sharing, Store};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;

/// The least time between two looks: what arrives meanwhile is told of together.
const LOOK_PAUSE: Duration = Duration::from_millis(250);

/// What members may have: also what is kept back from strangers.
const FOR_MEMBERS: [Sharing; 3] = [Sharing::Announced, Sharing::Available, Sharing::Withheld];

/// See the module.
#[derive(Debug)]
pub struct Holdings {
    store: Arc<Store>,
    process: NetProcess,
    /// [`Store::changes`] at the last look.
    seen: Option<u64>,
    /// Which process was told.
    number: u64,
    told: HashMap<Digest, u64>,
    changed: watch::Receiver<()>,
}

impl Holdings {
    /// Tells the fleet of `process` of what `store` has.
    pub fn new(store: Arc<Store>, process: NetProcess) -> Self {
        let (change, changed) = watch::channel(());
        store.on_change(move || change.send_replace(()));
        Self { store, process, seen: None, number: 0, told: HashMap::new(), changed }
    }

    /// Goes on for ever.
    pub async fn run(mut self) {
        loop {
            if let Err(err) = self.look().await {
                // The next change tries again.
                tracing::warn!("tell the fleet what is here: {err:#}");
            }
            tokio::time::sleep(LOOK_PAUSE).await;
            let process = self.process.clone();
            tokio::select! {
                Ok(()) = self.changed.changed() => {}
                _ = process.next_link(self.number) => {}
            }
        }
    }

    async fn look(&mut self) -> Result<()> {
        let Some(link) = self.process.link() else { return Ok(()) };
        if self.number != link.number {
            (self.number, self.seen) = (link.number, None);
            self.told.clear();
        }
        let changes = self.store.changes();
        if self.seen.replace(changes) == Some(changes) {
            return Ok(());
        }
        let store = Arc::clone(&self.store);
        let here = tokio::task::spawn_blocking(move || here(&store)).await??;
        let gone: Vec<Digest> = self.told.keys().filter(|digest| !here.contains_key(digest)).copied().collect();
        let new = here.iter().filter(|(digest, _)| !self.told.contains_key(digest));
        let new: Vec<Arrived> = new.map(|(digest, size)| Arrived { digest: *digest, size: *size }).collect();
        let gone = gone.chunks(DIGESTS_MAX).map(|gone| ToNet::Holdings { new: Vec::new(), gone: gone.to_vec() });
        let new = new.chunks(DIGESTS_MAX).map(|new| ToNet::Holdings { new: new.to_vec(), gone: Vec::new() });
        for message in gone.chain(new) {
            // One that is gone has a successor, which is told everything.
            if link.tell(&message).await.is_err() {
                return Ok(());
            }
        }
        self.told = here;
        Ok(())
    }
}

fn here(store: &Store) -> Result<HashMap<Digest, u64>> {
    Ok(store.shared_as(&FOR_MEMBERS)?.into_iter().map(|shared| (shared.digest, shared.size)).collect())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;
    use poolfs_core::Role;
    use poolfs_core::digest::Sums;
    use poolfs_core::store::{Provenance, Stamp};

    /// A private file that members are told of would be asked for, and its very name tells what this machine runs.
    #[test]
    fn members_are_told_of_what_they_may_have() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let record = |name: &str, sharing: Sharing| {
            let sums = Sums::of(name.as_bytes());
            let stamp = Stamp { size: sums.size, mtime_ns: 0, inode: 1 };
            store.record(Role::Archives, name.as_bytes(), stamp, &sums, sharing, Provenance::Mirror).unwrap();
            (sums.digest, sums.size)
        };
        let want = [Sharing::Announced, Sharing::Available, Sharing::Withheld].map(|sharing| record(&format!("{sharing}"), sharing));
        record("private", Sharing::LocalOnly);
        assert_eq!(here(&store).unwrap(), want.into());
    }
}
