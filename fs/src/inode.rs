//! The nodes that the kernel knows, and the names under which it knows them.
//!
//! A node stands for one inode, not for one name: hard links share it, and it lives as long as the kernel holds a lookup
//! count on it or a child of it is known. Its number is the backing inode's where that is possible, so that `ls -i` and
//! `tar` see stable numbers; ghosts and inodes of another device get one above [`OWN_NUMBERS`].
//!
//! Everything here is behind one lock, which is a leaf: no other lock is taken and no system call made under it.

use crate::backing::{Backing, Key};
use crate::content::Content;
use crate::errno::FsError;
use crate::ghost::Ghost;
use poolfs_core::sync::{Mutex, MutexGuard};
use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt as _;
use std::sync::{Arc, OnceLock};

/// The root's number, as FUSE wants it.
pub(crate) const ROOT: u64 = 1;

/// Numbers from here on are given by the table, below they are the backing inodes'.
const OWN_NUMBERS: u64 = 1 << 62;

/// One inode, or one ghost that may become one.
#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) id: u64,
    /// Set at once for a real file; for a ghost when its bytes are in place. Never changes after.
    backing: OnceLock<Backing>,
    /// What the name stood for before there was a backing inode.
    pub(crate) ghost: Option<Arc<Ghost>>,
    /// What is known of the bytes; only used for regular files.
    pub(crate) content: Content,
    /// The change time, seconds and nanoseconds, at which the backing inode was seen to have no extended attributes.
    pub(crate) bare_since: Mutex<Option<(i64, i64)>>,
}

impl Node {
    fn new(id: u64, backing: Option<Backing>, ghost: Option<Arc<Ghost>>) -> Arc<Self> {
        let cell = OnceLock::new();
        if let Some(backing) = backing {
            cell.set(backing).expect("a new cell is empty");
        }
        Arc::new(Self { id, backing: cell, ghost, content: Content::default(), bare_since: Mutex::new(None) })
    }

    /// The backing inode, unless the node is still a ghost.
    pub(crate) fn backing(&self) -> Option<&Backing> {
        self.backing.get()
    }

    /// The backing inode, or ENOENT for what only exists in the catalog.
    pub(crate) fn real(&self) -> Result<&Backing, FsError> {
        self.backing.get().ok_or(FsError::Backing(rustix::io::Errno::NOENT))
    }
}

/// One name of a node.
#[derive(Clone, Debug)]
pub(crate) struct Link {
    pub(crate) parent: Arc<Node>,
    pub(crate) name: OsString,
    /// Below the mount, without a leading slash.
    pub(crate) path: Vec<u8>,
}

#[derive(Debug)]
struct Entry {
    node: Arc<Node>,
    /// How often the kernel was told of it and has not forgotten it.
    lookups: u64,
    /// How many names of known nodes lie in it.
    children: u64,
    /// Its names: parent's number and name. A directory has one.
    names: Vec<(u64, OsString)>,
}

#[derive(Debug)]
struct Inner {
    entries: HashMap<u64, Entry>,
    by_key: HashMap<Key, u64>,
    ghosts: HashMap<(u64, OsString), u64>,
    next_own: u64,
    root_dev: u64,
}

/// All nodes of one mount.
#[derive(Debug)]
pub(crate) struct Table {
    root: Arc<Node>,
    inner: Mutex<Inner>,
}

impl Table {
    pub(crate) fn new(root: Backing) -> Self {
        let key = root.key;
        let node = Node::new(ROOT, Some(root), None);
        let entry = Entry { node: Arc::clone(&node), lookups: 1, children: 0, names: Vec::new() };
        let inner = Inner {
            entries: HashMap::from([(ROOT, entry)]),
            by_key: HashMap::from([(key, ROOT)]),
            ghosts: HashMap::new(),
            next_own: OWN_NUMBERS,
            root_dev: key.dev,
        };
        Self { root: node, inner: Mutex::new(inner) }
    }

    pub(crate) fn root(&self) -> &Arc<Node> {
        &self.root
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock()
    }

    /// The node with that number.
    pub(crate) fn get(&self, id: u64) -> Result<Arc<Node>, FsError> {
        if id == ROOT {
            return Ok(Arc::clone(&self.root));
        }
        self.lock().entries.get(&id).map(|entry| Arc::clone(&entry.node)).ok_or(FsError::NoNode(id))
    }

    /// The node of that inode, if the kernel knows it.
    pub(crate) fn by_key(&self, key: Key) -> Option<Arc<Node>> {
        let inner = self.lock();
        let id = inner.by_key.get(&key)?;
        inner.entries.get(id).map(|entry| Arc::clone(&entry.node))
    }

    /// As [`Self::by_key`], counting one lookup under the given name.
    pub(crate) fn look_up_key(&self, key: Key, parent: u64, name: &OsStr) -> Option<Arc<Node>> {
        let mut inner = self.lock();
        let id = *inner.by_key.get(&key)?;
        inner.count(id, 1);
        inner.add_name(id, parent, name);
        inner.end_ghost(id, parent, name);
        inner.entries.get(&id).map(|entry| Arc::clone(&entry.node))
    }

    /// The node of a pinned inode, made if it is new, counting one lookup under the given name.
    pub(crate) fn look_up(&self, backing: Backing, parent: u64, name: &OsStr) -> Arc<Node> {
        let mut inner = self.lock();
        let id = match inner.by_key.get(&backing.key) {
            Some(id) => *id,
            None => {
                let key = backing.key;
                let id = inner.number_for(key);
                inner.by_key.insert(key, id);
                let node = Node::new(id, Some(backing), None);
                inner.entries.insert(id, Entry { node, lookups: 0, children: 0, names: Vec::new() });
                id
            }
        };
        inner.count(id, 1);
        inner.add_name(id, parent, name);
        inner.end_ghost(id, parent, name);
        Arc::clone(&inner.entries.get(&id).expect("just found or made").node)
    }

    /// The ghost of that name, made if there is none, counting one lookup.
    pub(crate) fn look_up_ghost(&self, parent: u64, name: &OsStr, make: impl FnOnce() -> Ghost) -> Arc<Node> {
        let mut inner = self.lock();
        let place = (parent, name.to_os_string());
        let id = match inner.ghosts.get(&place) {
            Some(id) => *id,
            None => {
                let id = inner.own_number();
                inner.ghosts.insert(place, id);
                let node = Node::new(id, None, Some(Arc::new(make())));
                inner.entries.insert(id, Entry { node, lookups: 0, children: 0, names: Vec::new() });
                inner.add_name(id, parent, name);
                id
            }
        };
        inner.count(id, 1);
        Arc::clone(&inner.entries.get(&id).expect("just found or made").node)
    }

    /// The ghost of that name, if the kernel knows one.
    pub(crate) fn ghost(&self, parent: u64, name: &OsStr) -> Option<Arc<Node>> {
        let inner = self.lock();
        let id = inner.ghosts.get(&(parent, name.to_os_string()))?;
        inner.entries.get(id).map(|entry| Arc::clone(&entry.node))
    }

    /// Takes the name from a ghost: the next lookup of it makes another node. Who has this one open keeps it.
    pub(crate) fn drop_ghost_name(&self, parent: u64, name: &OsStr) {
        let dropped = {
            let mut inner = self.lock();
            match inner.ghosts.remove(&(parent, name.to_os_string())) {
                Some(id) => inner.remove_name(id, parent, name),
                None => Vec::new(),
            }
        };
        drop(dropped);
    }

    /// Gives a ghost its inode: from here on it is an ordinary node, under the number that the kernel knows. `false` if it
    /// has one already.
    ///
    /// Where a lookup has met the inode first, two nodes stand for it until the kernel forgets one: both read the same
    /// file, and each notices the other's writes by the stamp.
    pub(crate) fn embody(&self, node: &Node, backing: Backing) -> bool {
        let mut inner = self.lock();
        let key = backing.key;
        if node.backing.set(backing).is_err() {
            return false;
        }
        inner.ghosts.retain(|_, id| *id != node.id);
        if inner.entries.contains_key(&node.id) {
            inner.by_key.entry(key).or_insert(node.id);
        }
        true
    }

    /// Takes back `count` lookups; a node without any, and without known children, is dropped.
    pub(crate) fn forget(&self, id: u64, count: u64) {
        let dropped = {
            let mut inner = self.lock();
            if let Some(entry) = inner.entries.get_mut(&id) {
                entry.lookups = entry.lookups.saturating_sub(count);
            }
            inner.sweep(id)
        };
        // Their descriptors are closed here, outside the lock.
        drop(dropped);
    }

    /// Takes a name from the node of that inode, if it is known.
    pub(crate) fn unnamed(&self, key: Key, parent: u64, name: &OsStr) {
        let dropped = {
            let mut inner = self.lock();
            let Some(&id) = inner.by_key.get(&key) else { return };
            inner.remove_name(id, parent, name)
        };
        drop(dropped);
    }

    /// Moves the name of the node of that inode, if it is known.
    pub(crate) fn renamed(&self, key: Key, from: (u64, &OsStr), to: (u64, &OsStr)) {
        let dropped = {
            let mut inner = self.lock();
            let Some(&id) = inner.by_key.get(&key) else { return };
            inner.add_name(id, to.0, to.1);
            inner.remove_name(id, from.0, from.1)
        };
        drop(dropped);
    }

    /// All names of a node that lead to the root. Empty for what was unlinked.
    pub(crate) fn links(&self, id: u64) -> Vec<Link> {
        let inner = self.lock();
        let Some(entry) = inner.entries.get(&id) else { return Vec::new() };
        let links = entry.names.iter().filter_map(|(parent, name)| {
            let path = inner.path(*parent, name)?;
            let parent = Arc::clone(&inner.entries.get(parent)?.node);
            Some(Link { parent, name: name.clone(), path })
        });
        links.collect()
    }

    /// The path of a name in a directory, below the mount; `None` if the directory was removed.
    pub(crate) fn path(&self, parent: u64, name: &OsStr) -> Option<Vec<u8>> {
        self.lock().path(parent, name)
    }
}

impl Inner {
    fn own_number(&mut self) -> u64 {
        self.next_own += 1;
        self.next_own
    }

    /// What is on disk has taken the name of a ghost, which is another node than `id`.
    fn end_ghost(&mut self, id: u64, parent: u64, name: &OsStr) {
        if !self.ghosts.is_empty() && self.ghosts.get(&(parent, name.to_os_string())).is_some_and(|ghost| *ghost != id) {
            self.ghosts.remove(&(parent, name.to_os_string()));
        }
    }

    fn number_for(&mut self, key: Key) -> u64 {
        let usable = key.dev == self.root_dev && key.ino > ROOT && key.ino < OWN_NUMBERS && !self.entries.contains_key(&key.ino);
        if usable { key.ino } else { self.own_number() }
    }

    fn count(&mut self, id: u64, lookups: u64) {
        if let Some(entry) = self.entries.get_mut(&id) {
            entry.lookups += lookups;
        }
    }

    fn add_name(&mut self, id: u64, parent: u64, name: &OsStr) {
        if !self.entries.contains_key(&parent) {
            return;
        }
        let Some(entry) = self.entries.get_mut(&id) else { return };
        if entry.names.iter().any(|(p, n)| *p == parent && n == name) {
            return;
        }
        let is_dir = entry.node.backing().is_some_and(|backing| backing.kind == rustix::fs::FileType::Directory);
        // A directory has one name: another one was taken from it behind the mount.
        let stale = if is_dir { std::mem::take(&mut entry.names) } else { Vec::new() };
        entry.names.push((parent, name.to_os_string()));
        if let Some(parent) = self.entries.get_mut(&parent) {
            parent.children += 1;
        }
        for (parent, _) in stale {
            self.child_gone(parent);
        }
    }

    #[must_use]
    fn remove_name(&mut self, id: u64, parent: u64, name: &OsStr) -> Vec<Arc<Node>> {
        let Some(entry) = self.entries.get_mut(&id) else { return Vec::new() };
        let before = entry.names.len();
        entry.names.retain(|(p, n)| !(*p == parent && n == name));
        if entry.names.len() == before {
            return Vec::new();
        }
        self.child_gone(parent);
        self.sweep(parent)
    }

    fn child_gone(&mut self, parent: u64) {
        if let Some(parent) = self.entries.get_mut(&parent) {
            parent.children = parent.children.saturating_sub(1);
        }
    }

    /// Drops the node if nothing holds it, then what it alone held, up the tree.
    #[must_use]
    fn sweep(&mut self, id: u64) -> Vec<Arc<Node>> {
        let mut dropped = Vec::new();
        let mut next = vec![id];
        while let Some(id) = next.pop() {
            let idle = self.entries.get(&id).is_some_and(|entry| entry.lookups == 0 && entry.children == 0);
            if id == ROOT || !idle {
                continue;
            }
            let Some(entry) = self.entries.remove(&id) else { continue };
            if let Some(backing) = entry.node.backing()
                && self.by_key.get(&backing.key) == Some(&id)
            {
                self.by_key.remove(&backing.key);
            }
            for (parent, name) in entry.names {
                if entry.node.ghost.is_some() {
                    let place = (parent, name);
                    if self.ghosts.get(&place) == Some(&id) {
                        self.ghosts.remove(&place);
                    }
                }
                self.child_gone(parent);
                next.push(parent);
            }
            dropped.push(entry.node);
        }
        dropped
    }

    fn path(&self, parent: u64, name: &OsStr) -> Option<Vec<u8>> {
        let mut parts = vec![name.as_bytes()];
        let mut at = parent;
        while at != ROOT {
            let (parent, name) = self.entries.get(&at)?.names.first()?;
            parts.push(name.as_bytes());
            at = *parent;
        }
        parts.reverse();
        Some(parts.join(&b'/'))
    }
}
