//! KRPC: the datagrams of the DHT (BEP 5, 32, 42, 43, 44) as types, and their bytes.
//!
//! No socket, no clock, no state. Every datagram from outside goes through [`scan`] before a parser allocates anything;
//! none that leaves is longer than [`DATAGRAM_BYTES_OUT_MAX`]. What poolfs adds travels in extra keys, which other nodes
//! ignore: `pv` and `pvs` ([`Pv`]), `more` (further keys of one announce, n x 20 bytes), `st` and `sts` ([`Statement`]),
//! and one verb of its own, `pf_dial`.
//!
//! Sizes in bytes, with 4-byte transaction ids, tokens of 8 and `v` (checked by a test):
//!
//! | datagram | bytes |
//! |---|---|
//! | get_peers / with `pv` = 1 / with token too | 106 / 113 / 130 |
//! | reply with 8 nodes and token, no values: IPv4 / IPv6 | 306 / 416 |
//! | values in a reply with 8 nodes of at most 600 bytes: IPv4 / IPv6 | 35 / 8 |
//! | values with `pv` of 46 / 132 / 512 bytes in a reply without nodes: IPv4 | 19 / 7 / 2 |
//! | the same, IPv6 | 15 / 7 / 2 |
//! | announce_peer / `pv` of 46 / of 132 (one delta) / of 512 | 158 / 211 / 298 / 678 |
//! | announce_peer with `more` of 24 / 48 keys | 648 / 1,128 |
//! | announce_peer with a statement | 402 |
//! | put of 980 bytes / reply to its get without nodes / with 5 | 1,101 / 1,074 / 1,215 |

mod id;
pub mod message;
mod pv;
pub mod scan;
pub mod statement;
#[cfg(test)]
mod tests;

pub use id::{Distance, ID_BITS, Id};
pub use message::{
    Announce, Body, ITEM_BYTES_MAX, MORE_KEYS_MAX, Malformed, Message, NodeInfo, Reply, TOKEN_BYTES_MAX, TooLong, Transaction, Verb, Want,
    code, contact_from_slice, contact_to_vec,
};
pub use pv::{Delta, FLAG_PARTIAL, FLAG_REACHABLE, PV_BYTES_MAX, PV_DELTAS_MAX, PV_UNKNOWN_BYTES_MAX, Pv, PvError};
pub use statement::{STATEMENT_AGE_MAX_S, STATEMENT_AHEAD_MAX_S, STATEMENT_BYTES, Statement, StatementError};

use sha1::{Digest as _, Sha1};

/// Longest datagram that is read.
pub const DATAGRAM_BYTES_IN_MAX: usize = 1500;

/// Longest datagram that is sent: the smallest IPv6 path MTU without its headers.
pub const DATAGRAM_BYTES_OUT_MAX: usize = 1232;

/// Lists and dictionaries in one another.
pub const DEPTH_MAX: usize = 10;

/// Strings, integers, lists and dictionaries in one datagram.
pub const TOKENS_MAX: usize = 500;

/// `v` of this node: `PF` marks poolfs, two bytes of version.
pub const VERSION: [u8; 4] = *b"PF\x00\x01";

/// The key of a BEP 44 immutable item: SHA-1 of its bencoded bytes.
pub fn item_target(value: &[u8]) -> Id {
    Id(Sha1::digest(value).into())
}
