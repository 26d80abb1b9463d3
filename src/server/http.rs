//! The HTTP port: every route and the layers around them.

use std::any::Any;
use std::sync::Arc;

use axum::Router;
use axum::extract::Request;
use axum::http::{HeaderName, HeaderValue, Method, Uri, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::cors::{AllowHeaders, AllowOrigin, CorsLayer};
use utoipa::OpenApi as _;
use utoipa_axum::router::OpenApiRouter;

use super::access;
use super::app::App;
use super::bodies::coding::Coding;
use super::served::SERVER_TIMING;
use super::status::{ApiError, Code};
use super::{classify, compress, embed, explain, head, health, hosts, keys, oip, openapi, page, unrouted};
use crate::panics;

/// Every route, and the layers from the outside in: the form and words of refusals, accounting (id, metrics, log), panics, CORS, keys, request line,
/// content coding, compression of answers. Bodies are read by handlers, through `bodies`.
pub(super) fn routes(app: Arc<App>) -> Router {
    let (routes, api) = OpenApiRouter::with_openapi(openapi::Described::openapi())
        .merge(classify::routes())
        .merge(embed::routes())
        .merge(explain::routes())
        .merge(health::routes())
        .merge(oip::routes())
        .split_for_parts();
    let admin = app.admin;
    let routes = openapi::serve(routes, api, app.keys.is_some())
        .merge(page::routes())
        .merge(hosts::routes(&app.hosts))
        .fallback(async move |uri: Uri| unrouted::on_http(uri.path(), admin))
        .method_not_allowed_fallback(async || ApiError::new(Code::MethodNotAllowed, "this path has other methods"));
    let mut routes = hosts::over(routes, &app)
        .layer(axum::middleware::from_fn_with_state(app.clone(), compress::gzip))
        .layer(axum::middleware::from_fn(known_encoding))
        .layer(axum::middleware::from_fn(head::check));
    if let Some(keys) = &app.keys {
        let state = (keys.clone(), app.hosts.clone());
        routes = routes.layer(axum::middleware::from_fn_with_state(state, keys::check));
    }
    if !app.cors_origins.is_empty() {
        routes = routes.layer(cors(&app.cors_origins));
    }
    let routes = routes
        .layer(CatchPanicLayer::custom(panicked))
        .layer(axum::middleware::from_fn_with_state(app.clone(), access::account))
        .with_state(app.clone());
    hosts::errors(unrouted::naming_methods(routes), &app.hosts)
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
            HeaderName::from_static("x-heat-range"),
            HeaderName::from_static("x-heat-class"),
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
