//! Ghosts: names that the catalog knows and that are not on disk yet, and what an apt run does with them.
//!
//! A ghost goes one way: shown -> started -> in place. *Shown* costs nothing. It is *started* by the first setattr or open
//! of any ghost of the plan (what was looked up since apt opened its lock), never by a lookup alone, which `ls` and tab
//! completion do too. It is *in place* once the whole file has verified: then its node is an ordinary one. What cannot be
//! delivered stays a ghost without bytes.
//!
//! Here are the state and the rules; `tree::ghosts` does the work.

use crate::attr::{Attr, SetAttr, SetTime, Time};
use crate::fetch::Fetching;
use crate::inode::Node;
use crate::lock::Held;
use poolfs_core::catalog::Entry;
use poolfs_core::sync::Mutex;
use rustix::fs::FileType;
use std::collections::{HashMap, HashSet};
use std::ffi::{OsStr, OsString};
use std::sync::Arc;
use std::time::SystemTime;

/// Ghosts of one plan; a distribution upgrade is some 3,000 packages.
const PLAN_MAX: usize = 32_768;

/// Names hidden until the lock is released; past this the oldest plan's rules do not matter any more.
const WHITEOUTS_MAX: usize = 65_536;

/// Block size told of a ghost, in bytes.
const BLKSIZE: u32 = 4096;

/// Where a ghost is shown, which decides what happens if it cannot be delivered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// Directly in `archives/`: apt takes what it finds here with no check, so bytes must never be missing: EIO.
    Archives,
    /// In `partial/`: apt's method checks what it finds, and an early end makes it fetch the file itself.
    Partial,
}

/// One ghost.
#[derive(Debug)]
pub(crate) struct Ghost {
    /// What the catalog says it is.
    pub(crate) entry: Entry,
    pub(crate) place: Place,
    /// The directory that it is shown in.
    pub(crate) dir: Arc<Node>,
    pub(crate) name: OsString,
    pub(crate) state: Mutex<GhostState>,
}

/// What has happened to a ghost.
#[derive(Debug, Default)]
pub(crate) struct GhostState {
    /// What was set on it, to be applied when the file is there.
    pub(crate) set: SetAttr,
    /// Its download, once started.
    pub(crate) fetching: Option<Arc<Fetching>>,
    /// Why it cannot be delivered, once that is known.
    pub(crate) failed: Option<String>,
    /// Puts the file in place when it has come; the readers wait for the same.
    pub(crate) placing: Option<tokio::task::AbortHandle>,
    /// Open handles.
    pub(crate) opens: u32,
    /// It was opened at least once.
    pub(crate) opened: bool,
    /// Its name was removed, or it was withdrawn: nothing is put in place any more.
    pub(crate) gone: bool,
}

impl Ghost {
    pub(crate) fn new(entry: Entry, place: Place, dir: Arc<Node>, name: &OsStr) -> Self {
        Self { entry, place, dir, name: name.to_os_string(), state: Mutex::default() }
    }

    /// Its attributes under the number `ino`: the index's size, the Release's date, and what was set.
    pub(crate) fn attr(&self, ino: u64) -> Attr {
        let set = self.state.lock().set;
        let date = Time { sec: self.entry.date, nsec: 0 };
        let or_date = |time: Option<SetTime>| match time {
            Some(SetTime::At(time)) => time,
            Some(SetTime::Now) | None => date,
        };
        Attr {
            ino,
            size: self.entry.size,
            // 0 would make `tar -S` store zeros.
            blocks: self.entry.size.div_ceil(512),
            atime: or_date(set.atime),
            mtime: or_date(set.mtime),
            ctime: date,
            kind: FileType::RegularFile,
            mode: u16::try_from(set.mode.unwrap_or(0o644) & 0o7777).unwrap_or(0o644),
            nlink: 1,
            uid: set.uid.unwrap_or(0),
            gid: set.gid.unwrap_or(0),
            rdev: 0,
            blksize: BLKSIZE,
        }
    }

    /// Keeps attributes for when the file is there. `now` stands for [`SetTime::Now`]. False if `embodied` says that the file
    /// is there already, asked under the lock under which it comes: then it is the file's own attributes that have to be set.
    pub(crate) fn set(&self, set: SetAttr, now: SystemTime, embodied: impl FnOnce() -> bool) -> bool {
        let now = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let now = Time { sec: now.as_secs().cast_signed(), nsec: now.subsec_nanos() };
        let fixed = |time: Option<SetTime>| time.map(|time| if time == SetTime::Now { SetTime::At(now) } else { time });
        let mut state = self.state.lock();
        if embodied() {
            return false;
        }
        let kept = &mut state.set;
        kept.mode = set.mode.or(kept.mode);
        kept.uid = set.uid.or(kept.uid);
        kept.gid = set.gid.or(kept.gid);
        kept.atime = fixed(set.atime).or(kept.atime);
        kept.mtime = fixed(set.mtime).or(kept.mtime);
        true
    }

    /// Ends what runs for it, unless it is open and somebody may be waiting.
    pub(crate) fn stop_if_closed(&self) {
        let mut state = self.state.lock();
        if state.opens == 0 {
            state.stop();
        }
    }

    /// Its name is gone: nothing is put there any more.
    pub(crate) fn withdraw(&self) {
        let mut state = self.state.lock();
        state.gone = true;
        state.stop();
    }
}

impl GhostState {
    /// Whether it could be started.
    pub(crate) fn is_waiting(&self) -> bool {
        !self.gone && self.fetching.is_none() && self.failed.is_none()
    }

    fn stop(&mut self) {
        if let Some(placing) = self.placing.take() {
            placing.abort();
        }
        self.fetching = None;
    }
}

/// What one holder of apt's lock has done so far. Without a holder, what was hidden since the last one.
#[derive(Debug, Default)]
pub(crate) struct Run {
    /// apt's lock on the backing file, while a handle on `lock` is open.
    held: Option<Held>,
    handles: u32,
    /// Ghosts looked up under the lock, by directory and name.
    plan: HashMap<(u64, OsString), Arc<Node>>,
    plan_bytes: u64,
    /// Names that were removed or moved away, by path below the mount.
    whiteouts: HashSet<Vec<u8>>,
}

impl Run {
    /// Whether apt holds the lock through the mount.
    pub(crate) fn is_locked(&self) -> bool {
        self.held.is_some()
    }

    /// One more handle on `lock`. `hold` is called for the first and says whether the lock was free.
    pub(crate) fn lock<E>(&mut self, hold: impl FnOnce() -> Result<Option<Held>, E>) -> Result<bool, E> {
        if self.handles == 0 {
            let Some(held) = hold()? else { return Ok(false) };
            self.held = Some(held);
            self.plan.clear();
            self.plan_bytes = 0;
            // Whoever removed something without the lock has had his way; a new run starts afresh.
            self.whiteouts.clear();
        }
        self.handles += 1;
        Ok(true)
    }

    /// One handle on `lock` less. After the last one: the plan, of which nothing is wanted any more.
    pub(crate) fn unlock(&mut self) -> Option<Vec<Arc<Node>>> {
        self.handles = self.handles.saturating_sub(1);
        if self.handles > 0 {
            return None;
        }
        self.held = None;
        self.whiteouts.clear();
        self.plan_bytes = 0;
        Some(self.plan.drain().map(|(_, node)| node).collect())
    }

    /// Adds a ghost that was looked up under the lock.
    pub(crate) fn add(&mut self, dir: u64, name: &OsStr, node: &Arc<Node>, bytes: u64) {
        if !self.is_locked() || self.plan.len() >= PLAN_MAX {
            return;
        }
        if self.plan.insert((dir, name.to_os_string()), Arc::clone(node)).is_none() {
            self.plan_bytes = self.plan_bytes.saturating_add(bytes);
        }
    }

    /// Whether that name is in the plan.
    pub(crate) fn is_planned(&self, dir: u64, name: &OsStr) -> bool {
        self.plan.contains_key(&(dir, name.to_os_string()))
    }

    /// Bytes of the plan so far.
    pub(crate) fn plan_bytes(&self) -> u64 {
        self.plan_bytes
    }

    /// The ghosts of the plan, in the order in which they were first looked up: apt will read them so.
    pub(crate) fn plan(&self) -> Vec<Arc<Node>> {
        let mut plan: Vec<Arc<Node>> = self.plan.values().cloned().collect();
        plan.sort_unstable_by_key(|node| node.id);
        plan
    }

    /// Hides a name, so that no ghost is shown there.
    pub(crate) fn hide(&mut self, path: Vec<u8>) {
        if self.whiteouts.len() >= WHITEOUTS_MAX {
            tracing::warn!("more than {WHITEOUTS_MAX} names are hidden; they are forgotten");
            self.whiteouts.clear();
        }
        self.whiteouts.insert(path);
    }

    /// Shows hidden names again.
    pub(crate) fn unhide(&mut self, shown: impl Fn(&[u8]) -> bool) {
        self.whiteouts.retain(|path| !shown(path));
    }

    /// Whether a ghost must not be shown there.
    pub(crate) fn is_hidden(&self, path: &[u8]) -> bool {
        self.whiteouts.contains(path)
    }
}

/// Whether what is mapped into a process (`/proc/PID/maps`) says that it uses apt's library.
pub(crate) fn maps_name_libapt(maps: &[u8]) -> bool {
    const LIBRARY: &[u8] = b"/libapt-pkg";
    maps.windows(LIBRARY.len()).any(|window| window == LIBRARY)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use std::convert::Infallible;
    use std::fs::File;
    use std::time::Duration;

    fn held() -> Held {
        crate::lock::hold(tempfile::tempfile().unwrap()).unwrap().unwrap()
    }

    fn take(run: &mut Run) -> bool {
        run.lock(|| Ok::<_, Infallible>(Some(held()))).unwrap()
    }

    fn node() -> Arc<Node> {
        let dir = tempfile::tempdir().unwrap();
        let (backing, _) = crate::backing::Backing::of_fd(File::open(dir.path()).unwrap().into()).unwrap();
        Arc::clone(crate::inode::Table::new(backing).root())
    }

    fn ghost(size: u64) -> Ghost {
        let entry = Entry {
            name: "a_1_all.deb".into(),
            digest: poolfs_core::Digest::of(b"a"),
            size,
            date: 1_700_000_000,
            urls: Vec::new(),
            package: "a".into(),
            version: "1".into(),
            private: false,
        };
        Ghost::new(entry, Place::Partial, node(), OsStr::new("a_1_all.deb"))
    }

    /// Two apts in the mount: the loser opens and closes `lock` too, and must not end the winner's run.
    #[test]
    fn a_run_ends_with_the_last_handle() {
        let mut run = Run::default();
        let refused = run.lock(|| Ok::<_, Infallible>(None)).unwrap();
        assert!(!refused && !run.is_locked(), "held outside the mount");
        assert!(take(&mut run));
        run.hide(b"partial/a".to_vec());
        run.add(1, OsStr::new("a"), &node(), 10);
        assert!(run.lock(|| -> Result<_, Infallible> { unreachable!("held already") }).unwrap());
        assert!(run.unlock().is_none());
        assert!(run.is_locked() && run.is_hidden(b"partial/a"));
        assert_eq!(run.unlock().unwrap().len(), 1);
        assert!(!run.is_locked() && !run.is_hidden(b"partial/a"));
        assert_eq!(run.plan_bytes(), 0);
    }

    /// A lookup without the lock (`ls`, tab completion) must not put a file into a plan; one twice counts once.
    #[test]
    fn only_lookups_under_the_lock_make_a_plan() {
        let mut run = Run::default();
        let ghost = node();
        run.add(1, OsStr::new("a"), &ghost, 10);
        assert!(run.plan().is_empty());
        assert!(take(&mut run));
        run.add(1, OsStr::new("a"), &ghost, 10);
        run.add(1, OsStr::new("a"), &ghost, 10);
        run.add(1, OsStr::new("b"), &ghost, 5);
        assert_eq!((run.plan().len(), run.plan_bytes()), (2, 15));
    }

    /// What somebody removed without a lock stays away until the next run, which starts afresh.
    #[test]
    fn whiteouts_last_until_the_next_run() {
        let mut run = Run::default();
        run.hide(b"a".to_vec());
        assert!(run.is_hidden(b"a"));
        assert!(take(&mut run));
        assert!(!run.is_hidden(b"a"));
    }

    /// apt copies a ghost's mtime and checks its size; `tar -S` reads its blocks.
    #[test]
    fn attributes_are_the_indexs_until_set() {
        let ghost = ghost(513);
        let attr = ghost.attr(7);
        assert_eq!((attr.ino, attr.size, attr.blocks, attr.mode, attr.uid, attr.gid), (7, 513, 2, 0o644, 0, 0));
        assert_eq!(attr.mtime, Time { sec: 1_700_000_000, nsec: 0 });
        let now = SystemTime::UNIX_EPOCH + Duration::new(5, 6);
        assert!(ghost.set(SetAttr { uid: Some(42), ..SetAttr::default() }, now, || false));
        assert!(ghost.set(SetAttr { mode: Some(0o100_600), mtime: Some(SetTime::Now), ..SetAttr::default() }, now, || false));
        assert!(!ghost.set(SetAttr { uid: Some(7), ..SetAttr::default() }, now, || true), "the file has come: nothing is kept");
        let attr = ghost.attr(7);
        assert_eq!((attr.uid, attr.gid, attr.mode), (42, 0, 0o600));
        assert_eq!(attr.mtime, Time { sec: 5, nsec: 6 });
        assert_eq!(attr.atime, Time { sec: 1_700_000_000, nsec: 0 });
    }

    #[test]
    fn libapt_is_recognised() {
        let apt = b"7f00-7f01 r-xp 0 fe:01 1 /usr/lib/x86_64-linux-gnu/libapt-pkg.so.6.0.0\n";
        let dpkg = b"7f00-7f01 r-xp 0 fe:01 1 /usr/lib/x86_64-linux-gnu/libc.so.6\n5500-5501 r-xp 0 fe:01 1 /usr/bin/dpkg\n";
        assert!(maps_name_libapt(apt));
        assert!(!maps_name_libapt(dpkg));
        assert!(!maps_name_libapt(b""));
    }
}
