//! Fleets over loopback sockets, with pieces that are only counted.
#![allow(clippy::unwrap_used, reason = "tests")]

mod hostile;

use super::*;
use crate::dht::Network;
use crate::node::NodeOptions;
use crate::swarm::fleet::{GroupKey, group_bits, groups};
use parking_lot::Mutex;
use poolfs_core::piece::PIECE_BYTES;
use std::collections::HashSet;
use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};

fn key() -> FleetKey {
    FleetKey::new([3; 32])
}

/// A loopback address of its own.
async fn node() -> (Dht, SocketAddr) {
    static NEXT: AtomicU8 = AtomicU8::new(1);
    let address = (Ipv4Addr::new(127, 10, 0, NEXT.fetch_add(1, Ordering::Relaxed)), 0).into();
    let dht = Dht::start(NodeOptions::new(vec![address], Network::Private), None).await.unwrap();
    let at = dht.local(Family::V4).unwrap();
    (dht, at)
}

async fn join(dht: &Dht, at: SocketAddr, key: Option<FleetKey>, first: SocketAddr) -> Fleet {
    let fleet = Fleet::start(dht, FleetOptions { near: Some(Vec::new()), ..FleetOptions::new(key, at.port()) }, None).await;
    if at != first {
        fleet.hint(first).await;
    }
    fleet
}

struct Machine {
    at: SocketAddr,
    has: Mutex<HashSet<u32>>,
    dead: Mutex<bool>,
}

struct Machines {
    all: Vec<Machine>,
    /// Pieces fetched from the mirror, by each machine.
    mirror: Vec<AtomicU32>,
}

fn machines(at: impl IntoIterator<Item = SocketAddr>) -> Machines {
    let all: Vec<Machine> = at.into_iter().map(|at| Machine { at, has: Mutex::default(), dead: Mutex::new(false) }).collect();
    let mirror = all.iter().map(|_| AtomicU32::new(0)).collect();
    Machines { all, mirror }
}

impl Machines {
    /// Fetches one piece as the fleet says: `Err(gone)` where that fails.
    fn fetch(&self, to: usize, piece: u32, from: Origin) -> Result<(), bool> {
        match from {
            Origin::Mirror => drop(self.mirror[to].fetch_add(1, Ordering::Relaxed)),
            Origin::Member(contact) => {
                let holder = self.all.iter().find(|machine| machine.at == contact).expect("only members are named");
                if *holder.dead.lock() {
                    return Err(true);
                }
                holder.has.lock().contains(&piece).then_some(()).ok_or(false)?;
            }
        }
        self.all[to].has.lock().insert(piece);
        Ok(())
    }

    /// Downloads until everything is here, or until so many pieces are.
    async fn download(&self, me: usize, fleet: &Fleet, shape: FileShape, until: usize) {
        let mut download = fleet.plan(shape, Bits::none(shape.pieces())).await.expect("there are others");
        while let Some(FleetDo::Fetch { piece, from }) = download.next().await {
            match self.fetch(me, piece, from) {
                Ok(()) => download.fetched(piece).await,
                Err(gone) => download.failed(piece, from, gone).await,
            }
            if self.all[me].has.lock().len() >= until {
                return;
            }
            tokio::task::yield_now().await;
        }
    }
}

/// What each of eight machines fetched from the mirror that joined by knowing one of them and wanted one file of 100 pieces at the
/// same time, while number 5 died with half of it. All others have it whole.
async fn eight_machines_one_dies() -> Vec<u32> {
    const MEMBERS: usize = 8;
    let mut nodes = Vec::new();
    for _ in 0..MEMBERS {
        nodes.push(node().await);
    }
    let first = nodes[0].1;
    let mut fleets = Vec::new();
    for (dht, at) in &nodes {
        fleets.push(join(dht, *at, Some(key()), first).await);
    }
    for fleet in &fleets {
        assert!(fleet.knows(MEMBERS - 1).await);
    }
    let all = nodes.iter().map(|(_, at)| Machine { at: *at, has: Mutex::default(), dead: Mutex::new(false) }).collect();
    let machines = Arc::new(Machines { all, mirror: (0..MEMBERS).map(|_| AtomicU32::new(0)).collect() });
    let shape = FileShape::of(Digest([9; 32]), 100 * u64::from(PIECE_BYTES));
    let mut running = JoinSet::new();
    for (me, fleet) in fleets.into_iter().enumerate() {
        let (machines, dht) = (Arc::clone(&machines), nodes[me].0.clone());
        running.spawn(async move {
            let dies = me == 5;
            machines.download(me, &fleet, shape, if dies { 50 } else { 100 }).await;
            if dies {
                *machines.all[me].dead.lock() = true;
                dht.shutdown().await;
                return None;
            }
            // Lives on: others may need it.
            Some(fleet)
        });
    }
    let fleets: Vec<_> = running.join_all().await;
    assert_eq!(fleets.iter().flatten().count(), MEMBERS - 1);
    for (me, machine) in machines.all.iter().enumerate() {
        assert_eq!(machine.has.lock().len(), if me == 5 { 50 } else { 100 }, "machine {me}");
    }
    machines.mirror.iter().map(|count| count.load(Ordering::Relaxed)).collect()
}

/// The whole way over real sockets costs hardly more than one copy from the mirror. Members that get no processor for a second
/// count as silent, so on a busy machine another try is allowed; what is wrong with the fleet is wrong each time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fleet_shares_out_a_file() {
    let mut tries = Vec::new();
    for _ in 0..3 {
        let mirror = eight_machines_one_dies().await;
        // What the dead one fetched died with it, as far as it had not been handed on.
        if mirror.iter().sum::<u32>() - mirror[5] <= 110 {
            return;
        }
        tries.push(mirror);
    }
    panic!("pieces from the mirror, of a file of 100, in three tries: {tries:?}");
}

/// What a member has from before is named to who wants it: nothing of it is fetched from the mirror again.
#[tokio::test]
async fn what_was_told_is_found() {
    let ((dht_a, at_a), (dht_b, at_b)) = (node().await, node().await);
    let (a, b) = (join(&dht_a, at_a, Some(key()), at_a).await, join(&dht_b, at_b, Some(key()), at_a).await);
    assert!(a.knows(1).await && b.knows(1).await);
    let shape = FileShape::of(Digest([8; 32]), 40 * u64::from(PIECE_BYTES));
    a.arrived(vec![shape]).await;
    let all = [at_a, at_b].map(|at| Machine { at, has: Mutex::default(), dead: Mutex::new(false) });
    all[0].has.lock().extend(0..40);
    let machines = Machines { all: all.into(), mirror: vec![AtomicU32::new(0), AtomicU32::new(0)] };
    // What a coordinates itself it knows; b has been told of the others when it has answered.
    machines.download(1, &b, shape, 40).await;
    assert_eq!(machines.all[1].has.lock().len(), 40);
    let coordinated_by_b = (0..groups(&shape)).filter(|group| {
        let key = GroupKey { digest: shape.digest, group: *group };
        b.view().ranked(&key)[0] == b.view().at(&at_b).expect("itself").id
    });
    let most: u32 = coordinated_by_b.map(|group| group_bits(&shape, group).count_ones()).sum();
    let mirror = machines.mirror[1].load(Ordering::Relaxed);
    assert!(mirror <= most, "{mirror} pieces, {most} of groups whose coordinator may not have been told in time");
}

/// A machine with another key, or with none, stays alone, and is not waited for.
#[tokio::test]
async fn another_key_is_another_fleet() {
    let ((dht_a, at_a), (dht_b, at_b), (dht_c, at_c)) = (node().await, node().await, node().await);
    let a = join(&dht_a, at_a, Some(key()), at_a).await;
    let b = join(&dht_b, at_b, Some(FleetKey::new([4; 32])), at_a).await;
    let c = join(&dht_c, at_c, Some(key()), at_a).await;
    assert!(c.knows(1).await && a.knows(1).await);
    assert_eq!((a.members(), b.members(), c.members()), (1, 0, 1));
    assert!(a.is_member(at_c) && !a.is_member(at_b));
    let shape = FileShape::of(Digest([8; 32]), 1_000);
    assert!(b.plan(shape, Bits::none(1)).await.is_none(), "alone");
    let request = b"GET /v1/members\n";
    let signed = c.auth().unwrap().sign(request, unix_s());
    let answer = a.auth().unwrap().check(request, &signed.header, unix_s()).unwrap();
    assert!(c.auth().unwrap().check_reply(signed.nonce, &answer));
    assert!(b.auth().unwrap().check(request, &signed.header, unix_s()).is_none());
    assert_eq!(wire::changes(&a.auth().unwrap().members(), 9).unwrap().len(), 2);
}

/// Without multicast, with one seed that does not exist, one where nobody listens and one alive: joined by the last, within
/// fifteen seconds. With none alive a machine is alone, and its downloads do not wait.
#[tokio::test]
async fn one_seed_alive_is_enough() {
    use crate::discovery::tests::{A, SRV, name_server, srv};
    let ((dht_a, at_a), (dht_b, at_b), (dht_c, at_c)) = (node().await, node().await, node().await);
    let std::net::IpAddr::V4(ip) = at_a.ip() else { unreachable!("all are v4") };
    let records = vec![
        ("_poolfs._udp.alive.test", SRV, srv(0, at_a.port(), "host.alive.test")),
        ("host.alive.test", A, ip.octets().to_vec()),
        ("_poolfs._udp.silent.test", SRV, srv(0, 9, "host.alive.test")),
    ];
    let server = name_server(records).await;
    let seeded = |at: SocketAddr, seeds: &[&str]| FleetOptions {
        seeds: seeds.iter().map(ToString::to_string).collect(),
        name_servers: vec![server],
        ..FleetOptions::new(Some(key()), at.port())
    };
    let a = join(&dht_a, at_a, Some(key()), at_a).await;
    let b = Fleet::start(&dht_b, seeded(at_b, &["missing.test", "silent.test", "alive.test"]), None).await;
    let joined = tokio::time::timeout(Duration::from_secs(15), async { a.knows(1).await && b.knows(1).await });
    assert!(joined.await.unwrap());
    let c = Fleet::start(&dht_c, seeded(at_c, &["missing.test", "silent.test"]), None).await;
    assert!(c.plan(FileShape::of(Digest([8; 32]), 1_000), Bits::none(1)).await.is_none(), "the mirror at once");
}

/// Members that know nothing of each other but are in one DHT meet under the key's topic, and after a restart by the database.
#[tokio::test]
async fn members_meet_in_the_dht() {
    let ((dht_a, at_a), (dht_b, at_b), (dht_c, _)) = (node().await, node().await, node().await);
    for dht in [&dht_a, &dht_b] {
        dht.bootstrap(vec![dht_c.local(Family::V4).unwrap()]).await.unwrap();
        dht.knows(1).await.unwrap();
    }
    let dir = tempfile::tempdir().unwrap();
    let netdb = Arc::new(NetDb::open(dir.path()).unwrap());
    let a = Fleet::start(&dht_a, FleetOptions::new(Some(key()), at_a.port()), None).await;
    let b = Fleet::start(&dht_b, FleetOptions::new(Some(key()), at_b.port()), Some(Arc::clone(&netdb))).await;
    assert!(a.knows(1).await && b.knows(1).await);
    drop(b);
    dht_b.shutdown().await;
    while netdb.saved_members().unwrap().is_empty() {
        tokio::task::yield_now().await;
    }
    let (dht_d, at_d) = node().await;
    let d = Fleet::start(&dht_d, FleetOptions::new(Some(key()), at_d.port()), Some(netdb)).await;
    assert!(d.knows(1).await && d.is_member(at_a));
}
