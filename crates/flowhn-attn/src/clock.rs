//! The position of the token that a step of decoding reads.

use tch::{Device, Kind, Tensor};

use flowhn_torch::kernel::{Arg, Kernel};
use flowhn_torch::{Error, Result, cpu};

use crate::kernels::DECODE_CLOCK;
use crate::{Positions, Rope, RotaryTable};

/// Where a sequence stands that grows by single tokens, on the host and, on CUDA, on the device: there [`Clock::tick`] counts without the
/// host, so that a step that was captured in a CUDA graph reads another position in every replay.
///
/// ```
/// use flowhn_attn::{Clock, Rope};
/// use tch::Device;
/// let mut clock = Clock::new(Some((64, Rope::new(10000.))), Device::Cpu)?;
/// clock.move_to(7)?;
/// clock.tick()?;
/// assert_eq!(clock.positions().host(), [7]);
/// # Ok::<(), flowhn_attn::Error>(())
/// ```
#[derive(Debug)]
pub struct Clock {
    positions: Positions,
    /// Features of a head and their rotary embedding.
    rope: Option<(i64, Rope)>,
    counter: Option<Counter>,
}

/// What a CUDA device knows.
#[derive(Debug)]
struct Counter {
    /// The position of the last tick: `[1]`, i64.
    position: Tensor,
    /// The position after the next tick, as the host expects it.
    next: Option<i64>,
    rope: Option<Angles>,
}

/// The angles of the position.
#[derive(Debug)]
struct Angles {
    /// Radians a position: `[d_head / 2]`, f64.
    rates: Tensor,
    table: RotaryTable,
}

impl Clock {
    /// A clock that has not been set, for heads of so many features with this rotary embedding, or for none.
    ///
    /// # Errors
    /// Those of [`RotaryTable::new`].
    pub fn new(rope: Option<(i64, Rope)>, device: Device) -> Result<Self> {
        let counter = match device {
            Device::Cuda(_) => Some(Counter::new(rope, device)?),
            _ => None,
        };
        Ok(Self { positions: Positions::new(&[0], device)?, rope, counter })
    }

    /// Sets the position that the next tick arrives at. On CUDA it writes to the device unless the ticks so far lead there; it
    /// belongs before a step, outside of its capture.
    ///
    /// # Errors
    /// [`flowhn_torch::Error::Invalid`] for a negative position; [`flowhn_torch::Error::Torch`] if the device refuses.
    pub fn move_to(&mut self, position: i64) -> Result<()> {
        self.positions = Positions::new(&[position], self.positions.device())?;
        if let Some(counter) = &mut self.counter {
            if counter.next != Some(position) {
                let _ = counter.position.f_fill_(position - 1)?;
            }
            counter.next = Some(position + 1);
        }
        Ok(())
    }

    /// Lets the device arrive at the position: the first work of a step.
    ///
    /// # Errors
    /// [`flowhn_torch::Error::Kernel`] if the device refuses.
    pub fn tick(&self) -> Result<()> {
        let Some(Counter { position, rope, .. }) = &self.counter else { return Ok(()) };
        let (rates, parts) = (rope.as_ref().map(|rope| &rope.rates), rope.as_ref().map(|rope| rope.table.parts()));
        Kernel { source: &DECODE_CLOCK, entry: "decode_clock", defines: &[] }.launch(
            [1, 1, 1],
            128,
            0,
            &[
                Arg::Tensor(position),
                Arg::opt(rates),
                Arg::opt(parts.map(|(cos, _)| cos)),
                Arg::opt(parts.map(|(_, sin)| sin)),
                Arg::I32(rates.map_or(0, Tensor::numel) as i32),
            ],
        )
    }

    /// The position as the host knows it: one.
    pub fn positions(&self) -> &Positions {
        &self.positions
    }

    /// Refuses a clock whose angles are not those of a mixer's heads.
    pub(crate) fn check(&self, op: &'static str, rope: Option<(i64, Rope)>) -> Result<()> {
        if self.rope == rope {
            return Ok(());
        }
        let told = |rope: Option<(i64, Rope)>| match rope {
            Some((d_head, rope)) => format!("heads of {d_head} that turn with {rope}"),
            None => "heads that do not turn".to_owned(),
        };
        Err(Error::invalid(op, format!("the clock is for {}, the mixer has {}", told(self.rope), told(rope))))
    }

    /// The position on the device, `[1]`, i64; `None` where only the host counts.
    pub(crate) fn on_device(&self) -> Option<&Tensor> {
        self.counter.as_ref().map(|counter| &counter.position)
    }

    /// The angles of the position on the device, with rotary embedding.
    pub(crate) fn angles(&self) -> Option<&RotaryTable> {
        self.counter.as_ref()?.rope.as_ref().map(|rope| &rope.table)
    }
}

impl Counter {
    fn new(rope: Option<(i64, Rope)>, device: Device) -> Result<Self> {
        let angles = |(d_head, rope): (i64, Rope)| -> Result<Angles> {
            let table = RotaryTable::new(&[0], d_head, rope, device)?;
            let rates = cpu::from_slice(&[d_head / 2], &rope.rates(d_head))?.f_to_device(device)?;
            Ok(Angles { rates, table })
        };
        Ok(Self {
            position: Tensor::f_zeros([1], (Kind::Int64, device))?,
            next: None,
            rope: rope.map(angles).transpose()?,
        })
    }
}
