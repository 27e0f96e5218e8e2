//! TOML files with overrides, read strictly: an unknown key is an error that names the nearest valid one.

use std::fs;
use std::path::Path;

use serde::de::DeserializeOwned;
use toml::{Table, Value};

use crate::{Error, Result};

/// Files that may stand on one another by `base`.
const MAX_BASES: usize = 8;

/// Reads a TOML file and applies overrides of the form `a.b=c`, where `c` is a TOML value or, failing that, a string.
///
/// A key `base = "other.toml"` at the top of the file stands for all that the other file says, whose path starts at this one's
/// folder; what this file says itself goes before.
///
/// # Errors
/// [`Error::Read`], [`Error::Toml`], or [`Error::Override`] with the override at fault.
pub fn load_table(path: &Path, sets: &[String]) -> Result<Table> {
    let mut table = with_base(path, MAX_BASES)?;
    for set in sets {
        apply_override(&mut table, set)?;
    }
    Ok(table)
}

/// A file over its base, of which there may be `depth` more.
fn with_base(path: &Path, depth: usize) -> Result<Table> {
    let text = fs::read_to_string(path).map_err(|source| Error::Read { path: path.to_owned(), source })?;
    let invalid = |message: String| Error::Toml { path: path.to_owned(), message };
    let own: Table = text.parse().map_err(|error: toml::de::Error| invalid(error.to_string()))?;
    let base = match own.get("base") {
        None => return Ok(own),
        Some(Value::String(base)) => path.parent().unwrap_or(Path::new("")).join(base),
        Some(other) => return Err(invalid(format!("base is {other}, expected the name of a file"))),
    };
    if depth == 0 {
        return Err(invalid(format!("more than {MAX_BASES} files stand on one another by `base`, or in a circle")));
    }
    let mut table = with_base(&base, depth - 1)?;
    lay_over(&mut table, own);
    table.remove("base");
    Ok(table)
}

/// Puts the values of `over` in the place of those of `table`, section by section.
fn lay_over(table: &mut Table, over: Table) {
    for (key, value) in over {
        match (table.get_mut(&key), value) {
            (Some(Value::Table(below)), Value::Table(above)) => lay_over(below, above),
            (_, value) => {
                table.insert(key, value);
            }
        }
    }
}

/// Reads a table into `T`, which should deny unknown fields.
///
/// # Errors
/// [`Error::UnknownKey`] with the nearest valid key, or [`Error::Value`] with the full key.
pub fn from_table<T: DeserializeOwned>(table: Table) -> Result<T> {
    serde_path_to_error::deserialize(table).map_err(|error| {
        let path = error.path().to_string();
        // toml repeats the location that the path already tells; the first line is the cause.
        let message = error.into_inner().to_string().trim().lines().next().unwrap_or_default().to_owned();
        match unknown_field(&message) {
            Some((field, valid)) => Error::UnknownKey { key: full_key(&path, field), hint: hint(field, &valid) },
            None if path == "." => Error::value("configuration", message),
            None => Error::value(path, message),
        }
    })
}

/// Sets one key; missing tables on the way are made, so that the strict reading judges the key.
fn apply_override(table: &mut Table, set: &str) -> Result<()> {
    let refuse = |message: &str| Error::Override { set: set.to_owned(), message: message.to_owned() };
    let (key, text) = set.split_once('=').ok_or_else(|| refuse("expected key=value, as in train.lr=1e-3"))?;
    let parts: Vec<&str> = key.trim().split('.').collect();
    if parts.iter().any(|part| part.is_empty()) {
        return Err(refuse("the key has an empty part"));
    }
    let (last, parents) = parts.split_last().ok_or_else(|| refuse("the key is empty"))?;
    let mut place = table;
    for parent in parents {
        place = place
            .entry(*parent)
            .or_insert_with(|| Value::Table(Table::new()))
            .as_table_mut()
            .ok_or_else(|| refuse(&format!("`{parent}` is a value, not a section")))?;
    }
    place.insert((*last).to_owned(), parse_value(text.trim()));
    Ok(())
}

/// A TOML value; text that is none, such as a bare word or a path, is a string.
fn parse_value(text: &str) -> Value {
    match format!("value = {text}").parse::<Table>() {
        Ok(mut parsed) if parsed.len() == 1 => parsed.remove("value").unwrap_or_else(|| Value::String(text.to_owned())),
        _ => Value::String(text.to_owned()),
    }
}

/// The field and the valid fields of serde's message ``unknown field `x`, expected one of `a`, `b` ``.
fn unknown_field(message: &str) -> Option<(&str, Vec<&str>)> {
    let rest = message.strip_prefix("unknown field `")?;
    let (field, rest) = rest.split_once('`')?;
    let valid = rest.split('`').skip(1).step_by(2).collect();
    Some((field, valid))
}

fn full_key(path: &str, field: &str) -> String {
    match path {
        "." | "" => field.to_owned(),
        _ if path == field || path.ends_with(&format!(".{field}")) => path.to_owned(),
        _ => format!("{path}.{field}"),
    }
}

fn hint(field: &str, valid: &[&str]) -> String {
    let nearest = valid.iter().max_by(|a, b| strsim::jaro_winkler(field, a).total_cmp(&strsim::jaro_winkler(field, b)));
    match nearest {
        Some(key) => format!(": did you mean `{key}`? (valid here: {})", valid.join(", ")),
        None => ": no key is valid here".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[derive(Debug, Deserialize, PartialEq)]
    #[serde(deny_unknown_fields)]
    struct Outer {
        inner: Inner,
    }

    #[derive(Debug, Deserialize, PartialEq)]
    #[serde(deny_unknown_fields)]
    struct Inner {
        n_heads: usize,
        name: Option<String>,
    }

    fn read(text: &str, sets: &[&str]) -> Result<Outer> {
        let mut table: Table = text.parse().unwrap();
        for set in sets {
            apply_override(&mut table, set)?;
        }
        from_table(table)
    }

    #[test]
    fn unknown_keys_get_the_nearest_valid_one() {
        let message = read("[inner]\nn_head = 3", &[]).unwrap_err().to_string();
        assert!(message.starts_with("unknown key `inner.n_head`: did you mean `n_heads`?"), "{message}");
        let message = read("iner = 1", &[]).unwrap_err().to_string();
        assert!(message.starts_with("unknown key `iner`: did you mean `inner`?"), "{message}");
    }

    #[test]
    fn wrong_types_name_the_full_key() {
        let message = read("[inner]\nn_heads = \"many\"", &[]).unwrap_err().to_string();
        assert!(message.starts_with("`inner.n_heads`: invalid type"), "{message}");
        let message = read("[inner]\nname = \"x\"", &[]).unwrap_err().to_string();
        assert!(message.contains("missing field `n_heads`"), "{message}");
    }

    #[test]
    fn overrides_are_values_or_strings() {
        let outer = read("[inner]\nn_heads = 1", &["inner.n_heads=4", "inner.name=runs/a b"]).unwrap();
        assert_eq!(outer, Outer { inner: Inner { n_heads: 4, name: Some("runs/a b".into()) } });
        let quoted = read("[inner]\nn_heads = 1", &["inner.name=\"4\""]).unwrap();
        assert_eq!(quoted.inner.name.as_deref(), Some("4"));
    }

    #[test]
    fn a_file_may_stand_on_another() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str, text: &str| fs::write(dir.path().join(name), text).unwrap();
        file("base.toml", "[inner]\nn_heads = 1\nname = \"a\"");
        file("top.toml", "base = \"base.toml\"\n[inner]\nn_heads = 2");
        let read = |sets: &[String]| from_table::<Outer>(load_table(&dir.path().join("top.toml"), sets)?);
        assert_eq!(read(&[]).unwrap().inner, Inner { n_heads: 2, name: Some("a".into()) });
        assert_eq!(read(&["inner.n_heads=3".to_owned()]).unwrap().inner.n_heads, 3);
        file("base.toml", "base = \"top.toml\"");
        assert!(read(&[]).unwrap_err().to_string().contains("in a circle"));
        file("base.toml", "base = 3");
        assert!(read(&[]).unwrap_err().to_string().contains("base is 3"));
        file("top.toml", "base = \"nowhere.toml\"");
        assert!(read(&[]).unwrap_err().to_string().contains("nowhere.toml"));
    }

    #[test]
    fn bad_overrides_are_named() {
        for set in ["inner.n_heads", "=4", "inner..x=1", "inner.n_heads.x=1"] {
            let error = read("[inner]\nn_heads = 1", &[set]).unwrap_err();
            assert!(error.to_string().contains(set), "{error}");
        }
        let unknown = read("[inner]\nn_heads = 1", &["inner.n_kv=2"]).unwrap_err().to_string();
        assert!(unknown.contains("inner.n_kv"), "{unknown}");
    }
}
