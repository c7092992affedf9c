//! A fleet under a virtual clock: links with rates, a mirror, members that die, part, lie. Rates are flat and nothing is
//! lost, so the figures are right in order of magnitude.
#![allow(clippy::unwrap_used, clippy::cast_precision_loss, reason = "tests")]

mod hostile;
mod numbers;
mod rules;

use super::*;
use std::collections::{BinaryHeap, HashSet};
use std::time::Instant;

const STEP: Duration = Duration::from_millis(5);
const MESSAGE_TAKES: Duration = Duration::from_millis(2);
const GBIT: f64 = 125e6;
/// A member that is not there is found out after this, where nothing refuses the connection.
const CONNECT_TAKES: Duration = Duration::from_secs(1);

fn member_id(at: usize) -> MemberId {
    let mut id = [0; 20];
    id.copy_from_slice(&Digest::of(&at.to_be_bytes()).0[..20]);
    MemberId(id)
}

fn contact(at: usize) -> SocketAddr {
    SocketAddr::from(([10, 1, at.to_be_bytes()[6], at.to_be_bytes()[7]], 9977))
}

fn member(at: usize) -> Member {
    Member { id: member_id(at), contact: contact(at), also: None, zone: Arc::from("") }
}

fn view_of(members: impl IntoIterator<Item = usize>) -> Arc<View> {
    Arc::new(View::new(members.into_iter().map(member)))
}

fn file(nth: usize, size: u64) -> FileShape {
    FileShape::of(Digest::of(format!("file {nth}").as_bytes()), size)
}

/// A machine that has these pieces, and whom everybody answers.
fn local(have: u16) -> Local<'static> {
    Local { have, down: &|_| false }
}

enum Message {
    Want(Want),
    Reply(GroupKey, Reply),
}

struct Sent {
    at: Instant,
    nth: u64,
    from: usize,
    to: usize,
    message: Message,
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
const MIRROR: usize = usize::MAX;

struct Transfer {
    to: usize,
    from: usize,
    piece: usize,
    starts: Instant,
    left: f64,
}

struct Machine {
    asker: Asker,
    coordinator: Coordinator,
    view: Arc<View>,
    starts: Duration,
    begun: bool,
    dead: bool,
    done: Option<Duration>,
    up_bytes: u64,
    has: Vec<bool>,
    next: Option<Instant>,
}

type Reach = Box<dyn Fn(usize, usize, Duration) -> bool>;
type Lie = Box<dyn Fn(&Want) -> Option<Reply>>;

struct Sim {
    start: Instant,
    now: Instant,
    machines: Vec<Machine>,
    files: Vec<FileShape>,
    /// Of each file the number of its first piece among all.
    first_piece: Vec<usize>,
    by_digest: HashMap<Digest, usize>,
    messages: BinaryHeap<Sent>,
    sent: u64,
    transfers: Vec<Transfer>,
    mirror_rate: f64,
    mirror_latency: Duration,
    link_rate: f64,
    mirror_bytes: u64,
    mirror_fetches: Vec<u32>,
    wants: u64,
    reach: Reach,
    /// A coordinator that answers as it likes.
    lies: HashMap<usize, Lie>,
    /// Every pair of members that was connected.
    connected: HashSet<(usize, usize)>,
}

impl Sim {
    fn new(count: usize, files: Vec<FileShape>) -> Self {
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

    fn plan_bytes(&self) -> u64 {
        self.files.iter().map(|file| file.size).sum()
    }

    fn copies(&self) -> f64 {
        self.mirror_bytes as f64 / self.plan_bytes() as f64
    }

    fn age(&self) -> Duration {
        self.now - self.start
    }

    fn is_done(&self) -> bool {
        self.machines.iter().all(|machine| machine.dead || machine.done.is_some())
    }

    /// Runs until everybody who lives has everything, or panics after `limit`.
    fn run(&mut self, limit: Duration) {
        while !self.is_done() {
            assert!(self.age() < limit, "not done after {limit:?}: {} machines", self.unfinished().len());
            self.step();
        }
    }

    fn run_until(&mut self, condition: impl Fn(&Self) -> bool) {
        while !condition(self) {
            assert!(self.age() < Duration::from_secs(60), "it never comes to that");
            self.step();
        }
    }

    fn unfinished(&self) -> Vec<usize> {
        (0..self.machines.len()).filter(|at| !self.machines[*at].dead && self.machines[*at].done.is_none()).collect()
    }

    fn kill(&mut self, at: usize) {
        self.machines[at].dead = true;
        self.transfers.retain(|transfer| transfer.to != at);
    }

    /// The member that coordinates a file's first group in everybody's view.
    fn coordinator_of(&self, file: usize) -> usize {
        let key = GroupKey { digest: self.files[file].digest, group: 0 };
        let first = self.machines[0].view.ranked(&key)[0];
        (0..self.machines.len()).find(|at| member_id(*at) == first).unwrap()
    }

    fn index(&self, id: MemberId) -> usize {
        let contact = self.machines[0].view.member(id).map(|member| member.contact);
        let contact = contact.or_else(|| self.machines.iter().find_map(|machine| machine.view.member(id).map(|member| member.contact)));
        let SocketAddr::V4(v4) = contact.unwrap() else { panic!("all are v4") };
        usize::from(u16::from_be_bytes([v4.ip().octets()[2], v4.ip().octets()[3]]))
    }

    fn step(&mut self) {
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

    fn deliver(&mut self, from: usize, to: usize, message: Message) {
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
                        let local = Local { have: own, down: &down };
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

    fn send(&mut self, from: usize, to: usize, message: Message) {
        self.sent += 1;
        self.messages.push(Sent { at: self.now + MESSAGE_TAKES, nth: self.sent, from, to, message });
    }

    fn drain(&mut self, at: usize) {
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
    fn carry(&mut self) {
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

    fn end(&mut self, transfer: &Transfer, failed: bool) {
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

    fn times(&self) -> Vec<f64> {
        let mut times: Vec<f64> = self.machines.iter().filter_map(|machine| machine.done).map(|took| took.as_secs_f64()).collect();
        times.sort_by(f64::total_cmp);
        times
    }
}

/// The shape of a plan as bookworm's: 66 packages of one piece and 23 large ones with 97 % of the bytes.
fn plan(scale: u64) -> Vec<FileShape> {
    let small = (0..66).map(|nth| 30_000 + nth * 800);
    let large = (0..23).map(|nth| (1_200_000 + nth * 371_000) / scale);
    small.chain(large).enumerate().map(|(nth, size)| file(nth, size)).collect()
}

/// Twelve small packages, 1.3 MB together.
fn small_packages() -> Vec<FileShape> {
    (0..12).map(|nth| file(nth, 60_000 + nth as u64 * 9_000)).collect()
}
