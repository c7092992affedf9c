-- One row: the node's own key pair. The hash of the machine's id stands beside it, so that an image copied with this
-- file in it is noticed at its first start.
CREATE TABLE identity (
    one INTEGER PRIMARY KEY CHECK (one = 1),
    secret BLOB NOT NULL CHECK (length(secret) = 32),
    machine BLOB CHECK (length(machine) = 32),
    created_at INTEGER NOT NULL
) STRICT;

-- The routing tables as last saved, best nodes first by rank.
CREATE TABLE routing (
    family INTEGER NOT NULL CHECK (family IN (4, 6)),
    rank INTEGER NOT NULL,
    node BLOB NOT NULL CHECK (length(node) = 20),
    address BLOB NOT NULL CHECK (length(address) = iif(family = 4, 4, 16)),
    port INTEGER NOT NULL CHECK (port BETWEEN 1 AND 65535),
    PRIMARY KEY (family, rank)
) STRICT, WITHOUT ROWID;
