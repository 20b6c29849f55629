"""Jobs for a SLURM cluster.

`job` is the record of what is asked for, `render` makes its batch script, `submit` hands it over with the code and the
configuration as they are at that moment.
"""

from gve.slurm.job import KINDS, Job, Site, read_site
from gve.slurm.render import render
from gve.slurm.submit import SubmitError, submit

__all__ = ["KINDS", "Job", "Site", "SubmitError", "read_site", "render", "submit"]
