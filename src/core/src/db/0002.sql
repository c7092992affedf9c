-- What strangers may have, by digest. A file that is kept back is in neither index, so that looking for it takes exactly as
-- long as looking for one that is not here.
CREATE INDEX files_for_strangers ON files (digest) WHERE state = 'clean' AND sharing IN ('announced', 'available');
CREATE INDEX objects_for_strangers ON objects (digest) WHERE sharing IN ('announced', 'available');
