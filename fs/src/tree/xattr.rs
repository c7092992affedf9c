//! Extended attributes: poolfs's own, and the backing file's.

use super::Tree;
use crate::backing::Backing;
use crate::content::Claim;
use crate::errno::FsError;
use crate::inode::Node;
use poolfs_core::store::{Sharing, State};
use rustix::fs::XattrFlags;
use rustix::io::Errno;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;

/// What all of poolfs's own attributes begin with.
const RESERVED: &[u8] = b"user.poolfs.";

/// The file's SHA-256 in hexadecimal digits.
pub(crate) const DIGEST: &str = "user.poolfs.digest";
/// `writing`, `clean`, `damaged`, or `ghost` for what is not here yet.
pub(crate) const STATE: &str = "user.poolfs.state";
/// `mirror`, `peer`, `delta` or `written here`.
pub(crate) const SOURCE: &str = "user.poolfs.source";
/// `announced`, `available`, `local-only` or `withheld`.
pub(crate) const ANNOUNCED: &str = "user.poolfs.announced";

fn is_reserved(name: &OsStr) -> bool {
    name.as_bytes().starts_with(RESERVED)
}

/// For how long a change time must be over before it tells that nothing was changed since: it may be as coarse as a tick, and
/// some file systems keep whole seconds, or two of them.
const CTIME_SETTLED_S: i64 = 5;

/// Whether the backing file has no attributes at all, which `ls -l` asks twice of every file.
fn is_bare(node: &Node, backing: &Backing, now_s: i64) -> Result<bool, FsError> {
    let stat = backing.stat()?;
    let ctime = (stat.st_ctime, i64::try_from(stat.st_ctime_nsec).unwrap_or(0));
    let mut bare_since = node.bare_since.lock();
    if *bare_since == Some(ctime) {
        return Ok(true);
    }
    if ctime.0.saturating_add(CTIME_SETTLED_S) > now_s {
        return Ok(false);
    }
    // Where the names cannot be had, who asks for a value is told why.
    let bare = backing.xattr_names().is_ok_and(|names| names.is_empty());
    *bare_since = bare.then_some(ctime);
    Ok(bare)
}

impl Tree {
    /// The value of an attribute.
    pub fn getxattr(&self, ino: u64, name: &OsStr) -> Result<Vec<u8>, FsError> {
        let node = self.table.get(ino)?;
        if is_reserved(name) {
            let own = self.own_attributes(&node)?;
            return own.into_iter().find(|(own, _)| name == *own).map(|(_, value)| value.into_bytes()).ok_or(Errno::NODATA.into());
        }
        let now_s = rustix::time::clock_gettime(rustix::time::ClockId::Realtime).tv_sec;
        match node.backing() {
            Some(backing) if !is_bare(&node, backing, now_s)? => Ok(backing.xattr(name)?),
            _ => Err(Errno::NODATA.into()),
        }
    }

    /// The names of all attributes, each ended by a zero byte.
    pub fn listxattr(&self, ino: u64) -> Result<Vec<u8>, FsError> {
        let node = self.table.get(ino)?;
        let mut names = match node.backing() {
            Some(backing) => match backing.xattr_names() {
                // What a backing file system without attributes would say is no reason not to show ours.
                Err(Errno::NOTSUP) => Vec::new(),
                other => other?,
            },
            None => Vec::new(),
        };
        for (own, _) in self.own_attributes(&node)? {
            names.extend_from_slice(own.as_bytes());
            names.push(0);
        }
        Ok(names)
    }

    /// Sets an attribute. `flags`: `XATTR_CREATE`, `XATTR_REPLACE` or 0.
    pub fn setxattr(&self, ino: u64, name: &OsStr, value: &[u8], flags: u32) -> Result<(), FsError> {
        let node = self.table.get(ino)?;
        if is_reserved(name) {
            return Err(FsError::ReservedAttribute);
        }
        Ok(node.real()?.set_xattr(name, value, XattrFlags::from_bits_retain(flags))?)
    }

    /// Removes an attribute.
    pub fn removexattr(&self, ino: u64, name: &OsStr) -> Result<(), FsError> {
        let node = self.table.get(ino)?;
        if is_reserved(name) {
            return Err(FsError::ReservedAttribute);
        }
        Ok(node.real()?.remove_xattr(name)?)
    }

    /// Poolfs's own attributes of a file; none of a directory.
    fn own_attributes(&self, node: &Node) -> Result<Vec<(&'static str, String)>, FsError> {
        if let (None, Some(ghost)) = (node.backing(), &node.ghost) {
            return Ok(vec![(DIGEST, ghost.entry.digest.to_string()), (STATE, "ghost".to_owned())]);
        }
        if !self.is_recorded(node) {
            return Ok(Vec::new());
        }
        // Asks the database if that was not done yet, and is not concerned whether the stamp still fits.
        self.trusted(node)?;
        let state = node.content.state.lock();
        Ok(match &state.claim {
            Claim::Unread | Claim::Nothing | Claim::Writing => {
                vec![(STATE, State::Writing.to_string()), (ANNOUNCED, Sharing::LocalOnly.to_string())]
            }
            Claim::Known(known) => {
                let state = if known.damaged { State::Damaged } else { State::Clean };
                vec![
                    (DIGEST, known.digest.to_string()),
                    (STATE, state.to_string()),
                    (SOURCE, known.provenance.to_string()),
                    (ANNOUNCED, known.sharing.to_string()),
                ]
            }
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use crate::inode::Table;
    use std::fs::File;

    /// An attribute that somebody sets behind the mount must be seen, however long the file had none.
    #[test]
    fn a_file_is_bare_until_its_change_time_says_otherwise() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("file"), b"bytes").unwrap();
        let (root, _) = Backing::of_fd(File::open(dir.path()).unwrap().into()).unwrap();
        let table = Table::new(root);
        let root = std::sync::Arc::clone(table.root());
        let (backing, stat) = Backing::pin(root.real().unwrap().fd(), OsStr::new("file")).unwrap();
        let node = table.look_up(backing, root.id, OsStr::new("file"));
        let backing = node.real().unwrap();
        let late = stat.st_ctime + CTIME_SETTLED_S;
        assert!(!is_bare(&node, backing, late - 1).unwrap(), "it may be changed once more in the same moment");
        assert!(is_bare(&node, backing, late).unwrap());
        assert!(is_bare(&node, backing, 0).unwrap(), "known by now");
        // Until the clock's tick lets the time change.
        while backing.stat().unwrap().st_ctime_nsec == stat.st_ctime_nsec && backing.stat().unwrap().st_ctime == stat.st_ctime {
            match backing.set_xattr(OsStr::new("user.test"), b"value", XattrFlags::empty()) {
                // This file system knows none.
                Err(Errno::NOTSUP) => return,
                set => set.unwrap(),
            }
        }
        assert!(!is_bare(&node, backing, late + 60).unwrap());
        assert!(!is_bare(&node, backing, 0).unwrap());
    }
}
