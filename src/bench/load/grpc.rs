//! The Open Inference Protocol over gRPC: a float32 tensor in `raw_input_contents`, as Triton's clients send it.

use std::time::Duration;

use bytes::Bytes;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

use super::answer::{Answer, Outcome};
use crate::pb::open_inference as oip;
use oip::grpc_inference_service_client::GrpcInferenceServiceClient;

/// Largest answer taken: a thousand logits are 4 kB, a server's error text less.
const MOST: usize = 64 << 20;

/// One HTTP/2 connection to a server; requests share it.
#[derive(Debug, Clone)]
pub struct Grpc {
    client: GrpcInferenceServiceClient<Channel>,
}

impl Grpc {
    /// Connects when first used. `server` is `HOST:PORT`.
    pub fn new(server: &str) -> Result<Self, String> {
        let endpoint = Endpoint::from_shared(format!("http://{server}")).map_err(|e| e.to_string())?;
        let channel = endpoint.tcp_nodelay(true).connect_lazy();
        Ok(Self { client: GrpcInferenceServiceClient::new(channel).max_decoding_message_size(MOST) })
    }

    /// A model's inputs: name, datatype, shape.
    pub async fn metadata(&self, model: &str) -> Result<Vec<(String, String, Vec<i64>)>, String> {
        let question = oip::ModelMetadataRequest { name: model.into(), ..Default::default() };
        let answer = self.client.clone().model_metadata(question).await.map_err(|e| e.to_string())?;
        let inputs = answer.into_inner().inputs.into_iter();
        Ok(inputs.map(|i| (i.name, i.datatype, i.shape)).collect())
    }

    /// Sends one request and reads the whole answer.
    pub async fn send(&self, request: &oip::ModelInferRequest, timeout: Duration) -> Answer {
        let outcome = match tokio::time::timeout(timeout, self.infer(request)).await {
            Err(_) => Outcome::Timeout,
            Ok(Ok(())) => Outcome::Ok,
            Ok(Err(status)) => of_status(&status),
        };
        Answer { outcome, phases: Vec::new() }
    }

    /// Sends one request; the error is the server's.
    pub async fn infer(&self, request: &oip::ModelInferRequest) -> Result<(), Status> {
        self.client.clone().model_infer(request.clone()).await.map(drop)
    }
}

/// What a gRPC status means.
fn of_status(status: &Status) -> Outcome {
    match status.code() {
        Code::Ok => Outcome::Ok,
        // tonic tells a broken connection by this code too, then with a source
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
