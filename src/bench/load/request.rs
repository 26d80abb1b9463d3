//! Requests of either transport, which can be sent any number of times.

use bytes::Bytes;

use crate::pb::open_inference::ModelInferRequest;

/// A request, which can be sent any number of times.
#[derive(Debug, Clone, PartialEq)]
pub enum Request {
    /// HTTP/1.1.
    Http(Payload),
    /// gRPC.
    Grpc(ModelInferRequest),
}

impl Request {
    /// Bytes of the body, or of the tensors.
    pub fn size(&self) -> usize {
        match self {
            Self::Http(payload) => payload.body.len(),
            Self::Grpc(request) => request.raw_input_contents.iter().map(Bytes::len).sum(),
        }
    }
}

/// An HTTP request.
#[derive(Debug, Clone, PartialEq)]
pub struct Payload {
    /// Path and query.
    pub target: String,
    /// Headers besides `host`.
    pub headers: Vec<(&'static str, String)>,
    /// Body.
    pub body: Bytes,
}
