//! The statements that this machine made or heard, and what each came to.
//!
//! Plain values; times are Unix seconds, since they outlive the process.

use super::proof::Checked;
use crate::krpc::statement::Kind;
use crate::krpc::{STATEMENT_AGE_MAX_S, STATEMENT_BYTES, Statement};
use poolfs_core::Digest;
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;

/// Statements remembered; past that the oldest that others made is forgotten.
pub const ENTRIES_MAX: usize = 512;

/// Statements of others about one subject.
pub const PER_SUBJECT_MAX: usize = 32;

/// Statements of this machine's own that are kept up.
pub const OWN_MAX: usize = 64;

/// What a statement came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Standing {
    /// This machine made it.
    Own,
    /// Its proof was held against a verified file here, and is right: the subject was lowered.
    Proved,
    /// A member of this machine's fleet made it: the subject was lowered.
    Fleet,
    /// This machine has not the file that would tell.
    NoCopy,
    /// The proof is none.
    Wrong,
    /// Nobody gives the proof.
    Unavailable,
    /// It has no proof by its nature, and comes from a stranger.
    Unproved,
}

/// One statement.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// What it says.
    pub statement: Statement,
    /// As it was signed.
    pub bytes: [u8; STATEMENT_BYTES],
    /// What it came to.
    pub standing: Standing,
}

/// What is to be done about a statement that was heard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Nothing, or nothing any more.
    Nothing,
    /// Its proof is to be had and checked.
    Prove(Digest),
    /// The subject is to be lowered.
    Lower,
}

/// What is known of who speaks and of what this machine has.
#[derive(Clone, Copy, Debug)]
pub struct Listener {
    /// This machine's key.
    pub own: [u8; 32],
    /// Whether the speaker is of this machine's fleet.
    pub is_member: bool,
    /// Whether what the statement is about is here, so that a proof could be checked.
    pub has_copy: bool,
}

/// See the module.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ledger {
    /// In the order in which they came.
    entries: VecDeque<Entry>,
}

impl Ledger {
    /// Puts a saved statement back, unless it is void at `now_s`.
    pub fn restore(&mut self, bytes: &[u8], standing: Standing, now_s: u64) {
        if let (Ok(statement), Ok(bytes)) = (Statement::check(bytes, now_s), bytes.try_into()) {
            self.put(Entry { statement, bytes, standing });
        }
    }

    /// Every statement that is not void.
    pub fn entries(&self) -> impl Iterator<Item = &Entry> {
        self.entries.iter()
    }

    /// Drops what has expired.
    pub fn expire(&mut self, now_s: u64) {
        self.entries.retain(|entry| entry.statement.time_s.saturating_add(STATEMENT_AGE_MAX_S) >= now_s);
    }

    /// Takes down a statement that this machine makes. `false`: it has said the same already.
    pub fn say(&mut self, statement: Statement, bytes: [u8; STATEMENT_BYTES]) -> bool {
        if self.entries.iter().any(|entry| entry.standing == Standing::Own && is_same(&entry.statement, &statement)) {
            return false;
        }
        let own = self.entries.iter().filter(|entry| entry.standing == Standing::Own).count();
        if own >= OWN_MAX
            && let Some(oldest) = self.entries.iter().position(|entry| entry.standing == Standing::Own)
        {
            self.entries.remove(oldest);
        }
        self.put(Entry { statement, bytes, standing: Standing::Own });
        true
    }

    /// Weighs a statement that was heard at `now_s`. What is out of date, not signed, about or of this machine itself counts for nothing,
    /// and so does what was weighed before, unless the lack of a copy or of a proof decided then.
    pub fn hear(&mut self, bytes: &[u8], listener: Listener, now_s: u64) -> Next {
        let (Ok(statement), Ok(bytes)) = (Statement::check(bytes, now_s), <[u8; STATEMENT_BYTES]>::try_from(bytes)) else {
            return Next::Nothing;
        };
        if statement.speaker == listener.own || statement.subject == listener.own {
            return Next::Nothing;
        }
        let proof = Digest(statement.proof);
        let (standing, next) = match (listener.is_member, statement.kind) {
            (true, _) => (Standing::Fleet, Next::Lower),
            (false, Kind::FalseBytes) => (Standing::Unproved, Next::Nothing),
            (false, Kind::FalseList | Kind::FalseDelta) if listener.has_copy => (Standing::Unavailable, Next::Prove(proof)),
            (false, Kind::FalseList | Kind::FalseDelta) => (Standing::NoCopy, Next::Nothing),
        };
        let known = self.entries.iter_mut().find(|entry| is_same(&entry.statement, &statement));
        if let Some(known) = known {
            let is_open = matches!(known.standing, Standing::NoCopy | Standing::Unavailable);
            if !is_open {
                return Next::Nothing;
            }
            known.standing = standing;
            return next;
        }
        // The same from another speaker says nothing new. All of it has to be the same: with another file the same proof proves nothing.
        let what = |said: &Statement| (said.subject, said.kind, said.digest, said.size, said.proof);
        let is_settled = |entry: &Entry| {
            what(&entry.statement) == what(&statement) && matches!(entry.standing, Standing::Own | Standing::Proved | Standing::Wrong)
        };
        if next == Next::Prove(proof) && self.entries.iter().any(is_settled) {
            return Next::Nothing;
        }
        let about = |entry: &&Entry| entry.statement.subject == statement.subject && entry.standing != Standing::Own;
        let has_weight = next == Next::Lower;
        if self.entries.iter().filter(about).count() >= PER_SUBJECT_MAX && !has_weight {
            // A flood about one subject is not taken down, but each may still be checked in its turn.
            return next;
        }
        self.put(Entry { statement, bytes, standing });
        next
    }

    /// Takes what the proof of statements came to; `None`: nobody gave it. Returns whether the subject is to be lowered.
    pub fn proved(&mut self, bytes: &[u8], checked: Option<Checked>) -> bool {
        let standing = match checked {
            Some(Checked::Right) => Standing::Proved,
            Some(Checked::NoCopy) => Standing::NoCopy,
            Some(Checked::Wrong) => Standing::Wrong,
            None => Standing::Unavailable,
        };
        if let Some(entry) = self.entries.iter_mut().find(|entry| entry.bytes == bytes) {
            entry.standing = standing;
        } else if standing == Standing::Proved
            && let Ok(bytes) = <[u8; STATEMENT_BYTES]>::try_from(bytes)
            // Its time was looked at when it was heard.
            && let Ok(statement) = Statement::check_signed(&bytes)
        {
            self.put(Entry { statement, bytes, standing });
        }
        standing == Standing::Proved
    }

    fn put(&mut self, entry: Entry) {
        if self.entries.len() >= ENTRIES_MAX {
            let weightless = |entry: &Entry| !matches!(entry.standing, Standing::Own | Standing::Proved | Standing::Fleet);
            let oldest = self.entries.iter().position(weightless);
            let oldest = oldest.or_else(|| self.entries.iter().position(|entry| entry.standing != Standing::Own));
            self.entries.remove(oldest.unwrap_or(0));
        }
        self.entries.push_back(entry);
    }
}

/// Whether two statements say the same, whenever they were made.
fn is_same(a: &Statement, b: &Statement) -> bool {
    (a.speaker, a.subject, a.kind, a.digest, a.proof) == (b.speaker, b.subject, b.kind, b.digest, b.proof)
}

/// What may be done in an hour.
#[derive(Clone, Debug)]
pub struct Hourly {
    max: usize,
    /// When it was done, in Unix seconds.
    done: VecDeque<u64>,
}

impl Hourly {
    /// At most `max` in an hour.
    pub fn new(max: usize) -> Self {
        Self { max, done: VecDeque::new() }
    }

    /// Takes one, if there is one left.
    pub fn take(&mut self, now_s: u64) -> bool {
        while self.done.front().is_some_and(|at| at.saturating_add(3600) <= now_s) {
            self.done.pop_front();
        }
        let has_room = self.done.len() < self.max;
        if has_room {
            self.done.push_back(now_s);
        }
        has_room
    }

    /// When the next one may be taken, in Unix seconds.
    pub fn next_at(&self, now_s: u64) -> u64 {
        if self.done.len() < self.max { now_s } else { self.done.front().map_or(now_s, |at| at.saturating_add(3600)) }
    }
}

#[cfg(test)]
mod tests;
