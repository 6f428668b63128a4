"""Pictures of results."""

from __future__ import annotations

from collections.abc import Mapping


def plot_bars(path: str, title: str, unit: str, values: Mapping[str, float]) -> None:
    """Writes a PNG with one horizontal bar for each value, the references in grey."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 0.6 * len(values) + 1.4), layout="constrained")
    names = list(values)[::-1]
    colours = ["#1f6f8b" if name.startswith("embeam") else "#b8b8b8" for name in names]
    bars = axes.barh(names, [values[name] for name in names], color=colours)
    axes.bar_label(bars, fmt="{:,.0f}", padding=4)
    axes.set_xlabel(unit)
    axes.set_title(title, loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.12)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
