//! Which layers hurt: the noise of maps, and what is gained where a layer stays in single precision.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::{COMPARED, EXPOSED, IMAGES, Quantiser, QuantisingError, RANKED, Stage, apart};
use crate::engine::{MapBackend, MapView};
use crate::int8::lowering;
use crate::int8::network::{Answers, Memory, one_by_one};
use crate::model::INPUT;

/// Layers that a report names.
const NAMED: usize = 5;

/// What is gained where a layer alone stays in single precision, beside those that do already.
#[derive(Debug, Clone, PartialEq)]
pub struct Gain {
    /// The layer.
    pub layer: String,
    /// Share of the squared error of logits that goes away.
    pub share: f64,
}

/// How far a map is from the same map in single precision.
pub(super) struct Noise {
    /// The layer that makes it, and the map.
    layer: String,
    /// Share of the signal's power.
    share: f64,
    /// What is more than the maps have that it is made of.
    added: f64,
}

/// A map's noise and signal.
#[derive(Default)]
struct Power {
    layer: String,
    noise: f64,
    signal: f64,
}

impl Quantiser<'_, '_> {
    /// Layers by what is gained where they stay in single precision, the most first. Those that gain nothing aren't among them.
    pub(super) fn gains(
        &mut self,
        onnx: &[u8],
        ranges: &BTreeMap<String, (f32, f32)>,
    ) -> Result<Vec<Gain>, QuantisingError> {
        let images: Vec<usize> = self.measured.iter().copied().take(RANKED).collect();
        let error = |logits: &[Vec<f32>], of: &Self| apart(logits, &of.in_single[..logits.len()]);
        let logits = self.answers(onnx, &images, ("answers that layers are ranked by", IMAGES))?;
        let all = error(&logits, self);
        let layers: Vec<String> =
            self.plan.layers().filter(|layer| !self.kept.contains(*layer)).map(str::to_string).collect();
        let mut gains = Vec::new();
        for (done, layer) in layers.iter().enumerate() {
            let mut kept: BTreeSet<String> = self.kept.clone();
            kept.insert(layer.clone());
            self.plan.keep(&kept);
            let onnx = self.plan.quantise(ranges)?;
            let mut session = super::open(onnx, &self.engine)?;
            let logits = self.logits(&mut session, &images, None)?;
            let stage = Stage { what: "each layer alone in single precision", of: layers.len(), unit: "layers" };
            (self.calibration.progress)(&stage, done);
            let share = 1.0 - error(&logits, self) / all.max(f64::MIN_POSITIVE);
            if share > 0.0 {
                gains.push(Gain { layer: layer.clone(), share });
            }
        }
        self.plan.keep(&self.kept);
        gains.sort_by(|a, b| b.share.total_cmp(&a.share));
        Ok(gains)
    }

    /// How far each map of a network of integers is from the same map in single precision, on a few images.
    pub(super) fn noise(&mut self, onnx: &[u8]) -> Result<Vec<Noise>, QuantisingError> {
        let network = lowering::lower(onnx)?;
        let mut exposed = MapBackend::open(&self.plan.exposed(), EXPOSED, &self.engine)?;
        let mut powers: BTreeMap<String, Power> = BTreeMap::new();
        let mut memory = Memory::default();
        for at in 0..COMPARED.min(self.measured.len()) {
            let image = self.image(self.measured[at])?;
            let mut maps: HashMap<String, Vec<f32>> = HashMap::new();
            let [channels, height, width] = self.shape;
            exposed.run(&[MapView { name: INPUT, shape: [1, channels, height, width], data: &image }], |map| {
                maps.insert(map.name.into(), map.data.to_vec());
            })?;
            let mut logits = vec![0.0; network.classes];
            let mut features = network.features.map(|width| vec![0.0; width]);
            let mut map = network.map.map(|map| vec![0.0; map.iter().product()]);
            let answers = Answers { logits: &mut logits, features: features.as_deref_mut(), map: map.as_deref_mut() };
            network.run(&image, &mut memory, answers, (1, &one_by_one), &mut |seen| {
                let Some(expected) = maps.get(seen.map) else { return };
                let [channels, height, width] = seen.size;
                let power = powers.entry(seen.map.into()).or_default();
                power.layer = format!("{} ({})", seen.layer, seen.map);
                for (pixel, bytes) in seen.bytes.chunks_exact(channels).enumerate() {
                    for (channel, &byte) in bytes.iter().enumerate() {
                        let expected = expected.get(channel * height * width + pixel).map_or(0.0, |&x| f64::from(x));
                        power.noise += (seen.scale.value(byte) - expected).powi(2);
                        power.signal += expected.powi(2);
                    }
                }
            });
        }
        let share = |power: &Power| power.noise / power.signal.max(f64::MIN_POSITIVE);
        let noise = |(map, power): (&String, &Power)| {
            let sources = self.plan.sources(map, |map| powers.contains_key(map));
            let before = sources.into_iter().filter_map(|map| powers.get(map)).map(share).fold(0.0, f64::max);
            Noise { layer: power.layer.clone(), share: share(power), added: share(power) - before }
        };
        Ok(powers.iter().map(noise).collect())
    }
}

/// Maps that have more noise than those that they are made of, those with the most first: a line each.
pub(super) fn report(noise: &[Noise]) -> Vec<String> {
    let mut noise: Vec<&Noise> = noise.iter().filter(|noise| noise.added > 0.0).collect();
    noise.sort_by(|a, b| b.added.total_cmp(&a.added));
    let line =
        |Noise { layer, share, added }: &Noise| format!("{:8.3} % of {:.3} %  {layer}", 100.0 * added, 100.0 * share);
    noise.into_iter().take(NAMED).map(line).collect()
}
