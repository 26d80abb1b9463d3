//! The Open Inference Protocol over gRPC: a tensor in `raw_input_contents`, as Triton's clients send it.

use std::time::Duration;

use bytes::Bytes;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

use super::answer::{Answer, Outcome};
use crate::pb::open_inference as oip;
use oip::grpc_inference_service_client::GrpcInferenceServiceClient;

/// Largest response in bytes; a thousand logits have 4 kB, an error text less.
const MOST: usize = 64 << 20;

/// One HTTP/2 connection to a server, shared by all requests.
#[derive(Debug, Clone)]
pub struct Grpc {
    client: GrpcInferenceServiceClient<Channel>,
}

impl Grpc {
    /// Connects on first use. `server` is `HOST:PORT`.
    pub fn new(server: &str) -> Result<Self, String> {
        let endpoint = Endpoint::from_shared(format!("http://{server}")).map_err(|e| e.to_string())?;
        let channel = endpoint.tcp_nodelay(true).connect_lazy();
        Ok(Self { client: GrpcInferenceServiceClient::new(channel).max_decoding_message_size(MOST) })
    }

    /// Inputs of a model: name, datatype, shape.
    pub async fn metadata(&self, model: &str) -> Result<Vec<(String, String, Vec<i64>)>, String> {
        let question = oip::ModelMetadataRequest { name: model.into(), ..Default::default() };
        let answer = self.client.clone().model_metadata(question).await.map_err(|e| e.to_string())?;
        let inputs = answer.into_inner().inputs.into_iter();
        Ok(inputs.map(|i| (i.name, i.datatype, i.shape)).collect())
    }

    /// Sends one request and reads the whole response.
    pub async fn send(&self, request: &oip::ModelInferRequest, timeout: Duration) -> Answer {
        let outcome = match tokio::time::timeout(timeout, self.infer(request)).await {
            Err(_) => Outcome::Timeout,
            Ok(Ok(())) => Outcome::Ok,
            Ok(Err(status)) => of_status(&status),
        };
        Answer { outcome, phases: Vec::new() }
    }

    /// Sends one request; the error is the server's status.
    pub async fn infer(&self, request: &oip::ModelInferRequest) -> Result<(), Status> {
        self.client.clone().model_infer(request.clone()).await.map(drop)
    }
}

/// The outcome for a gRPC status.
fn of_status(status: &Status) -> Outcome {
    match status.code() {
        Code::Ok => Outcome::Ok,
        // tonic reports a broken connection by these codes too, but with a source
        Code::Unavailable | Code::Unknown if std::error::Error::source(status).is_some() => Outcome::Transport,
        Code::ResourceExhausted | Code::Unavailable => Outcome::Refused,
        Code::DeadlineExceeded => Outcome::Deadline,
        Code::InvalidArgument
        | Code::NotFound
        | Code::AlreadyExists
        | Code::PermissionDenied
        | Code::Unauthenticated
        | Code::FailedPrecondition
        | Code::OutOfRange
        | Code::Unimplemented => Outcome::ClientError,
        _ => Outcome::ServerError,
    }
}

/// A request with one tensor.
pub fn request(model: &str, name: &str, datatype: &str, shape: &[usize], raw: Vec<u8>) -> oip::ModelInferRequest {
    let input = oip::model_infer_request::InferInputTensor {
        name: name.into(),
        datatype: datatype.into(),
        shape: shape.iter().map(|&d| d as i64).collect(),
        ..Default::default()
    };
    oip::ModelInferRequest {
        model_name: model.into(),
        inputs: vec![input],
        raw_input_contents: vec![Bytes::from(raw)],
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statuses_are_told_apart() {
        let of = |code| of_status(&Status::new(code, "said"));
        assert_eq!(of(Code::ResourceExhausted), Outcome::Refused);
        assert_eq!(of(Code::Unavailable), Outcome::Refused);
        assert_eq!(of(Code::DeadlineExceeded), Outcome::Deadline);
        assert_eq!(of(Code::NotFound), Outcome::ClientError);
        assert_eq!(of(Code::Internal), Outcome::ServerError);
    }
}
