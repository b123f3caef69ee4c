"""Scenarios of ranks.py: samples of text in training. The tokenizer has a word for each id, w0 to w127, but `end` for 2."""

import json
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
from scenarios import put_back, start
from tiny import VOCABULARY, make_model

from ted_scale.distill.teacher import Teacher
from ted_scale.metrics.rows import SAMPLES

TOKENS, END = 5, 2
SECTIONS = {
    "filters": {"steps": 1}, "train": {"steps": 4, "micro_batch": 2}, "checkpoint": {"every": 1, "keep": 9},
    "samples": {"every": 2, "prompts": ["w5 w6", "w9 w10 w11"], "from_validation": 1, "tokens": TOKENS},
}  # fmt: skip


def make_speaker(folder: Path) -> Path:
    """A model with a tokenizer that knows no word for what it does not know."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    make_model(folder, "llama", num_hidden_layers=2, seed=3)
    words = Tokenizer(
        models.WordLevel({f"w{k}": k for k in range(VOCABULARY) if k != END} | {"end": END}, unk_token="none")
    )
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="end").save_pretrained(folder)
    return folder


def samples_written(folder: Path, device):
    """Straight, and from the checkpoint of step 2, beside samples of later steps: how often the teacher wrote."""
    calls = []

    def logits(self, batch, at):
        calls.append(1)
        return Teacher_logits(self, batch, at)

    Teacher_logits, Teacher.logits = Teacher.logits, logits
    sections = {**SECTIONS, "student": {"path": str(folder / "speaker")}}
    try:
        start(folder, device, name="written", **sections)
        straight = len(calls)
        if dist.get_rank() == 0:
            shutil.copytree(folder / "runs" / "written", folder / "runs" / "written_from_2")
            put_back(folder / "runs" / "written_from_2", 2)
        dist.barrier()
        start(folder, device, name="written_from_2", **sections)
    finally:
        Teacher.logits = Teacher_logits
    return {"straight": straight, "resumed": len(calls) - straight}


def samples_of(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / "runs" / name / SAMPLES).read_text().splitlines()]


@torch.no_grad()
def greedy(model: Path, tokenizer: Path, prompt: str) -> str:
    """By transformers, a token after the other."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    network, words = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(tokenizer)
    ids = words(prompt, add_special_tokens=False).input_ids
    first = len(ids)
    for _ in range(TOKENS):
        ids.append(int(network(torch.tensor([ids])).logits[0, -1, :VOCABULARY].argmax()))
    new = ids[first:]
    return words.decode(new[: new.index(END)] if END in new else new, clean_up_tokenization_spaces=False)
