//! Reading a trace.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use crate::{DATA, LAUNCHES, Record, Region};

/// A trace on disk.
#[derive(Debug)]
pub struct Trace {
    dir: PathBuf,
    data: File,
}

impl Trace {
    /// Opens the trace in a folder.
    ///
    /// # Errors
    /// What the system says if there is none.
    pub fn open(dir: &Path) -> io::Result<Self> {
        Ok(Self { data: File::open(dir.join(DATA))?, dir: dir.to_owned() })
    }

    /// Its lines in order. A last line without an end, of a process that was killed, is left out.
    ///
    /// # Errors
    /// What the system says if they cannot be read; [`io::ErrorKind::InvalidData`] with the number of a line that is no record.
    pub fn records(&self) -> io::Result<Vec<Record>> {
        let text = fs::read_to_string(self.dir.join(LAUNCHES))?;
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        let parse = |(idx, line)| {
            let no_record =
                |error| io::Error::new(io::ErrorKind::InvalidData, format!("{LAUNCHES}, line {}: {error}", idx + 1));
            serde_json::from_str(line).map_err(no_record)
        };
        whole.lines().enumerate().map(parse).collect()
    }

    /// What a region held.
    ///
    /// # Errors
    /// What the system says if it cannot be read.
    pub fn bytes(&self, region: &Region) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; region.n_bytes as usize];
        self.data.read_exact_at(&mut bytes, region.at)?;
        Ok(bytes)
    }

    /// The machine code of that name.
    ///
    /// # Errors
    /// What the system says if it cannot be read.
    pub fn cubin(&self, name: &str) -> io::Result<Vec<u8>> {
        fs::read(self.dir.join(name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{BoxMap, Launch, Link, Place, Skipped, Value, Writer};

    fn launch(cubin: String, regions: Vec<Region>) -> Record {
        Record::Launch(Launch {
            kernel: "k.cu/k".to_owned(),
            variant: "X_KIND=1".to_owned(),
            cubin,
            entry: "k".to_owned(),
            grid: [7, 1, 2],
            block: 128,
            shared_bytes: 512,
            regions,
            links: vec![Link { at: Place { region: 0, offset: 8 }, to: Place { region: 2, offset: u64::MAX } }],
            args: vec![
                Value::Address(Place { region: 0, offset: 12 }),
                Value::Boxes {
                    matrix: Place { region: 1, offset: 32 },
                    map: BoxMap {
                        n_axes: 2,
                        size: [64, 1 << 40, 1, 1],
                        strides: [128, 16, 16],
                        box_size: [64, 256, 1, 1],
                    },
                },
                Value::Bits(0),
                Value::Bits(u64::MAX),
                Value::Bits(u64::from(f32::NAN.to_bits())),
            ],
        })
    }

    #[test]
    fn what_was_written_is_read_back() {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("deep/trace");
        let mut writer = Writer::create(&dir).unwrap();
        let code = [writer.cubin(b"one").unwrap(), writer.cubin(b"two").unwrap(), writer.cubin(b"one").unwrap()];
        assert!(code[0] == code[2] && code[0] != code[1]);
        let mut region = |bytes: &[u8], misalignment| Region {
            misalignment,
            n_bytes: bytes.len() as u64,
            at: writer.data(bytes).unwrap(),
            unwritten: misalignment > 0,
        };
        let regions = [region(b"first", 0), region(b"", 0), region(b"second", 48)];
        let records = [
            launch(code[0].clone(), regions.to_vec()),
            Record::Skipped(Skipped {
                kernel: "k.cu/k".to_owned(),
                variant: "X_KIND=0".to_owned(),
                grid: [1, 2, 3],
                reason: "too\nlarge".to_owned(),
            }),
            launch(code[1].clone(), Vec::new()),
        ];
        records.iter().for_each(|record| writer.record(record).unwrap());

        let trace = Trace::open(&dir).unwrap();
        assert_eq!(trace.records().unwrap(), records);
        let bytes = regions.map(|region| trace.bytes(&region).unwrap());
        assert_eq!(bytes, [&b"first"[..], b"", b"second"]);
        assert_eq!(trace.cubin(&code[1]).unwrap(), b"two");
        assert_eq!(Writer::create(&dir).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
    }

    #[test]
    fn a_line_cut_short_is_left_out_and_a_wrong_one_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let mut writer = Writer::create(folder.path()).unwrap();
        writer.record(&launch("a.cubin".to_owned(), Vec::new())).unwrap();
        let file = folder.path().join(LAUNCHES);
        let line = fs::read_to_string(&file).unwrap();
        fs::write(&file, format!("{line}{}", &line[..20])).unwrap();
        let trace = Trace::open(folder.path()).unwrap();
        assert_eq!(trace.records().unwrap().len(), 1);
        fs::write(&file, format!("{line}{{}}\n")).unwrap();
        let error = trace.records().unwrap_err().to_string();
        assert!(error.contains("line 2"), "{error}");
        assert!(Trace::open(&folder.path().join("absent")).is_err());
    }
}
