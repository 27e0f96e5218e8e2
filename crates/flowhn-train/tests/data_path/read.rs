use std::path::Path;

use flowhn_train::data::{Document, Documents, Error, ReadOptions, Result};

use crate::fixture::{dir, write};

fn read(path: &Path) -> Result<Vec<Document>> {
    Documents::open(path, ReadOptions::default())?.collect()
}

fn texts(name: &str, bytes: impl AsRef<[u8]>) -> Vec<String> {
    let dir = dir();
    read(&write(&dir, name, bytes)).unwrap().into_iter().map(|document| document.text).collect()
}

/// The error that a file brings, after checking that it names the file.
fn error(name: &str, bytes: impl AsRef<[u8]>) -> Error {
    error_within(name, bytes, ReadOptions::default())
}

fn error_within(name: &str, bytes: impl AsRef<[u8]>, options: ReadOptions) -> Error {
    let dir = dir();
    let path = write(&dir, name, bytes);
    let error =
        Documents::open(&path, options).and_then(|documents| documents.collect::<Result<Vec<_>>>()).unwrap_err();
    assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
    error
}

fn zstd(bytes: &[u8]) -> Vec<u8> {
    zstd::encode_all(bytes, 3).unwrap()
}

const THREE: &str =
    "{\"text\": \"One.\"}\r\n\n  \n{\"id\": 7, \"text\": \"Tw\\u00f6\\n\"}\n{\"text\": \"Three, no line feed.\"}";

#[test]
fn json_lines_keep_order_text_and_line_numbers() {
    let dir = dir();
    let documents = read(&write(&dir, "a.jsonl", THREE)).unwrap();
    let expected = [("One.", 1), ("Twö\n", 4), ("Three, no line feed.", 5)];
    assert_eq!(documents, expected.map(|(text, line)| Document { text: text.to_owned(), line }));
}

#[test]
fn zstd_reads_like_plain_text_also_in_several_frames() {
    let dir = dir();
    let plain = read(&write(&dir, "a.jsonl", THREE)).unwrap();
    assert_eq!(read(&write(&dir, "a.jsonl.zst", zstd(THREE.as_bytes()))).unwrap(), plain);
    let (first, second) = THREE.split_at(30);
    let frames = [zstd(first.as_bytes()), zstd(second.as_bytes())].concat();
    assert_eq!(read(&write(&dir, "b.jsonl.zst", frames)).unwrap(), plain);
    assert_eq!(texts("c.txt.zst", zstd(b"a\n\nb\n")), ["a\n\nb\n"]);
}

#[test]
fn a_text_file_is_one_document_to_the_byte() {
    assert_eq!(texts("a.txt", "First.\r\n\r\n\n Second.\n"), ["First.\r\n\r\n\n Second.\n"]);
}

#[test]
fn a_byte_order_mark_is_dropped() {
    assert_eq!(texts("a.txt", "\u{FEFF}Text."), ["Text."]);
    assert_eq!(texts("a.jsonl", "\u{FEFF}{\"text\": \"T\"}"), ["T"]);
}

#[test]
fn documents_without_words_are_left_out_and_counted() {
    let dir = dir();
    let path = write(&dir, "a.jsonl", "{\"text\": \"\"}\n{\"text\": \"x\"}\n{\"text\": \" \\n\"}\n");
    let mut documents = Documents::open(&path, ReadOptions::default()).unwrap();
    assert_eq!(documents.by_ref().map(|d| d.unwrap().line).collect::<Vec<_>>(), [2]);
    assert_eq!(documents.n_empty(), 2);
    assert_eq!(documents.bytes_read(), documents.bytes_total());
}

#[test]
fn a_path_that_is_no_file_is_refused() {
    let dir = dir();
    let missing = read(&dir.path().join("no.jsonl")).unwrap_err();
    assert!(matches!(missing, Error::Missing { .. }), "{missing}");
    assert!(missing.to_string().contains("no.jsonl: no such file; check the path"), "{missing}");
    let directory = read(dir.path()).unwrap_err();
    assert!(matches!(directory, Error::NotAFile { .. }), "{directory}");
    assert!(matches!(error("a.csv", "text"), Error::UnknownFormat { .. }));
    assert!(matches!(error("a.json.zst", zstd(b"{}")), Error::UnknownFormat { .. }));
}

#[test]
fn files_without_text_are_refused() {
    for (name, bytes) in [("a.jsonl", vec![]), ("a.txt", vec![]), ("a.jsonl.zst", vec![]), ("a.jsonl.zst", zstd(b""))] {
        assert!(matches!(error(name, bytes), Error::Empty { .. }), "{name}");
    }
    assert!(matches!(error("a.jsonl", "\n \n"), Error::NoDocuments { n_empty: 0, .. }));
    assert!(matches!(error("a.jsonl", "{\"text\":\" \"}\n{\"text\":\"\"}"), Error::NoDocuments { n_empty: 2, .. }));
    assert!(matches!(error("a.txt", "\n\n"), Error::NoDocuments { n_empty: 1, .. }));
    assert!(matches!(error("a.txt", "\u{FEFF}"), Error::NoDocuments { n_empty: 0, .. }));
}

#[test]
fn binary_files_are_told_by_their_first_bytes() {
    let cases: [(&[u8], &str); 6] = [
        (&[0x1F, 0x8B, 8, 0, 0], "gzip"),
        (&[0x28, 0xB5, 0x2F, 0xFD, 1], ".zst"),
        (b"PK\x03\x04 and more", "zip"),
        (b"PAR1 and more", "Parquet"),
        (b"\xFF\xFEa\0b\0", "UTF-16"),
        (b"%PDF-1.7", "PDF"),
    ];
    for (bytes, word) in cases {
        for name in ["a.jsonl", "a.txt"] {
            let error = error(name, bytes);
            assert!(matches!(error, Error::Binary { line: 1, offset: 0, .. }), "{error}");
            assert!(error.to_string().contains(word), "{error}");
        }
    }
    // Packed twice: what is inside the zstd data is looked at too.
    assert!(matches!(error("a.jsonl.zst", zstd(&zstd(b"{}"))), Error::Binary { .. }));
}

#[test]
fn nul_bytes_are_named_with_their_place() {
    let text = b"{\"text\": \"a\"}\n{\"text\": \"b\0c\"}\n";
    assert!(matches!(error("a.jsonl", text), Error::Binary { line: 2, offset: 25, .. }));
    assert!(matches!(error("a.txt", "one\ntwo\nth\0ree"), Error::Binary { line: 3, offset: 10, .. }));
    // Found before the length limit, which binary data without line feeds would run into.
    let zeros =
        error_within("a.jsonl", [b"ab".to_vec(), vec![0; 100]].concat(), ReadOptions { max_document_bytes: 10 });
    assert!(matches!(zeros, Error::Binary { line: 1, offset: 2, .. }), "{zeros}");
    // An escaped NUL is text like any other.
    assert_eq!(texts("a.jsonl", "{\"text\": \"a\\u0000b\"}"), ["a\0b"]);
}

#[test]
fn invalid_utf8_is_named_with_its_place() {
    assert!(matches!(
        error("a.jsonl", b"{\"text\": \"a\"}\n{\"text\": \"\xFF\"}\n"),
        Error::Utf8 { line: 2, offset: 24, .. }
    ));
    assert!(matches!(error("a.txt", b"\xEF\xBB\xBFone\ntwo \xC3("), Error::Utf8 { line: 2, offset: 11, .. }));
    assert!(matches!(error("a.txt", b"cut off \xE2\x82"), Error::Utf8 { line: 1, offset: 8, .. }));
    let error = error("a.txt.zst", zstd(b"x\nlatin \xE9\n"));
    assert!(matches!(error, Error::Utf8 { line: 2, offset: 8, .. }), "{error}");
    assert!(error.to_string().contains("iconv"));
}

#[test]
fn long_documents_are_refused_by_line_and_limit() {
    let limit = ReadOptions { max_document_bytes: 40 };
    let line = format!("{{\"text\": \"{}\"}}", "x".repeat(40 - 12));
    assert_eq!(line.len(), 40);
    let dir = dir();
    let fits = write(&dir, "fits.jsonl", format!("{line}\n{line}\n"));
    assert_eq!(Documents::open(&fits, limit).unwrap().count(), 2);
    let error = error_within("a.jsonl", format!("{line}\n {line}\n"), limit);
    assert!(matches!(error, Error::DocumentTooLong { line: 2, limit: 40, .. }), "{error}");
    assert!(matches!(error_within("a.txt", "y".repeat(41), limit), Error::DocumentTooLong { line: 1, .. }));
    // A line longer than every buffer, which must not be collected first.
    let huge = zstd(&vec![b'z'; 3 << 20]);
    assert!(matches!(error_within("a.jsonl.zst", huge, limit), Error::DocumentTooLong { line: 1, .. }));
}

#[test]
fn lines_that_are_no_records_are_named() {
    let good = "{\"text\": \"fine\"}\n";
    let json = |line: &str| match error("a.jsonl", format!("{good}{line}\n")) {
        Error::Json { line: 2, message, .. } => message,
        other => panic!("{line}: {other}"),
    };
    assert!(json("{\"text\": \"cut").contains("column"));
    assert!(json("{'text': 1}").contains("column 2"));
    assert!(json("plain words").contains("column"));
    assert!(json("{\"text\": \"a\"} {\"text\": \"b\"}").contains("trailing"));
    json("{\"text\": \"\\ud800\"}");
    json(&"[".repeat(10_000));

    let shape = |line: &str| match error("a.jsonl", format!("{good}\n{line}\n")) {
        Error::NoText { line: 3, found, .. } => found,
        other => panic!("{line}: {other}"),
    };
    assert!(shape("{\"content\": \"a\", \"id\": 1}").contains("keys: \"content\", \"id\""));
    assert!(shape("{}").contains("keys: none"));
    assert!(shape("{\"text\": 5}").contains("is a number"));
    assert!(shape("{\"text\": null}").contains("is null"));
    assert!(shape("{\"text\": [\"a\"]}").contains("is an array"));
    assert!(shape("\"text\"").contains("the line is a string"));
    assert!(shape("{\"text\": \"a\", \"text\": \"b\"}").contains("more than once"));
}

#[test]
fn broken_zstd_data_is_refused_wherever_it_breaks() {
    let lines: String = (0..5000).map(|i| format!("{{\"text\": \"line {i} of {}\"}}\n", i * 7919 % 1000)).collect();
    let whole = zstd(lines.as_bytes());
    for cut in [5, 10, whole.len() / 3, whole.len() - 1] {
        let error = error("a.jsonl.zst", &whole[..cut]);
        let Error::Compressed { message, .. } = &error else { panic!("{cut}: {error}") };
        assert!(message.contains("middle of a frame"), "{error}");
    }
    let mut corrupt = whole.clone();
    let middle = corrupt.len() / 2;
    corrupt[middle..middle + 64].fill(0xFF);
    let broken = error("a.jsonl.zst", &corrupt);
    // Whatever the damage does to the frame, the reader says where it was and stops.
    assert!(matches!(broken, Error::Compressed { .. } | Error::Utf8 { .. } | Error::Binary { .. }), "{broken}");
    assert!(matches!(error("a.jsonl.zst", [&whole[..], b"tail"].concat()), Error::Compressed { line: 5000, .. }));
    assert!(matches!(error("a.jsonl.zst", lines), Error::Compressed { line: 0, .. }));
}

#[test]
fn the_first_error_ends_the_iteration() {
    let dir = dir();
    let path = write(&dir, "a.jsonl", "{\"text\": \"a\"}\nno\n{\"text\": \"b\"}\n");
    let mut documents = Documents::open(&path, ReadOptions::default()).unwrap();
    assert!(documents.next().unwrap().is_ok());
    assert!(documents.next().unwrap().is_err());
    assert!(documents.next().is_none());
}
