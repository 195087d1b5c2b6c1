package phd

// #include "shim.h"
import "C"

import (
	"context"
	"unsafe"
)

// WeightType is the type of a file's weights.
type WeightType uint32

// The weight types.
const (
	WeightAuto WeightType = C.PHD_WEIGHT_AUTO // as they are; for Convert
	WeightF32  WeightType = C.PHD_WEIGHT_F32
	WeightF16  WeightType = C.PHD_WEIGHT_F16
	WeightBF16 WeightType = C.PHD_WEIGHT_BF16
	WeightQ4_0 WeightType = C.PHD_WEIGHT_Q4_0
	WeightQ4_1 WeightType = C.PHD_WEIGHT_Q4_1
	WeightQ8_0 WeightType = C.PHD_WEIGHT_Q8_0
	WeightQ4_K WeightType = C.PHD_WEIGHT_Q4_K
	WeightQ5_K WeightType = C.PHD_WEIGHT_Q5_K
	WeightQ6_K WeightType = C.PHD_WEIGHT_Q6_K
)

// ConvertOptions says how a checkpoint is converted. The zero value is the default.
type ConvertOptions struct {
	WeightType WeightType
	Requantize bool   // weights that are quantized already may be quantized once more
	Pure       bool   // no finer type for the output layer
	NThreads   int    // 0: one per physical core that the process may use
	NoMmap     bool   // read the input whole instead of mapping it; a mapped file must not be truncated meanwhile
	Pre        string // tokenizer.ggml.pre instead of what the folder's tokenizer.json says; for Convert

	// Progress, if not nil, is told the fraction done, 0 to 1. Returning false cancels.
	Progress func(fraction float32) bool
}

// Convert converts a Hub folder to the GGUF file out, which llama.cpp reads as the vanilla base. The file is written whole
// or not at all: after an error, the end of ctx included, out is what it was.
func Convert(ctx context.Context, folder, out string, o *ConvertOptions) error {
	return convert(ctx, false, "folder", folder, out, o)
}

// Quantize converts the weights of the GGUF file input to o.WeightType and keeps everything else. Written whole or not at
// all, as by [Convert].
func Quantize(ctx context.Context, input, out string, o *ConvertOptions) error {
	return convert(ctx, true, "input", input, out, o)
}

func convert(ctx context.Context, quantize bool, inputName, input, out string, o *ConvertOptions) error {
	if ctx.Err() != nil {
		return contextError(ctx)
	}
	if o == nil {
		o = new(ConvertOptions)
	}
	var params C.phd_convert_params
	C.phd_convert_params_init(&params, C.sizeof_phd_convert_params)
	var u u32s
	params.weight_type = C.uint32_t(o.WeightType)
	if o.Requantize {
		params.flags |= C.PHD_CONVERT_REQUANTIZE
	}
	if o.Pure {
		params.flags |= C.PHD_CONVERT_PURE
	}
	params.n_threads = u.of("NThreads", o.NThreads)
	params.no_mmap = cFlag(o.NoMmap)
	if u.err != nil {
		return u.err
	}
	inputPath, err := cPath(inputName, input)
	if err != nil {
		return err
	}
	defer C.free(unsafe.Pointer(inputPath))
	outPath, err := cPath("out", out)
	if err != nil {
		return err
	}
	defer C.free(unsafe.Pointer(outPath))
	if o.Pre != "" {
		if params.pre, err = cPath("Pre", o.Pre); err != nil {
			return err
		}
		defer C.free(unsafe.Pointer(params.pre))
	}
	return callWithProgress(ctx, o.Progress, func(handle C.uintptr_t, e **C.phd_error) cStatus {
		return C.phd_go_convert(C.bool(quantize), inputPath, outPath, &params, handle, e)
	})
}
