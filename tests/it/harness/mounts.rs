//! Mounts as the kernel tells them, and a mount namespace for each test.

use super::LIMIT;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::inotify;
use rustix::mount::{MountPropagationFlags, UnmountFlags, mount_change, unmount};
use std::ffi::OsString;
use std::fs::File;
use std::io::{Read as _, Seek as _};
use std::os::unix::ffi::OsStringExt as _;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Gives the calling thread, and every thread and process that it starts from now on, a mount namespace of its own:
/// what a test mounts is seen by nobody else, and goes when its last process goes.
pub(crate) fn enter_namespace() {
    super::sys::unshare_mounts().expect("end-to-end tests need root (unshare a mount namespace)");
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).expect("make the mounts of this namespace private");
}

/// One line of mountinfo.
#[derive(Clone, Debug)]
pub(crate) struct Mount {
    pub(crate) at: PathBuf,
    pub(crate) kind: String,
    pub(crate) options: String,
}

impl Mount {
    pub(crate) fn is_fuse(&self) -> bool {
        self.kind == "fuse" || self.kind.starts_with("fuse.")
    }
}

/// The mounts that the calling thread sees, the oldest first.
pub(crate) fn mounts() -> Vec<Mount> {
    parse(&std::fs::read_to_string("/proc/thread-self/mountinfo").unwrap())
}

/// The mounts at exactly this path, the topmost last.
pub(crate) fn at(path: &Path) -> Vec<Mount> {
    mounts().into_iter().filter(|mount| mount.at == path).collect()
}

/// Waits until the mount table satisfies `wanted`: the kernel says when it changes, nothing is polled on a clock.
#[track_caller]
pub(crate) fn await_mounts(what: &str, mut wanted: impl FnMut(&[Mount]) -> bool) {
    await_change(what, &[], || wanted(&mounts()));
}

/// Waits until `wanted`: asked again whenever the mount table changes, and whenever an entry of one of `directories` does
/// (made, removed, renamed, written to, its attributes changed).
#[track_caller]
pub(crate) fn await_change(what: &str, directories: &[&Path], mut wanted: impl FnMut() -> bool) {
    let mut table = File::open("/proc/thread-self/mountinfo").unwrap();
    let events = inotify::init(inotify::CreateFlags::NONBLOCK | inotify::CreateFlags::CLOEXEC).unwrap();
    for directory in directories {
        use inotify::WatchFlags as Flags;
        let flags = Flags::CREATE | Flags::DELETE | Flags::MOVE | Flags::ATTRIB | Flags::MODIFY | Flags::CLOSE_WRITE;
        inotify::add_watch(&events, *directory, flags).unwrap_or_else(|error| panic!("watch {}: {error}", directory.display()));
    }
    let deadline = Instant::now() + LIMIT;
    loop {
        // Reading the table marks its changes as seen, so it comes before the question.
        table.rewind().unwrap();
        table.read_to_string(&mut String::new()).unwrap();
        let mut buffer = [0; 4096];
        while rustix::io::read(&events, &mut buffer).is_ok_and(|bytes| bytes > 0) {}
        if wanted() {
            return;
        }
        let left = deadline.saturating_duration_since(Instant::now());
        assert!(!left.is_zero(), "{what}: not within {LIMIT:?}; mounts: {:#?}", mounts());
        let timeout = Timespec::try_from(left).unwrap();
        match poll(&mut [PollFd::new(&table, PollFlags::PRI), PollFd::new(&events, PollFlags::IN)], Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => panic!("poll for a change: {error}"),
        }
    }
}

/// Detaches every mount at or below `root`, the last made first.
pub(crate) fn detach_below(root: &Path) {
    for mount in mounts().into_iter().rev().filter(|mount| mount.at.starts_with(root)) {
        if let Err(error) = unmount(&mount.at, UnmountFlags::DETACH) {
            eprintln!("detach {}: {error}", mount.at.display());
        }
    }
}

fn parse(text: &str) -> Vec<Mount> {
    let parse_line = |line: &str| {
        // proc(5): id parent major:minor root mount-point options [tags...] - type source super-options
        let (left, right) = line.split_once(" - ")?;
        let at = PathBuf::from(OsString::from_vec(unescape(left.split(' ').nth(4)?)));
        let options = left.split(' ').nth(5)?.to_owned();
        let mut right = right.split(' ');
        Some(Mount { at, options, kind: right.next()?.to_owned() })
    };
    text.lines().filter_map(parse_line).collect()
}

/// mountinfo writes space, tab, newline and backslash as three octal digits after a backslash.
fn unescape(text: &str) -> Vec<u8> {
    let bytes = text.as_bytes();
    let mut plain = Vec::with_capacity(bytes.len());
    let mut rest = bytes;
    while let Some((&first, after)) = rest.split_first() {
        let octal = (first == b'\\').then(|| after.get(..3)).flatten();
        let value = octal.and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        plain.push(value.unwrap_or(first));
        rest = if value.is_some() { &after[3..] } else { after };
    }
    plain
}
