//! Names: made, moved, removed, listed.

use super::{Answer, Caller, Entry, Tree};
use crate::attr::new_decode_dev;
use crate::backing::{Backing, Key};
use crate::content::Claim;
use crate::errno::FsError;
use crate::handle::DirHandle;
use crate::inode::{Node, ROOT};
use poolfs_core::store::{Kind, Sharing, Stamp, TEMP_PREFIX};
use poolfs_core::{Digest, Role};
use rustix::fs::{AtFlags, FileType, Mode, RenameFlags, Stat};
use rustix::io::Errno;
use std::collections::HashSet;
use std::ffi::{CStr, OsStr, OsString};
use std::fs::File;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::os::unix::ffi::OsStringExt as _;
use std::sync::Arc;

/// An entry of a listing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirEntry {
    /// The inode number, as `stat` would show it for what is on disk.
    pub ino: u64,
    /// File, directory and so on.
    pub kind: FileType,
    /// The name.
    pub name: OsString,
    /// Where to go on after this entry.
    pub next: u64,
}

/// An entry of a listing with what a lookup would have said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirPlusEntry {
    /// The name and where to go on.
    pub dir: DirEntry,
    /// Counts one lookup, except for `.` and `..`.
    pub entry: Entry,
}

/// The inode number of a name that has no inode yet, as FUSE says it (0 would hide the name).
const NO_INODE: u64 = 0xffff_ffff;

/// What was made.
pub(crate) struct Made {
    pub(crate) node: Arc<Node>,
    pub(crate) entry: Entry,
    pub(crate) file: Option<File>,
}

impl Tree {
    /// Makes something as root, then gives it the caller's ids and the wanted mode, as the kernel would have.
    pub(crate) fn make(
        &self,
        parent: u64,
        name: &OsStr,
        mode: u32,
        caller: &Caller,
        make: impl FnOnce(BorrowedFd<'_>) -> Result<Option<File>, Errno>,
    ) -> Result<Made, FsError> {
        let dir = self.table.get(parent)?;
        let dir_backing = dir.real()?;
        let _names = self.names_lock.write();
        let file = make(dir_backing.fd())?;
        let made = Backing::pin(dir_backing.fd(), name).and_then(|(backing, stat)| {
            let parent_stat = dir_backing.stat()?;
            give(&backing, &stat, &parent_stat, mode, caller)?;
            let stat = backing.stat()?;
            Ok((backing, stat))
        });
        match made {
            Ok((backing, stat)) => {
                let node = self.table.look_up(backing, dir.id, name);
                let entry = self.entry(&node, &stat);
                Ok(Made { node, entry, file })
            }
            Err(err) => {
                // Half made is not made. It is ours: the name was not there a moment ago.
                let _ = rustix::fs::unlinkat(dir_backing.fd(), name, AtFlags::empty())
                    .or_else(|_| rustix::fs::unlinkat(dir_backing.fd(), name, AtFlags::REMOVEDIR));
                Err(err.into())
            }
        }
    }

    /// Makes a file, fifo, socket or device node.
    pub fn mknod(&self, parent: u64, name: &OsStr, mode: u32, rdev: u32, caller: &Caller) -> Result<Entry, FsError> {
        let kind = FileType::from_raw_mode(mode);
        let made = self.make(parent, name, mode, caller, |dir| {
            rustix::fs::mknodat(dir, name, kind, Mode::from_raw_mode(0o600), new_decode_dev(rdev))?;
            Ok(None)
        })?;
        if kind == FileType::RegularFile {
            self.record_empty(&made.node);
        }
        Ok(made.entry)
    }

    /// Makes a directory.
    pub fn mkdir(&self, parent: u64, name: &OsStr, mode: u32, caller: &Caller) -> Result<Entry, FsError> {
        let made = self.make(parent, name, mode, caller, |dir| {
            rustix::fs::mkdirat(dir, name, Mode::from_raw_mode(0o700))?;
            Ok(None)
        })?;
        Ok(made.entry)
    }

    /// Makes a symbolic link.
    pub fn symlink(&self, parent: u64, name: &OsStr, target: &OsStr, caller: &Caller) -> Result<Entry, FsError> {
        let made = self.make(parent, name, 0o777, caller, |dir| {
            rustix::fs::symlinkat(target, dir, name)?;
            Ok(None)
        })?;
        Ok(made.entry)
    }

    /// Gives a node one more name.
    pub fn link(&self, ino: u64, parent: u64, name: &OsStr) -> Result<Entry, FsError> {
        let node = self.table.get(ino)?;
        let dir = self.table.get(parent)?;
        let Some(backing) = node.backing() else { return Err(FsError::GhostLink) };
        let _names = self.names_lock.write();
        backing.link_to(dir.real()?.fd(), name)?;
        let stat = backing.stat()?;
        let node = self.table.look_up_key(Key::of(&stat), dir.id, name).ok_or(FsError::NoNode(ino))?;
        self.record_link(&node, dir.id, name);
        Ok(self.entry(&node, &stat))
    }

    /// The new name has the record of the others.
    fn record_link(&self, node: &Node, parent: u64, name: &OsStr) {
        if !self.is_recorded(node) {
            return;
        }
        let Some(path) = self.table.path(parent, name) else { return };
        let state = node.content.state.lock();
        let done = match &state.claim {
            Claim::Known(known) if !known.damaged => {
                let sums = match &known.sums {
                    Some(sums) => Ok(Some(Arc::clone(sums))),
                    None => self.parts.store.sums(&known.digest),
                };
                sums.and_then(|sums| match sums {
                    Some(sums) => self.parts.store.record(self.role, &path, known.stamp, &sums, known.sharing, known.provenance),
                    None => Ok(()),
                })
            }
            Claim::Writing => {
                node.backing().map_or(Ok(()), |backing| self.parts.store.begin_writing(self.role, &path, backing.key.ino).map(|_| ()))
            }
            // Without a record it is hashed when it is opened or scanned.
            Claim::Known(_) | Claim::Unread | Claim::Nothing => Ok(()),
        };
        if let Err(err) = done {
            self.note_lost_record("a new name could not be recorded", &err.into());
        }
    }

    /// Removes the name of a file; the last name of one that is worth sharing makes it an object.
    pub fn unlink(&self, parent: u64, name: &OsStr) -> Result<(), FsError> {
        let dir = self.table.get(parent)?;
        let dir_fd = dir.real()?.fd();
        let _names = self.names_lock.write();
        let stat = match rustix::fs::statat(dir_fd, name, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) if self.unlink_ghost(&dir, name) => return Ok(()),
            other => other?,
        };
        let path = self.table.path(dir.id, name);
        let kept = match &path {
            Some(path) if self.options.verify => self.keep_as_object(dir.real()?, name, path, &stat).unwrap_or_else(|err| {
                tracing::warn!(role = %self.role, "a removed file could not be kept as an object: {err}");
                false
            }),
            _ => false,
        };
        if !kept {
            rustix::fs::unlinkat(dir_fd, name, AtFlags::empty())?;
        }
        self.hide_name(&dir, path.as_deref());
        self.note_left(path.as_deref(), None);
        self.name_gone(&dir, name, Key::of(&stat), path);
        Ok(())
    }

    /// Removes a directory.
    pub fn rmdir(&self, parent: u64, name: &OsStr) -> Result<(), FsError> {
        let dir = self.table.get(parent)?;
        let dir_fd = dir.real()?.fd();
        let _names = self.names_lock.write();
        let stat = rustix::fs::statat(dir_fd, name, AtFlags::SYMLINK_NOFOLLOW)?;
        rustix::fs::unlinkat(dir_fd, name, AtFlags::REMOVEDIR)?;
        self.name_gone(&dir, name, Key::of(&stat), None);
        Ok(())
    }

    fn name_gone(&self, dir: &Node, name: &OsStr, key: Key, path: Option<Vec<u8>>) {
        self.table.unnamed(key, dir.id, name);
        if let Some(path) = path
            && self.options.verify
            && let Err(err) = self.parts.store.removed(self.role, &path)
        {
            self.note_lost_record("a removed name could not be forgotten", &err.into());
        }
    }

    /// Moves a file's bytes to `objects/` if this is its last name, its record is good and somebody else may want it.
    fn keep_as_object(&self, dir: &Backing, name: &OsStr, path: &[u8], stat: &Stat) -> Result<bool, FsError> {
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile || stat.st_nlink != 1 || stat.st_size == 0 {
            return Ok(false);
        }
        if self.short_bytes() > 0 {
            return Ok(false);
        }
        let Some(record) = self.parts.store.file(self.role, path)? else { return Ok(false) };
        let Claim::Known(known) = Claim::of(Some(record)) else { return Ok(false) };
        let shared = match known.sharing {
            Sharing::Announced | Sharing::Available | Sharing::Withheld => true,
            Sharing::LocalOnly => false,
        };
        if !shared || known.damaged || known.stamp != Stamp::of(stat) || !self.worth_keeping(path, &known.digest)? {
            return Ok(false);
        }
        let Some(sums) = self.parts.store.sums(&known.digest)? else { return Ok(false) };
        let node = self.table.by_key(Key::of(stat));
        let mut state = node.as_ref().map(|node| node.content.state.lock());
        // Who has it open for writing could change an object's bytes.
        if state.as_ref().is_some_and(|state| state.writers > 0 || matches!(state.claim, Claim::Writing)) {
            return Ok(false);
        }
        let opened = dir.open_dir()?;
        if !self.parts.objects.put(&known.digest, &sums, self.kind(), known.sharing, known.provenance, opened.as_fd(), name)? {
            return Ok(false);
        }
        if let Some(state) = &mut state {
            state.is_object = true;
            state.set(Claim::Known(crate::content::Known { sums: Some(sums), ..known }));
        }
        Ok(true)
    }

    /// What an object from this directory is.
    fn kind(&self) -> Kind {
        match self.role {
            Role::Archives => Kind::Package,
            Role::Lists => Kind::Index,
        }
    }

    fn worth_keeping(&self, path: &[u8], digest: &Digest) -> Result<bool, FsError> {
        // apt deletes patches before it commits the Release that they belong to.
        let arriving = || self.parts.names.arriving_by_digest(digest).filter(|_| self.is_arriving(path));
        Ok(self.parts.names.by_digest(digest)?.or_else(arriving).is_some_and(|entry| !entry.private))
    }

    /// Moves a name. `flags`: `RENAME_*` of `renameat2(2)`.
    pub fn rename(self: &Arc<Self>, from: (u64, &OsStr), to: (u64, &OsStr), flags: u32) -> Answer<()> {
        // A file that took the name of a ghost is what the name means.
        let ghost = self.table.ghost(from.0, from.1).filter(|node| node.backing().is_none() && !self.is_on_disk(from.0, from.1));
        let Some(ghost) = ghost else { return self.rename_real(from, to, flags).into() };
        // The bytes have to be here before they can have another name.
        let tree = Arc::clone(self);
        let (from, to) = ((from.0, from.1.to_os_string()), (to.0, to.1.to_os_string()));
        Answer::Wait(Box::pin(async move {
            if let Err(err) = tree.put_in_place(&ghost).await {
                tracing::debug!("{err}");
                tree.unlink_ghost(&*tree.table.get(from.0)?, &from.1);
                return Err(Errno::NOENT.into());
            }
            tree.blocking(move |tree| tree.rename_real((from.0, &from.1), (to.0, &to.1), flags)).await
        }))
    }

    fn is_on_disk(&self, dir: u64, name: &OsStr) -> bool {
        self.table
            .get(dir)
            .ok()
            .and_then(|dir| Some(rustix::fs::statat(dir.real().ok()?.fd(), name, AtFlags::SYMLINK_NOFOLLOW).is_ok()))
            .unwrap_or(false)
    }

    fn rename_real(&self, from: (u64, &OsStr), to: (u64, &OsStr), flags: u32) -> Result<(), FsError> {
        let flags = RenameFlags::from_bits_retain(flags);
        if flags.contains(RenameFlags::WHITEOUT) {
            return Err(Errno::INVAL.into());
        }
        let (from_dir, to_dir) = (self.table.get(from.0)?, self.table.get(to.0)?);
        let (from_fd, to_fd) = (from_dir.real()?.fd(), to_dir.real()?.fd());
        let _names = self.names_lock.write();
        let moved = rustix::fs::statat(from_fd, from.1, AtFlags::SYMLINK_NOFOLLOW)?;
        let there = rustix::fs::statat(to_fd, to.1, AtFlags::SYMLINK_NOFOLLOW).ok();
        rustix::fs::renameat_with(from_fd, from.1, to_fd, to.1, flags)?;
        if there.is_some_and(|there| Key::of(&there) == Key::of(&moved)) {
            // Two names of one file: rename(2) does nothing, and both stay.
            return Ok(());
        }
        let paths = (self.table.path(from.0, from.1), self.table.path(to.0, to.1));
        if flags.contains(RenameFlags::EXCHANGE) {
            if let Some(there) = there {
                self.table.renamed(Key::of(&there), to, from);
            }
            self.table.renamed(Key::of(&moved), from, to);
            if let (Some(a), Some(b)) = paths
                && let Err(err) = self.parts.store.exchanged(self.role, &a, &b)
            {
                self.note_lost_record("an exchange of names could not be recorded", &err.into());
            }
            return Ok(());
        }
        if let Some(there) = there {
            self.table.unnamed(Key::of(&there), to.0, to.1);
        }
        self.table.renamed(Key::of(&moved), from, to);
        self.hide_name(&from_dir, paths.0.as_deref());
        if let (Some(a), Some(b)) = &paths
            && self.options.verify
            && let Err(err) = self.parts.store.renamed(self.role, a, b)
        {
            self.note_lost_record("a rename could not be recorded", &err.into());
        }
        self.note_left(paths.0.as_deref(), paths.1.as_deref());
        self.note_committed(to.0, to.1);
        Ok(())
    }

    /// Opens a directory for listing.
    pub fn opendir(&self, ino: u64) -> Result<u64, FsError> {
        let node = self.table.get(ino)?;
        let dir = node.real()?.open_dir()?;
        Ok(self.handles.add_dir(DirHandle { node, dir, entries: poolfs_core::sync::Mutex::default() }))
    }

    /// Lists a directory from `offset` (0, or an entry's `next`) until `add` says that no more fits.
    ///
    /// The names are those of the moment when reading began at 0, so offsets stay good while the directory changes.
    pub fn readdir(&self, fh: u64, offset: u64, mut add: impl FnMut(&DirEntry) -> bool) -> Result<(), FsError> {
        for entry in rest(&self.listing(fh, offset)?.1, offset) {
            if add(entry) {
                break;
            }
        }
        Ok(())
    }

    /// As [`Self::readdir`], looking each name up. A name that is gone by now is left out.
    pub fn readdirplus(self: &Arc<Self>, fh: u64, offset: u64, mut add: impl FnMut(&DirPlusEntry) -> bool) -> Result<(), FsError> {
        let (handle, entries) = self.listing(fh, offset)?;
        for (index, dir) in rest(&entries, offset).iter().enumerate() {
            if dir.name == "." || dir.name == ".." {
                let stat = handle.node.real()?.stat()?;
                let entry = self.entry(&handle.node, &stat);
                if add(&DirPlusEntry { dir: dir.clone(), entry }) {
                    break;
                }
                continue;
            }
            let entry = match self.look_up_real(&handle.node, &dir.name) {
                Ok((node, stat)) => self.entry(&node, &stat),
                Err(FsError::Backing(Errno::NOENT)) => match self.look_up_listed(&handle.node, &dir.name) {
                    Some(entry) => entry,
                    None => continue,
                },
                // A file that is there must not be missing from a listing: whoever goes on from here is told.
                Err(err) if index == 0 => return Err(err),
                Err(_) => break,
            };
            if add(&DirPlusEntry { dir: dir.clone(), entry }) {
                // It did not fit, so the kernel does not learn of this lookup.
                self.table.forget(entry.attr.ino, 1);
                break;
            }
        }
        Ok(())
    }

    fn listing(&self, fh: u64, offset: u64) -> Result<(Arc<DirHandle>, Arc<[DirEntry]>), FsError> {
        let handle = self.handles.dir(fh)?;
        let mut entries = handle.entries.lock();
        let listed = match &*entries {
            Some(listed) if offset > 0 => Arc::clone(listed),
            _ => {
                let listed = self.list(&handle)?;
                *entries = Some(Arc::clone(&listed));
                listed
            }
        };
        drop(entries);
        Ok((handle, listed))
    }

    fn list(&self, handle: &DirHandle) -> Result<Arc<[DirEntry]>, FsError> {
        let mut entries: Vec<DirEntry> = Vec::new();
        for found in rustix::fs::Dir::read_from(&handle.dir)? {
            let found = found?;
            if found.file_name().to_bytes().starts_with(TEMP_PREFIX.as_bytes()) {
                continue; // A copy that has no name yet.
            }
            let next = entries.len() as u64 + 1;
            entries.push(DirEntry { ino: found.ino(), kind: found.file_type(), name: name_of(found.file_name()), next });
        }
        if self.options.browse {
            self.list_ghosts(&handle.node, &mut entries)?;
        }
        Ok(entries.into())
    }

    /// Adds what the catalog knows and is not on disk.
    fn list_ghosts(&self, dir: &Node, entries: &mut Vec<DirEntry>) -> Result<(), FsError> {
        if dir.id != ROOT || self.role != poolfs_core::Role::Archives {
            return Ok(());
        }
        let here: HashSet<OsString> = entries.iter().map(|entry| entry.name.clone()).collect();
        for name in self.parts.names.packages()? {
            let name = OsString::from(name);
            if !here.contains(&name) && !self.is_hidden(dir, &name) {
                let next = entries.len() as u64 + 1;
                entries.push(DirEntry { ino: NO_INODE, kind: FileType::RegularFile, name, next });
            }
        }
        Ok(())
    }

    /// Closes a directory.
    pub fn releasedir(&self, fh: u64) -> Result<(), FsError> {
        self.handles.remove_dir(fh).map(|_| ())
    }

    /// Brings a directory's names to the disk.
    pub fn fsyncdir(self: &Arc<Self>, fh: u64) -> Answer<()> {
        match self.handles.dir(fh) {
            Ok(handle) => {
                let tree = Arc::clone(self);
                Answer::Wait(Box::pin(async move { tree.blocking(move |_| Ok(rustix::fs::fsync(&handle.dir)?)).await }))
            }
            Err(err) => Answer::Ready(Err(err)),
        }
    }
}

fn rest(entries: &[DirEntry], offset: u64) -> &[DirEntry] {
    usize::try_from(offset).ok().and_then(|offset| entries.get(offset..)).unwrap_or_default()
}

fn name_of(name: &CStr) -> OsString {
    OsString::from_vec(name.to_bytes().to_vec())
}

/// Owner, group and mode of a new inode, by the rules of the kernel: the group of a set-gid directory is inherited, and
/// by a directory the bit too. Set after the owner, since changing the owner clears set-id bits.
fn give(backing: &Backing, made: &Stat, parent: &Stat, mode: u32, caller: &Caller) -> Result<(), Errno> {
    let inherits = parent.st_mode & 0o2000 != 0;
    let gid = if inherits { parent.st_gid } else { caller.gid };
    if made.st_uid != caller.uid || made.st_gid != gid {
        backing.chown(Some(caller.uid), Some(gid))?;
    }
    match backing.kind {
        FileType::Symlink => Ok(()),
        FileType::Directory if inherits => backing.chmod(mode | 0o2000),
        _ => backing.chmod(mode),
    }
}
