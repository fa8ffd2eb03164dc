"""A comparison as lines and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .quality import LanguageQuality, RewardQuality


def lines(found: dict[str, Any]) -> list[str]:
    """The table of a result with `reference`, `candidate` and `figures`."""
    figures = found["figures"]
    head = [f"reference  {found['reference']}", f"candidate  {found['candidate']}", ""]
    return head + (_language(found, figures) if "kl_mean" in figures else _reward(figures))


def _language(found: dict[str, Any], figures: dict[str, Any]) -> list[str]:
    least = "" if found["exact"] else "at least "
    before, after, change = (figures[f"perplexity_{name}"] for name in ("reference", "candidate", "change"))
    rows = [
        _row("perplexity", f"{after:.4f}", f"reference {before:.4f}, {change:+.2%}"),
        _row("KL divergence, mean", f"{least}{figures['kl_mean']:.2e}", "nats per token"),
        _row("KL divergence, p99", f"{least}{figures['kl_p99']:.2e}", "nats"),
        _row("top-1 agreement", f"{figures['top1_agreement']:.2%}", f"of {figures['tokens']:,} tokens"),
    ]
    if not found["exact"]:
        rows += [
            "",
            f"A server tells the {found['top']} most likely tokens: all that both lists lack count as one, so that",
        ]
        rows += ["divergences are lower bounds. Perplexities and agreement are exact."]
    return rows


def _reward(figures: dict[str, Any]) -> list[str]:
    return [
        _row("ranking agreement", f"{figures['ranking_agreement']:.2%}", f"of {figures['pairs']:,} pairs"),
        _row("Pearson", f"{figures['pearson']:.5f}", f"of {figures['texts']:,} scores"),
        _row("Spearman", f"{figures['spearman']:.5f}", ""),
        _row("largest difference", f"{figures['largest_difference']:.3g}", "of a score"),
    ]


def _row(name: str, figure: str, beside: str) -> str:
    return f"{name:22}{figure:>20}  {beside}".rstrip()


def draw(found: LanguageQuality | RewardQuality, title: str, path: Path) -> None:
    """How the divergences are distributed, or the scores of one beside the other's. Raises ImportError and OSError."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    if isinstance(found, LanguageQuality):
        values = sorted(max(value, 1e-9) for value in found.divergences)
        axes.step(values, [place / len(values) for place in range(1, len(values) + 1)], where="post")
        axes.set(xscale="log", xlabel="KL(reference ‖ candidate), nats", ylabel="share of tokens up to it", ylim=(0, 1))
    else:
        for reference, candidate in found.groups:
            axes.plot(reference, candidate, ".", color="C0", markersize=3)
        axes.axline((0, 0), slope=1, color="grey", linestyle=":")
        axes.set(xlabel="score of the reference", ylabel="score of the candidate")
    axes.set_title(title, fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
