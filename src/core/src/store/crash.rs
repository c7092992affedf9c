//! Crash points.

/// Reached in order by each operation.
pub(crate) fn crash_point(_name: &'static str) {}
