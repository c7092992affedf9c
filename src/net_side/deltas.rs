//! Deltas: what others offer, what this machine does, and small ones that lie in the DHT itself.

use crate::deltas::offers::{Content, DeltaOffer, FalseClaim, ITEM_DELTA_BYTES_MAX, ITEMS_MAX, OFFERED_MAX, Offered};
use parking_lot::RwLock;
use poolfs_core::Digest;
use poolfs_net::dht::FoundContact;
use poolfs_net::fleet::{Fleet, mark_of_deltas};
use poolfs_net::krpc::{Delta, Id, PV_DELTAS_MAX, Pv, item_target};
use poolfs_net::node::{Dht, Finding};
use poolfs_net::peer::{About, DeltaClaim, Facts, PeerClient};
use poolfs_net::reputation::NodeFacts;
use poolfs_net::swarm::FileShape;
use poolfs_net::swarm::driver::Swarm;
use poolfs_net::swarm::fleet::GroupKey;
use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinSet;
use tokio::time::Instant;

/// How often an item is put again: nodes forget it after two hours.
const ITEM_INTERVAL: Duration = Duration::from_secs(3600);

/// How often it is looked whether one is to be put again; one that could not be put is tried again then.
const ITEM_LOOK_INTERVAL: Duration = Duration::from_secs(30);

/// Offers that wait to be looked at.
const OFFERS_WAITING_MAX: usize = 16;

/// Peers asked what they say of one file.
const ASKED_MAX: usize = 12;

/// What this machine offers, as the peer server and the announces ask for it.
#[derive(Debug, Default)]
pub(super) struct Board {
    offered: RwLock<Arc<HashMap<Digest, Vec<Offered>>>>,
    changed: Notify,
}

impl Board {
    /// What is offered to `new`, at most what a `pv` holds; to strangers only what they may have.
    fn to(&self, new: &Digest, strangers: bool) -> Vec<Delta> {
        let offered = Arc::clone(&self.offered.read());
        let shown = offered.get(new).into_iter().flatten().filter(|offer| offer.to_strangers || !strangers);
        shown.take(PV_DELTAS_MAX).map(delta).collect()
    }

    /// What strangers may hear of, by the keys of the files.
    pub(super) fn by_key(&self) -> HashMap<[u8; 20], Vec<Delta>> {
        let offered = Arc::clone(&self.offered.read());
        let all = offered.keys().map(|new| (new.file_key(), self.to(new, true)));
        all.filter(|(_, deltas)| !deltas.is_empty()).collect()
    }

    /// Under what the members of the fleet are told that there are deltas here, see [`mark_of_deltas`].
    pub(super) fn marks(&self) -> HashSet<Digest> {
        self.offered.read().keys().map(mark_of_deltas).collect()
    }

    /// How many are offered.
    pub(super) fn len(&self) -> usize {
        self.offered.read().values().map(Vec::len).sum()
    }

    /// Replaces all, of which no more count than [`OFFERED_MAX`].
    pub(super) fn set(&self, all: Vec<Offered>) {
        let mut offered: HashMap<Digest, Vec<Offered>> = HashMap::new();
        for offer in all.into_iter().take(OFFERED_MAX) {
            offered.entry(offer.new).or_default().push(offer);
        }
        *self.offered.write() = Arc::new(offered);
        self.changed.notify_one();
    }

    fn items(&self) -> Vec<Vec<u8>> {
        let offered = Arc::clone(&self.offered.read());
        let mut small: Vec<&Offered> = offered.values().flatten().filter(|offer| offer.to_strangers && offer.item.is_some()).collect();
        small.sort_by_key(|offer| offer.delta);
        small.into_iter().filter_map(|offer| offer.item.as_deref().map(bencoded)).take(ITEMS_MAX).collect()
    }

    /// Keeps the small deltas in the DHT, for ever.
    pub(super) async fn keep_items(self: Arc<Self>, node: Dht) {
        let mut put: HashMap<Id, Instant> = HashMap::new();
        loop {
            let items = self.items();
            let wanted: HashSet<Id> = items.iter().map(|item| item_target(item)).collect();
            put.retain(|target, _| wanted.contains(target));
            for item in items {
                let target = item_target(&item);
                if put.get(&target).is_some_and(|at| at.elapsed() < ITEM_INTERVAL) {
                    continue;
                }
                let stored = match node.put_item(item).await {
                    Ok(lookup) => lookup.outcome().await,
                    Err(err) => Err(err),
                };
                match stored {
                    Ok(_) => drop(put.insert(target, Instant::now())),
                    Err(err) => tracing::debug!("put a small delta into the DHT: {err}"),
                }
            }
            tokio::select! {
                () = self.changed.notified() => {}
                () = tokio::time::sleep(ITEM_LOOK_INTERVAL) => {}
            }
        }
    }
}

fn delta(offer: &Offered) -> Delta {
    let target = offer.item.as_deref().filter(|_| offer.to_strangers).map(|bytes| item_target(&bencoded(bytes)));
    Delta { old: offer.old.0, bytes: offer.bytes, delta: offer.delta.0, target }
}

/// Bytes as BEP 44 has values: a string with its length in front.
fn bencoded(bytes: &[u8]) -> Vec<u8> {
    let mut value = format!("{}:", bytes.len()).into_bytes();
    value.extend_from_slice(bytes);
    value
}

/// The reverse of [`bencoded`].
fn from_bencoded(value: &[u8]) -> Option<&[u8]> {
    let colon = value.iter().take(5).position(|byte| *byte == b':')?;
    let length: usize = str::from_utf8(&value[..colon]).ok()?.parse().ok()?;
    value.get(colon + 1..).filter(|bytes| bytes.len() == length)
}

/// What this node tells of itself in answers to peers.
pub(super) struct OwnFacts {
    pub(super) node: NodeFacts,
    pub(super) board: Arc<Board>,
    /// Its key signs the claims.
    pub(super) dht: Dht,
}

impl Facts for OwnFacts {
    fn reachable(&self) -> bool {
        self.node.reachable()
    }

    fn deltas(&self, digest: &Digest) -> Vec<(Delta, DeltaClaim)> {
        // Who may not have the file is not asked about it; its deltas are for the same.
        let key = self.dht.signing_key();
        let sign = |delta: Delta| {
            let claim = DeltaClaim::sign(Digest(delta.old), *digest, Digest(delta.delta), &key, now_s());
            (delta, claim)
        };
        self.board.to(digest, false).into_iter().map(sign).collect()
    }

    fn proof(&self, id: &Digest) -> Option<Vec<u8>> {
        self.node.proof(id)
    }
}

/// Looks for deltas through the node and the fleet. Cheap to clone.
#[derive(Clone)]
pub struct Seeker {
    pub(super) node: Option<Dht>,
    pub(super) client: PeerClient,
    pub(super) fleet: Option<Fleet>,
    pub(super) swarm: Arc<Swarm>,
}

impl std::fmt::Debug for Seeker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Seeker").finish_non_exhaustive()
    }
}

impl Seeker {
    fn fleet_client(&self) -> PeerClient {
        let auth = self.fleet.as_ref().and_then(Fleet::auth);
        auth.map_or_else(|| self.client.clone(), |auth| self.client.for_fleet(auth))
    }

    /// Starts to look for deltas to a file; the channel closes when nobody else is to be asked. Dropping it ends the search. Needs a
    /// runtime around it.
    pub fn offers(&self, new: Digest, fleet_only: bool) -> mpsc::Receiver<DeltaOffer> {
        let (out, offers) = mpsc::channel(OFFERS_WAITING_MAX);
        let search = Search { new, swarm: Arc::clone(&self.swarm), asking: JoinSet::new(), asked: HashSet::new(), out };
        let contacts = self.node.as_ref().filter(|_| !fleet_only).map(|node| node.stream_peers(Id(new.file_key())));
        tokio::spawn(search.run(self.clone(), contacts));
        offers
    }

    /// The bytes of a delta in the DHT; `None` where it is not found.
    pub async fn item(&self, target: [u8; 20]) -> Option<Vec<u8>> {
        let mut lookup = self.node.as_ref()?.get_item(Id(target)).await.ok()?;
        while let Some(finding) = lookup.next().await {
            if let Finding::Item(value) = finding {
                return from_bencoded(&value).map(<[u8]>::to_vec);
            }
        }
        None
    }

    /// The delta of a claim does not make its file; `delta`: its bytes, where others may be told.
    pub fn false_claim(&self, false_claim: &FalseClaim, delta: Option<Vec<u8>>) {
        let FalseClaim { new, size, claim, is_public } = false_claim;
        match DeltaClaim::decode(claim, now_s()) {
            Ok(claim) if claim.new == *new => self.swarm.false_claim(&claim, *size, delta, *is_public),
            // It was checked when it came; by now its time may be over.
            _ => tracing::debug!(%new, "a claim that counts no more"),
        }
    }

    /// Whether it is this machine's to make the delta between two files, the older first: in a fleet one member that has both makes
    /// it for all.
    pub async fn is_maker(&self, files: [Content; 2]) -> bool {
        let (Some(fleet), Some(own)) = (self.fleet.as_ref().filter(|fleet| fleet.members() > 0), self.own_key()) else { return true };
        let (client, view) = (self.fleet_client(), fleet.view());
        let [old, new] = files.map(|(digest, size)| FileShape::of(digest, size));
        for id in view.ranked(&GroupKey { digest: new.digest, group: 0 }).iter() {
            if member_id(&own) == id.0 {
                return true;
            }
            let Some(member) = view.member(*id) else { continue };
            let has = async |shape| client.have(member.contact, shape).await.is_ok_and(|have| have.is_full());
            // A member of more weight makes it if it has both.
            if has(&new).await && has(&old).await {
                return false;
            }
        }
        // None of the first has them; of the others each may make it, and all make the same bytes.
        true
    }

    fn own_key(&self) -> Option<[u8; 32]> {
        self.node.as_ref().map(|node| node.signing_key().verifying_key().to_bytes())
    }
}

/// A search for offers: who is asked, and what came.
struct Search {
    new: Digest,
    swarm: Arc<Swarm>,
    asking: JoinSet<(SocketAddr, Option<About>)>,
    asked: HashSet<SocketAddr>,
    out: mpsc::Sender<DeltaOffer>,
}

impl Search {
    fn ask(&mut self, contact: SocketAddr, client: &PeerClient) {
        if self.asked.len() >= ASKED_MAX || !self.asked.insert(contact) {
            return;
        }
        let (client, new) = (client.clone(), self.new);
        self.asking.spawn(async move { (contact, client.about(contact, &new).await.ok()) });
    }

    /// Offers that nobody vouches for yet: of use where the delta itself is in the DHT.
    async fn heard(&self, pv: &Pv) -> bool {
        for delta in &pv.deltas {
            let Some(target) = delta.target else { continue };
            let offer =
                DeltaOffer { old: Digest(delta.old), delta: Digest(delta.delta), bytes: delta.bytes, target: Some(target.0), claim: None };
            if delta.bytes <= ITEM_DELTA_BYTES_MAX && self.out.send(offer).await.is_err() {
                return false;
            }
        }
        true
    }

    async fn told(&self, contact: SocketAddr, about: &About) -> bool {
        for delta in &about.pv.deltas {
            let vouches = |claim: &&DeltaClaim| claim.old.0 == delta.old && claim.delta.0 == delta.delta && claim.signer == about.pv.key;
            let Some(claim) = about.claims.iter().find(vouches).filter(|claim| !self.swarm.key_is_out(&claim.signer)) else { continue };
            self.swarm.hint(claim.delta, contact);
            let offer = DeltaOffer {
                old: claim.old,
                delta: claim.delta,
                bytes: delta.bytes,
                target: delta.target.map(|target| target.0),
                claim: Some(claim.encode()),
            };
            if self.out.send(offer).await.is_err() {
                return false;
            }
        }
        true
    }

    async fn run(mut self, seeker: Seeker, mut contacts: Option<mpsc::Receiver<FoundContact>>) {
        let (own, fleet_client) = (seeker.own_key(), seeker.fleet_client());
        let mut members = match seeker.fleet.as_ref().filter(|fleet| fleet.members() > 0) {
            Some(fleet) => Some(fleet.who(mark_of_deltas(&self.new)).await),
            None => None,
        };
        while members.is_some() || contacts.is_some() || !self.asking.is_empty() {
            tokio::select! {
                () = self.out.closed() => return,
                Some(done) = self.asking.join_next() => {
                    if let Ok((contact, Some(about))) = done
                        && !self.told(contact, &about).await
                    {
                        return;
                    }
                }
                member = next(&mut members), if members.is_some() => match member {
                    None => members = None,
                    Some(member) => self.ask(member, &fleet_client),
                },
                found = next(&mut contacts), if contacts.is_some() => match found {
                    None => contacts = None,
                    Some(contact) => {
                        let pv = contact.pv.as_ref();
                        if pv.is_some_and(|pv| Some(pv.key) == own) {
                            continue;
                        }
                        if let Some(pv) = pv
                            && !self.heard(pv).await
                        {
                            return;
                        }
                        // Of a contact that came through an ordinary node nothing is known.
                        if pv.is_none_or(|pv| !pv.deltas.is_empty()) {
                            self.ask(contact.addr, &seeker.client);
                        }
                    }
                },
            }
        }
    }
}

async fn next<T>(found: &mut Option<mpsc::Receiver<T>>) -> Option<T> {
    match found {
        Some(found) => found.recv().await,
        None => None,
    }
}

/// A member's id: the first 20 bytes of its key's SHA-256.
fn member_id(key: &[u8; 32]) -> [u8; 20] {
    let digest = Digest::of(key).0;
    let mut id = [0; 20];
    id.copy_from_slice(&digest[..20]);
    id
}

fn now_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;
    use crate::bridge::NodeFinder;
    use crate::net_side::Arriving;
    use poolfs_net::mirror::{Mirror, MirrorLimits};
    use poolfs_net::peer::ClientLimits;
    use poolfs_net::swarm::driver::SwarmParts;

    fn offered(n: u8, bytes: u64, to_strangers: bool, item: Option<Vec<u8>>) -> Offered {
        Offered { new: Digest([1; 32]), old: Digest([n; 32]), delta: Digest([n + 100; 32]), bytes, to_strangers, item }
    }

    /// A delta that members only may have must not be in a `pv` that strangers read, nor its bytes in the DHT.
    #[test]
    fn what_strangers_hear_of() {
        let board = Board::default();
        board.set(vec![
            offered(2, 9, false, Some(b"for members".to_vec())),
            offered(3, 5, true, Some(b"small".to_vec())),
            offered(4, 5000, true, None),
        ]);
        let olds = |deltas: Vec<Delta>| deltas.iter().map(|delta| delta.old[0]).collect::<Vec<_>>();
        assert_eq!(olds(board.to(&Digest([1; 32]), true)), [3, 4]);
        assert_eq!(olds(board.to(&Digest([1; 32]), false)), [2, 3, 4]);
        assert_eq!(board.items(), [b"5:small".to_vec()]);
        let target = item_target(b"5:small");
        assert_eq!(board.to(&Digest([1; 32]), true)[0].target, Some(target));
        assert_eq!(board.by_key().into_keys().collect::<Vec<_>>(), [Digest([1; 32]).file_key()]);
        assert!(board.to(&Digest([9; 32]), true).is_empty());
        // SHA-256 of `poolfs-1 deltas`, a zero byte and 32 ones: members of other versions ask for the same.
        let mark = "9bcb5a56483a5496b4d65474c5d0146f2a557e2cc3feb890bbae5527b6ca6f0c".parse().unwrap();
        assert_eq!(board.marks(), HashSet::from([mark]));
    }

    /// An upgrade that nobody has a delta for would else wait for one as long as it may.
    #[tokio::test]
    async fn a_search_ends_when_nobody_else_is_to_be_asked() {
        let dir = tempfile::tempdir().unwrap();
        let client = PeerClient::new(ClientLimits::default());
        let parts = SwarmParts {
            mirror: Arc::new(Mirror::new(MirrorLimits::default())),
            client: client.clone(),
            finder: Arc::new(NodeFinder::new(None)),
            announcer: Arc::new(Arriving::default()),
            partials: Arc::default(),
            netdb: None,
            spill_dir: dir.path().to_owned(),
            public: false,
            fleet: None,
            convictions: None,
        };
        let seeker = Seeker { node: None, client, fleet: None, swarm: Swarm::new(parts).unwrap() };
        assert_eq!(seeker.offers(Digest::of(b"new"), false).recv().await, None);
        assert_eq!(seeker.item([7; 20]).await, None);
        assert!(seeker.is_maker([(Digest::of(b"old"), 3), (Digest::of(b"new"), 3)]).await, "who is of no fleet makes its own");
    }

    #[test]
    fn values_of_bep_44() {
        let longest = vec![7; usize::try_from(ITEM_DELTA_BYTES_MAX).unwrap()];
        assert_eq!(bencoded(&longest).len(), 1000);
        assert_eq!(from_bencoded(&bencoded(&longest)), Some(&longest[..]));
        for bad in [&b"5:four"[..], b"4:fours", b":", b"", b"x:y", b"12345:"] {
            assert_eq!(from_bencoded(bad), None);
        }
    }
}
