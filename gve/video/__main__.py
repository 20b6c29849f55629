"""The decoding child that `gve.video.guard` starts."""

from gve.video.guard import serve

serve()
