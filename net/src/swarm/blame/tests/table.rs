//! Each row of the decision table as a test. Sources are numbered in the order in which the world lists them; `[0, 1, 2]`
//! says who gives which piece in the first round.

use super::*;

/// One request at a time, so that what is decided at a piece is known before the next is asked.
fn one_by_one(actors: Vec<Actor>, first: &[usize]) -> World {
    let mut world = World::new(1, first.len(), actors).assign(Assign::Fixed(first.to_vec()));
    world.flights_max = 1;
    world
}

fn pick(ran: &Ran, piece: usize) -> Option<Digest> {
    ran.blame.second.picks[piece]
}

/// Equal from two sources: on with it, nobody asked a third time, nobody suspected; and it is no proof, since the two may
/// be one.
#[test]
fn equal_digests_go_on_and_prove_nothing() {
    let collude = || liar(1, When::Pieces(vec![1]));
    let ran = one_by_one(vec![collude(), collude(), honest(), mirror()], &[0, 1, 2]).run();
    assert_eq!(ran.giver(1, Why::Second), Some(0));
    assert_eq!((pick(&ran, 1), ran.asked(Why::Tie), ran.suspected()), (None, vec![], vec![]));
    assert_eq!(ran.guilty(), [0, 1], "the mirror's whole file shows both");
}

/// A source that gives other bytes for the same piece has proved itself a liar before anything is known of the file.
#[test]
fn same_source_other_bytes_is_proved_at_once() {
    let mut budget = WasteBudget::new();
    let mut turn = Turn { now: Instant::now(), budget: &mut budget };
    let world = World::new(1, 3, vec![]);
    let mut blame = Blame::new(world.shape);
    let [one, other] = [0, 1].map(|_| blame.add_source(SourceKind::Peer, None).unwrap());
    assert!(blame.begin(one, 1));
    blame.gave(one, 1, Digest::of(b"this"), &mut turn);
    blame.gave(one, 1, Digest::of(b"that"), &mut turn);
    let out = std::iter::from_fn(|| blame.poll()).find_map(|action| match action {
        Action::Out { source, reason } => Some((source, reason)),
        _ => None,
    });
    assert_eq!(out, Some((one, OutReason::ContradictsItself)));
    assert!(blame.is_out(one) && blame.is_suspect(one) && !blame.may_ask(one, 0));
    assert!(blame.may_ask(other, 0));
}

#[test]
fn first_giver_suspect_already_keeps_the_second_bytes() {
    let actors = vec![liar(1, When::Pieces(vec![1, 2])), honest(), honest()];
    let world = one_by_one(actors, &[1, 0, 0, 2]);
    let truth = world.true_list();
    let ran = world.run();
    assert_eq!(ran.asked(Why::Tie), [(1, 2)], "the second dispute needs no third source");
    assert_eq!((pick(&ran, 1), pick(&ran, 2)), (Some(truth[1]), Some(truth[2])));
    assert_eq!((ran.suspected(), ran.guilty()), (vec![0], vec![0]));
}

#[test]
fn second_giver_suspect_already_keeps_the_first_bytes() {
    let mut seen = 0;
    for seed in 0..60 {
        let actors = vec![liar(1, When::Pieces(vec![1, 2])), honest(), honest()];
        let world = World::new(seed, 4, actors).assign(Assign::Fixed(vec![1, 0, 2, 1]));
        let truth = world.true_list();
        let ran = world.run();
        if ran.giver(2, Why::Second) == Some(0) {
            seen += 1;
            assert_eq!((pick(&ran, 2), ran.asked(Why::Tie).len()), (Some(truth[2]), 1), "seed {seed}");
        }
        assert_eq!(ran.guilty(), [0], "seed {seed}");
    }
    assert!(seen > 5, "the suspect's answer was never there before the suspicion: {seen}");
}

/// Against the mirror a peer is suspected and the mirror's bytes are kept, whichever came first.
#[test]
fn against_the_mirror_the_peer_is_suspect() {
    let actors = vec![liar(1, When::At(Why::Second, vec![1])), liar(2, When::At(Why::First, vec![2])), mirror()];
    let world = one_by_one(actors, &[0, 2, 1]);
    let truth = world.true_list();
    let ran = world.run();
    assert_eq!((ran.giver(1, Why::First), ran.giver(1, Why::Second)), (Some(2), Some(0)));
    assert_eq!((ran.giver(2, Why::First), ran.giver(2, Why::Second)), (Some(1), Some(2)));
    assert_eq!((pick(&ran, 1), pick(&ran, 2)), (Some(truth[1]), Some(truth[2])));
    assert_eq!((ran.suspected(), ran.guilty(), ran.asked(Why::Tie)), (vec![0, 1], vec![0, 1], vec![]));
}

/// Source 3 lies in the last piece, so that there is a second round; the dispute looked at is in piece 1, where source 1 is
/// first, source 0 second and source 2 third.
fn third_source(actors: [Actor; 3]) -> (Ran, Vec<Digest>) {
    let actors = [actors.to_vec(), vec![liar(9, When::At(Why::First, vec![3]))]].concat();
    let world = one_by_one(actors, &[0, 1, 2, 3]);
    let truth = world.true_list();
    let ran = world.run();
    assert_eq!((ran.giver(1, Why::First), ran.giver(1, Why::Second), ran.giver(1, Why::Tie)), (Some(1), Some(0), Some(2)));
    (ran, truth)
}

#[test]
fn third_source_agrees_with_the_first_giver() {
    let (ran, truth) = third_source([liar(1, When::At(Why::Second, vec![1])), honest(), honest()]);
    assert_eq!((pick(&ran, 1), ran.suspected(), ran.guilty()), (Some(truth[1]), vec![0, 3], vec![0, 3]));
}

#[test]
fn third_source_agrees_with_the_second_giver() {
    let (ran, truth) = third_source([honest(), liar(1, When::At(Why::First, vec![1])), honest()]);
    assert_eq!((pick(&ran, 1), ran.suspected(), ran.guilty()), (Some(truth[1]), vec![1, 3], vec![1, 3]));
}

#[test]
fn third_source_agrees_with_neither() {
    let (ran, truth) = third_source([honest(), liar(1, When::At(Why::First, vec![1])), liar(2, When::At(Why::Tie, vec![1]))]);
    assert_eq!((pick(&ran, 1), ran.suspected()), (Some(truth[1]), vec![3]), "nobody is suspected for piece 1, all are kept");
    assert_eq!(ran.guilty(), [1, 2, 3]);
}

#[test]
fn mirror_as_third_agrees_with_neither() {
    let actors = vec![liar(2, When::At(Why::Second, vec![1])), liar(1, When::At(Why::First, vec![1])), mirror()];
    let world = one_by_one(actors, &[0, 1, 0]);
    let truth = world.true_list();
    let ran = world.run();
    assert_eq!(ran.asked(Why::Tie), [(1, 2)]);
    assert_eq!((pick(&ran, 1), ran.suspected(), ran.guilty()), (Some(truth[1]), vec![0, 1], vec![0, 1]));
}

/// A third source is an unused one; else one that is not suspected; else the mirror.
#[test]
fn order_of_third_sources() {
    let lies = liar(1, When::At(Why::First, vec![1]));
    let ran = one_by_one(vec![honest(), lies.clone(), honest(), honest(), honest(), mirror()], &[0, 1, 2, 0]).run();
    assert_eq!(ran.giver(0, Why::Second), Some(3), "the first piece takes the first unused one");
    assert_eq!(ran.asked(Why::Tie), [(1, 4)]);

    let ran = one_by_one(vec![honest(), lies, honest(), mirror()], &[0, 1, 2, 0]).run();
    assert_eq!(ran.asked(Why::Tie), [(1, 2)]);

    let (first, second) = (liar(1, When::At(Why::First, vec![1])), liar(2, When::At(Why::First, vec![3])));
    let ran = one_by_one(vec![first, second, honest(), mirror()], &[1, 0, 2, 1]).run();
    assert_eq!(ran.asked(Why::Tie), [(1, 2), (3, 3)], "source 0 is suspected by then, so the mirror decides piece 3");
    assert_eq!(ran.guilty(), [0, 1]);
}

/// Two sources, no mirror: the first giver is suspected, who has moved on to a later piece. Here rightly.
#[test]
fn no_third_source_suspects_the_first_giver() {
    let world = one_by_one(vec![honest(), liar(1, When::At(Why::First, vec![1]))], &[0, 1, 0, 1]);
    let truth = world.true_list();
    let ran = world.run();
    assert_eq!((pick(&ran, 1), ran.suspected(), ran.guilty(), ran.trials()), (Some(truth[1]), vec![1], vec![1], 0));
}

/// The same rule suspects an honest source where the liar comes second. The trials find the truth, and the suspicion ends
/// with the download.
#[test]
fn no_third_source_may_suspect_the_wrong_one_and_convicts_the_right_one() {
    let mut lies = liar(1, When::At(Why::Second, vec![1]));
    let world = one_by_one(vec![lies.clone(), honest()], &[0, 1, 0, 1]);
    assert_eq!(world.run().result.unwrap().verdicts.len(), 2, "without a lie in the first round there is no second");
    lies.lie = Some((1, When::Pieces(vec![0, 1])));
    let ran = one_by_one(vec![lies, honest()], &[0, 1, 0, 1]).run();
    assert_eq!((ran.suspected(), ran.guilty()), (vec![1], vec![0]));
    assert!(ran.trials() > 0);
}

/// In the first piece the first giver has not moved on to a later piece: nobody is suspected.
#[test]
fn no_third_source_in_the_first_piece_suspects_nobody() {
    let world = one_by_one(vec![liar(1, When::At(Why::First, vec![0])), honest()], &[0, 1, 1]);
    let truth = world.true_list();
    let ran = world.run();
    assert_eq!((pick(&ran, 0), ran.suspected(), ran.guilty()), (Some(truth[0]), vec![], vec![0]));
}

/// Eight disputes are put to a third source; the ninth falls under the rule without one.
#[test]
fn ties_end_after_eight() {
    let pieces = 24;
    let first: Vec<usize> = (0..pieces).map(|piece| piece % 2).collect();
    let odd: Vec<u32> = (0..24).filter(|piece| piece % 2 == 1).collect();
    let actors = vec![honest(), liar(1, When::At(Why::First, odd.clone())), liar(2, When::At(Why::Tie, odd))];
    let ran = one_by_one(actors, &first).run();
    assert_eq!(ran.asked(Why::Tie).len(), TIES_MAX as usize);
    assert_eq!((ran.suspected(), ran.guilty()), (vec![1], vec![1, 2]));
}

/// Once suspected, a source is asked for no later piece of the round where others are left.
#[test]
fn a_suspects_later_pieces_go_to_others() {
    let first = [1, 0, 2, 0, 2, 0, 1];
    let ran = one_by_one(vec![liar(1, When::At(Why::First, vec![1])), honest(), honest()], &first).run();
    let later: Vec<usize> = ran.asked(Why::Second).into_iter().filter(|(piece, _)| *piece > 1).map(|(_, source)| source).collect();
    assert_eq!(later.len(), 5);
    assert!(!later.contains(&0), "{later:?}");
    assert_eq!(ran.guilty(), [0]);
}

/// With two sources and no mirror a suspect goes on, since each piece needs both versions.
#[test]
fn of_two_sources_the_suspect_goes_on() {
    let first = [1, 0, 1, 0, 1];
    let ran = one_by_one(vec![liar(1, When::At(Why::First, vec![1])), honest()], &first).run();
    let shifted: Vec<(u32, usize)> = (0..).zip([0, 1, 0, 1, 0]).collect();
    assert_eq!(ran.asked(Why::Second), shifted);
    assert_eq!(ran.guilty(), [0]);
}
