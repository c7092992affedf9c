//! Mounts a directory over itself, for measurements and for test suites that want a mount and nothing else.
//!
//! `passthrough DIR STATE_DIR [verify] [threads=N]`: without `verify` nothing is hashed, recorded or checked, which is the
//! same tree at its fastest. No catalog and no network. Runs until it is unmounted (`umount DIR`).

use anyhow::Context as _;
use poolfs_core::catalog::Entry;
use poolfs_core::store::{Incoming, Objects, Store};
use poolfs_core::{Digest, Role};
use poolfs_fs::fetch::{FetchLimits, Fetcher};
use poolfs_fs::mount::{MountOptions, MountSpec, Mounts, prepare};
use poolfs_fs::names::Names;
use poolfs_fs::source::{Delivery, Source, Verdict, Want};
use poolfs_fs::supply::{Mend, Mended, Wound};
use poolfs_fs::{FsError, TreeParts};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;

/// Objects kept, in bytes.
const QUOTA_BYTES: u64 = 1 << 30;

struct NoNames;

impl Names for NoNames {
    fn packages(&self) -> Result<Vec<String>, FsError> {
        Ok(Vec::new())
    }

    fn archive(&self, _name: &[u8]) -> Result<Option<Entry>, FsError> {
        Ok(None)
    }

    fn by_digest(&self, _digest: &Digest) -> Result<Option<Entry>, FsError> {
        Ok(None)
    }
}

struct NoSource;

impl Source for NoSource {
    fn want(&self, _want: Want, _incoming: Option<OwnedFd>) -> mpsc::Receiver<Delivery> {
        // A closed channel: the source is gone.
        mpsc::channel(1).1
    }

    fn verdict(&self, _digest: Digest, _verdict: Verdict) {}
}

struct NoMend;

impl Mend for NoMend {
    fn mend(&self, _wound: Wound) -> Pin<Box<dyn Future<Output = Mended> + Send>> {
        Box::pin(async { Err("this example has no network".to_owned()) })
    }
}

fn main() -> anyhow::Result<()> {
    let mut args = std::env::args_os().skip(1);
    let usage = "passthrough DIR STATE_DIR [verify] [threads=N]";
    let path = PathBuf::from(args.next().context(usage)?);
    let state = PathBuf::from(args.next().context(usage)?);
    let rest: Vec<String> = args.filter_map(|arg| arg.into_string().ok()).collect();
    let verify = rest.iter().any(|arg| arg == "verify");
    let threads = rest.iter().find_map(|arg| arg.strip_prefix("threads=")?.parse().ok()).unwrap_or(2);
    let runtime = tokio::runtime::Runtime::new()?;
    let spec = MountSpec { role: Role::Archives, path, options: MountOptions::default() };
    let prepared = prepare(&[spec], &state)?;
    let store = Arc::new(Store::open(&state)?);
    let objects = Arc::new(Objects::open(Arc::clone(&store), prepared.objects, QUOTA_BYTES)?);
    let incoming = Arc::new(Incoming::open(Arc::clone(&store), prepared.incoming)?);
    let fetcher = Fetcher::new(incoming, Arc::new(NoSource), runtime.handle().clone(), FetchLimits::default());
    let (names, mend) = (Arc::new(NoNames), Arc::new(NoMend));
    let parts = TreeParts { store, objects, names, mend, fetcher, lists_elsewhere: None, runtime: runtime.handle().clone() };
    let mounts = Mounts::mount(prepared.mounts, &parts, verify, threads)?;
    while mounts.all_served() {
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}
