//! A stock apt on the mounts: what it does, and what it no longer has to do.

use crate::harness::{
    Apt, Client, Fault, Gate, Machine, Mirror, Options, Package, Repo, Running, Sources, Stage, listed, report, run, workspace,
};
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::Path;

/// Small, over a piece, over several pieces with a tail; an epoch in a version is quoted in file names.
fn three() -> Vec<Package> {
    vec![
        Package::new("small", "1:1.0-1", 3_000),
        Package::new("middle", "2.0~rc1+b2", 400_000).depends("small"),
        Package::new("large", "3.0", 1_700_001).depends("middle"),
    ]
}

fn with(apt: Apt) -> Options {
    Options { apt, ..Options::default() }
}

/// Every file below a directory that apt leaves, with its bytes; `lock` and `partial/` left out.
fn contents(directory: &Path) -> BTreeMap<String, Vec<u8>> {
    let names = listed(directory).into_iter().filter(|name| name != "lock" && name != "partial" && name != "auxfiles");
    names.map(|name| (name.clone(), fs::read(directory.join(&name)).unwrap())).collect()
}

fn update(apt: Apt, gzip_indexes: bool) {
    let apt_conf = if gzip_indexes { "Acquire::GzipIndexes \"true\";\n".into() } else { String::new() };
    let options = Options { apt, apt_conf, ..Options::default() };
    let stage = Stage::new(three(), &options);
    stage.machine.up();
    let gets = stage.machine.update().gets().len();
    let through_mount = contents(&stage.machine.lists());
    let status = stage.machine.status();
    assert_eq!(status.catalog_entries, 3, "{status:#?}");
    assert!(status.lists().files >= through_mount.len() as u64, "{status:#?}");
    assert_eq!(status.problems, Vec::<String>::new());
    // A second update, with nothing new, and one with something new.
    stage.machine.update();
    assert!(through_mount == contents(&stage.machine.lists()), "an update without news changed the lists");
    let plain = Machine::new(&Sources::Local(&stage.repo, &stage.mirror), &options);
    plain.update();
    let without = contents(&plain.lists());
    assert_eq!(through_mount.keys().collect::<Vec<_>>(), without.keys().collect::<Vec<_>>());
    assert!(through_mount == without, "the lists differ in bytes from those of apt without poolfs");
    report(
        &format!("apt::update {apt:?} gzip_indexes={gzip_indexes}"),
        &format!("{gets} GETs by apt, {} files in lists", through_mount.len()),
    );
}

/// If the lists differed from what apt makes in a plain directory, packages would be missing or resolved differently.
#[test]
fn update_own() {
    update(Apt::Own, false);
}

/// As `update_own`, for apt 3.0.
#[test]
fn update_trixie() {
    update(Apt::Trixie, false);
}

/// As `update_own`, where apt keeps its indexes compressed (Docker's images do): apt recompresses them itself.
#[test]
fn update_own_with_compressed_indexes() {
    update(Apt::Own, true);
}

/// A package that a new list names must be found without a restart, one that it no longer names must not be offered.
#[test]
fn update_with_news_changes_what_is_offered() {
    let mut stage = Stage::mounted(three(), &Options::default());
    stage.repo.withdraw("large");
    let newer = stage.repo.add(Package::new("newer", "1", 9_000));
    stage.repo.publish();
    stage.machine.update();
    assert_eq!(stage.machine.status().catalog_entries, 3);
    assert!(!stage.machine.archives().join("large_3.0_all.deb").exists(), "an entry of the old list is still offered");
    let finished = stage.machine.apt_get(&["install", "-y", "-d", "newer"]).ok();
    stage.assert_no_gets(&finished);
    crate::harness::assert_holds(&stage.archive(&newer), &newer.bytes);
}

fn download(apt: Apt) {
    let stage = Stage::mounted(three(), &with(apt));
    let finished = stage.download_all().ok();
    stage.assert_no_gets(&finished);
    stage.assert_all_here();
    let status = stage.machine.status();
    assert_eq!(status.archives().ghosts_opened, 3, "{status:#?}");
    for published in &stage.packages {
        assert_eq!(crate::harness::attribute(&stage.archive(published), "user.poolfs.source").as_deref(), Some("mirror"));
    }
    let bytes: u64 = stage.packages.iter().map(|published| published.bytes.len() as u64).sum();
    // The update before it took indexes.
    let mirror = status.bytes.mirror - status.last_update.as_ref().map_or(0, |update| update.bytes.mirror);
    assert_eq!((mirror, status.bytes.peer, status.bytes.delta), (bytes, 0, 0), "each byte comes once");
    let archives = status.archives();
    assert_eq!(archives.path, stage.machine.archives());
    assert!(archives.bytes >= bytes && archives.files >= 3, "{status:#?}");
    let sorted = archives.announced + archives.available + archives.local_only + archives.withheld;
    assert_eq!(sorted, archives.files, "each file is one of the four: {status:#?}");
    for published in &stage.packages {
        let metadata = fs::metadata(stage.archive(published)).unwrap();
        assert_eq!((metadata.uid(), metadata.gid(), metadata.permissions().mode() & 0o7777), (0, 0, 0o644), "{}", published.archive_name());
    }
    assert_eq!(listed(&stage.machine.archives().join("partial")), Vec::<String>::new());
    report(
        &format!("apt::download {apt:?}"),
        &format!("0 GETs of packages by apt, {} ghosts opened, {bytes} bytes from the mirror", status.archives().ghosts_opened),
    );
}

/// If apt fetched any package itself, poolfs would be no source of packages.
#[test]
fn download_own() {
    download(Apt::Own);
}

/// As `download_own`, for apt 3.0.
#[test]
fn download_trixie() {
    download(Apt::Trixie);
}

fn install_and_delete(apt: Apt) {
    let stage = Stage::mounted(three(), &with(apt));
    let finished = run(&mut stage.machine.command("apt", &["install", "-y", "large"])).ok();
    stage.assert_no_gets(&finished);
    assert_eq!(stage.debs(), Vec::<String>::new(), "apt deletes what it installed");
    for published in &stage.packages {
        let name = &published.package.name;
        let payload = stage.machine.root().join(format!("usr/share/{name}/payload"));
        assert_eq!(fs::metadata(&payload).unwrap().len(), published.package.payload_bytes as u64, "{}", payload.display());
    }
    // What was verified once is kept as an object: the second time nobody asks the mirror.
    let asked = stage.mirror.debs_asked_by(Client::Poolfs);
    let finished = run(&mut stage.machine.command("apt", &["install", "-y", "--reinstall", "large"])).ok();
    stage.assert_no_gets(&finished);
    assert_eq!(stage.mirror.debs_asked_by(Client::Poolfs), asked, "an object that is here was fetched again: {:#?}", stage.mirror.log());
    // apt deletes what it fetched in this run; what it found in archives/ stays, as without poolfs, until it is cleaned.
    stage.machine.apt_get(&["clean"]).ok();
    assert_eq!(stage.debs(), Vec::<String>::new());
    stage.machine.down();
    assert_eq!(stage.debs(), Vec::<String>::new(), "a deleted file came back in the covered directory");
    report(
        &format!("apt::install_and_delete {apt:?}"),
        &format!("0 GETs of packages by apt, {asked} requests by poolfs, 0 at the reinstallation"),
    );
}

/// dpkg must install what came through the mount, and apt's deletion must be kept, without losing the bytes.
#[test]
fn install_and_delete_own() {
    install_and_delete(Apt::Own);
}

/// As `install_and_delete_own`, in a chroot with apt 3.0.
#[test]
fn install_and_delete_trixie() {
    install_and_delete(Apt::Trixie);
}

fn clean(apt: Apt) {
    let mut stage = Stage::mounted(three(), &with(apt));
    stage.download_all().ok();
    // Only what no list names any more goes.
    stage.repo.withdraw("small");
    let again = stage.repo.add(Package::new("small", "1:2.0-1", 3_100));
    stage.repo.publish();
    stage.machine.update();
    stage.machine.apt_get(&["autoclean"]).ok();
    assert_eq!(stage.debs(), ["large_3.0_all.deb", "middle_2.0~rc1+b2_all.deb"]);
    let finished = stage.machine.apt_get(&["install", "-y", "-d", "small"]).ok();
    stage.assert_no_gets(&finished);
    assert_eq!(stage.debs().len(), 3);
    stage.machine.apt_get(&["clean"]).ok();
    assert_eq!(listed(&stage.machine.archives()), ["lock", "partial"]);
    assert_eq!(listed(&stage.machine.archives().join("partial")), Vec::<String>::new());
    let finished = stage.machine.apt_get(&["install", "-y", "-d", "small"]).ok();
    stage.assert_no_gets(&finished);
    crate::harness::assert_holds(&stage.archive(&again), &again.bytes);
    report(&format!("apt::clean {apt:?}"), "autoclean removes 1 of 3, clean removes all, 0 GETs of packages by apt after it");
}

/// A file that apt deleted and that is still listed, or one that vanishes though apt kept it, would be a broken directory.
#[test]
fn clean_and_autoclean_own() {
    clean(Apt::Own);
}

/// As `clean_and_autoclean_own`, for apt 3.0.
#[test]
fn clean_and_autoclean_trixie() {
    clean(Apt::Trixie);
}

fn print_uris(apt: Apt) {
    let stage = Stage::new(three(), &with(apt));
    stage.machine.update();
    let arguments = ["install", "-y", "--print-uris", "large"];
    let before = stage.machine.apt_get(&arguments).ok();
    let simulated = stage.machine.apt_get(&["install", "-s", "large"]).ok();
    stage.machine.up();
    let after = stage.machine.apt_get(&arguments).ok();
    assert_eq!(before.out, after.out);
    assert_eq!(after.out.matches("http://").count(), 3, "{after}");
    assert_eq!(simulated.out, stage.machine.apt_get(&["install", "-s", "large"]).ok().out);
    assert_eq!(stage.machine.status().archives().ghosts_opened, 0);
    report(&format!("apt::print_uris {apt:?}"), "3 URIs, the same bytes with and without poolfs, 0 ghosts opened");
}

/// Programs that fetch by themselves what `--print-uris` names would fetch nothing if ghosts counted as downloaded.
#[test]
fn print_uris_is_unchanged_own() {
    print_uris(Apt::Own);
}

/// As `print_uris_is_unchanged_own`, for apt 3.0.
#[test]
fn print_uris_is_unchanged_trixie() {
    print_uris(Apt::Trixie);
}

/// Whoever answers "n" has asked for nothing: not a byte may be fetched.
#[test]
fn an_answer_of_no_fetches_nothing() {
    let stage = Stage::mounted(three(), &Options::default());
    // Without -y, end of input is "no".
    stage.machine.apt_get(&["install", "large"]).failed().says("Abort.");
    assert_eq!(stage.mirror.log().len(), 0, "{:#?}", stage.mirror.log());
    assert_eq!(stage.machine.status().archives().ghosts_opened, 0);
}

/// Two runs that both believe to hold the lock would write the same files; a run that waits must not stop others.
#[test]
fn two_at_once() {
    let stage = Stage::mounted(three(), &Options::default());
    let gate = Gate::new();
    stage.mirror.fault("large_3.0_all.deb", Client::Poolfs, Fault::Stall(gate.clone()));
    let first = Running::start(&mut stage.machine.command("apt-get", &["install", "-y", "-d", "large"]));
    stage.mirror.await_request(Client::Poolfs, "large_3.0_all.deb");
    let second = stage.machine.apt_get(&["install", "-y", "-d", "small"]);
    assert_eq!(second.code(), 100, "{second}");
    let second = second.says("Could not get lock").says(&format!("It is held by process {}", first.id()));
    drop(second);
    // The other directory has a lock of its own.
    stage.machine.update();
    gate.open();
    let first = first.wait().ok();
    stage.assert_no_gets(&first);
    stage.assert_all_here();
    stage.machine.apt_get(&["install", "-y", "-d", "small"]).ok();
    report("apt::two_at_once", "the second install is refused by name of the first, an update meanwhile works, 0 GETs of packages by apt");
}

/// A lock that outlives its apt, or a directory that hangs with it, would need a reboot.
#[test]
fn killed_apt_leaves_nothing_locked() {
    let stage = Stage::mounted(three(), &Options::default());
    let gate = Gate::new();
    stage.mirror.fault("large_3.0_all.deb", Client::Poolfs, Fault::Stall(gate.clone()));
    let first = Running::start(&mut stage.machine.command("apt-get", &["install", "-y", "-d", "large"]));
    stage.mirror.await_request(Client::Poolfs, "large_3.0_all.deb");
    first.signal(rustix::process::Signal::KILL);
    let first = first.wait();
    assert_eq!(crate::harness::process::signal_of(first.status), Some(9));
    assert!(listed(&stage.machine.archives()).contains(&"lock".to_owned()));
    let second = Running::start(&mut stage.machine.command("apt-get", &["install", "-y", "-d", "large"]));
    gate.open();
    let second = second.wait().ok();
    stage.assert_no_gets(&second);
    stage.assert_all_here();
    report("apt::killed_apt", "the next apt has the lock at once, joins what is arriving, 0 GETs of packages by apt");
}

/// The kernel's locks do not cross the mount: without poolfs's own, an apt in an older namespace and one on the mount would
/// both work in the same directory.
#[test]
fn the_lock_of_the_covered_directory_counts() {
    use rustix::fs::{FlockOperation, fcntl_lock};
    let stage = Stage::new(three(), &Options::default());
    stage.machine.update();
    let archives = stage.machine.archives();
    let below = crate::harness::Covered::open(&archives);
    stage.machine.up();
    let lock = fs::File::options().create(true).truncate(false).write(true).open(below.path("lock")).unwrap();
    fcntl_lock(&lock, FlockOperation::NonBlockingLockExclusive).unwrap();
    stage.machine.apt_get(&["install", "-y", "-d", "small"]).failed().says("Could not open lock file");
    drop(lock);
    let finished = stage.machine.apt_get(&["install", "-y", "-d", "small"]).ok();
    stage.assert_no_gets(&finished);
}

/// The machine's own Debian mirror, its real indexes and packages: no repository of a test has their size or their age.
#[test]
fn real_mirror_own() {
    // Small and leaf: one under a piece, one over, one of several pieces.
    const WANTED: &[&str] = &["hello", "sl", "nano", "fonts-lato"];
    let options =
        Options { copy_status_without: Some(WANTED), apt_conf: "APT::Install-Recommends \"false\";\n".into(), ..Options::default() };
    real_mirror(WANTED, &options);
}

/// As `real_mirror_own`, for apt 3.0 in a trixie root; and dpkg installs there.
#[test]
fn real_mirror_trixie() {
    const WANTED: &[&str] = &["hello", "sl", "nano", "fonts-lato"];
    let machine =
        real_mirror(WANTED, &Options { apt: Apt::Trixie, apt_conf: "APT::Install-Recommends \"false\";\n".into(), ..Options::default() });
    run(&mut machine.command("apt", &[&["install", "-y"], WANTED].concat())).ok();
    assert!(machine.root().join("usr/bin/hello").exists());
}

fn real_mirror(wanted: &[&str], options: &Options) -> Machine {
    let machine = Machine::new(&Sources::Debian, options);
    machine.up();
    let update = machine.update();
    let entries = machine.status().catalog_entries;
    assert!(entries > 50_000, "Debian has more packages than {entries}");
    let arguments = [&["install", "-y", "-d"], wanted].concat();
    let uris = machine.apt_get(&[&["install", "-y", "--print-uris"], wanted].concat()).ok();
    let planned = uris.out.lines().filter(|line| line.starts_with('\'')).count();
    assert!(planned >= wanted.len(), "{uris}");
    let finished = machine.apt_get(&arguments).ok();
    assert_eq!(finished.deb_gets(), Vec::<&str>::new(), "apt fetched by itself: {finished}");
    let status = machine.status();
    assert_eq!(status.archives().ghosts_opened, planned as u64, "{status:#?}");
    // apt itself, without the mount, finds them right.
    machine.down();
    let again = machine.apt_get(&arguments).ok();
    assert_eq!(again.gets(), Vec::<&str>::new(), "what is in the plain directory is not what apt wants: {again}");
    for name in listed(&machine.archives()).iter().filter(|name| name.ends_with(".deb")) {
        run(std::process::Command::new("dpkg-deb").arg("--info").arg(machine.archives().join(name))).ok();
    }
    machine.up();
    report(
        &format!("apt::real_mirror {:?}", options.apt),
        &format!(
            "update: {} GETs by apt, {entries} catalog entries; install -d: {planned} packages, 0 GETs of packages by apt, {} ghosts opened, {} bytes from the mirror",
            update.gets().len(),
            status.archives().ghosts_opened,
            status.bytes.mirror
        ),
    );
    machine
}

/// apt's free space check counts offered packages as present: a plan that does not fit must be refused by apt itself,
/// before anything is opened.
#[test]
fn a_plan_that_does_not_fit_is_apts_to_refuse() {
    let home = workspace();
    let mut repo = Repo::new(home.path());
    repo.add(Package::new("huge", "1", 64 << 20));
    let small = repo.add(Package::new("small", "1", 3_000));
    repo.publish();
    let mirror = Mirror::new(repo.root());
    let machine = Machine::new(&Sources::Local(&repo, &mirror), &Options::default());
    // The archives and poolfs's own cache on one small file system; poolfs leaves 16 MiB of it alone.
    let cache = machine.root().join("var/cache");
    rustix::mount::mount("tmpfs", &cache, "tmpfs", rustix::mount::MountFlags::empty(), Some(c"size=40m")).unwrap();
    fs::create_dir_all(machine.archives().join("partial")).unwrap();
    fs::create_dir_all(machine.cache_dir()).unwrap();
    machine.up();
    machine.update();
    assert_eq!(machine.status().objects_short_bytes, 0);
    mirror.forget_log();
    machine.apt_get(&["install", "-y", "-d", "huge"]).failed().says("You don't have enough free space");
    assert_eq!(mirror.debs_asked_by(Client::Poolfs), 0, "{:#?}", mirror.log());
    machine.apt_get(&["install", "-y", "-d", "small"]).ok();
    crate::harness::assert_holds(&machine.archives().join(small.archive_name()), &small.bytes);
    assert_eq!(mirror.debs_asked_by(Client::Apt), 0, "{:#?}", mirror.log());
    // While less than a tenth of the disk is free nothing that apt removes is kept, and the status says so.
    let disk = rustix::fs::statvfs(&cache).unwrap();
    let left = usize::try_from(disk.f_bavail * disk.f_frsize).unwrap() - (2 << 20);
    fs::write(machine.archives().join("ballast"), vec![1; left]).unwrap();
    let status = machine.status();
    assert!(status.objects_short_bytes > 0, "{status:#?}");
    machine.poolfs(&["status"]).ok().says("leave a tenth of the disk free");
    fs::remove_file(machine.archives().join(small.archive_name())).unwrap();
    assert_eq!(machine.status().objects_bytes, 0);
    report("apt::full_disk", "apt refuses the plan itself, 0 bytes fetched; the next plan that fits: 0 GETs of packages by apt");
}
