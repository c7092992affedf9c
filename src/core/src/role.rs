//! The two directories that poolfs knows how to serve.

use serde::{Deserialize, Serialize};
use std::fmt;

/// What a mounted directory is to apt.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// apt's `Dir::Cache::archives`: `.deb` files.
    Archives,
    /// apt's `Dir::State::lists`: Release files and indexes.
    Lists,
}

impl Role {
    /// The word used in the config, on the command line and in the database.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Archives => "archives",
            Self::Lists => "lists",
        }
    }

    /// The role of that word, if there is one.
    pub fn from_word(word: &str) -> Option<Self> {
        [Self::Archives, Self::Lists].into_iter().find(|role| role.as_str() == word)
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
