//! The configuration: one TOML file, every key with a default.
//!
//! Read in two steps: the keys are checked against [`keys::SECTIONS`] by hand, so that an unknown one is answered with its line and
//! the nearest known key; then serde turns the values into types that cannot be wrong.

pub mod keys;

use crate::quiet::QuietHours;
use anyhow::{Context, Result, bail};
use keys::{Key, SECTIONS, Section};
use poolfs_core::Role;
use poolfs_core::catalog::private::Pattern;
use poolfs_core::catalog::{AptConfig, CatalogError};
use poolfs_net::fleet::wire::ZONE_BYTES_MAX;
use serde::{Deserialize, Deserializer, Serialize, de};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::ops::Range;
use std::path::{Path, PathBuf};
use toml::de::{DeTable, DeValue};

/// Where the file is looked for if nobody names one; it need not exist.
pub const DEFAULT_PATH: &str = "/etc/poolfs/poolfs.toml";

/// The whole configuration, each part for one subsystem.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The directories to mount over.
    #[serde(rename = "mount")]
    pub mounts: Vec<Mount>,
    /// Where poolfs keeps its own files.
    pub store: StoreConfig,
    /// How the commands reach the daemon.
    pub control: Control,
    /// What apt is configured to.
    pub apt: Apt,
    /// How the mounts behave.
    pub fs: Fs,
    /// How long the mirror may take.
    pub mirror: Mirror,
    /// Peers.
    pub net: Net,
    /// The machines that share out what the mirror is asked for.
    pub fleet: Fleet,
    /// The status page.
    pub status: Status,
    /// What is logged.
    pub log: Log,
    /// Where it was read.
    #[serde(skip)]
    pub origin: Origin,
}

/// The file of a configuration, if it has one.
#[derive(Clone, Debug, Default)]
pub struct Origin {
    /// Its path.
    pub file: Option<PathBuf>,
    /// What stands in it.
    pub table: toml::Table,
}

impl Origin {
    /// Every key with the value that holds, by section: the file's, else the default. Keys without either are left out.
    pub fn effective(&self) -> toml::Table {
        let mut all = toml::Table::new();
        for section in SECTIONS.iter().filter(|section| section.name != "mount") {
            let defaults: String =
                section.keys.iter().filter(|key| key.is_default).map(|key| format!("{} = {}\n", key.name, key.value)).collect();
            let mut table: toml::Table = defaults.parse().expect("the defaults are TOML");
            if let Some(toml::Value::Table(own)) = self.table.get(section.name) {
                table.extend(own.clone());
            }
            all.insert(section.name.to_owned(), toml::Value::Table(table));
        }
        let mounts = self.table.get("mount").cloned().unwrap_or_else(|| {
            let one = |mount: &Mount| {
                let pairs = [("role", mount.role.as_str().to_owned()), ("path", mount.path.display().to_string())];
                toml::Value::Table(pairs.into_iter().map(|(key, value)| (key.to_owned(), toml::Value::String(value))).collect())
            };
            toml::Value::Array(Config::default().mounts.iter().map(one).collect())
        });
        all.insert("mount".to_owned(), mounts);
        all
    }

    /// The keys, as `section.key`, that hold other values in `new`.
    pub fn changed(&self, new: &Self) -> Vec<String> {
        let (old, new) = (self.effective(), new.effective());
        let empty = toml::Table::new();
        let mut changed = Vec::new();
        for (section, before) in &old {
            let after = &new[section];
            if section == "mount" {
                changed.extend((before != after).then(|| section.clone()));
                continue;
            }
            let (before, after) = (before.as_table().unwrap_or(&empty), after.as_table().unwrap_or(&empty));
            let keys: std::collections::BTreeSet<_> = before.keys().chain(after.keys()).collect();
            changed.extend(keys.into_iter().filter(|key| before.get(*key) != after.get(*key)).map(|key| format!("{section}.{key}")));
        }
        changed
    }
}

/// One mounted directory.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mount {
    /// What the directory is to apt.
    pub role: Role,
    /// The directory; it is mounted over, and its files stay in it.
    pub path: PathBuf,
    /// Mount options as in fstab: `ro`, `browse`, `nosuid`, `nodev`.
    #[serde(default)]
    pub options: Vec<String>,
}

/// poolfs's own directories.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct StoreConfig {
    /// Holds `poolfs.db`.
    pub state_dir: PathBuf,
    /// Holds `objects/` and `incoming/`.
    pub cache_dir: PathBuf,
    /// Bytes that `objects/` may take.
    #[serde(deserialize_with = "byte_count")]
    pub quota: u64,
}

/// The control socket.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Control {
    /// A Unix socket that only root may use.
    pub socket: PathBuf,
}

/// apt's own configuration.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Apt {
    /// `sources.list` and `.sources` files or directories of them; empty: apt's own.
    pub sources: Vec<PathBuf>,
    /// A file to be used as `APT_CONFIG`; absent: apt's own.
    pub config: Option<PathBuf>,
    /// Repositories and packages whose files never leave this machine, as [`Pattern`]s.
    #[serde(deserialize_with = "patterns")]
    pub private: Vec<Pattern>,
    /// Files or URLs of advisories.
    #[serde(deserialize_with = "advisories")]
    pub advisories: Vec<String>,
    /// Whether what nothing fixes yet is kept from strangers too.
    pub advisories_unfixed: bool,
}

impl Apt {
    /// apt's configuration as it is now, with what is private.
    pub fn load(&self) -> Result<AptConfig, CatalogError> {
        Ok(AptConfig::load(&self.sources, self.config.as_deref())?.with_private(&self.private))
    }
}

/// The mounts.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Fs {
    /// Whether programs other than apt find packages in `archives/` that are not there yet.
    pub lazy_archives: bool,
    /// FUSE threads of each mount.
    pub threads: usize,
}

/// Patience with the mirror.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Mirror {
    /// Seconds until a connection must stand.
    pub connect_timeout_s: u64,
    /// Seconds from the request to the first byte of the answer.
    pub first_byte_timeout_s: u64,
    /// Seconds without a byte after which the connection is given up.
    pub stall_timeout_s: u64,
    /// A transfer slower than this is given up, in bytes a second.
    pub rate_min_bytes_s: u64,
}

/// Peers.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Net {
    /// One port for TCP (pieces) and UDP (KRPC).
    pub listen: SocketAddr,
    /// Nodes to join the DHT by, as `HOST:PORT`.
    #[serde(deserialize_with = "host_ports")]
    pub bootstrap: Vec<String>,
    /// DNS names that list nodes: `_poolfs._udp` SRV records, else addresses.
    pub seeds: Vec<String>,
    /// Whether the link's other nodes are looked for by multicast; absent: only on a private network, see [`Net::discovers_on`].
    pub discovery: Option<bool>,
    /// Whether addresses of the public internet are believed.
    pub network: Network,
    /// Which files the DHT is told of.
    pub announce: Announce,
    /// Who is asked for updates of security suites; absent: see [`Net::security_from`].
    pub security_from: Option<SecurityFrom>,
    /// Bytes a second given to addresses outside of this machine's own networks, all together; 0: nothing.
    #[serde(deserialize_with = "byte_count")]
    pub upload_bytes_s: u64,
    /// Answers under way to such addresses at once; more are told to come back.
    pub upload_slots: usize,
    /// When nothing is given to such addresses.
    pub quiet_hours: Vec<QuietHours>,
    /// Whether the connection is paid by the byte: then nothing is given to them either.
    pub metered: Metered,
    /// Whether nobody is spoken to who is on none of this machine's links. Mirrors are.
    pub lan_only: bool,
    /// Whether deltas are made, offered and used.
    pub deltas: Deltas,
    /// The most that a delta may have of its package, in hundredths.
    #[serde(deserialize_with = "percent")]
    pub delta_percent_max: u64,
    /// The most bytes that a delta may have.
    #[serde(deserialize_with = "byte_count")]
    pub delta_bytes_max: u64,
    /// When deltas are made.
    pub delta_priority: DeltaPriority,
}

/// Whether the connection is paid by the byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Metered {
    /// As NetworkManager says; without it: no.
    Auto,
    /// It is.
    Yes,
    /// It is not.
    No,
}

impl Net {
    /// Whether the link is to be told of this machine. On a public network, a hotel's say, only who wrote so wants that.
    pub fn discovers_on(&self, network: Network) -> bool {
        self.discovery.unwrap_or(network == Network::Private)
    }

    /// Who is asked for updates of security suites: strangers only where that was written, or where the network is private.
    pub fn security_from(&self) -> SecurityFrom {
        self.security_from.unwrap_or(match self.network {
            Network::Private => SecurityFrom::All,
            Network::Public => SecurityFrom::Fleet,
        })
    }
}

/// The fleet.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Fleet {
    /// A file with the key that its machines share: 32 bytes, or 64 hexadecimal digits. Absent: no fleet.
    pub key_file: Option<PathBuf>,
    /// DNS names that list members: `_poolfs._udp` SRV records, else addresses.
    pub seeds: Vec<String>,
    /// This machine's site; those of the same one are asked first.
    pub zone: String,
    /// One copy from the mirror for each zone, instead of one for all.
    pub zone_local: bool,
    /// Whether this machine announces its files outside of the fleet too.
    pub gateway: bool,
}

impl Fleet {
    /// Whether strangers are told what is here. A fleet whose key cannot be read is one all the same.
    pub fn announces_outside(&self) -> bool {
        self.gateway || self.key_file.is_none()
    }
}

/// Which of the files that may be shared are announced; at most 600, the newest and largest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Announce {
    /// Those over 512 KiB.
    Large,
    /// Every one.
    All,
    /// As `Large`, and the checked pieces of files that are still arriving.
    Pieces,
    /// None.
    None,
}

/// Who is asked for what a security suite has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SecurityFrom {
    /// The fleet and the mirror.
    Fleet,
    /// Everybody.
    All,
}

/// When a delta is used. Whoever uses them makes and offers them too.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Deltas {
    /// Where the package is expected sooner that way.
    Auto,
    /// Wherever there is one: fewest bytes.
    Always,
    /// Never, and none is made or offered: nobody learns which older versions were here.
    Off,
}

/// How much processor and disk the making of a delta may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DeltaPriority {
    /// What nobody else wants.
    Idle,
    /// As every other process: for machines that are never idle.
    Normal,
}

/// What kind of network the peers are on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Network {
    /// A LAN or a company's network: private addresses are believed, nobody else is asked.
    Private,
    /// The internet.
    Public,
}

impl From<Network> for poolfs_net::dht::Network {
    fn from(network: Network) -> Self {
        match network {
            Network::Private => Self::Private,
            Network::Public => Self::Public,
        }
    }
}

/// The status page and the metrics.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Status {
    /// A loopback address; `None`: neither is served.
    #[serde(deserialize_with = "loopback")]
    pub listen: Option<SocketAddr>,
}

/// Logging.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Log {
    /// `error`, `warn`, `info`, `debug`, `trace`, or directives as `poolfs_fs=debug,info`.
    pub level: String,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            mounts: vec![
                Mount { role: Role::Archives, path: "/var/cache/apt/archives".into(), options: Vec::new() },
                Mount { role: Role::Lists, path: "/var/lib/apt/lists".into(), options: Vec::new() },
            ],
            store: StoreConfig::default(),
            control: Control::default(),
            apt: Apt::default(),
            fs: Fs::default(),
            mirror: Mirror::default(),
            net: Net::default(),
            fleet: Fleet::default(),
            status: Status::default(),
            log: Log::default(),
            origin: Origin::default(),
        }
    }
}

impl Default for StoreConfig {
    fn default() -> Self {
        Self { state_dir: "/var/lib/poolfs".into(), cache_dir: "/var/cache/poolfs".into(), quota: 5 << 30 }
    }
}

impl Default for Control {
    fn default() -> Self {
        Self { socket: "/run/poolfs/control.sock".into() }
    }
}

impl Default for Fs {
    fn default() -> Self {
        Self { lazy_archives: true, threads: 2 }
    }
}

impl Default for Mirror {
    fn default() -> Self {
        Self { connect_timeout_s: 10, first_byte_timeout_s: 30, stall_timeout_s: 30, rate_min_bytes_s: 1024 }
    }
}

impl Default for Net {
    fn default() -> Self {
        Self {
            listen: SocketAddr::new(IpAddr::V6(Ipv6Addr::UNSPECIFIED), 9977),
            bootstrap: Vec::new(),
            seeds: Vec::new(),
            discovery: None,
            network: Network::Private,
            announce: Announce::Large,
            security_from: None,
            upload_bytes_s: 2_000_000,
            upload_slots: 8,
            quiet_hours: Vec::new(),
            metered: Metered::Auto,
            lan_only: false,
            deltas: Deltas::Auto,
            delta_percent_max: 50,
            delta_bytes_max: 64 << 20,
            delta_priority: DeltaPriority::Idle,
        }
    }
}

impl Default for Status {
    fn default() -> Self {
        Self { listen: Some(SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 9978)) }
    }
}

impl Default for Log {
    fn default() -> Self {
        Self { level: "info".into() }
    }
}

impl Config {
    /// Reads the file at `path`; without one, [`DEFAULT_PATH`] if it exists, else the built-in defaults.
    pub fn load(path: Option<&Path>) -> Result<Self> {
        let (path, required) = path.map_or((Path::new(DEFAULT_PATH), false), |path| (path, true));
        match std::fs::read_to_string(path) {
            Ok(text) => {
                let mut config = Self::parse(&text).map_err(|problem| anyhow::anyhow!("{}:{problem}", path.display()))?;
                config.origin.file = Some(std::path::absolute(path)?);
                config.origin.table = text.parse().with_context(|| format!("read configuration {}", path.display()))?;
                Ok(config)
            }
            Err(err) if err.kind() == std::io::ErrorKind::NotFound && !required => Ok(Self::default()),
            Err(err) => Err(err).with_context(|| format!("read configuration {}", path.display())),
        }
    }

    /// Parses and checks the text. An error begins with the line number.
    pub fn parse(text: &str) -> Result<Self> {
        let line = |span: Option<Range<usize>>| span.map_or(1, |span| text[..span.start.min(text.len())].matches('\n').count() + 1);
        let table = DeTable::parse(text).map_err(|err| anyhow::anyhow!("{}: {}", line(err.span()), err.message()))?;
        check_keys(table.get_ref(), &|span| line(Some(span)))?;
        // A number that only a wider type holds could not be shown or compared again.
        let again = text.parse::<toml::Table>();
        again.map_err(|err| anyhow::anyhow!("{}: {}; a number is at most {}", line(err.span()), err.message().trim_end(), i64::MAX))?;
        let config: Self = toml::from_str(text).map_err(|err| anyhow::anyhow!("{}: {}", line(err.span()), err.message().trim_end()))?;
        config.check().map_err(|err| anyhow::anyhow!("1: {err}"))?;
        Ok(config)
    }

    fn check(&self) -> Result<()> {
        if self.mounts.is_empty() {
            bail!("no [[mount]] is configured: leave the section out for apt's two directories, or name at least one");
        }
        for (index, mount) in self.mounts.iter().enumerate() {
            if !mount.path.is_absolute() {
                bail!("mount path {} is not absolute: write it from /", mount.path.display());
            }
            if self.mounts[..index].iter().any(|other| other.path == mount.path) {
                bail!("mount path {} is configured twice: remove one [[mount]]", mount.path.display());
            }
            if self.mounts[..index].iter().any(|other| other.role == mount.role) {
                bail!(
                    "role {} is configured twice: remove one [[mount]], or give it to a daemon with a configuration of its own",
                    mount.role
                );
            }
        }
        for (name, path) in [
            ("store.state_dir", &self.store.state_dir),
            ("store.cache_dir", &self.store.cache_dir),
            ("control.socket", &self.control.socket),
        ] {
            if !path.is_absolute() {
                bail!("{name} = {} is not absolute: write it from /", path.display());
            }
            if let Some(mount) = self.mounts.iter().find(|mount| path.starts_with(&mount.path)) {
                bail!("{name} = {} lies below the mount {}: choose a directory outside of it", path.display(), mount.path.display());
            }
        }
        if self.net.lan_only && self.net.network == Network::Public {
            bail!("net.lan_only = true and net.network = \"public\" exclude each other: leave one of them out");
        }
        if self.fleet.zone.len() > ZONE_BYTES_MAX {
            bail!("fleet.zone = \"{}\" is longer than {ZONE_BYTES_MAX} bytes: choose a shorter name", self.fleet.zone);
        }
        if self.fs.threads == 0 || self.fs.threads > 64 {
            bail!("fs.threads = {} is not within 1 to 64", self.fs.threads);
        }
        Ok(())
    }
}

/// Refuses keys that are not in [`SECTIONS`], with the nearest one that is.
fn check_keys(root: &DeTable<'_>, line: &dyn Fn(Range<usize>) -> usize) -> Result<()> {
    for (section, value) in root {
        let name = section.get_ref().as_ref();
        let Some(Section { keys, .. }) = SECTIONS.iter().find(|known| known.name == name) else {
            // A key may have been written without its section: then that is the nearest.
            let qualified: Vec<String> =
                SECTIONS.iter().flat_map(|section| section.keys.iter().map(|key| format!("{}.{}", section.name, key.name))).collect();
            let hint = qualified.iter().find(|known| known.ends_with(&format!(".{name}"))).map_or_else(
                || nearest(name, SECTIONS.iter().map(|known| known.name)).map(|known| format!("[{known}]")),
                |known| Some(known.clone()),
            );
            bail!("{}: unknown section or key `{name}`{}", line(section.span()), did_you_mean(hint));
        };
        let tables: Vec<&DeTable<'_>> = match value.get_ref() {
            DeValue::Table(table) => vec![table],
            DeValue::Array(items) => items.iter().filter_map(|item| item.get_ref().as_table()).collect(),
            _ => bail!("{}: `{name}` is a section: write [{name}] on a line of its own", line(section.span())),
        };
        for key in tables.into_iter().flat_map(|table| table.keys()) {
            let names = || keys.iter().map(|key: &Key| key.name);
            if !names().any(|known| known == key.get_ref().as_ref()) {
                let hint = nearest(key.get_ref(), names()).map(|known| format!("`{known}`"));
                bail!("{}: unknown key `{}` in [{name}]{}", line(key.span()), key.get_ref(), did_you_mean(hint));
            }
        }
    }
    Ok(())
}

fn did_you_mean(hint: Option<String>) -> String {
    hint.map_or_else(String::new, |hint| format!(", did you mean {hint}?"))
}

fn nearest<'known>(word: &str, known: impl Iterator<Item = &'known str>) -> Option<&'known str> {
    known.map(|known| (strsim::jaro_winkler(word, known), known)).max_by(|a, b| a.0.total_cmp(&b.0)).map(|(_, known)| known)
}

/// A part, in hundredths.
fn percent<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    let number = u64::deserialize(deserializer)?;
    if (1..=100).contains(&number) { Ok(number) } else { Err(de::Error::custom(format!("{number} is not within 1 to 100"))) }
}

/// A byte count as a number or as `"5 GiB"`, `"500MB"`.
fn byte_count<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged, expecting = "expected bytes as a number or as a text like \"5 GiB\"")]
    enum Raw {
        Number(u64),
        Text(String),
    }
    match Raw::deserialize(deserializer)? {
        Raw::Number(bytes) => Ok(bytes),
        Raw::Text(text) => parse_bytes(&text)
            .ok_or_else(|| de::Error::custom(format!("`{text}` is no size: write bytes as a number or as \"5 GiB\", \"500 MB\""))),
    }
}

fn parse_bytes(text: &str) -> Option<u64> {
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let factor: u64 = match unit.trim() {
        "" | "B" => 1,
        "kB" | "KB" => 1_000,
        "MB" => 1_000_000,
        "GB" => 1_000_000_000,
        "TB" => 1_000_000_000_000,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        "TiB" => 1 << 40,
        _ => return None,
    };
    number.parse::<u64>().ok()?.checked_mul(factor)
}

fn patterns<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<Pattern>, D::Error> {
    Vec::<String>::deserialize(deserializer)?.iter().map(|text| text.parse().map_err(de::Error::custom)).collect()
}

fn advisories<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    let all = Vec::<String>::deserialize(deserializer)?;
    match all.iter().find(|one| !one.starts_with('/') && !crate::advisories::is_url(one)) {
        Some(one) => Err(de::Error::custom(format!("`{one}` is neither a path from / nor an http: or https: URL"))),
        None => Ok(all),
    }
}

fn loopback<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<SocketAddr>, D::Error> {
    let text = String::deserialize(deserializer)?;
    if text.is_empty() {
        return Ok(None);
    }
    match text.parse::<SocketAddr>() {
        Ok(address) if address.ip().is_loopback() => Ok(Some(address)),
        Ok(_) => Err(de::Error::custom(format!(
            "`{text}` is not loopback: the page has no password; from elsewhere reach it through `ssh -L 9978:localhost:9978 HOST`"
        ))),
        Err(_) => Err(de::Error::custom(format!("`{text}` is no address: write \"127.0.0.1:9978\", or \"\" for no page"))),
    }
}

fn host_ports<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    let all = Vec::<String>::deserialize(deserializer)?;
    for one in &all {
        let good = one.rsplit_once(':').is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok_and(|port| port > 0));
        if !good {
            return Err(de::Error::custom(format!("`{one}` is not HOST:PORT")));
        }
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problem(text: &str) -> String {
        Config::parse(text).expect_err("a mistake must be found").to_string()
    }

    /// An administrator must find the line and the remedy, not a backtrace.
    #[test]
    fn mistakes_are_named_with_line_and_remedy() {
        let check = |text: &str, want: &str| assert_eq!(problem(text), want, "{text}");
        check("[store]\nquotta = 5\n", "2: unknown key `quotta` in [store], did you mean `quota`?");
        check("\n[stor]\n", "2: unknown section or key `stor`, did you mean [store]?");
        check("listen = \"[::]:1\"\n", "1: unknown section or key `listen`, did you mean net.listen?");
        check("store = 5\n", "1: `store` is a section: write [store] on a line of its own");
        check("[store]\nquota = \"5 apples\"\n", "2: `5 apples` is no size: write bytes as a number or as \"5 GiB\", \"500 MB\"");
        check("[[mount]]\nrole = \"archive\"\npath = \"/x\"\n", "2: unknown variant `archive`, expected `archives` or `lists`");
        check(
            "[apt]\nprivate = [\"repo.example\"]\n",
            "2: `repo.example` is no pattern: write origin=, suite=, component=, url= or package= before what is meant",
        );
        check("[apt]\nadvisories = [\"json\"]\n", "2: `json` is neither a path from / nor an http: or https: URL");
        check("[net]\nbootstrap = [\"host\"]\n", "2: `host` is not HOST:PORT");
        check(
            "[net]\nquiet_hours = [\"22-6\"]\n",
            "2: `22-6` are no hours: write \"22:00-06:00\", \"Mon-Fri 08:00-18:00\", or \"00:00-24:00\" for all day",
        );
        check("[net]\nmetered = \"maybe\"\n", "2: unknown variant `maybe`, expected one of `auto`, `yes`, `no`");
        check(
            "[net]\nlan_only = true\nnetwork = \"public\"\n",
            "1: net.lan_only = true and net.network = \"public\" exclude each other: leave one of them out",
        );
        check(
            "[status]\nlisten = \"0.0.0.0:80\"\n",
            "2: `0.0.0.0:80` is not loopback: the page has no password; from elsewhere reach it through `ssh -L 9978:localhost:9978 HOST`",
        );
        check("[status]\nlisten = \"9978\"\n", "2: `9978` is no address: write \"127.0.0.1:9978\", or \"\" for no page");
        check("mount = []\n", "1: no [[mount]] is configured: leave the section out for apt's two directories, or name at least one");
        check("[[mount]]\nrole = \"lists\"\npath = \"x\"\n", "1: mount path x is not absolute: write it from /");
        check(
            "[store]\nstate_dir = \"/var/lib/apt/lists/poolfs\"\n",
            "1: store.state_dir = /var/lib/apt/lists/poolfs lies below the mount /var/lib/apt/lists: choose a directory outside of it",
        );
        let zone = "z".repeat(33);
        check(
            &format!("[fleet]\nzone = \"{zone}\"\n"),
            &format!("1: fleet.zone = \"{zone}\" is longer than 32 bytes: choose a shorter name"),
        );
        assert!(problem("[net]\nlisten = \"nowhere\"\n").starts_with("2: "));
        assert!(problem("[store\n").starts_with("1: "));
    }

    /// Sizes are where a factor of a thousand is lost.
    #[test]
    fn sizes() {
        let check = |text: &str, want: Option<u64>| assert_eq!(parse_bytes(text), want, "{text}");
        check("0", Some(0));
        check("17", Some(17));
        check("5 GiB", Some(5 << 30));
        check("500MB", Some(500_000_000));
        check("99999999999999999999", None);
        check("18446744073709551615 KiB", None);
        check("-1", None);
        check("1.5 GB", None);
        check("", None);
    }

    /// The defaults are what `scripts/up` runs with.
    #[test]
    fn an_empty_file_is_the_defaults() {
        let config = Config::parse("").expect("nothing is wrong with nothing");
        assert_eq!(config.mounts, Config::default().mounts);
        assert_eq!(config.store.quota, 5 << 30);
        assert_eq!(config.net.network, Network::Private);
    }

    /// On a public network nobody on the link is told of this machine unless its owner wrote so.
    #[test]
    fn the_link_is_greeted_on_private_networks() {
        let check = |text: &str, want: bool| {
            let net = Config::parse(text).expect("nothing is wrong with it").net;
            assert_eq!(net.discovers_on(net.network), want, "{text}");
        };
        check("", true);
        check("[net]\nnetwork = \"public\"\n", false);
        check("[net]\nnetwork = \"public\"\ndiscovery = true\n", true);
        check("[net]\ndiscovery = false\n", false);
    }

    /// What the README shows as the defaults is copied by people: it must parse and be the defaults, and name every key.
    #[test]
    fn the_readme_shows_the_defaults() {
        let readme = include_str!("../README.md");
        let text = readme.split("```toml\n").nth(1).and_then(|rest| rest.split("```").next()).expect("the README has a TOML block");
        let shown = Config::parse(text).expect("the README's configuration is right");
        assert_eq!(format!("{shown:?}"), format!("{:?}", Config::default()));
        for section in SECTIONS {
            let keys = section.keys.iter().filter(|key| !(section.name == "mount" && key.name == "options"));
            keys.for_each(|key| assert!(text.contains(&format!("{} = ", key.name)), "{}.{}", section.name, key.name));
        }
    }

    /// The table of keys and the types must name the same keys: a key in one alone is either refused or never checked.
    #[test]
    fn every_known_key_is_accepted() {
        let text = r#"
            [[mount]]
            role = "archives"
            path = "/a"
            options = ["ro"]
            [store]
            state_dir = "/s"
            cache_dir = "/c"
            quota = "1 GiB"
            [control]
            socket = "/k"
            [apt]
            sources = ["/x"]
            config = "/y"
            private = ["origin=ACME,package=acme-*"]
            advisories = ["/z", "https://example.org/json"]
            advisories_unfixed = true
            [fs]
            lazy_archives = false
            threads = 3
            [mirror]
            connect_timeout_s = 1
            first_byte_timeout_s = 1
            stall_timeout_s = 1
            rate_min_bytes_s = 1
            [net]
            listen = "127.0.0.1:1"
            bootstrap = ["host:1"]
            seeds = ["seed.example.org"]
            discovery = false
            network = "private"
            announce = "pieces"
            security_from = "fleet"
            upload_bytes_s = "1 MB"
            upload_slots = 4
            quiet_hours = ["Mon-Fri 08:00-18:00"]
            metered = "no"
            lan_only = true
            deltas = "always"
            delta_percent_max = 90
            delta_bytes_max = "1 MB"
            delta_priority = "normal"
            [status]
            listen = "[::1]:1"
            [fleet]
            key_file = "/f"
            seeds = ["fleet.example.org"]
            zone = "rack 1"
            zone_local = true
            gateway = true
            [log]
            level = "debug"
        "#;
        Config::parse(text).expect("each key stands in both");
        for section in SECTIONS {
            assert!(text.contains(&format!("[{}]", section.name)), "{}", section.name);
            section.keys.iter().for_each(|key| assert!(text.contains(&format!("{} = ", key.name)), "{}.{}", section.name, key.name));
        }
    }

    /// Who takes the `#` away must get what holds without the line: another default here would change a machine in silence.
    #[test]
    fn the_annotated_file_is_the_defaults() {
        let all = keys::annotated();
        assert_eq!(format!("{:?}", Config::parse(&all).expect("comments only")), format!("{:?}", Config::default()));
        let is_setting = |line: &&str| line.starts_with('#') && !line.starts_with("# ") && *line != "#";
        let set: String = all.lines().filter(is_setting).map(|line| format!("{}\n", &line[1..])).collect();
        assert_eq!(format!("{:?}", Config::parse(&set).expect("the defaults are right")), format!("{:?}", Config::default()));
        // With the examples too, it is still a configuration.
        let is_example = |line: &&str| line.starts_with("# ") && line.contains(" = ") && line.split(' ').nth(2) == Some("=");
        let examples = all.lines().filter(|line| is_setting(line) || is_example(line)).map(|line| line.trim_start_matches(['#', ' ']));
        let examples: String = examples.map(|line| format!("{line}\n")).collect();
        Config::parse(&examples).expect("the examples are right");
        for section in SECTIONS {
            for key in section.keys {
                assert!(examples.lines().any(|line| line == format!("{} = {}", key.name, key.value)), "{}.{}", section.name, key.name);
            }
        }
        assert!(all.lines().all(|line| line.len() <= 140), "too wide");
        for key in keys::RELOADED.iter() {
            let (section, name) = key.split_once('.').expect("a dot");
            assert!(SECTIONS.iter().any(|known| known.name == section && known.keys.iter().any(|key| key.name == name)), "{key}");
        }
    }

    /// A reload that misses a change leaves the administrator with the old value and no word.
    #[test]
    fn changes_are_found() {
        let origin = |text: &str| Origin { file: None, table: text.parse().expect("TOML") };
        let check = |old: &str, new: &str, want: &[&str]| assert_eq!(origin(old).changed(&origin(new)), want, "{old:?} to {new:?}");
        check("", "", &[]);
        check("", "[store]\nquota = \"5 GiB\"\n", &[]);
        check("", "[store]\nquota = \"6 GiB\"\n[log]\nlevel = \"debug\"\n", &["log.level", "store.quota"]);
        check("[net]\ndiscovery = true\n", "", &["net.discovery"]);
        check("", "[[mount]]\nrole = \"lists\"\npath = \"/x\"\n", &["mount"]);
    }
}
