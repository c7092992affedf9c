//! Holders of parts of a file, who announce their pieces and not the file.

use super::*;

const SIGNER: [u8; 32] = [1; 32];

fn piece_digest(file: &[u8], piece: usize) -> Digest {
    Digest::of(&file[piece * PIECE..file.len().min((piece + 1) * PIECE)])
}

/// What one holder of a part lacks is had of another that has announced nothing but pieces: it is found by one that the list
/// names, says what else it has, and gives that.
#[tokio::test]
async fn a_holder_of_announced_pieces_is_found_and_used() {
    let file = file();
    let first = FakePeer::with_part(&file, 0..6, Fault::PassesOnLies(vec![]), Some((&file, SIGNER))).await;
    let second = FakePeer::with_part(&file, 6..12, Fault::PassesOnLies(vec![]), None).await;
    let lab = Lab::new(&[]);
    *lab.finder.found.lock() = vec![first.found_part()];
    *lab.finder.of_pieces.lock() = vec![(piece_digest(&file, 8), second.found_part())];
    let got = lab.right(&file, &[]).await;
    assert_eq!((got.given_by(&first), got.given_by(&second)), (6, 6));
    let sought = lab.finder.sought.lock().clone();
    let mut lacking: Vec<Digest> = (6..12).map(|piece| piece_digest(&file, piece)).collect();
    lacking.sort_unstable();
    assert_eq!(sought, [lacking], "one search, for what nobody was known to have, each piece once");
    assert!(lab.swarm.peers().iter().all(|row| row.bad == 0 && row.false_lists == 0), "{:?}", lab.swarm.peers());
    let told = lab.announced.1.lock().clone();
    assert!(!told.is_empty() && told.iter().all(|piece| (0..12).any(|at| piece_digest(&file, at) == *piece)), "{told:?}");
}

/// A search for pieces costs lookups: with a holder of the whole file there is none, and without a list there can be none.
#[tokio::test]
async fn pieces_are_not_sought_where_nothing_is_lacking_or_known() {
    let file = file();
    let whole = FakePeer::with_list(&file, Fault::None, Some((&file, SIGNER))).await;
    let part = FakePeer::with_part(&file, 0..6, Fault::None, None).await;
    let lab = Lab::new(&[&whole]);
    lab.finder.found.lock().push(part.found_part());
    lab.right(&file, &[]).await;
    assert!(lab.finder.sought.lock().is_empty());

    let rest = FakePeer::with_part(&file, 6..12, Fault::None, None).await;
    let lab = Lab::new(&[]);
    *lab.finder.found.lock() = vec![part.found_part(), rest.found_part()];
    let got = lab.right(&file, &[]).await;
    assert_eq!((got.given_by(&part), got.given_by(&rest)), (6, 6));
    assert!(lab.finder.sought.lock().is_empty());
}

/// A false list that a holder of a part passed on convicts who signed it, and nobody who was deceived by it.
#[tokio::test]
async fn who_passes_a_false_list_on_is_not_its_signer() {
    let file = file();
    let mut other = file.clone();
    other[7 * PIECE] ^= 1;
    let relay = FakePeer::with_part(&file, 0..6, Fault::None, Some((&other, [9; 32]))).await;
    // Their first answers are refusals, so that the list is here before the piece that contradicts it.
    let mut rest = Vec::new();
    for _ in 0..2 {
        rest.push(FakePeer::with_part(&file, 6..12, Fault::Full(1), None).await);
    }
    let lab = Lab::new(&[]);
    *lab.finder.found.lock() = [&relay, &rest[0], &rest[1]].map(FakePeer::found_part).into();
    lab.right(&file, &[]).await;
    assert!(lab.swarm.peers().iter().all(|row| row.bad == 0 && row.false_lists == 0 && row.out_until == 0), "{:?}", lab.swarm.peers());
    let signer = ed25519_dalek::SigningKey::from_bytes(&[9; 32]).verifying_key().to_bytes();
    assert!(lab.swarm.book.lock().verdicts.key_is_out(&signer, now_s()));
}
