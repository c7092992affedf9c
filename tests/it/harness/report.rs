//! The report of names: one line per fact that a test counted.

use std::fs::OpenOptions;
use std::io::Write as _;
use std::path::Path;

/// Adds a line to `target/e2e-report.txt`: the test's name, then what it counted.
///
/// The file is opened for appending, one write per line, so tests in several threads and processes do not mix lines.
pub(crate) fn report(test: &str, facts: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/e2e-report.txt");
    let mut file = OpenOptions::new().create(true).append(true).open(&path).unwrap();
    file.write_all(format!("{test}: {facts}\n").as_bytes()).unwrap();
}
