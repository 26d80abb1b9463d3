//! Any request gets a well-formed response: valid requests of every kind, damaged in every part, over real sockets.

use std::io::Write as _;
use std::net::TcpStream;
use std::time::Duration;

use base64::Engine as _;
use nfold::pb::open_inference as pb;
use nfold::pb::open_inference::grpc_inference_service_client::GrpcInferenceServiceClient;
use nfold::server::Options;
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;
use proptest::test_runner::{Config, TestRunner};
use serde_json::{Value, json};
use tonic::Code;

use crate::fakes::{SIDE, options};
use crate::serve::{Answer, TestServer, local, parse, png, start};

const LEN: usize = 3 * SIDE * SIDE;
/// Possible statuses of a response.
const STATUSES: [u16; 13] = [200, 400, 401, 404, 405, 408, 413, 414, 415, 429, 431, 503, 504];

fn small() -> Options {
    Options {
        body_limit: 64 << 10,
        request_timeout: Duration::from_millis(400),
        head_timeout: Duration::from_millis(400),
        ..local()
    }
}

#[derive(Debug, Clone)]
struct Request {
    method: String,
    path: String,
    headers: Vec<(String, String)>,
    body: Vec<u8>,
    chunked: bool,
    /// Changed bytes of the head: position in thousandths, and the new byte.
    damage: Vec<(usize, u8)>,
}

impl Request {
    fn bytes(&self) -> Vec<u8> {
        let Self { method, path, headers, body, chunked, damage } = self;
        let mut head = format!("{method} {path} HTTP/1.1\r\nhost: t\r\nconnection: close\r\n");
        headers.iter().for_each(|(name, value)| head += &format!("{name}: {value}\r\n"));
        head += &if *chunked {
            "transfer-encoding: chunked\r\n\r\n".into()
        } else {
            format!("content-length: {}\r\n\r\n", body.len())
        };
        let mut bytes = head.into_bytes();
        for (at, byte) in damage {
            let at = at * bytes.len() / 1000;
            bytes[at] = *byte;
        }
        if *chunked {
            for piece in body.chunks(100) {
                bytes.extend(format!("{:x}\r\n", piece.len()).bytes());
                bytes.extend(piece);
                bytes.extend(b"\r\n");
            }
            bytes.extend(b"0\r\n\r\n");
        } else {
            bytes.extend(body);
        }
        bytes
    }
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

type Valid = (&'static str, &'static str, Vec<(String, String)>, Vec<u8>);

/// Valid requests of every kind: method, path, headers, body.
fn valid() -> Vec<Valid> {
    let kind = |value: &str| vec![("content-type".to_string(), value.to_string())];
    let b64 = base64::engine::general_purpose::STANDARD.encode(png(3));
    let images = json!({ "images": [{ "b64": b64 }, { "b64": b64 }], "top_k": 2 }).to_string().into_bytes();
    let mut form = b"--X\r\ncontent-disposition: form-data; name=\"f\"; filename=\"f\"\r\n\r\n".to_vec();
    form.extend(png(4));
    form.extend(b"\r\n--X--\r\n");
    let numbers: Vec<f32> = (0..LEN).map(|i| i as f32 * 0.1).collect();
    let tensor = json!({ "id": "a", "inputs": [{ "name": "input", "datatype": "FP32", "shape": [1, 3, SIDE, SIDE], "data": numbers }],
        "outputs": [{ "name": "logits", "parameters": { "classification": 2 } }], "parameters": { "timeout": 300_000 } });
    let tensor = tensor.to_string().into_bytes();
    let framed = json!({ "inputs": [{ "name": "input", "datatype": "UINT8", "shape": [1, SIDE, SIDE, 3],
        "parameters": { "binary_data_size": LEN } }], "parameters": { "binary_data_output": true } });
    let framed = framed.to_string().into_bytes();
    let length = vec![("inference-header-content-length".to_string(), framed.len().to_string())];
    let framed = [framed, vec![7; LEN]].concat();
    let packed = [kind("application/json"), vec![("content-encoding".into(), "gzip".into())]].concat();
    let infer = "/v2/models/m/infer";
    vec![
        ("POST", "/v1/classify", kind("image/png"), png(1)),
        ("POST", "/v1/classify?top_k=2&model=m&version=1", vec![], png(2)),
        ("POST", "/v1/classify", kind("application/json"), images.clone()),
        ("POST", "/v1/classify", kind("multipart/form-data; boundary=X"), form),
        ("POST", "/v1/classify", packed.clone(), gzip(&images)),
        ("POST", infer, kind("application/json"), tensor.clone()),
        ("POST", "/v2/models/m/versions/1/infer", packed, gzip(&tensor)),
        ("POST", infer, length, framed),
        ("POST", "/v2/repository/index", vec![], b"{\"ready\": true}".to_vec()),
        ("GET", "/v2/models/m/config", vec![], vec![]),
        ("GET", "/v2/models/m/versions/1/stats", vec![], vec![]),
        ("GET", "/v2/health/ready", vec![], vec![]),
        ("GET", "/openapi.json", vec![], vec![]),
        ("GET", "/", vec![], vec![]),
    ]
}

fn header() -> impl Strategy<Value = (String, String)> {
    let names = [
        "content-type",
        "content-encoding",
        "inference-header-content-length",
        "x-request-timeout-ms",
        "x-request-id",
        "traceparent",
        "authorization",
        "origin",
        "expect",
        "x-anything",
    ];
    let values = [
        "",
        "0",
        "1",
        "-1",
        "99999999999999999999",
        "application/json",
        "multipart/form-data; boundary=",
        "image/png",
        "text/plain",
        "gzip",
        "deflate",
        "br",
        "100-continue",
        "Bearer x",
        "*",
    ];
    let value = prop_oneof![select(values.to_vec()).prop_map(String::from), "[ -~]{0,40}", "[0-9]{1,4}"];
    (select(names.to_vec()).prop_map(String::from), value)
}

fn damaged(body: Vec<u8>) -> impl Strategy<Value = Vec<u8>> {
    let whole = body.clone();
    prop_oneof![
        3 => Just(body.clone()),
        2 => (0..=1000_usize).prop_map(move |share| whole[..whole.len() * share / 1000].to_vec()),
        3 => vec((0..1000_usize, any::<u8>()), 1..6).prop_map(move |changes| {
            let mut body = body.clone();
            for (at, byte) in changes {
                let at = at * body.len() / 1000;
                if let Some(old) = body.get_mut(at) { *old = byte }
            }
            body
        }),
        1 => vec(any::<u8>(), 0..200),
        1 => (1..70_000_usize).prop_map(|n| b"[".repeat(n)),
    ]
}

fn request() -> impl Strategy<Value = Request> {
    select(valid()).prop_flat_map(|(method, path, headers, body)| {
        let methods = prop_oneof![6 => Just(method.to_string()), 1 => "[A-Z]{1,9}", 1 => select(&["GET", "PUT", "HEAD", "DELETE", "OPTIONS", "PATCH", "TRACE"][..]).prop_map(String::from)];
        let long = path.to_string();
        let other = path.to_string();
        let paths = prop_oneof![
            6 => Just(path.to_string()),
            1 => (0..20_000_usize).prop_map(move |n| format!("{long}?{}", "x".repeat(n))),
            1 => "[!-~]{0,12}".prop_map(move |tail| format!("{other}{tail}")),
            1 => "/[!-~]{0,30}",
        ];
        let more = vec(header(), 0..3).prop_map(move |more| [headers.clone(), more].concat());
        let head = prop_oneof![9 => Just(Vec::new()), 1 => vec((0..1000_usize, any::<u8>()), 1..3)];
        let parts = (methods, paths, more, damaged(body), prop::bool::weighted(0.2), head);
        parts.prop_map(|(method, path, headers, body, chunked, damage)| Request { method, path, headers, body, chunked, damage })
    })
}

/// The response; `None` is allowed only for a damaged head that never ended.
fn answer(server: &TestServer, request: &Request) -> Option<Answer> {
    use std::io::Read as _;
    let mut stream = TcpStream::connect(server.http).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    // a server may refuse before it has read everything
    let _ = stream.write_all(&request.bytes());
    let mut bytes = Vec::new();
    let _ = stream.read_to_end(&mut bytes);
    while bytes.starts_with(b"HTTP/1.1 100") {
        let end = bytes.windows(4).position(|w| w == b"\r\n\r\n").map_or(bytes.len(), |at| at + 4);
        bytes.drain(..end);
    }
    (!bytes.is_empty()).then(|| parse(bytes))
}

/// The body. After a damaged head, more responses may follow: what was a body has become a request.
fn unchunked(answer: &Answer, alone: bool) -> Result<Vec<u8>, String> {
    if answer.headers.get("transfer-encoding").is_none_or(|t| t != "chunked") {
        let told: usize = answer.headers.get("content-length").and_then(|l| l.parse().ok()).ok_or("no length")?;
        let came = answer.bytes.len();
        if told > came || alone && told < came {
            return Err(format!("{told} bytes were told, {came} came"));
        }
        return Ok(answer.bytes[..told].to_vec());
    }
    let (mut rest, mut body) = (&answer.bytes[..], Vec::new());
    loop {
        let line = rest.windows(2).position(|w| w == b"\r\n").ok_or("a chunk has no length")?;
        let length = std::str::from_utf8(&rest[..line]).ok().and_then(|l| usize::from_str_radix(l, 16).ok());
        let length = length.ok_or("a chunk's length is no number")?;
        rest = &rest[line + 2..];
        if length == 0 {
            return Ok(body);
        }
        body.extend(rest.get(..length).ok_or("a chunk is cut")?);
        rest = rest.get(length + 2..).ok_or("a chunk has no end")?;
    }
}

fn well_formed(request: &Request, answer: Option<Answer>) -> Result<(), String> {
    let Some(answer) = answer else {
        return if request.damage.is_empty() { Err("no answer".into()) } else { Ok(()) };
    };
    if !STATUSES.contains(&answer.status) {
        return Err(format!("status {}: {}", answer.status, answer.body));
    }
    let closes = answer.headers.get("connection").is_some_and(|connection| connection == "close");
    if matches!(answer.status, 400 | 431) && answer.bytes.is_empty() && closes {
        // not HTTP: hyper's refusal, the one error without a JSON body
        return Ok(());
    }
    if !answer.headers.contains_key("x-request-id") {
        return Err(format!("no id: {answer:?}"));
    }
    // damage may turn any request into HEAD
    if request.method == "HEAD" || answer.bytes.is_empty() && !request.damage.is_empty() {
        return Ok(());
    }
    let body = unchunked(&answer, request.damage.is_empty())?;
    if answer.status == 200 {
        let is_json = answer.headers.get("content-type").is_some_and(|kind| kind.starts_with("application/json"));
        return if is_json {
            serde_json::from_slice::<Value>(&body).map(drop).map_err(|e| e.to_string())
        } else {
            Ok(())
        };
    }
    let error: Value = serde_json::from_slice(&body).map_err(|e| format!("{e}: {answer:?}"))?;
    let named = |key: &str| error[key].as_str().is_some_and(|text| !text.is_empty());
    if named("error") && named("code") { Ok(()) } else { Err(format!("no error body: {error}")) }
}

#[test]
fn any_request_gets_a_well_formed_answer() {
    let server = start(small(), options(2, 4, 64));
    for (method, path, headers, body) in valid() {
        let request =
            Request { method: method.into(), path: path.into(), headers, body, chunked: false, damage: vec![] };
        assert_eq!(answer(&server, &request).unwrap().status, 200, "{method} {path} is valid");
    }
    let config = Config { cases: 2500, failure_persistence: None, ..Config::default() };
    let ran = TestRunner::new(config)
        .run(&request(), |request| well_formed(&request, answer(&server, &request)).map_err(TestCaseError::fail));
    ran.unwrap();
    assert_eq!(server.classify("", &[], &png(1)).status, 200);
    crate::fakes::eventually("nothing is left behind", || {
        (server.depth(), server.metrics.inflight_requests.get()) == (0, 0)
    });
    server.end().unwrap();
}

fn message() -> impl Strategy<Value = pb::ModelInferRequest> {
    use pb::model_infer_request::{InferInputTensor, InferRequestedOutputTensor};
    let name = |good: &'static str| prop_oneof![6 => Just(good.to_string()), 1 => "[ -~]{0,12}"];
    let datatype = prop_oneof![
        6 => select(&["FP32", "FP16", "UINT8", "BYTES"][..]).prop_map(String::from),
        1 => select(&["BOOL", "INT8", "INT64", "UINT64", "FP64", "BF16", "", "fp32"][..]).prop_map(String::from),
    ];
    let side = SIDE as i64;
    let shape = prop_oneof![
        4 => Just(vec![1, 3, side, side]),
        2 => Just(vec![1, side, side, 3]),
        1 => Just(vec![1]),
        2 => vec(prop_oneof![-2_i64..5, Just(i64::MAX), Just(i64::MIN)], 0..6),
    ];
    let raw = prop_oneof![
        3 => select(&[LEN, 2 * LEN, 4 * LEN, 4][..]).prop_flat_map(|n| vec(any::<u8>(), n)),
        1 => Just([&(png(5).len() as u32).to_le_bytes()[..], &png(5)].concat()),
        1 => vec(any::<u8>(), 0..64),
    ];
    let typed = (vec(any::<f32>(), 0..2 * LEN), vec(any::<u32>(), 0..20), vec(vec(any::<u8>(), 0..20), 0..3)).prop_map(
        |(fp32_contents, uint_contents, bytes)| pb::InferTensorContents {
            fp32_contents,
            uint_contents,
            bytes_contents: bytes.into_iter().map(Into::into).collect(),
            ..Default::default()
        },
    );
    let input = (name("input"), datatype, shape, proptest::option::weighted(0.3, typed));
    let outputs = vec((name("logits"), -2_i64..6), 0..3);
    (name("m"), prop_oneof![4 => Just(String::new()), 1 => "[0-9a-z]{1,4}"], vec(input, 0..3), vec(raw, 0..3), outputs)
        .prop_map(|(model_name, model_version, inputs, raw, outputs)| pb::ModelInferRequest {
            model_name,
            model_version,
            inputs: inputs
                .into_iter()
                .map(|(name, datatype, shape, contents)| InferInputTensor {
                    name,
                    datatype,
                    shape,
                    contents,
                    ..Default::default()
                })
                .collect(),
            outputs: outputs
                .into_iter()
                .map(|(name, k)| {
                    let k = pb::InferParameter {
                        parameter_choice: Some(pb::infer_parameter::ParameterChoice::Int64Param(k)),
                    };
                    InferRequestedOutputTensor { name, parameters: [("classification".to_string(), k)].into() }
                })
                .collect(),
            raw_input_contents: raw.into_iter().map(Into::into).collect(),
            ..Default::default()
        })
}

/// A valid message, some of its parts from a random one.
fn damaged_message() -> impl Strategy<Value = pb::ModelInferRequest> {
    let values: Vec<u8> = (0..LEN).flat_map(|i| (i as f32).to_le_bytes()).collect();
    let valid = pb::ModelInferRequest {
        model_name: "m".into(),
        inputs: vec![pb::model_infer_request::InferInputTensor {
            name: "input".into(),
            datatype: "FP32".into(),
            shape: vec![1, 3, SIDE as i64, SIDE as i64],
            ..Default::default()
        }],
        raw_input_contents: vec![values.into()],
        ..Default::default()
    };
    (message(), vec(prop::bool::weighted(0.3), 5)).prop_map(move |(random, take)| {
        let mut message = valid.clone();
        if take[0] {
            message.model_name = random.model_name
        }
        if take[1] {
            message.model_version = random.model_version
        }
        if take[2] {
            message.inputs = random.inputs
        }
        if take[3] {
            message.outputs = random.outputs
        }
        if take[4] {
            message.raw_input_contents = random.raw_input_contents
        }
        message
    })
}

#[test]
fn any_grpc_message_gets_an_answer_or_a_documented_status() {
    let server = start(small(), options(2, 4, 64));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let channel = tonic::transport::Channel::from_shared(format!("http://{}", server.grpc)).unwrap();
    let channel = runtime.block_on(channel.connect()).unwrap();
    let mut answered = 0;
    let seen = std::cell::RefCell::new(&mut answered);
    let config = Config { cases: 1500, failure_persistence: None, ..Config::default() };
    let ran = TestRunner::new(config).run(&damaged_message(), |message| {
        let mut client = GrpcInferenceServiceClient::new(channel.clone());
        match runtime.block_on(client.model_infer(message)) {
            Ok(_) => **seen.borrow_mut() += 1,
            Err(status) => {
                let known = [Code::InvalidArgument, Code::NotFound, Code::ResourceExhausted, Code::DeadlineExceeded];
                prop_assert!(known.contains(&status.code()) && !status.message().is_empty(), "{status:?}");
                prop_assert!(status.metadata().contains_key("x-error-code"), "{status:?}");
            }
        }
        Ok(())
    });
    ran.unwrap();
    assert!(answered > 10, "{answered} of the messages were valid: too few to say anything");
    assert_eq!(server.classify("", &[], &png(1)).status, 200);
    drop((channel, runtime));
    server.end().unwrap();
}
