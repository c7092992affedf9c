//! What happens in `lists/` while apt updates it: Release files that arrive and leave, and what is fetched ahead.
//!
//! Nothing here answers a request: it looks at what apt has just done, so that what apt asks for next is known, or on its
//! way. A failure costs nothing but that: apt fetches its files itself.

use super::Tree;
use crate::content::Claim;
use crate::fetch::Job;
use crate::ghost::Ghost;
use crate::inode::Node;
use crate::install::Install;
use crate::names;
use crate::refresh::FORMS;
use crate::source::Purpose;
use crate::update::{Origin, Update};
use poolfs_core::Role;
use poolfs_core::catalog::Entry;
use poolfs_core::store::Sharing;
use rustix::fs::AtFlags;
use std::ffi::OsStr;
use std::os::fd::BorrowedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::time::Instant;

/// Where apt's methods work, below the mount.
const PARTIAL: &[u8] = b"partial/";

/// The name of a path directly in `partial/`.
fn in_partial(path: &[u8]) -> Option<&[u8]> {
    path.strip_prefix(PARTIAL).filter(|name| !name.contains(&b'/'))
}

/// A list's name without the ending of its form.
fn list_stem(name: &[u8]) -> &[u8] {
    FORMS.iter().find_map(|form| name.strip_suffix(form.as_bytes())).unwrap_or(name)
}

impl Tree {
    /// What the update that runs, or the last one, took and from where; `None` in other directories than the lists, and
    /// before the first.
    pub fn last_update(&self) -> Option<Update> {
        self.updates.lock().shown(Instant::now())
    }

    /// The same of apt's install, in the archives.
    pub fn last_install(&self) -> Option<Install> {
        self.installs.lock().shown(Instant::now())
    }

    /// Whether a path is one of files that apt is fetching for its lists.
    pub(super) fn is_arriving(&self, path: &[u8]) -> bool {
        self.role == Role::Lists && in_partial(path).is_some()
    }

    fn lists(&self) -> Option<BorrowedFd<'_>> {
        if self.role != Role::Lists {
            return None;
        }
        Some(self.table.root().backing()?.fd())
    }

    /// A descriptor through which a file was written is closed.
    pub(crate) fn note_written(&self, node: &Node) {
        if self.role != Role::Lists {
            return self.note_package_written(node);
        }
        for link in self.table.links(node.id) {
            let Some(name) = in_partial(&link.path) else { continue };
            let fetched = match &node.content.state.lock().claim {
                Claim::Known(known) if names::is_release(name) || known.sharing != Sharing::LocalOnly => {
                    Some((known.digest, known.stamp.size))
                }
                _ => None,
            };
            if let Some((digest, size)) = fetched {
                self.updates.lock().apt_fetched(digest, size);
            }
            self.note_arrived(name);
        }
    }

    /// As [`Self::note_written`], of a package that apt fetched itself.
    fn note_package_written(&self, node: &Node) {
        if self.table.links(node.id).iter().any(|link| in_partial(&link.path).is_some())
            && let Claim::Known(known) = &node.content.state.lock().claim
        {
            self.installs.lock().apt_fetched(known.digest, known.stamp.size);
        }
    }

    /// A file is complete under this name in `lists/partial/`.
    pub(crate) fn note_arrived(&self, name: &[u8]) {
        let Some(lists) = self.lists() else { return };
        if !names::is_release(name) && !names::is_pdiff_index(name) {
            return;
        }
        let expected = self.parts.names.arrived(lists, name);
        if names::is_release(name) {
            // What the Release names is to be found again, also what was removed before it came.
            self.run.lock().unhide(|path| in_partial(path).is_some_and(|name| self.parts.names.index(name).is_some()));
        }
        self.fetch_ahead(expected);
    }

    /// A name has changed, or is gone (`to` is `None`).
    pub(crate) fn note_left(&self, from: Option<&[u8]>, to: Option<&[u8]>) {
        if self.role != Role::Lists {
            return;
        }
        if let Some(name) = from.and_then(in_partial)
            && names::is_release(name)
        {
            let committed = to == Some(name);
            self.parts.names.left(name, committed);
            if committed && self.run.lock().is_locked() {
                self.parts.names.looked_up(name);
            }
            if !committed {
                let known = |digest: &_| self.parts.names.by_digest(digest).is_ok_and(|entry| entry.is_some());
                let wanted = |digest: &_| known(digest) || self.parts.names.arriving_by_digest(digest).is_some();
                // The catalog is asked outside of the lock: it may have to read from the disk.
                let mut unwanted = self.updates.lock().ahead();
                unwanted.retain(|digest| !wanted(digest));
                let given_up = self.updates.lock().unwanted(&unwanted);
                drop(given_up);
            }
        }
        if let (Some(name), None) = (from.filter(|from| !from.contains(&b'/')), to) {
            self.updates.lock().removed(list_stem(name));
        }
        if let Some(name) = to.and_then(in_partial) {
            self.note_arrived(name);
        }
    }

    /// The mode of a file was set. Of a Release in its place apt does that when it is about to check the signature: it has looked it
    /// up, and it keeps it. An update that fails to reach the mirror only looks at it.
    pub(crate) fn note_kept(&self, node: &Node) {
        if self.role != Role::Lists || !self.run.lock().is_locked() {
            return;
        }
        for link in self.table.links(node.id) {
            if !link.path.contains(&b'/') && names::is_release(&link.path) {
                self.parts.names.looked_up(&link.path);
            }
        }
    }

    /// A ghost's file is in its place.
    pub(crate) fn note_placed(&self, ghost: &Ghost, origin: Origin) {
        if self.role != Role::Lists {
            return self.installs.lock().took(ghost.entry.size, origin);
        }
        let name = ghost.name.as_bytes();
        let is_patch = !names::is_pdiff_index(name) && name.windows(6).any(|part| part == b".diff_");
        let done = self.updates.lock().took(&ghost.entry.digest, ghost.entry.size, is_patch, origin);
        drop(done);
        self.note_arrived(name);
    }

    /// Nothing is under this name in `lists/`: whoever updates will ask for it.
    pub(crate) fn note_missed(&self, name: &OsStr) {
        if let Some(lists) = self.lists()
            && self.run.lock().is_locked()
            && !self.updates.lock().has_removed(list_stem(name.as_bytes()))
        {
            self.fetch_ahead(self.parts.names.index_missed(lists, name.as_bytes()).into_iter().collect());
        }
    }

    /// Starts to fetch what apt will ask for. Files that fit no more are left to apt.
    fn fetch_ahead(&self, expected: Vec<Entry>) {
        let Some(lists) = self.lists() else { return };
        for entry in expected {
            if !self.updates.lock().wants(&entry.digest) {
                continue;
            }
            let here = rustix::fs::statat(lists, [PARTIAL, entry.name.as_bytes()].concat(), AtFlags::SYMLINK_NOFOLLOW).is_ok();
            let kept = || self.parts.objects.contains(&entry.digest).unwrap_or(false);
            if here || kept() || !self.fits(entry.size).unwrap_or(false) {
                continue;
            }
            tracing::debug!(name = entry.name, bytes = entry.size, "fetched ahead");
            // Not as a prefetch that goes on by itself: if apt refuses the Release, it ends.
            let audience = self.audience(&entry.digest, entry.size);
            let job = Job { digest: entry.digest, size: entry.size, urls: entry.urls, purpose: Purpose::Read, audience };
            let fetching = self.parts.fetcher.start(job);
            let replaced = self.updates.lock().fetch_ahead(entry.digest, fetching);
            drop(replaced);
        }
    }
}
