"""Finds the parts of a Hugging Face causal LM from its config alone: no weights, no process group.

The model is built on the meta device and run once. The run shows which module is the body, where its blocks are, which
modules come after the last block (the tail) and what the family does to its logits. Nothing is guessed from a family's
name. No code that comes with a model is run (docs/security.md).
"""

import contextlib
import logging
import os
from pathlib import Path

os.environ.setdefault(
    "USE_HUB_KERNELS", "NO"
)  # kernels from the hub are programs; transformers reads this at its import

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from ted_scale.base.errors import UserError, shown
from ted_scale.data.packing import whole_rows
from ted_scale.kernels.formulas.logits import soften
from ted_scale.models import attention, experts
from ted_scale.models.anatomy import Anatomy
from ted_scale.storage.hub import MODEL, TOKENIZER, check_texts, find_folder

EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
MOST_LAYERS = 1000
PROBE_LOGITS = torch.tensor([-40.0, -3.0, -0.5, 0.0, 1.0, 7.0, 55.0])


def read_config(key: str, folder: Path):
    """transformers' config of a folder. Errors name the folder by `key`. Code that comes with a model is never run."""
    check_texts(f"{key} must hold the config.json of a known model family", folder)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # each family checks its own keys and raises its own exceptions
        reason = " ".join(str(error).split("\n", 2)[:2]).strip()
        if "trust_remote_code" in str(error):
            reason = (
                "transformers does not know its model_type, and code that comes with a model is not run; choose a model that "
                "transformers supports itself"
            )
        raise UserError(
            f"{key} must hold the config.json of a known model family, but {folder} does not: {reason}"
        ) from None
    if not hasattr(config, "num_hidden_layers"):
        raise UserError(f"{key} must be a text-only causal LM, but {folder} ({config.model_type}) is not")
    layers = config.num_hidden_layers
    if type(layers) is not int or not 0 < layers <= MOST_LAYERS:
        raise UserError(
            f"{key} must have 1 to {MOST_LAYERS} blocks, but {folder} has {shown(layers)}; correct its config"
        )
    if getattr(config, "quantization_config", None):
        raise UserError(
            f"{key} must have plain weights, but the config.json of {folder} has a quantization_config; load it with transformers, "
            "dequantized, and save that model in bf16"
        )
    for name, value in config.to_dict().items():
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)  # dropout would add to the distance of the states
    return config


def empty_model(config, dtype=None):
    """The family's modules on the caller's device, without weight initialization."""
    from transformers.initialization import no_init_weights

    with quiet_transformers(), no_init_weights():
        model = AutoModelForCausalLM.from_config(
            config, attn_implementation=attention.NAME, dtype=dtype, trust_remote_code=False
        )
    model.tie_weights()  # without initialization this is skipped, too
    model.generation_config = GenerationConfig()
    return model


@contextlib.contextmanager
def quiet_transformers():
    """A context without transformers' long warning about a model without a generation config."""
    logger = logging.getLogger("transformers")
    level, _ = logger.level, logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def way_to_weights(key: str, folder) -> str:
    if any(folder.glob("*.gguf")):
        return "choose the model from which the GGUF was made"
    if (folder / "run.toml").is_file():
        return f"it is the folder of a run: ted-scale export {folder} OUT, and name OUT"
    by_training = (
        'set student.init = "random"' if key == "student.path" else 'train it first, as a student by method "ce"'
    )
    return f"save the model with save_pretrained, or, if it is new, {by_training}"


def inspect(key: str, path: str, *, needs_weights: bool = True, is_frozen: bool = False) -> Anatomy:
    """The anatomy of a model. Errors name it by `key`, its key in the run file. Without `needs_weights` a hub id's weights are
    not fetched: a plan of 70 B parameters would wait for 141 GB. A frozen model may have parts that cannot be trained here: a
    mixture of experts, attention with sinks, a recurrence without attention."""
    wanted = MODEL if needs_weights else TOKENIZER
    folder = find_folder(key, path, wanted).resolve()  # resolved once: a link that is changed later has no effect
    if needs_weights and not any(folder.glob("*.safetensors")):
        raise UserError(f"{key} must hold *.safetensors weights, but {folder} has none; {way_to_weights(key, folder)}")
    config = read_config(key, folder)
    if not is_frozen:
        check_dense(key, folder, config)
    model, order, logits, calls, chosen = run_once(key, folder, config)
    check_attention(key, model, calls, is_frozen)
    blocks = find_blocks(key, model, config.num_hidden_layers)
    after = order[max(i for i, name in enumerate(order) if name == f"{blocks}.{config.num_hidden_layers - 1}") + 1 :]
    body = min((n for n in order if n and blocks.startswith(f"{n}.")), key=len)
    softcap, scale = logit_settings(key, config, logits)
    head = model.get_output_embeddings()
    check_way_to_head(key, model, order[order.index(body) + 1 :], body)
    return Anatomy(
        folder=folder,
        family=config.model_type,
        body=body,
        blocks=blocks,
        tail=tuple(n for n in after[: after.index(body)] if n),
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        head_width=head.weight.shape[1],
        vocab_size=head.weight.shape[0],
        softcap=softcap,
        logit_scale=scale,
        parameters=size_of(model),
        block_parameters=max(size_of(block) for block in model.get_submodule(blocks)),
        in_blocks=size_of(model.get_submodule(blocks)),
        matrices=matrices(model, head, chosen),
        max_length=getattr(config, "max_position_embeddings", None),
        attention=tuple(dict.fromkeys(call.layer for call in calls)),
        heads=tuple(dict.fromkeys((call.heads, call.key_heads) for call in calls)),
        scores=tuple((c.heads * (c.layer.width + c.layer.value_width), c.layer.window) for c in calls),
        blocks_apart=blocks_apart(model, body, blocks),
        chunk=chunk_of(model),
    )


def chunk_of(model) -> int:
    """Tokens in a chunk of a recurrent layer. 64 if the config does not say, as in the code of such families."""
    keys = ("chunk_size", "mamba_chunk_size")
    return next((c for k in keys if (c := getattr(model.config, k, None))), 64) if model._is_stateful else 0


def size_of(module) -> int:
    return sum(p.numel() for p in module.parameters())


def matrices(model, head, chosen: dict) -> int:
    """Elements of all matrices that multiply a token's state; only the chosen experts count. An embedding is a look-up."""

    def of_experts(module) -> int:
        matrices = [p for p in module.parameters(recurse=False) if p.dim() == 3]  # their biases have two dimensions
        return sum(p.numel() // len(p) * chosen[module] for p in matrices)

    others = [m for m in model.modules() if m is not head and m not in chosen and not isinstance(m, torch.nn.Embedding)]
    found = sum(p.numel() for m in others for p in m.parameters(recurse=False) if p.dim() > 1)
    return found + sum(map(of_experts, chosen))


def run_once(key: str, folder: Path, config):
    """(model without weights, the results of `trace`, its calls of our attention, its modules of experts → how many experts a
    token uses). Any exception of a family's code becomes one error message."""
    try:
        with torch.device("meta"):
            model = empty_model(config)
        with attention.recorded_calls() as calls, experts.as_one() as chosen:
            return model, *trace(model), calls, chosen
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if attention.NAME in reason:
            reason = "it does not use transformers' attention interface"
        raise UserError(
            f"{key} must be a decoder-only causal LM, but {folder} ({config.model_type}) is not: {reason}"
        ) from None


def blocks_apart(model, body: str, blocks: str) -> int:
    """How many blocks can keep documents apart. In such a block only attention mixes tokens, and it receives the documents.
    Blocks with recurrent layers do not count: they carry a state over a border (and have a convolution over time). Some families
    drop the keyword."""
    quiet = contextlib.suppress(Exception)
    with attention.recorded_calls() as calls, experts.as_one(), torch.no_grad(), quiet:
        tokens = torch.zeros(1, 4, dtype=torch.long, device="meta")
        documents = attention.packing_arguments(whole_rows(1, 4, tokens.device))
        model.get_submodule(body)(input_ids=tokens, use_cache=False, **documents)
    received = {call.module: call.packed for call in calls}

    def apart(block) -> bool:
        asked = [received[m] for m in block.modules() if m in received]
        return bool(asked) and all(asked) and not any(isinstance(m, torch.nn.Conv1d) for m in block.modules())

    return sum(apart(block) for block in model.get_submodule(blocks))


def check_dense(key: str, folder: Path, config) -> None:
    count = next((v for k in EXPERT_KEYS if (v := getattr(config, k, None))), 0)
    if count > 1:
        raise UserError(
            f"{key} must be a dense model, but {folder} has {count} experts, which only a teacher may have; choose a dense one"
        )


def check_attention(key: str, model, calls: list[attention.Call], is_frozen: bool) -> None:
    """Refuse a model whose attention is not ours, or is called with keywords that ours ignores. The model gets no mask, so its
    results would be wrong. A model with recurrences alone needs no attention."""
    family = model.config.model_type
    if not calls and not (is_frozen and model._is_stateful):
        raise UserError(
            f"{key} must be a causal LM that uses transformers' attention interface, but {family} does not; choose "
            "another family"
        )
    if not all(call.causal for call in calls):
        raise UserError(f"{key} must be a causal LM, but {family} lets every token see later ones; choose a decoder")
    unknown = set().union(*(call.unknown for call in calls)) - ({attention.SINKS} if is_frozen else set())
    if unknown:
        raise UserError(
            f"{key} must have attention of queries, keys and values alone, but {family}'s takes {min(unknown)}, which is "
            "not known here; choose another family"
        )


def check_way_to_head(key: str, model, after: list[str], body: str) -> None:
    """Refuse modules between the body and the output projection, because filtered states go through the tail only."""
    head = next(name for name, module in model.named_modules() if module is model.get_output_embeddings())
    between = [n for n in after[: after.index(head)] if not body.startswith(f"{n}.")]
    if between:
        raise UserError(
            f"{key} must have its output projection right after its body, but {model.config.model_type} has {between[0]} "
            "between them; choose another family"
        )


def logit_settings(key: str, config, logits: torch.Tensor) -> tuple[float | None, float]:
    """(soft-cap, scale) from the config. They must give the family's own result for PROBE_LOGITS."""
    softcap = getattr(config, "final_logit_softcapping", None)
    scale = next((s for k in ("logit_scale", "lm_head_multiplier") if (s := getattr(config, k, None))), None)
    scale = scale or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
    if torch.allclose(logits.float().flatten(), soften(PROBE_LOGITS, softcap, scale), rtol=1e-4, atol=1e-5):
        return softcap, scale
    raise UserError(
        f"{key} must scale and soft-cap its logits in a known way, but {config.model_type} does something else"
    )


def trace(model) -> tuple[list[str], torch.Tensor]:
    """(module names in the order in which they finish, the family's logits if PROBE_LOGITS replace the head's output)"""
    order: list[str] = []
    names = {module: name for name, module in model.named_modules()}
    hooks = [m.register_forward_hook(lambda module, *_: order.append(names[module])) for m in names]
    hooks.append(model.get_output_embeddings().register_forward_hook(lambda *_: PROBE_LOGITS.clone()[None, None]))
    with torch.no_grad():
        logits = model(input_ids=torch.zeros(1, 4, dtype=torch.long, device="meta"), use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return order, logits


def find_blocks(key: str, model, layers: int) -> str:
    found = [n for n, m in model.named_modules() if isinstance(m, torch.nn.ModuleList) and len(m) == layers]
    if not found:
        raise UserError(f"{key} must keep its {layers} blocks in one list, but {model.config.model_type} does not")
    return min(found, key=len)
