//! What can be wrong with a database, and that each of it is one clear error and loses nothing.
#![allow(clippy::unwrap_used, reason = "tests")]

use super::*;
use crate::crash_point::{arm, child, points, running_as_child};
use crate::digest::{Digest, Sums};
use crate::role::Role::Archives;
use crate::store::{Incoming, Provenance, Sharing, Stamp, Store};
use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt as _;
use std::os::unix::process::ExitStatusExt as _;
use std::sync::Arc;

fn message(path: &Path) -> String {
    Db::open(path).map(drop).unwrap_err().to_string().replace(&path.display().to_string(), "DB")
}

fn record(store: &Store, index: u32) -> Result<(), crate::store::StoreError> {
    // Sums of their own, large enough to have pages of their own, in which SQLite checks nothing.
    let mut sums = Sums::of(&index.to_le_bytes());
    sums.blocks = vec![crate::digest::BlockSum::of(&index.to_le_bytes()); 150];
    let stamp = Stamp { size: 1, mtime_ns: 2, inode: 3 };
    store.record(Archives, format!("{index:05}").as_bytes(), stamp, &sums, Sharing::Available, Provenance::Mirror)
}

/// A schema this program does not know must survive it: byte for byte, with what is still in its WAL.
#[test]
fn from_the_future_is_left_untouched() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.db");
    drop(Db::open(&path).unwrap());
    let newer = Connection::open(&path).unwrap();
    newer.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true).unwrap();
    newer.execute_batch("CREATE TABLE later (x); INSERT INTO later VALUES (1); PRAGMA user_version = 99;").unwrap();
    drop(newer);
    let wal = dir.path().join("x.db-wal");
    let before = (fs::read(&path).unwrap(), fs::read(&wal).unwrap());
    assert!(!before.1.is_empty(), "the version is in the WAL only");
    let want = format!(
        "database DB has schema version 99, this poolfs knows up to {}; install the newer poolfs, or move the file away to start afresh (packages are kept)",
        MIGRATIONS.len()
    );
    assert_eq!(message(&path), want);
    assert!((fs::read(&path).unwrap(), fs::read(&wal).unwrap()) == before);
}

/// Files that are no database, and databases of others, are named and stay as they are.
#[test]
fn what_is_not_ours_is_left_untouched() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.db");
    drop(Db::open(&path).unwrap());
    let good = fs::read(&path).unwrap();
    let mut no_header = good.clone();
    no_header[..16].fill(0);
    let mut bad_page_size = good.clone();
    bad_page_size[16..18].fill(0xff);
    let corrupt = |what: &str| {
        format!("database DB is corrupt: {what}; move it away to start afresh (packages are kept, every file is hashed again)")
    };
    for (bytes, what) in [
        (b"x".to_vec(), "file is not a database"),
        (vec![b'#'; 5000], "file is not a database"),
        (good[..99].to_vec(), "file is not a database"),
        (no_header, "file is not a database"),
        (bad_page_size, "file is not a database"),
        (good[..good.len() / 2].to_vec(), "database disk image is malformed"),
    ] {
        fs::write(&path, &bytes).unwrap();
        let found = Db::open(&path).map(drop);
        assert!(found.is_err(), "{} bytes, {what}", bytes.len());
        assert_eq!(message(&path), corrupt(what), "{} bytes", bytes.len());
        assert!(fs::read(&path).unwrap() == bytes, "{what}: the evidence is gone");
    }
    fs::remove_file(&path).unwrap();
    Connection::open(&path).unwrap().execute_batch("CREATE TABLE theirs (x)").unwrap();
    assert_eq!(message(&path), corrupt("it belongs to another program"));
    fs::remove_file(&path).unwrap();
    fs::create_dir(&path).unwrap();
    assert_eq!(message(&path), "open database DB: not a regular file; check that its directory exists and is writable");
    let nowhere = dir.path().join("no/x.db");
    assert_eq!(
        message(&nowhere),
        "open database DB: No such file or directory (os error 2); check that its directory exists and is writable"
    );
    fs::write(dir.path().join("empty.db"), b"").unwrap();
    assert!(Db::open(&dir.path().join("empty.db")).is_ok(), "an empty file is a database that was never begun");
}

/// Any one page overwritten: either the start says that the database is corrupt, or what it still gives is right or an
/// error. It never panics, and never gives sums that were not stored.
#[test]
fn every_page_that_can_rot() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("poolfs.db");
    let store = Store::open(dir.path()).unwrap();
    (0..60).for_each(|index| record(&store, index).unwrap());
    let stored = |index: u32| Digest::of(&index.to_le_bytes());
    let want: Vec<_> = (0..60).map(|index| store.sums(&stored(index)).unwrap().unwrap()).collect();
    drop(store);
    let good = fs::read(&path).unwrap();
    let pages = good.len() / 4096;
    assert!(pages > 40, "{pages}");
    let (mut refused, mut opened) = (0, 0);
    for page in 0..pages {
        for rot in [0x00, 0xff, 0x41] {
            fs::write(&path, &good).unwrap();
            OpenOptions::new().write(true).open(&path).unwrap().write_all_at(&[rot; 4096], page as u64 * 4096).unwrap();
            match Store::open(dir.path()) {
                Err(err) => {
                    assert!(err.to_string().contains("poolfs.db is corrupt: "), "page {page}: {err}");
                    refused += 1;
                }
                Ok(store) => {
                    for index in 0..60 {
                        if let Ok(Some(sums)) = store.sums(&stored(index)) {
                            assert_eq!(sums, want[index as usize], "page {page}");
                        }
                        _ = store.file(Archives, format!("{index:05}").as_bytes());
                    }
                    opened += 1;
                }
            }
        }
    }
    assert!(refused > pages / 3 && opened > pages / 3, "both kinds of pages: refused {refused}, opened {opened}");
}

/// Rot in the catalog's rows does not hold up a start after an orderly end, and is found by the check in the background
/// and after a crash.
#[test]
fn the_catalog_is_checked_in_the_background() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.db");
    let db = Db::open(&path).unwrap();
    db.check().unwrap();
    let row = "INSERT INTO packages (name, digest, size, path, package, version, source) VALUES ('a', zeroblob(32), 1, '', '', '', '')";
    db.writer().execute(row, []).unwrap();
    let page: i64 = db.writer().query_row("SELECT rootpage FROM sqlite_schema WHERE name = 'packages'", [], |row| row.get(0)).unwrap();
    drop(db);
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    file.write_all_at(&[0xff; 4096], (page.cast_unsigned() - 1) * 4096).unwrap();
    let db = Db::open(&path).unwrap();
    assert!(matches!(db.check(), Err(DbError::Corrupt { .. })));
    // As a crash leaves it: with a filled WAL.
    db.writer().set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true).unwrap();
    db.writer().execute("INSERT INTO meta VALUES ('a', 'b')", []).unwrap();
    drop(db);
    assert!(message(&path).starts_with("database DB is corrupt: "));
}

/// Two daemons on one database would each believe that they know all files.
#[test]
fn a_second_process_is_kept_out() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.db");
    let first = Db::open(&path).unwrap();
    let want = format!(
        "database DB is in use by process {}; stop that one (`poolfs down`), or give this one another state_dir",
        std::process::id()
    );
    assert_eq!(message(&path), want);
    first.transaction(|db| db.execute("INSERT INTO meta VALUES ('a', 'b')", [])).unwrap();
    drop(first);
    assert!(Db::open(&path).is_ok());
}

/// An orderly end leaves one file: whoever copies the database then has all of it.
#[test]
fn an_orderly_end_leaves_no_wal() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    record(&store, 1).unwrap();
    assert!(store.file(Archives, b"00001").unwrap().is_some(), "which opens a reading connection");
    drop(store);
    let mut names: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    assert_eq!(names, ["poolfs.db", "poolfs.db-lock"]);
}

const TWO: &[&str] = &[MIGRATIONS[0], "CREATE TABLE second (x); INSERT INTO meta VALUES ('second', 'done'); DROP TABLE releases;"];

/// The process that is killed while it migrates: path, point and how often.
#[test]
#[ignore = "run by the test below in a process of its own"]
fn doomed_migration() {
    let Some(input) = running_as_child() else { return };
    arm(&input[1], input[2].parse().unwrap());
    drop(Db::open_with(Path::new(&input[0]), TWO).unwrap());
}

/// A migration is there wholly or not at all, what was stored before stays, and the next start goes on with it.
#[test]
fn killed_while_migrating() {
    for point in points("migrate.") {
        for begun in [false, true] {
            for nth in 0..2 {
                let dir = tempfile::tempdir().unwrap();
                let path = dir.path().join("x.db");
                if begun {
                    let db = Db::open_with(&path, &MIGRATIONS[..1]).unwrap();
                    db.writer().execute("INSERT INTO meta VALUES ('kept', 'yes')", []).unwrap();
                }
                let output = child("db::tests::doomed_migration", &format!("{}\n{point}\n{nth}\n", path.display()), None);
                if begun && nth == 1 {
                    assert!(output.status.success(), "only one migration is left to be made");
                } else {
                    assert_eq!(output.status.signal(), Some(9), "{point} {nth}");
                }
                let db = Db::open_with(&path, TWO).unwrap();
                let value = |key: &str| {
                    let found = db.writer().query_row("SELECT value FROM meta WHERE key = ?", [key], |row| row.get::<_, String>(0));
                    found.ok()
                };
                assert_eq!((value("kept"), value("second")), (begun.then(|| "yes".to_owned()), Some("done".to_owned())));
                db.check().unwrap();
                assert!(db.writer().query_row("SELECT count(*) FROM releases", [], |_| Ok(())).is_err(), "the whole migration was made");
            }
        }
    }
}

fn in_tmpfs(name: &str, kib: u32) {
    let dir = tempfile::tempdir().unwrap();
    let output = child(name, &format!("{}\n", dir.path().display()), Some((dir.path(), kib)));
    assert!(output.status.success(), "{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "it was a file system of its own");
}

#[test]
#[ignore = "run by the test below on a small tmpfs"]
fn fills_its_disk() {
    let Some(input) = running_as_child() else { return };
    let dir = Path::new(&input[0]);
    let state = dir.join("state");
    fs::write(dir.join("ballast"), vec![1; 1 << 20]).unwrap();
    let store = Store::open(&state).unwrap();
    let full = format!("no space for database {}/poolfs.db; free some space on its file system, nothing is lost", state.display());
    let mut last = 0;
    let err = loop {
        match record(&store, last) {
            Ok(()) => last += 1,
            Err(err) => break err,
        }
        assert!(last < 100_000, "the disk does not fill up");
    };
    assert_eq!((err.to_string(), err.is_full()), (full.clone(), true));
    let all_there = |store: &Store| {
        let mut found = 0;
        store.each_file(Archives, |_, _| found += 1).unwrap();
        assert_eq!(found, last, "what was stored is there, and the one that failed is not");
        assert!(store.sums(&Digest::of(&(last - 1).to_le_bytes())).unwrap().is_some());
    };
    all_there(&store);
    // A download that does not fit is refused before anything is fetched, and leaves nothing.
    fs::create_dir(dir.join("incoming")).unwrap();
    let store = Arc::new(store);
    let fd = OwnedFd::from(File::open(dir.join("incoming")).unwrap());
    let incoming = Arc::new(Incoming::open(Arc::clone(&store), fd).unwrap());
    let err = incoming.begin(Digest::of(b"x"), 100 << 20).unwrap_err();
    assert!(err.is_full(), "{err}");
    assert_eq!(fs::read_dir(dir.join("incoming")).unwrap().count(), 0);
    drop((incoming, store));

    // Not a byte is left: the start fails with the same words or works, and loses nothing.
    let mut filler = File::create(dir.join("filler")).unwrap();
    while filler.write_all(&[1; 512]).is_ok() {}
    match Store::open(&state) {
        Ok(store) => all_there(&store),
        Err(err) => assert_eq!((err.to_string(), err.is_full()), (full, true)),
    }
    fs::remove_file(dir.join("filler")).unwrap();
    fs::remove_file(dir.join("ballast")).unwrap();
    let store = Store::open(&state).unwrap();
    all_there(&store);
    store.removed(Archives, b"").unwrap();
    record(&store, 7).unwrap();
    store.db().check().unwrap();
}

/// A full disk costs the change that did not fit and no other, and is called so.
#[test]
fn full_disk() {
    in_tmpfs("db::tests::fills_its_disk", 3072);
}

#[test]
#[ignore = "run by the test below on a tmpfs of its own"]
fn is_read_only() {
    let Some(input) = running_as_child() else { return };
    let dir = Path::new(&input[0]);
    let remount = |option: &str| {
        let status = std::process::Command::new("mount").args(["-o", &format!("remount,{option}")]).arg(dir).status();
        assert!(status.unwrap().success());
    };
    let path = dir.join("x.db");
    let read_only =
        "database DB is read-only; make the file and its directory writable (a file system that had errors is remounted read-only)";
    remount("ro");
    assert_eq!(message(&path), read_only);
    remount("rw");
    let db = Db::open(&path).unwrap();
    db.writer().execute("INSERT INTO meta VALUES ('kept', 'yes')", []).unwrap();
    drop(db);
    let before = fs::read(&path).unwrap();
    remount("ro");
    assert_eq!(message(&path), read_only);
    remount("rw");
    assert!(fs::read(&path).unwrap() == before);
    assert!(Db::open(&path).is_ok());
}

/// A read-only disk is told from a missing or broken database.
#[test]
fn read_only_disk() {
    in_tmpfs("db::tests::is_read_only", 4096);
}
