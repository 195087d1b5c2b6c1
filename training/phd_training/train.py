"""Train hidden-decoding models: from scratch, or from a vanilla checkpoint whose weights K copies then share.

    phd-train --config recipes/demo.toml --out runs/demo
    torchrun --nproc-per-node 8 -m phd_training.train --engine fsdp --config ...

Killed at any moment and started again with the same command, it goes on from its last checkpoint and arrives at the same bits.
"""

import argparse
import contextlib
import io
import json
import math
import os
import signal
import sys
import time
import tomllib
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tokenizers import Tokenizer
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from . import data
from .configuration_phd import FAMILIES, PhdConfig
from .evaluate import token_losses
from .export import load, save_hub
from .modeling_phd import PhdForCausalLM

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def arguments(argv=None):
    parser = argparse.ArgumentParser(
        prog="phd-train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--config", type=Path, help="TOML file whose keys are these options; the command line wins")
    add(
        "--out",
        type=Path,
        required=True,
        help="folder of the run: checkpoint.pt, log.jsonl, tensorboard/, at the end model/",
    )

    text = parser.add_argument_group("text")
    text.add_argument("--data", nargs="+", type=Path, default=[], help="UTF-8 files, or folders of *.txt")
    text.add_argument("--held-out", type=Path, help="UTF-8 file for evaluation")
    text.add_argument("--tokenizer", type=Path, help="tokenizer.json; without it the checkpoint's own or a new one")
    text.add_argument("--vocab-size", type=int, default=4096, help="of a new tokenizer")
    text.add_argument("--context", type=int, default=512, help="tokens to a window")

    model = parser.add_argument_group("model")
    model.add_argument("--init", help="Hub folder or GGUF file to start from; else from scratch with the options below")
    model.add_argument("--family", default="llama", choices=sorted(set(FAMILIES) - {"qwen3_scale_seq"}))
    model.add_argument("--hidden-size", type=int, default=256)
    model.add_argument("--intermediate-size", type=int, default=704)
    model.add_argument("--layers", type=int, default=8)
    model.add_argument("--heads", type=int, default=8)
    model.add_argument("--kv-heads", type=int, default=4)
    model.add_argument("--untied", action="store_true", help="an output layer of its own")
    model.add_argument("--max-positions", type=int, default=2048)
    model.add_argument("--copies", type=int, help="K: how often a token is read [default: the checkpoint's, or 1]")
    model.add_argument("--window", type=int, default=0, help="W in hidden tokens")
    model.add_argument("--chunk", type=int, default=0, help="C in positions")

    how = parser.add_argument_group("training")
    how.add_argument("--tokens", type=float, default=1e7, help="how many to train on")
    how.add_argument("--batch", type=int, default=16, help="windows to a step, over all processes")
    how.add_argument("--micro-batch", type=int, help="windows to a pass of one process [default: all of its share]")
    how.add_argument("--lr", type=float, default=1e-3)
    how.add_argument("--min-lr", type=float, default=0.1, help="share of --lr at the end of the cosine")
    how.add_argument("--warmup", type=float, default=0.02, help="share of the steps")
    how.add_argument("--weight-decay", type=float, default=0.1)
    how.add_argument("--beta2", type=float, default=0.95)
    how.add_argument("--clip", type=float, default=1.0, help="largest norm of the gradient; 0 = any")
    how.add_argument("--seed", type=int, default=1)
    how.add_argument("--stop-after", type=int, help="end at this step; the schedule stays that of --tokens")

    run = parser.add_argument_group("running")
    run.add_argument(
        "--bf16", action="store_true", help="matrix products and attention in bfloat16; weights stay float32"
    )
    run.add_argument("--compile", action="store_true", help="torch.compile the layers")
    run.add_argument("--gradient-checkpointing", action="store_true")
    run.add_argument("--attention", choices=["sdpa", "flex_attention"], help="[default: flex_attention on CUDA]")
    run.add_argument("--device", help="[default: cuda if there is one]")
    run.add_argument("--threads", type=int, help="CPU threads")
    run.add_argument("--engine", default="ddp", choices=["ddp", "fsdp"], help="for more than one process")
    run.add_argument("--save-seconds", type=float, default=60, help="time between checkpoints")
    run.add_argument("--save-steps", type=int, default=0, help="steps between checkpoints, besides; 0 = by time alone")
    run.add_argument("--log-steps", type=int, default=10)
    run.add_argument("--eval-steps", type=int, default=500, help="0 = at the end alone")
    run.add_argument(
        "--dtype", default="bfloat16", choices=["float32", "float16", "bfloat16"], help="of the weights in model/"
    )
    run.add_argument("--no-tensorboard", action="store_true")

    known, _ = parser.parse_known_args(argv)
    if known.config:
        with open(known.config, "rb") as f:
            values = {key.replace("-", "_"): value for key, value in tomllib.load(f).items()}
        unknown = set(values) - set(vars(known))
        if unknown:
            parser.error(f"{known.config}: unknown keys {', '.join(sorted(unknown))}")
        here = known.config.parent
        for key in ("data", "held_out", "tokenizer"):  # paths in the file are relative to it
            if key in values:
                values[key] = [here / v for v in values[key]] if key == "data" else here / values[key]
        parser.set_defaults(**values)
    args = parser.parse_args(argv)
    if not args.data:
        parser.error("--data: no text to train on")
    return args


def text_files(paths):
    files = [f for path in paths for f in (sorted(path.glob("*.txt")) if path.is_dir() else [path])]
    if not files:
        raise FileNotFoundError(f"no *.txt in {', '.join(map(str, paths))}")
    return files


def rules_of(args):
    return None if args.copies is None else {"copies": args.copies, "window": args.window, "chunk": args.chunk}


class World:
    """The processes that train together; one alone if torchrun did not start this."""

    def __init__(self, device):
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if device == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        if self.size > 1:
            dist.init_process_group("nccl" if device == "cuda" else "gloo")
        self.device = device

    def any(self, flag):
        """Whether it is true in any process: decisions must be the same in all."""
        if self.size == 1:
            return flag
        value = torch.tensor([float(flag)], device=self.device)
        dist.all_reduce(value, dist.ReduceOp.MAX)
        return bool(value.item())

    def mean(self, value):
        if self.size == 1:
            return value
        value = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.all_reduce(value)
        return value.item() / self.size

    def first_does(self, action):
        """The first process's result, after which the others do the same (they find its files)."""
        result = action() if self.rank == 0 else None
        if self.size > 1:
            dist.barrier()
            if self.rank:
                result = action()
        return result

    def close(self):
        if self.size > 1:
            dist.destroy_process_group()


def build(args, tokenizer_path):
    """(model, tokenizer.json's text): from a checkpoint or from scratch. The run keeps the tokenizer that it first had."""
    torch.manual_seed(args.seed)
    text = tokenizer_path.read_text() if tokenizer_path.is_file() else None
    if args.init:
        model, own = load(args.init, rules_of(args), with_tokenizer=not (text or args.tokenizer))
        text = text or (args.tokenizer.read_text() if args.tokenizer else own)
        if text is None:
            raise ValueError(f"{args.init} has no tokenizer: --tokenizer names one")
    else:
        if text is None:
            text = (
                args.tokenizer.read_text()
                if args.tokenizer
                else data.train_tokenizer(text_files(args.data), args.vocab_size).to_str(pretty=True)
            )
        model = PhdForCausalLM(
            PhdConfig(
                model_type=args.family,
                vocab_size=Tokenizer.from_str(text).get_vocab_size(),
                hidden_size=args.hidden_size,
                intermediate_size=args.intermediate_size,
                num_hidden_layers=args.layers,
                num_attention_heads=args.heads,
                num_key_value_heads=args.kv_heads,
                tie_word_embeddings=not args.untied,
                rms_norm_eps=1e-5,
                max_position_embeddings=args.max_positions,
                phd=rules_of(args),
            )
        )
    if Tokenizer.from_str(text).get_vocab_size() > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {Tokenizer.from_str(text).get_vocab_size()} tokens, the model {model.config.vocab_size}"
        )
    if not tokenizer_path.is_file():
        data.write_atomically(tokenizer_path, text.encode())
    return model, text


def learning_rate(step, steps, args):
    """Of step 1..steps: a linear rise, then half a cosine down to --min-lr of it."""
    warmup = max(round(args.warmup * steps), 1)
    if step <= warmup:
        return args.lr * step / warmup
    share = (step - warmup) / max(steps - warmup, 1)
    return args.lr * (args.min_lr + (1 - args.min_lr) * 0.5 * (1 + math.cos(math.pi * share)))


class Log:
    """log.jsonl and TensorBoard. A resumed run drops what was logged after its checkpoint and logs it again."""

    def __init__(self, out, step, tensorboard):
        self.path = out / "log.jsonl"
        if self.path.exists():
            kept = [line for line in self.path.read_text().splitlines() if self._step(line) <= step]
            data.write_atomically(self.path, "".join(line + "\n" for line in kept).encode())
        self.writer = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(out / "tensorboard", purge_step=step + 1)

    @staticmethod
    def _step(line):
        try:
            return json.loads(line)["step"]
        except (ValueError, KeyError):  # the line that was being written when the process was killed
            return math.inf

    def add(self, **values):
        with open(self.path, "a") as f:
            f.write(json.dumps(values) + "\n")
        if self.writer:
            for key, value in values.items():
                if key != "step":
                    self.writer.add_scalar(key, value, values["step"])

    def close(self):
        if self.writer:
            self.writer.close()


def load_run(out):
    """(model, tokenizer.json's text) of a run's last checkpoint."""
    state = torch.load(out / "checkpoint.pt", map_location="cpu", weights_only=True)
    model = PhdForCausalLM(PhdConfig(**state["config"]))
    model.load_state_dict(state["model"])
    return model, (out / "tokenizer.json").read_text()


def train(args):
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    world = World(device)
    if args.batch % world.size:
        raise ValueError(f"--batch is {args.batch}, expected a multiple of the {world.size} processes")
    share = args.batch // world.size
    micro = args.micro_batch or share
    if share % micro:
        raise ValueError(f"--micro-batch is {micro}, expected a divisor of a process's {share} windows")
    args.out.mkdir(parents=True, exist_ok=True)

    tokenizer_path = args.out / "tokenizer.json"
    model, tokenizer_text = world.first_does(lambda: build(args, tokenizer_path))
    tokenizer = Tokenizer.from_str(tokenizer_text)
    tokens = world.first_does(lambda: data.encode_files(text_files(args.data), tokenizer, args.out))
    held_out = None
    if args.held_out:
        held_out = np.asarray(tokenizer.encode(args.held_out.read_text(), add_special_tokens=False).ids)
    windows = data.Windows(tokens, args.context, args.seed)
    steps = max(round(args.tokens / (args.batch * args.context)), 1)

    model.config._attn_implementation = args.attention or ("flex_attention" if device == "cuda" else "sdpa")
    if args.gradient_checkpointing:
        model.activation_checkpointing_enable()
    model.to(device).train()
    plain = model
    if args.compile:
        for layer in model.model.layers:
            layer.compile(dynamic=False)
    if world.size > 1 and args.engine == "fsdp":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(device, (world.size,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    elif world.size > 1:
        model = torch.nn.parallel.DistributedDataParallel(model)

    decayed = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": args.weight_decay}, {"params": rest, "weight_decay": 0.0}],
        lr=args.lr,
        betas=(0.9, args.beta2),
        fused=True,
    )

    # What must be the same for a resumed run to be the same run.
    identity = {
        key: str(getattr(args, key))
        for key in (
            "tokens",
            "batch",
            "context",
            "lr",
            "min_lr",
            "warmup",
            "weight_decay",
            "beta2",
            "clip",
            "seed",
            "bf16",
            "compile",
        )
    }
    identity.update(world=str(world.size), text=str(len(tokens)), rules=str(plain.config.phd))
    state = {"step": 0, "loss_sum": 0.0, "loss_steps": 0, "seconds": 0.0, "cpu_seconds": 0.0}
    checkpoint = args.out / "checkpoint.pt"
    if checkpoint.is_file():
        saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
        different = {
            key: (saved["identity"].get(key), value)
            for key, value in identity.items()
            if saved["identity"].get(key) != value
        }
        if different:
            raise ValueError(
                f"{checkpoint} is of another run: {', '.join(f'{k} was {a}, is {b}' for k, (a, b) in different.items())}"
            )
        set_state_dict(
            model,
            optimizer,
            model_state_dict=saved["model"],
            optim_state_dict=saved["optimizer"],
            options=StateDictOptions(full_state_dict=True),
        )
        state = saved["state"]
        torch.set_rng_state(saved["rng"])
        del saved

    def save():
        weights, moments = get_state_dict(model, optimizer, options=WHOLE)
        if world.rank == 0:
            buffer = io.BytesIO()
            torch.save(
                {
                    "model": weights,
                    "optimizer": moments,
                    "state": state,
                    "identity": identity,
                    "rng": torch.get_rng_state(),
                    "config": plain.config.to_dict(),
                },
                buffer,
            )
            data.write_atomically(checkpoint, buffer.getbuffer())

    stopped = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _frame: stopped.append(received))

    log = Log(args.out, state["step"], not args.no_tensorboard) if world.rank == 0 else None
    if world.rank == 0:
        from tqdm import tqdm

        parameters = sum(p.numel() for p in plain.parameters())
        embedding = plain.config.vocab_size * plain.config.hidden_size
        print(
            f"{parameters:,} parameters ({parameters - embedding:,} without the embedding), {len(tokens):,} tokens of text, "
            f"{steps} steps of {args.batch * args.context} tokens; from step {state['step']}",
            flush=True,
        )
        bar = tqdm(
            total=steps * args.batch * args.context,
            initial=state["step"] * args.batch * args.context,
            unit="tok",
            unit_scale=True,
            smoothing=0.05,
            mininterval=1.0 if sys.stderr.isatty() else 30.0,
            file=sys.stderr,
        )
    autocast = torch.autocast(device, torch.bfloat16) if args.bf16 else contextlib.nullcontext()
    clock, cpu_clock, last_save = time.monotonic(), time.process_time(), time.monotonic()
    last = min(steps, args.stop_after or steps)

    def held_out_loss():
        # Each process does all of it: with FSDP they must run alike. In float32, and uncompiled: its shapes come but once.
        with torch.compiler.set_stance("force_eager"):
            total, count = token_losses(plain, held_out, args.context)
        return total / count

    while state["step"] < last:
        step = state["step"] + 1
        lr = learning_rate(step, steps, args)
        for group in optimizer.param_groups:
            group["lr"] = lr
        batch = torch.as_tensor(windows.batch((step - 1) * args.batch + world.rank * share, share)).to(device)
        loss_sum = 0.0
        for part in batch.split(micro):
            sync = contextlib.nullcontext()
            if (
                isinstance(model, torch.nn.parallel.DistributedDataParallel)
                and part.data_ptr() != batch[-micro:].data_ptr()
            ):
                sync = model.no_sync()
            with sync:
                with autocast:
                    loss = model(part[:, :-1], shift_labels=part[:, 1:], use_cache=False).loss * (len(part) / share)
                loss.backward()
            loss_sum += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip or math.inf)
        if not math.isfinite(loss_sum):
            raise FloatingPointError(f"the loss of step {step} is {loss_sum}: a lower --lr may help")
        optimizer.step()
        optimizer.zero_grad()

        now, cpu_now = time.monotonic(), time.process_time()
        state["seconds"] += now - clock
        state["cpu_seconds"] += cpu_now - cpu_clock
        clock, cpu_clock = now, cpu_now
        state["step"] = step
        state["loss_sum"] += loss_sum
        state["loss_steps"] += 1
        if step % args.log_steps == 0 or step == last:
            mean = world.mean(state["loss_sum"] / state["loss_steps"])
            state["loss_sum"], state["loss_steps"] = 0.0, 0
            norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
            if log:
                log.add(
                    step=step,
                    tokens=step * args.batch * args.context,
                    loss=mean,
                    lr=lr,
                    gradient_norm=norm,
                    seconds=round(state["seconds"], 2),
                    cpu_seconds=round(state["cpu_seconds"], 2),
                )
                bar.set_postfix(loss=f"{mean:.3f}", refresh=False)
        if world.rank == 0:
            bar.update(args.batch * args.context)
        if held_out is not None and (step == steps or (args.eval_steps and step % args.eval_steps == 0)):
            found = held_out_loss()
            if log:
                log.add(step=step, held_out_loss=found)
        stop = world.any(bool(stopped))
        by_time = world.any(time.monotonic() - last_save >= args.save_seconds)
        if stop or by_time or step == last or (args.save_steps and step % args.save_steps == 0):
            save()
            last_save = time.monotonic()
        if stop:
            break
    if world.rank == 0:
        bar.close()
        log.close()
    if state["step"] == steps:
        weights, _ = get_state_dict(model, optimizer, options=WHOLE)
        if world.rank == 0:
            whole = PhdForCausalLM(PhdConfig(**plain.config.to_dict()))
            whole.load_state_dict(weights)
            save_hub(whole, tokenizer_text, args.out / "model", getattr(torch, args.dtype))
    world.close()
    return 128 + stopped[0] if stopped else 0


def main(argv=None):
    return train(arguments(argv))


if __name__ == "__main__":
    sys.exit(main())
