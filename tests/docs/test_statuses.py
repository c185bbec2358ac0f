"""docs/statuses.md: the table lists every status as the code words it, with its cause and its remedy apart."""

from blocks import text_of

from smoothdiag import Status


def test_the_table_is_that_of_the_code() -> None:
    rows = []
    for status in Status:
        cause, _, remedy = status.value.partition(". ")
        rows.append([f"`{status.name.lower()}`", "yes" if status.usable else "no", cause.rstrip("."), remedy])
    table = [line for line in text_of("statuses.md").splitlines() if line.startswith("| `")]
    assert [[cell.strip() for cell in line.split("|")[1:-1]] for line in table] == rows


def test_every_status_but_ok_has_a_remedy() -> None:
    assert [status.name for status in Status if ". " not in status.value] == ["OK"]
