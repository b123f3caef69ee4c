"""A model folder without weights: ted-scale new-model --family llama --tokenizer FOLDER --out OUT [--set K=V ...]

For `student.init = "random"` in a run file. config.json has the family's defaults and the --set values, with the tokenizer's
files, vocabulary and special ids. The model is built once without weights before OUT gets its name, so an impossible
config fails here and not on a cluster.
"""

import argparse
import difflib
import json
from pathlib import Path

import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as KNOWN

from ted_scale.base.counts import millions
from ted_scale.base.errors import UserError
from ted_scale.base.exits import run_main
from ted_scale.corpora.tokenizer import hugging_face, load_tokenizer
from ted_scale.models.inspection import inspect
from ted_scale.models.model_folder import TOKENIZER_FILES, copy_files, new_folder, write_json

OWNED = {"vocab_size": "--tokenizer and --pad-vocab-to", "model_type": "--family", "architectures": "--family"}
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")


def default_config(family: str):
    if family not in KNOWN:
        raise UserError(
            f"--family must be a causal LM of transformers {transformers.__version__}, but is "
            f"'{family}'{did_you_mean(family, KNOWN)}"
        )
    config = transformers.AutoConfig.for_model(family)
    if not hasattr(config, "num_hidden_layers"):  # its text model has a config of its own
        text = f"{family}_text"
        raise UserError(f"--family must be a text model, but is '{family}'{did_you_mean(text, KNOWN)}")
    return config


def did_you_mean(word: str, known) -> str:
    close = difflib.get_close_matches(word, sorted(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def parse_settings(default, pairs: list[str]) -> dict:
    """Parse `key=value` strings: the value is JSON or a bare word, the key one of the family's config."""
    known = {*default.to_dict(), *default.attribute_map} - {"transformers_version"}
    settings = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key:
            raise UserError(f"--set must look like key=value, but is '{pair}'")
        if key in OWNED:
            raise UserError(f"--set must leave {key} out, but has '{pair}'; {OWNED[key]} sets it")
        if key not in known:
            raise UserError(f"--set must name keys of {default.model_type}'s config, but has '{key}'"
                            f"{did_you_mean(key, known)}")  # fmt: skip
        settings[key] = parse_value(text)
    return settings


def parse_value(text: str):
    try:
        return json.loads(text)
    except ValueError:
        return {"True": True, "False": False, "None": None}.get(text, text)


def make_config(family: str, tokenizer: Path, multiple: int, pairs: list[str]):
    """The family's config for this tokenizer, with the --set values."""
    settings = parse_settings(default_config(family), pairs)
    vocabulary = len(load_tokenizer(str(tokenizer)).pieces)
    ids = special_ids(tokenizer)
    padded = -(-vocabulary // multiple) * multiple
    try:
        return transformers.AutoConfig.for_model(family, **{**ids, **settings, "vocab_size": padded})
    except Exception as error:  # a family's own checks may raise anything
        reason = str(error).strip().splitlines()[-1].strip()
        raise UserError(f"--set must give values that a {family} config takes, but: {reason}") from None


def special_ids(tokenizer: Path) -> dict:
    loaded, _ = hugging_face(tokenizer, f"--tokenizer {tokenizer} must be a Hugging Face tokenizer")
    return {name: getattr(loaded, name) for name in SPECIAL}


def write_folder(folder: Path, config, tokenizer: Path) -> None:
    architecture = KNOWN[config.model_type]
    write_json(folder / "config.json", {**config.to_dict(), "architectures": [architecture]})
    ids = {name: getattr(config, name, None) for name in SPECIAL}
    transformers.GenerationConfig(**ids).save_pretrained(folder)
    copy_files(tokenizer, folder, TOKENIZER_FILES)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", required=True, help="transformers' name of the family: llama, qwen2, gpt2, ...")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of a Hugging Face tokenizer")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--pad-vocab-to", type=int, default=1, metavar="64", help="vocab_size becomes a multiple of it")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="of the config")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT")
    arguments = parser.parse_args(argv)
    if arguments.pad_vocab_to < 1:
        raise UserError(f"--pad-vocab-to must be at least 1, but is {arguments.pad_vocab_to}")
    if not arguments.tokenizer.is_dir():
        raise UserError(f"--tokenizer must be a folder with a Hugging Face tokenizer, but {arguments.tokenizer} is not")
    return arguments


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    config = make_config(arguments.family, arguments.tokenizer, arguments.pad_vocab_to, arguments.set)
    with new_folder(arguments.out, overwrite=arguments.overwrite, sources=[arguments.tokenizer]) as part:
        write_folder(part, config, arguments.tokenizer)
        model = inspect("the new model", str(part), needs_weights=False)
    size = f"{model.layers} blocks, width {model.width}, vocabulary {model.vocab_size:,}"
    print(f"{model.family}: {size}, {millions(model.parameters)} parameters -> {arguments.out}, without weights")
    print(f'in a run file:\n  [student]\n  path = {json.dumps(str(arguments.out))}\n  init = "random"')
    print(
        'a teacher of your own: train it with method = "ce" as launch/runs/demo_teacher.toml does, then ted-scale export'
    )


if __name__ == "__main__":
    run_main(main)
