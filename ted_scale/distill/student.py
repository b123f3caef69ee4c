"""Network, filters and losses as one module: what ZeRO-3 shards is whole only inside the forward of the engine it is
in.

Stage I (`learns_filters`) runs frozen bodies and trains the filters of both sides on the next token; stage II trains
the network and its filters. One micro-batch in, one `Losses` out.
"""

import torch
from torch import nn

from ted_scale.config.run import Run
from ted_scale.distill.filters import OutputHead
from ted_scale.distill.sampling import drawn_pairs, drawn_rows
from ted_scale.distill.signal import Losses, Signal, Weights
from ted_scale.kernels import filtered_ce, filtered_mse, linear_kl_ce
from ted_scale.kernels.tokens import valid_weights
from ted_scale.models.anatomy import Anatomy, Taps, head_of, run_body
from ted_scale.models.zero import ask, gathered


class Student(nn.Module):
    def __init__(self, run: Run, network, anatomy: Anatomy, pairs, *, learns_filters, filters_s, filters_t, head_t):
        super().__init__()
        self.run, self.anatomy, self.learns_filters = run, anatomy, learns_filters
        self.code = {"backend": run.loss.backend, "chunk_tokens": run.loss.chunk_tokens}
        self.network = network
        own = head_of(network, anatomy)
        self.head = OutputHead(own.weight, own.bias)
        self.taps = Taps(network, anatomy, [s for s, _ in pairs])
        self.blocks = [s for s, _ in pairs]
        self.filters_s, self.filters_t = filters_s, filters_t
        # A tuple keeps the teacher's head out of the module tree. The own head's weights are looked up here, once: DeepSpeed
        # takes a look at a sharded weight inside a forward for its use by that module.
        self.heads = (head_t, own if run.filters.head == "own" else head_t)

    def forward(self, batch, signal: Signal | None, weights: Weights, denom) -> Losses:
        losses = self.filter_losses if self.learns_filters else self.student_losses
        return losses(batch, signal, weights, denom)

    def student_losses(self, batch, signal, weights, denom) -> Losses:
        last_ND, states = self.run_network(batch, weights.layer != 0)
        total, kl, ce = self.logit_losses(batch, last_ND, signal, weights, denom)
        layers = [self.layer_loss(k, states[k], signal, batch, denom) for k in range(len(states))]
        layers = torch.stack(layers) if layers else total.new_zeros(len(self.blocks))
        layer = layers.mean() if len(layers) else total.new_zeros(())
        if weights.layer:
            total = total + weights.layer * layer
        return Losses(total, ce.detach(), kl.detach(), layer.detach(), layers.detach())

    def run_network(self, batch, wants_layers: bool):
        """The head's input and the matched blocks' states, flattened to tokens; no graph where the body is frozen."""
        grad = torch.is_grad_enabled() and not self.learns_filters
        with torch.set_grad_enabled(grad), self.taps.record(wants_layers) as states:
            last = run_body(self.network, self.anatomy, batch.tokens_BT, batch.packing)
        return last.flatten(0, 1), [states[block].flatten(0, 1) for block in self.blocks] if wants_layers else []

    def logit_losses(self, batch, last_ND, signal, weights, denom):
        head_t = self.heads[0] if weights.kl else None

        def loss(h_s, w_s, b_s):
            return linear_kl_ce(
                h_s, w_s, signal.last_NE if head_t else None, head_t and head_t.weight,
                batch.labels_BT.flatten(), batch.weights_BT.flatten(), denom=denom,
                temperature=self.run.loss.temperature, kl_weight=weights.kl, ce_weight=weights.ce,
                softcap_s=self.anatomy.softcap, softcap_t=head_t and head_t.softcap,
                logit_scale_s=self.anatomy.logit_scale, logit_scale_t=head_t.logit_scale if head_t else 1.0,
                head_bias_s=b_s, head_bias_t=head_t and head_t.bias, mode=self.run.loss.mode, gather=gathered, **self.code,
            )  # fmt: skip

        with gathered(head_t.projection if head_t else []):
            return self.head(last_ND, loss)

    def layer_loss(self, k: int, states_ND, signal, batch, denom):
        """Teacher's filter around student's: the loss leaves both by `made`, for a frozen filter's output has no graph."""
        mask, made, h_t = token_mask(batch), [], signal.layers_NE[k]

        def teacher_side(h_t, w_t, b_t, *_):
            def loss(h_s, w_s, b_s, *_):
                settings = {"denom": denom, "kind": self.run.loss.kind, **self.code}
                return filtered_mse(h_t, w_t, b_t, h_s, w_s, b_s, mask, **settings)

            made.append(self.filters_s[k](states_ND, loss))

        if self.filters_t is None:  # lwd: the teacher's raw states
            teacher_side(h_t, None, None)
        else:
            self.filters_t[k](h_t, teacher_side)
        return made[0]

    def filter_losses(self, batch, signal, weights, denom) -> Losses:
        """Mean over pairs of the teacher's filters' next-token loss, plus the same of the student's."""
        if self.run.filters.head != "per_layer":
            ask(self.heads[0].parameters)  # the own head's are this network's: it gathers them first
        _, states = self.run_network(batch, True)
        head_t, head_s = self.heads
        settings, (rows, length) = self.run.filters, batch.tokens_BT.shape
        pairs = drawn_pairs(settings, len(self.blocks), weights.draw)
        device = batch.tokens_BT.device
        drawn = [drawn_rows(settings, pairs, k, weights.draw, rows, length, device) for k in range(len(self.blocks))]
        heads = [] if settings.head == "per_layer" else [*head_t.parameters, *head_s.parameters]
        with gathered(heads):
            of_pairs = [
                self.pair_losses(k, signal.layers_NE[k], states[k], drawn[k], batch, denom)
                for k in range(len(self.blocks))
            ]
        layers = torch.stack([value for side in zip(*of_pairs, strict=True) for value in side])
        total = layers.sum() / len(pairs)
        zero = torch.zeros_like(total.detach())
        return Losses(total, zero, zero, zero, layers.detach())

    def pair_losses(self, k: int, states_t, states_s, rows, batch, denom):
        """(teacher's, student's) value, the latter inside the forward of the filter that owns the lift of both; a pair that
        is not drawn reads no token: its filters are gathered like the others, on all ranks, and have a gradient of 0."""
        head_t, head_s = self.heads
        labels, mask = batch.labels_BT.flatten(), batch.weights_BT.flatten()
        settings = {"labels": labels, "token_weight": mask, "denom": denom, "rows": rows, **self.code}

        def of_teacher(h, w, b, own_head, lift):
            def of_student(h, w, b, own_head, _):
                return filtered_ce(h, w, b, lift_w=lift, **(own_head or head_s).reading, **settings)

            value = filtered_ce(h, w, b, lift_w=lift, **(own_head or head_t).reading, **settings)
            return value, self.filters_s[k](states_s, of_student)

        return self.filters_t[k](states_t, of_teacher)


def token_mask(batch):
    return valid_weights(batch.labels_BT, batch.weights_BT).flatten()
