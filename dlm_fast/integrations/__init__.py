"""What lets other projects use this one: one file per project, imported by nobody here but cli."""
