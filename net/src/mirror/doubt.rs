//! Which URLs gave bytes that turned out wrong, so that another is asked first.

use poolfs_core::Digest;
use std::collections::VecDeque;

/// Files remembered; the oldest is forgotten first.
const FILES_MAX: usize = 256;

/// URLs remembered of one file.
const URLS_PER_FILE_MAX: usize = super::URLS_MAX;

/// The memory. Right bytes clear a file's entry.
#[derive(Debug, Default)]
pub(super) struct Doubts {
    files: VecDeque<File>,
}

#[derive(Debug)]
struct File {
    digest: Digest,
    /// Gave bytes since the last verdict.
    gave: Vec<String>,
    /// Gave bytes of a file that turned out wrong.
    doubted: Vec<String>,
}

impl Doubts {
    /// Bytes of `digest` come from `url`.
    pub(super) fn gave(&mut self, digest: &Digest, url: &str) {
        let position = self.files.iter().position(|file| file.digest == *digest);
        let file = match position {
            Some(position) => &mut self.files[position],
            None => {
                if self.files.len() >= FILES_MAX {
                    self.files.pop_front();
                }
                self.files.push_back(File { digest: *digest, gave: Vec::new(), doubted: Vec::new() });
                self.files.back_mut().expect("just pushed")
            }
        };
        remember(&mut file.gave, url.to_owned());
    }

    /// What the bytes of `digest` were.
    pub(super) fn verdict(&mut self, digest: &Digest, right: bool) {
        if right {
            self.files.retain(|file| file.digest != *digest);
        } else if let Some(file) = self.files.iter_mut().find(|file| file.digest == *digest) {
            for url in std::mem::take(&mut file.gave) {
                remember(&mut file.doubted, url);
            }
        }
    }

    /// Whether `url` had a part in wrong bytes of `digest`.
    pub(super) fn doubted(&self, digest: &Digest, url: &str) -> bool {
        self.files.iter().any(|file| file.digest == *digest && file.doubted.iter().any(|doubted| doubted == url))
    }
}

fn remember(urls: &mut Vec<String>, url: String) {
    if urls.len() < URLS_PER_FILE_MAX && !urls.contains(&url) {
        urls.push(url);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Doubt must fall on the URLs of the wrong bytes alone, and end with right ones and with the table's size.
    #[test]
    fn follows_the_verdicts() {
        let (one, two) = (Digest::of(b"1"), Digest::of(b"2"));
        let mut doubts = Doubts::default();
        doubts.gave(&one, "a");
        assert!(!doubts.doubted(&one, "a"), "before a verdict");
        doubts.verdict(&one, false);
        doubts.gave(&one, "b");
        assert!(doubts.doubted(&one, "a") && !doubts.doubted(&one, "b") && !doubts.doubted(&two, "a"));
        doubts.verdict(&one, true);
        assert!(!doubts.doubted(&one, "a"));

        doubts.gave(&one, "a");
        doubts.verdict(&one, false);
        for n in 0..FILES_MAX {
            doubts.gave(&Digest::of(&n.to_le_bytes()), "a");
        }
        assert_eq!(doubts.files.len(), FILES_MAX);
        assert!(!doubts.doubted(&one, "a"), "the oldest is forgotten");
    }
}
