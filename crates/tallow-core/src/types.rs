//! Shapes, element types and strided layouts: everything known about a value before it exists.
//! Invariant: a [`TensorType`] is always row-major; strides live only in [`Layout`], a planner detail.
//! Absent on purpose: storage.

/// Element type of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum DType {
    /// IEEE single precision.
    F32,
    /// bfloat16.
    BF16,
    /// IEEE half precision.
    F16,
    /// Signed 32-bit integer.
    I32,
    /// Unsigned 32-bit integer: token ids, positions.
    U32,
    /// Bytes.
    U8,
}

impl DType {
    /// Every dtype, for exhaustive tests.
    pub const ALL: [DType; 6] = [
        DType::F32,
        DType::BF16,
        DType::F16,
        DType::I32,
        DType::U32,
        DType::U8,
    ];
    /// Size of one element, in bytes.
    pub fn bytes(self) -> usize {
        match self {
            DType::F32 | DType::I32 | DType::U32 => 4,
            DType::BF16 | DType::F16 => 2,
            DType::U8 => 1,
        }
    }
    /// Is it a floating point type (and so may carry a gradient)?
    pub fn is_float(self) -> bool {
        matches!(self, DType::F32 | DType::BF16 | DType::F16)
    }
    /// Lower-case name, as in safetensors and PyTorch.
    pub fn name(self) -> &'static str {
        match self {
            DType::F32 => "f32",
            DType::BF16 => "bf16",
            DType::F16 => "f16",
            DType::I32 => "i32",
            DType::U32 => "u32",
            DType::U8 => "u8",
        }
    }
}

impl std::fmt::Display for DType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// Row-major extents, outermost first. Rank 0 is a scalar.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Default)]
pub struct Shape(pub Vec<usize>);

impl Shape {
    /// Number of elements (1 for a scalar).
    pub fn numel(&self) -> usize {
        self.0.iter().product()
    }
    /// Number of axes.
    pub fn rank(&self) -> usize {
        self.0.len()
    }
    /// Extent of the innermost axis (1 for a scalar).
    pub fn last(&self) -> usize {
        self.0.last().copied().unwrap_or(1)
    }
    /// Number of rows when everything but the innermost axis is flattened.
    pub fn rows(&self) -> usize {
        self.0[..self.rank().saturating_sub(1)].iter().product()
    }
    /// The same shape with extent `n` at `axis`.
    pub fn with(&self, axis: usize, n: usize) -> Shape {
        let mut s = self.clone();
        s.0[axis] = n;
        s
    }
    /// The same shape with another innermost extent.
    pub fn with_last(&self, n: usize) -> Shape {
        match self.rank() {
            0 => self.clone(),
            r => self.with(r - 1, n),
        }
    }
    /// NumPy broadcasting of two shapes; `None` if they do not fit.
    pub fn broadcast(&self, other: &Shape) -> Option<Shape> {
        let rank = self.rank().max(other.rank());
        let at = |s: &Shape, i: usize| (i + s.rank()).checked_sub(rank).map_or(1, |k| s.0[k]);
        (0..rank)
            .map(|i| match (at(self, i), at(other, i)) {
                (a, b) if a == b => Some(a),
                (1, b) => Some(b),
                (a, 1) => Some(a),
                _ => None,
            })
            .collect::<Option<Vec<_>>>()
            .map(Shape)
    }
    /// Row-major strides, in elements.
    pub fn strides(&self) -> Vec<usize> {
        let mut s = vec![1; self.rank()];
        for i in (0..self.rank().saturating_sub(1)).rev() {
            s[i] = s[i + 1] * self.0[i + 1];
        }
        s
    }
}

impl<const N: usize> From<[usize; N]> for Shape {
    fn from(a: [usize; N]) -> Self {
        Shape(a.to_vec())
    }
}
impl From<Vec<usize>> for Shape {
    fn from(a: Vec<usize>) -> Self {
        Shape(a)
    }
}
impl From<&[usize]> for Shape {
    fn from(a: &[usize]) -> Self {
        Shape(a.to_vec())
    }
}
impl std::fmt::Display for Shape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}", self.0)
    }
}

/// Shape and element type of a value.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct TensorType {
    /// Extents.
    pub shape: Shape,
    /// Element type.
    pub dtype: DType,
}

impl TensorType {
    /// A type from its parts.
    pub fn new(shape: impl Into<Shape>, dtype: DType) -> Self {
        Self {
            shape: shape.into(),
            dtype,
        }
    }
    /// An f32 tensor.
    pub fn f32(shape: impl Into<Shape>) -> Self {
        Self::new(shape, DType::F32)
    }
    /// A u32 tensor (ids, positions).
    pub fn u32(shape: impl Into<Shape>) -> Self {
        Self::new(shape, DType::U32)
    }
    /// Size when stored contiguously, in bytes.
    pub fn bytes(&self) -> usize {
        self.shape.numel() * self.dtype.bytes()
    }
}

impl std::fmt::Display for TensorType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}{}", self.dtype, self.shape)
    }
}

/// How a value lies in the storage of its root: a strided window.
/// Strides and offset are in elements; a stride of 0 repeats.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Layout {
    /// Extents, equal to the value's shape.
    pub shape: Shape,
    /// Elements between neighbours along each axis.
    pub strides: Vec<usize>,
    /// First element, counted from the start of the root's storage.
    pub offset: usize,
}

impl Layout {
    /// Row-major from element 0.
    pub fn contiguous(shape: &Shape) -> Self {
        Layout {
            strides: shape.strides(),
            shape: shape.clone(),
            offset: 0,
        }
    }
    /// Is it dense row-major (any offset)? Axes of extent 1 may have any stride.
    pub fn is_contiguous(&self) -> bool {
        let want = self.shape.strides();
        self.shape.numel() == 0
            || (0..self.shape.rank()).all(|i| self.shape.0[i] == 1 || self.strides[i] == want[i])
    }
    /// Row stride when the value is read as `[rows, last]` with dense rows, in elements.
    /// `None` if rows are not dense or their starts are not evenly spaced.
    pub fn row_stride(&self) -> Option<usize> {
        let rank = self.shape.rank();
        if rank == 0 {
            return Some(1);
        }
        let last = self.shape.last();
        if last > 1 && self.strides[rank - 1] != 1 {
            return None;
        }
        let mut axes = (0..rank - 1).rev().filter(|i| self.shape.0[*i] > 1);
        let Some(inner) = axes.next() else {
            return Some(last);
        };
        let row = self.strides[inner];
        let mut span = row * self.shape.0[inner];
        for i in axes {
            if self.strides[i] != span {
                return None;
            }
            span *= self.shape.0[i];
        }
        Some(row)
    }
    /// The window `start..start+len` along `axis`.
    pub fn slice(&self, axis: usize, start: usize, len: usize) -> Self {
        let mut l = self.clone();
        l.offset += start * l.strides[axis];
        l.shape.0[axis] = len;
        l
    }
    /// Axes reordered: axis `i` of the result is axis `axes[i]` of `self`.
    pub fn permute(&self, axes: &[usize]) -> Self {
        Layout {
            shape: Shape(axes.iter().map(|a| self.shape.0[*a]).collect()),
            strides: axes.iter().map(|a| self.strides[*a]).collect(),
            offset: self.offset,
        }
    }
    /// Repeats axes of extent 1 (and missing outer axes) up to `to`.
    pub fn broadcast(&self, to: &Shape) -> Self {
        let pad = to.rank() - self.shape.rank();
        let strides = (0..to.rank())
            .map(|i| match i.checked_sub(pad) {
                Some(k) if self.shape.0[k] == to.0[i] => self.strides[k],
                _ => 0,
            })
            .collect();
        Layout {
            shape: to.clone(),
            strides,
            offset: self.offset,
        }
    }
    /// The same elements under another shape, if strides can express it.
    pub fn reshape(&self, to: &Shape) -> Option<Self> {
        if self.is_contiguous() {
            return Some(Layout {
                offset: self.offset,
                ..Layout::contiguous(to)
            });
        }
        let old: Vec<(usize, usize)> = self
            .shape
            .0
            .iter()
            .copied()
            .zip(self.strides.iter().copied())
            .filter(|(n, _)| *n != 1)
            .collect();
        let (mut strides, mut o) = (vec![0; to.rank()], 0);
        let mut i = 0;
        while i < to.rank() {
            if to.0[i] == 1 {
                i += 1;
                continue;
            }
            // Match a run of old axes with a run of new axes of equal product.
            let (o0, i0) = (o, i);
            let (mut a, mut b) = (old.get(o)?.0, to.0[i]);
            (o, i) = (o + 1, i + 1);
            while a != b {
                if a < b {
                    a *= old.get(o)?.0;
                    o += 1;
                } else {
                    b *= *to.0.get(i)?;
                    i += 1;
                }
            }
            // Inside the run the old axes must be dense among themselves.
            if !(o0..o - 1).all(|k| old[k].1 == old[k + 1].1 * old[k + 1].0) {
                return None;
            }
            let mut stride = old[o - 1].1;
            for k in (i0..i).rev() {
                strides[k] = stride;
                stride *= to.0[k];
            }
        }
        Some(Layout {
            shape: to.clone(),
            strides,
            offset: self.offset,
        })
    }
    /// One past the highest element this layout touches, in elements of the root.
    pub fn end(&self) -> usize {
        if self.shape.numel() == 0 {
            return self.offset;
        }
        let reach = |(n, s): (&usize, &usize)| (n - 1) * s;
        self.offset
            + self
                .shape
                .0
                .iter()
                .zip(&self.strides)
                .map(reach)
                .sum::<usize>()
            + 1
    }
    /// Root element of the value's element `flat` (row-major index).
    pub fn index(&self, mut flat: usize) -> usize {
        let mut at = self.offset;
        for d in (0..self.shape.rank()).rev() {
            at += (flat % self.shape.0[d]) * self.strides[d];
            flat /= self.shape.0[d];
        }
        at
    }
}

/// How several operands of one shape are gone through together: extents without those of 1, and for each operand its
/// strides; neighbouring axes are one where every operand walks them as one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Walk {
    /// Extents, outermost first. Empty for a single element.
    pub shape: Vec<usize>,
    /// By operand, in elements, as long as the extents.
    pub strides: Vec<Vec<usize>>,
}

impl Walk {
    /// Of operands with these strides, each as long as `shape`.
    pub fn over(shape: &[usize], operands: &[&[usize]]) -> Self {
        let mut w = Walk {
            shape: vec![],
            strides: vec![vec![]; operands.len()],
        };
        for (axis, n) in shape.iter().enumerate() {
            if *n == 1 {
                continue;
            }
            let outer = |(s, o): (&Vec<usize>, &&[usize])| s.last() == Some(&(o[axis] * n));
            let merges = !w.shape.is_empty() && w.strides.iter().zip(operands).all(outer);
            match (merges, w.shape.last_mut()) {
                (true, Some(last)) => *last *= n,
                _ => w.shape.push(*n),
            }
            for (s, o) in w.strides.iter_mut().zip(operands) {
                if merges {
                    s.pop();
                }
                s.push(o[axis]);
            }
        }
        w
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn axes_are_one_where_every_operand_walks_them_as_one() {
        let dense = [12, 4, 4, 1];
        let w = Walk::over(&[2, 3, 1, 4], &[&dense, &[4, 0, 7, 1]]);
        assert_eq!(w.shape, [2, 3, 4]);
        assert_eq!(w.strides, [[12, 4, 1], [4, 0, 1]]);
        let w = Walk::over(&[2, 3, 1, 4], &[&dense, &[24, 8, 0, 2]]);
        assert_eq!((w.shape, w.strides), (vec![24], vec![vec![1], vec![2]]));
        assert!(Walk::over(&[1, 1], &[&[5, 1]]).shape.is_empty());
        assert_eq!(Walk::over(&[2, 3], &[]).shape, [6]);
    }
    #[test]
    fn rows_of_a_window_keep_the_outer_stride() {
        let l = Layout::contiguous(&[2, 5, 12].into()).slice(2, 4, 8);
        assert_eq!(l.row_stride(), Some(12));
        let l = l.reshape(&[2, 5, 2, 4].into()).unwrap();
        assert_eq!(l.strides, vec![60, 12, 4, 1]);
        assert!(l.permute(&[0, 2, 1, 3]).reshape(&[4, 20].into()).is_none());
    }

    proptest! {
        #[test]
        fn reshape_of_a_window_addresses_the_same_elements(a in 1usize..5, b in 1usize..5, c in 1usize..6, s in 0usize..3) {
            let whole = Layout::contiguous(&[a, b, c + s].into());
            let l = whole.slice(2, s, c);
            for to in [vec![a * b, c], vec![a, b * c], vec![a * b * c], vec![1, a, b, 1, c]] {
                if let Some(r) = l.reshape(&Shape(to)) {
                    for i in 0..a * b * c { prop_assert_eq!(l.index(i), r.index(i)); }
                }
            }
        }
    }
}
