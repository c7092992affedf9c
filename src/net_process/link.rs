//! One running network process, as the mounts' side sees it: what was asked of it and is not answered yet.

use crate::deltas::offers::{DeltaOffer, ITEM_DELTA_BYTES_MAX, OFFERS_MAX, TOLD_BYTES_MAX};
use crate::deltas::proving::Prover;
use crate::net_side::ARRIVING_MAX;
use crate::wire::{
    Answer, Checked, DIGESTS_MAX, Delivered, FINDS_MAX, FromNet, Memory, Outlet, Question, ToNet, WireError, is_giver, plain_text, seal,
    sums_bytes,
};
use parking_lot::Mutex;
use poolfs_core::Digest;
use poolfs_core::piece::{self, PIECE_BYTES};
use poolfs_fs::source::{DELIVERIES_WAITING_MAX, Delivery, SourceError, Want};
use poolfs_net::dht::PIECE_KEYS_PER_FILE_MAX;
use poolfs_net::peer::{Audience, CLAIM_BYTES, Shelf};
use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Semaphore, mpsc, oneshot};

/// How long a question of a command waits for its answer.
const ANSWER_PATIENCE: Duration = Duration::from_secs(5);

/// Questions that wait for their answers; more are refused.
const ASKED_MAX: usize = 64;

/// Blocks that were told to be damaged and are looked at; more are not looked at, the next reader of the file finds them.
const DAMAGED_MAX: usize = 4;

/// Until one of these places is free again after a look.
const DAMAGED_PAUSE: Duration = Duration::from_secs(1);

/// The process went away, or does not keep up.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the network process does not run")]
pub struct Gone;

impl From<io::Error> for Gone {
    fn from(err: io::Error) -> Self {
        tracing::debug!("to the network process: {err}");
        Self
    }
}

/// See the module.
#[derive(Debug)]
pub struct Link {
    outlet: Outlet,
    /// Counts the processes.
    pub number: u64,
    table: Mutex<Table>,
    finds: Arc<Semaphore>,
    tries: Arc<Semaphore>,
    damaged: Arc<Semaphore>,
}

/// Held for lookups only.
#[derive(Debug, Default)]
struct Table {
    ids: u64,
    wants: HashMap<u64, Wanted>,
    sought: HashMap<u64, mpsc::Sender<DeltaOffer>>,
    asked: HashMap<u64, oneshot::Sender<(Answer, Vec<OwnedFd>)>>,
    over: bool,
}

#[derive(Debug)]
struct Wanted {
    digest: Digest,
    size: u64,
    deliveries: mpsc::Sender<Delivery>,
}

/// A search for deltas under way; the other side is told when it is dropped.
#[derive(Debug)]
pub struct Seeking {
    id: u64,
    link: Arc<Link>,
    offers: mpsc::Receiver<DeltaOffer>,
}

/// A want under way; the other side is told when it is dropped.
#[derive(Debug)]
pub struct Wanting {
    id: u64,
    link: Arc<Link>,
    deliveries: mpsc::Receiver<Delivery>,
}

impl Link {
    /// What is behind `outlet`, the `number`th of its kind.
    pub fn new(outlet: Outlet, number: u64) -> Self {
        let (finds, damaged) = (Arc::new(Semaphore::new(FINDS_MAX)), Arc::new(Semaphore::new(DAMAGED_MAX)));
        Self { outlet, number, table: Mutex::default(), finds, tries: Arc::new(Semaphore::new(1)), damaged }
    }

    /// Tells it something, as soon as there is room.
    pub async fn tell(&self, message: &ToNet) -> Result<(), Gone> {
        Ok(self.outlet.send(message, Vec::new()).await?)
    }

    /// Tells it something if there is room.
    pub fn try_tell(&self, message: &ToNet) -> Result<(), Gone> {
        Ok(self.outlet.try_send(message, Vec::new())?)
    }

    /// The same, with descriptors.
    pub fn try_tell_with(&self, message: &ToNet, fds: Vec<OwnedFd>) -> Result<(), Gone> {
        Ok(self.outlet.try_send(message, fds)?)
    }

    /// Asks for a file.
    pub async fn want(self: &Arc<Self>, want: Want, incoming: Option<OwnedFd>) -> Result<Wanting, Gone> {
        let (deliveries_in, deliveries) = mpsc::channel(DELIVERIES_WAITING_MAX);
        let id = {
            let mut table = self.table.lock();
            if table.over {
                return Err(Gone);
            }
            let id = table.next_id();
            table.wants.insert(id, Wanted { digest: want.digest, size: want.size, deliveries: deliveries_in });
            id
        };
        let wanting = Wanting { id, link: Arc::clone(self), deliveries };
        self.outlet.send(&ToNet::Want { id, want: Box::new(want) }, incoming.into_iter().collect()).await?;
        Ok(wanting)
    }

    /// Looks for deltas that make a file.
    pub async fn seek(self: &Arc<Self>, new: Digest, fleet_only: bool) -> Result<Seeking, Gone> {
        // All that it may send has room, and more than that is garbage.
        let (offers_in, offers) = mpsc::channel(OFFERS_MAX);
        let id = {
            let mut table = self.table.lock();
            if table.over {
                return Err(Gone);
            }
            let id = table.next_id();
            table.sought.insert(id, offers_in);
            id
        };
        let seeking = Seeking { id, link: Arc::clone(self), offers };
        self.tell(&ToNet::Seek { id, new, fleet_only }).await?;
        Ok(seeking)
    }

    /// Asks a question; the answer is there within a few seconds, or `patience` for what takes longer.
    pub async fn ask(&self, question: Question, patience: Option<Duration>) -> Result<(Answer, Vec<OwnedFd>), Gone> {
        let (told, answer) = oneshot::channel();
        let id = {
            let mut table = self.table.lock();
            if table.over || table.asked.len() >= ASKED_MAX {
                return Err(Gone);
            }
            let id = table.next_id();
            table.asked.insert(id, told);
            id
        };
        let asked = async {
            self.tell(&ToNet::Ask { id, question }).await?;
            answer.await.map_err(|_| Gone)
        };
        let answered = tokio::time::timeout(patience.unwrap_or(ANSWER_PATIENCE), asked).await;
        if answered.is_err() {
            self.table.lock().asked.remove(&id);
        }
        answered.map_err(|_| Gone)?
    }

    /// The process is gone: whoever waits for something from it is told.
    pub fn end(&self) {
        let mut table = self.table.lock();
        table.over = true;
        table.wants.clear();
        table.sought.clear();
        table.asked.clear();
    }

    /// Takes a message. An error ends the process.
    pub fn take(self: &Arc<Self>, message: FromNet, mut fds: Vec<OwnedFd>, parts: &Parts) -> Result<(), WireError> {
        let fds_expected = match &message {
            FromNet::Delivery { what: Delivered::Piece { .. }, .. } => 1,
            FromNet::Answer { answer: Answer::Document(Ok(())), .. } | FromNet::Try { .. } => 1,
            _ => 0,
        };
        if fds.len() != fds_expected {
            return Err(WireError::garbage(format!("{} descriptors where {fds_expected} belong", fds.len())));
        }
        match message {
            FromNet::Started | FromNet::Refused(_) => return Err(WireError::garbage("it says twice that it has started")),
            FromNet::Delivery { id, what } => self.deliver(id, what, fds.pop())?,
            FromNet::Find { id, digest, fleet, sums } => self.find(id, digest, fleet, sums, parts)?,
            FromNet::Try { id, old, new } => self.try_delta(id, old, new, fds.pop(), parts)?,
            FromNet::Damaged { digest, block } => {
                if let (Some(shelf), Ok(turn)) = (parts.shelf(), Arc::clone(&self.damaged).try_acquire_owned()) {
                    let looking = tokio::task::spawn_blocking(move || shelf.damaged(&digest, block));
                    tokio::spawn(async move {
                        // Looking reads the disk, so its number a second is bounded too.
                        let _ = looking.await;
                        tokio::time::sleep(DAMAGED_PAUSE).await;
                        drop(turn);
                    });
                }
            }
            FromNet::Arriving(digests) => {
                if digests.len() > DIGESTS_MAX {
                    return Err(WireError::garbage("too many files that arrive"));
                }
                parts.arriving.send_replace(digests);
            }
            FromNet::Checked(checked) => {
                let is_much = |checked: &Checked| checked.pieces.len() > PIECE_KEYS_PER_FILE_MAX;
                if checked.len() > ARRIVING_MAX || checked.iter().any(is_much) {
                    return Err(WireError::garbage("too many pieces of them"));
                }
                parts.checked.send_replace(checked);
            }
            FromNet::Offer { id, offer } => self.offer(id, offer.map(|offer| *offer))?,
            FromNet::Answer { id, answer } => {
                if let Answer::Item(Some(item)) = &answer
                    && item.len() as u64 > ITEM_DELTA_BYTES_MAX
                {
                    return Err(WireError::garbage("a small delta that is none"));
                }
                let mut table = self.table.lock();
                let told = table.asked.remove(&id);
                // Who asked may have gone away.
                match told {
                    Some(told) => drop(told.send((answer, fds))),
                    None if table.was_given(id) => {}
                    None => return Err(WireError::garbage("an answer to nothing")),
                }
            }
            FromNet::Pong(_) => {}
        }
        Ok(())
    }

    fn deliver(&self, id: u64, what: Delivered, fd: Option<OwnedFd>) -> Result<(), WireError> {
        let mut table = self.table.lock();
        let Some(wanted) = table.wants.get(&id) else {
            // It may have been given up meanwhile.
            return if table.was_given(id) { Ok(()) } else { Err(WireError::garbage("a delivery for nothing")) };
        };
        let is_last = what.is_last();
        let delivery = wanted.delivery(what, fd)?;
        match wanted.deliveries.try_send(delivery) {
            Ok(()) | Err(mpsc::error::TrySendError::Closed(_)) => {}
            Err(mpsc::error::TrySendError::Full(_)) => return Err(WireError::garbage("more deliveries than it may send ahead")),
        }
        if is_last {
            table.wants.remove(&id);
        }
        Ok(())
    }

    fn offer(&self, id: u64, offer: Option<DeltaOffer>) -> Result<(), WireError> {
        let mut table = self.table.lock();
        let Some(sought) = table.sought.get(&id) else {
            return if table.was_given(id) { Ok(()) } else { Err(WireError::garbage("an offer to nothing")) };
        };
        let Some(offer) = offer else {
            table.sought.remove(&id);
            return Ok(());
        };
        if offer.claim.as_ref().is_some_and(|claim| claim.len() != CLAIM_BYTES) {
            return Err(WireError::garbage("a claim that is none"));
        }
        match sought.try_send(offer) {
            Ok(()) | Err(mpsc::error::TrySendError::Closed(_)) => Ok(()),
            Err(mpsc::error::TrySendError::Full(_)) => Err(WireError::garbage("more offers than it may send")),
        }
    }

    fn find(self: &Arc<Self>, id: u64, digest: Digest, fleet: bool, sums: bool, parts: &Parts) -> Result<(), WireError> {
        let Ok(turn) = Arc::clone(&self.finds).try_acquire_owned() else {
            return Err(WireError::garbage("more questions than may wait for their answers"));
        };
        let (link, shelf) = (Arc::clone(self), parts.shelf());
        let look = move || {
            let to = if fleet { Audience::Fleet } else { Audience::Stranger };
            let found = shelf?.find(&digest, to)?;
            let size = found.sums.size;
            let mut fds = vec![found.file];
            if sums {
                match seal(&sums_bytes(&found.sums)) {
                    Ok(memory) => fds.push(memory),
                    Err(err) => {
                        tracing::warn!(%digest, "not given to a peer: {err}");
                        return None;
                    }
                }
            }
            Some((size, fds))
        };
        let looking = tokio::task::spawn_blocking(look);
        tokio::spawn(async move {
            let (size, fds) = looking.await.ok().flatten().map_or((None, Vec::new()), |(size, fds)| (Some(size), fds));
            // An error means that the process is gone, which is seen elsewhere.
            let _ = link.outlet.send(&ToNet::Found { id, size }, fds).await;
            drop(turn);
        });
        Ok(())
    }

    fn try_delta(self: &Arc<Self>, id: u64, old: Digest, new: Digest, delta: Option<OwnedFd>, parts: &Parts) -> Result<(), WireError> {
        let Some(delta) = delta else { return Err(WireError::garbage("no delta")) };
        let Ok(turn) = Arc::clone(&self.tries).try_acquire_owned() else {
            return Err(WireError::garbage("two deltas to try at once"));
        };
        let delta = Memory::check(delta, TOLD_BYTES_MAX)?.into_fd();
        let (link, prover) = (Arc::clone(self), parts.prover.get().map(Arc::clone));
        tokio::spawn(async move {
            let makes = match prover {
                Some(prover) => prover.makes(old, new, delta).await,
                None => None,
            };
            // The next one may come as soon as this is told.
            drop(turn);
            // An error means that the process is gone, which is seen elsewhere.
            let _ = link.outlet.send(&ToNet::Tried { id, makes }, Vec::new()).await;
        });
        Ok(())
    }
}

impl Table {
    fn next_id(&mut self) -> u64 {
        self.ids += 1;
        self.ids
    }

    fn was_given(&self, id: u64) -> bool {
        (1..=self.ids).contains(&id)
    }
}

impl Wanted {
    /// What was sent, if it is what may be sent.
    fn delivery(&self, what: Delivered, fd: Option<OwnedFd>) -> Result<Delivery, WireError> {
        Ok(match (what, fd) {
            (Delivered::Piece { index, giver }, Some(fd)) => {
                let span = piece::span(index.into(), self.size, PIECE_BYTES);
                let memory = Memory::check(fd, PIECE_BYTES.into())?;
                if span.is_empty() || memory.len() != span.end - span.start || !is_giver(&giver) {
                    return Err(WireError::garbage(format!("{} bytes as piece {index} of a file of {}", memory.len(), self.size)));
                }
                Delivery::Piece { index, bytes: memory.into_fd(), giver }
            }
            (Delivered::Piece { .. }, None) => return Err(WireError::garbage("a piece without its bytes")),
            (Delivered::Checking { bytes }, _) => Delivery::Checking { bytes },
            (Delivered::Done, _) => Delivery::Done,
            (Delivered::Failed(error), _) => Delivery::Failed(match error {
                SourceError::Nowhere { why, .. } => SourceError::Nowhere { digest: self.digest, why: plain_text(&why) },
                SourceError::NotNow { why, .. } => SourceError::NotNow { digest: self.digest, why: plain_text(&why) },
                SourceError::Gone => SourceError::Gone,
            }),
        })
    }
}

impl Seeking {
    /// The next offer; `None` when there are no others.
    pub async fn next(&mut self) -> Option<DeltaOffer> {
        self.offers.recv().await
    }
}

impl Drop for Seeking {
    fn drop(&mut self) {
        // As for wants.
        if self.link.table.lock().sought.remove(&self.id).is_some() {
            let _ = self.link.try_tell(&ToNet::Leave { id: self.id });
        }
    }
}

impl Wanting {
    /// The next delivery.
    pub async fn next(&mut self) -> Result<Delivery, Gone> {
        self.deliveries.recv().await.ok_or(Gone)
    }

    /// Lets one more be sent.
    pub async fn took(&self) -> Result<(), Gone> {
        self.link.tell(&ToNet::Took { id: self.id }).await
    }
}

impl Drop for Wanting {
    fn drop(&mut self) {
        // What has ended needs no word, and a queue that is full belongs to a process that is about to be ended.
        if self.link.table.lock().wants.remove(&self.id).is_some() {
            let _ = self.link.try_tell(&ToNet::Leave { id: self.id });
        }
    }
}

/// What messages are about.
#[derive(Debug)]
pub struct Parts {
    /// What may be given; not there before the store is open.
    pub shelf: std::sync::OnceLock<ShelfBox>,
    /// Tries deltas that others call false.
    pub prover: std::sync::OnceLock<Arc<Prover>>,
    /// What arrives from peers.
    pub arriving: tokio::sync::watch::Sender<Vec<Digest>>,
    /// What is here of it.
    pub checked: tokio::sync::watch::Sender<Vec<Checked>>,
}

/// A shelf that need not be shown.
#[derive(Clone)]
pub struct ShelfBox(pub Arc<dyn Shelf>);

impl std::fmt::Debug for ShelfBox {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Shelf")
    }
}

impl Parts {
    fn shelf(&self) -> Option<Arc<dyn Shelf>> {
        self.shelf.get().map(|shelf| Arc::clone(&shelf.0))
    }
}
