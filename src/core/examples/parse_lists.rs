//! Times the catalog on a copy of a machine's lists: `parse_lists DIRECTORY [SOURCES...]`.
//!
//! Prints the seconds of a first refresh into a new database (SQLite included), of one that finds nothing changed, of
//! opening the filled catalog, the microseconds of lookups, and the peak RSS. `SOURCES` are sources files; without them apt's own are read.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a measuring program for people")]

use poolfs_core::Db;
use poolfs_core::catalog::{AptConfig, Catalog, Vanished};
use std::fs::File;
use std::os::fd::AsFd as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Processor time that this process has used, which a busy machine does not stretch.
fn processor() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).unwrap())
}

fn main() {
    let mut arguments = std::env::args_os().skip(1).map(PathBuf::from);
    let directory = arguments.next().expect("usage: parse_lists DIRECTORY [SOURCES...]");
    let sources: Vec<PathBuf> = arguments.collect();
    let scratch = tempfile::tempdir().unwrap();
    let lists = File::open(&directory).unwrap();
    let database = scratch.path().join("poolfs.db");

    let start = Instant::now();
    let apt = AptConfig::load(&sources, None).unwrap();
    println!("apt's configuration: {:.3} s, {} sources", start.elapsed().as_secs_f64(), apt.sources().sources.len());

    let catalog = Catalog::open(Arc::new(Db::open(&database).unwrap()), apt.clone()).unwrap();
    for what in ["first refresh", "second refresh"] {
        let (start, before) = (Instant::now(), processor());
        let done = catalog.refresh(lists.as_fd(), Vanished::Drop).unwrap();
        let (seconds, processor) = (start.elapsed().as_secs_f64(), (processor() - before).as_secs_f64());
        let entries = catalog.len();
        println!("{what}: {seconds:.3} s ({processor:.3} s of processor), {} parsed, {} kept, {entries} entries", done.parsed, done.kept);
        for line in done.problems.iter().chain(&done.missing) {
            println!("  {line}");
        }
    }
    drop(catalog);

    let start = Instant::now();
    let catalog = Catalog::open(Arc::new(Db::open(&database).unwrap()), apt).unwrap();
    println!("open the filled catalog: {:.3} s, database {} bytes", start.elapsed().as_secs_f64(), database.metadata().unwrap().len());

    let names: Vec<String> = ["hello", "libc6", "vim", "bash", "no-such"]
        .iter()
        .flat_map(|package| catalog.versions(package).unwrap())
        .map(|entry| entry.name)
        .collect();
    let start = Instant::now();
    let rounds: u32 = 1000;
    for _ in 0..rounds {
        for name in &names {
            assert!(catalog.archive(name.as_bytes()).unwrap().is_some(), "{name}");
        }
    }
    let lookups = rounds * u32::try_from(names.len()).unwrap().max(1);
    println!("lookup: {:.1} us", start.elapsed().as_secs_f64() * 1e6 / f64::from(lookups));
    for name in names.iter().take(1) {
        println!("{:?}", catalog.archive(name.as_bytes()).unwrap().unwrap());
    }
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    for line in status.lines().filter(|line| line.starts_with("VmHWM") || line.starts_with("VmRSS")) {
        println!("{line}");
    }
}
