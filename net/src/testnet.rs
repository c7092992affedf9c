//! A network in a box for tests: real sockets, and a router between them that loses, repeats and reorders datagrams.
//!
//! Behind the feature `testnet`; nothing of it is in the daemon.
//!
//! A node that is attached to the [`Router`] gets a public address, a socket of the router's. What another attached node
//! sends there arrives at the node as if it came from the sender's public address. So nodes know each other by public
//! addresses only, every datagram between them passes [`Verdict`] by a rule of the test's, and stands in the trace.

use parking_lot::Mutex;
use socket2::SockRef;
use std::collections::HashMap;
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;
use tokio::net::UdpSocket;
use tokio::sync::watch;
use tokio::task::JoinSet;

/// Datagrams that a trace remembers; later ones are forwarded and forgotten.
pub const TRACE_MAX: usize = 200_000;

/// What becomes of one datagram.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It arrives.
    Pass,
    /// It is lost.
    Drop,
    /// It arrives this many times.
    Repeat(u8),
    /// It arrives after the next one of the same direction.
    AfterNext,
}

/// One datagram on its way.
#[derive(Debug, Clone)]
pub struct Packet {
    /// Public address of the sender.
    pub from: SocketAddr,
    /// Public address of the receiver.
    pub to: SocketAddr,
    /// How many came this way before.
    pub index: usize,
    /// The payload.
    pub bytes: Vec<u8>,
}

/// One datagram and what became of it.
#[derive(Debug, Clone)]
pub struct Traced {
    /// When it reached the router.
    pub at: Instant,
    /// The datagram.
    pub packet: Packet,
    /// What was done with it.
    pub verdict: Verdict,
}

type Rule = Box<dyn FnMut(&Packet) -> Verdict + Send>;

struct State {
    rule: Rule,
    /// Of each attached node: its private and public address, and the socket behind the latter.
    ports: Vec<Port>,
    sent: HashMap<(SocketAddr, SocketAddr), usize>,
    held: HashMap<(SocketAddr, SocketAddr), Vec<Vec<u8>>>,
    trace: Vec<Traced>,
    tasks: JoinSet<()>,
}

#[derive(Clone)]
struct Port {
    private: SocketAddr,
    public: SocketAddr,
    socket: Arc<UdpSocket>,
}

/// The router. Its sockets close when it is dropped.
pub struct Router {
    state: Arc<Mutex<State>>,
    passed: watch::Sender<usize>,
}

impl fmt::Debug for Router {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Router").field("ports", &self.state.lock().ports.len()).finish_non_exhaustive()
    }
}

impl Router {
    /// A router that asks `rule` about each datagram.
    pub fn new(rule: impl FnMut(&Packet) -> Verdict + Send + 'static) -> Self {
        let state = State {
            rule: Box::new(rule),
            ports: Vec::new(),
            sent: HashMap::new(),
            held: HashMap::new(),
            trace: Vec::new(),
            tasks: JoinSet::new(),
        };
        Self { state: Arc::new(Mutex::new(state)), passed: watch::Sender::new(0) }
    }

    /// Another rule from now on.
    pub fn set_rule(&self, rule: impl FnMut(&Packet) -> Verdict + Send + 'static) {
        self.state.lock().rule = Box::new(rule);
    }

    /// Gives the node at `private` a public address, on the same IP address.
    pub async fn attach(&self, private: SocketAddr) -> io::Result<SocketAddr> {
        let socket = Arc::new(UdpSocket::bind(SocketAddr::new(private.ip(), 0)).await?);
        let public = socket.local_addr()?;
        let mut state = self.state.lock();
        state.ports.push(Port { private, public, socket: Arc::clone(&socket) });
        let (shared, passed) = (Arc::clone(&self.state), self.passed.clone());
        state.tasks.spawn(async move {
            let mut buffer = [0; 2048];
            loop {
                // An ICMP error of an earlier send is reported here; the node that it is about may come back.
                if let Ok((len, private_from)) = socket.recv_from(&mut buffer).await {
                    forward(&shared, private_from, public, buffer[..len].to_vec());
                    passed.send_modify(|passed| *passed += 1);
                }
            }
        });
        Ok(public)
    }

    /// The datagrams so far, in order of arrival, at most [`TRACE_MAX`].
    pub fn trace(&self) -> Vec<Traced> {
        self.state.lock().trace.clone()
    }

    /// Waits until the trace satisfies `want`, which is asked again after each datagram.
    pub async fn wait_for(&self, mut want: impl FnMut(&[Traced]) -> bool) -> Vec<Traced> {
        let mut passed = self.passed.subscribe();
        loop {
            passed.borrow_and_update();
            {
                let state = self.state.lock();
                if want(&state.trace) {
                    return state.trace.clone();
                }
            }
            passed.changed().await.expect("the sender is self's");
        }
    }
}

fn forward(shared: &Mutex<State>, private_from: SocketAddr, to: SocketAddr, bytes: Vec<u8>) {
    let mut state = shared.lock();
    let sender = state.ports.iter().find(|port| port.private == private_from).cloned();
    let receiver = state.ports.iter().find(|port| port.public == to).cloned();
    // From nobody attached: the box is closed.
    let (Some(sender), Some(receiver)) = (sender, receiver) else { return };
    let way = (sender.public, to);
    let sent = state.sent.entry(way).or_default();
    let packet = Packet { from: sender.public, to, index: *sent, bytes };
    *sent += 1;
    let verdict = (state.rule)(&packet);
    // As on a real link: a full socket buffer loses the datagram.
    let deliver = |bytes: &[u8]| drop(SockRef::from(&*sender.socket).send_to(bytes, &receiver.private.into()));
    let copies = match verdict {
        Verdict::Drop => 0,
        Verdict::Pass => 1,
        Verdict::Repeat(times) => times,
        Verdict::AfterNext => {
            state.held.entry(way).or_default().push(packet.bytes.clone());
            0
        }
    };
    (0..copies).for_each(|_| deliver(&packet.bytes));
    if verdict != Verdict::AfterNext {
        state.held.remove(&way).unwrap_or_default().iter().for_each(|held| deliver(held));
    }
    if state.trace.len() < TRACE_MAX {
        state.trace.push(Traced { at: Instant::now(), packet, verdict });
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    /// A router that lost what it should pass, or showed private addresses, would make the tests built on it say nothing.
    #[tokio::test]
    async fn rules_are_kept_and_traced() {
        let router = Router::new(|packet| match packet.bytes[0] {
            b'd' => Verdict::Drop,
            b'r' => Verdict::Repeat(2),
            b'h' => Verdict::AfterNext,
            _ => Verdict::Pass,
        });
        let a = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let b = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let stranger = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let public_a = router.attach(a.local_addr().unwrap()).await.unwrap();
        let public_b = router.attach(b.local_addr().unwrap()).await.unwrap();
        stranger.send_to(b"stranger", public_b).await.unwrap();
        for text in ["1", "dropped", "repeated", "held", "2"] {
            a.send_to(text.as_bytes(), public_b).await.unwrap();
        }
        let mut got = Vec::new();
        let mut buffer = [0; 20];
        for _ in 0..5 {
            let (len, from) = b.recv_from(&mut buffer).await.unwrap();
            assert_eq!(from, public_a);
            got.push(String::from_utf8(buffer[..len].to_vec()).unwrap());
        }
        assert_eq!(got, ["1", "repeated", "repeated", "2", "held"]);
        b.send_to(b"back", public_a).await.unwrap();
        let (len, from) = a.recv_from(&mut buffer).await.unwrap();
        assert_eq!((&buffer[..len], from), (&b"back"[..], public_b));
        let trace = router.wait_for(|trace| trace.len() == 6).await;
        assert_eq!(trace.iter().map(|traced| traced.packet.index).collect::<Vec<_>>(), [0, 1, 2, 3, 4, 0]);
        assert_eq!(trace[1].verdict, Verdict::Drop);
    }
}
