"""The host's time for one pass through 28 small blocks: plain, and under ZeRO-3 with our lean hooks or, with --deepspeed, its own.

The blocks are so small that the measured time is the host's work for them, for which a GPU would wait. One process a rank, the
arms in turn, medians. Our changes hold for a whole process, so DeepSpeed's own hooks need a process without them.
"""

import argparse
import statistics
import time

import torch

from ted_scale.base.exits import run_main

BLOCKS = 28


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--deepspeed", action="store_true", help="DeepSpeed's own hooks")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # from DeepSpeed's launcher
    arguments = parser.parse_args()
    lean, name = not arguments.deepspeed, "DeepSpeed" if arguments.deepspeed else "lean"

    from ted_scale.ranks.group import start_ranks

    start_ranks()
    torch.set_num_threads(1)
    tokens = torch.zeros(1, 4, dtype=torch.long)
    arms = {
        "frozen, plain": forward(plain(), tokens),
        f"frozen, {name}": forward(sharded(lean, trained=False), tokens),
        "trained, plain": both(plain(), tokens),
        f"trained, {name}": both(sharded(lean, trained=True), tokens),
    }
    times = {name: [] for name in arms}
    for turn in range(arguments.turns + 4):
        for name, run in arms.items():
            began = time.perf_counter()
            run()
            if turn >= 4:  # ZeRO-3 learns the order of modules
                times[name].append(time.perf_counter() - began)
    if torch.distributed.get_rank():
        return
    for name, values in times.items():
        base = times[f"{name.split(',')[0]}, plain"]
        ratio = statistics.median(a / b for a, b in zip(values, base, strict=True))
        print(f"{name:20} {statistics.median(values) * 1e3:7.1f} ms   {ratio:5.2f} x plain")


def plain():
    import transformers

    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128}
    config = transformers.Qwen2Config(**sizes, num_hidden_layers=BLOCKS, vocab_size=256)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def sharded(lean: bool, *, trained: bool):
    """Every weight is sharded."""
    import deepspeed

    from ted_scale.models import zero_hooks

    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    config = {"zero_optimization": zero, "train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}}
    with deepspeed.zero.Init(config_dict_or_path=config):
        network = plain()
    if lean:
        zero_hooks.patch_deepspeed()
        zero_hooks.gather_whole_blocks(network.model.layers)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.0) if trained else None
    engine = deepspeed.initialize(model=network.requires_grad_(trained), optimizer=optimizer, config=config)[0]
    if lean:
        zero_hooks.trim(engine, config, [] if trained else [network])
    return engine


def forward(model, tokens):
    def run():
        with torch.no_grad():
            model(tokens, use_cache=False)

    return run


def both(model, tokens):
    def run():
        loss = model(tokens, labels=tokens, use_cache=False).loss
        model.backward(loss) if hasattr(model, "backward") else loss.backward()

    return run


if __name__ == "__main__":
    run_main(main)
