//! Downloads in progress: `incoming/HEX`, one file of full length per digest, and a bitmap of the pieces that are in it.
//!
//! **Nothing here is verified.** The file leaves this directory only through [`Partial::place`], after its whole digest
//! was found right by the caller.

use super::place::{self, Replace};
use super::{Stamp, Store, StoreError};
use crate::crash_point::crash_point;
use crate::digest::{Digest, Summer, Sums};
use crate::piece::{self, PIECE_BYTES};
use crate::sync::Mutex;
use rusqlite::{OptionalExtension as _, params};
use rustix::fs::{AtFlags, FallocateFlags, Mode, OFlags};
use rustix::io::Errno;
use std::collections::HashSet;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;

/// The largest file that is downloaded, in bytes: what bounds the bitmap (512 KiB) before an index's number is believed.
pub const SIZE_BYTES_MAX: u64 = 1 << 40;

/// Bytes read at once when a whole file is hashed.
const READ_BYTES: usize = 1024 * 1024;

/// Pieces whose bits may wait while another transaction (a large list entering the catalog) holds the database.
const UNSAVED_PIECES_MAX: u32 = 64;

/// The `incoming/` directory.
#[derive(Debug)]
pub struct Incoming {
    store: Arc<Store>,
    dir: OwnedFd,
    active: Mutex<HashSet<Digest>>,
}

/// What is here of one download.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Progress {
    /// The file.
    pub digest: Digest,
    /// Its length in bytes.
    pub size: u64,
    /// Bytes of it that are here.
    pub done_bytes: u64,
    /// When it was last begun, seconds since 1970.
    pub used_at: i64,
}

impl Incoming {
    /// Takes over the directory: drops rows without a file and files without a row.
    pub fn open(store: Arc<Store>, dir: OwnedFd) -> Result<Self, StoreError> {
        let mut rows: HashSet<Digest> =
            store.read(|db| db.prepare("SELECT digest FROM incoming")?.query_map([], |row| row.get(0))?.collect())?;
        for name in names(dir.as_fd())? {
            let known = digest_of(&name).is_some_and(|digest| rows.remove(&digest));
            if !known {
                remove(dir.as_fd(), &name)?;
            }
        }
        store.write(|db| {
            let mut delete = db.prepare("DELETE FROM incoming WHERE digest = ?")?;
            rows.iter().try_for_each(|digest| delete.execute([digest]).map(drop))
        })?;
        Ok(Self { store, dir, active: Mutex::default() })
    }

    /// Begins the download of a file or goes on with it, and reserves its bytes on the disk.
    ///
    /// Errors: [`StoreError::InProgress`] while another [`Partial`] of this digest lives; [`StoreError::is_full`] if it
    /// does not fit.
    pub fn begin(self: &Arc<Self>, digest: Digest, size: u64) -> Result<Partial, StoreError> {
        if size > SIZE_BYTES_MAX {
            return Err(StoreError::TooLarge { digest, size, max: SIZE_BYTES_MAX });
        }
        if !self.active.lock().insert(digest) {
            return Err(StoreError::InProgress(digest));
        }
        let begun = self.prepare(digest, size);
        if begun.is_err() {
            self.active.lock().remove(&digest);
        }
        let (file, bits) = begun?;
        Ok(Partial { incoming: Arc::clone(self), digest, size, file, pieces: Mutex::new(Pieces { bits, unsaved: 0 }) })
    }

    fn prepare(&self, digest: Digest, size: u64) -> Result<(File, Bitmap), StoreError> {
        let name = digest.to_string();
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = rustix::fs::openat(&self.dir, &name, flags, Mode::from_raw_mode(0o644)).map(File::from);
        let file = file.map_err(|err| StoreError::io("open the download", &name)(err.into()))?;
        let count = u32::try_from(piece::count(size, PIECE_BYTES)).expect("below SIZE_BYTES_MAX / PIECE_BYTES");
        let row: Option<(u64, Vec<u8>)> = self.store.read(|db| {
            db.prepare_cached("SELECT size, have FROM incoming WHERE digest = ?")?
                .query_row([digest], |row| Ok((row.get::<_, i64>(0)?.cast_unsigned(), row.get(1)?)))
                .optional()
        })?;
        let on_disk = file.metadata().map_err(StoreError::io("stat the download", &name))?.len();
        let resumed =
            row.filter(|(old_size, _)| *old_size == size && on_disk == size).and_then(|(_, have)| Bitmap::from_bytes(have, count));
        let fresh = resumed.is_none();
        let bits = resumed.unwrap_or_else(|| Bitmap::new(count));
        if fresh {
            // Length 0 first: bytes of another size's attempt must not look like this one's.
            let sized = file.set_len(0).and_then(|()| reserve(&file, size));
            if let Err(cause) = sized {
                remove(self.dir.as_fd(), OsStr::new(&name))?;
                self.delete_row(&digest)?;
                return Err(StoreError::io("reserve space for the download", name)(cause));
            }
        }
        let now = self.store.now();
        self.store.write(|db| {
            db.prepare_cached(
                "INSERT INTO incoming (digest, size, have, used_at) VALUES (?1, ?2, ?3, ?4)
                 ON CONFLICT (digest) DO UPDATE SET size = ?2, have = ?3, used_at = ?4",
            )?
            .execute(params![digest, size.cast_signed(), bits.bytes, now])
        })?;
        Ok((file, bits))
    }

    /// What is here, in the order of last use, oldest first.
    pub fn list(&self) -> Result<Vec<Progress>, StoreError> {
        self.store.read(|db| {
            db.prepare("SELECT digest, size, have, used_at FROM incoming ORDER BY used_at, digest")?
                .query_map([], |row| {
                    let size = row.get::<_, i64>(1)?.cast_unsigned();
                    let count = u32::try_from(piece::count(size, PIECE_BYTES)).unwrap_or(0);
                    let done_bytes = Bitmap::from_bytes(row.get(2)?, count).map_or(0, |bits| bits.bytes_of(size));
                    Ok(Progress { digest: row.get(0)?, size, done_bytes, used_at: row.get(3)? })
                })?
                .collect()
        })
    }

    /// Gives up the downloads last begun before this time and not in progress now; returns how many.
    pub fn discard_older(&self, before: i64) -> Result<usize, StoreError> {
        let mut gone = 0;
        for old in self.list()?.iter().take_while(|progress| progress.used_at < before) {
            // Holding the entry keeps a begin() of the same digest out meanwhile.
            if self.active.lock().insert(old.digest) {
                let done = self.forget(&old.digest);
                self.active.lock().remove(&old.digest);
                done?;
                gone += 1;
            }
        }
        Ok(gone)
    }

    fn forget(&self, digest: &Digest) -> Result<(), StoreError> {
        remove(self.dir.as_fd(), OsStr::new(&digest.to_string()))?;
        crash_point("incoming.unlinked");
        self.delete_row(digest)
    }

    fn delete_row(&self, digest: &Digest) -> Result<(), StoreError> {
        self.store.write(|db| db.prepare_cached("DELETE FROM incoming WHERE digest = ?")?.execute([digest]).map(drop))
    }
}

/// One download in progress. Dropping it keeps what is there, for the next [`Incoming::begin`].
#[derive(Debug)]
pub struct Partial {
    incoming: Arc<Incoming>,
    digest: Digest,
    size: u64,
    file: File,
    pieces: Mutex<Pieces>,
}

#[derive(Debug)]
struct Pieces {
    bits: Bitmap,
    /// Bits set since the database last knew all of them.
    unsaved: u32,
}

impl Partial {
    /// The digest that the whole file must have.
    pub fn digest(&self) -> &Digest {
        &self.digest
    }

    /// The whole length in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    fn file_name(&self) -> OsString {
        OsString::from(self.digest.to_string())
    }

    /// How many pieces the file has.
    pub fn piece_count(&self) -> u32 {
        self.pieces.lock().bits.count
    }

    /// Writes one piece: all of its bytes, as [`piece::span`] says. A piece may be written again.
    ///
    /// Once this returns, the piece is counted as here also after a restart (or after [`Partial::sync`], where the
    /// database was busy for longer).
    pub fn write_piece(&self, index: u32, bytes: &[u8]) -> Result<(), StoreError> {
        let span = piece::span(u64::from(index), self.size, PIECE_BYTES);
        let want = span.end - span.start;
        if want == 0 || bytes.len() as u64 != want {
            return Err(StoreError::NotAPiece { digest: self.digest, index, want, got: bytes.len() });
        }
        // A piece that is being replaced is not here: a crash would leave half of each.
        self.forget_piece(index)?;
        self.file.write_all_at(bytes, span.start).map_err(StoreError::io("write the download", self.digest))?;
        crash_point("incoming.written");
        let mut pieces = self.pieces.lock();
        if pieces.bits.set(index, true) {
            pieces.unsaved += 1;
        }
        if pieces.unsaved >= UNSAVED_PIECES_MAX || !self.incoming.store.db.is_writing() {
            self.save(&mut pieces)?;
        }
        Ok(())
    }

    /// Forgets a piece whose bytes turned out wrong: it is missing again.
    pub fn forget_piece(&self, index: u32) -> Result<(), StoreError> {
        let mut pieces = self.pieces.lock();
        if pieces.bits.set(index, false) { self.save(&mut pieces) } else { Ok(()) }
    }

    /// Reads one piece that is here, to pass it on; `None` if it is missing. Its bytes are not verified.
    pub fn read_piece(&self, index: u32) -> Result<Option<Vec<u8>>, StoreError> {
        if !self.pieces.lock().bits.get(index) {
            return Ok(None);
        }
        let span = piece::span(u64::from(index), self.size, PIECE_BYTES);
        let mut bytes = vec![0; usize::try_from(span.end - span.start).expect("at most PIECE_BYTES")];
        self.file.read_exact_at(&mut bytes, span.start).map_err(StoreError::io("read the download", self.digest))?;
        Ok(Some(bytes))
    }

    /// A descriptor that reads the file and cannot write it, for who helps with the download.
    pub fn read_only(&self) -> Result<OwnedFd, StoreError> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let opened = rustix::fs::openat(&self.incoming.dir, self.digest.to_string(), flags, Mode::empty());
        opened.map_err(|err| StoreError::io("open the download", self.digest)(err.into()))
    }

    /// The pieces that are not here yet, ascending.
    pub fn missing(&self) -> Vec<u32> {
        let pieces = self.pieces.lock();
        (0..pieces.bits.count).filter(|index| !pieces.bits.get(*index)).collect()
    }

    /// The pieces that are here: a bit each, most significant first, padded with zeros to whole bytes.
    pub fn have(&self) -> Vec<u8> {
        self.pieces.lock().bits.bytes.clone()
    }

    /// Bytes that are here.
    pub fn done_bytes(&self) -> u64 {
        self.pieces.lock().bits.bytes_of(self.size)
    }

    /// Hashes the whole file as it is on the disk. The file is right if the result's digest is [`Partial::digest`].
    pub fn sums(&self) -> Result<Sums, StoreError> {
        sums_of(&self.file).map_err(StoreError::io("read the download", self.digest))
    }

    /// Writes the bitmap and waits until file and bitmap would outlive a power loss.
    pub fn sync(&self) -> Result<(), StoreError> {
        self.file.sync_data().map_err(StoreError::io("flush the download", self.digest))?;
        self.save(&mut self.pieces.lock())
    }

    /// Moves the file to its name; call it once [`Partial::sums`] gave the right digest. On an error it is still here.
    ///
    /// The order is the one of [`place()`](super::place()); the caller records the file after this returns.
    pub fn place(&self, to_dir: BorrowedFd<'_>, to_name: &OsStr, replace: Replace) -> Result<Stamp, StoreError> {
        let mut staged = self.stage(to_dir)?;
        let stamp = staged.name(to_name, replace)?;
        staged.finish()?;
        Ok(stamp)
    }

    /// The first of the three steps of [`Partial::place`], and the one that takes longest: flushes the file, or copies it to
    /// the file system where it is wanted.
    pub fn stage<'a>(&'a self, to_dir: BorrowedFd<'a>) -> Result<Staged<'a>, StoreError> {
        let failed = |err| StoreError::io("flush the download", self.digest)(err);
        // The daemon's umask may have taken bits that apt's own user needs.
        rustix::fs::fchmod(&self.file, Mode::from_raw_mode(0o644)).map_err(|err| failed(err.into()))?;
        let device = |fd: BorrowedFd<'_>| rustix::fs::fstat(fd).map(|stat| stat.st_dev).map_err(|err| failed(err.into()));
        let mut staged = Staged { partial: self, to_dir, copy: None, was_copied: false };
        if device(self.file.as_fd())? == device(to_dir)? {
            self.file.sync_all().map_err(failed)?;
            crash_point("stage.synced");
        } else {
            staged.copy = Some(place::copy_unnamed(&self.file, to_dir).map_err(failed)?);
            crash_point("stage.copied");
        }
        Ok(staged)
    }

    /// Gives the download up and removes its bytes.
    pub fn discard(self) -> Result<(), StoreError> {
        self.incoming.forget(&self.digest)
    }

    fn save(&self, pieces: &mut Pieces) -> Result<(), StoreError> {
        self.incoming.store.write(|db| {
            db.prepare_cached("UPDATE incoming SET have = ? WHERE digest = ?")?.execute(params![pieces.bits.bytes, self.digest])
        })?;
        pieces.unsaved = 0;
        Ok(())
    }
}

/// A download that is on the disk where it is wanted, one rename away from its name.
#[derive(Debug)]
pub struct Staged<'a> {
    partial: &'a Partial,
    to_dir: BorrowedFd<'a>,
    /// The copy's name, where `incoming/` lies on another file system, until it has its own.
    copy: Option<OsString>,
    was_copied: bool,
}

impl Staged<'_> {
    /// Gives the file its name. Until [`Staged::finish`] a power loss may take it back.
    pub fn name(&mut self, to_name: &OsStr, replace: Replace) -> Result<Stamp, StoreError> {
        let failed = |err: Errno| StoreError::io("place the download as", place::shown(to_name))(err.into());
        let named = match &self.copy {
            Some(copy) => place::rename(self.to_dir, copy, self.to_dir, to_name, replace),
            None => place::rename(self.partial.incoming.dir.as_fd(), &self.partial.file_name(), self.to_dir, to_name, replace),
        };
        named.map_err(failed)?;
        self.was_copied = self.copy.take().is_some();
        crash_point("stage.named");
        let stat = rustix::fs::statat(self.to_dir, to_name, AtFlags::SYMLINK_NOFOLLOW).map_err(failed)?;
        Ok(Stamp::of(&stat))
    }

    /// Waits until the name is on the disk. The download is over.
    pub fn finish(self) -> Result<(), StoreError> {
        place::flush_directory(self.to_dir).map_err(StoreError::io("flush the directory of the download", self.partial.digest))?;
        if self.was_copied {
            remove(self.partial.incoming.dir.as_fd(), &self.partial.file_name())?;
        }
        crash_point("incoming.placed");
        self.partial.incoming.delete_row(&self.partial.digest)
    }
}

impl Drop for Staged<'_> {
    fn drop(&mut self) {
        if let Some(copy) = &self.copy
            && let Err(err) = rustix::fs::unlinkat(self.to_dir, copy, AtFlags::empty())
        {
            // Swept at the next start.
            tracing::debug!("{}: {err}", place::shown(copy));
        }
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        let mut pieces = self.pieces.lock();
        if pieces.unsaved > 0
            && let Err(err) = self.save(&mut pieces)
        {
            tracing::warn!("up to {UNSAVED_PIECES_MAX} pieces of {} will be downloaded again: {err}", self.digest);
        }
        self.incoming.active.lock().remove(&self.digest);
    }
}

/// A bit for each piece, most significant first.
#[derive(Clone, Debug)]
struct Bitmap {
    bytes: Vec<u8>,
    count: u32,
}

impl Bitmap {
    fn new(count: u32) -> Self {
        Self { bytes: vec![0; count.div_ceil(8) as usize], count }
    }

    /// `None` if `bytes` cannot be a bitmap of `count` bits.
    fn from_bytes(bytes: Vec<u8>, count: u32) -> Option<Self> {
        let padding = 0xffu8.checked_shr(count % 8).unwrap_or(0);
        let clean = count.is_multiple_of(8) || bytes.last().is_some_and(|last| last & padding == 0);
        (bytes.len() == count.div_ceil(8) as usize && clean).then_some(Self { bytes, count })
    }

    fn get(&self, index: u32) -> bool {
        index < self.count && self.bytes[(index / 8) as usize] & (0x80 >> (index % 8)) != 0
    }

    /// Whether that changed anything.
    fn set(&mut self, index: u32, to: bool) -> bool {
        let changes = index < self.count && self.get(index) != to;
        if changes {
            self.bytes[(index / 8) as usize] ^= 0x80 >> (index % 8);
        }
        changes
    }

    /// Bytes of the pieces whose bits are set, in a file of `size` bytes.
    fn bytes_of(&self, size: u64) -> u64 {
        let pieces: u64 = self.bytes.iter().map(|byte| u64::from(byte.count_ones())).sum();
        let Some(last) = self.count.checked_sub(1) else { return 0 };
        let span = piece::span(u64::from(last), size, PIECE_BYTES);
        let short = if self.get(last) { u64::from(PIECE_BYTES) - (span.end - span.start) } else { 0 };
        pieces * u64::from(PIECE_BYTES) - short
    }
}

/// Takes the file's bytes from the file system now, so that the disk cannot fill up half way.
fn reserve(file: &File, size: u64) -> io::Result<()> {
    if size == 0 {
        return Ok(());
    }
    match rustix::fs::fallocate(file, FallocateFlags::empty(), 0, size) {
        Err(Errno::OPNOTSUPP | Errno::NOSYS) => file.set_len(size), // Then it is a hole, and a full disk shows later.
        other => Ok(other?),
    }
}

/// Hashes a whole file from its start, whatever its offset is.
pub(super) fn sums_of(file: &File) -> io::Result<Sums> {
    let mut summer = Summer::new();
    let mut buffer = vec![0; READ_BYTES];
    loop {
        match file.read_at(&mut buffer, summer.size()) {
            Ok(0) => return Ok(summer.finish()),
            Ok(len) => summer.update(&buffer[..len]),
            Err(err) if err.kind() == io::ErrorKind::Interrupted => {}
            Err(err) => return Err(err),
        }
    }
}

/// The digest that a file name of this store spells: 64 lower-case hexadecimal digits.
pub(super) fn digest_of(name: &OsStr) -> Option<Digest> {
    let digest: Digest = name.to_str()?.parse().ok()?;
    (*digest.to_string() == *name).then_some(digest)
}

/// The names in a directory of this store, without `.` and `..`.
pub(super) fn names(dir: BorrowedFd<'_>) -> Result<Vec<OsString>, StoreError> {
    use std::os::unix::ffi::OsStringExt as _;
    let list = || -> io::Result<Vec<OsString>> {
        let mut names = Vec::new();
        for entry in rustix::fs::Dir::read_from(dir)? {
            let name = entry?.file_name().to_bytes().to_vec();
            if name != b"." && name != b".." {
                names.push(OsString::from_vec(name));
            }
        }
        Ok(names)
    };
    list().map_err(StoreError::io("list", "the cache directory"))
}

/// Unlinks a file of this store; one that is gone already is as good.
pub(super) fn remove(dir: BorrowedFd<'_>, name: &OsStr) -> Result<(), StoreError> {
    match rustix::fs::unlinkat(dir, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(err) => Err(StoreError::io("remove", place::shown(name))(err.into())),
    }
}
