//! The forms in which apt keeps an index: plain or compressed. Reading is streaming, with bounds on what comes out and on
//! the memory that a decompressor may take.

use std::fs::File;
use std::io::{self, Read};

/// The most that one index may unpack to, in bytes. Debian's largest Packages has 60 MB, its Contents 900 MB.
pub const INDEX_BYTES_MAX: u64 = 2 << 30;

/// What xz may take to unpack; `xz -9` needs 65 MiB.
const XZ_MEMORY_BYTES_MAX: u64 = 128 << 20;

/// log2 of the window that zstd may take; `zstd -19` needs 2^23, `--ultra` 2^27.
const ZSTD_WINDOW_LOG_MAX: u32 = 27;

/// A form of an index file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Form {
    /// As it is.
    Plain,
    /// `.gz`
    Gzip,
    /// `.xz`
    Xz,
    /// `.bz2`
    Bzip2,
    /// `.lz4`, what apt keeps with `Acquire::GzipIndexes`.
    Lz4,
    /// `.zst`
    Zstd,
    /// `.lzma`
    Lzma,
}

impl Form {
    /// Every form.
    pub const ALL: [Self; 7] = [Self::Plain, Self::Zstd, Self::Lz4, Self::Gzip, Self::Xz, Self::Bzip2, Self::Lzma];

    /// The ending with its dot; empty for plain.
    pub fn suffix(self) -> &'static str {
        match self {
            Self::Plain => "",
            Self::Gzip => ".gz",
            Self::Xz => ".xz",
            Self::Bzip2 => ".bz2",
            Self::Lz4 => ".lz4",
            Self::Zstd => ".zst",
            Self::Lzma => ".lzma",
        }
    }

    /// The form that an ending without its dot names, as in `Acquire::CompressionTypes`.
    pub fn of_extension(extension: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|form| form.suffix().strip_prefix('.') == Some(extension))
    }

    /// The form that `Acquire::CompressionTypes` calls so: an ending, or `uncompressed`.
    pub(super) fn of_type(name: &str) -> Option<Self> {
        if name.eq_ignore_ascii_case("uncompressed") { Some(Self::Plain) } else { Self::of_extension(name) }
    }

    /// Reads `file` unpacked. A file that ends too early, or unpacks to more than [`INDEX_BYTES_MAX`], is an error of the
    /// reader: never a clean end.
    pub fn reader(self, file: File) -> io::Result<Bounded<Box<dyn Read>>> {
        self.reader_up_to(file, INDEX_BYTES_MAX)
    }

    fn reader_up_to(self, file: impl Read + 'static, bytes_max: u64) -> io::Result<Bounded<Box<dyn Read>>> {
        let file = io::BufReader::with_capacity(64 << 10, file);
        let inner: Box<dyn Read> = match self {
            Self::Plain => Box::new(file),
            Self::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(file)),
            Self::Bzip2 => Box::new(bzip2::bufread::MultiBzDecoder::new(file)),
            Self::Lz4 => Box::new(Lz4Frames::new(file)),
            Self::Zstd => {
                let mut decoder = zstd::Decoder::with_buffer(file)?;
                decoder.window_log_max(ZSTD_WINDOW_LOG_MAX)?;
                Box::new(decoder)
            }
            Self::Xz | Self::Lzma => {
                let stream = if self == Self::Xz {
                    liblzma::stream::Stream::new_stream_decoder(XZ_MEMORY_BYTES_MAX, liblzma::stream::CONCATENATED)
                } else {
                    liblzma::stream::Stream::new_lzma_decoder(XZ_MEMORY_BYTES_MAX)
                };
                Box::new(liblzma::bufread::XzDecoder::new_stream(file, stream.map_err(io::Error::other)?))
            }
        };
        Ok(Bounded { inner, left: bytes_max })
    }
}

/// A reader that fails instead of giving more than a bound.
#[derive(Debug)]
pub struct Bounded<R> {
    inner: R,
    left: u64,
}

impl<R: Read> Read for Bounded<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.left = self
            .left
            .checked_sub(u64::try_from(read).unwrap_or(u64::MAX))
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "unpacks to more than an index may have"))?;
        Ok(read)
    }
}

/// LZ4 frames one after another. The decoder takes an end of the input between two blocks for the end of the frame; here
/// it is an error unless the frame's end mark was read.
struct Lz4Frames<R: Read> {
    decoder: lz4_flex::frame::FrameDecoder<Watched<R>>,
    started: bool,
}

/// Remembers whether the input's end was met.
struct Watched<R> {
    inner: R,
    ended: bool,
}

impl<R: Read> Read for Watched<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.ended |= read == 0 && !buffer.is_empty();
        Ok(read)
    }
}

impl<R: io::BufRead> Lz4Frames<R> {
    fn new(inner: R) -> Self {
        Self { decoder: lz4_flex::frame::FrameDecoder::new(Watched { inner, ended: false }), started: false }
    }
}

impl<R: io::BufRead> Read for Lz4Frames<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            if self.started {
                let read = self.decoder.read(buffer)?;
                if read > 0 || buffer.is_empty() {
                    return Ok(read);
                }
                if self.decoder.get_ref().ended {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                // The frame is over; another may follow.
                if self.decoder.get_mut().inner.fill_buf()?.is_empty() {
                    return Ok(0);
                }
            }
            self.started = true;
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    const PLAIN: &[u8] = include_bytes!("testdata/Packages");

    /// What the command-line tools of each form made of it.
    const PACKED: [(Form, &[u8]); 6] = [
        (Form::Gzip, include_bytes!("testdata/Packages.gz")),
        (Form::Xz, include_bytes!("testdata/Packages.xz")),
        (Form::Bzip2, include_bytes!("testdata/Packages.bz2")),
        (Form::Lz4, include_bytes!("testdata/Packages.lz4")),
        (Form::Zstd, include_bytes!("testdata/Packages.zst")),
        (Form::Lzma, include_bytes!("testdata/Packages.lzma")),
    ];

    fn unpack(form: Form, bytes: &[u8]) -> io::Result<Vec<u8>> {
        let mut out = Vec::new();
        form.reader_up_to(io::Cursor::new(bytes.to_vec()), 1 << 20)?.read_to_end(&mut out)?;
        Ok(out)
    }

    /// A form that is not read leaves the catalog empty on machines that keep it.
    #[test]
    fn every_form_is_read() {
        assert_eq!(unpack(Form::Plain, PLAIN).unwrap(), PLAIN);
        for (form, bytes) in PACKED {
            assert_eq!(unpack(form, bytes).unwrap(), PLAIN, "{form:?}");
            assert_eq!(Form::of_extension(&form.suffix()[1..]), Some(form));
        }
        assert_eq!(Form::of_extension(""), None);
    }

    /// `pigz`, `pixz` and `zstd` write several frames; the later ones count too. (`.lzma` has no such thing.)
    #[test]
    fn frames_in_a_row_are_one_file() {
        for (form, bytes) in PACKED.into_iter().filter(|(form, _)| *form != Form::Lzma) {
            assert_eq!(unpack(form, &[bytes, bytes].concat()).unwrap(), [PLAIN, PLAIN].concat(), "{form:?}");
        }
    }

    /// A half list taken for a whole one: its packages would silently be missing.
    #[test]
    fn every_truncation_is_an_error() {
        for (form, bytes) in PACKED {
            for length in 0..bytes.len() {
                let unpacked = unpack(form, &bytes[..length]);
                assert!(unpacked.is_err(), "{form:?} cut to {length} of {} gave {} bytes", bytes.len(), unpacked.unwrap().len());
            }
        }
    }

    /// Disks flip bits: an error or other bytes, never a panic or an endless loop.
    #[test]
    fn flipped_bits_do_no_harm() {
        for (form, bytes) in PACKED {
            for position in 0..bytes.len() {
                let mut mangled = bytes.to_vec();
                mangled[position] ^= 1 << (position % 8);
                if let Ok(unpacked) = unpack(form, &mangled) {
                    assert!(unpacked.len() <= 1 << 20, "{form:?} {position}");
                }
            }
        }
    }

    /// One form under another's name, and no form at all.
    #[test]
    fn foreign_bytes_are_errors() {
        for (form, _) in PACKED {
            for (other, bytes) in PACKED.into_iter().filter(|(other, _)| *other != form) {
                assert!(unpack(form, bytes).is_err(), "{other:?} as {form:?}");
            }
            assert!(unpack(form, PLAIN).is_err(), "plain as {form:?}");
        }
    }

    /// A few kilobytes that unpack to gigabytes must not fill the disk.
    #[test]
    fn what_comes_out_is_bounded() {
        let small = io::repeat(0).take(3 << 20);
        let mut packed = Vec::new();
        flate2::read::GzEncoder::new(small, flate2::Compression::best()).read_to_end(&mut packed).unwrap();
        assert!(packed.len() < 8 << 10);
        assert_eq!(unpack(Form::Gzip, &packed).unwrap_err().to_string(), "unpacks to more than an index may have");
    }
}
