//! End-to-end tests: the built `poolfs`, real mounts, real apt.
//!
//! Each test lives in a mount namespace and directories of its own below `/var/tmp`, so that tests run side by side and
//! a failed one leaves no mount behind. Nothing here asserts wall time: tests await events, and one generous limit
//! ([`harness::LIMIT`]) turns a hang into a failure. What a test counted is added to `target/e2e-report.txt`.
//!
//! They need root, `/dev/fuse`, and the packages that `scripts/test-deps` installs. Most are served by a mirror inside
//! the test; the ones whose names contain `real_mirror` and the trixie root use the machine's own Debian mirror.
#![allow(clippy::unwrap_used, reason = "tests")]
#![allow(clippy::print_stderr, reason = "tests explain themselves when they fail")]

mod apart;
mod apt;
mod bad_input;
mod churn;
mod commands;
mod containers;
mod crashes;
mod death;
mod deltas;
mod dht;
mod discretion;
mod doctor;
mod documents;
mod fleet;
mod frontends;
mod fstab;
mod ghosts;
mod harness;
mod hostile;
#[allow(dead_code, reason = "scenarios of scripts/lab, of which the tests play a few")]
#[path = "../lab/lab.rs"]
mod lab;
mod liars;
mod limits;
mod lists;
mod package;
mod page;
mod peer;
mod pieces;
mod posix;
mod repair;
mod service;
mod soak;
mod stress;
mod swarm;
mod tidy;
mod world;
