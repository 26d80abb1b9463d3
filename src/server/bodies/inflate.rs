//! Decompresses gzip and deflate in pieces. The output is counted as it grows, so that a decompression bomb stops at
//! the limit.

use std::io::{self, Write};

use flate2::write::GzDecoder;
use flate2::{Decompress, FlushDecompress, Status};

use super::super::status::{ApiError, Code};
use super::budget::Charge;
use super::too_large;

/// Most members of a gzip body: each costs a new decoder, even if it is empty.
const MEMBERS: usize = 4096;

/// Bytes that the decoder writes at a time.
const PIECE: usize = 16 * 1024;

/// The output so far.
#[derive(Debug)]
pub(in crate::server) struct Inflated {
    pub(super) bytes: Vec<u8>,
    pub(super) charge: Charge,
    limit: usize,
    refused: Option<ApiError>,
}

impl Write for Inflated {
    fn write(&mut self, piece: &[u8]) -> io::Result<usize> {
        if self.refused.is_none() && piece.len() > self.limit - self.bytes.len() {
            self.refused = Some(too_large());
        }
        if self.refused.is_none() {
            self.refused = self.charge.grow(piece.len()).err();
        }
        if self.refused.is_some() {
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.bytes.extend_from_slice(piece);
        Ok(piece.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A decompression in progress.
pub(in crate::server) enum Inflater {
    Gzip { member: GzDecoder<Inflated>, members: usize, begun: bool },
    Zlib { stream: Decompress, out: Inflated, begun: bool, ended: bool },
}

impl Inflater {
    /// For gzip; the output is at most `limit` bytes and is charged to `charge`.
    pub(in crate::server) fn gzip(limit: usize, charge: Charge) -> Self {
        let out = Inflated { bytes: Vec::new(), charge, limit, refused: None };
        Self::Gzip { member: GzDecoder::new(out), members: 1, begun: false }
    }

    /// For zlib, which HTTP and gRPC call deflate; the output is at most `limit` bytes and is charged to `charge`.
    pub(super) fn zlib(limit: usize, charge: Charge) -> Self {
        let out = Inflated { bytes: Vec::new(), charge, limit, refused: None };
        Self::Zlib { stream: Decompress::new(true), out, begun: false, ended: false }
    }

    /// Decompresses the next bytes.
    pub(in crate::server) fn push(&mut self, mut piece: &[u8]) -> Result<(), ApiError> {
        match self {
            Self::Gzip { member, members, begun } => {
                while !piece.is_empty() {
                    *begun = true;
                    match member.write(piece) {
                        Ok(0) => {
                            // this member is complete, and another follows
                            member.try_finish().map_err(|error| broken(member.get_mut(), &error))?;
                            *members += 1;
                            if *members > MEMBERS {
                                let text = format!("the body is more than {MEMBERS} members of gzip; send it as one");
                                return Err(ApiError::new(Code::InvalidRequest, text));
                            }
                            let out = member.get_mut();
                            let empty =
                                Inflated { bytes: Vec::new(), charge: out.charge.none(), limit: 0, refused: None };
                            let out = std::mem::replace(out, empty);
                            *member = GzDecoder::new(out);
                        }
                        Ok(taken) => piece = &piece[taken..],
                        Err(error) => return Err(broken(member.get_mut(), &error)),
                    }
                }
                Ok(())
            }
            Self::Zlib { stream, out, begun, ended } => {
                let mut buffer = [0; PIECE];
                *begun |= !piece.is_empty();
                loop {
                    if *ended {
                        let junk = io::Error::new(io::ErrorKind::InvalidData, "bytes follow its end");
                        return if piece.is_empty() { Ok(()) } else { Err(broken(out, &junk)) };
                    }
                    let (before_in, before_out) = (stream.total_in(), stream.total_out());
                    let status = stream.decompress(piece, &mut buffer, FlushDecompress::None);
                    let status = status.map_err(|e| broken(out, &io::Error::new(io::ErrorKind::InvalidData, e)))?;
                    // can't truncate: both are at most the slices' lengths
                    let (taken, made) =
                        ((stream.total_in() - before_in) as usize, (stream.total_out() - before_out) as usize);
                    piece = &piece[taken..];
                    out.write_all(&buffer[..made]).map_err(|error| broken(out, &error))?;
                    *ended = status == Status::StreamEnd;
                    if !*ended && taken == 0 && made == 0 {
                        return Ok(());
                    }
                }
            }
        }
    }

    /// The output and its charge, or an error if the input was incomplete.
    pub(in crate::server) fn finish(self) -> Result<(Vec<u8>, Charge), ApiError> {
        let out = match self {
            Self::Gzip { mut member, begun, .. } => {
                if begun {
                    member.try_finish().map_err(|error| broken(member.get_mut(), &error))?;
                }
                let out = member.get_mut();
                let empty = Inflated { bytes: Vec::new(), charge: out.charge.none(), limit: 0, refused: None };
                std::mem::replace(out, empty)
            }
            Self::Zlib { mut out, begun, ended, .. } => {
                if begun && !ended {
                    return Err(broken(&mut out, &io::ErrorKind::UnexpectedEof.into()));
                }
                out
            }
        };
        Ok((out.bytes, out.charge))
    }
}

/// The error of a failed decompression: the limit's, or one of the bytes.
fn broken(out: &mut Inflated, error: &io::Error) -> ApiError {
    let by_its_bytes = || {
        let text = format!("the body can't be read: it is not what its encoding says, or is cut short ({error})");
        ApiError::new(Code::InvalidRequest, text)
    };
    out.refused.take().unwrap_or_else(by_its_bytes)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use flate2::Compression;
    use flate2::write::{GzEncoder, ZlibEncoder};

    use super::super::budget::BodyBudget;
    use super::*;
    use crate::metrics::Metrics;

    fn charge(bytes: usize) -> Charge {
        BodyBudget::new(bytes, &Arc::new(Metrics::new())).charge()
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
        encoder.write_all(bytes).expect("memory");
        encoder.finish().expect("memory")
    }

    fn zlib(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = ZlibEncoder::new(Vec::new(), Compression::fast());
        encoder.write_all(bytes).expect("memory");
        encoder.finish().expect("memory")
    }

    fn inflate(mut inflater: Inflater, bytes: &[u8], at_a_time: usize) -> Result<Vec<u8>, Code> {
        bytes.chunks(at_a_time).try_for_each(|piece| inflater.push(piece)).map_err(|e| e.code)?;
        inflater.finish().map(|(bytes, _)| bytes).map_err(|e| e.code)
    }

    #[test]
    fn whole_streams_come_out_whole_however_they_are_cut() {
        let text: Vec<u8> = (0..100_000_u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8 & 15).collect();
        let members = [gzip(&text[..10]), gzip(b""), gzip(&text[10..])].concat();
        for at_a_time in [1, 7, 1000, usize::MAX] {
            let room = || charge(1 << 20);
            assert_eq!(inflate(Inflater::gzip(1 << 20, room()), &gzip(&text), at_a_time).as_ref(), Ok(&text));
            assert_eq!(inflate(Inflater::gzip(1 << 20, room()), &members, at_a_time).as_ref(), Ok(&text));
            assert_eq!(inflate(Inflater::zlib(1 << 20, room()), &zlib(&text), at_a_time).as_ref(), Ok(&text));
            assert_eq!(inflate(Inflater::gzip(100_000, room()), &gzip(&text), at_a_time).as_ref(), Ok(&text));
            for limit in [0, 1, 99_999] {
                let (gzip, zlib) = (gzip(&text), zlib(&text));
                assert_eq!(inflate(Inflater::gzip(limit, room()), &gzip, at_a_time), Err(Code::BodyTooLarge));
                assert_eq!(inflate(Inflater::zlib(limit, room()), &zlib, at_a_time), Err(Code::BodyTooLarge));
            }
            assert_eq!(inflate(Inflater::gzip(1 << 20, charge(9999)), &gzip(&text), at_a_time), Err(Code::Overloaded));
            assert_eq!(inflate(Inflater::zlib(1 << 20, charge(9999)), &zlib(&text), at_a_time), Err(Code::Overloaded));
        }
        for inflater in [Inflater::gzip(9, charge(9)), Inflater::zlib(9, charge(9))] {
            assert_eq!(inflate(inflater, b"", 1), Ok(vec![]), "nothing at all is an empty body");
        }
    }

    #[test]
    fn what_is_cut_short_or_followed_by_junk_is_refused() {
        let (gzip, zlib) = (gzip(b"some text, some text"), zlib(b"some text, some text"));
        for length in 1..gzip.len() {
            let cut = inflate(Inflater::gzip(99, charge(99)), &gzip[..length], 5);
            assert_eq!(cut, Err(Code::InvalidRequest), "{length} of {}", gzip.len());
        }
        for length in 1..zlib.len() {
            let cut = inflate(Inflater::zlib(99, charge(99)), &zlib[..length], 5);
            assert_eq!(cut, Err(Code::InvalidRequest), "{length} of {}", zlib.len());
        }
        let mut damaged = gzip.clone();
        damaged[gzip.len() - 6] ^= 1;
        for junk in [[&gzip[..], b"junk"].concat(), damaged, b"plain".to_vec(), zlib.clone()] {
            assert_eq!(inflate(Inflater::gzip(99, charge(99)), &junk, 5), Err(Code::InvalidRequest), "{junk:?}");
        }
        for junk in [[&zlib[..], b"junk"].concat(), b"plain".to_vec(), gzip, zlib[2..].to_vec()] {
            assert_eq!(inflate(Inflater::zlib(99, charge(99)), &junk, 5), Err(Code::InvalidRequest), "{junk:?}");
        }
    }

    #[test]
    fn members_are_limited() {
        let empty = gzip(b"");
        let of = |members: usize| inflate(Inflater::gzip(9, charge(9)), &empty.repeat(members), 4000);
        assert_eq!((of(MEMBERS), of(MEMBERS + 1)), (Ok(vec![]), Err(Code::InvalidRequest)));
    }
}
