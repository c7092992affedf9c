//! A suite with all kinds of indexes, a machine with poolfs and its twin without.

use crate::harness::process::Finished;
use crate::harness::repo::{SUITE, hex};
use crate::harness::{Apt, Client, Machine, Mirror, Options, Package, Repo, Sources, listed, run, workspace};
use rusqlite::{Connection, OpenFlags, OptionalExtension as _};
use sha2::{Digest as _, Sha256};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::process::Command;
use std::time::Duration;
use tempfile::TempDir;

/// What apt is to fetch besides Packages, Sources and translations.
const TARGETS: &str = r#"
Acquire::IndexTargets::deb::Contents-deb { MetaKey "$(COMPONENT)/Contents-$(ARCHITECTURE)"; ShortDescription "Contents"; Description "Contents"; };
Acquire::IndexTargets::deb::DEP-11 { MetaKey "$(COMPONENT)/dep11/Components-$(NATIVE_ARCHITECTURE).yml"; ShortDescription "c"; Description "c";
  KeepCompressed "true"; KeepCompressedAs "gz"; };
"#;

#[derive(Clone, Debug)]
pub(super) struct Settings {
    pub(super) apt: Apt,
    pub(super) gzip_indexes: bool,
    pub(super) packages: Vec<Package>,
    pub(super) apt_conf: String,
    pub(super) poolfs_toml: String,
}

impl Default for Settings {
    fn default() -> Self {
        Self { apt: Apt::Own, gzip_indexes: false, packages: Vec::new(), apt_conf: String::new(), poolfs_toml: String::new() }
    }
}

impl Settings {
    fn options(&self, targets: &str) -> Options {
        let gzip_indexes = self.gzip_indexes;
        let languages = "#clear Acquire::Languages;\nAcquire::Languages { \"en\"; };\n";
        let apt_conf = format!("{languages}Acquire::GzipIndexes \"{gzip_indexes}\";\n{targets}{}", self.apt_conf);
        Options { apt: self.apt, apt_conf, poolfs_toml: self.poolfs_toml.clone(), ..Options::default() }
    }
}

/// A local suite, and two machines that use it. Dropped in this order.
#[derive(Debug)]
pub(super) struct Scene {
    pub(super) machine: Machine,
    pub(super) twin: Machine,
    pub(super) mirror: Mirror,
    pub(super) repo: Repo,
    home: TempDir,
}

impl Scene {
    /// Nothing is published yet, and nothing mounted.
    pub(super) fn new(settings: &Settings) -> Self {
        let home = workspace();
        let mut repo = Repo::new(home.path());
        for package in &settings.packages {
            repo.add(package.clone());
        }
        let mirror = Mirror::new(repo.root());
        let options = settings.options(TARGETS);
        let make = || Machine::new(&Sources::Local(&repo, &mirror), &options);
        let (machine, twin) = (make(), make());
        let scene = Self { machine, twin, mirror, repo, home };
        scene.edit_sources(|text| text.replace("Types: deb\n", "Types: deb deb-src\n"));
        scene
    }

    pub(super) fn up(&self) {
        self.machine.up();
    }

    /// Publishes the suite: every index of a generation differs from that of any other.
    pub(super) fn publish(&mut self, generation: u32) {
        let mut files = BTreeMap::new();
        for component in ["main", "contrib"] {
            let mut packages = packages(component, generation, 200);
            if component == "main" {
                write!(packages, "\n{}", self.repo.stanzas()).unwrap();
            }
            let mut add = |name: &str, text: String| files.insert(format!("{component}/{name}"), text.into_bytes());
            add("binary-amd64/Packages", packages);
            for language in ["en", "de"] {
                add(&format!("i18n/Translation-{language}"), translation(component, generation, language));
            }
            add("Contents-amd64", lines(component, generation, "usr/bin/p", " x/p"));
            add("dep11/Components-amd64.yml", lines(component, generation, "--- p", ""));
            add("source/Sources", sources(component, generation));
            add("installer-amd64/images.txt", lines(component, generation, "not for apt", ""));
        }
        self.repo.publish_files("main contrib", &files, &BTreeMap::new());
    }

    /// Changes the sources of both machines.
    pub(super) fn edit_sources(&self, edit: impl Fn(String) -> String) {
        self.machine.edit_sources(&edit);
        self.twin.edit_sources(&edit);
    }

    /// `apt-get update` here and at the twin. Both must work and leave the same lists. Returns what apt said here.
    #[track_caller]
    pub(super) fn update_both(&self, more: &[&str]) -> Finished {
        let finished = self.run_both(more).ok();
        assert!(!finished.err.contains("\nW: ") && !finished.err.contains("\nE: "), "warnings: {finished}");
        finished
    }

    /// The same without asking that it works: as the twin's apt, so this one's.
    #[track_caller]
    pub(super) fn run_both(&self, more: &[&str]) -> Finished {
        self.mirror.forget_log();
        run_both(&self.machine, &self.twin, more)
    }

    /// Fails if apt asked for anything but Release files.
    #[track_caller]
    pub(super) fn assert_only_releases(&self, finished: &Finished) {
        assert_only_releases(finished);
    }

    /// Paths that a client has asked for since the last update began, each once.
    pub(super) fn asked(&self, client: Client) -> Vec<String> {
        let mut paths: Vec<String> =
            self.mirror.log().into_iter().filter(|request| request.client == client).map(|request| request.path).collect();
        paths.sort_unstable();
        paths.dedup();
        paths
    }

    /// The statuses that the mirror has answered a client.
    pub(super) fn answers(&self, client: Client) -> Vec<u16> {
        self.mirror.log().iter().filter(|request| request.client == client).map(|request| request.status).collect()
    }

    pub(super) fn lists(&self) -> BTreeMap<String, Vec<u8>> {
        lists(&self.machine)
    }

    pub(super) fn forget_lists(&self) {
        forget_lists(&self.machine);
        forget_lists(&self.twin);
    }

    /// The name in `lists/` of a path below the suite.
    pub(super) fn list_name(&self, path: &str) -> String {
        let host = self.mirror.url().replace("http://", "");
        format!("{host}_dists_{SUITE}_{}", path.replace('/', "_"))
    }

    /// A file of the suite as it is published now.
    pub(super) fn suite_file(&self, path: &str) -> Vec<u8> {
        fs::read(self.repo.root().join("dists").join(SUITE).join(path)).unwrap()
    }

    /// Digests of the published files that end so, sorted.
    pub(super) fn suite_digests(&self, ends_with: &str, wanted: impl Fn(&str) -> bool) -> Vec<String> {
        let root = self.repo.root().join("dists").join(SUITE);
        let found =
            run(Command::new("find").arg(&root).args(["-type", "f", "-name", &format!("*{ends_with}"), "-printf", "%P\\n"])).ok().out;
        let mut digests: Vec<String> = found.lines().filter(|path| wanted(path)).map(|path| digest(&self.suite_file(path))).collect();
        digests.sort_unstable();
        digests
    }

    /// The objects of the machine, whose poolfs has ended: digest, kind and sharing. Each has the bytes of its name.
    pub(super) fn objects(&self) -> BTreeMap<String, (String, String)> {
        let db = self.database();
        let mut statement = db.prepare("SELECT lower(hex(digest)), kind, sharing FROM objects").unwrap();
        let rows = statement.query_map([], |row| Ok((row.get(0)?, (row.get(1)?, row.get(2)?)))).unwrap();
        let objects: BTreeMap<String, (String, String)> = rows.map(Result::unwrap).collect();
        for name in objects.keys() {
            assert_eq!(digest(&fs::read(self.machine.cache_dir().join("objects").join(name)).unwrap()), *name);
        }
        objects
    }

    /// Digest and sharing of a file in `lists/`, as the database has them.
    pub(super) fn recorded(&self, name: &str) -> Option<(String, String)> {
        let sql = "SELECT lower(hex(digest)), sharing FROM files WHERE role = 'lists' AND path = ?";
        self.database().query_row(sql, [name.as_bytes()], |row| Ok((row.get(0)?, row.get(1)?))).optional().unwrap()
    }

    fn database(&self) -> Connection {
        let db = Connection::open_with_flags(self.machine.state_dir().join("poolfs.db"), OpenFlags::SQLITE_OPEN_READ_WRITE).unwrap();
        db.busy_timeout(Duration::from_secs(30)).unwrap();
        db
    }

    /// A directory that no machine uses.
    pub(super) fn scratch(&self) -> std::path::PathBuf {
        let path = self.home.path().join("scratch");
        fs::create_dir_all(&path).unwrap();
        path
    }
}

/// Two machines that use the real mirror.
#[derive(Debug)]
pub(super) struct Real {
    pub(super) machine: Machine,
    twin: Machine,
}

impl Real {
    pub(super) fn new(settings: &Settings) -> Self {
        let options = settings.options("");
        let make = || Machine::new(&Sources::Debian, &options);
        let real = Self { machine: make(), twin: make() };
        real.machine.up();
        real
    }

    #[track_caller]
    pub(super) fn update_both(&self) -> Finished {
        run_both(&self.machine, &self.twin, &[]).ok()
    }

    /// Fails if apt asked for anything but Release files; how many it asked for.
    #[track_caller]
    pub(super) fn assert_only_releases(&self, finished: &Finished) -> u64 {
        assert_only_releases(finished)
    }

    pub(super) fn forget_lists(&self) {
        forget_lists(&self.machine);
        forget_lists(&self.twin);
    }
}

#[track_caller]
fn run_both(machine: &Machine, twin: &Machine, more: &[&str]) -> Finished {
    let arguments: Vec<&str> = more.iter().copied().chain(["update"]).collect();
    let here = machine.apt_get(&arguments);
    let there = twin.apt_get(&arguments);
    assert_eq!(here.code(), there.code(), "{here}\nwithout poolfs: {there}");
    machine.await_catalog();
    let (here_lists, there_lists) = (lists(machine), lists(twin));
    assert_eq!(here_lists.keys().collect::<Vec<_>>(), there_lists.keys().collect::<Vec<_>>(), "{here}\nwithout poolfs: {there}");
    for (name, bytes) in &here_lists {
        assert!(
            bytes == &there_lists[name],
            "{name} differs from that of plain apt: {} and {} bytes",
            bytes.len(),
            there_lists[name].len()
        );
    }
    // When one of several fails, how far the others come is chance.
    if here.code() == 0 {
        assert_eq!(listed(&machine.lists().join("partial")), listed(&twin.lists().join("partial")), "{here}");
    }
    here
}

#[track_caller]
fn assert_only_releases(finished: &Finished) -> u64 {
    let gets = finished.gets();
    assert!(!gets.is_empty() && gets.iter().all(|path| path.ends_with("/InRelease")), "apt fetched by itself: {gets:#?}");
    gets.len() as u64
}

/// Every file in `lists/` with its bytes.
fn lists(machine: &Machine) -> BTreeMap<String, Vec<u8>> {
    let directory = machine.lists();
    let names = listed(&directory).into_iter().filter(|name| !["lock", "partial", "auxfiles"].contains(&name.as_str()));
    names.map(|name| (name.clone(), fs::read(directory.join(&name)).unwrap())).collect()
}

fn forget_lists(machine: &Machine) {
    for name in lists(machine).keys() {
        fs::remove_file(machine.lists().join(name)).unwrap();
    }
}

/// SHA-256 in lower-case hex.
pub(super) fn digest(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

/// What a machine with one component and one language has of it.
pub(super) fn index_names() -> [&'static str; 5] {
    ["binary-amd64/Packages", "i18n/Translation-en", "Contents-amd64", "dep11/Components-amd64.yml", "source/Sources"]
}

/// Stanzas of packages that are nowhere.
pub(super) fn packages(component: &str, generation: u32, count: u32) -> String {
    let mut text = String::new();
    for number in 0..count {
        // Most of a list stays the same from one generation to the next.
        let version = if number % 50 == generation % 50 { generation } else { 0 };
        let sum = digest(format!("{component} {number} {version}").as_bytes());
        let name = format!("p{number}-{component}");
        writeln!(text, "Package: {name}\nVersion: 1.{version}\nArchitecture: amd64\nMaintainer: poolfs test <test@example.invalid>")
            .unwrap();
        writeln!(text, "Description: package number {number}\nDescription-md5: {}", &sum[..32]).unwrap();
        writeln!(text, "Filename: pool/{component}/{name}_1.{version}_amd64.deb\nSize: {}\nSHA256: {sum}\n", 1000 + number).unwrap();
    }
    text.pop();
    text
}

fn translation(component: &str, generation: u32, language: &str) -> String {
    let sum = digest(format!("{component} {generation} {language}").as_bytes());
    format!("Package: p0-{component}\nDescription-md5: {}\nDescription-{language}: text {generation}\n", &sum[..32])
}

fn lines(component: &str, generation: u32, before: &str, after: &str) -> String {
    (0..300).fold(String::new(), |mut text, number| {
        writeln!(text, "{before}{}{after}{component}", number * generation).unwrap();
        text
    })
}

fn sources(component: &str, generation: u32) -> String {
    let sum = digest(format!("{component} {generation} source").as_bytes());
    format!(
        "Package: p0-{component}\nBinary: p0-{component}\nVersion: 1.{generation}\nArchitecture: any\nFormat: 3.0 (native)\n\
         Directory: pool/{component}/p0\nChecksums-Sha256:\n {sum} 100 p0_1.{generation}.dsc\n"
    )
}
