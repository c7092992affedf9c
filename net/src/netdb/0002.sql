-- Members of the fleet as last known: whom to ask first at the next start.
CREATE TABLE member (
    id BLOB PRIMARY KEY CHECK (length(id) = 20),
    address BLOB NOT NULL CHECK (length(address) IN (4, 16)),
    port INTEGER NOT NULL CHECK (port BETWEEN 1 AND 65535)
) STRICT, WITHOUT ROWID;
