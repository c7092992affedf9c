//! One range of a file at a time, for a download in which the mirror is one source of several.
//!
//! Same rules as for a stream: the header has to fit the index before a byte is taken, later ranges are of the bytes of the
//! first one, and a URL that contradicts the index is out for this file. Connections are reused between ranges, since each
//! body is read to its end.

use super::answer::{self, Asked};
use super::{Asking, Failure, Mirror, MirrorUrl, URLS_MAX, chain, host_of};
use crate::memfd::{PieceMemory, SealedPiece};
use parking_lot::Mutex;
use poolfs_core::Digest;
use reqwest::header::HeaderValue;
use sha2::{Digest as _, Sha256};
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;
use tokio::time::{Instant, timeout};

/// Failures in a row after which a URL that cannot be reached is left for the next one.
const UNWELL_MAX: u32 = 2;

/// A file of which ranges are asked; one per download.
#[derive(Debug)]
pub struct RangedFile {
    digest: Digest,
    size: u64,
    urls: Vec<MirrorUrl>,
    /// Held for lookups only.
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Index of the URL that is asked now; past the end: none is left.
    at: usize,
    validator: Option<HeaderValue>,
    unwell: u32,
    /// When it last counted as unwell.
    unwell_at: Option<Instant>,
    answers: Vec<String>,
    no_ranges: bool,
}

/// Why a range did not come.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RangeError {
    /// No URL is left for this file.
    #[error("{0}")]
    Out(String),
    /// It may come if it is asked again: another URL is next, or the connection broke.
    #[error("{0}")]
    Again(String),
}

impl RangedFile {
    /// A file of `size` bytes at `urls`, best first.
    pub fn new(digest: Digest, size: u64, urls: Vec<MirrorUrl>) -> Self {
        Self { digest, size, urls: urls.into_iter().take(URLS_MAX).collect(), state: Mutex::default() }
    }

    /// The host that is asked now, or was last.
    pub fn host(&self) -> String {
        let at = self.state.lock().at.min(self.urls.len().saturating_sub(1));
        self.urls.get(at).map(|url| host_of(&url.url)).unwrap_or_default()
    }

    /// Why the URLs that are out are out, for people.
    pub fn answers(&self) -> String {
        self.state.lock().answers.join("; ")
    }

    /// Whether a URL answers a range with the whole file: it is of use as a stream only.
    pub fn knows_no_ranges(&self) -> bool {
        self.state.lock().no_ranges
    }

    /// Puts the URL at `at` aside, unless somebody did already, and says what is left.
    fn next_url(&self, at: usize, why: String) -> RangeError {
        let mut state = self.state.lock();
        if state.at == at {
            state.at += 1;
            state.validator = None;
            state.unwell = 0;
            state.unwell_at = None;
            state.answers.push(format!("{}: {why}", host_of(&self.urls[at].url)));
        }
        if state.at >= self.urls.len() { RangeError::Out(state.answers.join("; ")) } else { RangeError::Again(why) }
    }

    /// `began`: when the request did. Of those that were on their way together one counts: the line broke them all.
    fn unwell(&self, at: usize, began: Instant, why: String) -> RangeError {
        let mut state = self.state.lock();
        if state.at == at && state.unwell_at.is_none_or(|counted| began >= counted) {
            state.unwell += 1;
            state.unwell_at = Some(Instant::now());
        }
        let over = state.unwell >= UNWELL_MAX;
        drop(state);
        if over { self.next_url(at, why) } else { RangeError::Again(why) }
    }

    fn well(&self, at: usize) {
        let mut state = self.state.lock();
        if state.at == at {
            state.unwell = 0;
        }
    }
}

impl Mirror {
    /// Fetches the bytes `range`, not empty, into a sealed memfd; with their SHA-256. `first_byte` is called when they begin.
    pub async fn range(
        &self,
        file: &RangedFile,
        range: Range<u64>,
        first_byte: impl FnOnce() + Send,
    ) -> Result<(OwnedFd, Digest), RangeError> {
        let (at, validator) = {
            let state = file.state.lock();
            (state.at, state.validator.clone())
        };
        let Some(url) = file.urls.get(at) else { return Err(RangeError::Out(file.answers())) };
        let client = match self.client(url.proxy.as_deref()) {
            Ok(client) => client,
            Err(why) => return Err(file.next_url(at, why)),
        };
        let fresh = self.doubts.lock().doubted(&file.digest, &url.url);
        let asking = Asking { url, host: String::new(), client, validator, unfinished: None, breaks_left: 0, bytes_since_break: 0, fresh };
        let asked = Asked { start: range.start, end: range.end, size: file.size };
        let began = Instant::now();
        match self.one_range(file, at, &asking, &asked, first_byte).await {
            Ok(piece) => {
                file.well(at);
                Ok(piece)
            }
            Err(Failure::NoRanges(why)) => {
                file.state.lock().no_ranges = true;
                Err(file.next_url(at, why))
            }
            Err(Failure::Out(why)) => Err(file.next_url(at, why)),
            Err(Failure::Broken(why)) => {
                self.counts.breaks.fetch_add(1, Ordering::Relaxed);
                Err(file.unwell(at, began, why))
            }
            Err(Failure::Unwell(why)) => Err(file.unwell(at, began, why)),
            Err(Failure::Unwanted) => Err(RangeError::Again("nobody waits for it".to_owned())),
        }
    }

    async fn one_range(
        &self,
        file: &RangedFile,
        at: usize,
        asking: &Asking<'_>,
        asked: &Asked,
        first_byte: impl FnOnce() + Send,
    ) -> Result<(OwnedFd, Digest), Failure> {
        let mut response = self.send(asking, asked).await?;
        let body = answer::judge(response.status(), response.headers(), asked, asking.validator.as_ref())?;
        if body.end != asked.end {
            // Allowed for a stream from the start; here it would be the whole file for one piece.
            return Err(Failure::NoRanges("answers a Range with the whole file".to_owned()));
        }
        if !asking.url.immutable {
            let validator = answer::validator(response.headers());
            let mut state = file.state.lock();
            if state.at == at {
                match (&state.validator, validator) {
                    (None, Some(new)) => state.validator = Some(new),
                    // Two ranges were asked at once before there was a validator, and the file changed between them.
                    (Some(old), Some(new)) if *old != new => {
                        return Err(Failure::Out("the file was replaced between two ranges".to_owned()));
                    }
                    _ => {}
                }
            }
        }
        self.doubts.lock().gave(&file.digest, &asking.url.url);
        first_byte();
        let mut left = body.end - body.start;
        let mut memory = Some(PieceMemory::new(0, &(body.start..body.end)).map_err(no_memory)?);
        let mut hash = Sha256::new();
        let mut done = None;
        loop {
            let chunk = match timeout(self.limits.stall, response.chunk()).await {
                Err(_) => return Err(Failure::Unwell(format!("nothing came for {} s", self.limits.stall.as_secs_f32()))),
                Ok(Err(err)) => return Err(Failure::Broken(chain(err))),
                Ok(Ok(chunk)) => chunk,
            };
            let Some(mut chunk) = chunk else { break };
            self.counts.bytes.fetch_add(chunk.len() as u64, Ordering::Relaxed);
            if chunk.len() as u64 > left {
                chunk.truncate(usize::try_from(left).unwrap_or(usize::MAX));
            }
            left -= chunk.len() as u64;
            hash.update(&chunk);
            if let Some(filling) = memory.take() {
                match filling.take(&chunk).map_err(no_memory)? {
                    SealedPiece::NotYet(filling) => memory = Some(filling),
                    SealedPiece::Done(bytes) => done = Some(bytes),
                }
            } else {
                break; // More than was announced: the rest is not read.
            }
        }
        match done {
            Some(bytes) => Ok((bytes, Digest(hash.finalize().into()))),
            None => Err(Failure::Broken(format!("the answer ended {left} bytes early"))),
        }
    }
}

fn no_memory(err: std::io::Error) -> Failure {
    Failure::Unwell(format!("no memory for a piece: {err}"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;
    use std::time::Duration;

    /// A slow line breaks all requests that are on it: that is one failure, and a mirror that fails again is out.
    #[tokio::test(start_paused = true)]
    async fn what_breaks_together_counts_once() {
        let url = MirrorUrl { url: "http://192.0.2.1/p.deb".to_owned(), proxy: None, immutable: true, private: false };
        let file = RangedFile::new(Digest([1; 32]), 9, vec![url]);
        let began = Instant::now();
        tokio::time::advance(Duration::from_secs(30)).await;
        for _ in 0..4 {
            assert_eq!(file.unwell(0, began, "reset".to_owned()), RangeError::Again("reset".to_owned()));
        }
        let again = Instant::now();
        tokio::time::advance(Duration::from_secs(1)).await;
        assert_eq!(file.unwell(0, again, "reset".to_owned()), RangeError::Out("192.0.2.1: reset".to_owned()));
    }
}
