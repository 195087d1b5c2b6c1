//! What the library has to say while it works, for the host's own log.

use std::cell::Cell;
use std::ffi::{c_char, c_void};
use std::sync::{Once, PoisonError, RwLock};

use super::{guard, phd_error, phd_status};
use crate::error::{Result, invalid, unsupported};

/// How much is said; each level includes those before it.
#[repr(C)]
pub enum phd_log_level {
    PHD_LOG_OFF = 0,
    PHD_LOG_ERROR,
    PHD_LOG_WARN,
    /// Models and sessions come into being.
    PHD_LOG_INFO,
    /// What happens within calls: a full cache, drops, evictions, cancelled work.
    PHD_LOG_DEBUG,
}

/// Told one line, UTF-8 of `length` bytes and not terminated, from whichever thread has something to say.
pub type phd_log_callback =
    Option<unsafe extern "C" fn(level: u32, message: *const c_char, length: usize, user: *mut c_void)>;

struct Sink {
    callback: unsafe extern "C" fn(u32, *const c_char, usize, *mut c_void),
    user: *mut c_void,
}
// SAFETY: only handed to the callback, which by the C contract may be called from any thread.
unsafe impl Send for Sink {}
// SAFETY: as above.
unsafe impl Sync for Sink {}

/// Held for reading while a line is handed out, so that a sink that was replaced is not called any more.
static SINK: RwLock<Option<Sink>> = RwLock::new(None);
thread_local!(static IS_INSIDE: Cell<bool> = const { Cell::new(false) });

/// Has a size, and so an address of its own.
struct Bridge {
    _place: u8,
}

impl log::Log for Bridge {
    fn enabled(&self, metadata: &log::Metadata) -> bool {
        metadata.target().starts_with("phd") && metadata.level() <= log::max_level()
    }

    fn log(&self, record: &log::Record) {
        if !self.enabled(record.metadata()) || IS_INSIDE.replace(true) {
            return;
        }
        let line = record.args().to_string();
        if let Some(sink) = &*SINK.read().unwrap_or_else(PoisonError::into_inner) {
            // SAFETY: the C contract of phd_log_set; the line lives until the callback returns.
            unsafe { (sink.callback)(record.level() as u32, line.as_ptr().cast(), line.len(), sink.user) };
        }
        IS_INSIDE.set(false);
    }

    fn flush(&self) {}
}

/// Hands what the library says, up to `level` (a phd_log_level), to `callback`, for the whole process; null turns it off. When this
/// returns, the callback before is not running and will not be called again. A callback must not call this. Without it the library
/// says nothing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn phd_log_set(
    callback: phd_log_callback,
    user: *mut c_void,
    level: u32,
    error: *mut *mut phd_error,
) -> phd_status {
    guard(error, || {
        let filter = match level {
            0 => log::LevelFilter::Off,
            1 => log::LevelFilter::Error,
            2 => log::LevelFilter::Warn,
            3 => log::LevelFilter::Info,
            4 => log::LevelFilter::Debug,
            other => return Err(invalid!("level is {other}, expected a phd_log_level")),
        };
        if IS_INSIDE.get() {
            return Err(invalid!("phd_log_set is called from a log callback"));
        }
        install()?;
        *SINK.write().unwrap_or_else(PoisonError::into_inner) = callback.map(|callback| Sink { callback, user });
        log::set_max_level(if callback.is_some() { filter } else { log::LevelFilter::Off });
        Ok(())
    })
}

/// Makes the bridge the logger of libphd's own copy of the `log` crate; a Rust program that links libphd as a crate has its own.
fn install() -> Result<()> {
    static ONCE: Once = Once::new();
    static BRIDGE: Bridge = Bridge { _place: 0 };
    ONCE.call_once(|| drop(log::set_logger(&BRIDGE)));
    // The host's logger may have come first: then lines go there.
    if !std::ptr::addr_eq(log::logger(), &BRIDGE) {
        return Err(unsupported!("the program has a logger of the `log` crate already: lines go there"));
    }
    Ok(())
}
