//! What the mounts' side asks of the network process about deltas.

use super::{Gone, NetProcess};
use crate::deltas::offers::{Asked, Content, DeltaOffer, FalseClaim, OFFERS_MAX, Offered, Offers};
use crate::wire::{Answer, Question, ToNet, seal};
use poolfs_core::Digest;
use std::time::Duration;
use tokio::sync::mpsc;

/// How long a walk of the DHT to a small delta may take.
const ITEM_PATIENCE: Duration = Duration::from_secs(15);

/// How long members of the fleet may take to say whether they have a file.
const MAKER_PATIENCE: Duration = Duration::from_secs(30);

impl NetProcess {
    async fn seek(&self, new: Digest, fleet_only: bool, out: &mpsc::Sender<DeltaOffer>) -> Result<(), Gone> {
        let mut seeking = self.up().await?.seek(new, fleet_only).await?;
        for _ in 0..OFFERS_MAX {
            let Some(offer) = seeking.next().await else { break };
            // Who looks for them may have enough.
            if out.send(offer).await.is_err() {
                break;
            }
        }
        Ok(())
    }
}

impl Offers for NetProcess {
    fn offers(&self, new: Digest, fleet_only: bool) -> mpsc::Receiver<DeltaOffer> {
        let (out, offers) = mpsc::channel(1);
        let this = self.clone();
        self.inner.runtime.spawn(async move {
            let sought = tokio::select! {
                () = out.closed() => return,
                sought = this.seek(new, fleet_only, &out) => sought,
            };
            if let Err(err) = sought {
                tracing::debug!(%new, "look for deltas: {err}");
            }
        });
        offers
    }

    fn item(&self, target: [u8; 20]) -> Asked<Option<Vec<u8>>> {
        let this = self.clone();
        Box::pin(async move {
            match this.link()?.ask(Question::Item(target), Some(ITEM_PATIENCE)).await.ok()? {
                (Answer::Item(item), _) => item,
                _ => None,
            }
        })
    }

    fn false_claim(&self, false_claim: FalseClaim, delta: Option<&[u8]>) {
        let Some(link) = self.link() else { return };
        let new = false_claim.new;
        let told = delta.map(seal).transpose().map_err(Gone::from);
        let told = told.and_then(|delta| link.try_tell_with(&ToNet::FalseClaim(false_claim), delta.into_iter().collect()));
        if told.is_err() {
            tracing::debug!(%new, "the network process was not told of a false claim");
        }
    }

    fn offer(&self, offered: Vec<Offered>) {
        self.inner.offered.send_if_modified(|now| {
            if *now == offered {
                return false;
            }
            *now = offered;
            if let Some(link) = self.link() {
                // One that is gone is started anew and told then, and one that does not read is ended.
                let _ = link.try_tell(&ToNet::Offer(now.clone()));
            }
            true
        });
    }

    fn is_maker(&self, files: [Content; 2]) -> Asked<Option<bool>> {
        let this = self.clone();
        Box::pin(async move {
            match this.link()?.ask(Question::IsMaker(files), Some(MAKER_PATIENCE)).await.ok()? {
                (Answer::IsMaker(is_maker), _) => Some(is_maker),
                _ => None,
            }
        })
    }
}
