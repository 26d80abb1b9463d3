//! Limits HTTP/2 frames that carry no request and no body (PING, SETTINGS, empty DATA …).
//!
//! They cost their sender nothing, and h2 answers each of them. A client needs some for each request and each part of a
//! body or response; far more than that is a flood.

use std::time::Instant;

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Bytes of bodies and responses that allow one such frame.
const BYTES: u64 = 256;
/// Frames that a new connection may send at once; also the most that a connection can save up.
const SAVED: u64 = 10_000;
/// Frames allowed per second without any request.
const A_SECOND: u64 = 1000;
/// Frames allowed per request.
const A_REQUEST: u64 = 20;
/// Least frames allowed per DATA frame that is not empty.
const A_PART: u64 = 4;

/// Follows the bytes that a client sends, and keeps its allowance of frames.
#[derive(Debug)]
pub(super) struct Frames {
    /// Bytes of the HTTP/2 preface received so far; `None`: the connection is not HTTP/2.
    preface: Option<usize>,
    head: [u8; 9],
    filled: usize,
    /// Bytes of the current frame's payload still to come.
    payload: usize,
    /// The allowance left, in bytes (`BYTES` per frame).
    credit: u64,
    since: Instant,
}

impl Frames {
    /// The allowance of a new connection.
    pub(super) fn new(since: Instant) -> Self {
        Self { preface: Some(0), head: [0; 9], filled: 0, payload: 0, credit: SAVED * BYTES, since }
    }

    /// Adds to the allowance for bytes sent to the client.
    pub(super) fn sent(&mut self, bytes: usize) {
        self.earn(bytes as u64);
    }

    /// Follows bytes from the client; whether they hold more frames than allowed.
    pub(super) fn flood(&mut self, mut bytes: &[u8], now: Instant) -> bool {
        let Some(preface) = self.preface else { return false };
        if preface < PREFACE.len() {
            let begun = bytes.len().min(PREFACE.len() - preface);
            if bytes[..begun] != PREFACE[preface..preface + begun] {
                self.preface = None;
                return false;
            }
            self.preface = Some(preface + begun);
            bytes = &bytes[begun..];
        }
        let millis = now.duration_since(self.since).as_millis() as u64;
        if millis > 0 {
            self.earn(millis * A_SECOND * BYTES / 1000);
            self.since = now;
        }
        while !bytes.is_empty() {
            if self.payload > 0 {
                let skipped = bytes.len().min(self.payload);
                self.payload -= skipped;
                bytes = &bytes[skipped..];
                continue;
            }
            self.head[self.filled] = bytes[0];
            self.filled += 1;
            bytes = &bytes[1..];
            if self.filled == self.head.len() {
                self.filled = 0;
                if !self.pay() {
                    return true;
                }
            }
        }
        false
    }

    fn earn(&mut self, bytes: u64) {
        self.credit = self.credit.saturating_add(bytes).min(SAVED * BYTES);
    }

    /// Charges the frame whose header is complete; whether the allowance covered it.
    fn pay(&mut self) -> bool {
        const DATA: u8 = 0;
        const HEADERS: u8 = 1;
        const END_STREAM: u8 = 1;
        let [a, b, c, kind, flags, ..] = self.head;
        self.payload = usize::from(a) << 16 | usize::from(b) << 8 | usize::from(c);
        match kind {
            HEADERS => self.earn(A_REQUEST * BYTES),
            DATA if self.payload > 0 => self.earn((self.payload as u64).max(A_PART * BYTES)),
            DATA if flags & END_STREAM != 0 => {}
            _ => match self.credit.checked_sub(BYTES) {
                Some(left) => self.credit = left,
                None => return false,
            },
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(kind: u8, payload: usize) -> Vec<u8> {
        let mut bytes = vec![0, (payload >> 8) as u8, payload as u8, kind, 0, 0, 0, 0, 1];
        bytes.extend(vec![0; payload]);
        bytes
    }

    /// Floods are found however the bytes are split, and only in HTTP/2.
    #[test]
    fn only_floods_are_floods() {
        for size in [1, 7, 9, 17, 4096] {
            let follow = |bytes: &[u8]| {
                let now = Instant::now();
                let mut frames = Frames::new(now);
                bytes.chunks(size).any(|part| frames.flood(part, now))
            };
            let ping = frame(6, 8);
            let begun = |rest: Vec<u8>| [PREFACE, &rest].concat();
            assert!(!follow(&begun(ping.repeat(SAVED as usize))), "{size}");
            assert!(follow(&begun(ping.repeat(SAVED as usize + 1))), "{size}");
            assert!(follow(&begun(frame(0, 0).repeat(SAVED as usize + 1))), "{size}: empty parts");
            // 20 frames for each request, and for each part of a body as many as its size allows
            let request = [frame(1, 30), ping.repeat(20)].concat();
            assert!(!follow(&begun(request.repeat(2000))), "{size}");
            let part = [frame(0, 16_000), frame(8, 4).repeat(60)].concat();
            assert!(!follow(&begun(part.repeat(400))), "{size}");
            let request = [frame(1, 30), ping.repeat(30)].concat();
            assert!(follow(&begun(request.repeat(2000))), "{size}");
            assert!(!follow(&ping.repeat(SAVED as usize + 1)), "{size}: no HTTP/2");
        }
    }

    #[test]
    fn time_and_answers_allow_frames() {
        let now = Instant::now();
        let used_up = || {
            let mut frames = Frames::new(now);
            assert!(!frames.flood(PREFACE, now) && !frames.flood(&frame(6, 8).repeat(SAVED as usize), now));
            frames
        };
        let (mut frames, later) = (used_up(), now + std::time::Duration::from_secs(2));
        assert!(!frames.flood(&frame(6, 8).repeat(2 * A_SECOND as usize), later));
        assert!(frames.flood(&frame(6, 8), later));
        let mut frames = used_up();
        frames.sent(10 * BYTES as usize);
        assert!(!frames.flood(&frame(8, 4).repeat(10), now) && frames.flood(&frame(8, 4), now));
    }
}
