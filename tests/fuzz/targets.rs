//! The targets, by where their input comes from.

mod apt;
mod bencode;
mod database;
mod delta;
mod fleet;
mod http;
mod lists;
mod node;
mod own;
mod signed;
mod wire;

use crate::driver::Target;

/// Every target, in the order in which `all` runs them.
pub(crate) fn all() -> impl Iterator<Item = &'static Target> {
    [bencode::ALL, node::ALL, fleet::ALL, signed::ALL, lists::ALL, apt::ALL, http::ALL, own::ALL, wire::ALL, database::ALL, delta::ALL]
        .into_iter()
        .flatten()
}
