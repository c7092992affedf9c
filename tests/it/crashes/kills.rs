//! `kill -9` at any moment and at every named step.

use super::World;
use crate::harness::machine::await_end;
use crate::harness::report;
use rustix::process::{Pid, Signal, kill_process};
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Operations within which a step must come that comes at all.
const OPERATIONS_MAX: u32 = 60;

/// The longest wait of a killer within an operation, in turns of its loop: about ten milliseconds.
const TURNS_MAX: u64 = 4_000;

fn signal(pid: u32, signal: Signal) {
    // It may have ended by itself.
    let _ = kill_process(Pid::from_raw(i32::try_from(pid).unwrap()).unwrap(), signal);
}

fn parent_of(pid: u32) -> Option<u32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(") ")?.1.split(' ').nth(1)?.parse().ok()
}

fn is_dead(pid: u32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat"))
        .map_or(true, |stat| stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('Z')))
}

/// One life of the daemon, and how it ended.
struct Life {
    pid: u32,
    parent: u32,
    told: Vec<String>,
}

impl World {
    fn life(&self) -> Life {
        let pid = self.stage.machine.status().pid;
        Life { pid, parent: parent_of(pid).unwrap(), told: Vec::new() }
    }

    /// Works until an operation fails or `over` says so; the daemon must have died of it.
    fn work_until(&mut self, life: &mut Life, operations_max: u32, mut over: impl FnMut(&Life) -> bool) {
        for _ in 0..operations_max {
            match self.operate() {
                Ok(told) => life.told.push(told),
                Err(err) => {
                    life.told.push(format!("failed: {err}"));
                    // The error of a request that the daemon did not answer; anything else is a fault of its own.
                    await_end(life.pid);
                    return;
                }
            }
            if over(life) {
                return;
            }
        }
    }

    /// Kills the daemon somewhere within the next operations.
    fn work_and_kill(&mut self, life: &mut Life) {
        let turns = self.dice.below(TURNS_MAX);
        let operations = u32::try_from(1 + self.dice.below(5)).unwrap();
        let killed = Arc::new(AtomicBool::new(false));
        let killer = {
            let (killed, pid) = (Arc::clone(&killed), life.pid);
            std::thread::spawn(move || {
                for _ in 0..turns * 5 {
                    std::thread::yield_now();
                }
                killed.store(true, Ordering::SeqCst);
                signal(pid, Signal::KILL);
            })
        };
        let mut left = operations;
        self.work_until(life, OPERATIONS_MAX, |_| {
            left = left.saturating_sub(1);
            killed.load(Ordering::SeqCst) && left == 0
        });
        killer.join().unwrap();
        await_end(life.pid);
    }

    /// Brings it back: by the parent that watches it, or anew after the parent was killed too.
    fn come_back(&mut self, life: &Life, with_parent: bool) {
        if with_parent {
            signal(life.parent, Signal::KILL);
            await_end(life.parent);
            self.up_again();
        } else {
            self.stage.machine.await_mounted_again(life.pid);
        }
    }
}

/// Kills `times` times at random.
fn at_random(seed: u64, times: u32) -> u32 {
    let mut world = World::new(seed, false, |_| ());
    let mut operations = 0;
    for time in 0..times {
        let mut life = world.life();
        // Every second death takes the parent along: it would wait longer each time before it starts another.
        let with_parent = time % 2 == 1;
        if with_parent {
            signal(life.parent, Signal::STOP);
        }
        world.work_and_kill(&mut life);
        operations += life.told.len();
        let what = format!("seed {seed}, kill {time}, {}", life.told.join("; "));
        world.come_back(&life, with_parent);
        world.check(&what);
        world.apt_works();
    }
    let finished = world.stage.machine.poolfs(&["verify"]).ok();
    assert_eq!(world.stage.machine.status().archives().damaged, 0, "{finished}");
    eprintln!("seed {seed}: {times} kills within {operations} operations");
    times
}

/// The steps of the store that have names, from its sources.
fn steps() -> BTreeSet<String> {
    fn visit(dir: &Path, found: &mut BTreeSet<String>) {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                visit(&path, found);
            } else if path.extension().is_some_and(|extension| extension == "rs") && !path.ends_with("crash.rs") {
                let text = fs::read_to_string(&path).unwrap();
                let after = text.split("crash_point(\"").skip(1);
                found.extend(after.filter_map(|rest| rest.split_once("\");")).map(|(name, _)| name.to_owned()));
            }
        }
    }
    let mut found = BTreeSet::new();
    visit(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src/core/src"), &mut found);
    found.retain(|name| name.contains('.'));
    assert!(found.len() > 15, "{found:?}");
    found
}

/// Kills at the named steps: `rounds` times at each, at a random passing of it. Returns the kills, and the steps that were not
/// passed.
fn at_steps(seed: u64, rounds: u64) -> (u32, BTreeSet<String>) {
    let mut world = World::new(seed, false, |_| ());
    let (mut kills, mut passed) = (0, BTreeSet::new());
    let steps: Vec<String> = steps().into_iter().filter(|step| !step.starts_with("migrate.")).collect();
    for round in 0..rounds {
        for step in &steps {
            let mut life = world.life();
            signal(life.parent, Signal::STOP);
            let nth = if round == 0 { 0 } else { world.dice.below(3) };
            fs::write(&world.crash_file, format!("{step} {nth}\n")).unwrap();
            world.work_until(&mut life, OPERATIONS_MAX, |life| is_dead(life.pid));
            let what = format!("seed {seed}, {step} {nth}, {}", life.told.join("; "));
            kills += 1;
            if is_dead(life.pid) {
                passed.insert(step.clone());
            } else {
                signal(life.pid, Signal::KILL);
                await_end(life.pid);
            }
            let _ = fs::remove_file(&world.crash_file);
            world.come_back(&life, true);
            world.check(&what);
            world.apt_works();
        }
    }
    (kills, steps.into_iter().filter(|step| !passed.contains(step)).collect())
}

/// Kills while the database is made: each migration, before and after it is committed.
fn at_migrations(seed: u64) -> u32 {
    let mut world = World::new(seed, false, |_| ());
    let mut kills = 0;
    for _ in 0..20 {
        world.operate().unwrap();
    }
    for step in ["migrate.uncommitted", "migrate.committed"] {
        for nth in 0.. {
            world.stage.machine.down();
            for name in ["poolfs.db", "poolfs.db-wal", "poolfs.db-shm"] {
                let _ = fs::remove_file(world.stage.machine.state_dir().join(name));
            }
            fs::write(&world.crash_file, format!("{step} {nth}\n")).unwrap();
            world.up_again();
            assert!(!world.crash_file.exists(), "the daemon did not look at what was armed");
            // Each migration passes the point once.
            let died = nth < world.schema_version();
            world.check(&format!("seed {seed}, {step} {nth}"));
            world.apt_works();
            if !died {
                break;
            }
            kills += 1;
        }
    }
    kills
}

impl World {
    fn schema_version(&self) -> u32 {
        let path = self.stage.machine.state_dir().join("poolfs.db");
        let db = rusqlite::Connection::open_with_flags(path, rusqlite::OpenFlags::SQLITE_OPEN_READ_ONLY).unwrap();
        db.query_row("PRAGMA user_version", [], |row| row.get(0)).unwrap()
    }
}

/// A few deaths of each kind: what any change could break.
#[test]
fn kills_short() {
    let kills = at_random(1, 6);
    report("crashes::kills_short", &format!("{kills} kills at random: nothing acknowledged is lost, apt works after each"));
}

/// Once at each step that has a name.
#[test]
#[ignore = "takes long: scripts/soak crashes"]
fn kills_long() {
    let mut kills = 0;
    let migrations = at_migrations(7);
    let (at, never) = at_steps(11, 6);
    eprintln!("{at} kills at named steps, {migrations} in migrations; never passed: {never:?}");
    kills += at + migrations;
    let mut seed = 100;
    while kills < 1_000 {
        kills += at_random(seed, (1_000 - kills).min(50));
        seed += 1;
    }
    report("crashes::kills_long", &format!("{kills} kills: 0 acknowledged files lost, 0 wrong bytes read, apt worked right after each"));
    eprintln!("{kills} kills: 0 acknowledged files lost, 0 wrong bytes read, apt worked right after each");
}
