//! The targets, by where their input comes from.

mod bencode;
mod delta;
mod lists;

use crate::driver::Target;

/// Every target, in the order in which `all` runs them.
pub(crate) fn all() -> impl Iterator<Item = &'static Target> {
    [bencode::ALL, delta::ALL, lists::ALL].into_iter().flatten()
}
