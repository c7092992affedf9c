#![allow(clippy::unwrap_used, reason = "tests")]
mod arrivals;
mod facts;

use super::apt_config::{Environment, Options};
use super::*;
use std::fs::File;
use std::io::Write as _;
use std::os::fd::AsFd as _;
use std::path::PathBuf;

const INRELEASE: &str = "h_debian_dists_s_InRelease";
const PACKAGES: &str = "h_debian_dists_s_c_binary-amd64_Packages";
const ONE_SOURCE: &str = "deb http://h/debian s c\n";

/// Directories and a catalog of their own.
struct Machine {
    directory: tempfile::TempDir,
    catalog: Catalog,
}

impl Machine {
    fn new(sources: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir(directory.path().join("lists")).unwrap();
        std::fs::write(directory.path().join("sources.list"), sources).unwrap();
        let catalog = Self::open(&directory);
        Self { directory, catalog }
    }

    fn apt(directory: &tempfile::TempDir) -> AptConfig {
        AptConfig::of_options(Options::parse("APT::Architecture amd64\n"), &[directory.path().join("sources.list")], Environment::default())
    }

    fn open(directory: &tempfile::TempDir) -> Catalog {
        let db = Db::open(&directory.path().join("poolfs.db")).unwrap();
        Catalog::open(Arc::new(db), Self::apt(directory)).unwrap()
    }

    fn restart(self) -> Self {
        let Self { directory, catalog } = self;
        drop(catalog);
        let catalog = Self::open(&directory);
        Self { directory, catalog }
    }

    fn configure(&self, sources: &str) {
        std::fs::write(self.directory.path().join("sources.list"), sources).unwrap();
        self.catalog.configure(Self::apt(&self.directory));
    }

    fn list(&self, name: &str) -> PathBuf {
        self.directory.path().join("lists").join(name)
    }

    /// Puts a new file in place by rename, as apt does: another inode even if size and time are the same.
    fn write(&self, name: &str, bytes: impl AsRef<[u8]>) {
        let partial = self.directory.path().join("partial");
        std::fs::write(&partial, bytes).unwrap();
        // The inode of the file that is replaced must not be given to the next one.
        drop(std::fs::rename(self.list(name), self.directory.path().join(format!("old {name}"))));
        std::fs::rename(partial, self.list(name)).unwrap();
    }

    fn remove(&self, name: &str) {
        std::fs::remove_file(self.list(name)).unwrap();
    }

    fn refresh(&self, vanished: Vanished) -> Refreshed {
        let lists = File::open(self.directory.path().join("lists")).unwrap();
        self.catalog.refresh(lists.as_fd(), vanished).unwrap()
    }

    /// Refreshes and checks lists parsed, kept and dropped, and that there is no problem.
    fn refreshed(&self, vanished: Vanished, parsed: u64, kept: u64, dropped: u64) {
        let done = self.refresh(vanished);
        assert_eq!((done.parsed, done.kept, done.dropped, done.problems), (parsed, kept, dropped, vec![]));
    }

    fn archive(&self, name: &str) -> Option<Entry> {
        self.catalog.archive(name.as_bytes()).unwrap()
    }

    fn urls(&self, name: &str) -> Vec<String> {
        self.archive(name).map(|entry| entry.urls.into_iter().map(|url| url.url).collect()).unwrap_or_default()
    }
}

fn digest(letter: char) -> Digest {
    letter.to_string().repeat(64).parse().unwrap()
}

fn stanza(package: &str, version: &str, letter: char) -> String {
    let file = format!("{package}_{}_amd64.deb", version.rsplit(':').next().unwrap());
    let digest = digest(letter);
    format!(
        "Package: {package}\nVersion: {version}\nArchitecture: amd64\nFilename: pool/c/{file}\nSize: 1{}\nSHA256: {digest}\n\n",
        version.len()
    )
}

fn release(day: u32) -> String {
    format!("Origin: x\nSuite: s\nDate: Thu, {day:02} Jan 1970 00:00:00 UTC\nSHA256:\n")
}

/// Everything an entry says, from a list that was just fetched.
#[test]
fn a_list_is_found_by_name_and_digest() {
    let machine = Machine::new(ONE_SOURCE);
    assert!(machine.catalog.is_empty());
    machine.write(INRELEASE, release(2));
    machine.write(PACKAGES, stanza("hello+x", "1:2~b", 'a') + &stanza("world", "1", 'b'));
    machine.refreshed(Vanished::Drop, 1, 0, 0);
    let want = Entry {
        name: "hello+x_1%3a2~b_amd64.deb".to_owned(),
        digest: digest('a'),
        size: 15,
        date: 86_400,
        urls: vec![MirrorUrl {
            url: "http://h/debian/pool/c/hello%2bx_2%7eb_amd64.deb".to_owned(),
            proxy: None,
            immutable: true,
            private: false,
        }],
        package: "hello+x".to_owned(),
        version: "1:2~b".to_owned(),
        private: false,
    };
    assert_eq!(machine.archive(&want.name).as_ref(), Some(&want));
    assert_eq!(machine.catalog.by_digest(&digest('a')).unwrap(), Some(want));
    assert_eq!(machine.catalog.by_digest(&digest('c')).unwrap(), None);
    assert_eq!(machine.archive("hello"), None);
    assert_eq!(machine.archive(""), None);
    assert_eq!(machine.catalog.archive(b"\xff").unwrap(), None);
    assert_eq!(machine.catalog.len(), 2);
}

/// A restart that parsed again would take the start's time; a change that was missed would show old names.
#[test]
fn only_what_changed_is_read_again() {
    let machine = Machine::new(ONE_SOURCE);
    machine.write(INRELEASE, release(2));
    machine.write(PACKAGES, stanza("hello", "1", 'a'));
    machine.refreshed(Vanished::Drop, 1, 0, 0);
    machine.refreshed(Vanished::Drop, 0, 1, 0);
    let machine = machine.restart();
    assert_eq!(machine.catalog.len(), 1);
    machine.refreshed(Vanished::Drop, 0, 1, 0);
    assert_eq!(machine.archive("hello_1_amd64.deb").unwrap().date, 86_400);

    machine.write(INRELEASE, release(3));
    machine.refreshed(Vanished::Drop, 0, 1, 0);
    assert_eq!(machine.archive("hello_1_amd64.deb").unwrap().date, 2 * 86_400, "a new Release dates the old list");

    machine.write(PACKAGES, stanza("hello", "2", 'b'));
    machine.refreshed(Vanished::Drop, 1, 0, 0);
    assert_eq!((machine.archive("hello_1_amd64.deb"), machine.catalog.len()), (None, 1));
    assert_eq!(machine.archive("hello_2_amd64.deb").unwrap().digest, digest('b'));
}

/// apt keeps lists in any of these forms, and reads the plain one first.
#[test]
fn every_form_is_found() {
    let machine = Machine::new(ONE_SOURCE);
    for (ending, bytes) in [
        (".gz", &include_bytes!("testdata/Packages.gz")[..]),
        (".xz", include_bytes!("testdata/Packages.xz")),
        (".bz2", include_bytes!("testdata/Packages.bz2")),
        (".lz4", include_bytes!("testdata/Packages.lz4")),
        (".zst", include_bytes!("testdata/Packages.zst")),
        (".lzma", include_bytes!("testdata/Packages.lzma")),
    ] {
        let name = format!("{PACKAGES}{ending}");
        machine.write(&name, bytes);
        machine.refreshed(Vanished::Drop, 1, 0, 0);
        assert_eq!(machine.catalog.len(), 4, "{ending}");
        assert_eq!(machine.archive("g++_4%3a12.2.0-3_amd64.deb").unwrap().size, 1356, "{ending}");
        machine.remove(&name);
        machine.refreshed(Vanished::Drop, 0, 0, 1);
        assert!(machine.catalog.is_empty());
    }
    machine.write(&format!("{PACKAGES}.gz"), include_bytes!("testdata/Packages.gz"));
    machine.write(PACKAGES, stanza("plain", "1", 'a'));
    machine.refreshed(Vanished::Drop, 1, 0, 0);
    assert_eq!(machine.catalog.len(), 1);
}

/// Within an update lists disappear for a moment: what they named must stay until its end.
#[test]
fn vanished_lists_are_kept_until_they_are_dropped() {
    let machine = Machine::new(ONE_SOURCE);
    machine.write(INRELEASE, release(2));
    machine.write(PACKAGES, stanza("hello", "1", 'a'));
    machine.refreshed(Vanished::Drop, 1, 0, 0);
    machine.remove(PACKAGES);
    machine.remove(INRELEASE);
    machine.refreshed(Vanished::Keep, 0, 1, 0);
    let entry = machine.archive("hello_1_amd64.deb").unwrap();
    assert_eq!((entry.date, entry.urls.len()), (86_400, 1));
    machine.refreshed(Vanished::Drop, 0, 0, 1);
    assert_eq!((machine.archive("hello_1_amd64.deb"), machine.catalog.len()), (None, 0));
    let rows: i64 = machine.catalog.db.reader().unwrap().query_row("SELECT count(*) FROM packages", [], |row| row.get(0)).unwrap();
    assert_eq!(rows, 0);
}

/// One broken file must cost nothing but itself, and the message must say which and what helps.
#[test]
fn a_bad_list_is_a_problem_and_the_others_are_read() {
    let machine = Machine::new("deb http://h/debian s c\ndeb http://other/ s c\n");
    machine.write(INRELEASE, release(2));
    machine.write(&format!("{PACKAGES}.gz"), include_bytes!("testdata/Packages.gz"));
    machine.refreshed(Vanished::Drop, 1, 0, 0);
    machine.write(&format!("{PACKAGES}.gz"), &include_bytes!("testdata/Packages.gz")[..1000]);
    machine.write(INRELEASE, "garbage");
    machine.write("other_dists_s_c_binary-amd64_Packages", stanza("hello", "1", 'a') + &stanza("../x", "1", 'a'));
    std::os::unix::fs::symlink("/etc/passwd", machine.list("other_dists_s_c_binary-all_Packages")).unwrap();
    std::fs::create_dir(machine.list("other_dists_s_InRelease")).unwrap();
    let done = machine.refresh(Vanished::Drop);
    assert_eq!((done.parsed, done.kept, done.dropped), (1, 1, 0));
    assert_eq!(
        done.problems,
        [
            "lists/h_debian_dists_s_InRelease: is not one deb822 stanza; run `apt-get update`",
            "lists/other_dists_s_InRelease: is no regular file; run `apt-get update`",
            "lists/h_debian_dists_s_c_binary-amd64_Packages.gz: incomplete deflate stream; run `apt-get update`",
            "lists/other_dists_s_c_binary-amd64_Packages: 1 packages left out (../x: a / in its name, version or architecture); \
             run `apt-get update`, or tell the repository",
            "lists/other_dists_s_c_binary-all_Packages: is a symbolic link; run `apt-get update`",
        ]
    );
    assert_eq!(done.missing, ["http://other/ s"]);
    let kept = machine.archive("g++_4%3a12.2.0-3_amd64.deb").unwrap();
    assert_eq!(kept.date, 86_400, "what was known before stays, with its date");
    assert!(machine.archive("hello_1_amd64.deb").is_some());
    assert_eq!(machine.catalog.len(), 5);
}

/// Wrong bytes under a right name: two repositories that build the same version differently.
#[test]
fn a_name_with_two_digests_is_never_guessed() {
    let machine = Machine::new("deb http://one/ s c\ndeb http://two/ s c\n");
    machine.write("one_dists_s_c_binary-amd64_Packages", stanza("same", "1", 'a') + &stanza("differs", "1", 'b'));
    machine.write("two_dists_s_c_binary-amd64_Packages", stanza("differs", "1", 'c') + &stanza("same", "1", 'a'));
    machine.refreshed(Vanished::Drop, 2, 0, 0);
    assert_eq!(machine.archive("differs_1_amd64.deb"), None);
    let candidates = machine.catalog.candidates(b"differs_1_amd64.deb").unwrap();
    let shown: Vec<_> = candidates.iter().map(|entry| (entry.digest, entry.urls[0].url.as_str())).collect();
    let file = "pool/c/differs_1_amd64.deb";
    assert_eq!(shown, [(digest('b'), format!("http://one/{file}").as_str()), (digest('c'), format!("http://two/{file}").as_str())]);
    let file = "pool/c/same_1_amd64.deb";
    assert_eq!(machine.urls("same_1_amd64.deb"), [format!("http://one/{file}"), format!("http://two/{file}")], "alternatives");
    machine.configure("deb http://two/ s c\ndeb http://one/ s c\n");
    assert_eq!(
        machine.urls("same_1_amd64.deb"),
        [format!("http://two/{file}"), format!("http://one/{file}")],
        "in the order of the sources"
    );
}

/// The digest that differs may be in a row that is not looked at any more.
#[test]
fn a_name_in_too_many_rows_is_never_guessed() {
    let machine = Machine::new(ONE_SOURCE);
    machine.write(PACKAGES, stanza("same", "1", 'a').repeat(ROWS_MAX));
    machine.refreshed(Vanished::Drop, 1, 0, 0);
    assert_eq!(machine.urls("same_1_amd64.deb"), ["http://h/debian/pool/c/same_1_amd64.deb"]);
    machine.write(PACKAGES, stanza("same", "1", 'a').repeat(ROWS_MAX) + &stanza("same", "1", 'b'));
    machine.refreshed(Vanished::Drop, 1, 0, 0);
    assert_eq!(machine.archive("same_1_amd64.deb"), None);
}

/// The same bytes as a package of another name, in a repository that is private.
#[test]
fn one_digest_under_two_names() {
    let machine = Machine::new("deb http://open/ s c\ndeb http://u:p@secret/ s c\n");
    machine.write("open_dists_s_c_binary-amd64_Packages", stanza("hello", "1", 'a'));
    machine.write("secret_dists_s_c_binary-amd64_Packages", stanza("hallo", "1", 'a'));
    machine.refreshed(Vanished::Drop, 2, 0, 0);
    let entry = machine.catalog.by_digest(&digest('a')).unwrap().unwrap();
    assert_eq!((entry.name.as_str(), entry.private, entry.urls.len()), ("hello_1_amd64.deb", true, 2));
}

/// What a private repository names must stay private, also when its source is gone or another has the same file; and no
/// password may get into the database.
#[test]
fn private_repositories_stay_private() {
    let machine = Machine::new("deb http://user:hunter2@secret/ s c\ndeb http://open/ s c\n");
    machine.write("secret_dists_s_c_binary-amd64_Packages", stanza("own", "1", 'a') + &stanza("both", "1", 'b'));
    machine.write("open_dists_s_c_binary-amd64_Packages", stanza("both", "1", 'b') + &stanza("free", "1", 'c'));
    machine.refreshed(Vanished::Drop, 2, 0, 0);
    let private =
        |name: &str| machine.archive(name).map(|entry| (entry.private, entry.urls.iter().map(|url| url.private).collect::<Vec<_>>()));
    assert_eq!(private("own_1_amd64.deb"), Some((true, vec![true])));
    assert_eq!(private("both_1_amd64.deb"), Some((true, vec![true, false])));
    assert_eq!(private("free_1_amd64.deb"), Some((false, vec![false])));
    assert_eq!(machine.urls("own_1_amd64.deb"), ["http://user:hunter2@secret/pool/c/own_1_amd64.deb"]);
    assert!(!format!("{:?}", machine.archive("own_1_amd64.deb")).contains("hunter2"));
    machine.configure("deb http://open/ s c\n");
    machine.refreshed(Vanished::Keep, 0, 2, 0);
    assert_eq!(private("own_1_amd64.deb"), Some((true, vec![])));
    assert_eq!(private("both_1_amd64.deb"), Some((true, vec![false])));
    let machine = machine.restart();
    for entry in std::fs::read_dir(machine.directory.path()).unwrap() {
        let path = entry.unwrap().path();
        if path.file_name().unwrap().to_string_lossy().starts_with("poolfs.db") {
            let bytes = std::fs::read(&path).unwrap();
            assert!(!bytes.windows(7).any(|window| window == b"hunter2"), "{}", path.display());
        }
    }
}

/// Half a list after a crash: its rows must never be seen, and must not stay for ever.
#[test]
fn rows_of_an_interrupted_refresh_are_invisible_and_removed() {
    let machine = Machine::new("deb http://one/ s c\ndeb http://two/ s c\n");
    machine.write("one_dists_s_c_binary-amd64_Packages", stanza("hello", "1", 'a'));
    machine.write("two_dists_s_c_binary-amd64_Packages", stanza("world", "1", 'b'));
    machine.refreshed(Vanished::Drop, 2, 0, 0);
    let half = |id: i64| {
        let sql = "INSERT INTO packages SELECT ?1, 'half_1_amd64.deb', digest, size, path, package, version, source FROM packages LIMIT 1";
        machine.catalog.db.writer().execute(sql, [id]).unwrap();
    };
    [0, 1000, 5000, 1_000_000].into_iter().for_each(half);
    assert_eq!(machine.archive("half_1_amd64.deb"), None);
    assert_eq!(machine.catalog.by_digest(&digest('a')).unwrap().unwrap().urls.len(), 1);
    machine.write("two_dists_s_c_binary-amd64_Packages", stanza("world", "2", 'c'));
    machine.refreshed(Vanished::Drop, 1, 1, 0);
    assert_eq!(machine.archive("half_1_amd64.deb"), None);
    let machine = machine.restart();
    let rows: i64 = machine.catalog.db.reader().unwrap().query_row("SELECT count(*) FROM packages", [], |row| row.get(0)).unwrap();
    assert_eq!(rows, 2);
    assert!(machine.archive("hello_1_amd64.deb").is_some() && machine.archive("world_2_amd64.deb").is_some());
}

/// Source packages are shared by digest and have no name that apt looks up.
#[test]
fn source_packages_are_found_by_digest_only() {
    let machine = Machine::new("deb-src http://h/debian s c\n");
    let sources = format!(
        "Package: hello\nVersion: 1\nDirectory: pool/c/hello\nChecksums-Sha256:\n {} 7 hello_1.dsc\n {} 8 hello_1.tar.xz\n\n",
        digest('d'),
        digest('e')
    );
    machine.write("h_debian_dists_s_c_source_Sources.gz", {
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(sources.as_bytes()).unwrap();
        gzip.finish().unwrap()
    });
    machine.refreshed(Vanished::Drop, 1, 0, 0);
    assert_eq!(machine.archive("hello_1.dsc"), None);
    let entry = machine.catalog.by_digest(&digest('e')).unwrap().unwrap();
    assert_eq!((entry.name.as_str(), entry.size, entry.package.as_str()), ("hello_1.tar.xz", 8, "hello"));
    assert_eq!(entry.urls[0].url, "http://h/debian/pool/c/hello/hello_1.tar.xz");
}

/// Deltas start from another version of the same package, not of one whose name starts alike.
#[test]
fn versions_of_a_package() {
    let machine = Machine::new(ONE_SOURCE);
    let names = [("a", "1"), ("a", "1:0"), ("a-b", "1"), ("ab", "1"), ("a_b", "1"), ("a+", "1"), ("b", "1")];
    machine
        .write(PACKAGES, names.iter().zip('0'..).map(|((package, version), digest)| stanza(package, version, digest)).collect::<String>());
    machine.refreshed(Vanished::Drop, 1, 0, 0);
    let versions =
        |package: &str| -> Vec<String> { machine.catalog.versions(package).unwrap().into_iter().map(|entry| entry.name).collect() };
    assert_eq!(versions("a"), ["a_1%3a0_amd64.deb", "a_1_amd64.deb"]);
    assert_eq!(versions("a_b"), ["a%5fb_1_amd64.deb"]);
    assert_eq!(versions("a+"), ["a+_1_amd64.deb"]);
    assert_eq!(versions(""), Vec::<String>::new());
}

/// More than one transaction's rows, and a list that shrinks to nothing.
#[test]
fn long_and_empty_lists() {
    let machine = Machine::new("deb http://h/debian s c d\n");
    let many: String = (0..10_000).map(|number| stanza(&format!("p{number}"), "1", 'a')).collect();
    machine.write(PACKAGES, &many);
    machine.write("h_debian_dists_s_d_binary-amd64_Packages", "");
    machine.refreshed(Vanished::Drop, 2, 0, 0);
    assert_eq!(machine.catalog.len(), 10_000);
    assert!(machine.archive("p9999_1_amd64.deb").is_some());
    machine.write(PACKAGES, "");
    machine.refreshed(Vanished::Drop, 1, 1, 0);
    assert_eq!(machine.catalog.len(), 0);
    machine.write("h_debian_dists_s_d_binary-amd64_Packages", &many);
    machine.refreshed(Vanished::Drop, 1, 1, 0);
    let machine = machine.restart();
    machine.refreshed(Vanished::Drop, 0, 2, 0);
    assert_eq!(machine.catalog.len(), 10_000);
}

/// A reader in the middle of a refresh must see the old list or the new one: a package that is missing for a moment is one
/// that apt is told does not exist, and one with two digests is not delivered.
#[test]
fn readers_see_the_old_list_or_the_new_one() {
    let machine = Machine::new(ONE_SOURCE);
    let list = |letter: char| -> String { (0..9000).map(|number| stanza(&format!("p{number}"), "1", letter)).collect() };
    machine.write(PACKAGES, list('a'));
    machine.refreshed(Vanished::Drop, 1, 0, 0);
    let done = std::sync::atomic::AtomicBool::new(false);
    let seen = std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut seen = vec![digest('a')];
            loop {
                let last = done.load(Ordering::Acquire);
                for name in ["p0_1_amd64.deb", "p8999_1_amd64.deb"] {
                    let candidates = machine.catalog.candidates(name.as_bytes()).unwrap();
                    assert_eq!(candidates.len(), 1, "{name}: {candidates:?}");
                    if seen.last() != Some(&candidates[0].digest) {
                        seen.push(candidates[0].digest);
                    }
                }
                if last {
                    return seen;
                }
            }
        });
        for letter in ['b', 'c'] {
            machine.write(PACKAGES, list(letter));
            machine.refreshed(Vanished::Drop, 1, 0, 0);
        }
        done.store(true, Ordering::Release);
        reader.join().unwrap()
    });
    let mut ordered = seen.clone();
    ordered.sort_unstable();
    ordered.dedup();
    assert_eq!((seen.last(), &seen), (Some(&digest('c')), &ordered), "never back to an older list");
}

/// Repositories without an InRelease have a Release beside its signature; a suite may change from one to the other.
#[test]
fn a_release_without_inrelease_counts() {
    let machine = Machine::new(ONE_SOURCE);
    machine.write("h_debian_dists_s_Release", release(2));
    machine.write(PACKAGES, stanza("hello", "1", 'a'));
    assert_eq!(machine.refresh(Vanished::Drop).missing, Vec::<String>::new());
    assert_eq!(machine.archive("hello_1_amd64.deb").unwrap().date, 86_400);
    machine.write(INRELEASE, release(3));
    machine.remove("h_debian_dists_s_Release");
    machine.refreshed(Vanished::Drop, 0, 1, 0);
    assert_eq!(machine.archive("hello_1_amd64.deb").unwrap().date, 2 * 86_400);
    machine.remove(INRELEASE);
    assert_eq!(machine.refresh(Vanished::Drop).missing, ["http://h/debian/ s"]);
    assert_eq!(machine.archive("hello_1_amd64.deb").unwrap().date, 0);
}
