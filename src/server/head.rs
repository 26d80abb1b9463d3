//! Checks every request's head, on every port: one host, one body length, at most one key, and a bounded size.
//!
//! Ambiguous heads are refused: a proxy in front may have read them differently.

use axum::extract::Request;
use axum::http::uri::Authority;
use axum::http::{HeaderMap, HeaderName, Version, header};
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};

use super::accept::HEAD_LIMIT;
use super::doors;
use super::status::{ApiError, Code};

/// Most bytes of a request's path and query.
const LINE_LIMIT: usize = 8 * 1024;

/// The middleware.
pub(super) async fn check(request: Request, next: Next) -> Response {
    let error = match fault(&request) {
        None => return next.run(request).await,
        Some(error) => error,
    };
    if doors::is_grpc(&request) { error.into_status().into_http() } else { error.into_response() }
}

/// Why a request is refused; `None`: its head is fine.
pub(super) fn fault<B>(request: &axum::http::Request<B>) -> Option<ApiError> {
    let headers = request.headers();
    too_large(headers).or_else(|| line_too_long(request)).or_else(|| ambiguous(request))
}

fn too_large(headers: &HeaderMap) -> Option<ApiError> {
    let bytes: usize = headers.iter().map(|(name, value)| name.as_str().len() + value.len() + 4).sum();
    let text = || format!("the headers are {bytes} bytes; at most {HEAD_LIMIT} are taken, send fewer or shorter ones");
    (bytes > HEAD_LIMIT).then(|| ApiError::new(Code::HeadTooLarge, text()))
}

fn line_too_long<B>(request: &axum::http::Request<B>) -> Option<ApiError> {
    let length = request.uri().path_and_query().map_or(0, |asked| asked.as_str().len());
    let text = || format!("path and query are {length} bytes; at most {LINE_LIMIT} are taken, send data in the body");
    (length > LINE_LIMIT).then(|| ApiError::new(Code::UriTooLong, text()))
}

fn ambiguous<B>(request: &axum::http::Request<B>) -> Option<ApiError> {
    let refuse = |text: String| Some(ApiError::new(Code::InvalidRequest, text));
    let headers = request.headers();
    for name in [header::HOST, header::AUTHORIZATION, header::CONTENT_LENGTH, header::CONTENT_TYPE] {
        if count(headers, &name) > 1 {
            return refuse(format!("the header `{name}` came more than once; send it once"));
        }
    }
    let host = headers.get(header::HOST).map(|host| host.to_str().ok().and_then(authority));
    match (host, request.version()) {
        (Some(None), _) => return refuse("the header `host` is no host, such as example.org:8000".into()),
        (None, Version::HTTP_11) => return refuse("the header `host` is missing; HTTP/1.1 asks for it".into()),
        (Some(Some(host)), Version::HTTP_2) if request.uri().authority().is_some_and(|asked| *asked != host) => {
            return refuse("`:authority` and the header `host` differ; send one of them".into());
        }
        _ => {}
    }
    let codings = headers.get_all(header::TRANSFER_ENCODING);
    if codings.iter().any(|coding| !coding.as_bytes().eq_ignore_ascii_case(b"chunked")) || codings.iter().count() > 1 {
        return refuse("the only transfer-encoding that is taken is chunked; compress with content-encoding".into());
    }
    None
}

fn count(headers: &HeaderMap, name: &HeaderName) -> usize {
    headers.get_all(name).iter().count()
}

/// A host with an optional port, without user information. Accepts only the characters that host names use, not all
/// that RFC 3986 allows.
fn authority(text: &str) -> Option<Authority> {
    let authority: Authority = text.parse().ok()?;
    let host = authority.host();
    let port = text.strip_prefix(host)?;
    let (address, name) = (host.starts_with('['), |b: u8| b.is_ascii_alphanumeric() || b"-._~%".contains(&b));
    let plain = address || !host.is_empty() && host.bytes().all(name);
    let fits = match port.strip_prefix(':') {
        None => port.is_empty(),
        Some(number) => number.is_empty() || number.parse::<u16>().is_ok(),
    };
    (plain && fits).then_some(authority)
}

#[cfg(test)]
mod tests {
    use axum::http::Request;

    use super::*;

    fn refused(version: Version, uri: &str, headers: &[(&'static str, &str)]) -> bool {
        let mut request = Request::builder().version(version).uri(uri);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        fault(&request.body(()).expect("request")).is_some()
    }

    #[test]
    fn a_host_is_one_host() {
        for good in ["a", "a.test", "a:80", "a:", "127.0.0.1:8000", "[::1]", "[::1]:8000", "a_b.test"] {
            assert!(!refused(Version::HTTP_11, "/", &[("host", good)]), "{good}");
        }
        for bad in ["", " ", "a b", "a,b", "a/b", "a:x", "a:99999", "u@a", "a@", "[::1", "::1", "a?b", "ä"] {
            assert!(refused(Version::HTTP_11, "/", &[("host", bad)]), "{bad}");
            assert!(refused(Version::HTTP_2, "/", &[("host", bad)]), "{bad}");
        }
        assert!(refused(Version::HTTP_11, "/", &[]));
        assert!(refused(Version::HTTP_11, "/", &[("host", "a"), ("host", "a")]));
        assert!(!refused(Version::HTTP_10, "/", &[]) && !refused(Version::HTTP_2, "http://a/", &[]));
        assert!(!refused(Version::HTTP_2, "http://a/", &[("host", "a")]));
        assert!(refused(Version::HTTP_2, "http://a/", &[("host", "b")]));
    }

    #[test]
    fn what_could_be_read_in_two_ways_is_refused() {
        let with = |more: &[(&'static str, &str)]| refused(Version::HTTP_11, "/", &[&[("host", "a")], more].concat());
        assert!(!with(&[("transfer-encoding", "Chunked")]) && !with(&[("authorization", "Bearer x")]));
        for bad in [
            &[("transfer-encoding", "gzip, chunked")][..],
            &[("transfer-encoding", "gzip"), ("transfer-encoding", "chunked")],
            &[("transfer-encoding", "chunked, chunked")],
            &[("authorization", "Bearer x"), ("authorization", "Bearer y")],
            &[("content-type", "image/png"), ("content-type", "application/json")],
        ] {
            assert!(with(bad), "{bad:?}");
        }
    }
}
