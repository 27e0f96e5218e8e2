//! `flowhn selftest`.

use serde_json::Value;

use crate::bench::flowhn;

/// Names and outcomes of all cases, by name, and the sums.
fn outcomes(args: &[&str]) -> (Vec<(String, String)>, [u64; 3]) {
    let out =
        flowhn(&[&["selftest", "--json", "--filter", "torch/function", "--filter", "fuse/merge"][..], args].concat());
    let json = out.json();
    out.done();
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let cases = json["cases"].as_array().unwrap();
    let mut outcomes: Vec<_> = cases.iter().map(|case| (text(&case["name"]), text(&case["outcome"]))).collect();
    outcomes.sort();
    (outcomes, ["passed", "failed", "not_run"].map(|key| json[key].as_u64().unwrap()))
}

#[test]
fn processes_side_by_side_run_the_cases_that_one_runs() {
    let (alone, sums) = outcomes(&[]);
    assert!(alone.len() > 30 && sums == [alone.len() as u64, 0, 0], "{} cases, {sums:?}", alone.len());
    assert_eq!(outcomes(&["--jobs", "3"]), (alone, sums));
}
