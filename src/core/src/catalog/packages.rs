//! `Packages` and `Sources`: streaming, only the fields that the catalog needs.
//!
//! A parser of our own, because of bounds and speed: it looks at each line once, copies only the wanted fields into
//! buffers that are used again, and holds one line whatever the file says. deb822-fast, which reads Release files and
//! `.sources` here, was measured on bookworm's main list of 50 MB first (2 cores, release build): 0.42 s and 225 MB as owned
//! paragraphs, 0.18 s through its reader, which has no limit on a line or a paragraph, 0.08 s borrowed from the whole text
//! in memory, which a list is not; this parser takes 0.06 s and 2 MB.
//!
//! A stanza that cannot name a file safely (a `/` in a name, a size that does not fit, no SHA-256) is refused and counted;
//! the others are taken all the same.

use super::names;
use super::release::stays_below;
use crate::Digest;
use std::io::{self, Read};

/// The longest line that is taken; the line and its stanza are refused beyond. Debian's longest has about 100 KB.
const LINE_BYTES_MAX: usize = 1 << 20;

/// The longest stanza that is taken.
const STANZA_BYTES_MAX: u64 = 16 << 20;

/// The longest value of a field that the catalog keeps.
const VALUE_BYTES_MAX: usize = 4096;

/// The largest package that is believed, in bytes.
const PACKAGE_BYTES_MAX: u64 = 1 << 40;

/// Stanzas in one list. Debian's unstable has 70,000; this bounds the database, not the memory.
const STANZAS_MAX: u64 = 1_000_000;

/// Stanzas that are quoted when they are refused; the others are only counted.
const EXAMPLES_MAX: usize = 3;

const BUFFER_BYTES: usize = 256 << 10;

/// Why reading a list ended early.
#[derive(Debug, thiserror::Error)]
pub enum ListError<E> {
    /// The file or its compression is broken.
    #[error("{0}")]
    Read(#[from] io::Error),
    /// Every stanza was refused: it is no list, or one without SHA-256.
    #[error("has no usable package ({why})")]
    NoPackage {
        /// Of the first stanza.
        why: String,
    },
    /// More stanzas than any repository has.
    #[error("has more than {STANZAS_MAX} packages")]
    TooMany,
    /// What the caller did with a stanza failed.
    #[error("{0}")]
    Taker(E),
}

/// One file that a list names, borrowed from the parser's buffers.
#[derive(Debug, PartialEq, Eq, Clone, Copy)]
pub struct Listed<'a> {
    /// Archive name as apt makes it; empty for files of source packages, which apt keeps nowhere.
    pub name: &'a str,
    /// SHA-256 of the file.
    pub digest: Digest,
    /// Its length in bytes.
    pub size: u64,
    /// Its path below the repository.
    pub path: &'a str,
    /// `Package`.
    pub package: &'a str,
    /// `Version`.
    pub version: &'a str,
    /// `Source` as in the stanza: empty, a name, or `name (version)`.
    pub source: &'a str,
}

/// Name and version of the source package that a binary package was built from: `source` is its `Source`, which is empty, a name,
/// or `name (version)`; what it leaves out is the package's own.
pub fn source_of<'a>(package: &'a str, version: &'a str, source: &'a str) -> (&'a str, &'a str) {
    match source.split_once('(') {
        Some((name, rest)) => (name.trim_end(), rest.split(')').next().unwrap_or_default().trim()),
        None if source.is_empty() => (package, version),
        None => (source, version),
    }
}

/// What was found in a list.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Tally {
    /// Stanzas taken.
    pub taken: u64,
    /// Stanzas refused.
    pub refused: u64,
    /// Of the first few refused, why.
    pub examples: Vec<String>,
}

impl Tally {
    fn refuse(&mut self, package: &[u8], why: &str) {
        self.refused += 1;
        if self.examples.len() < EXAMPLES_MAX {
            let shown: String = String::from_utf8_lossy(package).chars().take(64).flat_map(char::escape_debug).collect();
            self.examples.push(format!("{shown}: {why}"));
        }
    }
}

/// Which field of a stanza a buffer holds.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(usize)]
enum Field {
    Package,
    Version,
    Architecture,
    Filename,
    Size,
    Sha256,
    Source,
    Directory,
    Checksums,
}

const FIELDS: usize = Field::Checksums as usize + 1;

const PACKAGES_FIELDS: &[(&[u8], Field)] = &[
    (b"Package", Field::Package),
    (b"Version", Field::Version),
    (b"Architecture", Field::Architecture),
    (b"Filename", Field::Filename),
    (b"Size", Field::Size),
    (b"SHA256", Field::Sha256),
    (b"Source", Field::Source),
];

const SOURCES_FIELDS: &[(&[u8], Field)] = &[
    (b"Package", Field::Package),
    (b"Version", Field::Version),
    (b"Directory", Field::Directory),
    (b"Checksums-Sha256", Field::Checksums),
];

/// Reads a Packages file and hands each package to `take`.
pub fn read_packages<E>(reader: impl Read, mut take: impl FnMut(Listed<'_>) -> Result<(), E>) -> Result<Tally, ListError<E>> {
    let mut name = String::new();
    read_stanzas(reader, PACKAGES_FIELDS, |stanza, tally| match package(stanza, &mut name) {
        Ok(listed) => {
            tally.taken += 1;
            take(listed)
        }
        Err(why) => {
            tally.refuse(stanza.value(Field::Package), why);
            Ok(())
        }
    })
}

/// Reads a Sources file and hands each file of each source package to `take`.
pub fn read_sources<E>(reader: impl Read, mut take: impl FnMut(Listed<'_>) -> Result<(), E>) -> Result<Tally, ListError<E>> {
    let mut path = String::new();
    read_stanzas(reader, SOURCES_FIELDS, |stanza, tally| {
        let checked = source_package(stanza);
        let Ok((package, version, directory)) = checked else {
            tally.refuse(stanza.value(Field::Package), checked.err().unwrap_or_default());
            return Ok(());
        };
        let mut bad = false;
        for line in stanza.value(Field::Checksums).split(|&byte| byte == b'\n').filter(|line| !line.trim_ascii().is_empty()) {
            let Some((digest, size, file)) = source_file(line) else {
                bad = true;
                continue;
            };
            path.clear();
            path.push_str(directory);
            if !directory.is_empty() && !directory.ends_with('/') {
                path.push('/');
            }
            path.push_str(file);
            take(Listed { name: "", digest, size, path: &path, package, version, source: "" })?;
        }
        if bad {
            tally.refuse(stanza.value(Field::Package), "a file in Checksums-Sha256 has a wrong digest, size or name");
        } else {
            tally.taken += 1;
        }
        Ok(())
    })
}

fn package<'a>(stanza: &'a Stanza, name: &'a mut String) -> Result<Listed<'a>, &'static str> {
    stanza.check()?;
    let text = |field: Field, missing: &'static str| -> Result<&'a str, &'static str> {
        let text = std::str::from_utf8(stanza.value(field)).map_err(|_| "not UTF-8")?;
        if text.is_empty() { Err(missing) } else { Ok(text) }
    };
    let package = text(Field::Package, "no Package")?;
    let version = text(Field::Version, "no Version")?;
    let architecture = text(Field::Architecture, "no Architecture")?;
    let path = text(Field::Filename, "no Filename")?;
    let source = std::str::from_utf8(stanza.value(Field::Source)).map_err(|_| "not UTF-8")?;
    if [package, version, architecture].iter().any(|part| part.contains('/')) {
        return Err("a / in its name, version or architecture");
    }
    if [package, version, architecture, source].iter().any(|part| part.bytes().any(|byte| byte < b' ' || byte == 0x7f)) {
        return Err("a control character in its name, version, architecture or source");
    }
    if !stays_below(path) {
        return Err("a Filename that leaves the repository");
    }
    names::archive_name(name, package, version, architecture, path);
    if name.contains('/') {
        return Err("a Filename without an extension");
    }
    if name.len() > names::NAME_BYTES_MAX {
        return Err("a file name longer than 255 bytes");
    }
    let size = size(stanza.value(Field::Size)).ok_or("a Size that does not fit")?;
    let digest = text(Field::Sha256, "no SHA256")?.parse().map_err(|_| "a SHA256 that is none")?;
    Ok(Listed { name, digest, size, path, package, version, source })
}

fn source_package(stanza: &Stanza) -> Result<(&str, &str, &str), &'static str> {
    stanza.check()?;
    let text = |field: Field| std::str::from_utf8(stanza.value(field)).map_err(|_| "not UTF-8");
    let (package, version, directory) = (text(Field::Package)?, text(Field::Version)?, text(Field::Directory)?);
    if package.is_empty() || version.is_empty() {
        return Err("no Package or Version");
    }
    if package.contains('/') || version.contains('/') {
        return Err("a / in its name or version");
    }
    if !directory.is_empty() && !stays_below(directory) {
        return Err("a Directory that leaves the repository");
    }
    if stanza.value(Field::Checksums).trim_ascii().is_empty() {
        return Err("no Checksums-Sha256");
    }
    Ok((package, version, directory))
}

fn source_file(line: &[u8]) -> Option<(Digest, u64, &str)> {
    let mut words = std::str::from_utf8(line).ok()?.split_ascii_whitespace();
    let (digest, size_text, file) = (words.next()?, words.next()?, words.next()?);
    let fits = words.next().is_none() && !file.contains('/') && stays_below(file);
    fits.then_some((digest.parse().ok()?, size(size_text.as_bytes())?, file))
}

fn size(text: &[u8]) -> Option<u64> {
    let size = std::str::from_utf8(text).ok()?.parse().ok()?;
    (1..=PACKAGE_BYTES_MAX).contains(&size).then_some(size)
}

/// The wanted fields of one stanza.
#[derive(Default)]
struct Stanza {
    values: [Vec<u8>; FIELDS],
    seen: [bool; FIELDS],
    bytes: u64,
    wrong: Option<&'static str>,
}

impl Stanza {
    fn value(&self, field: Field) -> &[u8] {
        &self.values[field as usize]
    }

    fn check(&self) -> Result<(), &'static str> {
        self.wrong.map_or(Ok(()), Err)
    }

    fn clear(&mut self) {
        self.values.iter_mut().for_each(Vec::clear);
        self.seen = [false; FIELDS];
        self.bytes = 0;
        self.wrong = None;
    }

    fn grow(&mut self, line: &[u8]) {
        self.bytes += u64::try_from(line.len()).unwrap_or(u64::MAX);
        if self.bytes > STANZA_BYTES_MAX {
            self.wrong = Some("longer than a stanza may be");
        }
    }

    fn append(&mut self, field: Field, bytes: &[u8]) {
        // The file list of a source package is the only value that may have many lines.
        let room = if field == Field::Checksums { LINE_BYTES_MAX } else { VALUE_BYTES_MAX };
        let value = &mut self.values[field as usize];
        if value.len() + bytes.len() > room {
            self.wrong = Some("a field longer than it may be");
        } else {
            value.extend_from_slice(bytes);
        }
    }
}

/// Reads stanza by stanza; `take` may count refusals in the tally.
fn read_stanzas<E>(
    reader: impl Read,
    wanted: &[(&[u8], Field)],
    mut take: impl FnMut(&Stanza, &mut Tally) -> Result<(), E>,
) -> Result<Tally, ListError<E>> {
    let mut lines = Lines::new(reader);
    let mut stanza = Stanza::default();
    let mut tally = Tally::default();
    let mut current: Option<Field> = None;
    loop {
        let line = lines.next()?;
        let blank = match line {
            Line::End => true,
            Line::TooLong => {
                stanza.wrong = Some("a line longer than it may be");
                stanza.bytes += 1;
                current = None;
                continue;
            }
            Line::Partial => {
                // Some repositories leave the last line feed out; after a truncation its stanza cannot be trusted.
                stanza.wrong = Some("the file ends in the middle of a line");
                stanza.bytes += 1;
                continue;
            }
            Line::Whole(text) => text.is_empty(),
        };
        if blank {
            if stanza.bytes > 0 {
                if tally.taken + tally.refused == STANZAS_MAX {
                    return Err(ListError::TooMany);
                }
                take(&stanza, &mut tally).map_err(ListError::Taker)?;
                stanza.clear();
            }
            current = None;
            if matches!(line, Line::End) {
                break;
            }
            continue;
        }
        let Line::Whole(text) = line else { continue };
        stanza.grow(text);
        if matches!(text[0], b' ' | b'\t') {
            if let Some(field) = current {
                stanza.append(field, b"\n");
                stanza.append(field, text.trim_ascii());
            }
            continue;
        }
        let Some(colon) = memchr::memchr(b':', text) else {
            stanza.wrong = Some("a line without a field name");
            current = None;
            continue;
        };
        let field_name = &text[..colon];
        current = wanted.iter().find(|(name, _)| name.len() == colon && name.eq_ignore_ascii_case(field_name)).map(|&(_, field)| field);
        if let Some(field) = current {
            if std::mem::replace(&mut stanza.seen[field as usize], true) {
                stanza.wrong = Some("a field that is there twice");
            }
            stanza.append(field, text[colon + 1..].trim_ascii());
        }
    }
    if tally.taken == 0 && tally.refused > 0 {
        return Err(ListError::NoPackage { why: tally.examples.swap_remove(0) });
    }
    Ok(tally)
}

enum Line<'a> {
    Whole(&'a [u8]),
    /// The file ended without a line feed.
    Partial,
    /// Skipped up to its line feed.
    TooLong,
    End,
}

/// Lines out of one buffer that grows up to [`LINE_BYTES_MAX`].
struct Lines<R> {
    reader: R,
    buffer: Vec<u8>,
    start: usize,
    end: usize,
}

impl<R: Read> Lines<R> {
    fn new(reader: R) -> Self {
        Self { reader, buffer: vec![0; BUFFER_BYTES], start: 0, end: 0 }
    }

    fn next(&mut self) -> io::Result<Line<'_>> {
        let mut searched = self.start;
        let mut skipping = false;
        loop {
            if let Some(at) = memchr::memchr(b'\n', &self.buffer[searched..self.end]) {
                let line = self.start..searched + at;
                self.start = line.end + 1;
                if skipping {
                    return Ok(Line::TooLong);
                }
                let text = &self.buffer[line];
                return Ok(Line::Whole(text.strip_suffix(b"\r").unwrap_or(text)));
            }
            if self.end - self.start >= LINE_BYTES_MAX {
                skipping = true;
            }
            if skipping {
                self.start = self.end;
            }
            if self.start > 0 {
                self.buffer.copy_within(self.start..self.end, 0);
                self.end -= self.start;
                self.start = 0;
            }
            searched = self.end;
            if self.end == self.buffer.len() {
                self.buffer.resize((self.buffer.len() * 2).min(LINE_BYTES_MAX + BUFFER_BYTES), 0);
            }
            let read = loop {
                match self.reader.read(&mut self.buffer[self.end..]) {
                    Err(source) if source.kind() == io::ErrorKind::Interrupted => {}
                    read => break read?,
                }
            };
            if read == 0 {
                let rest = std::mem::take(&mut self.end);
                return Ok(if rest > 0 || skipping { Line::Partial } else { Line::End });
            }
            self.end += read;
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    const DIGEST: &str = "2e6e2f1a0007dc43bc91c273fd36e91e40a4f1c2765a03eca68b70a42103878a";

    fn stanza(changed: &[(&str, &str)]) -> String {
        let mut fields = vec![
            ("Package", "hello"),
            ("Version", "2.10-3"),
            ("Architecture", "amd64"),
            ("Filename", "pool/main/h/hello/hello_2.10-3_amd64.deb"),
            ("Size", "53080"),
            ("SHA256", DIGEST),
        ];
        for &(name, value) in changed {
            match fields.iter_mut().find(|(known, _)| *known == name) {
                Some(field) => field.1 = value,
                None => fields.push((name, value)),
            }
        }
        let line = |(name, value): &(&str, &str)| if *value == "absent" { String::new() } else { format!("{name}: {value}\n") };
        fields.iter().map(line).collect::<String>() + "\n"
    }

    /// Reads through a reader that gives `step` bytes at a time.
    fn read_by(text: &[u8], step: usize) -> Result<(Vec<String>, Tally), String> {
        struct Steps<'a>(&'a [u8], usize);
        impl Read for Steps<'_> {
            fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
                let give = self.1.min(self.0.len()).min(buffer.len());
                buffer[..give].copy_from_slice(&self.0[..give]);
                self.0 = &self.0[give..];
                Ok(give)
            }
        }
        let mut found = Vec::new();
        let take = |listed: Listed<'_>| {
            let Listed { name, size, path, package, version, source, .. } = listed;
            found.push(format!("{name}|{size}|{path}|{package}|{version}|{source}"));
            Ok::<(), std::convert::Infallible>(())
        };
        let tally = read_packages(Steps(text, step), take).map_err(|why| why.to_string())?;
        Ok((found, tally))
    }

    fn read(text: &[u8]) -> Result<(Vec<String>, Tally), String> {
        let whole = read_by(text, usize::MAX);
        assert_eq!(read_by(text, 7), whole, "the cuts of the reader must not matter");
        whole
    }

    const HELLO: &str = "hello_2.10-3_amd64.deb|53080|pool/main/h/hello/hello_2.10-3_amd64.deb|hello|2.10-3|";

    /// The real thing, with folded fields, epochs and a Source with a version.
    #[test]
    fn real_stanzas() {
        let (found, tally) = read(include_bytes!("testdata/Packages")).unwrap();
        assert_eq!(tally, Tally { taken: found.len() as u64, refused: 0, examples: vec![] });
        assert_eq!(
            found,
            [
                "g++_4%3a12.2.0-3_amd64.deb|1356|pool/main/g/gcc-defaults/g++_12.2.0-3_amd64.deb|g++|4:12.2.0-3|gcc-defaults (1.203)",
                "libc6_2.36-9+deb12u14_amd64.deb|2759320|pool/main/g/glibc/libc6_2.36-9+deb12u14_amd64.deb|libc6|2.36-9+deb12u14|glibc",
                HELLO,
                "tzdata_2026b-0+deb12u1_all.deb|304148|pool/main/t/tzdata/tzdata_2026b-0+deb12u1_all.deb|tzdata|2026b-0+deb12u1|",
            ]
        );
    }

    /// Endings and cases that apt takes too; a stanza lost here is a ghost that never comes.
    #[test]
    fn spellings() {
        let plain = stanza(&[]);
        let check = |text: String| assert_eq!(read(text.as_bytes()).unwrap().0, [HELLO], "{text:?}");
        check(plain.clone());
        check(format!("\n\n{plain}\n\n"));
        check(plain.trim_end().to_owned() + "\n");
        check(plain.replace('\n', "\r\n"));
        check(plain.replace("Package: ", "pACKAGE:\t").replace("SHA256: ", "sha256:"));
        check(plain.replace("Version:", "Depends: a,\n b,\n Size: 1\nVersion:"));
        let two = read(format!("{plain}{plain}").as_bytes()).unwrap();
        assert_eq!(two.0, [HELLO, HELLO]);
    }

    /// Each of these would make a wrong or a dangerous name, or a ghost that can never be right.
    #[test]
    fn bad_stanzas_are_refused_and_the_next_is_taken() {
        let check = |bad: &[u8], want: &str| {
            let text = [bad, stanza(&[]).as_bytes()].concat();
            let (found, tally) = read(&text).unwrap();
            assert_eq!(found, [HELLO], "{want}");
            assert_eq!((tally.taken, tally.refused), (1, 1), "{want}");
            assert_eq!(tally.examples[0].split_once(": ").unwrap().1, want);
        };
        let long = "x".repeat(300);
        let name = "a / in its name, version or architecture";
        for (field, value, want) in [
            ("Package", "../../etc/passwd", name),
            ("Package", "absent", "no Package"),
            ("Package", "", "no Package"),
            ("Package", "a\u{7f}b", "a control character in its name, version, architecture or source"),
            ("Package", long.as_str(), "a file name longer than 255 bytes"),
            ("Version", "1/2", name),
            ("Version", "absent", "no Version"),
            ("Architecture", "../x", name),
            ("Architecture", "absent", "no Architecture"),
            ("Filename", "../x.deb", "a Filename that leaves the repository"),
            ("Filename", "pool/../../x.deb", "a Filename that leaves the repository"),
            ("Filename", "/etc/x.deb", "a Filename that leaves the repository"),
            ("Filename", "pool.d/x", "a Filename without an extension"),
            ("Filename", "absent", "no Filename"),
            ("Size", "0", "a Size that does not fit"),
            ("Size", "-1", "a Size that does not fit"),
            ("Size", "1e3", "a Size that does not fit"),
            ("Size", "99999999999999999999", "a Size that does not fit"),
            ("Size", "1099511627777", "a Size that does not fit"),
            ("Size", "absent", "a Size that does not fit"),
            ("SHA256", "absent", "no SHA256"),
            ("SHA256", "cafe", "a SHA256 that is none"),
            ("Extra\nOther", "1", "a line without a field name"),
            ("Source", "a\n b", "a control character in its name, version, architecture or source"),
        ] {
            check(stanza(&[(field, value)]).as_bytes(), want);
        }
        check(stanza(&[]).replace("Size: 53080\n", "Size: 53080\nSize: 1\n").as_bytes(), "a field that is there twice");
        check(&stanza(&[]).into_bytes().iter().map(|&byte| if byte == b'-' { 0xff } else { byte }).collect::<Vec<_>>(), "not UTF-8");
        check(stanza(&[("Source", &"x".repeat(VALUE_BYTES_MAX + 1))]).as_bytes(), "a field longer than it may be");
    }

    /// A line without an end must not take memory without an end, and the next stanza still counts.
    #[test]
    fn long_lines_and_stanzas_are_bounded() {
        let check = |bad: String, want: &str| {
            let (found, tally) = read_by((bad + &stanza(&[])).as_bytes(), usize::MAX).unwrap();
            assert_eq!((found.as_slice(), tally.refused), ([HELLO.to_owned()].as_slice(), 1));
            assert_eq!(tally.examples, [format!("hello: {want}")]);
        };
        check(stanza(&[("Depends", &"x".repeat(LINE_BYTES_MAX + 1))]), "a line longer than it may be");
        check(stanza(&[("Depends", &"x\n ".repeat(usize::try_from(STANZA_BYTES_MAX).unwrap()))]), "longer than a stanza may be");
        let (found, _) = read_by((stanza(&[("Depends", &"x".repeat(LINE_BYTES_MAX - 100))]) + "\n").as_bytes(), 4096).unwrap();
        assert_eq!(found, [HELLO], "a long line within the bound is skipped over");
        let endless = read_by(&vec![b'a'; 3 * LINE_BYTES_MAX], usize::MAX);
        assert_eq!(endless.unwrap_err(), "has no usable package (: the file ends in the middle of a line)");
    }

    /// A list without an end must not fill the disk with rows.
    #[test]
    fn the_number_of_stanzas_is_bounded() {
        let many = "Package: x\n\n".repeat(usize::try_from(STANZAS_MAX).unwrap());
        assert_eq!(read_by(many.as_bytes(), usize::MAX).unwrap_err(), "has no usable package (x: no Version)");
        assert_eq!(read_by((many + "Package: y\n").as_bytes(), usize::MAX).unwrap_err(), "has more than 1000000 packages");
    }

    /// After a cut, only whole stanzas may count: a shortened size or digest must not.
    #[test]
    fn every_truncation_takes_whole_stanzas_only() {
        let text = stanza(&[]) + &stanza(&[("Package", "world")]);
        let world = HELLO.replace("hello_2.10-3_amd64.deb|5", "world_2.10-3_amd64.deb|5").replace("|hello|", "|world|");
        for length in 1..=text.len() {
            match read(&text.as_bytes()[..length]) {
                Ok((found, _)) => assert!(found == [HELLO] || found == [HELLO, world.as_str()], "{length}: {found:?}"),
                Err(why) => assert!(why.starts_with("has no usable package ("), "{length}: {why}"),
            }
        }
    }

    /// What a mirror's error page or a foreign file leaves.
    #[test]
    fn what_is_no_list_is_an_error() {
        let check = |text: &str, want: &str| assert_eq!(read(text.as_bytes()).unwrap_err(), format!("has no usable package ({want})"));
        check("<html>\n<body>404</body>\n", ": a line without a field name");
        check("\u{0}\u{0}\u{0}\n", ": a line without a field name");
        check("x", ": the file ends in the middle of a line");
        check("Origin: Debian\n", ": no Package");
        check(&stanza(&[("SHA256", "absent")]), "hello: no SHA256");
        assert_eq!(read(b"").unwrap().0.len(), 0, "an empty list is one: a suite without packages");
        assert_eq!(read(b"\n\n").unwrap().0.len(), 0);
    }

    /// The files of a source package, by digest, with their path in the pool.
    #[test]
    fn source_packages() {
        let sums = format!(" {DIGEST} 1183 hello_2.10-3.dsc\n {DIGEST} 725946 hello_2.10.orig.tar.gz\n");
        let good = |directory: &str| {
            format!(
                "Package: hello\nBinary: hello\nVersion: 2.10-3\nFiles:\n 27ab798c1d8d9048ffc8127e9b8dbfca 1183 hello_2.10-3.dsc\n\
                 Checksums-Sha256:\n{sums}Directory: {directory}\nPackage-List: \n hello deb devel optional arch=any\n\n"
            )
        };
        let read = |text: &str| {
            let mut found = Vec::new();
            let tally = read_sources(text.as_bytes(), |listed| {
                assert_eq!((listed.name, listed.package, listed.version), ("", "hello", "2.10-3"));
                found.push(format!("{} {}", listed.path, listed.size));
                Ok::<(), std::convert::Infallible>(())
            });
            (found, tally.unwrap())
        };
        let (found, tally) = read(&good("pool/main/h/hello"));
        assert_eq!(found, ["pool/main/h/hello/hello_2.10-3.dsc 1183", "pool/main/h/hello/hello_2.10.orig.tar.gz 725946"]);
        assert_eq!((tally.taken, tally.refused), (1, 0));
        assert_eq!(read(&good("")).0[0], "hello_2.10-3.dsc 1183");
        let check = |bad: String, want: &str| {
            let (found, tally) = read(&(bad + &good("p")));
            assert_eq!((tally.refused, tally.examples), (1, vec![want.to_owned()]));
            assert!(found.iter().all(|file| file.starts_with("p/")), "{found:?}");
        };
        check(good("../x"), "hello: a Directory that leaves the repository");
        check(good("p").replace("Version: 2.10-3", "Version: 2/3"), "hello: a / in its name or version");
        check(good("p").replace(&sums, ""), "hello: no Checksums-Sha256");
        check(
            good("p").replace(" 1183 hello_2.10-3.dsc\n 2", " 1183 ../x\n 2"),
            "hello: a file in Checksums-Sha256 has a wrong digest, size or name",
        );
        check(good("p").replace("Package: hello\n", ""), ": no Package or Version");
    }
}
