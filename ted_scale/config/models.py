"""The two models of a run: where they are, which parameters are trained, and how the teacher is kept.

Note: a teacher's placement and precision change its outputs only by rounding. student.lora changes which parameters are trained.
"""

from typing import Literal

from pydantic import Field, field_validator, model_validator

from ted_scale.config.types import Positive, PositiveInt, Section


class Model(Section):
    path: str = Field(description="local folder or hub id of a causal LM with safetensors weights")
    init: Literal["weights", "random"] = Field(
        "weights", description="random: the folder needs only a config.json; use it for a teacher only in measurements"
    )


class Teacher(Model):
    every: PositiveInt = Field(
        1,
        description="n: stage II asks the teacher for one micro-batch in n, and multiplies its terms by n there; a larger n is "
        "closer to ce",
    )
    placement: Literal["auto", "replicated", "node", "sharded", "offload"] = Field(
        "auto",
        description="replicated: whole on every rank, without DeepSpeed; node: sharded by ZeRO-3 over the ranks of a node; "
        "sharded: over all ranks; offload: in the host's memory, copied to the device block by block; auto: the first "
        "of replicated, node and sharded that fits",
    )
    node_ranks: PositiveInt | None = Field(
        None,
        description="number of ranks of a node; they have consecutive numbers; default: what the launcher started on this node",
    )
    micro_batch: PositiveInt = Field(
        1,
        description="number of micro-batches of a step (of train.micro_batch samples) that the teacher reads in one call",
    )
    early: bool = Field(
        False,
        description="with replicated or offload: the teacher reads the next micro-batch of the step during the student's backward",
    )
    precision: Literal["bf16", "fp8", "int8"] | None = Field(
        None,
        description="precision of the matrices in the teacher's blocks; 8 bits need torchao; fp8: weights and activations, on "
        "Hopper and newer; int8: only weights, to save memory; default: train.precision",
    )
    compile: bool = Field(
        False,
        description="torch compiles the teacher's blocks, also if documents are kept apart; needs placement replicated",
    )

    @property
    def eight_bits(self) -> str | None:
        """fp8, int8, or None."""
        return None if self.precision == "bf16" else self.precision

    @property
    def is_whole(self) -> bool:
        """Whether every rank must have the whole teacher."""
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
    """Low-rank adapters beside the student's frozen matrices (LoRA), by peft. Stage II trains them instead of the student."""

    rank: PositiveInt = Field(16, description="rank of each adapter's product B·A")
    alpha: Positive = Field(32.0, description="the product is multiplied by alpha / rank")
    targets: tuple[str, ...] | Literal["all-linear"] = Field(
        "all-linear",
        description="the last parts of the names of linear maps in the blocks, such as q_proj; all-linear: all of them. The head "
        "and the embeddings stay frozen",
    )

    @field_validator("targets", mode="before")
    @classmethod
    def list_is_tuple(cls, value):
        return tuple(value) if isinstance(value, list) else value


class Student(Model):
    gradient_checkpointing: bool = Field(
        False, description="the backward computes the activations of a block again: less memory, more time"
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
