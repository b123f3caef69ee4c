"""The frozen teacher. It reads micro-batches and returns a Signal for each. It has no optimizer, no graph and no logits."""

import torch

from ted_scale.data.stream import joined
from ted_scale.distill.signal import Signal, Weights, by_row, parts
from ted_scale.kernels import filtered_states, linear_kl_ce
from ted_scale.kernels.formulas.logits import soften
from ted_scale.models.anatomy import Anatomy, StateRecorder, head_of, run_body
from ted_scale.models.zero import gathered, start_gather


class TeacherBody(torch.nn.Module):
    """The module that DeepSpeed wraps. If every rank holds the whole teacher, there is no engine, only this module. The output
    projection stays in the network, so it is sharded with the network."""

    def __init__(self, network, anatomy: Anatomy, blocks: list[int]):
        super().__init__()
        self.network, self.anatomy, self.blocks = network.requires_grad_(False).eval(), anatomy, blocks
        self.recorder = StateRecorder(network, anatomy, blocks, self.of_pairs)
        self.filters: tuple = ()  # one a pair, if filtered states are kept; a tuple, so that no engine manages them
        self.gathers_ahead: list[torch.Tensor] = []  # gathered for the student's loss while the last block runs
        last_block = network.get_submodule(anatomy.blocks)[-1]
        last_block.register_forward_pre_hook(lambda *_: start_gather(self.gathers_ahead))

    def forward(self, batch, wants_layers: bool) -> Signal:
        with self.recorder.record(wants_layers) as states:
            last = run_body(self.network, self.anatomy, batch.tokens_BT, batch.packing, batch.share)
        layers = tuple(states[b][k] for k, b in enumerate(self.blocks)) if wants_layers else ()
        return Signal(layers, last.flatten(0, 1))

    def of_pairs(self, block: int, state_BTE) -> dict[int, torch.Tensor]:
        """For each pair of this block its state. With filters its filtered state instead, and then nothing keeps the state."""
        state, pairs = state_BTE.flatten(0, 1), [k for k, b in enumerate(self.blocks) if b == block]
        return {k: self.filters[k](state, filtered) if self.filters else state for k in pairs}


def filtered(states_NE, weight, bias, *_) -> torch.Tensor:
    return filtered_states(states_NE, weight, bias)


class Teacher:
    """Runs the teacher if a loss weight needs it. If no ranks share its weights, `engine` is the body itself. reading.py puts
    `together` micro-batches into one call. If `early` is set, it calls the teacher during the student's backward."""

    def __init__(self, engine, body: TeacherBody, *, together: int = 1, early: bool = False):
        self.engine, self.body, self.head = engine, body, head_of(body.network, body.anatomy)
        self.together, self.early = together, early
        self.projection, device = self.head.projection, self.head.weight.device
        self.stream = torch.cuda.Stream(device) if early and device.type == "cuda" else None
        self.filters = None  # frozen and whole on this rank, if the teacher's filtered states are kept
        self.tied = body.network.get_input_embeddings().weight is self.head.weight
        self.at_load = None  # digests of this rank's part of the teacher, if replicas are compared

    @property
    def is_bare(self) -> bool:
        return self.engine is self.body

    @torch.no_grad()
    def __call__(self, batch, weights: Weights) -> Signal | None:
        return self.run(batch, weights.layer != 0, weights.kl != 0) if weights.asks else None

    def each(self, batches: list, weights: Weights) -> list[Signal]:
        """A Signal for each of these micro-batches, from one call. All signals are views of the same memory, which the last one
        frees."""
        if len(batches) == 1:
            return [self(batches[0], weights)]
        return parts(self(joined(batches), weights), [batch.tokens_BT.numel() for batch in batches])

    def keep_filtered(self, filters) -> None:
        self.filters, self.body.filters = filters, tuple(filters or ())

    def run(self, batch, wants_layers: bool, wants_head: bool) -> Signal:
        """Run the body. A head that is also the embedding is gathered before the look-up, and stays whole until the loss has used
        it."""
        wanted = self.projection if wants_head else []
        if self.tied:
            start_gather(wanted, wait=True)
        else:
            self.body.gathers_ahead = wanted
        return self.engine(batch, wants_layers)

    @torch.no_grad()
    def logits(self, batch, at: int) -> torch.Tensor:
        """The logits of one position as the model's family computes them, [B, V]."""
        last, head = by_row(self.run(batch, False, True).last_NE, batch, at), self.head
        with gathered(self.projection):
            raw = torch.nn.functional.linear(last, head.weight, head.bias)
        return soften(raw, head.softcap, head.logit_scale)

    @torch.no_grad()
    def ce(self, batch, denom) -> torch.Tensor:
        """The teacher's own next-token loss, for validation."""
        last = self.run(batch, False, True).last_NE
        with gathered(self.projection):
            return linear_kl_ce(
                last, self.head.weight, None, None, batch.labels_BT.flatten(), batch.weights_BT.flatten(), denom=denom,
                kl_weight=0.0, **self.head.linear_kl_ce_arguments("s"),
            )[0]  # fmt: skip
