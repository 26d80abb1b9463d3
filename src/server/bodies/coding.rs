//! Compression of a body or a message, as its headers declare it.

use axum::http::HeaderMap;
use axum::http::header::{self, HeaderName};

use super::super::status::{ApiError, Code, cut};

/// gRPC's header for the compression of messages.
pub(in crate::server) const GRPC_ENCODING: HeaderName = HeaderName::from_static("grpc-encoding");

/// A content coding.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::server) enum Coding {
    /// Not compressed.
    Identity,
    /// gzip, one or more members.
    Gzip,
    /// A zlib stream.
    Deflate,
}

impl Coding {
    /// The coding of a name, which is case-insensitive.
    fn named(name: &str) -> Option<Self> {
        let is = |other: &&str| name.eq_ignore_ascii_case(other);
        let known =
            [("identity", Self::Identity), ("gzip", Self::Gzip), ("x-gzip", Self::Gzip), ("deflate", Self::Deflate)];
        known.into_iter().find(|(other, _)| is(other)).map(|(_, coding)| coding)
    }

    /// A body's coding, by `content-encoding`. At most one: each further coding could multiply a decompression bomb.
    pub(in crate::server) fn of_body(headers: &HeaderMap) -> Result<Self, ApiError> {
        Self::of(headers, &header::CONTENT_ENCODING)
    }

    /// The coding of a call's compressed messages, by `grpc-encoding`.
    pub(in crate::server) fn of_messages(headers: &HeaderMap) -> Result<Self, ApiError> {
        Self::of(headers, &GRPC_ENCODING)
    }

    fn of(headers: &HeaderMap, name: &HeaderName) -> Result<Self, ApiError> {
        let mut found = Self::Identity;
        for value in headers.get_all(name) {
            let text = String::from_utf8_lossy(value.as_bytes());
            for said in text.split(',').map(str::trim).filter(|said| !said.is_empty()) {
                let refuse = |why: String| ApiError::new(Code::UnsupportedMediaType, why);
                let coding = Self::named(said).ok_or_else(|| {
                    let shown = cut(said);
                    refuse(format!("`{name}: {shown}` is not taken; send it plain, as gzip or as deflate"))
                })?;
                found = match (found, coding) {
                    (one, Self::Identity) | (Self::Identity, one) => one,
                    _ => {
                        let shown = cut(&text);
                        return Err(refuse(format!("`{name}: {shown}` is more than one coding; send one")));
                    }
                };
            }
        }
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;

    use super::*;

    #[test]
    fn codings_by_name() {
        let of = |values: &[&str]| {
            let values = values.iter().map(|v| (header::CONTENT_ENCODING, HeaderValue::from_str(v).expect("value")));
            Coding::of_body(&values.collect())
        };
        for plain in [&[][..], &[""], &["identity"], &["Identity"], &["identity, identity"], &[" , "]] {
            assert_eq!(of(plain).expect("plain"), Coding::Identity, "{plain:?}");
        }
        for gzip in [&["gzip"][..], &["GZIP"], &["x-gzip"], &["X-Gzip"], &["identity, gzip"], &["", "gzip"]] {
            assert_eq!(of(gzip).expect("gzip"), Coding::Gzip, "{gzip:?}");
        }
        assert_eq!(of(&["Deflate"]).expect("deflate"), Coding::Deflate);
        for bad in [&["br"][..], &["gzip, gzip"], &["gzip", "deflate"], &["gzip;q=1"], &["zstd, identity"]] {
            let error = of(bad).expect_err("refused");
            assert_eq!(error.code, Code::UnsupportedMediaType);
            let named = bad.iter().any(|value| error.message.contains(value.split(',').next().unwrap_or_default()));
            assert!(named, "{}", error.message);
        }
    }
}
