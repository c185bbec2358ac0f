"""docs/scan_power.md: the page explains every flag of a scan and quotes the thresholds of its rules."""

import re

import numpy as np
from places import REPOSITORY

from smoothdiag.fits.checks import short_range
from smoothdiag.fits.scans import deciding, doubts

PAGE = (REPOSITORY / "docs" / "scan_power.md").read_text(encoding="utf-8")
ROOM = REPOSITORY / "smoothdiag" / "fits" / "scans"
FLAGS = set(re.findall(r'Flag\(\s*"([a-z ]+)"', "".join(path.read_text("utf-8") for path in ROOM.glob("*.py"))))
FLAGS |= {short_range(np.ones(9), "").name}  # Runs have this flag, too.


def test_every_flag_has_its_row() -> None:
    table = PAGE.split("| flag | cause")[1].split("\n\n")[0]
    listed = {name.split(" (")[0].strip() for name in re.findall(r"^\| ([^|]*)\|", table, re.MULTILINE)}
    assert len(FLAGS) == 9
    assert listed == FLAGS


def test_rules_quote_the_thresholds_of_the_code() -> None:
    assert f"within {deciding.STRAIGHT[0]:g} and {deciding.STRAIGHT[1]:g}".replace("0.", ".") in PAGE
    assert f"factor of at most {deciding.CONSTANT_RISE**0.5:.2f} if\n   the power is the truth" in PAGE
    assert f"errs by {deciding.PRECISE:.0%} or less" in PAGE
    assert f"fewer than {doubts.MIN_LINES} units" in PAGE
