"""What sampling.py and gpu_report.py write: reports that continue, tables, a plot."""

import statistics
from pathlib import Path

from runtime import UserError
from runtime.files import read_json


def continued(out: Path, settings: dict) -> dict | None:
    """The report at --out, if there is one.

    Raises:
        UserError: it is no report, or has other "settings".
    """
    if not out.exists():
        return None
    try:
        found = read_json(out)
        stored = dict(found["settings"])
    except (ValueError, KeyError, TypeError):
        raise UserError(f"--out {out} exists and is no report of this script; name another file") from None
    if differ := [name for name in settings if stored.get(name) != settings[name]]:
        raise UserError(f"--out {out} has the figures of another {', '.join(differ)}; name another file, or delete it")
    return found


# --- sampling.py: conclusions --------------------------------------------------------------------


def summarise(distances: dict[str, dict[str, float]]) -> dict:
    """Each row's mean distance over the seeds, compared with the first row's."""
    values = {name: list(cells.values()) for name, cells in distances.items() if cells}
    return {name: compare(own, next(iter(values.values()))) for name, own in values.items()}


def compare(own: list[float], first: list[float]) -> dict:
    """"equal": the mean is at most the first's plus its standard deviation. "deviations": how many lie between the means."""
    std, spread = (statistics.stdev(values) if len(values) > 1 else None for values in (own, first))
    away = statistics.mean(own) - statistics.mean(first)
    return {"distance": statistics.mean(own), "std": std, "equal": None if spread is None else away <= spread,
            "deviations": away / spread if spread else None}


def table(report: dict) -> list[str]:
    timed = [title for batch in report["times"] for title in (f"s/image at {batch}", "ratio")]
    head = ["", "model calls", "block calls", *timed, "RMSE", "to", "FD-pixel32", "std", "deviations", "equal"]
    lines = [head, *(list(map(figure, line(report, name))) for name in report["settings"]["rows"])]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(cells, widths)) for cells in lines]


def line(report: dict, name: str) -> list:
    row, summary = report["settings"]["rows"][name], report["summary"].get(name, {})
    cells = [cells[name] or {} for cells in report["times"].values()]
    timed = [cell.get(key) for cell in cells for key in ("seconds_per_image", "ratio")]
    return [name, row["model_calls"], row["block_calls"], *timed, *report["rmse"][name].values(),
            *(summary.get(key) for key in ("distance", "std", "deviations", "equal"))]


def figure(value: str | float | bool | None) -> str:
    if value is None or isinstance(value, bool):
        return {None: "-", True: "yes", False: "no"}[value]
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def fastest(report: dict) -> list[str]:
    """One sentence per batch size."""
    said = []
    for batch, cells in report["times"].items():
        equal = {name: cell["ratio"] for name, cell in cells.items()
                 if cell and cell["ratio"] and report["summary"].get(name, {}).get("equal")}
        if equal:
            name = max(equal, key=equal.get)
            said.append(f"The fastest of equal quality at batch {batch}: {name}, {equal[name]:.2f} times as fast as "
                        f"{next(iter(cells))}")
    return said


def plot(report: dict, path: Path) -> Path | None:
    """Plot distance over s/image at the largest timed batch, both logarithmic. None if no row has both."""
    summary, batch = report["summary"], max(report["times"], key=int, default=None)
    cells = report["times"].get(batch, {})
    timed = {name: cell["seconds_per_image"] for name, cell in cells.items() if cell and name in summary}
    if not timed:
        return None
    from matplotlib.figure import Figure  # from the extra `notebooks`

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    first, own = next(iter(summary.items()))
    axes.axhspan(0, own["distance"] + (own["std"] or 0.0), color="tab:green", alpha=0.12, label=f"equal to {first}, or better")
    for i, (name, seconds) in enumerate(sorted(timed.items(), key=lambda item: item[1])):
        axes.errorbar(seconds, summary[name]["distance"], summary[name]["std"], fmt="o", color="tab:blue", capsize=3)
        axes.annotate(name, (seconds, summary[name]["distance"]), (6, 14 if i % 2 else -14), textcoords="offset points",
                      fontsize=8)
    axes.set(xscale="log", yscale="log", xlabel=f"s/image, batch {batch}, {report['settings']['device']}", ylabel="FD-pixel32",
             title=report["settings"]["checkpoint"])
    axes.legend()
    figure.savefig(path, dpi=120)
    return path


# --- gpu_report.py -------------------------------------------------------------------------------


def markdown(report: dict, expectations: dict) -> str:
    """One table a stage: an item and row a line, its figures, and the expected one where there is an estimate."""
    of = report["settings"]
    lines = [f"# {of['device']}, torch {of['torch']}, {report['date']}{', toy sizes' if of['toy'] else ''}", "",
             f"Expected: {expectations['about']}", ""]
    for stage, items in report["stages"].items():
        lines += [f"## {stage}", "", "| | figures | expected | measured / expected |", "|---|---|---|---|"]
        for item, rows in items.items():
            for row, figures in rows.items():
                expected = expectations["figures"].get(f"{stage}: {item}: {row}", {})
                shown = ", ".join(f"{name} {value:.4g}" if isinstance(value, int | float) else f"{name} {value}"
                                  for name, value in figures.items() if value is not None)
                ratio = ", ".join(f"{figures[name] / value:.2f}" for name, value in expected.items() if figures.get(name))
                estimate = ", ".join(f"{name} {value:.4g}" for name, value in expected.items())
                lines.append(f"| {item}: {row} | {shown} | {estimate} | {ratio} |")
        lines.append("")
    lines += [f"Failed: {name}: {why}" for name, why in report["failed"].items()]
    return "\n".join(lines).rstrip() + "\n"
