//! The client against mirrors that lie, break and stall. Each test asserts bytes and outcomes, never a time.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "tests")]

use super::testserver::{Fault, TestServer, closed_port_url};
use super::*;
use rustix::fs::{SealFlags, fcntl_get_seals};
use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;

const PIECE: usize = PIECE_BYTES as usize;

/// Five pieces and a tail, no two pieces alike.
fn file() -> Vec<u8> {
    (0..5 * PIECE + 1000).map(|at| (at / 7 + at / PIECE * 13) as u8).collect()
}

/// Limits that no honest server of these tests reaches.
fn patient() -> MirrorLimits {
    let long = Duration::from_secs(300);
    MirrorLimits { connect: long, first_byte: long, stall: long, rate_window: long, ..MirrorLimits::default() }
}

fn mirror_url(url: &str) -> MirrorUrl {
    MirrorUrl { url: url.to_owned(), proxy: None, immutable: true, private: false }
}

fn wanted(bytes: &[u8], urls: &[String], missing: impl IntoIterator<Item = u32>) -> MirrorFile {
    MirrorFile {
        digest: Digest::of(bytes),
        size: bytes.len() as u64,
        urls: urls.iter().map(|url| mirror_url(url)).collect(),
        missing: missing.into_iter().collect(),
    }
}

/// Runs a fetch and collects its pieces, each checked for its seals; a piece that comes twice is an error.
async fn collect(mirror: &Mirror, wanted: &MirrorFile) -> (BTreeMap<u32, Vec<u8>>, Result<(), MirrorError>) {
    let (out, mut pieces) = mpsc::channel::<MirrorPiece>(1);
    let taker = async {
        let mut got = BTreeMap::new();
        while let Some(piece) = pieces.recv().await {
            let sealed = SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL;
            assert_eq!(fcntl_get_seals(&piece.bytes).unwrap(), sealed);
            let memory = File::from(piece.bytes);
            let mut bytes = vec![0; usize::try_from(memory.metadata().unwrap().len()).unwrap()];
            memory.read_exact_at(&mut bytes, 0).unwrap();
            assert!(got.insert(piece.index, bytes).is_none(), "piece {} twice", piece.index);
        }
        got
    };
    let fetch = async {
        let result = mirror.fetch(wanted, &out, |piece| piece).await;
        drop(out);
        result
    };
    let (result, got) = tokio::join!(fetch, taker);
    (got, result)
}

fn pieces_of(file: &[u8], indexes: impl IntoIterator<Item = u32>) -> BTreeMap<u32, Vec<u8>> {
    indexes.into_iter().map(|index| (index, file.chunks(PIECE).nth(index as usize).unwrap().to_vec())).collect()
}

/// A whole missing file costs one GET without Range, and every length is cut at the right borders.
#[tokio::test]
async fn a_whole_file_is_one_plain_get() {
    for len in [1, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE, 3 * PIECE + 77] {
        let file = file()[..len].to_vec();
        let server = TestServer::start(Fault::None, &file).await;
        let all = 0..u32::try_from(len.div_ceil(PIECE)).unwrap();
        let (got, result) = collect(&Mirror::new(patient()), &wanted(&file, &[server.url()], all.clone())).await;
        assert_eq!(result, Ok(()), "{len}");
        assert_eq!(got, pieces_of(&file, all), "{len}");
        let seen = server.seen();
        assert_eq!(seen.len(), 1, "{len}");
        assert_eq!(seen[0].range, None, "{len}");
        assert_eq!(seen[0].header("accept-encoding"), Some("identity"));
        assert_eq!(seen[0].header("user-agent"), Some(concat!("poolfs/", env!("CARGO_PKG_VERSION"))));
    }
}

/// Only missing bytes are asked for, one request per run of them.
#[tokio::test]
async fn missing_runs_are_ranges() {
    let file = file();
    let server = TestServer::start(Fault::None, &file).await;
    let (got, result) = collect(&Mirror::new(patient()), &wanted(&file, &[server.url()], [0, 2, 3, 5])).await;
    assert_eq!(result, Ok(()));
    assert_eq!(got, pieces_of(&file, [0, 2, 3, 5]));
    let ranges: Vec<_> = server.seen().into_iter().map(|seen| seen.range.unwrap()).collect();
    assert_eq!(ranges, [0..PIECE, 2 * PIECE..4 * PIECE, 5 * PIECE..file.len()]);
    assert_eq!(server.body_bytes(), 3 * PIECE + 1000);
}

/// Nothing missing, or pieces that the file does not have, cost no request.
#[tokio::test]
async fn nothing_wanted_is_nothing_asked() {
    let server = TestServer::start(Fault::None, b"x").await;
    let mirror = Mirror::new(patient());
    for (bytes, missing) in [(&b"x"[..], vec![]), (b"", vec![0]), (b"x", vec![1, u32::MAX])] {
        assert_eq!(collect(&mirror, &wanted(bytes, &[server.url()], missing)).await, (BTreeMap::new(), Ok(())));
    }
    assert_eq!(server.seen().len(), 0);
}

/// What each faulty mirror leads to when it is the only one: whether asking later may help, and a text that names it.
#[tokio::test]
async fn a_faulty_mirror_alone() {
    let file = file();
    let all = || 0..6;
    let check = async |fault: Fault, missing: Vec<u32>, want: &str| {
        let server = TestServer::start(fault.clone(), &file).await;
        let (got, result) = collect(&Mirror::new(patient()), &wanted(&file, &[server.url()], missing)).await;
        assert_eq!(result.unwrap_err().to_string(), want, "{fault:?}");
        assert_eq!(got, BTreeMap::new(), "{fault:?} gave nothing usable");
    };
    check(Fault::Status(404), all().collect(), "no mirror has it: 127.0.0.1: answered 404").await;
    check(Fault::Status(403), all().collect(), "no mirror has it: 127.0.0.1: answered 403").await;
    check(Fault::Status(416), vec![5], "no mirror has it: 127.0.0.1: answered 416").await;
    check(Fault::Status(500), all().collect(), "no mirror delivers it now: 127.0.0.1: answered 500").await;
    check(Fault::Html, all().collect(), "no mirror has it: 127.0.0.1: has 26 bytes where the index says 1311720").await;
    check(Fault::Short(1), all().collect(), "no mirror has it: 127.0.0.1: has 1311719 bytes where the index says 1311720").await;
    check(Fault::Long(1), all().collect(), "no mirror has it: 127.0.0.1: has 1311721 bytes where the index says 1311720").await;
    check(Fault::RedirectLoop, all().collect(), "no mirror has it: 127.0.0.1: more than 5 redirects").await;
    check(Fault::RedirectNowhere, all().collect(), "no mirror has it: 127.0.0.1: answered 302 without a usable Location").await;
    check(Fault::RedirectTo("file:///etc/passwd".into()), all().collect(), "no mirror has it: 127.0.0.1: cannot fetch file: URLs").await;
    check(
        Fault::WrongContentRange,
        vec![1],
        "no mirror has it: 127.0.0.1: sent bytes 262145 to 524289 of 1311720, asked were 262144 to 524288 of 1311720",
    )
    .await;
    check(
        Fault::WrongTotal,
        vec![1],
        "no mirror has it: 127.0.0.1: sent bytes 262144 to 524288 of 1311721, asked were 262144 to 524288 of 1311720",
    )
    .await;
    check(Fault::Encoded, all().collect(), "no mirror has it: 127.0.0.1: sent the file encoded, which was not asked for").await;
}

/// A mirror that cannot be talked to at all is tried again some other time.
#[tokio::test]
async fn an_unreachable_mirror() {
    let file = file();
    let garbage = TestServer::start(Fault::Garbage, &file).await;
    for url in [closed_port_url().await, garbage.url()] {
        let (got, result) = collect(&Mirror::new(patient()), &wanted(&file, std::slice::from_ref(&url), 0..6)).await;
        assert!(matches!(result, Err(MirrorError::NotNow { .. })), "{url}: {result:?}");
        assert!(got.is_empty());
    }
    let (_, result) = collect(&Mirror::new(patient()), &wanted(&file, &[], 0..6)).await;
    assert_eq!(result, Err(MirrorError::Nowhere { why: "no URL is known".into() }));
    let (_, result) = collect(&Mirror::new(patient()), &wanted(&file, &["not a URL".into()], 0..6)).await;
    assert_eq!(result, Err(MirrorError::Nowhere { why: "bad URL: bad URL: relative URL without a base".into() }));
}

/// A captive portal's page of exactly the file's size cannot be told by a mirror client: it is handed over, and the digest tells.
#[tokio::test]
async fn a_page_of_the_right_size_is_the_digests_matter() {
    let file = file();
    let server = TestServer::start(Fault::HtmlOfTheSize, &file).await;
    let (got, result) = collect(&Mirror::new(patient()), &wanted(&file, &[server.url()], 0..6)).await;
    assert_eq!(result, Ok(()));
    assert_eq!(got.len(), 6);
    assert_ne!(got, pieces_of(&file, 0..6));
}

/// Bytes past the index's size are never taken, even if the mirror hides its length.
#[tokio::test]
async fn bytes_past_the_size_are_not_taken() {
    let file = file();
    let server = TestServer::start(Fault::ChunkedLong, &file).await;
    let (got, result) = collect(&Mirror::new(patient()), &wanted(&file, &[server.url()], 0..6)).await;
    assert_eq!(result, Ok(()));
    assert_eq!(got, pieces_of(&file, 0..6));
}

/// Whatever is wrong with the first URL, the second delivers, and only what is still missing.
#[tokio::test]
async fn the_next_url_delivers_the_rest() {
    let file = file();
    for fault in [
        Fault::Status(404),
        Fault::Status(500),
        Fault::Html,
        Fault::Short(1),
        Fault::RedirectLoop,
        Fault::Garbage,
        Fault::Reset { after: PIECE + 10, times: 99 },
    ] {
        let bad = TestServer::start(fault.clone(), &file).await;
        let good = TestServer::start(Fault::None, &file).await;
        let (got, result) = collect(&Mirror::new(patient()), &wanted(&file, &[bad.url(), good.url()], 0..6)).await;
        assert_eq!(result, Ok(()), "{fault:?}");
        assert_eq!(got, pieces_of(&file, 0..6), "{fault:?}");
        let expected = if matches!(fault, Fault::Reset { .. }) { Some(2 * PIECE..file.len()) } else { None };
        assert_eq!(good.seen().len(), 1, "{fault:?}");
        assert_eq!(good.seen()[0].range, expected, "{fault:?}");
    }
}

/// A broken connection costs one more request, from the very byte where it broke.
#[tokio::test]
async fn a_broken_connection_goes_on_where_it_was() {
    let file = file();
    let after = 2 * PIECE + 100;
    let server = TestServer::start(Fault::Reset { after, times: 1 }, &file).await;
    let mirror = Mirror::new(patient());
    let (got, result) = collect(&mirror, &wanted(&file, &[server.url()], 0..6)).await;
    assert_eq!(result, Ok(()));
    assert_eq!(got, pieces_of(&file, 0..6));
    let ranges: Vec<_> = server.seen().into_iter().map(|seen| seen.range).collect();
    assert_eq!(ranges, [None, Some(after..file.len())]);
    assert_eq!(server.body_bytes(), file.len(), "no byte twice");
    assert_eq!(mirror.counters().breaks, 1);
}

/// Two breaks in a row are too many from one URL; after enough bytes one more is forgiven.
#[tokio::test]
async fn breaks_are_counted() {
    let file = file();
    let always = Fault::Reset { after: 100, times: 99 };
    let server = TestServer::start(always, &file).await;
    let (got, result) = collect(&Mirror::new(patient()), &wanted(&file, &[server.url()], 0..6)).await;
    assert!(matches!(result, Err(MirrorError::NotNow { .. })), "{result:?}");
    assert!(got.is_empty());
    assert_eq!(server.seen().len(), 2);

    let server = TestServer::start(Fault::Reset { after: PIECE, times: 4 }, &file).await;
    let limits = MirrorLimits { forgive_after_bytes: PIECE as u64, ..patient() };
    let (got, result) = collect(&Mirror::new(limits), &wanted(&file, &[server.url()], 0..6)).await;
    assert_eq!(result, Ok(()));
    assert_eq!(got, pieces_of(&file, 0..6));
    assert_eq!(server.seen().len(), 5);
}

/// Half a piece of a file that may have changed is not joined with what came later.
#[tokio::test]
async fn half_a_piece_is_kept_only_where_the_bytes_cannot_change() {
    let file = file();
    for (etag, immutable, resumed_at) in [(None, false, PIECE), (Some("\"1\""), false, PIECE + 100), (None, true, PIECE + 100)] {
        let mut server = TestServer::start(Fault::Reset { after: PIECE + 100, times: 1 }, &file).await;
        if let Some(etag) = etag {
            server = server.with_etag(etag);
        }
        let mut wanted = wanted(&file, &[server.url()], 0..6);
        wanted.urls[0].immutable = immutable;
        let (got, result) = collect(&Mirror::new(patient()), &wanted).await;
        assert_eq!(result, Ok(()));
        assert_eq!(got, pieces_of(&file, 0..6));
        let again = &server.seen()[1];
        assert_eq!(again.range, Some(resumed_at..file.len()), "{etag:?} {immutable}");
        assert_eq!(again.header("if-range"), etag.filter(|_| !immutable));
    }
}

/// The bytes of two versions are never joined, whether or not the mirror honours If-Range.
#[tokio::test]
async fn replaced_between_two_ranges() {
    let file = file();
    for fault in [Fault::ReplacedBetweenRanges, Fault::ReplacedAndCareless] {
        let server = TestServer::start(fault.clone(), &file).await.with_etag("\"first\"");
        let mut wanted = wanted(&file, &[server.url()], [0, 2, 4]);
        wanted.urls[0].immutable = false;
        let (got, result) = collect(&Mirror::new(patient()), &wanted).await;
        assert_eq!(result, Err(MirrorError::Nowhere { why: "127.0.0.1: the file was replaced between two ranges".into() }), "{fault:?}");
        assert_eq!(got, pieces_of(&file, [0]), "{fault:?}");
        assert_eq!(server.seen().len(), 2);
    }
}

/// A mirror without ranges: from the file's start its answer serves, and is read no further than needed; for later
/// pieces another mirror is asked, and where there is none the file is read from its start once.
#[tokio::test]
async fn without_ranges() {
    let file = file();
    let server = TestServer::start(Fault::NoRanges, &file).await;
    let (got, result) = collect(&Mirror::new(patient()), &wanted(&file, &[server.url()], [0])).await;
    assert_eq!((got, result), (pieces_of(&file, [0]), Ok(())));
    assert_eq!(server.seen().len(), 1);

    let good = TestServer::start(Fault::None, &file).await;
    let (got, result) = collect(&Mirror::new(patient()), &wanted(&file, &[server.url(), good.url()], [3, 5])).await;
    assert_eq!((got, result), (pieces_of(&file, [3, 5]), Ok(())));
    assert_eq!(good.seen().len(), 2);

    let before = server.seen().len();
    let (got, result) = collect(&Mirror::new(patient()), &wanted(&file, &[server.url()], [1, 3, 4])).await;
    assert_eq!((got, result), (pieces_of(&file, [1, 3, 4]), Ok(())));
    let ranges: Vec<_> = server.seen()[before..].iter().map(|seen| seen.range.clone()).collect();
    assert_eq!(ranges, [Some(PIECE..2 * PIECE), None]);
}

/// Redirects are followed with the Range, and credentials stay with their origin.
#[tokio::test]
async fn redirects() {
    let file = file();
    let good = TestServer::start(Fault::None, &file).await;
    let there = TestServer::start(Fault::RedirectTo(good.url()), &file).await;
    let mirror = Mirror::new(patient());
    let url = there.url().replace("http://", "http://user:secret@");
    let (got, result) = collect(&mirror, &wanted(&file, &[url], [1])).await;
    assert_eq!((got, result), (pieces_of(&file, [1]), Ok(())));
    assert_eq!(there.seen()[0].header("authorization"), Some("Basic dXNlcjpzZWNyZXQ="));
    assert_eq!(good.seen()[0].header("authorization"), None);
    assert_eq!(good.seen()[0].range, Some(PIECE..2 * PIECE));
    assert_eq!(mirror.counters().redirects, 1);

    let circle = TestServer::start(Fault::RedirectLoop, &file).await;
    let url = circle.url().replace("http://", "http://user:secret@");
    let (_, result) = collect(&mirror, &wanted(&file, &[url], [1])).await;
    assert!(!result.unwrap_err().to_string().contains("secret"));
    assert_eq!(circle.seen().len(), 6);
    assert!(circle.seen().iter().all(|seen| seen.header("authorization").is_some()));
    assert_eq!(mirror.counters().redirects_refused, 1);
}

/// A mirror that was asked with https must not lead to bytes in the clear.
#[test]
fn https_never_becomes_http() {
    let mirror = Mirror::new(patient());
    let redirect = |from: &str, to: &str| {
        let location = HeaderValue::from_str(to).unwrap();
        let result = mirror.redirected(&Url::parse(from).unwrap(), StatusCode::FOUND, Some(&location));
        result.map(|url| url.to_string()).map_err(|failure| format!("{failure:?}"))
    };
    assert_eq!(redirect("http://a/x", "https://b/y"), Ok("https://b/y".into()));
    assert_eq!(redirect("https://a/x", "/y"), Ok("https://a/y".into()));
    assert_eq!(redirect("https://a/x", "http://a/x"), Err(r#"Out("redirects from https to http, which is refused")"#.into()));
    assert_eq!(mirror.counters(), MirrorCounters { redirects: 2, redirects_refused: 1, ..MirrorCounters::default() });
}

/// One byte at a time, nothing at all, or nothing more: the client gives up by itself, and another mirror delivers.
#[tokio::test]
async fn slow_mirrors_are_given_up() {
    let file = file();
    let soon = Duration::from_millis(100);
    for (fault, limits, want) in [
        (Fault::Drip, MirrorLimits { rate_window: soon, rate_bytes_s_min: 1_000_000, ..patient() }, "slower than 1000000 bytes a second"),
        (Fault::Stall(PIECE + 5), MirrorLimits { stall: soon, ..patient() }, "nothing came for 0.1 s"),
        (Fault::Silence, MirrorLimits { connect: soon, first_byte: soon, ..patient() }, "no answer in 0.1 s"),
    ] {
        let slow = TestServer::start(fault.clone(), &file).await;
        let mirror = Mirror::new(limits);
        let (_, result) = collect(&mirror, &wanted(&file, &[slow.url()], 0..6)).await;
        assert_eq!(result, Err(MirrorError::NotNow { why: format!("127.0.0.1: {want}") }), "{fault:?}");
        let good = TestServer::start(Fault::None, &file).await;
        let (got, result) = collect(&mirror, &wanted(&file, &[slow.url(), good.url()], 0..6)).await;
        assert_eq!((got, result), (pieces_of(&file, 0..6), Ok(())), "{fault:?}");
    }
}

/// When nobody takes the pieces any more the mirror is left alone, even one that says nothing.
#[tokio::test]
async fn a_dropped_receiver_ends_the_fetch() {
    let file = file();
    let server = TestServer::start(Fault::Stall(2 * PIECE), &file).await;
    let mirror = Mirror::new(patient());
    let wanted = wanted(&file, &[server.url()], 0..6);
    let (out, mut pieces) = mpsc::channel::<MirrorPiece>(1);
    let taker = async {
        assert_eq!(pieces.recv().await.unwrap().index, 0);
        drop(pieces);
    };
    let (result, ()) = tokio::join!(mirror.fetch(&wanted, &out, |piece| piece), taker);
    assert_eq!(result, Err(MirrorError::Unwanted));
}

/// After wrong bytes the other URL comes first, and the doubted one is asked past caches.
#[tokio::test]
async fn wrong_bytes_change_the_order() {
    let file = file();
    let (liar, honest) = (TestServer::start(Fault::HtmlOfTheSize, &file).await, TestServer::start(Fault::None, &file).await);
    let mirror = Mirror::new(patient());
    let wanted = wanted(&file, &[liar.url(), honest.url()], 0..6);
    collect(&mirror, &wanted).await.1.unwrap();
    mirror.verdict(&wanted.digest, false);
    let (got, result) = collect(&mirror, &wanted).await;
    assert_eq!((got, result), (pieces_of(&file, 0..6), Ok(())));
    assert_eq!((liar.seen().len(), honest.seen().len()), (1, 1));

    let alone = MirrorFile { urls: vec![mirror_url(&liar.url())], ..wanted };
    collect(&mirror, &alone).await.1.unwrap();
    assert_eq!(liar.seen()[0].header("cache-control"), None);
    assert_eq!(liar.seen()[1].header("cache-control"), Some("no-cache"));
}

/// The proxy named with a URL is asked, with that URL, and no other.
#[tokio::test]
async fn goes_through_its_proxy() {
    let file = file();
    let proxy = TestServer::start(Fault::None, &file).await;
    let mut wanted = wanted(&file, &["http://mirror.invalid/pool/x.deb".into()], [1]);
    wanted.urls[0].proxy = Some(format!("http://127.0.0.1:{}", proxy.port()));
    let (got, result) = collect(&Mirror::new(patient()), &wanted).await;
    assert_eq!((got, result), (pieces_of(&file, [1]), Ok(())));
    assert_eq!(proxy.seen()[0].target, "http://mirror.invalid/pool/x.deb");

    for unusable in ["gopher://secret@proxy", "secret", "http://"] {
        wanted.urls[0].proxy = Some(unusable.into());
        let (_, result) = collect(&Mirror::new(patient()), &wanted).await;
        let why = "mirror.invalid: its proxy is no http, https or socks5h URL; check Acquire::http::Proxy".to_owned();
        assert_eq!(result, Err(MirrorError::Nowhere { why }), "{unusable}: never past the proxy");
    }
}
