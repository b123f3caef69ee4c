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


def promised(name: str, task) -> list[str]:
    """The keys that a task of lm-eval will have. None where a function of its own makes the scores, or a metric of written answers
    that may make several, as rouge does: only the answers name those."""
    settings = task.dump_config()
    writes = settings.get("output_type") == "generate_until"
    if settings.get("process_results") or (writes and {*task.aggregation()} != {"exact_match"}):
        return []
    filters = [each["name"] for each in settings.get("filter_list") or [{"name": "none"}]]
    return [Score(name, called(metric, how), 0.0).key for how in filters for metric in task.aggregation()]


def called(metric: str, how: str) -> str:
    return metric if how == "none" else f"{metric} {how}"


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
        found.append(Score(name, called(metric, how), float(value), error if isinstance(error, float) else None))
    return found
