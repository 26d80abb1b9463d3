//! Which execution provider runs which part of a graph: ONNX Runtime silently falls back to the next provider for
//! unsupported operators. Reads the profile of one run; knows neither sessions nor models.

use std::collections::{BTreeMap, BTreeSet};

use serde::Deserialize;

use super::{EngineError, Provider};

/// Number of operators (or of parts that a provider fused) per provider, by ONNX Runtime's name.
pub type Placement = BTreeMap<String, usize>;

/// An event of a profile; other fields are ignored.
#[derive(Deserialize)]
struct Event {
    #[serde(default)]
    cat: String,
    #[serde(default)]
    name: String,
    #[serde(default)]
    args: Args,
}

#[derive(Deserialize, Default)]
struct Args {
    #[serde(default)]
    provider: String,
}

/// Reads a profile written by ONNX Runtime; the error says what is wrong with it.
pub(super) fn read(profile: &[u8]) -> Result<Placement, String> {
    let events: Vec<Event> = serde_json::from_slice(profile).map_err(|e| format!("its profile can't be read: {e}"))?;
    let mut nodes: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for event in events.into_iter().filter(|e| e.cat == "Node" && !e.args.provider.is_empty()) {
        nodes.entry(event.args.provider).or_default().insert(event.name);
    }
    if nodes.is_empty() {
        Err("its profile names no operator".into())
    } else {
        Ok(nodes.into_iter().map(|(provider, names)| (provider, names.len())).collect())
    }
}

/// Refuses a graph of which a part runs on another provider than requested.
pub fn check(placement: &Placement, asked: Provider, what: &str) -> Result<(), EngineError> {
    let at_home = |name: &str| name == asked.in_runtime();
    let elsewhere: Vec<String> =
        placement.iter().filter(|(name, _)| !at_home(name)).map(|(name, count)| format!("{count} on {name}")).collect();
    if elsewhere.is_empty() {
        return Ok(());
    }
    Err(EngineError::Fallback {
        model: what.into(),
        provider: asked.name(),
        there: placement.get(asked.in_runtime()).copied().unwrap_or(0),
        elsewhere: elsewhere.join(", "),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_profile_counts_every_operator_once() {
        let profile = br#"[
            {"cat":"Session","name":"model_loading","ts":1,"args":{}},
            {"cat":"Node","name":"c0_kernel_time","args":{"op_name":"Conv","provider":"CUDAExecutionProvider"}},
            {"cat":"Node","name":"c0_kernel_time","args":{"op_name":"Conv","provider":"CUDAExecutionProvider"}},
            {"cat":"Node","name":"c1_kernel_time","args":{"op_name":"Conv","provider":"CUDAExecutionProvider"}},
            {"cat":"Node","name":"c1_fence_before","args":{"op_name":"Conv"}},
            {"cat":"Node","name":"s_kernel_time","args":{"op_name":"Shape","provider":"CPUExecutionProvider"}}
        ]"#;
        let placement = read(profile).unwrap_or_default();
        assert_eq!(placement, [("CPUExecutionProvider".into(), 1), ("CUDAExecutionProvider".into(), 2)].into());
        let refused = check(&placement, Provider::Cuda, "m").map_err(|e| e.to_string());
        assert!(refused.is_err_and(|e| e.contains("1 on CPUExecutionProvider") && e.contains("--allow-fallback")));
        assert!(check(&[("TensorrtExecutionProvider".into(), 1)].into(), Provider::TensorRt, "m").is_ok());
        assert!(check(&placement, Provider::TensorRt, "m").is_err());
        assert!(read(b"[]").is_err() && read(b"no json").is_err());
    }
}
