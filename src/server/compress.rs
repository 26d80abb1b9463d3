//! Compresses responses with gzip for clients that accept it.
//!
//! Whole responses, on the parsing threads: a streaming compressor would keep some hundred kilobytes per response for
//! as long as its client does not read, and would work on the async I/O threads.

use std::io::Write as _;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use axum::body::{Body, Bytes, HttpBody as _};
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, header};
use axum::middleware::Next;
use axum::response::Response;
use flate2::Compression;
use flate2::write::GzEncoder;
use http_body::{Frame, SizeHint};
use http_body_util::BodyExt as _;

use super::app::App;
use super::deadline;
use super::doors;
use super::status::ApiError;

/// Least bytes of a response that is compressed.
const LEAST: u64 = 1024;

/// The middleware.
pub(super) async fn gzip(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    // pages are in memory once for all clients, but would be compressed for each of them
    let takes = takes_gzip(request.headers()) && !doors::is_page(request.uri().path());
    let deadline = deadline::http(request.headers(), app.request_timeout);
    let mut response = next.run(request).await;
    let length = response.body().size_hint().exact().unwrap_or(0);
    let kind = response.headers().get(header::CONTENT_TYPE);
    let is_picture = kind.is_some_and(|kind| kind.as_bytes().starts_with(b"image/"));
    if is_picture || length < LEAST || response.headers().contains_key(header::CONTENT_ENCODING) {
        return response;
    }
    response.headers_mut().append(header::VARY, HeaderValue::from(header::ACCEPT_ENCODING));
    let (true, Ok(deadline)) = (takes, deadline) else { return response };
    let (mut head, mut body) = response.into_parts();
    // a body of known length is one frame in memory
    let Some(Ok(Ok(plain))) = body.frame().await.map(|frame| frame.map(Frame::into_data)) else {
        return Response::from_parts(head, body);
    };
    let length = plain.len();
    let shown = plain.clone();
    let packed = app.bodies.threads.run(length, deadline, move || {
        let mut encoder = GzEncoder::new(Vec::with_capacity(shown.len() / 4), Compression::fast());
        let packed = encoder.write_all(&shown).and_then(|()| encoder.finish());
        packed.map_err(|e| ApiError::internal(format!("an answer can't be compressed: {e}")))
    });
    let bytes = match packed.await {
        Ok(packed) => {
            head.headers.insert(header::CONTENT_ENCODING, HeaderValue::from_static("gzip"));
            head.headers.remove(header::CONTENT_LENGTH);
            packed.into()
        }
        // the deadline passed: send it uncompressed
        Err(_) => plain,
    };
    Response::from_parts(head, Body::new(Instead { bytes: Some(bytes), _plain: body }))
}

/// Whether `accept-encoding` accepts `gzip`, by name or by `*`, and not with `q=0`.
fn takes_gzip(headers: &HeaderMap) -> bool {
    let weight = ["gzip", "x-gzip", "*"].into_iter().find_map(|name| weight(headers, name));
    weight.is_some_and(|weight| weight > 0.0)
}

/// The weight (`q`) of a named coding.
fn weight(headers: &HeaderMap, wanted: &str) -> Option<f32> {
    for value in headers.get_all(header::ACCEPT_ENCODING) {
        for coding in value.to_str().unwrap_or_default().split(',') {
            let mut parts = coding.split(';').map(str::trim);
            if parts.next().is_some_and(|name| name.eq_ignore_ascii_case(wanted)) {
                let weight = parts.find_map(|part| part.strip_prefix("q="));
                return Some(weight.and_then(|weight| weight.parse().ok()).unwrap_or(1.0));
            }
        }
    }
    None
}

/// A compressed body. It keeps the plain body, and with it the budget charge, until it is dropped.
struct Instead {
    bytes: Option<Bytes>,
    _plain: Body,
}

impl http_body::Body for Instead {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Poll::Ready(self.bytes.take().map(|bytes| Ok(Frame::data(bytes))))
    }

    fn is_end_stream(&self) -> bool {
        self.bytes.is_none()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.bytes.as_ref().map_or(0, |bytes| bytes.len() as u64))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gzip_is_sent_to_those_who_take_it() {
        let takes = |value: &'static str| {
            takes_gzip(&HeaderMap::from_iter([(header::ACCEPT_ENCODING, HeaderValue::from_static(value))]))
        };
        for yes in ["gzip", "GZIP", "x-gzip", "br, gzip;q=0.5", "deflate,*", "gzip; q=0.1, *;q=0"] {
            assert!(takes(yes), "{yes}");
        }
        for no in ["", "br", "identity", "gzip;q=0", "gzip;q=0, *", "gzip; q=0.0", "*;q=0", "gzippy"] {
            assert!(!takes(no), "{no}");
        }
        assert!(!takes_gzip(&HeaderMap::new()));
    }
}
