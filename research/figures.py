"""Tables and plots of the finished studies, which ``docs/make.py`` puts into the documentation."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

from cut_cross_entropy.benchmark.methods import METHODS
from docs.benchmark_runs import BOTH, PROBLEM, Measurements, data_title, title
from docs.page import Row, cell, table
from docs.plots import COLORS, Plot
from research.tails import BLOCK


def largest(kept: Measurements) -> str:
    """Largest batches."""
    found: dict[str, dict[str, str]] = {}
    limits: dict[str, None] = {}
    for content in kept.parts("largest")[:1]:
        for row in content["rows"]:
            limit = f"within {row['limit_gib']:g} GiB"
            limits[limit] = None
            more = " or more" * (row["tokens"] >= content["most"])
            line = found.setdefault(row["method"], {"title": title(row["method"])})
            line[limit] = f"{row['tokens']:,.0f}{more}"
    lines = [found[method] for method in METHODS if method in found]
    return table(lines, [("method", "{title}"), *((limit, f"{{{limit}}}") for limit in limits)])


def parts(kept: Measurements) -> str:
    """Simulated gain of each part of the filter, with the times of those that exist."""
    exists = {"no filter": "cce_exact", "strips and tail, classes by mask": "cce",
              "tiles, classes by mean logit": "apple"}  # fmt: skip
    timed = kept.of(kind=BOTH).set_index(PROBLEM)["runtime_ms"]

    def time(row: Row) -> str:
        method = exists.get(row["part"], "")
        ms = timed.get((row["test_data"], method))
        return "" if ms is None else f"{ms:.1f} ms ({title(method)})"

    rows = [row for content in kept.parts("simulate")[:1] for row in content["rows"]]
    for row in rows:
        row |= {f"multiple_{x}": row[f"error_{x}"] / row[f"rounding_{x}"] for x in "ec"}
    return table(
        rows,
        [("data", lambda row: data_title(row["test_data"])), ("part", "{part}"),
         ("kept", "{kept:.1%}"), ("error of dE", "{error_e:.3%} ({multiple_e:.1f})"),
         ("of dC", "{error_c:.3%} ({multiple_c:.1f})"), ("pairs in dC", "{pairs:.1f}"),
         ("time measured", time)],
    )  # fmt: skip


def rank_sentence(kept: Measurements) -> str:
    """The rank curve in words."""
    return "\n".join(
        f"{data_title(name)}, {curve['tokens']:,} tokens: on average "
        f"{curve['above_cutoff']:.0f} of {curve['classes']:,} classes lie above the cut-off, and "
        f"they hold {curve['mass_above_cutoff']:.1%} of the probability."
        for content in kept.parts("ranks")[:1]
        for name, curve in content["curves"].items()
    )


def ranks(content: dict[str, Any]) -> Plot:
    """Probability by rank of the class, and Apple's threshold."""
    titles = {"smollm2": "SmolLM2 135M on real text"}
    data = pd.DataFrame({"name": titles.get(k, k), **v} for k, v in content["curves"].items())
    title = cell(data.iloc[0], "{name}: {tokens:,} tokens, {classes:,} classes")
    return Plot("ranks", title * (len(data) == 1), draw_ranks, data)


def draw_ranks(figure: Any, data: pd.DataFrame) -> None:
    """Draw the mean as a line and the 10th to 90th percentile of the tokens as a band."""
    figure.set_size_inches(9, 5)
    ax = figure.subplots()
    for found, color in zip(data.to_dict("records"), COLORS.values(), strict=False):
        name = cell(found, "{name}, {tokens:,} tokens") * (len(data) > 1) or "mean over the tokens"
        ax.plot(found["ranks"], found["mean"], color=color, label=name)
        ax.fill_between(found["ranks"], found["low"], found["high"], alpha=0.18, color=color,
                        linewidth=0, label="10th to 90th percentile of the tokens")  # fmt: skip
    ax.axhline(data["cutoff"].iloc[0], color="black", linewidth=1, linestyle="--",
               label="threshold of Apple's filter for bfloat16, $2^{-12}$")  # fmt: skip
    ax.set(
        xscale="log", yscale="log", ylim=(1e-10, 1),
        xlabel="rank of the class among the token's classes, 1 is the likeliest (log scale)",
        ylabel="probability of the class (log scale)",
    )  # fmt: skip
    ax.xaxis.set_major_formatter("{x:,.0f}")
    ax.legend()


def strips() -> Plot:
    """Probabilities, the strips that are kept, and the rank-one matrix for the rest."""
    return Plot("strips", "", draw_strips, pd.DataFrame())


def draw_strips(figure: Any, _: pd.DataFrame) -> None:
    """Draw the filter at work on a small softmax of a low-rank product, strips by energy."""
    from matplotlib.colors import LogNorm

    tokens, classes, strip = 48, 96, 8
    random = np.random.default_rng(3)
    topics = random.normal(size=(tokens // strip, 6)).repeat(strip, 0)
    e = topics * 1.1 + 0.8 * random.normal(size=(tokens, 6))
    c = random.normal(size=(classes, 6))
    logits = e @ c.T - 1.1 * np.log(np.arange(classes) + 1.5)
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    energy = np.square(p).reshape(-1, strip, classes).sum(1)
    order = np.sort(energy, axis=None)
    threshold = order[np.searchsorted(np.cumsum(order), 0.003 * energy.sum())]
    kept = (energy >= threshold).repeat(strip, 0)
    mass = np.where(kept, 0, p).sum(1)
    weight = np.sqrt(np.where(energy >= threshold, 0, energy)).sum(0)
    panels = (
        (p, f"probabilities of {tokens} tokens x {classes} classes"),
        (np.where(kept, p, np.nan), f"kept: strips of {strip} tokens, {kept.mean():.0%}"),
        (np.outer(mass, weight) / weight.sum(), "in place of the rest: a column times a row"),
    )
    figure.set_size_inches(12, 3.5)
    axes = figure.subplots(1, 3)
    for ax, (values, text) in zip(axes, panels, strict=True):
        shown = ax.imshow(values, norm=LogNorm(1e-4, 1), cmap="magma_r", aspect="auto",
                          interpolation="nearest")  # fmt: skip
        ax.set_title(text, fontsize=11)
        ax.set(xlabel="classes, frequent ones first", yticks=[])
        for line in range(strip, tokens, strip):
            ax.axhline(line - 0.5, color="gray", linewidth=0.4)
    axes[0].set_ylabel("tokens")
    figure.colorbar(shown, ax=axes, shrink=0.8, label="probability (log scale)")


def kept_strips(content: dict[str, Any]) -> Plot | None:
    """Strips that the filter keeps, with tokens in the order of the text and in order of content.

    None if no problem has its masks.
    """
    known = {name: each for name, each in content["problems"].items() if "masks" in each["text"]}
    if not known:
        return None
    name, found = next(iter(known.items()))
    blocks = found["tokens"] // BLOCK
    title = (f"{data_title(name)}: strips kept in {blocks} blocks of {BLOCK} tokens, at the same "
             "tolerance")  # fmt: skip
    names = {"text": "order of the text", "content": "order of content"}
    data = pd.DataFrame(
        {"order": label, "blocks": blocks, "kept": found[key]["kept"], "mask": mask}
        for key, label in names.items()
        for mask in found[key]["masks"]
    )
    return Plot("kept_strips", title, draw_kept_strips, data)


def draw_kept_strips(figure: Any, data: pd.DataFrame) -> None:
    """Draw a panel for each order: a column for each class, black where a block keeps it."""
    figure.set_size_inches(12, 4.4)
    axes = figure.subplots(1, 2, sharey=True)
    for ax, (label, own) in zip(axes, data.groupby("order", sort=False), strict=True):
        blocks = own["blocks"].iloc[0]
        kept = np.array([list(f"{int(mask, 16):0{blocks}b}") for mask in own["mask"]]) == "1"
        count = kept.sum(1)
        middle = kept @ np.arange(blocks) / count
        # Classes of many blocks first, then those of early blocks.
        place = np.where(count >= 3 / 8 * blocks, -count, blocks + middle)
        image = kept[np.argsort(place, kind="stable")].T
        ax.imshow(image, aspect="auto", cmap="Greys", interpolation="nearest")
        ax.set_title(f"{label}: {own['kept'].iloc[0]:.2%} of all strips", fontsize=11)
        ax.set(xlabel="classes (a sample; those that no block keeps are left out)")
    axes[0].set_ylabel("blocks of tokens")


def tails(content: dict[str, Any]) -> Plot:
    """Probability outside the likeliest classes, of real heads and of made data."""
    names = {"broad": "made, broad", "structured": "made, structured"}
    data = pd.DataFrame(
        {
            "name": names.get(name.split(":")[0], data_title(name)) + f" (V {found['classes']:,})",
            "made": ":" in name,
            "ranks": found["ranks"],
            "outside": found["outside"],
        }
        for name, found in content["problems"].items()
    )
    title = "How much of a token's probability lies outside its likeliest classes"
    return Plot("tails", title, draw_tails, data)


def draw_tails(figure: Any, data: pd.DataFrame) -> None:
    """Draw a line for each problem, dashed for made data."""
    figure.set_size_inches(9, 5)
    ax = figure.subplots()
    for found, color in zip(data.to_dict("records"), COLORS.values(), strict=False):
        style = "--" if found["made"] else "-"
        ax.plot(found["ranks"], found["outside"], style, color=color, label=found["name"])
    ax.set(
        xscale="log", yscale="log", ylim=(1e-5, 1),
        xlabel="likeliest classes of the token that are counted (log scale)",
        ylabel="probability outside them, mean over tokens (log scale)",
    )  # fmt: skip
    ax.xaxis.set_major_formatter("{x:,.0f}")
    ax.legend()


def estimates(content: dict[str, Any]) -> pd.DataFrame:
    """Return a row for each gradient of each problem: the truth, and what was estimated."""
    return pd.DataFrame(
        {
            "name": data_title(row["test_data"]),
            "is_default": row["filter"] == "auto",
            "gradient": gradient,
            "truth": truth,
            "ratio": estimate / truth,
        }
        for row in content["rows"]
        for gradient, estimate, truth in zip(
            ("dE", "dC"), row["estimates"], row["truth"], strict=True
        )
    )


def measured_error(kept: Measurements) -> str:
    """Scatter of the estimated errors, and the errors of the default."""
    lines = []
    for content in kept.parts("measured-error")[:1]:
        for (name, gradient), own in estimates(content).groupby(["name", "gradient"], sort=False):
            default, ratio = own[own["is_default"]], own["ratio"]
            lines.append({
                "problems": f"{len(own)} of {name}", "gradient": gradient, "number": len(default),
                "worst": default["truth"].max(), "least": own["truth"].min(),
                "most": own["truth"].max(),
                **{f"at{p}": ratio.quantile(p / 100) for p in (0, 5, 50, 95, 100)},
            })  # fmt: skip
    return table(
        lines,
        [("problems", "{problems}"), ("gradient", "{gradient}"),
         ("truth, × bf16 rounding", "{least:.2f} to {most:.2f}"),
         ("most with the default", "{worst:.2f}"), ("estimate / truth: least", "{at0:.2f}"),
         *((f"{p} %", f"{{at{p}:.2f}}") for p in (5, 50, 95)), ("most", "{at100:.2f}")],
    )  # fmt: skip


def estimated_and_true(content: dict[str, Any]) -> Plot:
    """Estimate over truth of every problem."""
    return Plot(
        "measured_error",
        "Estimated errors of the filtered gradients, relative to the true ones",
        draw_estimates,
        estimates(content),
    )


def draw_estimates(figure: Any, data: pd.DataFrame) -> None:
    """Draw a panel for each gradient: a point for each problem, filled for the default filter."""
    figure.set_size_inches(10, 4.4)
    axes = figure.subplots(1, 2, sharey=True)
    for ax, (gradient, both) in zip(axes, data.groupby("gradient", sort=False), strict=True):
        for (name, own), color in zip(
            both.groupby("name", sort=False), COLORS.values(), strict=False
        ):
            for is_default, label in ((True, f"{name}, default"), (False, "a wide tolerance")):
                some = own[own["is_default"] == is_default]
                ax.scatter(some["truth"], some["ratio"], s=28, edgecolors=color, label=label,
                           facecolors=color if is_default else "none")  # fmt: skip
        ax.axhline(1, color="black", linewidth=1)
        ax.axvline(2, color="black", linewidth=1, linestyle="--")
        ax.set(xscale="log", xlabel=f"error of {gradient}, × bf16 rounding (log scale)")
        ax.set_xticks([1, 2, 4, 8], ["1", "2", "4", "8"])
        ax.minorticks_off()
    axes[0].set_ylabel("estimate / truth")
    axes[1].legend(fontsize=9)


BLOCKS: dict[str, Callable[[Measurements], str]] = {
    "largest": largest,
    "measured-error": measured_error,
    "parts": parts,
    "ranks": rank_sentence,
}


def plots_of(kept: Measurements) -> list[Plot]:
    """Return the plots of all studies."""
    found = [strips(), *(ranks(content) for content in kept.parts("ranks")[:1])]
    for content in kept.parts("tail-curves")[:1]:
        found += [kept_strips(content), tails(content)]
    found += [estimated_and_true(content) for content in kept.parts("measured-error")[:1]]
    return [plot for plot in found if plot is not None]
