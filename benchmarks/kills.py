"""`python -m benchmarks.kills [--kills 50] [--seed 0]`: runs that are killed at random moments and resumed until done.

Each process is `fastpeft train`, forked from one that has imported everything, and gets SIGKILL: every other one while
a checkpoint is being written, the rest at any time. What is left in the folder is gone on with as a user would. A run
that came to its end must be, bit for bit, the run without a break. Writes record, table and figure of
docs/reliability.md.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import re
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from fastpeft.bench.tables import insert

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "benchmarks" / "results" / "cpu" / "kills.json"
PAGE, FIGURE = ROOT / "docs/reliability.md", ROOT / "docs/assets/reliability/kills.svg"
MODEL = ROOT / "fastpeft/quickstart/assets/model"
STEPS, SAVED_EVERY = 20, 3
SETTINGS = (
    f"--learning-rate 1e-2 --batch-size 2 --max-steps {STEPS} --save-steps {SAVED_EVERY} --logging-steps 1 --lora.r 4 "
    "--lora.dropout 0.2 --max-length 64 --report-to none"
).split()
SAVING, ANY = "while a checkpoint was written", "at any time"


class Attempt:
    """One process of `fastpeft train`."""

    def __init__(self, folder: Path, arguments: list[str]) -> None:
        self._folder, self._log = folder, folder.parent / "log"
        self._log.unlink(missing_ok=True)
        self._process = multiprocessing.get_context("fork").Process(target=_train, args=(self._log, folder, arguments))
        self._begun = time.monotonic()
        self._process.start()

    def killed(self, when: str, after_s: float) -> bool:
        """Whether it was there to be killed: after so many seconds, or so many after a checkpoint was begun."""
        if when == SAVING:
            known = set(self._folder.glob("checkpoint-*"))
            while self._process.is_alive() and not set(self._folder.glob("checkpoint-*")) - known:
                time.sleep(0.0005)
        self._process.join(after_s)
        alive = self._process.exitcode is None
        self._process.kill()
        self._process.join()
        return alive and self._process.exitcode == -signal.SIGKILL

    def finish(self) -> float:
        """Seconds that it took.

        Raises:
            RuntimeError: it failed.
        """
        self._process.join()
        if self._process.exitcode:
            raise RuntimeError(f"exit code {self._process.exitcode}: {self._log.read_text()[-2000:]}")
        return time.monotonic() - self._begun

    @property
    def steps(self) -> int:
        """That it has shown."""
        shown = re.findall(r"step (\d+)/", self._log.read_text() if self._log.exists() else "")
        return max(map(int, shown), default=0)


def _train(log: Path, folder: Path, arguments: list[str]) -> None:
    from fastpeft.cli import app

    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    code = app.run(["train", "--output-dir", str(folder), *arguments])
    sys.stdout.flush()
    os._exit(code)


def result(folder: Path) -> tuple[Any, ...]:
    """What a run has come to: losses, evaluation, the adapter's bytes."""
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    return run["losses"], run["evaluation"], (folder / "adapter_model.safetensors").read_bytes()


def measure(kills: int, seed: int) -> dict[str, Any]:
    """Kill so many processes.

    Returns:
        Each kill, in order, with what it left; how many runs were finished, and how many of them were the same.
    """
    from fastpeft.bench.records import environment
    from fastpeft.training.checkpoints import checkpoints, is_whole, last_checkpoint

    chance, found, runs, same = random.Random(seed), list[dict[str, Any]](), 0, 0
    with tempfile.TemporaryDirectory() as place:
        rows = Path(place) / "rows.jsonl"
        rows.write_text("".join(json.dumps({"text": f"the number {n} comes after {n - 1}"}) + "\n" for n in range(24)))
        begin = ["--model", str(MODEL), "--data", str(rows), *SETTINGS]
        lasts = Attempt(Path(place) / "warm", begin).finish()
        lasts = Attempt(Path(place) / "whole", begin).finish()
        wanted = result(Path(place) / "whole")
        while len(found) < kills:
            folder, arguments, runs = Path(place) / f"run-{runs}", begin, runs + 1
            while True:
                when = (SAVING, ANY)[len(found) % 2]
                if len(found) >= kills:
                    Attempt(folder, arguments).finish()
                    break
                attempt = Attempt(folder, arguments)
                if not attempt.killed(when, chance.uniform(0, 0.03 if when == SAVING else lasts)):
                    attempt.finish()
                    break
                last = last_checkpoint(folder)
                half = [one.name for one in checkpoints(folder) if not is_whole(one)]
                kept = 0 if last is None else int(last.name.partition("-")[2])
                found.append({"when": when, "shown": attempt.steps, "kept": kept, "half": half})
                print(f"{len(found)}: {found[-1]}", flush=True)
                arguments = begin if last is None else ["--resume"]
                if last is None and folder.exists():
                    arguments = [*begin, "--overwrite"]
            same += result(folder) == wanted
    return {
        "kills": found,
        "runs": runs,
        "same": same,
        "settings": " ".join(SETTINGS),
        "environment": vars(environment("cpu")),
    }


def table(record: dict[str, Any]) -> str:
    """What each kind of kill left."""
    lines = [
        "| killed | processes | half a checkpoint left | steps to be made again: median, most |",
        "|---|---|---|---|",
    ]
    for when in (SAVING, ANY):
        some = [kill for kill in record["kills"] if kill["when"] == when]
        again = sorted(max(0, kill["shown"] - kill["kept"]) for kill in some)
        half = sum(bool(kill["half"]) for kill in some)
        lines.append(f"| {when} | {len(some)} | {half} | {again[len(again) // 2]}, {again[-1]} |")
    where = record["environment"]
    lines += [
        "",
        f"{record['same']} of {record['runs']} runs of {STEPS} steps, saved every {SAVED_EVERY}, came to the same "
        f"losses, evaluation and adapter, bit for bit, as the run without a break. {where['device']}, torch "
        f"{where['versions']['torch']}, transformers {where['versions']['transformers']}; "
        "`python -m benchmarks.kills`.",
    ]
    return "\n".join(lines)


def figure(record: dict[str, Any], path: Path) -> None:
    """The last step that each killed process had shown, and the one that the next began from."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(9, 3.6), layout="constrained")
    axes = drawn.subplots()
    for number, kill in enumerate(record["kills"], 1):
        axes.plot(
            [number, number], [kill["kept"], max(kill["shown"], kill["kept"])], color="0.7", linewidth=2, zorder=1
        )
    for when, colour in ((SAVING, "tab:red"), (ANY, "tab:blue")):
        some = [(number, kill) for number, kill in enumerate(record["kills"], 1) if kill["when"] == when]
        axes.scatter(
            [n for n, _ in some], [k["shown"] for _, k in some], s=16, color=colour, label=f"killed {when}", zorder=2
        )
    axes.scatter(
        range(1, len(record["kills"]) + 1),
        [kill["kept"] for kill in record["kills"]],
        s=16, marker="_", color="black", label="whole checkpoint that was left", zorder=3,
    )  # fmt: skip
    axes.set_xlabel("kill")
    axes.set_ylabel("step")
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, 1.17), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(path, metadata={"Date": None})


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kills", description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--table", action="store_true", help="run nothing; make table and figure anew from the record")
    options = parser.parse_args()
    if not options.table:
        import trl  # noqa: F401  # what every process would import

        import fastpeft.strategies.run  # noqa: F401
        from fastpeft_kernels.native.extension import group_extension

        group_extension(wait=True)  # its thread must not be at work when a process is forked
        RECORD.write_text(json.dumps(measure(options.kills, options.seed), indent=1) + "\n", encoding="utf-8")
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    PAGE.write_text(insert(PAGE.read_text(encoding="utf-8"), table(record), "kills"), encoding="utf-8")
    figure(record, FIGURE)
    return record["runs"] - record["same"]


if __name__ == "__main__":
    sys.exit(main())
