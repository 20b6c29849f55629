"""Tuning on a folder of one's own videos: what `experiments/own_videos.sh` needs beside the commands of gve."""
