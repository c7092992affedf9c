//! What poolfs takes of a machine: memory and processor time, idle, and while its packages arrive.

use super::outcome::{Contender, Figure, Outcome};
use super::raw::cpu_seconds;
use super::scenario::Scenario;
use super::{contender, crowd, is_package, limit, line_of, up, warm_up};
use crate::harness::crowd::{Crowd, Terms};
use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Between two looks at the memory of a machine that works.
const LOOK: Duration = Duration::from_millis(100);

/// Proportional memory of these processes together; one that has ended has none.
pub(crate) fn pss_bytes(pids: &[u32]) -> u64 {
    let of = |pid: &u32| {
        let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?;
        let line = text.lines().find_map(|line| line.strip_prefix("Pss:"))?;
        Some(line.trim().trim_end_matches(" kB").trim().parse::<u64>().ok()? * 1024)
    };
    pids.iter().filter_map(of).sum()
}

#[allow(clippy::cast_precision_loss, reason = "figures to print")]
fn mb(bytes: u64) -> f64 {
    bytes as f64 / 1e6
}

/// Idle with the lists of the real archive where the scenario has no packages, otherwise what arrives from its warm neighbours.
pub(crate) fn play(scenario: &Scenario, idle_s: u64) -> Outcome {
    if idle_s > 0 { idle(Duration::from_secs(idle_s)) } else { arrival(scenario) }
}

fn idle(window: Duration) -> Outcome {
    let crowd = Crowd::debian(1, &[], &Terms::default());
    let machine = &crowd.machines[0];
    machine.up();
    machine.update();
    let pids = machine.pids();
    assert!(!pids.is_empty(), "a daemon runs");
    let before = cpu_seconds(&pids);
    let fresh = pss_bytes(&pids);
    // The window is what is measured.
    std::thread::sleep(window);
    assert_eq!(machine.pids(), pids, "the same processes to the end");
    let percent = (cpu_seconds(&pids) - before) * 100.0 / window.as_secs_f64();
    let figures = vec![
        Figure::new("processes of poolfs", f64::from(u32::try_from(pids.len()).unwrap()), ""),
        Figure::new("memory after an update of the real lists (PSS)", mb(fresh), "MB"),
        Figure::new("idle memory (PSS)", mb(pss_bytes(&pids)), "MB"),
        Figure::new("idle processor time", percent, "% of one processor"),
    ];
    Outcome { figures, ..Outcome::default() }
}

fn arrival(scenario: &Scenario) -> Outcome {
    let crowd = crowd(scenario);
    let (warm, fleet) = (scenario.machines.warm, scenario.machines.fleet);
    warm_up(&crowd, scenario);
    limit(&crowd, scenario);
    up(&crowd.machines[warm..], fleet, crowd.machines.len());
    crowd.mirror.forget_log();
    let machine = &crowd.machines[warm];
    let pids = machine.pids();
    let (done, before) = (AtomicBool::new(false), pss_bytes(&pids));
    let (ended, peak) = std::thread::scope(|scope| {
        let look = scope.spawn(|| {
            let mut peak = 0;
            while !done.load(Ordering::Relaxed) {
                peak = peak.max(pss_bytes(&pids));
                // How often memory is looked at is part of the measurement.
                std::thread::sleep(LOOK);
            }
            peak
        });
        let began = Instant::now();
        let finished = crowd.start_download_on(machine).wait().ok();
        let ended = (finished, began.elapsed());
        done.store(true, Ordering::Relaxed);
        (ended, look.join().expect("it only looks"))
    });
    crowd.assert_as_signed(machine);
    let line = line_of(&crowd, warm, &ended, is_package);
    let after = pss_bytes(&machine.pids());
    let bytes = crowd.plan_bytes();
    let contenders: Vec<Contender> = vec![contender(&crowd, "poolfs", bytes, vec![line], is_package)];
    let figures = vec![
        Figure::new("memory before (PSS)", mb(before), "MB"),
        Figure::new("most memory while it arrives (PSS)", mb(peak), "MB"),
        Figure::new("memory after (PSS)", mb(after), "MB"),
    ];
    Outcome { wanted_bytes: bytes, verified: crowd.names.len(), contenders, figures, ..Outcome::default() }
}
