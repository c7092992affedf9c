//! What people limit first: who is spoken to, when anything is given away, and how much.

use crate::harness::crowd::await_status;
use crate::harness::process::Finished;
use crate::harness::{Lan, Machine, Mirror, Options, Package, Published, Repo, STRANGER, Sources, report, run, workspace};
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use tempfile::TempDir;

/// Dropped in this order.
struct Scene {
    machine: Machine,
    neighbour: Machine,
    packages: Vec<Published>,
    _mirror: Mirror,
    _repo: Repo,
    _home: TempDir,
    lan: Lan,
}

/// Two machines on one wire, a stranger beyond the router; `toml` is for the first machine's `[net]`.
fn scene(toml: &str) -> Scene {
    let lan = Lan::new();
    lan.let_stranger_in();
    let home = workspace();
    let mut repo = Repo::new(home.path());
    let packages = [Package::new("one", "1.0", 700_000), Package::new("two", "1.0", 800_000)].map(|package| repo.add(package)).into();
    repo.publish();
    let mirror = Mirror::at(lan.listen(), repo.root());
    let machine = |toml: &str| {
        Machine::new(
            &Sources::Local(&repo, &mirror),
            &Options { host: Some(lan.host()), poolfs_toml: toml.to_owned(), ..Options::default() },
        )
    };
    let (machine, neighbour) = (machine(toml), machine(&format!("bootstrap = [\"{STRANGER}:9977\"]\n")));
    Scene { machine, neighbour, packages, _mirror: mirror, _repo: repo, _home: home, lan }
}

impl Scene {
    /// Asks the first machine for the first package by HTTP, as the stranger or from the wire.
    fn ask(&self, as_stranger: bool) -> Finished {
        let mut curl = self.lan.stranger("curl");
        curl.args(["-s", "-m", "60", "-o", "/dev/null", "-w", "%{http_code} %{size_download} %header{retry-after}"]);
        if as_stranger {
            curl.args(["--interface", &STRANGER.to_string()]);
        }
        run(curl.arg(format!("http://10.99.0.1:9977/v1/file/{}", self.packages[0].digest)))
    }

    fn edit(&self, from: &str, to: &str) {
        let text = fs::read_to_string(self.machine.config()).unwrap();
        assert!(text.contains(from), "{from:?} is not in {text}");
        fs::write(self.machine.config(), text.replacen(from, to, 1)).unwrap();
    }

    fn reload(&self) -> Finished {
        run(std::process::Command::new(env!("CARGO_BIN_EXE_poolfs")).args(["config", "reload", "--config"]).arg(self.machine.config())).ok()
    }

    fn paused(&self) -> Option<String> {
        let said = self.machine.poolfs(&["status", "--json"]).ok().out;
        serde_json::from_str::<serde_json::Value>(&said).unwrap()["upload_paused"].as_str().map(str::to_owned)
    }
}

/// A machine that must not leave its LAN works with its neighbours and says no word to anybody beyond: not to a node that it is told to join
/// by, not to one that asks it. Its neighbour, which may, shows that there is somebody to speak to.
#[test]
fn lan_only_never_leaves_the_lan() {
    let scene = scene(&format!("lan_only = true\nbootstrap = [\"{STRANGER}:9977\"]\n"));
    let (machine, neighbour) = (&scene.machine, &scene.neighbour);
    let mut listener = scene.lan.stranger(env!("CARGO_BIN_EXE_poolfs"));
    listener.args(["dht", "node", "--listen", &format!("{STRANGER}:9977"), "--socket"]).arg(machine.scratch().join("stranger.sock"));
    let listener = crate::harness::Running::start(&mut listener);
    machine.up();
    machine.update();
    machine.apt_get(&["install", "-y", "-d", "one"]).ok();
    assert_eq!(scene.ask(false).out, format!("200 {} ", scene.packages[0].bytes.len()), "its LAN is served");
    // The stranger's question, by TCP: closed without a byte; by UDP: no answer, though one from the wire behind it has one.
    let refused = scene.ask(true);
    assert!(refused.code() != 0 && refused.out.starts_with("000 0"), "{refused}");
    let ping = format!(
        "import socket
query = b'd1:ad2:id20:abcdefghij0123456789e1:q4:ping1:t4:aaaa1:y1:qe'
for source in ['{STRANGER}', '10.99.0.254']:
    asker = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    asker.bind((source, 0))
    asker.sendto(query, ('10.99.0.1', 9977))
asker.settimeout(60)
print(asker.recv(2000)[:1])
"
    );
    run(scene.lan.stranger("python3").args(["-c", &ping])).ok().says("b'd'");
    assert_eq!(scene.lan.sent_to_stranger(), [0, 0], "it spoke to a stranger");
    // The same configuration without the limit does.
    neighbour.up();
    neighbour.update();
    await_status(neighbour, "knows somebody", |status| {
        status.node.as_ref().and_then(|node| node.v4.as_ref()).is_some_and(|v4| v4.nodes > 0)
    });
    assert!(scene.lan.sent_to_stranger()[0] > 0, "nobody was there to be spoken to: this proves nothing");
    let before = scene.lan.sent_to_stranger();
    neighbour.down();
    // A neighbour's file still comes from the neighbour, and its word of a stranger is not followed.
    machine.apt_get(&["install", "-y", "-d", "two"]).ok();
    machine.down();
    assert_eq!(scene.lan.sent_to_stranger()[1], before[1]);
    drop(listener);
    report("limits::lan_only", "0 datagrams, 0 connections to a stranger, who is named as bootstrap and asks; the LAN is served");
}

/// Nothing is given to strangers in quiet hours, on a metered link, or at a rate of 0, from the reload on; the LAN is served all the while.
#[test]
fn strangers_are_given_nothing_when_it_is_quiet() {
    let scene = scene("upload_bytes_s = \"50 MB\"\n");
    let machine = &scene.machine;
    machine.up();
    machine.update();
    machine.apt_get(&["install", "-y", "-d", "one"]).ok();
    let whole = format!("200 {} ", scene.packages[0].bytes.len());
    assert_eq!(scene.ask(true).out, whole);
    assert_eq!(scene.paused(), None);
    for (from, to, why, key) in [
        (
            "upload_bytes_s = \"50 MB\"",
            "upload_bytes_s = \"50 MB\"\nquiet_hours = [\"00:00-24:00\"]",
            Some("quiet hours"),
            "net.quiet_hours",
        ),
        ("quiet_hours = [\"00:00-24:00\"]", "metered = \"yes\"", Some("the connection is metered"), "net.metered"),
        ("upload_bytes_s = \"50 MB\"\nmetered = \"yes\"", "upload_bytes_s = 0", None, "net.upload_bytes_s"),
    ] {
        scene.edit(from, to);
        scene.reload().says(&format!("{key}: taken over"));
        assert_eq!(scene.ask(true).out, "503 5 3600", "{to}");
        assert_eq!(scene.ask(false).out, whole, "{to}");
        assert_eq!(scene.paused().as_deref(), why);
    }
    scene.edit("upload_bytes_s = 0", "upload_bytes_s = \"50 MB\"");
    scene.reload();
    assert_eq!(scene.ask(true).out, whole);
    // What only a new start takes over is named.
    scene.edit("upload_bytes_s = \"50 MB\"", "upload_bytes_s = \"50 MB\"\nlan_only = true");
    scene.reload().says("net.lan_only: waits for the next start");
    assert_eq!(scene.ask(true).out, whole);
    machine.down();
    // NetworkManager's word, by the program that asks it.
    let tools = machine.scratch();
    fs::write(tools.join("busctl"), "#!/bin/sh\nprintf '%s\\n' \"$*\" > \"$0.asked\"\necho 'u 1'\n").unwrap();
    fs::set_permissions(tools.join("busctl"), fs::Permissions::from_mode(0o755)).unwrap();
    scene.edit("\nlan_only = true", "");
    let path = format!("{}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", tools.display());
    run(machine.poolfs_command(&["up"]).env("PATH", path)).ok();
    await_status(machine, "is metered", |_| scene.paused().is_some());
    assert_eq!(scene.paused().as_deref(), Some("the connection is metered"));
    let asked = fs::read_to_string(tools.join("busctl.asked")).unwrap();
    assert!(asked.trim_end().ends_with("org.freedesktop.NetworkManager Metered"), "{asked}");
    machine.down();
    report("limits::quiet", "quiet hours, a metered link and a rate of 0: strangers get 503 from the reload on, the LAN everything");
}
