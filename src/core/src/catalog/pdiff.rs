//! `Packages.diff/Index`: which patches lead from older versions of a list to the current one.
//!
//! The names and digests in it become names that are offered and bytes that are shared, so it is parsed strictly: one
//! line that makes no sense and the whole file counts for nothing, since apt can always fetch the list itself.

use crate::Digest;
use deb822_fast::borrowed::BorrowedParser;
use std::collections::HashSet;
use std::io::Read;

/// The longest Index that is read, in bytes. Debian's have 65 KB.
pub const PDIFF_BYTES_MAX: u64 = 4 << 20;

/// Patches in one Index. Debian keeps 56.
const PATCHES_MAX: usize = 4096;

/// The longest name of a patch, in bytes: with the list's own name before it, it has to fit a file name.
const ID_BYTES_MAX: usize = 128;

/// Why an Index was not taken.
#[derive(Debug, thiserror::Error)]
pub enum PdiffError {
    /// It cannot be read.
    #[error("cannot be read: {0}")]
    Read(#[from] std::io::Error),
    /// More than [`PDIFF_BYTES_MAX`].
    #[error("is longer than {PDIFF_BYTES_MAX} bytes")]
    TooLong,
    /// Not UTF-8.
    #[error("is not UTF-8")]
    NotUtf8,
    /// No deb822 stanza, or several.
    #[error("is not one deb822 stanza")]
    Stanza,
    /// A field that has to be there is not.
    #[error("has no {0} field")]
    Missing(&'static str),
    /// A line that makes no sense.
    #[error("has a bad line in {field}: {line}")]
    Line {
        /// The field.
        field: &'static str,
        /// The line, cut and escaped.
        line: String,
    },
    /// A name twice in one field.
    #[error("names {id} twice in {field}")]
    Twice {
        /// The field.
        field: &'static str,
        /// The patch.
        id: String,
    },
    /// A field names a patch that the patches' own field does not.
    #[error("names the unknown patch {id} in {field}")]
    Unknown {
        /// The field.
        field: &'static str,
        /// The patch.
        id: String,
    },
    /// More patches than any repository keeps.
    #[error("has more than {PATCHES_MAX} patches")]
    TooMany,
}

/// A file by its digest and length.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sized {
    /// SHA-256.
    pub digest: Digest,
    /// Length in bytes.
    pub size: u64,
}

/// One patch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Patch {
    /// Its name: `T-2026-10-30-0800.52-F-2026-10-16-0204.10`.
    pub id: String,
    /// The unpacked list that it is for (`SHA256-History`), if the Index says so.
    pub from: Option<Sized>,
    /// The unpacked patch (`SHA256-Patches`).
    pub plain: Sized,
    /// The file that apt asks for, `ID.gz` (`SHA256-Download`), if the Index says so.
    pub download: Option<Sized>,
}

/// What an Index says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PdiffIndex {
    /// The unpacked list after the last patch (`SHA256-Current`).
    pub current: Sized,
    /// Whether the server merged the patches (`X-Patch-Precedence: merged`): then one is enough.
    pub merged: bool,
    /// In the Index's order, which is the order of age.
    pub patches: Vec<Patch>,
}

impl PdiffIndex {
    /// Reads an Index.
    pub fn read(reader: impl Read) -> Result<Self, PdiffError> {
        let mut bytes = Vec::new();
        let length = reader.take(PDIFF_BYTES_MAX + 1).read_to_end(&mut bytes)?;
        if u64::try_from(length).unwrap_or(u64::MAX) > PDIFF_BYTES_MAX {
            return Err(PdiffError::TooLong);
        }
        Self::parse(&bytes)
    }

    /// Parses a whole Index.
    pub fn parse(bytes: &[u8]) -> Result<Self, PdiffError> {
        let text = std::str::from_utf8(bytes).map_err(|_| PdiffError::NotUtf8)?;
        let stanzas = BorrowedParser::new(text).parse_all().map_err(|_| PdiffError::Stanza)?;
        let [stanza] = stanzas.as_slice() else { return Err(PdiffError::Stanza) };
        let lines = |wanted: &str| stanza.iter().find(|field| field.name().eq_ignore_ascii_case(wanted)).map(|field| field.lines());
        let table = |field: &'static str| -> Result<Option<Vec<(Sized, String)>>, PdiffError> {
            lines(field).map(|lines| rows(field, lines)).transpose()
        };
        const CURRENT: &str = "SHA256-Current";
        let current = lines(CURRENT).ok_or(PdiffError::Missing(CURRENT))?;
        let current = match current {
            [line] => sized(line).filter(|(_, rest)| rest.is_empty()).map(|(file, _)| file),
            _ => None,
        };
        let current = current.ok_or_else(|| bad(CURRENT, lines(CURRENT).unwrap_or_default().first().copied().unwrap_or_default()))?;
        let history = table("SHA256-History")?.ok_or(PdiffError::Missing("SHA256-History"))?;
        let patches = table("SHA256-Patches")?.ok_or(PdiffError::Missing("SHA256-Patches"))?;
        let downloads = table("SHA256-Download")?.unwrap_or_default();
        let mut all: Vec<Patch> = Vec::with_capacity(patches.len());
        for (plain, id) in patches {
            all.push(Patch { id, from: None, plain, download: None });
        }
        let at: std::collections::HashMap<String, usize> = all.iter().enumerate().map(|(at, patch)| (patch.id.clone(), at)).collect();
        for (from, id) in history {
            let at = at.get(&id).ok_or(PdiffError::Unknown { field: "SHA256-History", id })?;
            all[*at].from = Some(from);
        }
        for (download, name) in downloads {
            let id = name.strip_suffix(".gz").unwrap_or_default();
            let at = at.get(id).ok_or(PdiffError::Unknown { field: "SHA256-Download", id: name.clone() })?;
            all[*at].download = Some(download);
        }
        let merged = lines("X-Patch-Precedence").is_some_and(|lines| lines.first().is_some_and(|word| word.trim() == "merged"));
        Ok(Self { current, merged, patches: all })
    }

    /// The patches that apt needs for a list whose unpacked bytes have the digest `from`; empty if none lead from there.
    pub fn path_from(&self, from: &Digest) -> &[Patch] {
        let Some(at) = self.patches.iter().position(|patch| patch.from.as_ref().is_some_and(|known| known.digest == *from)) else {
            return &[];
        };
        if self.merged { &self.patches[at..=at] } else { &self.patches[at..] }
    }
}

/// `DIGEST SIZE NAME` on each line that is not empty.
fn rows(field: &'static str, lines: &[&str]) -> Result<Vec<(Sized, String)>, PdiffError> {
    let mut rows = Vec::new();
    let mut seen = HashSet::new();
    for line in lines.iter().filter(|line| !line.trim().is_empty()) {
        let (file, id) = sized(line).filter(|(_, id)| is_id(id)).ok_or_else(|| bad(field, line))?;
        if !seen.insert(id) {
            return Err(PdiffError::Twice { field, id: id.to_owned() });
        }
        if rows.len() == PATCHES_MAX {
            return Err(PdiffError::TooMany);
        }
        rows.push((file, id.to_owned()));
    }
    Ok(rows)
}

/// Digest and size, and the word after them, empty if there is none.
fn sized(line: &str) -> Option<(Sized, &str)> {
    let mut words = line.split_ascii_whitespace();
    let digest = words.next()?.parse().ok()?;
    let size = words.next()?.parse().ok().filter(|&size: &u64| i64::try_from(size).is_ok())?;
    let rest = words.next().unwrap_or_default();
    words.next().is_none().then_some((Sized { digest, size }, rest))
}

/// Whether a word can be part of a file name.
fn is_id(id: &str) -> bool {
    !id.is_empty() && id.len() <= ID_BYTES_MAX && !id.starts_with('.') && id.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'/')
}

fn bad(field: &'static str, line: &str) -> PdiffError {
    PdiffError::Line { field, line: line.chars().take(100).flat_map(char::escape_debug).collect() }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    fn hex(byte: u8) -> String {
        Digest([byte; 32]).to_string()
    }

    /// Three generations; dak's fields that do not count are in it.
    fn index() -> String {
        format!(
            "SHA1-Current: x 1\nSHA256-Current: {cur} 900\nSHA256-History:\n {a} 700 T-1\n {b} 800 T-2\n\
             SHA256-Patches:\n {c} 70 T-1\n {d} 80 T-2\nSHA256-Download:\n {e} 7 T-1.gz\n {f} 8 T-2.gz\nX-DAK-Older-Patches: T-1\n",
            cur = hex(9),
            a = hex(1),
            b = hex(2),
            c = hex(3),
            d = hex(4),
            e = hex(5),
            f = hex(6)
        )
    }

    /// A digest under the wrong patch, and apt finds every patch wrong.
    #[test]
    fn each_patch_has_its_three_files() {
        let parsed = PdiffIndex::parse(index().as_bytes()).unwrap();
        assert_eq!(parsed.current, Sized { digest: Digest([9; 32]), size: 900 });
        assert!(!parsed.merged);
        let want = |id: &str, from, plain, download| {
            let sized = |(byte, size): (u8, u64)| Sized { digest: Digest([byte; 32]), size };
            Patch { id: id.to_owned(), from: Some(sized(from)), plain: sized(plain), download: Some(sized(download)) }
        };
        assert_eq!(parsed.patches, [want("T-1", (1, 700), (3, 70), (5, 7)), want("T-2", (2, 800), (4, 80), (6, 8))]);
    }

    /// Unmerged, every patch from there on is asked for; merged, one.
    #[test]
    fn the_way_from_a_version() {
        let ids = |index: &PdiffIndex, from: u8| -> Vec<String> {
            index.path_from(&Digest([from; 32])).iter().map(|patch| patch.id.clone()).collect()
        };
        let plain = PdiffIndex::parse(index().as_bytes()).unwrap();
        assert_eq!(ids(&plain, 1), ["T-1", "T-2"]);
        assert_eq!(ids(&plain, 2), ["T-2"]);
        assert_eq!(ids(&plain, 9), Vec::<String>::new(), "nothing leads from the current one");
        let merged = PdiffIndex::parse((index() + "X-Patch-Precedence: merged\n").as_bytes()).unwrap();
        assert!(merged.merged);
        assert_eq!(ids(&merged, 1), ["T-1"]);
    }

    /// What a broken or lying server can send: one reason each, and nothing of it is taken.
    #[test]
    fn bad_indexes_have_a_reason() {
        let check = |text: &str, want: &str| assert_eq!(PdiffIndex::parse(text.as_bytes()).unwrap_err().to_string(), want);
        let good = index();
        check("", "is not one deb822 stanza");
        check("<html>\n", "is not one deb822 stanza");
        check(&good.replace("SHA256-Current", "Current"), "has no SHA256-Current field");
        check(&good.replace("SHA256-History", "History"), "has no SHA256-History field");
        check(&good.replace("SHA256-Patches", "Patches"), "has no SHA256-Patches field");
        check(&good.replace(&format!("{} 900", hex(9)), "900"), "has a bad line in SHA256-Current: 900");
        check(&good.replace("70 T-1", "-7 T-1"), &format!("has a bad line in SHA256-Patches: {} -7 T-1", hex(3)));
        check(&good.replace(" 8 T-2.gz", " 8 ../T-2.gz"), &format!("has a bad line in SHA256-Download: {} 8 ../T-2.gz", hex(6)));
        check(&good.replace("80 T-2", "80 T-1"), "names T-1 twice in SHA256-Patches");
        check(&good.replace("8 T-2.gz", "8 T-3.gz"), "names the unknown patch T-3.gz in SHA256-Download");
        check(&good.replace("8 T-2.gz", "8 T-2.xz"), "names the unknown patch T-2.xz in SHA256-Download");
        check(&good.replace("800 T-2", "800 T-9"), "names the unknown patch T-9 in SHA256-History");
        assert_eq!(PdiffIndex::parse(b"a: \xff\n").unwrap_err().to_string(), "is not UTF-8");
        assert_eq!(PdiffIndex::read(std::io::repeat(b'a')).unwrap_err().to_string(), "is longer than 4194304 bytes");
    }

    /// An Index without the packed files' digests is one of an old repository: apt fetches its patches, nobody else does.
    #[test]
    fn downloads_may_be_missing() {
        let text = index();
        let (head, _) = text.split_once("SHA256-Download").unwrap();
        let parsed = PdiffIndex::parse(head.as_bytes()).unwrap();
        assert!(parsed.patches.len() == 2 && parsed.patches.iter().all(|patch| patch.download.is_none()));
    }
}
