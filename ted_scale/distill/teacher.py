"""The frozen teacher: a micro-batch in, a Signal out. It has no optimizer, no graph, and never whole logits."""

import torch

from ted_scale.distill.signal import Signal, Weights
from ted_scale.kernels import linear_kl_ce
from ted_scale.models.anatomy import Anatomy, Taps, head_of, run_body
from ted_scale.models.zero import ask, gathered


class TeacherBody(torch.nn.Module):
    """What the teacher's engine runs. The output projection stays inside the network, so that it is sharded with it."""

    def __init__(self, network, anatomy: Anatomy, blocks: list[int]):
        super().__init__()
        self.network, self.anatomy, self.blocks = network.requires_grad_(False).eval(), anatomy, blocks
        self.taps = Taps(network, anatomy, blocks)
        self.asks_for: list[torch.Tensor] = []  # what is gathered for the student while the last block runs
        network.get_submodule(anatomy.blocks)[-1].register_forward_pre_hook(lambda *_: ask(self.asks_for))

    def forward(self, batch, wants_layers: bool) -> Signal:
        with self.taps.record(wants_layers) as states:
            last = run_body(self.network, self.anatomy, batch.tokens_BT, batch.packing)
        layers = tuple(states[b].flatten(0, 1) for b in self.blocks) if wants_layers else ()
        return Signal(layers, last.flatten(0, 1))


class Teacher:
    """Calls the engine (or, without DeepSpeed, the body itself) where a weight asks for it."""

    def __init__(self, engine, body: TeacherBody):
        self.engine, self.body, self.head = engine, body, head_of(body.network, body.anatomy)
        self.tied = body.network.get_input_embeddings().weight is self.head.weight
        self.at_load = None  # the digests of its shards, where they are compared

    @torch.no_grad()
    def __call__(self, batch, weights: Weights) -> Signal | None:
        if not (weights.kl or weights.layer):
            return None
        return self.run(batch, weights.layer != 0, weights.kl != 0)

    def run(self, batch, wants_layers: bool, wants_head: bool) -> Signal:
        """A head that is the embedding, too, is gathered before the look-up and stays until it is used."""
        asked = self.head.projection if wants_head else []
        if self.tied:
            ask(asked, whole=True)
        else:
            self.body.asks_for = asked
        return self.engine(batch, wants_layers)

    @torch.no_grad()
    def ce(self, batch, denom) -> torch.Tensor:
        """The teacher's own next-token loss, for validation."""
        head = self.head
        last = self.run(batch, False, True).last_NE
        with gathered(head.projection):
            return linear_kl_ce(
                last, head.weight, None, None, batch.labels_BT.flatten(), batch.weights_BT.flatten(), denom=denom,
                kl_weight=0.0, softcap_s=head.softcap, logit_scale_s=head.logit_scale, head_bias_s=head.bias,
            )[0]  # fmt: skip
