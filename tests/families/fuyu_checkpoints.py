"""Small Fuyu checkpoints with unusual shapes: as transformers saves them, and with the published config.

Three faults of transformers' processor are mended here, by writing the ids by hand. With the PIL backend it cuts no
patches. It drops the coordinates of boxes and points after having worked them out, and would write them with nothing
between two numbers: here, as in its first version, each is a token of its own. And it opens no answer to a question
without an image: here such a question begins and ends as every other.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import FuyuConfig, FuyuForCausalLM, FuyuProcessor, PreTrainedTokenizerFast
from transformers.models.fuyu.image_processing_pil_fuyu import FuyuImageProcessorPil

from tests.families.survey import Inputs, Oracle, Pictures, Reference, odd_vocabulary, randomise

BOUNDS, PATCH = (42, 66), 6  # pixels: height and width of what an image is shrunk to fit in
MARKS = {"<box>": ("<0x00>", "<0x01>"), "<point>": ("<0x02>", "<0x03>")}
ANSWER = "<0x04>"
WORDS = ("▁what", "▁is", "▁in", "▁this", "▁image", "▁a", "▁red", "▁apple", "s", "?")


class FuyuOracle(Oracle):
    """Writes image, begin token, question and answer token; one image a sample at most, as the class has it."""

    def texts(self, questions: Sequence[str], images: Sequence[Pictures]) -> list[str]:
        """The question and a line break: there is no published chat template."""
        assert all(len(own) <= 1 for own in images)
        return [question + "\n" for question in questions]

    def inputs_of(self, texts: Sequence[str], images: Sequence[Pictures]) -> Inputs:
        rows, patches = [], []
        for text, own in zip(texts, images, strict=True):
            row, scale = [], 1.0
            for image in own:
                seen = self._seen(image)
                row += self._grid(seen["rows"], seen["columns"])
                patches.append(seen["patches"])
                scale = seen["scale"]
            rows.append([*row, self.tokenizer.bos_token_id, *self._question(text, scale)])
        longest = max(len(row) for row in rows)
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        seen_patches = {"pixel_values": torch.cat(patches)} if patches else {}
        return {"input_ids": ids, "attention_mask": mask, **seen_patches}

    def pixels(self, images: Pictures) -> Inputs:
        """Patches [P, 3 * side * side] of all images, in the order of row, column and channel."""
        return {"pixel_values": torch.cat([self._seen(image)["patches"] for image in images])}

    def _seen(self, image: Any) -> dict[str, Any]:
        made = self.processor.image_processor([image], return_tensors="pt")
        height, width = int(made["image_unpadded_heights"][0][0]), int(made["image_unpadded_widths"][0][0])
        rows, columns = -(-height // PATCH), -(-width // PATCH)
        shown = torch.as_tensor(made["images"][0][0])[:, : rows * PATCH, : columns * PATCH]
        patches = shown.unflatten(1, (rows, PATCH)).unflatten(3, (columns, PATCH)).permute(1, 3, 2, 4, 0)
        scale = float(made["image_scale_factors"][0][0])
        return {"rows": rows, "columns": columns, "patches": patches.flatten(2).flatten(0, 1), "scale": scale}

    def _grid(self, rows: int, columns: int) -> list[int]:
        ids = self.tokenizer.get_vocab()
        return ([ids["|SPEAKER|"]] * columns + [ids["|NEWLINE|"]]) * rows

    def _question(self, text: str, scale: float) -> list[int]:
        """Ids of a question and of the answer token; numbers within `<box>` or `<point>` are halved and scaled."""
        ids = self.tokenizer.get_vocab()
        made: list[int] = []
        for piece in re.split(r"(<box>.*?</box>|<point>.*?</point>)", text):
            if found := re.fullmatch(r"(<box>|<point>)(.*)</\w+>", piece):
                begin, end = MARKS[found[1]]
                numbers = [round(float(number) / 2 * scale) for number in found[2].split(",")]
                made += [ids[begin], *(ids[str(number)] for number in numbers), ids[end]]
            elif piece:
                made += self.tokenizer(piece, add_special_tokens=False)["input_ids"]
        return [*made, ids[ANSWER]]


def text_tokenizer() -> PreTrainedTokenizerFast:
    """Unigram pieces as SentencePiece has them, numbers among them, with the image tokens in their midst."""
    letters = [chr(code) for code in range(33, 127)] + ["▁", "\n"]
    marks = [begin_or_end for pair in MARKS.values() for begin_or_end in pair]
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0)]
    pieces += [(mark, -1.0) for mark in (*marks, ANSWER)]
    pieces += [(letter, -5.0) for letter in letters if not letter.isdigit()]
    pieces += [("|SPEAKER|", -1.0), ("|ENDOFTEXT|", -1.0), ("|NEWLINE|", -1.0)]
    pieces += [(str(number), -3.0 - len(str(number))) for number in range(121)]
    pieces += [(word, -2.0) for word in WORDS if len(word) > 1]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>"
    )


def make() -> Oracle:
    """An odd depth and an odd number of heads; half of each head is turned."""
    tokenizer = text_tokenizer()
    ids = tokenizer.get_vocab()
    config = FuyuConfig(
        text_config={
            "model_type": "persimmon", "vocab_size": odd_vocabulary(tokenizer), "hidden_size": 60,
            "intermediate_size": 84, "num_hidden_layers": 3, "num_attention_heads": 5, "hidden_act": "relu2",
            "max_position_embeddings": 1024, "qk_layernorm": True, "layer_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 2e4, "partial_rotary_factor": 0.5},
            "bos_token_id": ids["<s>"], "eos_token_id": ids["</s>"], "pad_token_id": 0,
            "tie_word_embeddings": False,
        },
        patch_size=PATCH, num_channels=3, image_size=36, image_token_id=ids["|SPEAKER|"],
    )  # fmt: skip
    model = FuyuForCausalLM(config)
    randomise(model, seed=1, std=0.15)
    sizes: dict[str, Any] = {"patch_size": {"height": PATCH, "width": PATCH}}
    images = FuyuImageProcessorPil(size={"height": BOUNDS[0], "width": BOUNDS[1]}, **sizes)
    processor = FuyuProcessor(images, tokenizer)
    return FuyuOracle(model, processor, placeholders=(ids["|SPEAKER|"],), eos_token_id=ids["</s>"])


def hub(oracle: Oracle, folder: Path) -> None:
    """Write the published form: the decoder's settings at the top of the config."""
    whole, text = oracle.model.config, oracle.model.config.text_config
    names = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act",
        "max_position_embeddings", "layer_norm_eps", "qk_layernorm", "hidden_dropout", "attention_dropout",
        "initializer_range", "use_cache", "bos_token_id", "eos_token_id",
    )  # fmt: skip
    config = {
        "architectures": ["FuyuForCausalLM"],
        "model_type": "fuyu",
        **{name: getattr(text, name) for name in names},
        "image_size": whole.image_size,
        "image_token_id": whole.image_token_id,
        "num_channels": 3,
        "pad_token_id": None,
        "patch_size": PATCH,
        "rope_scaling": None,
        "rope_theta": text.rope_parameters["rope_theta"],
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    oracle.tokenizer.save_pretrained(folder)
    images = json.loads(oracle.processor.image_processor.to_json_string())
    images |= {"image_processor_type": "FuyuImageProcessor", "processor_class": "FuyuProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    weights = {}
    for name, tensor in oracle.model.state_dict().items():
        if name == "lm_head.weight":
            name = "language_model.lm_head.weight"
        name = name.removeprefix("model.")
        if not name.endswith("lm_head.weight"):
            name = name.replace("language_model.", "language_model.model.", 1)
        weights[name] = tensor.clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


FUYU = Reference(
    "fuyu",
    make,
    {"transformers": Oracle.save, "hub": hub},
    trained=(
        "model.vision_embed_tokens.weight",
        "model.language_model.embed_tokens.weight",
        "model.language_model.layers.1.self_attn.query_key_value.weight",
        "model.language_model.layers.2.self_attn.q_layernorm.bias",
        "model.language_model.final_layernorm.weight",
        "lm_head.weight",
    ),
    most_images=1,
)
