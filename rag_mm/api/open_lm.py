"""Frozen language models by address: an imported run, a run trained here, or an HTTP endpoint."""

import urllib.parse

from rag_mm.api import imported
from rag_mm.core import compilation_cache, run_folder
from rag_mm.core.errors import UserError
from rag_mm.frozen_lm import decoder_texts, endpoint
from rag_mm.frozen_lm.language_model import LanguageModel
from rag_mm.frozen_lm.lm_protocol import FrozenLM
from rag_mm.stages.ra_cm3 import train_decoder
from rag_mm.stages.shared import train_tokenizer


def open_lm(
    address: str,
    *,
    dtype: str | None = None,
    limits: endpoint.EndpointLimits | None = None,
) -> FrozenLM:
    """The language model at an address.

    Example:
        open_lm("runs/smollm").score(["Input: cat\\nOutput:"], [" animal", " fruit"])  # float32 [1, 2]

    Args:
        address: folder of a run imported from a LLaMA or trained with a decoder; or the base URL of an
            OpenAI-compatible endpoint and after # the model's name there, such as
            http://localhost:8000/v1#smollm.
        dtype: of an imported run, as for `rag_mm.load`.
        limits: of an endpoint; None: the defaults.

    Raises:
        UserError: there is no such run, it has no language model, or the URL names no model.
    """
    if address.startswith(("http://", "https://")):
        url, _, model = address.partition("#")
        if not model:
            raise UserError(f"{address} names no model; add # and its name, as in {url}#smollm.")
        return endpoint.Endpoint(url, urllib.parse.unquote(model), limits)
    if imported.is_imported(address):
        loaded = imported.load(address, dtype)
        if not isinstance(loaded, LanguageModel):
            raise UserError(f"{address} holds no language model; give an imported LLaMA.")
        return loaded
    compilation_cache.keep_programs()
    run = run_folder.open_run(address)
    tokenizer = train_tokenizer.load_tokenizer(run.workdir)
    return decoder_texts.make(train_decoder.load_generator(run, "decoder", tokenizer))
