//! What is here, and who has been told of it.
//!
//! The coordinators of a file, ranks 0 and 1 of each of its groups, are told that this machine has it: when it arrives, when
//! others become its coordinators, and before they forget. A few files at a time, so that a join of many members does not
//! hold up everything else.

use super::wire::HAVE_DIGESTS_MAX;
use crate::swarm::FileShape;
use crate::swarm::fleet::{GroupKey, MemberId, View, groups};
use poolfs_core::Digest;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::time::{Duration, Instant};

/// Files of which the fleet is told; later ones go unmentioned until others went.
pub(super) const FILES_MAX: usize = 20_000;

/// Coordinators forget what they were told after 2 h 30.
const TELL_AGAIN_AFTER: Duration = Duration::from_secs(2 * 3600);

/// Groups of one file whose coordinators are told: those of 256 MiB.
const GROUPS_TOLD_MAX: u32 = 64;

/// Ranks that are told.
const RANKS_TOLD: usize = 2;

/// Files looked at in one step.
const FILES_PER_STEP: usize = 64;

/// Datagrams sent in one step.
const DATAGRAMS_PER_STEP: usize = 50;

/// How long after a change of the members the ranks are looked at again: a new member has to hear of what is here before it is
/// asked about it. Steps bound the work when many come at once.
const RANKS_DELAY: Duration = Duration::from_millis(300);

#[derive(Debug)]
struct File {
    size: u64,
    /// Who was told, in which of its lives, and when.
    told: Vec<(MemberId, u64, Instant)>,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Teller {
    me: MemberId,
    files: HashMap<Digest, File>,
    due: VecDeque<Digest>,
    outbox: BTreeMap<MemberId, Vec<Digest>>,
    look_again_at: Option<Instant>,
    /// The members changed after the last look.
    ranks_are_new: bool,
}

impl Teller {
    pub(super) fn new(me: MemberId) -> Self {
        Self { me, files: HashMap::new(), due: VecDeque::new(), outbox: BTreeMap::new(), look_again_at: None, ranks_are_new: false }
    }

    /// Whether a file is whole here.
    pub(super) fn has(&self, shape: &FileShape) -> bool {
        self.files.get(&shape.digest).is_some_and(|file| file.size == shape.size)
    }

    /// Whether the fleet is told of it.
    pub(super) fn tells_of(&self, digest: &Digest) -> bool {
        self.files.contains_key(digest)
    }

    pub(super) fn arrived(&mut self, files: &[FileShape]) {
        for shape in files {
            if self.files.len() >= FILES_MAX || self.files.contains_key(&shape.digest) {
                continue;
            }
            self.files.insert(shape.digest, File { size: shape.size, told: Vec::new() });
            self.due.push_back(shape.digest);
        }
    }

    pub(super) fn gone(&mut self, digests: &[Digest]) {
        digests.iter().for_each(|digest| drop(self.files.remove(digest)));
    }

    /// The members changed: in a while other ones may be coordinators.
    pub(super) fn ranks_changed(&mut self, now: Instant) {
        self.ranks_are_new = true;
        let soon = now + RANKS_DELAY;
        self.look_again_at = Some(self.look_again_at.map_or(soon, |at| at.min(soon)));
    }

    /// Files that all who coordinate them have been told of, as far as this machine knows the members.
    pub(super) fn told(&self) -> usize {
        if self.ranks_are_new || !self.outbox.is_empty() {
            return 0;
        }
        self.files.len().saturating_sub(self.due.len())
    }

    /// Whether [`Self::step`] has something to do at once.
    pub(super) fn is_busy(&self) -> bool {
        !self.due.is_empty() || !self.outbox.is_empty()
    }

    pub(super) fn next_timeout(&self) -> Option<Instant> {
        // While a look goes on, the next waits for its end.
        self.look_again_at.filter(|_| !self.files.is_empty() && self.due.is_empty())
    }

    /// Who is to be told of what now. `incarnation` gives that of a live member.
    pub(super) fn step(
        &mut self,
        view: &View,
        incarnation: impl Fn(MemberId) -> Option<u64>,
        now: Instant,
    ) -> Vec<(MemberId, Vec<Digest>)> {
        if self.look_again_at.is_some_and(|at| at <= now) {
            // Some were looked at with the members as they were: those have another turn.
            if self.due.is_empty() {
                self.look_again_at = Some(now + TELL_AGAIN_AFTER / 8);
                self.ranks_are_new = false;
                self.due.extend(self.files.keys());
            }
        }
        for _ in 0..FILES_PER_STEP {
            let Some(digest) = self.due.pop_front() else { break };
            self.look(view, &incarnation, digest, now);
        }
        let mut out = Vec::new();
        while out.len() < DATAGRAMS_PER_STEP {
            let Some(mut entry) = self.outbox.first_entry() else { break };
            let digests = entry.get_mut();
            let some: Vec<Digest> = digests.drain(..digests.len().min(HAVE_DIGESTS_MAX)).collect();
            let (to, empty) = (*entry.key(), entry.get().is_empty());
            if empty {
                entry.remove();
            }
            out.push((to, some));
        }
        out
    }

    fn look(&mut self, view: &View, incarnation: &impl Fn(MemberId) -> Option<u64>, digest: Digest, now: Instant) {
        let Some(file) = self.files.get_mut(&digest) else { return };
        file.told.retain(|(id, life, at)| incarnation(*id) == Some(*life) && now.saturating_duration_since(*at) < TELL_AGAIN_AFTER);
        for group in 0..groups(&FileShape::of(digest, file.size)).min(GROUPS_TOLD_MAX) {
            for id in view.ranked(&GroupKey { digest, group }).iter().take(RANKS_TOLD) {
                if *id == self.me || file.told.iter().any(|(told, ..)| told == id) {
                    continue;
                }
                let Some(life) = incarnation(*id) else { continue };
                file.told.push((*id, life, now));
                self.outbox.entry(*id).or_default().push(digest);
            }
        }
    }
}
