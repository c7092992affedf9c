//! Named places where crash tests kill the process as `kill -9` would; nothing in a build for use.
//!
//! With the feature `crash-points`, which only tests turn on, a running program can be told where to die: the file that
//! `POOLFS_CRASH_FILE` names holds a point and how often it may be passed before, `place.renamed 2`. It is read when a point is
//! passed, and removed.

/// A point that an operation passes: everything before it is done, nothing after it.
#[cfg(not(any(test, feature = "crash-points")))]
#[inline]
pub(crate) fn crash_point(_name: &'static str) {}

#[cfg(test)]
pub(crate) use armed::arm;
#[cfg(any(test, feature = "crash-points"))]
pub(crate) use armed::crash_point;
#[cfg(test)]
pub(crate) use children::{child, points, running_as_child};

#[cfg(any(test, feature = "crash-points"))]
mod armed {
    use parking_lot::Mutex;
    use std::path::PathBuf;
    use std::sync::OnceLock;

    /// The environment variable with the path of the file that arms a point.
    const FILE_VARIABLE: &str = "POOLFS_CRASH_FILE";

    static ARMED: Mutex<Option<(String, u32)>> = Mutex::new(None);

    /// Kills this process when the point `name` is passed for the time `nth`, counted from 0.
    #[cfg(test)]
    pub(crate) fn arm(name: &str, nth: u32) {
        *ARMED.lock() = Some((name.to_owned(), nth));
    }

    /// What the file says, once.
    fn told() -> Option<(String, u32)> {
        static FILE: OnceLock<Option<PathBuf>> = OnceLock::new();
        let file = FILE.get_or_init(|| std::env::var_os(FILE_VARIABLE).map(PathBuf::from)).as_ref()?;
        let text = std::fs::read_to_string(file).ok()?;
        let (name, nth) = text.trim().split_once(' ')?;
        let armed = (name.to_owned(), nth.parse().ok()?);
        std::fs::remove_file(file).ok()?;
        Some(armed)
    }

    pub(crate) fn crash_point(name: &'static str) {
        let mut armed = ARMED.lock();
        if let Some(told) = told() {
            *armed = Some(told);
        }
        if let Some((wanted, left)) = armed.as_mut()
            && wanted == name
        {
            if *left == 0 {
                let this = rustix::process::getpid();
                rustix::process::kill_process(this, rustix::process::Signal::KILL).expect("a process may kill itself");
                std::thread::park();
            }
            *left -= 1;
        }
    }
}

#[cfg(test)]
mod children {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use std::collections::BTreeSet;
    use std::io::{Read as _, Write as _};
    use std::path::Path;
    use std::process::{Command, Output, Stdio};

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
