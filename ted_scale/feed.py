"""What a stage reads: its stream opened where the run stands, and its blend measured and set anew where it adapts.

stream.py reads windows, blend.py counts them, ddk.py is the rule. A stage's data comes in stretches with one set of
shares, from one border to the next, so that nothing is read ahead of a measurement. The surprise: a measurement is not
in the checkpoint that was written at its step; a resume takes it again, from the same weights.
"""

import math
from dataclasses import replace
from typing import NamedTuple

from ted_scale.base.errors import RunStopped, UserError
from ted_scale.checkpoints.progress import Measured, Progress
from ted_scale.data import blend, ddk, order
from ted_scale.data.stream import Stream, open_held_out, open_stream, refuse_repetition
from ted_scale.validate import perplexity, student_losses, teacher_losses, tokens_of_each

# Up to here repeated text is worth nearly what new text is, and in the end nothing (Muennighoff et al., NeurIPS 2023).
MANY_EPOCHS = 4


class Reading(NamedTuple):
    """Of a corpus: tokens to train on, tokens held out, and how often each stage that is not done reads the former."""

    tokens: int
    held_out: int
    epochs: dict[str, float]


def open_feed(run, stage, progress: Progress, vocabulary: int) -> tuple[Stream, Progress, list[str]]:
    """(stream, progress with its blend in it, what to say of changes): from sample 0, or on from where the run stood. Also
    between stages a corpus may become another."""
    before, earlier = None, None
    if progress.step == stage.first_step:
        earlier = blend.from_record(progress.blend) if progress.blend else None
        progress = replace(progress, samples=0)
    elif progress.blend is None:
        raise UserError(
            f"a checkpoint of step {progress.step} must say where its data stand, but does not; take another one"
        )
    else:
        before = blend.from_record(progress.blend)
    if not stage.adapts or before is None:
        progress = replace(progress, adaptive=None)
    weights = progress.adaptive["weights"] if progress.adaptive else {}
    stream = open_stream(run.data, run.seed, vocabulary, before, progress.samples, weights)
    said = blend.changes(before, stream.interval) if before else blend.other_texts(earlier, stream.interval)
    return stream, replace(progress, blend=blend.as_record(stream.interval)), said


def last_sample(stage, progress: Progress) -> int:
    """The position up to which the blend is settled."""
    return progress.samples + (stage.border(progress.step) - progress.step) * stage.samples_per_step


def refuse_short_corpora(run, stage, stream: Stream, progress: Progress) -> None:
    refuse_repetition(run.data, stream, last_sample(stage, progress))


def epochs_of(stage, stream: Stream, progress: Progress) -> dict[str, float]:
    """How often each corpus was read when the stage is done; of an adaptive blend, at the shares that it has now."""
    end = progress.samples + (stage.last_step - progress.step) * stage.samples_per_step
    cursors = zip(stream.interval.domains, stream.interval.cursors_at(end), strict=True)
    return {domain.name: cursor.seen / domain.tokens for domain, cursor in cursors if domain.name in stream.parts}


def describe(readings: dict[str, Reading]) -> list[str]:
    """A line a corpus, and one for each that a stage reads too often."""
    lines = [
        f"corpus {name}: {reading.tokens:,} tokens to train on, {reading.held_out:,} held out"
        for name, reading in readings.items()
    ]
    return lines + [
        f"many epochs: stage {stage} reads the {reading.tokens:,} tokens of corpus {name} {epochs:,.3g} times, and what is "
        f"read more than {MANY_EPOCHS} times teaches less and less; give more text, fewer steps or a smaller weight"
        for name, reading in readings.items()
        for stage, epochs in reading.epochs.items()
        if epochs > MANY_EPOCHS
    ]


def epochs_said(readings: dict[str, Reading], stage) -> str:
    """Of the one corpus, or of those of several that the stage reads most."""
    read = {name: of.epochs[stage.name] for name, of in readings.items() if stage.name in of.epochs}
    most = [f"{name} {read[name]:.3g}" for name in sorted(read, key=read.get, reverse=True)]
    if len(read) < 2:
        return f"{next(iter(read.values())):.3g} epochs" if read else "done"
    return f"epochs of {', '.join(most[:6])}" + (", …" if len(most) > 6 else "")


def due(stage, stream: Stream, progress: Progress) -> bool:
    """At every border, and where corpora came or went."""
    if not stage.adapts:
        return False
    known = progress.adaptive
    at_border = (progress.step - stage.first_step) % stage.run.data.blend.every == 0
    return known is None or set(known["weights"]) != set(stream.parts) or (at_border and known["step"] != progress.step)


def weigh(plan, teacher, numbers, vocabulary: int, device, engine, stream: Stream, progress: Progress):
    """(stream, progress) from here on: DDK's weights by what student and teacher make of each corpus's held-out text."""
    with numbers.aside():
        held_out = {n: s for n, s in open_held_out(plan.run.data, vocabulary).items() if n in stream.parts}
        student = {name: loss.mean for name, loss in student_losses(plan, held_out, engine, device).items()}
        known = known_of_teacher(plan, progress, held_out)
        missing = {name: s for name, s in held_out.items() if name not in known}
        known |= {name: loss.mean for name, loss in teacher_losses(plan, missing, teacher, device).items()}
    refuse_no_number(progress.step, {"student": student, "teacher": known})
    weights, gaps = set_weights(plan.run.data, progress.adaptive, student, known)
    adaptive = Measured(step=progress.step, weights=weights, teacher=known, text=text_of(plan, held_out))
    row = {f"blend/{name}/weight": weight for name, weight in weights.items()}
    row |= {f"blend/{name}/discrepancy": gap for name, gap in gaps.items()}
    row |= {f"blend/{name}/ppl": perplexity(loss) for name, loss in student.items()}
    row |= {f"blend/{name}/teacher_ppl": perplexity(known[name]) for name in student}
    numbers.write(progress.step, progress.tokens, row)
    stream = with_weights(stream, weights, progress.samples)
    return stream, replace(progress, adaptive=adaptive, blend=blend.as_record(stream.interval))


def refuse_no_number(step: int, losses: dict[str, dict[str, float]]) -> None:
    for side, of_corpora in losses.items():
        for name, loss in of_corpora.items():
            if not math.isfinite(loss):
                raise RunStopped(
                    f"step {step}: the {side}'s loss on what corpus {name} holds out must be finite, but is {loss}; the last "
                    "checkpoint is intact"
                )


def known_of_teacher(plan, progress: Progress, held_out: dict[str, Stream]) -> dict[str, float]:
    """The teacher's losses that were measured of this very text: it stands still."""
    if not progress.adaptive:
        return {}
    before, text = progress.adaptive, text_of(plan, held_out)
    return {n: loss for n, loss in before["teacher"].items() if n in text and before["text"].get(n) == text[n]}


def text_of(plan, held_out: dict[str, Stream]) -> dict[str, str]:
    """By whom and of what a corpus's losses were measured."""
    tokens, attention = tokens_of_each(plan.run), plan.run.data.attention
    read = f"{plan.run.teacher.path} on {tokens} in windows of {plan.run.data.seq_len} by {attention} attention"
    return {n: f"{read} of {s.parts[n].tokens} tokens, {s.parts[n].content}" for n, s in held_out.items()}


def set_weights(data, before: dict | None, student: dict[str, float], teacher: dict[str, float]):
    """(weights, discrepancies) by corpus; a corpus that is new to the blend enters with an equal share."""
    names = list(student)
    gaps = ddk.discrepancies([student[name] for name in names], [teacher[name] for name in names])
    if before is None:
        prior = {corpus.name: corpus.weight for corpus in data.corpora}
        weights = ddk.first_weights([prior[name] for name in names], gaps, data.blend.smoothing)
    else:
        shares = [before["weights"].get(name, 1 / len(names)) for name in names]
        weights = ddk.next_weights(shares, gaps, data.blend.smoothing)
    return dict(zip(names, weights, strict=True)), dict(zip(names, gaps, strict=True))


def with_weights(stream: Stream, weights: dict[str, float], position: int) -> Stream:
    before = stream.interval
    domains = [domain for domain in before.domains if domain.name in weights]
    shares = order.shares([weights[domain.name] for domain in domains])
    return stream._replace(interval=blend.follow(before, position, domains, shares, stream.seq_len))
