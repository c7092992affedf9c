//! A source for tests: it delivers, lies, stops and stalls as it is told.

#![allow(clippy::unwrap_used, reason = "tests")]

use crate::source::{Delivery, Giver, Source, SourceError, Verdict, Want};
use parking_lot::Mutex;
use poolfs_core::Digest;
use poolfs_core::piece::PIECE_BYTES;
use rustix::fs::{MemfdFlags, SealFlags};
use std::collections::VecDeque;
use std::fs::File;
use std::io::Write as _;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::sync::mpsc;

const PIECE: usize = PIECE_BYTES as usize;

/// What the fake source does with one want.
#[derive(Clone, Debug)]
pub(crate) enum Act {
    /// Delivers these pieces in this order, then says `Done`.
    Give(Vec<u32>),
    /// Delivers all that is missing, in order.
    GiveAll,
    /// As before, with other bytes.
    GiveWrong,
    /// Delivers so many of the missing pieces and then fails.
    Fail(usize, SourceError),
    /// Delivers so many and then says nothing more.
    Hang(usize),
    /// Delivers a piece each time this much time has passed.
    Slowly(Duration),
    /// Delivers so many and is gone.
    Vanish(usize),
    /// Delivers things that are no pieces of the file, and then the file.
    Confuse,
}

/// A source that follows a list of acts, and the last of them for ever.
#[derive(Debug)]
pub(crate) struct Fake {
    file: Vec<u8>,
    acts: Mutex<VecDeque<Act>>,
    pub(crate) wants: Mutex<Vec<Want>>,
    pub(crate) verdicts: Mutex<Vec<Verdict>>,
    /// Wants whose receiver still lives.
    pub(crate) open: Arc<AtomicUsize>,
}

impl Fake {
    pub(crate) fn new(file: &[u8], acts: &[Act]) -> Arc<Self> {
        Arc::new(Self {
            file: file.to_owned(),
            acts: Mutex::new(acts.iter().cloned().collect()),
            wants: Mutex::default(),
            verdicts: Mutex::default(),
            open: Arc::default(),
        })
    }

    pub(crate) fn asked(&self) -> Vec<Vec<u32>> {
        self.wants.lock().iter().map(|want| want.missing.clone()).collect()
    }
}

pub(crate) fn sealed(bytes: &[u8], seals: SealFlags) -> OwnedFd {
    let memory = rustix::fs::memfd_create("test", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    let mut memory = File::from(memory);
    memory.write_all(bytes).unwrap();
    rustix::fs::fcntl_add_seals(&memory, seals).unwrap();
    memory.into()
}

pub(crate) const ALL_SEALS: SealFlags = SealFlags::WRITE.union(SealFlags::GROW).union(SealFlags::SHRINK).union(SealFlags::SEAL);

fn delivery(index: u32, bytes: &[u8]) -> Delivery {
    Delivery::Piece { index, bytes: sealed(bytes, ALL_SEALS), giver: Giver::Mirror("fake".into()) }
}

impl Source for Fake {
    fn want(&self, want: Want, _incoming: Option<OwnedFd>) -> mpsc::Receiver<Delivery> {
        let (out, receiver) = mpsc::channel(crate::source::DELIVERIES_WAITING_MAX);
        let mut acts = self.acts.lock();
        let act = if acts.len() > 1 { acts.pop_front().unwrap() } else { acts.front().unwrap().clone() };
        let pieces: Vec<Vec<u8>> = self.file.chunks(PIECE).map(<[u8]>::to_vec).collect();
        let open = Arc::clone(&self.open);
        open.fetch_add(1, Ordering::SeqCst);
        self.wants.lock().push(want.clone());
        tokio::spawn(async move {
            let missing = want.missing.clone();
            let give = async |indexes: &[u32]| {
                for index in indexes {
                    if out.send(delivery(*index, &pieces[*index as usize])).await.is_err() {
                        return;
                    }
                }
            };
            match act {
                Act::Give(order) => give(&order).await,
                Act::GiveAll => give(&missing).await,
                Act::GiveWrong => {
                    for index in missing {
                        let wrong: Vec<u8> = pieces[index as usize].iter().map(|byte| byte ^ 1).collect();
                        let _ = out.send(delivery(index, &wrong)).await;
                    }
                }
                Act::Fail(count, error) => {
                    give(&missing[..count]).await;
                    let _ = out.send(Delivery::Failed(error)).await;
                }
                Act::Hang(count) => {
                    give(&missing[..count]).await;
                    out.closed().await;
                }
                Act::Slowly(pause) => {
                    for index in missing {
                        tokio::time::sleep(pause).await;
                        give(&[index]).await;
                    }
                }
                Act::Vanish(count) => {
                    give(&missing[..count]).await;
                    open.fetch_sub(1, Ordering::SeqCst);
                    return;
                }
                Act::Confuse => {
                    let first = &pieces[0];
                    let giver = Giver::Delta;
                    let (pipe, _other_end) = rustix::pipe::pipe().unwrap();
                    for (index, bytes) in [
                        (9999, sealed(first, ALL_SEALS)),
                        (0, sealed(&first[1..], ALL_SEALS)),
                        (0, sealed(first, SealFlags::WRITE)),
                        (0, pipe),
                        (0, sealed(&vec![0; PIECE], ALL_SEALS)),
                        (0, sealed(first, ALL_SEALS)),
                    ] {
                        let _ = out.send(Delivery::Piece { index, bytes, giver: giver.clone() }).await;
                    }
                    give(&missing[1..]).await;
                }
            }
            let _ = out.send(Delivery::Done).await;
            out.closed().await;
            open.fetch_sub(1, Ordering::SeqCst);
        });
        receiver
    }

    fn verdict(&self, _digest: Digest, verdict: Verdict) {
        self.verdicts.lock().push(verdict);
    }
}
