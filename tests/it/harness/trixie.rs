//! A Debian 13 root, for apt 3.0: made once by mmdebstrap, kept below `target/`, used through an overlay.

use super::process::run;
use rustix::fs::{FlockOperation, flock};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

/// What the root holds beside apt. Another list wants another [`EDITION`].
const PACKAGES: &str = "aptitude,unattended-upgrades,python3-apt,ca-certificates";

/// Part of the name, so that a root made for older tests is not used.
const EDITION: u32 = 1;

/// The directory of the unpacked root. It is never written to: tests lay an overlay over it.
pub(crate) fn root() -> PathBuf {
    let home = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/e2e");
    fs::create_dir_all(&home).unwrap();
    let lock = File::create(home.join("trixie.lock")).unwrap();
    flock(&lock, FlockOperation::LockExclusive).unwrap();
    let (unpacked, tar) = (home.join(format!("trixie-{EDITION}")), home.join(format!("trixie-{EDITION}.tar")));
    if unpacked.exists() {
        return unpacked;
    }
    if !tar.exists() {
        let part = tar.with_extension("part.tar");
        let mut make = Command::new("mmdebstrap");
        make.env("TMPDIR", "/var/tmp").args(["--quiet", "--variant=apt", "--include", PACKAGES]);
        make.args(["--aptopt=Acquire::Languages \"none\"", "--dpkgopt=path-exclude=/usr/share/doc/*"]);
        make.args(["--dpkgopt=path-exclude=/usr/share/man/*", "--dpkgopt=path-exclude=/usr/share/locale/*"]);
        make.arg("trixie").arg(&part).arg(debian_mirror());
        run(&mut make).ok();
        fs::rename(&part, &tar).unwrap();
    }
    let part = unpacked.with_extension("part");
    if part.exists() {
        fs::remove_dir_all(&part).unwrap();
    }
    fs::create_dir(&part).unwrap();
    run(Command::new("tar").args(["--numeric-owner", "--exclude=./dev/*", "-xpf"]).arg(&tar).arg("-C").arg(&part)).ok();
    fs::rename(&part, &unpacked).unwrap();
    unpacked
}

/// The URL of the Debian archive that this machine's own apt uses.
pub(crate) fn debian_mirror() -> String {
    let text = debian_sources().1;
    let urls = text.split_whitespace().filter(|word| word.starts_with("http"));
    let fits = |url: &&str| url.trim_end_matches('/').ends_with("/debian");
    urls.into_iter().find(fits).unwrap_or("http://deb.debian.org/debian").to_owned()
}

/// The name and text of the file in which this machine's own apt finds the Debian archive.
pub(crate) fn debian_sources() -> (&'static str, String) {
    let places = ["/etc/apt/sources.list.d/debian.sources", "/etc/apt/sources.list"];
    let found = places.into_iter().find_map(|place| Some((place, fs::read_to_string(place).ok()?)));
    let (place, text) = found.expect("tests need a Debian machine: neither debian.sources nor sources.list is in /etc/apt");
    (Path::new(place).file_name().and_then(|name| name.to_str()).unwrap_or("debian.sources"), text)
}
