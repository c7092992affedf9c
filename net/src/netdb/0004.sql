-- The key under which a peer signed what it handed over, and what nodes say of each other: net/src/reputation. Statements are in the
-- order in which they came; a proof is given while its file is shown to strangers.
ALTER TABLE rating ADD COLUMN key BLOB CHECK (key IS NULL OR length(key) = 32);

CREATE TABLE statement (
    place INTEGER NOT NULL UNIQUE,
    bytes BLOB PRIMARY KEY CHECK (length(bytes) = 236),
    standing TEXT NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE proof (
    id BLOB PRIMARY KEY CHECK (length(id) = 32),
    file BLOB NOT NULL CHECK (length(file) = 32),
    bytes BLOB NOT NULL,
    made_at INTEGER NOT NULL
) STRICT;
