"""Damages trace files in many ways, and counts how reading reports the damage.

Each mutation changes a file as disks, copies and editors do: a flipped bit, bytes that are lost or inserted, an end
that is cut off, lines that vanish, move or appear twice, other digits, other names, other line ends, two files in one.

* *unreported*: a row is read whose gradient norm, smoothness, step, group, status or estimator differs from what was
  written for its step, and `problems` says no more than before.
* *fault*: an exception that is no ValueError or FileNotFoundError with the file's name, or a problem without a warning.

    python benchmarks/damaged_traces.py --number 2000
"""

import argparse
import random
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import smoothdiag as sd

LOOKED_AT = ("step", "estimator", "group", "grad_norm", "smoothness", "status")
STATUSES = ("ok", "failed", "saturated", "zero_step")
HOSTILE = (b"\n", b"[]\n", b"[" * 5000 + b"\n", b'{"step": ' + b"1" * 5000 + b"}\n")
Mutation = Callable[[random.Random, bytes, bytes], bytes]


def recorded(seed: int, num_steps: int = 12) -> list[dict]:
    """Rows as a probe records them."""
    generator = random.Random(seed)
    return [
        {
            "step": 10 * step,
            "estimator": estimator,
            "group": group,
            "grad_norm": generator.lognormvariate(0, 1),
            "smoothness": generator.lognormvariate(2, 1),
            "loss": generator.random(),
            "lr": 0.1,
            "status": generator.choice(STATUSES),
            "device": "cpu",
            "dtype": "float32",
            "num_values": step,
        }
        for step in range(num_steps)
        for estimator, group in (("local", "all"), ("path", "all"), ("local", "=head, 'first'"))
    ]


def write(path: Path, seed: int) -> None:
    """Writes a trace by appending or, as .csv, as a whole; some are killed in the middle of a line and resumed."""
    rows = recorded(seed)
    if path.suffix == ".csv":
        trace = sd.Trace()
        trace.extend(rows)
        trace.write(path)
        return
    with sd.Trace(path, meta={"seed": seed}) as trace:
        trace.extend(rows[:21])
    if seed % 2:
        path.write_bytes(path.read_bytes()[:-30])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trace = sd.Trace(path)
            trace.resume(60)
    else:
        trace = sd.Trace(path)
        trace.resume(70)
    with trace:
        trace.extend(row for row in rows if row["step"] >= (60 if seed % 2 else 70))


def flip(random: random.Random, data: bytes, other: bytes) -> bytes:
    at = random.randrange(len(data))
    return data[:at] + bytes([data[at] ^ (1 << random.randrange(8))]) + data[at + 1 :]


def lose(random: random.Random, data: bytes, other: bytes) -> bytes:
    at = random.randrange(len(data))
    return data[:at] + data[at + random.choice((1, 1, 2, 5, 20, 400)) :]


def insert(random: random.Random, data: bytes, other: bytes) -> bytes:
    at = random.randrange(len(data))
    added = random.choice((b"0", b"9", b"\n", b",", b'"', b"\\", b"\0", b"\xff", random.randbytes(5), data[:50]))
    return data[:at] + added + data[at:]


def cut(random: random.Random, data: bytes, other: bytes) -> bytes:
    return data[: random.randrange(len(data))]


def behead(random: random.Random, data: bytes, other: bytes) -> bytes:
    return data[random.randrange(len(data)) :]


def zero(random: random.Random, data: bytes, other: bytes) -> bytes:
    at, length = random.randrange(len(data)), random.choice((8, 512))
    return data[:at] + bytes(len(data[at : at + length])) + data[at + length :]


def digit(random: random.Random, data: bytes, other: bytes) -> bytes:
    at = random.choice([at for at, byte in enumerate(data) if 48 <= byte < 58])
    return data[:at] + str(random.randrange(10)).encode() + data[at + 1 :]


def name(random: random.Random, data: bytes, other: bytes) -> bytes:
    found = random.choice((*map(str.encode, LOOKED_AT), b"smoothdiag_check", b"smoothdiag_trace"))
    starts = [at for at in range(len(data)) if data.startswith(found, at)]
    if not starts:
        return data
    at = random.choice(starts)
    wrong = bytearray(found)
    wrong[random.randrange(len(wrong))] = random.choice(b"abcxyz_0")
    return data[:at] + random.choice((bytes(wrong), found[1:], found.upper(), b"")) + data[at + len(found) :]


def word(random: random.Random, data: bytes, other: bytes) -> bytes:
    return data.replace(random.choice(STATUSES).encode(), random.choice(STATUSES).encode(), random.choice((1, 3, -1)))


def lines(random: random.Random, data: bytes, other: bytes) -> bytes:
    parts = data.splitlines(keepends=True)
    one, two = random.randrange(len(parts)), random.randrange(len(parts))
    what = random.randrange(6)
    if what == 0:
        del parts[one : one + random.choice((1, 2, 7))]
    elif what == 1:
        parts[one], parts[two] = parts[two], parts[one]
    elif what == 2:
        parts.insert(two, parts[one])
    elif what == 3:
        random.shuffle(parts)
    elif what == 4:
        parts.insert(one, random.choice((parts[0], *HOSTILE)))
    else:
        parts[one] = random.choice(other.splitlines(keepends=True))
    return b"".join(parts)


def ends(random: random.Random, data: bytes, other: bytes) -> bytes:
    return data.replace(b"\n", random.choice((b"\r\n", b"\r", b"\n\n", b"")), random.choice((1, -1)))


def joined(random: random.Random, data: bytes, other: bytes) -> bytes:
    part = other[random.choice((0, other.index(b"\n") + 1)) :]
    return random.choice((data + part, data[:-10] + part, part + data, data + data))


def encoded(random: random.Random, data: bytes, other: bytes) -> bytes:
    return data.decode().encode(random.choice(("utf-16", "utf-8-sig", "utf-32")))


MUTATIONS: tuple[Mutation, ...] = (
    flip, flip, lose, insert, cut, behead, zero, digit, digit, name, name, word, lines, lines, ends, joined, encoded,
)  # fmt: skip


def examine(path: Path, expected: dict[tuple, tuple], usual: list[str]) -> tuple[str, str]:
    """Returns the outcome of reading a file, and details if the outcome is wrong."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            trace = sd.Trace.read(path)
            trace.to_frame()
        except (ValueError, FileNotFoundError) as error:
            return ("refused", "") if path.name in str(error) else ("fault", f"names no file: {error}")
        except Exception:
            return "fault", traceback.format_exc()
    if bool(trace.problems) != bool(caught):
        return "fault", "only one of warning and problems"
    if trace.problems != usual:
        return "reported", ""
    found = [tuple(row[name] for name in LOOKED_AT) for row in trace]
    wrong = [row for row in found if expected.get(row[:3]) != row]
    if wrong or len(set(found)) < len(found):
        return "unreported", str(wrong[:3])
    return ("unchanged", "") if len(found) == len(expected) else ("fewer rows", "")


def mutate(suffix: str, number: int, seed: int = 0) -> tuple[Counter, list[str]]:
    """Returns counts of the outcomes of many mutations, and details of wrong outcomes."""
    counts: Counter[str] = Counter()
    details = []
    with tempfile.TemporaryDirectory() as folder:
        contents, usual = [], []
        for which in range(4):
            path = Path(folder) / f"{which}{suffix}"
            write(path, which)
            contents.append(path.read_bytes())
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                usual.append(sd.Trace.read(path).problems)
        path = Path(folder) / f"damaged{suffix}"
        for at in range(number):
            generator = random.Random(f"{seed} {at}")
            which, other = generator.sample(range(len(contents)), 2)
            mutation = generator.choice(MUTATIONS)
            path.write_bytes(mutation(generator, contents[which], contents[other]))
            expected = {}
            for row in recorded(which):
                values = tuple(row[name] for name in LOOKED_AT)
                expected[values[:3]] = values
            found, detail = examine(path, expected, usual[which])
            counts[found] += 1
            if found in ("unreported", "fault"):
                details.append(f"{mutation.__name__} {at}: {detail}")
    return counts, details


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--number", type=int, default=2000, help="mutations of each kind of file")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for suffix in (".jsonl", ".csv"):
        counts, details = mutate(suffix, arguments.number, arguments.seed)
        listed = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
        never = f"faults {counts['fault']}, unreported {counts['unreported']}"
        print(f"{suffix}: {arguments.number} mutations: {listed}; {never}")
        print("".join(f"  {detail}\n" for detail in details[:20]), end="")


if __name__ == "__main__":
    main()
