//! Many liars at once, and a fleet that nobody can be found of, over real sockets.

use super::*;
use crate::dht::{Family, Network};
use crate::fleet::FleetOptions;
use crate::fleet::auth::FleetKey;
use crate::node::{Dht, NodeOptions};
use crate::swarm::blame::WASTE_BYTES_MAX;

const LIARS: u8 = 50;

/// File after file, each for the first time: no two alike.
fn files() -> impl Iterator<Item = Vec<u8>> {
    (0..).map(|nth: usize| (0..2 * PIECE + 4321).map(|at| (at / 7 + at / PIECE * 29 + nth * 3) as u8).collect())
}

/// Fifty liars with fresh keys lie about every piece of one file after another, with a mirror and one honest peer beside them.
/// Every file is right, none of them ever has two pieces in flight, they waste no more than an hour may, no honest peer is
/// blamed, and in the end each that was asked often enough is out.
async fn fifty_liars(address: impl Fn(u8) -> [u8; 4]) {
    let mut asked = 0;
    let lab = Lab::on(&[], true, None);
    let mut sent = 0;
    for file in files().take(12) {
        let mut liars = Vec::new();
        for nth in 1..=LIARS {
            let false_file: Vec<u8> = file.iter().map(|byte| byte ^ 0x55).collect();
            let list = (nth % 2 == 0).then_some((&false_file[..], [nth; 32]));
            liars.push(FakePeer::at(address(nth), &file, Fault::Lies((0..3).collect()), list).await);
        }
        let peers = honest(&file, 1).await;
        *lab.finder.found.lock() = liars.iter().chain(&peers).map(FakePeer::found).collect();
        let mirror = TestServer::start(MirrorFault::None, &file).await;
        lab.right(&file, &[mirror.url()]).await;
        asked += liars.iter().map(FakePeer::pieces).sum::<usize>();
        sent += liars.iter().map(|liar| liar.sent_bytes.load(Ordering::Relaxed)).sum::<usize>();
        assert!(liars.iter().all(|liar| liar.at_once_max.load(Ordering::Relaxed) <= 1), "an unknown peer has one piece in flight");
        let blamed = lab.bad_addresses();
        assert!(peers.iter().all(|peer| !blamed.contains(&peer.contact.ip())), "{blamed:?}");
        assert!(sent as u64 <= WASTE_BYTES_MAX + 2 * file.len() as u64, "{sent} bytes of lies");
    }
    // Without a mirror they are asked for sure; what is proved of them then holds.
    let file = files().nth(20).unwrap();
    let liars = [FakePeer::at(address(1), &file, Fault::Lies((0..3).collect()), None).await];
    let peers = honest(&file, 2).await;
    *lab.finder.found.lock() = liars.iter().chain(&peers).map(FakePeer::found).collect();
    lab.right(&file, &[]).await;
    asked += liars[0].pieces();
    assert!(asked > 0, "nobody asked them: nothing was tried");
    let blamed = lab.bad_addresses();
    assert!(blamed.iter().all(|bad| (1..=LIARS).any(|nth| *bad == std::net::IpAddr::from(address(nth)))), "{blamed:?}");
}

/// All in one /24: of those never two are asked for lists.
#[tokio::test]
async fn fifty_liars_in_one_network() {
    fifty_liars(|nth| [127, 77, 0, nth]).await;
}

/// Each in a /24 of its own.
#[tokio::test]
async fn fifty_liars_in_fifty_networks() {
    fifty_liars(|nth| [127, 78, nth, 1]).await;
}

/// A liar who says of all his bytes that the file is still arriving cannot be told from a victim, and is not convicted: he costs what
/// may be wasted in an hour, and then no peer is asked any more.
#[tokio::test]
async fn a_liar_who_says_that_all_is_arriving() {
    const LEFT: u64 = 3_000_000;
    let lab = Lab::new(&[]);
    {
        let mut book = lab.swarm.book.lock();
        assert!(book.budget.take_round(std_now()));
        book.budget.charge(WASTE_BYTES_MAX - LEFT, std_now());
    }
    let (mut sent, mut had) = (0, 0);
    for file in files().take(60) {
        let liar = FakePeer::at([127, 80, 0, 1], &file, Fault::PassesOnLies((0..3).collect()), None).await;
        let peers = honest(&file, 1).await;
        *lab.finder.found.lock() = vec![liar.found(), peers[0].found()];
        let mirror = TestServer::start(MirrorFault::Status(503), &file).await;
        let got = lab.get(&file, &[mirror.url()], &[]).await;
        sent += liar.sent_bytes.load(Ordering::Relaxed) as u64;
        had += u32::from(got.result.is_ok());
        assert!(got.result.is_err() || got.bytes == file);
        assert!(sent <= LEFT + 2 * file.len() as u64, "{sent} bytes of lies");
        if liar.pieces() == 0 && peers[0].pieces() == 0 {
            assert!(had > 0 && sent > 0, "nothing was tried: {had} files, {sent} bytes of lies");
            assert!(lab.bad_addresses().is_empty());
            return;
        }
    }
    panic!("after {sent} bytes of lies peers are still asked");
}

/// A fleet whose seeds are all dead has no members: a machine of it takes the way of a lone machine at once, one stream of the
/// mirror for each file, and nothing fails.
#[tokio::test]
async fn a_fleet_whose_seeds_are_dead() {
    let dht = Dht::start(NodeOptions::new(vec![SocketAddr::from(([127, 79, 0, 1], 0))], Network::Private), None).await.unwrap();
    let port = dht.local(Family::V4).unwrap().port();
    // A name server that is not there, and one that knows nothing.
    let nothing = crate::discovery::tests::name_server(Vec::new()).await;
    let options = FleetOptions {
        seeds: vec!["dead.test".to_owned(), "missing.test".to_owned()],
        name_servers: vec![SocketAddr::from(([127, 79, 0, 2], 9)), nothing],
        ..FleetOptions::new(Some(FleetKey::new([7; 32])), port)
    };
    let fleet = Fleet::start(&dht, options, None).await;
    let lab = Lab::on(&[], false, Some(fleet.clone()));
    for file in files().take(3) {
        let mirror = TestServer::start(MirrorFault::None, &file).await;
        let got = lab.right(&file, &[mirror.url()]).await;
        assert_eq!(got.mirrored(), 3);
        let seen = mirror.seen();
        assert_eq!((seen.len(), seen[0].range.clone()), (1, None));
    }
    assert_eq!(fleet.members(), 0);
}
