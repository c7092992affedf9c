//! Everything that the status page and the metrics tell, as one plain value.
//!
//! It is gathered where the files and the mounts are and can be shown anywhere: whoever serves the page needs nothing but this.
//! Nothing secret is in it: no key, no password of a URL.

mod history;

pub use history::{Recorder, Totals};

use crate::control::Status;
use poolfs_core::Role;
use poolfs_core::discretion::Rule;
use poolfs_net::swarm::driver::PeerRow;
use serde::{Deserialize, Serialize};
use std::future::Future;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;

/// Peers shown; the rest is counted.
pub const PEERS_MAX: usize = 100;

/// Withheld files shown; the rest is counted.
pub const WITHHELD_MAX: usize = 100;

/// A mount that has not answered for this long is not well, in milliseconds.
pub const ANSWER_AGE_MAX_MS: u64 = 60_000;

/// The daemon at one moment.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Facts {
    /// The machine's name.
    pub host: String,
    /// When, in Unix seconds.
    pub at: u64,
    /// As `poolfs status` has it.
    pub status: Status,
    /// Whether the mounts answer.
    pub answers: Vec<Answered>,
    /// Whether what is here was judged since the start: before that nothing is shared.
    pub judged: bool,
    /// Bytes of the last hour by minute, the oldest first.
    pub hour: Vec<Totals>,
    /// Bytes of the last day by half hour, the oldest first.
    pub day: Vec<Totals>,
    /// Peers, most bytes first, at most [`PEERS_MAX`].
    pub peers: Vec<PeerRow>,
    /// Peers by how they stand.
    pub standing: Standing,
    /// Files kept from strangers, at most [`WITHHELD_MAX`].
    pub withheld: Vec<Withheld>,
}

/// How the kernel's last question to a mount was answered.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answered {
    /// The mount.
    pub path: PathBuf,
    /// Since its last answer, in milliseconds.
    pub age_ms: u64,
    /// What that answer took, in microseconds.
    pub took_us: u64,
}

/// Peers counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Standing {
    /// A verified file has credited them.
    pub credited: u64,
    /// Nothing is known against them, and nothing for them.
    pub unknown: u64,
    /// Nothing is asked of them for a while.
    pub out: u64,
}

impl Standing {
    /// Counts peers at `now_s`, Unix seconds.
    pub fn of(peers: &[PeerRow], now_s: u64) -> Self {
        let mut standing = Self::default();
        for peer in peers {
            let count = match peer {
                PeerRow { out_until, .. } if *out_until > now_s => &mut standing.out,
                PeerRow { credited: true, .. } => &mut standing.credited,
                _ => &mut standing.unknown,
            };
            *count += 1;
        }
        standing
    }
}

/// A file that strangers are not given.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Withheld {
    /// Where it is.
    pub role: Role,
    /// Its path below the mount.
    pub name: String,
    /// Its length in bytes.
    pub bytes: u64,
    /// The rule that decided.
    pub rule: Rule,
}

impl Facts {
    /// What keeps the daemon from being healthy: a mount that does not answer hangs who looks at it.
    pub fn ailments(&self) -> Vec<String> {
        let late = self.answers.iter().filter(|mount| mount.age_ms > ANSWER_AGE_MAX_MS);
        late.map(|mount| format!("{} has not answered for {} s", mount.path.display(), mount.age_ms / 1000)).collect()
    }

    /// What is missing until apt is served and peers are.
    pub fn unready(&self) -> Vec<String> {
        let mut missing = self.ailments();
        if self.status.mounts.is_empty() {
            missing.push("nothing is mounted".to_owned());
        }
        if !self.judged {
            missing.push("what is here is still being judged by apt's lists".to_owned());
        }
        missing
    }

    /// Takes passwords out of URLs, wherever they stand.
    pub fn without_secrets(mut self) -> Self {
        let texts = self.status.problems.iter_mut().chain(&mut self.status.advisories);
        let names = self.status.downloads.iter_mut().flat_map(|download| download.givers.iter_mut().chain([&mut download.name]));
        texts.chain(names).for_each(|text| *text = without_password(text));
        self
    }
}

/// Where facts come from.
pub trait Witness: Send + Sync + 'static {
    /// The facts of now.
    fn facts(self: Arc<Self>) -> Pin<Box<dyn Future<Output = anyhow::Result<Facts>> + Send>>;
}

/// The text with `user:password@` of each URL in it replaced.
fn without_password(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find("://") {
        let (before, after) = rest.split_at(at + 3);
        out.push_str(before);
        let end = after.find(|c: char| matches!(c, '/' | '?' | '#' | '"' | '\'' | '<' | '>') || c.is_whitespace()).unwrap_or(after.len());
        let (authority, tail) = after.split_at(end);
        match authority.rsplit_once('@') {
            Some((_, host)) => {
                out.push_str("...@");
                out.push_str(host);
            }
            None => out.push_str(authority),
        }
        rest = tail;
    }
    out + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A repository's password on a page that every local user can read.
    #[test]
    fn passwords_are_left_out() {
        let check = |text: &str, want: &str| assert_eq!(without_password(text), want, "{text}");
        check("nothing", "nothing");
        check("get http://deb.debian.org/x: 404", "get http://deb.debian.org/x: 404");
        check("get https://me:pass@repo.example/a and ftp://b:c@d", "get https://...@repo.example/a and ftp://...@d");
        check("\"https://me:p@ss@h\": no", "\"https://...@h\": no");
        check("https://h/@a", "https://h/@a");
        check("://", "://");
    }

    /// Health that does not follow from the mounts is worse than none.
    #[test]
    fn health_is_what_the_mounts_say() {
        let mount = |age_ms| Answered { path: "/x".into(), age_ms, took_us: 50 };
        let mut facts = Facts { answers: vec![mount(3), mount(ANSWER_AGE_MAX_MS)], ..Facts::default() };
        assert_eq!(facts.ailments(), Vec::<String>::new());
        assert_eq!(facts.unready(), ["nothing is mounted", "what is here is still being judged by apt's lists"]);
        facts.answers.push(mount(ANSWER_AGE_MAX_MS + 1));
        assert_eq!(facts.ailments(), ["/x has not answered for 60 s"]);
        facts.judged = true;
        assert_eq!(facts.unready(), ["/x has not answered for 60 s", "nothing is mounted"]);
    }
}
