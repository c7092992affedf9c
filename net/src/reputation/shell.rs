//! The task that speaks and reads, and what it keeps in the network side's database.

use super::ledger::{Hourly, Ledger, Listener, Next, Standing};
use super::proof::{self, Checked, Truth};
use super::{Conviction, READS_PER_HOUR, place, proof_key};
use crate::fleet::Fleet;
use crate::krpc::statement::Kind;
use crate::krpc::{Delta, Id, Statement};
use crate::netdb::{NetDb, NetDbError};
use crate::node::{Dht, Finding};
use crate::peer::{Audience, DeltaClaim, Facts, PeerClient, Shelf};
use crate::swarm::driver::Swarm;
use crate::swarm::fleet::MemberId;
use parking_lot::Mutex;
use poolfs_core::Digest;
use rusqlite::{OptionalExtension as _, params};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use std::collections::{HashMap, HashSet};
use std::net::{Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::sync::mpsc;

/// How often it is looked whether strangers may know by now of a file that a new statement names.
const SOON: Duration = Duration::from_secs(2);

/// How often it is looked whether something is due.
const TICK: Duration = Duration::from_secs(600);

/// A new statement that nobody took is told again after this.
const RETRY_S: u64 = 10;

/// What is said of one peer is read again after this, in seconds.
const READ_AGAIN_S: u64 = 24 * 3600;

/// What could not be read to its end is read again after this, in seconds.
const READ_REST_S: u64 = 3600;

/// A statement of this machine's own is told again after this, in seconds: nodes that keep it come and go.
const SPEAK_AGAIN_S: u64 = 24 * 3600;

/// Proofs fetched after one look at what is said of a peer.
const PROOFS_PER_READ_MAX: usize = 3;

/// Holders of one proof that are asked for it.
const HOLDERS_ASKED_MAX: usize = 4;

/// Bytes of proofs that are kept; past that the oldest is forgotten.
const PROOFS_BYTES_MAX: i64 = 32 * 1024 * 1024;

/// To whom this machine tells what it has proved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Telling {
    /// To everybody, with the proof: which shows that the file is here.
    Everybody,
    /// To its fleet alone: that somebody lied, and nothing of which file is here.
    Fleet,
    /// To nobody.
    Nobody,
}

/// What it is made of.
pub struct ReputationParts {
    /// The node that keeps and finds.
    pub dht: Dht,
    /// Where statements and proofs outlive the process.
    pub netdb: Arc<NetDb>,
    /// Asks for proofs.
    pub client: PeerClient,
    /// Whose peers are weighed.
    pub swarm: Arc<Swarm>,
    /// What is known to be true.
    pub truth: Arc<dyn Truth>,
    /// What may be shown to strangers.
    pub shelf: Arc<dyn Shelf>,
    /// The fleet that this machine is of.
    pub fleet: Option<Fleet>,
    /// To whom it speaks.
    pub telling: Telling,
    /// What the swarm's downloads prove.
    pub convictions: mpsc::Receiver<Conviction>,
}

impl std::fmt::Debug for ReputationParts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ReputationParts").field("telling", &self.telling).finish_non_exhaustive()
    }
}

/// One statement, for people.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StatementRow {
    /// Key of who is spoken about, in hexadecimal digits.
    pub subject: String,
    /// Key of who speaks.
    pub speaker: String,
    /// What is said: `false list`, `false delta`, `false bytes`.
    pub kind: String,
    /// The file, where one is named.
    pub digest: Option<String>,
    /// The first false piece.
    pub piece: u32,
    /// When, in Unix seconds.
    pub time_s: u64,
    /// What it came to here.
    pub standing: Standing,
}

/// The statements that are known, for whoever shows them. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Reputation {
    ledger: Arc<Mutex<Ledger>>,
}

impl Reputation {
    /// Reads what was kept; blocks for the disk. The task is to be run.
    pub fn open(parts: ReputationParts) -> Result<(Self, impl Future<Output = ()> + Send), NetDbError> {
        let task = Task::open(parts)?;
        Ok((Self { ledger: Arc::clone(&task.ledger) }, task.run()))
    }

    /// Every statement that was made or heard here and is not void, the newest first.
    pub fn rows(&self) -> Vec<StatementRow> {
        rows(&self.ledger)
    }
}

fn rows(ledger: &Mutex<Ledger>) -> Vec<StatementRow> {
    let mut ledger = ledger.lock();
    ledger.expire(now_s());
    let mut rows: Vec<StatementRow> = ledger.entries().map(|entry| row(&entry.statement, entry.standing)).collect();
    rows.sort_by_key(|row| std::cmp::Reverse(row.time_s));
    rows
}

fn row(statement: &Statement, standing: Standing) -> StatementRow {
    let hex = |bytes: &[u8; 32]| Digest(*bytes).to_string();
    let kind = match statement.kind {
        Kind::FalseList => "false list",
        Kind::FalseDelta => "false delta",
        Kind::FalseBytes => "false bytes",
    };
    StatementRow {
        subject: hex(&statement.subject),
        speaker: hex(&statement.speaker),
        kind: kind.to_owned(),
        digest: (statement.digest != [0; 32]).then(|| hex(&statement.digest)),
        piece: statement.piece,
        time_s: statement.time_s,
        standing,
    }
}

/// Proofs that this machine keeps and gives to who asks.
#[derive(Clone)]
pub struct KeptProofs {
    netdb: Arc<NetDb>,
    shelf: Arc<dyn Shelf>,
}

impl std::fmt::Debug for KeptProofs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("KeptProofs").finish_non_exhaustive()
    }
}

impl KeptProofs {
    /// The proofs in this database, of files that this shelf shows.
    pub fn new(netdb: Arc<NetDb>, shelf: Arc<dyn Shelf>) -> Self {
        Self { netdb, shelf }
    }

    /// The proof of this name, while strangers may know that its file is here: it tells as much. Blocks for the disk.
    pub fn get(&self, id: &Digest) -> Option<Vec<u8>> {
        let found = self.find(id).unwrap_or_else(|err| {
            tracing::warn!(%id, "a proof cannot be read: {err}");
            None
        });
        // Asked in any case: what is kept back takes as long as what is not there.
        let file = found.as_ref().map_or(*id, |(file, _)| *file);
        let is_shown = self.shelf.find(&file, Audience::Stranger).is_some();
        found.filter(|_| is_shown).map(|(_, proof)| proof)
    }

    fn find(&self, id: &Digest) -> Result<Option<(Digest, Vec<u8>)>, NetDbError> {
        let reader = self.netdb.db().reader()?;
        let mut statement = reader.prepare_cached("SELECT file, bytes FROM proof WHERE id = ?1")?;
        Ok(statement.query_row([id.0], |row| Ok((Digest(row.get(0)?), row.get(1)?))).optional()?)
    }
}

/// What this node tells of itself in answers to peers.
#[derive(Clone, Debug)]
pub struct NodeFacts {
    /// Whether other nodes have reached it.
    pub reachable: bool,
    /// What it keeps as proof.
    pub proofs: Option<KeptProofs>,
}

impl Facts for NodeFacts {
    fn reachable(&self) -> bool {
        self.reachable
    }

    fn deltas(&self, _: &Digest) -> Vec<(Delta, DeltaClaim)> {
        Vec::new()
    }

    fn proof(&self, id: &Digest) -> Option<Vec<u8>> {
        self.proofs.as_ref()?.get(id)
    }
}

/// See the module.
pub(crate) struct Task {
    parts: ReputationParts,
    ledger: Arc<Mutex<Ledger>>,
    /// As it is in the database.
    saved: Ledger,
    hourly: Hourly,
    /// When a peer's key may be read of again, in Unix seconds.
    read_at: HashMap<[u8; 32], u64>,
    /// When statements are told again, by their bytes, in Unix seconds.
    speak_at: HashMap<Vec<u8>, u64>,
    /// Keys of proofs that are announced.
    beside: Vec<Id>,
}

impl Task {
    pub(crate) fn open(parts: ReputationParts) -> Result<Self, NetDbError> {
        let saved = load(&parts.netdb, now_s())?;
        Ok(Self {
            ledger: Arc::new(Mutex::new(saved.clone())),
            saved,
            hourly: Hourly::new(READS_PER_HOUR),
            read_at: HashMap::new(),
            speak_at: HashMap::new(),
            beside: Vec::new(),
            parts,
        })
    }

    /// Goes on until the node ends.
    async fn run(mut self) {
        let mut met = self.parts.swarm.met();
        loop {
            self.ledger.lock().expire(now_s());
            self.speak_due().await;
            self.read_due().await;
            self.save().await;
            let wait = if self.has_unsaid() { SOON } else { TICK };
            tokio::select! {
                conviction = self.parts.convictions.recv() => match conviction {
                    Some(conviction) => self.convicted(conviction).await,
                    None => return,
                },
                changed = met.changed() => if changed.is_err() { return },
                () = tokio::time::sleep(wait) => {}
            }
        }
    }

    /// Whether there is a statement that nobody has taken yet, made so lately that its file may only now get its place.
    fn has_unsaid(&self) -> bool {
        let now = now_s();
        let is_said = |bytes: &[u8]| self.speak_at.get(bytes).is_some_and(|at| *at >= now + TICK.as_secs());
        let ledger = self.ledger.lock();
        let mut own = ledger.entries().filter(|entry| entry.standing == Standing::Own && is_new(&entry.statement, now));
        self.parts.telling != Telling::Nobody && own.any(|entry| !is_said(&entry.bytes[..]))
    }

    /// Makes a statement of what was proved, as far as anybody is to be told.
    pub(crate) async fn convicted(&mut self, conviction: Conviction) {
        let (subject, told) = match &conviction {
            Conviction::FalseList { shape, list, piece, is_public } => {
                let said = (Kind::FalseList, *piece, shape.size, shape.digest);
                (list.signer, is_public.then(|| Some((said, list.encode(shape)))).flatten())
            }
            Conviction::FalseDelta { claim, size, delta, is_public } => {
                let said = (Kind::FalseDelta, 0, *size, claim.new);
                (claim.signer, is_public.then(|| proof::of_delta(claim, delta).map(|proof| (said, proof))).flatten())
            }
            Conviction::FalseBytes { subject } => (*subject, None),
        };
        let key = self.parts.dht.signing_key();
        if subject == key.verifying_key().to_bytes() {
            return;
        }
        let ((kind, piece, size, digest), proof) = match (self.parts.telling, told) {
            (Telling::Everybody, Some((said, proof))) => (said, proof),
            // What strangers may not know names no file, and counts among members only.
            (Telling::Everybody | Telling::Fleet, _) if self.parts.fleet.is_some() => {
                ((Kind::FalseBytes, 0, 0, Digest([0; 32])), Vec::new())
            }
            _ => return,
        };
        let id = if proof.is_empty() { Digest([0; 32]) } else { Digest::of(&proof) };
        if !proof.is_empty() {
            let netdb = Arc::clone(&self.parts.netdb);
            let kept = tokio::task::spawn_blocking(move || keep_proof(&netdb, &id, &digest, &proof, now_s())).await;
            if let Err(why) = kept.map_err(|err| err.to_string()).and_then(|kept| kept.map_err(|err| err.to_string())) {
                tracing::warn!(%digest, "a false signature is not told of: its proof cannot be kept: {why}");
                return;
            }
        }
        let statement = Statement {
            kind,
            piece,
            size,
            proof_at: SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0)),
            subject,
            speaker: key.verifying_key().to_bytes(),
            digest: digest.0,
            proof: id.0,
            time_s: now_s(),
        };
        let bytes = statement.clone().sign(&key);
        if self.ledger.lock().say(statement, bytes) {
            tracing::info!(subject = %Digest(subject), %digest, ?kind, "said in the DHT");
        }
    }

    /// Tells what is to be told (again), and announces the proofs.
    pub(crate) async fn speak_due(&mut self) {
        let now = now_s();
        let own: Vec<(Statement, Vec<u8>)> = {
            let ledger = self.ledger.lock();
            let own = ledger.entries().filter(|entry| entry.standing == Standing::Own);
            own.map(|entry| (entry.statement.clone(), entry.bytes.to_vec())).collect()
        };
        self.speak_at.retain(|bytes, _| own.iter().any(|(_, said)| said == bytes));
        if self.parts.telling == Telling::Nobody {
            return;
        }
        let shelf = Arc::clone(&self.parts.shelf);
        let looking = move || {
            let is_shown = |statement: &Statement| {
                statement.kind == Kind::FalseBytes || shelf.find(&Digest(statement.digest), Audience::Stranger).is_some()
            };
            own.into_iter().filter(|(statement, _)| is_shown(statement)).collect::<Vec<_>>()
        };
        // It would tell of a file that has fallen silent.
        let shown = tokio::task::spawn_blocking(looking).await.unwrap_or_default();
        let beside: HashSet<Id> =
            shown.iter().filter(|(said, _)| said.proof != [0; 32]).map(|(said, _)| proof_key(&Digest(said.proof))).collect();
        let mut beside: Vec<Id> = beside.into_iter().collect();
        beside.sort_unstable();
        if beside != self.beside && self.parts.dht.announce_beside(beside.clone()).await.is_ok() {
            self.beside = beside;
        }
        for (statement, bytes) in shown {
            if self.speak_at.get(&bytes).is_some_and(|at| *at > now) {
                continue;
            }
            let told = match self.parts.dht.speak(place(&statement.subject), bytes.clone()).await {
                Ok(lookup) => lookup.outcome().await.map(|outcome| outcome.stored),
                Err(err) => Err(err),
            };
            let again_s = match told {
                Ok(1..) => SPEAK_AGAIN_S,
                // Among few nodes each may have been asked as often as it may be for now.
                _ if is_new(&statement, now) => RETRY_S,
                _ => TICK.as_secs(),
            };
            tracing::debug!(subject = %Digest(statement.subject), ?told, "told a statement");
            self.speak_at.insert(bytes, now.saturating_add(again_s));
        }
    }

    /// Reads what is said of peers that have something to lose.
    pub(crate) async fn read_due(&mut self) {
        let keys = self.parts.swarm.credited_keys();
        self.read_at.retain(|key, _| keys.contains(key));
        let own = self.parts.dht.signing_key().verifying_key().to_bytes();
        for key in keys.into_iter().filter(|key| *key != own) {
            let now = now_s();
            if self.read_at.get(&key).is_some_and(|at| *at > now) {
                continue;
            }
            if !self.hourly.take(now) {
                return;
            }
            let is_done = self.read(&key, own).await;
            self.read_at.insert(key, now_s() + if is_done { READ_AGAIN_S } else { READ_REST_S });
        }
    }

    /// Reads and weighs what is said of one. Returns whether that was all of it.
    async fn read(&mut self, key: &[u8; 32], own: [u8; 32]) -> bool {
        let found = match self.parts.dht.get_statements(place(key)).await {
            Ok(lookup) => lookup.collect().await,
            Err(err) => Err(err),
        };
        let Ok((found, _)) = found else { return false };
        let said: Vec<Vec<u8>> =
            found.into_iter().flat_map(|finding| if let Finding::Statements(some) = finding { some } else { Vec::new() }).collect();
        let now = now_s();
        let said: Vec<(Statement, Vec<u8>)> = said
            .into_iter()
            .filter_map(|bytes| Some((Statement::check(&bytes, now).ok().filter(|said| said.subject == *key)?, bytes)))
            .collect();
        let truth = Arc::clone(&self.parts.truth);
        let looking = move || -> Vec<(Statement, Vec<u8>, bool)> {
            let has_copy = |said: &Statement| truth.file(&Digest(said.digest)).is_some_and(|(size, _)| size == said.size);
            said.into_iter().map(|(said, bytes)| (has_copy(&said), said, bytes)).map(|(has, said, bytes)| (said, bytes, has)).collect()
        };
        let said = tokio::task::spawn_blocking(looking).await.unwrap_or_default();
        let mut proofs = 0;
        for (statement, bytes, has_copy) in said {
            let is_member = self.is_member(&statement.speaker);
            let next = self.ledger.lock().hear(&bytes, Listener { own, is_member, has_copy }, now_s());
            let is_lowered = match next {
                Next::Nothing => false,
                Next::Lower => true,
                Next::Prove(_) if proofs >= PROOFS_PER_READ_MAX || !self.hourly.take(now_s()) => return false,
                Next::Prove(id) => {
                    proofs += 1;
                    let checked = self.prove(&statement, &id).await;
                    self.ledger.lock().proved(&bytes, checked)
                }
            };
            if is_lowered {
                let peers = self.parts.swarm.doubt(key);
                tracing::info!(subject = %Digest(*key), speaker = %Digest(statement.speaker), peers, is_member, "a statement counts: its subject is unknown again");
            }
        }
        true
    }

    /// Fetches and checks a proof; `None`: nobody gives it.
    async fn prove(&self, statement: &Statement, id: &Digest) -> Option<Checked> {
        let mut holders = self.parts.dht.stream_peers(proof_key(id));
        let mut asked = HashSet::new();
        while let Some(holder) = holders.recv().await {
            if asked.len() >= HOLDERS_ASKED_MAX || !asked.insert(holder.addr) {
                continue;
            }
            let Ok(proof) = self.parts.client.proof(holder.addr, id).await else { continue };
            let (truth, statement) = (Arc::clone(&self.parts.truth), statement.clone());
            return tokio::task::spawn_blocking(move || proof::check(&statement, &proof, &*truth, now_s())).await.ok();
        }
        None
    }

    /// What is shown to people.
    #[cfg(test)]
    pub(crate) fn rows(&self) -> Vec<StatementRow> {
        rows(&self.ledger)
    }

    /// Keys of the proofs that are announced.
    #[cfg(test)]
    pub(crate) fn beside(&self) -> &[Id] {
        &self.beside
    }

    /// As if the time had come to read everything again.
    #[cfg(test)]
    pub(crate) fn forget_reads(&mut self) {
        self.read_at.clear();
    }

    /// Whether nothing more may be read in this hour.
    #[cfg(test)]
    pub(crate) fn is_spent(&mut self) -> bool {
        !self.hourly.take(now_s())
    }

    fn is_member(&self, key: &[u8; 32]) -> bool {
        let Some(fleet) = &self.parts.fleet else { return false };
        let mut id = [0; 20];
        id.copy_from_slice(&Sha256::digest(key)[..20]);
        fleet.view().member(MemberId(id)).is_some()
    }

    async fn save(&mut self) {
        let ledger = self.ledger.lock().clone();
        if ledger == self.saved {
            return;
        }
        let (netdb, kept) = (Arc::clone(&self.parts.netdb), ledger.clone());
        match tokio::task::spawn_blocking(move || save(&netdb, &kept)).await {
            Ok(Ok(())) => self.saved = ledger,
            Ok(Err(err)) => tracing::warn!("keep what is said of peers: {err}"),
            Err(err) => tracing::error!("keep what is said of peers: {err}"),
        }
    }
}

fn load(netdb: &NetDb, now_s: u64) -> Result<Ledger, NetDbError> {
    let reader = netdb.db().reader()?;
    let mut ledger = Ledger::default();
    let mut rows = reader.prepare("SELECT bytes, standing FROM statement ORDER BY place")?;
    for row in rows.query_map([], |row| Ok((row.get::<_, Vec<u8>>(0)?, row.get::<_, String>(1)?)))? {
        let (bytes, standing) = row?;
        // A standing that another version wrote says nothing here.
        if let Ok(standing) = serde_json::from_str(&standing) {
            ledger.restore(&bytes, standing, now_s);
        }
    }
    Ok(ledger)
}

fn save(netdb: &NetDb, ledger: &Ledger) -> Result<(), NetDbError> {
    netdb.db().transaction(|tx| {
        tx.execute("DELETE FROM statement", [])?;
        let mut insert = tx.prepare_cached("INSERT OR REPLACE INTO statement (place, bytes, standing) VALUES (?1, ?2, ?3)")?;
        for (place, entry) in (0i64..).zip(ledger.entries()) {
            let standing = serde_json::to_string(&entry.standing).expect("a word");
            insert.execute(params![place, &entry.bytes[..], standing])?;
        }
        Ok(())
    })
}

fn keep_proof(netdb: &NetDb, id: &Digest, file: &Digest, proof: &[u8], now_s: u64) -> Result<(), NetDbError> {
    netdb.db().transaction(|tx| {
        tx.execute(
            "INSERT OR REPLACE INTO proof (id, file, bytes, made_at) VALUES (?1, ?2, ?3, ?4)",
            params![id.0, file.0, proof, now_s.cast_signed()],
        )?;
        let oldest_kept = now_s.saturating_sub(crate::krpc::STATEMENT_AGE_MAX_S).cast_signed();
        tx.execute("DELETE FROM proof WHERE made_at < ?1", [oldest_kept])?;
        while tx.query_row("SELECT coalesce(sum(length(bytes)), 0) FROM proof", [], |row| row.get::<_, i64>(0))? > PROOFS_BYTES_MAX {
            tx.execute("DELETE FROM proof WHERE id = (SELECT id FROM proof WHERE id != ?1 ORDER BY made_at LIMIT 1)", [id.0])?;
        }
        Ok(())
    })
}

/// Whether a statement of this machine was made so lately that telling it is urgent.
fn is_new(statement: &Statement, now_s: u64) -> bool {
    statement.time_s.saturating_add(TICK.as_secs()) > now_s
}

/// Unix seconds.
fn now_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
