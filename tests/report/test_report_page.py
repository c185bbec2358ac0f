"""report.page: one page that stands alone, with the answer first and every text of a trace escaped."""

import math
import re

import pytest
from pages import Page, flat, lawful, recorded

import smoothdiag as sd
from smoothdiag import Trace, write_report

HOSTILE = (
    "<script>alert(1)</script>",
    "\"'><img src=x onerror=alert(2)>",
    "a‮b",
    "שלום",
    "</style>",
    "`x` $y$ {{ 7*7 }}",
)
FEW = {"num_boot": 20}


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Writes a page without its figures, which take longest, and reads it."""
    monkeypatch.setattr("smoothdiag.report.views.figures_of", lambda run, prefix: [])
    monkeypatch.setattr("smoothdiag.report.page._constants", lambda views: sd.report.svg.Drawing(""))

    def write(traces, **options):
        path = write_report(traces, tmp_path / "report.html", **FEW, **options)
        return Page(path.read_text(encoding="utf-8"))

    return write


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("whole")
    trace = recorded(lawful(120).assign(lr=[0.05] * 60 + [0.1] * 60))
    first = write_report(trace, folder / "a.html", **FEW).read_text(encoding="utf-8")
    assert first == write_report(trace, folder / "b.html", **FEW).read_text(encoding="utf-8")  # the same bytes
    return first


def test_nothing_is_loaded_from_elsewhere(whole) -> None:
    page = Page(whole)
    assert not page.tags.keys() & {"script", "link", "iframe", "img", "object"}
    assert "@import" not in whole
    targets = [value for name in ("href", "xlink:href", "src", "srcset", "data") for value in page.values(name)]
    assert targets
    assert all(target.startswith(("#", "data:image/png;base64,")) for target in targets)
    assert all(target.startswith(("#", "data:")) for target in re.findall(r"url\(\s*[\"']?([^)]*)", whole))
    (policy,) = [value for value in page.values("content") if "default-src" in value]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def test_names_inside_the_page_are_unique_and_found(whole) -> None:
    page = Page(whole)
    names = page.values("id")
    assert len(names) == len(set(names))
    targets = [value for name in ("href", "xlink:href") for value in page.values(name) if value.startswith("#")]
    assert {target[1:] for target in targets} <= set(names)


def test_structure_can_be_read_without_seeing_it(whole) -> None:
    page = Page(whole)
    assert page.values("lang") == ["en"]
    assert page.tags["title"] == page.tags["h1"] == page.tags["main"] == 1
    assert page.tags["caption"] == page.tags["table"] > 1
    assert page.tags["svg"] == page.values("role").count("img") == page.tags["figure"] == 4
    assert all(page.values("aria-label"))
    assert page.inside("h2") == [
        "What to do next",
        "What was measured",
        "Verdict",
        "How it was measured",
        "Configuration to paste",
    ]


def test_figures_follow_the_colours_of_the_page(whole) -> None:
    figures = "".join(re.findall(r"<svg.*?</svg>", whole, re.DOTALL))
    assert "currentColor" in figures
    assert "#000000" not in figures
    assert "#ffffff" not in figures
    inks = set(re.findall(r"var\((--ink-..)\)", figures))
    assert all(whole.count(f"{ink}: #") == 3 for ink in inks)  # light, dark and print


def test_first_sentence_of_a_law_is_the_threshold(written) -> None:
    page = written(recorded(lawful()))
    (headline,) = page.inside("h1")
    assert headline == "Set max_grad_norm=4.5; sure to three digits."
    code = page.inside("code")
    for line in ("TrainingArguments(..., max_grad_norm=4.5)", "Trainer(..., gradient_clip_val=4.5)"):
        assert any(line in text for text in code)
    assert sum("clip_grad_norm_(model.parameters(), 4.5)" in text for text in code) == 2


def test_momentum_of_the_trace_makes_the_threshold_and_an_option_overrides_it(written) -> None:
    trace = recorded(lawful(lr=0.01), momentum=0.9, gain=10.0)
    assert written(trace).inside("h1")[0].startswith("Set max_grad_norm=4.5;")
    assert written(trace, momentum=0.0).inside("h1")[0].startswith("Set max_grad_norm=49.5;")
    assert written(trace, momentum=0.0, lr=0.1).inside("h1")[0].startswith("Set max_grad_norm=4.5;")


def test_a_rate_that_is_too_large_is_lowered_with_its_own_threshold(written) -> None:
    page = written(recorded(lawful(lr=0.8)))
    headline = "Set max_grad_norm=0.5 and the learning rate to 0.5; sure to three digits."
    assert page.inside("h1") == [headline]  # (1/0.5 - 1) / 2, at half of 1/L0
    assert any("Lower the learning rate from 0.8 to 0.5" in text for text in page.inside("li"))
    assert "The threshold is for the learning rate 0.5, without momentum." in page.text


def test_tables_with_sentences_are_cards_on_a_phone_whose_cells_have_names(written) -> None:
    page = written({"good": recorded(lawful(), gain=1 / (1 - 0.9)), "bad": recorded(flat())})
    assert page.values("class").count("cards") == 1 + 2 * 2  # of the runs; status and facts of each
    names = page.values("data-name")
    assert set(names) == {"max_grad_norm", "verdict", "L0 [f/x²]", "L1 [1/x]", "decades", "rows", "answer"} | {
        "in fits",
        "cause",
    }
    assert "10.0" in page.inside("bdi")


def test_first_sentence_without_a_law_says_what_to_measure(written) -> None:
    page = written(recorded(flat().assign(num_grads=5, seconds=0.3)))
    headline = " ".join(page.inside("h1"))
    assert headline.startswith("No threshold follows from this; scan this checkpoint with")
    assert headline.endswith(", about 30 seconds.")  # 500 gradients of 0.06 s
    assert "sd.scan" in page.inside("code")
    assert any("AutoClip(optimizer, probe)" in text for text in page.inside("code"))
    assert any("TrainingArguments(..., max_grad_norm=1e30)" in text for text in page.inside("code"))
    assert not any(re.search("max_grad_norm=(?!1e30)", text) for text in page.inside("code"))


def test_optimizer_that_rescales_gradients_gets_autoclip(written) -> None:
    page = written(recorded(lawful(), optimizer="AdamW", follows_gradients=False))
    assert "because AdamW rescales its gradients" in page.inside("h1")[0]


def test_every_text_of_a_trace_is_escaped(written) -> None:
    rows = [lawful(80, group=name) for name in ("all", *HOSTILE)]
    rows.append(lawful(3, estimator=HOSTILE[0], status=HOSTILE[1]))
    trace = recorded(sd.fits.pd.concat(rows), **{name: name for name in HOSTILE}, optimizer=HOSTILE[0])
    trace.problems = list(HOSTILE)
    page = written({name: trace for name in HOSTILE[:2]})
    assert not {"script", "img"} & page.tags.keys()
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    for name in (*HOSTILE[:2], *HOSTILE[3:]):
        assert name in page.inside("bdi"), name
    assert r"a\u202eb" in page.inside("bdi")
    assert "‮" not in page.text
    assert "49" not in page.inside("bdi")


def test_several_runs_stand_side_by_side_and_have_sections(written) -> None:
    page = written({"good": recorded(lawful()), "bad": recorded(flat())})
    assert page.inside("h1") == ["2 runs: max_grad_norm=4.5 for good; no threshold for bad."]
    assert page.inside("h2")[0] == "The runs side by side"
    assert [value for value in page.values("href") if value.startswith("#run")] == ["#run-1", "#run-2"]
    assert {"run-1", "run-2"} <= set(page.values("id"))
    many = written([recorded(lawful()), recorded(flat()), recorded(flat()), recorded(flat())])
    assert many.inside("h1") == ["4 runs: a threshold follows for 1 of them."]


def test_rows_that_failed_alone_make_a_page_that_says_so(written) -> None:
    page = written(recorded(lawful(30, status="failed", grad_norm=math.nan, smoothness=math.nan)))
    assert page.inside("h1") == ["No threshold follows from this, because its rows cannot be fitted."]
    assert "Correct loss_fn." in page.text
    assert "There is no verdict" in page.text


def test_rows_of_a_log_ask_for_a_probe(written) -> None:
    page = written(recorded(lawful(30, status="not_measured", smoothness=math.nan)))
    assert page.inside("h1")[0].startswith("No threshold follows from a log; attach a")


def test_damaged_lines_are_counted_and_the_rest_is_reported(written, tmp_path) -> None:
    path = tmp_path / "run.jsonl"
    recorded(lawful(), path)
    lines = path.read_text().splitlines()
    lines[5], lines[9] = lines[5].replace("0.1", "0.7"), "{half"
    path.write_text("\n".join(lines) + "\n")
    with pytest.warns(sd.SmoothdiagWarning, match="check sum"):
        page = written(path)
    assert "The file is damaged: 2 problems. The page tells about the rest." in page.inside("summary")
    assert page.inside("h1")[0].startswith("Set max_grad_norm=4.5;")
    assert page.inside("bdi")[0] == "run"


def test_wrong_input_says_what_was_expected(written, tmp_path) -> None:
    (tmp_path / "picture.jsonl").write_bytes(b"\x89PNG\r\n")
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(FileNotFoundError, match="There is no trace at"):
        written(tmp_path / "missing.jsonl")
    for name in ("picture", "empty"):
        with pytest.raises(ValueError, match="should be a smoothdiag trace, whose first line is a header"):
            written(tmp_path / f"{name}.jsonl")
    with pytest.raises(ValueError, match="Trace `run 1` should have rows. Found none."):
        written(Trace())
    with pytest.raises(ValueError, match="Parameter `traces` should be a Trace, the path of one"):
        written([3])
    with pytest.raises(ValueError, match="Parameter `traces` should hold at least one trace"):
        written([])
    with pytest.raises(ValueError, match="Parameter `quantile` should be in"):
        written(recorded(lawful()), quantile=2)
    with pytest.raises(ValueError, match=r"Parameter `path` should be the path of a page, which ends in \.html"):
        write_report(recorded(lawful()), tmp_path / "run.jsonl")
    assert not list(tmp_path.glob("*.html"))


def test_a_figure_that_cannot_be_drawn_costs_no_page(tmp_path, monkeypatch) -> None:
    def fails(*_, **__):
        raise RuntimeError("no ink")

    for name in ("plot_smoothness", "plot_trace", "plot_fit"):
        monkeypatch.setattr(f"smoothdiag.plots.{name}", fails)
    page = Page(write_report(recorded(lawful()), tmp_path / "r.html", **FEW).read_text(encoding="utf-8"))
    assert page.text.count("This figure could not be drawn. no ink") == 3
    assert page.inside("h1")[0].startswith("Set max_grad_norm=4.5;")
