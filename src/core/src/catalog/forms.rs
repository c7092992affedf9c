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
