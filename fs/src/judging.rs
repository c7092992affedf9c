//! Everything that is here, judged again: files of both directories and objects.
//!
//! A verdict belongs to a content, so it is taken for all copies at once, and all verdicts in one transaction: what falls silent
//! does so together. Nothing that was judged by older lists may be recorded afterwards: whoever records a file judges and
//! records it while he holds its tree's names for reading. So once the names were held for writing, no older verdict is
//! under way.

use crate::errno::FsError;
use crate::names::Names;
use crate::tree::Tree;
use poolfs_core::store::Sharing;
use poolfs_core::{Digest, Role};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Where apt fetches to, below its lists. What lies there is judged by the Release that comes with it, when it is recorded.
const ARRIVING: &[u8] = b"partial/";

/// Judges the contents of the store that the trees share; `false`: there is none.
pub(crate) fn judge_again(names: &dyn Names, trees: &[Arc<Tree>]) -> Result<bool, FsError> {
    let Some(first) = trees.first() else { return Ok(false) };
    for tree in trees {
        drop(tree.names_lock.write());
    }
    let (store, objects) = (&first.parts.store, &first.parts.objects);
    let mut contents: BTreeMap<Digest, (u64, Sharing)> = BTreeMap::new();
    let mut add = |digest: Digest, size: u64, sharing: Sharing| {
        let known = contents.entry(digest).or_insert((size, sharing));
        if known.1 == Sharing::LocalOnly {
            known.1 = sharing;
        }
    };
    // Also of a directory that is not mounted now: it is announced all the same.
    for role in [Role::Archives, Role::Lists] {
        store.each_file(role, |path, record| {
            if let Some(digest) = record.digest.filter(|_| !is_arriving(role, path)) {
                add(digest, record.stamp.size, record.sharing);
            }
        })?;
    }
    objects.each(|digest, size, sharing| add(*digest, size, sharing))?;
    let decisions = names.judge_again(&contents)?;
    // Nothing becomes an object meanwhile, with the sharing of its old record.
    let _still: Vec<_> = trees.iter().map(|tree| tree.names_still()).collect();
    let changed = store.decide(&decisions, is_arriving)?;
    if !changed.is_empty() {
        tracing::info!(files = changed.len(), "judged again: shared otherwise than before");
    }
    for (role, path, digest, sharing) in changed {
        if let Some(tree) = trees.iter().find(|tree| tree.role == role) {
            tree.share(&path, digest, sharing);
        }
    }
    Ok(true)
}

fn is_arriving(role: Role, path: &[u8]) -> bool {
    role == Role::Lists && path.starts_with(ARRIVING)
}
