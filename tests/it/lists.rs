//! `apt-get update` through the mount: what apt no longer fetches, and lists that are byte for byte those of plain apt.
//!
//! Each machine has a twin without poolfs, which does the same at the same time: its exit code and its lists are what is
//! to be reached.

mod faults;
mod pdiffs;
mod scene;

use crate::harness::{Apt, Client, Package, report, run};
use scene::{Scene, Settings, index_names};
use std::fs;
use std::process::Command;

/// Everything that a suite has, in two components and two languages.
fn updates(apt: Apt, gzip_indexes: bool) {
    let mut scene = Scene::new(&Settings { apt, gzip_indexes, ..Settings::default() });
    scene.publish(1);
    scene.up();
    let first = scene.update_both(&[]);
    scene.assert_only_releases(&first);
    let status = scene.machine.status();
    let update = status.last_update.clone().unwrap();
    assert!(!update.running && update.started > 1_700_000_000 && update.took_ms < 1_000_000, "{update:?}");
    assert_eq!((update.indexes, update.patches), (5, 0), "{update:?}");
    assert!(update.bytes.mirror > 0 && update.apt_bytes > 0, "{update:?}");
    assert_eq!((update.bytes.peer, update.bytes.delta, update.kept_bytes), (0, 0, 0), "{update:?}");
    assert_eq!(status.problems, Vec::<String>::new());
    let asked: Vec<_> = scene.asked(Client::Poolfs);
    assert!(asked.len() == 5 && asked.iter().all(|path| path.contains("/by-hash/SHA256/")), "{asked:?}");

    // Nothing new.
    let same = scene.update_both(&[]);
    scene.assert_only_releases(&same);
    assert_eq!(scene.asked(Client::Poolfs), Vec::<String>::new(), "an update without news fetched something");

    // A changed suite: five indexes of which there is another version, and nothing of it here.
    scene.publish(2);
    let changed = scene.update_both(&[]);
    scene.assert_only_releases(&changed);
    assert_eq!(scene.asked(Client::Poolfs).len(), 5);

    // Back and forth again, with the objects of both here.
    for generation in [1, 2] {
        scene.publish(generation);
        let known = scene.update_both(&[]);
        scene.assert_only_releases(&known);
        assert_eq!(scene.asked(Client::Poolfs), Vec::<String>::new(), "what was kept was fetched again: generation {generation}");
    }
    let update = scene.machine.status().last_update.unwrap();
    assert_eq!((update.indexes, update.bytes.mirror), (5, 0), "{update:?}");
    assert!(update.kept_bytes > 0, "{update:?}");

    // A component and a language more; the Release does not change.
    scene.edit_sources(|text| text.replace("Components: main", "Components: main contrib"));
    let more = scene.update_both(&["-o", "Acquire::Languages::=de", "-o", "Acquire::Languages::=en"]);
    scene.assert_only_releases(&more);
    let added = scene.asked(Client::Poolfs).len();
    assert_eq!(added, 7, "five of contrib and de of both");

    // As a machine that lost its lists: all of it is here.
    scene.forget_lists();
    let again = scene.update_both(&["-o", "Acquire::Languages::=de", "-o", "Acquire::Languages::=en"]);
    scene.assert_only_releases(&again);
    assert_eq!(scene.asked(Client::Poolfs), Vec::<String>::new(), "what was kept was fetched again");
    report(
        &format!("lists::updates {apt:?} gzip_indexes={gzip_indexes}"),
        &format!("7 updates, apt GETs InRelease only, {} files equal to plain apt's", scene.lists().len()),
    );
}

/// Any difference from plain apt's lists is a package that is missing, or resolved differently.
#[test]
fn updates_own() {
    updates(Apt::Own, false);
}

/// As `updates_own`, where apt keeps its lists packed: it packs them again itself, so that what is shared is what the mirror has.
#[test]
fn updates_own_with_compressed_indexes() {
    updates(Apt::Own, true);
}

/// As `updates_own`, for apt 3.0.
#[test]
fn updates_trixie() {
    updates(Apt::Trixie, false);
}

/// As `updates_own_with_compressed_indexes`, for apt 3.0.
#[test]
fn updates_trixie_with_compressed_indexes() {
    updates(Apt::Trixie, true);
}

/// An index that apt deletes and poolfs forgets would be fetched again by every machine; one that apt packed itself is
/// nobody else's.
#[test]
fn what_apt_deletes_is_kept_by_its_digest() {
    let mut scene = Scene::new(&Settings { gzip_indexes: true, ..Settings::default() });
    scene.publish(1);
    scene.up();
    scene.update_both(&[]);
    scene.machine.down();
    let objects = scene.objects();
    let want = scene.suite_digests(".xz", |path| index_names().iter().any(|name| path == format!("main/{name}.xz")));
    assert_eq!(objects.keys().cloned().collect::<Vec<_>>(), want);
    assert!(objects.values().all(|(kind, sharing)| kind == "index" && sharing == "available"), "{objects:?}");
    let packed_here = scene.lists().into_iter().filter(|(name, _)| name.ends_with(".lz4"));
    for (name, bytes) in packed_here {
        assert_eq!(scene.recorded(&name), Some((scene::digest(&bytes), "local-only".to_owned())), "{name}");
    }
}

/// Servers that answer "not modified": apt writes nothing then, and asks for what is new in its sources all the same.
#[test]
fn not_modified() {
    for gzip_indexes in [false, true] {
        let mut scene = Scene::new(&Settings { gzip_indexes, ..Settings::default() });
        scene.mirror.tell_dates();
        scene.publish(1);
        scene.up();
        scene.update_both(&[]);
        scene.mirror.forget_log();
        let same = scene.update_both(&[]);
        assert_eq!(scene.answers(Client::Apt), [304, 304], "the machine and its twin: {same}");
        scene.edit_sources(|text| text.replace("Components: main", "Components: main contrib"));
        scene.mirror.forget_log();
        let more = scene.update_both(&[]);
        scene.assert_only_releases(&more);
        assert_eq!(scene.asked(Client::Poolfs).len(), 5, "what contrib has");
    }
}

/// apt may be told to prefer another form, or none: the ghost is the form that it asks for.
#[test]
fn the_form_that_apt_asks_for_first() {
    for (order, ends_with) in [("gz", Some(".gz")), ("xz", Some(".xz")), ("uncompressed", None)] {
        let apt_conf = format!("Acquire::CompressionTypes::Order {{ \"{order}\"; }};\n");
        let mut scene = Scene::new(&Settings { apt_conf, ..Settings::default() });
        scene.publish(1);
        scene.up();
        let finished = scene.update_both(&[]);
        let update = scene.machine.status().last_update.unwrap();
        match ends_with {
            Some(ends_with) => {
                scene.assert_only_releases(&finished);
                assert_eq!(update.indexes, 5, "{order}");
                scene.machine.down();
                let want = scene.suite_digests(ends_with, |path| path.starts_with("main/") && !path.contains("Translation-de"));
                let kept = scene.objects();
                assert!(!kept.is_empty() && kept.keys().all(|digest| want.contains(digest)), "{order}: {kept:?}");
            }
            None => assert_eq!((update.indexes, finished.gets().len()), (0, 6), "apt asks for plain names itself: {finished}"),
        }
    }
}

/// A package that a new list names is there at once; one of a component that was given up is gone when apt is done.
#[test]
fn packages_follow_the_lists() {
    let mut scene = Scene::new(&Settings { packages: vec![Package::new("one", "1.0", 3_000)], ..Settings::default() });
    scene.publish(1);
    scene.up();
    scene.update_both(&[]);
    let one = scene.machine.archives().join("one_1.0_all.deb");
    assert!(one.exists());
    let two = scene.repo.add(Package::new("two", "1.0", 4_000));
    scene.publish(2);
    // No wait in between: the very next lookup finds it.
    scene.machine.apt_get(&["update"]).ok();
    let path = scene.machine.archives().join("two_1.0_all.deb");
    let copy = scene.machine.scratch().join("two.deb");
    run(Command::new("cp").arg(&path).arg(&copy)).ok();
    assert_eq!(fs::read(&copy).unwrap(), two.bytes);
    scene.edit_sources(|text| text.replace("Components: main", "Components: contrib"));
    scene.machine.apt_get(&["update"]).ok();
    scene.machine.await_catalog();
    assert!(!one.exists(), "a package of a component that is no source any more");
}

/// Somebody who looks around in `partial/` must not start downloads, nor find names listed that are not there.
#[test]
fn looking_around_fetches_nothing() {
    let mut scene = Scene::new(&Settings::default());
    scene.publish(1);
    scene.up();
    scene.update_both(&[]);
    scene.mirror.forget_log();
    let partial = scene.machine.lists().join("partial");
    assert_eq!(crate::harness::listed(&partial), Vec::<String>::new());
    let name = partial.join(scene.list_name("main/binary-amd64/Packages.xz"));
    assert_eq!(fs::metadata(&name).unwrap().len(), scene.suite_file("main/binary-amd64/Packages.xz").len() as u64);
    assert!(!partial.join(scene.list_name("main/binary-amd64/Packages")).exists(), "the plain name is never a ghost");
    assert!(!partial.join(scene.list_name("main/binary-amd64/Packages.gz")).exists(), "apt does not ask for it first");
    assert!(!partial.join(scene.list_name("main/binary-arm64/Packages.xz")).exists());
    assert!(!scene.machine.lists().join(scene.list_name("main/i18n/Translation-de")).exists());
    assert_eq!(scene.mirror.log().len(), 0, "{:#?}", scene.mirror.log());
}

/// The real mirror, with everything that it has for a machine: twice from nothing, the second time from what was kept.
fn real_mirror(apt: Apt, gzip_indexes: bool) {
    let settings = Settings { apt, gzip_indexes, ..Settings::default() };
    let scene = scene::Real::new(&settings);
    let first = scene.update_both();
    let releases = scene.assert_only_releases(&first);
    let update = scene.machine.status().last_update.unwrap();
    assert!(update.indexes >= releases, "{update:?}");
    let same = scene.update_both();
    scene.assert_only_releases(&same);
    scene.forget_lists();
    let again = scene.update_both();
    scene.assert_only_releases(&again);
    let kept = scene.machine.status().last_update.unwrap();
    assert_eq!((kept.indexes, kept.bytes.mirror), (update.indexes, 0), "{kept:?}");
    report(
        &format!("lists::real_mirror {apt:?} gzip_indexes={gzip_indexes}"),
        &format!("{releases} InRelease by apt, {} indexes of {} bytes, then 0 bytes from the mirror", update.indexes, update.bytes.mirror),
    );
}

/// What Debian's own Release files hold and no test repository thinks of.
#[test]
fn real_mirror_own() {
    real_mirror(Apt::Own, false);
}

/// As `real_mirror_own`, packed.
#[test]
fn real_mirror_own_with_compressed_indexes() {
    real_mirror(Apt::Own, true);
}

/// As `real_mirror_own`, for apt 3.0.
#[test]
fn real_mirror_trixie() {
    real_mirror(Apt::Trixie, false);
}

/// As `real_mirror_own_with_compressed_indexes`, for apt 3.0.
#[test]
fn real_mirror_trixie_with_compressed_indexes() {
    real_mirror(Apt::Trixie, true);
}
