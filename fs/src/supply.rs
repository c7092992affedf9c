//! What a tree asks of the side that can fetch bytes again.

use poolfs_core::{Role, Sums};
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
    /// What its bytes should be.
    pub sums: Arc<Sums>,
    /// The piece ([`poolfs_core::piece::PIECE_BYTES`]) that is wrong.
    pub piece: u32,
}

/// The right bytes of one piece; the error says, for people, why nobody has them.
pub type Mended = Result<Arc<Vec<u8>>, String>;

/// Who gets a damaged piece again and checks it against the sums. The tree writes it in place: only it knows whether
/// somebody has written to the file meanwhile.
pub trait Mend: Send + Sync + 'static {
    /// Gets one piece again.
    fn mend(&self, wound: Wound) -> Pin<Box<dyn Future<Output = Mended> + Send>>;
}
