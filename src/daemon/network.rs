//! What the daemon has to do with the network: the process for it, and the tasks that tell that process what is here.

use crate::advisories::AdvisoryKeeper;
use crate::announcer::Announcer;
use crate::apt_names::AptNames;
use crate::config::{Announce, Config, Fleet, Net};
use crate::deltas::making::Maker;
use crate::dht_cmd;
use crate::errands::Errands;
use crate::holdings::Holdings;
use crate::lists_age::ListsAge;
use crate::manners::Manners;
use crate::net_process::NetProcess;
use crate::net_side::status_socket;
use crate::wire::{FleetSetup, NetStatus, Setup};
use anyhow::Result;
use poolfs_core::store::Store;
use poolfs_fs::refresh::Refresher;
use poolfs_net::fleet::auth::FleetKey;
use poolfs_net::reputation::Telling;
use std::sync::Arc;
use tokio::sync::watch;
use tokio::task::JoinSet;

/// See the module.
#[derive(Debug)]
pub(super) struct Network {
    /// The process.
    pub(super) process: NetProcess,
    /// What went wrong at the start, a line each with its remedy.
    pub(super) problems: Vec<String>,
    tasks: JoinSet<()>,
}

impl Network {
    /// Starts the process as `config` says.
    pub(super) fn start(config: &Config, errands: Errands) -> Self {
        let mut problems = Vec::new();
        let fleet = fleet(&config.fleet).unwrap_or_else(|err| {
            problems.push(format!("no fleet: {err}; then `poolfs down` and `poolfs up`"));
            None
        });
        let dir = config.store.state_dir.join("net");
        // Quiet hours hold from the first answer on.
        let net = Net { upload_bytes_s: Manners::new(config.net.clone()).now().upload_bytes_s, ..config.net.clone() };
        let (log, mirror) = (config.log.level.clone(), config.mirror.clone());
        let setup = Setup { dir, log, net, mirror, fleet, telling: telling(config) };
        let process = NetProcess::start(setup, errands);
        let mut tasks = JoinSet::new();
        match dht_cmd::StatusServer::bind(&status_socket(&config.control.socket)) {
            Ok(server) => {
                let asked = process.clone();
                tasks.spawn(async move {
                    let watched = asked.clone();
                    let node = move || {
                        let asked = asked.clone();
                        async move {
                            let NetStatus { node, fleet_members, .. } = asked.status().await;
                            anyhow::Ok(node.map(|node| dht_cmd::NodeStatus { node, fleet_members }))
                        }
                    };
                    let told = move |watcher| {
                        let watched = watched.clone();
                        async move { watched.told(watcher).await }
                    };
                    if let Err(err) = server.run(node, told).await {
                        tracing::warn!("the node's status socket is closed: {err:#}");
                    }
                });
            }
            Err(err) => problems.push(format!("`poolfs dht status` does not answer: {err:#}")),
        }
        problems.iter().for_each(|problem| tracing::error!("{problem}"));
        Self { process, problems, tasks }
    }

    /// Tells the fleet what `store` has, and the DHT too where this machine is to be of no fleet or its gateway, from now on.
    /// A fleet whose key cannot be read is one all the same: its members announce nothing outside.
    ///
    /// Nothing is told before everything was judged: what the database says is how it was judged when the daemon last ran.
    pub(super) fn announce(&mut self, store: Arc<Store>, names: Arc<AptNames>, config: &Config, judged: &watch::Receiver<bool>) {
        if config.fleet.key_file.is_some() {
            self.tasks.spawn(after(judged.clone(), Holdings::new(Arc::clone(&store), self.process.clone()).run()));
        }
        if config.fleet.announces_outside() {
            self.tasks.spawn(after(judged.clone(), Announcer::new(store, self.process.clone(), names, config.net.announce).run()));
        }
    }

    /// Has deltas made from now on, when everything was judged.
    pub(super) fn make_deltas(&mut self, maker: Maker, judged: &watch::Receiver<bool>) {
        self.tasks.spawn(after(judged.clone(), maker.run()));
    }

    /// Has what is here judged again when its lists have grown old, or other advisories are there.
    pub(super) fn judge(&mut self, lists: ListsAge, advisories: Arc<AdvisoryKeeper>, refresher: Arc<Refresher>) {
        self.tasks.spawn(lists.run());
        self.tasks.spawn(advisories.run(refresher));
    }

    /// Ends everything.
    pub(super) async fn stop(mut self) {
        self.tasks.shutdown().await;
        self.process.stop().await;
    }
}

/// The fleet that is configured, with its key: the network process reads no file of the machine's.
fn fleet(config: &Fleet) -> Result<Option<FleetSetup>> {
    let Some(key_file) = &config.key_file else { return Ok(None) };
    let key = FleetKey::load(key_file)?.to_bytes();
    Ok(Some(FleetSetup { key, zone: config.zone.clone(), zone_local: config.zone_local, seeds: config.seeds.clone() }))
}

/// To whom it is said what was proved of others. A fleet whose key cannot be read is one all the same.
fn telling(config: &Config) -> Telling {
    match config.net.announce {
        Announce::None => Telling::Nobody,
        _ if config.fleet.key_file.is_some() && !config.fleet.gateway => Telling::Fleet,
        _ => Telling::Everybody,
    }
}

/// Runs `task` once everything was judged.
async fn after(mut judged: watch::Receiver<bool>, task: impl Future<Output = ()>) {
    // Without its sender nothing is ever judged.
    if judged.wait_for(|judged| *judged).await.is_ok() {
        task.await;
    }
}
