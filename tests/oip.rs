//! `/v2` over real sockets. The fake network's logits are its input's first value, its second, and 0, so that every
//! number can be followed through the server.

use std::io::Write as _;
use std::net::{SocketAddr, TcpStream};

use base64::Engine as _;
use half::f16;
use nfold::infer::registry::{LiveModel, Registry};
use nfold::metrics::{Outcome, Protocol};
use nfold::server::{Limits, Options, oip::framing};
use proptest::prelude::*;
use serde_json::{Value, json};

use crate::fakes::{CLASSES, Fault, SIDE, options};
use crate::serve::{Answer, TestServer, ask, local, png, start};

const LEN: usize = 3 * SIDE * SIDE;
const INFER: &str = "POST /v2/models/m/infer";

/// Logits of `image`'s tensor by the fake network.
fn logits(first: f32, second: f32) -> [f32; CLASSES] {
    [first, second, 0.0]
}

fn tensor(seed: f32) -> Vec<f32> {
    (0..LEN).map(|i| seed + i as f32 * 0.37).collect()
}

fn infer(server: &TestServer, body: &Value) -> Answer {
    ask(server.http, INFER, &[], body.to_string().as_bytes())
}

fn input(datatype: &str, shape: &[usize], data: Value) -> Value {
    json!({ "name": "input", "datatype": datatype, "shape": shape, "data": data })
}

fn numbers(answer: &Answer) -> Vec<f32> {
    assert_eq!(answer.status, 200, "{answer:?}");
    answer.json()["outputs"][0]["data"].as_array().unwrap().iter().map(|v| v.as_f64().unwrap() as f32).collect()
}

/// A body of JSON and bytes, and the value of the header that gives the JSON's length.
fn framed(json: &Value, bytes: &[u8]) -> (String, Vec<u8>) {
    let mut body = json.to_string().into_bytes();
    let length = body.len().to_string();
    body.extend_from_slice(bytes);
    (length, body)
}

fn le(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

/// The JSON and the bytes of a binary response with one output.
fn binary(answer: &Answer) -> (Value, Vec<u8>) {
    assert_eq!(answer.status, 200, "{answer:?}");
    assert_eq!(answer.headers["content-type"], "application/octet-stream");
    let length: usize = answer.headers["inference-header-content-length"].parse().unwrap();
    let json: Value = serde_json::from_slice(&answer.bytes[..length]).unwrap();
    let bytes = answer.bytes[length..].to_vec();
    assert_eq!(json["outputs"][0]["parameters"]["binary_data_size"], bytes.len());
    assert!(json["outputs"][0].get("data").is_none());
    (json, bytes)
}

#[test]
fn json_tensors_flat_and_nested_give_their_own_logits() {
    let server = start(local(), options(2, 4, 16));
    let (a, b) = (tensor(0.1), tensor(-3.7));
    let flat =
        json!({ "id": "x7", "inputs": [input("FP32", &[2, 3, SIDE, SIDE], json!([a.clone(), b.clone()].concat()))] });
    let answer = infer(&server, &flat);
    assert_eq!(numbers(&answer), [logits(a[0], a[1]), logits(b[0], b[1])].concat());
    let body = answer.json();
    assert_eq!((&body["id"], &body["model_name"], &body["model_version"]), (&json!("x7"), &json!("m"), &json!("1")));
    let output = &body["outputs"][0];
    assert_eq!((&output["name"], &output["datatype"]), (&json!("logits"), &json!("FP32")));
    assert_eq!(output["shape"], json!([2, CLASSES]));
    let planes: Vec<Vec<&[f32]>> = a.chunks(SIDE * SIDE).map(|p| p.chunks(SIDE).collect()).collect();
    let nested = json!({ "inputs": [input("FP32", &[1, 3, SIDE, SIDE], json!([planes]))] });
    let answer = infer(&server, &nested);
    assert_eq!(numbers(&answer), logits(a[0], a[1]));
    assert!(answer.json().get("id").is_none(), "{answer:?}");
    assert!(answer.headers["server-timing"].contains("inference;dur="));
    server.end().unwrap();
}

#[test]
fn binary_tensors_in_every_datatype_that_is_an_image() {
    let server = start(local(), options(2, 4, 16));
    let values = tensor(1.5);
    let halves: Vec<u8> = values.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()).collect();
    let half = |v: f32| f16::from_f32(v).to_f32();
    let pixels: Vec<u8> = (0..LEN as u8).map(|i| 255 - i).collect();
    let cases = [
        ("FP32", vec![1, 3, SIDE, SIDE], le(&values), logits(values[0], values[1])),
        ("FP16", vec![1, 3, SIDE, SIDE], halves, logits(half(values[0]), half(values[1]))),
        // the network sees planes: its second value is the red of the second pixel
        ("UINT8", vec![1, SIDE, SIDE, 3], pixels.clone(), logits(1.0, 252.0 / 255.0)),
    ];
    for (datatype, shape, bytes, expected) in cases {
        let one = json!({ "name": "input", "datatype": datatype, "shape": shape,
                          "parameters": { "binary_data_size": bytes.len() } });
        let request = json!({ "inputs": [one], "parameters": { "binary_data_output": true } });
        let (length, body) = framed(&request, &bytes);
        let answer = ask(server.http, INFER, &[("Inference-Header-Content-Length", &length)], &body);
        let (json, bytes) = binary(&answer);
        assert_eq!((bytes, &json["outputs"][0]["shape"]), (le(&expected), &json!([1, CLASSES])), "{datatype}");
    }
    let as_json = json!({ "inputs": [input("UINT8", &[1, SIDE, SIDE, 3], json!(pixels))] });
    assert_eq!(numbers(&infer(&server, &as_json)), logits(1.0, 252.0 / 255.0));
    // no JSON at all: the tensor is the body, and so is the answer's
    let answer = ask(server.http, INFER, &[("inference-header-content-length", "0")], &le(&values));
    assert_eq!(binary(&answer).1, le(&logits(values[0], values[1])));
    server.end().unwrap();
}

/// Encoded images through `/v2` give the logits of `/v1`.
#[test]
fn encoded_images_walk_the_same_path_as_classify() {
    let server = start(local(), options(2, 4, 16));
    let pictures = [png(255), png(40)];
    let texts: Vec<_> = pictures.iter().map(|p| base64::engine::general_purpose::STANDARD.encode(p)).collect();
    let by_json = numbers(&infer(&server, &json!({ "inputs": [input("BYTES", &[2], json!(texts))] })));
    let mut bytes = Vec::new();
    for picture in &pictures {
        bytes.extend((picture.len() as u32).to_le_bytes());
        bytes.extend(picture);
    }
    let one = json!({ "name": "input", "datatype": "BYTES", "shape": [2, 1], "parameters": { "binary_data_size": bytes.len() } });
    let (length, body) = framed(&json!({ "inputs": [one] }), &bytes);
    let by_bytes = numbers(&ask(server.http, INFER, &[("inference-header-content-length", &length)], &body));
    assert_eq!(by_json, by_bytes);
    let alone = ask(server.http, INFER, &[("inference-header-content-length", "0")], &pictures[1]);
    assert_eq!(binary(&alone).1, le(&by_json[CLASSES..]));
    for (i, picture) in pictures.iter().enumerate() {
        let row = &by_json[i * CLASSES..(i + 1) * CLASSES];
        assert_eq!((row[0], row[2]), (f32::from([255_u8, 40][i]) / 255.0, 0.0));
        let classified = server.classify("?top_k=3", &[], picture).json()["results"][0]["predictions"].clone();
        let top = nfold::infer::top_k::top_k(row, 3, &["first", "second", "third"].map(String::from)).unwrap();
        assert_eq!(classified, serde_json::to_value(top).unwrap());
    }
    let broken = json!({ "inputs": [input("BYTES", &[2], json!([texts[0], "bm8gaW1hZ2U="]))] });
    let answer = infer(&server, &broken);
    assert_eq!(answer.error(), (415, "unsupported_media_type".into()));
    assert!(answer.body.contains("image 1 of the batch"), "{answer:?}");
    server.end().unwrap();
}

#[test]
fn classes_instead_of_numbers() {
    let server = start(local(), options(1, 4, 16));
    let mut values = tensor(0.0);
    (values[0], values[1]) = (0.25, 2.5);
    let mut request = json!({
        "inputs": [input("FP32", &[1, 3, SIDE, SIDE], json!(values))],
        "outputs": [{ "name": "logits", "parameters": { "classification": 2 } }],
    });
    let answer = infer(&server, &request);
    let output = &answer.json()["outputs"][0];
    assert_eq!((&output["datatype"], &output["shape"]), (&json!("BYTES"), &json!([1, 2])));
    assert_eq!(output["data"], json!(["2.500000:1:second", "0.250000:0:first"]));
    request["outputs"][0]["parameters"] = json!({ "classification": 99, "binary_data": true });
    let (json, bytes) = binary(&infer(&server, &request));
    assert_eq!(json["outputs"][0]["shape"], json!([1, 3]));
    assert_eq!(bytes[..4], 17_u32.to_le_bytes());
    assert_eq!(&bytes[4..21], b"2.500000:1:second");
    server.end().unwrap();
}

#[test]
fn what_is_told_about_models() {
    let server = start(local(), options(2, 4, 16));
    let get = |path: &str| {
        let answer = ask(server.http, &format!("GET {path}"), &[], b"");
        assert_eq!(answer.status, 200, "{path}: {answer:?}");
        answer.json()
    };
    let about = get("/v2");
    assert_eq!(about, get("/v2/"));
    assert_eq!(about["name"], "nfold");
    for extension in ["binary_tensor_data", "classification", "statistics", "model_configuration", "schedule_policy"] {
        assert!(about["extensions"].as_array().unwrap().contains(&json!(extension)), "{extension}");
    }
    assert_eq!(get("/v2/models"), json!({ "models": ["m"] }));
    let model = get("/v2/models/m/versions/1");
    assert_eq!(model, get("/v2/models/m"));
    assert_eq!((&model["platform"], &model["versions"]), (&json!("onnx_onnxv1"), &json!(["1"])));
    assert_eq!(model["inputs"], json!([{ "name": "input", "datatype": "FP32", "shape": [-1, 3, SIDE, SIDE] }]));
    assert_eq!(model["outputs"], json!([{ "name": "logits", "datatype": "FP32", "shape": [-1, CLASSES] }]));
    assert_eq!(get("/v2/models/m/ready"), json!({ "name": "m", "ready": true }));
    let config = get("/v2/models/m/config");
    assert_eq!((&config["max_batch_size"], &config["backend"]), (&json!(4), &json!("onnxruntime")));
    assert_eq!(config["input"][0]["data_type"], "TYPE_FP32");
    assert_eq!(config["input"][0]["dims"], json!([3, SIDE, SIDE]));
    assert!(config["dynamic_batching"].is_object());
    let index = ask(server.http, "POST /v2/repository/index", &[], b"{\"ready\":true}");
    assert_eq!(index.json(), json!([{ "name": "m", "version": "1", "state": "READY", "reason": "" }]));
    assert_eq!(ask(server.http, "POST /v2/repository/index", &[], b"").json(), index.json());
    server.end().unwrap();
}

#[test]
fn statistics_count_requests_images_and_runs() {
    let server = start(local(), options(1, 4, 16));
    let stats = |path: &str| ask(server.http, &format!("GET {path}"), &[], b"").json()["model_stats"][0].clone();
    let fresh = stats("/v2/models/m/stats");
    assert_eq!((&fresh["inference_count"], &fresh["execution_count"]), (&json!(0), &json!(0)), "no warm-up in it");
    let three =
        json!({ "inputs": [input("FP32", &[3, 3, SIDE, SIDE], json!([tensor(0.0), tensor(1.0), tensor(2.0)]))] });
    assert_eq!(infer(&server, &three).status, 200);
    assert_eq!(server.classify("", &[], &png(9)).status, 200);
    assert_eq!(server.classify("", &[], b"no image").status, 415);
    for path in ["/v2/models/stats", "/v2/models/m/stats", "/v2/models/m/versions/1/stats"] {
        let s = stats(path);
        assert_eq!((&s["name"], &s["version"]), (&json!("m"), &json!("1")), "{s}");
        assert_eq!(s["inference_count"], 4, "{s}");
        let runs = s["execution_count"].as_u64().unwrap();
        assert!((2..=4).contains(&runs), "{s}");
        for name in ["success", "queue", "compute_input", "compute_infer", "compute_output"] {
            assert_eq!(s["inference_stats"][name]["count"], 2, "{name}: {s}");
        }
        assert_eq!(s["inference_stats"]["fail"]["count"], 1, "{s}");
        assert_eq!(s["inference_stats"]["cache_hit"], json!({ "count": 0, "ns": 0 }));
        assert!(s["inference_stats"]["success"]["ns"].as_u64() >= s["inference_stats"]["compute_infer"]["ns"].as_u64());
        assert!(s["last_inference"].as_u64().unwrap() > 1_700_000_000_000, "{s}");
        let batches = s["batch_stats"].as_array().unwrap();
        let of = |b: &Value| (b["batch_size"].as_u64().unwrap(), b["compute_infer"]["count"].as_u64().unwrap());
        assert_eq!(batches.iter().map(|b| of(b).1).sum::<u64>(), runs);
        assert_eq!(batches.iter().map(|b| of(b).0 * of(b).1).sum::<u64>(), 4, "{s}");
    }
    server.end().unwrap();
}

#[test]
fn compression_both_ways_and_no_bomb() {
    let server = start(Options { body_limit: 100_000, ..local() }, options(1, 8, 64));
    let many: Vec<Vec<f32>> = (0..64).map(|i| tensor(i as f32)).collect();
    let body = json!({ "inputs": [input("FP32", &[64, 3, SIDE, SIDE], json!(many))] }).to_string();
    let gzip = |bytes: &[u8]| {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    };
    let mut deflate = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::fast());
    deflate.write_all(body.as_bytes()).unwrap();
    for (encoding, bytes) in [("gzip", gzip(body.as_bytes())), ("deflate", deflate.finish().unwrap())] {
        let answer = ask(server.http, INFER, &[("content-encoding", encoding)], &bytes);
        assert_eq!(numbers(&answer)[CLASSES], many[1][0], "{encoding}");
    }
    let answer = ask(server.http, INFER, &[("accept-encoding", "gzip")], body.as_bytes());
    assert_eq!((answer.status, answer.headers["content-encoding"].as_str()), (200, "gzip"));
    let mut plain = String::new();
    let bytes = unchunked(&answer);
    std::io::Read::read_to_string(&mut flate2::read::GzDecoder::new(&bytes[..]), &mut plain).unwrap();
    assert!(plain.contains("\"logits\""), "{plain}");

    let bomb = gzip(&vec![b' '; 50_000_000]);
    assert!(bomb.len() < 100_000, "small enough to be let in");
    assert_eq!(ask(server.http, INFER, &[("content-encoding", "gzip")], &bomb).error(), (413, "body_too_large".into()));
    let cut = &gzip(body.as_bytes())[..40];
    assert_eq!(ask(server.http, INFER, &[("content-encoding", "gzip")], cut).error(), (400, "invalid_request".into()));
    let unknown = ask(server.http, INFER, &[("content-encoding", "br")], b"x");
    assert_eq!(unknown.error(), (415, "unsupported_media_type".into()));
    assert_eq!(unknown.headers["accept-encoding"], "gzip, deflate");
    server.end().unwrap();
}

/// The body of an answer that came in chunks.
fn unchunked(answer: &Answer) -> Vec<u8> {
    if answer.headers.get("transfer-encoding").is_none_or(|t| t != "chunked") {
        return answer.bytes.clone();
    }
    let (mut rest, mut body) = (&answer.bytes[..], Vec::new());
    loop {
        let end = rest.windows(2).position(|w| w == b"\r\n").unwrap();
        let length = usize::from_str_radix(std::str::from_utf8(&rest[..end]).unwrap(), 16).unwrap();
        if length == 0 {
            return body;
        }
        body.extend_from_slice(&rest[end + 2..end + 2 + length]);
        rest = &rest[end + 2 + length + 2..];
    }
}

#[test]
fn every_mistake_is_told_by_name() {
    let server = start(Options { body_limit: 4000, ..local() }, options(1, 4, 8));
    let good = || input("FP32", &[1, 3, SIDE, SIDE], json!(tensor(0.0)));
    let with = |field: &str, value: Value| {
        let mut input = good();
        input[field] = value;
        json!({ "inputs": [input] })
    };
    let outputs = |outputs: Value| json!({ "inputs": [good()], "outputs": outputs });
    let parameters = |parameters: Value| json!({ "inputs": [good()], "parameters": parameters });
    let cases = [
        (json!({}), "inputs"),
        (json!({ "inputs": [] }), "exactly one input"),
        (json!({ "inputs": [good(), good()] }), "exactly one input"),
        (json!([1]), "no inference request"),
        (with("name", json!("x")), "input `x` does not exist"),
        (with("datatype", json!("FP31")), "`FP31` is no datatype"),
        (with("datatype", json!("INT32")), "not taken as INT32"),
        (with("datatype", json!("FP16")), "send it as bytes"),
        (with("shape", json!([1, 3, 4, 4])), "must be [N,3,2,2]"),
        (with("shape", json!([3, 2, 2])), "must be [N,3,2,2]"),
        (with("shape", json!([])), "elements of the shape"),
        (with("shape", json!([2, 3, SIDE, SIDE])), "has 12 values, its shape needs 24"),
        (with("shape", json!([0, 3, SIDE, SIDE])), "more than the 0 elements"),
        (with("shape", json!([-1, 3, SIDE, SIDE])), "can't have shape"),
        (with("shape", json!([i64::MAX, i64::MAX, 2, 2])), "can't have shape"),
        (with("shape", json!([1_000_000, 3, 2, 2])), "at most 8 are taken"),
        (with("data", json!("text")), "an array is due"),
        (with("data", json!([["a"]])), "a string can't be an element"),
        (with("data", json!([null])), "data"),
        (with("data", json!(vec![1e300; LEN])), "send finite"),
        (with("data", Value::Null), "no `data`"),
        (with("parameters", json!({ "binary_data_size": 48 })), "both `data` and"),
        (with("parameters", json!({ "shared_memory_region": "r" })), "shared memory"),
        (outputs(json!([{ "name": "y" }])), "output `y` does not exist"),
        (outputs(json!([{ "name": "logits" }, { "name": "logits" }])), "more than once"),
        (outputs(json!([{ "name": "logits", "parameters": { "classification": -1 } }])), "`classification`"),
        (outputs(json!([{ "name": "logits", "parameters": { "binary_data": 1 } }])), "`binary_data`"),
        (parameters(json!({ "timeout": "soon" })), "`timeout`"),
        (parameters(json!({ "priority": 1.5 })), "`priority`"),
        (parameters(json!({ "priority": 5_000_000_000_u64 })), "priority 5000000000 is too large"),
    ];
    for (body, text) in &cases {
        let answer = infer(&server, body);
        assert_eq!(answer.error(), (400, "invalid_request".into()), "{body}: {answer:?}");
        assert!(answer.body.contains(text), "{body}: {answer:?}");
    }
    let as_bytes = json!({ "inputs": [{ "name": "input", "datatype": "FP32", "shape": [1, 3, SIDE, SIDE],
                                      "parameters": { "binary_data_size": 48 } }] });
    let framing = |length: &str, body: &[u8]| {
        ask(server.http, INFER, &[("inference-header-content-length", length)], body).error()
    };
    let (length, body) = framed(&as_bytes, &[0; 47]);
    assert_eq!(framing(&length, &body), (400, "invalid_request".into()), "one byte short");
    let (length, body) = framed(&as_bytes, &[0; 49]);
    assert_eq!(framing(&length, &body), (400, "invalid_request".into()), "one byte over");
    for length in ["-1", "x", "", "99999", "18446744073709551616"] {
        assert_eq!(framing(length, &body), (400, "invalid_request".into()), "{length}");
    }
    // what load generators send: bytes can carry the answer, JSON can't
    let nan = ask(server.http, INFER, &[("inference-header-content-length", "0")], &le(&[f32::NAN; LEN]));
    assert_eq!(binary(&nan).1, le(&[f32::NAN, f32::NAN, 0.0]));
    let paths = [
        ("GET /v2/models/x", 404, "model_not_found"),
        ("GET /v2/models/m/versions/2", 404, "model_not_found"),
        ("GET /v2/models/m/versions/x", 404, "model_not_found"),
        ("GET /v2/models/x/config", 404, "model_not_found"),
        ("GET /v2/models/x/stats", 404, "model_not_found"),
        ("GET /v2/models/%ff/ready", 400, "invalid_request"),
        ("POST /v2/models/x/infer", 404, "model_not_found"),
        ("GET /v2/models/m/infer", 405, "method_not_allowed"),
        ("GET /v2/nothing", 404, "not_found"),
        ("POST /v2/repository/models/m/load", 400, "invalid_request"),
        ("POST /v2/repository/models/m/unload", 400, "invalid_request"),
    ];
    for (head, status, code) in paths {
        assert_eq!(ask(server.http, head, &[], b"").error(), (status, code.to_string()), "{head}");
    }
    assert_eq!(ask(server.http, INFER, &[], &[b' '; 5000]).error(), (413, "body_too_large".into()));
    assert_eq!(numbers(&infer(&server, &json!({ "inputs": [good()] }))).len(), CLASSES, "and goes on");
    server.end().unwrap();
}

#[test]
fn a_clients_own_numbers_that_overflow_the_network_are_its_own_fault() {
    let server = start(local(), options(1, 4, 8));
    *server.strings.fault.lock().unwrap() = Some(Fault::Nan);
    let mut values = tensor(0.0);
    values[0] = crate::fakes::MARK;
    let answer = infer(&server, &json!({ "inputs": [input("FP32", &[1, 3, SIDE, SIDE], json!(values))] }));
    assert_eq!(answer.error(), (400, "invalid_request".into()));
    server.end().unwrap();
}

#[test]
fn the_protocols_timeout_is_a_deadline() {
    let server = start(local(), options(1, 1, 8));
    let busy = server.occupy();
    let late = json!({ "inputs": [input("FP32", &[1, 3, SIDE, SIDE], json!(tensor(0.0)))],
                       "parameters": { "timeout": 40_000, "priority": 2 } });
    assert_eq!(infer(&server, &late).error(), (504, "deadline_exceeded".into()));
    server.strings.release();
    assert_eq!(crate::serve::receive(busy).status, 200);
    assert_eq!(server.requests(Protocol::OipHttp, Outcome::DeadlineExceeded), 1);
    server.end().unwrap();
}

#[test]
fn models_load_and_unload_only_when_allowed() {
    let server = start(Options { model_control: true, ..local() }, options(1, 1, 8));
    let load = ask(server.http, "POST /v2/repository/models/m/load", &[], b"");
    assert_eq!(load.error(), (400, "invalid_request".into()), "these models come from no repository");
    assert_eq!(ask(server.http, "POST /v2/repository/models/m/unload", &[], b"").json(), json!({}));
    assert_eq!(ask(server.http, "GET /v2/models/m", &[], b"").error().0, 404);
    assert_eq!(ask(server.http, "POST /v2/repository/models/m/unload", &[], b"").error().0, 404);
    assert_eq!(ask(server.http, "GET /v2/models", &[], b"").json(), json!({ "models": [] }));
    server.end().unwrap();
}

#[test]
fn openapi_describes_every_route_and_the_page_is_here() {
    let server = start(local(), options(1, 1, 8));
    let api = ask(server.http, "GET /openapi.json", &[], b"").json();
    assert!(api["openapi"].as_str().unwrap().starts_with("3.1"), "{}", api["openapi"]);
    let paths = api["paths"].as_object().unwrap();
    for (path, item) in paths {
        for (method, operation) in item.as_object().unwrap() {
            let real = path.replace("{model}", "m").replace("{version}", "1");
            let answer = ask(server.http, &format!("{} {real}", method.to_uppercase()), &[], b"");
            assert!(!matches!(answer.status, 404 | 405), "{method} {path}: {answer:?}");
            assert!(operation["responses"]["200"].is_object() && operation["responses"]["default"].is_object());
            assert!(operation["summary"].as_str().is_some_and(|s| !s.is_empty()), "{path} says nothing");
        }
    }
    for path in
        ["/v1/classify", "/v2/models/{model}/infer", "/v2/models/{model}/versions/{version}/infer", "/v2/health/ready"]
    {
        assert!(paths.contains_key(path), "{path}");
    }
    let page = ask(server.http, "GET /docs/", &[], b"");
    assert!(page.status == 200 && page.body.contains("swagger-ui"), "{page:?}");
    for (part, _) in page.body.match_indices("src=\"").chain(page.body.match_indices("href=\"")) {
        let asset = page.body[part..].split('"').nth(1).unwrap();
        assert!(!asset.contains("//"), "`{asset}` is not here");
        let answer = ask(server.http, &format!("GET /docs/{}", asset.trim_start_matches("./")), &[], b"");
        assert_eq!(answer.status, 200, "{asset}");
    }
    server.end().unwrap();
}

/// 10,000 requests, each damaged in its own way; then the server answers and uses no more memory than before.
#[test]
fn ten_thousand_malformed_requests_leave_no_trace() {
    let server = start(Options { body_limit: 64 << 10, ..local() }, options(2, 4, 64));
    let good = json!({ "inputs": [input("FP32", &[1, 3, SIDE, SIDE], json!(tensor(0.0)))] }).to_string().into_bytes();
    damage(server.http, &good, 500);
    // other tests of this process come and go; what a server keeps, it keeps each time
    let grown = |_| {
        let before = resident();
        damage(server.http, &good, 10_000);
        resident().saturating_sub(before)
    };
    assert!((0..3).map(grown).any(|bytes| bytes < 32 << 20), "32 MiB more each time");
    let answer = ask(server.http, INFER, &[], &good);
    assert_eq!(numbers(&answer).len(), CLASSES);
    assert_eq!((server.depth(), server.metrics.inflight_requests.get()), (0, 0));
    server.end().unwrap();
}

fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/statm").unwrap();
    status.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4096
}

/// Sends `count` damaged requests over kept connections; every response must be complete and never a 5xx.
fn damage(address: SocketAddr, good: &[u8], count: u64) {
    use std::io::{BufRead as _, BufReader, Read as _};
    let mut random = 0x1234_5678_9abc_def1_u64;
    let mut next = move || {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random
    };
    let mut stream: Option<BufReader<TcpStream>> = None;
    for _ in 0..count {
        let mut body = good.to_vec();
        match next() % 4 {
            0 => body.truncate((next() as usize) % body.len()),
            1 => {
                for _ in 0..1 + next() % 8 {
                    let at = (next() as usize) % body.len();
                    body[at] = next() as u8;
                }
            }
            2 => body = (0..next() % 200).map(|_| next() as u8).collect(),
            _ => body = b"[".repeat((next() % 4000) as usize),
        }
        let length = match next() % 3 {
            0 => format!("inference-header-content-length: {}\r\n", next() % (2 * body.len() as u64 + 1)),
            _ => String::new(),
        };
        let path = ["/v2/models/m/infer", "/v1/classify", "/v2/repository/index"][(next() % 3) as usize];
        let head = format!("POST {path} HTTP/1.1\r\nhost: t\r\n{length}content-length: {}\r\n\r\n", body.len());
        let connection = stream.get_or_insert_with(|| BufReader::new(TcpStream::connect(address).unwrap()));
        connection.get_mut().write_all(&[head.as_bytes(), &body].concat()).unwrap();
        let (mut status, mut bytes, mut close) = (0, 0_usize, false);
        loop {
            let mut line = String::new();
            assert_ne!(connection.read_line(&mut line).unwrap(), 0, "the connection ended inside an answer");
            let line = line.trim_end().to_ascii_lowercase();
            if let Some(rest) = line.strip_prefix("http/1.1 ") {
                status = rest[..3].parse().unwrap();
            }
            if let Some(rest) = line.strip_prefix("content-length: ") {
                bytes = rest.parse().unwrap();
            }
            close |= line == "connection: close";
            if line.is_empty() {
                break;
            }
        }
        let mut answer = vec![0; bytes];
        connection.read_exact(&mut answer).unwrap();
        assert!((200..500).contains(&status), "{status}: {}", String::from_utf8_lossy(&answer));
        let json: Value = serde_json::from_slice(&answer).unwrap();
        assert!(status == 200 || json["error"].is_string(), "{json}");
        if close {
            stream = None;
        }
    }
}

/// Generous limits for the tests below.
const LIMITS: Limits = Limits { images: 8, values: 1000 };

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    /// For any body, parsing ends with a request or with an error that a client may read.
    #[test]
    fn any_body_is_a_request_or_an_error(length in proptest::option::of(0_usize..400), body in proptest::collection::vec(any::<u8>(), 0..300)) {
        let error = framing::parse(length, &body.into(), &LIMITS, &mut |_| Ok(())).err();
        prop_assert!(error.is_none_or(|e| e.code == Outcome::InvalidRequest && !e.message.is_empty()));
    }

    /// Numbers arrive bit for bit, whichever way a tensor is sent.
    #[test]
    fn framed_numbers_arrive_bit_for_bit(values in proptest::collection::vec(proptest::num::f32::NORMAL, 1..40)) {
        use nfold::server::oip::{datatype::Datatype, inference::Contents};
        let bytes = le(&values);
        let by_bytes = json!({ "inputs": [{ "name": "input", "datatype": "FP32", "shape": [values.len()],
                                            "parameters": { "binary_data_size": bytes.len() } }] });
        let (length, body) = framed(&by_bytes, &bytes);
        let parsed = framing::parse(length.parse().ok(), &body.into(), &LIMITS, &mut |_| Ok(())).unwrap();
        prop_assert_eq!(&parsed.inputs[0].contents, &Contents::Raw(Datatype::Fp32, bytes.into()));
        let by_text = json!({ "inputs": [input("FP32", &[values.len()], json!(values))] });
        let parsed = framing::parse(None, &by_text.to_string().into_bytes().into(), &LIMITS, &mut |_| Ok(())).unwrap();
        prop_assert_eq!(&parsed.inputs[0].contents, &Contents::Fp32(le(&values).into()));
    }
}

/// A registry without a repository has nothing to load from, and says so.
#[test]
fn nothing_is_loaded_from_nowhere() {
    let metrics = nfold::metrics::Metrics::new();
    let error = Registry::default().load("m", &metrics).unwrap_err();
    assert!(error.to_string().contains("repository"), "{error}");
    let _: fn(&LiveModel) -> nfold::metrics::statistics::Snapshot = LiveModel::statistics;
}
