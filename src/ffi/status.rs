//! Status codes and error objects.

use std::ffi::{CString, c_char};

use crate::error::Error;

/// Values never change meaning; new ones are added at the end.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum phd_status {
    PHD_OK = 0,
    PHD_ERROR_INVALID_ARGUMENT,
    PHD_ERROR_IO,
    PHD_ERROR_FORMAT,
    PHD_ERROR_UNSUPPORTED,
    PHD_ERROR_OUT_OF_MEMORY,
    PHD_ERROR_CACHE_FULL,
    PHD_ERROR_BACKEND,
    PHD_ERROR_CANCELLED,
    PHD_ERROR_BUFFER_TOO_SMALL,
    PHD_ERROR_INTERNAL,
}

/// A status as C may pass it: any number. The header calls it phd_status.
pub type phd_status_value = u32;

/// What went wrong: a status and a sentence. Freed by the caller.
pub struct phd_error {
    status: phd_status,
    message: CString,
}

fn status_of(error: &Error) -> phd_status {
    match error {
        Error::InvalidArgument(_) => phd_status::PHD_ERROR_INVALID_ARGUMENT,
        Error::Io { .. } => phd_status::PHD_ERROR_IO,
        Error::Format { .. } => phd_status::PHD_ERROR_FORMAT,
        Error::Unsupported(_) => phd_status::PHD_ERROR_UNSUPPORTED,
        Error::OutOfMemory { .. } => phd_status::PHD_ERROR_OUT_OF_MEMORY,
        Error::CacheFull { .. } => phd_status::PHD_ERROR_CACHE_FULL,
        Error::Backend(_) => phd_status::PHD_ERROR_BACKEND,
        Error::Cancelled => phd_status::PHD_ERROR_CANCELLED,
        Error::BufferTooSmall { .. } => phd_status::PHD_ERROR_BUFFER_TOO_SMALL,
        Error::Internal(_) => phd_status::PHD_ERROR_INTERNAL,
    }
}

/// Stores an error object in `*out`, unless that is null.
pub(super) fn report(error: Error, out: *mut *mut phd_error) -> phd_status {
    let status = status_of(&error);
    if !out.is_null() {
        // File names and tensor names may hold NUL; C strings cannot.
        let message = CString::new(error.to_string().replace('\0', "\\0")).unwrap_or_default();
        // SAFETY: not null, and by the C contract a place for a pointer.
        unsafe { out.write(Box::into_raw(Box::new(phd_error { status, message }))) };
    }
    status
}

/// The name of a status, such as "PHD_ERROR_IO"; static. For a number that is none: "PHD_ERROR_UNKNOWN".
#[unsafe(no_mangle)]
pub extern "C" fn phd_status_name(status: phd_status_value) -> *const c_char {
    let name: &CStr = match status {
        0 => c"PHD_OK",
        1 => c"PHD_ERROR_INVALID_ARGUMENT",
        2 => c"PHD_ERROR_IO",
        3 => c"PHD_ERROR_FORMAT",
        4 => c"PHD_ERROR_UNSUPPORTED",
        5 => c"PHD_ERROR_OUT_OF_MEMORY",
        6 => c"PHD_ERROR_CACHE_FULL",
        7 => c"PHD_ERROR_BACKEND",
        8 => c"PHD_ERROR_CANCELLED",
        9 => c"PHD_ERROR_BUFFER_TOO_SMALL",
        10 => c"PHD_ERROR_INTERNAL",
        _ => c"PHD_ERROR_UNKNOWN",
    };
    name.as_ptr()
}

/// The status of an error; `PHD_OK` for null.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn phd_error_status(error: *const phd_error) -> phd_status {
    // SAFETY: null or a live error object, by the C contract.
    unsafe { error.as_ref() }.map_or(phd_status::PHD_OK, |e| e.status)
}

/// One sentence naming the file, tensor or value; lives as long as the error. Empty for null.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn phd_error_message(error: *const phd_error) -> *const c_char {
    // SAFETY: null or a live error object, by the C contract.
    unsafe { error.as_ref() }.map_or(c"".as_ptr(), |e| e.message.as_ptr())
}

/// Frees an error; null is fine.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn phd_error_free(error: *mut phd_error) {
    if !error.is_null() {
        // SAFETY: made by `report` and, by the C contract, freed once.
        drop(unsafe { Box::from_raw(error) });
    }
}

use std::ffi::CStr;
