//! The patch between two unpacked packages: what is nearly alike as differences, packed by zstd with the older one as its prefix.

use super::similar::{self, COMMANDS_BYTES_MAX};
use super::{DeltaError, FLAT_BYTES_MAX};
use std::io;
use zstd::zstd_safe::{CCtx, CParameter, DCtx, SafeResult, get_error_name};

/// The largest window: both files are within reach of each other.
const WINDOW_LOG_MAX: u32 = 27;

/// Past this many unpacked bytes of either file a faster level is taken, so that a patch takes minutes at most.
const THOROUGH_BYTES_MAX: usize = 96 << 20;

/// The patch that makes `new` from `old`; `None` if it would have more than `bytes_max`. Its bytes depend on the two and on
/// nothing else: neither on threads nor on where the buffers lie. `new` is worked in, and comes back as it was.
pub(super) fn make(old: &[u8], new: &mut Vec<u8>, bytes_max: usize) -> Result<Option<Vec<u8>>, DeltaError> {
    let new_bytes = new.len();
    let commands = similar::subtract(old, new);
    new.extend_from_slice(&commands);
    let packed = pack(old, new, bytes_max);
    new.truncate(new_bytes);
    similar::add(old, new, &commands).ok_or(DeltaError::Patch)?;
    packed
}

fn pack(old: &[u8], new: &[u8], bytes_max: usize) -> Result<Option<Vec<u8>>, DeltaError> {
    let larger = old.len().max(new.len());
    let window_log = usize::BITS - larger.saturating_sub(1).leading_zeros();
    let level = if larger <= THOROUGH_BYTES_MAX { 19 } else { 9 };
    let mut context = CCtx::try_create().ok_or(DeltaError::Write(io::ErrorKind::OutOfMemory.into()))?;
    let parameters = [
        CParameter::CompressionLevel(level),
        CParameter::WindowLog(window_log.clamp(10, WINDOW_LOG_MAX)),
        CParameter::EnableLongDistanceMatching(true),
        CParameter::DeterministicRefPrefix(true),
        CParameter::ContentSizeFlag(true),
        CParameter::ChecksumFlag(true),
    ];
    for parameter in parameters {
        check(context.set_parameter(parameter))?;
    }
    check(context.ref_prefix(old))?;
    let mut patch = Vec::with_capacity(zstd::zstd_safe::compress_bound(new.len()).min(bytes_max));
    match context.compress2(&mut patch, new) {
        Ok(_) => {
            patch.shrink_to_fit();
            Ok(Some(patch))
        }
        Err(code) if error(code) == ZSTD_error_dstSize_tooSmall => Ok(None),
        Err(code) => Err(DeltaError::Write(io::Error::other(get_error_name(code)))),
    }
}

/// The `new_bytes` that a patch makes of `old`: at most `bytes_max`.
///
/// A patch tells in its head how long its content is and how large a window it wants; both are looked at before anything is
/// reserved, and the content is written into what was reserved and nowhere else.
pub(super) fn apply(old: &[u8], patch: &[u8], new_bytes: u64, bytes_max: u64) -> Result<Vec<u8>, DeltaError> {
    const COMMANDS_MAX: u64 = COMMANDS_BYTES_MAX as u64;
    let head = Head::read(patch).ok_or(DeltaError::Patch)?;
    // What fits one window may be a little longer, by its commands.
    if head.window_bytes > (1 << WINDOW_LOG_MAX) + COMMANDS_MAX {
        return Err(DeltaError::TooLarge { what: "the window of the patch" });
    }
    let bytes = head.content_bytes.ok_or(DeltaError::Patch)?;
    if bytes > bytes_max.min(FLAT_BYTES_MAX) + COMMANDS_MAX || bytes > new_bytes.saturating_add(COMMANDS_MAX) {
        return Err(DeltaError::TooLarge { what: "the output of the patch" });
    }
    // Several frames would add up.
    if zstd::zstd_safe::find_frame_compressed_size(patch) != Ok(patch.len()) {
        return Err(DeltaError::Patch);
    }
    let mut new = Vec::new();
    let length = usize::try_from(bytes).map_err(|_| DeltaError::Patch)?;
    new.try_reserve_exact(length).map_err(|_| DeltaError::Write(io::ErrorKind::OutOfMemory.into()))?;
    let mut context = DCtx::try_create().ok_or(DeltaError::Write(io::ErrorKind::OutOfMemory.into()))?;
    // Its checksum tells a wrong base.
    let got = context.decompress_using_dict(&mut new, patch, old).map_err(|_| DeltaError::Patch)?;
    let body_bytes = usize::try_from(new_bytes).map_err(|_| DeltaError::Form)?;
    let (body, commands) = new.split_at_mut_checked(body_bytes).filter(|_| got == length).ok_or(DeltaError::Patch)?;
    similar::add(old, body, commands).ok_or(DeltaError::Patch)?;
    new.truncate(body_bytes);
    Ok(new)
}

/// zstd returns its errors as negative numbers of an unsigned type.
fn error(code: usize) -> usize {
    code.wrapping_neg()
}

/// `ZSTD_error_dstSize_tooSmall` of zstd_errors.h, whose numbers are stable.
#[allow(non_upper_case_globals, reason = "zstd's own name")]
const ZSTD_error_dstSize_tooSmall: usize = 70;

fn check(result: SafeResult) -> Result<(), DeltaError> {
    result.map(drop).map_err(|code| DeltaError::Write(io::Error::other(get_error_name(code))))
}

/// What the head of a zstd frame says (RFC 8878, 3.1.1.1).
struct Head {
    window_bytes: u64,
    content_bytes: Option<u64>,
}

impl Head {
    fn read(frame: &[u8]) -> Option<Self> {
        const MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];
        let rest = frame.strip_prefix(&MAGIC)?;
        let (descriptor, mut rest) = rest.split_first()?;
        let is_single = descriptor & 0x20 != 0;
        // Neither a dictionary's number nor the reserved bit.
        if descriptor & 0b1011 != 0 {
            return None;
        }
        let mut window_bytes = 0;
        if !is_single {
            let (byte, after) = rest.split_first()?;
            let base = 1_u64 << (10 + (byte >> 3));
            window_bytes = base + (base >> 3) * u64::from(byte & 7);
            rest = after;
        }
        let width = match (descriptor >> 6, is_single) {
            (0, false) => 0,
            (0, true) => 1,
            (log, _) => 1 << log,
        };
        let mut number = [0; 8];
        number[..width].copy_from_slice(rest.get(..width)?);
        let number = u64::from_le_bytes(number);
        let content_bytes = match width {
            0 => None,
            2 => Some(number + 256),
            _ => Some(number),
        };
        if is_single {
            window_bytes = content_bytes.unwrap_or(u64::MAX);
        }
        Some(Self { window_bytes, content_bytes })
    }
}
