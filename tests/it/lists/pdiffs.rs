//! Lists that apt patches: the Index and the patches come from poolfs, and the result is that of a full download.

use super::scene::{Scene, Settings, digest, packages};
use crate::harness::repo::SUITE;
use crate::harness::{Apt, Client, Fault, Machine, Options, Sources, listed, report, run, trixie};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::process::Command;
use std::sync::OnceLock;

/// The list of the suite that has patches.
const LIST: &str = "main/binary-amd64/Packages";

const GENERATIONS: u32 = 5;

/// Stanzas of each generation.
const STANZAS_WANTED: usize = 1500;

/// Stanzas of the machine's own lists; too few where it has none.
fn real_stanzas() -> &'static [String] {
    static STANZAS: OnceLock<Vec<String>> = OnceLock::new();
    STANZAS.get_or_init(|| {
        let cat = "set -- /var/lib/apt/lists/*_main_binary-*_Packages*; exec /usr/lib/apt/apt-helper cat-file \"$@\"";
        let out = run(Command::new("sh").args(["-c", cat])).out;
        out.split("\n\n").filter(|stanza| stanza.starts_with("Package: ")).take(STANZAS_WANTED).map(str::to_owned).collect()
    })
}

/// `Packages` of one generation: real stanzas where the machine has lists, of which each generation changes some.
fn generation(number: u32) -> String {
    let stanzas = real_stanzas();
    if stanzas.len() < STANZAS_WANTED {
        return packages("main", number, 1500);
    }
    let mut text = String::new();
    for (index, stanza) in (0_u32..).zip(stanzas) {
        let class = (index / 8) % 8;
        let tag = if index % 8 == 0 && class < number { format!("Tag: changed::{class}\n") } else { String::new() };
        writeln!(text, "{}\n{tag}", stanza.trim_end()).unwrap();
    }
    text
}

/// What `diff --ed` says leads from one text to another.
fn patch(scene: &Scene, old: &str, new: &str) -> Vec<u8> {
    let (a, b) = (scene.scratch().join("old"), scene.scratch().join("new"));
    fs::write(&a, old).unwrap();
    fs::write(&b, new).unwrap();
    let finished = run(Command::new("diff").arg("--ed").arg(&a).arg(&b));
    assert_eq!(finished.code(), 1, "{finished}");
    finished.out.into_bytes()
}

fn gzipped(scene: &Scene, bytes: &[u8]) -> Vec<u8> {
    let path = scene.scratch().join("patch");
    fs::write(&path, bytes).unwrap();
    run(Command::new("gzip").args(["-9nkf"]).arg(&path)).ok();
    fs::read(path.with_extension("gz")).unwrap()
}

/// Publishes the generations up to `last`, with patches that lead there from each of the others. Returns the digests of the
/// packed patches.
fn publish(scene: &mut Scene, last: u32, merged: bool, lie: bool) -> Vec<String> {
    let texts: Vec<String> = (1..=last).map(generation).collect();
    let newest = texts.last().unwrap();
    let (mut history, mut patches, mut downloads) = (String::new(), String::new(), String::new());
    let mut digests = Vec::new();
    for (number, old) in (1..last).zip(&texts) {
        let new = if merged { newest } else { &texts[number as usize] };
        let id = if merged { format!("T-{last}-F-{number}") } else { format!("T-{number}") };
        let plain = patch(scene, old, new);
        let packed = gzipped(scene, &plain);
        let place = scene.repo.root().join("dists").join(SUITE).join(format!("{LIST}.diff"));
        fs::create_dir_all(&place).unwrap();
        fs::write(place.join(format!("{id}.gz")), &packed).unwrap();
        writeln!(history, " {} {} {id}", digest(old.as_bytes()), old.len()).unwrap();
        writeln!(patches, " {} {} {id}", digest(&plain), plain.len()).unwrap();
        let named = if lie { digest(b"something else") } else { digest(&packed) };
        writeln!(downloads, " {named} {} {id}.gz", packed.len()).unwrap();
        digests.push(digest(&packed));
    }
    let mut index = format!(
        "SHA256-Current: {} {}\nSHA256-History:\n{history}SHA256-Patches:\n{patches}SHA256-Download:\n{downloads}",
        digest(newest.as_bytes()),
        newest.len()
    );
    if merged {
        index.push_str("X-Patch-Precedence: merged\n");
    }
    let packed = BTreeMap::from([(LIST.to_owned(), newest.clone().into_bytes())]);
    let plain = BTreeMap::from([(format!("{LIST}.diff/Index"), index.into_bytes())]);
    let plain = if last > 1 { plain } else { BTreeMap::new() };
    scene.repo.publish_files("main", &packed, &plain);
    digests.sort_unstable();
    digests
}

fn scene(apt: Apt, gzip_indexes: bool) -> Scene {
    let scene = Scene::new(&Settings { apt, gzip_indexes, ..Settings::default() });
    scene.edit_sources(|text| text.replace("Types: deb deb-src\n", "Types: deb\n"));
    scene
}

fn patched(apt: Apt, merged: bool, gzip_indexes: bool) {
    let mut scene = scene(apt, gzip_indexes);
    publish(&mut scene, 1, merged, false);
    let first = digest(&scene.suite_file(&format!("{LIST}.xz")));
    scene.up();
    scene.update_both(&[]);
    let patches = publish(&mut scene, GENERATIONS, merged, false);
    let finished = scene.update_both(&[]);
    scene.assert_only_releases(&finished);
    let update = scene.machine.status().last_update.unwrap();
    let taken = if merged { 1 } else { u64::from(GENERATIONS - 1) };
    assert_eq!((update.indexes, update.patches), (1, taken), "{update:?}");
    // The whole list was not even asked for.
    let whole = digest(&scene.suite_file(&format!("{LIST}.xz")));
    let asked = scene.asked(Client::Poolfs);
    assert!(asked.iter().all(|path| path.contains(&format!("{LIST}.diff/"))), "{asked:?}");
    assert_eq!(asked.len() as u64, 1 + taken, "{asked:?}");
    // What a full download gives.
    let name = scene.list_name(LIST);
    let kept = scene.lists().keys().find(|known| known.starts_with(&name) && !known.contains("diff")).unwrap().clone();
    let text = run(Command::new("/usr/lib/apt/apt-helper").arg("cat-file").arg(scene.machine.lists().join(&kept))).ok().out;
    assert!(text == generation(GENERATIONS), "the patched list is not the newest one");
    scene.machine.down();
    let objects = scene.objects();
    assert!(objects.values().all(|(kind, _)| kind == "index"), "{objects:?}");
    // The list of the first generation is named by no Release any more: others would learn how old this machine's was.
    for (digest, (_, sharing)) in &objects {
        let shared = sharing == "available" || sharing == "announced";
        assert_eq!(shared, *digest != first, "{digest}: {objects:?}");
    }
    let digests: Vec<&String> = objects.keys().collect();
    assert!(digests.contains(&&first) && !digests.contains(&&whole), "{objects:?}");
    assert_eq!(digests.iter().filter(|digest| patches.contains(digest)).count() as u64, taken, "{objects:?}");
    let index = digest(&scene.suite_file(&format!("{LIST}.diff/Index")));
    let known = |digest: &&String| **digest == first || **digest == index || patches.contains(digest);
    assert!(digests.iter().all(known), "{objects:?}");
    // apt 2.6 keeps the Index in lists/, apt 3.0 deletes it.
    let kept = objects.get(&index).map(|(_, sharing)| sharing.clone());
    let listed = scene.recorded(&format!("{name}.diff_Index")).filter(|(digest, _)| *digest == index).map(|(_, sharing)| sharing);
    assert_eq!(kept.xor(listed), Some("available".to_owned()), "{objects:?}");
    report(
        &format!("lists::patched {apt:?} merged={merged} gzip_indexes={gzip_indexes}"),
        &format!("{taken} patches and the Index from poolfs, apt GETs InRelease only"),
    );
}

/// Debian's own way is to merge on the server; other archives leave it to apt.
#[test]
fn unmerged_own() {
    patched(Apt::Own, false, false);
}

/// As `unmerged_own`, one patch for each version.
#[test]
fn merged_own() {
    patched(Apt::Own, true, false);
}

/// As `unmerged_own`, with lists that apt keeps packed: it renames the patches after the packed list.
#[test]
fn unmerged_own_with_compressed_indexes() {
    patched(Apt::Own, false, true);
}

/// As `unmerged_own`, for apt 3.0.
#[test]
fn unmerged_trixie() {
    patched(Apt::Trixie, false, false);
}

/// As `merged_own`, for apt 3.0, packed.
#[test]
fn merged_trixie_with_compressed_indexes() {
    patched(Apt::Trixie, true, true);
}

/// A patch that is missing or wrong at the mirror, and an Index that lies about its patches: apt falls back as it does alone.
fn faulty(lie: bool, fault: Option<(Client, Fault)>) {
    let mut scene = scene(Apt::Own, false);
    publish(&mut scene, 1, false, false);
    scene.up();
    scene.update_both(&[]);
    publish(&mut scene, GENERATIONS, false, lie);
    match fault {
        Some((Client::Poolfs, fault)) => scene.mirror.fault("T-3.gz", Client::Poolfs, fault),
        Some((Client::Apt, fault)) => scene.mirror.fault("T-3.gz", None, fault),
        None => {}
    }
    let finished = scene.run_both(&[]).ok();
    let text = fs::read_to_string(scene.machine.lists().join(scene.list_name(LIST))).unwrap();
    assert!(text == generation(GENERATIONS), "{finished}");
    scene.mirror.heal();
    scene.update_both(&[]);
}

/// See [`faulty`].
#[test]
fn a_patch_that_is_missing() {
    faulty(false, Some((Client::Apt, Fault::Status(404))));
}

/// See [`faulty`].
#[test]
fn a_patch_that_poolfs_does_not_get() {
    faulty(false, Some((Client::Poolfs, Fault::Status(404))));
    faulty(false, Some((Client::Poolfs, Fault::Wrong(20))));
}

/// See [`faulty`].
#[test]
fn a_patch_with_wrong_bytes() {
    faulty(false, Some((Client::Apt, Fault::Wrong(20))));
}

/// See [`faulty`].
#[test]
fn an_index_that_lies() {
    faulty(true, None);
}

/// Debian's own Index, merged on the server and with the unmerged patches beside it: each patch that apt may ask for is known
/// as soon as the Index is here, whatever the mirror has of them.
#[test]
fn the_index_of_testing_on_the_real_mirror() {
    let options = Options { apt_conf: "Acquire::Check-Valid-Until \"false\";\n".into(), ..Options::default() };
    let machine = Machine::new(&Sources::Debian, &options);
    let parts = machine.root().join("etc/apt/sources.list.d");
    for name in listed(&parts) {
        fs::remove_file(parts.join(name)).unwrap();
    }
    let uri = trixie::debian_mirror();
    let stanza =
        format!("Types: deb\nURIs: {uri}\nSuites: testing\nComponents: main\nTargets: Packages\nArchitectures: amd64\nTrusted: yes\n");
    fs::write(parts.join("testing.sources"), stanza).unwrap();
    machine.up();
    machine.apt_get(&["update"]).ok();
    let list = listed(&machine.lists()).into_iter().find(|name| name.ends_with("_main_binary-amd64_Packages")).unwrap();
    let partial = machine.lists().join("partial");
    let index = fs::read_to_string(partial.join(format!("{list}.diff_Index"))).unwrap();
    let section = index.split("\nSHA256-Download:\n").nth(1).unwrap();
    let mut patches = 0;
    for line in section.lines().take_while(|line| line.starts_with(' ')) {
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        let metadata = fs::metadata(partial.join(format!("{list}.diff_{}", words[2]))).unwrap();
        assert_eq!(metadata.len().to_string(), words[1], "{line}");
        patches += 1;
        if patches == 1 {
            // The mirror may have it or not: the whole patch, or the early end that makes apt ask for it.
            let bytes = fs::read(partial.join(format!("{list}.diff_{}", words[2]))).unwrap();
            assert!(bytes.is_empty() || digest(&bytes) == words[0], "{line}");
        }
    }
    assert!(patches > 10, "{patches} patches in {index}");
    report("lists::the_index_of_testing", &format!("{patches} patches known from an Index of {} bytes", index.len()));
}
