//! Headless Chromium, told what to do over its debugging pipe: one JSON document after the other, each ended by a zero byte.

use super::process::run;
use super::{Host, LIMIT, Running};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{CWD, FileType, Mode, mknodat};
use serde_json::{Value, json};
use std::fs::{self, File, OpenOptions};
use std::io::{Read as _, Write as _};
use std::path::Path;
use std::process::Command;
use std::time::Instant;
use tempfile::TempDir;

/// One browser with one page; its process and its profile go when it is dropped.
#[derive(Debug)]
pub(crate) struct Browser {
    to: File,
    from: File,
    read: Vec<u8>,
    session: Option<String>,
    last_id: u64,
    /// What the page was blamed for: errors of its script, of the network, of its policy.
    complaints: Vec<String>,
    _process: Running,
    _home: TempDir,
}

impl Browser {
    /// Starts one, in the network of `host`.
    pub(crate) fn start(host: &Host) -> Self {
        let home = super::workspace();
        let pipe = |name: &str| {
            let path = home.path().join(name);
            mknodat(CWD, &path, FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
            // Open at both ends, so that no end waits for the other.
            (OpenOptions::new().read(true).write(true).open(&path).unwrap(), path)
        };
        let ((to, to_path), (from, from_path)) = (pipe("to"), pipe("from"));
        let profile = home.path().join("profile");
        // Its debugging pipe is at descriptors 3 and 4, which a shell can put there.
        let script = format!(
            "exec chromium --headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking \
             --disable-component-update --disable-sync --disable-dev-shm-usage --hide-scrollbars --force-color-profile=srgb \
             --user-data-dir={} --remote-debugging-pipe about:blank 3<{} 4>{}",
            profile.display(),
            to_path.display(),
            from_path.display()
        );
        let mut command = host.command("sh");
        command.args(["-c", &script]).env("HOME", home.path()).env("XDG_RUNTIME_DIR", home.path());
        let process = Running::start(&mut command);
        let mut browser =
            Self { to, from, read: Vec::new(), session: None, last_id: 0, complaints: Vec::new(), _process: process, _home: home };
        let targets = browser.call("Target.createTarget", &json!({ "url": "about:blank" }));
        let attached = browser.call("Target.attachToTarget", &json!({ "targetId": targets["targetId"], "flatten": true }));
        browser.session = Some(attached["sessionId"].as_str().unwrap().to_owned());
        for domain in ["Page", "Log", "Runtime"] {
            browser.call(&format!("{domain}.enable"), &json!({}));
        }
        browser
    }

    /// Sends a command and waits for its answer.
    #[track_caller]
    pub(crate) fn call(&mut self, method: &str, parameters: &Value) -> Value {
        self.last_id += 1;
        let mut message = json!({ "id": self.last_id, "method": method, "params": parameters });
        if let Some(session) = &self.session {
            message["sessionId"] = json!(session);
        }
        let mut bytes = serde_json::to_vec(&message).unwrap();
        bytes.push(0);
        self.to.write_all(&bytes).unwrap();
        loop {
            let answer = self.next(method);
            if answer["id"] == self.last_id {
                assert!(answer.get("error").is_none(), "{method}: {answer}");
                return answer["result"].clone();
            }
        }
    }

    /// The next message, whatever it is.
    #[track_caller]
    fn next(&mut self, what: &str) -> Value {
        let deadline = Instant::now() + LIMIT;
        loop {
            if let Some(end) = self.read.iter().position(|byte| *byte == 0) {
                let message: Vec<u8> = self.read.drain(..=end).collect();
                let message: Value = serde_json::from_slice(&message[..end]).unwrap();
                self.note(&message);
                return message;
            }
            let left = Timespec::try_from(deadline.saturating_duration_since(Instant::now())).unwrap();
            let ready = match poll(&mut [PollFd::new(&self.from, PollFlags::IN)], Some(&left)) {
                // The end of another test's child.
                Err(rustix::io::Errno::INTR) => continue,
                ready => ready.unwrap(),
            };
            assert!(ready > 0, "Chromium says nothing to {what}: {:?}", self._process.said().1);
            let mut buffer = vec![0; 1 << 16];
            let count = match self.from.read(&mut buffer) {
                Err(err) if err.kind() == std::io::ErrorKind::Interrupted => continue,
                count => count.unwrap(),
            };
            self.read.extend_from_slice(&buffer[..count]);
        }
    }

    fn note(&mut self, message: &Value) {
        match message["method"].as_str() {
            Some("Log.entryAdded") if message["params"]["entry"]["level"] == "error" => self.complaints.push(message["params"].to_string()),
            Some("Runtime.exceptionThrown") => self.complaints.push(message["params"].to_string()),
            _ => {}
        }
    }

    /// What the page was blamed for so far.
    pub(crate) fn complaints(&self) -> &[String] {
        &self.complaints
    }

    /// Opens a page and waits until it has loaded.
    #[track_caller]
    pub(crate) fn open(&mut self, url: &str) {
        let went = self.call("Page.navigate", &json!({ "url": url }));
        assert!(went.get("errorText").is_none(), "{url}: {went}");
        while self.next("Page.navigate")["method"] != "Page.loadEventFired" {}
    }

    /// The value of an expression; a promise is awaited.
    #[track_caller]
    pub(crate) fn value(&mut self, expression: &str) -> Value {
        let found = self.call("Runtime.evaluate", &json!({ "expression": expression, "returnByValue": true, "awaitPromise": true }));
        assert!(found.get("exceptionDetails").is_none(), "{expression}: {found}");
        found["result"]["value"].clone()
    }

    /// Waits until an expression is true, looking at every change of the page.
    #[track_caller]
    pub(crate) fn await_true(&mut self, expression: &str) {
        let promise = format!(
            "new Promise(done => {{ const look = () => {{ if ({expression}) {{ watch.disconnect(); done(true); }} }}; \
             const watch = new MutationObserver(look); \
             watch.observe(document, {{ subtree: true, childList: true, attributes: true, characterData: true }}); look(); }})"
        );
        assert_eq!(self.value(&promise), true);
    }

    /// Makes the window so wide, with or without a dark ground, as a telephone's or not.
    pub(crate) fn resize(&mut self, width: u32, dark: bool) {
        let phone = width < 600;
        let metrics = json!({ "width": width, "height": 900, "deviceScaleFactor": if phone { 2 } else { 1 }, "mobile": phone });
        self.call("Emulation.setDeviceMetricsOverride", &metrics);
        let scheme = if dark { "dark" } else { "light" };
        self.call("Emulation.setEmulatedMedia", &json!({ "features": [{ "name": "prefers-color-scheme", "value": scheme }] }));
    }

    /// Saves a picture of the whole page.
    pub(crate) fn picture(&mut self, to: &Path) {
        let shot = self.call("Page.captureScreenshot", &json!({ "captureBeyondViewport": true, "format": "png" }));
        let coded = to.with_extension("base64");
        fs::write(&coded, shot["data"].as_str().unwrap()).unwrap();
        let script = format!("base64 -d {coded:?} > {to:?}");
        run(Command::new("sh").args(["-c", &script])).ok();
        fs::remove_file(&coded).unwrap();
        assert!(fs::read(to).unwrap().starts_with(b"\x89PNG"), "{} is no picture", to.display());
    }
}
