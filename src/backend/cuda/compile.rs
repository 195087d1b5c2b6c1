//! The kernels' sources, compiled for a GPU when one is first used: by NVRTC, found at run time, and kept on disk.

use std::ffi::{CStr, CString};
use std::io::Write;
use std::path::{Path, PathBuf};

use cudarc::nvrtc::result::{self as nvrtc, NvrtcError};
use cudarc::nvrtc::sys;
use xxhash_rust::xxh3::xxh3_128;

use crate::error::{Error, Result};

/// One translation unit, in this order.
const SOURCES: [(&str, &str); 7] = [
    ("device.cuh", include_str!("../../../kernels/device.cuh")),
    ("params.cuh", include_str!("../../../kernels/params.cuh")),
    ("activations.cuh", include_str!("../../../kernels/activations.cuh")),
    ("linear.cu", include_str!("../../../kernels/linear.cu")),
    ("attention.cu", include_str!("../../../kernels/attention.cu")),
    ("elementwise.cu", include_str!("../../../kernels/elementwise.cu")),
    ("sampling.cu", include_str!("../../../kernels/sampling.cu")),
];

/// The sources as NVRTC sees them; messages name the files.
pub fn source() -> String {
    SOURCES.iter().map(|(name, text)| format!("#line 1 \"kernels/{name}\"\n{text}\n")).collect()
}

/// Device code and what the compiler said.
pub struct Compiled {
    pub image: Vec<u8>,
    pub log: String,
}

fn failed(what: &str, e: NvrtcError) -> Error {
    Error::Backend(format!("{what}: {e:?}"))
}

const OLDEST: i32 = 12;

/// NVRTC's version.
///
/// # Errors
/// `Backend` if it cannot be found or is too old.
fn version() -> Result<(i32, i32)> {
    // SAFETY: looks for a library; loading NVRTC runs its initialisers, which is what is wanted.
    if !unsafe { sys::is_culib_present() } {
        let why = "the CUDA kernels cannot be compiled: NVRTC (libnvrtc.so) was not found";
        return Err(Error::Backend(why.into()));
    }
    let (mut major, mut minor) = (0, 0);
    // SAFETY: writes two integers.
    unsafe { sys::nvrtcVersion(&mut major, &mut minor) }.result().map_err(|e| failed("NVRTC does not answer", e))?;
    // Functions that are called here may be missing from older ones.
    if major < OLDEST {
        return Err(Error::Backend(format!("NVRTC is too old: it is {major}.{minor}, at least {OLDEST}.0 is needed")));
    }
    Ok((major, minor))
}

/// Architectures that NVRTC knows, as 10 * major + minor.
fn supported() -> Result<Vec<i32>> {
    let why = |e| failed("NVRTC does not say what it supports", e);
    let mut n = 0;
    // SAFETY: writes an integer.
    unsafe { sys::nvrtcGetNumSupportedArchs(&mut n) }.result().map_err(why)?;
    let mut archs = vec![0; n.max(0) as usize];
    // SAFETY: there is room for as many as it said.
    unsafe { sys::nvrtcGetSupportedArchs(archs.as_mut_ptr()) }.result().map_err(why)?;
    Ok(archs)
}

/// Compiles the kernels for a compute capability: a cubin, or PTX, which the driver compiles, for one newer than NVRTC. With `report`
/// the log has each kernel's registers and what it spills.
///
/// # Errors
/// `Backend`: no NVRTC, or what it complained about.
pub fn compile(arch: (i32, i32), report: bool) -> Result<Compiled> {
    version()?;
    let wanted = 10 * arch.0 + arch.1;
    let known = supported()?;
    let below = known.iter().copied().filter(|&a| a <= wanted).max();
    let Some(target) = below else {
        return Err(Error::Backend(format!("NVRTC supports {known:?}, nothing for compute capability {wanted}")));
    };
    let is_exact = target == wanted;
    let target = if is_exact { format!("sm_{target}") } else { format!("compute_{target}") };
    let source = CString::new(source()).expect("the sources have no zero bytes");
    let program = nvrtc::create_program(&source, Some(c"libphd.cu")).map_err(|e| failed("NVRTC", e))?;
    let mut options = vec![format!("--gpu-architecture={target}"), "--std=c++17".to_owned()];
    if report {
        options.push("--ptxas-options=-v".to_owned());
    }
    // SAFETY: the program was just made.
    let done = unsafe { nvrtc::compile_program(program, &options) };
    // SAFETY: the program lives; its log ends with a zero.
    let log = unsafe { nvrtc::get_program_log(program) }.map_or(String::new(), |log| {
        let bytes: Vec<u8> = log.into_iter().map(|c| c as u8).collect();
        CStr::from_bytes_until_nul(&bytes).map_or(String::new(), |s| s.to_string_lossy().trim().to_owned())
    });
    let image = done.and_then(|()| {
        if !is_exact {
            // SAFETY: compiled for a virtual architecture, so there is PTX.
            return unsafe { nvrtc::get_ptx(program) }.map(|ptx| ptx.into_iter().map(|c| c as u8).collect());
        }
        let mut bytes = 0;
        // SAFETY: compiled for a real architecture, so there is a cubin; the buffer has the size that NVRTC tells.
        unsafe {
            sys::nvrtcGetCUBINSize(program, &mut bytes).result()?;
            let mut image = vec![0u8; bytes];
            sys::nvrtcGetCUBIN(program, image.as_mut_ptr().cast()).result()?;
            Ok(image)
        }
    });
    // SAFETY: made above, and not used again.
    let _ = unsafe { nvrtc::destroy_program(program) };
    match image {
        Ok(image) => Ok(Compiled { image, log }),
        Err(e) => Err(Error::Backend(format!("the CUDA kernels do not compile for {target}: {e:?}\n{log}"))),
    }
}

/// Where compiled kernels are kept: `PHD_CACHE_DIR`, or `libphd` in the user's cache folder; `None` if there is no such place.
fn cache_folder() -> Option<PathBuf> {
    let set = |name| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    set("PHD_CACHE_DIR")
        .or_else(|| set("XDG_CACHE_HOME").map(|p| p.join("libphd")))
        .or_else(|| set("HOME").map(|p| p.join(".cache/libphd")))
}

/// The kernels for a compute capability from the disk, or compiled and put there. A file that is damaged counts as missing. Without
/// NVRTC, or with one that is too old, those serve that any version of it has made.
///
/// # Errors
/// Those of [`compile`]. That the result cannot be kept is no error.
pub fn kernels(arch: (i32, i32)) -> Result<Vec<u8>> {
    let key = format!("{}\0{arch:?} {}", source(), env!("CARGO_PKG_VERSION"));
    let name = format!("kernels-{:032x}-nvrtc", xxh3_128(key.as_bytes()));
    let folder = cache_folder();
    let (major, minor) = match version() {
        Ok(version) => version,
        Err(e) => {
            let kept = folder.and_then(|f| any_kept(&f, &name));
            return kept.inspect(|_| log::info!("{e}; kernels that were compiled before are used")).ok_or(e);
        }
    };
    let path = folder.map(|folder| folder.join(format!("{name}{major}.{minor}")));
    if let Some(image) = path.as_deref().and_then(kept) {
        return Ok(image);
    }
    log::info!("compiling the CUDA kernels for compute capability {}.{}", arch.0, arch.1);
    let compiled = compile(arch, false)?;
    if !compiled.log.is_empty() {
        log::warn!("NVRTC: {}", compiled.log);
    }
    if let Some(path) = &path
        && let Err(e) = keep(path, &compiled.image)
    {
        log::warn!("the compiled CUDA kernels cannot be kept as {}: {e}", path.display());
    }
    Ok(compiled.image)
}

/// Of the hash that a file begins with.
const HASH: usize = 16;

/// What a file holds, if it is whole.
fn kept(path: &Path) -> Option<Vec<u8>> {
    let bytes = std::fs::read(path).ok()?;
    let (hash, image) = bytes.split_at_checked(HASH)?;
    (hash == xxh3_128(image).to_le_bytes()).then(|| image.to_vec())
}

/// The newest of the files whose names begin so.
fn any_kept(folder: &Path, name: &str) -> Option<Vec<u8>> {
    let named = |e: &std::fs::DirEntry| e.file_name().to_string_lossy().starts_with(name);
    let mut files: Vec<_> = std::fs::read_dir(folder).ok()?.flatten().filter(named).collect();
    files.sort_by_key(|e| std::cmp::Reverse(e.metadata().and_then(|m| m.modified()).ok()));
    files.iter().find_map(|e| kept(&e.path()))
}

fn keep(path: &Path, image: &[u8]) -> std::io::Result<()> {
    let folder = path.parent().expect("it is in a folder");
    std::fs::create_dir_all(folder)?;
    // Written beside and renamed: others see all of it or nothing.
    let mut file = tempfile::NamedTempFile::new_in(folder)?;
    file.write_all(&xxh3_128(image).to_le_bytes())?;
    file.write_all(image)?;
    file.persist(path)?;
    Ok(())
}
