//! Rules of the repository that no lint knows.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// A file with more lines than this holds a second concept that wants its own file.
const LINES_MAX: usize = 900;

/// The modules that may hold `unsafe`, each with its reasons beside the code.
const UNSAFE_MODULES: &[&str] = &[
    "fs/src/sys.rs",
    "net/src/sys.rs",
    "src/core/src/sys.rs",
    "src/sys.rs",
    "tests/bench/mounts.rs",
    "tests/fuzz/coverage.rs",
    "tests/fuzz/memory.rs",
    "tests/it/harness/sys.rs",
];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn tracked() -> Vec<PathBuf> {
    let out = std::process::Command::new("git").args(["ls-files", "-z"]).current_dir(root()).output().expect("git runs");
    assert!(out.status.success(), "git ls-files: {}", String::from_utf8_lossy(&out.stderr));
    let files: Vec<_> = out
        .stdout
        .split(|&byte| byte == 0)
        .filter(|name| !name.is_empty())
        .map(|name| PathBuf::from(String::from_utf8_lossy(name).as_ref()))
        .collect();
    assert!(files.len() > 20, "a checkout without files proves nothing");
    files
}

fn sources() -> impl Iterator<Item = (String, String)> {
    tracked().into_iter().filter(|path| path.extension().is_some_and(|ext| ext == "rs") && root().join(path).exists()).map(|path| {
        let text = std::fs::read_to_string(root().join(&path)).expect("a source is text");
        (path.to_string_lossy().into_owned(), text)
    })
}

/// The sides must stay separable into processes: neither names the other, the core names neither the kernel nor sockets.
#[test]
fn the_direction_of_dependency_holds() {
    let forbidden: &[(&str, &[&str])] = &[
        ("fs/", &["poolfs_net", "poolfs-net", "reqwest"]),
        ("net/", &["poolfs_fs", "poolfs-fs", "fuser"]),
        ("src/core/", &["tokio", "fuser", "poolfs_fs", "poolfs_net", "std::net::Tcp", "std::net::Udp"]),
    ];
    for (file, text) in sources().chain(
        ["fs/Cargo.toml", "net/Cargo.toml", "src/core/Cargo.toml"]
            .map(|file| (file.to_owned(), std::fs::read_to_string(root().join(file)).expect("a manifest"))),
    ) {
        for (folder, words) in forbidden.iter().filter(|(folder, _)| file.starts_with(folder)) {
            // Docs may say what must not be known; code may not know it.
            for line in text.lines().filter(|line| !line.trim_start().starts_with("//")) {
                for word in *words {
                    assert!(!line.contains(word), "{file} is below {folder} and names {word}: {line}");
                }
            }
        }
        if file.starts_with("fs/src/") && file != "fs/src/adapter.rs" && !file.starts_with("fs/src/adapter/") {
            assert!(!text.contains("fuser::"), "{file}: only the adapter names fuser");
        }
    }
}

/// `unsafe` outside of the modules that were read for it would be read by nobody.
#[test]
fn unsafe_stays_where_it_is_reviewed() {
    let mut found = BTreeSet::new();
    for (file, text) in sources().filter(|(file, _)| file != "tests/it/tidy.rs") {
        if text.lines().any(|line| {
            !line.trim_start().starts_with("//")
                && (line.contains("unsafe {")
                    || line.contains("unsafe fn")
                    || line.contains("unsafe impl")
                    || line.contains("unsafe extern"))
        }) {
            found.insert(file);
        }
    }
    let unknown: Vec<_> = found.iter().filter(|file| !UNSAFE_MODULES.contains(&file.as_str())).collect();
    assert!(unknown.is_empty(), "unsafe outside of the named modules: {unknown:?}");
}

/// One concept a file; the top level holds what the layout says; scripts can be run.
#[test]
fn files_are_where_and_what_they_should_be() {
    let mut folders = BTreeSet::new();
    for path in tracked() {
        if path.components().count() > 1 {
            folders.insert(path.components().next().expect("a first part").as_os_str().to_string_lossy().into_owned());
        }
    }
    folders.retain(|folder| !folder.starts_with('.'));
    assert_eq!(folders.into_iter().collect::<Vec<_>>(), ["fs", "net", "scripts", "src", "tests"]);
    for (file, text) in sources() {
        let lines = text.lines().count();
        assert!(lines <= LINES_MAX, "{file} has {lines} lines, at most {LINES_MAX}");
        assert!(!file.ends_with("/mod.rs"), "{file}: a module is concept.rs beside concept/");
    }
    for script in
        tracked().into_iter().filter(|path| path.starts_with("scripts") && path.extension().is_none() && *path != Path::new("scripts/lib"))
    {
        let mode = std::os::unix::fs::MetadataExt::mode(&root().join(&script).metadata().expect("a script"));
        assert!(mode & 0o111 != 0, "{} cannot be run: chmod +x", script.display());
    }
}

/// Every dependency has its reason on its own line.
#[test]
fn every_dependency_has_a_reason() {
    let manifest = std::fs::read_to_string(root().join("Cargo.toml")).expect("the manifest");
    let table = manifest.split("[workspace.dependencies]").nth(1).expect("the table").split("\n[").next().expect("its end");
    let lines: Vec<_> = table.lines().filter(|line| !line.is_empty() && !line.starts_with('#') && !line.starts_with("poolfs-")).collect();
    assert!(lines.len() > 20);
    for line in lines {
        assert!(line.contains(" # ") && line.split(" # ").nth(1).is_some_and(|reason| reason.len() > 10), "no reason: {line}");
    }
}
