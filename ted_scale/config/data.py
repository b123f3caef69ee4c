"""The data: corpora, how they are blended, and how those in object storage are fetched."""

import logging
import os
import tempfile
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from ted_scale.base.errors import shown
from ted_scale.config.types import NonNegative, Positive, PositiveInt, Section

log = logging.getLogger("ted_scale")


class Corpus(Section):
    """A domain of the blend."""

    path: str = Field(description="a .bin/.idx prefix, or a folder of them; on disk, or under s3:// or msc://")
    name: str = Field("", description="the corpus's name in logs and metrics; default: the path's last part")
    weight: NonNegative = Field(
        1.0, description="its share of the samples is this weight divided by the sum of all weights"
    )
    repeat: bool = Field(True, description="false: refuse a run that reads the corpus more than once")
    validation: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0, description="share of the corpus's tokens, at its end, that is held out; 1, with weight 0: all of them"
    )

    @model_validator(mode="after")
    def all_held_out_is_not_trained_on(self):
        if self.validation == 1 and self.weight:
            raise ValueError(
                f"weight must be 0 where validation is 1, but is {self.weight:g}: nothing is left to train on; set weight = 0"
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def the_path_names_it(cls, values):
        if isinstance(values, dict) and not values.get("name") and isinstance(values.get("path"), str):
            return {**values, "name": Path(values["path"]).name}
        return values


class Blend(Section):
    """Which share of the samples comes from each corpus."""

    kind: Literal["static", "temperature", "adaptive"] = Field(
        "static",
        description="static: shares by data.corpora.weight; temperature: by weight and size; adaptive: DDK, which starts from "
        "weight",
    )
    temperature: Positive = Field(
        1.0, description="share by (weight * tokens)^(1/temperature); 1: by size; higher: more equal"
    )
    every: PositiveInt = Field(1000, description="adaptive: number of steps between two measurements")
    smoothing: Annotated[float, Field(gt=0, le=1)] = Field(
        0.5,
        description="adaptive: the share that follows the measurement; the rest is divided equally between the corpora",
    )


class Streaming(Section):
    """How corpora under s3:// and msc:// are read. Corpora on disk do not use these keys."""

    folder: str = Field(
        "", description="folder for indices and chunks, on a disk of the node; default: in the temporary folder"
    )
    cache_gib: NonNegative = Field(
        4.0, description="largest size of the chunks on disk, for all processes of the node; 0: no chunks are kept"
    )
    chunk_kib: Annotated[int, Field(ge=4, multiple_of=4)] = Field(
        256, description="size of one read; docs/data.md has the cost"
    )
    ahead: PositiveInt = Field(
        64, description="number of windows that are fetched before they are needed, for each process"
    )
    requests: PositiveInt = Field(16, description="number of requests at the same time, for each process")
    patience_s: Positive = Field(300.0, description="how long a failing request is retried before the run ends")

    @property
    def place(self) -> Path:
        return Path(self.folder or f"{tempfile.gettempdir()}/ted_scale-{os.getuid()}")


class Data(Section):
    corpora: list[Corpus] = Field(min_length=1)
    blend: Blend = Blend()
    stream: Streaming = Streaming()
    seq_len: PositiveInt = Field(description="tokens in a row")
    attention: Literal["causal", "document"] = Field(
        "causal", description="document: attention does not cross the border of a document, and positions restart there"
    )
    packing: Literal["windows", "examples"] = Field(
        "windows",
        description="what a row holds; windows: seq_len consecutive tokens; examples: whole documents, as many as fit",
    )
    longer: Literal["cut", "leave_out"] = Field(
        "cut",
        description="what packing = examples does with documents longer than seq_len; cut: cuts them into as few rows as possible",
    )
    sequence_parallel: PositiveInt = Field(
        1,
        description="number of ranks that share each row; each has a part of its tokens; they have consecutive numbers",
    )
    prefetch: PositiveInt = Field(2, description="number of steps that are read ahead")

    @model_validator(mode="before")
    @classmethod
    def a_thread_reads(cls, values):
        """Accept `workers` in run files of earlier versions: the number of processes that read for a rank. It never changed a
        result."""
        if not isinstance(values, dict) or "workers" not in values:
            return values
        if type(workers := values["workers"]) is not int or workers < 0:
            raise ValueError(f"workers must be left out, for a thread reads, but is {shown(workers)}; leave it out")
        if workers:
            log.warning(f"data.workers = {workers} has no effect any more: a thread reads; leave it out")
        return {key: value for key, value in values.items() if key != "workers"}

    @model_validator(mode="after")
    def examples_are_apart(self):
        if self.packing == "examples" and self.attention != "document":
            raise ValueError(
                f"attention must be 'document' where data.packing is 'examples', but is '{self.attention}'; set it to 'document'"
            )
        return self

    @model_validator(mode="after")
    def rows_divide(self):
        if self.seq_len % self.sequence_parallel:
            raise ValueError(
                f"sequence_parallel must divide data.seq_len ({self.seq_len}), but is {self.sequence_parallel}; change one of them"
            )
        return self

    @model_validator(mode="after")
    def names_differ(self):
        names = [corpus.name for corpus in self.corpora]
        if not all(names):
            raise ValueError("corpora.name must be set where the path ends in none, but is ''; set name")
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"corpora.name must be another for every corpus, but '{twice}' is there twice; set name")
        return self
