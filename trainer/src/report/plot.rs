//! Lines over whole numbers, drawn as SVG: the loss of a run by step, distances by layer.

use std::path::Path;

use plotters::prelude::*;

/// A line of the plot: its name in the legend and its points.
pub(crate) type Series<'a> = (&'a str, Vec<(u64, f64)>);

const SIZE: (u32, u32) = (960, 540);
const COLORS: [RGBColor; 4] = [
    RGBColor(31, 119, 180),
    RGBColor(214, 39, 40),
    RGBColor(44, 160, 44),
    RGBColor(148, 103, 189),
];

/// What a plot says beside its lines.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Labels<'a> {
    /// Above it.
    pub(crate) title: &'a str,
    /// Below the horizontal axis.
    pub(crate) x: &'a str,
    /// Beside the vertical one.
    pub(crate) y: &'a str,
}

/// Draws losses over steps.
#[cfg(feature = "torch")]
pub(crate) fn loss_plot(path: &Path, title: &str, series: &[Series<'_>]) -> anyhow::Result<()> {
    let (x, y) = ("step", "loss");
    line_plot(path, &Labels { title, x, y }, series)
}

/// Draws `series`. Points that are not finite are left out. A file beside is renamed over `path`.
pub(crate) fn line_plot(
    path: &Path,
    labels: &Labels<'_>,
    series: &[Series<'_>],
) -> anyhow::Result<()> {
    let finite = |points: &[(u64, f64)]| -> Vec<(f64, f64)> {
        let finite = points.iter().filter(|(_, y)| y.is_finite());
        #[expect(clippy::cast_precision_loss, reason = "step counts are far below 2^52")]
        finite.map(|(x, y)| (*x as f64, *y)).collect()
    };
    let lines: Vec<(&str, Vec<(f64, f64)>)> = series
        .iter()
        .map(|(name, points)| (*name, finite(points)))
        .collect();
    let points = || lines.iter().flat_map(|(_, points)| points.iter().copied());
    let first = points().map(|p| p.0).fold(f64::INFINITY, f64::min);
    let last = points().map(|p| p.0).fold(f64::NEG_INFINITY, f64::max);
    let top = points().map(|p| p.1).fold(f64::NEG_INFINITY, f64::max);
    let bottom = points().map(|p| p.1).fold(0.0, f64::min);
    let (first, last) = if first < last {
        (first, last)
    } else {
        (0.0, 1.0_f64.max(last))
    };
    let top = if top > bottom { top } else { bottom + 1.0 };

    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        area.fill(&WHITE)?;
        let mut chart = ChartBuilder::on(&area)
            .caption(labels.title, ("sans-serif", 22))
            .margin(16)
            .x_label_area_size(44)
            .y_label_area_size(60)
            .build_cartesian_2d(first..last, bottom..top * 1.05)?;
        chart
            .configure_mesh()
            .x_desc(labels.x)
            .y_desc(labels.y)
            .x_label_formatter(&|x| format!("{x:.0}"))
            .light_line_style(WHITE)
            .label_style(("sans-serif", 14))
            .draw()?;
        for ((name, points), color) in lines.iter().zip(COLORS.iter().cycle()) {
            if points.is_empty() {
                continue;
            }
            let style = color.stroke_width(2);
            chart
                .draw_series(LineSeries::new(points.iter().copied(), style))?
                .label(*name)
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], style));
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperRight)
            .background_style(WHITE.mix(0.8))
            .border_style(BLACK.mix(0.3))
            .label_font(("sans-serif", 14))
            .draw()?;
        area.present()?;
    }
    let beside = path.with_extension("svg.tmp");
    fs_err::write(&beside, svg)?;
    fs_err::rename(&beside, path)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plot_is_an_svg_with_a_line_a_series_and_survives_odd_points() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("loss.svg");
        let labels = Labels {
            title: "run",
            x: "step",
            y: "loss",
        };
        let loss = (1..=50).map(|step| (step, 7.0 / step as f64)).collect();
        let eval = vec![(25, 1.0), (50, f64::NAN)];
        line_plot(
            &path,
            &labels,
            &[("loss", loss), ("eval_loss", eval), ("none", vec![])],
        )
        .unwrap();
        let svg = fs_err::read_to_string(&path).unwrap();
        assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"));
        assert!(
            ["eval_loss", "run", "step"]
                .iter()
                .all(|words| svg.contains(words))
        );
        line_plot(&path, &labels, &[("loss", vec![])]).unwrap();
        line_plot(&path, &labels, &[("loss", vec![(1, 2.0)])]).unwrap();
    }
}
