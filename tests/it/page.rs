//! The status page in a real browser, and what monitoring reads, of a daemon that is downloading.

use crate::harness::browser::Browser;
use crate::harness::crowd::{Crowd, Terms, await_status};
use crate::harness::process::Finished;
use crate::harness::{Client, Fault, Gate, Host, LIMIT, Machine, Package, Running, report, run};
use serde_json::Value;
use std::collections::BTreeSet;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

/// What is kept of a repository's password and of the fleet's key: nothing of it may be seen.
const PASSWORD: &str = "hunter2hunter2";

/// Where pictures are kept for people to look at.
fn pictures() -> PathBuf {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/page");
    fs::create_dir_all(&dir).unwrap();
    dir
}

fn json(machine: &Machine, command: &str) -> Value {
    serde_json::from_str(&machine.poolfs(&[command, "--json"]).ok().out).unwrap()
}

fn page_of(machine: &Machine) -> String {
    json(machine, "status")["page"].as_str().expect("the page is served").to_owned()
}

/// `curl` on that host, with what it says of the answer at the end.
fn curl(host: &Host, arguments: &[&str]) -> Finished {
    let mut command = host.command("curl");
    run(command.args(["-s", "-m", "60", "-w", "\n%{http_code} %{content_type}"]).args(arguments))
}

fn body(finished: &Finished) -> &str {
    finished.out.rsplit_once('\n').unwrap().0
}

/// The numbers of `<data value=...>` that CSS selectors find, one each.
fn numbers(browser: &mut Browser, selectors: &[String]) -> Vec<u64> {
    let list = serde_json::to_string(selectors).unwrap();
    let found = browser.value(&format!(
        "{list}.map(one => {{ const at = document.querySelector(one); return at ? Number(at.querySelector('data')?.value ?? at.value) : -1; }})"
    ));
    let numbers = found.as_array().unwrap().iter().map(|number| number.as_u64().unwrap_or(u64::MAX));
    numbers.collect()
}

/// What `status --json` has, by the selectors of where it is on the page.
fn wanted(status: &Value) -> Vec<(String, u64)> {
    let mut wanted: Vec<(String, u64)> = Vec::new();
    let number = |value: &Value| value.as_u64().unwrap_or_else(|| panic!("{value}"));
    for source in ["mirror", "peer", "delta"] {
        wanted.push((format!("#bytes-{source}"), number(&status["bytes"][source])));
    }
    wanted.push(("#bytes-given".into(), number(&status["uploaded"]["bytes"])));
    wanted.push(("#announced-keys".into(), number(&status["node"]["announced_keys"])));
    for mount in status["mounts"].as_array().unwrap() {
        let row = format!("#mounts tr[data-role={}]", mount["role"].as_str().unwrap());
        for (class, key) in [
            ("files", "files"),
            ("announced", "announced"),
            ("available", "available"),
            ("local", "local_only"),
            ("withheld", "withheld"),
            ("damaged", "damaged"),
        ] {
            wanted.push((format!("{row} .{class}"), number(&mount[key])));
        }
    }
    for download in status["downloads"].as_array().unwrap() {
        let row = format!("#downloads tr[data-digest='{}']", download["digest"].as_str().unwrap());
        wanted.push((format!("{row} .done"), number(&download["done_bytes"])));
        wanted.push((format!("{row} .size"), number(&download["size"])));
        wanted.push((format!("{row} progress"), number(&download["done_bytes"])));
    }
    wanted
}

/// Everything on the page at `url` that `status --json` has too is the same there, as soon as what was going on has come to rest.
fn compare(browser: &mut Browser, url: &str, machine: &Machine) -> Value {
    let deadline = Instant::now() + LIMIT;
    loop {
        let status = json(machine, "status");
        browser.open(url);
        let (selectors, values): (Vec<_>, Vec<_>) = wanted(&status).into_iter().unzip();
        let shown = numbers(browser, &selectors);
        if shown == values {
            assert_eq!(status["downloads"].as_array().unwrap().len(), 2, "{status}");
            return status;
        }
        let pairs = |values: Vec<u64>| selectors.iter().cloned().zip(values).collect::<Vec<_>>();
        assert!(Instant::now() < deadline, "{:#?}\n{:#?}", pairs(shown), pairs(values));
    }
}

struct Scene {
    crowd: Crowd,
    gates: [Gate; 2],
    downloading: Running,
    page: String,
}

/// Two machines; the second has got the first's packages from it and is stuck within one from the mirror.
fn scene() -> Scene {
    let mut packages: Vec<_> = (0..6).map(|at| Package::new(&format!("part{at}"), "1.0", 700_000 + 90_000 * at)).collect();
    packages.push(Package::new("large", "3.0", 6_000_000));
    packages.push(Package::new("second", "2.5", 2_000_000));
    let crowd = Crowd::new(2, packages, &Terms::default());
    crowd.up(false);
    let names: Vec<_> = (0..6).map(|at| format!("part{at}")).collect();
    let install = |machine: usize| {
        let arguments: Vec<&str> = ["install", "-y", "-d"].into_iter().chain(names.iter().map(String::as_str)).collect();
        crowd.machines[machine].apt_get(&arguments).ok();
    };
    install(0);
    await_status(&crowd.machines[0], "has announced", |status| status.node.as_ref().is_some_and(|node| node.announced_keys >= 6));
    install(1);
    let gates = [Gate::new(), Gate::new()];
    for (name, gate) in ["large_3.0_all.deb", "second_2.5_all.deb"].into_iter().zip(&gates) {
        crowd.mirror.fault(name, Client::Poolfs, Fault::Pour(gate.clone()));
    }
    let downloading = Running::start(&mut crowd.machines[1].command("apt-get", &["install", "-y", "-d", "large", "second"]));
    gates[0].let_through(60);
    gates[1].let_through(20);
    await_status(&crowd.machines[1], "both are under way", |status| {
        let done = |download: &Value| download["done_bytes"].as_u64().is_some_and(|bytes| bytes > 0);
        status.downloads.len() == 2 && status.downloads.iter().all(done)
    });
    let page = page_of(&crowd.machines[1]);
    Scene { crowd, gates, downloading, page }
}

/// What people see while apt runs: right figures, with and without JavaScript, on a telephone and a desk, that follow what happens.
#[test]
fn shows_a_daemon_that_is_downloading() {
    let Scene { crowd, gates, downloading, page } = scene();
    let (machine, host) = (&crowd.machines[1], &crowd.hosts[1]);
    let url = format!("http://{page}/");
    let mut browser = Browser::start(host);
    let mut status = Value::Null;
    for (width, dark, name) in [(1280, false, "desktop"), (1280, true, "desktop-dark"), (390, false, "phone"), (390, true, "phone-dark")] {
        browser.resize(width, dark);
        status = compare(&mut browser, &url, machine);
        let sideways = browser.value("document.documentElement.scrollWidth - document.documentElement.clientWidth");
        assert_eq!(sideways, 0, "the page is wider than {width}");
        let small = browser.value("[...document.querySelectorAll('td,th,p,dd')].filter(e => e.checkVisibility() && e.textContent.trim() && parseFloat(getComputedStyle(e).fontSize) < 12).length");
        assert_eq!(small, 0, "letters too small to read");
        browser.picture(&pictures().join(format!("{name}.png")));
    }
    let peers = browser.value("document.querySelectorAll('#peers tbody tr').length");
    assert_eq!(peers, json(machine, "peers").as_array().unwrap().len());
    assert!(peers.as_u64() > Some(0), "nobody gave anything");
    let drawn = browser.value("document.querySelectorAll('#traffic rect.peer, #traffic rect.mirror').length");
    assert!(drawn.as_u64() >= Some(2), "the chart is empty: {drawn}");
    // What the chart adds up to is what arrived.
    for source in ["mirror", "peer", "delta"] {
        let sum = browser.value(&format!("document.querySelector('#traffic-sum').dataset.{source}"));
        assert_eq!(sum, status["bytes"][source].to_string(), "{source}");
    }
    let install = browser.value("document.querySelector('#install').textContent");
    assert!(install.as_str().unwrap().contains("package"), "{install}");
    // It follows by itself.
    browser.await_true("document.querySelectorAll('#downloads tbody tr').length == 2");
    gates.iter().for_each(Gate::open);
    browser.await_true("document.querySelector('#downloads .empty') !== null");
    downloading.wait().ok();
    assert_eq!(browser.complaints(), Vec::<String>::new());
    // Without JavaScript the tables are the same.
    browser.call("Emulation.setScriptExecutionDisabled", &serde_json::json!({ "value": true }));
    browser.open(&url);
    let status = json(machine, "status");
    let page = curl(host, &[&url]);
    let mounts = status["mounts"].as_array().unwrap();
    for mount in mounts {
        let (path, files) = (mount["path"].as_str().unwrap(), &mount["files"]);
        assert!(body(&page).contains(path) && body(&page).contains(&format!("<data value=\"{files}\">")), "{}", body(&page));
    }
    browser.picture(&pictures().join("without-javascript.png"));
    // When the daemon goes, the page says so instead of showing old figures as new.
    browser.call("Emulation.setScriptExecutionDisabled", &serde_json::json!({ "value": false }));
    browser.open(&url);
    machine.down();
    browser.await_true("document.documentElement.classList.contains('is-lost')");
    report("page", "figures as in `status --json` at 1280 and 390 pixels, live, without JavaScript; pictures in target/page");
}

/// promtool and the table of names agree, health is what it says, and nobody gets what is not for him.
#[test]
fn monitoring_reads_it_and_strangers_do_not() {
    let Scene { crowd, gates, downloading, page } = scene();
    let (machine, host) = (&crowd.machines[1], &crowd.hosts[1]);
    let url = |path: &str| format!("http://{page}{path}");
    let port = page.rsplit_once(':').unwrap().1.to_owned();
    let scraped = curl(host, &[&url("/metrics")]);
    assert!(scraped.out.ends_with("\n200 text/plain; version=0.0.4"), "{scraped}");
    let mut promtool = Command::new("promtool");
    let mut child =
        promtool.args(["check", "metrics"]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(body(&scraped).as_bytes()).unwrap();
    let checked = child.wait_with_output().unwrap();
    let said = [checked.stdout, checked.stderr].concat();
    assert!(checked.status.success() && said.is_empty(), "{}\n{scraped}", String::from_utf8_lossy(&said));
    // Every metric of the README, and no other.
    let exported: BTreeSet<_> = body(&scraped).lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next()).collect();
    let readme = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md")).unwrap();
    let rows = readme.lines().filter_map(|line| line.strip_prefix("| `")?.split(['`', '{']).next());
    let documented: BTreeSet<_> = rows.filter(|name| name.starts_with("poolfs_")).collect();
    assert_eq!(exported, documented);
    let value = |text: &str, sample: &str| -> f64 {
        let line = text.lines().find_map(|line| line.strip_prefix(sample)?.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("no {sample}")).parse().unwrap()
    };
    let deadline = Instant::now() + LIMIT;
    let scraped = loop {
        let status = json(machine, "status");
        let scraped = curl(host, &[&url("/metrics")]);
        let differs = [
            ("poolfs_received_bytes_total{source=\"peer\"}", &status["bytes"]["peer"]),
            ("poolfs_received_bytes_total{source=\"mirror\"}", &status["bytes"]["mirror"]),
            ("poolfs_files{mount=\"archives\",state=\"announced\"}", &status["mounts"][0]["announced"]),
            ("poolfs_catalog_files", &status["catalog_entries"]),
        ]
        .into_iter()
        .find(|(sample, want)| (value(body(&scraped), sample) - want.as_f64().unwrap()).abs() > 0.5);
        let Some(differs) = differs else { break scraped };
        assert!(Instant::now() < deadline, "{differs:?}: {scraped}");
    };
    assert!((value(body(&scraped), "poolfs_downloads") - 2.0).abs() < 0.1);
    run(Command::new("promtool").args(["check", "rules"]).arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/monitoring/alerts.yml")))
        .ok();
    for path in ["/health", "/ready"] {
        assert_eq!(curl(host, &[&url(path)]).out, "ok\n\n200 text/plain; charset=utf-8", "{path}");
    }
    // Names that a stranger's DNS could lead here, methods that could change something, and paths that are not there.
    let code = |arguments: &[&str]| curl(host, arguments).out.rsplit_once('\n').unwrap().1.split(' ').next().unwrap().to_owned();
    let named = |name: &str| code(&["-H", &format!("Host: {name}"), &url("/")]);
    assert_eq!(named(&format!("localhost:{port}")), "200");
    for name in [format!("evil.example:{port}"), "evil.example".into(), String::new(), format!("10.99.0.2:{port}")] {
        assert_ne!(named(&name), "200", "{name:?}");
    }
    assert_eq!(code(&["-X", "POST", &url("/")]), "405");
    assert_eq!(code(&["-d", "x", &url("/")]), "400");
    assert_eq!(code(&[&url("/../etc/passwd")]), "404");
    assert_eq!(curl(host, &["-I", &url("/")]).out.lines().next().unwrap().trim(), "HTTP/1.1 200 OK");
    let policy = curl(host, &["-I", &url("/")]).out;
    for wanted in [
        "content-security-policy: default-src 'none'",
        "frame-ancestors 'none'",
        "x-content-type-options: nosniff",
        "cache-control: no-store",
    ] {
        assert!(policy.contains(wanted), "{wanted}: {policy}");
    }
    assert!(!policy.contains("access-control"), "{policy}");
    // It is on loopback only.
    let outside = format!("http://{}:{port}/", host.address);
    assert_ne!(curl(&crowd.hosts[0], &[&outside]).code(), 0);
    gates.iter().for_each(Gate::open);
    downloading.wait().ok();
    machine.down();
}

/// A page that shows a repository's password or the fleet's key to every local user.
#[test]
fn nothing_secret_is_shown() {
    let crowd = Crowd::new(1, vec![Package::new("small", "1.0", 3_000)], &Terms { fleet: true, ..Terms::default() });
    let machine = &crowd.machines[0];
    machine.edit_sources(|text| text.replacen("http://", &format!("http://me:{PASSWORD}@"), 1));
    let config = fs::read_to_string(machine.config()).unwrap();
    let advisories = format!("[apt]\nadvisories = [\"http://me:{PASSWORD}@10.99.0.254:1/advisories\"]\n");
    fs::write(machine.config(), config.replacen("[apt]\n", &advisories, 1)).unwrap();
    machine.up();
    // The mirror asks for no password and takes any; what cannot be fetched makes poolfs speak of its URL.
    machine.update();
    machine.apt_get(&["install", "-y", "-d", "small"]).ok();
    let page = page_of(machine);
    let key = fs::read_to_string(crowd.fleet_key()).unwrap();
    let told = json(machine, "status")["advisories"].to_string();
    assert!(told.contains("10.99.0.254:1"), "nothing is said of it: {told}");
    for path in ["/", "/?day", "/metrics", "/facts.json", "/health", "/ready"] {
        let shown = curl(&crowd.hosts[0], &[&format!("http://{page}{path}")]).out;
        assert!(shown.len() > 3, "{path}: {shown}");
        assert!(!shown.contains(PASSWORD) && !shown.contains(key.trim()), "{path}: {shown}");
    }
    machine.down();
}

/// The port belongs to somebody else: the mounts work, and the status says what to do.
#[test]
fn a_taken_port_is_told() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let stage = crate::harness::Stage::new(vec![Package::new("small", "1.0", 3_000)], &crate::harness::Options::default());
    let config = stage.machine.config();
    let text = fs::read_to_string(&config).unwrap();
    let wanted = format!("[status]\nlisten = \"{}\"", taken.local_addr().unwrap());
    fs::write(&config, text.replacen("[status]\nlisten = '127.0.0.1:0'", &wanted, 1)).unwrap();
    stage.machine.up();
    let status = json(&stage.machine, "status");
    assert_eq!(status["page"], Value::Null);
    let problem = status["problems"][0].as_str().unwrap();
    assert!(problem.starts_with("no status page: listen at 127.0.0.1:") && problem.contains("choose another status.listen"), "{problem}");
    stage.machine.update();
    stage.download_all().ok();
    stage.machine.down();
}
