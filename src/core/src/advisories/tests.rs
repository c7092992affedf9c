#![allow(clippy::unwrap_used, reason = "tests")]

use super::*;
use std::io::Write as _;

const DEBSECAN: &str = "VERSION 1\n\
    CVE-2026-0001,,a hole, with commas in its description\n\
    CVE-2026-0002,,another\n\
    TEMP-0000000-ABCDEF,,one without a number\n\
    \n\
    openssl,0,SH F,3.0.13-1,1.1.1w-0+deb11u1 3.0.11-1~deb12u2\n\
    openssl,1,S ? ,,\n\
    libonly,2,BL  ,2.0,\n\
    \n\
    openssl,amd64,libssl3 openssl\n";

const TRACKER: &str = r#"{
    "openssl": {
        "CVE-2026-0001": {
            "description": "a hole", "scope": "remote",
            "releases": {
                "bookworm": {"status": "resolved", "repositories": {"bookworm": "3.0.11-1"}, "fixed_version": "3.0.11-1~deb12u2", "urgency": "high"},
                "sid": {"status": "resolved", "repositories": {"sid": "3.3-1"}, "fixed_version": "3.0.13-1", "urgency": "high"},
                "bullseye": {"status": "resolved", "fixed_version": "0", "urgency": "not yet assigned"}
            }
        },
        "CVE-2026-0002": {"releases": {"bookworm": {"status": "open", "urgency": "medium"}}},
        "CVE-2026-0003": {"releases": {"bookworm": {"status": "resolved", "fixed_version": "9", "urgency": "unimportant"}}},
        "CVE-2026-0004": {"releases": {"bookworm": {"status": "undetermined", "urgency": "low"}}}
    },
    "other": {"CVE-2026-0005": {"debianbug": 1, "releases": {}}}
}"#;

fn names<'a>(all: &'a Advisories, release: &str, source: (&str, &str), binary: (&str, &str), unfixed: bool) -> Option<&'a str> {
    all.names(&Asked { releases: &BTreeSet::from([release.to_owned()]), source, binary, unfixed })
}

/// A vulnerable version taken for a fixed one is given to strangers.
#[test]
fn debsecan_names_versions() {
    let mut packed = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::default());
    packed.write_all(DEBSECAN.as_bytes()).unwrap();
    let all = Advisories::read(packed.finish().unwrap().as_slice()).unwrap();
    assert_eq!(Advisories::read(DEBSECAN.as_bytes()).unwrap(), all, "packed or not");
    assert_eq!(all.len(), 3);
    let check = |version: &str, unfixed: bool, want: Option<&str>| {
        assert_eq!(names(&all, "any", ("openssl", version), ("libssl3", version), unfixed), want, "{version}");
    };
    check("3.0.11-1~deb12u1", false, Some("CVE-2026-0001"));
    check("3.0.11-1~deb12u2", false, None);
    check("1.1.1w-0+deb11u1", false, None);
    check("3.0.12-1", false, Some("CVE-2026-0001"));
    check("3.0.13-1", false, None);
    check("3.0.13-1", true, Some("CVE-2026-0002"));
    check("no version!", false, Some("CVE-2026-0001"));
    assert_eq!(names(&all, "any", ("unknown", "1"), ("unknown", "1"), true), None);
    assert_eq!(names(&all, "any", ("src", "1.0"), ("libonly", "1.9"), false), Some("TEMP-0000000-ABCDEF"));
    assert_eq!(names(&all, "any", ("libonly", "1.0"), ("doc", "2.0"), false), None, "a binary package is not a source package");
}

/// Another release's fix must not count here, nor a hole that is none.
#[test]
fn the_tracker_names_versions_in_a_release() {
    let all = Advisories::read(TRACKER.as_bytes()).unwrap();
    assert_eq!(all.len(), 3);
    let check = |release: &str, version: &str, unfixed: bool, want: Option<&str>| {
        assert_eq!(names(&all, release, ("openssl", version), ("libssl3", version), unfixed), want, "{release} {version}");
    };
    check("bookworm", "3.0.11-1~deb12u1", false, Some("CVE-2026-0001"));
    check("bookworm", "3.0.11-1~deb12u2", false, None);
    check("bookworm", "3.0.11-1~deb12u2", true, Some("CVE-2026-0002"));
    check("sid", "3.0.12-1", false, Some("CVE-2026-0001"));
    check("sid", "3.0.12-1", true, Some("CVE-2026-0001"));
    check("bullseye", "1.0", true, None);
    check("trixie", "1.0", true, None);
}

/// A page of a proxy, or half a file, must not pass for one without advisories.
#[test]
fn what_is_no_advisory_file_is_an_error() {
    let check = |text: &str, want: &str| {
        let error = Advisories::read(text.as_bytes()).unwrap_err().to_string();
        assert!(error.starts_with(want), "{error}");
    };
    check("", "is no JSON of the security tracker: ");
    check("<html>", "is no JSON of the security tracker: ");
    check("[]", "is no JSON of the security tracker: ");
    check(&TRACKER[..TRACKER.len() - 4], "is no JSON of the security tracker: ");
    check(&format!("{TRACKER} x"), "is no JSON of the security tracker: ");
    check("VERSION 2\n", "line 1: the first line is not `VERSION 1`");
    check("VERSION 1", "line 1: it is too long, or the file is cut off");
    check("VERSION 1\nCVE-1,,x\n\np,1,S,1,\n", "line 4: it names an issue that is not in the file");
    check("VERSION 1\nCVE-1,,x\n\np,0,S,1\n", "line 4: it has fewer than five fields");
    check("VERSION 1\nCVE-1,,x\n\np,0,X,1,\n", "line 4: its flags begin neither with B nor with S");
    check("VERSION 1\nCVE-1,,x\n\np,0,S,1,", "line 4: it is too long, or the file is cut off");
    assert!(Advisories::read(&b"x\x9cbroken"[..]).unwrap_err().to_string().starts_with("cannot be read: "));
}
