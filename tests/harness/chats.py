"""A small tokenizer with the special tokens of a chat, its templates, and seeded conversations."""

import json
import random

TURNS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>"
    "{% endgeneration %}{{ '\\n' }}{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
)
# As Qwen3's: what was thought before an earlier answer is left out.
FORGETS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content if loop.last else m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The system's turn is dropped.
DROPS = (
    "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = (
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat,",
    "42",
    "dogs",
    "past:",
    "h\u00e9",
    "\U0001f600",
    "so!",
    "\u6f22\u5b57",
    "(yes)",
    "\n",
)


def make_tokenizer(folder, template=TURNS):
    """A byte-level BPE whose offsets would be trimmed, as GPT-2's are."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([" ".join(WORDS) * 3, "user assistant system"], trainer)
    model = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=special[0], extra_special_tokens=special[1:], chat_template=template
    )
    model.save_pretrained(folder)
    return folder


def said(rng, most=12):
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, most))).strip() or "yes"


def conversation(rng):
    system = [{"role": "system", "content": said(rng)}] if rng.random() < 0.3 else []
    turns = [{"role": role, "content": said(rng)} for _ in range(rng.randint(1, 3)) for role in ("user", "assistant")]
    return system + turns


def conversations(number, seed=0):
    rng = random.Random(seed)
    return [{"messages": conversation(rng)} for _ in range(number)]


def pairs(number, seed=0):
    rng = random.Random(seed)
    return [{"prompt": said(rng) + rng.choice((" ", ":", "\n")), "completion": said(rng)} for _ in range(number)]


def write_records(path, records):
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path
