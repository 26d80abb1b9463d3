//! A server's answers to images of files, by `/v1/classify`: what `nfold eval --server` asks.

use std::time::Duration;

use anyhow::{anyhow, bail};
use bytes::Bytes;
use futures_util::{StreamExt as _, pin_mut, stream};
use serde_json::Value;
use tokio::runtime::Runtime;

use crate::bench::load::client::{Pool, Reply};
use crate::bench::load::request::Payload;
use crate::cli::addresses;
use crate::cli::classify::search::Found;
use crate::cli::classify::workers::{Refusal, read};
use crate::eval::TOP;
use crate::infer::top_k::Prediction;
use crate::model::{ModelDir, ScoreFunction};

/// Requests under way at once: enough to keep a small server busy, few enough to leave others room.
const AT_ONCE: usize = 4;
/// How often an image that a busy server refused is sent again.
const RETRIES: u32 = 8;
/// Longest wait for an answer.
const PATIENCE: Duration = Duration::from_secs(60);

/// The model that is evaluated, here or on a server.
pub struct Subject {
    /// Name of the model.
    pub name: String,
    /// Its version.
    pub version: u64,
    /// Class names; empty if it has none.
    pub labels: Vec<String>,
    /// Number of classes.
    pub classes: usize,
    /// Digest of its graph.
    pub onnx_sha256: String,
    /// What makes scores of its logits.
    pub activation: ScoreFunction,
}

impl Subject {
    /// A model of a repository.
    pub fn of(model: &ModelDir) -> Self {
        let manifest = &model.manifest;
        Self {
            name: model.name.clone(),
            version: model.version,
            labels: manifest.labels.clone(),
            classes: manifest.classes as usize,
            onnx_sha256: manifest.onnx_sha256.clone(),
            activation: manifest.scoring().activation,
        }
    }
}

/// A running server and the model that it is asked.
pub struct Remote {
    server: String,
    runtime: Runtime,
    pool: Pool,
    /// Path and query of `/v1/classify`, without the number of predictions.
    target: String,
    /// Largest file that is sent, in bytes.
    most: usize,
}

impl Remote {
    /// Asks a server about the model: what it is, and its classes, by the first of the images that it answers.
    pub fn open(
        server: &str,
        name: Option<&str>,
        version: Option<u64>,
        images: &[Found],
        most: usize,
    ) -> anyhow::Result<(Subject, Self)> {
        let address = address(server)?;
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
        let runtime = runtime.map_err(|e| anyhow!("can't start the async runtime: {e}"))?;
        let mut remote = Self { server: server.into(), runtime, pool: Pool::new(address), target: String::new(), most };
        let name = match name {
            Some(name) => name.to_string(),
            None => remote.only_model()?,
        };
        let path = version.map_or_else(|| format!("/v2/models/{name}"), |v| format!("/v2/models/{name}/versions/{v}"));
        let told = remote.told(&path)?;
        let unknown =
            |what: &str| anyhow!("`{server}` does not tell {what} of model `{name}`; is it a server of nfold?");
        let versions = told["versions"].as_array().into_iter().flatten().filter_map(|v| v.as_str()?.parse().ok());
        let version = version.or_else(|| versions.max()).ok_or_else(|| unknown("the versions"))?;
        let classes = told["outputs"][0]["shape"][1].as_u64().and_then(|n| usize::try_from(n).ok());
        let classes = classes.filter(|&n| n > 0 && n < 1 << 24).ok_or_else(|| unknown("the number of classes"))?;
        let property = |key: &str| told["properties"][key].as_str().unwrap_or_default().to_string();
        let activation = serde_json::from_value(property("scores").into());
        remote.target = format!("/v1/classify?model={name}&version={version}");
        let labels = remote.labels(images, classes)?;
        let subject = Subject {
            name,
            version,
            labels,
            classes,
            onnx_sha256: property("onnx_sha256"),
            activation: activation.unwrap_or(ScoreFunction::usual(classes)),
        };
        Ok((subject, remote))
    }

    /// The model of a server that has one.
    fn only_model(&self) -> anyhow::Result<String> {
        let told = self.told("/v2/models")?;
        let names: Vec<&str> = told["models"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        match names.as_slice() {
            [only] => Ok(only.to_string()),
            [] => bail!("`{}` serves no model", self.server),
            several => bail!("`{}` serves several models, name one with --model: {}", self.server, several.join(", ")),
        }
    }

    /// What a server tells at a path.
    fn told(&self, path: &str) -> anyhow::Result<Value> {
        let payload = Payload { target: path.into(), headers: Vec::new(), body: Bytes::new() };
        let reply = self.runtime.block_on(asked(&self.pool, "GET", &payload));
        let Reply { status, body } =
            reply.map_err(|e| anyhow!("`{}` does not answer: {e}; check --server", self.server))?;
        let told: Value = serde_json::from_slice(&body).unwrap_or_default();
        if status == 200 {
            return Ok(told);
        }
        bail!("`{}` answers {status}: {}", self.server, told["error"].as_str().unwrap_or("no reason is given"))
    }

    /// All class names in the order of the logits; none where classes are numbered.
    fn labels(&self, images: &[Found], classes: usize) -> anyhow::Result<Vec<String>> {
        for image in images.iter().filter(|image| image.refused.is_none()) {
            let answer = self.runtime.block_on(self.classify(image, classes))?;
            let Ok(mut all) = answer else { continue };
            all.sort_by_key(|p| p.index);
            if all.len() != classes || all.iter().enumerate().any(|(i, p)| p.index != i) {
                bail!("`{}` names {} of {classes} classes when it is asked for all", self.server, all.len());
            }
            let numbered = all.iter().all(|p| p.label == p.index.to_string());
            return Ok(if numbered { Vec::new() } else { all.into_iter().map(|p| p.label).collect() });
        }
        bail!("`{}` answers none of {} images, so that its classes are unknown", self.server, images.len())
    }

    /// The answers to all images, in their order.
    pub fn each(
        self,
        images: &[Found],
        mut answered: impl FnMut(usize, Result<Vec<Prediction>, Refusal>) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        let remote = &self;
        let answers = stream::iter(images).map(|image| remote.classify(image, TOP)).buffered(AT_ONCE).enumerate();
        self.runtime.block_on(async {
            pin_mut!(answers);
            while let Some((i, answer)) = answers.next().await {
                answered(i, answer?)?;
            }
            Ok(())
        })
    }

    /// The outer error is the server's, the inner one the image's.
    async fn classify(&self, image: &Found, k: usize) -> anyhow::Result<Result<Vec<Prediction>, Refusal>> {
        if let Some(reason) = &image.refused {
            return Ok(Err(("unreadable", reason.clone())));
        }
        let body = match read(&image.path, self.most) {
            Ok(body) => Bytes::from(body),
            Err(e) => return Ok(Err(("unreadable", format!("can't read it: {e}")))),
        };
        let headers = vec![("content-type", "application/octet-stream".to_string())];
        let payload = Payload { target: format!("{}&top_k={k}", self.target), headers, body };
        let mut tries = 0;
        loop {
            let reply = asked(&self.pool, "POST", &payload).await;
            let Reply { status, body } = reply.map_err(|e| anyhow!("`{}` does not answer: {e}", self.server))?;
            let told: Value = serde_json::from_slice(&body).unwrap_or_default();
            let said = || told["error"].as_str().unwrap_or("no reason is given").to_string();
            match status {
                200 => return Ok(Ok(predictions(&told))),
                400 | 413 | 415 => return Ok(Err(("refused", said()))),
                429 | 503 if tries < RETRIES => {
                    tries += 1;
                    tokio::time::sleep(Duration::from_secs(1)).await;
                }
                _ => bail!("`{}` answers {status}: {}", self.server, said()),
            }
        }
    }
}

/// `http://HOST:PORT`, or without the scheme, as an address.
fn address(server: &str) -> anyhow::Result<String> {
    if server.starts_with("https://") {
        bail!("`{server}`: eval speaks plain HTTP; give the address of a port without TLS");
    }
    let plain = server.strip_prefix("http://").unwrap_or(server).trim_end_matches('/');
    let address = addresses::connect(plain).map_err(|e| anyhow!("--server `{server}`: {e}"))?;
    Ok(address.to_string())
}

async fn asked(pool: &Pool, method: &str, payload: &Payload) -> Result<Reply, String> {
    let reply = tokio::time::timeout(PATIENCE, pool.ask(method, payload)).await;
    reply.map_err(|_| format!("nothing came for {} s", PATIENCE.as_secs()))?
}

/// The predictions of an answer to one image.
fn predictions(told: &Value) -> Vec<Prediction> {
    let all = told["results"][0]["predictions"].as_array().into_iter().flatten();
    let one = |p: &Value| {
        let index = usize::try_from(p["index"].as_u64()?).ok()?;
        Some(Prediction { index, label: p["label"].as_str()?.to_string(), score: p["score"].as_f64()? })
    };
    all.filter_map(one).collect()
}
