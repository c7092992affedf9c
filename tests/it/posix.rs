//! Foreign exercisers of file systems: the mount must pass what the covered file system passes.

use crate::harness::{Options, Package, Stage, report, run};
use rustix::mount::{UnmountFlags, mount_bind, unmount};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

fn tool(name: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/tools/bin").join(name);
    assert!(path.exists(), "{} is missing: run scripts/test-deps", path.display());
    path
}

/// pjdfstest's configuration. The three users exist on every Debian. naptime is over the tick of ext4's timestamps (4 ms).
const PJDFSTEST: &str = r#"
[features]
posix_fallocate = {}
rename_ctime = {}
utimensat = {}
utime_now = {}
[settings]
naptime = 0.02
allow_remount = false
[dummy_auth]
entries = [["nobody", "nogroup"], ["daemon", "daemon"], ["games", "games"]]
"#;

/// Each case's result, by name.
///
/// The directory is bound to a short path for it (in the test's own namespace): sockets are bound by whole paths, of at
/// most 107 bytes.
fn pjdfstest(stage: &Stage) -> BTreeMap<String, String> {
    let config = stage.machine.scratch().join("pjdfstest.toml");
    fs::write(&config, PJDFSTEST).unwrap();
    let short = Path::new("/mnt");
    mount_bind(stage.machine.archives(), short).unwrap();
    let directory = short.join("pjd");
    fs::create_dir(&directory).unwrap();
    let other_file_system = "/dev/shm";
    let mut command = Command::new(tool("pjdfstest"));
    command.arg("-c").arg(&config).arg("-p").arg(&directory).args(["-s", other_file_system]).env("RUST_BACKTRACE", "0");
    let finished = run(&mut command);
    let case = |line: &str| {
        let (name, result) = line.split_once(char::is_whitespace)?;
        let known = ["ok", "skipped", "FAILED", "failed"];
        let result = result.trim();
        (name.contains("::") && known.contains(&result)).then(|| (name.to_owned(), result.to_owned()))
    };
    let cases: BTreeMap<_, _> = finished.out.lines().filter_map(case).collect();
    assert!(finished.out.contains(&format!("{} total", cases.len())), "the output was not understood: {finished}");
    fs::remove_dir_all(directory).unwrap();
    unmount(short, UnmountFlags::empty()).unwrap();
    cases
}

/// Cases that may differ between the mount and the file system below it, each with its reason.
const KNOWN_DIFFERENCES: &[(&str, &str)] = &[(
    "link::link_count_max",
    "makes as many links as pathconf says; the C library knows the number for ext4 by its magic and says 127 for any FUSE, so the case skips itself",
)];

/// apt, dpkg, mmdebstrap and administrators use a directory as POSIX says; where the mount differs, they break.
#[test]
fn pjdfstest_passes_as_on_the_covered_file_system() {
    let stage = Stage::new(vec![Package::new("one", "1.0", 10)], &Options::default());
    let below = pjdfstest(&stage);
    stage.machine.up();
    let mounted = pjdfstest(&stage);
    assert_eq!(below.keys().collect::<Vec<_>>(), mounted.keys().collect::<Vec<_>>());
    let mut differences = Vec::new();
    for (name, result) in &mounted {
        if *result != below[name] && !KNOWN_DIFFERENCES.iter().any(|(known, _)| known == name) {
            differences.push(format!("{name}: {} below, {result} on the mount", below[name]));
        }
    }
    let count = |cases: &BTreeMap<String, String>, result: &str| cases.values().filter(|found| *found == result).count();
    report(
        "posix::pjdfstest",
        &format!(
            "{} cases: below {} ok, {} skipped; on the mount {} ok, {} skipped; {} differences",
            mounted.len(),
            count(&below, "ok"),
            count(&below, "skipped"),
            count(&mounted, "ok"),
            count(&mounted, "skipped"),
            differences.len()
        ),
    );
    assert!(differences.is_empty(), "{differences:#?}");
    assert!(count(&below, "ok") > 370, "too few cases ran to prove anything");
}

/// What fsx does: everything that changes a file's bytes, and closes and drops caches in between.
const FSX: &str = "
flen = 600000
[weights]
close_open = 2.0
invalidate = 0.2
mapread = 4.0
mapwrite = 2.0
read = 10.0
write = 10.0
truncate = 3.0
fsync = 0.2
fdatasync = 0.2
posix_fallocate = 1.0
punch_hole = 1.0
sendfile = 2.0
posix_fadvise = 0.5
copy_file_range = 1.0
";

fn fsx(seeds: std::ops::Range<u64>, operations: u64) {
    let stage = Stage::new(vec![Package::new("one", "1.0", 10)], &Options::default());
    stage.machine.up();
    let config = stage.machine.scratch().join("fsx.toml");
    fs::write(&config, FSX).unwrap();
    for seed in seeds.clone() {
        let file = stage.machine.archives().join(format!("fsx-{seed}"));
        let mut command = Command::new(tool("fsx"));
        command.arg("-q").arg("-f").arg(&config).arg("-S").arg(seed.to_string()).arg("-N").arg(operations.to_string());
        command.arg("-P").arg(stage.machine.scratch()).arg(&file);
        run(&mut command).ok();
        fs::remove_file(file).unwrap();
    }
    // What was written in the wildest order is still what its checksums say.
    stage.machine.poolfs(&["verify"]).ok();
    report(
        "posix::fsx",
        &format!("{} operations in {} seeds, no divergence", operations * (seeds.end - seeds.start), seeds.end - seeds.start),
    );
}

/// A write, a truncation or a mapping that loses a byte would corrupt what apt downloads or unpacks itself.
#[test]
fn fsx_short() {
    fsx(1..4, 6_000);
}

/// A million operations; run by `scripts/soak fsx`.
#[test]
#[ignore = "takes long: scripts/soak fsx"]
fn fsx_long() {
    // Each run ends within the limit of a test's process, on a busy machine too.
    fsx(100..150, 20_000);
}
