//! Access log: every request, on either port, gets an id, is counted once and leaves one log line.
//!
//! Knows what a request was about only from what its handler leaves in the response: [`Served`], or a failure's code.

use std::hash::{BuildHasher as _, RandomState};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use axum::body::Body;
use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Version, header};
use axum::middleware::Next;
use axum::response::Response;

use super::app::App;
use super::deadline;
use super::doors::{is_grpc, protocol};
use super::pace::Visits;
use super::served::{Line, Served, millis};
use super::status::{self, Failure};
use crate::metrics::{Outcome, Protocol};

pub(super) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// The outermost middleware of both ports.
pub(super) async fn account(State(app): State<Arc<App>>, mut request: Request, next: Next) -> Response {
    let protocol = protocol(&app.hosts, request.method(), request.uri().path());
    // dropped with this future when the client goes away: that counts as cancelled
    let guard = app.metrics.request(protocol);
    let id = request_id(request.headers());
    let trace = trace_id(request.headers());
    let traced = app.traces.as_ref().map(|traces| (traces, traces.arrived(request.headers())));
    let (method, path) = (request.method().clone(), cut(request.uri().path()).to_string());
    let route = request.extensions().get::<MatchedPath>().cloned();
    let http1 = request.version() <= Version::HTTP_11;
    let visits = request.extensions().get::<Visits>().cloned();
    let asked = if is_grpc(&request) { deadline::grpc } else { deadline::http };
    let deadline = asked(request.headers(), app.request_timeout);
    request.headers_mut().insert(REQUEST_ID, id.clone());
    let mut response = next.run(request).await;
    // it stays there: how it is told may depend on the contract
    let failure = response.extensions().get::<Failure>().cloned();
    let outcome = match &failure {
        Some(failure) => failure.code,
        None if !response.status().is_success() => Outcome::InvalidRequest,
        None => status::grpc_outcome(response.headers()).unwrap_or(Outcome::Ok),
    };
    let served = response.extensions_mut().remove::<Served>();
    response.headers_mut().insert(REQUEST_ID, id.clone());
    if http1 && app.readiness.is_draining() {
        // the client's next request should go to another server
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    let duration_ms = millis(guard.finish(outcome));
    match (visits, deadline) {
        (Some(visits), Ok(deadline)) if outcome == Outcome::Overloaded && !app.readiness.is_draining() => {
            if let Some(hold) = app.pace.hold(&visits, Instant::now(), deadline) {
                response.extensions_mut().insert(hold);
            }
        }
        // only an admitted image resets the client's refusals: otherwise a cheap request before each image would
        (Some(visits), _) if outcome == Outcome::Ok && served.is_some() => visits.welcome(),
        _ => {}
    }
    let request_id = id.to_str().unwrap_or_default();
    let faults = failure.as_ref().and_then(|f| f.detail.clone()).into_iter();
    for detail in faults.chain(served.iter().flat_map(|s| s.faults.clone())) {
        tracing::error!(request_id, detail, "request {request_id} met an internal error");
    }
    let trace_id = trace.as_deref();
    let line = Line { request_id, trace_id, method: method.as_str(), path: &path, protocol, outcome, duration_ms };
    if let Some((traces, arrived)) = traced {
        traces.record(arrived, &span_name(&line, route.as_ref()), &line, response.status().as_u16(), served.as_ref());
    }
    log(&line, served, &response);
    response
}

/// The span's name, from a closed set whatever clients send.
fn span_name(line: &Line<'_>, route: Option<&MatchedPath>) -> String {
    match route.map(MatchedPath::as_str) {
        // a gRPC route serves all methods of a service, and each of them is known
        Some(route) if route.ends_with("/{*rest}") && line.outcome != Outcome::NotFound => {
            format!("{} {}", line.method, line.path)
        }
        Some(route) => format!("{} {route}", line.method),
        None => line.method.to_string(),
    }
}

/// Most bytes of a path in the log: a path that no route matches may be of any length.
const PATH: usize = 256;

/// The first bytes of a path, which is ASCII.
fn cut(path: &str) -> &str {
    path.get(..PATH).unwrap_or(path)
}

fn log(line: &Line<'_>, served: Option<Served>, response: &Response<Body>) {
    let Line { request_id, trace_id, method, path, protocol, outcome, duration_ms } = *line;
    let (status, outcome) = (response.status().as_u16(), outcome.name());
    match served {
        Some(Served { model, version, images, timings: t, .. }) => tracing::info!(
            request_id,
            trace_id,
            method,
            path,
            status,
            outcome,
            duration_ms,
            model,
            version,
            images,
            decode_ms = millis(t.decode),
            preprocess_ms = millis(t.preprocess),
            queue_ms = millis(t.queue),
            inference_ms = millis(t.inference),
            batch = t.batch,
            "request {request_id} {outcome}"
        ),
        None if protocol == Protocol::Health => {
            tracing::debug!(
                request_id,
                trace_id,
                method,
                path,
                status,
                outcome,
                duration_ms,
                "probe {request_id} {outcome}"
            );
        }
        None => {
            tracing::info!(
                request_id,
                trace_id,
                method,
                path,
                status,
                outcome,
                duration_ms,
                "request {request_id} {outcome}"
            )
        }
    }
}

/// The request's trace id: the second field of `traceparent` (W3C Trace Context, section 3.2), 32 hexadecimal digits
/// that are not all zero.
fn trace_id(headers: &HeaderMap) -> Option<String> {
    let mut fields = headers.get("traceparent")?.to_str().ok()?.split('-');
    let (version, trace) = (fields.next()?, fields.next()?);
    let hexadecimal =
        |text: &str, len| text.len() == len && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    let fits = hexadecimal(version, 2) && version != "ff" && hexadecimal(trace, 32) && trace.bytes().any(|b| b != b'0');
    fits.then(|| trace.to_string())
}

/// The client's own `x-request-id` if it is short and printable (it goes into logs), else a fresh one.
fn request_id(headers: &HeaderMap) -> HeaderValue {
    let fits = |id: &&HeaderValue| (1..=128).contains(&id.len()) && id.as_bytes().iter().all(u8::is_ascii_graphic);
    let own = headers.get(REQUEST_ID).filter(fits);
    // a copy: the header value is a slice of the whole head, and would keep all of it in memory
    own.and_then(|id| HeaderValue::from_bytes(id.as_bytes()).ok()).unwrap_or_else(fresh_id)
}

fn fresh_id() -> HeaderValue {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    static SEED: std::sync::LazyLock<RandomState> = std::sync::LazyLock::new(RandomState::new);
    // seeded at random once per process, so that ids of restarts and replicas differ
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let id = format!("{:016x}", SEED.hash_one(count));
    HeaderValue::from_str(&id).unwrap_or_else(|_| HeaderValue::from_static("none"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trace_is_followed_only_if_it_is_one() {
        let of = |value: &'static str| {
            trace_id(&HeaderMap::from_iter([(HeaderName::from_static("traceparent"), HeaderValue::from_static(value))]))
        };
        let trace = "4bf92f3577b34da6a3ce929d0e0e4736";
        assert_eq!(of("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01").as_deref(), Some(trace));
        for bad in ["", "00", "00-4bf9-00f067aa0ba902b7-01", "00-00000000000000000000000000000000-00f067aa0ba902b7-01"]
        {
            assert_eq!(of(bad), None, "{bad}");
        }
    }
}
