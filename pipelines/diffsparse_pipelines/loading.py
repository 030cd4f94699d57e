"""`from_pretrained` as every supported Diffusers release takes it, without warnings that no user can act on."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import diffusers.utils.logging as diffusers_logging
import torch
import transformers.utils.logging as transformers_logging

from diffsparse.files import first_line

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, ModelMixin

# Classes of the hub's client that say so, by name: the packages beneath it change between releases.
_UNREACHABLE = {"ConnectError", "ConnectTimeout", "ConnectionError", "LocalEntryNotFoundError", "OfflineModeIsEnabled"}
_RETRIES = ("Retrying in ", "Couldn't connect to the Hub")


def from_pretrained(
    cls: type[DiffusionPipeline | ModelMixin], source: str, dtype: torch.dtype, **options: object
) -> DiffusionPipeline | ModelMixin:
    """`cls.from_pretrained(source)` with its weights as `dtype`.

    The argument is called `torch_dtype` up to Diffusers 0.41 and `dtype` later; the old name works in all of them.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch_dtype.*", category=FutureWarning)
        return cls.from_pretrained(source, torch_dtype=dtype, **options)


def modular(source: str, dtype: torch.dtype, workflow: str | None = None) -> DiffusionPipeline:
    """A pipeline that Diffusers has as blocks, its components loaded; of those blocks that a workflow takes."""
    import diffusers

    cut = {} if workflow is None else {"workflow": workflow}
    pipe = diffusers.ModularPipeline.from_pretrained(source, **cut)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch_dtype.*", category=FutureWarning)
        pipe.load_components(torch_dtype=dtype)
    if absent := sorted({*pipe.null_component_names} & {*pipe.pretrained_component_names}):
        raise OSError(f"its {', '.join(absent)} can't be read.")  # Diffusers only warns
    return pipe


def unreachable(error: BaseException) -> str:
    """Why the hub could not be reached, if that is what an error comes from; else empty."""
    reason, link = "", error.__cause__ or error.__context__
    while link is not None:
        if _UNREACHABLE & {cls.__name__ for cls in type(link).__mro__}:
            reason = first_line(link)
        link = link.__cause__ or link.__context__
    return reason.rstrip(".")


@contextmanager
def quiet_hub() -> Iterator[None]:
    """Within: the hub's client says nothing of its retries; the error says what was wrong."""
    loggers = [
        logging.getLogger(name) for name in ("huggingface_hub.utils._http", "diffusers.pipelines.pipeline_utils")
    ]
    for logger in loggers:
        logger.addFilter(_tells)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*local_dir_use_symlinks", category=UserWarning)
            yield
    finally:
        for logger in loggers:
            logger.removeFilter(_tells)


def _tells(record: logging.LogRecord) -> bool:
    said = record.getMessage()
    return not said.startswith(_RETRIES) and " thrown while requesting " not in said


@contextmanager
def no_bars() -> Iterator[None]:
    """Within: loading shows no progress bars, for models that load in no time."""
    enabled = diffusers_logging.is_progress_bar_enabled()
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            diffusers_logging.enable_progress_bar()
            transformers_logging.enable_progress_bar()
