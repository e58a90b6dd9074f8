"""Thirteen ways of seeing, like for like: one decoder and one encoder, equal data and equal time, on two tasks.

    python benchmarks/systems.py                      # 2 x 13 trainings of ten minutes, two side by side
    python benchmarks/systems.py --base tables=runs/tables/export    # from what training/tables.yaml made
    python benchmarks/systems.py --report docs/results/systems.md

Each task begins with a base: a model that is trained for a while on images at their own size and on the texts of the
answers, or one that is given, with a decoder and an encoder of the same sizes. Every way of seeing starts from its
decoder and its encoder, whose patches know their rows and columns and so fit any view; what a system adds (reducer,
connector, gated blocks) starts from nothing. Left out are tiles that look at each other inside the encoder (Llama 3.2)
and features of inner layers (Molmo): they would need encoders of their own.

What is done has a `result.json` in its folder; started again after any end, it goes on where it was.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from like_for_like.parts import BASE, SPECIAL, SYSTEMS, TASKS, Task, model_section
from like_for_like.report import write_report

PROBE_STEPS = 12  # after which the speed of a system is known
OUT = Path("runs/systems")
RESULT = "result.json"  # of one system on one task, in its folder
Rows = list[dict[str, Any]]


# --- one training, in a process of its own ------------------------------------------------------------------


def recipe(task: Task, system: str, folder: Path, model: Path, steps: int, minutes: float) -> Path:
    """Write the recipe of a training and return its path."""
    sides = {"vision", "connector", "fusion", "decoder", "extra_embedding"}
    stage = {
        "name": "task",
        "steps": steps,
        "batch": task.batch,
        "pack": {"length": task.context, "rows": 2},
        "lr": dict.fromkeys(sorted(sides & set(_groups(model))), 1.0e-3),
        "warmup": min(20, steps // 4),
        "schedule": "cosine",
        "min_lr_ratio": 0.05,
        "mixture": task.mixture if system != BASE else task.base_mixture,
    }
    document = {
        "task": "unified",
        "output": str(folder),
        "seed": 0,
        "model": {"pretrained": str(model)},
        "data": task.data,
        "stages": [stage],
        "optimizer": {"beta1": 0.9, "beta2": 0.95, "weight_decay": 0.02, "clip": 1.0},
        "logging": {"every": 5, "tensorboard": False},
        "checkpoint": {"every": max(steps // max(round(minutes), 1), 5), "keep": 1},
        "device": "cpu",
    }
    path = folder.with_suffix(".yaml")
    _write(path, json.dumps(document, indent=1))  # JSON is YAML
    return path


def _groups(model: Path) -> list[str]:
    import unimm

    return list(unimm.load(model, "cpu", "float32").model.parts())


def start_model(task: Task, system: str, folder: Path, base: Path | None) -> Path:
    """Return the folder of a system's model before training: what the base has too is the base's."""
    import torch

    import unimm
    from unimm.models.modeling import UniMMModel
    from unimm.pipeline import UniMM
    from unimm.processing.processor import UniMMProcessor
    from unimm.training.recipe import load_recipe

    start = folder / "start"
    if (start / "config.json").exists():
        return start
    section = model_section(task, system, str(text_tokenizer(task, folder.parent / "tokenizer")))
    document = {"task": "unified", "output": str(folder / "unused"), "model": section,
                "data": task.data, "stages": [{"name": "task", "steps": 1, "batch": 1, "lr": {"connector": 0.1},
                                               "mixture": task.mixture}]}  # fmt: skip
    path = folder / "parts.yaml"
    _write(path, json.dumps(document, indent=1))
    built: Any = load_recipe(path).build_task()
    config = built.config
    if system == "Emu3":  # a shared vocabulary is made for squares
        config.views = {**config.views, "least": 256, "most": task.height * task.width}
    torch.manual_seed(0)
    model = built.build() if system != "Emu3" else UniMMModel(config)
    with torch.no_grad():
        if system == "Emu3":
            source: Any = unimm.load("embedded").image_tokenizer
            target: Any = model.image_tokenizer
            target.load_state_dict(source.state_dict())
        if base is not None:
            begin_with(model, built.processor.tokenizer, base)
    tokenizer = built.processor.tokenizer
    UniMM(model, UniMMProcessor(config, tokenizer)).save(start)
    return start


def begin_with(model: Any, tokenizer: Any, base: Path) -> None:
    """Give a model the decoder, the encoder and the embeddings of the words that a base has too."""
    import unimm

    um, own = unimm.load(base, "cpu", "float32"), model.state_dict()
    known, words = um.processor.tokenizer.get_vocab(), tokenizer.get_vocab()
    shared = [word for word in known if word in words]
    old, new = [known[word] for word in shared], [words[word] for word in shared]
    for name, tensor in um.model.state_dict().items():
        if name not in own or not name.startswith(("decoder.", "vision.")):
            continue
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            own[name][new] = tensor[old]
        elif tensor.shape == own[name].shape:
            own[name].copy_(tensor)


def text_tokenizer(task: Task, folder: Path) -> Path:
    """Return the folder of a task's text tokenizer with the special tokens of all systems."""
    from unimm.data.tables.settings import TableSettings
    from unimm.data.tables.text import table_tokenizer
    from unimm.loading import load

    if not folder.exists():
        scenes = task.tokenizer == "embedded"
        settings = TableSettings(**task.data.get("tables", {}))
        tokenizer = load("embedded").processor.tokenizer if scenes else table_tokenizer(settings)
        tokenizer.add_special_tokens(
            {"additional_special_tokens": SPECIAL}, replace_extra_special_tokens=False
        )
        part = folder.with_suffix(f".{os.getpid()}")
        tokenizer.save_pretrained(part)
        part.replace(folder)
    return folder


def speed_of(task: Task, system: str, folder: Path, model: Path) -> float:
    """Return the steps a second of a training, measured once."""
    from unimm.training.recipe import load_recipe
    from unimm.training.trainer import train

    known = folder / "speed.json"
    if not known.exists():
        probe = folder / "probe"
        train(load_recipe(recipe(task, system, probe, model, PROBE_STEPS, 1)), quiet=True)
        lines = [json.loads(line) for line in (probe / "metrics.jsonl").read_text().splitlines()]
        speeds = [line["samples_per_second"] for line in lines[1:]]
        _write(known, json.dumps(statistics.median(speeds) / task.batch))
    return float(json.loads(known.read_text()))


def run_one(task: Task, system: str, out: Path, minutes: float, given: Path | None = None) -> None:
    """Train and measure one system on one task, and write its result."""
    folder = out / task.name / system.replace(" ", "-").lower()
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a process of a run that was killed may still be at it
        if (folder / RESULT).exists():
            return
        import unimm
        from unimm.training.recipe import load_recipe
        from unimm.training.trainer import train

        base = None if system == BASE else given or out / task.name / BASE / "run" / "export"
        model = start_model(task, system, folder, base)
        speed = speed_of(task, system, folder, model)
        steps = max(round(speed * minutes * 60), 5)
        exported = train(load_recipe(recipe(task, system, folder / "run", model, steps, minutes)), quiet=True)
        trained = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        um = unimm.load(exported, "cpu", "float32")
        row = {
            "task": task.name,
            "system": system,
            "minutes": minutes,
            "steps": steps,
            "base": None if given is None else str(given),
            "samples_per_second": round(speed * task.batch, 2),
            "memory_gib": round(trained, 2),
            "parameters": sum(p.numel() for part in um.model.parts().values() for p in part.parameters()),
            **task.measure(um),
        }
        _write(folder / RESULT, json.dumps(row))


# --- all of them --------------------------------------------------------------------------------------------


def read_rows(out: Path) -> Rows:
    """Return the results there are."""
    return [json.loads(path.read_text()) for path in sorted(out.glob(f"*/*/{RESULT}"))]


def run_all(options: argparse.Namespace, work: Sequence[tuple[str, str, float]]) -> None:
    """Run trainings in processes of one thread each, so many side by side."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = {(row["task"], row["system"]) for row in read_rows(options.out)}
    waiting = [one for one in work if one[:2] not in done]
    print(f"{len(work) - len(waiting)} of {len(work)} are done", flush=True)
    running: dict[tuple[str, str], subprocess.Popen[bytes]] = {}
    while waiting or running:
        while waiting and len(running) < options.together:
            task, system, minutes = waiting.pop(0)
            command = [sys.executable, __file__, "--out", str(options.out), "--minutes", str(minutes),
                       "--one", task, system]  # fmt: skip
            if task in options.base:
                command += ["--base", f"{task}={options.base[task]}"]
            log = options.out / f"{task}-{system}.log".replace(" ", "-").lower()
            log.parent.mkdir(parents=True, exist_ok=True)
            with open(log, "ab") as file:
                running[task, system] = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
        time.sleep(0.5)
        for key, process in list(running.items()):
            if process.poll() is None:
                continue
            del running[key]
            state = "done" if process.returncode == 0 else f"failed ({process.returncode}), see its log"
            print(f"{time.strftime('%H:%M:%S')} {key[0]}, {key[1]}: {state}", flush=True)


def _write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(text)
    part.replace(path)


def _pair(text: str) -> tuple[str, Path]:
    """A task and the folder of a model, from TASK=FOLDER."""
    task, _, folder = text.partition("=")
    if task not in TASKS or not folder:
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected TASK=FOLDER, the task one of {', '.join(TASKS)}"
        )
    return task, Path(folder).resolve()


def main() -> None:
    """Train, measure, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="training of a system on a task")
    parser.add_argument("--base-minutes", type=float, default=25.0, help="training of the base of a task")
    parser.add_argument(
        "--base", type=_pair, action="append", default=[], metavar="TASK=FOLDER", help="a model to begin with"
    )
    parser.add_argument("--together", type=int, default=2, help="trainings side by side")
    parser.add_argument("--tasks", nargs="+", choices=sorted(TASKS), default=sorted(TASKS))
    parser.add_argument("--systems", nargs="+", choices=list(SYSTEMS), default=list(SYSTEMS))
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--report", type=Path, help="write the table and the charts of what is done here")
    parser.add_argument("--one", nargs=2, metavar=("TASK", "SYSTEM"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.base = dict(options.base)
    for folder in options.base.values():
        if not (folder / "config.json").exists():
            parser.error(f"argument --base: {folder}: not a model's folder")
    if options.one:
        task, system = options.one
        run_one(TASKS[task], system, options.out, options.minutes, options.base.get(task))
        return
    if options.report is None:
        own = [task for task in options.tasks if task not in options.base]
        run_all(options, [(task, BASE, options.base_minutes) for task in own])
        pairs = [(task, system) for system in options.systems for task in options.tasks]
        run_all(options, [(task, system, options.minutes) for task, system in pairs])
    write_report(read_rows(options.out), options.report)


if __name__ == "__main__":
    main()
