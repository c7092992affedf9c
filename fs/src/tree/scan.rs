//! The whole directory compared with the database at start, and walked for `poolfs verify` ([`crate::verify`]).

use super::Tree;
use super::bytes::below;
use crate::backing::Key;
use crate::content::Claim;
use crate::errno::FsError;
use crate::inode::{Node, ROOT};
use poolfs_core::Digest;
use poolfs_core::store::Sharing;
use rustix::fs::FileType;
use rustix::io::Errno;
use std::collections::HashSet;
use std::ffi::OsString;
use std::sync::Arc;

/// Directories below each other that a scan goes into; apt has two levels.
const DEPTH_MAX: usize = 64;

/// What a scan found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Scanned {
    /// Regular files.
    pub files: u64,
    /// Of these, files that had to be hashed.
    pub hashed: u64,
    /// Records of files that are gone.
    pub forgotten: u64,
    /// Files that could not be read or recorded, with the reason.
    pub problems: Vec<String>,
}

/// Problems listed; further ones are only counted in the log.
const PROBLEMS_MAX: usize = 100;

impl Tree {
    /// Gives every file a record and takes records from files that are gone. Files whose stamp is recorded are not read.
    pub async fn scan(self: &Arc<Self>) -> Result<Scanned, FsError> {
        let mut scanned = Scanned::default();
        let mut present = HashSet::new();
        for path in self.files().await? {
            let hashed_before = self.counters.files_hashed.load(std::sync::atomic::Ordering::Relaxed);
            match self.with_file(&path, |tree, node| async move { tree.settle(&node).await }).await {
                // Replaced by what its name says: the new file has its record.
                Ok(()) | Err(FsError::Backing(Errno::STALE)) => {
                    scanned.files += 1;
                    let hashed = self.counters.files_hashed.load(std::sync::atomic::Ordering::Relaxed);
                    scanned.hashed += u64::from(hashed > hashed_before);
                }
                Err(err) => note(&mut scanned.problems, &path, &err),
            }
            present.insert(path);
        }
        let forgotten = self
            .blocking(move |tree| {
                let mut gone = Vec::new();
                tree.parts.store.each_file(tree.role, |path, _| {
                    if !present.contains(path) {
                        gone.push(path.to_vec());
                    }
                })?;
                let mut forgotten = 0;
                for path in gone {
                    let _names = tree.names_lock.write();
                    // It may have been made since the listing.
                    if !tree.exists(&path) {
                        tree.parts.store.removed(tree.role, &path)?;
                        forgotten += 1;
                    }
                }
                Ok(forgotten)
            })
            .await?;
        scanned.forgotten = forgotten;
        Ok(scanned)
    }

    /// Tells the node of a file, if the kernel knows it.
    pub(crate) fn share(&self, path: &[u8], digest: Digest, sharing: Sharing) {
        use std::os::unix::ffi::OsStrExt as _;
        let Ok(root) = self.table.root().real() else { return };
        let path = std::ffi::OsStr::from_bytes(path);
        let Ok(stat) = rustix::fs::statat(root.fd(), path, rustix::fs::AtFlags::SYMLINK_NOFOLLOW) else { return };
        let Some(node) = self.table.by_key(Key::of(&stat)) else { return };
        if let Claim::Known(known) = &mut node.content.state.lock().claim
            && known.digest == digest
        {
            known.sharing = sharing;
        }
    }

    /// The paths of all regular files, below the mount.
    pub(crate) async fn files(self: &Arc<Self>) -> Result<Vec<Vec<u8>>, FsError> {
        self.blocking(|tree| {
            let mut files = Vec::new();
            tree.walk(ROOT, &[], 0, &mut files)?;
            Ok(files)
        })
        .await
    }

    fn walk(self: &Arc<Self>, dir: u64, path: &[u8], depth: usize, files: &mut Vec<Vec<u8>>) -> Result<(), FsError> {
        let fh = self.opendir(dir)?;
        let mut dirs: Vec<OsString> = Vec::new();
        let mut unsure: Vec<OsString> = Vec::new();
        let listed = self.readdir(fh, 0, |entry| {
            match entry.kind {
                FileType::RegularFile => files.push(below(path, &entry.name)),
                FileType::Directory if entry.name != "." && entry.name != ".." => dirs.push(entry.name.clone()),
                FileType::Unknown => unsure.push(entry.name.clone()),
                _ => {}
            }
            false
        });
        self.releasedir(fh)?;
        listed?;
        for name in unsure {
            let Ok((node, _)) = self.look_up_real(&self.table.get(dir)?, &name) else { continue };
            if Self::is_file(&node) {
                files.push(below(path, &name));
            }
            self.forget(node.id, 1);
        }
        if depth == DEPTH_MAX {
            return Ok(());
        }
        for name in dirs {
            // What is gone by now needs no scan.
            let Ok((node, _)) = self.look_up_real(&self.table.get(dir)?, &name) else { continue };
            let walked = self.walk(node.id, &below(path, &name), depth + 1, files);
            self.forget(node.id, 1);
            walked?;
        }
        Ok(())
    }

    fn exists(&self, path: &[u8]) -> bool {
        use std::os::unix::ffi::OsStrExt as _;
        self.table.root().real().is_ok_and(|root| {
            let path = std::ffi::OsStr::from_bytes(path);
            rustix::fs::statat(root.fd(), path, rustix::fs::AtFlags::SYMLINK_NOFOLLOW).is_ok()
        })
    }

    /// Looks a path up, runs `body` on its node, and forgets what was looked up.
    pub(crate) async fn with_file<T, F>(self: &Arc<Self>, path: &[u8], body: impl FnOnce(Arc<Self>, Arc<Node>) -> F) -> Result<T, FsError>
    where
        F: Future<Output = Result<T, FsError>>,
    {
        use std::os::unix::ffi::OsStrExt as _;
        let mut held = Held { tree: self, ids: Vec::new() };
        let mut node = Arc::clone(self.table.root());
        for name in path.split(|byte| *byte == b'/') {
            (node, _) = self.look_up_real(&node, std::ffi::OsStr::from_bytes(name))?;
            held.ids.push(node.id);
        }
        body(Arc::clone(self), node).await
    }
}

/// Looked-up nodes, forgotten also when who looked them up is dropped half way.
struct Held<'a> {
    tree: &'a Tree,
    ids: Vec<u64>,
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        for id in self.ids.iter().rev() {
            self.tree.forget(*id, 1);
        }
    }
}

pub(crate) fn note(problems: &mut Vec<String>, path: &[u8], err: &FsError) {
    let path = String::from_utf8_lossy(path);
    tracing::warn!("{path}: {err}");
    if problems.len() < PROBLEMS_MAX {
        problems.push(format!("{path}: {err}"));
    }
}
