"""Training runs over each other: what differs in their settings, the best epoch of each, and compare.png.

    python -m experiments.compare runs/hands runs/unet

A run is a folder that train.py wrote. The picture shows the last pass on the validation photos.
"""

import csv
import json
import sys
from pathlib import Path

from matplotlib.figure import Figure

from support.checkpoints import new_file


def read_run(folder):
    """The settings, and {column: numbers} of the log."""
    try:
        config = json.loads((folder / "config.json").read_text())
        rows = list(csv.DictReader((folder / "log.csv").read_text().splitlines()))
        return config, {name: [float(row[name]) for row in rows] for name in rows[0]}
    except (OSError, ValueError, LookupError) as error:
        raise ValueError(f"{folder}: must hold config.json and log.csv of a run ({error})") from None


def compare_runs(folders):
    runs = {str(folder): read_run(folder) for folder in map(Path, folders)}
    same = set.intersection(*(set(map(str, config.items())) for config, _ in runs.values()))
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots(1, 2)
    for name, (config, log) in runs.items():
        own = {k: v for k, v in config.items() if str((k, v)) not in same and k not in ("out", "resume") and v != ""}
        own = ", ".join(f"{k} {v}" for k, v in own.items())
        for axis, kind in zip(axes, ("CE", "mIoU")):
            last = max(column for column in log if column.startswith(f"{kind}_"))
            axis.plot(log["epoch"], log[last], ".-", label=f"{name}: {own}")
            axis.set(xlabel="epoch", ylabel=f"validation {kind}")
        best = max(log[last])
        print(f"{name}: validation mIoU {best:.4f} at epoch {log['epoch'][log[last].index(best)]:.0f}; {own}")
    axes[0].set(yscale="log")
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=7, loc="outside lower left")
    with new_file(Path("compare.png")) as file:
        figure.savefig(file, dpi=100)


def main():
    try:
        compare_runs(sys.argv[1:]) if sys.argv[1:] and sys.argv[1][0] != "-" else sys.exit(__doc__)
    except ValueError as error:
        sys.exit(f"experiments.compare: {error}")


if __name__ == "__main__":
    main()
