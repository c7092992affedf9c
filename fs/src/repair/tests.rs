//! Repairs from sources that deliver, lie and stall.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "tests")]

use super::*;
use crate::errno::FsError;
use crate::fetch::fake::{Act, Fake};
use crate::source::MirrorUrl;
use poolfs_core::catalog::Entry;
use poolfs_core::store::Sharing;
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;
use std::time::SystemTime;

const PIECE: usize = PIECE_BYTES as usize;

/// A catalog of at most one file, which strangers may have or not.
struct One(Option<Entry>, Sharing);

impl Names for One {
    fn packages(&self) -> Result<Vec<String>, FsError> {
        Ok(Vec::new())
    }

    fn archive(&self, _name: &[u8]) -> Result<Option<Entry>, FsError> {
        Ok(None)
    }

    fn by_digest(&self, digest: &Digest) -> Result<Option<Entry>, FsError> {
        Ok(self.0.clone().filter(|entry| entry.digest == *digest))
    }

    fn judge(&self, _: &Digest, _: u64, _: bool) -> Result<Sharing, FsError> {
        Ok(self.1)
    }
}

fn bytes() -> Vec<u8> {
    (0..2 * PIECE + 99).map(|at| (at / 3) as u8).collect()
}

fn listed(bytes: &[u8]) -> Entry {
    Entry {
        name: "x_1_all.deb".into(),
        digest: Digest::of(bytes),
        size: bytes.len() as u64,
        date: 0,
        urls: vec![MirrorUrl { url: "http://m/x_1_all.deb".into(), proxy: None, immutable: true, private: false }],
        package: "x".into(),
        version: "1".into(),
        private: false,
    }
}

/// A file with a flipped byte in each piece, and a repairer for it.
struct Bench {
    dir: tempfile::TempDir,
    source: Arc<Fake>,
    repairer: Repairer,
}

impl Bench {
    fn new(entry: Option<Entry>, acts: &[Act]) -> Self {
        Self::shared(entry, Sharing::Announced, acts)
    }

    fn shared(entry: Option<Entry>, sharing: Sharing, acts: &[Act]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let source = Fake::new(&bytes(), acts);
        let given: Arc<dyn Source> = Arc::clone(&source) as Arc<dyn Source>;
        let repairer = Repairer::new(Arc::new(One(entry, sharing)), given, Handle::current(), RepairLimits::default());
        let bench = Self { dir, source, repairer };
        bench.damage("x.deb");
        bench
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn damage(&self, name: &str) {
        let mut damaged = bytes();
        for at in [5, PIECE + 5, 2 * PIECE + 5] {
            damaged[at] ^= 0x10;
        }
        std::fs::write(self.path(name), damaged).unwrap();
        let then = SystemTime::UNIX_EPOCH + Duration::new(1_700_000_000, 123_456_789);
        File::options().write(true).open(self.path(name)).unwrap().set_modified(then).unwrap();
    }

    async fn repair(&self, name: &str, index: u32) -> Result<(), RepairError> {
        let file = File::options().read(true).write(true).open(self.path(name)).unwrap();
        self.repairer.repair(file, &Sums::of(&bytes()), index).await
    }
}

/// Each piece is mended by itself, the last and shorter one too, and apt sees neither another time nor another inode.
#[tokio::test(start_paused = true)]
async fn mends_in_place() {
    let bench = Bench::new(Some(listed(&bytes())), &[Act::GiveAll]);
    let before = std::fs::metadata(bench.path("x.deb")).unwrap();
    for index in [2, 0, 1] {
        bench.repair("x.deb", index).await.unwrap();
        let now = std::fs::read(bench.path("x.deb")).unwrap();
        let span = index as usize * PIECE..now.len().min((index as usize + 1) * PIECE);
        assert_eq!(now[span.clone()], bytes()[span], "{index}");
    }
    assert_eq!(std::fs::read(bench.path("x.deb")).unwrap(), bytes());
    let after = std::fs::metadata(bench.path("x.deb")).unwrap();
    let times = |metadata: &std::fs::Metadata| (metadata.mtime(), metadata.mtime_nsec(), metadata.ino(), metadata.len());
    assert_eq!(times(&after), times(&before));
    assert_eq!(bench.source.asked(), [vec![2], vec![0], vec![1]]);
    assert!(bench.source.wants.lock().iter().all(|want| want.purpose == Purpose::Repair));
}

/// Who asks for a piece of a withheld file tells that it is here: strangers are not asked.
#[tokio::test(start_paused = true)]
async fn strangers_do_not_hear_of_what_is_withheld() {
    for (sharing, want) in [(Sharing::Available, Audience::Everybody), (Sharing::Withheld, Audience::Fleet)] {
        let bench = Bench::shared(Some(listed(&bytes())), sharing, &[Act::GiveAll]);
        bench.repair("x.deb", 0).await.unwrap();
        let asked: Vec<Audience> = bench.source.wants.lock().iter().map(|want| want.audience).collect();
        assert_eq!(asked, [want], "{sharing}");
    }
}

/// A file that no configured mirror has any more may still be had from peers.
#[tokio::test(start_paused = true)]
async fn asks_without_urls() {
    let bench = Bench::new(Some(Entry { urls: vec![], ..listed(&bytes()) }), &[Act::GiveAll]);
    bench.repair("x.deb", 0).await.unwrap();
}

/// A file that was cut short gets its end back.
#[tokio::test(start_paused = true)]
async fn mends_a_cut_file() {
    let bench = Bench::new(Some(listed(&bytes())), &[Act::GiveAll]);
    File::options().write(true).open(bench.path("x.deb")).unwrap().set_len(PIECE as u64 + 7).unwrap();
    for index in 0..3 {
        bench.repair("x.deb", index).await.unwrap();
    }
    assert_eq!(std::fs::read(bench.path("x.deb")).unwrap(), bytes());
}

/// Wrong bytes must never reach the file, and are asked for once more.
#[tokio::test(start_paused = true)]
async fn wrong_bytes_are_not_written() {
    let bench = Bench::new(Some(listed(&bytes())), &[Act::GiveWrong, Act::GiveAll]);
    bench.repair("x.deb", 1).await.unwrap();
    assert_eq!(*bench.source.verdicts.lock(), [Verdict::Wrong, Verdict::Right]);

    let bench = Bench::new(Some(listed(&bytes())), &[Act::GiveWrong]);
    let before = std::fs::read(bench.path("x.deb")).unwrap();
    let error = bench.repair("x.deb", 1).await.unwrap_err();
    assert_eq!(error.to_string(), format!("piece 1 of {} was delivered wrong each time", Digest::of(&bytes())));
    assert_eq!(std::fs::read(bench.path("x.deb")).unwrap(), before);
    assert_eq!(bench.source.asked().len(), 2);
}

/// What cannot be repaired says why, and nothing is asked for that nobody lists.
#[tokio::test(start_paused = true)]
async fn why_not() {
    let digest = Digest::of(&bytes());
    let check = async |entry: Option<Entry>, act: Act, index: u32, want: &str| {
        let bench = Bench::new(entry, std::slice::from_ref(&act));
        assert_eq!(bench.repair("x.deb", index).await.unwrap_err().to_string(), want, "{act:?}");
        bench.source.asked().len()
    };
    let entry = || Some(listed(&bytes()));
    let unlisted = format!("no list names {digest} any more, so there is nobody to ask for its bytes");
    assert_eq!(check(None, Act::GiveAll, 0, &unlisted).await, 0);
    assert_eq!(check(Some(Entry { urls: vec![], private: true, ..listed(&bytes()) }), Act::GiveAll, 0, &unlisted).await, 0);
    assert_eq!(check(entry(), Act::GiveAll, 3, &format!("{digest} has no piece 3")).await, 0);
    let why = |why: &str| format!("nobody delivers piece 0 of {digest}: {why}");
    check(entry(), Act::Hang(0), 0, &why("it did not come in 60 s")).await;
    check(entry(), Act::Give(vec![1]), 0, &why("it was promised and did not come")).await;
    check(entry(), Act::Fail(0, SourceError::Nowhere { digest, why: "404".into() }), 0, &why("404")).await;
    check(entry(), Act::Vanish(0), 0, &format!("the repair of {digest} was stopped")).await;
}

/// Sixty-four readers of one bad block, and two names of one file, must cost one request.
#[tokio::test(start_paused = true)]
async fn one_request_for_all_who_wait() {
    let bench = Bench::new(Some(listed(&bytes())), &[Act::Slowly(Duration::from_secs(1))]);
    bench.damage("y.deb");
    let bench = Arc::new(bench);
    let tasks: Vec<_> = (0..64)
        .map(|n| {
            let bench = Arc::clone(&bench);
            tokio::spawn(async move { bench.repair(if n % 2 == 0 { "x.deb" } else { "y.deb" }, 1).await })
        })
        .collect();
    for task in tasks {
        task.await.unwrap().unwrap();
    }
    assert_eq!(bench.source.asked(), [vec![1]]);
    for name in ["x.deb", "y.deb"] {
        assert_eq!(std::fs::read(bench.path(name)).unwrap()[PIECE..2 * PIECE], bytes()[PIECE..2 * PIECE]);
    }
}
