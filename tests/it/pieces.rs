//! Machines that have a part of a file, found by the keys of pieces.

use crate::harness::crowd::{Crowd, Terms, await_status};
use crate::harness::part_holder::{PartHolder, ToldBy};
use crate::harness::{LIMIT, Package, report, run};
use poolfs_core::Digest;
use poolfs_core::piece::PIECE_BYTES;
use poolfs_net::krpc::Id;
use std::time::Instant;

/// One holder has the first half and tells of the file, the other has the rest and tells of its pieces alone: a real machine that
/// gets the list from the first finds the second by it, and apt has the package from both.
#[test]
fn a_holder_that_has_announced_only_pieces_is_found_and_used() {
    let crowd = Crowd::new(3, vec![Package::new("large", "1.0", 6_000_000)], &Terms::default());
    crowd.machines[0].up();
    crowd.machines[0].update();
    let bytes = crowd.packages[0].bytes.clone();
    let pieces = u32::try_from(bytes.len().div_ceil(PIECE_BYTES as usize)).unwrap();
    // The second cannot know two others before the first is there, and the other way round.
    let (_first, _second) = std::thread::scope(|scope| {
        let first = scope.spawn(|| PartHolder::start(&crowd.hosts[1], &bytes, 0..pieces / 2, ToldBy::File));
        let second = scope.spawn(|| PartHolder::start(&crowd.hosts[2], &bytes, pieces / 2..pieces, ToldBy::Pieces));
        (first.join().unwrap(), second.join().unwrap())
    });
    await_status(&crowd.machines[0], "knows both", |status| {
        status.node.as_ref().and_then(|node| node.v4.as_ref()).is_some_and(|v4| v4.nodes >= 2)
    });
    crowd.mirror.forget_log();
    // Slow enough that peers are worth finding.
    crowd.shape_mirror(4);
    crowd.download(0);
    let given = crowd.given_to(0);
    assert!(given[1] > 0 && given[2] > 0, "{given:?}, {} from the mirror", crowd.mirror_bytes(0));
    assert_eq!(crowd.convicted_by(0), Vec::<usize>::new());
    report("pieces::found", &format!("{given:?} bytes from nobody, who told of the file, who told of its pieces alone; apt exit 0"));
}

/// A machine with `announce = "pieces"` that is downloading tells of the pieces which its list bears out, while it downloads: another
/// one that looks a piece's key up finds it.
#[test]
fn a_downloading_machine_announces_its_pieces() {
    let terms = Terms { poolfs_toml: "announce = \"pieces\"\n".to_owned(), ..Terms::default() };
    let crowd = Crowd::new(3, vec![Package::new("large", "1.0", 6_000_000)], &terms);
    crowd.up(false);
    crowd.download(2);
    await_status(&crowd.machines[2], "announces", |status| status.node.as_ref().is_some_and(|node| node.announced_keys > 0));
    // From now on everything is slow: the download is under way while the others look.
    crowd.shape_mirror(2);
    crowd.hosts[2].shape(4);
    let bytes = &crowd.packages[0].bytes;
    let keys: Vec<Id> = bytes.chunks(PIECE_BYTES as usize).map(|piece| Id(Digest::of(piece).piece_key())).collect();
    let download = crowd.start_download(0);
    await_status(&crowd.machines[0], "announces pieces", |status| status.node.as_ref().is_some_and(|node| node.announced_keys > 1));
    let begun = Instant::now();
    let own = format!("{}:9977", crowd.hosts[0].address);
    let found = |key: &Id| {
        let mut lookup = crowd.machines[1].poolfs_command(&["dht", "lookup", &key.to_string(), "--no-discovery", "--bootstrap"]);
        run(lookup.arg(format!("{}:9977", crowd.hosts[1].address))).out.contains(&own)
    };
    let told = loop {
        if let Some(key) = keys.iter().find(|key| found(key)) {
            break key;
        }
        assert!(begun.elapsed() < LIMIT, "no piece of the arriving file is found: {:?}", crowd.machines[0].status());
    };
    crowd.hosts[2].shape(1000);
    crowd.shape_mirror(1000);
    download.wait().ok();
    crowd.assert_all_here(0);
    // A whole file is told of by its own key: the pieces are taken back.
    let begun = Instant::now();
    while found(told) {
        assert!(begun.elapsed() < LIMIT, "the piece is still told of");
    }
    report("pieces::announced", "a piece of a file that was still arriving was found by its key, and no more when the file was whole");
}
