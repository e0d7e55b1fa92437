//! Plot of the axes: for each, CPU time and latency at the 99th percentile over a logarithmic axis, as SVG that follows
//! the reader's colour scheme.

use super::cache::Step;
use super::{Axis, Series};
use std::fmt::Write as _;

const WIDTH: f64 = 860.0;
const PANEL_WIDTH: f64 = 330.0;
const PANEL_HEIGHT: f64 = 120.0;
const LEFT: f64 = 70.0;
const GAP: f64 = 90.0;
const TOP: f64 = 62.0;
const ROW: f64 = 216.0;
/// Above this ratio of the largest and the smallest figure, the vertical axis is logarithmic.
const LINEAR_MAX: f64 = 12.0;

/// Colours that differ on white and on black, also by colour-blind readers.
const STYLE: &str = "text{font:12px system-ui,sans-serif;fill:#24292f}.title{font-size:14px;font-weight:600}\
    .minor{fill:#57606a;font-size:11px}.page{fill:#fff}.grid{stroke:#d0d7de}\
    .line{fill:none;stroke-width:2}.s0{stroke:#0969da}.s1{stroke:#bc4c00}.s2{stroke:#1a7f37}.s3{stroke:#8250df}.s4{stroke:#57606a}\
    .d0{fill:#0969da}.d1{fill:#bc4c00}.d2{fill:#1a7f37}.d3{fill:#8250df}.d4{fill:#57606a}\
    @media(prefers-color-scheme:dark){text{fill:#e6edf3}.minor{fill:#9198a1}.page{fill:#0d1117}.grid{stroke:#30363d}\
    .s0{stroke:#58a6ff}.s1{stroke:#f0883e}.s2{stroke:#3fb950}.s3{stroke:#bc8cff}.s4{stroke:#9198a1}\
    .d0{fill:#58a6ff}.d1{fill:#f0883e}.d2{fill:#3fb950}.d3{fill:#bc8cff}.d4{fill:#9198a1}}";

type Figure = fn(&Step) -> f64;

/// A vertical axis: linear from zero, or logarithmic between powers of ten.
struct Scale {
    low: f64,
    high: f64,
    logarithmic: bool,
}

pub(super) fn svg(axes: &[Axis]) -> String {
    let height = ROW * axes.len() as f64 + 10.0;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" height=\"{height}\">\n\
         <style>{STYLE}</style>\n<rect class=\"page\" width=\"100%\" height=\"100%\"/>\n"
    );
    for (number, axis) in axes.iter().enumerate() {
        let top = ROW * number as f64;
        row(&mut svg, axis, top);
    }
    svg.push_str("</svg>\n");
    svg
}

fn row(svg: &mut String, axis: &Axis, top: f64) {
    let _ = writeln!(
        svg,
        "<text class=\"title\" x=\"{LEFT}\" y=\"{}\">{}</text>",
        top + 22.0,
        escaped(axis.title)
    );
    let mut x = LEFT;
    for (number, series) in axis.series.iter().enumerate() {
        let name = escaped(series.name);
        let _ = writeln!(
            svg,
            "<rect class=\"d{number}\" x=\"{x:.0}\" y=\"{:.0}\" width=\"10\" height=\"10\"/>\
             <text x=\"{:.0}\" y=\"{:.0}\">{name}</text>",
            top + 30.0,
            x + 15.0,
            top + 39.0
        );
        x += 34.0 + 6.6 * series.name.len() as f64;
    }
    let (per, top) = (axis.per, top + TOP);
    let figures: [(String, Figure); 2] = [
        (format!("CPU µs per {per}"), |step| step.cpu_micros),
        (String::from("p99, ms"), |step| step.p99_ms),
    ];
    for (number, (title, figure)) in figures.iter().enumerate() {
        let left = LEFT + number as f64 * (PANEL_WIDTH + GAP);
        panel(svg, axis, title, *figure, (left, top));
    }
}

fn panel(svg: &mut String, axis: &Axis, title: &str, figure: Figure, (left, top): (f64, f64)) {
    let steps = || axis.series.iter().flat_map(|series| &series.steps);
    let scale = Scale::of(steps().map(figure));
    let (first, last) = steps().fold((f64::MAX, f64::MIN), |(first, last), step| {
        (first.min(step.at), last.max(step.at))
    });
    let bottom = top + PANEL_HEIGHT;
    let across = |at: f64| {
        let span = (last / first).ln();
        let part = if span > 0.0 { (at / first).ln() / span } else { 0.5 };
        left + part * PANEL_WIDTH
    };
    let _ = writeln!(
        svg,
        "<text class=\"minor\" x=\"{left}\" y=\"{:.0}\">{title}</text>",
        top - 6.0
    );
    for mark in scale.marks() {
        let y = bottom - scale.part(mark) * PANEL_HEIGHT;
        let _ = writeln!(
            svg,
            "<path class=\"grid\" d=\"M{left} {y:.1}H{}\"/>\
             <text class=\"minor\" x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
            left + PANEL_WIDTH,
            left - 6.0,
            y + 4.0,
            short(mark)
        );
    }
    if let Some(series) = axis.series.first() {
        for step in &series.steps {
            let _ = writeln!(
                svg,
                "<text class=\"minor\" x=\"{:.1}\" y=\"{:.0}\" text-anchor=\"middle\">{}</text>",
                across(step.at),
                bottom + 16.0,
                escaped(&step.label)
            );
        }
    }
    for (number, series) in axis.series.iter().enumerate() {
        let points = series.steps.iter();
        let points = points.map(|step| (across(step.at), bottom - scale.part(figure(step)) * PANEL_HEIGHT));
        line(svg, number, series, &points.collect::<Vec<_>>());
    }
}

fn line(svg: &mut String, number: usize, series: &Series, points: &[(f64, f64)]) {
    let path: Vec<String> = points.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
    let _ = writeln!(
        svg,
        "<polyline class=\"line s{number}\" points=\"{}\"><title>{}</title></polyline>",
        path.join(" "),
        escaped(series.name)
    );
    for (x, y) in points {
        let _ = writeln!(
            svg,
            "<circle class=\"d{number}\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3\"/>"
        );
    }
}

impl Scale {
    fn of(figures: impl Iterator<Item = f64>) -> Self {
        let (least, most) = figures.fold((f64::MAX, f64::MIN), |(least, most), figure| {
            (least.min(figure), most.max(figure))
        });
        if least > 0.0 && most / least > LINEAR_MAX {
            return Scale {
                low: 10_f64.powf(least.log10().floor()),
                high: 10_f64.powf(most.log10().ceil()),
                logarithmic: true,
            };
        }
        let unit = 10_f64.powf(most.log10().floor());
        let high = [1.0, 2.0, 4.0, 6.0, 8.0, 10.0].map(|multiple| multiple * unit);
        Scale {
            low: 0.0,
            high: high.into_iter().find(|high| *high >= most).unwrap_or(most),
            logarithmic: false,
        }
    }

    /// Position of a figure, from 0 to 1.
    fn part(&self, figure: f64) -> f64 {
        if self.logarithmic {
            (figure / self.low).ln() / (self.high / self.low).ln()
        } else {
            (figure - self.low) / (self.high - self.low)
        }
    }

    fn marks(&self) -> Vec<f64> {
        if !self.logarithmic {
            return [0.0, 0.5, 1.0].map(|part| part * self.high).into();
        }
        let decades = (self.high / self.low).log10().round();
        let step = 10_f64.powf((decades / 4.0).ceil());
        let marks = std::iter::successors(Some(self.low), |mark| Some(mark * step));
        marks.take_while(|mark| *mark <= self.high * 1.01).collect()
    }
}

fn short(figure: f64) -> String {
    match figure {
        large if large >= 1e6 => format!("{}M", large / 1e6),
        large if large >= 1e4 => format!("{}k", large / 1e3),
        small => format!("{}", (small * 1000.0).round() / 1000.0),
    }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}
