//! What Release files and pdiff Indexes name, from their arrival to their end.

use super::*;

/// The part of `apt-config dump` that says which indexes apt wants.
const DUMP: &str = "APT::Architecture amd64
Acquire::CompressionTypes::xz xz
Acquire::CompressionTypes::gz gzip
Acquire::IndexTargets::deb::Packages::MetaKey $(COMPONENT)/binary-$(ARCHITECTURE)/Packages
Acquire::IndexTargets::deb::Packages::flatMetaKey Packages
Acquire::IndexTargets::deb::Translations::MetaKey $(COMPONENT)/i18n/Translation-$(LANGUAGE)
Acquire::IndexTargets::deb::DEP-11::MetaKey $(COMPONENT)/dep11/Components-$(NATIVE_ARCHITECTURE).yml
Acquire::IndexTargets::deb::Icons::MetaKey $(COMPONENT)/dep11/icons.tar
Acquire::IndexTargets::deb::Icons::DefaultEnabled false
Acquire::IndexTargets::deb::Gz::MetaKey $(COMPONENT)/Gz
Acquire::IndexTargets::deb::Gz::CompressionTypes gz xz
Acquire::IndexTargets::deb-src::Sources::MetaKey $(COMPONENT)/source/Sources
";

const NAME: &str = "h_debian_dists_s_c_binary-amd64_Packages";
const INDEX: &str = "c/binary-amd64/Packages.diff/Index";

/// A machine whose apt wants what [`DUMP`] says.
fn machine(sources: &str, more: &str) -> Machine {
    let machine = Machine::new(sources);
    std::fs::create_dir(machine.list("partial")).unwrap();
    configure(&machine, sources, more);
    machine
}

fn configure(machine: &Machine, sources: &str, more: &str) {
    let path = machine.directory.path().join("sources.list");
    std::fs::write(&path, sources).unwrap();
    let dump = format!("{DUMP}{more}").replace(" $", " $").lines().map(encoded).collect::<Vec<_>>().join("\n");
    machine.catalog.configure(AptConfig::of_options(Options::parse(&dump), &[path], Environment::default()));
}

/// Spaces within a value, as the dump writes them.
fn encoded(line: &str) -> String {
    let (name, value) = line.split_once(' ').unwrap();
    format!("{name} {}", value.replace(' ', "%20"))
}

/// A Release that names these paths; each digest is made of the letter and the path.
fn naming(day: u32, letter: char, paths: &[&str]) -> String {
    let lines = paths.iter().map(|path| format!(" {} {} {path}\n", of(letter, path), path.len()));
    release(day).replace("SHA256:", "Acquire-By-Hash: yes\nSHA256:") + &lines.collect::<String>()
}

fn of(letter: char, path: &str) -> Digest {
    Digest::of(format!("{letter} {path}").as_bytes())
}

impl Machine {
    fn lists_fd(&self) -> File {
        File::open(self.list("")).unwrap()
    }

    fn arrive(&self, name: &str, text: &str) -> Result<Vec<String>, String> {
        std::fs::write(self.list("partial").join(name), text).unwrap();
        let lists = self.lists_fd();
        let entries = match name.ends_with("Index") {
            true => self.catalog.pdiff_arrived(lists.as_fd(), name),
            false => self.catalog.release_arrived(lists.as_fd(), name),
        };
        entries.map(|entries| entries.into_iter().map(|entry| entry.name).collect()).map_err(|err| err.to_string())
    }

    fn offers(&self, name: &str) -> Option<Digest> {
        self.catalog.index(name.as_bytes()).map(|entry| entry.digest)
    }
}

const ALL: &[&str] = &[
    "c/Gz.gz",
    "c/Gz.xz",
    "c/binary-all/Packages.xz",
    "c/binary-amd64/Packages",
    "c/binary-amd64/Packages.gz",
    "c/binary-amd64/Packages.xz",
    "c/binary-arm64/Packages.xz",
    INDEX,
    "c/dep11/Components-amd64.yml.gz",
    "c/dep11/icons.tar.gz",
    "c/i18n/Translation-pt_BR.xz",
    "c/installer-amd64/x.xz",
    "c/plain/Packages",
    "c/source/Sources.xz",
    "other/binary-amd64/Packages.xz",
];

/// A ghost under a name that apt does not ask for is of no use; one under the name of what it unpacks would be taken for that.
#[test]
fn the_names_that_apt_asks_for() {
    let check = |sources: &str, more: &str, want: &[&str]| {
        let machine = machine(sources, more);
        machine.write(INRELEASE, naming(2, 'a', ALL));
        machine.catalog.refresh_indexes(machine.lists_fd().as_fd());
        let offered: Vec<&str> = ALL
            .iter()
            .copied()
            .filter(|path| {
                let name = names::list_name(&format!("http://h/debian/dists/s/{path}"));
                let offered = machine.offers(&name);
                assert!(offered.is_none_or(|digest| digest == of('a', path)), "{path}");
                offered.is_some()
            })
            .collect();
        assert_eq!(offered, want, "{sources}");
    };
    let packages = "c/binary-amd64/Packages.xz";
    let usual = ["c/Gz.gz", "c/binary-all/Packages.xz", packages, INDEX, "c/dep11/Components-amd64.yml.gz", "c/i18n/Translation-pt_BR.xz"];
    check("deb http://h/debian s c\n", "", &usual);
    check("deb-src http://h/debian s c\n", "", &["c/source/Sources.xz"]);
    check("deb [arch=arm64 target=Packages] http://h/debian s c\n", "", &["c/binary-all/Packages.xz", "c/binary-arm64/Packages.xz"]);
    check("deb [target=Packages target+=Icons arch-=all] http://h/debian s c\n", "", &[packages, INDEX, "c/dep11/icons.tar.gz"]);
    check("deb [target=Icons icons=no packages=yes] http://h/debian s other\n", "", &["other/binary-amd64/Packages.xz"]);
    check(
        "deb [target=Packages arch-=all] http://h/debian s c\n",
        "Acquire::CompressionTypes::Order:: gz\n",
        &["c/binary-amd64/Packages.gz", INDEX],
    );
    check("deb [target=Packages arch-=all] http://h/debian s c\n", "Acquire::CompressionTypes::Order:: uncompressed\n", &[INDEX]);
    check("deb file:/debian s c\n", "", &[]);
}

/// Sizes and digests are what apt checks; a wrong URL makes every index come from apt's own request.
#[test]
fn an_index_says_where_it_lies() {
    let machine = machine(ONE_SOURCE, "");
    machine.write(INRELEASE, naming(2, 'a', ALL));
    machine.catalog.refresh_indexes(machine.lists_fd().as_fd());
    let path = "c/binary-amd64/Packages.xz";
    let entry = machine.catalog.index(format!("{NAME}.xz").as_bytes()).unwrap();
    let hash = of('a', path);
    let urls: Vec<(&str, bool)> = entry.urls.iter().map(|url| (url.url.as_str(), url.immutable)).collect();
    let by_hash = format!("http://h/debian/dists/s/c/binary-amd64/by-hash/SHA256/{hash}");
    assert_eq!(urls, [(by_hash.as_str(), true), ("http://h/debian/dists/s/c/binary-amd64/Packages.xz", false)]);
    assert_eq!((entry.name.as_str(), entry.digest, entry.size, entry.date), (&*format!("{NAME}.xz"), hash, path.len() as u64, 86_400));
    assert!(!entry.private);
    // What apt may fall back to is known by its bytes, what it has unpacked is nobody else's.
    assert_eq!(
        machine.catalog.by_digest(&of('a', "c/binary-amd64/Packages.gz")).unwrap().map(|entry| entry.name),
        Some(format!("{NAME}.gz"))
    );
    assert_eq!(machine.catalog.by_digest(&of('a', "c/binary-amd64/Packages")).unwrap(), None);
    assert_eq!(machine.catalog.by_digest(&of('a', "c/dep11/icons.tar.gz")).unwrap(), None);
    configure(&machine, "deb [by-hash=no] http://u:p@h/debian s c\n", "");
    machine.catalog.refresh_indexes(machine.lists_fd().as_fd());
    let entry = machine.catalog.index(format!("{NAME}.xz").as_bytes()).unwrap();
    assert!(entry.private && entry.urls.len() == 1 && entry.urls[0].private, "{entry:?}");
    assert_eq!(entry.urls[0].url, "http://u:p@h/debian/dists/s/c/binary-amd64/Packages.xz");
}

/// A Release that apt refuses, or has not judged yet, must not outlive its file.
#[test]
fn a_release_counts_from_its_arrival_to_its_end() {
    let machine = machine(ONE_SOURCE, "");
    let path = "c/binary-amd64/Packages.xz";
    let name = format!("{NAME}.xz");
    machine.write(INRELEASE, naming(2, 'a', &[path]));
    machine.catalog.refresh_indexes(machine.lists_fd().as_fd());
    assert_eq!(machine.arrive(INRELEASE, &naming(3, 'b', &[path])), Ok(vec![]), "none of its lists is there");
    assert_eq!(machine.offers(&name), Some(of('b', path)));
    let known = |letter| machine.catalog.by_digest(&of(letter, path)).unwrap().is_some();
    let arriving = |letter| machine.catalog.arriving_by_digest(&of(letter, path)).is_some();
    assert!(known('a') && !known('b') && arriving('b') && !arriving('a'));
    machine.catalog.release_left(INRELEASE, false);
    assert_eq!(machine.offers(&name), Some(of('a', path)));
    assert!(!arriving('b'));
    // Committed: what was there before is forgotten at once, and the file is read again when it is found.
    machine.arrive(INRELEASE, &naming(3, 'b', &[path])).unwrap();
    machine.catalog.release_left(INRELEASE, true);
    assert_eq!(machine.offers(&name), Some(of('b', path)));
    assert!(!known('a'));
    machine.write(INRELEASE, naming(4, 'c', &[path]));
    machine.refreshed(Vanished::Drop, 0, 0, 0);
    assert_eq!(machine.offers(&name), Some(of('c', path)));
    // apt was killed.
    machine.arrive(INRELEASE, &naming(5, 'd', &[path])).unwrap();
    machine.catalog.forget_pending();
    assert_eq!(machine.offers(&name), Some(of('c', path)));
    machine.remove(INRELEASE);
    machine.catalog.refresh_indexes(machine.lists_fd().as_fd());
    assert_eq!(machine.offers(&name), None);
    // A Release beside its signature, half a file, and one of no source.
    machine.arrive("h_debian_dists_s_Release", &naming(5, 'd', &[path])).unwrap();
    assert_eq!(machine.offers(&name), Some(of('d', path)));
    let half = machine.arrive(INRELEASE, "-----BEGIN PGP SIGNED MESSAGE-----\nHash: SHA256\n\nOrigin: x\n");
    assert_eq!(half.unwrap_err(), format!("lists/partial/{INRELEASE} is not one clear-signed message"));
    assert_eq!(machine.arrive("other_dists_s_InRelease", &naming(5, 'e', &[path])), Ok(vec![]));
    assert!(!arriving('e'));
}

/// A source that was added while an update has begun: its indexes are known as soon as the configuration is.
#[test]
fn a_component_is_added_to_a_release_that_is_here() {
    let machine = machine(ONE_SOURCE, "");
    machine.arrive(INRELEASE, &naming(2, 'a', ALL)).unwrap();
    let name = "h_debian_dists_s_other_binary-amd64_Packages.xz";
    assert_eq!(machine.offers(name), None);
    configure(&machine, "deb http://h/debian s c other\n", "");
    assert_eq!(machine.offers(name), Some(of('a', "other/binary-amd64/Packages.xz")));
    configure(&machine, "deb http://elsewhere/debian s c other\n", "");
    assert_eq!(machine.offers(name), None);
}

/// Fetched ahead is what apt asks for: never what it has in this version, never the whole list where it patches.
#[test]
fn what_apt_asks_for_next() {
    let machine = machine(ONE_SOURCE, "");
    let with_plain = ["c/binary-amd64/Packages", "c/binary-amd64/Packages.xz", "c/i18n/Translation-en", "c/i18n/Translation-en.xz"];
    machine.write(INRELEASE, naming(2, 'a', &with_plain));
    machine.write(&format!("{NAME}.lz4"), "old");
    machine.catalog.refresh_indexes(machine.lists_fd().as_fd());
    assert_eq!(machine.arrive(INRELEASE, &naming(3, 'a', &with_plain)), Ok(vec![]), "the lists did not change");
    assert_eq!(machine.arrive(INRELEASE, &naming(3, 'b', &with_plain)), Ok(vec![format!("{NAME}.xz")]));
    let with_index: Vec<&str> = with_plain.iter().copied().chain([INDEX]).collect();
    let index_name = format!("{NAME}.diff_Index");
    assert_eq!(machine.arrive(INRELEASE, &naming(3, 'b', &with_index)), Ok(vec![index_name.clone()]));
    configure(&machine, ONE_SOURCE, "Acquire::PDiffs false\n");
    assert_eq!(machine.arrive(INRELEASE, &naming(3, 'b', &with_index)), Ok(vec![format!("{NAME}.xz")]));
    configure(&machine, "deb [pdiffs=yes] http://h/debian s c\n", "Acquire::PDiffs false\n");
    assert_eq!(machine.arrive(INRELEASE, &naming(3, 'b', &with_index)), Ok(vec![index_name]));
    // Looked for in vain: no form of it is there.
    let missed = |name: &str| machine.catalog.index_missed(machine.lists_fd().as_fd(), name.as_bytes()).map(|entry| entry.name);
    let translation = "h_debian_dists_s_c_i18n_Translation-en";
    assert_eq!(missed(translation), Some(format!("{translation}.xz")));
    assert_eq!(missed(&format!("{translation}.zst")), Some(format!("{translation}.xz")));
    assert_eq!(missed(NAME), None, "it is there, packed");
    assert_eq!(missed("h_debian_dists_s_c_i18n_Translation-de"), None);
    let empty = naming(4, 'b', &["c/binary-all/Packages.xz"]) + &format!(" {} 0 c/binary-all/Packages\n", Digest::of(b""));
    machine.arrive(INRELEASE, &empty).unwrap();
    assert_eq!(missed("h_debian_dists_s_c_binary-all_Packages"), None, "apt makes it itself");
}

/// Patches are offered only once the very Index that the Release names is here.
#[test]
fn patches_come_with_their_index() {
    let machine = machine(ONE_SOURCE, "");
    let plain = "c/binary-amd64/Packages";
    machine.write(INRELEASE, naming(2, 'a', &[plain, &format!("{plain}.xz")]));
    machine.write(NAME, "old");
    machine.catalog.refresh_indexes(machine.lists_fd().as_fd());
    let old = of('a', plain);
    let text = |unpacked: Digest| {
        format!(
            "SHA256-Current: {c} 9\nSHA256-History:\n {other} 7 T-1\n {unpacked} 8 T-2\nSHA256-Patches:\n {c} 1 T-1\n {c} 1 T-2\n\
             SHA256-Download:\n {d} 10 T-1.gz\n {e} 11 T-2.gz\n",
            c = digest('c'),
            d = digest('d'),
            e = digest('e'),
            other = digest('f'),
        )
    };
    let index = text(old);
    let naming_index =
        naming(3, 'b', &[plain, &format!("{plain}.xz")]) + &format!(" {} {} {INDEX}\n", Digest::of(index.as_bytes()), index.len());
    machine.arrive(INRELEASE, &naming_index).unwrap();
    let index_name = format!("{NAME}.diff_Index");
    let patch = |id: &str| machine.offers(&format!("{NAME}.diff_{id}.gz"));
    assert_eq!(patch("T-2"), None);
    let lie = machine.arrive(&index_name, &text(digest('9')));
    assert_eq!(lie.unwrap_err(), format!("lists/partial/{index_name} is not the Index that its Release names"));
    assert_eq!(patch("T-2"), None);
    assert_eq!(machine.arrive(&index_name, &index), Ok(vec![format!("{NAME}.diff_T-2.gz")]), "T-1 leads to what is here");
    assert_eq!((patch("T-1"), patch("T-2"), patch("T-3")), (Some(digest('d')), Some(digest('e')), None));
    assert_eq!(machine.catalog.by_digest(&digest('e')).unwrap(), None);
    let entry = machine.catalog.arriving_by_digest(&digest('e')).unwrap();
    assert_eq!((entry.size, entry.urls[0].url.as_str()), (11, "http://h/debian/dists/s/c/binary-amd64/Packages.diff/T-2.gz"));
    // The configuration is read again, and the Release is committed: they stay, after a restart too.
    configure(&machine, ONE_SOURCE, "");
    assert_eq!(patch("T-2"), Some(digest('e')));
    machine.catalog.release_left(INRELEASE, true);
    assert_eq!(patch("T-2"), Some(digest('e')));
    assert_eq!(machine.catalog.by_digest(&digest('e')).unwrap(), Some(entry));
    machine.write(INRELEASE, naming_index);
    machine.write(&index_name, index);
    let machine = machine.restart();
    configure(&machine, ONE_SOURCE, "");
    machine.catalog.refresh_indexes(machine.lists_fd().as_fd());
    assert_eq!(machine.offers(&format!("{NAME}.diff_T-2.gz")), Some(digest('e')));
    // A server that merges: apt then asks for the packed patch under other names.
    assert_eq!(machine.offers(&format!("{NAME}.diff_T-2")), None);
    let merged = text(old) + "X-Patch-Precedence: merged\n";
    let release =
        naming(6, 'b', &[plain, &format!("{plain}.xz")]) + &format!(" {} {} {INDEX}\n", Digest::of(merged.as_bytes()), merged.len());
    machine.arrive(INRELEASE, &release).unwrap();
    assert_eq!(machine.arrive(&index_name, &merged).unwrap().len(), 0, "nothing leads from the committed list");
    for form in ["", ".lz4", ".gz"] {
        assert_eq!(machine.offers(&format!("{NAME}.diff_T-2{form}")), Some(digest('e')), "{form}");
    }
    std::fs::write(machine.list("partial").join(&index_name), std::fs::read(machine.list(&index_name)).unwrap()).unwrap();
    // One that an earlier run has left in partial/ is not written again.
    machine.arrive(INRELEASE, &std::fs::read_to_string(machine.list(INRELEASE)).unwrap()).unwrap();
    assert_eq!(machine.offers(&format!("{NAME}.diff_T-2.gz")), Some(digest('e')));
}
