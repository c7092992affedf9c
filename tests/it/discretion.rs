//! What a machine gives and tells of what it has: nothing that is private, superseded, or named by lists that are old.

mod advised;
mod debian;
mod watch;

use crate::harness::crowd::{Crowd, Terms, await_status};
use crate::harness::{Host, LIMIT, Machine, Options, Package, Published, Stage, report, run};
use poolfs_core::Digest;
use poolfs_net::krpc::{Body, FLAG_PARTIAL, Message, Pv, Verb};
use serde_json::Value;
use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead as _, BufReader};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

const DAY_S: i64 = 86_400;

fn status(machine: &Machine) -> Value {
    serde_json::from_str(&machine.poolfs(&["status", "--json"]).ok().out).unwrap()
}

/// Status code and body of each of the four paths, as curl sees them.
fn answers(machine: &Machine, digest: &str) -> Vec<(String, Vec<u8>)> {
    let status = status(machine);
    let listening = status["uploaded"]["listening"][0].as_str().unwrap_or_else(|| panic!("no server: {status}")).to_owned();
    let out = machine.scratch().join("curl.out");
    let answer = |what: &str| {
        let mut curl = Command::new("curl");
        curl.args(["-sS", "--noproxy", "*", "--max-time", "20", "-i", "-w", "%{http_code}", "-o"]).arg(&out);
        let code = run(curl.arg(format!("http://{listening}/v1/{what}/{digest}"))).ok().out;
        (code.trim().to_owned(), fs::read(&out).unwrap())
    };
    ["file", "have", "pieces", "about"].map(answer).into()
}

/// Waits until strangers get the file, or until they get what they get for one that is not here.
#[track_caller]
fn await_given(machine: &Machine, digest: &str, given: bool) {
    let unknown = answers(machine, &Digest::of(b"unknown").to_string());
    assert!(unknown.iter().all(|(code, _)| code == "404"), "{unknown:?}");
    let begun = Instant::now();
    loop {
        let found = answers(machine, digest);
        let is_given = found[0].0 == "200" && found[1].0 == "200";
        if is_given == given && (given || found == unknown) {
            return;
        }
        assert!(begun.elapsed() < LIMIT, "given should be {given}: {:?}", found.iter().map(|(code, _)| code).collect::<Vec<_>>());
    }
}

fn why(machine: &Machine, file: &std::path::Path) -> String {
    machine.poolfs(&["why", file.to_str().unwrap()]).ok().out
}

/// Ends the daemon and starts it again with its clock this far ahead.
fn restart_ahead(machine: &Machine, ahead_s: i64) {
    machine.down();
    run(machine.poolfs_command(&["up"]).env("POOLFS_CLOCK_OFFSET_S", ahead_s.to_string())).ok();
    machine.assert_mounted();
}

/// A newer version silences the older one, also as an object; what is named as private is silent from the next start on. Each of
/// these answers like a file that is not here.
#[test]
fn superseded_and_private_files_are_not_given() {
    let packages = vec![Package::new("big", "1.0", 700_000), Package::new("secret", "1.0", 3_000), Package::new("small", "1.0", 3_000)];
    let mut stage = Stage::mounted(packages, &Options::default());
    stage.download_all().ok();
    let [big, secret, small] = &stage.packages[..] else { panic!("three packages") };
    for published in [big, secret, small] {
        await_given(&stage.machine, &published.digest, true);
    }
    assert!(why(&stage.machine, &stage.archive(big)).contains("rule      current: "));
    stage.repo.add(Package::new("big", "1.1", 700_000));
    stage.repo.publish();
    stage.machine.update();
    await_given(&stage.machine, &big.digest, false);
    await_given(&stage.machine, &small.digest, true);
    let archives = status(&stage.machine)["mounts"][0].clone();
    assert_eq!((&archives["withheld"], &archives["withheld_by"]["superseded"]), (&1.into(), &1.into()), "{archives}");
    let said = why(&stage.machine, &stage.archive(big));
    assert!(said.contains("sharing   withheld") && said.contains("rule      superseded: big 1.0 has been followed by 1.1"), "{said}");
    stage.machine.apt_get(&["clean"]).ok();
    await_given(&stage.machine, &small.digest, true);
    await_given(&stage.machine, &big.digest, false);

    stage.machine.down();
    let config = fs::read_to_string(stage.machine.config()).unwrap();
    fs::write(stage.machine.config(), config.replace("[apt]\n", "[apt]\nprivate = [\"origin=test,package=secret\"]\n")).unwrap();
    stage.machine.up();
    await_given(&stage.machine, &small.digest, true);
    await_given(&stage.machine, &secret.digest, false);
    report("discretion", "superseded and private packages answer like unknown ones, as files and as objects");
}

/// A version that a file of advisories names is withheld, and `status` says how much the file says.
#[test]
fn advisories_withhold() {
    let stage = Stage::new(vec![Package::new("bad", "1.0", 3_000), Package::new("good", "1.0", 3_000)], &Options::default());
    let file = stage.machine.scratch().join("advisories");
    fs::write(&file, "VERSION 1\nCVE-2026-0001,,a hole\n\nbad,0,S  F,1.0-1,\ngood,0,S  F,1.0,\ngood,0,S   ,,\n\n").unwrap();
    let config = fs::read_to_string(stage.machine.config()).unwrap();
    let keys = format!("[apt]\nadvisories = [{file:?}, \"/nonexistent\"]\n");
    fs::write(stage.machine.config(), config.replace("[apt]\n", &keys)).unwrap();
    stage.machine.up();
    stage.machine.update();
    stage.download_all().ok();
    let [bad, good] = &stage.packages[..] else { panic!("two packages") };
    await_given(&stage.machine, &good.digest, true);
    await_given(&stage.machine, &bad.digest, false);
    assert!(why(&stage.machine, &stage.archive(bad)).contains("rule      advisory: CVE-2026-0001 names this version"));
    let shown = status(&stage.machine)["advisories"].clone();
    assert_eq!(shown[0], format!("{}: 3 issues, 0 h old", file.display()));
    assert_eq!(shown[1], "/nonexistent: 0 issues; there is none yet");
}

/// What host 0 of the wire sent and got, frame by frame.
struct Recorder {
    child: Child,
    file: PathBuf,
}

impl Recorder {
    fn start(host: &Host, directory: &Path) -> Self {
        let file = directory.join("frames");
        let script = "import socket, struct, sys\ns = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))\n\
                      s.setsockopt(socket.SOL_SOCKET, 33, 64 << 20)\ns.bind((\"eth0\", 0))\n\
                      out = open(sys.argv[1], \"wb\", buffering=0)\nprint(\"ready\", flush=True)\n\
                      while True:\n    frame = s.recv(65535)\n    out.write(struct.pack(\">I\", len(frame)) + frame)\n";
        let mut command = host.command("python3");
        let mut child = command.args(["-c", script]).arg(&file).stdout(Stdio::piped()).spawn().unwrap();
        let mut ready = String::new();
        BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut ready).unwrap();
        assert_eq!(ready, "ready\n");
        Self { child, file }
    }

    /// Whether the key of the file was in any frame.
    fn saw(&self, published: &Published) -> bool {
        self.saw_key(&published.digest.parse::<Digest>().unwrap(), 0)
    }

    /// The same of a digest, in what was recorded from byte `from` on.
    fn saw_key(&self, digest: &Digest, from: usize) -> bool {
        let key = digest.file_key();
        fs::read(&self.file).unwrap()[from..].windows(key.len()).any(|window| window == key)
    }

    /// How much was recorded, whole frames only.
    fn bytes(&self) -> usize {
        let all = fs::read(&self.file).unwrap();
        let mut at = 0;
        while let Some(length) = all.get(at..at + 4).map(|length| u32::from_be_bytes(length.try_into().unwrap()) as usize) {
            if at + 4 + length > all.len() {
                break;
            }
            at += 4 + length;
        }
        at
    }

    /// What this address sent from the node's port, from byte `from` of the record on: to whom, and the payload.
    fn sent(&self, address: Ipv4Addr, from: usize) -> Vec<(SocketAddr, Vec<u8>)> {
        let all = fs::read(&self.file).unwrap();
        let (mut sent, mut rest) = (Vec::new(), &all[from..]);
        while let Some((length, after)) = rest.split_first_chunk::<4>() {
            let Some((frame, after)) = after.split_at_checked(u32::from_be_bytes(*length) as usize) else { break };
            rest = after;
            // Ethernet with IPv4 with UDP.
            if frame.len() < 42 || frame[12..14] != [8, 0] || frame[23] != 17 {
                continue;
            }
            let header = usize::from(frame[14] & 15) * 4;
            let Some(udp) = frame.get(14 + header..) else { continue };
            let port = |at: usize| u16::from_be_bytes([udp[at], udp[at + 1]]);
            let length = usize::from(u16::from_be_bytes([udp[4], udp[5]]));
            if frame[26..30] == address.octets() && port(0) == 9977 {
                let to = Ipv4Addr::new(frame[30], frame[31], frame[32], frame[33]);
                sent.push((SocketAddr::from((to, port(2))), udp[8..length].to_vec()));
            }
        }
        sent
    }

    /// The keys that this address announced since then; what it withdrew is not among them.
    fn announced(&self, address: Ipv4Addr, from: usize) -> BTreeSet<[u8; 20]> {
        let announce = |bytes: &[u8]| match Message::decode(bytes).ok()?.body {
            Body::Query { verb: Verb::Announce(announce), .. } if announce.port != 0 => Some(announce),
            _ => None,
        };
        let sent = self.sent(address, from);
        let announces = sent.iter().filter_map(|(_, bytes)| announce(bytes));
        announces.flat_map(|announce| [announce.key].into_iter().chain(announce.more)).map(|key| key.0).collect()
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Status codes of the four paths as a stranger gets them from the first machine, and whether each is what an unknown file gets.
fn stranger_gets(crowd: &Crowd, digest: &str) -> Vec<String> {
    let answer = |what: &str, digest: &str| {
        let mut curl = crowd.hosts[1].command("curl");
        let url = format!("http://{}:9977/v1/{what}/{digest}", crowd.hosts[0].address);
        curl.args(["-sS", "--noproxy", "*", "--max-time", "20", "-i", "-w", "%{http_code}", "-o", "-"]).arg(url);
        curl.output().unwrap().stdout
    };
    let unknown = Digest::of(b"unknown").to_string();
    let compared = |what: &str| {
        let found = answer(what, digest);
        let code = String::from_utf8_lossy(&found[found.len() - 3..]).into_owned();
        if code == "404" {
            assert_eq!(found, answer(what, &unknown), "{what}");
        }
        code
    };
    ["file", "have", "pieces", "about"].map(compared).into()
}

/// Three months behind at boot: nobody hears of a vulnerable, superseded or unlisted file, before the lists are fresh nor after; then
/// only of what they call current. A fix that appears silences the version that it fixes.
#[test]
fn a_watcher_learns_nothing_of_what_is_not_patched() {
    let packages: Vec<Package> = ["fine", "holed", "followed", "gone"].map(|name| Package::new(name, "1.0", 700_000)).into();
    let mut crowd = Crowd::new(2, packages, &Terms { poolfs_toml: "announce = \"all\"\n".to_owned(), ..Terms::default() });
    let security = "stable-security";
    let [fine, holed, followed, gone] = <[Published; 4]>::try_from(crowd.packages.clone()).unwrap();
    crowd.repo().publish_packages_in(security, &[]);
    for machine in &crowd.machines {
        machine.edit_sources(|text| text.replace("Suites: stable", "Suites: stable stable-security"));
    }
    crowd.up(false);
    crowd.download(0);
    await_status(&crowd.machines[0], "announces all", |status| status.node.as_ref().is_some_and(|node| node.announced_keys >= 4));
    crowd.machines[0].apt_get(&["clean"]).ok();
    crowd.machines[0].down();

    let fixed = crowd.repo().add(Package::new("holed", "1.0+fix1", 700_000));
    let newer = crowd.repo().add(Package::new("followed", "1.1", 700_000));
    crowd.repo().publish_packages_in("stable", &[&fine, &holed, &newer]);
    crowd.repo().publish_packages_in(security, &[&fixed]);
    let recorder = Recorder::start(&crowd.hosts[0], &crowd.machines[1].scratch());
    run(crowd.machines[0].poolfs_command(&["up"]).env("POOLFS_CLOCK_OFFSET_S", (90 * DAY_S).to_string())).ok();
    crowd.await_acquainted(false);
    // Several times as long as it takes to announce what is there.
    await_status(&crowd.machines[0], "has been up for a while", |status| status.uptime_s >= 8);
    for published in [&fine, &holed, &followed, &gone] {
        assert!(!recorder.saw(published), "{} before fresh lists", published.package.name);
        assert_eq!(stranger_gets(&crowd, &published.digest), ["404"; 4], "{}", published.package.name);
    }
    crowd.machines[0].update();
    let begun = Instant::now();
    while !recorder.saw(&fine) {
        assert!(begun.elapsed() < LIMIT, "what is current is announced: {:?}", crowd.machines[0].status());
    }
    assert_eq!(stranger_gets(&crowd, &fine.digest)[0], "200");
    for published in [&holed, &followed, &gone] {
        assert!(!recorder.saw(published), "{} after fresh lists", published.package.name);
        assert_eq!(stranger_gets(&crowd, &published.digest), ["404"; 4], "{}", published.package.name);
    }
    let fix = crowd.repo().add(Package::new("fine", "1.0+fix1", 700_000));
    crowd.repo().publish_packages_in(security, &[&fixed, &fix]);
    crowd.machines[0].update();
    let begun = Instant::now();
    while stranger_gets(&crowd, &fine.digest) != ["404"; 4] {
        assert!(begun.elapsed() < LIMIT, "a fix silences what it fixes");
    }
    report("discretion", "a watcher saw no key of a vulnerable, superseded or unlisted package, before fresh lists and after");
}

/// With `security_from = "fleet"` nobody is asked for an update of the security suite, nor told that it is arriving; other packages come from
/// who has them, and the update is shared once it is here.
#[test]
fn updates_of_the_security_suite_are_not_asked_of_strangers() {
    let packages: Vec<Package> = ["plain", "fix"].map(|name| Package::new(name, "1.0", 3_000_000)).into();
    let mut crowd = Crowd::new(2, packages, &Terms { poolfs_toml: "security_from = \"fleet\"\n".to_owned(), ..Terms::default() });
    let [plain, fix] = <[Published; 2]>::try_from(crowd.packages.clone()).unwrap();
    crowd.repo().publish_packages_in("stable", &[&plain]);
    crowd.repo().publish_packages_in("stable-security", &[&fix]);
    for machine in &crowd.machines {
        machine.edit_sources(|text| text.replace("Suites: stable", "Suites: stable stable-security"));
    }
    crowd.up(false);
    crowd.download(0);
    await_status(&crowd.machines[0], "announces both", |status| status.node.as_ref().is_some_and(|node| node.announced_keys == 2));
    let recorder = Recorder::start(&crowd.hosts[1], &crowd.machines[0].scratch());
    // Slow enough that other packages are worth asking a peer for.
    crowd.shape_mirror(8);
    crowd.mirror.forget_log();
    crowd.machines[1].apt_get(&["install", "-y", "-d", "fix"]).ok();
    let from_mirror = crowd.mirror_bytes(1);
    assert_eq!(from_mirror, fix.bytes.len() as u64, "all of it from the mirror");
    assert_eq!(crowd.given_to(1), [0, 0]);
    assert!(recorder.sent(crowd.hosts[1].address, 0).iter().all(|(_, bytes)| !asks_for(bytes, &fix)), "a node was asked for it");
    crowd.machines[1].apt_get(&["install", "-y", "-d", "plain"]).ok();
    assert!(crowd.given_to(1)[0] > 0, "{:?}", crowd.given_to(1));
    let begun = Instant::now();
    while !recorder.announced(crowd.hosts[1].address, 0).contains(&fix.digest.parse::<Digest>().unwrap().file_key()) {
        assert!(begun.elapsed() < LIMIT, "it is shared from then on: {:?}", crowd.machines[1].status());
    }
    report("discretion", "an update of the security suite: all of it from the mirror, nobody asked, announced when it was here");
}

/// Whether a datagram looks for the file, or tells that a part of it is here.
fn asks_for(bytes: &[u8], published: &Published) -> bool {
    let key = published.digest.parse::<Digest>().unwrap().file_key();
    match Message::decode(bytes).map(|message| message.body) {
        Ok(Body::Query { verb: Verb::Announce(announce), .. }) => {
            let is_part = announce.pv.as_ref().and_then(|pv| Pv::parse(pv).ok()).is_some_and(|pv| pv.flags & FLAG_PARTIAL != 0);
            is_part && announce.more.iter().chain([&announce.key]).any(|named| named.0 == key)
        }
        // An announce asks for a token first.
        Ok(Body::Query { verb: Verb::GetPeers { key: asked, pv: true, .. }, .. }) => asked.0 == key,
        _ => false,
    }
}

/// Credentials that appear while the daemon runs, or that cannot be read, silence what they may protect.
#[test]
fn credentials_silence_a_repository() {
    let stage = Stage::mounted(vec![Package::new("small", "1.0", 3_000)], &Options::default());
    stage.download_all().ok();
    let small = &stage.packages[0];
    // apt warns of credentials that it would send over http.
    let update = || {
        stage.machine.apt_get(&["update"]).ok();
        stage.machine.await_catalog();
    };
    await_given(&stage.machine, &small.digest, true);
    let auth = stage.machine.root().join("etc/apt/auth.conf");
    fs::write(&auth, "machine 127.0.0.1 login me password pw\n").unwrap();
    update();
    await_given(&stage.machine, &small.digest, false);
    assert!(why(&stage.machine, &stage.archive(small)).contains("local-only"));
    fs::write(&auth, "machine elsewhere.example login me password pw\n").unwrap();
    update();
    await_given(&stage.machine, &small.digest, true);
    fs::write(&auth, "pasword pw\n").unwrap();
    update();
    await_given(&stage.machine, &small.digest, false);
    let problems = stage.machine.status().problems;
    assert!(
        problems.iter().any(|problem| problem.contains("auth.conf") && problem.contains("private") && !problem.contains("pw")),
        "{problems:?}"
    );
}

/// Lists that nobody has looked up for a week name nothing for strangers. An update that does not reach the mirror changes nothing; one
/// that finds everything unchanged does.
#[test]
fn old_lists_silence_everything_until_they_are_looked_up() {
    let stage = Stage::new(vec![Package::new("small", "1.0", 3_000)], &Options::default());
    stage.mirror.tell_dates();
    stage.machine.up();
    stage.machine.update();
    stage.download_all().ok();
    let small = &stage.packages[0];
    await_given(&stage.machine, &small.digest, true);
    restart_ahead(&stage.machine, 6 * DAY_S);
    await_given(&stage.machine, &small.digest, true);
    restart_ahead(&stage.machine, 8 * DAY_S);
    await_given(&stage.machine, &small.digest, false);
    let said = why(&stage.machine, &stage.archive(small));
    assert!(said.contains("withheld") && said.contains("old-list: test stable was looked up 8 d ago"), "{said}");
    stage.mirror.stop();
    let failed = stage.machine.apt_get(&["update"]);
    assert!(failed.err.contains("Failed to fetch") || failed.out.contains("Err:"), "{failed}");
    stage.machine.await_catalog();
    await_given(&stage.machine, &small.digest, false);
    stage.mirror.start_again();
    stage.mirror.forget_log();
    let updated = stage.machine.update();
    assert!(updated.out.contains("Hit:1"), "the mirror says that nothing has changed: {updated}");
    await_given(&stage.machine, &small.digest, true);
    report("discretion", "after 8 days without an update nothing is given; an update that finds nothing new (304) opens it again");
}
