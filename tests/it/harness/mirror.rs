//! A mirror that misbehaves on demand: an HTTP/1.1 server on loopback with a log of its requests.
//!
//! Threads and blocking sockets, one thread per connection: it shares no code with the client that it tests. Nothing in
//! it waits for time; what must be slow waits on a [`Gate`] that the test opens.

use super::LIMIT;
use super::process::run;
use super::upstream::Upstream;
use parking_lot::{Condvar, Mutex};
use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufRead as _, BufReader, Write as _};
use std::net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

/// Something that is closed until the test opens it. Clones are the same gate.
#[derive(Clone, Debug, Default)]
pub(crate) struct Gate(Arc<(Mutex<Opened>, Condvar)>);

#[derive(Debug, Default)]
struct Opened {
    /// How many may pass; each pass takes one.
    passes: u64,
    for_all: bool,
}

impl Gate {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    /// Lets everybody through from now on.
    pub(crate) fn open(&self) {
        self.0.0.lock().for_all = true;
        self.0.1.notify_all();
    }

    /// Lets the next `count` through.
    pub(crate) fn let_through(&self, count: u64) {
        self.0.0.lock().passes += count;
        self.0.1.notify_all();
    }

    fn pass(&self) {
        let mut opened = self.0.0.lock();
        while !opened.for_all && opened.passes == 0 {
            self.0.1.wait(&mut opened);
        }
        opened.passes = opened.passes.saturating_sub(1);
    }
}

/// Who asks, told by the User-Agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Client {
    /// apt's http method.
    Apt,
    /// Whoever else, in these tests poolfs.
    Poolfs,
}

/// What the mirror does instead of serving the file.
#[derive(Clone, Debug)]
pub(crate) enum Fault {
    /// This status, with a short text.
    Status(u16),
    /// 200 and a page that says the network wants a login.
    Html,
    /// 200 or 206 with the right length declared; the connection ends after this many bytes.
    Short(usize),
    /// The same, by a reset.
    Reset(usize),
    /// A body that is this much shorter than the file, and says so.
    Truncated(usize),
    /// The file and this many more bytes, and says so.
    Long(usize),
    /// The right length, the byte at this offset is another one.
    Wrong(usize),
    /// 302 to itself with a counter in the query, for ever.
    RedirectLoop,
    /// Body one byte per pass through the gate.
    Drip(Gate),
    /// Body 64 KiB per pass through the gate.
    Pour(Gate),
    /// Headers at once, the body when the gate is open.
    StallBody(Gate),
    /// Nothing at all until the gate is open.
    Stall(Gate),
    /// The whole file with 200 although a range was asked for.
    IgnoreRange,
}

#[derive(Clone, Debug)]
struct Rule {
    ends_with: String,
    client: Option<Client>,
    fault: Fault,
    /// How many more requests it applies to.
    left: u64,
}

/// One request, as it was answered.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    pub(crate) method: String,
    /// Without query, percent-decoded.
    pub(crate) path: String,
    pub(crate) client: Client,
    pub(crate) from: IpAddr,
    pub(crate) range: Option<String>,
    /// Zero until the status line is written.
    pub(crate) status: u16,
    pub(crate) body_bytes: u64,
}

#[derive(Debug, Default)]
struct State {
    rules: Vec<Rule>,
    log: Vec<Request>,
    /// To be shut down by [`Mirror::stop`]; a connection takes itself out, so that dropping its stream closes it.
    connections: HashMap<u64, TcpStream>,
    stopped: bool,
    dates: bool,
}

#[derive(Debug)]
struct Shared {
    root: PathBuf,
    /// Asked once for what `root` has not.
    upstream: Option<Upstream>,
    state: Mutex<State>,
    changed: Condvar,
    gates: Mutex<Vec<Gate>>,
}

/// A mirror of the directory `root`, at [`Mirror::url`]. It ends when it is dropped.
#[derive(Debug)]
pub(crate) struct Mirror {
    address: SocketAddr,
    shared: Arc<Shared>,
    listener: Mutex<Option<(TcpListener, std::thread::JoinHandle<()>)>>,
}

impl Mirror {
    pub(crate) fn new(root: &Path) -> Self {
        Self::at(TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap(), root)
    }

    /// A mirror of `root` behind a socket that listens already.
    pub(crate) fn at(listener: TcpListener, root: &Path) -> Self {
        Self::of(listener, root, None)
    }

    /// A mirror of the real Debian archive, each file of which is fetched once and kept below `target/`.
    #[allow(dead_code, reason = "what the tests of the swarm use comes with them")]
    pub(crate) fn debian(listener: TcpListener) -> Self {
        let upstream = Upstream::new();
        let root = upstream.kept.clone();
        Self::of(listener, &root, Some(upstream))
    }

    fn of(listener: TcpListener, root: &Path, upstream: Option<Upstream>) -> Self {
        let shared = Shared { root: root.to_owned(), upstream, state: Mutex::default(), changed: Condvar::new(), gates: Mutex::default() };
        let mirror = Self { address: listener.local_addr().unwrap(), shared: Arc::new(shared), listener: Mutex::new(None) };
        mirror.serve(listener);
        mirror
    }

    fn serve(&self, listener: TcpListener) {
        let shared = Arc::clone(&self.shared);
        let thread = std::thread::Builder::new().name("mirror".into());
        let kept = listener.try_clone().unwrap();
        let handle = thread.spawn(move || {
            for (number, stream) in (0_u64..).zip(listener.incoming()) {
                let mut state = shared.state.lock();
                if state.stopped {
                    return;
                }
                let Ok(stream) = stream else { continue };
                state.connections.insert(number, stream.try_clone().unwrap());
                drop(state);
                let shared = Arc::clone(&shared);
                std::thread::spawn(move || {
                    // A client that goes away in the middle is no failure of the mirror.
                    let _ = shared.converse(number, stream);
                });
            }
        });
        *self.listener.lock() = Some((kept, handle.unwrap()));
    }

    /// `http://127.0.0.1:PORT`, no slash at the end.
    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// From now on, requests whose path ends with `ends_with` (of `client` only, if given) get `fault`. The newest fitting rule counts.
    pub(crate) fn fault(&self, ends_with: &str, client: impl Into<Option<Client>>, fault: Fault) {
        self.fault_times(ends_with, client, fault, u64::MAX);
    }

    /// As [`Mirror::fault`], for the next `times` fitting requests.
    pub(crate) fn fault_times(&self, ends_with: &str, client: impl Into<Option<Client>>, fault: Fault, times: u64) {
        if let Fault::Drip(gate) | Fault::Pour(gate) | Fault::StallBody(gate) | Fault::Stall(gate) = &fault {
            self.shared.gates.lock().push(gate.clone());
        }
        let rule = Rule { ends_with: ends_with.into(), client: client.into(), fault, left: times };
        self.shared.state.lock().rules.insert(0, rule);
    }

    /// Serves everything properly again; what waits on a gate goes on waiting.
    pub(crate) fn heal(&self) {
        self.shared.state.lock().rules.clear();
    }

    /// Refuses connections from now on, and ends the ones it has.
    pub(crate) fn stop(&self) {
        let mut state = self.shared.state.lock();
        state.stopped = true;
        for (_, connection) in state.connections.drain() {
            let _ = connection.shutdown(Shutdown::Both);
        }
        drop(state);
        for gate in self.shared.gates.lock().iter() {
            gate.open();
        }
        if let Some((listener, thread)) = self.listener.lock().take() {
            // Wakes `accept`, so that the thread ends and closes its socket; a connection might not reach another namespace.
            rustix::net::shutdown(&listener, rustix::net::Shutdown::Both).unwrap();
            let _ = thread.join();
        }
    }

    /// Serves again at the address it had, after [`Mirror::stop`].
    pub(crate) fn start_again(&self) {
        self.shared.state.lock().stopped = false;
        self.serve(TcpListener::bind(self.address).unwrap());
    }

    /// From now on it tells when files were changed, and answers 304 to who has that very version.
    pub(crate) fn tell_dates(&self) {
        self.shared.state.lock().dates = true;
    }

    pub(crate) fn log(&self) -> Vec<Request> {
        self.shared.state.lock().log.clone()
    }

    /// How many requests `client` made for packages.
    pub(crate) fn debs_asked_by(&self, client: Client) -> usize {
        self.log().iter().filter(|request| request.method == "GET" && request.client == client && request.path.ends_with(".deb")).count()
    }

    /// Body bytes that were sent to that address.
    pub(crate) fn bytes_to(&self, address: impl Into<IpAddr>) -> u64 {
        let address = address.into();
        self.log().iter().filter(|request| request.from == address).map(|request| request.body_bytes).sum()
    }

    pub(crate) fn forget_log(&self) {
        self.shared.state.lock().log.clear();
    }

    /// Waits until the log satisfies `wanted`.
    #[track_caller]
    pub(crate) fn await_log(&self, what: &str, mut wanted: impl FnMut(&[Request]) -> bool) {
        let deadline = Instant::now() + LIMIT;
        let mut state = self.shared.state.lock();
        while !wanted(&state.log) {
            let late = self.shared.changed.wait_until(&mut state, deadline).timed_out();
            assert!(!late, "{what}: not within {LIMIT:?}; the mirror was asked: {:#?}", state.log);
        }
    }

    /// Waits until `client` has asked for a path that ends so.
    #[track_caller]
    pub(crate) fn await_request(&self, client: Client, ends_with: &str) {
        let fits = |request: &Request| request.client == client && request.path.ends_with(ends_with);
        self.await_log(&format!("a request for {ends_with}"), |log| log.iter().any(fits));
    }
}

impl Drop for Mirror {
    fn drop(&mut self) {
        self.stop();
    }
}

/// What goes out for one request.
struct Answer {
    status: u16,
    headers: Vec<(&'static str, String)>,
    body: Vec<u8>,
    /// What the header says, which may not be what is sent.
    content_length: usize,
    after: After,
}

enum After {
    KeepAlive,
    Close,
    Reset,
    Drip(Gate),
    Pour(Gate),
    StallBody(Gate),
}

impl Shared {
    /// Answers requests on one connection, in order: apt sends ten ahead.
    fn converse(&self, number: u64, stream: TcpStream) -> io::Result<()> {
        let mut reader = BufReader::new(stream.try_clone()?);
        let mut writer = stream;
        let from = writer.peer_addr()?.ip();
        loop {
            let Some((request, headers)) = read_request(&mut reader)? else {
                self.state.lock().connections.remove(&number);
                return Ok(());
            };
            let (method, target) = request;
            let agent = headers.get("user-agent").map_or("", String::as_str);
            let client = if agent.starts_with("Debian APT") { Client::Apt } else { Client::Poolfs };
            let path = percent_decoded(target.split('?').next().unwrap_or_default());
            let range = headers.get("range").cloned();
            let entry = Request { method: method.clone(), path: path.clone(), client, from, range, status: 0, body_bytes: 0 };
            let (index, fault) = {
                let mut state = self.state.lock();
                state.log.push(entry);
                let rule = state
                    .rules
                    .iter_mut()
                    .find(|rule| rule.left > 0 && path.ends_with(&rule.ends_with) && rule.client.is_none_or(|only| only == client));
                let fault = rule.map(|rule| {
                    rule.left -= 1;
                    rule.fault.clone()
                });
                self.changed.notify_all();
                (state.log.len() - 1, fault)
            };
            if let Some(Fault::Stall(gate)) = &fault {
                gate.pass();
            }
            if let Some(upstream) = &self.upstream {
                upstream.have(&path);
            }
            let answer = self.answer(&target, &path, &headers, fault.as_ref());
            self.note(index, |request| request.status = answer.status);
            let keep = send(&mut writer, &method, &answer, |bytes| self.note(index, |request| request.body_bytes += bytes))?;
            if !keep {
                self.state.lock().connections.remove(&number);
                return Ok(());
            }
        }
    }

    fn note(&self, index: usize, change: impl FnOnce(&mut Request)) {
        // The log may have been forgotten in the meantime.
        if let Some(request) = self.state.lock().log.get_mut(index) {
            change(request);
        }
        self.changed.notify_all();
    }

    fn answer(&self, target: &str, path: &str, headers: &HashMap<String, String>, fault: Option<&Fault>) -> Answer {
        let plain = |status: u16, text: &str, kind: &'static str| {
            let body = text.as_bytes().to_vec();
            Answer { status, headers: vec![("Content-Type", kind.into())], content_length: body.len(), body, after: After::KeepAlive }
        };
        match fault {
            Some(Fault::Status(status)) => return plain(*status, "the mirror of this test was told to say so\n", "text/plain"),
            Some(Fault::Html) => {
                return plain(200, "<!DOCTYPE html><html><body>Please log in to this network</body></html>\n", "text/html");
            }
            Some(Fault::RedirectLoop) => {
                let turn = target.split_once("turn=").and_then(|(_, turn)| turn.parse::<u64>().ok()).unwrap_or(0) + 1;
                let mut answer = plain(302, "", "text/plain");
                answer.headers.push(("Location", format!("{path}?turn={turn}")));
                return answer;
            }
            _ => {}
        }
        let relative = path.trim_start_matches('/');
        let file = self.root.join(relative);
        let inside = !relative.split('/').any(|part| part == "..");
        let opened = inside.then(|| File::open(&file).ok()).flatten();
        let about = opened.as_ref().and_then(|file| file.metadata().ok()).filter(std::fs::Metadata::is_file);
        let (Some(file), Some(about)) = (opened, about) else { return plain(404, "not found\n", "text/plain") };
        let modified = about.modified().ok();
        let seconds = modified.and_then(|time| time.duration_since(SystemTime::UNIX_EPOCH).ok()).map_or(0, |since| since.as_secs());
        let tag = format!("\"{seconds:x}-{:x}\"", about.len());
        if headers.get("if-none-match").is_some_and(|given| *given == tag) {
            return Answer { status: 304, headers: vec![("ETag", tag)], body: Vec::new(), content_length: 0, after: After::KeepAlive };
        }
        let dates = self.state.lock().dates;
        let date =
            dates.then(|| run(Command::new("date").args(["-u", "-d", &format!("@{seconds}"), "+%a, %d %b %Y %H:%M:%S GMT"])).ok().out);
        let date = date.map(|date| date.trim().to_owned());
        if date.is_some() && headers.get("if-modified-since") == date.as_ref() {
            return Answer { status: 304, headers: Vec::new(), body: Vec::new(), content_length: 0, after: After::KeepAlive };
        }
        let size = usize::try_from(about.len()).unwrap();
        // What the fault makes of the file; of a file as it is only the wanted part is read, as large ones are asked for in many.
        let false_bytes = match fault {
            Some(Fault::Truncated(less)) => Some(part_of(&file, 0, size.saturating_sub(*less))),
            Some(Fault::Long(more)) => Some([part_of(&file, 0, size), vec![b'x'; *more]].concat()),
            Some(Fault::Wrong(offset)) => {
                let mut whole = part_of(&file, 0, size);
                let offset = offset % size.max(1);
                if let Some(byte) = whole.get_mut(offset) {
                    *byte ^= 0x55;
                }
                Some(whole)
            }
            _ => None,
        };
        let len = false_bytes.as_ref().map_or(size, Vec::len);
        let part = |first: usize, end: usize| match &false_bytes {
            Some(whole) => whole[first..end].to_vec(),
            None => part_of(&file, first, end),
        };
        let wanted = headers
            .get("range")
            .filter(|_| headers.get("if-range").is_none_or(|given| *given == tag) && !matches!(fault, Some(Fault::IgnoreRange)));
        let mut answer = Answer {
            status: 200,
            headers: vec![("ETag", tag), ("Accept-Ranges", "bytes".into())],
            body: Vec::new(),
            content_length: 0,
            after: After::KeepAlive,
        };
        answer.headers.extend(date.map(|date| ("Last-Modified", date)));
        match wanted.map(|range| parse_range(range, len)) {
            None => answer.body = part(0, len),
            Some(None) => {
                answer.status = 416;
                answer.headers.push(("Content-Range", format!("bytes */{len}")));
            }
            Some(Some((first, last))) => {
                answer.status = 206;
                answer.headers.push(("Content-Range", format!("bytes {first}-{last}/{len}")));
                answer.body = part(first, last + 1);
            }
        }
        answer.content_length = answer.body.len();
        match fault {
            Some(Fault::Short(bytes)) => {
                answer.body.truncate(*bytes);
                answer.after = After::Close;
            }
            Some(Fault::Reset(bytes)) => {
                answer.body.truncate(*bytes);
                answer.after = After::Reset;
            }
            Some(Fault::Drip(gate)) => answer.after = After::Drip(gate.clone()),
            Some(Fault::Pour(gate)) => answer.after = After::Pour(gate.clone()),
            Some(Fault::StallBody(gate)) => answer.after = After::StallBody(gate.clone()),
            _ => {}
        }
        answer
    }
}

fn part_of(file: &File, first: usize, end: usize) -> Vec<u8> {
    let mut bytes = vec![0; end - first];
    file.read_exact_at(&mut bytes, first as u64).unwrap();
    bytes
}

/// Request line and headers (names in lower case); `None` at the end of the connection.
#[allow(clippy::type_complexity, reason = "one caller")]
fn read_request(reader: &mut BufReader<TcpStream>) -> io::Result<Option<((String, String), HashMap<String, String>)>> {
    let mut line = String::new();
    if reader.read_line(&mut line)? == 0 {
        return Ok(None);
    }
    let mut words = line.split_whitespace();
    let (Some(method), Some(target)) = (words.next(), words.next()) else { return Ok(None) };
    let first = (method.to_owned(), target.to_owned());
    let mut headers = HashMap::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let Some((name, value)) = line.split_once(':') else { return Ok(Some((first, headers))) };
        headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
    }
}

/// apt quotes `~` and `+`, which others leave as they are.
fn percent_decoded(path: &str) -> String {
    let mut parts = path.split('%');
    let mut plain = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let byte = part.get(..2).and_then(|digits| u8::from_str_radix(digits, 16).ok()).filter(u8::is_ascii);
        match byte {
            Some(byte) => plain.extend([char::from(byte)]),
            None => plain.push('%'),
        }
        plain.push_str(if byte.is_some() { &part[2..] } else { part });
    }
    plain
}

/// One range of bytes, both ends included; `None` if there is no such byte.
fn parse_range(range: &str, whole: usize) -> Option<(usize, usize)> {
    let (first, last) = range.strip_prefix("bytes=")?.split_once('-')?;
    let end = whole.checked_sub(1)?;
    let (first, last) = match (first.parse::<usize>(), last.parse::<usize>()) {
        (Ok(first), Ok(last)) => (first, last.min(end)),
        (Ok(first), Err(_)) => (first, end),
        (Err(_), Ok(count)) => (whole.saturating_sub(count), end),
        (Err(_), Err(_)) => return None,
    };
    (first <= last && first < whole).then_some((first, last))
}

/// Sends the answer; true if the connection can take another request.
fn send(writer: &mut TcpStream, method: &str, answer: &Answer, mut sent: impl FnMut(u64)) -> io::Result<bool> {
    use std::fmt::Write as _;
    let mut head = format!("HTTP/1.1 {} Test\r\nServer: test\r\nContent-Length: {}\r\n", answer.status, answer.content_length);
    for (name, value) in &answer.headers {
        write!(head, "{name}: {value}\r\n").unwrap();
    }
    head.push_str("\r\n");
    writer.write_all(head.as_bytes())?;
    if method == "HEAD" {
        return Ok(true);
    }
    if let After::StallBody(gate) = &answer.after {
        gate.pass();
    }
    let chunk_bytes = if matches!(answer.after, After::Drip(_)) { 1 } else { 64 * 1024 };
    for chunk in answer.body.chunks(chunk_bytes) {
        if let After::Drip(gate) | After::Pour(gate) = &answer.after {
            gate.pass();
        }
        writer.write_all(chunk)?;
        sent(chunk.len() as u64);
    }
    match answer.after {
        After::KeepAlive | After::Drip(_) | After::Pour(_) | After::StallBody(_) => Ok(true),
        After::Close => {
            writer.shutdown(Shutdown::Both)?;
            Ok(false)
        }
        After::Reset => {
            // A linger of zero makes the close a reset.
            rustix::net::sockopt::set_socket_linger(&*writer, Some(std::time::Duration::ZERO))?;
            Ok(false)
        }
    }
}
