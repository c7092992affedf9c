//! Two bad things at once: what holds against each of them alone must hold against both.
//!
//! Every pair of faulty or false peers, and every one of them beside every faulty mirror, always with two honest peers. What is
//! asserted is what the reader gets, who is blamed and what it cost; when is the schedule's matter, under its own clock.

use super::*;
use futures_util::{StreamExt as _, stream};
use std::net::IpAddr;

/// Downloads at a time: most of them wait.
const AT_ONCE: usize = 12;

/// Four pieces and a tail.
fn small_file() -> Vec<u8> {
    file()[..4 * PIECE + 99].to_vec()
}

/// Each way to be bad at it, and to lie: in the first piece, a middle one, the last, all, and in each answer otherwise.
fn faults() -> Vec<Fault> {
    vec![
        Fault::Lies(vec![0]),
        Fault::Lies(vec![2]),
        Fault::Lies(vec![4]),
        Fault::Lies((0..5).collect()),
        Fault::Changes,
        Fault::LiesThenStalls(1),
        Fault::Resets,
        Fault::OtherRange,
        Fault::Short,
        Fault::Drips,
        Fault::Twice,
        Fault::Whole,
        Fault::Stalls,
        Fault::Dies(1),
        Fault::NotFound,
        Fault::Full(1),
    ]
}

fn lies(fault: &Fault) -> bool {
    matches!(fault, Fault::Lies(_) | Fault::Changes | Fault::LiesThenStalls(_))
}

/// One download from these and two honest peers: right, nobody blamed who did not lie, and within four times its bytes from each
/// side of the table.
async fn download(bad: Vec<Fault>, mirror: Option<MirrorFault>) {
    let file = small_file();
    let shown = format!("{bad:?}, mirror {mirror:?}");
    let mut peers = honest(&file, 2).await;
    for fault in &bad {
        peers.push(FakePeer::start(&file, fault.clone()).await);
    }
    let mirror = match mirror {
        Some(fault) => Some(TestServer::start(fault, &file).await),
        None => None,
    };
    let urls: Vec<String> = mirror.iter().map(TestServer::url).collect();
    let lab = Lab::new(&refs(&peers));
    let got = lab.get(&file, &urls, &[]).await;
    assert_eq!(got.result, Ok(()), "{shown}");
    assert!(got.bytes == file, "wrong bytes were called right: {shown}");
    let liars: Vec<IpAddr> = peers[2..].iter().zip(&bad).filter(|(_, fault)| lies(fault)).map(|(peer, _)| peer.contact.ip()).collect();
    let blamed = lab.bad_addresses();
    assert!(blamed.iter().all(|address| liars.contains(address)), "an honest peer is blamed: {shown}");
    let sent: usize = peers.iter().map(|peer| peer.sent_bytes.load(Ordering::Relaxed)).sum();
    assert!(sent <= 4 * file.len() * 2, "{sent} bytes for a file of {}: {shown}", file.len());
}

async fn all(runs: Vec<(Vec<Fault>, Option<MirrorFault>)>) {
    let count = runs.len();
    let done = stream::iter(runs).map(|(bad, mirror)| Box::pin(download(bad, mirror))).buffer_unordered(AT_ONCE).count().await;
    assert_eq!(done, count);
}

/// Every two kinds of peers, with and without a mirror in turns.
#[tokio::test]
async fn every_pair_of_peers() {
    let faults = faults();
    let mut runs = Vec::new();
    for (at, one) in faults.iter().enumerate() {
        for other in &faults[at..] {
            let mirror = runs.len().is_multiple_of(2).then_some(MirrorFault::None);
            runs.push((vec![one.clone(), other.clone()], mirror));
        }
    }
    all(runs).await;
}

/// Every kind of peer beside every kind of mirror.
#[tokio::test]
async fn every_peer_beside_every_mirror() {
    let mirrors = [
        MirrorFault::ReplacedBetweenRanges,
        MirrorFault::ReplacedAndCareless,
        MirrorFault::Html,
        MirrorFault::HtmlOfTheSize,
        MirrorFault::NoRanges,
        MirrorFault::WrongContentRange,
        MirrorFault::WrongTotal,
        MirrorFault::Short(7),
        MirrorFault::Long(7),
        MirrorFault::Encoded,
        MirrorFault::Garbage,
        MirrorFault::Status(503),
    ];
    let each = |mirror: &MirrorFault| {
        let mirror = mirror.clone();
        faults().into_iter().map(move |fault| (vec![fault], Some(mirror.clone())))
    };
    all(mirrors.iter().flat_map(each).collect()).await;
}
