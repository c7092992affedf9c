//! The network side's database after damage: by a disk (bytes and pages of the file) and by another program (values of rows).
//!
//! An input is a series of edits of a valid file. Then it is opened and used as the daemon does: a clear error or an answer,
//! never a panic.

use crate::driver::{Subject, Target, behaviour, kind_of};
use poolfs_net::netdb::{FILE_NAME, NetDb, SavedNode};
use poolfs_net::swarm::fleet::MemberId;
use rusqlite::Connection;
use rusqlite::types::Value;
use std::fs::File;
use std::path::Path;

/// Every target of this file.
pub(super) const ALL: &[Target] = &[Target {
    name: "net-db",
    about: "the network side's database, damaged by edits of its bytes and values, then opened and used",
    start: |_| Box::new(NetworkDb::new()),
    seeds: edits,
    tokens: &["\u{4}", "\u{1}\u{0}"],
    input_bytes_max: 600,
    memory: (64 << 20, 4_096),
}];

/// Edits of one input.
const EDITS_MAX: usize = 12;

fn directory() -> tempfile::TempDir {
    // In memory where there is some: each input is a copy of the file.
    let memory = Path::new("/dev/shm");
    if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() }.expect("a directory")
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
