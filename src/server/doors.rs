//! The only place that decides which protocol and which kind of route a request is for, by its path and content type.

use axum::http::{Request, header};

use crate::metrics::Protocol;

/// The protocol that a path belongs to.
pub(super) fn protocol(path: &str) -> Protocol {
    const HEALTH: [&str; 4] = [
        "/v2/health/",
        "/grpc.health.v1.Health/",
        "/inference.GRPCInferenceService/ServerLive",
        "/inference.GRPCInferenceService/ServerReady",
    ];
    if HEALTH.iter().any(|health| path.starts_with(health)) {
        Protocol::Health
    } else if path.starts_with("/v1/") {
        Protocol::Rest
    } else if path == "/v2" || path.starts_with("/v2/") {
        Protocol::OipHttp
    } else if path.starts_with("/inference.GRPCInferenceService/") {
        Protocol::Grpc
    } else {
        Protocol::Other
    }
}

/// Whether it is a gRPC request.
pub(super) fn is_grpc<B>(request: &Request<B>) -> bool {
    let kind = request.headers().get(header::CONTENT_TYPE);
    kind.is_some_and(|kind| kind.as_bytes().starts_with(b"application/grpc"))
}

/// Whether a path is a health check.
pub(super) fn is_health(path: &str) -> bool {
    protocol(path) == Protocol::Health
}

/// Whether a path belongs to a page for people; these need no API key, as they hold no data.
pub(super) fn is_page(path: &str) -> bool {
    const PAGES: [&str; 3] = ["/", "/docs", "/openapi.json"];
    PAGES.contains(&path) || ["/docs/", "/page/"].iter().any(|folder| path.starts_with(folder))
}
