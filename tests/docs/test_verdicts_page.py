"""docs/verdicts.md: the page explains every flag and every verdict."""

import re

from places import REPOSITORY

from smoothdiag.fits import Verdict

PAGE = (REPOSITORY / "docs" / "verdicts.md").read_text(encoding="utf-8")
CODE = "".join(path.read_text(encoding="utf-8") for path in sorted((REPOSITORY / "smoothdiag" / "fits").glob("*.py")))
FLAGS = set(re.findall(r'Flag\(\s*"([A-Za-z ]+)"', CODE))


def test_every_flag_has_its_row():
    flags = PAGE.split("## Flags")[1].split("\n## ")[0]
    listed = {name.split(" (")[0].strip() for name in re.findall(r"^\| ([^|]*)\|", flags, re.MULTILINE)}
    assert len(FLAGS) > 12
    assert listed - {"flag"} == FLAGS


def test_every_verdict_is_explained():
    for verdict in Verdict:
        assert f"`{verdict.name}`" in PAGE
