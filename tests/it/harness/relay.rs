//! Distance: frames between two devices, each of them later than it came. The kernels that tests meet have no netem.
//!
//! One thread for each link. What comes while a queue is full is lost, as in a router.

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::collections::VecDeque;
use std::fs::File;
use std::io::{ErrorKind, PipeWriter, Read as _, Write as _};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Frames under way in one direction, at most.
const FRAMES_MAX: usize = 8_192;

/// A frame with its Ethernet header; the devices have the usual MTU.
const FRAME_BYTES_MAX: usize = 2_048;

/// A long link. It ends when it is dropped.
#[derive(Debug)]
pub(crate) struct Relay {
    /// Closed to end the thread.
    stop: Option<PipeWriter>,
    thread: Option<JoinHandle<()>>,
}

impl Relay {
    /// Carries what each device sends to the other one, `delay` later.
    pub(crate) fn new(near: File, far: File, delay: Duration) -> Self {
        let (stopped, stop) = std::io::pipe().unwrap();
        let thread = std::thread::Builder::new().name("relay".into());
        let carry = move || {
            let mut ways = [Way::default(), Way::default()];
            loop {
                let next = ways.iter().filter_map(|way| way.queue.front()).map(|(at, _)| *at).min();
                let timeout = next.map(|at| Timespec::try_from(at.saturating_duration_since(Instant::now())).unwrap());
                let mut wait =
                    [PollFd::new(&near, PollFlags::IN), PollFd::new(&far, PollFlags::IN), PollFd::new(&stopped, PollFlags::empty())];
                match poll(&mut wait, timeout.as_ref()) {
                    Ok(_) | Err(rustix::io::Errno::INTR) => {}
                    Err(error) => panic!("poll a relay: {error}"),
                }
                if !wait[2].revents().is_empty() {
                    return;
                }
                for (way, from, to) in [(0, &near, &far), (1, &far, &near)] {
                    ways[way].take(from, delay);
                    ways[way].give(to);
                }
            }
        };
        Self { stop: Some(stop), thread: Some(thread.spawn(carry).unwrap()) }
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[derive(Debug, Default)]
struct Way {
    queue: VecDeque<(Instant, Vec<u8>)>,
}

impl Way {
    fn take(&mut self, mut from: &File, delay: Duration) {
        let mut frame = [0; FRAME_BYTES_MAX];
        loop {
            match from.read(&mut frame) {
                Ok(bytes) if self.queue.len() < FRAMES_MAX => self.queue.push_back((Instant::now() + delay, frame[..bytes].to_vec())),
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                // Nothing there, or a device that is down.
                Err(_) => return,
            }
        }
    }

    fn give(&mut self, mut to: &File) {
        let now = Instant::now();
        while let Some((_, frame)) = self.queue.pop_front_if(|(at, _)| *at <= now) {
            // A device that is down or full loses it.
            let _ = to.write_all(&frame);
        }
    }
}
