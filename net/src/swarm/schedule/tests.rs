//! A simulator: sources with a rate and a latency, a clock that only the simulator moves, files of many small pieces.
#![allow(clippy::unwrap_used, reason = "tests")]

use super::*;
use crate::swarm::blame::{SourceVerdict, WASTE_BYTES_MAX, WasteBudget};
use crate::swarm::rating::Nearness;
use std::collections::HashMap;

const NOW_S: u64 = 1_800_000_000;
const STEP: Duration = Duration::from_millis(5);
const PIECE_BYTES: u32 = 1000;
/// With pieces of 1,000 bytes a rate of 4,000 bytes a second stands for 1 MB/s with real ones.
const RATE: f64 = 4_000.0;

/// How a source misbehaves.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Fault {
    None,
    /// Accepts requests and never answers.
    Stalls,
    /// One byte a second.
    Drips,
    /// Each answer ends one byte short.
    Short,
    /// 404 for what it announced.
    Refuses,
    /// 503 with Retry-After of one second for the first so many requests.
    Full(u32),
    Lies(u8),
}

#[derive(Clone, Debug)]
struct Model {
    kind: SourceKind,
    rate: f64,
    latency: Duration,
    fault: Fault,
    credited: bool,
    rated: bool,
    have: Option<Bits>,
    joins_at: Duration,
}

fn peer(rate: f64) -> Model {
    Model {
        kind: SourceKind::Peer,
        rate,
        latency: Duration::from_millis(20),
        fault: Fault::None,
        credited: true,
        rated: true,
        have: None,
        joins_at: Duration::ZERO,
    }
}

fn stranger(rate: f64, fault: Fault) -> Model {
    Model { credited: false, rated: false, fault, ..peer(rate) }
}

fn mirror(rate: f64) -> Model {
    Model { kind: SourceKind::Mirror, ..peer(rate) }
}

struct Transfer {
    source: SourceId,
    piece: u32,
    started: Instant,
    left: f64,
    answering: bool,
}

/// What a download came to.
struct Ended {
    result: Result<Outcome, NotHad>,
    took: Duration,
    fetched: Vec<(SourceId, u32, Duration)>,
    in_flight_max: HashMap<SourceId, u32>,
    report: Vec<SourceReport>,
    peer_bytes: u64,
    lists_asked: Vec<SourceId>,
}

struct Sim {
    pieces: u32,
    models: Vec<Model>,
    rules: Rules,
    resumed: Vec<u32>,
    /// Partial holders have everything from then on.
    fills_at: Option<Duration>,
}

fn sim(pieces: u32, models: Vec<Model>) -> Sim {
    Sim {
        pieces,
        models,
        rules: Rules { mirror_after: Some(Duration::ZERO), public: false, now_s: NOW_S },
        resumed: Vec::new(),
        fills_at: None,
    }
}

fn true_piece(index: u32) -> Vec<u8> {
    index.to_be_bytes().repeat(PIECE_BYTES as usize / 4)
}

impl Sim {
    fn shape(&self) -> FileShape {
        let all: Vec<u8> = (0..self.pieces).flat_map(true_piece).collect();
        FileShape { digest: Digest::of(&all), size: all.len() as u64, piece_bytes: PIECE_BYTES }
    }

    fn run(&self) -> Ended {
        self.run_at(Instant::now(), &mut WasteBudget::new())
    }

    fn run_at(&self, start: Instant, budget: &mut WasteBudget) -> Ended {
        let mut turn = Turn { now: start, budget };
        let mut schedule = Schedule::new(self.shape(), self.rules, start);
        let mut ids: Vec<Option<SourceId>> = vec![None; self.models.len()];
        let mut transfers: HashMap<FlightId, Transfer> = HashMap::new();
        let mut kept: HashMap<(u32, Digest), Vec<u8>> = HashMap::new();
        let mut ended = Ended {
            result: Err(NotHad::Undecided),
            took: Duration::ZERO,
            fetched: Vec::new(),
            in_flight_max: HashMap::new(),
            report: Vec::new(),
            peer_bytes: 0,
            lists_asked: Vec::new(),
        };
        let mut full: HashMap<SourceId, u32> = HashMap::new();
        if !self.resumed.is_empty() {
            let here = NewSource { kind: SourceKind::Here, address: None, have: None, rating: Rating::unknown(Nearness::Lan, NOW_S) };
            let here = schedule.add_source(here, &mut turn).unwrap();
            for piece in &self.resumed {
                let bytes = true_piece(*piece);
                schedule.resumed(here, *piece, Digest::of(&bytes), &mut turn);
                kept.insert((*piece, Digest::of(&bytes)), bytes);
            }
        }
        for step in 0..200_000u32 {
            turn.now = start + STEP * step;
            let age = turn.now - start;
            for (at, model) in self.models.iter().enumerate() {
                if ids[at].is_none() && age >= model.joins_at {
                    ids[at] = schedule.add_source(new_source(at, model), &mut turn);
                    if ids.iter().all(Option::is_some) {
                        schedule.no_more_sources(&mut turn);
                    }
                }
            }
            if self.fills_at.is_some_and(|at| age >= at && age < at + STEP) {
                for (id, _) in ids.iter().zip(&self.models).filter(|(_, model)| model.have.is_some()) {
                    schedule.have(id.unwrap(), Bits::all(self.pieces), &mut turn);
                }
            }
            let model_of = |source: SourceId| ids.iter().position(|id| *id == Some(source)).map(|at| &self.models[at]);
            schedule.tick(&mut turn);
            assert!(schedule.next_timeout(turn.now).is_none_or(|next| next > turn.now), "it spins: {schedule:?}");
            self.carry(&mut schedule, &mut transfers, &mut kept, &mut turn, &mut ended, &model_of);
            while let Some(todo) = schedule.poll() {
                match todo {
                    Do::Fetch { flight, source, piece } => {
                        ended.fetched.push((source, piece, age));
                        let asked = full.entry(source).or_default();
                        *asked += 1;
                        match model_of(source).unwrap().fault {
                            Fault::Refuses => schedule.failed(flight, Failure::Refused, None, &mut turn),
                            Fault::Full(times) if *asked <= times => {
                                schedule.failed(flight, Failure::Refused, Some(Duration::from_secs(1)), &mut turn);
                            }
                            _ => {
                                let left = f64::from(PIECE_BYTES);
                                transfers.insert(flight, Transfer { source, piece, started: turn.now, left, answering: false });
                            }
                        }
                        let at_once = transfers.values().filter(|transfer| transfer.source == source).count();
                        let most = ended.in_flight_max.entry(source).or_default();
                        *most = (*most).max(u32::try_from(at_once).unwrap());
                    }
                    Do::Abort(flight) => drop(transfers.remove(&flight)),
                    Do::AskList(source) => ended.lists_asked.push(source),
                    Do::AskHave(_) | Do::Deliver { .. } | Do::Out(..) => {}
                    Do::Hash(job) => schedule.hashed(job.run(|piece, digest| Ok(&kept[&(piece, *digest)])), &mut turn),
                    Do::Verified(outcome) => ended.result = Ok(outcome),
                    Do::Failed(why) => ended.result = Err(why),
                }
            }
            assert!(schedule.flights() <= FLIGHTS_MAX);
            if schedule.is_over() {
                assert!(transfers.is_empty(), "requests outlive the download");
                ended.took = age;
                ended.report = schedule.report();
                return ended;
            }
        }
        panic!("the download never ends: {schedule:?}");
    }

    /// Moves bytes for one step; transfers of one source share its rate.
    fn carry<'a>(
        &self,
        schedule: &mut Schedule,
        transfers: &mut HashMap<FlightId, Transfer>,
        kept: &mut HashMap<(u32, Digest), Vec<u8>>,
        turn: &mut Turn<'_>,
        ended: &mut Ended,
        model_of: &dyn Fn(SourceId) -> Option<&'a Model>,
    ) {
        let mut sharing: HashMap<SourceId, u32> = HashMap::new();
        transfers.values().filter(|transfer| transfer.answering).for_each(|transfer| *sharing.entry(transfer.source).or_default() += 1);
        let mut flights: Vec<FlightId> = transfers.keys().copied().collect();
        flights.sort_unstable();
        for flight in flights {
            let Some(transfer) = transfers.get_mut(&flight) else { continue };
            let model = model_of(transfer.source).unwrap();
            if !transfer.answering {
                if model.fault != Fault::Stalls && turn.now >= transfer.started + model.latency {
                    transfer.answering = true;
                    schedule.first_byte(flight, turn.now);
                }
                continue;
            }
            let rate = if model.fault == Fault::Drips { 1.0 } else { model.rate };
            transfer.left -= rate * STEP.as_secs_f64() / f64::from(sharing[&transfer.source].max(1));
            if transfer.left > 0.0 {
                continue;
            }
            let Transfer { piece, .. } = transfers.remove(&flight).unwrap();
            if model.fault == Fault::Short {
                schedule.failed(flight, Failure::Short, None, turn);
                continue;
            }
            let mut bytes = true_piece(piece);
            if let Fault::Lies(variant) = model.fault {
                bytes[7] ^= variant;
            }
            if model.kind == SourceKind::Peer {
                ended.peer_bytes += bytes.len() as u64;
            }
            let digest = Digest::of(&bytes);
            if schedule.piece(flight, digest, turn) {
                kept.insert((piece, digest), bytes);
            }
        }
    }
}

fn new_source(at: usize, model: &Model) -> NewSource {
    let mut rating = Rating::unknown(Nearness::FarV4, NOW_S);
    // What is assumed of a far peer, in the units of the simulator.
    rating.succeeded(model.latency, if model.rated { model.rate } else { RATE }, NOW_S);
    if model.credited {
        rating.credit(NOW_S);
    }
    let address = (model.kind == SourceKind::Peer).then(|| IpAddr::from([10, u8::try_from(at).unwrap(), 0, 1]));
    NewSource { kind: model.kind, address, have: model.have.clone(), rating }
}

impl Ended {
    fn pieces(&self) -> Vec<u32> {
        self.report.iter().map(|source| source.pieces).collect()
    }

    fn verdicts(&self) -> &[SourceVerdict] {
        &self.result.as_ref().expect("the file is had").verdicts
    }

    fn seconds(&self) -> f64 {
        self.took.as_secs_f64()
    }

    fn asked(&self, source: u16) -> Vec<Duration> {
        self.fetched.iter().filter(|(id, ..)| id.0 == source).map(|(.., at)| *at).collect()
    }
}

/// Four equal peers bring a file four times as fast as one.
#[test]
fn peers_add_up() {
    let one = sim(64, vec![peer(RATE)]).run();
    let four = sim(64, vec![peer(RATE); 4]).run();
    assert!(four.seconds() < one.seconds() / 3.5, "{} s against {} s", four.seconds(), one.seconds());
    assert!(four.pieces().iter().all(|pieces| (14..=18).contains(pieces)), "{:?}", four.pieces());
}

/// The faster source gets more, in proportion, and both end together.
#[test]
fn pieces_go_where_they_come_soonest() {
    let ended = sim(60, vec![peer(4.0 * RATE), peer(RATE)]).run();
    let pieces = ended.pieces();
    assert!((44..=54).contains(&pieces[0]), "{pieces:?}");
    let ideal_s = 60.0 * f64::from(PIECE_BYTES) / (5.0 * RATE);
    assert!(ended.seconds() < 1.15 * ideal_s, "{} s, ideal {ideal_s} s", ended.seconds());
}

/// One slow peer among four costs at most 1.3 times what none of it costs: it must not hold the last pieces.
#[test]
fn a_slow_peer_does_not_delay() {
    let none = sim(64, vec![peer(RATE); 3]).run();
    for slow in [RATE / 10.0, RATE / 50.0] {
        let models = [vec![peer(RATE); 3], vec![Model { rated: false, ..peer(slow) }]].concat();
        let with = sim(64, models).run();
        assert!(with.seconds() <= 1.3 * none.seconds(), "{} s against {} s", with.seconds(), none.seconds());
    }
}

/// A peer that no verified file has credited has one piece in flight, however fast; a credited one has more.
#[test]
fn unknown_peers_have_one_piece_in_flight() {
    let ended = sim(40, vec![stranger(100.0 * RATE, Fault::None), peer(100.0 * RATE), mirror(RATE)]).run();
    assert_eq!(ended.in_flight_max[&SourceId(0)], 1);
    assert!(ended.in_flight_max[&SourceId(1)] > 1);
    assert!(ended.in_flight_max.get(&SourceId(2)).is_none_or(|most| *most <= MIRROR_SLOTS));
    assert!(ended.report[0].rating.is_credited(NOW_S), "the verified file credits it");
}

/// A source that never answers costs the deadline once: its piece is asked of another after two seconds.
#[test]
fn an_overdue_piece_is_asked_of_another() {
    let ended = sim(8, vec![stranger(RATE, Fault::Stalls), peer(RATE)]).run();
    let stalled: Vec<u32> = ended.fetched.iter().filter(|(id, ..)| id.0 == 0).map(|(_, piece, _)| *piece).collect();
    assert_eq!(stalled.len(), 1, "one piece in flight, and no second one");
    let again = ended.fetched.iter().find(|(id, piece, _)| id.0 == 1 && stalled.contains(piece)).unwrap().2;
    assert!(again <= OVERDUE_MIN + STEP, "{again:?}");
    assert!(ended.seconds() <= 4.0, "{}", ended.seconds());
}

/// In the end game the last pieces of a slow source are asked of a fast one too, before they are overdue.
#[test]
fn the_end_game_doubles_what_is_outstanding() {
    // Believed fast, and slow since: its last piece would take five seconds.
    let turned_slow = Model { rated: false, ..peer(RATE / 20.0) };
    let ended = sim(6, vec![turned_slow, peer(4.0 * RATE)]).run();
    let mut asked: HashMap<u32, u32> = HashMap::new();
    ended.fetched.iter().for_each(|(_, piece, _)| *asked.entry(*piece).or_default() += 1);
    assert!(asked.values().any(|times| *times == 2) && asked.values().all(|times| *times <= 2), "{asked:?}");
    assert!(ended.seconds() < 1.9, "{}", ended.seconds());
}

/// A mirror that stalls is a source like any other: overdue, hedged, and the file comes from peers.
#[test]
fn a_stalled_mirror_delays_by_its_deadline_only() {
    let ended = sim(20, vec![Model { fault: Fault::Stalls, ..mirror(RATE) }, peer(RATE)]).run();
    assert!(ended.result.is_ok());
    assert!(ended.seconds() <= 20.0 * 0.25 + 2.5, "{}", ended.seconds());
}

/// Without a head start a small file is asked of the mirror at once.
#[test]
fn a_small_file_comes_from_the_mirror_at_once() {
    let ended = sim(1, vec![stranger(RATE, Fault::None), mirror(2.0 * RATE)]).run();
    assert_eq!(ended.asked(1), [Duration::ZERO]);
    assert!(ended.lists_asked.is_empty(), "a list of one piece says nothing");
}

/// With a head start a peer that answers within it spares the mirror; one that does not costs the head start.
#[test]
fn a_head_start_spares_the_mirror() {
    let with_head_start = |model: Model| {
        let mut sim = sim(1, vec![model, mirror(4.0 * RATE)]);
        sim.rules.mirror_after = Some(HEAD_START);
        sim.run()
    };
    let fast = with_head_start(peer(8.0 * RATE));
    assert_eq!((fast.asked(0), fast.asked(1)), (vec![Duration::ZERO], vec![]));
    let stalled = with_head_start(stranger(RATE, Fault::Stalls));
    assert_eq!(stalled.asked(1), [HEAD_START]);
    assert!(stalled.seconds() <= 0.3 + 0.25 + 0.05, "{}", stalled.seconds());
    assert!(stalled.verdicts().iter().all(|verdict| !verdict.is_guilty()));
}

/// In a fleet the mirror is not raced: nothing is asked of it until it is allowed.
#[test]
fn a_fleet_does_not_race_the_mirror() {
    let mut sim = sim(20, vec![peer(RATE), mirror(100.0 * RATE)]);
    sim.rules.mirror_after = None;
    assert_eq!(sim.run().asked(1), []);
    let now = Instant::now();
    let mut budget = WasteBudget::new();
    let mut turn = Turn { now, budget: &mut budget };
    let mut schedule = Schedule::new(sim.shape(), sim.rules, now);
    schedule.add_source(new_source(1, &sim.models[1]), &mut turn);
    assert!(schedule.poll().is_none());
    schedule.allow_mirror(&mut turn);
    assert!(matches!(schedule.poll(), Some(Do::Fetch { .. })));
}

/// A partial holder is asked only for what it has, and again what it has by now; when it has more, it gives more.
#[test]
fn partial_holders_give_what_they_have() {
    let mut have = Bits::none(12);
    (0..4).for_each(|piece| have.set(piece));
    let mut sim = sim(12, vec![Model { have: Some(have), ..peer(RATE) }]);
    sim.fills_at = Some(Duration::from_secs(3));
    let ended = sim.run();
    assert_eq!(ended.pieces(), [12]);
    let early = ended.fetched.iter().filter(|(.., at)| *at < Duration::from_secs(3));
    assert!(early.map(|(_, piece, _)| *piece).eq(0..4));
}

/// A fast partial holder that has given what it has must not keep the rest from being asked of a slow one: until then the download
/// stood still, for as long as the partial holder stayed.
#[test]
fn who_has_nothing_left_keeps_nobody_waiting() {
    let mut have = Bits::none(12);
    (0..4).for_each(|piece| have.set(piece));
    let slow = peer(RATE / 10.0);
    let ended = sim(12, vec![Model { have: Some(have), ..peer(50.0 * RATE) }, slow.clone()]).run();
    let alone = sim(8, vec![slow]).run();
    assert_eq!(ended.pieces(), [4, 8]);
    assert!(ended.seconds() <= alone.seconds() + 1.0, "{} s, the slow one alone {} s", ended.seconds(), alone.seconds());
}

/// A piece that no partial holder ever gets ends the download after a while, not never.
#[test]
fn partial_holders_are_not_waited_for_for_ever() {
    let mut have = Bits::all(12);
    have.clear(5);
    let ended = sim(12, vec![Model { have: Some(have), ..peer(RATE) }]).run();
    assert_eq!(ended.result, Err(NotHad::NoSource(5)));
    assert!(ended.took >= PARTIAL_PATIENCE && ended.seconds() < 24.0, "{}", ended.seconds());
}

/// What is here from before is not asked for again.
#[test]
fn a_resumed_download_asks_only_for_the_rest() {
    let mut sim = sim(10, vec![peer(RATE)]);
    sim.resumed = vec![0, 1, 2, 7];
    let ended = sim.run();
    let mut asked: Vec<u32> = ended.fetched.iter().map(|(_, piece, _)| *piece).collect();
    asked.sort_unstable();
    assert_eq!(asked, [3, 4, 5, 6, 8, 9]);
}

/// Two wait, one leaves: it goes on. The last one leaves: every request is broken off.
#[test]
fn leaving_does_not_cancel_what_others_wait_for() {
    let now = Instant::now();
    let mut budget = WasteBudget::new();
    let mut turn = Turn { now, budget: &mut budget };
    let sim = sim(10, vec![peer(RATE)]);
    let mut schedule = Schedule::new(sim.shape(), sim.rules, now);
    schedule.add_source(new_source(0, &sim.models[0]), &mut turn);
    schedule.join();
    assert!(!schedule.leave());
    let flights = schedule.flights();
    assert!(flights > 0);
    assert!(schedule.leave());
    let aborted = std::iter::from_fn(|| schedule.poll()).filter(|todo| matches!(todo, Do::Abort(_))).count();
    assert_eq!((aborted, schedule.flights()), (flights, 0));
    schedule.tick(&mut turn);
    assert!(schedule.poll().is_none(), "nothing is asked for nobody");
}

/// 503 with Retry-After: the source is left alone until then and asked again, without blame.
#[test]
fn a_full_source_is_asked_later() {
    let ended = sim(4, vec![Model { fault: Fault::Full(1), ..stranger(RATE, Fault::None) }]).run();
    let asked = ended.asked(0);
    assert!(asked[1] >= Duration::from_secs(1) && asked[1] <= Duration::from_secs(1) + 2 * STEP, "{asked:?}");
    assert_eq!(ended.pieces(), [4]);
}

/// Lists are asked of three complete holders at most; of a partial one, which passes on what it got, while no complete one is known.
#[test]
fn lists_are_asked_of_complete_holders() {
    let asked = |partial: usize| {
        let mut models = vec![peer(RATE); 5];
        models[partial].have = Some(Bits::none(8));
        sim(8, models).run().lists_asked
    };
    assert_eq!(asked(4), [0, 1, 2].map(SourceId));
    assert_eq!(asked(0), [0, 1, 2, 3].map(SourceId));
}

/// A peer that closes each answer one byte short, one that drips, one that stalls, one that refuses: none is blamed, and
/// the file is here in at most twice the time of the honest sources alone.
#[test]
fn faulty_peers_delay_little_and_are_not_blamed() {
    let honest = [peer(RATE), peer(RATE)];
    let alone = sim(64, honest.to_vec()).run();
    for fault in [Fault::Short, Fault::Drips, Fault::Stalls, Fault::Refuses] {
        let ended = sim(64, [vec![stranger(RATE, fault)], honest.to_vec()].concat()).run();
        assert!(ended.seconds() <= 2.0 * alone.seconds(), "{fault:?}: {} s against {} s", ended.seconds(), alone.seconds());
        assert!(ended.verdicts().iter().all(|verdict| !verdict.is_guilty()), "{fault:?}");
        assert_eq!(ended.pieces()[0], 0, "{fault:?}");
    }
}

/// Whatever a peer does instead of giving pieces, credited or not, the mirror beside it has the file here in its own time and one
/// deadline: a reset or a short answer is `Short`, too much or another range is none at all.
#[test]
fn a_faulty_peer_delays_by_one_deadline() {
    let alone = sim(64, vec![mirror(RATE)]).run();
    for fault in [Fault::Short, Fault::Drips, Fault::Stalls, Fault::Refuses] {
        for faulty in [stranger(RATE, fault), Model { fault, ..peer(RATE) }] {
            let ended = sim(64, vec![faulty, mirror(RATE)]).run();
            let most = alone.seconds() + OVERDUE_MIN.as_secs_f64();
            assert!(ended.seconds() <= most, "{fault:?}: {} s, the mirror alone {} s", ended.seconds(), alone.seconds());
            assert_eq!(ended.pieces()[0], 0, "{fault:?}");
        }
    }
}

/// On a slow line every piece takes longer than a stalled one is waited for. Where nobody else has it, giving it up would be giving
/// up the file: a fleet's machine with a slow line would tell everybody that the mirror is out.
#[test]
fn a_slow_line_is_no_reason_to_give_up() {
    let ended = sim(4, vec![mirror(RATE / 50.0)]).run();
    assert!(ended.result.is_ok(), "{:?}", ended.result);
    assert_eq!(ended.fetched.len(), 4, "each piece is asked for once: {:?}", ended.fetched);
    let ended = sim(1, vec![Model { fault: Fault::Drips, ..mirror(RATE) }]).run();
    assert_eq!(ended.result, Err(NotHad::NoSource(0)), "but not for ever");
}

/// A source three times overdue has one piece in flight, though a file credited it once.
#[test]
fn three_times_overdue_is_one_in_flight() {
    let now = Instant::now();
    let mut budget = WasteBudget::new();
    let mut turn = Turn { now, budget: &mut budget };
    let sim = sim(64, vec![peer(400.0 * RATE)]);
    let mut schedule = Schedule::new(sim.shape(), sim.rules, now);
    let id = schedule.add_source(new_source(0, &sim.models[0]), &mut turn).unwrap();
    assert!(schedule.slots(id, now) > 2);
    turn.now += OVERDUE_MIN;
    schedule.tick(&mut turn);
    assert!(schedule.known[0].overdue >= 3);
    assert_eq!(schedule.slots(id, turn.now), 1);
}

/// Fifty liars with fresh addresses, file after file, and a mirror: one piece in flight each, every file is had, and what
/// they waste in the hour is bounded; then the mirror alone is asked.
#[test]
fn an_hour_of_fresh_liars_is_bounded() {
    let start = Instant::now();
    let mut budget = WasteBudget::new();
    // The allowance that is left in this hour is that of twenty of these small files.
    let file_bytes = 16 * u64::from(PIECE_BYTES);
    budget.charge(WASTE_BYTES_MAX - 20 * file_bytes, start);
    let (mut wasted, mut only_mirror) = (0, 0);
    for file in 0..40u8 {
        let liars = (0..50).map(|liar| stranger(RATE, Fault::Lies(1 + (liar + file) % 200)));
        let sim = sim(16, liars.chain([mirror(RATE)]).collect());
        let ended = sim.run_at(start, &mut budget);
        assert!(ended.result.is_ok(), "file {file}: {:?}", ended.result);
        assert!(ended.in_flight_max.iter().all(|(source, most)| *most <= 1 || source.0 == 50), "{:?}", ended.in_flight_max);
        wasted += ended.peer_bytes;
        only_mirror += u32::from(ended.peer_bytes == 0);
    }
    assert!(only_mirror > 20, "{only_mirror} of 40 files from the mirror alone");
    // The one download that the hour leaves free: two rounds and eight third sources.
    let free = 2 * file_bytes + 8 * u64::from(PIECE_BYTES);
    assert!(wasted <= free + 20 * file_bytes, "{wasted} bytes wasted");
}

/// The same hour without a mirror: the file is not had, at no cost, and the reason is told.
#[test]
fn a_spent_hour_without_a_mirror_asks_nobody() {
    let start = Instant::now();
    let mut budget = WasteBudget::new();
    assert!(budget.take_round(start) && budget.take_bytes(WASTE_BYTES_MAX, start));
    let ended = sim(16, vec![peer(RATE)]).run_at(start, &mut budget);
    assert_eq!((ended.result, ended.peer_bytes), (Err(NotHad::BudgetSpent), 0));
}

/// The caller sleeps until the time it is told: that time must lie ahead, or it spins.
#[test]
fn the_next_timeout_lies_ahead() {
    let now = Instant::now();
    let mut budget = WasteBudget::new();
    let mut turn = Turn { now, budget: &mut budget };
    let sim = sim(10, vec![peer(RATE), mirror(RATE)]);
    let mut schedule = Schedule::new(sim.shape(), sim.rules, now);
    assert_eq!(schedule.next_timeout(now), None);
    schedule.add_source(new_source(0, &sim.models[0]), &mut turn);
    assert_eq!(schedule.next_timeout(now), Some(now + OVERDUE_MIN));
    let mut times = 0;
    while let Some(next) = schedule.next_timeout(turn.now) {
        assert!(next > turn.now);
        turn.now = next;
        schedule.tick(&mut turn);
        times += 1;
        assert!(times < 1_000, "it never ends");
    }
}

/// A request is let go on, and then all others turn out to take longer than before: who waits for it does not spin.
#[test]
fn a_line_that_becomes_slower_does_not_spin() {
    let now = Instant::now();
    let mut budget = WasteBudget::new();
    let mut turn = Turn { now, budget: &mut budget };
    let sim = sim(10, vec![mirror(RATE)]);
    let mut schedule = Schedule::new(sim.shape(), sim.rules, now);
    schedule.add_source(new_source(0, &sim.models[0]), &mut turn);
    let flights: Vec<(FlightId, u32)> = schedule.flights.iter().map(|flight| (flight.id, flight.piece)).collect();
    assert!(flights.len() > 1);
    flights.iter().for_each(|(flight, _)| schedule.first_byte(*flight, now));
    while turn.now < now + OVERDUE_MIN * GIVE_UP_OVERDUES {
        turn.now = schedule.next_timeout(turn.now).unwrap();
        schedule.tick(&mut turn);
    }
    assert!(schedule.flights.iter().any(|flight| flight.spared_until.is_some()));
    turn.now += Duration::from_secs(1);
    for (flight, piece) in &flights[1..] {
        schedule.piece(*flight, Digest::of(&true_piece(*piece)), &mut turn);
    }
    schedule.tick(&mut turn);
    while let Some(next) = schedule.next_timeout(turn.now) {
        assert!(next > turn.now, "due {:?} ago", turn.now - next);
        turn.now = next;
        schedule.tick(&mut turn);
    }
    assert_eq!(schedule.flights(), 0, "given up in the end");
}

/// Something happens between the time at which a request is overdue and the tick: the time is not lost.
#[test]
fn an_event_does_not_hide_an_overdue_request() {
    let now = Instant::now();
    let mut budget = WasteBudget::new();
    let mut turn = Turn { now, budget: &mut budget };
    let sim = sim(10, vec![peer(RATE), peer(RATE)]);
    let mut schedule = Schedule::new(sim.shape(), sim.rules, now);
    schedule.add_source(new_source(0, &sim.models[0]), &mut turn);
    turn.now = now + OVERDUE_MIN + STEP;
    schedule.add_source(new_source(1, &sim.models[1]), &mut turn);
    assert_eq!(schedule.next_timeout(turn.now), Some(now + OVERDUE_MIN));
    schedule.tick(&mut turn);
    assert!(schedule.next_timeout(turn.now).unwrap() > turn.now);
}

/// In a fleet the coordinator says who asks the mirror for what: a machine that asked by itself would cost a second copy.
#[test]
fn a_leader_chooses_until_he_leaves() {
    let lab = sim(4, vec![]);
    let now = Instant::now();
    let mut budget = WasteBudget::new();
    let mut turn = Turn { now, budget: &mut budget };
    let mut schedule = Schedule::new(lab.shape(), lab.rules, now);
    schedule.lead(true, &mut turn);
    let add = |schedule: &mut Schedule, kind, turn: &mut Turn<'_>| {
        let source = NewSource { kind, address: None, have: None, rating: Rating::unknown(Nearness::Lan, NOW_S) };
        schedule.add_source(source, turn).unwrap()
    };
    let mirror = add(&mut schedule, SourceKind::Mirror, &mut turn);
    let peer = add(&mut schedule, SourceKind::Peer, &mut turn);
    let fetches = |schedule: &mut Schedule| {
        let mut fetches = Vec::new();
        while let Some(action) = schedule.poll() {
            if let Do::Fetch { source, piece, .. } = action {
                fetches.push((source, piece));
            }
        }
        fetches
    };
    schedule.tick(&mut turn);
    assert_eq!(fetches(&mut schedule), []);
    assert!(schedule.ask(mirror, 2, &mut turn).is_some());
    assert_eq!(schedule.ask(mirror, 2, &mut turn), None, "it is asked already");
    assert_eq!(schedule.ask(peer, 9, &mut turn), None, "there is no such piece");
    let flight = schedule.ask(peer, 0, &mut turn).unwrap();
    assert_eq!(fetches(&mut schedule), [(mirror, 2), (peer, 0)]);
    schedule.piece(flight, Digest::of(&true_piece(0)), &mut turn);
    assert_eq!(fetches(&mut schedule), []);
    schedule.lead(false, &mut turn);
    let mut rest: Vec<u32> = fetches(&mut schedule).into_iter().map(|(_, piece)| piece).filter(|piece| *piece != 2).collect();
    rest.sort_unstable();
    rest.dedup();
    // As much as slots allow.
    assert_eq!(rest.first(), Some(&1));
}

/// Neighbours that have the whole file: an even share of them all would take as long as the slowest of them.
#[test]
fn a_leader_leaves_whole_holders_to_choose() {
    let lab = sim(8, vec![]);
    let now = Instant::now();
    let mut budget = WasteBudget::new();
    let mut turn = Turn { now, budget: &mut budget };
    let mut schedule = Schedule::new(lab.shape(), lab.rules, now);
    schedule.lead(true, &mut turn);
    let mut add = |kind, turn: &mut Turn<'_>| {
        let source = NewSource { kind, address: None, have: None, rating: Rating::unknown(Nearness::Lan, NOW_S) };
        schedule.add_source(source, turn).unwrap()
    };
    let (mirror, slow, fast) = (add(SourceKind::Mirror, &mut turn), add(SourceKind::Peer, &mut turn), add(SourceKind::Peer, &mut turn));
    assert!(!schedule.has_whole(now));
    schedule.whole(slow, &mut turn);
    schedule.whole(fast, &mut turn);
    assert!(schedule.has_whole(now));
    let mut asked = [0; 3];
    let mut bring = |schedule: &mut Schedule, turn: &mut Turn<'_>| {
        let mut came = None;
        while let Some(action) = schedule.poll() {
            if let Do::Fetch { flight, source, piece } = action {
                asked[source.index()] += 1;
                came = if source == fast { Some((flight, piece)) } else { came };
            }
        }
        let Some((flight, piece)) = came else { return false };
        schedule.piece(flight, Digest::of(&true_piece(piece)), turn);
        true
    };
    while bring(&mut schedule, &mut turn) {}
    assert_eq!((asked[mirror.index()], asked[slow.index()]), (0, 1), "the mirror is the fleet's to share out");
    assert_eq!(asked[fast.index()], 8, "it brings the slow one's piece too");
}
