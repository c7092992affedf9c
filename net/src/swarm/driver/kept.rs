//! The versions of pieces that one download holds until it is over.
//!
//! What was handed over is read back from the incoming file once it is surely there; the newest pieces, and versions that are
//! not in that file, stay in memory; past [`MEMORY_PIECES_MAX`] those go to an unlinked file, which is bounded by what one
//! download may cost. Where that file cannot be written, [`UNSPILLED_PIECES_MAX`] pieces are all that a download may have in memory.

use crate::memfd::{PieceMemory, SealedPiece};
use crate::swarm::FileShape;
use poolfs_core::Digest;
use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::sync::Arc;

/// Pieces kept in memory per download.
const MEMORY_PIECES_MAX: usize = 16;

/// Pieces kept in memory where nothing can be put aside, on a full disk: past that the download ends.
const UNSPILLED_PIECES_MAX: usize = 64;

/// A version of a piece: what it is held by.
type Version = (u32, Digest);

/// See the module's text.
#[derive(Debug)]
pub(super) struct Kept {
    shape: FileShape,
    incoming: Option<Arc<File>>,
    spill_dir: PathBuf,
    spill: Option<Arc<File>>,
    spill_bytes: u64,
    memory: HashMap<Version, Arc<OwnedFd>>,
    order: VecDeque<Version>,
    spilled: HashMap<Version, u64>,
    /// Per piece what the incoming file holds, and whether it is surely there already.
    here: Vec<Option<(Digest, bool)>>,
}

/// Where one version is read from.
#[derive(Debug)]
pub(super) enum Place {
    Memory(Arc<OwnedFd>),
    File(Arc<File>, u64),
}

impl Place {
    /// Reads a whole version; blocks.
    pub(super) fn read(&self, len: u32) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; len as usize];
        match self {
            Self::Memory(memory) => File::from(memory.as_fd().try_clone_to_owned()?).read_exact_at(&mut bytes, 0)?,
            Self::File(file, offset) => file.read_exact_at(&mut bytes, *offset)?,
        }
        Ok(bytes)
    }
}

impl Kept {
    pub(super) fn new(shape: FileShape, incoming: Option<Arc<OwnedFd>>, spill_dir: PathBuf) -> io::Result<Self> {
        let incoming = incoming.map(|fd| fd.as_fd().try_clone_to_owned()).transpose()?.map(|fd| Arc::new(File::from(fd)));
        Ok(Self {
            shape,
            incoming,
            spill_dir,
            spill: None,
            spill_bytes: 0,
            memory: HashMap::new(),
            order: VecDeque::new(),
            spilled: HashMap::new(),
            here: vec![None; shape.pieces() as usize],
        })
    }

    /// Takes a version that was not here before. An error: it is neither memory's nor the disk's to hold more.
    pub(super) fn keep(&mut self, piece: u32, digest: Digest, bytes: OwnedFd) -> io::Result<()> {
        let version = (piece, digest);
        if self.memory.insert(version, Arc::new(bytes)).is_none() {
            self.order.push_back(version);
        }
        self.make_room()
    }

    /// The version that the incoming file holds, as far as this side knows.
    pub(super) fn here(&self, piece: u32) -> Option<Digest> {
        self.here[piece as usize].map(|(digest, _)| digest)
    }

    /// This version is being put into the incoming file. The one that it replaces is put aside first.
    pub(super) fn handed_over(&mut self, piece: u32, digest: Digest) -> io::Result<()> {
        if let Some((old, _)) = self.here[piece as usize]
            && old != digest
            && !self.memory.contains_key(&(piece, old))
            && !self.spilled.contains_key(&(piece, old))
            && let Some(place) = self.place(piece, &old)
        {
            let bytes = place.read(self.shape.piece_len(piece))?;
            self.put_aside((piece, old), &bytes)?;
        }
        self.here[piece as usize] = Some((digest, false));
        Ok(())
    }

    /// This version is surely in the incoming file now, unless another one was handed over since.
    pub(super) fn settled(&mut self, piece: u32, digest: Digest) -> bool {
        match &mut self.here[piece as usize] {
            Some((held, settled)) if *held == digest => {
                *settled = true;
                true
            }
            _ => false,
        }
    }

    /// Whether the incoming file surely holds this version.
    pub(super) fn is_settled(&self, piece: u32, digest: &Digest) -> bool {
        self.here.get(piece as usize).copied().flatten() == Some((*digest, true))
    }

    /// Where a version is; `None` if it is nowhere.
    pub(super) fn place(&self, piece: u32, digest: &Digest) -> Option<Place> {
        let version = (piece, *digest);
        if let Some(memory) = self.memory.get(&version) {
            return Some(Place::Memory(Arc::clone(memory)));
        }
        if let (Some(offset), Some(spill)) = (self.spilled.get(&version), &self.spill) {
            return Some(Place::File(Arc::clone(spill), *offset));
        }
        match (self.here[piece as usize], &self.incoming) {
            (Some((held, true)), Some(incoming)) if held == *digest => {
                Some(Place::File(Arc::clone(incoming), u64::from(piece) * u64::from(self.shape.piece_bytes)))
            }
            _ => None,
        }
    }

    /// A version as a sealed memfd, to be handed over.
    pub(super) fn sealed(&self, piece: u32, digest: &Digest) -> io::Result<OwnedFd> {
        match self.place(piece, digest) {
            Some(Place::Memory(memory)) => memory.as_fd().try_clone_to_owned(),
            Some(place) => sealed(&place.read(self.shape.piece_len(piece))?),
            None => Err(io::Error::new(io::ErrorKind::NotFound, "this version of the piece is not kept any more")),
        }
    }

    fn make_room(&mut self) -> io::Result<()> {
        let mut looked_at = self.order.len();
        while self.memory.len() > MEMORY_PIECES_MAX && looked_at > 0 {
            looked_at -= 1;
            let Some(version) = self.order.pop_front() else { break };
            let (piece, digest) = version;
            match self.here[piece as usize] {
                Some((held, true)) if held == digest && self.incoming.is_some() => {
                    self.memory.remove(&version);
                }
                _ => match self.spill_one(version) {
                    Ok(()) => {
                        self.memory.remove(&version);
                    }
                    Err(error) => {
                        self.order.push_back(version);
                        if self.memory.len() > UNSPILLED_PIECES_MAX {
                            return Err(io::Error::new(error.kind(), format!("{}: {error}", self.spill_dir.display())));
                        }
                    }
                },
            }
        }
        Ok(())
    }

    fn spill_one(&mut self, version: Version) -> io::Result<()> {
        let Some(memory) = self.memory.get(&version) else { return Ok(()) };
        let bytes = Place::Memory(Arc::clone(memory)).read(self.shape.piece_len(version.0))?;
        self.put_aside(version, &bytes)
    }

    fn put_aside(&mut self, version: Version, bytes: &[u8]) -> io::Result<()> {
        let spill = match &self.spill {
            Some(spill) => Arc::clone(spill),
            None => {
                use rustix::fs::{Mode, OFlags};
                let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
                let file = Arc::new(File::from(rustix::fs::open(&self.spill_dir, flags, Mode::RUSR | Mode::WUSR)?));
                self.spill = Some(Arc::clone(&file));
                file
            }
        };
        spill.write_all_at(bytes, self.spill_bytes)?;
        self.spilled.insert(version, self.spill_bytes);
        self.spill_bytes += bytes.len() as u64;
        Ok(())
    }
}

/// These bytes in a sealed memfd.
pub(super) fn sealed(bytes: &[u8]) -> io::Result<OwnedFd> {
    match PieceMemory::new(0, &(0..bytes.len() as u64))?.take(bytes)? {
        SealedPiece::Done(sealed) => Ok(sealed),
        SealedPiece::NotYet(_) => Err(io::Error::new(io::ErrorKind::UnexpectedEof, "a piece shorter than itself")),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "tests")]
    use super::*;

    const PIECE_BYTES: u32 = 1000;

    fn version(piece: u32, salt: u8) -> Vec<u8> {
        (0..PIECE_BYTES).map(|at| (at + piece) as u8 ^ salt).collect()
    }

    /// Every version that was kept can be read back, wherever it went: memory, the incoming file, or the file beside it.
    #[test]
    fn reads_back_what_was_kept() {
        let dir = tempfile::tempdir().unwrap();
        let pieces = 3 * MEMORY_PIECES_MAX as u32;
        let shape = FileShape { digest: Digest::of(b"x"), size: u64::from(pieces * PIECE_BYTES), piece_bytes: PIECE_BYTES };
        let incoming = tempfile::tempfile().unwrap();
        let shared = Arc::new(OwnedFd::from(incoming.try_clone().unwrap()));
        let mut kept = Kept::new(shape, Some(shared), dir.path().to_owned()).unwrap();
        let put = |kept: &mut Kept, piece: u32, salt: u8, settled: bool| {
            let bytes = version(piece, salt);
            let digest = Digest::of(&bytes);
            kept.keep(piece, digest, sealed(&bytes).unwrap()).unwrap();
            kept.handed_over(piece, digest).unwrap();
            incoming.write_all_at(&bytes, u64::from(piece * PIECE_BYTES)).unwrap();
            if settled {
                assert!(kept.settled(piece, digest));
            }
        };
        (0..pieces).for_each(|piece| put(&mut kept, piece, 0, piece % 2 == 0));
        assert!(kept.memory.len() <= MEMORY_PIECES_MAX);
        // The first version of a piece that is replaced must not be lost with its place.
        (0..pieces).step_by(3).for_each(|piece| put(&mut kept, piece, 0xff, true));
        for piece in 0..pieces {
            for salt in [0, 0xff] {
                if salt == 0 || piece % 3 == 0 {
                    let bytes = version(piece, salt);
                    let read = kept.place(piece, &Digest::of(&bytes)).map(|place| place.read(PIECE_BYTES).unwrap());
                    assert_eq!(read.as_deref(), Some(&bytes[..]), "piece {piece} {salt}");
                }
            }
        }
        assert!(kept.memory.len() <= MEMORY_PIECES_MAX);
        assert!(kept.place(0, &Digest::of(b"another")).is_none());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "what is put aside has no name");
    }

    /// On a full disk a download of many versions must not become the machine's memory: it holds a few and then ends.
    #[test]
    fn a_disk_that_takes_nothing_is_not_memory() {
        let shape = FileShape { digest: Digest::of(b"x"), size: 1000 * u64::from(PIECE_BYTES), piece_bytes: PIECE_BYTES };
        let mut kept = Kept::new(shape, None, PathBuf::from("/nonexistent")).unwrap();
        let mut keep = |piece: u32| {
            let bytes = version(piece, 0);
            kept.keep(piece, Digest::of(&bytes), sealed(&bytes).unwrap())
        };
        assert!((0..UNSPILLED_PIECES_MAX as u32).all(|piece| keep(piece).is_ok()));
        let error = keep(UNSPILLED_PIECES_MAX as u32).unwrap_err();
        assert_eq!(error.to_string(), "/nonexistent: No such file or directory (os error 2)");
        let first = version(0, 0);
        assert_eq!(kept.place(0, &Digest::of(&first)).map(|place| place.read(PIECE_BYTES).unwrap()), Some(first), "nothing is lost");
    }
}
