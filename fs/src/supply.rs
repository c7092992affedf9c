//! What a tree asks of the side that can fetch bytes again.

use poolfs_core::{Role, Sums};
use std::fs::File;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

/// A file with a piece that does not match its sums.
#[derive(Debug)]
pub struct Wound {
    /// Which directory.
    pub role: Role,
    /// The file below the mount.
    pub path: Vec<u8>,
    /// The backing file, open for reading and writing: right bytes are written into it.
    pub file: File,
    /// What its bytes should be.
    pub sums: Arc<Sums>,
    /// The piece ([`poolfs_core::piece::PIECE_BYTES`]) that is wrong.
    pub piece: u32,
}

/// Who gets a damaged piece again, checks it against the sums and writes it in place.
pub trait Mend: Send + Sync + 'static {
    /// Repairs one piece. The error says, for people, why nobody could.
    fn mend(&self, wound: Wound) -> Pin<Box<dyn Future<Output = Result<(), String>> + Send>>;
}
