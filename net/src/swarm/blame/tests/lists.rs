//! Signed piece lists: true ones, false ones, and choosing between them.

use super::*;

fn with_lists(mut actors: Vec<Actor>, first: &[usize], of: &[(usize, usize)], lists: impl Fn(&World) -> Vec<Vec<Digest>>) -> World {
    of.iter().for_each(|(actor, list)| actors[*actor].list = Some(*list));
    let mut world = World::new(5, first.len(), actors).assign(Assign::Fixed(first.to_vec()));
    world.lists = lists(&world);
    world
}

/// With a true list a liar costs his piece and is out; there is no second round.
#[test]
fn a_true_list_shows_a_wrong_piece_at_once() {
    let first = [0, 1, 2, 0, 1, 2, 0, 1];
    let world = with_lists(vec![honest(), liar(1, When::Always), honest()], &first, &[(0, 0)], |world| vec![world.true_list()]);
    let ran = world.run();
    assert!(ran.asked(Why::Second).is_empty());
    assert_eq!(ran.guilty(), [1]);
    assert!(ran.out.contains(&(id(1), OutReason::MissesList)));
    let bad = ran.outcome().verdicts[1].bad;
    assert!(ran.cost() <= 1.0 + f64::from(bad + 1) / 8.0, "cost {}", ran.cost());
}

/// A false list with matching false pieces from the accomplice: the digest is wrong, the list is dropped, and when the truth
/// is known its signer is convicted with the list as proof.
#[test]
fn a_false_list_is_dropped_when_the_digest_is_wrong() {
    let first = [0, 1, 0, 1, 0, 1];
    let accomplice = liar(1, When::Pieces(vec![2]));
    let world = with_lists(vec![accomplice, honest(), honest()], &first, &[(0, 0)], |world| vec![world.false_list(1, &[2])]);
    let false_list = world.lists[0].clone();
    let ran = world.run();
    assert_eq!(ran.guilty(), [0]);
    let proofs = &ran.outcome().false_lists;
    assert_eq!(proofs.len(), 1);
    assert_eq!((proofs[0].0, proofs[0].1.signer, &proofs[0].1.pieces), (id(0), [0; 32], &false_list));
}

/// The same bytes from two sources against the list drop it, and both sources are back.
#[test]
fn two_that_agree_against_a_list_drop_it() {
    let first = [0, 1, 2, 1, 2, 1];
    let world = with_lists(vec![liar(1, When::Always), honest(), honest()], &first, &[(0, 0)], |world| {
        vec![world.false_list(1, &[0, 1, 2, 3, 4, 5])]
    });
    let ran = world.run();
    assert_eq!(ran.guilty(), [0]);
    let missed: Vec<usize> = ran.out.iter().map(|(source, _)| source.index()).collect();
    assert!(missed.contains(&1) && missed.contains(&2), "both honest ones were out by the list: {missed:?}");
    assert!(!ran.blame.is_out(id(1)) && !ran.blame.is_out(id(2)));
}

/// One honest source alone against a false list: the list goes when nobody else is left to ask.
#[test]
fn one_honest_source_outlives_a_false_list() {
    let first = [0, 1, 0, 1];
    let world = with_lists(vec![liar(1, When::Always), honest()], &first, &[(0, 0)], |world| vec![world.false_list(1, &[0, 1, 2, 3])]);
    let ran = world.run();
    assert_eq!(ran.guilty(), [0]);
    assert_eq!(ran.outcome().false_lists.len(), 1);
}

/// Two lists: the mirror gives the first piece in which they differ, and the list that fits is used.
#[test]
fn the_mirror_decides_between_lists() {
    let first = [1, 1, 1, 1, 1, 1];
    let world = with_lists(vec![liar(1, When::Always), honest(), mirror()], &first, &[(0, 0), (1, 1)], |world| {
        vec![world.false_list(1, &[3, 4]), world.true_list()]
    });
    let ran = world.run();
    assert_eq!(ran.asked(Why::Arbitrate), [(3, 2)]);
    assert!((ran.cost() - 1.0).abs() < 0.001, "the deciding piece is one of the file's: {}", ran.cost());
    let proofs: Vec<SourceId> = ran.outcome().false_lists.iter().map(|(from, _)| *from).collect();
    assert_eq!(proofs, [id(0)], "its signer is convicted, though none of its pieces was asked for");
}

/// Without a mirror a source decides that has signed neither.
#[test]
fn a_neutral_source_decides_between_lists() {
    let first = [1, 1, 1, 1];
    let world = with_lists(vec![liar(1, When::Always), honest(), honest()], &first, &[(0, 0), (1, 1)], |world| {
        vec![world.false_list(1, &[2]), world.true_list()]
    });
    let ran = world.run();
    assert_eq!(ran.asked(Why::Arbitrate), [(2, 2)]);
    assert!(ran.asked(Why::Second).is_empty());
}

/// Nobody neutral: no list at all, and the rounds decide.
#[test]
fn a_tie_between_lists_is_no_list() {
    let first = [0, 1, 0, 1];
    let world = with_lists(vec![liar(1, When::Pieces(vec![2])), honest()], &first, &[(0, 0), (1, 1)], |world| {
        vec![world.false_list(1, &[2]), world.true_list()]
    });
    let ran = world.run();
    assert!(ran.asked(Why::Arbitrate).is_empty() && ran.out.is_empty());
    assert!(!ran.asked(Why::Second).is_empty());
    assert_eq!(ran.guilty(), [0]);
}

/// A list that comes after some pieces takes out what misses it and fills the gap from what it admits.
#[test]
fn a_late_list_is_applied_to_what_is_here() {
    let world = World::new(1, 3, vec![]);
    let mut budget = WasteBudget::new();
    let mut turn = Turn { now: Instant::now(), budget: &mut budget };
    let mut blame = Blame::new(world.shape);
    let [one, other] = [0, 1].map(|_| blame.add_source(SourceKind::Peer, None).unwrap());
    assert!(blame.begin(one, 0) && blame.begin(other, 1));
    blame.gave(one, 0, Digest::of(b"false"), &mut turn);
    blame.gave(other, 1, world.true_list()[1], &mut turn);
    let list = PieceList { pieces: world.true_list(), signer: [1; 32], signed_at: 0, signature: [0; 64] };
    blame.list(other, list, &mut turn);
    assert!(blame.needs(0) && !blame.needs(1) && blame.needs(2));
    assert!(blame.is_out(one) && !blame.is_out(other));
}

/// Never two of one network where networks are public, and never more than three.
#[test]
fn whom_to_ask_for_lists() {
    let holders = ["192.0.2.1", "192.0.2.2", "2001:db8:1:1::1", "2001:db8:1:2::1", "198.51.100.1", "203.0.113.1"];
    let ask = |public| -> Vec<usize> {
        let holders = holders.iter().enumerate().map(|(index, address)| (id(index), address.parse().unwrap()));
        choose_list_sources(holders, public).into_iter().map(SourceId::index).collect()
    };
    assert_eq!(ask(true), [0, 2, 4]);
    assert_eq!(ask(false), [0, 1, 2]);
}
