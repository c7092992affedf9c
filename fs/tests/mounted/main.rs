//! Real mounts over private directories, with a catalog of a few names and a source that does what the test says.
//!
//! Skipped loudly where there is no `/dev/fuse` or no root. A mount is detached when its lab is dropped, also by a panic.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::cast_possible_truncation, reason = "tests")]
#![allow(clippy::print_stderr, reason = "a skipped test says so")]

mod files;
mod ghosts;
mod lab;
mod model;
#[path = "../../src/sys.rs"]
mod sys;
