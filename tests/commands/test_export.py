"""An export is the trained student to the last bit of its dtype, and nothing else; its memory is one shard's.

Run by the launcher, this file trains like launch/pretrain.py and also lets ZeRO-3 gather the weights it would train on
with, at every checkpoint: the reference that no checkpoint reader had a hand in.
"""

import json
import os
import runpy
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

# For the ranks, which run this file as a program.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "harness"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from launching import run_ranks
from places import ROOT
from tiny import make_corpus, make_model, make_run, write_run

from ted_scale.base.errors import UserError

TOKENS = torch.arange(3, 43).reshape(2, 20)
BIG = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 10, "num_key_value_heads": 4}


def train_and_gather() -> None:
    """launch/pretrain.py, with the network's gathered weights beside every checkpoint."""
    from deepspeed.utils import safe_get_full_fp32_param
    from safetensors.torch import save_file

    from ted_scale.checkpoints.saver import Saver
    from ted_scale.models.zero import gathered

    save = Saver.save

    def save_with_weights(self, engine, progress, **named):
        row, network = save(self, engine, progress, **named), engine.module.network
        masters = {f"fp32.{n}": safe_get_full_fp32_param(p) for n, p in network.named_parameters() if p.requires_grad}
        with gathered(network.parameters()):
            weights = {name: p.detach().clone() for name, p in network.named_parameters()}
        if os.environ["RANK"] == "0":
            given = {name: tensor.clone() for name, tensor in masters.items() if tensor is not None}
            save_file(weights | given, self.folder / f"step_{progress.step:08d}.safetensors")
        return row

    Saver.save = save_with_weights
    runpy.run_path(str(ROOT / "launch" / "pretrain.py"), run_name="__main__")


def launch(ranks: int, *arguments) -> None:
    run_ranks(ranks, __file__, *arguments)


def export(*arguments) -> subprocess.CompletedProcess:
    """The tool as a user starts it, from anywhere."""
    command = [sys.executable, str(ROOT / "tools" / "export_hf.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd="/", check=False)


def export_here(*arguments) -> None:
    """Without the seconds of a start."""
    from ted_scale.commands.export_hf import main

    main([str(a) for a in arguments])


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A bf16 TED run on two ranks with a tied student, and an fp32 ce run on one rank with a student of some size."""
    root = tmp_path_factory.mktemp("export")
    make_model(root / "teacher", "llama")
    make_model(root / "student", "gpt2", num_hidden_layers=2, seed=1, attn_pdrop=0.1, resid_pdrop=0.2)
    make_corpus(root / "corpus")
    sections = {"filters": {"steps": 2}, "checkpoint": {"every": 1, "keep": 9}}
    train = {"steps": 2, "precision": "bf16", "lr": 0.01}
    launch(2, "--config", write_run(root / "run.toml", make_run(root, train=train, **sections)))
    make_model(root / "big", "llama", seed=2, **BIG)
    train = {"steps": 1, "tokens_per_step": 32}
    run = make_run(root, name="big", method="ce", student={"path": str(root / "big")}, train=train)
    launch(1, "--config", write_run(root / "big.toml", run))
    (root / "teacher" / "tokenizer.json").write_text("the teacher's")  # after training, which would read it
    (root / "big" / "merges.txt").write_text("a b\n")
    (root / "student" / "cut.json").write_text("the student's map")
    return root


@pytest.fixture(scope="module")
def exported(world):
    done = export(world / "runs" / "tiny")
    assert done.returncode == 0, done.stderr
    return world / "runs" / "tiny" / "export", done.stdout


def loaded(folder, **settings):
    from transformers import AutoModelForCausalLM

    settings = {"dtype": "auto", **settings}
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **settings)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


def tensors_of(folder) -> dict:
    from safetensors.torch import load_file

    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def gathered_weights(run, step) -> dict:
    return {name: t for name, t in gathered_tensors(run, step).items() if not name.startswith("fp32.")}


def gathered_tensors(run, step) -> dict:
    from safetensors.torch import load_file

    return load_file(run / f"step_{step:08d}.safetensors")


@torch.no_grad()
def logits(model):
    return model(TOKENS, use_cache=False).logits


def test_an_export_has_the_logits_of_the_weights_that_zero3_gathers(world, exported):
    model, student = loaded(exported[0]), loaded(world / "student", dtype=torch.bfloat16)
    untrained = logits(student)
    student.load_state_dict(gathered_weights(world / "runs" / "tiny", 4), strict=False)
    assert model.dtype == torch.bfloat16
    assert not torch.allclose(logits(model), untrained)
    torch.testing.assert_close(logits(model), logits(student), rtol=0, atol=0)


def test_every_tensor_equals_the_gathered_one_and_is_saved_once(world, exported):
    ours, theirs = tensors_of(exported[0]), gathered_weights(world / "runs" / "tiny", 4)
    assert ours.keys() == tensors_of(world / "student").keys()  # as save_pretrained names them: no filters, no head
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def test_an_fp32_export_of_a_bf16_run_is_its_master_weights(world, tmp_path):
    run = world / "runs" / "tiny"
    export_here(run, tmp_path / "out", "--dtype", "fp32")
    masters = gathered_tensors(run, 4)
    for name, tensor in tensors_of(tmp_path / "out").items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, masters[f"fp32.{name}"]), name
        assert not torch.equal(tensor, tensor.bfloat16().float()), name
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"


def test_an_earlier_checkpoint_can_be_named(world, tmp_path):
    run = world / "runs" / "tiny"
    export_here(run / "checkpoints" / "step_00000003", tmp_path / "out")
    third, fourth = gathered_weights(run, 3), gathered_weights(run, 4)
    name = "transformer.h.0.mlp.c_fc.weight"
    assert torch.equal(tensors_of(tmp_path / "out")[name], third[name])
    assert not torch.equal(third[name], fourth[name])


def test_the_config_is_the_students_except_the_dtype(world, exported):
    ours, theirs = (json.loads((f / "config.json").read_text()) for f in (exported[0], world / "student"))
    assert (ours["attn_pdrop"], ours["resid_pdrop"]) == (0.1, 0.2)
    assert ours == {**theirs, "dtype": "bfloat16"}
    for name in ("generation_config.json", "cut.json"):
        assert (exported[0] / name).read_bytes() == (world / "student" / name).read_bytes()


def test_a_student_without_a_tokenizer_gets_the_teachers(exported):
    assert (exported[0] / "tokenizer.json").read_text() == "the teacher's"


def test_an_export_generates_by_the_snippet_that_is_printed(exported):
    scope = {}
    _, *snippet = (line.strip() for line in exported[1].splitlines())  # the place, then how to load it
    exec("\n".join(snippet), scope)
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert scope["model"].generate(TOKENS, **settings).shape == (2, 24)


def peak_anonymous_mb(*arguments) -> float:
    """Highest private memory of the tool, without pages of mapped files, which the system takes back at need."""
    process = subprocess.Popen([sys.executable, ROOT / "tools" / "export_hf.py", *arguments], stdout=subprocess.PIPE)
    peak = 0
    while process.poll() is None:
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        peak = max([peak, *(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))])
        time.sleep(0.001)
    assert process.returncode == 0
    return peak / 1e3


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_memory_is_one_shard_and_a_few_of_the_largest_tensor(world, tmp_path):
    sizes = [t.numel() * 4 / 1e6 for t in tensors_of(world / "big").values()]
    total, shard, largest = sum(sizes), 20, max(sizes)
    idle = peak_anonymous_mb(world / "runs" / "tiny", tmp_path / "tiny")
    above = peak_anonymous_mb(world / "runs" / "big", tmp_path / "big", "--max-shard-gb", "0.02") - idle
    print(f"{total:.0f} MB of weights: {above:.0f} MB above the {idle:.0f} MB of a tiny model")
    assert total > 100
    assert (
        above < shard + 8 * largest < total / 2
    )  # four at once, and what a process's peak varies by: 21 to 33 MB were seen


def test_an_fp32_run_of_one_rank_exports_its_weights_in_shards(world, tmp_path):
    export_here(world / "runs" / "big", tmp_path / "out", "--max-shard-gb", "0.02")
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3
    assert all((tmp_path / "out" / name).stat().st_size < 20.1e6 for name in files)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == files
    weights = gathered_weights(world / "runs" / "big", 1)
    assert loaded(tmp_path / "out").dtype == torch.float32
    exported = tensors_of(tmp_path / "out")
    assert exported.keys() == weights.keys()
    assert all(torch.equal(exported[name], weights[name]) for name in weights)
    assert (tmp_path / "out" / "merges.txt").read_text() == "a b\n"


@pytest.fixture
def copy(world, tmp_path):
    """A copy of the small run, to be damaged."""
    return Path(shutil.copytree(world / "runs" / "tiny", tmp_path / "copy", ignore=shutil.ignore_patterns("export")))


def refused(*arguments) -> str:
    from ted_scale.commands.export_hf import main

    with pytest.raises(UserError) as caught:
        main([str(a) for a in arguments])
    return str(caught.value)


def test_a_run_is_exported_from_any_folder_for_its_paths_count_from_where_it_was_started(tmp_path, monkeypatch):
    from ted_scale.commands.export_hf import named_by_run

    run = make_run(Path(), runs="runs/small")
    (tmp_path / "home/runs/small/tiny").mkdir(parents=True)
    (tmp_path / "home/student").mkdir()
    (tmp_path / "elsewhere/student").mkdir(parents=True)  # another one
    monkeypatch.chdir(tmp_path / "elsewhere")
    found = named_by_run("student", run, Path("../home/runs/small/tiny"))
    assert Path(found).samefile(tmp_path / "home/student")
    assert named_by_run("owner/name", run, Path("../home/runs/small/tiny")) == "owner/name"
    assert named_by_run("student", run, tmp_path / "elsewhere") == "student"  # it was moved: the current folder counts


def test_a_folder_that_is_not_a_run_is_refused_with_code_2(tmp_path):
    done = export(tmp_path / "none")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("error: RUN must be a run folder")


def test_a_run_without_a_checkpoint_is_refused(copy, tmp_path):
    shutil.rmtree(copy / "checkpoints")
    assert "RUN must have a checkpoint" in refused(copy, tmp_path / "out")


def test_a_checkpoint_of_stage_one_is_refused_to_its_last_step(copy, tmp_path):
    for step in (1, 2):
        stage_one = copy / "checkpoints" / f"step_{step:08d}"
        assert f"step {step} of stage I (2 steps)" in refused(stage_one, tmp_path / "out")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_missing_file_of_a_named_checkpoint_is_refused(rank, copy, tmp_path):
    newest = copy / "checkpoints" / "step_00000004"
    (newest / f"rank_{rank:05d}.safetensors").unlink()
    assert f"rank_{rank:05d}.safetensors is missing" in refused(newest, tmp_path / "out")
    assert not any(tmp_path.glob("out*"))


def test_a_flipped_bit_is_refused_and_a_truncated_checkpoint_is_skipped(copy, tmp_path, capsys):
    shard = copy / "checkpoints" / "step_00000004" / "rank_00001.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-200] + bytes([whole[-200] ^ 4]) + whole[-199:])
    assert "rank_00001.safetensors is not as it was written" in refused(copy, tmp_path / "out")
    shard.write_bytes(whole[:-200])
    export_here(copy, tmp_path / "out")
    said = capsys.readouterr()
    assert "step_00000003 of tiny" in said.out
    assert "step_00000004 is damaged and skipped: rank_00001.safetensors has" in said.err


def test_another_students_folder_is_refused(world, copy, tmp_path):
    make_model(tmp_path / "other", "gpt2", num_hidden_layers=3)
    sentence = refused(copy, tmp_path / "out", "--student", tmp_path / "other")
    assert "must hold transformer.h.2" in sentence and "does not have it" in sentence
    assert not any(tmp_path.glob("out*"))


def test_an_existing_folder_is_kept_without_overwrite(world, tmp_path):
    out = make_model(tmp_path / "out", "llama")
    assert "OUT must be a new or an empty folder" in refused(world / "runs" / "tiny", out)
    export_here(world / "runs" / "tiny", out, "--overwrite")
    assert loaded(out).config.model_type == "gpt2"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_an_export_has_the_card_of_its_run(world, tmp_path):
    export_here(world / "runs" / "tiny", tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: transformers") and "step 4 of 4" in text and "FLOPs | not" not in text
    assert str(world) not in text


if __name__ == "__main__":
    train_and_gather()
