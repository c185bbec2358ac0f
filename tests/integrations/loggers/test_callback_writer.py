"""integrations.loggers.callback: the functions of Accelerate, Lightning and Fabric that log get every number."""

from collections import defaultdict
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from logged_runs import CLIPPING, Numbers, Run, assert_same, expected, law

from smoothdiag import Trace
from smoothdiag.integrations.loggers import CallbackWriter


def without_clipping(found: Numbers) -> Numbers:
    return {name: pairs for name, pairs in found.items() if name not in CLIPPING}


def test_a_function_gets_every_number_once_and_texts_and_figures_on_request() -> None:
    found, others = defaultdict(list), []

    def log(values: dict[str, float], step: int) -> None:
        assert type(values) is dict
        for name, value in values.items():
            found[name].append((step, value))

    def keep(name: str, value: object, step: int) -> None:
        others.append((name, type(value), step))

    run = Run(autoclip=True)
    with CallbackWriter(run.probe, log, autoclip=run.clipper, log_text=keep, log_image=keep):
        run.train(8)
    assert_same(without_clipping(found), expected(run.probe.trace))
    assert found.keys() >= set(CLIPPING)
    last = run.probe.trace[-1]["step"]
    assert others == [("smoothness/figure", np.ndarray, last), ("clipping/figure", np.ndarray, last)]
    trace = Trace()
    trace.extend(law(range(20)))
    CallbackWriter(trace, lambda values, step: None, log_text=keep).close()
    assert others[2:] == [("fit/verdict", str, 19)]


@pytest.mark.parametrize("name", ["log", "log_text", "log_image"])
def test_what_is_no_function_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"Parameter `{name}` should be a function. Found `{name} = 'x'`"):
        CallbackWriter(Trace(), **{"log": print, name: "x"})


@pytest.mark.thorough
def test_the_trackers_of_accelerate_get_every_number(tmp_path) -> None:
    from accelerate import Accelerator
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=str(tmp_path))
    accelerator.init_trackers("runs")
    run = Run()
    with CallbackWriter(run.probe, accelerator.log):
        run.train(8)
    accelerator.end_training()
    read = EventAccumulator(str(tmp_path / "runs"), size_guidance={"scalars": 0}).Reload()
    found = {tag: [(e.step, e.value) for e in read.Scalars(tag)] for tag in read.Tags()["scalars"]}
    assert_same(found, expected(run.probe.trace))


def numbers(path: Path) -> Numbers:
    """The numbers that a CSVLogger has written."""
    table = pd.read_csv(path).set_index("step")
    return {str(name): list(column.dropna().items()) for name, column in table.items()}


@pytest.mark.thorough
def test_loggers_of_lightning_get_every_number(tmp_path) -> None:
    from lightning.pytorch.loggers import CSVLogger

    logger, run = CSVLogger(tmp_path, flush_logs_every_n_steps=1), Run()
    with CallbackWriter(run.probe, logger.log_metrics):
        run.train(8)
    assert_same(numbers(Path(logger.log_dir) / "metrics.csv"), expected(run.probe.trace))


@pytest.mark.thorough
def test_loggers_of_fabric_get_every_number(tmp_path) -> None:
    from lightning.fabric import Fabric
    from lightning.fabric.loggers import CSVLogger

    logger, run = CSVLogger(tmp_path, flush_logs_every_n_steps=1), Run()
    fabric = Fabric(accelerator="cpu", devices=1, loggers=logger)
    with CallbackWriter(run.probe, fabric.log_dict):
        run.train(8)
    assert_same(numbers(Path(logger.log_dir) / "metrics.csv"), expected(run.probe.trace))
