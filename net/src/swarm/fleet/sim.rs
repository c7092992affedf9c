//! A fleet in one process, with a clock that goes in steps: the coordinators and askers are the real ones, links and the mirror
//! have rates that are shared by what runs over them.
//!
//! By default rates are flat and nothing waits: right in the order of magnitude, not in the second digit. With [`Roads`] links have
//! queues in which queries wait behind the pieces, transfers begin slowly and share links unevenly, as TCP's do. For tests and for
//! `examples/fleet_sim.rs`; nothing of it is in the daemon.
#![allow(clippy::unwrap_used, clippy::cast_precision_loss, reason = "a model, not the program")]

use super::*;
use std::collections::{BinaryHeap, HashSet};
use std::time::Instant;

/// What a run is of.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Scenario {
    /// Machines that want the same plan.
    pub machines: usize,
    /// Twelve small packages (1.3 MB) instead of the 89 of an upgrade (125 MB).
    pub small: bool,
    /// The mirror's link, in bytes a second.
    pub mirror_bytes_s: f64,
    /// The link of each machine, in bytes a second each way.
    pub link_bytes_s: f64,
    /// From the request to the mirror's first byte.
    pub mirror_latency: Duration,
    /// The machines start within this.
    pub start_within: Duration,
    /// Of a hundred machines so many die, each when half of its pieces are there.
    pub dying_percent: usize,
    /// What links do beside carrying bytes.
    pub roads: Roads,
}

/// What links do beside carrying bytes.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct Roads {
    /// How long whatever is sent waits at each full link that it crosses.
    pub queue: Duration,
    /// Transfers begin with ten packets, double with each way there and back, and get uneven shares.
    pub tcp: bool,
    /// Files that a machine wants at once, in the plan's order; 0: all of them.
    pub files_at_once: usize,
}

/// What came of it.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Figures {
    /// Bytes of one plan.
    pub plan_bytes: u64,
    /// Bytes from the mirror, in plans.
    pub copies: f64,
    /// The most fetches of one piece from the mirror.
    pub fetches_max: u32,
    /// From a machine's start to its last piece, the median and the slowest.
    pub p50_s: f64,
    /// See `p50_s`.
    pub max_s: f64,
    /// Bytes that a machine gave to others.
    pub upload_mean_bytes: f64,
    /// The most that one gave.
    pub upload_max_bytes: u64,
    /// Queries of the average machine.
    pub wants: f64,
}

/// Runs it to its end.
///
/// # Panics
/// If it takes more than ten minutes of virtual time.
pub fn run(scenario: &Scenario) -> Figures {
    let files = if scenario.small { small_packages() } else { plan(1) };
    let mut sim = Sim::new(scenario.machines, files);
    sim.mirror_rate = scenario.mirror_bytes_s;
    sim.link_rate = scenario.link_bytes_s;
    sim.mirror_latency = scenario.mirror_latency;
    sim.roads = scenario.roads;
    let within_ms = u64::try_from(scenario.start_within.as_millis()).unwrap().max(1);
    for (at, machine) in sim.machines.iter_mut().enumerate() {
        machine.starts = Duration::from_millis(at as u64 * 7_919 % within_ms);
    }
    let half = sim.mirror_fetches.len() / 2;
    let mut dying: Vec<usize> = (0..scenario.machines).filter(|at| at * 37 % 100 < scenario.dying_percent).collect();
    while !sim.is_done() {
        assert!(sim.age() < Duration::from_secs(600), "not done: {} machines", sim.unfinished().len());
        sim.step();
        dying.retain(|at| {
            let dies = sim.machines[*at].has.iter().filter(|has| **has).count() >= half;
            if dies {
                sim.kill(*at);
            }
            !dies
        });
    }
    sim.figures()
}

impl Sim {
    /// The figures of a run that is over.
    pub(super) fn figures(&self) -> Figures {
        let times = self.times();
        let up: Vec<u64> = self.machines.iter().map(|machine| machine.up_bytes).collect();
        Figures {
            plan_bytes: self.plan_bytes(),
            copies: self.copies(),
            fetches_max: self.mirror_fetches.iter().copied().max().unwrap_or_default(),
            p50_s: times[times.len() / 2],
            max_s: times[times.len() - 1],
            upload_mean_bytes: up.iter().sum::<u64>() as f64 / up.len() as f64,
            upload_max_bytes: up.iter().copied().max().unwrap_or_default(),
            wants: self.wants as f64 / self.machines.len() as f64,
        }
    }
}

pub(super) const STEP: Duration = Duration::from_millis(5);
pub(super) const MESSAGE_TAKES: Duration = Duration::from_millis(2);
pub(super) const GBIT: f64 = 125e6;
/// A member that is not there is found out after this, where nothing refuses the connection.
pub(super) const CONNECT_TAKES: Duration = Duration::from_secs(1);

pub(super) fn member_id(at: usize) -> MemberId {
    let mut id = [0; 20];
    id.copy_from_slice(&Digest::of(&at.to_be_bytes()).0[..20]);
    MemberId(id)
}

pub(super) fn contact(at: usize) -> SocketAddr {
    SocketAddr::from(([10, 1, at.to_be_bytes()[6], at.to_be_bytes()[7]], 9977))
}

pub(super) fn member(at: usize) -> Member {
    Member { id: member_id(at), contact: contact(at), also: None, zone: Arc::from("") }
}

pub(super) fn view_of(members: impl IntoIterator<Item = usize>) -> Arc<View> {
    Arc::new(View::new(members.into_iter().map(member)))
}

pub(super) fn file(nth: usize, size: u64) -> FileShape {
    FileShape::of(Digest::of(format!("file {nth}").as_bytes()), size)
}

pub(super) enum Message {
    Want(Want, u64),
    Reply(GroupKey, Reply, u64),
}

pub(super) struct Sent {
    pub(super) at: Instant,
    pub(super) nth: u64,
    pub(super) from: usize,
    pub(super) to: usize,
    pub(super) message: Message,
}

impl PartialEq for Sent {
    fn eq(&self, other: &Self) -> bool {
        self.nth == other.nth
    }
}

impl Eq for Sent {}

impl PartialOrd for Sent {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Sent {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (other.at, other.nth).cmp(&(self.at, self.nth))
    }
}

/// Index of the mirror among the ends of transfers.
pub(super) const MIRROR: usize = usize::MAX;

/// What TCP begins with, in bytes.
const FIRST_WINDOW: f64 = 14_600.0;

/// A connection that was idle for so long begins anew.
const IDLE_RESETS: Duration = Duration::from_secs(1);

pub(super) struct Transfer {
    /// Its share of a link beside others.
    pub(super) weight: f64,
    /// How often its window has doubled.
    doubled: f64,
    pub(super) to: usize,
    pub(super) from: usize,
    pub(super) piece: usize,
    pub(super) starts: Instant,
    pub(super) left: f64,
}

pub(super) struct Machine {
    pub(super) asker: Asker,
    pub(super) coordinator: Coordinator,
    pub(super) view: Arc<View>,
    pub(super) starts: Duration,
    pub(super) begun: bool,
    pub(super) dead: bool,
    pub(super) done: Option<Duration>,
    pub(super) up_bytes: u64,
    pub(super) has: Vec<bool>,
    pub(super) next: Option<Instant>,
    /// Files not wanted yet, the last one first.
    pub(super) later: Vec<usize>,
    /// Whether its link was full in the last step, out and in.
    pub(super) full: [bool; 2],
}

pub(super) type Reach = Box<dyn Fn(usize, usize, Duration) -> bool>;
pub(super) type Lie = Box<dyn Fn(&Want) -> Option<Reply>>;

pub(super) struct Sim {
    pub(super) start: Instant,
    pub(super) now: Instant,
    pub(super) machines: Vec<Machine>,
    pub(super) files: Vec<FileShape>,
    /// Of each file the number of its first piece among all.
    pub(super) first_piece: Vec<usize>,
    pub(super) by_digest: HashMap<Digest, usize>,
    pub(super) messages: BinaryHeap<Sent>,
    pub(super) sent: u64,
    pub(super) transfers: Vec<Transfer>,
    pub(super) mirror_rate: f64,
    pub(super) mirror_latency: Duration,
    pub(super) mirror_full: bool,
    pub(super) roads: Roads,
    pub(super) link_rate: f64,
    pub(super) mirror_bytes: u64,
    pub(super) mirror_fetches: Vec<u32>,
    pub(super) wants: u64,
    /// Of two ends the window of the connection used last: when, and how often it had doubled.
    windows: HashMap<(usize, usize), (Instant, f64)>,
    /// Of asker, asked and group the last want.
    asked_last: HashMap<(usize, usize, GroupKey), u64>,
    /// Of asked, asker and group the last want that came.
    heard_last: HashMap<(usize, usize, GroupKey), u64>,
    pub(super) reach: Reach,
    /// A coordinator that answers as it likes.
    pub(super) lies: HashMap<usize, Lie>,
    /// Every pair of members that was connected.
    pub(super) connected: HashSet<(usize, usize)>,
}

impl Sim {
    pub(super) fn new(count: usize, files: Vec<FileShape>) -> Self {
        let start = Instant::now();
        let view = view_of(0..count);
        let first_piece: Vec<usize> = files
            .iter()
            .scan(0, |next, file| {
                let first = *next;
                *next += file.pieces() as usize;
                Some(first)
            })
            .collect();
        let pieces = files.iter().map(|file| file.pieces() as usize).sum();
        let machines = (0..count)
            .map(|at| Machine {
                asker: Asker::new(member_id(at), at as u64),
                coordinator: Coordinator::new(member_id(at)),
                view: Arc::clone(&view),
                // All within the same second.
                starts: Duration::from_millis(at as u64 * 7919 % 1000),
                begun: false,
                dead: false,
                done: None,
                up_bytes: 0,
                has: vec![false; pieces],
                next: None,
                later: (0..files.len()).rev().collect(),
                full: [false; 2],
            })
            .collect();
        let by_digest = files.iter().enumerate().map(|(at, file)| (file.digest, at)).collect();
        Self {
            start,
            now: start,
            machines,
            first_piece,
            by_digest,
            messages: BinaryHeap::new(),
            sent: 0,
            transfers: Vec::new(),
            mirror_rate: GBIT,
            mirror_latency: Duration::from_millis(30),
            mirror_full: false,
            roads: Roads::default(),
            link_rate: GBIT,
            mirror_bytes: 0,
            mirror_fetches: vec![0; pieces],
            wants: 0,
            windows: HashMap::new(),
            asked_last: HashMap::new(),
            heard_last: HashMap::new(),
            files,
            reach: Box::new(|_, _, _| true),
            lies: HashMap::new(),
            connected: HashSet::new(),
        }
    }

    pub(super) fn plan_bytes(&self) -> u64 {
        self.files.iter().map(|file| file.size).sum()
    }

    pub(super) fn copies(&self) -> f64 {
        self.mirror_bytes as f64 / self.plan_bytes() as f64
    }

    pub(super) fn age(&self) -> Duration {
        self.now - self.start
    }

    pub(super) fn is_done(&self) -> bool {
        self.machines.iter().all(|machine| machine.dead || machine.done.is_some())
    }

    #[cfg(test)]
    /// Runs until everybody who lives has everything, or panics after `limit`.
    pub(super) fn run(&mut self, limit: Duration) {
        while !self.is_done() {
            assert!(self.age() < limit, "not done after {limit:?}: {} machines", self.unfinished().len());
            self.step();
        }
    }

    #[cfg(test)]
    pub(super) fn run_until(&mut self, condition: impl Fn(&Self) -> bool) {
        while !condition(self) {
            assert!(self.age() < Duration::from_secs(60), "it never comes to that");
            self.step();
        }
    }

    pub(super) fn unfinished(&self) -> Vec<usize> {
        (0..self.machines.len()).filter(|at| !self.machines[*at].dead && self.machines[*at].done.is_none()).collect()
    }

    pub(super) fn kill(&mut self, at: usize) {
        self.machines[at].dead = true;
        self.transfers.retain(|transfer| transfer.to != at);
    }

    #[cfg(test)]
    /// The member that coordinates a file's first group in everybody's view.
    pub(super) fn coordinator_of(&self, file: usize) -> usize {
        let key = GroupKey { digest: self.files[file].digest, group: 0 };
        let first = self.machines[0].view.ranked(&key)[0];
        (0..self.machines.len()).find(|at| member_id(*at) == first).unwrap()
    }

    pub(super) fn index(&self, id: MemberId) -> usize {
        let contact = self.machines[0].view.member(id).map(|member| member.contact);
        let contact = contact.or_else(|| self.machines.iter().find_map(|machine| machine.view.member(id).map(|member| member.contact)));
        let SocketAddr::V4(v4) = contact.unwrap() else { panic!("all are v4") };
        usize::from(u16::from_be_bytes([v4.ip().octets()[2], v4.ip().octets()[3]]))
    }

    pub(super) fn step(&mut self) {
        self.now += STEP;
        let age = self.age();
        while self.messages.peek().is_some_and(|sent| sent.at <= self.now) {
            let Sent { from, to, message, .. } = self.messages.pop().unwrap();
            if !self.machines[to].dead && (self.reach)(from, to, age) {
                self.deliver(from, to, message);
            }
        }
        let every = age.as_millis() % 100 < STEP.as_millis();
        for at in 0..self.machines.len() {
            let machine = &mut self.machines[at];
            if machine.dead {
                continue;
            }
            if !machine.begun && age >= machine.starts {
                machine.begun = true;
                let at_once = if self.roads.files_at_once == 0 { self.files.len() } else { self.roads.files_at_once };
                for file in machine.later.split_off(machine.later.len().saturating_sub(at_once)) {
                    assert!(machine.asker.want(self.files[file], |_| false));
                }
                machine.asker.tick(&machine.view, self.now);
            }
            if machine.next.is_some_and(|next| next <= self.now) {
                machine.asker.tick(&machine.view, self.now);
            }
            let mut replies = machine.coordinator.poll(self.now);
            if every {
                replies.extend(machine.coordinator.tick(&machine.view, self.now));
            }
            for (to, key, reply) in replies {
                let to = self.index(to);
                let asked = self.heard_last[&(at, to, key)];
                self.send(at, to, Message::Reply(key, reply, asked));
            }
            self.drain(at);
        }
        self.carry();
    }

    pub(super) fn deliver(&mut self, from: usize, to: usize, message: Message) {
        let machine = &mut self.machines[to];
        match message {
            Message::Want(want, asked) => {
                self.wants += 1;
                self.heard_last.insert((to, from, want.key), asked);
                let answer = match self.lies.get(&to).and_then(|lie| lie(&want)) {
                    Some(reply) => Answer::Now(reply),
                    None => {
                        let first = self.by_digest.get(&want.key.digest).map(|file| self.first_piece[*file]);
                        let first = first.unwrap() + (want.key.group * GROUP_PIECES) as usize;
                        let has = |bit: &usize| machine.has.get(first + bit) == Some(&true);
                        let own = (0..16).filter(has).fold(0, |own, bit| own | 1 << bit);
                        let down = |id| machine.asker.is_down(id, self.now);
                        let local = Local { have: own, down: &down, mirror_pace: machine.asker.mirror_pace(self.now) };
                        machine.coordinator.want(&machine.view, &member(from), &want, &local, self.now)
                    }
                };
                if let Answer::Now(reply) = answer {
                    self.send(to, from, Message::Reply(want.key, reply, asked));
                }
            }
            // An answer to an earlier want is none to the last one.
            Message::Reply(key, _, asked) if self.asked_last.get(&(to, from, key)) != Some(&asked) => {}
            Message::Reply(key, reply, _) => {
                machine.asker.reply(&machine.view, member_id(from), key, &reply, self.now);
                self.drain(to);
            }
        }
    }

    /// How long a small thing takes from one end to another.
    fn way(&self, from: usize, to: usize) -> Duration {
        let full = |end: usize, way: usize| if end == MIRROR { self.mirror_full && way == 0 } else { self.machines[end].full[way] };
        MESSAGE_TAKES + self.roads.queue * (u32::from(full(from, 0)) + u32::from(full(to, 1)))
    }

    pub(super) fn send(&mut self, from: usize, to: usize, message: Message) {
        self.sent += 1;
        let takes = if from == to { Duration::ZERO } else { self.way(from, to) };
        self.messages.push(Sent { at: self.now + takes, nth: self.sent, from, to, message });
    }

    pub(super) fn drain(&mut self, at: usize) {
        while let Some(todo) = self.machines[at].asker.poll() {
            match todo {
                AskDo::Want { to, want } => {
                    let to = self.index(to);
                    self.asked_last.insert((at, to, want.key), self.sent);
                    self.send(at, to, Message::Want(want, self.sent));
                }
                AskDo::Fetch { digest, piece, from } => {
                    let number = self.first_piece[self.by_digest[&digest]] + piece as usize;
                    let left = f64::from(self.files[self.by_digest[&digest]].piece_len(piece));
                    let from = match from {
                        Origin::Mirror => MIRROR,
                        Origin::Member(id) => self.index(id),
                    };
                    let there_and_back = self.way(at, from) + self.way(from, at);
                    let starts = self.now + if from == MIRROR { self.mirror_latency.max(there_and_back) } else { there_and_back };
                    self.connected.insert((at, from));
                    // From half to one and a half, by what is transferred.
                    let weight = if self.roads.tcp { 0.5 + (at * 7_919 + number * 104_729) as f64 % 1_000.0 / 1_000.0 } else { 1.0 };
                    // Connections are kept, and with them their windows.
                    let kept = self.windows.get(&(at, from)).filter(|(used, _)| self.now - *used < IDLE_RESETS);
                    let doubled = kept.map_or(0.0, |(_, doubled)| *doubled);
                    self.transfers.push(Transfer { weight, doubled, to: at, from, piece: number, starts, left });
                }
                AskDo::Done(digest) => {
                    let file = self.by_digest[&digest];
                    let pieces = self.first_piece[file]..self.first_piece[file] + self.files[file].pieces() as usize;
                    assert!(pieces.into_iter().all(|piece| self.machines[at].has[piece]), "done without every piece");
                    if let Some(next) = self.machines[at].later.pop() {
                        let machine = &mut self.machines[at];
                        assert!(machine.asker.want(self.files[next], |_| false));
                        machine.asker.tick(&machine.view, self.now);
                    }
                    if self.machines[at].asker.is_idle() {
                        self.machines[at].done = Some(self.age() - self.machines[at].starts);
                    }
                }
            }
        }
        self.machines[at].next = self.machines[at].asker.next_timeout();
    }

    /// Moves bytes: each link's rate is shared by what runs over it.
    pub(super) fn carry(&mut self) {
        let step_s = STEP.as_secs_f64();
        let rates = self.rates();
        let doubling: Vec<f64> = self.transfers.iter().map(|transfer| step_s / self.there_and_back(transfer)).collect();
        let (now, age) = (self.now, self.age());
        let mut ended = Vec::new();
        // From the last one, so that a removed one's place is taken by one that was looked at.
        for at in (0..self.transfers.len()).rev() {
            let transfer = &mut self.transfers[at];
            if transfer.starts > now {
                continue;
            }
            let gone = transfer.from != MIRROR && (self.machines[transfer.from].dead || !(self.reach)(transfer.to, transfer.from, age));
            let lacks = transfer.from != MIRROR && !gone && !self.machines[transfer.from].has[transfer.piece];
            let failed = (gone && now >= transfer.starts + CONNECT_TAKES) || lacks;
            if !gone {
                transfer.left -= step_s * rates[at];
                transfer.doubled += doubling[at];
            }
            if failed || transfer.left <= 0.0 {
                self.windows.insert((transfer.to, transfer.from), (now, transfer.doubled));
                ended.push((self.transfers.swap_remove(at), failed));
            }
        }
        for (transfer, failed) in ended {
            self.end(&transfer, failed);
        }
    }

    /// The rate of each transfer, in bytes a second. Notes which links are full.
    fn rates(&mut self) -> Vec<f64> {
        let (now, count) = (self.now, self.machines.len());
        // Links: each machine's out, each machine's in, the mirror's.
        let capacity = |link: usize| if link == 2 * count { self.mirror_rate } else { self.link_rate };
        let links = |transfer: &Transfer| [if transfer.from == MIRROR { 2 * count } else { transfer.from }, count + transfer.to];
        let most: Vec<f64> =
            self.transfers.iter().map(|transfer| if transfer.starts > now { 0.0 } else { self.rate_max(transfer) }).collect();
        let mut rates = vec![0.0; most.len()];
        let mut used = vec![0.0; 2 * count + 1];
        // What one cannot use, since it is held up elsewhere, is the others' to use, as with TCP.
        for _ in 0..if self.roads.tcp { 4 } else { 1 } {
            let mut weights = vec![0.0; used.len()];
            let wants_more = |at: usize, rates: &[f64]| rates[at] < most[at];
            for (at, transfer) in self.transfers.iter().enumerate().filter(|(at, _)| wants_more(*at, &rates)) {
                debug_assert!(transfer.starts <= now && at < most.len());
                links(transfer).into_iter().for_each(|link| weights[link] += transfer.weight);
            }
            let left: Vec<f64> = (0..used.len()).map(|link| (capacity(link) - used[link]).max(0.0)).collect();
            for (at, transfer) in self.transfers.iter().enumerate() {
                if wants_more(at, &rates) {
                    let share = |link: usize| left[link] * transfer.weight / weights[link];
                    let more = links(transfer).into_iter().map(share).fold(most[at] - rates[at], f64::min);
                    rates[at] += more;
                    links(transfer).into_iter().for_each(|link| used[link] += more);
                }
            }
        }
        let is_full = |link: usize| used[link] >= 0.9 * capacity(link);
        let full: Vec<bool> = (0..used.len()).map(is_full).collect();
        self.mirror_full = full[2 * count];
        for (at, machine) in self.machines.iter_mut().enumerate() {
            machine.full = [full[at], full[count + at]];
        }
        rates
    }

    /// What a transfer could use: TCP begins with few packets.
    fn rate_max(&self, transfer: &Transfer) -> f64 {
        if !self.roads.tcp {
            return f64::INFINITY;
        }
        FIRST_WINDOW * transfer.doubled.min(30.0).exp2() / self.there_and_back(transfer)
    }

    fn there_and_back(&self, transfer: &Transfer) -> f64 {
        (self.way(transfer.to, transfer.from) + self.way(transfer.from, transfer.to)).as_secs_f64()
    }

    pub(super) fn end(&mut self, transfer: &Transfer, failed: bool) {
        let file = self.first_piece.partition_point(|first| *first <= transfer.piece) - 1;
        let piece = u32::try_from(transfer.piece - self.first_piece[file]).unwrap();
        let (digest, len) = (self.files[file].digest, u64::from(self.files[file].piece_len(piece)));
        let machine = &mut self.machines[transfer.to];
        if failed {
            let from = Origin::Member(member_id(transfer.from));
            machine.asker.fetch_failed(&machine.view, digest, piece, from, true, self.now);
        } else {
            machine.has[transfer.piece] = true;
            machine.asker.fetched(&machine.view, digest, piece, self.now);
            if transfer.from == MIRROR {
                self.mirror_bytes += len;
                self.mirror_fetches[transfer.piece] += 1;
            } else {
                self.machines[transfer.from].up_bytes += len;
            }
        }
        self.drain(transfer.to);
    }

    pub(super) fn times(&self) -> Vec<f64> {
        let mut times: Vec<f64> = self.machines.iter().filter_map(|machine| machine.done).map(|took| took.as_secs_f64()).collect();
        times.sort_by(f64::total_cmp);
        times
    }
}

/// The shape of a plan as bookworm's: 66 packages of one piece and 23 large ones with 97 % of the bytes.
pub(super) fn plan(scale: u64) -> Vec<FileShape> {
    let small = (0..66).map(|nth| 30_000 + nth * 800);
    let large = (0..23).map(|nth| (1_200_000 + nth * 371_000) / scale);
    small.chain(large).enumerate().map(|(nth, size)| file(nth, size)).collect()
}

/// Twelve small packages, 1.3 MB together.
pub(super) fn small_packages() -> Vec<FileShape> {
    (0..12).map(|nth| file(nth, 60_000 + nth as u64 * 9_000)).collect()
}
