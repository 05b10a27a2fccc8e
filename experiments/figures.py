"""Every picture of the pages, into figures/.

    python -m experiments.figures                       all of them
    python -m experiments.figures architecture crops    these alone

The DRAWINGS come out byte for byte alike under one version of matplotlib. The others show what a network does. They
need hands/ and runs/hands/, which the first command of README.md makes, and are as alike as two trainings are.
"""

import sys
from pathlib import Path
from unittest import mock

import matplotlib
import numpy as np
import torch

from data import open_dataset
from evaluate import load
from experiments.tables import NAMED, read_rows, scores_of
from support.checkpoints import read_checkpoint

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle  # noqa: E402

RUN = Path("runs/hands")
BLUE, GREEN, RED, GREY = "#3b6ea8", "#2a9d6f", "#c8553d", "#6b7280"
MIDDLE = dict(ha="center", va="center")
plt.rcParams |= {"font.size": 9, "axes.titlesize": 9, "savefig.dpi": 110}
plt.rcParams |= {"axes.spines.top": False, "axes.spines.right": False}


def draw_arrow(ax, start, end, color="black", bend=0.0, style="-", lw=1.0):
    shape = dict(connectionstyle=f"arc3,rad={bend}", arrowstyle="-|>", mutation_scale=9, linestyle=style, linewidth=lw)
    ax.add_patch(FancyArrowPatch(start, end, color=color, shrinkA=0, shrinkB=0, **shape))


def draw_box(ax, middle, size, text, color, fill=None):
    at = middle[0] - size[0] / 2, middle[1] - size[1] / 2
    ax.add_patch(FancyBboxPatch(at, *size, boxstyle="round,pad=0.06", fc=fill or color + "22", ec=color, lw=1.3))
    ax.text(*middle, text, **MIDDLE)


def draw_diagram(name, size, boxes, arrows, texts):
    """In inches: boxes (x, y, width, text, color), arrows (color, style, corners), texts (x, y, text, color)."""
    figure, ax = plt.subplots(figsize=size)
    figure.subplots_adjust(0, 0, 1, 1)
    ax.set(xlim=(0, size[0]), ylim=(0, size[1]))
    ax.axis("off")
    for color, style, corners in arrows:
        ax.plot(*zip(*corners[:-1]), color=color, linestyle=style, lw=1.2)
        draw_arrow(ax, *corners[-2:], color, style=style, lw=1.2)
    for x, y, width, text, color in boxes:
        draw_box(ax, (x, y), (width, 0.34), text, color)
    for x, y, text, color in texts:
        ax.text(x, y, text, **MIDDLE, color=color)
    keep_figure(figure, name)


def draw_unit():
    """The data flow inside DRU: h enters the update and nothing else."""
    e, z, r, out = (0.35, 1.7), 2.7, 0.7, (7.15, 1.7)
    boxes = [
        (e[0], e[1], 0.3, "$e_t$", BLUE), (1.75, z, 0.4, "$f_z$", BLUE), (2.85, z, 0.8, "sigmoid", GREY),
        (1.75, r, 0.4, "$f_r$", BLUE), (2.85, r, 0.8, "sigmoid", GREY), (4.1, r, 0.3, r"$\odot$", GREEN),
        (5.0, r, 0.4, "$f_c$", BLUE), (5.85, r, 0.55, "tanh", GREY),
        (*out, 1.7, r"$z \odot h_{t-1} + (1-z) \odot c$", GREEN), (9.3, out[1], 0.4, "$f_s$", BLUE),
    ]  # fmt: skip
    arrows = [
        ("black", "-", [(0.55, 1.7), (1.1, 1.7), (1.1, z), (1.5, z)]), ("black", "-", [(2.0, z), (2.4, z)]),
        ("black", "-", [(1.1, 1.7), (1.1, r), (1.5, r)]), ("black", "-", [(2.0, r), (2.4, r)]),
        ("black", "-", [(1.1, 1.7), (4.1, 1.7), (4.1, r + 0.23)]), ("black", "-", [(3.3, r), (3.9, r)]),
        ("black", "-", [(4.3, r), (4.75, r)]), ("black", "-", [(5.25, r), (5.52, r)]),
        ("black", "-", [(3.3, z), (6.6, z), (6.6, 1.95)]), ("black", "-", [(6.18, r), (6.6, r), (6.6, 1.45)]),
        (GREEN, "--", [(7.7, z + 0.1), (7.7, 1.95)]), ("black", "-", [(8.05, 1.7), (9.05, 1.7)]),
        (GREEN, "--", [(8.55, 1.7), (8.55, r - 0.1)]), ("black", "-", [(9.55, 1.7), (9.95, 1.7)]),
    ]  # fmt: skip
    texts = [
        (5.0, z + 0.13, "$z$, eq. (2)", "black"), (3.6, r + 0.13, "$r$", "black"), (3.6, r - 0.17, "eq. (3)", "black"),
        (7.05, r + 0.25, "$c$, eq. (4)", "black"), (7.15, 1.28, "eq. (5)", "black"), (8.32, 1.83, "$h_t$", "black"),
        (7.7, z + 0.25, "$h_{t-1}$, from the pass before", GREEN), (8.55, r - 0.25, "$h_t$, to the next pass", GREEN),
        (0.35, 1.28, "encoder", "black"), (10.35, 1.7, "decoder", "black"),
    ]  # fmt: skip
    draw_diagram("unit", (10.8, 3.2), boxes, arrows, texts)


def draw_unrolled():
    """Three passes over one photo, and the way back of the last loss's gradient."""
    texts = [(5.0, 0.18, "image $x$, the same for every pass", "black"), (0.4, 1.0, "$p = 0$", RED),
             (0.4, 1.9, "$h_0 = 0$", GREEN)]  # fmt: skip
    boxes, arrows = [], [(RED, "--", [(0.62, 1.0), (0.82, 1.0)]), (GREEN, "--", [(0.7, 1.9), (0.82, 1.9)])]
    for t, x in enumerate((1.5, 5.0, 8.5), 1):
        rows = ("encoder", BLUE), ("unit", GREEN), ("decoder, head", BLUE)
        boxes += [(x, 1.0 + 0.9 * k, 1.2, text, color) for k, (text, color) in enumerate(rows)]
        boxes.append((x, 3.75, 1.2, rf"$\alpha^{3 - t}\,$ CE$(s_{t}, y)$", GREY))
        up, back = (0.35, 0.75, 1.25, 1.65, 2.15, 2.55, 3.05, 3.5), ((3.5, 3.07), (2.55, 2.17), (1.65, 1.27))
        arrows += [("black", "-", [(x, start), (x, end)]) for start, end in zip(up[::2], up[1::2])]
        texts.append((x - 0.15, 3.27, f"$s_{t}$", "black"))
        arrows += [(GREY, ":", [(x + 0.3, high), (x + 0.3, low)]) for high, low in back if t == 3 or high < 3]
        if t < 3:
            way = [(x, 3.27), (x + 1.55, 3.27), (x + 1.55, 1.06), (x + 2.82, 1.06)]
            arrows += [(RED, "--", way), (GREEN, "--", [(x + 0.68, 1.96), (x + 2.82, 1.96)])]
            arrows.append((GREY, ":", [(x + 2.82, 1.84), (x + 0.68, 1.84)]))
            corners = (x + 2.82, 0.94), (x + 1.67, 0.94), (x + 1.67, 3.2), (x + 0.3, 3.2), (x + 0.3, 3.07)
            arrows.append((GREY, ":", corners))
            texts += [(x + 1.1, 3.42, f"$p$ = softmax$(s_{t})$", RED), (x + 2.2, 2.12, f"$h_{t}$", GREEN)]
    draw_diagram("unrolled", (9.6, 4.05), boxes, arrows, texts)


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
        # the recurrent unit: each f inside is a small U of the widths that it replaces; h enters the update alone
        bottom, mini, small = 4 - level, (0.16, 0.36), (0.2 if level < 4 else 0.34, 0.24)
        reach, height = 2 * bottom * mini[0] + small[0], bottom * mini[1] + small[1] + 1.25
        wide = max(3 * reach + 4 * 0.3, 2.2)
        x0, y0 = 3.91 - wide / 2, -max(level, 1) + (0.9 if level == 0 else 0.15)
        draw_box(ax, (3.91, y0 - height / 2), (wide, height), "", GREEN)
        for k, name in enumerate(("$f_z$", "$f_r$", "$f_c$")):
            left = x0 + (wide - 3 * reach) / 4 * (k + 1) + k * reach
            for i in range(bottom + 1):
                for x in {left + i * mini[0], left + (2 * bottom - i) * mini[0]}:  # encoder, decoder; one at the bottom
                    corner = x, y0 - 0.45 - i * mini[1] - small[1]
                    ax.add_patch(Rectangle(corner, *small, color=BLUE, alpha=0.9, lw=0))
            ax.text(left + reach / 2, y0 - 0.2, name, **MIDDLE)
        low = y0 - height + 0.28
        draw_box(ax, (3.91, low), (1.5, 0.36), "update", GREEN, "white")
        ax.plot((4.72, 5.6, 5.6), (low - 0.12, low - 0.12, low + 0.12), color=GREEN, linestyle="--", lw=1.4)
        draw_arrow(ax, (5.6, low + 0.12), (4.72, low + 0.12), GREEN, style="--", lw=1.4)
        ax.text(5.8, low, "$h$", **MIDDLE, color=GREEN)
        if level:
            y = 1 - level - box[1]
            draw_arrow(ax, ((level - 1) * step + 0.3, y), (x0, y0 - 0.3))
            draw_arrow(ax, (x0 + wide + 0.08, y0 - 0.1), (right - (level - 1) * step + 0.3, y))
        top = ((0.3, 0), (right + 0.3, 0)) if level else ((x0 + 0.4, y0 + 0.08), (x0 + wide - 0.4, y0 + 0.08))
        draw_arrow(ax, (0.3, 0.75), top[0])
        draw_arrow(ax, top[1], (right + 0.3, 0.75))
        ax.text(0.3, 1.0, "image, $p$", **MIDDLE)
        ax.text(right + 0.3, 1.0, "$s_t$", **MIDDLE)
        draw_arrow(ax, (right + 0.25, 1.25), (0.6, 1.25), RED, bend=0.12, style="--", lw=1.4)
        ax.text(3.91, 1.85, "softmax", **MIDDLE, color=RED)
    keep_figure(figure, "architecture")


def draw_evidence():
    """After each pass of the long runs DRU(4), a line for each seed; left of it the U-Net, whose dots are seeds."""
    figure, axes = plt.subplots(1, len(NAMED), figsize=(9, 2.8), layout="constrained")
    for ax, (data, name) in zip(axes, NAMED.items()):
        for x, system in (-1, "U-Net-G"), (0, "U-Net-G, three views"):
            values = scores_of(data, system, file="long.csv")
            ax.plot([x] * len(values), values, "o", color=GREY)
        for seed in zip(*(scores_of(data, "DRU(4)", t, "long.csv") for t in (1, 2, 3))):
            ax.plot((1, 2, 3), seed, "o-", color=GREEN, lw=1)
        labels = ["U-\nNet", "three\nviews", *(f"pass\n{t}" for t in (1, 2, 3))]
        ax.set(title=name, xticks=range(-1, 4), xticklabels=labels)
        ax.grid(axis="y", alpha=0.3)
    keep_figure(figure, "evidence")


def draw_crops():
    """How DRU(4)'s first and third pass grow with the crops of its training, and what whole photos do to them."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 2.6), layout="constrained")
    rows = [row for row in read_rows("diagnosis.csv") if row["split"] == "val"]
    scored = {(row["run"], row["given"]): float(row["F1"]) for row in rows}
    for crop, color in ("160", RED), ("320", GREEN):
        log = read_rows(f"crops_{crop}.csv")
        for t, style in (1, ":"), (3, "-"):
            ious, shares = [float(row[f"mIoU_{t}"]) for row in log], np.linspace(0, 1, len(log) + 1)[1:]
            left.plot(shares, ious, style, color=color, label=f"crops of {crop}, pass {t}")
        for where, style in ("", "o-"), ("tiles, ", "s:"):
            f1 = [scored[f"dru, crops of {crop}", f"{where}pass {t}"] for t in (1, 2, 3)]
            label = f"crops of {crop}, {f'in tiles of {crop}' if where else 'whole photos'}"
            right.plot((1, 2, 3), f1, style, color=color, label=label)
    left.set(xlabel="share of the training", ylabel="validation mIoU", ylim=(0.75, 0.81))
    right.set(xlabel="pass", ylabel="validation F1", xticks=(1, 2, 3))
    for ax in left, right:
        ax.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
        ax.grid(axis="y", alpha=0.3)
    keep_figure(figure, "crops")


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
    """Every pass over one image (1, 3, H, W): the foreground's probability p, and z, c, h, each (C, h, w)."""
    seen, state, update = [], net.start(image), net.unit.update

    def watched_update(h, a_z, a_c):
        seen.append(dict(z=a_z.sigmoid()[0], c=a_c.tanh()[0]))
        return update(h, a_z, a_c)

    with mock.patch.object(net.unit, "update", watched_update):
        for _ in range(passes):
            s, state = net.step(image, state)
            seen[-1].update(p=s.softmax(1)[0, 1], h=state[1][0])
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
    figure, axes = plt.subplots(3, 5, figsize=(9.8, 4.8), layout="constrained")
    k = seen[-1]["z"].std((1, 2), correction=0).argmax().item()  # the channel whose gate varies most
    for t, (line, at) in enumerate(zip(axes, seen), 1):
        show_picture(line[0], photo, f"pass {t}: photo")
        for ax, name, cmap, low in zip(line[1:], "zch", ("viridis", "coolwarm", "coolwarm"), (0, -1, -1)):
            show_picture(ax, at[name][k], f"{name}, channel {k}", cmap=cmap, vmin=low, vmax=1)
        show_picture(line[4], at["p"], "probability of hand", cmap="magma", vmin=0, vmax=1)
    for column in 1, 3, 4:  # candidate and state share the bar of column 3
        figure.colorbar(axes[0, column].images[0], ax=axes[:, column], shrink=0.6)
    keep_figure(figure, "gates")


DRAWINGS = {"architecture": draw_architecture, "unit": draw_unit, "unrolled": draw_unrolled,
            "evidence": draw_evidence, "crops": draw_crops}  # fmt: skip
TRAINED = {"passes": draw_passes, "gates": draw_gates}


def keep_figure(figure, name):
    Path("figures").mkdir(exist_ok=True)
    figure.savefig(f"figures/{name}.png", metadata={"Software": None})
    plt.close(figure)


def main():
    figures = DRAWINGS | TRAINED
    wanted = sys.argv[1:] or list(figures)
    try:
        if unknown := set(wanted) - set(figures):
            raise ValueError(f"there is no figure {min(unknown)}; there are {', '.join(figures)}")
        for name in wanted:
            figures[name]()
    except ValueError as error:
        sys.exit(f"experiments.figures: {error}")


if __name__ == "__main__":
    main()
