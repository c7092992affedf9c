//! What both sides of poolfs know: digests, piece arithmetic, the store and the catalog.
//!
//! **Must not know:** sockets, tokio, fuser. Everything here is synchronous: its callers are a FUSE thread, which may
//! wait for a disk but never for the network, and tasks that know how to leave their runtime.

pub mod advisories;
pub mod catalog;
mod crash_point;
pub mod db;
pub mod delta;
pub mod digest;
pub mod discretion;
pub mod piece;
pub mod role;
pub mod store;
pub mod sync;
mod sys;

pub use db::{Db, DbError};
pub use digest::{BlockSum, Digest, Summer, Sums};
pub use role::Role;
