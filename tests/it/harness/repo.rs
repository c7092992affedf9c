//! A signed Debian repository, made in the test: packages of given sizes, indexes in the forms that apt asks for.

use super::process::run;
use sha2::{Digest as _, Sha256};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A package to build. The bytes of its one big file come from its name and version, so they are the same at each run
/// and do not compress.
#[derive(Clone, Debug)]
pub(crate) struct Package {
    pub(crate) name: String,
    pub(crate) version: String,
    pub(crate) architecture: String,
    pub(crate) depends: Option<String>,
    pub(crate) payload_bytes: usize,
    /// The version whose payload it has, before some bytes of its own.
    pub(crate) like: Option<String>,
    /// What dpkg-deb packs its members with.
    pub(crate) packed: &'static str,
}

impl Package {
    pub(crate) fn new(name: &str, version: &str, payload_bytes: usize) -> Self {
        let (name, version, architecture) = (name.into(), version.into(), "all".into());
        Self { name, version, architecture, depends: None, payload_bytes, like: None, packed: "none" }
    }

    /// With the payload of an older version, before so many bytes of its own.
    pub(crate) fn like(mut self, version: &str, own_bytes: usize) -> Self {
        self.like = Some(version.into());
        self.payload_bytes = own_bytes;
        self
    }

    /// Packed by dpkg-deb with `xz`, `zstd` or `gzip`.
    pub(crate) fn packed(mut self, with: &'static str) -> Self {
        self.packed = with;
        self
    }

    pub(crate) fn depends(mut self, on: &str) -> Self {
        self.depends = Some(on.into());
        self
    }

    /// Its name in `archives/`, for the names and versions that tests use (`:` of an epoch is the one quoted byte).
    pub(crate) fn archive_name(&self) -> String {
        format!("{}_{}_{}.deb", self.name, self.version.replace(':', "%3a"), self.architecture)
    }
}

/// A package that is in the repository.
#[derive(Clone, Debug)]
pub(crate) struct Published {
    pub(crate) package: Package,
    /// Below the repository's root, as the index says it.
    pub(crate) filename: String,
    pub(crate) bytes: Vec<u8>,
    /// SHA-256, lower-case hex.
    pub(crate) digest: String,
    control: String,
}

impl Published {
    pub(crate) fn archive_name(&self) -> String {
        self.package.archive_name()
    }

    fn stanza(&self) -> String {
        format!("{}Filename: {}\nSize: {}\nSHA256: {}\n", self.control, self.filename, self.bytes.len(), self.digest)
    }
}

/// A repository with one suite `stable` and one component `main`, at `root`.
#[derive(Debug)]
pub(crate) struct Repo {
    root: PathBuf,
    gnupg: PathBuf,
    work: PathBuf,
    packages: Vec<Published>,
    /// Counts the Release files: each one is dated a minute after the one before, from a fixed date.
    releases: u64,
}

/// The suite of every test repository.
pub(crate) const SUITE: &str = "stable";

impl Repo {
    /// An empty repository below `directory` (absolute), with a key of its own. Call [`Repo::publish`] to make the indexes.
    pub(crate) fn new(directory: &Path) -> Self {
        let (root, gnupg, work) = (directory.join("repo"), directory.join("gnupg"), directory.join("build"));
        for path in [&root, &gnupg, &work] {
            fs::create_dir_all(path).unwrap();
        }
        let repo = Self { root, gnupg, work, packages: Vec::new(), releases: 0 };
        run(Command::new("chmod").arg("0700").arg(&repo.gnupg)).ok();
        let arguments = [
            "--pinentry-mode",
            "loopback",
            "--passphrase",
            "",
            "--quick-generate-key",
            "poolfs test <test@example.invalid>",
            "ed25519",
            "sign",
            "never",
        ];
        run(repo.gpg().args(arguments)).ok();
        run(repo.gpg().arg("--export").arg("-o").arg(repo.key()).arg("poolfs test")).ok();
        repo
    }

    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// The public key, binary, for `Signed-By`.
    pub(crate) fn key(&self) -> PathBuf {
        self.root.with_file_name("key.gpg")
    }

    fn gpg(&self) -> Command {
        let mut command = Command::new("gpg");
        command.arg("--homedir").arg(&self.gnupg).args(["--batch", "--yes", "--quiet", "--no-tty"]);
        command
    }

    /// Builds the package and puts it into the pool; it is named by the next [`Repo::publish`].
    pub(crate) fn add(&mut self, package: Package) -> Published {
        let tree = self.work.join(format!("{}_{}", package.name, package.version.replace(':', "%3a")));
        fs::create_dir_all(tree.join("DEBIAN")).unwrap();
        fs::create_dir_all(tree.join("usr/share").join(&package.name)).unwrap();
        let payload = noise(&format!("{} {}", package.name, package.version), package.payload_bytes);
        let mut whole = Vec::new();
        if let Some(like) = &package.like {
            let older = self.packages.iter().find(|older| older.package.name == package.name && older.package.version == *like);
            let older = &older.expect("the older version is in the repository").package;
            whole = noise(&format!("{} {}", older.name, older.version), older.payload_bytes);
        }
        whole.extend_from_slice(&payload);
        fs::write(tree.join("usr/share").join(&package.name).join("payload"), whole).unwrap();
        let mut control = format!(
            "Package: {}\nVersion: {}\nArchitecture: {}\nMaintainer: poolfs test <test@example.invalid>\n",
            package.name, package.version, package.architecture
        );
        if let Some(depends) = &package.depends {
            writeln!(control, "Depends: {depends}").unwrap();
        }
        control.push_str("Section: misc\nPriority: optional\nDescription: a package of a test\n");
        fs::write(tree.join("DEBIAN/control"), &control).unwrap();
        let directory = format!("pool/main/{}", package.name);
        fs::create_dir_all(self.root.join(&directory)).unwrap();
        // A pool's file names have no epoch.
        let plain_version = package.version.split_once(':').map_or(package.version.as_str(), |(_, rest)| rest);
        let filename = format!("{directory}/{}_{plain_version}_{}.deb", package.name, package.architecture);
        let mut build = Command::new("dpkg-deb");
        build.arg(format!("-Z{}", package.packed)).args(["--root-owner-group", "--build"]).arg(&tree).arg(self.root.join(&filename));
        run(build.env("SOURCE_DATE_EPOCH", "1700000000")).ok();
        fs::remove_dir_all(&tree).unwrap();
        let bytes = fs::read(self.root.join(&filename)).unwrap();
        let published = Published { digest: hex(&Sha256::digest(&bytes)), package, filename, bytes, control };
        self.packages.push(published.clone());
        published
    }

    /// Puts a package that exists already into the pool, as it is. What it depends on need not be here: the index does not say it.
    pub(crate) fn add_file(&mut self, deb: &Path) -> Published {
        let control = run(Command::new("dpkg-deb").arg("-f").arg(deb)).ok().out;
        let relations = ["Depends", "Pre-Depends", "Recommends", "Suggests", "Conflicts", "Breaks", "Replaces", "Provides", "Enhances"];
        let mut kept = String::new();
        let mut keep = true;
        for line in control.lines() {
            // A line that goes on belongs to the field before it.
            keep = if line.starts_with(' ') { keep } else { !relations.contains(&line.split(':').next().unwrap_or_default()) };
            if keep {
                writeln!(kept, "{line}").unwrap();
            }
        }
        let field = |name: &str| kept.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": ")).unwrap().to_owned();
        let package = Package { architecture: field("Architecture"), ..Package::new(&field("Package"), &field("Version"), 0) };
        let filename = format!("pool/main/{}/{}", package.name, deb.file_name().unwrap().to_str().unwrap());
        let bytes = fs::read(deb).unwrap();
        fs::create_dir_all(self.root.join(&filename).parent().unwrap()).unwrap();
        fs::write(self.root.join(&filename), &bytes).unwrap();
        let published = Published { digest: hex(&Sha256::digest(&bytes)), package, filename, bytes, control: kept };
        self.packages.push(published.clone());
        published
    }

    /// Takes every version of `name` out of the next index; the files stay in the pool.
    pub(crate) fn withdraw(&mut self, name: &str) {
        self.packages.retain(|published| published.package.name != name);
    }

    /// Writes `Packages` (plain, .gz, .xz), the by-hash copies, `Release` and the signed `InRelease`.
    pub(crate) fn publish(&mut self) {
        self.publish_index(self.stanzas().as_bytes());
    }

    /// The stanzas of everything in the repository, as in `Packages`.
    pub(crate) fn stanzas(&self) -> String {
        self.packages.iter().map(Published::stanza).collect::<Vec<_>>().join("\n")
    }

    /// As [`Repo::publish`], with these bytes as `Packages`, well formed or not.
    pub(crate) fn publish_index(&mut self, packages: &[u8]) {
        // Packages of architecture all are in each architecture's index, as in Debian.
        let packed = BTreeMap::from([
            ("main/binary-amd64/Packages".to_owned(), packages.to_vec()),
            ("main/binary-all/Packages".to_owned(), Vec::new()),
        ]);
        self.publish_files("main", &packed, &BTreeMap::new());
    }

    /// Makes a Release that names these files, by their paths below the suite: `packed` also as .gz and .xz, `plain` as they are.
    pub(crate) fn publish_files(&mut self, components: &str, packed: &BTreeMap<String, Vec<u8>>, plain: &BTreeMap<String, Vec<u8>>) {
        self.publish_suite(SUITE, components, packed, plain);
    }

    /// Makes a Release of another suite whose one list has these packages.
    pub(crate) fn publish_packages_in(&mut self, suite: &str, packages: &[&Published]) {
        let stanzas = packages.iter().map(|published| published.stanza()).collect::<Vec<_>>().join("\n");
        let packed = BTreeMap::from([
            ("main/binary-amd64/Packages".to_owned(), stanzas.into_bytes()),
            ("main/binary-all/Packages".to_owned(), Vec::new()),
        ]);
        self.publish_suite(suite, "main", &packed, &BTreeMap::new());
    }

    /// Makes a Release of a suite of Debian's, with this label, whose one list has these stanzas of Debian's own; dated so, in seconds since
    /// 1970, and valid so long.
    pub(crate) fn publish_real(&mut self, suite: &str, label: &str, stanzas: &str, date_s: i64, until_s: Option<i64>) {
        let packed = BTreeMap::from([("main/binary-amd64/Packages".to_owned(), stanzas.as_bytes().to_vec())]);
        let until = until_s.map_or_else(String::new, |until_s| format!("Valid-Until: {}\n", release_date(until_s)));
        let head = format!(
            "Origin: Debian\nLabel: {label}\nSuite: {suite}\nCodename: {suite}\nDate: {}\n{until}Architectures: amd64\n",
            release_date(date_s)
        );
        self.sign_suite(suite, &head, "main", &packed, &BTreeMap::new());
    }

    fn publish_suite(&mut self, name: &str, components: &str, packed: &BTreeMap<String, Vec<u8>>, plain: &BTreeMap<String, Vec<u8>>) {
        let date = 1_700_000_000 + i64::try_from(self.releases).unwrap() * 60;
        self.releases += 1;
        let date = release_date(date);
        let head = format!("Origin: test\nLabel: test\nSuite: {name}\nCodename: {name}\nDate: {date}\nArchitectures: all amd64\n");
        self.sign_suite(name, &head, components, packed, plain);
    }

    fn sign_suite(&self, name: &str, head: &str, components: &str, packed: &BTreeMap<String, Vec<u8>>, plain: &BTreeMap<String, Vec<u8>>) {
        let suite = self.root.join("dists").join(name);
        let mut sums = BTreeMap::new();
        for (path, bytes) in packed.iter().chain(plain) {
            let place = suite.join(path);
            fs::create_dir_all(place.parent().unwrap().join("by-hash/SHA256")).unwrap();
            fs::write(&place, bytes).unwrap();
            let mut forms = vec![String::new()];
            if packed.contains_key(path) {
                run(Command::new("gzip").args(["-9nkf"]).arg(&place)).ok();
                run(Command::new("xz").args(["-0kf"]).arg(&place)).ok();
                forms.extend([".gz".to_owned(), ".xz".to_owned()]);
            }
            for form in forms {
                let name = format!("{path}{form}");
                let bytes = fs::read(suite.join(&name)).unwrap();
                let digest = hex(&Sha256::digest(&bytes));
                fs::write(place.parent().unwrap().join("by-hash/SHA256").join(&digest), &bytes).unwrap();
                sums.insert(name, (digest, bytes.len()));
            }
        }
        let mut release = format!("{head}Acquire-By-Hash: yes\nComponents: {components}\nSHA256:\n");
        for (path, (digest, bytes)) in &sums {
            writeln!(release, " {digest} {bytes} {path}").unwrap();
        }
        fs::write(suite.join("Release"), release).unwrap();
        run(self.gpg().arg("--clearsign").arg("-o").arg(suite.join("InRelease")).arg(suite.join("Release"))).ok();
    }
}

impl Drop for Repo {
    fn drop(&mut self) {
        // gpg starts an agent that would outlive the directory.
        let _ = Command::new("gpgconf").arg("--homedir").arg(&self.gnupg).args(["--kill", "all"]).status();
    }
}

/// As a Release has it.
fn release_date(seconds: i64) -> String {
    let date = run(Command::new("date").args(["-u", "-R", "-d"]).arg(format!("@{seconds}")).env("LC_ALL", "C")).ok().out;
    date.trim().replace("+0000", "UTC")
}

/// Bytes that look random and depend on `seed` alone (xorshift64* over FNV-1a).
pub(crate) fn noise(seed: &str, bytes: usize) -> Vec<u8> {
    let mut state = seed.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)) | 1;
    let mut out = Vec::with_capacity(bytes + 8);
    while out.len() < bytes {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        out.extend_from_slice(&state.wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes());
    }
    out.truncate(bytes);
    out
}

/// Lower-case hex.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").unwrap();
        text
    })
}
