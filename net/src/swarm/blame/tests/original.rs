//! The rules as they were asked for: the peers shifted by one, the running hash, the first giver blamed, a third peer for
//! the first piece.

use super::*;

fn world(actors: Vec<Actor>, first: &[usize]) -> World {
    World::new(3, first.len(), actors).assign(Assign::Fixed(first.to_vec()))
}

/// The giver of piece i gives piece i + 1, and the giver of the last piece the first.
#[test]
fn second_round_is_shifted_by_one() {
    let first = [0, 1, 2, 3, 0, 1, 2, 3];
    let ran = world(vec![honest(), honest(), honest(), liar(1, When::At(Why::First, vec![7]))], &first).run();
    let mut second = ran.asked(Why::Second);
    second.sort_unstable();
    let shifted: Vec<(u32, usize)> = (0..).zip([3, 0, 1, 2, 3, 0, 1, 2]).collect();
    assert_eq!(second, shifted);
}

/// The first piece preferably comes from a peer that has given nothing yet.
#[test]
fn first_piece_comes_from_an_unused_peer() {
    let ran = world(vec![honest(), liar(1, When::At(Why::First, vec![3])), honest()], &[0, 1, 0, 1]).run();
    assert_eq!(ran.giver(0, Why::Second), Some(2));
}

/// The running hash at each piece tells where the two downloads begin to differ.
#[test]
fn running_hash_shows_the_first_difference() {
    for differs in 0..6 {
        let mut first = [0, 1, 2, 0, 1, 2];
        first[differs] = 3;
        let lies = liar(1, When::At(Why::First, vec![u32::try_from(differs).unwrap()]));
        let ran = world(vec![honest(), honest(), honest(), lies], &first).run();
        assert_eq!(ran.blame.second.split, Some(differs));
        let (one, two) = (&ran.blame.run, &ran.blame.second.run);
        let same = |at: usize| one[at].clone().finalize() == two[at].clone().finalize();
        assert!((0..=differs).all(same) && !same(differs + 1), "{differs}");
        assert_eq!(ran.guilty(), [3]);
    }
}

/// If the second download passes, the first giver of the piece that differs is to blame.
#[test]
fn second_round_passes_and_the_first_giver_is_blamed() {
    let ran = world(vec![honest(), liar(1, When::At(Why::First, vec![1]))], &[0, 1, 0, 1]).run();
    assert_eq!((ran.guilty(), ran.trials()), (vec![1], 0));
    assert!(ran.cost() <= 2.0);
}

/// Otherwise the first giver is probably at fault, since he gives a later piece now: so he is suspected, and not convicted.
#[test]
fn second_round_fails_and_the_first_giver_is_suspected() {
    let lies = liar(1, When::Pieces(vec![0, 1, 2, 3]));
    let ran = world(vec![lies, honest()], &[1, 0, 1, 0]).run();
    assert!(ran.suspected().contains(&0) || ran.trials() > 0);
    assert_eq!(ran.guilty(), [0]);
}

/// If the first piece differs a third peer gives it, and the two that agree show who lies.
#[test]
fn third_peer_gives_the_first_piece() {
    let ran = world(vec![liar(1, When::At(Why::First, vec![0])), honest(), honest()], &[0, 1, 2]).run();
    assert_eq!(ran.giver(0, Why::Second), Some(2));
    assert_eq!(ran.asked(Why::Tie), [(0, 1)]);
    assert_eq!((ran.suspected(), ran.guilty()), (vec![0], vec![0]));
}
