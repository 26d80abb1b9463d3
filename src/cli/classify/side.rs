//! What `classify` writes beside answers: feature vectors in one file, heat maps as pictures in a folder.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{anyhow, bail};

use super::workers::Given;
use crate::cli::printable;
use crate::engine::ClassMaps;
use crate::files::{self, DraftFile};
use crate::infer::request::normalise;
use crate::infer::top_k::{Prediction, check_finite};
use crate::model::ModelDir;
use crate::pixels::Preprocessor;
use crate::pixels::heat::{Grid, overlay};

/// How features are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    /// NumPy's array: float32 `[images, width]`, a row an image in the order of the answers.
    Npy,
    /// A row an image: its name, then its values.
    Csv,
}

/// The file of --features. It appears when it is complete.
pub struct Features {
    draft: DraftFile,
    path: String,
    form: Form,
    width: usize,
    l2: bool,
    /// Images without features: their rows are NaN, or empty.
    missing: usize,
}

impl Features {
    /// Begins the file for so many images.
    pub fn create(path: &Path, model: &ModelDir, images: usize, l2: bool) -> anyhow::Result<Self> {
        let shown = printable::path(path);
        let Some(width) = model.manifest.features else {
            bail!(
                "--features: `{}` was folded without the output `features`; fold it again with --outputs logits,features",
                model.name
            );
        };
        let form = match path.extension().map(|e| e.to_string_lossy().to_ascii_lowercase()).as_deref() {
            Some("npy") => Form::Npy,
            Some("csv") => Form::Csv,
            Some("parquet") => bail!(
                "`{shown}`: Parquet is not written; write .npy, and convert it, as with pandas' DataFrame.to_parquet"
            ),
            _ => bail!("`{shown}` ends in neither .npy (NumPy) nor .csv; check --features"),
        };
        let draft = DraftFile::create(path).map_err(|e| anyhow!("can't write `{shown}`: {e}; check --features"))?;
        let mut file = Self { draft, path: shown, form, width: width as usize, l2, missing: 0 };
        match form {
            Form::Npy => file.write(&npy_head(images, file.width))?,
            Form::Csv => {
                let names = (0..file.width).map(|i| format!("f{i}"));
                let cells: Vec<String> = std::iter::once("image".to_string()).chain(names).collect();
                file.row(&cells.iter().map(String::as_bytes).collect::<Vec<_>>())?;
            }
        }
        Ok(file)
    }

    /// The next image's features; none where it has no answer.
    pub fn add(&mut self, image: &Path, values: Option<&[f32]>) -> anyhow::Result<()> {
        let values = values.filter(|values| values.len() == self.width && check_finite(values).is_ok());
        self.missing += usize::from(values.is_none());
        let mut values = values.map(<[f32]>::to_vec);
        if let Some(values) = values.as_mut().filter(|_| self.l2) {
            normalise(values);
        }
        match self.form {
            Form::Npy => {
                let values = values.unwrap_or_else(|| vec![f32::NAN; self.width]);
                self.write(&values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<_>>())
            }
            Form::Csv => {
                let texts: Vec<String> = match values {
                    Some(values) => values.iter().map(f32::to_string).collect(),
                    None => vec![String::new(); self.width],
                };
                let mut cells = vec![image.as_os_str().as_encoded_bytes()];
                cells.extend(texts.iter().map(String::as_bytes));
                self.row(&cells)
            }
        }
    }

    /// Everything is written. Says where, and what is missing in it.
    pub fn publish(self) -> anyhow::Result<String> {
        let Self { draft, path, form, width, missing, .. } = self;
        draft.publish().map_err(|e| anyhow!("can't write `{path}`: {e}; check --features"))?;
        let what = if form == Form::Npy { "NaN" } else { "empty" };
        Ok(match missing {
            0 => format!("wrote `{path}`: {width} features an image"),
            _ => format!("wrote `{path}`: {width} features an image; {what} for {missing} without an answer"),
        })
    }

    fn row(&mut self, cells: &[&[u8]]) -> anyhow::Result<()> {
        let mut writer = csv::Writer::from_writer(Vec::new());
        writer.write_record(cells)?;
        let row = writer.into_inner().map_err(|e| anyhow!("{e}"))?;
        self.write(&row)
    }

    fn write(&mut self, bytes: &[u8]) -> anyhow::Result<()> {
        let written = self.draft.write_all(bytes);
        written.map_err(|e| anyhow!("can't write `{}`: {e}; check --features", self.path))
    }
}

/// What stands before the numbers of NumPy's file (format 1.0), padded so that they begin at a multiple of 64 bytes.
fn npy_head(rows: usize, columns: usize) -> Vec<u8> {
    const BEFORE: usize = 10;
    let mut text = format!("{{'descr': '<f4', 'fortran_order': False, 'shape': ({rows}, {columns}), }}");
    let len = (BEFORE + text.len() + 1).next_multiple_of(64) - BEFORE;
    text.push_str(&" ".repeat(len - text.len() - 1));
    text.push('\n');
    let mut head = b"\x93NUMPY\x01\x00".to_vec();
    // a few dozen bytes, whatever the shape
    head.extend((len as u16).to_le_bytes());
    head.extend(text.into_bytes());
    head
}

/// The folder of --explain: a picture for each image, of its most probable class.
pub struct Heat<'a> {
    folder: PathBuf,
    maps: &'a ClassMaps,
    preprocessor: Preprocessor,
    sides: [usize; 2],
    digits: usize,
    written: usize,
}

impl<'a> Heat<'a> {
    /// Makes the folder for so many images.
    pub fn create(
        folder: &Path,
        model: &ModelDir,
        maps: Option<&'a Result<ClassMaps, &'static str>>,
        images: usize,
    ) -> anyhow::Result<Self> {
        let shown = printable::path(folder);
        if folder.is_file() {
            bail!("`{shown}` is a file; --explain takes the folder that pictures are written into, before the images");
        }
        let (Some([_, height, width]), Some(maps)) = (model.manifest.map, maps) else {
            bail!(
                "--explain: `{}` was folded without the output `map`; fold it again with --outputs logits,features,map",
                model.name
            );
        };
        let maps = maps.as_ref().map_err(|reason| {
            anyhow!(
                "--explain: `{}` has no class activation maps: {reason}, and a map is exact for means alone",
                model.name
            )
        })?;
        fs::create_dir_all(folder).map_err(|e| anyhow!("can't make `{shown}`: {e}; check --explain"))?;
        Ok(Self {
            folder: folder.into(),
            maps,
            preprocessor: Preprocessor::new(&model.manifest.preprocessing),
            sides: [height as usize, width as usize],
            digits: images.to_string().len(),
            written: 0,
        })
    }

    /// Writes the picture of image number `i`: `NUMBER-NAME.png`.
    pub fn add(&mut self, i: usize, image: &Path, given: &Given, class: &Prediction) -> anyhow::Result<()> {
        let [height, width] = self.sides;
        let values = self.maps.grid(class.index, &given.map).filter(|values| values.len() == height * width);
        let values = values.ok_or_else(|| anyhow!("the graph's map is not what the manifest says; fold it again"))?;
        let picture = overlay(&self.preprocessor, &given.input, &Grid { height, width, values });
        let picture = picture.map_err(|e| anyhow!("`{}` has no picture: {e}", printable::path(image)))?;
        let mut name = format!("{:0digits$}-", i + 1, digits = self.digits);
        name.extend(image.file_stem().unwrap_or_default().to_string_lossy().chars().take(100));
        let path = self.folder.join(name + ".png");
        files::write(&path, &picture)
            .map_err(|e| anyhow!("can't write `{}`: {e}; check --explain", printable::path(&path)))?;
        self.written += 1;
        Ok(())
    }

    /// What was written.
    pub fn summary(&self) -> String {
        format!("wrote {} pictures into `{}`", self.written, printable::path(&self.folder))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numpys_head_is_a_multiple_of_64() {
        for (rows, columns) in [(0, 1), (1, 512), (1_000_000_000, 65536)] {
            let head = npy_head(rows, columns);
            assert!(head.len().is_multiple_of(64) && head.ends_with(b"\n"));
            assert_eq!(usize::from(u16::from_le_bytes([head[8], head[9]])), head.len() - 10);
        }
    }
}
