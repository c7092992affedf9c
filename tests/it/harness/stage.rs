//! The usual scene: one repository behind one faulty mirror, one machine that uses it.

use super::machine::{Machine, Options, Sources, workspace};
use super::mirror::{Client, Mirror};
use super::process::Finished;
use super::repo::{Package, Published, Repo};
use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// Dropped in this order: the machine first, so that its daemon does not outlive its mirror.
#[derive(Debug)]
pub(crate) struct Stage {
    pub(crate) machine: Machine,
    pub(crate) mirror: Mirror,
    pub(crate) repo: Repo,
    pub(crate) packages: Vec<Published>,
    _home: TempDir,
}

impl Stage {
    /// The repository has `packages`; the machine has fetched nothing and mounted nothing.
    pub(crate) fn new(packages: Vec<Package>, options: &Options) -> Self {
        let home = workspace();
        let mut repo = Repo::new(home.path());
        let packages = packages.into_iter().map(|package| repo.add(package)).collect();
        repo.publish();
        let mirror = Mirror::new(repo.root());
        let machine = Machine::new(&Sources::Local(&repo, &mirror), options);
        Self { machine, mirror, repo, packages, _home: home }
    }

    /// As [`Stage::new`]; then mounts, updates through the mounts, and forgets what the mirror was asked for until here.
    #[track_caller]
    pub(crate) fn mounted(packages: Vec<Package>, options: &Options) -> Self {
        let stage = Self::new(packages, options);
        stage.machine.up();
        stage.machine.update();
        stage.mirror.forget_log();
        stage
    }

    /// `apt-get install -y -d` of everything in the repository.
    pub(crate) fn download_all(&self) -> Finished {
        let names = self.packages.iter().map(|published| published.package.name.as_str());
        self.machine.apt_get(&["install", "-y", "-d"].into_iter().chain(names).collect::<Vec<_>>())
    }

    pub(crate) fn archive(&self, published: &Published) -> PathBuf {
        self.machine.archives().join(published.archive_name())
    }

    /// Fails unless every package is in `archives/`, with the bytes of the repository.
    #[track_caller]
    pub(crate) fn assert_all_here(&self) {
        for published in &self.packages {
            assert_holds(&self.archive(published), &published.bytes);
        }
    }

    /// Fails if apt itself asked the mirror for a package: by its own words and by the mirror's log.
    #[track_caller]
    pub(crate) fn assert_no_gets(&self, finished: &Finished) {
        assert_eq!(finished.deb_gets(), Vec::<&str>::new(), "apt fetched by itself: {finished}");
        assert_eq!(self.mirror.debs_asked_by(Client::Apt), 0, "{:#?}", self.mirror.log());
    }

    /// Names in `archives/` that end with `.deb`, sorted.
    pub(crate) fn debs(&self) -> Vec<String> {
        listed(&self.machine.archives()).into_iter().filter(|name| name.ends_with(".deb")).collect()
    }
}

/// Names that `readdir` gives, sorted.
#[track_caller]
pub(crate) fn listed(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).unwrap_or_else(|error| panic!("list {}: {error}", directory.display()));
    let mut names: Vec<String> = entries.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

/// Compares a file's bytes without printing megabytes when they differ.
#[track_caller]
pub(crate) fn assert_holds(path: &Path, want: &[u8]) {
    let found = fs::read(path).unwrap_or_else(|error| panic!("read {}: {error}", path.display()));
    let differs = found.iter().zip(want).position(|(a, b)| a != b);
    assert!(
        found.len() == want.len() && differs.is_none(),
        "{}: {} bytes instead of {}, first difference at {differs:?}",
        path.display(),
        found.len(),
        want.len()
    );
}

/// A directory by descriptor: opened before poolfs mounts over it, it goes on naming the covered directory.
#[derive(Debug)]
pub(crate) struct Covered(File);

impl Covered {
    pub(crate) fn open(directory: &Path) -> Self {
        Self(File::open(directory).unwrap())
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        use std::os::fd::AsRawFd as _;
        PathBuf::from(format!("/proc/self/fd/{}/{name}", self.0.as_raw_fd()))
    }

    /// Changes the byte at `offset` as a failing disk would: size, mtime and inode stay as they are.
    pub(crate) fn flip(&self, name: &str, offset: u64) {
        let file = File::options().read(true).write(true).open(self.path(name)).unwrap();
        let metadata = file.metadata().unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, offset).unwrap();
        file.write_all_at(&[byte[0] ^ 0x10], offset).unwrap();
        file.set_modified(metadata.modified().unwrap()).unwrap();
        file.sync_all().unwrap();
    }
}

/// Drops what the kernel caches of a file, so that the next read comes to the file system.
#[track_caller]
pub(crate) fn forget_pages(path: &Path) {
    let file = File::open(path).unwrap_or_else(|error| panic!("open {}: {error}", path.display()));
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
}

/// An extended attribute as text; `None` if the file has none of that name.
pub(crate) fn attribute(path: &Path, name: &str) -> Option<String> {
    let mut value = vec![0; 4096];
    match rustix::fs::getxattr(path, name, &mut value) {
        Ok(bytes) => Some(String::from_utf8_lossy(&value[..bytes]).trim_end().to_owned()),
        Err(rustix::io::Errno::NODATA) => None,
        Err(error) => panic!("{name} of {}: {error}", path.display()),
    }
}
