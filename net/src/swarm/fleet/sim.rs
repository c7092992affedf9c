//! A fleet in one process, with a clock that goes in steps: the coordinators and askers are the real ones, links and the mirror
//! have rates that are shared by what runs over them.
//!
//! Rates are flat and nothing is lost: right in the order of magnitude, not in the second digit. For tests and for
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
    Want(Want),
    Reply(GroupKey, Reply),
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

pub(super) struct Transfer {
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
    pub(super) link_rate: f64,
    pub(super) mirror_bytes: u64,
    pub(super) mirror_fetches: Vec<u32>,
    pub(super) wants: u64,
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
            link_rate: GBIT,
            mirror_bytes: 0,
            mirror_fetches: vec![0; pieces],
            wants: 0,
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
                for file in &self.files {
                    assert!(machine.asker.want(*file, |_| false));
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
                self.send(at, to, Message::Reply(key, reply));
            }
            self.drain(at);
        }
        self.carry();
    }

    pub(super) fn deliver(&mut self, from: usize, to: usize, message: Message) {
        let machine = &mut self.machines[to];
        match message {
            Message::Want(want) => {
                self.wants += 1;
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
                    self.send(to, from, Message::Reply(want.key, reply));
                }
            }
            Message::Reply(key, reply) => {
                machine.asker.reply(&machine.view, member_id(from), key, &reply, self.now);
                self.drain(to);
            }
        }
    }

    pub(super) fn send(&mut self, from: usize, to: usize, message: Message) {
        self.sent += 1;
        self.messages.push(Sent { at: self.now + MESSAGE_TAKES, nth: self.sent, from, to, message });
    }

    pub(super) fn drain(&mut self, at: usize) {
        while let Some(todo) = self.machines[at].asker.poll() {
            match todo {
                AskDo::Want { to, want } => {
                    let to = self.index(to);
                    self.send(at, to, Message::Want(want));
                }
                AskDo::Fetch { digest, piece, from } => {
                    let number = self.first_piece[self.by_digest[&digest]] + piece as usize;
                    let left = f64::from(self.files[self.by_digest[&digest]].piece_len(piece));
                    let (from, starts) = match from {
                        Origin::Mirror => (MIRROR, self.now + self.mirror_latency),
                        Origin::Member(id) => (self.index(id), self.now + MESSAGE_TAKES),
                    };
                    self.connected.insert((at, from));
                    self.transfers.push(Transfer { to: at, from, piece: number, starts, left });
                }
                AskDo::Done(digest) => {
                    let file = self.by_digest[&digest];
                    let pieces = self.first_piece[file]..self.first_piece[file] + self.files[file].pieces() as usize;
                    assert!(pieces.into_iter().all(|piece| self.machines[at].has[piece]), "done without every piece");
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
        let (now, age) = (self.now, self.age());
        let mut up = vec![0u32; self.machines.len()];
        let mut down = vec![0u32; self.machines.len()];
        let mut mirror = 0u32;
        for transfer in self.transfers.iter().filter(|transfer| transfer.starts <= now) {
            down[transfer.to] += 1;
            if transfer.from == MIRROR { mirror += 1 } else { up[transfer.from] += 1 }
        }
        let step_s = STEP.as_secs_f64();
        let mut ended = Vec::new();
        let mut at = 0;
        while at < self.transfers.len() {
            let transfer = &mut self.transfers[at];
            if transfer.starts > now {
                at += 1;
                continue;
            }
            let failed = transfer.from != MIRROR && {
                let holder = &self.machines[transfer.from];
                let gone = holder.dead || !(self.reach)(transfer.to, transfer.from, age);
                (gone && now >= transfer.starts + CONNECT_TAKES) || (!gone && !holder.has[transfer.piece])
            };
            let gone = transfer.from != MIRROR && (self.machines[transfer.from].dead || !(self.reach)(transfer.to, transfer.from, age));
            let from_share = match transfer.from {
                MIRROR => self.mirror_rate / f64::from(mirror),
                from => self.link_rate / f64::from(up[from]),
            };
            if !gone {
                transfer.left -= step_s * from_share.min(self.link_rate / f64::from(down[transfer.to]));
            }
            if failed || transfer.left <= 0.0 {
                ended.push((self.transfers.swap_remove(at), failed));
            } else {
                at += 1;
            }
        }
        for (transfer, failed) in ended {
            self.end(&transfer, failed);
        }
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
