//! The search for holders of one file: what is found, asked what it has where that is not known, each once.

use super::book::Book;
use super::{FoundPeer, Holds, Swarm, now_s};
use crate::peer::PeerClient;
use crate::swarm::FileShape;
use crate::swarm::bits::Bits;
use std::collections::HashSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};

/// Peers credited by earlier files that are asked for this one too.
pub(super) const KNOWN_ASKED_MAX: usize = 8;

/// Contacts looked at for one file.
const CONTACTS_MAX: usize = 128;

/// Contacts asked at once what they have.
const PROBES_MAX: usize = 8;

/// How long the search may take: four rounds of a lookup in which every node but the last is silent.
const SEARCH_MAX: Duration = Duration::from_secs(30);

/// A holder that can be asked for pieces.
#[derive(Clone, Debug)]
pub(super) struct Holder {
    pub(super) contact: SocketAddr,
    /// `None`: every piece.
    pub(super) have: Option<Bits>,
}

/// See the module's text.
pub(super) struct Hunt {
    shape: FileShape,
    client: PeerClient,
    book: Arc<Book>,
    known: Vec<SocketAddr>,
    found: Option<mpsc::Receiver<FoundPeer>>,
    probes: JoinSet<Option<Holder>>,
    seen: HashSet<SocketAddr>,
    ends: Instant,
}

impl Hunt {
    pub(super) fn new(
        shape: FileShape,
        client: PeerClient,
        book: Arc<Book>,
        known: Vec<SocketAddr>,
        found: mpsc::Receiver<FoundPeer>,
    ) -> Self {
        let ends = Instant::now() + SEARCH_MAX;
        Self { shape, client, book, known, found: Some(found), probes: JoinSet::new(), seen: HashSet::new(), ends }
    }

    /// Goes on with the holders of single pieces, who are all asked what they have.
    pub(super) fn go_on(&mut self, found: mpsc::Receiver<FoundPeer>) {
        self.found = Some(found);
        self.ends = Instant::now() + SEARCH_MAX;
    }

    /// A search that finds nobody.
    pub(super) fn none(shape: FileShape, swarm: &Swarm) -> Self {
        let nobody = mpsc::channel(1).1;
        Self::new(shape, swarm.parts.client.clone(), Arc::clone(&swarm.book), Vec::new(), nobody)
    }

    /// The next holder; `None` when nobody else will be found. Cancelling it loses nothing.
    pub(super) async fn next(&mut self) -> Option<Holder> {
        loop {
            while self.probes.len() < PROBES_MAX
                && let Some(contact) = self.known.pop()
            {
                self.probe(contact);
            }
            let room = self.probes.len() < PROBES_MAX;
            tokio::select! {
                biased;
                Some(probed) = self.probes.join_next() => {
                    if let Ok(Some(holder)) = probed {
                        return Some(holder);
                    }
                }
                found = next_of(&mut self.found), if room && self.found.is_some() => match found {
                    None => self.found = None,
                    Some(FoundPeer { contact, holds: Holds::All, .. }) => {
                        if self.is_new(contact) {
                            return Some(Holder { contact, have: None });
                        }
                    }
                    Some(FoundPeer { contact, .. }) => self.probe(contact),
                },
                () = sleep_until(self.ends), if self.found.is_some() => {
                    tracing::debug!(digest = %self.shape.digest, "the search for holders takes too long");
                    self.found = None;
                }
                else => return None,
            }
        }
    }

    /// Asks a contact what it has.
    fn probe(&mut self, contact: SocketAddr) {
        if !self.is_new(contact) {
            return;
        }
        let (client, shape) = (self.client.clone(), self.shape);
        self.probes.spawn(async move {
            let have = client.have(contact, &shape).await.ok()?;
            Some(Holder { contact, have: (!have.is_full()).then_some(have) })
        });
    }

    /// Whether this contact was not looked at yet and may be.
    fn is_new(&mut self, contact: SocketAddr) -> bool {
        let out = self.book.lock().verdicts.address_is_out(contact.ip(), now_s());
        !out && self.seen.len() < CONTACTS_MAX && self.seen.insert(contact)
    }
}

async fn next_of(found: &mut Option<mpsc::Receiver<FoundPeer>>) -> Option<FoundPeer> {
    match found {
        Some(found) => found.recv().await,
        None => None,
    }
}
