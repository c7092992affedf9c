//! Any world of liars: what must hold in every one of them.

use super::*;

/// Worlds run: at least a hundred thousand, or rare meetings of rules are not seen.
const RUNS: u64 = 120_000;

fn any_world(seed: u64) -> World {
    let mut rng = Rng(seed ^ 0xb1a3e);
    let pieces = if rng.percent(10) { 1 + rng.below(64) } else { 2 + rng.below(15) };
    let peers = 1 + rng.below(8);
    let liars = rng.below(peers + 1);
    let with_mirror = rng.percent(50);
    let colluding = rng.percent(40);
    let mut actors: Vec<Actor> = (0..peers)
        .map(|index| {
            let mut actor = honest();
            if index < liars {
                let variant = if colluding { 1 } else { 1 + index as u64 };
                let when = match rng.below(5) {
                    0 => When::Always,
                    1 => When::Percent(1 + rng.below(99)),
                    2 => When::Pieces(vec![0]),
                    3 => When::Pieces((0..2).map(|_| u32::try_from(rng.below(pieces)).unwrap()).collect()),
                    _ => When::FirstRound,
                };
                actor.lie = Some((variant, when));
            }
            actor
        })
        .collect();
    // Any order of liars and honest ones.
    for at in (1..actors.len()).rev() {
        actors.swap(at, rng.below(at + 1));
    }
    if rng.percent(20) {
        actors.iter_mut().for_each(|actor| actor.failing = 10);
    }
    for actor in &mut actors {
        if rng.percent(5) {
            let mut have = Bits::none(u32::try_from(pieces).unwrap());
            (0..have.len()).for_each(|piece| {
                if rng.percent(50) {
                    have.set(piece)
                }
            });
            actor.have = Some(have);
        }
    }
    if with_mirror {
        actors.insert(rng.below(actors.len() + 1), mirror());
    }
    let mut world = World::new(rng.next(), pieces, actors);
    if rng.percent(40) {
        world.lists =
            vec![world.true_list(), world.false_list(1, &[rng.below(pieces)]), world.false_list(1, &(0..pieces).collect::<Vec<_>>())];
        for at in 0..world.actors.len() {
            if world.actors[at].kind == SourceKind::Peer && world.actors[at].have.is_none() && rng.percent(50) {
                world.actors[at].list = Some(if world.actors[at].lie.is_some() { rng.below(3) } else { 0 });
            }
        }
    }
    world.assign = match rng.below(3) {
        0 => Assign::Anybody,
        1 => Assign::Peers,
        _ => Assign::Fixed((0..pieces).map(|_| rng.below(world.actors.len())).collect()),
    };
    world.flights_max = 1 + rng.below(12);
    world.hedged = if rng.percent(25) { 30 } else { 0 };
    world
}

/// The heart of it. In every world: no honest source is ever convicted, an honest mirror or a single liar among honest
/// sources means that the file is had, every liar whose bytes arrived is convicted when it is had, the cost stays within the
/// bounds, and no source is asked for one piece twice.
#[test]
fn no_honest_source_is_ever_convicted() {
    let (mut had, mut unhad) = (0, 0);
    for seed in 0..RUNS {
        let world = any_world(seed);
        let actors = world.actors.clone();
        let truth = world.true_list();
        let ran = world.run();
        for index in ran.guilty() {
            assert!(actors[index].lie.is_some(), "seed {seed}: honest {index} convicted");
        }
        for (source, reason) in &ran.out {
            assert!(*reason == OutReason::MissesList || actors[source.index()].lie.is_some(), "seed {seed}: honest {source:?} out");
        }
        let with_mirror = actors.iter().any(|actor| actor.kind == SourceKind::Mirror);
        let liars = actors.iter().filter(|actor| actor.lie.is_some()).count();
        let steady = actors.iter().all(|actor| actor.failing == 0);
        let whole = actors.iter().filter(|actor| actor.lie.is_none() && actor.have.is_none()).count();
        let knowable = with_mirror || (steady && whole > 0 && liars <= 1);
        assert!(ran.result.is_ok() || !knowable, "seed {seed}: {:?} though the truth could be had; {:?}", ran.result.err(), actors);
        if let Ok(outcome) = &ran.result {
            had += 1;
            assert_eq!(outcome.pieces, truth, "seed {seed}");
            for give in ran.blame.gives() {
                let verdict = outcome.verdicts.iter().find(|verdict| verdict.source == give.source).unwrap();
                assert!(give.digest == truth[give.piece as usize] || verdict.is_guilty(), "seed {seed}: {give:?} goes unblamed");
            }
            for (source, list) in &outcome.false_lists {
                assert!(actors[source.index()].lie.is_some() && list.pieces != truth, "seed {seed}: true list held against its signer");
            }
        } else {
            unhad += 1;
        }
        assert!(ran.cost() <= 4.0, "seed {seed}: cost {}", ran.cost());
        assert!(ran.blame.gives().len() <= 4 * truth.len() + 16, "seed {seed}");
        assert!(ran.trials() <= TRIALS_MAX && ran.asked(Why::Tie).len() <= 3 * TIES_MAX as usize, "seed {seed}");
        let mut asked = BTreeSet::new();
        let once = ran.blame.gives().iter().all(|give| asked.insert((give.piece, give.source)));
        assert!(once, "seed {seed}: a source gave one piece twice");
    }
    // The worlds must not all be easy or all hopeless, or the property says nothing.
    assert!(had > RUNS / 2 && unhad > RUNS / 50, "{had} had, {unhad} not");
}

/// Strict turns: whatever the first round's assignment, the second round never leaves a piece with its giver.
#[test]
fn second_giver_is_never_the_first() {
    for seed in 0..3_000 {
        let mut rng = Rng(seed);
        let (sources, pieces) = (2 + rng.below(7), 2 + rng.below(63));
        let fixed: Vec<usize> = (0..pieces).map(|_| rng.below(sources)).collect();
        let mut actors = vec![honest(); sources];
        actors[fixed[rng.below(pieces)]].lie = Some((1, When::FirstRound));
        let ran = World::new(seed, pieces, actors).assign(Assign::Fixed(fixed.clone())).run();
        for (piece, second) in ran.asked(Why::Second) {
            assert_ne!(second, fixed[piece as usize], "seed {seed}, piece {piece}");
        }
        assert!(ran.result.is_ok(), "seed {seed}");
    }
}
