//! What the lists say of a file, gathered for [`crate::discretion::judge`].

use super::packages::source_of;
use super::{Advised, Catalog, CatalogError, Configured, Found};
use crate::Digest;
use crate::advisories::Asked;
use crate::db::DbError;
use crate::discretion::{self, Facts, Naming, Release, Rule, Security, Verdict};
use crate::store::{Decision, Origin, Sharing};
use rusqlite::{OptionalExtension as _, params};
use std::cmp::Ordering;
use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

/// What a suite's name has behind the name of its release.
const ENDINGS: [&str; 7] = ["-security", "-updates", "-proposed-updates", "-backports-sloppy", "-backports", "-lts", "/updates"];

/// The Releases at hand, and which of them are the security suites of which.
#[derive(Debug, Default)]
pub struct Standing {
    /// By name in `releases`.
    releases: HashMap<String, Suite>,
    security: Vec<Suite>,
}

#[derive(Clone, Debug)]
struct Suite {
    release: Arc<Release>,
    /// What the release is called: `bookworm`, `oldstable`.
    families: BTreeSet<String>,
}

impl Suite {
    fn new(release: Release, names: &[&str]) -> Self {
        let families = names.iter().filter(|name| !name.is_empty()).map(|name| family(name)).collect();
        Self { release: Arc::new(release), families }
    }
}

fn family(name: &str) -> String {
    let name = name.to_ascii_lowercase();
    ENDINGS.iter().find_map(|ending| name.strip_suffix(ending)).unwrap_or(&name).to_owned()
}

fn is_security(names: &[&str], label: &str) -> bool {
    names.iter().chain([&label]).any(|name| name.to_ascii_lowercase().ends_with("-security"))
}

impl Standing {
    /// Which of the Releases are fresh at the time `now`: while this stays the same, the age of the lists changes no verdict.
    pub fn fresh(&self, now: i64) -> Vec<(String, Option<Rule>)> {
        let all = self.releases.values().chain(&self.security);
        let mut fresh: Vec<_> = all.map(|suite| (suite.release.name.clone(), suite.release.staleness(now).map(|(rule, _)| rule))).collect();
        fresh.sort();
        fresh.dedup();
        fresh
    }
}

/// What was known of a content before it is judged.
#[derive(Clone, Debug, Default)]
pub struct Before {
    /// Where a list last named it.
    pub origin: Option<Origin>,
    /// How it was shared; `None` for what is new.
    pub sharing: Option<Sharing>,
}

/// Judges contents by the lists as they are now.
#[derive(Debug)]
pub struct Judging<'a> {
    catalog: &'a Catalog,
    configured: Arc<Configured>,
    standing: Standing,
    advised: Arc<Advised>,
    now: i64,
}

impl Catalog {
    /// An update that held apt's lock looked up the Release of this name at `at`, seconds since 1970, and kept or replaced it.
    /// Names of no source are passed over.
    pub fn looked_up(&self, name: &str, at: i64) -> Result<(), CatalogError> {
        let configured = self.configured();
        if configured.targets.iter().any(|target| target.inrelease_name == name || target.release_name == name) {
            self.db.writer().prepare_cached("INSERT OR REPLACE INTO looked VALUES (?1, ?2)")?.execute(params![name, at])?;
        }
        Ok(())
    }

    /// The Releases as they are now.
    pub fn standing(&self) -> Result<Standing, CatalogError> {
        let configured = self.configured();
        // By file: the suite as its source names it.
        let mut sources: HashMap<&str, &str> = HashMap::new();
        for target in &configured.targets {
            sources.insert(&target.inrelease_name, &target.suite);
            sources.insert(&target.release_name, &target.suite);
        }
        let mut standing = Standing::default();
        let reader = self.db.reader()?;
        let mut statement = reader.prepare_cached(
            "SELECT r.name, r.date, r.valid_until, r.origin, r.label, r.suite, r.codename, l.at FROM releases r LEFT JOIN looked l USING (name)",
        )?;
        let mut rows = statement.query([])?;
        while let Some(row) = rows.next()? {
            let texts: [String; 5] = [row.get(0)?, row.get(3)?, row.get(4)?, row.get(5)?, row.get(6)?];
            let [name, origin, label, suite, codename] = texts;
            let source = sources.get(name.as_str()).copied().unwrap_or_default();
            let names = [suite.as_str(), &codename, source];
            let shown = [codename.as_str(), &suite, source, &name].into_iter().find(|name| !name.is_empty()).unwrap_or_default();
            let release = Release {
                name: format!("{origin} {shown}").trim_start().to_owned(),
                date: row.get(1)?,
                valid_until: row.get(2)?,
                looked_at: row.get(7)?,
                is_security: is_security(&names, &label),
            };
            let suite = Suite::new(release, &names);
            if suite.release.is_security {
                standing.security.push(suite.clone());
            }
            standing.releases.insert(name, suite);
        }
        // A security suite that was never fetched is one that nobody looked at.
        for target in &configured.targets {
            let known = [&target.inrelease_name, &target.release_name].iter().any(|name| standing.releases.contains_key(*name));
            if !known && is_security(&[&target.suite], "") {
                let release = Release { name: target.suite.clone(), date: 0, valid_until: None, looked_at: None, is_security: true };
                let suite = Suite::new(release, &[&target.suite]);
                if !standing.security.iter().any(|known| known.release == suite.release) {
                    standing.security.push(suite);
                }
            }
        }
        Ok(standing)
    }

    /// Judges by the lists as they are, at the time `now`, seconds since 1970.
    pub fn judging(&self, now: i64) -> Result<Judging<'_>, CatalogError> {
        let advised = Arc::clone(&self.advisories.read());
        Ok(Judging { catalog: self, configured: self.configured(), standing: self.standing()?, advised, now })
    }
}

impl Judging<'_> {
    /// Which of the Releases are fresh; see [`Standing::fresh`].
    pub fn fresh(&self) -> Vec<(String, Option<Rule>)> {
        self.standing.fresh(self.now)
    }

    /// Who may have the content of `size` bytes with this digest. `arriving`: it is one of the files that apt fetches for its lists.
    pub fn verdict(&self, digest: &Digest, size: u64, before: &Before, arriving: bool) -> Result<Verdict, CatalogError> {
        Ok(discretion::judge(&self.facts(digest, size, before, arriving)?.0, self.now))
    }

    /// Whether a security suite names a package with this digest.
    pub fn is_security_update(&self, digest: &Digest) -> Result<bool, CatalogError> {
        let found = self.catalog.rows("substr(p.digest, 1, 8) = substr(?1, 1, 8) AND p.digest = ?1", &digest.0[..])?;
        let is_security = |release: &str| self.standing.releases.get(release).is_some_and(|suite| suite.release.is_security);
        Ok(found.iter().any(|found| is_security(&found.release)))
    }

    /// As [`Self::verdict`], to be kept.
    pub fn decide(&self, digest: &Digest, size: u64, before: &Before) -> Result<Decision, CatalogError> {
        let (facts, origin) = self.facts(digest, size, before, false)?;
        let Verdict { sharing, rule, .. } = discretion::judge(&facts, self.now);
        // Of what is private nothing is remembered that could make it less so.
        let origin = origin.filter(|_| rule != Rule::Private);
        Ok(Decision { digest: *digest, sharing, rule, origin })
    }

    /// What is known of a content, and where a list names it.
    fn facts(&self, digest: &Digest, size: u64, before: &Before, arriving: bool) -> Result<(Facts, Option<Origin>), CatalogError> {
        let mut facts = Facts { size, ..Facts::default() };
        let mut origin = None;
        let found = self.catalog.rows("substr(p.digest, 1, 8) = substr(?1, 1, 8) AND p.digest = ?1", &digest.0[..])?;
        for Found { list, release, source, entry, .. } in found {
            let naming = self.naming(&release, &entry.package, &entry.version, &source, entry.private)?;
            facts.listed.push(naming);
            origin.get_or_insert(Origin { list, package: entry.package, version: entry.version, source });
        }
        for (names, private) in self.catalog.index_namings(digest) {
            let release = names.into_iter().find(|name| self.standing.releases.contains_key(name)).unwrap_or_default();
            facts.listed.push(Naming { newest: Some(String::new()), ..self.naming(&release, "", "", "", private)? });
            let (package, version, source) = (String::new(), String::new(), String::new());
            origin.get_or_insert(Origin { list: release, package, version, source });
        }
        if facts.listed.is_empty() {
            if let Some(remembered) = before.origin.as_ref().filter(|_| before.sharing.is_some_and(|sharing| sharing != Sharing::LocalOnly))
            {
                facts.remembered = Some(self.remembered(remembered)?);
            }
            if arriving {
                facts.arriving = self.catalog.arriving_by_digest(digest).map(|entry| entry.private);
            }
        }
        Ok((facts, origin))
    }

    fn remembered(&self, origin: &Origin) -> Result<Naming, CatalogError> {
        let Origin { list, package, version, source } = origin;
        let release: Option<String> = {
            let reader = self.catalog.db.reader()?;
            let mut statement = reader.prepare_cached("SELECT release FROM lists WHERE name = ?1")?;
            statement.query_row([list], |row| row.get(0)).optional()?
        };
        // An index is remembered by the Release itself.
        let release = release.unwrap_or_else(|| list.clone());
        let private = self.catalog.is_private(&self.configured, list, &release, package, source)?;
        self.naming(&release, package, version, source, private)
    }

    fn naming(&self, release: &str, package: &str, version: &str, source: &str, private: bool) -> Result<Naming, CatalogError> {
        let binary = (package, version);
        let (source, version) = source_of(package, version, source);
        let suite = self.standing.releases.get(release);
        let mut security = Vec::new();
        if let Some(suite) = suite {
            let apart = |other: &&Suite| !other.families.is_disjoint(&suite.families) && other.release != suite.release;
            for other in self.standing.security.iter().filter(apart) {
                let name = self.standing.releases.iter().find(|(_, known)| Arc::ptr_eq(&known.release, &other.release));
                let newest = name.map(|(name, _)| self.newest(name, source)).transpose()?.flatten();
                security.push(Security { release: Arc::clone(&other.release), newest });
            }
        }
        Ok(Naming {
            private,
            source: source.to_owned(),
            version: version.to_owned(),
            newest: self.newest(release, source)?,
            release: suite.map(|suite| Arc::clone(&suite.release)),
            security,
            advisory: self.advisory((source, version), binary, suite),
        })
    }

    /// The advisory that names a version.
    fn advisory(&self, source: (&str, &str), binary: (&str, &str), suite: Option<&Suite>) -> Option<String> {
        if source.0.is_empty() {
            return None; // Of an index.
        }
        if self.advised.is_pending {
            return Some("perhaps an advisory that is still being read".to_owned());
        }
        let none = BTreeSet::new();
        let releases = suite.map_or(&none, |suite| &suite.families);
        let asked = Asked { releases, source, binary, unfixed: self.advised.unfixed };
        self.advised.files.iter().find_map(|file| file.names(&asked)).map(str::to_owned)
    }

    /// The newest version of a source package that the lists of a Release name.
    fn newest(&self, release: &str, source: &str) -> Result<Option<String>, DbError> {
        if source.is_empty() {
            return Ok(None);
        }
        let reader = self.catalog.db.reader()?;
        let explained = |err| self.catalog.db.explain(err);
        let mut statement = reader
            .prepare_cached("SELECT n.version FROM lists l JOIN newest n ON n.list = l.first_id AND n.source = ?2 WHERE l.release = ?1")
            .map_err(explained)?;
        let versions = statement.query_map([release, source], |row| row.get::<_, String>(0)).map_err(explained)?;
        let mut newest: Option<String> = None;
        for version in versions {
            let version = version.map_err(explained)?;
            if newest.as_ref().is_none_or(|newest| discretion::compare(&version, newest) == Some(Ordering::Greater)) {
                newest = Some(version);
            }
        }
        Ok(newest)
    }
}
