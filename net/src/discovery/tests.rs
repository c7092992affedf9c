#![allow(clippy::unwrap_used, reason = "tests")]

use super::*;
use std::net::Ipv6Addr;
use tokio::net::UdpSocket;
use tokio::sync::{mpsc, watch};

const ID: [u8; 20] = [1; 20];

fn hello(joining: bool, n: u8) -> Vec<u8> {
    Hello { joining, port: 9977, id: [n; 20] }.to_bytes()
}

fn seeds(names: &[&str]) -> DiscoveryConfig {
    DiscoveryConfig { seeds: names.iter().map(ToString::to_string).collect(), ..DiscoveryConfig::default() }
}

fn links() -> DiscoveryConfig {
    DiscoveryConfig { links: Some(Links::default()), ..DiscoveryConfig::default() }
}

/// A configuration that is read wrongly asks another host, or none.
#[test]
fn host_ports_are_read() {
    let check = |text: &str, want: Option<(&str, u16)>| {
        let got = text.parse::<HostPort>();
        assert_eq!(got.as_ref().ok().map(|got| (got.host.as_str(), got.port)), want, "{text}");
        if let Ok(got) = got {
            assert_eq!(got.to_string(), text);
        }
    };
    check("dht.example.org:9977", Some(("dht.example.org", 9977)));
    check("192.0.2.1:1", Some(("192.0.2.1", 1)));
    check("[2001:db8::1]:65535", Some(("2001:db8::1", 65535)));
    for bad in
        ["", "host", ":1", "host:", "host:0", "host:65536", "2001:db8::1:1", "[192.0.2.1]:1", "[host]:1", "[::1:1", "a b:1", "host:+1x"]
    {
        check(bad, None);
    }
    assert_eq!(
        "x".parse::<HostPort>().unwrap_err().to_string(),
        "`x` is not HOST:PORT, for example dht.example.org:9977 or [2001:db8::1]:9977"
    );
}

/// A seed asked too rarely keeps a new machine out; one asked too often is a load on somebody's name server.
#[test]
fn seeds_are_asked_each_minute_until_joined_then_hourly() {
    let start = Instant::now();
    let at = |s: u64| start + Duration::from_secs(s);
    let name = Origin::Seed("seed.example".to_owned());
    let address: SocketAddr = "192.0.2.1:9977".parse().unwrap();
    let mut discovery = Discovery::new(&seeds(&["seed.example"]), ID, start, 1);
    assert_eq!(discovery.deadline(), Some(start));
    assert_eq!(discovery.tick(start), [Action::Resolve(name.clone())]);
    assert_eq!(discovery.tick(at(100)), [], "an answer is outstanding");
    assert_eq!(discovery.deadline(), None);
    assert_eq!(discovery.resolved(at(100), &name, Ok(vec![address])), [address]);
    assert_eq!(discovery.deadline(), Some(at(160)));
    assert_eq!(discovery.tick(at(159)), []);
    assert_eq!(discovery.tick(at(160)).len(), 1);
    discovery.resolved(at(160), &name, Err(SeedError::Timeout { what: name.to_string() }));
    assert_eq!(discovery.deadline(), Some(at(170)), "sooner after a failure");
    assert_eq!(discovery.tick(at(170)).len(), 1);
    discovery.resolved(at(170), &name, Ok(Vec::new()));
    assert_eq!(discovery.deadline(), Some(at(180)), "no address is a failure");
    discovery.set_standing(at(180), true, 5);
    assert_eq!(discovery.deadline(), Some(at(170 + 3600)));
    discovery.set_standing(at(900), false, 0);
    assert_eq!(discovery.tick(at(900)).len(), 1, "alone again");
}

/// An endless list in the configuration must not become an endless number of questions.
#[test]
fn origins_are_bounded() {
    let names: Vec<String> = (0..=ORIGINS_MAX).map(|n| format!("s{n}")).collect();
    let config = DiscoveryConfig { seeds: names, ..DiscoveryConfig::default() };
    assert_eq!(Discovery::new(&config, ID, Instant::now(), 1).tick(Instant::now()).len(), ORIGINS_MAX);
}

/// 1,000 members at a fixed 30 s would put 33 hellos a second on a link; 20 are allowed, and with jitter not one more.
#[test]
fn hellos_keep_to_the_links_bound() {
    for (members, want_min_s, want_max_s) in [(0, 30.0, 33.0), (600, 30.0, 33.0), (1000, 50.0, 55.0), (4096, 204.8, 225.3)] {
        let start = Instant::now();
        let mut discovery = Discovery::new(&links(), ID, start, 7);
        discovery.set_standing(start, true, members);
        let mut last = start;
        assert_eq!(discovery.tick(last), [Action::Hello { joining: false }]);
        for _ in 0..100 {
            let next = discovery.deadline().unwrap();
            let delay = (next - last).as_secs_f64();
            assert!((want_min_s..want_max_s).contains(&delay), "{members} members: {delay} s");
            assert_eq!(discovery.tick(next).len(), 1);
            last = next;
        }
    }
}

/// A node whose table holds few of a thousand neighbours must still count them, or all speak too often.
#[test]
fn the_links_size_is_heard() {
    let start = Instant::now();
    let mut discovery = Discovery::new(&links(), ID, start, 7);
    discovery.set_standing(start, true, 40);
    for n in 0..1000_u32 {
        discovery.heard(start, SocketAddr::new(IpAddr::V4((0x0a00_0000 + n).into()), 40000), &hello(false, 2));
    }
    discovery.tick(start);
    let delay = discovery.deadline().unwrap() - start;
    assert!(delay >= Duration::from_secs(50), "{delay:?}");
}

/// A first hello that is lost must not cost a new machine half a minute.
#[test]
fn a_lonely_node_says_hello_more_often_at_first() {
    let start = Instant::now();
    let mut discovery = Discovery::new(&links(), ID, start, 3);
    let mut times = Vec::new();
    for _ in 0..8 {
        let at = discovery.deadline().unwrap();
        assert_eq!(discovery.tick(at), [Action::Hello { joining: true }]);
        times.push((at - start).as_secs_f64());
    }
    for (time, want) in times.iter().zip([0.0, 1.0, 3.0, 7.0, 15.0, 31.0, 61.0, 91.0]) {
        assert!((want..=want * 1.1).contains(time), "{times:?}");
    }
    let later = start + Duration::from_secs(1000);
    discovery.set_standing(later, true, 3);
    discovery.tick(later);
    discovery.set_standing(later, false, 0);
    assert_eq!(discovery.deadline(), Some(later), "at once when it is alone again");
}

/// A newcomer that a thousand machines ping at once loses most of the answers, and its hello would be an amplifier.
#[test]
fn a_hello_moves_about_eight_of_a_thousand() {
    let start = Instant::now();
    let from: SocketAddr = "192.0.2.9:40000".parse().unwrap();
    let mut moved = 0;
    for n in 0..1000 {
        let mut discovery = Discovery::new(&links(), ID, start, n);
        discovery.set_standing(start, true, 1000);
        moved += usize::from(discovery.heard(start, from, &hello(true, 2)) == Some("192.0.2.9:9977".parse().unwrap()));
    }
    assert!((2..=20).contains(&moved), "{moved}");
}

/// Each field is a stranger's: none may make this node ping itself, a service, or without bound.
#[test]
fn hellos_are_judged() {
    let start = Instant::now();
    let mut discovery = Discovery::new(&links(), ID, start, 5);
    let from: SocketAddr = "192.0.2.9:40000".parse().unwrap();
    assert_eq!(discovery.heard(start, from, &hello(false, 1)), None, "my own");
    assert_eq!(discovery.heard(start, from, b"poolfs-1 hell"), None);
    assert_eq!(discovery.heard(start, "[fe80::1]:40000".parse().unwrap(), &hello(false, 2)), None);
    assert_eq!(discovery.heard(start, from, &hello(false, 2)), Some("192.0.2.9:9977".parse().unwrap()));
    assert_eq!(discovery.heard(start, from, &hello(false, 2)), None, "heard a moment ago");
    let later = start + CONTACT_AGAIN_AFTER;
    assert!(discovery.heard(later, from, &hello(false, 2)).is_some());

    // A flood from many addresses: a burst, then the rate; the memory has a ceiling.
    let mut moved = 0;
    for n in 0..20_000_u32 {
        let from = SocketAddr::new(IpAddr::V4((0x0a00_0000 + n).into()), 40000);
        let now = later + Duration::from_millis(u64::from(n) / 20);
        moved += u32::from(discovery.heard(now, from, &hello(true, 3)).is_some());
    }
    assert!((20..=41).contains(&moved), "20 at once and 20 in the second: {moved}");
    assert!(discovery.heard.len() <= HEARD_MAX);
    let calm = later + Duration::from_secs(1000);
    assert_eq!(discovery.tick(calm).len(), 1);
    assert_eq!(discovery.heard.len(), 0, "and the flood is forgotten");
}

/// A name server of its own: answers A, AAAA and SRV from a table, written without the resolver's code.
pub(crate) async fn name_server(records: Vec<(&'static str, u16, Vec<u8>)>) -> SocketAddr {
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let address = socket.local_addr().unwrap();
    tokio::spawn(async move {
        let mut buffer = [0; 1500];
        while let Ok((len, from)) = socket.recv_from(&mut buffer).await {
            let end = 12 + buffer[12..len].iter().position(|b| *b == 0).unwrap() + 1;
            let (name, kind) = (&buffer[12..end], u16::from_be_bytes([buffer[end], buffer[end + 1]]));
            let is_name = |text: &str| dns_name(text).eq_ignore_ascii_case(name);
            let answers: Vec<_> = records.iter().filter(|(of, of_kind, _)| is_name(of) && *of_kind == kind).collect();
            let known = records.iter().any(|(of, ..)| is_name(of));
            let mut reply = buffer[..2].to_vec();
            reply.extend([0x84, if known { 0x80 } else { 0x83 }, 0, 1, 0, u8::try_from(answers.len()).unwrap(), 0, 0, 0, 0]);
            reply.extend_from_slice(&buffer[12..end + 4]);
            for (_, _, data) in answers {
                // The name by a pointer to the question's: dozens of records fit one datagram.
                reply.extend([0xc0, 12]);
                reply.extend_from_slice(&buffer[end..end + 4]);
                reply.extend([0, 0, 0, 60, 0, u8::try_from(data.len()).unwrap()]);
                reply.extend_from_slice(data);
            }
            socket.send_to(&reply, from).await.unwrap();
        }
    });
    address
}

fn dns_name(text: &str) -> Vec<u8> {
    let mut out = Vec::new();
    for label in text.split('.') {
        out.push(u8::try_from(label.len()).unwrap());
        out.extend_from_slice(label.as_bytes());
    }
    out.push(0);
    out
}

pub(crate) fn srv(priority: u8, port: u16, target: &str) -> Vec<u8> {
    [&[0, priority, 0, 1][..], &port.to_be_bytes(), &dns_name(target)].concat()
}

pub(crate) const A: u16 = 1;
const AAAA: u16 = 28;
pub(crate) const SRV: u16 = 33;

/// An instance group has only addresses, a tended seed has SRV records; taking one for the other loses the port or the name.
#[tokio::test]
async fn seeds_are_srv_records_or_addresses() {
    let v6: Ipv6Addr = "2001:db8::7".parse().unwrap();
    let server = name_server(vec![
        ("_poolfs._udp.tended.test", SRV, srv(20, 2000, "b.tended.test")),
        ("_poolfs._udp.tended.test", SRV, srv(10, 1000, "a.tended.test")),
        ("a.tended.test", A, vec![192, 0, 2, 1]),
        ("a.tended.test", AAAA, v6.octets().to_vec()),
        ("b.tended.test", A, vec![192, 0, 2, 2]),
        ("group.test", A, vec![192, 0, 2, 3]),
        ("group.test", A, vec![192, 0, 2, 4]),
        ("_poolfs._udp.off.test", SRV, [&[0, 0, 0, 0, 0, 0][..], &[0]].concat()),
        ("off.test", A, vec![192, 0, 2, 5]),
    ])
    .await;
    let seeds = Seeds::new(vec![server]);
    let check = async |name: &str, want: &[&str]| {
        let mut got = seeds.resolve(&Origin::Seed(name.to_owned())).await.unwrap();
        got.sort();
        let want: Vec<SocketAddr> = want.iter().map(|text| text.parse().unwrap()).collect();
        assert_eq!(got, want, "{name}");
    };
    check("tended.test", &["192.0.2.1:1000", "192.0.2.2:2000", "[2001:db8::7]:1000"]).await;
    check("group.test", &["192.0.2.3:9977", "192.0.2.4:9977"]).await;
    check("group.test.", &["192.0.2.3:9977", "192.0.2.4:9977"]).await;
    check("off.test", &[]).await;
    check("nowhere.test", &[]).await;
}

/// Whoever holds a seed's name can list half the internet: it is asked for no more names and gives no more addresses than these.
#[tokio::test]
async fn what_a_seed_gives_is_bounded() {
    let names: Vec<String> = (0..20).map(|n| format!("t{n}.many.test")).collect();
    let mut records: Vec<(&'static str, u16, Vec<u8>)> = (0..70).map(|n| ("crowd.test", A, vec![192, 0, 2, n])).collect();
    for (n, name) in (0..).zip(names) {
        records.push(("_poolfs._udp.many.test", SRV, srv(n, 2000, &name)));
        records.push((String::leak(name), A, vec![192, 0, 2, n]));
    }
    let seeds = Seeds::new(vec![name_server(records).await]);
    let mut found = seeds.resolve(&Origin::Seed("many.test".to_owned())).await.unwrap();
    found.sort();
    let first: Vec<SocketAddr> = (0..super::seeds::TARGETS_MAX).map(|n| format!("192.0.2.{n}:2000").parse().unwrap()).collect();
    assert_eq!(found, first, "those of the best priorities");
    assert_eq!(seeds.resolve(&Origin::Seed("crowd.test".to_owned())).await.unwrap().len(), super::seeds::ADDRESSES_MAX);
}

/// A dead name must not hold back the living one beside it.
#[tokio::test]
async fn a_dead_seed_does_not_stop_the_others() {
    let server = name_server(vec![("alive.test", A, vec![192, 0, 2, 3])]).await;
    let config = DiscoveryConfig {
        bootstrap: vec!["127.0.0.1:4000".parse().unwrap()],
        name_servers: vec![server],
        ..seeds(&["dead.test", "alive.test"])
    };
    let (_standing, standing) = watch::channel(Standing::default());
    let (contacts_in, mut contacts) = mpsc::channel(8);
    tokio::spawn(run(config, ID, [Some(9977); 2], standing, contacts_in));
    let mut got = [contacts.recv().await.unwrap(), contacts.recv().await.unwrap()];
    got.sort();
    assert_eq!(got, ["127.0.0.1:4000".parse().unwrap(), "192.0.2.3:9977".parse().unwrap()]);
}

/// Nodes on one link find each other with nothing configured, over both families.
///
/// In a network namespace of its own with one interface, so that addresses are known and no other machine hears it.
#[test]
fn neighbours_hear_each_other() {
    let script = "ip link add d0 type veth peer name d1
        ip link set d1 up
        ip addr add 192.0.2.1/24 dev d0
        ip addr add 2001:db8::1/64 dev d0 nodad
        ip link set d0 up
        exec \"$0\" --exact discovery::tests::neighbours_in_namespace --ignored --nocapture";
    let output = std::process::Command::new("unshare")
        .args(["--map-root-user", "--net", "--", "sh", "-ec", script])
        .arg(std::env::current_exe().unwrap())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
}

#[tokio::test]
#[ignore = "run by neighbours_hear_each_other in its namespace"]
async fn neighbours_in_namespace() {
    let mut ends = Vec::new();
    for n in 0..2_u16 {
        let (standing_in, standing) = watch::channel(Standing::default());
        let (contacts_in, contacts) = mpsc::channel(8);
        tokio::spawn(run(links(), [u8::try_from(n).unwrap(); 20], [Some(2000 + n), Some(3000 + n)], standing, contacts_in));
        ends.push((standing_in, contacts));
    }
    for (n, (_, contacts)) in ends.iter_mut().enumerate() {
        let mut got = std::collections::BTreeSet::new();
        while got.len() < 2 {
            got.insert(contacts.recv().await.unwrap());
        }
        let other = if n == 0 { 1 } else { 0 };
        let want = [("192.0.2.1", 2000), ("2001:db8::1", 3000)].map(|(ip, port)| SocketAddr::new(ip.parse().unwrap(), port + other));
        assert_eq!(got.into_iter().collect::<Vec<_>>(), want);
    }
}

/// The task must end with its owner, or each restart of the network side leaves sockets behind.
#[tokio::test]
async fn run_ends_with_its_owner() {
    let (standing_in, standing) = watch::channel(Standing::default());
    let (contacts_in, contacts) = mpsc::channel(8);
    let task = tokio::spawn(run(links(), ID, [Some(9977); 2], standing.clone(), contacts_in));
    drop(standing_in);
    task.await.unwrap();
    drop(contacts);
    let (_standing_in, standing) = watch::channel(Standing::default());
    let (contacts_in, contacts) = mpsc::channel(8);
    let task = tokio::spawn(run(links(), ID, [Some(9977); 2], standing, contacts_in));
    drop(contacts);
    task.await.unwrap();
}
