"""Configuration of hidden-decoding language models: a base family's config.json plus one object, `phd`.

The file is copied into exported folders (`trust_remote_code`), so it imports nothing but transformers.
"""

from transformers import PretrainedConfig

FAMILIES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "qwen3_scale_seq": "Qwen3ScaleSeqForCausalLM",
}


class PhdConfig(PretrainedConfig):
    """`model_type` stays the base family's: a program that knows nothing of `phd` reads the vanilla base.

    `phd` is `{"copies": K, "window": W, "chunk": C}`; absent means vanilla, W = 0 PHD, C = 0 PHD-SWA. The family
    `qwen3_scale_seq` (Sequential Hidden Decoding) has `scale_seq_times` + 1 copies instead.
    """

    model_type = "phd"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self,
        model_type="llama",
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=None,
        head_dim=None,
        hidden_act="silu",
        max_position_embeddings=2048,
        initializer_range=0.02,
        rms_norm_eps=1e-6,
        rope_theta=None,
        rope_scaling=None,
        rope_parameters=None,
        attention_bias=None,
        mlp_bias=False,
        tie_word_embeddings=False,
        use_cache=True,
        phd=None,
        scale_seq_times=None,
        **kwargs,
    ):
        family = kwargs.pop("family", None) or (model_type if model_type != "phd" else "llama")
        if family not in FAMILIES:
            raise ValueError(f"model_type is {family!r}, expected one of {', '.join(FAMILIES)}")
        if hidden_act != "silu":
            raise ValueError(f"hidden_act is {hidden_act!r}, expected 'silu'")
        if mlp_bias:
            raise ValueError("mlp_bias: feed-forward layers with biases are not supported")
        for key in ("sliding_window", "layer_types", "use_sliding_window"):
            value = kwargs.get(key)
            if key == "layer_types" and value is not None:
                value = any(kind != "full_attention" for kind in value)
            # Qwen2 states a window that `use_sliding_window` turns off.
            if key == "sliding_window" and "use_sliding_window" in kwargs:
                continue
            if value:
                raise ValueError(f"{key} is {kwargs[key]!r}: sliding-window attention of the base is not supported")
        self.family = family
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.hidden_act = hidden_act
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.rms_norm_eps = rms_norm_eps
        rope = dict(rope_parameters or rope_scaling or {})
        rope.setdefault("rope_type", rope.pop("type", "default"))
        rope.setdefault("rope_theta", rope_theta or 10000.0)
        if rope["rope_type"] not in ("default", "linear", "llama3"):
            raise ValueError(f"rope_type is {rope['rope_type']!r}, expected default, linear or llama3")
        self.rope_parameters = rope
        self.attention_bias = family == "qwen2" if attention_bias is None else bool(attention_bias)
        self.use_cache = use_cache
        self.phd = self._check_phd(phd)
        self.scale_seq_times = None
        if family == "qwen3_scale_seq":
            self.scale_seq_times = int(scale_seq_times or 0)
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)

    @staticmethod
    def _check_phd(phd):
        if not phd:
            return None
        unknown = set(phd) - {"copies", "window", "chunk"}
        if unknown:
            raise ValueError(f"phd has unknown keys {sorted(unknown)}, expected copies, window, chunk")
        copies, window, chunk = (
            int(phd.get(key) or default) for key, default in (("copies", 1), ("window", 0), ("chunk", 0))
        )
        if not 1 <= copies <= 256 or window < 0 or chunk < 0:
            raise ValueError(f"phd is {phd}, expected copies from 1 to 256, window and chunk not negative")
        return {"copies": copies, "window": window, "chunk": chunk}

    @property
    def sequential(self):
        """Whether all rows attend causally to all earlier rows (Sequential Hidden Decoding)."""
        return self.family == "qwen3_scale_seq"

    @property
    def copies(self):
        return self.scale_seq_times + 1 if self.sequential else (self.phd or {}).get("copies", 1)

    @property
    def window(self):
        return (self.phd or {}).get("window", 0)

    @property
    def chunk(self):
        return (self.phd or {}).get("chunk", 0)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        # The base class would warn that "llama" is not "phd", which is meant so.
        config_dict, kwargs = cls.get_config_dict(pretrained_model_name_or_path, **kwargs)
        return cls.from_dict(config_dict, **kwargs)

    def to_dict(self):
        output = super().to_dict()
        output["model_type"] = output.pop("family")
        for key in ("phd", "scale_seq_times"):
            if output.get(key) is None:
                output.pop(key, None)
        # Both spellings, so that transformers 4 and 5 and libphd read the same.
        rope = output.pop("rope_parameters")
        output["rope_theta"] = rope["rope_theta"]
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        output["rope_scaling"] = scaling if scaling["rope_type"] != "default" else None
        return output
