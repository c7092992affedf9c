-- When an update that held apt's lock looked a Release up and kept or replaced it: also where nothing had changed.
CREATE TABLE looked (
    name TEXT PRIMARY KEY, -- as in releases
    at   INTEGER NOT NULL  -- seconds since 1970
) WITHOUT ROWID;

-- The newest version of each source package that a list names. Counts as the list's rows in packages do.
CREATE TABLE newest (
    list    INTEGER NOT NULL, -- first_id in lists
    source  TEXT NOT NULL,
    version TEXT NOT NULL,    -- of the source package
    PRIMARY KEY (list, source)
) WITHOUT ROWID;
-- Lists that were read before have no rows there: no file has that time, so they are read again.
UPDATE lists SET mtime_ns = -9223372036854775808;

-- What was last decided of a content that is here, and what the lists said of it when one last named it.
CREATE TABLE judged (
    digest  BLOB PRIMARY KEY REFERENCES contents (digest) ON DELETE CASCADE,
    rule    TEXT NOT NULL,
    list    TEXT, -- name in lists; NULL: never in one, or private
    package TEXT,
    version TEXT,
    source  TEXT
) WITHOUT ROWID;
