//! `Packages` and `Sources`: streaming, only the fields that the catalog needs.
//!
//! A parser of our own, because of speed and bounds: it looks at each line once, copies only the wanted fields into
//! buffers that are used again, and holds one stanza whatever the file says. A stanza that cannot name a file safely (a
//! `/` in a name, a size that does not fit, no SHA-256) is refused and counted; the others are taken all the same.

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

/// Stanzas that are quoted when they are refused; the others are only counted.
const EXAMPLES_MAX: usize = 3;

const BUFFER_BYTES: usize = 256 << 10;

/// Why reading a list ended early.
#[derive(Debug, thiserror::Error)]
pub enum ListError<E> {
    /// The file or its compression is broken.
    #[error("{0}")]
    Read(#[from] io::Error),
    /// Nothing in it looks like a stanza.
    #[error("has no package stanza")]
    NoStanza,
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
    let mut anything = false;
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
        anything = true;
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
    if anything && tally.taken == 0 {
        return Err(ListError::NoStanza);
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
