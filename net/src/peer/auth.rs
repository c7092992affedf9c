//! How a member of the fleet shows in an HTTP request that it is one.

use crate::fleet::auth::Nonce;

/// The header that carries it, in requests and in answers.
pub const AUTH_HEADER: &str = "poolfs-auth";

/// The header of an answer whose bytes are of a file that is still arriving there: the giver has not seen that they are right.
pub(super) const ARRIVING_HEADER: &str = "poolfs-arriving";

/// What a request is sent with.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Signed {
    /// Value of [`AUTH_HEADER`].
    pub header: String,
    /// The nonce in it, which the answer must be signed over.
    pub nonce: Nonce,
}

/// The fleet's key, to those who may not have it.
///
/// What is signed is `METHOD PATH\nRANGE`, with the Range header's value or nothing; time and nonce are the signer's to add.
pub trait Auth: Send + Sync + 'static {
    /// Signs a request that goes out at `now_s`, in Unix seconds.
    fn sign(&self, request: &[u8], now_s: u64) -> Signed;

    /// Checks the header of a request that came in: key, age, and that its nonce is new. Gives the answer's header.
    fn check(&self, request: &[u8], header: &str, now_s: u64) -> Option<String>;

    /// Checks the header of the answer to a request with this nonce.
    fn check_reply(&self, nonce: Nonce, header: &str) -> bool;

    /// The members, as [`super::PeerClient::members`] hands them over.
    fn members(&self) -> Vec<u8>;
}

/// The bytes of a request that are signed.
pub(super) fn signed_bytes(method: &str, path: &str, range: &str) -> Vec<u8> {
    format!("{method} {path}\n{range}").into_bytes()
}

#[cfg(test)]
pub(crate) mod tests {
    //! An [`Auth`] for the tests of both ends.

    use super::*;
    use crate::fleet::auth::{Gate, from_header, to_header};

    /// The key alone, without a fleet around it.
    pub(crate) struct KeyAuth<Members> {
        gate: Gate,
        members: Members,
    }

    impl<Members: Fn() -> Vec<u8> + Send + Sync + 'static> KeyAuth<Members> {
        pub(crate) fn new(gate: Gate, members: Members) -> Self {
            Self { gate, members }
        }
    }

    impl<Members: Fn() -> Vec<u8> + Send + Sync + 'static> Auth for KeyAuth<Members> {
        fn sign(&self, request: &[u8], now_s: u64) -> Signed {
            let nonce = Nonce(rand::random());
            Signed { header: to_header(&self.gate.key().sign(nonce, now_s, &[request])), nonce }
        }

        fn check(&self, request: &[u8], header: &str, now_s: u64) -> Option<String> {
            let nonce = self.gate.check(&from_header(header.as_bytes())?, now_s, &[request]).ok()?;
            Some(to_header(&self.gate.key().sign_reply(nonce, &[])))
        }

        fn check_reply(&self, nonce: Nonce, header: &str) -> bool {
            from_header(header.as_bytes()).is_some_and(|tag| self.gate.key().check_reply(nonce, &tag, &[]))
        }

        fn members(&self) -> Vec<u8> {
            (self.members)()
        }
    }
}
