//! Numbers as people read them.

use std::time::Duration;

/// A count with a decimal prefix: `1.23 M`.
pub fn count(value: f64) -> String {
    prefixed(value, 1000., &["", " k", " M", " G", " T", " P"])
}

/// A count whose unit follows: a count without a prefix needs the space that the prefix brings.
pub fn spaced(count: String) -> String {
    if count.ends_with(|c: char| c.is_ascii_digit()) { count + " " } else { count }
}

/// Bytes with a decimal prefix: `4.2 GB`.
pub fn bytes(value: u64) -> String {
    prefixed(value as f64, 1000., &[" B", " kB", " MB", " GB", " TB", " PB"])
}

fn prefixed(value: f64, base: f64, units: &[&str]) -> String {
    let (mut value, mut units) = (value, units);
    // What would print as 1000 of a unit is 1.00 of the next.
    while value >= base - 0.5 && units.len() > 1 {
        (value, units) = (value / base, &units[1..]);
    }
    let decimals = match value {
        _ if value.fract() == 0. => 0,
        _ if value < 9.995 => 2,
        _ if value < 99.95 => 1,
        _ => 0,
    };
    format!("{value:.decimals$}{}", units[0])
}

/// A whole number with its thousands apart: `1,228,800`.
pub fn grouped(value: u64) -> String {
    let digits = value.to_string();
    let groups: Vec<&str> = digits.as_bytes().rchunks(3).rev().filter_map(|group| str::from_utf8(group).ok()).collect();
    groups.join(",")
}

/// Seconds as a duration: `0.4 s`, `72 s`, `12 min`, `3 h 20 min`.
pub fn seconds(value: f64) -> String {
    // A duration beyond what fits is past all planning anyway.
    let whole = Duration::try_from_secs_f64(value.max(0.)).map_or(u64::MAX, |duration| duration.as_secs());
    match whole {
        0..10 => format!("{value:.1} s"),
        10..120 => format!("{value:.0} s"),
        120..7200 => format!("{:.0} min", value / 60.),
        7200..172_800 => format!("{} h {:02} min", whole / 3600, whole % 3600 / 60),
        _ => format!("{:.1} days", value / 86_400.),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_well() {
        assert_eq!(
            [0., 7., 999., 1234., 999_999., 12_345_678.].map(count),
            ["0", "7", "999", "1.23 k", "1.00 M", "12.3 M"]
        );
        assert_eq!([0, 512, 4_200_000].map(bytes), ["0 B", "512 B", "4.20 MB"]);
        assert_eq!([0, 999, 1000, 1_228_800].map(grouped), ["0", "999", "1,000", "1,228,800"]);
        assert_eq!(
            [0.42, 72.3, 600., 12_000., 1e6].map(seconds),
            ["0.4 s", "72 s", "10 min", "3 h 20 min", "11.6 days"]
        );
    }
}
