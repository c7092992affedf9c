//! What the daemon gives to peers, as curl sees it.

use crate::harness::{Covered, LIMIT, Machine, Options, Package, Stage, assert_holds, forget_pages, report, run};
use poolfs_core::Digest;
use serde_json::Value;
use std::fs;
use std::net::TcpListener;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

fn status(machine: &Machine) -> Value {
    serde_json::from_str(&machine.poolfs(&["status", "--json"]).ok().out).unwrap()
}

/// The address of the daemon's server.
fn base(machine: &Machine) -> String {
    let status = status(machine);
    let listening = status["uploaded"]["listening"].as_array().unwrap().clone();
    assert_eq!(listening.len(), 1, "{status}");
    assert_eq!(listening[0], status["node"]["v4"]["listen"], "one port for both");
    format!("http://{}", listening[0].as_str().unwrap())
}

/// Status code and bytes of a download, `Err` with curl's exit code where the transfer broke.
fn curl(machine: &Machine, url: &str, arguments: &[&str]) -> Result<(String, Vec<u8>), i32> {
    let out = machine.scratch().join("curl.out");
    let mut command = Command::new("curl");
    command.args(["-sS", "--noproxy", "*", "--max-time", "20", "-w", "%{http_code}", "-o"]).arg(&out).args(arguments).arg(url);
    let finished = run(&mut command);
    if !finished.status.success() {
        return Err(finished.status.code().unwrap());
    }
    Ok((finished.out.trim().to_owned(), fs::read(&out).unwrap_or_default()))
}

fn digest_of(path: &Path) -> Digest {
    Digest::of(&fs::read(path).unwrap())
}

/// A package that apt put into archives/ is given to whoever asks for its digest, whole and in parts; a file of this machine is
/// not; and when apt has cleaned up, the object is given instead.
#[test]
fn packages_are_given_and_private_files_are_not() {
    let stage = Stage::mounted(vec![Package::new("big", "1.0", 700_000), Package::new("small", "1.0", 3_000)], &Options::default());
    stage.download_all().ok();
    let base = base(&stage.machine);
    let url = |digest: &dyn std::fmt::Display| format!("{base}/v1/file/{digest}");
    let given = |what: &str, arguments: &[&str]| curl(&stage.machine, what, arguments).unwrap();
    for published in &stage.packages {
        assert!(given(&url(&published.digest), &[]) == ("200".to_owned(), published.bytes.clone()), "{published:?}");
        assert!(given(&url(&published.digest), &["-r", "70-2000"]) == ("206".to_owned(), published.bytes[70..=2000].to_vec()));
    }
    let own = stage.machine.archives().join("own_1.0_all.deb");
    fs::write(&own, b"built here").unwrap();
    let (own, unknown) = (digest_of(&own), Digest::of(b"unknown"));
    for what in ["file", "have", "pieces", "about"] {
        let answer = |digest: &Digest| given(&format!("{base}/v1/{what}/{digest}"), &["-i"]);
        assert_eq!(answer(&own), answer(&unknown), "{what}");
        assert_eq!(answer(&own).0, "404");
    }
    stage.machine.apt_get(&["clean"]).ok();
    let big = &stage.packages[0];
    assert_eq!(stage.debs(), ["own_1.0_all.deb"; 0], "apt has cleaned up");
    assert!(given(&url(&big.digest), &[]) == ("200".to_owned(), big.bytes.clone()), "as an object");
    let uploaded = status(&stage.machine)["uploaded"].clone();
    assert!(uploaded["bytes"].as_u64().unwrap() >= 2 * big.bytes.len() as u64, "{uploaded}");
    assert_eq!((uploaded["bytes_outside"].as_u64(), uploaded["damaged"].as_u64()), (Some(0), Some(0)), "{uploaded}");
    report("peer::given", "curl got packages whole, in parts and as objects; a private file is a 404 like any other");
}

/// Rot is found when it is asked for, is never given, and the next reader has it mended; then it is given again.
#[test]
fn rot_is_found_by_asking() {
    let stage = Stage::new(vec![Package::new("big", "1.0", 900_000)], &Options::default());
    let covered = Covered::open(&stage.machine.archives());
    stage.machine.up();
    stage.machine.update();
    stage.download_all().ok();
    let published = &stage.packages[0];
    let url = format!("{}/v1/file/{}", base(&stage.machine), published.digest);
    covered.flip(&published.archive_name(), 600_000);
    let broken = curl(&stage.machine, &url, &[]);
    assert_eq!(broken, Err(18), "curl's word for a transfer that ended early");
    assert_eq!(curl(&stage.machine, &url, &[]).unwrap().0, "404", "and from then on it is not here");
    assert_eq!(stage.machine.status().archives().damaged, 1);
    let path = stage.archive(published);
    forget_pages(&path);
    assert_holds(&path, &published.bytes);
    let begun = Instant::now();
    while curl(&stage.machine, &url, &[]) != Ok(("200".to_owned(), published.bytes.clone())) {
        assert!(begun.elapsed() < LIMIT, "mended, and not given");
    }
    assert_eq!(stage.machine.status().archives().damaged, 0);
}

/// A port that another program has is a line in the status, and apt gets its packages all the same.
#[test]
fn a_port_in_use_is_told() {
    let stage = Stage::new(vec![Package::new("one", "1.0", 700_000)], &Options::default());
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let config = fs::read_to_string(stage.machine.config()).unwrap();
    fs::write(stage.machine.config(), config.replace("listen = \"127.0.0.1:0\"", &format!("listen = \"{address}\""))).unwrap();
    stage.machine.up();
    let problems = stage.machine.status().problems;
    let wanted =
        format!("nothing is given to peers: listen on TCP {address}: Address already in use (os error 98); another program has this port");
    assert!(problems.len() == 1 && problems[0].starts_with(&wanted), "{problems:#?}");
    assert_eq!(status(&stage.machine)["uploaded"]["listening"], Value::Array(Vec::new()));
    stage.machine.update();
    stage.download_all().ok();
    stage.assert_all_here();
}
