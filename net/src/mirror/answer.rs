//! Whether an answer's header fits what was asked and what the index says.

use super::Failure;
use reqwest::StatusCode;
use reqwest::header::{CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE, DATE, ETAG, HeaderMap, HeaderName, HeaderValue, LAST_MODIFIED};

/// The bytes `start..end` asked of a file of `size` bytes; never empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Asked {
    pub(super) start: u64,
    pub(super) end: u64,
    pub(super) size: u64,
}

impl Asked {
    /// The Range header, `None` where the whole file is asked for.
    pub(super) fn range_header(&self) -> Option<String> {
        (self.start != 0 || self.end != self.size).then(|| format!("bytes={}-{}", self.start, self.end - 1))
    }
}

/// The bytes of the file that an answer's body holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Body {
    pub(super) start: u64,
    pub(super) end: u64,
}

/// What the body of this answer is, or why it is not taken. `validator` is what an earlier answer of the same URL said.
pub(super) fn judge(status: StatusCode, headers: &HeaderMap, asked: &Asked, validator: Option<&HeaderValue>) -> Result<Body, Failure> {
    let out = |why: String| Err(Failure::Out(why));
    let ranged = asked.range_header().is_some();
    let body = match status.as_u16() {
        200 if !ranged || asked.start == 0 => Body { start: 0, end: asked.size },
        200 if validator.is_some() => return out("the file was replaced between two ranges".to_owned()),
        200 => return Err(Failure::NoRanges("answers a Range with the whole file".to_owned())),
        206 if ranged => match content_range(headers) {
            Some((start, end, total)) if start == asked.start && end == asked.end && total == asked.size => Body { start, end },
            Some((start, end, total)) => {
                return out(format!(
                    "sent bytes {start} to {end} of {total}, asked were {} to {} of {}",
                    asked.start, asked.end, asked.size
                ));
            }
            None => return out("sent a range without a usable Content-Range".to_owned()),
        },
        206 => return out("sent a range that was not asked for".to_owned()),
        code @ (408 | 425 | 429 | 500..=599) => return Err(Failure::Unwell(format!("answered {code}"))),
        code => return out(format!("answered {code}")),
    };
    if let Some(encoding) = headers.get(CONTENT_ENCODING)
        && !encoding.as_bytes().eq_ignore_ascii_case(b"identity")
    {
        return out("sent the file encoded, which was not asked for".to_owned());
    }
    if let Some(length) = headers.get(CONTENT_LENGTH) {
        let length = length.to_str().ok().and_then(|text| text.parse::<u64>().ok());
        let expected = body.end - body.start;
        if length != Some(expected) {
            return out(match length {
                Some(length) => format!("has {length} bytes where the index says {expected}"),
                None => "sent a Content-Length that is no number".to_owned(),
            });
        }
    }
    // A server may honour neither If-Range nor its own validator; a range of other bytes is of no use.
    if let (Some(before), Some(now)) = (validator, self::validator(headers))
        && is_etag(before) == is_etag(&now)
        && *before != now
    {
        return out("the file was replaced between two ranges".to_owned());
    }
    Ok(body)
}

/// The strong validator of an answer (RFC 9110, 8.8): an ETag that is not weak, else a Last-Modified that differs from Date,
/// since a file of the same second may change once more within it.
pub(super) fn validator(headers: &HeaderMap) -> Option<HeaderValue> {
    let get = |name: HeaderName| headers.get(name);
    match get(ETAG) {
        Some(etag) if is_etag(etag) => Some(etag.clone()),
        _ => get(LAST_MODIFIED).filter(|modified| get(DATE).is_some_and(|date| date != *modified)).cloned(),
    }
}

fn is_etag(value: &HeaderValue) -> bool {
    value.as_bytes().starts_with(b"\"")
}

/// `bytes START-LAST/TOTAL` as (start, end, total), where end is one past the last byte.
fn content_range(headers: &HeaderMap) -> Option<(u64, u64, u64)> {
    let mut values = headers.get_all(CONTENT_RANGE).iter();
    let text = values.next()?.to_str().ok()?;
    if values.next().is_some() {
        return None;
    }
    let (unit, rest) = text.trim().split_once(' ')?;
    let (range, total) = rest.trim().split_once('/')?;
    let (start, last) = range.split_once('-')?;
    let number = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse::<u64>().ok()).flatten();
    let (start, last, total) = (number(start)?, number(last)?, number(total)?);
    (unit.eq_ignore_ascii_case("bytes") && start <= last && last < total).then(|| (start, last + 1, total))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(HeaderName, &str)]) -> HeaderMap {
        pairs.iter().map(|(name, value)| (name.clone(), HeaderValue::from_str(value).expect("test header"))).collect()
    }

    /// A Content-Range read wrongly puts bytes at the wrong place of the file.
    #[test]
    fn content_ranges() {
        let check =
            |text: &str, want: Option<(u64, u64, u64)>| assert_eq!(content_range(&headers(&[(CONTENT_RANGE, text)])), want, "{text}");
        check("bytes 0-0/1", Some((0, 1, 1)));
        check("Bytes 5-9/10", Some((5, 10, 10)));
        for bad in [
            "bytes 5-4/10",
            "bytes 0-10/10",
            "bytes 0-1/*",
            "bytes */10",
            "items 0-1/2",
            "bytes 0-/2",
            "bytes -1/2",
            "bytes +0-1/2",
            "bytes 0-18446744073709551615/18446744073709551615",
            "bytes 0-18446744073709551616/18446744073709551617",
            "",
        ] {
            check(bad, None);
        }
        let mut two = headers(&[(CONTENT_RANGE, "bytes 0-0/1")]);
        two.append(CONTENT_RANGE, HeaderValue::from_static("bytes 0-0/1"));
        assert_eq!(content_range(&two), None, "two of them");
    }

    /// Joining ranges by a weak validator may join two versions.
    #[test]
    fn only_strong_validators() {
        let check = |pairs: &[(HeaderName, &str)], want: Option<&str>| {
            assert_eq!(validator(&headers(pairs)).as_ref().and_then(|v| v.to_str().ok()), want, "{pairs:?}");
        };
        let (then, now) = ("Sun, 01 Nov 2026 00:00:00 GMT", "Sun, 22 Nov 2026 00:00:00 GMT");
        check(&[(ETAG, "\"a\"")], Some("\"a\""));
        check(&[(ETAG, "W/\"a\"")], None);
        check(&[(ETAG, "W/\"a\""), (LAST_MODIFIED, then), (DATE, now)], Some(then));
        check(&[(LAST_MODIFIED, then)], None);
        check(&[(LAST_MODIFIED, now), (DATE, now)], None);
    }

    /// Each answer that contradicts the index or the question has its own way on.
    #[test]
    fn judged_by_what_comes_next() {
        let all = Asked { start: 0, end: 100, size: 100 };
        let part = Asked { start: 10, end: 100, size: 100 };
        let head = Asked { start: 0, end: 10, size: 100 };
        let check = |asked: &Asked, code: u16, pairs: &[(HeaderName, &str)], validator: Option<&str>, want: &str| {
            let validator = validator.map(|text| HeaderValue::from_str(text).expect("test header"));
            let got = judge(StatusCode::from_u16(code).expect("test status"), &headers(pairs), asked, validator.as_ref());
            assert_eq!(format!("{got:?}"), want, "{code} {pairs:?}");
        };
        check(&all, 200, &[], None, "Ok(Body { start: 0, end: 100 })");
        check(&all, 200, &[(CONTENT_LENGTH, "99")], None, r#"Err(Out("has 99 bytes where the index says 100"))"#);
        check(&all, 200, &[(CONTENT_ENCODING, "gzip")], None, r#"Err(Out("sent the file encoded, which was not asked for"))"#);
        check(&all, 206, &[(CONTENT_RANGE, "bytes 0-99/100")], None, r#"Err(Out("sent a range that was not asked for"))"#);
        check(&all, 404, &[], None, r#"Err(Out("answered 404"))"#);
        check(&all, 304, &[], None, r#"Err(Out("answered 304"))"#);
        check(&all, 429, &[], None, r#"Err(Unwell("answered 429"))"#);
        check(&all, 503, &[], None, r#"Err(Unwell("answered 503"))"#);
        check(&head, 200, &[(CONTENT_LENGTH, "100")], None, "Ok(Body { start: 0, end: 100 })");
        check(&part, 200, &[], None, r#"Err(NoRanges("answers a Range with the whole file"))"#);
        check(&part, 200, &[], Some("\"a\""), r#"Err(Out("the file was replaced between two ranges"))"#);
        check(&part, 206, &[(CONTENT_RANGE, "bytes 10-99/100"), (CONTENT_LENGTH, "90")], None, "Ok(Body { start: 10, end: 100 })");
        check(&part, 206, &[], None, r#"Err(Out("sent a range without a usable Content-Range"))"#);
        check(
            &part,
            206,
            &[(CONTENT_RANGE, "bytes 10-99/101")],
            None,
            r#"Err(Out("sent bytes 10 to 100 of 101, asked were 10 to 100 of 100"))"#,
        );
        check(
            &part,
            206,
            &[(CONTENT_RANGE, "bytes 10-99/100"), (ETAG, "\"b\"")],
            Some("\"a\""),
            r#"Err(Out("the file was replaced between two ranges"))"#,
        );
    }
}
