//! Files that are written whole or not at all.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use crate::error::{Error, Result};

/// Writes a file under a temporary name beside `path`, then renames it: whatever happens, `path` is what it was or complete, and
/// nothing else stays behind but what a killed process leaves.
pub fn write_whole(path: &Path, write: impl FnOnce(&mut BufWriter<&mut File>) -> std::io::Result<()>) -> Result<()> {
    let folder = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let fail = |e| Error::io(path, e);
    let mut file = tempfile::Builder::new().prefix(".phd-").tempfile_in(folder).map_err(fail)?;
    let mut out = BufWriter::new(file.as_file_mut());
    write(&mut out).and_then(|()| out.flush()).map_err(fail)?;
    drop(out);
    file.as_file().sync_all().map_err(fail)?;
    file.persist(path).map_err(|e| fail(e.error))?;
    // The name is durable once its folder is.
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(fail)
}
