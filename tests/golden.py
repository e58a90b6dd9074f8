"""What the models give, number by number: made by the model's public calls, to compare one version with another.

`python -m tests.golden` writes `tests/golden.json` anew, after a change that is meant to change results.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import unimm
from tests.families import emu3_checkpoints, janus_checkpoints
from unimm.pipeline import UniMM

FILE = Path(__file__).with_name("golden.json")
MODELS = ("janus", "emu3", "embedded")
GRID = (3, 5)  # rows and columns of codes that an Emu3 draws here; the others draw their own
SHOWN = 4  # numbers of a tensor that are stored beside its digest
QUESTIONS = ["what is this? it is a red apple", "what"]
Results = dict[str, Any]


def machine() -> dict[str, str]:
    """What bits depend on: the processor, its instructions and torch."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    parts = (line.partition(":") for line in lines)
    known = {key.strip(): value.strip() for key, _, value in parts}
    names = ("model name", "cpu family", "model", "stepping", "cache size")
    processor = " ".join(known[name] for name in names if name in known)
    return {
        "processor": processor or platform.processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
    }


def results(name: str, folder: Path) -> Results:
    """All that one model gives.

    Args:
        name: one of `MODELS`.
        folder: empty; checkpoints are written there.
    """
    if name == "janus":
        janus_checkpoints.janus(folder / "source")
    elif name == "emu3":
        emu3_checkpoints.emu3(folder / "source")
    with _one_thread():
        um = unimm.load("embedded" if name == "embedded" else folder / "source", device="cpu")
        return {
            **_inputs(um),
            **_logits(um),
            **_losses(um),
            **_answers(um),
            **_drawings(um),
            **_saved(um, folder / "saved"),
        }


@contextmanager
def _one_thread() -> Iterator[None]:
    """Within, sums are added up in one order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def images() -> list[Image.Image]:
    """Three images of unlike sizes."""
    rng = np.random.default_rng(0)
    sizes = [(31, 17), (40, 90), (33, 33)]
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes]


def _inputs(um: UniMM) -> Results:
    one, two, three = images()
    inputs = um.processor(QUESTIONS, [[one, two], [three]])
    return {f"inputs.{name}": _stored(tensor) for name, tensor in inputs.items()}


@torch.no_grad()
def _logits(um: UniMM) -> Results:
    one, two, three = images()
    inputs = um.processor(QUESTIONS, [[one, two], [three]])
    return {"logits": _stored(um.model(**inputs).logits)}


def _losses(um: UniMM) -> Results:
    """Losses and gradients of a question with its answer, beside a prompt with its drawing."""
    inputs, labels = _training_rows(um)
    output = um.model(**inputs, labels=labels)
    output.loss.backward()
    found = {name: _stored(getattr(output, name).detach()) for name in ("loss", "text_loss", "code_loss")}
    for name, weight in um.model.named_parameters():
        if weight.grad is not None:
            found[f"gradient.{name}"] = _stored(weight.grad)
            weight.grad = None
    return found


def _training_rows(um: UniMM) -> tuple[dict[str, Tensor], Tensor]:
    """Two rows, filled up on the right: model inputs and labels."""
    processor, layout = um.processor, um.processor.layout
    rows, columns = GRID if layout.shared else layout.grid
    codes = (
        torch.arange(rows * columns).view(1, rows, columns) * 7 % um.model.config.generation_config().codes
    )
    seen = processor(["what is this?"], [images()[:1]])
    asked, answer = seen.pop("input_ids")[0].tolist(), processor.text_ids("a red apple")
    prompt = processor.drawing_ids("a red apple", (rows, columns))
    shared = layout.shared
    drawn = layout.tokens(codes[0]).tolist() if shared else [layout.code] * codes.numel()
    is_code = layout.code_positions(torch.tensor(drawn)).tolist()
    targets = iter((codes.flatten() + (layout.code if shared else 0)).tolist())
    labelled = [next(targets) if one else -100 for one in is_code]
    pairs = [
        ([*asked, *answer], [-100] * len(asked) + answer),
        ([*prompt, *drawn], [-100] * len(prompt) + labelled),
    ]
    length = max(len(ids) for ids, _ in pairs)
    ids = [row + [processor.pad] * (length - len(row)) for row, _ in pairs]
    labels = [row + [-100] * (length - len(row)) for _, row in pairs]
    attended = [[1] * len(row) + [0] * (length - len(row)) for row, _ in pairs]
    inputs = {**seen, "input_ids": torch.tensor(ids), "attention_mask": torch.tensor(attended)}
    if not shared:
        inputs["image_codes"] = codes
    return inputs, torch.tensor(labels)


def _answers(um: UniMM) -> Results:
    one, two, three = images()
    asked = um.ask([[one, two], three, None], ["what is this?", "what", "a red"], max_new_tokens=8)
    return {"answers": asked, "captions": um.caption([one, two, three], max_new_tokens=8)}


def _drawings(um: UniMM) -> Results:
    prompts = ["a red apple", "a blue background with what"]
    stride = um.processor.stride
    size = (GRID[1] * stride, GRID[0] * stride) if um.processor.layout.shared else None
    images, codes = um.draw(prompts, n=2, seed=7, size=size, return_codes=True)
    _, greedy = um.draw(prompts[:1], temperature=0, guidance_scale=2, size=size, return_codes=True)
    found = {"codes": _stored(codes), "greedy_codes": _stored(greedy)}
    decoded = um.image_tokenizer.decode(greedy)
    found["decoded"] = _stored(decoded)
    found["pixels"] = _stored(torch.from_numpy(np.stack([np.asarray(image) for image in images])))
    found["encoded"] = _stored(um.image_tokenizer.encode(decoded))
    return found


def _saved(um: UniMM, folder: Path) -> Results:
    um.save(folder)
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config.pop("transformers_version", None)
    stored = {f"tensors.{name}": _stored(tensor) for name, tensor in sorted(tensors.items())}
    return {"config": config, **stored}


def _stored(tensor: Tensor) -> dict[str, Any]:
    """Shape, type and digest of a tensor, and some of its numbers."""
    tensor = tensor.detach().cpu().contiguous()
    flat = tensor.flatten()
    places = torch.linspace(0, max(len(flat) - 1, 0), min(SHOWN, len(flat))).round().long()
    digest = hashlib.sha256(tensor.numpy().tobytes()).hexdigest()[:16]
    kind = str(tensor.dtype).removeprefix("torch.")
    return {
        "shape": list(tensor.shape),
        "dtype": kind,
        "digest": digest,
        "numbers": [float(f"{number:.6g}") for number in flat[places].tolist()],
    }


def apart(name: str) -> Results:
    """What one model gives in a process of its own, whose memory no other test has laid out."""
    program = [sys.executable, "-m", "tests.golden", name]
    root = FILE.parents[1]
    done = subprocess.run(
        program, cwd=root, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, check=True
    )
    found: Results = json.loads(done.stdout.splitlines()[-1])
    return found


def main(names: Sequence[str]) -> None:
    """Print what one model gives, or write the file anew."""
    if names:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(results(names[0], Path(folder))))
        return
    FILE.write_text(json_lines({"machine": machine(), **{name: apart(name) for name in MODELS}}))


def json_lines(found: dict[str, Results]) -> str:
    """JSON with a line for each result, so that a change shows which ones it moves."""
    blocks = []
    for name, values in found.items():
        lines = [
            f"  {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in values.items()
        ]
        blocks.append(f" {json.dumps(name)}: {{\n" + ",\n".join(lines) + "\n }")
    return "{\n" + ",\n".join(blocks) + "\n}\n"


if __name__ == "__main__":
    main(sys.argv[1:])
