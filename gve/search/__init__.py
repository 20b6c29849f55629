"""Files to vectors, folders of videos to an index, and questions to moments of videos."""
