//! Lines of `/etc/fstab` for poolfs.

use super::{Doctor, quoted};
use crate::mount_words::Words;
use poolfs_core::Role;
use std::path::Path;

const FSTAB: &str = "/etc/fstab";

/// What mounting has to come before.
const BEFORE: [&str; 2] = ["x-systemd.before=apt-daily.service", "x-systemd.before=apt-daily-upgrade.service"];

pub(super) fn look(doctor: &mut Doctor<'_>) {
    let Ok(text) = std::fs::read_to_string(FSTAB) else { return };
    for (number, line) in text.lines().enumerate().map(|(index, line)| (index + 1, line.trim())) {
        let fields: Vec<&str> = line.split_whitespace().collect();
        if let [what, dir, kind @ ("poolfs" | "fuse.poolfs"), options, ..] = fields.as_slice()
            && !what.starts_with('#')
        {
            helper(doctor, kind);
            role(doctor, number, what, dir);
            options_of(doctor, number, dir, options);
        }
    }
}

fn helper(doctor: &mut Doctor<'_>, kind: &str) {
    let helper = Path::new("/sbin").join(format!("mount.{kind}"));
    let told = doctor.found.iter().any(|finding| finding.problem.starts_with(&helper.display().to_string()));
    if helper.exists() || told {
        return;
    }
    let program = std::env::current_exe().unwrap_or_else(|_| "/usr/bin/poolfs".into());
    let problem = format!("{} is missing, by which mount(8) mounts what {FSTAB} says", helper.display());
    doctor.find("fstab", problem, format!("ln -sf {} {}", quoted(&program), quoted(&helper)));
}

fn role(doctor: &mut Doctor<'_>, number: usize, what: &str, dir: &str) {
    if Role::from_word(what).is_some() {
        return;
    }
    let right = if dir.contains("lists") { Role::Lists } else { Role::Archives };
    let problem = format!("{FSTAB}:{number}: `{what}` is not a role: archives or lists");
    doctor.find("fstab", problem, replace(number, what, right.as_str()));
}

fn options_of(doctor: &mut Doctor<'_>, number: usize, dir: &str, options: &str) {
    let words: Vec<&str> = options.split(',').filter(|word| !word.is_empty()).collect();
    let mut problem = |problem: String, words: Vec<&str>| {
        let words = if words.is_empty() { "defaults".to_owned() } else { words.join(",") };
        doctor.find("fstab", format!("{FSTAB}:{number}: {dir}: {problem}"), replace(number, options, &words));
    };
    if let Ok(Words { unknown, .. }) = Words::read(words.iter().copied())
        && let Some(bad) = unknown.first()
    {
        // One after the other: each remedy replaces the options as they are now.
        let rest = words.iter().copied().filter(|word| word != bad).collect();
        return problem(format!("unknown mount option `{bad}`"), rest);
    }
    if words.contains(&"_netdev") {
        let rest = words.iter().copied().filter(|word| *word != "_netdev").collect();
        return problem("`_netdev` lets apt's files wait for the network, which the mount does not need".to_owned(), rest);
    }
    if !words.contains(&"nofail") && !words.contains(&"noauto") {
        let all = words.iter().copied().chain(["nofail"]).collect();
        return problem("without `nofail` the machine does not boot when it cannot be mounted".to_owned(), all);
    }
    let missing: Vec<&str> = BEFORE.into_iter().filter(|word| !words.contains(word)).collect();
    if !missing.is_empty() {
        let all = words.iter().copied().chain(missing).collect();
        problem("apt's own timers may run while it is being mounted".to_owned(), all);
    }
}

/// Replaces one field of a line.
fn replace(number: usize, old: &str, new: &str) -> String {
    let escaped = |text: &str, special: &str| {
        text.chars().fold(String::new(), |mut out, c| {
            if special.contains(c) {
                out.push('\\');
            }
            out.push(c);
            out
        })
    };
    let script = format!("{number}s|{}|{}|", escaped(old, "\\.*[]^$|"), escaped(new, "\\&|"));
    format!("sed -i '{}' {FSTAB}", script.replace('\'', "'\\''"))
}
