//! Files on disk: recorded, checked, repaired, moved.

use crate::lab::{Lab, Mood, PANICS, bytes};
use poolfs_core::piece::BLOCK_BYTES;
use poolfs_core::store::{Sharing, State};
use poolfs_core::{Digest, Role};
use poolfs_fs::attr::SetAttr;
use poolfs_fs::tree::Caller;
use rustix::fs::{Mode, OFlags};
use rustix::mount::MountFlags;
use std::fs::{self, File, OpenOptions};
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, PermissionsExt as _};
use std::time::{Duration, SystemTime};

const BLOCK: usize = BLOCK_BYTES as usize;

fn errno(err: &std::io::Error) -> i32 {
    err.raw_os_error().unwrap_or(0)
}

/// A file that was written without its record would be hashed at every open, or served unchecked.
#[test]
fn what_is_written_is_recorded() {
    let Some(mut lab) = Lab::new(Role::Archives) else { return };
    for (index, len) in [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 4 * BLOCK, 9 * BLOCK + 77].into_iter().enumerate() {
        let content = bytes(len, index as u64);
        let name = format!("file{index}");
        fs::write(lab.path(&name), &content).unwrap();
        // The kernel tells of the last close after close(2) has returned.
        lab.settle();
        assert_eq!(lab.xattr(&name, "state"), "clean", "{len}");
        assert_eq!(lab.xattr(&name, "digest"), Digest::of(&content).to_string(), "{len}");
        assert_eq!(fs::read(lab.path(&name)).unwrap(), content, "{len}");
    }
    let hashed = lab.tree().counters().files_hashed.load(std::sync::atomic::Ordering::Relaxed);
    assert_eq!(hashed, 0, "everything came in order");
    lab.unmount();
    assert!(lab.path("file3").exists(), "the covered directory has the files");
    lab.mount();
    let scanned = lab.run(lab.tree().scan()).unwrap();
    // apt's lock, made for mounting, is a file too.
    assert_eq!((scanned.files, scanned.forgotten), (8, 0));
    assert!(scanned.hashed <= 1, "only the lock may be new: {scanned:?}");
    let again = lab.run(lab.tree().scan()).unwrap();
    assert_eq!(again.hashed, 0);
}

/// Writes in any order, truncation and appending must end in the sums of what is there.
#[test]
fn any_way_of_writing_ends_recorded() {
    let Some(lab) = Lab::new(Role::Lists) else { return };
    let path = lab.path("list");
    let check = |what: &str| {
        lab.settle();
        let content = fs::read(lab.covered("list")).unwrap();
        assert_eq!(lab.xattr("list", "digest"), Digest::of(&content).to_string(), "{what}");
        assert_eq!(fs::read(&path).unwrap(), content, "{what}");
    };
    let file = File::create(&path).unwrap();
    file.write_all_at(&bytes(BLOCK, 1), BLOCK as u64).unwrap();
    file.write_all_at(&bytes(BLOCK, 2), 0).unwrap();
    drop(file);
    check("backwards");
    OpenOptions::new().append(true).open(&path).unwrap().write_all(b"more").unwrap();
    check("appended");
    OpenOptions::new().write(true).open(&path).unwrap().set_len(100).unwrap();
    check("cut");
    rustix::fs::open(&path, OFlags::WRONLY | OFlags::TRUNC, Mode::empty()).unwrap();
    check("emptied");
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, 5000).unwrap();
    drop(file);
    check("allocated");
}

/// Rot anywhere must be found by whoever reads it, and right bytes be answered.
#[test]
fn a_flipped_bit_is_repaired_at_every_block() {
    let Some(lab) = Lab::new(Role::Archives) else { return };
    let content = bytes(5 * BLOCK + 100, 7);
    lab.offer("rots_1_all.deb", &content);
    fs::write(lab.path("rots_1_all.deb"), &content).unwrap();
    let mtime = fs::metadata(lab.path("rots_1_all.deb")).unwrap().modified().unwrap();
    for at in [0, BLOCK - 1, BLOCK, 2 * BLOCK + 5, 4 * BLOCK, 5 * BLOCK + 99] {
        let covered = OpenOptions::new().write(true).open(lab.covered("rots_1_all.deb")).unwrap();
        covered.write_all_at(&[content[at] ^ 1], at as u64).unwrap();
        covered.set_modified(mtime).unwrap();
        drop(covered);
        drop_cache(&lab.path("rots_1_all.deb"));
        let got = fs::read(lab.path("rots_1_all.deb")).unwrap();
        assert!(got == content, "at {at}");
        assert!(fs::read(lab.covered("rots_1_all.deb")).unwrap() == content, "mended in place, at {at}");
    }
    assert_eq!(lab.xattr("rots_1_all.deb", "state"), "clean");
}

/// With nobody to repair it, wrong bytes must not be answered; the blocks beside it still are.
#[test]
fn rot_without_a_source_is_an_error() {
    let Some(lab) = Lab::new(Role::Lists) else { return };
    let content = bytes(3 * BLOCK, 8);
    fs::write(lab.path("list"), &content).unwrap();
    let mtime = fs::metadata(lab.path("list")).unwrap().modified().unwrap();
    lab.mood(Mood::HasNothing);
    let covered = OpenOptions::new().write(true).open(lab.covered("list")).unwrap();
    covered.write_all_at(&[content[BLOCK] ^ 1], BLOCK as u64).unwrap();
    covered.set_modified(mtime).unwrap();
    drop(covered);
    drop_cache(&lab.path("list"));
    let file = File::open(lab.path("list")).unwrap();
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::Random).unwrap();
    let mut block = vec![0; BLOCK];
    assert_eq!(errno(&file.read_exact_at(&mut block, BLOCK as u64).unwrap_err()), libc::EIO);
    file.read_exact_at(&mut block, 2 * BLOCK as u64).unwrap();
    assert_eq!(block, content[2 * BLOCK..]);
    assert_eq!(lab.xattr("list", "state"), "damaged");
    assert_eq!(lab.store().counts(Role::Lists).unwrap().damaged, 1);
}

/// A list that apt replaced while nothing was mounted often has the old one's size, and may have got its inode number from a
/// list in between. Nobody could give the old bytes back, and apt must be able to read the new ones.
#[test]
fn a_list_replaced_at_the_same_inode_and_size_is_a_new_list() {
    let Some(mut lab) = Lab::new(Role::Lists) else { return };
    let (old, new) = (bytes(BLOCK + 10, 3), bytes(BLOCK + 10, 4));
    fs::write(lab.path("h_InRelease"), &old).unwrap();
    lab.unmount();
    OpenOptions::new().write(true).open(lab.path("h_InRelease")).unwrap().write_all_at(&new, 0).unwrap();
    let covered = OpenOptions::new().write(true).open(lab.path("h_InRelease")).unwrap();
    covered.set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(7)).unwrap();
    drop(covered);
    lab.mount();
    assert!(fs::read(lab.path("h_InRelease")).unwrap() == new);
    assert_eq!(lab.xattr("h_InRelease", "state"), "clean");
}

/// Right bytes that come late must not go into a file that somebody has made another meanwhile.
#[test]
fn a_repair_leaves_alone_what_was_written_meanwhile() {
    let Some(lab) = Lab::new(Role::Archives) else { return };
    let content = bytes(2 * BLOCK, 11);
    let path = lab.path("rots_1_all.deb");
    lab.offer("rots_1_all.deb", &content);
    fs::write(&path, &content).unwrap();
    let mtime = fs::metadata(&path).unwrap().modified().unwrap();
    let covered = OpenOptions::new().write(true).open(lab.covered("rots_1_all.deb")).unwrap();
    covered.write_all_at(&[content[0] ^ 1], 0).unwrap();
    covered.set_modified(mtime).unwrap();
    drop_cache(&path);
    lab.mood(Mood::Stalls);
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| fs::read(&path));
        while lab.source.wants.lock().is_empty() {
            std::thread::yield_now();
        }
        // Past the mount's caches: the reader has the page of the damaged block.
        let id = fs::metadata(&path).unwrap().ino();
        let shorter = SetAttr { size: Some(5), ..SetAttr::default() };
        let root = Caller { uid: 0, gid: 0, pid: 0 };
        lab.run(lab.tree().setattr(id, None, shorter, &root).get()).unwrap();
        lab.mood(Mood::Gives);
        // Whatever the reader gets is of one of the two files.
        let got = reader.join().unwrap().unwrap();
        assert!(content.starts_with(&got) || got.is_empty() || got[1..5] == content[1..5], "{} bytes", got.len());
    });
    assert_eq!(fs::read(lab.covered("rots_1_all.deb")).unwrap().len(), 5, "the repair wrote past the new end");
}

/// Rot that changes the mtime, as a bad disk or a wrong tool does, is rot all the same.
#[test]
fn other_bytes_at_the_same_inode_and_size_are_damage() {
    let Some(mut lab) = Lab::new(Role::Archives) else { return };
    let content = bytes(2 * BLOCK, 9);
    lab.offer("rots_1_all.deb", &content);
    fs::write(lab.path("rots_1_all.deb"), &content).unwrap();
    lab.unmount();
    OpenOptions::new().write(true).open(lab.path("rots_1_all.deb")).unwrap().write_all_at(b"rot", 10).unwrap();
    lab.mount();
    assert_eq!(fs::read(lab.path("rots_1_all.deb")).unwrap(), content);
}

/// apt and dpkg take a file of the right name and size without looking at it: a wrong one must not reach them.
#[test]
fn a_file_that_only_looks_like_the_package_is_replaced() {
    let Some(mut lab) = Lab::new(Role::Archives) else { return };
    let content = bytes(2 * BLOCK, 10);
    lab.offer("looks_1_all.deb", &content);
    lab.unmount();
    fs::write(lab.path("looks_1_all.deb"), bytes(2 * BLOCK, 11)).unwrap();
    lab.mount();
    lab.mood(Mood::HasNothing);
    assert_eq!(errno(&fs::read(lab.path("looks_1_all.deb")).unwrap_err()), libc::EIO);
    lab.unmount();
    lab.mount();
    lab.mood(Mood::Gives);
    assert!(fs::read(lab.path("looks_1_all.deb")).unwrap() == content);
    assert_eq!(lab.xattr("looks_1_all.deb", "state"), "clean");
    // What is written through the mount is somebody's will.
    fs::remove_file(lab.path("looks_1_all.deb")).unwrap();
    let own = bytes(2 * BLOCK, 12);
    fs::write(lab.path("looks_1_all.deb"), &own).unwrap();
    lab.settle();
    assert!(fs::read(lab.path("looks_1_all.deb")).unwrap() == own);
}

/// apt replaces lists by rename, and the size may stay: that is a new file and no damage.
#[test]
fn a_replaced_file_of_the_same_size_is_a_new_one() {
    let Some(mut lab) = Lab::new(Role::Lists) else { return };
    fs::write(lab.path("x_InRelease"), b"yesterday").unwrap();
    lab.unmount();
    fs::write(lab.path("new"), b"todaytodY").unwrap();
    fs::rename(lab.path("new"), lab.path("x_InRelease")).unwrap();
    lab.mount();
    lab.mood(Mood::HasNothing);
    assert_eq!(fs::read(lab.path("x_InRelease")).unwrap(), b"todaytodY");
    assert_eq!(lab.xattr("x_InRelease", "state"), "clean");
}

/// What others do to the covered directory while it is mounted must be seen, and never served by old sums.
#[test]
fn changes_behind_the_mount_are_seen() {
    let Some(mut lab) = Lab::new(Role::Lists) else { return };
    lab.unmount();
    lab.options.ttl = Some(Duration::ZERO);
    lab.mount();
    fs::write(lab.path("a"), b"one").unwrap();
    let mut open = File::open(lab.path("a")).unwrap();
    fs::write(lab.covered("b"), b"three").unwrap();
    fs::rename(lab.covered("b"), lab.covered("a")).unwrap();
    let mut old = String::new();
    open.read_to_string(&mut old).unwrap();
    assert_eq!(old, "one", "who has the old file open reads the old file");
    assert_eq!(fs::read(lab.path("a")).unwrap(), b"three");
    let appended = OpenOptions::new().append(true).open(lab.covered("a")).unwrap();
    (&appended).write_all(b" four").unwrap();
    assert_eq!(fs::read(lab.path("a")).unwrap(), b"three four");
}

/// Records that do not follow names would have every moved file hashed again, or lose it.
#[test]
fn records_follow_names() {
    let Some(lab) = Lab::new(Role::Archives) else { return };
    fs::create_dir(lab.path("d")).unwrap();
    fs::write(lab.path("d/f"), b"content").unwrap();
    fs::rename(lab.path("d"), lab.path("e")).unwrap();
    fs::hard_link(lab.path("e/f"), lab.path("e/g")).unwrap();
    let record = |path: &str| lab.store().file(Role::Archives, path.as_bytes()).unwrap();
    assert!(record("d/f").is_none());
    for path in ["e/f", "e/g"] {
        assert_eq!(record(path).unwrap().digest, Some(Digest::of(b"content")), "{path}");
    }
    // Written through one name, it is written under both.
    OpenOptions::new().append(true).open(lab.path("e/g")).unwrap().write_all(b"!").unwrap();
    lab.settle();
    for path in ["e/f", "e/g"] {
        assert_eq!(record(path).unwrap().digest, Some(Digest::of(b"content!")), "{path}");
    }
    fs::write(lab.path("other"), b"other").unwrap();
    let exchange = rustix::fs::RenameFlags::EXCHANGE;
    rustix::fs::renameat_with(rustix::fs::CWD, lab.path("other"), rustix::fs::CWD, lab.path("e/f"), exchange).unwrap();
    assert_eq!(record("e/f").unwrap().digest, Some(Digest::of(b"other")));
    assert_eq!(record("other").unwrap().digest, Some(Digest::of(b"content!")));
    let hashed = lab.tree().counters().files_hashed.load(std::sync::atomic::Ordering::Relaxed);
    fs::set_permissions(lab.path("other"), fs::Permissions::from_mode(0o600)).unwrap();
    let times = fs::FileTimes::new().set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(5));
    File::options().write(true).open(lab.path("other")).unwrap().set_times(times).unwrap();
    assert_eq!(fs::read(lab.path("other")).unwrap(), b"content!");
    assert_eq!(lab.tree().counters().files_hashed.load(std::sync::atomic::Ordering::Relaxed), hashed, "mode and times are no bytes");
    fs::remove_file(lab.path("other")).unwrap();
    assert!(record("other").is_none());
}

/// The classes decide what leaves the machine.
#[test]
fn what_the_catalog_knows_is_shared() {
    let Some(lab) = Lab::new(Role::Archives) else { return };
    let (small, large) = (bytes(1000, 1), bytes(600 * 1024, 2));
    lab.offer("small_1_all.deb", &small);
    lab.offer("large_1_all.deb", &large);
    fs::write(lab.path("small_1_all.deb"), &small).unwrap();
    fs::write(lab.path("large_1_all.deb"), &large).unwrap();
    fs::write(lab.path("own_1_all.deb"), b"mine").unwrap();
    let classes = |name: &str| (lab.xattr(name, "announced"), lab.xattr(name, "source"));
    assert_eq!(classes("small_1_all.deb"), ("available".into(), "mirror".into()));
    assert_eq!(classes("large_1_all.deb"), ("announced".into(), "mirror".into()));
    assert_eq!(classes("own_1_all.deb"), ("local-only".into(), "written here".into()));
    let record = lab.store().file(Role::Archives, b"large_1_all.deb").unwrap().unwrap();
    assert_eq!((record.state, record.sharing), (State::Clean, Sharing::Announced));
}

/// Nobody but poolfs says what a file's digest is.
#[test]
fn own_attributes_are_read_only() {
    let Some(lab) = Lab::new(Role::Archives) else { return };
    fs::write(lab.path("f"), b"f").unwrap();
    let set = |name: &str| rustix::fs::setxattr(lab.path("f"), name, b"x", rustix::fs::XattrFlags::empty());
    assert_eq!(set("user.poolfs.digest"), Err(rustix::io::Errno::PERM));
    assert_eq!(rustix::fs::removexattr(lab.path("f"), "user.poolfs.state"), Err(rustix::io::Errno::PERM));
    set("user.mine").unwrap();
    let mut names = vec![0; 1024];
    let len = rustix::fs::listxattr(lab.path("f"), names.as_mut_slice()).unwrap();
    let names: Vec<&str> = std::str::from_utf8(&names[..len]).unwrap().split_terminator('\0').collect();
    assert!(names.contains(&"user.mine") && names.contains(&"user.poolfs.digest"), "{names:?}");
}

/// Offsets that shift while entries go make `rm -r` miss files.
#[test]
fn a_listing_survives_its_own_deletion() {
    let Some(lab) = Lab::new(Role::Archives) else { return };
    fs::create_dir(lab.covered("many")).unwrap();
    for index in 0..2000 {
        File::create(lab.covered(&format!("many/file-with-a-long-name-{index:05}"))).unwrap();
    }
    let mut seen = 0;
    for entry in fs::read_dir(lab.path("many")).unwrap() {
        fs::remove_file(entry.unwrap().path()).unwrap();
        seen += 1;
    }
    assert_eq!(seen, 2000);
    fs::remove_dir(lab.path("many")).unwrap();
}

/// A bug in one request must cost that request and not the mount.
#[test]
fn a_panic_costs_one_request() {
    let Some(lab) = Lab::new(Role::Archives) else { return };
    assert_eq!(errno(&fs::metadata(lab.path(PANICS)).unwrap_err()), libc::EIO);
    fs::write(lab.path("f"), b"alive").unwrap();
    assert_eq!(fs::read(lab.path("f")).unwrap(), b"alive");
}

/// A mount whose daemon has died makes every apt fail until it is detached.
#[test]
fn a_dead_mount_is_detached_first() {
    let Some(mut lab) = Lab::new(Role::Archives) else { return };
    lab.unmount();
    let device = rustix::fs::open("/dev/fuse", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).unwrap();
    let data = std::ffi::CString::new(format!("fd={},rootmode=40000,user_id=0,group_id=0", device.as_raw_fd())).unwrap();
    rustix::mount::mount("poolfs", lab.dir(), "fuse.poolfs", MountFlags::empty(), data.as_c_str()).unwrap();
    drop(device);
    assert_eq!(errno(&fs::metadata(lab.dir()).unwrap_err()), libc::ENOTCONN);
    lab.mount();
    fs::write(lab.path("f"), b"alive").unwrap();
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert_eq!(mounts.lines().filter(|line| line.contains(lab.dir().to_str().unwrap())).count(), 1);
    let twice = poolfs_fs::prepare(
        &[poolfs_fs::MountSpec { role: Role::Archives, path: lab.dir(), options: poolfs_fs::MountOptions::default() }],
        &lab.dir(),
    );
    assert!(matches!(twice, Err(poolfs_fs::MountError::AlreadyMounted(_))), "{twice:?}");
}

/// Files keep their owner, links and holes as on the covered file system.
#[test]
fn attributes_pass_through() {
    let Some(lab) = Lab::new(Role::Archives) else { return };
    fs::create_dir(lab.path("setgid")).unwrap();
    std::os::unix::fs::chown(lab.path("setgid"), Some(1), Some(42)).unwrap();
    fs::set_permissions(lab.path("setgid"), fs::Permissions::from_mode(0o2755)).unwrap();
    fs::create_dir(lab.path("setgid/inner")).unwrap();
    let inner = fs::metadata(lab.path("setgid/inner")).unwrap();
    assert_eq!((inner.gid(), inner.mode() & 0o7000), (42, 0o2000));
    fs::write(lab.path("setgid/file"), b"").unwrap();
    assert_eq!(fs::metadata(lab.path("setgid/file")).unwrap().gid(), 42);
    std::os::unix::fs::symlink("nowhere", lab.path("link")).unwrap();
    assert_eq!(fs::read_link(lab.path("link")).unwrap().to_str(), Some("nowhere"));
    let mut sparse = File::create(lab.path("sparse")).unwrap();
    sparse.seek(SeekFrom::Start(1 << 20)).unwrap();
    sparse.write_all(b"end").unwrap();
    assert_eq!(rustix::fs::seek(&sparse, rustix::fs::SeekFrom::Data(0)).unwrap(), 1 << 20);
    let (here, there) = (fs::metadata(lab.path("sparse")).unwrap(), fs::metadata(lab.covered("sparse")).unwrap());
    assert_eq!((here.ino(), here.blocks(), here.len()), (there.ino(), there.blocks(), there.len()));
}

/// Throws out what the kernel has cached of a file through the mount.
fn drop_cache(path: &std::path::Path) {
    let file = File::open(path).unwrap();
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
}
