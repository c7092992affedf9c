//! What the lists say, as far as it decides who may have a file.

use super::*;
use crate::catalog::{Before, Standing};
use crate::discretion::Rule;
use crate::store::{Origin, Sharing};

const DAY: i64 = 86_400;
const SECURITY_SOURCE: &str = "deb http://h/debian s c\ndeb http://h/security s-security c\n";
const SECURITY_INRELEASE: &str = "h_security_dists_s-security_InRelease";
const SECURITY_PACKAGES: &str = "h_security_dists_s-security_c_binary-amd64_Packages";

/// Of day 2 of 1970.
fn in_suite(suite: &str, more: &str) -> String {
    format!("Origin: x\nSuite: {suite}\nCodename: {suite}\nDate: Fri, 02 Jan 1970 00:00:00 UTC\n{more}SHA256:\n")
}

fn of_source(package: &str, version: &str, source: &str, letter: char) -> String {
    stanza(package, version, letter).replace("Architecture", &format!("Source: {source}\nArchitecture"))
}

impl Machine {
    fn judged(&self, letter: char, before: &Before, now: i64) -> String {
        let verdict = self.catalog.judging(now).unwrap().verdict(&digest(letter), 1, before, false).unwrap();
        format!("{} by {verdict}", verdict.sharing)
    }

    fn rule(&self, letter: char, now: i64) -> Rule {
        self.catalog.judging(now).unwrap().verdict(&digest(letter), 1, &Before::default(), false).unwrap().rule
    }
}

/// Binary versions are not what is compared: a rebuilt package, or one of another name than its source, would be judged wrongly.
#[test]
fn the_newest_is_that_of_the_source_package_in_the_release() {
    let machine = Machine::new(ONE_SOURCE);
    machine.write(INRELEASE, in_suite("s", ""));
    let lists = [
        stanza("plain", "1.0", 'a'),
        of_source("rebuilt", "1.0-1+b2", "rebuilt (1.0-1)", 'b'),
        of_source("rebuilt-doc", "1.0-1", "rebuilt", 'c'),
        of_source("image-6.1.0-20", "6.1.85-1", "signed (6.1.85+1)", 'd'),
        of_source("image-6.1.0-21", "6.1.90-1", "signed (6.1.90+1)", 'e'),
        stanza("twice", "1:0.9", '1'),
        stanza("twice", "2.0", '2'),
    ];
    machine.write(PACKAGES, lists.concat());
    machine.refreshed(Vanished::Drop, 1, 0, 0);
    for (letter, want) in [
        ('a', Rule::Current),
        ('b', Rule::Current),
        ('c', Rule::Current),
        ('d', Rule::Superseded),
        ('e', Rule::Current),
        ('1', Rule::Current),
        ('2', Rule::Superseded),
        ('f', Rule::Unlisted),
    ] {
        assert_eq!(machine.rule(letter, 2 * DAY), want, "{letter}");
    }
    machine.write(PACKAGES, stanza("plain", "1.1", 'f'));
    machine.refreshed(Vanished::Drop, 1, 0, 0);
    let before = |origin: Option<Origin>, sharing| Before { origin, sharing };
    let origin = Origin { list: PACKAGES.to_owned(), package: "plain".into(), version: "1.0".into(), source: String::new() };
    let superseded = "withheld by superseded: plain 1.0 has been followed by 1.1";
    for sharing in [Sharing::Available, Sharing::Announced, Sharing::Withheld] {
        assert_eq!(machine.judged('a', &before(Some(origin.clone()), Some(sharing)), 2 * DAY), superseded);
    }
    let unlisted = "local-only by unlisted: no list of apt names it";
    assert_eq!(machine.judged('a', &before(Some(origin.clone()), Some(Sharing::LocalOnly)), 2 * DAY), unlisted, "it was private");
    assert_eq!(machine.judged('a', &before(None, Some(Sharing::Announced)), 2 * DAY), unlisted);
    let empty: i64 = machine.catalog.db.reader().unwrap().query_row("SELECT count(*) FROM newest", [], |row| row.get(0)).unwrap();
    assert_eq!(empty, 1, "of lists that were replaced nothing stays");
}

/// A fix that is not looked for in the security suite of the release is an announced vulnerability.
#[test]
fn security_suites_are_those_of_the_release() {
    let machine = Machine::new(SECURITY_SOURCE);
    machine.write(INRELEASE, in_suite("s", ""));
    machine.write(PACKAGES, stanza("plain", "1.0", 'a') + &of_source("lib", "1.0", "src (1.0)", 'b') + &stanza("fine", "1.0", 'c'));
    machine.refresh(Vanished::Drop);
    let unseen = "withheld by old-security: nobody saw s-security being looked up; run `apt-get update`";
    assert_eq!(machine.judged('a', &Before::default(), 2 * DAY), unseen, "a security suite that was never fetched");
    machine.write(SECURITY_INRELEASE, in_suite("s-security", "Valid-Until: Thu, 08 Jan 1970 00:00:00 UTC\n"));
    machine.write(SECURITY_PACKAGES, of_source("lib-doc", "1.1", "src (1.0-0+u1)", 'd'));
    machine.refresh(Vanished::Drop);
    let current = "available by current: x s names it as the newest, and its lists are fresh";
    assert_eq!(machine.judged('a', &Before::default(), 2 * DAY), current);
    assert_eq!(machine.judged('b', &Before::default(), 2 * DAY), "withheld by security: src 1.0 is below 1.0-0+u1 of x s-security");
    assert_eq!(machine.rule('d', 2 * DAY), Rule::Current);
    // The Date says that it was fetched on day 1 or later.
    assert_eq!(machine.rule('c', 4 * DAY), Rule::Current);
    assert_eq!(machine.rule('c', 4 * DAY + 1), Rule::OldSecurity);
    assert_eq!(machine.rule('d', 4 * DAY + 1), Rule::OldSecurity);
    machine.catalog.looked_up(SECURITY_INRELEASE, 4 * DAY).unwrap();
    assert_eq!(machine.rule('c', 4 * DAY + 1), Rule::Current, "looked up and found unchanged");
    assert_eq!(machine.rule('c', 7 * DAY), Rule::Expired, "the security suite's Valid-Until");
    let machine = machine.restart();
    assert_eq!(machine.rule('c', 4 * DAY + 1), Rule::Current, "also after a restart");
    machine.write(SECURITY_INRELEASE, in_suite("s-security", ""));
    machine.refresh(Vanished::Drop);
    machine.catalog.looked_up(SECURITY_INRELEASE, 8 * DAY).unwrap();
    machine.catalog.looked_up("nothing of apt's", 8 * DAY).unwrap();
    assert_eq!(machine.rule('c', 8 * DAY), Rule::Current);
    assert_eq!(machine.rule('c', 8 * DAY + 1), Rule::OldList);
    machine.catalog.looked_up(INRELEASE, 8 * DAY).unwrap();
    assert_eq!(machine.rule('c', 9 * DAY), Rule::Current);
    let rows: i64 = machine.catalog.db.reader().unwrap().query_row("SELECT count(*) FROM looked", [], |row| row.get(0)).unwrap();
    assert_eq!(rows, 2, "only Releases of the sources have rows");
    let fresh = |standing: &Standing, now| standing.fresh(now).into_iter().map(|(_, rule)| rule).collect::<Vec<_>>();
    let standing = machine.catalog.standing().unwrap();
    assert_eq!(fresh(&standing, 9 * DAY), [None, None]);
    assert_eq!(fresh(&standing, 12 * DAY), [None, Some(Rule::OldSecurity)], "x s, x s-security");
}

/// A suite of another release has other versions: its fixes are not missing here.
#[test]
fn releases_are_told_apart() {
    let machine = Machine::new("deb http://h/debian s c\ndeb http://h/security t-security c\ndeb http://h/debian s-backports c\n");
    machine.write(INRELEASE, in_suite("s", ""));
    machine.write(PACKAGES, stanza("plain", "1.0", 'a'));
    machine.write("h_debian_dists_s-backports_InRelease", in_suite("s-backports", ""));
    machine.write("h_debian_dists_s-backports_c_binary-amd64_Packages", stanza("plain", "2.0", 'b'));
    machine.write("h_security_dists_t-security_InRelease", in_suite("t-security", ""));
    machine.write("h_security_dists_t-security_c_binary-amd64_Packages", stanza("plain", "3.0", 'c'));
    machine.refresh(Vanished::Drop);
    for letter in ['a', 'b', 'c'] {
        assert_eq!(machine.rule(letter, 2 * DAY), Rule::Current, "{letter}");
    }
}

/// What was shared must not be given once its repository is private, also when no list names it any more.
#[test]
fn what_becomes_private_stays_here() {
    let machine = Machine::new(ONE_SOURCE);
    machine.write(INRELEASE, in_suite("s", ""));
    machine.write(PACKAGES, of_source("plain", "1.0", "src", 'a') + &stanza("other", "1.0", 'b'));
    machine.refreshed(Vanished::Drop, 1, 0, 0);
    assert_eq!(machine.rule('a', 2 * DAY), Rule::Current);
    let origin = Origin { list: PACKAGES.to_owned(), package: "plain".into(), version: "0.9".into(), source: "src".into() };
    let gone = Before { origin: Some(origin), sharing: Some(Sharing::Announced) };
    assert!(machine.judged('f', &gone, 2 * DAY).starts_with("withheld by superseded"));
    let private = |pattern: &str| {
        machine.catalog.configure(Machine::apt(&machine.directory).with_private(&[pattern.parse().unwrap()]));
        let entry = machine.catalog.by_digest(&digest('a')).unwrap().unwrap();
        assert!(entry.private && entry.urls.iter().all(|url| url.private), "{pattern}");
        assert_eq!(machine.rule('a', 2 * DAY), Rule::Private, "{pattern}");
        assert!(machine.judged('f', &gone, 2 * DAY).starts_with("local-only by private"), "{pattern}");
        machine.rule('b', 2 * DAY)
    };
    assert_eq!(private("origin=x"), Rule::Private);
    assert_eq!(private("suite=s,component=c"), Rule::Private);
    assert_eq!(private("url=h/debian"), Rule::Private);
    assert_eq!(private("package=plain"), Rule::Current);
    assert_eq!(private("package=s?c"), Rule::Current);
}
