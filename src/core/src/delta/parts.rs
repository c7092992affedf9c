//! What a package is made of: the archive's own bytes, and members that unpack.

use super::{DeltaError, FLAT_BYTES_MAX, unpack};
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt as _;

/// Parts of one file; a package has six.
pub(super) const PARTS_MAX: usize = 16;

const AR_MAGIC: &[u8] = b"!<arch>\n";
const AR_HEADER_BYTES: usize = 60;

/// How a member is compressed, by its first bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Format {
    Xz,
    Gzip,
    Zstd,
}

impl Format {
    fn of(start: &[u8]) -> Option<Self> {
        match start {
            [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => Some(Self::Xz),
            [0x1f, 0x8b, 8, ..] => Some(Self::Gzip),
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Some(Self::Zstd),
            _ => None,
        }
    }
}

/// A stretch of a file: its place, and how it unpacks if it does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Part {
    pub(super) at: u64,
    pub(super) bytes: u64,
    pub(super) format: Option<Format>,
}

/// A stretch of a file as a reader.
#[derive(Debug)]
pub(super) struct Section<'a> {
    file: &'a File,
    at: u64,
    end: u64,
}

impl<'a> Section<'a> {
    pub(super) fn new(file: &'a File, part: Part) -> Self {
        Self { file, at: part.at, end: part.at.saturating_add(part.bytes) }
    }
}

impl Read for Section<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let want = buffer.len().min(usize::try_from(self.end - self.at).unwrap_or(usize::MAX));
        let got = self.file.read_at(&mut buffer[..want], self.at)?;
        self.at += got as u64;
        Ok(got)
    }
}

/// Cuts a file into its parts, in order and without gaps. A file that is no `ar` archive is one part, and so is all behind the
/// first thing that is not as it should be: both sides cut alike, whatever the bytes are.
pub(super) fn split(file: &File) -> io::Result<Vec<Part>> {
    let size = file.metadata()?.len();
    let mut parts = Vec::new();
    // Bytes that belong to no member that unpacks.
    let mut raw = 0;
    if start_of(file, 0, size)?.starts_with(AR_MAGIC) {
        let mut at = AR_MAGIC.len() as u64;
        while parts.len() + 3 <= PARTS_MAX
            && let Some(bytes) = member(file, at, size)?
        {
            at += AR_HEADER_BYTES as u64;
            if let Some(format) = Format::of(&start_of(file, at, at + bytes)?) {
                parts.push(Part { at: raw, bytes: at - raw, format: None });
                parts.push(Part { at, bytes, format: Some(format) });
                raw = at + bytes;
            }
            // Members begin at even places.
            at = (at + bytes).next_multiple_of(2);
        }
    }
    if raw < size || parts.is_empty() {
        parts.push(Part { at: raw, bytes: size - raw, format: None });
    }
    Ok(parts)
}

/// The length of the member whose header is at `at`; `None` where there is none, or none that fits.
fn member(file: &File, at: u64, size: u64) -> io::Result<Option<u64>> {
    let mut header = [0; AR_HEADER_BYTES];
    let begin = at.saturating_add(AR_HEADER_BYTES as u64);
    if begin > size {
        return Ok(None);
    }
    file.read_exact_at(&mut header, at)?;
    let length = str::from_utf8(&header[48..58]).ok().and_then(|text| text.trim_end().parse::<u64>().ok());
    Ok(length.filter(|bytes| header.ends_with(b"`\n") && *bytes <= size - begin))
}

/// The first bytes of a stretch, at most eight.
fn start_of(file: &File, at: u64, end: u64) -> io::Result<Vec<u8>> {
    let mut start = vec![0; usize::try_from(end.saturating_sub(at).min(8)).unwrap_or(8)];
    file.read_exact_at(&mut start, at)?;
    Ok(start)
}

/// A file's parts one after the other, those that unpack unpacked.
#[derive(Debug)]
pub(super) struct Flat {
    pub(super) bytes: Vec<u8>,
    /// Each part with its length in `bytes`. One that did not unpack is here as it is, without a format.
    pub(super) parts: Vec<(Part, u64)>,
}

/// Unpacks a file, up to [`FLAT_BYTES_MAX`].
pub(super) fn flatten(file: &File) -> Result<Flat, DeltaError> {
    let mut flat = Flat { bytes: Vec::new(), parts: Vec::new() };
    for mut part in split(file).map_err(DeltaError::Read)? {
        let before = flat.bytes.len();
        if let Some(format) = part.format {
            match unpack::unpack(format, Section::new(file, part), &mut flat.bytes) {
                Ok(()) => {}
                Err(DeltaError::TooLarge { what }) => return Err(DeltaError::TooLarge { what }),
                Err(_) => {
                    flat.bytes.truncate(before);
                    part.format = None;
                }
            }
        }
        if part.format.is_none() {
            unpack::append(Section::new(file, part), &mut flat.bytes)?;
        }
        flat.parts.push((part, (flat.bytes.len() - before) as u64));
    }
    debug_assert!(flat.bytes.len() as u64 <= FLAT_BYTES_MAX);
    Ok(flat)
}
