//! The time by which the age of apt's lists is judged.

use std::sync::OnceLock;
use std::time::{SystemTime, UNIX_EPOCH};

/// Seconds that are added to the system's clock, for tests: a whole number, which may be negative.
pub const OFFSET_VARIABLE: &str = "POOLFS_CLOCK_OFFSET_S";

/// Seconds since 1970.
pub fn now() -> i64 {
    static OFFSET_S: OnceLock<i64> = OnceLock::new();
    let offset_s = *OFFSET_S.get_or_init(|| std::env::var(OFFSET_VARIABLE).ok().and_then(|text| text.parse().ok()).unwrap_or(0));
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_secs()).unwrap_or(i64::MAX).saturating_add(offset_s)
}
