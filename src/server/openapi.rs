//! `/openapi.json` and `/docs`: the description of the HTTP port, generated from its handlers, readable without a
//! network.

use std::sync::Arc;

use axum::Router;
use axum::http::header;
use axum::routing::get;
use bytes::Bytes;
use utoipa::OpenApi;
use utoipa::openapi::RefOr;
use utoipa::openapi::path::{Operation, PathItem};
use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityScheme};
use utoipa_swagger_ui::{Config, SwaggerUi};

use super::app::App;
use super::page;

/// The parts of the description that belong to no handler.
#[derive(OpenApi)]
#[openapi(
    info(
        title = "nfold",
        description = "Normalizer-Free image classifiers over HTTP. Every error is `{\"error\": message, \"code\": code}`; every answer has the header `x-request-id`."
    ),
    tags(
        (name = "Classification", description = "Images in, classes out"),
        (name = "Health", description = "For load balancers and clients; the admin port has its own"),
        (name = "Open Inference Protocol", description = "KServe v2 with Triton's extensions"),
    )
)]
pub(super) struct Described;

/// The part of a path that names a version.
const VERSION: &str = "/versions/{version}";

/// Completes the description and serves it.
pub(super) fn serve(routes: Router<Arc<App>>, mut api: utoipa::openapi::OpenApi, keys: bool) -> Router<Arc<App>> {
    for response in api.paths.paths.values_mut().flat_map(operations).flat_map(|o| o.responses.responses.iter_mut()) {
        // which the specification wants of each
        if let (status, RefOr::T(response)) = response
            && response.description.is_empty()
        {
            response.description = if status == "default" { "The error" } else { "The answer" }.into();
        }
    }
    // each route with a version exists without one too, and then means the highest
    let versioned: Vec<_> = api.paths.paths.iter().filter(|(path, _)| path.contains(VERSION)).collect();
    let shorter: Vec<_> = versioned.iter().map(|(path, item)| (path.replace(VERSION, ""), latest(item))).collect();
    api.paths.paths.extend(shorter);
    if keys {
        let bearer = SecurityScheme::Http(HttpBuilder::new().scheme(HttpAuthScheme::Bearer).build());
        api.components.get_or_insert_default().add_security_scheme("api_key", bearer);
        api.security = Some(vec![utoipa::openapi::SecurityRequirement::new("api_key", Vec::<String>::new())]);
    }
    // one copy for all clients, however many of them read it slowly
    let text = Bytes::from(api.to_json().unwrap_or_default());
    let document = get(move || async move { ([(header::CONTENT_TYPE, "application/json")], text) });
    let docs: Router<Arc<App>> = SwaggerUi::new("/docs").config(Config::from("/openapi.json")).into();
    let docs = docs.layer(axum::middleware::map_response(page::guard_docs));
    routes.route("/openapi.json", document).merge(docs)
}

fn operations(item: &mut PathItem) -> impl Iterator<Item = &mut Operation> {
    [&mut item.get, &mut item.post].into_iter().flatten()
}

fn latest(item: &PathItem) -> PathItem {
    let mut item = item.clone();
    for operation in operations(&mut item) {
        let Operation { operation_id, parameters, .. } = operation;
        *operation_id = operation_id.take().map(|id| format!("{id}_latest"));
        if let Some(parameters) = parameters {
            parameters.retain(|p| !matches!(p, RefOr::T(parameter) if parameter.name == "version"));
        }
    }
    item
}
