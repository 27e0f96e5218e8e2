//! Which bytes a strided tensor reaches, and which tensors share memory.

/// Addresses are kept modulo this: allocations of the CUDA driver begin at multiples of it.
pub const ALIGNMENT: u64 = 256;

/// A range of addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Extent {
    /// The first byte.
    pub address: u64,
    /// How many bytes.
    pub n_bytes: u64,
}

impl Extent {
    /// From a tensor's first element to the end of the last that its strides reach; empty for a tensor without elements.
    /// `size` and `stride` count elements, none is negative, and a stride of 0 repeats what is there.
    ///
    /// # Panics
    /// If a size or a stride is negative, which libtorch does not allow.
    pub fn of_strided(address: u64, size: &[i64], stride: &[i64], element_bytes: usize) -> Self {
        assert!(size.iter().chain(stride).all(|&n| n >= 0), "size {size:?}, strides {stride:?}");
        let last: i64 = size.iter().zip(stride).map(|(size, stride)| (size - 1).max(0) * stride).sum();
        let n_bytes = if size.contains(&0) { 0 } else { (last as u64 + 1) * element_bytes as u64 };
        Self { address, n_bytes }
    }

    /// The first address past it.
    pub fn end(&self) -> u64 {
        self.address + self.n_bytes
    }

    /// Whether all of `other` lies in it.
    pub fn contains(&self, other: &Self) -> bool {
        self.address <= other.address && other.end() <= self.end()
    }
}

/// The extents with those joined that overlap, by address. Neighbours that only touch stay apart, so that a step from one into
/// the other shows, and empty ones are left out.
pub fn regions(extents: &[Extent]) -> Vec<Extent> {
    let mut sorted: Vec<Extent> = extents.iter().copied().filter(|extent| extent.n_bytes > 0).collect();
    sorted.sort_unstable();
    let mut joined: Vec<Extent> = Vec::new();
    for extent in sorted {
        match joined.last_mut() {
            Some(last) if extent.address < last.end() => {
                last.n_bytes = last.n_bytes.max(extent.end() - last.address);
            }
            _ => joined.push(extent),
        }
    }
    joined
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn n_bytes(size: &[i64], stride: &[i64]) -> u64 {
        Extent::of_strided(0, size, stride, 2).n_bytes
    }

    #[test]
    fn extents_end_with_the_last_element() {
        assert_eq!(n_bytes(&[3, 4], &[4, 1]), 24);
        assert_eq!(n_bytes(&[], &[]), 2, "a number alone");
        assert_eq!(n_bytes(&[4, 3], &[1, 4]), 24, "transposed");
        assert_eq!(n_bytes(&[3, 4], &[10, 1]), 48, "columns of a wider matrix: nothing behind the last row");
        assert_eq!(n_bytes(&[3, 4], &[0, 1]), 8, "expanded");
        assert_eq!(n_bytes(&[5, 1, 2], &[0, 1 << 40, 0]), 2, "the stride of a single element reaches nowhere");
        assert_eq!(n_bytes(&[3, 0, 4], &[4, 4, 1]), 0, "empty");
        assert_eq!(n_bytes(&[1 << 20, 1 << 20], &[1 << 20, 1]), 1 << 41);
    }

    #[test]
    #[should_panic(expected = "strides [-1]")]
    fn negative_strides_are_no_tensors() {
        n_bytes(&[3], &[-1]);
    }

    #[test]
    fn overlapping_views_share_a_region_and_neighbours_do_not() {
        let extent = |address, n_bytes| Extent { address, n_bytes };
        // The halves of the columns of a 3 x 8 matrix of two-byte elements interleave.
        let left = Extent::of_strided(1024, &[3, 4], &[8, 1], 2);
        let right = Extent::of_strided(1032, &[3, 4], &[8, 1], 2);
        assert_eq!(regions(&[right, left]), [extent(1024, 48)]);
        // Its first row and the others only touch.
        let (first, others) = (extent(1024, 16), extent(1040, 32));
        assert_eq!(regions(&[others, first]), [first, others]);
        assert_eq!(regions(&[first, first, extent(1030, 4)]), [first], "the same twice, and a part");
        assert_eq!(regions(&[extent(0, 0), extent(1030, 0)]), []);
    }

    proptest! {
        #[test]
        fn regions_are_apart_and_hold_every_extent(parts in prop::collection::vec((0_u64..200, 0_u64..30), 0..12)) {
            let extents: Vec<Extent> = parts.iter().map(|&(address, n_bytes)| Extent { address, n_bytes }).collect();
            let regions = regions(&extents);
            prop_assert!(regions.is_sorted_by(|a, b| a.end() <= b.address));
            for extent in extents.iter().filter(|extent| extent.n_bytes > 0) {
                prop_assert_eq!(regions.iter().filter(|region| region.contains(extent)).count(), 1);
            }
            // Nothing is guarded that no extent reaches.
            for byte in regions.iter().flat_map(|region| region.address..region.end()) {
                prop_assert!(extents.iter().any(|extent| (extent.address..extent.end()).contains(&byte)));
            }
        }
    }
}
