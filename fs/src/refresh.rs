//! The catalog follows the lists directory.
//!
//! One refresh runs at a time, in the background; wishes that come meanwhile are joined into the next one. Whoever looks
//! up a ghost while one runs waits for it, but not for ever.

use crate::judging;
use crate::names::Names;
use crate::tree::Tree;
use poolfs_core::catalog::Vanished;
use poolfs_core::sync::Mutex;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Weak};
use std::time::Duration;
use tokio::sync::watch;

/// How long a dentry lookup waits for a running refresh: bookworm's main takes about one and a half seconds.
pub(crate) const WAIT: Duration = Duration::from_secs(10);

/// Reads the catalog anew when the lists change.
pub struct Refresher {
    names: Arc<dyn Names>,
    lists: Mutex<Lists>,
    runtime: tokio::runtime::Handle,
    wish: Mutex<Wish>,
    running: watch::Sender<bool>,
    /// Readings of apt's configuration that are asked for and not done.
    reconfiguring: watch::Sender<u32>,
    /// Whose files are judged again after a refresh.
    trees: Mutex<Vec<Weak<Tree>>>,
    /// One judging at a time.
    judging: Mutex<()>,
    judged: watch::Sender<bool>,
}

/// Where the lists are. They may be mounted, and unmounted, while others use the catalog.
struct Lists {
    /// Beneath whatever is mounted on them; `None`: nobody knows where apt has them.
    dir: Option<Arc<OwnedFd>>,
    /// Whether they are mounted, so that each change is seen.
    followed: bool,
}

#[derive(Debug, Default)]
struct Wish {
    running: bool,
    next: Option<Vanished>,
}

impl std::fmt::Debug for Refresher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Refresher").field("wish", &self.wish).finish_non_exhaustive()
    }
}

impl Refresher {
    /// For the lists directory behind `lists`, if it is known; `followed` if it is mounted, so that each change is seen.
    pub fn new(names: Arc<dyn Names>, lists: Option<Arc<OwnedFd>>, followed: bool, runtime: tokio::runtime::Handle) -> Arc<Self> {
        let lists = Mutex::new(Lists { dir: lists, followed });
        let (wish, running, trees) = (Mutex::default(), watch::Sender::new(false), Mutex::default());
        let reconfiguring = watch::Sender::new(0);
        let (judging, judged) = (Mutex::default(), watch::Sender::new(false));
        Arc::new(Self { names, lists, runtime, wish, running, reconfiguring, trees, judging, judged })
    }

    /// After each refresh, the tree's files are judged by the new catalog.
    pub(crate) fn judges(&self, tree: &Arc<Tree>) {
        self.trees.lock().push(Arc::downgrade(tree));
    }

    /// Whether each change of the lists is seen; otherwise they have to be looked through when it matters.
    pub(crate) fn is_followed(&self) -> bool {
        self.lists.lock().followed
    }

    /// From now on the lists are the mounted ones over `dir`.
    pub(crate) fn follow(&self, dir: Arc<OwnedFd>) {
        *self.lists.lock() = Lists { dir: Some(dir), followed: true };
    }

    /// The lists are no longer mounted: they have to be looked through when it matters.
    pub(crate) fn unfollow(&self) {
        self.lists.lock().followed = false;
    }

    fn dir(&self) -> Option<Arc<OwnedFd>> {
        self.lists.lock().dir.clone()
    }

    /// Asks for a refresh; returns at once. [`Vanished::Drop`] is stronger than `Keep`.
    pub fn request(self: &Arc<Self>, vanished: Vanished) {
        let mut wish = self.wish.lock();
        wish.next = Some(match (wish.next, vanished) {
            (Some(Vanished::Drop), _) | (_, Vanished::Drop) => Vanished::Drop,
            (_, Vanished::Keep) => Vanished::Keep,
        });
        if wish.running {
            return;
        }
        wish.running = true;
        self.running.send_replace(true);
        let this = Arc::clone(self);
        self.runtime.spawn_blocking(move || this.run());
    }

    /// Asks for apt's configuration to be read again, since an update begins; returns at once.
    pub(crate) fn reconfigure(self: &Arc<Self>) {
        self.reconfiguring.send_modify(|waiting| *waiting += 1);
        let done = Reconfigured(Arc::clone(self));
        self.runtime.spawn_blocking(move || {
            let Some(lists) = done.0.dir() else { return };
            if let Err(err) = done.0.names.reconfigure(lists.as_fd()) {
                tracing::warn!("apt's configuration could not be read again: {err}");
            }
        });
    }

    /// Whether apt's configuration is being read for the update that has begun.
    pub(crate) fn is_reconfiguring(&self) -> bool {
        *self.reconfiguring.borrow() > 0
    }

    /// Waits until it is read.
    pub(crate) async fn reconfigured(&self) {
        // The sender lives in `self`.
        let _ = self.reconfiguring.subscribe().wait_for(|waiting| *waiting == 0).await;
    }

    fn run(self: Arc<Self>) {
        let _ended = Ended(Arc::clone(&self));
        while let Some(vanished) = self.next() {
            let Some(lists) = self.dir() else { continue };
            match self.names.refresh(lists.as_fd(), vanished) {
                Ok(()) => self.judge(),
                Err(err) => tracing::error!("the catalog could not be refreshed: {err}"),
            }
        }
    }

    /// Judges everything that is here again: the lists have changed, or have grown old. Blocks for the disk.
    pub fn judge(&self) {
        let _one_at_a_time = self.judging.lock();
        let trees: Vec<_> = self.trees.lock().iter().filter_map(Weak::upgrade).collect();
        match judging::judge_again(&*self.names, &trees) {
            Ok(true) => drop(self.judged.send_replace(true)),
            Ok(false) => {}
            Err(err) => tracing::error!("what is here could not be judged again: {err}"),
        }
    }

    /// Becomes true when everything was judged for the first time.
    pub fn judged(&self) -> watch::Receiver<bool> {
        self.judged.subscribe()
    }

    /// The next wish; `None` ends the run.
    fn next(&self) -> Option<Vanished> {
        let mut wish = self.wish.lock();
        let next = wish.next.take();
        if next.is_none() {
            wish.running = false;
            self.running.send_replace(false);
        }
        next
    }

    /// Whether one runs.
    pub(crate) fn is_running(&self) -> bool {
        *self.running.borrow()
    }

    /// Waits until none runs.
    pub async fn idle(&self) {
        // The sender lives in `self`.
        let _ = self.running.subscribe().wait_for(|running| !running).await;
    }
}

/// Lets go when a refresh panicked, so that lookups do not wait for it again and again.
struct Ended(Arc<Refresher>);

impl Drop for Ended {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.wish.lock().running = false;
            self.0.running.send_replace(false);
        }
    }
}

/// Counts a reading of apt's configuration down, also when it panicked.
struct Reconfigured(Arc<Refresher>);

impl Drop for Reconfigured {
    fn drop(&mut self) {
        self.0.reconfiguring.send_modify(|waiting| *waiting -= 1);
    }
}

/// Endings of packed lists.
pub(crate) const FORMS: [&str; 6] = [".gz", ".xz", ".bz2", ".lz4", ".zst", ".lzma"];

/// Whether a file of this name in `lists/` changes the catalog.
pub(crate) fn is_list(name: &[u8]) -> bool {
    let stem = FORMS.iter().find_map(|form| name.strip_suffix(form.as_bytes())).unwrap_or(name);
    [&b"_InRelease"[..], b"_Release", b"_Packages", b"_Sources"].iter().any(|end| stem.ends_with(end))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A list that is not recognised is a package that is not found until the next start.
    #[test]
    fn lists_are_recognised() {
        for name in ["h_dists_s_InRelease", "h_dists_s_Release", "h_main_binary-amd64_Packages.lz4", "h_Packages", "h_Sources.xz"] {
            assert!(is_list(name.as_bytes()), "{name}");
        }
        for name in ["lock", "h_Release.gpg", "h_i18n_Translation-en.lz4", "h_Packages.diff_Index", "h_Contents-amd64.gz"] {
            assert!(!is_list(name.as_bytes()), "{name}");
        }
    }
}
