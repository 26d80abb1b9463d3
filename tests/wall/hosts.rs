//! The doors of platforms: the bombs that `/v1` and `/v2` are held to, at each of them. Every door refuses in its own form, costs
//! little, and never fails by itself (no 5xx).

use std::io::{Read as _, Write as _};
use std::time::Duration;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;

use super::calls::gzip;
use super::{Cost, MIB, alone, under_attack};
use crate::bombs::{Bomb, bombs};
use crate::process::{Server, ask, connect};

/// Beside the body limit, which is 64 MiB.
const ROOM: u64 = 64_000_000;
const HEALTH: Duration = Duration::from_millis(100);
const JSON: (&str, &str) = ("content-type", "application/json");
const GZIP: (&str, &str) = ("content-encoding", "gzip");
const FORM: (&str, &str) = ("content-type", "multipart/form-data; boundary=x");

/// Where each platform asks.
const DOORS: [&str; 5] =
    ["/invocations", "/predict", "/", "/v1/models/nf_regnet_cifar10:predict", "/predictions/nf_regnet_cifar10"];
/// Those whose JSON is `{"instances": …}`; `{"inputs": …}` is the third's, `{"images": …}` the others'.
const INSTANCES: [&str; 2] = [DOORS[1], DOORS[3]];

fn hosted() -> Server {
    Server::start(&["--hosts", "sagemaker,vertex,huggingface,kserve-v1,torchserve"])
}

/// The code of an answer that must be a refusal in a door's own form.
fn refused(door: &str, what: &str, answer: &crate::process::Answer) -> String {
    assert!((400..500).contains(&answer.status), "{door} {what}: {}", answer.status);
    assert!(answer.body.len() < 4096, "{door} {what}: an answer of {} bytes", answer.body.len());
    let said = answer.json();
    assert!(said["error"].as_str().is_some_and(|text| !text.is_empty()), "{door} {what}: {said}");
    if door.starts_with("/predictions/") {
        assert!(said["code"] == answer.status && said["message"] == said["error"], "{door} {what}: {said}");
        said["type"].as_str().unwrap().into()
    } else {
        said["code"].as_str().unwrap().into()
    }
}

/// Sends a body to every door; the cost is that of all of them, one after the other.
fn attack(server: &Server, what: &str, headers: &[(&str, &str)], body: &dyn Fn(&str) -> Vec<u8>, due: &[&str]) {
    let _alone = alone();
    let bodies: Vec<_> = DOORS.iter().map(|door| (*door, body(door))).collect();
    let mut slowest = Vec::new();
    // a machine that others use can only make it slower, so the best of five counts
    for _ in 0..5 {
        let ((), cost) = under_attack(server, || {
            for (door, body) in &bodies {
                let answer = ask(server.http, "POST", door, headers, body).unwrap();
                let code = refused(door, what, &answer);
                assert!(due.contains(&code.as_str()), "{door} {what}: {code}");
            }
        });
        check(what, &cost, ROOM + 64 * MIB);
        slowest.push(cost.health);
        if cost.health < HEALTH {
            return;
        }
    }
    panic!("{what}: health took {slowest:?}");
}

fn check(what: &str, cost: &Cost, room: u64) {
    assert!(cost.growth < room, "{what}: {} MiB: {cost:?}", cost.growth / MIB);
    assert!(cost.failed == 0 && cost.took < Duration::from_secs(60), "{what}: {cost:?}");
}

/// `one` until it is some 60 MiB.
fn full(one: &str) -> String {
    one.repeat((60 << 20) / one.len())
}

/// JSON of a door with this for its list of images.
fn listed(door: &str, images: &str) -> String {
    match door {
        _ if INSTANCES.contains(&door) => format!("{{\"instances\":[{images}]}}"),
        "/" => format!("{{\"inputs\":[{images}]}}"),
        _ => format!("{{\"images\":[{images}]}}"),
    }
}

/// The same with one image of this base64.
fn one(door: &str, text: &str) -> String {
    match door {
        "/" => format!("{{\"inputs\":\"{text}\"}}"),
        _ => listed(door, &format!("{{\"b64\":\"{text}\"}}")),
    }
}

#[test]
fn bombs_of_json_at_every_door() {
    let server = hosted();
    let json = |what: &str, body: &dyn Fn(&str) -> String, due: &[&str]| {
        attack(&server, what, &[JSON, GZIP], &|door| gzip(body(door).as_bytes()), due);
    };
    let invalid = &["invalid_request"];
    let empty = full("{\"b64\":\"\"},");
    json("images by the million", &|door| listed(door, &format!("{empty}{{\"b64\":\"\"}}")), invalid);
    let texts = full("\"\",");
    json("texts by the million", &|door| listed(door, &format!("{texts}\"\"")), invalid);
    let open = full("[");
    json("lists in lists", &|door| listed(door, &open), invalid);
    let objects = full("{\"image\":");
    json("objects in objects", &|door| listed(door, &objects), invalid);
    let zeros = full("0,");
    json("numbers for images", &|door| listed(door, &format!("{zeros}0")), invalid);
    let parameters = format!("{{\"instances\":[],\"inputs\":\"\",\"parameters\":{{\"top_k\":[{zeros}0]}}}}");
    json("a parameter that is a list", &|_| parameters.clone(), invalid);
    let names: String = (0..4_000_000).map(|i| format!("\"{i:x}\":0,")).collect();
    json("parameters by the million", &|_| format!("{{\"parameters\":{{{names}\"z\":0}}}}"), invalid);
    json("members by the million", &|_| format!("{{{names}\"z\":0}}"), invalid);
    let name = full("\u{7f}");
    json("a name without an end", &|_| format!("{{\"{name}\":1}}"), invalid);
    json("a number without an end", &|_| format!("{{\"parameters\":{{\"top_k\":{}}}}}", full("9")), invalid);
    json("white space", &|_| format!("{{{}}}", full(" ")), invalid);
}

#[test]
fn bombs_of_base64_forms_and_compression_at_every_door() {
    let server = hosted();
    let no_image = &["image_too_large", "invalid_image", "unsupported_media_type"];
    let letters = full("A");
    attack(&server, "base64 without an end", &[JSON, GZIP], &|door| gzip(one(door, &letters).as_bytes()), no_image);
    let lines = "AAAAAAAA\\n".repeat(1_000_000);
    attack(&server, "base64 in lines", &[JSON, GZIP], &|door| gzip(one(door, &lines).as_bytes()), no_image);
    let zeros = gzip(&vec![0; 256 << 20]);
    attack(&server, "zeros in gzip", &[JSON, GZIP], &|_| zeros.clone(), &["body_too_large"]);
    attack(&server, "zeros in gzip for an image", &[GZIP], &|_| zeros.clone(), &["body_too_large"]);
    let files = "--x\r\nContent-Disposition: form-data; name=\"a\"; filename=\"a\"\r\n\r\n\r\n".repeat(900_000);
    let files = gzip(format!("{files}--x--\r\n").as_bytes());
    attack(&server, "a form of files", &[FORM, GZIP], &|_| files.clone(), &["invalid_request"]);
    let field = format!(
        "--x\r\nContent-Disposition: form-data; name=\"model\"\r\n\r\n{letters}\r\n--x\r\nContent-Disposition: form-data; name=\"a\"; filename=\"a\"\r\n\r\n\r\n--x--\r\n"
    );
    let field = gzip(field.as_bytes());
    attack(
        &server,
        "a model without an end",
        &[FORM, GZIP],
        &|_| field.clone(),
        &["model_not_found", "invalid_request"],
    );
    let chunks = format!("{}0\r\n\r\n", "1\r\nx\r\n".repeat(100_000));
    for door in DOORS {
        let mut stream = connect(server.http).unwrap();
        let head =
            format!("POST {door} HTTP/1.1\r\nhost: t\r\ntransfer-encoding: chunked\r\nconnection: close\r\n\r\n");
        stream.write_all(head.as_bytes()).unwrap();
        stream.write_all(chunks.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 415"), "{door}: {answer}");
    }
}

/// Small files of many pixels: those that the limits let in are answered, the others refused, in the memory for decoding.
#[test]
fn bombs_of_pixels_at_every_door() {
    let _alone = alone();
    let server = hosted();
    let cat = std::fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/cat.jpg")).unwrap();
    for door in DOORS {
        assert_eq!(ask(server.http, "POST", door, &[], &cat).unwrap().status, 200, "{door}");
    }
    let bombs = bombs(8000);
    let ((), cost) = under_attack(&server, || {
        for (i, Bomb { what, bytes, accepted }) in bombs.iter().enumerate() {
            let door = DOORS[i % DOORS.len()];
            let text = BASE64_STANDARD.encode(bytes);
            for (headers, body) in [(&[][..], bytes.clone()), (&[JSON], one(door, &text).into_bytes())] {
                let answer = ask(server.http, "POST", door, headers, &body).unwrap();
                if *accepted && answer.status == 200 {
                    continue;
                }
                let code = refused(door, what, &answer);
                let due: &[&str] = if *accepted { &["overloaded"] } else { &["image_too_large", "overloaded"] };
                assert!(due.contains(&code.as_str()), "{door} {what}: {code}");
            }
        }
    });
    check("pixels", &cost, (256 + 64) * MIB);
}

/// Refusals before the body, to clients that go on sending: read all the same.
#[test]
fn bodies_that_nobody_reads_at_every_door() {
    let server = hosted();
    let body = vec![b'x'; 10 << 20];
    for door in DOORS {
        let separator = if door.contains('?') { '&' } else { '?' };
        for (target, kind, due) in [
            (format!("{door}{separator}topk=1"), "image/png", "invalid_request"),
            (door.to_string(), "text/css", "unsupported_media_type"),
        ] {
            let answer = ask(server.http, "POST", &target, &[("content-type", kind)], &body).unwrap();
            assert_eq!(refused(door, "unread", &answer), due, "{target}");
        }
    }
}
