"""The kinds of numbers that a report draws together: their section, their title, and a sentence for who does not know them.

Note: the first group that a key fits takes it; a key of no group is drawn at the page's end.
"""

import re
from typing import NamedTuple


class Group(NamedTuple):
    """Numbers that one chart of a single run shows."""

    section: str
    title: str
    keys: str  # a regular expression
    about: str
    y: str = ""


GROUPS = (
    Group(
        "loss", "Loss by term", r"loss/(total|ce|kl|layer)",
        "The mean of each term over the steps since the row before. Total is the weighted sum.", "nats",
    ),
    Group(
        "loss", "Held-out loss", r"val/(loss|teacher_loss)",
        "On text that is never trained on; the teacher reads the same text.", "nats",
    ),
    Group(
        "vitals", "Agreement and sure tokens", r"vitals/(agreement|saturated_[st])",
        "Shares of a sample of tokens: both have the same likeliest next token; one next token has 99 % in the student, or in the "
        "teacher.",
    ),
    Group(
        "vitals", "What both know of the text", r"vitals/(kl_1|student_ce|teacher_ce)",
        "On the same sample: KL at temperature 1, and both cross-entropies.", "nats",
    ),
    Group(
        "vitals", "KL's gradient against CE's, at the head's input", r"vitals/(kl_to_ce|kl_ce_cosine)",
        "The ratio of their norms, as weighted, and their cosine.",
    ),
    Group(
        "optimizer", "Learning rate", r"optim/lr",
        "As the schedule gave it.",
    ),
    Group(
        "optimizer", "Gradient norms", r"optim/grad_norm\w*",
        "Before clipping; student and filters are clipped apart.",
    ),
    Group(
        "optimizer", "Weights and shares of terms", r"loss/(layer_weight|kl_share)",
        "What loss.balance and teacher.every made of the terms.",
    ),
    Group(
        "optimizer", "Dropped updates", r"optim/skipped",
        "Steps so far whose update was dropped.",
    ),
    Group(
        "speed", "Throughput", r"perf/tokens_per_s",
        "Over all ranks.", "tokens/s",
    ),
    Group(
        "speed", "Share of the devices' peak", r"perf/(mfu|hfu)",
        "MFU counts the FLOPs that the steps need, HFU those with recomputed activations too.",
    ),
    Group(
        "speed", "Time of a step, and its forecast", r"perf/(step_ms|forecast_ms)",
        "The plan's forecast beside what was measured.", "ms",
    ),
    Group(
        "speed", "Where a step's time goes", r"perf/(data_wait_ms|teacher_ms|other_ms)",
        "Waiting for data, the teacher's forward, and all the rest: the student's forward, backward and update.", "ms",
    ),
    Group(
        "speed", "Where all the time goes", r"perf/(goodput|lost_\w+)",
        "Shares of the time since the run first began, over all starts; they add up to 1.",
    ),
    Group(
        "memory", "Memory of a rank, and its forecast", r"memory/\w+",
        "The peak of rank 0 so far beside the plan.", "GiB",
    ),
    Group(
        "data", "Tokens read, by corpus", r"data/[^/]+/tokens",
        "In this stage. A steeper line has more weight in the blend.", "tokens",
    ),
    Group(
        "data", "Epochs, by corpus", r"data/[^/]+/epoch",
        "How often a corpus has been read to its end in this stage.",
    ),
    Group(
        "data", "Weights of an adaptive blend", r"blend/[^/]+/weight",
        "As they were measured at the borders.",
    ),
    Group(
        "data", "Held-out loss, by corpus", r"val/(?!suite/)[^/]+/(loss|teacher_loss)",
        "Of student and teacher.", "nats",
    ),
    Group(
        "evaluation", "Scores of the suite", r"val/suite/.+",
        "Asked of the student as it stood.",
    ),
)  # fmt: skip
# What a number of each matched pair says; docs/vitals.md has more.
OF_PAIRS = {
    "loss/layer": "The distance between filtered states of student and teacher.",
    "loss/filter_t": "Stage I: the next-token loss of the teacher's filter.",
    "loss/filter_s": "Stage I: the next-token loss of the student's filter.",
    "vitals/error": "How far the student's filtered state is from the teacher's: 0 is the same, 1 no better than nothing.",
    "vitals/cosine": "Of both filtered states. 1 beside a large error: only the length is wrong.",
    "vitals/cka": "1: both sides are the same but for turning. High beside a large error: only the filter must still turn it.",
    "vitals/rank_states": "In how many directions tokens differ in the student's state.",
    "vitals/rank_filter_s": "The same of its filtered state; it shall come near the teacher's.",
    "vitals/rank_filter_t": "The same of the teacher's filtered state: how much there is to match.",
    "vitals/pull": "The layer loss's gradient at the state, in norms of the rest's. 0.1: it hardly steers; 10: it alone does.",
    "vitals/pull_cosine": "Of these gradients. Below 0 the layer loss works against the other terms.",
}  # fmt: skip
# Numbers that a table or another chart has.
UNDRAWN = re.compile(
    r"checkpoint/\w+|perf/restart_\w+|data/[^/]+/epoch_tokens|val/tokens|val/(.+/)?(teacher_)?ppl|blend/[^/]+/(teacher_)?ppl"
)
