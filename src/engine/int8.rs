//! A network of integers as an operator of ONNX Runtime: the whole network is one. ONNX Runtime gives it threads; all else it
//! does itself.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use ort::operator::{ComputeContext, Kernel, KernelContext, Operator, OperatorInput, OperatorOutput};
use ort::value::TensorElementType;

use crate::int8::NETWORK;
use crate::int8::network::{Answers, Memory, Network, one_by_one};

/// The operator over a network, for a session with so many threads.
pub struct NetworkOperator {
    /// The network, which sessions share.
    pub network: Arc<Network>,
    /// Threads that share one image's work.
    pub threads: usize,
}

/// A session's operator.
pub struct NetworkKernel {
    network: Arc<Network>,
    threads: usize,
    /// Memory of images that ran.
    memories: Mutex<Vec<Memory>>,
}

impl Operator for NetworkOperator {
    type Kernel<'a> = NetworkKernel;

    fn name(&self) -> &str {
        NETWORK
    }

    fn inputs(&self) -> impl IntoIterator<Item = OperatorInput> {
        [OperatorInput::required(TensorElementType::Float32)]
    }

    fn outputs(&self) -> impl IntoIterator<Item = OperatorOutput> {
        let optional = || OperatorOutput::optional(TensorElementType::Float32);
        [OperatorOutput::required(TensorElementType::Float32), optional(), optional()]
    }

    fn create_kernel<'a>(&self, _: &KernelContext<'a>) -> ort::Result<NetworkKernel> {
        let (network, threads) = (self.network.clone(), self.threads.max(1));
        Ok(NetworkKernel { network, threads, memories: Mutex::default() })
    }
}

fn refused(what: &str) -> ort::Error {
    ort::Error::new(format!("{NETWORK}: {what}"))
}

/// Does a piece of work. ONNX Runtime calls it, through which no panic may go: one is a failed run.
fn guarded(failed: &AtomicBool, work: impl FnOnce()) {
    if catch_unwind(AssertUnwindSafe(work)).is_err() {
        failed.store(true, Ordering::Relaxed);
    }
}

fn finished(failed: &AtomicBool) -> ort::Result<()> {
    if failed.load(Ordering::Relaxed) { Err(refused("a bug in nfold: a step panicked")) } else { Ok(()) }
}

impl NetworkKernel {
    fn memory(&self) -> Memory {
        self.memories.lock().unwrap_or_else(PoisonError::into_inner).pop().unwrap_or_default()
    }

    fn give_back(&self, memory: Memory) {
        self.memories.lock().unwrap_or_else(PoisonError::into_inner).push(memory);
    }
}

impl Kernel for NetworkKernel {
    fn compute(&mut self, context: &ComputeContext) -> ort::Result<()> {
        let network = &*self.network;
        let x = context.input(0)?.ok_or_else(|| refused("an input is missing"))?;
        let (dims, x) = x.try_extract_tensor::<f32>()?;
        let sides: Vec<usize> = dims.iter().map(|&side| usize::try_from(side).unwrap_or(0)).collect();
        let image: usize = network.shape.iter().product();
        let images = match sides.as_slice() {
            [images, shape @ ..] if *shape == network.shape && x.len() == images.saturating_mul(image) => *images,
            _ => return Err(refused("an image of another size")),
        };
        let dims = |sides: &[usize]| -> Vec<i64> {
            std::iter::once(images).chain(sides.iter().copied()).map(|side| side as i64).collect()
        };
        let mut logits = context.output(0, dims(&[network.classes]))?.ok_or_else(|| refused("no output"))?;
        let (_, logits) = logits.try_extract_tensor_mut::<f32>()?;
        let mut features = match network.features {
            Some(width) => context.output(1, dims(&[width]))?,
            None => None,
        };
        let features = features.as_mut().map(|features| features.try_extract_tensor_mut::<f32>()).transpose()?;
        let mut map = match network.map {
            Some(map) => context.output(2, dims(&map))?,
            None => None,
        };
        let map = map.as_mut().map(|map| map.try_extract_tensor_mut::<f32>()).transpose()?;
        if images == 0 {
            return Ok(());
        }
        let mut features = features.map(|(_, values)| values.chunks_exact_mut(network.features.unwrap_or(1).max(1)));
        let mut map =
            map.map(|(_, values)| values.chunks_exact_mut(network.map.map_or(1, |m| m.iter().product()).max(1)));
        let answers = logits.chunks_exact_mut(network.classes.max(1)).map(|logits| Answers {
            logits,
            features: features.as_mut().and_then(Iterator::next),
            map: map.as_mut().and_then(Iterator::next),
        });
        let failed = AtomicBool::new(false);
        let work: Vec<_> = x.chunks_exact(image).zip(answers).collect();
        if images < self.threads || self.threads == 1 {
            // all threads on one image after the other
            let workers = |count: usize, piece: &(dyn Fn(usize) + Send + Sync)| {
                if context.par_for(count, count, |i| guarded(&failed, || piece(i))).is_err() {
                    one_by_one(count, piece);
                }
            };
            let mut memory = self.memory();
            for (image, answers) in work {
                guarded(&failed, || network.run(image, &mut memory, answers, (self.threads, &workers), &mut |_| {}));
            }
            self.give_back(memory);
            return finished(&failed);
        }
        let work: Vec<_> = work.into_iter().map(|image| Mutex::new(Some(image))).collect();
        context.par_for(images, images, |i| {
            if let Some((image, answers)) = work.get(i).and_then(|work| work.lock().ok()?.take()) {
                let mut memory = self.memory();
                guarded(&failed, || network.run(image, &mut memory, answers, (1, &one_by_one), &mut |_| {}));
                self.give_back(memory);
            }
        })?;
        finished(&failed)
    }
}
