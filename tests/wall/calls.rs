//! A gRPC client that can send what libraries don't: any bytes, any headers, over a connection of its own.

use std::convert::Infallible;
use std::io::Write as _;
use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::client::conn::http2;
use hyper::{HeaderMap, Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

pub const INFER: &str = "/inference.GRPCInferenceService/ModelInfer";
pub const STREAM: &str = "/inference.GRPCInferenceService/ModelStreamInfer";

/// How a call ended.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Ended {
    /// HTTP status.
    pub http: u16,
    /// `grpc-status`; `None`: the call was cut.
    pub status: Option<i32>,
    /// `x-error-code`.
    pub code: String,
    /// `grpc-message`, percent-encoded.
    pub message: String,
}

/// An open call.
pub struct Call {
    /// Sends bytes; dropping it closes the client's half of the stream.
    pub sender: Option<mpsc::Sender<Bytes>>,
    response: Response<Incoming>,
    /// Received and not yet read.
    rest: Vec<u8>,
    trailers: Option<HeaderMap>,
}

/// Opens a call that stays open for sending.
pub async fn open(to: SocketAddr, path: &str, headers: &[(&str, &str)]) -> Call {
    begin(to, path, headers, None).await
}

/// Begins a call; with `whole`, that is all that it sends.
async fn begin(to: SocketAddr, path: &str, headers: &[(&str, &str)], whole: Option<Bytes>) -> Call {
    let stream = tokio::net::TcpStream::connect(to).await.unwrap();
    let mut client = http2::Builder::new(TokioExecutor::new());
    client.initial_stream_window_size(65_535);
    let (mut requests, connection) = client.handshake(TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    let (sender, bytes) = mpsc::channel::<Bytes>(4);
    let mut sender = Some(sender);
    if let Some(whole) = whole {
        // an empty chunk would be an empty DATA frame
        if !whole.is_empty() {
            sender.as_ref().expect("here").send(whole).await.unwrap();
        }
        sender = None;
    }
    let frames = tokio_stream::StreamExt::map(ReceiverStream::new(bytes), |b| Ok::<_, Infallible>(Frame::data(b)));
    let mut request = Request::post(format!("http://localhost{path}")).header("te", "trailers");
    if !headers.iter().any(|(name, _)| *name == "content-type") {
        request = request.header("content-type", "application/grpc");
    }
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let response = requests.send_request(request.body(StreamBody::new(frames)).unwrap());
    let response = tokio::time::timeout(Duration::from_secs(60), response).await.expect("in time").expect("answered");
    Call { sender, response, rest: Vec::new(), trailers: None }
}

impl Call {
    pub async fn send(&self, bytes: impl Into<Bytes>) -> bool {
        self.sender.as_ref().expect("open").send(bytes.into()).await.is_ok()
    }

    /// The next message; `None` at the end.
    pub async fn next(&mut self) -> Option<Vec<u8>> {
        loop {
            if let Some((head, rest)) = self.rest.split_first_chunk::<5>() {
                let length = u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize;
                if rest.len() >= length {
                    let message = rest[..length].to_vec();
                    self.rest.drain(..5 + length);
                    return Some(message);
                }
            }
            let frame = tokio::time::timeout(Duration::from_secs(60), self.response.body_mut().frame()).await;
            let frame = frame.expect("in time")?.ok()?;
            match frame.into_data() {
                Ok(data) => self.rest.extend(data),
                Err(frame) => self.trailers = frame.into_trailers().ok(),
            }
        }
    }

    /// Returns how it ends, without sending or expecting more.
    pub async fn end(mut self) -> Ended {
        while self.next().await.is_some() {}
        let of = |headers: &HeaderMap, name: &str| headers.get(name).and_then(|v| v.to_str().ok()).map(String::from);
        let (head, trailers) = (self.response.headers().clone(), self.trailers.unwrap_or_default());
        let find = |name| of(&trailers, name).or_else(|| of(&head, name));
        Ended {
            http: self.response.status().as_u16(),
            status: find("grpc-status").and_then(|status| status.parse().ok()),
            code: find("x-error-code").unwrap_or_default(),
            message: find("grpc-message").unwrap_or_default(),
        }
    }
}

/// A complete call, on a thread of its own.
pub fn call(to: SocketAddr, path: &str, headers: &[(&str, &str)], bytes: impl Into<Bytes>) -> Ended {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async { begin(to, path, headers, Some(bytes.into())).await.end().await })
}

/// A message with its length prefix.
pub fn frame(message: &[u8]) -> Vec<u8> {
    flagged(0, message)
}

/// The same, compressed with gzip.
pub fn gzipped(message: &[u8]) -> Vec<u8> {
    flagged(1, &gzip(message))
}

pub fn flagged(flag: u8, message: &[u8]) -> Vec<u8> {
    [&[flag][..], &(message.len() as u32).to_be_bytes(), message].concat()
}

pub fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

pub fn zlib(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// A length-delimited protobuf field.
pub fn ld(number: u8, bytes: &[u8]) -> Vec<u8> {
    let mut field = vec![number << 3 | 2];
    prost::encoding::encode_varint(bytes.len() as u64, &mut field);
    field.extend_from_slice(bytes);
    field
}
