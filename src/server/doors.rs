//! The only place that decides which protocol and which kind of route a request is for, by its path and content type.

use axum::http::{Method, Request, header};

use crate::metrics::Protocol;

/// Platforms whose contracts are answered beside the server's own.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Hosts {
    /// `/ping` and `/invocations`.
    pub sagemaker: bool,
    /// The addresses that Vertex AI names.
    pub vertex: Option<VertexRoutes>,
    /// `POST /` and `/health`.
    pub huggingface: bool,
    /// `/v1/models`.
    pub kserve_v1: bool,
    /// `/ping` and `/predictions`.
    pub torchserve: bool,
}

/// Addresses of Vertex AI on this server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VertexRoutes {
    /// Asked with GET.
    pub health: String,
    /// Asked with POST.
    pub predict: String,
}

impl Hosts {
    /// What a request is by one of these contracts; none: nothing of them.
    fn protocol(&self, method: &Method, path: &str) -> Option<Protocol> {
        let vertex = self.vertex.as_ref();
        let posted = *method == Method::POST;
        let predicts = vertex.is_some_and(|routes| posted && routes.predict == path)
            || self.sagemaker && path == "/invocations"
            || self.huggingface && posted && path == "/"
            || self.torchserve && path.starts_with("/predictions/");
        let health = vertex.is_some_and(|routes| !posted && routes.health == path)
            || (self.sagemaker || self.torchserve) && path == "/ping"
            || self.huggingface && path == "/health";
        if predicts {
            Some(Protocol::Rest)
        } else if health {
            Some(Protocol::Health)
        } else {
            None
        }
    }
}

/// The protocol that a request belongs to.
pub(super) fn protocol(hosts: &Hosts, method: &Method, path: &str) -> Protocol {
    hosts.protocol(method, path).unwrap_or_else(|| of_path(path))
}

fn of_path(path: &str) -> Protocol {
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

/// Whether a request needs no key: a health check, or a page, which holds no data.
pub(super) fn is_open(hosts: &Hosts, method: &Method, path: &str) -> bool {
    match hosts.protocol(method, path) {
        Some(protocol) => protocol == Protocol::Health,
        None => of_path(path) == Protocol::Health || is_page(path),
    }
}

/// Whether a path belongs to a page for people; these need no API key, as they hold no data.
pub(super) fn is_page(path: &str) -> bool {
    const PAGES: [&str; 3] = ["/", "/docs", "/openapi.json"];
    PAGES.contains(&path) || ["/docs/", "/page/"].iter().any(|folder| path.starts_with(folder))
}
