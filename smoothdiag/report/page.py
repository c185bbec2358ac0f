"""page: writes the report, one HTML file that loads nothing from elsewhere."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from smoothdiag import arguments
from smoothdiag.console import counted
from smoothdiag.report.answer import sentence, short
from smoothdiag.report.figures import height_of_constants
from smoothdiag.report.paths import named_paths, page_path
from smoothdiag.report.run import Options, read_run
from smoothdiag.report.svg import Drawing, draw, greys
from smoothdiag.report.views import View
from smoothdiag.rows import printable
from smoothdiag.trace import Trace

if TYPE_CHECKING:
    from markupsafe import Markup

_TEMPLATES: Final = Path(__file__).parent / "templates"

_INK, _PAPER = 0xE8, 0x17
"""Brightness of letters and of the page in the dark, as in style.css."""

_NAMED: Final = 3
"""Most runs that the first sentence names."""

Traces = Trace | str | Path


def write_report(
    traces: Traces | Sequence[Traces] | Mapping[str, Traces],
    path: str | Path = "report.html",
    *,
    lr: float | None = None,
    momentum: float | None = None,
    dampening: float | None = None,
    refresh: int | None = None,
    **options: Any,
) -> Path:
    """Writes a page that says what a trace means for a run: the answer first, then figures, verdict and evidence.

    The page is one HTML file without scripts. It loads nothing from elsewhere, so it can be mailed and archived. It is
    written beside its place first and then moved there, so nobody ever reads half a page.

    Args:
        traces: A trace, or the path of one. For several runs side by side a list of these, or a dict with the names of
            the runs.
        path: The page to write, ``.html``; a folder that is missing is made.
        lr: Learning rate that the threshold is for [x^2/f]; None takes the largest one in the trace.
        momentum: The optimizer's momentum; None takes the one in the trace, or 0.
        dampening: The optimizer's dampening; None takes the one in the trace, or 0.
        refresh: Seconds after which a browser loads the page again, for a run that goes on; None for never.
        **options: Passed on to `fit_smoothness`.

    Returns:
        The path of the page.

    Raises:
        FileNotFoundError: If there is no trace at a path.
        ValueError: If a file is not a trace, a trace has no rows, or an argument is wrong.

    Examples:
        >>> rows = [{"step": k, "grad_norm": 1.0 + k % 7, "smoothness": 3.0, "estimator": "local"} for k in range(50)]
        >>> with sd.Trace("run.jsonl") as trace:
        ...     trace.extend(rows)
        >>> print(sd.write_report("run.jsonl", "report.html", num_boot=20))
        report.html
    """
    target = page_path("path", path)
    if lr is not None:
        lr = arguments.positive("lr", lr)
    for name, value in (("momentum", momentum), ("dampening", dampening)):
        if value is not None:
            arguments.number(name, value, "in [0, 1)", lambda v: 0 <= v < 1)
    found = _named(traces)
    text = render(found, Options(options, lr, momentum, dampening), refresh)
    replace_file(target, text)
    return target


def render(traces: Mapping[str, Trace], options: Options, refresh: int | None = None) -> str:
    """Returns the page of traces by name.

    Raises:
        ValueError: If a trace has no rows, or an option is wrong.
    """
    views = [View(read_run(name, trace, options), f"run-{k}") for k, (name, trace) in enumerate(traces.items(), 1)]
    constants = _constants(views)
    page: dict[str, Any] = {
        "version": version("smoothdiag"),
        "title": f"{', '.join(traces)}: smoothdiag report",
        "headline": _headline(views),
        "views": views,
        "constants": constants,
        "refresh": refresh,
        "style": _markup((_TEMPLATES / "style.css").read_text(encoding="utf-8")),
    }
    drawings = [constants, *(figure.drawing for view in views for figure in view.figures)]
    used = greys("".join(drawing.svg for drawing in drawings))
    page["greys"] = [(grey, f"#{grey}{grey}{grey}") for grey in used]
    page["dark_greys"] = [(grey, f"#{_dark(grey) * 3}") for grey in used]
    text: str = _environment().get_template("page.html").render(page)
    return text.lstrip()


def replace_file(target: Path, text: str) -> None:
    """Writes a file such that it is always whole: beside its place first, and then moved there."""
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, begun = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
        mask = os.umask(0)
        os.umask(mask)
        Path(begun).chmod(0o666 & ~mask)  # mkstemp lets nobody else read the file
        Path(begun).replace(target)
    except BaseException:
        Path(begun).unlink(missing_ok=True)
        raise


def _named(traces: Any) -> dict[str, Trace]:
    """Returns traces by name, read from their files where need be."""
    if isinstance(traces, Mapping):
        given = {str(name): trace for name, trace in traces.items()}
    else:
        several = list(traces) if isinstance(traces, list | tuple) else [traces]
        paths = [_path_of(trace, number) for number, trace in enumerate(several, 1)]
        given = dict(zip(named_paths(paths), several, strict=True))
    if not given:
        raise ValueError("Parameter `traces` should hold at least one trace. Found none.")
    found = {}
    for name, trace in given.items():
        if not isinstance(trace, Trace | str | Path):
            raise arguments.wrong("traces", "a Trace, the path of one, or several of these", trace)
        found[name] = trace if isinstance(trace, Trace) else Trace.read(trace)
    return found


def _path_of(trace: Any, number: int) -> Path:
    """Returns the path that gives a trace its name; a trace without a file gets a number."""
    path = trace.path or trace.source if isinstance(trace, Trace) else trace
    return Path(path) if isinstance(path, str | Path) else Path(f"run {number}")


def _headline(views: Sequence[View]) -> str:
    if len(views) == 1:
        return views[0].run.answer.headline
    if len(views) <= _NAMED:
        each = [
            f"max_grad_norm={short(view.run.answer.threshold)} for {view.run.name}"
            if view.has_threshold
            else f"no threshold for {view.run.name}"
            for view in views
        ]
        return f"{counted(len(views), 'run')}: {'; '.join(each)}."
    return f"{counted(len(views), 'run')}: a threshold follows for {sum(view.has_threshold for view in views)} of them."


def _constants(views: Sequence[View]) -> Drawing:
    """Draws the constants of several runs; nothing for fewer than two fits."""
    from smoothdiag.plots import plot_constants

    fits = {view.run.name: view.run.fit for view in views if view.run.fit is not None}
    if len(fits) < 2:
        return Drawing("")
    return draw("runs", lambda figure: plot_constants(fits, axes=figure.subplots(2, 1)), height_of_constants(fits))


def _environment() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters.update(code=_code, visible=printable, labelled=_labelled, sentence=sentence)
    return environment


def _code(text: object) -> Markup:
    """Returns a text with what stands between backticks as code, everything escaped."""
    from markupsafe import Markup, escape

    parts = [escape(part) for part in re.split(r"`([^`]*)`", printable(str(text)))]
    return Markup("").join(Markup("<code>{}</code>").format(p) if k % 2 else p for k, p in enumerate(parts))


def _labelled(svg: str, title: str) -> Markup:
    """Returns a figure that a screen reader names by its title."""
    from markupsafe import Markup, escape

    return _markup(svg.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1)) if svg else Markup("")


def _markup(text: str) -> Markup:
    """Marks a text of our own as safe: the style sheet, and figures, whose texts are shapes and not letters."""
    from markupsafe import Markup

    return Markup(text)


def _dark(grey: str) -> str:
    """Returns a grey that stands as far between ink and page in the dark as the given one does in the light."""
    return f"{round(_INK + (_PAPER - _INK) * int(grey, 16) / 255):02x}"
