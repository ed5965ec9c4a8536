"""The picture of `glm_proof.py`; by itself it draws the figures of an earlier run again.

python examples/glm_proof_picture.py glm-proof
"""

import json
import statistics
import sys
from pathlib import Path

# For each panel its title and axis; for each bar its label, model, figure and colour.
PANELS = {
    ("(a) short blanks in the middle", "perplexity of the blank's tokens"): (
        ("causal, left context", "causal", "blank_perplexity", "C0"),
        ("GLM", "glm_blanks", "blank_perplexity", "C1"),
        ("GLM, length known", "glm_blanks", "blank_perplexity_length_known", "C1"),
    ),
    ("(a) short blanks in the middle", "exact match"): (
        ("causal, length known", "causal", "blank_exact_length_known", "C0"),
        ("GLM, ends by itself", "glm_blanks", "blank_exact", "C1"),
        ("GLM, length known", "glm_blanks", "blank_exact_length_known", "C1"),
    ),
    ("(b) second halves of rows", "perplexity"): (
        ("causal", "causal", "second_half_perplexity", "C0"),
        ("GLM, first half\nread both ways", "glm_document", "second_half_perplexity", "C1"),
        ("GLM, first half\nread one way", "glm_document", "second_half_perplexity_unidirectional", "C3"),
    ),
    ("(c) the same weights, two readings", "perplexity"): (
        ("blank, both ways", "glm_blanks", "blank_perplexity", "C1"),
        ("blank, one way", "glm_blanks", "blank_perplexity_unidirectional", "C3"),
        ("last word, both ways", "glm_document", "word_perplexity", "C1"),
        ("last word, one way", "glm_document", "word_perplexity_unidirectional", "C3"),
    ),
}


def draw(path: Path, seeds: dict[str, dict[str, dict[str, float]]]) -> None:
    """Bars of the means, with a dot for each seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(2, 2, figsize=(9.5, 5.6), dpi=100)
    for axes, ((title, unit), bars) in zip(grid.flat, PANELS.items(), strict=True):
        for place, (_, model, name, colour) in enumerate(bars):
            values = [run[model][name] for run in seeds.values()]
            mean = statistics.mean(values)
            axes.barh(place, mean, color=colour, alpha=0.75)
            axes.plot(values, [place] * len(values), "k.", markersize=4)
            axes.annotate(f"{mean:.2f}", (max(values), place), xytext=(5, 0), textcoords="offset points", va="center")
        axes.set_yticks(range(len(bars)), [label for label, *_ in bars])
        axes.invert_yaxis()
        axes.set_xlim(0, 1.12 * axes.get_xlim()[1])
        axes.set_xlabel(unit)
        axes.set_title(title, loc="left", fontsize=11)
        axes.grid(axis="x", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    draw(folder / "glm-proof.png", json.loads((folder / "results.json").read_text("utf-8"))["seeds"])
