//! Google's Vertex AI: health and predictions at the addresses that the platform names (`AIP_HEALTH_ROUTE`,
//! `AIP_PREDICT_ROUTE`). They may be any, so that they come before the other routes rather than among them.

use std::sync::Arc;

use axum::Router;
use axum::extract::{Request, State};
use axum::http::{Method, header};
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};

use super::super::app::App;
use super::super::bodies::instances::read_instances;
use super::super::classification::{self, Named};
use super::super::doors::VertexRoutes;
use super::super::health;
use super::super::status::ApiError;
use super::super::unrouted;

pub(super) fn over(routes: Router<Arc<App>>, app: &Arc<App>, named: &VertexRoutes) -> Router<Arc<App>> {
    let state = (app.clone(), named.clone());
    routes.layer(axum::middleware::from_fn_with_state(state, answer))
}

async fn answer(State((app, named)): State<(Arc<App>, VertexRoutes)>, request: Request, next: Next) -> Response {
    let path = request.uri().path();
    let (health, predict) = (path == named.health, path == named.predict);
    match *request.method() {
        Method::POST if predict => classify(&app, request).await.into_response(),
        Method::GET | Method::HEAD if health => health::ready(State(app)).await.into_response(),
        // the page may be at the same address
        Method::GET | Method::HEAD if path == "/" => next.run(request).await,
        _ if predict || health => {
            let methods = if predict { "POST" } else { "GET,HEAD" };
            ([(header::ALLOW, methods)], unrouted::other_method(request.method(), methods)).into_response()
        }
        _ => next.run(request).await,
    }
}

async fn classify(app: &App, request: Request) -> Result<Response, ApiError> {
    let named = Named::by_query(&request)?;
    classification::answer(app, named, request, read_instances, super::instances).await
}
