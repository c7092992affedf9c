//! Bytes of regular files: hashed, recorded, checked at each read, repaired.

use super::{Answer, Tree};
use crate::attr::SetAttr;
use crate::backing::Backing;
use crate::content::{Claim, Known, Verdict, judge};
use crate::errno::FsError;
use crate::fetch::{Fetched, Job};
use crate::handle::Handle;
use crate::inode::{Link, Node};
use crate::repair::write_in_place;
use crate::source::{Audience, Purpose};
use crate::supply::Wound;
use poolfs_core::catalog::Entry;
use poolfs_core::piece::{self, BLOCK_BYTES, PIECE_BYTES};
use poolfs_core::store::{Provenance, Sharing, Stamp, State, StoreError, TEMP_PREFIX};
use poolfs_core::sync::RwLockReadGuard;
use poolfs_core::{BlockSum, Role, Summer, Sums};
use rustix::fs::{AtFlags, FileType, OFlags, Timestamps};
use rustix::io::Errno;
use std::cell::RefCell;
use std::ffi::OsString;
use std::fs::File;
use std::ops::Range;
use std::os::fd::AsFd as _;
use std::os::unix::ffi::OsStrExt as _;
use std::sync::Arc;

/// A file that changes while it is hashed is hashed again this often; then it counts as being written.
const HASHING_TRIES_MAX: usize = 3;

/// A read that finds the claim changed under it looks again this often.
const READ_TRIES_MAX: usize = 8;

/// Bytes of objects given up when a write meets a full disk.
const ROOM_BYTES: u64 = 64 * 1024 * 1024;

/// Bytes hashed at a time.
const HASH_BUFFER_BYTES: usize = 1024 * 1024;

/// Bytes that were read. The buffer goes back to the thread's spare one on drop.
#[derive(Debug, Default)]
pub struct Bytes {
    buffer: Vec<u8>,
    range: Range<usize>,
}

impl std::ops::Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.buffer[self.range.clone()]
    }
}

/// The largest buffer that a thread keeps: a full read and the blocks at its ends.
const SPARE_BYTES_MAX: usize = 2 * 1024 * 1024;

thread_local! {
    static SPARE: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

impl Bytes {
    /// At least `len` initialised bytes. A reused buffer keeps its length, so that it is zeroed once.
    fn buffer(len: usize) -> Vec<u8> {
        let mut buffer = SPARE.with_borrow_mut(std::mem::take);
        if buffer.len() < len {
            buffer.resize(len, 0);
        }
        buffer
    }
}

impl Drop for Bytes {
    fn drop(&mut self) {
        if self.buffer.capacity() <= SPARE_BYTES_MAX {
            let buffer = std::mem::take(&mut self.buffer);
            // At the end of a thread the spare is gone already.
            let _ = SPARE.try_with(|spare| spare.replace(buffer));
        }
    }
}

/// What a read has to go by.
enum Basis {
    /// Being written: the bytes as they are.
    Unchecked,
    /// These sums, at this version of the claim.
    Checked(Arc<Sums>, u64),
    /// To be hashed first.
    Unknown,
}

/// Why checked bytes were not got.
enum ReadError {
    Failed(Errno),
    /// The first block that is not what its sum says.
    Bad(u64),
}

impl Tree {
    /// Whether the file may be opened for reading now, and if so whether its bytes are still those of the record.
    ///
    /// `None`: it has to be hashed first.
    pub(crate) fn trusted(&self, node: &Node) -> Result<Option<bool>, FsError> {
        let stamp = Stamp::of(&node.real()?.stat()?);
        let mut state = node.content.state.lock();
        if matches!(state.claim, Claim::Unread) {
            let claim = self.recorded_claim(node).unwrap_or_else(|err| {
                self.note_lost_record("a file's record could not be read", &err);
                Claim::Nothing
            });
            state.set(claim);
        }
        Ok(match &state.claim {
            _ if state.is_object => Some(true),
            Claim::Writing => Some(false),
            Claim::Known(known) if known.stamp == stamp => Some(!known.damaged),
            Claim::Known(_) | Claim::Nothing | Claim::Unread => None,
        })
    }

    /// What the database says of a file, by its first name that has a record.
    fn recorded_claim(&self, node: &Node) -> Result<Claim, FsError> {
        for link in self.table.links(node.id) {
            if let Some(record) = self.parts.store.file(self.role, &link.path)? {
                return Ok(Claim::of(Some(record)));
            }
        }
        Ok(Claim::Nothing)
    }

    /// Hashes the file unless it is trusted by now. At most [`super::HASHING_MAX`] at a time, one per file.
    pub(crate) async fn settle(self: &Arc<Self>, node: &Arc<Node>) -> Result<(), FsError> {
        let _gate = node.content.gate.lock().await;
        if self.trusted(node)?.is_some() {
            return Ok(());
        }
        self.settle_gated(node).await
    }

    /// As [`Self::settle`] after the last writer closed.
    pub(crate) async fn settle_written(self: &Arc<Self>, node: &Arc<Node>) -> Result<(), FsError> {
        let _gate = node.content.gate.lock().await;
        {
            let mut state = node.content.state.lock();
            match state.claim {
                // Somebody writes again, and will come here when he is done.
                Claim::Writing if state.writers > 0 => return Ok(()),
                Claim::Writing | Claim::Nothing => {}
                Claim::Unread | Claim::Known(_) => return Ok(()),
            }
            // From here a write makes it `Writing` again, which the hashing notices.
            state.set(Claim::Nothing);
        }
        self.settle_gated(node).await
    }

    async fn settle_gated(self: &Arc<Self>, node: &Arc<Node>) -> Result<(), FsError> {
        let permit = Arc::clone(&self.hashing).acquire_owned().await.map_err(|_| FsError::Died)?;
        let hashed = Arc::clone(node);
        let impostor = self
            .blocking(move |tree| {
                let _permit = permit;
                tree.settle_here(&hashed)
            })
            .await?;
        match impostor {
            Some(entry) => self.oust(node, *entry).await,
            None => Ok(()),
        }
    }

    /// Replaces a file that has a package's name and size and other bytes, which nobody wrote through the mount, by the
    /// package. ESTALE then makes the kernel look the name up again. Without a source it stays and cannot be read: apt and
    /// dpkg would take it unchecked.
    async fn oust(self: &Arc<Self>, node: &Arc<Node>, entry: Entry) -> Result<(), FsError> {
        tracing::error!(name = entry.name, wanted = %entry.digest, "its bytes are not the ones that apt's lists name; it is fetched again");
        let audience = self.audience(&entry.digest, entry.size);
        let job = Job { digest: entry.digest, size: entry.size, urls: entry.urls.clone(), purpose: Purpose::Read, audience };
        let fetched = self.parts.fetcher.start(job).done().await.map_err(|err| FsError::Undeliverable {
            name: entry.name.clone(),
            digest: entry.digest,
            why: err.to_string(),
        });
        let fetched = fetched.inspect_err(|err| tracing::error!("{err}"))?;
        let node = Arc::clone(node);
        self.blocking(move |tree| tree.replace(&node, &entry, &fetched)).await?;
        Err(Errno::STALE.into())
    }

    /// Puts a verified file in the place of another of the catalog's name.
    fn replace(&self, node: &Node, entry: &Entry, fetched: &Fetched) -> Result<(), FsError> {
        let old = node.real()?;
        let Some(link) = self.live_links(node).into_iter().find(|link| link.path == entry.name.as_bytes()) else { return Ok(()) };
        let dir = link.parent.real()?.open_dir()?;
        let temp = OsString::from(format!("{TEMP_PREFIX}replace-{}", old.key.ino));
        fetched.place(dir.as_fd(), &temp)?;
        let (new, _) = Backing::pin(dir.as_fd(), &temp)?;
        let stat = super::ghosts::dress(&new, entry, &SetAttr::default())?;
        {
            let _names = self.names_lock.write();
            rustix::fs::renameat(&dir, &temp, &dir, &link.name)?;
            self.table.unnamed(old.key, link.parent.id, &link.name);
            let (stamp, sharing) = (Stamp::of(&stat), self.sharing(fetched.sums(), std::slice::from_ref(&link)));
            self.parts.store.record(self.role, &link.path, stamp, fetched.sums(), sharing, fetched.provenance())?;
        }
        // Whoever asked learns of it when it would outlive a power loss.
        Ok(rustix::fs::fsync(&dir)?)
    }

    /// Hashes the file on this thread and records what it is. `Some`: what it only seems to be.
    fn settle_here(&self, node: &Node) -> Result<Option<Box<Entry>>, FsError> {
        let backing = node.real()?;
        for _ in 0..HASHING_TRIES_MAX {
            let version = node.content.state.lock().version;
            let stamp = Stamp::of(&backing.stat()?);
            let sums = hash(&backing.open(OFlags::RDONLY)?)?;
            self.bump(&self.counters.files_hashed);
            if Stamp::of(&backing.stat()?) == stamp && sums.size == stamp.size {
                return self.accept(node, sums, stamp, version);
            }
        }
        // Somebody writes to it behind the mount and does not stop.
        let mut state = node.content.state.lock();
        if matches!(state.claim, Claim::Nothing) || matches!(&state.claim, Claim::Known(_)) {
            state.set(Claim::Writing);
        }
        Ok(None)
    }

    /// Takes what a hashing found. Nothing happens if the claim is no longer the one of `version`.
    fn accept(&self, node: &Node, sums: Sums, stamp: Stamp, version: u64) -> Result<Option<Box<Entry>>, FsError> {
        let _names = self.names_lock.read();
        let links = self.live_links(node);
        let by_digest = self.listed(&sums.digest, &links);
        let named = self.named(&links);
        let mut state = node.content.state.lock();
        if state.version != version {
            return Ok(None);
        }
        let written = state.written;
        let before = match &state.claim {
            Claim::Known(known) => Some(known.clone()),
            Claim::Unread | Claim::Nothing | Claim::Writing => None,
        };
        let claim = match judge(&sums, stamp, before.as_ref(), named.filter(|_| !written), by_digest.as_ref()) {
            Verdict::Same => {
                let mut known = before.expect("only a record can be the same");
                known.stamp = stamp;
                known.damaged = false;
                known.sums = Some(Arc::new(sums));
                self.write_records(&links, &known, State::Clean);
                Claim::Known(known)
            }
            // apt replaces its lists by rename, and a list often keeps its size; a list from while nothing was mounted may
            // have got the number of one that is long gone. No catalog names lists, so nobody could give the old bytes back.
            Verdict::Rotten if self.role == Role::Lists => self.record_new(&links, sums, stamp, by_digest.as_ref()),
            Verdict::Rotten => {
                let mut known = before.expect("only a record can rot");
                known.stamp = stamp;
                if known.sums.is_none() {
                    known.sums = self.parts.store.sums(&known.digest)?;
                }
                if known.sums.is_some() {
                    known.damaged = true;
                    self.log_damage(&links, "its bytes changed at the same size and inode");
                    self.write_records(&links, &known, State::Damaged);
                    Claim::Known(known)
                } else {
                    // The old sums are lost: nothing tells which bytes were right.
                    self.record_new(&links, sums, stamp, by_digest.as_ref())
                }
            }
            Verdict::Impostor(entry) => {
                // No record: whoever opens it later hashes it again and comes here.
                for link in &links {
                    self.parts.store.removed(self.role, &link.path)?;
                }
                state.set(Claim::Nothing);
                return Ok(Some(entry));
            }
            Verdict::New => self.record_new(&links, sums, stamp, by_digest.as_ref()),
        };
        state.set(claim);
        Ok(None)
    }

    fn record_new(&self, links: &[Link], sums: Sums, stamp: Stamp, by_digest: Option<&Entry>) -> Claim {
        let sharing = self.sharing(&sums, links);
        let provenance = if by_digest.is_some() { Provenance::Mirror } else { Provenance::WrittenHere };
        let digest = sums.digest;
        let known = Known { digest, stamp, damaged: false, sharing, provenance, sums: Some(Arc::new(sums)) };
        self.write_records(links, &known, State::Clean);
        Claim::Known(known)
    }

    /// Records bytes that this process has verified itself.
    pub(crate) fn record_verified(&self, node: &Node, sums: Arc<Sums>, stamp: Stamp, provenance: Provenance) {
        let _names = self.names_lock.read();
        let links = self.live_links(node);
        let sharing = self.sharing(&sums, &links);
        let known = Known { digest: sums.digest, stamp, damaged: false, sharing, provenance, sums: Some(sums) };
        self.write_records(&links, &known, State::Clean);
        node.content.state.lock().set(Claim::Known(known));
    }

    /// A record that cannot be written costs one hashing later; it must not fail who reads or writes the file.
    fn write_records(&self, links: &[Link], known: &Known, state: State) {
        let Some(sums) = &known.sums else { return };
        for link in links {
            let store = &self.parts.store;
            let mut done = store.record(self.role, &link.path, known.stamp, sums, known.sharing, known.provenance);
            if done.is_ok() && state != State::Clean {
                done = store.set_state(self.role, &link.path, state).map(|_| ());
            }
            if let Err(err) = done {
                self.note_lost_record("a file could not be recorded", &err.into());
            }
        }
    }

    /// The names that still lead to this inode: one that changed behind the mount does not.
    fn live_links(&self, node: &Node) -> Vec<Link> {
        let Some(backing) = node.backing() else { return Vec::new() };
        let mut links = self.table.links(node.id);
        links.retain(|link| {
            let Ok(dir) = link.parent.real() else { return false };
            let stat = rustix::fs::statat(dir.fd(), &*link.name, AtFlags::SYMLINK_NOFOLLOW);
            let alive = stat.is_ok_and(|stat| crate::backing::Key::of(&stat) == backing.key);
            if !alive {
                self.table.unnamed(backing.key, link.parent.id, &link.name);
            }
            alive
        });
        links
    }

    /// What the catalog says of a name directly in archives/.
    fn named(&self, links: &[Link]) -> Option<Entry> {
        if self.role != Role::Archives {
            return None;
        }
        let mut direct = links.iter().filter(|link| !link.path.contains(&b'/'));
        direct.find_map(|link| self.in_catalog(self.parts.names.archive(&link.path)))
    }

    /// What the catalog says of a digest, for a file with these names.
    fn listed(&self, digest: &poolfs_core::Digest, links: &[Link]) -> Option<Entry> {
        let arriving = || {
            self.parts
                .names
                .arriving_by_digest(digest)
                .filter(|_| !links.is_empty() && links.iter().all(|link| self.is_arriving(&link.path)))
        };
        self.in_catalog(self.parts.names.by_digest(digest)).or_else(arriving)
    }

    /// Who may have bytes that were hashed or verified just now, with these names. Names must not change until it is recorded, so
    /// that who judges everything again sees the record or comes after it.
    fn sharing(&self, sums: &Sums, links: &[Link]) -> Sharing {
        let arriving = !links.is_empty() && links.iter().all(|link| self.is_arriving(&link.path));
        self.parts.names.judge(&sums.digest, sums.size, arriving).unwrap_or_else(|err| {
            tracing::error!(role = %self.role, "a file is kept back, since it cannot be judged: {err}");
            Sharing::LocalOnly
        })
    }

    /// Who may have a file of this tree while it arrives: nobody who may not have it afterwards.
    pub(super) fn audience(&self, digest: &poolfs_core::Digest, size: u64) -> Audience {
        self.parts.names.audience(digest, size, self.role == Role::Lists).unwrap_or_else(|err| {
            tracing::error!(role = %self.role, "a file is kept back while it arrives, since it cannot be judged: {err}");
            Audience::Fleet
        })
    }

    /// A catalog that fails offers and shares nothing; the files that are here can be read all the same.
    pub(super) fn in_catalog(&self, found: Result<Option<Entry>, FsError>) -> Option<Entry> {
        found.unwrap_or_else(|err| {
            tracing::error!(role = %self.role, "the catalog cannot be asked: {err}");
            None
        })
    }

    fn log_damage(&self, links: &[Link], why: &str) {
        let path = links.first().map_or_else(String::new, |link| String::from_utf8_lossy(&link.path).into_owned());
        tracing::error!(role = %self.role, path, "damaged: {why}");
    }

    /// Before bytes of the file change: from here it is `writing`, in the database first.
    pub(crate) fn begin_writing(&self, node: &Node) -> Result<(), FsError> {
        if !self.is_recorded(node) {
            return Ok(());
        }
        let backing = node.real()?;
        {
            let mut state = node.content.state.lock();
            if state.is_object {
                return Err(FsError::IsObject);
            }
            if matches!(state.claim, Claim::Writing) {
                return Ok(());
            }
            // First, so that a hashing that ends just now does not record what is about to change.
            state.set(Claim::Writing);
            state.written = true;
        }
        let lost = |err: StoreError| self.note_lost_record("a beginning change could not be recorded", &err.into());
        let mut was_whole = false;
        {
            let _names = self.names_lock.read();
            for link in self.table.links(node.id) {
                // The old record's time will not fit the file any more, so after a death it is hashed again all the same.
                match self.parts.store.begin_writing(self.role, &link.path, backing.key.ino) {
                    Ok(whole) => was_whole |= whole,
                    Err(err) => lost(err),
                }
            }
        }
        // The disk is waited for without the names: whoever looks something up would wait too.
        if was_whole && let Err(err) = self.parts.store.flush_to_disk() {
            lost(err);
        }
        Ok(())
    }

    /// Writes at `offset`; returns how many bytes were taken.
    pub(crate) fn write_here(&self, node: &Node, file: &File, offset: u64, bytes: &[u8]) -> Result<usize, FsError> {
        if bytes.is_empty() {
            return Ok(0);
        }
        let mut order = node.content.order.lock();
        self.begin_writing(node)?;
        let mut done = 0;
        while done < bytes.len() {
            match rustix::io::pwrite(file, &bytes[done..], offset + done as u64) {
                Ok(0) => break,
                Ok(len) => done += len,
                Err(Errno::INTR) => {}
                Err(Errno::NOSPC) if self.make_room(ROOM_BYTES) => {}
                Err(err) if done == 0 => return Err(err.into()),
                // What was taken counts; the next write meets the error again.
                Err(_) => break,
            }
        }
        if self.options.verify {
            order.wrote(offset, &bytes[..done]);
        }
        Ok(done)
    }

    /// Sets the length.
    pub(crate) fn truncate(self: &Arc<Self>, node: &Arc<Node>, fh: Option<u64>, size: u64) -> Result<(), FsError> {
        let handle = fh.and_then(|fh| self.handles.get(fh).ok()).filter(|handle| handle.writes);
        {
            let mut order = node.content.order.lock();
            self.begin_writing(node)?;
            match handle.as_deref().and_then(|handle| handle.file.get()) {
                Some(file) => rustix::fs::ftruncate(file, size)?,
                None => node.real()?.truncate(size)?,
            }
            order.cut(size);
        }
        if self.is_recorded(node) && node.content.state.lock().writers == 0 {
            self.finish_writing(node);
        }
        Ok(())
    }

    /// After a change of times: the bytes are the same, so the record follows the stamp.
    pub(crate) fn keeping_stamp(&self, node: &Node, change: impl FnOnce() -> Result<(), FsError>) -> Result<(), FsError> {
        if !self.is_recorded(node) {
            return change();
        }
        let backing = node.real()?;
        let _order = node.content.order.lock();
        let trusted = self.trusted(node).unwrap_or(None);
        change()?;
        let stamp = Stamp::of(&backing.stat()?);
        let _names = self.names_lock.read();
        let links = self.table.links(node.id);
        let mut state = node.content.state.lock();
        if trusted.is_some()
            && let Claim::Known(known) = &mut state.claim
            && known.stamp != stamp
        {
            known.stamp = stamp;
            for link in links {
                if let Err(err) = self.parts.store.set_stamp(self.role, &link.path, stamp) {
                    self.note_lost_record("new times of a file could not be recorded", &err.into());
                }
            }
        }
        Ok(())
    }

    /// Records what was written if its sums are at hand; returns whether they were.
    fn finish_summed(&self, node: &Node) -> Result<bool, FsError> {
        let order = node.content.order.lock();
        let stamp = Stamp::of(&node.real()?.stat()?);
        let Some(sums) = order.sums(stamp.size) else { return Ok(false) };
        let version = {
            let mut state = node.content.state.lock();
            match state.claim {
                Claim::Writing | Claim::Nothing => {}
                Claim::Unread | Claim::Known(_) => return Ok(true),
            }
            // What was written is a file of its own, whatever was there before.
            state.set(Claim::Nothing);
            state.version
        };
        let _names = self.names_lock.read();
        let links = self.live_links(node);
        let by_digest = self.listed(&sums.digest, &links);
        let mut state = node.content.state.lock();
        if state.version == version {
            let claim = self.record_new(&links, sums, stamp, by_digest.as_ref());
            state.set(claim);
        }
        Ok(true)
    }

    /// A descriptor of a writer was closed: what came in order can be recorded now, so that who opens it next finds it so.
    pub(crate) fn flush_written(&self, node: &Node) {
        if self.is_recorded(node)
            && matches!(node.content.state.lock().claim, Claim::Writing)
            && let Err(err) = self.finish_summed(node)
        {
            // A failing close(2) would fail apt's run; the bytes are where they belong.
            self.note_lost_record("a written file could not be recorded", &err);
        }
    }

    /// Nobody writes any more: records the file, hashing it in the background where it did not come in order.
    pub(crate) fn finish_writing(self: &Arc<Self>, node: &Arc<Node>) {
        if !self.is_recorded(node) || matches!(node.content.state.lock().claim, Claim::Known(_) | Claim::Unread) {
            return;
        }
        match self.finish_summed(node) {
            Ok(true) => {}
            Ok(false) => {
                let (tree, node) = (Arc::clone(self), Arc::clone(node));
                self.in_background(async move {
                    if let Err(err) = tree.settle_written(&node).await {
                        tree.note_lost_record("a written file could not be hashed", &err);
                    }
                });
            }
            Err(err) => self.note_lost_record("a written file could not be recorded", &err),
        }
    }

    /// Reads through a handle on a real file.
    pub(crate) fn read_real(self: &Arc<Self>, handle: &Arc<Handle>, offset: u64, size: u32) -> Answer<Bytes> {
        match self.try_read(handle, offset, size) {
            Ok(Ok(bytes)) => Answer::Ready(Ok(bytes)),
            Ok(Err(trouble)) => {
                let (tree, handle) = (Arc::clone(self), Arc::clone(handle));
                Answer::Wait(Box::pin(async move { tree.read_after(trouble, handle, offset, size).await }))
            }
            Err(err) => Answer::Ready(Err(err)),
        }
    }

    async fn read_after(self: Arc<Self>, mut trouble: Trouble, handle: Arc<Handle>, offset: u64, size: u32) -> Result<Bytes, FsError> {
        for _ in 0..READ_TRIES_MAX {
            match trouble {
                Trouble::Unknown => self.settle(&handle.node).await?,
                Trouble::Bad(block) => self.mend(&handle.node, block).await?,
            }
            let again = Arc::clone(&handle);
            match self.blocking(move |tree| tree.try_read(&again, offset, size)).await? {
                Ok(bytes) => return Ok(bytes),
                Err(next) => trouble = next,
            }
        }
        Err(Errno::IO.into())
    }

    /// Reads what can be had at once.
    pub(crate) fn try_read(&self, handle: &Handle, offset: u64, size: u32) -> Result<Result<Bytes, Trouble>, FsError> {
        let node = &handle.node;
        let file = handle.file.get().ok_or(FsError::Died)?;
        for _ in 0..READ_TRIES_MAX {
            let (sums, version) = match self.basis(node) {
                Basis::Unchecked => return Ok(Ok(read_plain(file, offset, size)?)),
                Basis::Unknown => return Ok(Err(Trouble::Unknown)),
                Basis::Checked(sums, version) => (sums, version),
            };
            match self.read_checked(file, &sums, offset, size) {
                Ok(bytes) => return Ok(Ok(bytes)),
                Err(ReadError::Failed(err)) => return Err(err.into()),
                Err(ReadError::Bad(block)) => {
                    let mut state = node.content.state.lock();
                    if state.version != version {
                        continue;
                    }
                    // Another stamp: it was changed behind the mount since it was opened, which a hashing has to judge.
                    let stamp = Stamp::of(&node.real()?.stat()?);
                    if !state.is_object && !matches!(&state.claim, Claim::Known(known) if known.stamp == stamp) {
                        return Ok(Err(Trouble::Unknown));
                    }
                    if let Claim::Known(known) = &mut state.claim {
                        known.damaged = true;
                    }
                    self.bump(&self.counters.blocks_bad);
                    return Ok(Err(Trouble::Bad(block)));
                }
            }
        }
        Ok(Err(Trouble::Unknown))
    }

    fn basis(&self, node: &Node) -> Basis {
        if !self.is_recorded(node) {
            return Basis::Unchecked;
        }
        let mut state = node.content.state.lock();
        let version = state.version;
        match &mut state.claim {
            Claim::Writing => Basis::Unchecked,
            Claim::Unread | Claim::Nothing => Basis::Unknown,
            Claim::Known(known) => {
                if known.sums.is_none() {
                    known.sums = self.parts.store.sums(&known.digest).unwrap_or_else(|err| {
                        self.note_lost_record("a file's sums could not be read", &err.into());
                        None
                    });
                }
                match &known.sums {
                    Some(sums) => Basis::Checked(Arc::clone(sums), version),
                    None => {
                        state.set(Claim::Nothing);
                        Basis::Unknown
                    }
                }
            }
        }
    }

    fn read_checked(&self, file: &File, sums: &Sums, offset: u64, size: u32) -> Result<Bytes, ReadError> {
        let wanted = offset..offset.saturating_add(size.into()).min(sums.size);
        let blocks = piece::covering(wanted.clone(), sums.size, BLOCK_BYTES);
        if blocks.is_empty() {
            return Ok(Bytes::default());
        }
        let start = piece::span(blocks.start, sums.size, BLOCK_BYTES).start;
        let end = piece::span(blocks.end - 1, sums.size, BLOCK_BYTES).end;
        let len = usize::try_from(end - start).map_err(|_| ReadError::Failed(Errno::INVAL))?;
        let mut bytes = Bytes { buffer: Bytes::buffer(len), range: 0..0 };
        let got = read_at(file, start, &mut bytes.buffer[..len]).map_err(ReadError::Failed)?;
        for (index, block) in blocks.clone().zip(bytes.buffer[..got].chunks(BLOCK_BYTES as usize)) {
            let at = usize::try_from(index).map_err(|_| ReadError::Bad(index))?;
            let span = piece::span(index, sums.size, BLOCK_BYTES);
            let whole = block.len() as u64 == span.end - span.start;
            if !whole || sums.blocks.get(at) != Some(&BlockSum::of(block)) {
                return Err(ReadError::Bad(index));
            }
        }
        if got < len {
            return Err(ReadError::Bad(blocks.start + got as u64 / u64::from(BLOCK_BYTES)));
        }
        self.counters.blocks_checked.fetch_add(blocks.end - blocks.start, std::sync::atomic::Ordering::Relaxed);
        let within = |at: u64| usize::try_from(at - start).unwrap_or(len);
        bytes.range = within(wanted.start)..within(wanted.end);
        Ok(bytes)
    }

    /// Gets a damaged block again, or says why nobody could.
    async fn mend(self: &Arc<Self>, node: &Arc<Node>, block: u64) -> Result<(), FsError> {
        let _gate = node.content.gate.lock().await;
        let (sums, version, was_object) = {
            let state = node.content.state.lock();
            match &state.claim {
                Claim::Known(Known { sums: Some(sums), .. }) => (Arc::clone(sums), state.version, state.is_object),
                // Written or hashed meanwhile: read again.
                _ => return Ok(()),
            }
        };
        let links = self.table.links(node.id);
        let path = links.first().map_or_else(Vec::new, |link| link.path.clone());
        let backing = node.real()?;
        let before = backing.stat()?;
        // The whole piece may have been mended by whoever had the gate before.
        let checked = Arc::clone(&sums);
        let probe = backing.open(OFlags::RDONLY)?;
        let right =
            self.blocking(move |tree| Ok(tree.read_checked(&probe, &checked, block * u64::from(BLOCK_BYTES), BLOCK_BYTES).is_ok())).await?;
        if right {
            return Ok(());
        }
        let piece = u32::try_from(block * u64::from(BLOCK_BYTES) / u64::from(PIECE_BYTES)).unwrap_or(u32::MAX);
        let wound = Wound { role: self.role, path: path.clone(), sums: Arc::clone(&sums), piece };
        let mended = match self.parts.mend.mend(wound).await {
            Ok(bytes) => {
                let (node, offset) = (Arc::clone(node), piece::span(piece.into(), sums.size, PIECE_BYTES).start);
                self.blocking(move |tree| Ok(tree.write_back(&node, version, &bytes, offset))).await?
            }
            Err(why) => Err(why),
        };
        let path = String::from_utf8_lossy(&path).into_owned();
        match mended {
            // Its new bytes are nobody's to repair; the read that asked looks again.
            Ok(false) => Ok(()),
            Ok(true) => {
                self.bump(&self.counters.blocks_mended);
                tracing::warn!(role = %self.role, path, block, "a block was damaged on disk and has been fetched again");
                // Its bytes are those of the record again, so its time is too.
                let times = Timestamps {
                    last_access: rustix::fs::Timespec { tv_sec: 0, tv_nsec: rustix::fs::UTIME_OMIT },
                    last_modification: crate::attr::Attr::of(0, &before).mtime.timespec(),
                };
                backing.set_times(&times)?;
                self.mended(node, version, Stamp::of(&backing.stat()?), was_object);
                Ok(())
            }
            Err(why) => {
                tracing::error!(role = %self.role, path, block, "damaged on disk and not repaired: {why}");
                for link in &links {
                    self.parts.store.set_state(self.role, &link.path, State::Damaged)?;
                }
                Err(FsError::Damaged { path, block, why })
            }
        }
    }

    /// Writes right bytes into a damaged file, unless somebody has changed it since `version`; returns whether it did.
    fn write_back(&self, node: &Node, version: u64, bytes: &[u8], offset: u64) -> Result<bool, String> {
        // Writing and truncating hold this too.
        let _order = node.content.order.lock();
        if node.content.state.lock().version != version {
            return Ok(false);
        }
        let file = node.real().and_then(|backing| Ok(backing.open(OFlags::RDWR)?)).map_err(|err| err.to_string())?;
        write_in_place(&file, bytes, offset).map(|()| true).map_err(|err| format!("write it back: {err}"))
    }

    /// The record after a repair: clean, with the stamp that the file has now.
    fn mended(&self, node: &Node, version: u64, stamp: Stamp, was_object: bool) {
        let _names = self.names_lock.read();
        let links = self.table.links(node.id);
        let mut state = node.content.state.lock();
        if state.version != version || was_object {
            return;
        }
        if let Claim::Known(known) = &mut state.claim {
            known.stamp = stamp;
            known.damaged = false;
            let known = known.clone();
            self.write_records(&links, &known, State::Clean);
        }
    }

    /// Holds names still while a path is used.
    pub(crate) fn names_still(&self) -> RwLockReadGuard<'_, ()> {
        self.names_lock.read()
    }

    /// Records a regular file that was just made and is empty.
    pub(crate) fn record_empty(&self, node: &Node) {
        if !self.is_recorded(node) {
            return;
        }
        node.content.order.lock().restart();
        node.content.state.lock().set(Claim::Nothing);
        if let Err(err) = self.finish_summed(node) {
            self.note_lost_record("a new file could not be recorded", &err);
        }
    }

    /// Whether `node` is a regular file.
    pub(crate) fn is_file(node: &Node) -> bool {
        node.backing().is_some_and(|backing| backing.kind == FileType::RegularFile)
    }
}

/// What keeps a read from being answered at once.
pub(crate) enum Trouble {
    /// The file has to be hashed.
    Unknown,
    /// This block is not what its sum says.
    Bad(u64),
}

fn read_plain(file: &File, offset: u64, size: u32) -> Result<Bytes, Errno> {
    let mut buffer = Bytes::buffer(size as usize);
    let len = read_at(file, offset, &mut buffer[..size as usize])?;
    Ok(Bytes { range: 0..len, buffer })
}

/// Fills `buffer`, or less at the end of the file; returns how much.
fn read_at(file: &File, offset: u64, buffer: &mut [u8]) -> Result<usize, Errno> {
    let mut done = 0;
    while done < buffer.len() {
        match rustix::io::pread(file, &mut buffer[done..], offset + done as u64) {
            Ok(0) => break,
            Ok(len) => done += len,
            Err(Errno::INTR) => {}
            Err(err) => return Err(err),
        }
    }
    Ok(done)
}

/// The sums of a whole open file.
fn hash(file: &File) -> Result<Sums, Errno> {
    let mut summer = Summer::new();
    let mut bytes = Bytes { buffer: Bytes::buffer(HASH_BUFFER_BYTES), range: 0..0 };
    loop {
        match rustix::io::pread(file, &mut bytes.buffer[..HASH_BUFFER_BYTES], summer.size()) {
            Ok(0) => return Ok(summer.finish()),
            Ok(len) => summer.update(&bytes.buffer[..len]),
            Err(Errno::INTR) => {}
            Err(err) => return Err(err),
        }
    }
}

/// A name as it is called below a directory.
pub(crate) fn below(dir: &[u8], name: &std::ffi::OsStr) -> Vec<u8> {
    if dir.is_empty() { name.as_bytes().to_vec() } else { [dir, b"/", name.as_bytes()].concat() }
}
