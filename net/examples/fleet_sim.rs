//! Prints what a fleet costs the mirror and its machines, beside the figures of the design. See `scripts/bench fleet`.
#![allow(clippy::print_stdout, reason = "the table is the output")]

use poolfs_net::swarm::fleet::sim::{Roads, Scenario, run};
use std::time::{Duration, Instant};

const GBIT: f64 = 125e6;

fn main() {
    let full = !std::env::args().any(|arg| arg == "--quick");
    let base = Scenario {
        machines: 16,
        small: false,
        mirror_bytes_s: GBIT,
        link_bytes_s: GBIT,
        mirror_latency: Duration::from_millis(30),
        start_within: Duration::from_secs(1),
        dying_percent: 0,
        roads: Roads::default(),
    };
    let thousand = Scenario { machines: 1_000, ..base };
    let small = Scenario { small: true, ..thousand };
    let minute = Duration::from_secs(60);
    let roads = Roads { queue: Duration::from_millis(200), tcp: true, files_at_once: 8 };
    let shaped = Scenario { mirror_bytes_s: GBIT / 20.0, link_bytes_s: GBIT / 20.0, roads, ..base };
    let rows = [
        ("16, plan, WAN 1 Gbit/s", base, "1.00x, max 2.4 s, up 118/149 MB", true),
        ("4, plan, all 50 Mbit/s, queues", Scenario { machines: 4, ..shaped }, "<= 1.1x, max 30 s", true),
        ("8, plan, all 50 Mbit/s, queues", Scenario { machines: 8, ..shaped }, "<= 1.1x, max 30 s", true),
        ("16, plan, all 50 Mbit/s, queues", shaped, "<= 1.1x, max 30 s", true),
        ("16, small, same second", Scenario { small: true, ..base }, "<= 1.05x, up <= 16 plans", true),
        ("1,000, small, same second", small, "1.00x, 0.27 s, up <= 14 MB", true),
        ("1,000, small, mirror after 3 s", Scenario { mirror_latency: Duration::from_secs(3), ..small }, "<= 1.05x, up <= 16 plans", true),
        ("1,000, small, 100 Mbit/s machines", Scenario { link_bytes_s: GBIT / 10.0, ..small }, "1.00x, 1.7 s", true),
        ("1,000, small, within 60 s", Scenario { start_within: minute, ..small }, "1.00x", true),
        ("1,000, plan, WAN 1 Gbit/s", thousand, "1.00x, p50 1.9, max 2.4 s, up 125/173 MB", full),
        ("1,000, plan, 5 % die", Scenario { dying_percent: 5, ..thousand }, "1.02x, p50 2.7 s", full),
        ("1,000, plan, WAN 100 Mbit/s", Scenario { mirror_bytes_s: GBIT / 10.0, ..thousand }, "1.00x, max 11.2 s, up 125/187 MB", full),
        (
            "1,000, plan, 100 Mbit/s, 60 s",
            Scenario { mirror_bytes_s: GBIT / 10.0, start_within: minute, ..thousand },
            "1.00-1.23x, up <= 980 MB",
            full,
        ),
        (
            "1,000, plan, 100 Mbit/s, 60 s, 5 %",
            Scenario { mirror_bytes_s: GBIT / 10.0, start_within: minute, dying_percent: 5, ..thousand },
            "1.00-1.23x, up <= 980 MB",
            full,
        ),
    ];
    println!(
        "{:<35} {:>7} {:>7} {:>7} {:>7} {:>9} {:>9} {:>6}  design",
        "machines", "mirror", "fetches", "p50 s", "max s", "up mean", "up max", "wants"
    );
    for (name, scenario, design, wanted) in rows {
        if !wanted {
            continue;
        }
        let began = Instant::now();
        let figures = run(&scenario);
        #[allow(clippy::cast_precision_loss, reason = "megabytes")]
        let up_max = figures.upload_max_bytes as f64 / 1e6;
        println!(
            "{name:<35} {:>6.3}x {:>7} {:>7.2} {:>7.2} {:>6.1} MB {up_max:>6.1} MB {:>6.0}  {design} ({:.0} s to compute)",
            figures.copies,
            figures.fetches_max,
            figures.p50_s,
            figures.max_s,
            figures.upload_mean_bytes / 1e6,
            figures.wants,
            began.elapsed().as_secs_f64(),
        );
    }
}
