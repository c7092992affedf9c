//! The Range header of a request (RFC 9110, 14.2): one range of bytes.

use std::ops::Range;

/// What part of a file is asked for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Part {
    /// All of it.
    Whole,
    /// These bytes, never none.
    Bytes(Range<u64>),
    /// None that the file has.
    Unsatisfiable,
}

/// What `header` asks of a file of `size` bytes. A unit other than bytes is passed over, as the RFC wants; several ranges
/// and what is no range at all cannot be satisfied.
pub(super) fn parse(header: Option<&[u8]>, size: u64) -> Part {
    let Some(header) = header else { return Part::Whole };
    let Ok(text) = str::from_utf8(header) else { return Part::Unsatisfiable };
    let Some((unit, spec)) = text.trim().split_once('=') else { return Part::Unsatisfiable };
    if !unit.trim().eq_ignore_ascii_case("bytes") {
        return Part::Whole;
    }
    let Some((first, last)) = spec.trim().split_once('-') else { return Part::Unsatisfiable };
    // Digits only: `parse` alone would take a sign. A number beyond u64 lies past every file.
    let number = |text: &str| match text.bytes().all(|byte| byte.is_ascii_digit()) && !text.is_empty() {
        true => Some(text.parse::<u64>().unwrap_or(u64::MAX)),
        false => None,
    };
    let range = match (number(first), number(last)) {
        (Some(first), Some(last)) if first <= last => first..last.saturating_add(1).min(size),
        (Some(first), None) if last.is_empty() => first..size,
        (None, Some(suffix)) if first.is_empty() => size.saturating_sub(suffix)..size,
        _ => return Part::Unsatisfiable,
    };
    if range.is_empty() { Part::Unsatisfiable } else { Part::Bytes(range) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A range read wrongly gives other bytes than were asked for, or reads past the file.
    #[test]
    fn ranges() {
        let check = |text: &str, size: u64, want: Part| assert_eq!(parse(Some(text.as_bytes()), size), want, "{text} of {size}");
        assert_eq!(parse(None, 0), Part::Whole);
        check("bytes=0-0", 1, Part::Bytes(0..1));
        check("bytes=0-9", 10, Part::Bytes(0..10));
        check("bytes=0-10", 10, Part::Bytes(0..10));
        check("bytes=9-99", 10, Part::Bytes(9..10));
        check("Bytes = 3-4", 10, Part::Bytes(3..5));
        check("bytes=3-", 10, Part::Bytes(3..10));
        check("bytes=-3", 10, Part::Bytes(7..10));
        check("bytes=-30", 10, Part::Bytes(0..10));
        check("bytes=0-18446744073709551615", 10, Part::Bytes(0..10));
        check("bytes=0-99999999999999999999999", 10, Part::Bytes(0..10));
        check("pieces=0-1", 10, Part::Whole);
        for bad in [
            "",
            "bytes",
            "bytes=",
            "bytes=-",
            "bytes=10-",
            "bytes=10-11",
            "bytes=5-4",
            "bytes=-0",
            "bytes=+1-2",
            "bytes=0-1,3-4",
            "bytes=a-b",
        ] {
            check(bad, 10, Part::Unsatisfiable);
        }
        check("bytes=0-", 0, Part::Unsatisfiable);
        check("bytes=-1", 0, Part::Unsatisfiable);
        assert_eq!(parse(Some(b"\xff"), 10), Part::Unsatisfiable);
    }
}
