//! The catalog as the mounts see it: with apt's configuration read anew whenever apt's lists change.

use crate::config::SecurityFrom;
use crate::deltas::sharing_of_delta;
use crate::errands::Errands;
use crate::{clock, config};
use parking_lot::Mutex;
use poolfs_core::Digest;
use poolfs_core::catalog::{Before, Catalog, Entry, Vanished};
use poolfs_core::discretion::{Rule, Verdict};
use poolfs_core::store::{Decision, Sharing, Store};
use poolfs_fs::FsError;
use poolfs_fs::names::{self, Names};
use poolfs_fs::source::Audience;
use std::collections::BTreeMap;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

/// The catalog, and what is wrong with what it was read from.
#[derive(Debug)]
pub struct AptNames {
    catalog: Arc<Catalog>,
    apt: Mutex<config::Apt>,
    store: Arc<Store>,
    /// Where apt-config is run, and what finds proxies: that may need the network.
    errands: Errands,
    security_from: SecurityFrom,
    problems: Mutex<Vec<String>>,
}

impl AptNames {
    /// For a catalog that was configured with `apt`; `problems` are those of its configuration.
    pub fn new(
        catalog: Arc<Catalog>,
        store: Arc<Store>,
        apt: config::Apt,
        security_from: SecurityFrom,
        errands: Errands,
        problems: Vec<String>,
    ) -> Self {
        Self { catalog, store, apt: Mutex::new(apt), errands, security_from, problems: Mutex::new(problems) }
    }

    /// Who may have the content with this digest now, and why; `before` is how it is shared.
    pub fn verdict(&self, digest: &Digest, size: u64, before: Option<Sharing>) -> Result<Verdict, FsError> {
        let origin = self.store.decisions()?.remove(digest).and_then(|(_, origin)| origin);
        Ok(self.catalog.judging(clock::now())?.verdict(digest, size, &Before { origin, sharing: before }, false)?)
    }

    /// Takes apt's configuration as it is now: a source may have been added since the last time. With one that cannot be read
    /// the old one stays. Returns what is wrong with it.
    fn load(&self) -> Vec<String> {
        let apt = self.apt.lock().clone();
        match self.errands.run(move || apt.load()) {
            Ok(apt) => {
                let problems = apt.sources().problems.clone();
                self.catalog.configure(apt);
                problems
            }
            Err(err) => vec![err.to_string()],
        }
    }

    /// Looks for apt's configuration there from the next refresh on.
    pub fn set_apt(&self, apt: config::Apt) {
        *self.apt.lock() = apt;
    }

    /// What was wrong at the last refresh, each with its remedy.
    pub fn problems(&self) -> Vec<String> {
        self.problems.lock().clone()
    }
}

impl Names for AptNames {
    fn archive(&self, name: &[u8]) -> Result<Option<Entry>, FsError> {
        Ok(self.catalog.archive(name)?)
    }

    fn by_digest(&self, digest: &Digest) -> Result<Option<Entry>, FsError> {
        Ok(self.catalog.by_digest(digest)?)
    }

    fn judge(&self, digest: &Digest, size: u64, arriving: bool) -> Result<Sharing, FsError> {
        Ok(self.catalog.judging(clock::now())?.verdict(digest, size, &Before::default(), arriving)?.sharing)
    }

    fn audience(&self, digest: &Digest, size: u64, arriving: bool) -> Result<Audience, FsError> {
        let judging = self.catalog.judging(clock::now())?;
        // Who asks for an update has not got it yet: strangers would learn which hole is open here until it is installed.
        if self.security_from == SecurityFrom::Fleet && judging.is_security_update(digest)? {
            return Ok(Audience::Fleet);
        }
        Ok(Audience::of(judging.verdict(digest, size, &Before::default(), arriving)?.sharing))
    }

    fn judge_again(&self, contents: &BTreeMap<Digest, (u64, Sharing)>) -> Result<Vec<Decision>, FsError> {
        let mut known = self.store.decisions()?;
        let origins: BTreeMap<Digest, Option<_>> = known.iter().map(|(digest, (_, origin))| (*digest, origin.clone())).collect();
        let judging = self.catalog.judging(clock::now())?;
        let mut decisions = Vec::new();
        for (digest, (size, sharing)) in contents {
            if let Some((old, new)) = self.store.delta_between(digest)? {
                let of = |content: &Digest| {
                    let (size, sharing) = contents.get(content).map_or((0, None), |(size, sharing)| (*size, Some(*sharing)));
                    let origin = origins.get(content).cloned().flatten();
                    judging.decide(content, size, &Before { origin, sharing })
                };
                let (new, old) = (of(&new)?, of(&old)?);
                // Nobody is to learn that something private was here.
                let sharing = if old.rule == Rule::Private { Sharing::LocalOnly } else { sharing_of_delta(new.sharing) };
                decisions.push(Decision { digest: *digest, sharing, rule: new.rule, origin: None });
                continue;
            }
            let (rule, origin) = known.remove(digest).map_or((None, None), |(rule, origin)| (Some(rule), origin));
            let before = Before { origin, sharing: Some(*sharing) };
            let decision = judging.decide(digest, *size, &before)?;
            let same_origin = decision.origin.is_none() || decision.origin == before.origin;
            // Copies may differ, so only what could not be worse is left out.
            if decision.sharing != Sharing::LocalOnly || *sharing != Sharing::LocalOnly || rule != Some(decision.rule) || !same_origin {
                decisions.push(decision);
            }
        }
        Ok(decisions)
    }

    fn looked_up(&self, name: &[u8]) {
        // apt's names are ASCII.
        let Ok(name) = std::str::from_utf8(name) else { return };
        if let Err(err) = self.catalog.looked_up(name, clock::now()) {
            tracing::warn!(name, "nobody will know that it was looked up: {err}");
        }
    }

    fn packages(&self) -> Result<Vec<String>, FsError> {
        Ok(self.catalog.package_names()?)
    }

    fn refresh(&self, lists: BorrowedFd<'_>, vanished: Vanished) -> Result<(), FsError> {
        let mut problems = self.load();
        let refreshed = self.catalog.refresh(lists, vanished)?;
        problems.extend(refreshed.problems);
        for problem in &problems {
            tracing::warn!("{problem}");
        }
        tracing::info!(parsed = refreshed.parsed, kept = refreshed.kept, dropped = refreshed.dropped, "the catalog is up to date");
        *self.problems.lock() = problems;
        Ok(())
    }

    fn index(&self, name: &[u8]) -> Option<Entry> {
        self.catalog.index(name)
    }

    fn arriving_by_digest(&self, digest: &Digest) -> Option<Entry> {
        self.catalog.arriving_by_digest(digest)
    }

    fn index_missed(&self, lists: BorrowedFd<'_>, name: &[u8]) -> Option<Entry> {
        self.catalog.index_missed(lists, name)
    }

    fn reconfigure(&self, lists: BorrowedFd<'_>) -> Result<(), FsError> {
        // What is wrong with it is told by the refresh at the end of the update.
        for problem in self.load() {
            tracing::debug!("{problem}");
        }
        self.catalog.refresh_indexes(lists);
        Ok(())
    }

    fn arrived(&self, lists: BorrowedFd<'_>, name: &[u8]) -> Vec<Entry> {
        names::arrived(&self.catalog, lists, name)
    }

    fn left(&self, name: &[u8], committed: bool) {
        names::left(&self.catalog, name, committed);
    }

    fn forget_pending(&self) {
        self.catalog.forget_pending();
    }
}
