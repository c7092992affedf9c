//! Which keys are announced.

use crate::krpc::Id;

/// Keys announced at most.
pub const ANNOUNCE_KEYS_MAX: usize = 600;

/// Piece keys of one incomplete file.
pub const PIECE_KEYS_PER_FILE_MAX: usize = 64;

/// Files longer than this are large: a lookup costs more than a smaller one is worth.
pub const LARGE_BYTES: u64 = 512 * 1024;

/// `announce` in the configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum AnnounceMode {
    /// Files over [`LARGE_BYTES`], and any with a delta.
    #[default]
    Large,
    /// Every shareable file.
    All,
    /// As `Large`, and the checked pieces of incomplete files.
    Pieces,
    /// Nothing.
    None,
}

/// A file that may be announced.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Offer {
    /// [`poolfs_core::Digest::file_key`].
    pub key: Id,
    /// Length of the file.
    pub bytes: u64,
    /// When it came here, seconds since 1970.
    pub arrived_s: u64,
    /// Whether a delta to it is offered.
    pub has_delta: bool,
    /// [`poolfs_core::Digest::piece_key`] of the pieces checked so far, for an incomplete file; empty otherwise.
    pub pieces: Vec<Id>,
}

/// The keys to announce, at most `keys_max`: the files that came on the newest day first, of one day the largest first;
/// piece keys only where no file's key wants the place.
pub fn select(offers: &[Offer], mode: AnnounceMode, keys_max: usize) -> Vec<Id> {
    let wanted = |offer: &&Offer| match mode {
        AnnounceMode::None => false,
        AnnounceMode::All => true,
        AnnounceMode::Large | AnnounceMode::Pieces => offer.bytes > LARGE_BYTES || offer.has_delta,
    };
    let mut files: Vec<&Offer> = offers.iter().filter(wanted).collect();
    files.sort_by_key(|o| (std::cmp::Reverse(o.arrived_s / (24 * 3600)), std::cmp::Reverse(o.bytes), o.key));
    let mut keys: Vec<Id> = files.iter().map(|o| o.key).collect();
    if mode == AnnounceMode::Pieces {
        keys.extend(files.iter().flat_map(|o| o.pieces.iter().take(PIECE_KEYS_PER_FILE_MAX)));
    }
    keys.truncate(keys_max);
    keys
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offer(n: u8, bytes: u64, day: u64) -> Offer {
        Offer { key: Id([n; 20]), bytes, arrived_s: day * 86_400 + 5, has_delta: false, pieces: Vec::new() }
    }

    fn check(offers: &[Offer], mode: AnnounceMode, want: &[u8]) {
        let got: Vec<u8> = select(offers, mode, ANNOUNCE_KEYS_MAX).iter().map(|k| k.0[0]).collect();
        assert_eq!(got, want, "{mode:?}");
    }

    /// The border of "large", the order, and each mode.
    #[test]
    fn modes() {
        let mut offers = vec![
            offer(1, LARGE_BYTES, 3),
            offer(2, LARGE_BYTES + 1, 3),
            offer(3, LARGE_BYTES * 9, 2),
            offer(4, LARGE_BYTES * 2, 3),
            offer(5, 10, 9),
        ];
        check(&offers, AnnounceMode::Large, &[4, 2, 3]);
        check(&offers, AnnounceMode::All, &[5, 4, 2, 1, 3]);
        check(&offers, AnnounceMode::None, &[]);
        offers[4].has_delta = true;
        offers[2].pieces = vec![Id([30; 20]); 100];
        check(&offers, AnnounceMode::Large, &[5, 4, 2, 3]);
        check(&offers, AnnounceMode::Pieces, &[vec![5, 4, 2, 3], vec![30; PIECE_KEYS_PER_FILE_MAX]].concat());
    }

    /// A cache of 3,000 files must not cost 3,000 announces.
    #[test]
    fn at_most_600() {
        let offers: Vec<Offer> = (0..3_000).map(|n| offer(1, LARGE_BYTES + 1 + n, 1)).collect();
        assert_eq!(select(&offers, AnnounceMode::All, ANNOUNCE_KEYS_MAX).len(), ANNOUNCE_KEYS_MAX);
    }
}
