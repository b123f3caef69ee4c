"""Network, filters and losses as one module. So the losses run inside the forward of the engine that shards the weights.

Stage I (`learns_filters`) runs frozen bodies and trains the filters of both sides on the next token. Stage II trains the
network and its filters. A micro-batch goes in, and `Losses` come out.
"""

from typing import NamedTuple

import torch
from torch import nn

from ted_scale.config.run import Run
from ted_scale.distill import entropies
from ted_scale.distill.filters import OutputHead
from ted_scale.distill.normalization import labelled
from ted_scale.distill.sampling import drawn_pairs, drawn_rows, times_of
from ted_scale.distill.signal import Losses, Signal, Weights, by_row
from ted_scale.kernels import filtered_ce, filtered_mse, linear_kl_ce
from ted_scale.kernels.formulas.logits import soften
from ted_scale.kernels.tokens import valid_weights
from ted_scale.models.anatomy import Anatomy, Head, StateRecorder, head_of, run_body
from ted_scale.models.zero import gathered, start_gather
from ted_scale.vitals.vitals import Vitals


class Heads(NamedTuple):
    """A tuple of plain values, so that the teacher's head does not become part of the student's module tree."""

    own: Head
    teacher: Head | None
    for_student: Head | None  # reads the student's filtered states in stage I


class Student(nn.Module):
    def __init__(self, run: Run, network, anatomy: Anatomy, pairs, *, learns_filters, filters_s, filters_t, head_t):
        super().__init__()
        self.run, self.anatomy, self.learns_filters = run, anatomy, learns_filters
        self.backend = {"backend": run.loss.backend, "chunk_tokens": run.loss.chunk_tokens}
        self.network = network
        # Looked up here, once. If a module's forward looked it up, DeepSpeed would gather the sharded weight for that module.
        own = head_of(network, anatomy)
        self.heads = Heads(own, head_t, own if run.filters.head == "own" else head_t)
        self.head = OutputHead(own.weight, own.bias)
        self.blocks = [s for s, _ in pairs]
        self.recorder = StateRecorder(network, anatomy, self.blocks)
        self.filters_s, self.filters_t = filters_s, filters_t
        self.vitals = Vitals(run, len(pairs), learns_filters=learns_filters)

    def forward(
        self, batch, signal: Signal | None, weights: Weights | None, denom, denom_t=None, at=None
    ) -> Losses | torch.Tensor:
        """The losses. Without weights: the logits, or the logits `at` one position. `denom_t` is the denominator of the teacher's
        terms, if it differs."""
        if weights is None:
            return self.logits(batch, at)
        if self.learns_filters:
            return self.filter_losses(batch, signal, weights, denom)
        return self.student_losses(batch, signal, weights, denom, denom_t)

    def logits(self, batch, at: int | None) -> torch.Tensor:
        """The logits as the model's family computes them, [B, T, V]. With `at`, those of one position, [B, V]."""
        last_ND, _ = self.run_network(batch, wants_layers=False)
        last, own = by_row(last_ND, batch, at), self.heads.own

        def raw(states, weight):
            return torch.nn.functional.linear(states, weight, own.bias)

        return soften(self.head(last, raw), own.softcap, own.logit_scale)

    def student_losses(self, batch, signal, weights, denom, denom_t) -> Losses:
        self.vitals.open(batch, weights)
        last_ND, states = self.run_network(batch, weights.layer != 0)
        total, kl, ce, *of_teacher = self.logit_losses(batch, last_ND, signal, weights, denom, denom_t)
        mask = None
        if states or of_teacher:
            mask = valid_weights(batch.labels_BT, batch.weights_BT if denom_t is None else labelled(batch)).flatten()
        of_layers = denom if denom_t is None else denom_t
        layers = [self.layer_loss(k, states[k], signal, mask, of_layers) for k in range(len(states))]
        layers = torch.stack(layers) if layers else total.new_zeros(len(self.blocks))
        layer = layers.mean() if len(layers) else total.new_zeros(())
        if weights.layer:
            total = total + weights.layer * layer
        tally = entropies.nothing(kl) if self.run.loss.skip_low_entropy else None
        if of_teacher:
            tally = entropies.tally(of_teacher[0], mask, weights.floor)
        return Losses(total, ce.detach(), kl.detach(), layer.detach(), layers.detach(), tally)

    def run_network(self, batch, wants_layers: bool):
        """(the head's input, the states of the matched blocks), one row for each token. A frozen body makes no graph."""
        grad = torch.is_grad_enabled() and not self.learns_filters
        with torch.set_grad_enabled(grad), self.recorder.record(wants_layers) as states:
            last = run_body(self.network, self.anatomy, batch.tokens_BT, batch.packing, batch.share)
            of_pairs = [states[block] for block in self.blocks] if wants_layers else []
        flat = [state.flatten(0, 1) for state in of_pairs]
        self.vitals.watch(of_pairs, flat)
        return last.flatten(0, 1), flat

    def logit_losses(self, batch, last_ND, signal, weights, denom, denom_t):
        terms, head_t = self.run.loss, self.heads.teacher if weights.kl else None
        settings = self.heads.own.linear_kl_ce_arguments("s")
        settings |= head_t.linear_kl_ce_arguments("t") if head_t else {}
        settings |= {"skip_below": weights.floor} if head_t and terms.skip_low_entropy else {}

        def loss(h_s, w_s, ce=weights.ce, counted_BT=batch.weights_BT, denom=denom):
            if head_t:
                self.vitals.output(h_s, w_s, signal.last_NE, head_t.weight, settings, weights)
            return linear_kl_ce(
                h_s, w_s, signal.last_NE if head_t else None, head_t and head_t.weight,
                batch.labels_BT.flatten(), counted_BT.flatten(), denom=denom,
                temperature=terms.temperature, kl_weight=weights.kl, ce_weight=ce, divergence=terms.divergence,
                top_k=terms.top_k, mode=terms.mode, gather=gathered, **settings, **self.backend,
            )  # fmt: skip

        def text_and_teacher(h_s, w_s):
            """CE and KL in two calls: one call of the kernel counts the same tokens for both terms, but here they differ."""
            own = self.heads.own.linear_kl_ce_arguments("s") | self.backend
            labels, counted = batch.labels_BT.flatten(), batch.weights_BT.flatten()
            text, _, ce = linear_kl_ce(
                h_s, w_s, None, None, labels, counted, denom=denom, kl_weight=0.0, ce_weight=weights.ce, mode=terms.mode,
                gather=gathered, **own,
            )  # fmt: skip
            total, kl, _, *of_teacher = loss(h_s, w_s, 0.0, labelled(batch), denom_t)
            return text + total, kl, ce, *of_teacher

        with gathered(head_t.projection if head_t else []):
            return self.head(last_ND, text_and_teacher if head_t and denom_t is not None else loss)

    def layer_loss(self, k: int, states_ND, signal, mask, denom):
        # The kernel needs both filters' weights, and ZeRO-3 gathers a filter's weights only while its forward runs. So the
        # student's filter runs inside the teacher's forward, and the kernel inside both. The result goes into `losses`. If it
        # were returned, the hooks of the frozen filter would detach it from its graph.
        settings, losses = {"denom": denom, "kind": self.run.loss.kind, **self.backend}, []

        def in_teacher_filter(h_t, w_t, b_t, *_):
            def in_both_filters(h_s, w_s, b_s, *_):
                self.vitals.pair(k, states_ND, (h_s, w_s, b_s), (h_t, w_t, b_t))
                return filtered_mse(h_t, w_t, b_t, h_s, w_s, b_s, mask, **settings)

            losses.append(self.filters_s[k](states_ND, in_both_filters))

        if self.filters_t is None:  # the teacher's states as they are (lwd), or filtered when they appeared
            in_teacher_filter(signal.layers_NE[k], None, None)
        else:
            self.filters_t[k](signal.layers_NE[k], in_teacher_filter)
        return losses[0]

    def filter_losses(self, batch, signal, weights, denom) -> Losses:
        """The mean over pairs of the next-token loss of the teacher's filters, plus that of the student's."""
        settings, heads = self.run.filters, self.heads
        shares_heads = settings.head != "per_layer"
        if shares_heads:
            start_gather(heads.teacher.parameters)  # the network gathers an own head's parameters before
        _, states = self.run_network(batch, True)
        pairs, every = drawn_pairs(settings, len(self.blocks), weights.sample_seed), range(len(self.blocks))
        (count, length), device = batch.tokens_BT.shape, batch.tokens_BT.device
        rows = [drawn_rows(settings, pairs, k, weights.sample_seed, count, length, device, batch.share) for k in every]
        with gathered([*heads.teacher.parameters, *heads.for_student.parameters] if shares_heads else []):
            of_pairs = [self.pair_losses(k, signal.layers_NE[k], states[k], rows[k], batch, denom) for k in every]
        layers = torch.stack([value for side in zip(*of_pairs, strict=True) for value in side])
        total = layers.sum() / len(pairs)
        zero = torch.zeros_like(total.detach())
        return Losses(total, zero, zero, zero, layers.detach())

    def pair_losses(self, k: int, states_t, states_s, rows, batch, denom):
        """(the teacher's value, the student's value). The filters of a pair that is not drawn run, too, on no tokens: every rank
        gathers them, and their gradient is 0."""
        labels, mask = batch.labels_BT.flatten(), batch.weights_BT.flatten()
        times = times_of(self.run.filters, batch.tokens_BT.shape[1], batch.share)
        settings = {"labels": labels, "token_weight": mask, "denom": denom, "rows": rows, **self.backend}
        settings["times"] = times

        # Both sides use the lift, which the teacher's filter owns. ZeRO-3 gathers it only while that filter's forward runs. So
        # the student's filter runs inside that forward.
        def in_teacher_filter(h, w, b, own_head, lift):
            def in_both_filters(h, w, b, own_head, _):
                head = own_head or self.heads.for_student
                return filtered_ce(h, w, b, lift_w=lift, **head.filtered_ce_arguments, **settings)

            head = own_head or self.heads.teacher
            value = filtered_ce(h, w, b, lift_w=lift, **head.filtered_ce_arguments, **settings)
            return value, self.filters_s[k](states_s, in_both_filters)

        return self.filters_t[k](states_t, in_teacher_filter)
