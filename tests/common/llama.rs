//! llama.cpp itself, as llama-cpp-sys-2 carries it: what it makes of a GGUF file.
#![allow(dead_code)]

use std::ffi::CString;
use std::path::Path;
use std::sync::Once;

use llama_cpp_sys_2 as sys;

unsafe extern "C" fn silent(_: sys::ggml_log_level, _: *const std::ffi::c_char, _: *mut std::ffi::c_void) {}

fn start() {
    static ONCE: Once = Once::new();
    // SAFETY: once, before anything else of llama.cpp's.
    ONCE.call_once(|| unsafe {
        if std::env::var_os("PHD_LLAMA_LOG").is_none() {
            sys::llama_log_set(Some(silent), std::ptr::null_mut());
        }
        sys::llama_backend_init();
    });
}

fn c_path(path: &Path) -> CString {
    CString::new(path.to_str().unwrap()).unwrap()
}

/// A model and a context with an f32 cache on two threads.
pub struct Llama {
    model: *mut sys::llama_model,
    context: *mut sys::llama_context,
}

impl Llama {
    pub fn load(path: &Path, n_positions: u32) -> Llama {
        start();
        // SAFETY: parameters are llama.cpp's own defaults; pointers are checked before use.
        unsafe {
            let mut params = sys::llama_model_default_params();
            params.n_gpu_layers = 0;
            params.check_tensors = true;
            let model = sys::llama_model_load_from_file(c_path(path).as_ptr(), params);
            assert!(!model.is_null(), "llama.cpp does not load {}; PHD_LLAMA_LOG=1 says why", path.display());
            let mut params = sys::llama_context_default_params();
            (params.n_ctx, params.n_batch, params.n_threads, params.n_threads_batch) = (n_positions, n_positions, 2, 2);
            (params.type_k, params.type_v, params.flash_attn_type) = (0, 0, 0);
            let context = sys::llama_init_from_model(model, params);
            assert!(!context.is_null());
            Llama { model, context }
        }
    }

    /// Logits after each token.
    pub fn logits(&mut self, tokens: &[i32]) -> Vec<Vec<f32>> {
        // SAFETY: a live context; its logits are copied before the next call.
        unsafe {
            sys::llama_memory_clear(sys::llama_get_memory(self.context), true);
            let n_vocab = sys::llama_vocab_n_tokens(sys::llama_model_get_vocab(self.model)) as usize;
            let each = tokens.iter().map(|&token| {
                let mut token = token;
                assert_eq!(sys::llama_decode(self.context, sys::llama_batch_get_one(&mut token, 1)), 0);
                std::slice::from_raw_parts(sys::llama_get_logits_ith(self.context, -1), n_vocab).to_vec()
            });
            each.collect()
        }
    }

    pub fn tokenize(&self, text: &str, add_special: bool, parse_special: bool) -> Vec<u32> {
        let mut tokens = vec![0; text.len() + 8];
        // SAFETY: lengths are those of the buffers.
        let n = unsafe {
            sys::llama_tokenize(
                sys::llama_model_get_vocab(self.model),
                text.as_ptr().cast(),
                text.len() as i32,
                tokens.as_mut_ptr(),
                tokens.len() as i32,
                add_special,
                parse_special,
            )
        };
        tokens[..usize::try_from(n).unwrap()].iter().map(|&t| t as u32).collect()
    }
}

impl Drop for Llama {
    fn drop(&mut self) {
        // SAFETY: made in `load`, freed once.
        unsafe {
            sys::llama_free(self.context);
            sys::llama_model_free(self.model);
        }
    }
}

/// A model's vocabulary alone.
pub struct Vocabulary(*mut sys::llama_model);

/// llama.cpp's own engine of grammars.
pub struct Grammar {
    sampler: *mut sys::llama_sampler,
    n_vocab: usize,
}

impl Vocabulary {
    pub fn load(path: &Path) -> Vocabulary {
        start();
        // SAFETY: parameters are llama.cpp's own defaults; the pointer is checked.
        unsafe {
            let mut params = sys::llama_model_default_params();
            params.vocab_only = true;
            let model = sys::llama_model_load_from_file(c_path(path).as_ptr(), params);
            assert!(!model.is_null(), "llama.cpp does not load {}", path.display());
            Vocabulary(model)
        }
    }

    /// `None` if llama.cpp refuses the grammar. The vocabulary must outlive it.
    pub fn grammar(&self, text: &str) -> Option<Grammar> {
        let text = CString::new(text).unwrap();
        // SAFETY: a live model and terminated strings.
        unsafe {
            let vocab = sys::llama_model_get_vocab(self.0);
            let sampler = sys::llama_sampler_init_grammar(vocab, text.as_ptr(), c"root".as_ptr());
            (!sampler.is_null()).then(|| Grammar { sampler, n_vocab: sys::llama_vocab_n_tokens(vocab) as usize })
        }
    }
}

impl Drop for Vocabulary {
    fn drop(&mut self) {
        // SAFETY: made in `load`, freed once.
        unsafe { sys::llama_model_free(self.0) }
    }
}

impl Grammar {
    /// (token): whether it may come next.
    pub fn allowed(&mut self) -> Vec<bool> {
        let token = |id| sys::llama_token_data { id, logit: 1.0, p: 0.0 };
        let mut data: Vec<sys::llama_token_data> = (0..self.n_vocab as i32).map(token).collect();
        let mut array =
            sys::llama_token_data_array { data: data.as_mut_ptr(), size: data.len(), selected: -1, sorted: false };
        // SAFETY: a live sampler; `array` is of `data`, which outlives it.
        unsafe { sys::llama_sampler_apply(self.sampler, &mut array) };
        data.iter().map(|d| d.logit > f32::NEG_INFINITY).collect()
    }

    /// Advances by a token, which must be allowed.
    pub fn accept(&mut self, token: u32) {
        // SAFETY: a live sampler.
        unsafe { sys::llama_sampler_accept(self.sampler, token as i32) }
    }
}

impl Drop for Grammar {
    fn drop(&mut self) {
        // SAFETY: made by `Vocabulary::grammar`, freed once.
        unsafe { sys::llama_sampler_free(self.sampler) }
    }
}

/// llama-quantize.
pub fn quantize(input: &Path, out: &Path, file_type: u32, pure: bool) {
    start();
    // SAFETY: llama.cpp's own defaults, terminated strings.
    let status = unsafe {
        let mut params = sys::llama_model_quantize_default_params();
        (params.nthread, params.ftype, params.pure_, params.allow_requantize) = (2, file_type, pure, true);
        sys::llama_model_quantize(c_path(input).as_ptr(), c_path(out).as_ptr(), &params)
    };
    assert_eq!(status, 0, "llama-quantize of {}", input.display());
}
