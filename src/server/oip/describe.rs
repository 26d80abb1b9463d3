//! Metadata, configuration, statistics and index of the server and its models, as the messages of
//! `proto/open_inference.proto`; the same for HTTP and gRPC.

use std::sync::Arc;

use super::super::app::App;
use super::super::status::{ApiError, Code};
use super::datatype::Datatype;
use crate::infer::registry::LiveModel;
use crate::metrics::statistics::Total;
use crate::model::{FEATURES, INPUT, MAP, OUTPUT};
use crate::pb::open_inference as pb;

/// Supported extensions, by the names that clients look for.
const EXTENSIONS: [&str; 6] = [
    "binary_tensor_data",
    "classification",
    "statistics",
    "model_configuration",
    "schedule_policy",
    "model_repository",
];

/// Name and version of the server.
pub(in crate::server) fn server() -> pb::ServerMetadataResponse {
    pb::ServerMetadataResponse {
        name: env!("CARGO_PKG_NAME").into(),
        version: env!("CARGO_PKG_VERSION").into(),
        extensions: EXTENSIONS.map(String::from).to_vec(),
    }
}

/// Names of the models that are served.
pub(in crate::server) fn names(app: &App) -> Vec<String> {
    let mut names: Vec<_> = app.registry.all().iter().map(|model| model.name.clone()).collect();
    names.dedup();
    names
}

/// The model that a request names; version `None` or empty: the highest.
pub(in crate::server) fn find(app: &App, name: &str, version: Option<&str>) -> Result<Arc<LiveModel>, ApiError> {
    let version = match version.unwrap_or_default() {
        "" => None,
        text => Some(text.parse::<u64>().map_err(|_| {
            let text = text.escape_debug();
            ApiError::new(Code::ModelNotFound, format!("version `{text}` can't exist: versions are whole numbers"))
        })?),
    };
    Ok(app.registry.find((!name.is_empty()).then_some(name), version)?)
}

/// A model's metadata: inputs, outputs, versions and properties.
pub(in crate::server) fn model(app: &App, model: &LiveModel) -> pb::ModelMetadataResponse {
    use pb::model_metadata_response::TensorMetadata;
    let versions = app.registry.all().into_iter().filter(|m| m.name == model.name).map(|m| m.version.to_string());
    let tensor = |name: &str, shape: &[u32]| TensorMetadata {
        name: name.into(),
        datatype: Datatype::Fp32.name().into(),
        shape: std::iter::once(-1).chain(shape.iter().map(|&side| side.into())).collect(),
    };
    let manifest = &model.manifest;
    let p = &manifest.preprocessing;
    let scoring = &model.scoring;
    let mut properties = vec![
        ("architecture", manifest.architecture.clone()),
        ("producer", manifest.producer.clone()),
        ("onnx_sha256", manifest.onnx_sha256.clone()),
        ("source_sha256", manifest.source_sha256.clone()),
        ("mean", format!("{:?}", p.mean)),
        ("std", format!("{:?}", p.std)),
        ("crop_pct", p.crop_pct.to_string()),
        ("scores", scoring.activation.name().into()),
    ];
    if scoring.temperature != 1.0 {
        properties.push(("temperature", scoring.temperature.to_string()));
    }
    if scoring.has_thresholds() {
        // by class where they differ: a client of logits needs them
        let thresholds = match scoring.threshold {
            Some(threshold) if scoring.thresholds.is_empty() => threshold.to_string(),
            _ => {
                let all = (0..manifest.classes as usize).map(|index| scoring.threshold_of(index)).collect::<Vec<_>>();
                serde_json::to_string(&all).unwrap_or_default()
            }
        };
        properties.push(("threshold", thresholds));
    }
    let mut outputs = vec![tensor(OUTPUT, &[manifest.classes])];
    outputs.extend(manifest.features.map(|width| tensor(FEATURES, &[width])));
    outputs.extend(manifest.map.map(|map| tensor(MAP, &map)));
    pb::ModelMetadataResponse {
        name: model.name.clone(),
        versions: versions.collect(),
        platform: "onnx_onnxv1".into(),
        inputs: vec![tensor(INPUT, &[p.channels() as u32, p.height, p.width])],
        outputs,
        properties: properties.into_iter().map(|(name, value)| (name.into(), value)).collect(),
    }
}

/// The configuration, as load generators read it.
pub(in crate::server) fn config(model: &LiveModel) -> pb::ModelConfig {
    let p = &model.manifest.preprocessing;
    let options = model.options();
    let (fp32, whole) = (pb::DataType::TypeFp32.into(), |n: usize| i32::try_from(n).unwrap_or(i32::MAX));
    let output = |(name, dims): (&str, Vec<u32>)| pb::ModelOutput {
        name: name.into(),
        data_type: fp32,
        dims: dims.into_iter().map(i64::from).collect(),
        label_filename: String::new(),
    };
    let manifest = &model.manifest;
    let side = manifest.features.map(|width| (FEATURES, vec![width])).into_iter();
    let side = side.chain(manifest.map.map(|map| (MAP, map.to_vec())));
    let outputs = std::iter::once((OUTPUT, vec![manifest.classes])).chain(side);
    pb::ModelConfig {
        name: model.name.clone(),
        platform: "onnxruntime_onnx".into(),
        max_batch_size: whole(options.queue_limit.min(options.max_batch)),
        input: vec![pb::ModelInput {
            name: INPUT.into(),
            data_type: fp32,
            format: pb::model_input::Format::Nchw.into(),
            dims: vec![p.channels() as i64, p.height.into(), p.width.into()],
        }],
        output: outputs.map(output).collect(),
        instance_group: vec![pb::ModelInstanceGroup {
            name: model.name.clone(),
            count: whole(options.workers),
            gpus: vec![],
            kind: pb::model_instance_group::Kind::Auto.into(),
        }],
        default_model_filename: crate::model::MODEL_FILE.into(),
        dynamic_batching: Some(pb::ModelDynamicBatching {
            max_queue_delay_microseconds: u64::try_from(options.max_queue_delay.as_micros()).unwrap_or(u64::MAX),
            default_queue_policy: Some(pb::ModelQueuePolicy {
                timeout_action: pb::model_queue_policy::TimeoutAction::Reject.into(),
                default_timeout_microseconds: 0,
                allow_timeout_override: true,
                max_queue_size: u32::try_from(options.queue_limit).unwrap_or(u32::MAX),
            }),
            ..Default::default()
        }),
        parameters: Default::default(),
        backend: "onnxruntime".into(),
    }
}

/// Statistics of the named model and version, or of all.
pub(in crate::server) fn statistics(
    app: &App,
    name: &str,
    version: Option<&str>,
) -> Result<pb::ModelStatisticsResponse, ApiError> {
    let models = match (name, version.unwrap_or_default()) {
        ("", _) => app.registry.all(),
        (name, "") => {
            find(app, name, None)?;
            app.registry.all().into_iter().filter(|m| m.name == name).collect()
        }
        (name, version) => vec![find(app, name, Some(version))?],
    };
    Ok(pb::ModelStatisticsResponse { model_stats: models.iter().map(|m| totals(m)).collect() })
}

fn totals(model: &LiveModel) -> pb::ModelStatistics {
    let s = model.statistics();
    let duration = |total: Total| Some(pb::StatisticDuration { count: total.count, ns: total.ns });
    // logits are part of the run: there is no copy to time
    let no_time = |count| Some(pb::StatisticDuration { count, ns: 0 });
    let batches = s.batches.iter().map(|(&size, batch)| pb::InferBatchStatistics {
        batch_size: size as u64,
        compute_input: duration(batch.input),
        compute_infer: duration(batch.infer),
        compute_output: no_time(batch.infer.count),
    });
    pb::ModelStatistics {
        name: model.name.clone(),
        version: model.version.to_string(),
        last_inference: s.last_ms,
        inference_count: s.images,
        execution_count: s.runs,
        batch_stats: batches.collect(),
        inference_stats: Some(pb::InferStatistics {
            success: duration(s.success),
            fail: duration(s.fail),
            queue: duration(s.queue),
            compute_input: duration(s.input),
            compute_infer: duration(s.infer),
            compute_output: duration(s.output),
            cache_hit: no_time(0),
            cache_miss: no_time(0),
        }),
    }
}

/// The served models and whether each is ready; with `ready`, only those that are.
pub(in crate::server) fn index(app: &App, ready: bool) -> pb::RepositoryIndexResponse {
    use pb::repository_index_response::ModelIndex;
    let entry = |model: Arc<LiveModel>| {
        let (state, reason) = match app.readiness.check_model(&model) {
            Ok(()) => ("READY", String::new()),
            Err(reason) => ("UNAVAILABLE", reason),
        };
        ModelIndex { name: model.name.clone(), version: model.version.to_string(), state: state.into(), reason }
    };
    let models = app.registry.all().into_iter().map(entry).filter(|model| !ready || model.reason.is_empty());
    pb::RepositoryIndexResponse { models: models.collect() }
}

/// The model if it is ready, or why it is not; other models don't count.
pub(in crate::server) fn ready(app: &App, name: &str, version: Option<&str>) -> Result<Arc<LiveModel>, ApiError> {
    let model = find(app, name, version)?;
    let code = if app.readiness.is_draining() { Code::ShuttingDown } else { Code::NotReady };
    app.readiness.check_model(&model).map_err(|reason| ApiError::new(code, format!("not ready: {reason}")))?;
    Ok(model)
}
