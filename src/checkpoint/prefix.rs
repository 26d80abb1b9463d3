//! Prefixes that wrappers put before a network's tensor names (DDP, torch.compile, Lightning, transformers, EMA
//! copies): finds the network's prefix, and reports tensors outside of it.

use std::collections::BTreeSet;

use super::store::Tensors;

/// Module names that wrappers give the network.
const WRAPPERS: [&str; 12] = [
    "module",
    "_orig_mod",
    "model",
    "backbone",
    "timm_model",
    "net",
    "network",
    "encoder",
    "model_ema",
    "ema_model",
    "ema",
    "averaged_model",
];
/// Names of modules beside the network that only training uses.
const TRAINING: [&str; 9] = [
    "criterion",
    "loss",
    "loss_fn",
    "loss_func",
    "train_metrics",
    "val_metrics",
    "metrics",
    "n_averaged",
    "train_loss",
];

/// The prefix of a network's tensors, and other tensors of the file.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Unwrapped {
    /// Prefix that was removed from every name.
    pub prefix: String,
    /// Whether the prefix is that of EMA weights.
    pub averaged: bool,
    /// Prefix of EMA weights beside the plain ones.
    pub ema: Option<String>,
    /// Tensors that only training uses.
    pub unused: Vec<String>,
}

/// Removes the network's prefix from its tensors' names. `first` is the name of one of the network's tensors. The error
/// says why no prefix can be chosen, or names a tensor outside of it that is not known to be of training.
pub fn unwrap(tensors: &mut Tensors, first: &str, use_ema: bool) -> Result<Unwrapped, String> {
    let known = |prefix: &str| prefix.split_terminator('.').all(|part| WRAPPERS.contains(&part));
    let prefixes = tensors.entries.keys().filter_map(|name| name.strip_suffix(first));
    let found: BTreeSet<String> =
        prefixes.filter(|p| (p.is_empty() || p.ends_with('.')) && known(p)).map(String::from).collect();
    let averaged = |prefix: &&String| prefix.split('.').any(|part| part.contains("ema") || part.contains("averaged"));
    let (ema, plain): (Vec<String>, Vec<String>) = found.into_iter().partition(|p| averaged(&p));
    let (chosen, other) = if use_ema && !ema.is_empty() { (&ema, &plain) } else { (&plain, &ema) };
    let prefix = match (chosen.as_slice(), other.as_slice()) {
        ([], []) => return Ok(Unwrapped::default()),
        ([one], _) => one.clone(),
        ([], [one]) => one.clone(),
        (several, _) | ([], several) if several.len() > 1 => {
            // timm itself writes names without a prefix
            match several.iter().find(|p| p.is_empty()) {
                Some(bare) => bare.clone(),
                None => {
                    let names = several.join("`, `");
                    return Err(format!("it holds several networks, under `{names}`; save the one to fold alone"));
                }
            }
        }
        _ => String::new(),
    };
    let mut unwrapped = Unwrapped { prefix: prefix.clone(), averaged: ema.contains(&prefix), ..Unwrapped::default() };
    if !use_ema {
        unwrapped.ema = ema.first().filter(|p| **p != prefix).cloned();
    }
    // other copies of the network
    let twins: Vec<&String> = ema.iter().chain(&plain).filter(|p| **p != prefix && !p.is_empty()).collect();
    let old = std::mem::take(&mut tensors.entries);
    for (name, entry) in old {
        let twin =
            twins.iter().find(|p| name.starts_with(p.as_str()) && (prefix.is_empty() || !name.starts_with(&prefix)));
        match name.strip_prefix(&prefix) {
            _ if twin.is_some() => {
                let note = format!("{}*", twin.map_or("", |p| p.as_str()));
                if !unwrapped.unused.contains(&note) {
                    unwrapped.unused.push(note);
                }
            }
            _ if name.split('.').next().is_some_and(|root| TRAINING.contains(&root)) => unwrapped.unused.push(name),
            Some(rest) => drop(tensors.entries.insert(rest.into(), entry)),
            None => {
                return Err(format!(
                    "tensor `{name}` lies outside the network, which is under `{prefix}`; save a network that holds its own classifier, or that network alone"
                ));
            }
        }
    }
    Ok(unwrapped)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::store::{Entry, Number};

    fn tensors(names: &[&str]) -> Tensors {
        let entry = Entry { file: 0, number: Number::F32, shape: vec![], strides: None, offset: 0 };
        let entries = names.iter().map(|n| (n.to_string(), entry.clone())).collect();
        Tensors { entries, ..Tensors::default() }
    }

    fn run(names: &[&str], use_ema: bool) -> Result<(Unwrapped, Vec<String>), String> {
        let mut tensors = tensors(names);
        let unwrapped = unwrap(&mut tensors, "stem.conv.weight", use_ema)?;
        Ok((unwrapped, tensors.entries.into_keys().collect()))
    }

    #[test]
    fn wrappers_come_off() {
        for prefix in
            ["", "module.", "_orig_mod.", "module._orig_mod.", "model.", "backbone.", "timm_model.", "model.net."]
        {
            let names = [format!("{prefix}stem.conv.weight"), format!("{prefix}head.fc.bias")];
            let (found, left) = run(&names.each_ref().map(String::as_str), false).expect(prefix);
            assert_eq!(found.prefix, prefix);
            assert_eq!(left, ["head.fc.bias", "stem.conv.weight"], "{prefix}");
        }
    }

    #[test]
    fn averaged_copies_are_chosen_only_when_asked_for() {
        let names = ["model.stem.conv.weight", "model_ema.module.stem.conv.weight", "loss_fn.pos_weight", "model.a"];
        let (found, left) = run(&names, false).expect("chosen");
        assert_eq!((found.prefix.as_str(), found.ema.as_deref()), ("model.", Some("model_ema.module.")));
        assert_eq!(left, ["a", "stem.conv.weight"]);
        assert_eq!(found.unused, ["loss_fn.pos_weight", "model_ema.module.*"]);
        let (found, left) = run(&names, true).expect("chosen");
        assert_eq!((found.prefix.as_str(), found.ema), ("model_ema.module.", None));
        assert_eq!(left, ["stem.conv.weight"]);
    }

    #[test]
    fn what_is_no_wrapper_stays() {
        let (found, left) = run(&["decoder.stem.conv.weight"], false).expect("nothing found");
        assert_eq!((found.prefix.as_str(), left.as_slice()), ("", &["decoder.stem.conv.weight".to_string()][..]));
        assert!(run(&["model.stem.conv.weight", "net.stem.conv.weight"], false).is_err());
        // a head outside the prefix is not dropped
        let error = run(&["backbone.stem.conv.weight", "head.weight"], false).expect_err("outside");
        assert!(error.contains("`head.weight`") && error.contains("`backbone.`"), "{error}");
    }
}
