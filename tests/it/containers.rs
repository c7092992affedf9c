//! The host's mount used from a container, a chroot and mmdebstrap, as the README says.

use crate::harness::{
    Apt, Client, Machine, Mirror, Options, Package, Published, Repo, Sources, assert_holds, listed, report, run, workspace,
};
use std::fs;
use std::path::Path;
use std::process::Command;
use tempfile::TempDir;

struct Scene {
    host: Machine,
    container: Machine,
    mirror: Mirror,
    packages: Vec<Published>,
    repo: Repo,
    _home: TempDir,
}

/// A host with poolfs, and a Debian 13 root with lists of its own; both of the same repository.
fn scene() -> Scene {
    let home = workspace();
    let mut repo = Repo::new(home.path());
    let packages: Vec<_> =
        [Package::new("small", "1.0", 3_000), Package::new("large", "3.0", 900_000).depends("small")].map(|one| repo.add(one)).into();
    repo.publish();
    let mirror = Mirror::new(repo.root());
    // Laid out first: what is mounted later is mounted in a namespace that has its root too.
    let container = Machine::new(&Sources::Local(&repo, &mirror), &Options { apt: Apt::Trixie, ..Options::default() });
    let host = Machine::new(&Sources::Local(&repo, &mirror), &Options::default());
    host.up();
    host.update();
    mirror.forget_log();
    Scene { host, container, mirror, packages, repo, _home: home }
}

/// The lines of the README's block that begins with that comment.
fn of_readme(first: &str) -> String {
    let readme = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md")).unwrap();
    let block = readme.split("```sh\n").skip(1).filter_map(|rest| rest.split("```").next()).find(|block| block.starts_with(first));
    block.unwrap_or_else(|| panic!("the README has no block that begins with {first:?}")).to_owned()
}

/// What the container's apt wants comes through the host's mount, also what neither had; what it cleans is kept by the host.
#[test]
fn a_container_with_the_hosts_archives() {
    let scene = scene();
    let Scene { host, container, mirror, packages, .. } = &scene;
    // Its own lists: it knows what its sources have.
    container.apt_get(&["update"]).ok();
    let archives = host.archives();
    let script = of_readme("# a root of your own")
        .replace("/var/cache/apt/archives $ROOT", &format!("{} {}", archives.display(), container.root().display()))
        .replace("$ROOT", &container.root().display().to_string());
    assert!(script.contains(&*archives.to_string_lossy()), "{script}");
    let (mount, enter) = script.trim_end().rsplit_once('\n').unwrap();
    run(Command::new("sh").args(["-euc", mount])).ok();
    mirror.forget_log();
    let enter = enter.replace("apt-get install hello", "apt-get install -y large");
    let installed = run(Command::new("sh").args(["-euc", &enter]).env("LC_ALL", "C").env("DEBIAN_FRONTEND", "noninteractive")).ok();
    assert_eq!(installed.deb_gets(), Vec::<&str>::new(), "{installed}");
    assert_eq!(mirror.debs_asked_by(Client::Apt), 0, "{:#?}", mirror.log());
    for published in packages {
        assert_holds(&archives.join(published.archive_name()), &published.bytes);
    }
    let versions = run(&mut container.command("dpkg-query", &["-W", "-f", "${Package}=${Version} ", "small", "large"])).ok().out;
    assert_eq!(versions, "large=3.0 small=1.0 ");
    // The host has both now, without a byte from the mirror.
    mirror.forget_log();
    host.apt_get(&["install", "-y", "-d", "large"]).ok();
    assert_eq!(mirror.log().iter().filter(|request| request.path.ends_with(".deb")).count(), 0, "{:#?}", mirror.log());
    // Locks hold across: while the container's apt has its lock, the host's is told so.
    let hold = "import fcntl, sys; f = open('/var/cache/apt/archives/lock', 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print('held', flush=True); sys.stdin.read()";
    let mut holder = container.command("/usr/bin/python3", &["-c", hold]);
    let mut holder = holder.stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::piped()).spawn().unwrap();
    let mut word = [0; 4];
    std::io::Read::read_exact(holder.stdout.as_mut().unwrap(), &mut word).unwrap();
    let told = host.apt_get(&["install", "-y", "-d", "--reinstall", "large"]);
    drop(holder.stdin.take());
    holder.wait().unwrap();
    told.failed().says("Could not get lock");
    container.apt_get(&["clean"]).ok();
    let kept = host.poolfs(&["ls", "*.deb"]).ok();
    assert_eq!(listed(&archives).iter().filter(|name| name.ends_with(".deb")).count(), 0);
    mirror.forget_log();
    host.apt_get(&["install", "-y", "-d", "large"]).ok();
    assert_eq!(
        mirror.log().iter().filter(|request| request.path.ends_with(".deb")).count(),
        0,
        "what was cleaned is kept: {kept}{:#?}",
        mirror.log()
    );
    run(Command::new("umount").arg(container.archives())).ok();
    host.down();
    report(
        "containers::bind_mount",
        "a Debian 13 root installs through the host's mount: 0 GETs of packages by its apt; locks hold across",
    );
}

/// mmdebstrap fills a new root through the host's mount, and leaves the host's packages alone.
#[test]
fn mmdebstrap_with_the_hosts_archives() {
    let scene = scene();
    let Scene { host, mirror, packages, repo, .. } = &scene;
    let archives = host.archives();
    let out = host.scratch().join("root.tar");
    let script =
        of_readme("# a new root by mmdebstrap").replace("/var/cache/apt/archives \"$1\"", &format!("{} \"$1\"", archives.display()));
    assert!(script.contains(&*archives.to_string_lossy()), "{script}");
    // One package of the test's repository instead of a whole Debian.
    let line = format!("deb [signed-by={}] {} {} main", repo.key().display(), mirror.url(), crate::harness::repo::SUITE);
    let target = format!(
        "--quiet --mode=chrootless --variant=custom --include=large --aptopt='Acquire::Languages \"none\"' \
         --aptopt='Acquire::http::Proxy::127.0.0.1 \"DIRECT\"' {} {} '{line}'",
        crate::harness::repo::SUITE,
        out.display()
    );
    let script = script.trim_end().replace("trixie root.tar", &target);
    assert!(script.contains("chrootless"), "{script}");
    run(Command::new("sh").args(["-euc", &script]).env("TMPDIR", host.scratch()).env_remove("APT_CONFIG")).ok();
    assert_eq!(mirror.debs_asked_by(Client::Apt), 0, "{:#?}", mirror.log());
    for published in packages {
        assert_holds(&archives.join(published.archive_name()), &published.bytes);
    }
    let names = run(Command::new("tar").arg("-tf").arg(&out)).ok().out;
    assert!(names.contains("usr/share/large/payload"), "{names}");
    assert!(!names.lines().any(|name| name.ends_with(".deb")), "the host's packages are in the new root: {names}");
    host.down();
    report(
        "containers::mmdebstrap",
        "a root by mmdebstrap through the host's mount: 0 GETs of packages by its apt, the host's packages stay",
    );
}
