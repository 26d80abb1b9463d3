//! Sizes of maps.

use super::{Lowering, uncovered};
use crate::int8::Int8Error;
use crate::int8::operators::{Kind, Operator, Window};

impl<'a> Lowering<'a> {
    /// Channels, height and width of what an operator makes.
    pub(super) fn size_after(&self, operator: &'a Operator) -> Result<[usize; 3], Int8Error> {
        let unknown = || Int8Error::Unreadable(format!("`{}` reads what nothing makes", operator.name));
        let inputs: Vec<[usize; 3]> = operator
            .inputs
            .iter()
            .map(|edge| self.sizes.get(edge.map.as_str()).copied().ok_or_else(unknown))
            .collect::<Result<_, _>>()?;
        let &[channels, height, width] = inputs.first().ok_or_else(unknown)?;
        let after = |window: &Window| {
            window.out_size([height, width]).ok_or_else(|| uncovered(operator, "its window is larger than the map"))
        };
        let filters = |weight: &str| {
            let weight = self.integers(weight).map_or(weight, |[s8, _]| s8);
            let filters = self.constants.dims(weight).and_then(|dims| dims.first().copied());
            filters.ok_or_else(|| uncovered(operator, "its weights aren't there"))
        };
        Ok(match &operator.kind {
            Kind::Conv { window, weight, .. } => {
                let [height, width] = after(window)?;
                [filters(weight)?, height, width]
            }
            Kind::MaxPool(window) | Kind::AveragePool(window, _) => {
                let [height, width] = after(window)?;
                [channels, height, width]
            }
            Kind::Add if inputs.iter().any(|size| *size != [channels, height, width]) => {
                return Err(uncovered(operator, "its terms differ in size"));
            }
            Kind::Gate if inputs.get(1) != Some(&[channels, 1, 1]) => {
                return Err(uncovered(operator, "its factor isn't one pixel"));
            }
            Kind::ChannelConv { .. } if height * width != 1 => {
                return Err(uncovered(operator, "it is of more than one pixel"));
            }
            Kind::GlobalMean => [channels, 1, 1],
            Kind::Flatten if height * width != 1 => return Err(uncovered(operator, "it is of more than one pixel")),
            Kind::Linear { .. } if height * width != 1 => {
                return Err(uncovered(operator, "it is of more than one pixel"));
            }
            Kind::Linear { weight, .. } => [filters(weight)?, 1, 1],
            _ => [channels, height, width],
        })
    }
}
