//! `poolfs dht`, as a person or a script runs it.

use super::{announce, key, loopback, options, pv, start, v4};
use crate::harness::LIMIT;
use serde_json::Value;
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Output, Stdio};
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::{Child, Command};

/// The command, with an empty configuration instead of the machine's.
fn poolfs(dir: &Path, args: &[&str]) -> Command {
    let config = dir.join("poolfs.toml");
    std::fs::write(&config, "").unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_poolfs"));
    command.arg("dht").args(args).kill_on_drop(true);
    if matches!(args[0], "lookup" | "node") {
        command.arg("--config").arg(config).arg("--no-discovery");
    }
    command
}

async fn run(dir: &Path, args: &[&str]) -> (i32, String, String) {
    let Output { status, stdout, stderr } = tokio::time::timeout(LIMIT, poolfs(dir, args).output()).await.unwrap().unwrap();
    (status.code().unwrap(), String::from_utf8(stdout).unwrap(), String::from_utf8(stderr).unwrap())
}

/// A running `poolfs dht node`, and where it listens.
async fn node(dir: &Path, bootstrap: Option<SocketAddr>) -> (Child, SocketAddr) {
    let listen = SocketAddr::new(loopback(), 0).to_string();
    let bootstrap = bootstrap.map(|address| address.to_string());
    let more: Vec<&str> = bootstrap.iter().flat_map(|address| ["--bootstrap", address]).collect();
    let (child, listen) = node_on(dir, &listen, &more).await;
    (child, listen[0])
}

async fn node_on(dir: &Path, listen: &str, more: &[&str]) -> (Child, Vec<SocketAddr>) {
    let (state, socket) = (dir.join("state"), dir.join("dht.sock"));
    let files = ["--state-dir", state.to_str().unwrap(), "--socket", socket.to_str().unwrap()];
    let args = [&["node", "--json", "--listen", listen], &files[..], more].concat();
    let mut child = poolfs(dir, &args).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let line = tokio::time::timeout(LIMIT, lines.next_line()).await.unwrap().unwrap().expect("it says where it listens");
    let started: Value = serde_json::from_str(&line).unwrap();
    (child, started["listen"].as_array().unwrap().iter().map(|address| address.as_str().unwrap().parse().unwrap()).collect())
}

async fn stop(mut child: Child) {
    let pid = rustix::process::Pid::from_raw(i32::try_from(child.id().unwrap()).unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    let status = tokio::time::timeout(LIMIT, child.wait()).await.unwrap().unwrap();
    assert!(status.success(), "{status}");
}

/// A bootstrap node, and a person who looks: each command, its exit code, and its document.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_is_run_and_looked_into() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let (child, address) = node(dir, None).await;
    let text = address.to_string();
    let holder = start(options()).await;
    holder.bootstrap(vec![address]).await.unwrap();
    holder.knows(1).await.unwrap();
    announce(&holder, &[key(1)]).await;

    let (code, out, _) = run(dir, &["ping", &text, "--json"]).await;
    let pong: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(
        (code, &pong["answered"], &pong["poolfs"], &pong["address"]),
        (0, &true.into(), &true.into(), &text.as_str().into()),
        "{out}"
    );
    let (code, out, _) = run(dir, &["ping", &text]).await;
    assert!(code == 0 && out.starts_with(&format!("{text}: node {}, poolfs, ", pong["id"].as_str().unwrap())), "{out}");

    let (code, out, _) = run(dir, &["lookup", &key(1).to_string(), "--bootstrap", &text, "--json"]).await;
    let found: Value = serde_json::from_str(&out).unwrap();
    let contact = &found["contacts"][0];
    assert_eq!((code, &contact["address"], &contact["partial"]), (0, &v4(&holder).to_string().into(), &true.into()), "{out}");
    let public_key: String = pv(&holder).key.iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(contact["public_key"], public_key);
    let (code, out, _) = run(dir, &["lookup", &"00".repeat(32), "--bootstrap", &text]).await;
    assert!(code == 2 && out.starts_with("0 found in "), "{code} {out}");

    let socket = dir.join("dht.sock");
    let (code, out, _) = run(dir, &["status", "--json", "--socket", socket.to_str().unwrap()]).await;
    let status: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(
        (code, &status["v4"]["listen"], &status["v4"]["nodes"], &status["v6"], &status["stored_keys"]),
        (0, &text.as_str().into(), &1.into(), &Value::Null, &1.into()),
        "{out}"
    );
    let (code, out, _) = run(dir, &["status", "--socket", socket.to_str().unwrap()]).await;
    assert!(code == 0 && out.starts_with(&format!("IPv4: {text}, node ")) && out.contains("keeps 1 contacts under 1 keys"), "{out}");

    // A second start on a living node's files says what is in the way.
    let (code, _, err) = run(dir, &["node", "--listen", &text, "--state-dir", dir.join("other").to_str().unwrap()]).await;
    assert!(code == 1 && err.contains("another node runs on this port"), "{err}");
    stop(child).await;
    assert!(!socket.exists(), "the socket goes with its node");
    let (code, _, err) = run(dir, &["status", "--socket", socket.to_str().unwrap()]).await;
    assert!(code == 1 && err.contains("no node answers on") && err.contains("poolfs dht node"), "{err}");

    // It saved whom it knew: after a restart with nothing to join by it tells of the holder.
    let (child, address) = node(dir, None).await;
    let told = async {
        loop {
            let (_, out, _) = run(dir, &["lookup", &key(1).to_string(), "--bootstrap", &address.to_string(), "--json"]).await;
            let found: Value = serde_json::from_str(&out).unwrap();
            if found["closest"].as_array().unwrap().iter().any(|node| node["address"] == v4(&holder).to_string()) {
                return;
            }
        }
    };
    assert!(tokio::time::timeout(LIMIT, told).await.is_ok(), "the restarted node knows nobody");
    stop(child).await;
}

/// On a public network others knock at the TCP port before they believe in a node; both families share one port.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_public_node_opens_its_door() {
    let dir = tempfile::tempdir().unwrap();
    let (child, listen) = node_on(dir.path(), "[::]:0", &["--network", "public"]).await;
    let port = listen[0].port();
    assert!(listen.iter().all(|address| address.port() == port), "{listen:?}");
    for address in listen {
        let local = if address.is_ipv4() { "127.0.0.1".parse().unwrap() } else { "::1".parse().unwrap() };
        tokio::net::TcpStream::connect(SocketAddr::new(local, port)).await.unwrap();
    }
    stop(child).await;
}

/// What was typed wrongly, and what is not there, is answered with what to do.
#[tokio::test]
async fn errors_name_their_remedy() {
    let dir = tempfile::tempdir().unwrap();
    let check = async |args: &[&str], code: i32, want: &str| {
        let (got, out, err) = run(dir.path(), args).await;
        assert!(got == code && format!("{out}{err}").contains(want), "{args:?}: {got} {out}{err}");
    };
    check(&["ping", "nohost"], 2, "`nohost` is not HOST:PORT, for example dht.example.org:9977").await;
    check(&["ping", "127.0.0.1:53"], 1, "no node is ever asked on a port below 1024: 127.0.0.1:53").await;
    check(&["lookup", "hello"], 2, "5 characters: a file's SHA-256 has 64 hexadecimal digits, a key 40").await;
    check(&["lookup", &"00".repeat(20)], 1, "give --bootstrap HOST:PORT, or set net.bootstrap").await;
    // A bound socket that nobody reads: an address where no node answers.
    let silent = tokio::net::UdpSocket::bind(SocketAddr::new(loopback(), 0)).await.unwrap();
    let address = silent.local_addr().unwrap().to_string();
    check(&["ping", &address], 2, "no answer within 14 s").await;
    check(&["lookup", &"00".repeat(20), "--bootstrap", &address, "--timeout", "1"], 1, "no node answered within 1 s: check --bootstrap")
        .await;
}
