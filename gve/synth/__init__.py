"""V-SynFlow: from weakly captioned videos to a multi-task training set, in three stages (paper section 3)."""
