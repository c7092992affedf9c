//! Whether a machine that strangers flood still serves its own user: datagrams of the DHT by the thousand, and connections that
//! ask a byte at a time.

use super::outcome::{Figure, Outcome};
use super::raw::cpu_seconds;
use super::scenario::{Flood, Scenario};
use super::{crowd, up};
use crate::harness::{Host, forget_pages, listed, run};
use std::fs;
use std::io::{ErrorKind, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream, UdpSocket};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Where the daemon is spoken to.
const PORT: u16 = 9977;

/// Addresses that the flood comes from: bounds for one address alone do not stop it.
const ADDRESSES: u8 = 100;

/// How often a batch of datagrams is sent.
const TICK: Duration = Duration::from_millis(5);

/// What the flood has done.
#[derive(Default)]
struct Done {
    over: AtomicBool,
    datagrams: AtomicU64,
    /// Connections that were open at the last look.
    open: AtomicU64,
    refused: AtomicU64,
}

/// A user lists and reads what is there, in calm and under the flood, each so many times.
pub(crate) fn play(scenario: &Scenario, flood: Flood) -> Outcome {
    let crowd = crowd(scenario);
    let machine = &crowd.machines[0];
    up(std::slice::from_ref(machine), false, 1);
    crowd.start_download_on(machine).wait().ok();
    crowd.assert_as_signed(machine);
    let archives = machine.archives();
    let target = SocketAddr::new(crowd.hosts[0].address.into(), PORT);
    let calm = Times::of(&archives, flood.runs);
    let done = Arc::<Done>::default();
    let flooders =
        [datagrams(&crowd.hosts[1], target, flood.datagrams_s, &done), connections(&crowd.hosts[1], target, flood.connections, &done)];
    // Until it has begun there is nothing to measure.
    while done.datagrams.load(Ordering::Relaxed) < u64::from(flood.datagrams_s) || done.open.load(Ordering::Relaxed) == 0 {
        assert!(flooders.iter().all(|flooder| !flooder.is_finished()), "the flood has ended by itself");
        std::thread::yield_now();
    }
    let (pids, began, sent) = (machine.pids(), Instant::now(), done.datagrams.load(Ordering::Relaxed));
    let before = cpu_seconds(&pids);
    let flooded = Times::of(&archives, flood.runs);
    let seconds = began.elapsed().as_secs_f64();
    let processor = (cpu_seconds(&pids) - before) * 100.0 / seconds;
    let sent = done.datagrams.load(Ordering::Relaxed) - sent;
    assert_eq!(machine.pids(), pids, "the same processes to the end");
    let open = done.open.load(Ordering::Relaxed);
    done.over.store(true, Ordering::Relaxed);
    flooders.into_iter().for_each(|flooder| flooder.join().expect("the flood goes on"));
    let calm_again = Times::of(&archives, flood.runs);
    crowd.assert_as_signed(machine);
    let ratio = |of: fn(&Times) -> f64| of(&flooded) / f64::midpoint(of(&calm), of(&calm_again));
    #[allow(clippy::cast_precision_loss, reason = "figures to print")]
    let figures = vec![
        Figure::new("ls -l under the flood, beside calm", ratio(|times| times.list_s), "x"),
        Figure::new("local reads under the flood, beside calm", ratio(|times| times.read_s), "x"),
        Figure::new("datagrams sent", sent as f64 / seconds, "/s"),
        Figure::new("slow connections open", open as f64, ""),
        Figure::new("slow connections refused or closed", done.refused.load(Ordering::Relaxed) as f64, ""),
        Figure::new("processor time of poolfs under the flood", processor, "% of one processor"),
    ];
    Outcome { figures, verified: crowd.names.len(), ..Outcome::default() }
}

/// Medians, in seconds.
struct Times {
    list_s: f64,
    read_s: f64,
}

impl Times {
    fn of(archives: &Path, runs: usize) -> Self {
        let debs: Vec<_> = listed(archives).into_iter().filter(|name| name.ends_with(".deb")).map(|name| archives.join(name)).collect();
        let list = || drop(run(Command::new("ls").arg("-l").arg(archives)).ok());
        let read = || {
            debs.iter().for_each(|deb| forget_pages(deb));
            debs.iter().for_each(|deb| drop(fs::read(deb).unwrap()));
        };
        Self { list_s: median(runs, list), read_s: median(runs, read) }
    }
}

fn median(runs: usize, work: impl Fn()) -> f64 {
    let once = |_| {
        let began = Instant::now();
        work();
        began.elapsed().as_secs_f64()
    };
    let mut times: Vec<f64> = (0..runs).map(once).collect();
    times.sort_by(f64::total_cmp);
    times[runs / 2]
}

/// The addresses that a host has besides its own for the flood.
fn addresses(host: &Host, third: u8) -> Vec<Ipv4Addr> {
    let addresses: Vec<Ipv4Addr> = (1..=ADDRESSES).map(|last| Ipv4Addr::new(10, 99, third, last)).collect();
    let script: String = addresses.iter().map(|address| format!("ip addr add {address}/16 dev eth0; ")).collect();
    host.run(&script);
    addresses
}

/// Sends `get_peers` for keys that nobody has, so many a second.
fn datagrams(host: &Host, to: SocketAddr, per_s: u32, done: &Arc<Done>) -> std::thread::JoinHandle<()> {
    let (addresses, done) = (addresses(host, 201), Arc::clone(done));
    host.spawn(move || {
        let sockets: Vec<UdpSocket> = addresses.iter().map(|address| UdpSocket::bind((*address, 0)).unwrap()).collect();
        let (began, mut sent) = (Instant::now(), 0_u64);
        while !done.over.load(Ordering::Relaxed) {
            let due = u64::try_from(began.elapsed().as_millis()).unwrap() * u64::from(per_s) / 1000;
            while sent < due {
                let mut query =
                    b"d1:ad2:id20:abcdefghij01234567899:info_hash20:mnopqrstuvwx........e1:q9:get_peers1:t4:....1:y1:qe".to_vec();
                let (key, transaction) = (58..66, query.len() - 11..query.len() - 7);
                query[key].copy_from_slice(&sent.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes());
                query[transaction].copy_from_slice(&sent.to_le_bytes()[..4]);
                let socket = &sockets[usize::try_from(sent).unwrap() % sockets.len()];
                match socket.send_to(&query, to) {
                    Ok(_) => {}
                    // A full queue of the sender's.
                    Err(err)
                        if matches!(err.kind(), ErrorKind::WouldBlock | ErrorKind::ConnectionRefused)
                            || err.raw_os_error() == Some(105) => {}
                    Err(err) => panic!("{err}"),
                }
                sent += 1;
            }
            done.datagrams.store(sent, Ordering::Relaxed);
            // The rate is what is made here.
            std::thread::sleep(TICK);
        }
    })
}

/// Keeps so many connections, on each of which a request comes a byte a second.
fn connections(host: &Host, to: SocketAddr, count: usize, done: &Arc<Done>) -> std::thread::JoinHandle<()> {
    let (addresses, done) = (addresses(host, 202), Arc::clone(done));
    host.spawn(move || {
        let request = format!("GET /v1/file/{} HTTP/1.1\r\nHost: poolfs\r\n", "5a".repeat(32)).into_bytes();
        let open = |nth: usize| {
            let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
            socket.bind(&SocketAddr::new(addresses[nth % addresses.len()].into(), 0).into()).unwrap();
            socket.connect_timeout(&to.into(), Duration::from_secs(5)).ok().map(|()| TcpStream::from(socket))
        };
        let mut slow: Vec<(Option<TcpStream>, usize)> = (0..count).map(|_| (None, 0)).collect();
        while !done.over.load(Ordering::Relaxed) {
            for (nth, (stream, at)) in slow.iter_mut().enumerate() {
                let goes_on =
                    stream.as_mut().is_some_and(|stream| stream.write_all(&request[*at % request.len()..=*at % request.len()]).is_ok());
                *at += 1;
                if !goes_on {
                    done.refused.fetch_add(u64::from(stream.is_some()), Ordering::Relaxed);
                    (*stream, *at) = (open(nth), 0);
                }
            }
            done.open.store(slow.iter().filter(|(stream, _)| stream.is_some()).count() as u64, Ordering::Relaxed);
            // As slowly as they are meant to be.
            std::thread::sleep(Duration::from_secs(1));
        }
    })
}
