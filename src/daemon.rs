//! The serving process: wires the parts together and owns the runtime.
//!
//! Order of the start: the control socket (so that two daemons cannot share a database), the network process, the
//! directories beneath the mounts, the database, apt's configuration, the mounts; only then, while everything is served already, the catalog is
//! brought up to date and files that changed meanwhile are hashed.

mod facts;
mod network;
mod requests;

use crate::advisories::{self, AdvisoryKeeper};
use crate::apt_names::AptNames;
use crate::config::{self, Config};
use crate::control::server::{Handler, Server};
use crate::control::{self, Download, MountStatus, Reply, Request, Seen, SourceBytes, Status, Verified, Why};
use crate::deltas;
use crate::deltas::making::Maker;
use crate::deltas::proving::Prover;
use crate::deltas::using::{RebuildHandle, Rebuilder};
use crate::errands::Errands;
use crate::facts::{Recorder, Witness};
use crate::lists_age::ListsAge;
use crate::logging;
use crate::manners::Manners;
use crate::mount_words::{self, Words};
use crate::net_process::NetProcess;
use crate::shelf::StoreShelf;
use crate::supervise::Report;
use crate::web::Web;
use crate::wire::NetStatus;
use anyhow::{Context, Result, bail};
use network::Network;
use parking_lot::Mutex;
use poolfs_core::catalog::apt_config::{Environment, Options};
use poolfs_core::catalog::{AptConfig, Catalog, Vanished};
use poolfs_core::store::{Incoming, Kind, Objects, Sharing, Store};
use poolfs_core::{Digest, Role};
use poolfs_fs::fetch::{FetchLimits, Fetcher, Progress};
use poolfs_fs::mount::{MountOptions, MountSpec, Mounts, Places, PreparedMount, prepare};
use poolfs_fs::names::Names;
use poolfs_fs::repair::{RepairLimits, Repairer};
use poolfs_fs::source::Source;
use poolfs_fs::tree::{Tree, TreeParts};
use poolfs_fs::{FsError, verify};
use rustix::fs::{Mode, OFlags};
use std::future::Future;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant, SystemTime};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{mpsc, watch};

/// Threads of the runtime: what waits for the network needs few.
const RUNTIME_THREADS: usize = 2;

/// How long the end of the process waits for tasks that still run.
const RUNTIME_PATIENCE: Duration = Duration::from_secs(2);

/// How long the bytes of an interrupted download wait to be wanted again.
const INCOMING_KEPT: Duration = Duration::from_secs(7 * 24 * 60 * 60);

/// How often a long check tells how far it is.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(100);

/// How long a mount waits for the end of the one that was unmounted in its place.
const SESSION_PATIENCE: Duration = Duration::from_secs(10);

/// Everything that requests are answered from.
struct Daemon {
    /// As it was at the start.
    config: Config,
    /// What was read last, for the next reload.
    read_last: Mutex<config::Origin>,
    started: Instant,
    store: Arc<Store>,
    objects: Arc<Objects>,
    catalog: Arc<Catalog>,
    incoming: Arc<Incoming>,
    fetcher: Arc<Fetcher>,
    rebuilder: Arc<Rebuilder>,
    /// Deltas that are to be made.
    deltas_left: Arc<AtomicUsize>,
    repairer: Repairer,
    mounts: Mutex<Mounts>,
    /// Held by who mounts or unmounts, before `mounts`.
    joining: tokio::sync::Mutex<Joining>,
    shelf: Arc<StoreShelf>,
    names: Arc<AptNames>,
    advisories: Arc<AdvisoryKeeper>,
    /// What was found wrong behind the start: files that could not be read or recorded, a damaged database.
    background_problems: Mutex<Vec<String>>,
    /// What talks to the network.
    process: NetProcess,
    pulse: facts::Pulse,
    manners: Manners,
    recorder: Mutex<Recorder>,
    /// Where the status page is served.
    page: OnceLock<SocketAddr>,
    stop: watch::Sender<bool>,
}

/// What one who mounts needs to itself.
struct Joining {
    places: Places,
    /// Nothing is mounted any more, and nothing will be.
    ending: bool,
}

/// Serves until everything is unmounted or it is told to end.
pub fn serve(config: Config) -> Result<()> {
    // It alone keeps the network, for the process that is started for it and for what apt's configuration runs.
    let errands = Errands::start().context("start a thread")?;
    let page = config.status.listen.map(crate::web::listen);
    crate::confine::mounts().context("give up the network")?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(RUNTIME_THREADS)
        .enable_all()
        .thread_name("poolfs-run")
        .build()
        .context("start the runtime")?;
    let result = runtime.block_on(serve_here(config, errands, page));
    runtime.shutdown_timeout(RUNTIME_PATIENCE);
    result
}

async fn serve_here(config: Config, errands: Errands, page: Option<Result<TcpListener>>) -> Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
    let mut hangup = signal(SignalKind::hangup()).context("listen for SIGHUP")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("listen for SIGINT")?;
    let server = Server::bind(&config.control.socket)?;
    let mut net = Network::start(&config, errands.clone());
    let served = serve_mounts(config, &mut net, errands, page, server, [&mut terminate, &mut interrupt], &mut hangup).await;
    // Also where nothing could be mounted: its tasks must not outlive the runtime's timers.
    net.stop().await;
    served?.flush().context("keep the last uses")
}

/// Mounts, and serves until that has an end; the store is to be flushed when nobody uses it any more.
async fn serve_mounts(
    config: Config,
    net: &mut Network,
    errands: Errands,
    page: Option<Result<TcpListener>>,
    server: Server,
    [terminate, interrupt]: [&mut Signal; 2],
    hangup: &mut Signal,
) -> Result<Arc<Store>> {
    let daemon = start(config, net, errands)?;
    {
        let refresher = Arc::clone(daemon.mounts.lock().refresher());
        let (store, catalog) = (Arc::clone(&daemon.store), Arc::clone(&daemon.catalog));
        net.announce(Arc::clone(&store), Arc::clone(&daemon.names), &daemon.config, &refresher.judged());
        net.judge(ListsAge { catalog, store, refresher: Arc::clone(&refresher) }, Arc::clone(&daemon.advisories), refresher);
    }
    let mut ended = daemon.mounts.lock().ended();
    daemon.report_mounted(|_| true)?;
    let settling = tokio::spawn(settle(Arc::clone(&daemon)));
    let attending = [
        tokio::spawn(Arc::clone(&daemon).attend()),
        tokio::spawn(Arc::clone(&daemon).keep_history()),
        tokio::spawn(Arc::clone(&daemon).mind_manners()),
    ];
    let web = page.and_then(|page| serve_page(&daemon, page));
    daemon.process.settled().await;
    Report::Ready.send();
    let mut stopping = daemon.stop.subscribe();
    let mut requests = Box::pin(server.run(Arc::clone(&daemon) as Arc<dyn Handler>));
    loop {
        tokio::select! {
            () = &mut requests => bail!("the control socket is closed"),
            _ = stopping.wait_for(|stop| *stop) => break,
            _ = terminate.recv() => { leave(&daemon).await; break }
            _ = hangup.recv() => if let Err(err) = daemon.reload() {
                tracing::error!("the configuration stays as it was: {err:#}");
            },
            _ = interrupt.recv() => { leave(&daemon).await; break }
            _ = ended.changed() => {
                told_unmounted(daemon.mounts.lock().reap()?);
                // Somebody may be mounting; whoever does looks at it again.
                if daemon.mounts.lock().is_empty() && let Ok(mut joining) = daemon.joining.try_lock() {
                    tracing::info!("nothing is mounted any more");
                    joining.ending = true;
                    break;
                }
            }
        }
    }
    drop(requests);
    server.drain().await;
    settling.abort();
    attending.iter().for_each(tokio::task::JoinHandle::abort);
    drop(web);
    Ok(Arc::clone(&daemon.store))
}

/// Tells the parent of directories that somebody has unmounted.
fn told_unmounted(gone: Vec<PathBuf>) {
    for path in gone {
        tracing::info!("{} was unmounted; its files are plain", path.display());
        Report::Unmounted { path }.send();
    }
}

/// Serves the status page, if its port is free: the mounts do without it.
fn serve_page(daemon: &Arc<Daemon>, listener: Result<TcpListener>) -> Option<Web> {
    let web = listener.and_then(|listener| Web::start(listener, Arc::clone(daemon) as Arc<dyn Witness>));
    let web = web.inspect_err(|err| daemon.problem(format!("no status page: {err:#}; then `poolfs down` and `poolfs up`"))).ok()?;
    daemon.page.get_or_init(|| web.local());
    Some(web)
}

/// Unmounts for a signal: cleanly where nobody is in the way, else by detaching.
async fn leave(daemon: &Arc<Daemon>) {
    if let Err(err) = unmount(daemon).await {
        tracing::warn!("{err:#}; detaching");
        daemon.joining.lock().await.ending = true;
        daemon.mounts.lock().detach();
    }
}

async fn unmount(daemon: &Arc<Daemon>) -> Result<()> {
    let mut joining = daemon.joining.lock().await;
    let daemon = Arc::clone(daemon);
    let done = tokio::task::spawn_blocking(move || {
        // apt may take its time: meanwhile others can ask for the mounts' figures.
        let locks = daemon.mounts.lock().locks()?;
        let held = locks.hold()?;
        daemon.mounts.lock().unmount_locked(&held)
    });
    done.await.context("unmount")??;
    joining.ending = true;
    Ok(())
}

/// Brings everything up and mounts.
fn start(config: Config, net: &mut Network, errands: Errands) -> Result<Arc<Daemon>> {
    let started = Instant::now();
    let specs = config.mounts.iter().map(|mount| spec(mount, &config.fs)).collect::<Result<Vec<_>>>()?;
    let prepared = prepare(&specs, &config.store.cache_dir)?;
    let store = Arc::new(Store::open(&config.store.state_dir)?);
    let objects = Arc::new(Objects::open(Arc::clone(&store), prepared.objects, config.store.quota)?);
    let incoming = Arc::new(Incoming::open(Arc::clone(&store), prepared.incoming)?);
    let mut problems = Vec::new();
    let wanted = config.apt.clone();
    let apt = errands.run(move || wanted.load()).unwrap_or_else(|err| {
        // Without apt's configuration nothing can be offered, and everything else works.
        tracing::error!("{err}; no package is offered before it is here");
        problems.push(err.to_string());
        AptConfig::of_options(Options::default(), &[], Environment::default())
    });
    let lists_directory = apt.lists_directory();
    let catalog = Arc::new(Catalog::open(Arc::clone(store.db()), apt)?);
    let runtime = tokio::runtime::Handle::current();
    let advisories = AdvisoryKeeper::new(&config.apt, &config.store.state_dir, Arc::clone(&catalog), net.process.clone());
    let source: Arc<dyn Source> = Arc::new(net.process.clone());
    let fetcher = Fetcher::new(Arc::clone(&incoming), Arc::clone(&source), runtime.clone(), FetchLimits::default());
    // Its own: the askers hold the turns of the other one while they wait for their deltas.
    let delta_fetcher = Fetcher::new(Arc::clone(&incoming), Arc::clone(&source), runtime.clone(), FetchLimits::default());
    let lists_elsewhere = match prepared.mounts.iter().any(|mount| mount.spec.role == Role::Lists) {
        true => None,
        false => open_lists(lists_directory.as_deref(), &mut problems),
    };
    let (apt, security_from) = (config.apt.clone(), config.net.security_from());
    let names = Arc::new(AptNames::new(Arc::clone(&catalog), Arc::clone(&store), apt, security_from, errands, problems));
    let repairer = Repairer::new(Arc::clone(&names) as Arc<dyn Names>, source, runtime.clone(), RepairLimits::default());
    let parts = TreeParts {
        store: Arc::clone(&store),
        objects: Arc::clone(&objects),
        names: Arc::clone(&names) as Arc<dyn Names>,
        fetcher: Arc::clone(&fetcher),
        mend: Arc::new(repairer.clone()),
        lists_elsewhere,
        runtime,
    };
    let shelf = shelf(&store, &objects, &prepared.mounts)?;
    let mounts = Mounts::mount(prepared.mounts, &parts, true, config.fs.threads)?;
    let shelf = Arc::new(shelf.after(mounts.refresher().judged()));
    net.process.give_from(Arc::clone(&shelf) as Arc<dyn poolfs_net::peer::Shelf>);
    let shared = deltas::Shared {
        store: Arc::clone(&store),
        objects: Arc::clone(&objects),
        catalog: Arc::clone(&catalog),
        shelf: Arc::clone(&shelf),
        network: Arc::new(net.process.clone()),
    };
    let state_dir = config.store.state_dir.clone();
    net.process.try_with(Prover::new(Arc::clone(&shelf), state_dir.clone()));
    let rebuilder = Rebuilder::new(shared.clone(), Arc::clone(&names) as Arc<dyn Names>, delta_fetcher, config.net.deltas, state_dir);
    fetcher.rebuild_with(Arc::new(RebuildHandle(Arc::clone(&rebuilder))));
    let mut deltas_left = Arc::default();
    if let Some(maker) = Maker::new(shared, Arc::clone(&fetcher), &config) {
        deltas_left = maker.left();
        net.make_deltas(maker, &mounts.refresher().judged());
    }
    let daemon = Daemon {
        read_last: Mutex::new(config.origin.clone()),
        manners: Manners::new(config.net.clone()),
        config,
        started,
        store,
        objects,
        catalog,
        incoming,
        fetcher,
        rebuilder,
        deltas_left,
        repairer,
        mounts: Mutex::new(mounts),
        joining: tokio::sync::Mutex::new(Joining { places: prepared.places, ending: false }),
        shelf,
        names,
        advisories,
        background_problems: Mutex::new(net.problems.clone()),
        process: net.process.clone(),
        pulse: facts::Pulse::default(),
        recorder: Mutex::new(Recorder::new(started)),
        page: OnceLock::new(),
        stop: watch::Sender::new(false),
    };
    Ok(Arc::new(daemon))
}

/// What peers may be given, reached beneath the mounts.
fn shelf(store: &Arc<Store>, objects: &Arc<Objects>, mounts: &[PreparedMount]) -> Result<StoreShelf> {
    let dir = |mount: &PreparedMount| Ok((mount.spec.role, mount.dir.try_clone()?));
    let dirs = mounts.iter().map(dir).collect::<std::io::Result<_>>().context("open the covered directories once more")?;
    Ok(StoreShelf::new(Arc::clone(store), Arc::clone(objects), dirs))
}

/// apt's lists directory where it is not mounted over; only packages that are not here yet depend on it.
fn open_lists(path: Option<&Path>, problems: &mut Vec<String>) -> Option<Arc<OwnedFd>> {
    let path = path?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    match rustix::fs::open(path, flags, Mode::empty()) {
        Ok(dir) => Some(Arc::new(dir)),
        Err(err) => {
            problems.push(format!("open apt's lists {}: {err}; run `apt-get update`", path.display()));
            None
        }
    }
}

fn spec(mount: &config::Mount, fs: &config::Fs) -> Result<MountSpec> {
    let of_mount = || format!("mount {}", mount.path.display());
    let words = Words::read(mount.options.iter().map(String::as_str)).and_then(Words::known).with_context(of_mount)?;
    mount_words::check(&words.options).with_context(of_mount)?;
    let options = MountOptions { no_lazy_archives: !fs.lazy_archives, ..words.options };
    Ok(MountSpec { role: mount.role, path: mount.path.clone(), options })
}

/// After the mounts answer: the files that changed while nothing was mounted, then what a crash may have left.
async fn settle(daemon: Arc<Daemon>) {
    for tree in daemon.trees() {
        daemon.scan(&tree).await;
    }
    if let Err(err) = tokio::task::spawn_blocking(move || tidy(&daemon)).await {
        tracing::error!("look for what a crash left: {err}");
    }
}

/// Checks the whole database, takes in objects that no row tells of, and gives up downloads that nobody came back for.
fn tidy(daemon: &Daemon) {
    if let Err(err) = daemon.store.db().check() {
        tracing::error!("{err}");
        daemon.background_problems.lock().push(err.to_string());
    }
    let mut any_adopted = false;
    for (digest, _) in daemon.objects.unrecorded() {
        // What the catalog does not name is of no use to anybody else.
        let kind = match daemon.catalog.by_digest(&digest) {
            Ok(Some(entry)) if entry.package.is_empty() => Kind::Index,
            Ok(_) => Kind::Package,
            Err(err) => {
                tracing::warn!(%digest, "an object without a record: {err}");
                continue;
            }
        };
        // It is judged with everything else.
        match daemon.objects.adopt(&digest, kind, Sharing::LocalOnly) {
            Ok(adopted) => {
                any_adopted |= adopted;
                tracing::info!(%digest, adopted, "an object without a record");
            }
            Err(err) => tracing::warn!(%digest, "an object without a record: {err}"),
        }
    }
    // A second reading of the lists has nothing to say of those that it finds unchanged: their problems would be forgotten.
    if any_adopted {
        daemon.mounts.lock().refresher().request(Vanished::Keep);
    }
    if let Err(err) = daemon.store.sweep_deltas() {
        tracing::warn!("forget deltas that are not here any more: {err}");
    }
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let before = i64::try_from(now.saturating_sub(INCOMING_KEPT).as_secs()).unwrap_or_default();
    match daemon.incoming.discard_older(before) {
        Ok(0) => {}
        Ok(count) => tracing::info!(count, "gave up downloads that nobody came back for"),
        Err(err) => tracing::warn!("give up old downloads: {err}"),
    }
}

impl Daemon {
    async fn scan(&self, tree: &Arc<Tree>) {
        match tree.scan().await {
            Ok(scanned) => {
                tracing::info!(role = %tree.role(), files = scanned.files, hashed = scanned.hashed, forgotten = scanned.forgotten, "compared with the database");
                self.background_problems.lock().extend(scanned.problems);
            }
            Err(err) => tracing::error!(role = %tree.role(), "compare with the database: {err}"),
        }
    }

    /// Tells the parent of the mounts at the paths that `wanted` says.
    fn report_mounted(&self, wanted: impl Fn(&Path) -> bool) -> Result<()> {
        let mounts = self.mounts.lock();
        for (stats, spec) in mounts.stats()?.into_iter().zip(mounts.specs()) {
            if wanted(&stats.path) {
                let options = mount_words::words_of(&spec.options);
                Report::Mounted { path: stats.path, device: stats.device, role: Some(spec.role), options }.send();
            }
        }
        Ok(())
    }

    /// The mount of that role. One that was unmounted a moment ago is none: its session's end is awaited, lest whoever mounts it again is told
    /// that it is mounted.
    async fn standing(&self, role: Role) -> Result<Option<MountSpec>> {
        let mut ended = self.mounts.lock().ended();
        let deadline = tokio::time::Instant::now() + SESSION_PATIENCE;
        loop {
            let found = {
                let mut mounts = self.mounts.lock();
                told_unmounted(mounts.reap()?);
                let found = mounts.specs().find(|spec| spec.role == role).cloned();
                found.map(|spec| (mounts.is_mounted(&spec.path), spec))
            };
            match found {
                None => return Ok(None),
                Some((true, spec)) => return Ok(Some(spec)),
                Some((false, spec)) if tokio::time::timeout_at(deadline, ended.changed()).await.is_err() => bail!(
                    "{} was unmounted here and is still mounted in another mount namespace: end what runs there, then mount it again",
                    spec.path.display()
                ),
                Some((false, _)) => {}
            }
        }
    }

    /// Mounts one more directory, or changes how one is mounted.
    async fn mount(self: &Arc<Self>, wish: config::Mount, remount: bool, seen: Seen) -> Result<Reply> {
        let mut joining = self.joining.lock().await;
        if joining.ending {
            return Ok(Reply::Ending);
        }
        if tokio::task::block_in_place(|| Seen::at(&wish.path)) != seen {
            bail!(
                "the daemon (pid {}) sees another directory at {}: it runs in another mount namespace or root; start one there with `-o config=FILE` \
                 and another control.socket in it",
                std::process::id(),
                wish.path.display()
            );
        }
        let mut spec = spec(&wish, &self.config.fs)?;
        let old = self.standing(spec.role).await?;
        match old {
            Some(old) if old.path == spec.path && remount => {
                if spec.options.browse && !old.options.browse {
                    bail!("mount option `browse` of {} cannot be changed by a remount: unmount it, then mount it so", spec.path.display());
                }
                spec.options.browse = old.options.browse;
                mount_words::check(&spec.options)?;
                self.mounts.lock().remount(&spec.path, spec.options)?;
                self.report_mounted(|path| path == spec.path)?;
                tracing::info!("{} was remounted {}", spec.path.display(), mount_words::words_of(&spec.options).join(","));
                return Ok(Reply::Mounted { already: false });
            }
            None if remount => bail!("{} is not mounted: mount it first", spec.path.display()),
            Some(old) if old.path == spec.path => return Ok(Reply::Mounted { already: true }),
            Some(old) => bail!(
                "{} is mounted on {} by this daemon, which has one of each: unmount that first, or give this one a daemon with a configuration of its \
                 own (config=FILE)",
                old.role,
                old.path.display()
            ),
            None => {}
        }
        let prepared = tokio::task::block_in_place(|| joining.places.add(&spec))?;
        let daemon = Arc::clone(self);
        let mounting = tokio::task::spawn_blocking(move || {
            // apt may take its time: meanwhile others can ask for the mounts' figures.
            let lock = prepared.lock()?;
            let dir = prepared.dir.try_clone().context("open the covered directory once more")?;
            daemon.shelf.set_dir(prepared.spec.role, dir);
            let path = prepared.spec.path.clone();
            let tree = daemon.mounts.lock().add(prepared, lock)?;
            anyhow::Ok((tree, path))
        });
        match mounting.await.context("mount")? {
            Ok((tree, path)) => {
                self.report_mounted(|mounted| mounted == path)?;
                tracing::info!("{} is mounted", path.display());
                let daemon = Arc::clone(self);
                tokio::spawn(async move { daemon.scan(&tree).await });
                Ok(Reply::Mounted { already: false })
            }
            Err(err) => {
                // The last of the others may have gone meanwhile.
                if self.mounts.lock().is_empty() {
                    joining.ending = true;
                    self.stop.send_replace(true);
                }
                Err(err)
            }
        }
    }

    fn trees(&self) -> Vec<Arc<Tree>> {
        self.mounts.lock().trees().cloned().collect()
    }

    fn problem(&self, text: String) {
        tracing::error!("{text}");
        self.background_problems.lock().push(text);
    }

    fn status(&self, net: NetStatus) -> Result<Status> {
        let stats = self.mounts.lock().stats()?;
        let hashed = stats.iter().map(|mount| mount.files_hashed).sum();
        let objects_short_bytes = stats.iter().map(|mount| mount.objects_short_bytes).max().unwrap_or(0);
        let mut withheld_by = stats.iter().map(|mount| self.store.kept_back(mount.role)).collect::<Result<Vec<_>, _>>()?.into_iter();
        let mounts = stats.into_iter().map(|mount| MountStatus {
            withheld_by: withheld_by.next().unwrap_or_default(),
            role: mount.role,
            path: mount.path,
            files: mount.counts.files,
            bytes: mount.counts.bytes,
            announced: mount.counts.announced,
            available: mount.counts.available,
            local_only: mount.counts.local_only,
            withheld: mount.counts.withheld,
            damaged: mount.counts.damaged,
            ghosts_opened: mount.ghosts_opened,
            blocks_checked: mount.blocks_checked,
            blocks_bad: mount.blocks_bad,
            blocks_mended: mount.blocks_mended,
        });
        Ok(Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            uptime_s: self.started.elapsed().as_secs(),
            page: self.page.get().copied(),
            mounts: mounts.collect(),
            bytes: self.received(),
            delta_saved_bytes: self.rebuilder.saved_bytes(),
            deltas_offered: net.deltas_offered,
            deltas_to_make: self.deltas_left.load(Ordering::Relaxed),
            last_update: self.trees().iter().find_map(|tree| tree.last_update()).map(Into::into),
            last_install: self.trees().iter().find_map(|tree| tree.last_install()).map(Into::into),
            downloads: self.downloads(),
            catalog_entries: self.catalog.len(),
            hashed,
            objects_bytes: self.objects.bytes(),
            objects_quota_bytes: self.objects.quota(),
            objects_short_bytes,
            node: net.node,
            fleet_members: net.fleet_members,
            fleet_told: net.fleet_told,
            uploaded: net.uploaded,
            upload_paused: self.manners.now().paused.map(str::to_owned),
            advisories: self.advisories.shown().iter().map(advisories::line).collect(),
            problems: self
                .names
                .problems()
                .into_iter()
                .chain(net.problems)
                .chain(self.background_problems.lock().iter().cloned())
                .chain(self.store.db().refused())
                .chain(self.fetcher.refused())
                .collect(),
        })
    }

    /// Bytes that arrived; those of deltas from peers are peers' bytes.
    fn received(&self) -> SourceBytes {
        let (files, deltas) = (self.fetcher.counters(), self.rebuilder.counters());
        SourceBytes { mirror: files.mirror + deltas.mirror, peer: files.peer + deltas.peer, delta: files.delta }
    }

    fn downloads(&self) -> Vec<Download> {
        let one = |progress: Progress| Download {
            name: progress.name,
            digest: progress.digest.to_string(),
            size: progress.size,
            done_bytes: progress.done_bytes,
            rate_bytes_s: progress.rate_bytes_s,
            givers: progress.givers.iter().map(|(giver, _)| giver.to_string()).collect(),
        };
        self.fetcher.progress().into_iter().map(one).collect()
    }

    async fn verify(&self, repair: bool, replies: &mpsc::Sender<Reply>) -> Result<()> {
        let files_bytes: u64 = self.mounts.lock().stats()?.iter().map(|mount| mount.counts.bytes).sum();
        let total_bytes = files_bytes + self.objects.bytes();
        let seen = Mutex::new((0, String::new()));
        let step = |name: &str, bytes: u64| {
            let mut seen = seen.lock();
            seen.0 += bytes;
            seen.1.clear();
            seen.1.push_str(name);
        };
        let check = async {
            let mut found = Verified::default();
            for (tree, path) in self.trees().into_iter().zip(self.paths()) {
                let mut verified = verify::files(&tree, repair, &step).await?;
                for names in [&mut verified.repaired, &mut verified.damaged] {
                    names.iter_mut().for_each(|name| *name = path.join(&*name).display().to_string());
                }
                found.add(verified);
            }
            found.add(verify::objects(&self.objects, repair.then_some(&self.repairer), &step).await?);
            Ok::<_, FsError>(found)
        };
        tokio::pin!(check);
        // When the client goes away, the check ends with this future.
        let found = loop {
            tokio::select! {
                found = &mut check => break found?,
                () = tokio::time::sleep(PROGRESS_INTERVAL) => {
                    let (done_bytes, file) = seen.lock().clone();
                    replies.send(Reply::Progress { done_bytes, total_bytes, file }).await.context("the client went away")?;
                }
            }
        };
        replies.send(Reply::Verified(found)).await.context("the client went away")
    }

    /// Where a file below a mount came from, or one of which only the digest is known.
    fn why(&self, file: &Path) -> Result<(Why, Option<Digest>)> {
        let mut why = Why { file: file.to_owned(), ..Why::default() };
        let digest = match file.to_str().and_then(|text| text.parse::<Digest>().ok()) {
            Some(digest) => Some(digest),
            None => {
                let mounts: Vec<(Role, PathBuf)> = self.trees().iter().map(|tree| tree.role()).zip(self.paths()).collect();
                let found = mounts.iter().find_map(|(role, mount)| Some((*role, file.strip_prefix(mount).ok()?)));
                let Some((role, below)) = found else {
                    bail!("{} is below no mount of this daemon: `poolfs status` shows them", file.display())
                };
                let record = self.store.file(role, below.as_os_str().as_bytes())?;
                let Some(record) = record else { bail!("no file {} is here", file.display()) };
                why.state = Some(record.state.to_string());
                why.sharing = Some(record.sharing.to_string());
                why.source = Some(record.provenance.to_string());
                why.verified_at = record.verified_at;
                if let Some(digest) = &record.digest {
                    why.rule = Some(self.names.verdict(digest, record.stamp.size, Some(record.sharing))?.to_string());
                }
                record.digest
            }
        };
        if let Some(digest) = &digest {
            why.delta = self.store.delta_note(digest)?.map(|note| note.note);
        }
        why.digest = digest.map(|digest| digest.to_string());
        Ok((why, digest))
    }

    fn paths(&self) -> Vec<PathBuf> {
        self.mounts.lock().paths().map(PathBuf::from).collect()
    }
}

impl Handler for Daemon {
    fn handle(self: Arc<Self>, request: Request, replies: mpsc::Sender<Reply>) -> Pin<Box<dyn Future<Output = Result<()>> + Send>> {
        Box::pin(async move {
            match request {
                control::Request::Status => {
                    let net = self.process.status().await;
                    let daemon = Arc::clone(&self);
                    let status = tokio::task::spawn_blocking(move || daemon.status(net)).await.context("count files")??;
                    replies.send(Reply::Status(Box::new(status))).await.context("the client went away")
                }
                control::Request::Peers => replies.send(Reply::Peers(self.process.peers().await?)).await.context("the client went away"),
                control::Request::Statements => {
                    replies.send(Reply::Statements(self.process.statements().await?)).await.context("the client went away")
                }
                control::Request::Why { file } => {
                    let (daemon, asked) = (Arc::clone(&self), file.clone());
                    let (mut why, digest) = tokio::task::spawn_blocking(move || daemon.why(&asked)).await.context("look the file up")??;
                    if let Some(digest) = digest {
                        why.history = self.process.why(digest).await;
                    }
                    replies.send(Reply::Why(Box::new(why))).await.context("the client went away")
                }
                control::Request::Mount { role, path, options, remount, seen } => {
                    let reply = self.mount(config::Mount { role, path, options }, remount, seen).await?;
                    replies.send(reply).await.context("the client went away")
                }
                control::Request::Port => {
                    let seen = self.process.port().await?;
                    replies.send(Reply::Port(seen)).await.context("the client went away")
                }
                control::Request::List => self.list(replies).await,
                control::Request::Collect { all } => {
                    let collected = tokio::task::spawn_blocking(move || self.collect(all)).await.context("free space")??;
                    replies.send(Reply::Collected(collected)).await.context("the client went away")
                }
                control::Request::Reload => replies.send(Reply::Reloaded(self.reload()?)).await.context("the client went away"),
                control::Request::LogLevel { level } => {
                    logging::set(&level)?;
                    self.process.log(&level);
                    Ok(())
                }
                control::Request::Down => {
                    unmount(&self).await?;
                    self.stop.send_replace(true);
                    Ok(())
                }
                control::Request::Verify { repair } => self.verify(repair, &replies).await,
            }
        })
    }
}
