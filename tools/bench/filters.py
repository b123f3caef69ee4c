"""The gain of filters for their price: python tools/bench/filters.py PART CORPUS TEACHER STUDENT

PART learn: stage I on all rows and on sampled rows at the same FLOPs; mean filtered CE of all pairs on held-out text.
PART distil: stage II with filters of other widths and starts beside kd; held-out loss; every arm reads the same batches.
PART price: seconds and FLOPs of a stage I step beside a stage II step, for a random model of Gemma-3-270m's shape and one
of the same size. All in one process without DeepSpeed, fp32; CORPUS is a prefix of tools/tokenize_corpus.py.
"""

import argparse
import json
import statistics
import tempfile
import time
from typing import NamedTuple

import torch
import transformers

from ted_scale.base.exits import run_main
from ted_scale.config.run import Run
from ted_scale.distill.filter_init import TOKENS_A_WIDTH, Moments, add_moments, start_of
from ted_scale.distill.filter_sizes import with_filters
from ted_scale.distill.flops import keys_of, step_flops
from ted_scale.distill.normalization import count_valid
from ted_scale.distill.signal import Weights
from ted_scale.distill.student import Student
from ted_scale.distill.teacher import Teacher, TeacherBody
from ted_scale.engines import build_filters, parameter_groups
from ted_scale.filter_start import READ, begin
from ted_scale.models.weights import build_network
from ted_scale.plan import make_plan

LEARN = {"all rows": {"sample_tokens": 1.0}, "drawn": {}}
DISTIL = {
    "kd": {"method": "kd"},
    "full width, identity": {"filters": {"width": "full", "start": "random"}},
    "full width, regression": {"filters": {"width": "full"}},
    "auto": {},
    "width 64": {"filters": {"width": 64}},
    "auto, random": {"filters": {"start": "random"}},
    "auto, stage I": {"learn": True},
}


class Arm(NamedTuple):
    plan: object
    stage: object
    student: Student
    optimizer: torch.optim.Optimizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=["learn", "distil", "price"])
    add_run(parser)
    parser.add_argument("--arms", help="names of distil's arms, separated by ';'")
    parser.add_argument("--steps", type=int, default=10, help="of the first arm, or of every arm of distil")
    parser.add_argument("--vocabulary", type=int, default=262_144, help="price's")
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    {"learn": learn, "distil": distil, "price": price}[arguments.part](arguments)


def add_run(parser) -> None:
    """What plan_of reads."""
    parser.add_argument("corpus")
    parser.add_argument("teacher", nargs="?")
    parser.add_argument("student", nargs="?")
    parser.add_argument("--pairs", help="student,teacher student,teacher …; default: as cut, else uniform")
    parser.add_argument(
        "--filters", type=json.loads, default={}, help="JSON that overrides the run file's defaults, in every arm"
    )
    parser.add_argument("--tokens", type=int, default=512, help="a step")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--held-out", type=int, default=2048, help="tokens")
    parser.add_argument("--seed", type=int, default=0)


def plan_of(arguments, *, steps: int, method: str = "ted", filters: dict | None = None, learns: int = 0):
    """A plan of `steps` steps of stage II, after `learns` of stage I."""
    pairs = [[int(n) for n in pair.split(",")] for pair in (arguments.pairs or "").split()]
    return make_plan(Run.model_validate({
        "name": "bench", "method": method, "seed": arguments.seed, "runs": "/nonexistent/runs",
        "teacher": {"path": arguments.teacher}, "student": {"path": arguments.student},
        "data": {"seq_len": arguments.length, "corpora": [{"path": arguments.corpus, "validation": 0.002}]},
        "pairs": {"explicit": pairs}, "filters": {"steps": learns, **arguments.filters, **(filters or {})},
        "train": {"steps": steps, "tokens_per_step": arguments.tokens, "micro_batch": arguments.tokens // arguments.length,
                  "precision": "fp32", "lr": 1e-3, "min_lr": 1e-4, "warmup_steps": min(4, steps - 1), "weight_decay": 0.0},
    }), 1)  # fmt: skip


def models(arguments):
    """(teacher, a function that makes a student's network)"""
    plan, settings = plan_of(arguments, steps=2), {"ds_config": None, "dtype": torch.float32}
    body = TeacherBody(build_network(plan.teacher, **settings), plan.teacher, [t for _, t in plan.pairs])
    return Teacher(body, body), lambda: build_network(plan.student, **settings)


def arm_of(plan, stage, teacher, network, moments=None, learnt=None) -> Arm:
    """A stage's student on `network`; its filters start from `moments`, or come from a finished stage I."""
    filters_s, filters_t = build_filters(plan, stage)
    if plan.pairs and plan.run.filters.start == "states" and moments:
        begin(filters_s, filters_t, [start_of(pair, plan.width) for pair in moments])
    for side, state in zip((filters_s, filters_t), learnt or (), strict=False):
        side.load_state_dict(state, strict=False)  # without the lifts
    if filters_t is not None:
        filters_t.requires_grad_(stage.learns_filters)
    student = Student(
        plan.run, network.requires_grad_(not stage.learns_filters), plan.student, plan.pairs,
        learns_filters=stage.learns_filters, filters_s=filters_s, filters_t=filters_t, head_t=teacher.head,
    )  # fmt: skip
    groups, train = parameter_groups(plan.run, student), plan.run.train
    return Arm(
        plan, stage, student, torch.optim.AdamW(groups, lr=train.lr, betas=train.betas, eps=train.eps, fused=True)
    )


def batches(plan, held_out: bool = False):
    """Micro-batches of the training stream, or of the held-out text."""
    from ted_scale.data.stream import batch, open_stream

    vocabulary, data = plan.student.vocab_size, plan.run.data
    stream = open_stream(data, plan.run.seed, vocabulary)
    stream = next(iter(stream.held_out.values())) if held_out else stream
    rows, position = plan.run.train.micro_batch, 0
    while not held_out or position + rows <= stream.count:
        yield batch(stream, list(range(position, position + rows)))
        position += rows


@torch.no_grad()
def moments_of(plan, teacher, network) -> list[Moments]:
    student, sums, seen = TeacherBody(network, plan.student, [s for s, _ in plan.pairs]), None, 0
    for micro in batches(plan):
        sums = add_moments(sums, micro, teacher(micro, READ).layers_NE, student(micro, True).layers_NE)
        seen += micro.tokens_BT.numel()
        if seen >= TOKENS_A_WIDTH * max(plan.student.width, plan.teacher.width):
            return sums


def one_step(arm: Arm, step: int, micro, signal) -> float:
    """The step's loss; the caller measures its time."""
    for group in arm.optimizer.param_groups:
        group["lr"] = group["peak_lr"] * arm.stage.rate(step)
    losses = arm.student(micro, signal, arm.stage.weights(step), count_valid([micro]))
    losses.total.backward()
    torch.nn.utils.clip_grad_norm_([p for p in arm.student.parameters() if p.grad is not None], 1.0)
    arm.optimizer.step()
    arm.optimizer.zero_grad()
    return losses.total.item()


def filtered_ce_of(arm: Arm, teacher, tokens: int) -> tuple[float, float]:
    """Mean over pairs on held-out text, (teacher's filters, student's)."""
    return tuple(statistics.fmean(side) for side in filtered_ces(arm, teacher, tokens))


@torch.no_grad()
def filtered_ces(arm: Arm, teacher, tokens: int) -> list[list[float]]:
    """Of each pair on held-out text, [teacher's filters, student's], on all rows."""
    drawn, arm.student.run = arm.student.run, with_filters(arm.student.run, sample_tokens=1.0, sample_pairs=None)
    total, seen = 0.0, 0
    for micro in batches(arm.plan, held_out=True):
        total += arm.student(micro, teacher(micro, READ), READ, count_valid([micro])).layers
        seen += micro.tokens_BT.numel()
        if seen >= tokens:
            break
    arm.student.run = drawn
    return (total * arm.plan.run.data.seq_len * arm.plan.run.train.micro_batch / seen).view(2, -1).tolist()


@torch.no_grad()
def held_out_loss(arm: Arm, tokens: int) -> float:
    losses = []
    for micro in batches(arm.plan, held_out=True):
        losses.append(arm.student(micro, None, Weights(1.0, 0.0, 0.0), count_valid([micro])).ce.item())
        if len(losses) * micro.tokens_BT.numel() >= tokens:
            break
    return statistics.fmean(losses)


def flops_a_step(plan, stage) -> float:
    return (
        step_flops(plan, stage, stage.first_step, keys_of([plan.run.data.seq_len])).model
        * plan.run.train.tokens_per_step
    )


def learn(arguments) -> None:
    teacher, make = models(arguments)
    network, budget, moments, before = make(), None, None, None
    for name, filters in LEARN.items():
        one = plan_of(arguments, steps=2, filters=filters, learns=arguments.steps)
        each = flops_a_step(one, one.stages[0])
        budget = budget or each * arguments.steps
        plan = plan_of(arguments, steps=2, filters=filters, learns=round(budget / each))
        moments = moments or (moments_of(plan, teacher, network) if plan.run.filters.start == "states" else None)
        arm = arm_of(plan, plan.stages[0], teacher, network, moments)
        before = before or filtered_ce_of(arm, teacher, arguments.held_out)
        seconds = run_steps(arm, teacher)
        say(arm=name, width=plan.width, sample_tokens=plan.run.filters.sample_tokens, steps=plan.stages[0].steps,
            tflops=budget / 1e12, seconds=seconds, before=before,
            after=filtered_ce_of(arm, teacher, arguments.held_out))  # fmt: skip


def run_steps(arm: Arm, teacher) -> float:
    begun = time.perf_counter()
    for step, micro in zip(range(arm.stage.steps), batches(arm.plan), strict=False):
        one_step(arm, step, micro, teacher(micro, arm.stage.weights(step)))
    return time.perf_counter() - begun


def distil(arguments) -> None:
    teacher, make = models(arguments)
    names = arguments.arms.split(";") if arguments.arms else list(DISTIL)
    moments, arms = moments_of(plan_of(arguments, steps=2), teacher, make()), {}
    for name in names:
        arms[name] = distilled(arguments, teacher, make, moments, **DISTIL[name])
    plan, seconds = next(iter(arms.values())).plan, {name: [] for name in arms}
    for step, micro in zip(range(arguments.steps), batches(plan), strict=False):
        signal = teacher(micro, Weights(1.0, 1.0, 1.0))
        for name, arm in arms.items():
            begun = time.perf_counter()
            one_step(arm, arm.stage.first_step + step, micro, signal)
            seconds[name].append(time.perf_counter() - begun)
        if 2 * (step + 1) in (arguments.steps, 2 * arguments.steps):
            say(step=step + 1, **{name: held_out_loss(arm, arguments.held_out) for name, arm in arms.items()})
    say(seconds_without_the_teacher={name: statistics.median(each) for name, each in seconds.items()})


def distilled(arguments, teacher, make, moments, *, learn: bool = False, **sections) -> Arm:
    """An arm before its first step of stage II; `learn`: after a stage I of as many steps."""
    plan, learnt = plan_of(arguments, steps=arguments.steps, learns=arguments.steps * learn, **sections), None
    if learn:
        first = arm_of(plan, plan.stages[0], teacher, make(), moments)
        run_steps(first, teacher)
        learnt = [side.state_dict() for side in (first.student.filters_s, first.student.filters_t)]
    return arm_of(plan, plan.stages[-1], teacher, make(), moments, learnt)


def price(arguments) -> None:
    if arguments.teacher:
        return measure_price(arguments, {"kd": {"method": "kd"}})
    with tempfile.TemporaryDirectory() as folder:
        arguments.teacher = arguments.student = random_model(folder, arguments.vocabulary)
        measure_price(arguments, {})


def random_model(folder: str, vocabulary: int) -> str:
    config = transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=640, num_hidden_layers=18, intermediate_size=2048, num_attention_heads=4,
        num_key_value_heads=1, head_dim=256, tie_word_embeddings=True,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def measure_price(arguments, others: dict) -> None:
    """Steps in turn: of both stages, and of other methods."""
    teacher, make = models(arguments)
    steps = arguments.steps + 1
    plan = plan_of(arguments, steps=steps, learns=steps)
    stages = [(plan, stage) for stage in plan.stages]
    for sections in others.values():
        other = plan_of(arguments, steps=steps, **sections)
        stages.append((other, other.stages[-1]))
    names = ["stage I", "stage II", *others]
    arms = [arm_of(*each, teacher, make()) for each in stages]
    seconds = [[] for _ in arms]
    for step, micro in zip(range(steps), batches(plan), strict=False):
        for arm, times in zip(arms, seconds, strict=True):
            begun, number = time.perf_counter(), arm.stage.first_step + step
            one_step(arm, number, micro, teacher(micro, arm.stage.weights(number)))
            times += [time.perf_counter() - begun] if step else []  # the first one allocates
    say(width=plan.width, sample_tokens=plan.run.filters.sample_tokens,
        seconds=dict(zip(names, map(statistics.median, seconds), strict=True)),
        gflops_a_token={n: flops_a_step(*s) / arguments.tokens / 1e9 for n, s in zip(names, stages, strict=True)},
        stage_1_of_stage_2=statistics.median(a / b for a, b in zip(*seconds[:2], strict=True)))  # fmt: skip


def say(**values) -> None:
    print(json.dumps(values, default=str), flush=True)


if __name__ == "__main__":
    run_main(main)
