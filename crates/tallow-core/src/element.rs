//! Numbers as memory holds them: little-endian elements of every dtype, from f64 and back.
//! Invariant: an f64 becomes the nearest element, ties to even; integers truncate and saturate.
//! Absent on purpose: strides; and anything fast (this is what references and tests are made with).
use crate::types::DType;
use half::{bf16, f16};

/// The nearest bfloat16. (`half::bf16::from_f64` leaves the lower 32 bits out of account, and so takes numbers
/// just beside the middle of two for the middle.)
pub fn to_bf16(v: f64) -> bf16 {
    bf16::from_f64(sticky(v))
}

/// The nearest half-precision number; see [`to_bf16`].
pub fn to_f16(v: f64) -> f16 {
    f16::from_f64(sticky(v))
}

/// `v` with what its lower 32 bits say gathered in the bit above them ("round to odd").
fn sticky(v: f64) -> f64 {
    let bits = v.to_bits();
    f64::from_bits(bits & !0xffff_ffff | u64::from(bits as u32 != 0) << 32)
}

impl DType {
    /// Elements of this type, little-endian, one behind the other.
    pub fn encode(self, values: &[f64]) -> Vec<u8> {
        let mut out = Vec::with_capacity(values.len() * self.bytes());
        for v in values {
            match self {
                DType::F32 => out.extend((*v as f32).to_le_bytes()),
                DType::BF16 => out.extend(to_bf16(*v).to_le_bytes()),
                DType::F16 => out.extend(to_f16(*v).to_le_bytes()),
                DType::I32 => out.extend((*v as i32).to_le_bytes()),
                DType::U32 => out.extend((*v as u32).to_le_bytes()),
                DType::U8 => out.push(*v as u8),
            }
        }
        out
    }
    /// The values of whole elements in `bytes`.
    pub fn decode(self, bytes: &[u8]) -> Vec<f64> {
        let twos = || bytes.as_chunks::<2>().0.iter();
        let fours = || bytes.as_chunks::<4>().0.iter();
        match self {
            DType::F32 => fours().map(|c| f64::from(f32::from_le_bytes(*c))).collect(),
            DType::BF16 => twos().map(|c| bf16::from_le_bytes(*c).to_f64()).collect(),
            DType::F16 => twos().map(|c| f16::from_le_bytes(*c).to_f64()).collect(),
            DType::I32 => fours().map(|c| f64::from(i32::from_le_bytes(*c))).collect(),
            DType::U32 => fours().map(|c| f64::from(u32::from_le_bytes(*c))).collect(),
            DType::U8 => bytes.iter().map(|b| f64::from(*b)).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn just_beside_the_middle_is_not_the_middle() {
        let (low, high) = (1.0, 1.0 + 2f64.powi(-7));
        let middle = 1.0 + 2f64.powi(-8);
        assert_eq!(to_bf16(middle).to_f64(), low);
        assert_eq!(to_bf16(middle.next_up()).to_f64(), high);
        assert_eq!(to_bf16(-middle.next_up()).to_f64(), -high);
        let middle = 1.0 + 2f64.powi(-11);
        assert_eq!(to_f16(middle).to_f64(), 1.0);
        assert_eq!(to_f16(middle.next_up()).to_f64(), 1.0 + 2f64.powi(-10));
        // Below the smallest normal number, too.
        let middle = 1.5 * 2f64.powi(-24);
        assert_eq!(to_f16(middle).to_f64(), 2f64.powi(-23));
        assert_eq!(to_f16(middle.next_down()).to_f64(), 2f64.powi(-24));
        assert!(to_bf16(f64::from_bits(0x7ff0_0000_0000_0001)).is_nan());
        assert_eq!(to_bf16(f64::INFINITY).to_f64(), f64::INFINITY);
    }

    proptest! {
        #[test]
        fn no_neighbour_is_nearer(v in -1e4f64..1e4) {
            let near = |x: f64, others: [f64; 2]| others.iter().all(|o| (v - x).abs() <= (v - o).abs());
            let b = to_bf16(v);
            let beside = [1, -1].map(|d| bf16::from_bits(b.to_bits().wrapping_add_signed(d)).to_f64());
            prop_assert!(b.to_f64() == 0.0 || near(b.to_f64(), beside));
            let h = to_f16(v);
            let beside = [1, -1].map(|d| f16::from_bits(h.to_bits().wrapping_add_signed(d)).to_f64());
            prop_assert!(h.to_f64() == 0.0 || near(h.to_f64(), beside));
        }
        #[test]
        fn elements_come_back(v in proptest::collection::vec(-1e4f64..1e4, 0..9)) {
            for d in DType::ALL {
                let bytes = d.encode(&v);
                prop_assert_eq!(bytes.len(), v.len() * d.bytes());
                prop_assert_eq!(d.encode(&d.decode(&bytes)), bytes);
            }
        }
    }
}
