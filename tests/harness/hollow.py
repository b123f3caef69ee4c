"""Hollow stand-ins for what no test can download: model folders with a real config.json and the headers of real weights, and
corpora of billions of tokens. Note: the files have their full length and take no room on a disk, because nothing is written
into them.

The shapes are those of the config.json that each model's authors publish; what is left out is the default of transformers'
config class. PUBLISHED shows whether they are right: it was not computed from them.
"""

import json
import os
import struct
from pathlib import Path

import tokenizers
import torch
import transformers
from corpus import index_of

from ted_scale.commands.cutting.blocks import spread
from ted_scale.config.run import Run
from ted_scale.corpora.tokenizer import digest, load_tokenizer
from ted_scale.distill.pairs import CUT, cut_map
from ted_scale.models.inspection import empty_model, inspect, read_config
from ted_scale.models.model_folder import saved_tensors

DOCUMENTS, LENGTH = 512, 2**24  # of every corpus: 8.6e9 tokens
EXAMPLES, SHORT = 50_000, 25  # of one whose examples are packed: as a task has them

SMOLLM2 = {
    "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
    "rope_theta": 100_000, "tie_word_embeddings": True,
}  # fmt: skip
QWEN_1_5 = {"model_type": "qwen2", "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 1e6}
LLAMA_3 = {
    "model_type": "llama", "vocab_size": 128256, "num_attention_heads": 32, "num_key_value_heads": 8,
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500_000,
}  # fmt: skip
SCALED_ROPE = {
    "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192
}  # fmt: skip
QWEN_3 = {
    "model_type": "qwen3", "vocab_size": 151936, "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32768, "rope_theta": 1e6,
}  # fmt: skip
QWEN_3_MOE = {
    **QWEN_3, "model_type": "qwen3_moe", "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True,
}  # fmt: skip
DEMO = {  # SHAPE of tools/demo.py, and its tokenizer's vocabulary
    "model_type": "llama", "vocab_size": 4096, "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 6,
    "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 512, "tie_word_embeddings": True,
}  # fmt: skip

MODELS = {  # by the path in a run file
    "models/smollm2": SMOLLM2,
    "models/teacher_sst2": SMOLLM2,
    "openai-community/gpt2": {"model_type": "gpt2"},  # GPT2Config's defaults are this model
    "Qwen/Qwen1.5-14B": {
        **QWEN_1_5, "vocab_size": 152064, "hidden_size": 5120, "intermediate_size": 13696, "num_hidden_layers": 40,
        "num_attention_heads": 40, "num_key_value_heads": 40,
    },
    "Qwen/Qwen1.5-1.8B": {
        **QWEN_1_5, "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 24,
        "num_attention_heads": 16, "num_key_value_heads": 16,
    },
    "meta-llama/Llama-3.1-8B": {
        **LLAMA_3, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "rope_scaling": {**SCALED_ROPE, "factor": 8.0},
    },
    "meta-llama/Llama-3.1-70B": {
        **LLAMA_3, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
        "rope_scaling": {**SCALED_ROPE, "factor": 8.0},
    },
    "meta-llama/Llama-3.2-1B": {
        **LLAMA_3, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64,
        "tie_word_embeddings": True, "rope_scaling": {**SCALED_ROPE, "factor": 32.0},
    },
    "models/llama3_1_5b": {
        **LLAMA_3, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 16,
        "num_key_value_heads": 4, "head_dim": 128, "rope_scaling": {**SCALED_ROPE, "factor": 8.0},
    },
    "Qwen/Qwen3-8B-Base": {
        **QWEN_3, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
    },
    "Qwen/Qwen3-1.7B-Base": {
        **QWEN_3, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16,
        "tie_word_embeddings": True,
    },
    "Qwen/Qwen3-30B-A3B-Base": {
        **QWEN_3_MOE, "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_hidden_layers": 48,
        "num_attention_heads": 32, "num_key_value_heads": 4,
    },
    "runs/demo/untrained": DEMO,
    "runs/demo/teacher_hf": DEMO,
    "models/small_teacher": DEMO,
    "models/few_teacher": {**DEMO, "vocab_size": 2048, "hidden_size": 256, "intermediate_size": 688},
    "models/few_student_untrained": {
        **DEMO, "vocab_size": 2048, "num_hidden_layers": 4, "num_attention_heads": 3, "num_key_value_heads": 3,
    },
    "models/speedrun": {
        **SMOLLM2, "hidden_size": 480, "intermediate_size": 1056, "num_hidden_layers": 20, "num_attention_heads": 6,
        "num_key_value_heads": 2, "head_dim": 64,
    },
}  # fmt: skip

CUTS = {  # a student: its teacher, the key of its depth, and its blocks
    "models/smollm2_half": ("models/smollm2", "num_hidden_layers", 15),
    "models/smollm2_half_healed": ("models/smollm2", "num_hidden_layers", 15),
    "models/student_sst2": ("models/smollm2", "num_hidden_layers", 15),
    "models/smollm2_third": ("models/smollm2", "num_hidden_layers", 10),
    "models/gpt2_half": ("openai-community/gpt2", "n_layer", 6),
    "runs/demo/student_cut": ("runs/demo/teacher_hf", "num_hidden_layers", 3),
    "models/small_student": ("models/small_teacher", "num_hidden_layers", 3),
}

PUBLISHED = {  # parameters, as the hub counts them; a head that is tied to the embeddings once
    "openai-community/gpt2": 124_439_808,
    "models/smollm2": 134_515_008,
    "Qwen/Qwen1.5-14B": 14_167_290_880,
    "Qwen/Qwen1.5-1.8B": 1_836_828_672,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-70B": 70_553_706_496,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "Qwen/Qwen3-8B-Base": 8_190_735_360,
    "Qwen/Qwen3-1.7B-Base": 1_720_574_976,
    "Qwen/Qwen3-30B-A3B-Base": 30_532_122_624,  # its index: total_size 61,064,245,248 bytes of bf16
}


def make_inputs(root: Path, run: Run) -> None:
    """The models and corpora that a run file names, under `root`."""
    for path in [model.path for model in (run.teacher, run.student) if model]:
        make_hollow_model(root, path)
    for corpus in run.data.corpora:
        shape = (EXAMPLES, SHORT) if run.data.packing == "examples" else (DOCUMENTS, LENGTH)
        make_hollow_corpus(root / corpus.path / "hollow", root / run.student.path, *shape)


def make_hollow_model(root: Path, path: str) -> Path:
    folder = root / path
    if folder.exists():
        return folder
    teacher, depth, blocks = CUTS.get(path, (path, "", 0))
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(MODELS[teacher] | ({depth: blocks} if blocks else {})))
    write_hollow_tensors(folder / "model.safetensors")
    write_tokenizer(folder)
    if blocks:
        anatomy = inspect("teacher.path", str(make_hollow_model(root, teacher)))
        (folder / CUT).write_text(json.dumps(cut_map(anatomy, spread(blocks, anatomy.layers))))
    return folder


def write_hollow_tensors(path: Path) -> None:
    """A header for the weights in bf16 that config.json beside it describes, and a body without content. Experts are merged, as in
    transformers: one by one they would fill megabytes of header."""
    with torch.device("meta"):
        tensors = saved_tensors(empty_model(read_config("model", path.parent)))
    header, end = {}, 0
    for name, tensor in tensors.items():
        first, end = end, end + 2 * tensor.numel()
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [first, end]}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(path, 8 + len(text) + end)


def write_tokenizer(folder: Path) -> None:
    """The same for every model: only families whose tokenizers are equal are paired."""
    model = tokenizers.models.WordLevel({"a": 0, "<end>": 1}, unk_token="a")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(model), eos_token="<end>")
    fast.save_pretrained(folder)


def make_hollow_corpus(prefix: Path, student: Path, documents: int, length: int) -> None:
    """Documents of zeros, signed with the student's tokenizer."""
    signed = {"max_token_id": 0, "tokens": documents * length}
    signed["tokenizer_digest"] = digest(load_tokenizer(str(student)))
    if (card := prefix.with_suffix(".json")).exists() and card.read_text() == json.dumps(signed):
        return
    prefix.parent.mkdir(parents=True, exist_ok=True)
    prefix.with_suffix(".idx").write_bytes(index_of([length] * documents))
    prefix.with_suffix(".bin").touch()
    os.truncate(prefix.with_suffix(".bin"), 2 * documents * length)
    card.write_text(json.dumps(signed))
