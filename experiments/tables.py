"""Write the tables of the pages from the files in results/, between <!-- table: NAME --> and <!-- end -->.

    python -m experiments.tables            write them
    python -m experiments.tables --check    name the pages whose tables are not as they would be written
"""

import csv
import re
import statistics
import sys
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
PAGES = [RESULTS.parents[1] / page for page in ("README.md", "paper/README.md", "experiments/README.md")]


def read_result(name):
    return (RESULTS / name).read_text(encoding="utf-8").splitlines() if (RESULTS / name).exists() else []


def read_rows(name):
    return list(csv.DictReader(read_result(name)))


def markdown(head, lines):
    if not lines:
        return "awaited"
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in [head, ["---"] * len(head), *lines])


def mean_of(values):
    return f"{statistics.mean(values):.3f}" if values else "awaited"


def spread(values):
    """Mean of the seeds, with the lowest and the highest."""
    if len(values) < 2:
        return f"{values[0]:.3f} (one seed)" if values else "awaited"
    return f"{mean_of(values)} ({min(values):.3f} to {max(values):.3f}{f', {len(values)} seeds' * (len(values) != 3)})"


NAMED = {"DRIVE": "DRIVE, F1", "hgr": "HGR, IoU", "roads": "roads, IoU", "camvid": "CamVid, mIoU"}  # on the pages
# Their names in bench --table. "3 x steps" takes about the time of DRU(4).
BENCH = {"U-Net-B": "unet-b", "U-Net-G": "unet-g", "U-Net-G, 3 x steps": "unet-g", "Rec-Simple": "rec-simple",
         "Rec-Middle": "rec-middle", "Rec-Last": "rec-last", "SRU(4)": "sru", "DRU(4)": "dru", "SRU(0)": "sru(0)",
         "DRU(0)": "dru(0)"}  # fmt: skip
ABLATED = "DRIVE", "hgr"


def scores_of(data, system, passes=3):
    """Of every seed, in order: the score after that pass of the test, or after the last where there are fewer."""
    rows = [row for row in read_rows("evidence.csv") if (row["data"], row["system"]) == (data, system)]
    every = [row[NAMED[data].split()[-1]].split() for row in sorted(rows, key=lambda row: int(row["seed"]))]
    return [float(values[min(passes, len(values)) - 1]) for values in every]


def parameters_of(system):
    """Of the network for two classes."""
    rows = read_rows("evidence.csv")
    sizes = {int(row["parameters"]) for row in rows if row["system"] == system and row["data"] != "camvid"}
    return f"{max(sizes):,}" if sizes else "awaited"


def compare_systems(systems):
    """A row for each (title, system, passes of the test)."""
    ms, lines = {row[0]: row[3] for row in read_systems()}, []
    for title, system, passes in systems:
        time = ms.get(BENCH[system], "awaited") if system in BENCH else ""
        lines.append([title, parameters_of(system), time, *(spread(scores_of(data, system, passes)) for data in NAMED)])
    return markdown(["", "parameters", "ms a frame", *NAMED.values()], lines)


def finding_table():
    return compare_systems([
        ("U-Net, one pass", "U-Net-G", 3), ("DRU(4), three passes", "DRU(4)", 3),
        ("U-Net, three times the steps", "U-Net-G, 3 x steps", 3), ("DRU(0), three passes", "DRU(0)", 3),
    ])  # fmt: skip


def evidence_table():
    systems = [(system, system, 3) for system in BENCH]
    systems.insert(7, ("DRU(4), one pass", "N = 1", 1))
    return compare_systems(systems)


def looking_table():
    """Means: DRU(4) after each pass, the same trained for one pass, and the plain U-Net."""
    columns = {f"pass {t}": ("DRU(4)", t) for t in (1, 2, 3)}
    columns |= {"trained for one pass": ("N = 1", 1), "U-Net-G": ("U-Net-G", 1)}
    lines = [[name, *(mean_of(scores_of(data, *of)) for of in columns.values())] for data, name in NAMED.items()]
    return markdown(["", *columns], lines)


def longer_table():
    """Single runs: DRU(4) after each pass; the plain U-Net after as many steps, and after three times as many."""
    lines, rows = [], read_rows("runs.csv")
    for folder, name in zip(("DRIVE/", "hgr/", "roads/", "CamVid/"), NAMED.values()):
        cells = {}  # {(is it a U-Net, epochs): scores after each pass}
        for row in rows:
            if f"--data {folder}" in row["command"]:
                epochs = re.search(r"--epochs (\d+)", row["command"])
                key = "unet-g" in row["command"], int(epochs[1]) if epochs else 30
                cells.setdefault(key, []).append(f"{float(row[name.split()[-1]]):.3f}")
        epochs = min((n for plain, n in cells if not plain), default=0)
        plain = [cells.get((True, n * epochs), ["awaited"])[0] for n in (1, 3)]
        lines.append([name, *cells.get((False, epochs), ["awaited"] * 3), *plain])
    return markdown(["", "DRU(4), pass 1", "pass 2", "pass 3", "U-Net-G", "U-Net-G, 3 x steps"], lines)


def passes_table():
    """Means after 1 to 5 test passes, by the number of passes in training."""
    heads, lines = [f"{NAMED[data]}, {t} in the test" if t == 1 else t for data in ABLATED for t in range(1, 6)], []
    for n in range(1, 6):
        system = "DRU(4)" if n == 3 else f"N = {n}"
        lines.append([n, *(mean_of(scores_of(data, system, t)) for data in ABLATED for t in range(1, 6))])
    return markdown(["passes in training", *heads], lines)


def alpha_table():
    lines = []
    for name, system in ("0.4", "DRU(4)"), ("0.7", "alpha = 0.7"), ("1", "alpha = 1"):
        lines.append([name, *(spread(scores_of(data, system, t)) for data in ABLATED for t in (1, 3))])
    once = [spread(scores_of(data, "N = 1", 1)) for data in ABLATED]
    lines.append(["trained for one pass", once[0], "", once[1], ""])
    return markdown(["alpha", *(f"{NAMED[data]}, pass {t}" for data in ABLATED for t in (1, 3))], lines)


def changes_table():
    systems = {
        "nothing": "DRU(4)", **{f"level l = {level}": f"l = {level}" for level in (3, 2, 1)}, "level l = 0": "DRU(0)",
        "16 channels at level 0, not 8": "width 16", "128 channels in the state, not 16": "hidden 128",
        "a ReLU at the end of the gate networks": "gates end in ReLU",
        "no norm in the decoder": "no norm in the decoder",
        "a candidate of e and r * h, not of r * e": "candidate of e and r * h",
        "logits fed back, not probabilities": "logits fed back", "nothing fed back but the state": "nothing fed back",
    }  # fmt: skip
    scored = [[spread(scores_of(data, system)) for data in ABLATED] for system in systems.values()]
    lines = [[name, parameters_of(system), *line] for (name, system), line in zip(systems.items(), scored)]
    return markdown(["what changes in DRU(4)", "parameters", *(NAMED[data] for data in ABLATED)], lines)


def norm_table():
    sets = {"hands": "toy set: `hands/ 84 84`", "hgr": "HGR: `hgr/ 84 84`", "DRIVE": "DRIVE: `DRIVE/ 565 112`",
            "roads": "roads: `roads/ 400 112`"}  # fmt: skip
    found = {}
    for data, norm, _, iou in csv.reader(read_result("norm.csv")):
        found.setdefault((data, norm), []).append(float(iou))
    norms = dict.fromkeys(norm for _, norm in found)
    lines = [[title, *(spread(found.get((data, norm), [])) for norm in norms)] for data, title in sets.items() if norms]
    return markdown(["", *norms], lines)


def start_table():
    found = {}
    for _, how, _, *values in csv.reader(read_result("start.csv")):
        found.setdefault(how, []).append([float(value) for value in values])
    lines = []
    for how, seeds in found.items():
        first, second, third = zip(*seeds)
        words = [word.split()[-1] for word in how.split(", ")]
        lines.append([*words, mean_of(first), mean_of(second), spread(third)])
    return markdown(["fed back", "s_0", "h_0", "pass 1", "pass 2", "pass 3"], lines)


# ---------------------------------------------------------------- speed


def read_systems():
    """What bench --table printed: name, parameters, GFLOP, ms, low, "to", high, frames/s, MB."""
    return [words for words in map(str.split, read_result("table.txt")[3:]) if len(words) == 9]


def systems_table():
    head = ["system", "parameters", "GFLOP", "ms (quartiles)", "frames/s", "MB"]
    return markdown(head, [[*row[:3], f"{row[3]} ({' '.join(row[4:7])})", *row[7:]] for row in read_systems()])


def read_times(name):
    """What bench.compare printed: {title: {form: ms (times faster)}}."""
    found, title = {}, ""
    for line in read_result(name):
        row = re.fullmatch(r"(.{34})\s*([\d.]+)\s+[\d.]+ to [\d.]+\s+([\d.]+)", line)
        if row:
            found.setdefault(title, {})[row[1].strip()] = f"{row[2]} ({row[3]})"
        elif "; " in line:
            title = line.partition("; ")[2]
    return found


def infer_table():
    found = read_times("infer.txt")
    words = ", three passes", ", as by predict.py", "; memory as the C library handles it"
    titles = [re.sub("|".join(words), "", title).removeprefix("1 x ") for title in found]
    forms = dict.fromkeys(form for times in found.values() for form in times)
    lines = [[form, *(times.get(form, "") for times in found.values())] for form in forms]
    return markdown(["ms (times faster than plain)", *titles], lines)


def train_table():
    most = {form: (megabytes, share) for form, megabytes, share in re.findall(
        r"^(.+): (\d+) MB at most, (\d+%) of plain$", "\n".join(read_result("train.txt")), re.M)}  # fmt: skip
    times = {form: ms for times in read_times("train.txt").values() for form, ms in times.items()}
    lines = [[form, ms, *most.get(form, ("", ""))] for form, ms in times.items()]
    return markdown(["", "ms (times faster than plain)", "MB", "of plain"], lines)


def video_table():
    """By set: IoU, flicker in percent and frames a second of three passes, for each way to watch and to train."""
    rows, lines = read_rows("video.csv"), []
    for data, way in dict.fromkeys((row["set"], row["way"]) for row in rows):
        cells = []
        for how in dict.fromkeys(row["trained on"] for row in rows):
            of = [row for row in rows if (row["set"], row["way"], row["trained on"]) == (data, way, how)]
            cells.append(spread([float(row["IoU"]) for row in of]))
            cells.append(f"{statistics.mean(100 * float(row['flicker']) for row in of):.2f}" if of else "awaited")
        lines.append([data, way, *cells])
    head = [f"{what}, trained on {how}" for how in ("photos", "motion") for what in ("IoU", "flicker in %")]
    return markdown(["set", "way", *head], lines)


def traffic_table():
    return "\n".join(["```text", *(read_result("traffic.txt") or ["awaited"]), "```"])


MAKERS = (finding_table, evidence_table, looking_table, longer_table, changes_table, passes_table, alpha_table,
          norm_table, start_table, systems_table, infer_table, train_table, video_table, traffic_table)  # fmt: skip
MAKE = {maker.__name__.removesuffix("_table"): maker for maker in MAKERS}


def fill_tables(text):
    """The text of a page with every table written anew."""
    slot = r"(<!-- table: ([\w ]+) -->)\n.*?<!-- end -->"
    return re.sub(slot, lambda found: f"{found[1]}\n{MAKE[found[2]]()}\n<!-- end -->", text, flags=re.S)


def main():
    if sys.argv[1:] not in ([], ["--check"]):
        sys.exit(__doc__)
    stale = []
    for page in filter(Path.exists, PAGES):
        before = page.read_text(encoding="utf-8")
        after = fill_tables(before)
        if sys.argv[1:]:
            stale += [f"{page}: differs from results/; python -m experiments.tables writes it"] * (after != before)
        else:
            page.write_text(after, encoding="utf-8")
    sys.exit("\n".join(stale) or 0)


if __name__ == "__main__":
    main()
