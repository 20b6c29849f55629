"""`gve export`: a trained model as a folder that other programs load, with the proof that they get the same vectors."""
