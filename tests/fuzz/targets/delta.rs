//! Deltas: what a stranger gives to be applied to an older package.

use crate::driver::{Target, behaviour, kind_of};
use poolfs_core::Digest;
use poolfs_core::delta::{self, Between, DELTA_BYTES_MAX, Search};
use std::fs::File;
use std::io::{Seek as _, Write as _};

/// Every target of this file.
pub(super) const ALL: &[Target] = &[Target {
    name: "delta",
    about: "a delta, applied to a small package",
    start: |_| {
        let pair = Pair::new();
        Box::new(move |input: &[u8]| pair.run(input))
    },
    seeds,
    tokens: &["PFd2", "(\u{b5}/\u{fd}"],
    input_bytes_max: 16 * 1024,
    // The unpacked packages; the encoders are C.
    memory: (4 << 20, 64),
}];

struct Pair {
    old: File,
    new: Vec<u8>,
    between: Between,
}

fn file(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file.rewind().unwrap();
    file
}

/// An archive of one member that unpacks: gzip, whose encoder is quick to start.
fn package(text: &str) -> Vec<u8> {
    let mut member = vec![0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 2, 3];
    // One stored block, then its checksum, which nobody looks at before the end.
    let length = u16::try_from(text.len()).unwrap();
    member.push(1);
    member.extend_from_slice(&length.to_le_bytes());
    member.extend_from_slice(&(!length).to_le_bytes());
    member.extend_from_slice(text.as_bytes());
    member.extend_from_slice(&[0; 8]);
    let mut out = b"!<arch>\n".to_vec();
    out.extend_from_slice(format!("{:<16}{:<12}0     0     100644  {:<10}`\n", "data.tar.gz", 0, member.len()).as_bytes());
    out.extend_from_slice(&member);
    out
}

impl Pair {
    fn new() -> Self {
        let text: String = (0..400).map(|line| format!("line {line}\n")).collect();
        let (old, new) = (package(&text), package(&(text + "one more\n")));
        let between = Between { old: Digest::of(&old), new: Digest::of(&new), new_bytes: new.len() as u64 };
        Self { old: file(&old), new, between }
    }

    fn run(&self, input: &[u8]) -> u64 {
        let mut out = Vec::new();
        let done = delta::apply(&self.old, input, &self.between, &mut out);
        assert!(out.len() as u64 <= self.between.new_bytes, "{} bytes came out", out.len());
        let recipes = delta::recipes_of(input).map(|recipes| recipes.iter().map(kind_of).collect::<Vec<_>>()).unwrap_or_default();
        match done {
            Ok(()) => {
                assert_eq!(out, self.new);
                behaviour(("right", recipes))
            }
            Err(err) => behaviour((kind_of(err), recipes, out.is_empty())),
        }
    }
}

/// A true one, and one head with each kind of recipe.
fn seeds() -> Vec<Vec<u8>> {
    /// Magic, digests and length.
    const HEAD_BYTES: usize = 4 + 8 + 32 + 2;
    let pair = Pair::new();
    let made = delta::make(&pair.old, &file(&pair.new), &pair.between, &[], Search::Likeliest, DELTA_BYTES_MAX).unwrap().bytes;
    let recipes: [&[u8]; 5] =
        [&[0, 9], &[1, 0, 4, 0, 9], &[1, 6, 1, 0x80, 0x20, 9], &[2, 9, 10, 31, 139, 8, 0, 0, 0, 0, 0, 2, 3, 9], &[3, 3, 3, 0x8f, 0x52, 9]];
    let with = |recipe: &&[u8]| [&made[..HEAD_BYTES], &[1], recipe, &made[made.len() / 2..]].concat();
    let mut seeds: Vec<_> = recipes.iter().map(with).collect();
    seeds.push(made);
    seeds
}
