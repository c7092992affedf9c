//! Named places where the crash tests kill the process as `kill -9` would; nothing in any other build.

/// A point that an operation passes: everything before it is done, nothing after it.
#[cfg(not(test))]
#[inline]
pub(crate) fn crash_point(_name: &'static str) {}

#[cfg(test)]
pub(crate) use armed::{arm, child, crash_point, points, running_as_child};

#[cfg(test)]
mod armed {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use parking_lot::Mutex;
    use std::collections::BTreeSet;
    use std::io::{Read as _, Write as _};
    use std::path::Path;
    use std::process::{Command, Output, Stdio};

    static ARMED: Mutex<Option<(String, u32)>> = Mutex::new(None);

    /// Kills this process when the point `name` is passed for the time `nth`, counted from 0.
    pub(crate) fn arm(name: &str, nth: u32) {
        *ARMED.lock() = Some((name.to_owned(), nth));
    }

    pub(crate) fn crash_point(name: &'static str) {
        let mut armed = ARMED.lock();
        if let Some((wanted, left)) = armed.as_mut()
            && wanted == name
        {
            if *left == 0 {
                let this = rustix::process::getpid();
                rustix::process::kill_process(this, rustix::process::Signal::KILL).unwrap();
                std::thread::park();
            }
            *left -= 1;
        }
    }

    /// Runs the ignored test `name` of this very binary in a process of its own and writes `input` to its standard input.
    ///
    /// With `on_tmpfs`, that directory is a tmpfs of so many KiB, in a mount namespace that goes with the process.
    pub(crate) fn child(name: &str, input: &str, on_tmpfs: Option<(&Path, u32)>) -> Output {
        let exe = std::env::current_exe().unwrap();
        let mut command = match on_tmpfs {
            None => Command::new(exe),
            Some((dir, kib)) => {
                let script = format!("mount -t tmpfs -o size={kib}k tmpfs \"$1\" && shift && exec \"$@\"");
                let mut command = Command::new("unshare");
                command.args(["--mount", "--propagation", "private", "sh", "-c", &script, "sh"]).arg(dir).arg(exe);
                command
            }
        };
        command.args(["--exact", name, "--ignored", "--nocapture", "--test-threads=1"]);
        let mut running = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        running.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
        running.wait_with_output().unwrap()
    }

    /// What [`child`] wrote; `None` if somebody runs the ignored tests by hand.
    pub(crate) fn running_as_child() -> Option<Vec<String>> {
        let mut input = String::new();
        std::io::stdin().read_to_string(&mut input).unwrap();
        (!input.is_empty()).then(|| input.lines().map(str::to_owned).collect())
    }

    /// The points in this crate's sources whose names begin so.
    pub(crate) fn points(prefix: &str) -> BTreeSet<String> {
        fn visit(dir: &Path, found: &mut BTreeSet<String>) {
            for entry in std::fs::read_dir(dir).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    visit(&path, found);
                } else if path.extension().is_some_and(|extension| extension == "rs") {
                    let text = std::fs::read_to_string(&path).unwrap();
                    let after = text.split("crash_point(\"").skip(1);
                    found.extend(after.filter_map(|rest| rest.split_once("\");")).map(|(name, _)| name.to_owned()));
                }
            }
        }
        let mut found = BTreeSet::new();
        visit(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut found);
        found.retain(|name| name.starts_with(prefix) && name.contains('.'));
        found
    }
}
