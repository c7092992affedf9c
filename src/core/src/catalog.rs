//! The catalog.

use serde::{Deserialize, Serialize};

/// One URL of a file on a mirror.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MirrorUrl {
    /// `http:` or `https:`.
    pub url: String,
    /// The proxy that apt would use for it, `None` for a direct connection.
    pub proxy: Option<String>,
    /// Whether the bytes behind this URL can never change (`pool/`, by-hash), so that ranges of it may be joined without a validator.
    pub immutable: bool,
    /// Whether the repository needs credentials or is configured as private: it is asked of its mirror alone, never of peers.
    pub private: bool,
}
