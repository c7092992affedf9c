//! A signature that was proved false, from the machine that found out to those that hear of it: real nodes, real servers.

use super::*;
use crate::dht::{Family, Network};
use crate::krpc::Statement;
use crate::krpc::statement::Kind;
use crate::node::{Dht, NodeOptions};
use crate::peer::{Audience, Near, PeerServer, ServerLimits, ServerParts, Shelf, Shelved};
use crate::reputation::ledger::Standing;
use crate::reputation::{Conviction, KeptProofs, NodeFacts, READS_PER_HOUR, ReputationParts, ShelfTruth, Task, Telling, place};
use ed25519_dalek::SigningKey;
use poolfs_core::Sums;
use std::io::Write as _;
use std::sync::atomic::AtomicU16;

/// Addresses of machines: none may meet another one's, not of another run either.
static NEXT: AtomicU16 = AtomicU16::new(1);

/// Files that everybody may have.
struct Files(Vec<(Digest, File, Arc<Sums>)>);

impl Files {
    fn of(files: &[&[u8]]) -> Arc<Self> {
        let keep = |bytes: &&[u8]| {
            let mut file = tempfile::tempfile().unwrap();
            file.write_all(bytes).unwrap();
            (Digest::of(bytes), file, Arc::new(Sums::of(bytes)))
        };
        Arc::new(Self(files.iter().map(keep).collect()))
    }
}

impl Shelf for Files {
    fn find(&self, digest: &Digest, _: Audience) -> Option<Shelved> {
        let (_, file, sums) = self.0.iter().find(|(known, ..)| known == digest)?;
        Some(Shelved { file: file.try_clone().unwrap().into(), sums: Arc::clone(sums) })
    }

    fn damaged(&self, digest: &Digest, block: u64) {
        panic!("block {block} of {digest}");
    }
}

/// A node, with a database and so with a key that stays.
async fn node(dir: &std::path::Path) -> Dht {
    let n = NEXT.fetch_add(1, Ordering::Relaxed).to_be_bytes();
    let run = 100 + (std::process::id() % 100) as u8;
    let at = SocketAddr::from(([127, run, n[0], n[1]], 0));
    let netdb = Arc::new(NetDb::open(&dir.join("node")).unwrap());
    Dht::start(NodeOptions::new(vec![at], Network::Private), Some(netdb)).await.unwrap()
}

/// A machine with everything of the network side, whose tasks go when they are told to.
struct Machine {
    lab: Lab,
    dht: Dht,
    task: Task,
    convictions: mpsc::Receiver<Conviction>,
    _server: PeerServer,
}

impl Machine {
    async fn new(files: &[&[u8]]) -> Self {
        let (tell, convictions) = mpsc::channel(8);
        let lab = Lab::telling(&[], Some(tell));
        let dht = node(lab.dir.path()).await;
        let shelf: Arc<dyn Shelf> = Files::of(files);
        let netdb = lab.swarm.parts.netdb.clone().unwrap();
        let proofs = KeptProofs::new(Arc::clone(&netdb), Arc::clone(&shelf));
        let parts = ServerParts {
            listen: vec![dht.local(Family::V4).unwrap()],
            limits: ServerLimits::default(),
            near: Near::of_machine(),
            shelf: Arc::clone(&shelf),
            partials: Arc::default(),
            facts: Arc::new(NodeFacts { reachable: true, proofs: Some(proofs) }),
            auth: None,
            key: dht.keys(),
        };
        let server = PeerServer::start(parts).unwrap();
        let task = Task::open(ReputationParts {
            dht: dht.clone(),
            netdb,
            client: PeerClient::new(ClientLimits::default()),
            swarm: Arc::clone(&lab.swarm),
            truth: Arc::new(ShelfTruth(Arc::clone(&shelf))),
            shelf,
            fleet: None,
            telling: Telling::Everybody,
            convictions: mpsc::channel(1).1,
        })
        .unwrap();
        Self { lab, dht, task, convictions, _server: server }
    }

    /// Does what is due of what was proved.
    async fn speak(&mut self) {
        while let Ok(conviction) = self.convictions.try_recv() {
            self.task.convicted(conviction).await;
        }
        self.task.speak_due().await;
    }

    fn standings(&self) -> Vec<Standing> {
        self.task.rows().iter().map(|row| row.standing).collect()
    }

    fn is_credited(&self, peer: &FakePeer) -> bool {
        self.lab.swarm.peers().iter().any(|row| row.address == peer.contact && row.credited)
    }
}

/// Makes all of them know each other.
async fn join(nodes: &[Dht]) {
    let first = nodes[0].local(Family::V4).unwrap();
    for node in &nodes[1..] {
        node.bootstrap(vec![first]).await.unwrap();
    }
    for node in nodes {
        node.knows((nodes.len() - 1).min(8)).await.unwrap();
    }
}

/// The list of pieces of a file, with one that is false, and the file as it would be.
fn false_file(file: &[u8]) -> Vec<u8> {
    let mut lie = file.to_vec();
    lie[3 * PIECE..4 * PIECE].iter_mut().for_each(|byte| *byte ^= 0x55);
    lie
}

/// A liar signs a false list of one file to one machine, and is honest about another one to the others: who has the first file holds
/// the proof against it and takes the liar's credit away; who has not leaves it. The liar keeps nothing of what is said of him.
/// In networks of all these sizes.
#[tokio::test]
async fn a_false_list_is_told_and_checked() {
    for size in [4, 5, 9, 50] {
        tell_and_check(size).await;
    }
}

async fn tell_and_check(size: usize) {
    let file = file();
    let other: Vec<u8> = file.iter().map(|byte| byte.wrapping_add(1)).collect();
    let dirs: Vec<tempfile::TempDir> = (0..size - 3).map(|_| tempfile::tempdir().unwrap()).collect();
    let mut nodes = Vec::new();
    for dir in &dirs {
        nodes.push(node(dir.path()).await);
    }
    let liar = nodes[0].clone();
    let secret = liar.signing_key().to_bytes();
    let subject = liar.signing_key().verifying_key().to_bytes();
    let mut victim = Machine::new(&[&file]).await;
    let mut has = Machine::new(&[&file, &other]).await;
    let mut has_not = Machine::new(&[&other]).await;
    nodes.extend([&victim, &has, &has_not].map(|machine| machine.dht.clone()));
    join(&nodes).await;

    // The accomplice gives what the list says. Two that are honest contradict it.
    let lies = FakePeer::with_list(&file, Fault::Lies(vec![3]), Some((&false_file(&file), secret))).await;
    let honest = honest(&file, 2).await;
    let mirror = TestServer::start(MirrorFault::None, &file).await;
    *victim.lab.finder.found.lock() = vec![lies.found(), honest[0].found(), honest[1].found()];
    // Whether the list is here before everything else is chance.
    for _ in 0..20 {
        victim.lab.right(&file, &[mirror.url()]).await;
        if !victim.convictions.is_empty() {
            break;
        }
    }
    victim.speak().await;
    assert_eq!(victim.standings(), [Standing::Own], "{size}");
    let said = victim.task.rows().remove(0);
    assert_eq!((said.kind.as_str(), said.digest, said.piece), ("false list", Some(Digest::of(&file).to_string()), 3));

    // Whoever is to read it must find it.
    for key in victim.task.beside().to_vec() {
        while has.dht.stream_peers(key).recv().await.is_none() {}
    }
    let truthful = FakePeer::with_list(&other, Fault::None, Some((&other, secret))).await;
    for machine in [&mut has, &mut has_not] {
        *machine.lab.finder.found.lock() = vec![truthful.found()];
        machine.lab.right(&other, &[]).await;
        assert!(machine.is_credited(&truthful));
        machine.task.read_due().await;
    }
    assert_eq!((has.standings(), has.is_credited(&truthful)), (vec![Standing::Proved], false), "{size}");
    assert_eq!((has_not.standings(), has_not.is_credited(&truthful)), (vec![Standing::NoCopy], true), "{size}");
    let row = has.lab.swarm.peers().into_iter().find(|row| row.address == truthful.contact).unwrap();
    assert_eq!((row.bad, row.out_until), (0, 0), "unknown again, and not out");
    assert!(!has.lab.swarm.book.lock().verdicts.key_is_out(&subject, now_s()));
    assert_eq!(liar.status().await.unwrap().stored_statements, 0, "{size}: the subject keeps nothing");
    // A file that verifies earns the credit again, and the same word does not take it twice.
    has.lab.right(&other, &[]).await;
    has.task.forget_reads();
    has.task.read_due().await;
    assert!(has.is_credited(&truthful), "{size}");
    for node in &nodes {
        node.shutdown().await;
    }
}

/// 500 made-up machines say that a peer lied, of a file that the reader has, with proofs that do not exist, are true lists or are of somebody
/// else: they change nothing, and cost no more than an hour may.
#[tokio::test]
async fn sybils_change_nothing() {
    let (file, other) = (file(), file()[..5 * PIECE].to_vec());
    let dirs: Vec<tempfile::TempDir> = (0..3).map(|_| tempfile::tempdir().unwrap()).collect();
    let mut nodes = Vec::new();
    for dir in &dirs {
        nodes.push(node(dir.path()).await);
    }
    let mut reader = Machine::new(&[&file, &other]).await;
    nodes.push(reader.dht.clone());
    join(&nodes).await;
    let secret = [7; 32];
    let subject = SigningKey::from_bytes(&secret).verifying_key().to_bytes();
    for n in 0..500u32 {
        let speaker = SigningKey::from_bytes(&[&n.to_be_bytes()[..], &[3; 28]].concat().try_into().unwrap());
        let statement = Statement {
            kind: [Kind::FalseList, Kind::FalseBytes, Kind::FalseDelta][n as usize % 3],
            piece: 1,
            size: file.len() as u64,
            proof_at: "127.0.0.1:25".parse().unwrap(),
            subject,
            speaker: [0; 32],
            digest: Digest::of(&file).0,
            proof: Digest::of(&n.to_be_bytes()).0,
            time_s: now_s(),
        };
        // A node has so many lookups at once; what is refused is refused.
        let told = nodes[n as usize % 3].speak(place(&subject), statement.sign(&speaker).to_vec()).await.unwrap();
        told.outcome().await.unwrap();
    }
    let stored = reader.dht.status().await.unwrap().stored_statements;
    assert!((1..=32).contains(&stored), "{stored}");
    let peer = FakePeer::with_list(&other, Fault::None, Some((&other, secret))).await;
    *reader.lab.finder.found.lock() = vec![peer.found()];
    // The list of five pieces may come after the last of them.
    for _ in 0..50 {
        reader.lab.right(&other, &[]).await;
        if !reader.lab.swarm.credited_keys().is_empty() {
            break;
        }
    }
    assert_eq!(reader.lab.swarm.credited_keys(), [subject]);
    let before = reader.lab.swarm.peers();
    for _ in 0..READS_PER_HOUR {
        reader.task.forget_reads();
        reader.task.read_due().await;
    }
    assert_eq!(reader.lab.swarm.peers().len(), before.len());
    assert!(reader.is_credited(&peer), "unproved words of strangers have no weight");
    let standings = reader.standings();
    let has_no_weight = |standing: &Standing| matches!(standing, Standing::Unproved | Standing::Unavailable | Standing::NoCopy);
    assert!(!standings.is_empty() && standings.iter().all(has_no_weight), "{standings:?}");
    assert!(reader.task.is_spent(), "no look was free");
    for node in &nodes {
        node.shutdown().await;
    }
}
