"""The loss as a deterministic function of the parameters, on data that are held fixed."""
