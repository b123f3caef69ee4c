"""Which tokens hold a character of an answer: by the bytes of tokens as by the tokenizer's own offsets."""

import json
import random

import chats
import pytest
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from transformers import AutoTokenizer

from ted_scale.corpora.examples import open_reader
from ted_scale.corpora.marks import by_sizes, encode_marked, sizes_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return chats.make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


KINDS = {
    "plain": None,
    "a normalizer": normalizers.NFC(),
    "another alphabet": pre_tokenizers.ByteLevel(add_prefix_space=True),
    "spaces left out": pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_counts_if_it_holds_a_character_of_a_span_wherever_that_begins_and_ends(folder, kind):
    """By the bytes of tokens where these say it, else by offsets."""
    rng, backend = random.Random(0), Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.post_processor, other = None, KINDS[kind]
    if other:
        setattr(backend, "normalizer" if isinstance(other, normalizers.Normalizer) else "pre_tokenizer", other)
    texts = [chats.said(rng) + rng.choice(("", "e\u0301", "<|im_end|>")) for _ in range(200)]
    spans = [[tuple(sorted(rng.sample(range(len(text) + 1), 2)))] for text in texts]
    sizes = sizes_of(backend)
    assert (sizes is None) == (kind == "another alphabet")
    if sizes:
        summed = [one is not None for one in by_sizes(backend, sizes, texts, spans)]
        assert any(summed) and all(summed) == (kind == "plain")
    for text, ((begin, end),), (ids, marks) in zip(
        texts, spans, encode_marked(backend, sizes, texts, spans), strict=True
    ):
        encoding = backend.encode(text, add_special_tokens=False)
        expected = [int(low < end and high > begin) for low, high in encoding.offsets]
        assert (ids.tolist(), marks.tolist()) == (encoding.ids, expected)


def without(folder, piece):
    """The tokenizer without the piece of a byte, as SmolLM2's has none for some: it leaves that byte out."""
    content = json.loads((folder / "tokenizer.json").read_text())
    del content["model"]["vocab"][piece]
    content["model"]["merges"] = [pair for pair in content["model"]["merges"] if piece not in "".join(pair)]
    return Tokenizer.from_str(json.dumps(content))


def test_a_vocabulary_without_some_bytes_is_summed_where_a_text_has_none_of_them(folder):
    backend, spans = without(folder, "~"), [[(2, 4)], [(2, 4)]]
    sizes = sizes_of(backend)
    plain, other = by_sizes(backend, sizes, ["a cat", "a~cat"], spans)
    assert other is None and plain[1].any()
    ids, marks = encode_marked(backend, sizes, ["a~cat"], [[(2, 4)]])[0]
    expected = [int(low < 4 and high > 2) for low, high in backend.encode("a~cat").offsets]
    assert marks.tolist() == expected and len(ids) == len(expected)


def test_a_template_is_rendered_as_transformers_renders_it(folder):
    """Messages of roles and contents take a shorter way than others."""
    model, reader = AutoTokenizer.from_pretrained(folder), open_reader(str(folder), "assistant", None, False)
    parts = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}, {"role": "assistant", "content": "yes"}]
    thought = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes", "reasoning": "so"}]
    text = "{{ messages }} {{ tools }} {{ eos_token }} {{ add_generation_prompt }} {{ documents is defined }}"
    for template in (chats.TURNS, text):
        for messages in (parts, thought, *(record["messages"] for record in chats.conversations(5))):
            for prompt in (False, True):
                options = {"chat_template": template, "tokenize": False, "add_generation_prompt": prompt}
                ours = reader.template._replace(text=template).render(messages, None, prompt=prompt)
                assert ours == model.apply_chat_template(messages, **options)
