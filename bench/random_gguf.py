#!/usr/bin/env python3
"""Writes a GGUF file of random weights in the shape of the paper's 1.2B model, for timing; what it says is noise.

    bench/random_gguf.py Q4_0 /tmp/1b-q4_0.gguf

Hidden size 2048, 16 layers, feed-forward 8192, 32 query and 8 key/value heads of 64, a tied vocabulary of 100,352: arXiv
2504.14992, table of model sizes, whose "16384" counts gate and up together. Norms are F32, all else is of the type given.
"""
import random
import struct
import sys

TYPES = {  # name: (ggml number, elements of a block, bytes of a block, offsets of its f16 scales)
    "F16": (1, 1, 2, [0]),
    "Q4_0": (2, 32, 18, [0]),
    "Q4_1": (3, 32, 20, [0, 2]),
    "Q8_0": (8, 32, 34, [0]),
    "Q4_K": (12, 256, 144, [0, 2]),
    "Q5_K": (13, 256, 176, [0, 2]),
    "Q6_K": (14, 256, 210, [208]),
}
HIDDEN, LAYERS, FEED_FORWARD, HEADS, KV_HEADS, HEAD, VOCABULARY = 2048, 16, 8192, 32, 8, 64, 100352


def string(text):
    return struct.pack("<Q", len(text)) + text.encode()


def metadata(key, value):
    if isinstance(value, str):
        return string(key) + struct.pack("<I", 8) + string(value)
    if isinstance(value, float):
        return string(key) + struct.pack("<If", 6, value)
    return string(key) + struct.pack("<II", 4, value)


def main():
    if len(sys.argv) != 3 or sys.argv[1] not in TYPES:
        sys.exit(f"usage: {sys.argv[0]} {'|'.join(TYPES)} FILE")
    number, block, block_bytes, scales = TYPES[sys.argv[1]]
    tensors = [("token_embd.weight", [VOCABULARY, HIDDEN]), ("output_norm.weight", [HIDDEN])]
    for i in range(LAYERS):
        tensors += [
            (f"blk.{i}.attn_norm.weight", [HIDDEN]),
            (f"blk.{i}.attn_q.weight", [HEADS * HEAD, HIDDEN]),
            (f"blk.{i}.attn_k.weight", [KV_HEADS * HEAD, HIDDEN]),
            (f"blk.{i}.attn_v.weight", [KV_HEADS * HEAD, HIDDEN]),
            (f"blk.{i}.attn_output.weight", [HIDDEN, HEADS * HEAD]),
            (f"blk.{i}.ffn_norm.weight", [HIDDEN]),
            (f"blk.{i}.ffn_gate.weight", [FEED_FORWARD, HIDDEN]),
            (f"blk.{i}.ffn_up.weight", [FEED_FORWARD, HIDDEN]),
            (f"blk.{i}.ffn_down.weight", [HIDDEN, FEED_FORWARD]),
        ]
    fields = {
        "general.architecture": "llama",
        "general.name": f"random weights, 1.2B, {sys.argv[1]}",
        "llama.block_count": LAYERS,
        "llama.context_length": 32768,
        "llama.embedding_length": HIDDEN,
        "llama.feed_forward_length": FEED_FORWARD,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 500000.0,
        "llama.vocab_size": VOCABULARY,
        "tokenizer.ggml.model": "no_vocab",
    }
    header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(fields))
    header += b"".join(metadata(k, v) for k, v in fields.items())
    offset = 0
    for name, shape in tensors:
        elements = shape[0] * (shape[1] if len(shape) > 1 else 1)
        size = elements // block * block_bytes if len(shape) > 1 else 4 * elements
        header += string(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        header += struct.pack("<IQ", number if len(shape) > 1 else 0, offset)
        offset += (size + 31) // 32 * 32

    random.seed(1)
    # One piece of noise, repeated: 256 blocks with scales that keep activations in range.
    noise = bytearray(random.randbytes(256 * block_bytes))
    for at in range(0, len(noise), block_bytes):
        for scale in scales:
            noise[at + scale : at + scale + 2] = struct.pack("<e", random.uniform(0.5, 1.5) * 1e-3)
    with open(sys.argv[2], "wb") as file:
        file.write(header)
        for name, shape in tensors:
            file.write(b"\0" * (-file.tell() % 32))
            if len(shape) == 1:
                file.write(struct.pack("<f", 1.0) * shape[0])
                continue
            left = shape[0] * shape[1] // block * block_bytes
            while left > 0:
                file.write(noise[: min(left, len(noise))])
                left -= len(noise)
        file.write(b"\0" * (-file.tell() % 32))


main()
