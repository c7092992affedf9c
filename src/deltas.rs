//! Deltas between versions of a package. What they are is in [`poolfs_core::delta`]; here is the process in which they are made and
//! applied.

pub mod work;
