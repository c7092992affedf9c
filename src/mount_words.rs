//! Mount options: what may stand after `-o`, in fstab, and in `options` of a `[[mount]]`.

use anyhow::{Result, bail};
use poolfs_fs::mount::MountOptions;
use std::path::PathBuf;

/// Options that mount(8), systemd or the kernel understand, and that change nothing here. The last ones are what a
/// remount reads from the mount table: true of every poolfs.
const GENERIC: &[&str] = &[
    "defaults",
    "auto",
    "noauto",
    "nofail",
    "_netdev",
    "user",
    "nouser",
    "users",
    "nousers",
    "owner",
    "noowner",
    "group",
    "nogroup",
    "async",
    "diratime",
    "nodiratime",
    "relatime",
    "norelatime",
    "strictatime",
    "nostrictatime",
    "lazytime",
    "nolazytime",
    "loud",
    "silent",
    "nomand",
    "noiversion",
    "allow_other",
    "default_permissions",
    "user_id=0",
    "group_id=0",
];

/// Options of poolfs, for messages.
const KNOWN: &str = "ro, rw, browse, suid, nosuid, dev, nodev, exec, noexec, atime, noatime, config=FILE";

/// What was asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Words {
    /// What the mount is made with.
    pub options: MountOptions,
    /// `config=FILE`: the daemon's configuration.
    pub config: Option<PathBuf>,
    /// `remount`: what is mounted gets other options.
    pub remount: bool,
    /// Words that nobody knows, in the order they came.
    pub unknown: Vec<String>,
}

impl Words {
    /// Reads words as they come; of two that contradict each other the later one counts.
    pub fn read<'word>(words: impl IntoIterator<Item = &'word str>) -> Result<Self> {
        let mut found = Self::default();
        let options = &mut found.options;
        for word in words {
            match word {
                "" => {}
                "ro" => options.read_only = true,
                "rw" => options.read_only = false,
                "browse" => options.browse = true,
                "suid" => options.nosuid = false,
                "nosuid" => options.nosuid = true,
                "dev" => options.nodev = false,
                "nodev" => options.nodev = true,
                "exec" => options.noexec = false,
                "noexec" => options.noexec = true,
                "atime" => options.noatime = false,
                "noatime" => options.noatime = true,
                "remount" => found.remount = true,
                word if GENERIC.contains(&word) || ["x-", "X-", "comment="].iter().any(|start| word.starts_with(start)) => {}
                word => match word.strip_prefix("config=") {
                    Some(file) if file.starts_with('/') => found.config = Some(PathBuf::from(file)),
                    Some(file) => bail!("mount option config={file} is not absolute: write it from /"),
                    None => found.unknown.push(word.to_owned()),
                },
            }
        }
        Ok(found)
    }

    /// An error that names the first word that nobody knows, if there is one.
    pub fn known(self) -> Result<Self> {
        match self.unknown.first() {
            Some(word) => bail!("unknown mount option `{word}`: poolfs knows {KNOWN}, and those that mount(8) has for every file system"),
            None => Ok(self),
        }
    }
}

/// The words that make these options.
pub fn words_of(options: &MountOptions) -> Vec<String> {
    let all = [
        (options.read_only, "ro"),
        (options.browse, "browse"),
        (options.nosuid, "nosuid"),
        (options.nodev, "nodev"),
        (options.noexec, "noexec"),
        (options.noatime, "noatime"),
    ];
    all.into_iter().filter(|(is, _)| *is).map(|(_, word)| word.to_owned()).collect()
}

/// Refuses what does not fit together.
pub fn check(options: &MountOptions) -> Result<()> {
    if options.browse && !options.read_only {
        bail!("mount option `browse` needs `ro`: a listing of every package that exists is not what apt expects to clean");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    fn read(words: &str) -> Words {
        Words::read(words.split(',')).unwrap()
    }

    /// A word that is dropped mounts otherwise than fstab says; one that is refused keeps a machine from booting.
    #[test]
    fn words_of_fstab() {
        let check = |words: &str, want: &str| assert_eq!(words_of(&read(words).known().unwrap().options).join(","), want, "{words}");
        check("", "");
        check("defaults,nofail,noauto,_netdev,x-systemd.before=a.service,X-mount.mkdir,comment=any", "");
        check("ro,browse,nosuid,nodev,noexec,noatime", "ro,browse,nosuid,nodev,noexec,noatime");
        check("ro,nosuid,noexec,rw,suid,exec", "");
        check("rw,relatime,user_id=0,group_id=0,default_permissions,allow_other", "");
        for bad in ["sloth", "user_id=1", "ro=1", "config", "x", "RO"] {
            let said = read(&format!("ro,{bad}")).known().unwrap_err().to_string();
            assert!(said.starts_with(&format!("unknown mount option `{bad}`: poolfs knows ro, ")), "{said}");
        }
        assert_eq!(read("config=/a/b,remount").config, Some("/a/b".into()));
        assert!(read("remount").remount);
        assert_eq!(Words::read(["config=b"]).unwrap_err().to_string(), "mount option config=b is not absolute: write it from /");
    }

    /// What one process tells the other in words must be what it meant.
    #[test]
    fn words_and_options_are_the_same() {
        for words in ["", "ro", "ro,browse", "nosuid,nodev,noexec,noatime"] {
            assert_eq!(words_of(&read(words).options).join(","), words);
        }
        assert!(super::check(&read("browse").options).is_err());
        assert!(super::check(&read("browse,ro").options).is_ok());
    }
}
