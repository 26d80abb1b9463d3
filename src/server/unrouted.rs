//! What is told to whoever asks for a path, or with a method, that a port does not have: where it is, or what is there.

use std::net::SocketAddr;

use axum::Router;
use axum::extract::Request;
use axum::http::{HeaderValue, Method, header};
use axum::middleware::Next;
use axum::response::Response;

use super::status::{ApiError, Code, cut, retold};

/// Paths of the admin port.
const ADMIN: [&str; 3] = ["/metrics", "/livez", "/readyz"];

/// The HTTP port lacks a path; `admin` is where the admin port listens.
pub(super) fn on_http(path: &str, admin: SocketAddr) -> ApiError {
    let port = admin.port();
    let text = match ADMIN.iter().find(|known| **known == path.trim_end_matches('/')) {
        Some(known) => format!("{known} is on the admin port, {port} (--admin)"),
        None => format!("there is no path `{}` here; /docs lists what there is", cut(path).escape_debug()),
    };
    ApiError::new(Code::NotFound, text)
}

/// The admin port lacks a path; `http` is where the HTTP port will listen.
pub(super) fn on_admin(path: &str, http: SocketAddr) -> ApiError {
    let text = format!(
        "there is no path `{}` on the admin port, which has {}; models are asked on the HTTP port, {} (--http)",
        cut(path).escape_debug(),
        ADMIN.join(", "),
        http.port()
    );
    ApiError::new(Code::NotFound, text)
}

/// A path lacks a method; `methods` are those it has, as the header `allow` lists them.
pub(super) fn other_method(method: &Method, methods: &str) -> ApiError {
    let methods: Vec<&str> = methods.split(',').map(str::trim).collect();
    let text = format!("this path is asked with {}, not with {}", methods.join(" or "), cut(method.as_str()));
    ApiError::new(Code::MethodNotAllowed, text)
}

/// Routes whose refusals name the methods of a path. Routes tell them in the header `allow` only, and to whoever is outside.
pub(super) fn naming_methods(routes: Router) -> Router {
    Router::new().fallback_service(routes).layer(axum::middleware::from_fn(name_methods))
}

async fn name_methods(request: Request, next: Next) -> Response {
    let method = request.method().clone();
    let response = next.run(request).await;
    let allow = response.headers().get(header::ALLOW).cloned();
    match allow.as_ref().map(HeaderValue::to_str) {
        Some(Ok(methods)) if response.status() == Code::MethodNotAllowed.http() => {
            let error = other_method(&method, methods);
            retold(response, error.message)
        }
        _ => response,
    }
}
