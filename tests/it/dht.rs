//! The DHT against other implementations and over real sockets.
//!
//! libtorrent's nodes live in child processes ([`libtorrent`]), `mainline`'s and poolfs's in the test. Every IPv4 node
//! has a loopback address of its own, since libtorrent counts and blocks by address.

mod libtorrent;

use std::net::{IpAddr, Ipv4Addr};
use std::sync::atomic::{AtomicU32, Ordering};

/// A loopback address that no other node of this run has.
fn loopback() -> IpAddr {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let n = NEXT.fetch_add(1, Ordering::Relaxed) + (std::process::id() << 8);
    let [_, b, c, d] = n.to_be_bytes();
    // 127.0/16 is the machine's own; .0 and .255 look like networks.
    Ipv4Addr::new(127, b.max(1), c, d.clamp(1, 254)).into()
}
