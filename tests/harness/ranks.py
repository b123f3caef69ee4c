"""What the distributed tests look at, run by real DeepSpeed ranks: one start for many scenarios, because it takes seconds.

`tests/harness/ranks.py FOLDER NAME…`, started once a rank (launching.py), runs the scenarios of scenarios.py and its neighbours by
name; what they return on each rank lands in FOLDER/NAME.RANK.json, an exception as its traceback. Note: a model's structure is
looked at once, because that is a sixth of a short run, and many runs share few models.
"""

import functools
import gc
import json
import os
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))


def main() -> None:
    folder, names = Path(sys.argv[-2]), sys.argv[-1].split(",")
    import best_scenarios
    import data_scenarios
    import health_scenarios
    import lora_scenarios
    import number_scenarios
    import recorded_losses
    import sample_scenarios
    import scenarios
    import sequence_scenarios
    import stop_scenarios
    import traffic_scenarios
    import vitals_scenarios

    from ted_scale import plan
    from ted_scale.ranks.group import start_ranks

    plan.inspect = functools.cache(plan.inspect)
    homes = (
        scenarios, best_scenarios, data_scenarios, health_scenarios, lora_scenarios, number_scenarios, recorded_losses,
        sample_scenarios, sequence_scenarios, stop_scenarios, traffic_scenarios, vitals_scenarios,
    )  # fmt: skip
    device, rank = start_ranks(), os.environ["RANK"]
    for name in names:
        gc.collect()
        gc.freeze()  # DeepSpeed looks for garbage at every engine's start; what is imported, and what it keeps, is none
        try:
            scenario = next(getattr(home, name) for home in homes if hasattr(home, name))
            result = scenario(folder, device)
        except Exception:
            result = {"traceback": traceback.format_exc()}
        (folder / f"{name}.{rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
