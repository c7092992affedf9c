//! How a member of the fleet shows in an HTTP request that it is one.

/// The header that carries it, in requests and in answers.
pub const AUTH_HEADER: &str = "poolfs-auth";

/// What a request is sent with.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Signed {
    /// Value of [`AUTH_HEADER`].
    pub header: String,
    /// The nonce in it, which the answer must be signed over.
    pub nonce: [u8; 16],
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
    fn check_reply(&self, nonce: &[u8; 16], header: &str) -> bool;

    /// The members, as [`super::PeerClient::members`] hands them over.
    fn members(&self) -> Vec<u8>;
}

/// The bytes of a request that are signed.
pub(super) fn signed_bytes(method: &str, path: &str, range: &str) -> Vec<u8> {
    format!("{method} {path}\n{range}").into_bytes()
}
