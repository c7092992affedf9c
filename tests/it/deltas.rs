//! `poolfs delta`: packages of dpkg-deb there and back, and what hostile deltas cost.

use crate::harness::process::Finished;
use crate::harness::{Package, Repo, assert_holds, run, workspace};
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
        let mut delta = [b"PFd1", &self.old_digest[..8], &self.new_digest].concat();
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
