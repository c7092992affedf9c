//! The figures of the peer server: what its answers' times tell, and how fast it gives.
//!
//! Run by `scripts/bench peer`. It needs root, `/dev/fuse` and curl; with nginx there is a figure beside which to read its own.
#![allow(
    clippy::print_stdout,
    clippy::unwrap_used,
    clippy::expect_used,
    missing_docs,
    reason = "a program for people, that stops at the first surprise"
)]

use poolfs_core::Digest;
use poolfs_net::peer::{ClientLimits, PeerClient, PeerPiece};
use poolfs_net::swarm::FileShape;
use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

const REQUESTS: usize = 10_000;
const LARGE_BYTES: usize = 200_000_000;
const RUNS: usize = 3;

/// Pieces asked for at once.
const IN_FLIGHT: usize = 4;

struct Bench {
    dir: PathBuf,
    daemon: Option<Child>,
    nginx: Option<Child>,
}

impl Drop for Bench {
    fn drop(&mut self) {
        let _ = self.poolfs(&["down"]);
        for mut child in [self.daemon.take(), self.nginx.take()].into_iter().flatten() {
            let _ = child.kill();
            let _ = child.wait();
        }
        if let Err(err) = fs::remove_dir_all(&self.dir) {
            println!("left behind {}: {err}", self.dir.display());
        }
    }
}

fn seconds(work: impl FnOnce()) -> f64 {
    let start = Instant::now();
    work();
    start.elapsed().as_secs_f64()
}

fn quantile(sorted: &[f64], of_hundred: usize) -> f64 {
    sorted[(sorted.len() - 1) * of_hundred / 100]
}

impl Bench {
    fn new() -> Self {
        let dir = PathBuf::from(format!("/var/tmp/poolfs-bench-peer-{}", std::process::id()));
        for sub in ["archives/partial", "lists/partial", "state", "cache", "www"] {
            fs::create_dir_all(dir.join(sub)).unwrap();
        }
        let shown = dir.display();
        let text = format!(
            "[[mount]]\nrole = \"archives\"\npath = \"{shown}/archives\"\n[[mount]]\nrole = \"lists\"\npath = \"{shown}/lists\"\n\
             [store]\nstate_dir = \"{shown}/state\"\ncache_dir = \"{shown}/cache\"\n[control]\nsocket = \"{shown}/control.sock\"\n\
             [status]\nlisten = \"\"\n[net]\nlisten = \"127.0.0.1:0\"\ndiscovery = false\n[log]\nlevel = \"warn\"\n"
        );
        fs::write(dir.join("poolfs.toml"), text).unwrap();
        Self { dir, daemon: None, nginx: None }
    }

    fn poolfs(&self, arguments: &[&str]) -> String {
        let (first, rest) = arguments.split_first().unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_poolfs"));
        let out = command.arg(first).arg("--config").arg(self.dir.join("poolfs.toml")).args(rest).output().unwrap();
        String::from_utf8(out.stdout).unwrap()
    }

    fn start(&mut self) {
        let mut child = Command::new(env!("CARGO_BIN_EXE_poolfs"))
            .args(["up", "--foreground", "--config"])
            .arg(self.dir.join("poolfs.toml"))
            .env("POOLFS_TELL_PARENT", "1")
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut out = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        while !line.contains("\"ready\"") {
            line.clear();
            assert!(out.read_line(&mut line).unwrap() > 0, "the daemon ended");
        }
        // The pipe stays open: the daemon would be told that nobody reads.
        std::thread::spawn(move || std::io::copy(&mut out, &mut std::io::sink()));
        self.daemon = Some(child);
    }

    fn status(&self) -> serde_json::Value {
        serde_json::from_str(&self.poolfs(&["status", "--json"])).unwrap()
    }

    fn start_nginx(&mut self) -> Option<String> {
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let shown = self.dir.display();
        let text = format!(
            "daemon off;\nmaster_process off;\nuser root;\npid {shown}/nginx.pid;\nerror_log /dev/null;\nevents {{}}\nhttp {{ access_log off; sendfile on;\n\
             server {{ listen 127.0.0.1:{port}; root {shown}/www; }} }}\n"
        );
        fs::write(self.dir.join("nginx.conf"), text).unwrap();
        self.nginx = Some(Command::new("nginx").arg("-c").arg(self.dir.join("nginx.conf")).spawn().ok()?);
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            std::thread::sleep(Duration::from_millis(10));
        }
        Some(format!("http://127.0.0.1:{port}/large"))
    }
}

/// Microseconds of one request on a kept connection.
fn request(stream: &mut TcpStream, digest: &Digest, want: &str) -> f64 {
    let text = format!("GET /v1/file/{digest} HTTP/1.1\r\nhost: x\r\n\r\n");
    let mut answer = [0; 1024];
    let mut len = 0;
    let took = seconds(|| {
        stream.write_all(text.as_bytes()).unwrap();
        len = stream.read(&mut answer).unwrap();
    });
    assert!(answer[..len].starts_with(want.as_bytes()) && answer[..len].ends_with(b"not found\n"), "one answer in one segment");
    took * 1e6
}

fn timing(address: SocketAddr, local_only: &Digest, withheld: &Digest) {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_nodelay(true).unwrap();
    let mut times: [Vec<f64>; 3] = Default::default();
    for round in 0..REQUESTS {
        // A digest of its own each time: nobody asks twice for what he does not know of.
        let unknown = Digest::of(&round.to_le_bytes());
        let mut kinds = [(0, &unknown), (1, local_only), (2, withheld)];
        kinds.rotate_left(round % 3);
        for (kind, digest) in kinds {
            times[kind].push(request(&mut stream, digest, "HTTP/1.1 404 "));
        }
    }
    times.iter_mut().for_each(|times| times.sort_by(f64::total_cmp));
    let base = quantile(&times[0], 50);
    println!("time of {REQUESTS} answers 404 each on one connection, interleaved; goal: medians within 3 % of each other");
    for (name, times) in ["unknown", "local-only", "withheld"].into_iter().zip(&times) {
        let (p10, p50, p90) = (quantile(times, 10), quantile(times, 50), quantile(times, 90));
        let met = (0.97..=1.03).contains(&(p50 / base));
        println!(
            "  {name:<12} p10 {p10:6.1} us   p50 {p50:6.1} us   p90 {p90:6.1} us   ratio {:.3} {}",
            p50 / base,
            if met { "met" } else { "MISSED" }
        );
    }
}

/// Takes every piece with some requests in flight into one file; each is hashed as it comes.
async fn take_all(client: PeerClient, address: SocketAddr, shape: FileShape, to: &Path) {
    let file = Arc::new(File::create(to).unwrap());
    let next = Arc::new(AtomicU32::new(0));
    let workers = (0..IN_FLIGHT).map(|_| {
        let (client, next, file) = (client.clone(), Arc::clone(&next), Arc::clone(&file));
        tokio::spawn(async move {
            loop {
                let piece = next.fetch_add(1, Ordering::Relaxed);
                if piece >= shape.pieces() {
                    return;
                }
                let PeerPiece { bytes: memory, .. } = client.piece(address, &shape, piece, || {}).await.unwrap();
                let mut bytes = vec![0; shape.piece_len(piece) as usize];
                File::from(memory).read_exact_at(&mut bytes, 0).unwrap();
                file.write_all_at(&bytes, u64::from(piece) * u64::from(shape.piece_bytes)).unwrap();
            }
        })
    });
    for worker in workers.collect::<Vec<_>>() {
        worker.await.unwrap();
    }
}

fn curl(url: &str, to: &Path) {
    assert!(Command::new("curl").args(["-sSf", "--noproxy", "*", "-o"]).arg(to).arg(url).status().unwrap().success());
}

fn best(mut work: impl FnMut()) -> f64 {
    (0..RUNS).map(|_| seconds(&mut work)).fold(f64::MAX, f64::min)
}

fn throughput(bench: &mut Bench, address: SocketAddr, large: Digest) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let shape = FileShape::of(large, LARGE_BYTES as u64);
    let client = PeerClient::new(ClientLimits::default());
    let to = bench.dir.join("www/fetched");
    let mb = LARGE_BYTES as f64 / 1e6;
    println!("{mb:.0} MB over loopback, best of {RUNS}, page cache warm");
    let pieces = best(|| runtime.block_on(take_all(client.clone(), address, shape, &to)));
    println!("  server and client, {IN_FLIGHT} pieces in flight, each checked twice, to a file {:7.0} MB/s", mb / pieces);
    let url = format!("http://{address}/v1/file/{large}");
    let whole = best(|| curl(&url, &to));
    println!("  server and curl, the whole file to a file                          {:7.0} MB/s", mb / whole);
    let Some(url) = bench.start_nginx() else { return println!("  no nginx here: nothing to compare with") };
    let plain = best(|| {
        curl(&url, &to);
        assert!(Command::new("sha256sum").arg(&to).stdout(Stdio::null()).status().unwrap().success());
    });
    println!("  nginx and curl, then sha256sum                                     {:7.0} MB/s", mb / plain);
    let ratio = plain / pieces;
    println!("  ratio {ratio:.2}, goal at least 0.5: {}", if ratio >= 0.5 { "met" } else { "MISSED" });
}

fn main() {
    let mut bench = Bench::new();
    let mut seed = 1_u64;
    let mut large = vec![0; LARGE_BYTES];
    for word in large.chunks_exact_mut(8) {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        word.copy_from_slice(&seed.to_le_bytes());
    }
    let files: [(&str, &[u8]); 3] = [("local-only", b"stays here"), ("withheld", b"has a hole"), ("large", &large)];
    files.iter().for_each(|(name, bytes)| fs::write(bench.dir.join("archives").join(name), bytes).unwrap());
    File::create(bench.dir.join("www/large")).unwrap().write_all(&large).unwrap();
    bench.start();
    while bench.status()["mounts"][0]["local_only"].as_u64().unwrap() < files.len() as u64 {
        std::thread::sleep(Duration::from_millis(100));
    }
    // What no list names stays here, so it is said otherwise behind the daemon's back, after it was judged.
    let db = rusqlite::Connection::open(bench.dir.join("state/poolfs.db")).unwrap();
    for (name, sharing) in [("withheld", "withheld"), ("large", "announced")] {
        let rows = db.execute("UPDATE files SET sharing = ? WHERE path = ?", rusqlite::params![sharing, name.as_bytes()]).unwrap();
        assert_eq!(rows, 1, "{name}");
    }
    let mount = &bench.status()["mounts"][0];
    assert_eq!((&mount["withheld"], &mount["announced"]), (&1.into(), &1.into()), "{mount}");
    let address: SocketAddr = bench.status()["uploaded"]["listening"][0].as_str().unwrap().parse().unwrap();
    timing(address, &Digest::of(files[0].1), &Digest::of(files[1].1));
    throughput(&mut bench, address, Digest::of(&large));
}
