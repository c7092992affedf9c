//! Peers that do what they can to be believed, or to be waited for, over real sockets.

use super::*;
use crate::peer::{Audience, Near, NoFacts, PeerError, PeerServer, ServerLimits, ServerParts, Shelf, Shelved};
use ed25519_dalek::SigningKey;
use std::collections::BTreeSet;
use tokio::sync::watch;

/// Each way of not giving a piece, with a mirror beside: the reader has everything right from the mirror, each piece in one
/// version, whether or not the peer ever ends what it began; and nobody is blamed for being bad at it.
#[tokio::test]
async fn a_faulty_peer_costs_the_mirrors_own_time() {
    let file = file();
    for fault in [Fault::Stalls, Fault::Drips, Fault::Resets, Fault::Twice, Fault::Short, Fault::OtherRange, Fault::Whole] {
        let faulty = FakePeer::start(&file, fault.clone()).await;
        let mirror = TestServer::start(MirrorFault::None, &file).await;
        // The mirror may be done before anybody else is asked: then it is tried again.
        for _ in 0..50 {
            let lab = Lab::new(&[&faulty]);
            let got = lab.right(&file, &[mirror.url()]).await;
            assert_eq!((got.given_by(&faulty), got.mirrored()), (0, 12), "{fault:?}");
            assert!(lab.bad_addresses().is_empty(), "{fault:?}");
            if faulty.pieces() > 0 {
                break;
            }
        }
        assert!(faulty.pieces() > 0, "{fault:?}: nobody asked it");
    }
}

/// The same without a mirror, from an honest peer: its pieces are each taken once.
#[tokio::test]
async fn a_faulty_peer_beside_an_honest_one() {
    let file = file();
    for fault in [Fault::Resets, Fault::OtherRange] {
        let faulty = FakePeer::start(&file, fault.clone()).await;
        let peers = honest(&file, 1).await;
        let lab = Lab::new(&[&faulty, &peers[0]]);
        let got = lab.right(&file, &[]).await;
        assert_eq!((got.given_by(&faulty), got.given_by(&peers[0])), (0, 12), "{fault:?}");
        assert!(faulty.pieces() > 0 && lab.bad_addresses().is_empty(), "{fault:?}");
    }
}

/// Who has other bytes for each that asks is convicted by the first file that is right, whatever he says the next time; and within
/// a download he is never asked for a piece again, so that he cannot take back what he gave.
#[tokio::test]
async fn who_changes_his_bytes() {
    let file = file();
    for with_mirror in [false, true] {
        let fickle = FakePeer::start(&file, Fault::Changes).await;
        let peers = honest(&file, 2).await;
        let mirror = TestServer::start(MirrorFault::None, &file).await;
        let lab = Lab::new(&[&fickle]);
        let urls = if with_mirror { vec![mirror.url()] } else { vec![] };
        // All others come when a piece of his has been taken: they could bring everything before him.
        mirror.answers(false);
        lab.finder.goes_on.store(true, Ordering::Relaxed);
        tokio::join!(lab.right(&file, &urls), async {
            fickle.is_asked(2).await;
            mirror.answers(true);
            lab.finder.finds(&peers);
        });
        assert_eq!(lab.bad_addresses(), [fickle.contact.ip()], "mirror {with_mirror}");
        let asked = fickle.asked.lock().clone();
        assert_eq!(asked.iter().collect::<BTreeSet<_>>().len(), asked.len(), "{asked:?}");
    }
}

/// A shelf with nothing on it.
struct Empty;

impl Shelf for Empty {
    fn find(&self, _: &Digest, _: Audience) -> Option<Shelved> {
        None
    }

    fn damaged(&self, _: &Digest, _: u64) {}
}

/// The server of a machine that has nothing whole, at an address of its own.
fn gives_partials(lab: &Lab, nth: u8) -> PeerServer {
    let parts = ServerParts {
        listen: vec![SocketAddr::from(([127, 200, 0, nth], 0))],
        limits: ServerLimits::default(),
        near: Near::of_machine(),
        shelf: Arc::new(Empty),
        partials: Arc::clone(&lab.partials),
        facts: Arc::new(NoFacts { reachable: true }),
        auth: None,
        key: watch::channel(SigningKey::from_bytes(&[nth; 32])).1,
    };
    PeerServer::start(parts).unwrap()
}

/// A victim downloads through a liar and is asked for pieces meanwhile. Without a list it gives nothing; with a false one it gives
/// what that bears out, under the liar's signature and not its own; and a third node that is misled so convicts the liar's key or
/// nobody, never the victim.
#[tokio::test]
async fn a_victim_is_asked_meanwhile() {
    let file = file();
    let (digest, shape) = (Digest::of(&file), FileShape::of(Digest::of(&file), file.len() as u64));
    let false_file: Vec<u8> = file.iter().map(|byte| byte ^ 0x55).collect();
    let client = PeerClient::new(ClientLimits::default());
    for (nth, with_list) in [(1, false), (2, true)] {
        let list = with_list.then_some((&false_file[..], [9; 32]));
        let liar = FakePeer::with_list(&file, Fault::LiesThenStalls(5), list).await;
        let victim = Lab::new(&[&liar]);
        let server = gives_partials(&victim, nth);
        let contact = server.local()[0];
        let meanwhile = async {
            let has = |pieces: u32| victim.partials.get(&digest, Audience::Stranger).is_some_and(|partial| partial.have.count() == pieces);
            while liar.pieces() < 6 || (with_list && !has(5)) {
                tokio::task::yield_now().await;
            }
            if !with_list {
                let refused = PeerError::Refused { retry_after: None };
                assert_eq!(client.have(contact, &shape).await, Err(refused.clone()));
                assert_eq!(client.list(contact, &shape).await, Err(refused.clone()));
                assert_eq!(client.piece(contact, &shape, 0, || {}).await.map(drop), Err(refused));
                return;
            }
            let signer = client.list(contact, &shape).await.unwrap().signer;
            assert_eq!(signer, SigningKey::from_bytes(&[9; 32]).verifying_key().to_bytes(), "the victim signs nothing");
            let third = Lab::new(&[]);
            // Busy at first, so that the victim is asked for what it has.
            let busy = FakePeer::start(&file, Fault::Full(1)).await;
            *third.finder.found.lock() =
                vec![FoundPeer { contact, key: None, holds: Holds::Part }, FoundPeer { holds: Holds::Perhaps, ..busy.found() }];
            third.right(&file, &[]).await;
            assert_eq!(third.bad_addresses(), Vec::<std::net::IpAddr>::new());
            assert!(server.counters().bytes > 0, "the third node took nothing from the victim");
        };
        tokio::select! {
            got = victim.get(&file, &[], &[]) => panic!("the liar went on: {:?}", got.result),
            () = meanwhile => {}
        }
    }
}

/// Pieces that this process holds in memory and that begin with one of these; other tests hold their own.
fn pieces_in_memory(begins: [[u8; 8]; 2]) -> usize {
    let descriptors = std::fs::read_dir("/proc/self/fd").unwrap().flatten().map(|entry| entry.path());
    let memfds = descriptors.filter(|path| std::fs::read_link(path).is_ok_and(|to| to.to_string_lossy().starts_with("/memfd:")));
    let ours = memfds.filter_map(|path| File::open(path).ok()).filter(|memory| {
        let mut begin = [0; 8];
        memory.read_exact_at(&mut begin, 0).is_ok() && begins.contains(&begin)
    });
    let inodes = ours.map(|memory| std::os::unix::fs::MetadataExt::ino(&memory.metadata().unwrap()));
    inodes.collect::<BTreeSet<u64>>().len()
}

/// Half of a large file was a liar's: what is corrected at the end goes out a few pieces at a time, to a reader that takes its
/// time, and never lies in memory all at once.
#[tokio::test]
async fn corrections_are_handed_over_a_few_at_a_time() {
    let mut file: Vec<u8> = (0..200 * PIECE).map(|at| (at / 11 + at / PIECE * 31) as u8).collect();
    file.chunks_mut(PIECE).for_each(|piece| piece[..8].copy_from_slice(b"corrects"));
    let begins = [*b"corrects", b"corrects".map(|byte| byte ^ 0x55)];
    let liar = FakePeer::start(&file, Fault::Lies((0..200).collect())).await;
    let peers = honest(&file, 1).await;
    // Who is right is found when the liar has given half.
    let lab = Lab::new(&[&liar]);
    lab.finder.goes_on.store(true, Ordering::Relaxed);
    let disk = tempfile::tempfile().unwrap();
    let want = SwarmWant {
        digest: Digest::of(&file),
        size: file.len() as u64,
        urls: vec![],
        missing: (0..200).collect(),
        incoming: Some(Arc::new(disk.try_clone().unwrap().into())),
        repair: false,
        fleet_only: false,
    };
    let (out, mut deliveries) = way();
    let fetching = async {
        let result = lab.swarm.fetch(want, &out, |delivery| delivery).await;
        drop(out);
        result
    };
    let (mut most, mut given) = (0, vec![0; 200]);
    let reading = async {
        while let Some(delivery) = deliveries.recv().await {
            let SwarmDelivery::Piece { index, bytes, .. } = delivery else { continue };
            let mut piece = vec![0; PIECE];
            File::from(bytes).read_exact_at(&mut piece, 0).unwrap();
            disk.write_all_at(&piece, u64::from(index) * PIECE as u64).unwrap();
            given[index as usize] += 1;
            most = most.max(pieces_in_memory(begins));
        }
    };
    let finding = async {
        liar.is_asked(100).await;
        lab.finder.finds(&peers);
    };
    let (result, (), ()) = tokio::join!(fetching, reading, finding);
    assert_eq!(result, Ok(()));
    let mut bytes = vec![0; file.len()];
    disk.read_exact_at(&mut bytes, 0).unwrap();
    assert!(bytes == file);
    let corrected = given.iter().filter(|times| **times > 1).count();
    assert!(corrected > 60, "the liar gave {corrected} pieces only: nothing was tried");
    assert!(most <= 50, "{most} pieces in memory");
}

/// One connection that breaks is tried again here: told as a failure it would put the mirror out for a fleet's whole group, and the
/// machine would wait for others in vain.
#[tokio::test]
async fn a_mirrors_broken_connection_is_no_failure() {
    let file = file();
    let mirror = TestServer::start(MirrorFault::Reset { after: 1000, times: 1 }, &file).await;
    let url = MirrorUrl { url: mirror.url(), proxy: None, immutable: true, private: false };
    let ranged = crate::mirror::RangedFile::new(Digest::of(&file), file.len() as u64, vec![url]);
    let span = PIECE as u64..2 * PIECE as u64;
    let (_, digest) = download::mirror_range(&Mirror::new(MirrorLimits::default()), &ranged, &span, || {}).await.unwrap();
    assert_eq!((digest, mirror.seen().len()), (Digest::of(&file[PIECE..2 * PIECE]), 2));
}

/// What strangers are not to hear of is neither looked for among them nor announced nor given to them while it arrives: it comes from
/// the mirror, though a peer is at hand.
#[tokio::test]
async fn what_strangers_are_not_to_hear_of() {
    let file = file();
    let peers = honest(&file, 1).await;
    for (status, repair) in [(None, false), (Some(503), false), (None, true), (Some(503), true)] {
        let mirror = TestServer::start(status.map_or(MirrorFault::None, MirrorFault::Status), &file).await;
        let lab = Lab::new(&refs(&peers));
        let want = SwarmWant {
            digest: Digest::of(&file),
            size: file.len() as u64,
            urls: vec![MirrorUrl { url: mirror.url(), proxy: None, immutable: true, private: false }],
            missing: if repair { vec![2] } else { (0..12).collect() },
            incoming: None,
            repair,
            fleet_only: true,
        };
        let (out, mut deliveries) = way();
        let fetching = async {
            let result = lab.swarm.fetch(want, &out, |delivery| delivery).await;
            drop(out);
            result
        };
        let taking = async { while deliveries.recv().await.is_some() {} };
        let (result, ()) = tokio::join!(fetching, taking);
        assert_eq!(result.is_ok(), status.is_none(), "repair {repair}: {result:?}");
        assert_eq!((peers[0].pieces(), lab.finder.searches.load(Ordering::Relaxed)), (0, 0));
        assert!(lab.announced.0.lock().is_empty() && lab.partials.is_empty());
    }
}
