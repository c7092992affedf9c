//! What failing, slow and absent sources may and may not cause, and what is spent.

use super::*;
use std::io;

fn start(world: &World, kinds: &[SourceKind]) -> (Blame, Vec<SourceId>) {
    let mut blame = Blame::new(world.shape);
    let ids = kinds.iter().map(|kind| blame.add_source(*kind, None).unwrap()).collect();
    (blame, ids)
}

/// Short, slow, refused and gone change who is asked next, and are never guilt.
#[test]
fn failures_are_never_guilt() {
    for failure in [Failure::Short, Failure::Slow, Failure::Refused, Failure::Gone] {
        let world = World::new(1, 2, vec![]);
        let mut budget = WasteBudget::new();
        let mut turn = Turn { now: Instant::now(), budget: &mut budget };
        let (mut blame, ids) = start(&world, &[SourceKind::Peer, SourceKind::Peer]);
        assert!(blame.begin(ids[0], 0));
        blame.failed(ids[0], 0, failure, &mut turn);
        assert!(!blame.may_ask(ids[0], 0) && blame.may_ask(ids[1], 0), "{failure:?}");
        assert_eq!(blame.may_ask(ids[0], 1), failure != Failure::Gone, "{failure:?}");
        for piece in 0..2 {
            assert!(blame.begin(ids[1], piece));
            blame.gave(ids[1], piece, world.true_list()[piece as usize], &mut turn);
        }
        let mut verdicts = None;
        while let Some(action) = blame.poll() {
            match action {
                Action::Hash(job) => blame.hashed(job.run(|piece, _| Ok(&world.truth[piece as usize])), &mut turn),
                Action::Verified(outcome) => verdicts = Some(outcome.verdicts),
                _ => {}
            }
        }
        let good = SourceVerdict { source: ids[1], good: 2, bad: 0, contradicted_itself: false };
        assert_eq!(verdicts, Some(vec![good]), "{failure:?}");
    }
}

/// A mirror whose file is not the index's: no peer is blamed, and the message names the mirror.
#[test]
fn a_wrong_mirror_blames_nobody() {
    let wrong_mirror = Actor { lie: Some((7, When::Always)), ..mirror() };
    let ran = World::new(1, 6, vec![wrong_mirror, honest(), liar(1, When::Always)]).assign(Assign::Fixed(vec![1, 2, 1, 2, 1, 2])).run();
    // What peers gave may still make the file by a trial; what must not be is a verdict on the honest one.
    assert!(!ran.guilty().contains(&1));
    let alone = World::new(1, 6, vec![Actor { lie: Some((7, When::Always)), ..mirror() }]).run();
    assert_eq!(alone.result, Err(NotHad::MirrorWrong));
    assert_eq!(NotHad::MirrorWrong.to_string(), "the mirror's file does not have the digest that its index names");
}

/// A mirror whose file is another, and a liar beside two who have the truth: found out as without a mirror, since its whole file is
/// not what the index names.
#[test]
fn a_wrong_mirror_and_a_liar_do_not_hide_the_truth() {
    for seed in 1..500 {
        let wrong_mirror = Actor { lie: Some((7, When::Always)), ..mirror() };
        let actors = vec![wrong_mirror, liar(1, When::Always), honest(), honest()];
        let ran = World::new(seed, 5, actors).assign(Assign::Fixed(vec![1, 2, 1, 0, 3])).run();
        assert!(ran.result.is_ok(), "seed {seed}: {:?}", ran.result);
        assert!(ran.guilty().iter().all(|guilty| *guilty < 2), "seed {seed}: {:?}", ran.guilty());
        assert!(ran.cost() <= 4.0, "seed {seed}: {}", ran.cost());
    }
}

/// The mirror fails three times in a row: it counts as not there, and a third round takes its place.
#[test]
fn a_mirror_that_fails_is_replaced_by_a_third_round() {
    let dead = Actor { failing: 100, ..mirror() };
    let actors = vec![liar(1, When::Always), liar(1, When::Always), honest(), honest(), honest(), dead];
    let ran = World::new(2, 12, actors).assign(Assign::Fixed(vec![0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1])).run();
    assert_eq!(ran.guilty(), [0, 1]);
    assert!(ran.blame.mirror().is_none());
}

/// The hour's second round is spent: straight to the mirror. Without one the file is not had, at the cost of one.
#[test]
fn a_spent_hour_skips_the_second_round() {
    let spent = || {
        let mut budget = WasteBudget::new();
        assert!(budget.take_round(Instant::now()) && budget.take_bytes(WASTE_BYTES_MAX, Instant::now()));
        budget
    };
    let actors = vec![liar(1, When::Always), honest(), mirror()];
    let ran = World::new(1, 8, actors.clone()).assign(Assign::Fixed(vec![0, 1, 0, 1, 0, 1, 0, 1])).run_with(&mut spent());
    assert!(ran.asked(Why::Second).is_empty() && ran.cost() <= 2.0);
    assert_eq!(ran.guilty(), [0]);
    let ran = World::new(1, 8, actors[..2].to_vec()).assign(Assign::Fixed(vec![0, 1, 0, 1, 0, 1, 0, 1])).run_with(&mut spent());
    assert_eq!((ran.result.clone(), ran.guilty()), (Err(NotHad::Undecided), vec![]));
    assert!(ran.cost() <= 1.0);
}

/// Fifty liars with fresh addresses, one file after another: in the hour they waste one second round and 64 MiB, and then
/// peers are not asked any more.
#[test]
fn an_hour_of_fresh_liars_is_bounded() {
    let mut budget = WasteBudget::new();
    let now = Instant::now();
    // A file as large as the whole allowance may be wasted once: its second round is the free one.
    assert!(budget.take_round(now));
    let mut wasted = 0;
    while budget.peers_allowed(1024 * 1024, now) {
        budget.charge(1024 * 1024, now);
        wasted += 1024 * 1024;
        assert!(wasted <= WASTE_BYTES_MAX);
    }
    assert_eq!(wasted, WASTE_BYTES_MAX);
}

/// A file of one piece from a liar: the next one gives it whole.
#[test]
fn one_piece_from_a_liar() {
    for with_mirror in [true, false] {
        let mut actors = vec![liar(1, When::Always), honest()];
        actors.extend(with_mirror.then(mirror));
        let ran = World::new(1, 1, actors).assign(Assign::Fixed(vec![0])).run();
        assert_eq!(ran.guilty(), [0]);
        assert!((ran.cost() - 2.0).abs() < 0.001);
    }
}

/// A file of no bytes is had at once.
#[test]
fn an_empty_file_is_had_at_once() {
    let mut blame = Blame::new(FileShape::of(Digest::of(b""), 0));
    assert!(matches!(blame.poll(), Some(Action::Verified(outcome)) if outcome.pieces.is_empty()));
}

#[test]
fn nobody_gives_a_piece() {
    let mut have = Bits::all(4);
    have.clear(2);
    let ran = World::new(1, 4, vec![Actor { have: Some(have), ..honest() }]).run();
    assert_eq!(ran.result, Err(NotHad::NoSource(2)));
    assert_eq!(NotHad::NoSource(2).to_string(), "no source gives piece 2");
}

/// A disk that does not give back what it took is nobody's lie.
#[test]
fn an_unreadable_disk_blames_nobody() {
    let world = World::new(1, 2, vec![]);
    let mut budget = WasteBudget::new();
    let mut turn = Turn { now: Instant::now(), budget: &mut budget };
    let (mut blame, ids) = start(&world, &[SourceKind::Peer]);
    assert!(blame.begin(ids[0], 0));
    blame.gave(ids[0], 0, world.true_list()[0], &mut turn);
    let job = std::iter::from_fn(|| blame.poll()).find_map(|action| if let Action::Hash(job) = action { Some(job) } else { None });
    blame.hashed(job.unwrap().run(|_, _| Err::<&[u8], _>(io::Error::other("bad sector"))), &mut turn);
    assert!(matches!(blame.poll(), Some(Action::Failed(NotHad::LocalRead))));
}

/// What was here from an earlier run counts as pieces and is blamed on nobody.
#[test]
fn resumed_pieces_have_no_giver_to_blame() {
    let world = World::new(1, 3, vec![]);
    let mut budget = WasteBudget::new();
    let mut turn = Turn { now: Instant::now(), budget: &mut budget };
    let (mut blame, ids) = start(&world, &[SourceKind::Here, SourceKind::Peer, SourceKind::Peer]);
    let mut kept = HashMap::new();
    let mut keep = |bytes: &[u8]| kept.insert(Digest::of(bytes), bytes.to_vec());
    keep(b"xxxxx");
    assert!(blame.resumed(ids[0], 0, Digest::of(b"xxxxx"), &mut turn).keep);
    assert!(!blame.may_ask(ids[0], 1));
    world.truth.iter().for_each(|piece| drop(keep(piece)));
    for piece in 1..3 {
        assert!(blame.begin(ids[1], piece));
        blame.gave(ids[1], piece, world.true_list()[piece as usize], &mut turn);
    }
    let mut verdicts = None;
    for _ in 0..100 {
        while let Some(action) = blame.poll() {
            match action {
                Action::Hash(job) => blame.hashed(job.run(|_, digest| Ok(&kept[digest])), &mut turn),
                Action::Verified(outcome) => verdicts = Some(outcome.verdicts),
                _ => {}
            }
        }
        if let Some(ask) = blame.next_ask(|_| true, &mut turn) {
            blame.gave(ask.source, ask.piece, world.true_list()[ask.piece as usize], &mut turn);
        }
    }
    let verdicts = verdicts.expect("the file is had");
    assert!(verdicts.iter().all(|verdict| !verdict.is_guilty() && verdict.source != ids[0]), "{verdicts:?}");
}

/// Sources past the limit, a second mirror and a bit field of another file are not taken.
#[test]
fn sources_are_bounded() {
    let world = World::new(1, 3, vec![]);
    let (mut blame, _) = start(&world, &[SourceKind::Mirror]);
    assert_eq!(blame.add_source(SourceKind::Mirror, None), None);
    assert_eq!(blame.add_source(SourceKind::Peer, Some(Bits::all(4))), None);
    for _ in 1..SOURCES_MAX {
        assert!(blame.add_source(SourceKind::Peer, None).is_some());
    }
    assert_eq!(blame.add_source(SourceKind::Peer, None), None);
}

/// A liar in the middle among three honest ones, as on a real network: only the liar gets a strike, and the second round
/// brings at most half as much again as the file.
#[test]
fn a_liar_in_the_middle_costs_little() {
    for seed in 0..100 {
        let world = World::new(seed, 9, vec![honest(), honest(), honest(), liar(1, When::Always)]);
        let ran = world.assign(Assign::Fixed(vec![0, 1, 2, 0, 3, 1, 2, 0, 1])).run();
        assert_eq!(ran.guilty(), [3], "seed {seed}");
        assert!(ran.cost() <= 2.5, "seed {seed}: {}", ran.cost());
    }
}
