//! What `poolfs dht` says: lines for people, documents for programs.

use super::status::Status;
use indicatif::HumanBytes;
use poolfs_net::dht::{FoundContact, Outcome};
use poolfs_net::discovery::HostPort;
use poolfs_net::krpc::{FLAG_PARTIAL, FLAG_REACHABLE, Id};
use poolfs_net::node::{FamilySnapshot, Pong};
use poolfs_net::told::{How, Said, Tale, said};
use serde::Serialize;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

/// Said when a node runs.
#[derive(Debug, Serialize)]
pub struct Started<'a> {
    /// UDP addresses.
    pub listen: &'a [SocketAddr],
    /// The status socket.
    pub socket: &'a Path,
}

/// The answer to a ping, or that there was none.
#[derive(Debug, Serialize)]
pub struct Ping {
    host: String,
    answered: bool,
    address: Option<SocketAddr>,
    id: Option<String>,
    poolfs: Option<bool>,
    took_us: Option<u64>,
}

/// As a document.
pub fn ping(host: &HostPort, pong: Option<&Pong>) -> Ping {
    Ping {
        host: host.to_string(),
        answered: pong.is_some(),
        address: pong.map(|pong| pong.node.addr),
        id: pong.map(|pong| pong.node.id.to_string()),
        poolfs: pong.map(|pong| pong.poolfs),
        took_us: pong.map(|pong| us(pong.took)),
    }
}

/// As a line.
pub fn pong(pong: &Pong) -> String {
    let kind = if pong.poolfs { "poolfs" } else { "another program" };
    format!("{}: node {}, {kind}, {}", pong.node.addr, pong.node.id, time(pong.took))
}

/// Everything that a lookup found.
#[derive(Debug, Serialize)]
pub struct Lookup {
    key: String,
    contacts: Vec<Contact>,
    queries: u32,
    answers: u32,
    hops: u8,
    took_us: u64,
    first_after_us: Option<u64>,
    closest: Vec<Node>,
}

#[derive(Debug, Serialize)]
struct Contact {
    address: SocketAddr,
    public_key: Option<String>,
    partial: Option<bool>,
    reachable: Option<bool>,
    deltas: Vec<Delta>,
}

#[derive(Debug, Serialize)]
struct Delta {
    old: String,
    bytes: u64,
    delta: String,
    target: Option<String>,
}

#[derive(Debug, Serialize)]
struct Node {
    id: String,
    address: SocketAddr,
}

/// As a document.
pub fn lookup(key: Id, contacts: &[FoundContact], outcome: &Outcome) -> Lookup {
    let contact = |contact: &FoundContact| {
        let pv = contact.pv.as_ref();
        let delta = |delta: &poolfs_net::krpc::Delta| Delta {
            old: hex(&delta.old),
            bytes: delta.bytes,
            delta: hex(&delta.delta),
            target: delta.target.map(|target| target.to_string()),
        };
        Contact {
            address: contact.addr,
            public_key: pv.map(|pv| hex(&pv.key)),
            partial: pv.map(|pv| pv.flags & FLAG_PARTIAL != 0),
            reachable: pv.map(|pv| pv.flags & FLAG_REACHABLE != 0),
            deltas: pv.map_or_else(Vec::new, |pv| pv.deltas.iter().map(delta).collect()),
        }
    };
    Lookup {
        key: key.to_string(),
        contacts: contacts.iter().map(contact).collect(),
        queries: outcome.queries,
        answers: outcome.answers,
        hops: outcome.hops,
        took_us: us(outcome.took),
        first_after_us: outcome.first_after.map(us),
        closest: outcome.closest.iter().map(|node| Node { id: node.id.to_string(), address: node.addr }).collect(),
    }
}

/// As a line.
pub fn contact(contact: &FoundContact) -> String {
    let Some(pv) = &contact.pv else { return contact.addr.to_string() };
    let mut line = format!("{}  key {}", contact.addr, hex(&pv.key));
    if pv.flags & FLAG_PARTIAL != 0 {
        line += ", has a part of it";
    }
    for delta in &pv.deltas {
        line += &format!(", delta of {} from {}", HumanBytes(delta.bytes), hex(&delta.old));
    }
    line
}

/// How it ended, as a line.
pub fn outcome(contacts: usize, outcome: &Outcome) -> String {
    format!("{contacts} found in {}: {} queries, {} answers, {} hops", time(outcome.took), outcome.queries, outcome.answers, outcome.hops)
}

/// A node's status, for people.
pub fn status(status: &Status) {
    let line = |text: String| crate::show::line(&text);
    let snapshot = &status.node;
    for (name, family) in [("IPv4", &snapshot.v4), ("IPv6", &snapshot.v6)] {
        let Some(FamilySnapshot { listen, id, nodes, good, poolfs, seen_as, rtt_us }) = family else {
            line(format!("{name}: off"));
            continue;
        };
        let seen_as = seen_as.map_or_else(String::new, |address| format!(", seen as {address}"));
        line(format!("{name}: {listen}, node {id}{seen_as}"));
        let rtt = rtt_us.map_or_else(String::new, |us| format!(", round trip {}", time(Duration::from_micros(us))));
        line(format!("  {nodes} nodes, {good} good, {poolfs} poolfs{rtt}"));
    }
    line(if snapshot.reachable { "reachable" } else { "not reachable from outside: it asks, and announces nothing" }.to_owned());
    let percentile = |us: Option<u64>| us.map_or_else(|| "-".to_owned(), |us| time(Duration::from_micros(us)));
    let (p50, p95) = (percentile(snapshot.lookup_p50_us), percentile(snapshot.lookup_p95_us));
    line(format!("lookups: {} under way, median {p50}, 95th percentile {p95}", snapshot.lookups));
    if status.fleet_members > 0 {
        line(format!("fleet: {} members with this node", status.fleet_members));
    }
    line(format!("announces {} keys", snapshot.announced_keys));
    line(format!(
        "keeps {} contacts under {} keys, {} items, {} statements",
        snapshot.stored_contacts, snapshot.stored_keys, snapshot.stored_items, snapshot.stored_statements
    ));
    let rates = snapshot.rates;
    line(format!(
        "traffic: {:.1} datagrams/s and {:.0} B/s in, {:.1} and {:.0} out",
        rates.datagrams_in, rates.bytes_in, rates.datagrams_out, rates.bytes_out
    ));
    line(format!(
        "since the start: {} in, {} out; {} queries, {} repetitions, {} unanswered",
        HumanBytes(snapshot.bytes_in),
        HumanBytes(snapshot.bytes_out),
        snapshot.queries_out,
        snapshot.repeated,
        snapshot.unreachable
    ));
    line(format!(
        "turned away: {} malformed, {} past a rate, {} announces and items",
        snapshot.malformed, snapshot.limited, snapshot.refused
    ));
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn us(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

fn time(time: Duration) -> String {
    let seconds = time.as_secs_f64();
    if seconds < 1.0 { format!("{:.1} ms", 1000.0 * seconds) } else { format!("{seconds:.2} s") }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;
    use poolfs_net::krpc::Pv;

    /// People read these lines, and scripts the documents' keys.
    #[test]
    fn texts_are_golden() {
        let pv = Pv { key: [0xab; 32], flags: FLAG_PARTIAL, deltas: Vec::new() };
        let found = FoundContact { addr: "192.0.2.1:9977".parse().unwrap(), pv: Some(pv) };
        assert_eq!(contact(&found), format!("192.0.2.1:9977  key {}, has a part of it", "ab".repeat(32)));
        let outcome_of = Outcome {
            closest: Vec::new(),
            queries: 12,
            answers: 11,
            hops: 3,
            took: Duration::from_millis(1234),
            first_after: Some(Duration::from_micros(5)),
            stored: 0,
        };
        assert_eq!(outcome(1, &outcome_of), "1 found in 1.23 s: 12 queries, 11 answers, 3 hops");
        let document = serde_json::to_value(lookup(Id([1; 20]), &[found], &outcome_of)).unwrap();
        assert_eq!(
            document,
            serde_json::json!({
                "key": "01".repeat(20),
                "contacts": [{
                    "address": "192.0.2.1:9977", "public_key": "ab".repeat(32), "partial": true, "reachable": false, "deltas": []
                }],
                "queries": 12, "answers": 11, "hops": 3, "took_us": 1_234_000, "first_after_us": 5, "closest": []
            })
        );
    }
}

/// One thing that was told, as a document: with the bytes of a datagram, so that it can be compared with what was on the wire.
#[derive(Debug, Serialize)]
pub struct Shown {
    at_ms: u64,
    to: SocketAddr,
    how: &'static str,
    #[serde(flatten)]
    said: Said,
    bytes: Option<String>,
}

/// As a document.
pub fn tale(tale: &Tale) -> Shown {
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let plain = |what: String| Said { what, ..Said::default() };
    let (how, said, bytes) = match &tale.how {
        How::Datagram { bytes } => ("datagram", said(bytes), Some(hex(bytes))),
        How::Hello { bytes } => ("hello", plain("says hello".to_owned()), Some(hex(bytes))),
        How::Request { request, is_member } => ("request", plain(format!("asks {}{request}", of_fleet(*is_member))), None),
        How::Answer { request, status, bytes, is_member } => {
            let bytes = bytes.map_or_else(String::new, |bytes| format!(", {bytes} bytes"));
            ("answer", plain(format!("answers {}{status}{bytes} to {request}", of_fleet(*is_member))), None)
        }
    };
    Shown { at_ms: tale.at_ms, to: tale.to, how, said, bytes }
}

fn of_fleet(is_member: bool) -> &'static str {
    if is_member { "the fleet " } else { "" }
}

/// As a line.
pub fn tale_line(told: &Tale) -> String {
    let Shown { at_ms, to, how, said, .. } = tale(told);
    let day_s = at_ms / 1000 % 86_400;
    let mut line =
        format!("{:02}:{:02}:{:02}.{:03} UTC  {how:<8}  {to:<28}  {}", day_s / 3600, day_s / 60 % 60, day_s % 60, at_ms % 1000, said.what);
    for (name, values) in [("keys", &said.keys), ("contacts", &said.contacts), ("said of them", &said.pvs)] {
        if !values.is_empty() {
            line.push_str(&format!("; {name}: {}", values.join(", ")));
        }
    }
    if said.nodes > 0 {
        line.push_str(&format!("; {} other nodes", said.nodes));
    }
    line
}
