-- Deltas: what each package here is, which deltas are here as objects, and what became of each that was tried.

CREATE TABLE versions (
    digest BLOB PRIMARY KEY,
    package TEXT NOT NULL,
    architecture TEXT NOT NULL,
    version TEXT NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX versions_by_package ON versions (package, architecture);

CREATE TABLE deltas (
    new BLOB NOT NULL,
    old BLOB NOT NULL,
    delta BLOB NOT NULL,
    bytes INTEGER NOT NULL,
    PRIMARY KEY (new, old)
) STRICT, WITHOUT ROWID;
CREATE INDEX deltas_by_delta ON deltas (delta);

-- A delta that was not made or did not do, so that it is not tried again; and what the last download of a file says of deltas.
CREATE TABLE delta_tries (
    new BLOB NOT NULL,
    old BLOB NOT NULL,
    what TEXT NOT NULL,
    at INTEGER NOT NULL,
    PRIMARY KEY (new, old)
) STRICT, WITHOUT ROWID;

CREATE TABLE delta_notes (
    new BLOB PRIMARY KEY,
    note TEXT NOT NULL,
    saved INTEGER NOT NULL,
    at INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE delta_recipes (
    package TEXT NOT NULL,
    architecture TEXT NOT NULL,
    recipes BLOB NOT NULL,
    PRIMARY KEY (package, architecture)
) STRICT, WITHOUT ROWID;
