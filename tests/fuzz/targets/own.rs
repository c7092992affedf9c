//! What only the machine's owner writes: the configuration and requests on the control socket.

use crate::config::Config;
use crate::control::server::{Handler, Server};
use crate::control::{REQUEST_BYTES_MAX, Reply, Request};
use crate::driver::{Subject, Target, behaviour, kind_of, some};
use std::future::Future;
use std::io::{Read as _, Write as _};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;

/// Every target of this file.
pub(super) const ALL: &[Target] = &[
    Target {
        name: "config",
        about: "the configuration file",
        start: |_| Box::new(|input: &[u8]| config(input)),
        seeds: configs,
        tokens: CONFIG,
        input_bytes_max: 4 * 1024,
        memory: (1 << 20, 2_048),
    },
    Target {
        name: "control",
        about: "the control socket: all bytes of one connection",
        start: |_| Box::new(Controlled::new()),
        seeds: requests,
        tokens: CONTROL,
        input_bytes_max: 70 * 1024,
        memory: (2 << 20, 64),
    },
];

const CONFIG: &[&str] = &[
    "\n",
    "[",
    "]",
    "[[",
    "]]",
    " = ",
    "\"",
    "'''",
    "\"\"\"",
    "#",
    "{",
    "}",
    ",",
    ".",
    "true",
    "false",
    "[[mount]]\n",
    "role = \"archives\"\n",
    "role = \"lists\"\n",
    "path = \"/x\"\n",
    "options = []\n",
    "[store]\n",
    "state_dir = ",
    "quota = ",
    "\"5 GiB\"",
    "18446744073709551615 TiB",
    "[net]\n",
    "listen = ",
    "\"[::]:9977\"",
    "bootstrap = ",
    "[\"h:1\"]",
    "[apt]\n",
    "private = [\"origin=x\"]\n",
    "advisories = ",
    "[fs]\n",
    "threads = ",
    "[fleet]\n",
    "zone = ",
    "[log]\n",
    "level = ",
    "0x",
    "1e9",
    "nan",
    "1979-05-27",
    "\\u0000",
    "\\ud800",
];

const CONTROL: &[&str] = &[
    "\n",
    "{",
    "}",
    "[",
    "]",
    "\"",
    ":",
    ",",
    "null",
    "true",
    "\"status\"",
    "\"peers\"",
    "\"list\"",
    "\"reload\"",
    "\"down\"",
    "{\"verify\":{\"repair\":",
    "{\"why\":{\"file\":",
    "{\"collect\":{\"all\":",
    "{\"log_level\":{\"level\":",
    "{\"mount\":{",
    "\"role\":\"archives\"",
    "\"path\":\"/x\"",
    "\"options\":[]",
    "\"remount\":false",
    "\"seen\":{\"namespace\":[1,2],\"found\":null}",
    "1e999",
    "\\u0000",
    "\\ud800",
    "18446744073709551616",
];

fn config(input: &[u8]) -> u64 {
    let text = String::from_utf8_lossy(input);
    match Config::parse(&text) {
        Ok(mut config) => {
            config.origin.table = text.parse().expect("what was parsed as a configuration is TOML");
            assert!(config.origin.changed(&config.origin.clone()).is_empty(), "differs from itself");
            let effective = config.origin.effective();
            let again: Config = Config::parse(&toml::to_string(&effective).expect("it can be written"))
                .unwrap_or_else(|err| panic!("what holds is not taken again: {err:#}"));
            assert_eq!(again.mounts, config.mounts, "other mounts than before");
            assert!(config.mounts.iter().all(|mount| mount.path.is_absolute()) && !config.mounts.is_empty());
            assert!((1..=64).contains(&config.fs.threads));
            behaviour((config.mounts.len(), some(text.matches('=').count())))
        }
        Err(err) => {
            let message = format!("{err:#}");
            let (line, what) = message.split_once(": ").unwrap_or_else(|| panic!("names no line: {message}"));
            let line: usize = line.parse().unwrap_or_else(|_| panic!("names no line: {message}"));
            assert!(line >= 1 && line <= text.matches('\n').count() + 1, "line {line} is not there: {message}");
            assert!(what.len() > 5, "says nothing: {message}");
            behaviour(kind_of(what))
        }
    }
}

fn configs() -> Vec<Vec<u8>> {
    let all = "[[mount]]\nrole = \"archives\"\npath = \"/var/cache/apt/archives\"\noptions = [\"ro\"]\n\n[[mount]]\nrole = \"lists\"\npath = \"/l\"\n\n\
        [store]\nstate_dir = \"/s\"\ncache_dir = \"/c\"\nquota = \"5 GiB\"\n\n[control]\nsocket = \"/run/p.sock\"\n\n[apt]\nprivate = [\"origin=x,package=y*\"]\n\
        advisories = [\"/a.json\"]\n\n[fs]\nlazy_archives = true\nthreads = 2\n\n[net]\nlisten = \"[::]:9977\"\nbootstrap = [\"h:1\"]\nnetwork = \"private\"\n\
        announce = \"large\"\nupload_bytes_s = 2000000\n\n[fleet]\nzone = \"rack\"\n\n[log]\nlevel = \"info\"\n";
    vec![Vec::new(), all.as_bytes().to_vec(), b"[store]\nquotta = 5\n".to_vec(), b"listen = \"[::]:1\"\n".to_vec()]
}

/// Says what it was asked.
struct Echo;

impl Handler for Echo {
    fn handle(self: Arc<Self>, request: Request, replies: mpsc::Sender<Reply>) -> Pin<Box<dyn Future<Output = anyhow::Result<()>> + Send>> {
        Box::pin(async move {
            // What was understood is understood the same from its own words.
            let text = serde_json::to_string(&request)?;
            assert_eq!(serde_json::from_str::<Request>(&text)?, request, "written otherwise than read");
            if request == Request::Status {
                replies.send(Reply::Status(Box::default())).await?;
            }
            Ok(())
        })
    }
}

/// The socket with the daemon's end behind it.
struct Controlled {
    _runtime: tokio::runtime::Runtime,
    _dir: tempfile::TempDir,
    path: PathBuf,
}

impl Controlled {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("control.sock");
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime");
        let inside = runtime.enter();
        let server = Server::bind(&path).expect("a socket");
        drop(inside);
        runtime.spawn(async move { server.run(Arc::new(Echo)).await });
        Self { _runtime: runtime, _dir: dir, path }
    }
}

impl Subject for Controlled {
    fn run(&mut self, input: &[u8]) -> u64 {
        let mut stream = UnixStream::connect(&self.path).expect("the socket is there");
        stream.set_read_timeout(Some(Duration::from_secs(25))).expect("a socket's option");
        let mut answer = Vec::new();
        // Past the longest request it does not read on.
        if stream.write_all(input).is_ok() && stream.shutdown(Shutdown::Write).is_ok() {
            match stream.read_to_end(&mut answer) {
                Err(err) if err.kind() == std::io::ErrorKind::WouldBlock => panic!("does not answer a request that has ended"),
                Ok(_) | Err(_) => {}
            }
        }
        let mut kinds = Vec::new();
        for line in answer.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
            let reply: Reply = serde_json::from_slice(line).unwrap_or_else(|err| panic!("answers what no client reads: {err}"));
            kinds.push(match reply {
                Reply::Failed { message } => {
                    assert!(message.len() < 4 * usize::try_from(REQUEST_BYTES_MAX).unwrap(), "a long story");
                    kind_of(message)
                }
                other => format!("{other:?}").split(['(', ' ']).next().unwrap_or_default().to_owned(),
            });
        }
        let line_is_text = input.split(|byte| *byte == b'\n').next().is_some_and(|line| std::str::from_utf8(line).is_ok());
        assert!(!kinds.is_empty() || !line_is_text || input.len() > usize::try_from(REQUEST_BYTES_MAX).unwrap(), "no answer");
        behaviour(kinds)
    }
}

fn requests() -> Vec<Vec<u8>> {
    let seen = crate::control::Seen::at(std::path::Path::new("/"));
    let all = [
        Request::Status,
        Request::Why { file: "/var/cache/apt/archives/a.deb".into() },
        Request::Mount { role: poolfs_core::Role::Lists, path: "/x".into(), options: vec!["ro".into()], remount: true, seen },
        Request::LogLevel { level: "debug".into() },
        Request::Verify { repair: true },
    ];
    all.iter().map(|request| [serde_json::to_vec(request).expect("a request"), b"\n".to_vec()].concat()).collect()
}
