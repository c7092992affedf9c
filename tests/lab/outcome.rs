//! What a scenario counted, as JSON and as tables.

use super::scenario::Goal;
use serde::{Deserialize, Serialize};

/// What one machine did.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Line {
    pub(crate) machine: usize,
    /// What it ran, where that differs from line to line.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub(crate) what: String,
    /// apt's exit code.
    pub(crate) exit: i32,
    /// apt's time, in seconds.
    pub(crate) seconds: f64,
    /// What the mirror sent to it: bodies of what the scenario is about.
    pub(crate) mirror_bytes: u64,
    /// What poolfs there got from the mirror, in bytes.
    pub(crate) from_mirror: u64,
    /// From peers.
    pub(crate) from_peers: u64,
    /// Made of a delta and an older version.
    #[serde(default)]
    pub(crate) from_deltas: u64,
    /// What it gave to others.
    pub(crate) given: u64,
}

/// The machines of one way to do it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Contender {
    /// `poolfs`, or a rival.
    pub(crate) name: String,
    /// What the mirror sent to all its machines, in bytes.
    pub(crate) mirror_bytes: u64,
    /// The same in copies of what one machine wanted.
    pub(crate) copies: f64,
    pub(crate) lines: Vec<Line>,
}

/// One figure beside its goal.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Figure {
    pub(crate) name: String,
    pub(crate) value: f64,
    pub(crate) unit: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) at_most: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) at_least: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) fails_at: Option<f64>,
}

impl Figure {
    pub(crate) fn new(name: impl Into<String>, value: f64, unit: &str) -> Self {
        Self { name: name.into(), value, unit: unit.to_owned(), at_most: None, at_least: None, fails_at: None }
    }

    /// In words; empty where the figure is there to compare with.
    pub(crate) fn goal(&self) -> String {
        match (self.at_most, self.at_least) {
            (Some(most), _) => format!("at most {most}"),
            (None, Some(least)) => format!("at least {least}"),
            (None, None) => String::new(),
        }
    }

    pub(crate) fn met(&self) -> bool {
        self.at_most.is_none_or(|most| self.value <= most) && self.at_least.is_none_or(|least| self.value >= least)
    }

    /// True if it got worse than it may: past `fails_at`, on the side away from the goal.
    pub(crate) fn fails(&self) -> bool {
        let Some(limit) = self.fails_at else { return false };
        if self.at_least.is_some() { self.value < limit } else { self.value > limit }
    }
}

/// What a scenario counted.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Outcome {
    #[serde(default)]
    pub(crate) scenario: String,
    /// Bytes that each machine wanted.
    pub(crate) wanted_bytes: u64,
    /// Files on all machines whose digests are those of the signed index.
    pub(crate) verified: usize,
    pub(crate) contenders: Vec<Contender>,
    pub(crate) figures: Vec<Figure>,
}

impl Outcome {
    pub(crate) fn contender(&self, name: &str) -> &Contender {
        self.contenders.iter().find(|contender| contender.name == name).unwrap_or_else(|| panic!("no {name} in {self:#?}"))
    }

    pub(crate) fn figure(&self, name: &str) -> f64 {
        self.figures.iter().find(|figure| figure.name == name).unwrap_or_else(|| panic!("no figure {name}: {self:#?}")).value
    }

    /// Puts the goals beside their figures.
    pub(crate) fn judge(&mut self, goals: &[Goal]) {
        for goal in goals {
            let figure = self.figures.iter_mut().find(|figure| figure.name == goal.figure);
            let figure = figure.unwrap_or_else(|| panic!("a goal for {:?}, which is no figure of this scenario", goal.figure));
            (figure.at_most, figure.at_least, figure.fails_at) = (goal.at_most, goal.at_least, goal.fails_at);
        }
    }

    /// Tables for people.
    pub(crate) fn show(&self) {
        for contender in &self.contenders {
            println!("{}:", contender.name);
            println!(
                "{:>8} {:>5} {:>9} {:>14} {:>14} {:>14} {:>14} {:>14}  ",
                "machine", "exit", "seconds", "mirror sent", "from mirror", "from peers", "from deltas", "given"
            );
            for line in &contender.lines {
                println!(
                    "{:>8} {:>5} {:>9.2} {:>14} {:>14} {:>14} {:>14} {:>14}  {}",
                    line.machine,
                    line.exit,
                    line.seconds,
                    line.mirror_bytes,
                    line.from_mirror,
                    line.from_peers,
                    line.from_deltas,
                    line.given,
                    line.what
                );
            }
            println!("the mirror sent {} bytes, {:.2} copies of {}", contender.mirror_bytes, contender.copies, self.wanted_bytes);
        }
        if self.verified > 0 {
            println!("{} files verified against the signed index", self.verified);
        }
        for figure in &self.figures {
            let goal = figure.goal();
            let judged = match (goal.is_empty(), figure.met()) {
                (true, _) => String::new(),
                (false, true) => format!("  (goal {goal}: met)"),
                (false, false) => format!("  (goal {goal}: MISSED)"),
            };
            println!("{:64} {:>10.3} {}{judged}", figure.name, figure.value, figure.unit);
        }
    }
}
