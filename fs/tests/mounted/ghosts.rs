//! Ghosts as apt, dpkg and people meet them.

use crate::lab::{DATE, Lab, Mood, bytes};
use crate::sys;
use poolfs_core::catalog::Entry;
use poolfs_core::{Digest, Role};
use rustix::fs::{Mode, OFlags};
use std::fs::{self, File, OpenOptions};
use std::io::{Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::sync::atomic::Ordering;

const NAME: &str = "hello_2.10-3_amd64.deb";

fn errno<T: std::fmt::Debug>(result: std::io::Result<T>) -> i32 {
    result.unwrap_err().raw_os_error().unwrap_or(0)
}

fn listing(lab: &Lab, below: &str) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(lab.path(below)).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// apt's way: stat, chown, chmod, open, read, chown, rename. The file must be whole, plain and dressed as apt set it.
#[test]
fn apts_way_through_partial() {
    let Some(mut lab) = Lab::new(Role::Archives) else { return };
    let content = bytes(300_000, 1);
    let digest = lab.offer(NAME, &content);
    let partial = lab.path(&format!("partial/{NAME}"));
    let lock = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(lab.path("lock")).unwrap();
    let hashed_before = lab.tree().counters().files_hashed.load(Ordering::Relaxed);
    let seen = fs::metadata(&partial).unwrap();
    assert_eq!((seen.len(), seen.mtime(), seen.blocks(), seen.mode()), (300_000, DATE, 586, 0o100_644));
    assert_eq!(listing(&lab, "partial"), Vec::<String>::new(), "a ghost is not listed");
    assert!(lab.source.wants.lock().is_empty(), "a lookup starts nothing");
    std::os::unix::fs::chown(&partial, Some(42), Some(43)).unwrap();
    fs::set_permissions(&partial, fs::Permissions::from_mode(0o600)).unwrap();
    let mut file = File::open(&partial).unwrap();
    assert_eq!(file.metadata().unwrap().uid(), 42);
    let mut got = Vec::new();
    file.read_to_end(&mut got).unwrap();
    assert!(got == content);
    assert_eq!(lab.source.wants.lock().len(), 1);
    let placed = fs::metadata(lab.covered(&format!("partial/{NAME}"))).unwrap();
    assert_eq!((placed.len(), placed.mtime(), placed.uid(), placed.gid(), placed.mode()), (300_000, DATE, 42, 43, 0o100_600));
    std::os::unix::fs::chown(&partial, Some(0), Some(0)).unwrap();
    fs::rename(&partial, lab.path(NAME)).unwrap();
    drop(file);
    assert_eq!(errno(fs::metadata(&partial)), libc::ENOENT, "what was moved away does not come back as a ghost");
    assert_eq!(lab.xattr(NAME, "digest"), digest.to_string());
    assert_eq!(lab.xattr(NAME, "source"), "mirror");
    drop(lock);
    let hashed = lab.tree().counters().files_hashed.load(Ordering::Relaxed);
    assert_eq!(hashed, hashed_before, "what was verified while it came is not hashed again");
    assert_eq!(lab.tree().counters().ghosts_opened.load(Ordering::Relaxed), 1);
    lab.unmount();
    assert!(fs::read(lab.path(NAME)).unwrap() == content);
}

/// `cp`, `dpkg -i` and others without libapt get the file directly in `archives/`.
#[test]
fn readers_without_libapt_find_ghosts_in_archives() {
    let Some(lab) = Lab::new(Role::Archives) else { return };
    let content = bytes(700_000, 2);
    lab.offer(NAME, &content);
    assert_eq!(errno(fs::hard_link(lab.path(NAME), lab.path("linked"))), libc::EPERM);
    assert_eq!(lab.xattr(NAME, "state"), "ghost");
    assert!(fs::read(lab.path(NAME)).unwrap() == content);
    assert_eq!(listing(&lab, ""), ["hello_2.10-3_amd64.deb", "lock", "partial"]);
    fs::hard_link(lab.path(NAME), lab.path("linked")).unwrap();
    assert_eq!(lab.xattr(NAME, "announced"), "announced");
}

/// Undeliverable in partial/ must look too short to apt, which then fetches it itself; an EIO would fail the run.
#[test]
fn undeliverable_ends_early_in_partial_and_fails_in_archives() {
    let Some(lab) = Lab::new(Role::Archives) else { return };
    lab.mood(Mood::HasNothing);
    lab.offer("a_1_all.deb", &bytes(1000, 1));
    lab.offer("b_1_all.deb", &bytes(1000, 2));
    assert_eq!(fs::metadata(lab.path("partial/a_1_all.deb")).unwrap().len(), 1000);
    assert_eq!(fs::read(lab.path("partial/a_1_all.deb")).unwrap(), b"");
    assert_eq!(errno(fs::metadata(lab.path("partial/a_1_all.deb"))), libc::ENOENT, "not shown again for a while");
    assert_eq!(errno(fs::read(lab.path("b_1_all.deb"))), libc::EIO);
    assert_eq!(errno(fs::metadata(lab.path("b_1_all.deb"))), libc::ENOENT);
    // What apt fetches itself then lands there.
    fs::write(lab.path("partial/a_1_all.deb"), bytes(1000, 1)).unwrap();
    assert_eq!(lab.xattr("partial/a_1_all.deb", "announced"), "available");
}

/// Wrong bytes never become readable.
#[test]
fn wrong_bytes_are_not_shown() {
    let Some(lab) = Lab::new(Role::Archives) else { return };
    lab.mood(Mood::GivesWrong);
    lab.offer(NAME, &bytes(5000, 3));
    assert_eq!(fs::read(lab.path(&format!("partial/{NAME}"))).unwrap(), b"");
    assert_eq!(errno(fs::metadata(lab.covered(&format!("partial/{NAME}")))), libc::ENOENT);
}

/// A ghost that stays after its unlink makes apt remove it again and again and fail.
#[test]
fn a_removed_ghost_stays_away_until_the_lock_is_released() {
    let Some(lab) = Lab::new(Role::Archives) else { return };
    lab.offer(NAME, &bytes(5000, 4));
    let partial = lab.path(&format!("partial/{NAME}"));
    let open_lock = || OpenOptions::new().read(true).write(true).create(true).truncate(false).open(lab.path("lock")).unwrap();
    let lock = open_lock();
    fs::metadata(&partial).unwrap();
    fs::remove_file(&partial).unwrap();
    assert_eq!(errno(fs::metadata(&partial)), libc::ENOENT);
    assert_eq!(errno(fs::remove_file(&partial)), libc::ENOENT);
    drop(lock);
    // RELEASE comes after close(2); another run is a fresh start in any case.
    let _lock = open_lock();
    assert_eq!(fs::metadata(&partial).unwrap().len(), 5000);
}

/// The plan: what was looked up under the lock starts together with the first that is touched.
#[test]
fn the_first_touch_starts_the_plan() {
    let Some(lab) = Lab::new(Role::Archives) else { return };
    lab.mood(Mood::Stalls);
    let names: Vec<String> = (0..20).map(|index| format!("p{index}_1_all.deb")).collect();
    for (index, name) in names.iter().enumerate() {
        lab.offer(name, &bytes(1000, index as u64 + 100));
    }
    let _lock = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(lab.path("lock")).unwrap();
    for name in &names {
        fs::metadata(lab.path(&format!("partial/{name}"))).unwrap();
    }
    assert!(lab.source.wants.lock().is_empty());
    fs::set_permissions(lab.path("partial/p7_1_all.deb"), fs::Permissions::from_mode(0o600)).unwrap();
    lab.mood(Mood::Gives);
    for name in names.iter().rev() {
        assert_eq!(fs::read(lab.path(&format!("partial/{name}"))).unwrap().len(), 1000);
    }
    let mut digests: Vec<Digest> = lab.source.wants.lock().iter().map(|want| want.digest).collect();
    digests.sort();
    digests.dedup();
    assert_eq!((digests.len(), lab.source.wants.lock().len()), (20, 20), "each once");
}

/// What does not fit must be apt's to report: a ghost of full size would hide it from apt's own check.
#[test]
fn a_plan_that_does_not_fit_is_not_shown() {
    let Some(lab) = Lab::new(Role::Archives) else { return };
    let (digest, urls) = (Digest::of(b"huge"), Vec::new());
    let (package, version) = ("huge".to_owned(), "1".to_owned());
    lab.list(Entry { name: "huge_1_all.deb".into(), digest, size: 1 << 60, date: DATE, urls, package, version, private: false });
    assert_eq!(errno(fs::metadata(lab.path("partial/huge_1_all.deb"))), libc::ENOENT);
}

/// Whoever writes to a ghost's name brings the bytes himself.
#[test]
fn writing_to_a_ghost_makes_a_file() {
    let Some(lab) = Lab::new(Role::Archives) else { return };
    lab.offer(NAME, &bytes(5000, 5));
    fs::metadata(lab.path(NAME)).unwrap();
    let mut file = OpenOptions::new().write(true).open(lab.path(NAME)).unwrap();
    assert_eq!(fs::metadata(lab.path(NAME)).unwrap().len(), 0);
    file.write_all(b"my own").unwrap();
    drop(file);
    assert_eq!(fs::read(lab.path(NAME)).unwrap(), b"my own");
    assert!(lab.source.wants.lock().is_empty());
    lab.settle();
    assert_eq!(lab.xattr(NAME, "announced"), "local-only");
}

/// Readers that wait for the network must not be in the way of anybody else.
#[test]
fn stalled_readers_do_not_stop_others() {
    let Some(lab) = Lab::new(Role::Archives) else { return };
    lab.mood(Mood::Stalls);
    fs::write(lab.path("here"), b"here").unwrap();
    let content = bytes(1000, 6);
    let readers: Vec<_> = (0..64)
        .map(|index| {
            let name = format!("stalled{}_1_all.deb", index % 8);
            lab.offer(&name, &content);
            let file = File::open(lab.path(&name)).unwrap();
            std::thread::spawn(move || {
                let mut got = Vec::new();
                (&file).read_to_end(&mut got).map(|_| got)
            })
        })
        .collect();
    assert_eq!(listing(&lab, ""), ["here", "lock", "partial"]);
    assert_eq!(fs::read(lab.path("here")).unwrap(), b"here");
    assert!(readers.iter().all(|reader| !reader.is_finished()));
    lab.mood(Mood::Gives);
    for reader in readers {
        assert!(reader.join().unwrap().unwrap() == content);
    }
}

/// A file that apt removes goes on being shared, and is there again when it is wanted: moved, not copied, not fetched.
#[test]
fn a_removed_package_is_kept_as_an_object() {
    let Some(lab) = Lab::new(Role::Archives) else { return };
    let content = bytes(100_000, 7);
    lab.offer(NAME, &content);
    fs::write(lab.path(NAME), &content).unwrap();
    let inode = fs::metadata(lab.covered(NAME)).unwrap().ino();
    let mut reader = File::open(lab.path(NAME)).unwrap();
    fs::remove_file(lab.path(NAME)).unwrap();
    assert_eq!(errno(fs::metadata(lab.path(NAME))), libc::ENOENT, "removed is removed");
    let mut got = Vec::new();
    reader.read_to_end(&mut got).unwrap();
    assert!(got == content, "who has it open goes on reading");
    drop(reader);
    // A new run starts afresh.
    let _lock = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(lab.path("lock")).unwrap();
    let back = fs::metadata(lab.path(NAME)).unwrap();
    assert_eq!((back.len(), back.mtime()), (100_000, DATE));
    assert_eq!(fs::metadata(lab.covered(NAME)).unwrap().ino(), inode, "moved, not copied");
    assert!(fs::read(lab.path(NAME)).unwrap() == content);
    assert!(lab.source.wants.lock().is_empty());
    fs::write(lab.path("own"), b"mine").unwrap();
    fs::remove_file(lab.path("own")).unwrap();
    assert_eq!(lab.store().counts(Role::Archives).unwrap().local_only, 1, "only the lock is left of what is local");
}

/// A browsing mount lists everything that exists, and nothing can be changed there.
#[test]
fn a_browsing_mount_lists_ghosts() {
    let Some(mut lab) = Lab::new(Role::Archives) else { return };
    let content = bytes(1000, 9);
    for name in ["a_1_all.deb", "b_1_all.deb"] {
        lab.offer(name, &content);
    }
    lab.unmount();
    lab.options.browse = true;
    lab.options.read_only = true;
    lab.mount();
    assert_eq!(listing(&lab, ""), ["a_1_all.deb", "b_1_all.deb", "lock", "partial"]);
    for entry in fs::read_dir(lab.dir()).unwrap() {
        let entry = entry.unwrap();
        if entry.file_name().to_str().unwrap().ends_with(".deb") {
            assert_eq!(entry.metadata().unwrap().len(), 1000);
        }
    }
    assert!(fs::read(lab.path("b_1_all.deb")).unwrap() == content);
    assert_eq!(listing(&lab, "").len(), 4, "once, whether here or not");
    assert_eq!(errno(fs::write(lab.path("c"), b"")), libc::EROFS);
}

/// The kernel's locks end at the mount: without this, two apts run at once, one on each side.
#[test]
fn apts_lock_reaches_through_the_mount() {
    let Some(lab) = Lab::new(Role::Lists) else { return };
    let open = |path| rustix::fs::open(path, OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC, Mode::from_raw_mode(0o640));
    let outside: OwnedFd = open(lab.covered("lock")).unwrap();
    // The mount is served by this very process, and a classic lock would end with any close of the file by it.
    let lock = || sys::try_lock_ofd(&outside).unwrap();
    let inside = open(lab.path("lock")).unwrap();
    let second = open(lab.path("lock")).unwrap();
    assert!(!lock());
    drop(second);
    assert!(!lock(), "the loser's close does not let go");
    drop(inside);
    // RELEASE comes after close(2) has returned.
    while !lock() {
        std::thread::yield_now();
    }
    assert_eq!(open(lab.path("lock")).unwrap_err(), rustix::io::Errno::AGAIN);
}
