//! Files that are written whole or not at all.

use std::fs::File;
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;

use crate::error::{Error, Result, invalid};

/// A file under a temporary name beside its target, which is what it was until [`WholeFile::finish`]. Dropping it removes it; only a
/// killed process leaves it behind.
pub struct WholeFile {
    target: PathBuf,
    file: NamedTempFile,
}

impl WholeFile {
    /// # Errors
    /// `Io` naming the folder or the target, `InvalidArgument` for a target that is no regular file.
    pub fn create(target: &Path) -> Result<WholeFile> {
        let io = |e| Error::io(target, e);
        // A link is followed, so that what it points to is replaced.
        let existing = match std::fs::metadata(target) {
            Ok(m) if !m.is_file() => return Err(invalid!("{}: is not a regular file", target.display())),
            Ok(m) => Some(m.permissions()),
            Err(e) if e.kind() == ErrorKind::NotFound => None,
            Err(e) => return Err(io(e)),
        };
        let target = if existing.is_some() { target.canonicalize().map_err(io)? } else { target.to_owned() };
        let folder = folder_of(&target);
        let mut builder = tempfile::Builder::new();
        builder.prefix(".phd-").suffix(".tmp");
        #[cfg(unix)]
        let new_file = std::os::unix::fs::PermissionsExt::from_mode(0o666); // less the umask
        #[cfg(unix)]
        builder.permissions(new_file);
        let file = builder.tempfile_in(folder).map_err(|e| Error::io(folder, e))?;
        if let Some(permissions) = existing {
            file.as_file().set_permissions(permissions).map_err(|e| Error::io(&target, e))?;
        }
        Ok(WholeFile { target, file })
    }

    pub fn target(&self) -> &Path {
        &self.target
    }

    pub fn write(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.file.as_file_mut().write_all(bytes)
    }

    /// Waits until everything is on the disk, then gives the file the target's name.
    ///
    /// # Errors
    /// `Io` naming the target or its folder.
    pub fn finish(self) -> Result<()> {
        let io = |e| Error::io(&self.target, e);
        self.file.as_file().sync_all().map_err(io)?;
        self.file.persist(&self.target).map_err(|e| io(e.error))?;
        sync_folder(folder_of(&self.target))
    }
}

/// All of a file at once.
pub fn write_whole(target: &Path, bytes: &[u8]) -> Result<()> {
    let mut file = WholeFile::create(target)?;
    file.write(bytes).map_err(|e| Error::io(target, e))?;
    file.finish()
}

fn folder_of(file: &Path) -> &Path {
    file.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// A new name survives a power cut only when the folder is on the disk as well.
fn sync_folder(folder: &Path) -> Result<()> {
    if cfg!(unix) {
        match File::open(folder).and_then(|f| f.sync_all()) {
            // Some network file systems do not offer it.
            Err(e) if !matches!(e.kind(), ErrorKind::InvalidInput | ErrorKind::Unsupported) => {
                return Err(Error::io(folder, e));
            }
            _ => {}
        }
    }
    Ok(())
}
