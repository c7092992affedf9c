//! The side of who wants files: whom to ask, what to fetch from whom, and when to go to the mirror unasked.

use super::coordinator::LEASE;
use super::{BAD_MAX, GROUP_PIECES, GroupKey, MemberId, RANKS, ROOM_MAX, Reply, SILENT_MAX, View, Want, group_bits, groups, weight};
use crate::swarm::FileShape;
use poolfs_core::Digest;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

/// Groups worked on at once; of small files more, until so many pieces are missing in all.
const GROUPS_AT_ONCE_MIN: usize = 8;
const PIECES_AT_ONCE: u32 = 64;

/// Groups worked on at once, at most.
pub const GROUPS_AT_ONCE: usize = 32;

/// Groups that wait; past that a file is not taken and goes the way of a lone machine.
pub(super) const GROUPS_WAITING_MAX: usize = 100_000;

/// A coordinator silent for this long is asked again, and the next one too.
const SILENT: Duration = Duration::from_secs(1);

/// One that meanwhile answered something else is only busy, or its answer was lost: it alone is asked again, this often.
const BUSY_MAX: u8 = 4;

/// All coordinators silent for this long: to the mirror.
const ALL_SILENT: Duration = Duration::from_secs(5);

/// Nothing came of a group for this long, and of none for [`IDLE`]: to the mirror.
const STUCK: Duration = Duration::from_secs(20);
const IDLE: Duration = Duration::from_secs(5);

/// Nothing came of a group for this long, whatever came of others: to the mirror.
const STUCK_MAX: Duration = Duration::from_secs(60);

/// The delay before going to the mirror unasked is up to this for each hundred members, so that they do not go together.
const FALLBACK_DELAY: Duration = Duration::from_secs(2);

/// A member whose request failed is not asked again for this long.
const DOWN_FOR: Duration = Duration::from_secs(10);

/// Time that a coordinator's hints may cost without any result: three times three seconds.
const HINTS_COST_MAX: Duration = Duration::from_secs(9);

/// A coordinator whose hints cost too much is passed over for this long.
const PASSED_OVER_FOR: Duration = Duration::from_secs(600);

/// A leaseholder is heard this often.
const RENEW: Duration = Duration::from_secs(2);

/// So long after joining this machine asks the next coordinator about groups of its own: it may not have been told yet who has what.
const NEW_FOR: Duration = Duration::from_secs(60);

/// The longest that a `wait` is obeyed without asking again.
const WAIT_MAX: Duration = Duration::from_secs(1);

/// How often in a row a coordinator that names only who is of no use is asked again at once: it is told, and names others.
const UNUSABLE_MAX: u8 = 4;

/// How many `see` are followed.
const SEE_MAX: u8 = 2;

/// A mirror that takes at least this long for a piece is told of as slow.
const MIRROR_PACE_TOLD: Duration = Duration::from_secs(1);

/// Pieces from the mirror whose times are remembered.
const MIRROR_TIMES_KEPT: usize = 8;

/// Pieces fetched from the mirror at once: at the start, and at least. There is one less for each that took longer than
/// [`MIRROR_SLOW`] and twice the quickest one, otherwise one more, up to [`ROOM_MAX`]: a mirror that many share brings a few pieces
/// soon rather than many late, and what is not leased to this machine may be to another. Where it only answers late that does not help.
/// With four at the start sixteen machines behind 12 Mbit/s fetched 1.3 to 1.5 copies and took a tenth longer.
const MIRROR_SLOTS_FIRST: u8 = 2;
const MIRROR_SLOTS_MIN: u8 = 2;
const MIRROR_SLOW: Duration = Duration::from_secs(1);

/// Room that a coordinator was told of is not told to another for this long.
const OFFERED_FOR: Duration = Duration::from_millis(100);

/// Members whose failures are remembered: as many as there can be.
const FAILED_MAX: usize = super::MEMBERS_MAX;

/// Where a piece comes from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Origin {
    /// The mirror, by leave of a coordinator or because none helps.
    Mirror,
    /// A member, always one of the view.
    Member(MemberId),
}

/// What the caller is to do.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum AskDo {
    /// Send this want.
    Want {
        /// To this member.
        to: MemberId,
        /// The query.
        want: Want,
    },
    /// Fetch this piece of the file.
    Fetch {
        /// The file.
        digest: Digest,
        /// The piece, counted within the file.
        piece: u32,
        /// Where it comes from.
        from: Origin,
    },
    /// The file's last piece is here.
    Done(Digest),
}

#[derive(Clone, Debug)]
struct Query {
    sent: Instant,
    /// The coordinators asked, first to last.
    asked: Vec<MemberId>,
    /// Asked of another though this machine coordinates the group, see [`Want::newcomer`].
    newcomer: bool,
    /// What was told of the room at the mirror.
    room: u8,
    /// How often the last one asked was asked again as one that is busy.
    busy: u8,
}

#[derive(Clone, Copy, Debug)]
struct Fetching {
    from: Origin,
    since: Instant,
    /// Whose hint it is; `None`: our own fallback.
    by: Option<MemberId>,
}

#[derive(Debug)]
struct Group {
    shape: FileShape,
    all: u16,
    have: u16,
    fetching: [Option<Fetching>; GROUP_PIECES as usize],
    /// Pieces that are this machine's to fetch from the mirror when there is room, with who said so.
    leased: u16,
    leased_by: Option<MemberId>,
    query: Option<Query>,
    /// Who `see` named, to be asked instead of the first.
    seen: Option<MemberId>,
    hops: u8,
    /// Answers in a row that named only who is of no use.
    unusable: u8,
    /// The next coordinator knows nothing of it either: this machine leads it.
    own: bool,
    ask_at: Option<Instant>,
    /// Since when all that was asked of has been silent.
    silent_since: Option<Instant>,
    progress: Instant,
    fallback_at: Option<Instant>,
    told: u16,
    /// Who has failed this machine here, and whom it does not know: told to the coordinator.
    bad: VecDeque<(SocketAddr, Instant)>,
    /// Coordinators that have not answered, or cannot be asked: told too, so that nobody sends this machine there.
    silent: VecDeque<(SocketAddr, Instant)>,
    mirror_bad: Option<Instant>,
}

/// What one machine wants of its fleet, over all files of a plan.
#[derive(Debug)]
pub struct Asker {
    me: MemberId,
    active: BTreeMap<GroupKey, Group>,
    /// Not begun yet, in this machine's own order.
    waiting: BTreeMap<(u64, GroupKey), (FileShape, u16)>,
    left: HashMap<Digest, u32>,
    down: HashMap<MemberId, Instant>,
    /// Who did not answer as a coordinator: a busy machine, which may give pieces all the same.
    silent: HashMap<MemberId, Instant>,
    passed_over: HashMap<MemberId, Instant>,
    /// Since when a coordinator's hints have brought nothing.
    in_vain: HashMap<MemberId, Instant>,
    /// How long the last pieces from the mirror took.
    mirror_times: VecDeque<Duration>,
    mirror_slots: u8,
    mirror_quickest: Option<Duration>,
    /// When a member last answered anything.
    heard: HashMap<MemberId, Instant>,
    joined: Option<Instant>,
    /// When a piece last came.
    progress: Option<Instant>,
    random: u64,
    todo: VecDeque<AskDo>,
}

impl Asker {
    /// `seed` is this run's randomness for delays.
    pub fn new(me: MemberId, seed: u64) -> Self {
        Self {
            me,
            active: BTreeMap::new(),
            waiting: BTreeMap::new(),
            left: HashMap::new(),
            down: HashMap::new(),
            silent: HashMap::new(),
            passed_over: HashMap::new(),
            in_vain: HashMap::new(),
            mirror_times: VecDeque::new(),
            mirror_slots: MIRROR_SLOTS_FIRST,
            mirror_quickest: None,
            heard: HashMap::new(),
            joined: None,
            progress: None,
            random: seed,
            todo: VecDeque::new(),
        }
    }

    /// Notes that others are there now, who had nobody to tell before.
    pub fn joined(&mut self, now: Instant) {
        self.joined = Some(now);
    }

    /// Wants a file of which the pieces for which `has` holds are here; asking begins with the next [`Self::tick`], so that a
    /// whole plan is known before its order is chosen. `false`: too much is waiting already.
    pub fn want(&mut self, shape: FileShape, has: impl Fn(u32) -> bool) -> bool {
        let count = groups(&shape);
        if self.waiting.len() + count as usize > GROUPS_WAITING_MAX || self.left.contains_key(&shape.digest) {
            return false;
        }
        let mut left = 0;
        for group in 0..count {
            let key = GroupKey { digest: shape.digest, group };
            let all = group_bits(&shape, group);
            let have = (0..GROUP_PIECES).filter(|bit| has(group * GROUP_PIECES + bit)).fold(0, |have, bit| have | 1 << bit) & all;
            left += (all & !have).count_ones();
            if all != have {
                // An order of one's own spreads the first leases over the machines.
                self.waiting.insert((weight(&self.me, &key), key), (shape, have));
            }
        }
        if left == 0 {
            self.todo.push_back(AskDo::Done(shape.digest));
        } else {
            self.left.insert(shape.digest, left);
        }
        true
    }

    /// No longer wants a file.
    pub fn forget(&mut self, digest: &Digest, view: &View, now: Instant) {
        self.left.remove(digest);
        self.active.retain(|key, _| key.digest != *digest);
        self.waiting.retain(|(_, key), _| key.digest != *digest);
        self.begin_groups(view, now);
        self.use_room(view, now);
    }

    /// Whether nothing is wanted.
    pub fn is_idle(&self) -> bool {
        self.left.is_empty()
    }

    /// The pieces of a group that are here, as far as the group is being worked on.
    pub fn have(&self, key: &GroupKey) -> u16 {
        self.active.get(key).map_or(0, |group| group.have)
    }

    /// What to do next, oldest first; call it until it gives nothing.
    pub fn poll(&mut self) -> Option<AskDo> {
        self.todo.pop_front()
    }

    /// Takes the answer of a member to a want for this group. What it leases is begun as far as there is room.
    pub fn reply(&mut self, view: &View, from: MemberId, key: GroupKey, reply: &Reply, now: Instant) {
        self.down.remove(&from);
        self.silent.remove(&from);
        note(&mut self.heard, from, now);
        let Some(group) = self.active.get_mut(&key) else { return };
        let Some(query) = group.query.take() else { return };
        // Who was asked before the one that answers has been silent for a second, twice asked.
        for silent in query.asked.iter().copied().take_while(|id| *id != from) {
            if query.asked.contains(&from) {
                note(&mut self.silent, silent, now);
            }
        }
        group.silent_since = None;
        if query.newcomer && reply.see.is_some() {
            group.own = true;
            return self.ask(view, key, now);
        }
        if let Some(contact) = reply.see {
            let known = view.at(&contact).map(|member| member.id);
            // Only upwards and only twice: nobody can send us in a circle.
            let follow = known.filter(|id| weight(id, &key) > weight(&from, &key) && group.hops < SEE_MAX && *id != self.me);
            let follow = follow.filter(|id| is_up([&self.down, &self.silent], &self.passed_over, *id, now));
            group.hops = group.hops.saturating_add(1);
            match follow {
                Some(id) => group.seen = Some(id),
                // Told so, it does not name it again.
                None => note_contact(&mut group.silent, SILENT_MAX, contact, now),
            }
            if group.hops <= 2 * SEE_MAX {
                self.ask(view, key, now);
            } else {
                group.hops = 0;
                group.ask_at = Some(now + WAIT_MAX);
            }
            return;
        }
        group.hops = 0;
        let (mut hinted, mut took) = (false, false);
        let free_pieces = |group: &Group, bits: u16| bits & group.all & !group.have & !group.fetching_bits();
        if let Some((bits, _)) = reply.take {
            group.leased = free_pieces(group, bits);
            group.leased_by = Some(from);
            took = group.leased != 0 || group.mirror_bits() != 0;
        } else {
            group.leased = 0;
        }
        for (contact, bits) in &reply.from {
            // Whatever a coordinator names, only members are ever connected to.
            let Some(member) = view.at(contact).filter(|member| member.id != self.me) else {
                group.note_bad(*contact, now);
                continue;
            };
            // Who is passed over as a coordinator may still be a good holder.
            if self.down.get(&member.id).is_none_or(|at| now.saturating_duration_since(*at) >= DOWN_FOR) {
                let bits = free_pieces(group, *bits);
                group.leased &= !bits;
                group.fetch(key, bits, Origin::Member(member.id), Some(from), now, &mut self.todo);
                hinted |= bits != 0;
            } else {
                group.note_bad(*contact, now);
            }
        }
        if reply.free {
            group.plan_fallback(view.len(), &mut self.random, now);
        }
        if group.fetching_bits() == 0 {
            let named_in_vain = !reply.from.is_empty() && !hinted;
            group.unusable = if named_in_vain { group.unusable.saturating_add(1) } else { 0 };
            let wait = match reply.wait.unwrap_or(WAIT_MAX).min(WAIT_MAX) {
                _ if named_in_vain && group.unusable <= UNUSABLE_MAX => Duration::ZERO,
                wait => wait,
            };
            group.ask_at = Some(now + if hinted || took { RENEW } else { wait });
        } else {
            group.ask_at = Some(now + RENEW);
        }
        if took {
            // A slow mirror is not the coordinator's fault.
            self.in_vain.remove(&from);
        } else {
            self.in_vain.entry(from).or_insert(now);
        }
        self.pass_over(now);
        self.use_room(view, now);
    }

    /// Notes that a piece is here and right as far as can be told.
    pub fn fetched(&mut self, view: &View, digest: Digest, piece: u32, now: Instant) {
        let key = GroupKey { digest, group: piece / GROUP_PIECES };
        let bit = 1u16 << (piece % GROUP_PIECES);
        if !self.active.contains_key(&key) {
            return self.came_by_itself(key, bit);
        }
        let Some(group) = self.active.get_mut(&key).filter(|group| group.all & !group.have & bit != 0) else { return };
        group.have |= bit;
        self.progress = Some(now);
        group.progress = now;
        group.fallback_at = None;
        let fetching = group.fetching[(piece % GROUP_PIECES) as usize].take();
        if let Some(Fetching { from: Origin::Mirror, since, .. }) = fetching {
            self.mirror_times.push_back(now.saturating_duration_since(since));
            while self.mirror_times.len() > MIRROR_TIMES_KEPT {
                self.mirror_times.pop_front();
            }
            let took = now.saturating_duration_since(since);
            let quickest = self.mirror_quickest.map_or(took, |quickest| quickest.min(took));
            self.mirror_quickest = Some(quickest);
            self.mirror_slots = if took > MIRROR_SLOW.max(quickest * 2) {
                (self.mirror_slots - 1).max(MIRROR_SLOTS_MIN)
            } else {
                (self.mirror_slots + 1).min(ROOM_MAX)
            };
        }
        if let Some(by) = fetching.and_then(|fetching| fetching.by) {
            self.in_vain.remove(&by);
        }
        let complete = group.have == group.all;
        group.leased &= !bit;
        let report = (group.have & !group.told).count_ones() >= 4 || group.fetching_bits() == 0;
        if complete || report {
            self.ask(view, key, now);
        }
        if complete {
            // The last want told the coordinator that this machine is a holder; its answer is of no interest.
            self.active.remove(&key);
        }
        self.one_less(digest);
        self.begin_groups(view, now);
        self.use_room(view, now);
    }

    /// A piece of a group that is not asked for yet is here.
    fn came_by_itself(&mut self, key: GroupKey, bit: u16) {
        let waiting = (weight(&self.me, &key), key);
        let Some((shape, have)) = self.waiting.get_mut(&waiting) else { return };
        let all = group_bits(shape, key.group);
        if all & !*have & bit == 0 {
            return;
        }
        *have |= bit;
        if *have == all {
            self.waiting.remove(&waiting);
        }
        self.one_less(key.digest);
    }

    fn one_less(&mut self, digest: Digest) {
        let Some(left) = self.left.get_mut(&digest) else { return };
        *left -= 1;
        if *left == 0 {
            self.left.remove(&digest);
            self.todo.push_back(AskDo::Done(digest));
        }
    }

    /// Notes that a piece did not come. `gone`: the member cannot be reached, and is not asked for anything for a while.
    pub fn fetch_failed(&mut self, view: &View, digest: Digest, piece: u32, from: Origin, gone: bool, now: Instant) {
        let key = GroupKey { digest, group: piece / GROUP_PIECES };
        if let Origin::Member(member) = from
            && gone
        {
            self.member_failed(member, now);
        }
        let Some(group) = self.active.get_mut(&key) else { return };
        let slot = &mut group.fetching[(piece % GROUP_PIECES) as usize];
        if slot.is_some_and(|fetching| fetching.from == from) {
            *slot = None;
        }
        match from {
            Origin::Mirror => group.mirror_bad = Some(now),
            Origin::Member(member) => view.member(member).into_iter().for_each(|member| group.note_bad(member.contact, now)),
        }
        if group.fetching_bits() == 0 && group.query.is_none() {
            self.ask(view, key, now);
        }
        self.use_room(view, now);
    }

    /// Notes that a request to a member failed: for a while it is down for this machine, whatever others say.
    pub fn member_failed(&mut self, member: MemberId, now: Instant) {
        note(&mut self.down, member, now);
    }

    /// Acts on the time.
    pub fn tick(&mut self, view: &View, now: Instant) {
        self.pass_over(now);
        self.begin_groups(view, now);
        let keys: Vec<GroupKey> = self.active.keys().copied().collect();
        for key in keys {
            let Some(group) = self.active.get_mut(&key) else { continue };
            match &group.query {
                Some(query) if now >= query.sent + SILENT => self.ask_further(view, key, now),
                Some(_) => {}
                None if group.ask_at.is_some_and(|at| now >= at) => self.ask(view, key, now),
                None => {}
            }
            let Some(group) = self.active.get_mut(&key) else { continue };
            let silent = group.silent_since.is_some_and(|since| now >= since + ALL_SILENT);
            let stuck = group.stuck_at(self.progress).is_some_and(|at| now >= at);
            if (silent || stuck) && group.fallback_at.is_none() {
                group.plan_fallback(view.len(), &mut self.random, now);
            }
            if group.fallback_at.is_some_and(|at| now >= at) {
                group.fallback_at = None;
                group.progress = now;
                group.silent_since = None;
                // What somebody was to bring and has not brought is fetched as well.
                let bits = group.all & !group.have & !group.mirror_bits();
                group.leased = 0;
                group.fetch(key, bits, Origin::Mirror, None, now, &mut self.todo);
            }
        }
    }

    /// When [`Self::tick`] is to be called at the latest; a time that is past: now.
    pub fn next_timeout(&self) -> Option<Instant> {
        let of = |group: &Group| {
            let query = group.query.as_ref().map(|query| query.sent + SILENT);
            let planned = group
                .fallback_at
                .or_else(|| group.stuck_at(self.progress).into_iter().chain(group.silent_since.map(|since| since + ALL_SILENT)).min());
            [query.or(group.ask_at), planned].into_iter().flatten().min()
        };
        self.active.values().filter_map(of).chain(self.in_vain.values().map(|at| *at + HINTS_COST_MAX)).min()
    }

    /// How long the mirror takes for a piece: the median of the last ones, or of those under way if that is longer already.
    pub fn mirror_pace(&self, now: Instant) -> Option<Duration> {
        let median = |mut times: Vec<Duration>| {
            times.sort_unstable();
            times.get(times.len() / 2).copied()
        };
        let fetching = self.active.values().flat_map(|group| group.fetching.iter().flatten());
        let running = fetching.filter(|fetching| fetching.from == Origin::Mirror);
        let running = median(running.map(|fetching| now.saturating_duration_since(fetching.since)).collect());
        running.max(median(self.mirror_times.iter().copied().collect()))
    }

    /// Whether a member has just failed to answer this machine.
    pub fn is_down(&self, member: MemberId, now: Instant) -> bool {
        [&self.down, &self.silent]
            .iter()
            .any(|missing| missing.get(&member).is_some_and(|at| now.saturating_duration_since(*at) < DOWN_FOR))
    }

    /// Until when `member` is passed over as a coordinator, if its hints have cost too much.
    pub fn passed_over_until(&self, member: MemberId) -> Option<Instant> {
        self.passed_over.get(&member).map(|at| *at + PASSED_OVER_FOR)
    }

    fn begin_groups(&mut self, view: &View, now: Instant) {
        let missing = |groups: &BTreeMap<GroupKey, Group>| groups.values().map(|group| (group.all & !group.have).count_ones()).sum::<u32>();
        while self.active.len() < GROUPS_AT_ONCE_MIN || self.active.len() < GROUPS_AT_ONCE && missing(&self.active) < PIECES_AT_ONCE {
            let Some(((_, key), (shape, have))) = self.waiting.pop_first() else { return };
            let group = Group {
                shape,
                all: group_bits(&shape, key.group),
                have,
                fetching: [None; GROUP_PIECES as usize],
                leased: 0,
                leased_by: None,
                query: None,
                seen: None,
                hops: 0,
                unusable: 0,
                own: false,
                ask_at: None,
                silent_since: None,
                progress: now,
                fallback_at: None,
                told: have,
                bad: VecDeque::new(),
                silent: VecDeque::new(),
                mirror_bad: None,
            };
            self.active.insert(key, group);
            self.ask(view, key, now);
        }
    }

    /// The coordinators to ask, best first: live in the view, not down, not passed over.
    fn coordinators(&self, view: &View, key: &GroupKey, seen: Option<MemberId>, now: Instant) -> Vec<MemberId> {
        let up = |id: &MemberId| is_up([&self.down, &self.silent], &self.passed_over, *id, now);
        let ranked = view.ranked(key);
        let seen = seen.filter(|id| view.member(*id).is_some());
        let mut all: Vec<MemberId> = seen.into_iter().chain(ranked.iter().copied()).filter(up).collect();
        let mut known = Vec::new();
        all.retain(|id| {
            let new = !known.contains(id);
            known.push(*id);
            new
        });
        all.truncate(RANKS);
        all
    }

    fn ask(&mut self, view: &View, key: GroupKey, now: Instant) {
        let Some(group) = self.active.get(&key) else { return };
        let is_new = !group.own && self.joined.is_some_and(|at| now.saturating_duration_since(at) < NEW_FOR);
        let (first, newcomer) = match *self.coordinators(view, &key, group.seen, now) {
            [first, next, ..] if first == self.me && is_new => (Some(next), true),
            [first, ..] => (Some(first), false),
            [] => (None, false),
        };
        let (want, room) = (self.wanted(key, now), self.room(now));
        let (Some(group), Some(mut want)) = (self.active.get_mut(&key), want) else { return };
        want.newcomer = newcomer;
        group.ask_at = None;
        group.told = group.have;
        match first {
            Some(to) => {
                want.room = room;
                group.query = Some(Query { sent: now, asked: vec![to], newcomer, room, busy: 0 });
                self.todo.push_back(AskDo::Want { to, want });
            }
            None => {
                // Nobody to ask: as if all were silent.
                group.silent_since.get_or_insert(now);
                group.ask_at = Some(now + SILENT);
            }
        }
    }

    /// After a second of silence: the first again, and one more; who stays silent is down.
    fn ask_further(&mut self, view: &View, key: GroupKey, now: Instant) {
        let Some(group) = self.active.get(&key) else { return };
        let Some(query) = group.query.clone() else { return };
        let next = self.coordinators(view, &key, group.seen, now).into_iter().find(|id| !query.asked.contains(id));
        let (want, room) = (self.wanted(key, now), self.room(now));
        let (Some(group), Some(mut want)) = (self.active.get_mut(&key), want) else { return };
        (want.newcomer, want.room) = (query.newcomer, room);
        let busy = query.asked.last().copied().filter(|last| self.heard.get(last).is_some_and(|at| *at >= query.sent));
        if let Some(busy) = busy.filter(|_| query.busy < BUSY_MAX) {
            group.query = Some(Query { sent: now, room, busy: query.busy + 1, ..query });
            return self.todo.push_back(AskDo::Want { to: busy, want });
        }
        group.silent_since.get_or_insert(query.sent);
        let Some(next) = next.filter(|_| query.asked.len() < RANKS) else {
            // Passed over they are for a while; the ones after them are asked at once.
            group.query = None;
            group.seen = None;
            query.asked.into_iter().for_each(|member| note(&mut self.silent, member, now));
            return self.ask(view, key, now);
        };
        // So that the next one does not name the silent ones again.
        for silent in query.asked.iter().filter_map(|id| view.member(*id)) {
            note_contact(&mut group.silent, SILENT_MAX, silent.contact, now);
            if !want.silent.contains(&silent.contact) {
                want.silent.truncate(SILENT_MAX - 1);
                want.silent.push(silent.contact);
            }
        }
        let first = query.asked.first().copied();
        let asked = query.asked.into_iter().chain([next]).collect();
        group.query = Some(Query { sent: now, asked, newcomer: query.newcomer, room, busy: 0 });
        for to in first.into_iter().chain([next]) {
            self.todo.push_back(AskDo::Want { to, want: want.clone() });
        }
    }

    /// How many pieces more are worth a lease now. Where they come quickly, as many as are fetched at once may wait for that.
    fn room(&self, now: Instant) -> u8 {
        // What was offered a moment ago may be taken up yet.
        let offered = |group: &Group| {
            let query = group.query.as_ref().filter(|query| now.saturating_duration_since(query.sent) < OFFERED_FOR);
            query.map_or(0, |query| u32::from(query.room).min(group.lacks().count_ones()))
        };
        let taken: u32 = self.active.values().map(|group| (group.mirror_bits() | group.leased).count_ones() + offered(group)).sum();
        let quick = self.mirror_times.back().is_some_and(|took| *took < MIRROR_SLOW / 2);
        (self.mirror_slots * if quick { 2 } else { 1 }).saturating_sub(u8::try_from(taken).unwrap_or(u8::MAX)).min(ROOM_MAX)
    }

    /// Begins what is leased as far as there is room at the mirror; asks for more where nothing is.
    fn use_room(&mut self, view: &View, now: Instant) {
        let running: u32 = self.active.values().map(|group| group.mirror_bits().count_ones()).sum();
        let mut free = u32::from(self.mirror_slots).saturating_sub(running);
        for (key, group) in &mut self.active {
            while free > 0 && group.leased != 0 {
                let bit = group.leased & group.leased.wrapping_neg();
                group.leased &= !bit;
                free -= 1;
                group.fetch(*key, bit, Origin::Mirror, group.leased_by, now, &mut self.todo);
            }
        }
        // Whoever was asked while there was no room may have something now: the one that has waited longest is asked again.
        if free > 0 {
            let starved = |group: &Group| group.query.as_ref().map_or(group.have != group.told, |query| query.room == 0);
            let longest =
                self.active.iter().filter(|(_, group)| group.lacks() != 0 && starved(group)).min_by_key(|(_, group)| group.progress);
            if let Some(key) = longest.map(|(key, _)| *key) {
                self.ask(view, key, now);
            }
        }
    }

    fn wanted(&self, key: GroupKey, now: Instant) -> Option<Want> {
        let group = self.active.get(&key)?;
        let recent = |at: &Instant| now.saturating_duration_since(*at) < DOWN_FOR;
        let told = |contacts: &VecDeque<(SocketAddr, Instant)>| -> Vec<SocketAddr> {
            contacts.iter().rev().filter(|(_, at)| recent(at)).map(|(contact, _)| *contact).collect()
        };
        Some(Want {
            key,
            size: group.shape.size,
            have: group.have,
            bad: told(&group.bad),
            silent: told(&group.silent),
            mirror_bad: group.mirror_bad.as_ref().is_some_and(recent),
            mirror_pace: self.mirror_pace(now).filter(|pace| *pace >= MIRROR_PACE_TOLD),
            room: ROOM_MAX,
            newcomer: false,
        })
    }

    /// Passes over who has cost too much: nothing came of any of its hints for too long.
    fn pass_over(&mut self, now: Instant) {
        let costly: Vec<MemberId> =
            self.in_vain.iter().filter(|(_, at)| now.saturating_duration_since(**at) >= HINTS_COST_MAX).map(|(id, _)| *id).collect();
        for member in costly {
            self.in_vain.remove(&member);
            if self.passed_over.len() >= FAILED_MAX {
                self.passed_over.retain(|_, at| now.saturating_duration_since(*at) < PASSED_OVER_FOR);
            }
            if self.passed_over.len() < FAILED_MAX {
                self.passed_over.insert(member, now);
            }
            for group in self.active.values_mut() {
                // What it named and has not come is somebody else's to name.
                for slot in &mut group.fetching {
                    *slot = slot.filter(|fetching| fetching.by != Some(member) || fetching.from == Origin::Mirror);
                }
                group.seen = group.seen.filter(|seen| *seen != member);
                if group.fetching_bits() == 0 && group.query.is_none() {
                    group.ask_at = Some(now);
                }
            }
        }
    }
}

/// Notes a member that failed in one way or another, as far as there is room.
fn note(failed: &mut HashMap<MemberId, Instant>, member: MemberId, now: Instant) {
    if failed.len() >= FAILED_MAX {
        failed.retain(|_, at| now.saturating_duration_since(*at) < DOWN_FOR);
    }
    if failed.len() < FAILED_MAX {
        failed.insert(member, now);
    }
}

/// The newest last, each once.
fn note_contact(contacts: &mut VecDeque<(SocketAddr, Instant)>, contacts_max: usize, contact: SocketAddr, now: Instant) {
    contacts.retain(|(other, _)| *other != contact);
    contacts.push_back((contact, now));
    while contacts.len() > contacts_max {
        contacts.pop_front();
    }
}

fn is_up(missing: [&HashMap<MemberId, Instant>; 2], passed_over: &HashMap<MemberId, Instant>, id: MemberId, now: Instant) -> bool {
    let past = |at: Option<&Instant>, lasts| at.is_none_or(|at| now.saturating_duration_since(*at) >= lasts);
    missing.iter().all(|missing| past(missing.get(&id), DOWN_FOR)) && past(passed_over.get(&id), PASSED_OVER_FOR)
}

impl Group {
    fn fetching_bits(&self) -> u16 {
        (0..16).filter(|at| self.fetching[*at].is_some()).fold(0, |all, at| all | 1 << at)
    }

    /// What is neither here nor on its way.
    fn lacks(&self) -> u16 {
        self.all & !self.have & !self.fetching_bits()
    }

    /// When this machine stops waiting for others. Who waits for the mirror itself knows that going there again would not help.
    fn stuck_at(&self, progress: Option<Instant>) -> Option<Instant> {
        let at =
            progress.map_or(self.progress + STUCK, |progress| (progress + IDLE).max(self.progress + STUCK).min(self.progress + STUCK_MAX));
        (self.mirror_bits() | self.leased == 0).then_some(at)
    }

    fn mirror_bits(&self) -> u16 {
        let mirror = |at: &usize| self.fetching[*at].is_some_and(|fetching| fetching.from == Origin::Mirror);
        (0..16).filter(mirror).fold(0, |all, at| all | 1 << at)
    }

    fn fetch(&mut self, key: GroupKey, bits: u16, from: Origin, by: Option<MemberId>, now: Instant, todo: &mut VecDeque<AskDo>) {
        for (bit, slot) in (0u32..).zip(&mut self.fetching) {
            if bits & (1 << bit) != 0 {
                *slot = Some(Fetching { from, since: now, by });
                todo.push_back(AskDo::Fetch { digest: key.digest, piece: key.group * GROUP_PIECES + bit, from });
            }
        }
    }

    fn note_bad(&mut self, contact: SocketAddr, now: Instant) {
        note_contact(&mut self.bad, BAD_MAX, contact, now);
    }

    /// To the mirror unasked, after a delay that grows with the fleet.
    fn plan_fallback(&mut self, members: usize, random: &mut u64, now: Instant) {
        if self.fallback_at.is_some() {
            return;
        }
        // SplitMix64.
        *random = random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = *random;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^= z >> 31;
        #[allow(clippy::cast_precision_loss, reason = "a random part of a delay")]
        let part = (z >> 11) as f64 / (1u64 << 53) as f64;
        #[allow(clippy::cast_precision_loss, reason = "at most MEMBERS_MAX")]
        let most = FALLBACK_DELAY.mul_f64(members as f64 / 100.0);
        self.fallback_at = Some(now + most.mul_f64(part));
    }
}

const _: () = assert!(RENEW.as_secs() < LEASE.as_secs());
