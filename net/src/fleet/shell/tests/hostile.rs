//! Members that part and meet again, and one that lies, over real sockets: what is asserted is who was asked for what.

use super::*;
use crate::fleet::auth::Nonce;
use crate::fleet::wire::{Answer, Ask, Envelope, Ping, Record};
use crate::swarm::fleet::Reply;
use crate::testnet::{Router, Verdict};
use tokio::net::UdpSocket;

/// A node whose datagrams all pass the router, and its address there.
async fn routed(router: &Router) -> (Dht, SocketAddr) {
    let (dht, private) = node().await;
    let public = router.attach(private).await.unwrap();
    (dht, public)
}

/// Every member downloads the file, all at the same time.
async fn all_download(machines: &Arc<Machines>, fleets: &[Fleet], shape: FileShape) {
    let mut running = JoinSet::new();
    for (me, fleet) in fleets.iter().cloned().enumerate() {
        let machines = Arc::clone(machines);
        running.spawn(async move { machines.download(me, &fleet, shape, shape.pieces() as usize).await });
    }
    running.join_all().await;
}

/// Half of the members do not see the other half while all want a file: each half goes on by itself, nobody is sent in a circle,
/// and when they see each other again the next file costs what it costs one fleet.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fleet_parts_and_meets_again() {
    const MEMBERS: usize = 6;
    const PIECES: u32 = 20;
    let router = Router::new(|_| Verdict::Pass);
    let mut nodes = Vec::new();
    for _ in 0..MEMBERS {
        nodes.push(routed(&router).await);
    }
    let mut fleets = Vec::new();
    for (dht, at) in &nodes {
        fleets.push(join(dht, *at, Some(key()), nodes[0].1).await);
    }
    for fleet in &fleets {
        assert!(fleet.knows(MEMBERS - 1).await);
    }
    let half: Vec<SocketAddr> = nodes.iter().step_by(2).map(|(_, at)| *at).collect();
    router.set_rule(move |packet| if half.contains(&packet.from) == half.contains(&packet.to) { Verdict::Pass } else { Verdict::Drop });
    let parted = Arc::new(machines(nodes.iter().map(|(_, at)| *at)));
    all_download(&parted, &fleets, FileShape::of(Digest([1; 32]), u64::from(PIECES) * u64::from(PIECE_BYTES))).await;
    let fetched = |machines: &Machines| machines.mirror.iter().map(|count| count.load(Ordering::Relaxed)).sum::<u32>();
    assert!(parted.all.iter().all(|machine| machine.has.lock().len() == PIECES as usize));
    assert!(fetched(&parted) <= 3 * PIECES, "{} pieces of {PIECES} from the mirror, by two halves", fetched(&parted));
    let wants = router.trace().iter().filter(|traced| traced.packet.bytes.windows(7).any(|window| window == b"pf_want")).count();
    assert!(wants < 2_000, "{wants} queries: somebody goes in circles");
    router.set_rule(|_| Verdict::Pass);
    for fleet in &fleets {
        assert!(fleet.knows(MEMBERS - 1).await);
    }
    // Some may still count others as silent, on a busy machine also later; what is wrong with the fleet is wrong each time.
    let mut tries = Vec::new();
    for nth in 2..5 {
        let met = Arc::new(machines(nodes.iter().map(|(_, at)| *at)));
        all_download(&met, &fleets, FileShape::of(Digest([nth; 32]), u64::from(PIECES) * u64::from(PIECE_BYTES))).await;
        assert!(met.all.iter().all(|machine| machine.has.lock().len() == PIECES as usize));
        tries.push(fetched(&met));
        if tries[tries.len() - 1] <= 2 * PIECES {
            return;
        }
    }
    panic!("pieces of {PIECES} from the mirror, by one fleet, in three tries: {tries:?}");
}

/// A member as it should be but for its answers to wants.
async fn liar(first: SocketAddr, reply: Reply) -> (SocketAddr, MemberId, JoinSet<()>) {
    static NEXT: AtomicU8 = AtomicU8::new(1);
    let socket = UdpSocket::bind((Ipv4Addr::new(127, 11, 0, NEXT.fetch_add(1, Ordering::Relaxed)), 0)).await.unwrap();
    let at = socket.local_addr().unwrap();
    let SocketAddr::V4(v4) = at else { unreachable!("all are v4") };
    let id = MemberId(*Digest::of(at.to_string().as_bytes()).0.first_chunk().unwrap());
    let me = Record { id, incarnation: unix_s(), v4: Some(v4), v6: None, zone: Arc::from("") };
    let ping = move || Ping { sender: me.clone(), changes: Vec::new() };
    let hello = wire::query(&key(), id, *b"liar", Nonce(rand::random()), unix_s(), &Ask::Ping(ping()));
    socket.send_to(&hello, first).await.unwrap();
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        let mut buffer = [0; 2048];
        loop {
            let (len, from) = socket.recv_from(&mut buffer).await.unwrap();
            let Some(envelope) = Envelope::read(&buffer[..len]).filter(|envelope| envelope.is_query) else { continue };
            let answer = match envelope.query() {
                Some((_, Ask::Ping(_))) => Answer::Pong { ping: ping(), digest: 0, count: 1 },
                Some((_, Ask::Want(_))) => Answer::Reply(reply.clone()),
                Some((_, Ask::Have(_))) => Answer::Had,
                Some((_, Ask::Who(_))) => Answer::Who(vec!["198.51.100.1:25".parse().unwrap(), wire::ANSWERER]),
                Some((_, Ask::List { .. })) => Answer::List { members: Vec::new(), end: true },
                None => continue,
            };
            let nonce = Nonce(envelope.tag[8..16].try_into().unwrap());
            let bytes = wire::answer(&key(), id, &envelope.transaction, nonce, from, &answer);
            socket.send_to(&bytes, from).await.unwrap();
        }
    });
    (at, id, tasks)
}

/// Two members want a file that a liar coordinates. [`Machines::fetch`] panics if anybody is named that is no member.
async fn led_by_a_liar(reply: Reply) {
    let ((dht_a, at_a), (dht_b, at_b)) = (node().await, node().await);
    let (a, b) = (join(&dht_a, at_a, Some(key()), at_a).await, join(&dht_b, at_b, Some(key()), at_a).await);
    assert!(a.knows(1).await && b.knows(1).await);
    let (at, id, _tasks) = liar(at_a, reply).await;
    assert!(a.knows(2).await && b.knows(2).await);
    // Whom it names is asked only if it is a member.
    let mut named = a.who(Digest([9; 32])).await;
    assert_eq!((named.recv().await, named.recv().await), (Some(at), None));
    // A file that the liar coordinates.
    let shape = (0..=u8::MAX).map(|nth| FileShape::of(Digest([nth; 32]), 1_000)).find(|shape| {
        let key = GroupKey { digest: shape.digest, group: 0 };
        a.view().ranked(&key)[0] == id
    });
    let machines = Arc::new(machines([at_a, at_b, at]));
    all_download(&machines, &[a, b], shape.expect("one in three is its")).await;
    assert!((0..2).all(|me| machines.all[me].has.lock().len() == 1));
    let mirror: u32 = machines.mirror.iter().map(|count| count.load(Ordering::Relaxed)).sum();
    assert!((1..=3).contains(&mirror), "{mirror} fetches of one piece");
}

/// A coordinator that says `wait` for ever is passed over: both have the file, by themselves or from each other.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_coordinator_that_waits_for_ever() {
    led_by_a_liar(Reply { wait: Some(Duration::from_secs(60)), ..Reply::default() }).await;
}

/// A coordinator that names a mail server, this machine's own web server and a stranger: nobody ever hears of them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_coordinator_that_names_strangers() {
    let strangers = ["192.0.2.1:25", "127.0.0.1:80", "192.0.2.7:9977"].map(|text| (text.parse().unwrap(), 1u16));
    led_by_a_liar(Reply { from: strangers.to_vec(), ..Reply::default() }).await;
}

/// A coordinator that names itself, which has nothing, as the holder.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_coordinator_that_names_false_holders() {
    led_by_a_liar(Reply { from: vec![(wire::ANSWERER, 1)], ..Reply::default() }).await;
}
