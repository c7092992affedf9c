//! What each operation does, at its borders; crashes are in `crash`, random sequences in `model`.
#![allow(clippy::unwrap_used, reason = "tests")]

use super::*;
use crate::digest::Sums;
use crate::piece::{BLOCK_BYTES, PIECE_BYTES};
use crate::role::Role;
use std::ffi::OsStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicI64, Ordering};

/// A store with its directories, all private.
struct Rig {
    dir: tempfile::TempDir,
    store: Arc<Store>,
}

static NOW: AtomicI64 = AtomicI64::new(1_000);

/// A clock that moves by one second at each look.
fn ticking() -> i64 {
    NOW.fetch_add(1, Ordering::Relaxed)
}

impl Rig {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        for name in ["objects", "incoming", "archives"] {
            std::fs::create_dir(dir.path().join(name)).unwrap();
        }
        let store = Arc::new(Store::open_with_clock(&dir.path().join("state"), ticking).unwrap());
        Self { dir, store }
    }

    fn fd(&self, name: &str) -> OwnedFd {
        std::fs::File::open(self.dir.path().join(name)).unwrap().into()
    }

    fn objects(&self, quota_bytes: u64) -> Objects {
        Objects::open(Arc::clone(&self.store), self.fd("objects"), quota_bytes).unwrap()
    }

    fn incoming(&self) -> Arc<Incoming> {
        Arc::new(Incoming::open(Arc::clone(&self.store), self.fd("incoming")).unwrap())
    }

    fn write(&self, path: &str, bytes: &[u8]) -> Stamp {
        let path = self.dir.path().join(path);
        std::fs::write(&path, bytes).unwrap();
        Stamp::of(&rustix::fs::stat(&path).unwrap())
    }

    fn read(&self, path: &str) -> Option<Vec<u8>> {
        std::fs::read(self.dir.path().join(path)).ok()
    }

    /// Puts an object of `len` bytes that differ from those of any other `seed`.
    fn put(&self, objects: &Objects, seed: u8, len: usize, kind: Kind) -> Digest {
        let bytes = filled(seed, len);
        let sums = Sums::of(&bytes);
        self.write("archives/x", &bytes);
        let kept =
            objects.put(&sums.digest, &sums, kind, Sharing::Available, Provenance::Mirror, self.fd("archives").as_fd(), OsStr::new("x"));
        assert!(kept.unwrap(), "object {seed} was not taken");
        sums.digest
    }
}

fn filled(seed: u8, len: usize) -> Vec<u8> {
    (0..len).map(|i| u8::try_from(i % 251).unwrap() ^ seed).collect()
}

fn contents(store: &Store) -> i64 {
    store.read(|db| db.query_row("SELECT count(*) FROM contents", [], |row| row.get(0))).unwrap()
}

fn record_file(store: &Store, path: &str, bytes: &[u8]) -> Digest {
    let sums = Sums::of(bytes);
    let stamp = Stamp { size: sums.size, mtime_ns: -5, inode: u64::MAX };
    store.record(Role::Archives, path.as_bytes(), stamp, &sums, Sharing::Announced, Provenance::Peer).unwrap();
    sums.digest
}

fn paths(store: &Store, role: Role) -> Vec<String> {
    let mut all = Vec::new();
    store.each_file(role, |path, _| all.push(String::from_utf8_lossy(path).into_owned())).unwrap();
    all
}

/// Every field comes back as it went in, also the extreme ones: an inode above i64::MAX, a time before 1970.
#[test]
fn a_record_round_trips() {
    let rig = Rig::new();
    let sums = Sums::of(b"bytes");
    let stamp = Stamp { size: 5, mtime_ns: i64::MIN, inode: u64::MAX };
    assert_eq!(rig.store.file(Role::Lists, b"x").unwrap(), None);
    rig.store.record(Role::Lists, b"x\xff\n'", stamp, &sums, Sharing::Withheld, Provenance::Delta).unwrap();
    let record = rig.store.file(Role::Lists, b"x\xff\n'").unwrap().unwrap();
    assert_eq!(
        (record.state, record.digest, record.stamp, record.sharing, record.provenance),
        (State::Clean, Some(sums.digest), stamp, Sharing::Withheld, Provenance::Delta)
    );
    assert_eq!(rig.store.file(Role::Archives, b"x\xff\n'").unwrap(), None, "roles are apart");
    assert_eq!(*rig.store.sums(&sums.digest).unwrap().unwrap(), sums);
}

/// Sums at the borders of blocks and pieces come back whole; a broken row is no sums, and the next record mends it.
#[test]
fn sums_round_trip_and_rot_is_seen() {
    let rig = Rig::new();
    let (block, piece) = (BLOCK_BYTES as usize, PIECE_BYTES as usize);
    for len in [0, 1, block - 1, block, block + 1, piece, piece + 1, 3 * piece + 7] {
        let bytes = filled(3, len);
        let digest = record_file(&rig.store, "x", &bytes);
        assert_eq!(*rig.store.sums(&digest).unwrap().unwrap(), Sums::of(&bytes), "{len}");
        assert_eq!(contents(&rig.store), 1, "the sums of the content before went with its last file");
    }
    let digest = record_file(&rig.store, "x", &filled(3, piece));
    rig.store.write(|db| db.execute("UPDATE contents SET blocks = zeroblob(length(blocks))", [])).unwrap();
    assert_eq!(rig.store.sums(&digest).unwrap(), None);
    record_file(&rig.store, "x", &filled(3, piece));
    assert_eq!(*rig.store.sums(&digest).unwrap().unwrap(), Sums::of(&filled(3, piece)));
}

/// Sums stay while any file or object names them, whoever goes first.
#[test]
fn contents_are_shared_and_collected() {
    let rig = Rig::new();
    let digest = record_file(&rig.store, "a", b"same");
    assert_eq!(record_file(&rig.store, "b", b"same"), digest);
    assert_eq!(rig.store.places(&digest).unwrap(), [(Role::Archives, b"a".to_vec()), (Role::Archives, b"b".to_vec())]);
    rig.store.removed(Role::Archives, b"a").unwrap();
    assert_eq!(contents(&rig.store), 1);
    rig.store.begin_writing(Role::Archives, b"b", 7).unwrap();
    assert_eq!(contents(&rig.store), 0, "a file that is being written names nothing");
    record_file(&rig.store, "b", b"same");
    record_file(&rig.store, "b", b"other");
    assert_eq!((contents(&rig.store), rig.store.sums(&digest).unwrap()), (1, None));
}

/// A name that only begins like the tree's is not of the tree; `/` sorts between `.` and `0`.
#[test]
fn trees_move_exchange_and_go() {
    let rig = Rig::new();
    for path in ["d", "d.x", "d/a", "d/b/c", "d0", "e/a", "e/z"] {
        record_file(&rig.store, path, path.as_bytes());
    }
    rig.store.renamed(Role::Archives, b"d", b"e").unwrap();
    assert_eq!(paths(&rig.store, Role::Archives), ["d.x", "d0", "e", "e/a", "e/b/c"], "what was at e is gone");
    assert_eq!(rig.store.file(Role::Archives, b"e/a").unwrap().unwrap().digest, Some(Digest::of(b"d/a")));
    rig.store.exchanged(Role::Archives, b"e", b"d0").unwrap();
    assert_eq!(paths(&rig.store, Role::Archives), ["d.x", "d0", "d0/a", "d0/b/c", "e"]);
    rig.store.removed(Role::Archives, b"d0").unwrap();
    assert_eq!(paths(&rig.store, Role::Archives), ["d.x", "e"]);
    rig.store.removed(Role::Archives, b"").unwrap();
    assert_eq!((paths(&rig.store, Role::Archives).len(), contents(&rig.store)), (0, 0));
}

/// Names need not be text; a rename must keep every byte of what follows.
#[test]
fn renames_keep_bytes_that_are_no_text() {
    let rig = Rig::new();
    let odd: Vec<u8> = (1..=255).filter(|byte| *byte != b'/').collect();
    let from = [b"dir\xff/".as_slice(), &odd].concat();
    rig.store
        .record(Role::Lists, &from, Stamp { size: 0, mtime_ns: 0, inode: 1 }, &Sums::of(b""), Sharing::LocalOnly, Provenance::WrittenHere)
        .unwrap();
    rig.store.renamed(Role::Lists, b"dir\xff", b"\xc3").unwrap();
    let to = [b"\xc3/".as_slice(), &odd].concat();
    assert!(rig.store.file(Role::Lists, &to).unwrap().is_some());
    assert_eq!(rig.store.file(Role::Lists, &from).unwrap(), None);
}

/// More files than a page holds, and a visitor that changes the store meanwhile.
#[test]
fn each_file_pages_and_holds_no_lock() {
    let rig = Rig::new();
    for index in 0..600 {
        record_file(&rig.store, &format!("{index:04}"), b"same");
    }
    let mut seen = 0;
    let visit = |path: &[u8], _: &FileRecord| {
        seen += 1;
        assert!(rig.store.set_state(Role::Archives, path, State::Damaged).unwrap());
    };
    rig.store.each_file(Role::Archives, visit).unwrap();
    let counts = rig.store.counts(Role::Archives).unwrap();
    assert_eq!((seen, counts), (600, Counts { files: 600, bytes: 2400, damaged: 600, ..Counts::default() }));
}

/// `counts` puts each clean file where it belongs, and one that is written nowhere.
#[test]
fn counts_by_sharing() {
    let rig = Rig::new();
    for (index, sharing) in Sharing::ALL.iter().enumerate() {
        for copy in 0..=index {
            record_file(&rig.store, &format!("{index}-{copy}"), b"12345");
            assert!(rig.store.set_sharing(Role::Archives, format!("{index}-{copy}").as_bytes(), *sharing).unwrap());
        }
    }
    rig.store.begin_writing(Role::Archives, b"new", 1).unwrap();
    let want = Counts { files: 11, bytes: 50, announced: 1, available: 2, local_only: 3, withheld: 4, damaged: 0 };
    assert_eq!(rig.store.counts(Role::Archives).unwrap(), want);
    assert_eq!(rig.store.counts(Role::Lists).unwrap(), Counts::default());
}

/// A file that is being written cannot be declared clean: nobody has hashed it.
#[test]
fn states_need_a_digest() {
    let rig = Rig::new();
    assert!(!rig.store.set_state(Role::Archives, b"x", State::Writing).unwrap());
    rig.store.begin_writing(Role::Archives, b"x", 4).unwrap();
    assert!(!rig.store.set_state(Role::Archives, b"x", State::Clean).unwrap());
    assert!(!rig.store.set_stamp(Role::Archives, b"x", Stamp { size: 1, mtime_ns: 1, inode: 1 }).unwrap());
    let record = rig.store.file(Role::Archives, b"x").unwrap().unwrap();
    assert_eq!((record.state, record.digest, record.stamp.inode, record.sharing), (State::Writing, None, 4, Sharing::LocalOnly));
    record_file(&rig.store, "x", b"x");
    assert!(rig.store.set_state(Role::Archives, b"x", State::Damaged).unwrap());
    assert_eq!(rig.store.places(&Digest::of(b"x")).unwrap(), [], "a damaged file is no place to read from");
}

/// Last uses survive an orderly end, follow a rename, and are not kept for ever in memory.
#[test]
fn uses_are_batched_and_flushed() {
    let rig = Rig::new();
    record_file(&rig.store, "x", b"x");
    let before = rig.store.file(Role::Archives, b"x").unwrap().unwrap().used_at;
    rig.store.used(Role::Archives, b"x").unwrap();
    assert_eq!(rig.store.file(Role::Archives, b"x").unwrap().unwrap().used_at, before, "not written yet");
    rig.store.renamed(Role::Archives, b"x", b"y").unwrap();
    let renamed = rig.store.file(Role::Archives, b"y").unwrap().unwrap().used_at;
    assert!(renamed > before);
    rig.store.used(Role::Archives, b"y").unwrap();
    let state = rig.dir.path().join("state");
    drop(rig.store);
    let store = Store::open_with_clock(&state, ticking).unwrap();
    assert!(store.file(Role::Archives, b"y").unwrap().unwrap().used_at > renamed);
    for index in 0..5000u32 {
        store.used(Role::Archives, &index.to_be_bytes()).unwrap();
    }
    store.used(Role::Archives, b"y").unwrap();
}

/// In and out by rename, with sums; what is not there is `None`; a second put leaves the file where it is.
#[test]
fn objects_in_and_out() {
    let rig = Rig::new();
    let objects = rig.objects(1 << 20);
    let digest = rig.put(&objects, 1, 70_000, Kind::Package);
    assert_eq!((rig.read("archives/x"), objects.bytes()), (None, 70_000));
    let open = objects.open_object(&digest).unwrap().unwrap();
    assert_eq!(*open.sums, Sums::of(&filled(1, 70_000)));
    rig.write("archives/again", &filled(1, 70_000));
    let archives = rig.fd("archives");
    let put =
        objects.put(&digest, &open.sums, Kind::Package, Sharing::Available, Provenance::Mirror, archives.as_fd(), OsStr::new("again"));
    assert!(!put.unwrap());
    assert!(rig.read("archives/again").is_some());
    let err = objects.take(&digest, archives.as_fd(), OsStr::new("again")).unwrap_err();
    assert_eq!(err.to_string(), "place an object as again: File exists (os error 17)");
    let taken = objects.take(&digest, archives.as_fd(), OsStr::new("new.deb")).unwrap().unwrap();
    assert_eq!(taken.stamp, Stamp::of(&rustix::fs::statat(&archives, "new.deb", rustix::fs::AtFlags::empty()).unwrap()));
    assert_eq!((taken.sums.digest, taken.sharing, taken.provenance), (digest, Sharing::Available, Provenance::Mirror));
    assert_eq!(rig.read("archives/new.deb").unwrap(), filled(1, 70_000));
    assert_eq!((objects.bytes(), contents(&rig.store)), (0, 0));
    assert!(objects.take(&digest, archives.as_fd(), OsStr::new("y")).unwrap().is_none());
    assert!(objects.open_object(&digest).unwrap().is_none());
}

/// An object found wrong is gone with its record, its sums and its share of the quota; its reader keeps the open file.
#[test]
fn a_bad_object_is_discarded() {
    let rig = Rig::new();
    let objects = rig.objects(1 << 20);
    let (bad, good) = (rig.put(&objects, 1, 100, Kind::Package), rig.put(&objects, 2, 50, Kind::Package));
    let reader = objects.open_object(&bad).unwrap().unwrap();
    assert!(objects.discard(&bad).unwrap());
    assert_eq!((objects.bytes(), contents(&rig.store)), (50, 1));
    assert_eq!(rig.read(&format!("objects/{bad}")), None);
    assert_eq!(reader.file.metadata().unwrap().len(), 100);
    assert!(!objects.contains(&bad).unwrap() && objects.contains(&good).unwrap());
    assert!(!objects.discard(&bad).unwrap());
}

/// A file below objects/ that is not the one put there is never given out.
#[test]
fn a_changed_object_is_dropped() {
    let rig = Rig::new();
    let objects = rig.objects(1 << 20);
    let digest = rig.put(&objects, 1, 100, Kind::Package);
    rig.write(&format!("objects/{digest}"), &filled(2, 101));
    assert!(objects.open_object(&digest).unwrap().is_none());
    assert!(!objects.contains(&digest).unwrap());
    assert_eq!(rig.read(&format!("objects/{digest}")), None);
    assert_eq!(contents(&rig.store), 0);
}

/// Indexes go first, then the least recently used; what is read stays; a file over the quota is not taken at all.
#[test]
fn eviction_order() {
    let rig = Rig::new();
    let objects = rig.objects(300);
    let first = rig.put(&objects, 1, 100, Kind::Package);
    let second = rig.put(&objects, 2, 100, Kind::Package);
    let index = rig.put(&objects, 3, 100, Kind::Index);
    assert_eq!(objects.bytes(), 300, "exactly the quota is not too much");
    let third = rig.put(&objects, 4, 100, Kind::Delta);
    let here = |digest: &Digest| objects.contains(digest).unwrap();
    assert_eq!([here(&first), here(&second), here(&index), here(&third)], [true, true, false, true]);
    let reading = objects.open_object(&first).unwrap().unwrap();
    drop(objects.open_object(&second).unwrap());
    drop(objects.open_object(&third).unwrap());
    let fourth = rig.put(&objects, 5, 100, Kind::Package);
    assert_eq!([here(&first), here(&second), here(&third), here(&fourth)], [true, false, true, true], "first is read, second is older");
    assert_eq!(objects.make_room(1000).unwrap(), Evicted { files: 2, bytes: 200 });
    assert!(here(&first));
    drop(reading);
    assert_eq!(objects.make_room(1).unwrap(), Evicted { files: 1, bytes: 100 });
    let big = filled(6, 301);
    rig.write("archives/big", &big);
    let sums = Sums::of(&big);
    let put = objects.put(
        &sums.digest,
        &sums,
        Kind::Package,
        Sharing::Available,
        Provenance::Mirror,
        rig.fd("archives").as_fd(),
        OsStr::new("big"),
    );
    assert!(!put.unwrap());
    assert_eq!((rig.read("archives/big").unwrap().len(), objects.bytes()), (301, 0));
}

/// More objects than one page of the eviction, some of them read, all in one go.
#[test]
fn eviction_goes_past_a_page_of_objects_in_use() {
    let rig = Rig::new();
    let objects = rig.objects(1 << 20);
    let all: Vec<Digest> = (0..150u8).map(|seed| rig.put(&objects, seed, 2, Kind::Package)).collect();
    let _reading: Vec<_> = all[..100].iter().map(|digest| objects.open_object(digest).unwrap().unwrap()).collect();
    assert_eq!(objects.make_room(u64::MAX).unwrap(), Evicted { files: 50, bytes: 100 });
    assert_eq!(objects.bytes(), 200);
}

/// A database that was moved away leaves objects that only hashing can bring back; a wrong one is removed.
#[test]
fn unrecorded_objects_are_adopted_or_removed() {
    let rig = Rig::new();
    let good = Digest::of(&filled(1, 100));
    let bad = Digest::of(b"something else");
    rig.write(&format!("objects/{good}"), &filled(1, 100));
    rig.write(&format!("objects/{bad}"), b"rot");
    rig.write(&format!("objects/{TEMP_PREFIX}1-1"), b"half");
    rig.write("objects/README", b"left alone");
    let objects = rig.objects(1000);
    assert_eq!(objects.bytes(), 103);
    assert_eq!(objects.unrecorded().len(), 2);
    assert!(objects.open_object(&good).unwrap().is_none(), "not before it is hashed");
    assert!(objects.adopt(&good, Kind::Package, Sharing::Available).unwrap());
    assert!(!objects.adopt(&bad, Kind::Package, Sharing::Available).unwrap());
    assert!(objects.open_object(&good).unwrap().is_some());
    let mut left: Vec<_> = std::fs::read_dir(rig.dir.path().join("objects")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    left.sort();
    let mut want = ["README".into(), good.to_string().into()] as [std::ffi::OsString; 2];
    want.sort();
    assert_eq!(left, want);
    assert_eq!(objects.bytes(), 100);
}

/// Pieces in any order, a restart in the middle, and only then the right digest.
#[test]
fn a_download_resumes() {
    let rig = Rig::new();
    let size = 10 * PIECE_BYTES as usize + 5;
    let bytes = filled(9, size);
    let sums = Sums::of(&bytes);
    let piece = |index: u32| {
        let span = crate::piece::span(u64::from(index), size as u64, PIECE_BYTES);
        &bytes[usize::try_from(span.start).unwrap()..usize::try_from(span.end).unwrap()]
    };
    let incoming = rig.incoming();
    let partial = incoming.begin(sums.digest, sums.size).unwrap();
    assert!(matches!(incoming.begin(sums.digest, sums.size), Err(StoreError::InProgress(_))));
    assert_eq!(partial.missing(), (0..11).collect::<Vec<_>>());
    for index in [10, 0, 7, 7] {
        partial.write_piece(index, piece(index)).unwrap();
    }
    assert_eq!(partial.done_bytes(), 2 * u64::from(PIECE_BYTES) + 5);
    assert_eq!(partial.have(), [0b1000_0001, 0b0010_0000]);
    for (index, bytes, want) in [(11, b"x".as_slice(), 0), (0, b"", 262_144), (10, b"123456", 5), (u32::MAX, b"", 0)] {
        let err = partial.write_piece(index, bytes).unwrap_err().to_string();
        assert_eq!(err, format!("piece {index} of {} has {want} bytes, not {}", sums.digest, bytes.len()));
    }
    drop(partial);
    drop(incoming);
    let incoming = rig.incoming();
    assert_eq!(incoming.list().unwrap()[0].done_bytes, 2 * u64::from(PIECE_BYTES) + 5);
    let partial = incoming.begin(sums.digest, sums.size).unwrap();
    assert_eq!(partial.missing(), [1, 2, 3, 4, 5, 6, 8, 9]);
    assert_eq!(partial.read_piece(10).unwrap().unwrap(), piece(10));
    assert_eq!(partial.read_piece(1).unwrap(), None);
    assert_ne!(partial.sums().unwrap().digest, sums.digest);
    for index in partial.missing() {
        partial.write_piece(index, piece(index)).unwrap();
    }
    partial.forget_piece(3).unwrap();
    assert_eq!(partial.missing(), [3]);
    partial.write_piece(3, piece(3)).unwrap();
    assert_eq!(partial.sums().unwrap(), sums);
    let archives = rig.fd("archives");
    let stamp = partial.place(archives.as_fd(), OsStr::new("a.deb"), Replace::Never).unwrap();
    assert_eq!(stamp.size, size as u64);
    assert_eq!(rig.read("archives/a.deb").unwrap(), bytes);
    drop(partial);
    assert_eq!(incoming.list().unwrap(), []);
}

/// What is not as the row says is begun afresh; a size that an index cannot mean is refused before anything is allocated.
#[test]
fn a_download_that_does_not_fit_its_row_begins_afresh() {
    let rig = Rig::new();
    let incoming = rig.incoming();
    let digest = Digest::of(b"x");
    let begin = |size| incoming.begin(digest, size).unwrap();
    begin(4).write_piece(0, b"1234").unwrap();
    assert_eq!(begin(4).missing(), [0_u32; 0]);
    assert_eq!(begin(5).missing(), [0], "another size");
    begin(5).write_piece(0, b"12345").unwrap();
    rig.write(&format!("incoming/{digest}"), b"1234");
    assert_eq!(begin(5).missing(), [0], "the file was cut");
    begin(5).write_piece(0, b"12345").unwrap();
    rig.store.write(|db| db.execute("UPDATE incoming SET have = x'ff'", [])).unwrap();
    assert_eq!(begin(5).missing(), [0], "a bitmap with bits past the end");
    assert_eq!(begin(0).missing(), [0_u32; 0]);
    let err = incoming.begin(digest, SIZE_BYTES_MAX + 1).unwrap_err();
    assert!(matches!(err, StoreError::TooLarge { size, .. } if size == SIZE_BYTES_MAX + 1), "{err}");
    begin(4).discard().unwrap();
    assert_eq!((incoming.list().unwrap(), rig.read(&format!("incoming/{digest}"))), (vec![], None));
    begin(4);
    begin(7).write_piece(0, b"1234567").unwrap();
    let later = rig.store.now() + 1;
    let held = begin(7);
    assert_eq!(incoming.discard_older(later + 100).unwrap(), 0, "not while it is in progress");
    drop(held);
    assert_eq!(incoming.discard_older(0).unwrap(), 0);
    assert_eq!(incoming.discard_older(later + 100).unwrap(), 1);
}

/// Files without a row tell nothing of which bytes in them are real, so they go; rows without a file too.
#[test]
fn incoming_is_tidied_at_start() {
    let rig = Rig::new();
    let incoming = rig.incoming();
    let digest = Digest::of(b"lost");
    incoming.begin(digest, 10).unwrap();
    drop(incoming);
    std::fs::remove_file(rig.dir.path().join(format!("incoming/{digest}"))).unwrap();
    rig.write(&format!("incoming/{}", Digest::of(b"stray")), b"stray");
    rig.write("incoming/junk", b"junk");
    let incoming = rig.incoming();
    assert_eq!(incoming.list().unwrap(), []);
    assert_eq!(std::fs::read_dir(rig.dir.path().join("incoming")).unwrap().count(), 0);
}

fn place_case(from: BorrowedFd<'_>, to: BorrowedFd<'_>) {
    use rustix::fs::{AtFlags, Mode, OFlags, openat, statat};
    let write = |dir: BorrowedFd<'_>, name: &str, bytes: &[u8]| {
        let fd = openat(dir, name, OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC, Mode::from_raw_mode(0o644)).unwrap();
        rustix::fs::futimens(
            &fd,
            &rustix::fs::Timestamps {
                last_access: rustix::fs::Timespec { tv_sec: 5, tv_nsec: 6 },
                last_modification: rustix::fs::Timespec { tv_sec: 7, tv_nsec: 8 },
            },
        )
        .unwrap();
        rustix::io::write(&fd, bytes).unwrap();
        rustix::fs::futimens(
            &fd,
            &rustix::fs::Timestamps {
                last_access: rustix::fs::Timespec { tv_sec: 5, tv_nsec: 6 },
                last_modification: rustix::fs::Timespec { tv_sec: 7, tv_nsec: 8 },
            },
        )
        .unwrap();
    };
    let read = |dir: BorrowedFd<'_>, name: &str| {
        let mut bytes = Vec::new();
        let fd = openat(dir, name, OFlags::RDONLY, Mode::empty()).ok()?;
        std::io::Read::read_to_end(&mut std::fs::File::from(fd), &mut bytes).unwrap();
        Some(bytes)
    };
    write(from, "a", b"one");
    place(from, OsStr::new("a"), to, OsStr::new("b"), Replace::Never).unwrap();
    assert_eq!((read(from, "a"), read(to, "b")), (None, Some(b"one".to_vec())));
    let stat = statat(to, "b", AtFlags::empty()).unwrap();
    assert_eq!((Stamp::of(&stat).mtime_ns, stat.st_mode & 0o7777), (7_000_000_008, 0o644));
    write(from, "a", b"two");
    let err = place(from, OsStr::new("a"), to, OsStr::new("b"), Replace::Never).unwrap_err();
    assert_eq!(err.kind(), io::ErrorKind::AlreadyExists);
    assert_eq!((read(from, "a"), read(to, "b")), (Some(b"two".to_vec()), Some(b"one".to_vec())), "nothing changed");
    copy(from, OsStr::new("a"), to, OsStr::new("c"), Replace::Never).unwrap();
    assert_eq!(read(to, "c").unwrap(), b"two");
    place(from, OsStr::new("a"), to, OsStr::new("b"), Replace::Yes).unwrap();
    assert_eq!((read(from, "a"), read(to, "b")), (None, Some(b"two".to_vec())));
    assert_eq!(place(from, OsStr::new("a"), to, OsStr::new("b"), Replace::Yes).unwrap_err().kind(), io::ErrorKind::NotFound);
    rustix::fs::symlinkat("b", from, "link").unwrap();
    assert!(place(from, OsStr::new("link"), to, OsStr::new("d"), Replace::Yes).is_err(), "a symlink is not followed");
    rustix::fs::mkdirat(from, "dir", Mode::from_raw_mode(0o755)).unwrap();
    assert_eq!(place(from, OsStr::new("dir"), to, OsStr::new("d"), Replace::Yes).unwrap_err().to_string(), "not a regular file");
    assert_eq!(sweep(to).unwrap(), 0, "no temporary name is left");
    write(to, &format!("{TEMP_PREFIX}9-9"), b"half");
    rustix::fs::mkdirat(to, "partial", Mode::from_raw_mode(0o755)).unwrap();
    write(to, &format!("partial/{TEMP_PREFIX}9-9"), b"half");
    write(to, "partial/.poolfs-ne", b"another's");
    assert_eq!(sweep(to).unwrap(), 2);
    assert!(read(to, "partial/.poolfs-ne").is_some());
    assert_eq!(read(to, "b").unwrap(), b"two");
}

/// The same results whether the two directories share a file system or not (tmpfs at /dev/shm against the disk).
#[test]
fn place_within_and_across_file_systems() {
    let open = |dir: &tempfile::TempDir| OwnedFd::from(std::fs::File::open(dir.path()).unwrap());
    let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    place_case(open(&a).as_fd(), open(&b).as_fd());
    let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir_in("/dev/shm").unwrap());
    let (a, b) = (open(&a), open(&b));
    assert_ne!(rustix::fs::fstat(&a).unwrap().st_dev, rustix::fs::fstat(&b).unwrap().st_dev, "two file systems are needed for this test");
    place_case(a.as_fd(), b.as_fd());
}

/// Many threads that put, read, take and evict at once: what is counted is what is there, and nobody reads wrong bytes.
#[test]
fn threads_share_the_objects() {
    let rig = Rig::new();
    let objects = rig.objects(2_500);
    let archives = rig.fd("archives");
    let all: Vec<Sums> = (0..12).map(|seed| Sums::of(&filled(seed, 300))).collect();
    std::thread::scope(|scope| {
        for thread in 0..4usize {
            let (rig, objects, archives, all) = (&rig, &objects, &archives, &all);
            scope.spawn(move || {
                for round in 0..60usize {
                    let index = (round * 5 + thread * 3) % 12;
                    let (sums, name) = (&all[index], format!("{thread}"));
                    let seed = u8::try_from(index).unwrap();
                    rig.write(&format!("archives/{name}"), &filled(seed, 300));
                    let (sharing, provenance) = (Sharing::Available, Provenance::Mirror);
                    objects.put(&sums.digest, sums, Kind::Package, sharing, provenance, archives.as_fd(), OsStr::new(&name)).unwrap();
                    if let Some(open) = objects.open_object(&sums.digest).unwrap() {
                        let mut bytes = Vec::new();
                        std::io::Read::read_to_end(&mut &open.file, &mut bytes).unwrap();
                        assert_eq!(Sums::of(&bytes), *sums);
                    }
                    let taken = format!("taken-{thread}-{round}");
                    if round % 3 == 0
                        && let Some(taken_object) = objects.take(&sums.digest, archives.as_fd(), OsStr::new(&taken)).unwrap()
                    {
                        assert_eq!(*taken_object.sums, *sums);
                        assert_eq!(rig.read(&format!("archives/{taken}")).unwrap(), filled(seed, 300));
                    }
                }
            });
        }
    });
    let on_disk = std::fs::read_dir(rig.dir.path().join("objects")).unwrap().count() as u64;
    assert_eq!(objects.bytes(), on_disk * 300);
    assert!(objects.bytes() <= 2_500);
    let mut rows = 0;
    objects.each(|digest, size, _| rows += u64::from(size == 300 && all.iter().any(|sums| sums.digest == *digest))).unwrap();
    assert_eq!(rows, on_disk);
    assert_eq!(contents(&rig.store), i64::try_from(rows).unwrap());
}

/// Pieces from many threads, while the database is held by somebody else for part of the time: none is forgotten.
#[test]
fn threads_share_a_download() {
    let rig = Rig::new();
    let incoming = rig.incoming();
    let bytes = filled(1, 40 * PIECE_BYTES as usize);
    let sums = Sums::of(&bytes);
    let partial = incoming.begin(sums.digest, sums.size).unwrap();
    std::thread::scope(|scope| {
        let busy = rig.store.db().writer();
        for thread in 0..4usize {
            let (partial, bytes) = (&partial, &bytes);
            scope.spawn(move || {
                for (index, piece) in bytes.chunks(PIECE_BYTES as usize).enumerate().filter(|(index, _)| index % 4 == thread) {
                    partial.write_piece(u32::try_from(index).unwrap(), piece).unwrap();
                }
            });
        }
        while partial.done_bytes() < sums.size / 2 {
            std::thread::yield_now();
        }
        drop(busy);
    });
    assert_eq!(partial.sums().unwrap(), sums);
    partial.sync().unwrap();
    assert_eq!(incoming.list().unwrap()[0].done_bytes, sums.size);
}

/// Announcing what is not here, or twice, or what may not leave, costs others their time or this machine its secret.
#[test]
fn shared_contents_are_told_once() {
    let rig = Rig::new();
    let store = &rig.store;
    let objects = rig.objects(1 << 20);
    let seen = store.changes();
    let (a, b) = (record_file(store, "a", b"first"), record_file(store, "b", b"second"));
    assert!(store.changes() > seen, "who watches for changes must see this one");
    record_file(store, "a too", b"first");
    let object = rig.put(&objects, 1, 100, Kind::Package);
    let digests = |sharing: &[Sharing]| -> Vec<(Digest, u64)> {
        store.shared_as(sharing).unwrap().iter().map(|shared| (shared.digest, shared.size)).collect()
    };
    let mut both = vec![(a, 5), (b, 6)];
    both.sort_unstable();
    assert_eq!(digests(&[Sharing::Announced]), both);
    assert_eq!(digests(&[Sharing::Available]), [(object, 100)]);
    assert_eq!(digests(&[Sharing::Announced, Sharing::Available]).len(), 3);
    objects.set_sharing(&object, Sharing::Announced).unwrap();
    store.set_sharing(Role::Archives, b"b", Sharing::Withheld).unwrap();
    let seen = store.changes();
    store.begin_writing(Role::Archives, b"a", 1).unwrap();
    assert!(store.changes() > seen);
    let mut left = vec![(a, 5), (object, 100)];
    left.sort_unstable();
    assert_eq!(digests(&[Sharing::Announced]), left, "the other copy of `a` is whole");
    store.set_state(Role::Archives, b"a too", State::Damaged).unwrap();
    assert_eq!(digests(&[Sharing::Announced]), [(object, 100)]);
    let since = store.shared_as(&[Sharing::Announced]).unwrap()[0].since;
    drop(objects.open_object(&object).unwrap());
    store.flush().unwrap();
    assert!(store.shared_as(&[Sharing::Announced]).unwrap()[0].since > since, "an object that is used is news");
}

static JUMPS: AtomicI64 = AtomicI64::new(0);

fn jumping() -> i64 {
    JUMPS.load(Ordering::Relaxed)
}

/// A clock that somebody sets, or a machine without one that begins in 1970 at each start: what is kept can still be evicted,
/// nothing overflows, and nothing but the order of eviction depends on it.
#[test]
fn a_clock_that_jumps() {
    let mut rig = Rig::new();
    // A store has one process, and one clock.
    rig.store = Arc::new(Store::open_with_clock(&rig.dir.path().join("jumping"), jumping).unwrap());
    let (objects, incoming) = (rig.objects(1 << 20), rig.incoming());
    let times = [1_700_000_000, -5, i64::MAX, 0, i64::MIN, 1_700_000_000];
    let mut kept = Vec::new();
    for (seed, now) in (1..).zip(times) {
        JUMPS.store(now, Ordering::Relaxed);
        kept.push(rig.put(&objects, seed, 1_000, Kind::Package));
        record_file(&rig.store, &format!("file{seed}"), &[seed]);
        rig.store.used(Role::Archives, b"file1").unwrap();
        rig.store.flush().unwrap();
        drop(incoming.begin(Digest::of(&[seed]), 10).unwrap());
    }
    assert!(kept.iter().all(|digest| objects.contains(digest).unwrap()));
    assert_eq!(rig.store.counts(Role::Archives).unwrap().files, times.len() as u64);
    assert_eq!(incoming.list().unwrap().len(), times.len());
    assert_eq!(objects.make_room(2_500).unwrap().files, 3);
    assert!(!objects.contains(&kept[4]).unwrap(), "the one that seems the oldest goes first");
    assert!(objects.contains(&kept[2]).unwrap(), "and the one from the future last");
    assert_eq!(objects.make_room(u64::MAX).unwrap().files, 3);
    assert_eq!(incoming.discard_older(i64::MAX).unwrap(), times.len() - 1, "the one from the end of time is never old");
    assert_eq!(incoming.discard_older(i64::MIN).unwrap(), 0);
}
