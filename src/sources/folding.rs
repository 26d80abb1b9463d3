//! Folds a checkpoint into a file and verifies it through ONNX Runtime with all cores. Every folded model is made here,
//! for the user's repository and for a server's cache.

use crate::checkpoint::Checkpoint;
use crate::engine::verify;
use crate::engine::{BackendError, EngineError, EngineOptions, MapBackend, MapView, OrtBackend};
use crate::fold::verified::{self, Question, VerifyError};
use crate::fold::{self, FoldError, FoldOptions, FoldedFile};
use crate::model::golden::compare;
use crate::model::{INPUT, Manifest, Precision, Staging};

/// Why a checkpoint can't be folded.
#[derive(Debug, thiserror::Error)]
pub enum FoldingError {
    /// Folding failed.
    #[error(transparent)]
    Fold(#[from] FoldError),
    /// Folded and unfolded logits differ, or one of the graphs can't be run.
    #[error(transparent)]
    Verify(#[from] VerifyError<EngineError>),
    /// Integers without images that their ranges could be measured on.
    #[error(
        "int8 needs calibration images: fold it with `nfold fold CHECKPOINT --precision int8 --calibrate DIR`, then serve the repository"
    )]
    NotCalibrated,
    /// The engine can't be opened.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The graph in half precision can't be run.
    #[error(transparent)]
    Run(#[from] BackendError),
    /// Half precision is too coarse for this network.
    #[error(
        "in true half precision logits differ by {difference:.1e} (tolerance {tolerance:.1e}); nothing was written; use --precision fp32"
    )]
    HalfDiffers {
        /// Largest difference of any logit.
        difference: f64,
        /// Largest allowed difference.
        tolerance: f64,
    },
    /// The range of half precision is too small for this network.
    #[error(
        "in half precision `{map}` overflows: it reaches {peak:.1e}, and half precision holds {:.0}; nothing was written; use --precision fp32",
        fold::LARGEST_HALF
    )]
    HalfOverflows {
        /// The feature map.
        map: String,
        /// Largest value of the feature map.
        peak: f64,
    },
}

/// Folds into the graph of `staging` and verifies it. The manifest holds the measurements.
pub fn fold_verified(
    checkpoint: &Checkpoint,
    options: &FoldOptions,
    staging: &Staging,
) -> Result<FoldedFile, FoldingError> {
    if options.precision == Precision::Int8 {
        return Err(FoldingError::NotCalibrated);
    }
    let mut folded = fold::fold_to_file(checkpoint, options, &staging.onnx())?;
    verify(checkpoint, &mut folded.manifest, staging, options)?;
    Ok(folded)
}

/// Compares folded with unfolded through ONNX Runtime with all cores, and, for half precision, measures its effect.
fn verify(
    checkpoint: &Checkpoint,
    manifest: &mut Manifest,
    staging: &Staging,
    options: &FoldOptions,
) -> Result<(), FoldingError> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let engine = EngineOptions { intra_threads: threads, ..EngineOptions::default() };
    let half = match options.precision {
        Precision::Fp32 | Precision::Int8 => None,
        Precision::Fp16 => Some(in_half(checkpoint, manifest, options, &engine)?),
    };
    let answers = |q: Question<'_>| {
        let logits = if q.unfolded {
            let mut backend = OrtBackend::open_file_as_written(q.path, q.what, &engine)?;
            verify::answers_together(&mut backend, q.images, q.shape)
        } else {
            verify::answers(&mut OrtBackend::open_file(q.path, q.what, &engine)?, q.images, q.shape)
        };
        logits.map_err(|e| EngineError::BadModel { model: q.what.into(), reason: e.to_string() })
    };
    verified::verify(checkpoint, manifest, &staging.onnx(), options, answers)?;
    let (Some(half), Some(golden)) = (half, manifest.golden.as_ref()) else { return Ok(()) };
    // emulated: this machine's kernels may compute half precision in single precision, others may not
    let found = compare(&golden.logits, &half.logits);
    if found.max_abs_diff.is_nan() || found.max_abs_diff > golden.tolerance {
        return Err(FoldingError::HalfDiffers { difference: found.max_abs_diff, tolerance: golden.tolerance });
    }
    if let Some(verification) = &mut manifest.fold.verification {
        verification.headroom = Some(half.headroom);
    }
    Ok(())
}

/// The effect of half precision on a network.
struct InHalf {
    /// Logits of the golden image.
    logits: Vec<f32>,
    /// Largest number of half precision divided by the largest value of any feature map.
    headroom: f64,
}

/// Runs the network with every feature map rounded to half precision, on noise and on uniform images. Fails if a map
/// overflows.
fn in_half(
    checkpoint: &Checkpoint,
    manifest: &Manifest,
    options: &FoldOptions,
    engine: &EngineOptions,
) -> Result<InHalf, FoldingError> {
    let emulated = fold::fold_in_half(checkpoint, options)?;
    let mut session = MapBackend::open_as_written(&emulated, "the graph in half precision", engine)?;
    drop(emulated);
    let p = &manifest.preprocessing;
    let [channels, height, width] = p.shape();
    let noise = verify::images(p.shape()).take(4);
    let (mut logits, mut largest) = (Vec::new(), (0.0, String::new()));
    for (i, data) in noise.chain(verify::plain_images(p)).enumerate() {
        let input = MapView { name: INPUT, shape: [1, channels, height, width], data: &data };
        session.run(&[input], |output| match output.name.strip_suffix(fold::PEAK) {
            Some(map) => {
                let peak = output.data.first().map_or(0.0, |v| f64::from(*v));
                if peak.is_nan() || peak > largest.0 {
                    largest = (peak, map.to_string());
                }
            }
            None if i == 0 => logits.extend_from_slice(output.data),
            None => {}
        })?;
    }
    let (peak, map) = largest;
    let headroom = fold::LARGEST_HALF / peak;
    if headroom.is_nan() || headroom < 1.0 {
        return Err(FoldingError::HalfOverflows { map, peak });
    }
    Ok(InHalf { logits, headroom })
}
