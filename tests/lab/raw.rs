//! One file over plain TCP and by BitTorrent, from the same neighbours over the same links: nginx with curl and aria2, libtorrent, btfs.

use super::rivals::rival;
use super::{own_file, tool};
use crate::harness::crowd::Crowd;
use crate::harness::process::Finished;
use crate::harness::{Host, LIMIT, Running};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

/// Ticks in which the kernel counts processor time (`USER_HZ`).
const TICKS_S: f64 = 100.0;

const NGINX_PORT: u16 = 8099;
const SEED_PORT: u16 = 6881;
const TRACKER_PORT: u16 = 8097;

/// What one piece of work took.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Took {
    pub(crate) seconds: f64,
    pub(crate) cpu_seconds: f64,
}

/// Medians, each for itself.
pub(crate) fn median(all: &[Took]) -> Took {
    let middle = |of: fn(&Took) -> f64| super::median(all.iter().map(of).collect());
    Took { seconds: middle(|took| took.seconds), cpu_seconds: middle(|took| took.cpu_seconds) }
}

/// Processor time of running processes, in seconds.
pub(crate) fn cpu_seconds(pids: &[u32]) -> f64 {
    let of = |pid: &u32| {
        let text = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        let fields: Vec<f64> = text.rsplit(')').next().unwrap().split_whitespace().skip(11).take(2).map(|f| f.parse().unwrap()).collect();
        fields.iter().sum::<f64>() / TICKS_S
    };
    pids.iter().map(of).sum()
}

/// Runs a shell's script to its end, beside processes whose processor time counts too.
pub(crate) fn timed(command: &mut Command, script: &str, beside: &[u32]) -> Took {
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

/// nginx and a seed on each neighbour.
pub(crate) struct Raw<'a> {
    client: &'a Host,
    nginx: Vec<Running>,
    seeds: Vec<Running>,
    urls: Vec<String>,
    name: String,
    len: u64,
    /// Hashed as poolfs hashes what it gets.
    digest: String,
    home: tempfile::TempDir,
}

impl<'a> Raw<'a> {
    /// `neighbours` give `file`, whose SHA-256 that is, to `client`.
    pub(crate) fn start(crowd: &'a Crowd, neighbours: usize, client: &'a Host, file: &Path, digest: &str) -> Self {
        let home = crate::harness::workspace();
        let hosts = &crowd.hosts[..neighbours];
        let nginx = hosts.iter().map(|host| start_nginx(host, home.path(), file.parent().unwrap())).collect();
        let seeds = start_seeds(hosts, home.path(), file);
        let name = file.file_name().unwrap().to_str().unwrap().to_owned();
        let urls = hosts.iter().map(|host| format!("http://{}:{NGINX_PORT}/{name}", host.address)).collect();
        fs::create_dir(home.path().join("mount")).unwrap();
        Self { client, nginx, seeds, urls, name, len: fs::metadata(file).unwrap().len(), digest: digest.to_owned(), home }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.home.path().join(name)
    }

    /// Runs `get`, which leaves the file at `got`, and then hashes it.
    fn to_file(&self, got: &Path, get: &str, program: &mut Command, givers: &[Running]) -> Took {
        let (got, digest) = (got.display(), &self.digest);
        let script = format!("{get} >/dev/null; sha256sum {got} | grep -q {digest}; rm {got}");
        timed(program, &script, &givers.iter().map(Running::id).collect::<Vec<_>>())
    }

    /// From the first neighbour.
    pub(crate) fn curl(&self) -> Took {
        let got = self.at("curl");
        let get = format!("curl -sSf --retry-connrefused --retry 10 -o {} {}", got.display(), self.urls[0]);
        self.to_file(&got, &get, &mut self.client.command("sh"), &self.nginx)
    }

    /// From all neighbours at once, in parts.
    pub(crate) fn aria2(&self) -> Took {
        let all = format!("-x{0} -s{0} -k1M", self.urls.len());
        let get =
            format!("aria2c -q --no-conf --file-allocation=none {all} -d {} -o aria2 {}", self.home.path().display(), self.urls.join(" "));
        self.to_file(&self.at("aria2"), &get, &mut rival(self.client, "sh", &[]), &self.nginx)
    }

    pub(crate) fn libtorrent(&self) -> Took {
        let (into, got) = (self.at("libtorrent"), self.at("libtorrent").join(&self.name));
        fs::create_dir(&into).unwrap();
        let words = [python().display().to_string(), own_file("leech.py").display().to_string(), self.at("torrent0").display().to_string()];
        let get = format!("{} {} {}", words.join(" "), into.display(), self.client.address);
        let took = self.to_file(&got, &get, &mut self.client.command("sh"), &self.seeds);
        fs::remove_dir_all(&into).unwrap();
        took
    }

    /// Mounted before the clock runs, as poolfs is. What it reads is checked by its pieces' SHA-1.
    pub(crate) fn btfs(&self) -> Took {
        let (cache, mount) = (self.at("btfs"), self.at("mount"));
        fs::create_dir(&cache).unwrap();
        let data = format!("--data-directory={}", cache.display());
        let mut command = rival(self.client, "btfs", &["-f", &data]);
        let running = Running::start(command.arg(self.at("torrent0")).arg(&mount));
        let deadline = Instant::now() + LIMIT;
        let file = mount.join(&self.name);
        while fs::metadata(&file).map_or(0, |found| found.len()) != self.len {
            assert!(Instant::now() < deadline, "btfs shows nothing: {:?}", running.said());
            std::thread::yield_now();
        }
        let pids: Vec<u32> = self.seeds.iter().chain([&running]).map(Running::id).collect();
        let took = timed(&mut self.client.command("sh"), &format!("cat {} >/dev/null", file.display()), &pids);
        self.client.run(&format!("umount {}", mount.display()));
        running.wait();
        fs::remove_dir_all(&cache).unwrap();
        took
    }
}

fn start_nginx(host: &Host, home: &Path, root: &Path) -> Running {
    let home = home.join(format!("nginx-{}", host.address));
    fs::create_dir(&home).unwrap();
    let conf = format!(
        "daemon off;\nmaster_process off;\nuser root;\npid {home}/pid;\nerror_log /dev/null;\nevents {{}}\n\
         http {{ access_log off; sendfile on; client_body_temp_path {home}; proxy_temp_path {home}; fastcgi_temp_path {home};\n\
         uwsgi_temp_path {home}; scgi_temp_path {home}; server {{ listen {address}:{NGINX_PORT}; root {root}; }} }}\n",
        home = home.display(),
        address = host.address,
        root = root.display(),
    );
    let path = home.join("nginx.conf");
    fs::write(&path, conf).unwrap();
    Running::start(&mut rival(host, "nginx", &["-e", "/dev/null", "-c", path.to_str().unwrap()]))
}

fn python() -> PathBuf {
    tool("libtorrent-2.1/bin/python")
}

fn start_seeds(hosts: &[Host], home: &Path, file: &Path) -> Vec<Running> {
    let tracker = format!("{}:{TRACKER_PORT}", hosts[0].address);
    let everybody: Vec<String> = hosts.iter().map(|host| format!("{}:{SEED_PORT}", host.address)).collect();
    let seed = |index: usize| {
        let mut command = hosts[index].command(python());
        command.arg(own_file("seed.py")).arg(file).arg(home.join(format!("torrent{index}")));
        command.arg(hosts[index].address.to_string()).arg(SEED_PORT.to_string()).arg(&tracker);
        if index == 0 {
            command.args(&everybody);
        }
        Running::start(&mut command)
    };
    let seeds: Vec<Running> = (0..hosts.len()).map(seed).collect();
    let deadline = Instant::now() + LIMIT;
    while !seeds.iter().all(|seed| seed.said().0.contains("ready")) {
        assert!(Instant::now() < deadline, "the seeds are not ready: {:?}", seeds.iter().map(Running::said).collect::<Vec<_>>());
        std::thread::yield_now();
    }
    seeds
}
