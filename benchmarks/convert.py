"""Peak memory of converting a sharded checkpoint: a synthetic Janus of about 3 GB, to our layout and back.

    python benchmarks/convert.py            # --layers 6 for a quicker look

Prints the peak memory of each conversion's process, that of importing the same code alone, and the largest shard. At
most the imports, one shard that is read and one that is written are in memory.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import JanusConfig, JanusForConditionalGeneration, LlamaConfig, PreTrainedTokenizerFast

from unimm.data.text_tokenizer import train_text_tokenizer
from unimm.families.convert import SHARD_BYTES

SHARD = "1GB"


def make_checkpoint(folder: Path, layers: int) -> None:
    """Write a Janus as wide as Janus-Pro-1B, in shards; the values of the weights do not matter here."""
    trained = train_text_tokenizer(["a red apple"], 300)
    names = {"bos_token": trained.bos_token, "eos_token": trained.eos_token, "pad_token": trained.pad_token}
    text_tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained.backend_tokenizer, **names)
    config = JanusConfig(
        text_config=LlamaConfig(
            vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=layers,
            num_attention_heads=16, num_key_value_heads=16,
        ),
        vision_config={"num_hidden_layers": 6, "projection_dim": 2048},
        image_token_id=text_tokenizer.get_vocab()["<image_placeholder>"],
        tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = JanusForConditionalGeneration(config)
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.fill_(0.5)
    model.save_pretrained(folder, max_shard_size=SHARD)
    text_tokenizer.save_pretrained(folder)
    (folder / "processor_config.json").write_text(json.dumps({"use_default_system_prompt": True}))


def measure(arguments: list[str]) -> tuple[float, float]:
    """Run a Python program and return its peak memory in MB and its seconds."""
    code = "import resource, runpy, sys\n" + "\n".join(arguments)
    code += "\nprint(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return int(done.stdout.split()[-1]) / 1024, time.perf_counter() - start


def main() -> None:
    """Make, convert there and back, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=12)
    options = parser.parse_args()
    load = "from pathlib import Path; from unimm.families.convert import convert"
    with tempfile.TemporaryDirectory() as place:
        source, ours, back = (Path(place) / name for name in ("source", "ours", "back"))
        subprocess.run([sys.executable, __file__, "--make", str(source), str(options.layers)], check=True)
        shards = [file.stat().st_size / 2**20 for file in source.glob("*.safetensors")]
        base, _ = measure([load])
        print(f"{sum(shards):.0f} MB in {len(shards)} shards, the largest {max(shards):.0f} MB")
        print(f"importing takes {base:.0f} MB")
        for start, end, layout in ((source, ours, "unimm"), (ours, back, "transformers")):
            peak, seconds = measure([load, f"convert(Path({str(start)!r}), Path({str(end)!r}), {layout!r})"])
            allowed = base + max(shards) + SHARD_BYTES / 2**20
            print(f"to {layout:<13} peak {peak:6.0f} MB (at most {allowed:.0f})  {seconds:5.1f} s")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--make"]:
        make_checkpoint(Path(sys.argv[2]), int(sys.argv[3]))
    else:
        main()
