"""Checkpoints in and out: Hub folders and GGUF files become starting points, training states become Hub folders and GGUF
files.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from . import data
from .configuration_phd import FAMILIES, PhdConfig
from .modeling_phd import PhdForCausalLM


def load(source, phd=None, with_tokenizer=True):
    """(model in float32, tokenizer.json's text or None) of a Hub folder or a GGUF file. `phd` replaces the checkpoint's
    own rules: the copies share all weights, so upcycling a vanilla checkpoint is no more than that."""
    source = Path(source)
    if source.suffix == ".gguf":
        model, tokenizer = _load_gguf(source, with_tokenizer)
        if phd is not None:
            model = _with_rules(model, phd)
        return model, tokenizer
    if not (source / "config.json").is_file():
        raise FileNotFoundError(f"{source} is neither a GGUF file nor a folder with config.json")
    model = PhdForCausalLM.from_pretrained(source, dtype=torch.float32)
    if phd is not None:
        model = _with_rules(model, phd)
    tokenizer = source / "tokenizer.json"
    return model, tokenizer.read_text() if with_tokenizer and tokenizer.is_file() else None


def _with_rules(model, phd):
    config = PhdConfig(**{**model.config.to_dict(), "phd": phd})
    config._attn_implementation = model.config._attn_implementation
    other = PhdForCausalLM(config)
    other.load_state_dict(model.state_dict())
    return other


def _load_gguf(path, with_tokenizer):
    """transformers dequantizes the vanilla base and takes llama.cpp's reordering of q and k back; `phd.*` is read beside it."""
    from gguf import GGUFReader
    from transformers import AutoConfig, AutoModelForCausalLM

    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    fields = GGUFReader(path).fields
    rules = {
        key: int(fields[f"phd.{key}"].contents()) for key in ("copies", "window", "chunk") if f"phd.{key}" in fields
    }
    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    if config.model_type not in FAMILIES:
        raise ValueError(f"{path}: architecture {config.model_type!r}, expected one of {', '.join(FAMILIES)}")
    head_dim = fields.get(f"{fields['general.architecture'].contents()}.attention.key_length")
    if head_dim is not None:  # transformers takes Qwen3's usual 128
        config.head_dim = int(head_dim.contents())
    base, found = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, config=config, dtype=torch.float32, output_loading_info=True
    )
    wrong = [*found["mismatched_keys"], *found["missing_keys"]]
    if wrong:  # transformers would go on with random weights
        raise ValueError(f"{path}: no fitting weights for {', '.join(map(str, wrong))}")
    config = base.config.to_dict()
    config.pop("architectures", None)
    model = PhdForCausalLM(PhdConfig(**{**config, "phd": rules or None}))
    model.load_state_dict(base.state_dict())
    if not with_tokenizer:
        return model, None
    # transformers would give all byte-level files GPT-2's words.
    tokenizer = data.gguf_tokenizer(fields)
    return model, tokenizer.to_str() if tokenizer else None


def save_hub(model, tokenizer, out, dtype=torch.bfloat16, generation=None):
    """A Hub folder that transformers reads with trust_remote_code, and libphd as it is. A half-written one never has its name."""
    out = Path(out)
    scratch = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    config = PhdConfig(**model.config.to_dict())
    copy = PhdForCausalLM(config)
    copy.load_state_dict(model.state_dict())
    copy.to(dtype).save_pretrained(scratch)
    config = json.loads((scratch / "config.json").read_text())
    # A program that does not know hidden decoding runs the vanilla base.
    config["architectures"] = [FAMILIES[config["model_type"]]]
    config["torch_dtype"] = str(dtype).removeprefix("torch.")
    end = None
    if tokenizer is not None:
        from tokenizers import Tokenizer

        (scratch / "tokenizer.json").write_text(tokenizer)
        (scratch / "tokenizer_config.json").write_text(data.tokenizer_config(Tokenizer.from_str(tokenizer)))
        end = data.end_of_text(Tokenizer.from_str(tokenizer))
        config["bos_token_id"] = config["eos_token_id"] = end
    (scratch / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    generation = {**({} if end is None else {"bos_token_id": end, "eos_token_id": end}), **(generation or {})}
    (scratch / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    shutil.rmtree(out, ignore_errors=True)
    scratch.rename(out)


def load_training_arguments(run):
    """What a run's checkpoint says of how it was trained, as texts."""
    return torch.load(Path(run) / "checkpoint.pt", map_location="cpu", weights_only=True)["identity"]


def convert(phd, folder, out, kinds):
    """GGUF files of a Hub folder by libphd's converter, one for each type: OUT-TYPE.gguf."""
    files = []
    for kind in kinds:
        path = Path(f"{out}-{kind}.gguf")
        subprocess.run([phd, "convert", folder, path, "--type", kind], check=True)
        files.append(path)
    return files


def main(argv=None):
    parser = argparse.ArgumentParser(prog="phd-export", description=main.__doc__)
    parser.add_argument("run", type=Path, help="a training run's folder, a Hub folder or a GGUF file")
    parser.add_argument("out", type=Path, help="the Hub folder to write")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--copies", type=int, help="K instead of the checkpoint's own")
    parser.add_argument("--window", type=int, default=0, help="W in hidden tokens, with --copies")
    parser.add_argument("--chunk", type=int, default=0, help="C in positions, with --window")
    parser.add_argument(
        "--gguf", nargs="*", default=[], metavar="TYPE", help="also OUT-TYPE.gguf: f32, bf16, q8_0, q4_k, ..."
    )
    parser.add_argument("--phd", default="phd", help="libphd's command line program, for --gguf")
    args = parser.parse_args(argv)
    rules = None if args.copies is None else {"copies": args.copies, "window": args.window, "chunk": args.chunk}
    if (args.run / "checkpoint.pt").is_file():
        from .train import load_run

        model, tokenizer = load_run(args.run)
        if rules is not None:
            model = _with_rules(model, rules)
    else:
        model, tokenizer = load(args.run, rules)
    save_hub(model, tokenizer, args.out, getattr(torch, args.dtype))
    convert(args.phd, args.out, args.out, args.gguf)
    return 0


main.__doc__ = "Write a training run, a Hub folder or a GGUF file as a Hub folder, and as GGUF files."

if __name__ == "__main__":
    sys.exit(main())
