"""The judge's step: every item of a run gets its verdict, in a journal of its own, so that no judge is asked twice."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from unimm.errors import UserError
from unimm.evaluation import environment
from unimm.evaluation.drawing import DRAWINGS, crops_of_grid, read_drawing
from unimm.evaluation.journal import DoneItem, Journal
from unimm.evaluation.judges import ModelJudge, UrlJudge, read_share, read_yes
from unimm.evaluation.official import ItemVerdict, read_judged, wise_verdict
from unimm.evaluation.protocol import EvaluationProtocol, fill_prompt
from unimm.evaluation.rows import file_hash
from unimm.evaluation.scorers.drawings import atom_answers, dpg_questions, dpg_score, wise_marks
from unimm.loading import load

if TYPE_CHECKING:
    from unimm.evaluation.benchmark import RunOptions

AT_ONCE = 8  # requests to a judge behind a URL
CLIP_WEIGHT = 2.5  # of the cosine in CLIPScore (Hessel et al. 2021, arXiv:2104.08718)
YES_NO = "{question} Answer with yes or no."
Judged = tuple[list[DoneItem], dict[str, Any]]


class Verdicts:
    """How the items of one protocol are judged by asking.

    Args:
        protocol: says what is asked.
        judge: is asked.
        folder: of the drawings.
    """

    def __init__(self, protocol: EvaluationProtocol, judge: UrlJudge | ModelJudge, folder: Path) -> None:
        self.protocol, self.judge, self.folder = protocol, judge, folder
        ways: dict[str, Callable[[DoneItem], ItemVerdict]] = {
            "mmvet": self._mmvet, "geneval": self._geneval, "geneval2": self._geneval2, "dpg": self._dpg,
            "wise": self._wise,
        }  # fmt: skip
        name = protocol.scorer.name
        if name not in ways:
            raise UserError(
                f"{protocol.name}: judge.kind: {protocol.judge.kind}; {name} is not judged by asking"
            )
        self.of = ways[name]

    def _mmvet(self, line: DoneItem) -> ItemVerdict:
        fields = {**line["fields"], "question": line["prompt"], "said": line["answer"]}
        prompt = self.protocol.judge.prompt or ""
        found, words = self.judge.ask(f"item {line['key']}", fill_prompt(prompt, fields), [], read_share)
        return {"score": found, "said": words}

    def _images(self, line: DoneItem) -> list[Image.Image]:
        return [read_drawing(self.folder, line["key"], one) for one in line["images"]]

    def _yes(self, line: DoneItem, question: str, image: Image.Image) -> bool:
        template = self.protocol.judge.prompt or YES_NO
        asked = fill_prompt(template, {**line["fields"], "prompt": line["prompt"], "question": question})
        return self.judge.ask(f"item {line['key']}", asked, [_png(image)], read_yes)[0]

    def _geneval(self, line: DoneItem) -> ItemVerdict:
        question = f'Does this image show "{line["prompt"]}"?'
        return [{"score": float(self._yes(line, question, image))} for image in self._images(line)]

    def _geneval2(self, line: DoneItem) -> ItemVerdict:
        (image,) = self._images(line)
        atoms = []
        for question, answer in line["fields"]["questions"]:
            right = {one.lower() for one in atom_answers(question, answer)}

            def read(words: str, right: set[str] = right) -> bool | None:
                first = words.lower().replace(".", " ").split()
                return first[0] in right if first else None

            asked = f"{question} Answer in one word."
            atoms.append(float(self.judge.ask(f"item {line['key']}", asked, [_png(image)], read)[0]))
        return {"score": sum(atoms) / len(atoms), "atoms": atoms}

    def _dpg(self, line: DoneItem) -> ItemVerdict:
        (grid,) = self._images(line)
        assert self.protocol.drawing is not None
        (questions,) = dpg_questions(line["fields"]["rows"]).values()
        crops = [
            {one["id"]: self._yes(line, one["question"], crop) for one in questions}
            for crop in crops_of_grid(grid, self.protocol.drawing.samples)
        ]
        return dpg_score(questions, crops)

    def _wise(self, line: DoneItem) -> ItemVerdict:
        (image,) = self._images(line)
        prompt = self.protocol.judge.prompt or ""
        asked = fill_prompt(prompt, {**line["fields"], "prompt": line["prompt"]})
        marks, words = self.judge.ask(f"item {line['key']}", asked, [_png(image)], wise_marks)
        return {**wise_verdict(marks, int(line["key"])), "said": words}


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def check_judge(protocol: EvaluationProtocol) -> None:
    """Refuse a judge that lacks something, before anything is asked or drawn.

    Raises:
        UserError: naming the key.
    """
    if protocol.judge.kind == "url":
        UrlJudge(protocol.judge)
    marks = protocol.scorer.name in ("mmvet", "wise") and protocol.judge.kind in ("url", "model")
    if marks and protocol.judge.prompt is None:
        raise UserError(
            f"{protocol.name}: judge.prompt: missing; it is what the judge is asked, word for word"
        )


def judge_items(
    protocol: EvaluationProtocol, options: RunOptions, lines: list[DoneItem], identity: Mapping[str, Any]
) -> Judged:
    """Give every item its verdict.

    Returns:
        The items with `scored`, and who judged.

    Raises:
        UserError: the judge fails, or a drawing is missing.
    """
    choice, folder = protocol.judge, drawings_folder(options)
    if protocol.scorer.name == "fid":
        return _distance(protocol, options, lines)
    if options.judged is not None:
        verdicts = read_judged(protocol.scorer.name, options.judged, lines)
        by: dict[str, Any] = {
            "kind": "file",
            "file": options.judged.name,
            "version": file_hash(options.judged),
        }
        return _with(lines, verdicts), by
    if choice.kind == "emojiscenes":
        from unimm.evaluation.emojiscenes.twin import judge_scenes

        return _with(lines, judge_scenes(folder, lines, options)), {"kind": choice.kind, "version": "1"}
    if choice.kind == "clip":
        return _clip(choice.model, folder, lines)
    if choice.kind == "none" or choice.kind == "file":
        raise UserError(f"{protocol.name}: no judge; give --judged with its script's output, or judge.kind")
    journal = Journal(options.output, {**identity, "judge": choice.model_dump()}, name="judged")
    earlier = next((line["version"] for line in journal.done.values()), None)
    judge: UrlJudge | ModelJudge
    if choice.kind == "url":
        judge = UrlJudge(choice, earlier)
    else:
        judge = ModelJudge(load(choice.model, device=options.device), environment.model_hash(choice.model))
        if choice.version not in (None, judge.version):
            raise UserError(
                f"judge.version: {choice.version}, but {choice.model} has the hash {judge.version}"
            )
    ways = Verdicts(protocol, judge, folder)
    left = [line for line in lines if line["key"] not in journal.done]
    for line, verdict in _asked(ways, left, AT_ONCE if choice.kind == "url" else 1):
        journal.add([{"key": line["key"], "version": judge.version, "verdict": verdict}])
    verdicts = [journal.done[line["key"]]["verdict"] for line in lines]
    by = {
        "kind": choice.kind,
        "model": choice.model,
        "version": judge.version or earlier,
        "prompt": choice.prompt,
    }
    return _with(lines, verdicts), by


def drawings_folder(options: RunOptions) -> Path:
    """Where the drawings of a run are."""
    return options.drawn if options.drawn is not None else options.output / DRAWINGS


def _asked(
    ways: Verdicts, lines: Sequence[DoneItem], together: int
) -> Iterator[tuple[DoneItem, ItemVerdict]]:
    """Verdicts in the order of the items, some asked for at once; the first that fails ends all."""
    pool = ThreadPoolExecutor(together)
    try:
        waiting = [(line, pool.submit(ways.of, line)) for line in lines]
        for line, future in waiting:
            yield line, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _with(lines: Sequence[DoneItem], verdicts: Sequence[ItemVerdict]) -> list[DoneItem]:
    return [{**line, "scored": verdict} for line, verdict in zip(lines, verdicts, strict=True)]


@torch.inference_mode()
def _clip(source: str | None, folder: Path, lines: list[DoneItem]) -> Judged:
    """CLIPScore by a CLIP of transformers, whose image and text embeddings are compared.

    Raises:
        UserError: there is no such model.
    """
    from transformers import CLIPModel, CLIPProcessor

    if source is None:
        raise UserError("judge.model: give the folder or hub id of a CLIP, as openai/clip-vit-base-patch32")
    try:
        model = CLIPModel.from_pretrained(source).eval()
        processor = CLIPProcessor.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise UserError(
            f"judge.model: {source}: no CLIP of transformers ({str(error).splitlines()[0]})"
        ) from None
    verdicts = []
    for line in lines:
        images = [read_drawing(folder, line["key"], one) for one in line["images"]]
        inputs = processor(
            text=[line["prompt"]], images=images, return_tensors="pt", truncation=True, padding=True
        )
        found = model(**inputs)
        text = torch.nn.functional.normalize(found.text_embeds.double(), dim=-1)
        seen = torch.nn.functional.normalize(found.image_embeds.double(), dim=-1)
        cosines = (seen @ text[0]).tolist()
        verdicts.append([{"score": CLIP_WEIGHT * max(one, 0.0), "cosine": one} for one in cosines])
    local = Path(source).is_dir()
    version = environment.folder_hash(Path(source), ("*.safetensors", "*.json")) if local else source
    return _with(lines, verdicts), {"kind": "clip", "model": source, "version": version}


def _distance(protocol: EvaluationProtocol, options: RunOptions, lines: list[DoneItem]) -> Judged:
    """The Fréchet distance of all drawings to real images: of features in a file, or of the judge of EmojiScenes.

    Raises:
        UserError: there are no features, or not one row for each drawing.
    """
    if options.judged is not None:
        try:
            with np.load(options.judged) as file:
                drawn, reference = file["drawn"], file["reference"]
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"{options.judged}: expected an .npz with drawn and reference ({error})"
            ) from None
        if len(drawn) != sum(len(line["images"]) for line in lines):
            raise UserError(
                f"{options.judged}: drawn: features of {len(drawn)} images; give one row for each drawing"
            )
        by = {"kind": "file", "file": options.judged.name, "version": file_hash(options.judged)}
    elif protocol.judge.kind == "emojiscenes":
        from unimm.evaluation.emojiscenes.twin import scene_features, scene_of

        folder = drawings_folder(options)
        images = [
            np.asarray(read_drawing(folder, line["key"], one)) for line in lines for one in line["images"]
        ]
        side = images[0].shape[0]
        renders = [
            np.asarray(Image.fromarray(scene_of(line).render()).resize((side, side))) for line in lines
        ]
        drawn, reference = scene_features(images, options.output), scene_features(renders, options.output)
        by = {"kind": "emojiscenes", "version": "1"}
    else:
        raise UserError(
            f"{protocol.name}: no judge; give --judged with features of drawings and real images (.npz)"
        )
    distance = frechet_distance(drawn, reference)
    verdicts: list[ItemVerdict] = [{"score": 0.0, "fid": None} for _ in lines]
    verdicts[0] = {"score": 0.0, "fid": distance, "category": "all"}
    return _with(lines, verdicts), by


def frechet_distance(drawn: np.ndarray[Any, Any], reference: np.ndarray[Any, Any]) -> float:
    """The Fréchet distance of two sets of features [N, D] and [M, D] (Heusel et al. 2017, arXiv:1706.08500).

    Raises:
        UserError: they are not of one width, or too few for a covariance.
    """
    from scipy import linalg

    if drawn.ndim != 2 or reference.ndim != 2 or drawn.shape[1] != reference.shape[1]:
        raise UserError(f"features: {drawn.shape} and {reference.shape}; give [N, D] and [M, D]")
    if min(len(drawn), len(reference)) < 2:
        raise UserError("features: fewer than two images; a distance of distributions needs more")
    ours, theirs = drawn.astype(np.float64), reference.astype(np.float64)
    gap = ours.mean(0) - theirs.mean(0)
    first, second = np.cov(ours, rowvar=False), np.cov(theirs, rowvar=False)
    first, second = np.atleast_2d(first), np.atleast_2d(second)
    root = linalg.sqrtm(first @ second)
    root = root[0] if isinstance(root, tuple) else root
    return float(gap @ gap + np.trace(first) + np.trace(second) - 2 * np.trace(np.real(root)))
