//! The link against a network process that follows no rule.

#![allow(clippy::unwrap_used, reason = "tests")]

use super::hand_on;
use super::link::{Link, Parts, ShelfBox};
use crate::deltas::offers::{DeltaOffer, OFFERS_MAX};
use crate::wire::{self, Answer, Checked, Delivered, FromNet, Question, ToNet, WireError, seal};
use poolfs_core::piece::PIECE_BYTES;
use poolfs_core::{BlockSum, Digest, Sums};
use poolfs_fs::source::{Audience, DELIVERIES_WAITING_MAX, Delivery, Giver, Purpose, SourceError, Want};
use poolfs_net::peer::{self, CLAIM_BYTES, Shelf, Shelved};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use std::fs::File;
use std::io::Write as _;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use tokio::sync::mpsc;

const SIZE: u64 = PIECE_BYTES as u64 + 5;

fn parts() -> Parts {
    Parts {
        shelf: std::sync::OnceLock::new(),
        prover: std::sync::OnceLock::new(),
        arriving: tokio::sync::watch::Sender::new(Vec::new()),
        checked: tokio::sync::watch::Sender::new(Vec::new()),
    }
}

fn want() -> Want {
    let digest = Digest::of(b"wanted");
    Want { digest, size: SIZE, urls: Vec::new(), missing: vec![0, 1], purpose: Purpose::Read, audience: Audience::Everybody }
}

/// A link whose other end only the test reads.
fn link() -> (Arc<Link>, wire::Socket) {
    let (ours, theirs) = wire::pair().unwrap();
    let ours = wire::Socket::new(ours).unwrap();
    (Arc::new(Link::new(ours.outlet(), 1)), wire::Socket::new(theirs).unwrap())
}

fn piece(id: u64, index: u32) -> FromNet {
    FromNet::Delivery { id, what: Delivered::Piece { index, giver: Giver::Mirror("m".into()) } }
}

fn garbage(result: Result<(), WireError>) -> String {
    match result {
        Err(WireError::Garbage(what)) => what,
        other => panic!("taken as no garbage: {other:?}"),
    }
}

fn memory(len: u64, seals: SealFlags) -> OwnedFd {
    let mut memory = File::from(memfd_create("test", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap());
    memory.write_all(&vec![7; usize::try_from(len).unwrap()]).unwrap();
    fcntl_add_seals(&memory, seals).unwrap();
    memory.into()
}

/// What a piece comes in may be anything that a descriptor can be; reading some of it would block for ever, and some changes
/// while it is hashed.
#[tokio::test]
async fn only_sealed_pieces_of_the_right_size_pass() {
    let all = SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK;
    let full = u64::from(PIECE_BYTES);
    let (pipe, _other_end) = rustix::pipe::pipe().unwrap();
    let directory = File::open("/").unwrap().into();
    for (fds, index, what) in [
        (vec![], 0, "0 descriptors where 1 belong"),
        (vec![memory(full, all), memory(full, all)], 0, "2 descriptors where 1 belong"),
        (vec![memory(full, SealFlags::GROW | SealFlags::SHRINK)], 0, "a descriptor that is no sealed memory"),
        (vec![memory(full, SealFlags::WRITE | SealFlags::GROW)], 0, "a descriptor that is no sealed memory"),
        (vec![pipe], 0, "a descriptor that is no sealed memory"),
        (vec![directory], 0, "a descriptor that is no sealed memory"),
        (vec![memory(full + 1, all)], 0, "memory of more than 262144 bytes"),
        (vec![memory(full - 1, all)], 0, "262143 bytes as piece 0 of a file of 262149"),
        (vec![memory(full, all)], 1, "262144 bytes as piece 1 of a file of 262149"),
        (vec![memory(5, all)], 2, "5 bytes as piece 2 of a file of 262149"),
        (vec![memory(0, all)], u32::MAX, "0 bytes as piece 4294967295 of a file of 262149"),
    ] {
        let (link, _theirs) = link();
        let _wanting = link.want(want(), None).await.unwrap();
        assert_eq!(garbage(link.take(piece(1, index), fds, &parts())), what);
    }
    let (link, _theirs) = link();
    let mut wanting = link.want(want(), None).await.unwrap();
    link.take(piece(1, 1), vec![memory(5, all)], &parts()).unwrap();
    assert!(matches!(wanting.next().await.unwrap(), Delivery::Piece { index: 1, .. }));
}

/// Each number that was never given, and each message out of its turn, would else find its way into a table.
#[tokio::test]
async fn nothing_that_was_not_asked_for() {
    let (link, _theirs) = link();
    let parts = parts();
    let wanting = link.want(want(), None).await.unwrap();
    let host = |host: String| FromNet::Delivery { id: 1, what: Delivered::Piece { index: 1, giver: Giver::Mirror(host) } };
    let five = || vec![seal(&[7; 5]).unwrap()];
    for (message, fds, what) in [
        (FromNet::Started, vec![], "it says twice that it has started"),
        (FromNet::Delivery { id: 2, what: Delivered::Done }, vec![], "a delivery for nothing"),
        (FromNet::Delivery { id: 0, what: Delivered::Done }, vec![], "a delivery for nothing"),
        (FromNet::Answer { id: 9, answer: Answer::Peers(Vec::new()) }, vec![], "an answer to nothing"),
        (FromNet::Pong(1), five(), "1 descriptors where 0 belong"),
        (FromNet::Try { id: 1, old: Digest::of(b""), new: Digest::of(b"") }, vec![], "0 descriptors where 1 belong"),
        (FromNet::Arriving(vec![Digest::of(b""); 5000]), vec![], "too many files that arrive"),
        (FromNet::Checked(vec![Checked { file: Digest::of(b""), pieces: vec![Digest::of(b""); 65] }]), vec![], "too many pieces of them"),
        (FromNet::Checked(vec![Checked { file: Digest::of(b""), pieces: vec![] }; 65]), vec![], "too many pieces of them"),
        (host("x".repeat(256)), five(), "5 bytes as piece 1 of a file of 262149"),
        (host("a\nb".to_owned()), five(), "5 bytes as piece 1 of a file of 262149"),
    ] {
        assert_eq!(garbage(link.take(message, fds, &parts)), what);
    }
    // What comes late for something that was given up is not its fault.
    drop(wanting);
    link.take(piece(1, 1), five(), &parts).unwrap();
}

/// Offers of deltas come from strangers in the end; each is short, and so many and no more wait for who looks for them.
#[tokio::test]
async fn offers_are_bounded() {
    let parts = parts();
    let offer = |id, claim: Option<Vec<u8>>| {
        let (old, delta) = (Digest::of(b"old"), Digest::of(b"delta"));
        FromNet::Offer { id, offer: Some(Box::new(DeltaOffer { old, delta, bytes: 7, target: None, claim })) }
    };
    let (link, mut theirs) = link();
    let mut seeking = link.seek(Digest::of(b"new"), true).await.unwrap();
    let (asked, _) = theirs.receive::<ToNet>().await.unwrap();
    assert!(matches!(asked, ToNet::Seek { id: 1, fleet_only: true, .. }), "{asked:?}");
    assert_eq!(garbage(link.take(offer(2, None), Vec::new(), &parts)), "an offer to nothing");
    assert_eq!(garbage(link.take(offer(1, Some(vec![7; CLAIM_BYTES + 1])), Vec::new(), &parts)), "a claim that is none");
    let item = FromNet::Answer { id: 1, answer: Answer::Item(Some(vec![7; 997])) };
    assert_eq!(garbage(link.take(item, Vec::new(), &parts)), "a small delta that is none");
    for _ in 0..OFFERS_MAX {
        link.take(offer(1, Some(vec![7; CLAIM_BYTES])), Vec::new(), &parts).unwrap();
    }
    assert_eq!(garbage(link.take(offer(1, None), Vec::new(), &parts)), "more offers than it may send");
    link.take(FromNet::Offer { id: 1, offer: None }, Vec::new(), &parts).unwrap();
    for _ in 0..OFFERS_MAX {
        assert!(seeking.next().await.is_some());
    }
    assert!(seeking.next().await.is_none());
    // What comes late is not its fault.
    link.take(offer(1, None), Vec::new(), &parts).unwrap();
    let given_up = link.seek(Digest::of(b"new"), false).await.unwrap();
    drop(given_up);
    theirs.receive::<ToNet>().await.unwrap();
    let (left, _) = theirs.receive::<ToNet>().await.unwrap();
    assert!(matches!(left, ToNet::Leave { id: 2 }), "{left:?}");
}

/// Deliveries that nobody takes would fill the memory, a piece each.
#[tokio::test]
async fn deliveries_ahead_are_bounded() {
    let (link, mut theirs) = link();
    let mut wanting = link.want(want(), None).await.unwrap();
    let checking = || FromNet::Delivery { id: 1, what: Delivered::Checking { bytes: 1 } };
    for _ in 0..DELIVERIES_WAITING_MAX {
        link.take(checking(), Vec::new(), &parts()).unwrap();
    }
    assert_eq!(garbage(link.take(checking(), Vec::new(), &parts())), "more deliveries than it may send ahead");
    wanting.next().await.unwrap();
    wanting.took().await.unwrap();
    link.take(checking(), Vec::new(), &parts()).unwrap();
    let mut seen = Vec::new();
    for _ in 0..2 {
        seen.push(format!("{:?}", theirs.receive::<ToNet>().await.unwrap().0));
    }
    assert!(seen[0].starts_with("Want { id: 1,") && seen[1] == "Took { id: 1 }", "{seen:?}");
}

/// A process that takes what is on its way for written reads zeros where it was to be, and calls the mirror's file wrong.
#[tokio::test]
async fn what_nobody_has_taken_is_not_said_to_be() {
    let (link, mut theirs) = link();
    let wanting = link.want(want(), None).await.unwrap();
    for bytes in 1..=3 {
        link.take(FromNet::Delivery { id: 1, what: Delivered::Checking { bytes } }, Vec::new(), &parts()).unwrap();
    }
    assert!(matches!(theirs.receive::<ToNet>().await.unwrap().0, ToNet::Want { id: 1, .. }));
    let (out, mut deliveries) = mpsc::channel(1);
    let handing_on = tokio::spawn(async move { hand_on(wanting, &out).await });
    for taken in 1..=3 {
        for _ in 0..50 {
            tokio::task::yield_now().await;
        }
        link.tell(&ToNet::Ping(taken)).await.unwrap();
        let said = theirs.receive::<ToNet>().await.unwrap().0;
        assert!(matches!(said, ToNet::Ping(count) if count == taken), "it says of {taken}: {said:?}");
        assert!(matches!(deliveries.recv().await, Some(Delivery::Checking { bytes }) if bytes == taken));
        assert!(matches!(theirs.receive::<ToNet>().await.unwrap().0, ToNet::Took { id: 1 }));
    }
    drop(deliveries);
    handing_on.abort();
}

/// A reason is shown and logged: it must be one line, of bounded length, and about the file that was asked for.
#[tokio::test]
async fn texts_are_made_plain() {
    let (link, _theirs) = link();
    let mut wanting = link.want(want(), None).await.unwrap();
    let why = format!("no\x1b[2J\nERROR all is lost {}", "x".repeat(10_000));
    let error = SourceError::NotNow { digest: Digest::of(b"another"), why };
    link.take(FromNet::Delivery { id: 1, what: Delivered::Failed(error) }, Vec::new(), &parts()).unwrap();
    let Delivery::Failed(SourceError::NotNow { digest, why }) = wanting.next().await.unwrap() else { panic!() };
    assert_eq!(digest, Digest::of(b"wanted"));
    assert!(why.starts_with("no [2J ERROR all is lost xxx") && why.chars().count() == 500, "{why}");
}

/// Whoever waits for a process that is gone must not wait any longer.
#[tokio::test]
async fn the_end_reaches_everybody() {
    let (link, _theirs) = link();
    let mut wanting = link.want(want(), None).await.unwrap();
    let asking = link.ask(Question::Status, None);
    let (answer, ()) = tokio::join!(asking, async {
        tokio::task::yield_now().await;
        link.end();
    });
    assert!(answer.is_err() && wanting.next().await.is_err());
    assert!(link.want(want(), None).await.is_err() && link.ask(Question::Peers, None).await.is_err());
}

#[derive(Debug)]
struct OneFile;

impl Shelf for OneFile {
    fn find(&self, digest: &Digest, to: peer::Audience) -> Option<Shelved> {
        let sums = Sums::of(b"on the shelf");
        (sums.digest == *digest && to == peer::Audience::Fleet).then(|| Shelved { file: seal(b"on the shelf").unwrap(), sums: sums.into() })
    }

    fn damaged(&self, _: &Digest, _: u64) {}
}

/// What the server of peers asks for arrives whole, for who may have it only; more questions than it has places for are none.
#[tokio::test]
async fn the_shelf_is_asked() {
    let (link, mut theirs) = link();
    let parts = parts();
    let digest = Digest::of(b"on the shelf");
    let find = |id, fleet, sums| FromNet::Find { id, digest, fleet, sums };
    let mut ask = async |message, parts: &Parts| {
        link.take(message, Vec::new(), parts).unwrap();
        theirs.receive::<ToNet>().await.unwrap()
    };
    let (answer, fds) = ask(find(1, true, true), &parts).await;
    assert!(matches!(answer, ToNet::Found { id: 1, size: None }) && fds.is_empty(), "there is no shelf yet: {answer:?}");
    parts.shelf.set(ShelfBox(Arc::new(OneFile))).unwrap();
    let (answer, fds) = ask(find(2, false, true), &parts).await;
    assert!(matches!(answer, ToNet::Found { id: 2, size: None }) && fds.is_empty(), "{answer:?}");
    let (answer, mut fds) = ask(find(3, true, true), &parts).await;
    assert!(matches!(answer, ToNet::Found { id: 3, size: Some(12) }) && fds.len() == 2, "{answer:?}");
    let sums = wire::Memory::check(fds.pop().unwrap(), 1 << 20).unwrap().read().unwrap();
    assert_eq!(wire::read_sums(digest, 12, &sums).unwrap(), Sums::of(b"on the shelf"));
    let (answer, fds) = ask(find(4, true, false), &parts).await;
    assert!(matches!(answer, ToNet::Found { id: 4, size: Some(12) }) && fds.len() == 1, "{answer:?}");
}

/// What is too long for a packet goes another way and arrives the same; what follows no rule is told as such.
#[tokio::test]
async fn packets() {
    let (ours, theirs) = wire::pair().unwrap();
    let raw = ours.try_clone().unwrap();
    let (ours, mut theirs) = (wire::Socket::new(ours).unwrap(), wire::Socket::new(theirs).unwrap());
    let outlet = ours.outlet();
    for count in [0, 1, 300, 1_000, 100_000] {
        let digests = vec![Digest::of(b"x"); count];
        outlet.send(&FromNet::Arriving(digests.clone()), vec![seal(b"with it").unwrap()]).await.unwrap();
        let (FromNet::Arriving(seen), fds) = theirs.receive().await.unwrap() else { panic!() };
        assert!(seen == digests && fds.len() == 1, "{count}");
    }
    let too_long = FromNet::Arriving(vec![Digest::of(b"x"); 300_000]);
    assert!(outlet.send(&too_long, Vec::new()).await.unwrap_err().to_string().contains("is too long for the network process"));
    for (bytes, what) in [
        (&b"GET / HTTP/1.1\r\n\r\n"[..], "a packet of no known kind"),
        (b"\x01", "a packet of no known kind"),
        (b"\0", "no message: EOF while parsing a value at line 1 column 0"),
        (b"\0{\"pong\":1", "no message: EOF while parsing an object at line 1 column 9"),
        (b"\0{\"gong\":1}", "no message: unknown variant `gong`"),
        (&[0; 40_000], "a packet that is too long or has too many descriptors"),
    ] {
        rustix::io::write(&raw, bytes).unwrap();
        let seen = garbage(theirs.receive::<FromNet>().await.map(drop));
        assert!(seen.starts_with(what), "{seen}");
    }
    drop((outlet, ours, raw));
    assert!(matches!(theirs.receive::<FromNet>().await, Err(WireError::Closed)));
}

/// Sums of another length than the file's would be read past their end.
#[test]
fn sums_are_those_of_the_size() {
    let sums = Sums::of(&vec![3; usize::try_from(SIZE).unwrap()]);
    let bytes = wire::sums_bytes(&sums);
    assert_eq!(bytes.len(), 32 * (2 + 5));
    assert_eq!(wire::read_sums(sums.digest, SIZE, &bytes).unwrap(), sums);
    assert_eq!(sums.blocks[4], BlockSum::of(&[3; 5]));
    for (size, bytes) in [(SIZE, &bytes[1..]), (SIZE, &bytes[32..]), (SIZE + u64::from(PIECE_BYTES), &bytes), (0, &bytes)] {
        assert!(wire::read_sums(sums.digest, size, bytes).is_err());
    }
}
