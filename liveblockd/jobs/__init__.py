"""Long work on the graph: the scheduler and the jobs."""
