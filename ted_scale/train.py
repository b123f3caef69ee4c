"""The training loop. This file has everything that happens in every step, in order. run.py has the rest."""

from ted_scale import balance
from ted_scale.base.errors import Preempted
from ted_scale.distill.normalization import count_for_teacher, count_valid, for_engine
from ted_scale.distill.reading import Reading
from ted_scale.distill.stages import set_rates
from ted_scale.models.reduction import reducing
from ted_scale.ranks import pulse, signals
from ted_scale.ranks.agree import anywhere


def train(stage, student, teacher, data, guard, metrics, progress, verify, validate, write_samples, save):
    """Take `student` (a DeepSpeed engine) through the steps of `stage` that `data` holds."""
    vitals = student.module.vitals
    for micro_batches in metrics.timed(data, "data_wait_ms"):
        pulse.step(progress.step + 1)
        vitals.begin(progress.step)
        scale, floor = balance.scale_of(progress, stage), progress.entropy_floor
        weights_each = stage.of_micro_batches(progress.step, len(micro_batches), scale, floor)
        set_rates(student, stage.rate(progress.step), weights_each)
        denom, denom_t = count_valid(micro_batches), count_for_teacher(stage.run.loss, micro_batches)

        reading = Reading(teacher, micro_batches, weights_each)
        with reducing(student, once=stage.run.train.reduce_once):
            for batch, weights in zip(micro_batches, weights_each, strict=True):
                with metrics.clock.time("teacher_ms"):
                    signal = reading.signal(weights)
                losses = student(batch, signal, weights, denom, denom_t)
                del signal  # gigabytes that backward does not need
                with metrics.clock.time("teacher_ms"):
                    reading.ahead()
                student.set_gradient_accumulation_boundary(batch is micro_batches[-1])
                student.backward(for_engine(losses.total), scale_wrt_gas=False)
                guard.add(losses)
        guard.gather(progress, weights_each)
        vitals.send()
        student.step()  # updates only if the guard finds every number finite

        # If a number is bad, the run stops here or goes back to a checkpoint, unless it may skip the step.
        progress = guard.decide()
        numbers = guard.read()
        progress = balance.followed(progress, stage, numbers)
        numbers |= vitals.read(progress.step, guard.finite, metrics.alert)
        metrics.add(progress, numbers, last=progress.step == stage.last_step)
        stopping = guard.stopping
        if stage.verifies(progress.step):
            verify(student, progress)
        if stage.validates(progress.step) and not stopping:
            progress, stopping = validate(student, progress)
        if stage.writes_samples(progress.step) and not stopping:
            stopping = write_samples(student, progress)
        if stage.saves(progress.step) or stopping:
            save(student, progress)
            stopping = stopping or anywhere(signals.asked.is_set(), student.device)  # a signal may come during a save
        if stopping:
            raise Preempted
    return progress
