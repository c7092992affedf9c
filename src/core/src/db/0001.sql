-- Sums of bytes that this machine has seen whole, by digest. A row lives while a file or an object names it.
CREATE TABLE contents (
    digest BLOB PRIMARY KEY CHECK (length(digest) = 32),
    size   INTEGER NOT NULL,
    pieces BLOB NOT NULL, -- SHA-256 of each 256 KiB, 32 bytes each
    blocks BLOB NOT NULL, -- BLAKE3 of each 64 KiB, 32 bytes each
    seal   BLOB NOT NULL  -- BLAKE3 over digest, size (8 bytes, little endian), pieces and blocks: finds rot in this row itself
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
    size     INTEGER NOT NULL,
    mtime_ns INTEGER NOT NULL, -- of the file below objects/
    inode    INTEGER NOT NULL,
    used_at  INTEGER NOT NULL
) WITHOUT ROWID;
CREATE INDEX objects_by_use ON objects (kind <> 'index', used_at, digest); -- the order of eviction

-- Sums go with the last row that names them. (No statement of this program uses REPLACE, which would pass these by.)
CREATE TRIGGER files_deleted AFTER DELETE ON files WHEN old.digest IS NOT NULL BEGIN
    DELETE FROM contents WHERE digest = old.digest
        AND NOT EXISTS (SELECT 1 FROM files WHERE files.digest = old.digest)
        AND NOT EXISTS (SELECT 1 FROM objects WHERE objects.digest = old.digest);
END;
CREATE TRIGGER files_changed AFTER UPDATE OF digest ON files WHEN old.digest IS NOT NULL AND new.digest IS NOT old.digest BEGIN
    DELETE FROM contents WHERE digest = old.digest
        AND NOT EXISTS (SELECT 1 FROM files WHERE files.digest = old.digest)
        AND NOT EXISTS (SELECT 1 FROM objects WHERE objects.digest = old.digest);
END;
CREATE TRIGGER objects_deleted AFTER DELETE ON objects BEGIN
    DELETE FROM contents WHERE digest = old.digest
        AND NOT EXISTS (SELECT 1 FROM files WHERE files.digest = old.digest)
        AND NOT EXISTS (SELECT 1 FROM objects WHERE objects.digest = old.digest);
END;

-- Downloads in progress, so that a restart goes on where it was. Nothing here is verified.
CREATE TABLE incoming (
    digest  BLOB PRIMARY KEY CHECK (length(digest) = 32),
    size    INTEGER NOT NULL,
    have    BLOB NOT NULL,    -- bitmap of pieces on disk, most significant bit first
    used_at INTEGER NOT NULL
) WITHOUT ROWID;

-- Committed InRelease and Release files, read again only when the stamp differs.
CREATE TABLE releases (
    name        TEXT PRIMARY KEY, -- file name in lists/
    size        INTEGER NOT NULL,
    mtime_ns    INTEGER NOT NULL,
    inode       INTEGER NOT NULL,
    date        INTEGER NOT NULL, -- seconds since 1970
    valid_until INTEGER,          -- seconds since 1970, NULL if it does not say
    origin      TEXT NOT NULL,
    label       TEXT NOT NULL,
    suite       TEXT NOT NULL,
    codename    TEXT NOT NULL,
    by_hash     INTEGER NOT NULL  -- 0 | 1
) WITHOUT ROWID;

-- Committed lists that the catalog was read from: parsed again only when the stamp differs.
CREATE TABLE lists (
    name     TEXT PRIMARY KEY, -- file name in lists/ without the ending of its form
    size     INTEGER NOT NULL,
    mtime_ns INTEGER NOT NULL,
    inode    INTEGER NOT NULL,
    release  TEXT NOT NULL,    -- name in releases, '' if there is none
    private  INTEGER NOT NULL, -- 0 | 1
    first_id INTEGER NOT NULL, -- its rows in packages: first_id <= id < end_id
    end_id   INTEGER NOT NULL
) WITHOUT ROWID;
CREATE UNIQUE INDEX lists_by_id ON lists (first_id, end_id);

-- What those lists say exists in the pool. A list's rows are next to each other, and count only once its row in lists says
-- so: they are written in several short transactions before that.
CREATE TABLE packages (
    id      INTEGER PRIMARY KEY,
    name    TEXT,             -- archive name as apt makes it; NULL for files of source packages
    digest  BLOB NOT NULL CHECK (length(digest) = 32),
    size    INTEGER NOT NULL,
    path    TEXT NOT NULL,    -- below the repository
    package TEXT NOT NULL,
    version TEXT NOT NULL,
    source  TEXT NOT NULL     -- 'name' or 'name (version)' as in the stanza; '' = the package itself
);
CREATE INDEX packages_by_name ON packages (name) WHERE name IS NOT NULL;
-- Eight bytes tell digests apart, and the index stays small enough for the page cache while a list is written.
CREATE INDEX packages_by_digest ON packages (substr(digest, 1, 8));

-- Single facts: key = value.
CREATE TABLE meta (
    key   TEXT PRIMARY KEY,
    value TEXT NOT NULL
) WITHOUT ROWID;
