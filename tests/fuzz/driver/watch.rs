//! What survives the death of a child: the input at hand, panics of every thread, and the end of an execution that hangs.

use super::{Target, folder};
use parking_lot::Mutex;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// The child wrote down what it found.
pub(crate) const EXIT_FOUND: u8 = 10;

/// An execution was given up since it took too long; the input is in the file of the one at hand.
pub(crate) const EXIT_SLOW: u8 = 11;

/// What no execution may take. Inputs take micro- to milliseconds: also on a busy machine this is no delay but a hang.
const EXECUTION_MAX: Duration = Duration::from_secs(30);

/// How often it is looked.
const TICK: Duration = Duration::from_secs(1);

static PANIC: Mutex<Option<String>> = Mutex::new(None);

/// The first panic since the last call, on whatever thread.
pub(super) fn take_panic() -> Option<String> {
    PANIC.lock().take()
}

/// Where the child of this process leaves the input at hand.
pub(crate) fn current_file(target: &Target, child: u32) -> PathBuf {
    folder().join(format!("{}.{child}.current", target.name))
}

/// Watches over the executions of this process.
pub(crate) struct Watch {
    current: File,
    buffer: Vec<u8>,
    /// Executions begun and ended: odd while one runs.
    turns: Arc<AtomicU64>,
}

impl Watch {
    pub(super) fn start(target: &Target) -> Self {
        std::panic::set_hook(Box::new(|info| {
            let text = info.payload_as_str().unwrap_or("panic without a text");
            let place = info.location().map_or_else(String::new, |at| format!(" at {}:{}", at.file(), at.line()));
            PANIC.lock().get_or_insert_with(|| format!("panic{place}: {text}"));
        }));
        let path = current_file(target, std::process::id());
        let current = File::create(&path).unwrap_or_else(|err| panic!("make {}: {err}", path.display()));
        let turns = Arc::new(AtomicU64::new(0));
        let seen = Arc::clone(&turns);
        std::thread::spawn(move || {
            let (mut last, mut ticks) = (0, 0);
            loop {
                std::thread::sleep(TICK);
                let turn = seen.load(Ordering::Relaxed);
                ticks = if turn == last && turn % 2 == 1 { ticks + 1 } else { 0 };
                last = turn;
                if TICK * ticks >= EXECUTION_MAX {
                    std::process::exit(i32::from(EXIT_SLOW));
                }
            }
        });
        Self { current, buffer: Vec::new(), turns }
    }

    /// Leaves the input where the parent finds it.
    pub(super) fn begin(&mut self, input: &[u8]) {
        self.buffer.clear();
        self.buffer.extend_from_slice(&(input.len() as u64).to_le_bytes());
        self.buffer.extend_from_slice(input);
        self.current.write_all_at(&self.buffer, 0).expect("the input at hand can be written down");
        self.turns.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn end(&self) {
        self.turns.fetch_add(1, Ordering::Relaxed);
    }
}

/// The input that a child left, with its file removed.
pub(crate) fn take_current(target: &Target, child: u32) -> Option<Vec<u8>> {
    let path = current_file(target, child);
    let left = std::fs::read(&path).ok()?;
    std::fs::remove_file(&path).ok()?;
    let (length, input) = left.split_first_chunk()?;
    let length = usize::try_from(u64::from_le_bytes(*length)).ok()?;
    input.get(..length).map(<[u8]>::to_vec)
}
