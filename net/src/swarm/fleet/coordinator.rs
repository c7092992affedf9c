//! Who fetches which piece of a group from the mirror, and who gets it from whom.

use super::{BAD_MAX, FROM_MAX, GroupKey, Member, MemberId, Reply, View, Want, group_bits, weight};
use crate::swarm::FileShape;
use poolfs_core::Digest;
use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Groups remembered; past that the one asked for longest ago is forgotten.
pub const GROUPS_MAX: usize = 10_000;

/// (member, group) pairs remembered, likewise: what bounds the bytes.
const ENTRIES_MAX: usize = 1_000_000;

/// A group is forgotten so long after the last want.
const GROUP_KEPT: Duration = Duration::from_secs(600);

/// Answers held at once; past that an asker is told to wait instead.
pub const HELD_MAX: usize = 10_000;

/// How long an answer is held in the hope of a better one: with the way there and back over links that are full (a fifth of a
/// second each), less than the second after which the asker takes its coordinator for silent.
const HOLD: Duration = Duration::from_millis(400);

/// What an asker is told to wait when nothing came.
const WAIT: Duration = Duration::from_millis(100);

/// A lease lasts this long without a want of its holder; also the age of a first lease that counts as slow where none of
/// this coordinator has ended yet.
pub(super) const LEASE: Duration = Duration::from_secs(5);

/// Pieces leased to one asker while others ask.
const LEASE_PIECES_MAX: u32 = 4;

/// A lease is slow after this, or [`SLOW_MEDIANS`] times the median lease if that is longer.
const SLOW_MIN: Duration = Duration::from_secs(2);
const SLOW_MEDIANS: u32 = 4;

/// However slow the mirror is, a lease older than this is not the only one on its piece.
const SLOW_MAX: Duration = Duration::from_secs(60);

/// A group that is asked for because its coordinator failed gives no lease for so long: meanwhile the askers tell what they have.
const REFILL: Duration = Duration::from_millis(600);

/// After joining, a coordinator does so with every group: others have not told it yet what they have.
const NEW_FOR: Duration = Duration::from_secs(3);

/// Leases on one piece at once, and in [`LEASES_WINDOW`].
const LEASES_AT_ONCE: usize = 2;
const LEASES_MAX: usize = 3;
const LEASES_WINDOW: Duration = Duration::from_secs(600);

/// One asker of a group is set free in this time.
const FREE_EVERY: Duration = Duration::from_millis(250);

/// Askers that one holder of a group is given to at once.
const ASKERS_PER_HOLDER: u8 = 2;

/// A holder is given to an asker for this long without news.
const GIVEN_FOR: Duration = Duration::from_secs(5);

/// What failed an asker is not named to it again for this long.
const BAD_FOR: Duration = Duration::from_secs(10);

/// Whole files that members told of: remembered so many, so long.
const TOLD_MAX: usize = 200_000;
const TOLD_FOR: Duration = Duration::from_secs(9_000);

/// Groups of a file in which a member that has the whole of it becomes a holder at once: those of 256 MiB.
const GROUPS_TOLD_MAX: u32 = 64;

/// When full it is looked through for what has expired this often, not at every datagram.
const EXPIRE_EVERY: Duration = Duration::from_secs(60);

/// An asker that cannot reach a greater coordinator, which we can, gets no lease of us for so long: meanwhile the pieces that
/// it may not be told of by the other reach us, and from us it.
const DEFER: Duration = Duration::from_secs(2);

/// Whether a group's members are still there is looked at this often while it is asked for.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// A holder outside the view counts as there for so long after it was heard.
const HEARD_FOR: Duration = Duration::from_secs(30);

/// Lease times of which the median is taken.
const TIMES_KEPT: usize = 32;

/// What this machine knows beside the view when it is asked.
pub struct Local<'a> {
    /// The pieces of the group that it has itself.
    pub have: u16,
    /// Whether a member did not answer it just now, see [`Asker::is_down`](super::Asker::is_down).
    pub down: &'a dyn Fn(MemberId) -> bool,
    /// How long the mirror takes for a piece, as this machine sees it, see [`Asker::mirror_pace`](super::Asker::mirror_pace).
    pub mirror_pace: Option<Duration>,
}

impl std::fmt::Debug for Local<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Local").field("have", &self.have).finish_non_exhaustive()
    }
}

/// What [`Coordinator::want`] comes to.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Answer {
    /// Send this.
    Now(Reply),
    /// Nothing yet: [`Coordinator::poll`] will give the answer within a second.
    Held,
    /// The want does not fit the file: no answer.
    Ignored,
}

#[derive(Clone, Debug)]
struct Lease {
    holder: MemberId,
    since: Instant,
    renewed: Instant,
    ended: bool,
}

/// A holder named to an asker.
#[derive(Clone, Debug)]
struct Given {
    holder: usize,
    bits: u16,
    at: Instant,
}

/// One member in one group.
#[derive(Clone, Debug)]
struct Entry {
    id: MemberId,
    contact: SocketAddr,
    zone: Arc<str>,
    have: u16,
    /// To how many askers it is given now, and has ever been.
    askers: u8,
    served: u32,
    /// In the view, or heard lately.
    live: bool,
    given: Vec<Given>,
    bad: Vec<(SocketAddr, Instant)>,
    mirror_bad: Option<Instant>,
    wanted: Option<Instant>,
    /// No lease before this.
    defer_until: Option<Instant>,
    /// See [`Want::room`].
    room: u8,
    /// It coordinates this group itself and asks only who has what, see [`Want::newcomer`].
    newcomer: bool,
}

impl Entry {
    fn of(member: &Member) -> Self {
        Self {
            id: member.id,
            contact: member.contact,
            zone: Arc::clone(&member.zone),
            have: 0,
            askers: 0,
            served: 0,
            live: true,
            given: Vec::new(),
            bad: Vec::new(),
            mirror_bad: None,
            wanted: None,
            defer_until: None,
            room: 0,
            newcomer: false,
        }
    }

    /// Whether a holder has failed this asker lately.
    fn is_bad(&self, contact: &SocketAddr, now: Instant) -> bool {
        self.bad.iter().any(|(bad, at)| bad == contact && now.saturating_duration_since(*at) < BAD_FOR)
    }
}

#[derive(Debug)]
struct Group {
    size: u64,
    all: u16,
    entries: Vec<Entry>,
    by_id: HashMap<MemberId, usize>,
    /// Per piece, the leases of the last ten minutes.
    leases: Vec<Vec<Lease>>,
    wanted: Instant,
    /// When it was last looked who is there.
    looked: Instant,
    freed: Option<Instant>,
    /// No lease before this.
    refilled: Instant,
    /// Askers whose answer is held, oldest first.
    held: VecDeque<(usize, Instant)>,
    /// Something changed since the held ones were looked at.
    dirty: bool,
}

/// The state of all groups that this member coordinates.
#[derive(Debug)]
pub struct Coordinator {
    me: MemberId,
    groups: HashMap<GroupKey, Group>,
    entries: usize,
    held: usize,
    lease_times: VecDeque<Duration>,
    /// How long the mirror takes, by who said so and when.
    paces: VecDeque<(MemberId, Instant, Duration)>,
    told: HashMap<Digest, Vec<(MemberId, Instant)>>,
    pub(super) told_count: usize,
    told_expired: Option<Instant>,
    joined: Option<Instant>,
    dirty: Vec<GroupKey>,
}

/// Whether the asker has not reached this coordinator.
fn unreached(want: &Want, member: &Member) -> bool {
    want.silent.contains(&member.contact) || want.bad.contains(&member.contact)
}

impl Coordinator {
    /// Nothing is known.
    pub fn new(me: MemberId) -> Self {
        Self {
            me,
            groups: HashMap::new(),
            entries: 0,
            held: 0,
            lease_times: VecDeque::new(),
            paces: VecDeque::new(),
            told: HashMap::new(),
            told_count: 0,
            told_expired: None,
            joined: None,
            dirty: Vec::new(),
        }
    }

    /// How many groups are remembered.
    pub fn groups(&self) -> usize {
        self.groups.len()
    }

    /// Whether answers are held, so that [`Self::tick`] has something to do.
    pub fn is_holding(&self) -> bool {
        self.held > 0
    }

    /// Notes that others are there now, who had nobody to tell before.
    pub fn joined(&mut self, now: Instant) {
        self.joined = Some(now);
    }

    /// Takes the news that a member has whole files (`pf_have`).
    pub fn told(&mut self, view: &View, from: MemberId, digests: &[Digest], now: Instant) {
        for digest in digests {
            self.told_in_groups(view, from, *digest);
            if self.told_count >= TOLD_MAX && self.told_expired.is_none_or(|at| now.saturating_duration_since(at) >= EXPIRE_EVERY) {
                self.expire_told(now);
                self.told_expired = Some(now);
            }
            if self.told_count >= TOLD_MAX {
                return;
            }
            let holders = self.told.entry(*digest).or_default();
            match holders.iter_mut().find(|(holder, _)| *holder == from) {
                Some((_, at)) => *at = now,
                None => {
                    holders.push((from, now));
                    self.told_count += 1;
                }
            }
        }
    }

    /// Up to [`FROM_MAX`] live members that told of a digest, other ones for other askers.
    pub fn holders(&self, view: &View, asker: MemberId, digest: &Digest, now: Instant) -> Vec<SocketAddr> {
        let Some(told) = self.told.get(digest) else { return Vec::new() };
        let first = usize::from(asker.0[0]) << 8 | usize::from(asker.0[1]);
        let in_turn = (0..told.len()).map(|at| told[(first + at) % told.len()]);
        let fresh = in_turn.filter(|(id, at)| *id != asker && now.saturating_duration_since(*at) < TOLD_FOR);
        fresh.filter_map(|(id, _)| Some(view.member(id)?.contact)).take(FROM_MAX).collect()
    }

    /// Makes a member a holder in the groups of a file that are asked for now.
    fn told_in_groups(&mut self, view: &View, from: MemberId, digest: Digest) {
        let Some(member) = view.member(from) else { return };
        for group in 0..GROUPS_TOLD_MAX {
            let key = GroupKey { digest, group };
            let Some(group) = self.groups.get_mut(&key) else { continue };
            let before = group.entries.len();
            let at = group.entry(member);
            if group.entries[at].have != group.all {
                group.entries[at].have = group.all;
                group.dirty = true;
                self.dirty.push(key);
            }
            self.entries += group.entries.len() - before;
        }
    }

    fn expire_told(&mut self, now: Instant) {
        self.told.retain(|_, holders| {
            holders.retain(|(_, at)| now.saturating_duration_since(*at) < TOLD_FOR);
            !holders.is_empty()
        });
        self.told_count = self.told.values().map(Vec::len).sum();
    }

    /// Takes a want of a member: one of the view, or one that has proved to be of the fleet. A repetition of it is answered
    /// the same way, with the lease renewed.
    pub fn want(&mut self, view: &View, asker: &Member, want: &Want, local: &Local<'_>, now: Instant) -> Answer {
        let own_have = local.have;
        let all = group_bits(&FileShape::of(want.key.digest, want.size), want.key.group);
        if all == 0 {
            return Answer::Ignored;
        }
        let greater = self.greater(view, want, local);
        let for_newcomer = want.newcomer && greater.is_some_and(|first| first.id == asker.id);
        let first_is_unreached = match greater {
            _ if for_newcomer => false,
            Some(first) if !unreached(want, first) => {
                return Answer::Now(Reply { see: Some(first.contact), ..Reply::default() });
            }
            greater => greater.is_some(),
        };
        self.pace_told(asker.id, want.mirror_pace, now);
        self.pace_told(self.me, local.mirror_pace, now);
        if !self.groups.contains_key(&want.key) {
            self.make_room(now);
            let group = self.new_group(view, asker.id, want, all, now);
            self.entries += group.entries.len();
            self.groups.insert(want.key, group);
        }
        let group = self.groups.get_mut(&want.key).expect("just made");
        if group.size != want.size {
            return Answer::Ignored;
        }
        group.wanted = now;
        if now.saturating_duration_since(group.looked) >= LOOK_EVERY {
            group.expire(view, now);
        }
        let before = group.entries.len();
        if let Some(me) = view.member(self.me).filter(|me| own_have != 0 && me.id != asker.id) {
            let own = group.entry(me);
            group.dirty |= own_have & all & !group.entries[own].have != 0;
            group.entries[own].have |= own_have & all;
        }
        let at = group.entry(asker);
        if first_is_unreached {
            group.entries[at].defer_until.get_or_insert(now + DEFER);
        }
        group.entries[at].newcomer = for_newcomer;
        let took = group.heard(at, want, now);
        self.lease_times.extend(took);
        while self.lease_times.len() > TIMES_KEPT {
            self.lease_times.pop_front();
        }
        self.entries += group.entries.len() - before;
        // A repetition of a held want keeps its place and its time.
        let held = group.held.iter().position(|(member, _)| *member == at);
        let slow = slow_after(&self.lease_times, &self.paces, now);
        let reply = group.answer(at, slow, now);
        if group.dirty {
            self.dirty.push(want.key);
        }
        match reply {
            Some(reply) => {
                if held.and_then(|place| group.held.remove(place)).is_some() {
                    self.held -= 1;
                }
                Answer::Now(reply)
            }
            None if held.is_some() => Answer::Held,
            None if self.held < HELD_MAX => {
                self.held += 1;
                group.held.push_back((at, now + HOLD));
                Answer::Held
            }
            None => Answer::Now(Reply { wait: Some(WAIT), ..Reply::default() }),
        }
    }

    /// Answers to held wants that can be given now.
    pub fn poll(&mut self, now: Instant) -> Vec<(MemberId, GroupKey, Reply)> {
        let mut out = Vec::new();
        let slow = slow_after(&self.lease_times, &self.paces, now);
        let mut keys = std::mem::take(&mut self.dirty);
        keys.sort_unstable();
        keys.dedup();
        for key in keys {
            let Some(group) = self.groups.get_mut(&key) else { continue };
            group.dirty = false;
            // Askers of one group mostly lack the same: when a few get nothing the others would not either.
            let mut in_vain = 0;
            let mut at = 0;
            while at < group.held.len() && in_vain < HELD_IN_VAIN_MAX {
                let asker = group.held[at].0;
                match group.answer(asker, slow, now) {
                    Some(reply) => {
                        group.held.remove(at);
                        self.held -= 1;
                        out.push((group.entries[asker].id, key, reply));
                    }
                    None => {
                        in_vain += 1;
                        at += 1;
                    }
                }
            }
        }
        out
    }

    /// Ends what time ends: leases, addresses given, answers held. To be called a few times a second.
    pub fn tick(&mut self, view: &View, now: Instant) -> Vec<(MemberId, GroupKey, Reply)> {
        let slow = slow_after(&self.lease_times, &self.paces, now);
        let mut out = Vec::new();
        for (key, group) in &mut self.groups {
            if group.held.is_empty() {
                continue;
            }
            group.expire(view, now);
            while let Some((asker, _)) = group.held.pop_front_if(|(_, until)| *until <= now) {
                self.held -= 1;
                let reply = group.answer(asker, slow, now);
                out.push((group.entries[asker].id, *key, reply.unwrap_or(Reply { wait: Some(WAIT), ..Reply::default() })));
            }
            self.dirty.push(*key);
        }
        out
    }

    /// A live member of strictly greater weight: it coordinates this group, not we. One that the asker can reach, if any.
    fn greater<'a>(&self, view: &'a View, want: &Want, local: &Local<'_>) -> Option<&'a Member> {
        let mine = weight(&self.me, &want.key);
        let ranked = view.ranked(&want.key);
        let above = || {
            let above = ranked.iter().take_while(|id| **id != self.me && weight(id, &want.key) > mine);
            above.filter(|id| !(local.down)(**id)).filter_map(|id| view.member(*id))
        };
        above().find(|member| !unreached(want, member)).or_else(|| above().next())
    }

    fn pace_told(&mut self, by: MemberId, pace: Option<Duration>, now: Instant) {
        let Some(pace) = pace else { return };
        self.paces.retain(|(other, at, _)| *other != by && now.saturating_duration_since(*at) < LEASE);
        self.paces.push_back((by, now, pace));
        while self.paces.len() > TIMES_KEPT {
            self.paces.pop_front();
        }
    }

    fn new_group(&self, view: &View, asker: MemberId, want: &Want, all: u16, now: Instant) -> Group {
        // It has asked others before itself.
        let is_new = asker != self.me && self.joined.is_some_and(|at| now.saturating_duration_since(at) < NEW_FOR);
        let mut group = Group {
            size: want.size,
            all,
            entries: Vec::new(),
            by_id: HashMap::new(),
            leases: vec![Vec::new(); all.count_ones() as usize],
            wanted: now,
            looked: now,
            freed: None,
            refilled: if want.bad.is_empty() && want.silent.is_empty() && !is_new { now } else { now + REFILL },
            held: VecDeque::new(),
            dirty: false,
        };
        for (holder, at) in self.told.get(&want.key.digest).into_iter().flatten() {
            if now.saturating_duration_since(*at) < TOLD_FOR
                && let Some(member) = view.member(*holder)
            {
                let at = group.entry(member);
                group.entries[at].have = all;
            }
        }
        group
    }

    fn make_room(&mut self, now: Instant) {
        if self.groups.len() < GROUPS_MAX && self.entries < ENTRIES_MAX {
            return;
        }
        let mut ages: Vec<(Instant, GroupKey)> = self.groups.iter().map(|(key, group)| (group.wanted, *key)).collect();
        ages.sort_unstable();
        // A sixteenth at once, so that a flood of groups does not sort for each of them.
        let least = self.groups.len() / 16 + 1;
        for (nth, (wanted, key)) in ages.into_iter().enumerate() {
            let old = now.saturating_duration_since(wanted) >= GROUP_KEPT;
            if nth >= least && !old && self.entries < ENTRIES_MAX {
                break;
            }
            if let Some(group) = self.groups.remove(&key) {
                self.entries -= group.entries.len();
                self.held -= group.held.len();
            }
        }
    }
}

/// Held askers of a group looked at in vain before the others are left for later.
const HELD_IN_VAIN_MAX: u32 = 4;

/// When a lease is slow. A mirror that several find slow is not made faster by asking it twice.
fn slow_after(times: &VecDeque<Duration>, paces: &VecDeque<(MemberId, Instant, Duration)>, now: Instant) -> Duration {
    let median = |mut times: Vec<Duration>| {
        times.sort_unstable();
        times.get(times.len() / 2).copied()
    };
    let recent = paces.iter().filter(|(_, at, _)| now.saturating_duration_since(*at) < LEASE);
    let paces: Vec<Duration> = recent.map(|(.., pace)| *pace).collect();
    let pace = if paces.len() > 1 { median(paces) } else { None }.unwrap_or_default();
    let after = median(times.iter().copied().collect()).map_or(LEASE, |median| (median * SLOW_MEDIANS).max(SLOW_MIN));
    after.max((pace * SLOW_MEDIANS).min(SLOW_MAX))
}

fn bits(of: u16) -> impl Iterator<Item = usize> {
    (0..16).filter(move |at| of & (1 << at) != 0)
}

impl Group {
    /// Where a member's entry is; a new one if it has none.
    fn entry(&mut self, member: &Member) -> usize {
        *self.by_id.entry(member.id).or_insert_with(|| {
            self.entries.push(Entry::of(member));
            self.entries.len() - 1
        })
    }

    /// Takes in what a want says. Returns how long the leases took that it ends.
    fn heard(&mut self, at: usize, want: &Want, now: Instant) -> Vec<Duration> {
        let entry = &mut self.entries[at];
        let have = want.have & self.all;
        let new = have & !entry.have;
        entry.have |= have;
        entry.live = true;
        entry.wanted = Some(now);
        entry.room = want.room;
        entry.bad.retain(|(contact, at)| now.saturating_duration_since(*at) < BAD_FOR && !want.bad.contains(contact));
        let room = (4 * BAD_MAX).saturating_sub(entry.bad.len());
        entry.bad.extend(want.bad.iter().take(BAD_MAX.min(room)).map(|contact| (*contact, now)));
        entry.mirror_bad = if want.mirror_bad { Some(now) } else { entry.mirror_bad };
        let (id, have) = (entry.id, entry.have);
        let given = std::mem::take(&mut entry.given);
        let over = |given: &Given| given.bits & !have == 0 || want.bad.contains(&self.entries[given.holder].contact);
        let (ended, mut goes_on): (Vec<Given>, Vec<Given>) = given.into_iter().partition(over);
        // Who asks again is still at it.
        goes_on.iter_mut().for_each(|given| given.at = now);
        self.entries[at].given = goes_on;
        self.dirty |= new != 0 || !ended.is_empty();
        self.give_back(&ended);
        let mut took = Vec::new();
        let shape = FileShape::of(want.key.digest, self.size);
        let first = want.key.group * super::GROUP_PIECES;
        let whole =
            |piece: usize| u32::try_from(piece).is_ok_and(|piece| shape.piece_len(first + piece) == poolfs_core::piece::PIECE_BYTES);
        for (piece, leases) in self.leases.iter_mut().enumerate() {
            leases.retain(|lease| now.saturating_duration_since(lease.since) < LEASES_WINDOW);
            for lease in leases.iter_mut().filter(|lease| lease.holder == id && !lease.ended) {
                lease.renewed = now;
                if have & (1 << piece) != 0 {
                    lease.ended = true;
                    // Of a short piece it says nothing of how long a whole one may take.
                    if whole(piece) {
                        took.push(now.saturating_duration_since(lease.since));
                    }
                } else if want.mirror_bad {
                    lease.ended = true;
                    self.dirty = true;
                }
            }
        }
        took
    }

    fn give_back(&mut self, ended: &[Given]) {
        for given in ended {
            let holder = &mut self.entries[given.holder];
            holder.askers = holder.askers.saturating_sub(1);
        }
    }

    /// Takes back what was given to who is gone or silent, and looks who is there.
    fn expire(&mut self, view: &View, now: Instant) {
        self.looked = now;
        let mut ended = Vec::new();
        for entry in &mut self.entries {
            let heard = entry.wanted.is_some_and(|at| now.saturating_duration_since(at) < HEARD_FOR);
            entry.live = heard || view.member(entry.id).is_some();
            ended.extend(entry.given.extract_if(.., |given| now.saturating_duration_since(given.at) >= GIVEN_FOR));
        }
        self.give_back(&ended);
    }

    /// What an asker is told now; `None`: nothing yet.
    fn answer(&mut self, at: usize, slow: Duration, now: Instant) -> Option<Reply> {
        let asker = &self.entries[at];
        let missing = self.all & !asker.have;
        if missing == 0 {
            return Some(Reply::default());
        }
        let leased = self.leased_to(asker.id, now) & missing;
        let given = asker.given.iter().fold(0, |all, given| all | given.bits);
        let open = missing & !leased & !given;
        // One pass over the members: what others have, who of them may be named, and whether others ask.
        let (mut had, mut others_ask) = (0, false);
        let mut holders: Vec<(bool, u8, u32, usize)> = Vec::new();
        for (index, other) in self.entries.iter().enumerate().filter(|(index, _)| *index != at) {
            others_ask |= other.have != self.all && other.wanted.is_some_and(|wanted| now.saturating_duration_since(wanted) < LEASE);
            // What only the dead have, or who has failed this asker, counts as not had.
            if other.have & open == 0 || !other.live || asker.is_bad(&other.contact, now) {
                continue;
            }
            had |= other.have;
            if other.askers < ASKERS_PER_HOLDER && !asker.given.iter().any(|given| given.holder == index) {
                holders.push((other.zone != asker.zone, other.askers, other.served, index));
            }
        }
        let mirror_bad = asker.mirror_bad.is_some_and(|bad| now.saturating_duration_since(bad) < BAD_FOR);
        self.name_holders(at, open & had, holders, now);
        let newcomer = self.entries[at].newcomer;
        if !mirror_bad && !newcomer && now >= self.refilled && self.entries[at].defer_until.is_none_or(|until| now >= until) {
            let most = if others_ask { LEASE_PIECES_MAX } else { super::GROUP_PIECES };
            let most = most.saturating_sub(leased.count_ones()).min(self.entries[at].room.into());
            self.lease(at, open & !had, most, slow, now);
        }
        let asker = &self.entries[at];
        let take = self.leased_to(asker.id, now) & missing;
        let from: Vec<_> = asker.given.iter().map(|given| (self.entries[given.holder].contact, given.bits & missing)).collect();
        if take != 0 || !from.is_empty() {
            return Some(Reply { take: (take != 0).then_some((take, LEASE)), from, ..Reply::default() });
        }
        let alive = |lease: &Lease| is_alive(lease, now);
        if newcomer && open & had == 0 && !bits(open).any(|piece| self.leases[piece].iter().any(alive)) {
            // Nothing is known here: it is its to lead.
            return Some(Reply { see: Some(asker.contact), ..Reply::default() });
        }
        let spent = |piece: usize| self.leases[piece].len() >= LEASES_MAX && !self.leases[piece].iter().any(alive);
        let in_turn = self.freed.is_none_or(|freed| now.saturating_duration_since(freed) >= FREE_EVERY);
        if open & had == 0 && bits(open).all(spent) && in_turn {
            self.freed = Some(now);
            return Some(Reply { free: true, ..Reply::default() });
        }
        None
    }

    /// Names up to [`FROM_MAX`] holders for pieces that somebody has: of the asker's zone first, then who serves the fewest
    /// now, then who has served the fewest.
    fn name_holders(&mut self, at: usize, wanted: u16, mut holders: Vec<(bool, u8, u32, usize)>, now: Instant) {
        let room = FROM_MAX.saturating_sub(self.entries[at].given.len());
        if holders.len() > room && room > 0 {
            holders.select_nth_unstable(room - 1);
        }
        holders.truncate(room);
        holders.sort_unstable();
        // Each piece to one holder, in turns, so that they bring them in parallel.
        let mut shares = vec![0u16; holders.len()];
        for piece in bits(wanted) {
            let has = |nth: &usize| self.entries[holders[*nth].3].have & (1 << piece) != 0;
            if let Some(nth) = (0..holders.len()).filter(has).min_by_key(|nth| shares[*nth].count_ones()) {
                shares[nth] |= 1 << piece;
            }
        }
        for ((.., holder), share) in holders.into_iter().zip(shares).filter(|(_, share)| *share != 0) {
            self.entries[holder].askers += 1;
            self.entries[holder].served += share.count_ones();
            self.entries[at].given.push(Given { holder, bits: share, at: now });
        }
    }

    /// Leases up to `most` pieces that nobody has.
    fn lease(&mut self, at: usize, wanted: u16, most: u32, slow: Duration, now: Instant) {
        let mut left = most;
        for piece in bits(wanted) {
            if left == 0 {
                break;
            }
            let leases = &mut self.leases[piece];
            let running = || leases.iter().filter(|lease| is_alive(lease, now));
            let all_slow = running().all(|lease| now.saturating_duration_since(lease.since) >= slow);
            if leases.len() < LEASES_MAX && running().count() < LEASES_AT_ONCE && all_slow {
                leases.push(Lease { holder: self.entries[at].id, since: now, renewed: now, ended: false });
                left -= 1;
            }
        }
    }

    fn leased_to(&self, member: MemberId, now: Instant) -> u16 {
        let mine = |lease: &Lease| lease.holder == member && !lease.ended && now.saturating_duration_since(lease.renewed) < LEASE;
        (0..self.leases.len()).filter(|piece| self.leases[*piece].iter().any(mine)).fold(0, |all, piece| all | 1 << piece)
    }
}

/// Whether a lease still holds others off: its holder has been heard.
fn is_alive(lease: &Lease, now: Instant) -> bool {
    !lease.ended && now.saturating_duration_since(lease.renewed) < LEASE
}
