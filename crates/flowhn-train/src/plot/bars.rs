//! Panels of horizontal bars: one quantity a panel, one name a row, one colour a series.

use std::path::Path;

use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::{Area, Drawn};
use crate::{Error, Result};

const COLOURS: [RGBColor; 2] = [RGBColor(33, 102, 172), RGBColor(214, 150, 110)];
const PANEL_WIDTH: i32 = 470;
const NAMES_WIDTH: i32 = 96;
const VALUE_WIDTH: i32 = 76;
const ROW_HEIGHT: i32 = 40;
const TOP: i32 = 92;

/// A quantity of several things.
#[derive(Clone, Debug)]
pub struct BarPanel<'a> {
    /// What it is, with its unit.
    pub title: &'a str,
    /// Digits after the point.
    pub decimals: usize,
    /// A name and a value for each row; rows without one have no bar. At most two series.
    pub series: Vec<(&'a str, Vec<Option<f64>>)>,
}

/// Draws panels side by side as SVG text, each with a bar for every name. `path` is where the caller will write it, for the error.
///
/// # Errors
/// [`Error::Plot`].
pub fn bars_svg(path: &Path, title: &str, names: &[&str], panels: &[BarPanel]) -> Result<String> {
    let mut svg = String::new();
    let size = (panels.len() as u32 * PANEL_WIDTH as u32 + 20, (TOP + ROW_HEIGHT * names.len() as i32 + 20) as u32);
    let area = SVGBackend::with_string(&mut svg, size).into_drawing_area();
    let drawn = (|| -> Drawn {
        area.fill(&WHITE)?;
        text(&area, title, (16, 22), 19, HPos::Left)?;
        (0..).zip(panels).try_for_each(|(idx, panel)| draw(&area, names, panel, 10 + idx * PANEL_WIDTH))?;
        Ok(area.present()?)
    })();
    drawn.map_err(|error| Error::Plot { path: path.to_owned(), message: error.to_string() })?;
    // Dropping the area ends its borrow of the text and closes the document.
    drop(area);
    Ok(svg)
}

fn draw(area: &Area, names: &[&str], panel: &BarPanel, left: i32) -> Drawn {
    let values = panel.series.iter().flat_map(|(_, values)| values.iter().flatten());
    let largest = values.copied().filter(|value| value.is_finite()).fold(f64::MIN_POSITIVE, f64::max);
    let zero = left + NAMES_WIDTH;
    let width = f64::from(PANEL_WIDTH - NAMES_WIDTH - VALUE_WIDTH);
    text(area, panel.title, (zero, 52), 15, HPos::Left)?;
    let mut at = zero;
    for ((name, _), colour) in panel.series.iter().zip(COLOURS) {
        area.draw(&Rectangle::new([(at, 67), (at + 12, 77)], colour.filled()))?;
        text(area, name, (at + 17, 72), 12, HPos::Left)?;
        at += 30 + 7 * name.chars().count() as i32;
    }
    let thickness = (ROW_HEIGHT - 10) / panel.series.len().max(1) as i32;
    for (row, name) in (0..).zip(names) {
        let top = TOP + row * ROW_HEIGHT;
        text(area, name, (zero - 8, top + (ROW_HEIGHT - 10) / 2), 14, HPos::Right)?;
        for (idx, ((_, values), colour)) in (0..).zip(panel.series.iter().zip(COLOURS)) {
            let Some(value) = values.get(row as usize).copied().flatten().filter(|value| value.is_finite()) else {
                continue;
            };
            let (top, end) = (top + idx * thickness, zero + (width * value / largest).round() as i32);
            area.draw(&Rectangle::new([(zero, top), (end, top + thickness - 1)], colour.filled()))?;
            let label = grouped(value, panel.decimals);
            text(area, &label, (end + 5, top + thickness / 2), 12, HPos::Left)?;
        }
    }
    area.draw(&PathElement::new([(zero, TOP - 4), (zero, TOP + ROW_HEIGHT * names.len() as i32)], BLACK.mix(0.5)))?;
    Ok(())
}

fn text(area: &Area, text: &str, at: (i32, i32), size: i32, side: HPos) -> Drawn {
    let style = ("sans-serif", size).into_text_style(area).color(&BLACK).pos(Pos::new(side, VPos::Center));
    Ok(area.draw(&Text::new(text.to_owned(), at, style))?)
}

/// A number with its thousands apart.
fn grouped(value: f64, decimals: usize) -> String {
    let text = format!("{value:.decimals$}");
    let (whole, rest) = text.split_at(text.find('.').unwrap_or(text.len()));
    let groups: Vec<&str> = whole.as_bytes().rchunks(3).rev().filter_map(|group| str::from_utf8(group).ok()).collect();
    groups.join(",") + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_series_and_value_is_there() {
        let panel = |title, decimals, ours: Vec<Option<f64>>| BarPanel {
            title,
            decimals,
            series: vec![("here", ours), ("published", vec![Some(10.), None])],
        };
        let panels =
            [panel("tokens/s", 0, vec![Some(1234567.4), None]), panel("MFU %", 1, vec![Some(3.21), Some(f64::NAN)])];
        let svg = bars_svg(Path::new("x.svg"), "the figure", &["Llama", "Mamba-1"], &panels).unwrap();
        for want in
            ["the figure", "tokens/s", "MFU %", "here", "published", "Llama", "Mamba-1", "1,234,567", "3.2", "10.0"]
        {
            assert!(svg.contains(want), "{want}");
        }
        // The background, two legends a panel, and four bars: what is not there or no number has none.
        assert_eq!(svg.matches("<rect").count(), 1 + 4 + 4, "{svg}");
        assert!(svg.trim_end().ends_with("</svg>"));
    }
}
