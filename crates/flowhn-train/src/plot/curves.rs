//! Plots of curves over a logarithmic axis.

use std::path::Path;

use plotters::prelude::*;

use super::{Area, Drawn, SIZE, legend};
use crate::{Error, Result};

const COLORS: [RGBColor; 4] =
    [RGBColor(33, 102, 172), RGBColor(214, 96, 77), RGBColor(77, 146, 33), RGBColor(118, 42, 131)];

/// One curve.
#[derive(Clone, Debug, PartialEq)]
pub struct Curve {
    /// Its name in the legend.
    pub name: String,
    /// Points from left to right; `x` above 0.
    pub points: Vec<(f64, f64)>,
}

/// What stands around the curves.
#[derive(Clone, Copy, Debug)]
pub struct Axes<'a> {
    /// Above the plot.
    pub title: &'a str,
    /// Below the logarithmic axis.
    pub x: &'a str,
    /// Beside the linear axis, which begins at 0.
    pub y: &'a str,
    /// A place on the logarithmic axis that is marked by a line, and what it is.
    pub mark: Option<(f64, &'a str)>,
}

/// Draws curves as SVG text. `path` is where the caller will write it, for the error.
///
/// # Errors
/// [`Error::Plot`], also where there is no point.
pub fn curves_svg(path: &Path, axes: Axes, curves: &[Curve]) -> Result<String> {
    let mut svg = String::new();
    let area = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
    draw(&area, axes, curves).map_err(|error| Error::Plot { path: path.to_owned(), message: error.to_string() })?;
    // Dropping the area ends its borrow of the text and closes the document.
    drop(area);
    Ok(svg)
}

fn draw(area: &Area, axes: Axes, curves: &[Curve]) -> Drawn {
    let points = || curves.iter().flat_map(|curve| &curve.points);
    let left = points().map(|point| point.0).fold(f64::INFINITY, f64::min);
    let right = points().map(|point| point.0).fold(0., f64::max);
    let top = points().map(|point| point.1).fold(0., f64::max);
    if !(left > 0. && left.is_finite() && top > 0. && top.is_finite()) {
        return Err("there is nothing to draw: no point, or none above 0".into());
    }
    area.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(area)
        .caption(axes.title, ("sans-serif", 20))
        .margin(14)
        .x_label_area_size(46)
        .y_label_area_size(78)
        .build_cartesian_2d((left / 1.1..right * 1.1).log_scale(), 0f64..top * 1.08)?;
    chart
        .configure_mesh()
        .x_desc(axes.x)
        .y_desc(axes.y)
        .x_label_formatter(&|x| format!("{x:.0}"))
        .y_label_formatter(&|y| format!("{y:.0}"))
        .axis_desc_style(("sans-serif", 15))
        .label_style(("sans-serif", 13))
        .bold_line_style(BLACK.mix(0.12))
        .light_line_style(TRANSPARENT)
        .draw()?;
    if let Some((x, text)) = axes.mark.filter(|(x, _)| (left..=right).contains(x)) {
        chart.draw_series(DashedLineSeries::new([(x, 0.), (x, top * 1.08)], 4, 4, BLACK.mix(0.5).stroke_width(1)))?;
        chart.draw_series([Text::new(text.to_owned(), (x * 1.03, top * 1.04), ("sans-serif", 13))])?;
    }
    for (curve, color) in curves.iter().zip(COLORS.iter().cycle()) {
        let style = color.stroke_width(2);
        chart
            .draw_series(LineSeries::new(curve.points.iter().copied(), style).point_size(4))?
            .label(&curve.name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], style));
    }
    legend(&mut chart, SeriesLabelPosition::LowerLeft)?;
    area.present()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const AXES: Axes<'static> = Axes { title: "speed", x: "tokens", y: "tokens/s", mark: Some((1500., "even")) };

    #[test]
    fn curves_are_drawn_with_their_names_and_nothing_is_an_error() {
        let curve = |name: &str| Curve { name: name.to_owned(), points: vec![(1024., 3.), (2048., 2.)] };
        let svg = curves_svg(Path::new("x.svg"), AXES, &[curve("split"), curve("attention")]).unwrap();
        assert!(svg.trim_end().ends_with("</svg>"));
        assert!(["speed", "tokens/s", "split", "attention", "even"].iter().all(|word| svg.contains(word)));
        let error = curves_svg(Path::new("x.svg"), AXES, &[]).unwrap_err().to_string();
        assert!(error.contains("nothing to draw"), "{error}");
    }
}
