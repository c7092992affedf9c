//! Decompression of members, bounded.

use super::parts::{Format, Section};
use super::{DeltaError, FLAT_BYTES_MAX};
use std::io::Read;

/// Memory of the xz decoder: a dictionary of 64 MiB, which is what `-9` asks for, and a little.
const XZ_MEMORY_BYTES_MAX: u64 = 70 << 20;

/// The largest window of a member in zstd.
const ZSTD_WINDOW_LOG_MAX: u32 = 27;

const STEP_BYTES: usize = 256 * 1024;

/// Appends what a member unpacks to.
pub(super) fn unpack(format: Format, section: Section<'_>, to: &mut Vec<u8>) -> Result<(), DeltaError> {
    match format {
        Format::Xz => {
            let stream = liblzma::stream::Stream::new_stream_decoder(XZ_MEMORY_BYTES_MAX, liblzma::stream::CONCATENATED);
            let stream = stream.map_err(|err| DeltaError::Read(err.into()))?;
            append(liblzma::read::XzDecoder::new_stream(std::io::BufReader::new(section), stream), to)
        }
        Format::Gzip => append(flate2::read::MultiGzDecoder::new(section), to),
        Format::Zstd => {
            let mut decoder = zstd::stream::read::Decoder::new(section).map_err(DeltaError::Read)?;
            decoder.window_log_max(ZSTD_WINDOW_LOG_MAX).map_err(DeltaError::Read)?;
            append(decoder, to)
        }
    }
}

/// Appends all that `from` gives, as long as `to` stays within [`FLAT_BYTES_MAX`].
pub(super) fn append(mut from: impl Read, to: &mut Vec<u8>) -> Result<(), DeltaError> {
    let limit = usize::try_from(FLAT_BYTES_MAX).unwrap_or(usize::MAX);
    let mut step = vec![0; STEP_BYTES];
    loop {
        let got = match from.read(&mut step) {
            Ok(0) => return Ok(()),
            Ok(got) => got,
            Err(err) if err.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(err) => return Err(DeltaError::Read(err)),
        };
        if to.len() + got > limit {
            return Err(DeltaError::TooLarge { what: "the unpacked package" });
        }
        // Doubling would take twice the bytes for a moment: past a quarter it grows at once to all that it may be.
        if to.capacity() - to.len() < got && to.len() >= limit / 4 {
            to.reserve_exact(limit - to.len());
        }
        to.extend_from_slice(&step[..got]);
    }
}
