//! KRPC messages as types, and their bytes.
//!
//! Reading is lenient where nodes in the field are sloppy (order of keys, odd lengths of `nodes`, unknown keys) and strict
//! where a value would be used (ids are 20 bytes, ports 16 bits). Writing is canonical. An entry of the wrong type is
//! as if it were absent; where it is needed the message is [`Malformed`].

use super::scan::{ScanError, raw_entry, scan};
use super::{DATAGRAM_BYTES_OUT_MAX, Id, PV_BYTES_MAX, STATEMENT_BYTES, VERSION};
use bt_bencode::{ByteString, Value};
use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// Longest transaction id of another node that is echoed.
pub const TRANSACTION_BYTES_MAX: usize = 32;

/// Length of this node's own transaction ids: what `mainline` insists on.
pub const TRANSACTION_BYTES: usize = 4;

/// Longest token of another node that is kept.
pub const TOKEN_BYTES_MAX: usize = 64;

/// Keys in `more` of one announce.
pub const MORE_KEYS_MAX: usize = 48;

/// Longest BEP 44 value, bencoded.
pub const ITEM_BYTES_MAX: usize = 1000;

/// Error codes of BEP 5.
pub mod code {
    /// Something else.
    pub const GENERIC: i64 = 201;
    /// This node cannot now: a limit.
    pub const SERVER: i64 = 202;
    /// Malformed, an invalid argument or a bad token.
    pub const PROTOCOL: i64 = 203;
    /// No such verb.
    pub const METHOD: i64 = 204;
    /// BEP 44: the value is too long.
    pub const TOO_BIG: i64 = 205;
}

/// `t`: chosen by who asks, echoed by who answers.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Transaction {
    length: u8,
    bytes: [u8; TRANSACTION_BYTES_MAX],
}

impl Transaction {
    /// An id of 1 to [`TRANSACTION_BYTES_MAX`] bytes; `None` for other lengths.
    pub fn new(id: &[u8]) -> Option<Self> {
        if id.is_empty() || id.len() > TRANSACTION_BYTES_MAX {
            return None;
        }
        let mut bytes = [0; TRANSACTION_BYTES_MAX];
        bytes[..id.len()].copy_from_slice(id);
        Some(Self { length: u8::try_from(id.len()).ok()?, bytes })
    }

    /// One of this node's own.
    pub fn own(id: [u8; TRANSACTION_BYTES]) -> Self {
        let mut bytes = [0; TRANSACTION_BYTES_MAX];
        bytes[..TRANSACTION_BYTES].copy_from_slice(&id);
        Self { length: 4, bytes }
    }

    /// The bytes.
    pub fn as_slice(&self) -> &[u8] {
        &self.bytes[..usize::from(self.length)]
    }

    /// The bytes if they have the length of this node's own.
    pub fn as_own(&self) -> Option<[u8; TRANSACTION_BYTES]> {
        self.as_slice().try_into().ok()
    }
}

impl fmt::Debug for Transaction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.as_slice().iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// An id and where its node listens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct NodeInfo {
    /// The node's id.
    pub id: Id,
    /// The node's UDP address.
    pub addr: SocketAddr,
}

/// `want` (BEP 32): which of `nodes` and `nodes6` the answer shall have. Neither means: the family it was asked in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Want {
    /// `n4`.
    pub v4: bool,
    /// `n6`.
    pub v6: bool,
}

/// One datagram.
#[derive(Debug, Clone, PartialEq)]
pub struct Message {
    /// `t`.
    pub transaction: Transaction,
    /// `v`, its first four bytes.
    pub version: Option<[u8; 4]>,
    /// `ro` (BEP 43): the sender answers nobody; not to be kept.
    pub read_only: bool,
    /// `ip` (BEP 42): how the sender sees the receiver.
    pub ip: Option<SocketAddr>,
    /// What it says.
    pub body: Body,
}

/// `y`.
#[derive(Debug, Clone, PartialEq)]
pub enum Body {
    /// `q`.
    Query {
        /// The asker's id.
        id: Id,
        /// What is asked.
        verb: Verb,
    },
    /// `r`.
    Reply(Box<Reply>),
    /// `e`.
    Error {
        /// See [`code`].
        code: i64,
        /// For people; cut to 64 bytes.
        text: String,
    },
}

/// `q` and `a`.
#[derive(Debug, Clone, PartialEq)]
pub enum Verb {
    /// Are you there?
    Ping,
    /// Nodes near `target`. An unknown verb with a `target` or `info_hash` is read as this one.
    FindNode {
        /// Near what.
        target: Id,
        /// Which families.
        want: Want,
    },
    /// Contacts of who has `key`, or nodes near it.
    GetPeers {
        /// The key (`info_hash`).
        key: Id,
        /// Which families of nodes.
        want: Want,
        /// `pv` = 1: send `pvs` too; needs a valid token.
        pv: bool,
        /// `st` = 1: send the statements kept at the key; needs a valid token.
        statements: bool,
        /// Proves that the asker's address is its own.
        token: Option<Vec<u8>>,
    },
    /// The sender has `key` and every key of `more`.
    Announce(Box<Announce>),
    /// BEP 44 item.
    Get {
        /// SHA-1 of the item.
        target: Id,
        /// Which families of nodes.
        want: Want,
    },
    /// Keeps a BEP 44 item.
    Put {
        /// The item, bencoded as its sender wrote it.
        value: Vec<u8>,
        /// Of a `get` before.
        token: Vec<u8>,
        /// Whether it has a key, signature or sequence number: mutable items are not kept here.
        mutable: bool,
    },
    /// `pf_dial`: can you open a TCP connection to my address at this port?
    Dial {
        /// From 1024.
        port: u16,
        /// Proves that the asker's address is its own.
        token: Vec<u8>,
    },
    /// A verb that this layer does not know, and that has no target.
    Other {
        /// Its name, at most 32 bytes.
        name: Vec<u8>,
        /// `a` as it came.
        args: Value,
    },
}

/// `announce_peer`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Announce {
    /// The key (`info_hash`).
    pub key: Id,
    /// Where pieces are served; 0 withdraws.
    pub port: u16,
    /// The datagram's own source port counts instead of `port`.
    pub implied_port: bool,
    /// Of a `get_peers` before.
    pub token: Vec<u8>,
    /// Unchecked; see [`super::Pv`].
    pub pv: Option<Vec<u8>>,
    /// Further keys with the same port and `pv`, at most [`MORE_KEYS_MAX`].
    pub more: Vec<Id>,
    /// A statement about the holder of the id NOT(`key`), unchecked.
    pub statement: Option<Vec<u8>>,
}

/// `r`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Reply {
    /// The answerer's id.
    pub id: Id,
    /// IPv4 nodes.
    pub nodes: Vec<NodeInfo>,
    /// IPv6 nodes.
    pub nodes6: Vec<NodeInfo>,
    /// For an announce or put.
    pub token: Option<Vec<u8>>,
    /// Contacts.
    pub values: Vec<SocketAddr>,
    /// Parallel to `values`; an empty string where there is none. Empty where it was not asked for.
    pub pvs: Vec<Vec<u8>>,
    /// BEP 44 item, bencoded as its sender wrote it.
    pub item: Option<Vec<u8>>,
    /// Statements, unchecked.
    pub statements: Vec<Vec<u8>>,
    /// Whether the TCP connection of a [`Verb::Dial`] could be opened.
    pub dialled: Option<bool>,
}

/// A datagram that is no message.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what}")]
pub struct Malformed {
    /// What is wrong.
    pub what: MalformedKind,
    /// Of a query that can be told so with error 203; `None`: silence.
    pub query: Option<Transaction>,
}

/// What is wrong with a [`Malformed`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum MalformedKind {
    /// Not bencode within the limits.
    #[error("datagram is {0}")]
    Scan(ScanError),
    /// No dictionary with `t` of 1 to 32 bytes and `y` of `q`, `r` or `e`.
    #[error("datagram is no KRPC message")]
    Envelope,
    /// The named entry is absent or has a wrong type or length.
    #[error("message has no valid {0}")]
    Entry(&'static str),
}

/// A message that would not fit [`DATAGRAM_BYTES_OUT_MAX`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("message of {0} bytes, over {DATAGRAM_BYTES_OUT_MAX}")]
pub struct TooLong(pub usize);

impl Message {
    /// Reads one datagram.
    ///
    /// # Errors
    /// [`Malformed`]; nothing is allocated before the limits are checked.
    pub fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let silent = |what| Malformed { what, query: None };
        scan(bytes).map_err(|err| silent(MalformedKind::Scan(err)))?;
        let envelope = || silent(MalformedKind::Envelope);
        let value: Value = bt_bencode::from_slice(bytes).map_err(|_| envelope())?;
        let dict = value.as_dict().ok_or_else(envelope)?;
        let transaction = string(dict, "t").and_then(Transaction::new).ok_or_else(envelope)?;
        let version = string(dict, "v").and_then(|v| v.get(..4)?.try_into().ok());
        let read_only = dict.get("ro".as_bytes()).and_then(int) == Some(1);
        let ip = string(dict, "ip").and_then(contact_from_slice);
        let body = match string(dict, "y") {
            Some(b"q") => query(dict, bytes).map_err(|what| Malformed { what: MalformedKind::Entry(what), query: Some(transaction) })?,
            Some(b"r") => reply(dict, bytes).map_err(|what| silent(MalformedKind::Entry(what)))?,
            Some(b"e") => error(dict).ok_or_else(|| silent(MalformedKind::Entry("e")))?,
            _ => return Err(envelope()),
        };
        Ok(Self { transaction, version, read_only, ip, body })
    }

    /// The bytes to send.
    ///
    /// # Errors
    /// [`TooLong`] over [`DATAGRAM_BYTES_OUT_MAX`]: no datagram of this node is ever fragmented.
    pub fn encode(&self) -> Result<Vec<u8>, TooLong> {
        let mut dict = Dict::default();
        match &self.body {
            Body::Query { id, verb } => {
                let (name, args) = verb.to_args(id);
                dict.put("a", args);
                dict.bytes("q", &name);
                dict.bytes("y", b"q");
            }
            Body::Reply(reply) => {
                dict.put("r", reply.to_dict());
                dict.bytes("y", b"r");
            }
            Body::Error { code, text } => {
                dict.put("e", Value::List(vec![Value::from(*code), byte_str(text.as_bytes())]));
                dict.bytes("y", b"e");
            }
        }
        dict.bytes("t", self.transaction.as_slice());
        if let Some(version) = self.version {
            dict.bytes("v", &version);
        }
        if let Some(ip) = self.ip {
            dict.bytes("ip", &contact_to_vec(ip));
        }
        if self.read_only {
            dict.put("ro", Value::from(1));
        }
        let bytes = bt_bencode::to_vec(&Value::Dict(dict.0)).expect("values made here have string keys and a vector takes all bytes");
        if bytes.len() > DATAGRAM_BYTES_OUT_MAX { Err(TooLong(bytes.len())) } else { Ok(bytes) }
    }

    /// Whether the sender is a poolfs node, by its `v`.
    pub fn is_poolfs(&self) -> bool {
        self.version.is_some_and(|v| v[..2] == VERSION[..2])
    }
}

/// The integer in a value, whichever sign the parser gave it.
pub(crate) fn int(value: &Value) -> Option<i64> {
    value.as_i64().or_else(|| value.as_u64().and_then(|n| i64::try_from(n).ok()))
}

/// `address` + port, 6 or 18 bytes, big-endian.
pub fn contact_to_vec(contact: SocketAddr) -> Vec<u8> {
    let mut out = match contact.ip() {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    };
    out.extend_from_slice(&contact.port().to_be_bytes());
    out
}

/// Reads 6 or 18 bytes; `None` for other lengths. An IPv4-mapped IPv6 address becomes IPv4.
pub fn contact_from_slice(bytes: &[u8]) -> Option<SocketAddr> {
    let (address, port) = bytes.split_at_checked(bytes.len().checked_sub(2)?)?;
    let address: IpAddr = match address.len() {
        4 => <[u8; 4]>::try_from(address).ok().map(Ipv4Addr::from)?.into(),
        16 => <[u8; 16]>::try_from(address).ok().map(Ipv6Addr::from)?.to_canonical(),
        _ => return None,
    };
    Some(SocketAddr::new(address, u16::from_be_bytes(port.try_into().ok()?)))
}

#[derive(Default)]
struct Dict(BTreeMap<ByteString, Value>);

impl Dict {
    fn put(&mut self, key: &str, value: Value) {
        self.0.insert(ByteString::from(key.as_bytes()), value);
    }

    fn bytes(&mut self, key: &str, bytes: &[u8]) {
        self.put(key, byte_str(bytes));
    }

    fn want(&mut self, want: Want) {
        let list: Vec<Value> = [(want.v4, b"n4"), (want.v6, b"n6")].iter().filter(|(on, _)| *on).map(|(_, name)| byte_str(*name)).collect();
        if !list.is_empty() {
            self.put("want", Value::List(list));
        }
    }
}

fn byte_str(bytes: &[u8]) -> Value {
    Value::ByteStr(ByteString::from(bytes))
}

type Entries = BTreeMap<ByteString, Value>;

fn string<'a>(dict: &'a Entries, key: &str) -> Option<&'a [u8]> {
    dict.get(key.as_bytes())?.as_byte_str().map(|s| s.as_slice())
}

fn id(dict: &Entries, key: &'static str) -> Result<Id, &'static str> {
    string(dict, key).and_then(Id::from_slice).ok_or(key)
}

fn flag(dict: &Entries, key: &str) -> bool {
    dict.get(key.as_bytes()).and_then(int).is_some_and(|n| n != 0)
}

fn token(dict: &Entries) -> Option<Vec<u8>> {
    string(dict, "token").filter(|t| !t.is_empty() && t.len() <= TOKEN_BYTES_MAX).map(<[u8]>::to_vec)
}

fn want(dict: &Entries) -> Want {
    let has = |name: &[u8]| {
        let list = dict.get("want".as_bytes()).and_then(Value::as_list);
        list.is_some_and(|l| l.iter().any(|w| w.as_byte_str().is_some_and(|w| w.as_slice() == name)))
    };
    Want { v4: has(b"n4"), v6: has(b"n6") }
}

fn query(dict: &Entries, bytes: &[u8]) -> Result<Body, &'static str> {
    let name = string(dict, "q").ok_or("q")?;
    let args = dict.get("a".as_bytes()).and_then(Value::as_dict).ok_or("a")?;
    let asker = id(args, "id")?;
    let verb = match name {
        b"ping" => Verb::Ping,
        b"find_node" => Verb::FindNode { target: id(args, "target")?, want: want(args) },
        b"get_peers" => Verb::GetPeers {
            key: id(args, "info_hash")?,
            want: want(args),
            pv: flag(args, "pv"),
            statements: flag(args, "st"),
            token: token(args),
        },
        b"announce_peer" => Verb::Announce(Box::new(announce(args)?)),
        b"get" => Verb::Get { target: id(args, "target")?, want: want(args) },
        b"put" => Verb::Put {
            value: raw_entry(bytes, b"a").and_then(|a| raw_entry(a, b"v")).ok_or("v")?.to_vec(),
            token: token(args).ok_or("token")?,
            mutable: ["k", "sig", "seq", "cas", "salt"].iter().any(|key| args.contains_key(key.as_bytes())),
        },
        b"pf_dial" => Verb::Dial { port: port(args).filter(|p| *p != 0).ok_or("port")?, token: token(args).ok_or("token")? },
        other => match id(args, "target").or_else(|_| id(args, "info_hash")) {
            Ok(target) => Verb::FindNode { target, want: want(args) },
            Err(_) => Verb::Other { name: other.get(..32).unwrap_or(other).to_vec(), args: Value::Dict(args.clone()) },
        },
    };
    Ok(Body::Query { id: asker, verb })
}

fn port(args: &Entries) -> Option<u16> {
    args.get("port".as_bytes()).and_then(int).and_then(|p| u16::try_from(p).ok())
}

fn announce(args: &Entries) -> Result<Announce, &'static str> {
    let implied_port = flag(args, "implied_port");
    let more = string(args, "more").unwrap_or_default();
    if !more.len().is_multiple_of(20) || more.len() > MORE_KEYS_MAX * 20 {
        return Err("more");
    }
    Ok(Announce {
        key: id(args, "info_hash")?,
        port: match port(args) {
            Some(port) => port,
            None if implied_port => 0,
            None => return Err("port"),
        },
        implied_port,
        token: token(args).ok_or("token")?,
        pv: string(args, "pv").map(<[u8]>::to_vec),
        more: more.chunks_exact(20).filter_map(Id::from_slice).collect(),
        statement: string(args, "st").map(<[u8]>::to_vec),
    })
}

fn reply(dict: &Entries, bytes: &[u8]) -> Result<Body, &'static str> {
    let r = dict.get("r".as_bytes()).and_then(Value::as_dict).ok_or("r")?;
    let nodes = |key: &str, length: usize| -> Vec<NodeInfo> {
        let all = string(r, key).unwrap_or_default().chunks_exact(length);
        all.filter_map(|node| Some(NodeInfo { id: Id::from_slice(&node[..20])?, addr: contact_from_slice(&node[20..])? })).collect()
    };
    let strings = |key: &str| -> Vec<&[u8]> {
        let list = r.get(key.as_bytes()).and_then(Value::as_list);
        list.map(|l| l.iter().filter_map(|v| v.as_byte_str().map(|s| s.as_slice())).collect()).unwrap_or_default()
    };
    let (mut values, mut pvs) = (Vec::new(), Vec::new());
    let sent_pvs = strings("pvs");
    for (place, value) in strings("values").into_iter().enumerate() {
        let Some(contact) = contact_from_slice(value) else { continue };
        values.push(contact);
        if !sent_pvs.is_empty() {
            pvs.push(sent_pvs.get(place).filter(|pv| pv.len() <= PV_BYTES_MAX).map(|pv| pv.to_vec()).unwrap_or_default());
        }
    }
    Ok(Body::Reply(Box::new(Reply {
        id: id(r, "id")?,
        nodes: nodes("nodes", 26),
        nodes6: nodes("nodes6", 38),
        token: token(r),
        values,
        pvs,
        item: raw_entry(bytes, b"r").and_then(|r| raw_entry(r, b"v")).map(<[u8]>::to_vec),
        statements: strings("sts").into_iter().filter(|s| s.len() == STATEMENT_BYTES).map(<[u8]>::to_vec).collect(),
        dialled: r.get("ok".as_bytes()).and_then(int).map(|ok| ok == 1),
    })))
}

fn error(dict: &Entries) -> Option<Body> {
    let list = dict.get("e".as_bytes())?.as_list()?;
    let text = list.get(1).and_then(|t| t.as_byte_str()).map(|t| t.as_slice()).unwrap_or_default();
    let text = String::from_utf8_lossy(text.get(..64).unwrap_or(text)).into_owned();
    Some(Body::Error { code: int(list.first()?)?, text })
}

impl Verb {
    fn to_args(&self, id: &Id) -> (Vec<u8>, Value) {
        let mut a = Dict::default();
        let name: &[u8] = match self {
            Self::Ping => b"ping",
            Self::FindNode { target, want } => {
                a.bytes("target", &target.0);
                a.want(*want);
                b"find_node"
            }
            Self::GetPeers { key, want, pv, statements, token } => {
                a.bytes("info_hash", &key.0);
                a.want(*want);
                if *pv {
                    a.put("pv", Value::from(1));
                }
                if *statements {
                    a.put("st", Value::from(1));
                }
                if let Some(token) = token {
                    a.bytes("token", token);
                }
                b"get_peers"
            }
            Self::Announce(announce) => {
                a.bytes("info_hash", &announce.key.0);
                a.put("port", Value::from(announce.port));
                if announce.implied_port {
                    a.put("implied_port", Value::from(1));
                }
                a.bytes("token", &announce.token);
                if let Some(pv) = &announce.pv {
                    a.bytes("pv", pv);
                }
                if !announce.more.is_empty() {
                    a.bytes("more", &announce.more.iter().flat_map(|key| key.0).collect::<Vec<u8>>());
                }
                if let Some(statement) = &announce.statement {
                    a.bytes("st", statement);
                }
                b"announce_peer"
            }
            Self::Get { target, want } => {
                a.bytes("target", &target.0);
                a.want(*want);
                b"get"
            }
            Self::Put { value, token, mutable: _ } => {
                // What is hashed is what is sent: a value in another writing is sent in the canonical one.
                let value = bt_bencode::from_slice(value).unwrap_or_else(|_| byte_str(value));
                let sent = bt_bencode::to_vec(&value).expect("a vector takes all bytes");
                a.bytes("target", &super::item_target(&sent).0); // Not in BEP 44; `mainline` does not answer without it.
                a.bytes("token", token);
                a.put("v", value);
                b"put"
            }
            Self::Dial { port, token } => {
                a.put("port", Value::from(*port));
                a.bytes("token", token);
                b"pf_dial"
            }
            Self::Other { name, args } => {
                a.0 = args.as_dict().cloned().unwrap_or_default();
                name
            }
        };
        a.bytes("id", &id.0);
        (name.to_vec(), Value::Dict(a.0))
    }
}

impl Reply {
    fn to_dict(&self) -> Value {
        let mut r = Dict::default();
        r.bytes("id", &self.id.0);
        for (key, nodes) in [("nodes", &self.nodes), ("nodes6", &self.nodes6)] {
            if !nodes.is_empty() {
                let mut compact = Vec::with_capacity(nodes.len() * 38);
                for node in nodes {
                    compact.extend_from_slice(&node.id.0);
                    compact.extend_from_slice(&contact_to_vec(node.addr));
                }
                r.bytes(key, &compact);
            }
        }
        if let Some(token) = &self.token {
            r.bytes("token", token);
        }
        let list = |items: &[Vec<u8>]| Value::List(items.iter().map(|item| byte_str(item)).collect());
        if !self.values.is_empty() {
            r.put("values", Value::List(self.values.iter().map(|value| byte_str(&contact_to_vec(*value))).collect()));
        }
        if !self.pvs.is_empty() {
            r.put("pvs", list(&self.pvs));
        }
        if let Some(item) = &self.item {
            r.put("v", bt_bencode::from_slice(item).unwrap_or_else(|_| byte_str(item)));
        }
        if !self.statements.is_empty() {
            r.put("sts", list(&self.statements));
        }
        if let Some(dialled) = self.dialled {
            r.put("ok", Value::from(i64::from(dialled)));
        }
        Value::Dict(r.0)
    }
}
