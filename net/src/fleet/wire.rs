//! What members say to each other, and its bytes.
//!
//! Queries and replies of KRPC on the node's port, each with the tag of [`super::auth`] under `ha`. Reading is strict: what is
//! not canonical bencode, or has an entry of a wrong length, is nothing. Nothing is parsed before its tag has been checked.
//!
//! | verb | asks | answer |
//! |---|---|---|
//! | `pf_want` | [`Want`]: `f` digest, `g` group, `h` pieces had, `n` size, `b`/`c` bad contacts, `d`/`e` silent coordinators, `j` newcomer, `k` room at the mirror where it is less than [`ROOM_MAX`], `m` mirror bad, `p` its pace | [`Reply`]: `t` take, `f`/`g` from, `w` wait, `s` see, `x` free |
//! | `pf_have` | `d`: up to [`HAVE_DIGESTS_MAX`] digests | nothing |
//! | `pf_who` | `f`: a digest | `f`/`g`: up to [`FROM_MAX`] members that told of it by `pf_have` |
//! | `pf_ping` | `s` the sender, `c` changes | the same, `d` digest and `n` number of the members |
//! | `pf_list` | `a`: members after this id | `m` members, `e` no more follow |
//!
//! Pieces of a group are 2 bytes, the first piece in the most significant bit. A contact is 6 or 18 bytes; one of zeros in `f`
//! is the answerer itself, which may not know how others reach it. A [`Change`] is one byte of [`State`], the id, 8 bytes of
//! incarnation, 6 of IPv4 and 18 of IPv6 contact (zeros: none), one of the zone's length, and the zone.
//!
//! Sizes in bytes, checked by a test: `pf_want` 175, its reply at most 175 + 64; `pf_have` 147 with one digest, 1,141 with 32.

use super::auth::{FleetKey, Nonce, REPLY_TAG_BYTES, TAG_BYTES};
use crate::dht::address::{Network, is_usable};
use crate::krpc::message::int;
use crate::krpc::scan::{raw_entry, scan};
use crate::krpc::{DATAGRAM_BYTES_OUT_MAX, Transaction, VERSION, contact_from_slice, contact_to_vec};
use crate::swarm::FileShape;
use crate::swarm::fleet::{BAD_MAX, FROM_MAX, GroupKey, MemberId, ROOM_MAX, Reply, SILENT_MAX, Want, groups};
use bt_bencode::{ByteString, Value};
use poolfs_core::Digest;
use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::sync::Arc;
use std::time::Duration;

/// Digests in one `pf_have`.
pub const HAVE_DIGESTS_MAX: usize = 32;

/// Changes that ride along with a ping or its answer.
pub const CHANGES_MAX: usize = 6;

/// Bytes of a zone's label.
pub const ZONE_BYTES_MAX: usize = 32;

/// Bytes of members in one answer to `pf_list`.
pub const LIST_BYTES_MAX: usize = 1_000;

/// Files that may be wanted: past this no package and no index lies.
pub const SIZE_MAX: u64 = 1 << 40;

/// Bytes before a change's zone.
const CHANGE_BYTES_MIN: usize = 1 + 20 + 8 + 6 + 18 + 1;

/// How a member is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[repr(u8)]
pub enum State {
    /// It answers.
    Alive = 0,
    /// Somebody has had no answer.
    Suspect = 1,
    /// It is not a member any more.
    Out = 2,
}

/// What is known of a member.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Record {
    /// Who.
    pub id: MemberId,
    /// When it started, in seconds since 1970; one more each time it contradicts a rumour of its death.
    pub incarnation: u64,
    /// Where it is reached by IPv4.
    pub v4: Option<SocketAddrV4>,
    /// Where it is reached by IPv6.
    pub v6: Option<SocketAddrV6>,
    /// Its zone, at most [`ZONE_BYTES_MAX`] bytes.
    pub zone: Arc<str>,
}

/// A member and how it is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Change {
    /// How it is.
    pub state: State,
    /// Who.
    pub record: Record,
}

/// A `pf_ping`, or the part of its answer that is alike.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Ping {
    /// The sender.
    pub sender: Record,
    /// Up to [`CHANGES_MAX`].
    pub changes: Vec<Change>,
}

/// A query's meaning.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Ask {
    /// Are you there?
    Ping(Ping),
    /// What am I to fetch from whom?
    Want(Want),
    /// I have these files.
    Have(Vec<Digest>),
    /// Who has told you that it has this?
    Who(Digest),
    /// Who is in the fleet, of those after this id?
    List {
        /// The last one known.
        after: MemberId,
    },
}

/// An answer's meaning.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Answer {
    /// To a ping.
    Pong {
        /// The answerer, and changes.
        ping: Ping,
        /// Of its members, see [`super::members::Members::digest`].
        digest: u64,
        /// How many they are.
        count: u32,
    },
    /// To a want. A contact of zeros in `from` is the answerer.
    Reply(Reply),
    /// To a `pf_have`.
    Had,
    /// To a `pf_who`: at most [`FROM_MAX`]; a contact of zeros is the answerer.
    Who(Vec<SocketAddr>),
    /// To a `pf_list`.
    List {
        /// In the order of their ids.
        members: Vec<Change>,
        /// No more follow.
        end: bool,
    },
}

/// Which kind of answer a query has.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// `pf_ping`.
    Ping,
    /// `pf_want`.
    Want,
    /// `pf_have`.
    Have,
    /// `pf_who`.
    Who,
    /// `pf_list`.
    List,
}

impl Kind {
    fn verb(self) -> &'static [u8] {
        match self {
            Self::Ping => b"pf_ping",
            Self::Want => b"pf_want",
            Self::Have => b"pf_have",
            Self::Who => b"pf_who",
            Self::List => b"pf_list",
        }
    }
}

impl Ask {
    /// Which kind it is.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Ping(_) => Kind::Ping,
            Self::Want(_) => Kind::Want,
            Self::Have(_) => Kind::Have,
            Self::Who(_) => Kind::Who,
            Self::List { .. } => Kind::List,
        }
    }
}

/// The contact that stands for the answerer itself.
pub const ANSWERER: SocketAddr = SocketAddr::V4(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 0));

/// A datagram whose tag has not been checked yet.
#[derive(Debug)]
pub struct Envelope<'a> {
    /// Whether it asks.
    pub is_query: bool,
    /// Of the query.
    pub transaction: Transaction,
    /// As it came.
    pub tag: &'a [u8],
    /// The datagram with zeros for the tag: what the tag is over.
    pub tagged: Vec<u8>,
    bytes: &'a [u8],
}

/// Whether a datagram is one of a fleet's, to be told apart from the DHT's before either is looked at.
pub fn is_fleet(bytes: &[u8]) -> bool {
    bytes.windows(4).any(|window| window == b"2:ha") && Envelope::read(bytes).is_some()
}

impl<'a> Envelope<'a> {
    /// Reads the outside of a datagram; `None` if it is none of a fleet's.
    pub fn read(bytes: &'a [u8]) -> Option<Self> {
        if !scan(bytes).is_ok_and(|scanned| scanned.canonical) {
            return None;
        }
        let entry = |key: &[u8]| raw_entry(bytes, key).and_then(content);
        let is_query = match entry(b"y")? {
            b"q" => true,
            b"r" => false,
            _ => return None,
        };
        let transaction = Transaction::new(entry(b"t")?)?;
        let tag = entry(b"ha")?;
        if tag.len() != if is_query { TAG_BYTES } else { REPLY_TAG_BYTES } {
            return None;
        }
        let at = tag.as_ptr() as usize - bytes.as_ptr() as usize;
        let mut tagged = bytes.to_vec();
        tagged[at..at + tag.len()].fill(0);
        Some(Self { is_query, transaction, tag, tagged, bytes })
    }

    /// Who asks, and what. `None`: nothing that this version understands.
    pub fn query(&self) -> Option<(MemberId, Ask)> {
        let value: Value = bt_bencode::from_slice(self.bytes).ok()?;
        let dict = value.as_dict()?;
        let args = dict.get("a".as_bytes())?.as_dict()?;
        let ask = match string(dict, "q")? {
            b"pf_ping" => Ask::Ping(ping(args)?),
            b"pf_want" => Ask::Want(want(args)?),
            b"pf_have" => Ask::Have(digests(string(args, "d")?)?),
            b"pf_who" => Ask::Who(Digest(string(args, "f")?.try_into().ok()?)),
            b"pf_list" => Ask::List { after: id(args, "a")? },
            _ => return None,
        };
        Some((id(args, "id")?, ask))
    }

    /// Who answers, what, and how it sees this machine.
    pub fn answer(&self, to: Kind) -> Option<(MemberId, Answer, Option<SocketAddr>)> {
        let value: Value = bt_bencode::from_slice(self.bytes).ok()?;
        let dict = value.as_dict()?;
        let r = dict.get("r".as_bytes())?.as_dict()?;
        let answer = match to {
            Kind::Ping => Answer::Pong {
                ping: ping(r)?,
                digest: u64::from_be_bytes(string(r, "d")?.try_into().ok()?),
                count: u32::try_from(r.get("n".as_bytes()).and_then(int)?).ok()?,
            },
            Kind::Want => Answer::Reply(reply(r)?),
            Kind::Have => Answer::Had,
            Kind::Who => Answer::Who(named(r, 0)?.into_iter().map(|(contact, _)| contact).collect()),
            Kind::List => {
                Answer::List { members: changes(string(r, "m")?, usize::MAX)?, end: r.get("e".as_bytes()).and_then(int) == Some(1) }
            }
        };
        Some((id(r, "id")?, answer, string(dict, "ip").and_then(contact_from_slice)))
    }
}

/// The bytes of a query, tagged.
pub fn query(key: &FleetKey, me: MemberId, transaction: [u8; 4], nonce: Nonce, now_s: u64, ask: &Ask) -> Vec<u8> {
    let mut out = Writer::default();
    out.open("a");
    match ask {
        Ask::Ping(ping) => {
            out.ping_head(ping);
            out.bytes("id", &me.0);
            out.bytes("s", &change_to_vec(State::Alive, &ping.sender));
        }
        Ask::Want(want) => {
            let (v4, v6): (Vec<SocketAddr>, Vec<SocketAddr>) = want.bad.iter().take(BAD_MAX).partition(|bad| bad.is_ipv4());
            out.contacts("b", &v4);
            out.contacts("c", &v6);
            let (v4, v6): (Vec<SocketAddr>, Vec<SocketAddr>) = want.silent.iter().take(SILENT_MAX).partition(|silent| silent.is_ipv4());
            out.contacts("d", &v4);
            out.contacts("e", &v6);
            out.bytes("f", &want.key.digest.0);
            out.int("g", want.key.group.into());
            out.bytes("h", &want.have.reverse_bits().to_be_bytes());
            out.bytes("id", &me.0);
            out.flag("j", want.newcomer);
            if want.room < ROOM_MAX {
                out.int("k", want.room.into());
            }
            out.flag("m", want.mirror_bad);
            out.int("n", want.size);
            if let Some(pace) = want.mirror_pace {
                out.int("p", millis(pace).into());
            }
        }
        Ask::Have(digests) => {
            out.bytes("d", &digests.iter().take(HAVE_DIGESTS_MAX).flat_map(|digest| digest.0).collect::<Vec<u8>>());
            out.bytes("id", &me.0);
        }
        Ask::Who(digest) => {
            out.bytes("f", &digest.0);
            out.bytes("id", &me.0);
        }
        Ask::List { after } => {
            out.bytes("a", &after.0);
            out.bytes("id", &me.0);
        }
    }
    out.close();
    let tag_at = out.tag(TAG_BYTES);
    out.bytes("q", ask.kind().verb());
    out.bytes("t", &transaction);
    out.bytes("v", &VERSION);
    out.bytes("y", b"q");
    let mut bytes = out.end();
    let tag = key.sign(nonce, now_s, &[&bytes]);
    bytes[tag_at..tag_at + TAG_BYTES].copy_from_slice(&tag);
    debug_assert!(bytes.len() <= DATAGRAM_BYTES_OUT_MAX);
    bytes
}

/// The bytes of the answer to the query with this transaction and nonce, tagged; `to` is told how it is seen.
pub fn answer(key: &FleetKey, me: MemberId, transaction: &Transaction, nonce: Nonce, to: SocketAddr, answer: &Answer) -> Vec<u8> {
    let mut out = Writer::default();
    let tag_at = out.tag(REPLY_TAG_BYTES);
    if matches!(answer, Answer::Pong { .. }) {
        out.bytes("ip", &contact_to_vec(to));
    }
    out.open("r");
    match answer {
        Answer::Pong { ping, digest, count } => {
            out.ping_head(ping);
            out.bytes("d", &digest.to_be_bytes());
            out.bytes("id", &me.0);
            out.int("n", (*count).into());
            out.bytes("s", &change_to_vec(State::Alive, &ping.sender));
        }
        Answer::Reply(reply) => {
            let part = |v4: bool| -> Vec<u8> {
                let of_family = reply.from.iter().take(FROM_MAX).filter(|(contact, _)| contact.is_ipv4() == v4);
                of_family
                    .flat_map(|(contact, bits)| [contact_to_vec(*contact), bits.reverse_bits().to_be_bytes().to_vec()].concat())
                    .collect()
            };
            out.bytes_if("f", &part(true));
            out.bytes_if("g", &part(false));
            out.bytes("id", &me.0);
            if let Some(see) = reply.see {
                out.bytes("s", &contact_to_vec(see));
            }
            if let Some((bits, lasts)) = reply.take {
                out.bytes("t", &[bits.reverse_bits().to_be_bytes(), millis(lasts).to_be_bytes()].concat());
            }
            if let Some(wait) = reply.wait {
                out.int("w", millis(wait).into());
            }
            out.flag("x", reply.free);
        }
        Answer::Had => out.bytes("id", &me.0),
        Answer::Who(holders) => {
            let (v4, v6): (Vec<SocketAddr>, Vec<SocketAddr>) = holders.iter().take(FROM_MAX).partition(|holder| holder.is_ipv4());
            out.contacts("f", &v4);
            out.contacts("g", &v6);
            out.bytes("id", &me.0);
        }
        Answer::List { members, end } => {
            out.flag("e", *end);
            out.bytes("id", &me.0);
            out.bytes("m", &changes_to_vec(members));
        }
    }
    out.close();
    out.bytes("t", transaction.as_slice());
    out.bytes("v", &VERSION);
    out.bytes("y", b"r");
    let mut bytes = out.end();
    let tag = key.sign_reply(nonce, &[&bytes]);
    bytes[tag_at..tag_at + REPLY_TAG_BYTES].copy_from_slice(&tag);
    debug_assert!(bytes.len() <= DATAGRAM_BYTES_OUT_MAX);
    bytes
}

fn millis(of: Duration) -> u16 {
    u16::try_from(of.as_millis()).unwrap_or(u16::MAX)
}

/// One change's bytes.
pub(super) fn change_to_vec(state: State, record: &Record) -> Vec<u8> {
    let mut out = Vec::with_capacity(CHANGE_BYTES_MIN + record.zone.len());
    out.push(state as u8);
    out.extend_from_slice(&record.id.0);
    out.extend_from_slice(&record.incarnation.to_be_bytes());
    out.extend(record.v4.map_or_else(|| vec![0; 6], |v4| contact_to_vec(v4.into())));
    out.extend(record.v6.map_or_else(|| vec![0; 18], |v6| contact_to_vec(v6.into())));
    let mut cut = record.zone.len().min(ZONE_BYTES_MAX);
    while !record.zone.is_char_boundary(cut) {
        cut -= 1;
    }
    out.push(u8::try_from(cut).expect("at most ZONE_BYTES_MAX"));
    out.extend_from_slice(&record.zone.as_bytes()[..cut]);
    out
}

fn changes_to_vec(all: &[Change]) -> Vec<u8> {
    all.iter().flat_map(|change| change_to_vec(change.state, &change.record)).collect()
}

/// Reads changes one after the other; `None` if one is none, or if they are more than `max`.
pub(super) fn changes(mut bytes: &[u8], max: usize) -> Option<Vec<Change>> {
    let mut all = Vec::new();
    while !bytes.is_empty() {
        let (head, rest) = bytes.split_first_chunk::<CHANGE_BYTES_MIN>()?;
        let zone_bytes = usize::from(head[CHANGE_BYTES_MIN - 1]);
        if zone_bytes > ZONE_BYTES_MAX || all.len() >= max {
            return None;
        }
        let (zone, rest) = rest.split_at_checked(zone_bytes)?;
        bytes = rest;
        let state = match head[0] {
            0 => State::Alive,
            1 => State::Suspect,
            2 => State::Out,
            _ => return None,
        };
        let usable = |bytes: &[u8]| contact_from_slice(bytes).filter(|contact| is_usable(*contact, Network::Private));
        let v4 = usable(&head[29..35]).and_then(|contact| if let SocketAddr::V4(v4) = contact { Some(v4) } else { None });
        let v6 = usable(&head[35..53]).and_then(|contact| if let SocketAddr::V6(v6) = contact { Some(v6) } else { None });
        let record = Record {
            id: MemberId(head[1..21].try_into().ok()?),
            incarnation: u64::from_be_bytes(head[21..29].try_into().ok()?),
            v4,
            v6,
            zone: Arc::from(std::str::from_utf8(zone).ok()?),
        };
        all.push(Change { state, record });
    }
    Some(all)
}

type Entries = BTreeMap<ByteString, Value>;

/// What is in a bencoded string.
fn content(raw: &[u8]) -> Option<&[u8]> {
    let colon = raw.iter().position(|byte| *byte == b':')?;
    raw[..colon].iter().all(u8::is_ascii_digit).then(|| &raw[colon + 1..])
}

fn string<'a>(dict: &'a Entries, key: &str) -> Option<&'a [u8]> {
    dict.get(key.as_bytes())?.as_byte_str().map(|string| string.as_slice())
}

fn id(dict: &Entries, key: &str) -> Option<MemberId> {
    string(dict, key)?.try_into().ok().map(MemberId)
}

fn ping(dict: &Entries) -> Option<Ping> {
    let sender = changes(string(dict, "s")?, 1)?.pop()?;
    (sender.state == State::Alive && sender.record.id == id(dict, "id")?).then_some(())?;
    Some(Ping { sender: sender.record, changes: changes(string(dict, "c").unwrap_or_default(), CHANGES_MAX)? })
}

fn digests(bytes: &[u8]) -> Option<Vec<Digest>> {
    let (all, rest) = bytes.as_chunks::<32>();
    (rest.is_empty() && (1..=HAVE_DIGESTS_MAX).contains(&all.len())).then(|| all.iter().copied().map(Digest).collect())
}

fn piece_bits(bytes: &[u8]) -> Option<u16> {
    Some(u16::from_be_bytes(bytes.try_into().ok()?).reverse_bits())
}

/// Contacts one after the other, each followed by `more` bytes.
fn contacts(dict: &Entries, key: &str, address_bytes: usize, more: usize, max: usize) -> Option<Vec<(SocketAddr, Vec<u8>)>> {
    let bytes = string(dict, key).unwrap_or_default();
    let each = address_bytes + more;
    if !bytes.len().is_multiple_of(each) || bytes.len() / each > max {
        return None;
    }
    bytes.chunks_exact(each).map(|one| Some((contact_from_slice(&one[..address_bytes])?, one[address_bytes..].to_vec()))).collect()
}

fn want(args: &Entries) -> Option<Want> {
    let mut bad = contacts(args, "b", 6, 0, BAD_MAX)?;
    bad.extend(contacts(args, "c", 18, 0, BAD_MAX)?);
    let mut silent = contacts(args, "d", 6, 0, SILENT_MAX)?;
    silent.extend(contacts(args, "e", 18, 0, SILENT_MAX)?);
    let size = u64::try_from(args.get("n".as_bytes()).and_then(int)?).ok()?;
    let key = GroupKey {
        digest: Digest(string(args, "f")?.try_into().ok()?),
        group: u32::try_from(args.get("g".as_bytes()).and_then(int)?).ok()?,
    };
    if bad.len() > BAD_MAX
        || silent.len() > SILENT_MAX
        || size == 0
        || size > SIZE_MAX
        || key.group >= groups(&FileShape::of(key.digest, size))
    {
        return None;
    }
    Some(Want {
        key,
        size,
        have: piece_bits(string(args, "h")?)?,
        bad: bad.into_iter().map(|(contact, _)| contact).collect(),
        silent: silent.into_iter().map(|(contact, _)| contact).collect(),
        mirror_bad: args.get("m".as_bytes()).and_then(int) == Some(1),
        mirror_pace: match args.get("p".as_bytes()) {
            None => None,
            Some(pace) => Some(Duration::from_millis(u16::try_from(int(pace)?).ok()?.into())),
        },
        room: match args.get("k".as_bytes()) {
            None => ROOM_MAX,
            Some(room) => u8::try_from(int(room)?).ok().filter(|room| *room < ROOM_MAX)?,
        },
        newcomer: args.get("j".as_bytes()).and_then(int) == Some(1),
    })
}

/// The members that an answer names, each with `more` bytes.
fn named(r: &Entries, more: usize) -> Option<Vec<(SocketAddr, Vec<u8>)>> {
    let mut all = contacts(r, "f", 6, more, FROM_MAX)?;
    all.extend(contacts(r, "g", 18, more, FROM_MAX)?);
    (all.len() <= FROM_MAX).then_some(all)
}

fn reply(r: &Entries) -> Option<Reply> {
    let from = named(r, 2)?.into_iter().map(|(contact, bits)| Some((contact, piece_bits(&bits)?))).collect::<Option<Vec<_>>>()?;
    let take = match string(r, "t") {
        None => None,
        Some(bytes) => {
            let (bits, lasts) = bytes.split_at_checked(2)?;
            Some((piece_bits(bits)?, Duration::from_millis(u16::from_be_bytes(lasts.try_into().ok()?).into())))
        }
    };
    let wait = match r.get("w".as_bytes()) {
        None => None,
        Some(wait) => Some(Duration::from_millis(u16::try_from(int(wait)?).ok()?.into())),
    };
    let see = match string(r, "s") {
        None => None,
        Some(bytes) => Some(contact_from_slice(bytes)?),
    };
    Some(Reply { take, from, wait, see, free: r.get("x".as_bytes()).and_then(int) == Some(1) })
}

/// Writes one dictionary; whoever calls it brings the keys in their order.
struct Writer(Vec<u8>);

impl Default for Writer {
    fn default() -> Self {
        Self(b"d".to_vec())
    }
}

impl Writer {
    fn string(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes.len().to_string().as_bytes());
        self.0.push(b':');
        self.0.extend_from_slice(bytes);
    }

    fn bytes(&mut self, key: &str, value: &[u8]) {
        self.string(key.as_bytes());
        self.string(value);
    }

    fn bytes_if(&mut self, key: &str, value: &[u8]) {
        if !value.is_empty() {
            self.bytes(key, value);
        }
    }

    fn contacts(&mut self, key: &str, contacts: &[SocketAddr]) {
        self.bytes_if(key, &contacts.iter().flat_map(|contact| contact_to_vec(*contact)).collect::<Vec<u8>>());
    }

    fn int(&mut self, key: &str, value: u64) {
        self.string(key.as_bytes());
        self.0.extend_from_slice(format!("i{value}e").as_bytes());
    }

    fn flag(&mut self, key: &str, set: bool) {
        if set {
            self.int(key, 1);
        }
    }

    fn ping_head(&mut self, ping: &Ping) {
        self.bytes_if("c", &changes_to_vec(ping.changes.get(..CHANGES_MAX).unwrap_or(&ping.changes)));
    }

    fn open(&mut self, key: &str) {
        self.string(key.as_bytes());
        self.0.push(b'd');
    }

    fn close(&mut self) {
        self.0.push(b'e');
    }

    /// Leaves room for the tag, and says where.
    fn tag(&mut self, len: usize) -> usize {
        self.bytes("ha", &vec![0; len]);
        self.0.len() - len
    }

    fn end(mut self) -> Vec<u8> {
        self.close();
        self.0
    }
}

#[cfg(test)]
mod tests;
