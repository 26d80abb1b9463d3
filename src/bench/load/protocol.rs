//! Requests of each protocol: `/v1/classify` with an encoded image, or the Open Inference Protocol with a tensor, in
//! the binary extension over HTTP or raw over gRPC (as Triton's clients send them).

use std::time::Duration;

use bytes::Bytes;
use rand::{RngCore as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::client::Pool;
use super::grpc::{self, Grpc};
use super::request::{Payload, Request};

/// Protocol of the requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Protocol {
    /// `POST /v1/classify` with an encoded image as the body.
    Classify,
    /// `POST /v2/models/M/infer` with a tensor in the binary extension.
    OipHttp,
    /// `POST /v2/models/M/infer` with a tensor as numbers in JSON.
    OipJson,
    /// `ModelInfer` with a raw tensor.
    OipGrpc,
}

/// Elements of a tensor of the Open Inference Protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Datatype {
    /// `[N, 3, H, W]`, normalised.
    #[default]
    Fp32,
    /// `[N, H, W, 3]` pixels: a quarter of the bytes, normalised by the server. An extension of nfold that metadata
    /// doesn't show.
    Uint8,
}

impl Datatype {
    fn name(self) -> &'static str {
        match self {
            Self::Fp32 => "FP32",
            Self::Uint8 => "UINT8",
        }
    }
}

/// Tensors of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tensors {
    /// Elements.
    pub datatype: Datatype,
    /// Images per tensor.
    pub images: usize,
}

impl Default for Tensors {
    fn default() -> Self {
        Self { datatype: Datatype::Fp32, images: 1 }
    }
}

/// Why no requests can be sent.
#[derive(Debug, thiserror::Error)]
pub enum ProtocolError {
    /// No image was given.
    #[error("the classify protocol sends photographs; name one or more with --image FILE")]
    NoImage,
    /// No model was named.
    #[error("the Open Inference Protocol needs a model's name; give --model NAME")]
    NoModel,
    /// The server doesn't respond.
    #[error("no answer from {server}: {reason}; is a server running there (--server)?")]
    NoServer {
        /// Address of the server.
        server: String,
        /// The system's error.
        reason: String,
    },
    /// The server refuses the first request.
    #[error("{server} answers {status} to {target}: {text}")]
    Refused {
        /// Address of the server.
        server: String,
        /// Path and query.
        target: String,
        /// HTTP status or gRPC code.
        status: String,
        /// Start of the response's body.
        text: String,
    },
    /// The model's metadata is not as the protocol defines it.
    #[error("{server} says of `{model}`: {reason}")]
    Metadata {
        /// Address of the server.
        server: String,
        /// The model.
        model: String,
        /// Status, or what is missing.
        reason: String,
    },
}

/// Sends the first request once, since a benchmark of errors would measure nothing.
pub async fn check(server: &str, requests: &[Request], patience: Duration) -> Result<(), ProtocolError> {
    let Some(request) = requests.first() else { return Err(ProtocolError::NoImage) };
    let unheard = |reason: String| ProtocolError::NoServer { server: server.into(), reason };
    let refused = |target: &str, status: String, text: String| ProtocolError::Refused {
        server: server.into(),
        target: target.into(),
        status,
        text: text.chars().take(200).collect(),
    };
    let asked = async {
        match request {
            Request::Http(payload) => {
                let reply = Pool::new(server.into()).ask("POST", payload).await.map_err(unheard)?;
                let text = || String::from_utf8_lossy(&reply.body).into_owned();
                match reply.status {
                    200 => Ok(()),
                    status => Err(refused(&payload.target, status.to_string(), text())),
                }
            }
            Request::Grpc(request) => {
                let client = Grpc::new(server).map_err(unheard)?;
                let answer = client.infer(request).await;
                answer.map_err(|s| refused("ModelInfer", s.code().to_string(), s.message().into()))
            }
        }
    };
    let answer = tokio::time::timeout(patience, asked).await;
    answer.map_err(|_| unheard(format!("none within {patience:?}")))?
}

/// One classify request per image.
pub fn classify(images: Vec<Vec<u8>>, model: Option<&str>) -> Result<Vec<Request>, ProtocolError> {
    if images.is_empty() {
        return Err(ProtocolError::NoImage);
    }
    let target = model.map_or_else(|| "/v1/classify".into(), |m| format!("/v1/classify?model={m}"));
    let request = |image: Vec<u8>| {
        let headers = vec![("content-type", "application/octet-stream".into())];
        Request::Http(Payload { target: target.clone(), headers, body: Bytes::from(image) })
    };
    Ok(images.into_iter().map(request).collect())
}

/// `count` requests with a noise tensor each, shaped by the server's metadata; as bytes, or as numbers in JSON.
pub async fn oip_http(
    protocol: Protocol,
    server: &str,
    model: Option<&str>,
    tensors: Tensors,
    count: usize,
    seed: u64,
) -> Result<Vec<Request>, ProtocolError> {
    let model = model.ok_or(ProtocolError::NoModel)?;
    let question = Payload { target: format!("/v2/models/{model}"), headers: vec![], body: Bytes::new() };
    let reply = Pool::new(server.into()).ask("GET", &question).await;
    let reply = reply.map_err(|reason| ProtocolError::NoServer { server: server.into(), reason })?;
    let wrong = |reason: String| ProtocolError::Metadata { server: server.into(), model: model.into(), reason };
    if reply.status != 200 {
        let text = String::from_utf8_lossy(&reply.body).chars().take(200).collect::<String>();
        return Err(wrong(format!("status {}, {text}", reply.status)));
    }
    let metadata: Value = serde_json::from_slice(&reply.body).map_err(|e| wrong(e.to_string()))?;
    let (name, shape) = input(&metadata, tensors).map_err(wrong)?;
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let payload = |_| {
        let raw = noise(tensors.datatype, &shape, &mut rng);
        let write = if protocol == Protocol::OipJson { numbers } else { tensor };
        Request::Http(write(model, &name, tensors.datatype, &shape, &raw))
    };
    Ok((0..count.max(1)).map(payload).collect())
}

/// As `oip_http`, over gRPC.
pub async fn oip_grpc(
    server: &str,
    model: Option<&str>,
    tensors: Tensors,
    count: usize,
    seed: u64,
) -> Result<Vec<Request>, ProtocolError> {
    let model = model.ok_or(ProtocolError::NoModel)?;
    let unheard = |reason: String| ProtocolError::NoServer { server: server.into(), reason };
    let wrong = |reason: String| ProtocolError::Metadata { server: server.into(), model: model.into(), reason };
    let inputs = Grpc::new(server).map_err(unheard)?.metadata(model).await.map_err(wrong)?;
    let inputs: Vec<Value> = inputs
        .iter()
        .map(|(name, datatype, shape)| json!({ "name": name, "datatype": datatype, "shape": shape }))
        .collect();
    let (name, shape) = input(&json!({ "inputs": inputs }), tensors).map_err(wrong)?;
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let request = |_| {
        let raw = noise(tensors.datatype, &shape, &mut rng);
        Request::Grpc(grpc::request(model, &name, tensors.datatype.name(), &shape, raw))
    };
    Ok((0..count.max(1)).map(request).collect())
}

/// Standard normal values as little-endian float32, or uniformly random pixels.
fn noise(datatype: Datatype, shape: &[usize], rng: &mut ChaCha8Rng) -> Vec<u8> {
    let elements: usize = shape.iter().product();
    match datatype {
        Datatype::Fp32 => {
            let mut value = || -> f32 { StandardNormal.sample(rng) };
            (0..elements).flat_map(|_| value().to_le_bytes()).collect()
        }
        Datatype::Uint8 => {
            let mut pixels = vec![0; elements];
            rng.fill_bytes(&mut pixels);
            pixels
        }
    }
}

/// Name of a model's input, and shape of its tensors; dynamic dimensions other than the batch become 1.
fn input(metadata: &Value, tensors: Tensors) -> Result<(String, Vec<usize>), String> {
    let inputs = metadata["inputs"].as_array().ok_or("its metadata names no inputs")?;
    let input = inputs.iter().find(|i| i["datatype"] == "FP32").ok_or("it has no FP32 input")?;
    let name = input["name"].as_str().ok_or("its input has no name")?;
    let side = |v: &Value| v.as_i64().map(|d| usize::try_from(d).unwrap_or(1).max(1));
    let dims = input["shape"].as_array().ok_or("its input has no shape")?;
    let mut shape: Vec<usize> =
        dims.iter().map(side).collect::<Option<_>>().ok_or("its input's shape is not numbers")?;
    if let Some(images) = shape.first_mut() {
        *images = tensors.images.max(1);
    }
    if let (Datatype::Uint8, &[images, channels, height, width]) = (tensors.datatype, &shape[..]) {
        shape = vec![images, height, width, channels];
    }
    match shape.iter().try_fold(1usize, |all, d| all.checked_mul(*d)) {
        Some(elements) if elements <= 1 << 28 => Ok((name.into(), shape)),
        _ => Err(format!("its input's shape {shape:?} is too large")),
    }
}

/// A JSON header followed by the tensor's bytes, little-endian, row-major.
fn tensor(model: &str, name: &str, datatype: Datatype, shape: &[usize], raw: &[u8]) -> Payload {
    let head = json!({
        "inputs": [{
            "name": name,
            "shape": shape,
            "datatype": datatype.name(),
            "parameters": { "binary_data_size": raw.len() },
        }],
        "parameters": { "binary_data_output": true },
    })
    .to_string();
    let headers = vec![
        ("content-type", "application/octet-stream".to_string()),
        ("inference-header-content-length", head.len().to_string()),
    ];
    let body = [head.as_bytes(), raw].concat();
    Payload { target: format!("/v2/models/{model}/infer"), headers, body: Bytes::from(body) }
}

/// The tensor as numbers in JSON, in the order and with the digits of Python's clients, which make doubles of what they have.
fn numbers(model: &str, name: &str, datatype: Datatype, shape: &[usize], raw: &[u8]) -> Payload {
    let data: Value = match datatype {
        Datatype::Fp32 => {
            raw.chunks_exact(4).map(|b| f64::from(f32::from_le_bytes([b[0], b[1], b[2], b[3]]))).collect()
        }
        Datatype::Uint8 => raw.into(),
    };
    let (name, datatype) = (json!(name), datatype.name());
    let shape = json!(shape);
    let body =
        format!("{{\"inputs\":[{{\"name\":{name},\"shape\":{shape},\"datatype\":\"{datatype}\",\"data\":{data}}}]}}");
    let headers = vec![("content-type", "application/json".to_string())];
    Payload { target: format!("/v2/models/{model}/infer"), headers, body: Bytes::from(body) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tensors_follow_the_binary_extension() {
        let mut rng = ChaCha8Rng::seed_from_u64(0);
        let shape = [1, 3, 2, 2];
        let mut of = |datatype| tensor("m", "input", datatype, &shape, &noise(datatype, &shape, &mut rng));
        let payload = of(Datatype::Fp32);
        let head: usize = payload.headers[1].1.parse().expect("a number");
        let json: Value = serde_json::from_slice(&payload.body[..head]).expect("JSON");
        assert_eq!(json["inputs"][0]["parameters"]["binary_data_size"], 48);
        assert_eq!(payload.body.len() - head, 48);
        assert_ne!(payload.body, of(Datatype::Fp32).body);
        assert_eq!(json["inputs"][0]["datatype"], "FP32");
        let head: usize = of(Datatype::Uint8).headers[1].1.parse().expect("a number");
        assert_eq!(of(Datatype::Uint8).body.len() - head, 12);
    }

    #[test]
    fn numbers_are_those_of_the_bytes() {
        let mut rng = ChaCha8Rng::seed_from_u64(0);
        for datatype in [Datatype::Fp32, Datatype::Uint8] {
            let raw = noise(datatype, &[1, 3, 2, 2], &mut rng);
            let payload = numbers("m", "input", datatype, &[1, 3, 2, 2], &raw);
            let json: Value = serde_json::from_slice(&payload.body).expect("JSON");
            let data = json["inputs"][0]["data"].as_array().expect("a list");
            let back = |value: &Value| match datatype {
                Datatype::Fp32 => (value.as_f64().expect("a number") as f32).to_le_bytes().to_vec(),
                Datatype::Uint8 => vec![value.as_u64().expect("a number") as u8],
            };
            assert_eq!(data.iter().flat_map(back).collect::<Vec<u8>>(), raw);
        }
    }

    #[test]
    fn metadata_is_not_trusted() {
        let of = |inputs: Value| input(&json!({ "inputs": inputs }), Tensors::default());
        let good = of(
            json!([{"name": "i", "datatype": "UINT8", "shape": [1]}, {"name": "x", "datatype": "FP32", "shape": [-1, 3, 8, 8]}]),
        );
        assert_eq!(good, Ok(("x".into(), vec![1, 3, 8, 8])));
        let inputs = json!([{"name": "x", "datatype": "FP32", "shape": [-1, 3, 8, 6]}]);
        let pixels = Tensors { datatype: Datatype::Uint8, images: 4 };
        assert_eq!(input(&json!({ "inputs": inputs }), pixels), Ok(("x".into(), vec![4, 8, 6, 3])));
        for bad in [
            json!(null),
            json!([]),
            json!([{"name": "x", "datatype": "FP32", "shape": ["a"]}]),
            json!([{"name": "x", "datatype": "FP32", "shape": [1_000_000, 1_000_000, 1_000_000, 1_000_000]}]),
        ] {
            assert!(of(bad.clone()).is_err(), "{bad}");
        }
    }
}
