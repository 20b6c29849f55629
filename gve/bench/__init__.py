"""`gve bench`: what this machine does, measured beside the stock way of doing the same work.

`measure` is the frame: contests and gauges, held in alternating rounds. Every other module but `cli` is one bench: a
function `trials(options)` that yields them. Only ratios within one run compare; seconds belong to their machine.
"""
