//! What is known of a regular file's bytes, and what a hashing makes of it.
//!
//! The database's record is a claim. A node keeps the claim in memory while the kernel knows the node; this module holds
//! it and decides, and `tree::bytes` does the reading, hashing and recording.
//!
//! Locks, in the order in which they are taken: [`Content::gate`] (only by tasks that may wait), [`Content::order`], the
//! tree's names, [`Content::state`], the node table.

use poolfs_core::catalog::Entry;
use poolfs_core::store::{FileRecord, Provenance, Sharing, Stamp, State};
use poolfs_core::sync::Mutex;
use poolfs_core::{Digest, Summer, Sums};
use std::sync::Arc;

/// A regular file's bytes, as far as this process knows them.
#[derive(Debug, Default)]
pub(crate) struct Content {
    /// What is believed of the bytes.
    pub(crate) state: Mutex<ContentState>,
    /// Held over each write and its summing, so that the sums take the bytes in the order in which the file gets them.
    pub(crate) order: Mutex<Order>,
    /// One hashing or repair at a time; the others wait for it and look again.
    pub(crate) gate: tokio::sync::Mutex<()>,
}

/// The part of [`Content`] that every read looks at.
#[derive(Debug, Default)]
pub(crate) struct ContentState {
    pub(crate) claim: Claim,
    /// Goes up with each change of the claim: who found a block wrong looks whether the claim was still the same.
    pub(crate) version: u64,
    /// Open handles.
    pub(crate) opens: u32,
    /// Open handles that may write.
    pub(crate) writers: u32,
    /// It was written through the mount: what it is now is somebody's will, whatever its name.
    pub(crate) written: bool,
    /// Its bytes were moved to `objects/` when its last name went: it must not be written any more.
    pub(crate) is_object: bool,
}

/// What is believed of the bytes.
#[derive(Debug, Default)]
pub(crate) enum Claim {
    /// The database was not asked yet.
    #[default]
    Unread,
    /// There is no record worth anything: hash before reading.
    Nothing,
    /// Written through the mount since it was last hashed: readers get the bytes as they are.
    Writing,
    /// Hashed; each block is checked when it is read.
    Known(Known),
}

/// A record, and the sums to check blocks against while the file is open.
#[derive(Clone, Debug)]
pub(crate) struct Known {
    pub(crate) digest: Digest,
    pub(crate) stamp: Stamp,
    pub(crate) damaged: bool,
    pub(crate) sharing: Sharing,
    pub(crate) provenance: Provenance,
    pub(crate) sums: Option<Arc<Sums>>,
}

impl Claim {
    /// What a record from the database is worth.
    pub(crate) fn of(record: Option<FileRecord>) -> Self {
        let Some(FileRecord { state, digest: Some(digest), stamp, sharing, provenance, .. }) = record else {
            return Self::Nothing;
        };
        match state {
            // Left by a crash: nobody knows how much of it was written.
            State::Writing => Self::Nothing,
            State::Clean | State::Damaged => {
                Self::Known(Known { digest, stamp, damaged: state == State::Damaged, sharing, provenance, sums: None })
            }
        }
    }
}

impl ContentState {
    /// Replaces the claim.
    pub(crate) fn set(&mut self, claim: Claim) {
        self.claim = claim;
        self.version += 1;
    }
}

/// The sums of what was written so far, while it came in order from the first byte.
#[derive(Debug, Default)]
pub(crate) struct Order {
    summer: Option<Summer>,
}

impl Order {
    /// The file is empty now: what is written next can be summed.
    pub(crate) fn restart(&mut self) {
        self.summer = Some(Summer::new());
    }

    /// The bytes changed in a way that sums taken so far do not cover.
    pub(crate) fn lose(&mut self) {
        self.summer = None;
    }

    /// `bytes` were written at `offset`.
    pub(crate) fn wrote(&mut self, offset: u64, bytes: &[u8]) {
        match &mut self.summer {
            Some(summer) if summer.size() == offset => summer.update(bytes),
            Some(_) if bytes.is_empty() => {}
            Some(_) => self.summer = None,
            None => {}
        }
    }

    /// The length was set to `size` bytes.
    pub(crate) fn cut(&mut self, size: u64) {
        match &self.summer {
            _ if size == 0 => self.restart(),
            Some(summer) if summer.size() != size => self.summer = None,
            _ => {}
        }
    }

    /// The sums, if they cover a file of `size` bytes.
    pub(crate) fn sums(&self, size: u64) -> Option<Sums> {
        self.summer.as_ref().filter(|summer| summer.size() == size).map(|summer| summer.clone().finish())
    }
}

/// What a whole hashing says about a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// The bytes are those of the record: only its stamp is old.
    Same,
    /// The bytes are not the ones that were verified under this inode and size: the record stays, blocks are repaired.
    Rotten,
    /// The catalog says that a file of this name and size has another digest, and nobody wrote this one through the mount.
    Impostor(Box<Entry>),
    /// A file of its own.
    New,
}

/// What the hashing of a whole file means.
///
/// `before` is the record that it had, `named` what the catalog says of its name (for names directly in archives/),
/// `known` what it says of its digest.
pub(crate) fn judge(found: &Sums, stamp: Stamp, before: Option<&Known>, named: Option<Entry>, known: Option<&Entry>) -> Verdict {
    if let Some(before) = before {
        if before.digest == found.digest {
            return Verdict::Same;
        }
        // apt replaces files by rename, and the size may stay: another inode is another file.
        if before.stamp.inode == stamp.inode && before.stamp.size == stamp.size {
            return Verdict::Rotten;
        }
    }
    if let Some(named) = named
        && named.size == found.size
        && named.digest != found.digest
        && known.is_none()
    {
        return Verdict::Impostor(Box::new(named));
    }
    Verdict::New
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    fn stamp(size: u64, mtime_ns: i64, inode: u64) -> Stamp {
        Stamp { size, mtime_ns, inode }
    }

    fn known(bytes: &[u8], stamp: Stamp) -> Known {
        let sharing = Sharing::Available;
        Known { digest: Digest::of(bytes), stamp, damaged: false, sharing, provenance: Provenance::Peer, sums: None }
    }

    /// Sums of an in-order write must be those of the file, and any other order must give none rather than wrong ones.
    #[test]
    fn order_gives_right_sums_or_none() {
        let mut order = Order::default();
        order.wrote(0, b"lost");
        assert_eq!(order.sums(4), None, "a file that was not empty when it was opened");
        order.restart();
        order.wrote(0, b"he");
        order.wrote(2, b"llo");
        assert_eq!(order.sums(5), Some(Sums::of(b"hello")));
        assert_eq!(order.sums(6), None, "the file is longer than what was summed");
        order.wrote(5, b"!");
        assert_eq!(order.sums(6), Some(Sums::of(b"hello!")), "goes on after it was asked");
        order.wrote(0, b"H");
        assert_eq!(order.sums(6), None, "overwritten");
        order.cut(0);
        order.wrote(0, b"again");
        order.cut(5);
        assert_eq!(order.sums(5), Some(Sums::of(b"again")));
        order.cut(9);
        assert_eq!(order.sums(9), None, "extended by a hole");
    }

    /// Mixing these up repairs a new file away, or takes rot for a new file.
    #[test]
    fn hashing_is_judged() {
        let old = stamp(5, 1, 7);
        let before = known(b"hello", old);
        let check = |found: &[u8], now, before: Option<&Known>| judge(&Sums::of(found), now, before, None, None);
        assert_eq!(check(b"hello", stamp(5, 9, 8), Some(&before)), Verdict::Same);
        assert_eq!(check(b"hellO", stamp(5, 9, 7), Some(&before)), Verdict::Rotten);
        assert_eq!(check(b"hellO", stamp(5, 9, 8), Some(&before)), Verdict::New, "replaced by rename at equal size");
        assert_eq!(check(b"hello!", stamp(6, 9, 7), Some(&before)), Verdict::New);
        assert_eq!(check(b"hello", old, None), Verdict::New);
    }
}
