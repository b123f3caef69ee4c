"""What lm-eval found, as scores: a task's or a group's metric, its value and its standard error."""

from typing import NamedTuple


class Score(NamedTuple):
    """`what` is a corpus or a task."""

    what: str
    metric: str
    value: float | int
    error: float | None = None  # standard error, where it is known

    @property
    def shown(self) -> str:
        if isinstance(self.value, int):
            return f"{self.value:,}"
        return f"{self.value:.4f}" + ("" if self.error is None else f" ± {self.error:.4f}")

    @property
    def key(self) -> str:
        """Its name in a row of metrics."""
        return f"{self.what}/{self.metric.replace(' ', '_')}"


def scores(found: dict) -> list[Score]:
    """Of tasks and groups, without the members of a group: the group's own score has them."""
    members = {name for children in found.get("group_subtasks", {}).values() for name in children}
    return [
        score for name, values in found["results"].items() if name not in members for score in scores_of(name, values)
    ]


def scores_of(name: str, values: dict) -> list[Score]:
    """lm-eval's keys are METRIC,FILTER and METRIC_stderr,FILTER; most tasks have no filter."""
    found = []
    for key, value in values.items():
        metric, _, how = key.partition(",")
        if not how or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = values.get(f"{metric}_stderr,{how}")
        called = metric if how == "none" else f"{metric} {how}"
        found.append(Score(name, called, float(value), error if isinstance(error, float) else None))
    return found
