"""Held-out loss in PyTorch, as `phd score` measures it."""

import argparse
import json
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from . import data


@torch.no_grad()
def token_losses(model, tokens, segment, batch=8):
    """(sum of negative log-likelihoods in nats, number of tokens scored), in float32 whatever the weights are."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    total, count = 0.0, 0
    pending = list(data.segments(tokens, segment))
    while pending:
        same = [s for s in pending[:batch] if len(s) == len(pending[0])]
        pending = pending[len(same) :]
        ids = torch.as_tensor(data.np.stack(same)).to(device)
        logits = model(ids[:, :-1], use_cache=False).logits.float()
        total += F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").double().sum().item()
        count += ids[:, 1:].numel()
    model.train(was_training)
    return total, count


def evaluate(model, tokenizer, text, segment):
    """What `phd score` reports, and bits per byte, which models with other tokenizers can be compared by."""
    tokens = tokenizer.encode(text, add_special_tokens=False).ids
    total, count = token_losses(model, tokens, segment)
    scored = sum(len(tokenizer.decode(list(s[1:])).encode()) for s in data.segments(tokens, segment))
    return {
        "mean_nll": total / count,
        "positions": count,
        "segment": segment,
        "bits_per_byte": total / math.log(2) / scored,
    }


def main(argv=None):
    from tokenizers import Tokenizer

    from .export import load

    parser = argparse.ArgumentParser(
        prog="phd-evaluate", description="Held-out loss of a Hub folder or GGUF file in PyTorch."
    )
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--segment", type=int, default=512)
    parser.add_argument("--copies", type=int, help="K instead of the checkpoint's own")
    parser.add_argument("--window", type=int, default=0)
    parser.add_argument("--chunk", type=int, default=0)
    args = parser.parse_args(argv)
    rules = None if args.copies is None else {"copies": args.copies, "window": args.window, "chunk": args.chunk}
    model, tokenizer = load(args.model, rules)
    print(json.dumps(evaluate(model, Tokenizer.from_str(tokenizer), args.text.read_text(), args.segment)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
