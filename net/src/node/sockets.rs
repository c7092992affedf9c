//! One UDP socket per family.

use super::StartError;
use crate::dht::Family;
use crate::krpc::DATAGRAM_BYTES_IN_MAX;
use crate::peer::Near;
use socket2::{Domain, Protocol, SockAddr, SockRef, Socket, Type};
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use tokio::net::{TcpListener, UdpSocket};

/// Room for a second of answers to the own lookups; a kernel with a lower limit gives less.
const RECEIVE_BUFFER_BYTES: usize = 1 << 20;

/// Datagrams taken from one socket before the other work gets its turn.
const BATCH_MAX: usize = 64;

/// Connections that wait to be accepted.
const TCP_BACKLOG: i32 = 128;

/// How often another port is tried where the two families are to share a free one.
const PORT_TRIES: usize = 16;

#[derive(Debug)]
pub(super) struct Sockets {
    of: [Option<UdpSocket>; 2],
    /// Who is sent to and heard; `None`: everybody.
    within: Option<Arc<Near>>,
}

/// What one configured address means: `[::]` stands for both families, as people expect of it.
pub fn expand_listen(address: SocketAddr) -> Vec<SocketAddr> {
    if address.is_ipv6() && address.ip().is_unspecified() {
        vec![address, (Ipv4Addr::UNSPECIFIED, address.port()).into()]
    } else {
        vec![address]
    }
}

impl Sockets {
    /// Binds `listen`. Two wildcard addresses where one family is switched off in the kernel bind the other only.
    pub(super) fn bind(listen: &[SocketAddr]) -> Result<Self, StartError> {
        match listen {
            [_] => {}
            [one, other] if Family::of(*one) != Family::of(*other) => {}
            _ => return Err(StartError::Listen(listen.len())),
        }
        let mut tries = if listen.len() == 2 && listen.iter().all(|address| address.port() == 0) { PORT_TRIES } else { 1 };
        loop {
            tries -= 1;
            match Self::bind_once(listen) {
                Err(StartError::Bind { source, .. }) if source.kind() == io::ErrorKind::AddrInUse && tries > 0 => {}
                bound => return bound,
            }
        }
    }

    fn bind_once(listen: &[SocketAddr]) -> Result<Self, StartError> {
        let mut of = [None, None];
        let mut taken_port = None;
        let mut missing = None;
        for address in listen {
            let mut wanted = *address;
            if let (0, Some(port)) = (wanted.port(), taken_port) {
                wanted.set_port(port);
            }
            let failed = |source| StartError::Bind { address: wanted, source };
            match bind_one(wanted) {
                Ok(socket) => {
                    taken_port = Some(socket.local_addr().map_err(failed)?.port());
                    of[Family::of(wanted) as usize] = Some(socket);
                }
                Err(source) if wanted.ip().is_unspecified() && is_family_missing(&source) => missing = Some(failed(source)),
                Err(source) => return Err(failed(source)),
            }
        }
        match missing {
            Some(err) if taken_port.is_none() => Err(err),
            _ => Ok(Self { of, within: None }),
        }
    }

    /// Sends to nobody and hears nobody else from now on.
    pub(super) fn keep_within(&mut self, within: Option<Arc<Near>>) {
        self.within = within;
    }

    /// Whether that address is spoken to.
    pub(super) fn allows(&self, address: SocketAddr) -> bool {
        self.within.as_ref().is_none_or(|within| within.allows(address.ip()))
    }

    pub(super) fn local(&self) -> [Option<SocketAddr>; 2] {
        [0, 1].map(|family: usize| self.of[family].as_ref().and_then(|socket| socket.local_addr().ok()))
    }

    /// Waits until a socket has something.
    pub(super) async fn readable(&self) {
        let one = async |family: usize| match &self.of[family] {
            // An error of the reactor would come back at the read, and be passed over there.
            Some(socket) => {
                let _ = socket.readable().await;
            }
            None => std::future::pending().await,
        };
        tokio::select! {
            () = one(0) => {}
            () = one(1) => {}
        }
    }

    /// Takes what is there, at most some dozens of each family.
    pub(super) fn receive(&self, mut each: impl FnMut(SocketAddr, &[u8])) {
        // One more than is read, so that a longer datagram does not look like one of the longest length.
        let mut buffer = [0; DATAGRAM_BYTES_IN_MAX + 1];
        for socket in self.of.iter().flatten() {
            for _ in 0..BATCH_MAX {
                match socket.try_recv_from(&mut buffer) {
                    Ok((len, from)) if self.allows(from) => each(from, &buffer[..len]),
                    Ok(_) => {}
                    Err(err) if err.kind() == io::ErrorKind::WouldBlock => break,
                    // The network went, or a filter refused: the next datagram may fare better.
                    Err(err) => tracing::debug!(%err, "receive"),
                }
            }
        }
    }

    /// Sends if the kernel takes it now; what it refuses is lost like any datagram, and said to be so by `false`.
    pub(super) fn send(&self, to: SocketAddr, bytes: &[u8]) -> bool {
        // Past the reactor, which at first does not know that a socket can be written and would lose the first queries.
        self.allows(to)
            && self.of[Family::of(to) as usize].as_ref().is_some_and(|socket| SockRef::from(socket).send_to(bytes, &to.into()).is_ok())
    }
}

/// Listens on TCP beside a node's UDP socket; an IPv6 wildcard leaves IPv4 alone, so that both families can have the port.
pub fn listen_tcp(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM.nonblocking().cloexec(), Some(Protocol::TCP))?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    // A restart must not wait for the last connections' time to run out.
    socket.set_reuse_address(true)?;
    socket.bind(&SockAddr::from(address))?;
    socket.listen(TCP_BACKLOG)?;
    TcpListener::from_std(socket.into())
}

fn bind_one(address: SocketAddr) -> io::Result<UdpSocket> {
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM.nonblocking().cloexec(), Some(Protocol::UDP))?;
    if address.is_ipv6() {
        // Two stores, two tables, two sockets: a mapped address must not appear.
        socket.set_only_v6(true)?;
    }
    if let Err(err) = socket.set_recv_buffer_size(RECEIVE_BUFFER_BYTES) {
        tracing::debug!(%err, "receive buffer stays as the kernel gives it");
    }
    socket.bind(&SockAddr::from(address))?;
    UdpSocket::from_std(socket.into())
}

fn is_family_missing(err: &io::Error) -> bool {
    err.kind() == io::ErrorKind::AddrNotAvailable || err.raw_os_error() == Some(libc::EAFNOSUPPORT)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    /// A flood that is read to its end would keep commands and timeouts waiting for as long as it lasts.
    #[tokio::test]
    async fn a_flood_is_taken_in_batches() {
        const MORE: usize = 10;
        let sockets = Sockets::bind(&[(Ipv4Addr::LOCALHOST, 0).into()]).unwrap();
        let sender = std::net::UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        for n in 0..BATCH_MAX + MORE {
            sender.send_to(&n.to_be_bytes(), sockets.local()[0].unwrap()).unwrap();
        }
        let take = async || {
            sockets.readable().await;
            let mut taken = Vec::new();
            sockets.receive(|from, bytes| {
                assert_eq!(from, sender.local_addr().unwrap());
                taken.push(usize::from_be_bytes(bytes.try_into().unwrap()));
            });
            taken
        };
        assert_eq!(take().await, (0..BATCH_MAX).collect::<Vec<_>>());
        assert_eq!(take().await, (BATCH_MAX..BATCH_MAX + MORE).collect::<Vec<_>>(), "the rest waits in the kernel");
    }
}
