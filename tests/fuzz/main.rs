//! Fuzzing: everything that reads what strangers, apt or a disk may have written, fed with damaged and arbitrary input.
//!
//! `scripts/fuzz --list` names the targets, `scripts/fuzz NAME [--seconds N] [--seed S]` fuzzes one, `scripts/fuzz all` each
//! after the other, `scripts/fuzz NAME FILE...` runs the inputs of files. A target with a file in `targets/` is a function
//! from bytes to a number for what it saw; it asserts what must hold for every input. Small corpora lie in `corpus/NAME/`,
//! `crash-*` is what once broke it.
#![allow(clippy::unwrap_used, clippy::print_stdout, clippy::print_stderr, reason = "a test, and its output is its purpose")]

mod coverage;
mod driver;
mod memory;
mod targets;

/// Modules of the binary, which has no library: what they parse is fuzzed, most of them is not used here.
#[path = "../../src"]
#[allow(dead_code, unused_imports, unreachable_pub, reason = "the modules are those of the binary")]
mod binary {
    pub(crate) mod config;
    pub(crate) mod control;
    pub(crate) mod deltas {
        pub(crate) mod offers;
    }
    pub(crate) mod quiet;
    pub(crate) mod sys;
    pub(crate) mod wire;
}
use binary::{config, control, deltas, quiet, sys, wire};

/// What the configuration asks of another module of the binary.
mod advisories {
    /// Whether an advisory is to be fetched.
    pub(crate) fn is_url(text: &str) -> bool {
        ["http://", "https://"].iter().any(|scheme| text.starts_with(scheme))
    }
}

use driver::Target;
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

/// Address space of a child: threads and arenas reserve some, what an input makes it allocate must not come near.
const ADDRESS_SPACE_BYTES: u64 = 8 << 30;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match Asked::of(&arguments) {
        Ok(asked) => asked.run(),
        Err(message) => {
            eprintln!("{message}\nusage: scripts/fuzz --list | NAME|all [--seconds N] [--seed S] | NAME FILE...");
            ExitCode::from(2)
        }
    }
}

/// What the command line says.
struct Asked {
    list: bool,
    /// This process is the child that runs the inputs.
    child: bool,
    targets: Vec<&'static Target>,
    seconds: u64,
    seed: u64,
    files: Vec<PathBuf>,
}

impl Asked {
    fn of(arguments: &[String]) -> Result<Self, String> {
        let mut asked = Self { list: arguments.is_empty(), child: false, targets: Vec::new(), seconds: 60, seed: 1, files: Vec::new() };
        let mut words = arguments.iter().map(String::as_str);
        while let Some(word) = words.next() {
            let mut number = || words.next().and_then(|n| n.parse().ok()).ok_or(format!("{word} wants a number"));
            match word {
                "--list" => asked.list = true,
                "--child" => asked.child = true,
                "--seconds" => asked.seconds = number()?,
                "--seed" => asked.seed = number()?,
                "all" => asked.targets.extend(targets::all()),
                name if asked.targets.is_empty() => {
                    let target = targets::all().find(|target| target.name == name);
                    asked.targets.push(target.ok_or(format!("no target is called {name}: see scripts/fuzz --list"))?);
                }
                file => asked.files.push(file.into()),
            }
        }
        Ok(asked)
    }

    fn run(&self) -> ExitCode {
        if self.list {
            targets::all().for_each(|target| println!("{:16}{}", target.name, target.about));
            return ExitCode::SUCCESS;
        }
        if self.child {
            let target = self.targets[0];
            let limit = Some(ADDRESS_SPACE_BYTES);
            rustix::process::setrlimit(rustix::process::Resource::As, rustix::process::Rlimit { current: limit, maximum: limit })
                .expect("a limit may be lowered");
            return match self.files.as_slice() {
                [] => driver::fuzz(target, Duration::from_secs(self.seconds), self.seed),
                files => driver::replay(target, files),
            };
        }
        let broken: Vec<&str> = self.targets.iter().filter(|target| !self.in_child(target)).map(|target| target.name).collect();
        if broken.is_empty() {
            return ExitCode::SUCCESS;
        }
        println!("found something: {}", broken.join(" "));
        ExitCode::FAILURE
    }

    /// Whether the target withstood.
    fn in_child(&self, target: &Target) -> bool {
        let mut child = Command::new(std::env::current_exe().expect("this program"))
            .args(["--child", target.name, "--seconds", &self.seconds.to_string(), "--seed", &self.seed.to_string()])
            .args(&self.files)
            .stdin(Stdio::null())
            .spawn()
            .expect("a child");
        let pid = child.id();
        let status = child.wait().expect("the child ends");
        let current = driver::take_current(target, pid);
        match status.code() {
            Some(0) => return true,
            Some(code) if code == i32::from(driver::EXIT_FOUND) => {}
            code => {
                let what = match code {
                    Some(code) if code == i32::from(driver::EXIT_SLOW) => "does not end".to_owned(),
                    _ => format!("the process died: {status}"),
                };
                let input = current.unwrap_or_default();
                driver::report(target, &input, &what, &format!("seed {}", self.seed));
            }
        }
        false
    }
}
