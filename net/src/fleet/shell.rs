//! The task that runs [`Core`] over the node's socket, and the handles to it.

use super::Origin;
use super::auth::{FleetKey, Gate};
use super::core::{Core, CoreDo};
use super::http::FleetAuth;
use super::members::{Me, Near};
use super::wire::{self, State};
use crate::dht::{Event, Family};
use crate::discovery::{self, DiscoveryConfig, Standing};
use crate::netdb::NetDb;
use crate::node::{Dht, Finding, Tapped};
use crate::peer::{Auth, prefixes_of_machine};
use crate::swarm::FileShape;
use crate::swarm::bits::Bits;
use crate::swarm::fleet::{FROM_MAX, GROUP_PIECES, GROUPS_AT_ONCE, MemberId, RANKS, View};
use poolfs_core::Digest;
use sha2::{Digest as _, Sha256};
use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tokio::sync::{broadcast, mpsc, oneshot, watch};
use tokio::task::JoinSet;

/// Commands that wait for the task; more callers wait in turn.
const COMMANDS_MAX: usize = 256;

/// Datagrams that wait for the task; more are lost, as on any full socket.
const DATAGRAMS_MAX: usize = 4_096;

/// Addresses from seeds and the DHT that wait for the task.
const CONTACTS_MAX: usize = 64;

/// What waits for the owner of one download: more than all groups at once can have under way, each piece twice.
const DOWNLOAD_MAX: usize = 2 * GROUPS_AT_ONCE * GROUP_PIECES as usize + 1;

/// Members named to one question who has something.
const NAMED_MAX: usize = RANKS * FROM_MAX;

/// The DHT is asked for members first after this, for a node that starts knows nobody; twice as late each time up to
/// [`TOPIC_UNTIL_JOINED`], and rarely once a member has answered.
const TOPIC_FIRST: Duration = Duration::from_secs(1);
const TOPIC_UNTIL_JOINED: Duration = Duration::from_secs(60);
const TOPIC_WHEN_JOINED: Duration = Duration::from_secs(3600);

/// The members are saved this often.
const SAVE_INTERVAL: Duration = Duration::from_secs(600);

/// How often it is looked which links this machine has: it may have started before its network did.
const NEAR_INTERVAL: Duration = Duration::from_secs(15);

/// How a machine is part of a fleet.
#[derive(Clone, Debug)]
pub struct FleetOptions {
    /// The fleet's key; `None`: the fleet of everybody on this machine's own links, in which nothing proves anything.
    pub key: Option<FleetKey>,
    /// This machine's zone, at most [`wire::ZONE_BYTES_MAX`] bytes: holders of the same zone are named first.
    pub zone: String,
    /// Coordinators are chosen within the zone only: one copy from the mirror for each zone.
    pub zone_local: bool,
    /// DNS names that list members.
    pub seeds: Vec<String>,
    /// Name servers for the seeds instead of the system's.
    pub name_servers: Vec<SocketAddr>,
    /// Where pieces are served (TCP), the port of the node's UDP socket.
    pub port: u16,
    /// Without a key: the prefixes on which members may be; `None`: those of this machine's links.
    pub near: Option<Vec<Near>>,
}

impl FleetOptions {
    /// A member without zone or seeds, on the port of the node.
    pub fn new(key: Option<FleetKey>, port: u16) -> Self {
        Self { key, zone: String::new(), zone_local: false, seeds: Vec::new(), name_servers: Vec::new(), port, near: None }
    }
}

/// What a download is to do next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FleetDo {
    /// Fetch this piece from there, and say how it went. The same piece may be asked for again, from elsewhere.
    Fetch {
        /// The piece, counted within the file.
        piece: u32,
        /// From where.
        from: Origin,
    },
    /// Every piece is here.
    Done,
}

#[derive(Debug)]
enum Command {
    Plan {
        shape: FileShape,
        has: Bits,
        todo: mpsc::Sender<FleetDo>,
        begun: oneshot::Sender<bool>,
    },
    Fetched {
        digest: Digest,
        piece: u32,
    },
    Failed {
        digest: Digest,
        piece: u32,
        from: Origin,
        gone: bool,
    },
    Arrived(Vec<FileShape>),
    Gone(Vec<Digest>),
    Who {
        digest: Digest,
        out: mpsc::Sender<SocketAddr>,
    },
    Hint(SocketAddr),
    /// A download was given up or needs nothing more.
    Dropped,
    Leave(oneshot::Sender<()>),
}

#[derive(Clone, Debug)]
struct Published {
    view: Arc<View>,
    list: Arc<[u8]>,
}

/// The handle of this machine's membership. The task ends when all handles and downloads are dropped.
#[derive(Clone, Debug)]
pub struct Fleet {
    commands: mpsc::Sender<Command>,
    published: watch::Receiver<Published>,
    told: Arc<AtomicUsize>,
    gate: Option<Arc<Gate>>,
}

/// A file that the fleet shares out the pieces of. Dropping it gives the file up.
#[derive(Debug)]
pub struct FleetDownload {
    digest: Digest,
    todo: mpsc::Receiver<FleetDo>,
    commands: mpsc::Sender<Command>,
}

impl FleetDownload {
    /// What to do next, as soon as there is something. `None`: the fleet's task ended; go on without it.
    pub async fn next(&mut self) -> Option<FleetDo> {
        self.todo.recv().await
    }

    /// Tells that a piece is here; also of a piece that came some other way.
    pub async fn fetched(&self, piece: u32) {
        self.tell(Command::Fetched { digest: self.digest, piece }).await;
    }

    /// Tells that a piece did not come. `gone`: the member cannot be reached, and is passed over for ten seconds.
    pub async fn failed(&self, piece: u32, from: Origin, gone: bool) {
        self.tell(Command::Failed { digest: self.digest, piece, from, gone }).await;
    }

    async fn tell(&self, command: Command) {
        // An error means that the task ended, which `next` says too.
        drop(self.commands.send(command).await);
    }
}

impl Drop for FleetDownload {
    /// Others wait for the place of this one, which the task sees at its next event.
    fn drop(&mut self) {
        self.todo.close();
        // An error means that other commands wait, which are events too, or that the task ended.
        drop(self.commands.try_send(Command::Dropped));
    }
}

impl Fleet {
    /// Joins the fleet over the node's socket; with `netdb` the members of earlier runs are asked first.
    pub async fn start(dht: &Dht, options: FleetOptions, netdb: Option<Arc<NetDb>>) -> Self {
        let (commands, commands_out) = mpsc::channel(COMMANDS_MAX);
        let (tap_in, tap) = mpsc::channel(DATAGRAMS_MAX);
        let (contacts_in, contacts) = mpsc::channel(CONTACTS_MAX);
        let task = Task::new(dht.clone(), options, netdb, contacts_in);
        let published = task.published.subscribe();
        let told = Arc::clone(&task.told);
        let gate = task.options.key.is_some().then(|| Arc::clone(&task.gate));
        // An error means that the node ended, and with it the tap: the task sees it.
        drop(dht.tap(tap_in, task.options.key.as_ref().map(FleetKey::topic)).await);
        tokio::spawn(task.run(commands_out, tap, contacts));
        Self { commands, published, told, gate }
    }

    /// The live members, this machine among them.
    pub fn view(&self) -> Arc<View> {
        Arc::clone(&self.published.borrow().view)
    }

    /// How many other members there are.
    pub fn members(&self) -> usize {
        self.published.borrow().view.len().saturating_sub(1)
    }

    /// Files that are here, of which all members that coordinate them were told; 0 while others are becoming their coordinators.
    pub fn told(&self) -> usize {
        self.told.load(Ordering::Relaxed)
    }

    /// Waits until there are at least so many other members. `false`: the task ended.
    pub async fn knows(&self, members: usize) -> bool {
        let mut published = self.published.clone();
        published.wait_for(|published| published.view.len() > members).await.is_ok()
    }

    /// Whether a member serves here.
    pub fn is_member(&self, contact: SocketAddr) -> bool {
        self.published.borrow().view.at(&contact).is_some()
    }

    /// The body of `GET /v1/members`: all members as [`wire::Change`]s, one after the other.
    pub fn members_bytes(&self) -> Arc<[u8]> {
        Arc::clone(&self.published.borrow().list)
    }

    /// Signs and checks requests; `None` without a key, when everybody is a stranger.
    pub fn auth(&self) -> Option<Arc<dyn Auth>> {
        let gate = Arc::clone(self.gate.as_ref()?);
        Some(Arc::new(FleetAuth { gate, fleet: self.clone() }))
    }

    /// Wants a file of which `has` is here. `None`: there is nobody else, or too much waits; go on as a lone machine.
    pub async fn plan(&self, shape: FileShape, has: Bits) -> Option<FleetDownload> {
        let (todo_in, todo) = mpsc::channel(DOWNLOAD_MAX);
        let (begun, answer) = oneshot::channel();
        self.commands.send(Command::Plan { shape, has, todo: todo_in, begun }).await.ok()?;
        let download = FleetDownload { digest: shape.digest, todo, commands: self.commands.clone() };
        answer.await.ok()?.then_some(download)
    }

    /// Tells of files that are whole and verified here and may be given to the fleet; at the start, of all of them.
    pub async fn arrived(&self, files: Vec<FileShape>) {
        // An error means that the task ended, and nobody is to be told.
        drop(self.commands.send(Command::Arrived(files)).await);
    }

    /// Tells of files that are not here any more, or must not be given away any more.
    pub async fn gone(&self, digests: Vec<Digest>) {
        drop(self.commands.send(Command::Gone(digests)).await);
    }

    /// Members that have told of this (`pf_who`), as its coordinators name them; the channel closes when all of them have answered or
    /// do not.
    pub async fn who(&self, digest: Digest) -> mpsc::Receiver<SocketAddr> {
        let (out, named) = mpsc::channel(NAMED_MAX);
        // An error means that the task ended: nobody is named.
        drop(self.commands.send(Command::Who { digest, out }).await);
        named
    }

    /// Says farewell to the members, and is none any more. When it returns the datagrams are the node's to send.
    pub async fn leave(&self) {
        let (left, done) = oneshot::channel();
        if self.commands.send(Command::Leave(left)).await.is_ok() {
            // An error means that the task ended meanwhile.
            drop(done.await);
        }
    }

    /// Tells an address at which a member may be.
    pub async fn hint(&self, at: SocketAddr) {
        drop(self.commands.send(Command::Hint(at)).await);
    }
}

/// A question who has something, and whom it has brought so far. Who asks the same meanwhile waits for the same answers.
struct Asked {
    answers_left: usize,
    named: Vec<SocketAddr>,
    out: Vec<mpsc::Sender<SocketAddr>>,
}

impl Asked {
    fn name(&mut self, holder: SocketAddr) {
        if self.named.len() < NAMED_MAX && !self.named.contains(&holder) {
            self.named.push(holder);
            self.out.iter().for_each(|out| tell(out, holder));
        }
    }
}

fn tell(out: &mpsc::Sender<SocketAddr>, holder: SocketAddr) {
    // There is as much room as there are names; an error means that nobody waits any more.
    let _ = out.try_send(holder);
}

struct Task {
    dht: Dht,
    options: FleetOptions,
    netdb: Option<Arc<NetDb>>,
    gate: Arc<Gate>,
    core: Core,
    published: watch::Sender<Published>,
    told: Arc<AtomicUsize>,
    standing: watch::Sender<Standing>,
    contacts_in: mpsc::Sender<SocketAddr>,
    downloads: HashMap<Digest, mpsc::Sender<FleetDo>>,
    asked: HashMap<Digest, Asked>,
    background: JoinSet<()>,
    saving: JoinSet<()>,
    topic_at: Instant,
    topic_wait: Duration,
    save_at: Instant,
    near_at: Instant,
}

fn unix_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// This machine's id in the fleet: the first 20 bytes of SHA-256 of its public key.
fn own_id(dht: &Dht) -> MemberId {
    let hash = Sha256::digest(dht.signing_key().verifying_key().as_bytes());
    MemberId(*hash.first_chunk().expect("SHA-256 has 32 bytes"))
}

fn new_core(dht: &Dht, options: &FleetOptions) -> Core {
    let near = options.key.is_none().then(|| options.near.clone().unwrap_or_else(prefixes_of_machine));
    let me =
        Me { id: own_id(dht), port: options.port, started_s: unix_s(), zone: options.zone.clone(), zone_local: options.zone_local, near };
    Core::new(me, options.key.clone(), rand::random(), Instant::now(), unix_s())
}

fn publish(core: &Core) -> Published {
    let list: Vec<u8> = core.members().all().iter().flat_map(|change| wire::change_to_vec(State::Alive, &change.record)).collect();
    Published { view: Arc::clone(core.view()), list: list.into() }
}

impl Task {
    fn new(dht: Dht, options: FleetOptions, netdb: Option<Arc<NetDb>>, contacts_in: mpsc::Sender<SocketAddr>) -> Self {
        let core = new_core(&dht, &options);
        let now = Instant::now();
        Self {
            published: watch::Sender::new(publish(&core)),
            told: Arc::default(),
            gate: Arc::clone(core.gate()),
            dht,
            options,
            netdb,
            core,
            standing: watch::Sender::new(Standing::default()),
            contacts_in,
            downloads: HashMap::new(),
            asked: HashMap::new(),
            background: JoinSet::new(),
            saving: JoinSet::new(),
            topic_at: now + TOPIC_FIRST,
            topic_wait: TOPIC_FIRST,
            save_at: now + SAVE_INTERVAL,
            near_at: now + NEAR_INTERVAL,
        }
    }

    async fn run(
        mut self,
        mut commands: mpsc::Receiver<Command>,
        mut tap: mpsc::Receiver<Tapped>,
        mut contacts: mpsc::Receiver<SocketAddr>,
    ) {
        self.begin();
        let mut events = self.dht.events();
        loop {
            self.act().await;
            let now = Instant::now();
            let timeout = [self.topic_at, self.save_at, self.near_at].into_iter().fold(self.core.next_timeout(), Instant::min);
            tokio::select! {
                biased;
                command = commands.recv() => match command {
                    Some(Command::Leave(left)) => {
                        self.core.leave(Instant::now());
                        self.act().await;
                        // Who waited for it may be gone.
                        let _ = left.send(());
                        break;
                    }
                    Some(command) => self.command(command),
                    None => break,
                },
                tapped = tap.recv() => match tapped {
                    Some(Tapped::Datagram(from, bytes)) => self.core.datagram(from, &bytes, Instant::now()),
                    Some(Tapped::Contact(at)) => self.core.hint(at, Instant::now()),
                    // The node ended.
                    None => break,
                },
                Some(at) = contacts.recv() => self.core.hint(at, Instant::now()),
                event = events.recv() => if matches!(event, Ok(Event::ClonedKey(_))) {
                    self.take_new_identity();
                } else if matches!(event, Err(broadcast::error::RecvError::Closed)) {
                    break;
                },
                Some(_) = self.background.join_next() => {}
                Some(_) = self.saving.join_next() => {}
                () = tokio::time::sleep_until(timeout.into()) => self.tick(now.max(timeout)),
            }
        }
        self.save();
        while self.saving.join_next().await.is_some() {}
    }

    /// Begins to look for members: the saved ones, and what the seeds list.
    fn begin(&mut self) {
        let (seeds, name_servers) = (self.options.seeds.clone(), self.options.name_servers.clone());
        let config = DiscoveryConfig { seeds, name_servers, ..DiscoveryConfig::default() };
        let id = own_id(&self.dht).0;
        self.background.spawn(discovery::run(config, id, [None; 2], self.standing.subscribe(), self.contacts_in.clone()));
        let (Some(netdb), contacts) = (self.netdb.clone(), self.contacts_in.clone()) else { return };
        self.background.spawn(async move {
            let read = tokio::task::spawn_blocking(move || netdb.saved_members()).await;
            match read {
                Ok(Ok(saved)) => {
                    for at in saved {
                        if contacts.send(at).await.is_err() {
                            return;
                        }
                    }
                }
                Ok(Err(err)) => tracing::error!(%err, "the saved members of the fleet are not read"),
                // Cancelled with the whole runtime.
                Err(_) => {}
            }
        });
    }

    /// Does all that the state machine wants done.
    async fn act(&mut self) {
        while let Some(todo) = self.core.poll() {
            match todo {
                CoreDo::Send { to, bytes } => {
                    // An error means that the node ended: the tap says so.
                    drop(self.dht.send_raw(to, bytes).await);
                }
                CoreDo::Fetch { digest, piece, from } => {
                    tracing::trace!(%digest, piece, ?from, "to fetch");
                    self.hand_over(digest, FleetDo::Fetch { piece, from });
                }
                CoreDo::Done(digest) => {
                    self.hand_over(digest, FleetDo::Done);
                    self.downloads.remove(&digest);
                }
                CoreDo::Holders { digest, holders } => {
                    let Some(asked) = self.asked.get_mut(&digest) else { continue };
                    holders.into_iter().for_each(|holder| asked.name(holder));
                    asked.answers_left = asked.answers_left.saturating_sub(1);
                    if asked.answers_left == 0 {
                        self.asked.remove(&digest);
                    }
                }
            }
        }
        self.forget_dropped();
        self.told.store(self.core.told(), Ordering::Relaxed);
        if !Arc::ptr_eq(self.core.view(), &self.published.borrow().view) {
            self.published.send_replace(publish(&self.core));
            let members = self.core.members().len();
            let standing = Standing { joined: members > 0, members };
            self.standing.send_if_modified(|known| std::mem::replace(known, standing) != standing);
        }
    }

    fn hand_over(&mut self, digest: Digest, todo: FleetDo) {
        let sent = self.downloads.get(&digest).is_some_and(|download| download.try_send(todo).is_ok());
        // Its owner went, or does not keep up with what it asked for itself.
        if !sent && let FleetDo::Fetch { piece, from } = todo {
            self.core.failed(digest, piece, from, false, Instant::now());
        }
    }

    /// Gives up the files whose downloads were dropped.
    fn forget_dropped(&mut self) {
        let dropped: Vec<Digest> = self.downloads.iter().filter(|(_, todo)| todo.is_closed()).map(|(digest, _)| *digest).collect();
        for digest in dropped {
            self.downloads.remove(&digest);
            self.core.forget(&digest, Instant::now());
        }
    }

    fn command(&mut self, command: Command) {
        let now = Instant::now();
        match command {
            Command::Plan { shape, has, todo, begun } => {
                self.forget_dropped();
                let wanted = self.core.want(shape, |piece| has.has(piece), now);
                if wanted {
                    self.downloads.insert(shape.digest, todo);
                }
                // Whoever asked and went has dropped the download too.
                let _ = begun.send(wanted);
            }
            Command::Fetched { digest, piece } => self.core.fetched(digest, piece, now),
            Command::Failed { digest, piece, from, gone } => {
                tracing::debug!(%digest, piece, ?from, gone, "a piece did not come");
                self.core.failed(digest, piece, from, gone, now)
            }
            Command::Arrived(files) => self.core.arrived(&files, now),
            Command::Gone(digests) => self.core.gone(&digests),
            Command::Who { digest, out } => match self.asked.get_mut(&digest) {
                Some(asked) => {
                    asked.named.iter().for_each(|holder| tell(&out, *holder));
                    asked.out.push(out);
                }
                None => {
                    let answers_left = self.core.who(digest, now);
                    if answers_left > 0 {
                        self.asked.insert(digest, Asked { answers_left, named: Vec::new(), out: vec![out] });
                    }
                }
            },
            Command::Hint(at) => self.core.hint(at, now),
            Command::Dropped => self.forget_dropped(),
            // The loop does that.
            Command::Leave(_) => {}
        }
    }

    fn tick(&mut self, now: Instant) {
        self.core.set_unix_time(now, unix_s());
        self.core.tick(now);
        if now >= self.near_at {
            self.near_at = now + NEAR_INTERVAL;
            if self.options.key.is_none() && self.options.near.is_none() {
                self.core.set_near(prefixes_of_machine());
            }
        }
        if now >= self.topic_at {
            let joined = !self.core.members().is_empty();
            self.topic_wait = (self.topic_wait * 2).min(TOPIC_UNTIL_JOINED);
            self.topic_at = now + if joined { TOPIC_WHEN_JOINED } else { self.topic_wait };
            if let Some(key) = &self.options.key {
                self.background.spawn(ask_dht(self.dht.clone(), key.topic(), self.contacts_in.clone()));
            }
        }
        if now >= self.save_at {
            self.save_at = now + SAVE_INTERVAL;
            self.save();
        }
    }

    /// Writes the members in the background, unless the last writing still goes on.
    fn save(&mut self) {
        let Some(netdb) = self.netdb.clone() else { return };
        let members = self.core.members().contacts();
        if members.is_empty() || !self.saving.is_empty() {
            return;
        }
        self.saving.spawn_blocking(move || {
            if let Err(err) = netdb.save_members(&members) {
                tracing::error!(%err, "the fleet's members are not saved");
            }
        });
    }

    /// Another machine had this one's key: it begins anew under its new one. Downloads go on without the fleet.
    fn take_new_identity(&mut self) {
        self.core = new_core(&self.dht, &self.options);
        self.downloads.clear();
        self.asked.clear();
        for (_, at) in self.published.borrow().view.contacts() {
            self.core.hint(at, Instant::now());
        }
    }
}

/// Looks for members under the fleet's key in the DHT.
async fn ask_dht(dht: Dht, topic: crate::krpc::Id, contacts: mpsc::Sender<SocketAddr>) {
    let Ok(mut lookup) = dht.get_peers(topic).await else { return };
    while let Some(finding) = lookup.next().await {
        let Finding::Contacts(found) = finding else { continue };
        for contact in found {
            if dht.local(Family::of(contact.addr)).is_some() && contacts.send(contact.addr).await.is_err() {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests;
