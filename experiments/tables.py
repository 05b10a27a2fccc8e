"""Write the tables of the pages from the files in results/, between <!-- table: NAME --> and <!-- end -->.

    python -m experiments.tables
"""

import csv
import re
import statistics
import subprocess
from pathlib import Path

import numpy as np

RESULTS = Path(__file__).parent / "results"
PAGES = [RESULTS.parents[1] / page for page in ("README.md", "paper/README.md", "experiments/README.md")]


def read_result(name):
    return (RESULTS / name).read_text(encoding="utf-8").splitlines() if (RESULTS / name).exists() else []


def read_rows(name):
    return list(csv.DictReader(read_result(name)))


def commit():
    git = ["git", "-C", RESULTS, "rev-parse", "--short", "HEAD"]
    return subprocess.run(git, capture_output=True, text=True).stdout.strip()


def add_rows(name, rows):
    with (RESULTS / name).open("a", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        if not file.tell():
            writer.writeheader()
        writer.writerows(rows)


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


NAMED = {"DRIVE": "DRIVE, F1", "hgr": "HGR, IoU", "roads": "roads, IoU"}  # on the pages
SHORT = ("U-Net-B", "U-Net-G", "U-Net-G, 3 x steps", "Rec-Simple", "Rec-Middle", "Rec-Last",
         "SRU(4)", "DRU(4)", "SRU(0)", "DRU(0)")  # fmt: skip
ABLATED = "DRIVE", "hgr"


def runs_of(data, system, file):
    """The rows of every seed, in order."""
    rows = [row for row in read_rows(file) if (row["data"], row["system"]) == (data, system)]
    return sorted(rows, key=lambda row: int(row["seed"]))


def scores_of(data, system, passes=3, file="evidence.csv"):
    """Of every seed, in order: the score after that pass of the test, or after the last where there are fewer."""
    every = [row[NAMED[data].split()[-1]].split() for row in runs_of(data, system, file)]
    return [float(values[0] if len(values) == 1 else values[passes - 1]) for values in every]


def parameters_of(system, file="evidence.csv"):
    """Of the network for two classes."""
    sizes = {int(row["parameters"]) for data in NAMED for row in runs_of(data, system, file)}
    return f"{max(sizes):,}" if sizes else "awaited"


def counts_of(data, system, seeds="012"):
    """TP, FP and FN of the last pass: (seeds, photos, 3)."""
    photos = [row["photos"].split() for row in runs_of(data, system, "long.csv") if row["seed"] in seeds]
    return np.array([[photo.split("/") for photo in of_seed] for of_seed in photos], int)


def units_of(data, photos):
    """The photos that are drawn together: on HGR those of one person, elsewhere each alone."""
    names = next(row["names"] for row in read_rows("splits.csv") if row["split"] == "test") if data == "hgr" else ""
    people = [re.search("hgr.*_id..", name)[0] for name in names.split()] or range(photos)
    return [[i for i, person in enumerate(people) if person == one] for one in dict.fromkeys(people)]


def lead_of(data, system, over, seeds="012", resamples=10_000):
    """By how much one system's score is above another's, with the 95 % interval of a bootstrap: photos (on HGR people)
    are drawn with replacement, the same for both, and each system's seeds."""
    ours, theirs = (counts_of(data, name, seeds) for name in (system, over))
    if not len(ours) or not len(theirs):
        return "awaited"
    rng, weight = np.random.default_rng(0), 2 if NAMED[data].endswith("F1") else 1
    units = units_of(data, ours.shape[1])
    times = rng.multinomial(len(units), [1 / len(units)] * len(units), resamples)  # how often each is drawn

    def score(counts, times):
        """(seeds, photos, 3), (draws, units) -> (draws, seeds)."""
        hit, false, missed = (times @ np.stack([counts[:, unit].sum(1) for unit in units], 1)).T
        return weight * hit / (weight * hit + false + missed)

    def drawn(counts):
        scores = score(counts, times)
        return np.take_along_axis(scores, rng.integers(scores.shape[1], size=scores.shape), 1).mean(1)

    lead = np.subtract(*(score(counts, np.ones((1, len(units)), int)).mean() for counts in (ours, theirs)))
    ends = np.percentile(drawn(ours) - drawn(theirs), [2.5, 97.5])
    seeds = {1: ", one seed", 2: ", 2 seeds"}.get(min(len(ours), len(theirs)), "")
    return f"{100 * lead:+.1f} ({100 * ends[0]:+.1f} to {100 * ends[1]:+.1f}{seeds})"


def finding_table():
    """The systems of the long runs in README, and the lead of the recurrent one in points."""
    ms = {row[0]: row[3] for row in read_systems()}
    systems = {"U-Net, one pass": ("U-Net-G", "unet-g"), "U-Net, mean of three views": ("U-Net-G, three views", ""),
               "DRU(4), three passes": ("DRU(4)", "dru")}  # fmt: skip
    lines = [[title, parameters_of(system, "long.csv"), ms.get(bench, ""),
              *(spread(scores_of(data, system, 3, "long.csv")) for data in NAMED)]
             for title, (system, bench) in systems.items()]  # fmt: skip
    for title, system in ("the U-Net", "U-Net-G"), ("its three views", "U-Net-G, three views"):
        lines.append([f"DRU(4)'s points above {title}", "", "", *(lead_of(data, "DRU(4)", system) for data in NAMED)])
    return markdown(["", "parameters", "ms at 230x306, CPU", *NAMED.values()], lines)


def seed_table():
    """All long runs but those, most with one seed: how far they are above U-Net-G or, recurrent ones, above DRU(4)."""
    systems, lines = dict.fromkeys(row["system"] for row in read_rows("long.csv")), []
    views = lambda data, system: scores_of(data, f"{system}, eight views", 3, "long.csv")
    for system in sorted(systems, key=lambda name: (name[0] != "U", name[0], "," in name)):
        if system.endswith("views"):
            continue
        base, line = "U-Net-G" if system.startswith("U-Net") else "DRU(4)", [system, parameters_of(system, "long.csv")]
        for data in NAMED:
            seeds = "0" if system == base else "".join(row["seed"] for row in runs_of(data, system, "long.csv"))
            named = f", seed {seeds}" * (seeds != "0")
            lead = lead_of(data, system, base, seeds).replace(", one seed", named) if seeds and system != base else ""
            found = scores_of(data, system, 3, "long.csv")[: len(seeds)]
            more = "".join(f"; eight views {score:.3f}" for score in views(data, system))
            line += [spread(found).removesuffix(" (one seed)") + more if seeds else "", lead]
        lines.append(line)
    heads = [head for name in NAMED.values() for head in (name, "points above")]
    return markdown(["seed 0", "parameters", *heads], lines)


def short_table():
    systems = {system: system for system in SHORT} | {"DRU(4), one drawn pass": "one drawn, 2 x steps"}
    lines = [[title, parameters_of(system), *(spread(scores_of(data, system)) for data in NAMED)]
             for title, system in systems.items()]  # fmt: skip
    return markdown(["", "parameters", *NAMED.values()], lines)


def diagnosis_table():
    """F1 on training and validation photos, by what the network was given."""
    rows = read_rows("diagnosis.csv")
    runs, given = (list(dict.fromkeys(row[name] for row in rows)) for name in ("run", "given"))
    f1 = {(row["run"], row["given"], row["split"]): row["F1"] for row in rows}
    lines = [[what, *(f1.get((run, what, split), "") for run in runs for split in ("train", "val"))] for what in given]
    return markdown(["F1", *(f"{run}, {split}" for run in runs for split in ("training", "validation"))], lines)


def changes_table():
    systems = {
        "nothing": "DRU(4)", **{f"level l = {level}": f"l = {level}" for level in (3, 2, 1)}, "level l = 0": "DRU(0)",
        "a ReLU at the end of the gate networks": "gates end in ReLU",
        "no norm in the decoder": "no norm in the decoder",
        "a candidate of e and r * h, not of r * e": "candidate of e and r * h",
        "logits fed back, not probabilities": "logits fed back", "nothing fed back but the state": "nothing fed back",
    }  # fmt: skip
    scored = [[spread(scores_of(data, system)) for data in ABLATED] for system in systems.values()]
    lines = [[name, parameters_of(system), *line] for (name, system), line in zip(systems.items(), scored)]
    return markdown(["what changes in DRU(4)", "parameters", *(NAMED[data] for data in ABLATED)], lines)


def rare_table():
    """A row for each loss, a pair of columns for each set: validation, by which one chooses, and test."""
    rows = [row for row in read_rows("trials.csv") if row["trial"] == "rare"]
    sets, ways = (list(dict.fromkeys(row[name] for row in rows)) for name in ("data", "way"))
    of = lambda data, way, name: [float(r[name]) for r in rows if (r["data"], r["way"]) == (data, way)]
    cells = lambda data, way: (mean_of(of(data, way, "val_IoU")), spread(of(data, way, "IoU")))
    heads = [head for data in sets for head in (f"{data}, validation", f"{data}, test")]
    return markdown(["IoU", *heads], [[way, *(cell for data in sets for cell in cells(data, way))] for way in ways])


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
    """By set and training, for each way to watch: IoU, and flicker in percent; then how fast the ways are."""
    rows = read_rows("video.csv")
    ways, lines = list(dict.fromkeys(row["way"] for row in rows)), []
    for of in dict.fromkeys((row["set"], row["trained on"]) for row in rows):
        found = [[row for row in rows if (row["set"], row["trained on"], row["way"]) == (*of, way)] for way in ways]
        flicker = [statistics.mean(100 * float(row["flicker"]) for row in of_way) for of_way in found]
        ious = [spread([float(row["IoU"]) for row in of_way]) for of_way in found]
        lines.append([", trained on ".join(of), *(f"{iou}; {f:.2f}%" for iou, f in zip(ious, flicker))])
    of_way = lambda way: [float(row["ms"]) for row in rows if row["way"] == way]
    times = [statistics.median(a / b for a, b in zip(of_way(ways[0]), of_way(way))) for way in ways]
    lines += [["times as fast", *(f"{value:.2f}" for value in times)]] * bool(rows)
    return markdown(["IoU; flicker", *ways], lines)


def traffic_table():
    return "\n".join(["```text", *(read_result("traffic.txt") or ["awaited"]), "```"])


MAKERS = (finding_table, seed_table, short_table, diagnosis_table, changes_table, rare_table, systems_table,
          infer_table, train_table, video_table, traffic_table)  # fmt: skip
MAKE = {maker.__name__.removesuffix("_table"): maker for maker in MAKERS}


def fill_tables(text):
    """The text of a page with every table written anew."""
    slot = r"(<!-- table: ([\w ]+) -->)\n.*?<!-- end -->"
    return re.sub(slot, lambda found: f"{found[1]}\n{MAKE[found[2]]()}\n<!-- end -->", text, flags=re.S)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(fill_tables(page.read_text(encoding="utf-8")), encoding="utf-8")
