"""Where the frozen teacher lives: which ranks share its weights, and whether DeepSpeed has to gather them.

A placement changes no loss and is in no checkpoint, so it may be another one at every start.
"""

from typing import NamedTuple

SAID = {"replicated": "whole on every rank", "sharded": "sharded by ZeRO-3 over all {ranks} ranks"}


class Placement(NamedTuple):
    way: str  # teacher.placement
    ranks: int  # that share one copy of the weights
    is_bare: bool  # a plain module without DeepSpeed's engine, because there is nobody to gather from

    def __str__(self) -> str:
        return f"the teacher's weights are {SAID[self.way].format(ranks=self.ranks)}"


def place(run, world: int, ds_config: dict) -> Placement:
    way = run.teacher.placement
    ranks = 1 if way == "replicated" else world
    return Placement(way, ranks, way == "replicated" or (ranks == 1 and not offloads_weights(ds_config)))


def offloads_weights(ds_config: dict) -> bool:
    """Whether DeepSpeed keeps shards in the host's memory, those of a single rank, too."""
    return (ds_config["zero_optimization"].get("offload_param") or {}).get("device", "none") != "none"
