"""Every picture of the pages, into figures/.

    python -m experiments.figures                       all of them
    python -m experiments.figures architecture alpha    these alone

The DRAWINGS come out byte for byte alike under one version of matplotlib. The others show what a network does. They
need hands/ and runs/hands/, which the first command of README.md makes, and are as alike as two trainings are.
"""

import csv
import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch

from data import open_dataset
from evaluate import evaluate_split, load, scores
from experiments.tables import NAMED, read_rows, scores_of
from gates_triton import PASSES
from support.checkpoints import read_checkpoint

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle  # noqa: E402

RUN = Path("runs/hands")
BLUE, GREEN, RED, GREY = "#3b6ea8", "#2a9d6f", "#c8553d", "#6b7280"
plt.rcParams |= {"font.size": 9, "axes.titlesize": 9, "savefig.dpi": 110}
plt.rcParams |= {"axes.spines.top": False, "axes.spines.right": False}

# ---------------------------------------------------------------- drawings


def draw_arrow(ax, start, end, color="black", bend=0.0, style="-", lw=1.0):
    shape = dict(connectionstyle=f"arc3,rad={bend}", arrowstyle="-|>", mutation_scale=9, linestyle=style, linewidth=lw)
    ax.add_patch(FancyArrowPatch(start, end, color=color, shrinkA=0, shrinkB=0, **shape))


MIDDLE = dict(ha="center", va="center")


def draw_small_u(ax, x, y, levels, step, box):
    """A U of boxes, encoder down and decoder up, its top left corner at x, y."""
    for i in range(levels):
        for left in {x + i * step[0], x + (2 * (levels - 1) - i) * step[0]}:  # one at the bottom
            ax.add_patch(Rectangle((left, y - i * step[1] - box[1]), *box, color=BLUE, alpha=0.9, lw=0))


def draw_architecture():
    widths, box, step, right = (8, 16, 32, 64, 128), (0.62, 0.5), 0.75, 7.2
    figure, axes = plt.subplots(1, 3, figsize=(11, 4.4), layout="constrained")
    for ax, level in zip(axes, (4, 3, 0)):
        ax.set(xlim=(-0.6, 8.4), ylim=(-5.6, 2.1), title=f"l = {level}")
        ax.axis("off")
        for i in range(level):  # what stays of the U-Net
            y = -i
            for left in (i * step, right - i * step):
                ax.add_patch(Rectangle((left, y - box[1]), *box, color=BLUE, lw=0))
                ax.text(left + box[0] / 2, y - box[1] / 2, widths[i], color="white", fontsize=8, **MIDDLE)
            draw_arrow(ax, (i * step + box[0], y - 0.25), (right - i * step, y - 0.25), GREY, lw=0.7)
            if i:
                draw_arrow(ax, ((i - 1) * step + 0.3, y + 1 - box[1]), (i * step + 0.2, y))
                draw_arrow(ax, (right - i * step + 0.4, y), (right - (i - 1) * step + 0.3, y + 1 - box[1]))
        # the recurrent unit: each f inside is a small U of the widths that it replaces
        tail = widths[level:]
        mini, small = (0.16, 0.36), (0.2 if level < 4 else 0.34, 0.24)
        reach = 2 * (len(tail) - 1) * mini[0] + small[0]
        height = (len(tail) - 1) * mini[1] + small[1] + 0.75
        wide = 3 * reach + 4 * 0.3
        x0, y0 = 3.91 - wide / 2, -max(level, 1) + (0.9 if level == 0 else 0.15)
        how = dict(boxstyle="round,pad=0.08", fc="#e4f3ec", ec=GREEN, lw=1.4)
        ax.add_patch(FancyBboxPatch((x0, y0 - height), wide, height, **how))
        for k, name in enumerate(("$f_z$", "$f_r$", "$f_c$")):
            left = x0 + 0.3 + k * (reach + 0.3)
            draw_small_u(ax, left, y0 - 0.45, len(tail), mini, small)
            ax.text(left + reach / 2, y0 - 0.2, name, **MIDDLE)
        ax.text(3.91, y0 - height - 0.3, "recurrent unit, state $h_t$", **MIDDLE, color=GREEN)
        beside = x0 + wide + 0.1
        draw_arrow(ax, (beside, y0 - 0.75 * height), (beside, y0 - 0.25 * height), GREEN, bend=1.6, style="--", lw=1.4)
        if level:
            y = 1 - level - box[1]
            draw_arrow(ax, ((level - 1) * step + 0.3, y), (x0, y0 - 0.3))
            draw_arrow(ax, (x0 + wide + 0.08, y0 - 0.1), (right - (level - 1) * step + 0.3, y))
            ends = (0.3, 0.0), (right + 0.3, 0.0)
        else:
            ends = (x0 + 0.4, y0 + 0.08), (x0 + wide - 0.4, y0 + 0.08)
        draw_arrow(ax, (0.3, 0.75), ends[0])
        draw_arrow(ax, ends[1], (right + 0.3, 0.75))
        ax.text(0.0, 1.0, "image, $s_{t-1}$", **MIDDLE)
        ax.text(right + 0.4, 1.0, "$s_t$", **MIDDLE, color=RED)
        draw_arrow(ax, (right + 0.25, 1.25), (0.6, 1.25), RED, bend=0.12, style="--", lw=1.4)
    keep_figure(figure, "architecture")


def draw_alpha():
    figure, axes = plt.subplots(1, 3, figsize=(7.5, 2.2), sharey=True, layout="constrained")
    for ax, value in zip(axes, (1, 0.7, 0.4)):
        weights = [value ** (3 - t) for t in (1, 2, 3)]
        ax.bar((1, 2, 3), weights, color=BLUE)
        for t, weight in enumerate(weights, 1):
            ax.text(t, weight + 0.02, f"{weight:.2f}", ha="center")
        ax.set(title=rf"$\alpha$ = {value}", xticks=(1, 2, 3), xlabel="pass t", ylim=(0, 1.2))
    axes[0].set_ylabel(r"weight $\alpha^{N-t}$")
    keep_figure(figure, "alpha")


def draw_traffic():
    figure, axes = plt.subplots(1, 3, figsize=(9.5, 2.6), sharex=True, layout="constrained")
    for ax, gate in zip(axes, ("update", "reset", "norm")):
        for y, way in enumerate(("forward", "backward")):
            fused, eager, _ = PASSES[gate, way]
            for dy, count, color, name in ((0.2, eager, GREY, "eager"), (-0.2, fused, GREEN, "fused")):
                ax.barh(1 - y + dy, count, 0.36, color=color, label=name if not y else None)
                ax.text(count + 0.3, 1 - y + dy, count, va="center")
        title = "norm and ReLU" if gate == "norm" else gate
        ax.set(title=title, yticks=(1, 0), yticklabels=("forward", "backward"), xlabel="memory passes", xlim=(0, 26))
    axes[1].legend(loc="lower right", frameon=False)
    keep_figure(figure, "traffic")


def draw_growth():
    """What `bench --grow` measured."""
    rows = read_rows("growth.csv")
    figure, axes = plt.subplots(1, 3, figsize=(9.5, 2.8), sharey=True, layout="constrained")
    for ax, axis in zip(axes, ("passes", "side", "batch")):
        x, ms, mb = ([float(row[name]) for row in rows if row["axis"] == axis] for name in ("value", "ms", "MB"))
        ax.plot(x, ms, "o-", color=BLUE, label="milliseconds")
        ax.plot(x, mb, "s-", color=RED, label="MB")
        label = {"side": "side of the image", "batch": "images at once"}.get(axis, axis)
        ax.set(xscale="log", yscale="log", xlabel=label)
        ax.set_xticks(x, [f"{v:.0f}" for v in x])
        ax.minorticks_off()
    axes[0].legend(frameon=False)
    keep_figure(figure, "growth")


SHOWN = {"U-Net-B": GREY, "U-Net-G": GREY, "U-Net-G, 3 x steps": GREY, "Rec-Simple": BLUE, "Rec-Middle": BLUE,
         "Rec-Last": BLUE, "SRU(4)": GREEN, "DRU(4)": GREEN, "SRU(0)": GREEN, "DRU(0)": GREEN}  # fmt: skip


def draw_evidence():
    """The last pass's test score of every seed."""
    figure, axes = plt.subplots(1, len(NAMED), figsize=(11, 3), sharey=True, layout="constrained")
    for ax, (data, name) in zip(axes, NAMED.items()):
        for y, (system, color) in enumerate(SHOWN.items()):
            values = scores_of(data, system)
            ax.plot(values, [y] * len(values), "o", color=color)
        ax.set(title=name, yticks=range(len(SHOWN)), yticklabels=list(SHOWN))
        ax.margins(x=0.2)
        ax.locator_params(axis="x", nbins=5)
        ax.grid(axis="x", alpha=0.3)
    axes[0].invert_yaxis()
    keep_figure(figure, "evidence")


# ---------------------------------------------------------------- what a trained network does


def load_example():
    """The network that README's first command trains, and the test photos of its data."""
    try:
        model, config = load(RUN / "best.pt"), read_checkpoint(RUN / "best.pt")["config"]
        return model, open_dataset(config["data"], "test")
    except ValueError as error:
        raise ValueError(f"{error}. The first command of README.md draws hands/ and trains runs/hands/") from None


def show_picture(ax, picture, title="", **how):
    ax.imshow(np.asarray(picture), **how)
    ax.set_title(title)
    ax.axis("off")


@torch.no_grad()
def look_inside(net, image, passes=3):
    """Every pass over one image (1, 3, H, W): the foreground's probability p, and z, r, h, each (C, h, w)."""
    seen = []
    hooks = [
        net.unit.net_z.register_forward_hook(lambda m, i, a: seen[-1].update(z=a.sigmoid()[0])),
        net.unit.net_r.register_forward_hook(lambda m, i, a: seen[-1].update(r=a.sigmoid()[0])),
    ]
    state = net.start(image)
    for _ in range(passes):
        seen.append({})
        s, state = net.step(image, state)
        seen[-1].update(p=s.softmax(1)[0, 1], h=state[1][0])
    for hook in hooks:
        hook.remove()
    return seen


def most_changed(model, photos, count):
    """(photo, truth, passes) of the photos whose mask changes most from the first pass to the last."""
    pairs = map(photos.pictures, range(len(photos)))
    every = [(photo, truth, look_inside(model.net, model.to_input(photo))) for photo, truth in pairs]
    return sorted(every, key=lambda found: -(found[2][-1]["p"] - found[2][0]["p"]).abs().mean())[:count]


def draw_passes():
    figure, axes = plt.subplots(3, 5, figsize=(9.5, 4.6), layout="constrained")
    for line, (photo, truth, seen) in zip(axes, most_changed(*load_example(), 3)):
        show_picture(line[0], photo)
        show_picture(line[1], truth, cmap="gray")
        for ax, at in zip(line[2:], seen):
            show_picture(ax, at["p"], cmap="magma", vmin=0, vmax=1)
    for ax, title in zip(axes[0], ("photo", "truth", "pass 1", "pass 2", "pass 3")):
        ax.set_title(title)
    keep_figure(figure, "passes")


def draw_gates():
    ((photo, _, seen),) = most_changed(*load_example(), 1)
    figure, axes = plt.subplots(3, 5, figsize=(9.5, 4.8), layout="constrained")
    varied = {name: seen[-1][name].std((1, 2), correction=0).argmax() for name in "zrh"}  # the channel that varies most
    for t, (line, at) in enumerate(zip(axes, seen), 1):
        show_picture(line[0], photo, f"pass {t}: photo")
        for ax, name, cmap, low in zip(line[1:], "zrh", ("viridis", "viridis", "coolwarm"), (0, 0, -1)):
            show_picture(ax, at[name][varied[name]], f"{name}, channel {varied[name]}", cmap=cmap, vmin=low, vmax=1)
        show_picture(line[4], at["p"], "probability of hand", cmap="magma", vmin=0, vmax=1)
    keep_figure(figure, "gates")


def draw_more_passes():
    model, photos = load_example()
    model.passes = 6
    figure, ax = plt.subplots(figsize=(4.6, 2.8), layout="constrained")
    values = [scores(matrix)["IoU"] for matrix in evaluate_split(model, photos)[0]]
    ax.axvspan(0.7, 3.5, color=GREEN, alpha=0.1, lw=0)
    ax.plot(range(1, 7), values, "o-", color=BLUE)
    ax.set(xlabel="passes at test time", ylabel="IoU of the hands", xlim=(0.7, 6.3))
    ax.set_title("shaded: the passes it was trained with")
    keep_figure(figure, "more_passes")


def draw_curves():
    load_example()
    with open(RUN / "log.csv") as file:
        log = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    epochs = [row["epoch"] for row in log]
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 2.8), layout="constrained")
    left.plot(epochs, [row["loss"] for row in log], color=BLUE)
    left.set(xlabel="epoch", ylabel="training loss", yscale="log")
    for t, color in zip((1, 2, 3), (GREY, BLUE, GREEN)):
        right.plot(epochs, [row[f"IoU_{t}"] for row in log], color=color, label=f"pass {t}")
    right.set(xlabel="epoch", ylabel="validation IoU")
    right.legend(frameon=False)
    keep_figure(figure, "curves")


DRAWINGS = {"architecture": draw_architecture, "alpha": draw_alpha, "traffic": draw_traffic, "growth": draw_growth,
            "evidence": draw_evidence}  # fmt: skip
TRAINED = {"passes": draw_passes, "gates": draw_gates, "more_passes": draw_more_passes, "curves": draw_curves}
FIGURES = DRAWINGS | TRAINED


def keep_figure(figure, name):
    Path("figures").mkdir(exist_ok=True)
    figure.savefig(f"figures/{name}.png", metadata={"Software": None})
    plt.close(figure)


def main():
    wanted = sys.argv[1:] or list(FIGURES)
    try:
        if unknown := set(wanted) - set(FIGURES):
            raise ValueError(f"there is no figure {min(unknown)}; there are {', '.join(FIGURES)}")
        for name in wanted:
            FIGURES[name]()
    except ValueError as error:
        sys.exit(f"experiments.figures: {error}")


if __name__ == "__main__":
    main()
