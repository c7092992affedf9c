//! One run of apt in the archives as their mount sees it: from apt's lock to its release.

use crate::update::Origin;
use poolfs_core::Digest;
use poolfs_core::store::Provenance;
use serde::{Deserialize, Serialize};
use std::collections::HashSet;
use std::time::{Duration, Instant, SystemTime};

/// Packages that apt wrote itself, told apart in one install.
const WRITTEN_MAX: usize = 4096;

/// What an install took, and from where its packages came.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Install {
    /// When apt took its lock.
    pub started: SystemTime,
    /// Until it gave it back, with dpkg's work in between, or until now.
    pub took: Duration,
    /// Whether apt still holds its lock.
    pub running: bool,
    /// Packages that poolfs had for apt.
    pub packages: u64,
    /// Their bytes that came from mirrors.
    pub mirror_bytes: u64,
    /// From peers.
    pub peer_bytes: u64,
    /// Rebuilt from older versions.
    pub delta_bytes: u64,
    /// Kept here from before.
    pub kept_bytes: u64,
    /// Fetched by apt itself, since nobody could deliver them through poolfs.
    pub apt_bytes: u64,
}

/// The install that runs, and the last one.
#[derive(Debug, Default)]
pub(crate) struct Installs {
    running: Option<(Instant, Install)>,
    last: Option<Install>,
    /// Counted already: each copy of a descriptor is closed by itself.
    written: HashSet<Digest>,
}

impl Install {
    fn is_empty(&self) -> bool {
        self.packages == 0 && self.apt_bytes == 0
    }
}

impl Installs {
    /// apt has its lock. Another apt that opens the file in vain begins nothing.
    pub(crate) fn begin(&mut self, now: Instant, started: SystemTime) {
        let begun = Install {
            started,
            took: Duration::ZERO,
            running: true,
            packages: 0,
            mirror_bytes: 0,
            peer_bytes: 0,
            delta_bytes: 0,
            kept_bytes: 0,
            apt_bytes: 0,
        };
        if self.running.is_none() {
            self.running = Some((now, begun));
            self.written.clear();
        }
    }

    /// apt has given its lock back. A run that fetched nothing is none to tell of.
    pub(crate) fn end(&mut self, now: Instant) {
        if let Some((since, install)) = self.running.take().filter(|(_, install)| !install.is_empty()) {
            self.last = Some(Install { took: now.duration_since(since), running: false, ..install });
        }
    }

    /// The install that runs, if it has fetched something, else the last one.
    pub(crate) fn shown(&self, now: Instant) -> Option<Install> {
        let running = self.running.as_ref().filter(|(_, install)| !install.is_empty());
        running.map(|(since, install)| Install { took: now.duration_since(*since), ..install.clone() }).or_else(|| self.last.clone())
    }

    /// apt has a package of `size` bytes from poolfs.
    pub(crate) fn took(&mut self, size: u64, origin: Origin) {
        let Some((_, install)) = &mut self.running else { return };
        let bytes = match origin {
            Origin::Kept => &mut install.kept_bytes,
            Origin::Fetched(Provenance::Mirror | Provenance::WrittenHere) => &mut install.mirror_bytes,
            Origin::Fetched(Provenance::Peer) => &mut install.peer_bytes,
            Origin::Fetched(Provenance::Delta) => &mut install.delta_bytes,
        };
        *bytes = bytes.saturating_add(size);
        install.packages += 1;
    }

    /// apt wrote a package of `size` bytes that it had fetched itself.
    pub(crate) fn apt_fetched(&mut self, digest: Digest, size: u64) {
        if let Some((_, install)) = &mut self.running
            && self.written.len() < WRITTEN_MAX
            && self.written.insert(digest)
        {
            install.apt_bytes = install.apt_bytes.saturating_add(size);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    /// Wrong figures on the status page, or those of an apt that only looked in place of the last install's.
    #[test]
    fn an_install_is_counted() {
        let (now, started) = (Instant::now(), SystemTime::UNIX_EPOCH);
        let mut installs = Installs::default();
        installs.took(5, Origin::Kept);
        installs.begin(now, started);
        assert_eq!(installs.shown(now), None, "nothing was fetched yet, or before apt had its lock");
        installs.took(5, Origin::Kept);
        installs.took(70, Origin::Fetched(Provenance::Peer));
        installs.took(600, Origin::Fetched(Provenance::Mirror));
        installs.begin(now + Duration::from_secs(1), started + Duration::from_secs(1));
        installs.apt_fetched(Digest([4; 32]), 9);
        installs.apt_fetched(Digest([4; 32]), 9);
        let shown = installs.shown(now + Duration::from_secs(2)).unwrap();
        assert!(shown.running && shown.took == Duration::from_secs(2), "{shown:?}");
        installs.end(now + Duration::from_secs(3));
        let want = Install {
            started,
            took: Duration::from_secs(3),
            running: false,
            packages: 3,
            mirror_bytes: 600,
            peer_bytes: 70,
            delta_bytes: 0,
            kept_bytes: 5,
            apt_bytes: 9,
        };
        assert_eq!(installs.shown(now), Some(want.clone()));
        installs.begin(now, started);
        installs.end(now);
        assert_eq!(installs.shown(now), Some(want), "a run that fetched nothing");
    }
}
