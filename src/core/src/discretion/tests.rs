#![allow(clippy::unwrap_used, reason = "tests")]

use super::*;

const DAY: i64 = 86_400;
const NOW: i64 = 1_000 * DAY;
const LARGE: u64 = SMALL_FILE_BYTES_MAX + 1;

fn release(name: &str, valid_until: Option<i64>, looked_at: Option<i64>) -> Arc<Release> {
    Arc::new(Release { name: name.to_owned(), date: NOW - 90 * DAY, valid_until, looked_at, is_security: name.ends_with("security") })
}

/// A file of `s 1.0` in a suite without Valid-Until whose security suite has nothing of `s`; all was just looked up.
fn naming() -> Naming {
    Naming {
        private: false,
        source: "s".to_owned(),
        version: "1.0".to_owned(),
        newest: Some("1.0".to_owned()),
        release: Some(release("x", None, Some(NOW))),
        security: vec![Security { release: release("x-security", Some(NOW + DAY), Some(NOW)), newest: None }],
        advisory: None,
    }
}

fn listed(change: impl FnOnce(&mut Naming)) -> Facts {
    let mut naming = naming();
    change(&mut naming);
    Facts { size: 1, listed: vec![naming], ..Facts::default() }
}

fn fixed(version: &str) -> Vec<Security> {
    vec![Security { release: release("x-security", None, Some(NOW)), newest: Some(version.to_owned()) }]
}

/// The decision table. One wrong line shows strangers what this machine has not patched, or what is private.
#[test]
fn decisions() {
    let check = |facts: &Facts, want: &str| {
        let verdict = judge(facts, NOW);
        assert_eq!(format!("{} by {verdict}", verdict.sharing), want, "{facts:#?}");
    };
    let current = "available by current: x names it as the newest, and its lists are fresh";
    check(&Facts::default(), "local-only by unlisted: no list of apt names it");
    check(&listed(|_| {}), current);
    check(&Facts { size: LARGE, ..listed(|_| {}) }, &current.replace("available", "announced"));
    check(&Facts { size: LARGE - 1, ..listed(|_| {}) }, current);

    let private = "local-only by private: its repository or package is private, or needs credentials";
    check(&listed(|naming| naming.private = true), private);
    let mut two = listed(|_| {});
    two.listed.push(Naming { private: true, ..naming() });
    check(&two, private);
    check(&Facts { remembered: Some(Naming { private: true, ..naming() }), ..Facts::default() }, private);
    check(&Facts { arriving: Some(true), ..Facts::default() }, private);
    check(&Facts { arriving: Some(true), ..listed(|_| {}) }, private);
    check(&Facts { arriving: Some(false), ..Facts::default() }, "available by arriving: apt is fetching it for its lists");
    check(&Facts { arriving: Some(false), ..listed(|_| {}) }, current);

    let below = "withheld by security: s 1.0 is below 1.1 of x-security";
    check(&listed(|naming| naming.security = fixed("1.1")), below);
    check(&listed(|naming| naming.security = fixed("1.0")), current);
    check(&listed(|naming| naming.security = fixed("1.0~rc1")), current);
    check(&listed(|naming| naming.security = fixed("0.9")), current);
    check(&listed(|naming| naming.security = fixed("1:0.1")), "withheld by security: s 1.0 is below 1:0.1 of x-security");
    check(&listed(|naming| naming.security = fixed("no version!")), "withheld by security: s 1.0 is below no version! of x-security");
    let gone = Facts { remembered: Some(Naming { security: fixed("1.1"), ..naming() }), ..Facts::default() };
    check(&gone, below);
    let mut two = listed(|_| {});
    two.listed.push(Naming { security: fixed("1.1"), ..naming() });
    check(&two, below);
    check(&listed(|naming| naming.advisory = Some("CVE-2026-1".to_owned())), "withheld by advisory: CVE-2026-1 names this version");

    check(&listed(|naming| naming.newest = Some("1.1".to_owned())), "withheld by superseded: s 1.0 has been followed by 1.1");
    check(&listed(|naming| naming.newest = Some("1.0-0".to_owned())), current);
    check(&listed(|naming| naming.newest = None), "withheld by superseded: no list of apt names it any more");
    check(
        &listed(|naming| naming.newest = Some("no version!".to_owned())),
        "withheld by superseded: s 1.0 has been followed by no version!",
    );
    let gone =
        |newest: Option<&str>| Facts { remembered: Some(Naming { newest: newest.map(str::to_owned), ..naming() }), ..Facts::default() };
    check(&gone(Some("1.1")), "withheld by superseded: s 1.0 has been followed by 1.1");
    check(&gone(Some("1.0")), "withheld by superseded: no list of apt names it any more");
    check(&gone(None), "withheld by superseded: no list of apt names it any more");
    let mut two = listed(|naming| naming.newest = Some("1.1".to_owned()));
    two.listed.push(naming());
    check(&two, current);

    let of = |valid_until, looked_at| listed(|naming| naming.release = Some(release("x", valid_until, looked_at)));
    check(&of(Some(NOW), Some(NOW)), "withheld by expired: x is 0 h past its Valid-Until; run `apt-get update`");
    check(&of(Some(NOW - 2 * DAY), Some(NOW)), "withheld by expired: x is 2 d past its Valid-Until; run `apt-get update`");
    check(&of(Some(NOW + 1), None), current);
    check(&of(None, None), "withheld by old-list: x was looked up 90 d ago; run `apt-get update`");
    check(&of(None, Some(NOW - LIST_AGE_MAX_S)), current);
    check(&of(None, Some(NOW - LIST_AGE_MAX_S - 1)), "withheld by old-list: x was looked up 7 d ago; run `apt-get update`");
    check(&of(None, Some(NOW + CLOCK_SLACK_S)), current);
    check(&of(None, Some(NOW + CLOCK_SLACK_S + 1)), "withheld by old-list: x was looked up 90 d ago; run `apt-get update`");
    let new = Release { date: NOW - LIST_AGE_MAX_S, ..(*release("x", None, None)).clone() };
    check(&listed(|naming| naming.release = Some(Arc::new(new))), current);
    let undated = Release { date: 0, ..(*release("x", None, None)).clone() };
    let unseen = "withheld by old-list: nobody saw x being looked up; run `apt-get update`";
    check(&listed(|naming| naming.release = Some(Arc::new(undated))), unseen);
    let none = "withheld by old-list: its repository has no Release file, so that nobody knows how old its list is";
    check(&listed(|naming| naming.release = None), none);

    let security = |valid_until, looked_at| listed(|naming| naming.security[0].release = release("x-security", valid_until, looked_at));
    let old = "withheld by old-security: x-security was looked up 3 d ago; run `apt-get update`";
    check(&security(Some(NOW + DAY), Some(NOW - SECURITY_AGE_MAX_S)), current);
    check(&security(Some(NOW + DAY), Some(NOW - SECURITY_AGE_MAX_S - 1)), old);
    check(&security(None, Some(NOW - SECURITY_AGE_MAX_S - 1)), old);
    check(&security(None, None), "withheld by old-security: x-security was looked up 90 d ago; run `apt-get update`");
    check(&security(Some(NOW), Some(NOW)), "withheld by expired: x-security is 0 h past its Valid-Until; run `apt-get update`");
    let own = |looked_at| {
        listed(|naming| {
            naming.release = Some(release("x-security", Some(NOW + DAY), Some(looked_at)));
            naming.security.clear();
        })
    };
    check(&own(NOW), &current.replace("x names", "x-security names"));
    check(&own(NOW - SECURITY_AGE_MAX_S - 1), old);
    check(&listed(|naming| naming.security.clear()), current);
    let mut two = of(None, None);
    two.listed.push(naming());
    check(&two, current);
}

/// Every rule can be met, by its own word: a rule that none of the words names would be counted nowhere.
#[test]
fn words_are_those_of_the_table() {
    let words: Vec<&str> = Rule::ALL.iter().map(|rule| rule.as_str()).collect();
    let table = include_str!("../discretion.rs");
    for word in words {
        assert!(table.contains(&format!("//! | `{word}` |")), "{word}");
    }
}
