//! The wire between the daemon's two processes: what a network process that somebody has taken over may send.

use crate::driver::{Subject, Target, behaviour, kind_of};
use crate::wire::{FromNet, Socket, WireError, pair, plain_text, read_sums, seal, sums_bytes};
use poolfs_core::{Digest, Sums};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, OwnedFd};

/// Every target of this file.
pub(super) const ALL: &[Target] = &[
    Target {
        name: "wire",
        about: "packets from the network process: the first byte says whether the rest is in the packet or in memory beside it",
        start: |_| Box::new(Wire::new()),
        seeds: packets,
        tokens: &[
            "{",
            "}",
            "[",
            "]",
            "\"",
            ":",
            ",",
            "null",
            "\"started\"",
            "{\"pong\":",
            "{\"delivery\":{\"id\":",
            "\"what\":",
            "\"done\"",
            "{\"piece\":{\"index\":",
            "\"giver\":",
            "{\"mirror\":\"h\"}",
            "{\"peer\":\"127.0.0.1:1\"}",
            "{\"failed\":",
            "{\"find\":{\"id\":",
            "\"digest\":",
            "{\"damaged\":",
            "{\"arriving\":[",
            "{\"answer\":{\"id\":",
            "\"fleet\":true",
            "\"sums\":false",
            "\u{1}",
            "18446744073709551615",
            "4294967296",
            "1e999",
            "\\ud800",
        ],
        input_bytes_max: 30 * 1024,
        memory: (2 << 20, 512),
    },
    Target {
        name: "wire-sums",
        about: "the sums of a file as they cross the wire: 8 bytes for its length, then the sums",
        start: |_| Box::new(|input: &[u8]| sums(input)),
        seeds: || vec![[&600_000_u64.to_be_bytes()[..], &sums_bytes(&Sums::of(&[7; 600_000]))].concat(), vec![0; 8]],
        tokens: &[],
        input_bytes_max: 2_000,
        memory: (64 * 1024, 64),
    },
];

/// Both ends.
struct Wire {
    runtime: tokio::runtime::Runtime,
    socket: Socket,
    peer: OwnedFd,
}

impl Wire {
    fn new() -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        let (ours, peer) = pair().expect("a pair of sockets");
        let inside = runtime.enter();
        let socket = Socket::new(ours).expect("an end");
        drop(inside);
        Self { runtime, socket, peer }
    }

    fn send(&self, bytes: &[u8], memory: Option<OwnedFd>) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let fds: Vec<_> = memory.iter().map(|fd| fd.as_fd()).collect();
        assert!(fds.is_empty() || control.push(SendAncillaryMessage::ScmRights(&fds)), "there is room for one");
        sendmsg(&self.peer, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL).expect("the other end reads");
    }
}

impl Subject for Wire {
    fn run(&mut self, input: &[u8]) -> u64 {
        match input {
            [] => return 0,
            [1, body @ ..] => self.send(&[1], Some(seal(body).expect("memory"))),
            packet => self.send(packet, None),
        }
        let received: Result<(FromNet, Vec<OwnedFd>), WireError> = self.runtime.block_on(self.socket.receive());
        match received {
            Ok((message, fds)) => {
                assert!(fds.is_empty(), "descriptors that nobody sent");
                // What was understood is understood the same from its own words.
                let words = serde_json::to_string(&message).expect("plain values");
                if let Ok(again) = serde_json::from_str::<FromNet>(&words) {
                    assert_eq!(serde_json::to_string(&again).expect("plain values"), words, "written otherwise than read");
                }
                behaviour(format!("{message:?}").split([' ', '(', '{', '"']).filter(|word| !word.is_empty()).take(3).collect::<Vec<_>>())
            }
            Err(WireError::Garbage(what)) => {
                let shown = plain_text(&what);
                assert!(!shown.chars().any(char::is_control), "does not fit on a line");
                behaviour(kind_of(what))
            }
            Err(other) => panic!("not told as garbage: {other}"),
        }
    }
}

fn packets() -> Vec<Vec<u8>> {
    let digest = "0".repeat(64);
    let texts = [
        "\"started\"".to_owned(),
        "{\"pong\":7}".to_owned(),
        "{\"delivery\":{\"id\":1,\"what\":\"done\"}}".to_owned(),
        "{\"delivery\":{\"id\":1,\"what\":{\"checking\":{\"bytes\":5}}}}".to_owned(),
        format!("{{\"find\":{{\"id\":1,\"digest\":\"{digest}\",\"fleet\":true,\"sums\":false}}}}"),
        format!("{{\"damaged\":{{\"digest\":\"{digest}\",\"block\":3}}}}"),
        format!("{{\"arriving\":[\"{digest}\"]}}"),
        "{\"answer\":{\"id\":1,\"answer\":{\"document\":{\"Err\":\"no\"}}}}".to_owned(),
        "{\"answer\":{\"id\":1,\"answer\":{\"why\":null}}}".to_owned(),
    ];
    texts.iter().flat_map(|text| [0, 1].map(|kind| [&[kind][..], text.as_bytes()].concat())).collect()
}

fn sums(input: &[u8]) -> u64 {
    let Some((size, bytes)) = input.split_first_chunk::<8>() else { return 0 };
    let size = u64::from_be_bytes(*size);
    match read_sums(Digest([1; 32]), size, bytes) {
        Ok(sums) => {
            assert_eq!(sums_bytes(&sums), bytes, "written otherwise than read");
            assert!(sums.pieces.len() as u64 == size.div_ceil(262_144) && sums.blocks.len() as u64 == size.div_ceil(65_536));
            behaviour((1, sums.pieces.len()))
        }
        Err(err) => behaviour(kind_of(err)),
    }
}
