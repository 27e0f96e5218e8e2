//! The plots: losses over the steps, bars, and curves.

mod bars;
mod curves;

use std::path::Path;

use plotters::coord::Shift;
use plotters::prelude::*;

pub use self::bars::{BarPanel, bars_svg};
pub use self::curves::{Axes, Curve, curves_svg};
use crate::metrics::{StepRecord, ValidRecord};
use crate::{Error, Result};

const SIZE: (u32, u32) = (900, 540);
const RAW: RGBColor = RGBColor(158, 188, 218);
const SMOOTH: RGBColor = RGBColor(33, 102, 172);
const VALID: RGBColor = RGBColor(214, 96, 77);
const GREY: RGBColor = RGBColor(120, 120, 120);

/// Draws training and validation loss over the steps as SVG text.
///
/// Training is drawn step by step, and as its running mean over a fiftieth of the steps; `unigram_nats`, the loss of a model
/// that only knows how frequent each token is, as a dashed line. `path` is where the caller will write it, for the error.
///
/// # Errors
/// [`Error::Plot`].
pub fn loss_svg(
    path: &Path,
    title: &str,
    train: &[StepRecord],
    valid: &[ValidRecord],
    unigram_nats: Option<f64>,
) -> Result<String> {
    let mut svg = String::new();
    let area = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
    draw(&area, title, train, valid, unigram_nats)
        .map_err(|error| Error::Plot { path: path.to_owned(), message: error.to_string() })?;
    // Dropping the area ends its borrow of the text and closes the document.
    drop(area);
    Ok(svg)
}

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Drawn = std::result::Result<(), Box<dyn std::error::Error>>;

fn draw(area: &Area, title: &str, train: &[StepRecord], valid: &[ValidRecord], unigram_nats: Option<f64>) -> Drawn {
    let raw: Vec<(f64, f64)> = train.iter().map(|record| (record.step as f64, f64::from(record.loss))).collect();
    let held: Vec<(f64, f64)> = valid.iter().map(|record| (record.step as f64, record.val_loss)).collect();
    let last_step = raw.iter().chain(&held).map(|point| point.0).fold(1., f64::max);
    let losses = raw.iter().chain(&held).map(|point| point.1).chain(unigram_nats).filter(|loss| loss.is_finite());
    let (low, high) = losses.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), y| (low.min(y), high.max(y)));
    let (low, high) = if low <= high { (low, high) } else { (0., 1.) };
    let margin = (0.05 * (high - low)).max(1e-3);

    area.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(area)
        .caption(title, ("sans-serif", 20))
        .margin(14)
        .x_label_area_size(46)
        .y_label_area_size(62)
        .build_cartesian_2d(0f64..last_step, (low - margin)..(high + margin))?;
    chart
        .configure_mesh()
        .x_desc("step")
        .y_desc("loss (nats per token)")
        .x_label_formatter(&|step| format!("{step:.0}"))
        .y_label_formatter(&|loss| format!("{loss:.2}"))
        .axis_desc_style(("sans-serif", 15))
        .label_style(("sans-serif", 13))
        .bold_line_style(BLACK.mix(0.12))
        .light_line_style(TRANSPARENT)
        .draw()?;

    chart.draw_series(LineSeries::new(raw.iter().copied(), RAW.stroke_width(1)))?;
    if !raw.is_empty() {
        chart
            .draw_series(LineSeries::new(running_mean(&raw), SMOOTH.stroke_width(2)))?
            .label("training, running mean")
            .legend(|(x, y)| PathElement::new([(x, y), (x + 18, y)], SMOOTH.stroke_width(2)));
    }
    if !held.is_empty() {
        chart
            .draw_series(LineSeries::new(held.iter().copied(), VALID.stroke_width(2)).point_size(3))?
            .label("validation")
            .legend(|(x, y)| PathElement::new([(x, y), (x + 18, y)], VALID.stroke_width(2)));
    }
    if let Some(nats) = unigram_nats {
        chart
            .draw_series(DashedLineSeries::new([(0., nats), (last_step, nats)], 6, 4, GREY.stroke_width(1)))?
            .label("unigram model, validation")
            .legend(|(x, y)| PathElement::new([(x, y), (x + 18, y)], GREY.stroke_width(1)));
    }
    legend(&mut chart, SeriesLabelPosition::UpperRight)?;
    area.present()?;
    Ok(())
}

/// The names of a chart's series.
fn legend<'a, 'text: 'a, X: Ranged<ValueType = f64>, Y: Ranged<ValueType = f64>>(
    chart: &mut ChartContext<'a, SVGBackend<'text>, Cartesian2d<X, Y>>,
    position: SeriesLabelPosition,
) -> Drawn {
    chart
        .configure_series_labels()
        .position(position)
        .background_style(WHITE.mix(0.85))
        .border_style(BLACK.mix(0.2))
        .label_font(("sans-serif", 14))
        .draw()?;
    Ok(())
}

/// The mean of each point and those before it, over a window of a fiftieth of all points.
fn running_mean(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let window = (points.len() / 50).max(1);
    let mut sum = 0.;
    let mean = |(idx, &(step, loss)): (usize, &(f64, f64))| {
        sum += loss;
        if idx >= window {
            sum -= points[idx - window].1;
        }
        (step, sum / (idx + 1).min(window) as f64)
    };
    points.iter().enumerate().map(mean).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn train(n: u64) -> Vec<StepRecord> {
        let record = |step| StepRecord {
            step,
            tokens: step,
            loss: 8. - step as f32 * 0.01,
            lr: 1e-3,
            grad_norm: 1.,
            tokens_per_s: 1.,
            mfu: 0.1,
            max_memory_bytes: 1,
            elapsed_s: 1.,
        };
        (1..=n).map(record).collect()
    }

    #[test]
    fn axes_title_and_every_series_are_there() {
        let valid: Vec<ValidRecord> = [0, 100, 200]
            .map(|step| ValidRecord { step, tokens: 0, val_loss: 7., val_bits_per_byte: 2., elapsed_s: 0. })
            .into();
        let svg = loss_svg(Path::new("loss.svg"), "tiny: 3.1M parameters", &train(200), &valid, Some(7.5)).unwrap();
        for text in ["tiny: 3.1M parameters", "step", "nats per token", "training", "validation", "unigram"] {
            assert!(svg.contains(text), "{text}");
        }
        assert!(svg.trim_end().ends_with("</svg>"));
    }

    #[test]
    fn few_points_and_none_draw_too() {
        for n in [0, 1] {
            loss_svg(Path::new("loss.svg"), "short", &train(n), &[], None).unwrap();
        }
    }

    #[test]
    fn the_running_mean_of_a_line_lags_by_half_its_window() {
        let points: Vec<(f64, f64)> = (0..200).map(|i| (f64::from(i), f64::from(i))).collect();
        let mean = running_mean(&points);
        assert_eq!(mean[0].1, 0.);
        assert!((mean[100].1 - 98.5).abs() < 1e-9);
    }
}
