"""What a stage reads: a stream that starts at the run's position. At every border, the weights of an adaptive blend are
measured.

stream.py reads windows, blend.py counts them, ddk.py has the rule. A stage reads its data in stretches from one border to the
next. The weights are constant within a stretch, so nothing is read ahead of a measurement. Note: a checkpoint that is written
at the step of a measurement does not contain it; a resume measures again, with the same weights of the student.
"""

import math
from dataclasses import replace
from typing import NamedTuple

from ted_scale.base.errors import NOT_FINITE, RunStopped, UserError
from ted_scale.checkpoints.progress import Measured, Progress
from ted_scale.data import blend, ddk, order
from ted_scale.data.stream import Stream, open_stream, refuse_repetition
from ted_scale.validate import Loss, measure_both, perplexity, tokens_of_each, untaught_of

# Up to here, repeated text is worth nearly as much as new text; later it is worth nothing (Muennighoff et al., NeurIPS 2023).
MANY_EPOCHS = 4


class Reading(NamedTuple):
    """A corpus: its tokens to train on, its tokens held out, and how often each unfinished stage reads the tokens to train
    on. Also a digest of its text, the place of its files if they are reached through links, and what its rows are packed
    from."""

    tokens: int
    held_out: int
    epochs: dict[str, float]
    digest: str
    place: str
    packed: str = ""


def open_feed(run, stage, progress: Progress, vocabulary: int) -> tuple[Stream, Progress, list[str]]:
    """(stream, progress with its blend, sentences about changes of the corpora). A stage starts at sample 0; a resume goes on at
    the sample of `progress`. A corpus may change at a resume, and between two stages."""
    before, earlier = None, None
    if progress.step == stage.first_step:
        earlier = blend.from_record(progress.blend) if progress.blend else None
        progress = replace(progress, samples=0)
    elif progress.blend is None:
        raise UserError(
            f"a checkpoint of step {progress.step} must hold the position of its data, but does not; use another one"
        )
    else:
        before = blend.from_record(progress.blend)
    if not stage.adapts or before is None:
        progress = replace(progress, adaptive=None)
    weights = progress.adaptive["weights"] if progress.adaptive else {}
    stream = open_stream(run.data, run.seed, vocabulary, before, progress.samples, weights)
    changed = blend.changes(before, stream.interval) if before else blend.other_texts(earlier, stream.interval)
    return stream, replace(progress, blend=blend.as_record(stream.interval)), changed


def last_sample(stage, progress: Progress) -> int:
    """The position of the next border: the blend does not change before it."""
    return progress.samples + (stage.border(progress.step) - progress.step) * stage.samples_per_step


def refuse_short_corpora(run, stage, stream: Stream, progress: Progress) -> None:
    refuse_repetition(run.data, stream, last_sample(stage, progress))


def epochs_of(stage, stream: Stream, progress: Progress) -> dict[str, float]:
    """How often each corpus will have been read when the stage is done. An adaptive blend is taken as it is now."""
    end = progress.samples + (stage.last_step - progress.step) * stage.samples_per_step
    cursors = zip(stream.interval.domains, stream.interval.cursors_at(end), strict=True)
    packed = {name: packs.counts.packs * packs.seq_len for name, packs in stream.packs.items()}
    sizes = {domain.name: packed.get(domain.name, domain.tokens) for domain in stream.interval.domains}
    return {domain.name: cursor.seen / sizes[domain.name] for domain, cursor in cursors if domain.name in stream.parts}


def describe(readings: dict[str, Reading]) -> list[str]:
    """A line for each corpus, and a warning for each corpus that a stage reads too often."""
    lines = [
        f"corpus {name}: {reading.tokens:,} tokens to train on, {reading.held_out:,} held out, digest {reading.digest}"
        + (f", in {reading.place}" if reading.place else "")
        + (f"; {reading.packed}" if reading.packed else "")
        for name, reading in readings.items()
    ]
    return lines + [
        f"many epochs: stage {stage} reads the {reading.tokens:,} tokens of corpus {name} {epochs:,.3g} times, and what is "
        f"read more than {MANY_EPOCHS} times teaches less and less; give more text, fewer steps or a smaller weight"
        for name, reading in readings.items()
        for stage, epochs in reading.epochs.items()
        if epochs > MANY_EPOCHS
    ]


def describe_epochs(readings: dict[str, Reading], stage) -> str:
    """The epochs over the only corpus, or over those that the stage reads most."""
    read = {name: of.epochs[stage.name] for name, of in readings.items() if stage.name in of.epochs}
    most = [f"{name} {read[name]:.3g}" for name in sorted(read, key=read.get, reverse=True)]
    if len(read) < 2:
        return f"{next(iter(read.values())):.3g} epochs" if read else "done"
    return f"epochs of {', '.join(most[:6])}" + (", …" if len(most) > 6 else "")


def due(stage, stream: Stream, progress: Progress) -> bool:
    """Whether the weights must be measured: at every border, and when corpora were added or removed."""
    if not stage.adapts:
        return False
    known = progress.adaptive
    at_border = (progress.step - stage.first_step) % stage.run.data.blend.every == 0
    return known is None or set(known["weights"]) != set(stream.parts) or (at_border and known["step"] != progress.step)


def weigh(plan, teacher, metrics, student, stream: Stream, progress: Progress):
    """Measure DDK's weights, which hold from here on. They follow from the losses of student and teacher on the held-out text
    of each corpus. Returns (stream, progress, whether a signal asks to stop). If a signal asks to stop, nothing changes."""
    with metrics.aside():
        held_out = {name: held for name, held in stream.held_out.items() if name in stream.parts}
        known = known_of_teacher(plan, progress, held_out)
        missing = {name: held for name, held in held_out.items() if name not in known}
        losses = measure_both(plan, student, held_out, teacher, missing)
    if losses is None:
        return stream, progress, True
    refuse_untaught(plan.run, losses[0])
    of_student, of_teacher = ({name: loss.mean for name, loss in side.items()} for side in losses)
    of_teacher = known | of_teacher
    refuse_no_number(progress.step, {"student": of_student, "teacher": of_teacher})
    weights, gaps = set_weights(plan.run.data, progress.adaptive, of_student, of_teacher)
    metrics.write(progress.step, progress.tokens, as_row(weights, gaps, of_student, of_teacher))
    adaptive = Measured(step=progress.step, weights=weights, teacher=of_teacher, text=text_of(plan, held_out))
    stream = with_weights(stream, weights, progress.samples)
    return stream, replace(progress, adaptive=adaptive, blend=blend.as_record(stream.interval)), False


def as_row(weights: dict, gaps: dict, of_student: dict, of_teacher: dict) -> dict[str, float]:
    row = {f"blend/{name}/weight": weight for name, weight in weights.items()}
    row |= {f"blend/{name}/discrepancy": gap for name, gap in gaps.items()}
    row |= {f"blend/{name}/ppl": perplexity(loss) for name, loss in of_student.items()}
    return row | {f"blend/{name}/teacher_ppl": perplexity(of_teacher[name]) for name in of_student}


def refuse_untaught(run, losses: dict[str, Loss]) -> None:
    """Refuse a corpus without a loss: it would get no weight, and the run would not train on it."""
    if untaught := untaught_of(losses):
        raise UserError(
            f"corpus {untaught[0]} must hold out text with a target for data.blend.kind = 'adaptive', but the first "
            f"{tokens_of_each(run):,} tokens have none; raise validation.tokens, or set data.packing = 'examples'"
        )


def refuse_no_number(step: int, losses: dict[str, dict[str, float]]) -> None:
    for side, of_corpora in losses.items():
        for name, loss in of_corpora.items():
            if not math.isfinite(loss):
                raise RunStopped(
                    f"step {step}: the {side}'s loss on what corpus {name} holds out must be finite, but is {loss}; the last "
                    "checkpoint is intact",
                    NOT_FINITE,
                )


def known_of_teacher(plan, progress: Progress, held_out: dict[str, Stream]) -> dict[str, float]:
    """The teacher's losses that are known for exactly this text. The teacher does not change, so they are still true."""
    if not progress.adaptive:
        return {}
    before, text = progress.adaptive, text_of(plan, held_out)
    return {n: loss for n, loss in before["teacher"].items() if n in text and before["text"].get(n) == text[n]}


def text_of(plan, held_out: dict[str, Stream]) -> dict[str, str]:
    """For each corpus, the teacher and the text that its loss belongs to."""
    tokens, attention = tokens_of_each(plan.run), plan.run.data.attention
    read = f"{plan.run.teacher.path} on {tokens} in windows of {plan.run.data.seq_len} by {attention} attention"
    return {n: f"{read} of {s.parts[n].tokens} tokens, {s.parts[n].content}" for n, s in held_out.items()}


def set_weights(data, before: Measured | None, student: dict[str, float], teacher: dict[str, float]):
    """(weights, discrepancies) by corpus. A corpus that is new in the blend starts with an equal share."""
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
