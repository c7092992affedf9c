//! `poolfs verify`: every block of every file and object read from the disk and compared with its sum.
//!
//! Files go through their [`Tree`], as a reader would: what is written meanwhile is left alone, a file that changed behind
//! the mount is hashed first, and a repair takes its turn among the readers'. Objects are nobody's files: one that is bad
//! and cannot be repaired is dropped.
//!
//! One piece is in memory at a time. Dropping a future here ends the work between two pieces and leaves nothing open.

use crate::errno::FsError;
use crate::inode::Node;
use crate::repair::Repairer;
use crate::tree::bytes::Trouble;
use crate::tree::{Tree, note};
use poolfs_core::piece::{self, BLOCK_BYTES, PIECE_BYTES};
use poolfs_core::store::{Objects, OpenObject, State};
use poolfs_core::{BlockSum, Digest, Sums};
use rustix::fs::{Advice, Mode, OFlags, fadvise};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;

/// How often a piece is read again because its file changed behind the mount.
const TRIES_MAX: usize = 4;

/// What a verification found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Verified {
    /// Files read.
    pub files: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Files with a damaged block that was repaired.
    pub repaired: Vec<String>,
    /// Files with a damaged block that stays damaged.
    pub damaged: Vec<String>,
    /// Objects that were damaged, could not be repaired, and are no longer here.
    pub dropped: Vec<String>,
    /// Files that could not be read at all, with the reason.
    pub problems: Vec<String>,
}

/// What became of one file.
#[derive(Default)]
struct Outcome {
    bytes: u64,
    repaired: bool,
    damaged: bool,
}

/// Reads every block of every file of a directory, and repairs damaged ones if `repair`.
///
/// `step` gets the file's path below the mount and the bytes just read, piece by piece. A file that stays damaged is
/// recorded as such.
pub async fn files(tree: &Arc<Tree>, repair: bool, step: impl Fn(&str, u64) + Send + Sync) -> Result<Verified, FsError> {
    let mut verified = Verified::default();
    for path in tree.files().await? {
        let name = String::from_utf8_lossy(&path).into_owned();
        let outcome = tree.with_file(&path, |tree, node| {
            let (name, step) = (&name, &step);
            async move { file(&tree, &node, repair, |bytes| step(name, bytes)).await }
        });
        match outcome.await {
            Ok(outcome) => {
                verified.files += 1;
                verified.bytes += outcome.bytes;
                if outcome.damaged {
                    verified.damaged.push(name);
                } else if outcome.repaired {
                    verified.repaired.push(name);
                }
            }
            Err(err) => note(&mut verified.problems, &path, &err),
        }
    }
    Ok(verified)
}

async fn file(tree: &Arc<Tree>, node: &Arc<Node>, repair: bool, step: impl Fn(u64) + Send + Sync) -> Result<Outcome, FsError> {
    let opened = tree.open(node.id, libc::O_RDONLY).get().await?;
    let _open = Open { tree, fh: opened.fh };
    let handle = tree.handles.get(opened.fh)?;
    let size = u64::try_from(node.real()?.stat()?.st_size).unwrap_or(0);
    if let Some(file) = handle.file.get() {
        read_from_disk(file);
    }
    let mut outcome = Outcome::default();
    for index in 0..piece::count(size, PIECE_BYTES) {
        let span = piece::span(index, size, PIECE_BYTES);
        let len = u32::try_from(span.end - span.start).unwrap_or(PIECE_BYTES);
        for _ in 0..TRIES_MAX {
            let again = Arc::clone(&handle);
            let tried = tree.blocking(move |tree| Ok(tree.try_read(&again, span.start, len)?.err())).await?;
            match tried {
                None => break,
                Some(Trouble::Unknown) => tree.settle(node).await?,
                Some(Trouble::Bad(_)) if repair && tree.read(opened.fh, span.start, len).get().await.is_ok() => {
                    outcome.repaired = true;
                    break;
                }
                Some(Trouble::Bad(_)) => {
                    outcome.damaged = true;
                    tree.mark_damaged(node)?;
                    break;
                }
            }
        }
        outcome.bytes += u64::from(len);
        step(u64::from(len));
    }
    Ok(outcome)
}

/// An open file of a tree, closed also when who opened it is dropped half way.
struct Open<'a> {
    tree: &'a Arc<Tree>,
    fh: u64,
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        if let Err(err) = self.tree.release(self.fh) {
            tracing::warn!("close after verifying: {err}");
        }
    }
}

impl Tree {
    /// Records that a block is damaged: what is recorded otherwise by the reader who could not have it repaired.
    fn mark_damaged(&self, node: &Node) -> Result<(), FsError> {
        let _names = self.names_still();
        for link in self.table.links(node.id) {
            let known = self.parts.store.file(self.role, &link.path)?.is_some_and(|record| record.state != State::Writing);
            if known {
                self.parts.store.set_state(self.role, &link.path, State::Damaged)?;
            }
        }
        Ok(())
    }
}

/// As [`files`] for the objects. With a repairer a bad one is repaired, or dropped where that fails.
pub async fn objects(
    objects: &Arc<Objects>,
    repairer: Option<&Repairer>,
    step: impl Fn(&str, u64) + Send + Sync,
) -> Result<Verified, FsError> {
    let mut verified = Verified::default();
    for digest in digests(objects).await? {
        let name = format!("objects/{digest}");
        let from = Arc::clone(objects);
        // Evicted meanwhile, or changed and dropped by the store itself.
        let Some(object) = blocking(move || Ok(from.open_object(&digest)?)).await? else { continue };
        let object = Arc::new(object);
        verified.files += 1;
        let mut bad = Vec::new();
        let mut failed = None;
        for index in 0..u32::try_from(object.sums.pieces.len()).unwrap_or(u32::MAX) {
            let read = Arc::clone(&object);
            match blocking(move || Ok(check(&read, index))).await? {
                Ok((len, right)) => {
                    verified.bytes += len;
                    step(&name, len);
                    if !right {
                        bad.push(index);
                    }
                }
                Err(err) => failed = Some(FsError::from(rustix::io::Errno::from_io_error(&err).unwrap_or(rustix::io::Errno::IO))),
            }
        }
        if let Some(err) = failed {
            note(&mut verified.problems, name.as_bytes(), &err);
        }
        if bad.is_empty() {
            continue;
        }
        let Some(repairer) = repairer else {
            verified.damaged.push(name);
            continue;
        };
        match mend(&object, repairer, &bad).await {
            Ok(()) => verified.repaired.push(name),
            Err(why) => {
                tracing::warn!("{name} is damaged and dropped: {why}");
                let from = Arc::clone(objects);
                blocking(move || Ok(from.discard(&digest)?)).await?;
                verified.dropped.push(name);
            }
        }
    }
    Ok(verified)
}

async fn digests(objects: &Arc<Objects>) -> Result<Vec<Digest>, FsError> {
    let objects = Arc::clone(objects);
    blocking(move || {
        let mut digests = Vec::new();
        objects.each(|digest, _, _| digests.push(*digest))?;
        Ok(digests)
    })
    .await
}

/// The length of a piece in bytes, and whether all of its blocks are right; a piece that is cut short is not.
fn check(object: &OpenObject, index: u32) -> io::Result<(u64, bool)> {
    if index == 0 {
        read_from_disk(&object.file);
    }
    let sums: &Sums = &object.sums;
    let span = piece::span(index.into(), sums.size, PIECE_BYTES);
    let len = span.end - span.start;
    let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
    match object.file.read_exact_at(&mut bytes, span.start) {
        Err(err) if err.kind() == io::ErrorKind::UnexpectedEof => return Ok((len, false)),
        read => read?,
    }
    let first = usize::try_from(span.start / u64::from(BLOCK_BYTES)).unwrap_or(usize::MAX);
    let expected = sums.blocks.iter().skip(first);
    let right = bytes.chunks(BLOCK_BYTES as usize).zip(expected).all(|(block, sum)| BlockSum::of(block) == *sum);
    Ok((len, right))
}

async fn mend(object: &OpenObject, repairer: &Repairer, bad: &[u32]) -> Result<(), String> {
    for index in bad {
        // The store opens objects for reading only; this is the same file, whatever its name is by now.
        let path = format!("/proc/self/fd/{}", object.file.as_raw_fd());
        let file = rustix::fs::open(path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).map_err(|err| err.to_string())?;
        repairer.repair(File::from(file), &object.sums, *index).await.map_err(|err| err.to_string())?;
    }
    Ok(())
}

/// What is in the page cache tells nothing of the disk. Only clean pages go, and failing costs only the check's depth.
fn read_from_disk(file: &File) {
    let _ = fadvise(file, 0, None, Advice::DontNeed);
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T, FsError> + Send + 'static) -> Result<T, FsError> {
    tokio::task::spawn_blocking(work).await.unwrap_or(Err(FsError::Died))
}

#[cfg(test)]
mod tests;
