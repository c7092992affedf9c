//! What people see: the one place that prints.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "the commands' output goes through here")]

use crate::control::{Download, InstallStatus, Status, UpdateStatus, Verified};
use anyhow::Result;
use indicatif::{HumanBytes, HumanDuration, MultiProgress, ProgressBar, ProgressStyle};
use poolfs_core::discretion::Rule;
use serde::Serialize;
use std::collections::{BTreeMap, HashMap};
use std::io::IsTerminal;
use std::time::Duration;

/// An error with its causes on one line.
pub fn error(err: &anyhow::Error) {
    error_of("poolfs", err);
}

/// As [`error`], by the name that the program was called by.
pub fn error_of(program: &str, err: &anyhow::Error) {
    eprintln!("{program}: {err:#}");
}

/// A line of plain text.
pub fn line(text: &str) {
    println!("{text}");
}

/// One JSON document on one line.
pub fn json(value: &impl Serialize) -> Result<()> {
    println!("{}", serde_json::to_string(value)?);
    Ok(())
}

/// The status, for people.
pub fn status(status: &Status) {
    println!("poolfs {}, pid {}, up {}", status.version, status.pid, HumanDuration(Duration::from_secs(status.uptime_s)));
    for mount in &status.mounts {
        println!("{}  {}", mount.path.display(), mount.role);
        println!("  {} files, {}; {} opened before they were here", mount.files, HumanBytes(mount.bytes), mount.ghosts_opened);
        println!(
            "  {} announced, {} available, {} local-only, {} withheld{}",
            mount.announced,
            mount.available,
            mount.local_only,
            mount.withheld,
            withheld_by(&mount.withheld_by)
        );
        if mount.damaged > 0 {
            println!("  {} DAMAGED: run `poolfs verify --repair`", mount.damaged);
        }
        if mount.blocks_bad > 0 {
            println!("  {} blocks failed their checksum at a read, {} were mended", mount.blocks_bad, mount.blocks_mended);
        }
    }
    if status.mounts.is_empty() {
        println!("nothing is mounted");
    }
    println!(
        "catalog: {} packages; objects: {} of {}",
        status.catalog_entries,
        HumanBytes(status.objects_bytes),
        HumanBytes(status.objects_quota_bytes)
    );
    if status.objects_short_bytes > 0 {
        println!(
            "  kept packages leave a tenth of the disk free, at most 8 GiB: {} more would have to be, and until then none is kept",
            HumanBytes(status.objects_short_bytes)
        );
    }
    let bytes = status.bytes;
    println!(
        "received: {} from mirrors, {} from peers, {} made from deltas ({} saved); {} deltas for others{}",
        HumanBytes(bytes.mirror),
        HumanBytes(bytes.peer),
        HumanBytes(bytes.delta),
        HumanBytes(status.delta_saved_bytes),
        status.deltas_offered,
        if status.deltas_to_make > 0 { format!(", {} to be made", status.deltas_to_make) } else { String::new() }
    );
    if let Some(update) = &status.last_update {
        println!("{}", update_line(update));
    }
    if let Some(install) = &status.last_install {
        println!("{}", install_line(install));
    }
    for download in &status.downloads {
        println!("  {}", download_line(download));
    }
    let given = &status.uploaded;
    if !given.listening.is_empty() {
        println!(
            "given: {} to peers, {} of it outside; {} requests, {} turned away",
            HumanBytes(given.bytes),
            HumanBytes(given.bytes_outside),
            given.answered,
            given.refused
        );
    }
    if let Some(why) = &status.upload_paused {
        println!("given outside: nothing now: {why}");
    }
    if let Some(node) = &status.node {
        let families: Vec<_> = [&node.v4, &node.v6].into_iter().flatten().collect();
        let (known, poolfs) = families.iter().fold((0, 0), |(known, poolfs), family| (known + family.nodes, poolfs + family.poolfs));
        println!("network: {known} nodes known, {poolfs} of them poolfs; {} files announced", node.announced_keys);
    }
    if status.fleet_members > 0 {
        println!("fleet: {} members with this machine", status.fleet_members);
    }
    if let Some(page) = status.page {
        println!("page: http://{page}/");
    }
    for advisories in &status.advisories {
        println!("advisories: {advisories}");
    }
    for problem in &status.problems {
        println!("problem: {problem}");
    }
}

/// ` (3 superseded, 1 security)`, or nothing.
fn withheld_by(rules: &BTreeMap<Rule, u64>) -> String {
    let counts: Vec<String> = rules.iter().map(|(rule, files)| format!("{files} {rule}")).collect();
    if counts.is_empty() { String::new() } else { format!(" ({})", counts.join(", ")) }
}

fn update_line(update: &UpdateStatus) -> String {
    let UpdateStatus { bytes, kept_bytes, apt_bytes, indexes, patches, .. } = update;
    format!(
        "{}: {indexes} indexes and {patches} patches in {}.{:01} s; {} from mirrors, {} from peers, {} from deltas, {} kept here, {} by apt itself",
        if update.running { "update that runs" } else { "last update" },
        update.took_ms / 1000,
        update.took_ms % 1000 / 100,
        HumanBytes(bytes.mirror),
        HumanBytes(bytes.peer),
        HumanBytes(bytes.delta),
        HumanBytes(*kept_bytes),
        HumanBytes(*apt_bytes)
    )
}

fn install_line(install: &InstallStatus) -> String {
    let InstallStatus { bytes, kept_bytes, apt_bytes, packages, .. } = install;
    format!(
        "{}: {packages} packages in {}.{:01} s; {} from mirrors, {} from peers, {} from deltas, {} kept here, {} by apt itself",
        if install.running { "install that runs" } else { "last install" },
        install.took_ms / 1000,
        install.took_ms % 1000 / 100,
        HumanBytes(bytes.mirror),
        HumanBytes(bytes.peer),
        HumanBytes(bytes.delta),
        HumanBytes(*kept_bytes),
        HumanBytes(*apt_bytes)
    )
}

fn download_line(download: &Download) -> String {
    format!(
        "{}: {} of {} at {}/s from {}",
        download.name,
        HumanBytes(download.done_bytes),
        HumanBytes(download.size),
        HumanBytes(download.rate_bytes_s),
        if download.givers.is_empty() { "nobody yet".to_owned() } else { download.givers.join(", ") }
    )
}

/// What `verify` found.
pub fn verified(found: &Verified) {
    println!("{} files, {} read", found.files, HumanBytes(found.bytes));
    found.mended.iter().for_each(|name| println!("mended {name}"));
    found.dropped.iter().for_each(|name| println!("dropped {name}"));
    found.damaged.iter().for_each(|name| println!("damaged {name}"));
    found.problems.iter().for_each(|problem| println!("problem {problem}"));
}

/// A bar over bytes; invisible where standard error is no terminal.
pub fn byte_bar() -> ProgressBar {
    let bar = ProgressBar::new(0);
    bar.set_style(bar_style("{bar:30} {bytes:>10} of {total_bytes:10} {eta:>4} {wide_msg}"));
    bar
}

fn bar_style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).expect("the template is a constant")
}

/// Bars of downloads in progress, one each, that come and go; lines where there is no terminal.
#[derive(Debug, Default)]
pub struct Bars {
    all: MultiProgress,
    shown: HashMap<String, ProgressBar>,
    lines: HashMap<String, u64>,
}

impl Bars {
    /// Shows the state of now.
    pub fn update(&mut self, downloads: &[Download]) {
        if !std::io::stderr().is_terminal() {
            return self.update_lines(downloads);
        }
        self.shown.retain(|digest, bar| {
            let stays = downloads.iter().any(|download| download.digest == *digest);
            if !stays {
                bar.finish_and_clear();
            }
            stays
        });
        for download in downloads {
            let bar = self.shown.entry(download.digest.clone()).or_insert_with(|| {
                let bar = self.all.add(ProgressBar::new(download.size));
                bar.set_style(bar_style("{bar:20} {bytes:>10} of {total_bytes:10} {prefix:>12} {wide_msg}"));
                bar
            });
            bar.set_position(download.done_bytes);
            bar.set_prefix(format!("{}/s", HumanBytes(download.rate_bytes_s)));
            bar.set_message(format!("{} {}", download.name, download.givers.join(", ")));
        }
    }

    fn update_lines(&mut self, downloads: &[Download]) {
        self.lines.retain(|digest, _| downloads.iter().any(|download| download.digest == *digest));
        for download in downloads {
            if self.lines.insert(download.digest.clone(), download.done_bytes) != Some(download.done_bytes) {
                println!("{}", download_line(download));
            }
        }
    }
}
