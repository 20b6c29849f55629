"""What an embedding is worth: the sixteen test sets, metrics that know ties, intervals, ablations and reports."""
