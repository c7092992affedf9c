//! What deltas save and cost, on random pairs of real packages.
//!
//! `scripts/bench deltas [--pairs N] [--seed S]`. The packages are those that apt's lists of this machine name in two versions, in
//! the release and in its security and updates suites; they are fetched with apt's own downloader. Nothing of apt's is changed.
#![allow(
    clippy::print_stdout,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::cast_precision_loss,
    missing_docs,
    reason = "a program for people, that stops at the first surprise"
)]

use rand::rngs::StdRng;
use rand::seq::SliceRandom as _;
use rand::{RngExt as _, SeedableRng as _};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

/// Larger packages are left out of the draw: debugging symbols of kernels have a gigabyte.
const PACKAGE_BYTES_MAX: u64 = 32 << 20;

struct Version {
    version: String,
    url: String,
    bytes: u64,
    digest: String,
}

/// What all pairs together came to.
#[derive(Default)]
struct Sums {
    pairs: usize,
    /// Drawn, and one of the versions has left the archive.
    gone: usize,
    reproduced: usize,
    under_half: usize,
    too_large: usize,
    /// Bytes of new packages, and of what comes over the wire for them where deltas under half are used.
    full: u64,
    deltas: u64,
    wire: u64,
    xdelta: u64,
    /// Of those under half.
    saved: u64,
    make_ms: u64,
    rebuild_ms: u64,
    rebuild_wall_s: f64,
    xz_s: f64,
    xz_rebuild_ms: u64,
    peak_make_kib: u64,
    peak_rebuild_kib: u64,
    /// Bytes of each delta, or of the package where there is none; bytes of the package; its name.
    each: Vec<(u64, u64, String)>,
}

/// Packages that are named as those that cost most.
const NAMED: usize = 5;

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let number = |option: &str| {
        let at = arguments.iter().position(|word| word == option)?;
        arguments.get(at + 1)?.parse::<u64>().ok()
    };
    let pairs = usize::try_from(number("--pairs").unwrap_or(100)).unwrap();
    let seed = number("--seed").unwrap_or_else(|| rand::rng().random());
    let mut all = versions();
    all.retain(|_, versions| versions.len() > 1);
    let mut names: Vec<String> = all.keys().cloned().collect();
    let drawn_from = names.len();
    names.shuffle(&mut StdRng::seed_from_u64(seed));
    println!("{drawn_from} packages in two versions of at most {} MiB; {pairs} drawn with seed {seed}", PACKAGE_BYTES_MAX >> 20);
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("deltas-{}", std::process::id()));
    fs::create_dir_all(&dir).unwrap();
    let mut sums = Sums::default();
    for name in &names {
        if sums.pairs == pairs {
            break;
        }
        let mut versions = all.remove(name).unwrap();
        versions.sort_by(|a, b| if older(&a.version, &b.version) { std::cmp::Ordering::Less } else { std::cmp::Ordering::Greater });
        let new = versions.pop().unwrap();
        let old = versions.pop().unwrap();
        pair(&dir, name, &old, &new, &mut sums);
    }
    fs::remove_dir_all(&dir).unwrap();
    show(&sums);
}

/// Every package of this machine's lists by name and architecture.
fn versions() -> BTreeMap<String, Vec<Version>> {
    let targets = output(Command::new("apt-get").args(["indextargets", "--format", "$(METAKEY) $(FILENAME) $(REPO_URI)"]));
    let mut all: BTreeMap<String, Vec<Version>> = BTreeMap::new();
    for line in targets.lines() {
        let [key, file, uri] = line.split(' ').collect::<Vec<_>>().try_into().unwrap();
        if !key.starts_with("main/") || !key.ends_with("/Packages") {
            continue;
        }
        for stanza in output(Command::new("/usr/lib/apt/apt-helper").args(["cat-file", file])).split("\n\n") {
            let field = |name: &str| stanza.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": ")).map(str::to_owned);
            let (Some(package), Some(version), Some(architecture)) = (field("Package"), field("Version"), field("Architecture")) else {
                continue;
            };
            let bytes: u64 = field("Size").unwrap().parse().unwrap();
            let url = format!("{uri}{}", field("Filename").unwrap());
            let known = all.entry(format!("{package}:{architecture}")).or_default();
            if bytes <= PACKAGE_BYTES_MAX && !known.iter().any(|known| known.version == version) {
                known.push(Version { version, url, bytes, digest: field("SHA256").unwrap() });
            }
        }
    }
    all
}

fn older(a: &str, b: &str) -> bool {
    Command::new("dpkg").args(["--compare-versions", a, "lt", b]).status().unwrap().success()
}

fn output(command: &mut Command) -> String {
    let out = command.stderr(Stdio::inherit()).output().unwrap();
    assert!(out.status.success(), "{command:?}");
    String::from_utf8(out.stdout).unwrap()
}

fn fetched(dir: &Path, version: &Version, name: &str) -> Option<PathBuf> {
    let file = dir.join(name);
    let sum = format!("SHA256:{}", version.digest);
    let helper = Command::new("/usr/lib/apt/apt-helper").args(["-q", "download-file", &version.url]).arg(&file).arg(sum).output().unwrap();
    // The archive drops old versions between two updates of the lists.
    helper.status.success().then_some(file)
}

fn pair(dir: &Path, name: &str, old: &Version, new: &Version, sums: &mut Sums) {
    let (Some(old_file), Some(new_file)) = (fetched(dir, old, "old.deb"), fetched(dir, new, "new.deb")) else {
        sums.gone += 1;
        return;
    };
    let delta = dir.join("delta");
    sums.pairs += 1;
    sums.full += new.bytes;
    let xdelta_file = dir.join("xdelta");
    let done =
        Command::new("xdelta3").args(["-q", "-f", "-e", "-9", "-B", "67108864", "-s"]).args([&old_file, &new_file, &xdelta_file]).status();
    assert!(done.unwrap().success(), "xdelta3");
    sums.xdelta += fs::metadata(&xdelta_file).unwrap().len().min(new.bytes);
    let made =
        Command::new(env!("CARGO_BIN_EXE_poolfs")).args(["delta", "make", "--json"]).args([&old_file, &new_file, &delta]).output().unwrap();
    if !made.status.success() {
        let why = String::from_utf8_lossy(&made.stderr).trim().to_owned();
        println!("{name} {} -> {}: {why}", old.version, new.version);
        sums.too_large += usize::from(why.contains("too large"));
        sums.each.push((new.bytes, new.bytes, name.to_owned()));
        sums.wire += new.bytes;
        sums.deltas += new.bytes;
        return;
    }
    let report: serde_json::Value = serde_json::from_slice(&made.stdout).unwrap();
    let figure = |key: &str| report[key].as_u64().unwrap();
    let bytes = figure("delta_bytes");
    sums.reproduced += 1;
    sums.deltas += bytes.min(new.bytes);
    sums.each.push((bytes.min(new.bytes), new.bytes, name.to_owned()));
    sums.make_ms += figure("make_ms");
    sums.peak_make_kib = sums.peak_make_kib.max(figure("make_peak_kib"));
    let rebuilt = dir.join("rebuilt.deb");
    let started = Instant::now();
    let applied =
        Command::new(env!("CARGO_BIN_EXE_poolfs")).args(["delta", "apply", "--json"]).args([&old_file, &delta, &rebuilt]).output().unwrap();
    let wall_s = started.elapsed().as_secs_f64();
    assert!(applied.status.success(), "{name}: {}", String::from_utf8_lossy(&applied.stderr));
    assert!(fs::read(&rebuilt).unwrap() == fs::read(&new_file).unwrap(), "{name}: rebuilt otherwise");
    let report: serde_json::Value = serde_json::from_slice(&applied.stdout).unwrap();
    let rebuild_ms = report["rebuild_ms"].as_u64().unwrap();
    sums.peak_rebuild_kib = sums.peak_rebuild_kib.max(report["rebuild_peak_kib"].as_u64().unwrap());
    sums.rebuild_ms += rebuild_ms;
    if report["recipes"].to_string().contains("\"xz -6 ") {
        sums.xz_s += xz_alone(&new_file);
        sums.xz_rebuild_ms += rebuild_ms;
    }
    if bytes * 2 < new.bytes {
        sums.under_half += 1;
        sums.wire += bytes;
        sums.saved += new.bytes - bytes;
        sums.rebuild_wall_s += wall_s;
    } else {
        sums.wire += new.bytes;
    }
}

/// Processor seconds of `xz -6` for the package's tar.
fn xz_alone(package: &Path) -> f64 {
    let tar = package.with_extension("tar");
    let file = fs::File::create(&tar).unwrap();
    assert!(Command::new("dpkg-deb").arg("--fsys-tarfile").arg(package).stdout(file).status().unwrap().success());
    let script = "TIMEFORMAT='%U %S'; time xz -6 -T1 -c \"$0\" >/dev/null";
    let timed = Command::new("bash").args(["-c", script]).arg(&tar).output().unwrap();
    assert!(timed.status.success());
    String::from_utf8_lossy(&timed.stderr).split_whitespace().map(|seconds| seconds.parse::<f64>().unwrap()).sum()
}

fn show(sums: &Sums) {
    let share = |part: u64| part as f64 / sums.full.max(1) as f64 * 100.0;
    let of = |count: usize| format!("{count} of {}, {:.0} %", sums.pairs, count as f64 / sums.pairs.max(1) as f64 * 100.0);
    let mb = |bytes: u64| bytes as f64 / 1e6;
    let mut each = sums.each.clone();
    each.sort_by_key(|(delta, ..)| std::cmp::Reverse(*delta));
    println!("{:.1} MB of packages, {:.1} MB of deltas; those that cost most:", mb(sums.full), mb(sums.deltas));
    for (delta, full, name) in each.iter().take(NAMED) {
        println!("  {name}: {:.2} MB of {:.2} MB", mb(*delta), mb(*full));
    }
    println!("{:60} {:>28}  goal", "figure", "measured");
    let line = |name: &str, value: String, goal: &str| println!("{name:60} {value:>28}  {goal}");
    line("drawn besides, of which the archive has one version only", sums.gone.to_string(), "");
    line("reproduced exactly", of(sums.reproduced), "95 %");
    line("too large for a delta", of(sums.too_large), "");
    line("deltas under half of the package", of(sums.under_half), "");
    line("bytes of all deltas, of the packages' bytes", format!("{:.1} %", share(sums.deltas)), "10 %");
    line("bytes on the wire, with deltas under half", format!("{:.1} %", share(sums.wire)), "");
    line("the same with xdelta3 -9 of the packages", format!("{:.1} %", share(sums.xdelta)), "");
    let each_mb = |ms: u64| format!("{:.2} s/MB", ms as f64 / 1000.0 / (sums.full.max(1) as f64 / 1e6));
    line("making, processor time", each_mb(sums.make_ms), "");
    line("rebuilding, processor time", each_mb(sums.rebuild_ms), "");
    line("rebuilding beside xz -6 of the tar alone", format!("{:.2}x", sums.xz_rebuild_ms as f64 / 1000.0 / sums.xz_s.max(0.001)), "1.2x");
    line("peak memory of making", format!("{} MiB", sums.peak_make_kib >> 10), "512 MiB");
    line("peak memory of rebuilding", format!("{} MiB", sums.peak_rebuild_kib >> 10), "512 MiB");
    let mbit = sums.saved as f64 * 8.0 / 1e6 / sums.rebuild_wall_s.max(0.001);
    line("link at which a delta takes as long as the package", format!("{mbit:.1} Mbit/s"), "5-10 Mbit/s");
}
