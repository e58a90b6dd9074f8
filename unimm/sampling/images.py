"""Drawing: the codes of many images at once, both guidance rows in one batch, over a static cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import StaticCache

from unimm.modeling import UniMMModel, positions
from unimm.processing import UniMMProcessor
from unimm.sampling.choose import guide, pick, probabilities


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
        uniforms: random numbers [B, steps] in [0, 1), one row for each image.
        guidance_scale: 1 switches guidance off and halves the batch.
        temperature: 0 takes the likeliest code.
        top_k: keep the k likeliest codes.
        top_p: keep the likeliest codes of this mass.
        grid: (rows, columns) of codes, by default the layout's.
        on_step: called with the number of steps done.

    Returns:
        int64 codes [B, rows, columns].
    """
    rows, columns = grid or model.layout.grid
    steps = model.layout.drawing_steps(rows, columns)
    prompt_ids = [processor.drawing_ids(prompt, len(steps)) for prompt in prompts]
    guided = guidance_scale != 1.0
    if guided:
        prompt_ids += [processor.unconditional_ids(ids) for ids in prompt_ids]
    input_ids, attention_mask = (t.to(model.device) for t in processor.pad_left(prompt_ids))
    length = input_ids.shape[1]
    mask = torch.nn.functional.pad(attention_mask, (0, len(steps)), value=1)  # [B, T + steps]
    place = positions(mask)
    cache = StaticCache(config=model.decoder.config, max_cache_len=mask.shape[1])
    stream = model.embed(input_ids)
    codes: list[Tensor] = []
    uniforms = uniforms.to(model.device)
    for step, wanted in enumerate(steps):
        end = length + step
        output = model.decode(
            stream,
            attention_mask=mask[:, :end],
            position_ids=place[:, end - stream.shape[1] : end],
            past_key_values=cache,
            use_cache=True,
        )
        assert wanted == model.layout.code, "a forced token inside a drawing"
        logits = model.code_logits(output.last_hidden_state[:, -1])
        if guided:
            conditional, unconditional = logits.float().chunk(2)
            logits = guide(conditional, unconditional, guidance_scale)
        if temperature == 0:
            chosen = logits.argmax(-1)
        else:
            chosen = pick(probabilities(logits, temperature, top_k, top_p), uniforms[:, step])
        codes.append(chosen)
        stream = model.embed_codes(chosen.repeat(2 if guided else 1)[:, None], start=step)
        if on_step is not None:
            on_step(step + 1)
    return torch.stack(codes, dim=1).view(-1, rows, columns)
