//! The log callback: what is said, to whom, and from when to when.

mod common;

use std::ffi::{c_char, c_void};
use std::ptr::null_mut;
use std::sync::Mutex;

use phd::ffi::*;

static LINES: Mutex<Vec<(u32, String)>> = Mutex::new(Vec::new());
static REENTRY: Mutex<Option<phd_status>> = Mutex::new(None);

unsafe extern "C" fn note(level: u32, message: *const c_char, length: usize, user: *mut c_void) {
    assert_eq!(user as usize, 77);
    // SAFETY: the callback's contract.
    let line = unsafe { std::slice::from_raw_parts(message.cast::<u8>(), length) };
    LINES.lock().unwrap().push((level, String::from_utf8(line.to_vec()).unwrap()));
    // SAFETY: null pointers are allowed; it is refused all the same.
    *REENTRY.lock().unwrap() = Some(unsafe { phd_log_set(None, null_mut(), 0, null_mut()) });
}

fn set(callback: phd_log_callback, level: u32) -> phd_status {
    // SAFETY: a callback that takes what it is given.
    unsafe { phd_log_set(callback, 77 as *mut c_void, level, null_mut()) }
}

/// One test: the log belongs to the process.
#[test]
fn the_callback_hears_what_its_level_allows() {
    let path = std::ffi::CString::new(common::demo_model().to_str().unwrap()).unwrap();
    let load = || {
        let (mut model, mut session) = (null_mut(), null_mut());
        // SAFETY: valid arguments of the C contract; handles are freed once.
        unsafe {
            let mut params: phd_model_params = std::mem::zeroed();
            phd_model_params_init(&mut params, size_of::<phd_model_params>());
            params.backend = phd_backend::PHD_BACKEND_CPU as u32;
            assert_eq!(phd_model_load(path.as_ptr(), &params, &mut model, null_mut()), phd_status::PHD_OK);
            let mut params: phd_session_params = std::mem::zeroed();
            phd_session_params_init(&mut params, size_of::<phd_session_params>());
            params.n_threads = 1024;
            assert_eq!(phd_session_create(model, &params, &mut session, null_mut()), phd_status::PHD_OK);
            let many = vec![1; 3000];
            let full = phd_prefill(session, 0, many.as_ptr(), many.len(), null_mut());
            assert_eq!(full, phd_status::PHD_ERROR_CACHE_FULL);
            phd_session_free(session);
            phd_model_free(model);
        }
        std::mem::take(&mut *LINES.lock().unwrap())
    };
    assert!(load().is_empty());
    assert_eq!(set(Some(note), 9), phd_status::PHD_ERROR_INVALID_ARGUMENT);
    assert!(load().is_empty());

    assert_eq!(set(Some(note), phd_log_level::PHD_LOG_INFO as u32), phd_status::PHD_OK);
    let lines = load();
    assert!(lines.iter().all(|(level, _)| *level <= 3), "{lines:?}");
    assert!(
        lines.iter().any(|(_, line)| line.contains("kjv-phd-cswa-2-16-32") && line.contains("2 copies")),
        "{lines:?}"
    );
    // Threads that were started, not those that were asked for.
    let threads = format!(", {} threads", std::thread::available_parallelism().unwrap());
    assert!(lines.iter().any(|(_, line)| line.contains("2048 positions") && line.ends_with(&threads)), "{lines:?}");
    assert_eq!(REENTRY.lock().unwrap().take(), Some(phd_status::PHD_ERROR_INVALID_ARGUMENT));

    assert_eq!(set(Some(note), phd_log_level::PHD_LOG_DEBUG as u32), phd_status::PHD_OK);
    assert!(load().iter().any(|(level, line)| *level == 4 && line.contains("the cache is full")));

    assert_eq!(set(None, phd_log_level::PHD_LOG_DEBUG as u32), phd_status::PHD_OK);
    assert!(load().is_empty());
}
