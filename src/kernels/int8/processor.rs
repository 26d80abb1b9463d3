//! Which integer kernels run.

/// Whose instructions a kernel uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Processor {
    /// Any: the reference.
    Portable,
    /// Products of 16 bits.
    Avx2,
    /// Products of four bytes, 8 lanes.
    AvxVnni,
    /// Products of four bytes, 16 lanes.
    Avx512Vnni,
    /// As before, and tiles for most.
    Amx,
}

/// Sizes of a processor's vectors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Shape {
    /// Sums of a vector.
    pub lanes: usize,
    /// Channels of a unit.
    pub unit: usize,
    /// Vectors of a panel, at most.
    pub panel: usize,
    /// Whether it has a matrix unit.
    pub tiles: bool,
}

pub(super) const AVX2: Shape = Shape { lanes: 8, unit: 2, panel: 2, tiles: false };
pub(super) const AVX_VNNI: Shape = Shape { lanes: 8, unit: 4, panel: 2, tiles: false };
pub(super) const AVX512: Shape = Shape { lanes: 16, unit: 4, panel: 4, tiles: false };

impl Processor {
    /// All, best first.
    pub const ALL: [Self; 5] = [Self::Amx, Self::Avx512Vnni, Self::AvxVnni, Self::Avx2, Self::Portable];

    /// The best of those that are here.
    pub fn here() -> Self {
        Self::ALL.into_iter().find(|processor| processor.is_here()).unwrap_or(Self::Portable)
    }

    /// Whether this processor has the instructions.
    pub fn is_here(self) -> bool {
        match self {
            Self::Portable => true,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => std::arch::is_x86_feature_detected!("avx2"),
            #[cfg(target_arch = "x86_64")]
            Self::AvxVnni => Self::Avx2.is_here() && std::arch::is_x86_feature_detected!("avxvnni"),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Vnni => {
                std::arch::is_x86_feature_detected!("avx512vnni")
                    && std::arch::is_x86_feature_detected!("avx512bw")
                    && std::arch::is_x86_feature_detected!("avx512vl")
            }
            #[cfg(target_arch = "x86_64")]
            Self::Amx => Self::Avx512Vnni.is_here() && super::tiles::are_permitted(),
            #[cfg(not(target_arch = "x86_64"))]
            _ => false,
        }
    }

    /// Sizes of its vectors; none of the reference.
    pub(super) fn shape(self) -> Option<Shape> {
        match self {
            Self::Portable => None,
            Self::Avx2 => Some(AVX2),
            Self::AvxVnni => Some(AVX_VNNI),
            Self::Avx512Vnni => Some(AVX512),
            Self::Amx => Some(Shape { tiles: true, ..AVX512 }),
        }
    }
}
