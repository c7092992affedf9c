//! `sources.list` in the one-line format and deb822 `.sources`: which repositories apt reads.
//!
//! Only what the mirror client can fetch becomes a [`Source`]: `http:` and `https:`. Everything else (`file:`, `cdrom:`,
//! `copy:`, `mirror+...`, `tor+...`) is recognised and left out with its reason: apt goes on fetching it by itself. A line
//! that apt would refuse is a problem with file and line; the other lines count all the same.

use super::names::{self, Uri};
use deb822_fast::borrowed::BorrowedParser;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// The longest file of sources that is read, in bytes.
const SOURCES_BYTES_MAX: u64 = 4 << 20;

/// Sources taken from all files together; `Types` x `URIs` x `Suites` multiply.
const SOURCES_MAX: usize = 4096;

/// What kind of packages a source has.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SourceKind {
    /// `deb`.
    Binary,
    /// `deb-src`.
    Source,
}

/// One repository and suite that apt reads.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Source {
    /// `deb` or `deb-src`.
    pub kind: SourceKind,
    /// The repository, its path ending in `/`.
    pub uri: Uri,
    /// Suite, or exact path if it ends in `/`.
    pub suite: String,
    /// Empty for an exact path.
    pub components: Vec<String>,
    /// Options by their one-line names (`arch`, `arch+`, `by-hash`, `lang`), several values joined by commas.
    pub options: BTreeMap<String, String>,
}

impl Source {
    /// Whether the suite is an exact path: index files lie beside the Release file, without components.
    pub fn is_flat(&self) -> bool {
        self.suite.ends_with('/')
    }

    /// The repository's URI as text with credentials: what index and package paths are appended to.
    pub fn repository(&self) -> String {
        self.uri.with_credentials()
    }

    /// Where Release and index files lie, ending in `/`.
    pub fn release_directory(&self) -> String {
        let repository = self.repository();
        match self.suite.as_str() {
            "/" => repository,
            suite if self.is_flat() => repository + suite,
            suite => format!("{repository}dists/{suite}/"),
        }
    }
}

/// What was read from files of sources.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sources {
    /// In apt's order, which is the order of preference.
    pub sources: Vec<Source>,
    /// Sources that apt reads and poolfs does not, each with its reason.
    pub left_out: Vec<String>,
    /// What is wrong, each with file, line and remedy.
    pub problems: Vec<String>,
}

impl Sources {
    /// Reads files and directories of sources in the given order. `native` is the machine's architecture.
    pub fn read(paths: &[PathBuf], native: &str) -> Self {
        let mut all = Self::default();
        for path in paths {
            if path.is_dir() {
                match parts(path, &["list", "sources"]) {
                    Ok(files) => files.iter().for_each(|file| all.read_file(file, native)),
                    Err(source) => all.problems.push(format!("{}: cannot be listed: {source}", path.display())),
                }
            } else {
                all.read_file(path, native);
            }
        }
        all
    }

    fn read_file(&mut self, path: &Path, native: &str) {
        match read_bounded(path) {
            Ok(text) if path.extension().is_some_and(|extension| extension == "sources") => self.deb822(&text, path, native),
            Ok(text) => self.one_line(&text, path, native),
            // Both of apt's places may be absent: a machine has sources.list or sources.list.d.
            Err(source) if source.kind() == std::io::ErrorKind::NotFound => {}
            Err(source) => self.problems.push(format!("{}: {source}", path.display())),
        }
    }

    /// Parses text in the one-line format; `path` is for messages.
    pub fn one_line(&mut self, text: &str, path: &Path, native: &str) {
        for (index, line) in text.lines().enumerate() {
            let line = without_comment(line).trim();
            if line.is_empty() {
                continue;
            }
            if let Err(what) = self.one_line_entry(line, native) {
                self.problems.push(format!("{}:{}: {what}; `apt-get update` says the same", path.display(), index + 1));
            }
        }
    }

    fn one_line_entry(&mut self, line: &str, native: &str) -> Result<(), &'static str> {
        let mut rest = line;
        let kind = kind(&word(&mut rest)?.ok_or("no type")?)?;
        let options = bracketed_options(&mut rest)?;
        let uri = word(&mut rest)?.ok_or("no URI")?;
        let suite = word(&mut rest)?.ok_or("no suite")?;
        let mut components = Vec::new();
        while let Some(component) = word(&mut rest)? {
            components.push(component);
        }
        self.add(&[kind], &[uri], &[suite], &components, &options, native)
    }

    /// Parses text in the deb822 format; `path` is for messages.
    pub fn deb822(&mut self, text: &str, path: &Path, native: &str) {
        // Comments may stand anywhere, also between the lines of one field.
        let mut first_line = None;
        let mut stanza = String::new();
        for (index, line) in text.lines().chain([""]).enumerate() {
            if line.starts_with('#') {
                continue;
            }
            if !line.trim().is_empty() {
                first_line.get_or_insert(index + 1);
                stanza.push_str(line);
                stanza.push('\n');
                continue;
            }
            if let Some(first_line) = first_line.take()
                && let Err(what) = self.deb822_entry(&stanza, native)
            {
                self.problems.push(format!("{}:{first_line}: {what}; `apt-get update` says the same", path.display()));
            }
            stanza.clear();
        }
    }

    fn deb822_entry(&mut self, stanza: &str, native: &str) -> Result<(), &'static str> {
        let stanzas = BorrowedParser::new(stanza).parse_all().map_err(|_| "not a deb822 stanza")?;
        let [stanza] = stanzas.as_slice() else {
            return Err("not a deb822 stanza");
        };
        let words = |wanted: &str| -> Vec<String> {
            let field = stanza.iter().find(|field| field.name().eq_ignore_ascii_case(wanted));
            let lines = field.map(|field| field.lines()).unwrap_or_default();
            lines.iter().flat_map(|line| line.split_ascii_whitespace()).map(str::to_owned).collect()
        };
        if words("Enabled").first().is_some_and(|word| !truth(word, true)) {
            return Ok(());
        }
        let mut options = BTreeMap::new();
        for field in stanza.iter() {
            let name = field.name().to_ascii_lowercase();
            let option = match name.as_str() {
                "types" | "uris" | "suites" | "components" | "enabled" | "x-repolib-name" | "signed-by" => continue,
                "architectures" => "arch".to_owned(),
                "languages" => "lang".to_owned(),
                "targets" => "target".to_owned(),
                other => match other.strip_suffix("-add").map(|of| (of, '+')).or_else(|| other.strip_suffix("-remove").map(|of| (of, '-')))
                {
                    Some(("architectures", sign)) => format!("arch{sign}"),
                    Some(("languages", sign)) => format!("lang{sign}"),
                    Some(("targets", sign)) => format!("target{sign}"),
                    _ => other.to_owned(),
                },
            };
            options.insert(option, words(&name).join(","));
        }
        let kinds = words("Types").iter().map(|word| kind(word)).collect::<Result<Vec<_>, _>>()?;
        let (uris, suites) = (words("URIs"), words("Suites"));
        if kinds.is_empty() {
            return Err("no Types");
        }
        if uris.is_empty() {
            return Err("no URIs");
        }
        if suites.is_empty() {
            return Err("no Suites");
        }
        self.add(&kinds, &uris, &suites, &words("Components"), &options, native)
    }

    fn add(
        &mut self,
        kinds: &[SourceKind],
        uris: &[String],
        suites: &[String],
        components: &[String],
        options: &BTreeMap<String, String>,
        native: &str,
    ) -> Result<(), &'static str> {
        for text in uris {
            if !text.contains(':') {
                return Err("the URI has no scheme");
            }
            let mut text = text.replace("$(ARCH)", native);
            if !text.ends_with('/') {
                text.push('/');
            }
            let uri = Uri::parse(&text);
            if !uri.is_http() {
                self.left_out.push(format!("{uri}: {}", why_left_out(&uri.scheme)));
                continue;
            }
            for suite in suites {
                let suite = suite.replace("$(ARCH)", native);
                match (suite.ends_with('/'), components.is_empty()) {
                    (true, false) => return Err("an exact path (a suite that ends in /) takes no components"),
                    (false, true) => return Err("no components"),
                    _ => {}
                }
                for &kind in kinds {
                    if self.sources.len() == SOURCES_MAX {
                        return Err("more sources than poolfs takes (4096)");
                    }
                    let (uri, suite) = (uri.clone(), suite.clone());
                    self.sources.push(Source { kind, uri, suite, components: components.to_vec(), options: options.clone() });
                }
            }
        }
        Ok(())
    }
}

fn kind(word: &str) -> Result<SourceKind, &'static str> {
    match word {
        "deb" => Ok(SourceKind::Binary),
        "deb-src" => Ok(SourceKind::Source),
        _ => Err("the type is neither deb nor deb-src"),
    }
}

fn why_left_out(scheme: &str) -> &'static str {
    match scheme {
        "file" | "copy" => "its files are on this machine already",
        "cdrom" => "apt asks for the disc itself",
        _ if scheme.starts_with("mirror") => "apt picks among mirrors itself; name one mirror for poolfs to help",
        _ if scheme.starts_with("tor") => "asking peers for its files would tell what Tor hides",
        _ => "poolfs fetches from http and https only",
    }
}

/// apt's `StringToBool`, as far as words go.
pub(crate) fn truth(word: &str, default: bool) -> bool {
    let is_one_of = |words: &[&str]| words.iter().any(|known| known.eq_ignore_ascii_case(word));
    if is_one_of(&["no", "false", "without", "off", "disable", "0"]) {
        false
    } else if is_one_of(&["yes", "true", "with", "on", "enable", "1"]) {
        true
    } else {
        default
    }
}

/// Cuts a comment off, which starts at a `#` outside brackets.
fn without_comment(line: &str) -> &str {
    let mut from = 0;
    while let Some(at) = line[from..].find(['#', '[']).map(|at| from + at) {
        if line[at..].starts_with('#') {
            return &line[..at];
        }
        match line[at..].find(']') {
            Some(end) => from = at + end,
            None => from = at + 1,
        }
    }
    line
}

/// Takes the next word off `rest`: quotes may hold spaces, so may brackets (`cdrom:[Debian 12]/`), `%20` is decoded.
fn word(rest: &mut &str) -> Result<Option<String>, &'static str> {
    let text = rest.trim_start();
    let bytes = text.as_bytes();
    let mut end = 0;
    while end < bytes.len() && !bytes[end].is_ascii_whitespace() {
        let closing = match bytes[end] {
            b'"' => '"',
            b'[' => ']',
            _ => {
                end += 1;
                continue;
            }
        };
        end += 2 + text[end + 1..].find(closing).ok_or("a quote or bracket is not closed")?;
    }
    let (found, tail) = text.split_at(end);
    *rest = tail;
    if found.is_empty() {
        return Ok(None);
    }
    let plain = found.replace('"', "");
    String::from_utf8(names::unquote(&plain)).map(Some).map_err(|_| "a word is not UTF-8")
}

/// `[arch=amd64,i386 signed-by=/x]` before the URI, if it is there.
fn bracketed_options(rest: &mut &str) -> Result<BTreeMap<String, String>, &'static str> {
    let mut options = BTreeMap::new();
    let Some(inside) = rest.trim_start().strip_prefix('[') else {
        return Ok(options);
    };
    let (inside, tail) = inside.split_once(']').ok_or("the options are not closed by ]")?;
    *rest = tail;
    for option in inside.split_ascii_whitespace() {
        let (name, value) = option.split_once('=').ok_or("an option has no =")?;
        options.insert(name.to_ascii_lowercase(), value.replace('"', ""));
    }
    Ok(options)
}

/// The files of a `.d` directory that apt reads, in its order: one of the extensions, and names of letters, digits, `_`,
/// `-`, `:` and `.`.
pub(crate) fn parts(directory: &Path, extensions: &[&str]) -> std::io::Result<Vec<PathBuf>> {
    let entries = match std::fs::read_dir(directory) {
        Err(source) if source.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut names = Vec::new();
    for entry in entries {
        let Ok(name) = entry?.file_name().into_string() else {
            continue;
        };
        let good = |byte: u8| byte.is_ascii_alphanumeric() || b"_-:.".contains(&byte);
        let wanted = name.rsplit_once('.').is_some_and(|(_, extension)| extensions.contains(&extension));
        if wanted && !name.starts_with('.') && name.bytes().all(good) && directory.join(&name).is_file() {
            names.push(name);
        }
    }
    names.sort_unstable();
    Ok(names.into_iter().map(|name| directory.join(name)).collect())
}

/// Reads a small configuration file as text; longer or other text is an error that says so.
pub(crate) fn read_bounded(path: &Path) -> std::io::Result<String> {
    use std::io::Read as _;
    let mut text = String::new();
    std::fs::File::open(path)?.take(SOURCES_BYTES_MAX + 1).read_to_string(&mut text)?;
    if u64::try_from(text.len()).unwrap_or(u64::MAX) > SOURCES_BYTES_MAX {
        return Err(std::io::Error::other(format!("is longer than {SOURCES_BYTES_MAX} bytes")));
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    fn shown(read: &Sources) -> Vec<String> {
        let one = |source: &Source| {
            let options: Vec<_> = source.options.iter().map(|(name, value)| format!(" {name}={value}")).collect();
            let kind = if source.kind == SourceKind::Binary { "deb" } else { "deb-src" };
            format!("{kind} {} {} {}{}", source.repository(), source.suite, source.components.join("+"), options.concat())
        };
        read.sources.iter().map(one).collect()
    }

    fn one_line(text: &str) -> Sources {
        let mut read = Sources::default();
        read.one_line(text, Path::new("s.list"), "amd64");
        read
    }

    fn deb822(text: &str) -> Sources {
        let mut read = Sources::default();
        read.deb822(text, Path::new("s.sources"), "amd64");
        read
    }

    /// A line read otherwise than by apt: names or URLs that do not exist.
    #[test]
    fn one_line_entries() {
        let check = |text: &str, want: &[&str]| {
            let read = one_line(text);
            assert_eq!(shown(&read), want, "{text}");
            assert_eq!(read.problems, Vec::<String>::new(), "{text}");
        };
        check("deb http://h/debian bookworm main contrib # x\n\n# deb http://no/ x y\n", &["deb http://h/debian/ bookworm main+contrib"]);
        check("\tdeb-src   http://h/debian/\tbookworm\tmain  ", &["deb-src http://h/debian/ bookworm main"]);
        check(
            "deb [arch=amd64,i386 signed-by=/usr/share/x#1.gpg] https://h/ s c#comment",
            &["deb https://h/ s c arch=amd64,i386 signed-by=/usr/share/x#1.gpg"],
        );
        check("deb [ arch+=i386 lang-=de ] http://h/ s c", &["deb http://h/ s c arch+=i386 lang-=de"]);
        check("deb http://h/$(ARCH) $(ARCH)/", &["deb http://h/amd64/ amd64/ "]);
        check("deb http://h/x ./", &["deb http://h/x/ ./ "]);
        check("deb http://h/x /", &["deb http://h/x/ / "]);
        check("deb \"http://h/with space\" s c%20d", &["deb http://h/with space/ s c d"]);
        check("deb http://u:p@h/x s c", &["deb http://u:p@h/x/ s c"]);
    }

    /// What apt fetches by itself must be left alone, and said.
    #[test]
    fn other_schemes_are_left_out_with_a_reason() {
        let text = "deb file:/srv/repo s c\ndeb cdrom:[Debian 12 - x]/ s c\ndeb copy:/x s c\ndeb mirror+https://h/list s c\n\
                    deb tor+https://h/ s c\ndeb ftp://h/ s c\ndeb http://h/ s c\n";
        let read = one_line(text);
        assert_eq!(shown(&read), ["deb http://h/ s c"]);
        assert_eq!(
            read.left_out,
            [
                "file:/srv/repo/: its files are on this machine already",
                "cdrom:[Debian 12 - x]/: apt asks for the disc itself",
                "copy:/x/: its files are on this machine already",
                "mirror+https://h/list/: apt picks among mirrors itself; name one mirror for poolfs to help",
                "tor+https://h/: asking peers for its files would tell what Tor hides",
                "ftp://h/: poolfs fetches from http and https only",
            ]
        );
    }

    /// A line that apt refuses: one problem with its place, and the next line still counts.
    #[test]
    fn bad_lines_are_problems_with_their_place() {
        let check = |line: &str, want: &str| {
            let read = one_line(&format!("{line}\ndeb http://good/ s c\n"));
            assert_eq!(read.problems, [format!("s.list:1: {want}; `apt-get update` says the same")]);
            assert_eq!(shown(&read), ["deb http://good/ s c"]);
        };
        check("rpm http://h/ s c", "the type is neither deb nor deb-src");
        check("deb", "no URI");
        check("deb http://h/", "no suite");
        check("deb http://h/ s", "no components");
        check("deb nocolon s c", "the URI has no scheme");
        check("deb [arch=x http://h/ s c", "the options are not closed by ]");
        check("deb [arch] http://h/ s c", "an option has no =");
        check("deb http://h/ ./ main", "an exact path (a suite that ends in /) takes no components");
        check("deb \"http://h/ s c", "a quote or bracket is not closed");
    }

    /// The products of Types, URIs and Suites, options, comments within fields, and disabled stanzas.
    #[test]
    fn deb822_entries() {
        let read = deb822(
            "Types: deb deb-src\n# http://snapshot\nURIs: http://a/debian\n# between\n https://b/\nSuites: s s-updates\n\
             Components: main\n contrib\nSigned-By: /k.gpg\nArchitectures: amd64 i386\nLanguages-Add: de\n\n\n\
             Enabled: no\nTypes: deb\nURIs: http://off\nSuites: s\nComponents: c\n\n\
             types: deb\nuris: http://c\nsuites: ./\nby-hash: force\nSigned-By:\n -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n mQ==\n",
        );
        let options = "arch=amd64,i386 lang+=de";
        let mut want = Vec::new();
        for uri in ["http://a/debian/", "https://b/"] {
            for suite in ["s", "s-updates"] {
                want.extend(["deb", "deb-src"].map(|kind| format!("{kind} {uri} {suite} main+contrib {options}")));
            }
        }
        want.push("deb http://c/ ./  by-hash=force".to_owned());
        assert_eq!(shown(&read), want);
        assert_eq!(read.problems, Vec::<String>::new());
    }

    /// Stanzas that apt refuses.
    #[test]
    fn bad_stanzas_are_problems_with_their_place() {
        let good = "Types: deb\nURIs: http://h\nSuites: s\nComponents: c\n";
        let check = |stanza: String, want: &str| {
            let read = deb822(&format!("\n{stanza}\n{good}"));
            assert_eq!(read.problems, [format!("s.sources:2: {want}; `apt-get update` says the same")]);
            assert_eq!(read.sources.len(), 1);
        };
        check(good.replace("Types: deb\n", ""), "no Types");
        check(good.replace("URIs: http://h\n", ""), "no URIs");
        check(good.replace("Suites: s\n", ""), "no Suites");
        check(good.replace("Components: c\n", ""), "no components");
        check(good.replace("Suites: s\n", "Suites: ./\n"), "an exact path (a suite that ends in /) takes no components");
        check(good.replace("Types: deb\n", "garbage\n"), "not a deb822 stanza");
        check(good.replace("deb", "rpm"), "the type is neither deb nor deb-src");
    }

    /// apt's order decides which mirror is asked first; ignored names must not count.
    #[test]
    fn directories_are_read_like_run_parts() {
        let directory = tempfile::tempdir().unwrap();
        let write = |name: &str| std::fs::write(directory.path().join(name), format!("deb http://{name}/ s c\n")).unwrap();
        for name in ["b.list", "a.list", "10-x.list", "c.list.save", "d.list~", "e", ".hidden.list", "f g.list", "z.list.disabled"] {
            write(name);
        }
        std::fs::write(directory.path().join("a.sources"), "Types: deb\nURIs: http://a.sources\nSuites: s\nComponents: c\n").unwrap();
        std::fs::create_dir(directory.path().join("dir.list")).unwrap();
        let read = Sources::read(&[directory.path().join("absent.list"), directory.path().to_owned()], "amd64");
        let hosts: Vec<_> = read.sources.iter().map(|source| source.uri.host.as_str()).collect();
        assert_eq!(hosts, ["10-x.list", "a.list", "a.sources", "b.list"]);
        assert_eq!(read.problems, Vec::<String>::new());
    }

    /// Where apt looks for a suite's Release.
    #[test]
    fn release_directories() {
        let check = |line: &str, want: &str| assert_eq!(one_line(line).sources[0].release_directory(), want);
        check("deb http://h/debian bookworm main", "http://h/debian/dists/bookworm/");
        check("deb http://h/x ./", "http://h/x/./");
        check("deb http://h/x /", "http://h/x/");
        check("deb http://h/x a/b/", "http://h/x/a/b/");
    }
}
