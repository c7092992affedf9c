//! A world of honest and lying sources around the machine, with pieces of a few bytes. No time passes in it.
#![allow(clippy::unwrap_used, reason = "tests")]

mod bounds;
mod cases;
mod lists;
mod original;
mod property;
mod table;

use super::*;
use crate::swarm::Failure;
use crate::swarm::piece_list::PieceList;
use std::collections::{BTreeSet, HashMap};
use std::time::Instant;

/// SplitMix64: seeds are printed, so a failure can be run again anywhere.
#[derive(Clone)]
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, end: usize) -> usize {
        usize::try_from(self.next() % end.max(1) as u64).unwrap()
    }

    fn percent(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }
}

/// When a liar lies.
#[derive(Clone, Debug)]
enum When {
    Always,
    /// In so many of 100 answers.
    Percent(usize),
    Pieces(Vec<u32>),
    FirstRound,
    /// In answers of this kind, at these pieces.
    At(Why, Vec<u32>),
}

/// What a source is.
#[derive(Clone, Debug)]
struct Actor {
    kind: SourceKind,
    /// Which false bytes, and when; colluders have the same number. `None`: honest.
    lie: Option<(u64, When)>,
    /// Index into the world's lists.
    list: Option<usize>,
    have: Option<Bits>,
    /// Answers in 100 that fail.
    failing: usize,
}

fn honest() -> Actor {
    Actor { kind: SourceKind::Peer, lie: None, list: None, have: None, failing: 0 }
}

fn mirror() -> Actor {
    Actor { kind: SourceKind::Mirror, ..honest() }
}

fn liar(variant: u64, when: When) -> Actor {
    Actor { lie: Some((variant, when)), ..honest() }
}

/// Who is asked in the first round.
#[derive(Clone, Debug)]
enum Assign {
    Anybody,
    /// Only peers, any of them.
    Peers,
    /// Piece i of the actor with this index; the next where it may not be asked.
    Fixed(Vec<usize>),
}

/// A file and who has it.
struct World {
    truth: Vec<Vec<u8>>,
    shape: FileShape,
    actors: Vec<Actor>,
    lists: Vec<Vec<Digest>>,
    assign: Assign,
    rng: Rng,
    /// Requests out at once.
    flights_max: usize,
    /// How often one piece is also asked of a second source, in 100.
    hedged: usize,
}

/// What came of it.
struct Ran {
    result: Result<Outcome, NotHad>,
    asks: Vec<Ask>,
    blame: Blame,
    ever_suspected: BTreeSet<SourceId>,
    out: Vec<(SourceId, OutReason)>,
}

const PIECE_BYTES: usize = 5;

impl World {
    fn new(seed: u64, pieces: usize, actors: Vec<Actor>) -> Self {
        let mut rng = Rng(seed);
        let last = 1 + rng.below(PIECE_BYTES);
        let truth: Vec<Vec<u8>> = (0..pieces)
            .map(|piece| (0..if piece + 1 == pieces { last } else { PIECE_BYTES }).map(|_| rng.next().to_le_bytes()[0]).collect())
            .collect();
        let all = truth.concat();
        let shape = FileShape { digest: Digest::of(&all), size: all.len() as u64, piece_bytes: u32::try_from(PIECE_BYTES).unwrap() };
        Self { truth, shape, actors, lists: Vec::new(), assign: Assign::Peers, rng, flights_max: 8, hedged: 0 }
    }

    fn assign(mut self, assign: Assign) -> Self {
        self.assign = assign;
        self
    }

    /// The bytes of one version: 0 is the file's.
    fn bytes(&self, piece: usize, variant: u64) -> Vec<u8> {
        let mut bytes = self.truth[piece].clone();
        bytes[0] ^= u8::try_from(variant).unwrap();
        bytes
    }

    fn true_list(&self) -> Vec<Digest> {
        self.truth.iter().map(|piece| Digest::of(piece)).collect()
    }

    /// The true list with the false `variant` at `pieces`.
    fn false_list(&self, variant: u64, pieces: &[usize]) -> Vec<Digest> {
        let mut list = self.true_list();
        pieces.iter().for_each(|piece| list[*piece] = Digest::of(&self.bytes(*piece, variant)));
        list
    }

    fn answer(&mut self, actor: usize, ask: Ask) -> Vec<u8> {
        let lie = match &self.actors[actor].lie {
            None => None,
            Some((variant, when)) => {
                let lies = match when {
                    When::Always => true,
                    When::Percent(percent) => self.rng.percent(*percent),
                    When::Pieces(pieces) => pieces.contains(&ask.piece),
                    When::FirstRound => ask.why == Why::First,
                    When::At(why, pieces) => ask.why == *why && pieces.contains(&ask.piece),
                };
                lies.then_some(*variant)
            }
        };
        self.bytes(ask.piece as usize, lie.unwrap_or(0))
    }

    fn run(self) -> Ran {
        self.run_with(&mut WasteBudget::new())
    }

    fn run_with(mut self, budget: &mut WasteBudget) -> Ran {
        let mut turn = Turn { now: Instant::now(), budget };
        let mut blame = Blame::new(self.shape);
        for actor in &self.actors {
            blame.add_source(actor.kind, actor.have.clone()).unwrap();
        }
        for (index, actor) in self.actors.iter().enumerate() {
            if let Some(list) = actor.list {
                let pieces = self.lists[list].clone();
                let signer = [u8::try_from(index).unwrap(); 32];
                blame.list(id(index), PieceList { pieces, signer, signed_at: 0, signature: [0; 64] }, &mut turn);
            }
        }
        blame.no_more_sources(&mut turn);
        let mut kept: HashMap<(u32, Digest), Vec<u8>> = HashMap::new();
        let mut accepted = vec![None; self.truth.len()];
        let mut ran = Ran { result: Err(NotHad::Undecided), asks: Vec::new(), blame, ever_suspected: BTreeSet::new(), out: Vec::new() };
        let blame = &mut ran.blame;
        let mut idle = 0;
        loop {
            while let Some(action) = blame.poll() {
                idle = 0;
                match action {
                    Action::Accept { piece, digest, .. } => accepted[piece as usize] = Some(digest),
                    Action::Cancel { piece, source } => {
                        assert!(!blame.in_flight().iter().any(|ask| (ask.piece, ask.source) == (piece, source)))
                    }
                    Action::Out { source, reason } => ran.out.push((source, reason)),
                    Action::Hash(job) => blame.hashed(job.run(|piece, digest| Ok(&kept[&(piece, *digest)])), &mut turn),
                    Action::Verified(outcome) => {
                        let file: Vec<u8> =
                            (0..).zip(&outcome.pieces).flat_map(|(piece, digest)| kept[&(piece, *digest)].clone()).collect();
                        assert_eq!(Digest::of(&file), self.shape.digest, "verified bytes that are not the file");
                        ran.result = Ok(outcome);
                        return ran;
                    }
                    Action::Failed(why) => {
                        ran.result = Err(why);
                        return ran;
                    }
                }
            }
            let before = blame.in_flight().len();
            Self::ask(&mut self.rng, &self.assign, &self.actors, self.flights_max, self.hedged, blame, &mut turn, &mut ran.asks);
            ran.ever_suspected.extend((0..self.actors.len()).map(id).filter(|id| blame.is_suspect(*id)));
            if blame.in_flight().is_empty() {
                idle += 1;
                assert!(idle < 3, "stuck: {blame:?}");
                continue;
            }
            idle = 0;
            assert!(blame.in_flight().len() >= before.min(1));
            let ask = blame.in_flight()[self.rng.below(blame.in_flight().len())];
            if self.rng.percent(self.actors[ask.source.index()].failing) {
                blame.failed(ask.source, ask.piece, Failure::Short, &mut turn);
                continue;
            }
            let bytes = self.answer(ask.source.index(), ask);
            let digest = Digest::of(&bytes);
            if blame.gave(ask.source, ask.piece, digest, &mut turn).keep {
                kept.insert((ask.piece, digest), bytes);
            }
            ran.ever_suspected.extend((0..self.actors.len()).map(id).filter(|id| blame.is_suspect(*id)));
        }
    }

    #[allow(clippy::too_many_arguments, reason = "the parts of a world that is borrowed")]
    fn ask(
        rng: &mut Rng,
        assign: &Assign,
        actors: &[Actor],
        flights_max: usize,
        hedged: usize,
        blame: &mut Blame,
        turn: &mut Turn<'_>,
        asks: &mut Vec<Ask>,
    ) {
        let pieces = blame.shape.pieces();
        for piece in 0..pieces {
            if blame.in_flight().len() >= flights_max || !blame.is_first_round() {
                break;
            }
            let flying = blame.in_flight().iter().filter(|ask| ask.piece == piece).count();
            if !blame.needs(piece) || flying > 1 || (flying == 1 && !rng.percent(hedged)) {
                continue;
            }
            let peer = |at: &usize| actors[*at].kind == SourceKind::Peer;
            let mut order: Vec<usize> = match assign {
                Assign::Fixed(fixed) => {
                    let first = fixed[piece as usize];
                    (first..actors.len()).chain(0..first).collect()
                }
                Assign::Anybody | Assign::Peers => {
                    let start = rng.below(actors.len());
                    (start..actors.len()).chain(0..start).collect()
                }
            };
            if matches!(assign, Assign::Peers) {
                order.sort_by_key(|at| !peer(at));
            }
            if let Some(source) = order.into_iter().map(id).find(|source| blame.begin(*source, piece)) {
                asks.push(Ask { piece, source, why: Why::First });
            }
        }
        while blame.in_flight().len() < flights_max
            && let Some(ask) = blame.next_ask(|_| true, turn)
        {
            asks.push(ask);
            if rng.percent(hedged)
                && let Some(second) = blame.hedge(ask.piece, |_| true)
            {
                asks.push(second);
            }
        }
    }
}

fn id(index: usize) -> SourceId {
    SourceId(u16::try_from(index).unwrap())
}

impl Ran {
    fn outcome(&self) -> &Outcome {
        self.result.as_ref().expect("the file is had")
    }

    fn guilty(&self) -> Vec<usize> {
        let verdicts = self.result.as_ref().map(|outcome| outcome.verdicts.as_slice()).unwrap_or_default();
        verdicts.iter().filter(|verdict| verdict.is_guilty()).map(|verdict| verdict.source.index()).collect()
    }

    /// Bytes that arrived, in units of the file.
    #[allow(clippy::cast_precision_loss, reason = "tiny files")]
    fn cost(&self) -> f64 {
        self.blame.cost_bytes() as f64 / self.blame.shape.size as f64
    }

    fn asked(&self, why: Why) -> Vec<(u32, usize)> {
        self.asks.iter().filter(|ask| ask.why == why).map(|ask| (ask.piece, ask.source.index())).collect()
    }

    fn giver(&self, piece: u32, why: Why) -> Option<usize> {
        self.blame.gives().iter().find(|give| give.piece == piece && give.why == why).map(|give| give.source.index())
    }

    fn suspected(&self) -> Vec<usize> {
        self.ever_suspected.iter().map(|id| id.index()).collect()
    }

    fn trials(&self) -> u32 {
        TRIALS_MAX - self.blame.trials_left
    }
}
