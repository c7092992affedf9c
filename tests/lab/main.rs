//! The laboratory: machines as network namespaces on one wire, real apt on each, and what it cost.
//!
//! `scripts/lab list` names the scenarios, `scripts/lab run NAME` plays one; with `--json` it prints what it counted as
//! one document. Everything it made goes with it, however it ends: see [`cage`].
#![allow(clippy::unwrap_used, clippy::print_stdout, clippy::print_stderr, reason = "a laboratory, not a product")]
#![allow(dead_code, unused_imports, reason = "the harness is that of the end-to-end tests")]

mod cage;
#[path = "lab.rs"]
mod lab;
#[path = "../it"]
mod tests {
    pub(crate) mod harness;
}

use lab::scenario;
use std::process::ExitCode;
pub(crate) use tests::harness;

const USAGE: &str = "usage: scripts/lab list | scripts/lab run SCENARIO... [--json FILE] [--set KEY=VALUE]...";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["list"] => {
            for scenario in scenario::all() {
                println!("{:24}{}", scenario.name, scenario.about);
            }
            ExitCode::SUCCESS
        }
        ["run", ..] => match Wanted::of(&arguments[1..]) {
            Ok(_) => cage::run(&arguments),
            Err(error) => refuse(&error),
        },
        [cage::INSIDE, ..] => {
            cage::enter();
            match Wanted::of(&arguments[2..]) {
                Ok(wanted) => wanted.play(),
                Err(error) => refuse(&error),
            }
        }
        [cage::WATCH, directory] => cage::watch(directory.as_ref()),
        _ => refuse(USAGE),
    }
}

fn refuse(why: &str) -> ExitCode {
    eprintln!("{why}");
    ExitCode::from(2)
}

/// What `run` was asked for.
struct Wanted {
    scenarios: Vec<scenario::Scenario>,
    json: Option<String>,
}

impl Wanted {
    fn of(words: &[String]) -> Result<Self, String> {
        let (mut names, mut json, mut instead) = (Vec::new(), None, Vec::new());
        let mut words = words.iter();
        while let Some(word) = words.next() {
            let mut value = || words.next().cloned().ok_or_else(|| format!("{word} wants a value\n{USAGE}"));
            match word.as_str() {
                "--json" => json = Some(value()?),
                "--set" => instead.push(value()?),
                _ if word.starts_with('-') => return Err(format!("{word} is not known\n{USAGE}")),
                name => names.push(name),
            }
        }
        if names.is_empty() {
            return Err(USAGE.to_owned());
        }
        let scenarios = names.iter().map(|name| scenario::load(name, &instead)).collect::<Result<_, _>>()?;
        Ok(Self { scenarios, json })
    }

    fn play(self) -> ExitCode {
        let mut all = Vec::new();
        for scenario in &self.scenarios {
            let outcome = lab::play(scenario);
            outcome.show();
            all.push(outcome);
        }
        if let Some(file) = &self.json {
            std::fs::write(file, serde_json::to_string_pretty(&all).unwrap()).unwrap_or_else(|error| panic!("write {file}: {error}"));
        }
        ExitCode::SUCCESS
    }
}
