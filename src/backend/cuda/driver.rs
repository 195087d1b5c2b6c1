//! The CUDA driver: what the backend needs of it, each resource with an owner. The driver is loaded when a device is first asked
//! for, never linked; cudarc knows its functions.

use std::ffi::{CString, c_void};
use std::sync::Arc;

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys;

use super::params::{Address, Params};
use crate::error::{Error, Result};

/// `what` failed in the driver.
fn failed(what: &str, e: DriverError) -> Error {
    if e.0 == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY {
        log::debug!("{what}: out of memory");
        return Error::OutOfMemory { what: "the CUDA driver", bytes: 0 };
    }
    let text = |s: Result<&std::ffi::CStr, DriverError>| s.map_or("".into(), |s| s.to_string_lossy().into_owned());
    Error::Backend(format!("{what}: {} ({})", text(e.error_string()), text(e.error_name())))
}

trait OrFailed<T> {
    fn or_failed(self, what: &str) -> Result<T>;
}

impl<T> OrFailed<T> for Result<T, DriverError> {
    fn or_failed(self, what: &str) -> Result<T> {
        self.map_err(|e| failed(what, e))
    }
}

/// Functions that are called here may be missing from drivers older than this.
const OLDEST_DRIVER: i32 = 12000;

/// A version as the driver counts them: 1000 * major + 10 * minor.
pub fn version_text(version: i32) -> String {
    format!("{}.{}", version / 1000, version % 1000 / 10)
}

/// A GPU's primary context, which all users of the CUDA runtime in a process share.
pub struct Device {
    pub ordinal: i32,
    pub name: String,
    /// Compute capability.
    pub arch: (i32, i32),
    pub n_multiprocessors: usize,
    /// Bytes of shared memory that a block may ask for.
    pub shared_memory: usize,
    pub driver_version: i32,
    /// Kernels may begin before the one before them is through: see `wait_for_previous` in `kernels/device.cuh`.
    overlaps: bool,
    device: sys::CUdevice,
    context: sys::CUcontext,
}

// SAFETY: driver handles may be used from any thread; `enter` makes the context current on the one that uses it.
unsafe impl Send for Device {}
// SAFETY: as above; the driver locks what it shares.
unsafe impl Sync for Device {}

/// The device's context is current on this thread while this lives; then whatever was before is again.
pub struct Entered<'a> {
    _device: &'a Device,
    /// Another thread's stack of contexts is none of ours.
    _not_send: std::marker::PhantomData<*const ()>,
}

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        let mut popped = std::ptr::null_mut();
        // SAFETY: pops what `enter` pushed on this thread.
        unsafe { sys::cuCtxPopCurrent_v2(&mut popped) };
    }
}

impl Device {
    /// # Errors
    /// `Backend` with the reason: no driver, no such device; `OutOfMemory`.
    pub fn open(ordinal: i32) -> Result<Arc<Device>> {
        // SAFETY: looks for a library; loading libcuda runs its initialisers, which is what is wanted.
        if !unsafe { sys::is_culib_present() } {
            return Err(Error::Backend("there is no CUDA driver: libcuda.so.1 was not found".into()));
        }
        result::init().or_failed("the CUDA driver does not start")?;
        let mut driver_version = 0;
        // SAFETY: writes one integer.
        unsafe { sys::cuDriverGetVersion(&mut driver_version) }
            .result()
            .or_failed("cannot ask the driver's version")?;
        if driver_version < OLDEST_DRIVER {
            return Err(Error::Backend(format!(
                "the CUDA driver is too old: it is for CUDA {}, at least {} is needed",
                version_text(driver_version),
                version_text(OLDEST_DRIVER)
            )));
        }
        let n = result::device::get_count().or_failed("cannot count CUDA devices")?;
        if ordinal < 0 || ordinal >= n {
            return Err(Error::Backend(format!("there is no CUDA device {ordinal}: the driver reports {n}")));
        }
        let device = result::device::get(ordinal).or_failed("cannot open the CUDA device")?;
        let name = result::device::get_name(device).or_failed("cannot name the CUDA device")?;
        use sys::CUdevice_attribute_enum as Attribute;
        // SAFETY: `device` is valid.
        let attribute = |a| unsafe { result::device::get_attribute(device, a) }.or_failed("cannot ask the CUDA device");
        let arch = (
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        );
        if arch < (8, 0) {
            let (major, minor) = arch;
            return Err(Error::Backend(format!(
                "{name} has compute capability {major}.{minor}, at least 8.0 is needed"
            )));
        }
        let n_multiprocessors = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as usize;
        let shared_memory = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)? as usize;
        // SAFETY: `device` is valid; released when the owner is dropped.
        let context = unsafe { result::primary_ctx::retain(device) }.or_failed("cannot use the CUDA device")?;
        // Graphs of such launches can be captured from CUDA 12.3 on.
        let is_wanted = std::env::var_os("PHD_CUDA_OVERLAP").is_none_or(|v| v != "0");
        let overlaps = is_wanted && arch >= (9, 0) && driver_version >= 12030;
        Ok(Arc::new(Device {
            ordinal,
            name,
            arch,
            n_multiprocessors,
            shared_memory,
            driver_version,
            overlaps,
            device,
            context,
        }))
    }

    pub fn enter(&self) -> Result<Entered<'_>> {
        // SAFETY: the context lives as long as `self`.
        unsafe { sys::cuCtxPushCurrent_v2(self.context) }.result().or_failed("cannot enter the CUDA context")?;
        Ok(Entered { _device: self, _not_send: std::marker::PhantomData })
    }

    /// Free and total bytes.
    pub fn memory(&self) -> Result<(usize, usize)> {
        let _entered = self.enter()?;
        result::mem_get_info().or_failed("cannot ask for free device memory")
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // SAFETY: retained once by `open`; everything made in it holds the device and is gone.
        let _ = unsafe { result::primary_ctx::release(self.device) };
    }
}

/// Device memory, freed with its owner.
pub struct Buffer {
    device: Arc<Device>,
    address: Address,
    bytes: usize,
}

impl Buffer {
    /// Uninitialised memory. `what` is named if there is no room.
    pub fn new(device: &Arc<Device>, what: &'static str, bytes: usize) -> Result<Buffer> {
        let _entered = device.enter()?;
        // SAFETY: nothing reads it before it is written: see the users.
        match unsafe { result::malloc_sync(bytes.max(16)) } {
            Ok(address) => Ok(Buffer { device: device.clone(), address, bytes }),
            Err(DriverError(sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY)) => Err(Error::OutOfMemory { what, bytes }),
            Err(e) => Err(failed(&format!("cannot allocate {what}"), e)),
        }
    }

    /// Zeros.
    pub fn zeroed(device: &Arc<Device>, what: &'static str, bytes: usize) -> Result<Buffer> {
        let buffer = Buffer::new(device, what, bytes)?;
        if bytes == 0 {
            return Ok(buffer);
        }
        let _entered = device.enter()?;
        // SAFETY: within the allocation.
        unsafe { result::memset_d8_sync(buffer.address, 0, bytes) }.or_failed("cannot clear device memory")?;
        // Whatever its name says, that may be queued only, on the default stream, for which ours do not wait.
        // SAFETY: null is the default stream.
        unsafe { result::stream::synchronize(std::ptr::null_mut()) }.or_failed("cannot clear device memory")?;
        Ok(buffer)
    }

    pub fn address(&self) -> Address {
        self.address
    }

    /// The address of a byte of it.
    pub fn at(&self, offset: usize) -> Address {
        debug_assert!(offset <= self.bytes);
        self.address + offset as u64
    }

    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let Ok(_entered) = self.device.enter() else { return };
        // SAFETY: allocated by `new`. The driver waits for what still uses it.
        let _ = unsafe { result::free_sync(self.address) };
    }
}

/// Page-locked host memory: what the device copies from and to while the host goes on.
pub struct Pinned {
    device: Arc<Device>,
    pointer: *mut u8,
    bytes: usize,
}

// SAFETY: memory with one owner.
unsafe impl Send for Pinned {}
// SAFETY: `&self` only reads.
unsafe impl Sync for Pinned {}

impl Pinned {
    /// Zeros.
    pub fn new(device: &Arc<Device>, what: &'static str, bytes: usize) -> Result<Pinned> {
        let _entered = device.enter()?;
        // SAFETY: initialised right below.
        match unsafe { result::malloc_host(bytes.max(16), 0) } {
            Ok(pointer) => {
                // SAFETY: that many bytes were allocated.
                unsafe { std::ptr::write_bytes(pointer.cast::<u8>(), 0, bytes) };
                Ok(Pinned { device: device.clone(), pointer: pointer.cast(), bytes })
            }
            Err(DriverError(sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY)) => Err(Error::OutOfMemory { what, bytes }),
            Err(e) => Err(failed(&format!("cannot allocate {what}"), e)),
        }
    }

    pub fn bytes(&self) -> usize {
        self.bytes
    }

    pub fn as_slice(&self) -> &[u8] {
        // SAFETY: allocated, initialised, and no copy into it is under way: whoever starts one waits for it with `&mut`.
        unsafe { std::slice::from_raw_parts(self.pointer, self.bytes) }
    }

    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `self` is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.pointer, self.bytes) }
    }

    /// Some of the bytes, to be written although others are read.
    ///
    /// # Safety
    /// Nobody holds a slice of these bytes.
    #[allow(clippy::mut_from_ref)] // that is the promise
    pub unsafe fn part(&self, range: std::ops::Range<usize>) -> &mut [u8] {
        assert!(range.start <= range.end && range.end <= self.bytes);
        // SAFETY: within the allocation; the rest is the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.pointer.add(range.start), range.len()) }
    }

    pub fn floats(&self) -> &[f32] {
        // SAFETY: page-aligned, and every bit pattern is a float.
        unsafe { std::slice::from_raw_parts(self.pointer.cast(), self.bytes / 4) }
    }

    pub fn floats_mut(&mut self) -> &mut [f32] {
        // SAFETY: as above, and `self` is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.pointer.cast(), self.bytes / 4) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        let Ok(_entered) = self.device.enter() else { return };
        // SAFETY: allocated by `new`.
        let _ = unsafe { result::free_host(self.pointer.cast()) };
    }
}

/// Work in order, apart from other streams.
pub struct Stream {
    device: Arc<Device>,
    stream: sys::CUstream,
}

// SAFETY: see `Device`.
unsafe impl Send for Stream {}
// SAFETY: see `Device`.
unsafe impl Sync for Stream {}

/// A kernel of a [`Module`], which its user holds.
#[derive(Clone, Copy)]
pub struct Kernel(sys::CUfunction);

// SAFETY: see `Device`.
unsafe impl Send for Kernel {}
// SAFETY: see `Device`.
unsafe impl Sync for Kernel {}

/// Blocks in x, y, z; threads to a block; bytes of dynamic shared memory.
#[derive(Clone, Copy, Debug)]
pub struct Grid {
    pub blocks: (usize, usize, usize),
    pub threads: u32,
    pub shared: usize,
}

impl Stream {
    pub fn new(device: &Arc<Device>) -> Result<Stream> {
        let _entered = device.enter()?;
        let stream =
            result::stream::create(result::stream::StreamKind::NonBlocking).or_failed("cannot create a stream")?;
        Ok(Stream { device: device.clone(), stream })
    }

    /// cuBLAS's and the runtime's name for it.
    pub fn raw(&self) -> sys::CUstream {
        self.stream
    }

    /// # Safety
    /// `params` describes memory that lives until the kernel is through, as large as the kernel expects.
    pub unsafe fn launch<P: Params>(&self, kernel: Kernel, grid: Grid, params: &P) -> Result<()> {
        let (x, y, z) = grid.blocks;
        if x * y * z == 0 {
            return Ok(());
        }
        let mut arguments = [std::ptr::from_ref(params).cast_mut().cast::<c_void>()];
        // After anything but a kernel it makes no difference. Kernels of cuBLASLt neither ask for it nor need to wait: they begin when
        // everything before is through, and ours wait until all of a product is.
        let mut overlap = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        };
        let config = sys::CUlaunchConfig {
            gridDimX: x as u32,
            gridDimY: y as u32,
            gridDimZ: z as u32,
            blockDimX: grid.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: grid.shared as u32,
            hStream: self.stream,
            attrs: &mut overlap,
            numAttrs: self.device.overlaps.into(),
        };
        // SAFETY: the kernel takes one struct, which the driver copies before it returns; the rest is the caller's promise.
        unsafe { sys::cuLaunchKernelEx(&config, kernel.0, arguments.as_mut_ptr(), std::ptr::null_mut()) }
            .result()
            .or_failed("cannot launch a kernel")
    }

    /// # Safety
    /// `to` has room, and `from` is neither freed nor changed before the copy is through.
    pub unsafe fn upload(&self, to: Address, from: &[u8]) -> Result<()> {
        if from.is_empty() {
            return Ok(());
        }
        // SAFETY: the caller's promise.
        unsafe { result::memcpy_htod_async(to, from, self.stream) }.or_failed("cannot copy to the device")
    }

    /// # Safety
    /// `from` has the bytes, and `to` is neither freed nor used before the copy is through.
    pub unsafe fn download(&self, to: &mut [u8], from: Address) -> Result<()> {
        if to.is_empty() {
            return Ok(());
        }
        // SAFETY: the caller's promise.
        unsafe { result::memcpy_dtoh_async(to, from, self.stream) }.or_failed("cannot copy from the device")
    }

    /// # Safety
    /// Both ranges are allocated and do not overlap.
    pub unsafe fn copy(&self, to: Address, from: Address, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: the caller's promise.
        unsafe { result::memcpy_dtod_async(to, from, bytes, self.stream) }.or_failed("cannot copy on the device")
    }

    pub fn synchronize(&self) -> Result<()> {
        // SAFETY: the stream lives.
        unsafe { result::stream::synchronize(self.stream) }.or_failed("the device failed")
    }

    pub fn record(&self, event: &Event) -> Result<()> {
        // SAFETY: both live.
        unsafe { result::event::record(event.event, self.stream) }.or_failed("cannot record an event")
    }

    /// What `work` queues on this stream, as a graph that can be launched again and again. Other threads' calls do not disturb it.
    pub fn capture(&self, work: impl FnOnce() -> Result<()>) -> Result<Graph> {
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream lives.
        unsafe { result::stream::begin_capture(self.stream, mode) }.or_failed("cannot capture a graph")?;
        let done = work();
        // SAFETY: a capture is under way; it must be ended whatever became of the work.
        let captured = unsafe { result::stream::end_capture(self.stream) }.map(Captured);
        done?;
        let captured = captured.or_failed("cannot capture a graph")?;
        // SAFETY: just made; the executable graph does not need it afterwards.
        let executable = unsafe { result::graph::instantiate(captured.0, sys::CUgraphInstantiate_flags(0)) };
        Ok(Graph { device: self.device.clone(), graph: executable.or_failed("cannot instantiate a graph")? })
    }

    /// # Safety
    /// Everything that was captured still lives.
    pub unsafe fn launch_graph(&self, graph: &Graph) -> Result<()> {
        // SAFETY: both live; the rest is the caller's promise.
        unsafe { result::graph::launch(graph.graph, self.stream) }.or_failed("cannot launch a graph")
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        let Ok(_entered) = self.device.enter() else { return };
        // SAFETY: made by `new`. Buffers that queued work uses are dropped later or waited for by the driver.
        unsafe {
            let _ = result::stream::synchronize(self.stream);
            let _ = result::stream::destroy(self.stream);
        }
    }
}

pub struct Event {
    device: Arc<Device>,
    event: sys::CUevent,
}

// SAFETY: see `Device`.
unsafe impl Send for Event {}

impl Event {
    pub fn new(device: &Arc<Device>) -> Result<Event> {
        let _entered = device.enter()?;
        let flags = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING;
        let event = result::event::create(flags).or_failed("cannot create an event")?;
        Ok(Event { device: device.clone(), event })
    }

    pub fn wait(&self) -> Result<()> {
        // SAFETY: it lives.
        unsafe { result::event::synchronize(self.event) }.or_failed("the device failed")
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        let Ok(_entered) = self.device.enter() else { return };
        // SAFETY: made by `new`.
        let _ = unsafe { result::event::destroy(self.event) };
    }
}

/// What executable graphs are made of.
struct Captured(sys::CUgraph);

impl Drop for Captured {
    fn drop(&mut self) {
        // SAFETY: made by a capture.
        let _ = unsafe { result::graph::destroy(self.0) };
    }
}

/// An executable graph.
pub struct Graph {
    device: Arc<Device>,
    graph: sys::CUgraphExec,
}

// SAFETY: see `Device`.
unsafe impl Send for Graph {}

impl Drop for Graph {
    fn drop(&mut self) {
        let Ok(_entered) = self.device.enter() else { return };
        // SAFETY: made by `capture`.
        let _ = unsafe { result::graph::exec_destroy(self.graph) };
    }
}

/// Loaded device code.
pub struct Module {
    device: Arc<Device>,
    module: sys::CUmodule,
}

// SAFETY: see `Device`.
unsafe impl Send for Module {}
// SAFETY: see `Device`.
unsafe impl Sync for Module {}

impl Module {
    pub fn load(device: &Arc<Device>, image: &[u8]) -> Result<Module> {
        let _entered = device.enter()?;
        // SAFETY: the image is what NVRTC made for this device; the driver checks its header and keeps a copy.
        let module =
            unsafe { result::module::load_data(image.as_ptr().cast()) }.or_failed("cannot load the kernels")?;
        Ok(Module { device: device.clone(), module })
    }

    /// A kernel that may ask for `shared` bytes of dynamic shared memory.
    pub fn kernel(&self, name: &str, shared: usize) -> Result<Kernel> {
        let _entered = self.device.enter()?;
        let c_name = CString::new(name).expect("no zero in a kernel's name");
        let what = format!("kernel {name}");
        // SAFETY: the module is loaded.
        let function = unsafe { result::module::get_function(self.module, c_name) }.or_failed(&what)?;
        // Less than 48 KiB: static shared memory counts, too.
        const WITHOUT_ASKING: usize = 47 << 10;
        if shared > WITHOUT_ASKING {
            let attribute = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the function was just found.
            unsafe { result::function::set_function_attribute(function, attribute, shared as i32) }.or_failed(&what)?;
        }
        Ok(Kernel(function))
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        let Ok(_entered) = self.device.enter() else { return };
        // SAFETY: loaded by `load`; who uses its kernels holds it.
        let _ = unsafe { result::module::unload(self.module) };
    }
}
