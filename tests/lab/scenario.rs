//! Scenarios as they are written down: one TOML file each, in `tests/lab/scenarios`.
//!
//! A file says which machines there are, what they install, what is done, and what is wanted of the figures. Unknown keys are
//! errors, and so is a goal for a figure that the scenario does not give.

use crate::harness::Package;
use crate::harness::crowd::Link;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// One scenario.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Scenario {
    /// The file's name.
    #[serde(skip)]
    pub(crate) name: String,
    /// One line for people.
    pub(crate) about: String,
    #[serde(default)]
    pub(crate) machines: Machines,
    #[serde(default)]
    pub(crate) packages: Packages,
    /// What is done.
    pub(crate) work: Work,
    #[serde(default, rename = "goal")]
    pub(crate) goals: Vec<Goal>,
}

/// The machines.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Machines {
    /// Those that are looked at; they have nothing at the start.
    pub(crate) count: usize,
    /// Neighbours that have all packages before.
    pub(crate) warm: usize,
    /// Neighbours that have nothing and install nothing.
    pub(crate) idle: usize,
    /// Nodes of the DHT that mount nothing.
    pub(crate) nodes: usize,
    /// They share a fleet key.
    pub(crate) fleet: bool,
    /// Each machine's link.
    pub(crate) link: Link,
    /// The mirror's link, in Mbit/s.
    pub(crate) mirror_mbit: Option<u32>,
    /// Lines for `[net]` of poolfs and the sections after it.
    pub(crate) poolfs_toml: String,
}

/// What there is to install: the kinds add up.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Packages {
    /// 89 packages of so many MB in all, 66 of them of one piece: what an upgrade brings.
    pub(crate) plan_mb: Option<u32>,
    /// So many packages with the sizes of bookworm's.
    pub(crate) bookworm: u32,
    /// One package of so many MB.
    pub(crate) large_mb: Option<u32>,
    /// Packages of these payloads, in bytes.
    pub(crate) bytes: Vec<usize>,
    /// The same with names.
    pub(crate) named: BTreeMap<String, usize>,
    /// So many real packages of which bookworm-security has a newer version: the machines have the older ones.
    pub(crate) pairs: usize,
}

/// What is done.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) enum Work {
    /// Every machine installs everything.
    Install(Install),
    /// A cold machine reads one large file that its neighbours have.
    Read(Read),
    /// A cold machine installs everything as many packages, then the same bytes as one.
    ManyAndOne {},
    /// One machine that has everything does it all again, with poolfs and without.
    Here { runs: usize },
    /// One machine installs what nobody has, with poolfs and without; other packages in each run.
    Nobody { runs: usize },
    /// Every machine goes from older versions to newer ones.
    Upgrade {},
    /// One machine updates after another.
    Update(Update),
    /// Named commands on named machines, one after the other.
    Steps { step: Vec<Step> },
    /// Daemons that mount nothing, many of them.
    Nodes(Nodes),
    /// What a daemon takes of the machine: idle, and while its packages arrive.
    Cost { idle_s: u64 },
    /// A user lists and reads while strangers flood his machine.
    Flood(Flood),
}

/// See [`Work::Flood`].
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Flood {
    /// Queries of the DHT in a second.
    pub(crate) datagrams_s: u32,
    /// Connections that send a byte a second.
    pub(crate) connections: usize,
    /// How often each thing is done, in calm and under the flood.
    pub(crate) runs: usize,
}

/// See [`Work::Install`].
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Install {
    /// Between the starts of two machines; 0: all at once.
    pub(crate) stagger_s: u64,
    /// One machine without poolfs does it alone before, to compare with.
    pub(crate) alone: bool,
    /// Whoever does the same on as many machines with the same links.
    pub(crate) rivals: Vec<Rival>,
    /// What happens meanwhile.
    pub(crate) event: Vec<Event>,
}

/// How packages come to machines today.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Rival {
    /// From the mirror to each.
    Plain,
    /// Debian's caching proxy on the first machine, which the others ask.
    AptCacherNg,
}

/// Something that happens when the mirror has given that much of a copy to all machines together.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Event {
    pub(crate) at_percent: u64,
    pub(crate) what: Happening,
}

/// See [`Event`].
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Happening {
    /// The last machine's daemon is killed and its plug pulled.
    MachineLeaves,
    /// The mirror answers 503 to whoever asks for a package.
    MirrorFails,
    /// The second half of the machines and the first do not hear each other.
    FleetParts,
    /// They do again.
    FleetMeets,
}

/// See [`Work::Read`].
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Read {
    /// Cold machines, one after the other; the figures are medians.
    pub(crate) runs: usize,
    /// Also over plain TCP and by BitTorrent: nginx and curl, aria2, libtorrent, btfs.
    pub(crate) rivals: bool,
    /// Once more with the last neighbour behind a link of so many Mbit/s.
    pub(crate) slow_mbit: Option<u32>,
}

/// See [`Work::Update`].
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Update {
    /// The lists of the lab's own packages.
    Own,
    /// Those of the real archive, beside a machine without poolfs.
    Debian,
}

/// One command of [`Work::Steps`], on these machines one after the other.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Step {
    pub(crate) machines: Vec<usize>,
    /// `apt-get update`.
    pub(crate) update: bool,
    /// `apt-get install -d` of these; `*`: of all.
    pub(crate) install: Vec<String>,
    /// One `apt-get install -d` for each.
    pub(crate) one_by_one: bool,
    /// `archives/` is emptied before each command.
    pub(crate) clean: bool,
    /// apt must fail.
    pub(crate) fails: bool,
}

/// See [`Work::Nodes`].
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Nodes {
    pub(crate) count: usize,
    /// They are of one fleet.
    pub(crate) fleet: bool,
    /// Share of them that dies before anything is asked.
    pub(crate) dead_percent: usize,
    /// Lookups of a key that one machine announces.
    pub(crate) lookups: usize,
}

/// What is wanted of a figure.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Goal {
    pub(crate) figure: String,
    pub(crate) at_most: Option<f64>,
    pub(crate) at_least: Option<f64>,
    /// Past this it has got worse than it was: `scripts/bench all` fails.
    pub(crate) fails_at: Option<f64>,
}

fn directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/lab/scenarios")
}

/// All scenarios, by name.
pub(crate) fn all() -> Vec<Scenario> {
    let files = fs::read_dir(directory()).unwrap_or_else(|error| panic!("read {}: {error}", directory().display()));
    let mut names: Vec<String> = files
        .filter_map(|file| Some(file.ok()?.file_name().to_str()?.strip_suffix(".toml")?.to_owned()))
        .filter(|name| !name.starts_with('.'))
        .collect();
    names.sort();
    names.iter().map(|name| load(name, &[]).unwrap_or_else(|error| panic!("{error}"))).collect()
}

/// One scenario, with values in place of those in its file: `KEY.KEY=VALUE`, as TOML.
pub(crate) fn load(name: &str, instead: &[String]) -> Result<Scenario, String> {
    let path = directory().join(format!("{name}.toml"));
    if name.contains('/') || !path.exists() {
        return Err(format!("no scenario is called {name}: see `scripts/lab list`"));
    }
    let text = fs::read_to_string(&path).map_err(|error| format!("{}: {error}", path.display()))?;
    let mut table: toml::Table = text.parse().map_err(|error| format!("{}: {error}", path.display()))?;
    for one in instead {
        let typed: toml::Table = one.parse().map_err(|error| format!("--set {one}: {error}"))?;
        merge(&mut table, typed);
    }
    let mut scenario: Scenario = toml::Value::Table(table).try_into().map_err(|error| format!("{}: {error}", path.display()))?;
    name.clone_into(&mut scenario.name);
    Ok(scenario)
}

fn merge(into: &mut toml::Table, from: toml::Table) {
    for (key, value) in from {
        match (into.get_mut(&key), value) {
            (Some(toml::Value::Table(there)), toml::Value::Table(new)) => merge(there, new),
            (_, value) => {
                into.insert(key, value);
            }
        }
    }
}

impl Packages {
    /// What the repository gets.
    pub(crate) fn build(&self) -> Vec<Package> {
        let mut packages = Vec::new();
        packages.extend(self.plan_mb.into_iter().flat_map(plan));
        let sizes = bookworm_sizes(self.bookworm);
        packages.extend(sizes.into_iter().zip(0..).map(|(size, n)| Package::new(&format!("mix{n:03}"), "1.0", size)));
        packages.extend(self.large_mb.map(|mb| Package::new("large", "1.0", mb as usize * 1_000_000)));
        packages.extend(self.bytes.iter().zip(0..).map(|(size, n)| Package::new(&format!("some{n:02}"), "1.0", *size)));
        packages.extend(self.named.iter().map(|(name, size)| Package::new(name, "1.0", *size)));
        packages
    }
}

/// 66 packages of one piece, 23 of several: together so many MB.
fn plan(mb: u32) -> Vec<Package> {
    let small: Vec<usize> = (0..66).map(|n| 2_000 + n * 1_700).collect();
    let left = mb as usize * 1_000_000 - small.iter().sum::<usize>();
    // As 700 KB and 430 KB more each time are to 125 MB.
    let weights: Vec<usize> = (0..23).map(|n| 700 + n * 430).collect();
    let all: usize = weights.iter().sum();
    let large = weights.iter().zip(0..).map(|(weight, n)| Package::new(&format!("large{n:02}"), "1.0", left * weight / all));
    let small = small.iter().zip(0..).map(|(size, n)| Package::new(&format!("small{n:02}"), "1.0", *size));
    small.chain(large).collect()
}

/// Sizes as bookworm's packages have them: median 59 KB, 18.5 % over 512 KiB; the largest are cut at 64 MB.
pub(crate) fn bookworm_sizes(count: u32) -> Vec<usize> {
    let points = [(0.0, 1.0e3_f64), (0.05, 2.0e3), (0.5, 59.0e3), (0.815, 524_288.0), (0.95, 4.0e6), (1.0, 64.0e6)];
    let size = |at: u32| {
        let share = (f64::from(at) + 0.5) / f64::from(count);
        let pair = points.windows(2).find(|pair| share <= pair[1].0).unwrap();
        let along = (share - pair[0].0) / (pair[1].0 - pair[0].0);
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a positive size that fits")]
        let bytes = (pair[0].1.ln() + along * (pair[1].1.ln() - pair[0].1.ln())).exp() as usize;
        bytes
    };
    (0..count).map(size).collect()
}
