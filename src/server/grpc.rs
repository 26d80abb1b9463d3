//! The gRPC port: `inference.GRPCInferenceService`, `grpc.health.v1.Health` and reflection.
//!
//! Turns messages into what `oip::inference` takes and back (`messages`); the request path and what is told about models
//! are those of HTTP. Streams end when the server stops, so that they don't hold up its end.

mod health;
mod messages;

use std::any::Any;
use std::sync::Arc;
use std::time::Instant;

use axum::Router;
use axum::http::Request as HttpRequest;
use axum::response::Response as HttpResponse;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::codec::CompressionEncoding;
use tonic::{Request, Response, Status, Streaming};
use tower_http::catch_panic::CatchPanicLayer;

use super::access::{self, REQUEST_ID};
use super::http::App;
use super::oip::{describe, inference};
use super::status::{ApiError, Code};
use super::{body_budget, control, deadline, head, keys};
use crate::pb::open_inference as pb;
use crate::pb::open_inference::grpc_inference_service_server::{GrpcInferenceService, GrpcInferenceServiceServer};

/// Every service and the layers from the outside in: accounting, panics, keys, size of the head, memory for
/// bodies.
pub(super) fn routes(app: Arc<App>) -> Result<Router, String> {
    let service = GrpcInferenceServiceServer::new(Service(app.clone()))
        // taken compressed, within the same limit; answers are short, and numbers hardly shrink
        .accept_compressed(CompressionEncoding::Gzip)
        .accept_compressed(CompressionEncoding::Deflate)
        .max_decoding_message_size(app.body_limit)
        .max_encoding_message_size(usize::MAX);
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(pb::DESCRIPTOR)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    let failed = |e: tonic_reflection::server::Error| format!("reflection: {e}");
    let services = tonic::service::Routes::new(service)
        .add_service(health::service(app.clone()))
        .add_service(reflection().build_v1().map_err(failed)?)
        // what grpcurl and Python's client ask first
        .add_service(reflection().build_v1alpha().map_err(failed)?);
    let mut routes = services
        .prepare()
        .into_axum_router()
        .layer(axum::middleware::from_fn_with_state(app.body_budget.clone(), body_budget::hold))
        .layer(axum::middleware::from_fn(head::check));
    if let Some(keys) = &app.keys {
        routes = routes.layer(axum::middleware::from_fn_with_state(keys.clone(), keys::check));
    }
    let routes = routes.layer(CatchPanicLayer::custom(panicked));
    Ok(routes.layer(axum::middleware::from_fn_with_state(app, access::account)))
}

/// Whether a call's client sends messages when it likes; the others send one, at once.
pub(super) fn is_stream<B>(request: &HttpRequest<B>) -> bool {
    const STREAMS: [&str; 2] = ["/ModelStreamInfer", "/ServerReflectionInfo"];
    access::is_grpc(request) && STREAMS.iter().any(|method| request.uri().path().ends_with(method))
}

fn panicked(panic: Box<dyn Any + Send>) -> HttpResponse {
    let text = panic.downcast_ref::<&str>().map(|s| (*s).to_string());
    let text = text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_default();
    tracing::error!(detail = text, "a gRPC handler panicked");
    ApiError::internal(text).into_status().into_http()
}

struct Service(Arc<App>);

impl Service {
    /// One inference; what the access log wants to know goes with the answer.
    async fn infer(&self, request: pb::ModelInferRequest, until: Instant) -> Result<messages::Reply, ApiError> {
        let arrived = Instant::now();
        let model = describe::find(&self.0, &request.model_name, Some(&request.model_version))?;
        let typed = messages::is_typed(&request);
        let inference = messages::parse(request)?;
        let answered = inference::run(model, inference, arrived, until).await?;
        Ok(messages::reply(answered, typed))
    }
}

/// An error as a status; what only the log may know goes there.
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

    async fn model_infer(&self, request: Request<pb::ModelInferRequest>) -> Answer<pb::ModelInferResponse> {
        let refuse = refuse(&request);
        let headers = request.metadata().clone().into_headers();
        let until = deadline::grpc(&headers, self.0.request_timeout).map_err(&refuse)?;
        let messages::Reply { message, served } = self.infer(request.into_inner(), until).await.map_err(&refuse)?;
        let mut response = Response::new(message);
        if let Ok(timing) = served.server_timing().parse() {
            response.metadata_mut().insert("server-timing", timing);
        }
        response.extensions_mut().insert(served);
        Ok(response)
    }

    type ModelStreamInferStream = ReceiverStream<Result<pb::ModelStreamInferResponse, Status>>;

    async fn model_stream_infer(
        &self,
        request: Request<Streaming<pb::ModelInferRequest>>,
    ) -> Answer<Self::ModelStreamInferStream> {
        let refuse = refuse(&request);
        let (mut requests, service) = (request.into_inner(), Self(self.0.clone()));
        // one answer waits at most: a client that does not read is not computed for
        let (answers, stream) = mpsc::channel(1);
        tokio::spawn(async move {
            loop {
                let next = tokio::select! {
                    biased;
                    () = answers.closed() => break,
                    next = requests.message() => next,
                    () = service.0.readiness.drained() => break,
                };
                let Ok(Some(request)) = next else { break };
                let until = Instant::now() + service.0.request_timeout;
                let answer = tokio::select! {
                    () = answers.closed() => break,
                    answer = service.infer(request, until) => answer,
                };
                let answer = match answer {
                    Ok(reply) => pb::ModelStreamInferResponse {
                        error_message: String::new(),
                        infer_response: Some(reply.message),
                    },
                    Err(error) => pb::ModelStreamInferResponse {
                        error_message: refuse(error).message().to_string(),
                        infer_response: None,
                    },
                };
                if answers.send(Ok(answer)).await.is_err() {
                    break;
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(stream)))
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
        control::load(&self.0, model_name, parameters.keys()).await.map_err(refuse(&request))?;
        Ok(Response::new(pb::RepositoryModelLoadResponse {}))
    }

    async fn repository_model_unload(
        &self,
        request: Request<pb::RepositoryModelUnloadRequest>,
    ) -> Answer<pb::RepositoryModelUnloadResponse> {
        let pb::RepositoryModelUnloadRequest { model_name, parameters, .. } = request.get_ref();
        control::unload(&self.0, model_name, parameters.keys()).await.map_err(refuse(&request))?;
        Ok(Response::new(pb::RepositoryModelUnloadResponse {}))
    }
}
