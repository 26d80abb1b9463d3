//! timm's `model_args`: removed one by one by name, and checked before anything is sized by them.

use std::fmt::Display;
use std::ops::RangeInclusive;

use serde_json::{Map, Value};

use super::activation::{ACTIVATIONS, Activation};
use super::{NetError, Pool};

/// A network's `model_args`, removed one by one; the rest is refused at the end.
pub(super) struct Arguments<'a> {
    architecture: &'a str,
    left: Map<String, Value>,
}

impl<'a> Arguments<'a> {
    pub(super) fn new(architecture: &'a str, args: &Map<String, Value>) -> Self {
        Self { architecture, left: args.clone() }
    }

    /// Removes an argument and stores it in `target` as `T`. If it is absent or null, `target` stays as it is: timm's
    /// `create_model` drops null arguments.
    pub(super) fn set<T: serde::de::DeserializeOwned>(&mut self, name: &str, target: &mut T) -> Result<(), NetError> {
        let Some(value) = self.left.remove(name).filter(|v| !v.is_null()) else { return Ok(()) };
        *target = serde_json::from_value(value.clone()).map_err(|e| bad_argument(name, &value, e.to_string()))?;
        Ok(())
    }

    /// Removes arguments that don't affect inference.
    pub(super) fn ignore(&mut self, names: &[&str]) {
        for name in names {
            self.left.remove(*name);
        }
    }

    /// Reads the arguments of all families: input channels, classes, pooling.
    pub(super) fn ends(&mut self) -> Result<Ends, NetError> {
        let (mut classes, mut in_chans, mut pool) = (1000usize, 3usize, "avg".to_string());
        self.set("num_classes", &mut classes)?;
        self.set("in_chans", &mut in_chans)?;
        self.set("global_pool", &mut pool)?;
        self.ignore(&["drop_rate", "drop_path_rate", "drop_block_rate", "pretrained", "features_only", "zero_init_fc"]);
        let refuse = |name: &str, value: Value, reason: &str| Err(bad_argument(name, &value, reason.into()));
        if !(1..=1_000_000).contains(&classes) {
            return refuse(
                "num_classes",
                classes.into(),
                "a classifier with 1 to 1,000,000 classes is needed; features alone are not served",
            );
        }
        if !(1..=16).contains(&in_chans) {
            return refuse("in_chans", in_chans.into(), "1 to 16 channels are supported");
        }
        let Some(pool) = Pool::parse(&pool) else {
            return refuse("global_pool", pool.into(), "avg, max, avgmax and catavgmax are supported");
        };
        Ok(Ends { in_chans, pool, classes })
    }

    pub(super) fn finish(self) -> Result<(), NetError> {
        match self.left.into_iter().next() {
            None => Ok(()),
            Some((name, _)) => Err(NetError::UnknownArgument { name, architecture: self.architecture.into() }),
        }
    }
}

/// Input and output of a network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Ends {
    pub(super) in_chans: usize,
    pub(super) pool: Pool,
    pub(super) classes: usize,
}

pub(super) fn bad_argument(name: &str, value: &Value, reason: String) -> NetError {
    NetError::BadArgument { name: name.into(), value: value.to_string(), reason }
}

/// Reads the output stride, 32 by default. If it is less, later stages are dilated instead of strided.
pub(super) fn output_stride(args: &mut Arguments<'_>) -> Result<usize, NetError> {
    let mut stride = 32usize;
    args.set("output_stride", &mut stride)?;
    match stride {
        8 | 16 | 32 => Ok(stride),
        other => Err(bad_argument("output_stride", &other.into(), "8, 16 or 32".into())),
    }
}

/// Refuses lists of stages that are out of range, before anything is sized by them.
pub(super) fn check_stages(names: [&str; 2], depths: &[usize], channels: &[usize]) -> Result<(), NetError> {
    let as_json = |list: &[usize]| Value::from(list.to_vec());
    if depths.is_empty() || depths.len() != channels.len() || depths.len() > 16 {
        let reason = format!("needs as many entries (1 to 16) as `{}` ({})", names[1], channels.len());
        return Err(bad_argument(names[0], &as_json(depths), reason));
    }
    if depths.iter().any(|d| !(1..=1000).contains(d)) {
        return Err(bad_argument(names[0], &as_json(depths), "each stage needs 1 to 1000 blocks".into()));
    }
    if channels.iter().any(|c| !(1..=65_536).contains(c)) {
        return Err(bad_argument(names[1], &as_json(channels), "each stage needs 1 to 65,536 channels".into()));
    }
    Ok(())
}

/// Refuses numbers outside of their ranges; the error names the argument.
pub(super) fn check_ranges<T, const N: usize>(numbers: [(&str, T, RangeInclusive<T>); N]) -> Result<(), NetError>
where
    T: PartialOrd + Display + Into<Value>,
{
    for (name, number, range) in numbers {
        if !range.contains(&number) {
            let reason = format!("must lie in {}..={}", range.start(), range.end());
            return Err(bad_argument(name, &number.into(), reason));
        }
    }
    Ok(())
}

/// The activation that the argument `act_layer` names.
pub(super) fn activation_argument(act_layer: &str) -> Result<Activation, NetError> {
    Activation::parse(act_layer).ok_or_else(|| {
        let known = ACTIVATIONS.map(Activation::name).join(", ");
        bad_argument("act_layer", &act_layer.into(), format!("known are {known}"))
    })
}
