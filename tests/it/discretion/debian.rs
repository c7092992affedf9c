//! What Debian's own lists say, held against what a machine gives: real stanzas and real packages of bookworm and bookworm-security.

use super::{DAY_S, Recorder, stranger_gets};
use crate::harness::crowd::{Crowd, Terms, await_status};
use crate::harness::upstream::Upstream;
use crate::harness::{Apt, LIMIT, Machine, Mirror, Options, Sources, report, run};
use poolfs_core::Digest;
use poolfs_core::discretion::compare;
use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::path::Path;
use std::process::Command;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// One package as a real list names it.
#[derive(Clone, Debug)]
struct Stanza {
    package: String,
    version: String,
    source: String,
    source_version: String,
    filename: String,
    size: u64,
    digest: String,
    text: String,
}

impl Stanza {
    fn read(text: &str) -> Option<Self> {
        let field = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": ")).map(str::to_owned);
        let (package, version) = (field("Package")?, field("Version")?);
        let source = field("Source").unwrap_or_else(|| package.clone());
        let (source, source_version) = match source.split_once(" (") {
            Some((source, version)) => (source.to_owned(), version.trim_end_matches(')').to_owned()),
            None => (source, version.clone()),
        };
        let (filename, digest) = (field("Filename")?, field("SHA256")?);
        Some(Self { package, version, source, source_version, filename, size: field("Size")?.parse().ok()?, digest, text: text.to_owned() })
    }

    fn digest(&self) -> Digest {
        self.digest.parse().unwrap()
    }
}

/// The packages of a real list, in its order.
fn real_list(upstream: &Upstream, path: &str) -> Vec<Stanza> {
    upstream.have(path);
    let packed = upstream.kept.join(path.trim_start_matches('/'));
    let text = run(Command::new("xz").arg("-dc").arg(&packed)).ok().out;
    let stanzas: Vec<Stanza> = text.split("\n\n").filter_map(Stanza::read).collect();
    assert!(stanzas.len() > 1000, "{path} has {} packages", stanzas.len());
    stanzas
}

const MAIN: &str = "/debian/dists/bookworm/main/binary-amd64/Packages.xz";
const SECURITY: &str = "/debian-security/dists/bookworm-security/main/binary-amd64/Packages.xz";

fn is_older(a: &str, b: &str) -> bool {
    compare(a, b) == Some(Ordering::Less)
}

/// The newest version of each source package in a list.
fn newest(list: &[Stanza]) -> BTreeMap<&str, &str> {
    let mut newest: BTreeMap<&str, &str> = BTreeMap::new();
    for stanza in list {
        let known = newest.entry(&stanza.source).or_insert(&stanza.source_version);
        if is_older(known, &stanza.source_version) {
            *known = &stanza.source_version;
        }
    }
    newest
}

/// The smallest packages first, one for each source package.
fn one_of_each_source(mut stanzas: Vec<&Stanza>) -> Vec<Stanza> {
    stanzas.sort_by_key(|stanza| (stanza.size, stanza.digest.clone()));
    let mut seen = BTreeSet::new();
    stanzas.into_iter().filter(|stanza| seen.insert(stanza.source.clone())).cloned().collect()
}

/// What the machine has, by what is to become of it.
struct Cast {
    /// Vulnerable for three months: fixed in the security suite before it boots.
    holed: Vec<Stanza>,
    /// The same: a kernel whose package nobody has a newer version of, since the newer ones have other names.
    kernel: Stanza,
    /// Followed by another version in a point release.
    followed: Vec<(Stanza, Stanza)>,
    /// In no list any more.
    gone: Stanza,
    /// Current, until the last act.
    fine: Vec<Stanza>,
    /// Current, until a fix appears in the last act; with that fix.
    fixed_late: (Stanza, Stanza),
    /// Current, until a point release of the last act; with what follows it.
    followed_late: (Stanza, Stanza),
    /// What is in the security suite besides, as it is.
    security: Vec<Stanza>,
}

impl Cast {
    fn of(main: &[Stanza], security: &[Stanza]) -> Self {
        let fixes = newest(security);
        let fix_of = |stanza: &Stanza| {
            let newer = |fix: &&Stanza| fix.package == stanza.package && is_older(&stanza.version, &fix.version);
            security.iter().filter(newer).max_by(|a, b| compare(&a.version, &b.version).unwrap()).cloned()
        };
        let is_kernel = |stanza: &Stanza| stanza.package.starts_with("linux-");
        let is_vulnerable = |stanza: &Stanza| fixes.get(stanza.source.as_str()).is_some_and(|fix| is_older(&stanza.source_version, fix));
        let vulnerable = one_of_each_source(main.iter().filter(|stanza| is_vulnerable(stanza) && !is_kernel(stanza)).collect());
        let mut with_fix = vulnerable.iter().filter_map(|stanza| Some((stanza.clone(), fix_of(stanza)?)));
        let mut next = || with_fix.next().expect("bookworm has packages that its security suite fixes");
        let followed = vec![next(), next()];
        let (fixed_late, followed_late) = (next(), next());
        let holed: Vec<Stanza> = (0..3).map(|_| next().0).collect();
        let is_image = |stanza: &&Stanza| {
            let abi = stanza.package.strip_prefix("linux-image-").is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()));
            abi && is_vulnerable(stanza) && !security.iter().any(|newer| newer.package == stanza.package)
        };
        let kernel = main.iter().filter(is_image).min_by_key(|stanza| stanza.size).cloned().expect("bookworm has a kernel");
        let never_fixed = |stanza: &&Stanza| !fixes.contains_key(stanza.source.as_str());
        let mut quiet = one_of_each_source(main.iter().filter(never_fixed).collect()).into_iter();
        let gone = quiet.next().unwrap();
        let fine = quiet.take(3).collect();
        // What is to be current until the last act is not to be fixed before, nor what follows to be taken for a fix.
        let apart: BTreeSet<&str> = followed.iter().chain([&fixed_late, &followed_late]).map(|(old, _)| old.source.as_str()).collect();
        let security = security.iter().filter(|stanza| !apart.contains(stanza.source.as_str())).cloned().collect();
        Self { holed, kernel, followed, gone, fine, fixed_late, followed_late, security }
    }

    /// Everything that the machine downloads three months ago.
    fn cached(&self) -> Vec<&Stanza> {
        let of_pairs = self.followed.iter().chain([&self.fixed_late, &self.followed_late]).map(|(old, _)| old);
        self.holed.iter().chain([&self.kernel, &self.gone]).chain(&self.fine).chain(of_pairs).collect()
    }

    /// The archive's list in each act: three months ago, now, and after the last point release.
    fn main_in(&self, act: usize) -> Vec<&Stanza> {
        let mut list: Vec<&Stanza> = self.holed.iter().chain([&self.kernel]).chain(&self.fine).chain([&self.fixed_late.0]).collect();
        list.extend((act == 0).then_some(&self.gone));
        list.extend(self.followed.iter().map(|(old, new)| if act == 0 { old } else { new }));
        list.push(if act < 2 { &self.followed_late.0 } else { &self.followed_late.1 });
        list
    }

    /// The security suite's list in each act.
    fn security_in(&self, act: usize) -> Vec<&Stanza> {
        let mut list: Vec<&Stanza> = Vec::new();
        if act > 0 {
            list.extend(&self.security);
        }
        list.extend((act == 2).then_some(&self.fixed_late.1));
        list
    }
}

fn text(list: &[&Stanza]) -> String {
    list.iter().fold(String::new(), |text, stanza| text + stanza.text.trim_end() + "\n\n")
}

fn publish(crowd: &mut Crowd, cast: &Cast, act: usize, date_s: i64) {
    crowd.repo().publish_real("bookworm", "Debian", &text(&cast.main_in(act)), date_s, None);
    crowd.repo().publish_real("bookworm-security", "Debian-Security", &text(&cast.security_in(act)), date_s, Some(date_s + 7 * DAY_S));
}

/// A machine three months behind boots: with real packages that were fixed since, a kernel of an old ABI, packages that a point release
/// followed, and an object in no list. A watcher on the wire has every frame: nothing of any of them is announced or given before fresh
/// lists; after them only what they call current. Then a fix and a point release appear, and what they follow falls silent together.
#[test]
fn a_real_mirror_machine_three_months_behind_tells_nothing() {
    let upstream = Upstream::new();
    let cast = Cast::of(&real_list(&upstream, MAIN), &real_list(&upstream, SECURITY));
    let apt_conf = "Acquire::Check-Valid-Until \"false\";\n".to_owned();
    let terms = Terms { poolfs_toml: "announce = \"all\"\n".to_owned(), apt_conf, ..Terms::default() };
    let mut crowd = Crowd::new(2, Vec::new(), &terms);
    let now_s = i64::try_from(SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()).unwrap();
    for stanza in cast.cached() {
        upstream.have(&format!("/debian/{}", stanza.filename));
        let place = crowd.mirror_root().join(&stanza.filename);
        fs::create_dir_all(place.parent().unwrap()).unwrap();
        fs::copy(upstream.kept.join("debian").join(&stanza.filename), &place).unwrap();
    }
    publish(&mut crowd, &cast, 0, now_s - 90 * DAY_S);
    for machine in &crowd.machines {
        machine.edit_sources(|text| text.replace("Suites: stable", "Suites: bookworm bookworm-security"));
    }

    // Three months ago.
    up_at(&crowd.machines[0], -90 * DAY_S);
    up_at(&crowd.machines[1], -90 * DAY_S);
    crowd.await_acquainted(false);
    crowd.machines[0].update();
    let names: Vec<String> = cast.cached().iter().map(|stanza| format!("{}={}", stanza.package, stanza.version)).collect();
    let arguments: Vec<&str> = ["fetch"].into_iter().chain(names.iter().map(String::as_str)).collect();
    crowd.machines[0].poolfs(&arguments).ok();
    let count = cast.cached().len() as u64;
    await_status(&crowd.machines[0], "announces all", |status| status.node.as_ref().is_some_and(|node| node.announced_keys >= count));
    // An object: nothing in apt's directories is of it.
    let gone = &cast.gone;
    let file = listed_as(&crowd.machines[0].archives(), &gone.digest);
    fs::remove_file(crowd.machines[0].archives().join(file)).unwrap();
    crowd.machines[0].down();

    // It boots, now.
    publish(&mut crowd, &cast, 1, now_s - DAY_S / 24);
    let recorder = Recorder::start(&crowd.hosts[0], &crowd.machines[1].scratch());
    up_at(&crowd.machines[0], 0);
    crowd.await_acquainted(false);
    await_status(&crowd.machines[0], "has been up for a while", |status| status.uptime_s >= 8);
    for stanza in cast.cached() {
        assert!(!recorder.saw_key(&stanza.digest(), 0), "{} before fresh lists", stanza.package);
        assert_eq!(stranger_gets(&crowd, &stanza.digest), ["404"; 4], "{} before fresh lists", stanza.package);
    }
    assert!(recorder.announced(crowd.hosts[0].address, 0).is_empty(), "anything is announced before fresh lists");

    // Fresh lists.
    crowd.machines[0].update();
    let current: Vec<&Stanza> = cast.fine.iter().chain([&cast.fixed_late.0, &cast.followed_late.0]).collect();
    let keys: BTreeSet<[u8; 20]> = current.iter().map(|stanza| stanza.digest().file_key()).collect();
    let begun = Instant::now();
    while !keys.is_subset(&recorder.announced(crowd.hosts[0].address, 0)) {
        assert!(begun.elapsed() < LIMIT, "what is current is announced: {:?}", crowd.machines[0].status());
    }
    for stanza in &current {
        assert_eq!(stranger_gets(&crowd, &stanza.digest)[0], "200", "{}", stanza.package);
    }
    let silent: Vec<&Stanza> = cast.cached().into_iter().filter(|stanza| !keys.contains(&stanza.digest().file_key())).collect();
    for stanza in &silent {
        assert!(!recorder.saw_key(&stanza.digest(), 0), "{} after fresh lists", stanza.package);
        assert_eq!(stranger_gets(&crowd, &stanza.digest), ["404"; 4], "{} after fresh lists", stanza.package);
    }
    // What is announced is what is current, and lists that are indexes.
    let lists: BTreeSet<[u8; 20]> = indexes(&crowd.machines[0]).iter().map(|digest| digest.file_key()).collect();
    let announced = recorder.announced(crowd.hosts[0].address, 0);
    let others: Vec<&[u8; 20]> = announced.iter().filter(|key| !keys.contains(*key) && !lists.contains(*key)).collect();
    assert!(others.is_empty(), "{} other keys are announced", others.len());

    // A fix and a point release.
    publish(&mut crowd, &cast, 2, now_s);
    crowd.machines[0].update();
    let from = recorder.bytes();
    for stanza in [&cast.fixed_late.0, &cast.followed_late.0] {
        let begun = Instant::now();
        while stranger_gets(&crowd, &stanza.digest) != ["404"; 4] {
            assert!(begun.elapsed() < LIMIT, "{} does not fall silent", stanza.package);
        }
    }
    // Their withdrawal is the last that is heard of them.
    await_status(&crowd.machines[0], "withdraws both", |status| {
        status.node.as_ref().is_some_and(|node| node.announced_keys < keys.len() as u64 + lists.len() as u64)
    });
    let again = recorder.announced(crowd.hosts[0].address, from);
    for stanza in [&cast.fixed_late.0, &cast.followed_late.0] {
        assert!(!again.contains(&stanza.digest().file_key()), "{} is announced after its list changed", stanza.package);
    }
    for stanza in &cast.fine {
        assert_eq!(stranger_gets(&crowd, &stanza.digest)[0], "200", "{}", stanza.package);
    }
    report(
        "discretion::debian",
        &format!(
            "{} real packages of bookworm, {} of them vulnerable, superseded or unlisted: no key of those in any frame, the same 404 for each",
            cast.cached().len(),
            silent.len()
        ),
    );
}

/// Starts the daemon with its clock so far ahead of the system's.
fn up_at(machine: &Machine, ahead_s: i64) {
    run(machine.poolfs_command(&["up"]).env("POOLFS_CLOCK_OFFSET_S", ahead_s.to_string())).ok();
    machine.assert_mounted();
}

/// The file with this digest in a directory.
fn listed_as(directory: &Path, digest: &str) -> String {
    let names = crate::harness::listed(directory).into_iter().filter(|name| name.ends_with(".deb"));
    let digest_of = |name: &String| Digest::of(&fs::read(directory.join(name)).unwrap()).to_string();
    names.into_iter().find(|name| digest_of(name) == digest).expect("the package is in archives/")
}

/// The digests of everything in apt's lists, in the forms that are there and packed as the mirror has them.
fn indexes(machine: &Machine) -> BTreeSet<Digest> {
    let status = machine.poolfs(&["ls", "--json"]).ok().out;
    let rows: Vec<serde_json::Value> = status.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let not_packages = rows.iter().filter(|row| !row["name"].as_str().is_some_and(|name| name.ends_with(".deb")));
    not_packages.filter_map(|row| row["digest"].as_str()?.parse().ok()).collect()
}

// --- debsecan

/// Packages in the cache of the comparison.
const CACHED: usize = 500;

/// Of these, how many a real fix has overtaken, at most.
const OLD_MAX: usize = 120;

/// Serves one document for every path until it is dropped with the process.
fn serve(document: Vec<u8>) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let mut request = [0; 4096];
            let _ = stream.read(&mut request);
            let head = format!("HTTP/1.0 200 OK\r\nContent-Length: {}\r\n\r\n", document.len());
            let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(&document));
        }
    });
    url
}

/// Which of these packages debsecan calls vulnerable, with one entry for each version that the security suite has.
fn debsecan(cached: &[Stanza], security: &[Stanza], directory: &Path) -> BTreeSet<String> {
    let versions: BTreeSet<(&str, &str)> = security.iter().map(|fix| (fix.source.as_str(), fix.source_version.as_str())).collect();
    let mut text = String::from("VERSION 1\n");
    for n in 0..versions.len() {
        writeln!(text, "CVE-0000-{n:04},,a fix of bookworm-security").unwrap();
    }
    text.push('\n');
    for (n, (source, version)) in versions.iter().enumerate() {
        writeln!(text, "{source},{n},S  F,{version},").unwrap();
    }
    // Which binary packages a source has, for its report of obsolete ones: none are named.
    text.push_str("\n\n");
    let plain = directory.join("debsecan.txt");
    fs::write(&plain, &text).unwrap();
    let deflate = "import sys, zlib; sys.stdout.buffer.write(zlib.compress(open(sys.argv[1], 'rb').read()))";
    let packed = Command::new("python3").args(["-c", deflate]).arg(&plain).output().unwrap().stdout;
    let status = directory.join("status");
    let stanza = |stanza: &Stanza| {
        let lines = stanza
            .text
            .lines()
            .filter(|line| ["Package: ", "Version: ", "Source: ", "Architecture: "].iter().any(|name| line.starts_with(name)));
        format!("{}\nStatus: install ok installed\n", lines.collect::<Vec<_>>().join("\n"))
    };
    fs::write(&status, cached.iter().map(stanza).collect::<Vec<_>>().join("\n")).unwrap();
    let mut debsecan = Command::new("debsecan");
    debsecan.args(["--config", "/dev/null", "--suite", "bookworm", "--format", "packages", "--source", &serve(packed)]);
    debsecan
        .arg("--status")
        .arg(&status)
        .arg("--history")
        .arg(directory.join("history"))
        .arg("--whitelist")
        .arg(directory.join("whitelist"));
    let said = run(debsecan.env("no_proxy", "127.0.0.1").env_remove("http_proxy")).ok().out;
    said.lines().map(str::to_owned).collect()
}

/// A cache of 500 real packages of bookworm, as many of them overtaken by a fix as there are small ones: what poolfs withholds for a
/// security suite is what debsecan calls vulnerable, package by package.
#[test]
#[ignore = "fetches 500 packages: scripts/soak debsecan"]
fn debsecan_agrees_on_500_real_mirror_packages() {
    let upstream = Upstream::new();
    let (main, security) = (real_list(&upstream, MAIN), real_list(&upstream, SECURITY));
    let fixes = newest(&security);
    let is_old = |stanza: &&Stanza| fixes.get(stanza.source.as_str()).is_some_and(|fix| is_older(&stanza.source_version, fix));
    let smallest = |mut list: Vec<&Stanza>, count: usize| -> Vec<Stanza> {
        list.sort_by_key(|stanza| (stanza.size, stanza.digest.clone()));
        list.into_iter().take(count).cloned().collect()
    };
    let mut cached = smallest(main.iter().filter(is_old).collect(), OLD_MAX);
    let rest = CACHED - cached.len();
    cached.extend(smallest(main.iter().filter(|stanza| !is_old(stanza)).collect(), rest));
    assert_eq!(cached.len(), CACHED);

    let mirror = Mirror::debian(TcpListener::bind("127.0.0.1:0").unwrap());
    let machine = Machine::new(&Sources::DebianBehind(&mirror), &Options { apt: Apt::Own, ..Options::default() });
    machine.up();
    machine.update();
    for some in cached.chunks(100) {
        let names: Vec<String> = some.iter().map(|stanza| format!("{}={}", stanza.package, stanza.version)).collect();
        let arguments: Vec<&str> = ["fetch"].into_iter().chain(names.iter().map(String::as_str)).collect();
        machine.poolfs(&arguments).ok();
    }
    let listed = machine.poolfs(&["ls", "--json"]).ok().out;
    let files: Vec<serde_json::Value> = listed.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let mut withheld: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for stanza in &cached {
        let row = files.iter().find(|row| row["digest"] == stanza.digest.as_str());
        let row = row.unwrap_or_else(|| panic!("{} {} is not in the cache", stanza.package, stanza.version));
        if row["sharing"] == "withheld" {
            let file = machine.archives().join(row["name"].as_str().unwrap());
            let said = machine.poolfs(&["why", file.to_str().unwrap(), "--json"]).ok().out;
            let why: serde_json::Value = serde_json::from_str(&said).unwrap();
            let rule = why["rule"].as_str().unwrap().split(':').next().unwrap().to_owned();
            withheld.entry(rule).or_default().insert(stanza.package.clone());
        }
    }
    let vulnerable = debsecan(&cached, &security, &machine.scratch());
    let by_security = withheld.remove("security").unwrap_or_default();
    assert!(vulnerable.len() >= 20, "{} vulnerable: too few to compare", vulnerable.len());
    let only_debsecan: Vec<&String> = vulnerable.difference(&by_security).collect();
    let only_poolfs: Vec<&String> = by_security.difference(&vulnerable).collect();
    assert!(only_debsecan.is_empty() && only_poolfs.is_empty(), "only debsecan: {only_debsecan:?}; only poolfs: {only_poolfs:?}");
    // What else is withheld is no matter of debsecan's: a point release or an update has followed it.
    let others: Vec<String> =
        withheld.iter().map(|(rule, names)| format!("{rule}: {}", names.iter().cloned().collect::<Vec<_>>().join(" "))).collect();
    assert!(withheld.keys().all(|rule| rule == "superseded"), "{others:?}");
    let shown = format!(
        "{CACHED} real packages of bookworm: {} withheld for bookworm-security, the same that debsecan calls vulnerable; besides, unknown to debsecan: {}",
        by_security.len(),
        if others.is_empty() { "none".to_owned() } else { others.join("; ") }
    );
    eprintln!("{shown}");
    report("discretion::debsecan", &shown);
}
