//! How a member is compressed again to the very bytes that it had: a closed list of ways, each with its bounds.

use super::parts::{Format, Section};
use super::{DeltaError, MEMORY_BYTES_MAX};
use crate::sys::MachineZstd;
use liblzma::stream::{Action, Check, MtStreamBuilder, PRESET_EXTREME, Status, Stream};
use std::fmt;
use std::io::{self, Read as _};

/// The longest gzip header that is kept: dpkg-deb's has 10 bytes.
const GZIP_HEADER_BYTES_MAX: usize = 64;

/// Blocks of xz that are made again are at most this long: the encoder holds one in memory.
const XZ_BLOCK_BYTES_MAX: u64 = 128 << 20;

/// What a step of the encoders may put out at once.
const OUT_BYTES: usize = 128 * 1024;

/// Memory beside the encoder while it works: the unpacked package, buffers, the program itself.
const BESIDE_BYTES: u64 = 24 << 20;

/// The most worker threads of the xz encoder.
const THREADS_MAX: u32 = 8;

/// How one part is made again from its unpacked bytes.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Recipe {
    /// It is what it is.
    Stored,
    /// xz.
    Xz {
        /// 0 to 9; with 0x10 the extreme variant.
        preset: u8,
        /// xz's number of the check: 0, 1 (CRC32), 4 (CRC64) or 10 (SHA-256).
        check: u8,
        /// Unpacked bytes of a block as the encoder with threads makes them; 0 for one stream without sizes.
        block_bytes: u64,
    },
    /// gzip.
    Gzip {
        /// 1 to 9.
        level: u8,
        /// The header as it was, with name and time.
        header: Vec<u8>,
    },
    /// zstd in one frame, as dpkg-deb makes it.
    Zstd {
        /// Whose bytes these are, as `ZSTD_versionNumber`: 10507 is 1.5.7.
        version: u32,
        /// 1 to 22.
        level: u8,
        /// Whether the frame ends with a checksum.
        checksum: bool,
        /// Whether it was made by worker threads (how many makes no difference).
        workers: bool,
        /// Whether its head tells the length: dpkg-deb had all of it at once.
        sized: bool,
    },
}

impl fmt::Display for Recipe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stored => f.write_str("stored"),
            Self::Xz { preset, block_bytes, .. } => {
                write!(f, "xz -{}", preset & 0xf)?;
                f.write_str(if *preset & EXTREME == 0 { "" } else { "e" })?;
                if *block_bytes > 0 { write!(f, " in blocks of {} KiB", block_bytes >> 10) } else { Ok(()) }
            }
            Self::Gzip { level, .. } => write!(f, "gzip -{level}"),
            Self::Zstd { version, level, workers, .. } => {
                write!(f, "zstd -{level} of {}.{}.{}", version / 10_000, version / 100 % 100, version % 100)?;
                f.write_str(if *workers { " with workers" } else { "" })
            }
        }
    }
}

/// [`Recipe::Xz`]'s `preset`: the extreme variant.
const EXTREME: u8 = 0x10;

impl Recipe {
    /// Appends the bytes that stand for it.
    pub(super) fn encode(&self, to: &mut Vec<u8>) {
        match self {
            Self::Stored => to.push(0),
            Self::Xz { preset, check, block_bytes } => {
                to.extend_from_slice(&[1, *preset, *check]);
                put_number(*block_bytes, to);
            }
            Self::Gzip { level, header } => {
                to.extend_from_slice(&[2, *level, u8::try_from(header.len()).unwrap_or(u8::MAX)]);
                to.extend_from_slice(header);
            }
            Self::Zstd { version, level, checksum, workers, sized } => {
                to.extend_from_slice(&[3, *level, u8::from(*checksum) | u8::from(*workers) << 1 | u8::from(*sized) << 2]);
                put_number((*version).into(), to);
            }
        }
    }

    /// Reads one off the front of `from`. Whatever is not in the list is refused before anything is unpacked.
    pub(super) fn decode(from: &mut &[u8]) -> Result<Self, DeltaError> {
        let recipe = match take(from)? {
            0 => Self::Stored,
            1 => Self::Xz { preset: take(from)?, check: take(from)?, block_bytes: take_number(from)? },
            2 => {
                let (level, length) = (take(from)?, usize::from(take(from)?));
                let (header, rest) = from.split_at_checked(length).ok_or(DeltaError::Form)?;
                *from = rest;
                Self::Gzip { level, header: header.to_vec() }
            }
            3 => {
                let (level, flags) = (take(from)?, take(from)?);
                let version = u32::try_from(take_number(from)?).map_err(|_| DeltaError::Recipe)?;
                if flags > 7 {
                    return Err(DeltaError::Recipe);
                }
                Self::Zstd { version, level, checksum: flags & 1 != 0, workers: flags & 2 != 0, sized: flags & 4 != 0 }
            }
            _ => return Err(DeltaError::Recipe),
        };
        if recipe.is_known() { Ok(recipe) } else { Err(DeltaError::Recipe) }
    }

    fn is_known(&self) -> bool {
        match self {
            Self::Stored => true,
            Self::Xz { preset, check, block_bytes } => {
                *preset & !EXTREME <= 9 && check_of(*check).is_some() && *block_bytes <= XZ_BLOCK_BYTES_MAX
            }
            Self::Gzip { level, header } => (1..=9).contains(level) && (10..=GZIP_HEADER_BYTES_MAX).contains(&header.len()),
            Self::Zstd { level, .. } => (1..=22).contains(level),
        }
    }

    fn format(&self) -> Option<Format> {
        match self {
            Self::Stored => None,
            Self::Xz { .. } => Some(Format::Xz),
            Self::Gzip { .. } => Some(Format::Gzip),
            Self::Zstd { .. } => Some(Format::Zstd),
        }
    }

    /// Makes a part again from its unpacked `bytes`, and hands over what comes out.
    pub(super) fn pack(&self, bytes: &[u8], out: &mut dyn FnMut(&[u8]) -> io::Result<()>) -> Result<(), DeltaError> {
        match self {
            Self::Stored => out(bytes).map_err(DeltaError::Write),
            Self::Xz { preset, check, block_bytes } => pack_xz(*preset, *check, *block_bytes, bytes, out),
            Self::Gzip { level, header } => pack_gzip(*level, header, bytes, out).map_err(DeltaError::Write),
            Self::Zstd { version, level, checksum, workers, sized } => {
                let machine = MachineZstd::find().filter(|machine| machine.version() == *version);
                let level = i32::from(*level);
                match machine {
                    Some(machine) => {
                        machine.compress(bytes, level, [*checksum, *sized], u32::from(*workers), out).map_err(DeltaError::Write)
                    }
                    None if *version == zstd::zstd_safe::version_number() => pack_zstd(level, [*checksum, *sized, *workers], bytes, out),
                    None => Err(DeltaError::Missing { recipe: self.clone() }),
                }
            }
        }
    }
}

fn check_of(number: u8) -> Option<Check> {
    match number {
        0 => Some(Check::None),
        1 => Some(Check::Crc32),
        4 => Some(Check::Crc64),
        10 => Some(Check::Sha256),
        _ => None,
    }
}

fn pack_xz(preset: u8, check: u8, block_bytes: u64, bytes: &[u8], out: &mut dyn FnMut(&[u8]) -> io::Result<()>) -> Result<(), DeltaError> {
    let flags = u32::from(preset & 0xf) | if preset & EXTREME == 0 { 0 } else { PRESET_EXTREME };
    let check = check_of(check).ok_or(DeltaError::Recipe)?;
    let mut stream = match block_bytes {
        0 => Stream::new_easy_encoder(flags, check),
        _ => xz_with_threads(flags, check, block_bytes, bytes.len() as u64).encoder(),
    }
    .map_err(|err| DeltaError::Write(err.into()))?;
    let mut buffer = vec![0; OUT_BYTES];
    loop {
        let (taken, given) = (stream.total_in(), stream.total_out());
        let rest = &bytes[usize::try_from(taken).map_err(|_| DeltaError::Form)?..];
        let status = stream.process(rest, &mut buffer, Action::Finish).map_err(|err| DeltaError::Write(err.into()))?;
        let got = usize::try_from(stream.total_out() - given).map_err(|_| DeltaError::Form)?;
        out(&buffer[..got]).map_err(DeltaError::Write)?;
        if status == Status::StreamEnd {
            return Ok(());
        }
        // liblzma itself ends with an error where it can go on neither way.
    }
}

/// As many threads as there are processors and blocks, as long as the whole stays within [`MEMORY_BYTES_MAX`]. The bytes are
/// the same with any number.
fn xz_with_threads(preset: u32, check: Check, block_bytes: u64, unpacked_bytes: u64) -> MtStreamBuilder {
    let mut builder = MtStreamBuilder::new();
    builder.preset(preset).check(check).block_size(block_bytes);
    let processors = std::thread::available_parallelism().map_or(1, |count| u32::try_from(count.get()).unwrap_or(1));
    let blocks = u32::try_from(unpacked_bytes.div_ceil(block_bytes)).unwrap_or(u32::MAX);
    let mut threads = processors.min(blocks).clamp(1, THREADS_MAX);
    while threads > 1 && builder.threads(threads).memusage() > MEMORY_BYTES_MAX.saturating_sub(unpacked_bytes + BESIDE_BYTES) {
        threads -= 1;
    }
    builder.threads(threads);
    builder
}

fn pack_gzip(level: u8, header: &[u8], bytes: &[u8], out: &mut dyn FnMut(&[u8]) -> io::Result<()>) -> io::Result<()> {
    out(header)?;
    let mut deflate = flate2::Compress::new(flate2::Compression::new(level.into()), false);
    let mut checksum = flate2::Crc::new();
    checksum.update(bytes);
    let mut buffer = vec![0; OUT_BYTES];
    loop {
        let given = deflate.total_out();
        let rest = &bytes[usize::try_from(deflate.total_in()).map_err(io::Error::other)?..];
        let status = deflate.compress(rest, &mut buffer, flate2::FlushCompress::Finish).map_err(io::Error::other)?;
        let got = usize::try_from(deflate.total_out() - given).map_err(io::Error::other)?;
        out(&buffer[..got])?;
        match status {
            flate2::Status::StreamEnd => break,
            flate2::Status::Ok => {}
            flate2::Status::BufError if got == 0 => return Err(io::Error::other("zlib does not go on")),
            flate2::Status::BufError => {}
        }
    }
    out(&checksum.sum().to_le_bytes())?;
    out(&checksum.amount().to_le_bytes())
}

/// As [`MachineZstd::compress`] with the libzstd of this program.
fn pack_zstd(
    level: i32,
    [checksum, sized, workers]: [bool; 3],
    bytes: &[u8],
    out: &mut dyn FnMut(&[u8]) -> io::Result<()>,
) -> Result<(), DeltaError> {
    use zstd::zstd_safe::zstd_sys::ZSTD_EndDirective::{ZSTD_e_continue, ZSTD_e_end};
    use zstd::zstd_safe::{CCtx, CParameter, InBuffer, OutBuffer};
    const STEP_BYTES: usize = 32 * 1024;
    let failed = |code| DeltaError::Write(io::Error::other(zstd::zstd_safe::get_error_name(code)));
    let mut context = CCtx::try_create().ok_or(DeltaError::Write(io::ErrorKind::OutOfMemory.into()))?;
    context.set_parameter(CParameter::CompressionLevel(level)).map_err(failed)?;
    context.set_parameter(CParameter::ChecksumFlag(checksum)).map_err(failed)?;
    context.set_parameter(CParameter::NbWorkers(workers.into())).map_err(failed)?;
    let mut buffer = vec![0; OUT_BYTES];
    let mut run = |step: &[u8], end| -> Result<(), DeltaError> {
        let mut input = InBuffer::around(step);
        loop {
            let mut output = OutBuffer::around(&mut buffer[..]);
            let left = context.compress_stream2(&mut output, &mut input, end).map_err(failed)?;
            out(output.as_slice()).map_err(DeltaError::Write)?;
            if input.pos() >= step.len() && (end == ZSTD_e_continue || left == 0) {
                return Ok(());
            }
        }
    };
    if sized {
        return run(bytes, ZSTD_e_end);
    }
    for step in bytes.chunks(STEP_BYTES) {
        run(step, ZSTD_e_continue)?;
    }
    run(&[], ZSTD_e_end)
}

/// The ways in which a member may have been made, most likely first: what its own headers leave open. `known` are ways that
/// fitted before.
pub(super) fn candidates(format: Format, packed: Section<'_>, unpacked_bytes: u64, known: &[Recipe]) -> io::Result<Vec<Recipe>> {
    let mut head = Vec::new();
    packed.take(512).read_to_end(&mut head)?;
    let possible = match format {
        Format::Xz => xz_candidates(&head, unpacked_bytes),
        Format::Gzip => gzip_candidates(&head),
        Format::Zstd => zstd_candidates(&head),
    };
    // Blocks and headers differ from version to version; what else is known comes first.
    let is_known = |recipe: &Recipe| {
        known.iter().filter(|known| known.format() == Some(format)).any(|known| match (known, recipe) {
            (Recipe::Xz { preset: known, .. }, Recipe::Xz { preset, .. }) => known == preset,
            (Recipe::Gzip { level: known, .. }, Recipe::Gzip { level, .. }) => known == level,
            (known, recipe) => known == recipe,
        })
    };
    let (mut first, rest): (Vec<_>, Vec<_>) = possible.into_iter().filter(Recipe::is_known).partition(is_known);
    first.extend(rest);
    Ok(first)
}

/// From the headers of the stream and of its first block (xz file format 1.2.1, 2.1.1 and 3.1).
fn xz_candidates(head: &[u8], unpacked_bytes: u64) -> Vec<Recipe> {
    /// Bytes of LZMA2's dictionary by preset.
    const DICTIONARY_LOG: [u8; 10] = [18, 20, 21, 22, 22, 23, 23, 24, 25, 26];
    let parse = || {
        let check = *head.get(7)? & 0xf;
        let mut block = head.get(13..)?;
        let flags = take(&mut block).ok()?;
        if flags & 0x40 != 0 {
            xz_number(&mut block)?;
        }
        let unpacked = if flags & 0x80 == 0 { 0 } else { xz_number(&mut block)? };
        // One filter: LZMA2 with one byte of properties, the size of the dictionary.
        let ([0x21, 1, dictionary, ..], 0) = (block, flags & 3) else { return None };
        Some((check, unpacked, *dictionary))
    };
    let Some((check, unpacked, dictionary)) = parse() else { return Vec::new() };
    let mut recipes = Vec::new();
    for extreme in [0, EXTREME] {
        for preset in [6, 9, 8, 7, 5, 4, 3, 2, 1, 0] {
            let log = DICTIONARY_LOG[usize::from(preset)];
            // The byte stands for 2^(12 + byte / 2); odd ones for half as much again, which no preset has.
            if dictionary != (log - 12) * 2 {
                continue;
            }
            let usual = (3_u64 << log).max(1 << 20);
            let block_bytes = if unpacked == 0 {
                0
            } else if unpacked < unpacked_bytes {
                unpacked
            } else {
                unpacked.max(usual)
            };
            recipes.push(Recipe::Xz { preset: preset | extreme, check, block_bytes });
        }
    }
    recipes
}

/// A number of xz's headers: seven bits a byte, the lowest first.
fn xz_number(from: &mut &[u8]) -> Option<u64> {
    take_number(from).ok()
}

fn gzip_candidates(head: &[u8]) -> Vec<Recipe> {
    const EXTRA: u8 = 4;
    const NAME: u8 = 8;
    const COMMENT: u8 = 16;
    const CHECKSUM: u8 = 2;
    let header_bytes = || {
        let flags = *head.get(3)?;
        let mut at = 10;
        if flags & EXTRA != 0 {
            at += 2 + usize::from(u16::from_le_bytes([*head.get(10)?, *head.get(11)?]));
        }
        for text in [NAME, COMMENT] {
            if flags & text != 0 {
                at += head.get(at..)?.iter().position(|byte| *byte == 0)? + 1;
            }
        }
        Some(at + if flags & CHECKSUM == 0 { 0 } else { 2 })
    };
    let Some(header) = header_bytes().and_then(|bytes| head.get(..bytes)) else { return Vec::new() };
    let level = |level| Recipe::Gzip { level, header: header.to_vec() };
    match header[8] {
        2 => vec![level(9)],
        4 => vec![level(1)],
        _ => [9, 6, 5, 7, 8, 4, 3, 2, 1].map(level).to_vec(),
    }
}

fn zstd_candidates(head: &[u8]) -> Vec<Recipe> {
    let Some(descriptor) = head.get(4).copied() else { return Vec::new() };
    // Without a dictionary.
    if descriptor & 0b1011 != 0 {
        return Vec::new();
    }
    let (checksum, sized) = (descriptor & 4 != 0, descriptor & 0b1110_0000 != 0);
    let own = zstd::zstd_safe::version_number();
    let mut versions = vec![MachineZstd::find().map_or(own, |machine| machine.version())];
    if versions[0] != own {
        versions.push(own);
    }
    let mut recipes = Vec::new();
    for level in [19, 3, 22, 1, 2, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 20, 21] {
        for &version in &versions {
            recipes.extend([true, false].map(|workers| Recipe::Zstd { version, level, checksum, workers, sized }));
        }
    }
    recipes
}

/// One byte off the front.
pub(super) fn take(from: &mut &[u8]) -> Result<u8, DeltaError> {
    let (first, rest) = from.split_first().ok_or(DeltaError::Form)?;
    *from = rest;
    Ok(*first)
}

/// A number off the front: seven bits a byte, the lowest first, the top bit set on all but the last. One way to write each.
pub(super) fn take_number(from: &mut &[u8]) -> Result<u64, DeltaError> {
    let mut number = 0_u64;
    for shift in (0..63).step_by(7) {
        let byte = take(from)?;
        number |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return if byte == 0 && shift > 0 { Err(DeltaError::Form) } else { Ok(number) };
        }
    }
    Err(DeltaError::Form)
}

/// The reverse of [`take_number`].
pub(super) fn put_number(mut number: u64, to: &mut Vec<u8>) {
    while number >= 0x80 {
        to.push(number.to_le_bytes()[0] | 0x80);
        number >>= 7;
    }
    to.push(number.to_le_bytes()[0]);
}
