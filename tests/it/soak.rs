//! A fleet's everyday life with everything that goes wrong in it: eight machines that update and install all the time, a liar with
//! the fleet's key, links that flap, and somebody who kills a process of somebody every few seconds.
//!
//! apt must end as plain apt does on such a network, with 0, each time: where the process that serves the mounts was killed below a
//! running apt, the very next try must. Afterwards every file is what its repository signed, and no daemon has grown.

use crate::harness::crowd::{Crowd, Terms, await_status};
use crate::harness::disk::Dice;
use crate::harness::process::Finished;
use crate::harness::{Liar, Machine, Package, assert_holds, listed, report};
use parking_lot::{Mutex, RwLock};
use poolfs_core::Digest;
use rustix::process::{Pid, Signal, kill_process};
use std::collections::BTreeMap;
use std::fs;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

const MACHINES: usize = 8;

/// The host of the liar, behind the machines.
const LIAR: usize = MACHINES;

/// The machine whose plug is pulled for a second, and the one that is cut off from the others and keeps the mirror.
const UNPLUGGED: usize = 6;
const CUT_OFF: usize = 7;

const NAMES: &[&str] = &["ant", "bee", "cat", "dog", "eel", "fox", "gnu", "hen"];

/// One round of the troublemaker.
const ROUND: Duration = Duration::from_secs(20);

/// A daemon's memory and descriptors, by the machine and what the process is.
type Sizes = BTreeMap<(usize, String), (u64, u64)>;

struct Site {
    machines: Vec<Machine>,
    /// Counts up when the serving process of a machine is killed, and when it serves again.
    disturbed: Vec<AtomicU32>,
    /// An index that is being replaced would be half of each for plain apt, too.
    index: RwLock<()>,
    /// What may lie in `archives/`, now and from earlier versions.
    known: Mutex<BTreeMap<String, Vec<u8>>>,
    over: AtomicBool,
    commands: AtomicU64,
    tried_again: AtomicU64,
    seed: u64,
}

impl Site {
    /// Runs a command of apt, which must end with 0.
    #[track_caller]
    fn apt(&self, machine: usize, arguments: &[&str]) {
        let before = self.disturbed[machine].load(Ordering::SeqCst);
        let once = || -> Finished {
            let _index = (arguments[0] == "update").then(|| self.index.read());
            self.machines[machine].apt_get(arguments)
        };
        let mut finished = once();
        // Undisturbed is who was served from the beginning to the end.
        if finished.code() != 0 && (before % 2 == 1 || self.disturbed[machine].load(Ordering::SeqCst) != before) {
            self.tried_again.fetch_add(1, Ordering::Relaxed);
            finished = once();
        }
        assert_eq!(finished.code(), 0, "machine {machine}: {finished}");
        self.commands.fetch_add(1, Ordering::Relaxed);
    }

    fn live(&self, machine: usize) {
        let mut dice = Dice::new(self.seed * 1_000 + machine as u64);
        while !self.over.load(Ordering::SeqCst) {
            let name = NAMES[usize::try_from(dice.below(NAMES.len() as u64)).unwrap()];
            match dice.below(8) {
                0 | 1 => self.apt(machine, &["update"]),
                2 => self.apt(machine, &["clean"]),
                3 => self.apt(machine, &["autoclean"]),
                4 => self.apt(machine, &[&["install", "-y", "-d", "--reinstall"], NAMES].concat()),
                _ => self.apt(machine, &["install", "-y", "-d", "--reinstall", name]),
            }
            // Eight machines share a processor or two, and kills are to find them at rest, too.
            std::thread::sleep(Duration::from_millis(300));
        }
    }

    /// Kills one process of one machine, and waits for what was killed to be there again.
    fn kill_somebody(&self, dice: &mut Dice) -> String {
        let machine = usize::try_from(dice.below(MACHINES as u64)).unwrap();
        let pid = self.machines[machine].status().pid;
        let network = network_process(&self.machines[machine], pid);
        let serving = dice.below(2) == 0 || network.is_none();
        let victim = if serving { pid } else { network.expect("looked at") };
        if serving {
            self.disturbed[machine].fetch_add(1, Ordering::SeqCst);
        }
        kill_process(Pid::from_raw(i32::try_from(victim).unwrap()).unwrap(), Signal::KILL).unwrap();
        if serving {
            self.machines[machine].await_mounted_again(pid);
            self.disturbed[machine].fetch_add(1, Ordering::SeqCst);
        }
        format!("{} of machine {machine}", if serving { "mounts" } else { "network" })
    }

    fn sizes(&self) -> Sizes {
        let mut sizes = Sizes::new();
        for (nth, machine) in self.machines.iter().enumerate() {
            for pid in machine.pids() {
                // It may have ended meanwhile.
                let Ok(command) = fs::read(format!("/proc/{pid}/cmdline")) else { continue };
                let what = command.split(|byte| *byte == 0).nth(1).map(|word| String::from_utf8_lossy(word).into_owned());
                let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
                let rss = status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB")?.parse::<u64>().ok());
                let open = fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, |entries| entries.count() as u64);
                if let (Some(what), Some(rss)) = (what, rss) {
                    let most = sizes.entry((nth, what)).or_default();
                    *most = (most.0.max(rss), most.1.max(open));
                }
            }
        }
        sizes
    }
}

/// The network process of the daemon whose serving process is `pid`.
fn network_process(machine: &Machine, pid: u32) -> Option<u32> {
    let is_child = |of: u32| {
        let stat = fs::read_to_string(format!("/proc/{of}/stat")).unwrap_or_default();
        stat.rsplit_once(") ").and_then(|(_, rest)| rest.split(' ').nth(1)?.parse().ok()) == Some(pid)
    };
    machine.pids().into_iter().find(|of| is_child(*of))
}

fn merge(into: &mut Sizes, sizes: Sizes) {
    for (who, (rss, open)) in sizes {
        let most = into.entry(who).or_default();
        *most = (most.0.max(rss), most.1.max(open));
    }
}

fn package(dice: &mut Dice, name: &str, version: u32) -> Package {
    let bytes = if dice.below(3) == 0 { dice.below(3_000_000) } else { dice.below(300_000) };
    Package::new(name, &version.to_string(), usize::try_from(bytes).unwrap())
}

/// So many rounds of trouble.
fn everyday(seed: u64, rounds: u32) {
    let mut dice = Dice::new(seed);
    let packages = NAMES.iter().map(|name| package(&mut dice, name, 1)).collect();
    let terms = Terms { fleet: true, ..Terms::default() };
    let mut crowd = Crowd::new(MACHINES + 1, packages, &terms);
    let mut machines = std::mem::take(&mut crowd.machines);
    // Where the liar is there is no poolfs.
    machines.truncate(MACHINES);
    machines.iter().for_each(Machine::up);
    for machine in &machines {
        await_status(machine, "knows the others", |status| status.fleet_members == MACHINES as u64);
        machine.update();
    }
    let archive = |published: &crate::harness::Published| (published.archive_name(), published.bytes.clone());
    let known: BTreeMap<String, Vec<u8>> = crowd.packages.iter().map(archive).collect();
    let claims: Vec<(Digest, u64)> = known.values().map(|bytes| (Digest::of(bytes), bytes.len() as u64)).collect();
    let mut liar = Some(Liar::start(&crowd.hosts[LIAR], &claims, Some(crowd.fleet_key())));
    let mut lies = 0;
    let site = Site {
        machines,
        disturbed: (0..MACHINES).map(|_| AtomicU32::new(0)).collect(),
        index: RwLock::default(),
        known: Mutex::new(known),
        over: AtomicBool::new(false),
        commands: AtomicU64::new(0),
        tried_again: AtomicU64::new(0),
        seed,
    };
    let (mut third, mut fourth, mut kills) = (Sizes::new(), Sizes::new(), BTreeMap::<String, u32>::new());
    std::thread::scope(|scope| {
        let lives: Vec<_> = (0..MACHINES)
            .map(|machine| {
                let site = &site;
                scope.spawn(move || site.live(machine))
            })
            .collect();
        for round in 0..rounds {
            let begun = Instant::now();
            // Whoever failed ends the test now and not after its hour.
            if lives.iter().any(std::thread::ScopedJoinHandle::is_finished) {
                break;
            }
            let name = NAMES[usize::try_from(dice.below(NAMES.len() as u64)).unwrap()];
            let newer = {
                let _index = site.index.write();
                let repo = crowd.repo();
                repo.withdraw(name);
                let newer = repo.add(package(&mut dice, name, round + 2));
                site.known.lock().insert(newer.archive_name(), newer.bytes.clone());
                repo.publish();
                newer
            };
            if round % 10 == 9 {
                // His place is to be free before the next one takes it.
                lies += liar.take().map_or(0, |liar| liar.asked());
                let claims = [(Digest::of(&newer.bytes), newer.bytes.len() as u64)];
                liar = Some(Liar::start(&crowd.hosts[LIAR], &claims, Some(crowd.fleet_key())));
            }
            crowd.cut_off(if round % 2 == 0 { &[CUT_OFF] } else { &[] });
            crowd.hosts[UNPLUGGED].plug(false);
            // What is counted is bytes and outcomes; the pause is how long the plug is out.
            std::thread::sleep(Duration::from_secs(1));
            crowd.hosts[UNPLUGGED].plug(true);
            let killed = site.kill_somebody(&mut dice);
            eprintln!("round {round}: {killed} killed, {} commands", site.commands.load(Ordering::Relaxed));
            *kills.entry(killed.split(' ').next().unwrap().to_owned()).or_default() += 1;
            while begun.elapsed() < ROUND {
                let sizes = site.sizes();
                match round * 4 / rounds {
                    2 => merge(&mut third, sizes),
                    3 => merge(&mut fourth, sizes),
                    _ => {}
                }
                // Between two samples of what the processes take.
                std::thread::sleep(Duration::from_secs(4));
            }
        }
        site.over.store(true, Ordering::SeqCst);
    });
    lies += liar.take().map_or(0, |liar| liar.asked());
    assert!(lies > 0, "nobody asked the liar");
    for (who, (rss, open)) in &fourth {
        let (rss_before, open_before) = third.get(who).copied().unwrap_or_default();
        eprintln!("{who:?}: {rss_before} -> {rss} KiB, {open_before} -> {open} descriptors, third and fourth quarter");
        // The serving process of one may have been young through the third quarter.
        let young = |most: fn(&(u64, u64)) -> u64| third.iter().filter(|((_, what), _)| *what == who.1).map(|(_, size)| most(size)).max();
        let (rss_most, open_most) = (young(|size| size.0).unwrap_or(0), young(|size| size.1).unwrap_or(0));
        assert!(*rss <= rss_most + rss_most / 10 + 4096, "{who:?} has grown: {rss} KiB, all were at most {rss_most} before");
        assert!(*open <= open_most + 32, "{who:?} has {open} descriptors open, all had at most {open_most} before");
    }
    let known = site.known.lock();
    let mut files = 0;
    for machine in &site.machines {
        machine.poolfs(&["verify"]).ok();
        assert_eq!(machine.status().archives().damaged, 0);
        for name in listed(&machine.archives()).into_iter().filter(|name| name.ends_with(".deb")) {
            assert_holds(&machine.archives().join(&name), &known[&name]);
            files += 1;
        }
    }
    let said = format!(
        "{rounds} rounds with {kills:?} killed and a liar asked {lies} times: {} commands of apt on {MACHINES} machines ended with 0, {} of \
         them at the second try, {files} files are as signed",
        site.commands.load(Ordering::Relaxed),
        site.tried_again.load(Ordering::Relaxed),
    );
    report("soak::everyday", &said);
    eprintln!("{said}");
    drop(known);
    crowd.machines = site.machines;
}

/// An hour of it; run by `scripts/soak lab`.
#[test]
#[ignore = "takes long: scripts/soak lab"]
fn an_hour() {
    everyday(1, 180);
}

/// Enough of it to see that the hour would work; run by `scripts/soak lab-short`.
#[test]
#[ignore = "measures real time: scripts/soak lab-short"]
fn a_minute() {
    everyday(2, 4);
}
