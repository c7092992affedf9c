//! The fleet's way onto the wire: who is in it, what they say to each other, and how they prove to be of it.
//!
//! The rules of sharing out are [`crate::swarm::fleet`]'s.

pub mod auth;
