//! A connection that ends when its receiver takes too little.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep, sleep_until};

/// Judges what the receiver takes against the time spent waiting for it; time in which nothing was to send does not count.
#[derive(Debug)]
pub(super) struct Drained {
    stream: TcpStream,
    window: Duration,
    bytes_min: u64,
    /// Time waited in this window, before `since`.
    waited: Duration,
    /// Bytes taken in this window.
    bytes: u64,
    since: Option<Instant>,
    alarm: Option<Pin<Box<Sleep>>>,
}

impl Drained {
    pub(super) fn new(stream: TcpStream, window: Duration, bytes_s_min: u64) -> Self {
        let bytes_min = bytes_s_min.saturating_mul(window.as_secs().max(1));
        Self { stream, window, bytes_min, waited: Duration::ZERO, bytes: 0, since: None, alarm: None }
    }

    /// What became of a write that gave `result`.
    fn judge(&mut self, cx: &mut Context<'_>, result: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        let now = Instant::now();
        let Poll::Pending = result else {
            if let Some(since) = self.since.take() {
                self.waited += now - since;
                self.alarm = None;
            }
            if let Poll::Ready(Ok(len)) = result {
                self.bytes += len as u64;
            }
            if self.waited >= self.window {
                self.end_window()?;
            }
            return result;
        };
        loop {
            let since = *self.since.get_or_insert(now);
            let left = self.window.saturating_sub(self.waited);
            let alarm = self.alarm.get_or_insert_with(|| Box::pin(sleep_until(since + left)));
            ready!(alarm.as_mut().poll(cx));
            self.end_window()?;
            self.since = Some(Instant::now());
            self.alarm = None;
        }
    }

    fn end_window(&mut self) -> io::Result<()> {
        let slow = self.bytes < self.bytes_min;
        self.waited = Duration::ZERO;
        self.bytes = 0;
        if slow { Err(io::Error::new(io::ErrorKind::TimedOut, "the receiver takes too little")) } else { Ok(()) }
    }
}

impl AsyncRead for Drained {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Drained {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.stream).poll_write(cx, buf);
        self.judge(cx, result)
    }

    fn poll_write_vectored(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bufs: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.stream).poll_write_vectored(cx, bufs);
        self.judge(cx, result)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
