"""torch: devices, bfloat16 and attention kernels, each run; and the tiny model end to end."""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from gve.doctor.check import WIDTH, Check, size
from gve.doctor.media import write_clip
from gve.encode.encoder import Execution
from gve.encode.pretrained import load_encoder
from gve.items import Item, one_line
from gve.toy.base import EMBEDDED

_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
_TOLERANCE = 0.03  # of bfloat16 attention against float32


def check_torch() -> Iterator[Check]:
    """The build, its threads, and every device: what it is, that it multiplies in bfloat16, its attention kernels."""
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "ROCm" if torch.version.hip else "CPU"
    yield Check("torch", "build", "ok", f"{torch.__version__} for {build}, {torch.get_num_threads()} threads")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        driver = Path("/proc/driver/nvidia/version").exists()
        hint = ""
        if driver:
            hint = "a driver is loaded: install a CUDA build of torch, or a driver that is new enough for this one"
        yield Check("torch", "GPU", "weak" if driver else "absent", "none: real models need one", hint)
    for device in ["cpu", *(f"cuda:{number}" for number in range(count))]:
        yield check_device(device)


def check_device(device: str) -> Check:
    """One device."""
    told = "CPU"
    if device != "cpu":
        about = torch.cuda.get_device_properties(device)
        free = torch.cuda.mem_get_info(device)[0]
        told = f"{about.name}, {size(free)} of {size(about.total_memory)} free, capability {about.major}.{about.minor}"
    values = torch.randn(1, 2, 64, 64, generator=torch.Generator().manual_seed(0)).to(device)
    exact = torch.nn.functional.scaled_dot_product_attention(values, values, values)
    half = values.to(torch.bfloat16)
    product = half[0, 0] @ half[0, 0]
    if not torch.allclose(product.float(), values[0, 0] @ values[0, 0], atol=0.5, rtol=0.05):
        return Check("torch", device, "broken", f"{told}; a product in bfloat16 is wrong", "use --dtype float32")
    kernels = []
    for name, backend in _BACKENDS.items():
        try:
            # It warns of every reason why a kernel does not suit.
            with sdpa_kernel(backend), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = torch.nn.functional.scaled_dot_product_attention(half, half, half)
        except RuntimeError:
            continue
        if (found.float() - exact).abs().max() > _TOLERANCE:
            return Check("torch", device, "broken", f"{told}; {name} attention is wrong", "use --attention eager")
        kernels.append(name)
    return Check("torch", device, "ok", f"{told}; bfloat16; attention: {', '.join([*kernels, 'plain'])}")


def check_model() -> Iterator[Check]:
    """The tiny base embeds a text and a clip: tokenizer, decoder, tower, language model and pooling."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        clip = Path(folder) / "clip.mp4"
        if not write_clip(clip, "h264"):
            yield Check("model", "tiny base", "weak", "not tried: no encoder for a clip")
            return
        device = "cuda:0" if torch.cuda.is_available() else "cpu"
        encoder = load_encoder(str(EMBEDDED), inputs={"max_frame_tokens": 9}, execution=Execution(device=device))
        encoded = encoder.encode([Item.of("a red circle"), Item.of(video=clip)])
    if encoded.failures:
        yield Check("model", "tiny base", "broken", one_line(str(encoded.failures), WIDTH))
        return
    lengths = np.linalg.norm(encoded.vectors, axis=1)
    good = bool(np.isfinite(lengths).all() and np.allclose(lengths, 1, atol=1e-3))
    told = f"embeds a text and a clip on {device} in {time.monotonic() - start:.1f} s"
    yield Check("model", "tiny base", "ok" if good else "broken", told if good else f"vectors of length {lengths}")
