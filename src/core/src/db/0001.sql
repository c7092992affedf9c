-- Sums of bytes that this machine has seen whole, by digest. A row lives while a file or an object names it.
CREATE TABLE contents (
    digest BLOB PRIMARY KEY CHECK (length(digest) = 32),
    size   INTEGER NOT NULL,
    pieces BLOB NOT NULL, -- SHA-256 of each 256 KiB, 32 bytes each
    blocks BLOB NOT NULL  -- BLAKE3 of each 64 KiB, 32 bytes each
) WITHOUT ROWID;

-- Every file of both directories, by its path below the mount.
CREATE TABLE files (
    role        TEXT NOT NULL,    -- 'archives' | 'lists'
    path        BLOB NOT NULL,    -- without a leading slash; bytes, since names need not be UTF-8
    state       TEXT NOT NULL,    -- 'writing' | 'clean' | 'damaged'
    digest      BLOB REFERENCES contents (digest), -- NULL while writing
    size        INTEGER NOT NULL,
    mtime_ns    INTEGER NOT NULL, -- since 1970, of the backing file
    inode       INTEGER NOT NULL, -- of the backing file
    sharing     TEXT NOT NULL,    -- 'announced' | 'available' | 'local-only' | 'withheld'
    source      TEXT NOT NULL,    -- 'mirror' | 'peer' | 'delta' | 'written here'
    verified_at INTEGER NOT NULL, -- seconds since 1970
    used_at     INTEGER NOT NULL, -- seconds since 1970
    PRIMARY KEY (role, path)
) WITHOUT ROWID;
CREATE INDEX files_by_digest ON files (digest);

-- Verified files kept by digest in objects/, outside the mounted directories.
CREATE TABLE objects (
    digest   BLOB PRIMARY KEY REFERENCES contents (digest),
    kind     TEXT NOT NULL,    -- 'package' | 'index' | 'delta'; indexes are evicted first
    sharing  TEXT NOT NULL,
    source   TEXT NOT NULL,
    mtime_ns INTEGER NOT NULL, -- of the file below objects/
    inode    INTEGER NOT NULL,
    used_at  INTEGER NOT NULL
) WITHOUT ROWID;
CREATE INDEX objects_by_use ON objects (used_at);

-- Downloads in progress, so that a restart goes on where it was. Nothing here is verified.
CREATE TABLE incoming (
    digest  BLOB PRIMARY KEY CHECK (length(digest) = 32),
    size    INTEGER NOT NULL,
    have    BLOB NOT NULL,    -- bitmap of pieces on disk, most significant bit first
    used_at INTEGER NOT NULL
) WITHOUT ROWID;

-- Committed lists that the catalog was read from: parsed again only when the stamp differs.
CREATE TABLE lists (
    id       INTEGER PRIMARY KEY,
    name     BLOB NOT NULL UNIQUE, -- file name below lists/
    size     INTEGER NOT NULL,
    mtime_ns INTEGER NOT NULL,
    inode    INTEGER NOT NULL,
    origin   TEXT NOT NULL         -- JSON, see catalog.rs: base URI, suite, component, architecture, date, private
);

-- What those lists say exists in the pool.
CREATE TABLE packages (
    name    TEXT NOT NULL,    -- archive name as apt makes it
    list    INTEGER NOT NULL REFERENCES lists (id) ON DELETE CASCADE,
    digest  BLOB NOT NULL CHECK (length(digest) = 32),
    size    INTEGER NOT NULL,
    path    TEXT NOT NULL,    -- Filename, below the base URI
    package TEXT NOT NULL,
    version TEXT NOT NULL,
    source  TEXT NOT NULL DEFAULT '', -- 'name' or 'name (version)' as in the stanza; '' = the package itself
    PRIMARY KEY (name, list, digest)
) WITHOUT ROWID;
CREATE INDEX packages_by_digest ON packages (digest);
CREATE INDEX packages_by_list ON packages (list);
CREATE INDEX packages_by_package ON packages (package);

-- Single facts: key = value.
CREATE TABLE meta (
    key   TEXT PRIMARY KEY,
    value TEXT NOT NULL
) WITHOUT ROWID;
