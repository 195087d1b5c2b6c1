#!/usr/bin/env python3
"""Writes a GGUF file of random weights in the shape of the paper's 1.2B model, for timing; what it says is noise.

    bench/random_gguf.py Q4_0 /tmp/1b-q4_0.gguf

Hidden size 2048, 16 layers, feed-forward 8192, 32 query and 8 key/value heads of 64, a tied vocabulary of 100,352: arXiv
2504.14992, table of model sizes, whose "16384" counts gate and up together. Options give other sizes, all multiples of 256 for
the K-quants. Norms are F32, all else is of the type given.
"""
import argparse
import math
import random
import struct

TYPES = {  # name: (ggml number, elements of a block, bytes of a block, offsets of its f16 scales)
    "F16": (1, 1, 2, [0]),
    "Q4_0": (2, 32, 18, [0]),
    "Q4_1": (3, 32, 20, [0, 2]),
    "Q8_0": (8, 32, 34, [0]),
    "Q4_K": (12, 256, 144, [0, 2]),
    "Q5_K": (13, 256, 176, [0, 2]),
    "Q6_K": (14, 256, 210, [208]),
}


def string(text):
    return struct.pack("<Q", len(text)) + text.encode()


def metadata(key, value):
    if isinstance(value, str):
        return string(key) + struct.pack("<I", 8) + string(value)
    if isinstance(value, float):
        return string(key) + struct.pack("<If", 6, value)
    return string(key) + struct.pack("<II", 4, value)


def arguments(given=None):
    parser = argparse.ArgumentParser(description="Writes a GGUF file of random weights, by default in the shape of the paper's 1.2B model.")
    parser.add_argument("type", choices=TYPES)
    parser.add_argument("file")
    for name, size in [("hidden", 2048), ("layers", 16), ("feed-forward", 8192), ("heads", 32), ("kv-heads", 8), ("vocabulary", 100352)]:
        parser.add_argument(f"--{name}", type=int, default=size, help=str(size))
    args = parser.parse_args(given)
    block = TYPES[args.type][1]
    if min(args.hidden, args.layers, args.feed_forward, args.heads, args.kv_heads, args.vocabulary) < 1:
        parser.error("sizes are at least 1")
    if args.hidden % block or args.feed_forward % block:
        parser.error(f"--hidden and --feed-forward are multiples of {block} for {args.type}")
    if args.hidden % args.heads or args.heads % args.kv_heads:
        parser.error("--heads divides --hidden, --kv-heads divides --heads")
    return args


def layout(args):
    """The file's beginning, up to its tensors, and these: (name, shape)."""
    number, block, block_bytes, _ = TYPES[args.type]
    hidden, feed_forward, kv = args.hidden, args.feed_forward, args.hidden // args.heads * args.kv_heads
    tensors = [("token_embd.weight", [args.vocabulary, hidden]), ("output_norm.weight", [hidden])]
    for i in range(args.layers):
        tensors += [
            (f"blk.{i}.attn_norm.weight", [hidden]),
            (f"blk.{i}.attn_q.weight", [hidden, hidden]),
            (f"blk.{i}.attn_k.weight", [kv, hidden]),
            (f"blk.{i}.attn_v.weight", [kv, hidden]),
            (f"blk.{i}.attn_output.weight", [hidden, hidden]),
            (f"blk.{i}.ffn_norm.weight", [hidden]),
            (f"blk.{i}.ffn_gate.weight", [feed_forward, hidden]),
            (f"blk.{i}.ffn_up.weight", [feed_forward, hidden]),
            (f"blk.{i}.ffn_down.weight", [hidden, feed_forward]),
        ]
    parameters = sum(math.prod(shape) for _, shape in tensors)
    fields = {
        "general.architecture": "llama",
        "general.name": f"random weights, {parameters / 1e9:.2g}B, {args.type}",
        "llama.block_count": args.layers,
        "llama.context_length": 32768,
        "llama.embedding_length": hidden,
        "llama.feed_forward_length": feed_forward,
        "llama.attention.head_count": args.heads,
        "llama.attention.head_count_kv": args.kv_heads,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 500000.0,
        "llama.vocab_size": args.vocabulary,
        "tokenizer.ggml.model": "no_vocab",
    }
    header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(fields))
    header += b"".join(metadata(k, v) for k, v in fields.items())
    offset = 0
    for name, shape in tensors:
        size = math.prod(shape) // block * block_bytes if len(shape) > 1 else 4 * shape[0]
        header += string(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        header += struct.pack("<IQ", number if len(shape) > 1 else 0, offset)
        offset += (size + 31) // 32 * 32
    return header, tensors


def main():
    args = arguments()
    _, block, block_bytes, scales = TYPES[args.type]
    header, tensors = layout(args)
    random.seed(1)
    # One piece of noise, repeated: 65,536 elements with scales that keep activations in range.
    noise = bytearray(random.randbytes((1 << 16) // block * block_bytes))
    for at in range(0, len(noise), block_bytes):
        for scale in scales:
            noise[at + scale : at + scale + 2] = struct.pack("<e", random.uniform(0.5, 1.5) * 1e-3)
    with open(args.file, "wb") as file:
        file.write(header)
        for _, shape in tensors:
            file.write(b"\0" * (-file.tell() % 32))
            if len(shape) == 1:
                file.write(struct.pack("<f", 1.0) * shape[0])
                continue
            left = math.prod(shape) // block * block_bytes
            while left > 0:
                file.write(noise[: min(left, len(noise))])
                left -= len(noise)
        file.write(b"\0" * (-file.tell() % 32))


if __name__ == "__main__":
    main()
