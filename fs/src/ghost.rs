//! Ghosts: names that the catalog knows and that are not on disk yet.

use poolfs_core::catalog::Entry;

/// One ghost.
#[derive(Debug)]
pub(crate) struct Ghost {
    /// What the catalog says it is.
    pub(crate) entry: Entry,
}
