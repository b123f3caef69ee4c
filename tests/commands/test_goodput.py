"""ted-scale goodput beside closed forms, and the tables of docs/goodput.md beside what the tool prints."""

import math
import re

import pytest
from places import ROOT

from ted_scale.commands.planning.goodput import Costs, best, costs_of, parse, simulate, table

FREE = Costs(mtbf=1e5, step=1.0, stall=2.0, write=0.0, detect=0.0, pause=0.0, longest_pause=0.0, start=0.0)
DEAR = FREE._replace(write=300.0, detect=30.0, pause=10.0, longest_pause=600.0, start=400.0)


def closed_form(costs: Costs, every: int) -> float:
    """The mean of saved work over the mean time of a life, if the pause does not grow. Lives are exponential."""
    mean, period = costs.mtbf, every * costs.step + costs.stall
    saved = every * costs.step * math.exp(-(costs.start + costs.write) / mean) / math.expm1(period / mean)
    return saved / (costs.detect + costs.pause + mean)


def test_without_failures_only_the_stalls_are_lost():
    shares = simulate(FREE._replace(mtbf=1e12), 100)
    assert shares.goodput == pytest.approx(1 - 2 / 102, abs=1e-6)
    assert shares.stalls == pytest.approx(2 / 102, abs=1e-6)


@pytest.mark.parametrize("every", [50, 600, 20_000])
@pytest.mark.parametrize("costs", [FREE, DEAR])
def test_the_simulation_loses_what_the_closed_form_loses(costs, every):
    shares = simulate(costs._replace(longest_pause=costs.pause), every)
    lost = 1 - closed_form(costs, every)
    assert 1 - shares.goodput == pytest.approx(lost, rel=0.02)
    assert sum(shares) == pytest.approx(1) and min(shares) >= 0


def test_the_best_interval_is_young_s_and_daly_s_where_restarts_cost_nothing():
    every, shares = best(FREE)
    theirs = round(math.sqrt(2 * FREE.stall * FREE.mtbf))
    assert every == pytest.approx(theirs, rel=0.3)  # the optimum is flat
    assert 1 - shares.goodput == pytest.approx(1 - simulate(FREE, theirs).goodput, rel=0.03)
    assert shares.goodput >= simulate(FREE, theirs).goodput - 1e-4


def test_pauses_grow_only_while_no_checkpoint_comes():
    hopeless = simulate(DEAR._replace(mtbf=300.0), 100_000)
    assert hopeless.goodput == 0.0 and hopeless.down > 0.5
    growing, constant = simulate(DEAR, 600), simulate(DEAR._replace(longest_pause=DEAR.pause), 600)
    assert growing.down == pytest.approx(constant.down, rel=0.2)


def test_no_save_begins_before_the_one_before_is_written():
    costs = costs_of(70e9, 64, parse(["--disk-gbps", "0.001"]))
    assert best(costs)[0] * costs.step >= costs.write > 10_000


def test_more_failures_lose_more_and_are_met_by_more_checkpoints():
    good, bad = (costs_of(7e9, 256, parse(["--mtbf-hours", hours])) for hours in ("50000", "8000"))
    assert best(good)[0] > best(bad)[0] and best(good)[1].goodput > best(bad)[1].goodput


def test_the_tables_of_the_docs_are_what_the_tool_prints():
    text = (ROOT / "docs" / "goodput.md").read_text()
    found = re.findall(r"```sh\nted-scale goodput ?(.*)\n```\n\n((?:\|.*\n)+)", text)
    assert len(found) == 2
    for flags, printed in found:
        assert printed.strip() == table(parse(flags.split()))
