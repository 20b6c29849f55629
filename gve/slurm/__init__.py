"""Jobs for a SLURM cluster.

`job` is the record of what is asked for, `render` makes its batch script, `submit` hands it over with the code and the
configuration as they are at that moment.
"""
