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
        let lab = Lab::new(&[&faulty]);
        let got = lab.right(&file, &[mirror.url()]).await;
        assert_eq!((got.given_by(&faulty), got.mirrored()), (0, 12), "{fault:?}");
        assert!(faulty.pieces() > 0, "{fault:?}: nobody asked it");
        assert!(lab.bad_addresses().is_empty(), "{fault:?}");
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
        let lab = Lab::new(&[&fickle, &peers[0], &peers[1]]);
        let urls = if with_mirror { vec![mirror.url()] } else { vec![] };
        lab.right(&file, &urls).await;
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
