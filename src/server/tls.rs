//! TLS for both ports: certificate, key, and the authority of client certificates, read again on demand.
//!
//! rustls with ring: no C library and no OpenSSL. TLS 1.2 and 1.3.

use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use tokio_rustls::TlsAcceptor;

use crate::model::regular_file;

/// Most bytes of a certificate or key file.
const LARGEST: u64 = 16 << 20;

/// The certificate files, all in PEM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsOptions {
    /// The server's certificate, followed by intermediate certificates.
    pub cert: PathBuf,
    /// The certificate's private key.
    pub key: PathBuf,
    /// Authorities of client certificates. If set, clients without a certificate from one of them are refused.
    pub client_ca: Option<PathBuf>,
}

/// Why TLS can't be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file can't be read or is not what it should be.
    #[error("can't use `{path}` as {what}: {reason}")]
    File {
        /// The file.
        path: PathBuf,
        /// What it should be.
        what: &'static str,
        /// What is wrong.
        reason: String,
    },
}

/// The current configuration.
#[derive(Debug)]
pub(super) struct Tls {
    options: TlsOptions,
    config: RwLock<Arc<ServerConfig>>,
}

impl Tls {
    /// Reads the files.
    pub(super) fn open(options: TlsOptions) -> Result<Self, TlsError> {
        let config = RwLock::new(configure(&options)?);
        Ok(Self { options, config })
    }

    /// Reads the files again, for new connections; on failure the old ones stay.
    pub(super) fn reload(&self) -> Result<(), TlsError> {
        let config = configure(&self.options)?;
        *self.config.write().unwrap_or_else(PoisonError::into_inner) = config;
        Ok(())
    }

    /// The acceptor for a handshake.
    pub(super) fn acceptor(&self) -> TlsAcceptor {
        TlsAcceptor::from(self.config.read().unwrap_or_else(PoisonError::into_inner).clone())
    }
}

/// Whether a PEM key is encrypted, in either of the two formats.
fn is_encrypted(pem: &[u8]) -> bool {
    let text = String::from_utf8_lossy(pem);
    text.contains("BEGIN ENCRYPTED PRIVATE KEY") || text.contains("Proc-Type: 4,ENCRYPTED")
}

fn configure(options: &TlsOptions) -> Result<Arc<ServerConfig>, TlsError> {
    let file = |path: &Path, what, reason: String| TlsError::File { path: path.into(), what, reason };
    let read = |path: &Path, what| {
        regular_file::read(path, LARGEST).map_err(|e| file(path, what, format!("it can't be read: {e}")))
    };
    let certificates =
        |path: &Path, what| match CertificateDer::pem_slice_iter(&read(path, what)?).collect::<Result<Vec<_>, _>>() {
            Ok(found) if found.is_empty() => Err(file(path, what, "it holds no PEM certificate".into())),
            found => found.map_err(|e| file(path, what, e.to_string())),
        };
    let chain = certificates(&options.cert, "certificate (--tls-cert)")?;
    let of_key = "private key of the certificate (--tls-key)";
    let bad_key = |reason: String| file(&options.key, of_key, reason);
    let pem = read(&options.key, of_key)?;
    let key = PrivateKeyDer::from_pem_slice(&pem).map_err(|e| {
        if is_encrypted(&pem) {
            bad_key("it is encrypted; decrypt it with `openssl pkey -in KEY -out DECRYPTED`".into())
        } else {
            bad_key(e.to_string())
        }
    })?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ServerConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .map_err(|e| bad_key(e.to_string()))?;
    let builder = match &options.client_ca {
        None => builder.with_no_client_auth(),
        Some(path) => {
            let what = "authority of client certificates (--tls-client-ca)";
            let mut roots = RootCertStore::empty();
            for certificate in certificates(path, what)? {
                roots.add(certificate).map_err(|e| file(path, what, e.to_string()))?;
            }
            let verifier = WebPkiClientVerifier::builder_with_provider(roots.into(), provider).build();
            builder.with_client_cert_verifier(verifier.map_err(|e| file(path, what, e.to_string()))?)
        }
    };
    let mut config = builder.with_single_cert(chain, key).map_err(|e| bad_key(e.to_string()))?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}
