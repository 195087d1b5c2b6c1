"""What of llama.cpp's server tests cannot run on SmolLM2, and what is adapted to it.

Everything here was found, and holds, with llama-server itself on SmolLM2-135M-Instruct Q4_1. Numbers are of its tokenizer:
the story model of the tests starts a text with a token of its own and spells words in pieces, SmolLM2 does neither.
"""

from dataclasses import dataclass, field

VISION = "needs a model that reads images"
ROUTER = "the router would have to download models"
SYSTEMONE = "needs a model of decisions"
RERANKER = "needs a model that ranks documents"
SLOW = "slow, and left out by default in llama.cpp, too; the fast variant runs"
INFILL = "SmolLM2 has no tokens for filling in"
NO_BOS = "SmolLM2's texts begin with no token of their own"
INTERNET = "needs the internet"
DOCKER = "needs docker or podman with an image from the internet"

# By file, by function or by case, in the order of llama.cpp's folder. What of the same files is not here runs, and passes on
# llama-server, most of it because it tests how something is refused.
CANNOT_RUN = {
    "test_basic.py::test_load_split_model": "needs a model in several files",
    "test_compat_anthropic.py::test_anthropic_vision_base64_with_multimodal_model": VISION,
    "test_embedding.py::test_embedding_mixed_input[-False]": NO_BOS,
    "test_infill.py": INFILL,
    "test_lora.py": "needs a LoRA adapter, and the model it is for",
    "test_proxy.py::test_mcp_proxy": INTERNET,
    "test_rerank.py::test_rerank": RERANKER,
    "test_rerank.py::test_rerank_tei_format": RERANKER,
    "test_rerank.py::test_rerank_usage": RERANKER,
    "test_router.py::test_router_api_key_required": ROUTER,
    "test_router.py::test_router_chat_completion_stream[ggml-org/tinygemma3-GGUF:Q8_0-True]": ROUTER,
    "test_router.py::test_router_dedup_cache_models": ROUTER,
    "test_router.py::test_router_download_model": ROUTER,
    "test_router.py::test_router_models_max_evicts_lru": ROUTER,
    "test_router.py::test_router_no_models_autoload": ROUTER,
    "test_router.py::test_router_queue_client_disconnect_keeps_model": ROUTER,
    "test_router.py::test_router_queue_coalesces_requests_for_same_model": ROUTER,
    "test_router.py::test_router_queue_does_not_evict_busy_model": ROUTER,
    "test_router.py::test_router_queue_is_fifo": ROUTER,
    "test_router.py::test_router_queue_two_waiters_share_one_eviction": ROUTER,
    "test_router.py::test_router_reload_models": ROUTER,
    "test_router.py::test_router_remote_preset": ROUTER,
    "test_router.py::test_router_unload_model": ROUTER,
    "test_security.py::test_local_media_file": VISION,
    "test_slot_save.py::test_slot_restore_media_file_without_mmproj": VISION,
    "test_slot_save.py::test_slot_save_restore_image_payload_larger_than_context": VISION,
    "test_slot_save.py::test_slot_save_restore_text_only_on_multimodal": VISION,
    "test_slot_save.py::test_slot_save_restore_with_image": VISION,
    "test_slot_save.py::test_slot_save_restore_with_image_across_restart": VISION,
    "test_slot_save.py::test_slot_save_restore_with_two_images": VISION,
    "test_stream.py": ROUTER,
    "test_systemone.py": SYSTEMONE,
    "test_tokenize.py::test_tokenize_with_bos": NO_BOS,
    "test_tool_call.py::test_completion_without_tool_call_slow": SLOW,
    "test_tools_builtin.py::test_tools_builtin_docker_runtime_cleans_up_spawned_container": DOCKER,
    "test_tools_builtin.py::test_tools_builtin_grep_search": "needs llama.cpp's whole source, as a git repository",
    "test_tools_builtin.py::test_tools_builtin_runtime_header[docker]": DOCKER,
    "test_tools_builtin.py::test_tools_builtin_runtime_header[podman]": DOCKER,
    "test_vision_api.py::test_models_supports_multimodal_capability": VISION,
    "test_vision_api.py::test_v1_models_supports_multimodal_capability": VISION,
    "test_vision_api.py::test_vision_chat_completion[Test test\\n-IMG_URL_1-True-(frog)+]": VISION,
    "test_vision_api.py::test_vision_chat_completion[What is this:\\n-IMG_BASE64_URI_0-True-(cat)+]": VISION,
    "test_vision_api.py::test_vision_chat_completion[What is this:\\n-IMG_URL_0-True-(cat)+]": VISION,
    "test_vision_api.py::test_vision_chat_completion[What is this:\\n-IMG_URL_1-True-(frog)+]": VISION,
    "test_vision_api.py::test_vision_chat_completion_token_count": VISION,
    "test_vision_api.py::test_vision_completion[What is this: <__media__>\\n-IMG_BASE64_0-True-(cat)+|(automobile)+]": VISION,
    "test_vision_api.py::test_vision_completion[What is this: <__media__>\\n-IMG_BASE64_1-True-(frog)+]": VISION,
    "test_vision_api.py::test_vision_embeddings[What is this: <__media__>\\n-IMG_BASE64_0-True]": VISION,
    "test_vision_api.py::test_vision_embeddings[What is this: <__media__>\\n-IMG_BASE64_1-True]": VISION,
    "test_vision_api.py::test_vision_embeddings_oai_content": VISION,
}

# The parameter of cases that name a model, all of them larger than the machines of a CI can run.
LARGE_MODEL_PARAMETER = "hf_repo"
LARGE_MODELS = {
    "test_compat_anthropic.py::test_anthropic_thinking_with_reasoning_model",
    "test_completion.py::test_completion_stream_with_openai_library_stops",
}


@dataclass(frozen=True)
class Adapted:
    """How a function, or one of its cases, differs from llama.cpp's."""

    any_text: bool = False  # any text is as good as the story model's words
    # The server gets --ignore-eos: the story model hardly ever ends a text, and so the tests expect as many tokens as they ask for.
    endless: bool = False
    model: bool = False  # a server without a model, a router, gets one: what is tested is the same
    jinja: bool = False  # the model's own template, which has a system prompt of its own, in any case
    params: dict = field(default_factory=dict)  # values of parameters
    source: dict = field(default_factory=dict)  # expressions in the body of the function


STORY = Adapted(any_text=True, endless=True)
CHAT = "test_chat_completion.py::test_chat_completion"


def chat(n_prompt: int) -> Adapted:
    return Adapted(any_text=True, endless=True, params={"n_prompt": n_prompt})


ADAPTED = {
    # The prompt's tokens: system and user message in ChatML, or the text that is no template.
    CHAT + "[None-Book-Hey-8-But she couldn't-69-8-length-False-None]": chat(16),
    CHAT + "[None-Book-Hey-8-But she couldn't-69-8-length-True-None]": chat(16),
    CHAT + '[None-Book-What is the best book-8-(Suddenly)+|\\\\{ " Sarax.-77-8-length-False-None]': chat(20),
    CHAT + '[None-Book-What is the best book-8-(Suddenly)+|\\\\{ " Sarax.-77-8-length-True-None]': chat(20),
    CHAT + '[None-Book-What is the best book-8-(Suddenly)+|\\\\{ " Sarax.-77-8-length-True-chatml]': chat(20),
    CHAT + "[None-Book-What is the best book-8-^ blue-23-8-length-True-This is not a chat template, it is]": chat(9),
    CHAT + "[None-Book-user_prompt8-8-Whillicter-79-8-length-False-None]": chat(21),
    CHAT + "[None-Book-user_prompt9-8-Whillicter-79-8-length-True-None]": chat(21),
    CHAT + "[codellama70b-You are a coding assistant.-Write the fibonacci function in c++.-128-(Aside|she|felter|alonger)+"
    "-104-128-length-False-None]": chat(29),
    CHAT + "[codellama70b-You are a coding assistant.-Write the fibonacci function in c++.-128-(Aside|she|felter|alonger)+"
    "-104-128-length-True-None]": chat(29),
    # The four prompts have 26 tokens; each shares as many with the one before it.
    "test_chat_completion.py::test_chat_completion_cached_tokens": Adapted(source={"77": "26", "76": "25", "51": "19", "47": "15"}),
    CHAT + "_stream[Book-What is the best book-8-(Suddenly)+-77-8-length]": chat(20),
    CHAT + "_stream[You are a coding assistant.-Write the fibonacci function in c++.-128-(Aside|she|felter|alonger)+-104-128-length]":
        chat(29),
    "test_chat_completion.py::test_chat_completion_with_openai_library": STORY,
    # No token at the beginning.
    "test_chat_completion.py::test_chat_template": Adapted(source={
        "'<s> <|start_header_id|>system<|end_header_id|>\\n\\nBook<|eot_id|><|start_header_id|>user<|end_header_id|>\\n\\n"
        "What is the best book<|eot_id|><|start_header_id|>assistant<|end_header_id|>\\n\\n'":
        "'<|start_header_id|>system<|end_header_id|>\\n\\nBook<|eot_id|><|start_header_id|>user<|end_header_id|>\\n\\n"
        "What is the best book<|eot_id|><|start_header_id|>assistant<|end_header_id|>\\n\\n'"}),
    # A grammar's text may be spelled in as many tokens as it has bytes.
    "test_chat_completion.py::test_completion_with_json_schema": Adapted(params={"n_predicted": 16}),
    # A prompt of 70 tokens in three batches.
    "test_chat_completion.py::test_return_progress[64-4-False]": Adapted(jinja=True, params={"n_batch": 25}),
    "test_compat_anthropic.py::test_anthropic_tool_result": Adapted(endless=True),
    "test_compat_anthropic.py::test_anthropic_tool_result_with_text": Adapted(endless=True),
    "test_compat_oai_responses.py::test_responses_stream_with_openai_library": STORY,
    "test_compat_oai_responses.py::test_responses_with_openai_library": STORY,
    "test_completion.py::test_completion[I believe the meaning of life is-8-(going|bed)+-18-8-False-False]": chat(7),
    "test_completion.py::test_completion[Write a joke about AI from a very long prompt which will not be truncated-64-"
    "(princesses|everyone|kids|Anna|forest)+-46-64-False-True]": chat(15),
    "test_completion.py::test_completion_stream[I believe the meaning of life is-8-(going|bed)+-18-8-False]": chat(7),
    "test_completion.py::test_completion_stream[Write a joke about AI from a very long prompt which will not be truncated-64-"
    "(princesses|everyone|kids|Anna|forest)+-46-64-False]": chat(15),
    "test_completion.py::test_completion_with_openai_library": STORY,
    "test_completion.py::test_completion_stream_with_openai_library": STORY,
    # Three tokens for each repetition of the prompt.
    "test_completion.py::test_completion_prompt_cache": Adapted(endless=True, source={"(40 + r) * 5 + 2": "(40 + r) * 3"}),
    "test_completion.py::test_completion_response_fields": Adapted(source={"'<s> '": "''"}),
    "test_completion.py::test_completion_unified": Adapted(endless=True),
    "test_completion.py::test_nocache_long_input_prompt": Adapted(source={"32": "64"}),  # still too long for the slot
    "test_completion.py::test_n_probs": Adapted(endless=True),
    "test_completion.py::test_n_probs_post_sampling": Adapted(endless=True),
    "test_completion.py::test_n_probs_post_backend_sampling": Adapted(endless=True),
    "test_completion.py::test_completion_parallel_slots": Adapted(endless=True),
    # The texts have 117 and 153 tokens instead of 226 and more than 256: twice as much of them. The prompt of 8 has 4.
    "test_ctx_shift.py::test_ctx_shift_enabled": Adapted(endless=True, source={"226": "234", "SHORT_TEXT": "SHORT_TEXT * 2"}),
    "test_ctx_shift.py::test_ctx_shift_disabled_short_prompt[64-64-False]": Adapted(endless=True),
    "test_ctx_shift.py::test_ctx_shift_disabled_short_prompt[-1-248-True]": Adapted(endless=True, params={"n_token_output": 252}),
    "test_ctx_shift.py::test_ctx_shift_disabled_long_prompt": Adapted(source={"LONG_TEXT": "LONG_TEXT * 2"}),
    "test_ctx_shift.py::test_ctx_shift_disabled_stream": Adapted(endless=True),
    "test_embedding.py::test_embedding_pooling_none": Adapted(source={"5": "3"}),  # no tokens around the text
    "test_embedding.py::test_embedding_usage_multiple": Adapted(source={"9": "7"}),
    "test_embedding.py::test_embedding_usage_single[I believe the meaning of life is-9]": Adapted(params={"n_tokens": 7}),
    "test_embedding.py::test_embedding_usage_single[This is a test-6]": Adapted(params={"n_tokens": 4}),
    "test_metrics.py::test_metrics_generation_rate_excludes_first_token": Adapted(endless=True),
    "test_security.py::test_cors_origins_localhost_reflects": Adapted(model=True),
    "test_security.py::test_cors_origins_localhost_rejects": Adapted(model=True),
    # 7 tokens of prompt, 64 generated ones of which the last is not evaluated; the prompts differ in their last two.
    "test_slot_save.py::test_slot_erase": Adapted(any_text=True, endless=True, source={"21": "7"}),
    "test_slot_save.py::test_slot_restore_legacy_token_list": Adapted(endless=True, source={"84": "70", "6": "2"}),
    "test_slot_save.py::test_slot_save_restore": Adapted(any_text=True, endless=True, source={"84": "70", "21": "7", "6": "2"}),
    "test_speculative.py::test_multi_requests_parallel": Adapted(any_text=True),
    "test_speculative.py::test_with_ctx_shift": Adapted(endless=True),
}


def cannot_run(case: str) -> str | None:
    """Why a case such as test_x.py::test_y[z] cannot run, or None."""
    for key in (case, case.split("[", 1)[0], case.split("::", 1)[0]):
        if key in CANNOT_RUN:
            return CANNOT_RUN[key]
    return None
