//! A long life: everything that happens to a machine, in an order that nobody thought of.

use crate::harness::{Client, Covered, Fault, Options, Package, Stage, assert_holds, forget_pages, report, run};
use rustix::process::{Pid, Signal, kill_process};
use std::collections::BTreeMap;
use std::process::Command;

/// xorshift64*: the same order for the same seed on every machine.
struct Dice(u64);

impl Dice {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % bound
    }
}

const NAMES: &[&str] = &["ant", "bee", "cat", "dog", "eel", "fox"];

fn churn(seed: u64, steps: u64) {
    let mut dice = Dice(seed | 1);
    let length = |dice: &mut Dice| usize::try_from(dice.below(900_000)).unwrap();
    let packages = NAMES.iter().map(|name| Package::new(name, "1", length(&mut dice))).collect();
    let mut stage = Stage::new(packages, &Options::default());
    let covered = Covered::open(&stage.machine.archives());
    stage.machine.up();
    stage.machine.update();
    let mut version = 1;
    let mut told = Vec::new();
    // What may lie in archives/ under a name, now and from earlier versions.
    let mut known: BTreeMap<String, Vec<u8>> =
        stage.packages.iter().map(|published| (published.archive_name(), published.bytes.clone())).collect();
    for step in 0..steps {
        let chosen = usize::try_from(dice.below(NAMES.len() as u64)).unwrap();
        let published = stage.packages[chosen].clone();
        let name = NAMES[chosen];
        let what = dice.below(10);
        told.push(format!("{what}:{name}"));
        eprintln!("seed {seed} step {step}: {what} {name}");
        match what {
            0 => {
                version += 1;
                stage.repo.withdraw(name);
                let newer = stage.repo.add(Package::new(name, &version.to_string(), length(&mut dice)));
                known.insert(newer.archive_name(), newer.bytes.clone());
                stage.packages[chosen] = newer;
                stage.repo.publish();
                stage.machine.update();
            }
            1 | 2 => {
                let finished = stage.machine.apt_get(&["install", "-y", "-d", "--reinstall", name]).ok();
                assert_eq!(finished.deb_gets(), Vec::<&str>::new(), "{finished}");
                assert_holds(&stage.archive(&published), &published.bytes);
            }
            3 => drop(run(&mut stage.machine.command("apt", &["install", "-y", "--reinstall", name])).ok()),
            4 => drop(run(Command::new("cat").arg(stage.archive(&published)).stdout(std::process::Stdio::null())).ok()),
            5 => drop(stage.machine.apt_get(&[if dice.below(2) == 0 { "clean" } else { "autoclean" }]).ok()),
            6 => {
                let old = stage.machine.status().pid;
                kill_process(Pid::from_raw(i32::try_from(old).unwrap()).unwrap(), Signal::KILL).unwrap();
                stage.machine.await_mounted_again(old);
            }
            7 => {
                stage.machine.down();
                stage.machine.up();
            }
            8 if stage.debs().contains(&published.archive_name()) => {
                covered.flip(&published.archive_name(), dice.below(published.bytes.len() as u64));
                forget_pages(&stage.archive(&published));
            }
            _ => {
                stage.mirror.fault_times(".deb", Client::Poolfs, Fault::Reset(40_000), 1);
                let finished = stage.machine.apt_get(&["install", "-y", "-d", "--reinstall", name]).ok();
                stage.mirror.heal();
                assert!(finished.deb_gets().len() <= 1, "{finished}");
            }
        }
        stage.machine.assert_mounted();
        for name in stage.debs() {
            assert_holds(&stage.machine.archives().join(&name), &known[&name]);
        }
    }
    stage.machine.poolfs(&["verify", "--repair"]).ok();
    stage.machine.down();
    for name in stage.debs() {
        assert_holds(&stage.machine.archives().join(&name), &known[&name]);
    }
    report("churn", &format!("seed {seed}, {steps} steps ({}), every file right after each", told.join(" ")));
}

/// Each part may be right alone and wrong after another: a file that came back, a record of a file that is gone, a lock left.
#[test]
fn churn_short() {
    churn(20_261_122, 16);
}

/// The same for long; run by `scripts/soak churn`.
#[test]
#[ignore = "takes long: scripts/soak churn"]
fn churn_long() {
    for seed in 1..=10 {
        churn(seed, 100);
    }
}
