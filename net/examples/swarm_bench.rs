//! The figures of a download from peers: 200 MB from four of them on loopback, with one slow among them, and as 200 packages.
//!
//! Run by `scripts/bench swarm`. Each peer is a process of its own with the real server; the download is hashed and written as
//! the mounts do it. Beside it, in the same run, nginx and curl and then sha256sum of the same bytes.
#![allow(
    clippy::print_stdout,
    clippy::unwrap_used,
    clippy::expect_used,
    missing_docs,
    clippy::large_futures,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_precision_loss,
    reason = "a program for people, that stops at the first surprise"
)]

use ed25519_dalek::SigningKey;
use poolfs_core::{Digest, Summer, Sums};
use poolfs_net::mirror::{Mirror, MirrorLimits};
use poolfs_net::peer::{
    Audience, ClientLimits, Near, NoFacts, Partials, PeerClient, PeerServer, ServerLimits, ServerParts, Shelf, Shelved,
};
use poolfs_net::swarm::driver::{Announcer, Finder, FoundPeer, Holds, Swarm, SwarmDelivery, SwarmParts, SwarmWant, way};
use rustix::process::{Resource, getrlimit};
use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::SocketAddr;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::{Semaphore, mpsc, watch};

const LARGE_BYTES: usize = 200_000_000;
const PEERS: usize = 4;
const RUNS: usize = 5;
const PACKAGES: usize = 200;
const PIECE: u64 = poolfs_core::piece::PIECE_BYTES as u64;
/// Downloads at once, as the mounts have them.
const AT_ONCE: usize = 8;
/// The slow peer's rate.
const SLOW_BYTES_S: usize = 1_000_000;

struct Files {
    dir: PathBuf,
    sums: HashMap<Digest, Arc<Sums>>,
}

impl Shelf for Files {
    fn find(&self, digest: &Digest, _to: Audience) -> Option<Shelved> {
        let sums = Arc::clone(self.sums.get(digest)?);
        Some(Shelved { file: File::open(self.dir.join(digest.to_string())).ok()?.into(), sums })
    }

    fn damaged(&self, digest: &Digest, block: u64) {
        println!("block {block} of {digest} is damaged");
    }
}

/// The process of one peer: serves the files of a directory until its input ends.
async fn serve(dir: &Path) {
    let mut sums = HashMap::new();
    for entry in fs::read_dir(dir).unwrap() {
        let of = Sums::of(&fs::read(entry.unwrap().path()).unwrap());
        sums.insert(of.digest, Arc::new(of));
    }
    let (_key, key) = watch::channel(SigningKey::from_bytes(&[7; 32]));
    let parts = ServerParts {
        listen: vec!["127.0.0.1:0".parse().unwrap()],
        limits: ServerLimits::default(),
        near: Near::of_machine(),
        shelf: Arc::new(Files { dir: dir.to_owned(), sums }),
        partials: Arc::new(Partials::default()),
        facts: Arc::new(NoFacts { reachable: false }),
        auth: None,
        key,
    };
    let server = PeerServer::start(parts).unwrap();
    println!("{}", server.local()[0]);
    tokio::task::spawn_blocking(|| std::io::stdin().read_to_end(&mut Vec::new())).await.unwrap().unwrap();
}

struct Peer {
    child: Child,
    contact: SocketAddr,
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn peer(dir: &Path) -> Peer {
    let mut command = Command::new(std::env::current_exe().unwrap());
    let mut child = command.arg("peer").arg(dir).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    Peer { child, contact: line.trim().parse().unwrap() }
}

/// Passes connections on, what comes back at the slow rate.
async fn slow_road(to: SocketAddr) -> SocketAddr {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            tokio::spawn(async move {
                let server = tokio::net::TcpStream::connect(to).await.unwrap();
                let ((mut from_client, mut to_client), (mut from_server, mut to_server)) = (client.into_split(), server.into_split());
                tokio::spawn(async move { tokio::io::copy(&mut from_client, &mut to_server).await });
                let mut buffer = vec![0; SLOW_BYTES_S / 100];
                while let Ok(read @ 1..) = from_server.read(&mut buffer).await {
                    tokio::time::sleep(Duration::from_secs_f64(read as f64 / SLOW_BYTES_S as f64)).await;
                    if to_client.write_all(&buffer[..read]).await.is_err() {
                        return;
                    }
                }
            });
        }
    });
    address
}

struct Known(Vec<SocketAddr>);

impl Finder for Known {
    fn find(&self, _digest: Digest, _size: u64) -> mpsc::Receiver<FoundPeer> {
        let (tell, told) = mpsc::channel(self.0.len());
        for contact in &self.0 {
            tell.try_send(FoundPeer { contact: *contact, key: None, holds: Holds::All }).unwrap();
        }
        told
    }

    fn find_pieces(&self, _pieces: Vec<Digest>) -> mpsc::Receiver<FoundPeer> {
        mpsc::channel(1).1
    }

    fn median_lookup(&self) -> Option<Duration> {
        None
    }
}

impl Announcer for Known {
    fn begun(&self, _digest: Digest, _size: u64) {}
    fn checked(&self, _digest: Digest, _pieces: &[Digest]) {}
    fn unchecked(&self, _digest: Digest) {}
    fn ended(&self, _digest: Digest) {}
}

/// A cold machine that knows these peers.
fn machine(dir: &Path, contacts: Vec<SocketAddr>) -> Arc<Swarm> {
    let known = Arc::new(Known(contacts));
    let parts = SwarmParts {
        mirror: Arc::new(Mirror::new(MirrorLimits::default())),
        client: PeerClient::new(ClientLimits::default()),
        finder: Arc::clone(&known) as Arc<dyn Finder>,
        announcer: known,
        partials: Arc::new(Partials::default()),
        netdb: None,
        spill_dir: dir.to_owned(),
        public: false,
        fleet: None,
        convictions: None,
    };
    Swarm::new(parts).unwrap()
}

/// Brings one file in as the mounts do: written, summed in order, compared.
async fn download(swarm: &Swarm, dir: &Path, digest: Digest, size: u64) {
    let path = dir.join(format!("incoming-{digest}"));
    let disk = File::options().create(true).truncate(true).read(true).write(true).open(&path).unwrap();
    disk.set_len(size).unwrap();
    let incoming = Some(Arc::new(File::open(&path).unwrap().into()));
    let missing = (0..size.div_ceil(PIECE)).map(|piece| u32::try_from(piece).unwrap()).collect();
    let want = SwarmWant { digest, size, urls: Vec::new(), missing, incoming, repair: false, fleet_only: false };
    let (out, mut deliveries) = way();
    let fetch = async {
        swarm.fetch(want, &out, |delivery| delivery).await.unwrap();
        drop(out);
    };
    let write = async {
        let mut state = (Summer::new(), disk, HashMap::<u64, Vec<u8>>::new());
        while let Some(delivery) = deliveries.recv().await {
            let SwarmDelivery::Piece { index, bytes, .. } = delivery else { continue };
            state = tokio::task::spawn_blocking(move || {
                let (mut summer, disk, mut waiting) = state;
                let memory = File::from(bytes);
                let mut bytes = vec![0; usize::try_from(memory.metadata().unwrap().len()).unwrap()];
                memory.read_exact_at(&mut bytes, 0).unwrap();
                disk.write_all_at(&bytes, u64::from(index) * PIECE).unwrap();
                waiting.insert(u64::from(index), bytes);
                while let Some(bytes) = waiting.remove(&(summer.size() / PIECE)) {
                    summer.update(&bytes);
                }
                (summer, disk, waiting)
            })
            .await
            .unwrap();
        }
        assert_eq!(state.0.finish().digest, digest, "the download is wrong");
    };
    tokio::join!(fetch, write);
    fs::remove_file(path).unwrap();
}

fn cpu_s() -> f64 {
    let text = fs::read_to_string("/proc/self/stat").unwrap();
    let fields: Vec<&str> = text.rsplit(')').next().unwrap().split_whitespace().collect();
    let ticks: f64 = fields[11].parse::<f64>().unwrap() + fields[12].parse::<f64>().unwrap();
    ticks / 100.0
}

async fn timed(work: impl Future<Output = ()>) -> (f64, f64) {
    let (start, cpu) = (Instant::now(), cpu_s());
    work.await;
    (start.elapsed().as_secs_f64(), cpu_s() - cpu)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Bytes that do not compress, the same at each run.
fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// Sizes as bookworm's packages have them: median 59 KB, 18.5 % over 512 KiB; the largest are cut at 64 MB.
fn sizes() -> Vec<usize> {
    (0..PACKAGES)
        .map(|at| {
            let share = (at as f64 + 0.5) / PACKAGES as f64;
            // A logarithm that is even between the quantiles 5 % (2 KB), 50 %, 81.5 %, 95 % and 100 %.
            let points = [(0.0, 1.0e3f64), (0.05, 2.0e3), (0.5, 59.0e3), (0.815, 524_288.0), (0.95, 4.0e6), (1.0, 64.0e6)];
            let at = points.windows(2).find(|pair| share <= pair[1].0).unwrap();
            let along = (share - at[0].0) / (at[1].0 - at[0].0);
            (at[0].1.ln() + along * (at[1].1.ln() - at[0].1.ln())).exp() as usize
        })
        .collect()
}

fn put(dir: &Path, bytes: &[u8]) -> (Digest, u64) {
    let digest = Digest::of(bytes);
    fs::write(dir.join(digest.to_string()), bytes).unwrap();
    (digest, bytes.len() as u64)
}

/// nginx on a free port, serving `dir`; `None` where there is none.
fn nginx(dir: &Path, conf: &Path) -> Option<(Child, u16)> {
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let text = format!(
        "daemon off; master_process off; pid {conf}/nginx.pid; error_log stderr crit; events {{}} user root;\n\
         http {{ access_log off; sendfile on; client_body_temp_path {conf}; proxy_temp_path {conf}; fastcgi_temp_path {conf};\n\
         uwsgi_temp_path {conf}; scgi_temp_path {conf}; server {{ listen 127.0.0.1:{port}; root {root}; }} }}\n",
        conf = conf.display(),
        root = dir.display()
    );
    fs::write(conf.join("nginx.conf"), text).unwrap();
    let mut child = Command::new("nginx").arg("-c").arg(conf.join("nginx.conf")).stderr(Stdio::null()).spawn().ok()?;
    while std::net::TcpStream::connect(("127.0.0.1", port)).is_err() {
        if child.try_wait().unwrap().is_some() {
            return None;
        }
        std::thread::yield_now();
    }
    Some((child, port))
}

fn run(command: &mut Command) {
    let status = command.stdout(Stdio::null()).status().unwrap();
    assert!(status.success(), "{command:?}");
}

#[tokio::main(worker_threads = 2)]
async fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    if arguments.get(1).is_some_and(|word| word == "peer") {
        return serve(Path::new(&arguments[2])).await;
    }
    let runs = if arguments.iter().any(|word| word == "--quick") { 1 } else { RUNS };
    assert!(getrlimit(Resource::Nofile).current.is_none_or(|files| files >= 1024), "raise the limit of open files");
    let dir = tempfile::tempdir().unwrap();
    let (shared, own, conf) = (dir.path().join("shared"), dir.path().join("own"), dir.path().join("conf"));
    [&shared, &own, &conf].into_iter().for_each(|dir| fs::create_dir(dir).unwrap());
    let large = put(&shared, &noise(LARGE_BYTES, 1));
    let packages: Vec<(Digest, u64)> = sizes().into_iter().zip(2..).map(|(len, seed)| put(&shared, &noise(len, seed))).collect();
    let package_bytes: u64 = packages.iter().map(|(_, size)| size).sum();
    let as_one = put(&shared, &noise(usize::try_from(package_bytes).unwrap(), 1_000_000));
    let peers: Vec<Peer> = (0..PEERS).map(|_| peer(&shared)).collect();
    let contacts: Vec<SocketAddr> = peers.iter().map(|peer| peer.contact).collect();
    let mut with_slow = contacts.clone();
    with_slow[PEERS - 1] = slow_road(contacts[PEERS - 1]).await;
    let server = nginx(&shared, &conf);

    let (mut plain, mut swarm, mut slow, mut many, mut one, mut cpu) = (vec![], vec![], vec![], vec![], vec![], vec![]);
    for _ in 0..runs {
        if let Some((_, port)) = &server {
            let got = own.join("curl");
            let start = Instant::now();
            run(Command::new("curl").args(["-sS", "-o"]).arg(&got).arg(format!("http://127.0.0.1:{port}/{}", large.0)));
            run(Command::new("sha256sum").arg(&got));
            plain.push(start.elapsed().as_secs_f64());
            fs::remove_file(got).unwrap();
        }
        let cold = machine(&own, contacts.clone());
        let (took, used) = timed(download(&cold, &own, large.0, large.1)).await;
        swarm.push(took);
        cpu.push(used * 1e9 / large.1 as f64);
        let cold = machine(&own, with_slow.clone());
        slow.push(timed(download(&cold, &own, large.0, large.1)).await.0);
        let cold = machine(&own, contacts.clone());
        one.push(timed(download(&cold, &own, as_one.0, as_one.1)).await.0);
        let cold = machine(&own, contacts.clone());
        let turns = Semaphore::new(AT_ONCE);
        let all = packages.iter().map(|(digest, size)| {
            let (cold, own, turns) = (&cold, &own, &turns);
            async move {
                let _turn = turns.acquire().await.unwrap();
                download(cold, own, *digest, *size).await;
            }
        });
        many.push(timed(async { drop(futures_util::future::join_all(all).await) }).await.0);
    }
    let mb_s = |seconds: f64| LARGE_BYTES as f64 / 1e6 / seconds;
    let swarm = median(swarm);
    println!("200 MB from {PEERS} peers, cold: {:.3} s, {:.0} MB/s, {:.2} CPU seconds per GB here", swarm, mb_s(swarm), median(cpu));
    match plain.is_empty() {
        true => println!("nginx is not installed: nothing to compare with"),
        false => {
            let plain = median(plain);
            println!(
                "nginx + curl, then sha256sum: {plain:.3} s, {:.0} MB/s; ours {:.2}x (goal: at least 0.5x)",
                mb_s(plain),
                plain / swarm
            );
        }
    }
    println!("one slow peer (1 MB/s) among {PEERS}: {:.3} s, {:.2}x (goal: at most 1.3x)", median(slow.clone()), median(slow) / swarm);
    let (many, one) = (median(many), median(one));
    println!(
        "{PACKAGES} packages, {:.0} MB: {many:.3} s; as one file {one:.3} s; {:.2}x (goal: at most 1.5x)",
        package_bytes as f64 / 1e6,
        many / one
    );
    if let Some((mut nginx, _)) = server {
        nginx.kill().unwrap();
        nginx.wait().unwrap();
    }
    std::io::stdout().flush().unwrap();
}
