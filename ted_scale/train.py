"""The whole run, top to bottom. What happens once lives in run.py; what happens every step is all here, in order."""

from ted_scale.base.errors import Preempted
from ted_scale.distill.normalization import count_valid, for_engine
from ted_scale.distill.stages import set_rates
from ted_scale.ranks import pulse, signals


def train(stage, student, teacher, data, guard, metrics, progress, verify, validate, save):
    """Take `student` (a DeepSpeed engine) through the steps of `stage` that `data` holds."""
    for micro_batches in metrics.timed(data, "data_wait_ms"):
        pulse.step(progress.step + 1)
        weights = stage.weights(progress.step)
        denom = count_valid(micro_batches)
        set_rates(student, stage.rate(progress.step), weights)

        for batch in micro_batches:
            with metrics.clock.time("teacher_ms"):
                signal = teacher(batch, weights)
            losses = student(batch, signal, weights, denom)
            del signal  # gigabytes, which backward does not need
            student.backward(for_engine(losses.total), scale_wrt_gas=False)
            guard.add(losses)
            if batch is micro_batches[-1]:
                guard.arm(progress)
            student.step()  # updates at the last micro-batch only, and only if the guard finds every number finite

        # Where a number went wrong, the run ends here or goes back to a checkpoint, unless it may go on.
        progress = guard.settle(progress.advanced(stage.samples_per_step, stage.run.data.seq_len))
        metrics.add(progress, guard.read(weights), last=progress.step == stage.last_step)
        stopping = guard.stopping
        if stage.verifies(progress.step):
            verify(student, progress)
        if stage.validates(progress.step) and not stopping:
            progress, stopping = validate(student, progress)
        if stage.saves(progress.step) or stopping:
            save(student, progress)
            stopping = signals.anywhere(student.device)  # also a signal that came while it was saved
        if stopping:
            raise Preempted
    return progress
