//! Lists grow old by themselves, and credentials appear without an update: looked at once a minute.

use crate::clock;
use poolfs_core::catalog::{Catalog, Vanished};
use poolfs_core::discretion::Rule;
use poolfs_core::store::Store;
use poolfs_fs::refresh::Refresher;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

/// How long something may be shared by lists that have just become too old.
const LOOK_INTERVAL: Duration = Duration::from_secs(60);

/// Files of credentials that are looked at; more than that are seen at the next update.
const CREDENTIALS_MAX: usize = 1024;

/// See the module.
#[derive(Debug)]
pub struct ListsAge {
    /// What is judged by.
    pub catalog: Arc<Catalog>,
    /// What is judged.
    pub store: Arc<Store>,
    /// Who judges.
    pub refresher: Arc<Refresher>,
}

/// What would change a verdict.
#[derive(Debug, PartialEq, Eq)]
struct Seen {
    fresh: Vec<(String, Option<Rule>)>,
    credentials: Vec<(PathBuf, Option<SystemTime>)>,
    /// [`Store::changes`]
    changes: u64,
}

impl ListsAge {
    /// Goes on for ever.
    pub async fn run(self) {
        let this = Arc::new(self);
        let mut judged = this.refresher.judged();
        // The sender lives in `this`.
        let _ = judged.wait_for(|judged| *judged).await;
        let mut seen: Option<Seen> = None;
        loop {
            let looking = Arc::clone(&this);
            match tokio::task::spawn_blocking(move || looking.look(seen)).await {
                Ok(now) => seen = now,
                Err(err) => {
                    tracing::error!("what is here is judged no more when its lists grow old: {err}");
                    return;
                }
            }
            tokio::time::sleep(LOOK_INTERVAL).await;
        }
    }

    fn look(&self, before: Option<Seen>) -> Option<Seen> {
        let mut now = self.see();
        if let (Some(before), Some(now)) = (&before, &mut now) {
            if before.credentials != now.credentials {
                tracing::info!("apt's credentials have changed");
                self.refresher.request(Vanished::Drop);
            } else if before != now {
                self.refresher.judge();
                // What the judging itself wrote is no reason for another.
                now.changes = self.store.changes();
            }
        }
        now
    }

    fn see(&self) -> Option<Seen> {
        let fresh = match self.catalog.standing() {
            Ok(standing) => standing.fresh(clock::now()),
            Err(err) => {
                tracing::warn!("how old the lists are cannot be told: {err}");
                return None;
            }
        };
        let changed = |path: PathBuf| {
            let changed = path.metadata().and_then(|found| found.modified()).ok();
            (path, changed)
        };
        let credentials = self.catalog.credential_files(CREDENTIALS_MAX).into_iter().map(changed).collect();
        Some(Seen { fresh, credentials, changes: self.store.changes() })
    }
}
