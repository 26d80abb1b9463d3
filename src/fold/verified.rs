//! Verifies a fold before it is written: the folded and the unfolded graph give the same finite logits on the same images.
//! Owns the tolerances and the golden answer. The caller passes in a closure that runs graphs.

use std::fs;
use std::path::Path;

use super::{FoldError, FoldOptions, SideOutputs, fold_to_file};
use crate::checkpoint::Checkpoint;
use crate::graph::GraphError;
use crate::model::golden::{compare, digest, images, tolerance};
use crate::model::{Gate, Golden, Manifest, Precision, Verification};

/// A graph and what to ask it.
#[derive(Debug, Clone, Copy)]
pub struct Question<'a> {
    /// The graph's file.
    pub path: &'a Path,
    /// The graph does arithmetic on its weights: done before the first run for all of them, that would take several times
    /// their memory.
    pub unfolded: bool,
    /// What it is, for messages.
    pub what: &'a str,
    /// How many of the [`images`] to run.
    pub images: usize,
    /// Their channels, height and width.
    pub shape: [usize; 3],
}

/// Why a fold is not written. `E`: what can go wrong while a graph runs.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError<E: std::error::Error + 'static> {
    /// The counterpart can't be folded.
    #[error(transparent)]
    Fold(#[from] FoldError),
    /// A graph can't be run.
    #[error(transparent)]
    Engine(E),
    /// The network overflows.
    #[error("logit {class} of {what} is {value} on test image {image}; nothing was written; {advice}")]
    NotFinite {
        /// Which graph.
        what: &'static str,
        /// Position in the logits.
        class: usize,
        /// Infinity or NaN.
        value: f32,
        /// Which of the images.
        image: usize,
        /// What to do.
        advice: &'static str,
    },
    /// The two graphs give different logits.
    #[error(
        "the folded graph's logits differ by {difference:.3e} from the unfolded graph's (tolerance {tolerance:.3e}, span \
         {span:.3e}); nothing was written; try --precision fp32, and report this checkpoint if it is"
    )]
    Apart {
        /// Largest difference of a logit.
        difference: f64,
        /// Tolerance.
        tolerance: f64,
        /// Largest minus smallest logit.
        span: f64,
    },
}

/// Compares the graph with its counterpart (folded against unfolded, which is in single precision with weight arithmetic in
/// double) and puts the measured difference and the golden answer into the manifest. The graph is in the file `onnx`; its
/// counterpart is written beside it and removed. `answers` runs a graph: its logits, image after image.
pub fn verify<E: std::error::Error + 'static>(
    checkpoint: &Checkpoint,
    manifest: &mut Manifest,
    onnx: &Path,
    options: &FoldOptions,
    mut answers: impl FnMut(Question<'_>) -> Result<Vec<f32>, E>,
) -> Result<(), VerifyError<E>> {
    let classes = manifest.classes as usize;
    let count = if manifest.fold.gmacs < 5.0 { 4 } else { 1 };
    let shape = manifest.preprocessing.shape();
    let mut ask = |path: &Path, unfolded: bool, what: &'static str, advice: &'static str| {
        let logits = answers(Question { path, unfolded, what, images: count, shape }).map_err(VerifyError::Engine)?;
        match logits.iter().position(|logit| !logit.is_finite()) {
            None => Ok(logits),
            Some(i) => Err(VerifyError::NotFinite {
                what,
                class: i % classes.max(1),
                value: logits[i],
                image: i / classes.max(1),
                advice,
            }),
        }
    };
    // one graph after the other, from files: a network's weights need not be in memory several times
    let counterpart = FoldOptions {
        unfolded: !options.unfolded,
        precision: Precision::Fp32,
        gate: Gate::Broadcast,
        outputs: SideOutputs::NONE,
        ..options.clone()
    };
    let path = onnx.with_extension("counterpart");
    fold_to_file(checkpoint, &counterpart, &path)?;
    let what = "the counterpart for verification";
    let reference = ask(&path, counterpart.unfolded, what, "the checkpoint's weights are too large")?;
    fs::remove_file(&path).map_err(|e| FoldError::Graph(GraphError::Io(e.to_string())))?;
    let advice = match options.precision {
        Precision::Fp32 | Precision::Int8 => "the checkpoint's weights are too large",
        Precision::Fp16 => "the network does not fit half precision, fold it with --precision fp32",
    };
    let mut logits = ask(onnx, options.unfolded, "the folded graph", advice)?;
    let found = compare(&reference, &logits);
    let tolerance = tolerance(options.precision, found.logit_span);
    if found.max_abs_diff.is_nan() || found.max_abs_diff > tolerance {
        return Err(VerifyError::Apart { difference: found.max_abs_diff, tolerance, span: found.logit_span });
    }
    logits.truncate(classes);
    let input = images(shape).next().unwrap_or_default();
    manifest.golden = Some(Golden { input_sha256: digest(&input), logits, tolerance });
    manifest.fold.verification = Some(Verification {
        images: count as u32,
        max_abs_diff: found.max_abs_diff,
        logit_span: found.logit_span,
        tolerance,
        headroom: None,
    });
    Ok(())
}
