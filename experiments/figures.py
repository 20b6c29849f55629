"""The figures of READMEs, drawn from recorded results: python experiments/figures.py

Equal results give equal files. tests/test_notebooks.py holds the committed files to it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from gve.eval.charts import draw_bands
from gve.eval.curves import moving_band, read_scalars
from gve.eval.report import radar

ROOT = Path(__file__).resolve().parent.parent
QUICKSTART = ROOT / "experiments" / "0000-quickstart"
CURVES = ROOT / "tests" / "samples" / "quickstart"
FOUR = {
    "loss": "train/loss",
    "mean relevance score": "train/mean_relevance",
    "max-negative gap": "train/max_negative_gap",
    "mean positive score": "train/mean_positive",
}


def quickstart_radar() -> Figure:
    """Abilities of the quickstart: trained, untrained, chance."""
    return radar(json.loads((QUICKSTART / "uvrb.json").read_text()))


def quickstart_training() -> Figure:
    """The paper's four curves of the quickstart."""
    curves = read_scalars(CURVES)
    bands = {title: {"": moving_band(curves[tag])} for title, tag in FOUR.items()}
    return draw_bands(bands, "step (mean of 200 steps and standard deviation)")


FIGURES = {
    QUICKSTART / "radar.svg": quickstart_radar,
    QUICKSTART / "training.svg": quickstart_training,
}


def save(figure: Figure, path: Path) -> None:
    """Writes one figure; letters are outlines, since an image in a README brings no fonts."""
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": path.stem}):
        figure.savefig(path, metadata={"Date": None, "Creator": None})
    # Matplotlib ends some lines with a blank, which git complains about.
    path.write_text("".join(line.rstrip() + "\n" for line in path.read_text().splitlines()))


def main(folder: Path | None = None) -> None:
    """Draws all figures, into their places or into another folder."""
    for path, draw in FIGURES.items():
        save(draw(), folder / path.name if folder else path)
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
