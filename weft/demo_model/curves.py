"""Draw the loss curves: `python -m weft.demo_model.curves --log 6m=RUN/log.jsonl ... --out loss.svg`."""

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

Records = list[dict[str, float]]

LINES: list[tuple[str, str, dict[str, Any]]] = [
    ("tales", "training, tales", {"linewidth": 0.8, "alpha": 0.35}),
    ("chats", "training, chats", {"linewidth": 0.8, "alpha": 0.6, "linestyle": ":"}),
    ("heldout", "held-out tales", {"linewidth": 2, "marker": "."}),
]


def read_log(path: Path) -> Records:
    """Read a run's log; where a resumed run went over the same steps again, the later record counts."""
    records = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    by_step = {record["step"]: record for record in records}
    return [by_step[step] for step in sorted(by_step)]


def series(records: Records, name: str) -> tuple[list[float], list[float]]:
    """Millions of tokens seen, and the named loss."""
    chosen = [record for record in records if name in record]
    return [record["tokens"] / 1e6 for record in chosen], [record[name] for record in chosen]


def draw(logs: dict[str, Records], out: Path) -> None:
    """Plot training loss thinly and held-out loss boldly, one colour a model."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for colour, (model, records) in zip(("#1b6ca8", "#c8553d"), logs.items(), strict=False):
        for name, label, style in LINES:
            axes.plot(*series(records, name), color=colour, label=f"{model}, {label}", **style)
    axes.set(xlabel="tokens seen (millions)", ylabel="loss (nats per token)", ylim=(1.5, 6.0))
    axes.grid(alpha=0.2)
    axes.legend(frameon=False)
    figure.savefig(out)


def main() -> None:
    """Draw as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--log", action="append", required=True, metavar="NAME=PATH")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    named = (log.split("=", 1) for log in arguments.log)
    draw({name: read_log(Path(path)) for name, path in named}, arguments.out)


if __name__ == "__main__":
    main()
