use std::io::{BufRead, ErrorKind};
use std::path::{Path, PathBuf};

use super::super::{Error, Result};

/// Lines of UTF-8 text with their numbers; everything that is not text is refused with its place.
pub(super) struct Lines {
    reader: Box<dyn BufRead + Send>,
    path: PathBuf,
    limit: usize,
    compressed: bool,
    /// Complete lines handed out.
    n_lines: u64,
    /// Bytes consumed from the reader.
    offset: u64,
    buffer: Vec<u8>,
}

const UTF8_MARK: &[u8] = b"\xEF\xBB\xBF";
const RENAME_ZST: &str = "give it the ending .zst";
const UNPACK: &str = "unpack it, or convert it to JSON lines with a \"text\" key";

/// First bytes of what people feed by mistake.
const MAGIC: &[(&[u8], &str, &str)] = &[
    (&[0x28, 0xB5, 0x2F, 0xFD], "zstd data", RENAME_ZST),
    (&[0x1F, 0x8B], "gzip data", UNPACK),
    (b"PK\x03\x04", "a zip archive", UNPACK),
    (b"\xFD7zXZ", "xz data", UNPACK),
    (b"BZh", "bzip2 data", UNPACK),
    (b"PAR1", "a Parquet file", UNPACK),
    (b"%PDF", "a PDF document", UNPACK),
    (b"\x89PNG", "an image", UNPACK),
    (b"\x7FELF", "a program", UNPACK),
    (&[0xFF, 0xFE], "UTF-16 text", "convert it to UTF-8, for example with iconv"),
    (&[0xFE, 0xFF], "UTF-16 text", "convert it to UTF-8, for example with iconv"),
];

impl Lines {
    /// Looks at the first bytes; fails on an empty stream or one that starts like another format.
    pub(super) fn new(reader: Box<dyn BufRead + Send>, path: &Path, limit: usize, compressed: bool) -> Result<Self> {
        let mut lines =
            Lines { reader, path: path.to_owned(), limit, compressed, n_lines: 0, offset: 0, buffer: Vec::new() };
        let first = match lines.reader.fill_buf() {
            Ok(first) => first,
            Err(error) => return Err(lines.read_error(error)),
        };
        if first.is_empty() {
            return Err(Error::Empty { path: lines.path });
        }
        if let Some(&(_, what, remedy)) = MAGIC.iter().find(|(magic, ..)| first.starts_with(magic)) {
            return Err(Error::Binary { path: lines.path, line: 1, offset: 0, what, remedy });
        }
        if first.starts_with(UTF8_MARK) {
            lines.reader.consume(UTF8_MARK.len());
            lines.offset = UTF8_MARK.len() as u64;
        }
        Ok(lines)
    }

    /// The next line without its line feed, and its number from 1.
    pub(super) fn next_line(&mut self) -> Result<Option<(u64, &str)>> {
        let start = self.offset;
        if !self.fill(Some(b'\n'))? {
            return Ok(None);
        }
        self.n_lines += 1;
        match std::str::from_utf8(&self.buffer) {
            Ok(line) => Ok(Some((self.n_lines, line))),
            Err(error) => Err(Error::Utf8 {
                path: self.path.clone(),
                line: self.n_lines,
                offset: start + error.valid_up_to() as u64,
            }),
        }
    }

    /// Everything that has not been read yet, as one text.
    pub(super) fn rest(&mut self) -> Result<Option<String>> {
        let start = self.offset;
        if !self.fill(None)? {
            return Ok(None);
        }
        String::from_utf8(std::mem::take(&mut self.buffer)).map(Some).map_err(|error| {
            let valid = error.utf8_error().valid_up_to();
            let line = 1 + count_lines(&error.as_bytes()[..valid]);
            Error::Utf8 { path: self.path.clone(), line, offset: start + valid as u64 }
        })
    }

    /// Reads up to and including `end` (or everything) into the buffer, which then lacks `end`; false at the end.
    fn fill(&mut self, end: Option<u8>) -> Result<bool> {
        self.buffer.clear();
        let mut any = false;
        loop {
            let chunk = match self.reader.fill_buf() {
                Ok(chunk) => chunk,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) => return Err(self.read_error(error)),
            };
            if chunk.is_empty() {
                return Ok(any);
            }
            any = true;
            let found = end.and_then(|end| chunk.iter().position(|&byte| byte == end));
            let text = &chunk[..found.unwrap_or(chunk.len())];
            if let Some(nul) = text.iter().position(|&byte| byte == 0) {
                return Err(Error::Binary {
                    path: self.path.clone(),
                    line: 1 + self.n_lines + count_lines(&self.buffer) + count_lines(&text[..nul]),
                    offset: self.offset + nul as u64,
                    what: "a NUL byte",
                    remedy: "the file is binary or damaged; convert it to UTF-8 text or leave it out",
                });
            }
            if self.buffer.len() + text.len() > self.limit {
                let line = 1 + self.n_lines;
                return Err(Error::DocumentTooLong { path: self.path.clone(), line, limit: self.limit });
            }
            self.buffer.extend_from_slice(text);
            let used = text.len() + usize::from(found.is_some());
            self.offset += used as u64;
            self.reader.consume(used);
            if found.is_some() {
                return Ok(true);
            }
        }
    }

    fn read_error(&self, error: std::io::Error) -> Error {
        // An error of the operating system has a code; one without comes from the decoder.
        if self.compressed && error.raw_os_error().is_none() {
            let message = match error.kind() {
                ErrorKind::UnexpectedEof => "the file ends in the middle of a frame".to_owned(),
                _ => error.to_string(),
            };
            Error::Compressed { path: self.path.clone(), line: self.n_lines, message }
        } else {
            Error::io(&self.path, "read")(error)
        }
    }
}

fn count_lines(bytes: &[u8]) -> u64 {
    bytes.iter().filter(|&&byte| byte == b'\n').count() as u64
}
