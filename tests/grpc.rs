//! The gRPC port, with tonic's client over real sockets. The same fake network as in `oip`.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use bytes::Bytes;
use nfold::metrics::{Outcome, Protocol};
use nfold::pb::open_inference as pb;
use nfold::pb::open_inference::grpc_inference_service_client::GrpcInferenceServiceClient;
use nfold::server::Options;
use pb::infer_parameter::ParameterChoice;
use pb::model_infer_request::{InferInputTensor, InferRequestedOutputTensor};
use tonic::transport::Channel;
use tonic::{Code, Request, Status};
use tonic_health::pb::health_client::HealthClient;
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus};

use crate::fakes::{CLASSES, SIDE, eventually, images, options};
use crate::serve::{TestServer, ask, local, png, receive, start};

const LEN: usize = 3 * SIDE * SIDE;

type Client = GrpcInferenceServiceClient<Channel>;

/// Runs `talk` against a server of its own.
fn with<F: Future<Output = ()>>(server: Options, scheduler: (usize, usize, usize), talk: impl FnOnce(OverGrpc) -> F) {
    let server = start(server, options(scheduler.0, scheduler.1, scheduler.2));
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let server = std::sync::Arc::new(server);
    runtime.block_on(async {
        let channel = Channel::from_shared(format!("http://{}", server.grpc)).unwrap().connect().await.unwrap();
        talk(OverGrpc { server: server.clone(), channel }).await;
    });
    drop(runtime);
    std::sync::Arc::into_inner(server).expect("the test has let go of it").end().unwrap();
}

struct OverGrpc {
    server: std::sync::Arc<TestServer>,
    channel: Channel,
}

impl OverGrpc {
    fn client(&self) -> Client {
        Client::new(self.channel.clone())
    }
}

fn tensor(seed: f32) -> Vec<f32> {
    (0..LEN).map(|i| seed + i as f32 * 0.37).collect()
}

fn le(values: &[f32]) -> Bytes {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

fn ask_for(datatype: &str, shape: &[usize]) -> pb::ModelInferRequest {
    pb::ModelInferRequest {
        model_name: "m".into(),
        id: "id-7".into(),
        inputs: vec![InferInputTensor {
            name: "input".into(),
            datatype: datatype.into(),
            shape: shape.iter().map(|&s| s as i64).collect(),
            ..Default::default()
        }],
        ..Default::default()
    }
}

fn raw(datatype: &str, shape: &[usize], bytes: Bytes) -> pb::ModelInferRequest {
    pb::ModelInferRequest { raw_input_contents: vec![bytes], ..ask_for(datatype, shape) }
}

fn fp32(values: &[f32]) -> pb::ModelInferRequest {
    raw("FP32", &[values.len() / LEN, 3, SIDE, SIDE], le(values))
}

fn parameter(choice: ParameterChoice) -> pb::InferParameter {
    pb::InferParameter { parameter_choice: Some(choice) }
}

/// An error's code, which is finer than its status number.
fn code(status: &Status) -> &str {
    status.metadata().get("x-error-code").and_then(|c| c.to_str().ok()).unwrap_or_default()
}

#[test]
fn raw_in_raw_out_typed_in_typed_out() {
    with(local(), (2, 4, 16), async |h| {
        let (a, b) = (tensor(0.5), tensor(-2.25));
        let reply = h.client().model_infer(fp32(&[a.clone(), b.clone()].concat())).await.unwrap();
        assert!(reply.metadata().get("x-request-id").is_some() && reply.metadata().get("server-timing").is_some());
        let reply = reply.into_inner();
        assert_eq!((reply.id.as_str(), reply.model_name.as_str(), reply.model_version.as_str()), ("id-7", "m", "1"));
        assert_eq!((reply.outputs[0].name.as_str(), &reply.outputs[0].shape), ("logits", &vec![2, CLASSES as i64]));
        assert_eq!(reply.raw_output_contents, [le(&[a[0], a[1], 0.0, b[0], b[1], 0.0])]);
        assert!(reply.outputs[0].contents.is_none());

        let mut typed = ask_for("FP32", &[1, 3, SIDE, SIDE]);
        typed.inputs[0].contents = Some(pb::InferTensorContents { fp32_contents: a.clone(), ..Default::default() });
        let reply = h.client().model_infer(typed.clone()).await.unwrap().into_inner();
        assert_eq!(reply.outputs[0].contents.as_ref().unwrap().fp32_contents, [a[0], a[1], 0.0]);
        assert!(reply.raw_output_contents.is_empty());

        let two = HashMap::from([("classification".into(), parameter(ParameterChoice::Int64Param(2)))]);
        typed.outputs = vec![InferRequestedOutputTensor { name: "logits".into(), parameters: two }];
        let reply = h.client().model_infer(typed).await.unwrap().into_inner();
        let classes = &reply.outputs[0].contents.as_ref().unwrap().bytes_contents;
        assert_eq!((classes.len(), &classes[0][..]), (2, &b"0.870000:1:second"[..]));
    });
}

/// REST, the Open Inference Protocol and gRPC give the same bits for the same image.
#[test]
fn three_doors_one_path() {
    with(local(), (2, 4, 16), async |h| {
        let picture = png(77);
        let mut bytes = (picture.len() as u32).to_le_bytes().to_vec();
        bytes.extend(&picture);
        let by_grpc = h.client().model_infer(raw("BYTES", &[1], bytes.into())).await.unwrap().into_inner();
        let bare = [("inference-header-content-length", "0")];
        let by_http = ask(h.server.http, "POST /v2/models/m/infer", &bare, &picture);
        let length: usize = by_http.headers["inference-header-content-length"].parse().unwrap();
        assert_eq!(by_grpc.raw_output_contents[0], by_http.bytes[length..]);
        let logits: Vec<f32> =
            by_grpc.raw_output_contents[0].chunks(4).map(|c| f32::from_le_bytes(c.try_into().unwrap())).collect();
        let top = nfold::infer::top_k::top_k(&logits, 3, &["first", "second", "third"].map(String::from)).unwrap();
        let classified = h.server.classify("?top_k=3", &[], &picture).json();
        assert_eq!(classified["results"][0]["predictions"], serde_json::to_value(top).unwrap());
        let mut typed = ask_for("BYTES", &[1, 1]);
        let bytes_contents = vec![picture.into()];
        typed.inputs[0].contents = Some(pb::InferTensorContents { bytes_contents, ..Default::default() });
        let typed = h.client().model_infer(typed).await.unwrap().into_inner();
        assert_eq!(typed.outputs[0].contents.as_ref().unwrap().fp32_contents, logits);
    });
}

#[test]
fn what_is_told_is_what_http_tells() {
    with(local(), (2, 4, 16), async |h| {
        let mut client = h.client();
        assert!(client.server_live(pb::ServerLiveRequest {}).await.unwrap().into_inner().live);
        assert!(client.server_ready(pb::ServerReadyRequest {}).await.unwrap().into_inner().ready);
        let (name, version) = (String::from("m"), String::from("1"));
        let ready = pb::ModelReadyRequest { name: name.clone(), version: String::new() };
        assert!(client.model_ready(ready).await.unwrap().into_inner().ready);
        client.model_infer(fp32(&tensor(0.0))).await.unwrap();
        let http = |path: &str| ask(h.server.http, &format!("GET {path}"), &[], b"").json();
        let server = client.server_metadata(pb::ServerMetadataRequest {}).await.unwrap().into_inner();
        assert_eq!(serde_json::to_value(server).unwrap(), http("/v2"));
        let metadata = pb::ModelMetadataRequest { name: name.clone(), version: version.clone() };
        let metadata = client.model_metadata(metadata).await.unwrap().into_inner();
        assert_eq!(serde_json::to_value(metadata).unwrap(), http("/v2/models/m"));
        let config = pb::ModelConfigRequest { name: name.clone(), version: version.clone() };
        let config = client.model_config(config).await.unwrap().into_inner();
        assert_eq!(serde_json::to_value(config.config).unwrap(), http("/v2/models/m/config"));
        for name in ["", "m"] {
            let statistics = pb::ModelStatisticsRequest { name: name.into(), version: String::new() };
            let statistics = client.model_statistics(statistics).await.unwrap().into_inner();
            assert_eq!(statistics.model_stats[0].inference_count, 1);
            assert_eq!(serde_json::to_value(statistics).unwrap(), http("/v2/models/stats"));
        }
        let index = client.repository_index(pb::RepositoryIndexRequest::default()).await.unwrap().into_inner();
        assert_eq!((index.models[0].name.as_str(), index.models[0].state.as_str()), ("m", "READY"));
    });
}

#[test]
fn errors_have_the_status_of_the_one_table() {
    with(Options { body_limit: 4000, ..local() }, (1, 4, 4), async |h| {
        let mut client = h.client();
        let values = tensor(0.0);
        let mut unknown = fp32(&values);
        unknown.model_name = "x".into();
        let mut both = fp32(&values);
        both.inputs[0].contents = Some(pb::InferTensorContents { fp32_contents: values.clone(), ..Default::default() });
        let mut uneven = fp32(&values);
        uneven.raw_input_contents.push(Bytes::new());
        let mut late = fp32(&values);
        late.parameters = HashMap::from([("timeout".into(), parameter(ParameterChoice::StringParam("x".into())))]);
        let cases = [
            (unknown, Code::NotFound, "model_not_found"),
            (both, Code::InvalidArgument, "invalid_request"),
            (uneven, Code::InvalidArgument, "invalid_request"),
            (late, Code::InvalidArgument, "invalid_request"),
            (ask_for("FP32", &[1, 3, SIDE, SIDE]), Code::InvalidArgument, "invalid_request"),
            (raw("FP32", &[1, 3, SIDE, SIDE], Bytes::from_static(b"abc")), Code::InvalidArgument, "invalid_request"),
            (raw("INT64", &[1], Bytes::new()), Code::InvalidArgument, "invalid_request"),
            (raw("BYTES", &[1], Bytes::from_static(b"\x03\0\0\0abc")), Code::InvalidArgument, "unsupported_media_type"),
            (raw("BYTES", &[1], Bytes::from_static(b"\xff\xff\xff\xffabc")), Code::InvalidArgument, "invalid_request"),
            (fp32(&[0.0; 5 * LEN]), Code::InvalidArgument, "invalid_request"),
        ];
        for (request, status, name) in cases {
            let shown = format!("{request:?}");
            let error = client.model_infer(request).await.unwrap_err();
            assert_eq!((error.code(), code(&error)), (status, name), "{shown}: {error:?}");
        }
        let error = client.model_infer(fp32(&vec![0.0; 100 * LEN])).await.unwrap_err();
        assert_eq!(error.code(), Code::OutOfRange, "a message above the limit: {error:?}");
        let load = pb::RepositoryModelLoadRequest { model_name: "m".into(), ..Default::default() };
        assert_eq!(client.repository_model_load(load).await.unwrap_err().code(), Code::InvalidArgument);
        let requests = |o| h.server.requests(Protocol::Grpc, o);
        assert_eq!((requests(Outcome::ModelNotFound), requests(Outcome::BodyTooLarge)), (1, 1));
        assert_eq!((requests(Outcome::UnsupportedMediaType), requests(Outcome::Internal)), (1, 0));
    });
}

#[test]
fn a_load_that_would_make_another_model_is_refused() {
    with(Options { model_control: true, ..local() }, (1, 1, 4), async |h| {
        let mut client = h.client();
        for name in ["config", "file:1/model.onnx", "anything"] {
            let parameters = HashMap::from([(name.into(), pb::ModelRepositoryParameter::default())]);
            let load = pb::RepositoryModelLoadRequest { model_name: "m".into(), parameters, ..Default::default() };
            let error = client.repository_model_load(load).await.unwrap_err();
            assert_eq!(error.code(), Code::InvalidArgument);
            assert!(error.message().contains(&format!("parameter `{name}` is not taken")), "{error:?}");
        }
        let parameters = HashMap::from([("unload_dependents".into(), pb::ModelRepositoryParameter::default())]);
        let unload = pb::RepositoryModelUnloadRequest { model_name: "m".into(), parameters, ..Default::default() };
        client.repository_model_unload(unload).await.unwrap();
    });
}

#[test]
fn metadata_beyond_all_proportion_is_refused() {
    with(local(), (1, 1, 2), async |h| {
        let long = |bytes| {
            let mut request = Request::new(fp32(&tensor(0.0)));
            request.metadata_mut().insert("x-long", "x".repeat(bytes).parse().unwrap());
            request
        };
        let refused = h.client().model_infer(long(100_000)).await.unwrap_err();
        assert_eq!((refused.code(), code(&refused)), (Code::InvalidArgument, "head_too_large"));
        h.client().model_infer(long(1000)).await.unwrap();
    });
}

#[test]
fn overload_deadline_and_a_client_that_goes_away() {
    with(local(), (1, 1, 2), async |h| {
        let busy = h.server.occupy();
        let mut request = Request::new(fp32(&tensor(0.0)));
        request.set_timeout(Duration::from_millis(60));
        let started = Instant::now();
        let late = h.client().model_infer(request).await.unwrap_err();
        assert!(matches!(late.code(), Code::DeadlineExceeded | Code::Cancelled), "{late:?}");
        assert!(started.elapsed() < Duration::from_secs(2));
        assert_eq!(h.server.strings.runs(), 1);
        // which of the two it was depends on whose clock was first: the server's, or the client's that hung up
        let [cancelled, expired] = [Outcome::Cancelled, Outcome::DeadlineExceeded];
        let ended = |outcome| h.server.requests(Protocol::Grpc, outcome);
        eventually("the first is counted", || ended(cancelled) + ended(expired) == 1);

        let mut client = h.client();
        let gone = tokio::spawn(async move { client.model_infer(fp32(&tensor(0.0))).await });
        eventually("it is here", || h.server.metrics.inflight_requests.get() == 2);
        // the expired image of the first made room for it
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert_eq!(h.server.depth(), 2);
        let full = h.client().model_infer(fp32(&tensor(0.0))).await.unwrap_err();
        assert_eq!((full.code(), code(&full)), (Code::ResourceExhausted, "overloaded"));
        assert!(full.metadata().get("retry-after").is_some());
        let before = (ended(cancelled), images(&h.server.metrics, "m", cancelled));
        gone.abort();
        eventually("it is counted", || ended(cancelled) == before.0 + 1);
        h.server.strings.release();
        assert_eq!(receive(busy).status, 200);
        eventually("its image too", || images(&h.server.metrics, "m", cancelled) == before.1 + 1);
        assert_eq!(h.server.strings.runs(), 1, "nothing was computed for those who left");
    });
}

#[test]
fn a_stream_answers_in_order_and_ends_with_the_server() {
    with(local(), (2, 4, 16), async |h| {
        let (sender, requests) = tokio::sync::mpsc::channel(8);
        let stream = tokio_stream::wrappers::ReceiverStream::new(requests);
        let mut answers = h.client().model_stream_infer(stream).await.unwrap().into_inner();
        for i in 0..4 {
            sender.send(fp32(&tensor(i as f32))).await.unwrap();
        }
        sender.send(raw("INT8", &[1], Bytes::new())).await.unwrap();
        for i in 0..4 {
            let answer = answers.message().await.unwrap().unwrap();
            let values = answer.infer_response.unwrap().raw_output_contents[0].clone();
            assert_eq!(values[..4], (i as f32).to_le_bytes(), "{i}");
        }
        assert!(answers.message().await.unwrap().unwrap().error_message.contains("INT8"));
        h.server.control.send(nfold::server::Control::Stop).await.unwrap();
        let end = tokio::time::timeout(Duration::from_secs(5), answers.message()).await.unwrap().unwrap_err();
        assert_eq!((end.code(), code(&end)), (Code::Unavailable, "shutting_down"));
    });
}

#[test]
fn health_is_readiness_and_watchers_hear_of_the_drain() {
    with(Options { drain_hold: Duration::from_millis(500), ..local() }, (1, 1, 8), async |h| {
        let mut health = HealthClient::new(h.channel.clone());
        let named = |service: &str| HealthCheckRequest { service: service.into() };
        for service in ["", "inference.GRPCInferenceService", "m"] {
            let status = health.check(named(service)).await.unwrap().into_inner().status;
            assert_eq!(status, i32::from(ServingStatus::Serving), "{service}");
        }
        assert_eq!(health.check(named("x")).await.unwrap_err().code(), Code::NotFound);
        let mut watch = health.watch(named("")).await.unwrap().into_inner();
        assert_eq!(watch.message().await.unwrap().unwrap().status, i32::from(ServingStatus::Serving));
        h.server.control.send(nfold::server::Control::Stop).await.unwrap();
        assert_eq!(watch.message().await.unwrap().unwrap().status, i32::from(ServingStatus::NotServing));
        assert!(!h.client().server_ready(pb::ServerReadyRequest {}).await.unwrap().into_inner().ready);
        assert_eq!(watch.message().await.ok().flatten(), None, "and the stream does not hold up the end");
    });
}

#[test]
fn reflection_in_both_versions() {
    use tonic_reflection::pb::{v1, v1alpha};
    with(local(), (1, 1, 8), async |h| {
        let mut client = v1::server_reflection_client::ServerReflectionClient::new(h.channel.clone());
        let request = v1::ServerReflectionRequest {
            host: String::new(),
            message_request: Some(v1::server_reflection_request::MessageRequest::ListServices(String::new())),
        };
        let mut stream = client.server_reflection_info(tokio_stream::once(request)).await.unwrap().into_inner();
        let services = format!("{:?}", stream.message().await.unwrap().unwrap());
        assert!(services.contains("inference.GRPCInferenceService"), "{services}");
        assert!(services.contains("grpc.health.v1.Health"), "{services}");
        let mut client = v1alpha::server_reflection_client::ServerReflectionClient::new(h.channel.clone());
        let symbol = String::from("inference.ModelInferRequest");
        let request = v1alpha::ServerReflectionRequest {
            host: String::new(),
            message_request: Some(v1alpha::server_reflection_request::MessageRequest::FileContainingSymbol(symbol)),
        };
        let mut stream = client.server_reflection_info(tokio_stream::once(request)).await.unwrap().into_inner();
        let file = format!("{:?}", stream.message().await.unwrap().unwrap());
        assert!(file.contains("FileDescriptorResponse"), "{file}");
    });
}
