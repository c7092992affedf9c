//! Which addresses told by strangers are believed, and how they are grouped.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// Ports below this are never sent to and never stored: they belong to services that did not ask for it.
pub const PORT_MIN: u16 = 1024;

/// Whether strangers are in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Network {
    /// Anybody: BEP 42 ids, one contact per /24 or /48, no private addresses, silence until dialled back.
    Public,
    /// Configured as private: every address but multicast counts.
    Private,
}

/// BEP 32: two families, two tables, two stores.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(usize)]
pub enum Family {
    /// IPv4.
    V4 = 0,
    /// IPv6.
    V6 = 1,
}

impl Family {
    /// Both, in the order of arrays indexed by family.
    pub const ALL: [Self; 2] = [Self::V4, Self::V6];

    /// The family of an address in its canonical form.
    pub fn of(addr: SocketAddr) -> Self {
        if addr.is_ipv4() { Self::V4 } else { Self::V6 }
    }
}

/// The /24 or /48 of an address: what one administrator can be presumed to hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Prefix([u8; 7]);

impl Prefix {
    /// The prefix that `ip` is in.
    pub fn of(ip: IpAddr) -> Self {
        let mut out = [0; 7];
        match ip {
            IpAddr::V4(v4) => {
                out[0] = 4;
                out[1..4].copy_from_slice(&v4.octets()[..3]);
            }
            IpAddr::V6(v6) => {
                out[0] = 6;
                out[1..7].copy_from_slice(&v6.octets()[..6]);
            }
        }
        Self(out)
    }
}

/// Votes on this node's own address count once per group: the /16 or /32 of the voter; on a private network, which may be one
/// such group as a whole, the voter's address.
pub fn voter_group(ip: IpAddr, network: Network) -> IpAddr {
    match ip {
        _ if network == Network::Private => ip,
        IpAddr::V4(v4) => Ipv4Addr::from_bits(v4.to_bits() & 0xffff_0000).into(),
        IpAddr::V6(v6) => Ipv6Addr::from_bits(v6.to_bits() & (u128::from(u32::MAX) << 96)).into(),
    }
}

/// The socket address as the kernel gives it for the same peer on either kind of socket: no IPv4-mapped form, no flow
/// label; a scope id only where it matters (link-local).
pub fn canonical(addr: SocketAddr) -> SocketAddr {
    match addr {
        SocketAddr::V4(_) => addr,
        SocketAddr::V6(v6) => match v6.ip().to_ipv4_mapped() {
            Some(v4) => SocketAddr::new(v4.into(), v6.port()),
            None if v6.ip().is_unicast_link_local() => addr,
            None => SocketAddr::new((*v6.ip()).into(), v6.port()),
        },
    }
}

/// Whether a contact may be sent to, handed on or stored.
pub fn is_usable(addr: SocketAddr, network: Network) -> bool {
    addr.port() >= PORT_MIN
        && match network {
            Network::Private => match addr.ip() {
                IpAddr::V4(v4) => !v4.is_unspecified() && !v4.is_multicast() && !v4.is_broadcast(),
                IpAddr::V6(v6) => !v6.is_unspecified() && !v6.is_multicast(),
            },
            Network::Public => is_global(addr.ip()),
        }
}

/// Whether an address can be met on the public Internet.
pub fn is_global(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(v4) => is_global_v4(v4),
        IpAddr::V6(v6) => is_global_v6(v6),
    }
}

fn is_global_v4(ip: Ipv4Addr) -> bool {
    let [a, b, c, _] = ip.octets();
    !(a == 0
        || a >= 240
        || ip.is_private()
        || ip.is_loopback()
        || ip.is_link_local()
        || ip.is_multicast()
        || ip.is_documentation()
        || (a == 100 && (64..128).contains(&b)) // Shared by carriers' NATs, RFC 6598.
        || (a == 198 && (18..20).contains(&b)) // Benchmarks, RFC 2544.
        || (a, b, c) == (192, 0, 0))
}

fn is_global_v6(ip: Ipv6Addr) -> bool {
    let first = ip.segments()[0];
    // Only 2000::/3 is assigned to anybody; of it, documentation, Teredo and 6to4 lead elsewhere.
    (0x2000..0x4000).contains(&first) && first != 0x2002 && !(first == 0x2001 && matches!(ip.segments()[1], 0x0db8 | 0))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    /// A stranger who names a private address or a service's port makes this machine knock there.
    #[test]
    fn strangers_addresses() {
        let check = |addr: &str, public, private| {
            let addr: SocketAddr = addr.parse().unwrap();
            assert_eq!((is_usable(addr, Network::Public), is_usable(addr, Network::Private)), (public, private), "{addr}");
        };
        check("8.8.8.8:1024", true, true);
        check("8.8.8.8:1023", false, false);
        check("8.8.8.8:25", false, false);
        check("8.8.8.8:0", false, false);
        for private in [
            "10.1.2.3",
            "172.16.0.1",
            "192.168.1.1",
            "127.0.0.1",
            "169.254.1.1",
            "100.64.0.1",
            "192.0.2.1",
            "[::1]",
            "[fe80::1]",
            "[fd00::1]",
            "[2001:db8::1]",
        ] {
            check(&format!("{private}:9977"), false, true);
        }
        for never in ["0.0.0.0", "224.0.0.1", "255.255.255.255", "[::]", "[ff02::1]"] {
            check(&format!("{never}:9977"), false, false);
        }
        check("[2606:4700::1111]:9977", true, true);
    }

    /// One peer must be one contact on whichever socket it is heard.
    #[test]
    fn one_form() {
        assert_eq!(canonical("[::ffff:192.0.2.1]:9".parse().unwrap()), "192.0.2.1:9".parse().unwrap());
        assert_eq!(Prefix::of("192.0.2.1".parse().unwrap()), Prefix::of("192.0.2.250".parse().unwrap()));
        assert_ne!(Prefix::of("192.0.2.1".parse().unwrap()), Prefix::of("192.0.3.1".parse().unwrap()));
        assert_eq!(Prefix::of("2001:db8:1:2::1".parse().unwrap()), Prefix::of("2001:db8:1:3::1".parse().unwrap()));
        let group = |ip: &str, network| voter_group(ip.parse().unwrap(), network).to_string();
        assert_eq!(group("192.0.2.1", Network::Public), "192.0.0.0");
        assert_eq!(group("2001:db8:1:2::1", Network::Public), "2001:db8::");
        assert_eq!(group("192.0.2.1", Network::Private), "192.0.2.1");
    }
}
