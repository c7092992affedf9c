//! Which code has been executed, where the build counts it.
//!
//! `scripts/fuzz --coverage` builds the workspace's crates (not their dependencies) with LLVM's counters, one for each
//! branch. They stand in one table of the process; what is new is that more of them than ever are not zero.

#[cfg(fuzz_coverage)]
mod table {
    use std::sync::atomic::{AtomicUsize, Ordering};

    unsafe extern "C" {
        fn __llvm_profile_begin_counters() -> *mut u64;
        fn __llvm_profile_end_counters() -> *mut u64;
    }

    static REACHED: AtomicUsize = AtomicUsize::new(0);

    fn reached() -> (usize, usize) {
        // SAFETY: the two functions only return the ends of a table that lives as long as the process.
        let (begin, end) = unsafe { (__llvm_profile_begin_counters(), __llvm_profile_end_counters()) };
        let length = (end as usize - begin as usize) / size_of::<u64>();
        // SAFETY: the table lies between them; its words are only ever added to, and a count that is read while another
        // thread adds to it is zero or not, which is all that is asked.
        let counters = unsafe { std::slice::from_raw_parts(begin.cast_const(), length) };
        (counters.iter().filter(|count| **count != 0).count(), length)
    }

    pub(crate) fn is_new() -> bool {
        let (reached, _) = reached();
        REACHED.fetch_max(reached, Ordering::Relaxed) < reached
    }

    pub(crate) fn said() -> String {
        let (reached, all) = reached();
        format!(", {reached} of {all} branches reached")
    }
}

#[cfg(not(fuzz_coverage))]
mod table {
    pub(crate) fn is_new() -> bool {
        false
    }

    pub(crate) fn said() -> String {
        String::new()
    }
}

pub(crate) use table::{is_new, said};
