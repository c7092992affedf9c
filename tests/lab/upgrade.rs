//! Release day: every machine has the packages of bookworm and goes to those of bookworm-security, real ones.

use super::install::at_once;
use super::outcome::{Figure, Outcome};
use super::scenario::Scenario;
use super::{contender, crowd, is_package, limit, line_of, up};
use crate::harness::machine::Machine;
use crate::harness::run;
use crate::harness::upstream::Upstream;
use poolfs_core::discretion::compare;
use std::cmp::Ordering;
use std::collections::HashMap;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

/// Longer than it takes to make one of these deltas; only turns a hang into a message.
const ONE_DELTA: Duration = Duration::from_secs(60);

/// Packages that are worth a delta and that a lab can make ones of in a minute, in bytes.
const SIZES: std::ops::Range<u64> = 200_000..3_000_000;

/// One package's version in an index.
#[derive(Clone, Debug)]
struct Version {
    source: String,
    version: String,
    filename: String,
    bytes: u64,
}

/// `count` packages with an older and a newer version, each of another source, the same ones as long as the archive is the same.
fn pairs(count: usize) -> (Vec<PathBuf>, Vec<PathBuf>) {
    let upstream = Upstream::new();
    let index = |archive: &str, suite: &str| {
        let path = format!("/{archive}/dists/{suite}/main/binary-amd64/Packages.xz");
        upstream.have(&path);
        let text = run(Command::new("xz").arg("-dc").arg(upstream.kept.join(&path[1..]))).ok().out;
        text.split("\n\n").filter_map(version).collect::<HashMap<_, _>>()
    };
    let (old, new) = (index("debian", "bookworm"), index("debian-security", "bookworm-security"));
    let mut both: Vec<(&Version, &Version)> = new
        .iter()
        .filter_map(|(name, new)| Some((old.get(name)?, new)))
        // A point release may be newer than what the security suite still has.
        .filter(|(old, new)| compare(&old.version, &new.version) == Some(Ordering::Less))
        .filter(|(old, new)| SIZES.contains(&old.bytes) && SIZES.contains(&new.bytes))
        .collect();
    both.sort_by(|a, b| (&a.1.source, &a.1.filename).cmp(&(&b.1.source, &b.1.filename)));
    // A hundred languages of one program are a hundred packages, but no machine has them all.
    both.dedup_by(|a, b| a.1.source == b.1.source);
    assert!(both.len() >= count, "bookworm-security has {} sources with a package of that size", both.len());
    let step = both.len() / count;
    let place = |archive: &str, version: &Version| {
        let path = format!("/{archive}/{}", version.filename);
        upstream.have(&path);
        upstream.kept.join(&path[1..])
    };
    both.into_iter().step_by(step).take(count).map(|(old, new)| (place("debian", old), place("debian-security", new))).unzip()
}

fn version(stanza: &str) -> Option<(String, Version)> {
    let field = |name: &str| stanza.lines().find_map(|line| Some(line.strip_prefix(name)?.strip_prefix(": ")?.to_owned()));
    let package = field("Package")?;
    let source = field("Source").map_or_else(|| package.clone(), |source| source.split(' ').next().unwrap_or_default().to_owned());
    let version = Version { source, version: field("Version")?, filename: field("Filename")?, bytes: field("Size")?.parse().ok()? };
    Some((package, version))
}

/// The first machine upgrades from the mirror, the others after it at once.
pub(crate) fn play(scenario: &Scenario) -> Outcome {
    let (old, new) = pairs(scenario.packages.pairs);
    let mut crowd = crowd(scenario);
    crowd.publish_packages(&old);
    up(&crowd.machines, scenario.machines.fleet, crowd.machines.len());
    for machine in 0..crowd.machines.len() {
        crowd.download(machine);
    }
    crowd.publish_packages(&new);
    crowd.machines.iter().for_each(|machine| drop(machine.update()));
    limit(&crowd, scenario);
    crowd.start_download(0).wait().ok();
    await_deltas(&crowd.machines[0], new.len());
    crowd.mirror.forget_log();
    let before: Vec<_> = crowd.machines.iter().map(|machine| machine.status().bytes).collect();
    let ends = at_once(&crowd, &crowd.machines[1..]);
    let mut outcome = Outcome { wanted_bytes: crowd.plan_bytes(), ..Outcome::default() };
    let mut lines = Vec::new();
    for (at, ended) in (1..crowd.machines.len()).zip(&ends) {
        assert_eq!(ended.0.deb_gets(), Vec::<&str>::new(), "apt fetched by itself: {}", ended.0);
        crowd.assert_all_here(at);
        outcome.verified += crowd.names.len();
        let line = line_of(&crowd, at, ended, is_package);
        lines.push(super::outcome::Line {
            from_mirror: line.from_mirror - before[at].mirror,
            from_peers: line.from_peers - before[at].peer,
            from_deltas: line.from_deltas - before[at].delta,
            ..line
        });
    }
    // What came from peers are deltas too; what was made with them did not come.
    let most = lines.iter().map(|line| line.from_mirror + line.from_peers).max().unwrap_or(0);
    let last = lines.iter().map(|line| line.seconds).fold(0.0, f64::max);
    outcome.figures = vec![
        Figure::new("bytes that came to one machine, of the packages", super::ratio(most, outcome.wanted_bytes), "x"),
        Figure::new("last machine", last, "s"),
    ];
    outcome.contenders = vec![contender(&crowd, "poolfs", outcome.wanted_bytes, lines, is_package)];
    outcome
}

/// Waits until the machine has made what deltas it makes.
fn await_deltas(machine: &Machine, packages: usize) {
    let deadline = Instant::now() + ONE_DELTA * u32::try_from(packages).unwrap();
    loop {
        let status = machine.status();
        if status.deltas_offered > 0 && status.deltas_to_make == 0 {
            return;
        }
        assert!(Instant::now() < deadline, "{} deltas are made, {} are not", status.deltas_offered, status.deltas_to_make);
        // They are made while nobody else wants the processor, and every look wants it.
        std::thread::sleep(Duration::from_secs(2));
    }
}
