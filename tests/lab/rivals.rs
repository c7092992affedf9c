//! Debian's caching proxy, as people put it on one machine of theirs.

use super::tool;
use crate::harness::{Host, Running};
use std::fs;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::process::Command;
use tempfile::TempDir;

const PORT: u16 = 3142;

/// apt-cacher-ng on one machine. Its cache goes with it.
#[derive(Debug)]
pub(crate) struct Proxy {
    running: Option<Running>,
    _home: TempDir,
}

impl Proxy {
    /// What its users have in their configuration.
    pub(crate) fn apt_conf(at: Ipv4Addr) -> String {
        format!("Acquire::http::Proxy::10.99.0.254 \"http://{at}:{PORT}\";\n")
    }

    pub(crate) fn start(host: &Host) -> Self {
        let home = crate::harness::workspace();
        let at = |name: &str| home.path().join(name);
        fs::create_dir(at("conf")).unwrap();
        // AllowUserPorts: the lab's mirror has some port.
        let conf = format!(
            "CacheDir: {cache}\nLogDir: {log}\nPidFile: {pid}\nSupportDir: {support}\nBindAddress: {address}\nPort: {PORT}\nForeGround: 1\n\
             AllowUserPorts: 0\nVfileUseRangeOps: 0\n",
            cache = at("cache").display(),
            log = at("log").display(),
            pid = at("pid").display(),
            support = support().display(),
            address = host.address,
        );
        fs::write(at("conf/acng.conf"), conf).unwrap();
        for name in ["cache", "log"] {
            fs::create_dir(at(name)).unwrap();
        }
        // It asks name servers for addresses too; from its place there is none, and here that is known at once.
        fs::write(at("resolv.conf"), "nameserver 127.0.0.1\n").unwrap();
        let mut command = rival(host, "unshare", &["--mount", "sh", "-c", "mount --bind \"$0\" /etc/resolv.conf; exec \"$@\""]);
        command.arg(at("resolv.conf")).arg(program("apt-cacher-ng")).arg("-c").arg(at("conf"));
        let running = Running::start(&mut command);
        // It listens a moment after its start.
        host.run(&format!("curl -sS --retry-connrefused --retry 20 --retry-delay 1 -o /dev/null http://{}:{PORT}/", host.address));
        Self { running: Some(running), _home: home }
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        // Before its cache.
        drop(self.running.take());
    }
}

/// Below `target/tools`, unless the machine has the package.
fn support() -> PathBuf {
    let installed = PathBuf::from("/usr/lib/apt-cacher-ng");
    if installed.exists() { installed } else { tool("rivals/usr/lib/apt-cacher-ng") }
}

/// From the machine's packages or those below `target/tools`.
fn program(name: &str) -> PathBuf {
    let places = ["/usr/sbin", "/usr/bin"].map(PathBuf::from).into_iter().chain(["rivals/usr/sbin", "rivals/usr/bin"].map(tool));
    let found = places.map(|place| place.join(name)).find(|path| path.exists());
    found.unwrap_or_else(|| panic!("{name} is not here: scripts/rival-deps brings it"))
}

/// A program on that host that finds the rivals' libraries.
pub(crate) fn rival(host: &Host, name: &str, arguments: &[&str]) -> Command {
    let mut command = host.command(program(name));
    let libraries = ["rivals/usr/lib", "rivals/lib"].map(|place| tool(place).join(format!("{}-linux-gnu", std::env::consts::ARCH)));
    command.args(arguments).env("LD_LIBRARY_PATH", std::env::join_paths(libraries).unwrap()).env("LC_ALL", "C");
    command
}
