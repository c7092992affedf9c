//! Every recipe there and back, the bytes of the form, and what a liar may try.

#![allow(clippy::unwrap_used, reason = "tests")]

use super::recipe::put_number;
use super::*;
use liblzma::stream::{Check, MtStreamBuilder, Stream};
use proptest::prelude::*;
use std::io::{Seek as _, Write as _};

/// Bytes that pack to about half, the same on each run.
fn text(bytes: usize, mut seed: u32) -> Vec<u8> {
    let mut out = Vec::with_capacity(bytes);
    while out.len() < bytes {
        seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        out.extend_from_slice(format!("{:x} the package's text {}\n", seed >> 8, seed >> 27).as_bytes());
    }
    out.truncate(bytes);
    out
}

fn file(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file.rewind().unwrap();
    file
}

/// A package with members of these names, as dpkg-deb lays them out.
fn deb(members: &[(&str, Vec<u8>)]) -> Vec<u8> {
    let mut out = b"!<arch>\n".to_vec();
    for (name, bytes) in [("debian-binary", b"2.0\n".to_vec())].iter().chain(members) {
        out.extend_from_slice(format!("{name:<16}{:<12}0     0     100644  {:<10}`\n", 1_700_000_000, bytes.len()).as_bytes());
        out.extend_from_slice(bytes);
        if out.len() % 2 == 1 {
            out.push(b'\n');
        }
    }
    out
}

fn xz(bytes: &[u8], preset: u32, block_bytes: u64) -> Vec<u8> {
    let stream = match block_bytes {
        0 => Stream::new_easy_encoder(preset, Check::Crc64).unwrap(),
        _ => MtStreamBuilder::new().preset(preset).check(Check::Crc64).block_size(block_bytes).threads(2).encoder().unwrap(),
    };
    let mut encoder = liblzma::write::XzEncoder::new_stream(Vec::new(), stream);
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn gzip(bytes: &[u8], level: u32) -> Vec<u8> {
    let mut encoder = flate2::GzBuilder::new().filename("data.tar").mtime(7).write(Vec::new(), flate2::Compression::new(level));
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn between(old: &[u8], new: &[u8]) -> Between {
    Between { old: Digest::of(old), new: Digest::of(new), new_bytes: new.len() as u64 }
}

fn made(old: &[u8], new: &[u8], search: Search) -> Result<Made, DeltaError> {
    make(&file(old), &file(new), &between(old, new), &[], search, DELTA_BYTES_MAX)
}

fn applied(old: &[u8], delta: &[u8], between: &Between) -> Result<Vec<u8>, DeltaError> {
    let mut out = Vec::new();
    apply(&file(old), delta, between, &mut out).map(|()| out)
}

/// A package whose members are packed by `pack`, in an old and a new version.
fn versions(pack: impl Fn(&[u8]) -> Vec<u8>, name: &str) -> (Vec<u8>, Vec<u8>) {
    let (control, data) = (text(5_000, 1), text(300_000, 2));
    let old = deb(&[("control.tar.xz", xz(&control, 6, 24 << 20)), (name, pack(&data))]);
    let mut data = data;
    data.splice(1000..1010, text(700, 3));
    data.extend_from_slice(&text(2_000, 4));
    let new = deb(&[("control.tar.xz", xz(&[&control[..], b"more"].concat(), 6, 24 << 20)), (name, pack(&data))]);
    (old, new)
}

/// Each way in which packages are packed: a recipe that is not found again means no delta for that package, ever.
#[test]
fn every_way_of_packing_comes_back() {
    let zstd = |level, workers| {
        move |bytes: &[u8]| {
            let mut encoder = zstd::stream::write::Encoder::new(Vec::new(), level).unwrap();
            encoder.include_checksum(true).unwrap();
            encoder.multithread(workers).unwrap();
            encoder.write_all(bytes).unwrap();
            encoder.finish().unwrap()
        }
    };
    type Pack = Box<dyn Fn(&[u8]) -> Vec<u8>>;
    let check = |name: &str, pack: Pack, want: &str| {
        let (old, new) = versions(pack, name);
        let made = made(&old, &new, Search::All).unwrap();
        assert_eq!(made.recipes.iter().rfind(|recipe| **recipe != Recipe::Stored).unwrap().to_string(), want);
        assert_eq!(applied(&old, &made.bytes, &between(&old, &new)).unwrap(), new, "{want}");
        assert_eq!(recipes_of(&made.bytes).unwrap(), made.recipes);
        assert_eq!(read_recipes(&write_recipes(&made.recipes)), made.recipes);
        assert!(made.bytes.len() * 4 < new.len(), "{want}: {} of {}", made.bytes.len(), new.len());
    };
    check("data.tar.xz", Box::new(|b| xz(b, 6, 24 << 20)), "xz -6 in blocks of 24576 KiB");
    check("data.tar.xz", Box::new(|b| xz(b, 6 | PRESET_EXTREME, 24 << 20)), "xz -6e in blocks of 24576 KiB");
    check("data.tar.xz", Box::new(|b| xz(b, 2, 64 << 10)), "xz -2 in blocks of 64 KiB");
    check("data.tar.xz", Box::new(|b| xz(b, 0, 0)), "xz -0");
    check("data.tar.xz", Box::new(|b| xz(b, 5, 0)), "xz -5");
    check("data.tar.gz", Box::new(|b| gzip(b, 9)), "gzip -9");
    check("data.tar.gz", Box::new(|b| gzip(b, 4)), "gzip -4");
    check("data.tar.zst", Box::new(zstd(19, 0)), "zstd -19 of 1.5.7 with workers"); // One job: the same bytes.
    check("data.tar.zst", Box::new(zstd(3, 2)), "zstd -3 of 1.5.7 with workers");
    let at_once = |bytes: &[u8]| zstd::bulk::Compressor::new(3).and_then(|mut one| one.compress(bytes)).unwrap();
    check("data.tar.zst", Box::new(at_once), "zstd -3 of 1.5.7 with workers");
}

use liblzma::stream::PRESET_EXTREME;

/// A member that was packed in a way of its own is told as such; and a guess that was wrong is not taken for the file.
#[test]
fn what_cannot_be_packed_again_is_told() {
    let (old, new) = versions(|bytes| xz(bytes, 2, 64 << 10), "data.tar.xz");
    // Two streams in one member: what `cat` makes.
    let twice = |bytes: &[u8]| [xz(&bytes[..bytes.len() / 2], 6, 24 << 20), xz(&bytes[bytes.len() / 2..], 6, 24 << 20)].concat();
    let (_, odd) = versions(twice, "data.tar.xz");
    assert!(matches!(made(&old, &odd, Search::All), Err(DeltaError::NotReproduced { part: 3 })));
    let guess = made(&old, &odd, Search::Likeliest).unwrap();
    assert!(matches!(applied(&old, &guess.bytes, &between(&old, &odd)), Err(DeltaError::Mismatch)));
    // What fitted the last version is tried first.
    let known = [Recipe::Xz { preset: 4, check: 4, block_bytes: 1 }];
    let (old4, new4) = versions(|bytes| xz(bytes, 4, 12 << 20), "data.tar.xz");
    let guess = make(&file(&old4), &file(&new4), &between(&old4, &new4), &known, Search::Likeliest, DELTA_BYTES_MAX).unwrap();
    assert!(guess.recipes.contains(&Recipe::Xz { preset: 4, check: 4, block_bytes: 12 << 20 }), "{:?}", guess.recipes);
    let few = make(&file(&old), &file(&new), &between(&old, &new), &[], Search::All, 200);
    assert!(matches!(few, Err(DeltaError::NotWorthIt { max: 200 })), "{few:?}");
}

/// The bytes on the wire: two machines that make others could not serve one another, and a change of an encoder would turn
/// honest makers into liars. If this fails after an update of a library, the form needs another version.
#[test]
fn golden() {
    let (old, new) = (text(3000, 1), [&text(3000, 1)[..], b"and one more line\n"].concat());
    let delta = made(&old, &new, Search::All).unwrap().bytes;
    let mut want = b"PFd2".to_vec();
    want.extend_from_slice(&Digest::of(&old).0[..8]);
    want.extend_from_slice(&Digest::of(&new).0);
    put_number(new.len() as u64, &mut want);
    want.extend_from_slice(&[1, 0]);
    put_number(new.len() as u64, &mut want);
    assert_eq!(delta[..want.len()], want);
    let patch: String = delta[want.len()..].iter().map(|byte| format!("{byte:02x}")).collect();
    let (old, new) = versions(|bytes| xz(bytes, 6, 24 << 20), "data.tar.xz");
    let delta = made(&old, &new, Search::All).unwrap().bytes;
    let digests = [&new, &delta, &gzip(&text(100_000, 5), 9)].map(|bytes| Digest::of(bytes).to_string());
    let got: Vec<String> = [patch].into_iter().chain(digests).collect();
    assert_eq!(got, GOLDEN, "patch, what xz's encoder made, delta, what zlib made");
}

const GOLDEN: [&str; 4] = [
    "28b52ffd64ce0af50000b800616e64206f6e65206d6f7265206c696e650ab81712000100b4f3811042bc4d8e",
    "0cad88effca9bd0f32f542e18e0703cca4241fc30249c67bd59f7432d578b424",
    "3ca34cb7fd9ad5a23453c9c7ccb9a7f9cc636ca6dfc7c7f8cd9db572666c3781",
    "bc0d3312e2499cbb4ab1a252fb019f280e415b7ce3b70e2bda8669d0fca0fa1d",
];

/// Two makers with other buffers and at other times must make the same bytes, or nobody finds the second's.
#[test]
fn the_same_delta_every_time() {
    let (old, new) = versions(|bytes| xz(bytes, 6, 24 << 20), "data.tar.xz");
    let first = made(&old, &new, Search::All).unwrap();
    let _elsewhere = vec![0_u8; 12_345_678];
    let second = std::thread::spawn(move || made(&old, &new, Search::Likeliest).unwrap()).join().unwrap();
    assert_eq!(first, second);
}

/// A zstd frame of so many zeros, with a head that says what it likes: a bomb of a few kilobytes.
fn bomb(content: Option<u64>, window_byte: u8, zeros: u64) -> Vec<u8> {
    let mut frame = vec![0x28, 0xb5, 0x2f, 0xfd];
    frame.push(if content.is_some() { 0xc0 } else { 0 });
    frame.push(window_byte);
    if let Some(content) = content {
        frame.extend_from_slice(&content.to_le_bytes());
    }
    // Blocks of 128 KiB of one repeated byte, four bytes each.
    let blocks = zeros.div_ceil(128 << 10).max(1);
    for block in 0..blocks {
        let head = (128_u32 << 10) << 3 | 1 << 1 | u32::from(block + 1 == blocks);
        frame.extend_from_slice(&head.to_le_bytes()[..3]);
        frame.push(0);
    }
    frame
}

fn delta(between: &Between, recipe: &[u8], flat_bytes: u64, patch: &[u8]) -> Vec<u8> {
    let mut out = MAGIC.to_vec();
    out.extend_from_slice(&between.old.0[..8]);
    out.extend_from_slice(&between.new.0);
    put_number(between.new_bytes, &mut out);
    out.push(1);
    out.extend_from_slice(recipe);
    put_number(flat_bytes, &mut out);
    out.extend_from_slice(patch);
    out
}

/// Each lie costs a look at its head, or what the signed index bounds; and each is proof against who vouched for it.
#[test]
fn hostile_deltas() {
    let (old, new) = versions(|bytes| xz(bytes, 6, 24 << 20), "data.tar.xz");
    let true_one = made(&old, &new, Search::All).unwrap().bytes;
    let between = between(&old, &new);
    let check = |delta: &[u8], want: &str| {
        let mut out = Vec::new();
        let err = apply(&file(&old), delta, &between, &mut out).unwrap_err();
        assert_eq!(err.to_string(), want);
        assert!(err.is_proof(), "{want}");
        assert!(out.len() as u64 <= between.new_bytes);
    };
    const TEN_GIB: u64 = 10 << 30;
    let stored = [0];
    // Window 2^20 (0x50) and 2^31 (0xa8).
    check(&delta(&between, &stored, TEN_GIB, &bomb(Some(TEN_GIB), 0x50, TEN_GIB)), "the unpacked package is too large");
    check(&delta(&between, &stored, 1 << 20, &bomb(Some(TEN_GIB), 0x50, TEN_GIB)), "the output of the patch is too large");
    check(&delta(&between, &stored, 1 << 20, &bomb(Some(1 << 20), 0x50, TEN_GIB)), "the patch does not fit the old file");
    check(&delta(&between, &stored, 1 << 20, &bomb(None, 0x50, TEN_GIB)), "the patch does not fit the old file");
    check(&delta(&between, &stored, 1 << 20, &bomb(Some(1 << 20), 0xa8, 1 << 20)), "the window of the patch is too large");
    let two = [bomb(Some(1 << 20), 0x50, 1 << 20), bomb(Some(1 << 20), 0x50, 1 << 20)].concat();
    check(&delta(&between, &stored, 1 << 20, &two), "the patch does not fit the old file");
    // Within 64 times the package, and far over its size when it is stored.
    check(&delta(&between, &stored, 1 << 20, &bomb(Some(1 << 20), 0x50, 1 << 20)), "the delta does not make the new file");
    // What is more than the file is commands: zeros do nothing, and too many of them are not looked at.
    check(&delta(&between, &stored, 1 << 10, &bomb(Some(1 << 20), 0x50, 1 << 20)), "the delta does not make the new file");
    check(&delta(&between, &stored, 1 << 10, &bomb(Some(5 << 20), 0x50, 5 << 20)), "the output of the patch is too large");
    check(&delta(&between, &stored, 1 << 21, &bomb(Some(1 << 20), 0x50, 1 << 20)), "the patch does not fit the old file");
    // Packs to a few hundred bytes: less than the package.
    check(&delta(&between, &[1, 6, 4, 0], 1 << 20, &bomb(Some(1 << 20), 0x50, 1 << 20)), "the delta does not make the new file");
    for recipe in [&[4][..], &[9, 1, 1], &[1, 10, 4, 0], &[1, 0x26, 4, 0], &[1, 6, 3, 0], &[2, 0, 10], &[3, 23, 1, 1], &[3, 1, 8, 1]] {
        let recipe = [recipe, &[0; 12]].concat();
        check(&delta(&between, &recipe, 1 << 10, &[]), "the delta packs a member in a way that this poolfs does not know");
    }
    for cut in [0, 3, 4, 11, 43, 44, 47, 49] {
        check(&true_one[..cut], "not a delta of a form that this poolfs knows, or cut off");
    }
    for cut in [90, true_one.len() / 2, true_one.len() - 1] {
        check(&true_one[..cut], "the patch does not fit the old file");
    }
    check(&[&true_one[..], b"x"].concat(), "the patch does not fit the old file");
    check(b"PFd9 of another version", "not a delta of a form that this poolfs knows, or cut off");
    check(&vec![0; usize::try_from(DELTA_BYTES_MAX).unwrap() + 1], "the delta is too large");
    // For another old file: by its name, and where the name lies.
    let other = Between { old: Digest::of(b"other"), ..between };
    assert!(matches!(applied(b"other", &true_one, &other), Err(DeltaError::WrongBase)));
    let mut renamed = true_one.clone();
    renamed[4..12].copy_from_slice(&other.old.0[..8]);
    assert!(matches!(applied(b"other", &renamed, &other), Err(DeltaError::Patch)));
    let err = applied(
        &old,
        &delta(&between, &[3, 3, 3, 0x8f, 0x4e], 10, &patch::make(&[], &mut b"0123456789".to_vec(), 99).unwrap().unwrap()),
        &between,
    );
    assert!(matches!(err, Err(DeltaError::Missing { .. })), "{err:?}");
    assert!(!err.unwrap_err().is_proof(), "another machine may have that library");
}

/// Code that was compiled again: each call's address a little further, and a function more in between. What stays is found past
/// the addresses.
#[test]
fn what_is_nearly_alike_is_found() {
    let code = |further: u32| {
        let mut code = Vec::new();
        for at in 0..20_000_u32 {
            code.extend_from_slice(&at.wrapping_mul(0x9e37_79b9).to_le_bytes()[..2]);
            code.push(0xe8);
            code.extend_from_slice(&(at.wrapping_mul(2_654_435_761) % 1_000_000 + further).to_le_bytes());
            if at % 500 == 0 {
                code.extend_from_slice(&text(80, at));
            }
        }
        code
    };
    let old = code(0);
    let mut new = code(0x40);
    new.splice(70_000..70_000, text(900, 1));
    let as_it_was = new.clone();
    let commands = similar::subtract(&old, &mut new);
    let zeros = new.iter().filter(|byte| **byte == 0).count();
    assert!(zeros * 10 > new.len() * 7, "{zeros} of {} bytes are as they were", new.len());
    assert!(commands.len() < 100, "{} bytes of commands", commands.len());
    similar::add(&old, &mut new, &commands).unwrap();
    assert!(new == as_it_was);
    let patch = patch::make(&old, &mut new, 1 << 20).unwrap().unwrap();
    assert!(new == as_it_was, "it is packed afterwards");
    assert!(patch.len() * 10 < zstd::bulk::compress(&new, 19).unwrap().len(), "{}", patch.len());
    assert!(patch::apply(&old, &patch, new.len() as u64, 1 << 20).unwrap() == as_it_was);
}

/// Shuffled so that the commands would have more bytes than they may: what they do not reach stays as it is, and comes back too.
#[test]
fn too_many_commands() {
    const BLOCK: usize = 64;
    const BLOCKS: usize = 800_000;
    let mut seed = 7_u64;
    let mut noise = move || {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        seed >> 16
    };
    let old: Vec<u8> = (0..BLOCKS * BLOCK / 4).flat_map(|_| noise().to_le_bytes().into_iter().take(4)).collect();
    // Prime to the number of blocks: each once, no two neighbours together.
    let mut new: Vec<u8> = (0..BLOCKS).flat_map(|nth| &old[nth * 314_159 % BLOCKS * BLOCK..][..BLOCK]).copied().collect();
    let as_it_was = new.clone();
    let commands = similar::subtract(&old, &mut new);
    assert!((similar::COMMANDS_BYTES_MAX - 30..=similar::COMMANDS_BYTES_MAX).contains(&commands.len()), "{}", commands.len());
    assert!(new[new.len() - BLOCK..] == as_it_was[new.len() - BLOCK..], "the commands reached the end");
    similar::add(&old, &mut new, &commands).unwrap();
    assert!(new == as_it_was);
}

/// Commands that lead out of either file, or that end in the middle.
#[test]
fn hostile_commands() {
    let (old, body) = ([7; 100], [1; 50]);
    let commands = |numbers: &[u64]| {
        let mut bytes = Vec::new();
        numbers.iter().for_each(|number| put_number(*number, &mut bytes));
        bytes
    };
    let added = |numbers: &[u64]| {
        let mut body = body;
        similar::add(&old, &mut body, &commands(numbers)).map(|()| body)
    };
    assert_eq!(added(&[]), Some(body));
    assert_eq!(added(&[50, 0, 2 * 50]), Some([8; 50]));
    // The second from the bytes before where the first one ended.
    assert_eq!(added(&[25, 0, 2 * 75, 25, 0, 2 * 100 - 1]), Some([8; 50]));
    assert_eq!(added(&[0, 50, 2 * 100]), Some(body));
    const MAX: u64 = u64::MAX >> 1;
    for bad in [
        &[51, 0, 0][..],
        &[50, 1, 0],
        &[50, 0, 2 * 51],
        &[1, 0, 1],
        &[0, MAX, 0],
        &[MAX, 0, 0],
        &[1, 0, MAX],
        &[1, 0, MAX - 1],
        &[0, 0, MAX - 1, 0, 0, MAX - 1, 0, 0, MAX - 1],
        &[25, 0, 0, 26, 0, 0],
        &[25, 0],
    ] {
        assert_eq!(added(bad), None, "{bad:?}");
    }
}

/// An old package that unpacks to more than there is room for costs no more than that room.
#[test]
fn a_bomb_as_the_old_file() {
    let zeros = bomb(None, 0x50, FLAT_BYTES_MAX + 1);
    let old = deb(&[("data.tar.zst", zeros)]);
    assert!(matches!(made(&old, b"new", Search::All), Err(DeltaError::TooLarge { what: "the unpacked package" })));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Any two files have a delta, and it makes the second of the first; any bytes of it changed make an error or that same file.
    #[test]
    fn any_two_files(old in prop::collection::vec(any::<u8>(), 0..3000), new in prop::collection::vec(any::<u8>(), 1..3000), at in any::<prop::sample::Index>(), flip in 1..=255_u8, cut in any::<prop::sample::Index>()) {
        let between = between(&old, &new);
        let delta = made(&old, &new, Search::All).unwrap().bytes;
        prop_assert_eq!(applied(&old, &delta, &between).unwrap(), new.clone());
        let mut bad = delta.clone();
        let at = at.index(bad.len());
        bad[at] ^= flip;
        match applied(&old, &bad, &between) {
            Ok(out) => prop_assert_eq!(out, new),
            Err(err) => prop_assert!(err.is_proof() || matches!(err, DeltaError::Missing { .. }), "{}", err),
        }
        let cut = cut.index(delta.len());
        prop_assert!(applied(&old, &delta[..cut], &between).is_err());
    }

    /// What was copied, moved and changed here and there comes back, whatever the two files are.
    #[test]
    fn differences_come_back(
        old in prop::collection::vec(any::<u8>(), 0..4000),
        copies in prop::collection::vec((any::<prop::sample::Index>(), 0..1500_usize, any::<u8>()), 0..8),
    ) {
        let mut new = Vec::new();
        for (from, length, change) in copies {
            let from = from.index(old.len() + 1);
            let copied = &old[from..(from + length).min(old.len())];
            new.extend(copied.iter().enumerate().map(|(at, byte)| if at % 13 == 5 { byte.wrapping_add(change) } else { *byte }));
            new.push(change);
        }
        let as_it_was = new.clone();
        let commands = similar::subtract(&old, &mut new);
        prop_assert_eq!(similar::add(&old, &mut new, &commands), Some(()));
        prop_assert_eq!(new, as_it_was);
    }

    /// Cutting never panics and leaves nothing out, whatever stands where the archive's headers should be.
    #[test]
    fn parts_cover_the_file(damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..12)) {
        let mut bytes = deb(&[("control.tar.xz", xz(b"c", 0, 0)), ("data.tar.gz", gzip(b"d", 1))]);
        for (at, byte) in damage {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        let parts = parts::split(&file(&bytes)).unwrap();
        prop_assert!(parts.len() <= PARTS_MAX);
        let mut at = 0;
        for part in parts {
            prop_assert_eq!(part.at, at);
            at += part.bytes;
        }
        prop_assert_eq!(at, bytes.len() as u64);
    }
}
