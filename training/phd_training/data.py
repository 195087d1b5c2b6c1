"""Plain text files to tokens, tokens to packed windows in a reproducible order."""

import hashlib
import io
import json
import os
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

END = "<|endoftext|>"


def train_tokenizer(files, vocab_size):
    """Byte-level BPE with GPT-2's words, which `phd convert` knows; token 0 ends a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train([str(f) for f in files], trainer)
    return tokenizer


# How byte-level BPE cuts words, by GGUF's names: patterns that apply one after the other, and whether whole words skip the merges.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GGUF_WORDS = {
    "gpt-2": ([GPT2], False),
    "gpt2": ([GPT2], False),
    "olmo": ([GPT2], False),
    "smollm": ([r"\p{N}", GPT2], False),
    "qwen2": ([_LLAMA3 % ""], False),
    "dbrx": ([_LLAMA3 % "{1,3}"], False),
    "llama-bpe": ([_LLAMA3 % "{1,3}"], True),
}


def gguf_tokenizer(fields):
    """The byte-level BPE that a GGUF file describes, or None if it has no vocabulary."""
    if "tokenizer.ggml.tokens" not in fields:
        return None
    kind = fields["tokenizer.ggml.model"].contents()
    pre = fields["tokenizer.ggml.pre"].contents() if "tokenizer.ggml.pre" in fields else "gpt-2"
    if kind != "gpt2" or pre not in GGUF_WORDS:
        raise ValueError(
            f"the file's tokenizer is {kind!r} with words {pre!r}, expected 'gpt2' with one of {', '.join(GGUF_WORDS)}: "
            "name its tokenizer.json with --tokenizer"
        )
    tokens = fields["tokenizer.ggml.tokens"].contents()
    types = (
        fields["tokenizer.ggml.token_type"].contents() if "tokenizer.ggml.token_type" in fields else [1] * len(tokens)
    )
    merges = []
    for merge in fields["tokenizer.ggml.merges"].contents():
        cut = merge.index(" ", 1)
        merges.append((merge[:cut], merge[cut + 1 :]))
    patterns, ignore_merges = GGUF_WORDS[pre]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges, ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    # 2: unknown, 3: control, 4: defined by the user
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t, k in zip(tokens, types) if k in (2, 3)]
    )
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t, k in zip(tokens, types) if k == 4])
    return tokenizer


def end_of_text(tokenizer):
    for name in (END, "<|im_end|>", "</s>", "<|end_of_text|>"):
        if (found := tokenizer.token_to_id(name)) is not None:
            return found
    raise ValueError(f"the tokenizer has none of the usual ends of text, such as {END}")


def write_atomically(path, data):
    """The file is the old one or the new one, whenever the machine stops."""
    path = Path(path)
    scratch = path.with_name(f".{path.name}.tmp")
    with open(scratch, "wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
    os.replace(scratch, path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def encode_files(files, tokenizer, cache):
    """Tokens of all files, each followed by the end of text, as a mapped array; kept in `cache` under the inputs' hash."""
    digest = hashlib.sha256(tokenizer.to_str().encode())
    texts = []
    for name in files:
        data = Path(name).read_bytes()
        digest.update(len(data).to_bytes(8, "little") + data)
        try:
            texts.append(data.decode())
        except UnicodeDecodeError as error:
            raise ValueError(f"{name} is not UTF-8: {error}") from None
    path = Path(cache) / f"tokens-{digest.hexdigest()[:16]}.npy"
    if not path.exists():
        end = end_of_text(tokenizer)
        ids = [
            np.asarray([*encoding.ids, end], np.uint32)
            for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)
        ]
        tokens = np.concatenate(ids)
        if tokenizer.get_vocab_size() <= 1 << 16:
            tokens = tokens.astype(np.uint16)
        path.parent.mkdir(parents=True, exist_ok=True)
        header = _npy_header(tokens)
        write_atomically(path, header + tokens.tobytes())
    return np.load(path, mmap_mode="r")


def _npy_header(array):
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, np.lib.format.header_data_from_array_1_0(array))
    return buffer.getvalue()


class Windows:
    """Windows of n inputs and the token after the last. Which window comes when depends on the seed and its number alone, so
    a resumed run needs no state: each pass over the text starts at another offset and has another order."""

    def __init__(self, tokens, length, seed):
        self.tokens, self.length, self.seed = tokens, length, seed
        self.per_pass = (len(tokens) - 1) // length - 1
        if self.per_pass < 1:
            raise ValueError(f"the text has {len(tokens)} tokens, too few for windows of {length}")
        self._pass, self._offset, self._order = -1, 0, None

    def window(self, number):
        which, index = divmod(number, self.per_pass)
        if which != self._pass:
            rng = np.random.default_rng([self.seed, which])
            self._pass, self._offset, self._order = (
                which,
                int(rng.integers(self.length)),
                rng.permutation(self.per_pass),
            )
        start = self._offset + int(self._order[index]) * self.length
        return np.asarray(self.tokens[start : start + self.length + 1], np.int64)

    def batch(self, first, count):
        return np.stack([self.window(first + i) for i in range(count)])


def segments(tokens, length):
    """Held-out text as `phd score` cuts it: each segment starts from nothing, so its first token is not scored."""
    for start in range(0, len(tokens), length):
        if len(tokens) - start > 1:
            yield np.asarray(tokens[start : start + length], np.int64)


def tokenizer_config(tokenizer):
    return (
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": END,
                "eos_token": END,
                "add_bos_token": False,
                "clean_up_tokenization_spaces": False,
            },
            indent=2,
        )
        + "\n"
    )
