"""What the quick runs of this folder take, from their results: writes the table into README.md."""

from experiment import HERE, ROOT, markdown, put
from kept import Kept

SCRIPTS = {
    "accounts": ("what popular accounts of clipping say", "accounts"),
    "zhang2019_lstm": ("smoothness follows the gradient norm (Zhang et al. 2019), LSTM", "zhang2019"),
    "zhang2019_resnet": ("the same, ResNet-20", "zhang2019"),
    "zhang2020": ("the order of SGDClip, MomClip and MixClip (Zhang et al. 2020)", "zhang2020"),
    "scion": ("ClippedScion against Scion and AdamW (Pethick et al. 2025)", "scion"),
    "layers": ("layer-wise constants from consecutive batches (Riabinin et al. 2025)", "layers"),
    "which_law": ("which law holds where", "which_law"),
    "law_chances": ("what such scans say by chance, simulated", "which_law"),
    "edge": ("sharpness at the limit of stability (Cohen et al. 2021, Andreyev et al. 2026)", "edge"),
}
"""By script: the claim that is measured again, and its page in docs/reproduce."""


def table() -> str:
    """Returns the scripts with the number of their runs and the CPU minutes that these took."""
    rows: list[tuple[str, ...]] = []
    runs = minutes = 0.0
    for script, (claim, page) in SCRIPTS.items():
        seconds = Kept(HERE / "results" / f"{script}-quick.jsonl").frame()["seconds"]
        rows.append(
            (f"`{script}.py`", claim, f"docs/reproduce/{page}.md", f"{len(seconds)}", f"{seconds.sum() / 60:.1f}")
        )
        runs, minutes = runs + len(seconds), minutes + seconds.sum() / 60
    rows.append(("all", "", "", f"{runs:.0f}", f"{minutes:.0f}"))
    return markdown(["script", "claim", "page", "runs", "CPU minutes"], rows)


def main() -> None:
    page = HERE / "README.md"
    page.write_text(put(page.read_text(encoding="utf-8"), "costs.py", {"costs": table()}), encoding="utf-8")
    print(table(), f"\nwritten into {page.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
