//! Which addresses are within this machine's own networks: private ranges, and prefixes that it has a link to.

use parking_lot::Mutex;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;
use std::time::Duration;
use tokio::time::Instant;

/// How long the routes are believed before they are read again.
const ROUTES_KEPT: Duration = Duration::from_secs(30);

/// Routes looked at.
const ROUTES_MAX: usize = 256;

/// A route for more addresses than this prefix has is a way out (a tunnel has no gateway either), not a link.
const LINK_BITS_MIN: (u8, u8) = (16, 48);

/// `RTF_REJECT`: a route that leads nowhere.
const REJECT: u32 = 0x200;

/// Tells near from far.
#[derive(Debug)]
pub struct Near {
    routes: Option<Mutex<(Option<Instant>, Vec<Link>)>>,
    /// Whether nobody is spoken to who is not on a link of this machine.
    links_only: bool,
}

/// A prefix, with IPv4 in its mapped form.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Link {
    net: u128,
    bits: u32,
}

impl Link {
    fn holds(self, ip: IpAddr) -> bool {
        let ip = match ip {
            IpAddr::V4(v4) => v4.to_ipv6_mapped(),
            IpAddr::V6(v6) => v6,
        };
        (u128::from(ip) ^ self.net).checked_shr(128 - self.bits).unwrap_or(0) == 0
    }
}

impl Near {
    /// As this machine's routes say, read from `/proc/net` now and then.
    pub fn of_machine() -> Self {
        Self { routes: Some(Mutex::new((None, Vec::new()))), links_only: false }
    }

    /// As [`Self::of_machine`], and whoever is not on one of its links is not spoken to at all: [`Self::allows`]. A private range
    /// behind a router is no link.
    pub fn links_of_machine_only() -> Self {
        Self { links_only: true, ..Self::of_machine() }
    }

    /// Every address is far, for tests.
    pub fn nobody() -> Self {
        Self { routes: None, links_only: false }
    }

    /// Whether `ip` is within this machine's networks.
    pub fn is_near(&self, ip: IpAddr) -> bool {
        let Some(routes) = &self.routes else { return false };
        let ip = ip.to_canonical();
        is_private(ip) || is_on_link(routes, ip)
    }

    /// Whether anything may be sent to `ip`, or taken from it.
    pub fn allows(&self, ip: IpAddr) -> bool {
        let ip = ip.to_canonical();
        match &self.routes {
            Some(routes) if self.links_only => is_of_link_itself(ip) || is_on_link(routes, ip),
            _ => true,
        }
    }
}

fn is_on_link(routes: &Mutex<(Option<Instant>, Vec<Link>)>, ip: IpAddr) -> bool {
    let mut routes = routes.lock();
    if routes.0.is_none_or(|read| read.elapsed() >= ROUTES_KEPT) {
        *routes = (Some(Instant::now()), links_of_machine());
    }
    routes.1.iter().any(|link| link.holds(ip))
}

/// Addresses that no router passes on.
fn is_of_link_itself(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(v4) => v4.is_loopback() || v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_loopback() || v6.is_unicast_link_local(),
    }
}

fn links_of_machine() -> Vec<Link> {
    let read = |name: &str| std::fs::read_to_string(Path::new("/proc/net").join(name)).unwrap_or_default();
    links(&read("route"), &read("ipv6_route"))
}

/// The prefixes that this machine has a link to, IPv4 in its mapped form, and their bits of 128.
pub(crate) fn prefixes_of_machine() -> Vec<(Ipv6Addr, u8)> {
    links_of_machine().into_iter().map(|link| (link.net.into(), u8::try_from(link.bits).expect("at most 128"))).collect()
}

fn is_private(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(v4) => v4.is_private() || v4.is_loopback() || v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_loopback() || v6.is_unique_local() || v6.is_unicast_link_local(),
    }
}

/// The links in `/proc/net/route` and `/proc/net/ipv6_route`.
fn links(v4: &str, v6: &str) -> Vec<Link> {
    let v4 = v4.lines().skip(1).take(ROUTES_MAX).filter_map(|line| {
        // Iface Destination Gateway Flags RefCnt Use Metric Mask ...: addresses as the machine stores a network-order u32.
        let mut words = line.split_ascii_whitespace().skip(1).map(|word| u32::from_str_radix(word, 16));
        let (destination, gateway, flags) = (words.next()?.ok()?, words.next()?.ok()?, words.next()?.ok()?);
        let bits = words.nth(3)?.ok()?.count_ones();
        let net = Ipv4Addr::from(destination.to_ne_bytes()).to_ipv6_mapped();
        let is_link = gateway == 0 && flags & REJECT == 0 && bits >= u32::from(LINK_BITS_MIN.0);
        is_link.then_some(Link { net: net.into(), bits: bits + 96 })
    });
    let v6 = v6.lines().take(ROUTES_MAX).filter_map(|line| {
        // Destination, its bits, source, its bits, next hop, metric, references, use, flags, Iface.
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        let address = |at: usize| u128::from_str_radix(words.get(at)?, 16).ok();
        let bits = u32::from_str_radix(words.get(1)?, 16).ok()?;
        let flags = u32::from_str_radix(words.get(8)?, 16).ok()?;
        let is_link = address(4)? == 0 && flags & REJECT == 0 && (u32::from(LINK_BITS_MIN.1)..=128).contains(&bits);
        is_link.then_some(Link { net: u128::from(Ipv6Addr::from(address(0)?)), bits })
    });
    v4.chain(v6).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    /// A default route or a tunnel for half of the internet taken for a link would give strangers this machine's whole uplink.
    #[test]
    fn links_of_a_machine() {
        // Default by a gateway; 198.51.100.0/24 on eth0; 0.0.0.0/1 into a tunnel; 203.0.113.0/24 unreachable.
        let v4 = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n\
                  eth0\t00000000\t016433C6\t0003\t0\t0\t0\t00000000\t0\t0\t0\n\
                  eth0\t006433C6\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n\
                  wg0\t00000000\t00000000\t0001\t0\t0\t0\t00000080\t0\t0\t0\n\
                  *\t007100CB\t00000000\t0200\t0\t0\t0\t00FFFFFF\t0\t0\t0\n";
        let v6 = "20010db8000100020000000000000000 40 00000000000000000000000000000000 00 00000000000000000000000000000000 00000100 00000001 00000000 00000001     eth0\n\
                  00000000000000000000000000000000 00 00000000000000000000000000000000 00 fe800000000000000000000000000001 00000400 00000001 00000000 00000003     eth0\n\
                  00000000000000000000000000000000 00 00000000000000000000000000000000 00 00000000000000000000000000000000 ffffffff 00000001 00000000 00200200       lo\n";
        let links = links(v4, v6);
        let check = |ip: &str, want: bool| assert_eq!(links.iter().any(|link| link.holds(ip.parse().unwrap())), want, "{ip}");
        assert_eq!(links.len(), 2);
        check("198.51.100.77", true);
        check("198.51.101.77", false);
        check("8.8.8.8", false);
        check("203.0.113.5", false);
        check("2001:db8:1:2::9", true);
        check("2001:db8:1:3::9", false);
        for (ip, want) in [("127.0.0.1", true), ("10.1.2.3", true), ("::ffff:192.168.1.1", true), ("fe80::1", true), ("fd00::1", true)] {
            assert_eq!(Near::of_machine().is_near(ip.parse().unwrap()), want, "{ip}");
        }
        assert!(!Near::of_machine().is_near("100.64.0.1".parse().unwrap()), "a carrier's NAT has strangers behind it");
        assert!(!Near::nobody().is_near("127.0.0.1".parse().unwrap()));
        // Without a wish for links only everybody is spoken to; with it not even a private range without a link.
        let stranger = "192.0.2.77".parse().unwrap();
        assert!(Near::of_machine().allows(stranger) && Near::nobody().allows(stranger));
        let closed = Near { routes: Some(Mutex::new((Some(Instant::now()), links))), links_only: true };
        assert!(closed.allows("198.51.100.77".parse().unwrap()) && !closed.allows("10.1.2.3".parse().unwrap()));
        assert!(!closed.allows(stranger) && !closed.allows("::ffff:192.0.2.77".parse().unwrap()));
        assert!(["127.0.0.1", "fe80::1", "169.254.1.1", "::1"].iter().all(|ip| closed.allows(ip.parse().unwrap())));
        assert!(super::links("garbage\nx y z\n", "1 2 3\n").is_empty());
    }
}
