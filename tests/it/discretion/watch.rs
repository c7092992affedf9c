//! `poolfs dht watch`, held against what was on the wire.

use super::{Recorder, stranger_gets};
use crate::harness::crowd::{Crowd, Terms};
use crate::harness::{LIMIT, Package, report};
use poolfs_core::Digest;
use serde_json::Value;
use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader};
use std::process::{Child, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Instant;

/// A running `poolfs dht watch --json`.
struct Watch {
    child: Child,
    lines: Arc<Mutex<Vec<Value>>>,
}

impl Watch {
    fn start(crowd: &Crowd, machine: usize) -> Self {
        let mut child = crowd.machines[machine].poolfs_command(&["dht", "watch", "--json"]).stdout(Stdio::piped()).spawn().unwrap();
        let mut out = BufReader::new(child.stdout.take().unwrap()).lines();
        let first: Value = serde_json::from_str(&out.next().unwrap().unwrap()).unwrap();
        assert!(first["watching"].is_string(), "{first}");
        let lines = Arc::<Mutex<Vec<Value>>>::default();
        let kept = Arc::clone(&lines);
        std::thread::spawn(move || {
            for line in out.map_while(Result::ok) {
                kept.lock().unwrap().push(serde_json::from_str(&line).unwrap());
            }
        });
        Self { child, lines }
    }

    fn lines(&self) -> Vec<Value> {
        self.lines.lock().unwrap().clone()
    }

    /// Waits until one of the lines fits.
    #[track_caller]
    fn await_line(&self, what: &str, fits: impl Fn(&Value) -> bool) -> Value {
        let begun = Instant::now();
        loop {
            if let Some(line) = self.lines().into_iter().find(&fits) {
                return line;
            }
            assert!(begun.elapsed() < LIMIT, "{what}: not among {} lines", self.lines().len());
            std::thread::yield_now();
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Every datagram that left the machine is shown, byte for byte and to whom, and none that did not; and so is every answer, with the key of
/// what is announced and the status that a stranger got. What was not shown here would be told in secret.
#[test]
fn everything_that_is_told_is_shown() {
    let packages = ["one", "two"].map(|name| Package::new(name, "1.0", 700_000));
    let crowd = Crowd::new(2, packages.into(), &Terms::default());
    crowd.up(false);
    let watch = Watch::start(&crowd, 0);
    let recorder = Recorder::start(&crowd.hosts[0], &crowd.machines[1].scratch());
    crowd.download(0);
    let digest = crowd.packages[0].digest.clone();
    let key: String = digest.parse::<Digest>().unwrap().file_key().iter().map(|byte| format!("{byte:02x}")).collect();
    let has_key = |line: &Value| line["keys"].as_array().is_some_and(|keys| keys.iter().any(|known| *known == key.as_str()));
    let announced = watch.await_line("the announce", |line| line["what"] == "announces" && has_key(line));
    assert!(announced["pvs"][0].as_str().is_some_and(|pv| pv.starts_with("key ")), "{announced}");
    assert_eq!(announced["to"], format!("{}:9977", crowd.hosts[1].address));

    let unknown = Digest::of(b"unknown").to_string();
    let codes = stranger_gets(&crowd, &digest);
    let answer = |what: &str, digest: &str, code: &str| {
        let text = format!("GET /v1/{what}/{digest}");
        let shown =
            watch.await_line(&text, |line| line["how"] == "answer" && line["what"].as_str().is_some_and(|said| said.ends_with(&text)));
        assert!(shown["what"].as_str().unwrap().starts_with(&format!("answers {code}")), "{shown}");
        assert!(shown["to"].as_str().unwrap().starts_with(&format!("{}:", crowd.hosts[1].address)), "{shown}");
    };
    for (what, code) in ["file", "have", "pieces", "about"].into_iter().zip(&codes) {
        answer(what, &digest, code);
    }
    stranger_gets(&crowd, &unknown);
    answer("have", &unknown, "404");

    // What the recorder had last is shown by now or soon: the line comes after the datagram.
    let count = |all: Vec<(String, String)>| {
        all.into_iter().fold(BTreeMap::new(), |mut counts: BTreeMap<_, u32>, one| {
            *counts.entry(one).or_default() += 1;
            counts
        })
    };
    let on_wire = count(
        recorder
            .sent(crowd.hosts[0].address, 0)
            .into_iter()
            .map(|(to, bytes)| (to.to_string(), bytes.iter().map(|byte| format!("{byte:02x}")).collect()))
            .collect(),
    );
    assert!(on_wire.len() > 5, "{} datagrams", on_wire.len());
    let begun = Instant::now();
    loop {
        let datagrams = watch.lines().into_iter().filter(|line| line["how"] == "datagram");
        let shown =
            count(datagrams.map(|line| (line["to"].as_str().unwrap().to_owned(), line["bytes"].as_str().unwrap().to_owned())).collect());
        let missing = on_wire.iter().find(|(one, times)| shown.get(*one).is_none_or(|shown| shown < *times));
        match missing {
            None => break,
            Some(missing) => assert!(begun.elapsed() < LIMIT, "left the machine and is not shown: {missing:?}"),
        }
    }
    report(
        "discretion::watch",
        &format!("{} different datagrams on the wire, each shown; announces, contacts and answers by name", on_wire.len()),
    );
}
