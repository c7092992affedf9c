//! Downloads over real sockets on loopback: honest peers, liars, faulty ones and mirrors. What is asserted is bytes, who gave
//! them and who was convicted; never a time.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "tests")]

mod crowds;
mod fake;
mod hostile;
mod pairs;
mod pieces;
mod statements;

use super::*;
use crate::mirror::MirrorLimits;
use crate::mirror::testserver::{Fault as MirrorFault, TestServer};
use crate::peer::ClientLimits;
use crate::swarm::blame::AddressRecord;
use fake::{FakeFinder, FakePeer, Fault};
use poolfs_core::piece::PIECE_BYTES;
use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::sync::atomic::Ordering;

const PIECE: usize = PIECE_BYTES as usize;

/// Eleven pieces and a tail, no two alike.
fn file() -> Vec<u8> {
    (0..11 * PIECE + 4321).map(|at| (at / 7 + at / PIECE * 29) as u8).collect()
}

#[derive(Default)]
struct Announced(Mutex<Vec<(Digest, bool)>>, Mutex<Vec<Digest>>);

impl Announcer for Announced {
    fn begun(&self, digest: Digest, _size: u64) {
        self.0.lock().push((digest, true));
    }

    fn ended(&self, digest: Digest) {
        self.0.lock().push((digest, false));
    }

    fn checked(&self, _: Digest, pieces: &[Digest]) {
        self.1.lock().extend(pieces);
    }

    fn unchecked(&self, _: Digest) {
        self.1.lock().clear();
    }
}

/// A machine that downloads.
struct Lab {
    dir: tempfile::TempDir,
    finder: Arc<FakeFinder>,
    announced: Arc<Announced>,
    partials: Arc<Partials>,
    swarm: Arc<Swarm>,
}

/// What came of a download.
struct Got {
    result: Result<(), SwarmError>,
    /// The incoming file at the end.
    bytes: Vec<u8>,
    /// Pieces by giver, with those that were replaced.
    givers: BTreeMap<Giver, Vec<u32>>,
}

impl Got {
    fn given_by(&self, peer: &FakePeer) -> usize {
        self.givers.get(&Giver::Peer(peer.contact)).map_or(0, Vec::len)
    }

    fn mirrored(&self) -> usize {
        self.givers.iter().filter(|(giver, _)| matches!(giver, Giver::Mirror(_))).map(|(_, pieces)| pieces.len()).sum()
    }
}

impl Lab {
    fn new(peers: &[&FakePeer]) -> Self {
        Self::set_up(peers, false, None, None)
    }

    /// On a network with strangers or not, and in a fleet or not.
    fn on(peers: &[&FakePeer], public: bool, fleet: Option<Fleet>) -> Self {
        Self::set_up(peers, public, fleet, None)
    }

    /// Telling what is proved.
    fn telling(peers: &[&FakePeer], convictions: Option<mpsc::Sender<Conviction>>) -> Self {
        Self::set_up(peers, false, None, convictions)
    }

    fn set_up(peers: &[&FakePeer], public: bool, fleet: Option<Fleet>, convictions: Option<mpsc::Sender<Conviction>>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (finder, announced, partials) = (Arc::<FakeFinder>::default(), Arc::<Announced>::default(), Arc::<Partials>::default());
        *finder.found.lock() = peers.iter().map(|peer| peer.found()).collect();
        let long = Duration::from_secs(300);
        let limits = MirrorLimits { connect: long, first_byte: long, stall: long, rate_window: long, ..MirrorLimits::default() };
        let parts = SwarmParts {
            mirror: Arc::new(Mirror::new(limits)),
            client: PeerClient::new(ClientLimits::default()),
            finder: Arc::clone(&finder) as Arc<dyn Finder>,
            announcer: Arc::clone(&announced) as Arc<dyn Announcer>,
            partials: Arc::clone(&partials),
            netdb: Some(Arc::new(NetDb::open(dir.path()).unwrap())),
            spill_dir: dir.path().to_owned(),
            public,
            fleet,
            convictions,
        };
        let swarm = Swarm::new(parts).unwrap();
        Self { dir, finder, announced, partials, swarm }
    }

    /// Downloads what is missing of `file` as the mounts do: each piece is written before the next one is taken.
    async fn get(&self, file: &[u8], urls: &[String], here: &[(u32, Vec<u8>)]) -> Got {
        let incoming = self.dir.path().join(Digest::of(file).to_string());
        let disk = File::options().create(true).truncate(false).read(true).write(true).open(&incoming).unwrap();
        disk.set_len(file.len() as u64).unwrap();
        for (index, bytes) in here {
            disk.write_all_at(bytes, u64::from(*index) * PIECE as u64).unwrap();
        }
        let missing = (0..file.len().div_ceil(PIECE) as u32).filter(|index| !here.iter().any(|(here, _)| here == index));
        let url = |url: &String| MirrorUrl { url: url.clone(), proxy: None, immutable: true, private: false };
        let want = SwarmWant {
            digest: Digest::of(file),
            size: file.len() as u64,
            urls: urls.iter().map(url).collect(),
            missing: missing.collect(),
            incoming: Some(Arc::new(File::open(&incoming).unwrap().into())),
            repair: false,
            fleet_only: false,
        };
        let (out, mut deliveries) = way();
        let mut givers: BTreeMap<Giver, Vec<u32>> = BTreeMap::new();
        let fetching = async {
            let result = self.swarm.fetch(want, &out, |delivery| delivery).await;
            drop(out);
            result
        };
        let writing = async {
            while let Some(delivery) = deliveries.recv().await {
                if let SwarmDelivery::Piece { index, bytes, giver } = delivery {
                    let memory = File::from(bytes);
                    let mut bytes = vec![0; memory.metadata().unwrap().len() as usize];
                    memory.read_exact_at(&mut bytes, 0).unwrap();
                    disk.write_all_at(&bytes, u64::from(index) * PIECE as u64).unwrap();
                    givers.entry(giver).or_default().push(index);
                }
            }
        };
        let (result, ()) = tokio::join!(fetching, writing);
        Got { result, bytes: std::fs::read(&incoming).unwrap(), givers }
    }

    /// Downloads and checks that it is right.
    async fn right(&self, file: &[u8], urls: &[String]) -> Got {
        let got = self.get(file, urls, &[]).await;
        assert_eq!(got.result, Ok(()));
        assert!(got.bytes == file, "wrong bytes were called right");
        got
    }

    fn bad(&self) -> Vec<SocketAddr> {
        let rows = self.swarm.peers();
        let out = |row: &&PeerRow| row.bad > 0 || row.out_until > 0;
        rows.iter().filter(out).map(|row| row.address).collect()
    }

    fn bad_addresses(&self) -> Vec<std::net::IpAddr> {
        let book = self.swarm.book.lock();
        let bad: Vec<(&std::net::IpAddr, &AddressRecord)> = book.verdicts.addresses().collect();
        bad.into_iter().map(|(address, _)| *address).collect()
    }
}

async fn honest(file: &[u8], count: usize) -> Vec<FakePeer> {
    let mut peers = Vec::new();
    for _ in 0..count {
        peers.push(FakePeer::start(file, Fault::None).await);
    }
    peers
}

fn refs(peers: &[FakePeer]) -> Vec<&FakePeer> {
    peers.iter().collect()
}

/// With nobody found the mirror gets the one plain GET that it always got.
#[tokio::test]
async fn without_peers_it_is_one_stream() {
    let file = file();
    let mirror = TestServer::start(MirrorFault::None, &file).await;
    let lab = Lab::new(&[]);
    let got = lab.right(&file, &[mirror.url()]).await;
    assert_eq!(got.mirrored(), 12);
    let seen = mirror.seen();
    assert_eq!((seen.len(), seen[0].range.clone()), (1, None));
    let why = lab.swarm.why(&Digest::of(&file)).unwrap();
    assert_eq!(why.givers, BTreeMap::from([("127.0.0.1".to_owned(), (0..12).collect::<Vec<u32>>())]));
}

/// Every length at which the arithmetic between the swarm's pieces and the mounts' can be off by one, from peers alone.
#[tokio::test]
async fn every_length_from_peers_alone() {
    for len in [1, PIECE - 1, PIECE, PIECE + 1, 2 * PIECE - 1, 2 * PIECE, 2 * PIECE + 1, 3 * PIECE, 5 * PIECE + 77] {
        let file = &file()[..len];
        let peers = honest(file, 2).await;
        let lab = Lab::new(&refs(&peers));
        let got = lab.right(file, &[]).await;
        assert_eq!(got.givers.values().map(Vec::len).sum::<usize>(), len.div_ceil(PIECE), "{len}");
        assert_eq!(got.mirrored(), 0, "{len}");
        assert!(lab.bad().is_empty(), "{len}");
    }
}

/// Several peers share a file, and it can be told afterwards who gave what.
#[tokio::test]
async fn peers_share_a_file() {
    let file = file();
    let peers = honest(&file, 4).await;
    let lab = Lab::new(&refs(&peers));
    let got = lab.right(&file, &[]).await;
    assert!(peers.iter().all(|peer| got.given_by(peer) > 0), "{:?}", got.givers);
    let why = lab.swarm.why(&Digest::of(&file)).unwrap();
    let told: BTreeMap<String, Vec<u32>> = got
        .givers
        .iter()
        .map(|(giver, pieces)| {
            let Giver::Peer(peer) = giver else { panic!("{giver:?}") };
            let mut pieces = pieces.clone();
            pieces.sort_unstable();
            (peer.to_string(), pieces)
        })
        .collect();
    assert_eq!(why.givers, told);
    let rows = lab.swarm.peers();
    // Near the end a piece may be asked of two.
    assert!(rows.len() == 4 && rows.iter().map(|row| row.pieces).sum::<u64>() >= 12);
    assert!(rows.iter().all(|row| row.credited));
    let told = lab.announced.0.lock().clone();
    assert_eq!(told, [(Digest::of(&file), true), (Digest::of(&file), false)]);
    assert!(lab.partials.is_empty());
}

/// One honest peer and one liar, whichever piece he lies in, without a mirror and with one: right bytes, and only the liar has
/// a record.
#[tokio::test]
async fn one_liar() {
    let file = file();
    for lies in [vec![0], vec![5], vec![11], (0..12).collect()] {
        for with_mirror in [false, true] {
            let liar = FakePeer::start(&file, Fault::Lies(lies.clone())).await;
            let peers = honest(&file, 2).await;
            let mirror = TestServer::start(MirrorFault::None, &file).await;
            let lab = Lab::new(&[&liar, &peers[0], &peers[1]]);
            let urls = if with_mirror { vec![mirror.url()] } else { vec![] };
            lab.right(&file, &urls).await;
            // His answers may have lost against others': near the end, or against a mirror that brings everything before him.
            let bad = lab.bad_addresses();
            let nobody = bad.is_empty() && (lies.len() == 1 || with_mirror);
            assert!(nobody || bad == [liar.contact.ip()], "lies in {lies:?}, mirror {with_mirror}: {bad:?}");
            assert!(peers.iter().map(|peer| peer.pieces()).sum::<usize>() <= 3 * 12);
        }
    }
}

/// A liar among two sources and no mirror: other combinations of what is here are tried.
#[tokio::test]
async fn one_liar_and_one_honest_peer() {
    let file = file();
    let liar = FakePeer::start(&file, Fault::Lies((0..12).collect())).await;
    let peers = honest(&file, 1).await;
    let lab = Lab::new(&[&liar, &peers[0]]);
    lab.right(&file, &[]).await;
    assert_eq!(lab.bad_addresses(), [liar.contact.ip()]);
    // The next file tells: two in different files, and he is asked nothing more.
    let other: Vec<u8> = file.iter().map(|byte| byte.wrapping_add(1)).collect();
    let honest = FakePeer::start(&other, Fault::None).await;
    *lab.finder.found.lock() = vec![liar.found(), honest.found()];
    let before = liar.pieces();
    lab.right(&other, &[]).await;
    assert_eq!(liar.pieces(), before);
}

/// A victim that passes on what a liar gave it, and says that it has not seen the whole file, is not convicted for it as a liar is.
#[tokio::test]
async fn who_passes_lies_on_is_not_convicted() {
    let file = file();
    for lies in [vec![5], (0..12).collect::<Vec<u32>>()] {
        let victim = FakePeer::start(&file, Fault::PassesOnLies(lies)).await;
        let peers = honest(&file, 2).await;
        let lab = Lab::new(&[&victim, &peers[0], &peers[1]]);
        lab.right(&file, &[]).await;
        assert_eq!((lab.bad_addresses(), victim.pieces() > 0), (vec![], true));
    }
}

/// Who gives other bytes each time is proved, whatever the file turns out to be.
#[tokio::test]
async fn a_liar_alone_without_a_mirror_is_no_file() {
    let file = file();
    let liar = FakePeer::start(&file, Fault::Lies(vec![3])).await;
    let lab = Lab::new(&[&liar]);
    let got = lab.get(&file, &[], &[]).await;
    assert!(matches!(got.result, Err(SwarmError::Nowhere { .. })), "{:?}", got.result);
    assert!(lab.bad_addresses().is_empty(), "nothing is proved without the truth");
    assert!(lab.swarm.why(&Digest::of(&file)).is_none());
}

/// Two who lie alike are believed by no majority where there is a mirror; without one, nobody is blamed and nothing is had.
#[tokio::test]
async fn two_colluders() {
    let file = file();
    let liars = [FakePeer::start(&file, Fault::Lies(vec![4])).await, FakePeer::start(&file, Fault::Lies(vec![4])).await];
    let mirror = TestServer::start(MirrorFault::None, &file).await;
    let lab = Lab::new(&[&liars[0], &liars[1]]);
    lab.right(&file, &[mirror.url()]).await;
    let lied = |liar: &FakePeer| liar.asked.lock().contains(&4);
    let want: Vec<_> = liars.iter().filter(|liar| lied(liar)).map(|liar| liar.contact.ip()).collect();
    assert!(lab.bad_addresses().iter().all(|bad| want.contains(bad)));
    let lab = Lab::new(&[&liars[0], &liars[1]]);
    let got = lab.get(&file, &[], &[]).await;
    assert!(matches!(got.result, Err(SwarmError::Nowhere { .. })), "{:?}", got.result);
    assert!(lab.bad_addresses().is_empty());
}

/// One byte short, twice the length, everything to a Range, 404, a peer that is gone: no corruption, no verdict, the file comes
/// from the others, and bytes past a range are not taken.
#[tokio::test]
async fn faulty_peers() {
    let file = file();
    for fault in [Fault::Short, Fault::Twice, Fault::Whole, Fault::NotFound, Fault::Dies(2), Fault::Full(1)] {
        let faulty = FakePeer::start(&file, fault.clone()).await;
        let peers = honest(&file, 2).await;
        let lab = Lab::new(&[&faulty, &peers[0], &peers[1]]);
        let got = lab.right(&file, &[]).await;
        assert!(lab.bad_addresses().is_empty(), "{fault:?}");
        let useful = matches!(fault, Fault::Dies(_) | Fault::Full(_));
        assert!(useful || got.given_by(&faulty) == 0, "{fault:?}");
    }
}

/// A peer that stalls and one that drips: their pieces are asked of others once they are overdue.
#[tokio::test]
async fn silent_peers_are_hedged() {
    let file = file();
    for fault in [Fault::Stalls, Fault::Drips] {
        let silent = FakePeer::start(&file, fault.clone()).await;
        let peers = honest(&file, 1).await;
        let lab = Lab::new(&[&silent, &peers[0]]);
        let got = lab.right(&file, &[]).await;
        assert_eq!(got.given_by(&silent), 0, "{fault:?}");
        assert!(lab.bad_addresses().is_empty(), "{fault:?}");
    }
}

/// Every peer dies in the middle: the mirror gives the rest. And without one the download says so.
#[tokio::test]
async fn all_peers_die() {
    let file = file();
    let mirror = TestServer::start(MirrorFault::None, &file).await;
    let dying = [FakePeer::start(&file, Fault::Dies(2)).await, FakePeer::start(&file, Fault::Dies(1)).await];
    let lab = Lab::new(&[&dying[0], &dying[1]]);
    let got = lab.right(&file, &[mirror.url()]).await;
    assert!(got.mirrored() >= 9, "{:?}", got.givers);
    let dying = [FakePeer::start(&file, Fault::Dies(2)).await, FakePeer::start(&file, Fault::Dies(1)).await];
    let lab = Lab::new(&[&dying[0], &dying[1]]);
    let got = lab.get(&file, &[], &[]).await;
    assert!(matches!(&got.result, Err(SwarmError::NotNow { why }) if why.contains("no source gives piece")), "{:?}", got.result);
}

/// A mirror that fails leaves it to peers, small files too; both failing names the mirror.
#[tokio::test]
async fn a_mirror_that_fails() {
    for len in [1000, 11 * PIECE] {
        let file = &file()[..len];
        let mirror = TestServer::start(MirrorFault::Status(404), file).await;
        let peers = honest(file, 1).await;
        let lab = Lab::new(&refs(&peers));
        let got = lab.right(file, &[mirror.url()]).await;
        assert_eq!(got.given_by(&peers[0]), len.div_ceil(PIECE));
        let lab = Lab::new(&[]);
        let got = lab.get(file, &[mirror.url()], &[]).await;
        assert!(matches!(&got.result, Err(SwarmError::NotNow { why }) if why.contains("127.0.0.1: answered 404")), "{:?}", got.result);
    }
}

/// A mirror that replaces the file between two ranges, sends a page, or knows no ranges: no peer is blamed, and the peers finish.
#[tokio::test]
async fn a_mirror_that_changes() {
    let file = file();
    for fault in [
        MirrorFault::ReplacedBetweenRanges,
        MirrorFault::ReplacedAndCareless,
        MirrorFault::Html,
        MirrorFault::NoRanges,
        MirrorFault::WrongContentRange,
        MirrorFault::WrongTotal,
    ] {
        let mirror = TestServer::start(fault.clone(), &file).await;
        let peers = honest(&file, 2).await;
        let lab = Lab::new(&refs(&peers));
        let got = lab.get(&file, &[mirror.url()], &[]).await;
        assert_eq!((got.result, got.bytes == file), (Ok(()), true), "{fault:?}");
        assert!(lab.bad_addresses().is_empty(), "{fault:?}");
    }
}

/// A small file is asked of the mirror alone where searches are slow, and of peers first where they are quick.
#[tokio::test]
async fn small_files() {
    let file = &file()[..2 * PIECE];
    let peers = honest(file, 1).await;
    let mirror = TestServer::start(MirrorFault::None, file).await;
    let lab = Lab::new(&refs(&peers));
    let got = lab.right(file, &[mirror.url()]).await;
    assert_eq!((got.mirrored(), lab.finder.searches.load(Ordering::Relaxed)), (2, 0));
    *lab.finder.median.lock() = Some(Duration::from_millis(20));
    let got = lab.right(file, &[mirror.url()]).await;
    assert_eq!((got.given_by(&peers[0]), lab.finder.searches.load(Ordering::Relaxed)), (2, 1));
    *lab.finder.median.lock() = Some(HEAD_START);
    let got = lab.right(file, &[mirror.url()]).await;
    assert_eq!((got.mirrored(), lab.finder.searches.load(Ordering::Relaxed)), (2, 1));
}

/// Whatever is private is asked of its mirror alone, also when the mirror fails.
#[tokio::test]
async fn private_files_are_never_asked_of_others() {
    let file = file();
    let peers = honest(&file, 1).await;
    let mirror = TestServer::start(MirrorFault::Status(500), &file).await;
    let lab = Lab::new(&refs(&peers));
    let url = MirrorUrl { url: mirror.url(), proxy: None, immutable: true, private: true };
    let want = SwarmWant {
        digest: Digest::of(&file),
        size: file.len() as u64,
        urls: vec![url],
        missing: (0..12).collect(),
        incoming: None,
        repair: false,
        fleet_only: false,
    };
    let (out, _deliveries) = way();
    let result = lab.swarm.fetch(want, &out, |delivery| delivery).await;
    assert!(matches!(result, Err(SwarmError::NotNow { .. })), "{result:?}");
    assert_eq!((peers[0].pieces(), lab.finder.searches.load(Ordering::Relaxed)), (0, 0));
    assert!(lab.announced.0.lock().is_empty());
}

/// What is here from an earlier run is not asked for again; where it is rotten, the swarm finds and replaces it.
#[tokio::test]
async fn goes_on_with_what_is_here() {
    let file = file();
    let piece = |index: u32| file[index as usize * PIECE..][..PIECE].to_vec();
    let peers = honest(&file, 2).await;
    let lab = Lab::new(&refs(&peers));
    let got = lab.get(&file, &[], &[(0, piece(0)), (4, piece(4))]).await;
    assert_eq!((got.result.clone(), got.bytes == file), (Ok(()), true));
    let asked: Vec<u32> = peers.iter().flat_map(|peer| peer.asked.lock().clone()).collect();
    assert!(!asked.contains(&0) && !asked.contains(&4), "{asked:?}");

    let lab = Lab::new(&refs(&peers));
    let got = lab.get(&file, &[], &[(0, vec![7; PIECE]), (4, piece(4))]).await;
    assert_eq!((got.result.clone(), got.bytes == file), (Ok(()), true));
    assert!(lab.bad_addresses().is_empty());
}

/// A signed list tells a wrong piece at once: it costs that piece and no second round, and the download is offered to others.
#[tokio::test]
async fn a_signed_list() {
    let file = file();
    let liar = FakePeer::start(&file, Fault::Lies((0..12).collect())).await;
    let mut peers = Vec::new();
    for key in [1, 2] {
        peers.push(FakePeer::with_list(&file, Fault::None, Some((&file, [key; 32]))).await);
    }
    let lab = Lab::new(&[&peers[0], &peers[1], &liar]);
    lab.right(&file, &[]).await;
    let asked: usize = peers.iter().map(FakePeer::pieces).sum();
    assert!(asked <= 12 + 4, "{asked} pieces for a file of 12: the liar's were repeated, not the file");
    assert!(lab.bad_addresses().iter().all(|bad| *bad == liar.contact.ip() && liar.pieces() > 0));
}

/// A false list with an accomplice costs one deciding piece; its signer's key is out, and no honest peer has a record.
#[tokio::test]
async fn a_false_list() {
    let file = file();
    let mut false_file = file.clone();
    false_file[3 * PIECE..4 * PIECE].iter_mut().for_each(|byte| *byte ^= 0x55);
    let liar = FakePeer::with_list(&file, Fault::Lies(vec![3]), Some((&false_file, [9; 32]))).await;
    let honest = FakePeer::with_list(&file, Fault::None, Some((&file, [1; 32]))).await;
    let mirror = TestServer::start(MirrorFault::None, &file).await;
    let lab = Lab::new(&[&liar, &honest]);
    lab.right(&file, &[mirror.url()]).await;
    let key = |byte: u8| ed25519_dalek::SigningKey::from_bytes(&[byte; 32]).verifying_key().to_bytes();
    let book = lab.swarm.book.lock();
    assert!(!book.verdicts.key_is_out(&key(1), now_s()));
    assert!(book.verdicts.key_is_out(&key(9), now_s()) || !liar.asked.lock().contains(&3));
    assert!(!book.verdicts.address_is_out(honest.contact.ip(), now_s()));
    drop(book);
    let told = |peer: &FakePeer| lab.swarm.peers().iter().any(|row| row.address == peer.contact && row.false_lists > 0);
    assert!(!told(&honest));
    assert!(told(&liar) || !liar.asked.lock().contains(&3), "people are to see who handed it over");
}

/// Fifty liars with addresses and keys of their own, one after another: what they may waste in an hour is bounded, and every
/// file comes from the mirror in the end.
#[tokio::test]
async fn fifty_liars() {
    let file = file();
    let mirror = TestServer::start(MirrorFault::None, &file).await;
    let mut liars = Vec::new();
    for _ in 0..50 {
        liars.push(FakePeer::start(&file, Fault::Lies((0..12).collect())).await);
    }
    let lab = Lab::new(&refs(&liars));
    for _ in 0..4 {
        lab.right(&file, &[mirror.url()]).await;
    }
    let sent: usize = liars.iter().map(|liar| liar.sent_bytes.load(Ordering::Relaxed)).sum();
    let bound = 4 * file.len() + crate::swarm::blame::WASTE_BYTES_MAX as usize;
    assert!(sent <= bound, "{sent} bytes were wasted, allowed are {bound}");
}

/// With the receiver gone everything ends, and what others were told is taken back.
#[tokio::test]
async fn ends_with_its_receiver() {
    let file = file();
    let stalled = FakePeer::start(&file, Fault::Stalls).await;
    let lab = Lab::new(&[&stalled]);
    let want = SwarmWant {
        digest: Digest::of(&file),
        size: file.len() as u64,
        urls: vec![],
        missing: (0..12).collect(),
        incoming: None,
        repair: false,
        fleet_only: false,
    };
    let (out, deliveries) = way();
    let asked = async {
        while stalled.pieces() == 0 {
            tokio::task::yield_now().await;
        }
        drop(deliveries);
    };
    let (result, ()) = tokio::join!(lab.swarm.fetch(want, &out, |delivery| delivery), asked);
    assert_eq!(result, Err(SwarmError::Unwanted));
    assert_eq!(*lab.announced.0.lock(), [(Digest::of(&file), true), (Digest::of(&file), false)]);
}

/// A damaged piece comes from the mirror, from peers where it fails, and not twice from the peer that gave it wrong.
#[tokio::test]
async fn repairs() {
    let file = file();
    let liar = FakePeer::start(&file, Fault::Lies(vec![2])).await;
    let peers = honest(&file, 1).await;
    let mirror = TestServer::start(MirrorFault::Status(503), &file).await;
    let lab = Lab::new(&[&liar, &peers[0]]);
    let attempt = async || {
        let url = MirrorUrl { url: mirror.url(), proxy: None, immutable: true, private: false };
        let (digest, size) = (Digest::of(&file), file.len() as u64);
        let want = SwarmWant { digest, size, urls: vec![url], missing: vec![2], incoming: None, repair: true, fleet_only: false };
        let (out, mut deliveries) = way();
        lab.swarm.fetch(want, &out, |delivery| delivery).await.unwrap();
        let Some(SwarmDelivery::Piece { index: 2, bytes, giver: Giver::Peer(peer) }) = deliveries.recv().await else { panic!() };
        let mut piece = vec![0; PIECE];
        File::from(bytes).read_exact_at(&mut piece, 0).unwrap();
        let right = piece == file[2 * PIECE..3 * PIECE];
        lab.swarm.verdict(&digest, right);
        (peer, right)
    };
    assert_eq!(attempt().await, (liar.contact, false));
    assert_eq!(attempt().await, (peers[0].contact, true));
}
