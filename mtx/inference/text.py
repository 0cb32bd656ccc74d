"""Text that follows a prompt, from a model and its tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mtx.inference.decoding import Generator
from mtx.inference.layout import for_inference, move_from_training
from mtx.inference.sampling import Sampling
from mtx.nn.param import Params
from mtx.training.state import Setup

if TYPE_CHECKING:
    from mtx.data.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One continuation of a prompt.

    Attributes:
        text: The prompt and what follows it.
        tokens: Ids of what follows, without the one that ends it.
        ended: Whether the model ended the document; otherwise the sample is as long as was asked for, or as can be.
    """

    prompt: str
    text: str
    tokens: list[int]
    ended: bool


def sample_text(
    setup: Setup,
    params: Params,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_tokens: int = 128,
    sampling: Sampling | None = None,
    seed: int = 0,
    num_samples: int = 1,
    use_cache: bool = True,
) -> list[Sample]:
    """`num_samples` continuations of each prompt, in order. An empty prompt begins a new document.

    Collective: every process of the run calls it with the same arguments and gets the same samples.

    Args:
        setup: Of the training run.
        params: Its weights, where training has them.

    Raises:
        UserError: A prompt does not fit the model.
    """
    setup, params = move_from_training(setup, params)
    generator = Generator(for_inference(setup), use_cache=use_cache)
    end_id = tokenizer.end_of_document_id
    samples = []
    for prompt in prompts:
        ids = tokenizer.encode(prompt) or [end_id]
        rows = generator.generate(
            params,
            ids,
            max_tokens=max_tokens,
            sampling=sampling or Sampling(),
            seed=seed,
            num_samples=num_samples,
            end_id=end_id,
            usable_tokens=min(tokenizer.vocab_size, setup.run.model.vocab_size),
        )
        for row in rows:
            ended = row[-1] == end_id
            tokens = row[:-1] if ended else row
            text = tokenizer.decode([*ids, *tokens]) if prompt else tokenizer.decode(tokens)
            samples.append(Sample(prompt=prompt, text=text, tokens=tokens, ended=ended))
    return samples
