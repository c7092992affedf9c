-- What verified downloads have proved of addresses and keys, and how fast peers were: swarm/driver/book.rs. Each row has its
-- end of use, in Unix seconds, so that an old file does not hold old days against anybody.
CREATE TABLE verdict_address (
    address BLOB PRIMARY KEY CHECK (length(address) IN (4, 16)),
    record TEXT NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE verdict_key (
    key BLOB PRIMARY KEY CHECK (length(key) = 32),
    out_until INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE rating (
    address BLOB NOT NULL CHECK (length(address) IN (4, 16)),
    port INTEGER NOT NULL CHECK (port BETWEEN 1 AND 65535),
    rating TEXT NOT NULL,
    pieces INTEGER NOT NULL,
    bytes INTEGER NOT NULL,
    PRIMARY KEY (address, port)
) STRICT, WITHOUT ROWID;
