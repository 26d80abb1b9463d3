//! Operators of an integer network that are no convolutions, over a processor's instructions.

/// Over a processor's vector functions. Loops over bytes are plain Rust, for the compiler to make vectors of: nothing in them is
/// checked for overflow, so that it can in every build.
macro_rules! kernel {
    ($features:literal, $shape:expr) => {
        use super::{Gated, Output, Pool};

        /// Vectors of a step.
        const STEP: usize = $shape.panel;

        /// Values of a step.
        const VALUES: usize = STEP * LANES;

        /// Values that a table is looked up for while they are near.
        const NEAR: usize = 64 * VALUES;

        /// See [`reference::gated`].
        ///
        /// # Safety
        /// The band's slices are alike, the input has its slack.
        #[target_feature(enable = $features)]
        pub(super) unsafe fn gated(gated: &Gated, gate: &[u8], mut band: Band<'_>) {
            let values = band.values();
            let channels = gate.len();
            // once around, and a step more; the upper half is for the products of 16 bits that aren't there
            let around: Vec<i32> = (0..channels + VALUES)
                .map(|i| (i32::from(gate[i % channels]) - i32::from(gated.gate_zero)) & 0xffff)
                .collect();
            let factor = [gated.factor; VALUES];
            let zero = all(gated.zero.into());
            let (mut at, mut channel) = (0, 0);
            while at < values {
                let end = values.min(at + NEAR);
                let start = at;
                let target = Target::of(&gated.output, &mut band, 0);
                while at < end {
                    // SAFETY: what is read after the last value is slack; there are as many gates and factors as a step has
                    unsafe {
                        let sums: [Vector; STEP] = each(|n| {
                            let x = load_bytes(band.input.as_ptr().wrapping_add(at + n * LANES));
                            let gate = load(around.as_ptr().wrapping_add(channel + n * LANES).cast());
                            products(difference(x, zero), gate)
                        });
                        put(sums, factor.as_ptr(), at, (end - at).min(VALUES), &target);
                    }
                    at += VALUES;
                    channel += VALUES;
                    while channel >= channels {
                        channel -= channels;
                    }
                }
                at = end;
                if let Some((table, bytes)) = gated.output.table().zip(band.bytes.as_deref_mut()) {
                    look_up_in_place(table, &mut bytes[start..end]);
                }
            }
        }

        /// See [`reference::add`].
        ///
        /// # Safety
        /// The band's slices are alike.
        #[target_feature(enable = $features)]
        pub(super) unsafe fn add(output: &Output, terms: &[i16], mut band: Band<'_>) {
            let values = terms.len();
            let factor = [1.0; VALUES];
            let mut at = 0;
            while at < values {
                let end = values.min(at + NEAR);
                let start = at;
                let target = Target::of(output, &mut band, 0);
                while at < end {
                    let count = (end - at).min(VALUES);
                    // SAFETY: no more than what is left is read, there are as many factors as a step has
                    unsafe {
                        let sums: [Vector; STEP] = each(|n| {
                            let left = count.saturating_sub(n * LANES).min(LANES);
                            load_i16(terms.as_ptr().wrapping_add(at + n * LANES), left)
                        });
                        put(sums, factor.as_ptr(), at, count, &target);
                    }
                    at += VALUES;
                }
                at = end;
                if let Some((table, bytes)) = output.table().zip(band.bytes.as_deref_mut()) {
                    look_up_in_place(table, &mut bytes[start..end]);
                }
            }
        }

        /// See [`reference::totals`].
        #[target_feature(enable = $features)]
        pub(super) fn totals(x: &[u8], zero: u8, totals: &mut [i32]) {
            let channels = totals.len();
            let pixels = x.len() / channels.max(1);
            totals.fill(-(pixels as i32) * i32::from(zero));
            for (part, totals) in totals.chunks_mut(64).enumerate() {
                // so many pixels that sums stay within 16 bits
                for x in x.chunks(256 * channels) {
                    let mut sums = [0_u16; 64];
                    for pixel in x.chunks_exact(channels) {
                        let pixel = &pixel[part * 64..];
                        match pixel.first_chunk::<64>() {
                            Some(pixel) => {
                                sums.iter_mut().zip(pixel).for_each(|(sum, &x)| *sum = sum.wrapping_add(x.into()))
                            }
                            None => sums.iter_mut().zip(pixel).for_each(|(sum, &x)| *sum = sum.wrapping_add(x.into())),
                        }
                    }
                    totals.iter_mut().zip(sums).for_each(|(total, sum)| *total = total.wrapping_add(sum.into()));
                }
            }
        }

        /// See [`reference::pool`]; of at most 256 pixels.
        #[target_feature(enable = $features)]
        pub(super) fn pool(pool: &Pool, x: &[u8], y: &mut [u8]) {
            let channels = pool.channels;
            let columns: Vec<_> = (0..pool.out_size[1]).map(|column| pool.inside(1, column)).collect();
            for (row, line) in y.chunks_exact_mut((pool.out_size[1] * channels).max(1)).enumerate() {
                let rows = pool.inside(0, row);
                for (columns, pixel) in columns.iter().zip(line.chunks_exact_mut(channels)) {
                    let count = rows.len() * columns.len();
                    let counted =
                        if pool.counts_padding { pool.kernel[0] * pool.kernel[1] } else { count.max(1) } as f32;
                    let less = (count * usize::from(pool.zero)) as i32;
                    for (part, to) in pixel.chunks_mut(64).enumerate() {
                        let mut most = [0_u8; 64];
                        let mut sums = [0_u16; 64];
                        for y in rows.clone() {
                            for x in columns
                                .clone()
                                .filter_map(|column| x.get((y * pool.size[1] + column) * channels + part * 64..))
                            {
                                match (x.first_chunk::<64>(), pool.largest) {
                                    (Some(x), true) => {
                                        most.iter_mut().zip(x).for_each(|(most, &x)| *most = x.max(*most))
                                    }
                                    (Some(x), false) => {
                                        sums.iter_mut().zip(x).for_each(|(sum, &x)| *sum = sum.wrapping_add(x.into()))
                                    }
                                    (None, true) => most.iter_mut().zip(x).for_each(|(most, &x)| *most = x.max(*most)),
                                    (None, false) => {
                                        sums.iter_mut().zip(x).for_each(|(sum, &x)| *sum = sum.wrapping_add(x.into()))
                                    }
                                }
                            }
                        }
                        if pool.largest {
                            if count == 0 {
                                most = [pool.zero; 64];
                            }
                        } else {
                            // a quotient of so few that is no tie is further from one than it is rounded
                            for (most, sum) in most.iter_mut().zip(sums) {
                                let mean = (i32::from(sum).wrapping_sub(less) as f32 / counted).round_ties_even();
                                // SAFETY: an average is between the values, which are bytes
                                *most = unsafe { mean.to_int_unchecked::<i32>() }.wrapping_add(pool.zero.into()) as u8;
                            }
                        }
                        to.copy_from_slice(&most[..to.len()]);
                    }
                }
            }
        }

        /// See [`reference::quantise`]; of finite numbers.
        #[target_feature(enable = $features)]
        pub(super) fn quantise(image: &[f32], channels: usize, (scale, zero): (f32, u8), bytes: &mut [u8]) {
            let pixels = image.len() / channels;
            let mut part = [0_u8; 64];
            for first in (0..pixels).step_by(64) {
                let count = (pixels - first).min(64);
                for channel in 0..channels {
                    let values = &image[channel * pixels + first..channel * pixels + first + count];
                    for (byte, &x) in part.iter_mut().zip(values) {
                        let q = (x / scale).round_ties_even().max(-512.0).min(512.0);
                        // SAFETY: it is within these bounds
                        *byte = unsafe { q.to_int_unchecked::<i32>() }.wrapping_add(zero.into()).clamp(0, 255) as u8;
                    }
                    let to = bytes[first * channels + channel..].iter_mut().step_by(channels);
                    to.zip(&part[..count]).for_each(|(to, &byte)| *to = byte);
                }
            }
        }

        /// See [`reference::look_up`].
        #[target_feature(enable = $features)]
        pub(super) fn look_up(table: &Table, x: &[u8], y: &mut [u8]) {
            for (x, y) in x.chunks(NEAR).zip(y.chunks_mut(NEAR)) {
                let y = &mut y[..x.len()];
                y.copy_from_slice(x);
                look_up_in_place(table, y);
            }
        }
    };
}
pub(super) use kernel;
