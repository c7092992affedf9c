//! libtorrent's DHT nodes, see `dht_libtorrent.py` for what is said to them.

use super::loopback;
use crate::harness::LIMIT;
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::process::{Child, ChildStdin, Command};
use tokio::sync::mpsc;

/// A request whose answer is not the wanted one is repeated after this long: the network may still be forming.
const REPEAT: Duration = Duration::from_secs(3);

#[derive(Debug, Clone, Copy)]
pub(super) enum Version {
    /// Debian's.
    V2_0,
    /// The newest.
    V2_1,
}

/// One process with some nodes; it ends with this value.
#[derive(Debug)]
pub(super) struct Libtorrent {
    _child: Child,
    stdin: ChildStdin,
    events: mpsc::Receiver<Value>,
    seen: Vec<Value>,
    version: Version,
    /// Of each node: IPv4, and IPv6 if it was asked for.
    pub(super) addresses: Vec<Vec<SocketAddr>>,
}

impl Libtorrent {
    /// Starts `count` nodes that know nobody.
    pub(super) async fn start(version: Version, count: usize, with_v6: bool) -> Self {
        let tools = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/tools");
        let mut command = match version {
            Version::V2_1 => Command::new(tools.join("libtorrent-2.1/bin/python")),
            Version::V2_0 => {
                let root = tools.join("libtorrent-2.0/usr/lib");
                let libraries: Vec<PathBuf> =
                    std::fs::read_dir(&root).map_or_else(|_| Vec::new(), |dir| dir.flatten().map(|entry| entry.path()).collect());
                let mut command = Command::new("/usr/bin/python3");
                command
                    .env("LD_LIBRARY_PATH", std::env::join_paths(libraries).unwrap())
                    .env("PYTHONPATH", root.join("python3/dist-packages"));
                command
            }
        };
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/dht_libtorrent.py");
        let mut child = command
            .arg(script)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .expect("libtorrent is there: scripts/interop-deps installs it");
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let (events_in, events) = mpsc::channel(10_000);
        tokio::spawn(async move {
            while let Ok(Some(line)) = lines.next_line().await {
                if events_in.send(serde_json::from_str(&line).unwrap()).await.is_err() {
                    return;
                }
            }
        });
        let stdin = child.stdin.take().unwrap();
        let mut this = Self { _child: child, stdin, events, seen: Vec::new(), version, addresses: Vec::new() };
        for node in 0..count {
            let listen = format!("{}:0{}", loopback(), if with_v6 { ",[::1]:0" } else { "" });
            this.send(&json!({ "op": "start", "node": node, "listen": listen })).await;
            let started = this.event(|event| event["event"] == "started" && event["node"] == node).await;
            let mut addresses: Vec<SocketAddr> =
                started["addresses"].as_array().unwrap().iter().map(|text| text.as_str().unwrap().parse().unwrap()).collect();
            addresses.sort();
            this.addresses.push(addresses);
        }
        this
    }

    /// Every event taken so far.
    pub(super) fn seen(&self) -> &[Value] {
        &self.seen
    }

    pub(super) async fn send(&mut self, request: &Value) {
        self.stdin.write_all(format!("{request}\n").as_bytes()).await.unwrap();
    }

    /// The first event, past or to come, that is `wanted`.
    pub(super) async fn event(&mut self, wanted: impl Fn(&Value) -> bool) -> Value {
        let found = tokio::time::timeout(LIMIT, self.find(&wanted)).await;
        found.unwrap_or_else(|_| panic!("{:?} never said it; what it said: {:#?}", self.version, self.seen))
    }

    /// Sends `request`, and again every few seconds, until an event after the first sending is `wanted`.
    pub(super) async fn ask(&mut self, request: &Value, wanted: impl Fn(&Value) -> bool) -> Value {
        let asking = async {
            self.seen.clear();
            loop {
                self.send(request).await;
                if let Ok(found) = tokio::time::timeout(REPEAT, self.find(&wanted)).await {
                    return found;
                }
            }
        };
        let found = tokio::time::timeout(LIMIT, asking).await;
        found.unwrap_or_else(|_| panic!("{:?} never answered {request}; what it said: {:#?}", self.version, self.seen))
    }

    async fn find(&mut self, wanted: &impl Fn(&Value) -> bool) -> Value {
        if let Some(found) = self.seen.iter().find(|event| wanted(event)) {
            return found.clone();
        }
        loop {
            let event = self.events.recv().await.expect("libtorrent runs as long as the test");
            assert_ne!(event["event"], "failed", "{event}");
            self.seen.push(event.clone());
            if wanted(&event) {
                return event;
            }
        }
    }

    /// Tells a node of another.
    pub(super) async fn add(&mut self, node: usize, to: SocketAddr) {
        self.send(&json!({ "op": "add", "node": node, "to": to })).await;
    }

    /// Announces with the port that the node listens on; once for each key.
    pub(super) async fn announce(&mut self, node: usize, key: &[u8; 20]) {
        self.send(&json!({ "op": "announce", "node": node, "hash": hex(key) })).await;
    }

    /// Looks up until `want` is among the peers found.
    pub(super) async fn find_peer(&mut self, node: usize, key: &[u8; 20], want: SocketAddr) {
        let (hash, want) = (hex(key), want.to_string());
        let request = json!({ "op": "peers", "node": node, "hash": hash });
        self.ask(&request, |event| {
            event["event"] == "peers" && event["node"] == node && event["hash"] == hash && has(&event["peers"], &want)
        })
        .await;
    }

    /// Puts a string as an immutable item; returns its target.
    pub(super) async fn put(&mut self, node: usize, value: &str) -> String {
        let stored = |event: &Value| event["event"] == "put" && event["node"] == node && event["stored"].as_u64() > Some(0);
        self.ask(&json!({ "op": "put", "node": node, "value": value }), stored).await["target"].as_str().unwrap().to_owned()
    }

    /// Gets the bytes of an immutable item, repeating until somebody has it.
    pub(super) async fn get(&mut self, node: usize, target: &str) -> Vec<u8> {
        let found = |event: &Value| event["event"] == "item" && event["target"] == target && event["value"].is_string();
        let event = self.ask(&json!({ "op": "get", "node": node, "target": target }), found).await;
        unhex(event["value"].as_str().unwrap())
    }
}

fn has(list: &Value, want: &str) -> bool {
    list.as_array().is_some_and(|list| list.iter().any(|entry| entry == want))
}

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

pub(super) fn unhex(text: &str) -> Vec<u8> {
    (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap()).collect()
}

/// The two versions must find each other's announces by this driver, or a failure beside poolfs would say nothing.
#[tokio::test]
async fn libtorrents_find_each_other() {
    let mut old = Libtorrent::start(Version::V2_0, 2, true).await;
    let mut new = Libtorrent::start(Version::V2_1, 2, true).await;
    for address in old.addresses[0].clone() {
        old.add(1, address).await;
        new.add(0, address).await;
        new.add(1, address).await;
    }
    old.announce(1, b"announced by 2.0 ...").await;
    new.announce(1, b"announced by 2.1 ...").await;
    let (v4, v6) = (old.addresses[1][0], old.addresses[1][1]);
    new.find_peer(0, b"announced by 2.0 ...", v4).await;
    new.find_peer(0, b"announced by 2.0 ...", v6).await;
    let (v4, v6) = (new.addresses[1][0], new.addresses[1][1]);
    old.find_peer(0, b"announced by 2.1 ...", v4).await;
    old.find_peer(0, b"announced by 2.1 ...", v6).await;
    let target = old.put(0, "an item of 2.0").await;
    assert_eq!(new.get(1, &target).await, b"an item of 2.0");
    let target = new.put(0, "an item of 2.1").await;
    assert_eq!(old.get(1, &target).await, b"an item of 2.1");
}
