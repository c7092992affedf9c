//! One run of `apt-get update` as the lists' mount sees it: from apt's lock to its release.

use crate::fetch::Fetching;
use poolfs_core::Digest;
use poolfs_core::store::Provenance;
use serde::{Deserialize, Serialize};
use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant, SystemTime};

/// Indexes fetched ahead in one update.
const AHEAD_MAX: usize = 512;

/// Files that apt wrote itself, told apart in one update.
const WRITTEN_MAX: usize = 4096;

/// What an update took, and from where.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Update {
    /// When apt took its lock.
    pub started: SystemTime,
    /// Until it gave it back, or until now.
    pub took: Duration,
    /// Whether apt still holds its lock.
    pub running: bool,
    /// Bytes of indexes and patches that came from mirrors.
    pub mirror_bytes: u64,
    /// From peers.
    pub peer_bytes: u64,
    /// Rebuilt from older versions.
    pub delta_bytes: u64,
    /// Kept here from before.
    pub kept_bytes: u64,
    /// Fetched by apt itself: the signed Release files, and what poolfs did not have for it.
    pub apt_bytes: u64,
    /// Indexes that poolfs had for apt, pdiff Indexes among them.
    pub indexes: u64,
    /// Patches of lists that poolfs had for apt.
    pub patches: u64,
}

/// The update that runs, and the last one.
#[derive(Debug, Default)]
pub(crate) struct Updates {
    running: Option<(Instant, Update)>,
    last: Option<Update>,
    /// What apt is expected to ask for. Dropping one ends a download that nobody waits for.
    ahead: HashMap<Digest, Fetching>,
    written: HashSet<Digest>,
    /// What was had or fetched ahead in this update.
    had: HashSet<Digest>,
    /// Lists that apt has removed in this update, without the ending of their form.
    removed: HashSet<Vec<u8>>,
}

/// Where a file came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Origin {
    /// It was downloaded for this update.
    Fetched(Provenance),
    /// It was an object.
    Kept,
}

impl Updates {
    /// apt has its lock. Another apt that opens the file in vain begins nothing.
    pub(crate) fn begin(&mut self, now: Instant, started: SystemTime) {
        if self.running.is_some() {
            return;
        }
        let update = Update {
            started,
            took: Duration::ZERO,
            running: true,
            mirror_bytes: 0,
            peer_bytes: 0,
            delta_bytes: 0,
            kept_bytes: 0,
            apt_bytes: 0,
            indexes: 0,
            patches: 0,
        };
        self.running = Some((now, update));
        self.written.clear();
        self.had.clear();
        self.removed.clear();
    }

    /// apt has removed a list, which it does before it puts another in its place. What it then does not find is not asked for.
    pub(crate) fn removed(&mut self, stem: &[u8]) {
        if self.running.is_some() && self.removed.len() < WRITTEN_MAX {
            self.removed.insert(stem.to_vec());
        }
    }

    /// Whether apt has removed that list in this update.
    pub(crate) fn has_removed(&self, stem: &[u8]) -> bool {
        self.removed.contains(stem)
    }

    /// apt has given its lock back. A run that fetched nothing is none to tell of. The answer is what was fetched ahead and
    /// nobody asked for, to be dropped outside of the lock.
    pub(crate) fn end(&mut self, now: Instant) -> HashMap<Digest, Fetching> {
        if let Some((since, update)) = self.running.take()
            && (update.indexes > 0 || update.patches > 0 || update.apt_bytes > 0)
        {
            self.last = Some(Update { took: now.duration_since(since), running: false, ..update });
        }
        std::mem::take(&mut self.ahead)
    }

    /// The update that runs, if it has fetched something, else the last one.
    pub(crate) fn shown(&self, now: Instant) -> Option<Update> {
        let running = self.running.as_ref().filter(|(_, update)| update.indexes > 0 || update.patches > 0 || update.apt_bytes > 0);
        running.map(|(since, update)| Update { took: now.duration_since(*since), ..update.clone() }).or_else(|| self.last.clone())
    }

    /// Whether something may be fetched ahead, and was not in this update.
    pub(crate) fn wants(&self, digest: &Digest) -> bool {
        self.running.is_some() && self.had.len() < AHEAD_MAX && !self.had.contains(digest)
    }

    /// What it replaces, if anything, is to be dropped outside of the lock.
    pub(crate) fn fetch_ahead(&mut self, digest: Digest, fetching: Fetching) -> Option<Fetching> {
        self.had.insert(digest);
        self.ahead.insert(digest, fetching)
    }

    /// What is fetched ahead.
    pub(crate) fn ahead(&self) -> Vec<Digest> {
        self.ahead.keys().copied().collect()
    }

    /// Gives up what is fetched ahead and not wanted any more. The answer is to be dropped outside of the lock.
    pub(crate) fn unwanted(&mut self, digests: &[Digest]) -> Vec<Fetching> {
        digests.iter().filter_map(|digest| self.ahead.remove(digest)).collect()
    }

    /// apt has a file of `size` bytes from poolfs. The answer is to be dropped outside of the lock.
    pub(crate) fn took(&mut self, digest: &Digest, size: u64, is_patch: bool, origin: Origin) -> Option<Fetching> {
        if let Some((_, update)) = &mut self.running {
            let bytes = match origin {
                Origin::Kept => &mut update.kept_bytes,
                Origin::Fetched(Provenance::Mirror | Provenance::WrittenHere) => &mut update.mirror_bytes,
                Origin::Fetched(Provenance::Peer) => &mut update.peer_bytes,
                Origin::Fetched(Provenance::Delta) => &mut update.delta_bytes,
            };
            *bytes = bytes.saturating_add(size);
            let count = if is_patch { &mut update.patches } else { &mut update.indexes };
            *count += 1;
            self.had.insert(*digest);
        }
        self.ahead.remove(digest)
    }

    /// apt wrote a file of `size` bytes that it had fetched itself.
    pub(crate) fn apt_fetched(&mut self, digest: Digest, size: u64) {
        if let Some((_, update)) = &mut self.running
            && self.written.len() < WRITTEN_MAX
            && self.written.insert(digest)
        {
            update.apt_bytes = update.apt_bytes.saturating_add(size);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    /// Wrong figures in `status`, or those of an apt that only looked in place of the last update's.
    #[test]
    fn an_update_is_counted() {
        let (now, started) = (Instant::now(), SystemTime::UNIX_EPOCH);
        let mut updates = Updates::default();
        assert_eq!(updates.shown(now), None);
        let digest = |byte| Digest([byte; 32]);
        updates.took(&digest(1), 5, false, Origin::Kept);
        assert_eq!(updates.shown(now), None, "nobody has the lock");
        updates.begin(now, started);
        assert_eq!(updates.shown(now), None);
        updates.took(&digest(1), 5, false, Origin::Kept);
        updates.took(&digest(2), 70, false, Origin::Fetched(Provenance::Peer));
        updates.took(&digest(3), 600, true, Origin::Fetched(Provenance::Mirror));
        updates.apt_fetched(digest(4), 9);
        updates.apt_fetched(digest(4), 9);
        let shown = updates.shown(now + Duration::from_secs(2)).unwrap();
        assert!(shown.running && shown.took == Duration::from_secs(2));
        assert!(updates.end(now + Duration::from_secs(3)).is_empty());
        let want = Update {
            started,
            took: Duration::from_secs(3),
            running: false,
            mirror_bytes: 600,
            peer_bytes: 70,
            delta_bytes: 0,
            kept_bytes: 5,
            apt_bytes: 9,
            indexes: 2,
            patches: 1,
        };
        assert_eq!(updates.shown(now), Some(want.clone()));
        updates.begin(now, started);
        updates.end(now);
        assert_eq!(updates.shown(now), Some(want), "a run that fetched nothing");
    }
}
