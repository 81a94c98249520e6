"""Charts as SVG that goes inside a page: its colours are the page's, its text stays text, its shapes and labels say
without colour what they mean. Each comes with words for those who cannot see it."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from typing import Any, Final

import msgspec

from kvmove.output import size

#: What is drawn with here -> the page's own colours, light or dark.
COLOURS: Final = {
    "#000101": "var(--ink)",
    "#000202": "var(--dim)",
    "#000303": "var(--line)",
    "#000404": "var(--card)",
    **{f"#0010{number:02d}": f"var(--c{number})" for number in range(1, 9)},
}
INK, DIM, LINE, CARD, *SERIES = COLOURS
MARKERS: Final = "osD^vP*X"
DASHES: Final = ((0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)), (0, (3, 1, 1, 1, 1, 1)))
HATCHES: Final = ("", "////", "....", "xxxx", "\\\\\\\\", "----")
WIDTH_IN: Final = 7.4


class Chart(msgspec.Struct, frozen=True):
    """``alt``: the same in words. ``svg``: without a foreign reference."""

    name: str
    alt: str
    svg: str

    @property
    def caption(self) -> str:
        """What is drawn, without what is read off it."""
        return self.alt.partition(": ")[0].partition(". ")[0].rstrip(".") + "."


class Line(msgspec.Struct, frozen=True):
    """Points by x; ``low`` and ``high``: where half of the samples lie. ``limit``: a bound, drawn with dashes."""

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    limit: bool = False


class Stack(msgspec.Struct, frozen=True):
    """One bar, of parts."""

    name: str
    parts: tuple[float, ...]


def _drawn(name: str, alt: str, height_in: float, draw: Callable[[Any, Any], None]) -> Chart:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    settings = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "font.family": "sans-serif",
        "font.size": 9.0,
        "axes.edgecolor": LINE,
        "axes.labelcolor": DIM,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": LINE,
        "grid.linewidth": 0.6,
        "text.color": INK,
        "xtick.color": LINE,
        "ytick.color": LINE,
        "xtick.labelcolor": DIM,
        "ytick.labelcolor": DIM,
        "hatch.color": CARD,
        "hatch.linewidth": 1.2,
        "legend.frameon": False,
        "legend.fontsize": 8.5,
        "axes.axisbelow": True,
    }
    with matplotlib.rc_context(settings):
        figure, axes = pyplot.subplots(figsize=(WIDTH_IN, height_in), layout="constrained")
        figure.patch.set_alpha(0)
        axes.patch.set_alpha(0)
        draw(figure, axes)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
        pyplot.close(figure)
    return Chart(name, alt, _inline(name, alt, out.getvalue()))


def _inline(name: str, alt: str, svg: str) -> str:
    """Matplotlib's file as an element of the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\s?xmlns(?::\w+)?="[^"]*"', "", svg).replace("xlink:href", "href")
    box = re.search(r'viewBox="[^"]*"', svg)
    label = alt.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    head = f'<svg {box.group(0) if box else ""} role="img" aria-label="{label}">'
    svg = re.sub(r"<svg[^>]*>", lambda _: head, svg, count=1)
    # Several of them share one page: names inside must be their own.
    ids = {found: f"{name}-{found}" for found in re.findall(r'\bid="([^"]+)"', svg)}
    svg = re.sub(r'\bid="([^"]+)"', lambda m: f'id="{ids[m.group(1)]}"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", lambda m: f"url(#{ids.get(m.group(1), m.group(1))})", svg)
    svg = re.sub(r'href="#([^"]+)"', lambda m: f'href="#{ids.get(m.group(1), m.group(1))}"', svg)
    for drawn, meant in COLOURS.items():
        svg = svg.replace(drawn, meant)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font: \1 system-ui, sans-serif", svg)
    return "\n".join(line.rstrip() for line in svg.splitlines()).strip()


def _legend(figure: Any, axes: Any, columns: int = 3) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower left", ncols=columns, handlelength=3)


def _bytes_axis(axes: Any, xs: Sequence[float]) -> None:
    axes.set_xscale("log", base=2)
    ticks = sorted(set(xs))
    if len(ticks) > 9:
        ticks = ticks[:: -(-len(ticks) // 9)]
    axes.set_xticks(ticks, [size(int(one)) for one in ticks])
    axes.minorticks_off()


def lines(name: str, alt: str, found: Sequence[Line], x_label: str, y_label: str, *, of_bytes: bool) -> Chart:
    """Values against a size or a count. What we are is solid with markers, what bounds us is dashed."""

    def draw(figure: Any, axes: Any) -> None:
        ours = limits = 0
        for line in found:
            colour = SERIES[(ours if not line.limit else 4 + limits) % len(SERIES)]
            style: Any
            if line.limit:
                style, marker, width = DASHES[limits % len(DASHES)], "", 1.3
                limits += 1
            else:
                style, marker, width = "-", MARKERS[ours % len(MARKERS)], 1.9
                ours += 1
            axes.plot(line.x, line.y, linestyle=style, marker=marker or None, color=colour, lw=width, ms=5,
                      label=line.name)  # fmt: skip
            if line.low and not line.limit:
                axes.fill_between(line.x, line.low, line.high, color=colour, alpha=0.16, lw=0)
        if of_bytes:
            _bytes_axis(axes, [one for line in found for one in line.x])
        else:
            ticks = sorted({one for line in found for one in line.x})
            axes.set_xticks(ticks, [f"{one:g}" for one in ticks])
        axes.set_ylim(bottom=0)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        _legend(figure, axes)

    return _drawn(name, alt, 3.9, draw)


def boxes(name: str, alt: str, found: Sequence[tuple[str, Sequence[float]]], x_label: str) -> Chart:
    """Every sample as a dot, and a box around the middle half, on a logarithmic scale; the first is the uppermost."""

    def draw(figure: Any, axes: Any) -> None:
        rows = list(reversed(found))
        line = {"color": INK, "lw": 1.1}
        axes.boxplot(
            [list(samples) for _, samples in rows], orientation="horizontal", showfliers=False, widths=0.55,
            tick_labels=[label for label, _ in rows], boxprops=line, whiskerprops=line, capprops=line,
            medianprops={"color": SERIES[0], "lw": 2.4},
        )  # fmt: skip
        for at, (_, samples) in enumerate(rows, 1):
            ys = [at + (number % 5 - 2) * 0.06 for number in range(len(samples))]
            axes.plot(samples, ys, ls="", marker="o", ms=3, color=DIM, alpha=0.6, mew=0)
        axes.set_xscale("log")
        _plain_log(axes.xaxis)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(x_label)

    return _drawn(name, alt, 0.9 + 0.34 * len(found), draw)


def _plain_log(axis: Any) -> None:
    """1, 2, 5, 10 instead of powers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0), numticks=20))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def stacks(name: str, alt: str, parts: Sequence[str], found: Sequence[Stack], x_label: str) -> Chart:
    """Horizontal bars of hatched parts; the first bar is the uppermost."""

    def draw(figure: Any, axes: Any) -> None:
        rows = list(reversed(found))
        left = [0.0] * len(rows)
        for number, part in enumerate(parts):
            widths = [row.parts[number] for row in rows]
            axes.barh([row.name for row in rows], widths, left=left, height=0.62, color=SERIES[number % len(SERIES)],
                      hatch=HATCHES[number % len(HATCHES)], edgecolor=CARD, lw=0.8, label=part)  # fmt: skip
            left = [a + b for a, b in zip(left, widths)]
        for at, total in enumerate(left):
            axes.annotate(f"{total:.2f}", (total, at), (4, 0), textcoords="offset points", va="center", fontsize=8)
        axes.set_xlim(right=max([*left, 1e-9]) * 1.09)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(x_label)
        _legend(figure, axes)

    return _drawn(name, alt, 1.15 + 0.34 * len(found), draw)


def scatter(name: str, alt: str, found: Sequence[tuple[float, float]], x_label: str, y_label: str) -> Chart:
    """Predicted against measured: on the line is right, in the band is within 15%."""

    def draw(figure: Any, axes: Any) -> None:
        least = min(min(pair) for pair in found) / 1.6
        most = max(max(pair) for pair in found) * 1.6
        axes.fill_between([least, most], [least * 0.85, most * 0.85], [least * 1.15, most * 1.15], color=SERIES[1],
                          alpha=0.18, lw=0, label="within 15%")  # fmt: skip
        axes.plot([least, most], [least, most], color=DIM, lw=1, ls="-", label="exactly right")
        xs, ys = zip(*found)
        axes.plot(xs, ys, ls="", marker="o", ms=6, color=SERIES[0], alpha=0.85, mew=0, label="a move")
        axes.set_xscale("log")
        axes.set_yscale("log")
        _plain_log(axes.xaxis)
        _plain_log(axes.yaxis)
        axes.set_xlim(least, most)
        axes.set_ylim(least, most)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        _legend(figure, axes)

    return _drawn(name, alt, 4.2, draw)
