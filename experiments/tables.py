"""Writes the tables of README.md and results/README.md from the files in results/, between <!-- table: NAME --> and <!-- end -->.

    python results/tables.py            write them
    python results/tables.py --check    say which of them are not as they would be written
"""

import csv
import re
import statistics
import sys
from pathlib import Path

HERE = Path(__file__).parent
PAGES = HERE.parent / "README.md", HERE / "README.md"


def rows(name):
    return list(csv.DictReader((HERE / name).open(encoding="utf-8"))) if (HERE / name).exists() else []


def table(head, lines):
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in [head, ["---"] * len(head), *lines])


# ---------------------------------------------------------------- the evidence

NAMED = {"DRIVE": "DRIVE, F1", "hgr": "HGR, IoU", "desks": "desks, IoU", "roads": "roads, IoU", "camvid": "CamVid, mIoU"}  # as the pages call them
SCORE = {data: name.split()[-1] for data, name in NAMED.items()}
ORDER = ["U-Net-B", "U-Net-G", "U-Net-G, 3 x steps", "Rec-Simple", "Rec-Middle", "Rec-Last", "SRU(4)", "N = 1", "DRU(4)", "SRU(0)", "DRU(0)"]
BENCH = {"U-Net-B": "unet-b", "U-Net-G": "unet-g", "U-Net-G, 3 x steps": "unet-g", "Rec-Simple": "rec-simple", "Rec-Middle": "rec-middle",
         "Rec-Last": "rec-last", "SRU(4)": "sru", "DRU(4)": "dru", "SRU(0)": "sru(0)", "DRU(0)": "dru(0)"}  # fmt: skip


def scores(data, system, trained=3):
    """Of every seed: the score after each test pass that the network was trained for, or after the last of them."""
    found = sorted((row for row in rows("evidence.csv") if (row["data"], row["system"]) == (data, system)), key=lambda row: int(row["seed"]))
    every = [[float(value) for value in row[SCORE[data]].split()] for row in found]
    return [values[min(trained, len(values)) - 1] for values in every]


def spread(values):
    """Mean, lowest to highest, of how many seeds."""
    if not values:
        return "awaited"
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f}" + (")" if len(values) == 3 else f", {len(values)} seeds)")


def evidence():
    ms = {line[0]: line[3] for line in systems_rows()}
    lines = []
    for system in ORDER:
        known = [row for row in rows("evidence.csv") if row["system"] == system and row["data"] != "camvid"]
        parameters = f"{int(known[0]['parameters']):,}" if known else ""
        named = "DRU(4), one pass" if system == "N = 1" else system
        lines.append([named, parameters, ms.get(BENCH.get(system), ""), *(spread(scores(data, system, trained=1 if system == "N = 1" else 3)) for data in SCORE)])
    return table(["system", "parameters", "ms", *NAMED.values()], lines)


def looking():
    """Means over the seeds: DRU(4) after each pass, the same trained for one pass, and the plain U-Net."""
    lines = []
    for data, name in NAMED.items():
        found = [*(scores(data, "DRU(4)", trained=t) for t in (1, 2, 3)), scores(data, "N = 1", trained=1), scores(data, "U-Net-G")]
        lines.append([name, *(f"{statistics.mean(values):.3f}" for values in found)])
    return table(["", "pass 1", "pass 2", "pass 3", "trained for one pass", "U-Net-G"], lines)


ABLATED = "DRIVE", "hgr"


def weighing():
    """Means over the seeds: the first and the last pass of DRU(4), by the loss's alpha, and of DRU(4) trained for one pass."""
    lines = []
    for name, system, passes in ("0.4", "DRU(4)", 3), ("0.7", "alpha = 0.7", 3), ("1", "alpha = 1", 3), ("trained for one pass", "N = 1", 1):
        means = [statistics.mean(scores(data, system, trained=t)) if t <= passes else None for data in ABLATED for t in (1, 3)]
        lines.append([name, *("" if mean is None else f"{mean:.3f}" for mean in means)])
    return table(["alpha", *(f"{NAMED[data]}, pass {t}" for data in ABLATED for t in (1, 3))], lines)


def ablation(names):
    """Means where every line of a column has three seeds; otherwise seed 0 in each, beside the spread where it is known."""

    def make():
        columns = []
        for data in ABLATED:
            found = [scores(data, system, trained) for _, system, trained in names]
            cells = found if all(len(values) == 3 for values in found) else [values[:1] for values in found]
            ranges = [f", seeds {min(values):.3f} to {max(values):.3f}" if len(values) == 3 > len(cell) else "" for values, cell in zip(found, cells)]
            columns.append([(spread(cell) if cell else "") + more for cell, more in zip(cells, ranges)])
        return table(["", *(NAMED[data] for data in ABLATED)], [[name, *line] for (name, *_), *line in zip(names, *columns)])

    return make


def test_passes():
    """Means over the seeds after 1 to 5 test passes, by the number of passes in training."""
    lines = []
    for data in ABLATED:
        for n in range(1, 6):
            system = "DRU(4)" if n == 3 else f"N = {n}"
            lines.append([NAMED[data], n, *(f"{statistics.mean(scores(data, system, t)):.3f}" for t in range(1, 6))])
    return table(["", "passes in training", *(f"{t} in the test" for t in range(1, 6))], lines)


# ---------------------------------------------------------------- what the scripts printed


def systems_rows():
    path = HERE / "table.txt"
    lines = path.read_text(encoding="utf-8").splitlines()[3:] if path.exists() else []
    return [(w[0], w[1], w[2], w[3], f"{w[4]} to {w[6]}", w[7], w[8]) for w in map(str.split, lines) if len(w) == 9]


def systems():
    return table(["system", "parameters", "GFLOP", "ms (quartiles)", "frames/s", "MB"],
                 [[n, p, f, f"{ms} ({q})", fps, mb] for n, p, f, ms, q, fps, mb in systems_rows()])  # fmt: skip


def printed(name):
    def make():
        return "```text\n" + ((HERE / name).read_text(encoding="utf-8").strip() if (HERE / name).exists() else "awaited") + "\n```"

    return make


def video():
    if not (HERE / "video.csv").exists():
        return "awaited"
    return table(["frames", "way", "test frames", "IoU", "frames/s"], list(csv.reader((HERE / "video.csv").open(encoding="utf-8"))))


# ---------------------------------------------------------------- single runs, and the choices


RUNS = {"hands/": "IoU", "DRIVE/": "F1", "hgr/": "IoU", "desks/": "IoU", "roads/": "IoU", "CamVid/": "mIoU"}  # the folder in the command: the score shown


def runs(folder):
    """{command: its rows, one a pass}, in the order of the file."""
    found = [row for row in rows("runs.csv") if f"--data {folder}" in row["command"]]
    return {command: [row for row in found if row["command"] == command] for command in dict.fromkeys(row["command"] for row in found)}


def single():
    lines = []
    for folder, score in RUNS.items():
        for command, passes in runs(folder).items():
            threads = {"1": "one thread", "2": "two threads"}[passes[0]["threads"]]
            values = [f"{float(row[score]):.3f}" for row in passes] + ["", ""]  # a plain U-Net has one pass
            lines.append([f"`{command}`", passes[0]["commit"], f"{passes[0]['minutes']} ({threads})", *values[:3], score])
    return table(["command", "commit", "minutes", "pass 1", "pass 2", "pass 3", ""], lines)


def long():
    """DRU(4) after each pass; the plain U-Net after as many steps, and after three times as many."""
    lines = []
    for folder, score in list(RUNS.items())[1:]:
        cells = {}
        for command, passes in runs(folder).items():
            epochs = re.search(r"--epochs (\d+)", command)
            cells["--model" in command, int(epochs[1]) if epochs else 30] = [f"{float(row[score]):.3f}" for row in passes]
        dru = next((key for key in cells if not key[0]), None)
        plain = [cells.get((True, n * dru[1]), ["awaited"])[0] for n in (1, 3)] if dru else ["awaited"] * 2
        lines.append([NAMED.get(folder[:-1], f"{folder[:-1]}, {score}"), *cells.get(dru, ["awaited"] * 3), *plain])
    return table(["", "DRU(4), pass 1", "pass 2", "pass 3", "U-Net-G", "U-Net-G, 3 x steps"], lines)


def norm():
    found = list(csv.reader((HERE / "norm.csv").open(encoding="utf-8")))
    names = {"hands": "toy set: `hands/ 84 84`", "desks": "hands over desks: `desks/ 84 84`", "hgr": "HGR: `hgr/ 84 84`", "DRIVE": "DRIVE: `DRIVE/ 565 112`",
             "roads": "EPFL roads: `roads/ 400 112`"}  # fmt: skip
    heads = list(dict.fromkeys(row[1] for row in found))
    scored = {(data, head): f"{float(value):.3f}" for data, head, value in found}
    return table(["", *heads], [[title, *(scored.get((data, head), "awaited") for head in heads)] for data, title in names.items()])


def strangers():
    """Of the three seeds: IoU on own validation, on that of the other data, and on the own test."""
    found = {}
    for data, norm, _, *values in csv.reader((HERE / "strangers.csv").open(encoding="utf-8")):
        if data == "desks":
            found.setdefault(norm, []).append([float(value) for value in values])
    lines = [[norm, *(spread(values) for values in zip(*seeds))] for norm, seeds in found.items()]
    return table(["trained on the desks", "their validation photos", "HGR's validation photos", "their test photos"], lines)


def start():
    found, lines = {}, []
    for _, how, _, *values in csv.reader((HERE / "start.csv").open(encoding="utf-8")):
        found.setdefault(how, []).append([float(v) for v in values])
    for how, seeds in found.items():
        last = [values[-1] for values in seeds]
        lines.append([*(word.split()[-1] for word in how.split(", ")), *(f"{statistics.mean(v):.3f}" for v in zip(*seeds)), f"{min(last):.3f} to {max(last):.3f}"])
    return table(["fed back", "s_0", "h_0", "pass 1", "pass 2", "pass 3", "lowest to highest"], lines)


def vgg():
    found = {}
    for row in rows("vgg.csv"):
        found.setdefault((row["model"], row["pretrained"]), []).append(row)
    names, lines = {"unet-vgg16": "U-Net-VGG16", "dru-vgg16": "DRU-VGG16"}, []
    for (model, pretrained), epochs in found.items():
        scores = [f"{float(row['val_mIoU']):.3f}" for row in epochs]
        lines.append([names[model], pretrained, " ".join(scores), max(scores), epochs[-1]["test_IoU"]])
    return table(["system", "pretrained", "val mIoU by epoch", "best", "test IoU"], lines)


MAKE = {
    "evidence": evidence,
    "looking": looking,
    "passes": ablation([(str(n), "DRU(4)" if n == 3 else f"N = {n}", n) for n in range(1, 6)]),
    "test passes": test_passes,
    "alpha": ablation([("0.4", "DRU(4)", 3), ("0.7", "alpha = 0.7", 3), ("1", "alpha = 1", 3)]),
    "weighing": weighing,
    "level": ablation([("4", "DRU(4)", 3), *((str(n), f"l = {n}", 3) for n in (3, 2, 1)), ("0", "DRU(0)", 3)]),
    "width": ablation([("8 channels", "DRU(4)", 3), ("16 channels", "width 16", 3)]),
    "hidden": ablation([("16 channels", "DRU(4)", 3), ("128 channels", "hidden 128", 3)]),
    "gates": ablation([("group norm", "DRU(4)", 3), ("ReLU, as in the official code", "gates end in ReLU", 3)]),
    "fed back": ablation([("probabilities", "DRU(4)", 3), ("logits", "logits fed back", 3), ("nothing", "nothing fed back", 3)]),
    "decoder": ablation([("group norm", "DRU(4)", 3), ("none", "no norm in the decoder", 3)]),
    "candidate": ablation([("r * e", "DRU(4)", 3), ("e and r * h", "candidate of e and r * h", 3)]),
    "systems": systems,
    "infer": printed("infer.txt"),
    "train": printed("train.txt"),
    "traffic": printed("traffic.txt"),
    "video": video,
    "single": single,
    "long": long,
    "norm": norm,
    "strangers": strangers,
    "start": start,
    "vgg": vgg,
}


def written(text):
    def fill(found):
        return f"{found[1]}\n\n{MAKE[found[2]]()}\n\n<!-- end -->"

    return re.sub(r"(<!-- table: ([\w ,]+) -->)\n.*?<!-- end -->", fill, text, flags=re.S)


if __name__ == "__main__":
    if sys.argv[1:] not in ([], ["--check"]):
        sys.exit(__doc__)
    status = 0
    for page in PAGES:
        before = page.read_text(encoding="utf-8")
        after = written(before)
        if sys.argv[1:] == ["--check"]:
            if after != before:
                status = f"{page}: its tables are not what results/ says; python results/tables.py writes them"
        else:
            page.write_text(after, encoding="utf-8")
    sys.exit(status)
