//! Pieces between peers over HTTP/1.1: the server that gives what is here, and the client that takes it.
//!
//! | request | answer |
//! |---|---|
//! | `GET /v1/file/DIGEST` | the file; one `Range`: 206, 200 or 416 |
//! | `GET /v1/have/DIGEST` | which pieces are here, as [`crate::swarm::bits`] |
//! | `GET /v1/pieces/DIGEST` | a signed list of the pieces, [`crate::swarm::piece_list`] |
//! | `GET /v1/about/DIGEST` | [`About`]: what the DHT's `pv` says, and the signed claims behind its deltas |
//! | `GET /v1/statement/ID` | the proof of a statement; `ID` is the proof's SHA-256 |
//! | `GET /v1/members` | the fleet's members, for its members only |
//!
//! `DIGEST` is 64 lower-case hexadecimal digits. HEAD is answered too. The asker knows a file's size from a signed index,
//! so nothing is asked that the size does not bound. An answer with bytes of a file that is still arriving carries the header
//! `poolfs-arriving: 1`: who gives them has not seen the whole file, and cannot answer for them.
//!
//! **Invariants.** What may not be had by the asker gets the same answer as what is not there, through the same code.
//! What is sent was compared with its checksum in the very buffer that is sent. Nothing of what arrives is believed: it is
//! counted, hashed and handed over. No side waits without a limit, no redirect is followed, nothing is queued.

mod about;
mod auth;
mod client;
mod partials;
mod server;
mod shelf;

pub use about::{ABOUT_BYTES_MAX, About, CLAIM_BYTES, ClaimError, DeltaClaim, Facts, NoFacts};
pub use auth::{AUTH_HEADER, Auth, Signed};
pub use client::{ClientLimits, PeerClient, PeerError, PeerPiece};
pub use partials::{Partial, Partials};
pub(crate) use server::prefixes_of_machine;
pub use server::{Near, PeerServer, ServeError, ServerCounters, ServerLimits, ServerParts};
pub use shelf::{Audience, Shelf, Shelved};
