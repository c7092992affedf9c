//! Arithmetic of pieces and blocks.
//!
//! A *piece* is what is asked of one source, announced and blamed; a *block* is what is checked at each read. Both cut
//! the file from its start, and only the last of each may be shorter. A piece is a whole number of blocks.

use std::ops::Range;

/// Bytes of a block: the unit checked at each read.
pub const BLOCK_BYTES: u32 = 64 * 1024;

/// Bytes of a piece: the unit asked of one source.
pub const PIECE_BYTES: u32 = 256 * 1024;

/// The largest file that is one piece and asked of one source as a whole, in bytes (apt-p2p's 512 KB).
pub const SMALL_FILE_BYTES_MAX: u64 = 512 * 1024;

const _: () = assert!(PIECE_BYTES.is_multiple_of(BLOCK_BYTES));

/// How many units of `unit` bytes a file of `size` bytes has; 0 for an empty file.
pub fn count(size: u64, unit: u32) -> u64 {
    size.div_ceil(u64::from(unit))
}

/// How far `offset` lies within its unit of `unit` bytes.
pub fn within(offset: u64, unit: u32) -> usize {
    usize::try_from(offset % u64::from(unit)).expect("below `unit`, which is a u32")
}

/// The bytes of unit `index` in a file of `size` bytes: empty at and past the end.
pub fn span(index: u64, size: u64, unit: u32) -> Range<u64> {
    let start = index.saturating_mul(u64::from(unit)).min(size);
    let end = start.saturating_add(u64::from(unit)).min(size);
    start..end
}

/// The units of `unit` bytes that hold the bytes `range` of a file of `size` bytes; empty if `range` lies past the end.
pub fn covering(range: Range<u64>, size: u64, unit: u32) -> Range<u64> {
    let end = range.end.min(size);
    if range.start >= end {
        return 0..0;
    }
    range.start / u64::from(unit)..end.div_ceil(u64::from(unit))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Borders are where a wrong sign loses the last byte of a package.
    #[test]
    fn borders() {
        let b = u64::from(BLOCK_BYTES);
        for (size, units) in [(0, 0), (1, 1), (b - 1, 1), (b, 1), (b + 1, 2), (10 * b, 10)] {
            assert_eq!(count(size, BLOCK_BYTES), units, "{size}");
            let spans: Vec<_> = (0..units).map(|i| span(i, size, BLOCK_BYTES)).collect();
            assert_eq!(spans.iter().map(|s| s.end - s.start).sum::<u64>(), size);
            assert_eq!(span(units, size, BLOCK_BYTES), size..size);
        }
        assert_eq!(covering(0..0, b, BLOCK_BYTES), 0..0);
        assert_eq!(covering(0..1, b, BLOCK_BYTES), 0..1);
        assert_eq!(covering(b - 1..b + 1, 3 * b, BLOCK_BYTES), 0..2);
        assert_eq!(covering(b..9 * b, 3 * b, BLOCK_BYTES), 1..3);
        assert_eq!(covering(3 * b..9 * b, 3 * b, BLOCK_BYTES), 0..0);
        assert_eq!(span(u64::MAX, 5, BLOCK_BYTES), 5..5);
    }
}
