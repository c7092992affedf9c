//! The two databases after damage: by a disk (bytes and pages of the file) and by another program (values of rows).
//!
//! An input is a series of edits of a valid file. Then it is opened and used as the daemon does: a clear error or right
//! answers, never a panic, and sums of a content are those that were recorded or none.

use crate::driver::{Subject, Target, behaviour, kind_of};
use poolfs_core::catalog::apt_config::{Environment, Options};
use poolfs_core::catalog::{AptConfig, Before, Catalog, Vanished};
use poolfs_core::store::{DB_NAME, Incoming, Kind, Objects, Provenance, SharedTo, Sharing, Stamp, State, Store};
use poolfs_core::{Digest, Role, Sums};
use poolfs_net::netdb::{FILE_NAME, NetDb, SavedNode};
use poolfs_net::swarm::fleet::MemberId;
use rusqlite::Connection;
use rusqlite::types::Value;
use std::fs::File;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Every target of this file.
pub(super) const ALL: &[Target] = &[
    Target {
        name: "poolfs-db",
        about: "the store's database, damaged by edits of its bytes and values, then opened and used",
        start: |_| Box::new(PoolfsDb::new()),
        seeds: edits,
        tokens: &["announced", "clean", "archives", "package", "written here", "\u{1}\u{0}"],
        input_bytes_max: 600,
        memory: (64 << 20, 4_096),
    },
    Target {
        name: "net-db",
        about: "the network side's database, likewise",
        start: |_| Box::new(NetworkDb::new()),
        seeds: edits,
        tokens: &["\u{4}", "\u{1}\u{0}"],
        input_bytes_max: 600,
        memory: (64 << 20, 4_096),
    },
];

const LIST: &str = "h_debian_dists_s_c_binary-amd64_Packages";

/// Edits of one input.
const EDITS_MAX: usize = 12;

fn directory() -> tempfile::TempDir {
    // In memory where there is some: each input is a copy of the file.
    let memory = Path::new("/dev/shm");
    if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() }.expect("a directory")
}

fn bytes_of(seed: u8, length: usize) -> Vec<u8> {
    (0..length).map(|at| u8::try_from(at % 251).expect("below 251") ^ seed).collect()
}

/// Does the edits of `input` to the file. Each is a byte for its kind, and what that needs.
fn edit(path: &Path, input: &[u8]) {
    let mut rest = input;
    for _ in 0..EDITS_MAX {
        let Some((kind, more)) = rest.split_first() else { return };
        rest = more;
        match kind % 8 {
            0..=2 => {
                let Some((head, more)) = rest.split_first_chunk::<5>() else { return };
                let (new, more) = more.split_at(more.len().min(usize::from(head[4] % 32) + 1));
                rest = more;
                let mut file = std::fs::read(path).expect("the database");
                if !file.is_empty() {
                    let at = u32::from_be_bytes([head[0], head[1], head[2], head[3]]) as usize % file.len();
                    let end = (at + new.len()).min(file.len());
                    file[at..end].copy_from_slice(&new[..end - at]);
                }
                std::fs::write(path, file).expect("it can be written");
            }
            3 => {
                let Some((head, more)) = rest.split_first_chunk::<2>() else { return };
                rest = more;
                let file = File::options().write(true).open(path).expect("the database");
                let length = file.metadata().expect("its length").len();
                file.set_len(length * u64::from(u16::from_be_bytes(*head)) / 65_536).expect("it can be cut");
            }
            4 => {
                let Some((head, more)) = rest.split_first_chunk::<3>() else { return };
                rest = more;
                let mut file = std::fs::read(path).expect("the database");
                let (pages, _) = file.as_chunks_mut::<4096>();
                let (from, to) = (usize::from(head[0]), usize::from(head[1]));
                if let Some(page) = pages.get(from % pages.len().max(1)).copied()
                    && let Some(place) = pages.len().checked_sub(1).map(|_| to % pages.len())
                {
                    pages[place] = if head[2].is_multiple_of(3) { [head[2]; 4096] } else { page };
                }
                std::fs::write(path, file).expect("it can be written");
            }
            _ => {
                let Some((head, more)) = rest.split_first_chunk::<4>() else { return };
                let (new, more) = more.split_at(more.len().min(usize::from(head[3] % 40)));
                rest = more;
                // What cannot be edited any more stays as it is.
                let _too_broken = set_value(path, head, new);
            }
        }
    }
}

/// Sets one column of one table's rows to a value of any type, past every check.
fn set_value(path: &Path, head: &[u8; 4], new: &[u8]) -> rusqlite::Result<()> {
    let db = Connection::open(path)?;
    db.execute_batch("PRAGMA ignore_check_constraints = 1; PRAGMA foreign_keys = 0;")?;
    let names = |sql: &str| -> rusqlite::Result<Vec<String>> { db.prepare(sql)?.query_map([], |row| row.get(0))?.collect() };
    let tables = names("SELECT name FROM sqlite_schema WHERE type = 'table' AND name NOT LIKE 'sqlite%' ORDER BY name")?;
    let Some(table) = tables.get(usize::from(head[0]) % tables.len().max(1)) else { return Ok(()) };
    let columns = names(&format!("SELECT name FROM pragma_table_info('{table}')"))?;
    let Some(column) = columns.get(usize::from(head[1]) % columns.len().max(1)) else { return Ok(()) };
    let number = new.iter().take(8).fold(0_i64, |number, byte| number << 8 | i64::from(*byte));
    let value = match head[2] % 6 {
        0 => Value::Null,
        1 => Value::Integer(number),
        2 => Value::Real(f64::from_bits(number.cast_unsigned())),
        3 => Value::Text(String::from_utf8_lossy(new).into_owned()),
        4 => Value::Integer(number.wrapping_neg()),
        _ => Value::Blob(new.to_vec()),
    };
    db.execute(&format!("UPDATE OR IGNORE {table} SET {column} = ?1"), [value])?;
    Ok(())
}

/// Some of each kind.
fn edits() -> Vec<Vec<u8>> {
    let mut all =
        vec![Vec::new(), vec![3, 0x80, 0], vec![4, 2, 3, 1], vec![4, 2, 3, 3], [&[0, 0, 0, 0, 100, 20][..], &[0xff; 20]].concat()];
    for table in 0..12 {
        for column in 0..8 {
            for kind in 0..6 {
                all.push(vec![7, table, column, kind, 4, 0xff, 0, 1, 2]);
            }
        }
    }
    all
}

/// The store's database, and the directories beside it.
struct PoolfsDb {
    valid: Vec<u8>,
    dir: tempfile::TempDir,
    sums: Sums,
}

impl PoolfsDb {
    fn new() -> Self {
        let dir = directory();
        for name in ["objects", "incoming", "archives", "lists", "state"] {
            std::fs::create_dir(dir.path().join(name)).expect("a directory");
        }
        std::fs::write(dir.path().join("sources.list"), "deb http://h/debian s c\n").expect("sources");
        let made = Self { valid: Vec::new(), dir, sums: Sums::of(&bytes_of(1, 300_000)) };
        made.fill();
        let valid = std::fs::read(made.database()).expect("the database");
        Self { valid, ..made }
    }

    fn database(&self) -> PathBuf {
        self.dir.path().join("state").join(DB_NAME)
    }

    fn directory(&self, name: &str) -> OwnedFd {
        File::open(self.dir.path().join(name)).expect("a directory").into()
    }

    fn apt(&self) -> AptConfig {
        let options = Options::parse("APT::Architecture amd64\n");
        AptConfig::of_options(options, &[self.dir.path().join("sources.list")], Environment::default())
    }

    /// One of everything.
    fn fill(&self) {
        let store = Arc::new(Store::open(&self.dir.path().join("state")).expect("a store"));
        let stamp = Stamp { size: self.sums.size, mtime_ns: 5, inode: 7 };
        for (path, sharing) in [(&b"a_1_amd64.deb"[..], Sharing::Announced), (b"partial/b_2_amd64.deb", Sharing::Available)] {
            store.record(Role::Archives, path, stamp, &self.sums, sharing, Provenance::Peer).expect("a record");
        }
        store.begin_writing(Role::Lists, b"partial/x", 9).expect("a record");
        let objects = Objects::open(Arc::clone(&store), self.directory("objects"), 1 << 30).expect("objects");
        let object = Sums::of(&bytes_of(2, 1_000));
        std::fs::write(self.dir.path().join("archives/x"), bytes_of(2, 1_000)).expect("a file");
        let from = self.directory("archives");
        let name = std::ffi::OsStr::new("x");
        objects.put(&object.digest, &object, Kind::Package, Sharing::Available, Provenance::Mirror, from.as_fd(), name).expect("an object");
        let incoming = Arc::new(Incoming::open(Arc::clone(&store), self.directory("incoming")).expect("downloads"));
        let partial = incoming.begin(Digest([3; 32]), 600_000).expect("a download");
        partial.write_piece(1, &bytes_of(4, 262_144)).expect("a piece");
        partial.sync().expect("it is kept");
        let stanza = format!(
            "Package: a\nVersion: 1\nArchitecture: amd64\nFilename: pool/a_1_amd64.deb\nSize: 300000\nSHA256: {}\n",
            self.sums.digest
        );
        std::fs::write(self.dir.path().join("lists").join(LIST), stanza).expect("a list");
        let catalog = Catalog::open(Arc::clone(store.db()), self.apt()).expect("a catalog");
        let read = catalog.refresh(self.directory("lists").as_fd(), Vanished::Drop).expect("a refresh");
        assert_eq!(read.parsed, 1, "{read:?}");
        drop((catalog, objects, partial, incoming));
        drop(store);
    }

    /// Everything that the daemon asks of it. The errors of each step, by their kinds.
    fn use_all(&self, store: Store) -> Vec<Option<String>> {
        let store = Arc::new(store);
        let mut said = Vec::new();
        let mut note = |failed: Option<String>| said.push(failed.map(kind_of));
        let name = b"a_1_amd64.deb";
        note(store.each_file(Role::Archives, |_, _| {}).err().map(|err| err.to_string()));
        note(store.file(Role::Archives, name).err().map(|err| err.to_string()));
        note(store.counts(Role::Archives).err().map(|err| err.to_string()));
        note(match store.sums(&self.sums.digest) {
            Ok(Some(sums)) => {
                assert_eq!((sums.digest, sums.size), (self.sums.digest, self.sums.size), "sums of another content");
                assert_eq!((&sums.pieces, &sums.blocks), (&self.sums.pieces, &self.sums.blocks), "false sums are given out");
                None
            }
            Ok(None) => Some("none".into()),
            Err(err) => Some(err.to_string()),
        });
        note(store.places(&self.sums.digest).err().map(|err| err.to_string()));
        note(store.shared_as(&[Sharing::Announced, Sharing::Available]).err().map(|err| err.to_string()));
        note(store.shared_places(&self.sums.digest, SharedTo::Fleet).err().map(|err| err.to_string()));
        note(store.decisions().err().map(|err| err.to_string()));
        note(store.kept_back(Role::Archives).err().map(|err| err.to_string()));
        note(match Objects::open(Arc::clone(&store), self.directory("objects"), 1 << 30) {
            Ok(objects) => {
                let _bytes = objects.bytes();
                let digest = Sums::of(&bytes_of(2, 1_000)).digest;
                let failed = objects.each(|_, _, _| {}).err().or(objects.open_object(&digest).err());
                failed.or(objects.contains(&digest).err()).map(|err| err.to_string())
            }
            Err(err) => Some(err.to_string()),
        });
        note(match Incoming::open(Arc::clone(&store), self.directory("incoming")).map(Arc::new) {
            Ok(incoming) => {
                let begun = incoming.begin(Digest([3; 32]), 600_000);
                let used = begun.map(|partial| {
                    assert_eq!(partial.piece_count(), 3);
                    assert_eq!(partial.have().len(), 1, "a bitmap of another length");
                    assert!(partial.done_bytes() <= 600_000, "more is here than the file has");
                    partial.missing().len()
                });
                incoming.list().err().or(used.err()).map(|err| err.to_string())
            }
            Err(err) => Some(err.to_string()),
        });
        note(match Catalog::open(Arc::clone(store.db()), self.apt()) {
            Ok(catalog) => self.use_catalog(&catalog),
            Err(err) => Some(err.to_string()),
        });
        note(store.set_state(Role::Archives, name, State::Damaged).err().map(|err| err.to_string()));
        note(store.renamed(Role::Archives, name, b"c").err().map(|err| err.to_string()));
        note(store.removed(Role::Archives, b"c").err().map(|err| err.to_string()));
        note(store.flush().err().map(|err| err.to_string()));
        note(store.db().check().err().map(|err| err.to_string()));
        said
    }

    fn use_catalog(&self, catalog: &Catalog) -> Option<String> {
        let digest = &self.sums.digest;
        let failed = catalog.archive(b"a_1_amd64.deb").err().or(catalog.by_digest(digest).err());
        let failed = failed.or(catalog.package_names().err()).or(catalog.versions("a").err()).or(catalog.candidates(b"a").err());
        let judged = catalog.judging(1_800_000_000).and_then(|judging| judging.decide(digest, 300_000, &Before::default()));
        let refreshed = catalog.refresh(self.directory("lists").as_fd(), Vanished::Drop);
        failed.or(judged.err()).or(refreshed.err()).map(|err| err.to_string())
    }
}

impl Subject for PoolfsDb {
    fn run(&mut self, input: &[u8]) -> u64 {
        let path = self.database();
        renew(&path, &self.valid);
        // What the last input made of the directories is put right again.
        drop(File::create(self.dir.path().join("incoming").join(Digest([3; 32]).to_string())).and_then(|file| file.set_len(600_000)));
        let object = Sums::of(&bytes_of(2, 1_000)).digest.to_string();
        std::fs::write(self.dir.path().join("objects").join(object), bytes_of(2, 1_000)).expect("an object");
        edit(&path, input);
        match Store::open(&self.dir.path().join("state")) {
            Ok(store) => behaviour(self.use_all(store)),
            Err(err) => clear(&err.to_string()),
        }
    }
}

/// Whether an error names the file and what to do.
fn clear(message: &str) -> u64 {
    assert!(message.contains(".db") || message.starts_with("database"), "names no file: {message}");
    behaviour(kind_of(message.split_once(".db").map_or(message, |(_, what)| what)))
}

/// Puts the valid file in place, without a journal beside it.
fn renew(path: &Path, valid: &[u8]) {
    for suffix in ["-wal", "-shm", "-journal"] {
        let mut beside = path.as_os_str().to_owned();
        beside.push(suffix);
        let _not_there = std::fs::remove_file(beside);
    }
    std::fs::write(path, valid).expect("it can be written");
}

/// The network side's database.
struct NetworkDb {
    valid: Vec<u8>,
    dir: tempfile::TempDir,
}

impl NetworkDb {
    fn new() -> Self {
        let dir = directory();
        let db = NetDb::open(dir.path()).expect("a database");
        db.identity(Some([1; 32])).expect("a key");
        let contact = |n: u8| std::net::SocketAddr::from(([192, 0, 2, n], 9977));
        let mut nodes: Vec<_> = (1..20).map(|n| SavedNode { id: [n; 20], address: contact(n) }).collect();
        nodes.push(SavedNode { id: [99; 20], address: "[2001:db8::1]:9977".parse().expect("an address") });
        db.save_nodes(&nodes).expect("nodes");
        db.save_members(&[(MemberId([1; 20]), contact(1)), (MemberId([2; 20]), "[2001:db8::2]:9977".parse().expect("an address"))])
            .expect("members");
        drop(db);
        let valid = std::fs::read(dir.path().join(FILE_NAME)).expect("the database");
        Self { valid, dir }
    }
}

impl Subject for NetworkDb {
    fn run(&mut self, input: &[u8]) -> u64 {
        let path = self.dir.path().join(FILE_NAME);
        renew(&path, &self.valid);
        edit(&path, input);
        let db = match NetDb::open(self.dir.path()) {
            Ok(db) => db,
            Err(err) => return clear(&err.to_string()),
        };
        let mut said = Vec::new();
        said.push(db.saved_nodes().map(|nodes| nodes.len()).map_err(kind_of));
        said.push(db.saved_members().map(|members| members.len()).map_err(kind_of));
        said.push(db.identity(Some([1; 32])).map(|(_, origin)| usize::from(format!("{origin:?}") == "Kept")).map_err(kind_of));
        said.push(db.save_members(&[]).map(|()| 0).map_err(kind_of));
        said.push(db.db().check().map(|()| 0).map_err(kind_of));
        behaviour(said)
    }
}
