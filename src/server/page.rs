//! The web page: a few files, compiled in, and the headers that keep it to this server.
//!
//! The page is a client of the routes like any other; nothing here knows what it does. Its addresses are relative, so
//! that a proxy may put everything under a prefix.

use axum::Router;
use axum::http::{HeaderName, HeaderValue, header};
use axum::response::IntoResponse;
use axum::routing::{MethodRouter, get};

/// Scripts, styles and calls only from and to this server; images also from the page's own memory (the thumbnails).
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; \
                      connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// `/` and what it loads.
pub(super) fn routes<S: Clone + Send + Sync + 'static>() -> Router<S> {
    Router::new()
        .route("/", file("text/html; charset=utf-8", include_str!("page/page.html")))
        .route("/page/page.css", file("text/css; charset=utf-8", include_str!("page/page.css")))
        .route("/page/page.js", file("text/javascript; charset=utf-8", include_str!("page/page.js")))
        .route("/page/icon.svg", file("image/svg+xml", include_str!("page/icon.svg")))
}

fn file<S: Clone + Send + Sync + 'static>(kind: &'static str, text: &'static str) -> MethodRouter<S> {
    let headers: [(HeaderName, HeaderValue); 5] = [
        (header::CONTENT_TYPE, HeaderValue::from_static(kind)),
        (header::CONTENT_SECURITY_POLICY, HeaderValue::from_static(POLICY)),
        (header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff")),
        (header::REFERRER_POLICY, HeaderValue::from_static("no-referrer")),
        // a new version of the server brings a new page
        (header::CACHE_CONTROL, HeaderValue::from_static("no-cache")),
    ];
    get(async move || (headers, text).into_response())
}
