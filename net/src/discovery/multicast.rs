//! The sockets of the link-local groups.
//!
//! One receiving socket per interface and family, bound to the group's own address, so that the kernel hands over what was sent to the
//! group on this link and nothing that was sent to the machine from elsewhere. IPv6 is sent from a socket bound to the
//! interface's own global address: the kernel would choose a link-local source, which nobody could hand on.

use super::hello::HELLO_BYTES_MAX;
use crate::told::{How, Told};
use socket2::{Domain, InterfaceIndexOrAddress, Protocol, SockAddr, Socket, Type};
use std::collections::HashMap;
use std::fs;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::sync::Arc;
use tokio::net::UdpSocket;
use tokio::sync::mpsc;
use tokio::task::AbortHandle;

/// The groups' UDP port: not the one of KRPC, which is bound once, while every node of a machine listens here.
pub const GROUP_PORT: u16 = 9978;

const GROUP_V4: Ipv4Addr = Ipv4Addr::new(239, 255, 80, 70);
const GROUP_V6: Ipv6Addr = Ipv6Addr::new(0xff12, 0, 0, 0, 0, 0x706f, 0x6f6c, 0x6673);

/// Interfaces used; a router with more VLANs than this uses the first ones by index.
const LINKS_MAX: usize = 16;

/// Flags of `/proc/net/if_inet6` that make an address a poor source: temporary, failed, deprecated, tentative.
const POOR_SOURCE: u32 = 0x01 | 0x08 | 0x20 | 0x40;

/// On which interfaces hellos are sent and heard.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Links {
    /// Interface names; empty: all but the loopback.
    pub names: Vec<String>,
    /// The port of the groups, [`GROUP_PORT`] except in tests.
    pub port: u16,
}

impl Default for Links {
    fn default() -> Self {
        Self { names: Vec::new(), port: GROUP_PORT }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Family {
    V4,
    V6,
}

#[derive(Debug)]
struct Link {
    send: Arc<UdpSocket>,
    to: SocketAddr,
    /// The address that `send` is bound to, for IPv6.
    source: Option<Ipv6Addr>,
    receiver: AbortHandle,
}

impl Drop for Link {
    fn drop(&mut self) {
        self.receiver.abort();
    }
}

/// The open sockets of all links.
#[derive(Debug)]
pub(super) struct Multicast {
    links: Links,
    open: HashMap<(Family, u32), Link>,
    heard: mpsc::Sender<(SocketAddr, Vec<u8>)>,
    told: Told,
}

impl Multicast {
    /// Nothing is open before [`Self::rescan`]. What comes in goes to `heard`; if that is full it is dropped.
    pub(super) fn new(links: Links, heard: mpsc::Sender<(SocketAddr, Vec<u8>)>, told: Told) -> Self {
        Self { links, open: HashMap::new(), heard, told }
    }

    /// Opens sockets on interfaces that came, closes those on interfaces that went.
    pub(super) fn rescan(&mut self) {
        let wanted = interfaces(&self.links.names);
        self.open.retain(|(family, index), link| {
            wanted.iter().any(|wanted| (wanted.family, wanted.index) == (*family, *index) && wanted.source == link.source)
        });
        for interface in wanted {
            let key = (interface.family, interface.index);
            if self.open.contains_key(&key) {
                continue;
            }
            match self.open_link(&interface) {
                Ok(link) => {
                    tracing::debug!(interface = interface.name, family = ?interface.family, "listening for hellos");
                    self.open.insert(key, link);
                }
                Err(err) => tracing::debug!(interface = interface.name, family = ?interface.family, %err, "no hellos here"),
            }
        }
    }

    /// Sends the hello of its family to every link. One that fails (it went down) is closed until the next scan.
    pub(super) async fn send(&mut self, hellos: [Option<Vec<u8>>; 2]) {
        let mut failed = Vec::new();
        for (key, link) in &self.open {
            let Some(hello) = &hellos[usize::from(key.0 == Family::V6)] else { continue };
            self.told.say(link.to, || How::Hello { bytes: hello.clone() });
            if let Err(err) = link.send.send_to(hello, link.to).await {
                tracing::debug!(to = %link.to, %err, "cannot say hello");
                failed.push(*key);
            }
        }
        for key in failed {
            self.open.remove(&key);
        }
    }

    fn open_link(&self, interface: &Interface) -> io::Result<Link> {
        let (receive, send, to) = match interface.family {
            Family::V4 => {
                let socket = new_socket(Domain::IPV4)?;
                socket.bind_device(Some(interface.name.as_bytes()))?;
                socket.set_multicast_all_v4(false)?;
                socket.set_multicast_ttl_v4(1)?;
                socket.set_multicast_loop_v4(true)?;
                let group = SocketAddrV4::new(GROUP_V4, self.links.port);
                socket.bind(&SockAddr::from(group))?;
                socket.join_multicast_v4_n(&GROUP_V4, &InterfaceIndexOrAddress::Index(interface.index))?;
                let socket = Arc::new(UdpSocket::from_std(socket.into())?);
                (Arc::clone(&socket), socket, SocketAddr::from(group))
            }
            Family::V6 => {
                let socket = new_socket(Domain::IPV6)?;
                socket.set_only_v6(true)?;
                socket.set_multicast_all_v6(false)?;
                let group = SocketAddrV6::new(GROUP_V6, self.links.port, 0, interface.index);
                socket.bind(&SockAddr::from(group))?;
                socket.join_multicast_v6(&GROUP_V6, interface.index)?;
                let source = interface.source.ok_or(io::ErrorKind::AddrNotAvailable)?;
                let send = new_socket(Domain::IPV6)?;
                send.set_only_v6(true)?;
                send.set_multicast_hops_v6(1)?;
                send.set_multicast_loop_v6(true)?;
                send.set_multicast_if_v6(interface.index)?;
                send.bind(&SockAddr::from(SocketAddrV6::new(source, 0, 0, 0)))?;
                (Arc::new(UdpSocket::from_std(socket.into())?), Arc::new(UdpSocket::from_std(send.into())?), SocketAddr::from(group))
            }
        };
        let receiver = tokio::spawn(receive_all(receive, self.heard.clone())).abort_handle();
        Ok(Link { send, to, source: interface.source, receiver })
    }
}

fn new_socket(domain: Domain) -> io::Result<Socket> {
    let socket = Socket::new(domain, Type::DGRAM.nonblocking().cloexec(), Some(Protocol::UDP))?;
    // Several nodes on one machine all hear the group.
    socket.set_reuse_address(true)?;
    Ok(socket)
}

async fn receive_all(socket: Arc<UdpSocket>, heard: mpsc::Sender<(SocketAddr, Vec<u8>)>) {
    // One more than the longest hello, so that a longer datagram does not look like one that was cut.
    let mut buffer = [0; HELLO_BYTES_MAX + 1];
    loop {
        match socket.recv_from(&mut buffer).await {
            Ok((len, from)) => match heard.try_send((from, buffer[..len].to_vec())) {
                Ok(()) | Err(mpsc::error::TrySendError::Full(_)) => {}
                Err(mpsc::error::TrySendError::Closed(_)) => return,
            },
            Err(err) => {
                tracing::debug!(%err, "hello socket");
                return;
            }
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Interface {
    family: Family,
    index: u32,
    name: String,
    source: Option<Ipv6Addr>,
}

/// The interfaces with multicast, from the kernel's own lists of this network namespace.
fn interfaces(names: &[String]) -> Vec<Interface> {
    // A family that is switched off has no file. Of this thread, which may be in another namespace than the process.
    let read = |name: &str| fs::read_to_string(format!("/proc/thread-self/net/{name}")).unwrap_or_default();
    parse_interfaces(names, &read("igmp"), &read("if_inet6"))
}

fn parse_interfaces(names: &[String], igmp: &str, if_inet6: &str) -> Vec<Interface> {
    let is_wanted = |name: &str| if names.is_empty() { name != "lo" } else { names.iter().any(|wanted| wanted == name) };
    let mut found: Vec<Interface> = Vec::new();
    // "4\teth0      :     1      V3", then indented lines of its groups.
    for line in igmp.lines().skip(1).filter(|line| !line.starts_with(char::is_whitespace)) {
        let mut words = line.split_whitespace();
        if let (Some(Ok(index)), Some(name)) = (words.next().map(str::parse), words.next()) {
            let name = name.trim_end_matches(':');
            if is_wanted(name) {
                found.push(Interface { family: Family::V4, index, name: name.to_owned(), source: None });
            }
        }
    }
    // "20010db8000000000000000000000001 04 40 00 80     eth0": address, index, prefix, scope, flags, all hexadecimal.
    for line in if_inet6.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        let [address, index, _prefix, scope, flags, name] = words[..] else { continue };
        let hex = |text| u32::from_str_radix(text, 16).ok();
        let (Ok(address), Some(index), Some(scope), Some(flags)) = (u128::from_str_radix(address, 16), hex(index), hex(scope), hex(flags))
        else {
            continue;
        };
        // 0 is global, 0x10 the loopback's own; 0x20 is link-local.
        let usable = matches!(scope, 0 | 0x10) && flags & POOR_SOURCE == 0;
        let first = !found.iter().any(|other| other.family == Family::V6 && other.index == index);
        if usable && first && is_wanted(name) {
            found.push(Interface { family: Family::V6, index, name: name.to_owned(), source: Some(address.into()) });
        }
    }
    found.sort_by_key(|interface| interface.index);
    let mut indexes: Vec<u32> = found.iter().map(|interface| interface.index).collect();
    indexes.dedup();
    indexes.truncate(LINKS_MAX);
    found.retain(|interface| indexes.contains(&interface.index));
    found
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::super::shell::HEARD_QUEUE_MAX;
    use super::*;
    use socket2::SockRef;

    /// A wrong reading of the kernel's tables would leave a link silent or take a privacy address for the machine's own.
    #[test]
    fn kernel_lists_are_read() {
        let igmp = "Idx\tDevice    : Count Querier\tGroup    Users Timer\tReporter\n1\tlo        :     1      V3\n\t\t\t\t010000E0     1 0:00000000\t\t0\n4\teth0      :     1      V3\n\t\t\t\t010000E0     1 0:00000000\t\t0\n";
        let if_inet6 = "\
            00000000000000000000000000000001 01 80 10 80       lo\n\
            fe80000000000000001122fffe334455 04 40 20 80     eth0\n\
            20010db8000000000000000000000aaa 04 40 00 01     eth0\n\
            20010db8000000000000000000000001 04 40 00 80     eth0\n\
            20010db8000000000000000000000002 04 40 00 80     eth0\n";
        let v4 = |index, name: &str| Interface { family: Family::V4, index, name: name.to_owned(), source: None };
        let v6 = |index, name: &str, source: &str| Interface {
            family: Family::V6,
            index,
            name: name.to_owned(),
            source: Some(source.parse().expect("an address")),
        };
        assert_eq!(parse_interfaces(&[], igmp, if_inet6), [v4(4, "eth0"), v6(4, "eth0", "2001:db8::1")]);
        assert_eq!(parse_interfaces(&["lo".to_owned()], igmp, if_inet6), [v4(1, "lo"), v6(1, "lo", "::1")]);
        assert_eq!(parse_interfaces(&["eth1".to_owned()], igmp, if_inet6), []);
        assert_eq!(parse_interfaces(&[], "", "x\ny z\n"), []);
    }

    /// A machine with a thousand virtual interfaces must not open thousands of sockets.
    #[test]
    fn links_are_bounded() {
        let igmp: String = std::iter::once("Idx\n".to_owned()).chain((0..100).map(|n| format!("{n}\tveth{n} : 1 V3\n"))).collect();
        let found = parse_interfaces(&[], &igmp, "");
        assert_eq!(found.len(), LINKS_MAX);
        assert_eq!(found[LINKS_MAX - 1].index, 15);
    }

    /// A link that is flooded with hellos while this node is busy must cost it no more memory than the queue, and must not leave it
    /// deaf afterwards.
    #[tokio::test]
    async fn hellos_past_the_queue_are_dropped() {
        const MORE: usize = 100;
        /// Few enough for the smallest receive buffer of a kernel.
        const AT_ONCE: usize = 20;
        let socket = Arc::new(UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap());
        let (heard_in, mut heard) = mpsc::channel(HEARD_QUEUE_MAX);
        let task = tokio::spawn(receive_all(Arc::clone(&socket), heard_in));
        let sender = std::net::UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        for n in 0..HEARD_QUEUE_MAX + MORE {
            sender.send_to(&n.to_be_bytes(), socket.local_addr().unwrap()).unwrap();
            if n % AT_ONCE == 0 || n + 1 == HEARD_QUEUE_MAX + MORE {
                // Until the kernel has no more of them.
                while SockRef::from(&*socket).peek_sender().is_ok() {
                    assert!(!task.is_finished(), "deaf after {n}");
                    tokio::task::yield_now().await;
                }
            }
        }
        let mut numbers = Vec::new();
        while let Ok((_, bytes)) = heard.try_recv() {
            numbers.push(usize::from_be_bytes(bytes.try_into().unwrap()));
        }
        assert_eq!(numbers, (0..HEARD_QUEUE_MAX).collect::<Vec<_>>());
        sender.send_to(b"later", socket.local_addr().unwrap()).unwrap();
        assert_eq!(heard.recv().await.unwrap().1, b"later");
        drop(heard);
        sender.send_to(b"last", socket.local_addr().unwrap()).unwrap();
        task.await.unwrap();
    }
}
