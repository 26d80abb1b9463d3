//! Bytes from clients: bodies of every format, and request heads. See `crate::fuzz`.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Bytes;
use axum::http::{Request, Response, StatusCode};
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto::Builder;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::accept::HEAD_LIMIT;
use super::bodies::budget::Charge;
use super::bodies::inflate::Inflater;
use super::bodies::{Bodies, Limits, upload};
use super::grpc::read_message;
use super::head;
use super::oip::framing;
use super::oip::inference::{Contents, Inference};
use super::status::{ApiError, Code};
use crate::fuzz::{Door, Verdict, counted, files, is_readable, root, run};
use crate::metrics::Metrics;

const LIMITS: Limits = Limits { images: 8, values: 12 };

/// Checks the text of a refusal.
fn refusal(error: &ApiError) -> String {
    let known = [Code::InvalidRequest, Code::BodyTooLarge, Code::UnsupportedMediaType, Code::Overloaded];
    assert!(known.contains(&error.code), "{error:?}");
    assert!(error.detail.is_none(), "no fault of this side: {error:?}");
    assert!(is_readable(&error.message) && error.message.chars().count() <= 1001, "{error:?}");
    format!("{}: {}", error.code.name(), error.message)
}

/// Limits of `limit` bytes, per body and for all together.
fn bodies(limit: usize) -> (Bodies, Arc<Metrics>) {
    let metrics = Arc::new(Metrics::new());
    (Bodies::new(limit, limit, &metrics), metrics)
}

fn strings(texts: &[&str]) -> Vec<Vec<u8>> {
    texts.iter().map(|text| text.as_bytes().to_vec()).collect()
}

/// Checks that an upload has at most the allowed images, with no more bytes than arrived.
fn judge_upload(
    (bodies, metrics): &(Bodies, Arc<Metrics>),
    bytes: &[u8],
    read: fn(&Bytes, usize, Charge) -> Result<upload::Upload, ApiError>,
) -> Verdict {
    let body = Bytes::copy_from_slice(bytes);
    let mut charge = bodies.budget.charge();
    charge.grow(bytes.len()).expect("room");
    let (result, cost) = counted(|| read(&body, LIMITS.images, charge));
    let outcome = match &result {
        Ok(upload) => {
            assert!((1..=LIMITS.images).contains(&upload.images.len()), "{} images", upload.images.len());
            let held: usize = upload.images.iter().flatten().map(Bytes::len).sum();
            assert!(held <= bytes.len(), "{held} bytes of {}", bytes.len());
            format!("{} images, {:?}", upload.images.len(), upload.asked.top_k.is_some())
        }
        Err(error) => refusal(error),
    };
    drop(result);
    assert_eq!(metrics.body_bytes.get(), 0, "all is given back");
    Verdict { outcome, cost, bytes: 64 * 1024 + 4 * bytes.len(), allocations: 4000 }
}

#[test]
fn forms() {
    let seeds = strings(&[
        "--b\r\ncontent-disposition: form-data; name=\"image\"; filename=\"a.jpg\"\r\ncontent-type: image/jpeg\r\n\r\nxxxx\r\n--b--\r\n",
        "--b\r\ncontent-disposition: form-data; name=top_k\r\n\r\n5\r\n--b\r\ncontent-disposition: form-data; name=image; filename=a\r\n\r\n\r\n--b--",
        "preamble\r\n--b  \r\ncontent-disposition: form-data; name=\"\\\"\"; filename*=UTF-8''a%20b\r\n\r\nx\r\n--b\r\n\r\n\r\n--b--epilogue",
    ]);
    let words = &[
        "--b",
        "--b--",
        "\r\n",
        "\r\n\r\n",
        "content-disposition: form-data;",
        "name=",
        "filename=",
        "\"",
        "top_k",
        "content-type:",
    ];
    let bodies = bodies(1 << 20);
    run(&Door { name: "form", seeds, words, longest: 64 * 1024 }, |bytes| {
        judge_upload(&bodies, bytes, |body, most, charge| upload::read_form(body, "b", most, charge))
    });
}

#[test]
fn json_images() {
    let seeds = strings(&[
        r#"{"images":[{"b64":"aGVsbG8="}],"top_k":3}"#,
        r#"{"images":[{"b64":"data:image/png;base64,aGVs\nbG8"},{"b64":"_-8"},{"b64":""}]}"#,
        r#"{"top_k":null,"images":[]}"#,
    ]);
    let words: &[&str] = &[
        "\"images\"",
        "\"b64\"",
        "\"top_k\"",
        "[",
        "]",
        "{",
        "}",
        ":",
        ",",
        "\"",
        "\\n",
        "\\u0041",
        "null",
        "1e9",
        "aGVsbG8=",
        "[{\"b64\":\"\"}]",
        "[[[[[[[[",
    ];
    let bodies = bodies(1 << 20);
    run(&Door { name: "json", seeds, words, longest: 64 * 1024 }, |bytes| {
        judge_upload(&bodies, bytes, upload::read_json)
    });
}

/// Checks that a request keeps no more than what arrived and what was asked for, and that counts are within limits.
fn judge_inference(
    bytes: &[u8],
    read: impl FnOnce(&Bytes, &mut dyn FnMut(usize) -> Result<(), ApiError>) -> Result<Inference, ApiError>,
) -> Verdict {
    let body = Bytes::copy_from_slice(bytes);
    let mut asked = 0;
    let mut room = |more: usize| {
        asked += more;
        if asked > 1 << 20 { Err(ApiError::new(Code::Overloaded, "no room")) } else { Ok(()) }
    };
    let (parsed, cost) = counted(|| read(&body, &mut room));
    let outcome = match parsed {
        Err(error) => refusal(&error),
        Ok(inference) => {
            assert!(inference.inputs.len() <= 8 && inference.outputs.len() <= 8);
            let mut outcome = format!("{} inputs, {} outputs", inference.inputs.len(), inference.outputs.len());
            for tensor in inference.inputs {
                let (kind, held, count) = match tensor.contents {
                    Contents::Fp32(bytes) => ("numbers", bytes.len(), bytes.len() / 4),
                    Contents::Raw(..) | Contents::Bare(_) if bytes.is_empty() => ("none", 0, 0),
                    Contents::Raw(_, bytes) => ("raw", bytes.len(), 0),
                    Contents::Bare(bytes) => ("bare", bytes.len(), 0),
                    Contents::Elements(elements) => {
                        ("elements", elements.iter().map(|e| e.len()).sum(), elements.len())
                    }
                };
                assert!(held <= bytes.len() + asked, "{held} bytes from {} and room for {asked}", bytes.len());
                assert!(count <= LIMITS.images * LIMITS.values, "{count} {kind}");
                assert!(tensor.name.len() <= 1000 && tensor.shape.len() <= 16);
                outcome += kind;
            }
            outcome
        }
    };
    Verdict { outcome, cost, bytes: 64 * 1024 + 8 * bytes.len() + 2 * asked, allocations: 4000 + bytes.len() / 8 }
}

#[test]
fn oip_framing() {
    let json = r#"{"id":"x","parameters":{"priority":1,"timeout":9},"inputs":[{"name":"input","shape":[1,3,2,2],"datatype":"FP32","data":[[1,2,3,4],[5,6,7,8],[9,1.5,-2,1e3]]}],"outputs":[{"name":"logits","parameters":{"classification":3}}]}"#;
    let binary = r#"{"inputs":[{"name":"input","shape":[1],"datatype":"BYTES","parameters":{"binary_data_size":8}}]}"#;
    let framed =
        |length: usize, text: &str, tail: &[u8]| [&(length as u16).to_le_bytes()[..], text.as_bytes(), tail].concat();
    let seeds = vec![
        framed(0xffff, json, b""),
        framed(binary.len(), binary, b"\x04\0\0\0abcd"),
        framed(0, "", b"abcd"),
        framed(0xffff, r#"{"inputs":[{"name":"input","shape":[1],"datatype":"BYTES","data":["aGVsbG8="]}]}"#, b""),
    ];
    let words: &[&str] = &[
        "\"inputs\"",
        "\"outputs\"",
        "\"shape\"",
        "\"datatype\"",
        "\"data\"",
        "\"parameters\"",
        "\"binary_data_size\"",
        "\"name\"",
        "\"FP32\"",
        "\"FP16\"",
        "\"UINT8\"",
        "\"BYTES\"",
        "[",
        "]",
        "{",
        "}",
        ",",
        "1e999",
        "null",
        "[[[[",
        "9223372036854775807",
    ];
    run(&Door { name: "oip", seeds, words, longest: 64 * 1024 }, |bytes| {
        let (length, body) = bytes.split_at(bytes.len().min(2));
        let length = length.iter().rev().fold(0, |sum, &byte| sum << 8 | usize::from(byte));
        let length = (length != 0xffff).then_some(length);
        judge_inference(body, |body, room| framing::parse(length, body, &LIMITS, room))
    });
}

#[test]
fn grpc_messages() {
    use prost::Message as _;

    use crate::pb::open_inference as pb;
    let tensor = |contents| pb::model_infer_request::InferInputTensor {
        name: "input".into(),
        datatype: "FP32".into(),
        shape: vec![1, 3, 2, 2],
        contents,
        ..Default::default()
    };
    let request = |contents, raw: Vec<Vec<u8>>| pb::ModelInferRequest {
        model_name: "m".into(),
        id: "x".into(),
        inputs: vec![tensor(contents)],
        raw_input_contents: raw.into_iter().map(Into::into).collect(),
        ..Default::default()
    };
    let numbers = pb::InferTensorContents { fp32_contents: vec![0.5; 12], ..Default::default() };
    let elements = pb::InferTensorContents { bytes_contents: vec![b"abcd".to_vec().into()], ..Default::default() };
    let seeds = vec![
        request(Some(numbers), vec![]).encode_to_vec(),
        request(Some(elements), vec![]).encode_to_vec(),
        request(None, vec![vec![0; 48]]).encode_to_vec(),
    ];
    let words = &["FP32", "UINT8", "BYTES", "input", "\u{a}\u{0}", "\u{2a}\u{0}", "\u{3a}\u{0}"];
    run(&Door { name: "grpc", seeds, words, longest: 64 * 1024 }, |bytes| {
        judge_inference(bytes, |body, room| read_message(body, &LIMITS, room))
    });
}

/// The first bytes of a connection: a response to an unambiguous request, a refusal, or the end.
#[test]
fn http_heads() {
    let seeds = strings(&[
        "GET /v2/health/live HTTP/1.1\r\nhost: a\r\n\r\n",
        "POST /v1/classify?top_k=3 HTTP/1.1\r\nhost: a.test:8000\r\ncontent-type: image/jpeg\r\ncontent-length: 4\r\n\r\nabcd",
        "POST / HTTP/1.1\r\nHost: [::1]:80\r\ntransfer-encoding: chunked\r\nexpect: 100-continue\r\n\r\n4\r\nabcd\r\n0\r\n\r\n",
        "GET http://a/ HTTP/1.0\r\nauthorization: Bearer x\r\nx-request-timeout-ms: 5\r\n\r\n",
        "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\u{4}\0\0\0\0\0",
    ]);
    let words = &[
        "\r\n",
        "\r\n\r\n",
        "\n",
        ": ",
        "host: b\r\n",
        "content-length: 1\r\n",
        "transfer-encoding: chunked\r\n",
        "transfer-encoding: gzip\r\n",
        " HTTP/1.1\r\n",
        "connection: close\r\n",
        "\t",
        "\0",
        "x: y\r\n",
        "%00",
        "//",
        "content-type: a\r\n",
        "authorization: Bearer y\r\n",
        "0\r\n\r\n",
        "ffffffffffffffff\r\n",
    ];
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    run(&Door { name: "head", seeds, words, longest: 32 * 1024 }, |bytes| {
        let (answer, cost) = counted(|| runtime.block_on(asked(bytes)));
        let text = String::from_utf8_lossy(&answer);
        let statuses: Vec<u16> = text
            .split("HTTP/1.1 ")
            .skip(1)
            .filter_map(|rest| rest.get(..3).and_then(|status| status.parse().ok()))
            .collect();
        for status in &statuses {
            assert!([100, 200, 400, 414, 431].contains(status), "{status}: {text}");
        }
        let known = text.is_empty() || text.starts_with("HTTP/1.") || answer.starts_with(b"\0\0");
        assert!(known, "neither an answer nor HTTP/2's settings: {text:?}");
        // hyper's buffers and HTTP/2's tables
        Verdict {
            outcome: format!("{statuses:?}"),
            cost,
            bytes: (1 << 20) + 16 * bytes.len(),
            allocations: 3000 + 2 * bytes.len(),
        }
    });
}

/// Everything that is sent in response to these bytes.
async fn asked(bytes: &[u8]) -> Vec<u8> {
    let (mut client, server) = tokio::io::duplex(64 * 1024);
    let service = hyper::service::service_fn(|request: Request<Incoming>| async move {
        let status = match head::fault(&request) {
            Some(error) => error.code.http(),
            None => {
                let headers = request.headers();
                let count = |name: &str| headers.get_all(name).iter().count();
                assert!(count("host") <= 1 && count("content-length") <= 1 && count("authorization") <= 1);
                assert!(count("transfer-encoding") == 0 || count("content-length") == 0, "two lengths: {headers:?}");
                StatusCode::OK
            }
        };
        let mut response = Response::new(String::new());
        *response.status_mut() = status;
        Ok::<_, std::convert::Infallible>(response)
    });
    let mut builder = Builder::new(TokioExecutor::new());
    builder.http1().max_buf_size(HEAD_LIMIT).max_headers(128);
    let connection = builder.serve_connection(TokioIo::new(server), service);
    let talk = async {
        let mut answer = Vec::new();
        let _ = client.write_all(bytes).await;
        let _ = client.shutdown().await;
        let _ = client.read_to_end(&mut answer).await;
        answer
    };
    let both = async { tokio::join!(connection, talk).1 };
    tokio::time::timeout(Duration::from_secs(10), both).await.expect("an end")
}

/// Compressed bodies: their content, within the limit, or a refusal.
#[test]
fn gzip() {
    use std::io::Write as _;
    let cat = files(&root().join("tests/data"), 64 * 1024);
    let (_, cat) = cat.into_iter().find(|(path, _)| path.ends_with("cat.jpg")).expect("a cat");
    let pack = |bytes: &[u8]| {
        let mut packer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        packer.write_all(bytes).expect("in memory");
        packer.finish().expect("in memory")
    };
    let seeds = vec![pack(b"hello"), pack(&cat[..4096]), pack(&[0; 100_000]), [pack(b"a"), pack(b"b")].concat()];
    const LIMIT: usize = 256 * 1024;
    let (bodies, metrics) = bodies(LIMIT);
    run(&Door { name: "gzip", seeds, words: &["\u{1f}"], longest: 16 * 1024 }, |bytes| {
        let (inflated, cost) = counted(|| {
            let mut inflater = Inflater::gzip(bodies.limit, bodies.budget.charge());
            bytes.chunks(1 + bytes.len() % 1000).try_for_each(|piece| inflater.push(piece))?;
            inflater.finish().map(|(inflated, _charge)| inflated.len())
        });
        let outcome = match inflated {
            Ok(length) => {
                assert!(length <= LIMIT);
                format!("{length} bytes")
            }
            Err(error) => refusal(&error),
        };
        assert_eq!(metrics.body_bytes.get(), 0, "all is given back");
        Verdict { outcome, cost, bytes: 3 * LIMIT + 128 * 1024, allocations: 2000 }
    });
}
