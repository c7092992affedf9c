//! What every end-to-end test stands on.

pub(crate) mod browser;
pub(crate) mod crowd;
pub(crate) mod disk;
pub(crate) mod lan;
pub(crate) mod liar;
pub(crate) mod mirror;
pub(crate) mod mounts;
pub(crate) mod part_holder;
pub(crate) mod process;
pub(crate) mod relay;
pub(crate) mod repo;
pub(crate) mod report;
pub(crate) mod stage;
pub(crate) mod sys;
pub(crate) mod trixie;
pub(crate) mod upstream;
pub(crate) mod verify;

pub(crate) mod machine;

pub(crate) use lan::{Host, Lan, STRANGER};
pub(crate) use liar::{FalseDelta, Liar};
pub(crate) use machine::{Apt, Machine, Options, Sources, workspace};
pub(crate) use mirror::{Client, Fault, Gate, Mirror};
pub(crate) use process::{Running, run};
pub(crate) use repo::{Package, Published, Repo};
pub(crate) use report::report;
pub(crate) use stage::{Covered, Stage, assert_holds, attribute, forget_pages, listed};

use std::time::Duration;

/// How long anything may take before the test that waits for it fails. Nothing is measured against it: it only turns a
/// hang into a message, on a machine however busy.
pub(crate) const LIMIT: Duration = Duration::from_secs(120);
