"""Finds the safe rate of each task and optimizer: a quarter of the constant rate that ends best without clipping.

    SMOOTHDIAG_DATA=... python benchmarks/autoclip/rates.py      # writes safe_rates.json; goes on where it stopped

Rates are powers of four. The search begins at a usual rate, and goes on until the best rate has worse ones on either
side.
"""

import json
import math
from typing import get_args

import torch
from tasks import TASKS, Part
from tqdm import tqdm
from training import Arm, Clipper, train
from workloads import OPTIMIZERS, SAFE_RATES, Workload, pool, safe_rates

FIRST = {"momentum": 4.0**-2, "plain": 4.0**-1, "adamw": 4.0**-4, "muon": 4.0**-3}
STEPS, SEED = 150, 0


def best_rate(workload: Workload) -> float:
    """Returns the best of all powers of four."""
    losses: dict[int, float] = {}

    def loss(exponent: int) -> float:
        if exponent not in losses:
            found = train(workload, 4.0**exponent, SEED, Arm(lambda loop: Clipper()), STEPS)
            losses[exponent] = math.inf if found["diverged"] or not found["tail"] < math.inf else found["tail"]
        return losses[exponent]

    best = round(math.log(FIRST[workload.optimizer_name], 4))
    while (better := min((best - 1, best, best + 1), key=loss)) != best:
        best = better
    return 4.0**best


def main() -> None:
    torch.set_num_threads(1)
    known = safe_rates() if SAFE_RATES.exists() else {}
    names = dict.fromkeys(tuple(name.split("/")[:2]) for part in get_args(Part) for name, _ in pool(part))
    for task, optimizer in tqdm(names):
        if f"{task}/{optimizer}" not in known:
            assert optimizer in OPTIMIZERS
            found = best_rate(Workload(f"{task}/{optimizer}/constant", TASKS[task], optimizer, "constant"))
            known = {**known, f"{task}/{optimizer}": found / 4}
            SAFE_RATES.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
