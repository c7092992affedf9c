//! Holds the catalog against apt and dpkg themselves, on the lists of the machine that runs the tests (read only).
//!
//! Where there is no apt, or it has no lists, each test says that it was skipped.
#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "tests")]

use poolfs_core::Db;
use poolfs_core::catalog::{AptConfig, Catalog, Vanished};
use std::cmp::Ordering;
use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::AsFd as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;

/// Runs a program of apt without letting it write its caches; what it prints, also if it fails in part.
fn apt(program: &str, arguments: &[&str]) -> Option<String> {
    let caches = ["-o", "Dir::Cache::pkgcache=", "-o", "Dir::Cache::srcpkgcache="];
    let output = Command::new(program).args(caches).args(arguments).stdin(Stdio::null()).stderr(Stdio::null()).output().ok()?;
    Some(String::from_utf8(output.stdout).unwrap())
}

/// The machine's lists, if apt has any.
fn lists() -> Option<File> {
    let config = AptConfig::load(&[], None).ok()?;
    let directory = config.lists_directory()?;
    let any = std::fs::read_dir(&directory).ok()?.flatten().any(|entry| entry.file_name().to_string_lossy().contains("_Packages"));
    any.then(|| File::open(directory).unwrap())
}

fn skip(test: &str) {
    eprintln!("SKIPPED {test}: no apt with lists on this machine");
}

/// Every package that apt would download must be in the catalog under apt's name, with its digest, size and URL.
#[test]
fn archive_names_digests_and_urls_are_those_that_apt_prints() {
    let Some(lists) = lists() else { return skip("archive names") };
    let scratch = tempfile::tempdir().unwrap();
    let config = AptConfig::load(&[], None).unwrap();
    let catalog = Catalog::open(Arc::new(Db::open(&scratch.path().join("poolfs.db")).unwrap()), config).unwrap();
    let done = catalog.refresh(lists.as_fd(), Vanished::Drop).unwrap();
    assert_eq!(done.problems, Vec::<String>::new());

    let all = apt("apt-cache", &["pkgnames"]).unwrap();
    let all: BTreeSet<&str> = all.lines().collect();
    // A third of a second for each thousand: enough to meet epochs, tildes, pluses and every odd name.
    let some = all.iter().step_by(all.len().div_ceil(2000));
    let odd = ["g++", "libstdc++6", "vim", "hello", "libc6", "0ad"];
    let mut arguments = vec!["download", "--print-uris"];
    arguments.extend(some.copied().chain(odd));
    let printed = apt("apt-get", &arguments).unwrap();
    let mut checked = 0;
    let mut quoted = 0;
    for line in printed.lines().filter(|line| line.starts_with('\'')) {
        let words: Vec<&str> = line.split(' ').collect();
        let [url, name, size, sum] = words.as_slice() else { panic!("apt printed {line}") };
        let url = url.trim_matches('\'');
        if !url.starts_with("http") {
            continue;
        }
        let entry = catalog.archive(name.as_bytes()).unwrap().unwrap_or_else(|| panic!("apt calls it {name}"));
        assert_eq!(entry.name, *name);
        assert_eq!(entry.size.to_string(), *size, "{name}");
        assert_eq!(format!("SHA256:{}", entry.digest), *sum, "{name}");
        assert!(entry.urls.iter().any(|known| known.url == url), "{url} is not in {:?}", entry.urls);
        assert_eq!(catalog.by_digest(&entry.digest).unwrap().unwrap().digest, entry.digest);
        checked += 1;
        quoted += u32::from(name.contains('%'));
    }
    assert!(checked > 100 && quoted > 10, "only {checked} names, {quoted} of them quoted");
}

/// The names of the lists that the machine has.
#[test]
fn list_names_are_those_in_the_lists_directory() {
    if lists().is_none() {
        return skip("list names");
    }
    let printed = apt("apt-get", &["indextargets", "--format", "$(CREATED_BY) $(FILENAME)"]).unwrap();
    let config = AptConfig::load(&[], None).unwrap();
    let known: BTreeSet<String> = config.targets().into_iter().map(|target| target.name).collect();
    let mut checked = 0;
    for line in printed.lines() {
        let Some((kind @ ("Packages" | "Sources"), path)) = line.split_once(' ') else { continue };
        let name = Path::new(path).file_name().unwrap().to_str().unwrap();
        let Some((stem, _)) = name.rsplit_once(kind) else { panic!("{name} is no {kind}") };
        if stem.starts_with('_') {
            continue; // file: and cdrom: sources are left out.
        }
        assert!(known.contains(&format!("{stem}{kind}")), "{name} is not in {known:?}");
        checked += 1;
    }
    assert!(checked > 0, "{printed}");
}

/// Sources of every odd shape: which lists there are, what they are called and where they come from.
#[test]
fn targets_are_those_that_apt_computes() {
    const ONE_LINE: &str = "deb [arch=amd64,i386] http://h.example:8080/debian_x bookworm main non-free/sub # comment\n\
        deb-src http://user:p%40w@h.example/~u/x s c\ndeb https://flat.example/repo ./\ndeb https://flat.example/ /\n\
        deb https://flat.example/a exact/path/\ndeb http://[::1]:80/v6 s c\ndeb [arch-=amd64 arch+=armhf] http://h.example/$(ARCH) s=1!2 c@2\n\
        deb file:/srv/x s c\ndeb http://h.example//double/ s/updates c\n";
    const DEB822: &str = "# first\nTypes: deb deb-src\nURIs: http://a.example/debian\n https://b.example/\nSuites: s s-updates\nComponents: main contrib\n\
        Architectures: amd64 arm64\n\nEnabled: no\nTypes: deb\nURIs: http://off.example\nSuites: s\nComponents: c\n\n\
        Types: deb\nURIs: http://c.example/x\nSuites: flat/\nSigned-By: /k.gpg\n\nTypes: deb\nURIs: http://d.example\nSuites: s\nComponents: c\n\
        Architectures-Add: riscv64\nArchitectures-Remove: amd64\n";
    let scratch = tempfile::tempdir().unwrap();
    let parts = scratch.path().join("parts");
    std::fs::create_dir_all(scratch.path().join("lists/partial")).unwrap();
    std::fs::create_dir(&parts).unwrap();
    std::fs::write(parts.join("a.list"), ONE_LINE).unwrap();
    std::fs::write(parts.join("b.sources"), DEB822).unwrap();
    std::fs::write(parts.join("c.list.disabled"), "deb http://disabled.example s c\n").unwrap();
    let options = scratch.path().join("apt.conf");
    let text = format!(
        "Dir::Etc::sourcelist \"/dev/null\";\nDir::Etc::sourceparts \"{}\";\nDir::State::lists \"{}/\";\n",
        parts.display(),
        scratch.path().join("lists").display()
    );
    std::fs::write(&options, text).unwrap();

    let format = "$(CREATED_BY) $(FILENAME) $(URI) $(REPO_URI)";
    let mut command = Command::new("apt-get");
    command.args(["-o", "Dir::Cache::pkgcache=", "-o", "Dir::Cache::srcpkgcache="]);
    command.args(["indextargets", "--no-release-info", "--format", format]).env("APT_CONFIG", &options);
    let Ok(output) = command.stderr(Stdio::null()).output() else { return skip("targets") };
    let printed = String::from_utf8(output.stdout).unwrap();
    let theirs: BTreeSet<String> = printed
        .lines()
        .filter_map(|line| {
            let (kind, rest) = line.split_once(' ')?;
            let (path, rest) = rest.split_once(' ')?;
            let name = Path::new(path).file_name()?.to_str()?;
            (matches!(kind, "Packages" | "Sources") && !rest.starts_with("file:")).then(|| format!("{name} {rest}"))
        })
        .collect();
    assert!(theirs.len() > 30, "{printed}");

    let config = AptConfig::load(&[], Some(&options)).unwrap();
    assert_eq!(config.sources().problems, Vec::<String>::new());
    assert_eq!(config.sources().left_out, ["file:/srv/x/: its files are on this machine already"]);
    let ours: BTreeSet<String> = config
        .targets()
        .into_iter()
        .map(|target| {
            let repository = target.repository.with_credentials();
            let directory = match target.suite.as_str() {
                "/" => repository.clone(),
                suite if suite.ends_with('/') => format!("{repository}{suite}"),
                suite => format!("{repository}dists/{suite}/"),
            };
            format!("{} {directory}{} {repository}", target.name, target.meta_key)
        })
        .collect();
    let missing: Vec<_> = theirs.difference(&ours).collect();
    let extra: Vec<_> = ours.difference(&theirs).collect();
    assert!(missing.is_empty() && extra.is_empty(), "only apt has {missing:#?}, only poolfs has {extra:#?}");
}

/// Pairs of versions that are compared.
const PAIRS: usize = 10_000;

/// The library for versions must order as dpkg does: a newer version taken for an older one is withheld or shared wrongly.
#[test]
fn versions_are_ordered_as_by_dpkg() {
    let Some(lists) = lists() else { return skip("versions") };
    drop(lists);
    let printed = apt("apt-cache", &["dumpavail"]).unwrap();
    let all: BTreeSet<&str> = printed.lines().filter_map(|line| line.strip_prefix("Version: ")).collect();
    for version in &all {
        assert!(version.parse::<debversion::Version>().is_ok(), "{version} is a version");
    }
    let all: Vec<&str> = all.into_iter().collect();
    // Neighbours differ in their last characters, which is where the rules are subtle; strangers in the first.
    let neighbours = (0..all.len() - 1).step_by(all.len().div_ceil(5_000).max(1)).map(|index| (all[index], all[index + 1]));
    let strangers = (0..PAIRS).map(|nth| (all[nth * 104_729 % all.len()], all[(nth * 7919 + 13) % all.len()]));
    let written =
        [("1.0~rc1", "1.0"), ("1.0", "1.0-0"), ("0:1", "1"), ("1:0", "9"), ("1a", "1+"), ("1.01", "1.1"), ("1-1", "1-1+b1"), ("1~~", "1~")];
    let pairs: Vec<_> = written.into_iter().chain(neighbours).chain(strangers).take(PAIRS).collect();
    assert_eq!(pairs.len(), PAIRS);
    for (a, b) in pairs {
        let ours = poolfs_core::discretion::compare(a, b).unwrap();
        let relation = match ours {
            Ordering::Less => "lt",
            Ordering::Equal => "eq",
            Ordering::Greater => "gt",
        };
        let agreed = Command::new("dpkg").args(["--compare-versions", a, relation, b]).status().unwrap().success();
        assert!(agreed, "dpkg does not say that {a} {relation} {b}");
    }
}
