//! The names that apt gives to files: in `archives/`, in `lists/`, and the percent-encoding of its URIs.
//!
//! Forward only: a list's name is made from the URI in `sources.list`, never read back (the quoting loses the
//! difference between `/` and `_`). The rules are those of apt's `QuoteString`, `URItoFileName`, `pkgAcqArchive` and
//! `pkgAcquire::URIEncode`; the tests hold them against the names that apt itself prints.

use std::fmt;

/// The longest file name that a directory takes, in bytes (`NAME_MAX`).
pub const NAME_BYTES_MAX: usize = 255;

/// What apt quotes in a list's name besides what [`quote`] always does.
const LIST_NAME_BAD: &[u8] = b"\\|{}[]<>\"^~_=!@#$%^&*";

/// What apt percent-encodes in a `Filename` (its default of `Acquire::URIEncode`; `+` is for S3).
pub const URI_BAD: &str = "+~ ";

/// Percent-quotes the bytes of `text` that are in `bad`, `%` itself and all that is not printable ASCII, in lower-case
/// hexadecimal.
pub fn quote(text: &[u8], bad: &[u8]) -> String {
    let mut out = String::with_capacity(text.len());
    quote_onto(&mut out, text, bad);
    out
}

/// [`quote`], appended to `out`.
pub fn quote_onto(out: &mut String, text: &[u8], bad: &[u8]) {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    for &byte in text {
        if byte <= b' ' || byte >= 0x7f || byte == b'%' || bad.contains(&byte) {
            out.push('%');
            out.push(char::from(DIGITS[usize::from(byte >> 4)]));
            out.push(char::from(DIGITS[usize::from(byte & 15)]));
        } else {
            out.push(char::from(byte));
        }
    }
}

/// Undoes [`quote`]: `%` and two hexadecimal digits become one byte, everything else stays.
pub fn unquote(text: &str) -> Vec<u8> {
    let digit = |byte: &u8| char::from(*byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, tail)) = rest.split_first() {
        if byte == b'%'
            && let [high, low, ..] = tail
            && let (Some(high), Some(low)) = (digit(high), digit(low))
        {
            out.push(high << 4 | low);
            rest = &tail[2..];
        } else {
            out.push(byte);
            rest = tail;
        }
    }
    out
}

/// What comes after the last `.` of a file name, the whole name if there is none (apt's `flExtension`).
fn extension(file: &str) -> &str {
    file.rsplit_once('.').map_or(file, |(_, extension)| extension)
}

/// Writes the name of a package's file in `archives/` into `out`, which is emptied first.
///
/// `filename` is the stanza's `Filename`: apt takes the extension from it (`deb`, `udeb`, `ddeb`).
pub fn archive_name(out: &mut String, package: &str, version: &str, architecture: &str, filename: &str) {
    out.clear();
    quote_onto(out, package.as_bytes(), b"_:");
    out.push('_');
    quote_onto(out, version.as_bytes(), b"_:");
    out.push('_');
    quote_onto(out, architecture.as_bytes(), b"_:.");
    out.push('.');
    out.push_str(extension(filename));
}

/// The name in `lists/` of what `uri` names, without the extension of the form that apt keeps.
///
/// Scheme, user and password are dropped, so that they show in no file name.
pub fn list_name(uri: &str) -> String {
    let uri = Uri::parse(uri);
    let mut plain = uri.authority();
    if !uri.path.starts_with('/') {
        plain.push('/');
    }
    plain.push_str(&uri.path);
    quote(plain.as_bytes(), LIST_NAME_BAD).replace('/', "_")
}

/// A URI, taken apart as apt does.
///
/// `Debug` and `Display` leave user and password out: they are what a log may show.
#[derive(Clone, PartialEq, Eq)]
pub struct Uri {
    /// Before the first colon: `http`, `mirror+https`, `cdrom`.
    pub scheme: String,
    /// Percent-decoded; empty if there is none.
    pub user: String,
    /// Percent-decoded; empty if there is none.
    pub password: String,
    /// Without brackets; empty for `cdrom:` and `file:`.
    pub host: String,
    /// `None` for the scheme's own.
    pub port: Option<u16>,
    /// With its leading slash where there is a host.
    pub path: String,
}

impl Uri {
    /// Takes `text` apart. Never fails: what makes no sense yields empty parts, as in apt.
    pub fn parse(text: &str) -> Self {
        let (scheme, rest) = text.split_once(':').unwrap_or((text, ""));
        let scheme = scheme.to_owned();
        let Some(rest) = rest.strip_prefix("//") else {
            let path = if rest.is_empty() { "/" } else { rest };
            return Self { scheme, user: String::new(), password: String::new(), host: String::new(), port: None, path: path.to_owned() };
        };
        let mut in_bracket = false;
        let path_at = rest
            .bytes()
            .position(|byte| {
                in_bracket = match byte {
                    b'[' => true,
                    b']' => false,
                    _ => in_bracket,
                };
                byte == b'/' && !in_bracket
            })
            .unwrap_or(rest.len());
        let (authority, path) = rest.split_at(path_at);
        let (who, host) = match authority.rsplit_once('@') {
            Some((who, host)) => (who, host),
            None => ("", authority),
        };
        let (user, password) = who.split_once(':').unwrap_or((who, ""));
        let decoded = |text: &str| String::from_utf8_lossy(&unquote(text)).into_owned();
        let (host, port) = match host.rsplit_once(':') {
            Some((name, port)) if !port.contains(']') => (name, port.parse().ok().filter(|&port| port != 0)),
            _ => (host, None),
        };
        Self {
            scheme,
            user: decoded(user),
            password: decoded(password),
            host: host.trim_start_matches('[').trim_end_matches(']').to_owned(),
            port,
            path: if path.is_empty() { "/".to_owned() } else { path.to_owned() },
        }
    }

    /// Whether the mirror client can fetch it: plain `http` or `https`.
    pub fn is_http(&self) -> bool {
        matches!(self.scheme.as_str(), "http" | "https") && !self.host.is_empty()
    }

    /// Whether it carries a user or a password.
    pub fn has_credentials(&self) -> bool {
        !self.user.is_empty() || !self.password.is_empty()
    }

    /// `host[:port]` without brackets, as in the names of lists.
    fn authority(&self) -> String {
        match self.port {
            Some(port) => format!("{}:{port}", self.host),
            None => self.host.clone(),
        }
    }

    /// The whole URI with user and password, percent-encoded: what is asked of the mirror, never what is logged.
    pub fn with_credentials(&self) -> String {
        const BAD: &[u8] = b":/?#[]@";
        let who = match (self.user.is_empty(), self.password.is_empty()) {
            (true, _) => String::new(),
            (false, true) => format!("{}@", quote(self.user.as_bytes(), BAD)),
            (false, false) => format!("{}:{}@", quote(self.user.as_bytes(), BAD), quote(self.password.as_bytes(), BAD)),
        };
        self.written(&who)
    }

    fn written(&self, who: &str) -> String {
        if self.host.is_empty() {
            return format!("{}:{}", self.scheme, self.path);
        }
        let host = if self.host.contains(':') { format!("[{}]", self.host) } else { self.host.clone() };
        let port = self.port.map(|port| format!(":{port}")).unwrap_or_default();
        format!("{}://{who}{host}{port}{}", self.scheme, self.path)
    }
}

impl fmt::Display for Uri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.written(""))
    }
}

impl fmt::Debug for Uri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each character that apt quotes in a name would make a ghost that apt never asks for.
    #[test]
    fn archive_names_are_quoted_as_by_apt() {
        let check = |package: &str, version: &str, architecture: &str, filename: &str, want: &str| {
            let mut name = String::from("left over");
            archive_name(&mut name, package, version, architecture, filename);
            assert_eq!(name, want);
        };
        check("hello", "2.10-3", "amd64", "pool/main/h/hello/hello_2.10-3_amd64.deb", "hello_2.10-3_amd64.deb");
        check("g++", "4:12.2.0-3", "amd64", "pool/g/g++_12.2.0-3_amd64.deb", "g++_4%3a12.2.0-3_amd64.deb");
        check("a_b", "1~rc1+b2", "all", "x.deb", "a%5fb_1~rc1+b2_all.deb");
        check("p", "1%2", "any.weird", "x.deb", "p_1%252_any%2eweird.deb");
        check("p", "1 2\u{e9}", "all", "x.deb", "p_1%202%c3%a9_all.deb");
        check("p-udeb", "1", "amd64", "pool/p-udeb_1_amd64.udeb", "p-udeb_1_amd64.udeb");
        check("p", "1", "amd64", "noextension", "p_1_amd64.noextension");
    }

    /// A list's name off by one character: the catalog stays empty.
    #[test]
    fn list_names_are_made_as_by_apt() {
        let check = |uri: &str, want: &str| assert_eq!(list_name(uri), want, "{uri}");
        check("http://deb.debian.org/debian/dists/bookworm/InRelease", "deb.debian.org_debian_dists_bookworm_InRelease");
        check("https://user:secret@repo.example/x/Packages", "repo.example_x_Packages");
        check("http://localhost:8080/a_b/./Packages", "localhost:8080_a%5fb_._Packages");
        check("http://[::1]:80/x", "::1:80_x");
        check("http://h/~u/dists/a=b!/x@2.tar", "h_%7eu_dists_a%3db%21_x%402.tar");
        check("file:/srv/repo/dists/x/Release", "_srv_repo_dists_x_Release");
        check("http://h//double/x", "h__double_x");
    }

    /// User and password in a log, or a mirror asked at the wrong port.
    #[test]
    fn uris_are_taken_apart_and_shown_without_secrets() {
        let uri = Uri::parse("https://us%40er:p%3aw@Repo.example:8443/debian/");
        assert_eq!((uri.user.as_str(), uri.password.as_str()), ("us@er", "p:w"));
        assert_eq!((uri.host.as_str(), uri.port, uri.path.as_str()), ("Repo.example", Some(8443), "/debian/"));
        assert_eq!(uri.to_string(), "https://Repo.example:8443/debian/");
        assert_eq!(format!("{uri:?}"), "https://Repo.example:8443/debian/");
        assert_eq!(uri.with_credentials(), "https://us%40er:p%3aw@Repo.example:8443/debian/");
        assert_eq!(Uri::parse("http://[fe80::1]/x").to_string(), "http://[fe80::1]/x");
        assert_eq!(Uri::parse("http://[fe80::1]/x").port, None);
        assert_eq!(Uri::parse("cdrom:[Debian 12]/").host, "");
        assert!(!Uri::parse("file:/srv").is_http());
        assert_eq!(Uri::parse("").path, "/");
        assert_eq!(Uri::parse("http://h").path, "/");
    }

    /// Quoting that cannot be undone would garble options of apt's configuration.
    #[test]
    fn quoting_round_trips() {
        let all: Vec<u8> = (0..=255).collect();
        assert_eq!(unquote(&quote(&all, b"a")), all);
        assert_eq!(unquote("%4"), b"%4");
        assert_eq!(unquote("%zz%20"), b"%zz ");
    }
}
