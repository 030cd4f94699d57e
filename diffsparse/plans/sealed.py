"""Plain values and tensors in files from unknown sources: a version, a digest, and sizes checked first."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file
from torch import Tensor

from diffsparse.errors import InputFileError, PlanError
from diffsparse.files import reason, whole

Values = dict[str, Any]  # plain values by name, as JSON has them

FORMAT = 1  # of plans; counts up when what is written changes so that an earlier release would misread it
_KEY = "diffsparse"
_MOST = 2**24  # bytes of the JSON header


def digest(values: Values, tensors: dict[str, Tensor] | None = None) -> str:
    """SHA-256, 64 hex digits, of plain values and of the names, dtypes, shapes and bytes of tensors.

    It shows accidents, not forgery: a file that is changed on purpose can be given a new digest.
    """
    found = hashlib.sha256(json.dumps(values, sort_keys=True).encode())
    for name, tensor in sorted((tensors or {}).items()):
        found.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def seal(values: Values, tensors: dict[str, Tensor] | None = None, *, version: int | None = None) -> Values:
    """The values, as JSON has them, with the version of their format (by default `FORMAT`) and a digest."""
    values = json.loads(json.dumps(values, allow_nan=False))
    return {"format": version or FORMAT, "digest": digest(values, tensors), **values}


def unseal(sealed: Values, tensors: dict[str, Tensor] | None = None) -> Values:
    """The values without version and digest.

    Raises:
        ValueError: the digest is that of other values.
    """
    values = {name: value for name, value in sealed.items() if name not in ("format", "digest")}
    if sealed.get("digest") != digest(values, tensors):
        raise ValueError("it was changed since it was written (its digest differs)")
    return values


def check_format(values: Values, what: str, remedy: str, newest: int = FORMAT) -> None:
    """Raise PlanError unless the values say that they are written in a format that this release reads."""
    found = values.get("format")
    if type(found) is not int or found < 1:
        raise PlanError(f"the {what} has no version of its format; {remedy}")
    if found > newest:
        raise PlanError(
            f"the {what} is of a later release (format {found}, here it is {newest}); update diffsparse, or {remedy}"
        )


def plain(text: str | bytes) -> Values:
    """A JSON object.

    Raises:
        ValueError: it is none, or holds NaN, infinity, or numbers and nesting beyond any use.
    """

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no number to be kept")

    try:
        values = json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it holds no JSON that is ours ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"wanted a JSON object; got {type(values).__name__}")
    return values


def write(path: str | Path, values: Values, tensors: dict[str, Tensor]) -> None:
    """Write values and tensors as one safetensors file, whole or not at all.

    Raises:
        OutputFileError: the file can't be written.
    """
    kept, metadata = _prepared(values, tensors)
    with whole(path) as temporary:
        try:
            save_file(kept, temporary, metadata)
        except SafetensorError as error:
            number = re.search(r"os error (\d+)", str(error))
            raise (OSError(int(number[1]), os.strerror(int(number[1]))) if number else OSError(str(error))) from error


def to_bytes(values: Values, tensors: dict[str, Tensor]) -> bytes:
    """What `write` writes."""
    return bytes(save(*_prepared(values, tensors)))


def _prepared(values: Values, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata, as safetensors takes them."""
    kept = {name: tensor.contiguous() for name, tensor in sorted(tensors.items())}
    return kept, {_KEY: json.dumps(seal(values, kept), sort_keys=True)}


def read(path: str | Path, what: str, remedy: str) -> tuple[Values, dict[str, Tensor]]:
    """The values and tensors of such a file; nothing is allocated that the file itself isn't large enough for.

    Args:
        what: the name of such a file in messages.
        remedy: what to do where it can't be used.

    Raises:
        InputFileError: no such file, or it can't be opened.
        PlanError: it is truncated, changed, of a later release, or no such file at all.
    """
    try:
        Path(path).open("rb").close()
        with safe_open(path, framework="pt") as file:  # lengths and shapes are held against the file's size there
            text = (file.metadata() or {}).get(_KEY, "")
            if len(text) > _MOST:
                raise ValueError(f"its header has more than {_MOST >> 20} MiB")
            values = plain(text)
            check_format(values, what, remedy)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return unseal(values, tensors), tensors
    except OSError as error:
        raise InputFileError(f"can't read the {what} {path}: {reason(error)}; {remedy}") from error
    except PlanError as error:
        raise PlanError(f"{path}: {error}") from error
    except (SafetensorError, ValueError) as error:
        raise PlanError(f"can't read the {what} {path}: {error}; {remedy}") from error
