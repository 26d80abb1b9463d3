//! A heat map laid over the image that a network saw, as PNG. The colours are those of cividis, which people with any colour vision tell
//! apart, and whose lightness rises with the value.

use super::Preprocessor;

/// Cividis (Nuñez, Anderton & Renslow, PLOS ONE 2018) at ten equal steps.
const CIVIDIS: [[u8; 3]; 10] = [
    [0x00, 0x22, 0x4e],
    [0x12, 0x35, 0x70],
    [0x3b, 0x49, 0x6c],
    [0x57, 0x5d, 0x6d],
    [0x70, 0x71, 0x73],
    [0x8a, 0x86, 0x78],
    [0xa5, 0x9c, 0x74],
    [0xc3, 0xb3, 0x69],
    [0xe1, 0xcc, 0x55],
    [0xfe, 0xe8, 0x38],
];
/// How much of a pixel is the image's lightness; the rest is the heat's colour.
const IMAGE: f64 = 0.45;

/// A map of values, row-major.
#[derive(Debug, Clone, PartialEq)]
pub struct Grid {
    /// Rows.
    pub height: usize,
    /// Columns.
    pub width: usize,
    /// `height × width` values.
    pub values: Vec<f32>,
}

impl Grid {
    /// Least and largest value.
    pub fn range(&self) -> (f32, f32) {
        let ends = (f32::INFINITY, f32::NEG_INFINITY);
        self.values.iter().fold(ends, |(least, most), &value| (least.min(value), most.max(value)))
    }

    /// The value at a point of the whole, each side from 0 to 1: between the centres of four cells.
    fn at(&self, y: f64, x: f64) -> f64 {
        let place = |share: f64, cells: usize| {
            let at = (share * cells as f64 - 0.5).clamp(0.0, (cells - 1) as f64);
            let first = at as usize;
            (first, (first + 1).min(cells - 1), at - first as f64)
        };
        let ((top, bottom, down), (left, right, across)) = (place(y, self.height), place(x, self.width));
        let value = |row: usize, column: usize| f64::from(self.values[row * self.width + column]);
        let upper = value(top, left) * (1.0 - across) + value(top, right) * across;
        let lower = value(bottom, left) * (1.0 - across) + value(bottom, right) * across;
        upper * (1.0 - down) + lower * down
    }
}

/// The colour of a share of the scale, from 0 to 1.
fn color(share: f64) -> [f64; 3] {
    let at = share.clamp(0.0, 1.0) * (CIVIDIS.len() - 1) as f64;
    let first = (at as usize).min(CIVIDIS.len() - 2);
    let between = at - first as f64;
    std::array::from_fn(|c| f64::from(CIVIDIS[first][c]) * (1.0 - between) + f64::from(CIVIDIS[first + 1][c]) * between)
}

/// The image of a network's input (`[channels, height, width]`, of one channel or of RGB) in grey under the grid's heat, as PNG of
/// that size: the least value dark blue, the largest yellow. The error says what does not fit.
pub fn overlay(preprocessor: &Preprocessor, input: &[f32], grid: &Grid) -> Result<Vec<u8>, String> {
    let (height, width) = (preprocessor.height(), preprocessor.width());
    if input.len() != preprocessor.tensor_len()
        || grid.values.len() != grid.height * grid.width
        || grid.values.is_empty()
    {
        return Err(format!("{} values of an image and {} of a grid", input.len(), grid.values.len()));
    }
    let light = preprocessor.lightness(input);
    let (least, most) = grid.range();
    let span = f64::from(most - least);
    let mut pixels = Vec::with_capacity(3 * height * width);
    for y in 0..height {
        for x in 0..width {
            let value = grid.at((y as f64 + 0.5) / height as f64, (x as f64 + 0.5) / width as f64);
            let share = if span > 0.0 { (value - f64::from(least)) / span } else { 0.0 };
            let grey = f64::from(light[y * width + x]);
            pixels.extend(color(share).map(|heat| (IMAGE * grey + (1.0 - IMAGE) * heat).round() as u8));
        }
    }
    let mut file = Vec::new();
    let mut encoder = png::Encoder::new(&mut file, width as u32, height as u32);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    encoder.set_compression(png::Compression::Fast);
    let written = encoder.write_header().and_then(|mut writer| {
        writer.write_image_data(&pixels)?;
        writer.finish()
    });
    written.map_err(|e| e.to_string())?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heat_lies_where_the_grid_has_it() {
        let grid = Grid { height: 2, width: 2, values: vec![0.0, 0.0, 0.0, 4.0] };
        assert_eq!((grid.at(0.0, 0.0), grid.at(1.0, 1.0), grid.at(0.5, 0.5)), (0.0, 4.0, 1.0));
        assert_eq!(grid.range(), (0.0, 4.0));
        let ends = [0.0, 1.0, 2.0].map(color);
        assert_eq!(ends, [[0.0, 34.0, 78.0], [254.0, 232.0, 56.0], [254.0, 232.0, 56.0]]);
        // lightness rises all the way
        let light = |share: f64| color(share).iter().zip([0.2126, 0.7152, 0.0722]).map(|(c, w)| c * w).sum::<f64>();
        assert!((0..100).all(|i| light(f64::from(i) / 100.0) < light(f64::from(i + 1) / 100.0)));
        // one value everywhere: no division by nothing
        let flat = Grid { height: 1, width: 3, values: vec![2.0; 3] };
        assert_eq!(flat.at(0.3, 0.9), 2.0);
    }
}
