"""Reports for people: pictures and tables of a search or of a merge, as one page that needs nothing else."""
