//! The mutation driver: changes inputs, keeps those that reach something new, and keeps what breaks a target.
//!
//! A target is run in a child process under a limit of address space. Before each execution the child leaves the input in
//! a file, so that the parent has it also when the child dies of its memory, its stack or a signal. A panic on any thread
//! counts, as does an execution that takes absurdly long. What was found is made smaller as long as it still breaks, written
//! to `target/fuzz/NAME-HASH`, and printed with the command that replays it.
//!
//! Which inputs are kept: a target returns a number that stands for what it saw (which error, which kinds of values, how
//! many); an input with a new number is mutated further. Built with coverage (`scripts/fuzz --coverage`), an input that
//! executed code that none before it did is kept too.

mod mutate;
mod watch;

use crate::{coverage, memory};
use mutate::Mutator;
use std::collections::BTreeSet;
use std::hash::{Hash, Hasher};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};
pub(crate) use watch::{EXIT_FOUND, EXIT_SLOW, Watch, take_current};

/// Inputs that are kept to be mutated.
const KEPT_MAX: usize = 8_192;

/// Time for making a found input smaller.
const SHRINK_FOR: Duration = Duration::from_secs(10);

/// What is fuzzed.
pub(crate) struct Target {
    /// As on the command line; also the folder of its corpus.
    pub(crate) name: &'static str,
    /// In one line, for `--list`.
    pub(crate) about: &'static str,
    /// Sets up what all inputs share. The number is the seed of the run, for what else is random.
    pub(crate) start: fn(u64) -> Box<dyn Subject>,
    /// Valid inputs, made by the code that writes them; more lie in the corpus.
    pub(crate) seeds: fn() -> Vec<Vec<u8>>,
    /// Words that mean something to it.
    pub(crate) tokens: &'static [&'static str],
    /// Longest input that is tried.
    pub(crate) input_bytes_max: usize,
    /// Bytes that one execution may have allocated at once: this many, and this many for each byte of input.
    pub(crate) memory: (usize, usize),
}

/// Takes inputs; a panic is a finding.
pub(crate) trait Subject {
    /// Runs one input and says what was seen: a number for each kind of behaviour.
    fn run(&mut self, input: &[u8]) -> u64;
}

impl<F: FnMut(&[u8]) -> u64> Subject for F {
    fn run(&mut self, input: &[u8]) -> u64 {
        self(input)
    }
}

/// A number for a kind of behaviour, made of whatever describes it.
pub(crate) fn behaviour(of: impl Hash) -> u64 {
    let mut hasher = std::collections::hash_map::DefaultHasher::new();
    of.hash(&mut hasher);
    hasher.finish()
}

/// The text of an error without its numbers and quoted parts: so that a kind of error is one behaviour.
pub(crate) fn kind_of(err: impl std::fmt::Display) -> String {
    let text = err.to_string();
    text.split(['"', '`', '\'']).step_by(2).flat_map(str::chars).filter(|c| !c.is_ascii_digit()).take(80).collect()
}

/// How many, coarsely: 0, 1, 2, then by powers of two. As part of a behaviour it tells none, one and many apart.
pub(crate) fn some(count: usize) -> u32 {
    usize::BITS - count.leading_zeros()
}

/// What one run of the driver did.
#[derive(Default)]
struct Tally {
    executions: u64,
    memory_peak: usize,
}

/// Fuzzes `target` for a time. Runs in the child; the exit code tells the parent whether an input was found.
pub(crate) fn fuzz(target: &Target, time: Duration, seed: u64) -> ExitCode {
    let watch = Watch::start(target);
    let mut run = Run { target, subject: (target.start)(seed), watch, seen: BTreeSet::new(), tally: Tally::default() };
    let mut mutator = Mutator::new(target, seed);
    let started = Instant::now();
    // Real inputs and everything that ever broke it come first, every time.
    for input in corpus(target).into_iter().map(|(_, bytes)| bytes).chain((target.seeds)()) {
        if let Err(what) = run.one(&input) {
            return run.found(input, &what, seed);
        }
        mutator.keep(input);
    }
    while run.tally.executions == 0 || started.elapsed() < time {
        let input = mutator.next();
        match run.one(&input) {
            Ok(true) if mutator.kept() < KEPT_MAX => mutator.keep(input),
            Ok(_) => {}
            Err(what) => return run.found(input, &what, seed),
        }
    }
    let Tally { executions, memory_peak } = run.tally;
    println!(
        "{}: {executions} executions in {} s, seed {seed}, {} inputs kept, {} behaviours{}, at most {} KiB at once: nothing found",
        target.name,
        started.elapsed().as_secs(),
        mutator.kept(),
        run.seen.len(),
        coverage::said(),
        memory_peak / 1024,
    );
    ExitCode::SUCCESS
}

/// Runs the inputs in the files once each, in order.
pub(crate) fn replay(target: &Target, files: &[PathBuf]) -> ExitCode {
    let watch = Watch::start(target);
    let mut run = Run { target, subject: (target.start)(1), watch, seen: BTreeSet::new(), tally: Tally::default() };
    for file in files {
        let input = std::fs::read(file).unwrap_or_else(|err| panic!("read {}: {err}", file.display()));
        if let Err(what) = run.one(&input) {
            println!("{}: {} still breaks: {what}", target.name, file.display());
            return ExitCode::from(EXIT_FOUND);
        }
    }
    println!("{}: {} executions of {} files: nothing found", target.name, run.tally.executions, files.len());
    ExitCode::SUCCESS
}

/// The files of the target's corpus.
pub(crate) fn corpus(target: &Target) -> Vec<(PathBuf, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/corpus").join(target.name);
    let Ok(entries) = folder.read_dir() else { return Vec::new() };
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.expect("the corpus can be listed").path()).collect();
    files.sort();
    files.into_iter().map(|path| (path.clone(), std::fs::read(&path).expect("the corpus can be read"))).collect()
}

struct Run<'a> {
    target: &'a Target,
    subject: Box<dyn Subject>,
    watch: Watch,
    seen: BTreeSet<u64>,
    tally: Tally,
}

impl Run<'_> {
    /// Executes one input: whether it showed something new, or what broke.
    fn one(&mut self, input: &[u8]) -> Result<bool, String> {
        self.watch.begin(input);
        memory::begin();
        let result = catch_unwind(AssertUnwindSafe(|| self.subject.run(input)));
        let peak = memory::peak();
        self.watch.end();
        self.tally.executions += 1;
        self.tally.memory_peak = self.tally.memory_peak.max(peak);
        if let Some(panic) = watch::take_panic() {
            return Err(panic);
        }
        let Ok(behaviour) = result else { return Err("panicked".into()) };
        let (all, each) = self.target.memory;
        if peak > all + each * input.len() {
            return Err(format!("allocated {peak} bytes at once for an input of {}, at most {all} + {each} a byte", input.len()));
        }
        Ok(self.seen.insert(behaviour) | coverage::is_new())
    }

    /// Makes what was found smaller, writes it down and says how to see it again.
    fn found(&mut self, mut input: Vec<u8>, what: &str, seed: u64) -> ExitCode {
        let until = Instant::now() + SHRINK_FOR;
        let mut part = input.len() / 2;
        while part > 0 && Instant::now() < until {
            let mut at = 0;
            while at < input.len() && Instant::now() < until {
                let mut less = input.clone();
                less.drain(at..(at + part).min(input.len()));
                self.subject = (self.target.start)(seed);
                if self.one(&less).is_err() {
                    input = less;
                } else {
                    at += part;
                }
            }
            part /= 2;
        }
        self.subject = (self.target.start)(seed);
        let what = self.one(&input).err().unwrap_or_else(|| format!("{what} (but not again: it depends on what came before)"));
        report(self.target, &input, &what, &format!("after {} executions, seed {seed}", self.tally.executions));
        ExitCode::from(EXIT_FOUND)
    }
}

/// Writes an input that breaks the target and prints what it does.
pub(crate) fn report(target: &Target, input: &[u8], what: &str, when: &str) {
    let path = folder().join(format!("{}-{:016x}", target.name, behaviour(input)));
    std::fs::write(&path, input).unwrap_or_else(|err| panic!("write {}: {err}", path.display()));
    println!("{}: FOUND {when}: {what}", target.name);
    println!("  input, {} bytes: {}", input.len(), input.escape_ascii().to_string().chars().take(400).collect::<String>());
    println!("  again: scripts/fuzz {} {}", target.name, path.display());
    println!("  mended: keep it as tests/fuzz/corpus/{}/crash-WHAT", target.name);
}

/// Where findings go.
pub(crate) fn folder() -> PathBuf {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/fuzz");
    std::fs::create_dir_all(&folder).unwrap_or_else(|err| panic!("make {}: {err}", folder.display()));
    folder
}
