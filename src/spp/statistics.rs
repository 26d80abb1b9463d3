//! Mean and variance per channel of feature maps that arrive in pieces, accumulated in double precision.

use std::thread;

/// Running moments per channel of `[N, C, H, W]` maps, over N, H and W.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct ChannelMoments {
    channels: Vec<Moments>,
}

/// Count, mean, sum of squared deviations and largest magnitude of numbers.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
struct Moments {
    count: f64,
    mean: f64,
    deviations: f64,
    max_abs: f64,
}

impl Moments {
    /// Two passes over values that fit the cache: exact, and vectorisable.
    fn of(values: &[f32]) -> Self {
        let count = values.len() as f64;
        let mut sums = [0.0f64; 8];
        let mut largest = [0.0f32; 8];
        let (blocks, rest) = values.as_chunks::<8>();
        for block in blocks {
            for lane in 0..8 {
                sums[lane] += f64::from(block[lane]);
                largest[lane] = largest[lane].max(block[lane].abs());
            }
        }
        for value in rest {
            sums[0] += f64::from(*value);
            largest[0] = largest[0].max(value.abs());
        }
        let mean = sums.iter().sum::<f64>() / count;
        let mut squares = [0.0f64; 8];
        for block in blocks {
            for lane in 0..8 {
                let deviation = f64::from(block[lane]) - mean;
                squares[lane] += deviation * deviation;
            }
        }
        for value in rest {
            squares[0] += (f64::from(*value) - mean) * (f64::from(*value) - mean);
        }
        let max_abs = f64::from(largest.into_iter().fold(0.0, f32::max));
        Self { count, mean, deviations: squares.iter().sum(), max_abs }
    }

    /// Combines the moments of two sets of numbers (Chan, Golub & LeVeque 1979).
    fn merge(&mut self, other: Self) {
        if self.count == 0.0 {
            *self = other;
            return;
        }
        let count = self.count + other.count;
        let shift = other.mean - self.mean;
        self.mean += shift * other.count / count;
        self.deviations += other.deviations + shift * shift * self.count * other.count / count;
        self.max_abs = self.max_abs.max(other.max_abs);
        self.count = count;
    }
}

impl ChannelMoments {
    /// Adds maps `[images, chs, height, width]`, row-major. The first call sets the number of channels.
    ///
    /// # Panics
    /// If `data` is not as long as `shape` says, or the number of channels changes: both are mistakes of the caller.
    pub fn add(&mut self, shape: [usize; 4], data: &[f32]) {
        let [images, chs, height, width] = shape;
        assert_eq!(data.len(), shape.iter().product::<usize>(), "data as long as its shape {shape:?}");
        if self.channels.is_empty() {
            self.channels = vec![Moments::default(); chs];
        }
        assert_eq!(self.channels.len(), chs, "the same channels each time");
        if chs == 0 {
            return;
        }
        let plane = height * width;
        let threads = thread::available_parallelism().map_or(1, usize::from);
        let share = chs.div_ceil(threads);
        let work = |first: usize, channels: &mut [Moments]| {
            for image in 0..images {
                for (c, moments) in channels.iter_mut().enumerate() {
                    let from = (image * chs + first + c) * plane;
                    moments.merge(Moments::of(&data[from..from + plane]));
                }
            }
        };
        // threads cost more than they save on small maps
        if data.len() < 1 << 16 {
            return work(0, &mut self.channels);
        }
        thread::scope(|scope| {
            for (i, channels) in self.channels.chunks_mut(share).enumerate() {
                scope.spawn(move || work(i * share, channels));
            }
        });
    }

    /// Mean per channel.
    pub fn means(&self) -> Vec<f64> {
        self.channels.iter().map(|m| m.mean).collect()
    }

    /// Biased variance per channel.
    pub fn variances(&self) -> Vec<f64> {
        self.channels.iter().map(|m| m.deviations / m.count).collect()
    }

    /// Average channel squared mean: the squared mean of each channel, averaged over channels.
    pub fn squared_mean(&self) -> f64 {
        self.average(|m| m.mean * m.mean)
    }

    /// Average channel variance: the biased variance of each channel, averaged over channels.
    pub fn variance(&self) -> f64 {
        self.average(|m| m.deviations / m.count)
    }

    /// Largest magnitude of any value. Ignores NaN, which the mean shows.
    pub fn max_abs(&self) -> f64 {
        self.channels.iter().map(|m| m.max_abs).fold(0.0, f64::max)
    }

    fn average(&self, of: impl Fn(&Moments) -> f64) -> f64 {
        self.channels.iter().map(of).sum::<f64>() / self.channels.len() as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Pieces of any size give the same result as one pass in double precision, even far from zero.
    #[test]
    fn pieces_add_up() {
        let shape = [6usize, 5, 7, 9];
        let value = |i: usize| 1e4 + ((i * 7919) % 1013) as f32 / 100.0;
        let data: Vec<f32> = (0..shape.iter().product()).map(value).collect();
        let mut pieces = ChannelMoments::default();
        let image = data.len() / 6;
        for (images, from) in [(1, 0), (3, 1), (2, 4)] {
            pieces.add([images, 5, 7, 9], &data[from * image..(from + images) * image]);
        }
        for c in 0..5 {
            let plane = 63;
            let of_channel: Vec<f64> = (0..6)
                .flat_map(|n| data[(n * 5 + c) * plane..(n * 5 + c + 1) * plane].iter().map(|v| f64::from(*v)))
                .collect();
            let n = of_channel.len() as f64;
            let mean = of_channel.iter().sum::<f64>() / n;
            let variance = of_channel.iter().map(|v| (v - mean) * (v - mean)).sum::<f64>() / n;
            assert!((pieces.means()[c] / mean - 1.0).abs() < 1e-13);
            assert!((pieces.variances()[c] / variance - 1.0).abs() < 1e-9);
        }
        assert_eq!(pieces.max_abs(), f64::from(data.iter().copied().fold(0.0, f32::max)));
    }

    #[test]
    fn threads_change_nothing() {
        let shape = [2usize, 33, 40, 40];
        let data: Vec<f32> = (0..shape.iter().product::<usize>()).map(|i| ((i * 31) % 977) as f32 - 400.0).collect();
        let (mut whole, mut pieces) = (ChannelMoments::default(), ChannelMoments::default());
        whole.add(shape, &data);
        data.chunks(33 * 1600).for_each(|image| pieces.add([1, 33, 40, 40], image));
        assert_eq!(whole, pieces);
    }

    #[test]
    fn faults_show() {
        let mut moments = ChannelMoments::default();
        moments.add([1, 2, 1, 3], &[1.0, f32::NAN, 2.0, 0.0, 0.0, 0.0]);
        assert!(moments.variance().is_nan() && moments.squared_mean().is_nan());
        let mut moments = ChannelMoments::default();
        moments.add([1, 1, 1, 2], &[f32::INFINITY, -3.0]);
        assert!(!moments.variance().is_finite() && moments.max_abs().is_infinite());
    }
}
