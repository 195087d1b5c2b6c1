"""PHD-Transformer, PHD-SWA, PHD-CSWA and Sequential Hidden Decoding for transformers.

Each token is read K times; copy 0 is the original, copies 1..K-1 are hidden. Rows are regrouped as [all
originals][all hidden]: originals attend causally among themselves, hidden rows to the originals and to a short band
of hidden rows, so attention costs K times the vanilla transformer's and not K * K times. The cache keeps originals,
and of hidden keys no more than the band.

The file is copied into exported folders (`trust_remote_code`), so it imports nothing but torch, transformers and its
neighbour.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_phd import PhdConfig

# Hidden rows that attend in one call. Larger blocks compute more masked scores, smaller ones copy more keys.
BLOCK_ROWS = 256


class Rules:
    """Who sees whom: h(i, s) = i*(K-1) + s-1 numbers the hidden rows; a hidden row's index is its number."""

    def __init__(self, copies, window, chunk):
        self.copies, self.window, self.chunk = copies, window, chunk
        hidden = max(copies - 1, 1)
        self.reach = -(-window // hidden)  # positions that a window can look back
        self._plans = {}

    def first_visible(self, position):
        """The earliest position with hidden keys that hidden rows at `position` may see; later ones never look further back."""
        first = max(position - self.reach, 0)
        return max(first, position // self.chunk * self.chunk) if self.chunk else first

    def hidden_mask(self, positions, copies, key_positions, key_copies):
        """[queries, keys]: whether hidden queries see hidden keys."""
        qi, qs, ki, ks = positions[:, None], copies[:, None], key_positions[None, :], key_copies[None, :]
        seen = (ki == qi) & (ks <= qs)
        if self.window:
            distance = (qi - ki) * (self.copies - 1) + qs - ks
            local = (ki < qi) & (distance <= self.window)
            if self.chunk:
                local &= (ki // self.chunk) == (qi // self.chunk)
            seen |= local
        return seen

    def plan(self, past, n, copies, device, dtype):
        """Blocks of the hidden queries at positions past..past+n-1: (start, end, first hidden position, additive mask)."""
        key = (past, n, tuple(copies), device, dtype)
        if key in self._plans:
            return self._plans[key]
        hidden = torch.arange(1, self.copies, device=device)
        queries = torch.as_tensor(copies, device=device)
        blocks = []
        size = max(BLOCK_ROWS // len(hidden), 1)
        for a in range(0, n, size):
            b = min(a + size, n)
            first = self.first_visible(past + a)
            q_pos = torch.arange(past + a, past + b, device=device).repeat_interleave(len(copies))
            q_copy = queries.repeat(b - a)
            k_pos = torch.arange(first, past + b, device=device).repeat_interleave(len(hidden))
            k_copy = hidden.repeat(past + b - first)
            originals = torch.arange(past + b, device=device)[None, :] <= q_pos[:, None]
            seen = torch.cat([originals, self.hidden_mask(q_pos, q_copy, k_pos, k_copy)], 1)
            mask = torch.zeros(seen.shape, device=device, dtype=dtype).masked_fill_(~seen, -math.inf)
            blocks.append((a, b, first, mask))
        if past == 0:  # training comes back to the same shape, generation never does
            self._plans = {**self._plans, key: blocks} if len(self._plans) < 8 else {key: blocks}
        return blocks

    def mask_mod(self, n, query_rows, device):
        """FlexAttention's view of the same rules over the rows [n originals][n*(K-1) hidden]; query_rows are row numbers."""
        hidden = max(self.copies - 1, 1)
        rows = torch.arange(n * self.copies, device=device)
        position = torch.where(rows < n, rows, (rows - n) // hidden)
        copy = torch.where(rows < n, 0, 1 + (rows - n) % hidden)

        def seen(_batch, _head, q, k):
            row = query_rows[q]
            qi, qs, ki, ks = position[row], copy[row], position[k], copy[k]
            own = (ki == qi) & (ks <= qs)
            originals = (ks == 0) & (ki < qi)
            distance = (qi - ki) * hidden + qs - ks
            local = (qs >= 1) & (ks >= 1) & (ki < qi) & (distance <= self.window)
            if self.chunk:
                local = local & (ki // self.chunk == qi // self.chunk)
            return own | originals | local

        return seen


class PhdCache(DynamicCache):
    """Keys and values of the originals; of hidden rows only those that a later row can still see."""

    def __init__(self, config):
        super().__init__()
        self.rows_per_position = config.copies if config.sequential else 1
        self.rules = Rules(config.copies, 0 if config.sequential else config.window, config.chunk)
        self.hidden = {}  # layer: (keys, values, position of the first)

    def get_seq_length(self, layer_idx=0):
        return super().get_seq_length(layer_idx) // self.rows_per_position

    def update_hidden(self, layer, k, v, past):
        """Appends hidden keys and values from position `past` on; returns all that are there and the first one's position."""
        if layer in self.hidden:
            old_k, old_v, first = self.hidden[layer]
            k, v = torch.cat([old_k, k], 2), torch.cat([old_v, v], 2)
        else:
            first = past
        per_position = self.rules.copies - 1
        end = first + k.shape[2] // per_position
        keep = max(self.rules.first_visible(end), first)
        cut = (keep - first) * per_position
        self.hidden[layer] = (k[:, :, cut:], v[:, :, cut:], keep)
        return k, v, first

    def _select(self, choose):
        self.hidden = {layer: (choose(k), choose(v), first) for layer, (k, v, first) in self.hidden.items()}

    def reorder_cache(self, beam_idx):
        super().reorder_cache(beam_idx)
        self._select(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats):
        super().batch_repeat_interleave(repeats)
        self._select(lambda t: t.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices):
        super().batch_select_indices(indices)
        self._select(lambda t: t[indices, ...])

    def crop(self, *args, **kwargs):
        raise NotImplementedError("a shortened text needs hidden rows computed anew: start from an empty cache")

    def reset(self):
        super().reset()
        self.hidden = {}


class PhdRMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


class PhdRotaryEmbedding(nn.Module):
    """cos and sin of positions; the halves of a head rotate together."""

    def __init__(self, config):
        super().__init__()
        self.rope, self.head_dim = config.rope_parameters, config.head_dim

    def frequencies(self):  # not a buffer: loading a checkpoint leaves non-persistent buffers without values
        rope = self.rope
        inv = rope["rope_theta"] ** (-torch.arange(0, self.head_dim, 2, dtype=torch.float64) / self.head_dim)
        if rope["rope_type"] == "linear":
            inv = inv / rope["factor"]
        elif rope["rope_type"] == "llama3":
            low, high = rope["low_freq_factor"], rope["high_freq_factor"]
            waves = rope["original_max_position_embeddings"] * inv / (2 * math.pi)
            smooth = ((waves - low) / (high - low)).clamp(0, 1)
            inv = inv / rope["factor"] * (1 - smooth) + inv * smooth
        return inv

    def forward(self, positions):
        angles = positions.double()[:, None] * self.frequencies().to(positions.device)
        return angles.cos().float(), angles.sin().float()


def rotate(x, cos, sin):
    """x [batch, heads, rows, head_dim]; cos and sin [rows, head_dim / 2]."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class PhdAttention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.config, self.layer = config, layer
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        q_size, kv_size = self.heads * self.head_dim, self.kv_heads * self.head_dim
        bias = config.attention_bias
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=bias)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=bias and config.family != "qwen2")
        family = config.family
        if family == "olmo2":  # over the whole projection
            self.q_norm, self.k_norm = PhdRMSNorm(q_size, config.rms_norm_eps), PhdRMSNorm(kv_size, config.rms_norm_eps)
        elif family in ("qwen3", "qwen3_scale_seq"):  # over each head
            self.q_norm = PhdRMSNorm(self.head_dim, config.rms_norm_eps)
            self.k_norm = PhdRMSNorm(self.head_dim, config.rms_norm_eps)

    def _heads(self, x, heads, norm):
        if norm is not None and self.config.family == "olmo2":
            x = norm(x)
        x = x.unflatten(-1, (heads, self.head_dim))
        if norm is not None and self.config.family != "olmo2":
            x = norm(x)
        return x.transpose(1, 2)

    def forward(self, x, queries, batch, cache):
        """x [batch, rows, hidden]; `queries` chooses the rows that are wanted, all if None."""
        xq = x if queries is None else x[:, queries]
        cos, sin = (
            t.to(torch.get_autocast_dtype(x.device.type)) if torch.is_autocast_enabled(x.device.type) else t.to(x.dtype)
            for t in batch.rope
        )
        q_rope = (cos, sin) if queries is None else (cos[queries], sin[queries])
        q = rotate(self._heads(self.q_proj(xq), self.heads, getattr(self, "q_norm", None)), *q_rope)
        k = rotate(self._heads(self.k_proj(x), self.kv_heads, getattr(self, "k_norm", None)), cos, sin)
        v = self._heads(self.v_proj(x), self.kv_heads, None)
        q, k = q.to(v.dtype), k.to(v.dtype)
        out = (self._sequential if self.config.sequential else self._flex if batch.block_mask else self._grouped)(
            q, k, v, queries is not None, batch, cache
        )
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def _wide(self, x):
        """Keys or values repeated for each query head of a group."""
        return x if self.heads == self.kv_heads else x.repeat_interleave(self.heads // self.kv_heads, 1)

    def _grouped(self, q, k, v, last, batch, cache):
        n, past, rules = batch.n, batch.past, batch.rules
        hidden = rules.copies - 1
        parts_of = [n, n * hidden]  # one split: the gradient of a slice is a full-size tensor of its own
        (k_o, k_h), (v_o, v_h) = k.split(parts_of, 2), v.split(parts_of, 2)
        first = past
        if cache is not None:
            k_o, v_o = cache.update(k_o, v_o, self.layer)
            if hidden:
                k_h, v_h, first = cache.update_hidden(self.layer, k_h, v_h, past)
        k_o, v_o = self._wide(k_o), self._wide(v_o)
        parts = []
        q_h = q
        if not (last and hidden):
            q_o, q_h = q.split(parts_of, 2)
            if past == 0 or n == 1:
                parts.append(F.scaled_dot_product_attention(q_o, k_o, v_o, is_causal=past == 0 and n > 1))
            else:
                seen = torch.ones(n, past + n, dtype=torch.bool, device=q.device).tril(past)
                parts.append(F.scaled_dot_product_attention(q_o, k_o, v_o, attn_mask=seen))
        if hidden:
            k_h, v_h = self._wide(k_h), self._wide(v_h)
            copies = [hidden] if last else range(1, rules.copies)
            rows = len(copies)
            for a, b, start, mask in rules.plan(past, n, copies, q.device, q.dtype):
                band = slice((start - first) * hidden, (past + b - first) * hidden)
                keys = torch.cat([k_o[:, :, : past + b], k_h[:, :, band]], 2)
                values = torch.cat([v_o[:, :, : past + b], v_h[:, :, band]], 2)
                parts.append(
                    F.scaled_dot_product_attention(q_h[:, :, a * rows : b * rows], keys, values, attn_mask=mask)
                )
        return torch.cat(parts, 2)

    def _flex(self, q, k, v, last, batch, cache):
        mask = batch.block_mask[1 if last and batch.rules.copies > 1 else 0]
        if cache is not None:
            n, past = batch.n, batch.past
            cache.update(k[:, :, :n], v[:, :, :n], self.layer)
            if batch.rules.copies > 1:
                cache.update_hidden(self.layer, k[:, :, n:], v[:, :, n:], past)
        return flex(q, k, v, mask, self.heads != self.kv_heads)

    def _sequential(self, q, k, v, last, batch, cache):
        """Rows position-major, every row sees every earlier one; all stay in the cache."""
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        k, v = self._wide(k), self._wide(v)
        rows, past = batch.n * self.config.copies, batch.past * self.config.copies
        if past == 0 and not last:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        seen = torch.ones(rows, past + rows, dtype=torch.bool, device=q.device).tril(past)
        if last:
            seen = seen[self.config.copies - 1 :: self.config.copies]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)


_compiled_flex = None


def flex(q, k, v, block_mask, grouped):
    from torch.nn.attention.flex_attention import flex_attention

    global _compiled_flex
    if q.device.type != "cuda":
        return flex_attention(q, k, v, block_mask=block_mask, enable_gqa=grouped)
    if _compiled_flex is None:
        _compiled_flex = torch.compile(flex_attention, dynamic=False)
    return _compiled_flex(q, k, v, block_mask=block_mask, enable_gqa=grouped)


class PhdMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class PhdDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config, layer):
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.after = config.family == "olmo2"  # norms after the blocks instead of before
        self.self_attn = PhdAttention(config, layer)
        self.mlp = PhdMLP(config)
        self.post_attention_layernorm = PhdRMSNorm(size, eps)
        if self.after:
            self.post_feedforward_layernorm = PhdRMSNorm(size, eps)
        else:
            self.input_layernorm = PhdRMSNorm(size, eps)

    def forward(self, x, queries, batch, cache):
        residual = x if queries is None else x[:, queries]
        if self.after:
            x = residual + self.post_attention_layernorm(self.self_attn(x, queries, batch, cache))
            return x + self.post_feedforward_layernorm(self.mlp(x))
        x = residual + self.self_attn(self.input_layernorm(x), queries, batch, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class PhdPreTrainedModel(PreTrainedModel):
    config_class = PhdConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["PhdDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flex_attn = True

    @torch.no_grad()
    def _init_weights(self, module):
        std = self.config.initializer_range
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, 0.0, std)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, PhdRMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, PhdDecoderLayer):  # after its parts: what adds to the residual stream starts smaller
            for projection in (module.self_attn.o_proj, module.mlp.down_proj):
                nn.init.normal_(projection.weight, 0.0, std / math.sqrt(2 * self.config.num_hidden_layers))


class Batch:
    """What the layers of one forward pass share."""

    def __init__(self, n, past, rules, rope, block_mask):
        self.n, self.past, self.rules, self.rope, self.block_mask = n, past, rules, rope, block_mask


class PhdModel(PhdPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.sequential:
            self.scale_seq_embed_tokens_list = nn.ModuleList(
                nn.Embedding(config.vocab_size, config.hidden_size) for _ in range(config.copies - 1)
            )
        self.layers = nn.ModuleList(PhdDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = PhdRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = PhdRotaryEmbedding(config)
        self.rules = Rules(config.copies, config.window, config.chunk)
        self.gradient_checkpointing = False
        self.post_init()

    def _flex_masks(self, n, device):
        """Block masks of all rows and of the last copies' rows, kept for the last length."""
        key = (n, device)
        if getattr(self, "_flex_key", None) != key:
            from torch.nn.attention.flex_attention import create_block_mask

            copies = self.config.copies
            everything = torch.arange(n * copies, device=device)
            self._flex_key, self._flex_value = (
                key,
                tuple(
                    create_block_mask(
                        self.rules.mask_mod(n, rows, device), None, None, len(rows), n * copies, device=device
                    )
                    for rows in (everything, everything[self._last_rows(n)])
                ),
            )
        return self._flex_value

    def _last_rows(self, n):
        copies = self.config.copies
        return (
            slice(copies - 1, None, copies)
            if self.config.sequential or copies == 1
            else slice(n + copies - 2, None, copies - 1)
        )

    def forward(self, input_ids, past_key_values=None):
        """The last copies' rows, normed: [batch, n, hidden]."""
        config, n, device = self.config, input_ids.shape[1], input_ids.device
        copies = config.copies
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        x = self.embed_tokens(input_ids)
        if config.sequential:
            tables = [self.embed_tokens, *self.scale_seq_embed_tokens_list]
            x = torch.stack([table(input_ids) for table in tables], 2).flatten(1, 2)
            positions = torch.arange(past * copies, (past + n) * copies, device=device)
        else:
            positions = torch.arange(past, past + n, device=device)
            if copies > 1:
                x = torch.cat([x, x.repeat_interleave(copies - 1, 1)], 1)
                positions = torch.cat([positions, positions.repeat_interleave(copies - 1)])
        use_flex = config._attn_implementation == "flex_attention" and past == 0 and not config.sequential
        batch = Batch(n, past, self.rules, self.rotary(positions), self._flex_masks(n, device) if use_flex else None)
        for i, layer in enumerate(self.layers):
            # Nothing reads the other rows of the last layer but their keys and values.
            queries = self._last_rows(n) if copies > 1 and i == len(self.layers) - 1 else None
            x = layer(x, queries, batch, past_key_values)
        return self.norm(x)


class PhdForCausalLM(PhdPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config):
        super().__init__(config)
        self.model = PhdModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def get_output_embeddings(self):
        return self.lm_head

    def forward(
        self,
        input_ids,
        attention_mask=None,
        past_key_values=None,
        labels=None,
        shift_labels=None,
        use_cache=None,
        logits_to_keep=0,
        return_dict=None,
        **kwargs,
    ):
        """`labels` as in transformers: the token at i is predicted from those before; `shift_labels`: already moved by one.
        Texts of a batch are padded on the right, if at all."""
        if attention_mask is not None and not bool(attention_mask[:, 0].all()):
            raise ValueError(
                "attention_mask: texts padded on the left are not supported; pad on the right, or one text at a time"
            )
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and not isinstance(past_key_values, PhdCache):
            if past_key_values is not None and past_key_values.get_seq_length():
                raise ValueError(f"past_key_values is a filled {type(past_key_values).__name__}, expected a PhdCache")
            past_key_values = PhdCache(self.config)
        x = self.model(input_ids, past_key_values if use_cache else None)
        logits = self.lm_head(x[:, -logits_to_keep:] if logits_to_keep else x)
        loss = None
        if labels is not None:
            shift_labels = F.pad(labels[:, 1:], (0, 1), value=-100)
        if shift_labels is not None:
            loss = F.cross_entropy(logits.float().flatten(0, 1), shift_labels.flatten(), ignore_index=-100)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values if use_cache else None)


PhdConfig.register_for_auto_class()
PhdForCausalLM.register_for_auto_class("AutoModelForCausalLM")
