//! ggml's dot products, for the weight types that have no kernel of our own.
//!
//! They are compiled for one instruction set (see `.cargo/config.toml`), so they are called only on a CPU that has it; elsewhere
//! these types are converted to f32 row by row.

use std::ffi::{c_int, c_void};
use std::sync::OnceLock;

use llama_cpp_sys_2 as _; // the static library; its generated bindings leave out ggml-cpu.h

use crate::tensor::DType;

type FromFloat = unsafe extern "C" fn(x: *const f32, y: *mut c_void, n: i64);
type VecDot = unsafe extern "C" fn(
    n: c_int,
    sum: *mut f32,
    sum_stride: usize,
    x: *const c_void,
    x_stride: usize,
    y: *const c_void,
    y_stride: usize,
    rows: c_int,
);

/// `struct ggml_type_traits_cpu` (ggml-cpu.h).
#[repr(C)]
struct TypeTraitsCpu {
    from_float: Option<FromFloat>,
    vec_dot: Option<VecDot>,
    vec_dot_type: u32,
    rows: i64,
}

unsafe extern "C" {
    fn ggml_cpu_init();
    fn ggml_get_type_traits_cpu(dtype: u32) -> *const TypeTraitsCpu;
    fn ggml_type_size(dtype: u32) -> usize;
    fn ggml_blck_size(dtype: u32) -> i64;
    #[cfg(target_arch = "x86_64")]
    fn ggml_cpu_has_avx512() -> c_int;
}

/// Rows of one type times vectors that were converted for it.
#[derive(Clone, Copy)]
pub struct Dot {
    vec_dot: VecDot,
    from_float: FromFloat,
    partner: Partner,
    partner_block: usize,
    partner_bytes: usize,
}

/// The types that activations are converted to.
#[derive(Clone, Copy, PartialEq, Eq)]
#[allow(non_camel_case_types)]
enum Partner {
    Q8_0,
    Q8_1,
    Q8_K,
}

impl Dot {
    /// `None` where ggml has none, or was compiled for another CPU.
    pub fn of(dtype: DType) -> Option<Dot> {
        static USABLE: OnceLock<bool> = OnceLock::new();
        let usable = *USABLE.get_or_init(|| {
            let fits = cpu_fits();
            if fits {
                // SAFETY: fills ggml's tables; once, here.
                unsafe { ggml_cpu_init() };
            }
            fits
        });
        if !usable || matches!(dtype, DType::F32 | DType::F16 | DType::BF16) {
            return None;
        }
        // SAFETY: every `DType` has a ggml type number, for which the table has an entry that lives for ever.
        unsafe {
            let traits = &*ggml_get_type_traits_cpu(dtype.ggml_id());
            let partner = &*ggml_get_type_traits_cpu(traits.vec_dot_type);
            Some(Dot {
                vec_dot: traits.vec_dot?,
                from_float: partner.from_float?,
                partner: match traits.vec_dot_type {
                    8 => Partner::Q8_0,
                    9 => Partner::Q8_1,
                    15 => Partner::Q8_K,
                    _ => return None,
                },
                partner_block: usize::try_from(ggml_blck_size(traits.vec_dot_type)).ok().filter(|&n| n > 0)?,
                partner_bytes: ggml_type_size(traits.vec_dot_type),
            })
        }
    }

    /// Activations in the same slot have the same form.
    pub fn slot(&self) -> usize {
        self.partner as usize
    }

    /// Bytes of `n` converted activations.
    pub fn activation_bytes(&self, n: usize) -> usize {
        n.div_ceil(self.partner_block) * self.partner_bytes
    }

    /// The most that any type needs.
    pub fn most_bytes(n: usize) -> usize {
        // Q8_1 has 36 bytes for 32, Q8_K 292 for 256.
        n.div_ceil(32) * 36 + 292
    }

    pub fn convert(&self, x: &[f32], out: &mut [u8]) {
        assert!(x.len().is_multiple_of(self.partner_block) && out.len() >= self.activation_bytes(x.len()));
        // SAFETY: both lengths were checked; the CPU was in `of`.
        unsafe { (self.from_float)(x.as_ptr(), out.as_mut_ptr().cast(), x.len() as i64) }
    }

    /// A row of `n` weights times converted activations.
    pub fn dot(&self, n: usize, row: &[u8], x: &[u8]) -> f32 {
        debug_assert!(x.len() >= self.activation_bytes(n));
        let mut sum = 0.0;
        // SAFETY: a row of n elements (checked at load) and as many activations; the CPU was checked in `of`.
        unsafe { (self.vec_dot)(n as c_int, &mut sum, 0, row.as_ptr().cast(), 0, x.as_ptr().cast(), 0, 1) };
        sum
    }
}

#[cfg(target_arch = "x86_64")]
fn cpu_fits() -> bool {
    // SAFETY: returns a constant of ggml's compilation. Nobody asked for AVX-512; had a build enabled it, it must be there.
    let wants_avx512 = unsafe { ggml_cpu_has_avx512() } != 0;
    is_x86_feature_detected!("sse4.2")
        && is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("f16c")
        && is_x86_feature_detected!("bmi2")
        && !wants_avx512
}

/// Compiled without options: for the architecture's base.
#[cfg(not(target_arch = "x86_64"))]
fn cpu_fits() -> bool {
    true
}
