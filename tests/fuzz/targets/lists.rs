//! What apt keeps in its lists directory, and advisories: signed by a repository at best, cut or damaged at worst.

use crate::driver::{Target, behaviour, kind_of, some};
use poolfs_core::Digest;
use poolfs_core::advisories::{Advisories, Asked};
use poolfs_core::catalog::forms::Form;
use poolfs_core::catalog::packages::{ListError, Listed, Tally, read_packages, read_sources, source_of};
use poolfs_core::catalog::pdiff::PdiffIndex;
use poolfs_core::catalog::release::{Release, seconds};
use std::collections::BTreeSet;
use std::convert::Infallible;
use std::io::{Read, Write as _};
use std::os::fd::OwnedFd;

/// Every target of this file.
pub(super) const ALL: &[Target] = &[
    Target {
        name: "release",
        about: "Release and InRelease",
        start: |_| Box::new(|input: &[u8]| release(input)),
        seeds: Vec::new,
        tokens: RELEASE,
        input_bytes_max: 16 * 1024,
        memory: (256 * 1024, 256),
    },
    Target {
        name: "packages",
        about: "Packages",
        start: |_| Box::new(|input: &[u8]| list(input, &|reader, take| read_packages(reader, take), true)),
        seeds: Vec::new,
        tokens: STANZA,
        input_bytes_max: 16 * 1024,
        memory: (1 << 20, 64),
    },
    Target {
        name: "sources",
        about: "Sources",
        start: |_| Box::new(|input: &[u8]| list(input, &|reader, take| read_sources(reader, take), false)),
        seeds: Vec::new,
        tokens: STANZA,
        input_bytes_max: 16 * 1024,
        memory: (1 << 20, 64),
    },
    Target {
        name: "forms",
        about: "the compressed forms of an index: the first byte says which, the others are the file",
        start: |_| Box::new(|input: &[u8]| form(input)),
        seeds: packed,
        tokens: &["\u{1f}", "BZh9", "(", "]"],
        input_bytes_max: 4 * 1024,
        // bzip2 takes its tables from Rust's allocator, the others are C.
        memory: (24 << 20, 64),
    },
    Target {
        name: "pdiff",
        about: "the Index of a list's patches",
        start: |_| Box::new(|input: &[u8]| pdiff(input)),
        seeds: Vec::new,
        tokens: PDIFF,
        input_bytes_max: 16 * 1024,
        memory: (256 * 1024, 512),
    },
    Target {
        name: "advisories",
        about: "advisories: the security tracker's JSON and debsecan's format",
        start: |_| Box::new(|input: &[u8]| advisories(input)),
        seeds: Vec::new,
        tokens: ADVISORIES,
        input_bytes_max: 8 * 1024,
        memory: (512 * 1024, 512),
    },
];

const RELEASE: &[&str] = &[
    "\n",
    "\n\n",
    " ",
    ": ",
    "Date: ",
    "Valid-Until: ",
    "Sat, 11 Jul 2026 10:16:37 UTC",
    "Jan",
    "Feb",
    "29",
    "UTC",
    "+0000",
    "SHA256:\n",
    "MD5Sum:\n",
    "Acquire-By-Hash: yes\n",
    "Components: ",
    "Architectures: ",
    "No-Support-for-Architecture-all: Packages\n",
    "-----BEGIN PGP SIGNED MESSAGE-----\n",
    "Hash: SHA256\n\n",
    "-----BEGIN PGP SIGNATURE-----\n",
    "-----END PGP SIGNATURE-----\n",
    "- ",
    "../",
    "/",
    " e17028bffa0a5ef952309b9f754f09067775c2631770c6b0df260dcaab4f1938 840868 main/binary-amd64/Packages\n",
    "\r\n",
    "#",
];

const STANZA: &[&str] = &[
    "\n",
    "\n\n",
    "\n ",
    " ",
    ": ",
    "\r\n",
    "Package: ",
    "Version: ",
    "Architecture: ",
    "Filename: ",
    "Size: ",
    "SHA256: ",
    "Source: ",
    "Directory: ",
    "Checksums-Sha256:\n",
    "package:",
    "..",
    "/",
    "%2f",
    "_",
    "(",
    ")",
    "~",
    "+",
    "\u{0}",
    "all",
    "amd64",
    "pool/main/a/a/a_1_all.deb",
    "e17028bffa0a5ef952309b9f754f09067775c2631770c6b0df260dcaab4f1938",
];

const PDIFF: &[&str] = &[
    "\n",
    "\n\n",
    "\n ",
    " ",
    ": ",
    "SHA256-Current: ",
    "SHA256-History:\n",
    "SHA256-Patches:\n",
    "SHA256-Download:\n",
    "SHA1-Current: ",
    "X-Patch-Precedence: merged\n",
    ".gz",
    "T-2026-10-30-0800.52-F-2026-10-16-0204.10",
    "../",
    ".",
    "e17028bffa0a5ef952309b9f754f09067775c2631770c6b0df260dcaab4f1938",
];

const ADVISORIES: &[&str] = &[
    "{",
    "}",
    "[",
    "]",
    "\"",
    ":",
    ",",
    "null",
    "true",
    "1e999",
    "\\u0000",
    "\\ud800",
    "\"releases\":{",
    "\"bookworm\":",
    "\"status\":\"open\"",
    "\"status\":\"resolved\"",
    "\"fixed_version\":",
    "\"urgency\":\"unimportant\"",
    "VERSION 1\n",
    "\n\n",
    "CVE-2026-0001,,x\n",
    "S  F,",
    "B   ,",
    "openssl",
    "3.0.11-1~deb12u2",
];

fn release(input: &[u8]) -> u64 {
    if let Some(date) = std::str::from_utf8(input).ok().and_then(|text| text.lines().next())
        && let Some(seconds) = seconds(date)
    {
        // From 1970 to the year 9999, and a month that is said to have 31 days.
        assert!((0..=253_402_300_800 + 31 * 86_400).contains(&seconds), "{date} is at {seconds}");
    }
    match Release::parse(input) {
        Ok(release) => {
            assert!(release.indexes.is_sorted_by(|a, b| a.path <= b.path), "what is looked up by halves must be in order");
            for index in &release.indexes {
                assert!(is_below(&index.path), "leaves its directory: {:?}", index.path);
                assert!(i64::try_from(index.size).is_ok(), "does not fit the database");
                assert_eq!(release.index(&index.path).map(|found| &found.path), Some(&index.path), "named and not found");
            }
            let counts =
                [release.indexes.len(), usize::try_from(release.refused).unwrap(), release.components.len(), release.architectures.len()];
            behaviour((counts.map(some), release.valid_until.is_some(), release.by_hash, release.no_separate_all, release.date == 0))
        }
        Err(err) => behaviour(kind_of(err)),
    }
}

/// An independent look at whether a relative path can name anything outside.
fn is_below(path: &str) -> bool {
    let mut depth = 0_i64;
    for part in path.split('/') {
        match part {
            ".." => depth -= 1,
            "" | "." => {}
            _ => depth += 1,
        }
        if depth < 0 {
            return false;
        }
    }
    !path.starts_with('/') && !path.is_empty()
}

/// Gives its bytes in pieces of odd lengths.
struct Slow<'a>(&'a [u8], usize);

impl Read for Slow<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        self.1 = (self.1 * 5 + 3) % 17;
        let length = buffer.len().min(self.0.len()).min(1 + self.1);
        buffer[..length].copy_from_slice(&self.0[..length]);
        self.0 = &self.0[length..];
        Ok(length)
    }
}

type Taking<'a> = &'a dyn Fn(&mut dyn Read, &mut dyn FnMut(Listed<'_>) -> Result<(), Infallible>) -> Result<Tally, ListError<Infallible>>;

fn list(input: &[u8], read: Taking<'_>, packages: bool) -> u64 {
    let (at_once, hash, taken) = one_list(&mut { input }, read, packages);
    let (in_parts, other, _) = one_list(&mut Slow(input, 0), read, packages);
    assert_eq!((&at_once, hash), (&in_parts, other), "what is read depends on how it arrives");
    match at_once {
        Ok(tally) => {
            assert_eq!(tally.taken == 0, taken == 0);
            let kinds: BTreeSet<String> = tally.examples.iter().filter_map(|e| e.rsplit_once(": ").map(|(_, why)| kind_of(why))).collect();
            behaviour((some(taken.min(3)), kinds))
        }
        Err(err) => behaviour(kind_of(err.rsplit_once(": ").map_or(err.as_str(), |(_, why)| why))),
    }
}

fn one_list(mut reader: &mut dyn Read, read: Taking<'_>, packages: bool) -> (Result<Tally, String>, u64, usize) {
    let (mut all, mut taken) = (0_u64, 0);
    let tally = read(&mut reader, &mut |listed| {
        taken += 1;
        let Listed { name, digest, size, path, package, version, source } = listed;
        if packages {
            assert!(!name.is_empty() && name.len() <= 255 && !name.contains(['/', '\0']), "no name of a file: {name:?}");
            assert!(name != "." && name != "..", "names a directory");
        } else {
            assert!(name.is_empty(), "files of sources have no name in archives/");
        }
        assert!(is_below(path), "leaves the repository: {path:?}");
        assert!(size <= 1 << 40, "{size} bytes");
        let (source_name, source_version) = source_of(package, version, source);
        all = behaviour((all, name, digest, size, path, package, version, source_name, source_version));
        Ok(())
    });
    (tally.map_err(|err| err.to_string()), all, taken)
}

fn form(input: &[u8]) -> u64 {
    let Some((which, packed)) = input.split_first() else { return 0 };
    let form = Form::ALL[usize::from(*which) % Form::ALL.len()];
    let memory: OwnedFd = rustix::fs::memfd_create("form", rustix::fs::MemfdFlags::CLOEXEC).expect("memory");
    let mut file = std::fs::File::from(memory);
    file.write_all(packed).unwrap();
    std::io::Seek::rewind(&mut file).unwrap();
    // Megabytes of one byte are real: what is asked is that nothing else happens on the way.
    let mut buffer = vec![0; 64 * 1024];
    let mut total = 0_u64;
    let end = match form.reader(file) {
        Ok(mut reader) => loop {
            match reader.read(&mut buffer) {
                Ok(0) => break "end".to_owned(),
                Ok(read) => total += read as u64,
                Err(err) => break kind_of(err),
            }
            if total > 4 << 20 {
                break "long".to_owned();
            }
        },
        Err(err) => kind_of(err),
    };
    assert!(form != Form::Plain || total == packed.len() as u64);
    behaviour((which % 7, end, some(usize::try_from(total).unwrap())))
}

/// A small text in each form.
fn packed() -> Vec<Vec<u8>> {
    let text = b"Package: a\nVersion: 1\nSize: 5\n\nPackage: b\nVersion: 2\nSize: 6\n".repeat(20);
    let run = |program: &str, arguments: &[&str]| -> Option<Vec<u8>> {
        let mut child = std::process::Command::new(program)
            .args(arguments)
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .ok()?;
        child.stdin.take()?.write_all(&text).ok()?;
        let out = child.wait_with_output().ok()?;
        out.status.success().then_some(out.stdout)
    };
    let number = |form: Form| u8::try_from(Form::ALL.iter().position(|f| *f == form).unwrap()).unwrap();
    [
        (Form::Plain, Some(text.clone())),
        (Form::Gzip, run("gzip", &["-c"])),
        (Form::Xz, run("xz", &["-c"])),
        (Form::Lzma, run("xz", &["-c", "--format=lzma"])),
        (Form::Bzip2, run("bzip2", &["-c"])),
    ]
    .into_iter()
    .filter_map(|(form, bytes)| Some([vec![number(form)], bytes?].concat()))
    .collect()
}

fn pdiff(input: &[u8]) -> u64 {
    match PdiffIndex::parse(input) {
        Ok(index) => {
            let ids: BTreeSet<&str> = index.patches.iter().map(|patch| patch.id.as_str()).collect();
            assert_eq!(ids.len(), index.patches.len(), "two patches with one name");
            for patch in &index.patches {
                assert!(!patch.id.contains(['/', '\0', ' ']) && patch.id.len() < 255 && !patch.id.starts_with('.'), "{:?}", patch.id);
                if let Some(from) = &patch.from {
                    let path = index.path_from(&from.digest);
                    assert!(!path.is_empty() && path.len() <= index.patches.len(), "a list that is known has a way on");
                }
            }
            assert!(index.path_from(&Digest([0xee; 32])).len() <= index.patches.len());
            let with = |of: fn(&poolfs_core::catalog::pdiff::Patch) -> bool| some(index.patches.iter().filter(|p| of(p)).count());
            behaviour((some(index.patches.len()), index.merged, with(|p| p.from.is_some()), with(|p| p.download.is_some())))
        }
        Err(err) => behaviour(kind_of(err.to_string().split(':').next().unwrap_or_default())),
    }
}

fn advisories(input: &[u8]) -> u64 {
    match Advisories::read(input) {
        Ok(all) => {
            assert!(all.len() <= input.len(), "more issues than bytes");
            let releases = BTreeSet::from(["bookworm".to_owned()]);
            let mut named = 0;
            for version in ["", "0", "3.0.11-1~deb12u1", "3.0.11-1~deb12u2", "1:1-1", "~", "a b"] {
                for unfixed in [false, true] {
                    let asked = Asked { releases: &releases, source: ("openssl", version), binary: ("libssl3", version), unfixed };
                    named += usize::from(all.names(&asked).is_some());
                }
            }
            assert!(!all.is_empty() || named == 0, "named by nobody");
            behaviour((some(all.len()), named))
        }
        Err(err) => behaviour(kind_of(err)),
    }
}
