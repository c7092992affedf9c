//! Man pages and completions, as packages get them.

use crate::harness::{listed, run, workspace};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

fn made() -> (tempfile::TempDir, PathBuf) {
    let home = workspace();
    let dir = home.path().join("documents");
    run(Command::new(env!("CARGO_BIN_EXE_poolfs")).arg("documents").arg(&dir)).ok();
    (home, dir)
}

/// Words of `poolfs --help` that name its commands.
fn commands() -> Vec<String> {
    let help = run(Command::new(env!("CARGO_BIN_EXE_poolfs")).arg("--help")).ok().out;
    let rest = help.split("Commands:\n").nth(1).unwrap().split("\n\n").next().unwrap();
    rest.lines()
        .filter(|line| line.starts_with("  ") && !line.starts_with("   "))
        .filter_map(|line| line.split_whitespace().next())
        .filter(|name| *name != "help")
        .map(str::to_owned)
        .collect()
}

/// A page that does not render is one that nobody reads; a command without one is one that nobody finds.
#[test]
fn man_pages_render_without_warnings() {
    let (_home, dir) = made();
    let pages = listed(&dir.join("man"));
    assert!(commands().len() >= 15, "{:?}", commands());
    for command in commands() {
        assert!(pages.contains(&format!("poolfs-{command}.1")), "{command} has no page: {pages:?}");
    }
    assert!(!pages.iter().any(|page| page.contains("serve") || page.contains("documents")), "hidden: {pages:?}");
    for page in &pages {
        let rendered = run(Command::new("man")
            .args(["--warnings", "-E", "UTF-8", "-l", "-Tutf8", "-Z"])
            .arg(dir.join("man").join(page))
            .env("MANWIDTH", "80"))
        .ok();
        assert_eq!(rendered.err, "", "{page}: {rendered}");
    }
    for page in pages.iter().filter(|page| {
        !["poolfs.1", "poolfs-dht.1", "poolfs-config.1", "poolfs-dht-status.1", "poolfs-dht-node.1", "poolfs.toml.5"]
            .contains(&page.as_str())
    }) {
        assert!(fs::read_to_string(dir.join("man").join(page)).unwrap().contains("Exit codes"), "{page} has no exit codes");
    }
    let configuration = fs::read_to_string(dir.join("man/poolfs.toml.5")).unwrap();
    for key in ["upload_bytes_s", "lazy_archives", "key_file"] {
        assert!(configuration.contains(key), "{key}");
    }
    let fetch = fs::read_to_string(dir.join("man/poolfs-fetch.1")).unwrap();
    assert!(fetch.contains("Exit codes") && fetch.contains("hello=2.10"), "{fetch}");
}

/// Completions that do not load break the shell's others too.
#[test]
fn completions_load() {
    let (_home, dir) = made();
    let dir = dir.join("completions");
    let load = |shell: &str, arguments: &[&str], script: &str| {
        let finished = run(Command::new(shell).args(arguments).arg(script).current_dir(&dir).env("HOME", &dir)).ok();
        assert_eq!(finished.err, "", "{shell}: {finished}");
        finished.out
    };
    let offered = load(
        "bash",
        &["--norc", "-c"],
        "source ./poolfs; COMP_WORDS=(poolfs f); COMP_CWORD=1; _poolfs poolfs f poolfs; echo \"${COMPREPLY[@]}\"",
    );
    assert_eq!(offered.trim(), "fetch");
    load("zsh", &["-f", "-c"], "autoload -Uz compinit && compinit -u -d ./dump && source ./_poolfs && whence -w _poolfs");
    let offered = load("fish", &["--no-config", "-c"], "source ./poolfs.fish; complete -C 'poolfs fe'");
    assert!(offered.starts_with("fetch"), "{offered}");
    assert!(Path::new(&dir).join("_poolfs").exists());
}
