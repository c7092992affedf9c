//! The fleet's key as the peer protocol uses it.

use super::Fleet;
use super::auth::{Gate, Nonce, from_header, to_header};
use crate::peer::{Auth, Signed};
use std::fmt;
use std::sync::Arc;

/// Signs requests to members, and knows those of members.
pub(super) struct FleetAuth {
    pub(super) gate: Arc<Gate>,
    pub(super) fleet: Fleet,
}

impl fmt::Debug for FleetAuth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FleetAuth").finish_non_exhaustive()
    }
}

impl Auth for FleetAuth {
    fn sign(&self, request: &[u8], now_s: u64) -> Signed {
        let nonce = Nonce(rand::random());
        Signed { header: to_header(&self.gate.key().sign(nonce, now_s, &[b"http", request])), nonce }
    }

    fn check(&self, request: &[u8], header: &str, now_s: u64) -> Option<String> {
        let nonce = self.gate.check(&from_header(header.as_bytes())?, now_s, &[b"http", request]).ok()?;
        Some(to_header(&self.gate.key().sign_reply(nonce, &[b"http"])))
    }

    fn check_reply(&self, nonce: Nonce, header: &str) -> bool {
        from_header(header.as_bytes()).is_some_and(|tag| self.gate.key().check_reply(nonce, &tag, &[b"http"]))
    }

    fn members(&self) -> Vec<u8> {
        self.fleet.members_bytes().to_vec()
    }
}
