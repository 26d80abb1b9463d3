//! CUDA and TensorRT: how they are asked for. Without the cargo feature `gpu` they are refused.

use std::path::PathBuf;

use ort::session::builder::SessionBuilder;

use super::Provider;

/// What only GPUs need to know.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct GpuOptions {
    /// The device's number.
    pub device: u16,
    /// Take a graph of which a part runs elsewhere.
    pub allow_fallback: bool,
    /// Multiply with the ten bits of a half-precision mantissa where a graph is in single precision (TensorFloat-32).
    pub tf32: bool,
    /// Lay feature maps out with channels last, as tensor cores read them.
    pub prefer_nhwc: bool,
    /// Add a convolution's bias in cuDNN's own kernel, not in one after it.
    pub fuse_conv_bias: bool,
    /// Record each shape's kernels as a CUDA graph, and replay that.
    pub cuda_graph: bool,
    /// Most bytes of device memory for one engine's feature maps; none: what the device has.
    pub memory_limit: Option<usize>,
    /// TensorRT may compute in half precision.
    pub tensorrt_fp16: bool,
    /// Where TensorRT keeps the engines that it has built for one graph; none: they are built at every start.
    pub tensorrt_cache: Option<PathBuf>,
    /// Shapes of the input that TensorRT builds engines for, so that no request has to wait for one.
    pub profiles: Vec<Profile>,
}

/// A range of input shapes, `[images, channels, height, width]`; built for the largest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Profile {
    /// Fewest images.
    pub least: usize,
    /// Most images.
    pub most: usize,
    /// Channels.
    pub channels: usize,
    /// Height in pixels.
    pub height: usize,
    /// Width in pixels.
    pub width: usize,
}

impl GpuOptions {
    /// `NAME:NxCxHxW` for every profile, comma-separated, as TensorRT's options want shapes.
    #[cfg_attr(not(feature = "gpu"), allow(dead_code, reason = "asked for by TensorRT only"))]
    fn shapes(&self, input: &str, images: impl Fn(&Profile) -> usize) -> String {
        let shape = |p: &Profile| format!("{input}:{}x{}x{}x{}", images(p), p.channels, p.height, p.width);
        self.profiles.iter().map(shape).collect::<Vec<_>>().join(",")
    }
}

/// Registers the provider so that its failure is an error: ONNX Runtime would fall back to the CPU in silence.
#[cfg(feature = "gpu")]
pub(super) fn register(builder: SessionBuilder, provider: Provider, gpu: &GpuOptions) -> ort::Result<SessionBuilder> {
    let device = i32::from(gpu.device);
    let mut cuda = ort::ep::CUDA::default()
        .with_device_id(device)
        .with_tf32(gpu.tf32)
        .with_prefer_nhwc(gpu.prefer_nhwc)
        .with_fuse_conv_bias(gpu.fuse_conv_bias)
        .with_cuda_graph(gpu.cuda_graph && provider == Provider::Cuda)
        // a session for each batch size: powers of two would leave half of each arena empty
        .with_arena_extend_strategy(ort::ep::ArenaExtendStrategy::SameAsRequested)
        // timing all algorithms chose slower ones on an H100, and may choose others for each engine: other bits
        .with_conv_algorithm_search(ort::ep::cuda::ConvAlgorithmSearch::Heuristic);
    if let Some(bytes) = gpu.memory_limit {
        cuda = cuda.with_memory_limit(bytes);
    }
    let cuda = cuda.build().error_on_failure();
    if provider != Provider::TensorRt {
        return Ok(builder.with_execution_providers([cuda])?);
    }
    let mut tensorrt = ort::ep::TensorRT::default().with_device_id(device).with_fp16(gpu.tensorrt_fp16);
    if let Some(folder) = &gpu.tensorrt_cache {
        let unusable = |e| ort::Error::new(format!("TensorRT's cache `{}` can't be made: {e}", folder.display()));
        std::fs::create_dir_all(folder).map_err(unusable)?;
        let folder = folder.display();
        tensorrt = tensorrt.with_engine_cache(true).with_engine_cache_path(folder.to_string());
        tensorrt = tensorrt.with_timing_cache(true).with_timing_cache_path(folder.to_string());
    }
    if !gpu.profiles.is_empty() {
        let input = crate::model::INPUT;
        tensorrt = tensorrt
            .with_profile_min_shapes(gpu.shapes(input, |p| p.least))
            .with_profile_opt_shapes(gpu.shapes(input, |p| p.most))
            .with_profile_max_shapes(gpu.shapes(input, |p| p.most));
    }
    Ok(builder.with_execution_providers([tensorrt.build().error_on_failure(), cuda])?)
}

#[cfg(not(feature = "gpu"))]
pub(super) fn register(_: SessionBuilder, provider: Provider, _: &GpuOptions) -> ort::Result<SessionBuilder> {
    Err(ort::Error::new(format!("this nfold was built without {}", provider.name())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn profiles_are_told_as_tensorrt_wants_them() {
        let profile = |least, most| Profile { least, most, channels: 3, height: 192, width: 160 };
        let gpu = GpuOptions { profiles: vec![profile(1, 1), profile(4, 8)], ..GpuOptions::default() };
        assert_eq!(gpu.shapes("input", |p| p.least), "input:1x3x192x160,input:4x3x192x160");
        assert_eq!(gpu.shapes("input", |p| p.most), "input:1x3x192x160,input:8x3x192x160");
    }
}
