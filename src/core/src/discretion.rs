//! Who may have a file: decided from what apt's lists say of it, and from how old they are.
//!
//! What a machine shares tells what it runs. So strangers get and hear of a file only while a list names it as the newest version
//! of its source package in that release, and while that list and the security list of its release are fresh. Everything that
//! was superseded falls silent together when its list changes, not only what is vulnerable: silence then tells a watcher
//! only that a list was fetched.
//!
//! [`judge`] is pure: no disk, no clock. [`crate::catalog`] gathers the [`Facts`].
//!
//! The rules, the first that applies:
//!
//! | rule | when | who may have it |
//! |---|---|---|
//! | `private` | a repository that has it needs credentials or is named as private, or the package is | nobody |
//! | `unlisted` | no list names it, and it was never shared | nobody |
//! | `security` | a security suite of its release has a newer version of its source package | the fleet |
//! | `advisory` | an advisory names its version | the fleet |
//! | `superseded` | no list names it as the newest version of its source package, and one did or another is newer | the fleet |
//! | `expired` | the Release that names it, or that of the security suite, is past its Valid-Until | the fleet |
//! | `old-list` | the Release was looked up more than [`LIST_AGE_MAX_S`] ago and has no Valid-Until | the fleet |
//! | `old-security` | the security suite's Release was looked up more than [`SECURITY_AGE_MAX_S`] ago | the fleet |
//! | `arriving` | apt is fetching it for its lists at this moment | everybody |
//! | `current` | none of these | everybody |

use crate::piece::SMALL_FILE_BYTES_MAX;
use crate::store::{Sharing, words};
use serde::{Deserialize, Serialize};
use std::cmp::Ordering;
use std::fmt;
use std::sync::Arc;

/// How long ago the Release of a security suite may have been looked up, in seconds.
pub const SECURITY_AGE_MAX_S: i64 = 3 * 24 * 3600;

/// How long ago a Release without Valid-Until may have been looked up, in seconds.
pub const LIST_AGE_MAX_S: i64 = 7 * 24 * 3600;

/// How far in the future a time may lie and still be believed, in seconds: clocks are set while a machine runs.
const CLOCK_SLACK_S: i64 = 600;

words! {
    /// Why somebody may have a file, or may not; see the module.
    Rule {
        /// It stays on this machine.
        Private = "private",
        /// Nobody else is known to have it.
        Unlisted = "unlisted",
        /// A security suite has a newer one.
        Security = "security",
        /// An advisory names it.
        Advisory = "advisory",
        /// There is a newer one.
        Superseded = "superseded",
        /// Its list is past its Valid-Until.
        Expired = "expired",
        /// Its list has not been looked up for long.
        OldList = "old-list",
        /// The security suite has not been looked up for long.
        OldSecurity = "old-security",
        /// apt is fetching it.
        Arriving = "arriving",
        /// It is the newest, and the lists are fresh.
        Current = "current",
    }
}

/// One Release, as far as it matters here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Release {
    /// For people: `Debian bookworm-security`.
    pub name: String,
    /// `Date`, seconds since 1970; 0 where there is no Release.
    pub date: i64,
    /// `Valid-Until`, seconds since 1970.
    pub valid_until: Option<i64>,
    /// When an update that held apt's lock looked it up and kept or replaced it, seconds since 1970.
    pub looked_at: Option<i64>,
    /// Whether it is a security suite.
    pub is_security: bool,
}

/// What a security suite says of a source package.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Security {
    /// The suite.
    pub release: Arc<Release>,
    /// The newest version of the source package there; `None` if it has none.
    pub newest: Option<String>,
}

/// One list that names a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Naming {
    /// Whether it is to stay on this machine.
    pub private: bool,
    /// The source package; empty for an index, which has none.
    pub source: String,
    /// The version of the source package.
    pub version: String,
    /// The newest version of the source package in the same release; `None` where that is not known.
    pub newest: Option<String>,
    /// The Release of the list; `None` where there is none.
    pub release: Option<Arc<Release>>,
    /// The security suites of the release.
    pub security: Vec<Security>,
    /// The advisory that names the version.
    pub advisory: Option<String>,
}

/// What is known of a file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Facts {
    /// Its length in bytes.
    pub size: u64,
    /// The lists that name it.
    pub listed: Vec<Naming>,
    /// The list that last named it, where none does any more and it was shared then.
    pub remembered: Option<Naming>,
    /// Whether apt is fetching it for its lists, and if so whether it is to stay on this machine.
    pub arriving: Option<bool>,
}

/// Who may have a file, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// Who may have it.
    pub sharing: Sharing,
    /// The rule that decided.
    pub rule: Rule,
    /// What it was decided by, for people.
    pub reason: String,
}

impl Verdict {
    /// Nobody else may have it.
    pub fn keep(rule: Rule, reason: impl Into<String>) -> Self {
        Self { sharing: Sharing::LocalOnly, rule, reason: reason.into() }
    }

    fn withhold((rule, reason): (Rule, String)) -> Self {
        Self { sharing: Sharing::Withheld, rule, reason }
    }

    fn share(size: u64, rule: Rule, reason: impl Into<String>) -> Self {
        let sharing = if size > SMALL_FILE_BYTES_MAX { Sharing::Announced } else { Sharing::Available };
        Self { sharing, rule, reason: reason.into() }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.rule, self.reason)
    }
}

/// Decides who may have a file at the time `now`, seconds since 1970.
pub fn judge(facts: &Facts, now: i64) -> Verdict {
    let all = || facts.listed.iter().chain(&facts.remembered);
    if all().any(|naming| naming.private) || facts.arriving == Some(true) {
        return Verdict::keep(Rule::Private, "its repository or package is private, or needs credentials");
    }
    if all().next().is_none() {
        return match facts.arriving {
            Some(_) => Verdict::share(facts.size, Rule::Arriving, "apt is fetching it for its lists"),
            None => Verdict::keep(Rule::Unlisted, "no list of apt names it"),
        };
    }
    if let Some(reason) = all().find_map(below_security) {
        return Verdict::withhold((Rule::Security, reason));
    }
    if let Some(advisory) = all().find_map(|naming| naming.advisory.as_ref()) {
        return Verdict::withhold((Rule::Advisory, format!("{advisory} names this version")));
    }
    let mut stale = None;
    for naming in facts.listed.iter().filter(|naming| naming.is_newest()) {
        match staleness(naming, now) {
            None => {
                let release = naming.release.as_ref().map_or("", |release| release.name.as_str());
                return Verdict::share(facts.size, Rule::Current, format!("{release} names it as the newest, and its lists are fresh"));
            }
            why => stale = stale.or(why),
        }
    }
    Verdict::withhold(stale.unwrap_or_else(|| {
        let newer = all().find_map(|naming| Some((naming, naming.newest.as_ref().filter(|newest| **newest != naming.version)?)));
        let reason = match newer {
            Some((naming, newest)) => format!("{} {} has been followed by {newest}", naming.source, naming.version),
            None => "no list of apt names it any more".to_owned(),
        };
        (Rule::Superseded, reason)
    }))
}

impl Naming {
    fn is_newest(&self) -> bool {
        self.newest.as_ref().is_some_and(|newest| matches!(compare(&self.version, newest), Some(Ordering::Equal | Ordering::Greater)))
    }
}

/// Why a security suite stands against a version. What cannot be compared counts as below.
fn below_security(naming: &Naming) -> Option<String> {
    naming.security.iter().find_map(|security| {
        let fixed = security.newest.as_ref()?;
        let below = matches!(compare(&naming.version, fixed), Some(Ordering::Less) | None);
        below.then(|| format!("{} {} is below {fixed} of {}", naming.source, naming.version, security.release.name))
    })
}

/// Why what a list names is not to be believed to be the newest.
fn staleness(naming: &Naming, now: i64) -> Option<(Rule, String)> {
    let Some(release) = &naming.release else {
        return Some((Rule::OldList, "its repository has no Release file, so that nobody knows how old its list is".to_owned()));
    };
    let of_others = || naming.security.iter().map(|security| &*security.release);
    release.staleness(now).or_else(|| of_others().find_map(|security| security.staleness(now)))
}

impl Release {
    /// Why it may not be the newest any more at the time `now`; `None` while it is fresh.
    pub fn staleness(&self, now: i64) -> Option<(Rule, String)> {
        if let Some(until) = self.valid_until.filter(|until| *until <= now) {
            return Some((
                Rule::Expired,
                format!("{} is {} past its Valid-Until; run `apt-get update`", self.name, days(now.saturating_sub(until))),
            ));
        }
        let age_max_s = match (self.is_security, self.valid_until) {
            (true, _) => SECURITY_AGE_MAX_S,
            (false, None) => LIST_AGE_MAX_S,
            (false, Some(_)) => return None,
        };
        let rule = if self.is_security { Rule::OldSecurity } else { Rule::OldList };
        match self.age_s(now) {
            Some(age_s) if age_s <= age_max_s => None,
            Some(age_s) => Some((rule, format!("{} was looked up {} ago; run `apt-get update`", self.name, days(age_s)))),
            None => Some((rule, format!("nobody saw {} being looked up; run `apt-get update`", self.name))),
        }
    }

    /// Seconds since it was surely the newest; `None` where that is not known.
    fn age_s(&self, now: i64) -> Option<i64> {
        // It was not looked up before it was made.
        let times = self.looked_at.into_iter().chain(Some(self.date).filter(|date| *date > 0));
        times.filter(|at| *at <= now.saturating_add(CLOCK_SLACK_S)).max().map(|at| now.saturating_sub(at).max(0))
    }
}

fn days(seconds: i64) -> String {
    match (seconds / 86_400, seconds / 3600) {
        (0, hours) => format!("{hours} h"),
        (days, _) => format!("{days} d"),
    }
}

/// Orders two Debian versions (Policy 5.6.12); `None` where one of them is none.
pub fn compare(a: &str, b: &str) -> Option<Ordering> {
    if a == b {
        return Some(Ordering::Equal);
    }
    let parsed = |text: &str| text.parse::<debversion::Version>().ok();
    Some(parsed(a)?.cmp(&parsed(b)?))
}

#[cfg(test)]
mod tests;
