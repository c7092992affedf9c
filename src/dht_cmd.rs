//! `poolfs dht`: looking into the DHT, and running a node of it that mounts nothing.
//!
//! `ping` and `lookup` run a node of their own for a moment: read-only (BEP 43), so that nobody keeps it in a table, and on
//! a free port. `status` asks a running node through its [`status`] socket. `node` is for machines that others join by.

mod show;
mod status;

pub use status::{Server as StatusServer, Status as NodeStatus};

use crate::cli::Common;
use crate::config::{self, Config};
use crate::net_side::status_socket;
use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};
use poolfs_core::Digest;
use poolfs_net::dht::address::PORT_MIN;
use poolfs_net::dht::{Family, FoundContact, Network};
use poolfs_net::discovery::{DiscoveryConfig, HostPort, Links};
use poolfs_net::fleet::auth::FleetKey;
use poolfs_net::fleet::{Fleet, FleetOptions};
use poolfs_net::krpc::Id;
use poolfs_net::netdb::NetDb;
use poolfs_net::node::{Dht, Finding, NodeOptions, expand_listen, listen_tcp};
use poolfs_net::told::{Tale, Watchers};
use std::net::{Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinSet;

/// Nobody answered, or nobody has the key.
const EXIT_NOTHING: u8 = 2;

/// Pause after a connection that could not be taken.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// The commands under `poolfs dht`.
#[derive(Debug, Args)]
pub struct DhtArgs {
    #[command(subcommand)]
    command: DhtCommand,
}

#[derive(Debug, Subcommand)]
enum DhtCommand {
    /// Ask one node whether it is there
    #[command(
        after_help = "Exit codes: 0 it answered, 1 error, 2 no answer within 14 s\n\nExample:\n  poolfs dht ping dht.example.org:9977"
    )]
    Ping {
        /// The node, as HOST:PORT
        host: HostPort,
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Find who has a file
    #[command(
        after_help = "Exit codes: 0 found, 1 error, 2 nobody has it\n\nExample:\n  poolfs dht lookup $(sha256sum hello.deb | cut -c1-64) --bootstrap dht.example.org:9977"
    )]
    Lookup {
        /// The file's SHA-256 (64 hexadecimal digits), or a key of the DHT (40)
        key: Key,
        #[command(flatten)]
        join: Join,
        /// Seconds to wait for the first node
        #[arg(long, value_name = "SECONDS", default_value_t = 20)]
        timeout: u64,
        /// As JSON, in one document when the lookup is over
        #[arg(long)]
        json: bool,
    },
    /// Show how a running node is
    Status {
        /// The node's status socket [default: dht.sock beside control.socket]
        #[arg(long, value_name = "PATH")]
        socket: Option<PathBuf>,
        /// As JSON
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        common: Common,
    },
    /// Show everything that this machine tells others, as it goes out: keys, contacts, what is said with them, answers
    #[command(
        after_help = "It goes on until it is ended. What mirrors are asked is not shown.\n\nExit codes: 1 error, or the node ended\n\nExample:\n  poolfs dht watch"
    )]
    Watch {
        /// The node's status socket [default: dht.sock beside control.socket]
        #[arg(long, value_name = "PATH")]
        socket: Option<PathBuf>,
        /// As JSON, a line for each
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        common: Common,
    },
    /// Run a node that mounts nothing and serves no files: one that others join by
    #[command(
        after_help = "It runs in the foreground until SIGTERM or SIGINT, then saves its routing tables. With fleet.key_file configured it is a member of the fleet that has nothing.\n\nExample:\n  poolfs dht node --network public"
    )]
    Node {
        /// Address to listen on, UDP; twice for one of each family [default: net.listen]
        #[arg(long, value_name = "ADDRESS:PORT")]
        listen: Vec<SocketAddr>,
        #[command(flatten)]
        join: Join,
        /// Where the key and the routing tables are kept [default: net/ below store.state_dir]
        #[arg(long, value_name = "DIR")]
        state_dir: Option<PathBuf>,
        /// Where `poolfs dht status` asks [default: dht.sock beside control.socket]
        #[arg(long, value_name = "PATH")]
        socket: Option<PathBuf>,
        /// Say as JSON where it listens, when it does
        #[arg(long)]
        json: bool,
    },
}

/// How the network is joined.
#[derive(Debug, Args)]
struct Join {
    /// A node to join by, as HOST:PORT; may be given several times [default: net.bootstrap]
    #[arg(long, value_name = "HOST:PORT")]
    bootstrap: Vec<HostPort>,
    /// A DNS name that lists nodes; may be given several times [default: net.seeds]
    #[arg(long, value_name = "NAME")]
    seed: Vec<String>,
    /// What kind of network it is [default: net.network]
    #[arg(long, value_enum)]
    network: Option<config::Network>,
    /// Do not look for nodes on the link
    #[arg(long)]
    no_discovery: bool,
    #[command(flatten)]
    common: Common,
}

impl Join {
    fn config(&self) -> Result<Config> {
        Config::load(self.common.config.as_deref())
    }

    fn network(&self, config: &Config) -> config::Network {
        self.network.unwrap_or(config.net.network)
    }

    /// What was typed takes the place of what is configured.
    fn discovery(self, config: &Config) -> Result<DiscoveryConfig> {
        let links = (config.net.discovers_on(self.network(config)) && !self.no_discovery).then(Links::default);
        let typed = !self.bootstrap.is_empty() || !self.seed.is_empty();
        let (bootstrap, seeds) = if typed {
            (self.bootstrap, self.seed)
        } else {
            (config.net.bootstrap.iter().map(|text| text.parse()).collect::<Result<_, _>>()?, config.net.seeds.clone())
        };
        Ok(DiscoveryConfig { bootstrap, seeds, links, ..DiscoveryConfig::default() })
    }
}

/// What a lookup looks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Key(Id);

impl std::str::FromStr for Key {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Ok(digest) = text.parse::<Digest>() {
            return Ok(Self(Id(digest.file_key())));
        }
        match Id::from_hex(text) {
            Some(id) => Ok(Self(id)),
            None => Err(format!("{} characters: a file's SHA-256 has 64 hexadecimal digits, a key 40", text.chars().count())),
        }
    }
}

/// Runs one of them.
pub fn run(args: DhtArgs) -> Result<ExitCode> {
    // One thread: a node is one task, and the state machine is the only work.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("start the runtime")?;
    runtime.block_on(async {
        match args.command {
            DhtCommand::Ping { host, json } => ping(host, json).await,
            DhtCommand::Lookup { key, join, timeout, json } => lookup(key.0, join, Duration::from_secs(timeout), json).await,
            DhtCommand::Status { socket, json, common } => {
                let socket = socket_or_default(socket, &Config::load(common.config.as_deref())?);
                let status = status::ask(&socket).await?;
                if json {
                    crate::show::json(&status)?
                } else {
                    show::status(&status)
                }
                Ok(ExitCode::SUCCESS)
            }
            DhtCommand::Watch { socket, json, common } => {
                watch(&socket_or_default(socket, &Config::load(common.config.as_deref())?), json).await
            }
            DhtCommand::Node { listen, join, state_dir, socket, json } => node(listen, join, state_dir, socket, json).await,
        }
    })
}

fn socket_or_default(typed: Option<PathBuf>, config: &Config) -> PathBuf {
    typed.unwrap_or_else(|| status_socket(&config.control.socket))
}

/// A node of its own for one question.
async fn passing(network: Network, discovery: DiscoveryConfig) -> Result<Dht> {
    let options = NodeOptions { read_only: true, discovery, ..NodeOptions::new(expand_listen((Ipv6Addr::UNSPECIFIED, 0).into()), network) };
    Ok(Dht::start(options, None).await?)
}

async fn ping(host: HostPort, json: bool) -> Result<ExitCode> {
    if host.port < PORT_MIN {
        bail!("no node is ever asked on a port below {PORT_MIN}: {host}");
    }
    // The one who typed the address vouches for it: no rule of public networks applies.
    let dht = passing(Network::Private, DiscoveryConfig::default()).await?;
    let pong = dht.ping_host(&host).await?;
    if json {
        crate::show::json(&show::ping(&host, pong.as_ref()))?;
    } else {
        match &pong {
            Some(pong) => crate::show::line(&show::pong(pong)),
            None => crate::show::line(&format!("{host}: no answer within 14 s")),
        }
    }
    Ok(found(pong.is_some()))
}

async fn lookup(key: Id, join: Join, timeout: Duration, json: bool) -> Result<ExitCode> {
    let config = join.config()?;
    let network = join.network(&config).into();
    let discovery = join.discovery(&config)?;
    if discovery.bootstrap.is_empty() && discovery.seeds.is_empty() && discovery.links.is_none() {
        bail!("no node to begin with: give --bootstrap HOST:PORT, or set net.bootstrap in the configuration");
    }
    let dht = passing(network, discovery).await?;
    match tokio::time::timeout(timeout, dht.knows(1)).await {
        Ok(joined) => joined?,
        Err(_) => bail!("no node answered within {} s: check --bootstrap, and that UDP is let through", timeout.as_secs()),
    }
    let mut lookup = dht.get_peers(key).await?;
    let mut contacts: Vec<FoundContact> = Vec::new();
    while let Some(finding) = lookup.next().await {
        let Finding::Contacts(found) = finding else { continue };
        for contact in found {
            match contacts.iter_mut().find(|known| known.addr == contact.addr) {
                // It comes again with what it says of itself, or from a node that does not know that.
                Some(known) => known.pv = contact.pv.or(known.pv.take()),
                None => contacts.push(contact),
            }
        }
    }
    let outcome = lookup.outcome().await?;
    contacts.sort_by_key(|contact| contact.addr);
    if json {
        crate::show::json(&show::lookup(key, &contacts, &outcome))?;
    } else {
        contacts.iter().for_each(|contact| crate::show::line(&show::contact(contact)));
        crate::show::line(&show::outcome(contacts.len(), &outcome));
    }
    Ok(found(!contacts.is_empty()))
}

async fn watch(socket: &Path, json: bool) -> Result<ExitCode> {
    let ready = || {
        if json {
            return crate::show::json(&serde_json::json!({ "watching": socket }));
        }
        crate::show::line("watching");
        Ok(())
    };
    let each = |tale: Tale| {
        if json {
            return crate::show::json(&show::tale(&tale));
        }
        crate::show::line(&show::tale_line(&tale));
        Ok(())
    };
    status::follow(socket, ready, each).await?;
    Ok(ExitCode::SUCCESS)
}

fn found(is: bool) -> ExitCode {
    if is { ExitCode::SUCCESS } else { ExitCode::from(EXIT_NOTHING) }
}

async fn node(listen: Vec<SocketAddr>, join: Join, state_dir: Option<PathBuf>, socket: Option<PathBuf>, json: bool) -> Result<ExitCode> {
    let config = join.config()?;
    crate::logging::start(&config.log.level)?;
    let mut stop = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("listen for SIGINT")?;
    let listen = if listen.is_empty() { expand_listen(config.net.listen) } else { listen.into_iter().flat_map(expand_listen).collect() };
    let dir = state_dir.unwrap_or_else(|| config.store.state_dir.join("net"));
    let netdb = Arc::new(NetDb::open(&dir)?);
    let network = Network::from(join.network(&config));
    let socket = &socket_or_default(socket, &config);
    let options = NodeOptions { discovery: join.discovery(&config)?, ..NodeOptions::new(listen, network) };
    let dht = Dht::start(options, Some(Arc::clone(&netdb))).await?;
    let fleet = join_fleet(&dht, netdb, &config.fleet).await?;
    let status = status::Server::bind(socket)?;
    let (asked, fleet, watchers) = (dht.clone(), fleet.map(Arc::new), Arc::new(Watchers::new(dht.told())));
    let status_of = move || {
        let (dht, fleet) = (asked.clone(), fleet.clone());
        async move {
            let fleet_members = fleet.map_or(0, |fleet| fleet.members() + 1);
            anyhow::Ok(Some(status::Status { node: dht.status().await?, fleet_members }))
        }
    };
    let told = move |watcher| {
        let watchers = Arc::clone(&watchers);
        async move { anyhow::Ok(watchers.next(watcher).await?) }
    };
    let bound: Vec<SocketAddr> = Family::ALL.into_iter().filter_map(|family| dht.local(family)).collect();
    // On a public network a node counts only after another one could open a TCP connection to its port.
    let mut doors = JoinSet::new();
    if network == Network::Public {
        for address in &bound {
            let door = listen_tcp(*address).with_context(|| format!("listen on TCP {address}, where other nodes knock"))?;
            doors.spawn(open_doors(door));
        }
    }
    if json {
        crate::show::json(&show::Started { listen: &bound, socket })?;
    } else {
        crate::show::line(&format!("listening on UDP {}", bound.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")));
    }
    tokio::select! {
        _ = stop.recv() => {}
        _ = interrupt.recv() => {}
        failed = status.run(status_of, told) => failed?,
    }
    dht.shutdown().await;
    Ok(ExitCode::SUCCESS)
}

/// A member that has nothing to give, where a fleet is configured.
async fn join_fleet(dht: &Dht, netdb: Arc<NetDb>, config: &config::Fleet) -> Result<Option<Fleet>> {
    let (Some(key_file), Some(local)) = (&config.key_file, Family::ALL.into_iter().find_map(|family| dht.local(family))) else {
        return Ok(None);
    };
    let options = FleetOptions {
        zone: config.zone.clone(),
        zone_local: config.zone_local,
        seeds: config.seeds.clone(),
        ..FleetOptions::new(Some(FleetKey::load(key_file)?), local.port())
    };
    Ok(Some(Fleet::start(dht, options, Some(netdb)).await))
}

/// Takes each connection and closes it: there is nothing to be had here.
async fn open_doors(door: TcpListener) {
    loop {
        if let Err(err) = door.accept().await {
            // Out of descriptors, mostly; at once again would spin.
            tracing::debug!(%err, "accept");
            tokio::time::sleep(ACCEPT_PAUSE).await;
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    /// A digest taken for a key, or the other way round, finds nobody and says nothing.
    #[test]
    fn keys_are_digests_or_ids() {
        let digest = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        assert_eq!(digest.parse(), Ok(Key(Id(digest.parse::<Digest>().unwrap().file_key()))));
        assert_eq!("00".repeat(20).parse(), Ok(Key(Id([0; 20]))));
        assert_eq!("hello".parse::<Key>(), Err("5 characters: a file's SHA-256 has 64 hexadecimal digits, a key 40".to_owned()));
        assert!("g".repeat(64).parse::<Key>().is_err());
    }
}
