//! Convolutions in groups of at most a vector of channels, each lane with units of its own group.

/// Over a processor's vector functions: tiles of so many pixels of a row, widest first, one of a single pixel last.
macro_rules! kernel {
    ($features:literal, $shape:expr, [$($pixels:literal),*]) => {
        /// # Safety
        /// The source has all that so many rows are made of, the target has room for them.
        #[target_feature(enable = $features)]
        unsafe fn narrow(packed: &Packed, rows: Rows, source: &[u8], count: usize, target: &Target) {
            let conv = &packed.conv;
            const SMALL: usize = LANES * 4 / $shape.unit;
            // SAFETY: the caller's
            unsafe {
                match (packed.plan, conv.shape.stride[1]) {
                    (Plan::Depthwise, 1) => narrow_rows::<LANES, { LANES * 4 }, 1>(packed, rows, source, count, target),
                    (Plan::Depthwise, _) => narrow_rows::<LANES, { LANES * 4 }, 2>(packed, rows, source, count, target),
                    (Plan::Merged(1), 1) => narrow_rows::<1, SMALL, 1>(packed, rows, source, count, target),
                    (Plan::Merged(1), _) => narrow_rows::<1, SMALL, 2>(packed, rows, source, count, target),
                    (Plan::Merged(2), 1) => narrow_rows::<2, SMALL, 1>(packed, rows, source, count, target),
                    (Plan::Merged(2), _) => narrow_rows::<2, SMALL, 2>(packed, rows, source, count, target),
                    (Plan::Merged(4), 1) => narrow_rows::<4, SMALL, 1>(packed, rows, source, count, target),
                    (Plan::Merged(4), _) => narrow_rows::<4, SMALL, 2>(packed, rows, source, count, target),
                    _ => unreachable!("a plan that there is no kernel for"),
                }
            }
        }

        /// `M` units a step, of pixels of so many bytes.
        ///
        /// # Safety
        /// As above.
        #[target_feature(enable = $features)]
        unsafe fn narrow_rows<const M: usize, const PIXEL: usize, const S: usize>(
            packed: &Packed,
            rows: Rows,
            source: &[u8],
            count: usize,
            target: &Target,
        ) {
            const TILES: &[usize] = &[$($pixels),*];
            let (conv, width) = (&packed.conv, packed.conv.shape.out_size[1]);
            let units = conv.shape.kernel[1] * (PIXEL / (M * 4));
            // as few pixels twice as can be, then as wide as can be
            let cost = |&&pixels: &&usize| width.div_ceil(pixels) * (pixels + 2);
            let &pixels = TILES.iter().filter(|&&pixels| pixels <= width).min_by_key(cost).unwrap_or(&1);
            let order = order_of::<M>();
            for (block, source) in source.chunks_exact(rows.plane).take(conv.shape.filters.div_ceil(LANES)).enumerate() {
                let panel = Panel {
                    rows,
                    units,
                    weight: packed.weight.all()[block * rows.height * units * LANES * 4..].as_ptr(),
                    bias: packed.bias[block * LANES..].as_ptr(),
                    factor: packed.factor[block * LANES..].as_ptr(),
                    count: (conv.shape.filters - block * LANES).min(LANES),
                    target,
                };
                for y in 0..count {
                    let row = source.as_ptr().wrapping_add(y * rows.step * rows.pitch);
                    for piece in 0..width.div_ceil(pixels) {
                        let x = (piece * pixels).min(width - pixels);
                        let place = row.wrapping_add(x * S * PIXEL);
                        let at = (y * width + x) * conv.shape.filters + block * LANES;
                        // SAFETY: the caller's
                        unsafe {
                            match pixels {
                                $($pixels => narrow_tile::<$pixels, M, PIXEL, S>(&panel, place, order, at, conv.shape.filters),)*
                                _ => {}
                            }
                        }
                    }
                }
            }
        }

        /// `P` pixels of a vector of channels.
        ///
        /// # Safety
        /// As above.
        #[target_feature(enable = $features)]
        #[inline]
        unsafe fn narrow_tile<const P: usize, const M: usize, const PIXEL: usize, const S: usize>(
            panel: &Panel<'_>,
            mut place: *const u8,
            order: Order,
            at: usize,
            filters: usize,
        ) {
            // SAFETY: the caller's
            let mut sums = [unsafe { load(panel.bias.cast()) }; P];
            let mut weight = panel.weight;
            for _ in 0..panel.rows.height {
                let mut unit = 0;
                while unit < panel.units * M * 4 {
                    // SAFETY: `weight` goes through as many vectors as the panel has, `place` through as many units
                    let tap = unsafe { load(weight) };
                    let from = place.wrapping_add(unit);
                    for p in 0..P {
                        // SAFETY: as above
                        sums[p] = dot(sums[p], unsafe { spread::<M>(from.wrapping_add(p * S * PIXEL)) }, tap);
                    }
                    weight = weight.wrapping_add(LANES * 4);
                    unit += M * 4;
                }
                place = place.wrapping_add(panel.rows.pitch);
            }
            if M > 1 && M < LANES {
                sums = each(|p| permuted(sums[p], order));
            }
            // SAFETY: the caller's
            unsafe { put_pixels(sums, panel.factor, at, filters, panel.count, panel.target) };
        }

        /// The lane that has a channel.
        #[target_feature(enable = $features)]
        fn order_of<const M: usize>() -> Order {
            let mut lanes = [0; LANES];
            for lane in 0..LANES {
                lanes[lane % M * (LANES / M) + lane / M] = lane as i32;
            }
            order(&lanes)
        }
    };
}
pub(super) use kernel;
