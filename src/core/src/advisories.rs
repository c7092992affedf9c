//! Advisory files: which versions of which source packages are known to be vulnerable.
//!
//! Two formats are read, told apart by their first bytes:
//!
//! * The Debian security tracker's JSON (`https://security-tracker.debian.org/tracker/data/json`): source package, then issue, then
//!   release with its status and the version that fixes it. Versions below that are named, in that release alone.
//! * debsecan's (`https://security-tracker.debian.org/tracker/debsecan/release/1/GENERIC`, or one release in the place of
//!   `GENERIC`), compressed by zlib or not: the line `VERSION 1`; issues, one a line, up to an empty line; then
//!   `PACKAGE,ISSUE,FLAGS,FIXED,OTHERS`, where ISSUE counts the issues from 0, the first flag is `S` for a source package or `B` for
//!   a binary one, and a version is vulnerable if it is below FIXED and none of OTHERS.
//!
//! An issue that nothing fixes yet names every version, so it says nothing of who has updated: it counts only where that is asked
//! for. Issues that Debian calls unimportant do not count. What an advisory says can only keep a file back.

use crate::discretion::compare;
use serde::de::{DeserializeSeed, IgnoredAny, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use std::cmp::Ordering;
use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::io::{self, BufRead, BufReader, Read};

/// The longest advisory file that is read, packed or not, in bytes. The tracker's has 70 MB.
pub const ADVISORY_BYTES_MAX: u64 = 256 << 20;

/// Entries kept of one file. The tracker's has 200,000 for all releases together.
const ENTRIES_MAX: usize = 2_000_000;

/// The longest line of debsecan's format.
const LINE_BYTES_MAX: u64 = 64 << 10;

/// Why a file of advisories was not taken.
#[derive(Debug, thiserror::Error)]
pub enum AdvisoryError {
    /// It cannot be read.
    #[error("cannot be read: {0}")]
    Read(#[from] io::Error),
    /// More than [`ADVISORY_BYTES_MAX`].
    #[error("is longer than {ADVISORY_BYTES_MAX} bytes")]
    TooLong,
    /// More entries than are kept.
    #[error("has more than {ENTRIES_MAX} entries")]
    TooMany,
    /// The tracker's JSON is another than expected.
    #[error("is no JSON of the security tracker: {0}")]
    Json(serde_json::Error),
    /// A line of debsecan's format makes no sense.
    #[error("line {line}: {what}")]
    Line {
        /// Counted from 1.
        line: u64,
        /// What is wrong with it.
        what: &'static str,
    },
}

/// One issue in one package.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Entry {
    issue: Box<str>,
    /// The release that it is about; `None`: all.
    release: Option<Box<str>>,
    /// Versions below this are vulnerable; `None`: all, since nothing fixes it yet.
    fixed: Option<Box<str>>,
    /// Versions that are not.
    others: Box<[Box<str>]>,
}

/// What one file says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Advisories {
    by_source: HashMap<Box<str>, Vec<Entry>>,
    by_binary: HashMap<Box<str>, Vec<Entry>>,
    entries: usize,
}

/// A version of a package, as advisories are asked about it.
#[derive(Clone, Copy, Debug)]
pub struct Asked<'a> {
    /// What its release is called: `bookworm`.
    pub releases: &'a BTreeSet<String>,
    /// The source package and its version.
    pub source: (&'a str, &'a str),
    /// The binary package and its version.
    pub binary: (&'a str, &'a str),
    /// Whether issues count that nothing fixes yet.
    pub unfixed: bool,
}

impl Advisories {
    /// Reads a file in either format.
    pub fn read(reader: impl Read) -> Result<Self, AdvisoryError> {
        let mut reader = BufReader::new(reader.take(ADVISORY_BYTES_MAX + 1));
        let first = reader.fill_buf()?.first().copied();
        match first {
            // The first byte of a zlib stream with a window of 32 KiB.
            Some(0x78) => Self::debsecan(BufReader::new(flate2::bufread::ZlibDecoder::new(reader).take(ADVISORY_BYTES_MAX + 1))),
            Some(b'V') => Self::debsecan(reader),
            _ => Self::tracker(reader),
        }
    }

    /// How many issues it names, one for each package and release.
    pub fn len(&self) -> usize {
        self.entries
    }

    /// Whether it names none.
    pub fn is_empty(&self) -> bool {
        self.entries == 0
    }

    /// The first issue that names this version.
    pub fn names(&self, asked: &Asked<'_>) -> Option<&str> {
        let find = |by: &'_ HashMap<Box<str>, Vec<Entry>>, (package, version): (&str, &str)| {
            let entries = by.get(package)?;
            entries.iter().position(|entry| entry.names(version, asked))
        };
        if let Some(at) = find(&self.by_source, asked.source) {
            return Some(&self.by_source[asked.source.0][at].issue);
        }
        find(&self.by_binary, asked.binary).map(|at| &*self.by_binary[asked.binary.0][at].issue)
    }

    fn add(&mut self, is_binary: bool, package: &str, entry: Entry) -> Result<(), AdvisoryError> {
        if self.entries == ENTRIES_MAX {
            return Err(AdvisoryError::TooMany);
        }
        self.entries += 1;
        let by = if is_binary { &mut self.by_binary } else { &mut self.by_source };
        by.entry(package.into()).or_default().push(entry);
        Ok(())
    }

    fn debsecan(mut reader: impl BufRead) -> Result<Self, AdvisoryError> {
        let mut all = Self::default();
        let (mut line, mut bytes, mut text) = (0, 0, String::new());
        let mut next = |text: &mut String, line: &mut u64| -> Result<bool, AdvisoryError> {
            text.clear();
            let read = (&mut reader).take(LINE_BYTES_MAX).read_line(text)? as u64;
            *line += 1;
            bytes += read;
            if bytes > ADVISORY_BYTES_MAX {
                return Err(AdvisoryError::TooLong);
            }
            if read > 0 && text.pop() != Some('\n') {
                return Err(AdvisoryError::Line { line: *line, what: "it is too long, or the file is cut off" });
            }
            Ok(read > 0)
        };
        next(&mut text, &mut line)?;
        if text != "VERSION 1" {
            return Err(AdvisoryError::Line { line, what: "the first line is not `VERSION 1`" });
        }
        let mut issues: Vec<Box<str>> = Vec::new();
        while next(&mut text, &mut line)? && !text.is_empty() {
            let name = text.split(',').next().unwrap_or_default();
            if issues.len() == ENTRIES_MAX {
                return Err(AdvisoryError::TooMany);
            }
            issues.push(name.into());
        }
        while next(&mut text, &mut line)? && !text.is_empty() {
            let bad = |what| AdvisoryError::Line { line, what };
            let mut fields = text.splitn(5, ',');
            let [Some(package), Some(issue), Some(flags), Some(fixed), Some(others)] = std::array::from_fn(|_| fields.next()) else {
                return Err(bad("it has fewer than five fields"));
            };
            let issue =
                issue.parse().ok().and_then(|issue: usize| issues.get(issue)).ok_or(bad("it names an issue that is not in the file"))?;
            let is_binary = match flags.bytes().next() {
                Some(b'B') => true,
                Some(b'S') => false,
                _ => return Err(bad("its flags begin neither with B nor with S")),
            };
            let fixed = Some(fixed).filter(|fixed| !fixed.is_empty()).map(Into::into);
            let others = others.split_ascii_whitespace().map(Into::into).collect();
            all.add(is_binary, package, Entry { issue: issue.clone(), release: None, fixed, others })?;
        }
        Ok(all)
    }

    fn tracker(reader: impl BufRead) -> Result<Self, AdvisoryError> {
        let mut all = Self::default();
        let mut full = false;
        let mut parser = serde_json::Deserializer::from_reader(reader);
        let parsed = Sources { all: &mut all, full: &mut full }.deserialize(&mut parser).and_then(|()| parser.end());
        match parsed {
            _ if full => Err(AdvisoryError::TooMany),
            Err(err) => Err(AdvisoryError::Json(err)),
            Ok(()) => Ok(all),
        }
    }
}

impl Entry {
    /// Versions that cannot be compared count as vulnerable.
    fn names(&self, version: &str, asked: &Asked<'_>) -> bool {
        let here = self.release.as_ref().is_none_or(|release| asked.releases.contains(&**release));
        let same = |other: &str| compare(version, other) == Some(Ordering::Equal);
        let below = match &self.fixed {
            Some(fixed) => matches!(compare(version, fixed), Some(Ordering::Less) | None),
            None => asked.unfixed,
        };
        here && below && !self.others.iter().any(|other| same(other))
    }
}

/// The tracker's JSON, read stanza by stanza: all of it at once would take ten times its length.
struct Sources<'a> {
    all: &'a mut Advisories,
    full: &'a mut bool,
}

#[derive(Deserialize)]
struct Issue {
    #[serde(default)]
    releases: HashMap<String, InRelease>,
}

#[derive(Deserialize)]
struct InRelease {
    #[serde(default)]
    status: String,
    #[serde(default)]
    fixed_version: Option<String>,
    #[serde(default)]
    urgency: String,
}

impl<'de> DeserializeSeed<'de> for Sources<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Sources<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object with a key for each source package")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(source) = map.next_key::<String>()? {
            for (name, issue) in map.next_value::<HashMap<String, Issue>>()? {
                for (release, InRelease { status, fixed_version, urgency }) in issue.releases {
                    let fixed = match status.as_str() {
                        // Version 0 is the tracker's word for never having been vulnerable.
                        "resolved" => match fixed_version {
                            Some(fixed) if fixed != "0" => Some(fixed.into()),
                            _ => continue,
                        },
                        "open" => None,
                        _ => continue,
                    };
                    if urgency == "unimportant" {
                        continue;
                    }
                    let entry = Entry { issue: name.as_str().into(), release: Some(release.into()), fixed, others: Box::default() };
                    if self.all.add(false, &source, entry).is_err() {
                        *self.full = true;
                        // Read to its end, so that the error is the one that counts.
                        while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
                        return Ok(());
                    }
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
