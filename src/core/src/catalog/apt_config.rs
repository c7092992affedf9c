//! What apt is configured to do, as `apt-config dump` tells it: sources, architectures, proxies, forms, credentials.
//!
//! The dump is asked for with percent-quoted names and values, so that no value can be mistaken for another line. Nothing
//! here is kept up to date by itself: whoever sees `sources.list` or `apt.conf` change loads it again.

use super::CatalogError;
use super::forms::Form;
use super::names::{self, Uri};
use super::private::{Pattern, Place};
use super::sources::{self, Source, SourceKind, Sources};
use std::collections::{BTreeMap, HashSet};
use std::ffi::OsStr;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

/// How long `apt-config` may take.
const APT_CONFIG_WAIT: Duration = Duration::from_secs(10);

/// How long all runs of a `Proxy-Auto-Detect` command may take together.
const PROXY_DETECT_WAIT: Duration = Duration::from_secs(5);

/// The longest output of a command that is read, in bytes.
const OUTPUT_BYTES_MAX: u64 = 8 << 20;

/// apt's configuration tree, flat. Names are compared without regard to case, as apt does.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    values: BTreeMap<String, Vec<String>>,
    /// The names in the order of the dump, each once.
    order: Vec<String>,
}

impl Options {
    /// Parses the output of `apt-config dump --format '%F %V%n'`.
    pub fn parse(dump: &str) -> Self {
        let mut values: BTreeMap<String, Vec<String>> = BTreeMap::new();
        let mut order = Vec::new();
        for line in dump.lines() {
            let (name, value) = line.split_once(' ').unwrap_or((line, ""));
            let text = |quoted: &str| String::from_utf8_lossy(&names::unquote(quoted)).into_owned();
            let name = text(name).to_ascii_lowercase();
            let known = values.entry(name.clone()).or_default();
            if known.is_empty() {
                order.push(name);
            }
            known.push(text(value));
        }
        Self { values, order }
    }

    /// The names of the options directly below one, in lower case and in the order of the configuration.
    pub fn children(&self, name: &str) -> Vec<&str> {
        let start = format!("{}::", name.to_ascii_lowercase());
        let mut children = Vec::new();
        for below in self.order.iter().filter_map(|name| name.strip_prefix(&start)) {
            let child = below.split_once("::").map_or(below, |(child, _)| child);
            if !child.is_empty() && !children.contains(&child) {
                children.push(child);
            }
        }
        children
    }

    /// The value of one option, `None` if it is absent or empty.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.values.get(&name.to_ascii_lowercase())?.last().map(String::as_str).filter(|value| !value.is_empty())
    }

    /// The members of a list (`Name::`), or the words of a plain value.
    pub fn list(&self, name: &str) -> Vec<String> {
        match self.values.get(&format!("{}::", name.to_ascii_lowercase())) {
            Some(members) => members.iter().filter(|member| !member.is_empty()).cloned().collect(),
            None => self
                .get(name)
                .map(|value| value.split([',', ' ']).filter(|word| !word.is_empty()).map(str::to_owned).collect())
                .unwrap_or_default(),
        }
    }

    /// An option that is true or false.
    pub fn truth(&self, name: &str, default: bool) -> bool {
        self.get(name).map_or(default, |value| sources::truth(value, default))
    }

    /// A file or directory below `Dir`, made absolute by its parents as apt does.
    pub fn path(&self, name: &str) -> Option<PathBuf> {
        let mut path = self.get(name)?.to_owned();
        let mut level = name;
        while !path.starts_with('/') && !path.starts_with("./") && !path.starts_with("../") {
            let Some((parent, _)) = level.rsplit_once("::") else { break };
            level = parent;
            if let Some(above) = self.get(parent) {
                path = format!("{}/{path}", above.trim_end_matches('/'));
            }
        }
        Some(match self.get("RootDir") {
            Some(root) if path.starts_with('/') => PathBuf::from(format!("{}{path}", root.trim_end_matches('/'))),
            _ => PathBuf::from(path),
        })
    }
}

/// The variables that apt's methods take from their environment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Environment {
    /// `http_proxy`
    pub http_proxy: Option<String>,
    /// `https_proxy`
    pub https_proxy: Option<String>,
    /// `no_proxy`: comma-separated ends of host names.
    pub no_proxy: Option<String>,
}

impl Environment {
    /// This process's own variables: they are part of apt's configuration. apt's own may differ where it is started from
    /// another environment.
    fn own() -> Self {
        let get = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        Self { http_proxy: get("http_proxy"), https_proxy: get("https_proxy"), no_proxy: get("no_proxy") }
    }
}

/// A `machine` of `auth.conf`.
#[derive(Clone, PartialEq, Eq, Default)]
struct Machine {
    scheme: Option<String>,
    host: String,
    port: Option<u16>,
    path: String,
    login: String,
    password: String,
}

/// What the catalog needs of apt's configuration.
#[derive(Clone)]
pub struct AptConfig {
    options: Options,
    environment: Environment,
    sources: Sources,
    architectures: Vec<String>,
    forms: Vec<Form>,
    machines: Vec<Machine>,
    /// What `auth.conf` says is not known: any repository may need credentials.
    machines_unknown: bool,
    private: Vec<Pattern>,
    detected: BTreeMap<String, String>,
}

impl std::fmt::Debug for AptConfig {
    /// Without proxies and machines, which hold passwords.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AptConfig").field("sources", &self.sources).field("architectures", &self.architectures).finish_non_exhaustive()
    }
}

/// One list that apt keeps: which file, and what it means.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListTarget {
    /// File name in `lists/`, without the ending of its form.
    pub name: String,
    /// Packages or Sources.
    pub kind: SourceKind,
    /// File name of the suite's InRelease; its Release is [`Self::release_name`].
    pub inrelease_name: String,
    /// File name of the suite's Release where it has no InRelease.
    pub release_name: String,
    /// What a `Filename` is appended to, without credentials in `Debug`.
    pub repository: Uri,
    /// Suite as in the source.
    pub suite: String,
    /// Component, empty for an exact path.
    pub component: String,
    /// Architecture, `source` for Sources, empty for an exact path.
    pub architecture: String,
    /// Path below the Release file's directory, as the Release names it, plain form.
    pub meta_key: String,
    /// Whether the repository's files must never leave this machine.
    pub private: bool,
}

impl AptConfig {
    /// Reads apt's configuration by `apt-config dump` and the sources.
    ///
    /// `sources` are files or directories of sources, empty for those that apt's configuration names. `apt_config_env` is
    /// what `APT_CONFIG` is set to for the dump. Blocks for the run of `apt-config` and of a proxy detection command.
    pub fn load(sources: &[PathBuf], apt_config_env: Option<&Path>) -> Result<Self, CatalogError> {
        let mut command = Command::new("apt-config");
        command.args(["dump", "--format", "%F %V%n"]);
        if let Some(path) = apt_config_env {
            command.env("APT_CONFIG", path);
        }
        let dump = output(&mut command, APT_CONFIG_WAIT).map_err(|why| CatalogError::AptConfig { why })?;
        let dump = String::from_utf8_lossy(&dump).into_owned();
        let mut config = Self::of_options(Options::parse(&dump), sources, Environment::own());
        config.detect_proxies();
        Ok(config)
    }

    /// The same from options that were read elsewhere, without running anything.
    pub fn of_options(options: Options, sources: &[PathBuf], environment: Environment) -> Self {
        let native = options.get("APT::Architecture").unwrap_or_default().to_owned();
        let paths = if sources.is_empty() {
            ["Dir::Etc::sourcelist", "Dir::Etc::sourceparts"].iter().filter_map(|name| options.path(name)).collect()
        } else {
            sources.to_owned()
        };
        let mut sources = Sources::read(&paths, &native);
        let mut architectures = options.list("APT::Architectures");
        if architectures.is_empty() {
            architectures.push(native);
        }
        let mut forms = Vec::new();
        let order = options.list("Acquire::CompressionTypes::Order");
        let known = ["zst", "xz", "bz2", "lzma", "gz", "lz4"].map(str::to_owned);
        for form in order.iter().chain(&known).filter_map(|name| Form::of_extension(name)) {
            if !forms.contains(&form) {
                forms.push(form);
            }
        }
        let (machines, machines_unknown) = machines(&options, &mut sources.problems);
        let (private, detected) = (Vec::new(), BTreeMap::new());
        Self { options, environment, sources, architectures, forms, machines, machines_unknown, private, detected }
    }

    /// Keeps also what one of these patterns fits on this machine.
    #[must_use]
    pub fn with_private(mut self, patterns: &[Pattern]) -> Self {
        self.private = patterns.to_owned();
        self
    }

    /// The patterns of what stays on this machine.
    pub(super) fn private(&self) -> &[Pattern] {
        &self.private
    }

    /// The sources that count, those left out, and what is wrong with them.
    pub fn sources(&self) -> &Sources {
        &self.sources
    }

    /// Every option of apt's configuration.
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// Architectures, the native one first.
    pub fn architectures(&self) -> &[String] {
        &self.architectures
    }

    /// Compressed forms in the order in which apt asks for them.
    pub fn forms(&self) -> &[Form] {
        &self.forms
    }

    /// Forms of an index in the order in which apt asks a mirror for them (`Acquire::CompressionTypes`).
    pub fn download_forms(&self) -> Vec<Form> {
        let mut forms: Vec<Form> = Vec::new();
        let order = self.options.list("Acquire::CompressionTypes::Order");
        let types = self.options.children("Acquire::CompressionTypes");
        for form in order.iter().map(String::as_str).chain(types).chain(["uncompressed"]).filter_map(Form::of_type) {
            if !forms.contains(&form) {
                forms.push(form);
            }
        }
        forms
    }

    /// Whether apt keeps indexes compressed.
    pub fn gzip_indexes(&self) -> bool {
        self.options.truth("Acquire::GzipIndexes", false)
    }

    /// apt's lists directory.
    pub fn lists_directory(&self) -> Option<PathBuf> {
        self.options.path("Dir::State::lists")
    }

    /// apt's archives directory.
    pub fn archives_directory(&self) -> Option<PathBuf> {
        self.options.path("Dir::Cache::archives")
    }

    /// `auth.conf`, `auth.conf.d` and what is in it, at most `files_max`, also those that are not there.
    pub fn credential_files(&self, files_max: usize) -> Vec<PathBuf> {
        let directory = self.options.path("Dir::Etc::netrcparts");
        let parts = directory.as_ref().and_then(|directory| sources::parts(directory, &["conf"]).ok()).unwrap_or_default();
        self.options.path("Dir::Etc::netrc").into_iter().chain(directory).chain(parts).take(files_max).collect()
    }

    /// Packages and Sources of every source, component and architecture (and `all`), in the order of the sources.
    pub fn targets(&self) -> Vec<ListTarget> {
        let mut targets = Vec::new();
        let mut seen = HashSet::new();
        for source in &self.sources.sources {
            let needs_credentials = self.needs_credentials(&source.uri);
            let directory = source.release_directory();
            for (component, architecture, meta_key) in self.meta_keys(source) {
                let suites = [source.suite.as_str(), "", ""];
                let place = Place { repository: Some(&source.uri), suites, component: &component, ..Place::default() };
                let private = needs_credentials || self.is_named_private(&place);
                let name = names::list_name(&format!("{directory}{meta_key}"));
                if !seen.insert(name.clone()) {
                    continue;
                }
                targets.push(ListTarget {
                    name,
                    kind: source.kind,
                    inrelease_name: names::list_name(&format!("{directory}InRelease")),
                    release_name: names::list_name(&format!("{directory}Release")),
                    repository: source.uri.clone(),
                    suite: source.suite.clone(),
                    component,
                    architecture,
                    meta_key,
                    private,
                });
            }
        }
        targets
    }

    /// Component, architecture and path of each of a source's lists.
    fn meta_keys(&self, source: &Source) -> Vec<(String, String, String)> {
        let (type_name, target) = match source.kind {
            SourceKind::Binary => ("deb", "Packages"),
            SourceKind::Source => ("deb-src", "Sources"),
        };
        let option = |name: &str| self.options.get(&format!("Acquire::IndexTargets::{type_name}::{target}::{name}"));
        if source.is_flat() {
            return vec![(String::new(), String::new(), option("flatMetaKey").unwrap_or(target).to_owned())];
        }
        let pattern = option("MetaKey").unwrap_or(match source.kind {
            SourceKind::Binary => "$(COMPONENT)/binary-$(ARCHITECTURE)/Packages",
            SourceKind::Source => "$(COMPONENT)/source/Sources",
        });
        let architectures = match source.kind {
            SourceKind::Binary => self.architectures_of(source),
            SourceKind::Source => vec!["source".to_owned()],
        };
        let mut keys = Vec::new();
        for component in &source.components {
            for architecture in &architectures {
                let key = pattern.replace("$(COMPONENT)", component).replace("$(ARCHITECTURE)", architecture);
                keys.push((component.clone(), architecture.clone(), key));
            }
        }
        keys
    }

    pub(super) fn architectures_of(&self, source: &Source) -> Vec<String> {
        let option = |name: &str| -> Option<Vec<String>> {
            Some(source.options.get(name)?.split(',').filter(|word| !word.is_empty()).map(str::to_owned).collect())
        };
        let mut architectures = option("arch").unwrap_or_else(|| self.architectures.clone());
        architectures.extend(option("arch+").unwrap_or_default());
        architectures.push("all".to_owned());
        let removed = option("arch-").unwrap_or_default();
        let mut seen = HashSet::new();
        architectures.retain(|architecture| !removed.contains(architecture) && seen.insert(architecture.clone()));
        architectures
    }

    /// Whether a pattern fits: what lies there never leaves this machine.
    pub fn is_named_private(&self, place: &Place<'_>) -> bool {
        self.private.iter().any(|pattern| pattern.fits(place))
    }

    /// Whether a repository needs credentials, or may need them as far as is known: its files never leave this machine.
    pub fn needs_credentials(&self, uri: &Uri) -> bool {
        self.machines_unknown
            || uri.has_credentials()
            || self.machines.iter().any(|machine| machine.host.eq_ignore_ascii_case(&uri.host))
            || ["SslCert", "SslKey"]
                .iter()
                .any(|key| uri.scheme == "https" && self.method_option(&uri.scheme, key, Some(&uri.host)).is_some())
    }

    /// The URI of one file of a repository, as apt asks for it: percent-encoded, with the credentials of the source or of
    /// `auth.conf`. Not for logs.
    pub fn file_url(&self, repository: &Uri, path: &str) -> String {
        let bad = self.options.get("Acquire::URIEncode").unwrap_or(names::URI_BAD);
        let mut base = repository.clone();
        if !base.has_credentials()
            && let Some(machine) = self.machine(repository)
        {
            base.user.clone_from(&machine.login);
            base.password.clone_from(&machine.password);
        }
        let mut url = base.with_credentials();
        names::quote_onto(&mut url, path.as_bytes(), bad.as_bytes());
        url
    }

    /// The first entry of `auth.conf` that apt would use for `uri`: without a scheme it is for https only.
    fn machine(&self, uri: &Uri) -> Option<&Machine> {
        self.machines.iter().find(|machine| {
            machine.scheme.as_deref().unwrap_or("https") == uri.scheme
                && machine.host.eq_ignore_ascii_case(&uri.host)
                && (machine.port.is_none() || machine.port == uri.port)
                && uri.path.starts_with(&machine.path)
        })
    }

    /// The proxy that apt's method would use for `uri`, `None` for a direct connection.
    pub fn proxy(&self, uri: &Uri) -> Option<String> {
        let listed = |list: &String| {
            let host = uri.host.to_ascii_lowercase();
            list.split(',').any(|end| !end.is_empty() && host.ends_with(&end.to_ascii_lowercase()))
        };
        if self.environment.no_proxy.as_ref().is_some_and(listed) {
            return None;
        }
        let configured = self
            .method_option(&uri.scheme, "Proxy", Some(&uri.host))
            .or_else(|| self.detected.get(&origin(uri)).map(String::as_str))
            .or_else(|| self.method_option(&uri.scheme, "Proxy", None));
        let environment = || {
            let https = self.environment.https_proxy.as_deref().filter(|_| uri.scheme == "https");
            https.or(self.environment.http_proxy.as_deref())
        };
        configured.or_else(environment).filter(|proxy| !proxy.eq_ignore_ascii_case("DIRECT")).map(str::to_owned)
    }

    /// `Acquire::SCHEME::KEY`, or that of one host; the https method falls back to the options of http.
    fn method_option(&self, scheme: &str, key: &str, host: Option<&str>) -> Option<&str> {
        let schemes: &[&str] = if scheme == "https" { &["https", "http"] } else { &["http"] };
        schemes.iter().find_map(|scheme| match (host, key) {
            (Some(host), "Proxy") => self.options.get(&format!("Acquire::{scheme}::Proxy::{host}")),
            (Some(host), _) => {
                let own = self.options.get(&format!("Acquire::{scheme}::{host}::{key}"));
                own.or_else(|| self.options.get(&format!("Acquire::{scheme}::{key}")))
            }
            (None, _) => self.options.get(&format!("Acquire::{scheme}::{key}")),
        })
    }

    /// Runs `Acquire::http::Proxy-Auto-Detect` once for each host, as apt does before its first connection. What does not
    /// answer in time is a problem, and the general proxy counts.
    fn detect_proxies(&mut self) {
        let deadline = Instant::now() + PROXY_DETECT_WAIT;
        let uris: Vec<Uri> = self.sources.sources.iter().map(|source| source.uri.clone()).collect();
        let mut asked = HashSet::new();
        for uri in uris {
            let of_scheme = |key: &str| self.options.get(&format!("Acquire::{}::{key}", uri.scheme)).map(str::to_owned);
            let Some(program) = of_scheme("Proxy-Auto-Detect").or_else(|| of_scheme("ProxyAutoDetect")) else {
                continue;
            };
            let specific = self.method_option(&uri.scheme, "Proxy", Some(&uri.host)).is_some();
            if specific || !asked.insert(origin(&uri)) {
                continue;
            }
            let wait = deadline.saturating_duration_since(Instant::now());
            match output(Command::new(&program).arg(uri.to_string()), wait) {
                Ok(answer) => {
                    let answer = String::from_utf8_lossy(&answer);
                    let proxy = answer.lines().next().unwrap_or_default().trim();
                    if proxy == "DIRECT" || ["http", "socks5h"].iter().any(|scheme| proxy.starts_with(scheme)) {
                        self.detected.insert(origin(&uri), proxy.to_owned());
                    }
                }
                Err(why) => self.sources.problems.push(format!("Proxy-Auto-Detect for {}: {why}; the general proxy is used", uri.host)),
            }
        }
    }
}

/// `scheme://host`, what a detected proxy is for.
fn origin(uri: &Uri) -> String {
    format!("{}://{}", uri.scheme, uri.host)
}

/// What is told of a file of credentials that says nothing reliable.
const ALL_PRIVATE: &str = "until that is mended every repository counts as private, and nothing is shared";

/// The machines of `auth.conf` and `auth.conf.d`, and whether there may be others: what cannot be read is a problem that names
/// the file.
fn machines(options: &Options, problems: &mut Vec<String>) -> (Vec<Machine>, bool) {
    let mut unknown = false;
    let mut problem = |text: String| {
        unknown = true;
        problems.push(format!("{text}; {ALL_PRIVATE}"));
    };
    let mut files: Vec<PathBuf> = options.path("Dir::Etc::netrc").into_iter().collect();
    if let Some(directory) = options.path("Dir::Etc::netrcparts") {
        match sources::parts(&directory, &["conf"]) {
            Ok(parts) => files.extend(parts),
            Err(source) => problem(format!("{}: cannot be listed: {source}", directory.display())),
        }
    }
    let mut machines = Vec::new();
    for file in files {
        match sources::read_bounded(&file) {
            Ok(text) => {
                if let Err(why) = parse_machines(&text, &mut machines) {
                    problem(format!("{}: {why}", file.display()));
                }
            }
            Err(source) if source.kind() == std::io::ErrorKind::NotFound => {}
            Err(source) => problem(format!("{}: cannot be read: {source}", file.display())),
        }
    }
    (machines, unknown)
}

/// Parses the netrc format: `machine [SCHEME://]HOST[:PORT][/PATH] login NAME password WORD`, on any lines.
///
/// What it does not know is an error: behind it there may be a machine that it has not seen.
fn parse_machines(text: &str, machines: &mut Vec<Machine>) -> Result<(), String> {
    let without_comments = text.lines().filter(|line| !line.trim_start().starts_with('#'));
    let mut words = without_comments.flat_map(str::split_ascii_whitespace);
    let mut of_this_file = false;
    while let Some(word) = words.next() {
        match (word, machines.last_mut().filter(|_| of_this_file)) {
            ("machine", _) => {
                let name = words.next().ok_or("it ends behind `machine`: write the host there")?;
                let full = if name.contains("://") { name.to_owned() } else { format!("https://{name}") };
                let uri = Uri::parse(&full);
                if uri.host.is_empty() {
                    return Err("a `machine` has no host: write it as [SCHEME://]HOST[:PORT][/PATH]".to_owned());
                }
                of_this_file = true;
                machines.push(Machine {
                    scheme: name.contains("://").then_some(uri.scheme),
                    host: uri.host,
                    port: uri.port,
                    path: if uri.path == "/" { String::new() } else { uri.path },
                    ..Machine::default()
                });
            }
            ("login", Some(machine)) => words.next().unwrap_or_default().clone_into(&mut machine.login),
            ("password", Some(machine)) => words.next().unwrap_or_default().clone_into(&mut machine.password),
            // Not quoted: it may be a part of a password.
            _ => return Err("it has a word that is none of `machine`, `login` and `password` where one of them must stand".to_owned()),
        }
    }
    Ok(())
}

/// What a command prints, if it ends with success within `wait`; it is killed otherwise.
fn output(command: &mut Command, wait: Duration) -> Result<Vec<u8>, String> {
    let name = command.get_program().to_owned();
    let name = Path::new(&name).file_name().unwrap_or(OsStr::new("command")).to_string_lossy().into_owned();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|source| format!("{name} cannot be started: {source}"))?;
    let stdout = child.stdout.take().expect("stdout was asked to be a pipe");
    let (sender, receiver) = mpsc::sync_channel(1);
    // A thread, since a pipe has no read with a deadline; it ends when the child's last holder of the pipe does.
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        let read = stdout.take(OUTPUT_BYTES_MAX).read_to_end(&mut bytes).map(|_| bytes);
        // The receiver is gone after a timeout: nobody wants the output then.
        drop(sender.send(read));
    });
    let answer = receiver.recv_timeout(wait);
    if answer.is_err() {
        // It may have ended by itself in between, which is as good.
        drop(child.kill());
    }
    let status = child.wait().map_err(|source| format!("{name}: {source}"))?;
    match answer {
        Err(_) => Err(format!("{name} did not answer within {} s", wait.as_secs())),
        Ok(Err(source)) => Err(format!("{name}: {source}")),
        Ok(Ok(_)) if !status.success() => Err(format!("{name} failed ({status}); run it by hand to see why")),
        Ok(Ok(bytes)) => Ok(bytes),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    /// A configuration from dump lines, `sources.list` and `auth.conf`, in a private directory.
    fn config(dump: &str, sources: &str, auth: &str, environment: Environment) -> AptConfig {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("sources.list"), sources).unwrap();
        std::fs::write(directory.path().join("auth.conf"), auth).unwrap();
        let root = directory.path().display();
        let all = format!("Dir {root}\nDir::Etc::sourcelist sources.list\nDir::Etc::netrc auth.conf\nAPT::Architecture amd64\n{dump}");
        AptConfig::of_options(Options::parse(&all), &[], environment)
    }

    fn of_dump(dump: &str) -> AptConfig {
        config(dump, "", "", Environment::default())
    }

    /// Values with spaces, quotes and line feeds are what breaks a parser of the plain dump.
    #[test]
    fn options_are_read_as_apt_writes_them() {
        let options = Options::parse("A::b x%20%22y%0az\nA::LIST \nA::LIST:: one\nA::LIST:: two\nWords a,b c\nEmpty \nOn yes\nOff 0\n");
        assert_eq!(options.get("a::B"), Some("x \"y\nz"));
        assert_eq!(options.list("a::list"), ["one", "two"]);
        assert_eq!(options.list("words"), ["a", "b", "c"]);
        assert_eq!(options.list("absent"), Vec::<String>::new());
        assert_eq!((options.get("Empty"), options.get("absent")), (None, None));
        assert!(options.truth("On", false) && !options.truth("Off", true) && options.truth("absent", true));
    }

    /// Another order of forms: a ghost that apt never asks for.
    #[test]
    fn children_keep_their_order() {
        let options = Options::parse("T \nT::xz xz\nT::Order \nT::Order:: gz\nT::bz2 bzip2\nT::xz again\nTx::no 1\n");
        assert_eq!(options.children("t"), ["xz", "order", "bz2"]);
        let dump = "Acquire::CompressionTypes \nAcquire::CompressionTypes::xz xz\nAcquire::CompressionTypes::gz gzip\n\
            Acquire::CompressionTypes::lz4 lz4\n";
        use Form::{Gzip, Lz4, Plain, Xz};
        assert_eq!(of_dump(dump).download_forms(), [Xz, Gzip, Lz4, Plain]);
        let first = |order: &str| of_dump(&format!("{dump}Acquire::CompressionTypes::Order:: {order}\n")).download_forms();
        assert_eq!(first("gz"), [Gzip, Xz, Lz4, Plain]);
        assert_eq!(first("uncompressed"), [Plain, Xz, Gzip, Lz4]);
    }

    /// A lists directory looked for at the wrong place.
    #[test]
    fn paths_are_joined_to_their_parents() {
        let check = |dump: &str, want: &str| assert_eq!(Options::parse(dump).path("Dir::State::lists"), Some(PathBuf::from(want)));
        check("Dir /\nDir::State var/lib/apt\nDir::State::lists lists/\n", "/var/lib/apt/lists/");
        check("Dir /\nDir::State /s/\nDir::State::lists lists\n", "/s/lists");
        check("Dir /\nDir::State::lists lists\n", "/lists");
        check("Dir /\nDir::State::lists /l\nRootDir /r/\n", "/r/l");
        check("Dir::State::lists ./here\n", "./here");
        assert_eq!(Options::parse("Dir /\n").path("Dir::State::lists"), None);
    }

    /// The wrong proxy: no mirror, or a request that was meant to stay inside.
    #[test]
    fn proxies_are_chosen_as_by_the_http_method() {
        let environment = Environment {
            http_proxy: Some("http://env:1".to_owned()),
            https_proxy: Some("http://envs:2".to_owned()),
            no_proxy: Some("localhost,.inner.example".to_owned()),
        };
        let check = |dump: &str, environment: &Environment, uri: &str, want: Option<&str>| {
            let proxy = config(dump, "", "", environment.clone()).proxy(&Uri::parse(uri));
            assert_eq!(proxy.as_deref(), want, "{dump:?} {uri}");
        };
        let none = Environment::default();
        check("", &none, "http://h/", None);
        check("Acquire::http::Proxy http://p:3\n", &none, "http://h/", Some("http://p:3"));
        check("Acquire::http::Proxy http://p:3\n", &none, "https://h/", Some("http://p:3"));
        check("Acquire::http::Proxy http://p:3\nAcquire::https::Proxy http://q\n", &none, "https://h/", Some("http://q"));
        check("Acquire::http::Proxy http://p:3\nAcquire::http::Proxy::h DIRECT\n", &none, "http://h/", None);
        check("Acquire::http::Proxy http://p:3\nAcquire::http::Proxy::h DIRECT\n", &none, "http://other/", Some("http://p:3"));
        check("Acquire::http::Proxy::h http://own\n", &none, "https://h/", Some("http://own"));
        check("Acquire::http::Proxy DIRECT\n", &environment, "http://h/", None);
        check("", &environment, "http://h/", Some("http://env:1"));
        check("", &environment, "https://h/", Some("http://envs:2"));
        check("Acquire::http::Proxy http://p:3\n", &environment, "http://h/", Some("http://p:3"));
        check("Acquire::http::Proxy http://p:3\n", &environment, "http://a.INNER.example/", None);
        check("", &environment, "http://localhost:80/", None);
    }

    /// A package of a private repository that leaves the machine; or a password sent to the wrong host.
    #[test]
    fn repositories_with_credentials_are_private() {
        let auth = "# machine commented.example login x password y\nmachine secret.example login me password pw\n\
                    machine http://plain.example:8080/repo\n login u\n password p:w\n";
        let config = config("Acquire::https::cert.example::SslCert /c.pem\n", "", auth, Environment::default())
            .with_private(&["url=named.example".parse().unwrap(), "url=http://h/inner/".parse().unwrap()]);
        let check = |uri: &str, private: bool, url: &str| {
            let uri = Uri::parse(uri);
            let named = config.is_named_private(&Place { repository: Some(&uri), ..Place::default() });
            assert_eq!(config.needs_credentials(&uri) || named, private, "{uri}");
            assert_eq!(config.file_url(&uri, "pool/a+b~1 c.deb"), format!("{url}pool/a%2bb%7e1%20c.deb"));
        };
        check("http://h/debian/", false, "http://h/debian/");
        check("http://user:word@h/debian/", true, "http://user:word@h/debian/");
        check("https://secret.example/x/", true, "https://me:pw@secret.example/x/");
        check("http://secret.example/x/", true, "http://secret.example/x/");
        check("http://plain.example:8080/repo/", true, "http://u:p%3aw@plain.example:8080/repo/");
        check("http://plain.example:8080/other/", true, "http://plain.example:8080/other/");
        check("http://commented.example/", false, "http://commented.example/");
        check("https://cert.example/", true, "https://cert.example/");
        check("http://cert.example/", false, "http://cert.example/");
        check("http://Named.example/", true, "http://Named.example/");
        check("http://h/inner/x/", true, "http://h/inner/x/");
        assert!(!format!("{config:?}").contains("pw"), "no password in a log");
    }

    /// A file of credentials that says nothing must not open what it protects.
    #[test]
    fn credentials_that_cannot_be_read_make_everything_private() {
        let directory = tempfile::tempdir().unwrap();
        let auth = directory.path().join("auth.conf");
        let parts = directory.path().join("auth.conf.d");
        std::fs::write(directory.path().join("sources.list"), "deb http://h/ s c\n").unwrap();
        let dump = format!(
            "Dir {}\nDir::Etc::sourcelist sources.list\nDir::Etc::netrc auth.conf\nDir::Etc::netrcparts auth.conf.d\nAPT::Architecture amd64\n",
            directory.path().display()
        );
        let check = |want: Option<&str>| {
            let config = AptConfig::of_options(Options::parse(&dump), &[], Environment::default());
            let private: Vec<bool> = config.targets().iter().map(|target| target.private).collect();
            assert_eq!(private, [want.is_some(); 2], "{want:?}");
            let problems = &config.sources().problems;
            match want {
                None => assert_eq!(problems, &Vec::<String>::new()),
                Some(want) => {
                    let [problem] = problems.as_slice() else { panic!("{problems:?}") };
                    assert!(problem.contains(want) && problem.ends_with(ALL_PRIVATE) && !problem.contains("pw"), "{problem}");
                }
            }
        };
        check(None);
        std::fs::write(&auth, "machine other.example login me password pw\n").unwrap();
        check(None);
        for (bad, want) in [
            (&b"machine"[..], "auth.conf: it ends behind `machine`"),
            (b"machine https:///x login a password pw", "auth.conf: a `machine` has no host"),
            (b"login me password pw", "auth.conf: it has a word that is none of"),
            (b"machine x login me password pw default login me", "auth.conf: it has a word that is none of"),
            (b"machine x login \xff password pw", "auth.conf: cannot be read: "),
        ] {
            std::fs::write(&auth, bad).unwrap();
            check(Some(want));
        }
        std::fs::remove_file(&auth).unwrap();
        std::fs::create_dir(&auth).unwrap();
        check(Some("auth.conf: cannot be read: "));
        std::fs::remove_dir(&auth).unwrap();
        std::fs::create_dir(&parts).unwrap();
        std::fs::write(parts.join("b.conf"), "password pw").unwrap();
        check(Some("b.conf: it has a word"));
        std::fs::remove_dir_all(&parts).unwrap();
        std::fs::write(&parts, "").unwrap();
        check(Some("auth.conf.d: cannot be listed: "));
    }

    /// apt looks at the forms in this order; another order reads a file that apt does not.
    #[test]
    fn forms_follow_the_configured_order() {
        use Form::{Bzip2, Gzip, Lz4, Lzma, Xz, Zstd};
        assert_eq!(of_dump("").forms(), [Zstd, Xz, Bzip2, Lzma, Gzip, Lz4]);
        let order =
            "Acquire::CompressionTypes::Order:: gz\nAcquire::CompressionTypes::Order:: nonsense\nAcquire::CompressionTypes::Order:: lz4\n";
        assert_eq!(of_dump(order).forms(), [Gzip, Lz4, Zstd, Xz, Bzip2, Lzma]);
    }

    /// A list that is expected under another name is never read.
    #[test]
    fn targets_are_those_of_apt() {
        let names = |dump: &str, sources: &str| -> Vec<String> {
            let targets = config(dump, sources, "", Environment::default()).targets();
            targets.into_iter().map(|target| format!("{} {} {}", target.name, target.inrelease_name, target.meta_key)).collect()
        };
        let foreign = "APT::Architectures:: amd64\nAPT::Architectures:: i386\n";
        let in_s =
            |architecture: &str| format!("h_dists_s_c_binary-{architecture}_Packages h_dists_s_InRelease c/binary-{architecture}/Packages");
        assert_eq!(names("", "deb http://h/ s c\ndeb http://h/ s c\n"), [in_s("amd64"), in_s("all")]);
        assert_eq!(names(foreign, "deb http://h/ s c\n"), [in_s("amd64"), in_s("i386"), in_s("all")]);
        assert_eq!(names(foreign, "deb [arch-=amd64,all arch+=arm64] http://h/ s c\n"), [in_s("i386"), in_s("arm64")]);
        assert_eq!(names("", "deb-src http://h/ s c\n"), ["h_dists_s_c_source_Sources h_dists_s_InRelease c/source/Sources"]);
        assert_eq!(names("", "deb http://h/ ./\n"), ["h_._Packages h_._InRelease Packages"]);
    }

    /// A detection program that hangs must not hang the start.
    #[test]
    fn commands_are_bounded() {
        let run = |script: &str, wait_s: u64| output(Command::new("sh").args(["-c", script]), Duration::from_secs(wait_s));
        assert_eq!(run("echo http://p:1", 60).unwrap(), b"http://p:1\n");
        assert_eq!(run("exec sleep 600", 0).unwrap_err(), "sh did not answer within 0 s");
        assert_eq!(run("exit 3", 60).unwrap_err(), "sh failed (exit status: 3); run it by hand to see why");
        let absent = output(&mut Command::new("/nonexistent/detect"), Duration::from_secs(60)).unwrap_err();
        assert!(absent.starts_with("detect cannot be started: "), "{absent}");
    }

    /// `Proxy-Auto-Detect` as apt runs it: with the URI, once, its first line; nothing means the general proxy.
    #[test]
    fn proxies_are_detected() {
        let directory = tempfile::tempdir().unwrap();
        let program = directory.path().join("detect");
        let check = |script: &str, want: Option<&str>| {
            std::fs::write(&program, format!("#!/bin/sh\n{script}\n")).unwrap();
            std::fs::set_permissions(&program, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
            let dump = format!("Acquire::http::Proxy-Auto-Detect {}\nAcquire::http::Proxy http://general\n", program.display());
            let mut config = config(&dump, "deb http://u:p@h/x s c\n", "", Environment::default());
            config.detect_proxies();
            assert_eq!(config.proxy(&config.sources.sources[0].uri).as_deref(), want, "{script}: {:?}", config.sources.problems);
        };
        check("test \"$1\" = http://h/x/ && echo 'http://found:1 '", Some("http://found:1"));
        check("echo DIRECT", None);
        check("true", Some("http://general"));
        check("echo ftp://other", Some("http://general"));
        check("exit 1", Some("http://general"));
    }
}
