//! Announce tokens: proof that who announces receives at the address it sends from.
//!
//! Eight bytes of HMAC-SHA256(secret, address), bound to the address and not to port or key, so that one walk serves many
//! announces. The secret changes every [`SECRET_LIFE`]; this one's and the last one's tokens are valid.

use hmac::{Hmac, KeyInit as _, Mac as _};
use sha2::Sha256;
use std::net::IpAddr;
use std::time::{Duration, Instant};
use subtle::ConstantTimeEq as _;

/// How long one secret makes tokens. A token is good for one to two of these.
pub const SECRET_LIFE: Duration = Duration::from_secs(5 * 60);

/// Length of this node's tokens.
pub const TOKEN_BYTES: usize = 8;

/// Makes and checks tokens.
#[derive(Debug)]
pub struct Tokens {
    secrets: [[u8; 16]; 2],
    changed: Instant,
}

impl Tokens {
    /// Starts with one secret; nothing made by an earlier run is valid.
    pub fn new(secret: [u8; 16], other: [u8; 16], now: Instant) -> Self {
        Self { secrets: [secret, other], changed: now }
    }

    /// Changes the secret when it is time; `secret` makes a random one. To be called before each use.
    pub fn rotate(&mut self, now: Instant, mut secret: impl FnMut() -> [u8; 16]) {
        let due = now.saturating_duration_since(self.changed).as_secs() / SECRET_LIFE.as_secs();
        // Two changes make everything before void; a long sleep needs no more of them.
        for _ in 0..due.min(2) {
            self.secrets = [secret(), self.secrets[0]];
        }
        if due > 0 {
            self.changed = now;
        }
    }

    /// The token for an address.
    pub fn make(&self, ip: IpAddr) -> [u8; TOKEN_BYTES] {
        token(&self.secrets[0], ip)
    }

    /// Whether `bytes` is a token made for this address with either secret; takes the same time whichever byte differs.
    pub fn check(&self, ip: IpAddr, bytes: &[u8]) -> bool {
        let [this, last] = self.secrets.map(|secret| token(&secret, ip).as_slice().ct_eq(bytes));
        (this | last).into()
    }
}

fn token(secret: &[u8; 16], ip: IpAddr) -> [u8; TOKEN_BYTES] {
    let mut mac = Hmac::<Sha256>::new_from_slice(secret).expect("HMAC takes keys of any length");
    match ip {
        IpAddr::V4(v4) => mac.update(&v4.octets()),
        IpAddr::V6(v6) => mac.update(&v6.octets()),
    }
    let mut out = [0; TOKEN_BYTES];
    out.copy_from_slice(&mac.finalize().into_bytes()[..TOKEN_BYTES]);
    out
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    /// A token lives through one change of the secret and not through two, and is worth nothing from another address.
    #[test]
    fn two_secrets_are_valid() {
        let start = Instant::now();
        let mut next = 0;
        let mut secret = || {
            next += 1;
            [next; 16]
        };
        let mut tokens = Tokens::new(secret(), secret(), start);
        let (me, you): (IpAddr, IpAddr) = ("192.0.2.1".parse().unwrap(), "192.0.2.2".parse().unwrap());
        let token = tokens.make(me);
        assert!(tokens.check(me, &token) && !tokens.check(you, &token) && !tokens.check(me, &token[1..]) && !tokens.check(me, b""));
        tokens.rotate(start + SECRET_LIFE - Duration::from_secs(1), &mut secret);
        assert_eq!(tokens.make(me), token);
        tokens.rotate(start + SECRET_LIFE, &mut secret);
        assert!(tokens.make(me) != token && tokens.check(me, &token));
        tokens.rotate(start + 2 * SECRET_LIFE, &mut secret);
        assert!(!tokens.check(me, &token));
        let newest = tokens.make(me);
        tokens.rotate(start + 9 * SECRET_LIFE, &mut secret);
        assert!(!tokens.check(me, &newest));
    }
}
