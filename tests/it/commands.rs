//! The commands that people type, their exit codes, and their `--json`.

use crate::harness::process::Finished;
use crate::harness::{Client, Fault, Machine, Options, Package, Stage, assert_holds, mounts, report, run};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use std::fs;
use std::process::Command;

fn packages() -> Vec<Package> {
    vec![Package::new("small", "1:1.0", 3_000), Package::new("large", "3.0", 900_000), Package::new("other", "2", 700_000)]
}

/// The JSON documents on standard output, one a line.
fn documents(finished: &Finished) -> Vec<Value> {
    finished.out.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {finished}"))).collect()
}

fn with_code(machine: &Machine, code: i32, arguments: &[&str]) -> Finished {
    let finished = machine.poolfs(arguments);
    assert_eq!(finished.code(), code, "{finished}");
    finished
}

/// `poolfs CONFIG-COMMAND --config FILE`: the option comes after the second word.
fn config(machine: &Machine, code: i32, arguments: &[&str]) -> Finished {
    let mut command = Command::new(env!("CARGO_BIN_EXE_poolfs"));
    let finished = run(command.arg("config").args(arguments).arg("--config").arg(machine.config()));
    assert_eq!(finished.code(), code, "{finished}");
    finished
}

/// Packages by all the names that people have for them arrive whole, and `ls` and `gc` say what is here.
#[test]
fn fetch_ls_gc() {
    let stage = Stage::mounted(packages(), &Options::default());
    let machine = &stage.machine;
    with_code(machine, 2, &["ls", "*.deb"]);
    let archive = stage.packages[2].archive_name();
    let fetched = with_code(machine, 0, &["fetch", "small", "large=3.0", &archive, "--json"]);
    let documents_of_fetch = documents(&fetched);
    let names: Vec<_> = documents_of_fetch.iter().map(|document| document["name"].as_str().unwrap().to_owned()).collect();
    assert_eq!(names, [archive, stage.packages[0].archive_name(), stage.packages[1].archive_name()], "{fetched}");
    stage.assert_all_here();
    // What is here already is named all the same.
    assert_eq!(with_code(machine, 0, &["fetch", "small", "--json"]).out.lines().count(), 1);
    with_code(machine, 1, &["fetch", "no-such-package"]).says("Unable to locate package no-such-package");
    with_code(machine, 1, &["fetch", "../x.deb"]).says("write it without a directory");
    let mixed = with_code(machine, 2, &["fetch", "absent_1_all.deb", "small"]).says("no list names such an archive");
    assert!(mixed.out.contains(&stage.packages[0].archive_name()), "{mixed}");
    let rows = documents(&with_code(machine, 0, &["ls", "*.deb", "--json"]));
    assert_eq!(rows.len(), 3);
    let row = rows.iter().find(|row| row["name"] == stage.packages[1].archive_name().as_str()).unwrap();
    let want = (stage.packages[1].bytes.len() as u64, "archives", "clean", "mirror", stage.packages[1].digest.as_str());
    let text = |key: &str| row[key].as_str().unwrap();
    assert_eq!((row["bytes"].as_u64().unwrap(), text("place"), text("state"), text("source"), text("digest")), want, "{row}");
    assert!(with_code(machine, 0, &["ls"]).out.lines().count() > 3, "the lists are missing");
    // What apt cleans is kept, until it is told to go.
    machine.apt_get(&["clean"]).ok();
    let kept = documents(&with_code(machine, 0, &["ls", "*.deb", "--json"]));
    assert!(!kept.is_empty() && kept.iter().all(|row| row["place"] == "objects"), "{kept:?}");
    let nothing = documents(&with_code(machine, 0, &["gc", "--json"]));
    assert_eq!(nothing[0]["objects"], 0, "what is within the quota stays");
    let all = documents(&with_code(machine, 0, &["gc", "--all", "--json"]));
    assert!(all[0]["objects"].as_u64().unwrap() >= 3 && all[0]["kept_bytes"] == 0, "{all:?}");
    // A package that nobody can deliver is named, and the others arrive.
    stage.mirror.fault(&stage.packages[2].filename, Client::Poolfs, Fault::Status(404));
    with_code(machine, 2, &["fetch", "small", "other"]).says("nobody could deliver it now");
    assert_holds(&stage.archive(&stage.packages[0]), &stage.packages[0].bytes);
    machine.down();
    with_code(machine, 1, &["ls"]).says("start one with `poolfs up`");
    report("commands::fetch_ls_gc", "3 names of 3 kinds fetched, listed, kept after `apt-get clean`, freed by `gc --all`");
}

/// What the file says, what holds, and what is wrong with it.
#[test]
fn config_commands() {
    let stage = Stage::new(packages(), &Options::default());
    let machine = &stage.machine;
    config(machine, 0, &["check"]).says("is right");
    let shown = documents(&config(machine, 0, &["show", "--json"])).remove(0);
    assert_eq!(shown["store"]["quota"], "1 GiB");
    assert_eq!(shown["fs"]["threads"], 2);
    assert_eq!(shown["mount"][1]["role"], "lists");
    // What is shown is itself a configuration.
    let printed = machine.scratch().join("printed.toml");
    fs::write(&printed, config(machine, 0, &["show"]).out).unwrap();
    run(Command::new(env!("CARGO_BIN_EXE_poolfs")).args(["config", "check", "--config"]).arg(&printed)).ok();
    let annotated = run(Command::new(env!("CARGO_BIN_EXE_poolfs")).args(["config", "default"])).ok().out;
    assert!(annotated.contains("\n#quota = \"5 GiB\"\n") && annotated.contains("\n# key_file = "), "{annotated}");
    let good = fs::read_to_string(machine.config()).unwrap();
    for (from, to, says) in [
        ("quota =", "qouta =", "did you mean `quota`?"),
        ("[net]", "[log]\nlevel = \"a=b=c\"\n[net]", "log.level = \"a=b=c\": write error, warn, info, debug or trace"),
    ] {
        fs::write(machine.config(), good.replacen(from, to, 1)).unwrap();
        config(machine, 2, &["check"]).says(says);
        let checked = documents(&config(machine, 2, &["check", "--json"])).remove(0);
        assert!(!checked["right"].as_bool().unwrap() && checked["mistake"].as_str().unwrap().contains(says), "{checked}");
    }
}

/// A reload takes over what it says it takes over, names what it cannot, and leaves all as it was where the file is wrong.
#[test]
fn reload() {
    let stage = Stage::mounted(packages(), &Options::default());
    let machine = &stage.machine;
    stage.download_all().ok();
    machine.apt_get(&["clean"]).ok();
    let kept = || documents(&with_code(machine, 0, &["gc", "--json"]))[0]["kept_bytes"].as_u64().unwrap();
    assert!(kept() > 1_000_000);
    let good = fs::read_to_string(machine.config()).unwrap();
    config(machine, 0, &["reload"]).says("nothing has changed");
    let edited =
        good.replace("quota = \"1 GiB\"", "quota = \"900 kB\"").replace("discovery = false", "discovery = false\nupload_slots = 3");
    fs::write(machine.config(), format!("{edited}\n[log]\nlevel = \"debug\"\n")).unwrap();
    let reloaded = documents(&config(machine, 0, &["reload", "--json"])).remove(0);
    assert_eq!(reloaded["taken"], serde_json::json!(["log.level", "store.quota"]));
    assert_eq!(reloaded["waiting"], serde_json::json!(["net.upload_slots"]));
    assert!(kept() <= 900_000, "the quota is as it was: {}", kept());
    config(machine, 0, &["reload"]).says("net.upload_slots: waits for the next start");
    fs::write(machine.config(), edited.replace("[store]", "[stroe]")).unwrap();
    config(machine, 1, &["reload"]).says("did you mean [store]?");
    // By signal, to the process that a service manager knows: the supervisor.
    fs::write(machine.config(), &good).unwrap();
    let pid: i32 = fs::read_to_string(machine.socket().with_extension("pid")).unwrap().trim().parse().unwrap();
    let daemon = machine.status().pid;
    kill_process(Pid::from_raw(pid).unwrap(), Signal::HUP).unwrap();
    mounts::await_change("the log says that it was read again", &[&machine.state_dir()], || {
        machine.log().matches("configuration read again; taken over: log.level, store.quota").count() == 2
    });
    assert_eq!(machine.status().pid, daemon, "a SIGHUP is no reason to end");
    with_code(machine, 0, &["log-level", "poolfs=trace,info"]);
    with_code(machine, 1, &["log-level", "a=b=c"]).says("write error, warn, info, debug or trace");
    assert!(machine.log().contains("logging poolfs=trace,info"), "{}", machine.log());
    machine.down();
}
