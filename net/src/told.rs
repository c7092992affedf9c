//! What this node tells others, as it goes out, for whoever wants to see it for himself.
//!
//! Datagrams of the DHT and of the fleet as they are handed to the socket, hellos on the link, answers of the peer server, and requests to
//! peers, which tell what is wanted. What goes to mirrors is not among it: apt would ask them the same.
//!
//! Nobody watches for most of the time: then nothing is copied.

use crate::krpc::{Body, FLAG_PARTIAL, FLAG_REACHABLE, Id, Message, Pv, Statement, Verb};
use parking_lot::Mutex;
use poolfs_core::Digest;
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::fmt::Write as _;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tokio::sync::broadcast;

/// Kept for a slow watcher; it is told how many it missed.
const KEPT_MAX: usize = 4096;

/// How it went out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum How {
    /// A datagram from the node's port.
    Datagram {
        /// Its payload.
        bytes: Vec<u8>,
    },
    /// A hello to all of the link.
    Hello {
        /// Its payload.
        bytes: Vec<u8>,
    },
    /// An answer of the peer server.
    Answer {
        /// What was asked, with the range if there was one.
        request: String,
        /// The status code.
        status: u16,
        /// Length of the body in bytes.
        bytes: Option<u64>,
        /// To a member of the fleet, who has shown the key.
        is_member: bool,
    },
    /// A request to a peer.
    Request {
        /// What is asked, with the range if there is one.
        request: String,
        /// Signed with the fleet's key.
        is_member: bool,
    },
}

/// One thing that was told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tale {
    /// Milliseconds since 1970.
    pub at_ms: u64,
    /// To whom.
    pub to: SocketAddr,
    /// What.
    pub how: How,
}

/// Where it is said what goes out. Clones are one and the same.
#[derive(Clone, Debug)]
pub struct Told(broadcast::Sender<Tale>);

impl Default for Told {
    fn default() -> Self {
        Self(broadcast::Sender::new(KEPT_MAX))
    }
}

impl Told {
    /// Says that something goes out, if anybody watches.
    pub fn say(&self, to: SocketAddr, how: impl FnOnce() -> How) {
        if self.0.receiver_count() > 0 {
            let at_ms = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis());
            // Whoever watched may have gone meanwhile.
            let _ = self.0.send(Tale { at_ms: u64::try_from(at_ms).unwrap_or(u64::MAX), to, how: how() });
        }
    }

    /// Everything from now on.
    pub fn watch(&self) -> broadcast::Receiver<Tale> {
        self.0.subscribe()
    }
}

/// Things told in one answer to who watches.
const BATCH_MAX: usize = 256;

/// How long an answer waits for the first of them.
const BATCH_PATIENCE: Duration = Duration::from_secs(1);

/// A watcher that asks for nothing for this long is gone.
const WATCHER_KEPT: Duration = Duration::from_secs(30);

/// Who watches at once.
const WATCHERS_MAX: usize = 16;

/// Why there is nothing more for who watches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Missed {
    /// It asked too late.
    #[error("{0} things were told faster than they were asked for")]
    Lagged(u64),
    /// `WATCHERS_MAX` watch already.
    #[error("{WATCHERS_MAX} watch already: end one of them")]
    Full,
}

/// Those who watch from another process, each by a number of its own.
#[derive(Debug)]
pub struct Watchers {
    told: Told,
    all: Mutex<HashMap<u64, Watcher>>,
}

#[derive(Debug)]
struct Watcher {
    tales: Arc<tokio::sync::Mutex<broadcast::Receiver<Tale>>>,
    asked: Instant,
}

impl Watchers {
    /// Nobody watches yet.
    pub fn new(told: Told) -> Self {
        Self { told, all: Mutex::default() }
    }

    /// What was told since this watcher asked last, at most `BATCH_MAX` things; nothing at its first time, from which on it is told
    /// everything, and where nothing is told for a second.
    ///
    /// # Errors
    /// [`Missed`].
    pub async fn next(&self, number: u64) -> Result<Vec<Tale>, Missed> {
        let tales = {
            let now = Instant::now();
            let mut all = self.all.lock();
            all.retain(|_, watcher| now.saturating_duration_since(watcher.asked) < WATCHER_KEPT);
            let is_full = all.len() >= WATCHERS_MAX;
            match all.get_mut(&number) {
                Some(watcher) => {
                    watcher.asked = now;
                    Arc::clone(&watcher.tales)
                }
                None if is_full => return Err(Missed::Full),
                None => {
                    all.insert(number, Watcher { tales: Arc::new(tokio::sync::Mutex::new(self.told.watch())), asked: now });
                    return Ok(Vec::new());
                }
            }
        };
        let mut tales = tales.lock().await;
        let mut batch = Vec::new();
        match tokio::time::timeout(BATCH_PATIENCE, tales.recv()).await {
            Ok(Ok(tale)) => batch.push(tale),
            Ok(Err(broadcast::error::RecvError::Lagged(missed))) => return Err(Missed::Lagged(missed)),
            Ok(Err(broadcast::error::RecvError::Closed)) | Err(_) => {}
        }
        while batch.len() < BATCH_MAX {
            match tales.try_recv() {
                Ok(tale) => batch.push(tale),
                Err(broadcast::error::TryRecvError::Lagged(missed)) => return Err(Missed::Lagged(missed)),
                Err(_) => break,
            }
        }
        Ok(batch)
    }
}

/// What a datagram of the DHT says, for people.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Said {
    /// `announce`, `withdraw`, `asks for`, `answers`, and so on.
    pub what: String,
    /// Keys that are named.
    pub keys: Vec<String>,
    /// Contacts that are handed on, or announced by port alone (`:9977`).
    pub contacts: Vec<String>,
    /// What is said of this machine, or of those contacts.
    pub pvs: Vec<String>,
    /// Other nodes that are named.
    pub nodes: usize,
}

/// Reads a datagram that went out.
pub fn said(bytes: &[u8]) -> Said {
    let Ok(message) = Message::decode(bytes) else {
        return Said { what: "a datagram of the fleet's".to_owned(), ..Said::default() };
    };
    match message.body {
        Body::Query { verb, .. } => said_query(&verb),
        Body::Reply(reply) => {
            let mut what = String::from("answers");
            let statements = reply.statements.len();
            for (there, text) in [(reply.item.is_some(), " with an item"), (reply.dialled.is_some(), " whether it could connect")] {
                what.push_str(if there { text } else { "" });
            }
            if statements > 0 {
                let _ = write!(what, " with {statements} statements");
            }
            Said {
                what,
                keys: Vec::new(),
                contacts: reply.values.iter().map(ToString::to_string).collect(),
                pvs: reply.pvs.iter().filter(|pv| !pv.is_empty()).map(|pv| said_pv(pv)).collect(),
                nodes: reply.nodes.len() + reply.nodes6.len(),
            }
        }
        Body::Error { text, .. } => Said { what: format!("refuses: {text}"), ..Said::default() },
    }
}

fn said_query(verb: &Verb) -> Said {
    let of = |what: &str, key: Option<&Id>| Said {
        what: what.to_owned(),
        keys: key.map(Id::to_string).into_iter().collect(),
        ..Said::default()
    };
    match verb {
        Verb::Ping => of("asks whether it is there", None),
        Verb::FindNode { target, .. } => of("asks for nodes near", Some(target)),
        Verb::GetPeers { key, statements: true, .. } => of("asks for statements at", Some(key)),
        Verb::GetPeers { key, .. } => of("asks for holders of", Some(key)),
        Verb::Get { target, .. } => of("asks for the item", Some(target)),
        Verb::Put { value, .. } => of(&format!("stores an item of {} bytes", value.len()), None),
        Verb::Dial { port, .. } => of(&format!("asks to be connected to at port {port}"), None),
        Verb::Other { name, .. } => of(&format!("a query of another kind: {}", String::from_utf8_lossy(name)), None),
        Verb::Announce(announce) => {
            let mut said = match &announce.statement {
                Some(bytes) => of(&said_statement(bytes), Some(&announce.key)),
                None if announce.port == 0 => of("withdraws", Some(&announce.key)),
                None => of("announces", Some(&announce.key)),
            };
            said.keys.extend(announce.more.iter().map(Id::to_string));
            said.contacts = (announce.port != 0).then(|| format!(":{}", announce.port)).into_iter().collect();
            said.pvs = announce.pv.iter().map(|pv| said_pv(pv)).collect();
            said
        }
    }
}

fn said_statement(bytes: &[u8]) -> String {
    match bytes.try_into().map(Statement::check_signed) {
        Ok(Ok(said)) => format!("says {:?} of {} (file {}) at", said.kind, Digest(said.subject), Digest(said.digest)),
        _ => "passes a statement on at".to_owned(),
    }
}

fn said_pv(bytes: &[u8]) -> String {
    let Ok(pv) = Pv::parse(bytes) else { return "a pv that is none".to_owned() };
    let mut text = format!("key {}", Digest(pv.key));
    for (flag, name) in [(FLAG_PARTIAL, ", a part only"), (FLAG_REACHABLE, ", reachable")] {
        text.push_str(if pv.flags & flag != 0 { name } else { "" });
    }
    for delta in &pv.deltas {
        let _ = write!(text, ", delta of {} bytes from {}", delta.bytes, Digest(delta.old));
    }
    text
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;
    use crate::krpc::{Announce, Transaction, VERSION};

    fn announce(port: u16) -> Vec<u8> {
        let pv = Pv { key: [1; 32], flags: FLAG_PARTIAL, deltas: Vec::new() };
        let announce = Announce {
            key: Id([2; 20]),
            port,
            implied_port: false,
            token: vec![0; 8],
            pv: Some(pv.encode()),
            more: vec![Id([3; 20])],
            statement: None,
        };
        let body = Body::Query { id: Id([4; 20]), verb: Verb::Announce(Box::new(announce)) };
        Message { transaction: Transaction::own([0; 4]), version: Some(VERSION), read_only: false, ip: None, body }.encode().unwrap()
    }

    /// A key that is told and not shown would make the whole view a lie.
    #[test]
    fn every_key_of_an_announce_is_shown() {
        let shown = said(&announce(9977));
        assert_eq!(shown.what, "announces");
        assert_eq!(shown.keys, ["02".repeat(20), "03".repeat(20)]);
        assert_eq!((shown.contacts, shown.pvs), (vec![":9977".to_owned()], vec![format!("key {}, a part only", "01".repeat(32))]));
        assert_eq!(said(&announce(0)).what, "withdraws");
        assert_eq!(said(b"\x01\x02").what, "a datagram of the fleet's");
    }

    /// A watcher in another process is told everything from its first question on, and one that is too slow is told so.
    #[tokio::test(start_paused = true)]
    async fn watchers_from_elsewhere() {
        let told = Told::default();
        let watchers = Watchers::new(told.clone());
        let to = "192.0.2.1:9977".parse().unwrap();
        let say = |n: u8| told.say(to, || How::Hello { bytes: vec![n] });
        say(0);
        assert_eq!(watchers.next(7).await, Ok(vec![]));
        (1..=3).for_each(say);
        let heard: Vec<How> = watchers.next(7).await.unwrap().into_iter().map(|tale| tale.how).collect();
        assert_eq!(heard, [1, 2, 3].map(|n| How::Hello { bytes: vec![n] }));
        assert_eq!(watchers.next(7).await, Ok(vec![]), "nothing for a second");
        (0..KEPT_MAX + 5).for_each(|_| say(9));
        assert!(matches!(watchers.next(7).await, Err(Missed::Lagged(_))));
        for n in 0..WATCHERS_MAX as u64 - 1 {
            assert_eq!(watchers.next(100 + n).await, Ok(vec![]));
        }
        assert_eq!(watchers.next(99).await, Err(Missed::Full));
    }

    /// Without a watcher nothing is made; with one everything comes, in order.
    #[tokio::test]
    async fn says_to_who_watches() {
        let told = Told::default();
        let to = "192.0.2.1:9977".parse().unwrap();
        told.say(to, || panic!("nobody watches"));
        let mut watching = told.clone().watch();
        told.say(to, || How::Hello { bytes: vec![1] });
        told.say(to, || How::Datagram { bytes: vec![2] });
        assert_eq!(watching.recv().await.unwrap().how, How::Hello { bytes: vec![1] });
        assert_eq!(watching.recv().await.unwrap().how, How::Datagram { bytes: vec![2] });
    }
}
