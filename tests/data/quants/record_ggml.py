"""Records what ggml makes of random blocks of each type: python record_ggml.py libggml-base.so > ggml.json"""
import ctypes, json, random, struct, sys


class Traits(ctypes.Structure):
    _fields_ = [("name", ctypes.c_char_p), ("block", ctypes.c_int64), ("interleave", ctypes.c_int64),
                ("size", ctypes.c_size_t), ("quantized", ctypes.c_bool), ("to_float", ctypes.c_void_p),
                ("from_float", ctypes.c_void_p)]


lib = ctypes.CDLL(sys.argv[1])
lib.ggml_get_type_traits.restype = ctypes.POINTER(Traits)
# ggml_type, offsets of the block's f16 scales (random bytes would make them NaN)
TYPES = {"F16": (1, [0]), "BF16": (30, None), "Q4_0": (2, [0]), "Q4_1": (3, [0, 2]), "Q5_0": (6, [0]), "Q5_1": (7, [0, 2]),
         "Q8_0": (8, [0]), "Q2_K": (10, [80, 82]), "Q3_K": (11, [108]), "Q4_K": (12, [0, 2]), "Q5_K": (13, [0, 2]),
         "Q6_K": (14, [208]), "IQ4_NL": (20, [0]), "IQ4_XS": (23, [0])}
random.seed(1)
out = {}
for name, (number, scales) in TYPES.items():
    t = lib.ggml_get_type_traits(number).contents
    data = bytearray()
    for _ in range(32 if t.block == 1 else 2):
        block = bytearray(random.randbytes(t.size))
        for at in scales or []:
            block[at:at + 2] = struct.pack("<e", random.uniform(-2, 2))
        if scales is None:
            block[:] = struct.pack("<f", random.uniform(-2, 2))[2:]
        data += block
    n = len(data) // t.size * t.block
    y = (ctypes.c_float * n)()
    fn = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.POINTER(ctypes.c_float), ctypes.c_int64)(t.to_float)
    fn(bytes(data), y, n)
    out[name] = {"bytes": data.hex(), "f32": bytes(y).hex()}
print("{\n" + ",\n".join(f'"{k}": {json.dumps(v)}' for k, v in out.items()) + "\n}")
