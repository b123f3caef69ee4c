"""Tiny random models of every family under test, a tiny corpus, and run files over them."""

import subprocess
import sys
from pathlib import Path

import forked
import torch
import transformers
from launching import free_port
from places import ROOT

from ted_scale.config.run import Run

PRETRAIN = ROOT / "launch" / "pretrain.py"

VOCABULARY = 128
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
GQA = {"intermediate_size": 64, "num_key_value_heads": 2, "max_position_embeddings": 128}

FAMILIES = {
    "gpt2": (transformers.GPT2Config, {"n_positions": 128}),
    "llama": (transformers.LlamaConfig, GQA),
    "qwen2": (transformers.Qwen2Config, {**GQA, "tie_word_embeddings": True}),
    "qwen3": (transformers.Qwen3Config, {**GQA, "head_dim": 8}),
    "mistral": (transformers.MistralConfig, {**GQA, "sliding_window": 8}),
    "gemma2": (transformers.Gemma2Config, {**GQA, "head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8}),
    "opt": (transformers.OPTConfig, {"ffn_dim": 64, "word_embed_proj_dim": 16, "max_position_embeddings": 128}),
    "gpt_neox": (transformers.GPTNeoXConfig, {"intermediate_size": 64, "max_position_embeddings": 128}),
    "phi": (transformers.PhiConfig, {"intermediate_size": 64, "max_position_embeddings": 128}),
}

# Families with something of their own about who sees whom, beside those that all tests run.
MORE = {
    "gemma3": (transformers.Gemma3TextConfig, {**GQA, "head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8,
               "layer_types": ["sliding_attention", "full_attention"] * 2}),
    "cohere2": (transformers.Cohere2Config, {**GQA, "sliding_window": 8}),
    "olmo3": (transformers.Olmo3Config, {**GQA, "sliding_window": 8}),
    "smollm3": (transformers.SmolLM3Config, {**GQA, "no_rope_layer_interval": 2}),
}  # fmt: skip

# Families that can be teachers alone: mixtures of experts, and recurrences, alone and beside attention.
MOE = {**GQA, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
MLA = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
DEEPSEEK = {**MOE, **MLA, "n_routed_experts": 8, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1}
EXPERTS = {
    "mixtral": (transformers.MixtralConfig, {**GQA, "num_local_experts": 4}),
    "qwen3_moe": (transformers.Qwen3MoeConfig, {**MOE, "num_experts": 5, "head_dim": 8}),
    "olmoe": (transformers.OlmoeConfig, {**GQA, "num_experts_per_tok": 2, "num_experts": 4}),
    "gpt_oss": (transformers.GptOssConfig, {**GQA, "num_experts_per_tok": 2, "num_local_experts": 4, "head_dim": 8,
                "sliding_window": 8}),
    "deepseek_v2": (transformers.DeepseekV2Config, {**DEEPSEEK, "topk_method": "group_limited_greedy"}),
    "deepseek_v3": (transformers.DeepseekV3Config, DEEPSEEK),
}  # fmt: skip
RECURRENT = {
    "mamba2": (transformers.Mamba2Config, {"num_heads": 8, "head_dim": 8, "state_size": 16, "n_groups": 2, "chunk_size": 8}),
    "falcon_h1": (transformers.FalconH1Config, {**GQA, "head_dim": 8, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8,
                  "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_chunk_size": 8, "lm_head_multiplier": 0.5}),
    "qwen3_next": (transformers.Qwen3NextConfig, {**MOE, "num_experts": 4, "shared_expert_intermediate_size": 16, "head_dim": 8,
                   "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
                   "linear_value_head_dim": 8}),
}  # fmt: skip
TEACHERS = EXPERTS | RECURRENT


def make_model(folder: Path, family: str, *, seed: int = 0, dtype=torch.float32, max_shard_size="5GB", **sizes) -> Path:
    """Save a random model whose logits differ clearly between tokens; `sizes` are config keys of any family."""
    config_class, settings = (FAMILIES | MORE | TEACHERS)[family]
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
    torch.manual_seed(seed)
    config = config_class(**{**SIZES, **settings, **tokens, "initializer_range": 0.2, **sizes})
    config.dtype = dtype
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    transformers.logging.set_verbosity(level)
    return folder


def make_corpus(prefix: Path, *, documents: int = 200, vocabulary: int = VOCABULARY, seed: int = 0) -> Path:
    """A .bin/.idx pair of random documents of 20 to 200 tokens."""
    import numpy
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix.parent.mkdir(parents=True, exist_ok=True)
    rng = numpy.random.default_rng(seed)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=numpy.uint16)
    for _ in range(documents):
        document = torch.from_numpy(rng.integers(1, vocabulary, size=rng.integers(20, 200)).astype(numpy.uint16))
        builder.add_document(document, [len(document)])
    builder.finalize(f"{prefix}.idx")
    return prefix


def run_values(root: Path, **sections) -> dict:
    """Values of a small fp32 TED run over `root`'s teacher, student and corpus; a dict given by name is merged in."""
    values = {
        "name": "tiny",
        "method": "ted",
        "runs": str(root / "runs"),
        "ds_config": str(Path(__file__).with_name("zero3_all_sharded.json")),
        "log_every": 1,
        "student": {"path": str(root / "student")},
        "teacher": {"path": str(root / "teacher"), "placement": "sharded"},
        "data": {"seq_len": 32, "corpora": [{"path": str(root / "corpus"), "validation": 0.1}]},
        "filters": {"steps": 4, "width": "full", "start": "random", "sample_tokens": 1.0},
        "train": {"steps": 6, "tokens_per_step": 256, "micro_batch": 1, "lr": 1e-3, "precision": "fp32"},
        "validation": {"tokens": 256},
        "checkpoint": {"every": 100},
    }
    for name, value in sections.items():
        values[name] = {**values.get(name, {}), **value} if isinstance(value, dict) else value
    return values


def make_run(root: Path, **sections) -> Run:
    return Run.model_validate(run_values(root, **sections))


def write_run(path: Path, run: Run) -> Path:
    from ted_scale.config.run_file import to_toml

    path.write_text(to_toml(run), encoding="utf-8")
    return path


def pretrain_command(*arguments, ranks: int = 0) -> list[str]:
    """`launch/pretrain.py` as a user starts it: by the launcher on `ranks` CPU ranks, or alone (0)."""
    deepspeed = str(Path(sys.executable).with_name("deepspeed"))
    launcher = [deepspeed, "--num_gpus", str(ranks), "--master_port", free_port()] if ranks else [sys.executable]
    return [*launcher, str(PRETRAIN), *map(str, arguments)]


def pretrain(*arguments, ranks: int = 0, timeout: float = 180, env=None, cwd=None) -> subprocess.CompletedProcess:
    """To its end. Alone it starts with the large packages imported (forked.py)."""
    if ranks == 0:
        return forked.run([PRETRAIN, *arguments], timeout=timeout, env=env, cwd=cwd)
    command = pretrain_command(*arguments, ranks=ranks)
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=env, cwd=cwd, check=False)
