//! `InRelease` and `Release`: what a suite is, how old, and which index files belong to it.
//!
//! Nothing here checks a signature: a file is read only after apt committed it to `lists/`, or, from `lists/partial/`,
//! for what is thrown away unless apt commits it. Of a clear-signed file only the signed part counts.

use crate::Digest;
use deb822_fast::borrowed::BorrowedParser;
use std::io::Read;

/// The longest Release file that is read, in bytes. Debian's longest has 300 KB.
pub const RELEASE_BYTES_MAX: u64 = 16 << 20;

const BEGIN_MESSAGE: &str = "-----BEGIN PGP SIGNED MESSAGE-----";
const BEGIN_SIGNATURE: &str = "-----BEGIN PGP SIGNATURE-----";
const END_SIGNATURE: &str = "-----END PGP SIGNATURE-----";

/// Why a Release file was not taken.
#[derive(Debug, thiserror::Error)]
pub enum ReleaseError {
    /// It cannot be read.
    #[error("cannot be read: {0}")]
    Read(#[from] std::io::Error),
    /// More than [`RELEASE_BYTES_MAX`].
    #[error("is longer than {RELEASE_BYTES_MAX} bytes")]
    TooLong,
    /// Not UTF-8.
    #[error("is not UTF-8")]
    NotUtf8,
    /// The clear-signed frame is broken.
    #[error("is not one clear-signed message")]
    Frame,
    /// No deb822 stanza, or several.
    #[error("is not one deb822 stanza")]
    Stanza,
    /// A field is missing or wrong.
    #[error("has no usable {0} field")]
    Field(&'static str),
}

/// One index file that a Release names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IndexFile {
    /// Path below the Release file's directory: `main/binary-amd64/Packages.xz`.
    pub path: String,
    /// Length in bytes.
    pub size: u64,
    /// SHA-256.
    pub digest: Digest,
}

/// What a Release file says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Release {
    /// `Origin`, empty if absent.
    pub origin: String,
    /// `Label`, empty if absent. Debian's security suites have `Debian-Security`.
    pub label: String,
    /// `Suite`, empty if absent.
    pub suite: String,
    /// `Codename`, empty if absent.
    pub codename: String,
    /// `Date`, seconds since 1970.
    pub date: i64,
    /// `Valid-Until`, seconds since 1970.
    pub valid_until: Option<i64>,
    /// `Acquire-By-Hash: yes`: every index file has a name that never changes its bytes.
    pub by_hash: bool,
    /// `Components`.
    pub components: Vec<String>,
    /// `Architectures`.
    pub architectures: Vec<String>,
    /// `No-Support-for-Architecture-all` names Packages: no list of its own for `all`.
    pub no_separate_all: bool,
    /// The SHA256 section, by path. Paths that leave the directory are not in it.
    pub indexes: Vec<IndexFile>,
    /// Lines of the SHA256 section that made no sense.
    pub refused: u64,
}

impl Release {
    /// Reads a Release or InRelease file.
    pub fn read(reader: impl Read) -> Result<Self, ReleaseError> {
        let mut bytes = Vec::new();
        let length = reader.take(RELEASE_BYTES_MAX + 1).read_to_end(&mut bytes)?;
        if u64::try_from(length).unwrap_or(u64::MAX) > RELEASE_BYTES_MAX {
            return Err(ReleaseError::TooLong);
        }
        Self::parse(&bytes)
    }

    /// Parses a whole Release or InRelease file.
    pub fn parse(bytes: &[u8]) -> Result<Self, ReleaseError> {
        let text = std::str::from_utf8(bytes).map_err(|_| ReleaseError::NotUtf8)?;
        if text.starts_with(BEGIN_MESSAGE) { Self::of_text(&signed_part(text)?) } else { Self::of_text(text) }
    }

    fn of_text(text: &str) -> Result<Self, ReleaseError> {
        let stanzas = BorrowedParser::new(text).parse_all().map_err(|_| ReleaseError::Stanza)?;
        let [stanza] = stanzas.as_slice() else {
            return Err(ReleaseError::Stanza);
        };
        let field = |wanted: &str| stanza.iter().find(|field| field.name().eq_ignore_ascii_case(wanted)).map(|field| field.lines());
        let word = |wanted: &str| field(wanted).and_then(|lines| lines.first()).map(|line| line.trim().to_owned()).unwrap_or_default();
        let words = |wanted: &str| -> Vec<String> {
            field(wanted).unwrap_or_default().iter().flat_map(|line| line.split_ascii_whitespace()).map(str::to_owned).collect()
        };
        let mut release = Self {
            origin: word("Origin"),
            label: word("Label"),
            suite: word("Suite"),
            codename: word("Codename"),
            date: seconds(&word("Date")).ok_or(ReleaseError::Field("Date"))?,
            valid_until: None,
            by_hash: word("Acquire-By-Hash").eq_ignore_ascii_case("yes"),
            components: words("Components"),
            architectures: words("Architectures"),
            no_separate_all: words("No-Support-for-Architecture-all").iter().any(|what| what == "Packages"),
            indexes: Vec::new(),
            refused: 0,
        };
        if field("Valid-Until").is_some() {
            release.valid_until = Some(seconds(&word("Valid-Until")).ok_or(ReleaseError::Field("Valid-Until"))?);
        }
        for line in field("SHA256").ok_or(ReleaseError::Field("SHA256"))? {
            if line.trim().is_empty() {
                continue;
            }
            match index_file(line) {
                Some(index) => release.indexes.push(index),
                None => release.refused += 1,
            }
        }
        release.indexes.sort_by(|a, b| a.path.cmp(&b.path));
        Ok(release)
    }

    /// What it says of the index file at `path` below its directory.
    pub fn index(&self, path: &str) -> Option<&IndexFile> {
        let at = self.indexes.binary_search_by(|index| index.path.as_str().cmp(path)).ok()?;
        self.indexes.get(at)
    }
}

/// `DIGEST SIZE PATH`, refused if it does not fit or the path leaves its directory.
fn index_file(line: &str) -> Option<IndexFile> {
    let mut words = line.split_ascii_whitespace();
    let (digest, size, path) = (words.next()?, words.next()?, words.next()?);
    let fits = words.next().is_none() && stays_below(path);
    let size = size.parse().ok().filter(|&size: &u64| i64::try_from(size).is_ok())?;
    fits.then_some(IndexFile { path: path.to_owned(), size, digest: digest.parse().ok()? })
}

/// Whether a relative path names something below its starting point.
pub(crate) fn stays_below(path: &str) -> bool {
    !path.is_empty()
        && !path.starts_with('/')
        && !path.bytes().any(|byte| byte < b' ' || byte == 0x7f)
        && path.split('/').all(|part| part != "..")
}

/// The text between a clear-signed message's header and its signature, dash escapes undone (RFC 9580, 7).
fn signed_part(text: &str) -> Result<String, ReleaseError> {
    let mut lines = text.lines();
    if lines.next().map(str::trim_end) != Some(BEGIN_MESSAGE) {
        return Err(ReleaseError::Frame);
    }
    // Armour headers ("Hash: SHA256") end with an empty line.
    for line in lines.by_ref() {
        if line.trim_end().is_empty() {
            break;
        }
        if !line.contains(": ") {
            return Err(ReleaseError::Frame);
        }
    }
    let mut signed = String::with_capacity(text.len());
    loop {
        let line = lines.next().ok_or(ReleaseError::Frame)?;
        if line.trim_end() == BEGIN_SIGNATURE {
            break;
        }
        let line = match line.strip_prefix("- ") {
            Some(escaped) => escaped,
            None if line.starts_with('-') => return Err(ReleaseError::Frame),
            None => line,
        };
        signed.push_str(line.trim_end_matches([' ', '\t', '\r']));
        signed.push('\n');
    }
    if !lines.by_ref().any(|line| line.trim_end() == END_SIGNATURE) || lines.any(|line| !line.trim().is_empty()) {
        return Err(ReleaseError::Frame);
    }
    Ok(signed)
}

/// Seconds since 1970 of a date as in Release files: `Sat, 11 Jul 2026 10:16:37 UTC`. Only UTC by one of its names is
/// taken, as by apt.
pub fn seconds(text: &str) -> Option<i64> {
    const MONTHS: [&str; 12] = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    let mut words = text.split_ascii_whitespace();
    let first = words.next()?;
    let day: i64 = if first.ends_with(',') { words.next()? } else { first }.parse().ok()?;
    let month = words.next()?;
    let month = i64::try_from(MONTHS.iter().position(|name| name.eq_ignore_ascii_case(month))?).ok()? + 1;
    let year: i64 = words.next()?.parse().ok()?;
    let mut clock = words.next()?.split(':').map(|part| part.parse::<i64>().ok());
    let (hour, minute, second) = (clock.next()??, clock.next()??, clock.next()??);
    let zone = words.next()?;
    let right = clock.next().is_none()
        && words.next().is_none()
        && matches!(zone, "UTC" | "GMT" | "Z" | "+0000" | "-0000")
        && (1970..=9999).contains(&year)
        && (1..=31).contains(&day)
        && (0..24).contains(&hour)
        && (0..60).contains(&minute)
        && (0..=60).contains(&second);
    // What is out of range is not computed with: it need not fit.
    right.then(|| {
        // Days since 1970 in the Gregorian calendar, counted from 1 March of the year 0 so that leap days come last.
        let shifted = if month > 2 { year } else { year - 1 };
        let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
        let days = 365 * shifted + shifted / 4 - shifted / 100 + shifted / 400 + day_of_year - 719_468;
        ((days * 24 + hour) * 60 + minute) * 60 + second
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    const PLAIN: &str = "Origin: Debian\nLabel: Debian-Security\nSuite: oldstable-security\nCodename: bookworm-security\n\
        Date: Sat, 11 Jul 2026 10:16:37 UTC\nValid-Until: Sat, 18 Jul 2026 10:16:37 UTC\nAcquire-By-Hash: yes\n\
        No-Support-for-Architecture-all: Packages\nArchitectures: all amd64\nComponents: main contrib\n\
        MD5Sum:\n 0ed6d4c8891eb86358b94bb35d9e4da4  1484322 contrib/Contents-all\nSHA256:\n \
        e17028bffa0a5ef952309b9f754f09067775c2631770c6b0df260dcaab4f1938   840868 main/binary-amd64/Packages\n \
        d6c9c82f4e61b4662f9ba16b9ebb379c57b4943f8b7813091d1f637325ddfb79  1484322 contrib/Contents-all\n";

    fn framed(signed: &str) -> String {
        format!("{BEGIN_MESSAGE}\nHash: SHA256\n\n{signed}{BEGIN_SIGNATURE}\n\niQIz=\n=abcd\n{END_SIGNATURE}\n")
    }

    /// A wrong date dates every ghost wrongly; a missed index is never shared.
    #[test]
    fn release_and_inrelease_say_the_same() {
        let plain = Release::parse(PLAIN.as_bytes()).unwrap();
        assert_eq!(plain, Release::parse(framed(PLAIN).as_bytes()).unwrap());
        assert_eq!(plain, Release::parse(framed(PLAIN).replace('\n', "\r\n").as_bytes()).unwrap());
        assert_eq!((plain.date, plain.valid_until), (1_783_764_997, Some(1_784_369_797)));
        assert!(plain.by_hash && plain.no_separate_all);
        assert_eq!((plain.origin.as_str(), plain.label.as_str()), ("Debian", "Debian-Security"));
        assert_eq!((plain.suite.as_str(), plain.codename.as_str()), ("oldstable-security", "bookworm-security"));
        assert_eq!(plain.components, ["main", "contrib"]);
        assert_eq!(plain.indexes.len(), 2, "the MD5Sum section is not counted");
        assert_eq!(plain.index("main/binary-amd64/Packages").unwrap().size, 840_868);
        assert_eq!(plain.index("main/binary-amd64/Packages.xz"), None);
    }

    /// What stands outside the signature must not become part of the Release.
    #[test]
    fn only_the_signed_part_counts() {
        let check = |text: String, want: &str| assert_eq!(Release::parse(text.as_bytes()).unwrap_err().to_string(), want);
        check(framed(PLAIN) + "SHA256:\n", "is not one clear-signed message");
        check(framed(PLAIN).replace(END_SIGNATURE, ""), "is not one clear-signed message");
        check(framed(PLAIN).replace(BEGIN_SIGNATURE, ""), "is not one clear-signed message");
        check(framed(PLAIN).replace("Suite:", "-----Suite:"), "is not one clear-signed message");
        check(format!("Origin: x\n\n{}", framed(PLAIN)), "is not one deb822 stanza");
        check(format!("{BEGIN_MESSAGE}\n"), "is not one clear-signed message");
        let escaped = framed(PLAIN).replace("Suite:", "- Suite:");
        assert_eq!(Release::parse(escaped.as_bytes()).unwrap().suite, "oldstable-security");
    }

    /// Each of these is a file that a broken mirror or disk can leave: one clear reason, no panic.
    #[test]
    fn bad_releases_have_a_reason() {
        let check = |text: &str, want: &str| assert_eq!(Release::parse(text.as_bytes()).unwrap_err().to_string(), want);
        check("", "is not one deb822 stanza");
        check("<html><body>404</body></html>", "is not one deb822 stanza");
        check("Origin: x\n", "has no usable Date field");
        check("Date: yesterday\nSHA256:\n", "has no usable Date field");
        check("Date: Sat, 11 Jul 2026 10:16:37 UTC\n", "has no usable SHA256 field");
        check("Date: Sat, 11 Jul 2026 10:16:37 UTC\nValid-Until: never\nSHA256:\n", "has no usable Valid-Until field");
        assert_eq!(Release::parse(b"Origin: \xff\n").unwrap_err().to_string(), "is not UTF-8");
        assert_eq!(Release::read(std::io::repeat(b'a')).unwrap_err().to_string(), "is longer than 16777216 bytes");
    }

    /// A path out of the directory, or a size past what a file can have, is left out and counted; the rest is taken.
    #[test]
    fn bad_index_lines_are_left_out() {
        let line = |rest: &str| format!(" {} {rest}\n", "a".repeat(64));
        let bad =
            [line("1 ../x"), line("1 /x"), line("1 a/../../x"), line("99999999999999999999 x"), line("-1 x"), line("1"), line("1 a b")];
        let release = Release::parse(format!("{PLAIN}{} cafe 1 x\n", bad.concat()).as_bytes()).unwrap();
        assert_eq!((release.indexes.len(), release.refused), (2, 8));
    }

    /// Leap years and the names of UTC; a local time would shift every date.
    #[test]
    fn dates_are_those_of_rfc_1123() {
        let check = |text: &str, want: Option<i64>| assert_eq!(seconds(text), want, "{text}");
        check("Thu, 01 Jan 1970 00:00:00 UTC", Some(0));
        check("Tue, 29 Feb 2000 12:00:00 +0000", Some(951_825_600));
        check("Mon, 01 Mar 2100 00:00:00 GMT", Some(4_107_542_400));
        check("1 Jan 2026 0:00:00 Z", Some(1_767_225_600));
        check("Thu, 01 Jan 1970 00:00:00 CET", None);
        check("Thu, 01 Jan 1970 00:00:00", None);
        check("Thu, 01 Jan 1970 25:00:00 UTC", None);
        check("Thu, 01 Foo 1970 00:00:00 UTC", None);
        check("Thu, 01 Jan 99999999999999999999 00:00:00 UTC", None);
        check("Thu, 01 Jan 1970 4740679739796173:00:00 UTC", None);
        check("Thu, 9223372036854775807 Jan 9223372036854775807 00:00:00 UTC", None);
    }
}
