"""The frozen teacher: a micro-batch in, a Signal out. It has no optimizer, no graph and no logits."""

import torch

from ted_scale.distill.signal import Signal, Weights
from ted_scale.kernels import linear_kl_ce
from ted_scale.models.anatomy import Anatomy, StateRecorder, head_of, run_body
from ted_scale.models.zero import gathered, start_gather


class TeacherBody(torch.nn.Module):
    """The teacher's module: that of its engine, or all there is of it where every rank has it whole. The output projection stays
    in the network, so that it is sharded with it."""

    def __init__(self, network, anatomy: Anatomy, blocks: list[int]):
        super().__init__()
        self.network, self.anatomy, self.blocks = network.requires_grad_(False).eval(), anatomy, blocks
        self.recorder = StateRecorder(network, anatomy, blocks)
        self.gathers_ahead: list[torch.Tensor] = []  # for the student's loss, while the last block runs
        last_block = network.get_submodule(anatomy.blocks)[-1]
        last_block.register_forward_pre_hook(lambda *_: start_gather(self.gathers_ahead))

    def forward(self, batch, wants_layers: bool) -> Signal:
        with self.recorder.record(wants_layers) as states:
            last = run_body(self.network, self.anatomy, batch.tokens_BT, batch.packing)
        layers = tuple(states[b].flatten(0, 1) for b in self.blocks) if wants_layers else ()
        return Signal(layers, last.flatten(0, 1))


class Teacher:
    """Runs the teacher if a loss weight needs it. Where no rank shares its weights, `engine` is the body itself."""

    def __init__(self, engine, body: TeacherBody):
        self.engine, self.body, self.head = engine, body, head_of(body.network, body.anatomy)
        self.projection = self.head.projection
        self.tied = body.network.get_input_embeddings().weight is self.head.weight
        self.at_load = None  # the digests of what this rank has of it, if replicas are compared

    @property
    def is_bare(self) -> bool:
        return self.engine is self.body

    @torch.no_grad()
    def __call__(self, batch, weights: Weights) -> Signal | None:
        if not (weights.kl or weights.layer):
            return None
        return self.run(batch, weights.layer != 0, weights.kl != 0)

    def run(self, batch, wants_layers: bool, wants_head: bool) -> Signal:
        """A head that is also the embedding is gathered before the look-up, and stays whole until the loss has used it."""
        wanted = self.projection if wants_head else []
        if self.tied:
            start_gather(wanted, wait=True)
        else:
            self.body.gathers_ahead = wanted
        return self.engine(batch, wants_layers)

    @torch.no_grad()
    def ce(self, batch, denom) -> torch.Tensor:
        """The teacher's own next-token loss, for validation."""
        last = self.run(batch, False, True).last_NE
        with gathered(self.projection):
            return linear_kl_ce(
                last, self.head.weight, None, None, batch.labels_BT.flatten(), batch.weights_BT.flatten(), denom=denom,
                kl_weight=0.0, **self.head.linear_kl_ce_arguments("s"),
            )[0]  # fmt: skip
