"""What filters read off each matched block, beside the logit lens: python tools/bench/lens.py CORPUS TEACHER STUDENT

Held-out next-token loss of each pair, teacher and student: of the filtered states before and after stage I, and of the raw
states through the model's own last norm and head, which is the logit lens. One stage I for each of --steps, all on the same
batches; fp32, without DeepSpeed. Note: where filters are as wide as both models they begin as the identity, so their loss before
stage I is the lens itself.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a script's own folder is on the path, its parent is not

import torch

from ted_scale.base.exits import run_main
from ted_scale.distill.normalization import count_valid
from ted_scale.distill.teacher import Teacher, TeacherBody
from ted_scale.filter_start import READ
from ted_scale.kernels import linear_kl_ce
from tools.bench.filters import (
    add_run,
    arm_of,
    batches,
    filtered_ces,
    models,
    moments_of,
    plan_of,
    run_steps,
    say,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_run(parser)
    parser.add_argument("--steps", type=int, nargs="+", default=[24], help="lengths of stage I")
    parser.set_defaults(tokens=1024, held_out=8192)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    teacher, make = models(arguments)
    network, plan = make(), plan_of(arguments, steps=2, learns=1)
    body = TeacherBody(network, plan.student, [s for s, _ in plan.pairs])
    say(pairs=plan.pairs, width=plan.width, sample_tokens=plan.run.filters.sample_tokens,
        lens=[lens(plan, side, arguments.held_out) for side in (teacher, Teacher(body, body))])  # fmt: skip
    moments = moments_of(plan, teacher, network) if plan.run.filters.start == "states" else None
    for steps in arguments.steps:
        learn(arguments, steps, teacher, network, moments, first=steps == arguments.steps[0])


def learn(arguments, steps: int, teacher, network, moments, *, first: bool) -> None:
    plan = plan_of(arguments, steps=2, learns=steps)
    arm = arm_of(plan, plan.stages[0], teacher, network, moments)
    if first:  # all of them begin alike
        say(steps=0, filtered=filtered_ces(arm, teacher, arguments.held_out))
    seconds = run_steps(arm, teacher)
    say(steps=steps, seconds=seconds, filtered=filtered_ces(arm, teacher, arguments.held_out))


@torch.no_grad()
def lens(plan, model: Teacher, tokens: int) -> list[float]:
    """Of each block that the model is read at; the batches and their mean are those of filtered_ces."""
    each = []
    for micro in batches(plan, held_out=True):
        each.append(torch.stack([lens_loss(model.head, states, micro) for states in model(micro, READ).layers_NE]))
        if len(each) * micro.tokens_BT.numel() >= tokens:
            break
    return torch.stack(each).mean(0).tolist()


def lens_loss(head, states_NE, micro) -> torch.Tensor:
    return linear_kl_ce(
        head.norm(states_NE), head.weight, None, None, micro.labels_BT.flatten(), micro.weights_BT.flatten(),
        denom=count_valid([micro]), kl_weight=0.0, **head.linear_kl_ce_arguments("s"),
    )[0]  # fmt: skip


if __name__ == "__main__":
    run_main(main)
