//! What [`super::Discovery`] decides, done with real sockets and a real resolver.

use super::multicast::Multicast;
use super::{Action, Discovery, DiscoveryConfig, Hello, Seeds, TICK_MIN};
use std::net::SocketAddr;
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

/// Hellos that wait to be read; more are dropped, and come again.
pub(super) const HEARD_QUEUE_MAX: usize = 256;

/// How often the interfaces are looked at for new ones.
const RESCAN_INTERVAL: Duration = Duration::from_secs(30);

/// Idle wake-up where nothing is configured.
const IDLE: Duration = Duration::from_secs(3600);

/// How this node stands in the network, as its owner sees it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Standing {
    /// A node has answered.
    pub joined: bool,
    /// Nodes known.
    pub members: usize,
}

/// Runs discovery until `contacts` is closed or `standing`'s sender is gone.
///
/// `ports` are those of the node's sockets by family, `None` where it has none: what its hellos tell. Each address worth a
/// ping goes to `contacts`; it waits while that is full.
pub async fn run(
    config: DiscoveryConfig,
    id: [u8; 20],
    ports: [Option<u16>; 2],
    mut standing: watch::Receiver<Standing>,
    contacts: mpsc::Sender<SocketAddr>,
) {
    let mut discovery = Discovery::new(&config, id, Instant::now(), rand::random());
    let seeds = Seeds::new(config.name_servers);
    let (heard_in, mut heard) = mpsc::channel(HEARD_QUEUE_MAX);
    let mut multicast = config.links.map(|links| Multicast::new(links, heard_in, config.told.clone()));
    let mut rescan_at = Instant::now();
    let mut asking = JoinSet::new();
    loop {
        let now = Instant::now();
        if let Some(multicast) = &mut multicast
            && rescan_at <= now
        {
            multicast.rescan();
            rescan_at = now + RESCAN_INTERVAL;
        }
        for action in discovery.tick(now) {
            match action {
                Action::Resolve(origin) => {
                    let seeds = seeds.clone();
                    asking.spawn(async move {
                        let answer = seeds.resolve(&origin).await;
                        (origin, answer)
                    });
                }
                Action::Hello { joining } => {
                    if let Some(multicast) = &mut multicast {
                        multicast.send(ports.map(|port| port.map(|port| Hello { joining, port, id }.to_bytes()))).await;
                    }
                }
            }
        }
        let until_scan = multicast.is_some().then_some(rescan_at);
        let deadline = discovery.deadline().into_iter().chain(until_scan).min().unwrap_or(now + IDLE).max(now + TICK_MIN);
        let found = tokio::select! {
            () = tokio::time::sleep_until(deadline.into()) => Vec::new(),
            changed = standing.changed() => {
                if changed.is_err() {
                    return;
                }
                let Standing { joined, members } = *standing.borrow_and_update();
                discovery.set_standing(Instant::now(), joined, members);
                Vec::new()
            }
            Some((from, datagram)) = heard.recv() => discovery.heard(Instant::now(), from, &datagram).into_iter().collect(),
            Some(answer) = asking.join_next() => {
                // Cancelled with the whole runtime.
                let Ok((origin, answer)) = answer else { return };
                match &answer {
                    Ok(found) => tracing::debug!(%origin, found = found.len(), "asked for nodes"),
                    // Not an error of this machine's: it goes on with the other origins, and asks again.
                    Err(err) => tracing::info!(%origin, %err, "no nodes from here"),
                }
                discovery.resolved(Instant::now(), &origin, answer)
            }
            () = contacts.closed() => return,
        };
        for contact in found {
            if contacts.send(contact).await.is_err() {
                return;
            }
        }
    }
}
