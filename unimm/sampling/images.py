"""Drawing: the codes of many images at once, both guidance rows in one batch, over a static cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from unimm.modeling import UniMMModel
from unimm.processing import UniMMProcessor
from unimm.sampling.choose import guide, pick, probabilities
from unimm.sampling.steps import make_steps


@torch.inference_mode()
def sample_codes(
    model: UniMMModel,
    processor: UniMMProcessor,
    prompts: Sequence[str],
    uniforms: Tensor,
    guidance_scale: float = 5.0,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    grid: tuple[int, int] | None = None,
    on_step: Callable[[int], None] | None = None,
) -> Tensor:
    """Draw one image for each prompt.

    Args:
        model: a model with a code vocabulary.
        processor: the model's processor.
        prompts: B texts, of any lengths.
        uniforms: random numbers [B, rows * columns] in [0, 1), one row for each image.
        guidance_scale: 1 switches guidance off and halves the batch.
        temperature: 0 takes the likeliest code.
        top_k: keep the k likeliest codes.
        top_p: keep the likeliest codes of this mass.
        grid: (rows, columns) of codes, by default the layout's.
        on_step: called with the number of codes done.

    Returns:
        int64 codes [B, rows, columns].
    """
    grid = grid or model.layout.grid
    steps = model.layout.drawing_steps(*grid)
    prompt_ids = [processor.drawing_ids(prompt, grid) for prompt in prompts]
    guided = guidance_scale != 1.0
    if guided:
        prompt_ids += [processor.unconditional_ids(ids, grid) for ids in prompt_ids]
    input_ids, attention_mask = (t.to(model.device) for t in processor.pad_left(prompt_ids))
    run = make_steps(model, attention_mask, input_ids.shape[1] + len(steps))
    stream = model.embed(input_ids)
    codes: list[Tensor] = []
    uniforms = uniforms.to(model.device)
    for wanted in steps:
        if wanted != model.layout.code:  # a forced token rides along with the code before it
            forced = torch.full((len(input_ids), 1), wanted, device=model.device)
            stream = torch.cat([stream, model.get_input_embeddings()(forced)], dim=1)
            continue
        logits = model.code_logits(run(stream))
        if guided:
            conditional, unconditional = logits.float().chunk(2)
            logits = guide(conditional, unconditional, guidance_scale)
        if temperature == 0:
            chosen = logits.argmax(-1)
        else:
            chosen = pick(probabilities(logits, temperature, top_k, top_p), uniforms[:, len(codes)])
        stream = model.embed_codes(chosen.repeat(2 if guided else 1)[:, None], start=len(codes))
        codes.append(chosen)
        if on_step is not None:
            on_step(len(codes))
    return torch.stack(codes, dim=1).view(-1, *grid)
