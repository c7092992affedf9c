//! One thread that starts other programs for the rest of the process.
//!
//! It is started before the others, so that it keeps what they give up, and lives as long as the process: a child whose
//! parent's death would end it (`PR_SET_PDEATHSIG`) ends with the thread that started it.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::mpsc;

/// Errands that may wait; who has more waits to hand it over.
const WAITING_MAX: usize = 16;

type Errand = Box<dyn FnOnce() + Send>;

/// The handle of the thread. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Errands {
    errands: mpsc::SyncSender<Errand>,
}

impl Errands {
    /// Starts the thread.
    pub fn start() -> std::io::Result<Self> {
        let (errands, waiting) = mpsc::sync_channel::<Errand>(WAITING_MAX);
        std::thread::Builder::new().name("poolfs-errands".to_owned()).spawn(move || waiting.into_iter().for_each(|errand| errand()))?;
        Ok(Self { errands })
    }

    /// Runs `errand` there and waits for its result. Blocks.
    ///
    /// # Panics
    /// If `errand` panics.
    pub fn run<T: Send + 'static>(&self, errand: impl FnOnce() -> T + Send + 'static) -> T {
        let (told, result) = mpsc::sync_channel(1);
        let errand: Errand = Box::new(move || {
            // Nobody waits any more where the process ends.
            let _ = told.send(catch_unwind(AssertUnwindSafe(errand)));
        });
        self.errands.send(errand).expect("the thread ends with the process only");
        result.recv().expect("each errand has a result").unwrap_or_else(|panic| resume_unwind(panic))
    }
}
