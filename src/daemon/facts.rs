//! What the daemon tells of itself: the facts for the page and the metrics, their history, and the beat of its mounts.

use super::Daemon;
use crate::clock;
use crate::facts::{Answered, Facts, PEERS_MAX, Standing, Totals, WITHHELD_MAX, Withheld, Witness};
use crate::supervise::{Report, beat_interval};
use crate::wire::NetStatus;
use anyhow::{Context as _, Result};
use parking_lot::Mutex;
use poolfs_core::store::KeptBack;
use poolfs_fs::mount::answers;
use poolfs_net::swarm::driver::PeerRow;
use std::collections::HashMap;
use std::future::Future;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::time::MissedTickBehavior;

/// How often what came and went is written down.
const HISTORY_INTERVAL: Duration = Duration::from_secs(10);

/// The last answers of the mounts.
#[derive(Debug, Default)]
pub(super) struct Pulse {
    mounts: Mutex<HashMap<PathBuf, Beat>>,
}

#[derive(Debug)]
struct Beat {
    /// Of which mount: another may be at the path by now.
    device: String,
    answered: Instant,
    took: Duration,
    /// Whether it is being asked: a mount that hangs holds one thread, not one for each question.
    asking: bool,
}

impl Pulse {
    /// Those to be asked now, which are marked so; what is not mounted any more is forgotten.
    fn due(&self, mounted: &[(PathBuf, String)], now: Instant) -> Vec<(PathBuf, String)> {
        let mut known = self.mounts.lock();
        known.retain(|path, beat| mounted.iter().any(|(other, device)| other == path && *device == beat.device));
        let mut due = Vec::new();
        for (path, device) in mounted {
            // A new one has just answered the kernel's hello.
            let new = || Beat { device: device.clone(), answered: now, took: Duration::ZERO, asking: false };
            let beat = known.entry(path.clone()).or_insert_with(new);
            if !beat.asking {
                beat.asking = true;
                due.push((path.clone(), device.clone()));
            }
        }
        due
    }

    fn done(&self, path: &PathBuf, device: &str, asked: Instant, answered: Option<Instant>) {
        if let Some(beat) = self.mounts.lock().get_mut(path).filter(|beat| beat.device == device) {
            beat.asking = false;
            if let Some(answered) = answered {
                beat.answered = answered;
                beat.took = answered.duration_since(asked);
            }
        }
    }

    /// Whether every mount has answered within `age_max`.
    fn is_even(&self, now: Instant, age_max: Duration) -> bool {
        self.mounts.lock().values().all(|beat| now.saturating_duration_since(beat.answered) <= age_max)
    }

    fn shown(&self, now: Instant) -> Vec<Answered> {
        let ms = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        let us = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        let known = self.mounts.lock();
        let mut shown: Vec<_> = known
            .iter()
            .map(|(path, beat)| Answered {
                path: path.clone(),
                age_ms: ms(now.saturating_duration_since(beat.answered)),
                took_us: us(beat.took),
            })
            .collect();
        shown.sort_by(|a, b| a.path.cmp(&b.path));
        shown
    }
}

impl Daemon {
    /// Asks the mounts whether they answer, again and again; while they do, the supervising process is told so. Goes on for ever.
    pub(super) async fn attend(self: Arc<Self>) {
        let interval = beat_interval();
        let mut tick = tokio::time::interval(interval);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tick.tick().await;
            let now = Instant::now();
            // Held by who unmounts, who may take his time; the next round will do.
            let Some(mounted) = self.mounts.try_lock().map(|mounts| mounts.devices()) else { continue };
            for (path, device) in self.pulse.due(&mounted, now) {
                let daemon = Arc::clone(&self);
                tokio::task::spawn_blocking(move || {
                    let asked = Instant::now();
                    let answered = match answers(&path, &device) {
                        Ok(_) => Some(Instant::now()),
                        Err(err) => {
                            tracing::warn!("{} does not answer: {err}", path.display());
                            None
                        }
                    };
                    daemon.pulse.done(&path, &device, asked, answered);
                });
            }
            // An answer of the last round counts, and one that is a round late.
            if self.pulse.is_even(now, 2 * interval) {
                Report::Beat.send();
            }
        }
    }

    /// Remembers how much came and went. Goes on for ever.
    pub(super) async fn keep_history(self: Arc<Self>) {
        loop {
            let given = self.process.status().await.uploaded.bytes;
            self.record_history(given);
            tokio::time::sleep(HISTORY_INTERVAL).await;
        }
    }

    fn record_history(&self, given: u64) {
        let bytes = self.received();
        let totals = Totals { mirror: bytes.mirror, peer: bytes.peer, delta: bytes.delta, given };
        self.recorder.lock().record(Instant::now(), totals);
    }

    /// The facts of now. Blocks on the database.
    fn gather(&self, net: NetStatus, peers: Vec<PeerRow>) -> Result<Facts> {
        self.record_history(net.uploaded.bytes);
        let status = self.status(net)?;
        let at = u64::try_from(clock::now()).unwrap_or_default();
        let (hour, day) = {
            let recorder = self.recorder.lock();
            (recorder.hour(), recorder.day())
        };
        let row =
            |KeptBack { role, path, size, rule }| Withheld { role, name: String::from_utf8_lossy(&path).into_owned(), bytes: size, rule };
        let facts = Facts {
            host: rustix::system::uname().nodename().to_string_lossy().into_owned(),
            at,
            status,
            answers: self.pulse.shown(Instant::now()),
            judged: *self.mounts.lock().refresher().judged().borrow(),
            hour,
            day,
            standing: Standing::of(&peers, at),
            peers: peers.into_iter().take(PEERS_MAX).collect(),
            withheld: self.store.withheld(u32::try_from(WITHHELD_MAX).unwrap_or(u32::MAX))?.into_iter().map(row).collect(),
        };
        Ok(facts.without_secrets())
    }
}

impl Witness for Daemon {
    fn facts(self: Arc<Self>) -> Pin<Box<dyn Future<Output = Result<Facts>> + Send>> {
        Box::pin(async move {
            let net = self.process.status().await;
            // Without the process there are no peers, and the status says why.
            let peers = self.process.peers().await.unwrap_or_default();
            tokio::task::spawn_blocking(move || self.gather(net, peers)).await.context("gather the facts")?
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A beat although a mount hangs, or none although all is well, and a thread for every question to one that hangs.
    #[test]
    fn a_mount_that_hangs_is_noticed() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let pulse = Pulse::default();
        let mounted: Vec<_> = [("/a", "0:1"), ("/b", "0:2")].map(|(path, device)| (PathBuf::from(path), device.to_owned())).into();
        assert_eq!(pulse.due(&mounted, at(0)), mounted);
        pulse.done(&"/a".into(), "0:1", at(0), Some(at(1)));
        assert_eq!(pulse.due(&mounted, at(10)), mounted[..1], "/b is still being asked");
        pulse.done(&"/a".into(), "0:1", at(10), Some(at(11)));
        let even = |seconds| pulse.is_even(at(seconds), Duration::from_secs(20));
        assert!(even(20) && !even(21));
        assert_eq!(
            pulse.shown(at(21)),
            [("/a", 10_000), ("/b", 21_000)].map(|(path, age_ms)| Answered {
                path: path.into(),
                age_ms,
                took_us: if path == "/a" { 1_000_000 } else { 0 }
            })
        );
        pulse.done(&"/b".into(), "0:2", at(0), Some(at(22)));
        assert!(even(25));
        // One that failed has not answered, and is asked again.
        assert_eq!(pulse.due(&mounted, at(30)), mounted);
        pulse.done(&"/b".into(), "0:2", at(30), None);
        assert!(!even(50));
        // Unmounted, or another one in its place: a late answer of the old one is none of the new one.
        let other: Vec<_> = vec![(PathBuf::from("/b"), "0:3".to_owned())];
        assert_eq!(pulse.due(&other, at(60)), other);
        pulse.done(&"/b".into(), "0:2", at(30), Some(at(90)));
        assert!(!even(90) && pulse.due(&other, at(90)).is_empty());
    }
}
