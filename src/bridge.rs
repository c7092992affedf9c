//! Joins the mounts to the network: the mounts' [`Source`] made of the network side's mirror client.
//!
//! Only plain values and descriptors go through. Each want is one task on the runtime; when the mounts drop its receiver,
//! the task and its connections end.

use poolfs_core::Digest;
use poolfs_fs::source::{DELIVERIES_WAITING_MAX, Delivery, Giver, Source, SourceError, Verdict, Want};
use poolfs_net::mirror::{Mirror, MirrorError, MirrorFile, MirrorPiece};
use std::sync::Arc;
use tokio::runtime::Handle;
use tokio::sync::mpsc;

/// The network as a source of missing pieces.
#[derive(Debug)]
pub struct NetSource {
    mirror: Arc<Mirror>,
    runtime: Handle,
}

impl NetSource {
    /// A source that asks mirrors, with its tasks on `runtime`.
    pub fn new(mirror: Arc<Mirror>, runtime: Handle) -> Self {
        Self { mirror, runtime }
    }
}

impl Source for NetSource {
    fn want(&self, want: Want) -> mpsc::Receiver<Delivery> {
        let (out, deliveries) = mpsc::channel(DELIVERIES_WAITING_MAX);
        let mirror = Arc::clone(&self.mirror);
        self.runtime.spawn(async move {
            let Want { digest, size, urls, missing, purpose: _ } = want;
            let file = MirrorFile { digest, size, urls, missing };
            let end = match mirror.fetch(&file, &out, delivery).await {
                Ok(()) => Delivery::Done,
                Err(MirrorError::Unwanted) => return,
                Err(MirrorError::Nowhere { why }) => Delivery::Failed(SourceError::Nowhere { digest, why }),
                Err(MirrorError::NotNow { why }) => Delivery::Failed(SourceError::NotNow { digest, why }),
            };
            // Nobody may wait for the end any more.
            let _ = out.send(end).await;
        });
        deliveries
    }

    fn verdict(&self, digest: Digest, verdict: Verdict) {
        self.mirror.verdict(&digest, verdict == Verdict::Right);
    }
}

fn delivery(piece: MirrorPiece) -> Delivery {
    Delivery::Piece { index: piece.index, bytes: piece.bytes, giver: Giver::Mirror(piece.host) }
}
