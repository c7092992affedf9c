//! What `stat` shows, without the kernel's and fuser's types.

use rustix::fs::{FileType, Stat, Timespec};

/// The attributes of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attr {
    /// Inode number as the mount shows it: the node's number.
    pub ino: u64,
    /// Length in bytes.
    pub size: u64,
    /// Space used, in units of 512 bytes.
    pub blocks: u64,
    /// Last access, modification and change.
    pub atime: Time,
    /// See `atime`.
    pub mtime: Time,
    /// See `atime`.
    pub ctime: Time,
    /// Regular file, directory and so on.
    pub kind: FileType,
    /// Permission bits, set-id bits and the sticky bit (07777).
    pub mode: u16,
    /// Hard links.
    pub nlink: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Device number, of device nodes.
    pub rdev: u32,
    /// Preferred block size for I/O, in bytes.
    pub blksize: u32,
}

/// A point in time: seconds since 1970 (negative before) and nanoseconds (0 to 999,999,999).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Time {
    /// Seconds since 1970.
    pub sec: i64,
    /// Nanoseconds within the second.
    pub nsec: u32,
}

impl Time {
    /// For `utimensat`.
    pub(crate) fn timespec(self) -> Timespec {
        Timespec { tv_sec: self.sec, tv_nsec: self.nsec.into() }
    }
}

/// A time to set: one that is named, or the moment of the call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SetTime {
    /// As by `UTIME_NOW`.
    Now,
    /// As named.
    At(Time),
}

/// What `setattr` changes; `None` leaves a field as it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SetAttr {
    /// Permission bits (07777).
    pub mode: Option<u32>,
    /// Owner.
    pub uid: Option<u32>,
    /// Group.
    pub gid: Option<u32>,
    /// Length in bytes.
    pub size: Option<u64>,
    /// Last access.
    pub atime: Option<SetTime>,
    /// Last modification.
    pub mtime: Option<SetTime>,
}

impl Attr {
    /// The attributes of a backing inode, shown under the number `ino`.
    #[allow(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::unnecessary_cast,
        reason = "the fields' types differ by architecture; the kernel keeps sizes, blocks and nanoseconds non-negative and in range"
    )]
    pub fn of(ino: u64, stat: &Stat) -> Self {
        Self {
            ino,
            size: stat.st_size as u64,
            blocks: stat.st_blocks as u64,
            atime: Time { sec: stat.st_atime as i64, nsec: stat.st_atime_nsec as u32 },
            mtime: Time { sec: stat.st_mtime as i64, nsec: stat.st_mtime_nsec as u32 },
            ctime: Time { sec: stat.st_ctime as i64, nsec: stat.st_ctime_nsec as u32 },
            kind: FileType::from_raw_mode(stat.st_mode as _),
            mode: (stat.st_mode & 0o7777) as u16,
            nlink: stat.st_nlink as u32,
            uid: stat.st_uid,
            gid: stat.st_gid,
            // The kernel's own encoding of FUSE's 32-bit rdev: 12 bits major, 20 bits minor (new_encode_dev).
            rdev: new_encode_dev(stat.st_rdev as u64),
            blksize: stat.st_blksize as u32,
        }
    }
}

/// A device number in FUSE's 32 bits, as the kernel's `new_encode_dev`.
#[allow(clippy::cast_possible_truncation, reason = "the kernel has 12 bits of major and 20 of minor")]
pub(crate) fn new_encode_dev(dev: u64) -> u32 {
    let (major, minor) = (rustix::fs::major(dev), rustix::fs::minor(dev));
    (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)
}

/// The opposite of [`new_encode_dev`].
pub(crate) fn new_decode_dev(rdev: u32) -> u64 {
    let major = (rdev & 0xf_ff00) >> 8;
    let minor = (rdev & 0xff) | ((rdev >> 12) & 0xf_ff00);
    rustix::fs::makedev(major, minor)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A wrong shift shows device nodes as others than they are.
    #[test]
    fn device_numbers_survive() {
        for (major, minor) in [(0, 0), (1, 3), (8, 255), (8, 256), (4095, 0xf_ffff)] {
            let dev = rustix::fs::makedev(major, minor);
            assert_eq!(new_decode_dev(new_encode_dev(dev)), dev, "{major}:{minor}");
        }
    }
}
