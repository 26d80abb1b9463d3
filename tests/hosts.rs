//! Contracts of platforms, by the exchanges that their documentation shows; their own clients are in `tests/clients`. And what a
//! request may say in its query or body, and is told where it asks for what is not there.

use std::io::Read as _;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use nfold::metrics::{Outcome, Protocol};
use nfold::server::{Hosts, Options, VertexRoutes};
use serde_json::{Value, json};

use crate::fakes::{eventually, options};
use crate::serve::{Answer, TestServer, ask, local, png, send, start, start_with};

const JSON: (&str, &str) = ("content-type", "application/json");
const FORM: (&str, &str) = ("content-type", "multipart/form-data; boundary=X");

fn all() -> Hosts {
    let vertex = VertexRoutes { health: "/v1/endpoints/7".into(), predict: "/v1/endpoints/7:predict".into() };
    Hosts { sagemaker: true, vertex: Some(vertex), huggingface: true, kserve_v1: true, torchserve: true }
}

fn hosted() -> TestServer {
    start(Options { hosts: all(), ..local() }, options(1, 4, 16))
}

fn b64(bytes: &[u8]) -> String {
    BASE64_STANDARD.encode(bytes)
}

fn post(server: &TestServer, target: &str, headers: &[(&str, &str)], body: &[u8]) -> Answer {
    ask(server.http, &format!("POST {target}"), headers, body)
}

fn json_to(server: &TestServer, target: &str, body: Value) -> Answer {
    post(server, target, &[JSON], body.to_string().as_bytes())
}

fn ok(answer: Answer) -> Value {
    assert_eq!(answer.status, 200, "{answer:?}");
    assert!(answer.headers.contains_key("server-timing") && answer.headers.contains_key("x-request-id"), "{answer:?}");
    answer.json()
}

fn part(head: &str, body: &[u8]) -> Vec<u8> {
    [b"--X\r\ncontent-disposition: form-data; ", head.as_bytes(), b"\r\n\r\n", body, b"\r\n"].concat()
}

fn form(parts: &[Vec<u8>]) -> Vec<u8> {
    [parts.concat(), b"--X--\r\n".to_vec()].concat()
}

#[test]
fn sagemaker() {
    let server = hosted();
    let ping = ask(server.http, "GET /ping", &[], b"");
    assert_eq!((ping.status, ping.json()), (200, json!({ "status": "Healthy" })));
    for kind in ["application/x-image", "image/png", "application/octet-stream", "binary/octet-stream"] {
        let attributes = ("x-amzn-sagemaker-custom-attributes", "trace=7, top_k=2; model=m");
        let answer = ok(post(&server, "/invocations", &[("content-type", kind), attributes], &png(255)));
        assert_eq!(answer["results"][0]["predictions"].as_array().unwrap().len(), 2, "{answer}");
        assert_eq!(
            (&answer["model"], &answer["results"][0]["predictions"][0]["label"]),
            (&json!("m"), &json!("first"))
        );
    }
    let answer = ok(json_to(&server, "/invocations", json!({ "images": [{ "b64": b64(&png(255)) }], "top_k": 1 })));
    assert_eq!(answer["results"][0]["predictions"].as_array().unwrap().len(), 1);
    let bad = ("x-amzn-sagemaker-custom-attributes", "top_k=many");
    assert_eq!(post(&server, "/invocations", &[bad], &png(255)).error(), (400, "invalid_request".into()));
    assert_eq!(post(&server, "/invocations", &[("content-type", "text/csv")], b"1,2").error().0, 415);
    assert_eq!(ask(server.http, "GET /invocations", &[], b"").error(), (405, "method_not_allowed".into()));
    server.end().unwrap();
}

#[test]
fn vertex() {
    let server = hosted();
    assert_eq!(ask(server.http, "GET /v1/endpoints/7", &[], b"").json()["ready"], true);
    let predict = "/v1/endpoints/7:predict";
    let instance = json!({ "b64": b64(&png(255)) });
    let body = json!({ "instances": [instance, { "b64": b64(b"no image") }, instance], "parameters": { "top_k": 1 } });
    let answer = ok(json_to(&server, predict, body));
    let predictions = answer["predictions"].as_array().unwrap();
    assert_eq!((predictions.len(), predictions[0].as_array().unwrap().len()), (3, 1), "{answer}");
    assert_eq!((&predictions[0], predictions[0][0]["label"].as_str()), (&predictions[2], Some("first")));
    assert_eq!(predictions[1]["code"], "unsupported_media_type", "{answer}");
    // rawPredict hands the body on as it is
    let raw = ok(post(&server, predict, &[("content-type", "image/png")], &png(255)));
    assert_eq!(raw["predictions"][0].as_array().unwrap().len(), 3, "{raw}");
    assert_eq!(json_to(&server, predict, json!({ "instances": [{}] })).error(), (400, "invalid_request".into()));
    for (method, path, allow) in [("GET", predict, "POST"), ("POST", "/v1/endpoints/7", "GET,HEAD")] {
        let answer = ask(server.http, &format!("{method} {path}"), &[], b"");
        assert_eq!((answer.error().0, answer.headers["allow"].as_str()), (405, allow));
    }
    assert_eq!(server.requests(Protocol::Rest, Outcome::Ok), 2);
    server.end().unwrap();
    // one address for both, which is the page's, too
    let both = VertexRoutes { health: "/".into(), predict: "/".into() };
    let hosts = Hosts { vertex: Some(both), ..Hosts::default() };
    let server = start(Options { hosts, ..local() }, options(1, 4, 16));
    assert_eq!(ask(server.http, "GET /", &[], b"").json()["ready"], true);
    assert_eq!(ok(post(&server, "/", &[], &png(255)))["predictions"][0][0]["label"], "first");
    server.end().unwrap();
}

#[test]
fn hugging_face() {
    let server = hosted();
    assert_eq!(ask(server.http, "GET /health", &[], b"").status, 200);
    assert!(ask(server.http, "GET /", &[], b"").body.contains("<html"), "the page stays");
    let answer = ok(post(&server, "/", &[("content-type", "image/png")], &png(255)));
    let classes = answer.as_array().unwrap();
    assert_eq!((classes.len(), &classes[0]["label"]), (3, &json!("first")));
    assert!(classes[0].as_object().unwrap().keys().eq(["label", "score"]), "{answer}");
    let image = b64(&png(255));
    let asked = |parameters: Value| ok(json_to(&server, "/", json!({ "inputs": image, "parameters": parameters })));
    assert_eq!(asked(json!({ "top_k": 1 })), json!([classes[0]]));
    assert_eq!(asked(json!({ "function_to_apply": "softmax" })), answer);
    let logit = asked(json!({ "function_to_apply": "none" }))[0]["score"].as_f64().unwrap();
    assert_eq!(logit, 1.0, "the fake's first logit is the red over 255");
    let sigmoid = asked(json!({ "function_to_apply": "sigmoid" }))[0]["score"].as_f64().unwrap();
    assert!((sigmoid - 1.0 / (1.0 + (-1.0_f64).exp())).abs() < 1e-12, "{sigmoid}");
    let several =
        ok(json_to(&server, "/", json!({ "inputs": [image, b64(b"no image")], "parameters": { "top_k": 1 } })));
    assert_eq!((&several[0], several[1]["code"].as_str()), (&json!([classes[0]]), Some("unsupported_media_type")));
    assert_eq!(ok(json_to(&server, "/", json!({ "inputs": [image] }))), json!([answer]));
    for bad in [json!({ "inputs": "https://a.test/cat.jpg" }), json!({ "inputs": image, "parameters": { "topk": 1 } })]
    {
        assert_eq!(json_to(&server, "/", bad).error(), (400, "invalid_request".into()));
    }
    server.end().unwrap();
}

#[test]
fn kserve_v1() {
    let server = hosted();
    assert_eq!(ask(server.http, "GET /v1/models", &[], b"").json(), json!({ "models": ["m"] }));
    assert_eq!(ask(server.http, "GET /v1/models/m", &[], b"").json(), json!({ "name": "m", "ready": true }));
    assert_eq!(ask(server.http, "GET /v1/models/other", &[], b"").error(), (404, "model_not_found".into()));
    let body = json!({ "instances": [{ "image": { "b64": b64(&png(255)) } }] });
    let answer = ok(json_to(&server, "/v1/models/m:predict", body.clone()));
    assert_eq!(answer["predictions"][0][0]["label"], "first", "{answer}");
    assert_eq!(json_to(&server, "/v1/models/other:predict", body.clone()).error(), (404, "model_not_found".into()));
    let two = json_to(&server, "/v1/models/m:predict?model=n", body.clone());
    assert!(two.error().0 == 400 && two.body.contains("names two models, `m` and, in its query, `n`"), "{two:?}");
    assert_eq!(json_to(&server, "/v1/models/m:explain", body.clone()).error(), (404, "not_found".into()));
    assert_eq!(json_to(&server, "/v1/models/m", body.clone()).error(), (404, "not_found".into()));
    // the fixed routes keep their meaning beside these
    assert_eq!(ok(post(&server, "/v1/classify", &[], &png(255)))["results"][0]["predictions"][0]["label"], "first");
    server.end().unwrap();
}

#[test]
fn torchserve() {
    let server = hosted();
    let image = png(255);
    for answer in [
        post(&server, "/predictions/m", &[("content-type", "image/png")], &image),
        ask(server.http, "PUT /predictions/m/1", &[], &image),
        post(&server, "/predictions/m/1.0", &[FORM], &form(&[part("name=\"data\"; filename=\"a.png\"", &image)])),
    ] {
        let classes = ok(answer);
        assert!(classes["first"].as_f64().unwrap() > 0.4 && classes.as_object().unwrap().len() == 3, "{classes}");
    }
    let files = [image.clone(), b"no image".to_vec()].map(|f| part("name=\"data\"; filename=\"a\"", &f));
    let several = ok(post(&server, "/predictions/m?top_k=1", &[FORM], &form(&files)));
    assert!(several[0]["first"].is_number() && several[1]["code"] == "unsupported_media_type", "{several}");
    // its own form of errors, whichever layer refuses
    for (target, headers, status, name) in [
        ("/predictions/other", &[][..], 404, "model_not_found"),
        ("/predictions/m/2", &[], 404, "model_not_found"),
        ("/predictions/m/x", &[], 400, "invalid_request"),
        ("/predictions/m", &[("content-type", "text/css")], 415, "unsupported_media_type"),
        ("/predictions/m", &[("content-encoding", "br")], 415, "unsupported_media_type"),
        ("/predictions/m?topk=1", &[], 400, "invalid_request"),
        ("/predictions/m?model=other", &[], 400, "invalid_request"),
        ("/predictions/m/1?version=2", &[], 400, "invalid_request"),
        ("/predictions/m/1/2", &[], 404, "not_found"),
    ] {
        let answer = post(&server, target, headers, &image);
        let said = answer.json();
        assert_eq!((answer.status, &said["code"], &said["type"]), (status, &json!(status), &json!(name)), "{answer:?}");
        assert!(said["message"].as_str().is_some_and(|text| said["error"] == text), "{said}");
    }
    // what is said twice and alike is no contradiction
    ok(post(&server, "/predictions/m/1?model=m&version=1&top_k=1", &[], &image));
    let other = ask(server.http, "GET /predictions/m", &[], b"");
    assert_eq!((other.status, other.json()["type"].as_str().unwrap()), (405, "method_not_allowed"));
    server.end().unwrap();
}

#[test]
fn what_is_switched_off_is_not_there() {
    let server = start(local(), options(1, 4, 16));
    for target in ["/ping", "/health", "/v1/models"] {
        assert_eq!(ask(server.http, &format!("GET {target}"), &[], b"").error(), (404, "not_found".into()));
    }
    for target in ["/invocations", "/predictions/m", "/v1/models/m:predict"] {
        assert_eq!(post(&server, target, &[], &png(1)).error(), (404, "not_found".into()));
    }
    assert_eq!(post(&server, "/", &[], &png(1)).error(), (405, "method_not_allowed".into()));
    server.end().unwrap();
}

/// The door of a platform is the server's own: keys, limits and overload are the same, health needs no key.
#[test]
fn keys_limits_and_overload_are_those_of_every_route() {
    let folder = tempfile::tempdir().unwrap();
    let keys = folder.path().join("keys");
    std::fs::write(&keys, "a-key-that-is-long-enough").unwrap();
    let locked = Options { hosts: all(), api_key_file: Some(keys), body_limit: 2000, ..local() };
    let server = start(locked, options(1, 1, 1));
    let key = ("authorization", "Bearer a-key-that-is-long-enough");
    for health in ["/ping", "/health", "/v1/endpoints/7"] {
        assert_eq!(ask(server.http, &format!("GET {health}"), &[], b"").status, 200, "{health}");
    }
    let doors = ["/invocations", "/v1/endpoints/7:predict", "/", "/v1/models/m:predict", "/predictions/m"];
    let refused = |door: &str, headers: &[(&str, &str)], body: &[u8]| {
        let answer = post(&server, door, headers, body);
        let said = answer.json();
        (answer.status, said["type"].as_str().or(said["code"].as_str()).unwrap().to_string())
    };
    for door in doors {
        assert_eq!(refused(door, &[], &png(1)), (401, "unauthenticated".into()), "{door}");
        assert_eq!(refused(door, &[key], &[0; 3000]), (413, "body_too_large".into()), "{door}");
        assert_eq!(refused(door, &[key], b"no image"), (415, "unsupported_media_type".into()), "{door}");
        assert_eq!(refused(door, &[key, ("x-request-timeout-ms", "x")], b"a").0, 400, "{door}");
        assert_eq!(post(&server, door, &[key], &png(255)).status, 200, "{door}");
    }
    assert_eq!(ask(server.http, "GET /v1/models", &[], b"").error().0, 401);
    server.strings.hold();
    let busy = send(server.http, "POST /v1/classify", &[key], &png(0));
    eventually("the engine is busy", || server.depth() > 0);
    for door in doors {
        assert_eq!(refused(door, &[key], &png(1)), (429, "overloaded".into()), "{door}");
    }
    server.strings.release();
    let mut rest = Vec::new();
    { busy }.read_to_end(&mut rest).unwrap();
    server.end().unwrap();
}

#[test]
fn a_form_and_json_may_name_the_model() {
    let server = start_with(local(), &["a", "b"]);
    let image = part("name=\"f\"; filename=\"f\"", &png(255));
    let field = |name: &str, value: &str| part(&format!("name=\"{name}\""), value.as_bytes());
    let asked = |query: &str, fields: &[Vec<u8>]| {
        server.classify(query, &[FORM], &form(&[fields, std::slice::from_ref(&image)].concat()))
    };
    for (query, fields, model) in [
        ("", vec![field("model", "b"), field("top_k", "1")], "b"),
        ("?model=b", vec![], "b"),
        ("?model=a", vec![field("model", ""), field("version", " 1 ")], "a"),
        ("?model=a", vec![field("model", "a")], "a"),
    ] {
        let answer = asked(query, &fields);
        assert_eq!(answer.json()["model"], model, "{answer:?}");
    }
    for (query, fields, status, due) in [
        ("", vec![], 400, "several models are served, name one of: a, b"),
        ("?model=a", vec![field("model", "b")], 400, "names two models, `a` and, in its body, `b`"),
        ("?model=a&version=1", vec![field("version", "2")], 400, "names two versions, `1` and, in its body, `2`"),
        ("", vec![field("model", "c")], 404, "`c` is not served"),
        ("", vec![field("model", "a"), field("version", "2")], 404, "a version 2"),
        ("", vec![field("model", "a"), field("version", "x")], 400, "`version` is `x`, which is no whole number"),
        ("", vec![field("modell", "a")], 400, "there is no form field without a file `modell`; `model` is meant?"),
        (
            "",
            vec![field("top_k", "many")],
            400,
            "`top_k` is `many`, which is no whole number; send one such as top_k=5",
        ),
    ] {
        let answer = asked(query, &fields);
        assert_eq!(answer.error().0, status, "{answer:?}");
        assert!(answer.body.contains(due), "{due}: {answer:?}");
    }
    let body = |more: Value| {
        let mut body = json!({ "images": [{ "b64": b64(&png(255)) }] });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        server.classify("", &[JSON], body.to_string().as_bytes())
    };
    assert_eq!(body(json!({ "model": "b", "version": 1 })).json()["model"], "b");
    assert_eq!(body(json!({})).error().0, 400);
    let unknown = body(json!({ "topk": 1 }));
    assert!(unknown.error().0 == 400 && unknown.body.contains("there is no field `topk`; `top_k` is meant?"));
    server.end().unwrap();
}

#[test]
fn who_asks_wrongly_is_told_what_is_right() {
    let server = start(local(), options(1, 4, 16));
    let image = png(255);
    let admin = server.admin.port().to_string();
    let answers = [
        (server.classify("?topk=3", &[], &image), 400, "there is no query parameter `topk`; `top_k` is meant?"),
        (
            server.classify("?top_k=x", &[], &image),
            400,
            "`top_k` is `x`, which is no whole number; send one such as top_k=5",
        ),
        (server.classify("?top_k=-1", &[], &image), 400, "`top_k` is `-1`"),
        (server.classify("?top_k=", &[], &image), 400, "`top_k` is ``"),
        (post(&server, "/v2/models/m/infer?top_k=1", &[], b"{}"), 400, "there is no query parameter `top_k`"),
        (ask(server.http, "GET /v1/classify", &[], b""), 405, "this path is asked with POST, not with GET"),
        (post(&server, "/v2/health/live", &[], b""), 405, "this path is asked with GET or HEAD, not with POST"),
        (ask(server.http, "GET /metrics", &[], b""), 404, &format!("/metrics is on the admin port, {admin}")),
        (ask(server.http, "GET /readyz", &[], b""), 404, &format!("/readyz is on the admin port, {admin}")),
        (ask(server.http, "GET /nothing", &[], b""), 404, "there is no path `/nothing` here"),
    ];
    for (answer, status, due) in answers {
        assert_eq!(answer.error().0, status, "{answer:?}");
        assert!(answer.body.contains(due), "{due}: {answer:?}");
    }
    for (head, status) in [("GET /v1/classify", 404), ("POST /metrics", 405)] {
        let answer = ask(server.admin, head, &[], b"");
        assert_eq!((answer.status, answer.json()["error"].is_string()), (status, true), "{answer:?}");
    }
    let answer = ask(server.admin, "GET /v2/models", &[], b"");
    assert!(answer.body.contains(&format!("the HTTP port, {}", server.http.port())), "{answer:?}");
    server.end().unwrap();
}
