//! The bounds of the driver's queues, each filled past its end: the driver is held still, or fed by hand, so that nothing
//! depends on who runs first.
#![allow(clippy::unwrap_used, reason = "tests")]

use super::super::tests::options;
use super::super::{COMMANDS_MAX, Dht, EVENTS_MAX, FINDINGS_MAX};
use super::*;
use crate::dht::FoundContact;
use crate::discovery::tests::{A, SRV, name_server, srv};
use crate::discovery::{DiscoveryConfig, HostPort};
use futures_util::future::join_all;
use std::collections::BTreeSet;
use std::pin::pin;
use tokio::sync::broadcast::error::RecvError;

/// Past each bound by this much.
const MORE: usize = 10;

async fn prepared(options: NodeOptions) -> (Dht, Driver) {
    Dht::prepare(options, None).await.unwrap()
}

fn contact(n: usize) -> FoundContact {
    FoundContact { addr: SocketAddr::new([192, 0, 2, 1].into(), u16::try_from(2_000 + n).unwrap()), pv: None }
}

/// Takes what a handle asked for, as [`Driver::run`] does.
async fn obey(driver: &mut Driver) {
    let command = driver.commands.recv().await.unwrap();
    driver.command(command);
}

/// A burst of callers must neither grow the queue nor be refused: each waits in turn and is answered.
#[tokio::test]
async fn callers_past_the_bound_of_commands_wait() {
    let (dht, mut driver) = prepared(options()).await;
    let lookup = dht.get_peers(Id([1; 20])).await.unwrap();
    obey(&mut driver).await;
    for _ in 0..COMMANDS_MAX {
        dht.commands.try_send(Command::Bootstrap(Vec::new())).unwrap();
    }
    // Nobody may wait in a destructor, so this one word is lost.
    drop(lookup);
    let mut callers = pin!(join_all((0..COMMANDS_MAX + MORE).map(|_| dht.status())));
    assert!(futures_util::poll!(&mut callers).is_pending());
    assert_eq!((dht.commands.capacity(), driver.commands.len()), (0, COMMANDS_MAX));
    assert_eq!(driver.lookups.len(), 1, "it runs to its own end");
    tokio::spawn(driver.run());
    let answers = callers.await;
    assert_eq!(answers.len(), COMMANDS_MAX + MORE);
    assert!(answers.iter().all(|answer| answer.as_ref().is_ok_and(|status| status.lookups == 0)), "{answers:?}");
    assert_eq!(dht.commands.capacity(), COMMANDS_MAX);
}

/// Who does not read must lose events, the oldest, and know how many; the node must neither wait nor keep them all.
#[tokio::test]
async fn a_slow_reader_is_told_how_many_events_it_missed() {
    let (dht, mut driver) = prepared(options()).await;
    let mut slow = dht.events();
    let event = |n: usize| Event::Announced { key: Id([1; 20]), nodes: u32::try_from(n).unwrap() };
    for n in 0..EVENTS_MAX + MORE {
        driver.event(event(n));
    }
    let missed = u64::try_from(MORE).unwrap();
    assert!(matches!(slow.recv().await, Err(RecvError::Lagged(told)) if told == missed));
    for n in MORE..EVENTS_MAX + MORE {
        assert_eq!(slow.try_recv().unwrap(), event(n));
    }
    assert!(slow.is_empty());
    tokio::spawn(driver.run());
    dht.status().await.unwrap();
}

/// A lookup whose reader sleeps must keep a bounded number of findings, end all the same, and hold up nobody.
#[tokio::test]
async fn findings_past_the_bound_are_left_out() {
    let (dht, mut driver) = prepared(options()).await;
    let lookup = dht.get_peers(Id([1; 20])).await.unwrap();
    obey(&mut driver).await;
    let id = *driver.lookups.keys().next().unwrap();
    for n in 0..FINDINGS_MAX + MORE {
        driver.event(Event::Found { lookup: id, contacts: vec![contact(n)] });
    }
    driver.act();
    let (findings, outcome) = lookup.collect().await.unwrap();
    let first: Vec<Finding> = (0..FINDINGS_MAX).map(|n| Finding::Contacts(vec![contact(n)])).collect();
    assert_eq!((findings, outcome.queries), (first, 0));
    assert_eq!(driver.lookups.len(), 0);
}

/// The stream of contacts waits for its reader instead: none of those that the lookup still has may be lost between the two.
#[tokio::test]
async fn a_stream_waits_for_its_reader() {
    let (dht, mut driver) = prepared(options()).await;
    let mut stream = dht.stream_peers(Id([1; 20]));
    obey(&mut driver).await;
    let id = *driver.lookups.keys().next().unwrap();
    for n in 0..FINDINGS_MAX {
        driver.event(Event::Found { lookup: id, contacts: (0..MORE).map(|of| contact(n * MORE + of)).collect() });
    }
    driver.act();
    let mut most = 0;
    for n in 0..FINDINGS_MAX * MORE {
        assert_eq!(stream.recv().await, Some(contact(n)));
        most = most.max(stream.len());
    }
    assert_eq!((stream.recv().await, stream.max_capacity()), (None, FINDINGS_MAX));
    assert!((1..FINDINGS_MAX).contains(&most), "{most} waited beside the one that was taken");
}

/// Seeds that list more than the driver has taken must be waited for: what discovery found is neither lost nor piled up.
#[tokio::test]
async fn contacts_past_the_bound_wait_in_discovery() {
    const EACH: u8 = 60;
    // Loopback addresses at a port that nobody has.
    let mut records = vec![("_poolfs._udp.crowd.test", SRV, srv(0, 9, "host.crowd.test"))];
    records.extend((1..=EACH).map(|n| ("host.crowd.test", A, vec![127, 9, 2, n])));
    let discovery = DiscoveryConfig {
        bootstrap: (1..=EACH).map(|n| HostPort { host: format!("127.9.1.{n}"), port: 9 }).collect(),
        seeds: vec!["crowd.test".to_owned()],
        links: None,
        name_servers: vec![name_server(records).await],
        ..DiscoveryConfig::default()
    };
    let (dht, mut driver) = prepared(NodeOptions { discovery, ..options() }).await;
    while driver.contacts.len() < CONTACTS_MAX {
        tokio::task::yield_now().await;
    }
    assert!(driver.contacts_in.try_send("127.9.1.1:9".parse().unwrap()).is_err(), "full");
    let mut found = BTreeSet::new();
    while found.len() < 2 * usize::from(EACH) {
        assert!(driver.contacts.len() <= CONTACTS_MAX);
        found.insert(driver.contacts.recv().await.unwrap());
    }
    let want = [1, 2].into_iter().flat_map(|net| (1..=EACH).map(move |n| SocketAddr::from(([127, 9, net, n], 9))));
    assert_eq!(found, want.collect());
    tokio::spawn(driver.run());
    dht.status().await.unwrap();
}
