"""docs/machines.md: what is promised to programs is what the commands print; SKILL.md and llms.txt name what exists."""

import json
import re
import shlex
from dataclasses import fields

import pytest
from blocks import BLOCK, DOCS, anchors_of, text_of
from places import REPOSITORY

from smoothdiag.cli import _parser, main

SKILL = (REPOSITORY / "SKILL.md").read_text(encoding="utf-8")
LLMS = (REPOSITORY / "llms.txt").read_text(encoding="utf-8")
PAGE = text_of("machines.md")
PAGES = {"SKILL.md": SKILL, "llms.txt": LLMS, "machines.md": PAGE, "launch_check.md": text_of("launch_check.md")}


def test_documented_json_is_what_the_doctor_prints(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text(BLOCK.search(PAGE)["code"])
    promised = json.loads(re.search(r"```json\n(.*?)```", PAGE, re.DOTALL)[1].replace("/repository", str(tmp_path)))
    with pytest.raises(SystemExit) as end:
        main(["doctor", "--json", "--fail-on", "error", "train.py"])
    assert end.value.code == promised["exit_code"]
    assert json.loads(capsys.readouterr().out) == promised
    for name in (*promised, *promised["findings"][0]):
        assert f"`{name}`" in PAGE, name


def commands_of(text) -> list[list[str]]:
    """Returns every command of smoothdiag in a text, without what a shell makes of it."""
    text = re.sub(r"`smoothdiag [a-z-]+: [^`]*`", "", text)  # what it prints
    start = r"(?:^|`|- run: )(?:torchrun .*? -m smoothdiag\.cli|smoothdiag) "
    found = re.findall(start + r"([a-z-][^`\n]*)", text, re.MULTILINE)
    return [shlex.split(re.split(r"\s#| && | \|\| |;", each)[0]) for each in found]


@pytest.mark.parametrize("name", PAGES)
def test_every_command_parses(name, capsys) -> None:
    commands = commands_of(PAGES[name])
    assert commands or name == "llms.txt"
    whole = [command for command in commands if len(command) > 1 and not command[-1].isupper()]
    assert len(whole) >= 1 or name == "llms.txt"
    for command in whole:
        code = 0
        try:
            _parser().parse_args(command)
        except SystemExit as end:  # --explain prints and exits
            code = end.code
        assert code == 0, command
    for command in commands:
        assert command[0] in _parser().format_help(), command
    capsys.readouterr()


@pytest.mark.parametrize("name", ["SKILL.md", "llms.txt"])
def test_every_link_leads_somewhere(name) -> None:
    links = re.findall(r"\]\(([^)]+)\)", PAGES[name])
    assert len(links) >= 5
    for link in links:
        path, _, anchor = link.partition("#")
        assert (REPOSITORY / path).is_file(), link
        assert not anchor or anchor in anchors_of(str((REPOSITORY / path).relative_to(DOCS)))


def test_forms_are_those_that_agents_read() -> None:
    front = re.match(r"---\nname: (\S+)\ndescription: (.+)\n---\n", SKILL)
    assert front[1] == "smoothdiag"
    assert len(front[2]) <= 1024
    assert len(SKILL.splitlines()) < 80
    # https://llmstxt.org: a title, a quoted summary, then sections of links.
    title, _, summary, *rest = LLMS.splitlines()
    assert title == "# smoothdiag"
    assert summary.startswith("> ")
    body = "\n".join(rest)
    entries = [line for line in body.split("## ", 1)[1].splitlines() if line.startswith("- ")]
    assert all(re.fullmatch(r"- \[[^\]]+\]\([^)]+\)(: .+)?", line) for line in entries)


@pytest.mark.parametrize("name", ["SKILL.md", "machines.md", "launch_check.md"])
def test_names_of_findings_exist(name) -> None:
    from smoothdiag.doctor.findings import Fault

    known = {fault.slug for fault in Fault} | set(re.findall(r"`([a-z-]+)`", PAGE))
    for explained in re.findall(r"--explain (\S+?)`", PAGES[name]):
        assert explained in known or explained == "NAME"


def test_every_entry_of_a_launch_check_is_explained() -> None:
    from smoothdiag.launch.result import Clip, Habit, LaunchCheck

    table = PAGES["launch_check.md"].split("## For programs")[1].split("## How")[0]
    for kind in (LaunchCheck, Clip, Habit):
        assert [field.name for field in fields(kind) if f"`{field.name}`" not in table] == []


def test_exit_codes_are_those_of_the_code() -> None:
    from smoothdiag import console, machines

    assert f"| {machines.FOUND} | there is a finding" in PAGE
    assert f"| {console.BROKEN_PIPE} | the reader" in PAGE
    assert f'"version": {machines.VERSION},' in PAGE
    for name in ("dead-run", "non-finite", "logged-after-clipping", "spike-of-norm", "threshold-clips-most"):
        assert f"`{name}`" in PAGE
