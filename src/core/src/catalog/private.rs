//! Repositories and packages that are named as private: their files never leave this machine.
//!
//! A pattern is a comma-separated list of `KEY=GLOB`, all of which must fit; any one pattern that fits is enough. `*` stands for any
//! text, `?` for one character, and case does not matter: what fits too much keeps a file back, what fits too little gives it
//! away.
//!
//! | key | is compared with |
//! |---|---|
//! | `origin` | `Origin` and `Label` of the Release |
//! | `suite` | the suite as the source names it, and `Suite` and `Codename` of the Release |
//! | `component` | the component |
//! | `url` | the start of the repository's URI, with its scheme or without, up to a `/` or its end |
//! | `package` | the name of the package, and that of its source package |

use super::names::Uri;
use std::fmt;
use std::str::FromStr;

/// Conditions of one pattern; more than there are keys make no sense.
const CONDITIONS_MAX: usize = 16;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Key {
    Origin,
    Suite,
    Component,
    Url,
    Package,
}

/// One pattern; see the module.
#[derive(Clone, PartialEq, Eq)]
pub struct Pattern {
    text: String,
    conditions: Vec<(Key, String)>,
}

impl fmt::Debug for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.text, f)
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl FromStr for Pattern {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut conditions = Vec::new();
        for condition in text.split(',') {
            let (key, glob) = condition.split_once('=').map(|(key, glob)| (key.trim(), glob.trim())).unwrap_or_default();
            let key = match key {
                "origin" => Key::Origin,
                "suite" => Key::Suite,
                "component" => Key::Component,
                "url" => Key::Url,
                "package" => Key::Package,
                _ => {
                    return Err(format!(
                        "`{text}` is no pattern: write origin=, suite=, component=, url= or package= before what is meant"
                    ));
                }
            };
            if glob.is_empty() {
                return Err(format!("`{text}` is no pattern: nothing stands behind one of its `=`"));
            }
            if conditions.len() == CONDITIONS_MAX {
                return Err(format!("`{text}` has more than {CONDITIONS_MAX} conditions"));
            }
            conditions.push((key, glob.to_ascii_lowercase()));
        }
        Ok(Self { text: text.to_owned(), conditions })
    }
}

/// What a pattern is compared with. What is not known, or not asked about, is empty and fits no condition.
#[derive(Clone, Copy, Debug, Default)]
pub struct Place<'a> {
    /// The repository.
    pub repository: Option<&'a Uri>,
    /// As the source names it; the Release's `Suite` and `Codename`.
    pub suites: [&'a str; 3],
    /// The Release's `Origin` and `Label`.
    pub origins: [&'a str; 2],
    /// The component.
    pub component: &'a str,
    /// The package and its source package.
    pub packages: [&'a str; 2],
}

impl Pattern {
    /// Whether every condition fits.
    pub fn fits(&self, place: &Place<'_>) -> bool {
        self.conditions.iter().all(|(key, wanted)| match key {
            Key::Origin => place.origins.iter().any(|text| glob(wanted, text)),
            Key::Suite => place.suites.iter().any(|text| glob(wanted, text)),
            Key::Component => glob(wanted, place.component),
            Key::Package => place.packages.iter().any(|text| glob(wanted, text)),
            Key::Url => place.repository.is_some_and(|uri| starts(wanted, uri)),
        })
    }
}

/// Whether a URI starts with what is wanted, at a boundary.
fn starts(wanted: &str, uri: &Uri) -> bool {
    let whole = uri.to_string();
    let text = if wanted.contains("://") { whole.as_str() } else { whole.split_once("://").map_or("", |(_, rest)| rest) };
    let wanted = wanted.trim_end_matches('/');
    let names_path = wanted.split_once("://").map_or(wanted, |(_, rest)| rest).contains('/');
    glob(wanted, text) || glob(&format!("{wanted}/*"), text) || !names_path && glob(&format!("{wanted}:*"), text)
}

/// Whether `text`, which is not empty, is what `wanted` describes, in whatever case; `wanted` is in lower case.
fn glob(wanted: &str, text: &str) -> bool {
    if text.is_empty() {
        return false;
    }
    let (wanted, text) = (wanted.as_bytes(), text.as_bytes());
    let (mut at, mut next) = (0, 0);
    // Where the last `*` stands, and how much of the text it has taken.
    let mut star: Option<(usize, usize)> = None;
    while next < text.len() {
        match wanted.get(at) {
            Some(b'*') => {
                star = Some((at, next));
                at += 1;
            }
            Some(&byte) if byte == b'?' || byte == text[next].to_ascii_lowercase() => {
                at += 1;
                next += 1;
            }
            _ => match &mut star {
                Some((after, taken)) => {
                    *taken += 1;
                    at = *after + 1;
                    next = *taken;
                }
                None => return false,
            },
        }
    }
    wanted[at..].iter().all(|byte| *byte == b'*')
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    /// A pattern that fits too little gives a private package away.
    #[test]
    fn patterns_fit_what_they_say() {
        let uri = Uri::parse("https://Repo.example:8443/acme/internal/");
        let place = Place {
            repository: Some(&uri),
            suites: ["stable", "acme-stable", "bookworm"],
            origins: ["ACME Corp", "acme"],
            component: "non-free",
            packages: ["acme-agent", "acme"],
        };
        let check = |pattern: &str, want: bool| assert_eq!(pattern.parse::<Pattern>().unwrap().fits(&place), want, "{pattern}");
        for fits in [
            "origin=acme corp",
            "origin=*corp",
            "origin=ACM?",
            "suite=stable",
            "suite=bookworm",
            "suite=acme-*",
            "component=non-free",
            "component=*",
            "url=https://repo.example:8443/acme",
            "url=https://repo.example:8443/acme/internal/",
            "url=repo.example",
            "url=repo.example:8443",
            "url=*.example:8443/acme",
            "url=https://repo.example",
            "package=acme-agent",
            "package=acme",
            "package=*agent",
            "package=a*m*-a*t",
            "origin=ACME*, component=non-free ,package=acme-*",
        ] {
            check(fits, true);
        }
        for fits_not in [
            "origin=acme*x",
            "suite=bookwor",
            "component=main",
            "url=http://repo.example",
            "url=https://repo.example:8443/acm",
            "url=repo.exam",
            "url=acme",
            "package=agent",
            "package=acme-?",
            "origin=ACME*,component=main",
        ] {
            check(fits_not, false);
        }
        let unknown = Place::default();
        for pattern in ["origin=*", "suite=*", "component=*", "url=*", "package=*"] {
            assert!(!pattern.parse::<Pattern>().unwrap().fits(&unknown), "{pattern}: nothing is known");
        }
    }

    /// A pattern that is taken and fits nothing would give away what its author believes kept.
    #[test]
    fn what_is_no_pattern_is_refused() {
        let check = |pattern: &str, want: &str| assert_eq!(pattern.parse::<Pattern>().unwrap_err(), format!("`{pattern}` {want}"));
        let keys = "is no pattern: write origin=, suite=, component=, url= or package= before what is meant";
        check("", keys);
        check("repo.example", keys);
        check("orign=ACME", keys);
        check("Origin=ACME", keys);
        check("origin=ACME,", keys);
        check("origin=", "is no pattern: nothing stands behind one of its `=`");
        check(&["origin=a"; 17].join(","), "has more than 16 conditions");
    }
}
