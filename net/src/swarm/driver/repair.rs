//! Single pieces of a file that was verified before: from the mirror, and if it does not deliver, from the fleet and then from other
//! peers, one after another. Of what strangers are not to hear of they are not asked.
//! Who asks knows the pieces' digests and compares; here nobody is blamed.

use super::hunt::Holder;
use super::outlet::Outlet;
use super::{Giver, REPAIR_DOUBTS_MAX, Swarm, SwarmError, SwarmWant};
use crate::mirror::{MirrorFile, MirrorPiece};
use crate::peer::PeerClient;
use crate::swarm::FileShape;
use std::net::SocketAddr;
use tokio::sync::mpsc;

/// Members of the fleet that are asked for one piece.
const MEMBERS_ASKED_MAX: usize = 16;

impl Swarm {
    pub(super) async fn repair<T: Send>(&self, want: &SwarmWant, shape: FileShape, outlet: &mut Outlet<'_, T>) -> Result<(), SwarmError> {
        let mut why = String::from("no URL is known");
        if !want.urls.is_empty() {
            let file = MirrorFile { digest: want.digest, size: want.size, urls: want.urls.clone(), missing: want.missing.clone() };
            let (pieces_in, mut pieces) = mpsc::channel(1);
            let fetching = async move { self.parts.mirror.fetch(&file, &pieces_in, |piece| piece).await };
            let handing_over = async {
                while let Some(MirrorPiece { index, bytes, host }) = pieces.recv().await {
                    outlet.send(index, bytes, Giver::Mirror(host)).await?;
                }
                Ok::<(), SwarmError>(())
            };
            let (fetched, handed_over) = tokio::join!(fetching, handing_over);
            handed_over?;
            match fetched {
                Ok(()) => return Ok(()),
                Err(error) if want.urls.iter().any(|url| url.private) => return Err(error.into()),
                Err(error) => why = error.to_string(),
            }
        }
        let members = self.fleet_client();
        for contact in self.members_asked() {
            let Ok(have) = members.have(contact, &shape).await else { continue };
            let holder = Holder { contact, have: (!have.is_full()).then_some(have) };
            if self.repair_from(&members, want, shape, &holder, outlet).await? {
                return Ok(());
            }
        }
        if want.fleet_only {
            return Err(SwarmError::NotNow { why: format!("{why}; no member of the fleet gives it, and strangers are not to hear of it") });
        }
        let mut hunt = self.hunt(shape);
        while let Some(holder) = hunt.next().await {
            if self.repair_from(&self.parts.client, want, shape, &holder, outlet).await? {
                return Ok(());
            }
        }
        Err(SwarmError::NotNow { why: format!("{why}; and no peer gives it") })
    }

    /// Members of the fleet that are asked for a piece, where there is one.
    fn members_asked(&self) -> Vec<SocketAddr> {
        let Some(fleet) = self.parts.fleet.as_ref().filter(|fleet| fleet.members() > 0) else { return Vec::new() };
        // Of this machine itself there is nothing to be had; it answers so.
        fleet.view().contacts().map(|(_, contact)| contact).take(MEMBERS_ASKED_MAX).collect()
    }

    /// Asks one holder for what is missing; `true`: nothing is any more.
    async fn repair_from<T: Send>(
        &self,
        client: &PeerClient,
        want: &SwarmWant,
        shape: FileShape,
        holder: &Holder,
        outlet: &mut Outlet<'_, T>,
    ) -> Result<bool, SwarmError> {
        if self.gave_wrong(want, holder.contact) {
            return Ok(false);
        }
        for piece in 0..shape.pieces() {
            let wanted: Vec<u32> = outlet.parts(piece).filter(|index| outlet.missing().contains(index)).collect();
            if wanted.is_empty() || holder.have.as_ref().is_some_and(|have| !have.has(piece)) {
                continue;
            }
            let Ok(given) = client.piece(holder.contact, &shape, piece, || {}).await else { break };
            self.gave(want, holder.contact);
            for index in wanted {
                let part = outlet.cut(piece, index, &given.bytes).map_err(|err| SwarmError::NotNow { why: err.to_string() })?;
                outlet.send(index, part, Giver::Peer(holder.contact)).await?;
            }
        }
        Ok(outlet.missing().is_empty())
    }

    fn gave_wrong(&self, want: &SwarmWant, contact: SocketAddr) -> bool {
        self.repair_gave.lock().iter().any(|(file, peer, wrong)| *wrong && *file == want.digest && *peer == contact)
    }

    fn gave(&self, want: &SwarmWant, contact: SocketAddr) {
        let mut gave = self.repair_gave.lock();
        if gave.len() >= REPAIR_DOUBTS_MAX {
            gave.pop_front();
        }
        gave.push_back((want.digest, contact, false));
    }
}
