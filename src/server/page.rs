//! The web page: a few files, compiled in, and the headers that restrict it and `/docs` to this server.
//!
//! The page is a client of the routes like any other. Its URLs are relative, so that a proxy may serve everything under
//! a prefix.

use axum::Router;
use axum::http::{HeaderName, HeaderValue, header};
use axum::response::Response;
use axum::routing::{MethodRouter, get};
use bytes::Bytes;

use super::accept::Accounted;

/// Content security policy: scripts, styles and requests only from and to this server; images also from the page's
/// memory (thumbnails).
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; \
                      connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// The same for `/docs`, whose script sets inline styles and uses `data:` images.
const DOCS_POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; \
                           img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; \
                           frame-ancestors 'none'";

/// `/` and the files that it loads.
pub(super) fn routes<S: Clone + Send + Sync + 'static>() -> Router<S> {
    Router::new()
        .route("/", file("text/html; charset=utf-8", include_str!("page/page.html")))
        .route("/page/page.css", file("text/css; charset=utf-8", include_str!("page/page.css")))
        .route("/page/page.js", file("text/javascript; charset=utf-8", include_str!("page/page.js")))
        .route("/page/sample.jpg", file("image/jpeg", include_bytes!("page/sample.jpg").as_slice()))
        .route("/page/icon.svg", file("image/svg+xml", include_str!("page/icon.svg")))
        .layer(axum::middleware::map_response(async |response| guarded(response, POLICY)))
}

/// Adds the headers that restrict `/docs` to this server.
pub(super) async fn guard_docs(response: Response) -> Response {
    let mut response = guarded(response, DOCS_POLICY);
    // its files are part of the executable, so they use no memory per response
    response.extensions_mut().insert(Accounted);
    response
}

fn guarded(mut response: Response, policy: &'static str) -> Response {
    let headers: [(HeaderName, &'static str); 4] = [
        (header::CONTENT_SECURITY_POLICY, policy),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        // a new version of the server brings a new page
        (header::CACHE_CONTROL, "no-cache"),
    ];
    for (name, value) in headers {
        response.headers_mut().insert(name, HeaderValue::from_static(value));
    }
    response
}

fn file<S: Clone + Send + Sync + 'static>(kind: &'static str, bytes: impl Into<Bytes>) -> MethodRouter<S> {
    let bytes = bytes.into();
    get(async move || ([(header::CONTENT_TYPE, kind)], bytes))
}
