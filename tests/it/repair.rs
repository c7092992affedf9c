//! Bytes that rot on the disk under the mount: found at every read, mended where somebody has them.

use crate::harness::{Client, Covered, Options, Package, Stage, assert_holds, forget_pages, listed, report, run};
use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::Command;

const BLOCK_BYTES: u64 = 64 << 10;
const PIECE_BYTES: u64 = 256 << 10;

/// The first and last byte of the first and last block and of what lies around a piece's edge, and one in the middle of each block.
fn positions(file_bytes: u64) -> Vec<u64> {
    let mut all =
        vec![0, BLOCK_BYTES - 1, BLOCK_BYTES, PIECE_BYTES - 1, PIECE_BYTES, file_bytes - 1, (file_bytes - 1) / BLOCK_BYTES * BLOCK_BYTES];
    all.extend((0..file_bytes.div_ceil(BLOCK_BYTES)).map(|block| block * BLOCK_BYTES + 77));
    all.retain(|position| *position < file_bytes);
    all.sort_unstable();
    all.dedup();
    all
}

fn read_at(path: &Path, offset: u64) -> std::io::Result<u8> {
    let mut byte = [0];
    File::open(path)?.read_exact_at(&mut byte, offset)?;
    Ok(byte[0])
}

struct Rotting {
    stage: Stage,
    archives: Covered,
    lists: Covered,
}

/// One package of several pieces and a tail, downloaded; both covered directories held by descriptor.
fn rotting() -> Rotting {
    let stage = Stage::new(vec![Package::new("large", "1.0", 900_000)], &Options::default());
    let (archives, lists) = (Covered::open(&stage.machine.archives()), Covered::open(&stage.machine.lists()));
    stage.machine.up();
    stage.machine.update();
    stage.download_all().ok();
    Rotting { stage, archives, lists }
}

/// A rotten byte that reached dpkg would be installed.
#[test]
fn a_flip_at_every_block_is_mended() {
    let Rotting { stage, archives, .. } = rotting();
    let published = &stage.packages[0];
    let (name, path) = (published.archive_name(), stage.archive(published));
    let places = positions(published.bytes.len() as u64);
    stage.mirror.forget_log();
    for offset in &places {
        archives.flip(&name, *offset);
        forget_pages(&path);
        let index = usize::try_from(*offset).unwrap();
        assert_eq!(read_at(&path, *offset).unwrap(), published.bytes[index], "at {offset}");
        assert_holds(&archives.path(&name), &published.bytes);
    }
    assert_holds(&path, &published.bytes);
    let status = stage.machine.status();
    let found = (status.archives().blocks_bad, status.archives().blocks_mended);
    assert_eq!(found, (places.len() as u64, places.len() as u64), "{status:#?}");
    assert_eq!(status.archives().damaged, 0);
    // A piece is what is asked for, not the whole file.
    assert!(stage.mirror.log().iter().all(|request| request.range.is_some()), "{:#?}", stage.mirror.log());
    let fetched: u64 = stage.mirror.log().iter().filter(|request| request.path.ends_with(".deb")).map(|request| request.body_bytes).sum();
    assert!(fetched <= places.len() as u64 * PIECE_BYTES, "{fetched} bytes for {} blocks", places.len());
    report("repair::archives", &format!("{} flips, each found and mended, {fetched} bytes fetched for them", places.len()));
}

/// With nobody to ask, an error is the only right answer; and it must be said where to look.
#[test]
fn without_a_source_a_flip_is_an_error_and_verify_finds_it() {
    let Rotting { stage, archives, .. } = rotting();
    let published = &stage.packages[0];
    let (name, path) = (published.archive_name(), stage.archive(published));
    stage.machine.poolfs(&["verify"]).ok();
    stage.mirror.stop();
    let places = positions(published.bytes.len() as u64);
    for offset in &places {
        archives.flip(&name, *offset);
        forget_pages(&path);
        let error = read_at(&path, *offset).expect_err("a rotten block was given out");
        assert_eq!(error.raw_os_error(), Some(rustix::io::Errno::IO.raw_os_error()), "at {offset}: {error}");
        // Other blocks are as good as before: one far enough away that no read-ahead touches the rotten one.
        let elsewhere = (*offset + published.bytes.len() as u64 / 2) % published.bytes.len() as u64;
        if elsewhere / PIECE_BYTES != offset / PIECE_BYTES {
            assert_eq!(read_at(&path, elsewhere).unwrap(), published.bytes[usize::try_from(elsewhere).unwrap()]);
        }
        // The same flip again puts the byte right.
        archives.flip(&name, *offset);
        forget_pages(&path);
        assert_eq!(read_at(&path, *offset).unwrap(), published.bytes[usize::try_from(*offset).unwrap()], "at {offset}");
    }
    archives.flip(&name, 300_000);
    forget_pages(&path);
    run(Command::new("cat").arg(&path)).failed().says("Input/output error");
    assert_eq!(stage.machine.status().archives().damaged, 1);
    assert!(stage.machine.log().contains(&name), "the log does not name the file: {}", stage.machine.log());
    let verify = stage.machine.poolfs(&["verify"]);
    assert_eq!(verify.code(), 2, "{verify}");
    let verify = stage.machine.poolfs(&["verify", "--repair"]);
    assert_eq!(verify.code(), 2, "nobody has it: {verify}");
    drop(verify.says(&name));
    stage.mirror.start_again();
    stage.machine.poolfs(&["verify", "--repair"]).ok().says(&name);
    assert_holds(&archives.path(&name), &published.bytes);
    assert_holds(&path, &published.bytes);
    assert_eq!(stage.machine.status().archives().damaged, 0);
    stage.machine.poolfs(&["verify"]).ok();
    report(
        "repair::without_a_source",
        &format!("{} flips, each EIO; verify finds it, verify --repair mends it when the mirror is back", places.len()),
    );
}

/// `verify` must find what nobody has read, in both directories, and say which file it is.
#[test]
fn verify_finds_what_nobody_read() {
    let Rotting { stage, archives, lists } = rotting();
    let published = &stage.packages[0];
    archives.flip(&published.archive_name(), 500_000);
    let index = listed(&stage.machine.lists()).into_iter().find(|name| name.ends_with("_Packages")).unwrap();
    lists.flip(&index, 10);
    let verify = stage.machine.poolfs(&["verify"]).says(&published.archive_name()).says(&index);
    assert_eq!(verify.code(), 2, "{verify}");
    drop(stage.machine.poolfs(&["verify", "--repair"]).says(&published.archive_name()));
    assert_holds(&archives.path(&published.archive_name()), &published.bytes);
}

/// apt reads its lists at each run: a rotten byte there would make it plan nonsense. What apt unpacked itself exists nowhere
/// else, so an error is right too, until an update brings a new list.
#[test]
fn a_flip_in_lists_never_reaches_apt() {
    let Rotting { mut stage, lists, .. } = rotting();
    // An index of several blocks.
    let filler = |number: usize| {
        format!(
            "Package: filler{number}\nVersion: 1\nArchitecture: all\nFilename: pool/f{number}.deb\nSize: 1\nSHA256: {}\nDescription: {}\n\n",
            "0".repeat(64),
            "words ".repeat(60)
        )
    };
    let index: String = (0..600).map(filler).collect();
    stage.repo.publish_index(index.as_bytes());
    stage.machine.update();
    let mut flips = 0;
    let (mut mended, mut refused) = (0, 0);
    for name in listed(&stage.machine.lists()).into_iter().filter(|name| name.ends_with("_Packages") || name.ends_with("InRelease")) {
        let path = stage.machine.lists().join(&name);
        let want = fs::read(&path).unwrap();
        for offset in positions(want.len() as u64) {
            lists.flip(&name, offset);
            forget_pages(&path);
            flips += 1;
            match read_at(&path, offset) {
                Ok(byte) => {
                    assert_eq!(byte, want[usize::try_from(offset).unwrap()], "{name} at {offset}");
                    assert_holds(&lists.path(&name), &want);
                    mended += 1;
                }
                Err(error) => {
                    assert_eq!(error.raw_os_error(), Some(rustix::io::Errno::IO.raw_os_error()), "{name} at {offset}: {error}");
                    refused += 1;
                    lists.flip(&name, offset);
                }
            }
        }
        assert_holds(&path, &want);
    }
    assert!(flips > 10, "the index should have several blocks");
    // Left rotten, a new list replaces it.
    let name = listed(&stage.machine.lists()).into_iter().find(|name| name.ends_with("_Packages")).unwrap();
    lists.flip(&name, 5);
    forget_pages(&stage.machine.lists().join(&name));
    stage.repo.publish_index(index.replace("filler1\n", "filler-one\n").as_bytes());
    stage.machine.update();
    let policy = run(&mut stage.machine.command("apt-cache", &["policy", "filler-one"])).ok();
    assert!(policy.out.contains("Candidate: 1"), "{policy}");
    report("repair::lists", &format!("{flips} flips: {mended} mended, {refused} answered with EIO, no wrong byte"));
}

/// A file that is truncated or replaced behind the mount is another file: its old bytes must not come back under its name as good.
#[test]
fn changes_behind_the_mount() {
    let Rotting { stage, archives, .. } = rotting();
    let published = &stage.packages[0];
    let (name, path) = (published.archive_name(), stage.archive(published));
    // Same size, another content, another time: damaged, and mended from the mirror.
    let other = crate::harness::repo::noise("another", published.bytes.len());
    fs::write(archives.path(&name), &other).unwrap();
    assert_holds(&path, &published.bytes);
    // Another size: somebody put another file there, and that is what it is.
    fs::remove_file(archives.path(&name)).unwrap();
    fs::write(archives.path(&name), b"another file").unwrap();
    let deadline = std::time::Instant::now() + crate::harness::LIMIT;
    // The kernel may believe in the old one for the second that entries are good for.
    while fs::read(&path).is_ok_and(|bytes| bytes != b"another file") {
        assert!(std::time::Instant::now() < deadline);
    }
    assert_holds(&path, b"another file");
    fs::remove_file(archives.path(&name)).unwrap();
    while stage.debs().contains(&name) {
        assert!(std::time::Instant::now() < deadline);
    }
    let finished = stage.download_all().ok();
    assert_eq!(finished.deb_gets(), Vec::<&str>::new(), "{finished}");
    stage.assert_all_here();
    assert_eq!(stage.mirror.debs_asked_by(Client::Apt), 0);
}

/// A kept package that is not what was kept, as after a power loss, is dropped, and whoever asks for its name gets it from elsewhere at
/// once, not at the second try.
#[test]
fn a_rotten_object_is_no_missing_file() {
    let stage = Stage::mounted(vec![Package::new("kept", "1.0", 400_000), Package::new("other", "1.0", 3_000)], &Options::default());
    stage.download_all().ok();
    let kept = &stage.packages[0];
    fs::remove_file(stage.archive(kept)).unwrap();
    // The next run of apt shows the name again.
    stage.machine.apt_get(&["install", "-y", "-d", "--reinstall", "other"]).ok();
    let object = stage.machine.cache_dir().join("objects").join(&kept.digest);
    fs::write(&object, b"").unwrap();
    assert_holds(&stage.archive(kept), &kept.bytes);
    assert!(stage.machine.log().contains("is not what was put there; it is dropped"), "{}", stage.machine.log());
}
