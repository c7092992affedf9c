//! How much is given to addresses outside of the machine's own networks at this moment: by the configured rate, unless it is a
//! quiet hour or the connection is paid by the byte.

use crate::clock;
use crate::config::{Metered, Net};
use parking_lot::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::process::Command;

/// How often the clock and the connection are looked at.
pub const LOOK_INTERVAL: Duration = Duration::from_secs(60);

/// How long NetworkManager may take to answer.
const ASK_PATIENCE: Duration = Duration::from_secs(5);

/// What is given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Manner {
    /// Bytes a second; 0: nothing.
    pub upload_bytes_s: u64,
    /// Why nothing is given though a rate is configured.
    pub paused: Option<&'static str>,
}

/// The configuration and the connection as last seen.
#[derive(Debug)]
pub struct Manners {
    net: Mutex<Net>,
    metered: AtomicBool,
}

impl Manners {
    /// As configured; the connection is not looked at yet.
    pub fn new(net: Net) -> Self {
        Self { net: Mutex::new(net), metered: AtomicBool::new(false) }
    }

    /// Another configuration from now on.
    pub fn set(&self, net: Net) {
        *self.net.lock() = net;
    }

    /// Asks whether the connection is metered, where that is to be asked.
    pub async fn look(&self) {
        if self.net.lock().metered != Metered::Auto {
            return;
        }
        let metered = network_manager_says_metered().await.unwrap_or(false);
        if self.metered.swap(metered, Ordering::Relaxed) != metered {
            tracing::info!("the connection is {}metered", if metered { "" } else { "not " });
        }
    }

    /// What holds now.
    pub fn now(&self) -> Manner {
        let local = jiff::tz::TimeZone::system().to_datetime(jiff::Timestamp::from_second(clock::now()).unwrap_or_default());
        let day = usize::from(local.weekday().to_monday_zero_offset().unsigned_abs());
        let minute = u16::from(local.hour().unsigned_abs()) * 60 + u16::from(local.minute().unsigned_abs());
        manner(&self.net.lock(), self.metered.load(Ordering::Relaxed), day, minute)
    }
}

fn manner(net: &Net, said_metered: bool, day: usize, minute: u16) -> Manner {
    let metered = match net.metered {
        Metered::Auto => said_metered,
        Metered::Yes => true,
        Metered::No => false,
    };
    let paused = if metered {
        Some("the connection is metered")
    } else if net.quiet_hours.iter().any(|hours| hours.holds(day, minute)) {
        Some("quiet hours")
    } else {
        None
    };
    let upload_bytes_s = if paused.is_some() { 0 } else { net.upload_bytes_s };
    Manner { upload_bytes_s, paused: paused.filter(|_| net.upload_bytes_s > 0) }
}

/// `None` where there is no NetworkManager to say so.
async fn network_manager_says_metered() -> Option<bool> {
    let mut ask = Command::new("busctl");
    let object = ["org.freedesktop.NetworkManager", "/org/freedesktop/NetworkManager", "org.freedesktop.NetworkManager", "Metered"];
    ask.args(["--system", "--auto-start=false", "get-property"]).args(object).kill_on_drop(true);
    let answer = tokio::time::timeout(ASK_PATIENCE, ask.output()).await.ok()?.ok()?;
    // NMMetered: 0 unknown, 1 yes, 2 no, 3 guessed yes, 4 guessed no.
    let word =
        answer.status.success().then(|| String::from_utf8_lossy(&answer.stdout).trim().strip_prefix("u ")?.parse::<u8>().ok()).flatten()?;
    Some(matches!(word, 1 | 3))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    /// An uplink that is given away although its owner said no, or a pause that nobody configured.
    #[test]
    fn when_nothing_is_given() {
        let net = |hours: &[&str], upload_bytes_s| Net {
            quiet_hours: hours.iter().map(|text| text.parse().unwrap()).collect(),
            upload_bytes_s,
            ..Net::default()
        };
        let check = |net: &Net, metered, minute, bytes, paused: Option<&'static str>| {
            assert_eq!(manner(net, metered, 0, minute), Manner { upload_bytes_s: bytes, paused });
        };
        let quiet = net(&["22:00-06:00", "12:00-13:00"], 7);
        check(&quiet, false, 12 * 60, 0, Some("quiet hours"));
        check(&quiet, false, 13 * 60, 7, None);
        check(&quiet, false, 0, 0, Some("quiet hours"));
        check(&quiet, true, 13 * 60, 0, Some("the connection is metered"));
        check(&Net { metered: Metered::No, ..quiet.clone() }, true, 13 * 60, 7, None);
        check(&Net { metered: Metered::Yes, ..quiet.clone() }, false, 13 * 60, 0, Some("the connection is metered"));
        check(&net(&[], 7), false, 0, 7, None);
        check(&net(&["00:00-24:00"], 0), true, 0, 0, None);
    }
}
