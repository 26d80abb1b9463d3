//! Convolutions whose lanes are channels of the output.

/// Over a processor's vector functions: tiles of so many vectors of channels and so many pixels.
macro_rules! kernel {
    ($features:literal, $shape:expr, [$(($vectors:literal, $pixels:literal)),*]) => {
        use super::packed::{Packed, Plan, panels};
        use super::rows::{Rows, Source};
        use super::scratch::Scratch;
        use super::{Band, Conv};

        /// Computes rows of the output.
        ///
        /// # Safety
        /// The band fits, and the convolution is packed for this processor.
        #[target_feature(enable = $features)]
        pub(super) unsafe fn convolve(packed: &Packed, mut band: Band<'_>, scratch: &mut Scratch) {
            let (conv, plan) = (&packed.conv, packed.plan);
            let line = conv.shape.out_size[1] * conv.shape.filters;
            let source = Source::of(packed, $shape);
            let (at_a_time, is_there) = (source.at_a_time(), source.is_there());
            let mut first = band.rows.start;
            while first < band.rows.end {
                let count = at_a_time.min(band.rows.end - first);
                let start = (first - band.rows.start) * line;
                let target = Target::of(&conv.output, &mut band, start);
                let (rows, source) = if is_there {
                    let rows = source.direct();
                    (rows, &band.input[first * conv.shape.stride[0] * rows.pitch..])
                } else {
                    let rows = source.copied(count);
                    let memory = scratch.rows.bytes(rows.plane * source.planes() + super::SLACK);
                    source.copy(rows, first, band.input, memory);
                    (rows, &*memory)
                };
                // SAFETY: the source has all that these rows are made of, and the target has room for them
                unsafe {
                    match plan {
                        Plan::Dense => dense(packed, rows, source, count, &target),
                        _ => narrow(packed, rows, source, count, &target),
                    }
                }
                if let Some((table, bytes)) = conv.output.table().zip(band.bytes.as_deref_mut()) {
                    look_up_in_place(table, &mut bytes[start..start + count * line]);
                }
                first += count;
            }
        }

        /// What the tiles of a panel have in common.
        struct Panel<'a> {
            rows: Rows,
            /// Units of a row of the kernel.
            units: usize,
            weight: *const u8,
            bias: *const i32,
            factor: *const f32,
            /// Channels of it.
            count: usize,
            target: &'a Target,
        }

        /// # Safety
        /// The source has all that so many rows are made of, the target has room for them.
        #[target_feature(enable = $features)]
        unsafe fn dense(packed: &Packed, rows: Rows, source: &[u8], count: usize, target: &Target) {
            let conv = &packed.conv;
            let units = (conv.shape.kernel[1] * conv.shape.depth()).div_ceil($shape.unit);
            let filters = conv.shape.filters / conv.shape.groups;
            let mut weight = packed.weight.all().as_ptr();
            let mut lane = 0;
            for group in 0..conv.shape.groups {
                let source = source.as_ptr().wrapping_add(group * rows.plane);
                let mut done = 0;
                for vectors in panels(filters.div_ceil(LANES), $shape.panel) {
                    let panel = Panel {
                        rows,
                        units,
                        weight,
                        bias: packed.bias[lane..].as_ptr(),
                        factor: packed.factor[lane..].as_ptr(),
                        count: (filters - done).min(vectors * LANES),
                        target,
                    };
                    let first = group * filters + done;
                    // SAFETY: the panel's weights, biases and factors are as many as it has lanes
                    unsafe {
                        match vectors {
                            // a gate's one pixel
                            $($vectors if count * conv.shape.out_size[1] == 1 => {
                                dense_panel::<1, $vectors>(&panel, conv, source, count, first);
                            })*
                            $($vectors => dense_panel::<$pixels, $vectors>(&panel, conv, source, count, first),)*
                            _ => unreachable!("a panel of a size that there is no tile for"),
                        }
                    }
                    weight = weight.wrapping_add(rows.height * units * vectors * LANES * 4);
                    lane += vectors * LANES;
                    done += vectors * LANES;
                }
            }
        }

        /// # Safety
        /// As above.
        #[target_feature(enable = $features)]
        unsafe fn dense_panel<const P: usize, const N: usize>(
            panel: &Panel<'_>,
            conv: &Conv,
            source: *const u8,
            count: usize,
            first: usize,
        ) {
            let width = conv.shape.out_size[1];
            let pixels = count * width;
            let (step, pixel) = (panel.rows.step * panel.rows.pitch, conv.shape.stride[1] * panel.rows.pixel);
            let (mut row, mut column) = (source, 0);
            let mut done = 0;
            while done < pixels {
                let now = P.min(pixels - done);
                let mut places = [row; P];
                for (i, place) in places.iter_mut().enumerate() {
                    // what is missing at the end is the last pixel over again
                    *place = row.wrapping_add(column * pixel);
                    if i + 1 < now {
                        column += 1;
                        if column == width {
                            (row, column) = (row.wrapping_add(step), 0);
                        }
                    }
                }
                column += 1;
                if column == width {
                    (row, column) = (row.wrapping_add(step), 0);
                }
                // SAFETY: as above
                unsafe { dense_tile::<P, N>(panel, places, now, done * conv.shape.filters + first, conv.shape.filters) };
                done += now;
            }
        }

        /// `P` pixels of `N` vectors of channels.
        ///
        /// # Safety
        /// As above.
        #[target_feature(enable = $features)]
        #[inline]
        unsafe fn dense_tile<const P: usize, const N: usize>(
            panel: &Panel<'_>,
            mut places: [*const u8; P],
            count: usize,
            at: usize,
            filters: usize,
        ) {
            // SAFETY: the caller's
            let bias: [Vector; N] = each(|n| unsafe { load(panel.bias.wrapping_add(n * LANES).cast()) });
            let mut sums = [bias; P];
            let mut weight = panel.weight;
            for _ in 0..panel.rows.height {
                let mut unit = 0;
                while unit < panel.units * 4 {
                    // SAFETY: `weight` goes through as many vectors as the panel has, `places` through as many units
                    let taps: [Vector; N] = each(|n| unsafe { load(weight.wrapping_add(n * LANES * 4)) });
                    for p in 0..P {
                        // SAFETY: as above
                        let x = unsafe { spread::<1>(places[p].wrapping_add(unit)) };
                        for n in 0..N {
                            sums[p][n] = dot(sums[p][n], x, taps[n]);
                        }
                    }
                    weight = weight.wrapping_add(N * LANES * 4);
                    unit += 4;
                }
                for place in &mut places {
                    *place = place.wrapping_add(panel.rows.pitch);
                }
            }
            for p in 0..P {
                if p < count {
                    // SAFETY: the caller's
                    unsafe { put(sums[p], panel.factor, at + p * filters, panel.count, panel.target) };
                }
            }
        }
    };
}
pub(super) use kernel;
