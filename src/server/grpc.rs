//! The gRPC port: `inference.GRPCInferenceService`, `grpc.health.v1.Health` and server reflection.
//!
//! The calls that run a model decode their messages themselves (`inference`); the others are generated services, with
//! messages of some kilobytes at most. Requests and model metadata are handled as over HTTP.

mod fields;
mod frames;
mod health;
mod inference;
mod messages;
mod wire;

use std::any::Any;
use std::sync::{Arc, OnceLock};

use axum::Router;
use axum::body::Body;
use axum::extract::{Request as HttpRequest, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, header};
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response as HttpResponse};
use axum::routing::post;
use bytes::Bytes;
use http_body::Frame;
use http_body_util::BodyExt as _;
use tokio::sync::Semaphore;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code as StatusCode, Request, Response, Status, Streaming};
use tower_http::catch_panic::CatchPanicLayer;

use self::frames::{Messages, reframed};
use super::access::{self, REQUEST_ID};
use super::app::App;
use super::bodies::Bodies;
use super::doors::{self, Hosts};
use super::oip::describe;
use super::status::{ApiError, Code, Failure, cut};
use super::{head, keys};
use crate::infer::error::InferError;
use crate::panics;
use crate::pb::open_inference as pb;
use crate::pb::open_inference::grpc_inference_service_server::{GrpcInferenceService, GrpcInferenceServiceServer};

/// Most bytes of a message that carries no tensor.
const SMALL: usize = 64 * 1024;

/// Every service and its middleware, from the outside in: access log, panics, keys, head, content type.
pub(super) fn routes(app: Arc<App>) -> Result<Router, String> {
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(pb::DESCRIPTOR)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    let failed = |e: tonic_reflection::server::Error| format!("reflection: {e}");
    let services = tonic::service::Routes::new(GrpcInferenceServiceServer::new(Service(app.clone())))
        .add_service(health::service(app.clone()))
        .add_service(reflection().build_v1().map_err(failed)?)
        // grpcurl and Python's client ask for v1alpha first
        .add_service(reflection().build_v1alpha().map_err(failed)?);
    let path = |method| format!("/inference.GRPCInferenceService/{method}");
    let models = Router::new()
        .route(&path("ModelInfer"), post(inference::infer))
        .route(&path("ModelStreamInfer"), post(inference::stream))
        .with_state(app.clone());
    let mut routes = services
        .prepare()
        .into_axum_router()
        .layer(axum::middleware::from_fn_with_state(app.clone(), small_messages))
        .merge(models)
        .layer(axum::middleware::from_fn(grpc_only))
        .layer(axum::middleware::from_fn(head::check));
    if let Some(keys) = &app.keys {
        routes = routes.layer(axum::middleware::from_fn_with_state((keys.clone(), Hosts::default()), keys::check));
    }
    let routes = routes.layer(CatchPanicLayer::custom(panicked));
    Ok(routes.layer(axum::middleware::from_fn_with_state(app, access::account)))
}

/// Decodes a message for the fuzzer.
#[cfg(test)]
pub(super) fn read_message(
    message: &Bytes,
    limits: &super::bodies::Limits,
    room: super::oip::framing::Room<'_>,
) -> Result<super::oip::inference::Inference, ApiError> {
    let read = wire::envelope(message).and_then(|_| wire::read(message, limits, room));
    read.map(|(inference, _)| inference).map_err(|unread| unread.error)
}

/// Whether a call is a stream, whose client may pause between messages.
pub(super) fn is_stream<B>(request: &HttpRequest<B>) -> bool {
    const STREAMS: [&str; 2] = ["/ModelStreamInfer", "/ServerReflectionInfo"];
    doors::is_grpc(request) && STREAMS.iter().any(|method| request.uri().path().ends_with(method))
}

/// Refuses requests that are not gRPC with HTTP status 415, as gRPC's HTTP/2 protocol wants.
async fn grpc_only(request: HttpRequest, next: Next) -> HttpResponse {
    let kind = request.headers().get(header::CONTENT_TYPE).map_or(&b""[..], HeaderValue::as_bytes);
    let name = kind.split(|&b| b == b';').next().unwrap_or_default().trim_ascii();
    if [&b"application/grpc"[..], b"application/grpc+proto"].iter().any(|known| name.eq_ignore_ascii_case(known)) {
        return next.run(request).await;
    }
    let text = if kind.is_empty() {
        // a probe that asks the wrong port must not find it ready
        "this is the gRPC port, which takes application/grpc only (grpc.health.v1.Health for probes); /v2/health/ready is on the HTTP port (--http), /readyz on the admin port (--admin)".into()
    } else {
        let shown = String::from_utf8_lossy(kind);
        format!("content type `{}` is not taken on the gRPC port; send application/grpc", cut(&shown).escape_debug())
    };
    ApiError::new(Code::UnsupportedMediaType, text).into_response()
}

/// Most reflection streams open at once, over all connections.
const MOST_REFLECTIONS: usize = 16;
static REFLECTIONS: Semaphore = Semaphore::const_new(MOST_REFLECTIONS);

/// Hands messages without tensors to the generated services: limited, decompressed, each with a deadline.
async fn small_messages(State(app): State<Arc<App>>, request: HttpRequest, next: Next) -> HttpResponse {
    // one reflection stream may ask for the whole description any number of times
    let reflects = request.uri().path().ends_with("/ServerReflectionInfo");
    let room = if reflects { Some(REFLECTIONS.try_acquire()) } else { None };
    let room = match room.transpose() {
        Ok(room) => room,
        Err(_) => {
            let text = format!("{MOST_REFLECTIONS} streams of reflection are open; try again later");
            return refused(ApiError::new(Code::Overloaded, text));
        }
    };
    let bodies = Bodies { limit: SMALL.min(app.bodies.limit), ..app.bodies.clone() };
    let first = std::time::Instant::now() + app.request_timeout;
    let refusal = Arc::new(OnceLock::new());
    let (refused_with, closing) = (refusal.clone(), app.clone());
    let plain = Messages::replace(bodies, app.request_timeout, request, |messages| {
        // only the first message has a deadline: those of a stream may come at any time
        let messages = futures_util::stream::try_unfold((messages, Some(first)), move |(mut messages, until)| {
            let (refusal, closing) = (refused_with.clone(), closing.clone());
            async move {
                let message = async {
                    let more = tokio::select! {
                        more = messages.arrives(until) => more?,
                        // an idle stream must not delay shutdown
                        () = closing.readiness.closed() => return Err(ApiError::from(InferError::ShuttingDown)),
                    };
                    Ok(if more { Some(messages.read(until).await?) } else { None })
                };
                let message: Result<_, ApiError> = message.await;
                let message = message.map_err(|error| refusal.get_or_init(|| error.into_status()).clone())?;
                Ok::<_, Status>(message.map(|message| (reframed(&message.bytes), (messages, None))))
            }
        });
        Body::from_stream(messages)
    });
    let request = match plain {
        Ok(request) => request,
        Err(error) => return refused(error),
    };
    // the reflection service ends its stream with OK even if a message was refused
    let true_end = move |frame: Frame<Bytes>| match (frame.is_trailers(), refusal.get(), &room) {
        (true, Some(status), _) => {
            let mut trailers = HeaderMap::new();
            // can't fail: the text is sanitised, so that it is a valid header value
            let _ = status.add_header(&mut trailers);
            Frame::trailers(trailers)
        }
        _ => frame,
    };
    next.run(request).await.map(|body| Body::new(body.map_frame(true_end)))
}

/// The response to a call that fails before its first message.
fn refused(error: ApiError) -> HttpResponse {
    let failure = Failure { code: error.code, message: error.message.clone(), detail: error.detail.clone() };
    let is_unsupported = error.code == Code::UnsupportedMediaType && error.message.contains("grpc-encoding");
    let status = error.into_status();
    let mut response: HttpResponse = status.clone().into_http();
    if is_unsupported {
        // gRPC's status for an encoding that the server does not support
        let metadata = status.metadata().clone();
        response = Status::with_metadata(StatusCode::Unimplemented, status.message(), metadata).into_http();
        const ACCEPT: HeaderName = HeaderName::from_static("grpc-accept-encoding");
        response.headers_mut().insert(ACCEPT, HeaderValue::from_static("identity,gzip,deflate"));
    }
    response.extensions_mut().insert(failure);
    response
}

fn panicked(panic: Box<dyn Any + Send>) -> HttpResponse {
    refused(panicked_with(&*panic))
}

fn panicked_with(panic: &(dyn Any + Send)) -> ApiError {
    ApiError::internal(format!("a gRPC handler panicked: {}", panics::message(panic)))
}

struct Service(Arc<App>);

/// Maps an error to a status, and leaves its detail for the log.
fn refuse<T>(request: &Request<T>) -> impl Fn(ApiError) -> Status + use<T> {
    let id =
        request.metadata().get(REQUEST_ID.as_str()).and_then(|id| id.to_str().ok()).unwrap_or_default().to_string();
    move |error| {
        if let Some(detail) = &error.detail {
            tracing::error!(request_id = id, detail, "request {id} met an internal error");
        }
        error.into_status()
    }
}

type Answer<T> = Result<Response<T>, Status>;

#[tonic::async_trait]
impl GrpcInferenceService for Service {
    async fn server_live(&self, _: Request<pb::ServerLiveRequest>) -> Answer<pb::ServerLiveResponse> {
        Ok(Response::new(pb::ServerLiveResponse { live: true }))
    }

    async fn server_ready(&self, _: Request<pb::ServerReadyRequest>) -> Answer<pb::ServerReadyResponse> {
        Ok(Response::new(pb::ServerReadyResponse { ready: self.0.readiness.check().is_ok() }))
    }

    async fn model_ready(&self, request: Request<pb::ModelReadyRequest>) -> Answer<pb::ModelReadyResponse> {
        let pb::ModelReadyRequest { name, version } = request.get_ref();
        match describe::ready(&self.0, name, Some(version)) {
            Ok(_) => Ok(Response::new(pb::ModelReadyResponse { ready: true })),
            Err(error) if matches!(error.code, Code::NotReady | Code::ShuttingDown) => {
                Ok(Response::new(pb::ModelReadyResponse { ready: false }))
            }
            Err(error) => Err(refuse(&request)(error)),
        }
    }

    async fn server_metadata(&self, _: Request<pb::ServerMetadataRequest>) -> Answer<pb::ServerMetadataResponse> {
        Ok(Response::new(describe::server()))
    }

    async fn model_metadata(&self, request: Request<pb::ModelMetadataRequest>) -> Answer<pb::ModelMetadataResponse> {
        let pb::ModelMetadataRequest { name, version } = request.get_ref();
        let model = describe::find(&self.0, name, Some(version)).map_err(refuse(&request))?;
        Ok(Response::new(describe::model(&self.0, &model)))
    }

    /// Routed to [`inference::infer`] instead.
    async fn model_infer(&self, _: Request<pb::ModelInferRequest>) -> Answer<pb::ModelInferResponse> {
        Err(ApiError::internal("ModelInfer came to the generated service").into_status())
    }

    type ModelStreamInferStream = ReceiverStream<Result<pb::ModelStreamInferResponse, Status>>;

    /// Routed to [`inference::stream`] instead.
    async fn model_stream_infer(
        &self,
        _: Request<Streaming<pb::ModelInferRequest>>,
    ) -> Answer<Self::ModelStreamInferStream> {
        Err(ApiError::internal("ModelStreamInfer came to the generated service").into_status())
    }

    async fn model_config(&self, request: Request<pb::ModelConfigRequest>) -> Answer<pb::ModelConfigResponse> {
        let pb::ModelConfigRequest { name, version } = request.get_ref();
        let model = describe::find(&self.0, name, Some(version)).map_err(refuse(&request))?;
        Ok(Response::new(pb::ModelConfigResponse { config: Some(describe::config(&model)) }))
    }

    async fn model_statistics(
        &self,
        request: Request<pb::ModelStatisticsRequest>,
    ) -> Answer<pb::ModelStatisticsResponse> {
        let pb::ModelStatisticsRequest { name, version } = request.get_ref();
        describe::statistics(&self.0, name, Some(version)).map(Response::new).map_err(refuse(&request))
    }

    async fn repository_index(
        &self,
        request: Request<pb::RepositoryIndexRequest>,
    ) -> Answer<pb::RepositoryIndexResponse> {
        Ok(Response::new(describe::index(&self.0, request.get_ref().ready)))
    }

    async fn repository_model_load(
        &self,
        request: Request<pb::RepositoryModelLoadRequest>,
    ) -> Answer<pb::RepositoryModelLoadResponse> {
        let pb::RepositoryModelLoadRequest { model_name, parameters, .. } = request.get_ref();
        self.0.control.load(model_name, parameters.keys()).await.map_err(refuse(&request))?;
        Ok(Response::new(pb::RepositoryModelLoadResponse {}))
    }

    async fn repository_model_unload(
        &self,
        request: Request<pb::RepositoryModelUnloadRequest>,
    ) -> Answer<pb::RepositoryModelUnloadResponse> {
        let pb::RepositoryModelUnloadRequest { model_name, parameters, .. } = request.get_ref();
        self.0.control.unload(model_name, parameters.keys()).await.map_err(refuse(&request))?;
        Ok(Response::new(pb::RepositoryModelUnloadResponse {}))
    }
}
