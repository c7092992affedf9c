//! The laboratory: machines as network namespaces on one wire, real apt on each, and what it cost.
//!
//! `scripts/lab list` names the scenarios, `scripts/lab run NAME` plays one; with `--json` it prints what it counted as
//! one document. Everything it made goes with it, also when it is killed: namespaces and mounts hang on its own mount
//! namespace, and processes end with their machines.
#![allow(clippy::unwrap_used, clippy::print_stdout, clippy::print_stderr, reason = "a laboratory, not a product")]
#![allow(dead_code, unused_imports, reason = "the harness is that of the end-to-end tests")]

mod rivals;
mod scenarios;
#[path = "../it"]
mod tests {
    pub(crate) mod harness;
}

use scenarios::{Outcome, Scenario};
use std::process::ExitCode;
pub(crate) use tests::harness;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["list"] => all().for_each(|scenario| println!("{:24}{}", scenario.name, scenario.about)),
        ["run", name, more @ ..] => {
            let Some(scenario) = all().find(|scenario| scenario.name == *name) else {
                eprintln!("no scenario is called {name}: see `scripts/lab list`");
                return ExitCode::FAILURE;
            };
            let outcome = (scenario.play)();
            if more == ["--json"] {
                println!("{}", serde_json::to_string(&outcome).unwrap());
            } else {
                show(&outcome);
            }
        }
        _ => {
            eprintln!("usage: scripts/lab list | scripts/lab run SCENARIO [--json]");
            return ExitCode::from(2);
        }
    }
    ExitCode::SUCCESS
}

fn all() -> impl Iterator<Item = &'static Scenario> {
    scenarios::ALL.iter().chain(rivals::ALL)
}

fn show(outcome: &Outcome) {
    if !outcome.lines.is_empty() {
        show_machines(outcome);
    }
    for figure in &outcome.figures {
        let goal = if figure.goal.is_empty() { String::new() } else { format!("  (goal: {})", figure.goal) };
        println!("{:60} {:9.3} {}{goal}", figure.name, figure.value, figure.unit);
    }
}

fn show_machines(outcome: &Outcome) {
    println!(
        "{:>8} {:>5} {:>9} {:>14} {:>14} {:>14} {:>14}",
        "machine", "exit", "seconds", "mirror sent", "from mirror", "from peers", "given"
    );
    for line in &outcome.lines {
        println!(
            "{:>8} {:>5} {:>9.1} {:>14} {:>14} {:>14} {:>14}",
            line.machine, line.exit, line.seconds, line.mirror_bytes, line.from_mirror, line.from_peers, line.given
        );
    }
    println!("each wanted {} bytes; the mirror sent {:.2} copies; every file verified", outcome.wanted_bytes, outcome.copies);
}
