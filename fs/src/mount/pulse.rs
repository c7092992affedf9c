//! Whether a mount answers, asked as any program would ask: by a call that the kernel passes on to the session.

use rustix::fs::{AtFlags, CWD, StatxFlags};
use rustix::io::Errno;
use rustix::mount::{OpenTreeFlags, open_tree};
use std::path::Path;

/// Asks the mount of that `device` (`major:minor`) at `path` for its attributes; `false` where another one is there, or none.
/// Blocks for as long as the mount does.
///
/// It is asked through a clone of its own: a call that walks into the mount would keep an `umount` of that moment from
/// succeeding.
pub fn answers(path: &Path, device: &str) -> Result<bool, Errno> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_NO_AUTOMOUNT;
    let clone = match open_tree(CWD, path, flags) {
        // The path itself has gone.
        Err(Errno::NOENT | Errno::NOTDIR | Errno::INVAL) => return Ok(false),
        clone => clone?,
    };
    // The kernel remembers attributes for a second: what it remembers says nothing.
    let found = rustix::fs::statx(&clone, c"", AtFlags::EMPTY_PATH | AtFlags::STATX_FORCE_SYNC, StatxFlags::BASIC_STATS)?;
    Ok(format!("{}:{}", found.stx_dev_major, found.stx_dev_minor) == device)
}
