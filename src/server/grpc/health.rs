//! `grpc.health.v1.Health`: the server's readiness for the empty name and for the inference service; a model's
//! readiness for the model's name.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt as _;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_server::{Health, HealthServer};
use tonic_health::pb::{HealthCheckRequest, HealthCheckResponse};

use super::super::app::App;
use super::panicked_with;

/// How often a watched status is checked.
const WATCH: Duration = Duration::from_millis(250);

const INFERENCE: &str = "inference.GRPCInferenceService";

pub(super) fn service(app: Arc<App>) -> HealthServer<Service> {
    HealthServer::new(Service(app))
}

#[derive(Debug)]
pub(super) struct Service(Arc<App>);

impl Service {
    /// `None` if no service or model has that name.
    fn status(&self, service: &str) -> Option<ServingStatus> {
        let Self(app) = self;
        let checked = match service {
            "" | INFERENCE => app.readiness.check(),
            name => app.readiness.check_model(&*app.registry.find(Some(name), None).ok()?),
        };
        Some(if checked.is_ok() { ServingStatus::Serving } else { ServingStatus::NotServing })
    }

    /// Sends every change of the status until the server drains or the client disconnects.
    async fn tell(&self, service: &str, sender: &mpsc::Sender<Result<HealthCheckResponse, Status>>) {
        let mut last = None;
        loop {
            let draining = self.0.readiness.is_draining();
            let status = self.status(service).unwrap_or(ServingStatus::ServiceUnknown);
            if last != Some(status) && sender.send(Ok(response(status))).await.is_err() {
                break;
            }
            last = Some(status);
            if draining {
                break;
            }
            tokio::select! { () = sender.closed() => break, () = tokio::time::sleep(WATCH) => {} }
        }
    }
}

fn response(status: ServingStatus) -> HealthCheckResponse {
    HealthCheckResponse { status: status.into() }
}

#[tonic::async_trait]
impl Health for Service {
    async fn check(&self, request: Request<HealthCheckRequest>) -> Result<Response<HealthCheckResponse>, Status> {
        let status = self.status(&request.get_ref().service);
        let status = status.ok_or_else(|| Status::not_found("there is no such service, and no model of that name"))?;
        Ok(Response::new(response(status)))
    }

    type WatchStream = ReceiverStream<Result<HealthCheckResponse, Status>>;

    async fn watch(&self, request: Request<HealthCheckRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let (watched, service) = (Self(self.0.clone()), request.into_inner().service);
        let (sender, stream) = mpsc::channel(1);
        tokio::spawn(async move {
            let told = AssertUnwindSafe(watched.tell(&service, &sender)).catch_unwind().await;
            if let Err(panic) = told {
                // without an error, the client would see the stream end with OK
                let error = panicked_with(&*panic);
                tracing::error!(detail = error.detail, "a stream of health met an internal error");
                let _ = sender.send(Err(error.into_status())).await;
            }
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }
}
