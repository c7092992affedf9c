//! The figures of the mounts: each beside the same work done natively, in one run.
//!
//! Run by `scripts/bench mounts`. Five runs each, medians; prints a table of figure, goal and ratio. It needs root,
//! `/dev/fuse` and the lists of the machine's own apt, of which it takes a copy.
#![allow(
    clippy::print_stdout,
    clippy::unwrap_used,
    clippy::expect_used,
    missing_docs,
    reason = "a program for people, that stops at the first surprise"
)]

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const RUNS: usize = 5;
const BIG_BYTES: u64 = 1 << 30;
const SMALL_FILES: usize = 10_000;
const PACKAGES: usize = 200;

/// Everything below one private directory, unmounted and removed at the end however it comes.
struct Bench {
    dir: PathBuf,
    daemon: Option<Child>,
    plain: Option<Child>,
}

impl Drop for Bench {
    fn drop(&mut self) {
        for child in [self.daemon.take(), self.plain.take()].into_iter().flatten() {
            end(child);
        }
        for mount in ["archives", "lists", "plain"] {
            let path = std::ffi::CString::new(self.dir.join(mount).into_os_string().into_encoded_bytes()).unwrap();
            // SAFETY: the path is a terminated string; a path that is no mount point only gives EINVAL.
            unsafe { libc::umount2(path.as_ptr(), libc::MNT_DETACH) };
        }
        if let Err(err) = fs::remove_dir_all(&self.dir) {
            println!("left behind {}: {err}", self.dir.display());
        }
    }
}

fn end(mut child: Child) {
    // SAFETY: kill takes plain numbers; the child is ours and not yet waited for.
    unsafe { libc::kill(i32::try_from(child.id()).unwrap(), libc::SIGTERM) };
    child.wait().unwrap();
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn timed(mut work: impl FnMut()) -> f64 {
    let start = Instant::now();
    work();
    start.elapsed().as_secs_f64()
}

fn read_all(path: &Path) -> f64 {
    let mut file = File::open(path).unwrap();
    let mut buffer = vec![0; 1 << 20];
    timed(|| while file.read(&mut buffer).unwrap() > 0 {})
}

/// Drops the page cache of this very file: of the mount's inode, not of the backing file's.
fn forget_pages(path: &Path) {
    let file = File::open(path).unwrap();
    // SAFETY: plain numbers and a descriptor that is open.
    assert_eq!(unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) }, 0);
}

fn forget_names() {
    fs::write("/proc/sys/vm/drop_caches", "2").unwrap();
}

fn list(path: &Path) -> f64 {
    forget_names();
    timed(|| {
        let status = Command::new("ls").arg("-l").arg(path).stdout(Stdio::null()).status().unwrap();
        assert!(status.success());
    })
}

fn hot_reads(path: &Path) -> f64 {
    const TIMES: u32 = 5_000;
    let mut buffer = [0; 4096];
    let seconds = timed(|| {
        for _ in 0..TIMES {
            File::open(path).unwrap().read_exact_at(&mut buffer, 0).unwrap();
        }
    });
    seconds / f64::from(TIMES) * 1e6
}

fn row(figure: &str, value: &str, goal: &str, met: bool) {
    println!("{figure:<58} {value:>24}   goal {goal:<22} {}", if met { "met" } else { "MISSED" });
}

impl Bench {
    fn new() -> Self {
        let dir = PathBuf::from(format!("/var/tmp/poolfs-bench-{}", std::process::id()));
        for sub in ["archives/partial", "lists/partial", "state", "cache", "plain", "plain-state", "native-lists/partial", "etc"] {
            fs::create_dir_all(dir.join(sub)).unwrap();
        }
        Self { dir, daemon: None, plain: None }
    }

    fn config(&self) -> PathBuf {
        self.dir.join("poolfs.toml")
    }

    fn write_config(&self) {
        let dir = self.dir.display();
        let text = format!(
            "[[mount]]\nrole = \"archives\"\npath = \"{dir}/archives\"\n[[mount]]\nrole = \"lists\"\npath = \"{dir}/lists\"\n\
             [store]\nstate_dir = \"{dir}/state\"\ncache_dir = \"{dir}/cache\"\n[control]\nsocket = \"{dir}/control.sock\"\n\
             [status]\nlisten = \"\"\n[net]\nlisten = \"127.0.0.1:0\"\ndiscovery = false\n[log]\nlevel = \"warn\"\n"
        );
        fs::write(self.config(), text).unwrap();
    }

    /// Starts the daemon and gives the seconds until both directories were mounted.
    fn start(&mut self) -> f64 {
        let started = Instant::now();
        let mut child = Command::new(env!("CARGO_BIN_EXE_poolfs"))
            .args(["up", "--foreground", "--config"])
            .arg(self.config())
            .env("POOLFS_TELL_PARENT", "1")
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut reports = String::new();
        let mut out = child.stdout.take().unwrap();
        let mut buffer = [0; 4096];
        while !reports.contains("\"ready\"") {
            let read = out.read(&mut buffer).unwrap();
            assert!(read > 0, "the daemon ended: {reports}");
            reports.push_str(&String::from_utf8_lossy(&buffer[..read]));
        }
        let seconds = started.elapsed().as_secs_f64();
        // The pipe stays open: the daemon would be told that nobody reads.
        std::thread::spawn(move || std::io::copy(&mut out, &mut std::io::sink()));
        self.daemon = Some(child);
        seconds
    }

    fn stop(&mut self) {
        end(self.daemon.take().unwrap());
    }

    fn status(&self) -> String {
        let out = Command::new(env!("CARGO_BIN_EXE_poolfs")).args(["status", "--json", "--config"]).arg(self.config()).output().unwrap();
        String::from_utf8(out.stdout).unwrap()
    }

    /// Waits until every file has its record and the catalog is read.
    fn settle(&self) {
        let number = |status: &str, key: &str| -> u64 {
            let rest = status.split(&format!("\"{key}\":")).nth(1).unwrap();
            rest[..rest.find(|c: char| !c.is_ascii_digit()).unwrap()].parse().unwrap()
        };
        loop {
            let status = self.status();
            if number(&status, "files") > SMALL_FILES as u64 && number(&status, "catalog_entries") > 0 {
                return;
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// A pass-through of the same code without verification, where it was built.
    fn start_plain(&mut self) -> Option<()> {
        let program = Path::new(env!("CARGO_BIN_EXE_poolfs")).parent().unwrap().join("examples/passthrough");
        let plain = self.dir.join("plain");
        self.plain = Some(Command::new(&program).arg(&plain).arg(self.dir.join("plain-state")).spawn().ok()?);
        let mounted = || fs::read_to_string("/proc/self/mountinfo").unwrap().contains(&format!(" {} ", plain.display()));
        while !mounted() {
            assert!(self.plain.as_mut().unwrap().try_wait().unwrap().is_none(), "the pass-through ended");
            std::thread::sleep(Duration::from_millis(10));
        }
        Some(())
    }

    fn apt_config(&self, lists: &str) -> PathBuf {
        let path = self.dir.join(format!("etc/{lists}.conf"));
        let dir = self.dir.display();
        let text = format!(
            "Dir::State::lists \"{dir}/{lists}\";\nDir::Cache::archives \"{dir}/archives\";\nDir::Cache::pkgcache \"\";\nDir::Cache::srcpkgcache \"\";\n\
             Dir::State::status \"/var/lib/dpkg/status\";\nAPT::Update::Post-Invoke {{}};\nDPkg::Post-Invoke {{}};\nDebug::NoLocking \"true\";\n"
        );
        fs::write(&path, text).unwrap();
        path
    }
}

/// A process and all that it and they have started.
fn family(pid: u32) -> Vec<u32> {
    let mut all = vec![pid];
    for task in fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten() {
        let children = fs::read_to_string(task.path().join("children")).unwrap_or_default();
        all.extend(children.split_whitespace().flat_map(|child| family(child.parse().unwrap())));
    }
    all
}

/// Proportional memory of the parent, the daemon and its network process, in MB.
fn memory_mb(parent: u32) -> f64 {
    let of_one = |pid: u32| {
        let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
        let line = text.lines().find(|line| line.starts_with("Pss:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<f64>().unwrap() / 1024.0
    };
    let family = family(parent);
    assert_eq!(family.len(), 3, "supervisor, mounts and network: {family:?}");
    family.into_iter().map(of_one).sum()
}

fn install_simulated(config: &Path, names: &[String]) -> f64 {
    forget_names();
    timed(|| {
        let out = Command::new("apt-get").args(["install", "-s", "-qq"]).args(names).env("APT_CONFIG", config).output().unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    })
}

/// Leaf packages that can be installed together: those that many machines have not, from the real list.
fn package_names(config: &Path) -> Vec<String> {
    let out = Command::new("apt-cache").args(["search", "--names-only", "^lib.*-perl$"]).env("APT_CONFIG", config).output().unwrap();
    let text = String::from_utf8(out.stdout).unwrap();
    let names: Vec<String> = text.lines().filter_map(|line| line.split_whitespace().next()).map(str::to_owned).collect();
    let mut chosen: Vec<String> = Vec::new();
    for chunk in names.chunks(20) {
        let attempt =
            Command::new("apt-get").args(["install", "-s", "-qq"]).args(&chosen).args(chunk).env("APT_CONFIG", config).output().unwrap();
        if attempt.status.success() {
            chosen.extend_from_slice(chunk);
        }
        if chosen.len() >= PACKAGES {
            break;
        }
    }
    chosen
}

fn main() {
    let mut bench = Bench::new();
    let dir = bench.dir.clone();
    bench.write_config();

    println!("preparing: {} MiB, {SMALL_FILES} files, a copy of apt's lists", BIG_BYTES >> 20);
    let mut seed = 1_u64;
    let mut block = vec![0_u8; 1 << 20];
    let mut big = File::create(dir.join("archives/big")).unwrap();
    for _ in 0..BIG_BYTES >> 20 {
        for word in block.chunks_exact_mut(8) {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            word.copy_from_slice(&seed.to_le_bytes());
        }
        big.write_all(&block).unwrap();
    }
    // The same inode by another name is what "natively" means: the same pages, no mount above.
    fs::hard_link(dir.join("archives/big"), dir.join("native.bin")).unwrap();
    fs::hard_link(dir.join("archives/big"), dir.join("plain/big")).unwrap();
    for sub in ["archives/many", "native-many", "plain/many"] {
        fs::create_dir_all(dir.join(sub)).unwrap();
        for index in 0..SMALL_FILES {
            fs::write(dir.join(sub).join(format!("package-{index}_1.0-1_amd64.deb")), index.to_le_bytes()).unwrap();
        }
    }
    for target in ["lists", "native-lists"] {
        for entry in fs::read_dir("/var/lib/apt/lists")
            .unwrap()
            .map(Result::unwrap)
            .filter(|entry| entry.file_type().unwrap().is_file() && entry.file_name() != "lock")
        {
            fs::copy(entry.path(), dir.join(target).join(entry.file_name())).unwrap();
        }
    }

    let started = Instant::now();
    bench.start();
    bench.settle();
    println!("first start, until everything was hashed and parsed: {:.2} s", started.elapsed().as_secs_f64());
    bench.stop();
    let starts: Vec<f64> = (0..RUNS)
        .map(|_| {
            let seconds = bench.start();
            bench.stop();
            seconds
        })
        .collect();
    let start = median(starts);
    row("start with a filled catalog to mounted", &format!("{start:.3} s"), "0.3 s", start < 0.3);
    bench.start();
    let status = bench.status();
    assert!(status.contains("\"hashed\":0"), "nothing may be hashed again: {status}");
    std::thread::sleep(Duration::from_secs(2));
    let memory = memory_mb(bench.daemon.as_ref().unwrap().id());
    row("idle memory with bookworm's catalog (PSS, all three processes)", &format!("{memory:.1} MB"), "60 MB", memory < 60.0);
    let plain = bench.start_plain().is_some();

    let (native, mounted) = (dir.join("native.bin"), dir.join("archives/big"));
    read_all(&native);
    let gigabytes = BIG_BYTES as f64 / 1e9;
    let mut figures: [Vec<f64>; 4] = Default::default();
    for _ in 0..RUNS {
        figures[0].push(gigabytes / read_all(&native));
        forget_pages(&mounted);
        figures[1].push(gigabytes / read_all(&mounted));
        figures[2].push(gigabytes / read_all(&mounted));
        if plain {
            forget_pages(&dir.join("plain/big"));
            figures[3].push(gigabytes / read_all(&dir.join("plain/big")));
        }
    }
    let [native_rate, first_rate, second_rate, plain_rate] =
        figures.map(|values| if values.is_empty() { f64::NAN } else { median(values) });
    row("native read of 1 GiB, warm", &format!("{native_rate:.2} GB/s"), "-", true);
    row(
        "first read through the mount, backing cache warm",
        &format!("{first_rate:.2} GB/s, {:.0} % of plain", first_rate / plain_rate * 100.0),
        "1.2 GB/s or 90 % plain",
        first_rate >= 1.2 || first_rate >= 0.9 * plain_rate,
    );
    row(
        "second read through the mount",
        &format!("{second_rate:.2} GB/s, {:.0} %", second_rate / native_rate * 100.0),
        "95 % of native",
        second_rate >= 0.95 * native_rate,
    );

    let mut lists: [Vec<f64>; 3] = Default::default();
    for _ in 0..RUNS {
        lists[0].push(list(&dir.join("native-many")));
        lists[1].push(list(&dir.join("archives/many")));
        if plain {
            lists[2].push(list(&dir.join("plain/many")));
        }
    }
    let [native_list, mounted_list, plain_list] = lists.map(|values| if values.is_empty() { f64::NAN } else { median(values) });
    row(
        "ls -l of 10,000 files",
        &format!("{mounted_list:.3} s ({native_list:.3} native), {:.2}x plain", mounted_list / plain_list),
        "1.2x plain and 0.5 s",
        mounted_list < 0.5 && mounted_list <= 1.2 * plain_list,
    );
    let small = dir.join("archives/many/package-1_1.0-1_amd64.deb");
    fs::write(dir.join("archives/hot"), vec![7; 4096]).unwrap();
    let hot = median((0..RUNS).map(|_| hot_reads(&dir.join("archives/hot"))).collect());
    row("open + read 4 KiB + close, hot", &format!("{hot:.1} us"), "50 us", hot <= 50.0);
    assert!(small.exists());

    let native_config = bench.apt_config("native-lists");
    let mounted_config = bench.apt_config("lists");
    let names = package_names(&native_config);
    let mut simulated: [Vec<f64>; 2] = Default::default();
    for _ in 0..RUNS {
        simulated[0].push(install_simulated(&native_config, &names));
        simulated[1].push(install_simulated(&mounted_config, &names));
    }
    let [native_apt, mounted_apt] = simulated.map(median);
    row(
        &format!("apt-get install -s of {} packages", names.len()),
        &format!("{mounted_apt:.3} s, {:.2}x native", mounted_apt / native_apt),
        "1.1x native",
        mounted_apt <= 1.1 * native_apt,
    );
}
