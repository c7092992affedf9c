//! What apt may ask for in `lists/partial/` once it has a suite's Release: the index files that the Release names and that
//! a target of apt's configuration wants, the pdiff Index beside them, and the patches that such an Index names.
//!
//! Forward only: from what `Acquire::IndexTargets` says to paths in the Release, from these to URIs and names. A target's
//! language is the one thing that is not filled in beforehand, since apt takes it from the environment of whoever calls it:
//! every language that the Release has fits.
//!
//! Nothing here is in the database: it is made from the Release files, which are small and on the disk.

use super::apt_config::AptConfig;
use super::forms::Form;
use super::names::{self, NAME_BYTES_MAX};
use super::pdiff::PdiffIndex;
use super::private::{Pattern, Place};
use super::release::Release;
use super::sources::{self, Source, SourceKind};
use super::{Entry, MirrorUrl};
use crate::Digest;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;

/// Index files of one suite that are kept track of. Debian's suites have some 300 that a machine may ask for.
const INDEXES_MAX: usize = 16_384;

/// Patches of one suite that are kept track of.
const PATCHES_MAX: usize = 65_536;

/// How a target's language stands in its path.
const LANGUAGE: &str = "$(LANGUAGE)";

/// A pdiff Index, as it is called after the path of its list.
const DIFF_INDEX: &str = ".diff/Index";

/// One suite of the sources: where its indexes lie, and which of them apt wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Suite {
    pub(super) inrelease_name: String,
    pub(super) release_name: String,
    /// URI of the Release's directory as apt knows it, for names.
    directory: String,
    /// The same as a mirror is asked for it: encoded, with credentials.
    url: String,
    /// What apt encodes in what follows.
    bad: String,
    proxy: Option<String>,
    repository: names::Uri,
    /// As the source names it.
    name: String,
    needs_credentials: bool,
    private: Vec<Pattern>,
    targets: Vec<Target>,
}

/// One index that apt wants.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Target {
    /// Plain path below the Release's directory. [`LANGUAGE`] may stand in it.
    path: String,
    component: String,
    /// In the order in which apt asks for them.
    forms: Vec<Form>,
    pdiffs: bool,
    by_hash: ByHash,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ByHash {
    No,
    /// If the Release offers it.
    Yes,
    Force,
}

impl Target {
    fn fits(&self, path: &str) -> bool {
        match self.path.split_once(LANGUAGE) {
            None => self.path == path,
            Some((before, after)) => {
                let language = path.strip_prefix(before).and_then(|rest| rest.strip_suffix(after));
                language.is_some_and(|language| !language.is_empty() && !language.contains('/'))
            }
        }
    }
}

/// The suites of the sources, each once, in the order of the sources.
pub(super) fn suites(apt: &AptConfig) -> Vec<Arc<Suite>> {
    let mut suites: Vec<Suite> = Vec::new();
    let mut at: HashMap<String, usize> = HashMap::new();
    for source in &apt.sources().sources {
        let directory = source.release_directory();
        let inrelease_name = names::list_name(&format!("{directory}InRelease"));
        let index = *at.entry(inrelease_name.clone()).or_insert_with(|| {
            let below = directory.strip_prefix(&source.repository()).unwrap_or_default();
            suites.push(Suite {
                release_name: names::list_name(&format!("{directory}Release")),
                url: apt.file_url(&source.uri, below),
                bad: apt.options().get("Acquire::URIEncode").unwrap_or(names::URI_BAD).to_owned(),
                proxy: apt.proxy(&source.uri),
                repository: source.uri.clone(),
                name: source.suite.clone(),
                needs_credentials: apt.needs_credentials(&source.uri),
                private: apt.private().to_owned(),
                targets: Vec::new(),
                inrelease_name,
                directory,
            });
            suites.len() - 1
        });
        for target in targets(apt, source) {
            if !suites[index].targets.contains(&target) {
                suites[index].targets.push(target);
            }
        }
    }
    suites.into_iter().map(Arc::new).collect()
}

/// What apt wants of one source.
fn targets(apt: &AptConfig, source: &Source) -> Vec<Target> {
    let options = apt.options();
    let tree = match source.kind {
        SourceKind::Binary => "Acquire::IndexTargets::deb",
        SourceKind::Source => "Acquire::IndexTargets::deb-src",
    };
    let native = options.get("APT::Architecture").unwrap_or_default().to_owned();
    let default_forms = apt.download_forms();
    let mut targets = Vec::new();
    for name in options.children(tree) {
        let option = |key: &str| options.get(&format!("{tree}::{name}::{key}"));
        let truth = |key: &str, default: bool| option(key).map_or(default, |value| sources::truth(value, default));
        let identifier = option("Identifier").unwrap_or(name).to_ascii_lowercase();
        if !is_enabled(source, name, &identifier, truth("DefaultEnabled", true)) {
            continue;
        }
        let Some(pattern) = option(if source.is_flat() { "flatMetaKey" } else { "MetaKey" }) else { continue };
        let pdiffs = source.options.get("pdiffs").map_or(options.truth("Acquire::PDiffs", true), |value| sources::truth(value, true));
        let by_hash = option("By-Hash").or_else(|| source.options.get("by-hash").map(String::as_str));
        let by_hash = match by_hash.or_else(|| options.get("Acquire::By-Hash")) {
            Some("force") => ByHash::Force,
            Some(value) if !sources::truth(value, true) => ByHash::No,
            _ => ByHash::Yes,
        };
        let forms = match option("CompressionTypes") {
            Some(words) => words.split_ascii_whitespace().filter_map(Form::of_type).collect(),
            None => default_forms.clone(),
        };
        let components: &[String] = if source.components.is_empty() { &[String::new()] } else { &source.components };
        for component in components {
            for path in filled(pattern, component, &apt.architectures_of(source), &native) {
                let (component, forms, pdiffs) = (component.clone(), forms.clone(), truth("PDiffs", pdiffs));
                targets.push(Target { path, component, forms, pdiffs, by_hash });
            }
        }
    }
    targets
}

/// A pattern with everything filled in but the language.
fn filled(pattern: &str, component: &str, architectures: &[String], native: &str) -> Vec<String> {
    let path = pattern.replace("$(COMPONENT)", component);
    let mut paths = Vec::new();
    let mut add = |path: String| {
        if !paths.contains(&path) {
            paths.push(path);
        }
    };
    let of_native = [native, "all"];
    if path.contains("$(NATIVE_ARCHITECTURE)") {
        of_native.iter().for_each(|architecture| add(path.replace("$(NATIVE_ARCHITECTURE)", architecture)));
    } else if path.contains("$(ARCHITECTURE)") {
        architectures.iter().for_each(|architecture| add(path.replace("$(ARCHITECTURE)", architecture)));
    } else {
        add(path);
    }
    paths
}

/// Whether a source wants a target: by its `target` options, or by one named like the target.
fn is_enabled(source: &Source, name: &str, identifier: &str, default: bool) -> bool {
    let is_in = |option: &str| {
        let listed = source.options.get(option)?;
        Some(listed.split(',').any(|word| word.eq_ignore_ascii_case(name)))
    };
    let mut enabled = is_in("target").unwrap_or(default);
    enabled |= is_in("target+").unwrap_or(false);
    enabled &= !is_in("target-").unwrap_or(false);
    source.options.get(identifier).map_or(enabled, |value| sources::truth(value, enabled))
}

/// What a file is to apt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum What {
    /// The packed form that apt asks for first.
    First,
    /// Another packed form, or the only one where it is plain.
    Other,
    /// A pdiff Index; the list that it is for.
    DiffIndex(usize),
    /// A packed patch.
    Patch,
}

#[derive(Clone, Debug)]
struct Named {
    /// Below the Release's directory.
    path: String,
    /// In `lists/partial/`.
    name: String,
    digest: Digest,
    size: u64,
    what: What,
    by_hash: bool,
    private: bool,
}

/// One index in all its forms.
#[derive(Clone, Debug)]
struct List {
    /// Path of the plain form.
    path: String,
    /// Name of the plain form.
    name: String,
    /// What the Release says of the plain form.
    plain: Option<Digest>,
    /// Whether the plain form has no bytes: then apt fetches none.
    is_empty: bool,
    /// Into [`Indexes::files`].
    first: Option<usize>,
    diff_index: Option<usize>,
    pdiffs: bool,
    /// Whether it never leaves this machine, nor its patches.
    private: bool,
}

/// The files that one Release names and apt may ask for.
#[derive(Clone, Debug)]
pub(super) struct Indexes {
    suite: Arc<Suite>,
    date: i64,
    files: Vec<Named>,
    by_name: HashMap<String, usize>,
    by_digest: HashMap<Digest, usize>,
    lists: Vec<List>,
    by_list: HashMap<String, usize>,
    patches: usize,
}

impl Indexes {
    pub(super) fn new(suite: &Arc<Suite>, release: &Release) -> Self {
        let mut indexes = Self {
            suite: Arc::clone(suite),
            date: release.date,
            files: Vec::new(),
            by_name: HashMap::new(),
            by_digest: HashMap::new(),
            lists: Vec::new(),
            by_list: HashMap::new(),
            patches: 0,
        };
        let mut seen = HashSet::new();
        for file in &release.indexes {
            let plain = plain_path(&file.path);
            if !seen.insert(plain) {
                continue;
            }
            if indexes.files.len() >= INDEXES_MAX {
                tracing::warn!("{} names more than {INDEXES_MAX} indexes; the rest is left to apt", suite.inrelease_name);
                break;
            }
            if let Some(target) = suite.targets.iter().find(|target| target.fits(plain)) {
                indexes.add_list(plain, target, release);
            }
        }
        indexes
    }

    fn add_list(&mut self, path: &str, target: &Target, release: &Release) {
        let by_hash = match target.by_hash {
            ByHash::No => false,
            ByHash::Yes => release.by_hash,
            ByHash::Force => true,
        };
        let plain = release.index(path);
        let private = self.suite.is_private(release, &target.component);
        let mut list = List {
            path: path.to_owned(),
            name: self.suite.list_name(path),
            plain: plain.map(|file| file.digest),
            is_empty: plain.is_some_and(|file| file.size == 0),
            first: None,
            diff_index: None,
            pdiffs: target.pdiffs,
            private,
        };
        let mut forms = target.forms.iter().filter_map(|form| Some((form, release.index(&format!("{path}{}", form.suffix()))?))).peekable();
        // Never the plain form: apt asks for it by a name that it also gives to what it has unpacked.
        let packed_first = forms.peek().is_some_and(|(form, _)| **form != Form::Plain);
        let mut packed = 0;
        for (form, file) in forms.filter(|(form, _)| **form != Form::Plain) {
            let what = if packed_first && packed == 0 { What::First } else { What::Other };
            let name = format!("{}{}", list.name, form.suffix());
            let at = self.add(Named { path: file.path.clone(), name, digest: file.digest, size: file.size, what, by_hash, private });
            if what == What::First {
                list.first = at;
            }
            packed += 1;
        }
        if packed == 0
            && let Some(file) = plain
        {
            let (name, what) = (list.name.clone(), What::Other);
            self.add(Named { path: file.path.clone(), name, digest: file.digest, size: file.size, what, by_hash, private });
        }
        let index = self.lists.len();
        if let Some(file) = release.index(&format!("{path}{DIFF_INDEX}")) {
            let (name, what) = (self.suite.list_name(&file.path), What::DiffIndex(index));
            list.diff_index =
                self.add(Named { path: file.path.clone(), name, digest: file.digest, size: file.size, what, by_hash, private });
        }
        self.by_list.insert(list.name.clone(), index);
        self.lists.push(list);
    }

    /// `None` if its name is too long for a file.
    fn add(&mut self, file: Named) -> Option<usize> {
        if file.name.len() > NAME_BYTES_MAX {
            return None;
        }
        let at = self.files.len();
        if matches!(file.what, What::First | What::DiffIndex(_) | What::Patch) {
            self.by_name.insert(file.name.clone(), at);
        }
        self.by_digest.entry(file.digest).or_insert(at);
        self.files.push(file);
        Some(at)
    }

    /// Takes what a pdiff Index says, whose digest the Release names and which is called `name` in `lists/partial/`.
    pub(super) fn add_patches(&mut self, name: &str, index: &PdiffIndex) {
        let Some(list) = self.diff_index(name) else { return };
        let private = self.lists[list].private;
        let list = self.lists[list].path.clone();
        for patch in &index.patches {
            let Some(download) = &patch.download else { continue };
            if self.patches >= PATCHES_MAX {
                tracing::warn!("{}: more than {PATCHES_MAX} patches; the rest is left to apt", self.suite.inrelease_name);
                return;
            }
            let path = format!("{list}.diff/{}.gz", patch.id);
            let name = self.suite.list_name(&path);
            if !self.by_name.contains_key(&name) {
                let (digest, size) = (download.digest, download.size);
                // Where patches lie by their digest too is not said anywhere.
                let Some(at) = self.add(Named { path, name, digest, size, what: What::Patch, by_hash: false, private }) else { continue };
                self.patches += 1;
                if index.merged {
                    // Here apt calls the packed patch by the name of what it will be when it is unpacked or packed again.
                    let stem = self.suite.list_name(&format!("{list}.diff/{}", patch.id));
                    for form in Form::ALL {
                        self.by_name.entry(format!("{stem}{}", form.suffix())).or_insert(at);
                    }
                }
            }
        }
    }

    /// The list whose pdiff Index has that name.
    fn diff_index(&self, name: &str) -> Option<usize> {
        match self.files[*self.by_name.get(name)?].what {
            What::DiffIndex(list) => Some(list),
            What::First | What::Other | What::Patch => None,
        }
    }

    /// The digest that the Release wants of a pdiff Index.
    pub(super) fn diff_index_digest(&self, name: &str) -> Option<Digest> {
        self.diff_index(name)?;
        Some(self.files[*self.by_name.get(name)?].digest)
    }

    /// The names of all pdiff Indexes.
    pub(super) fn diff_index_names(&self) -> impl Iterator<Item = &str> {
        self.lists.iter().filter_map(|list| Some(self.files[list.diff_index?].name.as_str()))
    }

    /// The patches that lead from the version of a list that `before` names to this one's.
    pub(super) fn path_from(&self, before: &Self, name: &str, index: &PdiffIndex) -> Vec<Entry> {
        let plain = self.diff_index(name).and_then(|list| before.plain(&self.lists[list].name));
        let Some(plain) = plain else { return Vec::new() };
        let named = |id: &str| {
            let list = &self.lists[self.diff_index(name)?];
            self.entry(self.suite.list_name(&format!("{}.diff/{id}.gz", list.path)).as_bytes())
        };
        index.path_from(&plain).iter().filter_map(|patch| named(&patch.id)).collect()
    }

    fn plain(&self, list_name: &str) -> Option<Digest> {
        self.lists[*self.by_list.get(list_name)?].plain
    }

    pub(super) fn is_of(&self, suite: &Suite) -> bool {
        *self.suite == *suite
    }

    /// What should be under this name in `lists/partial/`.
    pub(super) fn entry(&self, name: &[u8]) -> Option<Entry> {
        Some(self.made(*self.by_name.get(std::str::from_utf8(name).ok()?)?))
    }

    pub(super) fn of_digest(&self, digest: &Digest) -> Option<Entry> {
        Some(self.made(*self.by_digest.get(digest)?))
    }

    fn made(&self, at: usize) -> Entry {
        let Named { path, name, digest, size, what, by_hash, private } = &self.files[at];
        let url = |path: &str, immutable: bool| {
            let mut url = self.suite.url.clone();
            names::quote_onto(&mut url, path.as_bytes(), self.suite.bad.as_bytes());
            MirrorUrl { url, proxy: self.suite.proxy.clone(), immutable, private: *private }
        };
        let directory = path.rsplit_once('/').map_or(String::new(), |(directory, _)| format!("{directory}/"));
        let by_hash = by_hash.then(|| url(&format!("{directory}by-hash/SHA256/{digest}"), true));
        Entry {
            name: name.clone(),
            digest: *digest,
            size: *size,
            date: self.date,
            // A patch is named after what it leads from and to.
            urls: by_hash.into_iter().chain([url(path, *what == What::Patch)]).collect(),
            package: String::new(),
            version: String::new(),
            private: *private,
        }
    }

    /// What apt will ask for first of the lists that are in `lists/` in another version than this Release's. `before` is the
    /// Release that they belong to, `is_here` says whether a list is there in any form.
    pub(super) fn expected(&self, before: Option<&Self>, is_here: impl Fn(&str) -> bool) -> Vec<Entry> {
        let mut expected = Vec::new();
        for list in &self.lists {
            let old = before.and_then(|before| before.by_list.get(&list.name).map(|at| (before, &before.lists[*at])));
            let same = old.is_some_and(|(before, old)| match (list.plain, old.plain) {
                (Some(new), Some(old)) => new == old,
                _ => list.first.map(|at| self.files[at].digest) == old.first.map(|at| before.files[at].digest),
            });
            if !same && !list.is_empty && is_here(&list.name) {
                expected.extend(list.diff_index.filter(|_| list.pdiffs).or(list.first).map(|at| self.made(at)));
            }
        }
        expected
    }

    /// The list that an index in any form is of, by its name in `lists/`, and what apt will ask for if no form of it is there.
    pub(super) fn missing(&self, name: &[u8]) -> Option<(String, Entry)> {
        let name = std::str::from_utf8(name).ok()?;
        let list = &self.lists[*self.by_list.get(plain_path(name))?];
        list.first.filter(|_| !list.is_empty).map(|at| (list.name.clone(), self.made(at)))
    }
}

impl Suite {
    /// Whether what a Release of it names in a component never leaves this machine.
    fn is_private(&self, release: &Release, component: &str) -> bool {
        let suites = [self.name.as_str(), &release.suite, &release.codename];
        let origins = [release.origin.as_str(), &release.label];
        let place = Place { repository: Some(&self.repository), suites, origins, component, ..Place::default() };
        self.needs_credentials || self.private.iter().any(|pattern| pattern.fits(&place))
    }

    /// The name in `lists/` of a path below the Release's directory.
    fn list_name(&self, path: &str) -> String {
        names::list_name(&format!("{}{path}", self.directory))
    }
}

/// A path, or a name, without the ending of its form; of a pdiff Index, the path of its list.
fn plain_path(path: &str) -> &str {
    if let Some(list) = path.strip_suffix(DIFF_INDEX) {
        return list;
    }
    let form = Form::ALL.into_iter().filter(|form| *form != Form::Plain);
    form.filter_map(|form| path.strip_suffix(form.suffix())).next().unwrap_or(path)
}
