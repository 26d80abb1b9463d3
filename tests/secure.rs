//! Access control, and how much of the server a slow or silent client can use: keys, TLS, CORS, limits.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nfold::metrics::{Outcome, Protocol};
use nfold::pb::open_inference as pb;
use nfold::pb::open_inference::grpc_inference_service_client::GrpcInferenceServiceClient;
use nfold::server::{Control, Options, ServeError, Server, TlsOptions};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};
use tonic::Code;
use tonic::transport::Channel;

use crate::fakes::{eventually, options};
use crate::serve::{ask, local, png, receive, send, start};

const KEY: &str = "a-key-that-is-long-enough";

fn key_file(folder: &Path, keys: &str) -> PathBuf {
    let path = folder.join("keys");
    std::fs::write(&path, keys).unwrap();
    path
}

#[test]
fn without_a_key_only_health_and_pages_answer() {
    let folder = tempfile::tempdir().unwrap();
    let path = key_file(folder.path(), &format!("{KEY}\n"));
    let server = start(Options { api_key_file: Some(path.clone()), ..local() }, options(1, 4, 8));
    let bearer = format!("Bearer {KEY}");
    let with: &[(&str, &str)] = &[("authorization", &bearer)];
    for head in ["POST /v1/classify", "GET /v2", "GET /v2/models/m", "POST /v2/models/m/infer", "GET /nothing"] {
        let refused = ask(server.http, head, &[("authorization", "Bearer a-key-that-is-long-enougH")], b"");
        assert_eq!(refused.error(), (401, "unauthenticated".into()), "{head}");
        assert_eq!(refused.headers["www-authenticate"], "Bearer");
        assert_ne!(ask(server.http, head, with, b"").status, 401, "{head}");
    }
    assert_eq!(server.classify("", with, &png(3)).status, 200);
    for open in ["/v2/health/live", "/v2/health/ready", "/openapi.json", "/docs/", "/", "/page/page.js"] {
        assert_eq!(ask(server.http, &format!("GET {open}"), &[], b"").status, 200, "{open}");
    }
    assert_eq!(ask(server.admin, "GET /metrics", &[], b"").status, 200);
    let api = ask(server.http, "GET /openapi.json", &[], b"").json();
    assert_eq!(api["components"]["securitySchemes"]["api_key"]["scheme"], "bearer");

    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let (http, grpc) = (server.http, server.grpc);
    runtime.block_on(async {
        let channel = Channel::from_shared(format!("http://{grpc}")).unwrap().connect().await.unwrap();
        let mut client = GrpcInferenceServiceClient::new(channel.clone());
        assert!(client.server_live(pb::ServerLiveRequest {}).await.unwrap().into_inner().live);
        let refused = client.server_metadata(pb::ServerMetadataRequest {}).await.unwrap_err();
        assert_eq!(refused.code(), Code::Unauthenticated, "{refused:?}");
        let mut health = tonic_health::pb::health_client::HealthClient::new(channel);
        health.check(tonic_health::pb::HealthCheckRequest::default()).await.unwrap();
        let mut request = tonic::Request::new(pb::ServerMetadataRequest {});
        request.metadata_mut().insert("authorization", bearer.parse().unwrap());
        assert_eq!(client.server_metadata(request).await.unwrap().into_inner().name, "nfold");
    });
    // with its connection: the server waits for clients that don't close in order
    drop(runtime);
    eventually("counted", || server.requests(Protocol::Grpc, Outcome::Unauthenticated) == 1);

    // new keys are used from now on; a file without a valid key changes nothing
    let ask_with = |key: &str| ask(http, "GET /v2", &[("authorization", &format!("Bearer {key}"))], b"").status;
    std::fs::write(&path, "").unwrap();
    server.control.blocking_send(Control::Reload).unwrap();
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(ask_with(KEY), 200);
    std::fs::write(&path, "another-key-that-is-long-enough").unwrap();
    server.control.blocking_send(Control::Reload).unwrap();
    eventually("the new key is known", || ask_with("another-key-that-is-long-enough") == 200);
    assert_eq!(ask_with(KEY), 401);
    server.end().unwrap();
}

/// A certificate authority.
pub struct Authority {
    pub pem: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    pub fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let pem = params.self_signed(&key).unwrap().pem();
        Self { pem, issuer: Issuer::new(params, key) }
    }

    /// Issues a certificate and its key.
    fn issue(&self, name: &str) -> (rcgen::Certificate, KeyPair) {
        let key = KeyPair::generate().unwrap();
        (CertificateParams::new(vec![name.to_string()]).unwrap().signed_by(&key, &self.issuer).unwrap(), key)
    }

    pub fn write(&self, folder: &Path, name: &str) -> (PathBuf, PathBuf) {
        let (certificate, key) = self.issue(name);
        let (cert, private) = (folder.join("cert.pem"), folder.join("key.pem"));
        std::fs::write(&cert, certificate.pem()).unwrap();
        std::fs::write(&private, key.serialize_pem()).unwrap();
        (cert, private)
    }
}

pub fn client(authority: &str, identity: Option<(rcgen::Certificate, KeyPair)>, alpn: &[u8]) -> Arc<ClientConfig> {
    use rustls::pki_types::pem::PemObject as _;
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(authority.as_bytes()).unwrap()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let builder = builder.with_root_certificates(roots);
    let mut config = match identity {
        None => builder.with_no_client_auth(),
        Some((certificate, key)) => {
            let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
            builder.with_client_auth_cert(vec![certificate.der().clone()], key).unwrap()
        }
    };
    config.alpn_protocols = vec![alpn.to_vec()];
    Arc::new(config)
}

/// Sends a request over TLS; returns the first line of the response.
fn ask_tls(to: SocketAddr, config: Arc<ClientConfig>, name: &str) -> std::io::Result<String> {
    let connection = ClientConnection::new(config, ServerName::try_from(name.to_string()).unwrap()).unwrap();
    let mut stream = StreamOwned::new(connection, TcpStream::connect(to)?);
    stream.write_all(b"GET /v2/health/live HTTP/1.1\r\nhost: t\r\nconnection: close\r\n\r\n")?;
    let mut answer = Vec::new();
    match stream.read_to_end(&mut answer) {
        Err(e) if answer.is_empty() => Err(e),
        _ => Ok(String::from_utf8_lossy(&answer).lines().next().unwrap_or_default().into()),
    }
}

#[test]
fn a_real_handshake_on_both_ports_and_new_certificates_without_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let authority = Authority::new();
    let (cert, key) = authority.write(folder.path(), "first.test");
    let tls = TlsOptions { cert, key, client_ca: None };
    let server = start(Options { tls: Some(tls), ..local() }, options(1, 4, 8));
    let plain = client(&authority.pem, None, b"http/1.1");
    let ok = "HTTP/1.1 200 OK";
    assert_eq!(ask_tls(server.http, plain.clone(), "first.test").unwrap(), ok);
    assert!(ask_tls(server.http, plain.clone(), "second.test").is_err(), "another name");
    let stranger = client(&Authority::new().pem, None, b"http/1.1");
    assert!(ask_tls(server.http, stranger, "first.test").is_err(), "an unknown authority");
    let mut bare = Vec::new();
    let mut stream = TcpStream::connect(server.http).unwrap();
    stream.write_all(b"GET /v2/health/live HTTP/1.1\r\nhost: t\r\n\r\n").unwrap();
    let _ = stream.read_to_end(&mut bare);
    assert!(!String::from_utf8_lossy(&bare).contains("200 OK"), "no plain answer");

    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let grpc = server.grpc;
    let live = |config: Arc<ClientConfig>, name: &'static str| {
        runtime.block_on(async {
            let connector = tower::service_fn(move |_: axum::http::Uri| {
                let config = config.clone();
                async move {
                    let tcp = tokio::net::TcpStream::connect(grpc).await?;
                    let name = ServerName::try_from(name).unwrap();
                    let tls = tokio_rustls::TlsConnector::from(config).connect(name, tcp).await?;
                    Ok::<_, std::io::Error>(hyper_util::rt::TokioIo::new(tls))
                }
            });
            let channel = Channel::from_static("http://grpc.test").connect_with_connector(connector).await.ok()?;
            let answer = GrpcInferenceServiceClient::new(channel).server_live(pb::ServerLiveRequest {}).await.ok()?;
            Some(answer.into_inner().live)
        })
    };
    let over_h2 = client(&authority.pem, None, b"h2");
    assert_eq!(live(over_h2.clone(), "first.test"), Some(true));

    std::fs::write(folder.path().join("cert.pem"), "no certificate").unwrap();
    server.control.blocking_send(Control::Reload).unwrap();
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(ask_tls(server.http, plain.clone(), "first.test").unwrap(), ok, "the old one stays");
    authority.write(folder.path(), "second.test");
    server.control.blocking_send(Control::Reload).unwrap();
    eventually("the new certificate", || ask_tls(server.http, plain.clone(), "second.test").is_ok());
    assert_eq!(live(over_h2, "second.test"), Some(true));
    drop(runtime);
    server.end().unwrap();
}

#[test]
fn clients_without_a_certificate_are_refused_where_one_is_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    let authority = Authority::new();
    let (cert, key) = authority.write(folder.path(), "server.test");
    let ca = folder.path().join("ca.pem");
    std::fs::write(&ca, &authority.pem).unwrap();
    let tls = TlsOptions { cert, key, client_ca: Some(ca) };
    let server = start(Options { tls: Some(tls), ..local() }, options(1, 4, 8));
    let ask = |identity| ask_tls(server.http, client(&authority.pem, identity, b"http/1.1"), "server.test");
    assert!(ask(None).is_err());
    assert!(ask(Some(Authority::new().issue("stranger.test"))).is_err());
    assert_eq!(ask(Some(authority.issue("client.test"))).unwrap(), "HTTP/1.1 200 OK");
    server.end().unwrap();
}

#[test]
fn files_that_are_no_certificates_or_keys_are_told_before_anything_runs() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let _inside = runtime.enter();
    let folder = tempfile::tempdir().unwrap();
    let (cert, key) = Authority::new().write(folder.path(), "x.test");
    let missing = folder.path().join("missing.pem");
    for (cert, key, flag) in
        [(&missing, &key, "--tls-cert"), (&cert, &missing, "--tls-key"), (&key, &cert, "--tls-cert")]
    {
        let tls = TlsOptions { cert: cert.clone(), key: key.clone(), client_ca: None };
        let error = Server::bind(Options { tls: Some(tls), ..local() }).unwrap_err();
        assert!(matches!(error, ServeError::Tls(_)) && error.to_string().contains(flag), "{error}");
    }
    // encrypted keys are refused: nobody can type the password
    for encrypted in [
        "-----BEGIN ENCRYPTED PRIVATE KEY-----\nMIIBvTBXBgk=\n-----END ENCRYPTED PRIVATE KEY-----\n",
        "-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\nDEK-Info: AES-256-CBC,00\n\nAAAA\n-----END RSA PRIVATE KEY-----\n",
    ] {
        let key = folder.path().join("encrypted.pem");
        std::fs::write(&key, encrypted).unwrap();
        let tls = TlsOptions { cert: cert.clone(), key, client_ca: None };
        let error = Server::bind(Options { tls: Some(tls), ..local() }).unwrap_err().to_string();
        assert!(error.contains("is encrypted") && error.contains("openssl pkey"), "{error}");
    }
    let error = Server::bind(Options { api_key_file: Some(missing), ..local() }).unwrap_err();
    assert!(error.to_string().contains("--api-key-file"), "{error}");
}

#[test]
fn other_origins_only_where_allowed() {
    let origin = [("origin", "https://page.test")];
    let preflight = [
        ("origin", "https://page.test"),
        ("access-control-request-method", "POST"),
        ("access-control-request-headers", "authorization,content-type"),
    ];
    let closed = start(local(), options(1, 4, 8));
    let answer = ask(closed.http, "GET /v2", &origin, b"");
    assert!(answer.status == 200 && !answer.headers.contains_key("access-control-allow-origin"), "{answer:?}");
    closed.end().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let open = Options {
        cors_origins: vec!["https://page.test".into()],
        api_key_file: Some(key_file(folder.path(), KEY)),
        ..local()
    };
    let open = start(open, options(1, 4, 8));
    let asked = ask(open.http, "OPTIONS /v1/classify", &preflight, b"");
    assert_eq!((asked.status, asked.headers["access-control-allow-origin"].as_str()), (200, "https://page.test"));
    assert_eq!(asked.headers["access-control-allow-headers"], "authorization,content-type");
    let bearer = format!("Bearer {KEY}");
    let answer = ask(open.http, "GET /v2", &[origin[0], ("authorization", &bearer)], b"");
    assert_eq!((answer.status, answer.headers["access-control-allow-origin"].as_str()), (200, "https://page.test"));
    assert!(answer.headers["access-control-expose-headers"].contains("x-request-id"));
    let other = ask(open.http, "GET /v2", &[("origin", "https://other.test"), ("authorization", &bearer)], b"");
    assert!(!other.headers.contains_key("access-control-allow-origin"), "{other:?}");
    open.end().unwrap();
}

/// A client that sends its head byte by byte, or never, is evicted for one that sends a request.
#[test]
fn slow_clients_don_t_keep_others_out() {
    let limits = Options { connections: 2, head_timeout: Duration::from_millis(300), ..local() };
    let server = start(limits, options(1, 1, 8));
    let mut slow = TcpStream::connect(server.http).unwrap();
    let _silent = TcpStream::connect(server.http).unwrap();
    slow.write_all(b"GET /v2 HTTP/1.1\r\nx: ").unwrap();
    eventually("both are in", || server.metrics.connections.get() >= 2);
    let started = Instant::now();
    assert_eq!(ask(server.http, "GET /v2", &[], b"").status, 200);
    assert!(started.elapsed() < Duration::from_secs(5));
    let mut rest = Vec::new();
    let _ = slow.read_to_end(&mut rest);
    assert!(!String::from_utf8_lossy(&rest).starts_with("HTTP/1.1 200"));
    server.end().unwrap();
}

#[test]
fn heads_have_a_limit() {
    let server = start(local(), options(1, 1, 8));
    let long = "x".repeat(300_000);
    let answer = receive(send(server.http, "GET /v2", &[("x-long", &long)], b""));
    assert_eq!(answer.status, 431, "{answer:?}");
    let many: Vec<(String, String)> = (0..200).map(|i| (format!("x-{i}"), "1".into())).collect();
    let many: Vec<(&str, &str)> = many.iter().map(|(n, v)| (n.as_str(), v.as_str())).collect();
    assert_eq!(receive(send(server.http, "GET /v2", &many, b"")).status, 431);
    let answer = receive(send(server.http, &format!("GET /{long}"), &[], b""));
    assert!(matches!(answer.status, 414 | 431), "{answer:?}");
    assert_eq!(ask(server.http, "GET /v2", &[], b"").status, 200);
    server.end().unwrap();
}

/// Heads that a proxy in front may have read differently are refused, on every port.
#[test]
fn heads_that_could_be_read_in_two_ways_are_refused() {
    let server = start(local(), options(1, 1, 8));
    let says = |address, text: &str| {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        stream.write_all(text.as_bytes()).unwrap();
        receive(stream).status
    };
    for (address, path) in [(server.http, "/v2"), (server.grpc, "/v2"), (server.admin, "/livez")] {
        for headers in [
            "",
            "host: \r\n",
            "host: a b\r\n",
            "host: a\r\nhost: a\r\n",
            "host: a\r\nhost: b\r\n",
            "host: a\r\nauthorization: Bearer x\r\nauthorization: Bearer y\r\n",
            "host: a\r\ntransfer-encoding: gzip, chunked\r\n",
            "host: a\r\ncontent-length: 5\r\ncontent-length: 6\r\n",
        ] {
            let text = format!("GET {path} HTTP/1.1\r\nconnection: close\r\n{headers}\r\n0\r\n\r\n");
            assert_eq!(says(address, &text), 400, "{path} {headers:?}");
        }
        assert_ne!(says(address, &format!("GET {path} HTTP/1.0\r\n\r\n")), 400);
        assert_ne!(says(address, &format!("GET {path} HTTP/1.1\r\nhost: a:80\r\nconnection: close\r\n\r\n")), 400);
    }
    server.end().unwrap();
}
