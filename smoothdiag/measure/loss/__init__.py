"""The loss as a deterministic function of the parameters, on fixed data."""
