//! The real Debian archive, one file at a time, through apt's own downloader and configuration.

use super::process::run;
use super::trixie::debian_mirror;
use parking_lot::Mutex;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime};

/// Indexes older than this are fetched anew: what they name may have left the archive.
const INDEXES_KEPT: Duration = Duration::from_secs(12 * 60 * 60);

/// What was fetched, kept by path: `debian/...` and `debian-security/...`.
#[derive(Debug)]
pub(crate) struct Upstream {
    pub(crate) kept: PathBuf,
    url: String,
    /// One at a time: what is wanted twice is fetched once.
    fetching: Mutex<()>,
}

impl Upstream {
    pub(crate) fn new() -> Self {
        let kept = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/e2e/archive");
        for archive in ["debian", "debian-security"] {
            let indexes = kept.join(archive).join("dists");
            fs::create_dir_all(kept.join(archive)).unwrap();
            let made = fs::metadata(&indexes).and_then(|metadata| metadata.created()).ok();
            if made.is_some_and(|made| SystemTime::now().duration_since(made).is_ok_and(|age| age > INDEXES_KEPT)) {
                fs::remove_dir_all(indexes).unwrap();
            }
        }
        let url = debian_mirror().trim_end_matches('/').trim_end_matches("/debian").to_owned();
        Self { kept, url, fetching: Mutex::default() }
    }

    /// Fetches the file of that absolute path unless it is here; a file that the archive has not stays missing.
    pub(crate) fn have(&self, path: &str) {
        let _fetching = self.fetching.lock();
        let place = self.kept.join(path.trim_start_matches('/'));
        if place.exists() || path.contains("/../") || path.ends_with('/') {
            return;
        }
        let part = self.kept.join(format!("part-{}", std::process::id()));
        let url = format!("{}{path}", self.url);
        let helper = run(Command::new("/usr/lib/apt/apt-helper").args(["-q", "download-file", &url]).arg(&part));
        if helper.status.success() {
            fs::create_dir_all(place.parent().unwrap()).unwrap();
            fs::rename(&part, &place).unwrap();
        } else {
            let _ = fs::remove_file(&part);
            eprintln!("not fetched from the archive: {path}: {helper}");
        }
    }
}
