"""GVE: one model that embeds text, images, videos and any mix of them for retrieval (arXiv 2510.27571).

`from gve import GVE` is the Python API. It is imported when it is asked for: the command line starts without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gve.api import GVE

__all__ = ["GVE", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "GVE":
        from gve.api import GVE

        return GVE
    raise AttributeError(f"module 'gve' has no attribute {name!r}")
