//! The locks of the store and the filesystem: parking_lot's.
//!
//! In a test's model (`model::check`) each of them is also a place where another thread may go on, so that a scheduler finds the
//! orders in which things can happen that a busy machine shows once a year. Outside of a model they are nothing but the lock.

#[cfg(not(any(test, feature = "models")))]
pub use parking_lot::{Mutex, RwLock};

#[cfg(any(test, feature = "models"))]
pub use model::{Mutex, RwLock};
pub use parking_lot::{MutexGuard, RwLockReadGuard, RwLockWriteGuard};

/// Models: real code under a scheduler that chooses who goes on.
#[cfg(any(test, feature = "models"))]
pub mod model {
    use parking_lot::{MutexGuard, RwLockReadGuard, RwLockWriteGuard};
    use std::cell::Cell;

    thread_local! {
        /// The scheduler runs all threads of a model on one thread of the system.
        static IN_MODEL: Cell<bool> = const { Cell::new(false) };
    }

    const STACK_BYTES: usize = 1024 * 1024;

    /// Steps after which threads that wait for each other count as such; a runtime outside may take its time.
    const STEPS_MAX: usize = 100_000_000;

    /// A place where another thread of the model may go on.
    pub fn switch() {
        if IN_MODEL.get() {
            shuttle::thread::yield_now();
        }
    }

    /// Runs `model` under so many orders, chosen at random by a seed that is shown when one of them fails. Threads of the model are
    /// made with [`spawn`]; threads outside of it (a runtime's) go on by themselves.
    pub fn check(orders: usize, model: impl Fn() + Send + Sync + 'static) {
        struct Left;
        impl Drop for Left {
            fn drop(&mut self) {
                IN_MODEL.set(false);
            }
        }
        // Not around the scheduler: what the model used is dropped when it has ended.
        let model = move || {
            IN_MODEL.set(true);
            let _left = Left;
            model();
        };
        let mut config = shuttle::Config::new();
        // SQLite and the disk below the threads of a model want more than the few pages that a scheduler's threads get.
        config.stack_size = STACK_BYTES;
        config.max_steps = shuttle::MaxSteps::FailAfter(STEPS_MAX);
        shuttle::Runner::new(shuttle::scheduler::RandomScheduler::new(orders), config).run(model);
    }

    /// A thread of a model.
    pub fn spawn<T: Send + 'static>(body: impl FnOnce() -> T + Send + 'static) -> shuttle::thread::JoinHandle<T> {
        shuttle::thread::spawn(body)
    }

    /// Waits for what a thread outside of the model does, or another of it.
    pub fn until(mut over: impl FnMut() -> bool) {
        while !over() {
            // The threads outside need the processor too.
            std::thread::yield_now();
            switch();
        }
    }

    /// parking_lot's, with a switch before each lock.
    #[derive(Debug, Default)]
    pub struct Mutex<T>(parking_lot::Mutex<T>);

    impl<T> Mutex<T> {
        /// A lock that nobody holds.
        pub const fn new(value: T) -> Self {
            Self(parking_lot::Mutex::new(value))
        }

        /// Waits for the lock.
        pub fn lock(&self) -> MutexGuard<'_, T> {
            if !IN_MODEL.get() {
                return self.0.lock();
            }
            loop {
                switch();
                if let Some(guard) = self.0.try_lock() {
                    return guard;
                }
            }
        }

        /// Whether somebody holds it at this moment.
        pub fn is_locked(&self) -> bool {
            self.0.is_locked()
        }
    }

    /// parking_lot's, with a switch before each lock.
    #[derive(Debug, Default)]
    pub struct RwLock<T>(parking_lot::RwLock<T>);

    impl<T> RwLock<T> {
        /// A lock that nobody holds.
        pub const fn new(value: T) -> Self {
            Self(parking_lot::RwLock::new(value))
        }

        /// Waits until nobody writes.
        pub fn read(&self) -> RwLockReadGuard<'_, T> {
            if !IN_MODEL.get() {
                return self.0.read();
            }
            loop {
                switch();
                if let Some(guard) = self.0.try_read() {
                    return guard;
                }
            }
        }

        /// Waits until nobody else has it.
        pub fn write(&self) -> RwLockWriteGuard<'_, T> {
            if !IN_MODEL.get() {
                return self.0.write();
            }
            loop {
                switch();
                if let Some(guard) = self.0.try_write() {
                    return guard;
                }
            }
        }
    }
}
