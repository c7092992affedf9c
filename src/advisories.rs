//! Keeps the catalog's advisories up to date: files as they change, URLs once a day.
//!
//! What was fetched is kept in the state directory, so that a start needs no network. An advisory only ever keeps a file back, so one that
//! cannot be had is a line in the status, and what was had before goes on counting.

use crate::clock;
use crate::config;
use crate::net_process::NetProcess;
use parking_lot::Mutex;
use poolfs_core::Digest;
use poolfs_core::advisories::{ADVISORY_BYTES_MAX, Advisories};
use poolfs_core::catalog::names::Uri;
use poolfs_core::catalog::{Advised, Catalog};
use poolfs_fs::refresh::Refresher;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

/// How often files are looked at, and URLs that failed are tried again.
const LOOK_INTERVAL: Duration = Duration::from_secs(600);

/// How old a fetched file may be before it is fetched again.
const FETCH_INTERVAL: Duration = Duration::from_secs(24 * 3600);

/// What is known of one configured file or URL.
#[derive(Clone, Debug, Default)]
pub struct Source {
    /// As configured, without credentials.
    pub name: String,
    /// Issues that it names; 0 while there is none.
    pub issues: usize,
    /// When it was changed, or fetched, seconds since 1970; `None` while there is none.
    pub made_at: Option<i64>,
    /// Why there is none, or none newer.
    pub problem: Option<String>,
}

/// See the module.
#[derive(Debug)]
pub struct AdvisoryKeeper {
    /// Files and URLs.
    sources: Vec<String>,
    unfixed: bool,
    dir: PathBuf,
    catalog: Arc<Catalog>,
    /// Fetches what is at URLs.
    process: NetProcess,
    shown: Mutex<Vec<Source>>,
}

impl AdvisoryKeeper {
    /// Keeps what `config` names, with copies below `state_dir`.
    pub fn new(config: &config::Apt, state_dir: &Path, catalog: Arc<Catalog>, process: NetProcess) -> Arc<Self> {
        let (sources, unfixed, dir) = (config.advisories.clone(), config.advisories_unfixed, state_dir.join("advisories"));
        // A large one takes its time, and nothing of what it may name is to be told before.
        catalog.advise(Advised { files: Vec::new(), unfixed, is_pending: !sources.is_empty() });
        Arc::new(Self { sources, unfixed, dir, catalog, process, shown: Mutex::default() })
    }

    /// What is known of each.
    pub fn shown(&self) -> Vec<Source> {
        self.shown.lock().clone()
    }

    /// Reads what is here; blocks for the disk. Until it was done once, every version is withheld.
    fn read(&self) {
        let mut shown = Vec::new();
        let mut files = Vec::new();
        for source in &self.sources {
            let path = self.path(source);
            let name = if is_url(source) { Uri::parse(source).to_string() } else { source.clone() };
            match read(&path) {
                Ok((advisories, made_at)) => {
                    shown.push(Source { name, issues: advisories.len(), made_at: Some(made_at), problem: None });
                    files.push(advisories);
                }
                Err(why) => {
                    tracing::warn!("advisories {name}: {why}");
                    shown.push(Source { name, problem: Some(why), ..Source::default() });
                }
            }
        }
        *self.shown.lock() = shown;
        self.catalog.advise(Advised { files, unfixed: self.unfixed, is_pending: false });
    }

    /// Goes on for ever.
    pub async fn run(self: Arc<Self>, refresher: Arc<Refresher>) {
        if self.sources.is_empty() {
            return;
        }
        let mut seen = self.stamps();
        self.read_and_judge(&refresher).await;
        loop {
            let mut problems = Vec::new();
            for (at, source) in self.sources.iter().enumerate().filter(|(_, source)| is_url(source)) {
                if is_fresh(&self.path(source)) {
                    continue;
                }
                if let Err(why) = self.fetch(source).await {
                    tracing::warn!("advisories {}: {why}", Uri::parse(source));
                    problems.push((at, why));
                }
            }
            let now = self.stamps();
            if now != seen {
                seen = now;
                self.read_and_judge(&refresher).await;
            }
            for (at, why) in problems {
                if let Some(shown) = self.shown.lock().get_mut(at) {
                    shown.problem = Some(why);
                }
            }
            tokio::time::sleep(LOOK_INTERVAL).await;
        }
    }

    async fn read_and_judge(self: &Arc<Self>, refresher: &Arc<Refresher>) {
        let (keeper, judge) = (Arc::clone(self), Arc::clone(refresher));
        let read = tokio::task::spawn_blocking(move || {
            keeper.read();
            judge.judge();
        });
        if let Err(err) = read.await {
            tracing::error!("advisories could not be read: {err}");
        }
    }

    /// Fetches a URL to its copy, if it is one that can be read.
    async fn fetch(&self, url: &str) -> Result<(), String> {
        let proxy = self.catalog.proxy(&Uri::parse(url));
        let bytes = self.process.document(url, proxy.as_deref(), ADVISORY_BYTES_MAX).await?;
        let (dir, path) = (self.dir.clone(), self.path(url));
        let kept = tokio::task::spawn_blocking(move || {
            Advisories::read(bytes.as_slice()).map_err(|err| err.to_string())?;
            let temp = path.with_extension("new");
            let written =
                std::fs::create_dir_all(&dir).and_then(|()| std::fs::write(&temp, &bytes)).and_then(|()| std::fs::rename(&temp, &path));
            written.map_err(|err| format!("keep it as {}: {err}", path.display()))
        });
        kept.await.map_err(|err| err.to_string())?
    }

    fn path(&self, source: &str) -> PathBuf {
        if is_url(source) { self.dir.join(Digest::of(source.as_bytes()).to_string()) } else { PathBuf::from(source) }
    }

    fn stamps(&self) -> Vec<Option<(u64, SystemTime)>> {
        let stamp = |source: &String| {
            let found = self.path(source).metadata().ok()?;
            Some((found.len(), found.modified().ok()?))
        };
        self.sources.iter().map(stamp).collect()
    }
}

/// What is configured in place of a path.
pub fn is_url(source: &str) -> bool {
    source.starts_with("http://") || source.starts_with("https://")
}

fn is_fresh(path: &Path) -> bool {
    let age = path.metadata().and_then(|found| found.modified()).ok().and_then(|made| SystemTime::now().duration_since(made).ok());
    age.is_some_and(|age| age < FETCH_INTERVAL)
}

fn read(path: &Path) -> Result<(Advisories, i64), String> {
    let file = File::open(path).map_err(|err| match err.kind() {
        std::io::ErrorKind::NotFound => "there is none yet".to_owned(),
        _ => err.to_string(),
    })?;
    let made = file.metadata().and_then(|found| found.modified()).map_err(|err| err.to_string())?;
    let made_at = made.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
    let advisories = Advisories::read(file).map_err(|err| err.to_string())?;
    Ok((advisories, i64::try_from(made_at).unwrap_or(i64::MAX)))
}

/// For people: how many issues, how old, and what is wrong.
pub fn line(source: &Source) -> String {
    let age = source.made_at.map(|made_at| match clock::now().saturating_sub(made_at).max(0) / 3600 {
        hours @ 0..48 => format!(", {hours} h old"),
        hours => format!(", {} d old", hours / 24),
    });
    let problem = source.problem.as_ref().map_or_else(String::new, |why| format!("; {why}"));
    format!("{}: {} issues{}{problem}", source.name, source.issues, age.unwrap_or_default())
}
