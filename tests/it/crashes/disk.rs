//! Disks that fail: full, without inodes, read-only, and with an error at any call.

use super::World;
use super::power::Disks;
use crate::harness::disk::{Disk, Faults};
use crate::harness::{assert_holds, report, run};
use std::fs;
use std::process::Command;

/// Which of a machine's disks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Which {
    /// Below apt's archives and poolfs's cache.
    Cache,
    /// With the database.
    State,
}

impl Disks {
    fn which(&self, which: Which) -> &Disk {
        match which {
            Which::Cache => &self.cache,
            Which::State => &self.state,
        }
    }
}

/// What a machine does while its disk fails: nothing of it has to work, but no byte may be wrong and nothing may be lost.
fn live(world: &World) {
    let archives = world.stage.machine.archives();
    let quietly = |mut command: Command| drop(run(&mut command));
    quietly(world.stage.machine.command("apt-get", &["install", "-y", "-d", "--reinstall", "ant", "bee"]));
    for package in &world.stage.packages {
        if let Ok(bytes) = fs::read(world.stage.archive(package)) {
            // In `archives/` a read is right or fails.
            assert!(bytes == package.bytes, "{} is read with wrong bytes", package.archive_name());
        }
    }
    let _ = fs::write(archives.join("written"), b"something");
    let _ = fs::rename(archives.join("written"), archives.join("moved"));
    let _ = fs::remove_file(archives.join("moved"));
    let _ = fs::remove_file(world.stage.archive(&world.stage.packages[1]));
    let _ = fs::remove_file(world.stage.archive(&world.stage.packages[2]));
}

impl World {
    /// The same daemon as `pid` serves, the file that was there is there, and apt works.
    #[track_caller]
    fn is_well(&mut self, pid: u32, kept: &[u8], what: &str) {
        assert_eq!(self.stage.machine.pid(), Some(pid), "{what}: the daemon did not live through it");
        assert_holds(&self.path("kept"), kept);
        for package in &self.stage.packages {
            if let Ok(bytes) = fs::read(self.covered.path(&package.archive_name())) {
                assert!(bytes == package.bytes, "{what}: {} has wrong bytes on the disk", package.archive_name());
            }
        }
        self.apt_works();
    }
}

/// One call fails with EIO, for each number of it or each `stride`th. Returns how many calls failed.
fn errors(which: Which, stride: u64, mut first: u64) -> u64 {
    let (mut world, disks) = World::on_disks(5, false);
    let kept = vec![7; 100_000];
    fs::write(world.path("kept"), &kept).unwrap();
    let pid = world.stage.machine.status().pid;
    let mut failed = 0;
    loop {
        disks.which(which).faults(Faults { fails_at: Some((first, libc::EIO)), ..Faults::default() });
        live(&world);
        let (calls, hit) = disks.which(which).calls();
        disks.which(which).faults(Faults::default());
        world.is_well(pid, &kept, &format!("{which:?}: call {first} failed"));
        if hit == 0 {
            assert!(first > 20, "only {calls} calls to the disk");
            break;
        }
        failed += hit;
        first += stride;
    }
    world.end(disks);
    failed
}

/// A fault that stays, on a disk that works again afterwards. The status says which one, as long as it lasts, if there is one that the
/// daemon meets.
fn lasting(which: Which, what: &str, says: &[&str], fault: impl FnOnce(&Disk) -> Faults) {
    let (mut world, disks) = World::on_disks(6, false);
    let kept = vec![7; 100_000];
    fs::write(world.path("kept"), &kept).unwrap();
    let pid = world.stage.machine.status().pid;
    let faults = fault(disks.which(which));
    disks.which(which).faults(faults);
    live(&world);
    // The status itself asks the database.
    let status = run(&mut world.stage.machine.poolfs_command(&["status"]));
    // What is here can be read all the same.
    assert_holds(&world.path("kept"), &kept);
    disks.which(which).faults(Faults::default());
    world.is_well(pid, &kept, what);
    let said: Vec<&str> = status.out.lines().filter(|line| line.starts_with("problem: ") || line.contains("leave a tenth")).collect();
    assert!(says.is_empty() || said.iter().any(|line| says.iter().any(|word| line.contains(word))), "{which:?} {what}: {status}");
    let after = world.stage.machine.poolfs(&["status"]).ok();
    let said_still = ["problem: database", "problem: no space for database"].iter().any(|line| after.out.contains(line));
    assert!(!said_still, "{which:?} {what}: what is over is still said: {after}");
    report(
        "crashes::lasting",
        &format!("{which:?} {what}: the daemon lives, nothing wrong is read, apt works afterwards; status: {said:?}"),
    );
    world.end(disks);
}

fn all_lasting(which: Which) {
    lasting(which, "full", &["no space", "leave a tenth of the disk free"], |disk| Faults {
        bytes_max: Some(disk.used_bytes() + 10_000),
        ..Faults::default()
    });
    // Nothing new is made in the directory of an open database.
    let without_inodes: &[&str] = if which == Which::Cache { &["no space"] } else { &[] };
    lasting(which, "without inodes", without_inodes, |disk| Faults { inodes_max: Some(disk.inodes()), ..Faults::default() });
    lasting(which, "read-only", &["Read-only", "read-only", "disk I/O error"], |_| Faults { read_only: true, ..Faults::default() });
}

/// apt must notice nothing but what plain apt would.
#[test]
fn lasting_faults_of_the_cache() {
    all_lasting(Which::Cache);
}

/// As above, of the disk with the database.
#[test]
fn lasting_faults_of_the_state() {
    all_lasting(Which::State);
}

/// One error, here and there.
#[test]
fn errors_short() {
    let failed = errors(Which::Cache, 97, 11) + errors(Which::State, 97, 11);
    report("crashes::errors_short", &format!("EIO at {failed} calls: no wrong bytes, the daemon lives, apt works afterwards"));
}

/// At every call; run by `scripts/soak disk`.
#[test]
#[ignore = "takes long: scripts/soak disk"]
fn errors_long() {
    for which in [Which::Cache, Which::State] {
        let failed = errors(which, 1, 1);
        report(
            "crashes::errors_long",
            &format!("{which:?}: EIO at each of {failed} calls: no wrong bytes, the daemon lives, apt works afterwards"),
        );
        eprintln!("{which:?}: EIO at each of {failed} calls: no wrong bytes, the daemon lives, apt works afterwards");
    }
}
