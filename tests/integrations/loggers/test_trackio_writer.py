"""integrations.loggers.wandb: trackio itself reads back what its writer leaves on disk; needs ``trackio``."""

import os
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest
from logged_runs import CLIPPING, Numbers, Run, assert_same, expected, law
from places import REPOSITORY

from smoothdiag import Trace
from smoothdiag.integrations.loggers import TrackioWriter, WandbWriter

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trackio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The module, which reads once where it stores runs."""
    folder = tmp_path_factory.mktemp("trackio")
    os.environ["TRACKIO_DIR"] = str(folder)
    module = pytest.importorskip("trackio")
    assert folder == module.TRACKIO_DIR, "trackio was imported before"
    yield module
    del os.environ["TRACKIO_DIR"]


def history(trackio: Any, project: str) -> list[dict[str, Any]]:
    from trackio.sqlite_storage import SQLiteStorage

    (run,) = trackio.Api().runs(project)
    return sorted(SQLiteStorage.get_logs(project, run.name), key=lambda entry: entry["step"])


def numbers_of(rows: list[dict[str, Any]]) -> Numbers:
    found = defaultdict(list)
    for item in rows:
        for name, value in item.items():
            if isinstance(value, int | float) and name != "step":
                found[name].append((item["step"], value))
    return dict(found)


@pytest.mark.parametrize("made", ["TrackioWriter", "WandbWriter"])
def test_a_run_holds_every_row_once_and_the_figures(trackio, made: str) -> None:
    run = Run(autoclip=True)
    options = {"autoclip": run.clipper, "project": made, "auto_log_cpu": False}
    if made == "WandbWriter":
        writer = WandbWriter(run.probe, module=trackio, **options)
    else:
        writer = TrackioWriter(run.probe, **options)
    with writer:
        run.train(8)
    with pytest.raises(RuntimeError, match="init"):
        trackio.log({})  # no run is active
    rows = history(trackio, made)
    found = numbers_of(rows)
    clipping = [found.pop(name) for name in CLIPPING]
    assert_same(found, expected(run.probe.trace))
    assert [step for step, _ in clipping[0]] == sorted({row["step"] for row in run.probe.trace})
    for name in ("smoothness/figure", "clipping/figure"):
        (image,) = [(row["step"], row[name]) for row in rows if name in row]
        assert image[0] == run.probe.trace[-1]["step"]
        assert (trackio.TRACKIO_DIR / "media" / image[1]["file_path"]).read_bytes().startswith(b"\x89PNG")


def test_the_verdict_is_a_text(trackio) -> None:
    trace = Trace()
    trace.extend(law(range(150)))
    TrackioWriter(trace, project="verdict", auto_log_cpu=False).close()
    ((step, text),) = [
        (item["step"], item["fit/verdict"]) for item in history(trackio, "verdict") if "fit/verdict" in item
    ]
    assert step == 149
    assert text.startswith("L0L1 after 150 rows. ")


def test_a_run_of_the_users_stays_open_with_their_values(trackio) -> None:
    own = trackio.init(project="own", auto_log_cpu=False)
    run = Run()
    with TrackioWriter(run.probe):
        for step in range(8):
            run.train(1)
            trackio.log({"mine": float(step)})
        with pytest.raises(ValueError, match=r"Found project. Pass these arguments to the `trackio.init`"):
            TrackioWriter(Trace(), project="p")
    assert trackio.context_vars.current_run.get() is own
    trackio.log({"mine": 8.0})
    trackio.finish()
    found = numbers_of(history(trackio, "own"))
    assert [value for _, value in found.pop("mine")] == list(range(9))
    assert_same(found, expected(run.probe.trace))


def test_a_resumed_run_continues_in_the_same_run(trackio) -> None:
    for steps in (range(3), range(3, 6)):
        trace = Trace()
        trace.extend(law(steps))
        TrackioWriter(trace, project="resumed", name="r", resume="allow", auto_log_cpu=False).close()
    assert [step for step, _ in numbers_of(history(trackio, "resumed"))["smoothness/local"]] == list(range(6))


def test_the_example_of_the_page_runs(trackio) -> None:
    run = Run()
    names = {"probe": run.probe, "clipper": None, "train": lambda: run.train(4)}
    page = (REPOSITORY / "docs" / "logs.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n([^`]*TrackioWriter.*?)```", page, re.DOTALL)
    exec(code, names)
    assert [step for step, _ in numbers_of(history(trackio, "mine"))["smoothness/local"]] == [0, 3]
