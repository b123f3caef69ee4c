"""Files that somebody else may have written: programs where data should be, and ways to damage what is sound."""

import copy
import json
import pickle
import struct
from pathlib import Path

from hypothesis import strategies as st


class Bomb:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.write_text, (self.mark, "unpickled")


def program(mark: Path) -> str:
    """Python that leaves a mark when it is imported, with every class that could be asked for."""
    names = ("Configuration", "Model", "ModelForCausalLM", "Tokenizer")
    classes = "".join(f"class Foreign{name}:\n    pass\n" for name in names)
    return f"import pathlib\npathlib.Path({str(mark)!r}).write_text('imported')\n{classes}"


def plant(folder: Path, mark: Path) -> None:
    """Everything that would be run by somebody who runs what comes with a model."""
    for name in ("configuration_foreign.py", "modeling_foreign.py", "tokenization_foreign.py", "config.py", "setup.py"):
        (folder / name).write_text(program(mark))
    for name in ("pytorch_model.bin", "model.pt", "training_args.bin", "vocab.pkl", "vocab.bin"):
        (folder / name).write_bytes(pickle.dumps(Bomb(mark)))
    (folder / "chat_template.jinja").write_text(template(mark))


def template(mark: Path) -> str:
    return "{{ cycler.__init__.__globals__.os.system('touch " + str(mark) + "') }}"


AUTO_MAP = {
    "AutoConfig": "configuration_foreign.ForeignConfiguration",
    "AutoModelForCausalLM": "modeling_foreign.ForeignModelForCausalLM",
    "AutoTokenizer": ["tokenization_foreign.ForeignTokenizer", "tokenization_foreign.ForeignTokenizer"],
}
DEEP = json.loads("[" * 200 + "]" * 200)
JUNK = (
    None, True, False, 0, -1, 1, 2**31, 2**60, 2**63, 2**70, -(2**63), 0.5, -0.0, 1e308, 1e-320, float("nan"), float("inf"),
    "", " ", "x", "\0", "a\nb", "\x1b[2J", "é😀", "\ud800", "../../etc/passwd", "/etc/passwd", "..\\x", "x" * 5000, "[" * 5000,
    "x" * 200_000, "a://b:" * 20_000, "-eyJabcdefgh" * 10_000,
    "__import__('os').system('true')", "s3://key:secret@bucket/x", "None", [], {}, [[]], [None], {"": None}, DEEP,
    [1] * 1000, {"path": "/"}, AUTO_MAP,
)  # fmt: skip
KEYS = (
    "", "a", "auto_map", "tokenizer_class", "model_type", "tokenizer_file", "vocab_file", "trust_remote_code", "path", "name",
    "init_inputs", "fast_tokenizer_files", "configuration_files", "__class__", "é", "a.b", "a\nb", "\ud800", "step",
)  # fmt: skip
NUMBERS = (0, 1, 255, 2**15, 2**31 - 1, 2**31, 2**32, 2**40, 2**60, 2**63 - 1, 2**63, 2**64 - 1)


def junk():
    return st.sampled_from(range(len(JUNK))).map(lambda i: copy.deepcopy(JUNK[i]))


@st.composite
def damaged_tree(draw, tree):
    """A tree of tables, lists and values with one to three of its places changed."""
    tree = json.loads(json.dumps(tree))
    for _ in range(draw(st.integers(1, 3))):
        parent, key = draw(st.sampled_from(places(tree)))
        how = draw(st.sampled_from(("replace", "replace", "remove", "add", "copy")))
        if how == "replace":
            parent[key] = draw(junk() | st.integers() | st.text(max_size=20))
        elif how == "remove":
            del parent[key]
        else:
            new = draw(junk()) if how == "add" else copy.deepcopy(parent[key])
            if isinstance(parent, dict):
                parent[draw(st.sampled_from(KEYS) | st.text(max_size=10))] = new
            else:
                parent.append(new)
    return tree


def places(tree, root=True) -> list:
    """(parent, key) of everything in a tree."""
    found = []
    rows = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in rows:
        found += [(tree, key), *places(value, root=False)]
    return found if found or not root else [({"x": tree}, "x")]


@st.composite
def damaged_bytes(draw, content: bytes, mark: Path):
    """Bytes flipped, overwritten by telling numbers, cut off, repeated, or others altogether."""
    how = draw(st.sampled_from(("flip", "flip", "number", "number", "cut", "repeat", "insert", "other")))
    place = draw(st.integers(0, min(len(content), 400)) | st.integers(0, len(content)))
    if how == "flip":
        changed = bytearray(content)
        for at in draw(
            st.lists(
                st.integers(0, len(content) - 1) | st.integers(0, min(len(content) - 1, 200)), min_size=1, max_size=8
            )
        ):
            changed[at] = draw(st.integers(0, 255))
        return bytes(changed)
    if how == "number":
        number = struct.pack("<Q", draw(st.sampled_from(NUMBERS)))[: draw(st.sampled_from((4, 8)))]
        return content[:place] + number + content[place + len(number) :]
    if how == "cut":
        return content[:place]
    if how == "repeat":
        return content[:place] + content[: draw(st.integers(0, len(content)))]
    if how == "insert":
        return content[:place] + draw(st.binary(max_size=20)) + content[place:]
    program = pickle.dumps(Bomb(mark))
    return draw(st.binary(max_size=200) | st.sampled_from((b"", b"\0" * 64, b"\xff" * 64, program)))


def json_text(tree) -> bytes:
    return json.dumps(tree).encode()
