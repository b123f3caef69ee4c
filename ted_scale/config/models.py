"""The two models of a run: where they are, what of them is trained, and how the teacher is kept.

Note: a teacher's placement and precision never change what it says beyond rounding; student.lora changes what is trained.
"""

from typing import Literal

from pydantic import Field, field_validator, model_validator

from ted_scale.config.types import Positive, PositiveInt, Section


class Model(Section):
    path: str = Field(description="local folder or hub id of a causal LM with safetensors weights")
    init: Literal["weights", "random"] = Field(
        "weights", description="random: the folder needs only a config.json; for a teacher only in measurements"
    )


class Teacher(Model):
    every: PositiveInt = Field(
        1,
        description="stage II asks the teacher for one micro-batch in so many, where its terms weigh as much more: the dial "
        "between kd and ce",
    )
    placement: Literal["auto", "replicated", "node", "sharded", "offload"] = Field(
        "auto",
        description="replicated: whole on every rank, without DeepSpeed; node: sharded by ZeRO-3 over the ranks of a node; "
        "sharded: over all ranks; offload: in the host's memory, block by block to the device; auto: the first of "
        "the others that fits",
    )
    node_ranks: PositiveInt | None = Field(
        None, description="ranks of a node, which follow each other; default: what the launcher started on this node"
    )
    micro_batch: PositiveInt = Field(
        1, description="the micro-batches (of train.micro_batch samples) that it reads in one call, in a step"
    )
    early: bool = Field(
        False,
        description="replicated or offload: it reads a micro-batch beside the student's backward of the one before, in a step",
    )
    precision: Literal["bf16", "fp8", "int8"] | None = Field(
        None,
        description="of the matrices in its blocks, by torchao; fp8: weights and activations, on Hopper and newer; int8: weights "
        "alone, for their memory; default: train.precision",
    )
    compile: bool = Field(
        False, description="torch compiles its blocks, also where documents are apart; needs placement replicated"
    )

    @property
    def eight_bits(self) -> str | None:
        """fp8, int8, or None."""
        return None if self.precision == "bf16" else self.precision

    @property
    def is_whole(self) -> bool:
        """Whether it can only run where a rank has all of it."""
        return self.compile or self.eight_bits is not None

    @model_validator(mode="after")
    def placement_fits(self):
        if self.is_whole and self.placement not in ("auto", "replicated"):
            asks = f"teacher.precision is '{self.precision}'" if self.eight_bits else "teacher.compile is true"
            raise ValueError(
                f"placement must be 'auto' or 'replicated' where {asks}, but is '{self.placement}'; leave one of them out"
            )
        return self


class Lora(Section):
    """Adapters of low rank beside the student's frozen matrices (LoRA), by peft; stage II trains them instead of the student."""

    rank: PositiveInt = Field(16, description="of each adapter's product B·A")
    alpha: Positive = Field(32.0, description="the product counts alpha / rank times")
    targets: tuple[str, ...] | Literal["all-linear"] = Field(
        "all-linear",
        description="the last parts of names of linear maps in the blocks, such as q_proj; all-linear: all of them. The head and "
        "embeddings stay frozen",
    )

    @field_validator("targets", mode="before")
    @classmethod
    def list_is_tuple(cls, value):
        return tuple(value) if isinstance(value, list) else value


class Student(Model):
    gradient_checkpointing: bool = Field(
        False, description="activations of a block are computed again in backward: less memory, more time"
    )
    lora: Lora | None = None

    @model_validator(mode="after")
    def adapters_have_a_start(self):
        if self.lora and self.init == "random":
            raise ValueError(
                "init must be 'weights' where student.lora is set, but is 'random': adapters beside weights that never train learn "
                "nothing; leave one of them out"
            )
        if self.lora and not self.lora.targets:
            raise ValueError("lora.targets must name a linear map, but is []; leave it out for all of them")
        return self
