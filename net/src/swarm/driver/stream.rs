//! The download as it is with no peer in sight: one stream from the mirror.

use super::download::Start;
use super::hunt::{Holder, Hunt};
use super::outlet::Outlet;
use super::{Giver, Swarm, SwarmError, SwarmWant, now_s};
use crate::mirror::{MirrorError, MirrorFile, MirrorPiece};
use crate::swarm::FileShape;
use poolfs_core::Digest;
use sha2::{Digest as _, Sha256};
use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::Instant;

/// With fewer pieces missing than this the stream is left to end, whoever turns up.
const HAND_OVER_PIECES_MIN: usize = 4;

/// How the stream ended.
pub(super) enum StreamEnd {
    /// Everything was handed over.
    Done,
    /// Peers have turned up: the rest is theirs too.
    Peers(Start),
    /// The mirror does not deliver the rest; what others may go on from.
    Failed(MirrorError, Start),
}

/// A piece that may not be in the incoming file yet.
pub(super) struct Recent {
    pub(super) piece: u32,
    pub(super) bytes: Arc<OwnedFd>,
    nth: u64,
}

/// A piece that is here, with its SHA-256; with its bytes where the incoming file may not have them yet.
pub(super) struct Here {
    pub(super) piece: u32,
    pub(super) digest: Digest,
    pub(super) bytes: Option<Arc<OwnedFd>>,
}

impl Swarm {
    pub(super) async fn stream<T: Send>(
        &self,
        want: &SwarmWant,
        shape: FileShape,
        mut hunt: Option<&mut Hunt>,
        outlet: &mut Outlet<'_, T>,
    ) -> Result<StreamEnd, SwarmError> {
        let missing: Vec<u32> = outlet.missing().iter().copied().collect();
        let file = MirrorFile { digest: want.digest, size: want.size, urls: want.urls.clone(), missing };
        let (pieces_in, mut pieces) = mpsc::channel::<MirrorPiece>(1);
        let fetching = self.parts.mirror.fetch(&file, &pieces_in, |piece| piece);
        tokio::pin!(fetching);
        let mut recent: VecDeque<Recent> = VecDeque::new();
        let mut holders: Vec<Holder> = Vec::new();
        let peers = hunt.is_some() && shape.pieces() > 1;
        // What is here when peers turn up is hashed while the stream goes on.
        let mut hashing: Option<tokio::task::JoinHandle<io::Result<Vec<Here>>>> = None;
        let mut meter = Meter::new();
        let mut ended: Option<Result<(), MirrorError>> = None;
        loop {
            tokio::select! {
                biased;
                Some(piece) = pieces.recv() => {
                    meter.took(&piece, shape);
                    if peers {
                        recent.push_back(Recent { piece: piece.index, bytes: Arc::new(clone(&piece.bytes)?), nth: outlet.sent() + 1 });
                        while recent.front().is_some_and(|old| outlet.is_settled(old.nth)) {
                            recent.pop_front();
                        }
                    }
                    outlet.send(piece.index, piece.bytes, Giver::Mirror(piece.host)).await?;
                }
                result = &mut fetching, if ended.is_none() => ended = Some(result),
                holder = next(&mut hunt), if hunt.is_some() => match holder {
                    None => hunt = None,
                    Some(holder) => holders.push(holder),
                },
                hashed = joined(&mut hashing), if hashing.is_some() => {
                    let mut here = hashed.map_err(|error| SwarmError::NotNow { why: format!("read what is here: {error}") })?;
                    meter.rate(self);
                    let known: std::collections::HashSet<u32> = here.iter().map(|here| here.piece).collect();
                    let later = hash_here_but(want, shape, outlet, &recent, |piece| known.contains(&piece)).await?;
                    here.extend(later);
                    return Ok(StreamEnd::Peers(Start { mirror_after: Some(Duration::ZERO), holders, here, fleet: None }));
                }
            }
            if pieces.is_empty()
                && let Some(result) = ended.take()
            {
                meter.rate(self);
                return Ok(match result {
                    Ok(()) => StreamEnd::Done,
                    Err(MirrorError::Unwanted) => return Err(SwarmError::Unwanted),
                    Err(error) if !peers => StreamEnd::Failed(error, Start::default()),
                    Err(error) => {
                        let here = hash_here(want, shape, outlet, &recent).await?;
                        StreamEnd::Failed(error, Start { mirror_after: None, holders, here, fleet: None })
                    }
                });
            }
            if hashing.is_none() && ended.is_none() && !holders.is_empty() && outlet.missing().len() >= HAND_OVER_PIECES_MIN {
                hashing = Some(tokio::task::spawn_blocking(here_job(want, shape, outlet, &recent, |_| false)?));
            }
        }
    }
}

/// The pieces of the swarm's that are here, hashed on a thread that may block.
pub(super) async fn hash_here<T: Send>(
    want: &SwarmWant,
    shape: FileShape,
    outlet: &Outlet<'_, T>,
    recent: &VecDeque<Recent>,
) -> Result<Vec<Here>, SwarmError> {
    hash_here_but(want, shape, outlet, recent, |_| false).await
}

async fn hash_here_but<T: Send>(
    want: &SwarmWant,
    shape: FileShape,
    outlet: &Outlet<'_, T>,
    recent: &VecDeque<Recent>,
    known: impl Fn(u32) -> bool,
) -> Result<Vec<Here>, SwarmError> {
    let job = here_job(want, shape, outlet, recent, known)?;
    let failed = |why: String| SwarmError::NotNow { why: format!("read what is here: {why}") };
    tokio::task::spawn_blocking(job).await.map_err(|err| failed(err.to_string()))?.map_err(|err| failed(err.to_string()))
}

type HereJob = Box<dyn FnOnce() -> io::Result<Vec<Here>> + Send>;

/// What hashes the pieces that are here and not `known`.
fn here_job<T: Send>(
    want: &SwarmWant,
    shape: FileShape,
    outlet: &Outlet<'_, T>,
    recent: &VecDeque<Recent>,
    known: impl Fn(u32) -> bool,
) -> Result<HereJob, SwarmError> {
    let in_memory = |piece: u32| recent.iter().rev().find(|recent| recent.piece == piece).map(|recent| Arc::clone(&recent.bytes));
    let pieces: Vec<(u32, Option<Arc<OwnedFd>>)> =
        (0..shape.pieces()).filter(|piece| outlet.has(*piece) && !known(*piece)).map(|piece| (piece, in_memory(piece))).collect();
    let Some(incoming) = want.incoming.as_ref().filter(|_| !pieces.is_empty()) else { return Ok(Box::new(|| Ok(Vec::new()))) };
    let incoming = File::from(clone(incoming)?);
    Ok(Box::new(move || {
        let hash = |(piece, bytes): (u32, Option<Arc<OwnedFd>>)| {
            let mut buffer = vec![0; shape.piece_len(piece) as usize];
            match &bytes {
                Some(bytes) => File::from(bytes.as_fd().try_clone_to_owned()?).read_exact_at(&mut buffer, 0)?,
                None => incoming.read_exact_at(&mut buffer, u64::from(piece) * u64::from(shape.piece_bytes))?,
            }
            Ok(Here { piece, digest: Digest(Sha256::digest(&buffer).into()), bytes })
        };
        pieces.into_iter().map(hash).collect()
    }))
}

fn clone(fd: &OwnedFd) -> Result<OwnedFd, SwarmError> {
    fd.try_clone().map_err(|err| SwarmError::NotNow { why: format!("too many open files: {err}") })
}

async fn next(hunt: &mut Option<&mut Hunt>) -> Option<Holder> {
    match hunt {
        Some(hunt) => hunt.next().await,
        None => None,
    }
}

async fn joined(hashing: &mut Option<tokio::task::JoinHandle<io::Result<Vec<Here>>>>) -> io::Result<Vec<Here>> {
    match hashing {
        Some(hashing) => hashing.await.unwrap_or_else(|err| Err(io::Error::other(err))),
        None => Ok(Vec::new()),
    }
}

/// How fast the mirror was, for the next time that it is one of several.
struct Meter {
    started: Instant,
    first: Option<Instant>,
    bytes: u64,
    host: String,
}

impl Meter {
    fn new() -> Self {
        Self { started: Instant::now(), first: None, bytes: 0, host: String::new() }
    }

    fn took(&mut self, piece: &MirrorPiece, shape: FileShape) {
        // The first piece ends where the others' time begins.
        if self.first.is_none() {
            self.first = Some(Instant::now());
            self.host.clone_from(&piece.host);
        } else {
            self.bytes += u64::from(shape.piece_len(piece.index));
        }
    }

    fn rate(&self, swarm: &Swarm) {
        let Some(first) = self.first.filter(|_| self.bytes > 0) else { return };
        #[allow(clippy::cast_precision_loss, reason = "an estimate")]
        let rate = self.bytes as f64 / first.elapsed().max(Duration::from_micros(100)).as_secs_f64();
        let mut book = swarm.book.lock();
        let mut rating = book.mirror(&self.host, now_s());
        rating.succeeded(first - self.started, rate, now_s());
        book.rate_mirror(self.host.clone(), rating);
    }
}
