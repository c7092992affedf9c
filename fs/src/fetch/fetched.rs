//! A file whose digest matched, on its way to its place.

use poolfs_core::piece::{self, BLOCK_BYTES, PIECE_BYTES};
use poolfs_core::store::{self, Partial, Provenance, Replace, Staged, Stamp, StoreError, TEMP_PREFIX};
use poolfs_core::sync::{Mutex, MutexGuard};
use poolfs_core::{BlockSum, Sums};
use rustix::fs::{AtFlags, Mode, OFlags};
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// A verified file in `incoming/`. If nobody places it, it stays there, and the next download of it finds all of it.
#[derive(Debug)]
pub struct Fetched {
    partial: Partial,
    sums: Arc<Sums>,
    provenance: Provenance,
    /// Whether it has left `incoming/`. Held over the move, so that only one caller moves it.
    placed: Mutex<bool>,
}

impl Fetched {
    pub(super) fn new(partial: Partial, sums: Sums, provenance: Provenance) -> Self {
        Self { partial, sums: Arc::new(sums), provenance, placed: Mutex::new(false) }
    }

    /// The sums that were computed while it arrived.
    pub fn sums(&self) -> &Arc<Sums> {
        &self.sums
    }

    /// What gave most of it.
    pub fn provenance(&self) -> Provenance {
        self.provenance
    }

    /// Opens it for reading, as long as nobody has placed it.
    pub fn open(&self) -> Result<OwnedFd, StoreError> {
        self.partial.read_only()
    }

    /// Puts the file under a name, mode 0644; blocks for the disk. When it returns, a power loss does not take it away.
    ///
    /// The first caller's name gets the very file, every later one a copy whose blocks are checked. A name that exists is
    /// [`io::ErrorKind::AlreadyExists`] and stays as it is; after an error the file can still be placed. The caller records
    /// it under its name.
    pub fn place(&self, to_dir: BorrowedFd<'_>, to_name: &OsStr) -> io::Result<Stamp> {
        let mut staging = self.stage(to_dir)?;
        let stamp = staging.name(to_name)?;
        staging.finish()?;
        Ok(stamp)
    }

    /// The first of the three steps of [`Fetched::place`]: all that has to be written and waited for before the file can have
    /// its name.
    pub fn stage<'a>(&'a self, to_dir: BorrowedFd<'a>) -> io::Result<Staging<'a>> {
        let placed = self.placed.lock();
        let how = if *placed {
            drop(placed);
            How::Copy(Copied { to_dir, temp: Some(self.copy(to_dir)?) })
        } else {
            How::Move(placed, self.partial.stage(to_dir).map_err(io_error)?)
        };
        Ok(Staging { how })
    }

    /// A copy in that directory, flushed; the answer is its name.
    fn copy(&self, to_dir: BorrowedFd<'_>) -> io::Result<OsString> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let temp = OsString::from(format!("{TEMP_PREFIX}fetched-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed)));
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = File::from(rustix::fs::openat(to_dir, &temp, flags, Mode::from_raw_mode(0o644))?);
        let done = rustix::fs::fchmod(&file, Mode::from_raw_mode(0o644))
            .map_err(io::Error::from)
            .and_then(|()| self.write_to(&file))
            .and_then(|()| file.sync_all());
        if let Err(err) = done {
            // The first error is the one to tell; what stays is swept at the next start.
            let _ = rustix::fs::unlinkat(to_dir, &temp, AtFlags::empty());
            return Err(err);
        }
        Ok(temp)
    }

    /// Writes the bytes, each block checked: the file left our hands when it was first placed.
    fn write_to(&self, mut file: &File) -> io::Result<()> {
        for index in 0..self.partial.piece_count() {
            let bytes = self.partial.read_piece(index).map_err(io_error)?.unwrap_or_default();
            let blocks = u64::from(index) * u64::from(PIECE_BYTES / BLOCK_BYTES)..;
            for (block, bytes) in blocks.zip(bytes.chunks(BLOCK_BYTES as usize)) {
                let expected = usize::try_from(block).ok().and_then(|block| self.sums.blocks.get(block));
                if expected != Some(&BlockSum::of(bytes)) {
                    return Err(io::Error::new(io::ErrorKind::InvalidData, "the fetched file changed before it was copied"));
                }
            }
            let span = piece::span(index.into(), self.sums.size, PIECE_BYTES);
            if bytes.len() as u64 != span.end - span.start {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "the fetched file was cut before it was copied"));
            }
            file.write_all(&bytes)?;
        }
        Ok(())
    }
}

/// A verified file that is on the disk of the directory where it is wanted, one rename away from its name.
#[derive(Debug)]
pub struct Staging<'a> {
    how: How<'a>,
}

#[derive(Debug)]
enum How<'a> {
    Move(MutexGuard<'a, bool>, Staged<'a>),
    Copy(Copied<'a>),
}

#[derive(Debug)]
struct Copied<'a> {
    to_dir: BorrowedFd<'a>,
    /// Until it has its own name.
    temp: Option<OsString>,
}

impl Drop for Copied<'_> {
    fn drop(&mut self) {
        if let Some(temp) = &self.temp {
            // What stays is swept at the next start.
            let _ = rustix::fs::unlinkat(self.to_dir, temp, AtFlags::empty());
        }
    }
}

impl Staging<'_> {
    /// Gives the file its name, once. Until [`Staging::finish`] a power loss may take it back.
    pub fn name(&mut self, to_name: &OsStr) -> io::Result<Stamp> {
        match &mut self.how {
            How::Move(placed, staged) => {
                let stamp = staged.name(to_name, Replace::Never).map_err(io_error)?;
                **placed = true;
                Ok(stamp)
            }
            How::Copy(copied) => {
                let Some(temp) = &copied.temp else { return Err(io::ErrorKind::InvalidInput.into()) };
                store::rename(copied.to_dir, temp, copied.to_dir, to_name, Replace::Never)?;
                copied.temp = None;
                Ok(Stamp::of(&rustix::fs::statat(copied.to_dir, to_name, AtFlags::SYMLINK_NOFOLLOW)?))
            }
        }
    }

    /// Waits until the name is on the disk.
    pub fn finish(self) -> io::Result<()> {
        match self.how {
            How::Move(_, staged) => staged.finish().map_err(io_error),
            How::Copy(copied) => store::flush_directory(copied.to_dir),
        }
    }
}

/// The kernel's own error where there is one, so that its number is not lost.
fn io_error(err: StoreError) -> io::Error {
    match err {
        StoreError::Io { cause, .. } => cause,
        other => io::Error::other(other),
    }
}
