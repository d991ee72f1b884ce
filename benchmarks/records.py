"""What a benchmark found: records, their table, and the file that they are merged into."""

import importlib.metadata
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from timing import Ratio

_PACKAGES = ("spade-lens", "torch", "transformers", "transformer-lens", "nnsight", "numpy")


@dataclass(frozen=True)
class Record:
    """One figure.

    Args:
        name: Its name; a new record takes the place of an old one of the same name.
        ratio: The figure, in ``unit``; None where the subject is not installed.
        low: The lower end of its interval.
        high: The upper end.
        rounds: How many rounds it is the median of.
        target: The most that it may be, where a target is set.
        met: Whether it is no more than that.
        unit: What it is a multiple of.
        base: What was run beside it.
        note: What a reader needs to know.
        cpu_ratio: The same by processor time of all threads instead of wall time.
        base_seconds: The base's own median wall time in that run.
    """

    name: str
    ratio: float | None
    low: float | None = None
    high: float | None = None
    rounds: int = 0
    target: float | None = None
    met: bool | None = None
    unit: str = "x base"
    base: str = ""
    note: str = ""
    cpu_ratio: float | None = None
    base_seconds: float | None = None


def of_ratio(
    name: str, measured: Ratio, *, base: str, target: float | None = None, note: str = ""
) -> Record:
    return Record(
        name=name,
        ratio=measured.ratio,
        low=measured.low,
        high=measured.high,
        rounds=measured.rounds,
        target=target,
        met=None if target is None else measured.ratio <= target,
        base=base,
        note=note,
        cpu_ratio=measured.cpu_ratio,
        base_seconds=measured.base_seconds,
    )


def absent(name: str, why: str) -> Record:
    return Record(name=name, ratio=None, note=why)


def table(records: Sequence[Record]) -> str:
    head = ("figure", "ratio", "interval", "cpu", "rounds", "target", "met", "note")
    rows = [head]
    for r in records:
        if r.ratio is None:
            rows.append((r.name, "-", "", "", "", "", "", r.note))
            continue
        rows.append(
            (
                r.name,
                f"{r.ratio:.3f}" + (f" {r.unit}" if r.unit != "x base" else ""),
                "" if r.low is None else f"{r.low:.3f} to {r.high:.3f}",
                "" if r.cpu_ratio is None else f"{r.cpu_ratio:.3f}",
                str(r.rounds),
                "" if r.target is None else f"<= {r.target:g}",
                {None: "", True: "yes", False: "NO"}[r.met],
                "; ".join(filter(None, (r.base and f"base: {r.base}", r.note))),
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(head) - 1)]
    return "\n".join(
        "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[-1]])
        for row in rows
    )


def circumstances(*, seed: int, threads: int, model: str) -> dict[str, Any]:
    """Versions, seed, date and machine of this run."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "versions": versions,
        "seed": seed,
        "model": model,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {
            "cpu": _cpu(),
            "cores": os.cpu_count(),
            "threads": threads,
            "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY"),
            # Above the number of cores, others were computing too.
            "load": round(os.getloadavg()[1], 1),
        },
    }


def named(out: Path, ending: str) -> Path:
    """A path with an ending; not with_suffix, for there are points in the names of models."""
    return out.with_name(out.name + ending)


def merge(path: Path, records: Sequence[Record], run: dict[str, Any]) -> None:
    """Write the records into ``path``; those of other environments stay there.

    transformer-lens 3.9 and 4 cannot share an environment, so one file takes two runs.
    """
    run_name = f"transformer-lens {run['versions']['transformer-lens']}"
    stored = json.loads(path.read_text()) if path.exists() else {"runs": {}, "records": []}
    by_name = {record["name"]: record for record in stored["records"]}
    for record in records:
        # "Not installed here" is no news where another environment has measured it.
        if record.ratio is not None or by_name.get(record.name, {}).get("ratio") is None:
            by_name[record.name] = {**asdict(record), "run": run_name}
    runs = {**stored["runs"], run_name: run}
    used = {record["run"] for record in by_name.values()}
    whole = {
        "runs": {name: runs[name] for name in sorted(used)},
        "records": [by_name[name] for name in sorted(by_name)],
    }
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(whole, indent=2) + "\n")
    partial.replace(path)


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
