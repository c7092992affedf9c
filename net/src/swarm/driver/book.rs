//! What all downloads together know of others: ratings, verdicts, the hour's budget for waste, and who gave which piece.
//!
//! Lives in memory behind one lock, held for lookups only. What outlives the process is written to the network side's
//! database by [`Book::save`], which blocks; losing it costs speed and a liar's memory, never right bytes.

use crate::netdb::{NetDb, NetDbError};
use crate::reputation::Conviction;
use crate::swarm::FileShape;
use crate::swarm::blame::{AddressRecord, Outcome, Verdicts, WasteBudget};
use crate::swarm::rating::{Nearness, Rating, Ratings};
use parking_lot::{Mutex, MutexGuard};
use poolfs_core::Digest;
use rusqlite::params;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use tokio::sync::{mpsc, watch};

/// Mirrors whose rating is kept; past that they are thought unknown.
const MIRRORS_MAX: usize = 64;

/// Files of which it is remembered who gave what; the oldest is forgotten first.
const HISTORIES_MAX: usize = 1024;

/// Pieces remembered of all these files together.
const HISTORY_PIECES_MAX: usize = 1 << 20;

/// Who gave a piece.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub enum Giver {
    /// A mirror, by its host name.
    Mirror(String),
    /// A peer, by its address.
    Peer(SocketAddr),
}

/// Who gave which piece of one file.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct History {
    /// Length of the file in bytes.
    pub size: u64,
    /// Bytes of one piece.
    pub piece_bytes: u32,
    /// Unix seconds at which it was complete.
    pub done_at: u64,
    /// Pieces of each giver, ascending; what was here before the download has none.
    pub givers: BTreeMap<String, Vec<u32>>,
}

impl History {
    fn pieces(&self) -> usize {
        self.givers.values().map(Vec::len).sum()
    }
}

/// One peer as people see it.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct PeerRow {
    /// Where it serves pieces.
    pub address: SocketAddr,
    /// Bytes per second of all its transfers together, as expected now.
    pub rate_bytes_s: f64,
    /// Seconds to the first byte, as expected now.
    pub latency_s: f64,
    /// Failed requests that have not faded yet.
    pub failures: f64,
    /// Whether a verified file has credited it lately; until then it has one piece in flight.
    pub credited: bool,
    /// Pieces that it gave.
    pub pieces: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Bad pieces held against its address that have not expired.
    pub bad: u32,
    /// Lists of pieces that it handed over since the start and that a verified file contradicts: the key that signed them is out.
    #[serde(default)]
    pub false_lists: u32,
    /// Nothing is asked of its address until then, in Unix seconds; 0: it is not out.
    pub out_until: u64,
    /// The key that signed the lists of pieces which it handed over, in hexadecimal digits.
    #[serde(default)]
    pub key: Option<String>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Given {
    pieces: u64,
    bytes: u64,
    /// Not saved: the keys are.
    false_lists: u32,
}

/// What is behind the lock.
#[derive(Debug, Default)]
pub(super) struct Pages {
    pub(super) ratings: Ratings,
    pub(super) verdicts: Verdicts,
    pub(super) budget: WasteBudget,
    mirrors: HashMap<String, Rating>,
    given: BTreeMap<SocketAddr, Given>,
    /// Under which key peers signed what they handed over. A `pv` is not signed, so what it says is not taken for that.
    keys: BTreeMap<SocketAddr, [u8; 32]>,
    /// Where it is told what was proved.
    convictions: Option<mpsc::Sender<Conviction>>,
    histories: HashMap<Digest, History>,
    order: VecDeque<Digest>,
    history_pieces: usize,
    /// Ratings changed since they were last saved.
    changed: BTreeSet<SocketAddr>,
    /// Peers that have a row in the database: those of no known peer are deleted, so that it holds no more than
    /// [`RATINGS_MAX`](crate::swarm::rating::RATINGS_MAX) and none longer than [`UNUSED_S_MAX`](crate::swarm::rating::UNUSED_S_MAX).
    saved: BTreeSet<SocketAddr>,
    verdicts_changed: bool,
}

/// The shared book.
#[derive(Debug)]
pub(super) struct Book {
    db: Option<Arc<NetDb>>,
    pages: Mutex<Pages>,
    met: watch::Sender<u64>,
}

/// Where a peer seems to be: what addresses of no public network reach is near.
pub(super) fn nearness(address: IpAddr) -> Nearness {
    let near = match address.to_canonical() {
        IpAddr::V4(v4) => v4.is_private() || v4.is_link_local() || v4.is_loopback(),
        IpAddr::V6(v6) => v6.is_unique_local() || v6.is_unicast_link_local() || v6.is_loopback(),
    };
    Nearness::of(address, near)
}

impl Book {
    /// Opens the book: with `db` as it was left, without one empty and never saved. Blocks for the disk.
    pub(super) fn open(db: Option<Arc<NetDb>>, convictions: Option<mpsc::Sender<Conviction>>, now_s: u64) -> Result<Self, NetDbError> {
        let mut pages = Pages { convictions, ..Pages::default() };
        if let Some(db) = &db {
            pages.load(db, now_s)?;
        }
        Ok(Self { db, pages: Mutex::new(pages), met: watch::Sender::new(0) })
    }

    /// Changes when peers were credited.
    pub(super) fn met(&self) -> watch::Receiver<u64> {
        self.met.subscribe()
    }

    /// Says that a download has rated its peers.
    pub(super) fn rated(&self) {
        self.met.send_modify(|times| *times += 1);
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Pages> {
        self.pages.lock()
    }

    /// Writes what changed since the last time; blocks for the disk.
    pub(super) fn save(&self, now_s: u64) -> Result<(), NetDbError> {
        let Some(db) = &self.db else { return Ok(()) };
        let (changed, verdicts, gone) = {
            let mut pages = self.pages.lock();
            pages.ratings.expire(now_s);
            pages.verdicts.expire(now_s);
            let given = |address: &SocketAddr| pages.given.get(address).copied().unwrap_or_default();
            let known: BTreeMap<&SocketAddr, &Rating> = pages.ratings.iter().collect();
            let key = |address: &SocketAddr| pages.keys.get(address).copied();
            let row = |address: &SocketAddr| known.get(address).map(|rating| (*address, **rating, given(address), key(address)));
            let changed: Vec<(SocketAddr, Rating, Given, Option<[u8; 32]>)> = pages.changed.iter().filter_map(row).collect();
            let gone: Vec<SocketAddr> = pages.saved.iter().filter(|address| !known.contains_key(address)).copied().collect();
            let known: BTreeSet<SocketAddr> = known.into_keys().copied().collect();
            pages.saved.retain(|address| known.contains(address));
            pages.saved.extend(changed.iter().map(|(address, ..)| *address));
            pages.changed.clear();
            let verdicts = std::mem::take(&mut pages.verdicts_changed).then(|| pages.verdicts.clone());
            (changed, verdicts, gone)
        };
        if changed.is_empty() && gone.is_empty() && verdicts.is_none() {
            return Ok(());
        }
        db.db().transaction(|tx| {
            for (address, rating, given, key) in &changed {
                let text = serde_json::to_string(rating).expect("plain values");
                let (pieces, bytes) = (given.pieces.cast_signed(), given.bytes.cast_signed());
                tx.prepare_cached("REPLACE INTO rating (address, port, rating, pieces, bytes, key) VALUES (?1, ?2, ?3, ?4, ?5, ?6)")?
                    .execute(params![octets(address.ip()), address.port(), text, pieces, bytes, key])?;
            }
            for address in &gone {
                tx.prepare_cached("DELETE FROM rating WHERE address = ?1 AND port = ?2")?
                    .execute(params![octets(address.ip()), address.port()])?;
            }
            if let Some(verdicts) = &verdicts {
                tx.execute("DELETE FROM verdict_address", [])?;
                tx.execute("DELETE FROM verdict_key", [])?;
                let mut insert = tx.prepare_cached("INSERT INTO verdict_address (address, record) VALUES (?1, ?2)")?;
                for (address, record) in verdicts.addresses() {
                    let text = serde_json::to_string(record).expect("plain values");
                    insert.execute(params![octets(*address), text])?;
                }
                let mut insert = tx.prepare_cached("INSERT INTO verdict_key (key, out_until) VALUES (?1, ?2)")?;
                for (key, until) in verdicts.keys() {
                    insert.execute(params![key, until.cast_signed()])?;
                }
            }
            Ok(())
        })
    }
}

impl Pages {
    fn load(&mut self, db: &NetDb, now_s: u64) -> Result<(), NetDbError> {
        let reader = db.db().reader()?;
        let mut rows = reader.prepare("SELECT address, record FROM verdict_address")?;
        let rows = rows.query_map([], |row| Ok((row.get::<_, Vec<u8>>(0)?, row.get::<_, String>(1)?)))?;
        for row in rows {
            let (address, text) = row?;
            // A row that another version wrote says nothing here.
            if let (Some(address), Ok(record)) = (ip_of(&address), serde_json::from_str::<AddressRecord>(&text)) {
                self.verdicts.restore_address(address, record, now_s);
            }
        }
        let mut rows = reader.prepare("SELECT key, out_until FROM verdict_key")?;
        for row in rows.query_map([], |row| Ok((row.get(0)?, row.get::<_, i64>(1)?)))? {
            let (key, until) = row?;
            self.verdicts.restore_key(key, until.cast_unsigned(), now_s);
        }
        let mut rows = reader.prepare("SELECT address, port, rating, pieces, bytes, key FROM rating")?;
        let rows = rows.query_map([], |row| {
            let (address, port, text): (Vec<u8>, u16, String) = (row.get(0)?, row.get(1)?, row.get(2)?);
            let (pieces, bytes, key): (i64, i64, Option<[u8; 32]>) = (row.get(3)?, row.get(4)?, row.get(5)?);
            Ok((address, port, text, pieces, bytes, key))
        })?;
        for row in rows {
            let (address, port, text, pieces, bytes, key) = row?;
            let Some(address) = ip_of(&address) else { continue };
            let peer = SocketAddr::new(address, port);
            self.saved.insert(peer);
            if let Ok(rating) = serde_json::from_str::<Rating>(&text) {
                self.ratings.put(peer, rating);
                self.given.insert(peer, Given { pieces: pieces.cast_unsigned(), bytes: bytes.cast_unsigned(), false_lists: 0 });
                key.and_then(|key| self.keys.insert(peer, key));
            }
        }
        self.ratings.expire(now_s);
        self.forget_given();
        Ok(())
    }

    /// What is expected of a peer now.
    pub(super) fn rating(&self, peer: SocketAddr, now_s: u64) -> Rating {
        self.ratings.of(peer, nearness(peer.ip()), now_s)
    }

    /// Notes what a download has learned of a peer, and what it brought.
    pub(super) fn rate(&mut self, peer: SocketAddr, rating: Rating, pieces: u32, bytes: u64) {
        self.ratings.put(peer, rating);
        let given = self.given.entry(peer).or_default();
        given.pieces += u64::from(pieces);
        given.bytes += bytes;
        self.changed.insert(peer);
        self.forget_given();
    }

    /// The counts follow the ratings, which are bounded.
    fn forget_given(&mut self) {
        if self.given.len() > crate::swarm::rating::RATINGS_MAX {
            let known: BTreeSet<SocketAddr> = self.ratings.iter().map(|(peer, _)| *peer).collect();
            self.given.retain(|peer, _| known.contains(peer));
            self.keys.retain(|peer, _| known.contains(peer));
            self.changed.retain(|peer| known.contains(peer));
        }
    }

    /// What is expected of a mirror now.
    pub(super) fn mirror(&self, host: &str, now_s: u64) -> Rating {
        let mut rating = self.mirrors.get(host).copied().unwrap_or_else(|| Rating::unknown(Nearness::FarV4, now_s));
        rating.decay(now_s);
        rating
    }

    pub(super) fn rate_mirror(&mut self, host: String, rating: Rating) {
        if self.mirrors.len() >= MIRRORS_MAX && !self.mirrors.contains_key(&host) {
            self.mirrors.clear();
        }
        self.mirrors.insert(host, rating);
    }

    /// Takes down what a verified file proves. `who` gives the address of a source, if it has one; `signer` only that of one who
    /// signs the lists that it hands over. `is_public`: strangers may know that the file is here.
    pub(super) fn verified(
        &mut self,
        shape: &FileShape,
        is_public: bool,
        outcome: &Outcome,
        who: impl Fn(crate::swarm::SourceId) -> Option<SocketAddr>,
        signer: impl Fn(crate::swarm::SourceId) -> Option<SocketAddr>,
        now_s: u64,
    ) {
        let file = shape.digest;
        for verdict in outcome.verdicts.iter().filter(|verdict| verdict.is_guilty()) {
            if let Some(peer) = who(verdict.source) {
                tracing::debug!(%peer, %file, bad = verdict.bad, contradicted_itself = verdict.contradicted_itself, "gave bytes that the file does not hold");
                self.bad(peer, file, verdict.bad.max(1), now_s);
            }
        }
        for (source, list) in &outcome.false_lists {
            if let Some(peer) = signer(*source) {
                tracing::debug!(%peer, %file, "handed over a signed list that the file contradicts");
                self.given.entry(peer).or_default().false_lists += 1;
                self.forget_given();
            }
            self.verdicts.false_signature(list.signer, now_s);
            self.verdicts_changed = true;
            let piece = list.pieces.iter().zip(&outcome.pieces).position(|(said, is)| said != is).unwrap_or(0);
            let piece = u32::try_from(piece).unwrap_or(u32::MAX);
            self.convict(Conviction::FalseList { shape: *shape, list: list.clone(), piece, is_public });
        }
    }

    /// Tells what was proved. A full queue leaves it untold: the verdict stands without.
    fn convict(&self, conviction: Conviction) {
        if let Some(convictions) = &self.convictions
            && convictions.try_send(conviction).is_err()
        {
            tracing::debug!("what was proved of a peer is not told of");
        }
    }

    /// Notes that this peer handed over something signed with this key, as its own.
    pub(super) fn signed(&mut self, peer: SocketAddr, key: [u8; 32]) {
        if self.keys.insert(peer, key) != Some(key) {
            self.changed.insert(peer);
        }
        if self.keys.len() > crate::swarm::rating::RATINGS_MAX {
            let known: BTreeSet<SocketAddr> = self.ratings.iter().map(|(peer, _)| *peer).collect();
            self.keys.retain(|peer, _| known.contains(peer));
        }
    }

    /// The keys of credited peers.
    pub(super) fn credited_keys(&self, now_s: u64) -> Vec<[u8; 32]> {
        let credited = self.ratings.iter().filter(|(_, rating)| rating.is_credited(now_s));
        let keys: BTreeSet<[u8; 32]> = credited.filter_map(|(peer, _)| self.keys.get(peer).copied()).collect();
        keys.into_iter().collect()
    }

    /// Takes the credit of all peers with this key away; returns of how many.
    pub(super) fn doubt(&mut self, key: &[u8; 32], now_s: u64) -> usize {
        let peers: Vec<SocketAddr> = self.keys.iter().filter(|(_, other)| *other == key).map(|(peer, _)| *peer).collect();
        let mut count = 0;
        for peer in peers {
            let mut rating = self.rating(peer, now_s);
            count += usize::from(rating.is_credited(now_s));
            rating.discredit();
            self.ratings.put(peer, rating);
            self.changed.insert(peer);
        }
        count
    }

    /// A signed claim was found false; `told`: what may be said of it.
    pub(super) fn false_claim(&mut self, signer: [u8; 32], told: Option<Conviction>, now_s: u64) {
        self.verdicts.false_signature(signer, now_s);
        self.verdicts_changed = true;
        if let Some(conviction) = told {
            self.convict(conviction);
        }
    }

    pub(super) fn bad(&mut self, peer: SocketAddr, file: Digest, count: u32, now_s: u64) {
        self.verdicts_changed = true;
        if self.verdicts.bad(peer.ip(), file, count, now_s) {
            if let Some(subject) = self.keys.get(&peer) {
                self.convict(Conviction::FalseBytes { subject: *subject });
            }
            tracing::info!(address = %peer.ip(), "gave wrong bytes again, and is asked for nothing for a while");
        }
    }

    /// Remembers who gave which piece of a file that is complete.
    pub(super) fn remember(&mut self, file: Digest, history: History) {
        self.history_pieces += history.pieces();
        if let Some(old) = self.histories.insert(file, history) {
            self.history_pieces -= old.pieces();
            self.order.retain(|other| *other != file);
        }
        self.order.push_back(file);
        while self.order.len() > HISTORIES_MAX || (self.history_pieces > HISTORY_PIECES_MAX && self.order.len() > 1) {
            let Some(oldest) = self.order.pop_front() else { break };
            self.history_pieces -= self.histories.remove(&oldest).map_or(0, |old| old.pieces());
        }
    }

    pub(super) fn history(&self, file: &Digest) -> Option<&History> {
        self.histories.get(file)
    }

    /// Every peer that is remembered, most bytes first.
    pub(super) fn peers(&self, now_s: u64) -> Vec<PeerRow> {
        let records: BTreeMap<&IpAddr, &AddressRecord> = self.verdicts.addresses().collect();
        let row = |(address, rating): (&SocketAddr, &Rating)| {
            let mut rating = *rating;
            rating.decay(now_s);
            let given = self.given.get(address).copied().unwrap_or_default();
            let record = records.get(&address.ip());
            PeerRow {
                address: *address,
                rate_bytes_s: rating.rate_bytes_s(),
                latency_s: rating.latency_s(),
                failures: rating.failures(),
                credited: rating.is_credited(now_s),
                pieces: given.pieces,
                bytes: given.bytes,
                bad: record.map_or(0, |record| u32::try_from(record.bad.len()).unwrap_or(u32::MAX)),
                false_lists: given.false_lists,
                out_until: record.map_or(0, |record| if record.out_until > now_s { record.out_until } else { 0 }),
                key: self.keys.get(address).map(|key| Digest(*key).to_string()),
            }
        };
        let mut rows: Vec<PeerRow> = self.ratings.iter().map(row).collect();
        rows.sort_by_key(|row| std::cmp::Reverse(row.bytes));
        rows
    }

    /// Peers that verified files have credited and that are not out, the fastest first.
    pub(super) fn credited(&self, peers_max: usize, now_s: u64) -> Vec<SocketAddr> {
        let mut rows: Vec<PeerRow> = self.peers(now_s).into_iter().filter(|row| row.credited && row.out_until == 0).collect();
        rows.sort_by(|a, b| a.failures.total_cmp(&b.failures).then(b.rate_bytes_s.total_cmp(&a.rate_bytes_s)));
        rows.into_iter().take(peers_max).map(|row| row.address).collect()
    }
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

fn ip_of(bytes: &[u8]) -> Option<IpAddr> {
    match bytes.len() {
        4 => <[u8; 4]>::try_from(bytes).ok().map(IpAddr::from),
        _ => <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use crate::swarm::blame::OUT_S_FIRST;
    use std::time::Duration;

    const NOW_S: u64 = 1_800_000_000;

    /// A liar who waits for a restart must not be asked again before his time, and an honest peer keeps its credit.
    #[test]
    fn a_restart_keeps_verdicts_and_ratings() {
        let dir = tempfile::tempdir().unwrap();
        let open = || Book::open(Some(Arc::new(NetDb::open(dir.path()).unwrap())), None, NOW_S).unwrap();
        let (good, liar): (SocketAddr, SocketAddr) = ("192.0.2.1:9977".parse().unwrap(), "[2001:db8::2]:9977".parse().unwrap());
        let book = open();
        {
            let mut pages = book.lock();
            let mut rating = pages.rating(good, NOW_S);
            rating.succeeded(Duration::from_millis(7), 3e6, NOW_S);
            rating.credit(NOW_S);
            pages.rate(good, rating, 3, 786_432);
            pages.signed(good, [3; 32]);
            pages.bad(liar, Digest::of(b"a"), 1, NOW_S);
            pages.bad(liar, Digest::of(b"b"), 1, NOW_S);
            pages.verdicts.false_signature([7; 32], NOW_S);
        }
        book.save(NOW_S).unwrap();
        let before = book.lock().peers(NOW_S);
        drop(book);
        let book = open();
        let pages = book.lock();
        let after = pages.peers(NOW_S);
        assert_eq!((after.len(), after[0].address, after[0].pieces, after[0].bytes), (1, good, 3, 786_432));
        assert_eq!(after[0].key, Some("03".repeat(32)));
        assert_eq!(pages.credited_keys(NOW_S), [[3; 32]]);
        assert!(after[0].credited && (after[0].rate_bytes_s - before[0].rate_bytes_s).abs() < 1.0);
        assert!(pages.verdicts.address_is_out(liar.ip(), NOW_S + OUT_S_FIRST - 1));
        assert!(!pages.verdicts.address_is_out(liar.ip(), NOW_S + OUT_S_FIRST));
        assert!(pages.verdicts.key_is_out(&[7; 32], NOW_S + 1));
        assert!(!pages.verdicts.address_is_out(good.ip(), NOW_S));
    }

    /// A word of others takes the credit, and nothing more: who is out is out by this machine's own proof. It can be earned again.
    #[test]
    fn to_be_doubted_is_to_be_unknown() {
        let mut pages = Pages::default();
        let at = |n: u8| SocketAddr::from(([192, 0, 2, n], 9977));
        for (n, key) in [(1, 7), (2, 7), (3, 8)] {
            let mut rating = pages.rating(at(n), NOW_S);
            rating.credit(NOW_S);
            pages.rate(at(n), rating, 1, 1);
            pages.signed(at(n), [key; 32]);
        }
        assert_eq!(pages.doubt(&[7; 32], NOW_S), 2);
        assert_eq!(pages.doubt(&[7; 32], NOW_S), 0);
        assert_eq!(pages.credited_keys(NOW_S), [[8; 32]]);
        assert_eq!(pages.credited(8, NOW_S), [at(3)]);
        assert!(!pages.verdicts.key_is_out(&[7; 32], NOW_S) && !pages.verdicts.address_is_out(at(1).ip(), NOW_S));
        let mut rating = pages.rating(at(1), NOW_S);
        rating.credit(NOW_S);
        pages.rate(at(1), rating, 1, 1);
        assert_eq!(pages.credited_keys(NOW_S).len(), 2);
    }

    /// A machine that meets many peers over the years must not keep a row of each.
    #[test]
    fn rows_of_forgotten_peers_are_deleted() {
        use crate::swarm::rating::{RATINGS_MAX, UNUSED_S_MAX};
        let dir = tempfile::tempdir().unwrap();
        let db = Arc::new(NetDb::open(dir.path()).unwrap());
        let rows = || -> i64 { db.db().reader().unwrap().query_row("SELECT count(*) FROM rating", [], |row| row.get(0)).unwrap() };
        let open = |now_s| Book::open(Some(Arc::clone(&db)), None, now_s).unwrap();
        let meet = |book: &Book, from: u32, count: u32, now_s: u64| {
            for n in from..from + count {
                let peer = SocketAddr::from((std::net::Ipv4Addr::from(0x0a00_0000 + n), 9977));
                let rating = book.lock().rating(peer, now_s);
                book.lock().rate(peer, rating, 1, 1);
            }
            book.save(now_s).unwrap();
        };
        let max = u32::try_from(RATINGS_MAX).unwrap();
        let book = open(NOW_S);
        meet(&book, 0, max, NOW_S);
        meet(&book, max, 10, NOW_S + 1);
        assert_eq!(rows(), i64::from(max), "whom memory forgot");
        drop(book);
        let later = NOW_S + UNUSED_S_MAX + 10;
        let book = open(later);
        meet(&book, 0, 1, later);
        assert_eq!(rows(), 1, "whom a restart found too old");
        meet(&book, 1, 1, later + UNUSED_S_MAX + 1);
        assert_eq!(rows(), 1, "who grew too old meanwhile");
    }

    /// Years of downloads must not become memory.
    #[test]
    fn histories_are_bounded() {
        let mut pages = Pages::default();
        for n in 0..HISTORIES_MAX + 10 {
            let givers = BTreeMap::from([("m".to_owned(), vec![0, 1, 2])]);
            pages.remember(Digest::of(&n.to_le_bytes()), History { givers, ..History::default() });
        }
        assert_eq!((pages.histories.len(), pages.history_pieces), (HISTORIES_MAX, 3 * HISTORIES_MAX));
        assert!(pages.history(&Digest::of(&0usize.to_le_bytes())).is_none());
        let all: Vec<u32> = (0..u32::try_from(HISTORY_PIECES_MAX).unwrap()).collect();
        pages.remember(Digest::of(b"huge"), History { givers: BTreeMap::from([("m".to_owned(), all)]), ..History::default() });
        assert_eq!(pages.histories.len(), 1, "one huge file leaves room for itself alone");
    }
}
