//! The bounded look at a datagram before anything is allocated for it.
//!
//! A bencode parser that builds values does work in proportion to what the sender claims. [`scan`] walks the bytes once,
//! without allocating, and refuses what is too long, too deep, made of too many tokens or not bencode at all; only what
//! passed is handed to serde.

use super::{DATAGRAM_BYTES_IN_MAX, DEPTH_MAX, TOKENS_MAX};

/// Digits of the longest integer that fits an `i64` or `u64`, sign included.
const INTEGER_CHARS_MAX: usize = 20;

/// Why a datagram is not even parsed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ScanError {
    /// More than [`DATAGRAM_BYTES_IN_MAX`].
    #[error("longer than {DATAGRAM_BYTES_IN_MAX} bytes")]
    TooLong,
    /// Lists and dictionaries nested more than [`DEPTH_MAX`] times.
    #[error("nested more than {DEPTH_MAX} times")]
    TooDeep,
    /// More than [`TOKENS_MAX`] strings, integers, lists and dictionaries.
    #[error("more than {TOKENS_MAX} tokens")]
    TooManyTokens,
    /// Ends inside a value, or says a length beyond its end.
    #[error("truncated")]
    Truncated,
    /// A byte that bencode does not have there, a dictionary key that is not a string, a number out of range.
    #[error("not bencode")]
    Syntax,
    /// Bytes after the value.
    #[error("bytes after the value")]
    Trailing,
    /// The same key twice in one dictionary: two readers could see two messages.
    #[error("a key twice in a dictionary")]
    DuplicateKey,
}

/// What a scan found out in passing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Scanned {
    /// Strings, integers, lists and dictionaries, keys counted as strings.
    pub tokens: usize,
    /// Keys sorted as raw bytes, no leading zeros, no `-0`: the one way to write this value.
    pub canonical: bool,
}

/// Checks that `bytes` are exactly one bencoded value within the limits.
///
/// # Errors
/// [`ScanError`], at the first thing that is wrong.
pub fn scan(bytes: &[u8]) -> Result<Scanned, ScanError> {
    if bytes.len() > DATAGRAM_BYTES_IN_MAX {
        return Err(ScanError::TooLong);
    }
    let mut walker = Walker { bytes, at: 0, tokens: 0, canonical: true };
    walker.value(0)?;
    if walker.at != bytes.len() {
        return Err(ScanError::Trailing);
    }
    Ok(Scanned { tokens: walker.tokens, canonical: walker.canonical })
}

/// The bencoded bytes of the value under `key` in the dictionary `dict`, which must have passed [`scan`].
///
/// BEP 44 hashes a value as its sender wrote it, which a parsed value no longer shows.
pub fn raw_entry<'a>(dict: &'a [u8], key: &[u8]) -> Option<&'a [u8]> {
    let mut walker = Walker { bytes: dict, at: 1, tokens: 0, canonical: true };
    if dict.first() != Some(&b'd') {
        return None;
    }
    while walker.peek().ok()? != b'e' {
        let this = walker.string().ok()?;
        let from = walker.at;
        walker.value(1).ok()?;
        if this == key {
            return Some(&dict[from..walker.at]);
        }
    }
    None
}

struct Walker<'a> {
    bytes: &'a [u8],
    at: usize,
    tokens: usize,
    canonical: bool,
}

impl<'a> Walker<'a> {
    fn peek(&self) -> Result<u8, ScanError> {
        self.bytes.get(self.at).copied().ok_or(ScanError::Truncated)
    }

    fn token(&mut self) -> Result<(), ScanError> {
        self.tokens += 1;
        if self.tokens > TOKENS_MAX { Err(ScanError::TooManyTokens) } else { Ok(()) }
    }

    /// Recursion ends at [`DEPTH_MAX`].
    fn value(&mut self, depth: usize) -> Result<(), ScanError> {
        match self.peek()? {
            b'0'..=b'9' => self.string().map(drop),
            b'i' => self.integer(),
            open @ (b'l' | b'd') => {
                self.token()?;
                if depth == DEPTH_MAX {
                    return Err(ScanError::TooDeep);
                }
                self.at += 1;
                if open == b'l' { self.list(depth) } else { self.dictionary(depth) }
            }
            _ => Err(ScanError::Syntax),
        }
    }

    fn list(&mut self, depth: usize) -> Result<(), ScanError> {
        while self.peek()? != b'e' {
            self.value(depth + 1)?;
        }
        self.at += 1;
        Ok(())
    }

    fn dictionary(&mut self, depth: usize) -> Result<(), ScanError> {
        let start = self.at;
        let mut last: Option<&[u8]> = None;
        let mut sorted = true;
        while self.peek()? != b'e' {
            if !self.peek()?.is_ascii_digit() {
                return Err(ScanError::Syntax);
            }
            let key_at = self.at;
            let key = self.string()?;
            sorted &= last.is_none_or(|last| last < key);
            if !sorted {
                self.canonical = false;
                self.refuse_duplicate(start, key_at, key)?;
            }
            last = Some(key);
            self.value(depth + 1)?;
        }
        self.at += 1;
        Ok(())
    }

    /// Looks through the keys before `until` again; only dictionaries out of order pay for it, bounded by the tokens.
    fn refuse_duplicate(&self, start: usize, until: usize, key: &[u8]) -> Result<(), ScanError> {
        let mut again = Walker { bytes: self.bytes, at: start, tokens: 0, canonical: true };
        while again.at < until {
            if again.string()? == key {
                return Err(ScanError::DuplicateKey);
            }
            again.value(0)?;
        }
        Ok(())
    }

    fn string(&mut self) -> Result<&'a [u8], ScanError> {
        self.token()?;
        let digits = self.bytes[self.at..].iter().take_while(|b| b.is_ascii_digit()).count();
        if digits == 0 {
            return Err(ScanError::Syntax);
        }
        let text = &self.bytes[self.at..self.at + digits];
        if text.len() > 1 && text[0] == b'0' {
            self.canonical = false;
        }
        let mut length: usize = 0;
        for digit in text {
            // Past the datagram's end it is truncated whatever follows: no overflow is possible.
            length = length * 10 + usize::from(digit - b'0');
            if length > DATAGRAM_BYTES_IN_MAX {
                return Err(ScanError::Truncated);
            }
        }
        self.at += digits;
        if self.peek()? != b':' {
            return Err(ScanError::Syntax);
        }
        self.at += 1;
        let end = self.at + length;
        let string = self.bytes.get(self.at..end).ok_or(ScanError::Truncated)?;
        self.at = end;
        Ok(string)
    }

    fn integer(&mut self) -> Result<(), ScanError> {
        self.token()?;
        self.at += 1;
        let length = self.bytes[self.at..].iter().position(|b| *b == b'e').ok_or(ScanError::Truncated)?;
        let text = &self.bytes[self.at..self.at + length];
        let digits = text.strip_prefix(b"-").unwrap_or(text);
        if digits.is_empty() || text.len() > INTEGER_CHARS_MAX || !digits.iter().all(u8::is_ascii_digit) {
            return Err(ScanError::Syntax);
        }
        if (digits[0] == b'0' && digits.len() > 1) || text == b"-0" {
            self.canonical = false;
        }
        self.at += length + 1;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each limit lets its own number pass and refuses one more; a wrong border would cut off real nodes.
    #[test]
    fn limits_are_exact() {
        let nest = |n: usize| [vec![b'l'; n], vec![b'e'; n]].concat();
        assert_eq!(scan(&nest(DEPTH_MAX)).map(|s| s.tokens), Ok(DEPTH_MAX));
        assert_eq!(scan(&nest(DEPTH_MAX + 1)), Err(ScanError::TooDeep));
        assert_eq!(scan(&nest(50)), Err(ScanError::TooDeep));
        let items = |n: usize| [b"l".to_vec(), b"0:".repeat(n), b"e".to_vec()].concat();
        assert_eq!(scan(&items(TOKENS_MAX - 1)).map(|s| s.tokens), Ok(TOKENS_MAX));
        assert_eq!(scan(&items(TOKENS_MAX)), Err(ScanError::TooManyTokens));
        let string = |n: usize| [n.to_string().into_bytes(), b":".to_vec(), vec![0; n]].concat();
        assert!(scan(&string(DATAGRAM_BYTES_IN_MAX - 5)).is_ok());
        assert_eq!(scan(&string(DATAGRAM_BYTES_IN_MAX - 4)), Err(ScanError::TooLong));
    }

    /// Lengths that claim gigabytes, cut values and other texts end in an error, never in a slice out of range.
    #[test]
    fn refuses_what_is_not_bencode() {
        let check = |text: &[u8], want| assert_eq!(scan(text), Err(want), "{}", text.escape_ascii());
        check(b"", ScanError::Truncated);
        check(b"2147483648:x", ScanError::Truncated);
        check(b"99999999999999999999999999999999:x", ScanError::Truncated);
        check(b"5:abcd", ScanError::Truncated);
        check(b"5", ScanError::Truncated);
        check(b"5abc", ScanError::Syntax);
        check(b"i12", ScanError::Truncated);
        check(b"ie", ScanError::Syntax);
        check(b"i-e", ScanError::Syntax);
        check(b"i1x2e", ScanError::Syntax);
        check(b"i123456789012345678901e", ScanError::Syntax);
        check(b"d", ScanError::Truncated);
        check(b"di1e0:e", ScanError::Syntax);
        check(b"d1:a", ScanError::Truncated);
        check(b"d1:ae", ScanError::Syntax);
        check(b"lee", ScanError::Trailing);
        check(b"x", ScanError::Syntax);
        check(b"d1:ai1e1:ai2ee", ScanError::DuplicateKey);
        check(b"d1:bi1e1:ai1e1:bi2ee", ScanError::DuplicateKey);
    }

    /// Only the one canonical writing counts as canonical.
    #[test]
    fn knows_canonical() {
        let check = |text: &[u8], want| assert_eq!(scan(text).map(|s| s.canonical), Ok(want), "{}", text.escape_ascii());
        check(b"d1:ai0e1:bi-1ee", true);
        check(b"d1:bi0e1:ai1ee", false);
        check(b"i01e", false);
        check(b"i-0e", false);
        check(b"01:a", false);
        check(b"d1:ad2:aai1e1:ai1eee", false);
        check(b"le", true);
    }

    /// The raw bytes of an entry are found wherever it stands, and only at the top.
    #[test]
    fn finds_raw_entries() {
        assert_eq!(raw_entry(b"d1:ad1:v1:xe1:vli1eee", b"v"), Some(&b"li1ee"[..]));
        assert_eq!(raw_entry(b"d1:ad1:v1:xee", b"v"), None);
        assert_eq!(raw_entry(b"le", b"v"), None);
    }
}
