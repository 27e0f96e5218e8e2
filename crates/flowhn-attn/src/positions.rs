//! Where tokens stand in their sequence.

use std::cell::OnceCell;
use std::ops::Range;

use tch::{Device, Tensor};

use flowhn_torch::{Error, Result, cpu};

use crate::{Rope, RotaryTable};

/// Absolute positions of some tokens, strictly increasing.
///
/// Decisions are made from the host's copy; the device's copy and the rotary table are made at their first use and kept.
#[derive(Debug)]
pub struct Positions {
    host: Vec<i64>,
    device: Device,
    tensor_n: OnceCell<Tensor>,
    rotary: OnceCell<RotaryTable>,
}

impl Positions {
    /// These positions, for tensors on `device`.
    ///
    /// ```
    /// use flowhn_attn::Positions;
    /// use tch::Device;
    /// assert_eq!(Positions::new(&[2, 3, 7], Device::Cpu)?.len(), 3);
    /// assert!(Positions::new(&[2, 2], Device::Cpu).is_err());
    /// # Ok::<(), flowhn_attn::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Invalid`] unless they increase strictly and none is negative.
    pub fn new(positions: &[i64], device: Device) -> Result<Self> {
        let mut new = Self { host: Vec::new(), device, tensor_n: OnceCell::new(), rotary: OnceCell::new() };
        new.extend(positions)?;
        Ok(new)
    }

    /// The positions of neighbouring tokens.
    ///
    /// # Errors
    /// [`Error::Invalid`] if one is negative.
    pub fn range(range: Range<i64>, device: Device) -> Result<Self> {
        Self::new(&range.collect::<Vec<i64>>(), device)
    }

    /// The positions on the host.
    pub fn host(&self) -> &[i64] {
        &self.host
    }

    /// The positions on the device: `[n]`, i64.
    ///
    /// # Errors
    /// [`Error::Torch`] if the device refuses the copy.
    pub fn tensor(&self) -> Result<Tensor> {
        if let Some(tensor) = self.tensor_n.get() {
            return Ok(tensor.shallow_clone());
        }
        let tensor = cpu::from_slice(&[self.host.len() as i64], &self.host)?.f_to_device(self.device)?;
        Ok(self.tensor_n.get_or_init(|| tensor).shallow_clone())
    }

    /// The rotary table of these positions. The first one asked for is kept.
    ///
    /// # Errors
    /// Those of [`RotaryTable::new`].
    pub fn rotary_table(&self, d_head: i64, rope: impl Into<Rope>) -> Result<RotaryTable> {
        let rope = rope.into();
        if let Some(table) = self.rotary.get().filter(|table| table.d_head() == d_head && table.rope() == rope) {
            return Ok(table.clone());
        }
        let table = RotaryTable::new(&self.host, d_head, rope, self.device)?;
        Ok(match self.rotary.get() {
            Some(_) => table,
            None => self.rotary.get_or_init(|| table).clone(),
        })
    }

    /// Number of positions.
    pub fn len(&self) -> usize {
        self.host.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.host.is_empty()
    }

    /// Where [`Positions::tensor`] lives.
    pub fn device(&self) -> Device {
        self.device
    }

    /// Adds later positions.
    pub(crate) fn extend(&mut self, positions: &[i64]) -> Result<()> {
        let mut last = self.host.last().copied().unwrap_or(-1);
        for &position in positions {
            if position <= last {
                let message = format!("positions must increase from 0 on, but {position} comes after {last}");
                return Err(Error::invalid("positions", message));
            }
            last = position;
        }
        if !positions.is_empty() {
            self.host.extend_from_slice(positions);
            (self.tensor_n, self.rotary) = (OnceCell::new(), OnceCell::new());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_are_kept_until_the_positions_change() {
        let mut positions = Positions::range(3..6, Device::Cpu).unwrap();
        assert_eq!(Vec::<i64>::try_from(positions.tensor().unwrap()).unwrap(), [3, 4, 5]);
        assert_eq!(positions.tensor().unwrap().data_ptr(), positions.tensor().unwrap().data_ptr());
        assert_eq!(positions.rotary_table(4, 10.).unwrap().len(), 3);
        positions.extend(&[9]).unwrap();
        assert_eq!(Vec::<i64>::try_from(positions.tensor().unwrap()).unwrap(), [3, 4, 5, 9]);
        assert_eq!(positions.rotary_table(4, 10.).unwrap().len(), 4);
        assert_eq!(positions.rotary_table(8, 10.).unwrap().d_head(), 8);
    }

    #[test]
    fn positions_must_increase() {
        let mut positions = Positions::new(&[5], Device::Cpu).unwrap();
        assert!(positions.extend(&[5]).unwrap_err().to_string().contains("5 comes after 5"));
        assert_eq!(positions.host(), [5], "a refused extension leaves no trace");
        assert!(Positions::new(&[-1], Device::Cpu).is_err());
        assert!(Positions::new(&[], Device::Cpu).unwrap().is_empty());
    }
}
