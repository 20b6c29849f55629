"""Fetches annotation files from Hugging Face, where their licence lets a program do it. Never videos."""

from __future__ import annotations

from pathlib import Path

from gve.eval.records import Source
from gve.items import InputError


def download(source: Source, folder: Path) -> Path:
    """Fetches the annotation files of a source; files that are there already are not fetched again.

    Args:
        folder: where they go.

    Returns:
        The folder.

    Raises:
        InputError: the licence does not permit it, or the hub has no such files.
        OSError: the hub cannot be reached.
    """
    if source.terms or not source.files:
        raise InputError(
            f"--download does not fetch {source.name}: {source.terms or 'the hub does not hold its annotations'}; get "
            f"{source.obtain}"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        snapshot_download(source.hub, repo_type="dataset", allow_patterns=[*source.files], local_dir=folder)
    except RepositoryNotFoundError:
        raise InputError(
            f"Hugging Face has no data set {source.hub}; get {source.obtain} and pass it as --from"
        ) from None
    if not any(found for pattern in source.files for found in folder.rglob(pattern.rpartition("/")[2])):
        raise InputError(f"data set {source.hub} has no {' or '.join(source.files)} any more; get {source.obtain}")
    return folder
