//! A fleet under a virtual clock: links with rates, a mirror, members that die, part, lie. Rates are flat and nothing is
//! lost, so the figures are right in order of magnitude.
#![allow(clippy::unwrap_used, clippy::cast_precision_loss, reason = "tests")]

mod hostile;
mod numbers;
mod rules;

use super::sim::*;
use super::*;
use std::time::Instant;

/// A machine that has these pieces, and whom everybody answers.
fn local(have: u16) -> Local<'static> {
    Local { have, down: &|_| false, mirror_pace: None }
}
