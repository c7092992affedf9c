//! `poolfs delta`: packages of dpkg-deb there and back, and what hostile deltas cost. Deltas between machines with real apt: an
//! upgrade brings the difference, and what a liar offers costs a full download.

use crate::harness::crowd::{Crowd, Terms, await_status};
use crate::harness::process::Finished;
use crate::harness::{FalseDelta, Liar, Package, Published, Repo, assert_holds, report, run, workspace};
use poolfs_core::Digest;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use tempfile::TempDir;

/// An older and a newer version of a package, and places for what is made of them.
struct Pair {
    home: TempDir,
    old: PathBuf,
    new: PathBuf,
    old_digest: Vec<u8>,
    new_digest: Vec<u8>,
    new_bytes: Vec<u8>,
}

impl Pair {
    fn new(packed: &'static str) -> Self {
        let home = workspace();
        let mut repo = Repo::new(home.path());
        let old = repo.add(Package::new("p", "1.0", 100_000).packed(packed));
        let new = repo.add(Package::new("p", "1.1", 0).like("1.0", 500).packed(packed));
        let (old_file, new_file) = (home.path().join("old.deb"), home.path().join("new.deb"));
        fs::write(&old_file, &old.bytes).unwrap();
        fs::write(&new_file, &new.bytes).unwrap();
        let raw = |hex: &str| (0..32).map(|at| u8::from_str_radix(&hex[2 * at..2 * at + 2], 16).unwrap()).collect();
        let (old_digest, new_digest) = (raw(&old.digest), raw(&new.digest));
        Self { home, old: old_file, new: new_file, old_digest, new_digest, new_bytes: new.bytes }
    }

    fn place(&self, name: &str) -> PathBuf {
        self.home.path().join(name)
    }

    fn apply(&self, old: &Path, delta: &Path) -> Finished {
        delta_command("apply", &[old, delta, &self.place("out.deb")])
    }

    /// A delta between the two of one stored part of so many bytes.
    fn delta(&self, unpacked_bytes: u64, patch: &[u8]) -> Vec<u8> {
        let mut delta = [b"PFd2", &self.old_digest[..8], &self.new_digest].concat();
        number(self.new_bytes.len() as u64, &mut delta);
        delta.extend_from_slice(&[1, 0]);
        number(unpacked_bytes, &mut delta);
        [&delta, patch].concat()
    }

    /// Fails unless that delta is refused so, at the cost of a start, and leaves nothing.
    #[track_caller]
    fn assert_refused(&self, delta: &[u8], want: &str) {
        let file = self.place("hostile");
        fs::write(&file, delta).unwrap();
        let finished = self.apply(&self.old, &file);
        assert_eq!(finished.code(), 1, "{finished}");
        assert!(finished.err.contains(want), "{want}: {finished}");
        assert!(!self.place("out.deb").exists());
    }
}

fn delta_command(verb: &str, files: &[&Path]) -> Finished {
    run(Command::new(env!("CARGO_BIN_EXE_poolfs")).args(["delta", verb, "--json"]).args(files))
}

/// A number as deltas have it.
fn number(mut value: u64, to: &mut Vec<u8>) {
    while value >= 0x80 {
        to.push(value.to_le_bytes()[0] | 0x80);
        value >>= 7;
    }
    to.push(value.to_le_bytes()[0]);
}

/// A zstd frame with a head of its own, and blocks of 128 KiB that repeat one byte.
fn frame(content_bytes: u64, window_byte: u8, blocks: usize) -> Vec<u8> {
    let mut frame = vec![0x28, 0xb5, 0x2f, 0xfd, 0xc0, window_byte];
    frame.extend_from_slice(&content_bytes.to_le_bytes());
    for block in 1..=blocks {
        frame.extend_from_slice(&[0x02 | u8::from(block == blocks), 0x00, 0x10, 0x00]);
    }
    frame
}

/// Packages as Debian, as Ubuntu and as old ones are packed, each by the machine's own dpkg-deb: the delta is small, and makes the
/// very package, within the memory that is promised.
#[test]
fn every_format_of_dpkg_deb() {
    for (packed, recipe) in [("xz", "xz -6 in blocks of "), ("zstd", "zstd -"), ("gzip", "gzip -9"), ("none", "")] {
        let pair = Pair::new(packed);
        let delta = pair.place("delta");
        let made = delta_command("make", &[&pair.old, &pair.new, &delta]).ok();
        let report: serde_json::Value = serde_json::from_str(&made.out).unwrap();
        let recipes: Vec<&str> = report["recipes"].as_array().unwrap().iter().map(|recipe| recipe.as_str().unwrap()).collect();
        let members = recipes.iter().filter(|member| **member != "stored").count();
        assert_eq!(members, if packed == "none" { 0 } else { 2 }, "{packed}: {report}");
        assert!(recipes.iter().all(|member| *member == "stored" || member.starts_with(recipe)), "{packed}: {report}");
        assert!(report["delta_bytes"].as_u64().unwrap() * 50 < report["new_bytes"].as_u64().unwrap(), "{packed}: {report}");
        for peak in ["make_peak_kib", "rebuild_peak_kib"] {
            assert!((1..512 << 10).contains(&report[peak].as_u64().unwrap()), "{packed}: {report}");
        }
        pair.apply(&pair.old, &delta).ok();
        assert_holds(&pair.place("out.deb"), &pair.new_bytes);
    }
}

/// Bombs, windows, formats, cuts and wrong files end within limits, each with its own message, and nothing is written.
#[test]
fn hostile_deltas_are_refused() {
    const TEN_GIB: u64 = 10 << 30;
    let pair = Pair::new("xz");
    let good = pair.place("delta");
    delta_command("make", &[&pair.old, &pair.new, &good]).ok();
    let good = fs::read(good).unwrap();
    pair.assert_refused(&pair.delta(TEN_GIB, &frame(TEN_GIB, 0x50, 81_920)), "the unpacked package is too large");
    pair.assert_refused(&pair.delta(1 << 20, &frame(TEN_GIB, 0x50, 81_920)), "the output of the patch is too large");
    pair.assert_refused(&pair.delta(1 << 20, &frame(1 << 20, 0x50, 81_920)), "the patch does not fit the old file");
    // 2^31.
    pair.assert_refused(&pair.delta(1 << 20, &frame(1 << 20, 0xa8, 8)), "the window of the patch is too large");
    pair.assert_refused(&pair.delta(1 << 20, &frame(1 << 20, 0x50, 8)), "the delta does not make the new file");
    // The first recipe follows magic, digests, a length of three bytes and the count.
    let mut unknown = good.clone();
    unknown[4 + 8 + 32 + 3 + 1] = 9;
    pair.assert_refused(&unknown, "the delta packs a member in a way that this poolfs does not know");
    pair.assert_refused(&good[..good.len() - 1], "the patch does not fit the old file");
    pair.assert_refused(&good[..30], "not a delta of a form that this poolfs knows, or cut off");
    pair.assert_refused(&pair.new_bytes, "not a delta of a form that this poolfs knows, or cut off");
    let wrong_base = pair.apply(&pair.new, &pair.place("delta"));
    assert!(wrong_base.code() == 1 && wrong_base.err.contains("the delta is between two other files"), "{wrong_base}");
    let absent = pair.apply(&pair.old, &pair.place("absent"));
    assert!(absent.code() == 1 && absent.err.contains("absent: No such file"), "{absent}");
    // The hidden command is not for people: it wants a socket.
    let alone = run(Command::new(env!("CARGO_BIN_EXE_poolfs")).arg("delta-work").stdin(Stdio::null()));
    assert_eq!(alone.code(), 1, "{alone}");
}

const A: usize = 0;
const B: usize = 1;
const C: usize = 2;

/// Deltas wherever there is one, made also while other tests run.
fn terms(fleet: bool) -> Terms {
    let poolfs_toml = "deltas = \"always\"\ndelta_priority = \"normal\"\n".to_owned();
    Terms { fleet, poolfs_toml, ..Terms::default() }
}

/// An old version that A and B have, and a new one that A has and B's lists name, with a delta that A offers.
fn upgrade(crowd: &mut Crowd, new: Package) -> Published {
    for machine in [A, B] {
        crowd.download(machine);
    }
    let published = crowd.repo().add(new);
    crowd.repo().publish();
    crowd.machines[A].update();
    install(crowd, A, &published).ok();
    crowd.machines[B].update();
    await_status(&crowd.machines[A], "offers a delta", |status| status.deltas_offered == 1);
    published
}

fn install(crowd: &Crowd, machine: usize, published: &Published) -> Finished {
    crowd.machines[machine].apt_get(&["install", "-y", "-d", &published.package.name])
}

/// B installs: nothing but a delta may have come, and the package is the mirror's. Returns the bytes of the delta.
#[track_caller]
fn assert_by_delta(crowd: &Crowd, published: &Published, what: &str) -> u64 {
    crowd.mirror.forget_log();
    let before = crowd.machines[B].status();
    let finished = install(crowd, B, published).ok();
    assert_eq!(finished.deb_gets(), Vec::<&str>::new(), "{finished}");
    assert_eq!(crowd.mirror_bytes(B), 0, "{:#?}", crowd.mirror.log());
    let archive = crowd.machines[B].archives().join(published.archive_name());
    assert_holds(&archive, &published.bytes);
    let status = crowd.machines[B].status();
    let size = published.bytes.len() as u64;
    assert_eq!(status.bytes.delta - before.bytes.delta, size, "{status:#?}");
    assert_eq!(status.bytes.mirror, before.bytes.mirror, "{status:#?}");
    let delta = size - status.delta_saved_bytes;
    assert!(delta * 2 < size, "{status:#?}");
    let said = crowd.machines[B].poolfs(&["why", archive.to_str().unwrap()]).ok().out;
    assert!(said.contains("source    delta") && said.contains(&format!(" of {delta} bytes, from ")), "{said}");
    let source = run(Command::new("getfattr").args(["--only-values", "-n", "user.poolfs.source"]).arg(&archive)).ok().out;
    assert_eq!(source, "delta");
    report(what, &format!("{delta} bytes came for a package of {size}, 0 from the mirror; apt: exit 0"));
    delta
}

/// Members of a fleet: B has the old version, A both. A delta of several pieces, of packages that xz packed.
#[test]
fn a_member_upgrades_by_a_delta() {
    let old = Package::new("big", "1.0", 3_000_000).packed("xz");
    let mut crowd = Crowd::new(2, vec![old], &terms(true));
    crowd.up(true);
    let published = upgrade(&mut crowd, Package::new("big", "1.1", 0).like("1.0", 700_000).packed("xz"));
    let (given, received) = (crowd.given_to(B)[A], crowd.machines[B].status().bytes.peer);
    let delta = assert_by_delta(&crowd, &published, "deltas::fleet");
    assert!((700_000..1_000_000).contains(&delta), "{delta} bytes of a delta");
    assert_eq!(crowd.given_to(B)[A] - given, delta, "it gave the delta and nothing else");
    assert_eq!(crowd.machines[B].status().bytes.peer - received, delta);
    await_status(&crowd.machines[B], "offers it to others", |status| status.deltas_offered == 1);
}

/// A member that has the newer version only makes no delta, so that one of less weight that has both does.
#[test]
fn who_has_both_versions_makes_the_delta() {
    const PACKAGES: u64 = 6; // Whether C is of more weight for one is a coin's throw.
    let names: Vec<String> = (0..PACKAGES).map(|nth| format!("p{nth}")).collect();
    let olds = names.iter().map(|name| Package::new(name, "1.0", 50_000).packed("xz")).collect();
    let mut crowd = Crowd::new(3, olds, &terms(true));
    crowd.up(true);
    crowd.download(A);
    for name in &names {
        crowd.repo().add(Package::new(name, "1.1", 0).like("1.0", 500).packed("xz"));
    }
    crowd.repo().publish();
    let all: Vec<&str> = ["install", "-y", "-d"].into_iter().chain(names.iter().map(String::as_str)).collect();
    for machine in [C, A] {
        crowd.machines[machine].update();
        crowd.machines[machine].apt_get(&all).ok();
    }
    await_status(&crowd.machines[A], "offers every delta", |status| status.deltas_offered == PACKAGES && status.deltas_to_make == 0);
    assert_eq!(crowd.machines[C].status().deltas_offered, 0);
}

/// Strangers who find each other through the DHT, with packages as Ubuntu has them.
#[test]
fn a_stranger_upgrades_by_a_delta_of_a_zst_package() {
    let old = Package::new("pack", "1.0", 300_000).packed("zstd");
    let mut crowd = Crowd::new(2, vec![old], &terms(false));
    crowd.up(false);
    let published = upgrade(&mut crowd, Package::new("pack", "1.1", 0).like("1.0", 40_000).packed("zstd"));
    // A package this small is announced for its delta only.
    await_status(&crowd.machines[B], "keeps who has it", |status| status.node.as_ref().is_some_and(|node| node.stored_contacts == 1));
    let received = crowd.machines[B].status().bytes.peer;
    let delta = assert_by_delta(&crowd, &published, "deltas::zst");
    assert_eq!(crowd.machines[B].status().bytes.peer - received, delta);
}

/// A delta that fits into the DHT needs nobody who has it: A is gone.
#[test]
fn a_small_delta_comes_out_of_the_dht() {
    let old = Package::new("little", "1.0", 60_000).packed("xz");
    let mut crowd = Crowd::new(3, vec![old], &terms(false));
    crowd.up(false);
    let published = upgrade(&mut crowd, Package::new("little", "1.1", 0).like("1.0", 50).packed("xz"));
    await_status(&crowd.machines[C], "keeps it", |status| {
        status.node.as_ref().is_some_and(|node| node.stored_items == 1 && node.stored_contacts == 1)
    });
    crowd.hosts[A].plug(false);
    let delta = assert_by_delta(&crowd, &published, "deltas::dht");
    assert!(delta <= 996, "{delta} bytes");
    assert_eq!(crowd.given_to(B), [0, 0, 0], "no peer was asked for anything");
}

/// A bomb under a signed claim: the package comes from the mirror, the signer counts no more, and others are told.
#[test]
fn a_bomb_costs_its_signer_his_key() {
    let old = Package::new("big", "1.0", 200_000).packed("xz");
    let mut crowd = Crowd::new(3, vec![old], &terms(false));
    crowd.machines[B].up();
    crowd.machines[C].up();
    crowd.machines[B].update();
    crowd.download(B);
    let old = crowd.packages[0].clone();
    let new = crowd.repo().add(Package::new("big", "1.1", 0).like("1.0", 1_000).packed("xz"));
    crowd.repo().publish();
    let (old_digest, new_digest): (Digest, Digest) = (old.digest.parse().unwrap(), new.digest.parse().unwrap());
    let mut bomb = [b"PFd2", &old_digest.0[..8], &new_digest.0].concat();
    number(new.bytes.len() as u64, &mut bomb);
    // One part, stored, of 8 MiB, which its head may say; the frame then has 256 MiB of one byte.
    bomb.extend_from_slice(&[1, 0]);
    number(8 << 20, &mut bomb);
    bomb.extend_from_slice(&frame(8 << 20, 0x50, 2_048));
    let lie = FalseDelta { old: old_digest, new: new_digest, bytes: bomb };
    let liar = Liar::with_delta(&crowd.hosts[A], (new_digest, new.bytes.len() as u64), lie);
    crowd.machines[B].update();
    let finished = install(&crowd, B, &new).ok();
    let archive = crowd.machines[B].archives().join(new.archive_name());
    assert_holds(&archive, &new.bytes);
    assert_eq!(finished.deb_gets(), Vec::<&str>::new(), "{finished}");
    assert!(liar.asked() > 0, "nobody tried his delta");
    let status = crowd.machines[B].status();
    assert_eq!((status.bytes.delta, status.delta_saved_bytes), (0, 0), "{status:#?}");
    let said = crowd.machines[B].poolfs(&["why", archive.to_str().unwrap()]).ok().out;
    assert!(said.contains("was of no use: the patch does not fit the old file"), "{said}");
    let stated = crate::liars::await_statement(&crowd.machines[B]);
    assert_eq!((&stated["kind"], &stated["standing"]), (&"false delta".into(), &"own".into()), "{stated}");
    assert_eq!(stated["digest"], new.digest.as_str(), "{stated}");
    let netdb = crowd.machines[B].state_dir().join("net/net.db");
    crowd.machines[B].down();
    let keys: i64 =
        rusqlite::Connection::open(&netdb).unwrap().query_row("SELECT count(*) FROM verdict_key", [], |row| row.get(0)).unwrap();
    assert_eq!(keys, 1, "the key of who signed the claim is out, and no other");
    report("deltas::bomb", &format!("a bomb asked for {} times: apt exit 0, the signer's key is out", liar.asked()));
}
