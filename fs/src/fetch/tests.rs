//! The fetcher against sources that deliver, lie, stop and stall, with a virtual clock.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "tests")]

use super::fake::{Act, Fake};
use super::*;
use poolfs_core::Sums;
use poolfs_core::piece::{self, PIECE_BYTES};
use poolfs_core::store::Store;
use std::collections::HashSet;
use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::Path;

const PIECE: usize = PIECE_BYTES as usize;

/// A private machine: a store and directories.
struct Bench {
    dir: tempfile::TempDir,
    incoming: Arc<Incoming>,
}

fn open_dir(path: &Path) -> OwnedFd {
    File::open(path).unwrap().into()
}

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        for name in ["incoming", "archives"] {
            std::fs::create_dir(dir.path().join(name)).unwrap();
        }
        let incoming = Self::open(dir.path(), open_dir(&dir.path().join("incoming")));
        Self { dir, incoming }
    }

    fn open(path: &Path, incoming: OwnedFd) -> Arc<Incoming> {
        let store = Arc::new(Store::open(&path.join("state")).unwrap());
        Arc::new(Incoming::open(store, incoming).unwrap())
    }

    /// The same disk after the daemon was started again.
    fn restart(self) -> Self {
        let Self { dir, incoming } = self;
        drop(incoming);
        let incoming = Self::open(dir.path(), open_dir(&dir.path().join("incoming")));
        Self { dir, incoming }
    }

    fn fetcher(&self, source: &Arc<Fake>) -> Arc<Fetcher> {
        self.limited(source, FetchLimits::default())
    }

    fn limited(&self, source: &Arc<Fake>, limits: FetchLimits) -> Arc<Fetcher> {
        let clock: Clock = Arc::new(|| tokio::time::Instant::now().into_std());
        let source: Arc<dyn Source> = Arc::clone(source) as Arc<dyn Source>;
        Fetcher::with_clock(Arc::clone(&self.incoming), source, Handle::current(), limits, clock)
    }

    fn archives(&self) -> OwnedFd {
        open_dir(&self.dir.path().join("archives"))
    }

    fn read(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.dir.path().join("archives").join(name)).unwrap()
    }

    /// Names in `incoming/`.
    fn incoming_names(&self) -> usize {
        std::fs::read_dir(self.dir.path().join("incoming")).unwrap().count()
    }
}

/// Four pieces and a tail, no two alike.
fn file() -> Vec<u8> {
    (0..4 * PIECE + 99).map(|at| (at / 5 + at / PIECE * 17) as u8).collect()
}

fn job(file: &[u8], purpose: Purpose) -> Job {
    let url = MirrorUrl { url: "http://m/pool/x/x_1_all.deb".into(), proxy: None, immutable: true, private: false };
    Job { digest: Digest::of(file), size: file.len() as u64, urls: vec![url], purpose, audience: Audience::Everybody }
}

fn place(bench: &Bench, fetched: &Fetched, name: &str) -> std::io::Result<poolfs_core::store::Stamp> {
    fetched.place(bench.archives().as_fd(), OsStr::new(name))
}

/// The network side dies in the middle: its successor is asked for the rest only. One that dies each time is given up.
#[tokio::test(start_paused = true)]
async fn goes_on_with_the_next_network_side() {
    let file = file();
    let bench = Bench::new();
    let source = Fake::new(&file, &[Act::Fail(2, SourceError::Gone), Act::Fail(1, SourceError::Gone), Act::GiveAll]);
    let fetched = bench.fetcher(&source).start(job(&file, Purpose::Read)).done().await.unwrap();
    place(&bench, &fetched, "x").unwrap();
    assert_eq!(bench.read("x"), file);
    assert_eq!(source.asked(), [vec![0, 1, 2, 3, 4], vec![2, 3, 4], vec![3, 4]]);
    let bench = Bench::new();
    let source = Fake::new(&file, &[Act::Fail(0, SourceError::Gone)]);
    let fetcher = bench.fetcher(&source);
    let error = fetcher.start(job(&file, Purpose::Read)).done().await.unwrap_err();
    assert!(matches!(error, FetchError::Stopped { .. }), "{error}");
    assert_eq!(source.asked().len(), 1 + LOST_MAX as usize);
    assert!(!fetcher.undeliverable(&Digest::of(&file)), "it is asked for again as soon as somebody wants it");
}

/// From nothing to a file under its name, at every length at which the arithmetic can be off by one.
#[tokio::test(start_paused = true)]
async fn fetches_verifies_and_places() {
    for len in [0, 1, PIECE - 1, PIECE, PIECE + 1, 2 * PIECE, 4 * PIECE + 99] {
        let file = file()[..len].to_vec();
        let bench = Bench::new();
        let source = Fake::new(&file, &[Act::GiveAll]);
        let fetcher = bench.fetcher(&source);
        let fetched = fetcher.start(job(&file, Purpose::Read)).done().await.unwrap();
        assert_eq!(**fetched.sums(), Sums::of(&file), "{len}");
        assert_eq!(fetched.provenance(), Provenance::Mirror);
        let stamp = place(&bench, &fetched, "x.deb").unwrap();
        assert_eq!(bench.read("x.deb"), file, "{len}");
        let metadata = std::fs::metadata(bench.dir.path().join("archives/x.deb")).unwrap();
        assert_eq!((stamp.size, stamp.inode, metadata.permissions().mode() & 0o7777), (len as u64, metadata.ino(), 0o644));
        assert_eq!(bench.incoming_names(), 0, "{len}");
        assert_eq!(*source.verdicts.lock(), [Verdict::Right]);
        assert_eq!(fetcher.counters(), SourceBytes { mirror: len as u64, ..SourceBytes::default() });
        assert_eq!(source.asked().len(), usize::from(len > 0), "an empty file is asked of nobody");
    }
}

/// Pieces of a swarm come in any order; the sums are those of the file all the same.
#[tokio::test(start_paused = true)]
async fn any_order_gives_the_same_sums() {
    let file = file();
    for order in [[4, 3, 2, 1, 0], [1, 0, 3, 2, 4], [0, 2, 4, 1, 3]] {
        let bench = Bench::new();
        let source = Fake::new(&file, &[Act::Give(order.to_vec())]);
        let fetched = bench.fetcher(&source).start(job(&file, Purpose::Read)).done().await.unwrap();
        assert_eq!(**fetched.sums(), Sums::of(&file), "{order:?}");
    }
}

/// A hundred readers of one ghost must cost one download.
#[tokio::test(start_paused = true)]
async fn jobs_for_one_digest_join() {
    let file = file();
    let bench = Bench::new();
    let source = Fake::new(&file, &[Act::GiveAll]);
    let fetcher = bench.fetcher(&source);
    let waiting: Vec<Fetching> = (0..100).map(|_| fetcher.start(job(&file, Purpose::Read))).collect();
    let progress = fetcher.progress();
    assert_eq!((progress.len(), progress[0].name.as_str(), progress[0].size), (1, "x_1_all.deb", file.len() as u64));
    assert!(waiting[0].try_done().is_none());
    let mut fetched = Vec::new();
    for one in &waiting {
        fetched.push(one.done().await.unwrap());
    }
    assert!(fetched.iter().all(|one| Arc::ptr_eq(one, &fetched[0])));
    assert!(waiting[99].try_done().unwrap().is_ok());
    assert_eq!(source.asked().len(), 1);
    assert!(fetcher.progress().is_empty());

    // Who comes while somebody holds the result gets it too.
    drop(waiting);
    let late = fetcher.start(job(&file, Purpose::Read)).try_done().unwrap().unwrap();
    assert!(Arc::ptr_eq(&late, &fetched[0]));
    assert_eq!(source.asked().len(), 1);
}

/// Two names for one digest: both get the bytes, and neither is a hard link of the other.
#[tokio::test(start_paused = true)]
async fn placed_twice() {
    let file = file();
    let bench = Bench::new();
    let source = Fake::new(&file, &[Act::GiveAll]);
    let fetched = bench.fetcher(&source).start(job(&file, Purpose::Read)).done().await.unwrap();
    let first = place(&bench, &fetched, "first.deb").unwrap();
    let second = place(&bench, &fetched, "second.deb").unwrap();
    assert_ne!(first.inode, second.inode);
    assert_eq!((bench.read("first.deb"), bench.read("second.deb")), (file.clone(), file.clone()));

    // A name that exists stays as it is, and what was written into the first file since does not get into a copy.
    let error = place(&bench, &fetched, "second.deb").unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::AlreadyExists);
    std::fs::write(bench.dir.path().join("archives/first.deb"), b"changed").unwrap();
    assert!(place(&bench, &fetched, "third.deb").is_err());
    assert_eq!(bench.read("second.deb"), file);
    assert_eq!(std::fs::read_dir(bench.dir.path().join("archives")).unwrap().count(), 2, "nothing half-made stays");
}

/// A failed placing must not lose the file.
#[tokio::test(start_paused = true)]
async fn placed_after_a_name_was_taken() {
    let file = file();
    let bench = Bench::new();
    std::fs::write(bench.dir.path().join("archives/x.deb"), b"mine").unwrap();
    let source = Fake::new(&file, &[Act::GiveAll]);
    let fetched = bench.fetcher(&source).start(job(&file, Purpose::Read)).done().await.unwrap();
    assert_eq!(place(&bench, &fetched, "x.deb").unwrap_err().kind(), std::io::ErrorKind::AlreadyExists);
    assert_eq!(bench.read("x.deb"), b"mine");
    place(&bench, &fetched, "y.deb").unwrap();
    assert_eq!(bench.read("y.deb"), file);
}

/// What arrived before a restart is not asked for again.
#[tokio::test(start_paused = true)]
async fn resumes_after_a_restart() {
    let file = file();
    let bench = Bench::new();
    let gone = SourceError::NotNow { digest: Digest::of(&file), why: "cable".into() };
    let source = Fake::new(&file, &[Act::Fail(2, gone)]);
    let error = bench.fetcher(&source).start(job(&file, Purpose::Read)).done().await.unwrap_err();
    assert_eq!(error.to_string(), format!("no source delivers {} now: cable", Digest::of(&file)));

    let bench = bench.restart();
    let source = Fake::new(&file, &[Act::GiveAll]);
    let fetcher = bench.fetcher(&source);
    let fetching = fetcher.start(job(&file, Purpose::Read));
    let fetched = fetching.done().await.unwrap();
    assert_eq!(source.asked(), [vec![2, 3, 4]]);
    assert_eq!(**fetched.sums(), Sums::of(&file));
    assert_eq!(fetcher.counters().mirror, (2 * PIECE + 99) as u64);

    // Nobody placed it: the next one finds all of it and asks nobody.
    drop((fetched, fetching, fetcher));
    let bench = bench.restart();
    let source = Fake::new(&file, &[Act::Vanish(0)]);
    let fetched = bench.fetcher(&source).start(job(&file, Purpose::Read)).done().await.unwrap();
    place(&bench, &fetched, "x.deb").unwrap();
    assert_eq!(bench.read("x.deb"), file);
    assert!(source.asked().is_empty());
}

/// A piece that rotted in `incoming/` while the machine was off must not stay there for ever.
#[tokio::test(start_paused = true)]
async fn a_rotten_resume_is_downloaded_whole() {
    let file = file();
    let bench = Bench::new();
    let gone = SourceError::NotNow { digest: Digest::of(&file), why: "cable".into() };
    let source = Fake::new(&file, &[Act::Fail(2, gone)]);
    bench.fetcher(&source).start(job(&file, Purpose::Read)).done().await.unwrap_err();
    let bench = bench.restart();
    let partial = bench.dir.path().join("incoming").join(Digest::of(&file).to_string());
    std::os::unix::fs::FileExt::write_all_at(&File::options().write(true).open(partial).unwrap(), b"rot", 17).unwrap();
    let source = Fake::new(&file, &[Act::GiveAll]);
    let fetched = bench.fetcher(&source).start(job(&file, Purpose::Read)).done().await.unwrap();
    assert_eq!(**fetched.sums(), Sums::of(&file));
    assert_eq!(source.asked(), [vec![2, 3, 4], vec![0, 1, 2, 3, 4]]);
    assert_eq!(*source.verdicts.lock(), [Verdict::Wrong, Verdict::Right]);
}

/// Wrong bytes are asked for once more, and twice wrong ones are given up, remembered and off the disk.
#[tokio::test(start_paused = true)]
async fn wrong_bytes() {
    let file = file();
    let bench = Bench::new();
    let source = Fake::new(&file, &[Act::GiveWrong, Act::GiveAll]);
    let fetched = bench.fetcher(&source).start(job(&file, Purpose::Read)).done().await.unwrap();
    assert_eq!(**fetched.sums(), Sums::of(&file));
    assert_eq!(*source.verdicts.lock(), [Verdict::Wrong, Verdict::Right]);

    let bench = Bench::new();
    let source = Fake::new(&file, &[Act::GiveWrong]);
    let fetcher = bench.fetcher(&source);
    let error = fetcher.start(job(&file, Purpose::Read)).done().await.unwrap_err();
    assert!(matches!(error, FetchError::Wrong { digest } if digest == Digest::of(&file)), "{error}");
    assert_eq!(source.asked().len(), 2);
    assert_eq!(bench.incoming_names(), 0);
    assert!(fetcher.undeliverable(&Digest::of(&file)));
}

/// For ten minutes a file that could not be had is refused without asking; then, or when somebody insists, it is asked for.
#[tokio::test(start_paused = true)]
async fn undeliverable_for_ten_minutes() {
    let file = file();
    let digest = Digest::of(&file);
    let bench = Bench::new();
    let nowhere = Act::Fail(0, SourceError::Nowhere { digest, why: "404".into() });
    let source = Fake::new(&file, &[nowhere.clone(), nowhere, Act::GiveAll]);
    let fetcher = bench.fetcher(&source);
    assert!(matches!(fetcher.start(job(&file, Purpose::Read)).done().await, Err(FetchError::Nowhere { why, .. }) if why == "404"));
    tokio::time::advance(Duration::from_secs(599)).await;
    assert!(fetcher.undeliverable(&digest));
    assert!(matches!(fetcher.start(job(&file, Purpose::Read)).try_done(), Some(Err(FetchError::Nowhere { .. }))));
    assert_eq!(source.asked().len(), 1);
    tokio::time::advance(Duration::from_secs(1)).await;
    assert!(!fetcher.undeliverable(&digest));
    fetcher.start(job(&file, Purpose::Read)).done().await.unwrap_err();
    assert!(fetcher.undeliverable(&digest));
    fetcher.forgive(&digest);
    assert!(!fetcher.undeliverable(&digest));
    fetcher.start(job(&file, Purpose::Read)).done().await.unwrap();
}

/// A source that says nothing, or too little, must not hold a reader for ever; one that is just fast enough may go on.
#[tokio::test(start_paused = true)]
async fn waits_are_bounded() {
    let file = file();
    let check = async |act: Act, limits: FetchLimits, want: Option<&str>| {
        let bench = Bench::new();
        let source = Fake::new(&file, std::slice::from_ref(&act));
        let began = TimerInstant::now();
        let result = bench.limited(&source, limits).start(job(&file, Purpose::Read)).done().await;
        let why = match result {
            Ok(_) => None,
            Err(FetchError::NotNow { why, .. }) => Some(why),
            Err(other) => panic!("{act:?}: {other}"),
        };
        assert_eq!(why.as_deref(), want, "{act:?}");
        began.elapsed().as_secs()
    };
    let limits = FetchLimits::default();
    assert_eq!(check(Act::Hang(0), limits.clone(), Some("nothing came for 90 s")).await, 90);
    assert_eq!(check(Act::Hang(2), limits.clone(), Some("nothing came for 90 s")).await, 90);
    let pause = Duration::from_secs(60);
    assert_eq!(check(Act::Slowly(pause), limits.clone(), None).await, 300);
    let demanding = FetchLimits { rate_window: Duration::from_secs(150), rate_bytes_s_min: 5000, ..limits };
    assert_eq!(check(Act::Slowly(pause), demanding, Some("slower than 5000 bytes a second")).await, 150);
}

/// Each way in which a source may end early has its own consequence.
#[tokio::test(start_paused = true)]
async fn sources_that_end_early() {
    let file = file();
    let digest = Digest::of(&file);
    let check = async |act: Act, want: &str, remembered: bool| {
        let bench = Bench::new();
        let source = Fake::new(&file, std::slice::from_ref(&act));
        let fetcher = bench.fetcher(&source);
        let error = fetcher.start(job(&file, Purpose::Read)).done().await.unwrap_err();
        assert_eq!(error.to_string(), want, "{act:?}");
        assert_eq!(fetcher.undeliverable(&digest), remembered, "{act:?}");
        assert!(fetcher.progress().is_empty());
    };
    check(Act::Give(vec![0, 1]), &format!("no source delivers {digest} now: pieces were promised and did not come"), true).await;
    check(Act::Vanish(1), &format!("the download of {digest} was stopped"), false).await;
    check(Act::Fail(1, SourceError::Gone), &format!("the download of {digest} was stopped"), false).await;
}

/// Only sealed memory of a piece's length is taken; all else is passed over. Of two for one piece the later one counts, also
/// where the first was summed already: a swarm finds out late who lied.
#[tokio::test(start_paused = true)]
async fn only_pieces_are_taken() {
    let file = file();
    let bench = Bench::new();
    let source = Fake::new(&file, &[Act::Confuse]);
    let fetcher = bench.fetcher(&source);
    let fetched = fetcher.start(job(&file, Purpose::Read)).done().await.unwrap();
    assert_eq!(**fetched.sums(), Sums::of(&file));
    let want = SourceBytes { delta: 2 * PIECE as u64, mirror: (file.len() - PIECE) as u64, peer: 0 };
    assert_eq!(fetcher.counters(), want);
}

/// When the last reader leaves, the source is left alone and the pieces stay; a reader who stays keeps it going.
#[tokio::test(start_paused = true)]
async fn ends_with_its_last_reader() {
    let file = file();
    let bench = Bench::new();
    let source = Fake::new(&file, &[Act::Hang(3), Act::GiveAll]);
    let fetcher = bench.fetcher(&source);
    let (one, two) = (fetcher.start(job(&file, Purpose::Read)), fetcher.start(job(&file, Purpose::Read)));
    until(|| fetcher.progress()[0].done_bytes == 3 * PIECE as u64).await;
    let progress = &fetcher.progress()[0];
    assert!(!progress.queued);
    assert_eq!(progress.givers, [(Giver::Mirror("fake".into()), 3 * PIECE as u64)]);
    drop(one);
    settle().await;
    assert_eq!(source.open.load(Ordering::SeqCst), 1, "somebody still waits");
    drop(two);
    until(|| source.open.load(Ordering::SeqCst) == 0 && fetcher.progress().is_empty()).await;
    assert!(!fetcher.undeliverable(&Digest::of(&file)));

    let fetched = fetcher.start(job(&file, Purpose::Read)).done().await.unwrap();
    assert_eq!(**fetched.sums(), Sums::of(&file));
    assert_eq!(source.asked()[1], [3, 4]);
}

/// A reader that comes just after the last one left goes on with the download, or with what is there of it.
#[tokio::test(start_paused = true)]
async fn a_download_is_revived() {
    let file = file();
    for noticed in [false, true] {
        let bench = Bench::new();
        let source = Fake::new(&file, &[Act::Hang(1), Act::GiveAll]);
        let fetcher = bench.fetcher(&source);
        let first = fetcher.start(job(&file, Purpose::Read));
        until(|| fetcher.progress()[0].done_bytes > 0).await;
        drop(first);
        if noticed {
            tokio::task::yield_now().await; // The download lets go of its source and closes its file.
        }
        let second = fetcher.start(job(&file, Purpose::Read)).done().await;
        match second {
            Ok(fetched) => assert!(noticed && **fetched.sums() == Sums::of(&file)),
            Err(error) => assert!(!noticed && matches!(error, FetchError::NotNow { .. }), "{noticed}: {error}"),
        }
        let rest = noticed.then(|| vec![1, 2, 3, 4]);
        assert_eq!(source.asked().get(1).cloned(), rest, "{noticed}");
    }
}

/// `poolfs fetch` may hang up; what it asked for still comes.
#[tokio::test(start_paused = true)]
async fn a_prefetch_needs_no_reader() {
    let file = file();
    let bench = Bench::new();
    let source = Fake::new(&file, &[Act::GiveAll]);
    let fetcher = bench.fetcher(&source);
    drop(fetcher.start(job(&file, Purpose::Prefetch)));
    until(|| fetcher.progress().is_empty()).await;
    assert_eq!(fetcher.counters().mirror, file.len() as u64);
    let fetched = fetcher.start(job(&file, Purpose::Read)).done().await.unwrap();
    assert_eq!(**fetched.sums(), Sums::of(&file));
    assert_eq!(source.asked().len(), 1, "all of it was in incoming/");
}

/// At most so many at once, the rest in order, and more than the queue holds are refused, not piled up.
#[tokio::test(start_paused = true)]
async fn downloads_take_turns() {
    let bench = Bench::new();
    let files: Vec<Vec<u8>> = (0..5_u8).map(|n| vec![n; 10]).collect();
    let source = Fake::new(b"", &[Act::Hang(0)]);
    let fetcher = bench.limited(&source, FetchLimits { fetches_max: 2, queued_max: 4, ..FetchLimits::default() });
    let mut waiting: Vec<Fetching> = files[..4].iter().map(|file| fetcher.start(job(file, Purpose::Read))).collect();
    let refused = fetcher.start(job(&files[4], Purpose::Read)).try_done().unwrap().unwrap_err();
    assert!(matches!(refused, FetchError::Busy { max: 4, .. }), "{refused}");
    until(|| source.asked().len() == 2).await;
    settle().await;
    let asked = || source.wants.lock().iter().map(|want| want.digest).collect::<Vec<_>>();
    let turns: HashSet<Digest> = asked().into_iter().collect();
    assert_eq!(turns, files[..2].iter().map(|file| Digest::of(file)).collect());
    assert_eq!(fetcher.progress().iter().filter(|progress| progress.queued).count(), 2);
    drop(waiting.remove(2)); // The third leaves the queue, so the fourth follows the first.
    until(|| fetcher.progress().len() == 3).await;
    drop(waiting.remove(0));
    until(|| source.asked().len() == 3).await;
    assert_eq!(asked()[2], Digest::of(&files[3]));
}

/// A full disk is told as such, remembered by nobody, and leaves nothing behind.
#[tokio::test(start_paused = true)]
async fn a_full_disk() {
    let file = file();
    let Some(small) = small_disk(file.len() / 2) else { return };
    let bench = Bench::new();
    let (dir, incoming) = (bench.dir, bench.incoming);
    drop(incoming);
    let incoming = Bench::open(dir.path(), small.try_clone().unwrap());
    let bench = Bench { dir, incoming };
    let source = Fake::new(&file, &[Act::GiveAll]);
    let fetcher = bench.fetcher(&source);
    let error = fetcher.start(job(&file, Purpose::Read)).done().await.unwrap_err();
    let want = format!("no space, or no inode, for the {} bytes of {}; free some, or lower [store] quota", file.len(), Digest::of(&file));
    assert_eq!(error.to_string(), want);
    assert!(!fetcher.undeliverable(&Digest::of(&file)));
    assert!(source.asked().is_empty(), "nothing is downloaded that has no room");
    let names =
        rustix::fs::Dir::read_from(&small).unwrap().filter(|entry| !entry.as_ref().unwrap().file_name().to_bytes().starts_with(b"."));
    assert_eq!(names.count(), 0);
}

/// A file system of `bytes`, mounted nowhere; `None` where this process may not make one.
fn small_disk(bytes: usize) -> Option<OwnedFd> {
    use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_string, fsmount, fsopen};
    let made = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC).and_then(|context| {
        fsconfig_set_string(context.as_fd(), "size", bytes.to_string())?;
        fsconfig_create(context.as_fd())?;
        let mount = fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())?;
        let flags = rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::DIRECTORY | rustix::fs::OFlags::CLOEXEC;
        rustix::fs::openat(&mount, ".", flags, rustix::fs::Mode::empty())
    });
    #[allow(clippy::print_stderr, reason = "a test that did not run has to say so")]
    if let Err(error) = &made {
        eprintln!("SKIPPED: cannot make a small file system: {error}; run as root");
    }
    made.ok()
}

/// Lets the other tasks run until `condition` holds; the virtual clock bounds it.
async fn until(condition: impl Fn() -> bool) {
    let bound = tokio::time::timeout(Duration::from_secs(30), async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    });
    bound.await.expect("the condition never held");
}

/// Lets everything run that can.
async fn settle() {
    tokio::time::sleep(Duration::from_millis(50)).await;
}

/// The spans above are those of the pieces.
#[test]
fn pieces_of_the_test_file() {
    assert_eq!(piece::count(file().len() as u64, PIECE_BYTES), 5);
}
