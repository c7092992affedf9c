//! Transfers beside what people use for them, in one run over the same wire: nginx and curl, btfs.

use crate::harness::crowd::{Crowd, Terms, await_status};
use crate::harness::machine::Machine;
use crate::harness::process::Finished;
use crate::harness::{Package, Running, assert_holds};
use crate::scenarios::{Figure, Outcome, Scenario};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

/// Scenarios that need other programs.
pub(crate) const ALL: &[Scenario] = &[
    Scenario {
        name: "cold-large",
        about: "a cold machine reads 200 MB through the mount that 4 neighbours have; beside nginx with curl, and btfs",
        play: cold_large,
    },
    Scenario { name: "cold-slow", about: "the same with one neighbour at 1 MB/s, beside none", play: cold_slow },
    Scenario {
        name: "cold-many",
        about: "a cold machine installs 200 packages of bookworm's sizes that 4 neighbours have, beside one of the same bytes",
        play: cold_many,
    },
];

const WARM: usize = 4;
const RUNS: usize = 3;
const LARGE_BYTES: usize = 200_000_000;
const PACKAGES: u32 = 200;
/// The slow neighbour's link.
const SLOW_MBIT: u32 = 8;
/// What links have that are not shaped.
const FAST_MBIT: u32 = 40_000;
/// Ticks in which the kernel counts processor time (`USER_HZ`).
const TICKS_S: f64 = 100.0;

/// Sizes as bookworm's packages have them: median 59 KB, 18.5 % over 512 KiB; the largest are cut at 64 MB.
fn sizes() -> Vec<usize> {
    let points = [(0.0, 1.0e3_f64), (0.05, 2.0e3), (0.5, 59.0e3), (0.815, 524_288.0), (0.95, 4.0e6), (1.0, 64.0e6)];
    let size = |at: u32| {
        let share = (f64::from(at) + 0.5) / f64::from(PACKAGES);
        let pair = points.windows(2).find(|pair| share <= pair[1].0).unwrap();
        let along = (share - pair[0].0) / (pair[1].0 - pair[0].0);
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a positive size that fits")]
        let bytes = (pair[0].1.ln() + along * (pair[1].1.ln() - pair[0].1.ln())).exp() as usize;
        bytes
    };
    (0..PACKAGES).map(size).collect()
}

/// What one piece of work took.
#[derive(Clone, Copy, Debug, Default)]
struct Took {
    seconds: f64,
    cpu_seconds: f64,
}

/// Medians, each for itself.
fn median(all: &[Took]) -> Took {
    let middle = |of: fn(&Took) -> f64| {
        let mut values: Vec<f64> = all.iter().map(of).collect();
        values.sort_by(f64::total_cmp);
        values[values.len() / 2]
    };
    Took { seconds: middle(|took| took.seconds), cpu_seconds: middle(|took| took.cpu_seconds) }
}

/// Processor time of running processes, in seconds.
fn cpu_seconds(pids: &[u32]) -> f64 {
    let of = |pid: &u32| {
        let text = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        let fields: Vec<f64> = text.rsplit(')').next().unwrap().split_whitespace().skip(11).take(2).map(|f| f.parse().unwrap()).collect();
        fields.iter().sum::<f64>() / TICKS_S
    };
    pids.iter().map(of).sum()
}

/// Runs a shell's script to its end, beside processes whose processor time counts too.
fn timed(command: &mut Command, script: &str, beside: &[u32]) -> Took {
    let before = cpu_seconds(beside);
    let began = Instant::now();
    let finished = Running::start(command.args(["-euc", &format!("{script}\ntimes")])).wait().ok();
    Took { seconds: began.elapsed().as_secs_f64(), cpu_seconds: cpu_seconds(beside) - before + of_children(&finished) }
}

/// The last line of sh's `times`: user and system time of children, as 0m0.00s.
fn of_children(finished: &Finished) -> f64 {
    let seconds = |word: &str| {
        let (minutes, seconds) = word.trim_end_matches('s').split_once('m').unwrap();
        minutes.parse::<f64>().unwrap() * 60.0 + seconds.parse::<f64>().unwrap()
    };
    finished.out.lines().last().unwrap().split_whitespace().map(seconds).sum()
}

/// Warm machines that have all packages, and cold ones, not up yet.
fn warm(packages: Vec<Package>) -> Crowd {
    let crowd = Crowd::new(WARM + RUNS, packages, &Terms { fleet: true, ..Terms::default() });
    let warm = &crowd.machines[..WARM];
    warm.iter().for_each(Machine::up);
    for (index, machine) in warm.iter().enumerate() {
        await_status(machine, "knows the others", |status| status.fleet_members == WARM as u64);
        machine.update();
        crowd.download(index);
    }
    crowd.mirror.forget_log();
    crowd
}

/// A cold machine comes up beside the warm ones; the daemons whose processor time counts.
fn join(crowd: &Crowd, cold: usize) -> Vec<u32> {
    let machine = &crowd.machines[cold];
    machine.up();
    await_status(machine, "knows the others", |status| status.fleet_members == WARM as u64 + 1);
    machine.update();
    crowd.machines[..WARM].iter().chain([machine]).map(|machine| machine.status().pid).collect()
}

/// It is a neighbour no longer, and what it got is right.
fn leave(crowd: &Crowd, cold: usize) {
    let machine = &crowd.machines[cold];
    machine.down();
    for published in &crowd.packages {
        let there = machine.archives().join(published.archive_name());
        if there.exists() {
            assert_holds(&there, &published.bytes);
        }
    }
}

fn read_through(crowd: &Crowd, cold: usize, beside: &[u32]) -> Took {
    let machine = &crowd.machines[cold];
    let file = machine.inside(&machine.archives().join(crowd.packages[0].archive_name()));
    timed(&mut machine.command("sh", &[""; 0]), &format!("cat {} >/dev/null", file.display()), beside)
}

#[allow(clippy::cast_precision_loss, reason = "figures to print")]
fn mb(crowd: &Crowd) -> f64 {
    crowd.packages[0].bytes.len() as f64 / 1e6
}

fn rate(name: &str, mb: f64, took: Took) -> Figure {
    Figure::new(name, mb / took.seconds, "MB/s", "")
}

/// How often the mirror was asked for a package.
fn asked_of_mirror(crowd: &Crowd) -> Figure {
    let count = crowd.mirror.log().iter().filter(|request| request.path.ends_with(".deb")).count();
    #[allow(clippy::cast_precision_loss, reason = "a count to print")]
    Figure::new("requests for packages that the mirror saw", count as f64, "", "none")
}

fn cold_large() -> Outcome {
    let crowd = warm(vec![Package::new("large", "1.0", LARGE_BYTES)]);
    let rivals = Rivals::start(&crowd, &crowd.mirror_root().join(&crowd.packages[0].filename));
    let (mut ours, mut nginx, mut btfs) = (vec![], vec![], vec![]);
    for cold in WARM..WARM + RUNS {
        let pids = join(&crowd, cold);
        ours.push(read_through(&crowd, cold, &pids));
        leave(&crowd, cold);
        nginx.push(rivals.curl(&crowd));
        btfs.push(rivals.btfs(&crowd));
    }
    let (ours, nginx, btfs, mb) = (median(&ours), median(&nginx), median(&btfs), mb(&crowd));
    let per_gb = |name: &str, took: Took| Figure::new(name, took.cpu_seconds * 1000.0 / mb, "CPU s/GB", "");
    let figures = vec![
        rate("200 MB read through the mount, 4 neighbours have it", mb, ours),
        rate("nginx + curl, then sha256sum", mb, nginx),
        rate("btfs, the same 4 seeds", mb, btfs),
        Figure::new("ours beside nginx + curl + sha256sum", nginx.seconds / ours.seconds, "x", "at least 0.5"),
        Figure::new("ours beside btfs", btfs.seconds / ours.seconds, "x", "at least 6"),
        per_gb("all five daemons", ours),
        per_gb("nginx, curl and sha256sum", nginx),
        per_gb("btfs and its four seeds", btfs),
        asked_of_mirror(&crowd),
    ];
    Outcome { figures, ..Outcome::default() }
}

fn cold_slow() -> Outcome {
    let crowd = warm(vec![Package::new("large", "1.0", LARGE_BYTES)]);
    let (mut fast, mut slow) = (vec![], vec![]);
    for cold in WARM..WARM + RUNS {
        let machine = &crowd.machines[cold];
        let slow_host = &crowd.hosts[WARM - 1];
        let pids = join(&crowd, cold);
        fast.push(read_through(&crowd, cold, &pids));
        machine.down();
        // As cold as before: nothing is known of the neighbours, and the file is not here.
        for dir in [machine.state_dir(), machine.cache_dir(), machine.archives()] {
            fs::remove_dir_all(&dir).unwrap();
            fs::create_dir_all(&dir).unwrap();
        }
        fs::create_dir_all(machine.archives().join("partial")).unwrap();
        slow_host.shape(SLOW_MBIT);
        let pids = join(&crowd, cold);
        slow.push(read_through(&crowd, cold, &pids));
        slow_host.shape(FAST_MBIT);
        leave(&crowd, cold);
    }
    let (fast, slow, mb) = (median(&fast), median(&slow), mb(&crowd));
    let figures = vec![
        rate("200 MB read through the mount, 4 neighbours have it", mb, fast),
        rate("the same with one neighbour at 1 MB/s", mb, slow),
        Figure::new("with one slow neighbour beside none", slow.seconds / fast.seconds, "x", "at most 1.3"),
        asked_of_mirror(&crowd),
    ];
    Outcome { figures, ..Outcome::default() }
}

fn cold_many() -> Outcome {
    let mut packages = vec![Package::new("as-one", "1.0", sizes().iter().sum())];
    packages.extend(sizes().into_iter().zip(0..).map(|(size, n)| Package::new(&format!("mix{n:03}"), "1.0", size)));
    let mix: Vec<String> = packages[1..].iter().map(|package| package.name.clone()).collect();
    let crowd = warm(packages);
    let (mut many, mut one) = (vec![], vec![]);
    for cold in WARM..WARM + RUNS {
        let pids = join(&crowd, cold);
        let machine = &crowd.machines[cold];
        let script = |names: &str| format!("apt-get install -y -d {names} >/dev/null");
        let install = |names: &str| timed(&mut machine.command("sh", &[""; 0]), &script(names), &pids);
        many.push(install(&mix.join(" ")));
        one.push(install("as-one"));
        leave(&crowd, cold);
    }
    let (many, one) = (median(&many), median(&one));
    let figures = vec![
        Figure::new("200 packages by apt-get install -d", many.seconds, "s", ""),
        Figure::new("one package of the same bytes", one.seconds, "s", ""),
        Figure::new("200 packages beside one", many.seconds / one.seconds, "x", "at most 1.5"),
        asked_of_mirror(&crowd),
    ];
    Outcome { figures, ..Outcome::default() }
}

/// nginx on the first neighbour, and a seed on each.
struct Rivals {
    _home: tempfile::TempDir,
    nginx: Running,
    seeds: Vec<Running>,
    url: String,
    torrent: PathBuf,
    mount: PathBuf,
    name: String,
    got: PathBuf,
    len: u64,
}

impl Rivals {
    fn start(crowd: &Crowd, file: &Path) -> Self {
        let home = crate::harness::workspace();
        let at = |name: &str| home.path().join(name);
        let (root, name) = (file.parent().unwrap(), file.file_name().unwrap().to_str().unwrap().to_owned());
        let host = &crowd.hosts[0];
        let address = host.address;
        let conf = format!(
            "daemon off;\nmaster_process off;\nuser root;\npid {home}/nginx.pid;\nerror_log /dev/null;\nevents {{}}\n\
             http {{ access_log off; sendfile on; client_body_temp_path {home}; proxy_temp_path {home}; fastcgi_temp_path {home};\n\
             uwsgi_temp_path {home}; scgi_temp_path {home}; server {{ listen {address}:8099; root {root}; }} }}\n",
            home = home.path().display(),
            root = root.display(),
        );
        fs::write(at("nginx.conf"), conf).unwrap();
        let nginx = Running::start(host.command("nginx").arg("-c").arg(at("nginx.conf")));
        let tracker = format!("{address}:8097");
        let torrent = at("torrent");
        let everybody: Vec<String> = crowd.hosts[..WARM].iter().map(|host| format!("{}:6881", host.address)).collect();
        let python = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/tools/libtorrent-2.1/bin/python");
        let seed = |index: usize| {
            let mut command = crowd.hosts[index].command(&python);
            command.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/lab/seed.py")).arg(file).arg(at(&format!("torrent{index}")));
            command.arg(crowd.hosts[index].address.to_string()).arg("6881").arg(&tracker);
            if index == 0 {
                command.args(&everybody);
            }
            Running::start(&mut command)
        };
        let seeds: Vec<Running> = (0..WARM).map(seed).collect();
        let deadline = Instant::now() + crate::harness::LIMIT;
        while !seeds.iter().all(|seed| seed.said().0.contains("ready")) {
            assert!(Instant::now() < deadline, "the seeds are not ready: {:?}", seeds.iter().map(Running::said).collect::<Vec<_>>());
            std::thread::yield_now();
        }
        fs::copy(at("torrent0"), &torrent).unwrap();
        let mount = at("mount");
        fs::create_dir(&mount).unwrap();
        Self {
            nginx,
            seeds,
            url: format!("http://{address}:8099/{name}"),
            torrent,
            mount,
            name,
            got: at("got"),
            len: fs::metadata(file).unwrap().len(),
            _home: home,
        }
    }

    /// From the last machine's place, to a file, hashed when it is here.
    fn curl(&self, crowd: &Crowd) -> Took {
        let got = self.got.display();
        let script = format!("curl -sSf --retry-connrefused --retry 10 -o {got} {}; sha256sum {got} >/dev/null; rm {got}", self.url);
        timed(&mut crowd.hosts.last().unwrap().command("sh"), &script, &[self.nginx.id()])
    }

    /// Mounted before the clock runs, as poolfs is.
    fn btfs(&self, crowd: &Crowd) -> Took {
        let host = crowd.hosts.last().unwrap();
        let cache = self.got.with_extension("btfs");
        fs::create_dir(&cache).unwrap();
        let mut command = host.command("btfs");
        command.arg("-f").arg(format!("--data-directory={}", cache.display())).arg(&self.torrent).arg(&self.mount);
        let running = Running::start(&mut command);
        let deadline = Instant::now() + crate::harness::LIMIT;
        let file = self.mount.join(&self.name);
        while fs::metadata(&file).map_or(0, |found| found.len()) != self.len {
            assert!(Instant::now() < deadline, "btfs shows nothing: {:?}", running.said());
            std::thread::yield_now();
        }
        let mut pids: Vec<u32> = self.seeds.iter().map(Running::id).collect();
        pids.push(running.id());
        let took = timed(&mut host.command("sh"), &format!("cat {} >/dev/null", file.display()), &pids);
        host.run(&format!("umount {}", self.mount.display()));
        running.wait();
        fs::remove_dir_all(&cache).unwrap();
        took
    }
}
