//! Kills a process at each crash point of each operation, opens again what it left, and looks whether anything that was
//! promised is missing or anything unverified can be read; then the same with a database that forgot its last transactions.
#![allow(clippy::unwrap_used, reason = "tests")]

use super::*;
use crate::crash_point::{arm, child, crash_point, points, running_as_child};
use crate::digest::{BlockSum, Sums};
use crate::piece::{self, BLOCK_BYTES, PIECE_BYTES};
use crate::role::Role::Archives;
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io::Write as _;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::os::unix::process::ExitStatusExt as _;
use std::path::PathBuf;

/// Bytes of a content, by its one-letter name. Long enough for several pieces, and `B` and `C` equally long.
fn content(label: &str) -> Vec<u8> {
    let seed = label.as_bytes()[0];
    let len = match label {
        "A" => 3 * PIECE_BYTES as usize + 100,
        "B" | "C" => 2 * BLOCK_BYTES as usize + 9,
        _ => 1000,
    };
    (0..len).map(|index| u8::try_from(index % 251).unwrap() ^ seed).collect()
}

const LABELS: &[&str] = &["A", "B", "C", "D", "E", "o", "p", "q"];

/// Objects of 1000 bytes, of which this holds two beside `C`.
const QUOTA_BYTES: u64 = 2 * BLOCK_BYTES as u64 + 2500;

struct Site {
    root: PathBuf,
    store: Arc<Store>,
    objects: Objects,
    incoming: Arc<Incoming>,
}

impl Site {
    fn open(root: &Path) -> Self {
        for name in ["objects", "incoming", "archives"] {
            fs::create_dir_all(root.join(name)).unwrap();
        }
        let fd = |name: &str| OwnedFd::from(File::open(root.join(name)).unwrap());
        let store = Arc::new(Store::open(&root.join("state")).unwrap());
        let objects = Objects::open(Arc::clone(&store), fd("objects"), QUOTA_BYTES).unwrap();
        let incoming = Arc::new(Incoming::open(Arc::clone(&store), fd("incoming")).unwrap());
        Self { root: root.to_owned(), store, objects, incoming }
    }

    fn archives(&self) -> OwnedFd {
        File::open(self.root.join("archives")).unwrap().into()
    }

    fn record(&self, name: &str, label: &str) {
        let stamp = Stamp::of(&rustix::fs::stat(self.root.join("archives").join(name)).unwrap());
        self.store.record(Archives, name.as_bytes(), stamp, &Sums::of(&content(label)), Sharing::Announced, Provenance::Mirror).unwrap();
    }

    /// Writes a file as the mount does: the record first, then the bytes in two steps.
    fn write(&self, name: &str, label: &str) {
        let path = self.root.join("archives").join(name);
        let file = OpenOptions::new().create(true).truncate(false).write(true).open(path).unwrap();
        let inode = rustix::fs::fstat(&file).unwrap().st_ino;
        self.store.begin_writing(Archives, name.as_bytes(), inode).unwrap();
        crash_point("test.begun");
        let bytes = content(label);
        let (first, second) = bytes.split_at(bytes.len() / 2);
        file.write_all_at(first, 0).unwrap();
        crash_point("test.half");
        file.write_all_at(second, first.len() as u64).unwrap();
        crash_point("test.written");
        self.record(name, label);
    }
}

/// One life of a store: every operation at least once. `say` tells the outside world, as an answer to apt would:
/// `there NAME LABEL` the file is there, `recorded NAME LABEL` and its record too, `gone NAME` nothing is promised of it
/// any more, `piece INDEX` that piece of `A` is here. `elsewhere` is a directory of another file system.
fn life(root: &Path, elsewhere: &Path, say: &dyn Fn(&str)) {
    let site = Site::open(root);
    let archives = site.archives();
    let sums = Sums::of(&content("A"));
    let partial = site.incoming.begin(sums.digest, sums.size).unwrap();
    for index in partial.missing() {
        let span = piece::span(index.into(), sums.size, PIECE_BYTES);
        partial.write_piece(index, &content("A")[usize::try_from(span.start).unwrap()..usize::try_from(span.end).unwrap()]).unwrap();
        say(&format!("piece {index}"));
    }
    assert_eq!(partial.sums().unwrap(), sums);
    partial.place(archives.as_fd(), OsStr::new("a"), Replace::Never).unwrap();
    drop(partial);
    say("there a A");
    site.record("a", "A");
    say("recorded a A");

    site.write("b", "B");
    say("there b B");
    say("recorded b B");
    say("gone b");
    site.write("b", "C");
    say("there b C");
    say("recorded b C");

    say("gone a");
    fs::rename(root.join("archives/a"), root.join("archives/d")).unwrap();
    say("there d A");
    crash_point("test.renamed");
    site.store.renamed(Archives, b"a", b"d").unwrap();
    say("recorded d A");

    say("gone b");
    say("gone d");
    rustix::fs::renameat_with(&archives, "b", &archives, "d", rustix::fs::RenameFlags::EXCHANGE).unwrap();
    say("there b A");
    say("there d C");
    crash_point("test.exchanged");
    site.store.exchanged(Archives, b"b", b"d").unwrap();
    say("recorded b A");
    say("recorded d C");

    say("gone d");
    let sums = Sums::of(&content("C"));
    let put = |name: &str, sums: &Sums, kind| {
        let (sharing, provenance) = (Sharing::Available, Provenance::Mirror);
        assert!(site.objects.put(&sums.digest, sums, kind, sharing, provenance, archives.as_fd(), OsStr::new(name)).unwrap());
        site.store.removed(Archives, name.as_bytes()).unwrap();
    };
    put("d", &sums, Kind::Package);
    let taken = site.objects.take(&sums.digest, archives.as_fd(), OsStr::new("f")).unwrap().unwrap();
    say("there f C");
    site.store.record(Archives, b"f", taken.stamp, &taken.sums, taken.sharing, taken.provenance).unwrap();
    say("recorded f C");

    for (label, kind) in [("o", Kind::Package), ("p", Kind::Index), ("q", Kind::Package)] {
        fs::write(root.join("archives/x"), content(label)).unwrap();
        put("x", &Sums::of(&content(label)), kind);
    }
    site.objects.make_room(1000).unwrap();

    site.incoming.begin(Digest::of(b"given up"), 10).unwrap().discard().unwrap();

    // To a place on another file system, where nothing is promised.
    let far = site.incoming.begin(Digest::of(&content("o")), content("o").len() as u64).unwrap();
    far.write_piece(0, &content("o")).unwrap();
    far.place(File::open(elsewhere).unwrap().as_fd(), OsStr::new("far"), Replace::Never).unwrap();
    drop(far);

    fs::write(elsewhere.join("e"), content("E")).unwrap();
    let from = OwnedFd::from(File::open(elsewhere).unwrap());
    place(from.as_fd(), OsStr::new("e"), archives.as_fd(), OsStr::new("e"), Replace::Yes).unwrap();
    say("there e E");
    site.record("e", "E");
    say("recorded e E");

    let temp = format!("{TEMP_PREFIX}grown");
    fs::write(root.join("archives").join(&temp), content("D")).unwrap();
    place(archives.as_fd(), OsStr::new(&temp), archives.as_fd(), OsStr::new("s"), Replace::Never).unwrap();
    say("there s D");
    site.record("s", "D");
    say("recorded s D");
    crash_point("test.end");
}

/// The process that is killed: `ROOT`, `ELSEWHERE`, `POINT` and `NTH` on standard input.
#[test]
#[ignore = "run by the tests below in a process of its own"]
fn doomed() {
    let Some(input) = running_as_child() else { return };
    arm(&input[2], input[3].parse().unwrap());
    life(Path::new(&input[0]), Path::new(&input[1]), &|line| {
        // Past the test harness's buffers: what was said has left the process.
        rustix::io::write(std::io::stdout(), format!("\nsaid {line}\n").as_bytes()).unwrap();
    });
}

/// Lives until the point is passed for the time `nth`. `None` if that never happens, else what was said before.
fn die(root: &Path, point: &str, nth: u32) -> Option<Vec<String>> {
    let elsewhere = tempfile::tempdir_in("/dev/shm").unwrap();
    let input = format!("{}\n{}\n{point}\n{nth}\n", root.display(), elsewhere.path().display());
    let output = child("store::crash::doomed", &input, None);
    let text = String::from_utf8_lossy(&output.stdout);
    let killed = output.status.signal() == Some(9);
    assert!(killed || output.status.success(), "{point} {nth}: {}\n{text}", String::from_utf8_lossy(&output.stderr));
    killed.then(|| text.lines().filter_map(|line| line.strip_prefix("said ")).map(str::to_owned).collect())
}

/// What a reader of the mount gets, by the rules in the store's text.
#[derive(Debug, PartialEq, Eq)]
enum Read {
    Bytes(Vec<u8>),
    HashedAgain,
    Damaged,
}

fn read(store: &Store, root: &Path, name: &str) -> Read {
    let path = root.join("archives").join(name);
    let Some(record) = store.file(Archives, name.as_bytes()).unwrap() else { return Read::HashedAgain };
    if record.state == State::Writing || Stamp::of(&rustix::fs::lstat(&path).unwrap()) != record.stamp {
        return Read::HashedAgain;
    }
    let Some(sums) = store.sums(&record.digest.unwrap()).unwrap() else { return Read::HashedAgain };
    let bytes = fs::read(&path).unwrap();
    let blocks: Vec<BlockSum> = bytes.chunks(BLOCK_BYTES as usize).map(BlockSum::of).collect();
    if blocks != sums.blocks || record.state == State::Damaged {
        return Read::Damaged;
    }
    assert_eq!(Digest::of(&bytes), record.digest.unwrap(), "{name}: the blocks are right and the whole is not");
    Read::Bytes(bytes)
}

fn files(root: &Path, dir: &str) -> Vec<String> {
    let all = fs::read_dir(root.join(dir)).unwrap();
    all.map(|entry| entry.unwrap().file_name().into_string().unwrap()).filter(|name| !name.starts_with(TEMP_PREFIX)).collect()
}

/// Every file that can be read without being hashed first holds one of the contents, whole.
fn nothing_unverified_is_readable(store: &Store, root: &Path, damage: bool) {
    let whole: BTreeSet<Vec<u8>> = LABELS.iter().map(|label| content(label)).collect();
    for name in files(root, "archives") {
        match read(store, root, &name) {
            Read::Bytes(bytes) => assert!(whole.contains(&bytes), "{name} is no content"),
            Read::Damaged => assert!(damage, "{name} counts as damaged, and nothing damaged it"),
            Read::HashedAgain => {}
        }
    }
    let broken: i64 = store
        .read(|db| {
            let dangling = db.prepare("PRAGMA foreign_key_check")?.query_map([], |_| Ok(()))?.count();
            let sql = "SELECT count(*) FROM contents WHERE digest NOT IN (SELECT digest FROM files WHERE digest IS NOT NULL)
                       AND digest NOT IN (SELECT digest FROM objects)";
            Ok(db.query_row(sql, [], |row| row.get::<_, i64>(0))? + i64::try_from(dangling).unwrap())
        })
        .unwrap();
    assert_eq!(broken, 0, "sums without a file or files without sums");
}

fn objects_and_downloads_are_whole(site: &Site) {
    let on_disk: u64 =
        files(&site.root, "objects").iter().map(|name| fs::metadata(site.root.join("objects").join(name)).unwrap().len()).sum();
    assert_eq!(site.objects.bytes(), on_disk);
    let unrecorded: Vec<Digest> = site.objects.unrecorded().into_iter().map(|(digest, _)| digest).collect();
    for name in files(&site.root, "objects") {
        let digest: Digest = name.parse().unwrap();
        assert_eq!(Digest::of(&fs::read(site.root.join("objects").join(&name)).unwrap()), digest);
        assert_ne!(unrecorded.contains(&digest), site.objects.contains(&digest).unwrap(), "{name}");
        let kept =
            if unrecorded.contains(&digest) { site.objects.adopt(&digest, Kind::Package, Sharing::Available).unwrap() } else { true };
        assert!(kept && site.objects.open_object(&digest).unwrap().is_some(), "{name}");
    }
    let sums = Sums::of(&content("A"));
    let partial = site.incoming.begin(sums.digest, sums.size).unwrap();
    for index in 0..partial.piece_count() {
        let span = piece::span(index.into(), sums.size, PIECE_BYTES);
        let want = &content("A")[usize::try_from(span.start).unwrap()..usize::try_from(span.end).unwrap()];
        match partial.read_piece(index).unwrap() {
            Some(bytes) => assert!(bytes == want, "piece {index} is counted and not there"),
            None => partial.write_piece(index, want).unwrap(),
        }
    }
    assert_eq!(partial.sums().unwrap(), sums, "the download can be finished");
}

fn check_after_kill(root: &Path, said: &[String]) {
    let mut there: BTreeMap<&str, (&str, bool)> = BTreeMap::new();
    let mut pieces = 0;
    for line in said {
        match *line.split(' ').collect::<Vec<_>>() {
            ["there", name, label] => _ = there.insert(name, (label, false)),
            ["recorded", name, label] => _ = there.insert(name, (label, true)),
            ["gone", name] => _ = there.remove(name),
            ["piece", _] => pieces += 1,
            _ => panic!("{line}"),
        }
    }
    let store = Store::open(&root.join("state")).unwrap();
    for (name, (label, recorded)) in there {
        assert!(fs::read(root.join("archives").join(name)).ok() == Some(content(label)), "{name} was there and is lost");
        let got = read(&store, root, name);
        assert!(got == Read::Bytes(content(label)) || !recorded && got == Read::HashedAgain, "{name}, recorded: {recorded}");
    }
    nothing_unverified_is_readable(&store, root, false);
    drop(store);
    let site = Site::open(root);
    let a = Digest::of(&content("A"));
    if let Some(progress) = site.incoming.list().unwrap().into_iter().find(|progress| progress.digest == a) {
        // The last piece is the short one.
        let said = (pieces * u64::from(PIECE_BYTES)).min(content("A").len() as u64);
        assert!(progress.done_bytes >= said, "pieces that were said to be here are not: {progress:?}");
    }
    objects_and_downloads_are_whole(&site);
    sweep(site.archives().as_fd()).unwrap();
    nothing_unverified_is_readable(&site.store, root, false);
}

/// `kill -9` at every passing of every point of the store: nothing promised is lost, nothing unverified can be read, and
/// the store goes on from there.
#[test]
fn killed_at_every_point() {
    let mut points: Vec<String> = points("").into_iter().filter(|name| !name.starts_with("migrate.")).collect();
    points.retain(|name| name != "test.end");
    assert!(points.len() > 15, "{points:?}");
    for point in points {
        for nth in 0.. {
            let root = tempfile::tempdir().unwrap();
            match die(root.path(), &point, nth) {
                Some(said) => check_after_kill(root.path(), &said),
                None => {
                    assert_ne!(nth, 0, "no operation passes {point}");
                    break;
                }
            }
        }
    }
}

/// Power loss takes the end of the WAL, anything from one transaction to all of them, while the files are as new as can
/// be: no file is readable by an old record that is not what that record says.
#[test]
fn a_database_older_than_the_files() {
    let root = tempfile::tempdir().unwrap();
    let root = root.path();
    die(root, "test.end", 0).unwrap();
    let (db, wal) = (root.join("state/poolfs.db"), root.join("state/poolfs.db-wal"));
    let (db_bytes, wal_bytes) = (fs::read(&db).unwrap(), fs::read(&wal).unwrap());
    // A WAL is a header of 32 bytes and frames of a page and 24 bytes each.
    let frame = 4096 + 24;
    let frames = (wal_bytes.len() - 32) / frame;
    assert!(frames > 50, "{frames}");
    let mut states = BTreeSet::new();
    for kept in (0..=frames).rev() {
        fs::write(&db, &db_bytes).unwrap();
        // A torn frame at the end counts as none.
        File::create(&wal).unwrap().write_all(&wal_bytes[..wal_bytes.len().min(32 + kept * frame + 1000)]).unwrap();
        _ = fs::remove_file(root.join("state/poolfs.db-shm"));
        let store = Store::open(&root.join("state")).unwrap();
        nothing_unverified_is_readable(&store, root, true);
        let mut records = Vec::new();
        store.each_file(Archives, |path, record| records.push(format!("{path:?} {:?}", record.state))).unwrap();
        states.insert(records);
    }
    assert!(states.len() > 5, "the database was at different points of its life: {}", states.len());
    // With nothing left of it, what is on the disk is taken over as far as it is what its name says.
    objects_and_downloads_are_whole(&Site::open(root));
}

/// After power loss a bit may be there and its bytes not: the whole digest says so, and the file stays where it is.
#[test]
fn a_counted_piece_that_is_not_on_the_disk() {
    let root = tempfile::tempdir().unwrap();
    let site = Site::open(root.path());
    let sums = Sums::of(&content("A"));
    let partial = site.incoming.begin(sums.digest, sums.size).unwrap();
    for (index, bytes) in (0..).zip(content("A").chunks(PIECE_BYTES as usize)) {
        partial.write_piece(index, bytes).unwrap();
    }
    drop(partial);
    let file = OpenOptions::new().write(true).open(root.path().join(format!("incoming/{}", sums.digest))).unwrap();
    file.write_all_at(&[0; 4096], 300_000).unwrap();
    let partial = site.incoming.begin(sums.digest, sums.size).unwrap();
    assert_eq!(partial.missing(), [0_u32; 0]);
    let found = partial.sums().unwrap();
    assert_ne!(found.digest, sums.digest);
    let wrong: Vec<usize> = (0..sums.pieces.len()).filter(|index| found.pieces[*index] != sums.pieces[*index]).collect();
    assert_eq!(wrong, [1], "with a piece list the one piece can be told and fetched again");
    partial.forget_piece(1).unwrap();
    assert_eq!(partial.missing(), [1]);
}
