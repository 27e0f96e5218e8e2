//! The one kind of failure a person sees: what went wrong, and what to do about it.

use std::fmt;

/// What every chore returns.
pub type Result<T> = std::result::Result<T, Fail>;

/// A message and its remedy, printed once, when the program ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fail {
    what: String,
    help: Option<String>,
    code: u8,
}

impl Fail {
    /// A failure that says what went wrong (exit code 1).
    pub fn new(what: impl Into<String>) -> Self {
        Self { what: what.into(), help: None, code: 1 }
    }

    /// A command line that makes no sense (exit code 2).
    pub fn usage(what: impl Into<String>) -> Self {
        Self { code: 2, ..Self::new(what) }
    }

    /// A file operation that the system refused.
    pub fn io(doing: impl fmt::Display, error: &std::io::Error) -> Self {
        Self::new(format!("cannot {doing}: {error}"))
    }

    /// Adds the remedy.
    pub fn help(mut self, help: impl Into<String>) -> Self {
        self.help = Some(help.into());
        self
    }

    /// The exit code to end with.
    pub fn code(&self) -> u8 {
        self.code
    }
}

impl fmt::Display for Fail {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "error: {}", self.what)?;
        if let Some(help) = &self.help {
            for (idx, line) in help.lines().enumerate() {
                let lead = if idx == 0 { "  help: " } else { "        " };
                write!(f, "\n{lead}{line}")?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_remedy_follows_the_message_line_by_line() {
        let fail = Fail::new("no compiler").help("install one:\n  apt install g++");
        assert_eq!(fail.to_string(), "error: no compiler\n  help: install one:\n          apt install g++");
        assert_eq!((fail.code(), Fail::usage("what?").code()), (1, 2));
    }
}
