//! `net.db`: what the network side keeps between runs, apart from the store's database.
//!
//! The network side may move into a process of its own with other rights, so it shares no file with the mounts: its key
//! pair, the saved routing tables, and what it learned about others live here. Losing the file costs a new identity and
//! a slower start, nothing else; so it is thrown away and made anew only by hand, never silently.
//!
//! The file holds a secret key and is created readable by its owner alone. One connection behind [`Db`]'s lock; calls may wait for
//! the disk, so callers in tasks go through `spawn_blocking`.

use crate::swarm::fleet::MemberId;
use ed25519_dalek::SigningKey;
use poolfs_core::db::{Db, DbError};
use rusqlite::{OptionalExtension as _, params};
use sha2::{Digest as _, Sha256};
use std::fs::{self, OpenOptions};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// The file's name in the network side's directory, by default `/var/lib/poolfs/net`.
pub const FILE_NAME: &str = "net.db";

/// Nodes kept per address family: more than a routing table holds in any network seen (8 in each of some 30 buckets).
pub const SAVED_NODES_MAX: usize = 512;

/// Members of the fleet kept: enough that one of them answers.
pub const SAVED_MEMBERS_MAX: usize = 512;

/// Where systemd keeps the machine's id, see machine-id(5).
const MACHINE_ID: &str = "/etc/machine-id";

/// Each migration brings the schema from version `index` to `index + 1`. Never edit one that was released: add another.
const MIGRATIONS: &[&str] =
    &[include_str!("netdb/0001.sql"), include_str!("netdb/0002.sql"), include_str!("netdb/0003.sql"), include_str!("netdb/0004.sql")];

/// Why the network side's database cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum NetDbError {
    /// The directory or the file cannot be created.
    #[error("create {path}: {source}; check that the directory is writable and has space")]
    Create {
        /// What was to be created.
        path: PathBuf,
        /// The system's word for it.
        source: io::Error,
    },
    /// The file is damaged, or no database.
    #[error("{path} is corrupt: {what}; move it away: this machine then takes a new key and finds the network anew, and no file is lost")]
    Corrupt {
        /// The database file.
        path: PathBuf,
        /// What SQLite found.
        what: String,
    },
    /// SQLite cannot use the file for another reason.
    #[error(transparent)]
    Db(DbError),
}

impl From<DbError> for NetDbError {
    fn from(err: DbError) -> Self {
        match err {
            // The remedy is the same as for the mounts' database, what it costs is not.
            DbError::Corrupt { path, what } => Self::Corrupt { path, what },
            err => Self::Db(err),
        }
    }
}

impl From<rusqlite::Error> for NetDbError {
    fn from(err: rusqlite::Error) -> Self {
        DbError::from(err).into()
    }
}

/// How this run came by its key pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeyOrigin {
    /// It is the one of earlier runs.
    Kept,
    /// There was none.
    Created,
    /// The one in the file belongs to another machine, of which this one is a copy: replaced.
    ReplacedClone,
}

/// A node as saved: enough to ask it again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SavedNode {
    /// Its id when last heard.
    pub id: [u8; 20],
    /// Where it answered; never a mapped address (IPv4 inside IPv6).
    pub address: SocketAddr,
}

/// The open database.
#[derive(Debug)]
pub struct NetDb {
    db: Db,
}

impl NetDb {
    /// Opens or creates [`FILE_NAME`] in `dir`, creating the directory too.
    pub fn open(dir: &Path) -> Result<Self, NetDbError> {
        fs::create_dir_all(dir).map_err(|source| NetDbError::Create { path: dir.to_owned(), source })?;
        let path = dir.join(FILE_NAME);
        // SQLite gives its journal files the mode of the database, so this one call covers the secret's copies too.
        OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(|source| NetDbError::Create { path: path.clone(), source })?;
        Ok(Self { db: Db::open_with(&path, MIGRATIONS)? })
    }

    /// The connection, for the modules that keep tables of their own here.
    pub fn db(&self) -> &Db {
        &self.db
    }

    /// The node's key pair: kept, made at the first run, or made anew where the file was copied to another machine.
    ///
    /// `machine` comes from [`machine_hash`]; without one (a container) a copy cannot be told and the key is kept.
    pub fn identity(&self, machine: Option<[u8; 32]>) -> Result<(SigningKey, KeyOrigin), NetDbError> {
        self.db.transaction(|tx| {
            let kept: Option<([u8; 32], Option<[u8; 32]>)> =
                tx.query_row("SELECT secret, machine FROM identity", [], |row| Ok((row.get(0)?, row.get(1)?))).optional()?;
            let origin = match kept {
                Some((secret, seen)) => {
                    if seen.is_none() || machine.is_none() || seen == machine {
                        if seen.is_none() && machine.is_some() {
                            tx.execute("UPDATE identity SET machine = ?1", params![machine])?;
                        }
                        return Ok((SigningKey::from_bytes(&secret), KeyOrigin::Kept));
                    }
                    KeyOrigin::ReplacedClone
                }
                None => KeyOrigin::Created,
            };
            Ok((write_new_key(tx, machine)?, origin))
        })
    }

    /// Puts a fresh key pair in the place of the old one: another live node was seen using the same.
    pub fn replace_identity(&self, machine: Option<[u8; 32]>) -> Result<SigningKey, NetDbError> {
        self.db.transaction(|tx| Ok(write_new_key(tx, machine)?))
    }

    /// Replaces the saved nodes by `nodes`, best first; past [`SAVED_NODES_MAX`] of a family the rest is left out.
    ///
    /// A family without a node in `nodes` keeps what was saved: an hour without IPv6 must not forget the IPv6 network.
    pub fn save_nodes(&self, nodes: &[SavedNode]) -> Result<(), NetDbError> {
        self.db.transaction(|tx| {
            for family in [4, 6] {
                let of_family = nodes.iter().filter(|node| family_of(node.address) == family).take(SAVED_NODES_MAX);
                let mut insert =
                    tx.prepare_cached("INSERT INTO routing (family, rank, node, address, port) VALUES (?1, ?2, ?3, ?4, ?5)")?;
                for (rank, node) in of_family.enumerate() {
                    if rank == 0 {
                        tx.execute("DELETE FROM routing WHERE family = ?1", [family])?;
                    }
                    let rank = i64::try_from(rank).expect("below SAVED_NODES_MAX");
                    match node.address.ip() {
                        IpAddr::V4(ip) => insert.execute(params![family, rank, node.id, ip.octets(), node.address.port()])?,
                        IpAddr::V6(ip) => insert.execute(params![family, rank, node.id, ip.octets(), node.address.port()])?,
                    };
                }
            }
            Ok(())
        })
    }

    /// The saved nodes, IPv4 first, each family best first.
    pub fn saved_nodes(&self) -> Result<Vec<SavedNode>, NetDbError> {
        let reader = self.db.reader()?;
        let mut statement = reader.prepare_cached("SELECT family, node, address, port FROM routing ORDER BY family, rank")?;
        let rows = statement.query_map([], |row| {
            let ip: IpAddr = match row.get(0)? {
                4_u8 => Ipv4Addr::from(row.get::<_, [u8; 4]>(2)?).into(),
                _ => Ipv6Addr::from(row.get::<_, [u8; 16]>(2)?).into(),
            };
            Ok(SavedNode { id: row.get(1)?, address: SocketAddr::new(ip, row.get(3)?) })
        })?;
        Ok(rows.collect::<Result<_, _>>()?)
    }
}

impl NetDb {
    /// Replaces the saved members of the fleet; past [`SAVED_MEMBERS_MAX`] the rest is left out.
    pub fn save_members(&self, members: &[(MemberId, SocketAddr)]) -> Result<(), NetDbError> {
        self.db.transaction(|tx| {
            tx.execute("DELETE FROM member", [])?;
            let mut insert = tx.prepare_cached("INSERT OR REPLACE INTO member (id, address, port) VALUES (?1, ?2, ?3)")?;
            for (id, contact) in members.iter().take(SAVED_MEMBERS_MAX) {
                match contact.ip() {
                    IpAddr::V4(ip) => insert.execute(params![id.0, ip.octets(), contact.port()])?,
                    IpAddr::V6(ip) => insert.execute(params![id.0, ip.octets(), contact.port()])?,
                };
            }
            Ok(())
        })
    }

    /// Where the saved members of the fleet were, in no order.
    pub fn saved_members(&self) -> Result<Vec<SocketAddr>, NetDbError> {
        let reader = self.db.reader()?;
        let mut statement = reader.prepare_cached("SELECT address, port FROM member")?;
        let rows = statement.query_map([], |row| {
            let address: Vec<u8> = row.get(0)?;
            let v4 = <[u8; 4]>::try_from(address.as_slice()).map(|octets| IpAddr::from(Ipv4Addr::from(octets)));
            let ip = v4.or_else(|_| <[u8; 16]>::try_from(address.as_slice()).map(|octets| Ipv6Addr::from(octets).into()));
            // The schema has no others, but what is on a disk may be anything.
            let wrong = |err| rusqlite::Error::FromSqlConversionFailure(0, rusqlite::types::Type::Blob, Box::new(err));
            Ok((ip.map_err(wrong)?, row.get(1)?))
        })?;
        Ok(rows.map(|row| row.map(SocketAddr::from)).collect::<Result<_, _>>()?)
    }
}

fn write_new_key(tx: &rusqlite::Transaction<'_>, machine: Option<[u8; 32]>) -> rusqlite::Result<SigningKey> {
    let secret: [u8; 32] = rand::random();
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs().cast_signed());
    tx.execute("REPLACE INTO identity (one, secret, machine, created_at) VALUES (1, ?1, ?2, ?3)", params![secret, machine, now])?;
    Ok(SigningKey::from_bytes(&secret))
}

fn family_of(address: SocketAddr) -> u8 {
    if address.is_ipv4() { 4 } else { 6 }
}

/// A hash that names this machine and nothing else: the id itself must not be handed on (machine-id(5)).
///
/// `None` where the machine has no id, or systemd's "uninitialized".
pub fn machine_hash() -> Option<[u8; 32]> {
    hash_machine_id(&fs::read(MACHINE_ID).ok()?)
}

fn hash_machine_id(text: &[u8]) -> Option<[u8; 32]> {
    let id = text.trim_ascii();
    if id.len() != 32 || !id.iter().all(u8::is_ascii_hexdigit) {
        return None;
    }
    Some(Sha256::new().chain_update(b"poolfs-1 machine\0").chain_update(id).finalize().into())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    fn node(n: u8, address: &str) -> SavedNode {
        SavedNode { id: [n; 20], address: address.parse().unwrap() }
    }

    /// A key that changed at each start would lose every credit; one that survives copying would make two machines one.
    #[test]
    fn key_is_kept_here_and_replaced_in_a_copy() {
        let dir = tempfile::tempdir().unwrap();
        let check = |machine: Option<[u8; 32]>| {
            let (key, origin) = NetDb::open(dir.path()).unwrap().identity(machine).unwrap();
            (key.to_bytes(), origin)
        };
        let (first, origin) = check(None);
        assert_eq!(origin, KeyOrigin::Created);
        assert_eq!(check(None), (first, KeyOrigin::Kept));
        assert_eq!(check(Some([1; 32])), (first, KeyOrigin::Kept), "an id that appears later is noted");
        assert_eq!(check(None), (first, KeyOrigin::Kept), "and one that vanishes changes nothing");
        let (second, origin) = check(Some([2; 32]));
        assert_eq!(origin, KeyOrigin::ReplacedClone);
        assert_ne!(first, second);
        assert_eq!(check(Some([2; 32])), (second, KeyOrigin::Kept));
        let replaced = NetDb::open(dir.path()).unwrap().replace_identity(Some([2; 32])).unwrap().to_bytes();
        assert_ne!(second, replaced);
        assert_eq!(check(Some([2; 32])), (replaced, KeyOrigin::Kept));
    }

    /// A machine whose seeds are gone would be alone after a restart.
    #[test]
    fn members_are_saved() {
        let dir = tempfile::tempdir().unwrap();
        let db = NetDb::open(dir.path()).unwrap();
        let at = |n: u16| (MemberId([n.to_be_bytes()[1]; 20]), SocketAddr::from(([10, 0, 0, 1], 1024 + n)));
        let v6 = (MemberId([9; 20]), "[2001:db8::1]:9977".parse().unwrap());
        db.save_members(&[at(1), v6]).unwrap();
        assert_eq!(db.saved_members().unwrap(), [at(1).1, v6.1]);
        db.save_members(&[at(2)]).unwrap();
        assert_eq!(db.saved_members().unwrap(), [at(2).1]);
        let ids = (0..=u16::try_from(SAVED_MEMBERS_MAX).unwrap()).map(|n| {
            let mut id = [0; 20];
            id[..2].copy_from_slice(&n.to_be_bytes());
            (MemberId(id), at(n).1)
        });
        db.save_members(&ids.collect::<Vec<_>>()).unwrap();
        assert_eq!(db.saved_members().unwrap().len(), SAVED_MEMBERS_MAX);
    }

    /// A world-readable file would give the secret key away, also through the journal beside it.
    #[test]
    fn only_the_owner_can_read() {
        let dir = tempfile::tempdir().unwrap();
        let db = NetDb::open(dir.path()).unwrap();
        db.identity(None).unwrap();
        let files: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().path()).collect();
        assert!(files.len() > 1, "the journal is there: {files:?}");
        for file in files {
            assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600, "{file:?}");
        }
    }

    /// A node without its old table depends on others to start at all.
    #[test]
    fn nodes_are_saved_per_family() {
        let dir = tempfile::tempdir().unwrap();
        let db = NetDb::open(dir.path()).unwrap();
        assert_eq!(db.saved_nodes().unwrap(), []);
        let (a, b, c) = (node(1, "[2001:db8::1]:9977"), node(2, "192.0.2.2:1"), node(3, "192.0.2.3:65535"));
        db.save_nodes(&[a, b, c]).unwrap();
        drop(db);
        let db = NetDb::open(dir.path()).unwrap();
        assert_eq!(db.saved_nodes().unwrap(), [b, c, a]);
        db.save_nodes(&[c]).unwrap();
        assert_eq!(db.saved_nodes().unwrap(), [c, a], "IPv6 is not forgotten");
        let many: Vec<_> = (0..=SAVED_NODES_MAX)
            .map(|n| SavedNode { id: [0; 20], address: ([10, 0, 0, 1], 1024 + u16::try_from(n).unwrap()).into() })
            .collect();
        db.save_nodes(&many).unwrap();
        assert_eq!(db.saved_nodes().unwrap().len(), SAVED_NODES_MAX + 1, "{SAVED_NODES_MAX} of IPv4 and the one of IPv6");
    }

    /// Who is told to move the mounts' database away, when it is this one, loses an hour of hashing.
    #[test]
    fn damage_is_told_with_its_own_remedy() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(FILE_NAME), vec![b'x'; 8192]).unwrap();
        let err = NetDb::open(dir.path()).unwrap_err();
        assert!(matches!(err, NetDbError::Corrupt { .. }), "{err:?}");
        assert!(err.to_string().contains("takes a new key"), "{err}");
    }

    /// Half an id, or the word that systemd writes into images, must not make two machines look like one.
    #[test]
    fn machine_ids_are_checked() {
        let id = b"0123456789abcdef0123456789abcdef";
        assert_eq!(hash_machine_id(id), hash_machine_id(b"0123456789abcdef0123456789abcdef\n"));
        assert!(hash_machine_id(id).is_some());
        for bad in [&b""[..], b"uninitialized\n", &id[..31]] {
            assert_eq!(hash_machine_id(bad), None, "{bad:?}");
        }
    }
}
