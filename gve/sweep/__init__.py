"""Sweeps: many runs from one file, on this machine or as a SLURM array, and their results in one table.

`plan` reads a sweep file into runs, `crew` does them, `collect` gathers results.csv; `paired` and `scaling` say what
the numbers carry.
"""
