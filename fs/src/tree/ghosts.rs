//! Ghosts at work: shown, started, put in place, withdrawn; and apt's lock.

use super::{Answer, Bytes, Caller, Entry, Opened, Tree};
use crate::attr::{SetAttr, SetTime};
use crate::backing::Backing;
use crate::content::Claim;
use crate::errno::FsError;
use crate::fetch::{FetchError, Fetched, Job};
use crate::ghost::{Ghost, Place, maps_name_libapt};
use crate::handle::Handle;
use crate::inode::{Node, ROOT};
use crate::lock::{self, LOCK_NAME};
use crate::refresh;
use crate::source::Purpose;
use crate::update::Origin;
use poolfs_core::Role;
use poolfs_core::catalog::{Entry as Listed, Vanished};
use poolfs_core::store::{self, Stamp};
use rustix::fs::{OFlags, Stat, Timestamps};
use rustix::io::Errno;
use std::ffi::OsStr;
use std::fs::File;
use std::io::Read as _;
use std::os::fd::AsFd as _;
use std::os::unix::ffi::OsStrExt as _;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant, SystemTime};

/// The directory below `archives/` and `lists/` in which apt's methods work.
const PARTIAL: &[u8] = b"partial";

/// What a process may have mapped, as far as it is read, in bytes: apt's is some 20 KB.
const MAPS_BYTES_MAX: u64 = 4 * 1024 * 1024;

/// Bytes left free when a plan is reserved: the file system's and the database's own needs.
const SPARE_BYTES: u64 = 16 * 1024 * 1024;

impl Tree {
    /// Where ghosts are shown in that directory, if they are.
    fn ghost_place(&self, dir: &Node) -> Option<Place> {
        if dir.id == ROOT {
            return (self.role == Role::Archives).then_some(Place::Archives);
        }
        let links = self.table.links(dir.id);
        links.iter().any(|link| link.path == PARTIAL).then_some(Place::Partial)
    }

    /// What a lookup finds where nothing is on disk.
    pub(crate) fn look_up_ghost(self: &Arc<Self>, dir: &Arc<Node>, name: &OsStr, caller: &Caller) -> Answer<Entry> {
        let Some(place) = self.ghost_place(dir) else {
            if dir.id == ROOT {
                self.note_missed(name);
            }
            return Answer::Ready(Err(Errno::NOENT.into()));
        };
        if self.role == Role::Lists {
            return self.look_up_index(dir, name, place, caller);
        }
        if !name.as_bytes().ends_with(b".deb") && !name.as_bytes().ends_with(b".udeb") {
            return Answer::Ready(Err(Errno::NOENT.into()));
        }
        if let Some(refresher) = &self.refresher
            && refresher.is_running()
        {
            // What apt has just committed may be what names this file.
            let (tree, refresher) = (Arc::clone(self), Arc::clone(refresher));
            let (dir, name, caller) = (Arc::clone(dir), name.to_os_string(), *caller);
            return Answer::Wait(Box::pin(async move {
                if tokio::time::timeout(refresh::WAIT, refresher.idle()).await.is_err() {
                    tracing::warn!("a lookup did not wait longer for the catalog");
                }
                tree.show_ghost(&dir, &name, place, &caller).get().await
            }));
        }
        self.show_ghost(dir, name, place, caller)
    }

    /// As [`Self::look_up_ghost`] in `lists/partial/`. Only a configuration that is being read is waited for: the lists that
    /// apt commits, one suite after the other, do not change what it asks for next.
    fn look_up_index(self: &Arc<Self>, dir: &Arc<Node>, name: &OsStr, place: Place, caller: &Caller) -> Answer<Entry> {
        let Some(refresher) = self.refresher.as_ref().filter(|refresher| refresher.is_reconfiguring()) else {
            return self.show_ghost(dir, name, place, caller);
        };
        let (tree, refresher) = (Arc::clone(self), Arc::clone(refresher));
        let (dir, name, caller) = (Arc::clone(dir), name.to_os_string(), *caller);
        Answer::Wait(Box::pin(async move {
            if tokio::time::timeout(refresh::WAIT, refresher.reconfigured()).await.is_err() {
                tracing::warn!("a lookup did not wait longer for apt's configuration");
            }
            tree.show_ghost(&dir, &name, place, &caller).get().await
        }))
    }

    fn show_ghost(self: &Arc<Self>, dir: &Arc<Node>, name: &OsStr, place: Place, caller: &Caller) -> Answer<Entry> {
        match self.ghost_to_show(dir, name, place, caller) {
            Ok(Shown::Nothing) => Answer::Ready(Err(Errno::NOENT.into())),
            Ok(Shown::Ghost(entry)) => Answer::Ready(Ok(entry)),
            Ok(Shown::Object(listed)) => {
                let (tree, dir, name, caller) = (Arc::clone(self), Arc::clone(dir), name.to_os_string(), *caller);
                Answer::Wait(Box::pin(async move { tree.blocking(move |tree| tree.place_object(&dir, &name, &listed, &caller)).await }))
            }
            Err(err) => Answer::Ready(Err(err)),
        }
    }

    fn ghost_to_show(self: &Arc<Self>, dir: &Arc<Node>, name: &OsStr, place: Place, caller: &Caller) -> Result<Shown, FsError> {
        let Some(path) = self.table.path(dir.id, name) else { return Ok(Shown::Nothing) };
        if self.run.lock().is_hidden(&path) {
            return Ok(Shown::Nothing);
        }
        let listed = match self.role {
            Role::Archives => self.in_catalog(self.parts.names.archive(name.as_bytes())),
            Role::Lists => self.parts.names.index(name.as_bytes()),
        };
        let Some(listed) = listed else { return Ok(Shown::Nothing) };
        if place == Place::Archives {
            // Who browses looks at everything: that moves no file, and no apt works there.
            if !self.options.browse {
                if self.parts.objects.contains(&listed.digest)? {
                    return Ok(Shown::Object(Box::new(listed)));
                }
                if !self.options.lazy_archives || uses_libapt(caller.pid) {
                    return Ok(Shown::Nothing);
                }
            }
        }
        // The same name, and other bytes by now: who has the old one open keeps it, and nothing is put in place for it.
        if let Some(old) = self.table.ghost(dir.id, name)
            && let Some(ghost) = old.ghost.as_ref().filter(|ghost| ghost.entry.digest != listed.digest)
        {
            ghost.withdraw();
            self.table.drop_ghost_name(dir.id, name);
        }
        // What apt's method has looked at must not vanish before it is opened: that would end apt's run. It reads as empty
        // instead, and apt removes it.
        let shown_before = place == Place::Partial
            && self.table.ghost(dir.id, name).is_some_and(|node| node.ghost.as_ref().is_some_and(|ghost| !ghost.state.lock().opened));
        if !shown_before && self.parts.fetcher.undeliverable(&listed.digest) {
            return Ok(Shown::Nothing);
        }
        let bytes = listed.size;
        // What was promised is counted already, and what was started has its bytes reserved.
        let promised = self.table.ghost(dir.id, name).is_some_and(|node| {
            let started = node.ghost.as_ref().is_some_and(|ghost| !ghost.state.lock().is_waiting());
            started || self.run.lock().is_planned(dir.id, name)
        });
        let planned = self.run.lock().plan_bytes();
        if !promised && !shown_before && !self.fits(planned.saturating_add(bytes))? {
            tracing::warn!(name = %name.display(), bytes, "no space for it: apt is left to say so");
            return Ok(Shown::Nothing);
        }
        let node = self.table.look_up_ghost(dir.id, name, || Ghost::new(listed, place, Arc::clone(dir), name));
        if place == Place::Partial {
            // apt asks for one index after the other, so they are no plan whose bytes would have to fit together.
            let planned = if self.role == Role::Lists { 0 } else { bytes };
            self.run.lock().add(dir.id, name, &node, planned);
        }
        let attr = match (&node.ghost, node.backing()) {
            // Put in place since the directory was looked into.
            (_, Some(backing)) => crate::attr::Attr::of(node.id, &backing.stat()?),
            (Some(ghost), None) => ghost.attr(node.id),
            (None, None) => return Err(FsError::NoNode(node.id)),
        };
        Ok(Shown::Ghost(Entry { attr, ttl: Duration::ZERO }))
    }

    /// A ghost that a listing has named.
    pub(crate) fn look_up_listed(self: &Arc<Self>, dir: &Arc<Node>, name: &OsStr) -> Option<Entry> {
        const LISTER: Caller = Caller { uid: 0, gid: 0, pid: 0 };
        if !self.options.browse {
            return None;
        }
        match self.ghost_to_show(dir, name, self.ghost_place(dir)?, &LISTER) {
            Ok(Shown::Ghost(entry)) => Some(entry),
            Ok(Shown::Nothing | Shown::Object(_)) => None,
            Err(err) => {
                tracing::warn!(name = %name.display(), "{err}");
                None
            }
        }
    }

    /// Whether a name was removed and is not to be shown as a ghost.
    pub(crate) fn is_hidden(&self, dir: &Node, name: &OsStr) -> bool {
        self.table.path(dir.id, name).is_none_or(|path| self.run.lock().is_hidden(&path))
    }

    /// Whether so many more bytes fit the covered file system. Objects that are in the way go.
    pub(super) fn fits(&self, bytes: u64) -> Result<bool, FsError> {
        let wanted = bytes.saturating_add(SPARE_BYTES);
        let mut free = self.free_bytes()?;
        if wanted > free && self.make_room(wanted - free) {
            free = self.free_bytes()?;
        }
        Ok(wanted <= free)
    }

    /// Moves an object to the name under which apt knows it: from here on it is a file like any other.
    fn place_object(self: &Arc<Self>, dir: &Arc<Node>, name: &OsStr, listed: &Listed, caller: &Caller) -> Result<Entry, FsError> {
        let opened = dir.real()?.open_dir()?;
        match self.parts.objects.take(&listed.digest, opened.as_fd(), name) {
            Ok(Some(taken)) => {
                store::flush_directory(opened.as_fd())?;
                let (node, _) = self.look_up_real(dir, name)?;
                let backing = node.real()?;
                let stat = dress(backing, listed, &SetAttr::default())?;
                node.content.state.lock().is_object = false;
                self.record_verified(&node, taken.sums, Stamp::of(&stat), taken.provenance);
                Ok(self.entry(&node, &stat))
            }
            // Evicted meanwhile, or not what was kept: then the name is what it would be without.
            Ok(None) => match self.ghost_to_show(dir, name, Place::Archives, caller)? {
                Shown::Ghost(entry) => Ok(entry),
                Shown::Nothing | Shown::Object(_) => Err(Errno::NOENT.into()),
            },
            // Somebody put a file there meanwhile.
            Err(err) => {
                tracing::debug!("{err}");
                let (node, stat) = self.look_up_real(dir, name)?;
                Ok(self.entry(&node, &stat))
            }
        }
    }

    /// Starts a ghost and, under apt's lock, all others of the plan. ENOENT if the plan does not fit the disk: then its
    /// ghosts are gone, and apt finds that out itself.
    fn start(self: &Arc<Self>, node: &Arc<Node>) -> Result<(), FsError> {
        let mut plan = match self.role {
            Role::Archives => self.run.lock().plan(),
            // Some of what apt looks for there it only wants to be gone.
            Role::Lists => Vec::new(),
        };
        if !plan.iter().any(|other| other.id == node.id) {
            plan.push(Arc::clone(node));
        }
        let waiting: Vec<&Arc<Node>> = plan
            .iter()
            .filter(|node| node.backing().is_none())
            .filter(|node| node.ghost.as_ref().is_some_and(|ghost| ghost.state.lock().is_waiting()))
            .collect();
        if !waiting.iter().any(|other| other.id == node.id) {
            // Started before, with all that was known then.
            return Ok(());
        }
        let bytes = waiting.iter().filter_map(|node| node.ghost.as_ref()).map(|ghost| ghost.entry.size).fold(0, u64::saturating_add);
        if !self.fits(bytes)? {
            tracing::warn!(bytes, files = waiting.len(), "no space for the plan: its files are left to apt, which will say so");
            for node in waiting {
                self.withdraw(node);
            }
            return Err(Errno::NOENT.into());
        }
        for node in waiting {
            let kept = match &node.ghost {
                Some(ghost) => self.parts.objects.contains(&ghost.entry.digest)?,
                None => false,
            };
            // What is kept here is put in place when it is read.
            if !kept {
                self.start_one(node);
            }
        }
        Ok(())
    }

    /// Starts one download and puts the file in place when it has come.
    fn start_one(self: &Arc<Self>, node: &Arc<Node>) {
        let Some(ghost) = &node.ghost else { return };
        let mut state = ghost.state.lock();
        if state.gone || state.fetching.is_some() || state.failed.is_some() {
            return;
        }
        let Listed { digest, size, urls, .. } = &ghost.entry;
        let audience = self.audience(digest, *size);
        let job = Job { digest: *digest, size: *size, urls: urls.clone(), purpose: Purpose::Read, audience };
        state.fetching = Some(Arc::new(self.parts.fetcher.start(job)));
        let (tree, node) = (Arc::clone(self), Arc::clone(node));
        let placing = self.parts.runtime.spawn(async move {
            // Readers are told by their own wait; the fetcher logs what it could not get.
            if let Err(err) = tree.put_in_place(&node).await {
                tracing::debug!("{err}");
            }
        });
        state.placing = Some(placing.abort_handle());
    }

    /// Takes a ghost's name away.
    fn withdraw(&self, node: &Arc<Node>) {
        let Some(ghost) = &node.ghost else { return };
        ghost.withdraw();
        if let Some(path) = self.table.path(ghost.dir.id, &ghost.name) {
            self.run.lock().hide(path);
        }
        self.table.drop_ghost_name(ghost.dir.id, &ghost.name);
    }

    /// Waits for a ghost's bytes and puts the verified file in place. One does it, the others wait.
    pub(crate) async fn put_in_place(self: &Arc<Self>, node: &Arc<Node>) -> Result<(), FsError> {
        let _gate = node.content.gate.lock().await;
        let (None, Some(ghost)) = (node.backing(), &node.ghost) else { return Ok(()) };
        if self.parts.objects.contains(&ghost.entry.digest)? {
            let node = Arc::clone(node);
            if self.blocking(move |tree| tree.embody_object(&node)).await? {
                return Ok(());
            }
        }
        self.start_one(node);
        let (fetching, failed) = {
            let state = ghost.state.lock();
            (state.fetching.clone(), state.failed.clone())
        };
        let Some(fetching) = fetching else {
            return Err(undeliverable(ghost, failed.as_deref().unwrap_or("its name was removed")));
        };
        let fetched = match fetching.done().await {
            Ok(fetched) => fetched,
            Err(err) => {
                let mut state = ghost.state.lock();
                state.fetching = None;
                state.failed = Some(why(&err).to_owned());
                drop(state);
                return Err(undeliverable(ghost, why(&err)));
            }
        };
        let node = Arc::clone(node);
        self.blocking(move |tree| tree.materialise(&node, &fetched)).await
    }

    /// Puts a verified file in the place of its ghost. Blocks for the disk.
    pub(super) fn materialise(&self, node: &Node, fetched: &Fetched) -> Result<(), FsError> {
        let Some(ghost) = &node.ghost else { return Ok(()) };
        let dir = ghost.dir.real()?;
        let removed = || ghost.state.lock().gone;
        if removed() {
            return Err(undeliverable(ghost, "its name was removed"));
        }
        // Opened, since a directory is brought to the disk through a descriptor that is more than O_PATH.
        let opened = dir.open_dir()?;
        let misplaced = |err: std::io::Error| undeliverable(ghost, &format!("it could not be put in place: {err}"));
        let mut staging = fetched.stage(opened.as_fd()).map_err(misplaced)?;
        // Nobody may find the name, or move it away, before it leads to this node. The disk is waited for before and after:
        // whoever looks something up waits for this lock.
        let names = self.names_lock.write();
        if removed() {
            // The name is not to come back.
            return Err(undeliverable(ghost, "its name was removed"));
        }
        let named = staging.name(&ghost.name);
        let is_named = named.is_ok();
        let recorded = match named {
            // Other bytes are meant by the name since this moment.
            Ok(_) if removed() => {
                rustix::fs::unlinkat(dir.fd(), &*ghost.name, rustix::fs::AtFlags::empty())?;
                Err(undeliverable(ghost, "its name was removed"))
            }
            Ok(stamp) => {
                let (backing, _) = Backing::pin(dir.fd(), &ghost.name)?;
                self.embody(node, ghost, backing, Some(stamp))
            }
            // Somebody wrote a file of this name meanwhile: it is what the name means now.
            Err(err) if err.kind() == std::io::ErrorKind::AlreadyExists => {
                let (backing, _) = Backing::pin(dir.fd(), &ghost.name)?;
                self.embody(node, ghost, backing, None)
            }
            Err(err) => Err(misplaced(err)),
        };
        drop(names);
        if is_named {
            staging.finish().map_err(misplaced)?;
        }
        if let Some(stamp) = recorded? {
            self.record_verified(node, Arc::clone(fetched.sums()), stamp, fetched.provenance());
            self.note_placed(ghost, Origin::Fetched(fetched.provenance()));
        }
        Ok(())
    }

    /// Puts an object in the place of its ghost; `false` if it is none any more.
    fn embody_object(&self, node: &Arc<Node>) -> Result<bool, FsError> {
        let Some(ghost) = &node.ghost else { return Ok(false) };
        if ghost.state.lock().gone {
            return Ok(false);
        }
        let dir = ghost.dir.real()?.open_dir()?;
        if !self.parts.objects.flush(&ghost.entry.digest)? {
            return Ok(false);
        }
        // Nobody may find the name, or move it away, before it leads to this node. The disk is waited for before and after.
        let names = self.names_lock.write();
        match self.parts.objects.take(&ghost.entry.digest, dir.as_fd(), &ghost.name) {
            Ok(Some(taken)) => {
                let (backing, _) = Backing::pin(dir.as_fd(), &ghost.name)?;
                // Whoever still has the removed file open knows its inode as an object's.
                if let Some(former) = self.table.by_key(backing.key) {
                    former.content.state.lock().is_object = false;
                }
                let recorded = self.embody(node, ghost, backing, Some(taken.stamp))?;
                drop(names);
                store::flush_directory(dir.as_fd()).map_err(|err| undeliverable(ghost, &format!("it could not be put in place: {err}")))?;
                if let Some(stamp) = recorded {
                    self.record_verified(node, taken.sums, stamp, taken.provenance);
                    self.note_placed(ghost, Origin::Kept);
                }
                Ok(true)
            }
            Ok(None) => Ok(false),
            Err(err) => {
                tracing::debug!("{err}");
                Ok(false)
            }
        }
    }

    /// The node is the file from here on. `verified`: the stamp under which the right bytes were put in place; the answer is
    /// the one to record them under, if nobody has touched them since.
    fn embody(&self, node: &Node, ghost: &Ghost, backing: Backing, verified: Option<Stamp>) -> Result<Option<Stamp>, FsError> {
        let mut state = ghost.state.lock();
        // The download is done with: who asks for the same bytes under another name has a download of his own.
        state.fetching = None;
        let Some(stamp) = verified else {
            self.table.embody(node, backing);
            return Ok(None);
        };
        let untouched = Stamp::of(&backing.stat()?) == stamp;
        let stat = dress(&backing, &ghost.entry, &state.set)?;
        self.table.embody(node, backing);
        state.set = SetAttr::default();
        self.bump(&self.counters.ghosts_opened);
        Ok(untouched.then(|| Stamp::of(&stat)))
    }

    /// Attributes set on a ghost. False if the file has come meanwhile: then they are to be set on the file.
    pub(crate) fn set_ghost_attr(self: &Arc<Self>, node: &Arc<Node>, ghost: &Ghost, set: SetAttr) -> Result<bool, FsError> {
        if let Some(size) = set.size {
            self.make_empty(node, ghost)?;
            if size > 0 {
                self.truncate(node, None, size)?;
            }
        } else if self.role == Role::Archives {
            self.start(node)?;
        }
        Ok(ghost.set(SetAttr { size: None, ..set }, SystemTime::now(), || node.backing().is_some()))
    }

    /// A ghost that is opened for writing is an empty file: whoever writes brings the bytes himself.
    fn make_empty(self: &Arc<Self>, node: &Arc<Node>, ghost: &Ghost) -> Result<(), FsError> {
        if node.backing().is_some() {
            return Ok(());
        }
        let dir = ghost.dir.real()?;
        // Whoever opens the file as soon as it is there finds its bytes accounted for.
        let mut order = node.content.order.lock();
        {
            let mut state = ghost.state.lock();
            if let Some(placing) = state.placing.take() {
                placing.abort();
            }
            state.fetching = None;
        }
        // Nobody may find the name before it leads to this node.
        let _names = self.names_lock.write();
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let made = match rustix::fs::openat(dir.fd(), &*ghost.name, flags, rustix::fs::Mode::from_raw_mode(0o600)) {
            Ok(_) => true,
            // It was put in place, or somebody wrote it, this very moment.
            Err(Errno::EXIST) => false,
            Err(err) => return Err(err.into()),
        };
        let (backing, _) = Backing::pin(dir.fd(), &ghost.name)?;
        let set = std::mem::take(&mut ghost.state.lock().set);
        dress(&backing, &ghost.entry, &SetAttr { mtime: Some(SetTime::Now), ..set })?;
        if made {
            order.restart();
        }
        node.content.state.lock().set(Claim::Nothing);
        self.table.embody(node, backing);
        Ok(())
    }

    /// Opens a ghost. For reading: at once, the bytes come with the first read.
    pub(crate) fn open_ghost(self: &Arc<Self>, node: &Arc<Node>, ghost: &Ghost, flags: i32) -> Result<Option<Opened>, FsError> {
        if super::file::writes(flags) {
            self.make_empty(node, ghost)?;
            return Ok(None);
        }
        let joins = {
            let mut state = ghost.state.lock();
            // Another try, once the failure is old.
            if state.opens == 0 && !self.parts.fetcher.undeliverable(&ghost.entry.digest) {
                state.failed = None;
            }
            state.opens += 1;
            state.opened = true;
            state.opens > 1 && state.failed.is_none()
        };
        if let Err(err) = self.start(node) {
            self.release_ghost(node);
            return Err(err);
        }
        node.content.state.lock().opens += 1;
        let handle = Handle { node: Arc::clone(node), file: OnceLock::new(), writes: false, lock: false, ghost: true };
        // Without it the kernel would wait here for pages that an earlier reader has asked for and that are not there yet.
        Ok(Some(Opened { fh: self.handles.add(handle), keep_cache: joins, writes: false }))
    }

    /// Reads through a handle that was opened on a ghost.
    pub(crate) fn read_ghost(self: &Arc<Self>, handle: &Arc<Handle>, offset: u64, size: u32) -> Answer<Bytes> {
        if handle.node.backing().is_some() {
            return match self.open_embodied(handle) {
                Ok(()) => self.read_real(handle, offset, size),
                Err(err) => Answer::Ready(Err(err)),
            };
        }
        let (tree, handle) = (Arc::clone(self), Arc::clone(handle));
        Answer::Wait(Box::pin(async move {
            match tree.put_in_place(&handle.node).await {
                Ok(()) => {
                    tree.open_embodied(&handle)?;
                    tree.read_real(&handle, offset, size).get().await
                }
                Err(err) => tree.without_bytes(&handle.node, err),
            }
        }))
    }

    fn open_embodied(&self, handle: &Handle) -> Result<(), FsError> {
        if handle.file.get().is_none() {
            let file = handle.node.real()?.open(OFlags::RDONLY)?;
            // Another read may have been first; its descriptor is as good.
            let _ = handle.file.set(file);
        }
        Ok(())
    }

    /// What a reader gets whose file cannot be delivered.
    fn without_bytes(&self, node: &Node, err: FsError) -> Result<Bytes, FsError> {
        match node.ghost.as_ref().map(|ghost| ghost.place) {
            // apt's method finds the file too short, removes it and fetches it itself.
            Some(Place::Partial) => {
                tracing::info!("{err}; apt fetches it itself");
                Ok(Bytes::default())
            }
            Some(Place::Archives) | None => {
                tracing::error!("{err}");
                Err(err)
            }
        }
    }

    /// A handle on a ghost was closed.
    pub(crate) fn release_ghost(&self, node: &Node) {
        if let Some(ghost) = &node.ghost {
            let mut state = ghost.state.lock();
            state.opens = state.opens.saturating_sub(1);
        }
    }

    /// Removes a ghost's name, if there is one: `Ok(false)` if not.
    pub(crate) fn unlink_ghost(&self, dir: &Node, name: &OsStr) -> bool {
        match self.table.ghost(dir.id, name) {
            Some(node) if node.backing().is_none() => {
                self.withdraw(&node);
                true
            }
            _ => false,
        }
    }

    /// A name that a ghost could take was removed or moved away: none is shown there until the lock is released.
    pub(crate) fn hide_name(&self, dir: &Node, path: Option<&[u8]>) {
        if let Some(path) = path
            && self.ghost_place(dir).is_some()
        {
            self.run.lock().hide(path.to_vec());
        }
    }

    /// Whether that is the file that apt locks.
    pub(crate) fn is_lock(&self, dir: u64, name: &OsStr) -> bool {
        dir == ROOT && name == LOCK_NAME
    }

    /// Whether a node is the file that apt locks.
    pub(crate) fn is_lock_node(&self, node: &Node) -> bool {
        self.table.links(node.id).iter().any(|link| link.path == LOCK_NAME.as_bytes())
    }

    /// A handle on apt's lock is opened: it is held on the covered directory while one is open.
    pub(crate) fn take_lock(&self, node: &Node) -> Result<(), FsError> {
        let backing = node.real()?;
        let taken = self.run.lock().lock(|| lock::hold(backing.open(OFlags::RDWR)?))?;
        if !taken {
            return Err(FsError::LockHeld);
        }
        if self.role == Role::Archives {
            self.installs.lock().begin(Instant::now(), SystemTime::now());
        } else {
            self.updates.lock().begin(Instant::now(), SystemTime::now());
            if let Some(refresher) = &self.refresher {
                refresher.reconfigure();
            }
        }
        // An update may have run where nobody saw it.
        if let Some(refresher) = self.refresher.as_ref().filter(|refresher| !refresher.is_followed()) {
            refresher.request(Vanished::Drop);
        }
        Ok(())
    }

    /// A handle on apt's lock was released.
    pub(crate) fn drop_lock(self: &Arc<Self>) {
        let Some(plan) = self.run.lock().unlock() else { return };
        for node in plan {
            if let Some(ghost) = &node.ghost {
                ghost.stop_if_closed();
            }
        }
        if self.role == Role::Archives {
            self.installs.lock().end(Instant::now());
        } else {
            self.parts.names.forget_pending();
            let unwanted = self.updates.lock().end(Instant::now());
            drop(unwanted);
            if let Some(refresher) = &self.refresher {
                refresher.request(Vanished::Drop);
            }
        }
    }

    /// A file was renamed to this name: a list that apt committed changes the catalog.
    pub(crate) fn note_committed(&self, dir: u64, name: &OsStr) {
        if self.role == Role::Lists
            && dir == ROOT
            && refresh::is_list(name.as_bytes())
            && let Some(refresher) = &self.refresher
        {
            refresher.request(Vanished::Keep);
        }
    }
}

/// What a lookup finds where nothing is on disk.
enum Shown {
    Nothing,
    Ghost(Entry),
    /// Complete and verified here, to be put in place.
    Object(Box<Listed>),
}

fn undeliverable(ghost: &Ghost, why: &str) -> FsError {
    FsError::Undeliverable { name: ghost.entry.name.clone(), digest: ghost.entry.digest, why: why.to_owned() }
}

/// Owner, mode and times of a file that takes a ghost's place.
pub(super) fn dress(backing: &Backing, listed: &Listed, set: &SetAttr) -> Result<Stat, FsError> {
    backing.chown(Some(set.uid.unwrap_or(0)), Some(set.gid.unwrap_or(0)))?;
    backing.chmod(set.mode.unwrap_or(0o644))?;
    let date = SetTime::At(crate::attr::Time { sec: listed.date, nsec: 0 });
    let times = Timestamps {
        last_access: super::timespec(Some(set.atime.unwrap_or(SetTime::Now))),
        last_modification: super::timespec(Some(set.mtime.unwrap_or(date))),
    };
    backing.set_times(&times)?;
    Ok(backing.stat()?)
}

/// Whether a process uses apt's library. Whoever cannot be looked into counts as one that does: it is shown less.
fn uses_libapt(pid: u32) -> bool {
    if pid == 0 {
        return true;
    }
    let mut maps = Vec::new();
    let read = File::open(format!("/proc/{pid}/maps")).and_then(|file| file.take(MAPS_BYTES_MAX).read_to_end(&mut maps));
    match read {
        Ok(0) | Err(_) => true,
        Ok(_) => maps_name_libapt(&maps),
    }
}

fn why(err: &FetchError) -> &str {
    match err {
        FetchError::Nowhere { why, .. } | FetchError::NotNow { why, .. } => why,
        FetchError::Wrong { .. } => "the bytes that came are not the ones that the index names",
        FetchError::NoSpace { .. } => "the disk is full",
        FetchError::Disk { .. } => "the disk fails",
        FetchError::Busy { .. } => "too many downloads wait",
        FetchError::Stopped { .. } => "poolfs is stopping",
    }
}
