//! The HTTP port: its routes and middleware, and the health calls of `/v2`.

use std::any::Any;
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{HeaderName, HeaderValue, Method, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use axum::{Json, Router};
use serde::Serialize;
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::cors::{AllowHeaders, AllowOrigin, CorsLayer};
use utoipa::{OpenApi as _, ToSchema};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::access;
use super::app::App;
use super::bodies::coding::Coding;
use super::served::SERVER_TIMING;
use super::status::{ApiError, Code, ErrorBody};
use super::{classify, compress, embed, explain, head, keys, oip, openapi, page};
use crate::panics;

/// Every route and its middleware, from the outside in: access log (id, metrics), panics, CORS, keys, head, content
/// coding, compression of responses. Handlers read bodies through `bodies`.
pub(super) fn routes(app: Arc<App>) -> Router {
    let (routes, api) = OpenApiRouter::with_openapi(openapi::Described::openapi())
        .merge(classify::routes())
        .merge(embed::routes())
        .merge(explain::routes())
        .routes(routes!(live))
        .routes(routes!(ready))
        .merge(oip::routes())
        .split_for_parts();
    let mut routes = openapi::serve(routes, api, app.keys.is_some())
        .merge(page::routes())
        .fallback(async || ApiError::new(Code::NotFound, "there is no such path"))
        .method_not_allowed_fallback(async || {
            ApiError::new(Code::MethodNotAllowed, "this path takes another method; see the header `allow`")
        })
        .layer(axum::middleware::from_fn_with_state(app.clone(), compress::gzip))
        .layer(axum::middleware::from_fn(known_encoding))
        .layer(axum::middleware::from_fn(head::check));
    if let Some(keys) = &app.keys {
        routes = routes.layer(axum::middleware::from_fn_with_state(keys.clone(), keys::check));
    }
    if !app.cors_origins.is_empty() {
        routes = routes.layer(cors(&app.cors_origins));
    }
    routes
        .layer(CatchPanicLayer::custom(panicked))
        .layer(axum::middleware::from_fn_with_state(app.clone(), access::account))
        .with_state(app)
}

fn cors(origins: &[String]) -> CorsLayer {
    let origins = if origins.iter().any(|origin| origin == "*") {
        AllowOrigin::any()
    } else {
        // the command line has validated them
        AllowOrigin::list(origins.iter().filter_map(|origin| HeaderValue::from_str(origin).ok()))
    };
    CorsLayer::new()
        .allow_origin(origins)
        .allow_methods([Method::GET, Method::POST])
        // browsers don't let `*` stand for `authorization`
        .allow_headers(AllowHeaders::mirror_request())
        .expose_headers([
            access::REQUEST_ID,
            SERVER_TIMING,
            header::RETRY_AFTER,
            HeaderName::from_static("inference-header-content-length"),
        ])
}

/// Refuses bodies in an unknown content coding.
async fn known_encoding(request: Request, next: Next) -> Response {
    match Coding::of_body(request.headers()) {
        Ok(_) => next.run(request).await,
        Err(error) => {
            let mut response = error.into_response();
            response.headers_mut().insert(header::ACCEPT_ENCODING, HeaderValue::from_static("gzip, deflate"));
            response
        }
    }
}

fn panicked(panic: Box<dyn Any + Send>) -> Response {
    ApiError::internal(format!("a handler panicked: {}", panics::message(panic.as_ref()))).into_response()
}

/// The same value under both names that clients use.
#[derive(Serialize, ToSchema)]
struct HealthAnswer {
    live: bool,
    ready: bool,
}

/// Whether the process can answer at all.
#[utoipa::path(get, path = "/v2/health/live", tag = "Health",
    responses((status = 200, body = HealthAnswer), (status = "default", body = ErrorBody)))]
async fn live(State(app): State<Arc<App>>) -> Json<HealthAnswer> {
    Json(HealthAnswer { live: true, ready: app.readiness.check().is_ok() })
}

/// Whether the server is ready for requests.
#[utoipa::path(get, path = "/v2/health/ready", tag = "Health",
    responses((status = 200, body = HealthAnswer), (status = "default", body = ErrorBody)))]
async fn ready(State(app): State<Arc<App>>) -> Result<Json<HealthAnswer>, ApiError> {
    let code = if app.readiness.is_draining() { Code::ShuttingDown } else { Code::NotReady };
    app.readiness.check().map_err(|reason| ApiError::new(code, format!("not ready: {reason}")))?;
    Ok(Json(HealthAnswer { live: true, ready: true }))
}
