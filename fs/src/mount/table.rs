//! `/proc/self/mountinfo`, as far as mounting needs it (proc(5)).

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStringExt as _;
use std::path::{Path, PathBuf};

/// One mount of this process's namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct MountLine {
    pub(crate) id: u64,
    /// `major:minor`.
    pub(crate) device: String,
    pub(crate) point: PathBuf,
    pub(crate) fstype: String,
}

/// All mounts, the later ones on top of the earlier.
pub(crate) fn read() -> io::Result<Vec<MountLine>> {
    Ok(std::fs::read("/proc/self/mountinfo")?.split(|byte| *byte == b'\n').filter_map(parse).collect())
}

/// The mount on top of exactly this path.
pub(crate) fn top<'a>(mounts: &'a [MountLine], point: &Path) -> Option<&'a MountLine> {
    mounts.iter().rev().find(|mount| mount.point == point)
}

/// The mount that a path lies in, leaving out what is mounted on the path itself if `beneath` says so.
pub(crate) fn containing<'a>(mounts: &'a [MountLine], path: &Path, beneath: impl Fn(&MountLine) -> bool) -> Option<&'a MountLine> {
    let reaches = |mount: &&MountLine| path.starts_with(&mount.point) && !(mount.point == path && beneath(mount));
    let longest = mounts.iter().filter(reaches).map(|mount| mount.point.components().count()).max()?;
    mounts.iter().rev().find(|mount| reaches(mount) && mount.point.components().count() == longest)
}

fn parse(line: &[u8]) -> Option<MountLine> {
    let mut fields = line.split(|byte| *byte == b' ');
    let text = |field: &[u8]| String::from_utf8_lossy(field).into_owned();
    let id = text(fields.next()?).parse().ok()?;
    let device = text(fields.nth(1)?);
    let point = PathBuf::from(OsString::from_vec(unescape(fields.nth(1)?)));
    // Options, then optional fields up to a dash.
    let fstype = text(fields.skip_while(|field| *field != b"-").nth(1)?);
    Some(MountLine { id, device, point, fstype })
}

/// Blank, tab, newline and backslash are three octal digits after a backslash.
fn unescape(text: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((&byte, after)) = rest.split_first() {
        if byte == b'\\'
            && let Some((digits, after)) = after.split_at_checked(3)
            && let Some(value) = std::str::from_utf8(digits).ok().and_then(|digits| u8::from_str_radix(digits, 8).ok())
        {
            out.push(value);
            rest = after;
        } else {
            out.push(byte);
            rest = after;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    const LINES: &str = "22 1 254:1 / / rw,relatime shared:1 - ext4 /dev/vda1 rw\n\
        30 22 0:25 / /var/cache rw - tmpfs tmpfs rw\n\
        41 30 0:50 / /var/cache/apt/archives rw shared:7 master:1 - fuse.poolfs poolfs rw,user_id=0\n\
        42 22 0:51 / /mnt/a\\040b\\134c rw - ext4 /dev/x rw\n";

    fn lines() -> Vec<MountLine> {
        LINES.as_bytes().split(|byte| *byte == b'\n').filter_map(parse).collect()
    }

    /// A wrong field would clone the wrong mount, or detach a stranger's.
    #[test]
    fn fields_are_found() {
        let mounts = lines();
        assert_eq!(mounts.len(), 4);
        assert_eq!(mounts[2].id, 41);
        assert_eq!(mounts[2].device, "0:50");
        assert_eq!(mounts[2].fstype, "fuse.poolfs");
        assert_eq!(mounts[3].point, Path::new("/mnt/a b\\c"));
        assert_eq!(parse(b"22 1 254:1"), None);
    }

    #[test]
    fn the_containing_mount_is_the_deepest() {
        let mounts = lines();
        let archives = Path::new("/var/cache/apt/archives");
        let id = |path: &str| containing(&mounts, Path::new(path), |_| false).unwrap().id;
        assert_eq!(id("/var/lib/apt/lists"), 22);
        assert_eq!(id("/var/cache/apt"), 30);
        assert_eq!(id("/var/cache/apt/archives"), 41);
        assert_eq!(containing(&mounts, archives, |mount| mount.fstype == "fuse.poolfs").unwrap().id, 30);
        assert_eq!(id("/var/cachet"), 22, "a name is compared whole");
        assert_eq!(top(&mounts, archives).unwrap().id, 41);
        assert_eq!(top(&mounts, Path::new("/var")), None);
    }
}
