//! Which delta is used, and what becomes of one that does not do; over a store on a disk, with a network that is made up.

#![allow(clippy::unwrap_used, reason = "tests")]

use super::*;
use crate::deltas::offers::{Asked, Content, FalseClaim, Offered, Offers};
use crate::deltas::proving::Prover;
use crate::shelf::StoreShelf;
use poolfs_core::Role;
use poolfs_core::catalog::apt_config::{Environment, Options};
use poolfs_core::catalog::{AptConfig, Catalog, Entry};
use poolfs_core::delta::{self, Between, Search};
use poolfs_core::store::{Incoming, Objects, PackageVersion, Stamp, Store};
use poolfs_fs::FsError;
use poolfs_fs::fetch::FetchLimits;
use poolfs_fs::source::{Delivery, Giver, Source, SourceError, Verdict, Want};
use rustix::fs::{SealFlags, fcntl_add_seals};
use tokio::sync::mpsc;

/// Offers what it is told to, and notes what is said of it.
#[derive(Default)]
struct Network {
    offers: Mutex<Vec<DeltaOffer>>,
    items: Mutex<Vec<([u8; 20], Vec<u8>)>>,
    asked: AtomicU64,
    false_claims: Mutex<Vec<Vec<u8>>>,
}

impl Offers for Network {
    fn offers(&self, _: Digest, _: bool) -> mpsc::Receiver<DeltaOffer> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        let (out, offers) = mpsc::channel(16);
        self.offers.lock().iter().for_each(|offer| out.try_send(offer.clone()).unwrap());
        offers
    }

    fn item(&self, target: [u8; 20]) -> Asked<Option<Vec<u8>>> {
        let item = self.items.lock().iter().find(|(at, _)| *at == target).map(|(_, bytes)| bytes.clone());
        Box::pin(async move { item })
    }

    fn false_claim(&self, false_claim: FalseClaim, delta: Option<&[u8]>) {
        let delta = Digest::of(delta.unwrap());
        assert!(self.offers.lock().iter().any(|offer| offer.delta == delta), "the bytes that were offered");
        self.false_claims.lock().push(false_claim.claim);
    }

    fn offer(&self, _: Vec<Offered>) {}

    fn is_maker(&self, _: [Content; 2]) -> Asked<Option<bool>> {
        Box::pin(async { Some(true) })
    }
}

/// Has some files, and counts the wants.
#[derive(Default)]
struct Files_ {
    files: Mutex<BTreeMap<Digest, Vec<u8>>>,
    wanted: Mutex<Vec<Digest>>,
}

impl Source for Files_ {
    fn want(&self, want: Want, _: Option<OwnedFd>) -> mpsc::Receiver<Delivery> {
        self.wanted.lock().push(want.digest);
        let (out, deliveries) = mpsc::channel(8);
        match self.files.lock().get(&want.digest) {
            Some(bytes) => {
                let memory = rustix::fs::memfd_create("piece", MemfdFlags::ALLOW_SEALING).unwrap();
                let file = File::from(memory);
                file.write_all_at(bytes, 0).unwrap();
                fcntl_add_seals(&file, SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK).unwrap();
                let giver = Giver::Peer(([192, 0, 2, 1], 9977).into());
                out.try_send(Delivery::Piece { index: 0, bytes: file.into(), giver }).unwrap();
                out.try_send(Delivery::Done).unwrap();
            }
            None => {
                let why = "nobody".to_owned();
                out.try_send(Delivery::Failed(SourceError::Nowhere { digest: want.digest, why })).unwrap();
            }
        }
        deliveries
    }

    fn verdict(&self, _: Digest, _: Verdict) {}
}

struct AnyName;

impl Names for AnyName {
    fn archive(&self, _: &[u8]) -> Result<Option<Entry>, FsError> {
        Ok(None)
    }

    fn by_digest(&self, digest: &Digest) -> Result<Option<Entry>, FsError> {
        let (name, package, version) = ("p_2_all.deb".to_owned(), "p".to_owned(), "2".to_owned());
        Ok(Some(Entry { name, digest: *digest, size: 1, date: 0, urls: Vec::new(), package, version, private: false }))
    }

    fn packages(&self) -> Result<Vec<String>, FsError> {
        Ok(Vec::new())
    }
}

struct Rig {
    dir: tempfile::TempDir,
    network: Arc<Network>,
    files: Arc<Files_>,
    shared: Shared,
    rebuilder: Arc<Rebuilder>,
    runtime: tokio::runtime::Runtime,
}

const CLAIM: &[u8] = b"a claim";

fn text(bytes: usize, seed: u8) -> Vec<u8> {
    (0..bytes).map(|at| u8::try_from((at * at / 7 + at * usize::from(seed)) % 251).unwrap()).collect()
}

impl Rig {
    fn new(mode: Deltas) -> Self {
        let dir = tempfile::tempdir().unwrap();
        for name in ["archives", "objects", "incoming"] {
            std::fs::create_dir(dir.path().join(name)).unwrap();
        }
        let open = |name: &str| OwnedFd::from(File::open(dir.path().join(name)).unwrap());
        let store = Arc::new(Store::open(&dir.path().join("state")).unwrap());
        let objects = Arc::new(Objects::open(Arc::clone(&store), open("objects"), 1 << 30).unwrap());
        let apt = AptConfig::of_options(Options::default(), &[], Environment::default());
        let catalog = Arc::new(Catalog::open(Arc::clone(store.db()), apt).unwrap());
        let shelf = StoreShelf::new(Arc::clone(&store), Arc::clone(&objects), vec![(Role::Archives, open("archives"))]);
        let network = Arc::new(Network::default());
        let incoming = Arc::new(Incoming::open(Arc::clone(&store), open("incoming")).unwrap());
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let files = Arc::new(Files_::default());
        let fetcher = Fetcher::new(incoming, Arc::clone(&files) as Arc<dyn Source>, runtime.handle().clone(), FetchLimits::default());
        let network_ = Arc::clone(&network) as Arc<dyn Offers>;
        let shared = Shared { store, objects, catalog, shelf: Arc::new(shelf), network: network_ };
        let rebuilder = Rebuilder::new(shared.clone(), Arc::new(AnyName), fetcher, mode, dir.path().to_owned());
        Self { dir, network, files, shared, rebuilder, runtime }
    }

    fn name(&self, digest: &Digest, version: &str) {
        let version = PackageVersion { package: "p".into(), architecture: "all".into(), version: version.into() };
        self.shared.store.name_version(digest, &version).unwrap();
    }

    /// An older version that is here as a file.
    fn old(&self, bytes: &[u8], version: &str) -> Digest {
        let path = self.dir.path().join("archives").join(version);
        std::fs::write(&path, bytes).unwrap();
        let (stamp, sums) = (Stamp::of(&rustix::fs::stat(&path).unwrap()), Sums::of(bytes));
        self.shared.store.record(Role::Archives, version.as_bytes(), stamp, &sums, Sharing::Withheld, Provenance::Mirror).unwrap();
        self.name(&sums.digest, version);
        sums.digest
    }

    /// A delta that peers have and vouch for.
    fn offer(&self, old: Digest, delta: &[u8]) -> Digest {
        let digest = Digest::of(delta);
        self.files.files.lock().insert(digest, delta.to_vec());
        let offer = DeltaOffer { old, delta: digest, bytes: delta.len() as u64, target: None, claim: Some(CLAIM.to_vec()) };
        self.network.offers.lock().push(offer);
        digest
    }

    /// What a download of `new` is given.
    fn rebuild(&self, new: &[u8], private: bool) -> Option<Vec<u8>> {
        let (digest, size) = (Digest::of(new), new.len() as u64);
        self.name(&digest, "2");
        let wish = Wish { digest, size, missing_bytes: size, audience: Audience::Everybody, private };
        let file = self.runtime.block_on(RebuildHandle(Arc::clone(&self.rebuilder)).rebuild(wish))?;
        let mut bytes = vec![0; new.len()];
        File::from(file).read_exact_at(&mut bytes, 0).unwrap();
        Some(bytes)
    }

    fn note(&self, new: &[u8]) -> String {
        self.shared.store.delta_note(&Digest::of(new)).unwrap().unwrap().note
    }
}

fn delta(dir: &tempfile::TempDir, old: &[u8], new: &[u8]) -> Vec<u8> {
    let file = |name: &str, bytes: &[u8]| {
        std::fs::write(dir.path().join(name), bytes).unwrap();
        File::open(dir.path().join(name)).unwrap()
    };
    let between = Between { old: Digest::of(old), new: Digest::of(new), new_bytes: new.len() as u64 };
    delta::make(&file("a", old), &file("b", new), &between, &[], Search::All, 1 << 20).unwrap().bytes
}

/// Of two older versions that are here the one with the smaller delta; what did is kept for others, with who may have it.
#[test]
fn the_cheapest_is_used_and_kept() {
    let rig = Rig::new(Deltas::Always);
    let (far, near) = (text(100_000, 1), text(150_000, 1));
    let new = [&near[..], b"and a little more"].concat();
    let (far_digest, near_digest) = (rig.old(&far, "1.0"), rig.old(&near, "1.1"));
    rig.offer(far_digest, &delta(&rig.dir, &far, &[&new[..], &text(9_000, 9)].concat()));
    let used = rig.offer(near_digest, &delta(&rig.dir, &near, &new));
    rig.offer(Digest::of(b"not here"), b"tiny");
    assert_eq!(rig.rebuild(&new, false), Some(new.clone()));
    assert_eq!(*rig.files.wanted.lock(), [used], "nothing but that delta");
    assert!(rig.note(&new).starts_with(&used.to_string()), "{}", rig.note(&new));
    assert!(rig.rebuilder.saved_bytes() > 100_000);
    let here = rig.shared.store.deltas_here().unwrap();
    let [(DeltaHere { old, delta, .. }, Sharing::Available)] = here[..] else { panic!("{here:?}") };
    assert_eq!((old, delta), (near_digest, used));
    assert!(std::fs::read_dir(rig.dir.path().join("incoming")).unwrap().next().is_none(), "it is kept once");
}

/// One that is in the DHT is taken from there, and its bytes are compared; without that nobody's word is enough.
#[test]
fn items_are_compared() {
    let rig = Rig::new(Deltas::Always);
    let old = text(100_000, 1);
    let new = [&old[..], b"more"].concat();
    let old_digest = rig.old(&old, "1");
    let bytes = delta(&rig.dir, &old, &new);
    let offer = DeltaOffer { old: old_digest, delta: Digest::of(&bytes), bytes: bytes.len() as u64, target: Some([7; 20]), claim: None };
    rig.network.offers.lock().push(offer);
    rig.network.items.lock().push(([7; 20], b"other bytes".to_vec()));
    assert_eq!(rig.rebuild(&new, false), None);
    assert!(rig.note(&new).contains("nobody who has it vouches for it"), "{}", rig.note(&new));
    rig.network.items.lock()[0].1 = bytes;
    assert_eq!(rig.rebuild(&new, false), Some(new));
    assert!(rig.files.wanted.lock().is_empty());
}

/// A delta that does not make what was signed costs its signer, once; and no second download falls into it.
#[test]
fn a_false_delta_is_told_and_remembered() {
    let rig = Rig::new(Deltas::Always);
    let old = text(100_000, 1);
    let new = [&old[..], b"more"].concat();
    let mut bytes = delta(&rig.dir, &old, &new);
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    let old_digest = rig.old(&old, "1");
    let bad = rig.offer(old_digest, &bytes);
    assert_eq!(rig.rebuild(&new, false), None);
    assert_eq!(*rig.network.false_claims.lock(), [CLAIM.to_vec()]);
    assert!(rig.note(&new).contains("was of no use: the patch does not fit the old file"), "{}", rig.note(&new));
    assert_eq!(rig.rebuild(&new, false), None);
    assert_eq!(*rig.files.wanted.lock(), [bad], "it is not tried again");
    assert_eq!(rig.rebuilder.saved_bytes(), 0);
}

/// A number as deltas have it.
fn number(mut value: u64, to: &mut Vec<u8>) {
    while value > 0x7f {
        to.push(value.to_le_bytes()[0] | 0x80);
        value >>= 7;
    }
    to.push(value.to_le_bytes()[0]);
}

/// A delta of one stored part of so many bytes, whose patch has a head of its own and blocks of 128 KiB that repeat one byte.
fn hostile(old: Digest, new: &[u8], new_bytes: u64, unpacked_bytes: u64, window: u8, blocks: usize) -> Vec<u8> {
    let mut delta = [b"PFd2", &old.0[..8], &Digest::of(new).0].concat();
    number(new_bytes, &mut delta);
    delta.extend_from_slice(&[1, 0]);
    number(unpacked_bytes, &mut delta);
    delta.extend_from_slice(&[0x28, 0xb5, 0x2f, 0xfd, 0xc0, window]);
    delta.extend_from_slice(&unpacked_bytes.to_le_bytes());
    (1..=blocks).for_each(|block| delta.extend_from_slice(&[0x02 | u8::from(block == blocks), 0x00, 0x10, 0x00]));
    delta
}

/// Bombs, a wrong base, a wrong recipe, a cut patch, a wrong size: each ends within limits and costs its signer, and the download goes
/// on without it.
#[test]
fn whoever_signs_a_hostile_delta_is_told_of() {
    let old = text(100_000, 1);
    let new = [&old[..], b"more"].concat();
    let (digest, size) = (Digest::of(&old), new.len() as u64);
    let scratch = tempfile::tempdir().unwrap();
    let good = delta(&scratch, &old, &new);
    let mut recipe = good.clone();
    // It follows magic, digests, a length of three bytes and the count.
    recipe[4 + 8 + 32 + 3 + 1] = 9;
    let other_base = delta(&scratch, &text(100_000, 2), &new);
    for (delta, why) in [
        (hostile(digest, &new, size, 10 << 30, 0x50, 8), "the unpacked package is too large"),
        (hostile(digest, &new, size, 1 << 20, 0x50, 2_048), "the patch does not fit the old file"),
        // A window of 2^31.
        (hostile(digest, &new, size, 1 << 20, 0xa8, 8), "the window of the patch is too large"),
        (hostile(digest, &new, size, 1 << 20, 0x50, 8), "the delta does not make the new file"),
        (hostile(digest, &new, size + 1, size, 0x50, 1), "the delta is between two other files"),
        (other_base, "the delta is between two other files"),
        (recipe, "the delta packs a member in a way that this poolfs does not know"),
        (good[..good.len() - 1].to_vec(), "the patch does not fit the old file"),
        (good[..30].to_vec(), "not a delta of a form that this poolfs knows, or cut off"),
    ] {
        let rig = Rig::new(Deltas::Always);
        rig.old(&old, "1");
        rig.offer(digest, &delta);
        assert_eq!(rig.rebuild(&new, false), None, "{why}");
        assert!(rig.note(&new).contains(why), "{why}: {}", rig.note(&new));
        assert_eq!(*rig.network.false_claims.lock(), [CLAIM.to_vec()], "{why}");
    }
}

/// A disk that lost the old file's bytes must not make a liar of an honest peer.
#[test]
fn a_rotten_old_file_is_nobodys_guilt() {
    let rig = Rig::new(Deltas::Always);
    let old = text(100_000, 1);
    let new = [&old[..], b"more"].concat();
    let old_digest = rig.old(&old, "1");
    rig.offer(old_digest, &delta(&rig.dir, &old, &new));
    let path = rig.dir.path().join("archives/1");
    let before = std::fs::metadata(&path).unwrap().modified().unwrap();
    let file = File::options().write(true).open(&path).unwrap();
    file.write_all_at(b"rot", 5_000).unwrap();
    file.set_modified(before).unwrap();
    assert_eq!(rig.rebuild(&new, false), None);
    assert!(rig.note(&new).contains("was of no use"), "{}", rig.note(&new));
    assert!(rig.network.false_claims.lock().is_empty());
}

/// What is not to be asked for is not, and what comes sooner as it is is left to come so.
#[test]
fn modes() {
    let old = text(100_000, 1);
    let new = [&old[..], b"more"].concat();
    let rigged = |mode| {
        let rig = Rig::new(mode);
        let old_digest = rig.old(&old, "1");
        rig.offer(old_digest, &delta(&rig.dir, &old, &new));
        rig
    };
    let off = rigged(Deltas::Off);
    assert_eq!((off.rebuild(&new, false), off.network.asked.load(Ordering::Relaxed)), (None, 0));
    let private = rigged(Deltas::Always);
    assert_eq!((private.rebuild(&new, true), private.network.asked.load(Ordering::Relaxed)), (None, 0));
    let auto = rigged(Deltas::Auto);
    let handle = RebuildHandle(Arc::clone(&auto.rebuilder));
    for _ in 0..20 {
        handle.downloaded(100_000_000, Duration::from_secs(1));
    }
    assert_eq!(auto.rebuild(&new, false), None);
    assert!(auto.note(&new).contains("the package itself comes sooner than a delta of"), "{}", auto.note(&new));
    for _ in 0..60 {
        handle.downloaded(100_000, Duration::from_secs(100));
    }
    assert_eq!(auto.rebuild(&new, false), Some(new));
}

/// What is said of somebody's delta is tried with the files themselves; where they are not here, or rotten, nothing is said.
#[test]
fn what_is_said_of_a_delta_is_tried() {
    let rig = Rig::new(Deltas::Always);
    let old = text(100_000, 1);
    let new = [&old[..], b"more"].concat();
    let (good, old_digest) = (delta(&rig.dir, &old, &new), rig.old(&old, "1"));
    let mut bad = good.clone();
    *bad.last_mut().unwrap() ^= 1;
    let prover = Arc::new(Prover::new(Arc::clone(&rig.shared.shelf), rig.dir.path().to_owned()));
    let makes = |new: &[u8], bytes: &[u8]| {
        let file = rig.dir.path().join("tried");
        std::fs::write(&file, bytes).unwrap();
        rig.runtime.block_on(Arc::clone(&prover).makes(old_digest, Digest::of(new), File::open(file).unwrap().into()))
    };
    assert_eq!(makes(&new, &bad), None, "the newer file is not here");
    rig.old(&new, "2");
    assert_eq!((makes(&new, &bad), makes(&new, &good)), (Some(false), Some(true)));
    let path = rig.dir.path().join("archives/1");
    let before = std::fs::metadata(&path).unwrap().modified().unwrap();
    let file = File::options().write(true).open(&path).unwrap();
    file.write_all_at(b"rot", 5_000).unwrap();
    file.set_modified(before).unwrap();
    assert_eq!(makes(&new, &bad), None, "a rotten file proves nothing");
}
