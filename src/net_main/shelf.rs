//! What this machine has to give, and what is true of it, asked of the process of the mounts.

use crate::wire::{FINDS_MAX, FromNet, Memory, Outlet, read_sums, seal};
use parking_lot::Mutex;
use poolfs_core::{Digest, Sums};
use poolfs_net::peer::{Audience, DeltaClaim, Shelf, Shelved};
use poolfs_net::reputation::{Truth, shelf_truth};
use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

/// How long a question waits for its answer: longer than the server waits for this.
const FIND_PATIENCE: Duration = Duration::from_secs(20);

/// Bytes of a file's sums: those of some 40 GB.
const SUMS_BYTES_MAX: u64 = 24 << 20;

/// Sums kept: a file is asked for piece by piece, and a large one's are long.
const SUMS_KEPT_MAX: usize = 16;

/// See the module.
#[derive(Debug)]
pub(super) struct WireShelf {
    outlet: Outlet,
    runtime: Handle,
    asked: Mutex<Asked>,
    room: Arc<Semaphore>,
    /// Deltas to be tried, and whose turn it is.
    tries: Mutex<HashMap<u64, oneshot::Sender<Option<bool>>>>,
    try_turn: Semaphore,
    /// Latest used last. Sums belong to a content, so they never grow old.
    sums: Mutex<VecDeque<Arc<Sums>>>,
}

#[derive(Debug, Default)]
struct Asked {
    ids: u64,
    /// With the place of each, which is free when its answer has come, however late.
    waiting: HashMap<u64, (oneshot::Sender<Found>, OwnedSemaphorePermit)>,
}

#[derive(Debug)]
struct Found {
    size: Option<u64>,
    fds: Vec<OwnedFd>,
}

impl WireShelf {
    /// Asks by `outlet`. Needs a runtime around it.
    pub(super) fn new(outlet: Outlet) -> Self {
        let room = Arc::new(Semaphore::new(FINDS_MAX));
        Self {
            outlet,
            runtime: Handle::current(),
            asked: Mutex::default(),
            room,
            tries: Mutex::default(),
            try_turn: Semaphore::new(1),
            sums: Mutex::default(),
        }
    }

    /// Takes an answer.
    pub(super) fn found(&self, id: u64, size: Option<u64>, fds: Vec<OwnedFd>) -> io::Result<()> {
        let waiting = self.asked.lock().waiting.remove(&id);
        let (told, _place) = waiting.ok_or_else(|| io::Error::other("the daemon answers what was not asked"))?;
        // Who asked may wait no longer.
        let _ = told.send(Found { size, fds });
        Ok(())
    }

    /// Takes what came of a delta.
    pub(super) fn tried(&self, id: u64, makes: Option<bool>) -> io::Result<()> {
        let waiting = self.tries.lock().remove(&id);
        let told = waiting.ok_or_else(|| io::Error::other("the daemon tells of a delta that it was not given"))?;
        // Who asked may wait no longer.
        let _ = told.send(makes);
        Ok(())
    }

    fn try_delta(&self, old: Digest, new: Digest, delta: &[u8]) -> io::Result<Option<bool>> {
        let (told, answer) = oneshot::channel();
        let id = {
            let mut asked = self.asked.lock();
            asked.ids += 1;
            asked.ids
        };
        let memory = seal(delta)?;
        self.runtime.block_on(async {
            // Given back when the answer is here: another one before that would be taken for garbage.
            let _turn = self.try_turn.acquire().await.map_err(io::Error::other)?;
            self.tries.lock().insert(id, told);
            self.outlet.send(&FromNet::Try { id, old, new }, vec![memory]).await?;
            answer.await.map_err(io::Error::other)
        })
    }

    fn kept(&self, digest: &Digest) -> Option<Arc<Sums>> {
        let mut kept = self.sums.lock();
        let at = kept.iter().position(|sums| sums.digest == *digest)?;
        let sums = kept.remove(at)?;
        kept.push_back(Arc::clone(&sums));
        Some(sums)
    }

    fn keep(&self, sums: &Arc<Sums>) {
        let mut kept = self.sums.lock();
        kept.push_back(Arc::clone(sums));
        while kept.len() > SUMS_KEPT_MAX {
            kept.pop_front();
        }
    }

    fn ask(&self, digest: &Digest, to: Audience) -> io::Result<Option<Shelved>> {
        let kept = self.kept(digest);
        let place = Arc::clone(&self.room).try_acquire_owned().map_err(io::Error::other)?;
        let (told, answer) = oneshot::channel();
        let id = {
            let mut asked = self.asked.lock();
            asked.ids += 1;
            let id = asked.ids;
            asked.waiting.insert(id, (told, place));
            id
        };
        let question = FromNet::Find { id, digest: *digest, fleet: to == Audience::Fleet, sums: kept.is_none() };
        let found = self.runtime.block_on(async {
            self.outlet.send(&question, Vec::new()).await?;
            tokio::time::timeout(FIND_PATIENCE, answer).await.map_err(io::Error::other)?.map_err(io::Error::other)
        })?;
        let Some(size) = found.size else { return Ok(None) };
        let mut fds = found.fds.into_iter();
        let file = fds.next().ok_or_else(|| io::Error::other("no descriptor"))?;
        let sums = match (kept, fds.next()) {
            (Some(kept), _) => kept,
            (None, Some(memory)) => {
                let bytes = Memory::check(memory, SUMS_BYTES_MAX).map_err(io::Error::other)?.read()?;
                let sums = Arc::new(read_sums(*digest, size, &bytes)?);
                self.keep(&sums);
                sums
            }
            (None, None) => return Err(io::Error::other("no sums")),
        };
        Ok(Some(Shelved { file, sums }))
    }
}

impl Shelf for WireShelf {
    fn find(&self, digest: &Digest, to: Audience) -> Option<Shelved> {
        self.ask(digest, to).unwrap_or_else(|err| {
            tracing::debug!(%digest, "not given to a peer: {err}");
            None
        })
    }

    fn damaged(&self, digest: &Digest, block: u64) {
        if let Err(err) = self.outlet.try_send(&FromNet::Damaged { digest: *digest, block }, Vec::new()) {
            tracing::debug!(%digest, block, "damaged, and not told: {err}");
        }
    }
}

impl Truth for WireShelf {
    fn file(&self, digest: &Digest) -> Option<(u64, Vec<Digest>)> {
        shelf_truth(self, digest)
    }

    fn delta(&self, claim: &DeltaClaim, delta: &[u8]) -> Option<bool> {
        self.try_delta(claim.old, claim.new, delta).unwrap_or_else(|err| {
            tracing::debug!(delta = %claim.delta, "not tried: {err}");
            None
        })
    }
}
