//! apt's configuration, and the names and patterns in it: written by the machine's owner, in every form that apt takes.

use crate::driver::{Target, behaviour, kind_of, some};
use poolfs_core::catalog::AptConfig;
use poolfs_core::catalog::apt_config::{Environment, Options};
use poolfs_core::catalog::names::{Uri, archive_name, list_name, quote, unquote};
use poolfs_core::catalog::private::{Pattern, Place};
use poolfs_core::catalog::sources::Sources;
use std::path::Path;

/// Every target of this file.
pub(super) const ALL: &[Target] = &[
    Target {
        name: "apt-config",
        about: "the output of apt-config",
        start: |_| Box::new(Dumps::new()),
        seeds: Vec::new,
        tokens: OPTIONS,
        input_bytes_max: 8 * 1024,
        memory: (4 << 20, 2_048),
    },
    Target {
        name: "sources-list",
        about: "sources.list",
        start: |_| Box::new(|input: &[u8]| sources(input, Sources::one_line)),
        seeds: Vec::new,
        tokens: LIST,
        input_bytes_max: 4 * 1024,
        memory: (4 << 20, 4_096),
    },
    Target {
        name: "sources-deb822",
        about: ".sources",
        start: |_| Box::new(|input: &[u8]| sources(input, Sources::deb822)),
        seeds: Vec::new,
        tokens: LIST,
        input_bytes_max: 4 * 1024,
        memory: (32 << 20, 4_096),
    },
    Target {
        name: "names",
        about: "URIs, names of files in apt's directories, and patterns of what is private, a line each",
        start: |_| Box::new(|input: &[u8]| names(input)),
        seeds: || {
            vec![b"https://user:pa%20ss@[2001:db8::1]:8443/debian/pool/a_1%3a2_all.deb\norigin=Deb*,url=https://*.example/?,package=a*b*\n1:2.0~rc1+b1_x".to_vec()]
        },
        tokens: &[
            "http://",
            "https:",
            "//",
            "@",
            ":",
            "[",
            "]",
            "%2f",
            "%",
            "/",
            "..",
            "*",
            "?",
            "origin=",
            "suite=",
            "component=",
            "url=",
            "package=",
            ",",
            "\n",
        ],
        input_bytes_max: 2 * 1024,
        memory: (1 << 20, 512),
    },
];

const OPTIONS: &[&str] = &[
    "\n",
    " ",
    "::",
    "%20",
    "%",
    "APT::Architecture",
    "APT::Architectures::",
    "amd64",
    "Acquire::http::Proxy",
    "http://proxy:3128",
    "DIRECT",
    "Acquire::CompressionTypes::Order::",
    "Acquire::IndexTargets::deb::Packages::MetaKey",
    "$(COMPONENT)/binary-$(ARCHITECTURE)/Packages",
    "Dir",
    "Dir::State::lists",
    "RootDir",
    "/",
    "../",
    "Acquire::https::h::SslCert",
    "Acquire::URIEncode",
    "Acquire::GzipIndexes",
    "true",
];

const LIST: &[&str] = &[
    "\n",
    "\n\n",
    " ",
    "\t",
    "#",
    "deb ",
    "deb-src ",
    "[",
    "]",
    "=",
    "arch=",
    "arch+=",
    "arch-=",
    "by-hash=",
    "http://deb.debian.org/debian ",
    "https://u:p@h/ ",
    "file:/",
    "cdrom:[Debian]/",
    "mirror+http://",
    "./",
    "/",
    "main",
    "contrib",
    "\"",
    "%20",
    "$(ARCH)",
    "Types: ",
    "URIs: ",
    "Suites: ",
    "Components: ",
    "Signed-By: ",
    "Enabled: no",
    "Architectures: ",
    "Architectures-Add: ",
    "By-Hash: ",
    "X-Repolib-Name: ",
];

/// A file of sources beside which the options are tried.
struct Dumps {
    sources: tempfile::NamedTempFile,
}

impl Dumps {
    fn new() -> Self {
        let sources = tempfile::NamedTempFile::new().expect("a file");
        let text = "deb http://deb.debian.org/debian bookworm main contrib\ndeb-src https://h/x ./\n";
        std::fs::write(sources.path(), text).expect("it can be written");
        Self { sources }
    }
}

impl crate::driver::Subject for Dumps {
    fn run(&mut self, input: &[u8]) -> u64 {
        let text = String::from_utf8_lossy(input);
        // No file of this machine but the one here is read, whatever the options name.
        let kept: String =
            text.lines().filter(|line| !line.to_ascii_lowercase().contains("netrc")).map(|line| format!("{line}\n")).collect();
        let options = Options::parse(&kept);
        let config = AptConfig::of_options(options, &[self.sources.path().to_owned()], Environment::default());
        let targets = config.targets();
        for target in &targets {
            assert!(!target.name.contains('/') && !target.name.is_empty(), "no name of a file: {:?}", target.name);
            assert!(!target.inrelease_name.contains('/') && !target.release_name.contains('/'));
        }
        let proxies: Vec<_> = config.sources().sources.iter().map(|source| config.proxy(&source.uri).is_some()).collect();
        let url = config.sources().sources.first().map(|source| config.file_url(&source.uri, "pool/a b+c~d_1.deb"));
        assert!(url.is_none_or(|url| url.starts_with("http://deb.debian.org/debian/")), "another place than the source's");
        let _paths = (config.lists_directory(), config.archives_directory(), config.gzip_indexes());
        behaviour((some(targets.len()), proxies, config.forms().len(), some(config.architectures().len()), config.download_forms().len()))
    }
}

fn sources(input: &[u8], parse: fn(&mut Sources, &str, &Path, &str)) -> u64 {
    let text = String::from_utf8_lossy(input);
    let mut sources = Sources::default();
    parse(&mut sources, &text, Path::new("sources.list"), "amd64");
    for source in &sources.sources {
        assert!(source.uri.is_http(), "what the mirror client cannot fetch: {}", source.uri);
        assert!(source.uri.path.ends_with('/'), "{}", source.uri);
        assert_eq!(source.is_flat(), source.components.is_empty(), "a suite without components, or a path with some");
        let name = list_name(&format!("{}InRelease", source.release_directory()));
        assert!(!name.contains('/'), "no name of a file: {name}");
    }
    for problem in sources.problems.iter().chain(&sources.left_out) {
        assert!(!problem.contains('\n') || text.contains('\n'), "{problem:?}");
    }
    let kinds: std::collections::BTreeSet<_> =
        sources.problems.iter().map(|problem| kind_of(problem.rsplit(": ").next().unwrap_or_default())).collect();
    behaviour((some(sources.sources.len()), some(sources.left_out.len()), kinds))
}

fn names(input: &[u8]) -> u64 {
    let text = String::from_utf8_lossy(input);
    let mut lines = text.split('\n');
    let (uri, pattern, other) = (lines.next().unwrap_or_default(), lines.next().unwrap_or_default(), lines.next().unwrap_or_default());
    let parsed = Uri::parse(uri);
    assert!(!list_name(uri).contains('/'), "no name of a file");
    let (password, shown) = (&parsed.password, format!("{parsed} {parsed:?}"));
    let elsewhere = [&parsed.scheme, &parsed.host, &parsed.path].iter().any(|part| part.contains(password));
    assert!(password.len() < 8 || elsewhere || !shown.contains(password), "shows a password: {shown}");
    assert_eq!(unquote(&quote(other.as_bytes(), b"_:%")), other.as_bytes(), "quoted and not back");
    let mut name = String::new();
    archive_name(&mut name, other, pattern, uri, "pool/x.deb");
    assert!(name.ends_with(".deb") && name.matches('_').count() == 2, "no name that comes apart again: {name}");
    let fits = pattern.parse::<Pattern>().map(|pattern| {
        let place =
            Place { repository: Some(&parsed), suites: [other, "", uri], origins: [other, uri], component: other, packages: [other, uri] };
        pattern.fits(&place)
    });
    behaviour((
        parsed.is_http(),
        parsed.has_credentials(),
        parsed.port.is_some(),
        fits.map_err(|err| kind_of(err.rsplit(':').next().unwrap_or_default())),
    ))
}
