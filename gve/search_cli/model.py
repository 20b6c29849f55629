"""What the commands share: the options of the model, and opening it on this rank's device."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from gve.items import InputError

if TYPE_CHECKING:
    from gve.encode.encoder import LoadedEncoder
    from gve.encode.ranks import Placement
    from gve.search.index import Index

SETTING = {"frames": 8, "tokens": 200, "max_length": 8192}
"""As the benchmark shows clips to a model."""


def add_model_options(parser: argparse.ArgumentParser, *, stored: bool) -> None:
    """Adds the options that open a model.

    Args:
        stored: an index names the model, and an option that is not given is the index'.
    """
    own = "; the index' own when not given" if stored else ""
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model", required=not stored, help=f"a checkpoint of gve fit, a model's folder, or a hub name{own}"
    )
    model.add_argument("--adapter", help=f"how the model is used; auto, by its files and name, when not given{own}")
    model.add_argument("--base", help="where the base of a checkpoint lies; where it was trained from when not given")
    for name, text in (
        ("frames", "frames of a clip, uniformly sampled; even"),
        ("tokens", "most vision tokens of a frame, of models that count them"),
        ("max_length", "tokens of one input; longer texts lose their end"),
    ):
        told = f"{text}; {SETTING[name]} when not given{', the index own where there is one' if stored else ''}"
        model.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N", help=told)
    work = parser.add_argument_group("work")
    work.add_argument("--device", help="torch device; the GPU of this rank where there is one, else cpu")
    work.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="of the weights; bfloat16 on a GPU, else float32"
    )
    work.add_argument("--attention", default="sdpa", help="kernel: sdpa (default), eager or flash_attention_2")
    work.add_argument(
        "--batch-tokens", type=int, default=16384, help="most tokens of one forward pass, with padding (default 16384)"
    )
    work.add_argument("--num-workers", type=int, help="processes that decode, of each rank; by its cores, at most 8")


def setting_of(arguments: argparse.Namespace, stored: Mapping[str, int] | None = None) -> dict[str, int]:
    """Frames, tokens and length: as given, else as stored, else as the benchmark's.

    Raises:
        InputError: one is out of range.
    """
    setting = {}
    for name, usual in SETTING.items():
        given = getattr(arguments, name)
        setting[name] = given if given is not None else (stored or {}).get(name, usual)
        if setting[name] < 1:
            raise InputError(f"--{name.replace('_', '-')} {setting[name]} must be at least 1")
    return setting


def workers_of(arguments: argparse.Namespace) -> int:
    """Decoding processes of this rank.

    Raises:
        InputError: the number is negative.
    """
    from gve.encode.ranks import decode_workers

    if arguments.num_workers is not None and arguments.num_workers < 0:
        raise InputError(f"--num-workers {arguments.num_workers} must be at least 0")
    return decode_workers(arguments.num_workers)


def model_name(name: str) -> str:
    """A local path in full, so that a record still finds it from another folder; a hub name as it is."""
    return os.path.abspath(name) if os.path.exists(name) else name


def address_of(name: str) -> str:
    """Where an index lies: a local folder in full, an address of object storage as it is."""
    from gve.search.index import local

    return os.path.abspath(name) if local(name) else name


def open_asker(arguments: argparse.Namespace, index: Index) -> tuple[LoadedEncoder, str]:
    """The encoder that turns questions to an index into vectors, and its model's name; what is not given is the index'.

    Raises:
        InputError: it cannot be opened, or its vectors do not compare with those of the index.
    """
    from gve.encode.ranks import Placement
    from gve.search.indexing import check_record

    record = index.record
    arguments.num_workers = arguments.num_workers or 0  # questions need no pool
    model = model_name(arguments.model) if arguments.model else record.model
    encoder = open_model(
        arguments,
        Placement(),
        setting_of(arguments, record.setting),
        model=model,
        adapter=arguments.adapter or record.adapter,
        base=arguments.base or record.base,
    )
    check_record(index, encoder, record.windows, model)
    return encoder, model


def open_model(
    arguments: argparse.Namespace,
    place: Placement,
    setting: Mapping[str, int],
    *,
    model: str,
    adapter: str = "auto",
    base: str = "",
) -> LoadedEncoder:
    """The encoder on this rank's device.

    Raises:
        InputError: it cannot be opened.
    """
    import torch

    from gve.encode.encoder import Execution
    from gve.encode.pretrained import load_encoder
    from gve.video import Sampling

    if arguments.batch_tokens < 1:
        raise InputError(f"--batch-tokens {arguments.batch_tokens} must be at least 1")
    device = arguments.device or (f"cuda:{place.local_rank}" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    return load_encoder(
        model,
        adapter=adapter,
        base=base,
        inputs={
            "sampling": Sampling.uniform(setting["frames"]),
            "max_frame_tokens": setting["tokens"],
            "max_length": setting["max_length"],
        },
        execution=Execution(
            device=device,
            dtype=arguments.dtype or ("bfloat16" if device.startswith("cuda") else "float32"),
            attention=arguments.attention,
            batch_tokens=arguments.batch_tokens,
            num_workers=workers_of(arguments),
        ),
    )
