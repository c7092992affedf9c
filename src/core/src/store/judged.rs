//! What was decided of the contents that are here: who may have them, by which rule, and what the lists said of each when one
//! last named it, so that a version that has left the lists is still known for what it was.

use super::{Sharing, Store, StoreError};
use crate::digest::Digest;
use crate::discretion::Rule;
use crate::role::Role;
use rusqlite::params;
use std::collections::BTreeMap;

/// Where a list named a content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Origin {
    /// The list's name in `lists/`, without the ending of its form.
    pub list: String,
    /// Package name.
    pub package: String,
    /// Package version.
    pub version: String,
    /// `Source` as in the list.
    pub source: String,
}

/// What was decided of one content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    /// The content.
    pub digest: Digest,
    /// Who may have it.
    pub sharing: Sharing,
    /// The rule that decided.
    pub rule: Rule,
    /// Where a list names it; `None` leaves what was known.
    pub origin: Option<Origin>,
}

/// A file that is kept from strangers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeptBack {
    /// The directory that it is in.
    pub role: Role,
    /// Its path there.
    pub path: Vec<u8>,
    /// Its length in bytes.
    pub size: u64,
    /// The rule that decided.
    pub rule: Rule,
}

/// A file whose sharing changed: where it is, its content, and who may have it now.
pub type Changed = (Role, Vec<u8>, Digest, Sharing);

impl Store {
    /// Takes decisions for all files and objects of these contents, in one transaction: what falls silent does so together.
    /// `keep` says of a path whether its file is left out. Returns the files whose sharing changed.
    pub fn decide(&self, decisions: &[Decision], keep: impl Fn(Role, &[u8]) -> bool) -> Result<Vec<Changed>, StoreError> {
        if decisions.is_empty() {
            return Ok(Vec::new());
        }
        self.write(|db| {
            let mut changed = Vec::new();
            let mut files = db.prepare_cached("SELECT role, path FROM files WHERE digest = ?1 AND sharing <> ?2")?;
            let mut file = db.prepare_cached("UPDATE files SET sharing = ?3 WHERE role = ?1 AND path = ?2")?;
            let mut object = db.prepare_cached("UPDATE objects SET sharing = ?2 WHERE digest = ?1 AND sharing <> ?2")?;
            let mut judged = db.prepare_cached(
                "INSERT INTO judged (digest, rule, list, package, version, source)
                 SELECT ?1, ?2, ?3, ?4, ?5, ?6 WHERE EXISTS (SELECT 1 FROM contents WHERE digest = ?1)
                 ON CONFLICT (digest) DO UPDATE SET rule = ?2, list = coalesce(?3, list), package = coalesce(?4, package),
                     version = coalesce(?5, version), source = coalesce(?6, source)",
            )?;
            for Decision { digest, sharing, rule, origin } in decisions {
                let found = files
                    .query_map(params![digest, sharing], |row| Ok((row.get::<_, String>(0)?, row.get::<_, Vec<u8>>(1)?)))?
                    .collect::<rusqlite::Result<Vec<_>>>()?;
                for (role, path) in found {
                    let Some(role) = Role::from_word(&role) else { continue };
                    if !keep(role, &path) {
                        file.execute(params![role.as_str(), path, sharing])?;
                        changed.push((role, path, *digest, *sharing));
                    }
                }
                object.execute(params![digest, sharing])?;
                let origin = origin.as_ref();
                judged.execute(params![
                    digest,
                    rule,
                    origin.map(|origin| &origin.list),
                    origin.map(|origin| &origin.package),
                    origin.map(|origin| &origin.version),
                    origin.map(|origin| &origin.source)
                ])?;
            }
            Ok(changed)
        })
    }

    /// What was last decided of each content, in the order of digests.
    pub fn decisions(&self) -> Result<BTreeMap<Digest, (Rule, Option<Origin>)>, StoreError> {
        self.read(|db| {
            db.prepare_cached("SELECT digest, rule, list, package, version, source FROM judged")?
                .query_map([], |row| {
                    let origin = match row.get::<_, Option<String>>(2)? {
                        Some(list) => Some(Origin { list, package: row.get(3)?, version: row.get(4)?, source: row.get(5)? }),
                        None => None,
                    };
                    Ok((row.get(0)?, (row.get(1)?, origin)))
                })?
                .collect()
        })
    }

    /// Clean files of one directory, counted by the rule that keeps them from strangers.
    pub fn kept_back(&self, role: Role) -> Result<BTreeMap<Rule, u64>, StoreError> {
        self.read(|db| {
            db.prepare_cached(
                "SELECT judged.rule, count(*) FROM files JOIN judged USING (digest)
                 WHERE role = ?1 AND state = 'clean' AND sharing = 'withheld' GROUP BY judged.rule",
            )?
            .query_map([role.as_str()], |row| Ok((row.get(0)?, row.get::<_, i64>(1)?.cast_unsigned())))?
            .collect()
        })
    }

    /// Clean files of all directories that are kept from strangers, at most `files_max`.
    pub fn withheld(&self, files_max: u32) -> Result<Vec<KeptBack>, StoreError> {
        let rows: Vec<(String, KeptBack)> = self.read(|db| {
            db.prepare_cached(
                "SELECT role, path, size, judged.rule FROM files JOIN judged USING (digest)
                 WHERE state = 'clean' AND sharing = 'withheld' ORDER BY role, path LIMIT ?1",
            )?
            .query_map([files_max], |row| {
                let size = row.get::<_, i64>(2)?.cast_unsigned();
                Ok((row.get(0)?, KeptBack { role: Role::Archives, path: row.get(1)?, size, rule: row.get(3)? }))
            })?
            .collect()
        })?;
        Ok(rows.into_iter().filter_map(|(role, row)| Some(KeptBack { role: Role::from_word(&role)?, ..row })).collect())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;
    use crate::digest::Sums;
    use crate::store::{Provenance, Stamp};

    /// A file that stays announced beside its twin that fell silent, or a version whose origin is forgotten with its list.
    #[test]
    fn decisions_are_taken_for_every_copy() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let sums = Sums::of(b"bytes");
        let record = |role, path: &str| {
            let stamp = Stamp { size: 5, mtime_ns: 0, inode: 1 };
            store.record(role, path.as_bytes(), stamp, &sums, Sharing::Announced, Provenance::Mirror).unwrap();
        };
        record(Role::Archives, "a");
        record(Role::Archives, "b");
        record(Role::Lists, "partial/c");
        let origin = Origin { list: "l".into(), package: "p".into(), version: "1".into(), source: String::new() };
        let decision = |sharing, rule, origin: Option<&Origin>| Decision { digest: sums.digest, sharing, rule, origin: origin.cloned() };
        let decide = |decision| store.decide(&[decision], |_, path| path.starts_with(b"partial/")).unwrap();
        let file = |path: &str| (Role::Archives, path.as_bytes().to_vec(), sums.digest, Sharing::Withheld);
        assert_eq!(decide(decision(Sharing::Withheld, Rule::Superseded, Some(&origin))), [file("a"), file("b")]);
        let sharing = |role, path: &str| store.file(role, path.as_bytes()).unwrap().unwrap().sharing;
        assert_eq!((sharing(Role::Archives, "b"), sharing(Role::Lists, "partial/c")), (Sharing::Withheld, Sharing::Announced));
        assert_eq!(decide(decision(Sharing::Withheld, Rule::Security, None)), []);
        assert_eq!(store.decisions().unwrap(), [(sums.digest, (Rule::Security, Some(origin)))].into());
        assert_eq!(store.kept_back(Role::Archives).unwrap(), [(Rule::Security, 2)].into());
        let withheld = |path: &str| KeptBack { role: Role::Archives, path: path.into(), size: 5, rule: Rule::Security };
        assert_eq!(store.withheld(9).unwrap(), [withheld("a"), withheld("b")]);
        assert_eq!(store.withheld(1).unwrap(), [withheld("a")]);
        let unknown = Decision { digest: Digest([1; 32]), ..decision(Sharing::Available, Rule::Current, None) };
        assert_eq!(decide(unknown), [], "what is not here has no row");
        store.removed(Role::Archives, b"").unwrap();
        store.removed(Role::Lists, b"").unwrap();
        assert!(store.decisions().unwrap().is_empty(), "a decision goes with its content");
    }
}
