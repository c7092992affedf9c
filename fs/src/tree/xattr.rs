//! Extended attributes: poolfs's own, and the backing file's.

use super::Tree;
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

impl Tree {
    /// The value of an attribute.
    pub fn getxattr(&self, ino: u64, name: &OsStr) -> Result<Vec<u8>, FsError> {
        let node = self.table.get(ino)?;
        if is_reserved(name) {
            let own = self.own_attributes(&node)?;
            return own.into_iter().find(|(own, _)| name == *own).map(|(_, value)| value.into_bytes()).ok_or(Errno::NODATA.into());
        }
        match node.backing() {
            Some(backing) => Ok(backing.xattr(name)?),
            None => Err(Errno::NODATA.into()),
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
