//! Random lives of the records against a `BTreeMap`: whatever is done in whatever order, both say the same, also after a
//! reopening. The model moves trees by comparing path components, the store by ranges of keys.
#![allow(clippy::unwrap_used, reason = "tests")]

use super::*;
use crate::digest::Sums;
use crate::role::Role;
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::LazyLock;

#[derive(Clone, Debug)]
enum Op {
    Begin(Role, &'static str, u64),
    Record(Role, &'static str, u8),
    SetState(Role, &'static str, State),
    SetSharing(Role, &'static str, Sharing),
    SetStamp(Role, &'static str, i64),
    Used(Role, &'static str),
    Rename(Role, &'static str, &'static str),
    Exchange(Role, &'static str, &'static str),
    Remove(Role, &'static str),
    Flush,
    Reopen,
}

/// Names that a comparison of mere prefixes would mix up: `.` sorts before `/`, `0` after it, and `%`, `_` are wild in LIKE.
const PATHS: &[&str] = &["a", "a.deb", "a/b", "a/b/c", "a/b0", "a0", "ab", "a%", "a_", "a/_", "partial", "partial/a", "é/ü", "é"];

fn op() -> impl Strategy<Value = Op> {
    let role = prop_oneof![Just(Role::Archives), Just(Role::Lists)];
    let path = prop::sample::select(PATHS);
    let at = (role, path.clone());
    prop_oneof![
        2 => (at.clone(), any::<u64>()).prop_map(|((role, path), inode)| Op::Begin(role, path, inode)),
        8 => (at.clone(), 0..4u8).prop_map(|((role, path), seed)| Op::Record(role, path, seed)),
        1 => (at.clone(), prop::sample::select(State::ALL)).prop_map(|((role, path), state)| Op::SetState(role, path, state)),
        1 => (at.clone(), prop::sample::select(Sharing::ALL)).prop_map(|((role, path), sharing)| Op::SetSharing(role, path, sharing)),
        1 => (at.clone(), any::<i64>()).prop_map(|((role, path), mtime)| Op::SetStamp(role, path, mtime)),
        2 => at.clone().prop_map(|(role, path)| Op::Used(role, path)),
        4 => (at.clone(), path.clone()).prop_map(|((role, from), to)| Op::Rename(role, from, to)),
        4 => (at.clone(), path).prop_map(|((role, a), b)| Op::Exchange(role, a, b)),
        2 => at.prop_map(|(role, path)| Op::Remove(role, path)),
        1 => Just(Op::Flush),
        1 => Just(Op::Reopen),
    ]
}

type Model = BTreeMap<(Role, Vec<u8>), FileRecord>;

/// What of `path` remains below `tree`: nothing for itself, `None` if it lies elsewhere.
fn rest<'path>(path: &'path [u8], tree: &[u8]) -> Option<&'path [u8]> {
    let rest = path.strip_prefix(tree)?;
    (rest.is_empty() || rest[0] == b'/').then_some(rest)
}

fn nested(a: &str, b: &str) -> bool {
    rest(a.as_bytes(), b.as_bytes()).is_some() || rest(b.as_bytes(), a.as_bytes()).is_some()
}

fn cut(model: &mut Model, role: Role, tree: &str) -> Vec<(Vec<u8>, FileRecord)> {
    let keys: Vec<_> = model.keys().filter(|(of, path)| *of == role && rest(path, tree.as_bytes()).is_some()).cloned().collect();
    keys.into_iter().map(|key| (rest(&key.1, tree.as_bytes()).unwrap().to_vec(), model.remove(&key).unwrap())).collect()
}

fn paste(model: &mut Model, role: Role, tree: &str, cut: Vec<(Vec<u8>, FileRecord)>) {
    model.extend(cut.into_iter().map(|(rest, record)| ((role, [tree.as_bytes(), &rest].concat()), record)));
}

/// The contents that files have, the last of more than one block.
static SUMS: LazyLock<[Sums; 4]> = LazyLock::new(|| [0, 1, 2, 70_000].map(|len| Sums::of(&vec![7; len])));

fn sums(seed: u8) -> &'static Sums {
    &SUMS[usize::from(seed)]
}

/// A clock that the operations move.
static NOW: std::sync::atomic::AtomicI64 = std::sync::atomic::AtomicI64::new(0);

fn now() -> i64 {
    NOW.load(std::sync::atomic::Ordering::Relaxed)
}

fn step(store: &Store, model: &mut Model, uses: &mut BTreeMap<(Role, Vec<u8>), i64>, op: &Op) {
    let key = |role: Role, path: &str| (role, path.as_bytes().to_vec());
    let at = now();
    match *op {
        Op::Begin(role, path, inode) => {
            store.begin_writing(role, path.as_bytes(), inode).unwrap();
            model.insert(
                key(role, path),
                FileRecord {
                    state: State::Writing,
                    digest: None,
                    stamp: Stamp { size: 0, mtime_ns: 0, inode },
                    sharing: Sharing::LocalOnly,
                    provenance: Provenance::WrittenHere,
                    verified_at: 0,
                    used_at: at,
                },
            );
        }
        Op::Record(role, path, seed) => {
            let sums = sums(seed);
            let stamp = Stamp { size: sums.size, mtime_ns: i64::from(seed), inode: u64::from(seed) };
            store.record(role, path.as_bytes(), stamp, sums, Sharing::Announced, Provenance::Peer).unwrap();
            let used_at = model.get(&key(role, path)).map_or(at, |record| record.used_at);
            model.insert(
                key(role, path),
                FileRecord {
                    state: State::Clean,
                    digest: Some(sums.digest),
                    stamp,
                    sharing: Sharing::Announced,
                    provenance: Provenance::Peer,
                    verified_at: at,
                    used_at,
                },
            );
        }
        Op::SetState(role, path, State::Writing) => {
            let known = store.set_state(role, path.as_bytes(), State::Writing).unwrap();
            let before = model.get(&key(role, path)).cloned();
            assert_eq!(known, before.is_some());
            if let Some(before) = before {
                step(store, model, uses, &Op::Begin(role, path, before.stamp.inode));
            }
        }
        Op::SetState(role, path, state) => {
            let known = store.set_state(role, path.as_bytes(), state).unwrap();
            let record = model.get_mut(&key(role, path)).filter(|record| record.digest.is_some());
            assert_eq!(known, record.is_some());
            record.into_iter().for_each(|record| record.state = state);
        }
        Op::SetSharing(role, path, sharing) => {
            let known = store.set_sharing(role, path.as_bytes(), sharing).unwrap();
            let record = model.get_mut(&key(role, path));
            assert_eq!(known, record.is_some());
            record.into_iter().for_each(|record| record.sharing = sharing);
        }
        Op::SetStamp(role, path, mtime_ns) => {
            let stamp = Stamp { size: 3, mtime_ns, inode: 4 };
            let known = store.set_stamp(role, path.as_bytes(), stamp).unwrap();
            let record = model.get_mut(&key(role, path)).filter(|record| record.state != State::Writing);
            assert_eq!(known, record.is_some());
            record.into_iter().for_each(|record| record.stamp = stamp);
        }
        Op::Used(role, path) => {
            store.used(role, path.as_bytes()).unwrap();
            uses.insert(key(role, path), at);
        }
        Op::Rename(role, from, to) if !nested(from, to) => {
            flush(store, model, uses);
            store.renamed(role, from.as_bytes(), to.as_bytes()).unwrap();
            cut(model, role, to);
            let tree = cut(model, role, from);
            paste(model, role, to, tree);
        }
        Op::Exchange(role, a, b) if !nested(a, b) => {
            flush(store, model, uses);
            store.exchanged(role, a.as_bytes(), b.as_bytes()).unwrap();
            let (of_a, of_b) = (cut(model, role, a), cut(model, role, b));
            paste(model, role, b, of_a);
            paste(model, role, a, of_b);
        }
        Op::Rename(role, a, b) | Op::Exchange(role, a, b) => {
            // The kernel refuses to move a directory into itself; onto itself is nothing.
            if a == b {
                store.renamed(role, a.as_bytes(), b.as_bytes()).unwrap();
                store.exchanged(role, a.as_bytes(), b.as_bytes()).unwrap();
            }
        }
        Op::Remove(role, path) => {
            store.removed(role, path.as_bytes()).unwrap();
            cut(model, role, path);
        }
        Op::Flush | Op::Reopen => flush(store, model, uses),
    }
}

fn flush(store: &Store, model: &mut Model, uses: &mut BTreeMap<(Role, Vec<u8>), i64>) {
    store.flush().unwrap();
    for (key, at) in std::mem::take(uses) {
        model.entry(key).and_modify(|record| record.used_at = at);
    }
}

fn compare(store: &Store, model: &Model) {
    let mut found = Model::new();
    for role in [Role::Archives, Role::Lists] {
        store.each_file(role, |path, record| assert!(found.insert((role, path.to_vec()), record.clone()).is_none())).unwrap();
        let mut counts = Counts::default();
        for record in model.iter().filter(|((of, _), _)| *of == role).map(|(_, record)| record) {
            counts.files += 1;
            counts.bytes += record.stamp.size;
            match record.state {
                State::Writing => {}
                State::Damaged => counts.damaged += 1,
                State::Clean => match record.sharing {
                    Sharing::Announced => counts.announced += 1,
                    Sharing::Available => counts.available += 1,
                    Sharing::LocalOnly => counts.local_only += 1,
                    Sharing::Withheld => counts.withheld += 1,
                },
            }
        }
        assert_eq!(store.counts(role).unwrap(), counts);
    }
    assert_eq!(&found, model);
    let known: BTreeSet<Digest> = model.values().filter_map(|record| record.digest).collect();
    for seed in 0..4 {
        let want = sums(seed);
        let got = store.sums(&want.digest).unwrap();
        assert_eq!(got.as_deref(), known.contains(&want.digest).then_some(want), "sums live as long as a file that has them");
        let mut places: Vec<_> = model
            .iter()
            .filter(|(_, record)| record.digest == Some(want.digest) && record.state == State::Clean)
            .map(|(at, _)| at.clone())
            .collect();
        places.sort();
        assert_eq!(store.places(&want.digest).unwrap(), places);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, ..ProptestConfig::default() })]

    /// A record that stays behind, or that goes to a neighbour, would give a reader another file's checksums.
    #[test]
    fn records_follow_the_files(ops in prop::collection::vec(op(), 1..60)) {
        let dir = tempfile::tempdir().unwrap();
        let open = || Store::open_with_clock(dir.path(), now).unwrap();
        let mut store = Some(open());
        let (mut model, mut uses) = (Model::new(), BTreeMap::new());
        for op in &ops {
            NOW.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            step(store.as_ref().unwrap(), &mut model, &mut uses, op);
            if matches!(op, Op::Reopen) {
                drop(store.take());
                store = Some(open());
            }
            compare(store.as_ref().unwrap(), &model);
        }
    }
}
